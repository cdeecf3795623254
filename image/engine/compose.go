// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"

	"github.com/docker/cli/cli-plugins/metadata"
	"github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	"github.com/docker/compose/v5/cmd/compatibility"
	commands "github.com/docker/compose/v5/cmd/compose"
	"github.com/spf13/cobra"
)

// composeVersion is set by the linker from go.mod.
var composeVersion = "unknown"

// compose runs docker-compose by itself, as a plug-in host would run it. It
// has no prompt (nobody sits in front of a guest) and no tracing.
func compose(context.Context) error {
	os.Args = append([]string{"docker"}, compatibility.Convert(os.Args[1:])...)
	plugin.Run(root, metadata.Metadata{
		SchemaVersion: "0.1.0",
		Vendor:        "Docker Inc.",
		Version:       composeVersion,
	}, command.WithUserAgent("compose/"+composeVersion))
	return nil
}

func root(cli command.Cli) *cobra.Command {
	cmd := commands.RootCommand(cli, &commands.BackendOptions{})
	before := cmd.PersistentPreRunE
	cmd.PersistentPreRunE = func(cmd *cobra.Command, args []string) error {
		// Connects cli to the daemon; the plug-in host would have done it.
		if err := plugin.PersistentPreRunE(cmd, args); err != nil {
			return err
		}
		if before != nil {
			return before(cmd, args)
		}
		return nil
	}
	return cmd
}
