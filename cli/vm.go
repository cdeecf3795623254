// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
)

func listVMs(a *app) ([]*vmmpb.VmInfo, error) {
	if err := a.stack.Require(a.ctx); err != nil {
		return nil, err
	}
	var resp vmmpb.StatusResponse
	if err := a.stack.VMM().Call(a.ctx, "Status", &vmmpb.StatusRequest{}, &resp); err != nil {
		return nil, err
	}
	return resp.Vms, nil
}

// findVM resolves a name, or a VM id or an unambiguous beginning of one.
func findVM(a *app, name string) (*vmmpb.VmInfo, error) {
	vms, err := listVMs(a)
	if err != nil {
		return nil, err
	}
	var byName, byID []*vmmpb.VmInfo
	for _, vm := range vms {
		switch {
		case vm.Name == name:
			byName = append(byName, vm)
		case vm.Id == name || len(name) >= 4 && strings.HasPrefix(vm.Id, name):
			byID = append(byID, vm)
		}
	}
	for _, found := range [][]*vmmpb.VmInfo{byName, byID} {
		switch len(found) {
		case 0:
		case 1:
			return found[0], nil
		default:
			return nil, fault.New("app_ambiguous", "%d apps go by %q", len(found), name).WithFix("give the VM id that `dstack ps` shows")
		}
	}
	return nil, fault.New("app_unknown", "there is no app %q", name).WithFix("`dstack ps` lists the apps")
}

// removeVM asks for the removal and waits until it is done.
func removeVM(a *app, vm *vmmpb.VmInfo) error {
	if err := a.stack.VMM().Call(a.ctx, "RemoveVm", &vmmpb.Id{Id: vm.Id}, nil); err != nil {
		return err
	}
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		var info vmmpb.GetInfoResponse
		if err := a.stack.VMM().Call(a.ctx, "GetInfo", &vmmpb.Id{Id: vm.Id}, &info); err != nil {
			return err
		}
		if !info.Found {
			return nil
		}
	}
	return fault.New("remove_slow", "%s is still being removed after 60 s", vm.Name).WithFix("`dstack ps` shows when it is gone")
}

type psCmd struct{}

func (c *psCmd) Run(a *app) error {
	vms, err := listVMs(a)
	if err != nil {
		return err
	}
	type row struct {
		ID       string   `json:"id"`
		Name     string   `json:"name"`
		Status   string   `json:"status"`
		Progress string   `json:"boot_progress"`
		Error    string   `json:"boot_error,omitempty"`
		Health   string   `json:"health,omitempty"`
		Reason   string   `json:"health_reason,omitempty"`
		Uptime   string   `json:"uptime"`
		AppID    string   `json:"app_id"`
		Ports    []string `json:"ports"`
	}
	rows := []row{}
	for _, vm := range vms {
		state, reason := health(vm)
		rows = append(rows, row{vm.Id, vm.Name, vm.Status, vm.BootProgress, vm.BootError, state, reason, vm.Uptime, vm.AppId, portStrings(vm)})
	}
	if !a.json {
		w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(w, "NAME\tSTATUS\tBOOT\tHEALTH\tUPTIME\tPORTS\tID")
		for _, r := range rows {
			boot := r.Progress
			if r.Error != "" {
				boot = "failed: " + clip(r.Error, 50)
			}
			state := r.Health
			if state == "" {
				state = "-"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", printable(r.Name), r.Status, printable(boot), state, r.Uptime, strings.Join(r.Ports, ","), clip(r.ID, 8))
		}
		return w.Flush()
	}
	return a.result(rows)
}

// health reads the guest's own word on its app: a word, and why it is not well.
func health(vm *vmmpb.VmInfo) (state, reason string) {
	var h struct{ State, Reason string }
	if vm.Health == "" || json.Unmarshal([]byte(vm.Health), &h) != nil {
		return "", ""
	}
	return printable(clip(h.State, 20)), printable(clip(h.Reason, 1000))
}

// unwell says on standard error what is wrong with an app, if anything is.
func unwell(a *app, vm *vmmpb.VmInfo) {
	if vm.BootError != "" {
		a.step("%s %s", a.paint(red, "boot failed:"), printable(clip(vm.BootError, 1000)))
	}
	if state, reason := health(vm); reason != "" {
		a.step("%s %s", a.paint(amber, "the app is "+state+":"), reason)
	}
}

func portStrings(vm *vmmpb.VmInfo) []string {
	out := []string{}
	if vm.Configuration == nil {
		return out
	}
	for _, p := range vm.Configuration.Ports {
		out = append(out, fmt.Sprintf("%s:%d->%d/%s", p.HostAddress, p.HostPort, p.VmPort, p.Protocol))
	}
	return out
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}

// printable keeps what a guest or manifest chose from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

type logsCmd struct {
	Name   string `arg:"" help:"App name or VM id."`
	Follow bool   `short:"f" help:"Go on as lines come."`
	Lines  int    `short:"n" help:"Lines from the end." default:"200"`
	Stderr bool   `help:"QEMU's own messages instead of the guest's console."`
}

func (c *logsCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	ch := "serial"
	if c.Stderr {
		ch = "stderr"
	}
	q := url.Values{"id": {vm.Id}, "follow": {fmt.Sprint(c.Follow)}, "ansi": {"false"}, "lines": {fmt.Sprint(c.Lines)}, "ch": {ch}}
	req, err := http.NewRequestWithContext(a.ctx, http.MethodGet, "http://vmm/logs?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := a.stack.HTTP().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fault.New("logs", "the VMM refused: %s", strings.TrimSpace(string(text)))
	}
	if _, err := io.Copy(a.out, resp.Body); err != nil && a.ctx.Err() == nil {
		return err
	}
	unwell(a, vm)
	return nil
}

type infoCmd struct {
	Name string `arg:"" help:"App name or VM id."`
}

func (c *infoCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	instance := ""
	if vm.InstanceId != nil {
		instance = *vm.InstanceId
	}
	out := map[string]any{
		"id": vm.Id, "name": vm.Name, "status": vm.Status, "uptime": vm.Uptime, "app_id": vm.AppId,
		"instance_id": instance, "boot_progress": vm.BootProgress, "boot_error": vm.BootError,
		"image_version": vm.ImageVersion, "ports": portStrings(vm),
	}
	out["health"], out["health_reason"] = health(vm)
	if vm.UpdatePending {
		out["update"] = "at the next start"
	}
	events := []map[string]any{}
	for _, e := range vm.Events {
		events = append(events, map[string]any{"event": e.Event, "body": e.Body, "timestamp_ms": e.Timestamp})
	}
	out["events"] = events
	if vm.Configuration != nil {
		out["image"], out["vcpu"], out["memory_mb"], out["disk_gb"] = vm.Configuration.Image, vm.Configuration.Vcpu, vm.Configuration.Memory, vm.Configuration.DiskSize
	}
	if a.json {
		return a.result(out)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, k := range []string{"name", "status", "uptime", "boot_progress", "boot_error", "health", "health_reason", "update", "id", "app_id", "instance_id", "image", "image_version", "vcpu", "memory_mb", "disk_gb"} {
		if v := fmt.Sprint(out[k]); v != "" && out[k] != nil {
			fmt.Fprintf(w, "%s\t%s\n", k, printable(v))
		}
	}
	fmt.Fprintf(w, "ports\t%s\n", strings.Join(portStrings(vm), ", "))
	for _, e := range vm.Events {
		fmt.Fprintf(w, "event\t%s  %s %s\n", time.UnixMilli(int64(e.Timestamp)).UTC().Format(time.TimeOnly), printable(e.Event), printable(clip(e.Body, 160)))
	}
	return w.Flush()
}

type stopCmd struct {
	Name  string `arg:"" help:"App name or VM id."`
	Force bool   `short:"f" help:"Cut the power instead of asking the guest to shut down."`
}

func (c *stopCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	method := "ShutdownVm"
	if c.Force {
		method = "StopVm"
	}
	if err := stopVM(a, vm, method); err != nil {
		return err
	}
	a.step("%s is stopped", vm.Name)
	return a.result(map[string]any{"id": vm.Id, "status": "stopped"})
}

// stopVM stops a VM by ShutdownVm or StopVm and waits until it has.
func stopVM(a *app, vm *vmmpb.VmInfo, method string) error {
	if err := a.stack.VMM().Call(a.ctx, method, &vmmpb.Id{Id: vm.Id}, nil); err != nil {
		return err
	}
	for deadline := time.Now().Add(90 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		var info vmmpb.GetInfoResponse
		if err := a.stack.VMM().Call(a.ctx, "GetInfo", &vmmpb.Id{Id: vm.Id}, &info); err != nil {
			return err
		}
		if info.Info == nil || info.Info.Status == "stopped" || info.Info.Status == "exited" {
			return nil
		}
	}
	return fault.New("stop_slow", "%s did not shut down within 90 s", vm.Name).WithFix("dstack stop --force %s", vm.Name)
}

type startCmd struct {
	Name    string        `arg:"" help:"App name or VM id."`
	Timeout time.Duration `help:"How long to wait for the app." default:"5m"`
}

func (c *startCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if err != nil {
		return err
	}
	since := time.Now()
	if err := a.stack.VMM().Call(a.ctx, "StartVm", &vmmpb.Id{Id: vm.Id}, nil); err != nil {
		return err
	}
	if err := watchBoot(a, vm.Id, since, c.Timeout); err != nil {
		return err
	}
	return a.result(map[string]any{"id": vm.Id, "status": "running"})
}

type rmCmd struct {
	Name  string `arg:"" help:"App name or VM id."`
	Force bool   `short:"f" help:"Remove it even while it runs; say nothing when there is none."`
}

func (c *rmCmd) Run(a *app) error {
	vm, err := findVM(a, c.Name)
	if fault.Code(err) == "app_unknown" && c.Force {
		return a.result(map[string]any{"removed": false})
	}
	if err != nil {
		return err
	}
	if vm.Status == "running" && !c.Force {
		return fault.New("app_running", "%s is running", vm.Name).WithFix("dstack stop %s, or dstack rm --force %s", c.Name, c.Name)
	}
	if err := removeVM(a, vm); err != nil {
		return err
	}
	a.step("%s is removed", vm.Name)
	return a.result(map[string]any{"removed": true, "id": vm.Id})
}

// watchBoot shows the phases of a boot as they come and returns when the app
// runs, or an error that names the phase's reason.
func watchBoot(a *app, id string, since time.Time, timeout time.Duration) error {
	phases := phaseView{app: a, since: uint64(since.Add(-time.Second).UnixMilli()), seen: map[string]bool{}}
	deadline := time.Now().Add(timeout)
	var failed time.Time
	for time.Now().Before(deadline) {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		var resp vmmpb.GetInfoResponse
		if err := a.stack.VMM().Call(a.ctx, "GetInfo", &vmmpb.Id{Id: id}, &resp); err != nil {
			return err
		}
		if !resp.Found || resp.Info == nil {
			return fault.New("app_gone", "the VM was removed while it booted")
		}
		vm := resp.Info
		for _, e := range vm.Events {
			phases.show(e)
		}
		if vm.BootError != "" {
			if failed.IsZero() {
				failed = time.Now()
			}
			// It is about to power off; a start before it has would find it running.
			if on := vm.Status != "exited" && vm.Status != "stopped"; !on || time.Since(failed) > powerOff {
				return bootFailure(a, id, vm.BootError)
			}
			time.Sleep(150 * time.Millisecond)
			continue
		}
		if vm.BootProgress == "done" && vm.Status == "running" {
			return nil
		}
		if vm.Status == "exited" || vm.Status == "stopped" {
			return bootFailure(a, id, "vm_exited: the VM ended before the app ran")
		}
		time.Sleep(150 * time.Millisecond)
	}
	return fault.New("boot_timeout", "the app did not come up within %v", timeout).WithFix("dstack logs %s shows how far it got; a slow machine needs --timeout", clip(id, 8))
}

// powerOff is how long a guest may take to end after its boot has failed.
const powerOff = 15 * time.Second

// phaseView prints each phase of a boot when the next one begins, with the time
// that passed at the host in between.
type phaseView struct {
	app   *app
	since uint64
	seen  map[string]bool
	name  string
	began uint64 // milliseconds since 1970
}

func (v *phaseView) show(e *vmmpb.GuestEvent) {
	key := fmt.Sprint(e.Timestamp, e.Event, e.Body)
	if e.Event != "boot.progress" || e.Timestamp < v.since || v.seen[key] {
		return
	}
	v.seen[key] = true
	if v.name != "" {
		v.app.step("%-22s %s", printable(clip(v.name, 40)), v.app.paint(dim, fmt.Sprintf("%5d ms", e.Timestamp-v.began)))
	}
	v.name, v.began = e.Body, e.Timestamp
}

func bootFailure(a *app, id, reason string) error {
	code, text, ok := strings.Cut(reason, ": ")
	if !ok || strings.ContainsAny(code, " \t") {
		code, text = "boot_failed", reason
	}
	return fault.New(code, "the VM stopped while booting: %s", printable(text)).WithFix("dstack logs %s", clip(id, 8))
}
