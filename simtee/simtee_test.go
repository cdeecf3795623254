// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	gotdx "github.com/google/go-tdx-guest/verify"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/collect/sim"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
)

// testPKI is shared: making keys is what takes time.
var testPKI = sync.OnceValue(func() *PKI {
	p, err := NewPKI(time.Now())
	if err != nil {
		panic(err)
	}
	return p
})

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want code %s", code)
	}
	if fault.Code(err) != code {
		t.Fatalf("error %q has code %q, want %q", err, fault.Code(err), code)
	}
}

// testSpec writes boot files and returns the launch that names them.
func testSpec(t *testing.T) LaunchSpec {
	t.Helper()
	dir := t.TempDir()
	l := measuretest.Launch()
	spec := LaunchSpec{
		Firmware: filepath.Join(dir, "fw"), Kernel: filepath.Join(dir, "k"), Initrd: filepath.Join(dir, "i"),
		Cmdline: l.Cmdline, VCPUs: l.VCPUs, MemoryBytes: l.MemoryBytes, MRConfigID: dstack.MRConfigID{3, 1, 4},
	}
	for path, data := range map[string][]byte{spec.Firmware: l.Firmware, spec.Kernel: l.Kernel, spec.Initrd: l.Initrd} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

func openMachine(t *testing.T, spec LaunchSpec, dir string) *Machine {
	t.Helper()
	m, err := Open(testPKI(), spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func expected(t *testing.T) (mrtd dstack.Measurement, rtmr [4]dstack.Measurement) {
	t.Helper()
	x, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	for imr := range uint32(3) {
		if rtmr[imr], err = eventlog.Replay(x.BootLog(), imr); err != nil {
			t.Fatal(err)
		}
	}
	return x.MRTD, rtmr
}

// getter serves the collateral of a PKI where go-tdx-guest looks for Intel's.
type getter struct{ roots *collateral.DevRoots }

func (g getter) Get(address string) (map[string][]string, []byte, error) {
	c := g.roots.TDX
	header := func(name, chain string) map[string][]string {
		return map[string][]string{http.CanonicalHeaderKey(name): {url.QueryEscape(chain)}}
	}
	body := func(name, raw string, signature []byte) []byte {
		return fmt.Appendf(nil, `{%q:%s,"signature":"%x"}`, name, raw, signature)
	}
	switch {
	case strings.Contains(address, "/tdx/certification/v4/tcb?"):
		return header("TCB-Info-Issuer-Chain", c.TCBInfoIssuerChain), body("tcbInfo", c.TCBInfo, c.TCBInfoSignature), nil
	case strings.Contains(address, "/tdx/certification/v4/qe/identity"):
		return header("SGX-Enclave-Identity-Issuer-Chain", c.QEIdentityIssuerChain), body("enclaveIdentity", c.QEIdentity, c.QEIdentitySignature), nil
	case strings.Contains(address, "/pckcrl?ca=platform"):
		return header("SGX-PCK-CRL-Issuer-Chain", c.PCKCRLIssuerChain), c.PCKCRL, nil
	case address == rootCRLURL:
		return nil, c.RootCACRL, nil
	}
	return nil, nil, fmt.Errorf("unexpected request for %s", address)
}

func goTDXOptions(roots *collateral.DevRoots) *gotdx.Options {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(roots.TDXRootPEM))
	return &gotdx.Options{CheckRevocations: true, GetCollateral: true, Getter: getter{roots}, TrustedRoots: pool}
}

func TestGoTDXGuestAcceptsQuotes(t *testing.T) {
	quote, err := testPKI().Quote(Body{ReportData: dstack.ReportData{1, 2, 3}})
	if err != nil {
		t.Fatal(err)
	}
	roots := testPKI().DevRoots()
	if err := gotdx.RawTdxQuote(quote, goTDXOptions(roots)); err != nil {
		t.Fatalf("google/go-tdx-guest refuses the quote: %v", err)
	}
	t.Run("but not under Intel's root", func(t *testing.T) {
		options := goTDXOptions(roots)
		options.TrustedRoots = nil
		if err := gotdx.RawTdxQuote(quote, options); err == nil {
			t.Fatal("accepted")
		}
	})
	t.Run("nor under the root of another installation", func(t *testing.T) {
		other, err := NewPKI(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		options := goTDXOptions(roots)
		options.TrustedRoots = goTDXOptions(other.DevRoots()).TrustedRoots
		if err := gotdx.RawTdxQuote(quote, options); err == nil {
			t.Fatal("accepted")
		}
	})
	t.Run("nor with a register changed", func(t *testing.T) {
		changed := bytes.Clone(quote)
		changed[520] ^= 1
		if err := gotdx.RawTdxQuote(changed, goTDXOptions(roots)); err == nil {
			t.Fatal("accepted")
		}
	})
}

func ourRoots(t *testing.T, roots *collateral.DevRoots) []attest.Roots {
	t.Helper()
	block, _ := pem.Decode([]byte(roots.TDXRootPEM))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return []attest.Roots{{TEE: dstack.TDX, CA: []*x509.Certificate{cert}, Trust: dstack.TrustDevelopment}}
}

func TestOurVerifierAcceptsQuotes(t *testing.T) {
	spec := testSpec(t)
	m := openMachine(t, spec, t.TempDir())
	if err := m.Extend(3, dstack.Measurement{9}); err != nil {
		t.Fatal(err)
	}
	data := dstack.ReportData{0xaa}
	quote, err := m.Quote(data)
	if err != nil {
		t.Fatal(err)
	}
	roots := testPKI().DevRoots()
	claims, err := tdxtest.Verify(quote, roots.TDX, ourRoots(t, roots), time.Now())
	if fault.Code(err) == "not_implemented" {
		t.Skip("SKIP: attest/tdx cannot verify yet")
	}
	if err != nil {
		t.Fatal(err)
	}
	mrtd, rtmr := expected(t)
	rtmr[3] = eventlog.Extend(dstack.Measurement{}, dstack.Measurement{9})
	if claims.TDX.MRTD != mrtd || claims.TDX.RTMR != rtmr || claims.TDX.MRConfigID != spec.MRConfigID || !bytes.Equal(claims.ReportData, data[:]) {
		t.Errorf("claims %+v", claims)
	}
	if claims.Trust != dstack.TrustDevelopment || claims.TCBStatus != "UpToDate" || len(claims.Advisories) != 0 || claims.Debug {
		t.Errorf("claims %+v", claims)
	}
	t.Run("but not those of a debuggable VM", func(t *testing.T) {
		debug, err := testPKI().Quote(Body{Debug: true})
		if err != nil {
			t.Fatal(err)
		}
		_, err = tdxtest.Verify(debug, roots.TDX, ourRoots(t, roots), time.Now())
		wantCode(t, err, "td_debug")
	})
	t.Run("nor under the vendor's root", func(t *testing.T) {
		if _, err := tdxtest.Verify(quote, roots.TDX, []attest.Roots{tdx.VendorRoots()}, time.Now()); err == nil {
			t.Fatal("accepted")
		}
	})
	t.Run("nor after the collateral expired", func(t *testing.T) {
		if _, err := tdxtest.Verify(quote, roots.TDX, ourRoots(t, roots), time.Now().Add(366*24*time.Hour)); err == nil {
			t.Fatal("accepted")
		}
	})
}

func TestQuoteParses(t *testing.T) {
	raw, err := testPKI().Quote(Body{MRConfigID: dstack.MRConfigID{7}, RTMR: [4]dstack.Measurement{{1}, {2}, {3}, {4}}})
	if err != nil {
		t.Fatal(err)
	}
	q, err := tdx.ParseQuote(raw)
	if err != nil {
		t.Fatal(err)
	}
	b := q.Body()
	if b.RTMR != [4]dstack.Measurement{{1}, {2}, {3}, {4}} || b.MRConfigID != (dstack.MRConfigID{7}) || b.TDAttributes != [8]byte{3: 0x10} {
		t.Fatalf("body %+v", b)
	}
}

func TestLaunchRegistersAreThoseOfTheFiles(t *testing.T) {
	m := openMachine(t, testSpec(t), t.TempDir())
	mrtd, rtmr, err := m.Registers()
	if err != nil {
		t.Fatal(err)
	}
	wantMRTD, wantRTMR := expected(t)
	if mrtd != wantMRTD || rtmr != wantRTMR {
		t.Fatalf("registers %s %s", mrtd, rtmr)
	}
	for imr := range uint32(3) {
		if got, err := eventlog.Replay(m.BootLog(), imr); err != nil || got != rtmr[imr] {
			t.Errorf("boot log replays register %d to %s, %v", imr, got, err)
		}
	}
}

func TestOnlyRegisters2And3CanBeExtended(t *testing.T) {
	m := openMachine(t, testSpec(t), t.TempDir())
	_, before, _ := m.Registers()
	for _, register := range []int{-1, 0, 1, 4, 1 << 40} {
		wantCode(t, m.Extend(register, dstack.Measurement{1}), "register_not_extendable")
	}
	if _, after, _ := m.Registers(); after != before {
		t.Fatal("a refused extend changed a register")
	}
	for _, register := range []int{2, 3} {
		if err := m.Extend(register, dstack.Measurement{1}); err != nil {
			t.Fatal(err)
		}
	}
	_, after, _ := m.Registers()
	for i := range after {
		want := before[i]
		if i >= 2 {
			want = eventlog.Extend(want, dstack.Measurement{1})
		}
		if after[i] != want {
			t.Errorf("register %d is %s, want %s", i, after[i], want)
		}
	}
}

func TestRestartResumes(t *testing.T) {
	spec, dir := testSpec(t), t.TempDir()
	m := openMachine(t, spec, dir)
	for i := range byte(5) {
		if err := m.Extend(3, dstack.Measurement{i}); err != nil {
			t.Fatal(err)
		}
	}
	_, before, _ := m.Registers()
	m.Close()
	// What was measured is what the VM was started with, not what lies there now.
	if err := os.WriteFile(spec.Kernel, []byte("replaced"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := openMachine(t, spec, dir)
	if _, after, _ := again.Registers(); after != before {
		t.Fatalf("registers %s, were %s", after, before)
	}
	if len(again.BootLog()) == 0 {
		t.Fatal("boot log is lost")
	}
	again.Close()

	t.Run("but not another launch", func(t *testing.T) {
		for _, change := range []func(*LaunchSpec){
			func(s *LaunchSpec) { s.Cmdline += " x" },
			func(s *LaunchSpec) { s.MRConfigID[5]++ },
			func(s *LaunchSpec) { s.Debug = true },
			func(s *LaunchSpec) { s.MemoryBytes *= 2 },
		} {
			other := spec
			change(&other)
			_, err := Open(testPKI(), other, dir)
			wantCode(t, err, "state_other_launch")
		}
	})
}

func TestDamagedStateIsRefused(t *testing.T) {
	spec := testSpec(t)
	good := t.TempDir()
	m := openMachine(t, spec, good)
	if err := m.Extend(3, dstack.Measurement{1}); err != nil {
		t.Fatal(err)
	}
	m.Close()
	text, err := os.ReadFile(filepath.Join(good, StateFile))
	if err != nil {
		t.Fatal(err)
	}
	resealed := func(change func(*state)) []byte {
		s, err := parseState(text)
		if err != nil {
			t.Fatal(err)
		}
		change(&s)
		out, err := s.marshal()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for name, damage := range map[string][]byte{
		"empty":                      {},
		"cut short":                  text[:len(text)/2],
		"zeroed":                     make([]byte, len(text)),
		"one digit changed":          bytes.Replace(text, []byte(`"extends":1`), []byte(`"extends":2`), 1),
		"a field nobody knows":       bytes.Replace(text, []byte(`{"state"`), []byte(`{"more":1,"state"`), 1),
		"another version":            resealed(func(s *state) { s.Version = 2 }),
		"a launch register changed":  resealed(func(s *state) { s.RTMR[1][0] ^= 1 }),
		"a boot event changed":       resealed(func(s *state) { s.BootLog[0].Digest = make([]byte, 48) }),
		"no boot log":                resealed(func(s *state) { s.BootLog = nil }),
		"larger than any state file": bytes.Repeat([]byte{' '}, maxStateFile+1),
	} {
		t.Run(name, func(t *testing.T) {
			if bytes.Equal(damage, text) {
				t.Fatal("nothing was damaged")
			}
			dir := t.TempDir()
			path := filepath.Join(dir, StateFile)
			if err := os.WriteFile(path, damage, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(testPKI(), spec, dir)
			wantCode(t, err, "state_damaged")
			if left, _ := os.ReadFile(path); !bytes.Equal(left, damage) {
				t.Error("the damaged state was overwritten")
			}
		})
	}
}

func TestOneProcessPerState(t *testing.T) {
	spec, dir := testSpec(t), t.TempDir()
	m := openMachine(t, spec, dir)
	_, err := Open(testPKI(), spec, dir)
	wantCode(t, err, "state_locked")
	m.Close()
	openMachine(t, spec, dir)
}

func TestFailedWriteStopsTheMachine(t *testing.T) {
	dir := t.TempDir()
	m := openMachine(t, testSpec(t), dir)
	m.path = filepath.Join(dir, "gone", StateFile)
	wantCode(t, m.Extend(3, dstack.Measurement{1}), "state_unknown")
	_, err := m.Quote(dstack.ReportData{})
	wantCode(t, err, "state_unknown")
	wantCode(t, m.Extend(3, dstack.Measurement{1}), "state_unknown")
}

func TestLaunchRefuses(t *testing.T) {
	spec := testSpec(t)
	missing := spec
	missing.Initrd += "x"
	_, err := Open(testPKI(), missing, t.TempDir())
	wantCode(t, err, "launch_file")
	device := spec
	device.Initrd = "/dev/zero"
	_, err = Open(testPKI(), device, t.TempDir())
	wantCode(t, err, "launch_file")
	swapped := spec
	swapped.Firmware = spec.Initrd
	dir := t.TempDir()
	_, err = Open(testPKI(), swapped, dir)
	wantCode(t, err, "firmware_not_tdvf")
	if _, err := os.Stat(filepath.Join(dir, StateFile)); err == nil {
		t.Error("a refused launch left registers behind")
	}
	// and the lock is free again
	openMachine(t, spec, dir)
}

func TestParseLaunchSpec(t *testing.T) {
	id := strings.Repeat("0", 96)
	good := `{"firmware":"f","kernel":"k","initrd":"i","cmdline":"c","vcpus":1,"memory_bytes":1,"mr_config_id":"` + id + `","debug":false}`
	if _, err := ParseLaunchSpec([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"nothing":               ``,
		"no kernel":             strings.Replace(good, `"k"`, `""`, 1),
		"no vCPU":               strings.Replace(good, `"vcpus":1`, `"vcpus":0`, 1),
		"an unknown field":      strings.Replace(good, `"debug"`, `"debugger"`, 1),
		"a field twice":         strings.Replace(good, `"debug":false`, `"debug":false,"debug":true`, 1),
		"a short mr config id":  strings.Replace(good, id, id[2:], 1),
		"negative memory":       strings.Replace(good, `"memory_bytes":1`, `"memory_bytes":-1`, 1),
		"something after it":    good + "{}",
		"an array in its place": "[" + good + "]",
	} {
		if _, err := ParseLaunchSpec([]byte(text)); fault.Code(err) != "launch_malformed" {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// serve runs a server on a socket and returns the collect.Env of a guest.
func serve(t *testing.T, m *Machine) (collect.Env, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tee.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- NewServer(m).Serve(l, stop) }()
	t.Cleanup(func() {
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket is left behind")
		}
	})
	return collect.Env{Dial: func(ctx context.Context, stream string) (net.Conn, error) {
		if stream != "tee" {
			return nil, fmt.Errorf("no stream %s", stream)
		}
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}, path
}

// A TEE without a machine has registers of zeros, and what it is extended with.
func TestNoMachine(t *testing.T) {
	spec, err := ParseLaunchSpec([]byte(`{"no_machine":true}`))
	if err != nil {
		t.Fatal(err)
	}
	pki, err := NewPKI(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m, err := Open(pki, spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	mrtd, rtmr, err := m.Registers()
	if err != nil || !mrtd.IsZero() || rtmr != [4]dstack.Measurement{} || len(m.BootLog()) != 0 {
		t.Errorf("it begins with %s, %s and %d events, %v", mrtd, rtmr, len(m.BootLog()), err)
	}
	if err := m.Extend(3, dstack.Measurement{1}); err != nil {
		t.Fatal(err)
	}
	m.Close()
	again, err := Open(pki, spec, dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, rtmr, _ := again.Registers(); rtmr[3].IsZero() {
		t.Error("the register is lost")
	}
	for _, text := range []string{`{"no_machine":true,"firmware":"f"}`, `{"no_machine":true,"vcpus":1}`, `{"no_machine":true,"debug":true}`, `{"no_machine":false}`} {
		if _, err := ParseLaunchSpec([]byte(text)); fault.Code(err) != "launch_malformed" {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestGuestReachesTheTEE(t *testing.T) {
	m := openMachine(t, testSpec(t), t.TempDir())
	env, path := serve(t, m)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, %v", info.Mode(), err)
	}
	tee, err := collect.Open(t.Context(), env, []collect.Driver{sim.Driver()})
	if err != nil {
		t.Fatal(err)
	}
	if tee.Kind() != dstack.TDX {
		t.Errorf("kind %s", tee.Kind())
	}
	events, err := tee.(collect.Logger).BootLog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	event, err := eventlog.RuntimeV1("app-id", []byte("an application's id."))
	if err != nil {
		t.Fatal(err)
	}
	if err := tee.(collect.Extender).Extend(t.Context(), 3, dstack.Measurement(event.Digest)); err != nil {
		t.Fatal(err)
	}
	events = append(events, event)
	raw, err := tee.Quote(t.Context(), dstack.ReportData{5})
	if err != nil {
		t.Fatal(err)
	}
	q, err := tdx.ParseQuote(raw)
	if err != nil {
		t.Fatal(err)
	}
	body := q.Body()
	if body.ReportData != (dstack.ReportData{5}) {
		t.Error("report data")
	}
	for imr := range uint32(4) {
		if got, err := eventlog.Replay(events, imr); err != nil || got != body.RTMR[imr] {
			t.Errorf("log replays register %d to %s, %v; the quote has %s", imr, got, err, body.RTMR[imr])
		}
	}
	wantCode(t, tee.(collect.Extender).Extend(t.Context(), 1, dstack.Measurement{1}), "register_not_extendable")
}

func TestGuestWithoutSimulatedTEE(t *testing.T) {
	for name, env := range map[string]collect.Env{
		"no hostlink": {},
		"no stream":   {Dial: func(context.Context, string) (net.Conn, error) { return nil, fmt.Errorf("no such stream") }},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := collect.Open(t.Context(), env, []collect.Driver{sim.Driver()})
			wantCode(t, err, "no_tee")
		})
	}
}

func TestServerRefuses(t *testing.T) {
	m := openMachine(t, testSpec(t), t.TempDir())
	_, before, _ := m.Registers()
	env, _ := serve(t, m)
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return env.Dial(ctx, "tee") }}}
	defer client.CloseIdleConnections()
	digest := strings.Repeat("1", 96)
	for _, test := range []struct {
		name, method, path, body string
		status                   int
		code                     string
	}{
		{"an unknown method", "GET", "/reset", "", 404, ""},
		{"a method of another kind", "GET", "/extend", "", 405, ""},
		{"an empty body", "POST", "/extend", "", 400, "request_malformed"},
		{"no register", "POST", "/extend", `{"digest":"` + digest + `"}`, 400, "request_malformed"},
		{"no digest", "POST", "/extend", `{"register":3}`, 400, "request_malformed"},
		{"a null digest", "POST", "/extend", `{"register":3,"digest":null}`, 400, "request_malformed"},
		{"a short digest", "POST", "/extend", `{"register":3,"digest":"11"}`, 400, "request_malformed"},
		{"an unknown field", "POST", "/extend", `{"register":3,"digest":"` + digest + `","value":"x"}`, 400, "request_malformed"},
		{"two bodies", "POST", "/extend", `{"register":3,"digest":"` + digest + `"}{}`, 400, "request_malformed"},
		{"a launch register", "POST", "/extend", `{"register":0,"digest":"` + digest + `"}`, 400, "register_not_extendable"},
		{"short report data", "POST", "/quote", `{"report_data":"00"}`, 400, "request_malformed"},
		{"a huge body", "POST", "/quote", `{"report_data":"` + strings.Repeat("0", 70<<10) + `"}`, 413, "request_too_large"},
	} {
		t.Run(test.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), test.method, "http://tee"+test.path, strings.NewReader(test.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			var refused sim.ErrorReply
			json.Unmarshal(text, &refused)
			if resp.StatusCode != test.status || refused.Code != test.code {
				t.Errorf("status %d, %s; want %d, code %q", resp.StatusCode, text, test.status, test.code)
			}
		})
	}
	if _, after, _ := m.Registers(); after != before {
		t.Error("a refused request changed a register")
	}
}

func TestServerBoundsConnections(t *testing.T) {
	env, _ := serve(t, openMachine(t, testSpec(t), t.TempDir()))
	// Connections that say nothing occupy all slots ...
	var held []net.Conn
	for range maxConnections {
		conn, err := env.Dial(t.Context(), "tee")
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, conn)
	}
	time.Sleep(100 * time.Millisecond)
	// ... so that one more is not served until one of them goes.
	extra, err := env.Dial(t.Context(), "tee")
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	fmt.Fprint(extra, "GET /registers HTTP/1.1\r\nHost: tee\r\nConnection: close\r\n\r\n")
	extra.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if n, err := extra.Read(make([]byte, 1)); err == nil {
		t.Fatalf("served beyond the limit: %d bytes", n)
	}
	held[0].Close()
	extra.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); err != nil {
		t.Fatalf("not served after a connection went: %v", err)
	}
	for _, conn := range held[1:] {
		conn.Close()
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Listen(file)
	wantCode(t, err, "socket_path")
	if left, _ := os.ReadFile(file); string(left) != "precious" {
		t.Error("the file was replaced")
	}
	_, err = Listen(filepath.Join(dir, strings.Repeat("x", 90)))
	if err != nil && fault.Code(err) == "" {
		t.Error(err)
	}
	// A socket that a killed process left behind is replaced.
	stale := filepath.Join(dir, "sock")
	old, err := Listen(stale)
	if err != nil {
		t.Fatal(err)
	}
	old.(*socket).UnixListener.Close()
	l, err := Listen(stale)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestEnsurePKI(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	now := time.Now()
	made, err := EnsurePKI(dir, now)
	if err != nil || !made {
		t.Fatalf("EnsurePKI = %v, %v", made, err)
	}
	private, public := filepath.Join(dir, PrivateFile), filepath.Join(dir, DevRootsFile)
	for path, mode := range map[string]os.FileMode{dir: 0o700, private: 0o600, public: 0o644} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v (%v)", path, info.Mode(), mode, err)
		}
	}
	first, err := os.ReadFile(public)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(first, []byte("PRIVATE KEY")) {
		t.Fatal("the public file holds a private key")
	}
	if made, err = EnsurePKI(dir, now); err != nil || made {
		t.Fatalf("EnsurePKI again = %v, %v", made, err)
	}
	if again, _ := os.ReadFile(public); !bytes.Equal(first, again) {
		t.Error("the second run changed the roots")
	}
	p, err := LoadPKI(dir, now)
	if err != nil {
		t.Fatal(err)
	}
	quote, err := p.Quote(Body{})
	if err != nil {
		t.Fatal(err)
	}
	roots, err := collateral.ParseDevRoots(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := gotdx.RawTdxQuote(quote, goTDXOptions(roots)); err != nil {
		t.Fatalf("quote of a PKI read back is refused: %v", err)
	}
	if text := fmt.Sprintf("%v %+v %#v", p, p, p); strings.Contains(text, "D:") || len(text) > 300 {
		t.Errorf("a PKI prints as %s", text)
	}

	t.Run("refuses keys open to others", func(t *testing.T) {
		os.Chmod(private, 0o644)
		defer os.Chmod(private, 0o600)
		_, err := LoadPKI(dir, now)
		wantCode(t, err, "pki_permissions")
		_, err = EnsurePKI(dir, now)
		wantCode(t, err, "pki_permissions")
	})
	t.Run("refuses expired collateral", func(t *testing.T) {
		_, err := LoadPKI(dir, now.Add(collateralLife+time.Hour))
		wantCode(t, err, "pki_expired")
	})
	t.Run("refuses the roots of another", func(t *testing.T) {
		other, err := testPKI().DevRoots().Bytes()
		if err != nil {
			t.Fatal(err)
		}
		os.WriteFile(public, other, 0o644)
		defer os.WriteFile(public, first, 0o644)
		_, err = LoadPKI(dir, now)
		wantCode(t, err, "pki_damaged")
	})
	t.Run("refuses a damaged private file", func(t *testing.T) {
		text, _ := os.ReadFile(private)
		os.WriteFile(private, text[:len(text)-10], 0o600)
		defer os.WriteFile(private, text, 0o600)
		_, err := LoadPKI(dir, now)
		wantCode(t, err, "pki_damaged")
	})
	t.Run("completes what a crash left", func(t *testing.T) {
		os.Remove(public)
		if made, err := EnsurePKI(dir, now); err != nil || !made {
			t.Fatalf("EnsurePKI = %v, %v", made, err)
		}
		if _, err := LoadPKI(dir, now); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("says how to make a missing one", func(t *testing.T) {
		_, err := LoadPKI(t.TempDir(), now)
		wantCode(t, err, "pki_missing")
		if !strings.Contains(fault.Fix(err), "dstack-simtee pki") {
			t.Error(fault.Fix(err))
		}
	})
}

func TestCertificatesSayWhatTheyAre(t *testing.T) {
	for _, c := range []*x509.Certificate{testPKI().rootCert, testPKI().caCert, testPKI().tcbCert, testPKI().pckCert} {
		if len(c.Subject.Organization) != 1 || !strings.Contains(c.Subject.Organization[0], "not Intel") {
			t.Errorf("%s does not say that it is not Intel's", c.Subject)
		}
	}
}
