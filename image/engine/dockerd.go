// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"

	"github.com/moby/moby/v2/daemon/command"
)

func dockerd(ctx context.Context) error {
	runner, err := command.NewDaemonRunner(os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	return runner.Run(ctx)
}
