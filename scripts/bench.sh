#!/bin/sh
# The boot benchmark: five alternating boots of ours and of its peer. Run it on an
# idle machine; docs/figures.md says what was measured where.
set -eu
cd "$(dirname "$0")/.."
cache="${DSTACK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dstack}"
state=$(mktemp -d /tmp/dstack-bench-XXXXXX)
trap 'bin/dstack --state "$state" down >/dev/null 2>&1 || true; rm -rf "$state"' EXIT INT TERM
bench/boot/peer.sh "$cache/bench-peer-2"
bin/dstack --state "$state" up --no-kms --no-gateway
CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o bin/hello ./examples/hello
go run ./bench/boot -peer "$cache/bench-peer-2" -state "$state" -out bin/bench-boot.json "$@"
