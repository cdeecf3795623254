// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"os"
	"path/filepath"
	"testing"
)

func TestASmallMachineSparesMemory(t *testing.T) {
	for _, c := range []struct {
		name   string
		memory uint64
		want   string
	}{
		{"1 GiB", 1 << 30, "never"},
		{"just below the limit", largeFrom - 1, "never"},
		{"the limit", largeFrom, "madvise"},
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
			proc := t.TempDir()
			lists := filepath.Join(proc, "sys/vm/percpu_pagelist_high_fraction")
			if err := os.MkdirAll(filepath.Dir(lists), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(lists, []byte("0"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := smallMachine(sys, proc, c.memory); err != nil {
				t.Fatal(err)
			}
			if got, _ := os.ReadFile(lists); string(got) == "0" != (c.want == "madvise") {
				t.Errorf("fraction of the lists %s", got)
			}
			if got, _ := os.ReadFile(path); string(got) != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	if err := smallMachine(t.TempDir(), t.TempDir(), 1<<30); err != nil {
		t.Errorf("a kernel without either: %v", err)
	}
}
