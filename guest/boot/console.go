// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// console writes lines to the machine's console, each one write and each marked:
// "dstack: …". The host reads it, so nothing secret goes there, and lines that come
// from outside (the engine's, a container's) are cut and rationed: a flood on an
// emulated serial line would stop the boot.
type console struct {
	mu sync.Mutex
	w  io.Writer
}

// openConsole opens /dev/console and makes it standard output and error too, so
// that a crash of the runtime is seen.
func openConsole() *console {
	f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return &console{w: os.Stderr}
	}
	for _, fd := range []int{1, 2} {
		_ = unix.Dup3(int(f.Fd()), fd, 0)
	}
	return &console{w: f}
}

const maxLine = 1000

func (c *console) Log(line string) {
	line = truncate(oneLine(line), maxLine)
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(c.w, "dstack: %s\n", line)
}

// Flush waits until the line has taken what was written.
func (c *console) Flush() {
	if f, ok := c.w.(*os.File); ok {
		// TCSBRK with a non-zero argument is tcdrain(3).
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
	}
}

// ration lets through n lines, then one per interval.
type ration struct {
	mu       sync.Mutex
	n        int
	interval time.Duration
	last     time.Time
	dropped  int
}

// allow reports whether the next line may pass, and how many were dropped since
// the last one that did.
func (r *ration) allow(now time.Time) (ok bool, dropped int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n > 0 {
		r.n--
	} else if now.Sub(r.last) < r.interval {
		r.dropped++
		return false, 0
	}
	r.last = now
	dropped, r.dropped = r.dropped, 0
	return true, dropped
}
