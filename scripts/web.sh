#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds the verifier page: the static files of web/verify, Go's wasm_exec.js and
# the verifier itself, dstack.wasm.gz. The directory can be served by any file
# server under any path. Without an argument it is bin/web/verify, which git
# ignores. The last line says the SHA-256 of dstack.wasm, which the page shows too;
# the same source and Go release give the same one.
#
#   web.sh [DIR]
set -eu
cd "$(dirname "$0")/.."
out=${1:-bin/web/verify}
GO=${GO:-go}
mkdir -p "$out"
# Code size is download time, so only cryptography is inlined: a tenth less to
# fetch for a fifth more of the few milliseconds that one verification takes.
GOOS=js GOARCH=wasm CGO_ENABLED=0 "$GO" build -trimpath -buildvcs=false -ldflags='-s -w -buildid=' \
	-gcflags=all=-l -gcflags=crypto/...= -gcflags=internal/byteorder= -gcflags=math/...= \
	-o "$out/dstack.wasm" ./cmd/dstack-wasm
sum=$(sha256sum "$out/dstack.wasm" | cut -d' ' -f1)
gzip -9 -n -f "$out/dstack.wasm"
cp web/verify/index.html web/verify/style.css web/verify/verify.js web/verify/worker.js "$out/"
cp "$("$GO" env GOROOT)/lib/wasm/wasm_exec.js" "$out/"
chmod u=rw,go=r "$out"/*
echo "$sum  dstack.wasm ($(wc -c <"$out/dstack.wasm.gz") bytes compressed) in $out"
