// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/fsm"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/qemu"
	"github.com/dstack-go/dstack/vmm/registry"
)

const (
	minMemoryMB  = 128
	defaultVCPU  = 1
	defaultMemMB = 1024
	defaultDisk  = 4 // GiB
	maxName      = 128
)

// nameForm is what a VM may be called (vmm.md §3.5). It names nothing on disk and
// is passed to no program.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9\-_. @~!$^()]*$`)

// create makes a VM and starts it unless the request says otherwise. On error
// nothing is left.
//
// Codes: vm_name, vm_limit, not_supported, manifest_*, app_id, image_*, vcpu_limit,
// memory_limit, disk_limit, port_*, blob_missing, disk_full, qemu_*, tee_*,
// tpm_untrusted, swtpm_missing, volume_*.
func (s *Server) create(ctx context.Context, in *vmmpb.VmConfiguration) (id string, err error) {
	spec, m, files, err := s.plan(ctx, in)
	if err != nil {
		return "", err
	}
	v, err := s.make(ctx, in.Stopped, spec, m, files)
	if err != nil {
		return "", err
	}
	if in.Stopped {
		return spec.ID, nil
	}
	if err := v.start(ctx); err != nil {
		if ctx.Err() != nil || s.ctx.Err() != nil {
			return "", err // nobody waits for the answer; the VM stays as it is
		}
		s.discard(v)
		return "", err
	}
	return spec.ID, nil
}

// plan turns a request into a VM that could be made, or says why not.
func (s *Server) plan(ctx context.Context, in *vmmpb.VmConfiguration) (*Spec, *manifest.Manifest, hostshare.Files, error) {
	fail := func(err error) (*Spec, *manifest.Manifest, hostshare.Files, error) { return nil, nil, nil, err }
	c := &s.config
	if err := checkName(in.Name); err != nil {
		return fail(err)
	}
	unsupported := func(what string) (*Spec, *manifest.Manifest, hostshare.Files, error) {
		return fail(fault.New("not_supported", "%s: this version of the VMM cannot do that", what).WithFix("create the VM without it"))
	}
	switch {
	case in.Hugepages:
		return unsupported("huge pages")
	case in.PinNuma:
		return unsupported("NUMA pinning")
	case in.Gpus != nil && (len(in.Gpus.Gpus) > 0 || in.Gpus.AttachMode == "all"):
		return unsupported("GPUs")
	case len(in.Networks) > 1:
		return unsupported("several network cards")
	}
	for _, n := range append(in.Networks, in.Networking) {
		if n != nil && (n.Mode != "" && n.Mode != "user" || n.BridgeName != "") {
			return unsupported("bridged networks")
		}
	}
	m, err := manifest.Parse([]byte(in.ComposeFile))
	if err != nil {
		return fail(err)
	}
	spec := &Spec{Version: 1, ID: newID(), Name: in.Name, VCPU: in.Vcpu, MemoryMB: in.Memory, DiskGB: in.DiskSize, Image: in.Image,
		CreatedAtMS: time.Now().UnixMilli(), KMSURLs: in.KmsUrls, GatewayURLs: in.GatewayUrls, NoTEE: in.NoTee, TEE: c.CVM.TEE}
	switch {
	case in.SimulatedTee != nil && *in.SimulatedTee != "":
		if *in.SimulatedTee != "dstack-tdx" {
			return unsupported("simulated TEE " + cut(*in.SimulatedTee, 40))
		}
		spec.TEE, spec.SimTEE, spec.NoTEE = TEESim, *in.SimulatedTee, true
	case in.NoTee:
		spec.TEE = TEENone
	}
	if spec.TPM = spec.TEE == TEESim && m.KeyProviderKind() == manifest.KeyProviderTPM; in.Tpm != nil {
		spec.TPM = *in.Tpm
	}
	if spec.TPM {
		if spec.TEE != TEESim {
			return fail(fault.New("tpm_untrusted", "a software TPM belongs to the host, so that nothing sealed by it is safe: only a simulated TEE gets one").
				WithFix("choose another key provider, or set cvm.tee to sim for development"))
		}
		if _, err := s.swtpm(); err != nil {
			return fail(err)
		}
	}
	compose := m.Hash()
	copy(spec.AppID[:], compose[:])
	if in.AppId != nil && *in.AppId != "" {
		if spec.AppID, err = dstack.ParseAppID(strings.TrimPrefix(*in.AppId, "0x")); err != nil {
			return fail(fault.Wrap(err, "app_id", "app id %.80q", *in.AppId).WithFix("give 40 hexadecimal digits, or none to derive it from the manifest"))
		}
	}
	for _, l := range []struct {
		what, code string
		value      *uint32
		def        uint32
		min, max   uint32
		key        string
	}{
		{"vCPUs", "vcpu_limit", &spec.VCPU, defaultVCPU, 1, c.CVM.MaxVCPU, "cvm.max_allocable_vcpu"},
		{"MiB of memory", "memory_limit", &spec.MemoryMB, min(defaultMemMB, c.CVM.MaxMemoryMB), minMemoryMB, c.CVM.MaxMemoryMB, "cvm.max_allocable_memory_in_mb"},
		{"GiB of disk", "disk_limit", &spec.DiskGB, min(defaultDisk, c.CVM.MaxDiskGB), 1, c.CVM.MaxDiskGB, "cvm.max_disk_size_in_gb"},
	} {
		if *l.value == 0 {
			*l.value = l.def
		}
		if *l.value < l.min || *l.value > l.max {
			return fail(fault.New(l.code, "%d %s are not in %d to %d", *l.value, l.what, l.min, l.max).
				WithFix("ask for less, or raise %s in the VMM's configuration", l.key))
		}
	}
	if spec.Volumes, err = s.attachments(m); err != nil {
		return fail(err)
	}
	if spec.PortMap, err = c.parsePorts(in.Ports); err != nil {
		return fail(err)
	}
	for _, list := range [][]string{in.KmsUrls, in.GatewayUrls} {
		if len(list) > 16 {
			return fail(fault.New("url_invalid", "%d URLs, more than 16", len(list)))
		}
	}
	if spec.Image == "" {
		return fail(fault.New("image_missing", "no OS image is named").WithFix("name one of the images of ListImages"))
	}
	img, err := s.loadImage(spec.Image)
	if err != nil {
		return fail(err)
	}
	spec.ImageHash, spec.ImageVer = img.Hash, img.Metadata.Version
	bin, accel, err := s.host(ctx)
	if err != nil {
		return fail(err)
	}
	spec.Machine = bin.Machine
	if spec.TEE == TEETDX && (accel.Accel != qemu.KVM || !bin.TDX) {
		return fail(fault.New("tee_unavailable", "Intel TDX needs working KVM and a QEMU with TDX support (10.1)").
			WithFix("run on a TDX host, or set cvm.tee to sim for development"))
	}
	locked, err := registry.Locked(m.ImageLock)
	if err != nil {
		return fail(err)
	}
	if _, err := registry.Resolve(s.blobs, locked); err != nil {
		return fail(err)
	}
	files := hostshare.Files{hostshare.AppComposeName: m.Raw}
	if len(in.EncryptedEnv) > 0 {
		files[hostshare.EncryptedEnvName] = in.EncryptedEnv
	}
	if in.UserConfig != "" {
		files[hostshare.UserConfigName] = []byte(in.UserConfig)
	}
	app := spec.AppID
	info := hostshare.InstanceInfo{AppID: &app}
	if files[hostshare.InstanceInfoName], err = info.Encode(); err != nil {
		return fail(err)
	}
	// What the guest could not read is refused now, not at the start: files that
	// are too large, URLs that are none.
	trial := hostshare.Files{}
	for k, d := range files {
		trial[k] = d
	}
	sys := hostshare.SysConfig{KMSURLs: in.KmsUrls, GatewayURLs: in.GatewayUrls}
	if trial[hostshare.SysConfigName], err = sys.Encode(); err != nil {
		return fail(err)
	}
	if _, err := hostshare.Write(trial); err != nil {
		return fail(err)
	}
	return spec, m, files, checkSpace(c.StateDir, uint64(c.CVM.MinFreeDisk))
}

func checkName(name string) error {
	if len(name) > maxName || !nameForm.MatchString(name) {
		return fault.New("vm_name", "VM name %.160q has other characters than letters, digits and -_. @~!$^(), or is longer than %d", name, maxName).
			WithFix("choose another name")
	}
	return nil
}

// portsTaken refuses ports that another VM has, or will have. Code: port_busy.
func portsTaken(spec *Spec, vms []*vm) error {
	for _, other := range vms {
		if other.spec().ID == spec.ID {
			continue
		}
		for _, theirs := range []*setup{other.now.Load(), other.next.Load()} {
			if theirs == nil {
				continue
			}
			for _, p := range spec.PortMap {
				if _, taken := overlap(p, theirs.spec.PortMap); taken {
					return fault.New("port_busy", "host port %s belongs to VM %s (%s)", p, theirs.spec.ID, theirs.spec.Name).
						WithFix("choose another host port, or remove that VM")
				}
			}
		}
	}
	return nil
}

// make writes a VM's directory under another name, renames it into place, and
// makes the VM known.
func (s *Server) make(ctx context.Context, stopped bool, spec *Spec, m *manifest.Manifest, files hostshare.Files) (v *vm, err error) {
	s.createMu.Lock()
	defer s.createMu.Unlock()
	vms := s.list()
	if len(vms) >= s.config.CVM.MaxVMs {
		return nil, fault.New("vm_limit", "there are %d VMs already", len(vms)).WithFix("remove one, or raise cvm.max_vms in the VMM's configuration")
	}
	if err := portsTaken(spec, vms); err != nil {
		return nil, err
	}
	if !stopped {
		if err := tryPorts(ctx, spec.PortMap); err != nil {
			return nil, err
		}
	}
	dir := filepath.Join(s.vmsDir(), spec.ID)
	tmp := filepath.Join(s.vmsDir(), ".tmp-new-"+spec.ID)
	defer func() {
		if err != nil {
			os.RemoveAll(tmp)
			err = diskFull(err, "create the VM")
		}
	}()
	if err := os.MkdirAll(filepath.Join(tmp, sharedDir), 0o700); err != nil {
		return nil, err
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(tmp, sharedDir, name), data, 0o600); err != nil {
			return nil, err
		}
	}
	rec := record{State: lifecycle.State{Phase: lifecycle.Stopped, HasTEE: spec.TEE == TEESim}}
	for name, value := range map[string]any{specFile: spec, stateFile: rec} {
		data, err := json.MarshalIndent(value, "", "  ")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(tmp, name), append(data, '\n'), 0o600); err != nil {
			return nil, err
		}
	}
	if spec.TEE == TEESim {
		if err := os.Mkdir(filepath.Join(tmp, teeDir), 0o700); err != nil {
			return nil, err
		}
	}
	if err := makeSparse(filepath.Join(tmp, qemu.DataDisk), spec.DiskGB); err != nil {
		return nil, err
	}
	if err := syncTree(tmp); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return nil, err
	}
	if d, err := os.Open(s.vmsDir()); err == nil {
		err = d.Sync()
		d.Close()
		if err != nil {
			os.RemoveAll(dir)
			return nil, fmt.Errorf("sync %s: %w", s.vmsDir(), err)
		}
	}
	v = newVM(s, dir, spec, m, fsm.Record[lifecycle.State, lifecycle.Effect](rec))
	v.event(eventCreated, spec.Name)
	s.run(v, false)
	s.mu.Lock()
	s.vms[spec.ID] = v
	s.mu.Unlock()
	return v, nil
}

// discard removes a VM that could not be started when it was made.
func (s *Server) discard(v *vm) {
	v.post(lifecycle.Input{Kind: lifecycle.Remove})
	limit, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	v.wait(limit, func(st lifecycle.State, _ bool) bool { return st.Phase == lifecycle.Removed })
}

// removeBroken removes a VM that cannot be loaded, on a user's word only, and only
// when nothing runs in it.
func (s *Server) removeBroken(id string) error {
	dir := filepath.Join(s.vmsDir(), id)
	for what, slot := range map[string]interface {
		held() (bool, error)
	}{"QEMU": slotOf{qemuSlot(dir)}, "simulated TEE": slotOf{teeSlot(dir)}, "software TPM": slotOf{tpmSlot(dir)}} {
		held, err := slot.held()
		if err != nil {
			return err
		}
		if held {
			return fault.New("vm_broken", "VM %s cannot be loaded and its %s runs", id, what).
				WithFix("end that process yourself, then remove the VM again")
		}
	}
	if err := durable.RemoveAll(dir); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.broken, id)
	s.mu.Unlock()
	return nil
}
