// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// tools of the image that make and check file systems.
var tools = disk.Tools{Mke2fs: "/usr/bin/mke2fs", E2fsck: "/usr/bin/e2fsck", MkfsXFS: "/usr/bin/mkfs.xfs"}

// lasting reports whether what the app stores outlives this boot: with the key
// provider none nobody will have the key again.
func (m *Machine) lasting() bool { return m.manifest.KeyProviderKind() != manifest.KeyProviderNone }

// dataDisk opens the data disk under the app's disk key and mounts what the app
// writes to; then the read-only volumes that the manifest names.
func (m *Machine) dataDisk(ctx context.Context) error {
	dev, err := m.finder.Disk(disk.SerialData)
	if err != nil {
		return err
	}
	if m.lasting() {
		err = m.sealedDisk(ctx, dev)
	} else {
		err = m.passingDisk(ctx, dev)
	}
	if err != nil {
		return err
	}
	m.appKeys().Disk.Wipe() // the kernel has what was derived from it, and nobody else needs it
	if err := m.directories(); err != nil {
		return err
	}
	var mounts []disk.VerityMount
	for _, v := range m.manifest.VerityVolumes {
		mounts = append(mounts, disk.VerityMount{Root: v.Root, Target: v.Target})
	}
	if err := (&disk.Volumes{Finder: m.finder, Mapper: m.mapper}).MountAll(ctx, mounts); err != nil {
		return err
	}
	m.host.Notify(eventInstance, m.instanceInfo())
	return nil
}

// sealedDisk opens a disk that outlives the boot. Only an instance that never had
// one gets a new file system, and that is measured: what the host says about it can
// cost data that the host can destroy anyway, and not in silence.
func (m *Machine) sealedDisk(ctx context.Context, dev disk.Block) error {
	fs, err := disk.ParseFS(m.manifest.StorageFS)
	if err != nil {
		return err
	}
	sealer := &disk.Sealer{Mapper: m.mapper, Run: m.runTool, Tools: tools, Name: dataMapping}
	key := (*[disk.DiskKeySize]byte)(m.appKeys().Disk.Bytes())
	volume, result, err := sealer.Open(ctx, dev, key, disk.SealOptions{Fresh: m.instance.DataDisk == hostshare.DataDiskNew, FS: fs})
	if err != nil {
		return err
	}
	m.volume = volume
	if result.Formatted {
		if err := m.log.System(ctx, eventlog.StorageNew, nil); err != nil {
			return err
		}
	}
	m.console.Log(fmt.Sprintf("data disk: %s of %d MiB, new: %v, grown: %v", fs, volume.Size>>20, result.Formatted, result.Grown))
	// Not nosuid: container images, whose files live here, have set-user-id
	// programs. nodev, since device nodes of containers are on their own tmpfs.
	if err := volume.Mount(persistent, nodev|unix.MS_NOATIME); err != nil {
		return err
	}
	if m.manifest.SwapSize > 0 {
		if m.swap, err = volume.AddSwap(persistent, m.manifest.SwapSize); err != nil {
			return err
		}
	}
	return nil
}

// passingDisk maps the disk under a key of this boot alone. Whatever was there before
// is noise, so the file system is made anew each time. No barriers, no lazy
// initialisation: the content dies with the boot. No journal and no authentication
// either: a host that garbles it garbles what it could have taken away.
func (m *Machine) passingDisk(ctx context.Context, dev disk.Block) error {
	if m.manifest.SwapSize > 0 {
		return fault.New("swap_needs_keys", "swap_size needs a data disk that is authenticated, which the key provider none does not give").
			WithFix("use another key provider, or give the VM more memory")
	}
	var key [disk.CryptKeySize]byte
	defer clear(key[:])
	if err := fillRandom(key[:]); err != nil {
		return err
	}
	node, err := m.mapper.OpenCrypt(dataMapping, dev.Path, dev.Size, &key)
	if err != nil {
		return fault.Wrap(err, "data_disk", "encrypt the data disk %s", dev.Name)
	}
	exit, err := m.runTool(ctx, disk.Mke2fsArgs(tools.Mke2fs, node))
	if err == nil && exit != 0 {
		err = fmt.Errorf("mke2fs ended with status %d", exit)
	}
	if err != nil {
		return fault.Wrap(err, "data_disk", "make a file system on the data disk")
	}
	if err := unix.Mount(node, persistent, "ext4", nodev|unix.MS_NOATIME, "nobarrier,noinit_itable"); err != nil {
		return fault.Wrap(err, "data_disk", "mount the data disk")
	}
	return nil
}

// runTool runs a program of the image to its end and returns its exit status.
func (m *Machine) runTool(ctx context.Context, argv []string) (int, error) {
	err := m.sup.Run(ctx, supervise.Command{Path: argv[0], Args: argv, Env: []string{"PATH=/usr/bin"}})
	var exit *supervise.ExitError
	if errors.As(err, &exit) && exit.Status.Exited() {
		m.console.Log(err.Error())
		return exit.Status.ExitStatus(), nil
	}
	return 0, err
}

// directories shows the disk where programs look for it. The root is read-only; its
// empty /var/lib shows the disk's. The work directory holds what is made anew each
// boot: RAM.
func (m *Machine) directories() error {
	for _, dir := range []string{"/var/lib/docker", "/var/lib/containerd"} {
		if err := os.MkdirAll(filepath.Join(persistent, dir), 0o710); err != nil {
			return fault.Wrap(err, "data_disk", "make %s", dir)
		}
	}
	if err := unix.Mount(filepath.Join(persistent, "/var/lib"), "/var/lib", "", unix.MS_BIND, ""); err != nil {
		return fault.Wrap(err, "data_disk", "bind /var/lib")
	}
	if err := unix.Mount("tmpfs", workDir, "tmpfs", nosuid|nodev, "mode=0755"); err != nil {
		return fault.Wrap(err, "data_disk", "mount the work directory")
	}
	if err := os.WriteFile(filepath.Join(workDir, "app-compose.json"), m.manifest.Raw, 0o644); err != nil {
		return err
	}
	if text, ok := m.files[hostshare.UserConfigName]; ok {
		return os.WriteFile(filepath.Join(workDir, "user_config"), text, 0o644)
	}
	return nil
}

// instanceInfo is .instance_info as the host stores it, upstream's and one word of
// ours: that the disk is in use.
func (m *Machine) instanceInfo() string {
	info := hostshare.InstanceInfo{InstanceIDSeed: m.identity.seed, AppID: &m.identity.appID}
	if len(m.identity.instanceID) > 0 {
		id := dstack.InstanceID(m.identity.instanceID)
		info.InstanceID = &id
	}
	if m.volume != nil {
		info.DataDisk = hostshare.DataDiskReady
	}
	text, err := json.Marshal(info)
	if err != nil {
		return "{}"
	}
	return string(text)
}
