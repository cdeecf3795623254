// SPDX-License-Identifier: Apache-2.0

package envelope

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Envelopes of upstream's clients open.
func TestUpstreamsEnvelopes(t *testing.T) {
	var v struct {
		Computed struct{ Envelope, Recipient_secret, Recipient_public string } `json:"env_encryption_computed"`
		Upstream struct{ Envelope, Recipient_secret, Plaintext string }        `json:"env_encryption_upstream"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	key, err := keys.NewEnvKey(unhex(t, v.Computed.Recipient_secret))
	if err != nil {
		t.Fatal(err)
	}
	if public, err := PublicKey(key); err != nil || hex.EncodeToString(public) != v.Computed.Recipient_public {
		t.Errorf("public key %x, %v", public, err)
	}
	got, err := Opening{Key: key, Allowed: []string{"FOO", "SECRET"}}.Open(unhex(t, v.Computed.Envelope))
	if err != nil || !maps.Equal(got.Variables, map[string]string{"FOO": "bar", "SECRET": "123"}) || got.Version != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	// The other vector's plaintext is no document; that it decrypts is what it shows.
	if key, err = keys.NewEnvKey(unhex(t, v.Upstream.Recipient_secret)); err != nil {
		t.Fatal(err)
	}
	plain, err := Opening{Key: key}.openV1(unhex(t, v.Upstream.Envelope))
	if err != nil || string(plain) != v.Upstream.Plaintext {
		t.Errorf("%s, %v", plain, err)
	}
	if _, err := (Opening{Key: key}).Open(unhex(t, v.Upstream.Envelope)); fault.Code(err) != "env_malformed" {
		t.Errorf("no document: %v", err)
	}
}

// world is an app with its key, and two who may sign.
type world struct {
	key      keys.EnvKey
	public   []byte
	signer   ed25519.PrivateKey
	stranger ed25519.PrivateKey
	binding  Binding
	opening  Opening
}

func newWorld(t *testing.T) *world {
	t.Helper()
	raw := make([]byte, 32)
	rand.Read(raw)
	key, err := keys.NewEnvKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	public, err := PublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	_, signer, _ := ed25519.GenerateKey(rand.Reader)
	_, stranger, _ := ed25519.GenerateKey(rand.Reader)
	w := &world{key: key, public: public, signer: signer, stranger: stranger, binding: Binding{App: dstack.AppID{1}, Compose: dstack.ComposeHash{2}, Version: 5}}
	w.opening = Opening{Key: key, App: w.binding.App, Compose: w.binding.Compose, Signers: [][]byte{signer.Public().(ed25519.PublicKey)},
		MinVersion: 4, Allowed: []string{"A", "B"}, Strict: true}
	return w
}

func (w *world) seal(t *testing.T, change func(*Binding), signer ed25519.PrivateKey) []byte {
	t.Helper()
	b := w.binding
	if change != nil {
		change(&b)
	}
	data, err := Seal(w.public, b, signer, map[string]string{"A": "1", "B": "two\nlines ü", "C": "not allowed"})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestASealedEnvironmentOpens(t *testing.T) {
	w := newWorld(t)
	got, err := w.opening.Open(w.seal(t, nil, w.signer))
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got.Variables, map[string]string{"A": "1", "B": "two\nlines ü"}) || got.Version != 5 || !slices.Equal(got.Skipped, []string{"C"}) {
		t.Errorf("%+v", got)
	}
	// The same version again is a reboot.
	w.opening.MinVersion = 5
	if _, err := w.opening.Open(w.seal(t, nil, w.signer)); err != nil {
		t.Error(err)
	}
}

// The host replaces, replays or redirects the environment (threats.md J03).
func TestThreat_J03_TheHostCannotReplaceTheEnvironment(t *testing.T) {
	w := newWorld(t)
	v1, err := SealV1(w.public, map[string]string{"A": "the host's"})
	if err != nil {
		t.Fatal(err)
	}
	good := w.seal(t, nil, w.signer)
	flip := func(at int) []byte {
		b := bytes.Clone(good)
		b[(at+len(b))%len(b)] ^= 1
		return b
	}
	for name, c := range map[string]struct {
		data []byte
		with func(*Opening)
		code string
	}{
		"other values, encrypted to the public key":  {v1, nil, "env_unsigned"},
		"other values, signed by a stranger":         {w.seal(t, nil, w.stranger), nil, "env_signer"},
		"an older version":                           {w.seal(t, func(b *Binding) { b.Version = 3 }, w.signer), nil, "env_rollback"},
		"another app's":                              {w.seal(t, func(b *Binding) { b.App[0] = 9 }, w.signer), nil, "env_signature"},
		"another manifest's":                         {w.seal(t, func(b *Binding) { b.Compose[0] = 9 }, w.signer), nil, "env_binding"},
		"another key epoch's":                        {w.seal(t, func(b *Binding) { b.Epoch = 1 }, w.signer), nil, "env_binding"},
		"a flipped bit in the signature":             {flip(header - keySize - 1), nil, "env_signature"},
		"a flipped bit in the ciphertext":            {flip(-1), nil, "env_signature"},
		"a flipped bit in the encapsulated key":      {flip(header - 1), nil, "env_signature"},
		"a flipped bit in the version":               {flip(len(magic) + 4 + 7), nil, "env_signature"},
		"cut short":                                  {good[:header], nil, "env_malformed"},
		"empty":                                      {nil, nil, "env_unsigned"},
		"too large":                                  {make([]byte, MaxSize+1), nil, "env_too_large"},
		"for another key":                            {good, func(o *Opening) { o.Key, _ = keys.NewEnvKey(bytes.Repeat([]byte{7}, 32)) }, "env_decrypt"},
		"a ciphertext altered by the signer himself": {resign(w, good), nil, "env_decrypt"},
	} {
		o := w.opening
		if c.with != nil {
			c.with(&o)
		}
		if _, err := o.Open(c.data); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	// Without signers in the manifest upstream's form is what there is.
	w.opening.Signers = nil
	if got, err := w.opening.Open(v1); err != nil || got.Variables["A"] != "the host's" {
		t.Errorf("without signers: %+v, %v", got, err)
	}
	for _, bad := range [][]byte{nil, v1[:59], flipLast(v1)} {
		if _, err := w.opening.Open(bad); err == nil {
			t.Errorf("%d bytes of upstream's form were accepted", len(bad))
		}
	}
}

func flipLast(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}

// resign alters the ciphertext and signs it anew.
func resign(w *world, good []byte) []byte {
	b := flipLast(good)
	copy(b[header-keySize-ed25519.SignatureSize:], ed25519.Sign(w.signer, w.binding.signed(b[header-keySize:header], b[header:])))
	return b
}

func TestThreat_D07_NamesThatChangeWhatRuns(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "BASH_ENV", "ENV", "IFS", "PYTHONPATH", "PYTHONSTARTUP", "NODE_OPTIONS",
		"JAVA_TOOL_OPTIONS", "DOCKER_HOST", "COMPOSE_FILE", "DSTACK_X", "HTTP_PROXY", "https_proxy", "ld_preload"} {
		env := map[string]string{name: "x"}
		if _, err := Seal(w.public, w.binding, w.signer, env); fault.Code(err) != "env_name_denied" {
			t.Errorf("deploy with %s: %v", name, err)
		}
		data, err := SealV1(w.public, env)
		if err != nil {
			t.Fatal(err)
		}
		o := Opening{Key: w.key, Allowed: []string{name}, Strict: true}
		if _, err := o.Open(data); fault.Code(err) != "env_name_denied" {
			t.Errorf("guest with %s: %v", name, err)
		}
		o.Strict = false
		if got, err := o.Open(data); err != nil || len(got.Variables) != 1 {
			t.Errorf("upstream's guest with %s: %+v, %v", name, got, err)
		}
	}
	for _, name := range []string{"MY_LD_PRELOAD", "PATHS", "ENVIRONMENT", "DATABASE_URL", "PROXY"} {
		if _, err := Seal(w.public, w.binding, w.signer, map[string]string{name: "x"}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLimitsOfTheEnvironment(t *testing.T) {
	w := newWorld(t)
	many := map[string]string{}
	for i := range MaxVariables + 1 {
		many[fmt.Sprintf("V%d", i)] = ""
	}
	large := map[string]string{}
	for i := range 9 {
		large[fmt.Sprintf("V%d", i)] = strings.Repeat("x", MaxValue)
	}
	for name, c := range map[string]struct {
		env  map[string]string
		code string
	}{
		"a name with a dash":      {map[string]string{"A-B": ""}, "env_name"},
		"a name with a digit":     {map[string]string{"1A": ""}, "env_name"},
		"an empty name":           {map[string]string{"": ""}, "env_name"},
		"a name of 256 bytes":     {map[string]string{strings.Repeat("A", 256): ""}, "env_name"},
		"a value over 128 KiB":    {map[string]string{"A": strings.Repeat("x", MaxValue+1)}, "env_too_large"},
		"a value of no UTF-8":     {map[string]string{"A": "\xff"}, "env_malformed"},
		"1025 variables":          {many, "env_too_large"},
		"more than 1 MiB in all":  {large, "env_too_large"},
		"a name of 255 bytes":     {map[string]string{strings.Repeat("A", 255): ""}, ""},
		"a value of 128 KiB":      {map[string]string{"A": strings.Repeat("x", MaxValue)}, ""},
		"no variable":             {nil, ""},
		"a value with everything": {map[string]string{"A": "\"\\$`' \n\t\r\u2028😀"}, ""},
	} {
		data, err := Seal(w.public, w.binding, w.signer, c.env)
		if fault.Code(err) != c.code || (err == nil) != (c.code == "") {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
		if err != nil {
			continue
		}
		o := w.opening
		o.Allowed = slices.Collect(maps.Keys(c.env))
		if got, err := o.Open(data); err != nil || !maps.Equal(got.Variables, c.env) && len(c.env) > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPlaintextsOfStrangers(t *testing.T) {
	for name, c := range map[string]struct {
		text, code string
		want       map[string]string
	}{
		"the last of two counts":  {`{"env":[{"key":"A","value":"1"},{"key":"A","value":"2"}]}`, "", map[string]string{"A": "2"}},
		"unknown members":         {`{"env":[{"key":"A","value":"1","x":1}],"y":2}`, "", map[string]string{"A": "1"}},
		"no env":                  {`{}`, "", map[string]string{}},
		"a value that is no text": {`{"env":[{"key":"A","value":1}]}`, "env_malformed", nil},
		"a list":                  {`[]`, "env_malformed", nil},
		"more behind":             {`{"env":[]}{}`, "env_malformed", nil},
		"a name out of bounds":    {`{"env":[{"key":"A B","value":""}]}`, "env_name", nil},
	} {
		got, err := decode([]byte(c.text))
		if fault.Code(err) != c.code || err == nil && !maps.Equal(got, c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "value\":1") {
			t.Errorf("%s: the error quotes the plaintext", name)
		}
	}
}

func FuzzOpen(f *testing.F) {
	key, _ := keys.NewEnvKey(bytes.Repeat([]byte{1}, 32))
	public, _ := PublicKey(key)
	signer := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32))
	v2, err := Seal(public, Binding{Version: 1}, signer, map[string]string{"A": "b"})
	if err != nil {
		f.Fatal(err)
	}
	v1, _ := SealV1(public, map[string]string{"A": "b"})
	f.Add(v2)
	f.Add(v1)
	f.Add([]byte(magic))
	f.Fuzz(func(t *testing.T, data []byte) {
		o := Opening{Key: key, Signers: [][]byte{signer.Public().(ed25519.PublicKey)}, Allowed: []string{"A"}}
		got, err := o.Open(data)
		// What opens is what the signer made, in this process or another.
		if err == nil && (got.Version != 1 || got.Variables["A"] != "b") {
			t.Fatalf("%x opens to %v", data, got)
		}
		o.Signers = nil
		_, _ = o.Open(data)
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"env":[{"key":"A","value":"1"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		env, err := decode(data)
		if err != nil {
			return
		}
		text, err := encode(env)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(text)
		if err != nil || !maps.Equal(env, again) {
			t.Fatalf("%v, %v", again, err)
		}
	})
}
