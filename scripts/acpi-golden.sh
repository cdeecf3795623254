#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Records what QEMU's own ACPI tables are, for the tests of package measure/acpi:
#
#   acpi-golden.sh QEMU...      record from these binaries (all that are to stay)
#   acpi-golden.sh --check ...  only compare the package with these binaries
#
# Each QEMU runs without a guest: processors stopped, tables read over qtest. A
# wrapper script may stand for a binary of another distribution release. No KVM,
# TDX hardware or root is needed.
set -eu
mode=-record
pattern='^TestRecord$'
if [ "${1:-}" = --check ]; then
	mode=
	pattern=installed
	shift
fi
[ $# -gt 0 ] || { echo "usage: acpi-golden.sh [--check] QEMU..." >&2; exit 2; }
list=
for q; do
	path=$(command -v "$q") || { echo "acpi-golden: $q not found" >&2; exit 1; }
	list="$list${list:+,}$path"
done
cd "$(dirname "$0")/.."
if [ -n "$mode" ]; then rm -f measure/acpi/testdata/qemu-*.gz; fi
# shellcheck disable=SC2086
exec go test -count=1 -timeout 30m -run "$pattern" ./measure/acpi -qemu "$list" $mode
