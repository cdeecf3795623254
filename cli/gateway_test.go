// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/acme"
	"github.com/dstack-go/dstack/gateway/admin"
	"github.com/dstack-go/dstack/gateway/ctwatch"
	"github.com/dstack-go/dstack/gateway/ctwatch/ctlogtest"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings/settingstest"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/manifest"
)

const adminToken = "0123456789abcdef0123456789abcdef"

// public is a listener of apps that only remembers.
type public struct{ draining bool }

func (p *public) Drain(on bool) error { p.draining = on; return nil }
func (p *public) Draining() bool      { return p.draining }
func (*public) Connections() uint64   { return 7 }

// watched is a watch of a certificate log that holds a certificate of somebody else's for
// our name, and one that cannot be read, at entries 0 and 1.
func watched(t *testing.T) (*ctwatch.Watcher, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rogue := &x509.Certificate{SerialNumber: big.NewInt(7), DNSNames: []string{"shop.fixed.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, rogue, rogue, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if rogue, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	l := ctlogtest.New(t)
	l.Add(rogue)
	l.AddRaw([]byte("\x30\x03 shop.fixed.example, no certificate"))
	w, err := ctwatch.New(ctwatch.Config{
		Logs: []ctwatch.Log{{URL: l.URL, Key: l.Key}}, Dir: t.TempDir(), HTTP: l.Client, Rate: 1e6, Every: 50 * time.Millisecond,
		Names: func(context.Context) ctwatch.Names { return ctwatch.Names{Bases: []hostname.Name{"fixed.example"}} },
		Known: func(context.Context, [32]byte) (bool, error) { return false, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	for end := time.Now().Add(20 * time.Second); len(w.Status().Alarms) < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", w.Status())
		}
	}
	return w, w.Status().Logs[0].Name
}

// The verbs of a gateway's administrators, against the service that a gateway serves: by its
// socket ($SOCKET) and by TCP with a token ($URL).
func TestGatewayScripts(t *testing.T) {
	watch, logName := watched(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/gateway",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			own := wgconfig.GeneratePrivateKey().Public()
			table := route.New(route.Config{Key: own, Address: netip.MustParseAddr("100.96.0.1"), Network: netip.MustParsePrefix("100.96.0.0/11")})
			ports, err := portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 80, PP: true}, {Port: 443}}})
			if err != nil {
				return err
			}
			now := time.Now()
			for n := byte(1); n <= 2; n++ {
				id := dstack.InstanceID{0xb, n}
				env.Setenv(fmt.Sprintf("INSTANCE%d", n), id.String())
				if _, err := table.Register(route.Record{
					App: dstack.AppID{0xa}, Instance: id, Compose: dstack.ComposeHash{1}, Key: wgconfig.GeneratePrivateKey().Public(),
					Address: netip.AddrFrom4([4]byte{100, 97, 0, n}), Policy: &ports, Attested: now, Until: now.Add(10 * time.Minute),
				}); err != nil {
					return err
				}
			}
			env.Setenv("APP", dstack.AppID{0xa}.String())
			node := gateway.Node{ID: 1, UUID: [16]byte{1}, URL: "https://one.example:8000", Key: own, Address: netip.MustParsePrefix("100.96.0.1/11"), Endpoint: "one.example:51820"}
			ctx, cancel := context.WithCancel(context.Background())
			env.Defer(cancel)
			serve := func(l net.Listener, c admintoken.Config, ct admin.Watch) error {
				c.Delay = time.Millisecond
				guard, err := admintoken.New(c)
				if err != nil {
					return err
				}
				s, err := admin.New(admin.Config{
					Store: new(settingstest.Memory), Routes: table, Guard: guard, Node: func() gateway.Node { return node }, Public: new(public),
					Fixed: []gateway.Domain{{Name: "fixed.example", Port: 443}}, Trust: "development", Tunnel: "netstack", CT: ct, Log: slog.New(slog.DiscardHandler),
					CheckDNS: func(p string, params map[string]string) error { _, err := acme.NewCredential(p, params); return err },
				})
				if err != nil {
					return err
				}
				done := make(chan struct{})
				go func() {
					defer close(done)
					s.Serve(ctx, l)
				}()
				env.Defer(func() { cancel(); <-done })
				return nil
			}
			// A socket's path is short, and the scripts' directory may not be.
			dir, err := os.MkdirTemp("", "gw")
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			socket := filepath.Join(dir, "admin.sock")
			l, err := admin.Listen("unix:"+socket, 0, nil)
			if err != nil {
				return err
			}
			if err := serve(l, admintoken.Config{Open: true}, nil); err != nil {
				return err
			}
			if l, err = admin.Listen("127.0.0.1", 0, nil); err != nil {
				return err
			}
			if err := serve(l, admintoken.Config{Token: config.NewSecret(adminToken)}, watch); err != nil {
				return err
			}
			env.Setenv("CTLOG", logName)
			env.Setenv("SOCKET", "unix:"+socket)
			env.Setenv("URL", "http://"+l.Addr().String())
			env.Setenv("DSTACK_STATE", env.WorkDir+"/state")
			env.Setenv("HOME", env.WorkDir+"/home")
			env.Setenv("NO_COLOR", "1")
			return os.WriteFile(filepath.Join(env.WorkDir, "token"), []byte(adminToken+"\n"), 0o600)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// field NAME KEY sets a variable from the JSON that was printed last.
			"field": func(ts *testscript.TestScript, neg bool, args []string) {
				var doc map[string]any
				ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &doc))
				ts.Setenv(args[0], fmt.Sprint(doc[args[1]]))
			},
		},
	})
}
