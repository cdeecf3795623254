// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// AMD's extensions of VCEK and VLEK certificates (AMD 57230, chapter 3), below
// 1.3.6.1.4.1.3704.1.
const (
	extStruct     = "1"
	extProduct    = "2"
	extBootloader = "3.1"
	extTEE        = "3.2"
	extSNP        = "3.3"
	extSPL4       = "3.4" // reserved, as the next three
	extSPL5       = "3.5"
	extSPL6       = "3.6"
	extSPL7       = "3.7"
	extMicrocode  = "3.8"
	extFMC        = "3.9" // Turin
	extHWID       = "4"   // VCEK
	extCSPID      = "5"   // VLEK

	extBase  = "1.3.6.1.4.1.3704.1."
	maxCSPID = 256 // bytes
)

// Extensions is what AMD certified about the key that signs reports.
type Extensions struct {
	StructVersion uint8  // 0, or 1 for Turin
	ProductName   string // such as Milan-B0
	TCB           uint64 // in the layout that reports of the product line have
	HWID          []byte // VCEK: 64 bytes, or 8 on Turin; nil in a VLEK
	CSPID         string // VLEK: the cloud provider; empty in a VCEK
}

// ParseExtensions reads AMD's extensions of a VCEK or VLEK certificate of one
// product line, which decides the layout of the TCB version. Fields that
// verification rests on must be there and have their type and length; the code of
// every error is vek_extension.
func ParseExtensions(cert *x509.Certificate, product string) (*Extensions, error) {
	values := map[string][]byte{}
	for _, e := range cert.Extensions { // each once: x509 refuses repeated extensions
		if oid, ok := strings.CutPrefix(e.Id.String(), extBase); ok {
			values[oid] = e.Value
		}
	}
	p := extensionParser{values: values}
	ext := &Extensions{StructVersion: p.number(extStruct), ProductName: p.text(extProduct, 64)}
	tcb := [8]byte{7: p.number(extMicrocode)}
	if product == Turin {
		tcb[0], tcb[1], tcb[2], tcb[3] = p.number(extFMC), p.number(extBootloader), p.number(extTEE), p.number(extSNP)
		for _, reserved := range []string{extSPL4, extSPL5, extSPL6, extSPL7} {
			if _, ok := values[reserved]; ok && p.number(reserved) != 0 {
				p.fail("reserved field %s is not zero", reserved)
			}
		}
	} else {
		tcb[0], tcb[1], tcb[6] = p.number(extBootloader), p.number(extTEE), p.number(extSNP)
		for i, reserved := range []string{extSPL4, extSPL5, extSPL6, extSPL7} {
			tcb[2+i] = p.number(reserved)
		}
	}
	ext.TCB = binary.LittleEndian.Uint64(tcb[:])
	if cert.Subject.CommonName == cnVLEK {
		ext.CSPID = p.text(extCSPID, maxCSPID)
		if _, ok := values[extHWID]; ok {
			p.fail("a VLEK has field %s, the identity of a chip", extHWID)
		}
	} else {
		ext.HWID = p.hwid(product)
		if _, ok := values[extCSPID]; ok {
			p.fail("a VCEK has field %s, a cloud provider", extCSPID)
		}
	}
	if p.err == nil && ext.StructVersion > 1 {
		p.fail("structure has version %d, want 0 or 1", ext.StructVersion)
	}
	if p.err != nil {
		return nil, p.err
	}
	return ext, nil
}

// extensionParser reads values by the end of their OID and keeps the first error.
type extensionParser struct {
	values map[string][]byte
	err    error
}

func (p *extensionParser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fault.New("vek_extension", "AMD's certificate extensions: "+format, args...)
	}
}

func (p *extensionParser) number(oid string) uint8 {
	var v int
	rest, err := asn1.Unmarshal(p.values[oid], &v)
	if err != nil || len(rest) > 0 || v < 0 || v > 255 {
		p.fail("field %s is not a number from 0 to 255", oid)
		return 0
	}
	return uint8(v)
}

// text reads an IA5String of printable characters.
func (p *extensionParser) text(oid string, max int) string {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(p.values[oid], &v)
	if err != nil || len(rest) > 0 || v.Class != asn1.ClassUniversal || v.Tag != asn1.TagIA5String ||
		len(v.Bytes) == 0 || len(v.Bytes) > max ||
		strings.ContainsFunc(string(v.Bytes), func(r rune) bool { return r < ' ' || r > '~' }) {
		p.fail("field %s is not a text of 1 to %d printable characters", oid, max)
		return ""
	}
	return string(v.Bytes)
}

// hwid reads the chip's identity: 64 bytes, on Turin also 8. AMD writes them bare,
// without the OCTET STRING that they should be in; both are read.
func (p *extensionParser) hwid(product string) []byte {
	raw := p.values[extHWID]
	sized := func(b []byte) bool { return len(b) == 64 || len(b) == 8 && product == Turin }
	if sized(raw) {
		return raw
	}
	var v []byte
	if rest, err := asn1.Unmarshal(raw, &v); err != nil || len(rest) > 0 || !sized(v) {
		p.fail("field %s is no chip identity", extHWID)
		return nil
	}
	return v
}
