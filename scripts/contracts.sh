#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Builds and tests the contracts of governance/contracts and writes their artefacts:
# governance/contracts/abi/*.json, testdata/*.json, storage-layout.json and sources.sha256.
#
#   contracts.sh           build, test, write
#   contracts.sh --check   build, test, and fail where the committed artefacts differ
#   contracts.sh --gas     build, test, and write the gas table into docs/contracts.md
#   contracts.sh --lint    build, and print what forge lint says of the sources
#
# The tools come from npm once, by package-lock.json's versions and hashes, into a cache
# that is named after them; afterwards no network is used. Needs node and npm.
set -eu
cd "$(dirname "$0")/.."
mode=${1:-}
case "$mode" in
"" | --check | --gas | --lint) ;;
*)
	echo "usage: contracts.sh [--check | --gas | --lint]" >&2
	exit 2
	;;
esac
here=$PWD/governance/contracts
cache="${DSTACK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/dstack}/contracts"
key=$(cat "$here/package.json" "$here/package-lock.json" "$here/solc.js" | sha256sum | cut -c1-16)
tools=$cache/tools-$key
mkdir -p "$cache"
# Two checkouts may build at once.
exec 9>"$cache/lock"
flock 9

if [ ! -d "$tools" ]; then
	fresh=$(mktemp -d "$cache/new-XXXXXX")
	trap 'rm -rf "$fresh"' EXIT
	cp "$here/package.json" "$here/package-lock.json" "$fresh/"
	# forge's package would fetch a binary by a script; its platform package has it.
	npm ci --prefix "$fresh" --ignore-scripts --no-audit --no-fund --silent
	cp "$here/solc.js" "$fresh/solc"
	chmod +x "$fresh/solc"
	mv "$fresh" "$tools"
fi
forge=$(ls "$tools"/node_modules/@foundry-rs/forge-*/bin/forge)

# forge writes beside its sources, so that they are copied out of the checkout.
work=$cache/work-$key
mkdir -p "$work"
rm -rf "$work/src" "$work/test"
cp -R "$here/src" "$here/test" "$here/foundry.toml" "$work/"
ln -sfn "$tools/node_modules" "$work/lib"
cd "$work"
export FOUNDRY_SOLC="$tools/solc" FOUNDRY_OFFLINE=true NO_COLOR=1
"$forge" fmt --check src test || {
	echo "the sources are not formatted as forge fmt does" >&2
	exit 1
}
"$forge" build --sizes >sizes.txt 2>&1 || {
	cat sizes.txt
	exit 1
}
if [ "$mode" = --lint ]; then
	exec "$forge" lint src
fi
if [ "$mode" = --gas ]; then
	"$forge" test --gas-report >gas.txt || {
		cat gas.txt
		exit 1
	}
	exec node "$here/artefacts.js" gas "$work/out" "$PWD/gas.txt" "$here/../../docs/contracts.md"
fi
"$forge" test
rm -rf made
mkdir made
node "$here/artefacts.js" write "$work/out" "$work/made"
# What they were made from, so that the Go tests see when somebody forgot to.
(cd "$here" && LC_ALL=C && export LC_ALL && sha256sum foundry.toml package-lock.json src/*.sol) >made/sources.sha256
if [ "$mode" = --check ]; then
	for file in abi testdata storage-layout.json sources.sha256; do
		diff -ru "$here/$file" "made/$file" >difference || {
			head -c 4000 difference
			echo "$file is not what the sources give: run scripts/contracts.sh and look at the difference" >&2
			exit 1
		}
	done
	echo "the artefacts are those of the sources"
else
	rm -rf "$here/abi" "$here/testdata"
	cp -R made/abi made/testdata made/storage-layout.json made/sources.sha256 "$here/"
fi
