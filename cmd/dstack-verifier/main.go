// SPDX-License-Identifier: Apache-2.0

// Command dstack-verifier judges attestation evidence, as a service or once. See
// package verifyd.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/dstack-go/dstack/internal/command"
	"github.com/dstack-go/dstack/verifyd"
)

// version is that of the release that the source belongs to.
const version = "0.1.0"

type cli struct {
	Config     string           `short:"c" type:"path" placeholder:"FILE" help:"TOML configuration file; dstack-verifier.toml by default, if there is one. Each key can also be set as DSTACK_VERIFIER_<KEY>, two underscores for a dot (DSTACK_VERIFIER_ATTESTATION__URLS__PCCS=https://…)."`
	Verify     string           `placeholder:"FILE" xor:"once" help:"Judge one /verify request, print the reply as one line, and write it to FILE.verification.json. The exit code is 0 if and only if is_valid is true: look at the verdict for whether to accept."`
	VerifyCert string           `placeholder:"FILE" xor:"once" help:"Judge one self-signed RA-TLS certificate, PEM or DER, print the result as one line, and write it to FILE.ratls-verification.json."`
	LogLevel   slog.Level       `default:"INFO" help:"Least level of the log on stderr: DEBUG, INFO, WARN or ERROR."`
	Version    kong.VersionFlag `help:"Print the version and exit."`
}

// invalid is the end of a run whose answer, no, is already printed.
type invalid struct{}

func (invalid) Error() string { return "the evidence is not valid" }

func (c *cli) run() error {
	config, err := verifyd.LoadConfig(c.Config, os.Environ())
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: c.LogLevel}))
	if config.Attestation.InsecureAllowExternalTrustAnchors {
		log.Warn("external trust anchors are allowed: evidence under them proves nothing about hardware")
	}
	s, err := verifyd.New(config, verifyd.Options{Log: log})
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch {
	case c.Verify != "":
		reply, err := s.VerifyFile(ctx, c.Verify, os.Stdout)
		if err == nil && !reply.IsValid {
			err = invalid{}
		}
		return err
	case c.VerifyCert != "":
		return s.VerifyCertificateFile(ctx, c.VerifyCert, os.Stdout)
	}
	return s.Serve(ctx, func(at net.Addr) { fmt.Printf("listening on %s\n", at) })
}

func main() {
	var c cli
	kong.Parse(&c, kong.Name("dstack-verifier"), kong.UsageOnError(),
		kong.Description("Judges attestation evidence of confidential VMs and enclaves: serves POST /verify, or judges one file."),
		kong.Vars{"version": fmt.Sprintf("dstack-verifier v%s (%s)", version, command.Revision())})
	err := c.run()
	if err == nil {
		return
	}
	if _, said := err.(invalid); !said {
		command.Tell("dstack-verifier", err)
	}
	os.Exit(1)
}
