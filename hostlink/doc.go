// SPDX-License-Identifier: Apache-2.0

// Package hostlink carries all traffic between a host and one of its guests, other
// than the guest's own network, as named streams over a single byte pipe: a
// virtio-serial port or a vsock connection (design.md §3, "No TCP from guest to
// host"). The host serves "hostapi", "registry" and "tee"; the guest serves
// "guestapi". Either side opens streams that the other serves.
//
// # Wire
//
// Handshake, each message 16 bytes of magic and 16 of a nonce that the host draws
// for each connection:
//
//	host  → guest  hello ‖ nonce    repeated until answered
//	guest → host   reply ‖ nonce    once per nonce
//	host  → guest  go    ‖ nonce
//
// Both sides discard everything before the message they wait for: a virtio-serial
// port keeps what a former host process left in it, and nothing tells the guest's
// reader where one host ends and the next begins. Then follows yamux, the host being
// its client. Each yamux stream starts with one byte of length (1 to 32) and the
// name of the stream, answered by one byte: 0 accepted, 1 no such stream, 2 busy.
//
// # Guarantees
//
//   - A [Link] survives the restart of the host's process: it shakes hands again,
//     and Open and Listen go on. Streams of the old session end with
//     [ErrSessionLost], never with a clean EOF that would pass for a complete reply.
//   - A slow reader of one stream stalls that stream only (yamux windows, 256 KiB).
//   - A peer that is gone without a sign is found by keep-alive, see [Options].
//
// # Trust
//
// Neither side trusts the other: a guest's bytes must not take memory from the
// host's other guests, and the host is the adversary of the guest. The bytes of a
// handshake, the streams of each direction and in all, their buffers and the rate
// of pings are limited; breaking a limit of the session ends the session. The link
// proves nothing about who is at the other end and hides nothing from the host:
// what is secret or must be genuine is protected inside the streams.
package hostlink

import (
	"errors"
	"log/slog"
	"regexp"
	"time"
)

// Stream names in use.
const (
	StreamHostAPI  = "hostapi"  // host serves: prpc at /api/<Method>
	StreamRegistry = "registry" // host serves: OCI distribution, read only, over HTTP
	StreamTEE      = "tee"      // host serves: bytes to and from the simulated TEE
	StreamGuestAPI = "guestapi" // guest serves: prpc at /api/<Method>
	StreamConsole  = "console"
)

// Errors that callers distinguish.
var (
	// ErrNoStream says that the peer does not serve the name, perhaps not yet.
	ErrNoStream = errors.New("hostlink: the peer does not serve this stream")
	// ErrBusy says that this side or the peer has as many streams as it allows.
	ErrBusy = errors.New("hostlink: too many streams")
	// ErrSessionLost says that the connection to the peer ended under a stream.
	ErrSessionLost = errors.New("hostlink: connection to the peer lost")
	// ErrHandshake says that the peer sent other things than a handshake.
	ErrHandshake = errors.New("hostlink: no handshake")
)

// maxName is the length of a stream's name in bytes.
const maxName = 32

var nameRule = regexp.MustCompile(`^[a-z][a-z0-9._-]{0,31}$`)

// Options tune a session or link; the zero value is right for production.
type Options struct {
	// MaxStreams is how many streams the peer may have open to us at once, and we to
	// it; 0 means 64. Both sides should have the same.
	MaxStreams int
	// KeepAlive is the time between two pings; 0 means 5 s.
	KeepAlive time.Duration
	// Timeout is how long a ping may remain unanswered, or a write stuck, before the
	// session is given up; 0 means 20 s, since an emulated guest on a busy machine
	// can be that slow.
	Timeout time.Duration
	// HandshakeTimeout bounds one attempt of a Link; 0 means 30 s.
	HandshakeTimeout time.Duration
	// Log receives the comings and goings of a Link's sessions; nil means nowhere.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.MaxStreams <= 0 {
		o.MaxStreams = 64
	}
	if o.KeepAlive <= 0 {
		o.KeepAlive = 5 * time.Second
	}
	if o.Timeout <= 0 {
		o.Timeout = 20 * time.Second
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}
