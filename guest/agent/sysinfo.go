// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/api/guestapi"
)

// systemInfo reads how the machine fares. What cannot be read stays zero.
func systemInfo(disks []string) *guestapi.SystemInfo {
	s := new(guestapi.SystemInfo)
	release := table("/etc/os-release", "=")
	s.OsName, s.OsVersion = strings.Trim(release["NAME"], `"`), strings.Trim(release["VERSION_ID"], `"`)
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		s.KernelVersion = unix.ByteSliceToString(uts.Release[:])
	}
	s.CpuModel, s.NumCpus = cpus()

	mem := table("/proc/meminfo", ":")
	kib := func(name string) uint64 {
		text, _, _ := strings.Cut(mem[name], " ")
		n, _ := strconv.ParseUint(text, 10, 54)
		return n << 10
	}
	s.TotalMemory, s.AvailableMemory, s.FreeMemory = kib("MemTotal"), kib("MemAvailable"), kib("MemFree")
	s.UsedMemory = s.TotalMemory - min(s.AvailableMemory, s.TotalMemory)
	s.TotalSwap, s.FreeSwap = kib("SwapTotal"), kib("SwapFree")
	s.UsedSwap = s.TotalSwap - min(s.FreeSwap, s.TotalSwap)

	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		s.Uptime = uint64(info.Uptime)
		load := func(i int) uint32 { return uint32(uint64(info.Loads[i]) * 100 >> 16) } // SI_LOAD_SHIFT
		s.LoadavgOne, s.LoadavgFive, s.LoadavgFifteen = load(0), load(1), load(2)
	}

	devices := map[string]string{}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			if f := strings.Fields(line); len(f) > 1 {
				devices[f[1]] = f[0]
			}
		}
	}
	for _, mount := range slices.Sorted(slices.Values(disks)) {
		var st unix.Statfs_t
		if unix.Statfs(mount, &st) == nil {
			s.Disks = append(s.Disks, &guestapi.DiskInfo{
				Name: devices[mount], MountPoint: mount,
				TotalSize: st.Blocks * uint64(st.Bsize), FreeSize: st.Bavail * uint64(st.Bsize),
			})
		}
	}
	return s
}

// table reads lines of "name<sep>value" and trims both.
func table(path, sep string) map[string]string {
	out := map[string]string{}
	data, err := os.ReadFile(path)
	if err != nil {
		return out
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, sep); ok {
			out[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	return out
}

// cpus returns the first CPU's brand string (upstream says "cpu0") and the count.
func cpus() (model string, n uint32) {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "", 0
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), ":")
		switch strings.TrimSpace(name) {
		case "processor":
			n++
		case "model name":
			if model == "" {
				model = strings.TrimSpace(value)
			}
		}
	}
	return model, n
}

// networkInfo reads the guest's interfaces. Bridges of the container engine are
// left out, as upstream has it: they tell what the app is made of.
func networkInfo() (*guestapi.NetworkInformation, error) {
	out := new(guestapi.NetworkInformation)
	if data, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
				out.DnsServers = append(out.DnsServers, f[1])
			}
		}
	}
	if data, err := os.ReadFile("/proc/net/route"); err == nil {
		out.Gateways = gateways(data)
	}
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		if i.Name != "dstack-wg0" && !strings.HasPrefix(i.Name, "enp") && !strings.HasPrefix(i.Name, "eth") {
			continue
		}
		x := &guestapi.Interface{
			Name:    i.Name,
			RxBytes: counter(i.Name, "rx_bytes"), TxBytes: counter(i.Name, "tx_bytes"),
			RxErrors: counter(i.Name, "rx_errors"), TxErrors: counter(i.Name, "tx_errors"),
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				x.Addresses = append(x.Addresses, &guestapi.IpAddress{Address: p.Addr().String(), Prefix: uint32(p.Bits())})
			}
		}
		out.Interfaces = append(out.Interfaces, x)
	}
	return out, nil
}

// gateways reads the default routes of /proc/net/route: columns Iface,
// Destination, Gateway, …, addresses as hexadecimal numbers in host byte order.
func gateways(route []byte) []*guestapi.Gateway {
	var out []*guestapi.Gateway
	for line := range bytes.Lines(route) {
		f := bytes.Fields(line)
		if len(f) < 3 || string(f[1]) != "00000000" || string(f[2]) == "00000000" {
			continue
		}
		raw, err := hex.DecodeString(string(f[2]))
		if err != nil || len(raw) != 4 {
			continue
		}
		var ip [4]byte
		binary.NativeEndian.PutUint32(ip[:], binary.BigEndian.Uint32(raw))
		out = append(out, &guestapi.Gateway{Address: netip.AddrFrom4(ip).String()})
	}
	return out
}

// counter reads one statistic of an interface.
func counter(iface, name string) uint64 {
	data, err := os.ReadFile(filepath.Join("/sys/class/net", filepath.Base(iface), "statistics", name))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return n
}
