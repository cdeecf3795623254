// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/vmm/qemu"
	"github.com/dstack-go/dstack/vmm/qmp"
)

// launchSpec is tee/launch.json, what the simulated TEE measures: the very files
// and values that QEMU is given.
type launchSpec struct {
	Firmware    string            `json:"firmware"`
	Kernel      string            `json:"kernel"`
	Initrd      string            `json:"initrd"`
	Cmdline     string            `json:"cmdline"`
	VCPUs       uint32            `json:"vcpus"`
	MemoryBytes uint64            `json:"memory_bytes"`
	MRConfigID  dstack.MRConfigID `json:"mr_config_id"`
	VMConfig    string            `json:"vm_config,omitempty"`
	Debug       bool              `json:"debug"`
}

// maxGuestDNS name servers are handed to a guest.
func (c *Config) network() (*hostshare.Network, error) {
	n := c.CVM.Networking
	var out hostshare.Network
	var err error
	if out.Address, err = netip.ParsePrefix(n.Address); err != nil {
		return nil, fmt.Errorf("address: %w", err)
	}
	if n.Gateway != "" {
		if out.Gateway, err = netip.ParseAddr(n.Gateway); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	}
	for _, text := range n.DNS {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("dns: %w", err)
		}
		out.DNS = append(out.DNS, a)
	}
	return &out, nil
}

// prepare makes everything that a run needs but processes: files for the guest,
// the configuration document, and a TEE state as of a machine just switched on.
func (v *vm) prepare(ctx context.Context) error {
	c := &v.server.config
	if err := checkSpace(c.StateDir, uint64(c.CVM.MinFreeDisk)); err != nil {
		return err
	}
	v.filesMu.Lock()
	defer v.filesMu.Unlock()
	if err := v.apply(); err != nil {
		return diskFull(err, "update VM "+v.spec().ID)
	}
	bin, accel, err := v.server.host(ctx)
	if err != nil {
		return err
	}
	if v.spec().TEE == TEETDX && (accel.Accel != qemu.KVM || !bin.TDX) {
		return fault.New("tee_unavailable", "Intel TDX needs working KVM and a QEMU with TDX support (10.1)").
			WithFix("run on a TDX host, or set cvm.tee to sim for development")
	}
	img, err := v.server.loadImage(v.spec().Image)
	if err != nil {
		return err
	}
	if img.Hash != v.spec().ImageHash {
		return fault.New("image_altered", "image %s is now %s; the VM was created for %s", v.spec().Image, img.Hash, v.spec().ImageHash).
			WithFix("put the old image back, or create the VM again")
	}
	files, err := loadShared(v.shared())
	if err != nil {
		return err
	}
	info, err := v.instance(files[hostshare.InstanceInfoName])
	if err != nil {
		return err
	}
	if files[hostshare.InstanceInfoName], err = info.Encode(); err != nil {
		return err
	}
	doc := configDocument(v.manifest(), v.spec().AppID, info.InstanceID)
	sys, err := v.sysConfig(img, bin.Version, doc)
	if err != nil {
		return err
	}
	if files[hostshare.SysConfigName], err = sys.Encode(); err != nil {
		return err
	}
	blob, err := hostshare.Write(files)
	if err != nil {
		return err
	}
	for _, name := range []string{hostshare.InstanceInfoName, hostshare.SysConfigName} {
		if err := durable.WriteFile(filepath.Join(v.shared(), name), files[name], 0o600); err != nil {
			return diskFull(err, "prepare VM "+v.spec().ID)
		}
	}
	if err := durable.WriteFile(filepath.Join(v.dir, qemu.SharedDisk), blob, 0o600); err != nil {
		return diskFull(err, "prepare VM "+v.spec().ID)
	}
	if v.spec().TEE == TEESim {
		return diskFull(v.resetTEE(ctx, img, bin.Version, doc), "prepare VM "+v.spec().ID)
	}
	return nil
}

// configDocument is the launch commitment, always in its third form.
func configDocument(m *manifest.Manifest, app dstack.AppID, instance *dstack.InstanceID) []byte {
	d := mrconfig.Document{AppID: &app, ComposeHash: m.Hash(), InstanceID: instance, KeyProvider: m.KeyProviderKind()}
	if len(m.KeyProviderID) > 0 {
		d.KeyProviderID = m.KeyProviderID
	}
	if m.Version >= 3 {
		d.InitScriptHashes = m.InitScriptHashes()
	}
	return d.Bytes()
}

func (v *vm) sysConfig(img *osimage.Image, version qemu.Version, doc []byte) (*hostshare.SysConfig, error) {
	c := &v.server.config.CVM
	vc, err := vmConfig(v.spec(), img, version, uint64(c.PCIHole64), acpiDemand(v.manifest()))
	if err != nil {
		return nil, err
	}
	text, err := vc.MarshalJSON()
	if err != nil {
		return nil, err
	}
	sys := &hostshare.SysConfig{
		KMSURLs: v.spec().KMSURLs, GatewayURLs: v.spec().GatewayURLs, PCCSURL: c.PCCSURL,
		NvidiaAttestationProxyURL: c.NvidiaAttestationProxyURL, DockerRegistry: c.DockerRegistry,
		HostAPIURL: "hostlink://hostapi/api", VMConfig: string(text),
	}
	if len(sys.KMSURLs) == 0 {
		sys.KMSURLs = c.KMSURLs
	}
	if len(sys.GatewayURLs) == 0 {
		sys.GatewayURLs = c.GatewayURLs
	}
	if c.PCCSURL != "" {
		sys.CollateralURLs = &hostshare.CollateralURLs{PCCS: c.PCCSURL}
	}
	if v.spec().TEE != TEENone {
		sys.MRConfig = string(doc)
	}
	sys.Network, err = v.server.config.network()
	return sys, err
}

// vmConfig states the shape of the VM as far as measurements depend on it. ACPI
// digests are taken from the event log ("lite") wherever the image has the
// measurement document for it, unless the manifest demands that they be computed
// (acpi, requirements.tdx_measure_acpi_tables; nil: no demand).
func vmConfig(s *Spec, img *osimage.Image, version qemu.Version, hole uint64, acpi *bool) (*measure.VMConfig, error) {
	out := &measure.VMConfig{
		SpecVersion: 1, OSImageHash: img.Hash.String(), CPUCount: s.VCPU, MemorySize: uint64(s.MemoryMB) << 20,
		QEMUVersion: version.String(), PCIHole64Size: hole, NumNICs: 1, Endpoints: qemu.RootBusDevices + uint32(len(s.Volumes)), Image: s.Image, HostShareMode: "vhd",
		SWTPM: s.TPM, NumVerity: uint32(len(s.Volumes)),
	}
	doc, err := readFile(img.TDXMeasurement(), 1<<20)
	switch {
	case err == nil && s.TEE != TEENone:
		if acpi == nil || !*acpi {
			out.TDXVariant = "lite"
		}
		out.TDXMeasurement = &measure.Split{ChecksumFile: img.Sums, Measurement: doc}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	return out, nil
}

// acpiDemand is what the manifest demands of the ACPI tables' measurement.
func acpiDemand(m *manifest.Manifest) *bool {
	if m.Requirements == nil {
		return nil
	}
	return m.Requirements.TDXMeasureACPITables
}

// resetTEE makes the simulated TEE's state that of a machine just switched on.
func (v *vm) resetTEE(ctx context.Context, img *osimage.Image, version qemu.Version, doc []byte) error {
	if err := v.ensurePKI(ctx); err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Join(v.dir, teeDir), 0o700); err != nil {
		return err
	}
	if err := durable.RemoveAll(filepath.Join(v.dir, teeState)); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(v.dir, teeState), 0o700); err != nil {
		return err
	}
	vc, err := vmConfig(v.spec(), img, version, uint64(v.server.config.CVM.PCIHole64), acpiDemand(v.manifest()))
	if err != nil {
		return err
	}
	vc.TDXMeasurement = nil // does not bear on the shape
	shape, err := vc.MarshalJSON()
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(v.dir, teeLaunch), launchSpec{
		Firmware: img.Firmware(), Kernel: img.Kernel(), Initrd: img.Initrd(), Cmdline: img.Metadata.Cmdline,
		VCPUs: v.spec().VCPU, MemoryBytes: uint64(v.spec().MemoryMB) << 20, MRConfigID: mrconfig.IDv3(doc), VMConfig: string(shape),
	})
}

// helper returns the simulated TEE's program.
func (v *vm) helper() (string, error) {
	path, err := exec.LookPath(v.server.config.CVM.TEEHelper)
	if err != nil {
		return "", fault.Wrap(err, "tee_helper_missing", "the simulated TEE's program was not found").
			WithFix("build cmd/dstack-simtee and set cvm.tee_helper to its path")
	}
	return filepath.Abs(path)
}

// ensurePKI makes the installation's own development root at the first use.
func (v *vm) ensurePKI(ctx context.Context) error {
	v.server.pkiMu.Lock()
	defer v.server.pkiMu.Unlock()
	pki := v.server.config.CVM.TEEPKI
	if _, err := os.Stat(filepath.Join(pki, "dev-roots.json")); err == nil {
		return nil
	}
	path, err := v.helper()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "pki", "--out", pki)
	cmd.Env = append(os.Environ(), v.server.childEnv...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fault.Wrap(err, "tee_failed", "make the development roots: %s", cut(strings.TrimSpace(string(out)), 1000))
	}
	return nil
}

// command prepares a child with a plain environment and its output in a log.
func (v *vm) command(path, logName string, args ...string) (*exec.Cmd, *os.File, error) {
	logFile, err := os.OpenFile(filepath.Join(v.dir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, diskFull(err, "open "+logName)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = v.dir
	cmd.Stdout, cmd.Stderr = logFile, logFile
	for _, key := range []string{"PATH", "LD_LIBRARY_PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(key); ok {
			cmd.Env = append(cmd.Env, key+"="+value)
		}
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C.UTF-8")
	cmd.Env = append(cmd.Env, v.server.childEnv...)
	return cmd, logFile, nil
}

const (
	teeReadyIn  = 15 * time.Second
	qemuReadyIn = 30 * time.Second
)

// ensureTEE makes it so that the simulated TEE runs, on the state it has.
func (v *vm) ensureTEE(ctx context.Context, run uint64) error {
	slot := teeSlot(v.dir)
	holder, err := slot.Holder()
	if err != nil {
		return err
	}
	if holder == nil {
		path, err := v.helper()
		if err != nil {
			return err
		}
		os.Remove(filepath.Join(v.dir, teeSock))
		cmd, logFile, err := v.command(path, teeLog, "run", "--launch", teeLaunch, "--pki", v.server.config.CVM.TEEPKI, "--state", teeState, "--socket", teeSock)
		if err != nil {
			return err
		}
		child, err := slot.Start(cmd, run)
		logFile.Close()
		if err != nil {
			return diskFull(err, "start the simulated TEE")
		}
		v.mu.Lock()
		v.children[child.ID] = child
		v.mu.Unlock()
		holder = &child.ID
	}
	id := *holder
	if err := v.await(ctx, id, teeReadyIn, func() bool {
		conn, err := net.Dial("unix", filepath.Join(v.dir, teeSock))
		if err == nil {
			conn.Close()
		}
		return err == nil
	}); err != nil {
		tail, _ := tailBytes(filepath.Join(v.dir, teeLog), 1000)
		return fault.New("tee_failed", "the simulated TEE did not start (%v): %s", err, cut(strings.TrimSpace(string(tail)), 1000))
	}
	v.watchTEE(id, run)
	return nil
}

// await polls ready until it is true, the process ends or time is up.
func (v *vm) await(ctx context.Context, id process.ID, limit time.Duration, ready func() bool) error {
	deadline := time.Now().Add(limit)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if ready() {
			return nil
		}
		if !id.Running() {
			return errors.New("it ended")
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not ready after %v", limit)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// ensureQEMU makes it so that QEMU runs, unless it did in this run before and
// ended: then lost is true, since the TEE's registers are no longer new.
func (v *vm) ensureQEMU(ctx context.Context, run uint64) (lost bool, err error) {
	slot := qemuSlot(v.dir)
	holder, err := slot.Holder()
	if err != nil {
		return false, err
	}
	rec, err := slot.Read()
	if err != nil {
		return false, err
	}
	if holder == nil {
		if rec.Run == run {
			return true, nil
		}
		if err := tryPorts(ctx, v.spec().PortMap); err != nil {
			return false, err
		}
		bin, args, err := v.qemuArgs(ctx)
		if err != nil {
			return false, err
		}
		for _, sock := range []string{qemu.QMPSock, qemu.HostlinkSock} {
			os.Remove(filepath.Join(v.dir, sock))
		}
		if v.spec().TPM {
			if err := v.ensureTPM(ctx, run); err != nil {
				return false, err
			}
		}
		v.mark(run)
		cmd, logFile, err := v.command(bin, stderrLog, args...)
		if err != nil {
			return false, err
		}
		child, err := v.startQEMU(slot, cmd, run)
		logFile.Close()
		if err != nil {
			return false, diskFull(err, "start QEMU")
		}
		v.mu.Lock()
		v.children[child.ID] = child
		v.mu.Unlock()
		holder = &child.ID
	}
	// QEMU opens its monitor's socket before it looks at disks and ports; that it
	// answers is what counts.
	err = v.await(ctx, *holder, qemuReadyIn, func() bool {
		dialCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		c, err := qmp.Dial(dialCtx, filepath.Join(v.dir, qemu.QMPSock))
		if err != nil {
			return false
		}
		defer c.Close()
		return c.Execute(dialCtx, "query-status", nil, nil) == nil
	})
	if err != nil {
		return false, v.qemuFault(err)
	}
	return false, nil
}

// mark separates the boots in the serial log.
func (v *vm) mark(run uint64) {
	f, err := os.OpenFile(filepath.Join(v.dir, qemu.SerialLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "\n===== boot @ %s (run %d) =====\n\n", time.Now().UTC().Format(time.RFC3339), run)
}

// qemuFault says why QEMU did not start, by what it printed.
func (v *vm) qemuFault(err error) error {
	tail, _ := tailBytes(filepath.Join(v.dir, stderrLog), 1000)
	text := cut(strings.TrimSpace(string(tail)), 1000)
	switch {
	case strings.Contains(text, "Could not set up host forwarding rule"):
		return fault.New("port_busy", "QEMU could not take a host port: %s", text).WithFix("start the VM again, or choose other host ports")
	case strings.Contains(text, "No space left on device"):
		return fault.New("disk_full", "QEMU: %s", text).WithFix(fixSpace)
	case strings.Contains(text, "cannot set up guest memory") || strings.Contains(text, "Cannot allocate memory"):
		return fault.New("memory_short", "QEMU: %s", text).WithFix("give the VM less memory, or stop another")
	}
	return fault.New("qemu_failed", "QEMU did not start (%v): %s", err, text)
}

func (v *vm) qemuArgs(ctx context.Context) (path string, args []string, err error) {
	bin, accel, err := v.server.host(ctx)
	if err != nil {
		return "", nil, err
	}
	img, err := v.server.loadImage(v.spec().Image)
	if err != nil {
		return "", nil, err
	}
	c := &v.server.config.CVM
	spec := qemu.Spec{
		ID: v.spec().ID, Machine: v.spec().Machine, Accel: accel.Accel, VCPUs: int(v.spec().VCPU), MemoryMB: v.spec().MemoryMB,
		Firmware: img.Firmware(), Kernel: img.Kernel(), Initrd: img.Initrd(), Rootfs: img.Rootfs(), Cmdline: img.Metadata.Cmdline,
		HostlinkPort: hostlinkPort, PCIHole64: uint64(c.PCIHole64),
		Network: qemu.Network{MAC: macOf(v.spec().ID), Ifname: c.Networking.Ifname, Forwards: forwards(v.spec().PortMap)},
	}
	spec.TPM = v.spec().TPM
	for _, name := range v.spec().Volumes {
		path, err := v.server.volume(name)
		if err != nil {
			return "", nil, err
		}
		spec.Volumes = append(spec.Volumes, path)
	}
	if v.spec().TEE == TEETDX {
		sys, err := readFile(filepath.Join(v.shared(), hostshare.SysConfigName), 32<<10)
		if err != nil {
			return "", nil, err
		}
		parsed, err := hostshare.ParseSysConfig(sys)
		if err != nil {
			return "", nil, err
		}
		spec.TDX = &qemu.TDX{MRConfigID: mrconfig.IDv3([]byte(parsed.MRConfig)), QGSPort: c.QGSPort}
	}
	build := bin.Args
	if v.server.args != nil {
		build = v.server.args
	}
	args, err = build(spec)
	return bin.Path, args, err
}

// newID returns a random UUID, version 4.
func newID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
