// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

// The request numbers as <linux/dm-ioctl.h> has them on every 64-bit Linux.
func TestIoctlNumbers(t *testing.T) {
	for name, c := range map[string]struct{ got, want uint }{
		"DM_DEV_CREATE": {dmDevCreate, 0xc138fd03}, "DM_DEV_REMOVE": {dmDevRemove, 0xc138fd04},
		"DM_DEV_SUSPEND": {dmSuspend, 0xc138fd06}, "DM_TABLE_LOAD": {dmTableLoad, 0xc138fd09},
	} {
		if c.got != c.want {
			t.Errorf("%s = %#x, want %#x", name, c.got, c.want)
		}
	}
}

// golden is DM_TABLE_LOAD of a read-only "error" target as dmsetup sends it, field
// by field from the header file.
func TestTableLoadMatchesTheHeaderFile(t *testing.T) {
	got, err := encodeTable("root", dmFlagReadOnly, Target{Start: 0, Length: 0x10, Type: "verity", Params: []byte("1 a b")})
	if err != nil {
		t.Fatal(err)
	}
	want, _ := hex.DecodeString(
		"04000000" + "00000000" + "00000000" + // version 4.0.0
			"68010000" + // data_size 312+48
			"38010000" + // data_start 312
			"01000000" + // target_count
			"00000000" + // open_count
			"01000000" + // flags: DM_READONLY_FLAG
			"00000000" + "00000000" + // event_nr, padding
			"0000000000000000" + // dev
			hex.EncodeToString([]byte("root")) + strings.Repeat("00", 124) + // name[128]
			strings.Repeat("00", 129) + // uuid[129]
			strings.Repeat("00", 7) + // data[7]
			"0000000000000000" + "1000000000000000" + // sector_start, length
			"00000000" + "30000000" + // status, next
			hex.EncodeToString([]byte("verity")) + strings.Repeat("00", 10) + // target_type[16]
			hex.EncodeToString([]byte("1 a b")) + "000000") // parameters, NUL, padded to 8
	if !bytes.Equal(got, want) {
		t.Fatalf("encoded\n%x, want\n%x", got, want)
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, bad := range map[string]string{"empty": "", "slash": "a/b", "NUL": "a\x00b", "too long": strings.Repeat("n", 128)} {
		if _, err := encodeHeader(name[:0]+bad, "", 0, dmIoctlSize); err == nil {
			t.Errorf("name that is %s was accepted", name)
		}
	}
	if _, err := encodeHeader("n", strings.Repeat("u", 129), 0, dmIoctlSize); err == nil {
		t.Error("a long uuid was accepted")
	}
	if _, err := encodeTable("n", 0, Target{Type: "sixteen-bytes-xx"}); err == nil {
		t.Error("a long target type was accepted")
	}
}

func TestVerityTable(t *testing.T) {
	v := Verity{DataSize: 3 * 4096}
	v.RootHash[0] = 0xab
	target, err := v.Target("/dev/vda1")
	if err != nil {
		t.Fatal(err)
	}
	// Data blocks 0 to 2, the superblock in block 3, the tree from block 4 on.
	want := "1 /dev/vda1 /dev/vda1 4096 4096 3 4 sha256 ab" + strings.Repeat("00", 31) + " " + strings.Repeat("00", 32)
	if string(target.Params) != want || target.Length != 24 || target.Type != "verity" {
		t.Fatalf("table %q length %d", target.Params, target.Length)
	}
	for _, size := range []uint64{0, 1, 4095, 4097, 64<<30 + 4096} {
		if _, err := (Verity{DataSize: size}).Target("x"); fault.Code(err) != "cmdline_malformed" {
			t.Errorf("size %d: error %v", size, err)
		}
	}
}

func TestCryptTable(t *testing.T) {
	key := [CryptKeySize]byte{0: 1, 63: 0xfe}
	target, err := CryptTarget("/dev/vdb", 1<<20+4095, &key)
	if err != nil {
		t.Fatal(err)
	}
	want := "aes-xts-plain64 01" + strings.Repeat("00", 62) + "fe 0 /dev/vdb 0 1 sector_size:4096"
	if string(target.Params) != want || target.Length != 2048 || !target.Secret {
		t.Fatalf("table %q length %d", target.Params, target.Length)
	}
	if _, err := CryptTarget("/dev/vdb", 1<<20-1, &key); err == nil {
		t.Error("a tiny disk was accepted")
	}
}

// fakeMapper is a Mapper with a /dev and /sys of its own whose ioctls are noted.
func fakeMapper(t *testing.T, fail uintptr) (*Mapper, *[]uintptr, *[][]byte) {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "mapper"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "mapper/control"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// The node of the device exists, as under devtmpfs.
	if err := os.WriteFile(filepath.Join(dir, "dm-5"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var requests []uintptr
	var buffers [][]byte
	m := &Mapper{Dev: dir, Sys: dir, ioctl: func(_ int, req uintptr, buf []byte) error {
		requests, buffers = append(requests, req), append(buffers, buf)
		if req == dmDevCreate {
			buf[offDev], buf[offDev+1] = 5, 253 // 253:5
		}
		if req == fail {
			return unix.EINVAL
		}
		return nil
	}}
	return m, &requests, &buffers
}

func equal(a, b []uintptr) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestCreateLoadsAndActivates(t *testing.T) {
	m, requests, _ := fakeMapper(t, 0)
	path, err := m.OpenVerity("root", "/dev/vda1", Verity{DataSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Base(path) != "dm-5" || !equal(*requests, []uintptr{dmDevCreate, dmTableLoad, dmSuspend}) {
		t.Fatalf("path %s, requests %#x", path, *requests)
	}
}

func TestCreateLeavesNothingBehind(t *testing.T) {
	for _, step := range []uintptr{dmTableLoad, dmSuspend} {
		m, requests, _ := fakeMapper(t, step)
		_, err := m.OpenVerity("root", "/dev/vda1", Verity{DataSize: 4096})
		if !errors.Is(err, unix.EINVAL) {
			t.Fatalf("error %v", err)
		}
		if last := (*requests)[len(*requests)-1]; last != dmDevRemove {
			t.Errorf("after %#x failed the last request was %#x", step, last)
		}
	}
}

// The key is in no buffer after Create, whether it worked or not, and the kernel is
// told to wipe its own copy.
func TestKeyIsWiped(t *testing.T) {
	key := [CryptKeySize]byte{}
	for i := range key {
		key[i] = 0xa7
	}
	for _, fail := range []uintptr{0, dmDevCreate, dmTableLoad, dmSuspend} {
		m, requests, buffers := fakeMapper(t, fail)
		target, err := CryptTarget("/dev/vdb", 1<<20, &key)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = m.Create("data", "", false, target)
		text := []byte("a7a7")
		if bytes.Contains(target.Params, text) {
			t.Errorf("fail %#x: the table still holds the key", fail)
		}
		for i, b := range *buffers {
			if bytes.Contains(b, text) {
				t.Errorf("fail %#x: the buffer of request %#x still holds the key", fail, (*requests)[i])
			}
		}
	}
	seen := false
	m, _, _ := fakeMapper(t, 0)
	plain := m.ioctl
	m.ioctl = func(fd int, req uintptr, buf []byte) error {
		if req == dmTableLoad {
			seen = bytes.Contains(buf, []byte("a7a7")) && buf[offFlags+1]&0x80 != 0
		}
		return plain(fd, req, buf)
	}
	if _, err := m.OpenCrypt("data", "/dev/vdb", 1<<20, &key); err != nil {
		t.Fatal(err)
	}
	if !seen {
		t.Error("the table had no key, or not DM_SECURE_DATA_FLAG")
	}
}

// machine lays out a fake /sys/class/block: name -> attributes; a name with a slash
// is a partition below its disk.
func machine(t *testing.T, devices map[string]map[string]string) *Finder {
	t.Helper()
	sys := t.TempDir()
	class := filepath.Join(sys, "class/block")
	if err := os.MkdirAll(class, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, attributes := range devices {
		dir := filepath.Join(sys, "devices", path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, filepath.Join(class, filepath.Base(path))); err != nil {
			t.Fatal(err)
		}
		for name, text := range attributes {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	return &Finder{Sys: sys, Dev: "/dev"}
}

func part(name string) map[string]string {
	return map[string]string{"size": "64\n", "uevent": "MAJOR=254\nPARTN=1\nPARTNAME=" + name + "\n"}
}

func serial(s string) map[string]string { return map[string]string{"size": "128\n", "serial": s} }

func TestFindRoot(t *testing.T) {
	for name, c := range map[string]struct {
		devices    map[string]map[string]string
		want, code string
	}{
		"by serial and label": {map[string]map[string]string{
			"vda": serial("other"), "vda/vda1": part(RootLabel),
			"vdb": serial(SerialRoot), "vdb/vdb1": part("esp"), "vdb/vdb2": part(RootLabel),
		}, "vdb2", ""},
		"by label where there are no serials": {map[string]map[string]string{
			"nvme0n1": {"size": "1"}, "nvme0n1/nvme0n1p1": part(RootLabel),
		}, "nvme0n1p1", ""},
		"the disk lacks the label, another has it": {map[string]map[string]string{
			"vda": serial(SerialRoot), "vda/vda1": part("x"), "vdb": serial(""), "vdb/vdb1": part(RootLabel),
		}, "", "root_missing"},
		"two disks with the serial": {map[string]map[string]string{
			"vda": serial(SerialRoot), "vda/vda1": part(RootLabel), "vdb": serial(SerialRoot),
		}, "", "disk_ambiguous"},
		"no disk at all": {nil, "", "root_missing"},
		"a label that only begins alike": {map[string]map[string]string{
			"vda": serial(SerialRoot), "vda/vda1": part(RootLabel + "2"),
		}, "", "root_missing"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := machine(t, c.devices).Root()
			if b.Name != c.want || fault.Code(err) != c.code {
				t.Fatalf("found %+v, error %v", b, err)
			}
			if err == nil && (b.Size != 64*512 || b.Path != "/dev/"+c.want) {
				t.Errorf("block %+v", b)
			}
		})
	}
}

func TestFindPartition(t *testing.T) {
	for name, c := range map[string]struct {
		devices    map[string]map[string]string
		want, code string
	}{
		"by serial and label": {map[string]map[string]string{
			"vda": serial("other"), "vda/vda1": part(ScriptsLabel),
			"vdb": serial(SerialRoot), "vdb/vdb1": part(RootLabel), "vdb/vdb2": part(ScriptsLabel),
		}, "vdb2", ""},
		"by label where there are no serials": {map[string]map[string]string{
			"nvme0n1": {"size": "1"}, "nvme0n1/nvme0n1p1": part(RootLabel), "nvme0n1/nvme0n1p2": part(ScriptsLabel),
		}, "nvme0n1p2", ""},
		"another disk has it": {map[string]map[string]string{
			"vda": serial(SerialRoot), "vda/vda1": part(RootLabel), "vdb": serial(SerialData), "vdb/vdb1": part(ScriptsLabel),
		}, "", "partition_missing"},
		"two disks with the serial": {map[string]map[string]string{
			"vda": serial(SerialRoot), "vda/vda1": part(ScriptsLabel), "vdb": serial(SerialRoot),
		}, "", "disk_ambiguous"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := machine(t, c.devices).Partition(ScriptsLabel)
			if b.Name != c.want || fault.Code(err) != c.code {
				t.Fatalf("found %+v, error %v", b, err)
			}
		})
	}
}

func TestFindDisk(t *testing.T) {
	f := machine(t, map[string]map[string]string{"vda": serial(SerialRoot), "vdb": serial(SerialData), "vdb/vdb1": part("x")})
	b, err := f.Disk(SerialData)
	if err != nil || b.Name != "vdb" || b.Size != 128*512 {
		t.Fatalf("found %+v, error %v", b, err)
	}
	if _, err := f.Disk(SerialShared); fault.Code(err) != "disk_missing" {
		t.Fatalf("error %v", err)
	}
}

func TestMke2fsNeverSeesAKey(t *testing.T) {
	args := Mke2fsArgs("/usr/bin/mke2fs", "/dev/dm-1")
	if args[0] != "/usr/bin/mke2fs" || args[len(args)-1] != "/dev/dm-1" {
		t.Fatalf("arguments %q", args)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mke2fs := range []string{"/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/bin/mke2fs"} {
		if _, err := os.Stat(mke2fs); err != nil {
			continue
		}
		args := Mke2fsArgs(mke2fs, image)
		p, err := os.StartProcess(args[0], args, &os.ProcAttr{Files: []*os.File{nil, os.Stderr, os.Stderr}})
		if err != nil {
			t.Fatal(err)
		}
		state, err := p.Wait()
		if err != nil || !state.Success() {
			t.Fatalf("mke2fs: %v %v", state, err)
		}
		data, err := os.ReadFile(image)
		if err != nil || data[1024+56] != 0x53 || data[1024+57] != 0xef {
			t.Fatalf("no ext4 magic: %v", err)
		}
		return
	}
	t.Skip("SKIP: mke2fs is not installed")
}
