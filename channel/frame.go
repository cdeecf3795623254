// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// MaxEvidence bounds a container in bytes, in a channel's handshake and in a
// certificate (threats.md B15).
const MaxEvidence = 1 << 20

const (
	nonceSize = 32
	maxHello  = 4 << 10
	maxCode   = 64 // bytes of a refusal's code
)

// frameKind is what one message of the handshake is.
type frameKind byte

const (
	frameHello    frameKind = 1 // nonce and intended identity
	frameEvidence frameKind = 2 // container
	frameAccept   frameKind = 3 // empty: the sender accepted the receiver
	frameRefuse   frameKind = 4 // error code of the sender
)

func (k frameKind) limit() int {
	return map[frameKind]int{frameHello: maxHello, frameEvidence: MaxEvidence, frameRefuse: maxCode}[k]
}

// writeFrame writes kind as one byte, the length of the payload as u32
// big-endian, and the payload, in one piece.
func writeFrame(w io.Writer, kind frameKind, payload []byte) error {
	head := binary.BigEndian.AppendUint32([]byte{byte(kind)}, uint32(len(payload)))
	if _, err := w.Write(slices.Concat(head, payload)); err != nil {
		return fault.Wrap(err, "channel_broken", "write to the peer")
	}
	return nil
}

// readFrame reads one frame, which must be of the wanted kind; not a byte beyond
// it is read. A refusal is an error of its own. Memory grows with what arrives,
// not with what is announced.
//
// Codes: channel_broken, channel_protocol, channel_frame_too_large,
// channel_refused.
func readFrame(r io.Reader, want frameKind) ([]byte, error) {
	broke := func(err error) ([]byte, error) {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fault.Wrap(err, "channel_broken", "read from the peer")
	}
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return broke(err)
	}
	kind, n := frameKind(head[0]), binary.BigEndian.Uint32(head[1:])
	switch {
	case kind != want && kind != frameRefuse:
		return nil, fault.New("channel_protocol", "the peer sent a frame of kind %d, expected kind %d", kind, want)
	case int64(n) > int64(kind.limit()):
		return nil, fault.New("channel_frame_too_large", "the peer announces a frame of %d bytes, more than %d", n, kind.limit())
	}
	var payload bytes.Buffer
	if _, err := io.CopyN(&payload, r, int64(n)); err != nil {
		return broke(err)
	}
	if kind == frameRefuse {
		return nil, refusedBy(payload.String())
	}
	return payload.Bytes(), nil
}

// refusedBy makes an error of the peer's code, which may be anything.
func refusedBy(code string) error {
	word := strings.Trim(code, "abcdefghijklmnopqrstuvwxyz0123456789_") == "" && code != ""
	if !word {
		code = "no reason that can be shown"
	}
	return fault.New("channel_refused", "the peer refused this end: %s", code).
		WithFix("see the peer's log")
}

// hello is the first message of each end.
type hello struct {
	nonce    [nonceSize]byte
	demand   bool   // the sender wants evidence of the receiver
	intended []byte // encoding of whom the sender means; empty without a demand
}

// encode returns nonce (32 bytes) ‖ demand (0 or 1) ‖ intended identity.
func (h hello) encode() []byte {
	out := append(h.nonce[:], 0)
	if h.demand {
		out[nonceSize] = 1
	}
	return append(out, h.intended...)
}

func decodeHello(data []byte) (h hello, err error) {
	if len(data) <= nonceSize || data[nonceSize] > 1 {
		return hello{}, fault.New("channel_protocol", "the peer's hello is malformed")
	}
	copy(h.nonce[:], data)
	h.demand, h.intended = data[nonceSize] == 1, data[nonceSize+1:]
	if !h.demand && len(h.intended) > 0 {
		return hello{}, fault.New("channel_protocol", "the peer's hello names an intended identity without asking for evidence")
	}
	if h.demand {
		_, err = decodeIntended(h.intended)
	}
	return h, err
}
