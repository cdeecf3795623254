// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"slices"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits on certificates that come with evidence (threats.md B15). Collateral has
// limits of its own.
const (
	maxChain  = 8        // certificates, and entries of the chain
	maxBlob   = 64 << 10 // bytes of one entry, which may be a table
	maxTable  = 32       // entries of a certificate table
	guidSize  = 16
	entrySize = guidSize + 8
)

// Common names of the certificates (AMD 57230, chapter 2). Those of the
// intermediates and roots end in the product line.
const (
	cnVCEK = "SEV-VCEK"
	cnVLEK = "SEV-VLEK"
	cnASK  = "SEV-"
	cnASVK = "SEV-VLEK-"
	cnARK  = "ARK-"
)

// tableGUIDs are those of the certificates in a table (AMD 56421, table
// "Certificate table"), in the order of their text: ASK or ASVK, VCEK, VLEK, ARK.
var tableGUIDs = [...][guidSize]byte{
	{0x4a, 0xb7, 0xb3, 0x79, 0xbb, 0xac, 0x4f, 0xe4, 0xa0, 0x2f, 0x05, 0xae, 0xf3, 0x27, 0xc7, 0x82},
	{0x63, 0xda, 0x75, 0x8d, 0xe6, 0x64, 0x45, 0x64, 0xad, 0xc5, 0xf4, 0xb9, 0x3b, 0xe8, 0xac, 0xcd},
	{0xa8, 0x07, 0x4b, 0xc2, 0xa2, 0x5a, 0x48, 0x3e, 0xaa, 0xe6, 0x39, 0xc0, 0x45, 0xa0, 0xb8, 0xa1},
	{0xc0, 0xb4, 0x06, 0xa4, 0xa8, 0x03, 0x49, 0x52, 0x97, 0x43, 0x3f, 0xb6, 0x01, 0x4c, 0xd0, 0xae},
}

// gather returns the certificates of evidence and collateral, unverified and in no
// order that matters.
func gather(in attest.Input) ([]*x509.Certificate, error) {
	if len(in.Evidence.CertChain) > maxChain {
		return nil, fault.New("chain_length", "%d certificates beside the report, at most %d", len(in.Evidence.CertChain), maxChain)
	}
	var certs []*x509.Certificate
	for i, blob := range in.Evidence.CertChain {
		more, err := parseBlob(blob)
		if err != nil {
			return nil, fault.Wrap(err, fault.Code(err), "entry %d of the certificates beside the report", i)
		}
		if certs = append(certs, more...); len(certs) > maxChain {
			return nil, fault.New("chain_length", "more than %d certificates beside the report", maxChain)
		}
	}
	if in.Collateral != nil {
		if err := in.Collateral.Check(); err != nil {
			return nil, err
		}
		for _, der := range in.Collateral.Certificates {
			// Collateral may serve other kinds of evidence too, with certificates that are
			// none of our concern.
			if cert, err := x509.ParseCertificate(der); err == nil {
				certs = append(certs, cert)
			}
		}
	}
	return certs, nil
}

// parseBlob reads one entry of a chain: PEM certificates, one DER certificate, or
// a certificate table. Codes: cert_malformed, cert_table.
func parseBlob(blob []byte) ([]*x509.Certificate, error) {
	if len(blob) > maxBlob {
		return nil, fault.New("cert_malformed", "%d bytes, at most %d", len(blob), maxBlob)
	}
	text := bytes.TrimSpace(bytes.TrimRight(blob, "\x00"))
	switch {
	case bytes.HasPrefix(text, []byte("-----BEGIN")):
		return parsePEM(text)
	case len(blob) > 0 && blob[0] == 0x30: // ASN.1 SEQUENCE; no GUID of a table begins so
		cert, err := parseDER(blob)
		return []*x509.Certificate{cert}, err
	default:
		return parseTable(blob)
	}
}

func parseDER(der []byte) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "cert_malformed", "not a DER certificate")
	}
	return cert, nil
}

func parsePEM(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for len(text) > 0 {
		block, rest := pem.Decode(text)
		if block == nil || block.Type != "CERTIFICATE" || !bytes.HasPrefix(text, []byte("-----BEGIN")) || len(certs) == maxChain {
			return nil, fault.New("cert_malformed", "not PEM certificates only, or more than %d", maxChain)
		}
		cert, err := parseDER(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs, text = append(certs, cert), bytes.TrimSpace(rest)
	}
	return certs, nil
}

// parseTable reads a certificate table of the GHCB specification: entries {GUID
// 16 bytes, offset u32, length u32} little-endian, offsets from the beginning of
// the table, ended by an entry of zeros. Entries that are no certificates of the
// chain are skipped. Hosts write GUIDs in either byte order.
func parseTable(table []byte) ([]*x509.Certificate, error) {
	bad := func(format string, args ...any) error {
		return fault.New("cert_table", "certificate table: "+format, args...)
	}
	var certs []*x509.Certificate
	for i := 0; ; i++ {
		at := i * entrySize
		if len(table)-at < entrySize {
			return nil, bad("no end within %d bytes (neither is it PEM or DER)", len(table))
		}
		entry := table[at : at+entrySize]
		if [entrySize]byte(entry) == [entrySize]byte{} {
			return certs, nil
		}
		if i == maxTable {
			return nil, bad("more than %d entries", maxTable)
		}
		guid := [guidSize]byte(entry)
		offset, size := uint64(binary.LittleEndian.Uint32(entry[16:])), uint64(binary.LittleEndian.Uint32(entry[20:]))
		if offset+size > uint64(len(table)) {
			return nil, bad("entry %d says %d bytes at %d, the table has %d", i, size, offset, len(table))
		}
		if !slices.Contains(tableGUIDs[:], guid) && !slices.Contains(tableGUIDs[:], mixedEndian(guid)) {
			continue
		}
		// The host pads certificates to pages; DER says where it ends.
		content := table[offset : offset+size]
		var more []*x509.Certificate
		var err error
		if bytes.HasPrefix(content, []byte("-----BEGIN")) {
			more, err = parsePEM(bytes.TrimSpace(bytes.TrimRight(content, "\x00")))
		} else {
			var cert *x509.Certificate
			cert, err = parseDER(trimDER(content))
			more = []*x509.Certificate{cert}
		}
		if err != nil {
			return nil, fault.Wrap(err, "cert_table", "certificate table: entry %d", i)
		}
		if certs = append(certs, more...); len(certs) > maxChain {
			return nil, bad("more than %d certificates", maxChain)
		}
	}
}

// trimDER cuts zeros after a DER value whose length takes two bytes.
func trimDER(b []byte) []byte {
	if len(b) < 4 || b[0] != 0x30 || b[1] != 0x82 {
		return b
	}
	n := 4 + int(binary.BigEndian.Uint16(b[2:]))
	if n > len(b) || len(bytes.Trim(b[n:], "\x00")) != 0 {
		return b
	}
	return b[:n]
}

// mixedEndian turns a GUID from the order of its text into that of UEFI, or back.
func mixedEndian(g [guidSize]byte) [guidSize]byte {
	slices.Reverse(g[0:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

// isLeaf reports whether a certificate has the shape of AMD's for a VCEK or VLEK:
// an ECDSA P-384 key certified with RSASSA-PSS and SHA-384 (AMD 57230, chapter 3).
func isLeaf(c *x509.Certificate, cn string) bool {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	return ok && key.Curve == elliptic.P384() && c.Subject.CommonName == cn && hasProfile(c) && !c.IsCA
}

// isIntermediate is the same for an ASK or ASVK: a 4096-bit RSA key.
func isIntermediate(c *x509.Certificate) bool {
	key, ok := c.PublicKey.(*rsa.PublicKey)
	return ok && key.N.BitLen() == 4096 && key.E == 65537 && hasProfile(c)
}

func hasProfile(c *x509.Certificate) bool {
	return c.SignatureAlgorithm == x509.SHA384WithRSAPSS && len(c.UnhandledCriticalExtensions) == 0
}
