// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// public is a guest whose manifest has these fields set.
func public(t testing.TB, fields string) *guest {
	cfg, init := config(t, strings.Replace(testManifest, `"runner"`, fields+`,"runner"`, 1))
	return serve(t, cfg, init, Options{Now: func() time.Time { return time.Unix(1_700_000_000, 0) }})
}

// frame is one frame of the engine's.
func frame(channel byte, text string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{channel, 0, 0, 0}, uint32(len(text))), text...)
}

// written makes a container's output of these bytes.
func (g *guest) written(framed bool, data ...[]byte) {
	g.init.mu.Lock()
	defer g.init.mu.Unlock()
	g.init.openLogs = func(context.Context) (initrpc.Logs, error) {
		return initrpc.Logs{Framed: framed, Stream: io.NopCloser(bytes.NewReader(bytes.Join(data, nil)))}, nil
	}
}

func TestLogsAreShownAsAskedFor(t *testing.T) {
	g := public(t, `"public_logs":true`)
	c := g.client(t, initrpc.ListenExternal)
	out, errs := frame(1, "hello\n"), frame(2, "\x1b[31mred\x1b[0m <b>\n")
	for _, v := range []struct {
		query  string
		framed bool
		want   string
	}{
		{"", true, `{"channel":"stdout","message":"aGVsbG8K"}` + "\n" + `{"channel":"stderr","message":"G1szMW1yZWQbWzBtIDxiPgo="}` + "\n"},
		{"text", true, `{"channel":"stdout","message":"hello\n"}` + "\n" + `{"channel":"stderr","message":"\u001b[31mred\u001b[0m \u003cb\u003e\n"}` + "\n"},
		{"text&bare", true, "hello\nred <b>\n"},
		{"text=yes&bare=on&ansi", true, "hello\n\x1b[31mred\x1b[0m <b>\n"},
		{"bare", true, "aGVsbG8KG1szMW1yZWQbWzBtIDxiPgo="},
		{"text&bare=false", true, `{"channel":"stdout","message":"hello\n"}` + "\n" + `{"channel":"stderr","message":"\u001b[31mred\u001b[0m \u003cb\u003e\n"}` + "\n"},
	} {
		g.written(v.framed, out, errs)
		status, body, header := get(t, c, "http://x/logs/web?"+v.query)
		if status != 200 || body != v.want {
			t.Errorf("%s: %d %q, want %q", v.query, status, body, v.want)
		}
		if !strings.HasPrefix(header.Get("Content-Type"), "text/plain") || !strings.Contains(header.Get("Content-Security-Policy"), "sandbox") || header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("a browser may interpret it: %v", header)
		}
	}
	g.written(false, []byte("from a terminal"))
	if _, body, _ := get(t, c, "http://x/logs/web?text"); body != `{"channel":"console","message":"from a terminal"}`+"\n" {
		t.Errorf("a terminal: %q", body)
	}
	large := strings.Repeat("x", 3*maxLogFrame/2)
	g.written(true, frame(1, large))
	if _, body, _ := get(t, c, "http://x/logs/web?text&bare"); body != large {
		t.Errorf("%d bytes of a frame of %d", len(body), len(large))
	}
	g.written(true, []byte{9, 0, 0, 0, 0, 0, 0, 1, 'x'})
	if status, body, _ := get(t, c, "http://x/logs/web"); status != 200 || !strings.Contains(body, "logs_malformed") {
		t.Errorf("frames that are none: %d %s", status, body)
	}
	g.written(true, frame(1, "short")[:10])
	if status, body, _ := get(t, c, "http://x/logs/web?text"); status != 200 || !strings.Contains(body, "error") {
		t.Errorf("half a frame: %d %s", status, body)
	}
}

func TestLogQueriesReachTheEngine(t *testing.T) {
	g := public(t, `"public_logs":true`)
	c := g.client(t, initrpc.ListenExternal)
	g.written(true)
	const now = 1_700_000_000
	for query, want := range map[string]initrpc.LogsRequest{
		"":                                    {Tail: 1000},
		"since=10m&until=1699999999&tail=20":  {Since: now - 600, Until: 1699999999, Tail: 20},
		"since=1h":                            {Since: now - 3600, Tail: 1000},
		"since=2d&follow&timestamps=true":     {Since: now - 172800, Tail: 1000, Follow: true, Timestamps: true},
		"since=0s":                            {Since: now, Tail: 1000},
		"since=0":                             {Tail: 1000},
		"since=9223372036854775807s&tail=all": {Since: 1, Tail: -1},
		"since=9223372036854775807d":          {Since: 1, Tail: 1000},
		"since=99999999999d":                  {Since: 1, Tail: 1000},
		"tail=2000000000":                     {Tail: maxLogTail},
		"follow=no":                           {Tail: 1000},
	} {
		g.init.logged = nil
		if status, body, _ := get(t, c, "http://x/logs/my%20name?"+query); status != 200 || body == "" && len(g.init.logged) != 0 && g.init.logged[0].Container != "my name" {
			t.Errorf("%s: %d %s", query, status, body)
		}
		// A name with a space never reaches init.
		if len(g.init.logged) != 0 {
			t.Errorf("%+v", g.init.logged)
		}
		want.Container = "web"
		if _, body, _ := get(t, c, "http://x/logs/web?"+query); body != "" || !cmp.Equal(g.init.logged, []initrpc.LogsRequest{want}) {
			t.Errorf("%s: %s, asked for %+v, want %+v", query, body, g.init.logged, want)
		}
	}
	g.init.logged = nil
	for query, code := range map[string]string{
		"since=x": "logs_since", "since=-1": "logs_since", "since=1w": "logs_since", "since=s": "logs_since", "since=+5": "logs_since", "since=1.5h": "logs_since", "since=99999999999999999999": "logs_since",
		"until=x": "logs_until", "tail=x": "logs_query", "tail=-1": "logs_query", "follow=maybe": "logs_query", "a=%zz": "logs_query",
	} {
		status, body, _ := get(t, c, "http://x/logs/web?"+query)
		var e struct{ Error, Code string }
		if json.Unmarshal([]byte(body), &e); status != 200 || e.Code != code || !strings.HasPrefix(e.Error, "Invalid ") {
			t.Errorf("%s: %d %s, want %s", query, status, body, code)
		}
	}
	if len(g.init.logged) != 0 {
		t.Errorf("a query that was refused reached init: %+v", g.init.logged)
	}
	g.init.openLogs = nil
	if status, body, _ := get(t, c, "http://x/logs/none"); status != 200 || !strings.Contains(body, "container_unknown") {
		t.Errorf("no such container: %d %s", status, body)
	}
	for _, name := range []string{"..%2Finfo", "a%2Fb", "a%3Fb", "%00", "a%25b"} {
		if _, body, _ := get(t, c, "http://x/logs/"+name); !strings.Contains(body, "container_unknown") {
			t.Errorf("%s: %s", name, body)
		}
	}
	if len(g.init.logged) != 1 {
		t.Errorf("init was asked for %+v", g.init.logged)
	}
}

// Threat J05: logs and system information are nobody's business unless the manifest
// says so, each on its own.
func TestThreat_J05_PagesAreClosedByDefault(t *testing.T) {
	for _, c := range []struct {
		fields        string
		logs, metrics int
	}{{`"manifest_version":2`, 404, 404}, {`"public_logs":true`, 200, 404}, {`"public_sysinfo":true`, 404, 200}, {`"public_logs":false,"public_sysinfo":false`, 404, 404}} {
		fields := strings.TrimPrefix(c.fields, `"manifest_version":2`)
		cfg, init := config(t, testManifest)
		if fields != "" {
			cfg, init = config(t, strings.Replace(testManifest, `"runner"`, fields+`,"runner"`, 1))
		}
		init.status = initrpc.Status{Failed: "code: a secret reason", Health: `{"secret":"health"}`}
		g := serve(t, cfg, init, Options{})
		g.written(true)
		client := g.client(t, initrpc.ListenExternal)
		logs, _, _ := get(t, client, "http://x/logs/web")
		metrics, _, _ := get(t, client, "http://x/metrics")
		_, page, _ := get(t, client, "http://x/")
		if logs != c.logs || metrics != c.metrics {
			t.Errorf("%s: logs %d, metrics %d", c.fields, logs, metrics)
		}
		if strings.Contains(page, "/logs/") != (c.logs == 200) || strings.Contains(page, "<h2>System</h2>") != (c.metrics == 200) ||
			strings.Contains(page, "secret") != (c.metrics == 200) || !strings.Contains(page, "failed") {
			t.Errorf("%s: %s", c.fields, page)
		}
	}
}

func TestFollowersAreFewAndDoNotStarveTheRest(t *testing.T) {
	g := public(t, `"public_logs":true`)
	pipes := make(chan *io.PipeWriter, 16)
	g.init.openLogs = func(context.Context) (initrpc.Logs, error) {
		r, w := io.Pipe()
		pipes <- w
		return initrpc.Logs{Framed: true, Stream: r}, nil
	}
	c := g.client(t, initrpc.ListenExternal)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var open []*http.Response
	for range maxLogStreams {
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://x/logs/web?follow&text&bare", nil)
		answered := make(chan *http.Response, 1)
		go func() {
			resp, err := c.Do(req)
			if err != nil {
				resp = nil
			}
			answered <- resp
		}()
		w := <-pipes
		go w.Write(frame(1, "first\n"))
		resp := <-answered
		if resp == nil {
			t.Fatal("no answer")
		}
		defer resp.Body.Close()
		line := make([]byte, 6)
		if _, err := io.ReadFull(resp.Body, line); err != nil || string(line) != "first\n" {
			t.Fatalf("%q, %v", line, err)
		}
		open = append(open, resp)
	}
	if status, body, header := get(t, c, "http://x/logs/web?follow"); status != 429 || !strings.Contains(body, "logs_busy") || header.Get("Retry-After") == "" {
		t.Errorf("one stream too many: %d %s", status, body)
	}
	// Quotes, containers and everything else go on while streams wait.
	if status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/GetQuote", `{}`); status != 200 {
		t.Errorf("GetQuote: %d %s", status, body)
	}
	open[0].Body.Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		g.written(true, frame(1, "x"))
		if status, _, _ := get(t, c, "http://x/logs/web"); status == 200 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a stream whose reader went away stays")
		}
	}
}

func TestDashboardLinksEscapedNames(t *testing.T) {
	g := public(t, `"public_logs":true`)
	_, page, _ := get(t, g.client(t, initrpc.ListenExternal), "http://x/")
	if !strings.Contains(page, `<a href="/logs/web%3Cb%3E?text&amp;bare&amp;timestamps&amp;follow&amp;tail=20">web&lt;b&gt;</a>`) {
		t.Error(page)
	}
}

func TestTheDashboardAndTheHostSeeHowItFares(t *testing.T) {
	for _, c := range []struct {
		status initrpc.Status
		want   string
	}{
		{initrpc.Status{Phase: "done", Ready: true, Health: `{"ok":"<i>"}`}, "ready"},
		{initrpc.Status{Phase: "images"}, "starting: images"},
		{initrpc.Status{Phase: "images", Failed: "image_not_locked: <b>"}, "failed: image_not_locked: &lt;b&gt;"},
		{initrpc.Status{}, "unknown"},
	} {
		cfg, init := config(t, strings.Replace(testManifest, `"runner"`, `"public_sysinfo":true,"runner"`, 1))
		init.status = c.status
		g := serve(t, cfg, init, Options{})
		_, page, _ := get(t, g.client(t, initrpc.ListenExternal), "http://x/")
		if !strings.Contains(page, "<th>State</th><td>"+c.want+"</td>") || strings.Contains(page, "<i>") || strings.Contains(page, "Health") != (c.status.Health != "") {
			t.Errorf("%+v: %s", c.status, page)
		}
		var info guestapi.GuestInfo
		pc := prpc.Client{BaseURL: "http://x/api", HTTP: g.client(t, initrpc.ListenGuestAPI)}
		if err := pc.Call(context.Background(), "Info", &emptypb.Empty{}, &info); err != nil || info.BootPhase != c.status.Phase || info.Ready != c.status.Ready || info.Failed != c.status.Failed || info.Health != c.status.Health {
			t.Errorf("%+v: %v, %v", c.status, &info, err)
		}
	}
}

func TestMetrics(t *testing.T) {
	g := public(t, `"public_sysinfo":true`)
	status, body, header := get(t, g.client(t, initrpc.ListenExternal), "http://x/metrics")
	if status != 200 || header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("%d %v", status, header)
	}
	for _, name := range strings.Fields(`system_os_name system_os_version system_kernel_version system_cpu_model system_num_cpus system_memory_total system_memory_available
		system_memory_used system_memory_free system_swap_total system_swap_used system_swap_free system_uptime system_load_average_1m system_load_average_5m
		system_load_average_15m disk_total_size disk_free_size disk_used_size disk_usage_percentage`) {
		if !strings.Contains(body, "# HELP "+name+" ") || !strings.Contains(body, "# TYPE "+name+" gauge\n") || !strings.Contains(body, "\n"+name) {
			t.Errorf("%s is missing", name)
		}
	}
	got := string(metrics(&guestapi.SystemInfo{
		OsName: "a\"b\\c\nd\xff", NumCpus: 2, LoadavgOne: 150, TotalMemory: 1 << 40,
		Disks: []*guestapi.DiskInfo{{Name: "dm-0", MountPoint: "/x", TotalSize: 200, FreeSize: 50}, {Name: "e", MountPoint: "/y"}},
	}))
	for _, want := range []string{
		`system_os_name{os_name="a\"b\\c\nd` + "\uFFFD" + `"} 1` + "\n", "\nsystem_num_cpus 2\n", "\nsystem_load_average_1m 1.5\n", "\nsystem_memory_total 1099511627776\n",
		`disk_used_size{name="dm-0",mount_point="/x"} 150` + "\n", `disk_usage_percentage{name="dm-0",mount_point="/x"} 75.00` + "\n", `disk_usage_percentage{name="e",mount_point="/y"} 0` + "\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the metrics lack %q:\n%s", want, got)
		}
	}
}

func TestStripANSI(t *testing.T) {
	for text, want := range map[string]string{
		"plain": "plain", "\x1b[1;31mred\x1b[0m": "red", "a\x1b]0;title\x07b": "ab", "a\x1b]8;;http://x\x1b\\b": "ab", "a\x1b": "a", "a\x1b[": "a", "a\x1b[12": "a", "a\x1bMb": "ab", "é\x1b[K世": "é世",
	} {
		if got := stripANSI(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}

func FuzzLogQuery(f *testing.F) {
	for _, s := range []string{"since=1h&until=5&tail=all&follow", "since=9223372036854775807d", "tail=%31", "bare=on&ansi=off", "since=-5s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := parseLogQuery(raw, time.Unix(1_700_000_000, 0))
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("no code: %v", err)
			}
			return
		}
		if q.since < 0 || q.until < 0 || q.tail < -1 || q.tail > maxLogTail {
			t.Fatalf("%q became %+v", raw, q)
		}
	})
}

func FuzzReadLogs(f *testing.F) {
	f.Add(append(frame(1, "a"), frame(2, "b")...), true)
	f.Add([]byte{1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 'x'}, true)
	f.Add([]byte("x"), false)
	f.Fuzz(func(t *testing.T, data []byte, framed bool) {
		total := 0
		err := readLogs(initrpc.Logs{Framed: framed, Stream: io.NopCloser(bytes.NewReader(data))}, func(channel byte, message []byte) error {
			total += len(message)
			if channel > 3 || len(message) > maxLogFrame {
				t.Fatalf("channel %d, %d bytes", channel, len(message))
			}
			logQuery{text: true, bare: true}.line(channel, message)
			return nil
		})
		if total > len(data) || !framed && (err != nil || total != len(data)) {
			t.Fatalf("%d of %d bytes, %v", total, len(data), err)
		}
	})
}
