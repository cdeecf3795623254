#!/bin/sh
# Long loops: the VMM is killed ten times at random moments of real VMs' lives.
# SEED=N repeats a run; the seed is printed.
set -eu
cd "$(dirname "$0")/.."
DSTACK_SOAK=1 go test -count=1 -timeout 60m -v -run 'TestSoak' ./e2e/
