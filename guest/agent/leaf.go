// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"net/netip"
	"time"
	"unicode/utf8"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits and defaults of certificates.
const (
	maxNames      = 16 << 10 // bytes of subject and alternative names together
	maxAltNames   = 256
	leafLifetime  = 3650 * 24 * time.Hour // upstream's
	leafBackdated = 24 * time.Hour        // for clocks of clients that are slow
	maxUnix       = 253402300799          // 9999-12-31 23:59:59: the last that X.509 can say
)

// certRequest is what a caller wants certified.
type certRequest struct {
	subject                string
	altNames               []string
	serverAuth, clientAuth bool
	raTLS, appInfo         bool
	notBefore, notAfter    *uint64 // Unix seconds; nil: as the issuer likes
}

// check refuses what no issuer would certify, before it costs a quote. Codes:
// certificate_validity, certificate_name.
func (r certRequest) check() error {
	for _, at := range []*uint64{r.notBefore, r.notAfter} {
		if at != nil && *at > maxUnix {
			return fault.New("certificate_validity", "a certificate cannot say the time %d", *at)
		}
	}
	if r.notBefore != nil && r.notAfter != nil && *r.notBefore >= *r.notAfter {
		return fault.New("certificate_validity", "not_before must be earlier than not_after")
	}
	size := len(r.subject)
	if !utf8.ValidString(r.subject) {
		return fault.New("certificate_name", "the subject is not text")
	}
	for _, name := range r.altNames {
		size += len(name)
		if name == "" {
			return fault.New("certificate_name", "an alternative name is empty")
		}
		for _, c := range []byte(name) {
			if c <= ' ' || c > '~' {
				return fault.New("certificate_name", "the alternative name %q is not printable ASCII", name).WithFix("write international names in their ASCII form (xn--…)")
			}
		}
	}
	if size > maxNames || len(r.altNames) > maxAltNames {
		return fault.New("certificate_name", "more than %d alternative names, or names of more than %d bytes", maxAltNames, maxNames)
	}
	return nil
}

// authority is a key that signs certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// parseAuthority reads a certificate and its PKCS #8 key from PEM.
func parseAuthority(cert string, key []byte) (*authority, error) {
	malformed := func(what string) error { return fault.New("app_keys_malformed", "the app's keys: %s", what) }
	block, _ := pem.Decode([]byte(cert))
	if block == nil {
		return nil, malformed("the CA's certificate is not PEM")
	}
	parsed, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, malformed("the CA's certificate is malformed")
	}
	block, _ = pem.Decode(key)
	if block == nil {
		return nil, malformed("the CA's key is not PEM")
	}
	defer clear(block.Bytes)
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, malformed("the CA's key is not PKCS #8") // err could quote it
	}
	signer, ok := private.(*ecdsa.PrivateKey)
	if !ok {
		return nil, malformed("the CA's key is not an ECDSA key")
	}
	if !signer.PublicKey.Equal(parsed.PublicKey) {
		return nil, malformed("the CA's key does not belong to its certificate")
	}
	return &authority{cert: parsed, key: signer}, nil
}

// Object identifiers of extensions (RFC 5280 §4.2.1).
var (
	oidSAN        = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage   = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUse  = asn1.ObjectIdentifier{2, 5, 29, 37}
	oidServerAuth = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 3, 2}
	oidCommonName = asn1.ObjectIdentifier{2, 5, 4, 3}
)

// sign makes a leaf certificate, DER (guest-agent.md §9.3). It differs from
// upstream's where that is safe and better (§16.8): the serial number is random, the
// validity begins a day ago instead of in 1975 and ends when the CA's does at the
// latest, and the CA's key is named when it has an identifier.
func (ca *authority) sign(public *ecdsa.PublicKey, r certRequest, custom []pkix.Extension, now time.Time) ([]byte, error) {
	begin, end := now.Add(-leafBackdated), now.Add(leafLifetime)
	if r.notBefore != nil {
		begin = time.Unix(int64(*r.notBefore), 0)
	}
	if r.notAfter != nil {
		end = time.Unix(int64(*r.notAfter), 0)
	}
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	if !begin.Before(end) {
		return nil, fault.New("certificate_validity", "not_before must be earlier than not_after, which is %s at the latest", ca.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	extensions, err := leafExtensions(r)
	if err != nil {
		return nil, err
	}
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	type nameSET []attribute // by this suffix encoding/asn1 knows a SET
	subject, err := asn1.Marshal([]nameSET{{{oidCommonName, asn1.RawValue{Tag: asn1.TagUTF8String, Bytes: []byte(r.subject)}}}})
	if err != nil {
		return nil, err
	}
	serial := make([]byte, 20)
	if _, err := rand.Read(serial); err != nil {
		return nil, err
	}
	serial[0] = serial[0]&0x7f | 1 // positive, and never zero
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), RawSubject: subject, NotBefore: begin, NotAfter: end,
		// In upstream's order: what is among these, the library does not add itself.
		ExtraExtensions: append(extensions, custom...),
	}
	return x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key)
}

func leafExtensions(r certRequest) ([]pkix.Extension, error) {
	var out []pkix.Extension
	add := func(id asn1.ObjectIdentifier, critical bool, value any) error {
		der, err := asn1.Marshal(value)
		out = append(out, pkix.Extension{Id: id, Critical: critical, Value: der})
		return err
	}
	if len(r.altNames) > 0 {
		var names []asn1.RawValue // GeneralName: [2] IA5String, [7] OCTET STRING
		for _, name := range r.altNames {
			if ip, err := netip.ParseAddr(name); err == nil && ip.Zone() == "" {
				names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 7, Bytes: ip.AsSlice()})
			} else {
				names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(name)})
			}
		}
		if err := add(oidSAN, false, names); err != nil {
			return nil, err
		}
	}
	if err := add(oidKeyUsage, true, asn1.BitString{Bytes: []byte{0x80}, BitLength: 1}); err != nil { // digitalSignature
		return nil, err
	}
	var uses []asn1.ObjectIdentifier
	if r.serverAuth {
		uses = append(uses, oidServerAuth)
	}
	if r.clientAuth {
		uses = append(uses, oidClientAuth)
	}
	if len(uses) > 0 {
		if err := add(oidExtKeyUse, false, uses); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func certPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
