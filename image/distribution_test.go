// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ulikunitz/xz"

	"github.com/dstack-go/dstack/guest/modules"
	"github.com/dstack-go/dstack/internal/testkit"
)

// koFile returns a module as a package has it: an ELF file whose .modinfo is the
// given text, within xz.
func koFile(t *testing.T, modinfo string) []byte {
	t.Helper()
	const names = "\x00.modinfo\x00.shstrtab\x00"
	head := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2}
	copy(head.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	head.Shoff = uint64(64 + len(modinfo) + len(names))
	var b bytes.Buffer
	for _, part := range []any{
		head, []byte(modinfo), []byte(names),
		elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(modinfo))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(64 + len(modinfo)), Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return packXZ(t, b.Bytes())
}

func packXZ(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := xz.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// kernelWith returns a set of modules, by file name, with what each depends on.
func kernelWith(t *testing.T, depends map[string]string, builtin ...string) moduleSet {
	t.Helper()
	s := moduleSet{packed: map[string]packedModule{}, builtin: map[string]bool{}}
	for name, list := range depends {
		s.add(name, koFile(t, "license=GPL\x00depends="+list+"\x00name="+name+"\x00"))
	}
	for _, name := range builtin {
		s.builtin[name] = true
	}
	return s
}

func moduleNames(list []module) (names []string) {
	for _, m := range list {
		names = append(names, m.name)
	}
	return names
}

func TestModuleClosureLoadsDependenciesFirst(t *testing.T) {
	s := kernelWith(t, map[string]string{
		"dm-mod": "", "dm-bufio": "dm_mod", "reed_solomon": "", "dm-verity": "dm-mod,dm-bufio,reed_solomon", "dm-integrity": "dm-bufio,dm-mod,async_xor",
		"async_xor": "", "unwanted": "dm-mod",
	}, "ext4")
	early, err := s.closure([]string{"ext4", "dm-verity", "dm_mod"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := moduleNames(early), []string{"dm-mod", "dm-bufio", "reed_solomon", "dm-verity"}; !slices.Equal(got, want) {
		t.Errorf("early %v, want %v", got, want)
	}
	late, err := s.closure([]string{"dm-integrity", "dm-verity"}, early)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := moduleNames(late), []string{"async_xor", "dm-integrity"}; !slices.Equal(got, want) {
		t.Errorf("late %v, want %v", got, want)
	}
}

func TestModuleClosureRefuses(t *testing.T) {
	s := kernelWith(t, map[string]string{"a": "b", "b": "a", "c": "gone"})
	_, err := s.closure([]string{"absent"}, nil)
	wantCode(t, err, "kernel_modules", "no module absent, which the guest needs")
	_, err = s.closure([]string{"c"}, nil)
	wantCode(t, err, "kernel_modules", "no module gone, which c needs")
	_, err = s.closure([]string{"a"}, nil)
	wantCode(t, err, "kernel_modules", "depends on itself")

	for _, c := range []struct {
		name, says string
		data       []byte
	}{
		{"not compressed", "kernel module x", []byte("plain")},
		{"no ELF file", "magic", packXZ(t, []byte("no module at all"))},
		{"silent on dependencies", "nothing of dependencies", koFile(t, "license=GPL\x00")},
	} {
		s.add("x", c.data)
		if _, err := s.closure([]string{"x"}, nil); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

// putKernel puts a distribution kernel of three packages, changed by edit, into the
// cache and the lock of a build.
func putKernel(t *testing.T, b *build, edit func(files map[string]string)) {
	t.Helper()
	const release = "7.3.4+deb13-cloud-amd64"
	dir := "./" + modulesDir + "/" + release + "/"
	files := map[string]string{dir + "vmlinuz": "kernel", dir + "modules.builtin": "kernel/fs/ext4/ext4.ko\n"}
	for _, option := range distributionConfig {
		files[dir+"config"] += "CONFIG_" + option + "=y\n"
	}
	for _, name := range append(slices.Clone(earlyModules), rootModules...) {
		files[dir+"kernel/x/"+name+".ko.xz"] = string(koFile(t, "depends=\x00"))
	}
	edit(files)
	b.lock = &LockFile{Version: 1}
	for _, name := range distributionPackages(release) {
		mine := map[string]string{}
		for file, text := range files {
			isModule, isKernel := strings.HasSuffix(file, ".ko.xz"), strings.HasSuffix(file, "/vmlinuz")
			if isModule && strings.Contains(name, "-modules-") || isKernel && strings.Contains(name, "-binary-") || !isModule && !isKernel && strings.Contains(name, "-base-") {
				mine[file] = text
			}
		}
		pkg := deb(t, mine)
		p := Package{Name: name, Version: "7.3.4-1", Arch: "amd64", Size: int64(len(pkg)), SHA256: fmt.Sprintf("%x", sha256.Sum256(pkg))}
		b.lock.Packages = append(b.lock.Packages, p)
		if err := os.MkdirAll(filepath.Dir(b.deb(p)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(b.deb(p), pkg, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDistributionKernelComesWithItsModules(t *testing.T) {
	b := newTestBuild(t)
	putKernel(t, b, func(map[string]string) {})
	b.UpdateFileList = true
	var p artifacts
	if _, err := b.distributionKernel(t.Context(), &p); err != nil {
		t.Fatal(err)
	}
	if string(p.kernel) != "kernel" || !slices.Equal(moduleNames(p.early), earlyModules) || !slices.Equal(moduleNames(p.late), rootModules) {
		t.Fatalf("kernel %q, early %v, late %v", p.kernel, moduleNames(p.early), moduleNames(p.late))
	}

	// The guest reads what the builder writes, where it writes it.
	tr := tree{}
	addModules(tr, "", p.late)
	list, err := modules.Parse(tr[strings.TrimPrefix(modules.Dir, "/")+"/"+modules.ListName].data)
	if err != nil || len(list) != len(rootModules) {
		t.Fatalf("the guest reads %v, %v", list, err)
	}
	for i, m := range list {
		name := rootModules[i]
		if m.File != name+".ko" || m.Optional != slices.Contains(optionalModules, name) || tr[modulesDir+"/"+m.File].kind != file {
			t.Errorf("line %d is %+v, want %s", i, m, name)
		}
	}

	// A module more is a line in a change.
	b.UpdateFileList = false
	putKernel(t, b, func(files map[string]string) {
		for name := range files {
			if strings.HasSuffix(name, "/xfs.ko.xz") {
				files[name] = string(koFile(t, "depends=newcomer\x00"))
				files[strings.Replace(name, "xfs", "newcomer", 1)] = string(koFile(t, "depends=\x00"))
			}
		}
	})
	_, err = b.distributionKernel(t.Context(), &artifacts{})
	wantCode(t, err, "image_files_differ", "+ f 0644 /root/usr/lib/modules/newcomer.ko")
}

func newTestBuild(t *testing.T) *build {
	t.Helper()
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "image/recipe"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "go.mod"), []byte("module github.com/dstack-go/dstack\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := newBuild(Options{Flavour: Sim, Kernel: KernelDistribution, Source: src, Cache: t.TempDir(), Log: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDistributionKernelRefuses(t *testing.T) {
	remove := func(suffix string) func(map[string]string) {
		return func(files map[string]string) {
			for name := range files {
				if strings.HasSuffix(name, suffix) {
					delete(files, name)
				}
			}
		}
	}
	for _, c := range []struct {
		name, code, says string
		edit             func(map[string]string)
	}{
		{"no kernel", "image_input_incomplete", "lack vmlinuz", remove("/vmlinuz")},
		{"no configuration", "image_input_incomplete", "config", remove("/config")},
		{"no modules", "image_input_incomplete", "modules", remove(".ko.xz")},
		{"a needed module", "kernel_modules", "no module dm-verity", remove("/dm-verity.ko.xz")},
		{"no RTMR in sysfs", "kernel_config", "CONFIG_TSM_MEASUREMENTS", func(files map[string]string) {
			for name, text := range files {
				files[name] = strings.Replace(text, "CONFIG_TSM_MEASUREMENTS=y", "CONFIG_TSM_MEASUREMENTS=m", 1)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newTestBuild(t)
			putKernel(t, b, c.edit)
			_, err := b.distributionKernel(t.Context(), &artifacts{})
			wantCode(t, err, c.code, c.says)
		})
	}
	_, err := newBuild(Options{Kernel: "mine"})
	wantCode(t, err, "image_kernel", "mine")
}

func TestLockOfTheDistributionKernelIsWhole(t *testing.T) {
	l := &LockFile{}
	for _, name := range distributionPackages("7.3.4+deb13-cloud-amd64") {
		_, err := l.distributionKernel()
		wantCode(t, err, "image_lock_incomplete", "of the 3 packages")
		l.Packages = append(l.Packages, Package{Name: name, Version: "1"})
	}
	if release, err := l.distributionKernel(); err != nil || release != "7.3.4+deb13-cloud-amd64" {
		t.Fatalf("release %q, %v", release, err)
	}
	l.Packages[1].Version = "2"
	_, err := l.distributionKernel()
	wantCode(t, err, "image_lock_incomplete", "two versions")
}

func TestEachKernelLeavesTheOthersPackages(t *testing.T) {
	l, err := ReadLock(filepath.Join(testkit.Root(), "image/recipe/lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		kernel string
		takes  int
	}{{KernelOwn, len(debianPackages) + 1}, {KernelDistribution, len(debianPackages) + 3}} {
		b := &build{Options: Options{Kernel: c.kernel}}
		n := 0
		for _, p := range l.Packages {
			if b.usesPackage(p.Name) {
				n++
			}
		}
		if n != c.takes {
			t.Errorf("kernel %s takes %d packages, want %d", c.kernel, n, c.takes)
		}
	}
}

// The own kernel's images have no trace of this option.
func TestNoModulesLeaveTheTreeAlone(t *testing.T) {
	tr := tree{}
	addModules(tr, "", nil)
	if len(tr) != 0 {
		t.Fatalf("tree %v", tr)
	}
}
