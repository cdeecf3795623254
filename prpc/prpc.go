// SPDX-License-Identifier: Apache-2.0

// Package prpc is upstream dstack's RPC dialect: HTTP/1.1 in which the last segment
// of the path names the method and the body is one message, as protobuf or as JSON
// (spec guest-agent.md §2, vmm.md §3.2).
//
//	mux := prpc.NewMux([]string{"Vmm.", "Teepod."}, prpc.Unary("Status", status), …)
//	http.Handle("/prpc/", mux)
//	prpc.Server(http.DefaultServeMux).Serve(listener)
//
//	c := prpc.Client{BaseURL: "http://vmm/prpc"}
//	err := c.Call(ctx, "Status", &vmm.StatusRequest{}, &resp)
//
// # Dialect
//
// Clients in the field depend on details, each of which has a test:
//
//   - JSON is used when the method is GET, when the query has json, json=1 or
//     json=true, or when Content-Type is application/json; else protobuf.
//   - JSON names are the proto names. Bytes are lowercase hexadecimal (input: any
//     case, any number of leading 0x). 64-bit integers are plain numbers. Output
//     has every field in order of declaration; unset optional fields are null. It
//     is therefore not protojson.
//   - Replies carry Content-Length and JSON is pure ASCII: the JavaScript SDK reads
//     neither chunked replies nor lengths in other units than UTF-16.
//   - Every failure is status 400, {"error": "…"} or a protobuf message with the
//     text in field 1. Ours adds "code" and "fix" (fields 1000 and 1001) when the
//     error has them (package fault); others ignore those.
//
// # Trust
//
// Requests are attacker-controlled. Bodies are limited to [MaxBody] bytes, queries
// to 1000 parameters, header and body must arrive in time. Who may call is for the
// handler or a wrapper to decide: nothing here authenticates. Error texts go to the
// caller, so handlers must not put secrets into them.
package prpc

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
)

// MaxBody bounds the body of a request, in bytes (10 MiB, upstream's limit).
const MaxBody = 10 << 20

// Method is one method of a service.
type Method struct {
	// Name is the bare name, such as "GetKey".
	Name string
	// NewRequest returns an empty request. For a google.protobuf.Empty the body of
	// the HTTP request is not parsed at all.
	NewRequest func() proto.Message
	Handle     func(context.Context, proto.Message) (proto.Message, error)
}

// Unary makes a Method of a typed function. A nil response without an error is an
// empty one.
func Unary[Req, Resp any, PReq interface {
	*Req
	proto.Message
}, PResp interface {
	*Resp
	proto.Message
}](name string, h func(context.Context, *Req) (*Resp, error)) Method {
	return Method{
		Name:       name,
		NewRequest: func() proto.Message { return PReq(new(Req)) },
		Handle: func(ctx context.Context, req proto.Message) (proto.Message, error) {
			resp, err := h(ctx, (*Req)(req.(PReq)))
			if err != nil {
				return nil, err
			}
			if resp == nil {
				resp = new(Resp)
			}
			return PResp(resp), nil
		},
	}
}

// NewMux returns a handler of all paths whose last segment names one of the methods,
// alone or behind any number of the prefixes in strip, such as "Vmm.". It answers
// POST and GET, and 404 to other verbs. Two methods of one name are a panic, since
// they are a mistake in the program.
func NewMux(strip []string, methods ...Method) http.Handler {
	m := &mux{strip: slices.Clone(strip), methods: make(map[string]Method, len(methods))}
	for _, method := range methods {
		if _, twice := m.methods[method.Name]; twice {
			panic("prpc: method " + method.Name + " declared twice")
		}
		m.methods[method.Name] = method
	}
	return m
}

type mux struct {
	strip   []string
	methods map[string]Method
}

// method returns the name without prefixes, and the method if there is one.
func (m *mux) method(path string) (string, Method, bool) {
	name := path[strings.LastIndexByte(path, '/')+1:]
	for again := true; again; {
		again = false
		for _, prefix := range m.strip {
			if rest, ok := strings.CutPrefix(name, prefix); ok && prefix != "" {
				name, again = rest, true
			}
		}
	}
	method, ok := m.methods[name]
	return name, method, ok
}
