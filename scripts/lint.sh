#!/bin/sh
# Format, vet and staticcheck.
set -eu
cd "$(dirname "$0")/.."
cache="${DSTACK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dstack}"
unformatted=$(gofmt -l .)
if [ -n "$unformatted" ]; then
	echo "gofmt would change:" && echo "$unformatted"
	exit 1
fi
go vet ./...
go vet -tags dstack_sim ./cmd/dstack-guest/
GOOS=js GOARCH=wasm go vet ./verifier/ ./attest/tdx/ ./measure/ ./manifest/ ./cmd/dstack-wasm/...
version=v0.8.2
tool="$cache/tools/staticcheck-$version"
if [ ! -x "$tool" ]; then
	mkdir -p "$cache/tools"
	GOBIN="$cache/tools" go install "honnef.co/go/tools/cmd/staticcheck@$version"
	mv "$cache/tools/staticcheck" "$tool"
fi
"$tool" ./...
