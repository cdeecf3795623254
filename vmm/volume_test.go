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
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// withVolumes is a manifest with volumes "source:root byte".
func withVolumes(volumes ...string) string {
	var list []string
	for i, v := range volumes {
		source, root, _ := strings.Cut(v, ":")
		list = append(list, fmt.Sprintf(`{"source":%q,"target":"/v%d","verity_root":"%s"}`, source, i, strings.Repeat(root, 32)))
	}
	return strings.TrimSuffix(keyed, "}") + `,"verity_volumes":[` + strings.Join(list, ",") + "]}"
}

func TestVolumesAreAttachedReadOnly(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	var got qemu.Spec
	build := w.opt.args
	w.opt.args = func(s qemu.Spec) ([]string, error) { got = s; return build(s) }
	dir := w.config.CVM.VolumesDir
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.img", "b.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o400); err != nil {
			t.Fatal(err)
		}
	}
	os.Symlink("a.img", filepath.Join(dir, "inside"))
	w.open()
	req := request()
	req.ComposeFile = withVolumes("b.img:bb", "a.img:aa", "nowhere:bb", "inside:cc")
	id := w.mustCreate(req) // QEMU takes the arguments
	var names []string
	for _, path := range got.Volumes {
		names = append(names, filepath.Base(path))
	}
	if strings.Join(names, " ") != "b.img a.img a.img" {
		t.Errorf("attached %v", got.Volumes)
	}
	sys, err := hostshare.ParseSysConfig(w.files(id)[hostshare.SysConfigName])
	if err != nil {
		t.Fatal(err)
	}
	vc, err := measure.ParseVMConfig([]byte(sys.VMConfig))
	if err != nil || vc.NumVerity != 3 || vc.Endpoints != qemu.RootBusDevices+3 {
		t.Errorf("%+v %v", vc, err)
	}
	// A volume that has gone stops the start, by its name.
	w.must("StopVm", id)
	os.Remove(filepath.Join(dir, "b.img"))
	if err := w.do("StartVm", id); fault.Code(err) != "volume_missing" || fault.Fix(err) == "" || !strings.Contains(err.Error(), "b.img") {
		t.Error(err)
	}
	// An update attaches what its manifest names.
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, ComposeFile: withVolumes("a.img:aa")}); err != nil {
		t.Fatal(err)
	}
	w.must("StartVm", id)
	if len(got.Volumes) != 1 {
		t.Errorf("attached %v", got.Volumes)
	}
}

func TestVolumesStayInTheirDirectory(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	dir := w.config.CVM.VolumesDir
	create := func(volumes ...string) error {
		req := request()
		req.ComposeFile, req.Stopped = withVolumes(volumes...), true
		_, err := w.create(req)
		return err
	}
	if err := create("a.img:aa"); fault.Code(err) != "volume_missing" {
		t.Errorf("without a directory: %v", err)
	}
	os.MkdirAll(filepath.Join(dir, "sub"), 0o700)
	secret := filepath.Join(w.config.StateDir, "secret")
	os.WriteFile(secret, nil, 0o600)
	os.WriteFile(dir+"-evil", nil, 0o600)
	os.Symlink(secret, filepath.Join(dir, "out"))
	os.Symlink("../volumes-evil", filepath.Join(dir, "beside"))
	os.WriteFile(filepath.Join(dir, "a,b"), nil, 0o600)
	for name, code := range map[string]string{
		"../secret": "volume_name", "..": "volume_name", ".": "volume_name", secret: "volume_name", "sub/x": "volume_name",
		"a,b": "volume_name", "a=b": "volume_name", strings.Repeat("a", 129): "volume_name", "": "volume_name",
		"sub": "volume_missing", "out": "volume_missing", "beside": "volume_missing", "absent": "volume_missing",
	} {
		if err := create(name + ":aa"); fault.Code(err) != code && !(name == "" && fault.Code(err) == "manifest_field") {
			t.Errorf("%q: %v, want %s", name, err, code)
		}
	}
	var many []string
	for i := range maxVolumes + 1 {
		name := fmt.Sprintf("v%d", i)
		os.WriteFile(filepath.Join(dir, name), nil, 0o600)
		many = append(many, fmt.Sprintf("%s:%02x", name, i))
	}
	if err := create(many...); fault.Code(err) != "volume_limit" {
		t.Error(err)
	}
	if err := create(many[1:]...); err != nil {
		t.Error(err)
	}
	if len(w.dirs()) != 1 {
		t.Errorf("left %v", w.dirs())
	}
}
