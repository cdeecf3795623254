// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/verifier"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		os.Exit(helper(mode))
	}
	goleak.VerifyTestMain(m)
}

// quoteOver returns a well-formed TDX v4 quote that no hardware signed.
func quoteOver(rtmr3 dstack.Measurement, data dstack.ReportData) []byte {
	le := binary.LittleEndian
	q := make([]byte, tdx.HeaderSize)
	le.PutUint16(q[0:], 4)
	le.PutUint16(q[2:], 2)
	le.PutUint32(q[4:], 0x81)
	body := tdx.ReportBody{RTMR: [4]dstack.Measurement{{10}, {11}, {12}, rtmr3}, MRTD: dstack.Measurement{9}, ReportData: data}
	raw := body.MarshalV10()
	q = append(q, raw[:]...)
	qe := append(make([]byte, 384+64), 0, 0, 5, 0, 0, 0, 0, 0)
	sig := append(make([]byte, 64+64), 6, 0)
	sig = append(le.AppendUint32(sig, uint32(len(qe))), qe...)
	return append(le.AppendUint32(q, uint32(len(sig))), sig...)
}

type fakeInit struct {
	mu         sync.Mutex
	rtmr3      dstack.Measurement
	quotes     atomic.Int32
	gate       chan struct{} // when set, Quote waits for it
	fail       error
	containers []initrpc.Container
	asked      atomic.Int32
	stop       atomic.Pointer[initrpc.ShutdownRequest]
	extends    int
	extendFail error
	logged     []initrpc.LogsRequest
	leases     []initrpc.LeaseChange
	openLogs   func(context.Context) (initrpc.Logs, error)
	status     initrpc.Status
	quoteFile  []byte        // a quote whose report data is patched
	takes      time.Duration // of a quote
}

func (f *fakeInit) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	f.quotes.Add(1)
	f.mu.Lock()
	gate, fail, rtmr3 := f.gate, f.fail, f.rtmr3
	f.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if fail != nil {
		return nil, fail
	}
	time.Sleep(f.takes)
	if f.quoteFile != nil {
		q := bytes.Clone(f.quoteFile)
		copy(q[568:632], data[:]) // guest-agent.md §14
		return q, nil
	}
	return quoteOver(rtmr3, data), nil
}

func (f *fakeInit) Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.extends++
	if f.extendFail != nil {
		return eventlog.Event{}, f.extendFail
	}
	e, err := eventlog.RuntimeV1(name, payload)
	if err == nil {
		f.rtmr3 = eventlog.Extend(f.rtmr3, eventlog.Digest(e))
	}
	return e, err
}

func (f *fakeInit) Logs(ctx context.Context, r initrpc.LogsRequest) (initrpc.Logs, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.logged = append(f.logged, r)
	if f.openLogs == nil {
		return initrpc.Logs{}, fault.New("container_unknown", "no such container")
	}
	return f.openLogs(ctx)
}

func (f *fakeInit) Containers(ctx context.Context) ([]initrpc.Container, error) {
	f.asked.Add(1)
	return f.containers, nil
}

func (f *fakeInit) Shutdown(ctx context.Context, r initrpc.ShutdownRequest) error {
	f.stop.Store(&r)
	return nil
}

func (f *fakeInit) Tunnel(context.Context, initrpc.TunnelChange) (initrpc.TunnelStatus, error) {
	return initrpc.TunnelStatus{}, nil
}

func (f *fakeInit) Lease(ctx context.Context, c initrpc.LeaseChange) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leases = append(f.leases, c)
	return nil
}

func (f *fakeInit) Status(ctx context.Context) (initrpc.Status, error) {
	return f.status, nil
}

const (
	testManifest = `{"manifest_version":2,"name":"<script>alert(1)</script>","runner":"docker-compose","docker_compose_file":"services: {}"}`
	testVMConfig = `{"os_image_hash":"64f0d1545cd510a8dfed7ad609d105b5d41f0cb2afcfdda8867ede00c88add7a","cpu_count":1,"memory_size":2147483648}`
)

var (
	testApp      = dstack.AppID{0xaa, 19: 1}
	testInstance = dstack.InstanceID{0xbb, 19: 2}
)

// config makes a configuration as boot would, and the init that belongs to it.
func config(t testing.TB, manifestText string) (*initrpc.Config, *fakeInit) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	keyHash, compose := sha256.Sum256(spki), sha256.Sum256([]byte(manifestText))
	cfg := &initrpc.Config{
		Version: "0.6.0", Revision: "git:0123456789abcdef0123", TEE: dstack.TDX, IsDev: true,
		Manifest: []byte(manifestText), SysConfig: []byte(`{}`), VMConfig: testVMConfig, ChannelKey: pkcs8, DataDisks: []string{"/"},
		Events: []eventlog.Event{
			{IMR: 0, EventType: 0x8000000b, Digest: bytes.Repeat([]byte{1}, 48), Payload: []byte("a boot payload")},
			{IMR: 0, EventType: 10, Digest: bytes.Repeat([]byte{2}, 48), Name: "acpi-loader", Payload: []byte("ACPI DATA")},
			{IMR: 2, EventType: 6, Digest: bytes.Repeat([]byte{3}, 48)},
		},
	}
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, testApp[:]}, {eventlog.ComposeHashEvent, compose[:]},
		{eventlog.GPUPolicyHash, make([]byte, 32)}, {eventlog.InstanceIDEvent, testInstance[:]}, {eventlog.BootMRDone, nil},
		{eventlog.KeyProvider, []byte(`{"name":"none","id":""}`)}, {eventlog.StorageFS, []byte("ext4")},
		{eventlog.SystemChannelKey, keyHash[:]}, {eventlog.SystemReady, nil},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Events = append(cfg.Events, ev)
	}
	rtmr3, err := eventlog.Replay(cfg.Events, 3)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.AppKeys, err = testKeys(t).Encode(); err != nil {
		t.Fatal(err)
	}
	return cfg, &fakeInit{rtmr3: rtmr3, status: initrpc.Status{Phase: "done", Ready: true}, containers: []initrpc.Container{
		{ID: "c1", Names: []string{"/web<b>"}, Image: "nginx", ImageID: "sha256:00", Created: 1700000000, State: "running", Status: "Up 3 minutes"},
	}}
}

// testKeys are what the provider none gives from a seed.
func testKeys(t testing.TB) *keys.AppKeys {
	t.Helper()
	seed, err := keys.NewSeed(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	d, err := derive.FromSeed(seed)
	if err != nil {
		t.Fatal(err)
	}
	text, err := derive.PEM(d.CA)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Unix(0, 0), NotAfter: time.Now().Add(20 * 365 * 24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	ca, err := x509.CreateCertificate(rand.Reader, template, template, d.CA.Public(), d.CA)
	if err != nil {
		t.Fatal(err)
	}
	return &keys.AppKeys{
		App: d.App, CACert: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca})),
		Provider: keys.Provider{Kind: keys.None, CAKey: text},
	}
}

// guest is a served agent.
type guest struct {
	*Agent
	init *fakeInit
	dir  string
	port string // host:port of the external listener
}

// serve makes an agent and serves it on real sockets, with init behind a real
// initrpc connection.
func serve(t testing.TB, cfg *initrpc.Config, init *fakeInit, opt Options) *guest {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { initrpc.Serve(ctx, ours, init, nil) })
	client := initrpc.NewClient(theirs)
	a, err := New(ctx, cfg, client, opt)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{Agent: a, init: init, dir: t.TempDir()}
	listeners := map[string]net.Listener{}
	names := []string{initrpc.ListenDstack, initrpc.ListenTappd, initrpc.ListenGuestAPI, initrpc.ListenLocal}
	for service := range a.scopes {
		names = append(names, initrpc.ListenScope+service)
	}
	for _, name := range names {
		if listeners[name], err = net.Listen("unix", filepath.Join(g.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	ext, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listeners[initrpc.ListenExternal] = ext
	g.port = ext.Addr().String()
	wg.Go(func() {
		if err := a.Serve(ctx, listeners); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		client.Close()
	})
	return g
}

func (g *guest) info() *info { return g.state.Load().info }

func newGuest(t testing.TB) *guest {
	cfg, init := config(t, testManifest)
	return serve(t, cfg, init, Options{})
}

// client returns an HTTP client that always dials one of the guest's sockets.
func (g *guest) client(t testing.TB, name string) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		if name == initrpc.ListenExternal {
			return new(net.Dialer).DialContext(ctx, "tcp", g.port)
		}
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(g.dir, name))
	}}
	roots := x509.NewCertPool()
	leaf, err := x509.ParseCertificate(g.Certificate())
	if err != nil {
		t.Fatal(err)
	}
	roots.AddCert(leaf)
	tr.TLSClientConfig = &tls.Config{RootCAs: roots, ServerName: "dstack-system-channel"}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// post is what curl -d does; it returns status, body and headers.
func post(t testing.TB, c *http.Client, url, body string) (int, string, http.Header) {
	t.Helper()
	resp, err := c.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.ContentLength != int64(len(data)) {
		t.Errorf("%s: Content-Length %d of %d bytes", url, resp.ContentLength, len(data))
	}
	return resp.StatusCode, string(data), resp.Header
}

func get(t testing.TB, c *http.Client, url string) (int, string, http.Header) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data), resp.Header
}

func reportData(t testing.TB, quote []byte) dstack.ReportData {
	t.Helper()
	q, err := tdx.ParseQuote(quote)
	if err != nil {
		t.Fatal(err)
	}
	return q.Body().ReportData
}

func TestInfoOnEachSocketInBothEncodings(t *testing.T) {
	g := newGuest(t)
	quotes := g.init.quotes.Load()
	if quotes != 2 { // the registers, and the certificate
		t.Errorf("the start took %d quotes, want 2", quotes)
	}
	for _, c := range []struct{ sock, base, method string }{
		{initrpc.ListenDstack, "http://dstack", "Info"},
		{initrpc.ListenDstack, "http://dstack", "DstackGuest.Info"},
		{initrpc.ListenTappd, "http://x/prpc", "Tappd.Info"},
		{initrpc.ListenTappd, "http://x/prpc", "Info"},
		{initrpc.ListenExternal, "http://x/prpc", "Worker.Info"},
		{initrpc.ListenExternal, "https://x/prpc", "Info"},
	} {
		for _, asJSON := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/%s/json=%v", c.sock, c.method, asJSON), func(t *testing.T) {
				pc := prpc.Client{BaseURL: c.base, HTTP: g.client(t, c.sock), JSON: asJSON}
				var got agentpb.AppInfo
				if err := pc.Call(context.Background(), c.method, &emptypb.Empty{}, &got); err != nil {
					t.Fatal(err)
				}
				if !proto.Equal(&got, g.info().app) {
					t.Errorf("Info is\n%v\nwant\n%v", &got, g.info().app)
				}
			})
		}
	}
	if n := g.init.quotes.Load(); n != quotes {
		t.Errorf("Info took %d quotes", n-quotes)
	}
	info := g.info().app
	hash := sha256.Sum256([]byte(testManifest))
	if !bytes.Equal(info.AppId, testApp[:]) || !bytes.Equal(info.InstanceId, testInstance[:]) || !bytes.Equal(info.ComposeHash, hash[:]) ||
		info.KeyProviderInfo != `{"name":"none","id":""}` || info.VmConfig != testVMConfig || info.AppCert == "" {
		t.Errorf("identity in Info: %v", info)
	}
	var tcb struct {
		AppCompose string           `json:"app_compose"`
		EventLog   []eventlog.Event `json:"event_log"`
		RTMR3      string           `json:"rtmr3"`
	}
	if err := json.Unmarshal([]byte(info.TcbInfo), &tcb); err != nil {
		t.Fatal(err)
	}
	if tcb.AppCompose != testManifest || !cmp.Equal(tcb.EventLog, g.state.Load().events) || tcb.RTMR3 != g.init.rtmr3.String() {
		t.Errorf("tcb_info: %s", info.TcbInfo)
	}
	if !strings.HasPrefix(info.TcbInfo, "{\n  \"mrtd\"") {
		t.Errorf("tcb_info is not indented by two spaces: %.40q", info.TcbInfo)
	}
}

func TestPrivateTCBInfoStaysInside(t *testing.T) {
	cfg, init := config(t, strings.Replace(testManifest, `"runner"`, `"public_tcbinfo":false,"runner"`, 1))
	g := serve(t, cfg, init, Options{})
	var app, public agentpb.AppInfo
	var host guestapi.GuestInfo
	for _, c := range []struct {
		sock, base string
		resp       proto.Message
	}{{initrpc.ListenDstack, "http://x", &app}, {initrpc.ListenExternal, "http://x/prpc", &public}, {initrpc.ListenGuestAPI, "http://x/api", &host}} {
		pc := prpc.Client{BaseURL: c.base, HTTP: g.client(t, c.sock)}
		if err := pc.Call(context.Background(), "Info", &emptypb.Empty{}, c.resp); err != nil {
			t.Fatal(err)
		}
	}
	if app.TcbInfo == "" || app.VmConfig == "" {
		t.Error("the app does not see its own TCB info")
	}
	if public.TcbInfo != "" || public.VmConfig != "" || host.TcbInfo != "" {
		t.Error("private TCB info got out")
	}
	_, page, _ := get(t, g.client(t, initrpc.ListenExternal), "http://x/")
	if !strings.Contains(page, "TCB info is not public.") || strings.Contains(page, "rtmr3") {
		t.Error("private TCB info is on the dashboard")
	}
}

func TestSimulatorFixtureYieldsUpstreamsInfo(t *testing.T) {
	ev, err := container.Decode(testkit.Vectors(t, "guest-agent/simulator/attestation.bin"))
	if err != nil {
		t.Fatal(err)
	}
	var sys struct {
		VMConfig string `json:"vm_config"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/simulator/sys-config.json"), &sys); err != nil {
		t.Fatal(err)
	}
	raw := testkit.Vectors(t, "guest-agent/simulator/app-compose.json")
	m, err := manifest.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	id, err := eventlog.Boundary(ev.EventLog)
	if err != nil {
		t.Fatal(err)
	}
	q, err := tdx.ParseQuote(ev.Quote)
	if err != nil {
		t.Fatal(err)
	}
	body := q.Body()
	in, err := newInfo(infoSource{manifest: m, identity: id, events: ev.EventLog, body: &body, vmConfig: sys.VMConfig, evidenceConfig: ev.Config})
	if err != nil {
		t.Fatal(err)
	}
	text, err := prpc.MarshalJSON(in.app)
	if err != nil {
		t.Fatal(err)
	}
	var got, want map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/simulator-info.json"), &want); err != nil {
		t.Fatal(err)
	}
	var tcb map[string]any
	if err := json.Unmarshal([]byte(got["tcb_info"].(string)), &tcb); err != nil {
		t.Fatal(err)
	}
	got["tcb_info"] = tcb
	delete(want, "_note")
	for name := range want { // the vector leaves certificate and cloud out
		if d := cmp.Diff(want[name], got[name]); d != "" {
			t.Errorf("%s differs (-want +got):\n%s", name, d)
		}
	}
}

func TestGetQuoteAsCurlSeesIt(t *testing.T) {
	g := newGuest(t)
	status, body, header := post(t, g.client(t, initrpc.ListenDstack), "http://dstack/GetQuote", `{"report_data":"0x74657374"}`)
	if status != 200 || header.Get("Content-Type") != "application/json" || header.Get("Server") != "dstack guest agent" {
		t.Fatalf("status %d, headers %v, body %s", status, header, body)
	}
	padded := dstack.ReportData{'t', 'e', 's', 't'}
	var got struct {
		Quote      string  `json:"quote"`
		EventLog   string  `json:"event_log"`
		ReportData string  `json:"report_data"`
		VMConfig   string  `json:"vm_config"`
		Extra      *string `json:"attestation"`
	}
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if got.Quote != hex.EncodeToString(quoteOver(g.init.rtmr3, padded)) || got.ReportData != padded.String() || got.VMConfig != testVMConfig || got.Extra != nil {
		t.Errorf("GetQuote answered %s", body)
	}
	if !strings.HasPrefix(body, `{"quote":"`) {
		t.Errorf("fields are not in the order of declaration: %.40s", body)
	}
	log, err := eventlog.ParseJSON([]byte(got.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	if len(log) != len(g.state.Load().events) {
		t.Fatalf("%d events of %d", len(log), len(g.state.Load().events))
	}
	for i, e := range log {
		want := g.state.Load().events[i]
		switch {
		case want.IsRuntime():
			want.Digest = nil
		case string(want.Payload) != "ACPI DATA":
			want.Payload = nil
		}
		if d := cmp.Diff(want, e); d != "" {
			t.Errorf("event %d: %s", i, d)
		}
	}
	if mr, err := eventlog.Replay(log, 3); err != nil || mr != g.init.rtmr3 {
		t.Errorf("the stripped log replays to %s, %v", mr, err)
	}

	for _, n := range []int{65, 128} {
		status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://dstack/GetQuote", `{"report_data":"`+strings.Repeat("00", n)+`"}`)
		if status != 400 || !strings.Contains(body, "Report data is too long") {
			t.Errorf("%d bytes: %d %s", n, status, body)
		}
	}
	status, body, _ = get(t, g.client(t, initrpc.ListenDstack), "http://dstack/GetQuote?report_data=74657374")
	if status != 200 || !strings.Contains(body, padded.String()) {
		t.Errorf("GET: %d %s", status, body)
	}
}

func TestV2EventsLeaveWithDigestAndPreimage(t *testing.T) {
	e, err := eventlog.RuntimeV2("app-event", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	bare := e
	bare.Digest, bare.Preimage = nil, nil
	text, err := strippedLog([]eventlog.Event{bare})
	if err != nil {
		t.Fatal(err)
	}
	got, err := eventlog.ParseJSON([]byte(text))
	if err != nil || !cmp.Equal(got, []eventlog.Event{e}) {
		t.Errorf("%s, %v", text, err)
	}
}

func TestAttestReturnsTheUnstrippedContainer(t *testing.T) {
	g := newGuest(t)
	pc := prpc.Client{BaseURL: "http://x", HTTP: g.client(t, initrpc.ListenDstack)}
	var resp agentpb.AttestResponse
	if err := pc.Call(context.Background(), "Attest", &agentpb.RawQuoteArgs{ReportData: []byte("test")}, &resp); err != nil {
		t.Fatal(err)
	}
	if resp.Attestation[0] != 0 {
		t.Errorf("a log of V1 events makes container %#x, want V0", resp.Attestation[0])
	}
	ev, err := container.Decode(resp.Attestation)
	if err != nil {
		t.Fatal(err)
	}
	want := dstack.ReportData{'t', 'e', 's', 't'}
	if ev.ReportData != want || reportData(t, ev.Quote) != want || ev.Config != testVMConfig || !cmp.Equal(ev.EventLog, g.state.Load().events) {
		t.Errorf("evidence %+v", ev)
	}
	if err := pc.Call(context.Background(), "Attest", &agentpb.RawQuoteArgs{ReportData: make([]byte, 65)}, &resp); fault.Code(err) != "report_data_length" {
		t.Errorf("65 bytes: %v", err)
	}
}

func TestTdxQuoteHashesAsTheVectorsSay(t *testing.T) {
	var vectors struct {
		ReportData []struct {
			ContentHex string `json:"content_hex"`
			Hash       string `json:"hash_algorithm"`
			Prefix     string `json:"prefix"`
			ReportData string `json:"report_data"`
		} `json:"report_data"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/crypto.json"), &vectors); err != nil {
		t.Fatal(err)
	}
	g := newGuest(t)
	pc := prpc.Client{BaseURL: "http://x/prpc", HTTP: g.client(t, initrpc.ListenTappd), JSON: true}
	for _, v := range vectors.ReportData {
		content, _ := hex.DecodeString(v.ContentHex)
		req := &agentpb.TdxQuoteArgs{ReportData: content, HashAlgorithm: v.Hash, Prefix: v.Prefix}
		if v.Prefix == "app-data" {
			req.Prefix = "" // the default
		}
		var resp agentpb.TdxQuoteResponse
		if err := pc.Call(context.Background(), "Tappd.TdxQuote", req, &resp); err != nil {
			t.Errorf("%s: %v", v.Hash, err)
			continue
		}
		if got := reportData(t, resp.Quote); got.String() != v.ReportData {
			t.Errorf("%s %s: report data %s, want %s", v.Hash, v.Prefix, got, v.ReportData)
		}
		if resp.HashAlgorithm != v.Hash || resp.Prefix != v.Prefix || resp.EventLog == "" {
			t.Errorf("%s: echo %q %q", v.Hash, resp.HashAlgorithm, resp.Prefix)
		}
	}
}

func TestTappdQuotes(t *testing.T) {
	g := newGuest(t)
	pc := prpc.Client{BaseURL: "http://x/prpc", HTTP: g.client(t, initrpc.ListenTappd)}
	ctx := context.Background()
	raw := bytes.Repeat([]byte{5}, 64)
	var resp agentpb.TdxQuoteResponse
	if err := pc.Call(ctx, "Tappd.RawQuote", &agentpb.RawQuoteArgs{ReportData: raw}, &resp); err != nil {
		t.Fatal(err)
	}
	if got := reportData(t, resp.Quote); !bytes.Equal(got[:], raw) || resp.HashAlgorithm != "raw" || resp.Prefix != "" {
		t.Errorf("raw quote over %x, %q %q", got, resp.HashAlgorithm, resp.Prefix)
	}
	for _, n := range []int{0, 63, 65} {
		err := pc.Call(ctx, "RawQuote", &agentpb.RawQuoteArgs{ReportData: make([]byte, n)}, &resp)
		if fault.Code(err) != "report_data_length" || !strings.Contains(err.Error(), "invalid content length") {
			t.Errorf("%d raw bytes: %v", n, err)
		}
	}
	err := pc.Call(ctx, "TdxQuote", &agentpb.TdxQuoteArgs{HashAlgorithm: "md5"}, &resp)
	if fault.Code(err) != "report_data_algorithm" || !strings.Contains(err.Error(), "invalid hash algorithm") {
		t.Errorf("md5: %v", err)
	}
}

func TestUnknownMethods(t *testing.T) {
	g := newGuest(t)
	for _, c := range []struct{ sock, url string }{
		{initrpc.ListenDstack, "http://x/NoSuch"}, {initrpc.ListenDstack, "http://x/DeriveKey"}, {initrpc.ListenTappd, "http://x/prpc/Tappd.NoSuch"},
		{initrpc.ListenExternal, "http://x/prpc/GetKey"}, {initrpc.ListenExternal, "http://x/prpc/Worker.EmitEvent"},
	} {
		name := c.url[strings.LastIndexAny(c.url, "/.")+1:]
		status, body, _ := post(t, g.client(t, c.sock), c.url, `{}`)
		if status != 400 || !strings.Contains(body, "Service not found: "+name) {
			t.Errorf("%s %s: %d %s", c.sock, c.url, status, body)
		}
	}
}

func TestGpuInfoIsTheFileAsItIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attestation.out")
	cfg, init := config(t, testManifest)
	g := serve(t, cfg, init, Options{gpuEvidence: path})
	ask := func(want string) {
		t.Helper()
		status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/GpuInfo", `null`)
		if status != 200 || body != want {
			t.Errorf("GpuInfo: %d %s, want %s", status, body, want)
		}
	}
	ask(`{"attestation":""}`)
	for content, want := range map[string]string{"{\"a\": \"é\"}\n": `{"attestation":"{\"a\": \"\u00e9\"}\n"}`, "\xff": `{"attestation":""}`} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		ask(want)
	}
}

func TestVersionOnEachSocket(t *testing.T) {
	g := newGuest(t)
	for _, c := range []struct{ sock, url string }{
		{initrpc.ListenDstack, "http://x/Version"}, {initrpc.ListenTappd, "http://x/prpc/Tappd.Version"}, {initrpc.ListenExternal, "http://x/prpc/Worker.Version?json"},
	} {
		status, body, header := post(t, g.client(t, c.sock), c.url, `{}`)
		if status != 200 || body != `{"version":"0.6.0","rev":"git:0123456789abcdef0123"}` {
			t.Errorf("%s: %d %s", c.sock, status, body)
		}
		if v := header.Get("X-App-Version"); c.sock == initrpc.ListenExternal && v != "v0.6.0 (git:0123456789abcdef0123)" {
			t.Errorf("X-App-Version %q", v)
		}
	}
}

// Upstream's Rust tappd client sends an absolute target and no Host.
func TestARequestWithoutHostIsAnswered(t *testing.T) {
	g := newGuest(t)
	conn, err := net.Dial("unix", filepath.Join(g.dir, initrpc.ListenTappd))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "POST http://unix.socket/prpc/Tappd.Version HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	data, err := io.ReadAll(conn)
	if err != nil || !bytes.HasPrefix(data, []byte("HTTP/1.1 200")) || !bytes.Contains(data, []byte(`"version":"0.6.0"`)) {
		t.Errorf("%v: %s", err, data)
	}
}

func TestGuestAPI(t *testing.T) {
	g := newGuest(t)
	pc := prpc.Client{BaseURL: "http://x/api", HTTP: g.client(t, initrpc.ListenGuestAPI)}
	ctx := context.Background()
	call := func(method string, resp proto.Message) {
		t.Helper()
		if err := pc.Call(ctx, method, &emptypb.Empty{}, resp); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
	var info guestapi.GuestInfo
	call("Info", &info)
	if info.Version != "0.6.0" || !bytes.Equal(info.AppId, testApp[:]) || !bytes.Equal(info.InstanceId, testInstance[:]) || info.TcbInfo == "" {
		t.Errorf("Info %v", &info)
	}
	var sys guestapi.SystemInfo
	call("SysInfo", &sys)
	if sys.TotalMemory == 0 || sys.AvailableMemory == 0 || sys.NumCpus == 0 || sys.KernelVersion == "" || sys.Uptime == 0 ||
		len(sys.Disks) != 1 || sys.Disks[0].MountPoint != "/" || sys.Disks[0].TotalSize == 0 {
		t.Errorf("SysInfo %v", &sys)
	}
	var network guestapi.NetworkInformation
	call("NetworkInfo", &network)
	var list guestapi.ListContainersResponse
	call("GuestApi.ListContainers", &list)
	want := &guestapi.Container{Id: "c1", Names: []string{"/web<b>"}, Image: "nginx", ImageId: "sha256:00", Created: 1700000000, State: "running", Status: "Up 3 minutes"}
	if len(list.Containers) != 1 || !proto.Equal(list.Containers[0], want) {
		t.Errorf("ListContainers %v", &list)
	}
	if g.init.stop.Load() != nil {
		t.Error("a shutdown nobody asked for")
	}
	call("Shutdown", &emptypb.Empty{})
	if g.init.stop.Load() == nil {
		t.Error("the shutdown did not reach init")
	}
}

func TestGatewaysAreReadFromTheRouteTable(t *testing.T) {
	table := "Iface\tDestination\tGateway \tFlags\n" + "eth0\t00000000\t0202000A\t0003\n" + "eth0\t0002000A\t00000000\t0001\n" + "eth0\t00000000\tzz\t0003\n"
	got := gateways([]byte(table))
	if len(got) != 1 || got[0].Address != "10.0.2.2" {
		t.Errorf("gateways %v", got)
	}
}

func TestDashboardEscapesEverything(t *testing.T) {
	g := newGuest(t)
	c := g.client(t, initrpc.ListenExternal)
	status, page, header := get(t, c, "http://x/")
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/html") {
		t.Fatalf("%d %v", status, header)
	}
	for _, bad := range []string{"<script>", "<b>"} {
		if strings.Contains(page, bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
	for _, want := range []string{"&lt;script&gt;alert(1)", "web&lt;b&gt;", "Up 3 minutes", testApp.String(), "app_compose"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if strings.Contains(page, "<h2>System</h2>") {
		t.Error("system information is public although the manifest does not say so")
	}
	if csp := header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") {
		t.Errorf("policy %q", csp)
	}
	if strings.Contains(page, "ZgotmplZ") || !strings.Contains(page, dashboardStyle) {
		t.Error("the style did not get through")
	}
	for range 20 {
		get(t, c, "http://x/")
	}
	if n := g.init.asked.Load(); n > 5 {
		t.Errorf("21 pages asked the engine %d times", n)
	}
	for _, path := range []string{"/logs/web", "/metrics", "/index.html", "/prpc", "/prpc/a/b", "/Info", "/api/SysInfo"} {
		if status, _, _ := get(t, c, "http://x"+path); status != 404 {
			t.Errorf("%s: %d", path, status)
		}
	}
}

func TestPublicSysinfoIsOnTheDashboard(t *testing.T) {
	cfg, init := config(t, strings.Replace(testManifest, `"runner"`, `"public_sysinfo":true,"runner"`, 1))
	g := serve(t, cfg, init, Options{})
	if _, page, _ := get(t, g.client(t, initrpc.ListenExternal), "http://x/"); !strings.Contains(page, "<h2>System</h2>") || !strings.Contains(page, "Kernel") {
		t.Error("no system information")
	}
}

func TestAnAgentThatCannotProveWhatItSaysDoesNotStart(t *testing.T) {
	for _, c := range []struct {
		name, code string
		change     func(*initrpc.Config, *fakeInit)
	}{
		{"another manifest", "compose_hash_mismatch", func(c *initrpc.Config, _ *fakeInit) { c.Manifest = append(c.Manifest, ' ') }},
		{"another channel key", "channel_key_mismatch", func(c *initrpc.Config, _ *fakeInit) {
			other, _ := config(t, testManifest)
			c.ChannelKey = other.ChannelKey
		}},
		{"a register the log does not explain", "log_replay_mismatch", func(_ *initrpc.Config, f *fakeInit) { f.rtmr3[0] ^= 1 }},
		{"no system-ready", "log_boundary_missing", func(c *initrpc.Config, _ *fakeInit) { c.Events = c.Events[:len(c.Events)-1] }},
		{"a manifest that is not one", "manifest_malformed", func(c *initrpc.Config, _ *fakeInit) { c.Manifest = []byte("x") }},
		{"no TEE", "tee_gone", func(_ *initrpc.Config, f *fakeInit) { f.fail = fault.New("tee_gone", "gone") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg, init := config(t, testManifest)
			c.change(cfg, init)
			_, err := New(context.Background(), cfg, init, Options{})
			if fault.Code(err) != c.code {
				t.Errorf("New: %v, code %q, want %q", err, fault.Code(err), c.code)
			}
			if !bytes.Equal(cfg.ChannelKey, make([]byte, len(cfg.ChannelKey))) {
				t.Error("the private key was not wiped")
			}
		})
	}
}

func TestAnUnknownListenerIsRefused(t *testing.T) {
	cfg, init := config(t, testManifest)
	a, err := New(context.Background(), cfg, init, Options{})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Serve(context.Background(), map[string]net.Listener{"debug": ln}); err == nil || !strings.Contains(err.Error(), `"debug"`) {
		t.Errorf("Serve: %v", err)
	}
}

// Evidence.

func nonceOf(n int) []byte { return bytes.Repeat([]byte{0x42}, n) }

type source struct {
	Version     int
	Container   string
	Manifest    string
	Nonce       string
	ServedSPKIs []string `json:"served_spkis"`
}

func TestEvidenceOverTLSAndPlainOnOnePort(t *testing.T) {
	g := newGuest(t)
	for _, scheme := range []string{"https", "http"} {
		for _, n := range []int{16, 32, 64} {
			reply, spki, err := channel.FetchEvidence(context.Background(), scheme+"://"+g.port, nonceOf(n))
			if err != nil {
				t.Fatal(err)
			}
			var src source
			if err := json.Unmarshal(reply, &src); err != nil {
				t.Fatal(err)
			}
			raw, err := hex.DecodeString(src.Container)
			if err != nil {
				t.Fatal(err)
			}
			ev, err := container.Decode(raw)
			if err != nil {
				t.Fatal(err)
			}
			// evidenceReply is verifier.Source by another name.
			parsed, err := verifier.ParseSource(reply)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := json.Marshal(parsed); err != nil || !bytes.Equal(again, reply) {
				t.Errorf("the verifier writes this evidence as %.200s, %v\nthe agent as %.200s", again, err, reply)
			}
			if scheme == "https" && !bytes.Equal(spki, g.spki) {
				t.Error("the connection shows another key")
			}
			want := binding.Envelope(nonceOf(n), spki, testApp, testInstance[:]) // spki is nil for http
			if ev.ReportData != want || reportData(t, ev.Quote) != want {
				t.Errorf("%s: report data %s, want %s", scheme, ev.ReportData, want)
			}
			if raw[0] == 0 || ev.Config != testVMConfig || !cmp.Equal(ev.EventLog, g.state.Load().events) {
				t.Errorf("container of version byte %#x, evidence %+v", raw[0], ev)
			}
			if src.Version != 1 || src.Manifest != testManifest || src.Nonce != hex.EncodeToString(nonceOf(n)) || !cmp.Equal(src.ServedSPKIs, []string{hex.EncodeToString(g.spki)}) {
				t.Errorf("reply %+v", src)
			}
		}
	}
}

func TestTheEnvelopeDiffersForEachOfItsParts(t *testing.T) {
	seen := map[dstack.ReportData]string{}
	record := func(name string, change func(a *Agent), nonce, spki []byte) {
		cfg, init := config(t, testManifest)
		a, err := New(context.Background(), cfg, init, Options{})
		if err != nil {
			t.Fatal(err)
		}
		change(a)
		body, err := a.makeEvidence(context.Background(), nonce, spki)
		if err != nil {
			t.Fatal(err)
		}
		var src source
		json.Unmarshal(body, &src)
		raw, _ := hex.DecodeString(src.Container)
		ev, err := container.Decode(raw)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[ev.ReportData]; ok {
			t.Errorf("%q and %q have one envelope", name, other)
		}
		seen[ev.ReportData] = name
	}
	same := func(*Agent) {}
	key := []byte("a key")
	record("base", same, nonceOf(32), key)
	record("nonce", same, append(nonceOf(31), 0), key)
	record("longer nonce", same, nonceOf(33), key)
	record("key", same, nonceOf(32), []byte("another key"))
	record("no key", same, nonceOf(32), nil)
	record("app", func(a *Agent) { a.identity.AppID[0] ^= 1 }, nonceOf(32), key)
	record("instance", func(a *Agent) { a.identity.InstanceID = bytes.Repeat([]byte{1}, 20) }, nonceOf(32), key)
	record("no instance", func(a *Agent) { a.identity.InstanceID = nil }, nonceOf(32), key)
}

func TestBadEvidenceRequests(t *testing.T) {
	g := newGuest(t)
	c := g.client(t, initrpc.ListenExternal)
	url := "http://x" + evidencePath
	hexOf := func(n int) string { return hex.EncodeToString(nonceOf(n)) }
	quotes := g.init.quotes.Load()
	for _, r := range []struct {
		name, body, code string
		status           int
	}{
		{"empty", ``, "request_malformed", 400},
		{"not an object", `"x"`, "request_malformed", 400},
		{"unknown field", `{"nonce":"` + hexOf(32) + `","report_data":"00"}`, "request_malformed", 400},
		{"two values", `{"nonce":"` + hexOf(32) + `"}{}`, "request_malformed", 400},
		{"a nonce twice", `{"nonce":"` + hexOf(32) + `","nonce":"` + hexOf(16) + `"}`, "request_malformed", 400},
		{"a number", `{"nonce":1}`, "request_malformed", 400},
		{"missing", `{}`, "nonce_length", 400},
		{"15 bytes", `{"nonce":"` + hexOf(15) + `"}`, "nonce_length", 400},
		{"65 bytes", `{"nonce":"` + hexOf(65) + `"}`, "nonce_length", 400},
		{"half a byte", `{"nonce":"` + hexOf(32) + `0"}`, "nonce_malformed", 400},
		{"not hex", `{"nonce":"` + strings.Repeat("zz", 32) + `"}`, "nonce_malformed", 400},
		{"oversize", `{"nonce":"` + hexOf(32) + `"}` + strings.Repeat(" ", 4096), "request_too_large", 413},
	} {
		status, body, _ := post(t, c, url, r.body)
		var e struct{ Error, Code string }
		if json.Unmarshal([]byte(body), &e); status != r.status || e.Code != r.code || e.Error == "" {
			t.Errorf("%s: %d %s, want %d %s", r.name, status, body, r.status, r.code)
		}
	}
	status, body, header := get(t, c, url)
	if status != 405 || header.Get("Allow") != "OPTIONS, POST" || !strings.Contains(body, "method_not_allowed") {
		t.Errorf("GET: %d %s", status, body)
	}
	if n := g.init.quotes.Load(); n != quotes {
		t.Errorf("bad requests took %d quotes", n-quotes)
	}
	g.init.mu.Lock()
	g.init.fail = errors.New("secret detail")
	g.init.mu.Unlock()
	status, body, _ = post(t, c, url, `{"nonce":"`+hexOf(32)+`"}`)
	if status != 503 || !strings.Contains(body, "evidence_unavailable") || strings.Contains(body, "secret") {
		t.Errorf("a failing init: %d %s", status, body)
	}
}

// Threat C06: a verifier page of another origin can ask for evidence and read
// the answer, refusals included; nothing else is opened to it, and no credentials.
func TestThreat_C06_PagesOfAnyOriginMayAskForEvidence(t *testing.T) {
	g := newGuest(t)
	c := g.client(t, initrpc.ListenExternal)
	do := func(method, path, body string) *http.Response {
		req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Origin", "https://verifier.example")
		req.Header.Set("Content-Type", "application/json")
		if method == http.MethodOptions {
			req.Header.Set("Access-Control-Request-Method", "POST")
			req.Header.Set("Access-Control-Request-Headers", "content-type")
			req.Header.Set("Access-Control-Request-Private-Network", "true")
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	opened := func(h http.Header) map[string]string {
		out := map[string]string{}
		for k := range h {
			if strings.HasPrefix(k, "Access-Control-") {
				out[k] = h.Get(k)
			}
		}
		return out
	}
	quotes := g.init.quotes.Load()
	preflight := do("OPTIONS", evidencePath, "")
	if preflight.StatusCode != http.StatusNoContent {
		t.Errorf("preflight: %s", preflight.Status)
	}
	want := map[string]string{
		"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST",
		"Access-Control-Allow-Headers": "Content-Type", "Access-Control-Max-Age": "7200",
	}
	if diff := cmp.Diff(want, opened(preflight.Header)); diff != "" {
		t.Errorf("preflight (-want +got):\n%s", diff)
	}
	if n := g.init.quotes.Load(); n != quotes {
		t.Errorf("a preflight took %d quotes", n-quotes)
	}
	for _, r := range []struct {
		name, body string
		status     int
	}{
		{"an answer", `{"nonce":"` + hex.EncodeToString(nonceOf(32)) + `"}`, 200},
		{"a refusal", `{}`, 400},
	} {
		resp := do("POST", evidencePath, r.body)
		if resp.StatusCode != r.status {
			t.Errorf("%s: %s", r.name, resp.Status)
		}
		if diff := cmp.Diff(map[string]string{"Access-Control-Allow-Origin": "*"}, opened(resp.Header)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", r.name, diff)
		}
	}
	for _, r := range [][2]string{{"GET", "/"}, {"GET", "/prpc/Worker.Info"}, {"POST", "/prpc/Worker.Version"}, {"OPTIONS", "/prpc/Worker.Info"}, {"OPTIONS", "/"}} {
		if got := opened(do(r[0], r[1], "").Header); len(got) > 0 {
			t.Errorf("%s %s is opened to other origins: %v", r[0], r[1], got)
		}
	}
}

func TestEvidenceIsRateLimited(t *testing.T) {
	var now atomic.Int64
	cfg, init := config(t, testManifest)
	g := serve(t, cfg, init, Options{EvidenceRate: 0.5, EvidenceBurst: 2, Now: func() time.Time { return time.Unix(now.Load(), 0) }})
	c := g.client(t, initrpc.ListenExternal)
	ask := func(n byte) (int, string, http.Header) {
		nonce := nonceOf(32)
		nonce[0] = n
		return post(t, c, "http://x"+evidencePath, `{"nonce":"`+hex.EncodeToString(nonce)+`"}`)
	}
	for n := range byte(2) {
		if status, body, _ := ask(n); status != 200 {
			t.Fatalf("request %d: %d %s", n, status, body)
		}
	}
	status, body, header := ask(2)
	if status != 429 || header.Get("Retry-After") != "2" || !strings.Contains(body, "evidence_rate_limited") {
		t.Errorf("third request: %d %s %s", status, header.Get("Retry-After"), body)
	}
	// Apps are not limited by what strangers do.
	if status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/GetQuote", `{}`); status != 200 {
		t.Errorf("GetQuote: %d %s", status, body)
	}
	now.Store(1)
	if status, _, header := ask(2); status != 429 || header.Get("Retry-After") != "1" {
		t.Errorf("after one second: %d %s", status, header.Get("Retry-After"))
	}
	now.Store(2)
	if status, body, _ := ask(2); status != 200 {
		t.Errorf("after two seconds: %d %s", status, body)
	}
	now.Store(-1000)
	if status, _, _ := ask(3); status != 429 {
		t.Errorf("a clock that is set back gave a token: %d", status)
	}
}

func TestOneQuoteServesAllWhoShareItsNonce(t *testing.T) {
	g := newGuest(t)
	c := g.client(t, initrpc.ListenExternal)
	gate := make(chan struct{})
	g.init.mu.Lock()
	g.init.gate = gate
	g.init.mu.Unlock()
	before := g.init.quotes.Load()
	var wg sync.WaitGroup
	bodies := make([]string, 20)
	for i := range bodies {
		wg.Go(func() {
			_, bodies[i], _ = post(t, c, "http://x"+evidencePath, `{"nonce":"`+hex.EncodeToString(nonceOf(32))+`"}`)
		})
	}
	// The same nonce over TLS is another envelope.
	wg.Go(func() {
		if _, _, err := channel.FetchEvidence(context.Background(), "https://"+g.port, nonceOf(32)); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(300 * time.Millisecond)
	close(gate)
	wg.Wait()
	for _, b := range bodies {
		if b != bodies[0] || !strings.Contains(b, `"container"`) {
			t.Fatalf("reply %.100s", b)
		}
	}
	if n := g.init.quotes.Load() - before; n != 2 {
		t.Errorf("%d quotes, want 2: one for plain HTTP, one for TLS", n)
	}
}

func TestTooManyNoncesAtATimeAreRefused(t *testing.T) {
	cfg, init := config(t, testManifest)
	g := serve(t, cfg, init, Options{EvidenceRate: 1000, EvidenceBurst: 1000})
	c := g.client(t, initrpc.ListenExternal)
	gate := make(chan struct{})
	init.mu.Lock()
	init.gate = gate
	init.mu.Unlock()
	var wg sync.WaitGroup
	var served, refused atomic.Int32
	for i := range 3 * maxEvidenceFlights {
		wg.Go(func() {
			nonce := nonceOf(32)
			nonce[0] = byte(i)
			status, _, _ := post(t, c, "http://x"+evidencePath, `{"nonce":"`+hex.EncodeToString(nonce)+`"}`)
			switch status {
			case 200:
				served.Add(1)
			case 429:
				if refused.Add(1) == 2*maxEvidenceFlights {
					close(gate)
				}
			}
		})
	}
	wg.Wait()
	if served.Load() != maxEvidenceFlights || refused.Load() != 2*maxEvidenceFlights {
		t.Errorf("%d served, %d refused", served.Load(), refused.Load())
	}
}

func TestTheExternalPortSpeaksTLS13Only(t *testing.T) {
	g := newGuest(t)
	roots := x509.NewCertPool()
	leaf, _ := x509.ParseCertificate(g.Certificate())
	roots.AddCert(leaf)
	if leaf.PublicKeyAlgorithm != x509.ECDSA || !bytes.Equal(leaf.RawSubjectPublicKeyInfo, g.spki) {
		t.Error("the certificate is not of the channel key")
	}
	cfg := &tls.Config{RootCAs: roots, ServerName: "dstack-system-channel", NextProtos: []string{"h2", "http/1.1"}}
	conn, err := tls.Dial("tcp", g.port, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s := conn.ConnectionState(); s.Version != tls.VersionTLS13 || s.NegotiatedProtocol != "h2" {
		t.Errorf("TLS %#x, protocol %q", s.Version, s.NegotiatedProtocol)
	}
	conn.Close()
	cfg.MaxVersion = tls.VersionTLS12
	if conn, err := tls.Dial("tcp", g.port, cfg); err == nil {
		conn.Close()
		t.Error("TLS 1.2 was accepted")
	}
}

func TestASilentConnectionHoldsNobodyUp(t *testing.T) {
	g := newGuest(t)
	for range 5 {
		conn, err := net.Dial("tcp", g.port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if status, _, _ := get(t, g.client(t, initrpc.ListenExternal), "http://x/prpc/Version"); status != 200 {
		t.Errorf("status %d", status)
	}
}

func TestAListenerHasABoundedNumberOfConnections(t *testing.T) {
	base, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln := limit(base, 2)
	accepted := make(chan net.Conn, 4)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	for range 3 {
		c, err := net.Dial("tcp", base.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	first, second := <-accepted, <-accepted
	select {
	case <-accepted:
		t.Fatal("a third connection was accepted")
	case <-time.After(100 * time.Millisecond):
	}
	first.Close()
	first.Close() // must not free a second slot
	third := <-accepted
	third.Close()
	second.Close()
	ln.Close()
	ln.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func FuzzParseNonce(f *testing.F) {
	f.Add([]byte(`{"nonce":"` + strings.Repeat("ab", 32) + `"}`))
	f.Add([]byte(`{"nonce":"` + strings.Repeat("AB", 64) + `"} `))
	f.Add([]byte(`{"nonce":"00","nonce":"00"}`))
	f.Add([]byte(`[{}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		nonce, err := parseNonce(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		if len(nonce) < minNonce || len(nonce) > maxNonce {
			t.Fatalf("a nonce of %d bytes", len(nonce))
		}
		again, err := parseNonce([]byte(`{"nonce":"` + hex.EncodeToString(nonce) + `"}`))
		if err != nil || !bytes.Equal(again, nonce) {
			t.Fatalf("%x became %x, %v", nonce, again, err)
		}
	})
}
