// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestAClientTalksToTheAppItMeans(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr, _ := serve(t, m.server())
	c := v.client()
	c.Intended.InstanceID, c.Intended.ComposeHashes = &inst1, []dstack.ComposeHash{{1}, good}
	conn, err := Dial(t.Context(), "tcp", addr, c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustEcho(t, conn)
	p := conn.Peer()
	if p.Identity.AppID != appA || *p.Identity.InstanceID != inst1 || p.Role != ServerRole || p.Binding != BindingSession ||
		!bytes.Equal(p.SPKI, m.key.SPKI()) || p.Trust != dstack.TrustDevelopment || p.Claims.TDX == nil || p.At.IsZero() {
		t.Errorf("peer %+v", p)
	}
}

func TestBothEndsGiveEvidence(t *testing.T) {
	v := newVendor(t)
	s, c := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst2, newKey(t))
	l, err := Listen("tcp", "127.0.0.1:0", s.serverFor(appB))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	got := make(chan *Conn, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			t.Error(err)
			close(got)
			return
		}
		got <- conn.(*Conn)
	}()
	conn, err := Dial(t.Context(), "tcp", l.Addr().String(), v.mutual(c))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	server := <-got
	if server == nil {
		return
	}
	defer server.Close()
	if p := server.Peer(); p.Identity.AppID != appB || p.Role != ClientRole || !bytes.Equal(p.SPKI, c.key.SPKI()) {
		t.Errorf("the server sees %+v", p)
	}
	if p := conn.Peer(); p.Identity.AppID != appA || p.Role != ServerRole {
		t.Errorf("the client sees %+v", p)
	}
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d, %v after the peer closed its half", n, err)
	}
}

// What one end refuses, the other learns by code, and the server's own log in full.
func TestPeersThatAreNotAccepted(t *testing.T) {
	v, other := newVendor(t), newVendor(t)
	machineOf := func(app dstack.AppID) *machine { return v.boot(t, app, inst1, newKey(t)) }
	for _, c := range []struct {
		name           string
		server, client *Config
		code           string // at the client
		refused        string // at the server; empty when it never learns
	}{
		{"another app", machineOf(appB).server(), v.client(), "channel_wrong_app", "channel_refused"},
		{"another workload", machineOf(appA).server(), func() *Config {
			c := v.client()
			c.Intended.ComposeHashes = []dstack.ComposeHash{{9}}
			return c
		}(), "channel_wrong_workload", "channel_refused"},
		{"evidence under a root that nobody trusts", other.boot(t, appA, inst1, newKey(t)).server(), v.client(), "unknown_root", "channel_refused"},
		{"a client of another app", machineOf(appA).serverFor(appB), v.mutual(machineOf(appA)), "channel_refused", "channel_wrong_app"},
		{"a client without evidence", machineOf(appA).serverFor(appB), v.client(), "channel_no_attester", "channel_handshake"},
		{"a server that knows it is not meant", func() *Config {
			m := machineOf(appB)
			c := m.server()
			c.Self = &m.id
			return c
		}(), v.client(), "channel_refused", "channel_not_intended"},
		{"a server that cannot make evidence", &Config{Attester: broken{}, AnyClient: true}, v.client(), "channel_refused", "channel_attest"},
		{"a server with endless evidence", &Config{Attester: endless{}, AnyClient: true}, v.client(), "channel_refused", "channel_attest"},
		{"evidence that is no container", &Config{Attester: garbage{}, AnyClient: true}, v.client(), "container_version", "channel_refused"},
		{"an appraiser that says nothing", machineOf(appA).server(), &Config{Appraiser: silent{}, Intended: Intended{AppID: appA}}, "channel_appraisal", "channel_refused"},
		{"an appraiser that breaks", machineOf(appA).server(), &Config{Appraiser: brokenJudge{}, Intended: Intended{AppID: appA}}, "channel_appraisal", "channel_refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr, refused := serve(t, c.server)
			conn, err := Dial(t.Context(), "tcp", addr, c.client)
			wantRefusal(t, conn, err, c.code)
			waitRefused(t, refused, c.refused)
		})
	}
}

type (
	broken      struct{}
	endless     struct{}
	garbage     struct{}
	silent      struct{}
	brokenJudge struct{}
)

func (broken) Attest(context.Context, dstack.ReportData) ([]byte, error) {
	return nil, errors.New("no TEE")
}
func (endless) Attest(context.Context, dstack.ReportData) ([]byte, error) {
	return make([]byte, MaxEvidence+1), nil
}
func (garbage) Attest(context.Context, dstack.ReportData) ([]byte, error) { return []byte("{"), nil }
func (silent) Appraise(context.Context, Candidate) (*Appraisal, error)    { return nil, nil }
func (brokenJudge) Appraise(context.Context, Candidate) (*Appraisal, error) {
	return nil, errors.New("bug")
}

func TestConfigurationsThatCannotBeSafe(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	for _, c := range []struct {
		name string
		role Role
		cfg  *Config
	}{
		{"none", ClientRole, nil},
		{"an empty client", ClientRole, &Config{}},
		{"a client that judges nobody", ClientRole, &Config{Intended: Intended{AppID: appA}}},
		{"an empty server", ServerRole, &Config{}},
		{"a client that means nobody", ClientRole, &Config{Appraiser: &judge{vendor: v}}},
		{"a client that takes anyone", ClientRole, &Config{Appraiser: &judge{vendor: v}, AnyClient: true, Intended: Intended{AppID: appA}}},
		{"a server without evidence", ServerRole, &Config{AnyClient: true}},
		{"a server that judges nobody and does not say so", ServerRole, &Config{Attester: m}},
		{"a server that judges and takes anyone", ServerRole, &Config{Attester: m, AnyClient: true, Appraiser: &judge{vendor: v}}},
		{"too many intended workloads", ServerRole, &Config{Attester: m, Appraiser: &judge{vendor: v}, Intended: Intended{ComposeHashes: make([]dstack.ComposeHash, 65)}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := net.Pipe()
			defer b.Close()
			var conn *Conn
			var err error
			if c.role == ClientRole {
				conn, err = Client(t.Context(), a, c.cfg)
			} else {
				conn, err = Server(t.Context(), a, c.cfg)
			}
			wantRefusal(t, conn, err, "channel_config")
			if _, err := a.Write([]byte{0}); !errors.Is(err, io.ErrClosedPipe) {
				t.Error("the connection was left open")
			}
		})
	}
	_, err := Listen("tcp", "127.0.0.1:0", &Config{})
	wantCode(t, err, "channel_config")
	_, err = Dial(t.Context(), "tcp", "127.0.0.1:1", v.client())
	wantCode(t, err, "channel_unreachable")
	_, err = Dial(t.Context(), "tcp", "127.0.0.1", v.client())
	wantCode(t, err, "channel_unreachable")
}

// --- what evidence commits to ---

func sampleCommitment() commitment {
	return commitment{
		role: ServerRole, exported: bytes.Repeat([]byte{1}, 32), own: []byte("own"), peer: []byte("peer"),
		nonce: bytes.Repeat([]byte{2}, 32), intended: lp(nil, appA[:], nil, nil),
	}
}

// The wire format, pinned: SHA-512 over the parts as the comment says, computed
// outside this program.
func TestReportDataOfAChannelIsPinned(t *testing.T) {
	const want = "0a8c4a7aed8010f445b5021da96391d8d7b19ba369b52e9c2b69672abc5c57b7c374a4f8d676a39cd807030394f57ddd7e5efed5f059cdcd238129836fe808f2"
	if got := sampleCommitment().reportData().String(); got != want {
		t.Errorf("report data %s, want %s", got, want)
	}
}

// Threat C01: no part of the commitment may be changed, or moved into its
// neighbour, without changing the report data.
func TestThreat_C01_EveryPartOfTheCommitmentCounts(t *testing.T) {
	seen := map[dstack.ReportData]string{sampleCommitment().reportData(): "the sample"}
	for name, edit := range map[string]func(*commitment){
		"the other role":          func(c *commitment) { c.role = ClientRole },
		"another session":         func(c *commitment) { c.exported = bytes.Repeat([]byte{9}, 32) },
		"another key":             func(c *commitment) { c.own = []byte("owm") },
		"another peer":            func(c *commitment) { c.peer = []byte("peeR") },
		"no peer":                 func(c *commitment) { c.peer = nil },
		"keys the other way":      func(c *commitment) { c.own, c.peer = c.peer, c.own },
		"another nonce":           func(c *commitment) { c.nonce = bytes.Repeat([]byte{3}, 32) },
		"another intended":        func(c *commitment) { c.intended = lp(nil, appB[:], nil, nil) },
		"a byte moved to the key": func(c *commitment) { c.own, c.peer = []byte("ownp"), []byte("eer") },
	} {
		c := sampleCommitment()
		edit(&c)
		if same, ok := seen[c.reportData()]; ok {
			t.Errorf("%s has the report data of %s", name, same)
		}
		seen[c.reportData()] = name
	}
}

type fakeExporter struct {
	out []byte
	err error
}

func (f fakeExporter) ExportKeyingMaterial(string, []byte, int) ([]byte, error) { return f.out, f.err }

// Threat C01: without keying material there is no channel, rather than one that is
// bound to less.
func TestThreat_C01_AFailingExporterEndsTheHandshake(t *testing.T) {
	for name, e := range map[string]fakeExporter{
		"an error": {bytes.Repeat([]byte{1}, 32), errors.New("no")}, "nothing": {}, "too little": {out: make([]byte, 31)},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := export(e, nil, nil)
			wantCode(t, err, "channel_exporter")
			if out != nil {
				t.Error("material beside an error")
			}
		})
	}
	// And a session of crypto/tls that cannot export.
	a, b := net.Pipe()
	defer a.Close()
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(b, &tls.Config{Certificates: []tls.Certificate{newKey(t).cert}, SessionTicketsDisabled: true})
		done <- conn.Handshake()
	}()
	conn := tls.Client(a, &tls.Config{InsecureSkipVerify: true, Renegotiation: tls.RenegotiateOnceAsClient})
	if err := errors.Join(conn.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	cs := conn.ConnectionState()
	_, err := export(&cs, nil, nil)
	wantCode(t, err, "channel_exporter")
}

func TestIntendedIdentitiesComeBack(t *testing.T) {
	many := make([]dstack.ComposeHash, maxComposeHashes)
	for i := range many {
		many[i] = dstack.ComposeHash{byte(i)}
	}
	for _, in := range []Intended{
		{}, {AppID: appA}, {AppID: appA, InstanceID: &inst1}, {ComposeHashes: many},
		{AppID: appB, InstanceID: &dstack.InstanceID{}, ComposeHashes: []dstack.ComposeHash{{}, {1}}},
	} {
		raw, err := in.encode()
		if err != nil {
			t.Fatal(err)
		}
		out, err := decodeIntended(raw)
		if err != nil {
			t.Fatalf("%+v: %v", in, err)
		}
		if again, err := out.encode(); err != nil || !bytes.Equal(raw, again) || len(raw) > maxHello-nonceSize-1 {
			t.Errorf("%+v encodes to %x, then to %x (%v)", in, raw, again, err)
		}
	}
	a, _ := Intended{ComposeHashes: []dstack.ComposeHash{{2}, {1}, {2}}}.encode()
	b, _ := Intended{ComposeHashes: []dstack.ComposeHash{{1}, {2}}}.encode()
	if !bytes.Equal(a, b) {
		t.Error("order and repetition of compose hashes make a difference")
	}
}

// --- over net/http ---

func TestHTTPOverAttestedChannels(t *testing.T) {
	v := newVendor(t)
	s, c := v.boot(t, appA, inst1, newKey(t)), v.boot(t, appB, inst2, newKey(t))
	l, err := Listen("tcp", "127.0.0.1:0", s.serverFor(appB))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ConnContext: ConnContext, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, err := PeerOf(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		if r.URL.Path == "/away" {
			http.Redirect(w, r, "http://"+r.Host+"/", http.StatusFound)
			return
		}
		fmt.Fprintf(w, "hello %s", p.Identity.AppID)
	})}
	go server.Serve(l)
	defer server.Close()
	transport := v.mutual(c).Transport()
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	for range 3 {
		resp, err := client.Get("https://" + l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "hello "+appB.String() {
			t.Errorf("%q, %v", body, err)
		}
	}
	if n := s.quotes.Load(); n != 1 {
		t.Errorf("%d quotes for requests over one connection", n)
	}
	for _, path := range []string{"http://" + l.Addr().String(), "https://" + l.Addr().String() + "/away"} {
		_, err := client.Get(path)
		wantCode(t, err, "channel_plain_http")
	}
	_, err = PeerOf(t.Context())
	wantCode(t, err, "channel_no_peer")
	if ctx := ConnContext(t.Context(), &Conn{}); ctx != t.Context() {
		t.Error("a connection without a peer changes the context")
	}
}

// --- time and hostile peers ---

func TestASilentPeerIsNotWaitedForLongerThanTheTimeout(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	v := newVendor(t)
	c := v.client()
	c.Timeout = 200 * time.Millisecond
	start := time.Now()
	_, err = Dial(t.Context(), "tcp", ln.Addr().String(), c)
	if code := fault.Code(err); code != "channel_handshake" || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

// rawServer speaks TLS as a channel does and then whatever talk says.
func rawServer(t *testing.T, key *Key, talk func(conn *tls.Conn)) string {
	t.Helper()
	return rawServerAsking(t, key, tls.NoClientCert, talk)
}

func rawServerAsking(t *testing.T, key *Key, ask tls.ClientAuthType, talk func(conn *tls.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		raw, err := ln.Accept()
		if err != nil {
			return
		}
		conn := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{key.cert}, NextProtos: []string{ALPN}, ClientAuth: ask})
		if conn.Handshake() == nil {
			talk(conn)
		}
		conn.Close()
	}()
	t.Cleanup(func() { ln.Close(); <-done })
	return ln.Addr().String()
}

func TestProtocolErrorsOfAServer(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	hi := hello{nonce: [32]byte{5}}
	// A server that had no certificate of the client in the TLS handshake.
	demandLate := func(conn *tls.Conn) {
		h := hello{nonce: [32]byte{5}, demand: true, intended: must(Intended{}.encode())}
		writeFrame(conn, frameHello, h.encode())
		writeFrame(conn, frameEvidence, nil)
	}
	for _, c := range []struct {
		name, code string
		talk       func(conn *tls.Conn)
	}{
		{"it hangs up", "channel_broken", func(conn *tls.Conn) {}},
		{"it sends evidence first", "channel_protocol", func(conn *tls.Conn) { writeFrame(conn, frameEvidence, []byte{1}) }},
		{"it accepts without evidence", "channel_protocol", func(conn *tls.Conn) {
			writeFrame(conn, frameHello, hi.encode())
			writeFrame(conn, frameAccept, nil)
		}},
		{"it announces too much", "channel_frame_too_large", func(conn *tls.Conn) { conn.Write([]byte{1, 0xff, 0xff, 0xff, 0xff}) }},
		{"its hello is short", "channel_protocol", func(conn *tls.Conn) { writeFrame(conn, frameHello, make([]byte, 32)) }},
		{"it refuses", "channel_refused", func(conn *tls.Conn) { writeFrame(conn, frameRefuse, []byte("some_code")) }},
		{"it refuses with a novel", "channel_frame_too_large", func(conn *tls.Conn) { writeFrame(conn, frameRefuse, make([]byte, 65)) }},
		{"it asks for the evidence of a key that it never saw", "channel_protocol", demandLate},
		{"it asks for evidence of a client that has none", "channel_no_attester", demandLate},
		{"it stops within a frame", "channel_broken", func(conn *tls.Conn) { conn.Write([]byte{1, 0, 0, 0, 50, 1, 2}) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			talk := func(conn *tls.Conn) {
				c.talk(conn)
				conn.CloseWrite()
				io.Copy(io.Discard, conn)
			}
			cfg := v.mutual(m)
			cfg.Appraiser = yes{m}
			if c.code == "channel_no_attester" {
				cfg.Attester = nil
			}
			conn, err := Dial(t.Context(), "tcp", rawServer(t, m.key, talk), cfg)
			wantRefusal(t, conn, err, c.code)
		})
	}
}

// yes accepts whatever it is shown as the machine that it names.
type yes struct{ m *machine }

func (y yes) Appraise(_ context.Context, c Candidate) (*Appraisal, error) {
	return &Appraisal{Identity: y.m.id, ReportData: c.ReportData, Trust: dstack.TrustDevelopment}, nil
}

func TestARefusalIsShownOnlyIfItIsAWord(t *testing.T) {
	for code, text := range map[string]string{
		"channel_wrong_app": "channel_wrong_app", "": "no reason", "\x1b[31m": "no reason", "a b": "no reason", "Ä": "no reason",
	} {
		err := refusedBy(code)
		wantCode(t, err, "channel_refused")
		if !strings.Contains(err.Error(), text) {
			t.Errorf("refusal %q reads %q", code, err)
		}
	}
}

func TestProtocolErrorsOfAClient(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	intended, err := Intended{AppID: appA}.encode()
	if err != nil {
		t.Fatal(err)
	}
	good := hello{nonce: [32]byte{1}, demand: true, intended: intended}
	for _, c := range []struct {
		name, code string
		talk       func(conn *tls.Conn)
	}{
		{"it asks for no evidence", "channel_protocol", func(conn *tls.Conn) {
			h := hello{nonce: [32]byte{1}}
			writeFrame(conn, frameHello, h.encode())
		}},
		{"it means somebody without asking", "channel_protocol", func(conn *tls.Conn) {
			h := hello{nonce: [32]byte{1}, intended: intended}
			writeFrame(conn, frameHello, h.encode())
		}},
		{"it means nothing that can be read", "channel_protocol", func(conn *tls.Conn) {
			h := hello{nonce: [32]byte{1}, demand: true, intended: intended[:10]}
			writeFrame(conn, frameHello, h.encode())
		}},
		{"it sends application bytes before it accepts", "channel_protocol", func(conn *tls.Conn) {
			writeFrame(conn, frameHello, good.encode())
			conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		}},
		{"it gives evidence that nobody asked for", "channel_protocol", func(conn *tls.Conn) {
			writeFrame(conn, frameHello, good.encode())
			writeFrame(conn, frameEvidence, []byte("x"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr, refused := serve(t, m.server())
			conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			c.talk(conn)
			waitRefused(t, refused, c.code)
			if m.quotes.Load() > 2 {
				t.Error("a malformed hello had a quote made")
			}
		})
	}
}

func TestAListenerServesOthersWhileOnePeerIsSilent(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr, _ := serve(t, m.server())
	idle, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	conn, err := Dial(t.Context(), "tcp", addr, v.client())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mustEcho(t, conn)
}

func TestACancelledDialEnds(t *testing.T) {
	v := newVendor(t)
	m := v.boot(t, appA, inst1, newKey(t))
	addr := rawServer(t, m.key, func(conn *tls.Conn) { io.Copy(io.Discard, conn) })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	start := time.Now()
	conn, err := Dial(ctx, "tcp", addr, v.client())
	wantRefusal(t, conn, err, "channel_broken")
	if time.Since(start) > 5*time.Second || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

func TestKeysDoNotPrintThemselves(t *testing.T) {
	secret := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{0x5e}, 32))
	k, err := KeyOf(secret)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprint(k), fmt.Sprintf("%v %+v %#v %x", *k, *k, *k, *k), fmt.Sprintf("%#v", k)} {
		if !strings.HasPrefix(text, "channel key sha256:") || strings.Contains(strings.ToLower(text), "5e5e5e") || strings.Contains(text, "94 94 94") {
			t.Errorf("a key prints %q", text)
		}
	}
}

// --- fuzzing and speed ---

func FuzzReadFrame(f *testing.F) {
	f.Add(byte(1), []byte{1, 0, 0, 0, 2, 7, 7})
	f.Add(byte(2), []byte{4, 0, 0, 0, 3, 'a', '_', 'b'})
	f.Add(byte(3), []byte{3, 0, 0, 0, 0})
	f.Add(byte(2), []byte{2, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, want byte, data []byte) {
		r := bytes.NewReader(data)
		payload, err := readFrame(r, frameKind(want))
		if err != nil {
			if fault.Code(err) == "" || payload != nil {
				t.Fatalf("%v beside %x", err, payload)
			}
			return
		}
		var again bytes.Buffer
		if err := writeFrame(&again, frameKind(want), payload); err != nil || !bytes.Equal(again.Bytes(), data[:len(data)-r.Len()]) {
			t.Fatalf("read %x, wrote %x", data, again.Bytes())
		}
	})
}

func FuzzDecodeHello(f *testing.F) {
	intended, _ := Intended{AppID: appA, InstanceID: &inst1, ComposeHashes: []dstack.ComposeHash{good, {0xff}}}.encode()
	h := hello{nonce: [32]byte{1}, demand: true, intended: intended}
	f.Add(h.encode())
	h = hello{}
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := decodeHello(data)
		if err != nil {
			wantCode(t, err, "channel_protocol")
			return
		}
		if !bytes.Equal(h.encode(), data) {
			t.Fatalf("%x becomes %x", data, h.encode())
		}
		if !h.demand {
			return
		}
		in, err := decodeIntended(h.intended)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := in.encode(); err != nil || !bytes.Equal(again, h.intended) {
			t.Fatalf("%x becomes %x, %v", h.intended, again, err)
		}
	})
}

// BenchmarkHandshake compares a plain TLS 1.3 handshake with attested ones, all
// over loopback and with both ends in this process. "Channel alone" makes and
// verifies no quote; the TDX ones do, by the simulated platform.
func BenchmarkHandshake(b *testing.B) {
	v := newVendor(b)
	s, c := v.boot(b, appA, inst1, newKey(b)), v.boot(b, appB, inst2, newKey(b))
	plain := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{s.key.cert}, SessionTicketsDisabled: true}
	run := func(name string, accept func(net.Conn) (net.Conn, error), dial func(addr string) (net.Conn, error)) {
		b.Run(name, func(b *testing.B) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			go func() {
				for {
					raw, err := ln.Accept()
					if err != nil {
						return
					}
					if conn, err := accept(raw); err == nil {
						conn.Close()
					}
				}
			}()
			b.ReportAllocs()
			for b.Loop() {
				conn, err := dial(ln.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				conn.Close()
			}
		})
	}
	attested := func(server, client *Config) (func(net.Conn) (net.Conn, error), func(string) (net.Conn, error)) {
		return func(raw net.Conn) (net.Conn, error) { return Server(context.Background(), raw, server) },
			func(addr string) (net.Conn, error) { return Dial(context.Background(), "tcp", addr, client) }
	}
	run("plain TLS 1.3", func(raw net.Conn) (net.Conn, error) {
		conn := tls.Server(raw, plain)
		return conn, conn.Handshake()
	}, func(addr string) (net.Conn, error) {
		return tls.Dial("tcp", addr, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})
	})
	canned := must(s.Attest(b.Context(), dstack.ReportData{}))
	accept, dial := attested(&Config{Attester: still(canned), Key: s.key, AnyClient: true}, &Config{Appraiser: yes{s}, Intended: Intended{AppID: appA}})
	run("channel alone", accept, dial)
	accept, dial = attested(s.server(), v.client())
	run("TDX server", accept, dial)
	accept, dial = attested(s.serverFor(appB), v.mutual(c))
	run("TDX mutual", accept, dial)
}

type still []byte

func (s still) Attest(context.Context, dstack.ReportData) ([]byte, error) { return s, nil }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
