// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/osimage/volume"
)

// maxScan bounds the disks that are looked at for verity volumes.
const maxScan = 64

// A VerityMount is a read-only volume that the manifest names (spec/guest-os.md §9).
type VerityMount struct {
	Root   [32]byte // root hash
	Target string   // absolute path of the mount point
}

// Volumes mounts verity volumes. Which disk has which volume is the host's word; the
// root hash of the manifest decides what can be read (threats.md E08).
type Volumes struct {
	Finder *Finder
	Mapper *Mapper
}

// candidate is a disk that says it holds the volume with the root.
type candidate struct {
	disk       string
	root       [32]byte
	data, tree Block
}

// MountAll mounts every volume at its target, in order; volumes with the same root
// share one device. A disk that only says it is the one does not stand in the way of
// another that is.
//
// Codes: volume_missing (no disk advertises the root), volume_malformed (all that do
// are damaged or lie), volume_mount. What was mounted before an error stays: the boot
// ends there.
func (v *Volumes) MountAll(ctx context.Context, mounts []VerityMount) error {
	type device struct{ node, fs string }
	open := map[[32]byte]device{}
	for i, m := range mounts {
		d, ok := open[m.Root]
		if !ok {
			found, err := v.find(ctx, m.Root)
			if err != nil {
				return err
			}
			node, fs, err := v.open("dstack-verity"+strconv.Itoa(i), found, m.Root)
			if err != nil {
				return err
			}
			d = device{node, fs}
			open[m.Root] = d
		}
		if err := mountVolume(d.node, d.fs, m.Target); err != nil {
			return fault.Wrap(err, "volume_mount", "mount the volume %x at %s", m.Root, m.Target)
		}
	}
	return nil
}

// find waits until some disk advertises the root.
func (v *Volumes) find(ctx context.Context, root [32]byte) ([]candidate, error) {
	deadline := time.Now().Add(v.Finder.Wait)
	for {
		all, err := v.scan()
		if err != nil {
			return nil, err
		}
		var found []candidate
		for _, c := range all {
			if c.root == root {
				found = append(found, c)
			}
		}
		if len(found) > 0 {
			return found, nil
		}
		if time.Now().After(deadline) {
			return nil, fault.New("volume_missing", "no disk holds the volume with the root hash %x", root).
				WithFix("attach the image that the manifest names; its root hash must be the manifest's")
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// scan returns the disks with the three partitions of a volume, in order of name.
func (v *Volumes) scan() ([]candidate, error) {
	names, err := v.Finder.names()
	if err != nil {
		return nil, err
	}
	var found []candidate
	for _, name := range names {
		if _, err := os.Stat(filepath.Join(v.Finder.Sys, "class/block", name, "device")); err != nil {
			continue // a partition, or a device of the kernel's own
		}
		parts := map[int]string{}
		for _, part := range names {
			if n := v.Finder.partNumber(part); n >= 1 && n <= 3 && v.Finder.parent(part) == name {
				parts[n] = part
			}
		}
		if c, ok := v.look(name, parts); ok {
			found = append(found, c)
		}
		if len(found) == maxScan {
			break
		}
	}
	return found, nil
}

// look reads what the first partition advertises.
func (v *Volumes) look(disk string, parts map[int]string) (candidate, bool) {
	c := candidate{disk: disk}
	for n, label := range []string{volume.LabelMetadata, volume.LabelData, volume.LabelVerity} {
		if v.Finder.partName(parts[n+1]) != label {
			return c, false
		}
	}
	metadata, err1 := v.Finder.block(parts[1])
	data, err2 := v.Finder.block(parts[2])
	tree, err3 := v.Finder.block(parts[3])
	if errors.Join(err1, err2, err3) != nil {
		return c, false
	}
	b, err := readStart(metadata.Path, volume.MetadataSize)
	if err != nil {
		return c, false
	}
	if c.root, err = volume.ParseMetadata(b); err != nil {
		return c, false
	}
	c.data, c.tree = data, tree
	return c, true
}

// partNumber returns the number of a partition, 0 for a disk.
func (f *Finder) partNumber(name string) int {
	text, err := os.ReadFile(filepath.Join(f.Sys, "class/block", name, "partition"))
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return n
}

// open makes the device name over the first candidate that is what it says, as far as
// its first block shows, and returns its file system.
func (v *Volumes) open(name string, candidates []candidate, root [32]byte) (node, fs string, err error) {
	var failures []error
	for _, c := range candidates {
		node, fs, err := v.try(name, c, root)
		if err == nil {
			return node, fs, nil
		}
		failures = append(failures, fmt.Errorf("disk %s: %w", c.disk, err))
	}
	return "", "", fault.Wrap(errors.Join(failures...), "volume_malformed", "open the volume %x", root).
		WithFix("attach an intact image of the volume")
}

func (v *Volumes) try(name string, c candidate, root [32]byte) (node, fs string, err error) {
	sb, err := readStart(c.tree.Path, verity.BlockSize)
	if err != nil {
		return "", "", err
	}
	blocks, err := verity.DataBlocks(sb)
	if err != nil {
		return "", "", err
	}
	if blocks > c.data.Size/verity.BlockSize || verity.TreeSize(blocks) > c.tree.Size {
		return "", "", fmt.Errorf("%d blocks of data do not fit its partitions", blocks)
	}
	if node, err = v.Mapper.Create(name, "", true, volumeTarget(c.data.Path, c.tree.Path, blocks, root)); err != nil {
		return "", "", err
	}
	first, err := readStart(node, verity.BlockSize)
	if err == nil {
		fs, err = volumeFS(first)
	}
	if err != nil {
		return "", "", errors.Join(err, removeSoon(v.Mapper, name))
	}
	return node, fs, nil
}

// volumeTarget is the dm-verity table of a volume: the superblock takes the first
// block of the tree's device.
func volumeTarget(data, tree string, blocks uint64, root [32]byte) Target {
	return Target{Length: blocks * verity.BlockSize / 512, Type: "verity", Params: fmt.Appendf(nil, "1 %s %s %d %d %d 1 sha256 %s %s",
		data, tree, verity.BlockSize, verity.BlockSize, blocks, hex.EncodeToString(root[:]), hex.EncodeToString(veritySalt[:]))}
}

// volumeFS names the file system of verified bytes; only these are ever mounted.
func volumeFS(first []byte) (string, error) {
	switch {
	case string(first[:4]) == "hsqs":
		return "squashfs", nil
	case first[1080] == 0x53 && first[1081] == 0xef:
		return "ext4", nil
	}
	return "", errors.New("it holds neither squashfs nor ext4")
}

// mountVolume mounts the device read-only on an empty directory, so that it hides
// nothing of the system; a target where it already is stays.
func mountVolume(node, fs, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	var at unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &at); err != nil {
		return err
	}
	if at.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("%s is not a directory", target)
	}
	if at.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		var dev unix.Stat_t
		if err := unix.Stat(node, &dev); err != nil {
			return err
		}
		if unix.Major(dev.Rdev) == at.Dev_major && unix.Minor(dev.Rdev) == at.Dev_minor {
			return nil
		}
		return errors.New("something else is mounted there")
	}
	if entries, err := os.ReadDir(target); err != nil || len(entries) > 0 {
		return errors.Join(err, fmt.Errorf("%s is not an empty directory", target))
	}
	data := ""
	if fs == "ext4" {
		data = "noload"
	}
	return unix.Mount(node, target, fs, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, data)
}

// readStart reads the first n bytes of a device once.
func readStart(path string, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	_, err = io.ReadFull(f, b)
	return b, err
}
