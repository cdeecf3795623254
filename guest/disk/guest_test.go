// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/volume"
)

// machineUnderTest is the guest of vm_test.go: PID 1 of a bare kernel.
type machineUnderTest struct {
	port     *os.File
	answers  *bufio.Reader
	argument string
}

// scenarioOf is one story; long ones run only by name.
type scenarioOf struct {
	name string
	long bool
	run  func(*machineUnderTest) (string, error)
}

// guestMain runs the scenarios, prints a line for each and powers off.
func guestMain() {
	if err := guestScenarios(); err != nil {
		fmt.Println("RESULT end of the world:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func guestScenarios() error {
	for _, m := range [][3]string{{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"tmpfs", "/tmp", "tmpfs"}} {
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	os.Setenv("PATH", "/bin")
	g := &machineUnderTest{}
	if err := g.openPort(); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	only := ""
	for word := range strings.FieldsSeq(string(cmdline)) {
		if v, ok := strings.CutPrefix(word, "disk.only="); ok {
			only = v
		}
		if v, ok := strings.CutPrefix(word, "disk.argument="); ok {
			g.argument = v
		}
	}
	for _, s := range guestStories {
		if only == "" && s.long || only != "" && !slices.Contains(strings.Split(only, "+"), strings.ReplaceAll(s.name, " ", "_")) {
			continue
		}
		begin := time.Now()
		note, err := g.story(s)
		result := "ok " + note
		if err != nil {
			result = "FAILED " + strings.ReplaceAll(err.Error(), "\n", " ")
		} else if strings.HasPrefix(note, "SKIP") {
			result = note
		}
		fmt.Printf("\nRESULT %s: %s (%s)\n", s.name, result, time.Since(begin).Round(time.Millisecond))
	}
	fmt.Println("RESULT end: ok")
	return nil
}

// story runs one scenario and takes down what it left.
func (g *machineUnderTest) story(s scenarioOf) (note string, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
		for _, dir := range []string{"/mnt", "/mnt2"} {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
		for _, name := range []string{"t-swap", "t-swap-blocks", "t", "t-integrity", "t-disk"} {
			_ = removeSoon(NewMapper(), name)
		}
		if left := openDevices(); err == nil && len(left) > 0 {
			err = fmt.Errorf("left behind: %v", left)
		}
	}()
	return s.run(g)
}

// openDevices lists device-mapper devices and loop devices that have a file.
func openDevices() []string {
	left, _ := filepath.Glob("/sys/block/dm-*")
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	return append(left, loops...)
}

func (g *machineUnderTest) openPort() error {
	for range 100 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, path := range names {
			text, _ := os.ReadFile(path)
			if strings.TrimSpace(string(text)) != controls {
				continue
			}
			f, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(path)), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			g.port, g.answers = f, bufio.NewReader(f)
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("no control port")
}

// host asks the host for something and returns its answer.
func (g *machineUnderTest) host(format string, args ...any) string {
	if _, err := fmt.Fprintf(g.port, format+"\n", args...); err != nil {
		panic(err)
	}
	line, err := g.answers.ReadString('\n')
	if err != nil || strings.HasPrefix(line, "error") {
		panic(fmt.Sprintf("host: %s%v", line, err))
	}
	return strings.TrimSpace(line)
}

func (g *machineUnderTest) disk(name string) Block {
	b, err := NewFinder().Disk(name)
	if err != nil {
		panic(err)
	}
	return b
}

func (g *machineUnderTest) sealer() *Sealer {
	return &Sealer{
		Mapper: NewMapper(), Name: "t", Tools: Tools{"/bin/mke2fs", "/bin/e2fsck", "/bin/mkfs.xfs"},
		Run: func(ctx context.Context, argv []string) (int, error) {
			cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				fmt.Printf("%s\n%s", argv, out)
				return exit.ExitCode(), nil
			}
			return 0, err
		},
	}
}

func appKey(n byte) *[DiskKeySize]byte {
	var k [DiskKeySize]byte
	for i := range k {
		k[i] = n
	}
	return &k
}

func (g *machineUnderTest) open(export string, key byte, fresh bool) (*Volume, Result, error) {
	return g.sealer().Open(context.Background(), g.disk(export), appKey(key), SealOptions{Fresh: fresh, FS: Ext4})
}

// made formats the store on the export and mounts it at /mnt.
func (g *machineUnderTest) made(store, export string, key byte) *Volume {
	g.host("attach %s %s", store, export)
	v, r, err := g.open(export, key, true)
	if err != nil || !r.Formatted {
		panic(fmt.Sprintf("format: %v %+v", err, r))
	}
	if err := v.Mount("/mnt", unix.MS_NOATIME); err != nil {
		panic(err)
	}
	return v
}

func (g *machineUnderTest) shut(v *Volume) {
	if err := unix.Unmount("/mnt", 0); err != nil {
		panic(err)
	}
	if err := v.Close(); err != nil {
		panic(err)
	}
}

// content is reproducible noise.
func content(seed uint64, size int) []byte {
	r := rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed)))
	b := make([]byte, size)
	r.Read(b)
	return b
}

func writeSync(path string, data []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func dropCaches() {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		panic(err)
	}
}

func wantCode(err error, code string) error {
	if fault.Code(err) != code {
		return fmt.Errorf("error %v (%q), want code %s", err, fault.Code(err), code)
	}
	return nil
}

// refused opens the store and wants the code, no byte changed and nothing open.
func (g *machineUnderTest) refused(store, export string, key byte, fresh bool, code string) error {
	g.host("attach %s %s", store, export)
	before := g.host("sum %s", store)
	_, _, err := g.open(export, key, fresh)
	if e := wantCode(err, code); e != nil {
		return e
	}
	if after := g.host("sum %s", store); after != before {
		return fmt.Errorf("the disk was changed")
	}
	return nil
}

// where returns the place of the first block of a file on the disk: of its data and
// of its tag, in bytes, by the layout of integrity.go.
func where(path string) (data, tag int64) {
	f, err := os.Open(path)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	t, err := extents(f, 4096, "x", 1<<50)
	if err != nil {
		panic(err)
	}
	sector, err := strconv.ParseInt(strings.TrimPrefix(string(t[0].Params), "x "), 10, 64)
	if err != nil {
		panic(err)
	}
	return placeOf(sector)
}

func placeOf(sector int64) (data, tag int64) {
	area, offset := sector>>log2Interleave, sector&(1<<log2Interleave-1)
	run := area<<log2Interleave + area*tagRun + initialSectors
	return diskByte(run + tagRun + offset), diskByte(run) + offset>>log2BlockSectors*integrityTag
}

// diskByte is where a sector of the device under dm-integrity lies on the disk.
func diskByte(sector int64) int64 { return (sector-superblockSectors)*512 + HeadSize }

var guestStories = []scenarioOf{
	{name: "what is written is there after reopening", run: func(g *machineUnderTest) (string, error) {
		v := g.made("a", "disk", 1)
		data := content(1, 4<<20)
		if err := writeSync("/mnt/file", data); err != nil {
			return "", err
		}
		g.shut(v)
		for _, fresh := range []bool{false, true} {
			v, r, err := g.open("disk", 1, fresh)
			if err != nil || r != (Result{}) {
				return "", fmt.Errorf("reopen: %v %+v", err, r)
			}
			if err := v.Mount("/mnt", 0); err != nil {
				return "", err
			}
			got, err := os.ReadFile("/mnt/file")
			if err != nil || !bytes.Equal(got, data) {
				return "", fmt.Errorf("read back: %v", err)
			}
			g.shut(v)
		}
		if g.host("contains a %s", hex.EncodeToString(data[:64])) != "false" {
			return "", errors.New("the disk holds plaintext")
		}
		if g.host("contains a %s", hex.EncodeToString([]byte("integrt"))) != "false" {
			return "", errors.New("the disk holds a superblock")
		}
		return "", nil
	}},
	{name: "another key is refused", run: func(g *machineUnderTest) (string, error) {
		return "", g.refused("a", "disk", 2, false, "disk_key_mismatch")
	}},
	{name: "the disk of another instance is refused", run: func(g *machineUnderTest) (string, error) {
		g.shut(g.made("other", "disk", 9))
		return "", errors.Join(g.refused("other", "disk", 1, false, "disk_key_mismatch"), g.refused("other", "disk", 1, true, "disk_key_mismatch"))
	}},
	{name: "a record before the blocks of another volume opens nothing", run: func(g *machineUnderTest) (string, error) {
		g.host("clone other spliced")
		g.host("splice spliced a 0 %d", HeadSize)
		g.host("attach spliced disk")
		v, _, err := g.open("disk", 1, false)
		if err == nil {
			err = v.Mount("/mnt", 0)
			v.Close()
		}
		return "", wantCode(err, "disk_filesystem")
	}},
	{name: "a wiped disk is refused", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a wiped")
		g.host("zero wiped 0 %d", HeadSize)
		return "", g.refused("wiped", "disk", 1, false, "disk_wiped")
	}},
	{name: "a null-cipher header is refused", run: func(g *machineUnderTest) (string, error) {
		g.host("put null 0 %s", hex.EncodeToString(luks2Header(nullCipherJSON, 0)))
		g.host("put null %d %s", 0x4000, hex.EncodeToString(luks2Header(nullCipherJSON, 1)))
		return "", errors.Join(g.refused("null", "disk", 1, true, "disk_foreign"), g.refused("null", "disk", 1, false, "disk_foreign"))
	}},
	{name: "a truncated disk is refused", run: func(g *machineUnderTest) (string, error) {
		return "", g.refused("a", "small", 1, false, "disk_truncated")
	}},
	{name: "a larger disk grows and shows nothing of the host", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a grown")
		g.host("noise grown %d %d", 256<<20, 8<<20)
		g.host("attach grown large")
		v, r, err := g.open("large", 1, false)
		if err != nil || !r.Grown {
			return "", fmt.Errorf("open: %v %+v", err, r)
		}
		old := int64(providedSectors((256<<20-HeadSize)/512+superblockSectors)) * 512
		f, err := os.Open(v.Node)
		if err != nil {
			return "", err
		}
		for at := old; at < old+int64(4<<20); at += 1 << 20 {
			if _, err := f.ReadAt(make([]byte, 4096), at); err == nil {
				return "", fmt.Errorf("byte %d was never written and can be read", at)
			}
		}
		f.Close()
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		var s unix.Statfs_t
		if err := unix.Statfs("/mnt", &s); err != nil || s.Blocks*4096 < 300<<20 {
			return "", fmt.Errorf("%d blocks after growing, %v", s.Blocks, err)
		}
		if got, err := os.ReadFile("/mnt/file"); err != nil || !bytes.Equal(got, content(1, 4<<20)) {
			return "", fmt.Errorf("the data did not survive: %v", err)
		}
		big := content(2, 24<<20)
		if err := writeSync("/mnt/big", big); err != nil {
			return "", err
		}
		g.shut(v)
		v, r, err = g.open("large", 1, false)
		if err != nil || r.Grown {
			return "", fmt.Errorf("reopen: %v %+v", err, r)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if got, err := os.ReadFile("/mnt/big"); err != nil || !bytes.Equal(got, big) {
			return "", fmt.Errorf("what was written after growing: %v", err)
		}
		g.shut(v)
		// By a factor of 27, in several steps of ext4.
		g.host("attach grown huge")
		if v, r, err = g.open("huge", 1, false); err != nil || !r.Grown {
			return "", fmt.Errorf("grow to the full: %v %+v", err, r)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if err := unix.Statfs("/mnt", &s); err != nil || s.Blocks*4096 < 9<<30 {
			return "", fmt.Errorf("%d blocks after growing to the full, %v", s.Blocks, err)
		}
		for i := range 90 { // ext4 spreads directories over its groups
			dir := fmt.Sprintf("/mnt/%d", i)
			if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(dir+"/file", content(uint64(i), 20<<10), 0o600)); err != nil {
				return "", err
			}
		}
		unix.Sync()
		if err := unix.Unmount("/mnt", 0); err != nil {
			return "", err
		}
		if err := g.checkAll(v); err != nil {
			return "", err
		}
		if err := v.Close(); err != nil {
			return "", err
		}
		return "", g.refused("grown", "disk", 1, false, "disk_truncated")
	}},
	{name: "a flipped bit is a read error", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a flipped")
		g.host("attach flipped disk")
		v, _, err := g.open("disk", 1, false)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		data, tag := where("/mnt/file")
		for _, at := range []int64{data + 100, tag + 3} {
			g.host("flip flipped %d 2", at)
			// The kernel keeps tags that it has read: they are read anew after reopening.
			g.shut(v)
			if v, _, err = g.open("disk", 1, false); err != nil {
				return "", err
			}
			if err := v.Mount("/mnt", 0); err != nil {
				return "", err
			}
			if b, err := os.ReadFile("/mnt/file"); !errors.Is(err, unix.EIO) {
				return "", fmt.Errorf("read %d bytes, same: %v, error %v", len(b), bytes.Equal(b, content(1, 4<<20)), err)
			}
			g.host("flip flipped %d 2", at)
		}
		g.shut(v)
		if v, _, err = g.open("disk", 1, false); err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if b, err := os.ReadFile("/mnt/file"); err != nil || !bytes.Equal(b, content(1, 4<<20)) {
			return "", fmt.Errorf("with the bit turned back: %v", err)
		}
		g.shut(v)
		return "", nil
	}},
	{name: "without integrity a flipped bit changes the text silently", run: func(g *machineUnderTest) (string, error) {
		g.host("attach xts disk")
		dev := g.disk("disk")
		var key [CryptKeySize]byte
		key[0], key[63] = 1, 2
		node, err := NewMapper().OpenCrypt("t", dev.Path, dev.Size, &key)
		if err != nil {
			return "", err
		}
		want := content(3, 4096)
		f, err := os.OpenFile(node, os.O_RDWR, 0)
		if err != nil {
			return "", err
		}
		_, err = f.WriteAt(want, 1<<20)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return "", err
		}
		g.host("flip xts %d 2", 1<<20+100)
		dropCaches()
		f, err = os.Open(node)
		if err != nil {
			return "", err
		}
		got := make([]byte, 4096)
		_, err = f.ReadAt(got, 1<<20)
		if err := errors.Join(err, f.Close()); err != nil {
			return "", fmt.Errorf("it should read: %w", err)
		}
		if bytes.Equal(got, want) {
			return "", errors.New("the bit did not matter")
		}
		return "", nil
	}},
	{name: "a block in another place is a read error", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a moved")
		g.host("attach moved disk")
		v, _, err := g.open("disk", 1, false)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if err := writeSync("/mnt/second", content(5, 4096)); err != nil {
			return "", err
		}
		// Off the journal, whose copy would be read else.
		g.shut(v)
		if v, _, err = g.open("disk", 1, false); err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		fromData, fromTag := where("/mnt/second")
		toData, toTag := where("/mnt/file")
		g.host("copy moved %d %d 4096", fromData, toData)
		g.host("copy moved %d %d %d", fromTag, toTag, integrityTag)
		dropCaches()
		if _, err := os.ReadFile("/mnt/file"); err == nil {
			return "", errors.New("a block with its tag was accepted in another place")
		}
		if b, err := os.ReadFile("/mnt/second"); err != nil || !bytes.Equal(b, content(5, 4096)) {
			return "", fmt.Errorf("where it belongs: %v", err)
		}
		g.shut(v)
		return "", nil
	}},
	{name: "a record that changes between two reads is read once", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a flop")
		g.host("attach flop disk")
		g.host("flipflop flop 0 4096")
		v, _, err := g.open("disk", 1, false)
		if err != nil {
			return "", err
		}
		if n := g.host("reads flop"); n != "1" {
			return "", fmt.Errorf("the record was read %s times", n)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		g.shut(v)
		// Changed for good from the second read on: the next boot sees only that.
		_, _, err = g.open("disk", 1, false)
		return "", wantCode(err, "disk_foreign")
	}},
	{name: "a superblock that the host plants is not read", run: func(g *machineUnderTest) (string, error) {
		// Were it read, a superblock in the first sector of the payload would count; it
		// is a part of the journal, which no longer holds together then.
		g.host("clone a planted")
		var salt [integritySalt]byte
		g.host("put planted %d %s", HeadSize, hex.EncodeToString(superblock(8<<20, &salt, make([]byte, 32))))
		g.host("attach planted disk")
		v, _, err := g.open("disk", 1, false)
		if err == nil {
			err = v.Mount("/mnt", 0)
			v.Close()
		}
		return "", wantCode(err, "disk_filesystem")
	}},
	{name: "the journal is replayed, and not when it was altered", run: func(g *machineUnderTest) (string, error) {
		g.host("clone a live")
		g.host("attach live disk")
		v, _, err := g.open("disk", 1, false)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if err := writeSync("/mnt/late", content(6, 300<<10)); err != nil {
			return "", err
		}
		for _, name := range []string{"crash", "badmac", "baddata", "stale"} {
			g.host("clone live %s", name)
		}
		g.shut(v)
		g.host("attach crash disk")
		if v, _, err = g.open("disk", 1, false); err != nil {
			return "", fmt.Errorf("after a crash: %w", err)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if b, err := os.ReadFile("/mnt/late"); err != nil || !bytes.Equal(b, content(6, 300<<10)) {
			return "", fmt.Errorf("what the journal held: %v", err)
		}
		g.shut(v)
		for section := range int64(journalSections) {
			at := HeadSize + section*journalSectionSectors*512
			g.host("flip badmac %d 0", at+496)           // MAC of the entries
			g.host("flip baddata %d 0", at+8*512+1000)   // data of the first entry
			g.host("copy stale %d %d 512", at, at+5*512) // a sector of entries in another's place
		}
		for _, name := range []string{"badmac", "baddata", "stale"} {
			g.host("attach %s disk", name)
			v, _, err := g.open("disk", 1, false)
			if err == nil {
				err = v.Mount("/mnt", 0)
				v.Close()
			}
			if e := wantCode(err, "disk_filesystem"); e != nil {
				return "", fmt.Errorf("%s: %w", name, e)
			}
		}
		return "", nil
	}},
	{name: "a format that ends at any step is done again", run: func(g *machineUnderTest) (string, error) {
		stop := errors.New("stop")
		for _, step := range []string{"record formatting", "integrity", "cleared", "file system"} {
			g.host("attach step-%s disk", strings.ReplaceAll(step, " ", "-"))
			s := g.sealer()
			s.step = func(name string) error {
				if name == step {
					return stop
				}
				return nil
			}
			if _, _, err := s.Open(context.Background(), g.disk("disk"), appKey(1), SealOptions{Fresh: true, FS: Ext4}); !errors.Is(err, stop) {
				return "", fmt.Errorf("step %s: %v", step, err)
			}
			if left := openDevices(); len(left) > 0 {
				return "", fmt.Errorf("step %s left %v", step, left)
			}
			// Even if the instance counts as one that had a disk.
			v, r, err := g.open("disk", 1, false)
			if err != nil || !r.Formatted {
				return "", fmt.Errorf("after step %s: %v %+v", step, err, r)
			}
			if err := v.Mount("/mnt", 0); err != nil {
				return "", err
			}
			g.shut(v)
		}
		return "", nil
	}},
	{name: "a format without power is done again", run: func(g *machineUnderTest) (string, error) {
		formatted := 0
		for _, n := range []int{0, 1, 2, 20, 60, 150} {
			store := fmt.Sprintf("cut-%d", n)
			g.host("attach %s disk", store)
			g.host("cutafter %s %d", store, n)
			if v, _, err := g.open("disk", 1, true); err == nil {
				v.Close()
			}
			dropCaches()
			g.host("restore %s", store)
			v, r, err := g.open("disk", 1, true)
			if err != nil {
				return "", fmt.Errorf("after %d writes: %w", n, err)
			}
			if r.Formatted {
				formatted++
			}
			if err := v.Mount("/mnt", 0); err != nil {
				return "", fmt.Errorf("after %d writes: %w", n, err)
			}
			g.shut(v)
		}
		return fmt.Sprintf("%d formatted again", formatted), nil
	}},
	{name: "what was synced survives power cuts", run: func(g *machineUnderTest) (string, error) { return g.powerCuts(3, 1) }},
	{name: "power cuts", long: true, run: func(g *machineUnderTest) (string, error) {
		seed, err := strconv.ParseUint(g.argument, 10, 64)
		if err != nil {
			return "", err
		}
		return g.powerCuts(50, seed)
	}},
	{name: "a file system with errors is repaired", run: func(g *machineUnderTest) (string, error) {
		v := g.made("errors", "disk", 1)
		// Directories with nothing behind them on the disk, as after a little use.
		for i := range 30 {
			if err := os.MkdirAll(fmt.Sprintf("/mnt/%d/sub", i), 0o755); err != nil {
				return "", err
			}
		}
		unix.Sync()
		if err := os.WriteFile("/sys/fs/ext4/"+filepath.Base(v.Node)+"/trigger_fs_error", []byte("test"), 0); err != nil {
			return "", err
		}
		if err := os.WriteFile("/mnt/more", nil, 0o600); !errors.Is(err, unix.EROFS) {
			return "", fmt.Errorf("after an error it is still writable: %v", err)
		}
		g.shut(v)
		v, _, err := g.open("disk", 1, false)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if err := os.WriteFile("/mnt/more", nil, 0o600); err != nil {
			return "", err
		}
		if err := unix.Unmount("/mnt", 0); err != nil {
			return "", err
		}
		return "", errors.Join(g.checkAll(v), v.Close())
	}},
	{name: "swap is encrypted and leaves nothing", run: func(g *machineUnderTest) (string, error) {
		v := g.made("swap", "disk", 1)
		s, err := v.AddSwap("/mnt", 32<<20)
		if err != nil {
			return "", err
		}
		text, err := os.ReadFile("/proc/swaps")
		if err != nil || !strings.Contains(string(text), "/dm-") {
			return "", fmt.Errorf("/proc/swaps: %s %v", text, err)
		}
		memory, err := unix.Mmap(-1, 0, 8<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return "", err
		}
		want := content(7, len(memory))
		copy(memory, want)
		if err := unix.Madvise(memory, 21); err != nil { // MADV_PAGEOUT
			return "", fmt.Errorf("page out: %w", err)
		}
		unix.Sync()
		used, _ := os.ReadFile("/proc/swaps")
		if fields := strings.Fields(string(used)); len(fields) < 10 || fields[8] == "0" {
			return "", fmt.Errorf("nothing was swapped out: %s", used)
		}
		if !bytes.Equal(memory, want) {
			return "", errors.New("memory changed on its way")
		}
		if g.host("contains swap %s", hex.EncodeToString(want[4096:4096+64])) != "false" {
			return "", errors.New("the disk holds plaintext")
		}
		if err := unix.Munmap(memory); err != nil {
			return "", err
		}
		if err := s.Close(); err != nil {
			return "", err
		}
		if err := unix.Unmount("/mnt", 0); err != nil {
			return "", err
		}
		if err := g.checkAll(v); err != nil {
			return "", err
		}
		if _, err := v.AddSwap("/mnt", 1<<40); fault.Code(err) != "disk_swap" {
			return "", fmt.Errorf("too much swap: %v", err)
		}
		return strings.Join(strings.Fields(string(used))[8:9], ""), v.Close()
	}},
	{name: "ten gigabytes", run: func(g *machineUnderTest) (string, error) {
		begin := time.Now()
		v := g.made("huge", "huge", 1)
		format := time.Since(begin)
		g.shut(v)
		begin = time.Now()
		v, _, err := g.open("huge", 1, false)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		again := time.Since(begin)
		g.shut(v)
		return fmt.Sprintf("format %s, reopen %s", format.Round(time.Millisecond), again.Round(time.Millisecond)), nil
	}},
	{name: "a verity volume is found among bogus ones and read", run: func(g *machineUnderTest) (string, error) {
		if _, err := os.Stat("/volume.squashfs"); err != nil {
			return "SKIP: mksquashfs is not installed", nil
		}
		if err := os.MkdirAll("/tmp/source", 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile("/tmp/source/model", content(11, 1<<20), 0o644); err != nil {
			return "", err
		}
		if out, err := exec.Command("/bin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", "/tmp/source", "/tmp/volume.ext4", "8M").CombinedOutput(); err != nil {
			return "", fmt.Errorf("mke2fs: %v %s", err, out)
		}
		for _, path := range []string{"/volume.squashfs", "/tmp/volume.ext4"} {
			if err := g.volumeStory(path); err != nil {
				return "", fmt.Errorf("%s: %w", path, err)
			}
		}
		return "", nil
	}},
	{name: "XFS", run: func(g *machineUnderTest) (string, error) {
		if kinds, _ := os.ReadFile("/proc/filesystems"); !strings.Contains(string(kinds), "\txfs\n") {
			return "SKIP: the kernel has no XFS", nil
		}
		if _, err := os.Stat("/bin/mkfs.xfs"); err != nil {
			return "SKIP: mkfs.xfs is not installed", nil
		}
		open := func(export string, fresh bool) (*Volume, Result, error) {
			return g.sealer().Open(context.Background(), g.disk(export), appKey(1), SealOptions{Fresh: fresh, FS: XFS})
		}
		g.host("attach xfs large")
		v, _, err := open("large", true)
		if err != nil {
			return "", err
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		if err := writeSync("/mnt/file", content(8, 4<<20)); err != nil {
			return "", err
		}
		s, err := v.AddSwap("/mnt", 8<<20)
		if err != nil {
			return "", err
		}
		if err := s.Close(); err != nil {
			return "", err
		}
		g.shut(v)
		if _, _, err := g.open("large", 1, false); fault.Code(err) != "disk_fs_mismatch" {
			return "", fmt.Errorf("as ext4: %v", err)
		}
		g.host("attach xfs huge")
		v, r, err := open("huge", false)
		if err != nil || !r.Grown {
			return "", fmt.Errorf("grow: %v %+v", err, r)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", err
		}
		var st unix.Statfs_t
		if err := unix.Statfs("/mnt", &st); err != nil || st.Blocks*4096 < 9<<30 {
			return "", fmt.Errorf("%d blocks after growing, %v", st.Blocks, err)
		}
		got, err := os.ReadFile("/mnt/file")
		if err != nil || !bytes.Equal(got, content(8, 4<<20)) {
			return "", fmt.Errorf("read back: %v", err)
		}
		g.shut(v)
		return "", nil
	}},
}

// checkAll wants the unmounted file system in order, all of it.
func (g *machineUnderTest) checkAll(v *Volume) error {
	exit, err := v.check(context.Background(), g.sealer().Run, []string{"/bin/e2fsck", "-f", "-n", "-E", "readahead_kb=0", v.Node})
	if err != nil || exit != 0 {
		return fmt.Errorf("e2fsck: status %d, %v", exit, err)
	}
	return nil
}

// putVolume writes the image of a volume to a disk and lets the kernel see its
// partitions; change alters it on the way.
func (g *machineUnderTest) putVolume(store, export, file string, change func([]byte)) (root [32]byte, err error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return root, err
	}
	var image bytes.Buffer
	if root, err = volume.Build(&image, bytes.NewReader(data), int64(len(data))); err != nil {
		return root, err
	}
	change(image.Bytes())
	g.host("attach %s %s", store, export)
	f, err := os.OpenFile(g.disk(export).Path, os.O_RDWR, 0)
	if err != nil {
		return root, err
	}
	defer f.Close()
	// The image and, for the table at its end to be where the kernel looks for it,
	// nothing else: the disk is larger, which the kernel only remarks on.
	if _, err := f.WriteAt(image.Bytes(), 0); err != nil {
		return root, err
	}
	if err := f.Sync(); err != nil {
		return root, err
	}
	return root, unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
}

func (g *machineUnderTest) volumeStory(file string) error {
	const dataAt = 2 << 20
	store := strings.Trim(strings.ReplaceAll(file, "/", "-"), "-")
	first := func(b []byte) { b[dataAt+1030] ^= 1; b[dataAt+40] ^= 1 }
	last := 0
	root, err := g.putVolume(store+"-1", "vol1", file, first)
	if err != nil {
		return err
	}
	if _, err := g.putVolume(store+"-2", "vol2", file, func(b []byte) {
		last = bytes.Index(b, content(11, 1<<20)[900<<10:900<<10+64])
	}); err != nil {
		return err
	}
	if last < dataAt {
		return fmt.Errorf("the model is not in the image as it is: %d", last)
	}
	volumes := &Volumes{Finder: NewFinder(), Mapper: NewMapper()}
	volumes.Finder.Wait = 100 * time.Millisecond
	targets := []string{"/tmp/volume/a", "/tmp/volume/b"}
	down := func() error {
		var errs []error
		for _, t := range targets {
			if err := unix.Unmount(t, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, err)
			}
		}
		if err := removeSoon(NewMapper(), "dstack-verity0"); err != nil && !errors.Is(err, unix.ENXIO) {
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	defer down()
	want := []VerityMount{{root, targets[0]}, {root, targets[1]}}
	if err := volumes.MountAll(context.Background(), want); err != nil {
		return err
	}
	for _, t := range targets {
		b, err := os.ReadFile(t + "/model")
		if err != nil || !bytes.Equal(b, content(11, 1<<20)) {
			return fmt.Errorf("read %s: %v", t, err)
		}
		if err := os.WriteFile(t+"/new", nil, 0o600); !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("write: %v", err)
		}
	}
	if err := down(); err != nil {
		return err
	}
	// A bit of the model.
	g.host("flip %s-2 %d 0", store, last)
	dropCaches()
	if err := volumes.MountAll(context.Background(), want[:1]); err != nil {
		return err
	}
	if _, err := os.ReadFile(targets[0] + "/model"); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("a corrupt block: %v", err)
	}
	if err := down(); err != nil {
		return err
	}
	// No intact one is left; none at all; a target in use.
	if _, err := g.putVolume(store+"-2", "vol2", file, first); err != nil {
		return err
	}
	if err := wantCode(volumes.MountAll(context.Background(), want[:1]), "volume_malformed"); err != nil {
		return err
	}
	if err := wantCode(volumes.MountAll(context.Background(), []VerityMount{{[32]byte{1}, targets[0]}}), "volume_missing"); err != nil {
		return err
	}
	if _, err := g.putVolume(store+"-2", "vol2", file, func([]byte) {}); err != nil {
		return err
	}
	return wantCode(volumes.MountAll(context.Background(), []VerityMount{{root, "/proc"}}), "volume_mount")
}

// powerCuts writes files, takes the power away at a moment that nobody chose, and
// looks for everything that was synced before.
func (g *machineUnderTest) powerCuts(rounds int, seed uint64) (string, error) {
	v := g.made("power", "disk", 1)
	rng := rand.New(rand.NewPCG(seed, 2))
	synced := map[string][]byte{}
	for round := range rounds {
		name := fmt.Sprintf("/mnt/%d", round)
		data := content(seed<<16+uint64(round), 4096+rng.IntN(200<<10))
		if err := writeSync(name, data); err != nil {
			return "", err
		}
		synced[name] = data
		// Some that are not synced, under way when the power goes.
		g.host("cutafter power %d", rng.IntN(200))
		for i := range 20 {
			_ = os.WriteFile(fmt.Sprintf("/mnt/loose-%d", i), content(uint64(i), 40<<10), 0o600)
			if i%5 == 4 {
				unix.Sync()
			}
		}
		g.host("cut power %d", rng.Int32())
		_ = unix.Unmount("/mnt", unix.MNT_DETACH)
		if err := v.Close(); err != nil {
			return "", fmt.Errorf("round %d: close: %w", round, err)
		}
		g.host("restore power")
		var err error
		if v, _, err = g.open("disk", 1, false); err != nil {
			return "", fmt.Errorf("round %d: open: %w", round, err)
		}
		if err := v.Mount("/mnt", 0); err != nil {
			return "", fmt.Errorf("round %d: %w", round, err)
		}
		for name, want := range synced {
			if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
				return "", fmt.Errorf("round %d: %s was synced and is lost or other: %v", round, name, err)
			}
		}
		entries, err := os.ReadDir("/mnt")
		if err != nil {
			return "", fmt.Errorf("round %d: %w", round, err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), "loose-") {
				if err := os.Remove("/mnt/" + e.Name()); err != nil {
					return "", fmt.Errorf("round %d: %w", round, err)
				}
			}
		}
		// An old file goes now and then, so that the disk does not fill.
		if names := slices.Sorted(keysOf(synced)); len(names) > 8 {
			delete(synced, names[0])
			if err := os.Remove(names[0]); err != nil {
				return "", err
			}
		}
	}
	g.shut(v)
	return fmt.Sprintf("%d power cuts, seed %d", rounds, seed), nil
}

func keysOf(m map[string][]byte) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
