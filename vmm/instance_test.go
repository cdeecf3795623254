// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// keyed is a manifest whose data outlives a boot.
const keyed = `{"manifest_version":2,"name":"app","runner":"docker-compose","docker_compose_file":"services: {}","key_provider":"local"}`

// given returns the instance info that the guest of the last start was given.
func (w *world) given(id string) *hostshare.InstanceInfo {
	w.t.Helper()
	f, err := os.Open(filepath.Join(w.dir(id), qemu.SharedDisk))
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	files, err := hostshare.Read(f)
	if err != nil {
		w.t.Fatal(err)
	}
	info, err := hostshare.ParseInstanceInfo(files[hostshare.InstanceInfoName])
	if err != nil {
		w.t.Fatal(err)
	}
	return info
}

func TestInstanceAndDiskOutliveRunsAndTheVMM(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	g := w.guestEnd(t, keyed)
	id := g.v.spec().ID
	app := g.v.spec().AppID
	foreign := strings.Repeat("ab", 20)
	// A guest that does not say so has no disk in use.
	if err := g.notify("instance.info", `{"app_id":"`+foreign+`"}`); err != nil {
		t.Fatal(err)
	}
	if kept, _ := os.ReadFile(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName)); strings.Contains(string(kept), "ready") {
		t.Fatalf("kept %s", kept)
	}
	// All that is kept of the guest's word is that its disk is in use.
	if err := g.notify("instance.info", `{"app_id":"`+foreign+`","instance_id":"`+foreign+`","instance_id_seed":"`+foreign+`","data_disk":"ready","x":1}`); err != nil {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName))
	if err != nil || string(kept) != `{"app_id":"`+app.String()+`","data_disk":"ready"}` {
		t.Fatalf("kept %s, %v", kept, err)
	}
	for _, bad := range []string{"", "null", "[]", `{"data_disk":"formatted"}`, `{"data_disk":true}`, `{"data_disk":"ready"`, `{"data_disk":"ready","data_disk":""}`} {
		if err := g.notify("instance.info", bad); fault.Code(err) != "instance_info_malformed" {
			t.Errorf("%s: %v", bad, err)
		}
	}
	// It never becomes new again.
	if err := g.notify("instance.info", `{}`); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName)); string(after) != string(kept) {
		t.Fatalf("%s", after)
	}
	g.c.close()
	os.Remove(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName))
	if err := w.do("StartVm", id); fault.Code(err) != "instance_lost" || fault.Fix(err) == "" {
		t.Fatalf("started without an identity: %v", err)
	}
	for _, info := range []string{string(kept), `{"app_id":"` + app.String() + `"}`} {
		if err := os.WriteFile(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName), []byte(info), 0o600); err != nil {
			t.Fatal(err)
		}
		// A disk in use whose instance is not known is as bad.
		if err := w.do("StartVm", id); info == string(kept) != (fault.Code(err) == "instance_lost") {
			t.Fatalf("%s: %v", info, err)
		}
	}
	first := w.given(id)
	if first.DataDisk != hostshare.DataDiskNew || *first.InstanceID != instanceID(first.InstanceIDSeed, app) {
		t.Fatalf("%+v", first)
	}
	disk := filepath.Join(w.dir(id), qemu.DataDisk)
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("data"), 1<<20)
	f.Close()
	w.must("StopVm", id)
	first.DataDisk = hostshare.DataDiskReady
	data, _ := first.Encode()
	if err := os.WriteFile(filepath.Join(w.dir(id), sharedDir, hostshare.InstanceInfoName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, restart := range []bool{false, true, false} {
		if restart {
			w.close()
			w.open()
		}
		w.must("StartVm", id)
		again := w.given(id)
		if *again.InstanceID != *first.InstanceID || string(again.InstanceIDSeed) != string(first.InstanceIDSeed) || *again.AppID != app || again.DataDisk != hostshare.DataDiskReady {
			t.Fatalf("%+v, was %+v", again, first)
		}
		w.must("StopVm", id)
	}
	content := make([]byte, 4)
	f, err = os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.ReadAt(content, 1<<20); string(content) != "data" {
		t.Error("the disk's content is lost")
	}
}

func TestDiskWithoutLastingKeysIsNeverInUse(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	g := w.guestEnd(t, compose)
	if err := g.notify("instance.info", `{"data_disk":"ready"}`); err != nil {
		t.Fatal(err)
	}
	g.c.close()
	w.must("StartVm", g.v.spec().ID)
	if info := w.given(g.v.spec().ID); info.DataDisk != hostshare.DataDiskNew {
		t.Errorf("%+v: the guest could not format the disk, whose key is gone", info)
	}
}

func TestReportOfARunThatIsOverIsNotKept(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	g := w.guestEnd(t, keyed)
	g.c.run--
	if err := g.notify("instance.info", `{"data_disk":"ready"}`); fault.Code(err) != "vm_not_running" {
		t.Error(err)
	}
	if err := g.v.takeInstanceInfo(g.c.run, `{"data_disk":"ready"}`); err != nil {
		t.Error(err)
	}
	if kept, _ := os.ReadFile(filepath.Join(g.v.shared(), hostshare.InstanceInfoName)); strings.Contains(string(kept), "ready") {
		t.Errorf("kept %s", kept)
	}
}
