// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"context"
	"crypto/tls"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// middle is an attacker on the path who ends TLS at both sides with the keys that
// he has, and passes on every decrypted byte. With a client's key he asks his
// victim for its certificate, as a server does that wants its evidence.
func middle(t *testing.T, target string, serverKey, clientKey *Key) string {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}}
	ask := tls.NoClientCert
	if clientKey != nil {
		ask, cfg.Certificates = tls.RequireAnyClientCert, []tls.Certificate{clientKey.cert}
	}
	return rawServerAsking(t, serverKey, ask, func(victim *tls.Conn) {
		genuine, err := tls.Dial("tcp", target, cfg)
		if err != nil {
			t.Error(err)
			return
		}
		var both sync.WaitGroup
		both.Go(func() { io.Copy(genuine, victim); genuine.CloseWrite() })
		both.Go(func() { io.Copy(victim, genuine); victim.CloseWrite() })
		both.Wait()
		genuine.Close()
	})
}

// Threat C01: the attacker holds a copy of the TLS key of a genuine instance, so
// to TLS he is that instance, and has it attest for him.
func TestThreat_C01_RelayWithALeakedKeyIsRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	peer := v.boot(t, appA, inst2, newKey(t))

	t.Run("the server's key leaked", func(t *testing.T) {
		addr, refused := serve(t, m.server())
		conn, err := Dial(t.Context(), "tcp", middle(t, addr, m.key, nil), v.client())
		wantRefusal(t, conn, err, "channel_report_data")
		waitRefused(t, refused, "channel_refused") // the client's refusal, passed on
		if m.quotes.Load() != 1 {
			t.Error("the genuine instance was not asked: this was no relay")
		}
	})
	t.Run("both ends' keys leaked", func(t *testing.T) {
		addr, refused := serve(t, m.serverFor(appA))
		conn, err := Dial(t.Context(), "tcp", middle(t, addr, m.key, peer.key), v.mutual(peer))
		wantRefusal(t, conn, err, "channel_report_data")
		waitRefused(t, refused, "channel_refused")
	})
	t.Run("without the attacker the same ends accept each other", func(t *testing.T) {
		addr, _ := serve(t, m.serverFor(appA))
		conn, err := Dial(t.Context(), "tcp", addr, v.mutual(peer))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		mustEcho(t, conn)
	})
}

// answer plays the server's part of a channel with the TLS key given, on the
// machine given, with evidence over whatever edit makes of the commitment.
func answer(t *testing.T, m *machine, key *Key, edit func(*commitment)) string {
	t.Helper()
	return rawServer(t, key, func(conn *tls.Conn) {
		payload, err := readFrame(conn, frameHello)
		if err != nil {
			t.Error(err)
			return
		}
		theirs, err := decodeHello(payload)
		if err != nil {
			t.Error(err)
			return
		}
		mine := hello{nonce: [32]byte{0x5a}}
		writeFrame(conn, frameHello, mine.encode())
		cs := conn.ConnectionState()
		exported, err := export(&cs, theirs.nonce[:], mine.nonce[:])
		if err != nil {
			t.Error(err)
			return
		}
		c := commitment{role: ServerRole, exported: exported, own: key.SPKI(), nonce: theirs.nonce[:], intended: theirs.intended}
		if edit != nil {
			edit(&c)
		}
		evidence, err := m.Attest(context.Background(), c.reportData())
		if err != nil {
			t.Error(err)
			return
		}
		writeFrame(conn, frameEvidence, evidence)
		if _, err := readFrame(conn, frameAccept); err == nil {
			writeFrame(conn, frameAccept, nil)
		}
	})
}

// Threats C01, B08: evidence of the right machine, right key and right moment that
// says one thing wrong.
func TestThreat_C01_EvidenceOfAnotherSessionRoleOrIntentIsRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	for name, edit := range map[string]func(*commitment){
		"as it should be":            nil,
		"another session's exporter": func(c *commitment) { c.exported = make([]byte, 32) },
		"a client's evidence":        func(c *commitment) { c.role = ClientRole },
		"another nonce":              func(c *commitment) { c.nonce = make([]byte, 32) },
		"made for another intent":    func(c *commitment) { c.intended = lp(nil, appB[:], nil, nil) },
		"made for another client":    func(c *commitment) { c.peer = newKey(t).SPKI() },
		"made for another key":       func(c *commitment) { c.own = newKey(t).SPKI() },
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := Dial(t.Context(), "tcp", answer(t, m, m.key, edit), v.client())
			if edit == nil {
				if err != nil {
					t.Fatal(err)
				}
				conn.Close()
				return
			}
			wantRefusal(t, conn, err, "channel_report_data")
		})
	}
}

// Threat C01: an attacker who has the key of a node that talks to its own kind
// answers the node with the node's own evidence. Nonces and roles each stop it;
// both must be gone for this test to fail.
func TestThreat_C01_ReflectedEvidenceIsRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr, refused := serve(t, m.serverFor(appA))
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, Certificates: []tls.Certificate{m.key.cert}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	intended, err := Intended{AppID: appA}.encode()
	if err != nil {
		t.Fatal(err)
	}
	mine := hello{nonce: [32]byte{1}, demand: true, intended: intended}
	writeFrame(conn, frameHello, mine.encode())
	if _, err := readFrame(conn, frameHello); err != nil {
		t.Fatal(err)
	}
	evidence, err := readFrame(conn, frameEvidence)
	if err != nil {
		t.Fatal(err)
	}
	writeFrame(conn, frameEvidence, evidence)
	writeFrame(conn, frameAccept, nil)
	waitRefused(t, refused, "channel_report_data")
}

// Threat C01: a session without the protocol's token, or with an older TLS, is
// refused by both ends, whoever took it away.
func TestThreat_C01_StrippedALPNAndOldTLSAreRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	for name, c := range map[string]struct {
		cfg  *tls.Config
		code string
	}{
		"no protocol":      {&tls.Config{}, "channel_alpn"},
		"another version":  {&tls.Config{NextProtos: []string{"dstack-attest/0"}}, "channel_alpn"},
		"TLS 1.2":          {&tls.Config{NextProtos: []string{ALPN}, MaxVersion: tls.VersionTLS12}, "channel_handshake"},
		"another protocol": {&tls.Config{NextProtos: []string{"h2"}}, "channel_alpn"},
	} {
		t.Run("a server with "+name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			cfg := c.cfg.Clone()
			cfg.Certificates = []tls.Certificate{m.key.cert}
			go func() {
				if raw, err := ln.Accept(); err == nil {
					conn := tls.Server(raw, cfg)
					conn.Handshake()
					io.Copy(io.Discard, conn)
					conn.Close()
				}
			}()
			conn, err := Dial(t.Context(), "tcp", ln.Addr().String(), v.client())
			wantRefusal(t, conn, err, c.code)
		})
		t.Run("a client with "+name, func(t *testing.T) {
			addr, refused := serve(t, m.server())
			cfg := c.cfg.Clone()
			cfg.InsecureSkipVerify = true
			if conn, err := tls.Dial("tcp", addr, cfg); err == nil {
				defer conn.Close()
			}
			waitRefused(t, refused, c.code)
		})
	}
	if m.quotes.Load() != 0 {
		t.Error("evidence was made for a session that may not be")
	}
}

// Threat C02: the same app of the same image, attested, but not the one that was
// meant.
func TestThreat_C02_AnotherInstanceOfTheSameAppIsRefused(t *testing.T) {
	v := newVendor(t)
	one, two := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appA, inst2, newKey(t))
	means := func(id dstack.InstanceID, c *Config) *Config {
		c.Intended.InstanceID = &id
		return c
	}
	t.Run("as a server", func(t *testing.T) {
		addr, _ := serve(t, two.server())
		conn, err := Dial(t.Context(), "tcp", addr, means(inst1, v.client()))
		wantRefusal(t, conn, err, "channel_wrong_instance")
		conn, err = Dial(t.Context(), "tcp", addr, means(inst2, v.client()))
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	})
	t.Run("as a client", func(t *testing.T) {
		addr, refused := serve(t, means(inst1, one.serverFor(appA)))
		conn, err := Dial(t.Context(), "tcp", addr, v.mutual(two))
		wantRefusal(t, conn, err, "channel_refused")
		waitRefused(t, refused, "channel_wrong_instance")
	})
	t.Run("over RA-TLS", func(t *testing.T) {
		addr := serveRATLS(t, two, nil)
		c := v.ratls()
		c.Intended.InstanceID = &inst1
		conn, err := DialRATLS(t.Context(), "tcp", addr, c)
		wantRefusal(t, conn, err, "channel_wrong_instance")
	})
	if err := (Intended{InstanceID: &inst1}).Check(Identity{}); fault.Code(err) != "channel_wrong_instance" {
		t.Errorf("an app without instance ids passes for an instance: %v", err)
	}
}

// switcher is a proxy that sends the first TCP connection to one backend and every
// later one to another.
func switcher(t *testing.T, first, later string) (addr string, conns *atomic.Int32) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	conns = new(atomic.Int32)
	var work sync.WaitGroup
	work.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			target := first
			if conns.Add(1) > 1 {
				target = later
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			work.Go(func() { io.Copy(out, in); out.(*net.TCPConn).CloseWrite() })
			work.Go(func() { io.Copy(in, out); in.Close(); out.Close() })
		}
	})
	t.Cleanup(func() { ln.Close(); work.Wait() })
	return ln.Addr().String(), conns
}

// Threat C03: the path switches to another backend after the first connection was
// verified.
func TestThreat_C03_ABackendSwitchedOnTheSecondConnectionGetsNothing(t *testing.T) {
	v := newVendor(t)
	m, evil := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst2, newKey(t))
	httpServer := func(mach *machine) (string, *atomic.Int32) {
		l, err := Listen("tcp", "127.0.0.1:0", mach.server())
		if err != nil {
			t.Fatal(err)
		}
		var requests atomic.Int32
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { requests.Add(1) })}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
		return l.Addr().String(), &requests
	}
	genuine, served := httpServer(m)
	other, stolen := httpServer(evil)
	proxy, conns := switcher(t, genuine, other)

	transport := v.client().Transport()
	transport.DisableKeepAlives = true // a connection for each request
	client := &http.Client{Transport: transport}
	resp, err := client.Get("https://" + proxy)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	_, err = client.Post("https://"+proxy, "text/plain", strings.NewReader("secret"))
	wantCode(t, err, "channel_wrong_app")
	if served.Load() != 1 || stolen.Load() != 0 || conns.Load() != 2 {
		t.Errorf("%d requests served, %d stolen, %d connections", served.Load(), stolen.Load(), conns.Load())
	}
}

// Threat C03: a failed handshake is not tried again by itself.
func TestThreat_C03_OneDialIsOneConnection(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	genuine, _ := serve(t, m.server())
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := dead.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1)) // takes a part of the client's hello
			conn.Close()
		}
	}()
	proxy, conns := switcher(t, dead.Addr().String(), genuine)
	conn, err := Dial(t.Context(), "tcp", proxy, v.client())
	wantRefusal(t, conn, err, "channel_handshake")
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections for one Dial", n)
	}
	dead.Close()
	<-done
}

// Threat C04: a certificate that authorities vouch for does not stand in for
// evidence.
func TestThreat_C04_ACertificateOfAnAuthorityIsNoEvidence(t *testing.T) {
	v := newVendor(t)
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.TLS = &tls.Config{NextProtos: []string{ALPN, "http/1.1"}}
	server.StartTLS()
	defer server.Close()
	addr := server.Listener.Addr().String()
	if resp, err := server.Client().Get(server.URL); err != nil { // the authority's own client is content
		t.Fatal(err)
	} else {
		resp.Body.Close()
	}
	r := v.ratls()
	r.MaxAge = AnyAge
	conn, err := DialRATLS(t.Context(), "tcp", addr, r)
	wantRefusal(t, conn, err, "ratls_no_evidence")
	conn, err = Dial(t.Context(), "tcp", addr, v.client())
	wantRefusal(t, conn, err, "channel_broken")
}

// Threat C05: a gateway that ends TLS with a key of its own is not the app behind
// it, even though it passes the app's evidence on.
func TestThreat_C05_AGatewayThatEndsTLSIsNotTheApp(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr, _ := serve(t, m.server())
	conn, err := Dial(t.Context(), "tcp", middle(t, addr, newKey(t), nil), v.client())
	wantRefusal(t, conn, err, "channel_report_data")

	// Passing bytes through, it does not matter.
	through, _ := switcher(t, addr, addr)
	if conn, err = Dial(t.Context(), "tcp", through, v.client()); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustEcho(t, conn)
}

// Threat B08: evidence that was good once, shown again by a thief of the key.
func TestThreat_B08_ReplayedEvidenceIsRefused(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr, _ := serve(t, m.server())
	conn, err := Dial(t.Context(), "tcp", addr, v.client())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	thief := &Config{Attester: still(*m.last.Load()), Key: m.key, AnyClient: true}
	addr, _ = serve(t, thief)
	conn, err = Dial(t.Context(), "tcp", addr, v.client())
	wantRefusal(t, conn, err, "channel_report_data")
}

// Threat B20: an app asks its guest for a quote over the binding of a connection
// that ends in the app. The evidence is genuine and about the right app; only the
// key gives it away.
func TestThreat_B20_EvidenceThatAnAppMadeIsNoChannelEvidence(t *testing.T) {
	v := newVendor(t)
	committed := v.boot(t, appA, inst1, newKey(t))
	conn, err := Dial(t.Context(), "tcp", answer(t, committed, newKey(t), nil), v.client())
	wantRefusal(t, conn, err, "channel_key_mismatch")

	upstream := v.boot(t, appA, inst1, nil)
	conn, err = Dial(t.Context(), "tcp", answer(t, upstream, newKey(t), nil), v.client())
	wantRefusal(t, conn, err, "channel_key_uncommitted")

	// The same holds for clients.
	server := v.boot(t, appB, inst2, newKey(t))
	addr, refused := serve(t, server.serverFor(appA))
	app := v.mutual(committed)
	app.Intended.AppID, app.Key = appB, newKey(t)
	conn, err = Dial(t.Context(), "tcp", addr, app)
	wantRefusal(t, conn, err, "channel_refused")
	waitRefused(t, refused, "channel_key_mismatch")
}

// --- threat C04: nobody switches certificate checks off without putting evidence
// in their place ---

// lint returns what is wrong with how a file configures TLS.
func lint(file *ast.File, insideChannel bool) []string {
	var bad []string
	const skip = "Insecure" + "SkipVerify"
	allowed := map[*ast.Ident]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		sel, ok := lit.Type.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != "Config" {
			return true
		}
		if pkg, ok := sel.X.(*ast.Ident); !ok || pkg.Name != "tls" {
			return true
		}
		keys := map[string]*ast.KeyValueExpr{}
		for _, e := range lit.Elts {
			if kv, ok := e.(*ast.KeyValueExpr); ok {
				if id, ok := kv.Key.(*ast.Ident); ok {
					keys[id.Name] = kv
				}
			}
		}
		if kv := keys[skip]; kv != nil && insideChannel && keys["VerifyConnection"] != nil {
			allowed[kv.Key.(*ast.Ident)] = true
		}
		if insideChannel {
			v := keys["MinVersion"]
			if sel, ok := valueOf(v).(*ast.SelectorExpr); !ok || sel.Sel.Name != "VersionTLS13" {
				bad = append(bad, "a tls.Config without MinVersion: tls.VersionTLS13")
			}
		}
		return true
	})
	ast.Inspect(file, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok && id.Name == skip && !allowed[id] {
			bad = append(bad, skip+" without VerifyConnection, or outside package channel")
		}
		return true
	})
	return bad
}

func valueOf(kv *ast.KeyValueExpr) ast.Expr {
	if kv == nil {
		return nil
	}
	return kv.Value
}

func TestThreat_C04_NoTLSConfigSkipsChecksWithoutOthersInTheirPlace(t *testing.T) {
	files := 0
	root := testkit.Root()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules" || d.Name() == "testdata"):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, src, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files++
		for _, b := range lint(file, filepath.Dir(path) == filepath.Join(root, "channel")) {
			t.Errorf("%s: %s", path, b)
		}
		return nil
	})
	if err != nil || files < 20 {
		t.Fatalf("%d files, %v", files, err)
	}
}

func TestTheLintOfTLSConfigsCatchesWhatItShould(t *testing.T) {
	const skip = "Insecure" + "SkipVerify"
	for src, want := range map[string]int{
		`&tls.Config{MinVersion: tls.VersionTLS13, ` + skip + `: true, VerifyConnection: f}`: 0,
		`&tls.Config{MinVersion: tls.VersionTLS13}`:                                          0,
		`&tls.Config{MinVersion: tls.VersionTLS13, ` + skip + `: true}`:                      1,
		`&tls.Config{MinVersion: tls.VersionTLS12}`:                                          1,
		`&tls.Config{}`: 1,
		`func() { var c tls.Config; c.` + skip + ` = x }`:      1,
		`func(c *tls.Config) *bool { return &c.` + skip + ` }`: 1,
		`tls.Config{` + skip + `: false}`:                      2,
	} {
		file, err := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nvar _ = "+src, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := lint(file, true); len(got) != want {
			t.Errorf("%s: %q, want %d", src, got, want)
		}
	}
	file, _ := parser.ParseFile(token.NewFileSet(), "x.go", "package x\nvar _ = &tls.Config{"+skip+": true, VerifyConnection: f}", 0)
	if got := lint(file, false); len(got) != 1 {
		t.Errorf("outside the package: %q", got)
	}
}
