// SPDX-License-Identifier: Apache-2.0

package applicant

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/internal/fault"
)

func fixture(t testing.TB) (*Judge, *tdxtest.Guest) {
	p := tdxtest.New(t)
	g := &tdxtest.Guest{
		Platform: p, AppID: dstack.AppID{0xa}, InstanceID: dstack.InstanceID{1}, ComposeHash: dstack.ComposeHash{0xc0}, Booting: true,
	}
	return &Judge{
		Roots: []attest.Roots{p.Roots()}, Development: true, Now: func() time.Time { return tdxtest.At },
		Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: p.Collateral()}},
	}, g
}

var data = dstack.ReportData{1, 2, 3}

func TestAGuestThatBootsBecomesARequest(t *testing.T) {
	j, g := fixture(t)
	raw, err := g.Attest(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	image := dstack.ImageHash{9}
	a, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data, Session: true, VMConfig: `{"os_image_hash":"` + image.String() + `"}`})
	if err != nil {
		t.Fatal(err)
	}
	b := a.Request.Boot
	if b.TEEVariant != "dstack-tdx" || b.AppID != g.AppID || b.ComposeHash != g.ComposeHash || !bytes.Equal(b.InstanceID, g.InstanceID[:]) ||
		b.TCBStatus != "UpToDate" || b.DeviceID == (dstack.DeviceID{}) || !bytes.Equal(b.OSImageHash, image[:]) || len(b.KeyProviderInfo) != 0 {
		t.Errorf("boot info %+v", b)
	}
	if a.Request.ImageBound {
		t.Error("an image that the guest merely names is bound")
	}
	if a.Request.Trust != dstack.TrustDevelopment || !a.Request.Session || !a.Request.At.Equal(tdxtest.At) || !a.Booting || a.Digest != sha256.Sum256(raw) {
		t.Errorf("request %+v", a.Request)
	}
	if got := a.Request.Launch["mrtd"]; len(got) != dstack.MeasurementSize || len(a.Request.Launch["rtmr2"]) != dstack.MeasurementSize {
		t.Errorf("launch registers %v", a.Request.Launch)
	}
	// The aggregate of a guest that boots is over what was measured so far.
	again, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data, BootTime: true})
	if err != nil {
		t.Fatal(err)
	}
	if again.Request.Boot.MRAggregated != b.MRAggregated || again.Request.Session {
		t.Error("the boot-time identity of a guest that boots is another")
	}
}

func TestARunningGuestIsKnownByAllThatItMeasured(t *testing.T) {
	j, g := fixture(t)
	g.Booting, g.Provider, g.ChannelSPKI = false, []byte(`{"name":"kms","id":"aa"}`), []byte("key")
	raw, err := g.Attest(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	now, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data})
	if err != nil {
		t.Fatal(err)
	}
	boot, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data, BootTime: true})
	if err != nil {
		t.Fatal(err)
	}
	if now.Booting || boot.Booting || string(now.Request.Boot.KeyProviderInfo) != string(g.Provider) || len(boot.Request.Boot.KeyProviderInfo) != 0 ||
		now.Request.Boot.MRAggregated == boot.Request.Boot.MRAggregated || now.Request.Boot.MRSystem == boot.Request.Boot.MRSystem {
		t.Errorf("now %+v\nat boot %+v", now.Request.Boot, boot.Request.Boot)
	}
	if sum := sha256.Sum256(g.ChannelSPKI); !bytes.Equal(now.ChannelKey, sum[:]) {
		t.Errorf("channel key %x", now.ChannelKey)
	}
}

// Evidence that does not hold is no request for anyone to decide on.
func TestEvidenceThatDoesNotHold(t *testing.T) {
	other := tdxtest.New(t)
	for _, c := range []struct {
		name string
		edit func(*Judge, *tdxtest.Guest, *Evidence)
		code string
	}{
		{"over other data", func(_ *Judge, _ *tdxtest.Guest, e *Evidence) { e.ReportData[0] ^= 1 }, "report_data_mismatch"},
		{"of a machine whose vendor is not trusted", func(j *Judge, _ *tdxtest.Guest, _ *Evidence) { j.Roots = []attest.Roots{other.Roots()} }, "unknown_root"},
		{"of a development machine, in production", func(j *Judge, _ *tdxtest.Guest, _ *Evidence) { j.Development = false }, "no_roots"},
		{"with a judge that trusts nobody", func(j *Judge, _ *tdxtest.Guest, _ *Evidence) { *j = Judge{Collateral: j.Collateral, Now: j.Now} }, "no_roots"},
		{"without collateral", func(j *Judge, _ *tdxtest.Guest, _ *Evidence) { j.Collateral = nil }, "collateral_unavailable"},
		{"whose collateral is over", func(j *Judge, _ *tdxtest.Guest, _ *Evidence) {
			j.Now = func() time.Time { return tdxtest.NextUpdate.Add(time.Hour) }
		}, "crl_expired"},
		{"with a log that replays to something else", func(_ *Judge, _ *tdxtest.Guest, e *Evidence) {
			ev, err := container.Decode(e.Container)
			if err != nil {
				t.Fatal(err)
			}
			for i := range ev.EventLog {
				if ev.EventLog[i].Name == eventlog.ComposeHashEvent {
					ev.EventLog[i].Payload = make([]byte, 32)
					ev.EventLog[i].Digest = nil
				}
			}
			if e.Container, err = container.EncodeV1(ev); err != nil {
				t.Fatal(err)
			}
		}, "log_replay_mismatch"},
		{"that is no container", func(_ *Judge, _ *tdxtest.Guest, e *Evidence) { e.Container = []byte("x") }, "container_version"},
		{"with a vm_config that is none", func(_ *Judge, _ *tdxtest.Guest, e *Evidence) { e.VMConfig = "[]" }, "vm_config_malformed"},
		{"with an image hash of another length", func(_ *Judge, _ *tdxtest.Guest, e *Evidence) { e.VMConfig = `{"os_image_hash":"aa"}` }, "vm_config_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			j, g := fixture(t)
			raw, err := g.Attest(t.Context(), data)
			if err != nil {
				t.Fatal(err)
			}
			e := Evidence{Container: raw, ReportData: data}
			c.edit(j, g, &e)
			a, err := j.Judge(t.Context(), e)
			if a != nil || fault.Code(err) != c.code {
				t.Errorf("want %s, got %q: %v", c.code, fault.Code(err), err)
			}
		})
	}
	t.Run("of a debug machine", func(t *testing.T) {
		j, g := fixture(t)
		g.Edit = func(b *tdx.ReportBody) { b.TDAttributes[0] |= 1 }
		raw, err := g.Attest(t.Context(), data)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data}); a != nil || fault.Code(err) != "td_debug" {
			t.Errorf("got %q: %v", fault.Code(err), err)
		}
	})
}

// What a machine's host claims of its image decides nothing unless the registers agree.
func TestBootInfoIsUpstreams(t *testing.T) {
	j, g := fixture(t)
	raw, err := g.Attest(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	a, err := j.Judge(t.Context(), Evidence{Container: raw, ReportData: data})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(a.Request.Boot)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	want := []string{"teeVariant", "mrAggregated", "osImageHash", "mrSystem", "appId", "composeHash", "instanceId", "deviceId", "keyProviderInfo", "tcbStatus", "advisoryIds"}
	if len(m) != len(want) || slices.ContainsFunc(want, func(k string) bool { _, ok := m[k]; return !ok }) || m["appId"] != hex.EncodeToString(g.AppID[:]) {
		t.Errorf("%s", text)
	}
}

// What the host committed to before launch is held against what the guest would get
// here: this KMS, pinned or not.
func TestThreat_C02_ALaunchForAnotherKMSIsRefused(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		kind     string
		id       []byte
		carried  bool
		provider []byte
		code     string
	}{
		{"this KMS, pinned", "kms", spki, false, spki, ""},
		{"this KMS, pinned, in a document that is carried", "kms", spki, true, spki, ""},
		{"any KMS", "kms", nil, false, spki, ""},
		{"another KMS", "kms", []byte("another"), false, spki, "mr_config_mismatch"},
		{"another KMS, carried", "kms", []byte("another"), true, spki, "mr_config_mismatch"},
		{"no KMS", "none", nil, true, spki, "mr_config_mismatch"},
	} {
		t.Run(c.name, func(t *testing.T) {
			j, g := fixture(t)
			j.Provider = c.provider
			doc := mrconfig.Document{AppID: &g.AppID, ComposeHash: g.ComposeHash, KeyProvider: c.kind, KeyProviderID: c.id}
			g.Edit = func(b *tdx.ReportBody) { b.MRConfigID = mrconfig.IDv3(doc.Bytes()) }
			if c.carried {
				config, err := json.Marshal(map[string]string{"mr_config": string(doc.Bytes())})
				if err != nil {
					t.Fatal(err)
				}
				g.Config = string(config)
			}
			raw, err := g.Attest(t.Context(), data)
			if err != nil {
				t.Fatal(err)
			}
			_, err = j.Judge(t.Context(), Evidence{Container: raw, ReportData: data})
			if fault.Code(err) != c.code || (err == nil) != (c.code == "") {
				t.Errorf("want %q, got %q: %v", c.code, fault.Code(err), err)
			}
		})
	}
}

// Statements older than the newest that verified count no more, although they are valid
// yet.
func TestThreat_B03_AKMSRemembersTheNewestStatements(t *testing.T) {
	j, g := fixture(t)
	roots := g.Platform.Roots()
	roots.Trust = dstack.TrustProduction // floors are of vendors' statements
	j.Roots, j.Development = []attest.Roots{roots}, false
	var err error
	if j.Floor, err = floor.Open(filepath.Join(t.TempDir(), "floor")); err != nil {
		t.Fatal(err)
	}
	raw, err := g.Attest(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	e := Evidence{Container: raw, ReportData: data}
	a, err := j.Judge(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	n, err := j.Floor.Floor(a.Claims.Product)
	if err != nil || n != uint64(a.Claims.TCBEvaluation) || n == 0 {
		t.Fatalf("remembered %d of %d: %v", n, a.Claims.TCBEvaluation, err)
	}
	if err := j.Floor.Raise(t.Context(), a.Claims.Product, n+1); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Judge(t.Context(), e); fault.Code(err) != "collateral_rollback" {
		t.Errorf("an older statement: %v", err)
	}
}
