// SPDX-License-Identifier: Apache-2.0

package sevsnp_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-sev-guest/abi"
	spb "github.com/google/go-sev-guest/proto/sevsnp"
	"github.com/google/go-sev-guest/validate"
	"github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/sevsnp"
)

// crlGetter answers every URL with the collateral's first revocation list.
type crlGetter struct{ in attest.Input }

func (g crlGetter) Get(string) ([]byte, error) {
	if g.in.Collateral == nil || len(g.in.Collateral.CRLs) == 0 {
		return nil, errors.New("no revocation list")
	}
	return g.in.Collateral.CRLs[0], nil
}

// witness asks google/go-sev-guest about the same input: verify, which does
// signatures, and validate, which compares. It is told to accept provisional
// firmware and whatever policy bits ours shows without judging. Its intermediates
// come from the caller's configuration, so that they are taken out of the evidence
// for it.
func witness(in attest.Input) error {
	if len(in.Evidence.Quote) != abi.ReportSize { // it takes longer input too
		return errors.New("wrong size")
	}
	report, err := abi.ReportToProto(in.Evidence.Quote)
	if err != nil {
		return err
	}
	chain := &spb.CertificateChain{}
	certs := trust.ProductCerts{}
	for _, c := range evidenceCerts(in) {
		switch cn := c.Subject.CommonName; {
		case cn == "SEV-VCEK":
			chain.VcekCert = c.Raw
		case cn == "SEV-VLEK":
			chain.VlekCert = c.Raw
		case strings.HasPrefix(cn, "SEV-VLEK-"):
			certs.Asvk = c
		case strings.HasPrefix(cn, "SEV-"):
			certs.Ask = c
		}
	}
	attestation := &spb.Attestation{Report: report, CertificateChain: chain}
	roots := map[string][]*trust.AMDRootCerts{"": nil} // never its own
	for _, r := range in.Roots {
		if r.TEE != dstack.SEVSNP {
			continue
		}
		for _, ca := range r.CA {
			line := strings.TrimPrefix(ca.Subject.CommonName, "ARK-")
			c := certs
			c.Ark = ca
			root := trust.AMDRootCertsProduct(line)
			root.ProductCerts = &c
			roots[line] = append(roots[line], root)
		}
	}
	if len(roots) == 1 {
		return errors.New("no roots")
	}
	opt := &verify.Options{
		DisableCertFetching: true, Now: in.At, TrustedRoots: roots,
		CheckRevocations: !in.Options.AllowMissingCRL, Getter: crlGetter{in},
	}
	if certs.Ask == nil && certs.Asvk == nil {
		return errors.New("no intermediate")
	}
	if certs.Ask == nil { // it dereferences both
		for _, list := range roots {
			for _, r := range list {
				r.ProductCerts.Ask = certs.Asvk
			}
		}
	}
	if err := verify.SnpAttestation(attestation, opt); err != nil {
		return err
	}
	vmpl := 0
	return validate.SnpAttestation(attestation, &validate.Options{
		GuestPolicy: abi.SnpPolicy{SMT: true, CXLAllowed: true, Debug: in.Options.AllowDebug, MigrateMA: in.Options.SNPAllowMigration},
		VMPL:        &vmpl, PermitProvisionalFirmware: true,
	})
}

// evidenceCerts reads all certificates of an input, whatever form they have, as
// far as the library can.
func evidenceCerts(in attest.Input) (certs []*x509.Certificate) {
	add := func(der []byte) {
		if c, err := x509.ParseCertificate(der); err == nil {
			certs = append(certs, c)
		}
	}
	for _, blob := range in.Evidence.CertChain {
		table := new(abi.CertTable)
		switch {
		case bytes.HasPrefix(blob, []byte("-----BEGIN")):
			for {
				var block *pem.Block
				if block, blob = pem.Decode(blob); block == nil {
					break
				}
				add(block.Bytes)
			}
		case len(blob) > 0 && blob[0] == 0x30:
			add(blob)
		case unmarshalTable(table, blob) == nil:
			for _, e := range table.Entries {
				add(bytes.TrimRight(e.RawCert, "\x00"))
			}
		}
	}
	if in.Collateral != nil {
		for _, der := range in.Collateral.Certificates {
			add(der)
		}
	}
	return certs
}

// unmarshalTable is the library's, which panics on a table whose entry ends beyond
// 4 GiB: it adds offset and length in 32 bits.
func unmarshalTable(table *abi.CertTable, data []byte) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return table.Unmarshal(data)
}

func TestGoSEVGuestAgreesOnRealReports(t *testing.T) {
	for _, c := range realCases(t) {
		in := c.input()
		in.Options.AllowDebug = true
		_, ours := sevsnp.Verify(in)
		if theirs := witness(in); ours != nil || theirs != nil {
			t.Errorf("%s: ours %v, theirs %v", c.name, ours, theirs)
		}
		// Any change of what is signed is refused by both.
		for off := 0; off < 0x2a0; off += 7 {
			in := c.input()
			changed := *c.evidence
			changed.Quote = bytes.Clone(changed.Quote)
			changed.Quote[off] ^= 0x10
			in.Evidence = &changed
			_, ours := sevsnp.Verify(in)
			if theirs := witness(in); ours == nil || theirs == nil {
				t.Errorf("%s, byte %#x: ours %v, theirs %v", c.name, off, ours, theirs)
			}
		}
	}
}

// theyAccept are inputs that ours refuses and go-sev-guest accepts, with the reason.
var theyAccept = map[string][]string{
	"it takes mitigation vectors in a report of any version": {
		"a mitigation vector in a report of version 3",
	},
	"it trusts the form of the intermediate, which its caller configures": {
		"an ASK of 2048 bits", "an ASK with a SHA-256 signature", "an ASK with a PKCS #1 v1.5 signature",
	},
	"it has no limits on collateral, which it fetches": {
		"65 certificates in the collateral",
	},
	"it looks only at the newest list, which it has just fetched, and not at its times, its issuer's name and its extensions": {
		"B02: the revocation list of another product line", // of the same test key
		"B02: an old revocation list", "B02: a revocation list of the future", "B02: a delta list",
		"B02: an ASK revoked in the older of two lists",
	},
	"it is given one intermediate, here the last": {
		"B15: the ASK behind seventeen impostors, for which nobody looks",
	},
	"it looks up the ASK only": {
		"B02: a revoked root",
	},
	"without leave to fetch lists it looks at none": {
		"B02: a revoked ASK, although lists may be missing",
		"B02: an old revocation list, although lists may be missing",
		"B02: an impostor's revocation list, although lists may be missing",
	},
	"it ignores the certificate's product name and structure version where the report tells the product": {
		"a certificate for another product", "a certificate for an unknown product",
		"a structure version of the future", "a product name with a control character",
	},
	"it compares the guest's policy with its caller's, never with the platform": {
		"a policy that demands a newer minor ABI", "a policy that demands a newer major ABI", "SMT against the policy",
		"power metering against the policy", "visible ciphertext against the policy",
	},
	"it looks at author and ID keys only where its caller requires them": {
		"an author key without its digest", "the digest of an author key that is not there", "an author key without an ID key",
	},
}

// theyRefuse are inputs that ours accepts and go-sev-guest refuses.
var theyRefuse = map[string][]string{
	"it knows one model of each product line": {
		"a Bergamo processor under Genoa's root",
	},
	"it looks at the first list that it gets": {
		"an impostor's list that revokes the ASK, beside a current one",
	},
}

func TestGoSEVGuestDiffersForKnownReasonsOnly(t *testing.T) {
	log.SetOutput(io.Discard)
	known := func(list map[string][]string, name string) bool {
		for _, names := range list {
			if slices.Contains(names, name) {
				return true
			}
		}
		return false
	}
	n := 0
	for _, m := range append(mutations(), variations()...) {
		if m.product == sevsnp.Turin {
			continue // see below
		}
		in := m.make(t)
		_, ours := sevsnp.Verify(in)
		theirs := witness(in)
		want := ours == nil
		if known(theyAccept, m.name) || known(theyRefuse, m.name) {
			want = !want
			n++
		}
		if (theirs == nil) != want {
			t.Errorf("%s: ours %v, theirs %v, expected to accept: %v", m.name, ours, theirs, want)
		}
	}
	total := 0
	for _, list := range []map[string][]string{theyAccept, theyRefuse} {
		for _, names := range list {
			total += len(names)
		}
	}
	if n != total {
		t.Errorf("%d of %d known differences were seen", n, total)
	}
}

// The library refuses every Turin certificate: it does not know the extension with
// FMC's security version, and wants the reserved one and a chip identity of 64 bytes.
func TestGoSEVGuestDoesNotKnowTurin(t *testing.T) {
	for _, vlek := range []bool{false, true} {
		in := mutation{product: sevsnp.Turin, vlek: vlek}.make(t)
		if _, err := sevsnp.Verify(in); err != nil {
			t.Error(err)
		}
		if err := witness(in); err == nil || !strings.Contains(err.Error(), "not an AMD KDS OID: 1.3.6.1.4.1.3704.1.3.9") {
			t.Errorf("VLEK %v: it says %v", vlek, err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	in := realCases(b)[0].input()
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := sevsnp.Verify(in); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-sev-guest", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := witness(in); err != nil {
				b.Fatal(err)
			}
		}
	})
}
