// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"net/http"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/api/guestapi"
)

// serveMetrics is GET /metrics: how the machine fares, in the text format of
// Prometheus (guest-agent.md §12). Load averages are what they are, where upstream
// gives them times 100.
func (a *Agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	body := metrics(systemInfo(a.disks))
	h := w.Header()
	h.Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

// labels escapes as the text format wants it.
var labels = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

func metrics(s *guestapi.SystemInfo) []byte {
	var b bytes.Buffer
	gauge := func(name, help string) {
		b.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " gauge\n")
	}
	sample := func(name, value string, pairs ...string) {
		b.WriteString(name)
		for i := 0; i < len(pairs); i += 2 {
			b.WriteByte("{,"[min(i, 1)])
			b.WriteString(pairs[i] + `="` + labels.Replace(strings.ToValidUTF8(pairs[i+1], "\uFFFD")) + `"`)
		}
		if len(pairs) > 0 {
			b.WriteByte('}')
		}
		b.WriteString(" " + value + "\n")
	}
	num := func(n uint64) string { return strconv.FormatUint(n, 10) }
	for _, m := range [][4]string{
		{"system_os_name", "Name of the operating system", "os_name", s.OsName},
		{"system_os_version", "Version of the operating system", "os_version", s.OsVersion},
		{"system_kernel_version", "Version of the kernel", "kernel_version", s.KernelVersion},
		{"system_cpu_model", "Model of the CPU", "cpu_model", s.CpuModel},
	} {
		gauge(m[0], m[1])
		sample(m[0], "1", m[2], m[3])
	}
	for _, m := range []struct {
		name, help string
		value      uint64
	}{
		{"system_num_cpus", "CPUs", uint64(s.NumCpus)},
		{"system_memory_total", "Memory in bytes", s.TotalMemory},
		{"system_memory_available", "Memory that could be used, in bytes", s.AvailableMemory},
		{"system_memory_used", "Memory in use, in bytes", s.UsedMemory},
		{"system_memory_free", "Memory that holds nothing, in bytes", s.FreeMemory},
		{"system_swap_total", "Swap in bytes", s.TotalSwap},
		{"system_swap_used", "Swap in use, in bytes", s.UsedSwap},
		{"system_swap_free", "Free swap in bytes", s.FreeSwap},
		{"system_uptime", "Seconds since the start of the machine", s.Uptime},
	} {
		gauge(m.name, m.help)
		sample(m.name, num(m.value))
	}
	for _, m := range []struct {
		minutes string
		value   uint32
	}{{"1", s.LoadavgOne}, {"5", s.LoadavgFive}, {"15", s.LoadavgFifteen}} {
		name := "system_load_average_" + m.minutes + "m"
		gauge(name, "Load average over "+m.minutes+" min")
		sample(name, strconv.FormatFloat(float64(m.value)/100, 'f', -1, 64))
	}
	for _, m := range []struct {
		name, help string
		value      func(*guestapi.DiskInfo) string
	}{
		{"disk_total_size", "Size of the file system in bytes", func(d *guestapi.DiskInfo) string { return num(d.TotalSize) }},
		{"disk_free_size", "Free bytes of the file system", func(d *guestapi.DiskInfo) string { return num(d.FreeSize) }},
		{"disk_used_size", "Used bytes of the file system", func(d *guestapi.DiskInfo) string { return num(used(d)) }},
		{"disk_usage_percentage", "Used part of the file system in percent", func(d *guestapi.DiskInfo) string {
			if d.TotalSize == 0 {
				return "0"
			}
			return strconv.FormatFloat(100*float64(used(d))/float64(d.TotalSize), 'f', 2, 64)
		}},
	} {
		gauge(m.name, m.help)
		for _, d := range s.Disks {
			sample(m.name, m.value(d), "name", d.Name, "mount_point", d.MountPoint)
		}
	}
	return b.Bytes()
}

func used(d *guestapi.DiskInfo) uint64 { return d.TotalSize - min(d.FreeSize, d.TotalSize) }
