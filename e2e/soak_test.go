// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// qemuProcesses counts the QEMU processes whose arguments name a VM directory of
// the shared stack, by VM.
func qemuProcesses(t testing.TB) map[string]int {
	t.Helper()
	count := map[string]int{}
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(shared.state, "vms") + "/"
	for _, path := range dirs {
		data, err := os.ReadFile(path)
		if err != nil || !strings.Contains(strings.SplitN(string(data), "\x00", 2)[0], "qemu-system") {
			continue
		}
		if _, rest, ok := strings.Cut(string(data), root); ok {
			id, _, _ := strings.Cut(rest, "/")
			count[id]++
		}
	}
	return count
}

// Ten times: a VM boots, the VMM is killed at a random moment of its life and
// comes back. Never two QEMUs for one VM, never one without a VM, and a VM that
// got as far as evidence still proves itself.
func TestSoakVMMKills(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: ten boots; run with make soak")
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	app := helloApp(t)
	for i := range 10 {
		id, url := create(t, "soak-"+strconv.Itoa(i), shared.image, nil)
		pause := time.Duration(rng.Int64N(int64(14 * time.Second)))
		time.Sleep(pause)
		action := "boot"
		if rng.IntN(3) == 0 {
			action = "stop"
			go vmm().Call(t.Context(), "StopVm", idMessage(id), nil)
			time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
		}
		killVMM(t)
		dstack(t, "up", "--image", shared.imageDir()).must(t)
		status := vmInfo(t, id).Status
		t.Logf("kill %d: %s, after %v, then %s", i, action, pause.Round(time.Millisecond), status)
		for vm, n := range qemuProcesses(t) {
			if n > 1 {
				t.Fatalf("%d QEMUs run VM %s", n, vm)
			}
		}
		if action == "boot" {
			if status != "running" {
				t.Fatalf("VM %s is %s after the VMM came back", id, status)
			}
			v, exit := awaitEvidence(t, id, url, "--lock", app.Lock, "--dev-roots", shared.devRoots())
			if exit != 0 {
				t.Fatalf("its registers are not intact: %+v", v)
			}
		}
		dstack(t, "rm", "--force", id).must(t)
		if n := qemuProcesses(t)[id]; n != 0 {
			t.Fatalf("%d QEMUs outlive the removed VM", n)
		}
	}
}
