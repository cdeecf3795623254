// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"encoding/hex"
	"os"
	"slices"
	"testing"

	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/internal/testkit"
)

func vendorPEM(t testing.TB) string {
	data, err := os.ReadFile("roots/google-ek-ak-root.pem")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestTheRealQuoteParses(t *testing.T) {
	a, err := tpm.ParseAttest(testkit.Vectors(t, "attestation/tpm/tpm_quote_sample.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(a.ExtraData) != "12345678" || len(a.Banks) != 1 || a.Banks[0].Hash != tpm.AlgSHA256 || !slices.Equal(a.Banks[0].PCRs, []uint32{0, 1, 2}) {
		t.Errorf("attest = %+v", a)
	}
	if len(a.QualifiedSigner) != 34 || len(a.PCRDigest) != 32 || a.PCRDigest[0] != 0xd8 || a.Clock != 0x054dd1ef || a.ResetCount != 16 || a.RestartCount != 0 || !a.Safe || a.FirmwareVersion != 0x2016051100162800 {
		t.Errorf("attest = %+v", a)
	}
}

func TestTheVendorsRootIsTheVectors(t *testing.T) {
	if got := string(testkit.Vectors(t, "attestation/roots/gcp-root-ca.pem")); got != vendorPEM(t) {
		t.Error("the embedded root differs from the vector")
	}
}
