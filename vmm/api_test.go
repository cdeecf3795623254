// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/api/hostapi"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/hostlink"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/qemu"
)

func ptr[T any](v T) *T { return &v }

func tcp(host, vm uint32) *vmmpb.PortMapping {
	return &vmmpb.PortMapping{Protocol: "tcp", HostPort: host, VmPort: vm}
}

func TestRefusedCreateLeavesNothing(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	w.config.CVM.MaxMemoryMB = 256
	w.config.CVM.PortMapping.Range = []PortRange{{"tcp", 1024, 65535}}
	broken := filepath.Join(w.config.StateDir, "images", "altered")
	makeImage(t, broken)
	os.WriteFile(filepath.Join(broken, "bzImage"), []byte("kerneL"), 0o600)
	short := filepath.Join(w.config.StateDir, "images", "truncated")
	makeImage(t, short)
	os.Truncate(filepath.Join(short, "rootfs.img.parted.verity"), 1000)
	w.open()
	busy, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	busyPort := uint32(busy.Addr().(*net.TCPAddr).Port)
	other := request()
	other.Stopped = true
	other.Ports = []*vmmpb.PortMapping{tcp(freePort(t), 80)}
	otherID := w.mustCreate(other)
	absent := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("absent")))

	type req = *vmmpb.VmConfiguration
	for _, tc := range []struct {
		name  string
		spoil func(req)
		code  string
	}{
		{"name with a comma", func(r req) { r.Name = "a,b" }, "vm_name"},
		{"name with an equals sign", func(r req) { r.Name = "a=b" }, "vm_name"},
		{"name with a newline", func(r req) { r.Name = "a\nb" }, "vm_name"},
		{"name with a slash", func(r req) { r.Name = "../x" }, "vm_name"},
		{"endless name", func(r req) { r.Name = strings.Repeat("a", 200) }, "vm_name"},
		{"manifest that is no JSON", func(r req) { r.ComposeFile = "services:" }, "manifest_malformed"},
		{"manifest without runner", func(r req) { r.ComposeFile = `{"manifest_version":2,"name":"x"}` }, "manifest_field"},
		{"malformed app id", func(r req) { r.AppId = ptr("1234") }, "app_id"},
		{"app id that is a path", func(r req) { r.AppId = ptr(strings.Repeat("../", 13) + "a") }, "app_id"},
		{"image that is not there", func(r req) { r.Image = "none" }, "image_missing"},
		{"no image", func(r req) { r.Image = "" }, "image_missing"},
		{"image that is a path", func(r req) { r.Image = "../images/" + imageName }, "image_name"},
		{"image named dot", func(r req) { r.Image = "." }, "image_name"},
		{"altered image", func(r req) { r.Image = "altered" }, "image_altered"},
		{"truncated image", func(r req) { r.Image = "truncated" }, "image_truncated"},
		{"too much memory", func(r req) { r.Memory = 257 }, "memory_limit"},
		{"too little memory", func(r req) { r.Memory = 1 }, "memory_limit"},
		{"too many vCPUs", func(r req) { r.Vcpu = 1000 }, "vcpu_limit"},
		{"too large a disk", func(r req) { r.DiskSize = 100_000 }, "disk_limit"},
		{"busy port", func(r req) { r.Ports = []*vmmpb.PortMapping{tcp(busyPort, 80)} }, "port_busy"},
		{"port of another VM", func(r req) { r.Ports = other.Ports }, "port_busy"},
		{"one port twice", func(r req) { r.Ports = []*vmmpb.PortMapping{tcp(4000, 80), tcp(4000, 81)} }, "port_busy"},
		{"port outside the range", func(r req) { r.Ports = []*vmmpb.PortMapping{tcp(80, 80)} }, "port_not_allowed"},
		{"protocol outside the range", func(r req) {
			r.Ports = []*vmmpb.PortMapping{{Protocol: "udp", HostPort: 4000, VmPort: 80}}
		}, "port_not_allowed"},
		{"address that others reach", func(r req) {
			r.Ports = []*vmmpb.PortMapping{{Protocol: "tcp", HostPort: 4000, VmPort: 80, HostAddress: "0.0.0.0"}}
		}, "port_not_allowed"},
		{"address with an option", func(r req) {
			r.Ports = []*vmmpb.PortMapping{{Protocol: "tcp", HostPort: 4000, VmPort: 80, HostAddress: "127.0.0.1:1-:1,hostfwd=tcp:"}}
		}, "port_invalid"},
		{"unknown protocol", func(r req) {
			r.Ports = []*vmmpb.PortMapping{{Protocol: "sctp", HostPort: 4000, VmPort: 80}}
		}, "port_invalid"},
		{"port that does not fit", func(r req) { r.Ports = []*vmmpb.PortMapping{tcp(4000, 65536+80)} }, "port_invalid"},
		{"port zero", func(r req) { r.Ports = []*vmmpb.PortMapping{tcp(0, 80)} }, "port_invalid"},
		{"locked image that was not uploaded", func(r req) {
			r.ComposeFile = strings.Replace(compose, "{", `{"image_policy":"digest","image_lock":{"app":"`+absent+`"},`, 1)
		}, "blob_missing"},
		{"GPU", func(r req) { r.Gpus = &vmmpb.GpuConfig{AttachMode: "all"} }, "not_supported"},
		{"bridge", func(r req) {
			r.Networks = []*vmmpb.NetworkingConfig{{Mode: "bridge", BridgeName: "br0"}}
		}, "not_supported"},
		{"huge pages", func(r req) { r.Hugepages = true }, "not_supported"},
		{"unknown simulated TEE", func(r req) { r.SimulatedTee = ptr("dstack-x") }, "not_supported"},
		{"too large a user configuration", func(r req) { r.UserConfig = strings.Repeat("x", 2<<20) }, "shared_file_too_large"},
		{"URL that is none", func(r req) { r.KmsUrls = []string{"file:///etc/passwd"} }, "sys_config_malformed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := request()
			tc.spoil(r)
			_, err := w.create(r)
			if fault.Code(err) != tc.code {
				t.Fatalf("%q: %v", fault.Code(err), err)
			}
			if dirs := w.dirs(); !slices.Equal(dirs, []string{otherID}) {
				t.Fatalf("left %v", dirs)
			}
		})
	}
	if _, err := w.create(func() req { r := request(); r.Ports = []*vmmpb.PortMapping{tcp(busyPort, 80)}; return r }()); !strings.Contains(err.Error(), fmt.Sprint(busyPort)) || !strings.Contains(fault.Fix(err), fmt.Sprint(busyPort)) {
		t.Errorf("the error does not name the port: %v, %s", err, fault.Fix(err))
	}
	// A port that was free when the VM was made and is busy when it starts.
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", other.Ports[0].HostPort))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.do("StartVm", otherID); fault.Code(err) != "port_busy" {
		t.Errorf("start: %v", err)
	}
	l.Close()
	w.must("StartVm", otherID)
	for _, id := range []string{"", "..", "../../etc", "a/b", "a\x00b", strings.Repeat("a", 65)} {
		for _, method := range []string{"StartVm", "StopVm", "RemoveVm", "ShutdownVm"} {
			if err := w.do(method, id); fault.Code(err) != "vm_not_found" {
				t.Errorf("%s %q: %v", method, id, err)
			}
		}
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	good := w.opt.args
	for name, tc := range map[string]struct {
		change func()
		code   string
	}{
		"QEMU refuses its arguments": {func() {
			w.opt.args = func(s qemu.Spec) ([]string, error) { return []string{"-no-such-option"}, nil }
		}, "qemu_failed"},
		"arguments cannot be made": {func() {
			w.opt.args = func(s qemu.Spec) ([]string, error) { return nil, fault.New("qemu_argument", "no") }
		}, "qemu_argument"},
		"TEE helper ends":       {func() { w.config.CVM.TEEHelper = "/bin/false" }, "tee_failed"},
		"TEE helper is missing": {func() { w.config.CVM.TEEHelper = "/nonexistent/simtee" }, "tee_helper_missing"},
		"QEMU is missing":       {func() { w.config.CVM.QEMUPath = "/nonexistent/qemu" }, "qemu_missing"},
		"TDX without TDX":       {func() { w.config.CVM.TEE = TEETDX }, "tee_unavailable"},
		"disk is full":          {func() { w.config.CVM.MinFreeDisk = 1 << 60 }, "disk_full"},
		"no more VMs":           {func() { w.config.CVM.MaxVMs = 0 }, "config_value"},
	} {
		t.Run(name, func(t *testing.T) {
			saved := w.config
			defer func() { w.close(); w.config, w.opt.args = saved, good; os.RemoveAll(w.config.CVM.TEEPKI) }()
			tc.change()
			if tc.code == "config_value" {
				if _, err := Open(w.config, w.opt); fault.Code(err) != tc.code {
					t.Fatal(err)
				}
				return
			}
			w.open()
			_, err := w.create(request())
			if fault.Code(err) != tc.code {
				t.Fatalf("%q: %v", fault.Code(err), err)
			}
			if tc.code != "qemu_failed" && tc.code != "tee_failed" && tc.code != "qemu_argument" && fault.Fix(err) == "" {
				t.Error("no fix")
			}
			if dirs, strays := w.dirs(), w.strays(); len(dirs) != 0 || len(strays) != 0 {
				t.Fatalf("left %v %v", dirs, strays)
			}
		})
	}
}

// A disk that is really full.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: mounting a small tmpfs needs root")
	}
	w := newWorld(t, bootDisk(t, "", codeHalt))
	vms := filepath.Join(w.config.StateDir, "vms")
	if err := os.Mkdir(vms, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", vms, "tmpfs", 0, "size=256k,mode=700"); err != nil {
		t.Skipf("SKIP: mount: %v", err)
	}
	defer func() { w.close(); syscall.Unmount(vms, 0) }()
	w.open()
	r := request()
	r.UserConfig = strings.Repeat("x", 400<<10)
	if _, err := w.create(r); fault.Code(err) != "disk_full" || fault.Fix(err) == "" {
		t.Fatalf("%q: %v", fault.Code(err), err)
	}
	if len(w.dirs()) != 0 {
		t.Fatal(w.dirs())
	}
	// It fits when it is made, but not when it starts.
	r.UserConfig = strings.Repeat("x", 150<<10)
	if _, err := w.create(r); fault.Code(err) != "disk_full" {
		t.Fatalf("%q: %v", fault.Code(err), err)
	}
	if len(w.dirs()) != 0 {
		t.Fatal(w.dirs())
	}
}

func TestHalfMadeVMsAreSweptAway(t *testing.T) {
	w := newWorld(t, "")
	half := filepath.Join(w.config.StateDir, "vms", ".tmp-new-3f2504e0", "shared")
	if err := os.MkdirAll(half, 0o700); err != nil {
		t.Fatal(err)
	}
	w.open()
	if len(w.dirs()) != 0 {
		t.Fatal(w.dirs())
	}
}

func TestWhoMayCall(t *testing.T) {
	w := newWorld(t, "")
	c := w.config
	c.Address = "tcp:127.0.0.1:0"
	if _, err := Open(c, Options{}); fault.Code(err) != "listen_needs_token" || fault.Fix(err) == "" {
		t.Fatal(err)
	}
	c.Auth.Tokens = []config.Secret{config.NewSecret("short")}
	if _, err := Open(c, Options{}); fault.Code(err) != "config_value" || strings.Contains(err.Error(), "short") {
		t.Fatal(err)
	}
	w.open()
	if fi, err := os.Stat(filepath.Join(w.config.StateDir, "vmm.sock")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatal(fi.Mode(), err)
	}
	if _, err := Open(w.config, Options{}); fault.Code(err) != "already_running" || fault.Fix(err) == "" {
		t.Fatal(err)
	}
	w.close()
	if err := os.Chmod(w.config.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(w.config, Options{}); fault.Code(err) != "state_dir_open" {
		t.Fatal(err)
	}
	os.Chmod(w.config.StateDir, 0o700)

	const token = "0123456789abcdef-token"
	w.config.Auth.Tokens = []config.Secret{config.NewSecret("another-token-0123"), config.NewSecret(token)}
	w.open()
	srv := httptest.NewServer(w.server.Handler())
	defer srv.Close()
	for _, tc := range []struct {
		name   string
		header [2]string
		path   string
		want   int
	}{
		{"no token", [2]string{}, "/prpc/Version", 401},
		{"no token, logs", [2]string{}, "/logs?id=x", 401},
		{"no token, blobs", [2]string{}, "/blobs/sha256/" + strings.Repeat("0", 64), 401},
		{"token in the URL", [2]string{}, "/prpc/Version?token=" + token, 401},
		{"wrong token", [2]string{"Authorization", "Bearer " + token + "x"}, "/prpc/Version", 401},
		{"empty token", [2]string{"Authorization", "Bearer "}, "/prpc/Version", 401},
		{"other scheme", [2]string{"Authorization", "Basic " + token}, "/prpc/Version", 401},
		{"bearer", [2]string{"Authorization", "Bearer " + token}, "/prpc/Version", 200},
		{"upstream's header", [2]string{"X-Admin-Token", token}, "/prpc/Version", 200},
	} {
		req, _ := http.NewRequest("GET", srv.URL+tc.path, nil)
		if tc.header[0] != "" {
			req.Header.Set(tc.header[0], tc.header[1])
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != tc.want {
			t.Errorf("%s: %d, want %d", tc.name, res.StatusCode, tc.want)
		}
	}
	req, _ := http.NewRequest("POST", srv.URL+"/prpc/Version", nil)
	req.Header.Set("X-Admin-Token", token)
	req.Header.Set("Origin", "https://evil.example")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 403 {
		t.Errorf("a web page's request: %d", res.StatusCode)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestQueries(t *testing.T) {
	w := newWorld(t, "").open()
	for i := range 3 {
		r := request()
		r.Name, r.Stopped = fmt.Sprintf("vm number %d", i), true
		w.mustCreate(r)
	}
	status := func(in *vmmpb.StatusRequest) *vmmpb.StatusResponse {
		t.Helper()
		var out vmmpb.StatusResponse
		if err := w.call("Vmm.Status", in, &out); err != nil {
			t.Fatal(err)
		}
		return &out
	}
	all := status(&vmmpb.StatusRequest{})
	if all.Total != 3 || len(all.Vms) != 3 || all.Vms[0].Name != "vm number 0" || all.Vms[0].Configuration == nil || all.Vms[0].Status != "stopped" {
		t.Fatalf("%+v", all)
	}
	if got := status(&vmmpb.StatusRequest{Keyword: "number 1", Brief: true}); got.Total != 1 || got.Vms[0].Configuration != nil {
		t.Errorf("%+v", got)
	}
	if got := status(&vmmpb.StatusRequest{Ids: []string{all.Vms[2].Id}}); got.Total != 1 || got.Vms[0].Id != all.Vms[2].Id {
		t.Errorf("%+v", got)
	}
	if got := status(&vmmpb.StatusRequest{Page: 2, PageSize: 2}); got.Total != 3 || len(got.Vms) != 1 {
		t.Errorf("%+v", got)
	}
	if got := status(&vmmpb.StatusRequest{Page: 1 << 31, PageSize: 1 << 31}); len(got.Vms) != 0 {
		t.Errorf("%+v", got)
	}
	var hash vmmpb.ComposeHash
	if err := w.call("GetComposeHash", request(), &hash); err != nil || hash.Hash != fmt.Sprintf("%x", sha256.Sum256([]byte(compose))) {
		t.Error(hash.Hash, err)
	}
	if all.Vms[0].AppId != hash.Hash[:40] {
		t.Errorf("app id %s of compose hash %s", all.Vms[0].AppId, hash.Hash)
	}
	os.Mkdir(filepath.Join(w.config.StateDir, "images", "half"), 0o700)
	var images vmmpb.ImageListResponse
	if err := w.call("ListImages", &emptypb.Empty{}, &images); err != nil || len(images.Images) != 2 {
		t.Fatal(&images, err)
	}
	for _, i := range images.Images {
		if i.Name == "half" && !strings.Contains(i.Description, "image_missing") || i.Name == imageName && (i.Version != "0.1.0" || !i.IsDev) {
			t.Errorf("%+v", i)
		}
	}
	var version vmmpb.VersionResponse
	if err := w.call("Version", &emptypb.Empty{}, &version); err != nil || version.Version != "0.0.0" {
		t.Error(&version, err)
	}
	if _, body := w.post("/prpc/GetMeta?json", ""); !strings.Contains(body, `"default_mode":"user"`) {
		t.Error(body)
	}
	// Upstream's JSON dialect, errors with code and fix.
	status400, body := w.post("/prpc/Teepod.StartVm?json", `{"id":"none"}`)
	var e struct{ Error, Code, Fix string }
	if err := json.Unmarshal([]byte(body), &e); err != nil || status400 != 400 || e.Code != "vm_not_found" || e.Fix == "" || e.Error == "" {
		t.Errorf("%d %s", status400, body)
	}
}

// guestEnd plays the guest's end of the hostlink of a VM without QEMU.
type guestEnd struct {
	*testing.T
	v    *vm
	c    *connection
	link *hostlink.Link
}

func newGuestEnd(t *testing.T, composeFile string) (*world, *guestEnd) {
	w := newWorld(t, "").open()
	return w, w.guestEnd(t, composeFile)
}

func (g *guestEnd) http(stream string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return g.link.Open(ctx, stream)
	}}}
}

func (g *guestEnd) get(stream, path string) (int, string) {
	g.Helper()
	res, err := g.http(stream).Get("http://host" + path)
	if err != nil {
		g.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

func (g *guestEnd) notify(event, payload string) error {
	c := prpc.Client{BaseURL: "http://host/api", HTTP: g.http(hostlink.StreamHostAPI)}
	return c.Call(context.Background(), "Notify", &hostapi.Notification{Event: event, Payload: payload}, &emptypb.Empty{})
}

func TestHostAPI(t *testing.T) {
	w, g := newGuestEnd(t, compose)
	host := prpc.Client{BaseURL: "http://host/api", HTTP: g.http(hostlink.StreamHostAPI)}
	var info hostapi.HostInfo
	if err := host.Call(t.Context(), "Info", &emptypb.Empty{}, &info); err != nil || info.Name != "dstack VMM" || info.Version != "0.0.0" {
		t.Fatal(&info, err)
	}
	long := strings.Repeat("é", 4000) // 8000 bytes
	for _, n := range [][2]string{{"boot.progress", "setting up docker"}, {"boot.error", long}, {"shutdown.progress", "stopping"}, {"vm.exit", "forged: no"}, {strings.Repeat("n", 300), "x"}} {
		if err := g.notify(n[0], n[1]); err != nil {
			t.Fatal(err)
		}
	}
	got := w.info(g.v.spec().ID)
	if got.BootProgress != "setting up docker" || got.ShutdownProgress != "stopping" {
		t.Errorf("%+v", got)
	}
	if n := len(got.BootError); n != 4096 || !strings.HasPrefix(long, got.BootError) {
		t.Errorf("boot error of %d bytes: a long one is cut, not lost", n)
	}
	if got.ExitedAt != nil {
		t.Error("the guest forged an event of the VMM")
	}
	before, _ := os.ReadFile(filepath.Join(g.v.shared(), ".instance_info"))
	if err := g.notify("instance.info", `{"instance_id":"`+strings.Repeat("ab", 20)+`"}`); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(filepath.Join(g.v.shared(), ".instance_info")); !bytes.Equal(before, after) {
		t.Error("the guest changed its instance's identity")
	}
	// Reports outlive the VMM.
	g.c.close()
	w.close()
	w.open()
	if again := w.info(g.v.spec().ID); again.BootError != got.BootError || again.BootProgress != got.BootProgress {
		t.Error("the report is lost")
	}
}

func TestSealingKeyIsAskedOfTheLocalProvider(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked, release := make(chan struct{}, 1), make(chan struct{})
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var head [4]byte
			io.ReadFull(conn, head[:])
			body := make([]byte, binary.BigEndian.Uint32(head[:]))
			io.ReadFull(conn, body)
			if string(body) != `{"quote":[1,2,3]}` {
				t.Errorf("asked %s", body)
			}
			asked <- struct{}{}
			<-release
			answer := `{"encrypted_key":[4,5],"provider_quote":[6]}`
			conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(answer))), answer...))
			conn.Close()
		}
	}()
	defer func() { l.Close(); <-served }()
	w := newWorld(t, "")
	w.config.KeyProvider.Port = uint16(l.Addr().(*net.TCPAddr).Port)
	w.open()
	g := w.guestEnd(t, keyed)
	host := prpc.Client{BaseURL: "http://host/api", HTTP: g.http(hostlink.StreamHostAPI)}
	call := func(quote []byte) (*hostapi.GetSealingKeyResponse, error) {
		var out hostapi.GetSealingKeyResponse
		return &out, host.Call(t.Context(), "GetSealingKey", &hostapi.GetSealingKeyRequest{Quote: quote}, &out)
	}
	if _, err := call(nil); fault.Code(err) != "sealing_quote_invalid" {
		t.Error(err)
	}
	got := make(chan error, 1)
	go func() {
		key, err := call([]byte{1, 2, 3})
		if err == nil && (!bytes.Equal(key.EncryptedKey, []byte{4, 5}) || !bytes.Equal(key.ProviderQuote, []byte{6})) {
			err = fmt.Errorf("%v", key)
		}
		got <- err
	}()
	<-asked
	if _, err := call([]byte{1, 2, 3}); fault.Code(err) != "rate_limited" {
		t.Errorf("one guest waits twice: %v", err)
	}
	close(release)
	if err := <-got; err != nil {
		t.Error(err)
	}
	g.c.close()
	w.close()
	w.config.KeyProvider.Enabled = false
	w.open()
	g = w.guestEnd(t, keyed)
	host.HTTP = g.http(hostlink.StreamHostAPI)
	if _, err := call([]byte{1}); fault.Code(err) != "not_supported" {
		t.Error(err)
	}
}

func TestHealthOfTheApp(t *testing.T) {
	w, g := newGuestEnd(t, compose)
	id := g.v.spec().ID
	good := `{"state":"degraded","reason":"web: exit 1","services":{"web":{"restarts":3}}}`
	for _, bad := range []string{"", "degraded", "[]", "null", "{}", `{"state":1}`, `{"state":""}`, `{"state":"ok","state":"bad"}`,
		`{"state":"ok","pad":"` + strings.Repeat("x", maxHealth) + `"}`, `{"state":"ok","a":[[[[[[[[[1]]]]]]]]]}`} {
		if err := g.notify("app.health", bad); fault.Code(err) != "health_malformed" {
			t.Errorf("%.40s: %v", bad, err)
		}
	}
	if h := w.info(id).Health; h != "" {
		t.Errorf("kept %q", h)
	}
	for range 3 { // again and again is one event
		if err := g.notify("app.health", good); err != nil {
			t.Fatal(err)
		}
	}
	info := w.info(id)
	said := 0
	for _, e := range info.Events {
		if e.Event == "app.health" {
			said++
		}
	}
	if info.Health != good || said != 1 {
		t.Errorf("%d events, %q", said, info.Health)
	}
	if err := g.notify("app.health", `{"state":"ok"}`); err != nil || w.info(id).Health != `{"state":"ok"}` {
		t.Error(err)
	}
	// A failure on the way that the boot got over is none.
	g.notify("boot.error", "no route yet")
	if got := w.info(id); got.BootError != "no route yet" {
		t.Errorf("%q", got.BootError)
	}
	g.notify("boot.progress", "done")
	if got := w.info(id); got.BootError != "" || got.BootProgress != "done" {
		t.Errorf("%q", got.BootError)
	}
	// It is of one run.
	g.v.report.absorb(Event{Event: eventExit, Body: codeStopped})
	if h := w.info(id).Health; h != "" {
		t.Errorf("a stopped app is %q", h)
	}
}

func TestNotificationsAreLimited(t *testing.T) {
	w, g := newGuestEnd(t, compose)
	refused := 0
	for i := range 2 * notifyBurst {
		if err := g.notify("boot.progress", fmt.Sprint(i)); fault.Code(err) == "rate_limited" {
			refused++
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if refused == 0 {
		t.Error("no limit")
	}
	if n := len(w.info(g.v.spec().ID).Events); n > w.config.EventBufferSize {
		t.Errorf("%d events", n)
	}
	t.Logf("%d of %d refused", refused, 2*notifyBurst)
}

func TestGuestReachesOnlyItsImagesAndItsTEE(t *testing.T) {
	layer, conf := []byte("a layer"), []byte(`{"architecture":"amd64"}`)
	digest := func(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }
	image := fmt.Appendf(nil, `{"schemaVersion":2,"config":{"digest":%q},"layers":[{"digest":%q}]}`, digest(conf), digest(layer))
	lock := strings.Replace(compose, "{", `{"image_policy":"digest","image_lock":{"app":"`+digest(image)+`"},`, 1)
	if _, err := manifest.Parse([]byte(lock)); err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, "").open()
	for _, b := range [][]byte{layer, conf, image, []byte("secret of another")} {
		req, _ := http.NewRequest("PUT", "http://vmm/blobs/"+strings.Replace(digest(b), ":", "/", 1), bytes.NewReader(b))
		res, err := w.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 201 {
			t.Fatal(res.Status)
		}
	}
	g := w.guestEnd(t, lock)
	if status, body := g.get(hostlink.StreamRegistry, "/v2/app/manifests/"+digest(image)); status != 200 || body != string(image) {
		t.Fatalf("%d %s", status, body)
	}
	if status, body := g.get(hostlink.StreamRegistry, "/v2/app/blobs/"+digest(layer)); status != 200 || body != "a layer" {
		t.Fatalf("%d %s", status, body)
	}
	if status, _ := g.get(hostlink.StreamRegistry, "/v2/app/blobs/"+digest([]byte("secret of another"))); status != 404 {
		t.Fatalf("content of another app: %d", status)
	}
	if status, _ := g.get(hostlink.StreamRegistry, "/v2/app/manifests/latest"); status != 404 {
		t.Fatalf("tag: %d", status)
	}
	// The management API is not on the link.
	if status, _ := g.get(hostlink.StreamRegistry, "/prpc/Status"); status != 404 {
		t.Fatalf("management API: %d", status)
	}
	if _, err := g.link.Open(t.Context(), "vmm"); !errors.Is(err, hostlink.ErrNoStream) {
		t.Fatal(err)
	}
	// TEE: bytes go to the simulated TEE of this VM, which starts late.
	if _, err := g.http(hostlink.StreamTEE).Get("http://tee/registers"); err == nil {
		t.Fatal("a TEE that does not run answered")
	}
	l, err := net.Listen("unix", filepath.Join(g.v.dir, teeSock))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "tee "+r.URL.Path) })}
	go srv.Serve(l)
	defer srv.Close()
	if status, body := g.get(hostlink.StreamTEE, "/registers"); status != 200 || body != "tee /registers" {
		t.Fatalf("%d %s", status, body)
	}
}

func (w *world) guestEnd(t *testing.T, composeFile string) *guestEnd {
	r := request()
	r.Stopped, r.ComposeFile = true, composeFile
	id := w.mustCreate(r)
	v, err := w.server.get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(v.dir, qemu.HostlinkSock))
	if err != nil {
		t.Fatal(err)
	}
	link := hostlink.NewGuestLink(func(ctx context.Context) (io.ReadWriteCloser, error) { return l.Accept() }, hostlink.Options{})
	c, err := newConnection(v, v.state().Run)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.close(); l.Close(); link.Close() })
	return &guestEnd{t, v, c, link}
}

func TestGuestAPIProxyAndShutdown(t *testing.T) {
	w, g := newGuestEnd(t, compose)
	l, err := g.link.Listen(hostlink.StreamGuestAPI)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan bool, 1)
	srv := prpc.Server(prpc.NewMux(nil,
		prpc.Unary("Info", func(context.Context, *emptypb.Empty) (*guestapi.GuestInfo, error) {
			return &guestapi.GuestInfo{Version: "0.6.0"}, nil
		}),
		prpc.Unary("Shutdown", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
			asked <- true
			return nil, nil
		})))
	go srv.Serve(l)
	defer srv.Close()
	g.v.mu.Lock()
	g.v.conn = g.c
	g.v.mu.Unlock()
	defer func() { g.v.mu.Lock(); g.v.conn = nil; g.v.mu.Unlock() }()
	if status, body := w.post("/guest/Info?json", `{"id":"`+g.v.spec().ID+`"}`); status != 200 || !strings.Contains(body, `"version":"0.6.0"`) {
		t.Fatalf("%d %s", status, body)
	}
	if status, body := w.post("/guest/ListContainers?json", `{"id":"`+g.v.spec().ID+`"}`); status != 400 {
		t.Fatalf("%d %s", status, body)
	}
	if status, body := w.post("/guest/Shutdown?json", `{"id":"`+g.v.spec().ID+`"}`); status != 200 || !<-asked {
		t.Fatalf("%d %s", status, body)
	}
	if status, body := w.post("/guest/Info?json", `{"id":"none"}`); status != 400 || !strings.Contains(body, "vm_not_found") {
		t.Fatalf("%d %s", status, body)
	}
}

// A guest that agrees to shut down and then does not: the power is cut in time.
func TestShutdownIsBounded(t *testing.T) {
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt))
	w.config.CVM.ShutdownWait = config.Duration{Duration: 300 * time.Millisecond}
	w.open()
	r := request()
	r.NoTee = true
	id := w.mustCreate(r)
	v, err := w.server.get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	fake := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	defer fake.Close()
	v.mu.Lock()
	v.conn.guest = &prpc.Client{BaseURL: fake.URL, HTTP: fake.Client()}
	v.mu.Unlock()
	w.must("ShutdownVm", id)
	if s := w.info(id).Status; s != "stopping" && s != "stopped" {
		t.Error(s)
	}
	w.untilStatus(id, "stopped")
	w.wantStopped(id)
}

func TestConfigIsChecked(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct{ name, text, code, want string }{
		{"unknown key", "[cvm]\nauto_restart = true\n", "config_unknown_key", "cvm.auto_restart"},
		{"unknown TEE", "cvm.tee = 'sgx'\n", "config_value", "cvm.tee"},
		{"unknown accelerator", "cvm.accel = 'hax'\n", "config_value", "cvm.accel"},
		{"address without form", "address = '0.0.0.0'\n", "config_value", "address"},
		{"address with a name", "address = 'tcp:localhost:80'\n", "config_value", "address"},
		{"open TCP", "address = 'tcp:127.0.0.1:8000'\n", "listen_needs_token", ""},
		{"exposed ports", "cvm.port_mapping.address = '0.0.0.0'\n", "config_value", "expose"},
		{"backward range", "[[cvm.port_mapping.range]]\nprotocol = 'tcp'\nfrom = 9\nto = 8\n", "config_value", "range"},
		{"tap without interface", "cvm.networking.mode = 'tap'\n", "config_value", "networking"},
		{"unknown egress", "cvm.networking.egress = 'closed'\n", "config_value", "egress"},
		{"filtered tap", "[cvm.networking]\negress = 'filtered'\nmode = 'tap'\nifname = 'tap0'\n", "config_value", "tap"},
		{"egress to a name", "cvm.networking.egress_allow = ['localhost:80/tcp']\n", "config_value", "egress_allow"},
		{"egress to everything", "cvm.networking.egress_allow = ['0.0.0.0/0']\n", "config_value", "egress_allow"},
		{"egress to many", "cvm.networking.egress_allow = [" + strings.Repeat("'10.0.0.0/8',", maxEgressAllow+1) + "]\n", "config_value", "egress_allow"},
		{"URL that is none", "cvm.kms_urls = ['kms']\n", "config_value", "cvm.kms_urls"},
		{"state directory too deep", "state_dir = '/" + strings.Repeat("d", 90) + "'\n", "config_value", "too long"},
		{"key provider by name", "key_provider.address = 'localhost'\n", "config_value", "key_provider"},
		{"no events", "event_buffer_size = 0\n", "config_value", "event_buffer_size"},
	} {
		path := filepath.Join(dir, "vmm.toml")
		os.WriteFile(path, []byte(tc.text), 0o600)
		if _, err := LoadConfig(path, nil); fault.Code(err) != tc.code || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %q %v", tc.name, fault.Code(err), err)
		}
	}
	path := filepath.Join(dir, "vmm.toml")
	os.WriteFile(path, []byte("address = 'tcp:127.0.0.1:8000'\nauth.tokens = ['0123456789abcdef']\nstate_dir = '/run/d'\n"), 0o600)
	c, err := LoadConfig(path, []string{"DSTACK_VMM_CVM__TEE=none", "DSTACK_VMM_URL=http://client", "DSTACK_VMM_CVM__PORT_MAPPING__EXPOSE=true"})
	if err != nil || c.CVM.TEE != TEENone || !c.CVM.PortMapping.Expose || c.Image.Path != "/run/d/images" {
		t.Fatal(c, err)
	}
}

func TestTerminalControlIsStripped(t *testing.T) {
	for in, want := range map[string]string{
		"plain\n":                       "plain\n",
		"\x1b[31mred\x1b[0m":            "red",
		"title\x1b]0;evil\x07 after":    "title after",
		"dcs\x1bPq#0\x1b\\ after":       "dcs after",
		"bell\a back\b cr\r del\x7f":    "bell back cr del",
		"open\x1b[31\nnext":             "open\nnext",
		"open\x1b]0;never closed\nnext": "open\nnext",
		"charset\x1b(Bx":                "charsetx",
		"c1 \u009b31m":                  "c1 31m",
		"ünïcode":                       "ünïcode",
	} {
		for _, step := range []int{1, 3, 1000} {
			if step == 1 && strings.Contains(in, "\u009b") {
				continue // a character cut in two is no control character
			}
			var out bytes.Buffer
			s := &stripper{w: &out}
			for b := []byte(in); len(b) > 0; {
				n := min(step, len(b))
				if step == 3 && strings.Contains(in, "\u009b") {
					n = len(b)
				}
				s.Write(b[:n])
				b = b[n:]
			}
			if out.String() != want {
				t.Errorf("%q in steps of %d: %q, want %q", in, step, out.String(), want)
			}
		}
	}
}

func FuzzStripper(f *testing.F) {
	f.Add([]byte("a\x1b[31mb\x1b]0;t\x07c\x1bP\x1b\\d\n\u009b"))
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		(&stripper{w: &out}).Write(in)
		for _, c := range out.Bytes() {
			if c < 0x20 && c != '\n' && c != '\t' || c == 0x7f {
				t.Fatalf("%q lets %#x through", in, c)
			}
		}
		if bytes.Count(out.Bytes(), []byte("\n")) > bytes.Count(in, []byte("\n")) {
			t.Fatal("lines appeared")
		}
	})
}

func TestLogsAreCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 1000 {
		fmt.Fprintf(f, "line %04d\n", i)
	}
	if err := boundLog(path, 500); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "after\n") // the writer goes on at the start, not behind a hole
	if data, _ := os.ReadFile(path); string(data) != "after\n" {
		t.Fatalf("%q", data)
	}
	if old, _ := os.ReadFile(path + ".1"); len(old) != 500 || !bytes.HasSuffix(old, []byte("line 0999\n")) {
		t.Fatalf("%d bytes", len(old))
	}
	tail, end := tailBytes(path, 26)
	if string(tail) != "line 0998\nline 0999\nafter\n" && string(tail) != "line 0998\nline 0999\nafter\n"[len("line 0998\nline 0999\nafter\n")-26:] || end != 6 {
		t.Errorf("%q %d", tail, end)
	}
	if got := lastLines([]byte("a\nb\nc\n"), 2); string(got) != "b\nc\n" {
		t.Errorf("%q", got)
	}
	if got := lastLines([]byte("a\nb"), 1); string(got) != "b" {
		t.Errorf("%q", got)
	}
	if got := lastLines([]byte("a"), 5); string(got) != "a" {
		t.Errorf("%q", got)
	}
	// A link in place of a log is not followed.
	victim := filepath.Join(t.TempDir(), "victim")
	os.WriteFile(victim, bytes.Repeat([]byte("x"), 1000), 0o600)
	link := filepath.Join(t.TempDir(), "link")
	os.Symlink(victim, link)
	boundLog(link, 10)
	if fi, _ := os.Stat(victim); fi.Size() != 1000 {
		t.Error("the target of a link was cut")
	}
}

func TestJournalIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.jsonl")
	j := openJournal(path, func(Event) {})
	_, ch := j.follow()
	for i := range 700 {
		j.add("boot.progress", strings.Repeat("x", 8000)+fmt.Sprint(i))
	}
	if n := len(j.list(5)); n != 5 || len(j.list(1<<20)) != maxRecent {
		t.Errorf("%d in memory", n)
	}
	var total int64
	for _, p := range []string{path, path + ".1"} {
		if fi, err := os.Stat(p); err == nil {
			total += fi.Size()
		}
	}
	if total > 2*maxJournal+10_000 || total == 0 {
		t.Errorf("%d bytes on disk", total)
	}
	n := 0
	for range ch { // a reader that is too slow sees an end
		n++
	}
	if n == 0 || n > 256 {
		t.Errorf("%d events followed", n)
	}
	// A torn line is skipped.
	f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString(`{"time_ms":1,"ev`)
	f.Close()
	count := 0
	openJournal(path, func(Event) { count++ })
	if count == 0 {
		t.Error("nothing read back")
	}
}
