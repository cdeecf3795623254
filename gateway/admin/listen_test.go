// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

func TestTheSocketIsItsOwnersAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admin.sock")
	l, err := Listen("unix:"+file, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := Listen("unix:"+file, 0, nil); fault.Code(err) != "gateway_listen" || !strings.Contains(err.Error(), "somebody answers") {
		t.Errorf("a second gateway: %v", err)
	}
	g, err := admintoken.New(admintoken.Config{Open: true})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *Config) { c.Guard = g })
	s, err := New(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	c := prpc.NewClient("http://gateway/prpc", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", file)
	})
	var got api.StatusResponse
	if err := c.Call(t.Context(), "Status", nil, &got); err != nil || got.Id != 1 {
		t.Errorf("%v, %v", &got, err)
	}
	c.HTTP.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	// What one leaves that is killed is in nobody's way; a file that is no socket stays.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: file})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	again, err := Listen("unix:"+file, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:"+file, 0, nil); fault.Code(err) != "gateway_listen" {
		t.Errorf("a file: %v", err)
	}
}

func TestCredentialsCrossNoNetworkInPlainText(t *testing.T) {
	for _, address := range []string{"0.0.0.0", "::", "192.0.2.1"} {
		if l, err := Listen(address, 0, nil); fault.Code(err) != "admin_plain" {
			t.Errorf("%s: %v", address, err)
			l.Close()
		}
	}
	if _, err := Listen("localhost", 0, nil); fault.Code(err) != "gateway_config" {
		t.Errorf("%v", err)
	}
	for _, secure := range []*tls.Config{nil, {}} {
		l, err := Listen("127.0.0.1", 0, secure)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	l, err := Listen("0.0.0.0", 0, &tls.Config{})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
