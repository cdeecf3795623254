// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// ident adds upstream's Server header.
func ident(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Server", "dstack guest agent")
		h.ServeHTTP(w, r)
	})
}

// maxAppQuotes is how many quotes the callers of one listener may wait for at a time.
// It is below what init accepts, so that an app cannot keep the external listener,
// the host or the dashboard from reaching init, nor one service the others.
const maxAppQuotes = 4

// caller is who is at one of the listeners for apps.
type caller struct {
	*Agent
	scope  *scope // which keys it may use; nil: all
	quotes chan struct{}
}

func (a *Agent) caller(s *scope) *caller {
	return &caller{Agent: a, scope: s, quotes: make(chan struct{}, maxAppQuotes)}
}

// unary is prpc.Unary for methods that differ by caller and need no context.
func unary[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](name string, s *scope, h func(*scope, *Req) (*Resp, error)) prpc.Method {
	return prpc.Unary[Req, Resp, PReq, PResp](name, func(_ context.Context, req *Req) (*Resp, error) { return h(s, req) })
}

// dstackMethods is the service DstackGuest (guest-agent.md §3).
func (c *caller) dstackMethods() []prpc.Method {
	return []prpc.Method{
		prpc.Unary("GetTlsKey", c.getTLSKey),
		unary("GetKey", c.scope, c.getKey),
		prpc.Unary("GetQuote", c.getQuote),
		prpc.Unary("Attest", c.attest),
		prpc.Unary("Info", c.appInfo),
		prpc.Unary("GpuInfo", c.gpuInfo),
		unary("Sign", c.scope, c.sign),
		prpc.Unary("Verify", c.verify),
		prpc.Unary("Version", c.workerVersion),
		prpc.Unary("EmitEvent", c.emit),
	}
}

// tappdMethods is the service Tappd (guest-agent.md §4), with the methods of
// DstackGuest as well: the SDKs' tappd clients inherit them.
func (c *caller) tappdMethods() []prpc.Method {
	return append(c.dstackMethods(),
		prpc.Unary("DeriveKey", c.deriveKey),
		unary("DeriveK256Key", c.scope, c.deriveK256Key),
		prpc.Unary("TdxQuote", c.tdxQuote),
		prpc.Unary("RawQuote", c.rawQuote),
	)
}

// emit lets only unscoped callers write into the log that speaks for the whole app.
func (c *caller) emit(ctx context.Context, req *agentpb.EmitEventArgs) (*emptypb.Empty, error) {
	if c.scope != nil {
		return nil, fault.New("key_scope", "the service %s may not emit events of the app", c.scope.service)
	}
	return c.emitEvent(ctx, req)
}

func (c *caller) dstackHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/{method}", prpc.NewMux([]string{"DstackGuest."}, c.dstackMethods()...))
	return mux
}

func (c *caller) tappdHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/{method}", prpc.NewMux([]string{"Tappd.", "DstackGuest."}, c.tappdMethods()...))
	return mux
}

// bothHandler is tappd.sock, where the SDKs' legacy clients ask for methods of
// DstackGuest without the mount, and a service's own socket.
func (c *caller) bothHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/", c.tappdHandler())
	mux.Handle("/", c.dstackHandler())
	return mux
}

// localHandler is everything on one port, for development: the pages where no
// method is. A page of another origin that a browser was made to resolve to this
// machine (DNS rebinding) is told by the host that it names.
func (a *Agent) localHandler() http.Handler {
	c, external := a.caller(nil), a.externalHandler()
	mux := http.NewServeMux()
	mux.Handle("/prpc/", c.tappdHandler())
	mux.Handle("/{method}", c.dstackHandler())
	for _, page := range []string{"/{$}", "/metrics", "/logs/", evidencePath} {
		mux.Handle(page, external)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if _, err := netip.ParseAddr(strings.Trim(host, "[]")); err != nil && host != "localhost" && host != "dstack" {
			writeError(w, http.StatusMisdirectedRequest, fault.New("host_unknown", "this development port answers to addresses and to localhost, not to %q", host))
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// externalHandler is what strangers see (guest-agent.md §5, §12).
func (a *Agent) externalHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/{method}", prpc.NewMux([]string{"Worker."},
		prpc.Unary("Info", a.publicInfo),
		prpc.Unary("Version", a.workerVersion),
		prpc.Unary("GetAttestationForAppKey", a.appKeyAttestation),
	))
	mux.HandleFunc(evidencePath, a.serveEvidence)
	mux.HandleFunc("GET /{$}", a.serveDashboard)
	// What the manifest does not make public is not there (threats.md J05).
	if a.manifest.PublicSysinfo {
		mux.HandleFunc("GET /metrics", a.serveMetrics)
	}
	if a.manifest.PublicLogs {
		mux.HandleFunc("GET /logs/{container}", a.serveLogs)
	}
	version := strings.TrimSpace(fmt.Sprintf("v%s (%s)", a.version, a.revision))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-App-Version", version)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		mux.ServeHTTP(w, r)
	})
}

// guestAPIHandler is the service GuestApi (guest-agent.md §6). The host asks;
// what it may know is what a stranger may, and how the machine fares.
func (a *Agent) guestAPIHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/api/{method}", prpc.NewMux([]string{"GuestApi."},
		prpc.Unary("Info", a.guestInfo),
		prpc.Unary("SysInfo", func(context.Context, *emptypb.Empty) (*guestapi.SystemInfo, error) { return systemInfo(a.disks), nil }),
		prpc.Unary("NetworkInfo", func(context.Context, *emptypb.Empty) (*guestapi.NetworkInformation, error) { return networkInfo() }),
		prpc.Unary("ListContainers", a.listContainers),
		prpc.Unary("Shutdown", a.shutdown),
	))
	return mux
}

func (a *Agent) appInfo(context.Context, *emptypb.Empty) (*agentpb.AppInfo, error) {
	return a.withLease(a.state.Load().info.app), nil
}

func (a *Agent) publicInfo(context.Context, *emptypb.Empty) (*agentpb.AppInfo, error) {
	return a.withLease(a.state.Load().info.public), nil
}

func (a *Agent) workerVersion(context.Context, *emptypb.Empty) (*agentpb.WorkerVersion, error) {
	return &agentpb.WorkerVersion{Version: a.version, Rev: a.revision}, nil
}

// gpuEvidence is where boot leaves the evidence of the GPUs, if there are any; at
// most maxGPUEvidence bytes.
const (
	gpuEvidence    = "/run/nvidia-gpu-attestation/attestation.out"
	maxGPUEvidence = 8 << 20
)

// gpuInfo returns the file as it is: its hash is in the event gpu-attestation.
func (a *Agent) gpuInfo(context.Context, *emptypb.Empty) (*agentpb.GpuInfoResponse, error) {
	f, err := os.Open(a.gpuEvidence)
	if errors.Is(err, fs.ErrNotExist) {
		return &agentpb.GpuInfoResponse{}, nil
	}
	var text []byte
	if err == nil {
		defer f.Close()
		text, err = io.ReadAll(io.LimitReader(f, maxGPUEvidence+1))
	}
	if err == nil && (len(text) > maxGPUEvidence || !utf8.Valid(text)) {
		err = fmt.Errorf("%d bytes, or not text", len(text))
	}
	if err != nil { // upstream answers so, too
		a.log.Error("read the evidence of the GPUs", "error", err)
		return &agentpb.GpuInfoResponse{}, nil
	}
	return &agentpb.GpuInfoResponse{Attestation: string(text)}, nil
}

// appQuote makes evidence over bytes that an app chose. It proves nothing about
// who chose them: system evidence is made by serveEvidence only, over an
// envelope (threats.md B20).
func (c *caller) appQuote(ctx context.Context, data dstack.ReportData) (*attest.Evidence, error) {
	select {
	case c.quotes <- struct{}{}:
		defer func() { <-c.quotes }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return c.quote(ctx, data)
}

// pad64 pads an app's report data with zeros on the right.
func pad64(b []byte) (data dstack.ReportData, err error) {
	if len(b) > len(data) {
		return data, fault.New("report_data_length", "Report data is too long: %d bytes, allowed %d", len(b), len(data))
	}
	copy(data[:], b)
	return data, nil
}

func (c *caller) getQuote(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.GetQuoteResponse, error) {
	data, err := pad64(req.ReportData)
	if err != nil {
		return nil, err
	}
	ev, err := c.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	return c.quoteResponse(ev)
}

// quoteResponse is what GetQuote answers with (guest-agent.md §11.1): a quote and
// its log on TDX, which alone has them, and a container elsewhere.
func (a *Agent) quoteResponse(ev *attest.Evidence) (*agentpb.GetQuoteResponse, error) {
	resp := &agentpb.GetQuoteResponse{ReportData: ev.ReportData[:], VmConfig: a.vmConfig}
	var err error
	if ev.TEE != dstack.TDX {
		resp.Attestation, err = container.Encode(ev)
		return resp, err
	}
	resp.Quote = ev.Quote
	resp.EventLog, err = a.quoteLog(ev.EventLog)
	return resp, err
}

// appKeyAttestation is evidence over the public half of the key of Sign, for
// anyone. One answer serves all until the log changes.
func (a *Agent) appKeyAttestation(ctx context.Context, req *agentpb.GetAttestationForAppKeyRequest) (*agentpb.GetQuoteResponse, error) {
	data, err := a.appKeyData(req.Algorithm)
	if err != nil {
		return nil, err
	}
	return a.appKeys.get(a.state.Load(), data, func() (*agentpb.GetQuoteResponse, error) {
		if ok, wait := a.evidence.limit.take(); !ok {
			return nil, retryError{fault.New("evidence_rate_limited", "this instance is asked for evidence too often").
				WithFix("try again later"), wait}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), evidenceTimeout)
		defer cancel()
		ev, err := a.quote(ctx, data)
		if err != nil {
			a.log.Error("evidence of the app's key", "error", err)
			return nil, fault.New("evidence_unavailable", "this instance cannot make evidence now")
		}
		return a.quoteResponse(ev)
	})
}

// quoteCache remembers public answers of one log.
type quoteCache struct {
	mu      sync.Mutex
	of      *state
	answers map[dstack.ReportData]*agentpb.GetQuoteResponse
}

// get returns the answer for data, made by one caller at a time.
func (c *quoteCache) get(of *state, data dstack.ReportData, produce func() (*agentpb.GetQuoteResponse, error)) (*agentpb.GetQuoteResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of != of {
		c.of, c.answers = of, make(map[dstack.ReportData]*agentpb.GetQuoteResponse)
	}
	if resp := c.answers[data]; resp != nil {
		return resp, nil
	}
	resp, err := produce()
	if err == nil {
		c.answers[data] = resp
	}
	return resp, err
}

func (c *caller) attest(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.AttestResponse, error) {
	data, err := pad64(req.ReportData)
	if err != nil {
		return nil, err
	}
	ev, err := c.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	encoded, err := container.Encode(ev)
	return &agentpb.AttestResponse{Attestation: encoded}, err
}

// quoteLog is the event_log of an answer.
func (a *Agent) quoteLog(events []eventlog.Event) (string, error) {
	if a.wholeLog {
		text, err := eventlog.MarshalJSON(events)
		return string(text), err
	}
	return strippedLog(events)
}

// strippedLog is the event_log of GetQuote: boot events keep their digest and
// lose their payload, but for the marker of ACPI tables; runtime events of the
// first form keep their payload and lose their digest, which follows from it.
// V2 events keep both and the preimage, without which upstream's verifier
// refuses them (attestation.md §3.3, §3.4).
func strippedLog(events []eventlog.Event) (string, error) {
	out := make([]eventlog.Event, len(events))
	for i, e := range events {
		switch {
		case e.IsRuntime() && e.Version == 2:
			d := eventlog.Digest(e)
			e.Digest, e.Preimage = d[:], eventlog.PreimageOf(e)
		case e.IsRuntime():
			e.Digest = nil
		case string(e.Payload) != acpiMarker:
			e.Payload = nil
		}
		out[i] = e
	}
	text, err := eventlog.MarshalJSON(out)
	return string(text), err
}

// acpiMarker is the payload of the three boot events that measure ACPI tables.
const acpiMarker = "ACPI DATA"

// tdxQuote hashes the content under a tag (attestation.md §7.4).
func (c *caller) tdxQuote(ctx context.Context, req *agentpb.TdxQuoteArgs) (*agentpb.TdxQuoteResponse, error) {
	algorithm, prefix := req.HashAlgorithm, req.Prefix
	if algorithm == "" {
		algorithm = "sha512"
	}
	if prefix == "" {
		prefix = binding.TagAppData
	}
	if algorithm == binding.AlgorithmRaw {
		prefix = ""
	}
	data, err := binding.ReportDataWith(algorithm, prefix, req.ReportData)
	switch fault.Code(err) {
	case "":
	case "report_data_length": // upstream's words first: clients match on them
		return nil, fault.Wrap(err, "report_data_length", "invalid content length")
	case "report_data_algorithm":
		return nil, fault.Wrap(err, "report_data_algorithm", "invalid hash algorithm")
	}
	if err != nil {
		return nil, err
	}
	ev, err := c.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	resp := &agentpb.TdxQuoteResponse{HashAlgorithm: algorithm, Prefix: prefix}
	if c.tee != dstack.TDX {
		return resp, nil // no quote and no error, as upstream
	}
	resp.Quote = ev.Quote
	resp.EventLog, err = c.quoteLog(ev.EventLog)
	return resp, err
}

func (c *caller) rawQuote(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.TdxQuoteResponse, error) {
	return c.tdxQuote(ctx, &agentpb.TdxQuoteArgs{ReportData: req.ReportData, HashAlgorithm: binding.AlgorithmRaw})
}

func (a *Agent) guestInfo(ctx context.Context, _ *emptypb.Empty) (*guestapi.GuestInfo, error) {
	p := a.state.Load().info.public
	s := a.statuses.get(ctx, a.init)
	return &guestapi.GuestInfo{
		Version: a.version, AppId: p.AppId, InstanceId: p.InstanceId, AppCert: p.AppCert, TcbInfo: p.TcbInfo, DeviceId: p.DeviceId,
		BootPhase: s.Phase, Ready: s.Ready, Failed: s.Failed, Health: s.Health,
	}, nil
}

func (a *Agent) listContainers(ctx context.Context, _ *emptypb.Empty) (*guestapi.ListContainersResponse, error) {
	list, err := a.init.Containers(ctx)
	if err != nil {
		return nil, err
	}
	resp := new(guestapi.ListContainersResponse)
	for _, c := range list {
		resp.Containers = append(resp.Containers, &guestapi.Container{
			Id: c.ID, Names: c.Names, Image: c.Image, ImageId: c.ImageID, Created: c.Created, State: c.State, Status: c.Status,
		})
	}
	return resp, nil
}

func (a *Agent) shutdown(ctx context.Context, _ *emptypb.Empty) (*emptypb.Empty, error) {
	a.log.Info("the host asks for a shutdown")
	return nil, a.init.Shutdown(ctx, initrpc.ShutdownRequest{Reason: "the host asked over GuestApi"})
}
