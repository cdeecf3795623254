// SPDX-License-Identifier: Apache-2.0

// Command dstack-vmm runs confidential VMs on this machine and serves their
// management API. See package vmm.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/dstack-go/dstack/internal/command"
	"github.com/dstack-go/dstack/vmm"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

type cli struct {
	Serve       serveCmd   `cmd:"" help:"Serve the API and run VMs until SIGTERM or SIGINT. VMs go on running."`
	CheckConfig checkCmd   `cmd:"" help:"Check a configuration file and say whether it is valid."`
	Version     versionCmd `cmd:"" help:"Print the version."`
}

type configFlag struct {
	Config string `short:"c" required:"" type:"path" placeholder:"FILE" help:"TOML configuration file. Each key can also be set as DSTACK_VMM_<KEY>, two underscores for a dot (DSTACK_VMM_CVM__ACCEL=tcg)."`
}

type serveCmd struct {
	configFlag
	LogLevel slog.Level `default:"INFO" help:"Least level of the log on stderr: DEBUG, INFO, WARN or ERROR."`
}

type checkCmd struct{ configFlag }

type versionCmd struct{}

func (c *serveCmd) Run() error {
	// Files and sockets that QEMU and the simulated TEE make are this user's alone.
	syscall.Umask(0o077)
	config, err := vmm.LoadConfig(c.Config, os.Environ())
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server, err := vmm.Open(config, vmm.Options{
		Log:     slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})),
		Version: version, Revision: command.Revision(),
	})
	if err != nil {
		return err
	}
	defer server.Close()
	l, err := server.Listen()
	if err != nil {
		return err
	}
	fmt.Printf("listening on %s\n", config.Address)
	return server.Serve(ctx, l)
}

func (c *checkCmd) Run() error {
	if _, err := vmm.LoadConfig(c.Config, os.Environ()); err != nil {
		return err
	}
	fmt.Println("configuration is valid")
	return nil
}

func (*versionCmd) Run() error {
	fmt.Printf("dstack-vmm v%s (%s)\n", version, command.Revision())
	return nil
}

func main() {
	command.Main("dstack-vmm", "Runs confidential VMs with QEMU and serves their management API.", new(cli))
}
