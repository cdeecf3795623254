// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

const libraries = "usr/lib/x86_64-linux-gnu"

// root assembles the root file system, holds it against the committed list,
// and packs it, with its verity tree and the scripts layer, into the root disk.
func (b *build) root(ctx context.Context, p *artifacts) (bool, error) {
	t, err := b.rootTree(p)
	if err != nil {
		return false, err
	}
	if err := b.compareFileList(b.Flavour, t); err != nil {
		return false, err
	}
	addModules(t, "", p.late) // their list was compared when they were chosen
	var cached bool
	p.rootfs, cached, err = b.packRoot(ctx, t, p.scripts)
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
	t := tree{}
	if err := b.skeleton(t); err != nil {
		return nil, err
	}
	for name, text := range texts {
		t.add(name, node{kind: file, mode: 0o644, data: []byte(text)})
	}

	// One file under two names; see engine/main.go.
	t.add("usr/bin/docker-compose", node{kind: file, mode: 0o755, from: p.engine})
	t.add("usr/bin/dockerd", node{kind: hardlink, mode: 0o755, target: "usr/bin/docker-compose"})
	t.add("usr/bin/containerd-shim-runc-v2", node{kind: file, mode: 0o755, from: p.shim})

	if err := p.pool.addFiles(t, debianFiles); err != nil {
		return nil, err
	}
	for name, target := range aliases {
		t.add(name, node{kind: hardlink, mode: 0o755, target: target})
	}
	if b.Flavour == Debug {
		if err := p.pool.addFiles(t, debugFiles); err != nil {
			return nil, err
		}
		for _, a := range debugApplets {
			t.add("usr/bin/"+a, node{kind: hardlink, mode: 0o755, target: "usr/bin/busybox"})
		}
	}
	return t, p.pool.closure(t)
}

// skeleton adds what root and scripts layer have alike: mount points, the usual
// links, the certificates of the public CAs and the name of the system.
func (b *build) skeleton(t tree) error {
	for _, m := range mountPoints {
		t.add(m.path, node{kind: dir, mode: m.mode})
	}
	for name, target := range links {
		t.add(name, node{kind: symlink, mode: 0o777, target: target})
	}
	t.add("usr/lib/os-release", node{kind: file, mode: 0o644, data: []byte(b.osRelease())})
	certs, err := b.certificates()
	if err != nil {
		return err
	}
	t.add("etc/ssl/certs/ca-certificates.crt", node{kind: file, mode: 0o644, data: certs})
	return nil
}

func (b *build) osRelease() string {
	return fmt.Sprintf("NAME=\"dstack-os\"\nID=dstack\nPRETTY_NAME=\"dstack-os %s (%s)\"\nVERSION_ID=%s\nVARIANT_ID=%s\n", Version, b.Flavour, Version, b.Flavour)
}

// pool is what was read from packages: files by "package:path", and every shared
// library by the name that programs ask for.
type pool struct {
	files map[string][]byte
	libs  map[string][]byte
}

// unpack reads the files that the recipe takes, and all shared libraries, from the
// packages.
func (b *build) unpack(ctx context.Context, p *artifacts) (bool, error) {
	want := map[string]bool{}
	for _, list := range [][]debianFile{debianFiles, debugFiles, scriptsFiles} {
		for _, f := range list {
			want[f.pkg+":"+f.from] = true
		}
	}
	whole := map[string]bool{}
	for _, pkg := range scriptsPrograms {
		whole[pkg] = true
	}
	p.pool = &pool{files: map[string][]byte{}, libs: map[string][]byte{}}
	var mu sync.Mutex
	read := func(pkg string) error {
		f, err := b.openDeb(pkg)
		if err != nil {
			return err
		}
		defer f.Close()
		err = debFiles(f, func(h *tar.Header, r io.Reader) error {
			lib := path.Dir(h.Name) == libraries && strings.Contains(path.Base(h.Name), ".so")
			program := whole[pkg] && path.Dir(h.Name) == "usr/bin"
			if h.Typeflag != tar.TypeReg || !lib && !program && !want[pkg+":"+h.Name] {
				return nil
			}
			data, err := io.ReadAll(io.LimitReader(r, h.Size))
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			p.pool.files[pkg+":"+h.Name] = data
			if lib {
				if name := soname(data); name != "" {
					p.pool.libs[name] = data
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("package %s: %w", pkg, err)
		}
		return nil
	}

	// Decompression is the time this takes: one package for each processor.
	todo := make(chan string)
	errs := make([]error, runtime.NumCPU())
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			for pkg := range todo {
				if errs[i] == nil {
					errs[i] = read(pkg)
				}
			}
		})
	}
	for _, pkg := range debianPackages {
		if pkg == "ovmf" || pkg == "ca-certificates" || pkg == "busybox-static" && b.Flavour != Debug {
			continue
		}
		todo <- pkg
	}
	close(todo)
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	return false, errors.Join(errs...)
}

// addFiles adds files of packages to the tree: programs to usr/bin, with mode 0755.
func (p *pool) addFiles(t tree, list []debianFile) error {
	for _, f := range list {
		data, ok := p.files[f.pkg+":"+f.from]
		if !ok {
			return fault.New("image_input_incomplete", "package %s has no file /%s", f.pkg, f.from).WithFix("the package changed: adapt image/recipe.go")
		}
		mode := uint32(0o644)
		if strings.HasPrefix(f.to, "usr/bin/") {
			mode = 0o755
		}
		t.add(f.to, node{kind: file, mode: mode, data: data})
	}
	return nil
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

// compareFileList holds a tree against the committed list of its name, a flavour,
// "scripts" or "modules", so that nothing enters or leaves an image without a line in a change.
func (b *build) compareFileList(name string, t tree) error {
	file := b.recipe("files." + name + ".txt")
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
		return fault.New("image_files_differ", "the files of %s are not those of %s:\n%s", name, filepath.Base(file), diff).
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

// layer is a packed file system in a file of its own or, for the root, in the
// partition of a disk: a squashfs, and its verity tree behind it.
type layer struct {
	file string
	size int64 // bytes of the squashfs, a multiple of the block size
	hash [32]byte
}

// layerPart returns a part of the cache that holds a layer, which fill makes.
func (b *build) layerPart(kind, key, file string, fill func(dir string) (layer, error)) (l layer, cached bool, err error) {
	dir, cached, err := b.cache.part(kind, key, func(dir string) error {
		l, err := fill(dir)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "verity"), fmt.Appendf(nil, "%x %d\n", l.hash, l.size), 0o644)
	})
	if err != nil {
		return l, false, err
	}
	l.file = filepath.Join(dir, file)
	meta, err := os.ReadFile(filepath.Join(dir, "verity"))
	if err != nil {
		return l, false, err
	}
	var hash string
	if _, err := fmt.Sscanf(string(meta), "%s %d\n", &hash, &l.size); err != nil {
		return l, false, fmt.Errorf("cached part %s: %w", dir, err)
	}
	_, err = hex.Decode(l.hash[:], []byte(hash))
	return l, cached, err
}

// packKey names what a packed tree depends on.
type packKey struct {
	Tree       string
	Args       []string
	Mksquashfs string
	Scripts    string `json:",omitempty"` // verity root hash of the layer on the same disk
}

func (b *build) packKey(t tree) (packKey, error) {
	digest, err := t.digest()
	return packKey{Tree: digest, Args: squashArgs(b.compression()), Mksquashfs: b.tools.Mksquashfs}, err
}

// packRoot packs the root and the disk around it and the scripts layer, cached by
// the digest of the tree.
func (b *build) packRoot(ctx context.Context, t tree, scripts layer) (l layer, cached bool, err error) {
	k, err := b.packKey(t)
	if err != nil {
		return l, false, err
	}
	k.Scripts = hex.EncodeToString(scripts.hash[:])
	return b.layerPart("root", key(k), osimage.RootfsName, func(dir string) (layer, error) {
		squashed := filepath.Join(dir, "root.squashfs.verity")
		l, err := squash(ctx, t, b.compression(), squashed, b.vary)
		if err != nil {
			return l, err
		}
		if err := writeDisk(filepath.Join(dir, osimage.RootfsName), l, scripts); err != nil {
			return l, err
		}
		return l, os.Remove(squashed)
	})
}

// squashArgs are the options of mksquashfs that decide the bytes. It takes the
// mode of the root directory from an option and not from the archive.
func squashArgs(comp []string) []string {
	return append([]string{"-tar", "-noappend", "-no-xattrs", "-reproducible", "-b", "128K", "-all-root", "-root-mode", "0755",
		"-mkfs-time", fmt.Sprint(epoch), "-all-time", fmt.Sprint(epoch)}, comp...)
}

// squash writes a squashfs of the tree, padded to whole blocks, and its verity tree
// behind it to a new file.
func squash(ctx context.Context, t tree, comp []string, out string, vary variation) (layer, error) {
	l := layer{file: out}
	args := append([]string{"-", out, "-processors", fmt.Sprint(runtime.NumCPU()), "-quiet", "-no-progress"}, squashArgs(comp)...)
	cmd := exec.CommandContext(ctx, "mksquashfs", args...)
	cmd.Env = buildEnv(vary.env) // SOURCE_DATE_EPOCH would clash with -mkfs-time
	pr, pw, err := os.Pipe()
	if err != nil {
		return l, err
	}
	cmd.Stdin = pr
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	if err := cmd.Start(); err != nil {
		pr.Close()
		pw.Close()
		return l, err
	}
	pr.Close()
	werr := t.writeTar(pw)
	pw.Close()
	if err := cmd.Wait(); err != nil {
		return l, fmt.Errorf("mksquashfs: %w: %s", err, lastLines(text.String(), 6))
	}
	if werr != nil {
		return l, fmt.Errorf("write the files for mksquashfs: %w", werr)
	}

	f, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		return l, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return l, err
	}
	l.size = (st.Size() + verity.BlockSize - 1) / verity.BlockSize * verity.BlockSize
	if err := f.Truncate(l.size); err != nil {
		return l, err
	}
	vtree, hash, err := verity.Tree(io.NewSectionReader(f, 0, l.size), l.size)
	if err != nil {
		return l, err
	}
	l.hash = hash
	if _, err := f.WriteAt(vtree, l.size); err != nil {
		return l, err
	}
	return l, f.Close()
}

// writeDisk writes the root disk: a partition for each of the two layers.
func writeDisk(out string, root, scripts layer) error {
	var contents [2]gpt.Content
	for i, l := range []layer{root, scripts} {
		f, err := os.Open(l.file)
		if err != nil {
			return err
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			return err
		}
		contents[i] = gpt.Content{Data: f, Size: st.Size()}
	}
	disk, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if err := disk.Chmod(0o644); err != nil { // whatever the umask: it becomes a file of the release
		disk.Close()
		return err
	}
	if err := gpt.Write(disk, contents[0], contents[1]); err != nil {
		disk.Close()
		return err
	}
	return disk.Close()
}
