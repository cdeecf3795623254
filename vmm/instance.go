// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"crypto/rand"
	"path/filepath"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// persistent reports whether what an app stores outlives a boot: with the key
// provider none the key of the data disk does not.
func persistent(m *manifest.Manifest) bool {
	return m.KeyProviderKind() != manifest.KeyProviderNone
}

// instance returns the instance's identity. The host fixes it before the launch,
// since the configuration document commits to it. Where nothing outlives a boot
// each boot is a new instance (vmm.md §6.3); else the seed is made once, and a VM
// whose record of it is gone is not started: with another identity it would get
// other keys, and find a disk that it cannot open. Code: instance_lost.
func (v *vm) instance(old []byte) (*hostshare.InstanceInfo, error) {
	app := v.spec().AppID
	out := &hostshare.InstanceInfo{AppID: &app}
	if persistent(v.manifest()) {
		if old == nil {
			return nil, fault.New("instance_lost", "VM %s has no %s any more, which says whose its data disk is", v.spec().ID, hostshare.InstanceInfoName).
				WithFix("restore %s from a backup, or create the VM again", filepath.Join(v.shared(), hostshare.InstanceInfoName))
		}
		info, err := hostshare.ParseInstanceInfo(old)
		if err != nil {
			return nil, err
		}
		out.InstanceIDSeed, out.DataDisk = info.InstanceIDSeed, info.DataDisk
	}
	if v.manifest().NoInstanceID {
		out.InstanceIDSeed = nil
		return out, nil
	}
	if len(out.InstanceIDSeed) == 0 {
		if out.DataDisk != hostshare.DataDiskNew {
			return nil, fault.New("instance_lost", "VM %s has a data disk in use, and no seed of the instance that uses it", v.spec().ID).
				WithFix("restore %s from a backup, or create the VM again", filepath.Join(v.shared(), hostshare.InstanceInfoName))
		}
		out.InstanceIDSeed = make([]byte, dstack.InstanceIDSize)
		rand.Read(out.InstanceIDSeed)
	}
	id := instanceID(out.InstanceIDSeed, app)
	out.InstanceID = &id
	return out, nil
}

// takeInstanceInfo keeps the one thing of a guest's instance.info that the host
// does not know better: that the data disk is in use. Identity is the host's to
// fix, before the launch; the guest's word cannot change it. A disk in use does not
// become a new one again. When this returns nil, what is kept survives a power cut.
//
// Code: instance_info_malformed.
func (v *vm) takeInstanceInfo(run uint64, payload string) error {
	told, err := hostshare.ParseInstanceInfo([]byte(payload))
	if err != nil {
		return err
	}
	if told.DataDisk != hostshare.DataDiskReady {
		return nil
	}
	v.filesMu.Lock()
	defer v.filesMu.Unlock()
	if v.state().Run != run || !persistent(v.manifest()) {
		return nil
	}
	path := filepath.Join(v.shared(), hostshare.InstanceInfoName)
	limit, _ := hostshare.Limit(hostshare.InstanceInfoName)
	data, err := readFile(path, limit)
	if err != nil {
		return err
	}
	info, err := hostshare.ParseInstanceInfo(data)
	if err != nil || info.DataDisk == hostshare.DataDiskReady {
		return err
	}
	info.DataDisk = hostshare.DataDiskReady
	if data, err = info.Encode(); err != nil {
		return err
	}
	return diskFull(durable.WriteFile(path, data, 0o600), "keep the instance of VM "+v.spec().ID)
}
