// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
)

// guest is a machine of the tests: everything that a real one measures, signs and
// serves. A test changes one thing and asks for the evidence; all signatures and
// replays around the change still hold, unless they are what it changes.
type guest struct {
	t        *testing.T
	platform *tdxtest.Platform
	launch   measure.Launch
	image    dstack.ImageHash

	manifest []byte
	app      dstack.AppID
	instance []byte
	provider string // key-provider payload

	spki  []byte // the system channel's key, which the connection of the test has
	nonce []byte

	tables   *dstack.Measurement // digest of ACPI tables that are not QEMU's; nil: they are
	document *mrconfig.Document  // committed at launch; nil: none
	carry    bool                // the document in vm_config
	edit     struct {            // last changes
		runtime   func([]eventlog.Event) []eventlog.Event // before RTMR3 is computed
		body      func(*tdx.ReportBody)                   // before the quote is signed
		evidence  func(*attest.Evidence)                  // after it
		source    func(*Source)
		vm        func(*measure.VMConfig)
		configure func(string) string
		envelope  func() dstack.ReportData
	}
}

var testTime = tdxtest.At

func newGuest(t *testing.T) *guest {
	t.Helper()
	off := false
	raw, err := manifest.Build(manifest.Draft{
		Name: "hello", DockerComposeFile: "services:\n  web:\n    image: hello:1\n", KeyProvider: "none", SecureTime: &off,
		ImagePolicy: manifest.ImagePolicyDigest, ImageLock: map[string]string{"hello:1": "sha256:" + hex.EncodeToString(bytes.Repeat([]byte{0xab}, 32))},
	})
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{
		t: t, platform: tdxtest.New(t), launch: measuretest.Launch(), image: dstack.ImageHash{0x1a, 0x2b},
		manifest: raw, instance: bytes.Repeat([]byte{0x15}, 20), provider: `{"name":"none","id":""}`,
		spki: []byte("the channel's subject public key info"), nonce: bytes.Repeat([]byte{7}, 32), carry: true,
	}
	hash := sha256.Sum256(raw)
	copy(g.app[:], hash[:])
	g.document = &mrconfig.Document{AppID: &g.app, ComposeHash: hash, KeyProvider: "none"}
	return g
}

func (g *guest) composeHash() dstack.ComposeHash { return sha256.Sum256(g.manifest) }

func (g *guest) check(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// runtime returns the events that init commits.
func (g *guest) runtime() []eventlog.Event {
	hash := g.composeHash()
	gpu := sha256.Sum256([]byte("{}"))
	key := sha256.Sum256(g.spki)
	var out []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, g.app[:]}, {eventlog.ComposeHashEvent, hash[:]},
		{eventlog.GPUPolicyHash, gpu[:]}, {eventlog.InstanceIDEvent, g.instance}, {eventlog.BootMRDone, nil},
		{eventlog.KeyProvider, []byte(g.provider)}, {eventlog.StorageFS, []byte("ext4")},
		{eventlog.SystemChannelKey, key[:]}, {eventlog.SystemReady, nil},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		g.check(err)
		out = append(out, ev)
	}
	if g.edit.runtime != nil {
		out = g.edit.runtime(out)
	}
	return out
}

// vm is the configuration that the host states.
func (g *guest) vm() measure.VMConfig {
	return measure.VMConfig{
		OSImageHash: g.image.String(), CPUCount: uint32(g.launch.VCPUs), MemorySize: g.launch.MemoryBytes,
		NumNICs: 1, QEMUVersion: "10.0.2", Endpoints: 6, HostShareMode: "vhd",
	}
}

// registers are those of the launch, ACPI tables of the stated shape included.
func (g *guest) registers() *measure.TDX {
	vm := g.vm()
	shape, err := vm.Shape()
	g.check(err)
	l := g.launch
	l.ACPI = &shape
	m, err := measure.ComputeTDX(l)
	g.check(err)
	g.check(m.NoACPI)
	if g.tables != nil {
		for i := range m.RTMR0 {
			if strings.HasPrefix(m.RTMR0[i].Name, "acpi-") {
				m.RTMR0[i].Digest = g.tables
			}
		}
	}
	return m
}

// expected are the registers that a lock knows: those of the image, without the
// ACPI tables, which depend on the host's QEMU.
func (g *guest) expected() *measure.TDX {
	m, err := measure.ComputeTDX(g.launch)
	g.check(err)
	return m
}

// evidence makes the quote and what goes with it.
func (g *guest) evidence() Source {
	g.t.Helper()
	m := g.registers()
	runtime := g.runtime()
	log := append(m.BootLog(), runtime...)
	body := g.platform.Body()
	body.MRTD = m.MRTD
	for imr := range uint32(4) {
		// A log that does not replay stands for one that was altered afterwards.
		r, err := eventlog.Replay(log, imr)
		if err != nil && imr != eventlog.RuntimeIMR {
			g.check(err)
		}
		body.RTMR[imr] = r
	}
	vm := g.vm()
	if g.document != nil {
		doc := g.document.Bytes()
		body.MRConfigID = mrconfig.IDv3(doc)
		if g.carry {
			vm.MRConfig = string(doc)
		}
	}
	if g.edit.vm != nil {
		g.edit.vm(&vm)
	}
	config, err := json.Marshal(vm)
	g.check(err)
	body.ReportData = binding.Envelope(g.nonce, g.spki, g.app, g.instance)
	if g.edit.envelope != nil {
		body.ReportData = g.edit.envelope()
	}
	if g.edit.body != nil {
		g.edit.body(&body)
	}
	ev := &attest.Evidence{TEE: dstack.TDX, Quote: g.platform.Quote(body), EventLog: log, Config: string(config), ReportData: body.ReportData}
	if g.edit.configure != nil {
		ev.Config = g.edit.configure(ev.Config)
	}
	if g.edit.evidence != nil {
		g.edit.evidence(ev)
	}
	raw, err := container.EncodeV1(ev)
	g.check(err)
	src := Source{Version: 1, Container: raw, Manifest: string(g.manifest), Nonce: g.nonce, ServedSPKIs: [][]byte{g.spki}}
	if g.edit.source != nil {
		g.edit.source(&src)
	}
	return src
}

// request is what the caller brings to one appraisal.
type request struct {
	roots   []attest.Roots
	col     *collateral.Bundle
	ref     Reference
	gateway Reference
	pol     Policy
	fresh   Freshness
	gov     *Governance
	at      time.Time
}

// request returns that of a caller who expects exactly this guest.
func (g *guest) request() *request {
	col := g.platform.Collateral()
	r := &request{
		roots: []attest.Roots{g.platform.Roots(), tdx.VendorRoots()}, col: &collateral.Bundle{TDX: col}, at: testTime,
		pol:   Policy{TCB: TCBPolicy{Accept: []string{"UpToDate"}}, DevRoots: true},
		fresh: Freshness{Nonce: bytes.Clone(g.nonce), ConnectionSPKI: bytes.Clone(g.spki)},
	}
	r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
	r.ref.AddAppID(g.app, "--app-id")
	r.ref.AddImage(g.image, g.expected(), "--image")
	return r
}

func (r *request) appraise(src Source) *Verdict {
	return Appraise(Request{Source: src, Roots: r.roots, Collateral: r.col, Reference: r.ref, Gateway: r.gateway, Policy: r.pol, Freshness: r.fresh, Governance: r.gov, At: r.at})
}

func (v *Verdict) errors() []string {
	var out []string
	for _, f := range v.Findings {
		if f.Level == Error {
			out = append(out, f.Code)
		}
	}
	return out
}

func event(t *testing.T, name string, payload []byte) eventlog.Event {
	t.Helper()
	e, err := eventlog.RuntimeV1(name, payload)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func show(v *Verdict) string { return fmt.Sprintf("\n%s", v) }
