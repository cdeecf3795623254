// SPDX-License-Identifier: Apache-2.0

// Package api is the root of the wire contracts between components: one
// sub-package per service, each holding a .proto file and the Go code generated
// from it, and nothing else. It imports nothing of ours.
//
// Package names, message names and field numbers are upstream dstack's, so that
// its clients keep working; fields of our own have numbers from 1000. How these
// messages travel (JSON or protobuf over HTTP) is package prpc.
//
//	api/vmm       package vmm           management API of the VMM (spec vmm.md §3.4)
//	api/hostapi   package host_api      guest to host (vmm.md §9)
//	api/guestapi  package guest_api     host to guest (guest-agent.md §6)
//	api/agent     package dstack_guest  apps and the public to the guest agent
//	                                    (guest-agent.md §3 to §5)
//	api/kms       package kms           guests and clients to the KMS (kms.md §3.2)
//	api/gateway   package gateway       guests, operators and gateways to a gateway
//	                                    (gateway.md §1)
//
// Everything in a message is attacker-controlled for its receiver: a message that
// decoded is well formed, and nothing more.
//
// The generated code is committed. To make it anew, install protoc 3.21.12 with its
// well-known types (Debian: protobuf-compiler, libprotobuf-dev) and protoc-gen-go
// v1.36.12 (go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12), and
// run go generate.
package api

//go:generate protoc --go_out=. --go_opt=module=github.com/dstack-go/dstack/api vmm/vmm.proto hostapi/hostapi.proto guestapi/guestapi.proto agent/agent.proto kms/kms.proto gateway/gateway.proto
