// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
)

// dashboardText escapes every value for the place it stands in (html/template):
// the names of app, containers and machine are attacker-controlled.
//
//go:embed dashboard.html
var dashboardText string

const dashboardStyle = `body{font-family:sans-serif;margin:2em;max-width:70em}th{text-align:left;vertical-align:top;padding-right:2em}td{overflow-wrap:anywhere}textarea{width:100%;height:30em}`

var (
	dashboardPage   = template.Must(template.New("dashboard").Parse(dashboardText))
	dashboardPolicy = func() string {
		sum := sha256.Sum256([]byte(dashboardStyle))
		return "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}()
)

// containerList remembers the containers for a moment: strangers ask, and each
// answer costs init a call to the engine.
type containerList struct {
	mu   sync.Mutex
	at   time.Time
	list []initrpc.Container
	err  error
}

const (
	containersAge     = 2 * time.Second
	containersTimeout = 5 * time.Second
)

func (l *containerList) get(ctx context.Context, init Init) ([]initrpc.Container, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.at.IsZero() || time.Since(l.at) > containersAge {
		// Of the request that asks only its values: its end must not spoil the
		// answer for those that wait for it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), containersTimeout)
		defer cancel()
		l.list, l.err = init.Containers(ctx)
		l.at = time.Now()
	}
	return l.list, l.err
}

// statusMemo remembers init's status for as long.
type statusMemo struct {
	mu     sync.Mutex
	at     time.Time
	status initrpc.Status
}

// get returns the status, or what is known when init does not answer: nothing.
func (m *statusMemo) get(ctx context.Context, init Init) initrpc.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.at.IsZero() || time.Since(m.at) > containersAge {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), containersTimeout)
		defer cancel()
		status, err := init.Status(ctx)
		if err != nil {
			status = initrpc.Status{}
		}
		m.status, m.at = status, time.Now()
	}
	return m.status
}

// stateText says how far boot has come. Why it failed may quote what is not public.
func stateText(s initrpc.Status, detailed bool) string {
	switch {
	case s.Failed != "" && detailed:
		return "failed: " + s.Failed
	case s.Failed != "":
		return "failed"
	case s.Ready:
		return "ready"
	case s.Phase != "":
		return "starting: " + s.Phase
	}
	return "unknown"
}

type dashboardRow struct{ Name, Value, Link string }

func (a *Agent) serveDashboard(w http.ResponseWriter, r *http.Request) {
	p := a.state.Load().info.public
	page := struct {
		Style      template.CSS
		AppName    string
		Rows       []dashboardRow
		Sysinfo    []dashboardRow
		Containers []dashboardRow
		EngineDown bool
		TCBInfo    string
	}{Style: dashboardStyle, AppName: p.AppName, TCBInfo: p.TcbInfo}
	add := func(name, value string) { page.Rows = append(page.Rows, dashboardRow{Name: name, Value: value}) }
	status := a.statuses.get(r.Context(), a.init)
	add("State", stateText(status, a.manifest.PublicSysinfo))
	add("App ID", hex.EncodeToString(p.AppId))
	add("Instance ID", hex.EncodeToString(p.InstanceId))
	add("Device ID", hex.EncodeToString(p.DeviceId))
	add("Key provider", p.KeyProviderInfo)
	if text := a.leaseText(); text != "" {
		add("Lease of the KMS", text)
	}
	if p.CloudVendor != "" || p.CloudProduct != "" {
		add("Machine provider (said by the host)", p.CloudVendor+" ("+p.CloudProduct+")")
	}
	if a.manifest.PublicSysinfo {
		page.Sysinfo = sysinfoRows(systemInfo(a.disks))
		if status.Health != "" {
			page.Sysinfo = append(page.Sysinfo, dashboardRow{Name: "Health", Value: status.Health})
		}
	}
	list, err := a.containers.get(r.Context(), a.init)
	page.EngineDown = err != nil
	for _, c := range list {
		name := c.ID
		if len(c.Names) > 0 {
			name = strings.TrimPrefix(c.Names[0], "/")
		}
		row := dashboardRow{Name: name, Value: c.Status}
		if a.manifest.PublicLogs {
			row.Link = "/logs/" + url.PathEscape(name) + "?text&bare&timestamps&follow&tail=20"
		}
		page.Containers = append(page.Containers, row)
	}
	var body bytes.Buffer
	if err := dashboardPage.Execute(&body, page); err != nil {
		a.log.Error("dashboard", "error", err)
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", dashboardPolicy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Length", strconv.Itoa(body.Len()))
	w.Write(body.Bytes())
}

func sysinfoRows(s *guestapi.SystemInfo) []dashboardRow {
	num := func(n uint64) string { return strconv.FormatUint(n, 10) }
	load := func(n uint32) string { return strconv.FormatFloat(float64(n)/100, 'f', 2, 64) }
	rows := []dashboardRow{
		{Name: "OS", Value: s.OsName + " " + s.OsVersion},
		{Name: "Kernel", Value: s.KernelVersion},
		{Name: "CPU", Value: num(uint64(s.NumCpus)) + " × " + s.CpuModel},
		{Name: "Memory (bytes)", Value: num(s.UsedMemory) + " used of " + num(s.TotalMemory)},
		{Name: "Swap (bytes)", Value: num(s.UsedSwap) + " used of " + num(s.TotalSwap)},
		{Name: "Load", Value: load(s.LoadavgOne) + " " + load(s.LoadavgFive) + " " + load(s.LoadavgFifteen)},
		{Name: "Uptime (seconds)", Value: num(s.Uptime)},
	}
	for _, d := range s.Disks {
		rows = append(rows, dashboardRow{Name: "Disk " + d.MountPoint + " (bytes)", Value: num(d.FreeSize) + " free of " + num(d.TotalSize)})
	}
	return rows
}
