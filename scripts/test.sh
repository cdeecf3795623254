#!/bin/sh
# Every test, VM boots included. The OS image is built once (cached by content)
# before the tests that boot it, or run its engine.
set -eu
cd "$(dirname "$0")/.."
start=$(date +%s)
step() { echo "== $1 ($(($(date +%s) - start)) s)"; }
step "lint"
scripts/lint.sh
step "OS image"
image=$(bin/dstack --json image build sim | sed -n 's/.*"dir": "\(.*\)".*/\1/p')
step "unit tests"
go test -count=1 $(go list ./... | grep -v -e '/e2e$' -e '/gateway/node$')
step "gateways in network namespaces" # many processes: nothing else beside them
go test -count=1 ./gateway/node
step "race tests of what shares memory"
CGO_ENABLED=1 go test -count=1 -race ./hostlink/... ./channel/... ./guest/agent/... ./guest/clock ./guest/health ./guest/keyprovider/... ./guest/kmsclient ./guest/gwclient ./guest/terminator $(go list ./gateway/... | grep -v -e /gateway/node$ -e /gateway/page$) ./kms/... ./releaselog $(go list ./governance/... | grep -v -e /devchain$ -e /transact$ -e /council$) ./vmm/... ./internal/fsm/... ./internal/flight ./attest ./collateral/... ./verifyd/...
CGO_ENABLED=1 go test -count=1 -race ./gateway/node
step "contracts"
scripts/contracts.sh --check
step "VM tests"
DSTACK_TEST_IMAGE="$image" go test -count=1 -timeout 10m -v -run 'TestSealedVolume|TestThreat' ./guest/disk/
go test -count=1 -timeout 30m -v ./e2e/
step "done"
