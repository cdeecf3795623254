// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// An update is the next revision of a VM: the files that its guest will get, in a
// directory of their own, and vm-update.json. It replaces vm-manifest.json when no
// run is under way, at once or before the next, so that what a running VM is stays
// on record; the write of vm-manifest.json is the one point at which all of it
// takes effect. App id, instance and data disk stay (guest-os.md §8.4).

func (v *vm) spec() *Spec                  { return v.now.Load().spec }
func (v *vm) manifest() *manifest.Manifest { return v.now.Load().manifest }

// shared is the directory of the files that the guest gets.
func (v *vm) shared() string { return filepath.Join(v.dir, v.spec().shared()) }

// loadUpdate finds an update that was not yet applied, and removes what an
// interrupted one left.
func (v *vm) loadUpdate() error {
	keep := map[string]bool{v.spec().shared(): true}
	next, err := loadSetup(v.dir, updateFile, v.spec().ID)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	case next.spec.Revision > v.spec().Revision:
		v.next.Store(next)
		keep[next.spec.shared()] = true
	}
	if v.next.Load() == nil {
		os.Remove(filepath.Join(v.dir, updateFile)) // applied already
	}
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), sharedDir) && e.IsDir() && !keep[e.Name()] {
			os.RemoveAll(filepath.Join(v.dir, e.Name()))
		}
	}
	return nil
}

// apply makes the update, if there is one, what the VM is. Its caller holds filesMu,
// and no run is under way.
func (v *vm) apply() error {
	now, next := v.now.Load(), v.next.Load()
	if next == nil {
		return nil
	}
	info, err := readFile(filepath.Join(v.shared(), hostshare.InstanceInfoName), maxSpecFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil {
		if err := durable.WriteFile(filepath.Join(v.dir, next.spec.shared(), hostshare.InstanceInfoName), info, 0o600); err != nil {
			return err
		}
	}
	// A disk that is larger than its VM says is no harm: it is growing.
	if err := growSparse(filepath.Join(v.dir, qemu.DataDisk), now.spec.DiskGB, next.spec.DiskGB); err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(v.dir, specFile), next.spec); err != nil {
		return err
	}
	v.now.Store(next)
	v.next.Store(nil)
	// What is left when these fail is found by loadUpdate.
	os.Remove(filepath.Join(v.dir, updateFile))
	os.RemoveAll(filepath.Join(v.dir, now.spec.shared()))
	v.event(eventUpdated, fmt.Sprintf("revision %d: compose hash %s, image %s, disk %d GiB", next.spec.Revision, next.manifest.Hash(), next.spec.Image, next.spec.DiskGB))
	return nil
}

// update replaces parts of what a VM is. It validates all before it changes any.
// A running VM goes on as it is until it is started again; so more than upstream
// allows can be asked of it (vmm.md §3.5 wants it stopped for another size or image).
//
// The reply is upstream's: the beginning of the compose hash when the manifest was
// replaced, else nothing.
//
// Codes: those of create, vm_not_found, vm_removing, disk_shrink, disk_truncated,
// disk_incompatible.
func (s *Server) update(ctx context.Context, in *vmmpb.UpdateVmRequest) (*vmmpb.Id, error) {
	v, err := s.get(ctx, in.Id)
	if err != nil {
		return nil, err
	}
	v.updateMu.Lock()
	defer v.updateMu.Unlock()
	base := v.next.Load()
	if base == nil {
		base = v.now.Load()
	}
	was := base.spec
	req := base.configuration(false)
	old, err := loadShared(filepath.Join(v.dir, was.shared()))
	if err != nil {
		return nil, err
	}
	req.EncryptedEnv, req.UserConfig = old[hostshare.EncryptedEnvName], string(old[hostshare.UserConfigName])
	req.Gpus, req.Networks = in.Gpus, in.Networks // refused by plan as in create
	if base.manifest.KeyProviderKind() == manifest.KeyProviderTPM {
		req.Tpm = nil // it follows from the manifest
	}
	if in.ComposeFile != "" {
		req.ComposeFile = in.ComposeFile
	}
	if len(in.EncryptedEnv) > 0 {
		req.EncryptedEnv = in.EncryptedEnv
	}
	if in.UserConfig != "" {
		req.UserConfig = in.UserConfig
	}
	if in.UpdatePorts {
		req.Ports = in.Ports
	}
	if in.UpdateKmsUrls {
		req.KmsUrls = in.KmsUrls
	}
	if in.UpdateGatewayUrls {
		req.GatewayUrls = in.GatewayUrls
	}
	if in.NoTee != nil && *in.NoTee != was.NoTEE {
		return nil, fault.New("not_supported", "another kind of TEE: this version of the VMM cannot change that").WithFix("create the VM again")
	}
	for _, f := range []struct{ from, to *uint32 }{{in.Vcpu, &req.Vcpu}, {in.Memory, &req.Memory}, {in.DiskSize, &req.DiskSize}} {
		if f.from != nil {
			*f.to = *f.from
		}
	}
	if in.Image != nil {
		req.Image = *in.Image
	}
	if in.DiskSize != nil && *in.DiskSize < was.DiskGB {
		return nil, fault.New("disk_shrink", "the disk of VM %s has %d GiB and cannot shrink to %d", was.ID, was.DiskGB, *in.DiskSize).
			WithFix("ask for at least %d GiB", was.DiskGB)
	}
	if m, err := manifest.Parse([]byte(req.ComposeFile)); err == nil && len(in.EncryptedEnv) == 0 && !(persistent(m) && len(m.AllowedEnvs) > 0) {
		req.EncryptedEnv = nil // nothing of it could be decrypted or passed on
	}
	spec, m, files, err := s.plan(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := v.keepsDisk(m); err != nil {
		return nil, err
	}
	spec.ID, spec.Revision, spec.CreatedAtMS, spec.Machine = was.ID, was.Revision+1, was.CreatedAtMS, was.Machine
	spec.TEE, spec.SimTEE, spec.NoTEE = was.TEE, was.SimTEE, was.NoTEE
	if in.Image == nil { // it was not asked for another one
		spec.ImageHash, spec.ImageVer = was.ImageHash, was.ImageVer
	}
	if err := s.commit(v, base, &setup{spec, m}, files); err != nil {
		return nil, diskFull(err, "update VM "+was.ID)
	}
	out := &vmmpb.Id{}
	if hash := m.Hash(); hash != base.manifest.Hash() {
		out.Id = hash.String()[:40]
	}
	return out, nil
}

// keepsDisk refuses a manifest under which a data disk in use could not be opened:
// it would get another key or be taken for another file system. Code: disk_incompatible.
func (v *vm) keepsDisk(m *manifest.Manifest) error {
	v.filesMu.Lock()
	defer v.filesMu.Unlock()
	files, err := loadShared(v.shared())
	if err != nil {
		return err
	}
	data, ok := files[hostshare.InstanceInfoName]
	if !ok {
		return nil // refused at the start
	}
	info, err := hostshare.ParseInstanceInfo(data)
	if err != nil || info.DataDisk == hostshare.DataDiskNew {
		return err
	}
	now := v.manifest()
	refuse := func(what, was, is string) error {
		return fault.New("disk_incompatible", "the data disk of VM %s was made with %s %s and cannot be opened with %s", v.spec().ID, what, was, is).
			WithFix("keep %s %s, or create another VM", what, was)
	}
	switch {
	case m.KeyProviderKind() != now.KeyProviderKind():
		return refuse("key_provider", now.KeyProviderKind(), m.KeyProviderKind())
	case m.NoInstanceID != now.NoInstanceID:
		return refuse("no_instance_id", fmt.Sprint(now.NoInstanceID), fmt.Sprint(m.NoInstanceID))
	case fileSystem(m) != fileSystem(now):
		return refuse("storage_fs", fileSystem(now), fileSystem(m))
	}
	return nil
}

// fileSystem is what a guest makes of storage_fs: ext4 unless xfs is asked for; zfs
// stands in old manifests and means ext4.
func fileSystem(m *manifest.Manifest) string {
	if m.StorageFS == "xfs" {
		return "xfs"
	}
	return "ext4"
}

// commit writes the next revision of a VM and applies it unless a run is under way.
func (s *Server) commit(v *vm, base, next *setup, files hostshare.Files) (err error) {
	s.createMu.Lock()
	defer s.createMu.Unlock()
	if err := portsTaken(next.spec, s.list()); err != nil {
		return err
	}
	delete(files, hostshare.InstanceInfoName) // apply takes the present one
	dir := filepath.Join(v.dir, next.spec.shared())
	written := false
	defer func() {
		if err != nil && !written {
			os.RemoveAll(dir)
		}
	}()
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	if err := syncTree(dir); err != nil {
		return err
	}
	v.filesMu.Lock()
	defer v.filesMu.Unlock()
	// A run may have taken the update that this one builds on in the meantime, which
	// is no harm: both were counted from the same files.
	st := v.state()
	if st.Phase == lifecycle.Removing || st.Phase == lifecycle.Removed {
		return fault.New("vm_removing", "the VM is being removed")
	}
	if err := writeJSON(filepath.Join(v.dir, updateFile), next.spec); err != nil {
		return err
	}
	written = true
	if s.crash != nil {
		s.crash("update written")
	}
	before := v.next.Swap(next)
	if before != nil {
		os.RemoveAll(filepath.Join(v.dir, before.spec.shared()))
	}
	if st.Active() {
		v.event(eventUpdate, fmt.Sprintf("revision %d, compose hash %s, from the next start on", next.spec.Revision, next.manifest.Hash()))
		return nil
	}
	if err := v.apply(); err != nil {
		return fmt.Errorf("the update is written and will be applied at the next start; now it cannot be: %w", err)
	}
	return nil
}

// resize is upstream's older form of an update.
//
// Code: resize_invalid, and those of update.
func (s *Server) resize(ctx context.Context, in *vmmpb.ResizeVmRequest) (*empty, error) {
	given := 0
	for _, n := range []*uint32{in.Vcpu, in.Memory, in.DiskSize} {
		if n != nil {
			given++
			if *n == 0 {
				return nil, fault.New("resize_invalid", "vCPUs, memory and disk cannot become 0").WithFix("leave out what shall stay")
			}
		}
	}
	if in.Image != nil {
		given++
		if *in.Image == "" {
			return nil, fault.New("resize_invalid", "the image has no name").WithFix("leave out what shall stay")
		}
	}
	if given == 0 {
		return nil, fault.New("resize_invalid", "nothing is to be resized").WithFix("give vcpu, memory, disk_size or image")
	}
	_, err := s.update(ctx, &vmmpb.UpdateVmRequest{Id: in.Id, Vcpu: in.Vcpu, Memory: in.Memory, DiskSize: in.DiskSize, Image: in.Image})
	return nil, err
}
