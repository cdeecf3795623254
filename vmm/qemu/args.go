// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// sandbox is QEMU's seccomp filter: no old system calls, no set-uid, no new
// processes, no change of scheduling.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// Names inside the VM directory, which is QEMU's working directory: arguments
// name them relative to it.
const (
	DataDisk     = "data.img"
	SharedDisk   = "shared.tar"
	SerialLog    = "serial.log"
	HostlinkSock = "hostlink.sock"
	QMPSock      = "qmp.sock"
	TPMSock      = "tpm/tpm.sock"
)

// Serial numbers by which the guest finds its disks.
const (
	SerialRoot   = "dstack-root"
	SerialData   = "dstack-data"
	SerialShared = "dstack-shared"
)

// Forward is one forwarded port of the user network.
type Forward struct {
	Protocol string // tcp or udp
	Address  netip.Addr
	Host, VM uint16
}

// Network is the one network card.
type Network struct {
	MAC string
	// Ifname is an existing tap device; empty: the user network with Forwards.
	Ifname   string
	Forwards []Forward
}

// TDX asks for an Intel TDX guest.
type TDX struct {
	MRConfigID dstack.MRConfigID
	QGSPort    uint32 // vsock port of the quote generation service on the host; 0: none
}

// Spec is one VM.
type Spec struct {
	ID       string // VM id
	Machine  string // versioned machine type
	Accel    Accel
	VCPUs    int
	MemoryMB uint32
	// Absolute paths of the image's files.
	Firmware, Kernel, Initrd, Rootfs string
	Cmdline                          string
	Volumes                          []string // absolute paths of read-only disks
	HostlinkPort                     string   // name of the virtio-serial port
	Network                          Network
	TDX                              *TDX // nil: no hardware TEE
	TPM                              bool // a software TPM listens at TPMSock
	PCIHole64                        uint64
}

var (
	plainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
	macForm   = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
	ifForm    = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,15}$`)
)

// RootBusDevices is how many devices Args puts on the PCI root bus beside volumes.
// ACPI tables, and so RTMR0, depend on the number; vm_config states it.
const RootBusDevices = 6

// Args returns QEMU's arguments. The order of devices is fixed, since it decides
// their PCI addresses and with them the measured ACPI tables: root, data, shared
// disk, network card, hostlink, random numbers, volumes.
//
// Codes: qemu_argument (a value that would be parsed as something else),
// tee_unavailable.
func (b *Binary) Args(s Spec) ([]string, error) {
	for _, v := range []struct {
		what, value string
		form        *regexp.Regexp
	}{
		{"VM id", s.ID, plainName},
		{"machine type", s.Machine, plainName},
		{"accelerator", string(s.Accel), plainName},
		{"hostlink port", s.HostlinkPort, plainName},
		{"MAC address", s.Network.MAC, macForm},
	} {
		if !v.form.MatchString(v.value) {
			return nil, fault.New("qemu_argument", "%s %.80q cannot be passed to QEMU", v.what, v.value)
		}
	}
	for _, v := range []struct{ what, value string }{
		{"firmware", s.Firmware}, {"kernel", s.Kernel}, {"initrd", s.Initrd}, {"root disk", s.Rootfs},
	} {
		if !strings.HasPrefix(v.value, "/") || strings.ContainsFunc(v.value, control) {
			return nil, fault.New("qemu_argument", "path of the %s, %.200q, is not absolute or has control characters", v.what, v.value).
				WithFix("move the state directory to a path without such characters")
		}
	}
	for _, path := range s.Volumes {
		if !strings.HasPrefix(path, "/") || strings.ContainsFunc(path, control) {
			return nil, fault.New("qemu_argument", "path of a volume, %.200q, is not absolute or has control characters", path).
				WithFix("move the directory of volumes to a path without such characters")
		}
	}
	if strings.ContainsFunc(s.Cmdline, control) {
		return nil, fault.New("qemu_argument", "the kernel command line has control characters")
	}
	if s.VCPUs < 1 || s.MemoryMB < 1 {
		return nil, fault.New("qemu_argument", "%d vCPUs and %d MiB of memory", s.VCPUs, s.MemoryMB)
	}
	netdev, err := s.Network.netdev()
	if err != nil {
		return nil, err
	}

	machine, virtio := s.Machine, ""
	accel := string(s.Accel)
	if s.Accel == TCG {
		accel += ",thread=multi"
	}
	var tee []string
	if s.TDX != nil {
		if s.Accel != KVM || !b.TDX {
			return nil, fault.New("tee_unavailable", "an Intel TDX guest needs working KVM and a QEMU with TDX support (10.1)").
				WithFix("run on a TDX host, or set cvm.tee to sim for development")
		}
		object, err := s.TDX.object()
		if err != nil {
			return nil, err
		}
		tee = []string{"-object", object}
		machine += ",kernel-irqchip=split,confidential-guest-support=tdx,hpet=off"
		// Private memory: devices must go through the DMA API's bounce buffers.
		virtio = ",disable-legacy=on,iommu_platform=on"
	}
	device := func(text string) []string { return []string{"-device", text} }

	args := []string{
		"-name", "guest=" + s.ID,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-sandbox", sandbox,
		"-accel", accel,
		"-cpu", b.cpu(s.Accel),
	}
	args = append(args, tee...)
	args = append(args,
		"-machine", machine,
		"-smp", strconv.Itoa(s.VCPUs),
		"-m", fmt.Sprintf("%dM", s.MemoryMB),
		"-bios", s.Firmware,
		"-kernel", s.Kernel,
		"-initrd", s.Initrd,
		"-append", s.Cmdline,
		// The log is cut from outside while QEMU writes it, hence append.
		"-chardev", "file,id=serial0,path="+SerialLog+",append=on",
		"-serial", "chardev:serial0",
		"-qmp", "unix:"+QMPSock+",server=on,wait=off",
		"-smbios", "type=1,manufacturer=dstack,product=dstack",
	)
	if s.PCIHole64 > 0 {
		args = append(args, "-global", fmt.Sprintf("q35-pcihost.pci-hole64-size=0x%x", s.PCIHole64))
	}
	for _, d := range []struct {
		node, file, serial string
		readOnly           bool
	}{
		{"root", s.Rootfs, SerialRoot, true},
		{"data", DataDisk, SerialData, false},
		{"shared", SharedDisk, SerialShared, true},
	} {
		args = append(args, "-blockdev", blockdev(d.node, d.file, d.readOnly))
		args = append(args, device("virtio-blk-pci,drive="+d.node+",serial="+d.serial+virtio)...)
	}
	args = append(args, "-netdev", netdev)
	args = append(args, device("virtio-net-pci,netdev=net0,mac="+s.Network.MAC+",romfile="+virtio)...)
	args = append(args, device("virtio-serial-pci,id=vser0"+virtio)...)
	args = append(args, "-chardev", "socket,id=hostlink,path="+HostlinkSock+",server=on,wait=off")
	args = append(args, device("virtserialport,bus=vser0.0,chardev=hostlink,name="+s.HostlinkPort)...)
	args = append(args, device("virtio-rng-pci"+virtio)...)
	for i, path := range s.Volumes {
		node := "vol" + strconv.Itoa(i)
		args = append(args, "-blockdev", blockdev(node, path, true))
		args = append(args, device("virtio-blk-pci,drive="+node+",serial=dstack-"+node+virtio)...)
	}
	if s.TPM { // not on the PCI bus
		args = append(args, "-chardev", "socket,id=tpm0,path="+TPMSock, "-tpmdev", "emulator,id=tpm0,chardev=tpm0")
		args = append(args, device("tpm-crb,tpmdev=tpm0")...)
	}
	return args, nil
}

func control(r rune) bool { return r < 0x20 || r == 0x7f }

// netdev returns the value of -netdev. The guest is 10.0.2.15/24, the gateway
// 10.0.2.2, the name server 10.0.2.3.
func (n Network) netdev() (string, error) {
	if n.Ifname != "" {
		if !ifForm.MatchString(n.Ifname) {
			return "", fault.New("qemu_argument", "interface name %.80q cannot be passed to QEMU", n.Ifname)
		}
		return "tap,id=net0,ifname=" + n.Ifname + ",script=no,downscript=no,vhost=off", nil
	}
	out := "user,id=net0,restrict=off,ipv6=off"
	for _, f := range n.Forwards {
		if f.Protocol != "tcp" && f.Protocol != "udp" || !f.Address.Is4() || f.Host == 0 || f.VM == 0 {
			return "", fault.New("qemu_argument", "port forwarding %s %s:%d to %d cannot be passed to QEMU", f.Protocol, f.Address, f.Host, f.VM).
				WithFix("use tcp or udp, an IPv4 address and ports from 1 to 65535")
		}
		out += fmt.Sprintf(",hostfwd=%s:%s:%d-:%d", f.Protocol, f.Address, f.Host, f.VM)
	}
	return out, nil
}

func (t *TDX) object() (string, error) {
	type vsock struct {
		Type string `json:"type"`
		CID  string `json:"cid"`
		Port string `json:"port"`
	}
	o := struct {
		Type       string `json:"qom-type"`
		ID         string `json:"id"`
		MRConfigID string `json:"mrconfigid,omitempty"` // base64 of 48 bytes
		QGS        *vsock `json:"quote-generation-socket,omitempty"`
	}{Type: "tdx-guest", ID: "tdx"}
	if !t.MRConfigID.IsZero() {
		o.MRConfigID = base64.StdEncoding.EncodeToString(t.MRConfigID[:])
	}
	if t.QGSPort != 0 {
		o.QGS = &vsock{"vsock", "2", strconv.FormatUint(uint64(t.QGSPort), 10)}
	}
	b, err := json.Marshal(o)
	return string(b), err
}
