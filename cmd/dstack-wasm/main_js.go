// SPDX-License-Identifier: Apache-2.0

//go:build js && wasm

// Command dstack-wasm is the verifier as a WebAssembly module, for the page in
// web/verify and for other JavaScript. scripts/web.sh builds it. Started by
// Go's wasm_exec.js, it sets on the global object:
//
//	dstackVersion                       of the release, a string
//	dstackVerify(evidence, options)     the JSON of a verdict, or of an error
//	dstackRequest(evidence, kind)       the JSON of the collateral that evidence needs
//
// evidence is a Uint8Array, or a string of text (JSON, PEM, hexadecimal, base64);
// options is a JSON text or an object, see package page. Both functions return
// strings and never throw: errors are {"error", "code", "fix"}. They are
// synchronous, hold nothing between calls and open no connection; a page calls
// them in a worker so that hostile evidence can at worst stop the worker.
package main

import (
	"syscall/js"
	"time"

	"github.com/dstack-go/dstack/cmd/dstack-wasm/page"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

func main() {
	global := js.Global()
	global.Set("dstackVersion", version)
	global.Set("dstackVerify", function(func(args []js.Value) ([]byte, error) {
		input, err := evidence(args)
		if err != nil {
			return nil, err
		}
		options, err := text(args, 1)
		if err != nil {
			return nil, err
		}
		return page.Verify(input, []byte(options), time.Now()), nil
	}))
	global.Set("dstackRequest", function(func(args []js.Value) ([]byte, error) {
		input, err := evidence(args)
		if err != nil {
			return nil, err
		}
		kind, err := text(args, 1)
		if err != nil {
			return nil, err
		}
		return page.Wants(input, kind), nil
	}))
	if ready := global.Get("dstackReady"); ready.Type() == js.TypeFunction {
		ready.Invoke()
	}
	select {}
}

// function makes a JavaScript function that returns a string and throws nothing.
func function(f func(args []js.Value) ([]byte, error)) js.Func {
	return js.FuncOf(func(_ js.Value, args []js.Value) (result any) {
		defer func() {
			if r := recover(); r != nil {
				result = string(page.Error(fault.New("internal", "this program failed: %v", r).WithFix("please report it, with the evidence")))
			}
		}()
		out, err := f(args)
		if err != nil {
			out = page.Error(err)
		}
		return string(out)
	})
}

// evidence takes the first argument, after a look at its size.
func evidence(args []js.Value) ([]byte, error) {
	large := func(n int) error {
		return fault.New("evidence_too_large", "evidence of %d bytes, more than %d", n, verifier.MaxSource)
	}
	switch {
	case len(args) > 0 && args[0].Type() == js.TypeString:
		if n := length(args[0]); n > verifier.MaxSource {
			return nil, large(n)
		}
		return []byte(args[0].String()), nil
	case len(args) > 0 && args[0].InstanceOf(js.Global().Get("Uint8Array")):
		n := args[0].Get("length").Int()
		if n > verifier.MaxSource {
			return nil, large(n)
		}
		b := make([]byte, n)
		if n > 0 { // a transferred array has no bytes, and throws when it is read
			js.CopyBytesToGo(b, args[0])
		}
		return b, nil
	}
	return nil, fault.New("arguments", "evidence must be a string or a Uint8Array")
}

// text takes an argument that is a string, an object to be written in JSON, or
// absent.
func text(args []js.Value, i int) (string, error) {
	if len(args) <= i || args[i].IsUndefined() || args[i].IsNull() {
		return "", nil
	}
	v := args[i]
	if v.Type() == js.TypeObject {
		v = js.Global().Get("JSON").Call("stringify", v)
	}
	if v.Type() != js.TypeString {
		return "", fault.New("arguments", "options must be an object or its JSON")
	}
	if n := length(v); n > page.MaxOptions {
		return "", fault.New("options_malformed", "options of %d bytes, more than %d", n, page.MaxOptions)
	}
	return v.String(), nil
}

// length returns that of a string in UTF-16 units, each of which is a byte or more
// in Go, without copying it.
func length(s js.Value) int { return js.Global().Get("Object").Invoke(s).Get("length").Int() }
