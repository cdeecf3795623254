// SPDX-License-Identifier: Apache-2.0

package gpt

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// disk is a disk with size bytes of root and, if there are any, scripts bytes of
// the scripts layer.
func disk(t testing.TB, size, scripts int) []byte {
	t.Helper()
	fill := func(b byte, n int) Content {
		return Content{bytes.NewReader(bytes.Repeat([]byte{b}, n)), int64(n)}
	}
	var b bytes.Buffer
	if err := Write(&b, fill(0xa5, size), fill(0x5a, scripts)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWriteThenFind(t *testing.T) {
	for _, c := range []struct{ size, scripts int }{{1, 0}, {Align - 1, 0}, {Align, 0}, {Align + 1, 0}, {3*Align + 4096, 0}, {1, 1}, {2*Align + 1, Align + 1}} {
		size := c.size
		d := disk(t, size, c.scripts)
		if int64(len(d)) != DiskSize(int64(size), int64(c.scripts)) {
			t.Fatalf("contents %+v: disk of %d bytes, DiskSize says %d", c, len(d), DiskSize(int64(size), int64(c.scripts)))
		}
		l, err := Find(bytes.NewReader(d))
		if err != nil {
			t.Fatal(err)
		}
		p := l.Root
		if p.Start != Align || p.Size != roundUp(int64(size)) {
			t.Fatalf("contents %+v: layout %+v", c, l)
		}
		if d[p.Start] != 0xa5 || d[p.Start+int64(size)-1] != 0xa5 {
			t.Fatalf("content %d is not in the partition", size)
		}
		if c.scripts == 0 && l.Scripts != (Partition{}) {
			t.Fatalf("contents %+v: layout %+v", c, l)
		}
		if s := l.Scripts; c.scripts != 0 && (s.Start != p.Start+p.Size || s.Size != roundUp(int64(c.scripts)) || d[s.Start] != 0x5a || d[s.Start+int64(c.scripts)-1] != 0x5a) {
			t.Fatalf("contents %+v: layout %+v", c, l)
		}
		// The backup header at the end must point back and hold its own checksum.
		back := bytes.Clone(d[len(d)-sector : len(d)-sector+92])
		sum := binary.LittleEndian.Uint32(back[16:])
		copy(back[16:20], make([]byte, 4))
		if string(back[:8]) != "EFI PART" || crc32.ChecksumIEEE(back) != sum {
			t.Fatal("backup header is damaged")
		}
	}
}

func TestOtherToolsReadTheTable(t *testing.T) {
	tool, err := exec.LookPath("sfdisk")
	if err != nil {
		t.Skip("SKIP: sfdisk is not installed (package fdisk)")
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disk(t, Align+1, Align), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "--dump", path).CombinedOutput()
	if err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for _, want := range []string{
		"label-id: D5ACC000-0000-4000-8000-000000000000", "start=        2048", "size=        4096",
		"uuid=D5ACC000-0000-4000-8000-000000000001", `name="dstack-rootfs"`, "type=0FC63DAF-8483-4772-8E79-3D69D8477DE4",
		"start=        6144", "size=        2048", "uuid=D5ACC000-0000-4000-8000-000000000003", `name="dstack-scripts"`,
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("sfdisk does not print %q:\n%s", want, out)
		}
	}
	if out, _ := exec.Command(tool, "--verify", path).CombinedOutput(); !strings.Contains(string(out), "No errors detected") {
		t.Errorf("sfdisk --verify: %s", out)
	}
}

func TestFindRefuses(t *testing.T) {
	good := disk(t, Align, 0)
	// fix makes the checksums right again, so that what is refused is the change.
	fix := func(d []byte) {
		binary.LittleEndian.PutUint32(d[sector+88:], crc32.ChecksumIEEE(d[2*sector:2*sector+tableSize]))
		copy(d[sector+16:], make([]byte, 4))
		binary.LittleEndian.PutUint32(d[sector+16:], crc32.ChecksumIEEE(d[sector:sector+92]))
	}
	for _, c := range []struct {
		name, want string
		change     func(d []byte) []byte
	}{
		{"a short file", "read partition table", func(d []byte) []byte { return d[:1000] }},
		{"an empty file", "read partition table", func([]byte) []byte { return nil }},
		{"no signature", "no GUID partition table", func(d []byte) []byte { d[sector] = 'X'; return d }},
		{"a header with another checksum", "checksum does not match", func(d []byte) []byte { d[sector+60] ^= 1; return d }},
		{"a table with another checksum", "entries do not match", func(d []byte) []byte { d[2*sector+100] ^= 1; return d }},
		{"another name", "not named", func(d []byte) []byte { d[2*sector+56] = 'X'; fix(d); return d }},
		{"a longer name", "not named", func(d []byte) []byte { d[2*sector+56+2*len(Label)] = 'X'; fix(d); return d }},
		{"a second partition of another name", "partition 2 is not named", func(d []byte) []byte { d[2*sector+entrySize] = 1; fix(d); return d }},
		{"a third partition", "more than 2", func(d []byte) []byte { d[2*sector+2*entrySize] = 1; fix(d); return d }},
		{"a scripts layer that overlaps the root", "partition 2 covers", func([]byte) []byte {
			d := disk(t, Align, Align)
			binary.LittleEndian.PutUint64(d[2*sector+entrySize+32:], Align/sector)
			fix(d)
			return d
		}},
		{"the scripts layer first", "partition 1 is not named", func([]byte) []byte {
			d := disk(t, Align, Align)
			first := bytes.Clone(d[2*sector : 2*sector+entrySize])
			copy(d[2*sector:], d[2*sector+entrySize:2*sector+2*entrySize])
			copy(d[2*sector+entrySize:], first)
			fix(d)
			return d
		}},
		{"a partition that ends before it starts", "not one of ours", func(d []byte) []byte {
			binary.LittleEndian.PutUint64(d[2*sector+40:], 100)
			fix(d)
			return d
		}},
		{"a partition beyond any disk", "not one of ours", func(d []byte) []byte {
			binary.LittleEndian.PutUint64(d[2*sector+40:], 1<<63)
			fix(d)
			return d
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Find(bytes.NewReader(c.change(bytes.Clone(good))))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestWriteRefusesContentThatEndsEarly(t *testing.T) {
	if err := Write(&bytes.Buffer{}, Content{strings.NewReader("short"), 4096}, Content{}); err == nil || !strings.Contains(err.Error(), "ended after 5") {
		t.Fatalf("error %v", err)
	}
}

func FuzzFind(f *testing.F) {
	f.Add(disk(f, 4096, 0)[:2*sector+tableSize])
	f.Add(disk(f, 4096, 4096)[:2*sector+tableSize])
	f.Add([]byte("EFI PART"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Find(bytes.NewReader(data))
		if err != nil {
			return
		}
		if p := l.Root; p.Start != Align || p.Size <= 0 || p.Size > maxDisk {
			t.Fatalf("layout %+v", l)
		}
		if s := l.Scripts; s != (Partition{}) && (s.Start != Align+l.Root.Size || s.Size <= 0 || s.Size > maxDisk) {
			t.Fatalf("layout %+v", l)
		}
	})
}
