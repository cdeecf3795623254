#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The benchmarks of docs/figures.md, Verification: each beside its peer in one run.
set -eu
cd "$(dirname "$0")/.."
go test -run '^$' -bench RealQuote -benchtime 2s -count 5 ./attest/tdx
go test -run '^$' -bench . -count 3 ./attest/sevsnp ./attest/nitro ./attest/cca ./attest/tpm ./attest/cose ./measure ./measure/acpi ./channel ./verifyd
go test -run '^$' -bench Verify -count 3 ./web/verify
