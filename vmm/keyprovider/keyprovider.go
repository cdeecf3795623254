// SPDX-License-Identifier: Apache-2.0

// Package keyprovider carries a guest's quote to the local key provider, an SGX
// enclave on the same machine, and its answer back (spec/kms.md §5.2, vmm.md §9.3).
//
// The VMM is a postman: the enclave checks the quote and seals the key to a public
// key in it, and the guest checks the enclave's own quote. Nothing here is secret,
// and a lie costs availability.
//
// Guarantees: a quote has at most [MaxQuote] bytes and an answer at most [MaxFrame];
// a call ends within [Timeout]; at most [MaxConnections] are under way; an answer is
// parsed strictly, and each failure has a code.
//
// Attacker-controlled: the quote (the guest), and every byte of the answer.
package keyprovider

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of the protocol.
const (
	MaxFrame       = 8 << 20 // bytes of JSON, at least 1
	MaxQuote       = 1 << 20
	MaxConnections = 32
	Timeout        = 30 * time.Second
)

// maxKey bounds the sealed key: a sealed box adds 48 bytes to 32.
const maxKey = 4096

// Client talks to one provider.
type Client struct {
	addr    string
	timeout time.Duration
	slots   chan struct{}
}

// New returns a client of the provider at addr, "HOST:PORT".
func New(addr string) *Client {
	return &Client{addr: addr, timeout: Timeout, slots: make(chan struct{}, MaxConnections)}
}

// Key is a provider's answer.
type Key struct {
	Encrypted []byte // sealed box to the first 32 bytes of the quote's report data
	Quote     []byte // of the provider, over the sealed box
}

// SealingKey asks for the key that belongs to a TDX quote.
//
// Codes: sealing_quote_invalid, key_provider_busy, key_provider_unreachable,
// key_provider_timeout, key_provider_answer, key_provider_refused.
func (c *Client) SealingKey(ctx context.Context, quote []byte) (*Key, error) {
	if len(quote) == 0 || len(quote) > MaxQuote {
		return nil, fault.New("sealing_quote_invalid", "a quote of %d bytes, want 1 to %d", len(quote), MaxQuote)
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	default:
		return nil, fault.New("key_provider_busy", "%d guests wait for the local key provider already", MaxConnections).WithFix("try again in a moment")
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", c.addr)
	if err != nil {
		return nil, c.failed(ctx, err, "key_provider_unreachable", "connect to")
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.Write(request(quote)); err != nil {
		return nil, c.failed(ctx, err, "key_provider_unreachable", "write to")
	}
	var head [4]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, c.failed(ctx, err, "key_provider_answer", "read from")
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > MaxFrame {
		return nil, fault.New("key_provider_answer", "the local key provider announces an answer of %d bytes, want 1 to %d", n, MaxFrame)
	}
	// What is announced is not allocated before it has come.
	var body bytes.Buffer
	if _, err := io.CopyN(&body, conn, int64(n)); err != nil {
		return nil, c.failed(ctx, err, "key_provider_answer", "read from")
	}
	return answer(body.Bytes())
}

// failed says why the connection did not work out.
func (c *Client) failed(ctx context.Context, err error, code, doing string) error {
	const fix = "start the local key provider on this machine (it needs SGX), or set key_provider in the VMM's configuration"
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fault.New("key_provider_timeout", "the local key provider at %s did not answer within %v", c.addr, c.timeout).WithFix(fix)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fault.Wrap(err, code, "%s the local key provider at %s", doing, c.addr).WithFix(fix)
}

// request is a frame with {"quote":[1,2,…]}: the provider's JSON has bytes as
// arrays of numbers.
func request(quote []byte) []byte {
	b := make([]byte, 4, 4*len(quote)+16)
	b = append(b, `{"quote":[`...)
	for i, v := range quote {
		if i > 0 {
			b = append(b, ',')
		}
		b = strconv.AppendUint(b, uint64(v), 10)
	}
	b = append(b, `]}`...)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// numbers are bytes as an array of numbers. That the text is JSON was checked.
type numbers []byte

// UnmarshalJSON accepts numbers from 0 to 255 only.
func (n *numbers) UnmarshalJSON(data []byte) error {
	data = bytes.TrimSpace(data)
	if len(data) < 2 || data[0] != '[' || data[len(data)-1] != ']' {
		return errors.New("not an array of numbers")
	}
	out := numbers{}
	body := bytes.TrimSpace(data[1 : len(data)-1])
	for len(body) > 0 {
		text, rest, _ := bytes.Cut(body, []byte(","))
		v, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 8)
		if err != nil {
			return fmt.Errorf("element %d is not a byte", len(out))
		}
		out, body = append(out, byte(v)), rest
	}
	*n = out
	return nil
}

// answer parses {"encrypted_key":[…],"provider_quote":[…]}. Codes:
// key_provider_answer, key_provider_refused.
func answer(data []byte) (*Key, error) {
	var in struct {
		Key   numbers `json:"encrypted_key"`
		Quote numbers `json:"provider_quote"`
		Error string  `json:"error"`
	}
	if err := strictjson.Decode(data, &in, strictjson.Limits{Size: MaxFrame, Depth: 4, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "key_provider_answer", "the answer of the local key provider")
	}
	switch {
	case len(in.Key) == 0 && in.Error != "":
		return nil, fault.New("key_provider_refused", "the local key provider refuses: %.300q", in.Error).WithFix("look at the log of the local key provider")
	case len(in.Key) == 0 || len(in.Key) > maxKey:
		return nil, fault.New("key_provider_answer", "the local key provider gives a key of %d bytes, want 1 to %d", len(in.Key), maxKey)
	case len(in.Quote) == 0 || len(in.Quote) > MaxQuote:
		return nil, fault.New("key_provider_answer", "the local key provider gives a quote of %d bytes, want 1 to %d", len(in.Quote), MaxQuote)
	}
	return &Key{in.Key, in.Quote}, nil
}
