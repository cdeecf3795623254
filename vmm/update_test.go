// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/vmm/qemu"
	"github.com/dstack-go/dstack/vmm/qmp"
)

// manifestOf is a manifest with lasting keys and the given compose file.
func manifestOf(services string, more ...string) string {
	return fmt.Sprintf(`{"manifest_version":2,"name":"app","runner":"docker-compose","docker_compose_file":"services: {} # %s","key_provider":"local","allowed_envs":["A"]%s}`, services, strings.Join(more, ""))
}

func (w *world) update(req *vmmpb.UpdateVmRequest) (string, error) {
	var out vmmpb.Id
	err := w.call("UpdateVm", req, &out)
	return out.Id, err
}

// tree lists every file of a VM but logs, with its content; the disk by its size.
func (w *world) tree(id string) string {
	var b strings.Builder
	filepath.Walk(w.dir(id), func(path string, fi os.FileInfo, err error) error {
		rel, _ := filepath.Rel(w.dir(id), path)
		switch {
		case err != nil || !fi.Mode().IsRegular() || strings.HasSuffix(path, ".log") || rel == eventsFile:
		case rel == qemu.DataDisk:
			fmt.Fprintf(&b, "%s %d\n", rel, fi.Size())
		default:
			data, _ := os.ReadFile(path)
			fmt.Fprintf(&b, "%s %x\n", rel, data)
		}
		return nil
	})
	return b.String()
}

// files returns what the guest of the last start was given.
func (w *world) files(id string) hostshare.Files {
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
	return files
}

func hashOf(t *testing.T, text string) string {
	m, err := manifest.Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return m.Hash().String()
}

func TestDiskGrowsAndNeverShrinks(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	req := request()
	req.DiskSize, req.ComposeFile = 2, keyed
	id := w.mustCreate(req)
	resize := func(in *vmmpb.ResizeVmRequest) error {
		in.Id = id
		return w.call("ResizeVm", in, &vmmpb.Id{})
	}
	disk := filepath.Join(w.dir(id), qemu.DataDisk)
	if err := resize(&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](3)}); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(disk); err != nil || fi.Size() != 2<<30 || w.info(id).Configuration.DiskSize != 2 {
		t.Fatal("the disk of a running VM changed")
	}
	if err := resize(&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](2)}); fault.Code(err) != "disk_shrink" {
		t.Fatalf("shrunk before it had grown: %v", err)
	}
	w.must("StopVm", id)
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("data"), 2<<30-4)
	f.Close()
	before := w.tree(id)
	for _, tc := range []struct {
		in   *vmmpb.ResizeVmRequest
		code string
	}{
		{&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](1)}, "disk_shrink"},
		{&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](0)}, "resize_invalid"},
		{&vmmpb.ResizeVmRequest{Vcpu: ptr[uint32](0)}, "resize_invalid"},
		{&vmmpb.ResizeVmRequest{Image: ptr("")}, "resize_invalid"},
		{&vmmpb.ResizeVmRequest{}, "resize_invalid"},
		{&vmmpb.ResizeVmRequest{DiskSize: ptr(w.config.CVM.MaxDiskGB + 1)}, "disk_limit"},
		{&vmmpb.ResizeVmRequest{Image: ptr("nothing")}, "image_missing"},
		{&vmmpb.ResizeVmRequest{Image: ptr("../x")}, "image_name"},
	} {
		if err := resize(tc.in); fault.Code(err) != tc.code || fault.Fix(err) == "" {
			t.Errorf("%v: %v, want %s", tc.in, err, tc.code)
		}
	}
	if after := w.tree(id); after != before {
		t.Errorf("a refused resize changed\n%s\nto\n%s", before, after)
	}
	if err := resize(&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](4), Memory: ptr[uint32](160)}); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(disk)
	if err != nil || fi.Size() != 4<<30 {
		t.Fatal(fi, err)
	}
	content := make([]byte, 8)
	if f, err = os.Open(disk); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.ReadAt(content, 2<<30-4); string(content) != "data\x00\x00\x00\x00" {
		t.Errorf("the content changed: %q", content)
	}
	w.close()
	w.open()
	if c := w.info(id).Configuration; c.DiskSize != 4 || c.Memory != 160 {
		t.Errorf("%+v", c)
	}
	w.must("StartVm", id)
	w.must("StopVm", id)
	// A disk that somebody cut is not filled up with zeros.
	os.Truncate(disk, 1<<30)
	if err := resize(&vmmpb.ResizeVmRequest{DiskSize: ptr[uint32](5)}); fault.Code(err) != "disk_truncated" {
		t.Error(err)
	}
	if fi, _ := os.Stat(disk); fi.Size() != 1<<30 {
		t.Errorf("%d bytes", fi.Size())
	}
}

func TestUpgradeKeepsAppInstanceAndDisk(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	second := filepath.Join(w.config.StateDir, "images", "dstack-sim-0.2.0")
	makeImage(t, second)
	req := request()
	req.ComposeFile, req.EncryptedEnv, req.UserConfig = manifestOf("one"), []byte("old env"), "old config"
	id := w.mustCreate(req)
	first, was := w.given(id), w.info(id)
	w.must("StopVm", id)
	if err := w.server.vms[id].takeInstanceInfo(1, `{"data_disk":"ready"}`); err != nil {
		t.Fatal(err)
	}

	// Only what is given changes.
	got, err := w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: manifestOf("two")})
	if err != nil || got != hashOf(t, manifestOf("two"))[:40] {
		t.Fatal(got, err)
	}
	port := freePort(t)
	got, err = w.update(&vmmpb.UpdateVmRequest{Id: id, EncryptedEnv: []byte("new env"), UserConfig: "new config", Image: ptr("dstack-sim-0.2.0"), Memory: ptr[uint32](160),
		UpdatePorts: true, Ports: []*vmmpb.PortMapping{tcp(port, 80)}, UpdateKmsUrls: true, KmsUrls: []string{"https://kms.example"}})
	if err != nil || got != "" {
		t.Fatalf("%q %v: the compose hash is told only when it changed", got, err)
	}
	for _, restart := range []bool{false, true} {
		if restart {
			w.must("StopVm", id)
			w.close()
			w.open()
		}
		w.must("StartVm", id)
		files := w.files(id)
		if string(files[hostshare.AppComposeName]) != manifestOf("two") || string(files[hostshare.EncryptedEnvName]) != "new env" || string(files[hostshare.UserConfigName]) != "new config" {
			t.Errorf("%q", files)
		}
		sys, err := hostshare.ParseSysConfig(files[hostshare.SysConfigName])
		if err != nil || len(sys.KMSURLs) != 1 || !strings.Contains(sys.MRConfig, hashOf(t, manifestOf("two"))) || !strings.Contains(sys.VMConfig, "dstack-sim-0.2.0") {
			t.Errorf("%+v %v", sys, err)
		}
		info, again := w.info(id), w.given(id)
		if info.AppId != was.AppId || *info.InstanceId != *was.InstanceId || *again.InstanceID != *first.InstanceID || again.DataDisk != hostshare.DataDiskReady {
			t.Errorf("%+v %+v", info, again)
		}
		if c := info.Configuration; c.Image != "dstack-sim-0.2.0" || c.Memory != 160 || len(c.Ports) != 1 || c.Ports[0].HostPort != port || c.Name != "app" {
			t.Errorf("%+v", c)
		}
	}
	var shared []string
	entries, _ := os.ReadDir(w.dir(id))
	for _, e := range entries {
		if e.Name() == updateFile || strings.HasPrefix(e.Name(), sharedDir) && e.IsDir() {
			shared = append(shared, e.Name())
		}
	}
	if len(shared) != 1 {
		t.Errorf("left %v", shared)
	}
	// Variables that the next manifest takes none of are not handed on.
	w.must("StopVm", id)
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: keyed}); err != nil {
		t.Fatal(err)
	}
	w.must("StartVm", id)
	if files := w.files(id); files[hostshare.EncryptedEnvName] != nil || string(files[hostshare.UserConfigName]) != "new config" {
		t.Errorf("%q", files)
	}
}

func TestUpdateOfARunningVMWaitsForTheNextStart(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	req := request()
	port, later := freePort(t), freePort(t)
	req.ComposeFile, req.Ports = manifestOf("one"), []*vmmpb.PortMapping{tcp(port, 80)}
	id := w.mustCreate(req)
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: manifestOf("two")}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, UpdatePorts: true, Ports: []*vmmpb.PortMapping{tcp(later, 80)}}); err != nil {
		t.Fatal(err)
	}
	for _, restart := range []bool{false, true} {
		if restart {
			w.close()
			w.open()
			w.untilStatus(id, "running")
		}
		if c := w.info(id).Configuration; c.ComposeFile != manifestOf("one") || c.Ports[0].HostPort != port {
			t.Fatalf("what runs is on record as another: %+v", c)
		}
		// Neither the ports that it has nor those that it will have are free.
		for _, p := range []uint32{port, later} {
			other := request()
			other.Stopped, other.Ports = true, []*vmmpb.PortMapping{tcp(p, 80)}
			if _, err := w.create(other); fault.Code(err) != "port_busy" {
				t.Errorf("port %d: %v", p, err)
			}
		}
	}
	w.must("StopVm", id)
	w.must("StartVm", id)
	if c := w.info(id).Configuration; c.ComposeFile != manifestOf("two") || c.Ports[0].HostPort != later {
		t.Fatalf("%+v", c)
	}
	if files := w.files(id); string(files[hostshare.AppComposeName]) != manifestOf("two") {
		t.Fatalf("%q", files)
	}
}

func TestRefusedUpdateChangesNothing(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	w.config.CVM.PortMapping.Range = []PortRange{{"tcp", 1024, 65535}}
	w.open()
	port := freePort(t)
	other := request()
	other.Stopped, other.Ports = true, []*vmmpb.PortMapping{tcp(port, 80)}
	w.mustCreate(other)
	req := request()
	req.ComposeFile, req.Stopped = manifestOf("one"), true
	id := w.mustCreate(req)
	v := w.server.vms[id]
	if err := v.takeInstanceInfo(0, `{"data_disk":"ready"}`); err != nil {
		t.Fatal(err)
	}
	before := w.tree(id)
	for _, tc := range []struct {
		name, code string
		in         *vmmpb.UpdateVmRequest
	}{
		{"not a manifest", "manifest_malformed", &vmmpb.UpdateVmRequest{ComposeFile: "{"}},
		{"an image that is not stored", "blob_missing", &vmmpb.UpdateVmRequest{ComposeFile: manifestOf("two", `,"image_policy":"digest","image_lock":{"a:1":"sha256:`+strings.Repeat("ab", 32)+`"}`)}},
		{"a manifest whose disk has no key", "disk_incompatible", &vmmpb.UpdateVmRequest{ComposeFile: compose}},
		{"a manifest whose disk has another provider's key", "disk_incompatible", &vmmpb.UpdateVmRequest{ComposeFile: strings.Replace(manifestOf("two"), "local", "tpm", 1)}},
		{"a manifest whose disk has another instance's key", "disk_incompatible", &vmmpb.UpdateVmRequest{ComposeFile: manifestOf("two", `,"no_instance_id":true`)}},
		{"another file system", "disk_incompatible", &vmmpb.UpdateVmRequest{ComposeFile: manifestOf("two", `,"storage_fs":"xfs"`)}},
		{"another's port", "port_busy", &vmmpb.UpdateVmRequest{UpdatePorts: true, Ports: []*vmmpb.PortMapping{tcp(port, 80)}}},
		{"a port outside the range", "port_not_allowed", &vmmpb.UpdateVmRequest{UpdatePorts: true, Ports: []*vmmpb.PortMapping{tcp(80, 80)}}},
		{"a good manifest with a bad port", "port_invalid", &vmmpb.UpdateVmRequest{ComposeFile: manifestOf("two"), UpdatePorts: true, Ports: []*vmmpb.PortMapping{tcp(0, 80)}}},
		{"too large an environment", "shared_file_too_large", &vmmpb.UpdateVmRequest{EncryptedEnv: make([]byte, 256<<10+1)}},
		{"a URL that is none", "sys_config_malformed", &vmmpb.UpdateVmRequest{UpdateKmsUrls: true, KmsUrls: []string{"ftp://x"}}},
		{"another kind of TEE", "not_supported", &vmmpb.UpdateVmRequest{NoTee: ptr(true)}},
		{"a GPU", "not_supported", &vmmpb.UpdateVmRequest{Gpus: &vmmpb.GpuConfig{AttachMode: "all"}}},
		{"a bridge", "not_supported", &vmmpb.UpdateVmRequest{UpdateNetworking: true, Networks: []*vmmpb.NetworkingConfig{{Mode: "bridge"}}}},
		{"too large a disk", "disk_limit", &vmmpb.UpdateVmRequest{DiskSize: ptr(w.config.CVM.MaxDiskGB + 1)}},
		{"too little memory", "memory_limit", &vmmpb.UpdateVmRequest{Memory: ptr[uint32](1)}},
	} {
		tc.in.Id = id
		if _, err := w.update(tc.in); fault.Code(err) != tc.code {
			t.Errorf("%s: %v, want %s", tc.name, err, tc.code)
		}
		if after := w.tree(id); after != before {
			t.Fatalf("%s: changed\n%s\nto\n%s", tc.name, before, after)
		}
	}
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: "none"}); fault.Code(err) != "vm_not_found" {
		t.Error(err)
	}
}

// A VMM killed after the update was written and before it took effect: the next one
// has either all of it or nothing.
func TestUpdateSurvivesAKill(t *testing.T) {
	disk := bootDisk(t, "", codeHalt)
	w := newWorld(t, disk).open()
	req := request()
	req.ComposeFile, req.Stopped = manifestOf("one"), true
	id := w.mustCreate(req)
	w.close()
	out := ""
	for n := 1; !strings.Contains(out, "update written"); n++ {
		if n > 4 {
			t.Fatalf("never at the point: %s", out)
		}
		out = w.killed(disk, n, func() {
			w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: manifestOf("two"), DiskSize: ptr[uint32](2)})
			w.do("StopVm", id) // a point to die at when there is no other
		})
	}
	w.open()
	w.must("StartVm", id)
	if c := w.info(id).Configuration; c.ComposeFile != manifestOf("two") || c.DiskSize != 2 {
		t.Errorf("%+v", c)
	}
	if fi, _ := os.Stat(filepath.Join(w.dir(id), qemu.DataDisk)); fi.Size() != 2<<30 {
		t.Errorf("%d bytes", fi.Size())
	}
	w.must("StopVm", id)
	w.close()
	// Killed after it took effect, before the rest of it was removed.
	spec, _ := os.ReadFile(filepath.Join(w.dir(id), specFile))
	os.WriteFile(filepath.Join(w.dir(id), updateFile), spec, 0o600)
	os.Mkdir(filepath.Join(w.dir(id), sharedDir), 0o700)
	// Killed before it was written.
	os.Mkdir(filepath.Join(w.dir(id), sharedDir+"-9"), 0o700)
	w.open()
	if c := w.info(id).Configuration; c.ComposeFile != manifestOf("two") {
		t.Errorf("%+v", c)
	}
	for _, name := range []string{updateFile, sharedDir, sharedDir + "-9"} {
		if _, err := os.Stat(filepath.Join(w.dir(id), name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	w.must("StartVm", id)
}

// QEMU says so itself: what a guest flushes is flushed to the host's medium.
func TestFlushesOfTheGuestReachTheMedium(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	req := request()
	req.NoTee = true
	id := w.mustCreate(req)
	w.close() // its monitor takes one client
	c, err := qmp.Dial(t.Context(), filepath.Join(w.dir(id), qemu.QMPSock))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var blocks []struct {
		Inserted struct {
			NodeName string `json:"node-name"`
			Cache    struct {
				Writeback bool `json:"writeback"`
				NoFlush   bool `json:"no-flush"`
			} `json:"cache"`
		} `json:"inserted"`
	}
	if err := c.Execute(t.Context(), "query-block", nil, &blocks); err != nil {
		t.Fatal(err)
	}
	for _, b := range blocks {
		if b.Inserted.NodeName == "data" {
			if b.Inserted.Cache.NoFlush { // without writeback every write is flushed
				t.Errorf("%+v", b)
			}
			return
		}
	}
	t.Fatalf("no data disk in %+v", blocks)
}
