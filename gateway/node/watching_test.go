// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/base64"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/dstack-go/dstack/internal/testkit/chromium"
)

var screenshots = flag.String("screenshots", "", "save pictures of the status page to this directory")

const adminToken = "0123456789abcdef0123456789abcdef"

// forward makes a gateway's administrators' socket one of loopback, for a browser.
func (l *lab) forward(h *host) string {
	l.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	l.must(err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				up, err := net.Dial("unix", h.control+"a")
				if err != nil {
					return
				}
				defer up.Close()
				go func() { io.Copy(up, c); up.Close() }()
				io.Copy(c, up)
			})
		}
	})
	l.t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// fetch asks the administrators' listener for a page; token "" shows none.
func fetch(t *testing.T, at, path, token string) (int, string) {
	t.Helper()
	r, err := http.NewRequest("GET", "http://"+at+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Close = true
	if token != "" {
		r.Header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("admin:"+token)))
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// What an administrator sees of two gateways and an instance, in a real browser: routes,
// members, certificates, connections, health; and what nobody else sees.
func TestTheStatusPageOfACluster(t *testing.T) {
	l := newLab(t)
	g := []*host{l.gateway(nil), l.gateway(nil)}
	for i, h := range g {
		h.configure(fmt.Sprintf("[core.admin]\nenabled = true\naddress = \"unix:%sa\"\nauth_token = %q\n", h.control, adminToken))
		h.alone()
		if i > 0 {
			h.joinTo(g[0])
		}
	}
	shop := l.instance(1, 1, "shop", g[0], g[1])
	l.reached(g[0], shop, "shop")
	if _, err := l.visit(g[0], "nobody"); err == nil {
		t.Error("a name that is none leads somewhere")
	}
	at := l.forward(g[0])

	for _, path := range []string{"/", "/status.js", "/metrics", "/health", "/ready", "/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline"} {
		if code, body := fetch(t, at, path, ""); code != http.StatusUnauthorized || strings.Contains(body, "dstack_gateway_") {
			t.Errorf("%s without a token: %d", path, code)
		}
		if code, _ := fetch(t, at, path, adminToken); code != http.StatusOK {
			t.Errorf("%s: %d", path, code)
		}
	}
	if code, _ := fetch(t, at, "/nothing", adminToken); code != http.StatusNotFound {
		t.Errorf("what there is not: %d", code)
	}
	_, text := fetch(t, at, "/metrics", adminToken)
	for _, want := range []string{
		"dstack_gateway_info{tunnel=\"netstack\"", "dstack_gateway_routes 1\n", "dstack_gateway_cluster_quorum 1\n", "dstack_gateway_cluster_members 2\n", "dstack_gateway_ready 1\n",
		"dstack_gateway_tunnel_up 1\n", "dstack_gateway_tunnel_peers 1\n", "dstack_gateway_draining 0\n", "dstack_gateway_cluster_member_silence_seconds{member=\"2\"} ",
		"dstack_gateway_certificate_not_after_seconds{name=\"*." + labDomain + "\"} ", "dstack_gateway_registrations_total{outcome=\"new\"} 1\n",
		"dstack_gateway_app_connections_total{app=\"" + shop.guest.AppID.String() + "\",mode=\"terminate\"} ", "dstack_gateway_connections_refused_total{code=\"",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics lack %q:\n%s", want, text)
		}
	}

	b := chromium.Start(t)
	b.Open("http://admin:" + adminToken + "@" + at + "/")
	b.Wait("all parts", `return document.querySelectorAll("#members tbody tr").length === 2 && document.querySelectorAll("#instances tbody tr").length === 1;`)
	says := func(id string, words ...string) {
		t.Helper()
		for _, w := range words {
			b.Wait(id+" to say "+w, fmt.Sprintf("return document.getElementById(%q).textContent.includes(%q);", id, w))
		}
	}
	says("trust", "DEVELOPMENT TRUST")
	says("node", "Healthready", "https://"+g[0].ip+":8000", "takes connections", "netstack")
	says("instances", shop.guest.AppID.String(), shop.guest.InstanceID.String(), "1 of 1 instances")
	says("members", "There is a quorum.", "gateway 1", "gateway 2", "leader")
	says("domains", labDomain, "valid", "A private authority certifies")
	says("connections", "Refused since the start", "edge_unknown_id")
	says("ct", "watches no certificate logs")
	says("quarantine", "None.")
	if *screenshots != "" {
		b.Screenshot(filepath.Join(*screenshots, "cluster"))
	}
	var outside []string
	b.Script(`return performance.getEntriesByType("resource").map((e) => e.name).filter((n) => new URL(n).origin !== location.origin);`, &outside)
	if len(outside) != 0 {
		t.Errorf("the page loads %v", outside)
	}

	// Draining takes two presses, and is seen by a balancer.
	b.Click("#node button")
	b.Wait("a question", `return document.querySelector("#node button.sure") !== null;`)
	b.Click("#node button")
	says("node", "draining")
	if code, body := fetch(t, at, "/ready", adminToken); code != http.StatusServiceUnavailable || body != "not ready: draining\n" {
		t.Errorf("a gateway that drains: %d %q", code, body)
	}
	says("node", "not ready: draining")
	b.Wait("to be resumed", `return document.querySelector("#node button")?.textContent === "Resume";`)
	b.Click("#node button")
	b.Wait("a question", `return document.querySelector("#node button.sure") !== null;`)
	b.Click("#node button")
	says("node", "takes connections")
	l.reached(g[0], shop, "shop")

	// The other gateway goes: that is an alarm, and nothing that ends readiness.
	g[1].kill()
	says("alarms", "There is no quorum.")
	says("members", "not reachable")
	says("node", "Healthready")
	if code, _ := fetch(t, at, "/ready", adminToken); code != http.StatusOK {
		t.Errorf("without a quorum: %d", code)
	}
}
