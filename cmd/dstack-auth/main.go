// SPDX-License-Identifier: Apache-2.0

// Command dstack-auth answers KMS nodes who may have keys: upstream's webhook. See
// package authd.
package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/dstack-go/dstack/authd"
	"github.com/dstack-go/dstack/internal/command"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

type cli struct {
	Serve       serveCmd   `cmd:"" default:"withargs" help:"Serve until SIGTERM or SIGINT. SIGHUP reads the policy's file again."`
	CheckConfig checkCmd   `cmd:"" help:"Check the configuration and say whether it is valid."`
	Key         keyCmd     `cmd:"" help:"Make a key that signs answers, and print its public half for the KMS nodes' core.auth_api.webhook.key."`
	Version     versionCmd `cmd:"" help:"Print the version."`
}

type configFlag struct {
	Config string `short:"c" type:"path" placeholder:"FILE" help:"TOML configuration file. Each key can also be set as DSTACK_AUTH_<KEY>, two underscores for a dot (DSTACK_AUTH_LISTEN__PORT=8001)."`
}

type serveCmd struct {
	configFlag
	LogLevel slog.Level `default:"INFO" help:"Least level of the log on stderr: DEBUG, INFO, WARN or ERROR."`
}

type checkCmd struct{ configFlag }

type keyCmd struct {
	Out string `short:"o" required:"" type:"path" placeholder:"FILE" help:"File to write, which must not be there yet."`
}

type versionCmd struct{}

func (c *serveCmd) Run() error {
	syscall.Umask(0o077)
	config, err := authd.LoadConfig(c.Config, os.Environ())
	if err != nil {
		return err
	}
	s, err := authd.Open(config, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})), nil)
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	defer signal.Stop(again)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-again:
				_ = s.Reload() // which logs why not
			}
		}
	}()
	return s.Run(ctx, func(a net.Addr) { fmt.Printf("listening on %s\n", a) })
}

func (c *checkCmd) Run() error {
	if _, err := authd.LoadConfig(c.Config, os.Environ()); err != nil {
		return err
	}
	fmt.Println("configuration is valid")
	return nil
}

func (c *keyCmd) Run() error {
	public, err := authd.NewKey(c.Out)
	if err != nil {
		return err
	}
	fmt.Println(hex.EncodeToString(public))
	return nil
}

func (*versionCmd) Run() error {
	fmt.Printf("dstack-auth v%s (%s)\n", version, command.Revision())
	return nil
}

func main() {
	command.Main("dstack-auth", "Answers KMS nodes who may have keys, by a signed policy or by contracts on a chain.", new(cli))
}
