#!/bin/sh
# Long loops: the VMM is killed at every moment of its VMs' lives (lab guests), ten
# times at random moments of real VMs' lives, a VM is made to fail in every boot phase
# that a host can break, the power goes fifty times while a sealed disk is written, a
# KMS is killed twenty times while it works, the KMSs run in CVMs of their own, and what
# is computed over thousands of states of a chain is held against its contracts.
# SEED=N repeats a run; the seed is printed.
set -eu
cd "$(dirname "$0")/.."
export DSTACK_SOAK=1
go test -count=1 -timeout 60m ./vmm/
go test -count=1 -timeout 60m -v -run TestSoak ./kms/node/
go test -count=1 -timeout 60m -v -run TestSoak ./governance/chain/
go test -count=1 -timeout 60m -v -run TestSoak ./e2e/
image=$(bin/dstack --json image build sim | sed -n 's/.*"dir": "\(.*\)".*/\1/p')
DSTACK_TEST_IMAGE="$image" DSTACK_TEST_BOOTS=all go test -count=1 -timeout 60m -v ./guest/boot/boottest/
DSTACK_TEST_IMAGE="$image" go test -count=1 -timeout 60m -v -run TestSoak ./guest/disk/
