// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/derive"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func unhex(s string) []byte { return must(hex.DecodeString(s)) }

// sequence is 32 bytes from first on.
func sequence(first byte) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = first + byte(i)
	}
	return b
}

// fixed returns roots whose secrets tests know.
func fixed(t testing.TB) *Roots {
	t.Helper()
	r, err := newRoots(sequence(1), sequence(0x41), sequence(0), 1, Provenance{Kind: Generated, Time: time.Unix(1_800_000_000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Wipe)
	return r
}

func generate(t testing.TB) *Roots {
	t.Helper()
	r, err := Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Wipe)
	return r
}

func wantCode(t *testing.T, what string, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("%s: %v, want code %s", what, err, code)
	}
}

var (
	ctx      = context.Background()
	app      = dstack.AppID(bytes.Repeat([]byte{0x11}, 20))
	instance = bytes.Repeat([]byte{0x33}, 20)
)

func TestUpstreamsDerivations(t *testing.T) {
	var v struct {
		Inputs map[string]string `json:"inputs"`
		Want   map[string]string `json:"kms_derivations"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	in, want := v.Inputs, v.Want
	r := must(newRoots(unhex(in["root_ca_p256_scalar"]), unhex(in["root_k256_scalar"]), nil, 0, Provenance{Kind: Upstream}))
	id, inst := dstack.AppID(unhex(in["app_id"])), unhex(in["instance_id"])
	check := func(name string, got []byte, want string) {
		t.Helper()
		if hex.EncodeToString(got) != want {
			t.Errorf("%s = %x, want %s", name, got, want)
		}
	}
	check("root_ca_spki_der", r.Identity().CA, in["root_ca_spki_der"])
	check("root_k256_pubkey_compressed", r.Identity().K256, in["root_k256_pubkey_compressed"])
	// An instance is not of the scope of these two.
	key := must(r.AppKey(ctx, Scope{App: id, Instance: []byte{1}}))
	check("app_k256_key", key.Bytes(), want["app_k256_key"])
	check("env_crypt_key", must(r.EnvKey(ctx, Scope{App: id, Instance: []byte{1}})).Bytes(), want["env_crypt_key"])
	check("disk_crypt_key", must(r.DiskKey(ctx, Scope{App: id, Instance: inst})).Bytes(), want["disk_crypt_key"])
	check("disk_crypt_key without instance", must(r.DiskKey(ctx, Scope{App: id})).Bytes(), want["disk_crypt_key_empty_instance_id"])
	check("app_ca_spki_der", must(x509.MarshalPKIXPublicKey(must(r.AppCA(ctx, id)).Public())), want["app_ca_spki_der"])
	public := must(derive.K256Public(key.Bytes()))
	check("k256_signature", must(r.Sign(ctx, []byte("dstack-kms-issued:"), id[:], public)), want["k256_signature"])
	for _, s := range []Scope{{App: id, Epoch: 1}, {App: id, Epoch: 1 << 40}} {
		_, err := r.AppKey(ctx, s)
		wantCode(t, "an upstream KMS's roots, a native epoch", err, "epoch_unavailable")
	}
}

// The native derivations, as an independent implementation computed them.
func TestNativeDerivations(t *testing.T) {
	r := fixed(t)
	for _, c := range []struct {
		epoch                    uint64
		app, env, disk, diskNone string
	}{
		{
			1, "b47e1172f908c2bf2a6ebf6a1957c6c19356b2e443af0ce0a5f6c8f6fb178345", "855d64aaf5fc2925912740449457c2c6d55daabe9e3a7279669c74352f94e895",
			"48921dcb7dfe6de74c133ecb939781596e9c0edce1d8318229e4422e4985947d", "4fe9e5bdcddfcc83c2dfdf2d4c3d93faee2bda4a9641e865e3adaf0387798a28",
		},
		{
			2, "e165630e6edc71cdd5f44dbeb017a7dde05c005e89a20ae98c7d9b309d9a49b2", "75556e3bfd25d98000764241d041336bd1dbd2761f14f89ad738a5fba6d5cab2",
			"c45e93040cb1a084b9a006e47dd413e710e1bbdf9753ad929d6e3ff7a2bfc8f7", "19a4b39d9a247095c06528e326686950165584a0f58dc29a4e7627da49a2c9f1",
		},
		{
			5, "e5ff7838c2e587ff467766cb3f2745fc53be92c818fb80e93ba01582449d0630", "8db0f40f7a85be2067b16fcd31468f5b501b102c0f3f49ee62d4aa939348a163",
			"24302009616fdacae94e28205971289a490d62a1c22bbae698261640e8f04211", "5ae096fcabe34c9b2736e2e1c79e84894e5e0536b5c2f2ed84a8ea1840ab0dd5",
		},
	} {
		check := func(name string, got []byte, want string) {
			t.Helper()
			if hex.EncodeToString(got) != want {
				t.Errorf("epoch %d: %s = %x, want %s", c.epoch, name, got, want)
			}
		}
		s := Scope{App: app, Epoch: c.epoch, Instance: instance}
		check("app", must(r.AppKey(ctx, s)).Bytes(), c.app)
		check("env", must(r.EnvKey(ctx, s)).Bytes(), c.env)
		check("disk", must(r.DiskKey(ctx, s)).Bytes(), c.disk)
		check("disk without instance", must(r.DiskKey(ctx, Scope{App: app, Epoch: c.epoch})).Bytes(), c.diskNone)
	}
}

func TestScopes(t *testing.T) {
	r := fixed(t)
	for _, n := range []int{1, 19, 21, 32} {
		for _, epoch := range []uint64{0, 1} {
			_, err := r.DiskKey(ctx, Scope{App: app, Epoch: epoch, Instance: make([]byte, n)})
			wantCode(t, fmt.Sprintf("an instance id of %d bytes", n), err, "scope_malformed")
		}
	}
	first, last := r.Epochs()
	if first != 1 || last != 1+MaxAhead {
		t.Fatalf("epochs %d to %d", first, last)
	}
	if _, err := r.EnvKey(ctx, Scope{App: app, Epoch: last}); err != nil {
		t.Errorf("the last epoch: %v", err)
	}
	for _, epoch := range []uint64{last + 1, 1 << 63, ^uint64(0)} {
		_, err := r.EnvKey(ctx, Scope{App: app, Epoch: epoch})
		wantCode(t, "a far epoch", err, "epoch_unavailable")
		wantCode(t, "erase before a far epoch", r.EraseBefore(epoch), "epoch_unavailable")
	}
	if first, _ := r.Epochs(); first != 1 {
		t.Error("a refused erasure erased")
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := r.AppKey(canceled, Scope{App: app}); err != context.Canceled {
		t.Errorf("a cancelled call: %v", err)
	}
}

// No two keys that differ in kind, algorithm, app, epoch or instance share bytes, not
// even a quarter of them (G13).
func TestThreat_G13_KeysOfDifferentKindsShareNoBytes(t *testing.T) {
	r := fixed(t)
	seen := map[string]string{}
	add := func(name string, b []byte) {
		t.Helper()
		for i := 0; i < len(b); i += 8 {
			if other, ok := seen[string(b[i:i+8])]; ok {
				t.Errorf("%s shares bytes with %s", name, other)
			}
			seen[string(b[i:i+8])] = name
		}
	}
	for epoch := uint64(0); epoch <= 4; epoch++ {
		for _, id := range []dstack.AppID{{}, app, {19: 1}} {
			s := Scope{App: id, Epoch: epoch}
			name := fmt.Sprintf("app %x epoch %d ", id[:], epoch)
			add(name+"app", must(r.AppKey(ctx, s)).Bytes())
			add(name+"env", must(r.EnvKey(ctx, s)).Bytes())
			add(name+"disk", must(r.DiskKey(ctx, s)).Bytes())
			for _, inst := range [][]byte{make([]byte, 20), instance} {
				s.Instance = inst
				add(fmt.Sprintf("%sdisk of %x", name, inst), must(r.DiskKey(ctx, s)).Bytes())
			}
		}
	}
	for epoch := uint64(1); epoch <= 4; epoch++ {
		add(fmt.Sprintf("secret of epoch %d", epoch), must(r.s.material().at(epoch)))
	}
	if got, other := fields([]byte("ab"), []byte("c")), fields([]byte("a"), []byte("bc")); got == other {
		t.Error("two inputs encode alike")
	}
}

func TestSignatures(t *testing.T) {
	r := generate(t)
	id := r.Identity()
	ca := must(x509.ParsePKIXPublicKey(id.CA)).(*ecdsa.PublicKey)

	// Certificates, as a KMS makes them.
	root := must(certificate.Self(r.CA(), certificate.Subject{Organization: "Dstack", Name: "Dstack KMS CA", Path: 1}, ratls.Issued{}, nil, time.Now()))
	if !bytes.Equal(root.Certificate.RawSubjectPublicKeyInfo, id.CA) {
		t.Error("the root certificate has another key")
	}
	appCA := must(r.AppCA(ctx, app))
	middle := must(root.Authority(appCA, certificate.Subject{Name: "Dstack App CA"}, ratls.Issued{}, time.Now()))
	leaf := must(x509.ParseCertificate(must(middle.Issue(certificate.Leaf{Public: ca}, time.Now()))))
	if err := leaf.CheckSignatureFrom(middle.Certificate); err != nil {
		t.Error(err)
	}
	if err := middle.Certificate.CheckSignatureFrom(root.Certificate); err != nil {
		t.Error(err)
	}
	if _, err := certificate.From(root.Certificate, appCA); fault.Code(err) != "authority_malformed" {
		t.Errorf("the app's CA as root: %v", err)
	}

	sig := must(r.Sign(ctx, []byte("a"), []byte("b")))
	if got := must(derive.Recover(sig, []byte("ab"))); !bytes.Equal(got, id.K256) {
		t.Errorf("recovered %x", got)
	}

	doc := []byte("document")
	sum := sha256.Sum256([]byte(PurposeReleaseLog + "\n" + string(doc)))
	if !ecdsa.VerifyASN1(ca, sum[:], must(r.Attest(ctx, PurposeReleaseLog, doc))) {
		t.Error("an attestation does not verify")
	}
	if ecdsa.VerifyASN1(ca, sum[:], must(r.Attest(ctx, PurposeLease, doc))) {
		t.Error("an attestation for one purpose serves another")
	}
	for _, purpose := range []string{"", "0\x82", "log", "dstack-a\nb"} {
		_, err := r.Attest(ctx, purpose, doc)
		wantCode(t, fmt.Sprintf("purpose %q", purpose), err, "scope_malformed")
	}
}

func TestSignersTakeSHA256Only(t *testing.T) {
	r := generate(t)
	long := sha512.Sum512(nil)
	for name, s := range map[string]crypto.Signer{"root CA": r.CA(), "app CA": must(r.AppCA(ctx, app))} {
		if sig := must(s.Sign(nil, long[:32], crypto.SHA256)); !ecdsa.VerifyASN1(s.Public().(*ecdsa.PublicKey), long[:32], sig) {
			t.Errorf("%s: its signature does not verify", name)
		}
		for what, c := range map[string]struct {
			digest []byte
			opts   crypto.SignerOpts
		}{
			"SHA-512": {long[:], crypto.SHA512}, "SHA-1": {long[:20], crypto.SHA1}, "no hash": {long[:32], crypto.Hash(0)},
			"no options": {long[:32], nil}, "a short digest": {long[:31], crypto.SHA256}, "a long digest": {long[:33], crypto.SHA256},
		} {
			_, err := s.Sign(rand.Reader, c.digest, c.opts)
			wantCode(t, name+" "+what, err, "signature_hash")
		}
	}
}

// reachable calls visit with every byte string that reflection reaches from v.
func reachable(v reflect.Value, seen map[uintptr]bool, visit func([]byte)) {
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() || seen[v.Pointer()] {
			return
		}
		seen[v.Pointer()] = true
		reachable(v.Elem(), seen, visit)
	case reflect.Interface:
		if !v.IsNil() {
			reachable(v.Elem(), seen, visit)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			reachable(v.Field(i), seen, visit)
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			visit(v.Bytes())
		}
	}
}

// A replica's keys leave by Export and Escrow alone: neither signers nor text hold
// them, and of the project only the KMS and the backup call these two (G01).
func TestThreat_G01_ReplicaExportsOnlyToCustodians(t *testing.T) {
	r := fixed(t)
	for name, s := range map[string]crypto.Signer{"root CA": r.CA(), "app CA": must(r.AppCA(ctx, app))} {
		if _, ok := s.(*ecdsa.PrivateKey); ok {
			t.Errorf("%s is a private key", name)
		}
		kind := reflect.TypeOf(s)
		for i := range kind.NumMethod() {
			if m := kind.Method(i).Name; m != "Public" && m != "Sign" {
				t.Errorf("%s has a method %s", name, m)
			}
		}
		for i := range kind.Elem().NumField() {
			if f := kind.Elem().Field(i); f.IsExported() {
				t.Errorf("%s has a field %s", name, f.Name)
			}
		}
		// Nothing secret but by the page itself, which is not exported.
		reachable(reflect.ValueOf(s), map[uintptr]bool{reflect.ValueOf(r.s).Pointer(): true}, func(b []byte) {
			if bytes.Contains(b, sequence(1)) || bytes.Contains(b, must(must(r.s.material().AppCA(app)).Bytes())) {
				t.Errorf("%s holds its scalar", name)
			}
		})
	}
	root := testkit.Root()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		uses := false
		for _, i := range file.Imports {
			uses = uses || strings.HasSuffix(i.Path.Value, `/keys/custody"`)
		}
		if !uses {
			return nil
		}
		rel := filepath.ToSlash(must(filepath.Rel(root, path)))
		ast.Inspect(file, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if s.Sel.Name == "Export" && !strings.HasPrefix(rel, "kms/") || s.Sel.Name == "Escrow" && !strings.HasPrefix(rel, "keys/custody/backup/") {
					t.Errorf("%s calls %s", rel, s.Sel.Name)
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestThreat_E06_RootsCannotBePrinted(t *testing.T) {
	r := must(newRoots(bytes.Repeat([]byte{0xab}, 32), bytes.Repeat([]byte{0xab}, 32), bytes.Repeat([]byte{0xab}, 32), 1, Provenance{Kind: Generated}))
	type holder struct {
		R Roots
		P *Roots
		q *Roots
		r Roots
		s crypto.Signer
	}
	h := holder{*r, r, r, *r, r.CA()}
	var shown bytes.Buffer
	for _, v := range []any{r, *r, h, &h, []*Roots{r}, r.CA(), must(r.AppCA(ctx, app)), map[string]any{"x": h}} {
		fmt.Fprintf(&shown, "%v %+v %#v %s %x %d %q\n", v, v, v, v, v, v, v)
		slog.New(slog.NewJSONHandler(&shown, nil)).Info("x", "v", v)
		slog.New(slog.NewTextHandler(&shown, nil)).Info("x", "v", v)
		if text, err := json.Marshal(v); err == nil {
			shown.Write(text)
		}
		_ = gob.NewEncoder(&shown).Encode(v)
	}
	for _, leak := range []string{"abab", "ABAB", "171 171", "q6ur", "\xab\xab", "0xab, 0xab"} {
		if strings.Contains(shown.String(), leak) {
			t.Errorf("roots show as %s", shown.String())
		}
	}
	if _, err := json.Marshal(r); err == nil {
		t.Error("encoding/json took roots")
	}
	if err := gob.NewEncoder(&shown).Encode(r); err == nil {
		t.Error("encoding/gob took roots")
	}
	if reflect.TypeFor[Roots]().Comparable() {
		t.Error("== compiles between roots")
	}
}

func TestWipe(t *testing.T) {
	r := generate(t)
	ca := r.CA()
	appCA := must(r.AppCA(ctx, app))
	root := must(certificate.Self(ca, certificate.Subject{}, ratls.Issued{}, nil, time.Now()))
	r.Wipe()
	r.Wipe()
	digest := make([]byte, 32)
	for _, gone := range []*Roots{r, {}} {
		_, e1 := gone.AppKey(ctx, Scope{})
		_, e2 := gone.DiskKey(ctx, Scope{Epoch: 1})
		_, e3 := gone.Sign(ctx, nil)
		_, e4 := gone.Attest(ctx, PurposeLease, nil)
		_, e5 := gone.Export()
		_, e6 := gone.AppCA(ctx, app)
		_, e7 := gone.CA().Sign(nil, digest, crypto.SHA256)
		_, e8 := ca.Sign(nil, digest, crypto.SHA256)
		_, e9 := appCA.Sign(nil, digest, crypto.SHA256)
		e10 := gone.Create(filepath.Join(t.TempDir(), "root.keys"))
		e11 := gone.EraseBefore(2)
		e12 := gone.Escrow(func([]byte) error { return nil })
		for i, err := range []error{e1, e2, e3, e4, e5, e6, e7, e8, e9, e10, e11, e12} {
			wantCode(t, fmt.Sprintf("call %d", i+1), err, "root_wiped")
		}
	}
	if _, err := root.Issue(certificate.Leaf{Public: ca.Public().(*ecdsa.PublicKey)}, time.Now()); fault.Code(err) != "root_wiped" {
		t.Errorf("a certificate of wiped roots: %v", err)
	}
	if (&Roots{}).CA().Public() != nil || (&Roots{}).Identity().Equal(Identity{}) {
		t.Error("no roots have an identity")
	}
}

func TestGenerate(t *testing.T) {
	a, b := generate(t), generate(t)
	if a.Identity().Equal(b.Identity()) || bytes.Equal(a.s.material().epoch, b.s.material().epoch) {
		t.Error("two roots are equal")
	}
	if p := a.Provenance(); p.Kind != Generated || time.Since(p.Time) > time.Minute || p.Source != nil {
		t.Errorf("provenance %+v", p)
	}
	for name, source := range map[string]string{"zeroes": string(make([]byte, 1<<10)), "out of range": strings.Repeat("\xff", 1<<10), "short": "x"} {
		if _, err := Generate(strings.NewReader(source)); err == nil {
			t.Errorf("%s: accepted as randomness", name)
		}
	}
	// A scalar that is out of range is drawn again.
	if _, err := Generate(strings.NewReader(strings.Repeat("\xff", 96) + strings.Repeat("\x01", 96))); err != nil {
		t.Error(err)
	}
}

// Calls, an erasure and a wipe at the same time; with -race.
func TestConcurrentUse(t *testing.T) {
	r := generate(t)
	if err := r.Create(filepath.Join(t.TempDir(), "root.keys")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 50 {
				if _, err := r.AppKey(ctx, Scope{App: app, Epoch: uint64(n)}); err != nil && fault.Code(err) != "epoch_unavailable" && fault.Code(err) != "root_wiped" {
					t.Error(err)
				}
				_, _ = r.CA().Sign(nil, make([]byte, 32), crypto.SHA256)
				_, _ = r.Epochs()
			}
			if i == 0 {
				if err := r.EraseBefore(20); err != nil && fault.Code(err) != "root_wiped" {
					t.Error(err)
				}
			}
			if i == 1 {
				r.Wipe()
			}
		})
	}
	wg.Wait()
}
