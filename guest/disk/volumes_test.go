// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/osimage/volume"
)

// volumeMachine has disks with the given partitions; content is by device name.
func volumeMachine(t *testing.T, disks map[string][]string, content map[string][]byte) *Volumes {
	t.Helper()
	devices := map[string]map[string]string{}
	for name, labels := range disks {
		devices[name] = map[string]string{"size": "1000\n", "device": ""}
		for i, label := range labels {
			n := string(rune('1' + i))
			devices[name+"/"+name+n] = map[string]string{"size": "1000\n", "partition": n + "\n", "uevent": "PARTNAME=" + label + "\n"}
		}
	}
	f := machine(t, devices)
	f.Dev = t.TempDir()
	for name, data := range content {
		if err := os.WriteFile(filepath.Join(f.Dev, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m, _, _ := fakeMapper(t, 0)
	return &Volumes{Finder: f, Mapper: m}
}

func TestScanFindsVolumesByTheirFirstPartition(t *testing.T) {
	ours := []string{volume.LabelMetadata, volume.LabelData, volume.LabelVerity}
	good := volume.Metadata([32]byte{1})
	v := volumeMachine(t, map[string][]string{
		"vda": ours, "vdb": ours, "vdc": ours, "vdd": {volume.LabelData, volume.LabelMetadata, volume.LabelVerity},
		"vde": ours[:2], "vdf": nil, "vdg": {"x", "y", "z"},
	}, map[string][]byte{"vda1": good, "vdb1": make([]byte, 4096), "vdc1": volume.Metadata([32]byte{2}), "vdd1": good, "vde1": good})
	found, err := v.scan()
	var disks []string
	for _, c := range found {
		disks = append(disks, c.disk)
		if c.data.Name != c.disk+"2" || c.tree.Name != c.disk+"3" || c.root[0] == 0 {
			t.Errorf("%+v", c)
		}
	}
	if err != nil || !slices.Equal(disks, []string{"vda", "vdc"}) {
		t.Errorf("found %v, %v", disks, err)
	}
}

func TestThreat_E08_VolumesThatAreNotThereOrLieAreRefused(t *testing.T) {
	ours := []string{volume.LabelMetadata, volume.LabelData, volume.LabelVerity}
	root := [32]byte{1}
	tree, _, err := verity.Tree(bytes.NewReader(make([]byte, 8192)), 8192)
	if err != nil {
		t.Fatal(err)
	}
	huge := bytes.Clone(tree)
	huge[72+2] = 1 // 65538 blocks, more than the partition has
	for name, c := range map[string]struct {
		disks   map[string][]string
		content map[string][]byte
		code    string
		says    string
	}{
		"no disk":                          {nil, nil, "volume_missing", "no disk holds"},
		"another root":                     {map[string][]string{"vda": ours}, map[string][]byte{"vda1": volume.Metadata([32]byte{2})}, "volume_missing", "no disk holds"},
		"a superblock of noise":            {map[string][]string{"vda": ours}, map[string][]byte{"vda1": volume.Metadata(root), "vda3": bytes.Repeat([]byte("x"), 4096)}, "volume_malformed", "not of format 1"},
		"a superblock that promises more":  {map[string][]string{"vda": ours}, map[string][]byte{"vda1": volume.Metadata(root), "vda3": huge}, "volume_malformed", "do not fit"},
		"verified bytes that are no files": {map[string][]string{"vda": ours}, map[string][]byte{"vda1": volume.Metadata(root), "vda3": tree}, "volume_malformed", "disk vda"},
	} {
		t.Run(name, func(t *testing.T) {
			v := volumeMachine(t, c.disks, c.content)
			err := v.MountAll(t.Context(), []VerityMount{{root, filepath.Join(t.TempDir(), "a")}})
			if fault.Code(err) != c.code || fault.Fix(err) == "" || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v (%q), want code %s saying %q", err, fault.Code(err), c.code, c.says)
			}
		})
	}
}

func TestVolumeTableHasTheRootOfTheManifest(t *testing.T) {
	target := volumeTarget("/dev/vdb2", "/dev/vdb3", 7, [32]byte{0xab})
	want := "1 /dev/vdb2 /dev/vdb3 4096 4096 7 1 sha256 ab" + strings.Repeat("00", 31) + " " + strings.Repeat("00", 32)
	if string(target.Params) != want || target.Length != 56 || target.Type != "verity" {
		t.Errorf("table %q length %d", target.Params, target.Length)
	}
}

func TestOnlyListedFileSystemsAreMounted(t *testing.T) {
	block := func(at int, magic string) []byte {
		b := make([]byte, 4096)
		copy(b[at:], magic)
		return b
	}
	for want, b := range map[string][]byte{"squashfs": block(0, "hsqs"), "ext4": block(1080, "\x53\xef"), "": block(0, "XFSB")} {
		if got, err := volumeFS(b); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", want, got, err)
		}
	}
}

func TestAVolumeHidesNothing(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := mountVolume("/dev/none", "squashfs", dir); err == nil || !strings.Contains(err.Error(), "not an empty directory") {
		t.Errorf("a directory with a file: %v", err)
	}
	if err := mountVolume("/dev/none", "squashfs", filepath.Join(dir, "file")); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file: %v", err)
	}
}
