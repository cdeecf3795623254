// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
)

func TestWithoutAProviderEveryBootHasItsOwnKeys(t *testing.T) {
	var seen [][]byte
	for range 2 {
		g, err := None{Attester: newGuest(t)}.Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		k := g.Keys
		if g.Created || g.Unpinned || g.OSImageHash != nil || k.Provider.Kind != keys.None || !k.Env.IsZero() || len(k.AppSignature) > 0 || k.GatewayAppID != "" {
			t.Errorf("%+v", g)
		}
		for _, s := range seen {
			if bytes.Equal(s, k.Disk.Bytes()) {
				t.Error("the same keys twice")
			}
		}
		seen = append(seen, bytes.Clone(k.Disk.Bytes()))
		root, err := certificate.Open([]byte(k.CACert), k.Provider.CAKey)
		if err != nil {
			t.Fatal(err)
		}
		if c := root.Certificate; c.Subject.CommonName != "App Root Cert" || !c.IsCA || c.MaxPathLen != 1 {
			t.Errorf("the root certificate is %+v", c.Subject)
		}
		if a, err := ratls.FromCertificate(root.Certificate); err != nil || a.Evidence.ReportData != a.ReportData {
			t.Errorf("evidence of the root: %v", err)
		}
		file, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := keys.Parse(file); err != nil {
			t.Error(err)
		}
	}
}

func TestKeysOfASeedAreUpstreams(t *testing.T) {
	var v struct {
		Seed map[string]string `json:"seed_provider_derivations"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	raw, _ := hex.DecodeString(v.Seed["seed"])
	seed, err := keys.NewSeed(raw)
	if err != nil {
		t.Fatal(err)
	}
	k, err := seeded(t.Context(), seed, keys.Provider{Kind: keys.TPM}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for field, got := range map[string][]byte{"disk_crypt_key": k.Disk.Bytes(), "k256_key": k.App.Bytes(), "app_root_spki_der": k.Provider.SPKI} {
		if hex.EncodeToString(got) != v.Seed[field] {
			t.Errorf("%s = %x, want %s", field, got, v.Seed[field])
		}
	}
	if !seed.IsZero() {
		t.Error("the seed is still there")
	}
}

type noEvidence struct{}

func (noEvidence) Attest(context.Context, dstack.ReportData) ([]byte, error) {
	return nil, errors.New("no TEE")
}

func TestWithoutEvidenceThereAreNoKeys(t *testing.T) {
	_, err := None{Attester: noEvidence{}}.Keys(t.Context())
	wantCode(t, err, "key_evidence")
	s := startKMS(t, kmstest.Options{})
	k := client(t, s.SPKI(), s.URL)
	for _, a := range []interface {
		Attest(context.Context, dstack.ReportData) ([]byte, error)
	}{noEvidence{}, nil} {
		k.Attester = a
		_, err = ask(t, k)
		wantCode(t, err, "key_evidence")
	}
}

// Threat E06: a key that the KMS gave shows in no error and no printed value.
func TestThreat_E06_NoProviderPrintsKeys(t *testing.T) {
	const canary = "c0ffee11c0ffee11c0ffee11c0ffee11c0ffee11c0ffee11c0ffee11c0ffee11"
	raw, _ := hex.DecodeString(canary)
	shown := func(s string) bool {
		return strings.Contains(s, canary[:16]) || strings.Contains(s, string(raw[:8])) || strings.Contains(s, "192 255 238 17")
	}
	s := startKMS(t, kmstest.Options{Answer: answerKeys(raw, 32)})
	g, err := ask(t, client(t, s.SPKI(), s.URL))
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%v %+v %#v %x", g, g.Keys, g.Keys, g.Keys.Disk); shown(text) {
		t.Errorf("printed: %s", text)
	}
	g.Keys.Wipe()
	if !g.Keys.Disk.IsZero() || !g.Keys.Env.IsZero() {
		t.Error("Wipe left a key")
	}
	s = startKMS(t, kmstest.Options{Answer: answerKeys(raw, 31)})
	_, err = ask(t, client(t, s.SPKI(), s.URL))
	wantCode(t, err, "kms_reply")
	if shown(err.Error()) {
		t.Errorf("the error shows it: %v", err)
	}
}
