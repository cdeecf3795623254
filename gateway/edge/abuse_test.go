// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
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

// asStrangers is the variable by which this test's program is told to be the clients and
// the app, so that what the gateway holds is counted alone, and its descriptors are its own.
const asStrangers = "DSTACK_TEST_STRANGERS"

// crowd is what the strangers do: N clients send Hello, behind a PROXY header each if Own, so
// that each is a source of its own, and every fourth a Burst more; then they say nothing.
type crowd struct {
	Addr  string
	N     int
	Hello []byte
	Burst int
	Own   bool
	// Each is how long they wait between the bytes of Hello; 0: it is sent at once.
	Each time.Duration
}

// descriptorsHere raises the limit of this process as far as it may.
func descriptorsHere() (int, error) {
	var lim syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim)
	if lim.Cur = lim.Max; err == nil {
		err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
	}
	return int(min(lim.Cur, 1<<30)), err
}

// strangers is the other process: it prints where the app listens, and begins when its
// standard input says so; at its end it ends.
func strangers(order string) error {
	var c crowd
	if err := json.Unmarshal([]byte(order), &c); err != nil {
		return err
	}
	if _, err := descriptorsHere(); err != nil {
		return err
	}
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := app.Accept()
			if err != nil {
				return
			}
			go io.Copy(io.Discard, conn)
		}
	}()
	fmt.Println(app.Addr())
	in := bufio.NewReader(os.Stdin)
	if _, err := in.ReadString('\n'); err != nil {
		return err
	}
	burst := make([]byte, c.Burst)
	conns := make([]net.Conn, c.N) // or the collector would close them
	for i := range conns {
		conn, err := net.Dial("tcp", c.Addr)
		if err != nil {
			return err
		}
		conns[i] = conn
		if c.Own {
			from(conn, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1).String())
		}
		if c.Each > 0 {
			go func() {
				for k := range c.Hello {
					if _, err := conn.Write(c.Hello[k : k+1]); err != nil {
						return
					}
					time.Sleep(c.Each)
				}
			}()
			continue
		}
		conn.Write(c.Hello)
		if c.Burst > 0 && i%4 == 0 {
			conn.Write(burst)
		}
	}
	io.Copy(io.Discard, in)
	runtime.KeepAlive(conns)
	return nil
}

// crowd starts the strangers and tells where their app is; begin lets them begin.
func (r *rig) crowd(c crowd) (app string, begin func()) {
	r.t.Helper()
	c.Addr = r.addr
	order, err := json.Marshal(c)
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), asStrangers+"="+string(order)), os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		r.t.Fatal(err)
	}
	return strings.TrimSpace(line), func() { io.WriteString(in, "begin\n") }
}

// held is the heap in use and the stacks of this process.
func held() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools kept goes with the second one
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// bounded checks what n connections hold of this process.
func bounded(t *testing.T, before int64, n, each int) {
	t.Helper()
	got := (held() - before) / int64(n)
	t.Logf("%d connections, %d bytes of heap and stack each", n, got)
	if got > int64(each) {
		t.Errorf("%d bytes of heap and stack a connection, more than %d", got, each)
	}
}

// many is how many connections a test may have, at two descriptors each here and with the
// strangers: as many as it wants, or what the limit of descriptors lets be.
func many(t *testing.T, want int) int {
	t.Helper()
	limit, err := descriptorsHere()
	if err != nil {
		t.Fatal(err)
	}
	n := min(want, (limit-500)/2)
	if n < want {
		t.Logf("the limit of %d descriptors lets %d connections be, not %d", limit, n, want)
	}
	if testing.Short() {
		n = min(n, 500)
	}
	return n
}

func TestThreat_K08_IdleConnectionsHoldTwoDescriptorsAndLittleMemory(t *testing.T) {
	n := many(t, 10_000)
	r := newRig(t, func(c *Config) {
		c.Limits = Limits{Rate: -1, PerSource: -1, PendingPerSource: -1}
		c.Timeouts.Handshake, c.Timeouts.Connect = time.Minute, time.Minute // the machine may be slow
	})
	r.instance(1, 1)
	raw := rawHello(t, host(appID(1), "-s"))
	// The burst makes a flow bulk, so that what a splice leaves behind would count.
	const burst = 64 << 10
	app, begin := r.crowd(crowd{N: n, Hello: raw, Burst: burst})
	r.mu.Lock()
	r.where[netip.AddrPortFrom(address(1), 443)] = app
	r.mu.Unlock()
	fds, before := descriptors(t), held()
	begin()
	r.eventually(func() bool { return r.edge.Stats().Relaying[hostname.Passthrough] == int64(n) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	r.eventually(func() bool { return r.edge.Stats().BytesUp == uint64(n*len(raw)+(n+3)/4*burst) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	if got, pipes := descriptors(t)-fds, r.edge.Stats().Pipes; got > 2*n+2*keptPipes+16 || pipes > keptPipes {
		t.Errorf("%d descriptors for %d idle connections, %d pipes", got, n, pipes)
	}
	bounded(t, before, n, 15<<10)
	// Others are served beside them.
	r.instance(2, 2)
	r.serve(2, 443, tlsEcho)
	conn, err := r.tls(host(appID(2), "-s"))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, conn, 1000)
}

// Slow clients, each a source of its own, hold little, are cut off and counted, and keep
// nobody else out.
func TestThreat_K08_SlowClientsHoldLittleAndOthersAreServed(t *testing.T) {
	n := many(t, 1000)
	r := newRig(t, func(c *Config) {
		asBalancer(c)
		c.Limits, c.Timeouts.Handshake = Limits{Rate: -1}, 6*time.Second
	})
	r.instance(1, 1)
	r.serve(1, 80, echo)
	_, begin := r.crowd(crowd{N: n, Hello: rawHello(t, host(appID(1), "")), Own: true, Each: 100 * time.Millisecond})
	before := held()
	begin()
	r.eventually(func() bool { return r.edge.Stats().Open >= int64(n)*9/10 }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	bounded(t, before, n, 24<<10)
	served := 0
	for r.edge.Stats().Refused["hello_read"] == 0 {
		conn := r.tcp()
		from(conn, "192.0.2.2:1")
		s, err := r.handshake(conn, clientConfig(host(appID(1), "")))
		if err != nil {
			t.Fatal(err)
		}
		echoes(t, s, 100)
		s.Close()
		served++
	}
	t.Logf("%d connections of another were served meanwhile", served)
	if served == 0 {
		t.Error("nobody was served while they were slow")
	}
	r.eventually(func() bool { return r.edge.Stats().Refused["hello_read"] == uint64(n) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
}

// The largest hellos that are taken, all but their last byte, hold no more than they are.
func TestThreat_K08_GiantHellosHoldWhatTheyAre(t *testing.T) {
	n := many(t, 1000)
	r := newRig(t, func(c *Config) {
		asBalancer(c)
		c.Limits, c.Timeouts.Handshake = Limits{Rate: -1}, 20*time.Second
	})
	r.instance(1, 1)
	r.serve(1, 80, echo)
	record := []byte{22, 3, 1, 0x40, 0}
	giant := append(record, 1, 0, 0x3f, 0xfc)
	giant = append(giant, make([]byte, 16<<10-5)...) // a record of 16 KiB, but for its last byte
	_, begin := r.crowd(crowd{N: n, Hello: giant, Own: true})
	before := held()
	begin()
	r.eventually(func() bool { return r.edge.Stats().Open == int64(n) }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
	time.Sleep(500 * time.Millisecond) // all of them have been read
	if s := r.edge.Stats(); s.Open != int64(n) {
		t.Fatalf("they do not wait: %+v", s)
	}
	bounded(t, before, n, 56<<10)
	conn := r.tcp()
	from(conn, "192.0.2.2:1")
	s, err := r.handshake(conn, clientConfig(host(appID(1), "")))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, s, 100)
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
