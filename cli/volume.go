// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/osimage/volume"
)

// volumeFile is a volume's image and its name in the stack.
type volumeFile struct{ path, source string }

var volumeName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

// volumes puts the volumes that are given into the draft, in the place of those it
// has. In the stack they are named by their content, too, so that no volume of
// another app is ever replaced.
//
// Codes: usage, file_missing, volume_malformed.
func (w *workload) volumes(d *manifest.Draft) ([]volumeFile, error) {
	if len(w.Volume) == 0 {
		return nil, nil
	}
	d.VerityVolumes = nil
	var out []volumeFile
	for _, text := range w.Volume {
		name, path, ok := strings.Cut(text, "=")
		if !ok || path == "" || !volumeName.MatchString(name) {
			return nil, usage("--volume wants NAME=FILE or NAME=FILE:TARGET, not %q", text)
		}
		target := "/dstack/volumes/" + name
		if i := strings.LastIndex(path, ":/"); i > 0 {
			path, target = path[:i], path[i+1:]
		}
		root, err := volumeRoot(path)
		if err != nil {
			return nil, err
		}
		v := volumeFile{path, name + "-" + hex.EncodeToString(root[:8])}
		out = append(out, v)
		d.VerityVolumes = append(d.VerityVolumes, manifest.VerityVolume{Source: v.source, Root: root, Target: target})
	}
	return out, nil
}

// volumeRoot reads the verity root hash that a volume's image advertises. That the
// content has this root the guest checks, block by block.
//
// Codes: file_missing, volume_malformed.
func volumeRoot(path string) (root [32]byte, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return root, fault.New("file_missing", "%s does not exist", path).WithFix("give the path of a volume's image")
	}
	if err != nil {
		return root, err
	}
	defer f.Close()
	if root, err = advertisedRoot(f); err != nil {
		return root, fault.Wrap(err, "volume_malformed", "%s is not a volume", path).
			WithFix("make one: a file system under dm-verity in the envelope of guest-os.md §9")
	}
	return root, nil
}

// advertisedRoot reads the metadata in a disk's first partition.
func advertisedRoot(disk io.ReaderAt) (root [32]byte, err error) {
	const sector = 512
	table := make([]byte, 2*sector)
	if _, err := disk.ReadAt(table, sector); err != nil {
		return root, fmt.Errorf("read the partition table: %w", err)
	}
	if !bytes.HasPrefix(table, []byte("EFI PART")) {
		return root, errors.New("it has no partition table")
	}
	first := binary.LittleEndian.Uint64(table[sector+32:])
	if first < 3 || first > 1<<40 {
		return root, fmt.Errorf("its first partition is at sector %d", first)
	}
	meta := make([]byte, volume.MetadataSize)
	if _, err := disk.ReadAt(meta, int64(first)*sector); err != nil {
		return root, fmt.Errorf("read its metadata: %w", err)
	}
	if root, err = volume.ParseMetadata(meta); err == nil && root == [32]byte{} {
		err = errors.New("its root hash is zero")
	}
	return root, err
}

type volumeCmd struct {
	Build volumeBuildCmd `cmd:"" help:"Make a volume of a file system image, squashfs or ext4."`
}

type volumeBuildCmd struct {
	FS     string `arg:"" help:"Image of a file system: squashfs, or ext4 with blocks of 4096 bytes." placeholder:"FILE"`
	Output string `short:"o" required:"" help:"Where to write the volume." placeholder:"FILE"`
}

func (c *volumeBuildCmd) Help() string {
	return `A volume is read-only data for an app, such as a model: a disk image in which every
block is checked against one hash, which the app's manifest names. Make the file system
with mksquashfs or mke2fs, the volume with this, and deploy with --volume NAME=FILE.`
}

// Run writes the volume beside its place and moves it there when it is whole. Codes:
// file_missing, volume_fs, volume_write.
func (c *volumeBuildCmd) Run(a *app) (err error) {
	in, err := os.Open(c.FS)
	if err != nil {
		return fault.Wrap(err, "file_missing", "open %s", c.FS).WithFix("give the image of a file system")
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return fault.Wrap(err, "file_missing", "%s is no regular file", c.FS).WithFix("give the image of a file system")
	}
	if err := mountable(in); err != nil {
		return err
	}
	if info.Size()%verity.BlockSize != 0 {
		return fault.New("volume_fs", "%s has %d bytes, no multiple of %d", c.FS, info.Size(), verity.BlockSize).WithFix("truncate -s %%%d %s", verity.BlockSize, c.FS)
	}
	failed := func(err error) error {
		return fault.Wrap(err, "volume_write", "write the volume %s", c.Output).WithFix("choose a writable place with room for it")
	}
	temp := c.Output + ".new"
	out, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return failed(err)
	}
	defer os.Remove(temp)
	root, err := volume.Build(out, in, info.Size())
	if err := errors.Join(err, out.Sync(), out.Close()); err != nil {
		return failed(err)
	}
	if err := os.Rename(temp, c.Output); err != nil {
		return failed(err)
	}
	a.printf("Volume   %s\nRoot     %x\n", c.Output, root)
	return a.result(map[string]any{"volume": c.Output, "verity_root": hex.EncodeToString(root[:])})
}

// mountable refuses what no guest mounts: it knows two file systems by their magic
// (spec/guest-os.md §9). Code volume_fs.
func mountable(r io.ReaderAt) error {
	head := make([]byte, 2048)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	head = head[:n]
	squashfs := bytes.HasPrefix(head, []byte("hsqs"))
	ext4 := len(head) > 0x43a && head[0x438] == 0x53 && head[0x439] == 0xef
	if !squashfs && !ext4 {
		return fault.New("volume_fs", "the file begins neither a squashfs nor an ext4 file system").
			WithFix("make one with mksquashfs DIR FILE, or mke2fs -t ext4 -b 4096 -d DIR FILE SIZE")
	}
	return nil
}
