// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a real listener, table and tunnel, and what they tell of themselves.
type site struct {
	t       *testing.T
	cfg     Config
	metrics *Metrics
	url     string
	public  string
	tunnel  *tunnel.Tunnel
	key     wgconfig.PublicKey
}

var network = netip.MustParsePrefix("100.96.0.0/11")

func newSite(t *testing.T, edit func(*site, *Config)) *site {
	t.Helper()
	s := &site{t: t}
	table := route.New(route.Config{Network: network})
	now := time.Now()
	s.key = wgconfig.GeneratePrivateKey().Public()
	peer := wgconfig.Peer{Key: s.key, Address: netip.MustParseAddr("100.96.1.2")}
	if _, err := table.Register(route.Record{App: dstack.AppID{0xa}, Instance: dstack.InstanceID{0xb}, Compose: dstack.ComposeHash{1}, Key: peer.Key, Address: peer.Address,
		Attested: now, Until: now.Add(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := udp.LocalAddr().(*net.UDPAddr).AddrPort()
	udp.Close()
	if s.tunnel, err = tunnel.Open(t.Context(), tunnel.Config{Key: wgconfig.GeneratePrivateKey(), Listen: at, Address: netip.MustParseAddr("100.96.0.1"), Network: network, Mode: tunnel.Netstack}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.tunnel.Close() })
	if err := s.tunnel.Set(peer); err != nil {
		t.Fatal(err)
	}
	public, err := edge.New(edge.Config{Routes: table, Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return s.tunnel.Dial(ctx, to) }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.public = l.Addr().String()
	done := make(chan error)
	go func() { done <- public.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		public.Shutdown(ctx)
		<-done
	})
	stats := &gateway.Stats{}
	stats.Registered.Add(3)
	stats.Refused.Add(2)
	s.cfg = Config{
		Version: "v1", Mode: "netstack", Public: public, Routes: table, Network: network, Service: stats, Tunnel: s.tunnel,
		Ready: []Check{{"tunnel", func() error { _, err := s.tunnel.Peers(); return err }}},
	}
	if edit != nil {
		edit(s, &s.cfg)
	}
	s.metrics = New(s.cfg)
	mux := http.NewServeMux()
	s.metrics.Register(mux)
	server := httptest.NewServer(mux)
	t.Cleanup(func() { server.Close(); http.DefaultClient.CloseIdleConnections() })
	s.url = server.URL
	return s
}

func (s *site) get(path string) (int, string) {
	s.t.Helper()
	resp, err := http.Get(s.url + path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// scrape reads /metrics with Prometheus' own parser.
func (s *site) scrape() map[string]*dto.MetricFamily {
	s.t.Helper()
	code, text := s.get("/metrics")
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(strings.NewReader(text))
	if code != 200 || err != nil {
		s.t.Fatalf("%d %v\n%s", code, err, text)
	}
	return families
}

func (s *site) value(families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	s.t.Helper()
	f := families[prefix+name]
	if f == nil {
		s.t.Errorf("there is no %s", name)
		return math.NaN()
	}
	for _, m := range f.Metric {
		var got []string
		for _, l := range m.Label {
			got = append(got, l.GetName(), l.GetValue())
		}
		if strings.Join(got, "\x00") != strings.Join(labels, "\x00") {
			continue
		}
		switch {
		case m.Counter != nil:
			return m.Counter.GetValue()
		case m.Gauge != nil:
			return m.Gauge.GetValue()
		case m.Histogram != nil:
			return float64(m.Histogram.GetSampleCount())
		}
	}
	s.t.Errorf("%s has no series %q: %v", name, labels, f)
	return math.NaN()
}

func TestWhatThereIsIsToldInPrometheusText(t *testing.T) {
	end := time.Unix(2_000_000_000, 0)
	s := newSite(t, func(_ *site, c *Config) {
		c.Certificates = func() []Certificate {
			return []Certificate{{Name: "*.app.example.com", NotAfter: end}, {Name: "new.example.com", Failing: true}}
		}
		c.Outcomes = func() []Outcome { return []Outcome{{"one", "issued", 4}, {"one", "failed", 1}} }
		c.Cluster = func(context.Context) (Cluster, error) {
			return Cluster{Quorum: true, Leader: true, Others: []Member{{ID: "ab", Heard: time.Now().Add(-time.Minute)}, {ID: "cd"}}}, nil
		}
		c.Draining = func() bool { return false }
		c.Logs = func() Logs { return Logs{Alarms: 2, Failing: 1, Checked: end} }
	})
	c, err := net.Dial("tcp", s.public)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "no hello\r\n\r\n")
	io.ReadAll(c)
	c.Close()
	for end := time.Now().Add(5 * time.Second); s.cfg.Public.Stats().Open > 0 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	f := s.scrape()
	for _, x := range []struct {
		want   float64
		name   string
		labels []string
	}{
		{1, "info", []string{"tunnel", "netstack", "version", "v1"}},
		{1, "connections_accepted_total", nil},
		{0, "connections_open", nil},
		{0, "app_connections_total", []string{"app", "other", "mode", "passthrough"}},
		{0, "app_bytes_total", []string{"app", "other", "direction", "down", "mode", "terminate"}},
		{0, "dns_lookups_total", []string{"from", "memory"}},
		{0, "dial_duration_seconds", nil},
		{0, "handshake_duration_seconds", nil},
		{1, "routes", nil},
		{1 << 21, "addresses", nil},
		{0, "records_quarantined_total", nil},
		{2, "ct_alarms", nil},
		{1, "ct_logs_failing", nil},
		{2_000_000_000, "ct_checked_seconds", nil},
		{3, "registrations_total", []string{"outcome", "new"}},
		{2, "registrations_total", []string{"outcome", "refused"}},
		{1, "tunnel_up", nil},
		{1, "tunnel_peers", nil},
		{1, "tunnel_peers_silent", nil},
		{0, "tunnel_handshake_age_seconds", nil},
		{float64(end.Unix()), "certificate_not_after_seconds", []string{"name", "*.app.example.com"}},
		{0, "certificate_not_after_seconds", []string{"name", "new.example.com"}},
		{1, "certificate_failing", []string{"name", "new.example.com"}},
		{4, "acme_orders_total", []string{"authority", "one", "result", "issued"}},
		{1, "cluster_quorum", nil},
		{3, "cluster_members", nil},
		{-1, "cluster_member_silence_seconds", []string{"member", "cd"}},
		{0, "draining", nil},
		{1, "ready", nil},
	} {
		if got := s.value(f, x.name, x.labels...); got != x.want {
			t.Errorf("%s%q is %v, want %v", x.name, x.labels, got, x.want)
		}
	}
	if got := s.value(f, "cluster_member_silence_seconds", "member", "ab"); got < 59 || got > 120 {
		t.Errorf("a member was not heard for %v s", got)
	}
	refused := 0.0
	for _, m := range f[prefix+"connections_refused_total"].GetMetric() {
		refused += m.Counter.GetValue()
	}
	if refused != 1 || f["go_goroutines"] == nil || f["process_open_fds"] == nil {
		t.Errorf("%v refused; %d families", refused, len(f))
	}
	// What each means is written down.
	text, err := os.ReadFile(filepath.Join(testkit.Root(), "docs", "gateway.md"))
	if err != nil {
		t.Fatal(err)
	}
	for name := range f {
		if name, ours := strings.CutPrefix(name, prefix); ours && !strings.Contains(string(text), "`"+name+"`") {
			t.Errorf("docs/gateway.md does not say what %s means", name)
		}
	}
}

// listener is one with very many apps.
type listener struct{ *edge.Edge }

func (listener) Apps() (out []edge.AppStats) {
	for n := range edge.MaxApps {
		out = append(out, edge.AppStats{App: dstack.AppID{1, byte(n >> 8), byte(n)}, Joined: [3]uint64{1, 1, 1}})
	}
	return append(out, edge.AppStats{})
}

func TestThreat_K08_TheSeriesAreBounded(t *testing.T) {
	s := newSite(t, func(_ *site, c *Config) {
		c.Public = listener{c.Public.(*edge.Edge)}
		c.Certificates = func() []Certificate { return []Certificate{{Name: "bad\xff\"\n{}=name"}} }
	})
	n := 0
	for name, f := range s.scrape() {
		if strings.HasPrefix(name, prefix) {
			n += len(f.Metric)
		}
	}
	if most := (edge.MaxApps+1)*3*4 + 100; n > most {
		t.Errorf("%d series, more than %d", n, most)
	}
	if _, text := s.get("/metrics"); !strings.Contains(text, `name="bad`+"\uFFFD"+`\"\n{}=name"`) {
		t.Error("a name that is no text was not told as one")
	}
}

func TestAPartThatCannotAnswerDoesNotHideTheOthers(t *testing.T) {
	s := newSite(t, func(_ *site, c *Config) {
		c.Cluster = func(context.Context) (Cluster, error) { return Cluster{}, errors.New("no") }
	})
	s.tunnel.Close()
	f := s.scrape()
	if s.value(f, "tunnel_up") != 0 || s.value(f, "cluster_quorum") != 0 || s.value(f, "routes") != 1 || s.value(f, "ready") != 0 {
		t.Errorf("%v", f)
	}
	if f[prefix+"tunnel_peers"] != nil || f[prefix+"cluster_members"] != nil {
		t.Error("counts of parts that do not answer")
	}
}

func TestReadyIsNotTheSameAsAlive(t *testing.T) {
	draining, listening := false, true
	s := newSite(t, func(_ *site, c *Config) {
		c.Draining = func() bool { return draining }
		c.Ready = append(c.Ready, Check{"listeners", func() error {
			if !listening {
				return fault.New("gateway_listen", "secret details")
			}
			return nil
		}})
	})
	want := func(ready int, text string) {
		t.Helper()
		if code, _ := s.get("/health"); code != 200 {
			t.Errorf("the process lives, and /health says %d", code)
		}
		if code, got := s.get("/ready"); code != ready || got != text {
			t.Errorf("%d %q, want %d %q", code, got, ready, text)
		}
	}
	want(200, "ready\n")
	draining = true
	want(503, "not ready: draining\n")
	draining, listening = false, false
	want(503, "not ready: listeners gateway_listen\n")
	listening = true
	want(200, "ready\n")
	s.tunnel.Close()
	want(503, "not ready: tunnel tunnel_closed\n")
}

func TestProfiles(t *testing.T) {
	s := newSite(t, nil)
	for _, path := range []string{"", "heap?debug=1", "goroutine?debug=1", "cmdline", "profile?seconds=1"} {
		if code, text := s.get("/debug/pprof/" + path); code != 200 || text == "" {
			t.Errorf("%s: %d %s", path, code, fmt.Sprintf("%.100s", text))
		}
	}
}
