// SPDX-License-Identifier: Apache-2.0

// Package initrpc is the privilege boundary inside the guest: how the
// unprivileged agent asks init, PID 1, for the few things that need privilege.
//
// Init holds the TEE, the runtime register, the container engine's socket and
// the power switch. The agent, which parses bytes from the network and from
// every container, holds none of them. It inherits one end of a socket pair and
// may ask for a quote, an event, the list and the output of containers, the status
// and a shutdown ([Init]); nothing else. What it needs to know it reads once from a
// sealed memfd ([Config]), and the sockets it serves were bound by init
// ([Spawn]).
//
// Init's side ([Serve]) treats the agent as hostile: frames are bounded,
// requests in flight are bounded, quotes are serialised (upstream's driver and
// ours allow no concurrency, guest-agent.md §11.1), event names that carry
// identity are refused ([Reserved], threats.md B09). The agent trusts init.
//
// # Frames
//
// Both directions carry frames: u32 big-endian length n, then n bytes of JSON,
// 2 ≤ n ≤ [MaxFrame]. A request is {"id","method","params"}; a response is
// {"id","result"} or {"id","error":{"code","message","fix"}}. Ids are chosen by
// the agent; an id that is still in flight may not be used again, except by the
// method "cancel", which cancels the request of that id and has no response of
// its own.
//
// A container's output is pulled: logs-open names a stream, logs-read waits for the
// next bytes of it, logs-close ends it. Who does not read holds up nobody but the
// stream, and streams are few ([MaxLogs]) and end when nobody reads them.
package initrpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of the protocol.
const (
	MaxFrame     = 1 << 20 // bytes of JSON in one frame
	MaxInFlight  = 32      // requests that init works on at a time
	MaxEventName = 128     // bytes
	MaxPayload   = 64 << 10
	MaxQuote     = 256 << 10
	MaxContainer = 1024 // containers in one list
	MaxLogs      = 8    // streams of container output at a time
	maxMessage   = 4 << 10
	maxLogRead   = 64 << 10 // bytes in one answer to logs-read
	maxLogName   = 255
)

// Init is what init does for the agent. Implementations may be called from
// several goroutines at once, except Quote, which [Serve] calls one at a time.
type Init interface {
	// Quote returns hardware evidence over exactly these 64 bytes.
	Quote(ctx context.Context, data dstack.ReportData) ([]byte, error)

	// Extend extends the runtime register by one application event and
	// returns it as it was logged. Names for which [Reserved] holds never
	// reach it.
	Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error)

	// Containers asks the container engine for all containers, running or not.
	Containers(ctx context.Context) ([]Container, error)

	// Shutdown begins to power off the guest and returns at once.
	Shutdown(ctx context.Context, request ShutdownRequest) error

	// Lease tells what became of the KMS's lease. Whether the app goes on is init's to
	// decide, by the manifest.
	Lease(ctx context.Context, change LeaseChange) error

	// Tunnel changes the tunnel to the app's gateways, if asked to, and tells how it is.
	// Its private key is init's alone.
	Tunnel(ctx context.Context, change TunnelChange) (TunnelStatus, error)

	// Status says how far boot has come.
	Status(ctx context.Context) (Status, error)

	// Logs opens what a container has written. [Serve] calls it for containers by
	// name or id as the engine knows them, and closes what it returns.
	Logs(ctx context.Context, request LogsRequest) (Logs, error)
}

// Container is one container as the engine describes it; field for field the
// message guest_api.Container (guest-agent.md §6).
type Container struct {
	ID      string   `json:"id"`
	Names   []string `json:"names"` // with the engine's leading slash
	Image   string   `json:"image"`
	ImageID string   `json:"image_id"`
	Created int64    `json:"created"` // Unix seconds
	State   string   `json:"state"`   // running, exited, …
	Status  string   `json:"status"`  // Up 3 minutes, …
}

// ShutdownRequest says who asked; it is logged, nothing else.
type ShutdownRequest struct {
	Reason string `json:"reason"`
}

// States of a lease (design.md §7).
const (
	LeaseHeld  = "held"
	LeaseGrace = "grace" // held, and its renewal fails
	LeaseLost  = "lost"  // ended: no new keys
)

// LeaseChange is a change of a lease's state.
type LeaseChange struct {
	State  string    `json:"state"`
	Until  time.Time `json:"until"`            // when it ends or ended
	Reason string    `json:"reason,omitempty"` // why it was not renewed
}

// MaxPeers is the most gateways of a tunnel, and of its own addresses.
const MaxPeers = 16

// TunnelChange is how the tunnel is to be from now on, as a whole.
type TunnelChange struct {
	Set       bool         `json:"set"`                 // false only asks
	Addresses []netip.Addr `json:"addresses,omitempty"` // the guest's own, IPv4
	Peers     []TunnelPeer `json:"peers,omitempty"`
}

// TunnelPeer is a gateway.
type TunnelPeer struct {
	Key      []byte         `json:"key"`     // X25519, 32 bytes
	Address  netip.Addr     `json:"address"` // its own in the tunnel, IPv4
	Endpoint netip.AddrPort `json:"endpoint"`
}

// Check refuses what no tunnel can be; code tunnel_malformed.
func (c *TunnelChange) Check() error {
	bad := func(format string, args ...any) error { return fault.New("tunnel_malformed", format, args...) }
	if len(c.Peers) > MaxPeers || len(c.Addresses) > MaxPeers {
		return bad("%d peers and %d addresses, more than %d", len(c.Peers), len(c.Addresses), MaxPeers)
	}
	own := func(a netip.Addr) bool {
		return a.Is4() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
	}
	seen := map[netip.Addr]bool{}
	keys := map[string]bool{}
	for _, a := range c.Addresses {
		if !own(a) || seen[a] {
			return bad("%s is no address of this guest's in the tunnel, or there twice", a)
		}
		seen[a] = true
	}
	for _, p := range c.Peers {
		switch {
		case len(p.Key) != 32 || keys[string(p.Key)]:
			return bad("a key of %d bytes, or there twice", len(p.Key))
		case !own(p.Address) || seen[p.Address]:
			return bad("%s is no gateway's address in the tunnel, or there twice", p.Address)
		case !p.Endpoint.IsValid() || p.Endpoint.Port() == 0 || p.Endpoint.Addr().Zone() != "" || p.Endpoint.Addr().IsUnspecified() || p.Endpoint.Addr().IsMulticast():
			return bad("%s is no endpoint", p.Endpoint)
		}
		seen[p.Address], keys[string(p.Key)] = true, true
	}
	return nil
}

// TunnelStatus is how the tunnel is.
type TunnelStatus struct {
	Key        []byte            `json:"key"` // its public key, X25519
	Handshakes []TunnelHandshake `json:"handshakes,omitempty"`
}

// TunnelHandshake is when a gateway was last heard of; Unix seconds, 0 for never.
type TunnelHandshake struct {
	Key []byte `json:"key"`
	At  int64  `json:"at"`
}

// Status is the state of boot and of what it started.
type Status struct {
	Phase  string `json:"phase"`            // name of the current or last phase of guest/boot
	Ready  bool   `json:"ready"`            // the workload was started
	Failed string `json:"failed,omitempty"` // "CODE: message" of the phase that failed
	Health string `json:"health,omitempty"` // JSON of the engine's watcher, or empty
}

// LogsRequest says which part of a container's output is wanted.
type LogsRequest struct {
	Container  string `json:"container"`
	Since      int64  `json:"since,omitempty"` // Unix seconds; 0: from the beginning
	Until      int64  `json:"until,omitempty"` // Unix seconds; 0: to the end
	Tail       int    `json:"tail"`            // lines from the end; negative: all
	Follow     bool   `json:"follow,omitempty"`
	Timestamps bool   `json:"timestamps,omitempty"`
}

// Logs is a container's output.
type Logs struct {
	// Framed says that the stream has the engine's frames: a byte for the channel
	// (0 to 3), three zeros, u32 big-endian length, bytes. Without it (a container
	// with a terminal) the stream is the bytes alone.
	Framed bool
	Stream io.ReadCloser
}

// Reserved reports whether an application may not emit an event of this name:
// one of those by which the system commits its identity (attestation.md §3.5), or
// one with a colon, which the V1 digest cannot tell from its separator.
func Reserved(name string) bool {
	return eventlog.Reserved(name) || strings.Contains(name, ":")
}

// Methods on the wire.
const (
	methodQuote      = "quote"
	methodExtend     = "extend"
	methodContainers = "containers"
	methodShutdown   = "shutdown"
	methodLease      = "lease"
	methodTunnel     = "tunnel"
	methodStatus     = "status"
	methodReady      = "ready"
	methodCancel     = "cancel"
	methodLogsOpen   = "logs-open"
	methodLogsRead   = "logs-read"
	methodLogsClose  = "logs-close"
)

type request struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

type response struct {
	ID     uint64          `json:"id"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *wireError      `json:"error,omitempty"`
}

type wireError struct {
	Code    string `json:"code,omitempty"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
}

type quoteParams struct {
	ReportData dstack.ReportData `json:"report_data"`
}

type quoteResult struct {
	Quote []byte `json:"quote"` // base64, as encoding/json has it
}

type extendParams struct {
	Name    string `json:"name"`
	Payload []byte `json:"payload"`
}

type extendResult struct {
	Event eventlog.Event `json:"event"`
}

type logsOpenResult struct {
	Stream uint64 `json:"stream"`
	Framed bool   `json:"framed"`
}

type logsParams struct {
	Stream uint64 `json:"stream"`
}

type logsReadResult struct {
	Data []byte `json:"data"`
	End  bool   `json:"end,omitempty"` // after Data
}

type containersResult struct {
	Containers []Container `json:"containers"`
}

func toWire(err error) *wireError {
	w := &wireError{Code: fault.Code(err), Message: err.Error(), Fix: fault.Fix(err)}
	if w.Code == "" && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		w.Code = "cancelled"
	}
	if len(w.Message) > maxMessage {
		w.Message = strings.ToValidUTF8(w.Message[:maxMessage], "") + "…"
	}
	return w
}

func (w *wireError) err(method string) error {
	if w.Code == "" {
		return fmt.Errorf("init: %s: %s", method, w.Message)
	}
	e := fault.New(w.Code, "%s", w.Message)
	if w.Fix != "" {
		e = e.WithFix("%s", w.Fix)
	}
	return e
}
