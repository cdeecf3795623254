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

func disk(t testing.TB, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, bytes.NewReader(bytes.Repeat([]byte{0xa5}, size)), int64(size)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWriteThenFind(t *testing.T) {
	for _, size := range []int{1, Align - 1, Align, Align + 1, 3*Align + 4096} {
		d := disk(t, size)
		if int64(len(d)) != DiskSize(int64(size)) {
			t.Fatalf("content %d: disk of %d bytes, DiskSize says %d", size, len(d), DiskSize(int64(size)))
		}
		p, err := Find(bytes.NewReader(d))
		if err != nil {
			t.Fatal(err)
		}
		if p.Start != Align || p.Size != roundUp(int64(size)) {
			t.Fatalf("content %d: partition %+v", size, p)
		}
		if d[p.Start] != 0xa5 || d[p.Start+int64(size)-1] != 0xa5 {
			t.Fatalf("content %d is not in the partition", size)
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
	if err := os.WriteFile(path, disk(t, Align+1), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "--dump", path).CombinedOutput()
	if err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	for _, want := range []string{
		"label-id: D5ACC000-0000-4000-8000-000000000000", "start=        2048", "size=        4096",
		"uuid=D5ACC000-0000-4000-8000-000000000001", `name="dstack-rootfs"`, "type=0FC63DAF-8483-4772-8E79-3D69D8477DE4",
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
	good := disk(t, Align)
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
		{"a second partition", "more than one", func(d []byte) []byte { d[2*sector+entrySize] = 1; fix(d); return d }},
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
	if err := Write(&bytes.Buffer{}, strings.NewReader("short"), 4096); err == nil || !strings.Contains(err.Error(), "ended after 5") {
		t.Fatalf("error %v", err)
	}
}

func FuzzFind(f *testing.F) {
	f.Add(disk(f, 4096)[:2*sector+tableSize])
	f.Add([]byte("EFI PART"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Find(bytes.NewReader(data))
		if err == nil && (p.Start != Align || p.Size <= 0 || p.Size > maxDisk) {
			t.Fatalf("partition %+v", p)
		}
	})
}
