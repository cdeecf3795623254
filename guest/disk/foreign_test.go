// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

// luks2Header is a header of LUKS2 (copy 0 or 1) with the JSON area given: 16 KiB,
// which is all that the attack of threats.md E01 needs.
func luks2Header(json string, copyOf int) []byte {
	b := make([]byte, 0x4000)
	copy(b, [][]byte{[]byte("LUKS\xba\xbe"), []byte("SKUL\xba\xbe")}[copyOf])
	binary.BigEndian.PutUint16(b[6:], 2)
	binary.BigEndian.PutUint64(b[8:], 0x4000)
	binary.BigEndian.PutUint64(b[16:], 3)
	copy(b[72:], "sha256")
	binary.BigEndian.PutUint64(b[256:], uint64(copyOf)*0x4000)
	copy(b[0x1000:], json)
	return b
}

const (
	keyslotJSON    = `{"type":"luks2","key_size":64,"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64}}`
	segmentJSON    = `{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":512}`
	goodJSON       = `{"keyslots":{"0":` + keyslotJSON + `},"segments":{"0":` + segmentJSON + `}}`
	nullCipherJSON = `{"keyslots":{"0":` + keyslotJSON + `},"segments":{"0":{"type":"crypt","offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"cipher_null-ecb","sector_size":512}}}`
)

// headers are what a host may put at the start of a disk, by a name that says what.
func headers() map[string][]byte {
	h := map[string][]byte{}
	json := func(name, text string) { h[name] = luks2Header(text, 0) }
	json("an honest LUKS2 header", goodJSON)
	json("a segment under cipher_null-ecb", nullCipherJSON)
	json("a keyslot area under the null cipher", strings.Replace(goodJSON, `"encryption":"aes-xts-plain64","key_size":64}}`, `"encryption":"null","key_size":64}}`, 1))
	json("two segments, the second in the clear", `{"keyslots":{"0":`+keyslotJSON+`},"segments":{"0":`+segmentJSON+`,"1":{"type":"linear","offset":"33554432","size":"dynamic"}}}`)
	json("a token", strings.TrimSuffix(goodJSON, "}")+`,"tokens":{"0":{"type":"systemd-tpm2","keyslots":["0"]}}}`)
	json("flags of a reencryption", strings.TrimSuffix(goodJSON, "}")+`,"config":{"requirements":{"mandatory":["online-reencrypt-v2"]}}}`)
	json("two JSON keys alike", `{"segments":{"0":`+segmentJSON+`},"segments":{"0":{"type":"crypt","encryption":"cipher_null-ecb"}}}`)
	json("no JSON at all", "")
	json("oversized JSON", strings.Repeat("[", 0x3000))
	second := make([]byte, 0x8000)
	copy(second[0x4000:], luks2Header(nullCipherJSON, 1))
	h["only the second LUKS2 header"] = second
	differ := make([]byte, 0x8000)
	copy(differ, luks2Header(goodJSON, 0))
	copy(differ[0x4000:], luks2Header(nullCipherJSON, 1))
	h["two LUKS2 headers that differ"] = differ
	luks1 := make([]byte, 592)
	copy(luks1, "LUKS\xba\xbe\x00\x01")
	copy(luks1[8:], "cipher_null")
	h["LUKS1 with a null cipher"] = luks1
	at := func(name string, at int, magic string) {
		b := make([]byte, at+len(magic))
		copy(b[at:], magic)
		h[name] = b
	}
	at("a superblock of dm-integrity", 0, "integrt\x00")
	at("a partition table", 512, "EFI PART")
	at("an ext4 file system", 1080, "\x53\xef")
	at("an XFS file system", 0, "XFSB")
	at("a btrfs file system", 0x10040, "_BHRfS_M")
	at("a pool of ZFS", 128<<10, "\x0c\xb1\xba\x00\x00\x00\x00\x00")
	at("an MBR", 510, "\x55\xaa")
	at("one byte at the end of the area", HeadSize-1, "\x01")
	at("the magic of a record, one byte off", 1, recordMagic)
	return h
}

// noOpen is a Sealer that must not come to do anything.
func noOpen(t *testing.T) *Sealer {
	m, requests, _ := fakeMapper(t, 0)
	t.Cleanup(func() {
		if len(*requests) > 0 {
			t.Errorf("the device mapper was asked %#x", *requests)
		}
	})
	return &Sealer{Mapper: m, Name: "t", Run: func(_ context.Context, argv []string) (int, error) {
		t.Errorf("ran %q", argv)
		return 0, nil
	}}
}

// fileDisk is a disk in a file that begins with head.
func fileDisk(t *testing.T, head []byte) Block {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, head, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, MinSealed); err != nil {
		t.Fatal(err)
	}
	return Block{Name: "vdb", Path: path, Size: MinSealed}
}

func wantRefused(t *testing.T, dev Block, key byte, opt SealOptions, code string) error {
	t.Helper()
	// The disk is sparse: whatever is written makes the file newer.
	look := func() (string, os.FileInfo) {
		head, err := readStart(dev.Path, 2<<20)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(dev.Path)
		if err != nil {
			t.Fatal(err)
		}
		return string(head), info
	}
	before, was := look()
	v, r, err := noOpen(t).Open(t.Context(), dev, appKey(key), opt)
	if fault.Code(err) != code || v != nil || r != (Result{}) {
		t.Errorf("error %v (%q), want code %s; volume %v", err, fault.Code(err), code, v)
	}
	if after, is := look(); after != before || !is.ModTime().Equal(was.ModTime()) || is.Size() != was.Size() {
		t.Error("the disk was written")
	}
	return err
}

// Whatever a host puts there instead of our record is refused before a byte is written
// and before a key reaches the kernel or a program.
func TestThreat_E01_HeaderCorpusIsRefusedUnread(t *testing.T) {
	for name, head := range headers() {
		t.Run(name, func(t *testing.T) {
			for _, fresh := range []bool{false, true} {
				err := wantRefused(t, fileDisk(t, head), 1, SealOptions{Fresh: fresh, FS: Ext4}, "disk_foreign")
				if err != nil && fault.Fix(err) == "" {
					t.Error("no fix")
				}
			}
		})
	}
}

func TestForeignDisksAreNamed(t *testing.T) {
	h := headers()
	for name, want := range map[string]string{
		"an honest LUKS2 header":          "a LUKS2 header",
		"a segment under cipher_null-ecb": "a LUKS2 header with a null cipher",
		"only the second LUKS2 header":    "a second LUKS2 header with a null cipher",
		"LUKS1 with a null cipher":        "a LUKS1 header with a null cipher",
		"a partition table":               "a GUID partition table",
		"an ext4 file system":             "an ext2, ext3 or ext4 file system",
		"one byte at the end of the area": "data of an unknown kind",
	} {
		s, err := Inspect(fileDisk(t, h[name]).Path)
		if err != nil || s.Kind != Foreign || s.What != want {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	if s, err := Inspect(fileDisk(t, nil).Path); err != nil || s.Kind != Blank {
		t.Errorf("blank: %+v, %v", s, err)
	}
	if s, err := Inspect(fileDisk(t, []byte(recordMagic)).Path); err != nil || s.Kind != Sealed {
		t.Errorf("sealed: %+v, %v", s, err)
	}
	if _, err := Inspect(filepath.Join(t.TempDir(), "none")); fault.Code(err) != "disk_read" {
		t.Errorf("no disk: %v", err)
	}
}

func FuzzLooksLike(f *testing.F) {
	for _, h := range headers() {
		f.Add(h)
	}
	f.Fuzz(func(t *testing.T, head []byte) {
		s := stateOf(head)
		if s.Kind == Sealed != bytes.HasPrefix(head, []byte(recordMagic)) || s.What == "" || len(s.What) > 60 {
			t.Fatalf("%+v", s)
		}
	})
}
