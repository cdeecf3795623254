// SPDX-License-Identifier: Apache-2.0

package sevsnp

import (
	"encoding/binary"
	"strings"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Product lines, as AMD's key distribution service spells them. Each has a root of
// its own; Bergamo and Siena belong to Genoa's.
const (
	Milan = "Milan"
	Genoa = "Genoa"
	Turin = "Turin"
)

// productOf returns the product line of a family and model (CPUID leaf 1, extended
// values), or "" for one not known here.
func productOf(cpuid [3]byte) string {
	family, model := cpuid[0], cpuid[1]
	switch {
	case family == 0x19 && model <= 0x0f:
		return Milan
	case family == 0x19 && (model>>4 == 0x1 || model>>4 == 0xa):
		return Genoa
	case family == 0x1a && model <= 0x11:
		return Turin
	}
	return ""
}

// productOfName returns the product line of the product name in a certificate,
// such as Milan-B0, or "".
func productOfName(name string) string {
	line, _, _ := strings.Cut(name, "-")
	switch line {
	case Milan, Genoa, Turin:
		return line
	case "Bergamo", "Siena":
		return Genoa
	}
	return ""
}

// Parts takes a TCB version of a report apart, as its product line lays it out
// (AMD 56860, TCB_VERSION): on Turin bytes 0 to 3 are FMC, boot loader, TEE and
// SNP; before, 0, 1 and 6 are boot loader, TEE and SNP. Byte 7 is the microcode.
func Parts(product string, tcb uint64) attest.SNPParts {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], tcb)
	if product == Turin {
		return attest.SNPParts{FMC: b[0], Bootloader: b[1], TEE: b[2], SNP: b[3], Microcode: b[7]}
	}
	return attest.SNPParts{Bootloader: b[0], TEE: b[1], SNP: b[6], Microcode: b[7]}
}

// noneAbove reports whether no byte of a is above that of b: every part of a TCB
// version is one byte, whatever the product.
func noneAbove(a, b uint64) bool {
	for ; a|b != 0; a, b = a>>8, b>>8 {
		if a&0xff > b&0xff {
			return false
		}
	}
	return true
}

// Request names the certificates and the revocation list that a report needs, for
// a [collateral.Source]. A report of version 2 does not tell its product line:
// Product then is "", and the source must try each. Codes: product_unknown,
// report_unsigned, and those of [ParseReport].
func Request(report []byte) (collateral.Request, error) {
	r, err := ParseReport(report)
	if err != nil {
		return collateral.Request{}, err
	}
	if _, err := r.signerName(); err != nil {
		return collateral.Request{}, err
	}
	req := collateral.Request{Product: productOf(r.CPUID), ChipID: r.ChipID, TCB: r.ReportedTCB, VLEK: r.signer() == signerVLEK}
	if req.Product == "" && r.Version > 2 {
		return collateral.Request{}, unknownProduct(r)
	}
	return req, nil
}

func unknownProduct(r *Report) error {
	return fault.New("product_unknown", "report is of a processor of family %#x, model %#x, which is no known product line", r.CPUID[0], r.CPUID[1])
}

// signerName returns VCEK or VLEK.
func (r *Report) signerName() (string, error) {
	switch r.signer() {
	case signerVCEK:
		return "VCEK", nil
	case signerVLEK:
		return "VLEK", nil
	case signerNone:
		return "", fault.New("report_unsigned", "the firmware did not sign the report (signing key NONE: the host masks the chip key)")
	}
	return "", fault.New("report_signer", "report has signing key %d, want 0 (VCEK) or 1 (VLEK)", r.signer())
}
