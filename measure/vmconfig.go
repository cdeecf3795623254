// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

const maxVMConfig = 1 << 20

// VMConfig is the vm_config that a host gives to a guest and a guest to its
// verifier: the shape of the VM as far as measurements depend on it, and the
// measurement documents of its image. It is a claim of the host
// (spec/measurement.md §2, spec/vmm.md §6.3).
type VMConfig struct {
	SpecVersion int    `json:"spec_version,omitempty"`
	OSImageHash string `json:"os_image_hash"` // 64 hexadecimal digits, or empty
	CPUCount    uint32 `json:"cpu_count"`
	MemorySize  uint64 `json:"memory_size"` // bytes

	// TwoPassAddPages keeps upstream's name on the wire, where "single pass" true
	// means the two-pass order of MRTD. Nil: as QEMUVersion has it.
	TwoPassAddPages *bool  `json:"qemu_single_pass_add_pages,omitempty"`
	PIC             *bool  `json:"pic,omitempty"`
	QEMUVersion     string `json:"qemu_version,omitempty"` // X.Y.Z

	PCIHole64Size  uint64 `json:"pci_hole64_size"`
	Hugepages      bool   `json:"hugepages"`
	NumGPUs        uint32 `json:"num_gpus"`
	NumNVSwitches  uint32 `json:"num_nvswitches"`
	NumNICs        uint32 `json:"-"` // "num_nics", absent means 1
	NumVerity      uint32 `json:"num_verity_volumes,omitempty"`
	SWTPM          bool   `json:"swtpm,omitempty"`
	HotplugOff     bool   `json:"hotplug_off"`
	Image          string `json:"image,omitempty"`
	HostShareMode  string `json:"host_share_mode"`
	OVMFVariant    string `json:"ovmf_variant,omitempty"`
	TDXVariant     string `json:"tdx_attestation_variant,omitempty"` // "" or "legacy", or "lite"
	TDXMeasurement *Split `json:"tdx_measurement,omitempty"`
	GCPMeasurement *Split `json:"gcp_measurement,omitempty"`
	AWSMeasurement *Split `json:"aws_measurement,omitempty"`
	// SNPMeasurement is the JSON text of an SNPSplit.
	SNPMeasurement string `json:"sev_snp_measurement,omitempty"`
	// Two keys that only our VMM writes, see [VMConfig.Shape]. Zero: upstream's.
	Endpoints  uint32 `json:"num_pci_endpoints,omitempty"`
	ConfigBase uint64 `json:"pci_config_base,omitempty"`
	// MRConfig is the text of the config document that MRCONFIGID or HOST_DATA
	// commits to.
	MRConfig string `json:"mr_config,omitempty"`
}

type vmConfigFields VMConfig

type vmConfigJSON struct {
	vmConfigFields
	NICs *uint32 `json:"num_nics,omitempty"`
}

// MarshalJSON omits what upstream omits.
func (c VMConfig) MarshalJSON() ([]byte, error) {
	w := vmConfigJSON{vmConfigFields: vmConfigFields(c)}
	if c.NumNICs != 1 {
		w.NICs = &c.NumNICs
	}
	return json.Marshal(w)
}

// UnmarshalJSON ignores unknown keys, since hosts add their own.
func (c *VMConfig) UnmarshalJSON(data []byte) error {
	var w vmConfigJSON
	if err := json.Unmarshal(data, &w); err != nil {
		return err
	}
	*c = VMConfig(w.vmConfigFields)
	c.NumNICs = 1
	if w.NICs != nil {
		c.NumNICs = *w.NICs
	}
	return nil
}

// ParseVMConfig reads a vm_config of at most 1 MiB. The code of every error is
// vm_config_malformed.
func ParseVMConfig(data []byte) (*VMConfig, error) {
	// "null" would decode into nothing.
	if trimmed := bytes.TrimLeft(data, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' {
		return nil, fault.New("vm_config_malformed", "vm_config is not a JSON object")
	}
	var c VMConfig
	if err := strictjson.Decode(data, &c, strictjson.Limits{Size: maxVMConfig, Depth: 8, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "vm_config_malformed", "vm_config")
	}
	if _, err := c.TwoPass(); err != nil {
		return nil, err
	}
	return &c, nil
}

// Lite reports whether the host chose the path in which ACPI digests come from
// the event log.
func (c *VMConfig) Lite() bool { return c.TDXVariant == "lite" }

// TwoPass returns the page order of MRTD: as stated, or that of the QEMU version
// (8: two passes; 9 and later, and none given: one pass).
func (c *VMConfig) TwoPass() (bool, error) {
	if c.QEMUVersion == "" {
		return c.TwoPassAddPages != nil && *c.TwoPassAddPages, nil
	}
	major, err := c.qemuMajor()
	if err != nil {
		return false, err
	}
	if c.TwoPassAddPages != nil {
		return *c.TwoPassAddPages, nil
	}
	return major == 8, nil
}

// qemuMajor is the first number of a stated QEMU version.
func (c *VMConfig) qemuMajor() (int, error) {
	parts := strings.Split(c.QEMUVersion, ".")
	major, bad := 0, len(parts) != 3
	for i, part := range parts {
		n, err := strconv.ParseUint(part, 10, 16)
		bad = bad || err != nil
		if i == 0 {
			major = int(n)
		}
	}
	if bad || major < 8 {
		return 0, fault.New("vm_config_malformed", "vm_config: qemu_version %.32q, want X.Y.Z from 8.0.0", c.QEMUVersion)
	}
	return major, nil
}
