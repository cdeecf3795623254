// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
)

type measureCmd struct {
	Image  string `arg:"" help:"OS image: a release directory, or the name of one of the stack's images."`
	Tee    string `help:"Kind of TEE: ${enum}." enum:"tdx,sev-snp" default:"tdx"`
	VCPU   uint32 `name:"vcpu" help:"Virtual CPUs." default:"1"`
	Memory string `help:"Memory, such as 2G or 2048M." default:"2G"`

	QEMUVersion   string `name:"qemu-version" help:"Version of the host's QEMU (X.Y.Z), on which the ACPI tables and the page order of MRTD depend." placeholder:"X.Y.Z"`
	TwoPass       *bool  `name:"two-pass-add-pages" help:"Page order of MRTD; by default that of the QEMU version." placeholder:"BOOL"`
	PIC           *bool  `name:"pic" help:"Whether the machine has a PIC; by default that of the QEMU version." placeholder:"BOOL"`
	NICs          uint32 `name:"num-nics" help:"Network interfaces." default:"1"`
	GPUs          uint32 `name:"num-gpus" help:"GPUs passed through."`
	NVSwitches    uint32 `name:"num-nvswitches" help:"NVSwitches passed through."`
	Volumes       uint32 `name:"num-verity-volumes" help:"Verity volumes."`
	Hugepages     bool   `help:"Memory from huge pages."`
	HotplugOff    bool   `name:"hotplug-off" help:"PCI hot plug through ACPI is off."`
	PCIHole64Size uint64 `name:"pci-hole64-size" help:"Size of the 64-bit PCI hole in bytes, where it is set." placeholder:"BYTES"`
	Endpoints     uint32 `name:"num-pci-endpoints" help:"Devices on the root bus, for hosts other than upstream's (6 for dstack-vmm)." placeholder:"N"`
	ShareMode     string `name:"host-share-mode" help:"How the host shares files: 9p, vvfat or vhd." enum:"9p,vvfat,vhd" default:"vhd"`

	Firmware      string `help:"SEV-SNP: OVMF with SEV metadata, where the image has none." placeholder:"FILE"`
	VCPUType      string `name:"vcpu-type" help:"SEV-SNP: QEMU's CPU model." default:"EPYC-v4"`
	GuestFeatures uint64 `name:"guest-features" help:"SEV-SNP: SEV_FEATURES of the guest." default:"1"`
}

// measuredTDX is what `dstack measure --json` prints of TDX. RTMR0 is absent where
// the ACPI tables of the shape cannot be computed; rtmr0_events then has all else.
type measuredTDX struct {
	TEE         dstack.TEE           `json:"tee"`
	OSImageHash dstack.ImageHash     `json:"os_image_hash"`
	MRTD        dstack.Measurement   `json:"mrtd"`
	RTMR0       *dstack.Measurement  `json:"rtmr0,omitempty"`
	RTMR1       dstack.Measurement   `json:"rtmr1"`
	RTMR2       dstack.Measurement   `json:"rtmr2"`
	RTMR0Events []measure.RTMR0Event `json:"rtmr0_events"`
	Open        string               `json:"open,omitempty"` // why RTMR0 is absent
}

func (c *measureCmd) Run(a *app) error {
	memory, err := parseSize("--memory", c.Memory)
	if err != nil {
		return err
	}
	dir := c.Image
	if _, err := os.Stat(dir); err != nil && !strings.ContainsRune(dir, filepath.Separator) {
		dir = filepath.Join(a.stack.ImagesDir(), dir)
	}
	img, err := osimage.Load(dir)
	if err != nil {
		return err
	}
	if c.Tee == string(dstack.SEVSNP) {
		return c.snp(a, img)
	}
	vm := measure.VMConfig{
		OSImageHash: img.Hash.String(), CPUCount: c.VCPU, MemorySize: memory, QEMUVersion: c.QEMUVersion,
		TwoPassAddPages: c.TwoPass, PIC: c.PIC, NumNICs: c.NICs, NumGPUs: c.GPUs, NumNVSwitches: c.NVSwitches,
		NumVerity: c.Volumes, Hugepages: c.Hugepages, HotplugOff: c.HotplugOff, PCIHole64Size: c.PCIHole64Size, Endpoints: c.Endpoints, HostShareMode: c.ShareMode,
	}
	m, err := measureImage(img, vm)
	if err != nil {
		return err
	}
	out := measuredTDX{TEE: dstack.TDX, OSImageHash: img.Hash, MRTD: m.MRTD, RTMR1: m.RTMR1, RTMR2: m.RTMR2, RTMR0Events: m.RTMR0}
	if _, err := vm.Shape(); err != nil {
		out.Open = err.Error()
	} else if m.NoACPI != nil {
		out.Open = m.NoACPI.Error()
	} else {
		rtmr0, err := m.ReplayRTMR0(nil)
		if err != nil {
			return err
		}
		out.RTMR0 = &rtmr0
	}
	a.printf("os_image_hash %s\nmrtd  %s\n", img.Hash, m.MRTD)
	if out.RTMR0 != nil {
		a.printf("rtmr0 %s\n", out.RTMR0)
	} else {
		a.printf("rtmr0 (not computed: %s)\n", out.Open)
	}
	a.printf("rtmr1 %s\nrtmr2 %s\n", m.RTMR1, m.RTMR2)
	return a.result(out)
}

func (c *measureCmd) snp(a *app, img *osimage.Image) error {
	if c.Firmware == "" {
		return fault.New("image_not_snp", "the image %s has no firmware for SEV-SNP", img.Name).WithFix("give one with --firmware FILE")
	}
	l := measure.SNPLaunch{Cmdline: img.Metadata.Cmdline, SNPShape: measure.SNPShape{VCPUs: int(min(c.VCPU, math.MaxInt32)), VCPUType: c.VCPUType, GuestFeatures: c.GuestFeatures}}
	for _, f := range []struct {
		path string
		into *[]byte
	}{{c.Firmware, &l.Firmware}, {img.Kernel(), &l.Kernel}, {img.Initrd(), &l.Initrd}} {
		data, err := readLimited(f.path, 1<<30)
		if err != nil {
			return err
		}
		*f.into = data
	}
	m, err := measure.ComputeSNP(l)
	if err != nil {
		return err
	}
	a.printf("os_image_hash %s\nmeasurement %s\n", img.Hash, m)
	return a.result(map[string]any{"tee": dstack.SEVSNP, "os_image_hash": img.Hash, "measurement": m})
}

// parseSize reads a size in bytes with K, M, G or T for powers of 1024.
func parseSize(flag, text string) (uint64, error) {
	digits, shift := text, 0
	if n := len(text); n > 1 {
		if i := strings.IndexByte("KMGT", strings.ToUpper(text)[n-1]); i >= 0 {
			digits, shift = text[:n-1], 10*(i+1)
		}
	}
	v, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || v == 0 || v > 1<<(46-shift) {
		return 0, usage("%s must be a size up to 64T such as 2G or 2048M, not %q", flag, text)
	}
	return v << shift, nil
}
