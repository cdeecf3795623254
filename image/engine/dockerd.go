// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"

	metadata "github.com/containerd/containerd/v2/plugins/metadata"
	"github.com/containerd/plugin/registry"
	"github.com/moby/moby/v2/daemon/command"
)

// nosync says that the data directory does not outlive the daemon. It is taken out
// of the environment, which shims and what they start inherit.
const nosync = "ENGINE_NOSYNC"

// dockerd runs the daemon, with containerd within it: one process to start, and no
// socket between the two. The plug-ins of containerd are those that dockerd links:
// no CRI, NRI, tracing, image verifier programs, nor snapshotters other than
// overlayfs and native.
func dockerd(ctx context.Context) error {
	if os.Getenv(nosync) != "" {
		if err := os.Unsetenv(nosync); err != nil {
			return err
		}
		for _, p := range registry.Graph(nil) {
			if config, ok := p.Config.(*metadata.BoltConfig); ok {
				config.NoSync = true
			}
		}
	}
	runner, err := command.NewDaemonRunner(os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	return runner.Run(ctx)
}
