// SPDX-License-Identifier: Apache-2.0

// Command engine is the container engine of dstack-os: dockerd with containerd in
// it, docker-compose and docker in one static binary, told apart by the name it is
// called by.
//
// They are one file because they share most of their code: one file is smaller
// in the image, and inside the VM a page of shared code is read, checked
// against the verity tree and (under emulation) translated once, not three
// times. The image holds it under the names of the first two as hard links, so
// that a program that starts itself again by path keeps its name. Nothing in the
// image is called docker: the guest mounts the engine under that name for the
// scripts of a manifest alone.
//
// The shim that stays beside each container is a program of its own (shim/):
// containerd's plugin registry is global, and a shim must not load the
// daemon's plugins.
//
// This is a separate Go module, so that the engine's several hundred
// dependencies never reach the modules of dstack itself.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/moby/sys/reexec"
)

var programs = map[string]func(ctx context.Context) error{
	"dockerd":        dockerd,
	"docker-compose": compose,
	"docker":         docker,
}

func main() {
	// dockerd starts itself under other names for work in namespaces.
	if reexec.Init() {
		return
	}
	name := filepath.Base(os.Args[0])
	run, ok := programs[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "engine: called as %q; it answers to dockerd, docker-compose and docker\n", name)
		os.Exit(2)
	}
	signal.Ignore(syscall.SIGPIPE) // a reader of our logs may go away; that is not our end
	if err := run(context.Background()); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
