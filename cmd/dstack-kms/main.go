// SPDX-License-Identifier: Apache-2.0

// Command dstack-kms gives keys to attested and authorised apps. See package
// kms/node.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/dstack-go/dstack/internal/command"
	"github.com/dstack-go/dstack/kms/node"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

type cli struct {
	Serve       serveCmd       `cmd:"" default:"withargs" help:"Get the root keys, if there are none yet, and serve until SIGTERM or SIGINT."`
	CheckConfig checkCmd       `cmd:"" help:"Check the configuration and say whether it is valid."`
	Backup      backupCmd      `cmd:"" help:"Encrypt the root keys to a quorum of operators."`
	OperatorKey operatorKeyCmd `cmd:"" help:"Make an operator's key pair."`
	Share       shareCmd       `cmd:"" help:"Open an operator's share of a backup and print it."`
	Restore     restoreCmd     `cmd:"" help:"Restore the root keys of a backup into a new data directory."`
	Version     versionCmd     `cmd:"" help:"Print the version."`
}

type configFlag struct {
	Config string `short:"c" type:"path" placeholder:"FILE" help:"TOML configuration file. Each key can also be set as DSTACK_KMS_<KEY>, two underscores for a dot (DSTACK_KMS_CORE__DOMAIN=kms.example.org)."`
}

type serveCmd struct {
	configFlag
	LogLevel slog.Level `default:"INFO" help:"Least level of the log on stderr: DEBUG, INFO, WARN or ERROR."`
}

type checkCmd struct{ configFlag }

type versionCmd struct{}

func (c *serveCmd) Run() error {
	syscall.Umask(0o077)
	config, err := node.LoadConfig(c.Config, os.Environ())
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	n, err := node.Open(ctx, config, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel})))
	if err != nil {
		return err
	}
	n.Version = fmt.Sprintf("v%s (git:%s)", version, command.Revision())
	err = n.Run(ctx, func(a net.Addr) { fmt.Printf("listening on %s\n", a) })
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
	fmt.Printf("dstack-kms v%s (%s), %s\n", version, command.Revision(), node.Build())
	return nil
}

func main() { command.Main("dstack-kms", "Gives keys to attested and authorised apps.", new(cli)) }
