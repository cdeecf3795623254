// SPDX-License-Identifier: Apache-2.0

// Package metrics is what a gateway tells machines of itself: counts in the text format of
// Prometheus, whether it lives, whether it is ready, and profiles of its process.
//
// Guarantees: the number of series is bounded, whoever registers and connects (apps by
// edge.MaxApps, instances as a distribution, refusals by the codes that the source has);
// nothing here names a client, an instance's address or a secret; a part that cannot answer
// is missing from the counts and does not take the others with it.
//
// Trusted: whoever is let near the handlers, which show profiles; they go behind the guard
// of the administrators' listener. Attacker-controlled: the values, by what strangers do.
//
// Implements spec/gateway.md §6.
package metrics

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
)

// Public is the listener of the apps.
type Public interface {
	Stats() edge.Stats
	Apps() []edge.AppStats
}

// Tunnel is the network to the instances.
type Tunnel interface {
	Peers() ([]wgconfig.Status, error)
}

// Certificate is one for names on a base domain.
type Certificate struct {
	Name     string
	NotAfter time.Time // zero: there is none yet
	Failing  bool      // the last try to get one went wrong
}

// Outcome is how many orders of certificates ended so.
type Outcome struct {
	Authority, Result string
	Count             uint64
}

// Member is another gateway of the cluster.
type Member struct {
	ID    string
	Heard time.Time // zero: never
}

// Cluster is the gateways that agree.
type Cluster struct {
	Quorum bool
	Leader bool // this one
	// Others are the other members.
	Others []Member
}

// Logs is what the watch of certificate logs found.
type Logs struct {
	Alarms  int
	Failing int       // logs that could not be read lately
	Checked time.Time // when that was read which was read longest ago; zero: one never was
}

// Check is a condition of being ready.
type Check struct {
	Name string
	Err  func() error
}

// Config is what there is to tell of. Parts that are nil are left out.
type Config struct {
	Version string
	Mode    string // of the tunnel
	Public  Public
	Routes  *route.Table
	// Network is where instances' addresses lie.
	Network      netip.Prefix
	Service      *gateway.Stats
	Tunnel       Tunnel
	Certificates func() []Certificate
	Outcomes     func() []Outcome
	Cluster      func(context.Context) (Cluster, error)
	Draining     func() bool
	Logs         func() Logs
	// Ready are the conditions under which a balancer may send connections here.
	Ready []Check
	Now   func() time.Time
}

// Metrics answers. Make it with New.
type Metrics struct {
	cfg      Config
	registry *prometheus.Registry
}

// New returns the handlers of a gateway's parts.
func New(cfg Config) *Metrics {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	m := &Metrics{cfg: cfg, registry: prometheus.NewRegistry()}
	m.registry.MustRegister(collector{m}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler serves /metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4, Timeout: 10 * time.Second})
}

// Register serves /metrics, /health (the process answers), /ready (and may be sent
// connections) and /debug/pprof/.
func (m *Metrics) Register(mux *http.ServeMux) {
	mux.Handle("GET /metrics", m.Handler())
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "OK") })
	mux.HandleFunc("GET /ready", m.ready)
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
}

// Unready returns the conditions that do not hold, each with its code.
func (m *Metrics) Unready() (out []string) {
	for _, c := range m.cfg.Ready {
		if err := c.Err(); err != nil {
			out = append(out, strings.TrimSpace(c.Name+" "+fault.Code(err)))
		}
	}
	if m.cfg.Draining != nil && m.cfg.Draining() {
		out = append(out, "draining")
	}
	return out
}

func (m *Metrics) ready(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if why := m.Unready(); len(why) > 0 {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "not ready: %s\n", strings.Join(why, ", "))
		return
	}
	io.WriteString(w, "ready\n")
}

// collector reads the parts when it is asked.
type collector struct{ *Metrics }

// Describe says nothing: which series there are depends on the parts.
func (collector) Describe(chan<- *prometheus.Desc) {}

const prefix = "dstack_gateway_"

// series is one metric and its labels' names.
type series struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	out  chan<- prometheus.Metric
}

// send sends a value; text that is no UTF-8 would make it invalid.
func (s series) send(v float64, labels ...string) {
	for i := range labels {
		labels[i] = strings.ToValidUTF8(labels[i], "\uFFFD")
	}
	metric, err := prometheus.NewConstMetric(s.desc, s.kind, v, labels...)
	if err != nil {
		metric = prometheus.NewInvalidMetric(s.desc, err)
	}
	s.out <- metric
}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	w := writer{out}
	w.gauge("info", "What this gateway is; the value is 1.", "version", "tunnel").send(1, c.cfg.Version, c.cfg.Mode)
	if c.cfg.Public != nil {
		w.public(c.cfg.Public)
	}
	if t := c.cfg.Routes; t != nil {
		w.gauge("routes", "Instances that have a route.").send(float64(t.Len()))
		if n := c.cfg.Network; n.IsValid() && n.Addr().Is4() {
			w.gauge("addresses", "Addresses of the network of the instances.").send(float64(uint64(1) << (32 - n.Bits())))
		}
		_, total := t.Quarantine()
		w.counter("records_quarantined_total", "Route records that were not applied.").send(float64(total))
	}
	if s := c.cfg.Service; s != nil {
		r := w.counter("registrations_total", "Registrations of instances.", "outcome")
		r.send(float64(s.Registered.Load()), "new")
		r.send(float64(s.Renewed.Load()), "renewed")
		r.send(float64(s.Refused.Load()), "refused")
		w.counter("certificates_total", "Certificates made for keys of instances.").send(float64(s.Certificates.Load()))
		w.counter("channels_refused_total", "Connections of guests whose handshake or evidence did not hold.").send(float64(s.Handshakes.Load()))
	}
	if c.cfg.Tunnel != nil {
		w.tunnel(c.cfg.Tunnel, c.cfg.Now())
	}
	if c.cfg.Certificates != nil {
		until := w.gauge("certificate_not_after_seconds", "When a certificate ends, Unix time; 0 when there is none.", "name")
		failing := w.gauge("certificate_failing", "Whether the last try to get a certificate went wrong.", "name")
		for _, x := range c.cfg.Certificates() {
			at := 0.0
			if !x.NotAfter.IsZero() {
				at = float64(x.NotAfter.Unix())
			}
			until.send(at, x.Name)
			failing.send(number(x.Failing), x.Name)
		}
	}
	if c.cfg.Outcomes != nil {
		orders := w.counter("acme_orders_total", "Orders of certificates at public authorities.", "authority", "result")
		for _, o := range c.cfg.Outcomes() {
			orders.send(float64(o.Count), o.Authority, o.Result)
		}
	}
	if c.cfg.Cluster != nil {
		w.cluster(c.cfg.Cluster, c.cfg.Now())
	}
	if c.cfg.Logs != nil {
		l := c.cfg.Logs()
		w.gauge("ct_alarms", "Certificates in logs for our names whose keys nobody attested, and logs that lie.").send(float64(l.Alarms))
		w.gauge("ct_logs_failing", "Certificate logs that could not be read at the last try.").send(float64(l.Failing))
		at := 0.0
		if !l.Checked.IsZero() {
			at = float64(l.Checked.Unix())
		}
		w.gauge("ct_checked_seconds", "When the log was read that was read longest ago, Unix time; 0 when one never was.").send(at)
	}
	if c.cfg.Draining != nil {
		w.gauge("draining", "Whether this gateway takes no new connections.").send(number(c.cfg.Draining()))
	}
	w.gauge("ready", "Whether a balancer may send connections here.").send(number(len(c.Unready()) == 0))
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

type writer struct{ out chan<- prometheus.Metric }

func (w writer) series(kind prometheus.ValueType, name, help string, labels []string) series {
	return series{prometheus.NewDesc(prefix+name, help, labels, nil), kind, w.out}
}

func (w writer) gauge(name, help string, labels ...string) series {
	return w.series(prometheus.GaugeValue, name, help, labels)
}

func (w writer) counter(name, help string, labels ...string) series {
	return w.series(prometheus.CounterValue, name, help, labels)
}

func (w writer) histogram(name, help string, count uint64, sum float64, buckets map[float64]uint64) {
	w.out <- prometheus.MustNewConstHistogram(prometheus.NewDesc(prefix+name, help, nil, nil), count, sum, buckets)
}

func (w writer) latency(name, help string, l edge.Latency) {
	buckets, sum := map[float64]uint64{}, uint64(0)
	for i, bound := range edge.Buckets {
		sum += l.Buckets[i]
		buckets[bound.Seconds()] = sum
	}
	w.histogram(name, help, l.Count, l.Sum.Seconds(), buckets)
}

func (w writer) public(p Public) {
	s := p.Stats()
	w.counter("connections_accepted_total", "Connections accepted.").send(float64(s.Accepted))
	w.gauge("connections_open", "Connections open, joined to an app or not.").send(float64(s.Open))
	w.counter("connections_reaped_total", "Connections ended by idle or total time, or with their route.").send(float64(s.Reaped))
	refused := w.counter("connections_refused_total", "Connections that reached no app, by the code of the reason.", "code")
	for code, n := range s.Refused {
		refused.send(float64(n), code)
	}
	w.counter("names_unknown_total", "Hellos whose name leads nowhere, or that have none.").send(float64(s.NoName))
	lookups := w.counter("dns_lookups_total", "Custom domains asked for.", "from")
	lookups.send(float64(s.Lookups), "dns")
	lookups.send(float64(s.LookupHits), "memory")
	w.counter("dials_failed_total", "Instances that could not be reached.").send(float64(s.DialFailed))
	w.latency("dial_duration_seconds", "How long it took to reach instances.", s.Dial)
	w.latency("handshake_duration_seconds", "How long TLS handshakes took that end here.", s.Handshake)
	w.gauge("pipes", "Pipes that splice bytes.").send(float64(s.Pipes))

	joined := w.counter("app_connections_total", "Connections joined to an app. Apps beyond a cap are counted as other.", "app", "mode")
	relaying := w.gauge("app_connections", "Connections joined to an app now.", "app", "mode")
	bytes := w.counter("app_bytes_total", "Bytes relayed: up to the app, down to the client.", "app", "mode", "direction")
	for _, a := range p.Apps() {
		name := a.App.String()
		if a.App == (dstack.AppID{}) {
			name = "other"
		}
		for m := range hostname.Passthrough + 1 {
			if a.Joined[m] == 0 && name != "other" {
				continue
			}
			joined.send(float64(a.Joined[m]), name, m.String())
			relaying.send(float64(a.Relaying[m]), name, m.String())
			bytes.send(float64(a.Up[m]), name, m.String(), "up")
			bytes.send(float64(a.Down[m]), name, m.String(), "down")
		}
	}
}

// handshakeAges are the bounds of the distribution; WireGuard shakes hands every two
// minutes while there is traffic.
var handshakeAges = []time.Duration{time.Minute, 3 * time.Minute, 10 * time.Minute, 30 * time.Minute}

func (w writer) tunnel(t Tunnel, now time.Time) {
	peers, err := t.Peers()
	w.gauge("tunnel_up", "Whether the tunnel answers.").send(number(err == nil))
	if err != nil {
		return
	}
	never, count, sum := 0, uint64(0), 0.0
	buckets := map[float64]uint64{}
	for _, bound := range handshakeAges {
		buckets[bound.Seconds()] = 0
	}
	for _, p := range peers {
		if p.Handshake.IsZero() {
			never++
			continue
		}
		age := now.Sub(p.Handshake)
		count++
		sum += age.Seconds()
		for _, bound := range handshakeAges {
			if age <= bound {
				buckets[bound.Seconds()]++
			}
		}
	}
	w.gauge("tunnel_peers", "Instances in the tunnel.").send(float64(len(peers)))
	w.gauge("tunnel_peers_silent", "Instances in the tunnel that never shook hands.").send(float64(never))
	w.histogram("tunnel_handshake_age_seconds", "The ages of instances' latest handshakes, now.", count, sum, buckets)
}

func (w writer) cluster(read func(context.Context) (Cluster, error), now time.Time) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	c, err := read(ctx)
	w.gauge("cluster_quorum", "Whether a majority of the members is there.").send(number(err == nil && c.Quorum))
	if err != nil {
		return
	}
	w.gauge("cluster_leader", "Whether this gateway leads.").send(number(c.Leader))
	w.gauge("cluster_members", "Members, with this one.").send(float64(len(c.Others) + 1))
	lag := w.gauge("cluster_member_silence_seconds", "For how long a member was not heard; -1 when it never was.", "member")
	for _, m := range c.Others {
		if m.Heard.IsZero() {
			lag.send(-1, m.ID)
			continue
		}
		lag.send(now.Sub(m.Heard).Seconds(), m.ID)
	}
}
