// SPDX-License-Identifier: Apache-2.0

package ctwatch

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"golang.org/x/crypto/cryptobyte"

	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/ctwatch/ctlogtest"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("got %v with code %q, want %q", err, fault.Code(err), code)
	}
}

// known is a list of keys.
type known map[[32]byte]bool

func (k known) is(_ context.Context, spki [32]byte) (bool, error) { return k[spki], nil }

func certificate(t testing.TB, names ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(7), DNSNames: names, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	if len(names) == 0 {
		tmpl.Subject = pkix.Name{CommonName: "Apps.gw.test"}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func config(t testing.TB, l *ctlogtest.Log, tiled bool, k known) Config {
	t.Helper()
	return Config{
		Logs: []Log{{URL: l.URL, Key: l.Key, Tiled: tiled}}, Known: k.is, Dir: t.TempDir(), HTTP: l.Client, Rate: 1e6, Every: 50 * time.Millisecond,
		Names: func(context.Context) Names {
			return Names{Bases: []hostname.Name{"apps.gw.test"}, Exact: []hostname.Name{"shop.example.com"}}
		},
	}
}

func open(t testing.TB, c Config) (*Watcher, *watched) {
	t.Helper()
	w, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return w, w.logs[0]
}

// both runs a test with each API.
func both(t *testing.T, test func(t *testing.T, tiled bool)) {
	for _, tiled := range []bool{false, true} {
		t.Run(map[bool]string{false: "RFC 6962", true: "tiled"}[tiled], func(t *testing.T) { test(t, tiled) })
	}
}

func TestThreat_C07_ACertificateOfAnotherKeyIsAnAlarm(t *testing.T) {
	both(t, func(t *testing.T, tiled bool) {
		l, k := ctlogtest.New(t), known{}
		l.Filler(300)
		good := certificate(t, "*.apps.gw.test")
		k[sha256.Sum256(good.RawSubjectPublicKeyInfo)] = true
		l.Add(good)
		l.AddPre(good)
		c := config(t, l, tiled, k)
		w, x := open(t, c)
		if err := x.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := w.Status(); s.Red || len(s.Alarms) != 0 || s.Checked.IsZero() || s.Logs[0].Read != 302 || s.Logs[0].Size != 302 {
			t.Fatalf("%+v", s)
		}
		want := map[uint64]string{}
		for _, c := range []struct {
			cert *x509.Certificate
			bad  bool
		}{
			{certificate(t, "*.apps.gw.test"), true},
			{certificate(t, "apps.gw.test"), true},
			{certificate(t, "0123-8080.APPS.gw.test"), true},
			{certificate(t, "a.b.apps.gw.test", "else.test"), true},
			{certificate(t, "*.gw.test"), true}, // the base itself
			{certificate(t), true},              // by its common name
			{certificate(t, "*.example.com"), true},
			{certificate(t, "shop.example.com"), true},
			{certificate(t, "www.shop.example.com"), false}, // no name of ours
			{certificate(t, "apps.gw.test.evil.test"), false},
			{certificate(t, "notapps.gw.test"), false},
			{certificate(t, "gw.test"), false},
		} {
			for _, add := range []func(*x509.Certificate) uint64{l.Add, l.AddPre} {
				if i := add(c.cert); c.bad {
					want[i] = Certificate
				}
			}
		}
		want[l.AddRaw([]byte("\x30\x03 *.Apps.GW.test no certificate"))] = Unreadable
		l.AddRaw([]byte("\x30\x03 somebody else's"))
		if err := x.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		s := w.Status()
		got := map[uint64]string{}
		for _, a := range s.Alarms {
			got[a.Index] = a.Kind
			if a.Kind == Certificate && (len(a.Key) != 32 || len(a.Names) == 0) {
				t.Errorf("%+v", a)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || !s.Red {
			t.Errorf("alarms %v\nwant   %v", got, want)
		}

		// A restart forgets neither alarms nor the position.
		requests := l.Requests()
		w, x = open(t, c)
		if s := w.Status(); !s.Red || len(s.Alarms) != len(want) {
			t.Errorf("after a restart: %+v", s)
		}
		if err := x.look(t.Context()); err != nil || l.Requests() != requests+1 {
			t.Errorf("%v, %d requests", err, l.Requests()-requests)
		}
		for i := range want {
			if err := w.Acknowledge(x.Name(), i); err != nil {
				t.Error(err)
			}
		}
		if s := w.Status(); s.Red {
			t.Errorf("after all was acknowledged: %+v", s)
		}
		wantCode(t, w.Acknowledge(x.Name(), 1), "ct_alarm")
		wantCode(t, w.Acknowledge("other", 1), "ct_alarm")
		if w, _ := open(t, c); w.Status().Red {
			t.Error("a restart brings alarms back")
		}
	})
}

// The whole: Pebble gives somebody else a certificate of our name, which is logged.
func TestThreat_C07_ARogueCertificateOfAnAuthorityIsSeen(t *testing.T) {
	d := acmetest.NewDNS(t, "gw.test")
	ca := acmetest.NewCA(t, d, 1, 1)
	leaf := func(m *acme.Manager) *x509.Certificate {
		for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if s := m.Status(); s[0].NotAfter.IsZero() {
				continue
			}
			c, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: "x.apps.gw.test"})
			if err != nil {
				t.Fatal(err)
			}
			return c.Leaf
		}
		t.Fatal("no certificate")
		return nil
	}
	manager := func() *acme.Manager {
		credential, err := acme.NewCredential("rfc2136", map[string]string{"server": d.Addr, "key_name": acmetest.KeyName, "key_alg": acmetest.KeyAlg, "key": acmetest.Key})
		if err != nil {
			t.Fatal(err)
		}
		m, err := acme.New(acme.Config{Storage: &certmagic.FileStorage{Path: t.TempDir()}, CAs: []acme.CA{{Name: "pebble", Directory: ca.Directory, Roots: ca.APIRoots}}, Resolvers: []string{d.Addr}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		if err := m.SetDomains(t.Context(), []acme.Domain{{Name: "apps.gw.test", Credential: credential, Propagation: -1}}); err != nil {
			t.Fatal(err)
		}
		return m
	}
	ours, thief := manager(), manager()
	l := ctlogtest.New(t)
	l.Filler(10)
	l.Add(leaf(ours))
	var told sync.WaitGroup
	told.Add(1)
	var once sync.Once
	hook := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var a Alarm
		if err := json.Unmarshal(body, &a); err != nil || a.Kind != Certificate || a.Index != 12 {
			t.Errorf("the webhook was told %s", body)
		}
		once.Do(told.Done)
	}))
	t.Cleanup(hook.Close)
	c := config(t, l, false, nil)
	c.Known, c.Webhook = ours.KnownKey, hook.URL+"/token"
	// httptest's servers share a certificate, so that the client of the log trusts both.
	w, _ := open(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for end := time.Now().Add(20 * time.Second); w.Status().Checked.IsZero(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", w.Status())
		}
	}
	if s := w.Status(); s.Red {
		t.Fatalf("our own certificate is an alarm: %+v", s.Alarms)
	}
	l.Add(leaf(ours))
	rogue := leaf(thief)
	l.Add(rogue)
	start := time.Now()
	for !w.Status().Red {
		if time.Since(start) > time.Minute {
			t.Fatal("no alarm within a minute")
		}
		time.Sleep(10 * time.Millisecond)
	}
	sum := sha256.Sum256(rogue.RawSubjectPublicKeyInfo)
	r := w.Response()
	if len(r.Alarms) != 1 || !bytes.Equal(r.Alarms[0].Key, sum[:]) || r.Alarms[0].Index != 12 || r.CheckedAt == 0 || r.Logs[0].Size != 13 {
		t.Errorf("%v", r)
	}
	told.Wait()
}

func TestThreat_C07_ALogThatLiesIsSeen(t *testing.T) {
	both(t, func(t *testing.T, tiled bool) {
		l := ctlogtest.New(t)
		l.Filler(20)
		bad := l.Add(certificate(t, "apps.gw.test"))
		l.Filler(5)
		// It hides one certificate behind another.
		l.Lie(func(leaf []byte) []byte {
			return bytes.ReplaceAll(leaf, []byte("apps.gw.test"), []byte("else.xx.test"))
		})
		w, x := open(t, config(t, l, tiled, known{}))
		wantCode(t, x.look(t.Context()), "ct_fork")
		if s := w.Status(); len(s.Alarms) != 1 || s.Alarms[0].Kind != Fork || s.Logs[0].Read != 0 {
			t.Errorf("%+v", s)
		}
		wantCode(t, x.look(t.Context()), "ct_fork")
		if s := w.Status(); len(s.Alarms) != 1 {
			t.Errorf("the same is told %d times", len(s.Alarms))
		}
		l.Lie(nil)
		if err := x.look(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := w.Status(); len(s.Alarms) != 2 || s.Logs[0].Read != 26 {
			t.Errorf("%+v", s)
		}
		// It changes what it has shown.
		l.Change(bad, []byte("nothing to see"))
		wantCode(t, x.look(t.Context()), "ct_fork")
		l.Filler(3)
		wantCode(t, x.look(t.Context()), "ct_fork")
		l.Truncate(2)
		wantCode(t, x.look(t.Context()), "ct_fork")
	})
}

func TestALogThatIsLargeIsReadFromItsHead(t *testing.T) {
	both(t, func(t *testing.T, tiled bool) {
		for _, n := range []int{2, 5, 64, 255, 256, 257, 515, 1000} {
			l := ctlogtest.New(t)
			l.Add(certificate(t, "apps.gw.test"))
			l.Filler(n - 1)
			w, x := open(t, config(t, l, tiled, known{}))
			w.backfill = 1
			if err := x.look(t.Context()); err != nil {
				t.Fatalf("%d: %v", n, err)
			}
			if s := w.Status(); s.Red || s.Logs[0].Read != uint64(n) {
				t.Errorf("%d: %+v", n, s)
			}
			l.Filler(300)
			l.Slow(7)
			l.Add(certificate(t, "apps.gw.test"))
			if err := x.look(t.Context()); err != nil {
				t.Fatalf("%d: %v", n, err)
			}
			if s := w.Status(); len(s.Alarms) != 1 || s.Logs[0].Read != uint64(n)+301 {
				t.Errorf("%d: %+v", n, s)
			}
		}
	})
}

func TestWhatALogMayNotSay(t *testing.T) {
	both(t, func(t *testing.T, tiled bool) {
		l := ctlogtest.New(t)
		l.Filler(10)
		c := config(t, l, tiled, known{})
		c.Logs[0].Key = ctlogtest.New(t).Key
		_, x := open(t, c)
		wantCode(t, x.look(t.Context()), "ct_head")

		c = config(t, l, tiled, known{})
		_, x = open(t, c)
		l.Signed(time.Now().Add(-48 * time.Hour))
		wantCode(t, x.look(t.Context()), "ct_stale")
		l.Signed(time.Time{})
		if err := x.look(t.Context()); err != nil {
			t.Error(err)
		}
		c.Known = func(context.Context, [32]byte) (bool, error) { return false, errors.New("the storage is away") }
		w, x := open(t, c)
		l.Add(certificate(t, "apps.gw.test"))
		wantCode(t, x.look(t.Context()), "ct_known")
		if s := w.Status(); s.Logs[0].Read != 10 {
			t.Errorf("an entry that was not judged counts as read: %+v", s)
		}
		c.Logs[0].URL += "x"
		_, x = open(t, c)
		wantCode(t, x.look(t.Context()), "ct_log")
	})
}

func TestStateThatIsDamagedIsKept(t *testing.T) {
	l := ctlogtest.New(t)
	l.Filler(3)
	c := config(t, l, false, known{})
	_, x := open(t, c)
	if err := x.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(x.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{{}, data[:len(data)/2], bytes.Replace(data, []byte(`"version":1`), []byte(`"version":2`), 1), bytes.Replace(data, []byte(`"size":3`), []byte(`"size":4`), 1)} {
		if err := os.WriteFile(x.path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := New(c)
		wantCode(t, err, "ct_state")
	}
}

func TestAlarmsAreBounded(t *testing.T) {
	l := ctlogtest.New(t)
	for range maxAlarms + 10 {
		l.AddRaw([]byte("apps.gw.test"))
	}
	c := config(t, l, false, known{})
	w, x := open(t, c)
	if err := x.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := w.Status(); len(s.Alarms) != maxAlarms || s.Dropped != 10 {
		t.Errorf("%d alarms, %d dropped", len(s.Alarms), s.Dropped)
	}
	if _, err := New(c); err != nil {
		t.Error(err)
	}
}

func TestLogsAreListed(t *testing.T) {
	l := ctlogtest.New(t)
	key := base64.StdEncoding.EncodeToString(l.Key)
	logs, err := ParseLogs(" https://log.example/2026h2/ " + key + " , ")
	if err != nil || len(logs) != 1 || logs[0].URL != "https://log.example/2026h2" || logs[0].Tiled || logs[0].Name() != "log.example/2026h2" {
		t.Errorf("%+v, %v", logs, err)
	}
	if logs, err = ParseLogs("static+https://log.example " + key); err != nil || !logs[0].Tiled || logs[0].URL != "https://log.example" {
		t.Errorf("%+v, %v", logs, err)
	}
	for _, bad := range []string{"https://log.example", "http://log.example " + key, "https://log.example AAAA", "https://log.example ?", "https://a@log.example " + key,
		"https://log.example " + key + ", https://other.example " + key, "https://log.example?x " + key} {
		_, err := ParseLogs(bad)
		wantCode(t, err, "ct_logs")
	}
	_, err = New(Config{})
	wantCode(t, err, "ct_config")
	c := config(t, l, false, known{})
	c.Webhook = "http://hook.example/secret"
	_, err = New(c)
	wantCode(t, err, "ct_config")
	if strings.Contains(err.Error(), "secret") {
		t.Error("the webhook's address is told")
	}
}

func TestTheWebhookStaysSecret(t *testing.T) {
	l := ctlogtest.New(t)
	l.AddRaw([]byte("apps.gw.test"))
	c := config(t, l, false, known{})
	var text bytes.Buffer
	c.Log, c.Webhook = slog.New(slog.NewTextHandler(&text, nil)), "https://127.0.0.1:1/canary-of-the-webhook"
	w, x := open(t, c)
	if err := x.look(t.Context()); err != nil {
		t.Fatal(err)
	}
	x.tell(t.Context())
	if !strings.Contains(text.String(), "webhook") || strings.Contains(text.String(), "canary") || w.Status().Alarms[0].Told {
		t.Error(text.String())
	}
}

// Tiles have paths by C2SP tlog-tiles.
func TestTilePaths(t *testing.T) {
	for want, got := range map[string]string{
		"/tile/data/000":             tilePath("data", 0, 256),
		"/tile/0/x001/234.p/5":       tilePath("0", 1234, 5),
		"/tile/2/x001/x234/067":      tilePath("2", 1234067, 256),
		"/tile/data/x012/x345/x678/": tilePath("data", 12345678901, 256)[:26],
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func FuzzLeaf(f *testing.F) {
	c := certificate(f, "apps.gw.test")
	l := ctlogtest.New(f)
	l.Add(c)
	f.Add(append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, byte(len(c.Raw) >> 8), byte(len(c.Raw))}, append(bytes.Clone(c.Raw), 0, 0)...))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1})
	want := newWanted(Names{Bases: []hostname.Name{"apps.gw.test"}})
	f.Fuzz(func(t *testing.T, b []byte) {
		if cert, err := parseLeaf(b); err == nil {
			if names := want.of(cert); len(names) > 0 && !want.mentioned(b) {
				t.Errorf("%q are not seen", names)
			}
		}
		in := cryptobyte.String(b)
		if leaf, ok := readTileLeaf(&in); ok && len(leaf) > len(b)+2 {
			t.Error("a leaf is longer than its tile")
		}
	})
}

func FuzzCheckpoint(f *testing.F) {
	f.Add([]byte("a.test\n3\n" + base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n\n— a.test AAAAAAAAAAAAAAAAAAAA\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if h, err := parseCheckpoint(data, [32]byte{}); err == nil && len(h.Root) != 32 {
			t.Error("a root of another length")
		}
		if s, err := parseState(data, [32]byte{}); err == nil && s.Held != nil {
			if _, err := ranges.NewRange(0, s.Held.Size, s.Held.Edge); err != nil {
				t.Error(err)
			}
		}
	})
}
