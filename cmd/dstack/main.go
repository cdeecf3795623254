// SPDX-License-Identifier: Apache-2.0

// Command dstack is the user's one tool. See package cli.
package main

import (
	"os"

	"github.com/dstack-go/dstack/cli"
)

func main() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }
