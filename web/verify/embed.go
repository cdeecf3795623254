// SPDX-License-Identifier: Apache-2.0

// Package verify is the page that verifies evidence in a browser, with the
// verifier as a WebAssembly module: static files that any server may serve, from
// any origin and under any path.
//
// The page decides nothing: it obtains evidence, has the module (cmd/dstack-wasm)
// judge it in a worker and shows the verdict. It treats everything that it shows
// as an attacker's: text nodes only, which its policy has the browser enforce. It
// asks no server but the one it came from and the instance that the user names,
// and cannot see the key of a connection; it says so beside every verdict. Who
// serves the page is trusted, which it says as well (threats.md C06, design.md §4).
//
// [FS] holds the sources. Two more files make the page complete: wasm_exec.js of
// the Go release and dstack.wasm.gz, which scripts/web.sh builds, into bin/web/verify
// by default. They are not embedded, so that a clean clone compiles; a server adds
// them from that directory.
package verify

import "embed"

// FS holds the static sources, by name.
//
//go:embed index.html style.css verify.js worker.js
var FS embed.FS
