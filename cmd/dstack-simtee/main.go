// SPDX-License-Identifier: Apache-2.0

// Command dstack-simtee is a simulated Intel TDX for development. It makes the
// keys that simulated evidence is signed with, and serves the TEE of one VM.
//
// Trust in it is development trust: what it signs proves nothing about hardware.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/simtee"
)

type cli struct {
	PKI pkiCmd `cmd:"" name:"pki" help:"Make a development root and its keys, unless they exist."`
	Run runCmd `cmd:"" help:"Serve the simulated TEE of one VM until SIGTERM."`
}

type pkiCmd struct {
	Out string `required:"" type:"path" placeholder:"DIR" help:"Directory for private.json (mode 0600, keep it to yourself) and dev-roots.json (public: what a verifier's --dev-roots takes). An existing one is checked and kept."`
}

type runCmd struct {
	Launch string `required:"" type:"path" placeholder:"FILE" help:"JSON description of the VM: firmware, kernel, initrd (paths), cmdline, vcpus, memory_bytes, mr_config_id (96 hex digits), debug."`
	PKI    string `required:"" name:"pki" type:"path" placeholder:"DIR" help:"Directory made by 'dstack-simtee pki'."`
	State  string `required:"" type:"path" placeholder:"DIR" help:"Directory of the VM's registers. Kept across restarts of this process; remove it to reset the VM."`
	Socket string `required:"" type:"path" placeholder:"PATH" help:"Unix socket to serve on (mode 0600)."`
}

const description = `A simulated Intel TDX for development, one process per VM.

Its quotes have the form of real ones and chain to a root made on this machine.
They prove nothing about hardware: a verifier accepts them only when its user
names that root with --dev-roots, and then says "trust: development".`

func (c *pkiCmd) Run() error {
	made, err := simtee.EnsurePKI(c.Out, time.Now())
	if err != nil {
		return err
	}
	verb := "kept"
	if made {
		verb = "made"
	}
	fmt.Printf("%s development roots %s\n", verb, filepath.Join(c.Out, simtee.DevRootsFile))
	return nil
}

func (c *runCmd) Run() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	stop := make(chan struct{})
	go func() {
		<-signals
		close(stop)
	}()
	return simtee.Serve(c.PKI, c.Launch, c.State, c.Socket, time.Now(), func() { fmt.Println("ready") }, stop)
}

func main() {
	var c cli
	ctx := kong.Parse(&c, kong.Name("dstack-simtee"), kong.Description(description), kong.UsageOnError())
	if err := ctx.Run(); err != nil {
		fmt.Fprintf(os.Stderr, "dstack-simtee: %v\n", err)
		if code := fault.Code(err); code != "" {
			fmt.Fprintf(os.Stderr, "code: %s\n", code)
		}
		if fix := fault.Fix(err); fix != "" {
			fmt.Fprintf(os.Stderr, "fix: %s\n", fix)
		}
		os.Exit(1)
	}
}
