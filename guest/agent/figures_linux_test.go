// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/manifest"
)

// clients returns n clients of a unix socket, each with a connection of its own.
func clients(t testing.TB, socket string, n int) []*http.Client {
	var all []*http.Client
	for range n {
		tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}
		t.Cleanup(tr.CloseIdleConnections)
		all = append(all, &http.Client{Transport: tr})
	}
	return all
}

// maxResident is what the agent's process may have in memory, in KiB.
const maxResident = 20 << 10

// TestTheAgentIsSmall measures the process that runs in a guest, as init starts it,
// after 50 clients have used every costly method.
func TestTheAgentIsSmall(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIP: only root can start a process as another user")
	}
	if testing.Short() {
		t.Skip("builds a binary")
	}
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "dstack-guest")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin, "./cmd/dstack-guest")
	build.Dir, build.Env = testkit.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	every := map[string]string{"GetKey": `{"path":"x"}`, "Info": `{}`, "GetTlsKey": `{"usage_ra_tls":true}`, "GetQuote": `{"report_data":"00"}`, "Sign": `{"algorithm":"k256","data":"00"}`}
	t.Run("that has no KMS", func(t *testing.T) {
		cfg, init := config(t, testManifest)
		residentAfter(t, bin, cfg, init, 20, every, 200)
	})
	// The collateral of simulated platforms is of the past, so that what a KMS shows is
	// appraised and refused in the end; all that it takes is in memory by then.
	t.Run("that appraises its KMS", func(t *testing.T) {
		cfg, init := appraising(t)
		residentAfter(t, bin, cfg, init, 1, map[string]string{"GetTlsKey": `{"usage_ra_tls":true}`}, 400)
	})
}

// appraising is an agent whose manifest has a kms_policy, and a KMS with evidence.
func appraising(t *testing.T) (*initrpc.Config, *fakeInit) {
	g := &tdxtest.Guest{Platform: tdxtest.New(t), AppID: dstack.AppID{9}, ComposeHash: dstack.ComposeHash{8}}
	roots, err := g.Platform.DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	text, err := manifest.Build(manifest.Draft{
		Name: "n", DockerComposeFile: "services: {}", KeyProvider: "kms",
		KMSPolicy: &manifest.PeerPolicy{AppID: g.AppID, ComposeHashes: []dstack.ComposeHash{g.ComposeHash}, OSImageHashes: []dstack.ImageHash{{1}}, DevRoots: string(roots)},
	})
	if err != nil {
		t.Fatal(err)
	}
	kms, err := kmstest.Start(kmstest.Options{Attester: g})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kms.Close() })
	cfg, init := config(t, string(text))
	app := testKeys(t)
	app.CACert, app.Provider = kms.RootPEM(), keys.Provider{Kind: keys.KMS, URL: kms.URL + "/prpc", SPKI: kms.SPKI()}
	if cfg.AppKeys, err = app.Encode(); err != nil {
		t.Fatal(err)
	}
	return cfg, init
}

// residentAfter holds what the process has in memory after 50 clients have made calls,
// each of them so often, against the bound.
func residentAfter(t *testing.T, bin string, cfg *initrpc.Config, init *fakeInit, often int, calls map[string]string, want int) {
	dir := filepath.Dir(bin)
	socket := filepath.Join(dir, fmt.Sprintf("dstack-%d.sock", want))
	sock, err := initrpc.ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	ctx, cancel := context.WithCancel(context.Background())
	var log strings.Builder
	p, err := initrpc.Spawn(ctx, initrpc.SpawnOptions{
		Path: bin, UID: 990, GID: 990, Config: cfg, Init: init, Log: &log, Listeners: map[string]*os.File{initrpc.ListenDstack: sock},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Wait()
	defer cancel()
	select {
	case <-p.Ready():
	case <-p.Done():
		t.Fatalf("agent ended: %v\n%s", p.Wait(), log.String())
	}
	memory := func() (string, int) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Join(regexp.MustCompile(`(VmHWM|VmRSS|RssAnon|RssFile):\s+\d+ kB`).FindAllString(string(status), -1), ", ")
		rss, err := strconv.Atoi(regexp.MustCompile(`VmRSS:\s+(\d+)`).FindStringSubmatch(string(status))[1])
		if err != nil {
			t.Fatal(err)
		}
		return text, rss
	}
	begin, _ := memory()
	t.Log("at the start: ", begin)
	var wg sync.WaitGroup
	for _, c := range clients(t, socket, 50) {
		wg.Go(func() {
			for range often {
				for url, body := range calls {
					if status, text, _ := post(t, c, "http://x/"+url, body); status != want || want != 200 && !strings.Contains(text, "kms_policy") {
						t.Errorf("%s: %d %s", url, status, text)
					}
				}
			}
		})
	}
	wg.Wait()
	text, rss := memory()
	t.Log("after the calls: ", text)
	for deadline := time.Now().Add(trimInterval + 5*time.Second); rss > maxResident && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		text, rss = memory()
	}
	t.Log("in the end: ", text)
	if rss > maxResident {
		t.Errorf("the agent has %d KiB in memory, allowed %d", rss, maxResident)
	}
}

func TestOnlyPagesOfFilesAreDropped(t *testing.T) {
	smaps := `00400000-00b5c000 r-xp 00000000 fe:00 1234   /init
Size:               7536 kB
Anonymous:             0 kB
00b5c000-01424000 r--p 0075c000 fe:00 1234   /relocated
Anonymous:             4 kB
01424000-0149b000 rw-p 01024000 fe:00 1234   /data
Anonymous:             0 kB
02000000-02001000 r--s 00000000 fe:00 1234   /shared
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 00:00 0 
Anonymous:             0 kB
7ffe00000000-7ffe00001000 r-xp 00000000 00:00 0      [vdso]
Anonymous:             0 kB
`
	if got := filePages([]byte(smaps)); len(got) != 1 || got[0] != [2]uintptr{0x400000, 0xb5c000} {
		t.Errorf("%x", got)
	}
}

// perf calls one method from 50 connections, b.N times altogether, and reports what
// the median and the slowest hundredth of the calls took.
func perf(b *testing.B, g *guest, method, body string) {
	const users = 50
	all := clients(b, filepath.Join(g.dir, initrpc.ListenDstack), users)
	took := make([][]time.Duration, users)
	for i, c := range all { // connections are made before the clock runs
		post(b, c, "http://x/"+method, body)
		took[i] = make([]time.Duration, 0, b.N/users+1)
	}
	b.ResetTimer()
	var wg sync.WaitGroup
	for i, c := range all {
		wg.Go(func() {
			for n := i; n < b.N; n += users {
				begin := time.Now()
				status, text, _ := post(b, c, "http://x/"+method, body)
				took[i] = append(took[i], time.Since(begin))
				if status != 200 {
					b.Errorf("%d %s", status, text)
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	flat := slices.Concat(took...)
	slices.Sort(flat)
	ms := func(q float64) float64 { return float64(flat[int(q*float64(len(flat)-1))].Microseconds()) / 1000 }
	b.ReportMetric(ms(0.50), "p50-ms")
	b.ReportMetric(ms(0.99), "p99-ms")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
}

func BenchmarkGetKey50Clients(b *testing.B) {
	perf(b, newGuest(b), "GetKey", `{"path":"a/b","purpose":"c"}`)
}

func BenchmarkInfo50Clients(b *testing.B) { perf(b, newGuest(b), "Info", `{}`) }

// A TDX quote takes about this long on hardware, one at a time: the quoting enclave
// is asked through the host.
const hardwareQuote = 20 * time.Millisecond

// BenchmarkInfoWithAQuotePerCall is what Info would cost the way upstream answers it:
// a fresh quote, which the driver makes one at a time, for every call.
func BenchmarkInfoWithAQuotePerCall50Clients(b *testing.B) {
	cfg, init := config(b, testManifest)
	init.takes = hardwareQuote
	g := serve(b, cfg, init, Options{})
	perf(b, g, "GetQuote", `{}`)
}
