// SPDX-License-Identifier: Apache-2.0

// Package csr is the signing request by which an app asks its KMS for a certificate:
// SCALE bytes with the public key, what is wanted, and evidence over that key, signed
// by the key itself.
//
// It encodes, decodes and checks the signature. What the evidence is worth is for the
// issuer to appraise. Attacker-controlled: every byte; sizes and counts are bounded,
// and a request that has another encoding than the one it decodes to is refused.
//
// Implements spec/guest-agent.md §9.2 and spec/kms.md §3.4; SCALE is the codec of
// Substrate: compact lengths, little-endian integers.
package csr

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits in bytes, and of names.
const (
	MaxSize    = 10 << 20
	maxText    = 4 << 10
	maxNames   = 256
	maxKey     = 1 << 10
	maxLegacy  = 4 << 20
	maxSignLen = 128
)

// confirm begins every request, so that its signature says what it is for.
const confirm = "please sign cert:"

// Request is a certificate signing request.
type Request struct {
	// Version is 2, or 1, which lacks the fields said so.
	Version int
	// SPKI is the DER SubjectPublicKeyInfo of the key to be certified.
	SPKI []byte
	Config
	// Evidence is a versioned attestation over ratls.ReportData(SPKI); version 2.
	Evidence []byte
	// Quote and EventLog are the evidence of version 1.
	Quote, EventLog []byte
}

// Config says what the certificate is to be.
type Config struct {
	Organization           string // "": none
	Subject                string // common name
	Names                  []string
	ServerAuth, ClientAuth bool
	WithEvidence           bool // embed the evidence
	// Version 2:
	WithAppInfo         bool
	NotBefore, NotAfter *uint64 // Unix seconds; nil: as the issuer likes
}

// Encode returns the bytes that are signed.
func (r *Request) Encode() []byte {
	var b []byte
	b = appendBytes(b, []byte(confirm))
	b = appendBytes(b, r.SPKI)
	b = appendOption(b, r.Organization != "")
	if r.Organization != "" {
		b = appendBytes(b, []byte(r.Organization))
	}
	b = appendBytes(b, []byte(r.Subject))
	b = appendCompact(b, uint64(len(r.Names)))
	for _, n := range r.Names {
		b = appendBytes(b, []byte(n))
	}
	b = appendOption(b, r.ServerAuth)
	b = appendOption(b, r.ClientAuth)
	b = appendOption(b, r.WithEvidence)
	if r.Version == 1 {
		b = appendBytes(b, r.Quote)
		return appendBytes(b, r.EventLog)
	}
	b = appendOption(b, r.WithAppInfo)
	for _, t := range []*uint64{r.NotBefore, r.NotAfter} {
		b = appendOption(b, t != nil)
		if t != nil {
			b = binary.LittleEndian.AppendUint64(b, *t)
		}
	}
	return append(b, r.Evidence...)
}

// Sign returns the encoded request and its signature by the key: ECDSA over SHA-256,
// ASN.1. The request's SPKI becomes that of the key.
func (r *Request) Sign(key *ecdsa.PrivateKey) (request, signature []byte, err error) {
	if r.SPKI, err = x509.MarshalPKIXPublicKey(key.Public()); err != nil {
		return nil, nil, err
	}
	request = r.Encode()
	sum := sha256.Sum256(request)
	signature, err = ecdsa.SignASN1(rand.Reader, key, sum[:])
	return request, signature, err
}

// Open decodes a request of the given version and checks that the holder of its key
// signed it. Codes: csr_malformed, csr_key, csr_signature.
func Open(version int, request, signature []byte) (*Request, error) {
	r, err := Decode(version, request)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKIXPublicKey(r.SPKI)
	if err != nil {
		return nil, fault.Wrap(err, "csr_key", "the key of the signing request")
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve.Params().Name != "P-256" {
		// Upstream's words: clients match on them.
		return nil, fault.New("csr_key", "Unsupported algorithm: the key of the signing request is no P-256 key")
	}
	sum := sha256.Sum256(request)
	if len(signature) > maxSignLen || !ecdsa.VerifyASN1(key, sum[:], signature) {
		return nil, fault.New("csr_signature", "the signing request is not signed by its own key")
	}
	return r, nil
}

// Decode reads the bytes of a request. Code csr_malformed.
func Decode(version int, data []byte) (*Request, error) {
	r, err := decode(version, data)
	if err != nil {
		return nil, fault.Wrap(err, "csr_malformed", "the signing request")
	}
	return r, nil
}

func decode(version int, data []byte) (*Request, error) {
	if version != 1 && version != 2 {
		return nil, fmt.Errorf("Unsupported API version: %d", version)
	}
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%d bytes, more than %d", len(data), MaxSize)
	}
	d := &reader{rest: data}
	if text := d.text("confirm"); d.err == nil && text != confirm {
		return nil, fmt.Errorf("Invalid confirm word %.40q", text)
	}
	r := &Request{Version: version}
	r.SPKI = d.bytes("pubkey", maxKey)
	if d.flag("org_name") {
		if r.Organization = d.text("org_name"); r.Organization == "" {
			d.fail("org_name", "is present and empty")
		}
	}
	r.Subject = d.text("subject")
	n := d.compact("subject_alt_names")
	if n > maxNames {
		d.fail("subject_alt_names", "has %d names, more than %d", n, maxNames)
	}
	for i := uint64(0); i < n && d.err == nil; i++ {
		r.Names = append(r.Names, d.text("subject_alt_names"))
	}
	r.ServerAuth = d.flag("usage_server_auth")
	r.ClientAuth = d.flag("usage_client_auth")
	r.WithEvidence = d.flag("ext_quote")
	if version == 1 {
		r.Quote = d.bytes("quote", maxLegacy)
		r.EventLog = d.bytes("event_log", maxLegacy)
		if d.err == nil && len(d.rest) > 0 {
			d.fail("event_log", "is followed by %d bytes", len(d.rest))
		}
		return r, d.err
	}
	r.WithAppInfo = d.flag("ext_app_info")
	for _, t := range []struct {
		name string
		to   **uint64
	}{{"not_before", &r.NotBefore}, {"not_after", &r.NotAfter}} {
		if d.flag(t.name) {
			if b := d.take(t.name, 8); b != nil {
				v := binary.LittleEndian.Uint64(b)
				*t.to = &v
			}
		}
	}
	r.Evidence = d.rest
	return r, d.err
}

// reader reads SCALE and keeps its first error.
type reader struct {
	rest []byte
	err  error
}

func (d *reader) fail(field, format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%s %s", field, fmt.Sprintf(format, args...))
	}
}

func (d *reader) take(field string, n uint64) []byte {
	if d.err != nil || n > uint64(len(d.rest)) {
		d.fail(field, "has %d bytes, of which %d are there", n, len(d.rest))
		return nil
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b
}

// flag reads a boolean, or whether an option has a value: 0 or 1.
func (d *reader) flag(field string) bool {
	b := d.take(field, 1)
	if b == nil {
		return false
	}
	if b[0] > 1 {
		d.fail(field, "is %d, not 0 or 1", b[0])
	}
	return b[0] == 1
}

// compact reads a compact integer in its shortest form, up to 2^30 - 1: more would
// not fit the request.
func (d *reader) compact(field string) uint64 {
	b := d.take(field, 1)
	if b == nil {
		return 0
	}
	mode := b[0] & 3
	if mode == 3 {
		d.fail(field, "has a length of 2^30 or more")
		return 0
	}
	size := uint64(1) << mode
	full := append([]byte{b[0]}, d.take(field, size-1)...)
	if d.err != nil {
		return 0
	}
	var v uint64
	for i, c := range full {
		v |= uint64(c) << (8 * i)
	}
	v >>= 2
	if mode > 0 && v < 1<<(8*(size/2)-2) {
		d.fail(field, "has a length that is not in its shortest form")
	}
	return v
}

func (d *reader) bytes(field string, limit uint64) []byte {
	n := d.compact(field)
	if n > limit {
		d.fail(field, "has %d bytes, more than %d", n, limit)
		return nil
	}
	return d.take(field, n)
}

func (d *reader) text(field string) string {
	b := d.bytes(field, maxText)
	if !utf8.Valid(b) {
		d.fail(field, "is not UTF-8")
	}
	return string(b)
}

func appendCompact(b []byte, n uint64) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n<<2))
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(b, uint16(n<<2|1))
	case n < 1<<30:
		return binary.LittleEndian.AppendUint32(b, uint32(n<<2|2))
	}
	panic(fmt.Sprintf("csr: a field of %d bytes", min(n, math.MaxInt64)))
}

func appendBytes(b, data []byte) []byte { return append(appendCompact(b, uint64(len(data))), data...) }

func appendOption(b []byte, on bool) []byte {
	if on {
		return append(b, 1)
	}
	return append(b, 0)
}
