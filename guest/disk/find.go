// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Serials that the VMM gives its virtio-blk disks.
const (
	SerialRoot   = "dstack-root"
	SerialData   = "dstack-data"
	SerialShared = "dstack-shared"
)

// GPT names of the partitions of the root disk.
const (
	RootLabel    = "dstack-rootfs"
	ScriptsLabel = "dstack-scripts" // what a manifest's scripts run in (design.md §6)
)

// Finder looks for block devices in sysfs. Whatever it finds is a name only; the
// content is the host's.
type Finder struct {
	Sys, Dev string        // mounts of sysfs and devtmpfs
	Wait     time.Duration // how long Disk and Root wait for a device to appear
}

// NewFinder returns the Finder of this machine. Built-in drivers have probed their
// disks before PID 1 runs; the wait is for slow hosts.
func NewFinder() *Finder { return &Finder{Sys: "/sys", Dev: "/dev", Wait: 5 * time.Second} }

// Block is a disk or partition.
type Block struct {
	Name string // kernel name: vda, vda1
	Path string // node under Dev
	Size uint64 // bytes
}

func (f *Finder) block(name string) (Block, error) {
	text, err := os.ReadFile(filepath.Join(f.Sys, "class/block", name, "size"))
	if err != nil {
		return Block{}, err
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 54)
	if err != nil {
		return Block{}, fmt.Errorf("size of %s: %w", name, err)
	}
	return Block{Name: name, Path: filepath.Join(f.Dev, name), Size: sectors * 512}, nil
}

// names lists block devices in a fixed order, so that two runs choose alike.
func (f *Finder) names() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(f.Sys, "class/block"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, nil
}

// bySerial returns the kernel name of the one disk with the serial.
func (f *Finder) bySerial(serial string) (string, error) {
	names, err := f.names()
	if err != nil {
		return "", err
	}
	var found []string
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(f.Sys, "class/block", name, "serial"))
		if err == nil && string(bytes.TrimSpace(text)) == serial {
			found = append(found, name)
		}
	}
	switch len(found) {
	case 0:
		return "", fault.New("disk_missing", "no disk has the serial %s", serial)
	case 1:
		return found[0], nil
	}
	return "", fault.New("disk_ambiguous", "disks %s all have the serial %s", strings.Join(found, ", "), serial)
}

// partName returns PARTNAME of a device's uevent, or "".
func (f *Finder) partName(name string) string {
	text, err := os.ReadFile(filepath.Join(f.Sys, "class/block", name, "uevent"))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "PARTNAME="); ok {
			return v
		}
	}
	return ""
}

// Disk returns the disk with the serial; code disk_missing or disk_ambiguous.
func (f *Finder) Disk(serial string) (Block, error) {
	return f.retry(func() (Block, error) {
		name, err := f.bySerial(serial)
		if err != nil {
			return Block{}, err
		}
		return f.block(name)
	})
}

// Root returns the root partition; see Partition. Code root_missing or disk_ambiguous.
func (f *Finder) Root() (Block, error) {
	b, err := f.Partition(RootLabel)
	if fault.Code(err) == "partition_missing" {
		err = fault.Wrap(err, "root_missing", "find the root")
	}
	return b, err
}

// Partition returns a partition of the root disk: the one with the label on the disk
// with the serial dstack-root or, where no disk has that serial (platforms without
// serials), the first partition with the label. Choosing wrongly is harmless: the
// measured root hash decides what can be read from it. Code partition_missing or
// disk_ambiguous.
func (f *Finder) Partition(label string) (Block, error) {
	return f.retry(func() (Block, error) {
		names, err := f.names()
		if err != nil {
			return Block{}, err
		}
		disk, err := f.bySerial(SerialRoot)
		if err != nil && fault.Code(err) != "disk_missing" {
			return Block{}, err
		}
		for _, name := range names {
			if f.partName(name) != label {
				continue
			}
			if disk != "" && f.parent(name) != disk {
				continue
			}
			return f.block(name)
		}
		if disk != "" {
			return Block{}, fault.New("partition_missing", "disk %s has no partition labelled %s", disk, label)
		}
		return Block{}, fault.New("partition_missing", "no disk has a partition labelled %s", label)
	})
}

// parent returns the disk of a partition: the directory above it in sysfs.
func (f *Finder) parent(partition string) string {
	path, err := filepath.EvalSymlinks(filepath.Join(f.Sys, "class/block", partition))
	if err != nil {
		return ""
	}
	return filepath.Base(filepath.Dir(path))
}

// retry repeats find until it succeeds or Wait is over.
func (f *Finder) retry(find func() (Block, error)) (Block, error) {
	deadline := time.Now().Add(f.Wait)
	for {
		b, err := find()
		if err == nil {
			return b, nil
		}
		code := fault.Code(err)
		missing := code == "disk_missing" || code == "partition_missing" || errors.Is(err, os.ErrNotExist)
		if !missing || time.Now().After(deadline) {
			return Block{}, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}
