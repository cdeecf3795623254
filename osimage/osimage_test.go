// SPDX-License-Identifier: Apache-2.0

package osimage

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

// writeRelease writes a small but whole release without a scripts layer, as older
// ones are, and returns its directory. edit may change the metadata before it is
// listed.
func writeRelease(t testing.TB, edit func(*Metadata)) string {
	t.Helper()
	return writeReleaseOf(t, nil, edit)
}

// scriptsLayer is the content of a scripts layer of 3 blocks.
var scriptsLayer = bytes.Repeat([]byte("file of scripts "), 3*4096/16)

func writeReleaseOf(t testing.TB, layer []byte, edit func(*Metadata)) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "dstack-sim-1.2.3")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root := bytes.Repeat([]byte("root file system "), 4096*40/17+1)[:4096*40]
	tree, hash, err := verity.Tree(bytes.NewReader(root), int64(len(root)))
	if err != nil {
		t.Fatal(err)
	}
	var disk bytes.Buffer
	content := append(bytes.Clone(root), tree...)
	cmdline := fmt.Sprintf("console=ttyS0 dstack.rootfs_hash=%x dstack.rootfs_size=%d", hash, len(root))
	var scripts gpt.Content
	if layer != nil {
		tree, hash, err := verity.Tree(bytes.NewReader(layer), int64(len(layer)))
		if err != nil {
			t.Fatal(err)
		}
		cmdline += fmt.Sprintf(" dstack.scripts_hash=%x dstack.scripts_size=%d", hash, len(layer))
		scripts = gpt.Content{Data: io.MultiReader(bytes.NewReader(layer), bytes.NewReader(tree)), Size: int64(len(layer) + len(tree))}
	}
	if err := gpt.Write(&disk, gpt.Content{Data: bytes.NewReader(content), Size: int64(len(content))}, scripts); err != nil {
		t.Fatal(err)
	}
	m := Metadata{BIOS: FirmwareName, Kernel: KernelName, Initrd: InitrdName, Rootfs: RootfsName, Version: "1.2.3", SharedRO: true,
		Flavour: "sim", IsDev: true, SecurityEpoch: 1, Cmdline: cmdline}
	if edit != nil {
		edit(&m)
	}
	meta, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, RootfsName, disk.Bytes())
	var sums strings.Builder
	for _, f := range []struct{ name, data string }{
		{FirmwareName, "firmware"}, {KernelName, "kernel"}, {InitrdName, "initrd"}, {MetadataName, string(meta)}, {TDXName, "measurement"},
	} {
		write(t, dir, f.name, []byte(f.data))
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(f.data)), f.name)
	}
	write(t, dir, SumsName, []byte(sums.String()))
	write(t, dir, DigestName, fmt.Appendf(nil, "%x\n", sha256.Sum256([]byte(sums.String()))))
	return dir
}

func write(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t testing.TB, dir, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestLoadReadsAWholeRelease(t *testing.T) {
	dir := writeRelease(t, nil)
	img, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != "dstack-sim-1.2.3" || img.Metadata.Version != "1.2.3" || !img.Metadata.IsDev || img.Metadata.Flavour != "sim" {
		t.Fatalf("image %+v", img)
	}
	if want := strings.TrimSpace(string(read(t, dir, DigestName))); img.Hash.String() != want {
		t.Fatalf("hash %s, want %s", img.Hash, want)
	}
	if img.RootSize != 4096*40 {
		t.Fatalf("root size %d", img.RootSize)
	}
	if err := img.VerifyRootfs(); err != nil {
		t.Fatal(err)
	}
}

func TestLoadReadsAReleaseWithAScriptsLayer(t *testing.T) {
	img, err := Load(writeReleaseOf(t, scriptsLayer, nil))
	if err != nil {
		t.Fatal(err)
	}
	_, hash, err := verity.Tree(bytes.NewReader(scriptsLayer), int64(len(scriptsLayer)))
	if err != nil {
		t.Fatal(err)
	}
	if img.Scripts != (Layer{Hash: hash, Size: int64(len(scriptsLayer))}) || img.RootSize != 4096*40 {
		t.Fatalf("image %+v", img)
	}
	if err := img.VerifyRootfs(); err != nil {
		t.Fatal(err)
	}
}

// The layer on the disk and the one on the command line must be one.
func TestLoadRefusesAScriptsLayerThatIsNotTheMeasuredOne(t *testing.T) {
	zeros := strings.Repeat("00", 32)
	cut := func(m *Metadata) { m.Cmdline, _, _ = strings.Cut(m.Cmdline, " dstack.scripts_") }
	for _, c := range []struct {
		name, code, says string
		layer            []byte
		edit             func(*Metadata)
	}{
		{"measured, not there", "image_altered", "partition dstack-scripts has 0 bytes", nil, func(m *Metadata) {
			m.Cmdline += " dstack.scripts_hash=" + zeros + " dstack.scripts_size=4096"
		}},
		{"there, not measured", "image_altered", "partition dstack-scripts has 1048576 bytes", scriptsLayer, cut},
		{"measured as larger than its partition", "image_altered", "alone has 1048576", scriptsLayer, func(m *Metadata) {
			m.Cmdline = strings.Replace(m.Cmdline, "scripts_size=12288", "scripts_size=1048576", 1)
		}},
		{"a hash alone", "image_malformed", "0 of dstack.scripts_size", scriptsLayer, func(m *Metadata) {
			cut(m)
			m.Cmdline += " dstack.scripts_hash=" + zeros
		}},
		{"a size alone", "image_malformed", "0 of dstack.scripts_hash", scriptsLayer, func(m *Metadata) {
			cut(m)
			m.Cmdline += " dstack.scripts_size=4096"
		}},
		{"two hashes", "image_malformed", "2 of dstack.scripts_hash", scriptsLayer, func(m *Metadata) { m.Cmdline += " dstack.scripts_hash=" + zeros }},
		{"two sizes", "image_malformed", "2 of dstack.scripts_size", scriptsLayer, func(m *Metadata) { m.Cmdline += " dstack.scripts_size=12288" }},
		{"a short hash", "image_malformed", "64 hexadecimal", scriptsLayer, func(m *Metadata) {
			cut(m)
			m.Cmdline += " dstack.scripts_hash=00 dstack.scripts_size=12288"
		}},
		{"a size of no whole blocks", "image_malformed", "whole blocks", scriptsLayer, func(m *Metadata) {
			m.Cmdline = strings.Replace(m.Cmdline, "scripts_size=12288", "scripts_size=12287", 1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Load(writeReleaseOf(t, c.layer, c.edit))
			if fault.Code(err) != c.code || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("error %v (code %q), want code %q and %q", err, fault.Code(err), c.code, c.says)
			}
		})
	}
}

func TestLoadRefuses(t *testing.T) {
	remove := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	alter := func(name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			data := read(t, dir, name)
			data[len(data)/2] ^= 1
			write(t, dir, name, data)
		}
	}
	replace := func(name, old, new string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			data := string(read(t, dir, name))
			if !strings.Contains(data, old) {
				t.Fatalf("%s has no %q", name, old)
			}
			write(t, dir, name, []byte(strings.Replace(data, old, new, 1)))
		}
	}
	// relist makes digest.txt right again after a change of the list.
	relist := func(change func(*testing.T, string)) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			change(t, dir)
			write(t, dir, DigestName, fmt.Appendf(nil, "%x\n", sha256.Sum256(read(t, dir, SumsName))))
		}
	}
	for _, c := range []struct {
		name, code, says string
		change           func(t *testing.T, dir string)
	}{
		{"no directory", "image_missing", "not an image directory", func(t *testing.T, dir string) { os.RemoveAll(dir) }},
		{"no kernel", "image_missing", KernelName, remove(KernelName)},
		{"no root image", "image_missing", RootfsName, remove(RootfsName)},
		{"no checksum list", "image_missing", SumsName, remove(SumsName)},
		{"no digest", "image_missing", DigestName, remove(DigestName)},
		{"no measurement although listed", "image_missing", TDXName, remove(TDXName)},
		{"an altered kernel", "image_altered", KernelName, alter(KernelName)},
		{"an altered firmware", "image_altered", FirmwareName, alter(FirmwareName)},
		{"an altered initramfs", "image_altered", InitrdName, alter(InitrdName)},
		{"altered metadata", "image_altered", MetadataName, alter(MetadataName)},
		{"an altered checksum list", "image_altered", SumsName, replace(SumsName, "0", "1")},
		{"another digest", "image_altered", "says " + strings.Repeat("00", 32), func(t *testing.T, dir string) {
			write(t, dir, DigestName, []byte(strings.Repeat("00", 32)+"\n"))
		}},
		{"an empty kernel", "image_truncated", KernelName, func(t *testing.T, dir string) { write(t, dir, KernelName, nil) }},
		{"an empty digest", "image_truncated", DigestName, func(t *testing.T, dir string) { write(t, dir, DigestName, nil) }},
		{"a root image cut short", "image_truncated", RootfsName, func(t *testing.T, dir string) {
			write(t, dir, RootfsName, read(t, dir, RootfsName)[:4096*30])
		}},
		{"a root image without its tail", "image_truncated", RootfsName, func(t *testing.T, dir string) {
			d := read(t, dir, RootfsName)
			write(t, dir, RootfsName, d[:len(d)-1])
		}},
		{"a root image without a table", "image_altered", RootfsName, func(t *testing.T, dir string) {
			d := read(t, dir, RootfsName)
			clear(d[:4096])
			write(t, dir, RootfsName, d)
		}},
		{"a digest that is no hash", "image_malformed", DigestName, func(t *testing.T, dir string) { write(t, dir, DigestName, []byte("abc\n")) }},
		{"an oversize digest", "image_malformed", "more than 128", func(t *testing.T, dir string) { write(t, dir, DigestName, bytes.Repeat([]byte("a"), 4096)) }},
		{"a listed name twice", "image_malformed", "twice", relist(func(t *testing.T, dir string) {
			d := read(t, dir, SumsName)
			line, _, _ := bytes.Cut(d, []byte("\n"))
			write(t, dir, SumsName, append(d, append(line, '\n')...))
		})},
		{"a listed name that leaves the directory", "image_malformed", "no file of a release", relist(replace(SumsName, TDXName, "../../etc/passwd"))},
		{"a required name not listed", "image_malformed", KernelName, relist(func(t *testing.T, dir string) {
			var keep []string
			for l := range strings.Lines(string(read(t, dir, SumsName))) {
				if !strings.Contains(l, KernelName) {
					keep = append(keep, l)
				}
			}
			write(t, dir, SumsName, []byte(strings.Join(keep, "")))
		})},
		{"a short hash", "image_malformed", "not a SHA-256", relist(func(t *testing.T, dir string) {
			write(t, dir, SumsName, read(t, dir, SumsName)[2:])
		})},
		{"a line of three words", "image_malformed", "3 words", relist(replace(SumsName, FirmwareName, FirmwareName+" extra"))},
		{"a list that is not UTF-8", "image_malformed", "UTF-8", relist(replace(SumsName, "  ", "\xff "))},
		{"a kernel that is a directory", "image_malformed", "regular", func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, KernelName))
			os.Mkdir(filepath.Join(dir, KernelName), 0o755)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := writeRelease(t, nil)
			c.change(t, dir)
			_, err := Load(dir)
			if fault.Code(err) != c.code || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("error %v (code %q), want code %q and %q", err, fault.Code(err), c.code, c.says)
			}
			if fault.Fix(err) == "" {
				t.Error("no fix")
			}
		})
	}
}

func TestLoadRefusesMetadataThatNoBuilderWrites(t *testing.T) {
	for _, c := range []struct {
		name, says string
		edit       func(*Metadata)
	}{
		{"a path as kernel", "kernel", func(m *Metadata) { m.Kernel = "../bzImage" }},
		{"another firmware name", "bios", func(m *Metadata) { m.BIOS = "" }},
		{"no root image", "rootfs", func(m *Metadata) { m.Rootfs = "" }},
		{"no root hash", "dstack.rootfs_hash", func(m *Metadata) { m.Cmdline = "console=ttyS0 dstack.rootfs_size=4096" }},
		{"two root hashes", "2 of dstack.rootfs_hash", func(m *Metadata) { m.Cmdline += " dstack.rootfs_hash=" + strings.Repeat("00", 32) }},
		{"two root sizes", "2 of dstack.rootfs_size", func(m *Metadata) { m.Cmdline += " dstack.rootfs_size=4096" }},
		{"a short root hash", "64 hexadecimal", func(m *Metadata) { m.Cmdline = "dstack.rootfs_hash=00 dstack.rootfs_size=4096" }},
		{"a root size of no whole blocks", "whole blocks", func(m *Metadata) {
			m.Cmdline = "dstack.rootfs_hash=" + strings.Repeat("00", 32) + " dstack.rootfs_size=4097"
		}},
		{"a negative root size", "whole blocks", func(m *Metadata) {
			m.Cmdline = "dstack.rootfs_hash=" + strings.Repeat("00", 32) + " dstack.rootfs_size=-4096"
		}},
		{"a control character in the command line", "byte 0x0a", func(m *Metadata) { m.Cmdline += "\n" }},
		{"a command line the kernel would cut", "2048", func(m *Metadata) { m.Cmdline += strings.Repeat(" x", 1200) }},
		{"a flavour nobody knows", "flavour", func(m *Metadata) { m.Flavour = "special" }},
		{"a sim image that calls itself production", "is_dev", func(m *Metadata) { m.IsDev = false }},
		{"a prod image that calls itself development", "is_dev", func(m *Metadata) { m.Flavour = "prod" }},
		{"a negative epoch", "security_epoch", func(m *Metadata) { m.SecurityEpoch = -1 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Load(writeRelease(t, c.edit))
			if fault.Code(err) != "image_malformed" || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Fatalf("error %v (code %q), want image_malformed and %q", err, fault.Code(err), c.says)
			}
		})
	}
}

func TestVerifyRootfsRefuses(t *testing.T) {
	// The root's partition is one Align long, so the layer's begins at two.
	for name, at := range map[string]int{"data": gpt.Align + 5000, "tree": gpt.Align + 4096*41,
		"scripts layer": 2*gpt.Align + 5000, "scripts tree": 2*gpt.Align + 4096*4, "bytes behind the scripts tree": 3*gpt.Align - 1} {
		t.Run("altered "+name, func(t *testing.T) {
			dir := writeReleaseOf(t, scriptsLayer, nil)
			d := read(t, dir, RootfsName)
			d[at] ^= 1
			write(t, dir, RootfsName, d)
			img, err := Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := img.VerifyRootfs(); fault.Code(err) != "image_altered" {
				t.Fatalf("error %v, want image_altered", err)
			}
		})
	}
}

func FuzzParseMetadata(f *testing.F) {
	f.Add(read(f, writeRelease(f, nil), MetadataName))
	f.Add(read(f, writeReleaseOf(f, scriptsLayer, nil), MetadataName))
	f.Add([]byte(`{"bios":"ovmf.fd","cmdline":"dstack.rootfs_hash= dstack.rootfs_size="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseMetadata(data)
		if err != nil {
			if fault.Code(err) != "image_malformed" {
				t.Fatalf("code %q", fault.Code(err))
			}
			return
		}
		for _, name := range []string{"rootfs", "scripts"} {
			if l, err := layerOf(m.Cmdline, name); err == nil && (l.Size < 0 || l.Size == 0 && l != (Layer{})) {
				t.Fatalf("%q gave %+v", m.Cmdline, l)
			}
		}
	})
}

func FuzzParseSums(f *testing.F) {
	f.Add(read(f, writeRelease(f, nil), SumsName))
	f.Fuzz(func(t *testing.T, data []byte) {
		sums, err := ParseSums(data)
		if err != nil {
			return
		}
		for name := range sums {
			if !contains(sumNames, name) {
				t.Fatalf("accepted name %q", name)
			}
		}
	})
}
