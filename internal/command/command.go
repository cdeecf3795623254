// SPDX-License-Identifier: Apache-2.0

// Package command is what the programs of the house have in common at their ends: how
// they tell an error, and what they were built from.
package command

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/alecthomas/kong"

	"github.com/dstack-go/dstack/internal/fault"
)

// Main parses the arguments into cli, runs what they name, and exits with 1 on an error.
func Main(name, description string, cli any) {
	if err := kong.Parse(cli, kong.Name(name), kong.UsageOnError(), kong.Description(description)).Run(); err != nil {
		Tell(name, err)
		os.Exit(1)
	}
}

// Tell writes an error to standard error, with its code and what mends it.
func Tell(name string, err error) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
	if code := fault.Code(err); code != "" {
		fmt.Fprintf(os.Stderr, "code: %s\n", code)
	}
	if fix := fault.Fix(err); fix != "" {
		fmt.Fprintf(os.Stderr, "fix: %s\n", fix)
	}
}

// Revision is the commit that the binary was built from, or "unknown".
func Revision() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}
