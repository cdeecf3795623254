// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Layout of struct dm_ioctl and struct dm_target_spec, in bytes
// (include/uapi/linux/dm-ioctl.h; native byte order, which is little-endian on
// every architecture the project runs on).
const (
	dmIoctlSize  = 312
	dmTargetSize = 40

	dmNameMax = 127
	dmUUIDMax = 128
	// maxTargets bounds a table; the kernel's own limit is higher.
	maxTargets = 4096

	offDataSize    = 12
	offDataStart   = 16
	offTargetCount = 20
	offFlags       = 28
	offDev         = 40
	offName        = 48
	offUUID        = 176
)

// ioctl request numbers: _IOWR(0xfd, n, struct dm_ioctl).
const (
	dmBase      = 3<<30 | dmIoctlSize<<16 | 0xfd<<8
	dmDevCreate = dmBase | 3
	dmDevRemove = dmBase | 4
	dmSuspend   = dmBase | 6 // without the suspend flag: resume
	dmTableLoad = dmBase | 9
)

const (
	dmFlagReadOnly   = 1 << 0
	dmFlagSecureData = 1 << 15 // the kernel wipes its copy of the buffer
)

// A Target is one segment of a device-mapper table.
type Target struct {
	Start, Length uint64 // in sectors of 512 bytes
	Type          string // "verity", "crypt", "integrity", "linear"; at most 15 bytes
	Params        []byte // table text after the type, without a final NUL; wiped by Create when Secret
	Secret        bool   // Params hold a key
}

// encodeHeader returns a buffer of size bytes that starts with struct dm_ioctl
// version 4.0.0 for the named device.
func encodeHeader(name, uuid string, flags uint32, size int) ([]byte, error) {
	if name == "" || len(name) > dmNameMax || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("device-mapper name %q is empty, too long or has a slash", name)
	}
	if len(uuid) > dmUUIDMax {
		return nil, fmt.Errorf("device-mapper uuid of %d bytes is too long", len(uuid))
	}
	b := make([]byte, size)
	binary.LittleEndian.PutUint32(b, 4) // version 4.0.0: any 4.x kernel accepts it
	binary.LittleEndian.PutUint32(b[offDataSize:], uint32(size))
	binary.LittleEndian.PutUint32(b[offDataStart:], dmIoctlSize)
	binary.LittleEndian.PutUint32(b[offFlags:], flags)
	copy(b[offName:], name)
	copy(b[offUUID:], uuid)
	return b, nil
}

// specSize is the room that a target takes in a table: aligned to 8 bytes, with a
// final NUL.
func specSize(t Target) int { return (dmTargetSize + len(t.Params) + 1 + 7) &^ 7 }

// encodeTable returns the argument of DM_TABLE_LOAD for a table of the targets, in
// the order of their sectors. The caller wipes it when a target is secret.
func encodeTable(name string, flags uint32, targets ...Target) ([]byte, error) {
	if len(targets) == 0 || len(targets) > maxTargets {
		return nil, fmt.Errorf("device-mapper table of %d targets", len(targets))
	}
	size := dmIoctlSize
	for _, t := range targets {
		if len(t.Type) > 15 {
			return nil, fmt.Errorf("device-mapper target type %q is too long", t.Type)
		}
		size += specSize(t)
	}
	b, err := encodeHeader(name, "", flags, size)
	if err != nil {
		return nil, err
	}
	binary.LittleEndian.PutUint32(b[offTargetCount:], uint32(len(targets)))
	s := b[dmIoctlSize:]
	for _, t := range targets {
		binary.LittleEndian.PutUint64(s[0:], t.Start)
		binary.LittleEndian.PutUint64(s[8:], t.Length)
		binary.LittleEndian.PutUint32(s[20:], uint32(specSize(t))) // next: offset past this target
		copy(s[24:], t.Type)
		copy(s[dmTargetSize:], t.Params)
		s = s[specSize(t):]
	}
	return b, nil
}

// Mapper makes device-mapper devices through /dev/mapper/control.
type Mapper struct {
	// Dev and Sys are the mounts of devtmpfs and sysfs; tests point them elsewhere.
	Dev, Sys string
	// ioctl performs one request; tests replace it.
	ioctl func(fd int, req uintptr, buf []byte) error
}

// NewMapper returns the Mapper of this machine.
func NewMapper() *Mapper { return &Mapper{Dev: "/dev", Sys: "/sys", ioctl: ioctlBuffer} }

func ioctlBuffer(fd int, req uintptr, buf []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(unsafe.Pointer(&buf[0])))
	if errno != 0 {
		return errno
	}
	return nil
}

// control opens the control node, making it first where no udev did.
func (m *Mapper) control() (*os.File, error) {
	path := filepath.Join(m.Dev, "mapper", "control")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	dev, err := readDevNumber(filepath.Join(m.Sys, "class/misc/device-mapper/dev"))
	if err != nil {
		return nil, fmt.Errorf("this kernel has no device mapper: %w", err)
	}
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(dev)); err != nil {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

// readDevNumber reads a "major:minor" line.
func readDevNumber(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	major, minor, ok := strings.Cut(strings.TrimSpace(string(text)), ":")
	ma, err1 := strconv.ParseUint(major, 10, 32)
	mi, err2 := strconv.ParseUint(minor, 10, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%s: %q is not major:minor", path, text)
	}
	return unix.Mkdev(uint32(ma), uint32(mi)), nil
}

// Create makes and activates the device name with the targets and returns the path
// of its node, <Dev>/dm-N. On failure nothing is left behind. Params of a secret
// target are zero afterwards, whatever the outcome.
func (m *Mapper) Create(name, uuid string, readOnly bool, targets ...Target) (path string, err error) {
	secret := false
	for _, t := range targets {
		if t.Secret {
			secret = true
			defer clear(t.Params)
		}
	}
	ctl, err := m.control()
	if err != nil {
		return "", err
	}
	defer ctl.Close()
	fd := int(ctl.Fd())

	var flags uint32
	if readOnly {
		flags |= dmFlagReadOnly
	}
	create, err := encodeHeader(name, uuid, flags, dmIoctlSize)
	if err != nil {
		return "", err
	}
	if err := m.ioctl(fd, dmDevCreate, create); err != nil {
		return "", fmt.Errorf("create device %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			if b, e := encodeHeader(name, "", 0, dmIoctlSize); e == nil {
				_ = m.ioctl(fd, dmDevRemove, b)
			}
		}
	}()
	if secret {
		flags |= dmFlagSecureData
	}
	table, err := encodeTable(name, flags, targets...)
	if err != nil {
		return "", err
	}
	err = m.ioctl(fd, dmTableLoad, table)
	if secret {
		clear(table)
	}
	if err != nil {
		return "", fmt.Errorf("load the %s table of device %s: %w", targets[len(targets)-1].Type, name, err)
	}
	resume, err := encodeHeader(name, "", flags&dmFlagReadOnly, dmIoctlSize)
	if err != nil {
		return "", err
	}
	if err := m.ioctl(fd, dmSuspend, resume); err != nil {
		return "", fmt.Errorf("activate device %s: %w", name, err)
	}
	dev := binary.LittleEndian.Uint64(create[offDev:])
	return m.node(dev)
}

// node returns the block node of a device number, making it where devtmpfs has
// not. The kernel encodes dev as huge_encode_dev: minor bits 0-7 and 20-43, major
// bits 8-19, which is what unix.Mkdev expects of a 32-bit pair.
func (m *Mapper) node(dev uint64) (string, error) {
	major, minor := uint32(dev>>8&0xfff), uint32(dev&0xff|dev>>12&0xfff00)
	path := filepath.Join(m.Dev, fmt.Sprintf("dm-%d", minor))
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return "", fmt.Errorf("make %s: %w", path, err)
	}
	return path, nil
}

// Remove removes the device; its key leaves kernel memory with it.
func (m *Mapper) Remove(name string) error {
	ctl, err := m.control()
	if err != nil {
		return err
	}
	defer ctl.Close()
	b, err := encodeHeader(name, "", 0, dmIoctlSize)
	if err != nil {
		return err
	}
	if err := m.ioctl(int(ctl.Fd()), dmDevRemove, b); err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}
