// SPDX-License-Identifier: Apache-2.0

package collateral_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	tdxdata "github.com/google/go-tdx-guest/testing/testdata"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// realSet is the published collateral beside a real quote, and a time at which all
// of it is valid.
func realSet(t testing.TB, version string) (col collateral.TDX, quote []byte, at time.Time) {
	t.Helper()
	set, err := collateral.ParseTDX(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+"_collateral.json"))
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ IssueDate time.Time }
	if err := json.Unmarshal([]byte(set.TCBInfo), &info); err != nil {
		t.Fatal(err)
	}
	return *set, testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+".bin"), info.IssueDate.Add(24 * time.Hour)
}

// scatter puts a set into files as they come from a provisioning service, under
// names that say nothing.
func scatter(set collateral.TDX) map[string][]byte {
	answer := func(member, document string, signature []byte) []byte {
		return fmt.Appendf(nil, "{ \"%s\" :  %s,\n\"signature\":\"%x\"}", member, document, signature)
	}
	return map[string][]byte{
		"a": answer("tcbInfo", set.TCBInfo, set.TCBInfoSignature),
		"b": answer("enclaveIdentity", set.QEIdentity, set.QEIdentitySignature),
		"c": set.PCKCRL,
		"d": []byte(hex.EncodeToString(set.RootCACRL) + "\n"),
		"e": []byte(set.TCBInfoIssuerChain),
		"f": []byte("\n" + set.PCKCRLIssuerChain),
		"g": []byte(set.QEIdentityIssuerChain),
	}
}

func with(files map[string][]byte, name string, data []byte) map[string][]byte {
	files = maps.Clone(files)
	files[name] = data
	return files
}

func without(files map[string][]byte, names ...string) map[string][]byte {
	files = maps.Clone(files)
	for _, n := range names {
		delete(files, n)
	}
	return files
}

func verify(quote []byte, b *collateral.Bundle, at time.Time) (*attest.Claims, error) {
	return tdxtest.Verify(quote, b.TDX, []attest.Roots{tdx.VendorRoots()}, at)
}

func TestDirectoryOfRealCollateralVerifiesARealQuote(t *testing.T) {
	for _, version := range []string{"v4", "v5"} {
		set, quote, at := realSet(t, version)
		b, keys, err := collateral.FromFiles(scatter(set))
		if err != nil {
			t.Fatal(err)
		}
		if b.TCBInfo != set.TCBInfo || b.QEIdentity != set.QEIdentity {
			t.Errorf("%s: a signed document changed", version)
		}
		if len(keys) != 0 || len(b.Certificates) != 0 || len(b.CRLs) != 0 {
			t.Errorf("%s: %d keys, %d certificates, %d revocation lists beside the set", version, len(keys), len(b.Certificates), len(b.CRLs))
		}
		// The platform of the v5 quote is below every published level; it must be so
		// with either form.
		got, err := verify(quote, b, at)
		want, wantErr := verify(quote, &collateral.Bundle{TDX: set}, at)
		if fault.Code(err) != fault.Code(wantErr) || version == "v4" && err != nil {
			t.Fatalf("%s: %v from files, %v from the set", version, err, wantErr)
		}
		if got == nil || want == nil || got.TCBStatus != want.TCBStatus {
			t.Errorf("%s: claims %+v from files, %+v from the set", version, got, want)
		}
	}
}

// A revocation list or signer that is not there must be missed, not made up for.
func TestThreat_B02_DirectoryWithoutARevocationListVerifiesNothing(t *testing.T) {
	set, quote, at := realSet(t, "v4")
	for _, file := range []string{"c", "d"} {
		b, _, err := collateral.FromFiles(without(scatter(set), file))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := verify(quote, b, at); err == nil {
			t.Errorf("a quote verifies without the revocation list %s", file)
		}
	}
	// Under another name a list is still of its issuer.
	b, _, err := collateral.FromFiles(with(without(scatter(set), "d"), "pckcrl.der", set.RootCACRL))
	if err != nil || !bytes.Equal(b.RootCACRL, set.RootCACRL) || !bytes.Equal(b.PCKCRL, set.PCKCRL) {
		t.Errorf("a list was told by its name (%v)", err)
	}
}

func TestDirectoryPicksIssuersBySignature(t *testing.T) {
	// Two PKIs with the same names, of which one signed.
	p, other := tdxtest.New(t), tdxtest.New(t)
	files := scatter(p.Collateral())
	files["0"] = []byte(other.Chain(other.TCBSigner, other.PCKCA, other.Root))
	b, _, err := collateral.FromFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tdxtest.Verify(p.Quote(p.Body()), b.TDX, []attest.Roots{p.Roots()}, tdxtest.At); err != nil {
		t.Error(err)
	}
	if len(b.Certificates) != 3 {
		t.Errorf("%d certificates remain, want the other PKI's 3", len(b.Certificates))
	}
}

func TestDirectoryTakesAWholeBundle(t *testing.T) {
	set, quote, at := realSet(t, "v4")
	ask := testkit.Vectors(t, "attestation/sev-snp/sev_snp_ask.pem")
	block, _ := pem.Decode(testkit.Vectors(t, "attestation/sev-snp/sev_snp_vcek.pem"))
	whole, err := json.Marshal(collateral.Bundle{TDX: set, Certificates: []collateral.Hex{block.Bytes}})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		"everything": whole, "again": testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json"),
		"ask": ask, "vcek": block.Bytes,
		"README.md": []byte("notes"), ".hidden": []byte("x"), "sub/.hidden": []byte("x"),
	}
	b, _, err := collateral.FromFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := verify(quote, b, at); err != nil {
		t.Error(err)
	}
	if len(b.Certificates) != 2 {
		t.Errorf("%d certificates, want ASK and VCEK once each", len(b.Certificates))
	}
}

func TestDirectoryFindsThePCKChain(t *testing.T) {
	p := tdxtest.New(t)
	files := scatter(p.Collateral())
	files["pck"] = p.PCK.Cert.Raw
	b, _, err := collateral.FromFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	if want := p.Chain(p.PCK, p.PCKCA, p.Root); b.PCKCertificateChain != want {
		t.Errorf("PCK chain is %q, want %q", b.PCKCertificateChain, want)
	}
	other := p.IssuePCK(p.PCKCA, tdxtest.Extension(), nil)
	if _, _, err := collateral.FromFiles(with(files, "pck2", other.Cert.Raw)); fault.Code(err) != "directory_ambiguous" {
		t.Errorf("two PCK certificates: %v", err)
	}
}

func TestDirectoryReturnsKeysApart(t *testing.T) {
	p384 := testkit.Vectors(t, "attestation/cca/veraison-ec.p384.pub.jwk")
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	b, keys, err := collateral.FromFiles(map[string][]byte{
		"1.jwk": testkit.Vectors(t, "attestation/cca/veraison-ec.p256.pub.jwk"), "2": p384,
		"3": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), "4": spki,
	})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.Name+" "+k.Key.(*ecdsa.PublicKey).Params().Name)
	}
	if want := []string{"1.jwk P-256", "2 P-384", "3 P-521", "4 P-521"}; !slices.Equal(names, want) {
		t.Errorf("keys %v, want %v", names, want)
	}
	if !key.PublicKey.Equal(keys[2].Key) || !key.PublicKey.Equal(keys[3].Key) {
		t.Error("a key changed")
	}
	if b.HasTDX() || len(b.Certificates)+len(b.CRLs) > 0 {
		t.Error("keys became collateral")
	}
}

// The samples of google/go-tdx-guest were answered by Intel's service in 2023.
func TestDirectoryReadsAnswersThatAnotherLibraryShips(t *testing.T) {
	set, _, _ := realSet(t, "v4")
	b, _, err := collateral.FromFiles(map[string][]byte{
		"tcb": tdxdata.TcbInfoBody, "qe": tdxdata.QeIdentityBody,
		"rootcrl": tdxdata.RootCrlBody, "pckcrl": tdxdata.PckCrlBody,
		"signing": []byte(set.TCBInfoIssuerChain), "platform": []byte(set.PCKCRLIssuerChain),
	})
	if err != nil {
		t.Fatal(err)
	}
	if b.TCBInfoIssuerChain == "" || b.QEIdentityIssuerChain == "" || b.PCKCRLIssuerChain == "" || len(b.RootCACRL) == 0 {
		t.Error("a part is missing")
	}
}

func TestDirectoryIsRefusedForItsOwnReason(t *testing.T) {
	set, _, _ := realSet(t, "v4")
	newer, _, _ := realSet(t, "v5")
	files := scatter(set)
	whole := testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_v5_collateral.json")
	jwk := string(testkit.Vectors(t, "attestation/cca/veraison-ec.p256.pub.jwk"))
	dev, err := tdxtest.New(t).DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte{1}})
	chain := set.TCBInfoIssuerChain
	p := tdxtest.New(t)
	enclave, mixed := p.EnclaveCollateral(), p.Collateral()
	mixed.QEIdentity, mixed.QEIdentitySignature = enclave.QEIdentity, enclave.QEIdentitySignature
	sgx := scatter(enclave)
	marshal := func(set collateral.TDX) []byte {
		data, err := json.Marshal(collateral.Bundle{TDX: set})
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, c := range []struct {
		name string
		in   map[string][]byte
		code string
		word string // in the message
	}{
		{"a text", with(files, "note.txt", []byte("hello")), "directory_unknown_file", "note.txt"},
		{"an empty file", with(files, "empty", nil), "directory_unknown_file", "empty"},
		{"an executable", with(files, "x", []byte("\x7fELF\x00\x00")), "directory_unknown_file", "x"},
		{"an unknown object", with(files, "x", []byte(`{"a":1}`)), "directory_unknown_file", "x"},
		{"an array", with(files, "x", []byte(`[]`)), "directory_unknown_file", "x"},
		{"a PEM block of another kind", with(files, "x", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte{1}})), "directory_unknown_file", "x"},
		{"a truncated certificate", with(files, "x", newer.PCKCRL[:100]), "directory_unknown_file", "x"},
		{"a truncated PEM", with(files, "x", []byte(chain[:len(chain)-40])), "directory_malformed", "broken"},
		{"a broken block before a good one", with(files, "x", []byte("-----BEGIN X509 CRL-----\n!\n-----END X509 CRL-----\n"+chain)), "directory_malformed", "broken"},
		{"text between PEM blocks", with(files, "x", []byte(strings.Replace(chain, "-----\n-----BEGIN", "-----\nsubject=\n-----BEGIN", 1))), "directory_malformed", "text"},
		{"a PEM certificate that is not one", with(files, "x", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}})), "directory_malformed", "certificate"},
		{"a PEM list that is not one", with(files, "x", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte{1}})), "directory_malformed", "revocation"},
		{"a PEM key that is not one", with(files, "x", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: []byte{1}})), "directory_malformed", "public key"},
		{"a private key in PEM", with(files, "x", private), "directory_private_key", "x"},
		{"a private JWK", with(files, "x", []byte(strings.Replace(jwk, "{", `{"d":"AA",`, 1))), "directory_private_key", "x"},
		{"a JWK of another curve", with(files, "x", []byte(strings.Replace(jwk, "P-256", "secp256k1", 1))), "directory_key", "secp256k1"},
		{"a JWK off the curve", with(files, "x", []byte(strings.Replace(jwk, "4Etl", "4Etm", 1))), "directory_malformed", "JWK"},
		{"a JWK with a short coordinate", with(files, "x", []byte(strings.Replace(jwk, "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "MKBC", 1))), "directory_malformed", "32 bytes"},
		{"broken JSON", with(files, "x", []byte(`{"tcbInfo":`)), "directory_malformed", "JSON"},
		{"a member twice", with(files, "x", []byte(`{"tcbInfo":{},"tcbInfo":{}}`)), "directory_malformed", "twice"},
		{"an object of two kinds", with(files, "x", []byte(`{"tcbInfo":{},"kty":"EC"}`)), "directory_malformed", "both"},
		{"a TCB info without signature", with(without(files, "a"), "x", []byte(`{"tcbInfo":{}}`)), "collateral_malformed", "0 bytes"},
		{"a TCB info that is text", with(without(files, "a"), "x", []byte(`{"tcbInfo":"{}","signature":""}`)), "collateral_malformed", "not an object"},
		{"SGX's TCB info in TDX's place", with(without(files, "a"), "x", sgx["a"]), "directory_sgx", "collateral x"},
		{"SGX's TCB info beside TDX's", with(files, "x", sgx["a"]), "directory_sgx", "id SGX"},
		{"SGX's QE identity beside TDX's", with(files, "x", sgx["b"]), "directory_sgx", "id QE"},
		{"the identity of SGX's QVE", with(files, "x", bytes.Replace(sgx["b"], []byte(`"id":"QE"`), []byte(`"id":"QVE"`), 1)), "directory_sgx", "id QVE"},
		{"a whole set of SGX", map[string][]byte{"x": marshal(enclave)}, "directory_sgx", "id SGX"},
		{"a whole set with SGX's QE identity", map[string][]byte{"x": marshal(mixed)}, "directory_sgx", "id QE"},
		{"development roots", with(files, "x", dev), "directory_roots", "x"},
		{"a TCB info of another signature", with(files, "x", bytes.Replace(files["a"], []byte(`"signature":"0`), []byte(`"signature":"1`), 1)), "directory_ambiguous", "in a"},
		{"two TCB infos", with(files, "x", scatter(newer)["a"]), "directory_ambiguous", "in a"},
		{"two QE identities", with(files, "x", scatter(newer)["b"]), "directory_ambiguous", "in b"},
		{"two PCK lists", with(files, "x", newer.PCKCRL), "directory_ambiguous", "in c"},
		{"two root lists", with(files, "x", tdxdata.RootCrlBody), "directory_ambiguous", "in d"},
		{"a whole set beside parts of another", with(files, "x", whole), "directory_ambiguous", "x"},
		{"no signer of the TCB info", without(files, "e", "g"), "directory_issuer", "collateral a"},
		{"no issuer of the PCK list", without(files, "f"), "directory_issuer", "collateral c"},
		{"a TCB info changed after it was signed", with(files, "a", bytes.Replace(files["a"], []byte(`"version":3`), []byte(`"version":4`), 1)), "directory_issuer", "collateral a"},
		{"a TCB info spaced otherwise than signed", with(files, "a", bytes.Replace(files["a"], []byte(`"version":3`), []byte(`"version": 3`), 1)), "directory_issuer", "collateral a"},
		{"a certificate beyond the limit", map[string][]byte{"x": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: make([]byte, collateral.MaxCert+1)})}, "collateral_too_large", "x"},
		{"a list beyond the limit", map[string][]byte{"x": pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: make([]byte, collateral.MaxCRL+1)})}, "collateral_too_large", "x"},
		{"too many bytes", map[string][]byte{"x": make([]byte, collateral.MaxDirectory), "y": {1}}, "directory_unknown_file", "x"},
		{"too many bytes before any is read", map[string][]byte{"x": make([]byte, collateral.MaxDirectory+1)}, "directory_too_large", "bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := collateral.FromFiles(c.in)
			if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.word) {
				t.Errorf("err = %v (code %q), want %q with %q", err, fault.Code(err), c.code, c.word)
			}
		})
	}
	if _, _, err := collateral.FromFiles(files); err != nil {
		t.Errorf("without the change: %v", err)
	}
}

func TestDirectoryIsBounded(t *testing.T) {
	p := tdxtest.New(t)
	files := map[string][]byte{}
	for i := range collateral.MaxFiles + 1 {
		files[fmt.Sprint(i)] = p.Root.Cert.Raw
	}
	if _, _, err := collateral.FromFiles(files); fault.Code(err) != "directory_too_large" {
		t.Errorf("%d files: %v", len(files), err)
	}
	delete(files, "0")
	if b, _, err := collateral.FromFiles(files); err != nil || len(b.Certificates) != 1 {
		t.Errorf("%d files: %v", len(files), err)
	}
	var chain strings.Builder
	for range collateral.MaxCerts + 1 {
		chain.WriteString(p.Chain(p.IssueCA(p.Root, "x")))
	}
	if _, _, err := collateral.FromFiles(map[string][]byte{"x": []byte(chain.String())}); fault.Code(err) != "collateral_too_large" {
		t.Errorf("certificates: %v", err)
	}
}

func TestFileSystemIsReadFlatAndBounded(t *testing.T) {
	p := tdxtest.New(t)
	fsys := fstest.MapFS{".git/config": {Data: []byte("x")}, "NOTES.MD": {Data: []byte("x")}}
	for name, data := range scatter(p.Collateral()) {
		fsys[name] = &fstest.MapFile{Data: data}
	}
	b, _, err := collateral.FromFS(fsys)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tdxtest.Verify(p.Quote(p.Body()), b.TDX, []attest.Roots{p.Roots()}, tdxtest.At); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		name string
		file *fstest.MapFile
		code string
		word string
	}{
		{"sub/crl.der", &fstest.MapFile{}, "directory_unknown_file", "sub is not a regular file"},
		{"pipe", &fstest.MapFile{Mode: fs.ModeNamedPipe, Data: p.Root.Cert.Raw}, "directory_unknown_file", "pipe is not a regular file"},
		{"zz", &fstest.MapFile{Data: make([]byte, collateral.MaxDirectory)}, "directory_too_large", "zz"},
	} {
		fsys := maps.Clone(fsys)
		fsys[c.name] = c.file
		if _, _, err := collateral.FromFS(fsys); fault.Code(err) != c.code || !strings.Contains(err.Error(), c.word) {
			t.Errorf("%s: %v, want %s", c.name, err, c.code)
		}
	}
	if _, _, err := collateral.FromFS(fstest.MapFS{"a": {Mode: fs.ModeDir}, ".": {Mode: 0}}); err == nil {
		t.Error("a directory that cannot be read is accepted")
	}
}

func FuzzFromFiles(f *testing.F) {
	set, _, _ := realSet(f, "v4")
	files := scatter(set)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f.Add(files[name], []byte(set.TCBInfoIssuerChain))
	}
	f.Add(testkit.Vectors(f, "attestation/tdx/dcap-qvl-tdx_quote_v4_collateral.json"), []byte{})
	f.Add(testkit.Vectors(f, "attestation/cca/veraison-ec.p256.pub.jwk"), []byte(set.RootCACRL))
	f.Fuzz(func(t *testing.T, one, two []byte) {
		b, _, err := collateral.FromFiles(map[string][]byte{"one": one, "two": two})
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		// What was accepted is a bundle, and reads back as one.
		raw, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := collateral.ParseBundle(raw); err != nil {
			t.Fatal(err)
		}
	})
}
