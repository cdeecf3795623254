// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ram is a small block device whose bytes are in memory: a loop device over a memfd.
// The host has no part in what is read from it.
type ram struct {
	file   *os.File // the memfd
	device *os.File // keeps the loop device until a device-mapper table holds it
	path   string
}

// newRAM makes a device that holds content, whose length is a multiple of 4096.
// The kernel takes it down when device is closed and nothing else uses it.
func newRAM(dev string, content []byte) (_ *ram, err error) {
	fd, err := unix.MemfdCreate("dstack-superblock", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	r := &ram{file: os.NewFile(uintptr(fd), "memfd")}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if _, err := r.file.Write(content); err != nil {
		return nil, fmt.Errorf("write a file in memory: %w", err)
	}
	control, err := os.OpenFile(filepath.Join(dev, "loop-control"), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("this kernel has no loop devices: %w", err)
	}
	defer control.Close()
	// Another process may take the number that was free: then the next one.
	for range 16 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		path := filepath.Join(dev, fmt.Sprintf("loop%d", n))
		d, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(d.Fd()), &unix.LoopConfig{
			Fd: uint32(fd), Size: 4096, Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
		})
		if err == nil {
			r.device, r.path = d, path
			return r, nil
		}
		d.Close()
		if err != unix.EBUSY {
			return nil, fmt.Errorf("set up %s: %w", path, err)
		}
	}
	return nil, fmt.Errorf("no loop device stays free")
}

// content returns the first n bytes as they are now.
func (r *ram) content(n int) ([]byte, error) {
	// The kernel's writes went through the page cache of the memfd, which is all it is.
	b := make([]byte, n)
	_, err := r.file.ReadAt(b, 0)
	return b, err
}

func (r *ram) close() {
	if r.device != nil {
		r.device.Close()
	}
	r.file.Close()
}
