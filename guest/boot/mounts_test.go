// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestHugePagesAreOffOnASmallMachineOnly(t *testing.T) {
	for _, c := range []struct {
		name   string
		memory uint64
		want   string
	}{
		{"1 GiB", 1 << 30, "never"},
		{"just below the limit", hugePagesFrom - 1, "never"},
		{"the limit", hugePagesFrom, "madvise"},
	} {
		t.Run(c.name, func(t *testing.T) {
			sys := t.TempDir()
			path := filepath.Join(sys, "kernel/mm/transparent_hugepage/enabled")
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("madvise"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := hugePages(sys, c.memory); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(path); string(got) != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	if err := hugePages(t.TempDir(), 1<<30); err != nil {
		t.Errorf("a kernel without huge pages: %v", err)
	}
}
