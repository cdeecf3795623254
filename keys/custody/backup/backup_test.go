// SPDX-License-Identifier: Apache-2.0

package backup

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"
	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/custody"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func wantCode(t testing.TB, what string, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("%s: %v, want code %s", what, err, code)
	}
}

func roots(t testing.TB) *custody.Roots {
	t.Helper()
	r, err := custody.Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Wipe)
	return r
}

// people returns n operators and their keys.
func people(t testing.TB, n int) ([]Operator, []*Key) {
	t.Helper()
	var operators []Operator
	var private []*Key
	for i := range n {
		k := &Key{h: &hidden{must(ecdh.X25519().GenerateKey(rand.Reader))}}
		private = append(private, k)
		operators = append(operators, Operator{Name: fmt.Sprintf("operator-%d", i+1), Public: k.Public()})
	}
	return operators, private
}

func open(t testing.TB, b *Backup, private []*Key) []Share {
	t.Helper()
	var out []Share
	for _, k := range private {
		out = append(out, must(b.OpenShare(k)))
	}
	return out
}

// same holds two roots to each other by what they derive.
func same(t testing.TB, a, b *custody.Roots) {
	t.Helper()
	if !a.Identity().Equal(b.Identity()) {
		t.Error("another identity came back")
	}
	first, _ := a.Epochs()
	if other, _ := b.Epochs(); other != first {
		t.Errorf("epochs from %d came back as from %d", first, other)
	}
	for _, epoch := range []uint64{0, first} {
		s := custody.Scope{App: dstack.AppID{1}, Epoch: epoch}
		if !bytes.Equal(must(a.AppKey(context.Background(), s)).Bytes(), must(b.AppKey(context.Background(), s)).Bytes()) {
			t.Errorf("another key of epoch %d came back", epoch)
		}
	}
}

// subsets calls visit with every subset of k of n.
func subsets(n, k int, visit func([]int)) {
	for bits := range 1 << n {
		var set []int
		for i := range n {
			if bits>>i&1 == 1 {
				set = append(set, i)
			}
		}
		if len(set) == k {
			visit(set)
		}
	}
}

// Every quorum restores and nothing smaller does, for all m of n up to 5; shares travel
// as text, in any order.
func TestThreat_G01_AQuorumAndNothingLessRestores(t *testing.T) {
	r := roots(t)
	if err := r.EraseBefore(7); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 5; n++ {
		operators, private := people(t, n)
		for m := 1; m <= n; m++ {
			text, err := Seal(r, operators, m)
			if err != nil {
				t.Fatal(err)
			}
			b := must(Parse(text))
			if b.Quorum != m || len(b.Operators) != n || b.FirstEpoch != 7 || !b.Identity.Equal(r.Identity()) || time.Since(b.Made) > time.Minute {
				t.Fatalf("the header says %+v", b)
			}
			all := open(t, b, private)
			pick := func(set []int) (out []Share) {
				for _, i := range set {
					out = append([]Share{must(ParseShare(all[i].Text()))}, out...)
				}
				return out
			}
			for k := m; k <= n; k++ {
				subsets(n, k, func(set []int) {
					got, err := b.Restore(pick(set), r.Identity())
					if err != nil {
						t.Fatalf("%d of %d: shares %v: %v", m, n, set, err)
					}
					same(t, r, got)
					if p := got.Provenance(); p.Kind != custody.Restored {
						t.Errorf("provenance %+v", p)
					}
					got.Wipe()
				})
			}
			for k := range m {
				subsets(n, k, func(set []int) {
					_, err := b.Restore(pick(set), r.Identity())
					wantCode(t, fmt.Sprintf("%d of %d: shares %v", m, n, set), err, "share_too_few")
				})
			}
			// Nor does it help to write a smaller quorum into the backup.
			if m > 1 {
				less := must(Parse(bytes.Replace(text, fmt.Appendf(nil, "quorum %d %d", m, n), fmt.Appendf(nil, "quorum %d %d", m-1, n), 1)))
				subsets(n, m-1, func(set []int) {
					_, err := less.Restore(pick(set), r.Identity())
					wantCode(t, fmt.Sprintf("%d of %d made %d", m, n, m-1), err, "backup_altered")
				})
				_, err := less.OpenShare(private[0])
				wantCode(t, "open a share of a smaller quorum", err, "backup_altered")
			}
		}
	}
}

func TestRootsOfAnUpstreamKMS(t *testing.T) {
	r := roots(t)
	k := must(r.Export())
	k.EpochSecret, k.FirstEpoch = nil, 0
	old := must(custody.Import(k, r.Identity()))
	operators, private := people(t, 2)
	b := must(Parse(must(Seal(old, operators, 2))))
	if b.FirstEpoch != 0 {
		t.Errorf("the header says epoch %d", b.FirstEpoch)
	}
	same(t, old, must(b.Restore(open(t, b, private), old.Identity())))
}

func TestSharesThatAreRefused(t *testing.T) {
	r := roots(t)
	operators, private := people(t, 3)
	b := must(Parse(must(Seal(r, operators, 2))))
	again := must(Parse(must(Seal(r, operators, 2))))
	good, other := open(t, b, private), open(t, again, private)
	changed := func(change func(*share)) Share {
		s := *good[1].s
		value := *s.value
		s.value = &value
		change(&s)
		return Share{s: &s}
	}
	for name, c := range map[string]struct {
		shares []Share
		code   string
	}{
		"none":                   {nil, "share_too_few"},
		"one":                    {good[:1], "share_too_few"},
		"one twice":              {[]Share{good[0], good[0]}, "share_duplicate"},
		"one too many":           {[]Share{good[0], good[1], good[0]}, "share_duplicate"},
		"of another backup":      {[]Share{good[0], other[1]}, "share_foreign"},
		"all of another":         {other, "share_foreign"},
		"an altered one":         {[]Share{good[0], changed(func(s *share) { s.value[3] ^= 1 })}, "share_altered"},
		"beside enough":          {[]Share{good[0], good[2], changed(func(s *share) { s.value[3] ^= 1 })}, "share_altered"},
		"in another's place":     {[]Share{good[0], changed(func(s *share) { s.index = 3 })}, "share_altered"},
		"beyond the operators":   {[]Share{good[0], changed(func(s *share) { s.index = 4 })}, "share_foreign"},
		"index 0":                {[]Share{good[0], changed(func(s *share) { s.index = 0 })}, "share_foreign"},
		"renamed to this backup": {[]Share{good[0], changed(func(s *share) { s.value = other[1].s.value })}, "share_altered"},
		"zero value":             {[]Share{good[0], {}}, "share_foreign"},
		"a wiped one":            {[]Share{good[0], changed(func(s *share) { clear(s.value[:]) })}, "share_altered"},
	} {
		_, err := b.Restore(c.shares, r.Identity())
		wantCode(t, name, err, c.code)
	}
	for name, want := range map[string]custody.Identity{
		"another's": roots(t).Identity(), "none": {}, "the CA alone": {CA: r.Identity().CA},
	} {
		_, err := b.Restore(good, want)
		wantCode(t, "identity wanted: "+name, err, "root_mismatch")
	}
	_, strangers := people(t, 1)
	_, err := b.OpenShare(strangers[0])
	wantCode(t, "a stranger's key", err, "operator_unknown")
	good[0].Wipe()
	_, err = b.Restore(good, r.Identity())
	wantCode(t, "after Wipe", err, "share_altered")
}

// Someone who knows the operators' public keys, and not the roots, seals his own: what
// refuses them is the identity that the caller wants, and a header that claims the
// right one does not help.
func TestThreat_C03_ABackupOfOtherRootsIsRefused(t *testing.T) {
	r, attacker := roots(t), roots(t)
	operators, private := people(t, 2)
	text := must(Seal(attacker, operators, 2))
	b := must(Parse(text))
	_, err := b.Restore(open(t, b, private), r.Identity())
	wantCode(t, "other roots", err, "root_mismatch")

	shares := open(t, b, private)
	b.Identity = r.Identity()
	_, err = b.Restore(shares, r.Identity())
	wantCode(t, "a header that lies", err, "backup_altered")
	// A header that was sealed with the lie in it.
	aead := must(b.cipher(secretOf(t, shares)))
	if err := attacker.Escrow(func(encoded []byte) error {
		b.roots = aead.Seal(nil, make([]byte, aead.NonceSize()), encoded, b.header())
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	_, err = b.Restore(shares, r.Identity())
	wantCode(t, "a lie that is sealed", err, "root_mismatch")
}

// Every byte of a backup, changed, is refused somewhere on the way, with shares that
// were opened before and with those that are opened from it.
func TestATamperedBackupIsRefused(t *testing.T) {
	r := roots(t)
	operators, private := people(t, 3)
	text := must(Seal(r, operators, 2))
	good := must(Parse(text))
	shares := open(t, good, private)
	parsed := 0
	refused := func(what string, bad []byte) {
		t.Helper()
		b, err := Parse(bad)
		if err != nil {
			wantCode(t, what, err, "backup_malformed")
			return
		}
		parsed++
		var its []Share
		for _, k := range private {
			if s, err := b.OpenShare(k); err == nil {
				its = append(its, s)
			}
		}
		for name, set := range map[string][]Share{"old shares": shares, "its shares": its} {
			if got, err := b.Restore(set, r.Identity()); err == nil {
				got.Wipe()
				t.Errorf("%s: restored by %s", what, name)
			}
		}
	}
	for i := range text {
		for _, x := range []byte{1, 2, 0x20} {
			bad := bytes.Clone(text)
			bad[i] ^= x
			refused(fmt.Sprintf("byte %d ^ %#x", i, x), bad)
		}
		refused(fmt.Sprintf("byte %d deleted", i), append(bytes.Clone(text[:i]), text[i+1:]...))
		refused(fmt.Sprintf("the first %d bytes", i), text[:i])
	}
	if parsed == 0 {
		t.Error("no change came as far as the cryptography")
	}
	for name, bad := range map[string]string{
		"empty":     "",
		"longer":    string(text) + "\n",
		"too large": string(text) + strings.Repeat("0", MaxSize),
		"version 2": strings.Replace(string(text), "-v1", "-v2", 1),
		"quorum 0":  strings.Replace(string(text), "quorum 2 3", "quorum 0 3", 1),
		"quorum 4":  strings.Replace(string(text), "quorum 2 3", "quorum 4 3", 1),
		"99 people": strings.Replace(string(text), "quorum 2 3", "quorum 2 99", 1),
		"a plus":    strings.Replace(string(text), "quorum 2 3", "quorum +2 3", 1),
	} {
		_, err := Parse([]byte(bad))
		wantCode(t, name, err, "backup_malformed")
	}
	// Shares do not move between operators or backups.
	b := must(Parse(text))
	b.boxes[0], b.boxes[1] = b.boxes[1], b.boxes[0]
	_, err := b.OpenShare(private[0])
	wantCode(t, "swapped shares", err, "backup_altered")
}

// secretOf combines shares, enough of them, as Restore does.
func secretOf(t *testing.T, shares []Share) group.Scalar {
	t.Helper()
	var points []secretsharing.Share
	for _, s := range shares {
		v := scalars.NewScalar()
		if err := v.UnmarshalBinary(s.s.value[:]); err != nil {
			t.Fatal(err)
		}
		points = append(points, secretsharing.Share{ID: scalars.NewScalar().SetUint64(uint64(s.s.index)), Value: v})
	}
	return must(secretsharing.Recover(uint(len(points)-1), points))
}

func TestThreat_E06_SharesAndKeysCannotBePrinted(t *testing.T) {
	s := Share{s: &share{index: 1, value: (*[32]byte)(bytes.Repeat([]byte{0xab}, 32))}}
	k := Key{h: &hidden{must(ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{0xab}, 32)))}}
	type holder struct {
		S Share
		s Share
		K Key
		k *Key
		l Key
	}
	h := holder{s, s, k, &k, k}
	var shown bytes.Buffer
	for _, v := range []any{s, &s, k, &k, h, &h, []Share{s}} {
		fmt.Fprintf(&shown, "%v %+v %#v %s %x %d\n", v, v, v, v, v, v)
		slog.New(slog.NewJSONHandler(&shown, nil)).Info("x", "v", v)
		if text, err := json.Marshal(v); err == nil {
			t.Errorf("encoding/json made %s", text)
		}
	}
	for _, leak := range []string{"abab", "ABAB", "171 171", "q6ur"} {
		if strings.Contains(shown.String(), leak) {
			t.Errorf("a secret shows as %s", shown.String())
		}
	}
	if reflect.TypeFor[Share]().Comparable() || reflect.TypeFor[Key]().Comparable() {
		t.Error("== compiles between secrets")
	}
}

func TestShareText(t *testing.T) {
	operators, private := people(t, 1)
	b := must(Parse(must(Seal(roots(t), operators, 1))))
	text := must(b.OpenShare(private[0])).Text()
	if len(text) > maxShare || bytes.Count(text, []byte("\n")) != 1 {
		t.Errorf("the text is %q", text)
	}
	if got := must(ParseShare([]byte("\n  " + string(text) + "\r\n"))); !bytes.Equal(got.Text(), text) {
		t.Error("white space matters")
	}
	for i := range bytes.TrimSpace(text) {
		for _, x := range []byte{1, 2, 4, 0x20, 0x80} {
			bad := bytes.Clone(text)
			bad[i] ^= x
			_, err := ParseShare(bad)
			wantCode(t, fmt.Sprintf("byte %d", i), err, "share_malformed")
		}
	}
	for name, bad := range map[string]string{
		"empty": "", "cut": string(text[:40]), "two": string(text) + string(text), "large": string(text) + strings.Repeat(" ", maxShare),
	} {
		_, err := ParseShare([]byte(bad))
		wantCode(t, name, err, "share_malformed")
	}
	if (Share{}).Text() != nil {
		t.Error("no share has a text")
	}
}

func TestQuorumsAndOperatorsThatAreRefused(t *testing.T) {
	r := roots(t)
	three, _ := people(t, 3)
	many, _ := people(t, MaxOperators+1)
	named := func(name string) []Operator { return []Operator{{name, three[0].Public}} }
	for name, c := range map[string]struct {
		operators []Operator
		m         int
		code      string
	}{
		"nobody":         {nil, 0, "backup_quorum"},
		"none of three":  {three, 0, "backup_quorum"},
		"less than none": {three, -1, "backup_quorum"},
		"four of three":  {three, 4, "backup_quorum"},
		"too many":       {many, 2, "backup_quorum"},
		"one name":       {[]Operator{three[0], {three[0].Name, three[1].Public}}, 2, "backup_quorum"},
		"one key":        {[]Operator{three[0], {"other", three[0].Public}}, 2, "backup_quorum"},
		"no name":        {named(""), 1, "operator_malformed"},
		"a long name":    {named(strings.Repeat("a", maxName+1)), 1, "operator_malformed"},
		"a space":        {named("a b"), 1, "operator_malformed"},
		"a newline":      {named("a\nb"), 1, "operator_malformed"},
		"an umlaut":      {named("ä"), 1, "operator_malformed"},
		"a short key":    {[]Operator{{"a", three[0].Public[:31]}}, 1, "operator_malformed"},
		"no key":         {[]Operator{{"a", nil}}, 1, "operator_malformed"},
		"a zero key":     {[]Operator{{"a", make([]byte, 32)}}, 1, "operator_malformed"},
	} {
		_, err := Seal(r, c.operators, c.m)
		wantCode(t, name, err, c.code)
	}
	full, private := people(t, MaxOperators)
	text := must(Seal(r, full, MaxOperators))
	if len(text) > MaxSize {
		t.Errorf("%d bytes for %d operators", len(text), MaxOperators)
	}
	b := must(Parse(text))
	same(t, r, must(b.Restore(open(t, b, private), r.Identity())))
	r.Wipe()
	_, err := Seal(r, three, 2)
	wantCode(t, "wiped roots", err, "root_wiped")
}

func TestOperatorText(t *testing.T) {
	o := Operator{"alice@example.org", bytes.Repeat([]byte{0xab}, 32)}
	if got, err := ParseOperator(o.String()); err != nil || got.Name != o.Name || !bytes.Equal(got.Public, o.Public) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "alice", "alice:", ":" + hex.EncodeToString(o.Public), "alice:" + strings.Repeat("AB", 32), "alice:" + strings.Repeat("xy", 32), o.String() + "0"} {
		_, err := ParseOperator(bad)
		wantCode(t, bad, err, "operator_malformed")
	}
}

func TestOperatorKeyFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "operator.key")
	k, err := CreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	if got := must(OpenKey(path)); !bytes.Equal(got.Public(), k.Public()) {
		t.Error("another key came back")
	}
	_, err = CreateKey(path)
	wantCode(t, "a key over a key", err, "operator_key_exists")
	_, err = CreateKey(filepath.Join(dir, "nowhere", "key"))
	wantCode(t, "no directory", err, "operator_key_write")
	_, err = OpenKey(filepath.Join(dir, "nowhere"))
	wantCode(t, "no file", err, "operator_key_missing")
	_, err = OpenKey(dir)
	wantCode(t, "a directory", err, "operator_key_malformed")
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = OpenKey(pipe)
	wantCode(t, "a pipe", err, "operator_key_malformed")
	text := must(os.ReadFile(path))
	wrong := must(x509.MarshalPKCS8PrivateKey(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
	for name, bad := range map[string]string{
		"empty": "", "no PEM": "x", "two": string(text) + string(text), "large": string(text) + strings.Repeat("\n", maxKeyFile),
		"another type": strings.ReplaceAll(string(text), "PRIVATE", "PUBLIC"),
		"P-256":        string(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: wrong})),
		"not a key":    string(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte("x")})),
	} {
		p := filepath.Join(dir, "bad")
		if err := os.WriteFile(p, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := OpenKey(p)
		wantCode(t, name, err, "operator_key_malformed")
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	_, err = OpenKey(path)
	wantCode(t, "readable by the group", err, "operator_key_mode")
	if os.Geteuid() == 0 {
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, 4711, -1); err != nil {
			t.Fatal(err)
		}
		_, err = OpenKey(path)
		wantCode(t, "another user's", err, "operator_key_mode")
	}
}

func FuzzParse(f *testing.F) {
	operators, _ := people(f, 2)
	f.Add(must(Seal(roots(f), operators, 2)))
	f.Add([]byte(version + "\nid 00\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse(data)
		if err != nil {
			wantCode(t, "fuzz", err, "backup_malformed")
			return
		}
		if !bytes.Equal(b.encode(), data) {
			t.Fatalf("%q was read as %q", data, b.encode())
		}
		if _, err := b.Restore(nil, b.Identity); err == nil {
			t.Fatal("restored without shares")
		}
	})
}

func FuzzParseShare(f *testing.F) {
	f.Add(Share{s: &share{index: 1, value: new([shareSize]byte)}}.Text())
	f.Add([]byte(shareVersion + " 00 1 00 00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseShare(data)
		if err != nil {
			wantCode(t, "fuzz", err, "share_malformed")
			return
		}
		if !bytes.Equal(bytes.TrimSpace(s.Text()), bytes.TrimSpace(data)) {
			t.Fatalf("%q was read as %q", data, s.Text())
		}
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: must(x509.MarshalPKCS8PrivateKey(must(ecdh.X25519().NewPrivateKey(make([]byte, 32)))))}))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if k, err := parseKey(data); err == nil && len(k.Public()) != publicSize {
			t.Fatal("a key without a public key")
		}
	})
}
