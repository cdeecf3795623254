// SPDX-License-Identifier: Apache-2.0

// Command probe is what containers of the tests run: it writes a line to the file
// that is its argument, and waits. Called as crun it is the runtime without
// cgroups, whose controllers a machine that is no guest of ours may not give.
package main

import (
	"os"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	if filepath.Base(os.Args[0]) == "crun" {
		args := append([]string{"crun", "--cgroup-manager=disabled"}, os.Args[1:]...)
		_ = syscall.Exec("/tmp/crun", args, os.Environ())
		os.Exit(127)
	}
	f, err := os.OpenFile(os.Args[1], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		os.Exit(3)
	}
	if _, err := f.WriteString("ran\n"); err != nil || f.Close() != nil {
		os.Exit(4)
	}
	time.Sleep(10 * time.Minute)
}
