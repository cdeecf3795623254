// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestThreat_E06_SecretsCannotBePrinted(t *testing.T) {
	raw := bytes.Repeat([]byte{0xab}, Size)
	s, err := NewDiskKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", s, "in", struct{ K DiskKey }{s})
	shown := log.String()
	for _, v := range []any{s, &s, struct{ K DiskKey }{s}, struct{ k DiskKey }{s}, &struct{ k *DiskKey }{&s}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d", "%q", "%t", "%f", "%p"} {
			shown += fmt.Sprintf(verb, v)
		}
	}
	for _, leak := range []string{"abab", "ABAB", "171 171", "0xab, 0xab", "q6ur"} {
		if strings.Contains(shown, leak) {
			t.Errorf("a secret shows as %s", shown)
		}
	}
	if _, err := json.Marshal(s); err == nil {
		t.Error("a secret was serialised")
	}
}

func TestWipeReachesEveryCopy(t *testing.T) {
	s, _ := NewAppKey(bytes.Repeat([]byte{1}, Size))
	c, clone := s, s.Clone()
	s.Wipe()
	if !c.IsZero() || clone.IsZero() {
		t.Errorf("after Wipe: copy %v zero=%t, clone zero=%t", c, c.IsZero(), clone.IsZero())
	}
}

func TestALengthThatIsNot32IsRefused(t *testing.T) {
	for _, n := range []int{0, 31, 33, 64} {
		if _, err := NewSeed(make([]byte, n)); fault.Code(err) != "key_length" {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestUpstreamsKeyFile(t *testing.T) {
	text := testkit.Vectors(t, "guest-agent/simulator/appkeys.json")
	k, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if k.App.IsZero() || k.Provider.Kind != None || len(k.AppSignature) != 65 {
		t.Errorf("parsed %+v", k)
	}
	again, err := k.Encode()
	if err != nil {
		t.Fatal(err)
	}
	k2, err := Parse(again)
	if err != nil || !bytes.Equal(k2.App.Bytes(), k.App.Bytes()) || string(k2.Provider.CAKey) != string(k.Provider.CAKey) || k2.CACert != k.CACert {
		t.Errorf("round trip: %+v, %v", k2, err)
	}
	a := k.ForAgent()
	k.Wipe()
	if a.App.IsZero() || !a.Disk.IsZero() || !a.Env.IsZero() || !k.App.IsZero() || len(a.Provider.CAKey) == 0 || a.Provider.CAKey[0] == 0 {
		t.Errorf("the agent's copy: %+v", a)
	}
}

func TestTheEventOfAProvider(t *testing.T) {
	for want, p := range map[string]Provider{
		`{"name":"none","id":""}`:          {Kind: None},
		`{"name":"tpm","id":""}`:           {Kind: TPM, SPKI: []byte{1}},
		`{"name":"local-sgx","id":"0102"}`: {Kind: Local, MR: []byte{1, 2}},
		`{"name":"kms","id":"30"}`:         {Kind: KMS, SPKI: []byte{0x30}},
	} {
		if got, err := p.Event(); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v", want, got, err)
		}
	}
	if _, err := (Provider{}).Event(); err == nil {
		t.Error("no provider has an event")
	}
}

func TestMalformedKeyFiles(t *testing.T) {
	good := func() map[string]any {
		return map[string]any{"k256_key": hex.EncodeToString(make([]byte, 32)), "k256_signature": "", "key_provider": map[string]any{"Kms": map[string]any{"url": "u", "pubkey": "30"}}}
	}
	for name, change := range map[string]func(map[string]any){
		"no app key":      func(m map[string]any) { delete(m, "k256_key") },
		"short app key":   func(m map[string]any) { m["k256_key"] = "00" },
		"short disk key":  func(m map[string]any) { m["disk_crypt_key"] = "00" },
		"short signature": func(m map[string]any) { m["k256_signature"] = "00" },
		"no provider":     func(m map[string]any) { delete(m, "key_provider") },
		"unknown":         func(m map[string]any) { m["key_provider"] = map[string]any{"X": 1} },
		"two providers": func(m map[string]any) {
			m["key_provider"] = map[string]any{"Kms": map[string]any{}, "None": map[string]any{}}
		},
		"no PEM": func(m map[string]any) { m["key_provider"] = map[string]any{"None": map[string]any{"key": "x"}} },
	} {
		m := good()
		change(m)
		text, _ := json.Marshal(m)
		if _, err := Parse(text); fault.Code(err) != "app_keys_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	text, _ := json.Marshal(good())
	if _, err := Parse(text); err != nil {
		t.Errorf("the unchanged file: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"k256_key":"0000000000000000000000000000000000000000000000000000000000000001","key_provider":{"Kms":{"url":"u","pubkey":"30"}}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := Parse(data)
		if err != nil {
			return
		}
		again, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
	})
}
