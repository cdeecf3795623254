#!/bin/sh
# Every test, VM boots included. The OS image is built once (cached by content)
# before the tests that boot it.
set -eu
cd "$(dirname "$0")/.."
start=$(date +%s)
step() { echo "== $1 ($(($(date +%s) - start)) s)"; }
step "lint"
scripts/lint.sh
step "unit tests"
go test -count=1 $(go list ./... | grep -v '/e2e$')
step "race tests of what shares memory"
CGO_ENABLED=1 go test -count=1 -race ./hostlink/... ./channel/... ./guest/agent/... ./vmm/... ./internal/fsm/... ./attest ./collateral/... ./verifyd/...
step "OS image"
bin/dstack image build sim
step "VM tests"
go test -count=1 -timeout 30m -v ./e2e/
step "done"
