// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// newPage returns zeroed memory of its own mapping, out of the garbage collector's
// reach: it is neither moved nor copied, not swapped out and not in a core dump. The
// latter two need the kernel's leave (RLIMIT_MEMLOCK); without it the page is as good
// as other memory, and unlocked says why.
func newPage() (page []byte, unlocked, err error) {
	page, err = unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, nil, fmt.Errorf("map a page for the root keys: %w", err)
	}
	if err := errors.Join(unix.Mlock(page), unix.Madvise(page, unix.MADV_DONTDUMP)); err != nil {
		unlocked = fmt.Errorf("lock the page of the root keys into memory: %w", err)
	}
	return page, unlocked, nil
}

// freePage overwrites a page and gives it back; it must not be touched after.
func freePage(page []byte) {
	clear(page)
	// What fails here leaves a page of zeroes.
	_ = unix.Munlock(page)
	_ = unix.Munmap(page)
}
