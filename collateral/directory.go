// SPDX-License-Identifier: Apache-2.0

package collateral

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/big"
	"path"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of a directory.
const (
	MaxFiles     = 256
	MaxDirectory = 8 << 20 // bytes of all its files
)

// NamedKey is a public key from a file, under the file's name. A key is no
// collateral: the caller decides whether to trust it.
type NamedKey struct {
	Name string
	Key  crypto.PublicKey // *ecdsa.PublicKey on P-256, P-384 or P-521
}

// FromFS reads a flat directory of files as FromFiles takes it. Hidden files and
// *.md are left alone; a subdirectory is an error, since nothing in it would count.
func FromFS(dir fs.FS) (*Bundle, []NamedKey, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, nil, fault.Wrap(err, "directory_unreadable", "collateral directory")
	}
	files, total := map[string][]byte{}, int64(0)
	for _, e := range entries {
		if ignored(e.Name()) {
			continue
		}
		if len(files) == MaxFiles {
			return nil, nil, fault.New("directory_too_large", "more than %d files of collateral", MaxFiles)
		}
		data, err := readFile(dir, e.Name(), MaxDirectory-total)
		if err != nil {
			return nil, nil, err
		}
		files[e.Name()], total = data, total+int64(len(data))
	}
	return FromFiles(files)
}

func readFile(dir fs.FS, name string, limit int64) ([]byte, error) {
	fi, err := fs.Stat(dir, name) // before it is opened, which for a pipe could last
	if err != nil {
		return nil, fault.Wrap(err, "directory_unreadable", "collateral %s", name)
	}
	if !fi.Mode().IsRegular() {
		return nil, fault.New("directory_unknown_file", "collateral %s is not a regular file", name).WithFix("put every file into the directory itself")
	}
	f, err := dir.Open(name)
	if err != nil {
		return nil, fault.Wrap(err, "directory_unreadable", "collateral %s", name)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fault.Wrap(err, "directory_unreadable", "collateral %s", name)
	}
	if int64(len(data)) > limit {
		return nil, fault.New("directory_too_large", "the files of collateral up to %s exceed %d bytes", name, int64(MaxDirectory))
	}
	return data, nil
}

// FromFiles makes one bundle from files under any names, telling what each is by
// its content:
//
//   - certificates and revocation lists, as DER, as PEM (any number in one file), or,
//     for a single revocation list, as the hexadecimal text that caches answer;
//   - answers of a provisioning certification service in JSON, TCB info or QE
//     identity with its signature; their issuer chains are found among the
//     certificates;
//   - bundles in JSON, as ParseBundle reads them;
//   - public keys on a NIST curve, as PEM or JWK, which are returned apart.
//
// A file that is none of these is an error that names it, and so is a statement about
// SGX enclaves, which services give in the same form (directory_sgx): it would take
// the place of TDX's. So is a second, different statement where a bundle has room for one: which of the two is meant
// must not depend on their names. Signatures are used to find who signed a
// statement, not to trust it. Files whose base name begins with a dot or ends in
// .md are left alone.
func FromFiles(files map[string][]byte) (*Bundle, []NamedKey, error) {
	var d directory
	count, total := 0, 0
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if ignored(name) {
			continue
		}
		count, total = count+1, total+len(files[name])
		if count > MaxFiles || total > MaxDirectory {
			return nil, nil, fault.New("directory_too_large", "more than %d files or %d bytes of collateral", MaxFiles, MaxDirectory)
		}
		d.name = name
		if err := d.file(files[name]); err != nil {
			return nil, nil, fmt.Errorf("collateral %s: %w", name, err)
		}
	}
	if err := d.assemble(); err != nil {
		return nil, nil, err
	}
	if err := d.bundle.Check(); err != nil {
		return nil, nil, err
	}
	return &d.bundle, d.keys, nil
}

func ignored(name string) bool {
	base := path.Base(name)
	return strings.HasPrefix(base, ".") || strings.EqualFold(path.Ext(base), ".md")
}

// ParseTCBInfo reads the answer {"tcbInfo": {…}, "signature": "…"} of a provisioning
// certification service. The document is the exact bytes that the signature of 64
// bytes, r ‖ s big-endian, covers.
func ParseTCBInfo(body []byte) (document string, signature Hex, err error) {
	var v struct {
		Document  json.RawMessage `json:"tcbInfo"`
		Signature Hex             `json:"signature"`
	}
	err = decodeSigned(body, &v)
	return checkSigned("TCB info", v.Document, v.Signature, err)
}

// ParseQEIdentity reads the answer {"enclaveIdentity": {…}, "signature": "…"}, as
// ParseTCBInfo does.
func ParseQEIdentity(body []byte) (document string, signature Hex, err error) {
	var v struct {
		Document  json.RawMessage `json:"enclaveIdentity"`
		Signature Hex             `json:"signature"`
	}
	err = decodeSigned(body, &v)
	return checkSigned("QE identity", v.Document, v.Signature, err)
}

func decodeSigned(body []byte, v any) error {
	return strictjson.Decode(body, v, strictjson.Limits{Size: MaxDocument + 1024, Depth: 10, Unknown: true})
}

func checkSigned(what string, document []byte, signature Hex, err error) (string, Hex, error) {
	switch {
	case err != nil:
		return "", nil, fault.Wrap(err, "collateral_malformed", "%s", what)
	case len(document) == 0 || document[0] != '{':
		return "", nil, fault.New("collateral_malformed", "%s is missing or not an object", what)
	case len(document) > MaxDocument:
		return "", nil, fault.New("collateral_too_large", "%s of %d bytes exceeds %d", what, len(document), MaxDocument)
	case len(signature) != 64:
		return "", nil, fault.New("collateral_malformed", "signature of the %s has %d bytes, want 64", what, len(signature))
	}
	return string(document), signature, nil
}

// ParseCRL reads one revocation list as DER, PEM or hexadecimal text, and returns
// its DER and its parsed form.
func ParseCRL(data []byte) ([]byte, *x509.RevocationList, error) {
	if len(data) > 2*MaxCRL+1024 {
		return nil, nil, fault.New("collateral_too_large", "a revocation list of %d bytes exceeds %d", len(data), MaxCRL)
	}
	text := bytes.TrimSpace(data)
	der := data
	switch {
	case bytes.HasPrefix(text, []byte("-----BEGIN ")):
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "X509 CRL" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, nil, fault.New("collateral_malformed", "not exactly one revocation list in PEM")
		}
		der = block.Bytes
	case isHex(text):
		der = make([]byte, len(text)/2)
		if _, err := hex.Decode(der, text); err != nil {
			return nil, nil, fault.Wrap(err, "collateral_malformed", "revocation list in hexadecimal")
		}
	}
	if len(der) > MaxCRL {
		return nil, nil, fault.New("collateral_too_large", "a revocation list of %d bytes exceeds %d", len(der), MaxCRL)
	}
	crl, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, nil, fault.Wrap(err, "collateral_malformed", "revocation list")
	}
	return der, crl, nil
}

// isHex reports whether text is the hexadecimal of a DER sequence, whose tag is 30.
// No DER of a sequence looks like that: it begins with the digit 0.
func isHex(text []byte) bool {
	return bytes.HasPrefix(text, []byte("30")) && !bytes.ContainsFunc(text, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'f') && (r < 'A' || r > 'F')
	})
}

// Names of the TDX PKI (Intel's profile of PCK certificates and revocation lists).
const (
	cnRoot        = "Intel SGX Root CA"
	cnPlatformCA  = "Intel SGX PCK Platform CA"
	cnProcessorCA = "Intel SGX PCK Processor CA"
)

// oidSGX marks a PCK certificate.
const oidSGX = "1.2.840.113741.1.13.1"

// directory is what was found so far.
type directory struct {
	name string // of the file that is being read

	keys       []NamedKey
	certs      []*x509.Certificate
	crls       []foundCRL
	tcbInfo    statement
	qeIdentity statement
	sets       []foundSet

	bundle Bundle
}

type foundCRL struct {
	*x509.RevocationList
	file string
}

// statement is a signed document that came in a file of its own.
type statement struct {
	document  string
	signature Hex
	file      string
}

// foundSet is TDX collateral that came whole.
type foundSet struct {
	TDX
	file string
}

func (d *directory) file(data []byte) error {
	text := bytes.TrimSpace(data)
	switch {
	case bytes.HasPrefix(text, []byte("-----BEGIN ")):
		return d.pem(text)
	case bytes.HasPrefix(text, []byte("{")):
		return d.json(text)
	}
	if _, err := x509.ParseCertificate(data); err == nil {
		return d.certificate(data)
	}
	if der, _, err := ParseCRL(data); err == nil {
		return d.crl(der)
	}
	if _, err := x509.ParsePKIXPublicKey(data); err == nil {
		return d.publicKey(data)
	}
	return unknown()
}

func unknown() error {
	return fault.New("directory_unknown_file", "it is no certificate, revocation list, signed TCB info or QE identity, bundle or public key").
		WithFix("take the file out of the directory, or name it *.md if it is a note")
}

func ambiguous(what, other string) error {
	return fault.New("directory_ambiguous", "there is another %s, in %s", what, other).WithFix("keep the one that applies")
}

func privateKey() error {
	return fault.New("directory_private_key", "it holds a private key, which is no collateral").WithFix("move the key to a safe place")
}

func (d *directory) pem(text []byte) error {
	for len(text) > 0 {
		if !bytes.HasPrefix(text, []byte("-----BEGIN ")) {
			return fault.New("directory_malformed", "there is text between the PEM blocks").WithFix("keep the PEM blocks only")
		}
		// Decode skips what it cannot read; a block skipped could be a revocation
		// list lost.
		block, rest := pem.Decode(text)
		if block == nil || bytes.Count(text[:len(text)-len(rest)], []byte("-----BEGIN ")) != 1 {
			return fault.New("directory_malformed", "a PEM block is broken")
		}
		var err error
		switch {
		case block.Type == "CERTIFICATE":
			err = d.certificate(block.Bytes)
		case block.Type == "X509 CRL":
			err = d.crl(block.Bytes)
		case block.Type == "PUBLIC KEY":
			err = d.publicKey(block.Bytes)
		case strings.Contains(block.Type, "PRIVATE KEY"):
			err = privateKey()
		default:
			err = unknown()
		}
		if err != nil {
			return err
		}
		text = bytes.TrimSpace(rest)
	}
	return nil
}

func (d *directory) certificate(der []byte) error {
	if len(der) > MaxCert {
		return fault.New("collateral_too_large", "a certificate of %d bytes exceeds %d", len(der), MaxCert)
	}
	cert, err := x509.ParseCertificate(der)
	switch {
	case err != nil:
		return fault.Wrap(err, "directory_malformed", "certificate")
	case slices.ContainsFunc(d.certs, cert.Equal):
		return nil
	case len(d.certs) == MaxCerts:
		return fault.New("collateral_too_large", "more than %d certificates", MaxCerts)
	}
	d.certs = append(d.certs, cert)
	return nil
}

func (d *directory) crl(der []byte) error {
	der, crl, err := ParseCRL(der)
	switch {
	case fault.Code(err) == "collateral_too_large":
		return err
	case err != nil:
		return fault.Wrap(err, "directory_malformed", "revocation list")
	case slices.ContainsFunc(d.crls, func(have foundCRL) bool { return bytes.Equal(have.Raw, der) }):
		return nil
	case len(d.crls) == MaxCRLs:
		return fault.New("collateral_too_large", "more than %d revocation lists", MaxCRLs)
	}
	d.crls = append(d.crls, foundCRL{crl, d.name})
	return nil
}

func (d *directory) publicKey(der []byte) error {
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return fault.Wrap(err, "directory_malformed", "public key")
	}
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k.Curve == elliptic.P224() {
		return fault.New("directory_key", "the public key is not on P-256, P-384 or P-521")
	}
	d.keys = append(d.keys, NamedKey{Name: d.name, Key: k})
	return nil
}

// json tells what a JSON object is by the members that only its kind has.
func (d *directory) json(text []byte) error {
	var members map[string]json.RawMessage
	if err := strictjson.Decode(text, &members, strictjson.Limits{Size: MaxDirectory, Depth: 10, Unknown: true}); err != nil {
		return fault.Wrap(err, "directory_malformed", "JSON")
	}
	var kind string
	var read func([]byte) error
	for _, k := range []struct {
		name    string
		read    func([]byte) error
		members []string
	}{
		{"TCB info", d.readTCBInfo, []string{"tcbInfo"}},
		{"QE identity", d.readQEIdentity, []string{"enclaveIdentity"}},
		{"JWK", d.jwk, []string{"kty"}},
		{"bundle", d.set, []string{"tcb_info", "qe_identity", "pck_crl", "root_ca_crl", "certificates", "crls", "tdx_collateral"}},
	} {
		if !slices.ContainsFunc(k.members, func(m string) bool { return members[m] != nil }) {
			continue
		}
		if read != nil {
			return fault.New("directory_malformed", "it is both %s and %s", kind, k.name)
		}
		kind, read = k.name, k.read
	}
	switch {
	case read == nil:
		return unknown()
	case members["tdx_collateral"] != nil:
		return fault.New("directory_roots", "it holds development roots, which are no collateral").WithFix("pass the file as development roots, outside the directory")
	}
	return read(text)
}

func (d *directory) readTCBInfo(text []byte) error {
	document, signature, err := ParseTCBInfo(text)
	if err != nil {
		return err
	}
	if err := ofTDX("TCB info", document, "SGX"); err != nil {
		return err
	}
	return d.state(&d.tcbInfo, "TCB info", document, signature)
}

func (d *directory) readQEIdentity(text []byte) error {
	document, signature, err := ParseQEIdentity(text)
	if err != nil {
		return err
	}
	if err := ofTDX("QE identity", document, "QE", "QVE"); err != nil {
		return err
	}
	return d.state(&d.qeIdentity, "QE identity", document, signature)
}

// ofTDX refuses a document whose id says that it is for SGX enclaves. One that says
// anything else, or cannot be read, is the verifier's to judge.
func ofTDX(what, document string, enclave ...string) error {
	var v struct {
		ID string `json:"id"`
	}
	err := strictjson.Decode([]byte(document), &v, strictjson.Limits{Size: MaxDocument, Depth: 10, Unknown: true})
	if err == nil && slices.Contains(enclave, v.ID) {
		return fault.New("directory_sgx", "the %s is for SGX enclaves (id %s), and a directory has room for TDX's", what, v.ID).
			WithFix("take the file out, and fetch the document under /tdx/certification/v4 instead")
	}
	return nil
}

func (d *directory) state(s *statement, what, document string, signature Hex) error {
	if s.file != "" && (s.document != document || !bytes.Equal(s.signature, signature)) {
		return ambiguous(what, s.file)
	}
	*s = statement{document, signature, d.name}
	return nil
}

func (d *directory) set(text []byte) error {
	b, err := ParseBundle(text)
	if err != nil {
		return err
	}
	for _, der := range b.Certificates {
		if err := d.certificate(der); err != nil {
			return err
		}
	}
	for _, der := range b.CRLs {
		if err := d.crl(der); err != nil {
			return err
		}
	}
	if err := ofTDX("TCB info", b.TCBInfo, "SGX"); err != nil {
		return err
	}
	if err := ofTDX("QE identity", b.QEIdentity, "QE", "QVE"); err != nil {
		return err
	}
	if b.HasTDX() {
		d.sets = append(d.sets, foundSet{b.TDX, d.name})
	}
	return nil
}

// jwk reads an elliptic curve key (RFC 7517; RFC 7518 section 6.2).
func (d *directory) jwk(text []byte) error {
	var v struct {
		Type    string          `json:"kty"`
		Curve   string          `json:"crv"`
		X       string          `json:"x"`
		Y       string          `json:"y"`
		Private json.RawMessage `json:"d"`
	}
	if err := strictjson.Decode(text, &v, strictjson.Limits{Size: MaxCert, Depth: 4, Unknown: true}); err != nil {
		return fault.Wrap(err, "directory_malformed", "JWK")
	}
	if v.Private != nil {
		return privateKey()
	}
	curve := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}[v.Curve]
	if v.Type != "EC" || curve == nil {
		return fault.New("directory_key", "the JWK of type %.20q and curve %.20q is not on P-256, P-384 or P-521", v.Type, v.Curve)
	}
	size := (curve.Params().BitSize + 7) / 8
	x, errX := base64.RawURLEncoding.Strict().DecodeString(v.X)
	y, errY := base64.RawURLEncoding.Strict().DecodeString(v.Y)
	if errX != nil || errY != nil || len(x) != size || len(y) != size {
		return fault.New("directory_malformed", "coordinates of the JWK are not %d bytes in base64url each", size)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, slices.Concat([]byte{4}, x, y))
	if err != nil {
		return fault.Wrap(err, "directory_malformed", "JWK")
	}
	d.keys = append(d.keys, NamedKey{Name: d.name, Key: key})
	return nil
}

// assemble makes the bundle: one set of TDX collateral, from a whole one or from
// loose parts, and everything else as it is.
func (d *directory) assemble() error {
	used := map[*x509.Certificate]bool{}
	loose, file, err := d.looseTDX(used)
	if err != nil {
		return err
	}
	if (&Bundle{TDX: loose}).HasTDX() {
		d.sets = append(d.sets, foundSet{loose, file})
	}
	for i, set := range d.sets {
		if i > 0 && !sameTDX(set.TDX, d.sets[0].TDX) {
			return fmt.Errorf("collateral %s: %w", set.file, ambiguous("set of TDX collateral, or part of one", d.sets[0].file))
		}
		d.bundle.TDX = set.TDX
	}
	pck, err := d.pckChain(used)
	if err != nil {
		return err
	}
	if have := d.bundle.PCKCertificateChain; pck != "" && have != "" && have != pck {
		return fault.New("directory_ambiguous", "there are two chains of PCK certificates").WithFix("keep the one of the platform")
	} else if pck != "" {
		d.bundle.PCKCertificateChain = pck
	}
	for _, c := range d.certs {
		if !used[c] {
			d.bundle.Certificates = append(d.bundle.Certificates, c.Raw)
		}
	}
	return nil
}

// looseTDX completes the statements and revocation lists that came alone, with
// their issuers. It names a file that one of them came from.
func (d *directory) looseTDX(used map[*x509.Certificate]bool) (t TDX, file string, err error) {
	var pckCRL, rootCRL string
	for _, crl := range d.crls {
		switch crl.Issuer.CommonName {
		case cnRoot:
			if rootCRL != "" {
				return t, "", fmt.Errorf("collateral %s: %w", crl.file, ambiguous("revocation list of the TDX root", rootCRL))
			}
			t.RootCACRL, rootCRL, file = crl.Raw, crl.file, crl.file
		case cnPlatformCA, cnProcessorCA:
			if pckCRL != "" {
				return t, "", fmt.Errorf("collateral %s: %w", crl.file, ambiguous("revocation list of PCK certificates", pckCRL))
			}
			t.PCKCRL, pckCRL, file = crl.Raw, crl.file, crl.file
			t.PCKCRLIssuerChain = d.chain(used, func(c *x509.Certificate) bool {
				return bytes.Equal(c.RawSubject, crl.RawIssuer) && crl.CheckSignatureFrom(c) == nil
			})
			if t.PCKCRLIssuerChain == "" {
				return t, "", issuerMissing(crl.file, crl.Issuer.CommonName)
			}
		default:
			d.bundle.CRLs = append(d.bundle.CRLs, crl.Raw)
		}
	}
	chainOf := func(s statement) (string, error) {
		if s.file == "" {
			return "", nil
		}
		file = s.file
		chain := d.chain(used, func(c *x509.Certificate) bool { return signed(c, s.document, s.signature) })
		if chain == "" {
			return "", issuerMissing(s.file, "Intel SGX TCB Signing")
		}
		return chain, nil
	}
	t.TCBInfo, t.TCBInfoSignature = d.tcbInfo.document, d.tcbInfo.signature
	t.QEIdentity, t.QEIdentitySignature = d.qeIdentity.document, d.qeIdentity.signature
	if t.TCBInfoIssuerChain, err = chainOf(d.tcbInfo); err != nil {
		return t, "", err
	}
	t.QEIdentityIssuerChain, err = chainOf(d.qeIdentity)
	return t, file, err
}

func issuerMissing(file, name string) error {
	return fmt.Errorf("collateral %s: %w", file, fault.New("directory_issuer", "no certificate here is of who signed it").
		WithFix("add the certificate of %q, which comes in a header of the service's answer", name))
}

// pckChain is the chain of the one PCK certificate, for quotes that carry none.
func (d *directory) pckChain(used map[*x509.Certificate]bool) (string, error) {
	var chain string
	for _, c := range d.certs {
		if !slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == oidSGX }) {
			continue
		}
		if chain != "" {
			return "", fault.New("directory_ambiguous", "there are two PCK certificates").WithFix("keep the one of the platform")
		}
		chain = d.chain(used, c.Equal)
	}
	return chain, nil
}

// chain writes in PEM the first certificate that is wanted, and its issuers as far
// as they are here. It returns "" when there is none.
func (d *directory) chain(used map[*x509.Certificate]bool, want func(*x509.Certificate) bool) string {
	var out bytes.Buffer
	for range maxChain {
		i := slices.IndexFunc(d.certs, want)
		if i < 0 {
			break
		}
		c := d.certs[i]
		used[c] = true
		pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Buffer does not fail
		if bytes.Equal(c.RawIssuer, c.RawSubject) {
			break
		}
		want = func(issuer *x509.Certificate) bool {
			return bytes.Equal(c.RawIssuer, issuer.RawSubject) && c.CheckSignatureFrom(issuer) == nil
		}
	}
	return out.String()
}

// maxChain bounds the certificates of one chain (threats.md B15).
const maxChain = 8

// signed reports whether a certificate's key on P-256 made a signature r ‖ s.
func signed(c *x509.Certificate, document string, signature Hex) bool {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() || len(signature) != 64 {
		return false
	}
	digest := sha256.Sum256([]byte(document))
	return ecdsa.Verify(key, digest[:], new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:]))
}

func sameTDX(a, b TDX) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
