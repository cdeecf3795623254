// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// dropStartPages lets the kernel have back the pages of the program file that only
// the start needed: the binary is init's, too, and what init's packages set up at
// their start is most of what was read. What is needed again is read again, from a
// page cache that init shares. It is no guarantee, and nothing depends on it.
func dropStartPages() {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	for line := range bytes.Lines(maps) {
		// 00400000-00b5c000 r-xp 00000000 fe:00 1234   /path
		f := bytes.Fields(line)
		if len(f) < 6 || f[5][0] != '/' || len(f[1]) < 4 || f[1][1] != '-' || f[1][3] != 'p' {
			continue
		}
		from, to, _ := bytes.Cut(f[0], []byte("-"))
		begin, err1 := strconv.ParseUint(string(from), 16, 64)
		end, err2 := strconv.ParseUint(string(to), 16, 64)
		if err1 == nil && err2 == nil {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, uintptr(begin), uintptr(end-begin), unix.MADV_DONTNEED)
		}
	}
}
