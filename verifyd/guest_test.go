// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifyd/imagecache"
	"github.com/dstack-go/dstack/verifyd/imagecache/imagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func ptr[T any](v T) *T { return &v }

// unreachable is a source of collateral that a test says will not be asked, or that
// has nothing.
type unreachable struct{ asked atomic.Int64 }

func (u *unreachable) Collateral(context.Context, collateral.Request) (*collateral.Bundle, error) {
	u.asked.Add(1)
	return nil, fmt.Errorf("the network is off")
}

// setup configures a service of a test: no network, caches of its own, the time of
// the simulated PKIs.
func setup(t testing.TB, dev *collateral.DevRoots, edit func(*Config, *Options)) *Service {
	t.Helper()
	dir := t.TempDir()
	c := DefaultConfig()
	c.ImageCacheDir = filepath.Join(dir, "cache")
	o := Options{Now: func() time.Time { return tdxtest.At }, Collateral: new(unreachable)}
	if dev != nil {
		data, err := dev.Bytes()
		check(t, err)
		c.Attestation.DevelopmentRoots = filepath.Join(dir, "roots.json")
		c.Attestation.InsecureAllowExternalTrustAnchors = true
		check(t, os.WriteFile(c.Attestation.DevelopmentRoots, data, 0o600))
	}
	if edit != nil {
		edit(&c, &o)
	}
	s, err := New(c, o)
	check(t, err)
	t.Cleanup(s.Close)
	return s
}

// guest is a simulated TD of a synthetic release.
type guest struct {
	t        testing.TB
	platform *tdxtest.Platform
	release  *imagetest.Release
	vm       measure.VMConfig
	body     tdx.ReportBody
	log      []eventlog.Event
}

const keyProviderPayload = `{"name":"kms","id":"3059"}`

// newGuest boots a release in the given form of attestation.
func newGuest(t testing.TB, r *imagetest.Release, lite bool) *guest {
	t.Helper()
	g := &guest{t: t, platform: tdxtest.New(t), release: r}
	g.vm = measure.VMConfig{
		OSImageHash: r.Hash.String(), CPUCount: 1, MemorySize: r.Launch.MemoryBytes, NumNICs: 1, QEMUVersion: "9.2.1", HostShareMode: "vhd",
	}
	if lite {
		g.vm.TDXVariant = "lite"
		g.vm.TDXMeasurement = &measure.Split{ChecksumFile: r.Sums, Measurement: r.TDX}
	}
	shape, err := g.vm.Shape()
	check(t, err)
	l := r.Launch
	l.ACPI = &shape
	m, err := measure.ComputeTDX(l)
	check(t, err)
	check(t, m.NoACPI)
	g.boot(m, runtimeLog(t))
	return g
}

func runtimeLog(t testing.TB) []eventlog.Event {
	compose := sha256.Sum256([]byte("compose"))
	var out []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, compose[:20]}, {eventlog.ComposeHashEvent, compose[:]},
		{eventlog.InstanceIDEvent, bytes.Repeat([]byte{0x15}, 20)}, {eventlog.BootMRDone, nil},
		{eventlog.KeyProvider, []byte(keyProviderPayload)}, {eventlog.StorageFS, []byte("ext4")}, {eventlog.SystemReady, nil},
		{"an-app-event", []byte("x")},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		check(t, err)
		out = append(out, ev)
	}
	return out
}

// boot sets the registers to those of a launch and a runtime log.
func (g *guest) boot(m *measure.TDX, runtime []eventlog.Event) {
	g.t.Helper()
	g.log = append(m.BootLog(), runtime...)
	g.body = g.platform.Body()
	g.body.MRTD = m.MRTD
	for imr := range uint32(4) {
		r, err := eventlog.Replay(g.log, imr)
		check(g.t, err)
		g.body.RTMR[imr] = r
	}
	copy(g.body.ReportData[:], "verifyd test")
}

func (g *guest) config() string {
	g.t.Helper()
	text, err := json.Marshal(g.vm)
	check(g.t, err)
	return string(text)
}

// evidence returns the evidence in a container.
func (g *guest) evidence() *attest.Evidence {
	return &attest.Evidence{
		TEE: dstack.TDX, Quote: g.platform.Quote(g.body), EventLog: g.log, Config: g.config(),
		ReportData: g.body.ReportData, ReportDataClaimed: true,
	}
}

func contain(t testing.TB, ev *attest.Evidence) *Request {
	t.Helper()
	raw, err := container.Encode(ev)
	check(t, err)
	return &Request{Attestation: ptr(hex.EncodeToString(raw))}
}

func (g *guest) attestation() *Request { return contain(g.t, g.evidence()) }

// raw returns the evidence as GetQuote gives it.
func (g *guest) raw() *Request {
	g.t.Helper()
	log, err := eventlog.MarshalJSON(g.log)
	check(g.t, err)
	return &Request{
		Quote: ptr(hex.EncodeToString(g.platform.Quote(g.body))), EventLog: ptr(string(log)), VMConfig: ptr(g.config()),
		ReportData: ptr(g.body.ReportData.String()),
	}
}

func (g *guest) roots() *collateral.DevRoots { return g.platform.DevRoots() }

// imageServer serves a release as upstream's server does.
func imageServer(t testing.TB, r *imagetest.Release) (template string, asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	archive := r.Archive(t)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked.Add(1)
		if q.URL.Path != "/mr_"+r.Hash.String()+".tar.gz" {
			http.NotFound(w, q)
			return
		}
		w.Write(archive)
	}))
	t.Cleanup(s.Close)
	return s.URL + "/mr_" + imagecache.Placeholder + ".tar.gz", asked
}

// realRequest reads a fixture.
func realRequest(t testing.TB, name string) *Request {
	t.Helper()
	data := testkit.Vectors(t, "attestation/"+name)
	r, _, err := ParseRequest(data)
	check(t, err)
	return r
}

// resigned returns the evidence of a real TD, of whose platform there is no
// collateral, with its report signed again by a simulated platform. The report, the
// log and the configuration are those of the hardware.
func resigned(t testing.TB, p *tdxtest.Platform, ev *attest.Evidence) {
	t.Helper()
	q, err := tdx.ParseQuote(ev.Quote)
	check(t, err)
	body := q.Body()
	sample := p.Body()
	// The module is the simulated platform's.
	body.TEETCBSVN, body.MRSEAM, body.SEAMAttributes, body.MRSignerSEAM = sample.TEETCBSVN, sample.MRSEAM, sample.SEAMAttributes, sample.MRSignerSEAM
	ev.Quote = p.Quote(body)
}

func show(r *Response) string {
	text, _ := json.MarshalIndent(r, "", "  ")
	return "\n" + string(text)
}

// valid demands is_valid with all that goes with it.
func valid(t testing.TB, r *Response) {
	t.Helper()
	d := r.Details
	if !r.IsValid || r.Reason != nil || !d.QuoteVerified || !d.OSImageHashVerified || d.AppInfo == nil || d.BootInfo == nil || r.Verdict == nil {
		t.Fatal(show(r))
	}
}

// invalid demands a reason that begins with prefix and holds text.
func invalid(t testing.TB, r *Response, prefix, text string) {
	t.Helper()
	if r.IsValid || r.Reason == nil || r.Details.BootInfo != nil || r.Verdict == nil || r.Verdict.Accepted ||
		len(*r.Reason) < len(prefix) || (*r.Reason)[:len(prefix)] != prefix || !bytes.Contains([]byte(*r.Reason), []byte(text)) {
		t.Errorf("want a reason %q … %q%s", prefix, text, show(r))
	}
}

func hasError(v *verifier.Verdict, code string) bool { return v.Has(verifier.Error, code) }
