// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// trimInterval is how often pages of the program file are given back.
const trimInterval = 10 * time.Second

// keepTrim gives pages back until ctx ends. The binary is init's, too: most of what
// is read of it is what init's packages set up at the start, and the kernel maps
// sixteen pages around each that is needed. What is needed again is mapped again,
// from the page cache that init shares, at the price of a fault.
func keepTrim(ctx context.Context) {
	tick := time.NewTicker(trimInterval)
	defer tick.Stop()
	for {
		smaps, err := os.ReadFile("/proc/self/smaps")
		if err != nil {
			return
		}
		for _, m := range filePages(smaps) {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, m[0], m[1]-m[0], unix.MADV_DONTNEED)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// filePages returns the ranges of /proc/self/smaps that can be dropped and read again
// from a file: private, not writable, and without a single page of their own, as
// relocation leaves them behind in a binary that is not linked statically.
func filePages(smaps []byte) [][2]uintptr {
	var out [][2]uintptr
	var at [2]uintptr // the mapping that the lines are about; zero: not of a kind to drop
	for line := range bytes.Lines(smaps) {
		f := bytes.Fields(line)
		switch {
		case len(f) >= 5 && !bytes.HasSuffix(f[0], []byte(":")):
			// 00400000-00b5c000 r-xp 00000000 fe:00 1234   /path
			at = [2]uintptr{}
			from, to, _ := bytes.Cut(f[0], []byte("-"))
			begin, err1 := strconv.ParseUint(string(from), 16, 64)
			end, err2 := strconv.ParseUint(string(to), 16, 64)
			if err1 == nil && err2 == nil && begin < end && len(f) >= 6 && f[5][0] == '/' && len(f[1]) == 4 && f[1][1] == '-' && f[1][3] == 'p' {
				at = [2]uintptr{uintptr(begin), uintptr(end)}
			}
		case len(f) == 3 && string(f[0]) == "Anonymous:" && string(f[1]) == "0" && at[1] != 0:
			out = append(out, at)
		}
	}
	return out
}
