// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/egress"
)

func TestGuestsReachWhereTheConfigurationSendsThem(t *testing.T) {
	c := DefaultConfig()
	c.CVM.Networking.EgressAllow = []string{"127.0.0.1:8000/tcp", "10.1.0.0/16"}
	c.CVM.KMSURLs = []string{"https://10.0.2.2:8000", "https://10.0.2.2:8001/x", "https://kms.example:9000", "https://192.168.1.2", "http://[fd00::1]"}
	c.CVM.PCCSURL = "https://10.0.2.2:0"
	c.CVM.DockerRegistry = "http://10.0.2.2:5000"
	list, err := c.egressAllow()
	var got []string
	for _, a := range list {
		got = append(got, a.String())
	}
	want := []string{"127.0.0.1:8000/tcp", "10.1.0.0/16", "127.0.0.1:8001/tcp", "192.168.1.2:443/tcp", "[fd00::1]:80/tcp", "127.0.0.1:5000/tcp"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
}

// cgroupOf is a process's cgroup of version 2.
func cgroupOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut(string(text), "\n0::")
	if path == "" {
		path = strings.TrimPrefix(string(text), "0::")
	}
	return strings.TrimSpace(path)
}

func TestQEMURunsInACgroupOfItsOwn(t *testing.T) {
	w := newWorld(t, bootDisk(t, "hello", codeHalt))
	f, err := egress.Open(egress.Config{Dir: w.config.StateDir})
	if err != nil {
		t.Skip("SKIP: ", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // whatever a failed test left
		if err := egress.Remove(w.config.StateDir); err != nil {
			t.Error(err)
		}
	})
	w.open()
	// One from before there was a filter, and one that begins with it.
	before := w.mustCreate(request())
	w.close()
	w.config.CVM.Networking.Egress = egressFiltered
	w.open()
	req := request()
	req.Name = "second"
	after := w.mustCreate(req)
	for range 2 { // and with the next VMM
		for _, id := range []string{before, after} {
			w.untilStatus(id, "running")
			q, tee := w.holders(id)
			if got := cgroupOf(t, q.PID); !strings.HasSuffix(got, "/"+id) || !strings.Contains(got, "/dstack-vmm-") {
				t.Errorf("QEMU is in %s", got)
			}
			if got := cgroupOf(t, tee.PID); strings.Contains(got, "dstack-vmm") {
				t.Errorf("the TEE is in %s", got)
			}
			if got := w.info(id).Interfaces[0].Egress; got != egressFiltered {
				t.Errorf("egress %q", got)
			}
		}
		w.close()
		w.open()
	}
	var meta vmmpb.GetMetaResponse
	if err := w.call("GetMeta", &vmmpb.Id{}, &meta); err != nil || meta.Networking.Egress != egressFiltered || meta.Networking.EgressReason != "" {
		t.Errorf("%v %v", meta.Networking, err)
	}
	w.must("RemoveVm", before)
	w.must("RemoveVm", after)
	w.until("the VMs are gone", func() bool { return w.info(before) == nil && w.info(after) == nil })
	w.close()
	if f, err = egress.Open(egress.Config{Dir: w.config.StateDir}); err != nil { // would find what is left
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestNoGuestStartsUnfilteredIfFilteredWasAskedFor(t *testing.T) {
	w := newWorld(t, bootDisk(t, "hello", codeHalt)).open()
	w.server.config.CVM.Networking.Egress = egressFiltered
	w.server.noEgress = fault.New(egress.Code, "the VMM is not root").WithFix("be root")
	_, err := w.create(request())
	if fault.Code(err) != egress.Code || !strings.Contains(err.Error(), "root") {
		t.Errorf("%q %v", fault.Code(err), err)
	}
	var meta vmmpb.GetMetaResponse
	if err := w.call("GetMeta", &vmmpb.Id{}, &meta); err != nil || meta.Networking.Egress != egressOpen || meta.Networking.EgressReason == "" || meta.Networking.EgressFix != "be root" {
		t.Errorf("%v %v", meta.Networking, err)
	}
}
