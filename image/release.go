// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
)

// initramfs holds the first process and the directories it mounts on, with the
// distribution's kernel the modules it needs to open the root, and no more.
// The archive is not compressed although upstream's name says gzip: the kernel
// takes either. Measured under emulation with a 16 MB program, CPU seconds of
// QEMU until power off: plain 4.1, gzip 4.5, zstd 4.9, lz4 4.2; through OVMF plain
// 6.8, gzip 8.1.
func (b *build) initramfs(_ context.Context, p *artifacts) (bool, error) {
	t := tree{}
	for _, d := range []string{"dev", "proc", "sys", "run", "tmp", "root", "newroot"} {
		t.add(d, node{kind: dir, mode: 0o755})
	}
	// The kernel opens it for the first process before anything is mounted.
	t.add("dev/console", node{kind: char, mode: 0o600, major: 5, minor: 1})
	addModules(t, "", p.early)
	t.add("init", node{kind: file, mode: 0o755, from: p.guest})
	var err error
	p.initramfs, err = t.cpio()
	return false, err
}

// firmware is Debian's OVMF build, which carries the TDX metadata. It is not the
// firmware of a production release: the metadata says where it comes from, and
// a verdict carries a finding.
func (b *build) firmware(_ context.Context, p *artifacts) (bool, error) {
	f, err := b.openDeb("ovmf")
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = debFiles(f, func(h *tar.Header, r io.Reader) (err error) {
		if h.Name == "usr/share/ovmf/OVMF.fd" && h.Typeflag == tar.TypeReg {
			p.firmware, err = io.ReadAll(io.LimitReader(r, h.Size))
		}
		return err
	})
	if err == nil && p.firmware == nil {
		err = fault.New("image_input_incomplete", "package ovmf has no file /usr/share/ovmf/OVMF.fd").WithFix("the package changed: adapt image/release.go")
	}
	return true, err
}

// release writes the release directory of guest-os.md §2.1.
func (b *build) release(_ context.Context, p *artifacts) (bool, error) {
	name := fmt.Sprintf("dstack-%s-%s", b.Flavour, Version)
	if b.Kernel == KernelDistribution {
		name = fmt.Sprintf("dstack-%s-%s-%s", b.Flavour, b.Kernel, Version)
	}
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return false, diskFull(err)
	}
	work, err := os.MkdirTemp(b.Out, "."+name+"-")
	if err != nil {
		return false, diskFull(err)
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return false, err
	}

	cmdline := fmt.Sprintf("%s dstack.rootfs_hash=%x dstack.rootfs_size=%d dstack.scripts_hash=%x dstack.scripts_size=%d",
		cmdlineBase, p.rootfs.hash, p.rootfs.size, p.scripts.hash, p.scripts.size)
	meta := osimage.Metadata{
		BIOS: osimage.FirmwareName, Kernel: osimage.KernelName, Initrd: osimage.InitrdName, Rootfs: osimage.RootfsName,
		Cmdline: cmdline, Version: Version, GitRevision: b.Revision, SharedRO: true, IsDev: devImage(b.Flavour),
		Flavour: b.Flavour, SecurityEpoch: securityEpoch, Firmware: "debian-ovmf",
	}
	var metadata bytes.Buffer
	enc := json.NewEncoder(&metadata)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(meta); err != nil {
		return false, err
	}
	// The document holds for memory sizes at which QEMU's patch of the kernel
	// header does not depend on the size: 2 GiB is the least of them.
	document, err := measure.TDXDocument(measure.Launch{Firmware: p.firmware, Kernel: p.kernel, Initrd: p.initramfs, Cmdline: cmdline, VCPUs: 1, MemoryBytes: 2 << 30})
	if err != nil {
		return false, fmt.Errorf("measure the image: %w", err)
	}

	var sums bytes.Buffer
	for _, f := range []struct {
		name string
		data []byte
	}{
		{osimage.FirmwareName, p.firmware},
		{osimage.KernelName, p.kernel},
		{osimage.InitrdName, p.initramfs},
		{osimage.MetadataName, metadata.Bytes()},
		{osimage.TDXName, document},
	} {
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(f.data), f.name)
		if err := writeNew(filepath.Join(work, f.name), f.data); err != nil {
			return false, diskFull(err)
		}
		p.compressed += int64(compressedSize(f.data))
	}
	digest := sha256.Sum256(sums.Bytes())
	if err := writeNew(filepath.Join(work, osimage.SumsName), sums.Bytes()); err != nil {
		return false, diskFull(err)
	}
	if err := writeNew(filepath.Join(work, osimage.DigestName), fmt.Appendf(nil, "%x\n", digest)); err != nil {
		return false, diskFull(err)
	}
	// The cached disk is shared by link where the file system allows it; both
	// sides are written once and only read after.
	rootfs := filepath.Join(work, osimage.RootfsName)
	if err := os.Link(p.rootfs.file, rootfs); err != nil {
		if err := copyFile(p.rootfs.file, rootfs); err != nil {
			return false, diskFull(err)
		}
	}
	st, err := os.Stat(rootfs)
	if err != nil {
		return false, err
	}
	p.compressed += st.Size() // squashfs is compressed already

	// Replace an earlier release of the same name; rename cannot replace a
	// directory that is not empty.
	p.dir = filepath.Join(b.Out, name)
	old := work + ".old"
	if err := os.Rename(p.dir, old); err == nil {
		defer os.RemoveAll(old)
	} else if !os.IsNotExist(err) {
		return false, err
	}
	return false, os.Rename(work, p.dir)
}

// compressedSize is what data takes in a release archive.
func compressedSize(data []byte) int {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault))
	if err != nil {
		return len(data)
	}
	defer enc.Close()
	return len(enc.EncodeAll(data, nil))
}

// writeNew writes a file with mode 0644 whatever the umask.
func writeNew(path string, data []byte) error {
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return err
	}
	return os.Chmod(path, 0o644)
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if err := out.Chmod(0o644); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
