// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/edge"
	"github.com/dstack-go/dstack/gateway/hostname"
)

func TestTheAccessLogNamesNoClientUnlessAsked(t *testing.T) {
	joined := edge.Ended{Client: netip.MustParseAddrPort("192.0.2.7:1234"), Took: time.Second, App: dstack.AppID{0xa}, Instance: dstack.InstanceID{0xb}, Port: 443,
		Mode: hostname.Passthrough, Up: 10, Down: 20, How: "idle"}
	refused := edge.Ended{Client: joined.Client, Took: time.Millisecond, Code: "hello_read"}
	told := func(c ProxyConfig) string {
		var out bytes.Buffer
		f := c.accessLog(slog.New(slog.NewTextHandler(&out, nil)))
		if f == nil {
			return "none"
		}
		f(joined)
		f(refused)
		return out.String()
	}
	if got := told(ProxyConfig{}); got != "none" {
		t.Errorf("an access log that nobody asked for: %s", got)
	}
	text := told(ProxyConfig{AccessLog: true})
	for _, want := range []string{"msg=access took=1s app=0a00", "instance=0b00", "port=443 mode=passthrough up=10 down=20 end=idle\n", "took=1ms refused=hello_read\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	if strings.Contains(text, "192.0.2") {
		t.Errorf("a client's address: %s", text)
	}
	if text := told(ProxyConfig{AccessLog: true, AccessLogClients: true}); strings.Count(text, "client=192.0.2.7:1234") != 2 {
		t.Errorf("no client's address: %s", text)
	}
}

func TestThreat_K08_TheLogIsLimited(t *testing.T) {
	var out bytes.Buffer
	log := limited(slog.New(slog.NewTextHandler(&out, nil)))
	access := (&ProxyConfig{AccessLog: true}).accessLog(slog.New(slog.NewTextHandler(&out, nil)))
	for range 10 * accessBurst {
		log.Info("connection refused", "remote", "192.0.2.1:1")
		access(edge.Ended{Code: "hello_read"})
	}
	log.Info("admin")
	if n := strings.Count(out.String(), "connection refused"); n < logBurst || n > 3*logBurst {
		t.Errorf("%d lines of refused connections", n)
	}
	if n := strings.Count(out.String(), "msg=access"); n < accessBurst || n > 3*accessBurst {
		t.Errorf("%d lines of the access log", n)
	}
	if !strings.Contains(out.String(), "msg=admin") {
		t.Error("the flood hid another message")
	}
}
