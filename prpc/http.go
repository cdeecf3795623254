// SPDX-License-Identifier: Apache-2.0

package prpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	jsonType  = "application/json"
	protoType = "application/octet-stream"

	bodyTimeout  = time.Minute
	maxReply     = 64 << 20 // bytes that a client reads
	maxErrorText = 64 << 10
)

// Numbers of our own fields in the error message (upstream has message = 1 only).
const (
	errorMessageField = 1
	errorCodeField    = 1000
	errorFixField     = 1001
)

// ServeHTTP answers one call.
func (m *mux) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	asJSON := wantsJSON(r)
	if r.Method != http.MethodPost && r.Method != http.MethodGet {
		writeError(w, http.StatusNotFound, true, fmt.Errorf("%s is not answered here, POST and GET are", r.Method))
		return
	}
	name, method, ok := m.method(r.URL.Path)
	if !ok {
		writeError(w, http.StatusBadRequest, asJSON, fmt.Errorf("Service not found: %s", name))
		return
	}
	resp, err := call(w, r, method, asJSON)
	if err != nil {
		writeError(w, http.StatusBadRequest, asJSON, err)
		return
	}
	var body []byte
	if asJSON {
		body, err = MarshalJSON(resp)
	} else {
		body, err = proto.Marshal(resp)
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, asJSON, fmt.Errorf("encode response: %w", err))
		return
	}
	write(w, http.StatusOK, asJSON, body)
}

func call(w http.ResponseWriter, r *http.Request, method Method, asJSON bool) (proto.Message, error) {
	req := method.NewRequest()
	if req.ProtoReflect().Descriptor().FullName() != emptyName {
		if err := readRequest(w, r, asJSON, req); err != nil {
			return nil, err
		}
	}
	return method.Handle(r.Context(), req)
}

func readRequest(w http.ResponseWriter, r *http.Request, asJSON bool, req proto.Message) error {
	if r.Method == http.MethodGet {
		if err := unmarshalQuery(r.URL.RawQuery, req); err != nil {
			return fmt.Errorf("Failed to parse arguments: %w", err)
		}
		return nil
	}
	// Not every ResponseWriter knows deadlines; the real server's does.
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	rc.SetReadDeadline(time.Time{})
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return fault.New("request_too_large", "request body larger than %d bytes", MaxBody)
	}
	if err != nil {
		return fmt.Errorf("read request body: %w", err)
	}
	if asJSON {
		err = UnmarshalJSON(body, req)
	} else {
		err = proto.Unmarshal(body, req)
	}
	if err != nil {
		return fmt.Errorf("Failed to parse arguments: %w", err)
	}
	return nil
}

// wantsJSON decides the encoding of request and reply (guest-agent.md §2).
func wantsJSON(r *http.Request) bool {
	if r.Method == http.MethodGet {
		return true
	}
	for pair := range strings.SplitSeq(r.URL.RawQuery, "&") {
		switch pair {
		case "json", "json=", "json=1", "json=true":
			return true
		}
	}
	media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	return (err == nil || errors.Is(err, mime.ErrInvalidMediaParameter)) && media == jsonType
}

func write(w http.ResponseWriter, status int, asJSON bool, body []byte) {
	h := w.Header()
	h.Set("Content-Type", protoType)
	if asJSON {
		h.Set("Content-Type", jsonType)
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	w.Write(body) // the caller has gone if this fails, and nobody is left to tell
}

func writeError(w http.ResponseWriter, status int, asJSON bool, err error) {
	text, code, fix := err.Error(), fault.Code(err), fault.Fix(err)
	if asJSON {
		b := append([]byte("{\n  \"error\": "), appendString(nil, text)...)
		if code != "" {
			b = appendString(append(b, ",\n  \"code\": "...), code)
		}
		if fix != "" {
			b = appendString(append(b, ",\n  \"fix\": "...), fix)
		}
		write(w, status, true, append(b, "\n}"...))
		return
	}
	var b []byte
	for _, f := range []struct {
		n protowire.Number
		s string
	}{{errorMessageField, text}, {errorCodeField, code}, {errorFixField, fix}} {
		if f.s != "" {
			b = protowire.AppendString(protowire.AppendTag(b, f.n, protowire.BytesType), strings.ToValidUTF8(f.s, "\uFFFD"))
		}
	}
	write(w, status, false, b)
}

// Client calls methods of one service. The zero value of all fields but BaseURL is
// usable; it speaks protobuf.
type Client struct {
	// BaseURL is what precedes "/<Method>", such as "http://vmm/prpc".
	BaseURL string
	HTTP    *http.Client // nil means http.DefaultClient
	JSON    bool
}

// NewClient returns a client whose connections come from dial, such as a unix socket
// or a hostlink stream; the host in baseURL is then only what the Host header says.
func NewClient(baseURL string, dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{BaseURL: baseURL, HTTP: &http.Client{Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		IdleConnTimeout:    5 * time.Second, // below the server's, so that it is we who close
		DisableCompression: true,
	}}}
}

// Call calls a method and sets resp to the reply. A refusal by the server is a
// *fault.Error with the server's text, code and fix; its code is rpc_failed when the
// server gave none. A nil req stands for a message without fields, a nil resp for a
// reply that nobody reads.
func (c *Client) Call(ctx context.Context, method string, req, resp proto.Message) error {
	if req == nil {
		req = &emptypb.Empty{}
	}
	contentType, body, err := protoType, []byte(nil), error(nil)
	if c.JSON {
		contentType = jsonType
		body, err = MarshalJSON(req)
	} else {
		body, err = proto.Marshal(req)
	}
	if err != nil {
		return fmt.Errorf("call %s: encode request: %w", method, err)
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(c.BaseURL, "/")+"/"+method, strings.NewReader(string(body)))
	if err != nil {
		return fmt.Errorf("call %s: %w", method, err)
	}
	hr.Header.Set("Content-Type", contentType)
	client := c.HTTP
	if client == nil {
		client = http.DefaultClient
	}
	reply, err := client.Do(hr)
	if err != nil {
		return fmt.Errorf("call %s: %w", method, err)
	}
	defer reply.Body.Close()
	data, err := io.ReadAll(io.LimitReader(reply.Body, maxReply+1))
	if err != nil {
		return fmt.Errorf("call %s: read reply: %w", method, err)
	}
	if len(data) > maxReply {
		return fmt.Errorf("call %s: reply larger than %d bytes", method, maxReply)
	}
	if reply.StatusCode != http.StatusOK {
		return decodeError(method, reply, data)
	}
	if resp == nil {
		return nil
	}
	if c.JSON {
		err = UnmarshalJSON(data, resp)
	} else {
		err = proto.Unmarshal(data, resp)
	}
	if err != nil {
		return fmt.Errorf("call %s: decode reply: %w", method, err)
	}
	return nil
}

// decodeError reads an error reply in the encoding that the server says it has: a
// wrapper in front of the service may answer JSON to a protobuf call.
func decodeError(method string, reply *http.Response, data []byte) error {
	if len(data) > maxErrorText {
		data = data[:maxErrorText]
	}
	var e struct{ Error, Code, Fix string }
	media, _, _ := mime.ParseMediaType(reply.Header.Get("Content-Type"))
	switch media {
	case jsonType:
		json.Unmarshal(data, &e) // what does not decode leaves e.Error empty
	case protoType:
		for len(data) > 0 {
			num, typ, n := protowire.ConsumeTag(data)
			if n < 0 {
				break
			}
			data = data[n:]
			if n = protowire.ConsumeFieldValue(num, typ, data); n < 0 {
				break
			}
			if typ == protowire.BytesType {
				v, _ := protowire.ConsumeBytes(data)
				switch num {
				case errorMessageField:
					e.Error = string(v)
				case errorCodeField:
					e.Code = string(v)
				case errorFixField:
					e.Fix = string(v)
				}
			}
			data = data[n:]
		}
	}
	if e.Error == "" {
		return fault.New("rpc_failed", "%s: HTTP status %s", method, reply.Status)
	}
	if e.Code == "" {
		return fault.New("rpc_failed", "%s: %s", method, e.Error)
	}
	return &fault.Error{Code: e.Code, Message: e.Error, Fix: e.Fix}
}
