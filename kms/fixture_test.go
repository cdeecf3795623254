// SPDX-License-Identifier: Apache-2.0

package kms

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/derive"
)

// Known is a KMS with the root keys of vectors/kms/derivations.json, and the guest whose
// keys are there, for tests from outside of the package.
type Known struct {
	Addr, Name string
	Now        func() time.Time
	Evidence   func(data []byte) []byte // of the guest, over 64 bytes
	Stranger   func(data []byte) []byte // of an app that nobody allows
	App        dstack.AppID
	Instance   dstack.InstanceID
	Image      dstack.ImageHash
	Version    string
}

// NewKnown starts it.
func NewKnown(t testing.TB) Known {
	t.Helper()
	var v struct {
		Inputs struct {
			App      dstack.AppID      `json:"app_id"`
			Instance dstack.InstanceID `json:"instance_id"`
			CA       string            `json:"root_ca_p256_scalar"`
			CASPKI   string            `json:"root_ca_spki_der"`
			K256     string            `json:"root_k256_scalar"`
			K256Pub  string            `json:"root_k256_pubkey_compressed"`
		} `json:"inputs"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	key, err := derive.P256FromScalar(unhex(v.Inputs.CA))
	if err != nil {
		t.Fatal(err)
	}
	text, err := derive.PEM(key)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := custody.Import(&kmsapi.KmsKeys{CaKey: string(text), K256Key: unhex(v.Inputs.K256)},
		custody.Identity{CA: unhex(v.Inputs.CASPKI), K256: unhex(v.Inputs.K256Pub)})
	if err != nil {
		t.Fatal(err)
	}
	const version = "v0.0.0 (git:test)"
	w := newWorldOf(t, roots, func(d *policy.Document) { d.Apps[0].AppID = v.Inputs.App }, func(c *Config) { c.Version = version })
	g := w.guest(v.Inputs.App, good)
	g.InstanceID = v.Inputs.Instance
	stranger := w.guest(appB, good)
	evidence := func(of interface {
		Attest(context.Context, dstack.ReportData) ([]byte, error)
	}) func([]byte) []byte {
		return func(data []byte) []byte {
			out, err := of.Attest(context.Background(), dstack.ReportData(data))
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
	}
	return Known{w.addr, "kms.test", w.clock, evidence(g), evidence(stranger), v.Inputs.App, v.Inputs.Instance, image, version}
}
