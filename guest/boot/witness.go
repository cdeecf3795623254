// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// logTPM puts the firmware's measurements of kernel (PCR 4), command line and
// initrd (PCR 9) on the console of a machine that has a TPM. Nothing rests on
// them: they are a second opinion on what package measure computes, since here
// the firmware measured the same image by itself.
func (m *Machine) logTPM(sys string) {
	for _, pcr := range []int{4, 9} {
		data, err := os.ReadFile(filepath.Join(sys, "class/tpm/tpm0/pcr-sha256", fmt.Sprint(pcr)))
		if err == nil {
			m.console.Log(fmt.Sprintf("tpm pcr%d=%s", pcr, strings.ToLower(strings.TrimSpace(string(data)))))
		}
	}
}

// logMemory puts what the guest uses on the console: MemTotal less MemAvailable
// of proc_meminfo(5), in KiB.
func (m *Machine) logMemory(when string) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return
	}
	var total, available int
	for line := range strings.Lines(string(data)) {
		_, _ = fmt.Sscanf(line, "MemTotal: %d kB", &total)
		_, _ = fmt.Sscanf(line, "MemAvailable: %d kB", &available)
	}
	m.console.Log(fmt.Sprintf("memory %s used_kib=%d", when, total-available))
}
