// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"os"
	"slices"
	"time"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/stack"
)

type upCmd struct {
	Image        string   `help:"Use this release directory instead of building the image." type:"existingdir" placeholder:"DIR"`
	Source       string   `help:"Source tree to build the image from; the one around the working directory by default." type:"existingdir" placeholder:"DIR"`
	Confidential bool     `name:"confidential-services" help:"Run the stack's KMSs in CVMs, too, as apps of their own, instead of one as a process of this machine."`
	Replicas     int      `name:"kms-replicas" help:"With --confidential-services: how many KMSs." default:"2"`
	NoKMS        bool     `name:"no-kms" help:"Start no KMS: the data and keys of apps then end with each boot."`
	NoGateway    bool     `name:"no-gateway" help:"Start no gateway: apps then have ports of this machine only."`
	Governance   string   `help:"What the stack's KMSs decide by: ${enum}. chain is a development chain with the governance contracts." enum:"policy,chain" default:"policy"`
	GuestReaches []string `name:"guest-reaches" sep:"none" help:"What guests reach of this machine (its loopback is 127.0.0.1) and its networks beside the stack's services, such as 127.0.0.1:8000/tcp or 10.1.0.0/16; again for each. The stack keeps it." placeholder:"ADDR:PORT/PROTO"`
	Tee          string   `help:"TEE of the VMs: ${enum}. sim is development trust." enum:"sim,tdx" default:"sim"`
}

func (c *upCmd) Run(a *app) error {
	began := time.Now()
	dir := c.Image
	if dir == "" {
		flavour := "sim"
		if c.Tee != "sim" {
			flavour = "prod"
		}
		var err error
		if dir, err = buildImage(a, flavour, c.Source); err != nil {
			return err
		}
	}
	if c.Replicas < 1 || c.Replicas > 9 {
		return usage("--kms-replicas is from 1 to 9")
	}
	if c.Confidential && c.NoKMS {
		return usage("--confidential-services and --no-kms exclude each other")
	}
	opt := stack.UpOptions{ImageDir: dir, TEE: c.Tee, NoKMS: c.NoKMS, Chain: c.Governance == "chain", GuestReaches: c.GuestReaches, Step: a.step}
	if opt.Chain && c.Confidential {
		return usage("--governance chain and --confidential-services exclude each other: a CVM does not reach a chain of this machine")
	}
	if c.Confidential {
		if k, err := a.stack.Keys(); err == nil && slices.ContainsFunc(k.Nodes, func(n stack.KMSNode) bool { return n.VM == "" }) {
			return fault.New("kms_local", "this stack has a KMS that is a process of this machine, whose root keys no CVM may take").
				WithFix("`dstack down` first, or another stack with --state")
		}
		for i := range c.Replicas {
			opt.ConfidentialKMS = append(opt.ConfidentialKMS, kmsName(i))
		}
	} else if k, err := a.stack.Keys(); err == nil {
		for _, n := range k.Nodes { // as it was
			if n.VM != "" {
				opt.ConfidentialKMS = append(opt.ConfidentialKMS, n.Name)
			}
		}
	}
	if err := a.stack.Up(a.ctx, opt); err != nil {
		return err
	}
	if c.Confidential {
		if err := confidentialKMS(a, c.Replicas); err != nil {
			return err
		}
	}
	if !c.NoGateway && c.Tee == "sim" {
		if _, err := a.stack.StartGateway(a.ctx, a.step); err != nil {
			return err
		}
	}
	a.step("the stack is up after %s", seconds(time.Since(began)))
	a.printf("State       %s\n", a.stack.Dir)
	if c.Tee == "sim" {
		a.printf("Trust       %s\n", a.paint(amber, "development: the TEE is simulated and proves nothing about hardware"))
		a.printf("Dev roots   %s\n", a.stack.DevRoots())
	}
	if k, err := a.stack.Keys(); err == nil {
		for _, n := range k.Nodes {
			where := "a CVM, " + n.VM
			if n.VM == "" {
				where = a.paint(amber, "a process of this machine: development trust")
			}
			a.printf("KMS         %s (%s)\n", n.URL, where)
		}
	}
	if g, err := a.stack.Gateway(); err == nil {
		a.printf("Gateway     https://<app>.%s:%d (%s)\n", g.Domain, g.Port, a.paint(amber, "a process of this machine: development trust"))
		a.printf("Its CA      %s\n", g.CA)
	}
	if d, err := a.stack.Chain(); err == nil && a.stack.GovernedByChain() {
		a.printf("Chain       %s, id %d (%s)\nRegistry    %s\n", d.RPC, d.ChainID, a.paint(amber, "development"), d.Registry.Hex())
	}
	a.printf("Next        dstack deploy -c docker-compose.yaml\n")
	return a.result(map[string]any{"state": a.stack.Dir, "tee": c.Tee, "dev_roots": a.stack.DevRoots(), "socket": a.stack.Socket()})
}

type downCmd struct {
	Keep bool `help:"Stop everything but keep the state: images, blobs, test PKI, VM disks."`
}

func (c *downCmd) Run(a *app) error {
	if _, err := os.Stat(a.stack.Dir); errors.Is(err, os.ErrNotExist) {
		a.step("there is no stack at %s", a.stack.Dir)
		return a.result(map[string]any{"removed": false})
	}
	if !a.stack.Responding(a.ctx) {
		// VMs outlive their VMM: bring it back to stop them.
		if _, err := os.Stat(a.stack.ConfigFile()); err == nil {
			if err := a.stack.Restart(a.ctx); err != nil {
				return fault.Wrap(err, "vmm_start", "the VMM is needed to stop its VMs").WithFix("end the QEMU processes named in %s by hand", a.stack.Dir)
			}
		}
	}
	if a.stack.Responding(a.ctx) {
		vms, err := listVMs(a)
		if err != nil {
			return err
		}
		for _, vm := range vms {
			if c.Keep {
				if vm.Status != "running" {
					continue
				}
				a.step("stop %s", vm.Name)
				if err := a.stack.VMM().Call(a.ctx, "StopVm", &vmmpb.Id{Id: vm.Id}, nil); err != nil {
					return err
				}
				continue
			}
			a.step("remove %s", vm.Name)
			if err := removeVM(a, vm); err != nil {
				return err
			}
		}
	}
	a.step("stop the gateway")
	if err := a.stack.StopGateway(20 * time.Second); err != nil {
		return err
	}
	a.step("stop the KMS")
	if err := a.stack.StopKMS(20 * time.Second); err != nil {
		return err
	}
	if err := a.stack.StopChain(20 * time.Second); err != nil {
		return err
	}
	a.step("stop the VMM")
	if err := a.stack.StopVMM(20 * time.Second); err != nil {
		return err
	}
	if !c.Keep {
		a.step("remove %s", a.stack.Dir)
		if err := a.stack.RemoveState(); err != nil {
			return err
		}
	}
	return a.result(map[string]any{"removed": !c.Keep})
}

type statusCmd struct{}

func (c *statusCmd) Run(a *app) error {
	up := a.stack.Responding(a.ctx)
	out := map[string]any{"state": a.stack.Dir, "up": up}
	if !up {
		a.printf("The stack at %s is down.\n", a.stack.Dir)
		return a.result(out)
	}
	vms, err := listVMs(a)
	if err != nil {
		return err
	}
	running := 0
	for _, vm := range vms {
		if vm.Status == "running" {
			running++
		}
	}
	var version vmmpb.VersionResponse
	if err := a.stack.VMM().Call(a.ctx, "Version", nil, &version); err != nil {
		return err
	}
	out["apps"], out["running"], out["vmm_version"] = len(vms), running, version.Version
	a.printf("State   %s\nVMM     up, version %s\nApps    %d, %d running\n", a.stack.Dir, version.Version, len(vms), running)
	if k, err := a.stack.Keys(); err == nil {
		a.printf("KMS     %d; `dstack kms status` asks them\n", len(k.Nodes))
		out["kms"] = k.Nodes
	}
	if g, err := a.stack.Gateway(); err == nil {
		a.printf("Gateway https://<app>.%s:%d\n", g.Domain, g.Port)
		out["gateway"] = g
	}
	return a.result(out)
}
