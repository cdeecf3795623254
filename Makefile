# Thin: every target is one command that also works by hand.
GO ?= go
export CGO_ENABLED ?= 0

.PHONY: all build setup demo test lint soak bench bench-gateway bench-verify web clean

all: build

setup:
	scripts/host-packages.sh

build:
	$(GO) build -trimpath -buildvcs=false -o bin/ ./cmd/...
	$(GO) build -trimpath -buildvcs=false -tags dstack_sim -o bin/dstack-kms-dev ./cmd/dstack-kms
	$(GO) build -trimpath -buildvcs=false -tags dstack_sim -o bin/dstack-gateway-dev ./cmd/dstack-gateway

demo: setup build
	scripts/demo.sh

test: setup build
	scripts/test.sh

lint:
	scripts/lint.sh

soak: setup build
	scripts/soak.sh

bench: setup build
	scripts/bench.sh

bench-gateway: setup
	scripts/bench-gateway.sh

bench-verify: setup
	scripts/bench-verify.sh

web:
	scripts/web.sh

clean:
	rm -rf bin
