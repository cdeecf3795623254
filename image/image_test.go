// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

func wantCode(t *testing.T, err error, code, says string) {
	t.Helper()
	if fault.Code(err) != code || !strings.Contains(fmt.Sprint(err), says) {
		t.Fatalf("error %v (code %q), want code %q and %q", err, fault.Code(err), code, says)
	}
}

// deb makes a Debian package of one compressed tar archive.
func deb(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var data bytes.Buffer
	z, err := zstd.NewWriter(&data)
	if err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(z)
	for name, content := range files {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(tw, content)
	}
	tw.Close()
	z.Close()
	var b bytes.Buffer
	b.WriteString("!<arch>\n")
	for _, m := range []struct {
		name string
		data []byte
	}{{"debian-binary", []byte("2.0\n")}, {"control.tar", []byte("odd")}, {"data.tar.zst", data.Bytes()}} {
		fmt.Fprintf(&b, "%-16s%-12d%-6d%-6d%-8o%-10d`\n", m.name, 0, 0, 0, 0o644, len(m.data))
		b.Write(m.data)
		if len(m.data)%2 == 1 {
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

func TestDebFilesReadsThePackageAsDpkgDoes(t *testing.T) {
	pkg := deb(t, map[string]string{"./usr/bin/x": "program", "./etc/../etc/y": "text"})
	got := map[string]string{}
	err := debFiles(bytes.NewReader(pkg), func(h *tar.Header, r io.Reader) error {
		data, err := io.ReadAll(r)
		got[h.Name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got["usr/bin/x"] != "program" || got["etc/y"] != "text" || len(got) != 2 {
		t.Fatalf("files %v", got)
	}
}

func TestDebFilesRefuses(t *testing.T) {
	good := deb(t, map[string]string{"./x": "x"})
	for _, c := range []struct {
		name, says string
		data       []byte
	}{
		{"another file type", "no ar magic", []byte("PK\x03\x04 and so on")},
		{"an empty file", "no ar magic", nil},
		{"a package without data", "without data archive", good[:8+60+4]},
		{"a member size that is no number", "malformed header", bytes.Replace(good, []byte("4         `"), []byte("four      `"), 1)},
		{"a negative member size", "malformed header", bytes.Replace(good, []byte("4         `"), []byte("-4        `"), 1)},
		{"a truncated archive", "data.tar.zst", good[:len(good)-10]},
		{"an unknown compression", "unknown compression", bytes.Replace(good, []byte("data.tar.zst "), []byte("data.tar.rar "), 1)},
		{"a name that leaves the root", "leaves the root", deb(t, map[string]string{"../../etc/passwd": "x"})},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := debFiles(bytes.NewReader(c.data), func(*tar.Header, io.Reader) error { return nil })
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("error %v, want one with %q", err, c.says)
			}
		})
	}
}

func FuzzDebFiles(f *testing.F) {
	f.Add(deb(f, map[string]string{"./x": "x"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		debFiles(bytes.NewReader(data), func(h *tar.Header, r io.Reader) error {
			if strings.HasPrefix(h.Name, "/") || strings.HasPrefix(h.Name, "../") {
				t.Fatalf("name %q", h.Name)
			}
			_, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
			return err
		})
	})
}

func FuzzParseLock(f *testing.F) {
	data, err := os.ReadFile(filepath.Join(testkit.Root(), "image/recipe/lock.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := parseLock(data)
		if err != nil {
			return
		}
		for _, p := range l.Packages {
			if strings.HasPrefix(p.Name, "-") || strings.ContainsAny(p.Name+p.Version, "/ \n=") {
				t.Fatalf("package %q %q reaches apt's arguments", p.Name, p.Version)
			}
		}
	})
}

func sample() tree {
	t := tree{}
	t.add("usr/bin/one", node{kind: file, mode: 0o755, data: bytes.Repeat([]byte("program\n"), 5000)})
	t.add("usr/bin/two", node{kind: hardlink, mode: 0o755, target: "usr/bin/one"})
	t.add("a/first", node{kind: hardlink, mode: 0o755, target: "usr/bin/one"}) // sorts before its target
	t.add("etc/link", node{kind: symlink, mode: 0o777, target: "../usr/bin/one"})
	t.add("tmp", node{kind: dir, mode: 0o1777})
	return t
}

func TestCpioIsWhatTheToolReads(t *testing.T) {
	tr := tree{}
	tr.add("dev/console", node{kind: char, mode: 0o600, major: 5, minor: 1})
	tr.add("init", node{kind: file, mode: 0o755, data: []byte("first process")})
	tr.add("etc/link", node{kind: symlink, mode: 0o777, target: "../init"})
	data, err := tr.cpio()
	if err != nil {
		t.Fatal(err)
	}
	if len(data)%512 != 0 {
		t.Fatalf("%d bytes are no whole blocks", len(data))
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("SKIP: cpio is not installed")
	}
	cmd := exec.Command("cpio", "-itvn", "--quiet")
	cmd.Stdin = bytes.NewReader(data)
	cmd.Env = append(os.Environ(), "TZ=UTC", "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for _, want := range []string{"crw------- 1 0 0 5, 1 Jan 1 2026 dev/console", "-rwxr-xr-x 1 0 0 13 Jan 1 2026 init", "etc/link -> ../init", "drwxr-xr-x 2 0 0 0 Jan 1 2026 dev"} {
		if !strings.Contains(strings.Join(strings.Fields(string(out)), " "), want) {
			t.Errorf("cpio does not print %q:\n%s", want, out)
		}
	}
}

// packDisk packs the sample twice, as root and as scripts layer, and returns the disk
// and what the command line would say of it.
func packDisk(t *testing.T, comp []string, v variation) (disk []byte, root, scripts layer) {
	t.Helper()
	dir := t.TempDir()
	pack := func(name string, tr tree) layer {
		l, err := squash(t.Context(), tr, comp, filepath.Join(dir, name), v)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	small := tree{}
	small.add("usr/bin/bash", node{kind: file, mode: 0o755, data: []byte("shell")})
	root, scripts = pack("root", sample()), pack("scripts", small)
	path := filepath.Join(dir, "disk")
	if err := writeDisk(path, root, scripts); err != nil {
		t.Fatal(err)
	}
	disk, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return disk, root, scripts
}

func verifyLayer(disk []byte, part gpt.Partition, l layer) error {
	return verity.Verify(io.NewSectionReader(bytes.NewReader(disk), part.Start, part.Size), l.size, l.hash)
}

func TestPackedDiskIsTheSameWhateverTheHost(t *testing.T) {
	if _, err := exec.LookPath("mksquashfs"); err != nil {
		t.Skip("SKIP: mksquashfs is not installed")
	}
	for _, flavour := range []string{Sim, Prod} {
		comp := (&build{Options: Options{Flavour: flavour}}).compression()
		first, root, scripts := packDisk(t, comp, variation{})
		parts, err := gpt.Find(bytes.NewReader(first))
		if err != nil {
			t.Fatal(err)
		}
		if err := verifyLayer(first, parts.Root, root); err != nil {
			t.Fatal(err)
		}
		if err := verifyLayer(first, parts.Scripts, scripts); err != nil {
			t.Fatal(err)
		}
		old := syscall.Umask(0o077)
		second, _, _ := packDisk(t, comp, variation{env: map[string]string{"TZ": "Asia/Kathmandu", "LANG": "tr_TR.UTF-8"}})
		syscall.Umask(old)
		if !bytes.Equal(first, second) {
			t.Errorf("%s: two packings differ", flavour)
		}
	}
}

func TestAnAlteredLayerDoesNotMatchItsHash(t *testing.T) {
	if _, err := exec.LookPath("mksquashfs"); err != nil {
		t.Skip("SKIP: mksquashfs is not installed")
	}
	disk, root, scripts := packDisk(t, []string{"-comp", "lz4"}, variation{})
	parts, err := gpt.Find(bytes.NewReader(disk))
	if err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]int64{"content": 10, "tree": scripts.size + verity.BlockSize - 4000} {
		t.Run(name, func(t *testing.T) {
			altered := bytes.Clone(disk)
			altered[parts.Scripts.Start+at] ^= 1
			if err := verifyLayer(altered, parts.Scripts, scripts); !errors.Is(err, verity.ErrMismatch) {
				t.Fatalf("error %v", err)
			}
			if err := verifyLayer(altered, parts.Root, root); err != nil {
				t.Fatalf("the root is not altered: %v", err)
			}
		})
	}
	if err := verifyLayer(disk, parts.Scripts, layer{size: scripts.size, hash: root.hash}); !errors.Is(err, verity.ErrMismatch) {
		t.Fatalf("under the root's hash: %v", err)
	}
}

func TestPackedRootHoldsModesLinksAndOwners(t *testing.T) {
	tool, err := exec.LookPath("unsquashfs")
	if err != nil {
		t.Skip("SKIP: unsquashfs is not installed")
	}
	disk, _, _ := packDisk(t, []string{"-comp", "lz4"}, variation{})
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "-o", fmt.Sprint(gpt.Align), "-lln", "-UTC", path).CombinedOutput()
	if err != nil {
		t.Fatalf("unsquashfs: %v: %s", err, out)
	}
	for _, want := range []string{
		"-rwxr-xr-x 0/0 40000 2026-01-01 00:00 squashfs-root/a/first",
		"-rwxr-xr-x 0/0 40000 2026-01-01 00:00 squashfs-root/usr/bin/one",
		"-rwxr-xr-x 0/0 40000 2026-01-01 00:00 squashfs-root/usr/bin/two",
		"squashfs-root/etc/link -> ../usr/bin/one",
		"drwxrwxrwt 0/0 3 2026-01-01 00:00 squashfs-root/tmp",
		"drwxr-xr-x 0/0 57 2026-01-01 00:00 squashfs-root ",
	} {
		if !strings.Contains(strings.Join(strings.Fields(string(out)), " ")+" ", want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	// One content, three names: it must be stored once.
	if len(disk) != 4*gpt.Align {
		t.Errorf("disk of %d bytes", len(disk))
	}
	out, err = exec.Command(tool, "-o", fmt.Sprint(2*gpt.Align), "-lln", "-UTC", path).CombinedOutput()
	if err != nil || !strings.Contains(strings.Join(strings.Fields(string(out)), " "), "-rwxr-xr-x 0/0 5 2026-01-01 00:00 squashfs-root/usr/bin/bash") {
		t.Errorf("the scripts layer is not in the second partition: %v: %s", err, out)
	}
}

func TestFileListDifferenceFailsTheBuild(t *testing.T) {
	dir := t.TempDir()
	b := &build{Options: Options{Flavour: Sim, Source: dir}, cache: cache(dir)}
	tr := sample()
	wantCode(t, b.compareFileList(Sim, tr), "image_files_differ", "committed file list")
	if err := os.MkdirAll(filepath.Dir(b.recipe("x")), 0o755); err != nil {
		t.Fatal(err)
	}
	b.UpdateFileList = true
	if err := b.compareFileList(Sim, tr); err != nil {
		t.Fatal(err)
	}
	b.UpdateFileList = false
	if err := b.compareFileList(Sim, tr); err != nil {
		t.Fatalf("the list just written: %v", err)
	}
	tr.add("usr/bin/sneaked-in", node{kind: file, mode: 0o755})
	wantCode(t, b.compareFileList(Sim, tr), "image_files_differ", "+ f 0755 /usr/bin/sneaked-in")
	delete(tr, "usr/bin/sneaked-in")
	tr["usr/bin/one"] = node{kind: file, mode: 0o4755}
	wantCode(t, b.compareFileList(Sim, tr), "image_files_differ", "+ f 4755 /usr/bin/one")
	delete(tr, "usr/bin/one")
	wantCode(t, b.compareFileList(Sim, tr), "image_files_differ", "- f 0755 /usr/bin/one")
}

// The flavours differ in what the lists say and in nothing else: sim has the
// files of prod, debug adds busybox.
func TestFlavoursHaveTheFilesTheyPromise(t *testing.T) {
	list := func(flavour string) string {
		data, err := os.ReadFile(filepath.Join(testkit.Root(), "image/recipe/files."+flavour+".txt"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	prod, sim, debug := list(Prod), list(Sim), list(Debug)
	if prod != sim {
		t.Errorf("sim is not prod:\n%s", diffLines(prod, sim))
	}
	for l := range strings.Lines(diffLines(sim, debug)) {
		if l = strings.TrimSpace(l); l != "+ f 0755 /usr/bin/busybox" && !(strings.HasPrefix(l, "+ h 0755 /usr/bin/") && strings.HasSuffix(l, " -> usr/bin/busybox")) {
			t.Errorf("debug differs from sim by more than busybox: %s", l)
		}
	}
	for _, word := range []string{"busybox", "/sh\n", "bash", "modprobe", "sudo", "ssh"} {
		if strings.Contains(prod, word) {
			t.Errorf("the production root has %q", word)
		}
	}
	for l := range strings.Lines(debug) {
		var kind string
		var mode int
		fmt.Sscanf(l, "%s %o", &kind, &mode)
		if mode&0o6000 != 0 || kind == "f" && mode&0o022 != 0 {
			t.Errorf("set-id or writable by others: %s", l)
		}
	}
}

// The scripts layer has the shell that the root must not have, and nothing by which
// a script could gain a right.
func TestTheScriptsLayerHasWhatScriptsMayUse(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(testkit.Root(), "image/recipe/files.scripts.txt"))
	if err != nil {
		t.Fatal(err)
	}
	list := string(data)
	for _, want := range []string{
		"f 0755 /usr/bin/bash\n", "h 0755 /usr/bin/sh -> usr/bin/bash\n", "l 0777 /bin -> usr/bin\n",
		"f 0755 /usr/bin/curl\n", "f 0755 /usr/bin/jq\n", "f 0755 /usr/bin/cat\n", "f 0755 /usr/bin/sha256sum\n", "f 0755 /usr/bin/env\n",
		"f 0755 /usr/bin/grep\n", "f 0755 /usr/bin/sed\n", "h 0755 /usr/bin/awk -> usr/bin/mawk\n", "f 0755 /usr/bin/find\n", "f 0755 /usr/bin/xargs\n",
		"f 0755 /usr/bin/tar\n", "f 0755 /usr/bin/gzip\n",
		"f 0644 /usr/bin/docker\n", "f 0644 /usr/bin/docker-compose\n",
		"f 0644 /etc/ssl/certs/ca-certificates.crt\n",
		"d 0755 /dstack\n", "d 0755 /dev\n", "d 0555 /proc\n", "d 0555 /sys\n", "d 0755 /run\n", "d 1777 /tmp\n", "l 0777 /var/run -> ../run\n",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("the scripts layer lacks %q", strings.TrimSpace(want))
		}
	}
	for l := range strings.Lines(list) {
		var kind string
		var mode int
		fmt.Sscanf(l, "%s %o", &kind, &mode)
		if mode&0o6000 != 0 || kind == "f" && mode&0o022 != 0 {
			t.Errorf("set-id or writable by others: %s", l)
		}
		for _, word := range []string{"busybox", "sudo", "/su\n", "ssh-", "python", "perl", "containerd", "crun", "/nft\n"} {
			if strings.Contains(l, word) {
				t.Errorf("the scripts layer has %s", strings.TrimSpace(l))
			}
		}
	}
}

func TestTheScriptsLayerNamesAMissingPackage(t *testing.T) {
	p := &pool{files: map[string][]byte{}, libs: map[string][]byte{}}
	for _, f := range scriptsFiles {
		p.files[f.pkg+":"+f.from] = []byte("program")
	}
	for _, pkg := range scriptsPrograms {
		p.files[pkg+":usr/bin/"+pkg] = []byte("program")
	}
	full := func() tree {
		tr := tree{}
		if err := p.addScripts(tr); err != nil {
			t.Fatal(err)
		}
		return tr
	}
	// A program from each package, as a file; the mount points are no programs.
	tr := full()
	for name, mode := range map[string]uint32{"usr/bin/bash": 0o755, "usr/bin/sed": 0o755, "usr/bin/docker": 0o644} {
		if tr[name].kind != file || tr[name].mode != mode {
			t.Errorf("%s: %+v", name, tr[name])
		}
	}
	for _, missing := range []string{"curl:usr/bin/curl", "coreutils:usr/bin/coreutils"} {
		data := p.files[missing]
		delete(p.files, missing)
		pkg, _, _ := strings.Cut(missing, ":")
		wantCode(t, p.addScripts(tree{}), "image_input_incomplete", "package "+pkg)
		p.files[missing] = data
	}
	full()
}

func TestClosureNamesTheMissingLibrary(t *testing.T) {
	self, err := exec.LookPath("ls")
	if err != nil {
		t.Skip("SKIP: no dynamic program at hand")
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	tr := tree{}
	tr.add("usr/bin/ls", node{kind: file, mode: 0o755, data: data})
	p := &pool{libs: map[string][]byte{}}
	wantCode(t, p.closure(tr), "image_library_missing", "/usr/bin/ls needs lib")
}

func TestKernelConfigRefusesDroppedOptions(t *testing.T) {
	dir := t.TempDir()
	fragment, final := filepath.Join(dir, "fragment"), filepath.Join(dir, "config")
	put := func(path, s string) {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put(fragment, "# comment\nCONFIG_A=y\nCONFIG_B=n\n# CONFIG_C is not set\nCONFIG_N=512\n")
	for _, c := range []struct{ name, config, lost string }{
		{"all taken", "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=512\n", ""},
		{"an option dropped", "# CONFIG_A is not set\nCONFIG_N=512\n", "CONFIG_A=y"},
		{"another value", "CONFIG_A=y\nCONFIG_N=2\n", "CONFIG_N=512"},
		{"an unwanted option on", "CONFIG_A=y\nCONFIG_C=y\nCONFIG_N=512\n", "# CONFIG_C is not set"},
		{"an option off with =n on", "CONFIG_A=y\nCONFIG_B=y\nCONFIG_N=512\n", "CONFIG_B=n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			put(final, c.config)
			err := checkKernelConfig(fragment, final)
			if c.lost == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantCode(t, err, "kernel_config", c.lost)
		})
	}
}

func TestCompareDirsNamesTheDifference(t *testing.T) {
	mk := func(files map[string]string) string {
		dir := t.TempDir()
		for name, data := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	a := mk(map[string]string{"x": "same", "y": "12345"})
	if err := compareDirs(a, mk(map[string]string{"x": "same", "y": "12345"})); err != nil {
		t.Fatal(err)
	}
	wantCode(t, compareDirs(a, mk(map[string]string{"x": "same", "y": "12945"})), "image_not_reproducible", "y differ at byte 2")
	wantCode(t, compareDirs(a, mk(map[string]string{"x": "same", "y": "1234"})), "image_not_reproducible", "y differ at byte 4")
	wantCode(t, compareDirs(a, mk(map[string]string{"x": "same"})), "image_not_reproducible", "- -rw-r--r-- y")
	b := mk(map[string]string{"x": "same", "y": "12345"})
	if err := os.Chmod(filepath.Join(b, "y"), 0o755); err != nil {
		t.Fatal(err)
	}
	wantCode(t, compareDirs(a, b), "image_not_reproducible", "+ -rwxr-xr-x y")
}

func TestUnknownFlavourAndSourceAreRefused(t *testing.T) {
	_, err := Build(t.Context(), Options{Flavour: "special", Cache: t.TempDir()})
	wantCode(t, err, "image_flavour", "special")
	_, err = Build(t.Context(), Options{Source: t.TempDir(), Cache: t.TempDir()})
	wantCode(t, err, "source_missing", "not a checkout")
}

func TestChooseMirrorTakesTheHostsOwnArchive(t *testing.T) {
	const targets = "https://vendor.example/apt/|bookworm|main|Vendor\n" +
		"http://mirror.example/debian/|bookworm-backports|main|Debian Backports\n" +
		"http://mirror.example/debian/|bookworm|contrib|Debian\n" +
		"http://mirror.example/debian/|bookworm|main|Debian\n"
	got, err := chooseMirror(targets, "bookworm")
	if err != nil || got != "http://mirror.example/debian" {
		t.Fatalf("mirror %q, %v", got, err)
	}
	// Before the first update apt knows no origin.
	if got, err = chooseMirror("http://m.example/d/|trixie|main|$(ORIGIN)\n", "trixie"); err != nil || got != "http://m.example/d" {
		t.Fatalf("mirror %q, %v", got, err)
	}
	_, err = chooseMirror("https://vendor.example/apt/|bookworm|main|Vendor\n", "bookworm")
	wantCode(t, err, "apt_sources", "bookworm")
}

func TestParseLockRefuses(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	pkg := func(name, version, size, sha string) string {
		return fmt.Sprintf(`{"version":1,"suites":["trixie"],"packages":[{"name":%q,"version":%q,"arch":"amd64","suite":"trixie","size":%s,"sha256":%q}],"tools":{"go":"","gcc":"","ld":"","mksquashfs":""}}`, name, version, size, sha)
	}
	if _, err := parseLock([]byte(pkg("crun", "1:1.21-1+b2~x", "10", sum))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, says, data string }{
		{"an option as a name", "package", pkg("--oh", "1", "10", sum)},
		{"a path as a name", "package", pkg("../x", "1", "10", sum)},
		{"an option as a version", "package", pkg("crun", "-o=x", "10", sum)},
		{"a short hash", "sha256", pkg("crun", "1", "10", "abcd")},
		{"an upper-case hash", "sha256", pkg("crun", "1", "10", strings.ToUpper(sum))},
		{"no size", "size", pkg("crun", "1", "0", sum)},
		{"a huge size", "size", pkg("crun", "1", "2000000000", sum)},
		{"an unknown field", "unknown field", strings.Replace(pkg("crun", "1", "10", sum), `"suites"`, `"sweets"`, 1)},
		{"another version", "version 2", strings.Replace(pkg("crun", "1", "10", sum), `"version":1`, `"version":2`, 1)},
		{"a suite with a space", "suite", strings.Replace(pkg("crun", "1", "10", sum), `["trixie"]`, `["trixie main"]`, 1)},
		{"too many bytes", "at most", strings.Repeat(" ", maxLock+1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := parseLock([]byte(c.data))
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("error %v, want one with %q", err, c.says)
			}
		})
	}
}

func TestCommittedLockPinsTheWholeRecipe(t *testing.T) {
	l, err := ReadLock(filepath.Join(testkit.Root(), "image/recipe/lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range debianPackages {
		if _, err := l.Package(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.kernelSource(); err != nil {
		t.Error(err)
	}
	if _, err := l.distributionKernel(); err != nil {
		t.Error(err)
	}
	if want := len(debianPackages) + 1 + 3; len(l.Packages) != want {
		t.Errorf("%d packages, the recipe has %d", len(l.Packages), want)
	}
}

func TestEngineVersionsComeFromItsModule(t *testing.T) {
	mod, err := os.ReadFile(filepath.Join(testkit.Root(), "image/engine/go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	flags, err := engineFlags(string(mod))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"dockerversion.Version=2.", "containerd/v2/version.Version=2.", "main.composeVersion=5.", "docker/cli/cli/version.Version=29."} {
		if !strings.Contains(flags, want) {
			t.Errorf("no %q in %q", want, flags)
		}
	}
	if _, err := engineFlags("module x\n"); err == nil {
		t.Error("a module without the engine is accepted")
	}
}

// mirror is a package archive in a directory, as a real apt reads it.
type mirror struct {
	dir      string
	packages map[string][2]string // name -> version, content
}

func newMirror(t *testing.T) *mirror {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("SKIP: apt-get is not installed")
	}
	m := &mirror{t.TempDir(), map[string][2]string{}}
	for _, name := range slices.Concat([]string{"linux-source-7.3", "linux-source-6.12"},
		distributionPackages("7.3.4+deb13-cloud-amd64"), distributionPackages("7.2.12+deb13-cloud-amd64"), distributionPackages("6.12.9+deb13-cloud-amd64"), debianPackages) {
		m.packages[name] = [2]string{"1:1.0-1", "content of " + name}
	}
	m.publish(t)
	return m
}

func (m *mirror) publish(t *testing.T) {
	t.Helper()
	var index strings.Builder
	for name, p := range m.packages {
		path := fmt.Sprintf("%s_1.0_all.deb", name)
		if err := os.WriteFile(filepath.Join(m.dir, path), []byte(p[1]), 0o644); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&index, "Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: x\nDescription: x\nFilename: ./%s\nSize: %d\nSHA256: %x\n\n", name, p[0], path, len(p[1]), sha256.Sum256([]byte(p[1])))
	}
	if err := os.WriteFile(filepath.Join(m.dir, "Packages"), []byte(index.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// builder returns a build that fetches from the mirror and locks in a source
// tree of its own.
func (m *mirror) builder(t *testing.T, flavour string, log io.Writer) *build {
	t.Helper()
	src := t.TempDir()
	if err := os.MkdirAll(filepath.Join(src, "image/recipe"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "go.mod"), []byte("module github.com/dstack-go/dstack\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := newBuild(Options{Flavour: flavour, Source: src, Cache: t.TempDir(), Log: log})
	if err != nil {
		t.Fatal(err)
	}
	b.sources = func([]string) (string, error) { return "deb [trusted=yes] file:" + m.dir + " ./\n", nil }
	return b
}

func TestLockFetchAndGonePackages(t *testing.T) {
	if err := checkTools(); err != nil {
		t.Skipf("SKIP: %v", err)
	}
	m := newMirror(t)
	for _, flavour := range []string{Sim, Prod} {
		t.Run(flavour, func(t *testing.T) {
			m.packages["crun"] = [2]string{"1:1.0-1", "content of crun"}
			m.publish(t)
			var log strings.Builder
			b := m.builder(t, flavour, &log)
			changes, err := b.relock(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(strings.Join(changes, "\n"), "crun 1:1.0-1 added") {
				t.Fatalf("changes %v", changes)
			}
			if p, err := b.lock.kernelSource(); err != nil || p.Name != "linux-source-7.3" {
				t.Fatalf("kernel source %v, %v", p, err)
			}
			if release, err := b.lock.distributionKernel(); err != nil || release != "7.3.4+deb13-cloud-amd64" {
				t.Fatalf("distribution's kernel %q, %v", release, err)
			}
			if cached, err := b.fetch(t.Context(), nil); err != nil || cached {
				t.Fatalf("first fetch: cached %v, %v", cached, err)
			}
			if cached, err := b.fetch(t.Context(), nil); err != nil || !cached {
				t.Fatalf("second fetch: cached %v, %v", cached, err)
			}

			// A package altered in the cache is refused, dropped, and fetched anew.
			p, err := b.lock.Package("nftables")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(b.deb(p), []byte(strings.Repeat("x", int(p.Size))), 0o644); err != nil {
				t.Fatal(err)
			}
			_, err = b.openDeb("nftables")
			wantCode(t, err, "image_input_altered", "nftables")
			if _, err := b.fetch(t.Context(), nil); err != nil {
				t.Fatal(err)
			}
			if f, err := b.openDeb("nftables"); err != nil {
				t.Fatal(err)
			} else {
				f.Close()
			}

			// The mirror moves on, and a fresh cache cannot have the pinned version.
			m.packages["crun"] = [2]string{"1:1.1-1", "newer content of crun"}
			m.publish(t)
			fresh := m.builder(t, flavour, &log)
			fresh.Source, fresh.lock = b.Source, b.lock
			log.Reset()
			_, err = fresh.fetch(t.Context(), nil)
			if flavour == Prod {
				wantCode(t, err, "image_input_gone", "crun 1:1.0-1")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s := log.String(); !strings.Contains(s, "WARNING: the mirror no longer has crun 1:1.0-1") || !strings.Contains(s, "crun 1:1.0-1 -> 1:1.1-1") {
				t.Fatalf("the new lock is not loud:\n%s", s)
			}
			l, err := ReadLock(fresh.lockPath())
			if err != nil {
				t.Fatal(err)
			}
			if p, _ := l.Package("crun"); p.Version != "1:1.1-1" {
				t.Fatalf("locked crun %s", p.Version)
			}
		})
	}
}

func TestAMirrorThatSwapsContentIsNotBelieved(t *testing.T) {
	if err := checkTools(); err != nil {
		t.Skipf("SKIP: %v", err)
	}
	m := newMirror(t)
	b := m.builder(t, Prod, io.Discard)
	if _, err := b.relock(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.packages["crun"] = [2]string{"1:1.0-1", "evil content of crun"} // same version, other bytes, a right index
	m.publish(t)
	_, err := b.fetch(t.Context(), nil)
	wantCode(t, err, "image_input_gone", "crun")
	if p, _ := b.lock.Package("crun"); fileExists(b.deb(p)) {
		t.Fatal("the swapped package is in the cache")
	}
}

func fileExists(path string) bool { _, err := os.Stat(path); return err == nil }

func TestProdRefusesOtherTools(t *testing.T) {
	if err := checkTools(); err != nil {
		t.Skipf("SKIP: %v", err)
	}
	for _, flavour := range []string{Prod, Sim} {
		var log strings.Builder
		b := &build{Options: Options{Flavour: flavour, Log: &log}, lock: &LockFile{Tools: Tools{GCC: "gcc of another host"}}}
		err := b.compareTools(t.Context())
		if flavour == Prod {
			wantCode(t, err, "image_tools_differ", "gcc of another host")
		} else if err != nil || !strings.Contains(log.String(), "NOTE: other tools") {
			t.Fatalf("error %v, log %q", err, log.String())
		}
	}
}
