// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/commands"
	"github.com/docker/cli/cli/version"
	"github.com/spf13/cobra"
)

// docker runs Docker's command-line client, for the scripts of a manifest
// (design.md §6); nothing of the system runs it. It has the client's own commands
// and `docker compose`; no plug-ins, hooks or telemetry.
func docker(ctx context.Context) error {
	if len(os.Args) > 1 && os.Args[1] == "compose" {
		os.Args = os.Args[1:]
		return compose(ctx)
	}
	client, err := command.NewDockerCli(command.WithBaseContext(ctx))
	if err != nil {
		return err
	}
	root := &cobra.Command{
		Use:                   "docker [OPTIONS] COMMAND [ARG...]",
		Short:                 "A self-sufficient runtime for containers",
		Version:               version.Version,
		Args:                  cli.NoArgs,
		RunE:                  command.ShowHelp(client.Err()),
		SilenceUsage:          true,
		SilenceErrors:         true,
		TraverseChildren:      true,
		DisableFlagsInUseLine: true,
		CompletionOptions:     cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	opts, _ := cli.SetupRootCommand(root)
	root.Flags().BoolP("version", "v", false, "Print version information and quit")
	root.SetVersionTemplate("Docker version {{.Version}}\n")
	root.SetIn(client.In())
	root.SetOut(client.Out())
	root.SetErr(client.Err())
	commands.AddCommands(root, client)

	top := cli.NewTopLevelCommand(root, client, opts, root.Flags())
	cmd, args, err := top.HandleGlobalFlags()
	if err != nil {
		return err
	}
	if err := top.Initialize(); err != nil {
		return err
	}
	cmd.SetArgs(args)
	if err := cmd.ExecuteContext(ctx); err != nil {
		if text := err.Error(); text != "" {
			fmt.Fprintln(os.Stderr, text)
		}
		// `docker run` and `docker exec` end as the program in the container did.
		var status cli.StatusError
		if errors.As(err, &status) && status.StatusCode != 0 {
			os.Exit(status.StatusCode)
		}
		os.Exit(1)
	}
	return nil
}
