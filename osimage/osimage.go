// SPDX-License-Identifier: Apache-2.0

// Package osimage reads and checks a release directory of dstack-os
// (guest-os.md §2, measurement.md §1).
//
// A release is named by its image hash: the SHA-256 of sha256sum.txt, which
// lists firmware, kernel, initramfs, metadata and launch measurements by hash;
// the root file system, and the scripts layer where there is one (design.md §6), are
// bound by the verity root hashes on the command line in the metadata. [Load]
// checks all of that except the content of the two, which the guest's kernel
// checks as it reads, and which [Image.VerifyRootfs] checks at once.
//
// The directory is attacker-controlled: every file is bounded, names are fixed,
// and nothing in it can name a path outside of it. Which hash is the right one
// is not said in the directory: the caller compares [Image.Hash] with one it
// trusts.
//
// Error codes: image_missing (no directory, or a file of it absent),
// image_truncated (a file shorter than it must be), image_altered (content and
// hash differ), image_malformed (content that no builder writes).
package osimage

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
)

// The names of the files of a release. Only these are ever opened.
const (
	FirmwareName = "ovmf.fd"
	KernelName   = "bzImage"
	InitrdName   = "initramfs.cpio.gz" // upstream's name; the content need not be compressed
	RootfsName   = "rootfs.img.parted.verity"
	MetadataName = "metadata.json"
	TDXName      = "measurement.tdx.cbor"
	SumsName     = "sha256sum.txt"
	DigestName   = "digest.txt"
)

// Limits in bytes.
const (
	maxMetadata = 64 << 10
	maxSums     = 16 << 10
	maxListed   = 1 << 30 // any file of sha256sum.txt
	maxCmdline  = 2048    // the kernel's COMMAND_LINE_SIZE on x86
)

// sumNames are the names sha256sum.txt may list, in upstream's order; the first
// four must be there.
var sumNames = []string{FirmwareName, KernelName, InitrdName, MetadataName, TDXName, "measurement.snp.cbor", "measurement.gcp.cbor", "measurement.aws.cbor", "measurement.aws.replay.json"}

const requiredSums = 4

// Metadata is metadata.json. Unknown keys are ignored, as upstream does.
type Metadata struct {
	BIOS          string `json:"bios"`
	Kernel        string `json:"kernel"`
	Cmdline       string `json:"cmdline"`
	Initrd        string `json:"initrd"`
	Rootfs        string `json:"rootfs"`
	Version       string `json:"version"` // x.y.z
	GitRevision   string `json:"git_revision"`
	SharedRO      bool   `json:"shared_ro"`
	IsDev         bool   `json:"is_dev"`
	Flavour       string `json:"flavour,omitempty"`        // prod, sim or debug; empty in upstream's images
	SecurityEpoch int    `json:"security_epoch,omitempty"` // rises when older images must get no keys
	Firmware      string `json:"firmware,omitempty"`       // debian-ovmf: a distribution's build
}

// Image is a release directory whose files are what its hash says, except the
// content of the root (see VerifyRootfs).
type Image struct {
	Dir      string
	Name     string // the directory's own name
	Metadata Metadata
	Hash     dstack.ImageHash // os_image_hash
	Sums     []byte           // sha256sum.txt: checksum_file of measurement.md §7

	RootHash [32]byte // verity root hash of the command line
	RootSize int64    // bytes of the root before its verity tree
	Scripts  Layer    // zero in an image without a scripts layer
}

// Layer is what the command line says of the scripts layer.
type Layer struct {
	Hash [32]byte // verity root hash
	Size int64    // bytes before the verity tree; 0 where there is none
}

// Firmware returns the path of the firmware.
func (i *Image) Firmware() string { return filepath.Join(i.Dir, FirmwareName) }

// Kernel returns the path of the kernel.
func (i *Image) Kernel() string { return filepath.Join(i.Dir, KernelName) }

// Initrd returns the path of the initramfs.
func (i *Image) Initrd() string { return filepath.Join(i.Dir, InitrdName) }

// Rootfs returns the path of the disk with the root file system.
func (i *Image) Rootfs() string { return filepath.Join(i.Dir, RootfsName) }

// TDXMeasurement returns the path of the TDX measurement document, which old
// images do not have.
func (i *Image) TDXMeasurement() string { return filepath.Join(i.Dir, TDXName) }

const rebuild = "build or fetch the image again (`dstack image build`)"

// Load reads a release directory and checks every listed file against its hash,
// the list against digest.txt, and the shape of the root disk.
func Load(dir string) (*Image, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	img := &Image{Dir: abs, Name: filepath.Base(abs)}
	if st, err := os.Stat(abs); err != nil || !st.IsDir() {
		return nil, fault.New("image_missing", "%s is not an image directory", dir).WithFix(rebuild)
	}
	if img.Sums, err = readFile(abs, SumsName, maxSums); err != nil {
		return nil, err
	}
	digest, err := readFile(abs, DigestName, 128)
	if err != nil {
		return nil, err
	}
	img.Hash = sha256.Sum256(img.Sums)
	stated, err := dstack.ParseImageHash(strings.TrimSpace(string(digest)))
	if err != nil {
		return nil, malformed(DigestName, "%v", err)
	}
	if stated != img.Hash {
		return nil, fault.New("image_altered", "%s: %s has hash %s, but %s says %s", dir, SumsName, img.Hash, DigestName, stated).WithFix(rebuild)
	}
	sums, err := ParseSums(img.Sums)
	if err != nil {
		return nil, err
	}
	for _, name := range sumNames {
		if want, ok := sums[name]; ok {
			if err := checkFile(abs, name, want); err != nil {
				return nil, err
			}
		}
	}
	raw, err := readFile(abs, MetadataName, maxMetadata)
	if err != nil {
		return nil, err
	}
	// The file just hashed could have been replaced; what is parsed must be what
	// is listed.
	if sha256.Sum256(raw) != sums[MetadataName] {
		return nil, fault.New("image_altered", "%s changed while it was read", MetadataName).WithFix(rebuild)
	}
	m, err := ParseMetadata(raw)
	if err != nil {
		return nil, err
	}
	img.Metadata = *m
	root, err := layerOf(m.Cmdline, "rootfs")
	if err != nil {
		return nil, err
	}
	if root.Size == 0 {
		return nil, malformed(MetadataName, "cmdline has no dstack.rootfs_hash")
	}
	img.RootHash, img.RootSize = root.Hash, root.Size
	if img.Scripts, err = layerOf(m.Cmdline, "scripts"); err != nil {
		return nil, err
	}
	if err := img.checkRootShape(); err != nil {
		return nil, err
	}
	return img, nil
}

// ParseSums parses sha256sum.txt: lines of a SHA-256 and one of the names of a
// release, each at most once, the four required ones present.
func ParseSums(data []byte) (map[string][32]byte, error) {
	if len(data) > maxSums {
		return nil, malformed(SumsName, "%d bytes; at most %d are allowed", len(data), maxSums)
	}
	if !utf8.Valid(data) {
		return nil, malformed(SumsName, "not UTF-8")
	}
	out := map[string][32]byte{}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		f := strings.Fields(line)
		if len(f) != 2 {
			return nil, malformed(SumsName, "line %d has %d words, not a hash and a name", n, len(f))
		}
		sum, err := hex.DecodeString(f[0])
		if err != nil || len(sum) != 32 {
			return nil, malformed(SumsName, "line %d: not a SHA-256", n)
		}
		if !contains(sumNames, f[1]) {
			return nil, malformed(SumsName, "line %d: %q is no file of a release", n, f[1])
		}
		if _, ok := out[f[1]]; ok {
			return nil, malformed(SumsName, "%s is listed twice", f[1])
		}
		out[f[1]] = [32]byte(sum)
	}
	for _, name := range sumNames[:requiredSums] {
		if _, ok := out[name]; !ok {
			return nil, malformed(SumsName, "%s is not listed", name)
		}
	}
	return out, nil
}

// ParseMetadata parses metadata.json.
func ParseMetadata(data []byte) (*Metadata, error) {
	if len(data) > maxMetadata {
		return nil, malformed(MetadataName, "%d bytes; at most %d are allowed", len(data), maxMetadata)
	}
	var m Metadata
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, malformed(MetadataName, "%v", err)
	}
	for _, f := range []struct{ key, got, want string }{
		{"bios", m.BIOS, FirmwareName}, {"kernel", m.Kernel, KernelName}, {"initrd", m.Initrd, InitrdName}, {"rootfs", m.Rootfs, RootfsName},
	} {
		if f.got != f.want {
			return nil, malformed(MetadataName, "%s is %q, not %q", f.key, f.got, f.want)
		}
	}
	switch m.Flavour {
	case "", "prod", "sim", "debug":
	default:
		return nil, malformed(MetadataName, "flavour %q", m.Flavour)
	}
	if (m.Flavour == "sim" || m.Flavour == "debug") != m.IsDev && m.Flavour != "" {
		return nil, malformed(MetadataName, "flavour %q with is_dev %v", m.Flavour, m.IsDev)
	}
	if m.SecurityEpoch < 0 {
		return nil, malformed(MetadataName, "security_epoch %d", m.SecurityEpoch)
	}
	if len(m.Cmdline) > maxCmdline {
		return nil, malformed(MetadataName, "cmdline of %d bytes; the kernel takes %d", len(m.Cmdline), maxCmdline)
	}
	for _, c := range []byte(m.Cmdline) {
		if c < 0x20 || c > 0x7e {
			return nil, malformed(MetadataName, "cmdline has byte 0x%02x", c)
		}
	}
	return &m, nil
}

// layerOf reads the verity arguments dstack.<name>_hash and dstack.<name>_size of a
// command line: each once, so that reader and guest cannot take different ones, or
// neither, which gives the zero Layer.
func layerOf(cmdline, name string) (Layer, error) {
	var none, l Layer
	args := map[string][]string{}
	for _, w := range strings.Fields(cmdline) {
		key, value, _ := strings.Cut(w, "=")
		args[key] = append(args[key], value)
	}
	hashKey, sizeKey := "dstack."+name+"_hash", "dstack."+name+"_size"
	hashes, sizes := args[hashKey], args[sizeKey]
	if len(hashes) == 0 && len(sizes) == 0 {
		return none, nil
	}
	if len(hashes) != 1 {
		return none, malformed(MetadataName, "cmdline has %d of %s, not one", len(hashes), hashKey)
	}
	if len(sizes) != 1 {
		return none, malformed(MetadataName, "cmdline has %d of %s, not one", len(sizes), sizeKey)
	}
	sum, err := hex.DecodeString(hashes[0])
	if err != nil || len(sum) != 32 {
		return none, malformed(MetadataName, "cmdline: %s is not 64 hexadecimal digits", hashKey)
	}
	l.Hash = [32]byte(sum)
	l.Size, err = strconv.ParseInt(sizes[0], 10, 64)
	if err != nil || l.Size <= 0 || l.Size%verity.BlockSize != 0 || l.Size > 16<<30 {
		return none, malformed(MetadataName, "cmdline: %s=%s is not a size of whole blocks", sizeKey, sizes[0])
	}
	return l, nil
}

// checkRootShape checks that the root disk is there, whole in length, and has
// the partitions in which the guest looks.
func (i *Image) checkRootShape() error {
	f, st, err := open(i.Dir, RootfsName)
	if err != nil {
		return err
	}
	defer f.Close()
	disk, err := gpt.Find(f)
	if err != nil {
		return i.rootError(err)
	}
	if want := gpt.DiskSize(disk.Root.Size, disk.Scripts.Size); st.Size() < want {
		return truncated(RootfsName, st.Size(), want)
	}
	if disk.Root.Size <= i.RootSize {
		return fault.New("image_altered", "%s: its partition has %d bytes, the root alone %d", RootfsName, disk.Root.Size, i.RootSize).WithFix(rebuild)
	}
	// A layer that nothing measures is none of ours, nor is one that is missing.
	if (disk.Scripts.Size > 0) != (i.Scripts.Size > 0) || i.Scripts.Size > 0 && disk.Scripts.Size <= i.Scripts.Size {
		return fault.New("image_altered", "%s: partition %s has %d bytes, by the command line the scripts layer alone has %d", RootfsName, gpt.ScriptsLabel, disk.Scripts.Size, i.Scripts.Size).WithFix(rebuild)
	}
	return nil
}

// VerifyRootfs reads the whole root disk and checks root and scripts layer against
// their verity root hashes, including the stored trees. It takes about a second
// per 500 MB.
func (i *Image) VerifyRootfs() error {
	f, _, err := open(i.Dir, RootfsName)
	if err != nil {
		return err
	}
	defer f.Close()
	disk, err := gpt.Find(f)
	if err != nil {
		return i.rootError(err)
	}
	if err := verity.Verify(io.NewSectionReader(f, disk.Root.Start, disk.Root.Size), i.RootSize, i.RootHash); err != nil {
		return i.rootError(err)
	}
	if i.Scripts.Size == 0 {
		return nil
	}
	if err := verity.Verify(io.NewSectionReader(f, disk.Scripts.Start, disk.Scripts.Size), i.Scripts.Size, i.Scripts.Hash); err != nil {
		return i.rootError(fmt.Errorf("partition %s: %w", gpt.ScriptsLabel, err))
	}
	return nil
}

// rootError names what is wrong with the root disk: it ends too early, or is not
// what its hash says.
func (i *Image) rootError(err error) error {
	code := "image_altered"
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		code = "image_truncated"
	}
	return fault.Wrap(err, code, "%s", filepath.Join(i.Dir, RootfsName)).WithFix(rebuild)
}

func open(dir, name string) (*os.File, fs.FileInfo, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fault.New("image_missing", "%s has no %s", dir, name).WithFix(rebuild)
	}
	if err != nil {
		return nil, nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	if !st.Mode().IsRegular() {
		f.Close()
		return nil, nil, malformed(name, "not a regular file")
	}
	return f, st, nil
}

func readFile(dir, name string, limit int64) ([]byte, error) {
	f, _, err := open(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, name), err)
	}
	if int64(len(data)) > limit {
		return nil, malformed(name, "more than %d bytes", limit)
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, truncated(name, int64(len(data)), 1)
	}
	return data, nil
}

func checkFile(dir, name string, want [32]byte) error {
	f, st, err := open(dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	if st.Size() > maxListed {
		return malformed(name, "%d bytes; at most %d are allowed", st.Size(), int64(maxListed))
	}
	if st.Size() == 0 {
		return truncated(name, 0, 1)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(f, maxListed)); err != nil {
		return fmt.Errorf("read %s: %w", filepath.Join(dir, name), err)
	}
	if got := [32]byte(h.Sum(nil)); got != want {
		return fault.New("image_altered", "%s has sha256 %x, %s says %x", filepath.Join(dir, name), got, SumsName, want).WithFix(rebuild)
	}
	return nil
}

func truncated(name string, have, want int64) error {
	return fault.New("image_truncated", "%s has %d bytes, at least %d are needed", name, have, want).WithFix(rebuild)
}

func malformed(name, format string, args ...any) error {
	return fault.New("image_malformed", "%s: %s", name, fmt.Sprintf(format, args...)).WithFix(rebuild)
}

func contains(list []string, s string) bool {
	for _, v := range list {
		if v == s {
			return true
		}
	}
	return false
}
