// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

const libraries = "usr/lib/x86_64-linux-gnu"

// root assembles the root file system, holds it against the committed list,
// and packs it with its verity tree.
func (b *build) root(ctx context.Context, p *artifacts) (bool, error) {
	t, err := b.rootTree(p)
	if err != nil {
		return false, err
	}
	if err := b.compareFileList(t); err != nil {
		return false, err
	}
	digest, err := t.digest()
	if err != nil {
		return false, err
	}
	comp := b.compression()
	var cached bool
	p.verity, cached, err = b.pack(ctx, t, digest, comp)
	return cached, err
}

// compression returns mksquashfs' compressor: lz4 reads fastest in an emulated
// machine, where tests and demos run; zstd is smallest to ship.
func (b *build) compression() []string {
	if b.Flavour == Prod {
		return []string{"-comp", "zstd", "-Xcompression-level", "15"}
	}
	return []string{"-comp", "lz4", "-Xhc"}
}

func (b *build) rootTree(p *artifacts) (tree, error) {
	wanted := debianFiles
	if b.Flavour == Debug {
		wanted = append(append(wanted[:0:0], wanted...), debugFiles...)
	}
	pool, err := b.unpack(wanted)
	if err != nil {
		return nil, err
	}

	t := tree{}
	for _, m := range mountPoints {
		t.add(m.path, node{kind: dir, mode: m.mode})
	}
	for name, target := range links {
		t.add(name, node{kind: symlink, mode: 0o777, target: target})
	}
	for name, text := range texts {
		t.add(name, node{kind: file, mode: 0o644, data: []byte(text)})
	}
	t.add("usr/lib/os-release", node{kind: file, mode: 0o644, data: []byte(b.osRelease())})

	// One file under three names; see engine/main.go.
	t.add("usr/bin/containerd", node{kind: file, mode: 0o755, from: p.engine})
	t.add("usr/bin/dockerd", node{kind: hardlink, mode: 0o755, target: "usr/bin/containerd"})
	t.add("usr/bin/docker-compose", node{kind: hardlink, mode: 0o755, target: "usr/bin/containerd"})
	t.add("usr/bin/containerd-shim-runc-v2", node{kind: file, mode: 0o755, from: p.shim})

	for _, f := range wanted {
		data, ok := pool.files[f.pkg+":"+f.from]
		if !ok {
			return nil, fault.New("image_input_incomplete", "package %s has no file /%s", f.pkg, f.from).WithFix("the package changed: adapt image/recipe.go")
		}
		mode := uint32(0o644)
		if strings.HasPrefix(f.to, "usr/bin/") {
			mode = 0o755
		}
		t.add(f.to, node{kind: file, mode: mode, data: data})
	}
	for name, target := range aliases {
		t.add(name, node{kind: hardlink, mode: 0o755, target: target})
	}
	if b.Flavour == Debug {
		for _, a := range debugApplets {
			t.add("usr/bin/"+a, node{kind: hardlink, mode: 0o755, target: "usr/bin/busybox"})
		}
	}
	if err := pool.closure(t); err != nil {
		return nil, err
	}

	certs, err := b.certificates()
	if err != nil {
		return nil, err
	}
	t.add("etc/ssl/certs/ca-certificates.crt", node{kind: file, mode: 0o644, data: certs})
	return t, nil
}

func (b *build) osRelease() string {
	return fmt.Sprintf("NAME=\"dstack-os\"\nID=dstack\nPRETTY_NAME=\"dstack-os %s (%s)\"\nVERSION_ID=%s\nVARIANT_ID=%s\n", Version, b.Flavour, Version, b.Flavour)
}

// pool is what was read from packages: wanted files by "package:path", and
// every shared library by the name that programs ask for.
type pool struct {
	files map[string][]byte
	libs  map[string][]byte
}

// unpack reads wanted files, and all shared libraries, from the packages.
func (b *build) unpack(wanted []struct{ pkg, from, to string }) (*pool, error) {
	want := map[string]bool{}
	for _, f := range wanted {
		want[f.pkg+":"+f.from] = true
	}
	p := &pool{files: map[string][]byte{}, libs: map[string][]byte{}}
	for _, pkg := range debianPackages {
		if pkg == "ovmf" || pkg == "ca-certificates" || pkg == "busybox-static" && b.Flavour != Debug {
			continue
		}
		f, err := b.openDeb(pkg)
		if err != nil {
			return nil, err
		}
		err = debFiles(f, func(h *tar.Header, r io.Reader) error {
			lib := path.Dir(h.Name) == libraries && strings.Contains(path.Base(h.Name), ".so")
			if h.Typeflag != tar.TypeReg || !lib && !want[pkg+":"+h.Name] {
				return nil
			}
			data, err := io.ReadAll(io.LimitReader(r, h.Size))
			if err != nil {
				return err
			}
			p.files[pkg+":"+h.Name] = data
			if lib {
				if name := soname(data); name != "" {
					p.libs[name] = data
				}
			}
			return nil
		})
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("package %s: %w", pkg, err)
		}
	}
	return p, nil
}

// soname returns the name by which a library is asked for, or "".
func soname(data []byte) string {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return ""
	}
	names, err := f.DynString(elf.DT_SONAME)
	if err != nil || len(names) != 1 || strings.Contains(names[0], "/") {
		return ""
	}
	return names[0]
}

// closure adds the libraries that the programs in the tree need, and those that
// these need.
func (p *pool) closure(t tree) error {
	todo := t.names()
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		n := t[name]
		if n.kind != file {
			continue
		}
		r, _, err := n.open()
		if err != nil {
			return err
		}
		needed, err := needs(r.(io.Reader))
		r.Close()
		if err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
		for _, lib := range needed {
			to := libraries + "/" + lib
			if _, ok := t[to]; ok {
				continue
			}
			data, ok := p.libs[lib]
			if !ok {
				return fault.New("image_library_missing", "/%s needs %s, which no package of the recipe has", name, lib).WithFix("add its package to debianPackages in image/recipe.go and run `dstack image lock`")
			}
			mode := uint32(0o644)
			if strings.HasPrefix(lib, "ld-linux") {
				mode = 0o755
			}
			t.add(to, node{kind: file, mode: mode, data: data})
			todo = append(todo, to)
		}
	}
	return nil
}

// needs returns the libraries that an ELF file names, and its program
// interpreter; none for any other file.
func needs(r io.Reader) ([]string, error) {
	var at io.ReaderAt
	switch v := r.(type) {
	case *os.File:
		at = v
	default:
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		at = bytes.NewReader(data)
	}
	var magic [4]byte
	if _, err := at.ReadAt(magic[:], 0); err != nil || string(magic[:]) != elf.ELFMAG {
		return nil, nil
	}
	f, err := elf.NewFile(at)
	if err != nil {
		return nil, err
	}
	libs, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			data, err := io.ReadAll(io.LimitReader(prog.Open(), 4096))
			if err != nil {
				return nil, err
			}
			libs = append(libs, path.Base(strings.TrimRight(string(data), "\x00")))
		}
	}
	return libs, nil
}

// certificates joins the certificates of the public CAs, sorted by file name.
func (b *build) certificates() ([]byte, error) {
	f, err := b.openDeb("ca-certificates")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	certs := map[string][]byte{}
	err = debFiles(f, func(h *tar.Header, r io.Reader) error {
		if h.Typeflag != tar.TypeReg || !strings.HasPrefix(h.Name, "usr/share/ca-certificates/mozilla/") || path.Ext(h.Name) != ".crt" {
			return nil
		}
		data, err := io.ReadAll(io.LimitReader(r, h.Size))
		certs[h.Name] = data
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("package ca-certificates: %w", err)
	}
	if len(certs) < 50 {
		return nil, fault.New("image_input_incomplete", "package ca-certificates has %d certificates", len(certs))
	}
	var names []string
	for name := range certs {
		names = append(names, name)
	}
	sort.Strings(names)
	var out bytes.Buffer
	for _, name := range names {
		out.Write(bytes.TrimRight(certs[name], "\n"))
		out.WriteByte('\n')
	}
	return out.Bytes(), nil
}

// compareFileList holds the tree against the committed list of the flavour, so
// that nothing enters or leaves an image without a line in a change.
func (b *build) compareFileList(t tree) error {
	file := b.recipe("files." + b.Flavour + ".txt")
	have := t.list()
	if b.UpdateFileList {
		return durable.WriteFile(file, []byte(have), 0o644)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		return fault.Wrap(err, "image_files_differ", "read the committed file list").WithFix("restore it from version control")
	}
	if diff := diffLines(string(want), have); diff != "" {
		found := filepath.Join(string(b.cache), filepath.Base(file))
		if err := os.WriteFile(found, []byte(have), 0o644); err != nil {
			return diskFull(err)
		}
		return fault.New("image_files_differ", "the files of the %s root are not those of %s:\n%s", b.Flavour, filepath.Base(file), diff).
			WithFix("if the change is meant: cp %s %s", found, file)
	}
	return nil
}

// diffLines returns the lines that only one of two sorted lists has.
func diffLines(want, have string) string {
	count := map[string]int{}
	for l := range strings.Lines(want) {
		count[l]++
	}
	for l := range strings.Lines(have) {
		count[l]--
	}
	var out []string
	for l, n := range count {
		if n > 0 {
			out = append(out, "- "+strings.TrimSuffix(l, "\n"))
		} else if n < 0 {
			out = append(out, "+ "+strings.TrimSuffix(l, "\n"))
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i][2:] < out[j][2:] })
	return strings.Join(out, "\n")
}

// verityImage is a packed root: path of the disk image, size in bytes of the
// data before the tree, and root hash.
type verityImage struct {
	disk string
	size int64
	root [32]byte
}

// pack makes the squashfs, its verity tree and the disk around both, cached by
// the digest of the tree.
func (b *build) pack(ctx context.Context, t tree, digest string, comp []string) (v verityImage, cached bool, err error) {
	k := key(struct {
		Tree       string
		Args       []string
		Mksquashfs string
	}{digest, squashArgs(comp), b.tools.Mksquashfs})
	dir, cached, err := b.cache.part("root", k, func(dir string) error {
		return packRoot(ctx, t, comp, dir, b.vary)
	})
	if err != nil {
		return v, false, err
	}
	v.disk = filepath.Join(dir, "rootfs.img.parted.verity")
	meta, err := os.ReadFile(filepath.Join(dir, "verity"))
	if err != nil {
		return v, false, err
	}
	var hash string
	if _, err := fmt.Sscanf(string(meta), "%s %d\n", &hash, &v.size); err != nil {
		return v, false, fmt.Errorf("cached root %s: %w", dir, err)
	}
	_, err = hex.Decode(v.root[:], []byte(hash))
	return v, cached, err
}

// squashArgs are the options of mksquashfs that decide the bytes. It takes the
// mode of the root directory from an option and not from the archive.
func squashArgs(comp []string) []string {
	return append([]string{"-tar", "-noappend", "-no-xattrs", "-reproducible", "-b", "128K", "-all-root", "-root-mode", "0755",
		"-mkfs-time", fmt.Sprint(epoch), "-all-time", fmt.Sprint(epoch)}, comp...)
}

func packRoot(ctx context.Context, t tree, comp []string, dir string, vary variation) error {
	squash := filepath.Join(dir, "root.squashfs")
	args := append([]string{"-", squash, "-processors", fmt.Sprint(runtime.NumCPU()), "-quiet", "-no-progress"}, squashArgs(comp)...)
	cmd := exec.CommandContext(ctx, "mksquashfs", args...)
	cmd.Env = buildEnv(vary.env) // SOURCE_DATE_EPOCH would clash with -mkfs-time
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stdin = pr
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		pr.Close()
		pw.Close()
		return err
	}
	pr.Close()
	werr := t.writeTar(pw)
	pw.Close()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("mksquashfs: %w: %s", err, lastLines(out.String(), 6))
	}
	if werr != nil {
		return fmt.Errorf("write the root for mksquashfs: %w", werr)
	}

	f, err := os.OpenFile(squash, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	size := (st.Size() + verity.BlockSize - 1) / verity.BlockSize * verity.BlockSize
	if err := f.Truncate(size); err != nil {
		return err
	}
	vtree, root, err := verity.Tree(io.NewSectionReader(f, 0, size), size)
	if err != nil {
		return err
	}
	disk, err := os.OpenFile(filepath.Join(dir, "rootfs.img.parted.verity"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := disk.Chmod(0o644); err != nil { // whatever the umask: it becomes a file of the release
		disk.Close()
		return err
	}
	content := io.MultiReader(io.NewSectionReader(f, 0, size), bytes.NewReader(vtree))
	if err := gpt.Write(disk, content, size+int64(len(vtree))); err != nil {
		disk.Close()
		return err
	}
	if err := disk.Close(); err != nil {
		return err
	}
	if err := os.Remove(squash); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "verity"), fmt.Appendf(nil, "%x %d\n", root, size), 0o644)
}
