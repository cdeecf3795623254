#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The gateway's data path beside a direct connection, HAProxy and nginx (bench/gateway);
# JSON on standard output. The peers are Debian's, installed where they are missing.
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin
if ! command -v haproxy >/dev/null || ! command -v nginx >/dev/null || ! test -e /usr/lib/nginx/modules/ngx_stream_module.so; then
	apt-get install -y -q --no-install-recommends haproxy nginx libnginx-mod-stream >&2
fi
bin=$(mktemp)
trap 'rm -f "$bin"' EXIT
CGO_ENABLED=0 go build -o "$bin" ./bench/gateway
"$bin" "$@"
