// SPDX-License-Identifier: Apache-2.0

// Package sim is the guest's client of a simulated TEE (package simtee). It is
// for development: evidence obtained through it verifies under roots made on the
// developer's machine only, and proves nothing about hardware.
//
// Only the sim flavour of the image links it (build tag dstack_sim in
// cmd/dstack-guest); a production guest has no trace of it and cannot be talked
// into using it (threats.md B13, B14).
//
// The simulated TEE lives outside the guest, in a process of its own. The client
// reaches it by HTTP/1.1 over the hostlink stream [Stream]; the message types here
// are the wire contract of both sides:
//
//	POST /quote     QuoteRequest   -> QuoteReply
//	POST /extend    ExtendRequest  -> {}, only after the new value is durable
//	GET  /bootlog                  -> BootLogReply
//	GET  /registers                -> RegistersReply
//
// Byte strings are lowercase hexadecimal. Any other status than 200 comes with an
// ErrorReply. What the host answers is bounded and parsed strictly, since in a
// test setup, too, the guest must not be felled by what its host says.
package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Stream is the name of the hostlink stream that leads to the simulated TEE.
const Stream = "tee"

// MaxRequest bounds a request body, and maxReply a reply, in bytes.
const (
	MaxRequest = 64 << 10
	maxReply   = 2 << 20
)

type (
	// QuoteRequest asks for a quote over 64 bytes.
	QuoteRequest struct {
		ReportData dstack.ReportData `json:"report_data"`
	}
	// QuoteReply holds a TDX quote, version 4.
	QuoteReply struct {
		Quote collateral.Hex `json:"quote"`
	}
	// ExtendRequest extends register 2 or 3.
	ExtendRequest struct {
		Register int                `json:"register"`
		Digest   dstack.Measurement `json:"digest"`
	}
	// BootLogReply holds the launch events, imr 0 to 2.
	BootLogReply struct {
		Events []eventlog.Event `json:"events"`
	}
	// RegistersReply holds the current registers.
	RegistersReply struct {
		MRTD dstack.Measurement    `json:"mrtd"`
		RTMR [4]dstack.Measurement `json:"rtmr"`
	}
	// ErrorReply says why a request was refused. The code is one of package fault.
	ErrorReply struct {
		Error string `json:"error"`
		Code  string `json:"code,omitempty"`
	}
)

// Driver finds the simulated TEE behind the hostlink.
func Driver() collect.Driver {
	return collect.Driver{Name: "simulated TDX", Open: open}
}

func open(ctx context.Context, env collect.Env) (collect.TEE, error) {
	if env.Dial == nil {
		return nil, collect.ErrAbsent
	}
	conn, err := env.Dial(ctx, Stream)
	if err != nil {
		// A host that was not told to simulate does not serve the stream.
		return nil, fmt.Errorf("%w: %w", collect.ErrAbsent, err)
	}
	conn.Close()
	c := New(func(ctx context.Context) (net.Conn, error) { return env.Dial(ctx, Stream) })
	if _, err := c.Registers(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Client talks to one simulated TEE. It is safe for concurrent use.
type Client struct{ http *http.Client }

var (
	_ collect.TEE      = (*Client)(nil)
	_ collect.Extender = (*Client)(nil)
	_ collect.Logger   = (*Client)(nil)
)

// New returns a client that connects through dial.
func New(dial func(ctx context.Context) (net.Conn, error)) *Client {
	return &Client{http: &http.Client{
		Transport: &http.Transport{
			DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			MaxConnsPerHost: 4,
			// A stream per request: a kept one could be found dead only after an extend
			// was written to it, and an extend must not be sent twice.
			DisableKeepAlives:      true,
			ResponseHeaderTimeout:  30 * time.Second,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       time.Minute,
	}}
}

// Kind is TDX: the evidence has its form.
func (c *Client) Kind() dstack.TEE { return dstack.TDX }

// Quote returns a TDX quote, version 4, signed under the development roots.
func (c *Client) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	var reply QuoteReply
	if err := c.call(ctx, http.MethodPost, "/quote", QuoteRequest{data}, &reply); err != nil {
		return nil, err
	}
	if len(reply.Quote) == 0 {
		return nil, fault.New("tee_reply", "simulated TEE returned an empty quote")
	}
	return reply.Quote, nil
}

// Extend extends register 2 or 3. An error after the request was sent leaves it
// open whether the register was extended; [Client.Registers] tells.
func (c *Client) Extend(ctx context.Context, register int, digest dstack.Measurement) error {
	return c.call(ctx, http.MethodPost, "/extend", ExtendRequest{register, digest}, &struct{}{})
}

// BootLog returns the launch events.
func (c *Client) BootLog(ctx context.Context) ([]eventlog.Event, error) {
	var reply BootLogReply
	if err := c.call(ctx, http.MethodGet, "/bootlog", nil, &reply); err != nil {
		return nil, err
	}
	if len(reply.Events) > eventlog.MaxEvents {
		return nil, fault.New("tee_reply", "simulated TEE returned %d boot events", len(reply.Events))
	}
	for i, e := range reply.Events {
		if e.IMR > 2 {
			return nil, fault.New("tee_reply", "boot event %d of the simulated TEE is for register %d", i, e.IMR)
		}
	}
	return reply.Events, nil
}

// Registers returns the registers as they are.
func (c *Client) Registers(ctx context.Context) (*RegistersReply, error) {
	var reply RegistersReply
	if err := c.call(ctx, http.MethodGet, "/registers", nil, &reply); err != nil {
		return nil, err
	}
	return &reply, nil
}

func (c *Client) call(ctx context.Context, method, path string, request, reply any) error {
	var body io.Reader
	if request != nil {
		text, err := json.Marshal(request)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://tee"+path, body)
	if err != nil {
		return err
	}
	if request != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the simulated TEE: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxReply+1))
	if err != nil {
		return fmt.Errorf("read the simulated TEE's reply: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		var refusal ErrorReply
		if strictjson.Decode(text, &refusal, strictjson.Limits{Size: 64 << 10, Depth: 4, Unknown: true}) != nil || refusal.Error == "" {
			return fault.New("tee_reply", "simulated TEE answers %s with status %d", path, resp.StatusCode)
		}
		if len(refusal.Code) == 0 || len(refusal.Code) > 40 || strings.Trim(refusal.Code, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
			refusal.Code = "tee_reply"
		}
		return fault.New(refusal.Code, "simulated TEE refuses %s: %.200q", path, refusal.Error)
	}
	if err := strictjson.Decode(text, reply, strictjson.Limits{Size: maxReply, Depth: 8}); err != nil {
		return fault.Wrap(err, "tee_reply", "reply of the simulated TEE to %s", path)
	}
	return nil
}
