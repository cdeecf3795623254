// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/internal/fault"
)

// An instance that is asked for its manifest sends the gateway nowhere else, and keeps it
// for ten seconds at most.
func TestAskingAnInstanceIsBounded(t *testing.T) {
	rec := route.Record{Address: netip.MustParseAddr("100.96.1.2")}
	ask := func(t *testing.T, agent func(net.Conn)) (dialled []netip.AddrPort, final bool, took time.Duration, err error) {
		var there sync.WaitGroup
		s := &Service{cfg: Config{Upstream: &Upstream{Dial: func(_ context.Context, to netip.AddrPort) (net.Conn, error) {
			dialled = append(dialled, to)
			near, far := net.Pipe()
			there.Go(func() { defer far.Close(); agent(far) })
			return near, nil
		}}}}
		begin := time.Now()
		_, final, err = s.askPolicy(t.Context(), rec)
		took = time.Since(begin)
		there.Wait()
		return dialled, final, took, err
	}
	read := func(c net.Conn) { _, _ = http.ReadRequest(bufio.NewReader(c)) }
	synctest.Test(t, func(t *testing.T) {
		dialled, final, _, err := ask(t, func(c net.Conn) {
			read(c)
			io.WriteString(c, "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n")
		})
		if fault.Code(err) != "register_policy" {
			t.Error(err)
		}
		if final || len(dialled) != 1 || dialled[0] != netip.AddrPortFrom(rec.Address, portpolicy.AgentPort) {
			t.Errorf("a redirect: dialled %v, final %t", dialled, final)
		}
	})
	for name, agent := range map[string]func(net.Conn){
		"silent": func(c net.Conn) { read(c); io.Copy(io.Discard, c) },
		"endless": func(c net.Conn) {
			read(c)
			for _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err == nil; _, err = io.WriteString(c, " ") {
				time.Sleep(time.Second)
			}
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			_, final, took, err := ask(t, agent)
			if fault.Code(err) != "register_policy" {
				t.Error(err)
			}
			if final || took != infoTime {
				t.Errorf("%s: it took %s, final %t", name, took, final)
			}
		})
	}
}
