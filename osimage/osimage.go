// SPDX-License-Identifier: Apache-2.0

// Package osimage reads and checks a release directory of dstack-os
// (guest-os.md §2, measurement.md §1).
//
// A release is named by its image hash: the SHA-256 of sha256sum.txt, which
// lists firmware, kernel, initramfs, metadata and launch measurements by hash;
// the root file system is bound by the verity root hash on the command line in
// the metadata. [Load] checks all of that except the root's content, which the
// guest's kernel checks as it reads, and which [Image.VerifyRootfs] checks at once.
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
	if img.RootHash, img.RootSize, err = rootOf(m.Cmdline); err != nil {
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

// rootOf reads the verity arguments of a command line; each must be there once,
// so that reader and guest cannot take different ones.
func rootOf(cmdline string) (root [32]byte, size int64, err error) {
	arg := func(key string) (string, error) {
		value, n := "", 0
		for _, w := range strings.Fields(cmdline) {
			if v, ok := strings.CutPrefix(w, key+"="); ok {
				value = v
				n++
			}
		}
		if n != 1 {
			return "", malformed(MetadataName, "cmdline has %d of %s, not one", n, key)
		}
		return value, nil
	}
	text, err := arg("dstack.rootfs_hash")
	if err != nil {
		return root, 0, err
	}
	sum, err := hex.DecodeString(text)
	if err != nil || len(sum) != 32 {
		return root, 0, malformed(MetadataName, "cmdline: dstack.rootfs_hash is not 64 hexadecimal digits")
	}
	if text, err = arg("dstack.rootfs_size"); err != nil {
		return root, 0, err
	}
	size, err = strconv.ParseInt(text, 10, 64)
	if err != nil || size <= 0 || size%verity.BlockSize != 0 || size > 16<<30 {
		return root, 0, malformed(MetadataName, "cmdline: dstack.rootfs_size=%s is not a size of whole blocks", text)
	}
	return [32]byte(sum), size, nil
}

// checkRootShape checks that the root disk is there, whole in length, and has
// the partition in which the guest looks.
func (i *Image) checkRootShape() error {
	f, st, err := open(i.Dir, RootfsName)
	if err != nil {
		return err
	}
	defer f.Close()
	part, err := gpt.Find(f)
	if err != nil {
		return i.rootError(err)
	}
	if want := part.Start + part.Size + gpt.Align; st.Size() < want {
		return truncated(RootfsName, st.Size(), want)
	}
	if part.Size <= i.RootSize {
		return fault.New("image_altered", "%s: its partition has %d bytes, the root alone %d", RootfsName, part.Size, i.RootSize).WithFix(rebuild)
	}
	return nil
}

// VerifyRootfs reads the whole root disk and checks it against the verity root
// hash, including the stored tree. It takes about a second per 500 MB.
func (i *Image) VerifyRootfs() error {
	f, _, err := open(i.Dir, RootfsName)
	if err != nil {
		return err
	}
	defer f.Close()
	part, err := gpt.Find(f)
	if err != nil {
		return i.rootError(err)
	}
	if err := verity.Verify(io.NewSectionReader(f, part.Start, part.Size), i.RootSize, i.RootHash); err != nil {
		return i.rootError(err)
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
