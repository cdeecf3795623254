#!/bin/sh
# The demonstration: bring up the local stack, deploy examples/hello, look at it
# from outside, verify it. Run it as often as you like.
set -eu
cd "$(dirname "$0")/.."
dstack=bin/dstack

echo "== 1. The local stack"
$dstack up

echo
echo "== 2. An app: examples/hello, one static binary and an unchanged docker-compose.yaml"
CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o bin/hello ./examples/hello
cat examples/hello/docker-compose.yaml
$dstack rm --force hello >/dev/null
$dstack --json deploy -c examples/hello/docker-compose.yaml -n hello \
	--app-image hello:1=bin/hello --lock bin/hello.lock.json >bin/hello.deploy.json
public=$(sed -n 's/.*"\(https:\/\/.*\.dstack\.localhost:[0-9]*\)".*/\1/p' bin/hello.deploy.json | head -n 1)

echo
echo "== 3. It answers, from inside the VM"
# The container has just been started; give its process a moment to listen.
curl --silent --show-error --fail --max-time 20 --retry 30 --retry-delay 1 --retry-all-errors http://127.0.0.1:8080/ 2>/dev/null

echo
echo "== 4. It has a public name, through the gateway; its TLS ends inside the VM"
state=${DSTACK_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/dstack}
echo "$public"
# Names under localhost are this machine (RFC 6761); the stack's private CA certifies them.
curl --silent --show-error --fail --max-time 20 --retry 60 --retry-delay 1 --retry-all-errors \
	--cacert "$state/gateway/private-ca.pem" --connect-to ::127.0.0.1: "$public/" 2>/dev/null

echo
echo "== 5. Check it yourself: fresh nonce, quote, log, the lock that deploy wrote, and the key"
echo "   of the very connection by that name"
verify="$dstack verify $public --lock bin/hello.lock.json --dev-roots $state/dev-pki/dev-roots.json"
echo "\$ $verify"
$verify

echo
echo "== 6. Where its keys are from, and what else was given and refused"
$dstack kms log --last 5

cat <<END

The app goes on running. To look around:
  $dstack ps
  $dstack info hello
  $dstack logs -f hello
  curl http://127.0.0.1:8080/
  $dstack app revoke hello --reason "enough"     its next boot gets no keys
To stop:
  $dstack rm --force hello     this app
  $dstack down                 everything, leaving nothing behind
END
