// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/gateway/hello"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/proxyproto"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func descriptors(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// asBalancer makes every connection its own client, by a PROXY header.
func asBalancer(c *Config) { c.Balancers = proxyproto.Sources{netip.MustParsePrefix("127.0.0.0/8")} }

func from(c net.Conn, source string) {
	b, _ := proxyproto.Header{Version: 2, Source: netip.MustParseAddrPort(source), Destination: netip.MustParseAddrPort("203.0.113.1:443")}.Bytes()
	c.Write(b)
}

func TestThreat_K08_IdleConnectionsHoldTwoDescriptorsAndLittleMemory(t *testing.T) {
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	// The test holds four descriptors a connection: the client's, the gateway's two, the app's.
	n := min(10_000, (int(lim.Cur)-500)/4)
	if testing.Short() {
		n = min(n, 500)
	}
	r := newRig(t, func(c *Config) { c.Limits = Limits{Rate: -1, PerSource: -1, PendingPerSource: -1} })
	r.instance(1, 1)
	raw := rawHello(t, host(appID(1), "-s"))
	r.serve(1, 443, func(c net.Conn) { io.Copy(io.Discard, c) })
	// As much as makes a flow bulk, so that what a splice leaves behind would count.
	burst := make([]byte, 64<<10)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	fds := descriptors(t)
	for i := range n {
		c := r.tcp()
		c.Write(raw)
		if i%4 == 0 {
			c.Write(burst)
		}
	}
	r.eventually(func() bool { return r.edge.Stats().Relaying[hostname.Passthrough] == int64(n) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	r.eventually(func() bool { return r.edge.Stats().BytesUp == uint64(n*len(raw)+(n+3)/4*len(burst)) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	s := r.edge.Stats()
	if got := descriptors(t) - fds; got > 4*n+2*keptPipes+16 || s.Pipes > keptPipes {
		t.Errorf("%d descriptors for %d idle connections, %d pipes", got, n, s.Pipes)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	// Heap and stacks of the gateway, its clients and the app together.
	each := (int64(after.HeapAlloc+after.StackInuse) - int64(before.HeapAlloc+before.StackInuse)) / int64(n)
	t.Logf("%d connections, %d bytes each, with the test's own", n, each)
	if each > 40<<10 {
		t.Errorf("%d bytes of heap and stack for an idle connection", each)
	}
}

func clientConfig(name string) *tls.Config {
	return &tls.Config{ServerName: name, RootCAs: roots()}
}

// rawHello is the first flight of a client that then says no more.
func rawHello(t testing.TB, name string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		tls.Client(b, clientConfig(name)).Handshake()
		b.Close()
	}()
	_, raw, err := hello.Read(a, nil)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestThreat_K08_ASlowHelloIsCutOff(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Timeouts.Handshake = 300 * time.Millisecond })
	raw := rawHello(t, host(appID(1), ""))
	conn := r.tcp()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; i < len(raw); i++ { // a byte at a time never extends the time
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			if _, err := conn.Write(raw[i : i+1]); err != nil {
				return
			}
		}
	})
	r.wantRefused("hello_read", 1)
	close(stop)
	wg.Wait()
}

func TestThreat_K08_AGiantHelloIsRefused(t *testing.T) {
	r := newRig(t, nil)
	conn := r.tcp()
	conn.Write([]byte{22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff})
	b, err := io.ReadAll(conn)
	if string(b) != string(hello.RecordOverflow.Record()) {
		t.Errorf("%x %v", b, err)
	}
	r.wantRefused("hello_too_large", 1)
}

func TestThreat_K08_AFloodFromOneSourceLeavesOthersServed(t *testing.T) {
	for _, c := range []struct {
		code   string
		limits Limits
	}{
		{"edge_source_full", Limits{PendingPerSource: 8, Rate: -1}},
		{"edge_source_full", Limits{PerSource: 8, Rate: -1}},
		{"edge_source_rate", Limits{Rate: 8}},
	} {
		r := newRig(t, func(cfg *Config) {
			asBalancer(cfg)
			cfg.Limits = c.limits
		})
		r.instance(1, 1)
		r.serve(1, 80, echo)
		for range 50 {
			from(r.tcp(), "192.0.2.1:1") // and never a hello
		}
		r.eventually(func() bool { return r.edge.Stats().Refused[c.code] >= 30 }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
		conn := r.tcp()
		from(conn, "192.0.2.2:1")
		s, err := r.handshake(conn, clientConfig(host(appID(1), "")))
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, s, 100)
	}
}

func TestThreat_K08_OneAppsConnectionsAreNotAnothers(t *testing.T) {
	table := route.New(route.Config{PerApp: 2})
	r := newRig(t, func(c *Config) { c.Routes = table })
	r.table = table
	r.instance(1, 1)
	r.instance(2, 2)
	r.serve(1, 443, tlsEcho)
	r.serve(2, 443, tlsEcho)
	for range 2 {
		if _, err := r.tls(host(appID(1), "-s")); err != nil {
			t.Fatal(err)
		}
	}
	_, err := r.tls(host(appID(1), "-s"))
	wantAlert(t, err, 80)
	r.wantRefused("route_app_full", 1)
	conn, err := r.tls(host(appID(2), "-s"))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, conn, 10)
}

func TestThreat_K08_ConnectionsAreBoundedInTotal(t *testing.T) {
	for code, limits := range map[string]Limits{"edge_full": {Connections: 2}, "edge_pending_full": {Pending: 2}} {
		r := newRig(t, func(c *Config) { c.Limits = limits })
		for range 5 {
			r.tcp()
		}
		r.wantRefused(code, 3)
		if n := r.edge.Stats().Open; n != 2 {
			t.Errorf("%s: %d open", code, n)
		}
	}
}

func TestThreat_K08_SourcesAreForgotten(t *testing.T) {
	s := sources{limits: Limits{PerSource: 1, PendingPerSource: 1, Rate: 1}}
	now := time.Unix(1000, 0)
	held, err := s.begin(netip.MustParseAddr("2001:db8::1"), now)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxIdleSources + 1000 {
		src, err := s.begin(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
		if err != nil {
			t.Fatal(err)
		}
		s.settled(src)
		s.end(src)
	}
	if len(s.all) != maxIdleSources+1 || s.idle.Len() != maxIdleSources {
		t.Errorf("%d sources are remembered, %d of them idle", len(s.all), s.idle.Len())
	}
	// One with a connection never is; and a /64 is one source.
	if _, err := s.begin(netip.MustParseAddr("2001:db8::2"), now); fault.Code(err) != "edge_source_full" {
		t.Error(err)
	}
	s.settled(held)
	s.end(held)
}

var (
	fuzzPorts = []manifest.Port{{Port: 80}, {Port: 443, TLS: manifest.TLSApp}}
	allowed   = map[uint16]bool{80: true, 443: true, manifest.TLSPort: true, portpolicy.AgentPort: true}
)

// FuzzWhereAStrangerGets feeds the pipeline's pure part, from the first bytes to the plan:
// whatever they are, a plan leads to a registered instance and a port of its policy.
func FuzzWhereAStrangerGets(f *testing.F) {
	for _, name := range []string{host(appID(1), ""), host(appID(1), "-s"), host(appID(1), "-443g"), "gateway." + base, "a.example.org"} {
		f.Add([]byte(nil), rawHello(f, name))
	}
	head, _ := proxyproto.Header{Version: 2, Source: netip.MustParseAddrPort("192.0.2.1:1"), Destination: netip.MustParseAddrPort("192.0.2.2:2")}.Bytes()
	f.Add(head, rawHello(f, host(appID(1), "-80")))
	f.Add([]byte("PROXY UNKNOWN\r\n"), []byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n"))
	r := newRig(f, nil)
	r.instance(1, 1, fuzzPorts...)
	f.Fuzz(func(t *testing.T, head, data []byte) {
		a, b := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			b.Write(head)
			b.Write(data)
			b.Close()
		})
		defer wg.Wait()
		defer a.Close()
		if len(head) > 0 {
			if _, err := proxyproto.Read(a); err != nil {
				return
			}
		}
		h, raw, err := hello.Read(a, nil)
		if err != nil {
			if fault.Code(err) == "hello_http" {
				r.edge.answerHTTP(raw)
			}
			return
		}
		if h.ServerName == "" {
			return
		}
		d, err := r.edge.cfg.Rules().Resolve(h.ServerName)
		if err != nil || d.Kind != hostname.App {
			return
		}
		p, err := r.edge.plan(d)
		if err != nil {
			return
		}
		for _, to := range p.targets {
			if to.addr.Addr() != address(1) || !allowed[to.addr.Port()] {
				t.Errorf("%s leads to %s", h.ServerName, to.addr)
			}
		}
	})
}
