// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net/http"
	"strings"

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

// unavailable makes methods that exist upstream and not here yet.
func unavailable(names ...string) []prpc.Method {
	var methods []prpc.Method
	for _, name := range names {
		methods = append(methods, prpc.Method{
			Name:       name,
			NewRequest: func() proto.Message { return new(emptypb.Empty) }, // arguments are not looked at
			Handle: func(context.Context, proto.Message) (proto.Message, error) {
				return nil, fault.New("not_available", "%s is not available in this build: arrives with keys", name)
			},
		})
	}
	return methods
}

// dstackMethods is the service DstackGuest (guest-agent.md §3).
func (a *Agent) dstackMethods() []prpc.Method {
	return append(unavailable("GetTlsKey", "GetKey", "Sign", "Verify", "EmitEvent"),
		prpc.Unary("Info", a.appInfo),
		prpc.Unary("Version", a.workerVersion),
		prpc.Unary("GetQuote", a.getQuote),
		prpc.Unary("Attest", a.attest),
		prpc.Unary("GpuInfo", a.gpuInfo),
	)
}

func (a *Agent) dstackHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/{method}", prpc.NewMux([]string{"DstackGuest."}, a.dstackMethods()...))
	return mux
}

// tappdHandler is the service Tappd (guest-agent.md §4), with the methods of
// DstackGuest as well: the SDKs' tappd clients inherit them.
func (a *Agent) tappdHandler() http.Handler {
	methods := append(a.dstackMethods(), unavailable("DeriveKey", "DeriveK256Key")...)
	methods = append(methods,
		prpc.Unary("TdxQuote", a.tdxQuote),
		prpc.Unary("RawQuote", a.rawQuote),
	)
	mux := http.NewServeMux()
	mux.Handle("/prpc/{method}", prpc.NewMux([]string{"Tappd."}, methods...))
	return mux
}

// externalHandler is what strangers see (guest-agent.md §5, §12).
func (a *Agent) externalHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/{method}", prpc.NewMux([]string{"Worker."}, append(unavailable("GetAttestationForAppKey"),
		prpc.Unary("Info", a.publicInfo),
		prpc.Unary("Version", a.workerVersion),
	)...))
	mux.HandleFunc(evidencePath, a.serveEvidence)
	mux.HandleFunc("GET /{$}", a.serveDashboard)
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
	return a.info.app, nil
}

func (a *Agent) publicInfo(context.Context, *emptypb.Empty) (*agentpb.AppInfo, error) {
	return a.info.public, nil
}

func (a *Agent) workerVersion(context.Context, *emptypb.Empty) (*agentpb.WorkerVersion, error) {
	return &agentpb.WorkerVersion{Version: a.version, Rev: a.revision}, nil
}

// gpuInfo answers as upstream does in a guest without GPU attestation.
func (a *Agent) gpuInfo(context.Context, *emptypb.Empty) (*agentpb.GpuInfoResponse, error) {
	return &agentpb.GpuInfoResponse{}, nil
}

// appQuote makes evidence over bytes that an app chose. It proves nothing about
// who chose them: system evidence is made by serveEvidence only, over an
// envelope (threats.md B20).
func (a *Agent) appQuote(ctx context.Context, data dstack.ReportData) (*attest.Evidence, error) {
	select {
	case a.appQuotes <- struct{}{}:
		defer func() { <-a.appQuotes }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return a.quote(ctx, data)
}

// pad64 pads an app's report data with zeros on the right.
func pad64(b []byte) (data dstack.ReportData, err error) {
	if len(b) > len(data) {
		return data, fault.New("report_data_length", "Report data is too long: %d bytes, allowed %d", len(b), len(data))
	}
	copy(data[:], b)
	return data, nil
}

func (a *Agent) getQuote(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.GetQuoteResponse, error) {
	data, err := pad64(req.ReportData)
	if err != nil {
		return nil, err
	}
	ev, err := a.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	resp := &agentpb.GetQuoteResponse{ReportData: data[:], VmConfig: a.vmConfig}
	if a.tee != dstack.TDX {
		// guest-agent.md §11.1: only TDX has a quote of its own here.
		resp.Attestation, err = container.Encode(ev)
		return resp, err
	}
	resp.Quote = ev.Quote
	resp.EventLog, err = strippedLog(a.events)
	return resp, err
}

func (a *Agent) attest(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.AttestResponse, error) {
	data, err := pad64(req.ReportData)
	if err != nil {
		return nil, err
	}
	ev, err := a.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	c, err := container.Encode(ev)
	return &agentpb.AttestResponse{Attestation: c}, err
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
func (a *Agent) tdxQuote(ctx context.Context, req *agentpb.TdxQuoteArgs) (*agentpb.TdxQuoteResponse, error) {
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
	ev, err := a.appQuote(ctx, data)
	if err != nil {
		return nil, err
	}
	resp := &agentpb.TdxQuoteResponse{HashAlgorithm: algorithm, Prefix: prefix}
	if a.tee != dstack.TDX {
		return resp, nil // no quote and no error, as upstream
	}
	resp.Quote = ev.Quote
	resp.EventLog, err = strippedLog(a.events)
	return resp, err
}

func (a *Agent) rawQuote(ctx context.Context, req *agentpb.RawQuoteArgs) (*agentpb.TdxQuoteResponse, error) {
	return a.tdxQuote(ctx, &agentpb.TdxQuoteArgs{ReportData: req.ReportData, HashAlgorithm: binding.AlgorithmRaw})
}

func (a *Agent) guestInfo(context.Context, *emptypb.Empty) (*guestapi.GuestInfo, error) {
	p := a.info.public
	return &guestapi.GuestInfo{
		Version: a.version, AppId: p.AppId, InstanceId: p.InstanceId, AppCert: p.AppCert, TcbInfo: p.TcbInfo, DeviceId: p.DeviceId,
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
