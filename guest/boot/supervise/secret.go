// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// SecretFile returns an unnamed file in memory with the content, sealed against
// change, to hand down in [Command].Files. Whoever inherits its descriptor can read
// it, and nobody else but a process that may look into those of others. It has no
// path, and is gone when the last descriptor is closed.
func SecretFile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := fill(f, content); err != nil {
		f.Close()
		return nil, fmt.Errorf("write a file in memory: %w", err)
	}
	return f, nil
}

func fill(f *os.File, content []byte) error {
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Chmod(0o400); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return err
	}
	_, err := f.Seek(0, 0)
	return err
}
