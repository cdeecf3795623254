// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/proc"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// Kinds of TEE of a VM.
const (
	TEESim  = "sim"
	TEETDX  = "tdx"
	TEENone = "none"
)

// Spec is vm-manifest.json: what a VM is. It is fixed when the VM is created and
// replaced by an update (spec vmm.md §4.2; version, revision, tee, machine and
// image_hash are ours).
type Spec struct {
	Version     int              `json:"version"`            // 1
	Revision    uint64           `json:"revision,omitempty"` // counts updates
	ID          string           `json:"id"`
	Name        string           `json:"name"`
	AppID       dstack.AppID     `json:"app_id"`
	VCPU        uint32           `json:"vcpu"`
	MemoryMB    uint32           `json:"memory"`
	DiskGB      uint32           `json:"disk_size"`
	Image       string           `json:"image"`
	ImageHash   dstack.ImageHash `json:"image_hash"`
	ImageVer    string           `json:"image_version"`
	PortMap     []PortMap        `json:"port_map"`
	CreatedAtMS int64            `json:"created_at_ms"`
	KMSURLs     []string         `json:"kms_urls"`     // empty: the node's
	GatewayURLs []string         `json:"gateway_urls"` // empty: the node's
	NoTEE       bool             `json:"no_tee"`
	SimTEE      string           `json:"simulated_tee,omitempty"`
	TEE         string           `json:"tee"`               // sim, tdx or none
	Machine     string           `json:"machine"`           // versioned machine type
	TPM         bool             `json:"swtpm"`             // a software TPM, for development
	Volumes     []string         `json:"volumes,omitempty"` // names in cvm.volumes_dir, as attached
}

// PortMap is one forwarded port.
type PortMap struct {
	Address  netip.Addr `json:"address"`
	Protocol string     `json:"protocol"`
	From     uint16     `json:"from"` // host
	To       uint16     `json:"to"`   // VM
}

func (p PortMap) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(p.Address, p.From), p.Protocol)
}

// Files of a VM directory beside those of package qemu.
const (
	specFile    = "vm-manifest.json"
	updateFile  = "vm-update.json" // the next vm-manifest.json
	stateFile   = "vm-state.json"
	sharedDir   = "shared" // of revision 0
	stderrLog   = "stderr.log"
	eventsFile  = "events.jsonl"
	qemuLock    = "qemu.lock"
	qemuRecord  = "qemu.pid"
	teeDir      = "tee"
	teeLock     = "tee/lock"
	teeRecord   = "tee/pid"
	teeSock     = "tee/tee.sock"
	teeState    = "tee/state"
	teeLaunch   = "tee/launch.json"
	teeLog      = "tee/helper.log"
	tpmLock     = "tpm/lock"
	tpmRecord   = "tpm/pid"
	tpmState    = "tpm/state" // what the TPM keeps over reboots
	tpmLog      = "tpm/swtpm.log"
	maxSpecFile = 1 << 20
)

// idForm is what a VM id may look like in a path (vmm.md §4.1).
var idForm = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// imageForm is what an image name may look like in a path, dots apart.
var imageForm = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

func checkImageName(name string) error {
	if !imageForm.MatchString(name) || strings.Contains(name, "..") || name == "." {
		return fault.New("image_name", "%.80q is not an image name", name).WithFix("use letters, digits, '_', '.' and '-', at most 64, without '..'")
	}
	return nil
}

type record = fsm.Record[lifecycle.State, lifecycle.Effect]

// readFile reads a bounded regular file and follows no link.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, err
}

// shared is the directory of the files that the guest gets: each revision has its
// own, so that the one write of vm-manifest.json changes all of them at once.
func (s *Spec) shared() string {
	if s.Revision == 0 {
		return sharedDir
	}
	return fmt.Sprintf("%s-%d", sharedDir, s.Revision)
}

// setup is what a VM is, as a whole.
type setup struct {
	spec     *Spec
	manifest *manifest.Manifest
}

// loadSetup reads vm-manifest.json, or the update of it, and its app-compose.json.
func loadSetup(dir, specFile, id string) (*setup, error) {
	spec, err := loadSpec(dir, specFile, id)
	if err != nil {
		return nil, err
	}
	raw, err := readFile(filepath.Join(dir, spec.shared(), hostshare.AppComposeName), manifest.MaxSize)
	if err != nil {
		return nil, err
	}
	m, err := manifest.Parse(raw)
	if err != nil {
		return nil, err
	}
	return &setup{spec, m}, nil
}

// loadSpec reads and checks vm-manifest.json of the directory of VM id.
func loadSpec(dir, specFile, id string) (*Spec, error) {
	data, err := readFile(filepath.Join(dir, specFile), maxSpecFile)
	if err != nil {
		return nil, err
	}
	var s Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("%s: %w", specFile, err)
	}
	switch {
	case s.Version != 1:
		return nil, fmt.Errorf("%s: version %d is not known to this VMM", specFile, s.Version)
	case s.ID != id:
		return nil, fmt.Errorf("%s: it is of VM %.80q", specFile, s.ID)
	case s.TEE != TEESim && s.TEE != TEETDX && s.TEE != TEENone:
		return nil, fmt.Errorf("%s: unknown tee %.80q", specFile, s.TEE)
	}
	return &s, checkImageName(s.Image)
}

func loadRecord(dir string) (rec record, err error) {
	data, err := readFile(filepath.Join(dir, stateFile), maxSpecFile)
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return rec, fmt.Errorf("%s: %w", stateFile, err)
	}
	if rec.State.Phase == "" {
		return rec, fmt.Errorf("%s: no phase", stateFile)
	}
	return rec, nil
}

// loadShared reads the files that the guest gets as they are.
func loadShared(dir string) (hostshare.Files, error) {
	files := hostshare.Files{}
	for _, name := range []string{hostshare.AppComposeName, hostshare.EncryptedEnvName, hostshare.UserConfigName, hostshare.InstanceInfoName, hostshare.SysConfigName} {
		limit, _ := hostshare.Limit(name)
		data, err := readFile(filepath.Join(dir, name), limit)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		files[name] = data
	}
	return files, nil
}

func writeJSON(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(path, append(data, '\n'), 0o600)
}

func qemuSlot(dir string) proc.Slot {
	return proc.Slot{Lock: filepath.Join(dir, qemuLock), Record: filepath.Join(dir, qemuRecord)}
}

func teeSlot(dir string) proc.Slot {
	return proc.Slot{Lock: filepath.Join(dir, teeLock), Record: filepath.Join(dir, teeRecord)}
}

func tpmSlot(dir string) proc.Slot {
	return proc.Slot{Lock: filepath.Join(dir, tpmLock), Record: filepath.Join(dir, tpmRecord)}
}

// makeSparse makes a disk of whole GiB that takes no space yet.
func makeSparse(path string, gb uint32) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(gb) << 30); err != nil {
		return err
	}
	return f.Sync()
}

// growSparse makes a disk larger, in whole GiB. One that is smaller than it was has
// lost data, which the new zeros would hide. Code: disk_truncated.
func growSparse(path string, was, gb uint32) error {
	f, err := os.OpenFile(path, os.O_WRONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < int64(was)<<30 {
		return fault.New("disk_truncated", "the data disk has %d bytes, fewer than its %d GiB", fi.Size(), was).
			WithFix("restore %s from a backup", path)
	}
	if fi.Size() >= int64(gb)<<30 {
		return nil
	}
	if err := f.Truncate(int64(gb) << 30); err != nil {
		return err
	}
	return f.Sync()
}

// syncTree makes a new directory with plain files durable before it gets its name.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !(d.IsDir() || d.Type().IsRegular()) {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	})
}

// macOf derives a locally administered address from the VM id (vmm.md §7).
func macOf(id string) string {
	h := sha256.Sum256([]byte(id))
	h[0] = h[0]&0xfe | 0x02
	parts := make([]string, 6)
	for i := range parts {
		parts[i] = hex.EncodeToString(h[i : i+1])
	}
	return strings.Join(parts, ":")
}

// instanceID is SHA-256(seed ‖ app id)[0:20].
func instanceID(seed []byte, app dstack.AppID) dstack.InstanceID {
	h := sha256.Sum256(append(append([]byte(nil), seed...), app[:]...))
	return dstack.InstanceID(h[:dstack.InstanceIDSize])
}

// checkSpace refuses to go on when less than reserve bytes are free below dir.
func checkSpace(dir string, reserve uint64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < reserve {
		return fault.New("disk_full", "%s has %d MiB free, and %d MiB are needed", dir, free>>20, reserve>>20).WithFix(fixSpace)
	}
	return nil
}

const fixSpace = "free some disk space, lower cvm.min_free_disk, or move state_dir"

// diskFull gives the error of a full disk its code.
func diskFull(err error, doing string) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fault.Wrap(err, "disk_full", "%s", doing).WithFix(fixSpace)
	}
	if fault.Code(err) != "" {
		return err
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// forwards turns port maps into QEMU's.
func forwards(ports []PortMap) []qemu.Forward {
	out := make([]qemu.Forward, len(ports))
	for i, p := range ports {
		out[i] = qemu.Forward{Protocol: p.Protocol, Address: p.Address, Host: p.From, VM: p.To}
	}
	return out
}
