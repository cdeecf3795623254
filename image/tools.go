// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"os/exec"
	"strings"
	"syscall"

	"github.com/dstack-go/dstack/internal/fault"
)

const errNoSpace = syscall.ENOSPC

// hostPrograms are the programs that a build runs.
var hostPrograms = []string{"go", "gcc", "ld", "make", "flex", "bison", "bc", "tar", "xz", "lz4", "mksquashfs"}

func checkTools() error {
	var missing []string
	for _, p := range hostPrograms {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) != 0 {
		return fault.New("host_tools_missing", "programs that the image is built with are missing: %s", strings.Join(missing, ", ")).
			WithFix("run scripts/host-packages.sh")
	}
	return nil
}

// hostTools asks each tool for its version.
func hostTools(ctx context.Context) (t Tools, err error) {
	for _, f := range []struct {
		into *string
		argv []string
	}{
		{&t.Go, []string{"go", "version"}},
		{&t.GCC, []string{"gcc", "--version"}},
		{&t.LD, []string{"ld", "--version"}},
		{&t.Mksquashfs, []string{"mksquashfs", "-version"}},
	} {
		cmd := exec.CommandContext(ctx, f.argv[0], f.argv[1:]...)
		cmd.Env = buildEnv(nil)
		out, err := cmd.Output()
		// mksquashfs of some releases answers -version with a failure.
		if len(out) == 0 && err != nil {
			return t, fault.Wrap(err, "host_tools_missing", "%s", strings.Join(f.argv, " ")).WithFix("run scripts/host-packages.sh")
		}
		line, _, _ := strings.Cut(string(out), "\n")
		*f.into = strings.TrimSpace(line)
	}
	return t, nil
}
