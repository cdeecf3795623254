// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/vmm/qemu"
)

func freePort(t testing.TB) uint32 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

func TestLifeOverTheSocket(t *testing.T) {
	w := newWorld(t, bootDisk(t, "hello from the guest\r\n\x1b[31mred\r\n", codeHalt)).open()
	req := request()
	req.Ports = []*vmmpb.PortMapping{{Protocol: "tcp", HostPort: freePort(t), VmPort: 80}}
	id := w.mustCreate(req)
	info := w.info(id)
	if info.Status != "running" || info.Uptime == "never" || info.AppId == "" || info.InstanceId == nil || info.BootProgress != "booting" {
		t.Fatalf("%+v", info)
	}
	q1, tee1 := w.holders(id)
	if q1 == nil || tee1 == nil {
		t.Fatal("QEMU or TEE does not run")
	}
	for _, name := range []string{qemu.QMPSock, qemu.HostlinkSock, qemu.DataDisk, qemu.SharedDisk} {
		fi, err := os.Stat(filepath.Join(w.dir(id), name))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().IsRegular() && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, fi.Mode())
		}
	}
	if fi, _ := os.Stat(filepath.Join(w.dir(id), qemu.DataDisk)); fi.Size() != 1<<30 || fi.Sys().(*syscall.Stat_t).Blocks > 64 {
		t.Errorf("data disk: %d bytes, %d blocks", fi.Size(), fi.Sys().(*syscall.Stat_t).Blocks)
	}
	w.until("the guest's words are in the log", func() bool {
		_, text := w.get("/logs?id=" + id)
		return strings.Contains(text, "hello from the guest\nred")
	})
	if _, raw := w.get("/logs?ansi=true&id=" + id); !strings.Contains(raw, "\x1b[31m") {
		t.Error("ansi=true strips")
	}
	if _, tail := w.get("/logs?lines=1&id=" + id); tail != "red\n" {
		t.Errorf("last line %q", tail)
	}
	if status, _ := w.get("/logs?ch=nvram&id=" + id); status != 400 {
		t.Errorf("unknown channel: %d", status)
	}
	if status, _ := w.get("/logs?id=.."); status != 404 {
		t.Errorf("traversal: %d", status)
	}

	w.must("StartVm", id) // runs already
	if q, _ := w.holders(id); q == nil || *q != *q1 {
		t.Fatal("a second QEMU")
	}
	w.must("StopVm", id)
	w.wantStopped(id)
	if s := w.info(id).Status; s != "stopped" {
		t.Fatal(s)
	}
	w.must("StartVm", id)
	if q, tee := w.holders(id); q == nil || tee == nil || *q == *q1 || *tee == *tee1 {
		t.Fatal("no new processes")
	}
	// The TEE's state is that of a new machine: one start, not two.
	if starts, err := os.ReadFile(filepath.Join(w.dir(id), teeState, "starts")); err != nil || bytes.Count(starts, []byte("\n")) != 1 {
		t.Fatalf("%q %v", starts, err)
	}

	_, events := w.get("/events?id=" + id)
	var names []string
	for line := range strings.Lines(events) {
		var e Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		names = append(names, e.Event)
	}
	if got := strings.Join(names, " "); got != "vm.created vm.start vm.exit vm.start" {
		t.Errorf("events %s", got)
	}

	w.must("RemoveVm", id)
	w.until("the VM is gone", func() bool { return w.info(id) == nil })
	if dirs, strays := w.dirs(), w.strays(); len(dirs) != 0 || len(strays) != 0 {
		t.Fatalf("left: %v %v", dirs, strays)
	}
	if err := w.do("RemoveVm", id); fault.Code(err) != "vm_not_found" {
		t.Fatal(err)
	}
}

func TestWhatTheGuestIsGiven(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	req := request()
	req.ComposeFile = `{"manifest_version":2,"name":"app","runner":"docker-compose","docker_compose_file":"services: {}","key_provider":"kms","key_provider_id":"33333333"}`
	req.UserConfig, req.EncryptedEnv = "user text", []byte{1, 2, 3}
	req.KmsUrls = []string{"https://kms.example:8000"}
	app := strings.Repeat("11", 20)
	req.AppId = &app
	id := w.mustCreate(req)
	f, err := os.Open(filepath.Join(w.dir(id), qemu.SharedDisk))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files, err := hostshare.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	if string(files[hostshare.AppComposeName]) != req.ComposeFile || string(files[hostshare.UserConfigName]) != "user text" || !bytes.Equal(files[hostshare.EncryptedEnvName], req.EncryptedEnv) {
		t.Fatalf("%q", files)
	}
	sys, err := hostshare.ParseSysConfig(files[hostshare.SysConfigName])
	if err != nil {
		t.Fatal(err)
	}
	vc, err := measure.ParseVMConfig([]byte(sys.VMConfig))
	if err != nil {
		t.Fatal(err)
	}
	if vc.CPUCount != 1 || vc.MemorySize != 128<<20 || len(vc.OSImageHash) != 64 || vc.Image != imageName {
		t.Errorf("%+v", vc)
	}
	if sys.Network.Address.String() != "10.0.2.15/24" || len(sys.KMSURLs) != 1 || sys.KMSURLs[0] != req.KmsUrls[0] {
		t.Errorf("%+v", sys)
	}
	info, err := hostshare.ParseInstanceInfo(files[hostshare.InstanceInfoName])
	if err != nil {
		t.Fatal(err)
	}
	if *info.InstanceID != instanceID(info.InstanceIDSeed, *info.AppID) || info.AppID.String() != app {
		t.Errorf("%+v", info)
	}
	doc, err := mrconfig.Parse([]byte(sys.MRConfig))
	if err != nil {
		t.Fatal(err)
	}
	m, _ := manifest.Parse([]byte(req.ComposeFile))
	if *doc.AppID != *info.AppID || doc.ComposeHash != m.Hash() || *doc.InstanceID != *info.InstanceID || doc.KeyProvider != "kms" || fmt.Sprintf("%x", doc.KeyProviderID) != "33333333" {
		t.Errorf("%+v", doc)
	}
	var launch launchSpec
	data, _ := os.ReadFile(filepath.Join(w.dir(id), teeLaunch))
	if err := json.Unmarshal(data, &launch); err != nil {
		t.Fatal(err)
	}
	if launch.MRConfigID != mrconfig.IDv3([]byte(sys.MRConfig)) || launch.VCPUs != 1 || launch.MemoryBytes != 128<<20 || !strings.HasPrefix(launch.Kernel, "/") || launch.Debug {
		t.Errorf("%+v", launch)
	}
	// With keys that survive, so does the instance.
	w.must("StopVm", id)
	w.must("StartVm", id)
	if again := w.info(id); *again.InstanceId != info.InstanceID.String() {
		t.Error("the instance id changed")
	}
	if c := w.info(id).Configuration; len(c.EncryptedEnv) != 0 || c.UserConfig != "" || c.ComposeFile != req.ComposeFile {
		t.Error("the configuration tells too much or too little")
	}
	// Without, each boot is a new instance.
	id2 := w.mustCreate(request())
	first := *w.info(id2).InstanceId
	w.must("StopVm", id2)
	w.must("StartVm", id2)
	if *w.info(id2).InstanceId == first {
		t.Error("an instance whose keys are gone keeps its id")
	}
}

func TestVectors(t *testing.T) {
	if got := macOf("vm-123"); got != "96:b1:d8:b9:08:e6" {
		t.Error(got)
	}
	app, _ := dstack.ParseAppID(strings.Repeat("11", 20))
	seed := make([]byte, 20)
	for i := range seed {
		seed[i] = byte(i)
	}
	if got := instanceID(seed, app).String(); got != "304a02cbeb1d898a28b39535a043b9e4f4175def" {
		t.Error(got)
	}
	for d, want := range map[time.Duration]string{0: "0s", 61 * time.Second: "1m 1s", 25*time.Hour + 3*time.Second: "1d 1h 3s", -time.Second: "0s"} {
		if got := humantime(d); got != want {
			t.Errorf("%v: %q", d, got)
		}
	}
}

func TestWhyAGuestEnded(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		code       []byte
		status     string
		want       string
	}{
		{"power off", "bye", codePowerOff, "exited", ""},
		{"reboot", "again", codeReset, "exited", "guest_reset: "},
		{"panic", "[ 1.0] Kernel panic - not syncing: \x1b]0;evil\x07Attempted", codeReset, "exited", "guest_panic: the guest's kernel panicked: [ 1.0] Kernel panic"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, bootDisk(t, tc.text+"\r\n", tc.code)).open()
			req := request()
			req.NoTee = true
			id, err := w.create(req)
			if err != nil { // it may end before it was seen to run
				t.Fatal(err)
			}
			w.untilStatus(id, tc.status)
			info := w.info(id)
			if !strings.HasPrefix(info.BootError, tc.want) || tc.want == "" && info.BootError != "" || strings.ContainsAny(info.BootError, "\x1b\x07") {
				t.Errorf("%q, want %q", info.BootError, tc.want)
			}
			if info.ExitedAt == nil {
				t.Error("no time of exit")
			}
			w.wantStopped(id)
			// It can be started again, and the reason survives a restart of the VMM.
			w.close()
			w.open()
			if again := w.info(id); again.Status != tc.status || again.BootError != info.BootError {
				t.Errorf("after a restart: %s %q", again.Status, again.BootError)
			}
		})
	}
}

func TestVMsOutliveTheVMM(t *testing.T) {
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	id := w.mustCreate(request())
	q1, tee1 := w.holders(id)
	w.close()
	if !q1.Running() || !tee1.Running() {
		t.Fatal("the VM ended with the VMM")
	}
	w.open()
	w.untilStatus(id, "running")
	if q, tee := w.holders(id); *q != *q1 || *tee != *tee1 {
		t.Fatal("other processes")
	}
	w.must("StopVm", id)
	w.wantStopped(id)
	w.must("StartVm", id)
	q2, tee2 := w.holders(id)

	// QEMU ends while no VMM runs.
	w.close()
	q2.Signal(syscall.SIGKILL)
	w.until("QEMU is dead", func() bool { return !q2.Running() })
	w.open()
	w.untilStatus(id, "exited")
	if e := w.info(id).BootError; !strings.HasPrefix(e, "ended_while_away: ") {
		t.Errorf("reason %q", e)
	}
	w.until("the TEE ends with its VM", func() bool { return !tee2.Running() })
	w.must("StartVm", id)

	// QEMU is killed while the VMM watches an adopted one.
	w.close()
	w.open()
	w.untilStatus(id, "running")
	q3, _ := w.holders(id)
	q3.Signal(syscall.SIGKILL)
	w.untilStatus(id, "exited")
	if e := w.info(id).BootError; !strings.HasPrefix(e, "qemu_ended: ") {
		t.Errorf("reason %q", e)
	}
}

func TestTEEIsRestartedOnItsState(t *testing.T) {
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	id := w.mustCreate(request())
	q1, tee1 := w.holders(id)
	starts := func() int {
		data, _ := os.ReadFile(filepath.Join(w.dir(id), teeState, "starts"))
		return bytes.Count(data, []byte("\n"))
	}
	tee1.Signal(syscall.SIGKILL)
	w.until("the TEE runs again on the same state", func() bool {
		_, tee := w.holders(id)
		return tee != nil && *tee != *tee1 && starts() == 2
	})
	// Also when it ends while the VMM is away.
	_, tee2 := w.holders(id)
	w.close()
	tee2.Signal(syscall.SIGKILL)
	w.until("the TEE is dead", func() bool { return !tee2.Running() })
	w.open()
	w.until("the TEE runs again", func() bool { _, tee := w.holders(id); return tee != nil && starts() == 3 })
	if q, _ := w.holders(id); q == nil || *q != *q1 {
		t.Fatal("another QEMU")
	}
}

func TestFloodOnTheConsoleIsBounded(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeFlood))
	const limit = 64 << 10
	w.config.CVM.Log.MaxBytes = limit
	w.open()
	req := request()
	req.NoTee = true
	id := w.mustCreate(req)
	path := filepath.Join(w.dir(id), qemu.SerialLog)
	rotated := func() bool { fi, err := os.Stat(path + ".1"); return err == nil && fi.Size() > 0 }
	w.until("the log was cut", rotated)
	var most int64
	for range 20 {
		time.Sleep(100 * time.Millisecond)
		for _, p := range []string{path, path + ".1"} {
			if fi, err := os.Stat(p); err == nil {
				most = max(most, fi.Size())
			}
		}
	}
	if most > 64*limit {
		t.Errorf("a log of %d bytes", most)
	}
	t.Logf("largest log %d bytes at a limit of %d", most, limit)
	if status, text := w.get("/logs?lines=10&id=" + id); status != 200 || len(text) == 0 {
		t.Errorf("%d, %d bytes", status, len(text))
	}
	w.must("StopVm", id)
}

func TestFollowedLogEndsWithTheClient(t *testing.T) {
	w := newWorld(t, bootDisk(t, "first\r\n", codeHalt)).open()
	req := request()
	req.NoTee = true
	id := w.mustCreate(req)
	res, err := w.http.Get("http://vmm/logs?follow=true&id=" + id)
	if err != nil {
		t.Fatal(err)
	}
	sc := bufio.NewScanner(res.Body)
	for sc.Scan() && sc.Text() != "first" {
	}
	f, err := os.OpenFile(filepath.Join(w.dir(id), qemu.SerialLog), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, "second")
	f.Close()
	if !sc.Scan() || sc.Text() != "second" {
		t.Fatalf("%q", sc.Text())
	}
	events, err := w.http.Get("http://vmm/events?follow=true&id=" + id)
	if err != nil {
		t.Fatal(err)
	}
	w.must("StopVm", id)
	es := bufio.NewScanner(events.Body)
	for es.Scan() && !strings.Contains(es.Text(), "vm.exit") {
	}
	if !strings.Contains(es.Text(), "vm.exit") {
		t.Error("no event of the stop")
	}
	w.close() // ends both streams; the leak check sees what does not
	for sc.Scan() {
	}
	res.Body.Close()
	events.Body.Close()
}

func TestShutdownOfADeafGuestCutsThePower(t *testing.T) {
	defer func(d time.Duration) { guestCallLimit = d }(guestCallLimit)
	guestCallLimit = 500 * time.Millisecond
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	id := w.mustCreate(request())
	w.must("ShutdownVm", id)
	w.untilStatus(id, "stopped")
	w.wantStopped(id)
	if status, body := w.post("/guest/Info?json", `{"id":"`+id+`"}`); status != 400 || !strings.Contains(body, "vm_not_running") {
		t.Errorf("%d %s", status, body)
	}
}

func (w *world) post(path, body string) (int, string) {
	w.t.Helper()
	res, err := w.http.Post("http://vmm"+path, "application/json", strings.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	var out bytes.Buffer
	out.ReadFrom(res.Body)
	return res.StatusCode, out.String()
}

func TestBrokenVMIsLeftAlone(t *testing.T) {
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	id := w.mustCreate(request())
	q, tee := w.holders(id)
	w.close()
	path := filepath.Join(w.dir(id), specFile)
	good, _ := os.ReadFile(path)
	if err := os.WriteFile(path, good[:len(good)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	info := w.info(id)
	if info == nil || info.Status != "broken" || !strings.Contains(info.BootError, specFile) {
		t.Fatalf("%+v", info)
	}
	var list vmmpb.StatusResponse
	if err := w.call("Status", &vmmpb.StatusRequest{}, &list); err != nil || len(list.Vms) != 1 || list.Vms[0].Status != "broken" {
		t.Fatal(&list, err)
	}
	for _, method := range []string{"StartVm", "StopVm", "RemoveVm"} {
		if err := w.do(method, id); fault.Code(err) != "vm_broken" || fault.Fix(err) == "" {
			t.Errorf("%s: %v", method, err)
		}
	}
	if !q.Running() || !tee.Running() {
		t.Fatal("it was killed")
	}
	// Mended, it is adopted again.
	w.close()
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	w.untilStatus(id, "running")
	// Broken and at rest, it can be removed on request.
	w.must("StopVm", id)
	w.close()
	os.WriteFile(path, []byte("{}"), 0o600)
	w.open()
	w.must("RemoveVm", id)
	if len(w.dirs()) != 0 || w.info(id) != nil {
		t.Fatal(w.dirs())
	}
}

// A VMM killed with SIGKILL at every point that matters, in real processes: no
// orphan, no second QEMU, no register state met twice, and the last wish holds.
func TestKilledVMM(t *testing.T) {
	disk := bootDisk(t, "up\r\n", codeHalt)
	points := []int{2, 5, 7}
	if os.Getenv("DSTACK_SOAK") != "" {
		points = []int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	}
	for _, n := range points {
		t.Run(fmt.Sprintf("point %d", n), func(t *testing.T) {
			w := newWorld(t, disk).open()
			req := request()
			req.Stopped = true
			id := w.mustCreate(req)
			w.close()
			// What happens before the crash: start, stop, start again.
			out := w.killed(disk, n, func() {
				if w.do("StartVm", id) == nil && w.do("StopVm", id) == nil {
					w.do("StartVm", id)
				}
			})
			t.Logf("killed after: %s", out)
			before, _ := w.holders(id)
			w.open()
			w.until("settled", func() bool { s := w.info(id).Status; return s == "running" || s == "stopped" || s == "exited" })
			info := w.info(id)
			q, tee := w.holders(id)
			if (info.Status == "running") != (q != nil) || (q != nil) != (tee != nil) {
				t.Fatalf("%s, but QEMU %v, TEE %v", info.Status, q, tee)
			}
			if q != nil && before != nil && *q != *before {
				t.Fatal("QEMU that ran was replaced")
			}
			if n := len(w.strays()); info.Status == "running" && n != 2 || info.Status != "running" && n != 0 {
				t.Fatalf("%s with %v", info.Status, w.strays())
			}
			if q != nil {
				if starts, _ := os.ReadFile(filepath.Join(w.dir(id), teeState, "starts")); bytes.Count(starts, []byte("\n")) != 1 {
					t.Fatalf("the TEE's state was used before: %q", starts)
				}
			}
			w.must("StartVm", id)
			w.must("RemoveVm", id)
			w.until("gone", func() bool { return w.info(id) == nil })
			if s := w.strays(); len(s) != 0 || len(w.dirs()) != 0 {
				t.Fatalf("left %v %v", s, w.dirs())
			}
		})
	}
}

// killed runs a VMM in another process, with a crash at the n-th point, while do
// talks to it. It returns the points passed.
func (w *world) killed(disk string, n int, do func()) string {
	w.t.Helper()
	cmd := exec.Command(os.Args[0], w.config.StateDir, disk)
	cmd.Env = append(os.Environ(), roleEnv+"=vmm", fmt.Sprintf("%s=%d", crashEnv, n))
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	stderr := &bytes.Buffer{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	var out strings.Builder
	sc := bufio.NewScanner(stdout)
	for sc.Scan() {
		fmt.Fprintln(&out, sc.Text())
		if sc.Text() == "listening" {
			go do()
		}
	}
	err = cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		w.t.Fatalf("the VMM was not killed: %v\n%s%s", err, out.String(), stderr)
	}
	return out.String()
}

// QEMU was started, its VMM died before it could say so, and then QEMU died: the
// TEE's registers may have been extended, so this run must not be continued.
func TestInterruptedStartBeginsAnew(t *testing.T) {
	w := newWorld(t, bootDisk(t, "up\r\n", codeHalt)).open()
	req := request()
	req.Stopped = true
	id := w.mustCreate(req)
	w.close()
	for name, text := range map[string]string{
		stateFile:            `{"state":{"phase":"starting-qemu","started":true,"has_tee":true,"run":1},"pending":[{"do":"start qemu","run":1}]}`,
		qemuRecord:           `{"pid":0,"start_ticks":0,"run":1}`,
		teeState + "/starts": "used\n",
	} {
		path := filepath.Join(w.dir(id), name)
		os.MkdirAll(filepath.Dir(path), 0o700)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.open()
	w.untilStatus(id, "running")
	rec, err := loadRecord(w.dir(id))
	if err != nil || rec.State.Run != 2 {
		t.Fatalf("%+v %v", rec, err)
	}
	if starts, _ := os.ReadFile(filepath.Join(w.dir(id), teeState, "starts")); bytes.Contains(starts, []byte("used")) {
		t.Fatal("the TEE's used state was kept")
	}
}
