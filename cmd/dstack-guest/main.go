// SPDX-License-Identifier: Apache-2.0

// Command dstack-guest is the whole of our software inside a confidential VM, one
// static binary: as PID 1 it boots the machine (guest/boot), as `dstack-guest agent`
// it is the unprivileged agent (guest/agent), and it starts itself again to become a
// script's shell (guest/script).
//
// Which TEEs it knows is decided here, by what is linked: the simulated one only
// with the build tag dstack_sim, which the sim flavour of the image sets.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/collect/tdx"
	"github.com/dstack-go/dstack/guest/agent"
	"github.com/dstack-go/dstack/guest/boot"
	"github.com/dstack-go/dstack/guest/script"
)

// Set by the linker.
var (
	version  = "0.0.0"
	revision = "unknown"
)

// drivers are the TEEs in the order they are tried; sim.go appends to it.
var drivers = []collect.Driver{tdx.Driver()}

func main() {
	switch {
	// A script's stage is the first process of its own namespace.
	case (os.Getpid() == 1 && !(len(os.Args) == 2 && os.Args[1] == script.StageArg)) || filepath.Base(os.Args[0]) == "init":
		boot.Main(boot.Options{Drivers: drivers, Version: version, Revision: revision})
	case len(os.Args) == 2 && os.Args[1] == "agent":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		if err := agent.Run(ctx, os.Stderr); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "agent:", err)
			os.Exit(1)
		}
	case len(os.Args) == 2 && os.Args[1] == script.StageArg:
		fmt.Fprintln(os.Stderr, "script:", script.Stage())
		os.Exit(126)
	case len(os.Args) == 2 && os.Args[1] == "--version":
		fmt.Printf("dstack-guest %s (%s)\n", version, revision)
	default:
		fmt.Fprintln(os.Stderr, "usage: dstack-guest agent | --version; the kernel runs it as init")
		os.Exit(2)
	}
}
