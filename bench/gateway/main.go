// SPDX-License-Identifier: Apache-2.0

// Command gateway measures gateway/edge beside a direct connection, HAProxy and nginx, on
// one machine in one minute: rounds take turns, medians are compared, and the CPU of each
// proxy's processes is read from /proc, since client and backend share the machine with it.
//
//	gateway [-rounds 5] [-time 1s] [-bulk 1024] [-idle 1000,9500] [-only words]
//
// It prints JSON. Absolute numbers are the machine's; the ratios are what is to be read.
//
// "beside a load" is an app's messages while strangers hold 4,000 idle connections to another
// app and 200 hellos that never end, and move a gigabit a second; "beside a flood" is so too
// while they try 2,000 new connections a second from one source, of which ours, with its
// default limits, refuses three quarters; "calm" is without them.
package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hello"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/wgconfig"
)

const (
	base    = "bench.example.com"
	message = 64
)

var (
	app      = dstack.AppID{0xa}
	other    = dstack.AppID{0xb}
	besides  = other.String() + "-s." + base
	passName = app.String() + "-s." + base
	termName = app.String() + "." + base
)

func main() {
	log.SetFlags(0)
	var lim syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim) == nil {
		more := syscall.Rlimit{Cur: 65536, Max: max(65536, lim.Max)}
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &more) != nil {
			lim.Cur = lim.Max
			syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
		}
	}
	var err error
	switch {
	case len(os.Args) == 2 && os.Args[1] == "backend":
		err = backend()
	case len(os.Args) == 4 && os.Args[1] == "edge":
		err = ours(os.Args[2], os.Args[3], edge.Limits{PerSource: -1, PendingPerSource: -1, Rate: -1})
	case len(os.Args) == 4 && os.Args[1] == "limited":
		err = ours(os.Args[2], os.Args[3], edge.Limits{})
	case len(os.Args) == 5 && os.Args[1] == "strangers":
		err = strangers(os.Args[2], os.Args[3], os.Args[4])
	default:
		err = bench()
	}
	if err != nil {
		log.Fatal(err)
	}
}

// ports are where everything listens.
type ports struct{ Pass, Term string }

func ready(p ports) error { return json.NewEncoder(os.Stdout).Encode(p) }

// backend answers commands: 'B' and a size sends so many bytes, 'E' echoes messages. On the
// passthrough port a ClientHello goes before, as it does to an app.
func backend() error {
	var p ports
	for _, l := range []struct {
		addr  *string
		hello bool
	}{{&p.Pass, true}, {&p.Term, false}} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		*l.addr = ln.Addr().String()
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go answer(c, l.hello)
			}
		}()
	}
	if err := ready(p); err != nil {
		return err
	}
	wait()
	return nil
}

func wait() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, os.Interrupt)
	<-c
}

func answer(c net.Conn, withHello bool) {
	defer c.Close()
	var r io.Reader = c
	if withHello {
		h, raw, err := hello.Read(c, nil)
		if err != nil {
			return
		}
		if rest := raw[h.Size:]; len(rest) > 0 {
			r = io.MultiReader(bytes.NewReader(rest), c)
		}
	}
	var head [9]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return
	}
	if head[0] == 'B' {
		buf := make([]byte, 256<<10)
		for left := int(binary.BigEndian.Uint64(head[1:])); left > 0; {
			n, err := c.Write(buf[:min(left, len(buf))])
			if err != nil {
				return
			}
			left -= n
		}
		return
	}
	b := make([]byte, message)
	for {
		if _, err := io.ReadFull(r, b); err != nil {
			return
		}
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// ours is the edge before the backend; certs is the PEM file of key and certificate.
func ours(backend, certs string, limits edge.Limits) error {
	var to ports
	if err := json.Unmarshal([]byte(backend), &to); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(certs, certs)
	if err != nil {
		return err
	}
	table := route.New(route.Config{})
	open := portpolicy.Open()
	now := time.Now()
	var peers []wgconfig.Status
	for i, id := range []dstack.AppID{app, other} {
		key := wgconfig.GeneratePrivateKey().Public()
		if _, err := table.Register(route.Record{App: id, Instance: dstack.InstanceID{byte(i + 1)}, Compose: dstack.ComposeHash{1}, Key: key,
			Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 2)}), Policy: &open, Attested: now, Until: now.Add(time.Hour)}); err != nil {
			return err
		}
		peers = append(peers, wgconfig.Status{Key: key, Handshake: now})
	}
	table.Observe(peers)
	d := net.Dialer{KeepAlive: -1}
	e, err := edge.New(edge.Config{
		Rules:  func() hostname.Rules { return hostname.Rules{Bases: []hostname.Name{base}} },
		Routes: table,
		Dial: func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			if a.Port() == 443 {
				return d.DialContext(ctx, "tcp", to.Pass)
			}
			return d.DialContext(ctx, "tcp", to.Term)
		},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &cert, nil },
		Limits:         limits,
	})
	if err != nil {
		return err
	}
	ls, err := edge.Listen(context.Background(), "127.0.0.1:0", 2)
	if err != nil {
		return err
	}
	for _, l := range ls {
		go e.Serve(context.Background(), l)
	}
	a := ls[0].Addr().String()
	if err := ready(ports{a, a}); err != nil {
		return err
	}
	wait()
	return nil
}

// proxy is one of the compared.
type proxy struct {
	name string
	ports
	pid int // 0 for the direct way
}

// processes are the proxy's and its workers'.
func (p proxy) processes() []string {
	if p.pid == 0 {
		return nil
	}
	out := []string{strconv.Itoa(p.pid)}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", p.pid, p.pid))
	return append(out, strings.Fields(string(b))...)
}

// cpu is the time that the proxy has used, in seconds; its unit is 1/100 s (USER_HZ).
func (p proxy) cpu() (s float64) {
	for _, pid := range p.processes() {
		b, _ := os.ReadFile("/proc/" + pid + "/stat")
		if _, rest, ok := strings.Cut(string(b), ") "); ok {
			f := strings.Fields(rest)
			user, _ := strconv.ParseFloat(f[11], 64)
			system, _ := strconv.ParseFloat(f[12], 64)
			s += (user + system) / 100
		}
	}
	return s
}

// memory is the resident set in bytes, and the pipes that are open.
func (p proxy) memory() (rss float64, pipes int) {
	for _, pid := range p.processes() {
		b, _ := os.ReadFile("/proc/" + pid + "/statm")
		if f := strings.Fields(string(b)); len(f) > 1 {
			pages, _ := strconv.ParseFloat(f[1], 64)
			rss += pages * float64(os.Getpagesize())
		}
		fds, _ := filepath.Glob("/proc/" + pid + "/fd/*")
		for _, fd := range fds {
			if to, _ := os.Readlink(fd); strings.HasPrefix(to, "pipe:") {
				pipes++
			}
		}
	}
	return rss, pipes
}

// start runs a child that prints its ports.
func start(args ...string) (*exec.Cmd, ports, error) {
	var p ports
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		err = json.NewDecoder(out).Decode(&p)
	}
	return cmd, p, err
}

func freePort() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func bench() error {
	rounds := flag.Int("rounds", 5, "how often everything is measured")
	length := flag.Duration("time", time.Second, "of a measurement of rates")
	bulk := flag.Int("bulk", 1024, "MiB of a bulk transfer, of each of 4 connections")
	idle := flag.String("idle", "1000,9500", "numbers of idle connections")
	only := flag.String("only", "", "measure only what has these words in its name")
	flag.Parse()
	dir, err := os.MkdirTemp("", "bench-gateway")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // nginx's workers are somebody else
	pemFile := filepath.Join(dir, "cert.pem")
	roots, err := certificate(pemFile)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	back, to, err := start(self, "backend")
	if err != nil {
		return err
	}
	defer end(back)
	addr, _ := json.Marshal(to)
	oursCmd, at, err := start(self, "edge", string(addr), pemFile)
	if err != nil {
		return err
	}
	defer end(oursCmd)
	proxies := []proxy{{"direct", to, 0}, {"ours", at, oursCmd.Process.Pid}}
	for _, other := range []struct {
		name   string
		config func(listen, to ports, dir string) string
		args   []string
	}{{"haproxy", haproxy, []string{"haproxy", "-db", "-f"}}, {"nginx", nginx, []string{"nginx", "-p", dir, "-c"}}} {
		listen := ports{freePort(), freePort()}
		file := filepath.Join(dir, other.name+".conf")
		if err := os.WriteFile(file, []byte(other.config(listen, to, dir)), 0o644); err != nil {
			return err
		}
		cmd := exec.Command(other.args[0], append(other.args[1:], file)...)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			log.Printf("%s is left out: %v", other.name, err)
			continue
		}
		defer end(cmd)
		for range 100 {
			c, err := net.Dial("tcp", listen.Pass)
			if err == nil {
				c.Close()
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		proxies = append(proxies, proxy{other.name, listen, cmd.Process.Pid})
	}
	limitedCmd, at, err := start(self, "limited", string(addr), pemFile)
	if err != nil {
		return err
	}
	defer end(limitedCmd)
	flooded := slices.Clone(proxies) // with none, it is the machine and the backend that suffer
	flooded[1] = proxy{"ours", at, limitedCmd.Process.Pid}
	c := &client{certs: pemFile, roots: roots, length: *length, bulk: *bulk << 20}
	if c.raw, err = firstFlight(roots, passName); err != nil {
		return err
	}
	if c.other, err = firstFlight(roots, besides); err != nil {
		return err
	}
	all := map[string]map[string][]float64{} // metric, proxy, rounds
	note := func(metric, name string, v float64) {
		if all[metric] == nil {
			all[metric] = map[string][]float64{}
		}
		all[metric][name] = append(all[metric][name], v)
	}
	// Memory first, for what the other measurements leave behind would be used again.
	fresh := map[string]float64{}
	for _, p := range proxies {
		fresh[p.name], _ = p.memory()
	}
	for s := range strings.SplitSeq(*idle, ",") {
		if !strings.Contains("idle", *only) {
			break
		}
		n, err := strconv.Atoi(s)
		if err != nil {
			return err
		}
		for _, p := range proxies[1:] {
			for _, terminate := range []bool{false, true} {
				rss, pipes, err := c.idle(p, fresh[p.name], n, terminate)
				if err != nil {
					log.Printf("%d idle by %s: %v", n, p.name, err)
					continue
				}
				mode := map[bool]string{false: "passthrough", true: "terminate"}[terminate]
				note(fmt.Sprintf("idle %d %s bytes each", n, mode), p.name, rss)
				note(fmt.Sprintf("idle %d %s pipe ends", n, mode), p.name, float64(pipes))
			}
		}
	}
	quantiles := func(metric, name string, lat []time.Duration) {
		if len(lat) > 0 {
			slices.Sort(lat)
			note(metric+" p50 us", name, lat[len(lat)/2].Seconds()*1e6)
			note(metric+" p99 us", name, lat[len(lat)*99/100].Seconds()*1e6)
		}
	}
	for range *rounds {
		for _, m := range c.metrics() {
			if !strings.Contains(m.name, *only) {
				continue
			}
			for _, p := range proxies {
				if m.terminate && p.pid == 0 {
					continue
				}
				cpu, begun := p.cpu(), time.Now()
				n, lat, err := m.run(p)
				if err != nil {
					return fmt.Errorf("%s by %s: %w", m.name, p.name, err)
				}
				took, used := time.Since(begun).Seconds(), p.cpu()-cpu
				note(m.name+"/s", p.name, n/took)
				if used > 0 {
					note(m.name+"/cpu-s", p.name, n/used)
				}
				quantiles(m.name, p.name, lat)
			}
		}
		if !strings.Contains("flood", *only) {
			continue
		}
		for _, p := range flooded {
			calm, err := c.paced(p)
			if err != nil {
				return err
			}
			quantiles("another app, calm", p.name, calm)
			for what, fresh := range map[string]int{"load": 0, "flood": newOnes} {
				lat, did, err := c.beside(p, fresh)
				if err != nil {
					return fmt.Errorf("a %s at %s: %w", what, p.name, err)
				}
				quantiles("another app, beside a "+what, p.name, lat)
				note("a "+what+"'s connections/s", p.name, did.Connections/did.Seconds)
				note("a "+what+"'s MB/s", p.name, did.MB/did.Seconds)
				note("another app, p99 beside a "+what+" to calm", p.name, lat[len(lat)*99/100].Seconds()/calm[len(calm)*99/100].Seconds())
			}
		}
	}
	type row struct {
		Median map[string]float64 `json:"median"`
		Ratio  map[string]float64 `json:"ours_to"`
	}
	out := map[string]row{}
	for metric, by := range all {
		r := row{map[string]float64{}, map[string]float64{}}
		for name, v := range by {
			r.Median[name] = median(v)
		}
		for name, v := range r.Median {
			if name != "ours" && v > 0 {
				r.Ratio[name] = float64(int(r.Median["ours"]/v*1000)) / 1000
			}
		}
		out[metric] = r
	}
	enc := json.NewEncoder(os.Stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func end(c *exec.Cmd) {
	c.Process.Signal(syscall.SIGTERM)
	c.Wait()
}

func certificate(file string) (*x509.CertPool, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*." + base}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...)
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return pool, os.WriteFile(file, text, 0o600)
}

func haproxy(listen, to ports, dir string) string {
	return `global
  nbthread 2
  maxconn 9700
  maxpipes 100
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode tcp
  option splice-request
  option splice-response
  timeout client 10m
  timeout server 10m
  timeout connect 5s
frontend pass
  bind ` + listen.Pass + `
  tcp-request inspect-delay 5s
  tcp-request content accept if { req.ssl_hello_type 1 }
  use_backend app if { req.ssl_sni -m str ` + passName + ` ` + besides + ` }
backend app
  server a ` + to.Pass + `
frontend term
  bind ` + listen.Term + ` ssl crt ` + dir + `/cert.pem
  default_backend plain
backend plain
  server a ` + to.Term + "\n"
}

func nginx(listen, to ports, dir string) string {
	return `load_module /usr/lib/nginx/modules/ngx_stream_module.so;
daemon off;
worker_processes 2;
worker_rlimit_nofile 20000;
pid ` + dir + `/nginx.pid;
error_log stderr error;
events { worker_connections 19900; }
stream {
  map_hash_bucket_size 256;
  map $ssl_preread_server_name $to { ` + passName + ` ` + to.Pass + `; ` + besides + ` ` + to.Pass + `; }
  server { listen ` + listen.Pass + ` reuseport; ssl_preread on; proxy_pass $to; }
  server {
    listen ` + listen.Term + ` reuseport ssl;
    ssl_certificate cert.pem; ssl_certificate_key cert.pem;
    ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets on;
    proxy_pass ` + to.Term + `;
  }
}
`
}

// client makes the load.
type client struct {
	raw    []byte // the first flight for passName
	other  []byte // and for the app beside it
	certs  string // the file of certificate and key
	roots  *x509.CertPool
	length time.Duration
	bulk   int
}

// firstFlight is a ClientHello with a name. What follows it is no TLS, so that neither
// client nor backend spends the machine on encryption; the proxies cannot tell.
func firstFlight(roots *x509.CertPool, name string) ([]byte, error) {
	a, b := net.Pipe()
	defer a.Close()
	go func() {
		tls.Client(b, &tls.Config{ServerName: name, RootCAs: roots}).Handshake()
		b.Close()
	}()
	_, raw, err := hello.Read(a, nil)
	return raw, err
}

type metric struct {
	name      string
	terminate bool
	run       func(proxy) (count float64, latencies []time.Duration, err error)
}

func (c *client) metrics() []metric {
	cached := func() *tls.Config { return &tls.Config{ClientSessionCache: tls.NewLRUClientSessionCache(4)} }
	fresh := func() *tls.Config { return &tls.Config{} }
	return []metric{
		{"passthrough bulk MB", false, c.bulkRun},
		{"passthrough messages", false, func(p proxy) (float64, []time.Duration, error) {
			return c.workers(8, func() (func() error, func(), error) {
				conn, err := c.pass(p)
				if err != nil {
					return nil, nil, err
				}
				return func() error { return exchange(conn) }, func() { conn.Close() }, nil
			})
		}},
		{"passthrough connections", false, func(p proxy) (float64, []time.Duration, error) {
			return c.workers(8, func() (func() error, func(), error) {
				return func() error {
					conn, err := c.pass(p)
					if err != nil {
						return err
					}
					defer conn.Close()
					return exchange(conn)
				}, func() {}, nil
			})
		}},
		{"terminate messages", true, func(p proxy) (float64, []time.Duration, error) {
			return c.workers(8, func() (func() error, func(), error) {
				conn, err := c.term(p, fresh())
				if err != nil {
					return nil, nil, err
				}
				return func() error { return exchange(conn) }, func() { conn.Close() }, nil
			})
		}},
		{"terminate full handshakes", true, c.handshakes(fresh)},
		{"terminate resumptions", true, c.handshakes(cached)},
	}
}

func (c *client) handshakes(config func() *tls.Config) func(proxy) (float64, []time.Duration, error) {
	return func(p proxy) (float64, []time.Duration, error) {
		return c.workers(8, func() (func() error, func(), error) {
			cfg := config()
			return func() error {
				conn, err := c.term(p, cfg)
				if err != nil {
					return err
				}
				defer conn.Close()
				return exchange(conn)
			}, func() {}, nil
		})
	}
}

var command = append([]byte{'E'}, make([]byte, 8)...)

func (c *client) pass(p proxy) (net.Conn, error) {
	conn, err := net.Dial("tcp", p.Pass)
	if err != nil {
		return nil, err
	}
	_, err = conn.Write(slices.Concat(c.raw, command))
	return conn, err
}

// term shakes hands by X25519, which all of the compared have.
func (c *client) term(p proxy, cfg *tls.Config) (net.Conn, error) {
	cfg.ServerName, cfg.RootCAs, cfg.CurvePreferences = termName, c.roots, []tls.CurveID{tls.X25519}
	conn, err := tls.Dial("tcp", p.Term, cfg)
	if err != nil {
		return nil, err
	}
	_, err = conn.Write(command)
	return conn, err
}

func exchange(c net.Conn) error {
	var b [message]byte
	if _, err := c.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b[:])
	return err
}

// workers repeats what each worker does for the length of a measurement, with pauses, if any,
// between.
func (c *client) workers(n int, make func() (do func() error, done func(), err error), pause ...time.Duration) (float64, []time.Duration, error) {
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		all   []time.Duration
		first atomic.Pointer[error]
		until = time.Now().Add(c.length)
	)
	for range n {
		wg.Go(func() {
			do, done, err := make()
			if err != nil {
				first.CompareAndSwap(nil, &err)
				return
			}
			defer done()
			var lat []time.Duration
			for at := time.Now(); at.Before(until); {
				if err := do(); err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				now := time.Now()
				lat = append(lat, now.Sub(at))
				if at = now; len(pause) > 0 {
					time.Sleep(pause[0])
					at = time.Now()
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, lat...)
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return 0, nil, *err
	}
	return float64(len(all)), all, nil
}

// What the strangers of a flood do.
const (
	idleOnes  = 4000
	slowOnes  = 200
	newOnes   = 2000                 // a second
	bytesRate = 125_000_000          // a second
	pace      = 2 * time.Millisecond // between messages of a connection of the other app
)

// done is what strangers did.
type done struct{ Connections, MB, Seconds float64 }

// strangers flood an app until they are told to stop: a process of their own, which leaves
// the processors to the others where it can, for strangers have their own. They say when
// they have begun, and at the end what they did.
func strangers(addr, roots, each string) error {
	syscall.Setpriority(syscall.PRIO_PROCESS, 0, 15)
	fresh, err := strconv.Atoi(each) // new connections a second
	if err != nil {
		return err
	}
	text, err := os.ReadFile(roots)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(text)
	hello, err := firstFlight(pool, passName)
	if err != nil {
		return err
	}
	from := func(source string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}, Timeout: 5 * time.Second}
		return d.Dial("tcp", addr)
	}
	var held []net.Conn
	open := func(source string, first []byte) (net.Conn, error) {
		conn, err := from(source)
		if err == nil {
			held = append(held, conn) // or the collector would close it
			_, err = conn.Write(first)
		}
		return conn, err
	}
	for i := range idleOnes {
		if _, err := open(fmt.Sprintf("127.0.1.%d", i%40+1), slices.Concat(hello, command)); err != nil {
			return err
		}
	}
	for range slowOnes {
		if _, err := open("127.0.0.3", hello[:len(hello)/2]); err != nil {
			return err
		}
	}
	bulk, err := open("127.0.0.4", slices.Concat(hello, []byte{'B'}, binary.BigEndian.AppendUint64(nil, 1<<40)))
	if err != nil {
		return err
	}
	var conns, bytes atomic.Int64
	go func() {
		buf := make([]byte, 256<<10)
		for n, begun := 0, time.Now(); ; {
			k, err := io.ReadFull(bulk, buf)
			if bytes.Add(int64(k)); err != nil {
				return
			}
			n += k
			time.Sleep(time.Duration(float64(n)/bytesRate*1e9) - time.Since(begun))
		}
	}()
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			for range fresh / 100 {
				if conn, err := from("127.0.0.2"); err == nil {
					conns.Add(1)
					conn.Write(hello)
					conn.(*net.TCPConn).SetLinger(0)
					conn.Close()
				}
			}
		}
	}()
	time.Sleep(500 * time.Millisecond)
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(ports{}); err != nil {
		return err
	}
	before, begun := done{float64(conns.Load()), float64(bytes.Load()) / 1e6, 0}, time.Now()
	wait()
	return out.Encode(done{float64(conns.Load()) - before.Connections, float64(bytes.Load())/1e6 - before.MB, time.Since(begun).Seconds()})
}

// beside measures the messages of an app beside strangers at another, who also try so many
// new connections a second.
func (c *client) beside(p proxy, fresh int) (lat []time.Duration, did done, err error) {
	cmd := exec.Command(os.Args[0], "strangers", p.Pass, c.certs, strconv.Itoa(fresh))
	cmd.Stderr = os.Stderr
	text, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, did, err
	}
	defer time.Sleep(500 * time.Millisecond)
	defer end(cmd)
	said := json.NewDecoder(text)
	if err := said.Decode(&ports{}); err != nil {
		return nil, did, err
	}
	if lat, err = c.paced(p); err != nil {
		return nil, did, err
	}
	cmd.Process.Signal(syscall.SIGTERM)
	err = said.Decode(&did)
	return lat, did, err
}

// paced are the latencies of an app's messages that come at a pace, not as fast as they can.
func (c *client) paced(p proxy) ([]time.Duration, error) {
	_, lat, err := c.workers(8, func() (func() error, func(), error) {
		conn, err := net.Dial("tcp", p.Pass)
		if err != nil {
			return nil, nil, err
		}
		if _, err := conn.Write(slices.Concat(c.other, command)); err != nil {
			return nil, nil, err
		}
		return func() error { return exchange(conn) }, func() { conn.Close() }, exchange(conn)
	}, pace)
	return lat, err
}

func (c *client) bulkRun(p proxy) (float64, []time.Duration, error) {
	var (
		wg    sync.WaitGroup
		total atomic.Int64
		first atomic.Pointer[error]
	)
	for range 4 {
		wg.Go(func() {
			conn, err := net.Dial("tcp", p.Pass)
			if err != nil {
				first.CompareAndSwap(nil, &err)
				return
			}
			defer conn.Close()
			conn.Write(slices.Concat(c.raw, []byte{'B'}, binary.BigEndian.AppendUint64(nil, uint64(c.bulk))))
			buf := make([]byte, 256<<10)
			for {
				n, err := conn.Read(buf)
				total.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return 0, nil, *err
	}
	if got := int(total.Load()); got != 4*c.bulk {
		return 0, nil, fmt.Errorf("%d bytes of %d came", got, 4*c.bulk)
	}
	return float64(total.Load()) / 1e6, nil, nil
}

// idle opens connections that each exchange one message, and returns the proxy's growth
// since it was fresh.
func (c *client) idle(p proxy, fresh float64, n int, terminate bool) (each float64, pipes int, err error) {
	conns := make([]net.Conn, 0, n)
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
		time.Sleep(500 * time.Millisecond)
	}()
	for range n {
		var conn net.Conn
		if terminate {
			conn, err = c.term(p, &tls.Config{})
		} else {
			conn, err = c.pass(p)
		}
		if err == nil {
			conns = append(conns, conn)
			err = exchange(conn)
		}
		if err != nil {
			return 0, 0, err
		}
	}
	time.Sleep(time.Second)
	after, pipes := p.memory()
	return (after - fresh) / float64(n), pipes, nil
}
