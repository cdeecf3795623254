// SPDX-License-Identifier: Apache-2.0

// Package page is the administrators' page of a gateway: static files that read the
// administrators' RPC from where they came (gateway/admin), show it and carry two changes,
// to drain this gateway or an instance.
//
// Everything shown is taken for an attacker's, names of guests and of other gateways too:
// it becomes text nodes only, each isolated from the direction of what is beside it, which
// the policy has the browser enforce (no markup from text, no script but the file, no other
// origin, no frame).
//
// Trusted: who serves it. It goes behind the guard of the administrators' listener, which
// also keeps other sites' pages from the RPC. Attacker-controlled: every value of an answer.
//
// Implements spec/gateway.md §6.
package page

import (
	"embed"
	"net/http"
)

//go:embed index.html status.css status.js
var files embed.FS

// headers go with each file. The policy is the strictest under which the page works.
var headers = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
	"X-Content-Type-Options":       "nosniff",
	"X-Frame-Options":              "DENY",
	"Referrer-Policy":              "no-referrer",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Cache-Control":                "no-store",
}

// Register serves the page at / and its files beside it.
func Register(mux *http.ServeMux) {
	for path, file := range map[string]string{"/{$}": "index.html", "/status.css": "status.css", "/status.js": "status.js"} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			for name, value := range headers {
				w.Header().Set(name, value)
			}
			http.ServeFileFS(w, r, files, file)
		})
	}
}
