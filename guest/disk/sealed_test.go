// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestKeysAreSeparate(t *testing.T) {
	seen := map[string]string{}
	for _, key := range []byte{1, 2} {
		for _, seed := range [][]byte{nil, make([]byte, 32), bytes.Repeat([]byte{1}, 32)} {
			for _, role := range []string{roleRecord, roleData, roleIntegrity, roleJournal} {
				k, err := deriveKey(appKey(key), seed, role, 32)
				if err != nil {
					t.Fatal(err)
				}
				// HMAC pads its key with zeros: no salt and one of 32 zeros are the same.
				what := fmt.Sprint(key, string(bytes.TrimRight(seed, "\x00")), role)
				if was, ok := seen[string(k)]; ok && was != what {
					t.Errorf("%q and %q have the same key", was, what)
				}
				seen[string(k)] = what
			}
		}
	}
}

// The text that separates keys, and a key, as they are on disks that exist.
func TestKeyDerivationStays(t *testing.T) {
	want := "\x00\x00\x00\x0edstack-seal-v1\x00\x00\x00\x06record\x00\x00\x00\x04data"
	if got := sealInfo(roleRecord, sealVolume); got != want {
		t.Errorf("info %q", got)
	}
	k, err := deriveKey(appKey(1), nil, roleRecord, 32)
	if err != nil || hex.EncodeToString(k) != recordKeyOfOnes {
		t.Errorf("key %x, %v", k, err)
	}
}

func testRecord() *record {
	r := &record{state: stateReady, fs: Ext4, size: MinSealed, generation: 3}
	copy(r.seed[:], "seed")
	copy(r.salt[:], "salt")
	return r
}

func TestRecordRoundTrip(t *testing.T) {
	key := make([]byte, 32)
	for _, r := range []*record{testRecord(), {state: stateFormatting, fs: XFS, size: MaxSealed}} {
		got, err := parseRecord(r.encode(key), key)
		if err != nil || *got != *r {
			t.Errorf("got %+v, %v", got, err)
		}
	}
}

func TestThreat_E02_EveryByteOfTheRecordIsAuthenticated(t *testing.T) {
	key := make([]byte, 32)
	good := testRecord().encode(key)
	for i := range good {
		b := bytes.Clone(good)
		b[i] ^= 0x10
		want := "disk_key_mismatch"
		if i < len(recordMagic) {
			want = "disk_foreign"
		}
		if _, err := parseRecord(b, key); fault.Code(err) != want {
			t.Fatalf("byte %d changed: %v", i, err)
		}
	}
	for _, short := range []int{0, 15, recordSize - 1} {
		if _, err := parseRecord(good[:short], key); fault.Code(err) != "disk_foreign" {
			t.Errorf("%d bytes: %v", short, err)
		}
	}
	// Authentic, but not what this version writes.
	for name, change := range map[string]func(r *record){
		"another state":         func(r *record) { r.state = 3 },
		"another file system":   func(r *record) { r.fs = 9 },
		"a tiny disk":           func(r *record) { r.size = 4096 },
		"a huge disk":           func(r *record) { r.size = MaxSealed + 4096 },
		"half a block":          func(r *record) { r.size++ },
		"no state, all of zero": func(r *record) { *r = record{} },
	} {
		r := testRecord()
		change(r)
		if _, err := parseRecord(r.encode(key), key); fault.Code(err) != "disk_version" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	key := make([]byte, 32)
	good := testRecord().encode(key)
	f.Add(good, true)
	f.Add(good[:100], false)
	f.Add([]byte(recordMagic), true)
	f.Fuzz(func(t *testing.T, b []byte, sign bool) {
		if sign && len(b) >= recordSize {
			b = bytes.Clone(b[:recordSize])
			copy(b, recordMagic)
			copy(b[recordMAC:], hmacOf(key, b[:recordMAC]))
		}
		r, err := parseRecord(b, key)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatal(err)
			}
			return
		}
		if got := r.encode(key); sign && !bytes.Equal(got[16:recordMAC], b[16:recordMAC]) && !strange(b) {
			t.Fatalf("encoded again\n%x\n%x", got, b)
		}
	})
}

// strange: bytes that no field covers are not zero.
func strange(b []byte) bool {
	return binary.BigEndian.Uint32(b[28:]) != 0 || len(bytes.Trim(b[96:recordMAC], "\x00")) > 0
}

// The layout of dm-integrity for the sizes that the VM test uses, as the kernel finds
// it there, and its search: the result fits, and one more block does not.
func TestProvidedSectors(t *testing.T) {
	if journalEntry != 104 || journalSections != 124 || initialSectors != 32744 || tagRun != 256 {
		t.Errorf("layout %d %d %d %d", journalEntry, journalSections, initialSectors, tagRun)
	}
	fits := func(n, sectors uint64) bool {
		area, offset := (n-1)>>log2Interleave, (n-1)&(1<<log2Interleave-1)
		return area<<log2Interleave+(area+1)*tagRun+initialSectors+offset < sectors
	}
	last := uint64(0)
	for _, size := range []uint64{16 << 20, 64 << 20, 192 << 20, 256 << 20, 384 << 20, 10 << 30, 10<<30 + 4096, 1 << 40, MaxSealed} {
		sectors := superblockSectors + (size-HeadSize)/512
		n := providedSectors(sectors)
		if n%8 != 0 || n < last {
			t.Errorf("%d bytes: %d sectors after %d", size, n, last)
		}
		if n > 0 && !fits(n, sectors) || n > 0 && fits(n+8, sectors) {
			t.Errorf("%d bytes: %d sectors is not the most", size, n)
		}
		last = n
	}
	for _, n := range []uint64{0, 1, 8, initialSectors, initialSectors + 8} {
		if got := providedSectors(n); got != 0 {
			t.Errorf("%d sectors provide %d", n, got)
		}
	}
}

func TestThreat_E02_SuperblockIsComparedByteForByte(t *testing.T) {
	key := bytes.Repeat([]byte{7}, 32)
	salt := [integritySalt]byte{1, 2, 3}
	good := superblock(8<<10, &salt, key)
	if got, err := saltOf(good, 8<<10, key); err != nil || got != salt {
		t.Fatalf("salt %x, %v", got, err)
	}
	for _, i := range []int{0, 8, 9, 10, 12, 16, 24, 28, 29, 32, 48, 63, 64, 479, 480, 511, 512, 4095} {
		b := bytes.Clone(good)
		b[i] ^= 1
		if _, err := saltOf(b, 8<<10, key); err == nil {
			t.Errorf("byte %d changed and accepted", i)
		}
	}
	if _, err := saltOf(good, 8<<10+8, key); err == nil {
		t.Error("another size was accepted")
	}
	if _, err := saltOf(good[:512], 8<<10, key); err == nil {
		t.Error("a short one was accepted")
	}
}

func TestIntegrityTableHasKeysThatAreWiped(t *testing.T) {
	k := &volumeKeys{integrity: bytes.Repeat([]byte{0xa7}, 32), journal: bytes.Repeat([]byte{0xb8}, 32)}
	target := integrityTarget("/dev/dm-0", 4096, k)
	want := "/dev/dm-0 0 32 J 7 block_size:4096 journal_sectors:32768 interleave_sectors:32768 fix_padding fix_hmac internal_hash:hmac(sha256):" +
		strings.Repeat("a7", 32) + " journal_mac:hmac(sha256):" + strings.Repeat("b8", 32)
	if string(target.Params) != want || !target.Secret || target.Length != 4096 || target.Type != "integrity" {
		t.Errorf("table %q", target.Params)
	}
	for _, fail := range []uintptr{0, dmTableLoad} {
		m, _, buffers := fakeMapper(t, fail)
		target := integrityTarget("/dev/dm-0", 4096, k)
		_, _ = m.Create("x", "", false, Target{Length: 8, Type: "linear", Params: []byte("a 0")}, target)
		for _, b := range append(*buffers, target.Params) {
			if bytes.Contains(b, []byte("a7a7")) || bytes.Contains(b, []byte("b8b8")) {
				t.Errorf("fail %#x: a buffer still holds a key", fail)
			}
		}
	}
	k.wipe()
	if !bytes.Equal(k.integrity, make([]byte, 32)) || !bytes.Equal(k.journal, make([]byte, 32)) {
		t.Error("keys are not wiped")
	}
}

func TestTableOfTwoTargets(t *testing.T) {
	b, err := encodeTable("n", 0, Target{Length: 8, Type: "linear", Params: []byte("/dev/loop0 0")}, Target{Start: 8, Length: 16, Type: "linear", Params: []byte("/dev/vdb 2048")})
	if err != nil {
		t.Fatal(err)
	}
	if n := binary.LittleEndian.Uint32(b[offTargetCount:]); n != 2 {
		t.Errorf("%d targets", n)
	}
	next := binary.LittleEndian.Uint32(b[dmIoctlSize+20:])
	second := b[dmIoctlSize+next:]
	if next%8 != 0 || binary.LittleEndian.Uint64(second) != 8 || binary.LittleEndian.Uint64(second[8:]) != 16 || !bytes.HasPrefix(second[dmTargetSize:], []byte("/dev/vdb 2048\x00")) {
		t.Errorf("second target at %d: %x", next, second)
	}
	if _, err := encodeTable("n", 0); err == nil {
		t.Error("an empty table was accepted")
	}
	if _, err := encodeTable("n", 0, make([]Target, maxTargets+1)...); err == nil {
		t.Error("a huge table was accepted")
	}
}

// headWith is the start of a disk with the record under the app's key.
func headWith(t *testing.T, key byte, change func(*record)) []byte {
	t.Helper()
	k, err := deriveKey(appKey(key), nil, roleRecord, 32)
	if err != nil {
		t.Fatal(err)
	}
	r := testRecord()
	change(r)
	return r.encode(k)
}

func TestOpenRefuses(t *testing.T) {
	same := func(*record) {}
	for name, c := range map[string]struct {
		head []byte
		opt  SealOptions
		code string
	}{
		"a blank disk of an instance that had one": {nil, SealOptions{FS: Ext4}, "disk_wiped"},
		"the disk of another app":                  {headWith(t, 2, same), SealOptions{FS: Ext4}, "disk_key_mismatch"},
		"the disk of another app, fresh":           {headWith(t, 2, same), SealOptions{FS: Ext4, Fresh: true}, "disk_key_mismatch"},
		"a disk that was larger":                   {headWith(t, 1, func(r *record) { r.size += 4096 }), SealOptions{FS: Ext4}, "disk_truncated"},
		"a disk with another file system":          {headWith(t, 1, same), SealOptions{FS: XFS}, "disk_fs_mismatch"},
		"no file system":                           {headWith(t, 1, same), SealOptions{}, "storage_fs"},
		"a record of the future":                   {headWith(t, 1, func(r *record) { r.state = 7 }), SealOptions{FS: Ext4}, "disk_version"},
	} {
		t.Run(name, func(t *testing.T) { wantRefused(t, fileDisk(t, c.head), 1, c.opt, c.code) })
	}
	for _, size := range []uint64{0, MinSealed - 1, MaxSealed + 4096} {
		dev := fileDisk(t, nil)
		dev.Size = size
		wantRefused(t, dev, 1, SealOptions{FS: Ext4, Fresh: true}, "disk_size")
	}
}

// What a format that stopped at its first step left is recognised, with the key only.
func TestAHalfMadeFormatIsRecognised(t *testing.T) {
	dev := fileDisk(t, nil)
	stop := errors.New("stop")
	s := noOpen(t)
	s.step = func(string) error { return stop }
	open := func(key byte) error {
		_, _, err := s.Open(context.Background(), dev, appKey(key), SealOptions{Fresh: true, FS: Ext4})
		return err
	}
	if err := open(1); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if err := open(1); !errors.Is(err, stop) {
		t.Errorf("again: %v", err)
	}
	wantRefused(t, dev, 2, SealOptions{Fresh: true, FS: Ext4}, "disk_key_mismatch")
}

func TestParseFS(t *testing.T) {
	for name, want := range map[string]FS{"": Ext4, "zfs": Ext4, "ext4": Ext4, "xfs": XFS} {
		if got, err := ParseFS(name); err != nil || got != want {
			t.Errorf("%q: %v, %v", name, got, err)
		}
	}
	if _, err := ParseFS("btrfs"); fault.Code(err) != "storage_fs" {
		t.Error(err)
	}
}

func TestExt4Copies(t *testing.T) {
	if got := fmt.Sprint(ext4Copies(28 * ext4Group)); got != fmt.Sprint([]uint64{1 * ext4Group, 3 * ext4Group, 9 * ext4Group, 27 * ext4Group, 5 * ext4Group, 25 * ext4Group, 7 * ext4Group}) {
		t.Error(got)
	}
	if got := ext4Copies(ext4Group); len(got) != 0 {
		t.Error(got)
	}
}

func TestToolsNeverSeeAKey(t *testing.T) {
	for _, args := range [][]string{SealedExt4Args("/m", "/dev/dm-2", 10<<30), SealedXFSArgs("/m", "/dev/dm-2"), E2fsckArgs("/m", "/dev/dm-2")} {
		if args[0] != "/m" || args[len(args)-1] != "/dev/dm-2" {
			t.Errorf("arguments %q", args)
		}
	}
	// The journal is written in full: replay reads past its end.
	if args := strings.Join(SealedExt4Args("/m", "/d", 10<<30), " "); !strings.Contains(args, "lazy_journal_init=0") || strings.Contains(args, "^has_journal") {
		t.Error(args)
	}
}

func TestSwapHeader(t *testing.T) {
	b := swapHeader(32 << 20)
	if len(b) != 4096 || binary.LittleEndian.Uint32(b[1024:]) != 1 || binary.LittleEndian.Uint32(b[1028:]) != 8191 || string(b[4086:]) != "SWAPSPACE2" {
		t.Errorf("%x", b[1024:1040])
	}
}

func TestExtentsAreMappedInOrder(t *testing.T) {
	extent := func(logical, physical, length uint64, flags uint32) []byte {
		b := make([]byte, fiemapExtent)
		binary.LittleEndian.PutUint64(b[0:], logical)
		binary.LittleEndian.PutUint64(b[8:], physical)
		binary.LittleEndian.PutUint64(b[16:], length)
		binary.LittleEndian.PutUint32(b[40:], flags)
		return b
	}
	const unwritten = 0x800
	two := append(extent(0, 8192, 4096, unwritten), extent(4096, 40960, 8192, unwritten|1)...)
	got, next, err := extentTargets(two, 2, 0, 8192, "dm", 1<<20)
	if err != nil || next != 8192 || len(got) != 2 || got[1].Start != 8 || got[1].Length != 8 || string(got[1].Params) != "dm 80" || string(got[0].Params) != "dm 16" {
		t.Errorf("%+v %d %v", got, next, err)
	}
	for name, b := range map[string][]byte{
		"a hole at the start":        extent(4096, 8192, 4096, 0),
		"no place yet":               extent(0, 8192, 8192, 0x4),
		"data within the inode":      extent(0, 8192, 8192, 0x200),
		"shared with another file":   extent(0, 8192, 8192, 0x2000),
		"not whole pages":            extent(0, 8704, 8192, 0),
		"beyond the end of the disk": extent(0, 1<<20, 8192, 0),
		"over the end of the disk":   extent(0, 1<<20-4096, 8192, 0),
		"wrapping around":            extent(0, ^uint64(4095), 8192, 0),
		"at the superblock":          extent(0, 0, 8192, 0),
	} {
		if _, _, err := extentTargets(b, 1, 0, 8192, "dm", 1<<20); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func hmacOf(key, b []byte) []byte {
	// As RFC 2104 has it, apart from the code under test.
	inner, outer := make([]byte, 64), make([]byte, 64)
	copy(inner, key)
	copy(outer, key)
	for i := range inner {
		inner[i] ^= 0x36
		outer[i] ^= 0x5c
	}
	sum := sha256.Sum256(append(inner, b...))
	sum = sha256.Sum256(append(outer, sum[:]...))
	return sum[:]
}

// recordKeyOfOnes is the key of the record under a disk key of 32 bytes 0x01, computed
// by hand from RFC 5869.
const recordKeyOfOnes = "4f8908b21b20c5fadb11e3bf9cad3ccbed0bc734a82f0e3251ec38bca765305f"
