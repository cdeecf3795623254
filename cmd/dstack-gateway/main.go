// SPDX-License-Identifier: Apache-2.0

// Command dstack-gateway carries public HTTPS to attested instances. See package
// gateway/node.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/dstack-go/dstack/gateway/node"
	"github.com/dstack-go/dstack/internal/command"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

type cli struct {
	Serve       serveCmd   `cmd:"" default:"withargs" help:"Serve until SIGTERM or SIGINT, and then let connections finish for a while. SIGHUP reads the configuration again."`
	CheckConfig checkCmd   `cmd:"" help:"Check the configuration and say whether it is valid."`
	Version     versionCmd `cmd:"" help:"Print the version."`
}

type configFlag struct {
	Config string `short:"c" type:"path" placeholder:"FILE" help:"TOML configuration file. Each key can also be set as DSTACK_GATEWAY_<KEY>, two underscores for a dot (DSTACK_GATEWAY_CORE__MY_URL=https://gateway.example.org:8000)."`
}

type serveCmd struct {
	configFlag
	LogLevel slog.Level `default:"INFO" help:"Least level of the log on stderr, if the configuration has no log_level: DEBUG, INFO, WARN or ERROR."`
}

type checkCmd struct{ configFlag }

type versionCmd struct{}

func (c *serveCmd) Run() error {
	syscall.Umask(0o077)
	load := func() (node.Config, error) { return node.LoadConfig(c.Config, os.Environ()) }
	config, err := load()
	if err != nil {
		return err
	}
	again := make(chan os.Signal, 1)
	signal.Notify(again, syscall.SIGHUP)
	defer signal.Stop(again)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	level := new(slog.LevelVar)
	level.Set(c.LogLevel)
	n, err := node.Open(ctx, config, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	if err != nil {
		return err
	}
	n.Level = level
	n.Version = fmt.Sprintf("v%s (git:%s)", version, command.Revision())
	go n.ReloadAt(ctx, again, load)
	err = n.Run(ctx, func(at node.Listening) { fmt.Printf("listening on %s, and for guests on %s\n", at.Proxy, at.RPC) })
	if ctx.Err() != nil {
		return nil // it was asked to stop
	}
	return err
}

func (c *checkCmd) Run() error {
	if _, err := node.LoadConfig(c.Config, os.Environ()); err != nil {
		return err
	}
	fmt.Println("configuration is valid")
	return nil
}

func (*versionCmd) Run() error {
	fmt.Printf("dstack-gateway v%s (%s), %s\n", version, command.Revision(), node.Build())
	return nil
}

func main() { command.Main("dstack-gateway", "Carries public HTTPS to attested instances.", new(cli)) }
