// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"io/fs"
	"time"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lock"
)

// upgradeCmd replaces what an app runs. The app id is that of its first
// deployment, and the data disk stays (guest-os.md §8.4).
type upgradeCmd struct {
	workload
	Name    string        `arg:"" help:"App name or VM id."`
	Compose string        `short:"c" help:"The new docker-compose.yaml; by default the one that it runs." placeholder:"FILE"`
	NoEnv   bool          `name:"no-env" help:"Go on without the variables that the app had."`
	Timeout time.Duration `help:"How long to wait for the app." default:"5m"`
	DryRun  bool          `help:"Show what would be measured and stop."`
}

func (c *upgradeCmd) Run(a *app) error {
	began := time.Now()
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	was, err := previousOf(vm)
	if err != nil {
		return err
	}
	if c.NoEnv {
		if len(c.Env)+len(c.EnvFile) > 0 {
			return usage("--no-env goes with neither -e nor --env-file")
		}
		was.manifest.AllowedEnvs, was.manifest.EnvSigners = nil, nil
	}
	compose := []byte(was.manifest.DockerComposeFile)
	if c.Compose != "" {
		if compose, err = readLimited(c.Compose, 10<<20); err != nil {
			if fault.Code(err) == "file_missing" {
				return fault.New("compose_missing", "%s does not exist", c.Compose).WithFix("give the file with -c")
			}
			return err
		}
	}
	out := deployment{Name: vm.Name, ID: vm.Id, AppID: was.appID, Lock: c.lockFile(c.Compose)}
	// The lock is what the owner later verifies by: that of another app is not
	// overwritten because of a directory.
	switch old, err := lock.Read(out.Lock); {
	case err == nil && old.AppID != was.appID:
		return fault.New("lock_foreign", "%s is the lock of another app, %s (%s)", out.Lock, old.Name, old.AppID).WithFix("name the lock of %s with --lock FILE", vm.Name)
	case err != nil && fault.Code(err) != "lock_missing" && !errors.Is(err, fs.ErrNotExist):
		return err
	}
	p, err := c.plan(a, vm.Name, c.Compose, compose, was)
	if err != nil {
		return err
	}
	defer p.close()
	out.ComposeHash, out.OSImageHash = p.lock.ComposeHash, p.lock.OSImageHash
	if c.DryRun {
		out.DryRun = true
		out.Seconds = time.Since(began).Seconds()
		a.printf("%s\n", p.text)
		return a.result(out)
	}
	sealed, err := p.seal(a)
	if err != nil {
		return err
	}
	if err := p.allow(a); err != nil {
		return err
	}
	if err := p.store(a); err != nil {
		return err
	}
	attest := was.attest
	if attest == 0 {
		if attest, err = freePort(); err != nil {
			return err
		}
	}
	memory := uint32(p.vm.MemorySize >> 20)
	// Refused or taken as a whole, while the app still runs as it is.
	update := &vmmpb.UpdateVmRequest{
		Id: vm.Id, ComposeFile: string(p.text), EncryptedEnv: sealed, UpdatePorts: true, Ports: p.portMappings(attest),
		UpdateKmsUrls: len(c.KMS) > 0, KmsUrls: c.KMS, UpdateGatewayUrls: true, GatewayUrls: p.gatewayURLs(), Vcpu: &p.vm.CPUCount, Memory: &memory,
	}
	if c.Image != "" {
		update.Image = &p.lock.Image
	}
	if err := a.stack.VMM().Call(a.ctx, "UpdateVm", update, &vmmpb.Id{}); err != nil {
		return err
	}
	if vm.Status == "running" || vm.Status == "starting" || vm.Status == "stopping" {
		a.step("stop %s", vm.Name)
		if err := stopVM(a, vm, "ShutdownVm"); err != nil {
			return err
		}
	}
	since := time.Now()
	if err := a.stack.VMM().Call(a.ctx, "StartVm", &vmmpb.Id{Id: vm.Id}, nil); err != nil {
		return err
	}
	if err := watchBoot(a, vm.Id, since, c.Timeout); err != nil {
		explain(a, vm.Id)
		return err
	}
	return p.report(a, out, attest, began)
}

// previousOf reads what an app is from what the VMM says of its VM.
func previousOf(vm *vmmpb.VmInfo) (*previous, error) {
	if vm.Configuration == nil {
		return nil, fault.New("app_broken", "the VMM cannot say what %s is: %s", vm.Name, printable(vm.BootError)).WithFix("`dstack info %s` shows why", vm.Id)
	}
	was := &previous{info: vm}
	var err error
	if was.manifest, err = manifest.Parse([]byte(vm.Configuration.ComposeFile)); err != nil {
		return nil, err
	}
	if was.appID, err = dstack.ParseAppID(vm.AppId); err != nil {
		return nil, err
	}
	for _, p := range vm.Configuration.Ports {
		if p.VmPort == agentPort {
			was.attest = int(p.HostPort)
			continue
		}
		was.ports = append(was.ports, mapping{addr: p.HostAddress, host: int(p.HostPort), vm: int(p.VmPort), proto: p.Protocol})
	}
	return was, nil
}

type resizeCmd struct {
	Name string `arg:"" help:"App name or VM id."`
	Disk uint32 `help:"Size of the data disk in GiB. A disk only grows." required:"" placeholder:"GIB"`
}

func (c *resizeCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	if err := a.stack.VMM().Call(a.ctx, "ResizeVm", &vmmpb.ResizeVmRequest{Id: vm.Id, DiskSize: &c.Disk}, nil); err != nil {
		return err
	}
	now := vm.Status != "running"
	if now {
		a.step("the disk of %s has %d GiB; its file system grows at the next start", vm.Name, c.Disk)
	} else {
		a.step("the disk of %s will have %d GiB from its next start on: dstack stop %s, then dstack start %s", vm.Name, c.Disk, c.Name, c.Name)
	}
	return a.result(map[string]any{"id": vm.Id, "disk_gib": c.Disk, "applied": now})
}
