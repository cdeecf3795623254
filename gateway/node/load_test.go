// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// visitors ask for an app again and again by the addresses of all gateways. They do what
// HTTP clients do with a name of several addresses: dial the next when one refuses, and ask
// again for what is safe to ask twice when a connection breaks before the answer is whole.
// Half of them keep connections alive, and half of either kind use the name whose TLS ends
// at the app.
type visitors struct {
	l    *lab
	stop context.CancelFunc
	work sync.WaitGroup

	asked, again atomic.Int64 // requests, and attempts beyond the first of each
	refused      atomic.Int64 // dials
	mu           sync.Mutex
	longest      time.Duration // a request
	failed       []string
}

const (
	visitorCount    = 8
	visitorPause    = 30 * time.Millisecond
	visitorAttempts = 4
)

func (l *lab) visitors(app *host, says string, gateways ...*host) *visitors {
	l.t.Helper()
	roots, err := l.trusts(gateways...)
	l.must(err)
	ctx, stop := context.WithCancel(context.Background())
	v := &visitors{l: l, stop: stop}
	l.t.Cleanup(func() { stop(); v.work.Wait() })
	for i := range visitorCount {
		name := app.guest.AppID.String()
		if i%4 > 1 {
			name += "-s"
		}
		next := i
		tr := &http.Transport{DisableKeepAlives: i%2 == 0, TLSClientConfig: &tls.Config{RootCAs: roots}, DialContext: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
			next++
			for n := range gateways {
				if c, err = l.dial(ctx, gateways[(next+n)%len(gateways)]); err == nil {
					return c, nil
				}
				v.refused.Add(1)
			}
			return nil, err
		}}
		client := &http.Client{Transport: tr, Timeout: 5 * time.Second}
		v.work.Go(func() {
			defer tr.CloseIdleConnections()
			for ctx.Err() == nil {
				v.ask(client, "https://"+name+"."+labDomain+"/", says)
				time.Sleep(visitorPause)
			}
		})
	}
	return v
}

func (v *visitors) ask(c *http.Client, url, says string) {
	v.asked.Add(1)
	begun := time.Now()
	var errs []error
	for range visitorAttempts {
		err := get(c, url, says)
		if err == nil {
			errs = nil
			break
		}
		errs = append(errs, err)
		v.again.Add(1)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.longest = max(v.longest, time.Since(begun))
	if errs != nil {
		v.failed = append(v.failed, errors.Join(errs...).Error())
	}
}

func get(c *http.Client, url, says string) error {
	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && (r.StatusCode != http.StatusOK || string(b) != says) {
		err = fmt.Errorf("status %d: %q", r.StatusCode, b)
	}
	return err
}

// end stops the visitors: none of their requests may have failed.
func (v *visitors) end(least int64) {
	v.l.t.Helper()
	v.stop()
	v.work.Wait()
	v.l.t.Logf("%d requests, %d attempts more, %d dials refused, the longest request took %s", v.asked.Load(), v.again.Load(), v.refused.Load(), v.longest.Round(time.Millisecond))
	if len(v.failed) > 0 {
		v.l.t.Errorf("%d requests failed, the first by\n%s", len(v.failed), v.failed[0])
	}
	if v.asked.Load() < least {
		v.l.t.Errorf("%d requests are no load", v.asked.Load())
	}
}

// Of two gateways one is killed under load, comes back, and then the other: no request of
// a client that has both addresses fails.
func TestNoRequestFailsWhenAGatewayIsKilled(t *testing.T) {
	l := newLab(t)
	g := l.cluster(2)
	shop := l.instance(1, 1, "shop", g...)
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	v := l.visitors(shop, "shop", g...)
	for _, h := range g {
		time.Sleep(2 * time.Second)
		h.kill()
		time.Sleep(2 * time.Second)
		h.start()
		l.reached(h, shop, "shop")
	}
	time.Sleep(time.Second)
	v.end(200)
	if v.refused.Load() == 0 {
		t.Error("no gateway was ever missing")
	}
}

// Both gateways are restarted, one after the other, under load: no request fails, what is
// under way ends as it would have, and what has no end is cut when the time is over.
func TestRollingRestartFailsNoRequest(t *testing.T) {
	l := newLab(t)
	g := l.cluster(2)
	shop := l.instance(1, 1, "shop", g...)
	for _, h := range g {
		l.reached(h, shop, "shop")
	}
	v := l.visitors(shop, "shop", g...)
	for i, h := range g {
		var under sync.WaitGroup
		begun := make(chan struct{}, 3)
		under.Go(func() {
			if err := l.download(h, shop.guest.AppID.String(), 60, begun); err != nil {
				t.Errorf("a download of three seconds through %s: %v", h.ip, err)
			}
		})
		under.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if err := l.converse(ctx, h, shop.guest.AppID.String()+"-s", begun); err != nil {
				t.Errorf("a WebSocket through %s that its client ends after three seconds: %v", h.ip, err)
			}
		})
		forever := i == 1
		if forever {
			under.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				if err := l.converse(ctx, h, shop.guest.AppID.String(), begun); err == nil {
					t.Error("a WebSocket without an end came to one")
				}
			})
			<-begun
		}
		<-begun
		<-begun
		took := h.stop()
		under.Wait()
		t.Logf("%s drained in %s", h.ip, took.Round(10*time.Millisecond))
		if took < 2*time.Second || took > drainTime+3*time.Second {
			t.Errorf("the drain took %s", took)
		}
		h.start()
		again := time.Now()
		l.reached(h, shop, "shop")
		t.Logf("and reached the app again in %s", time.Since(again).Round(10*time.Millisecond))
	}
	v.end(300)
}

// stop asks a process to end, as a service manager does, and says how long it took.
func (h *host) stop() time.Duration {
	h.l.t.Helper()
	begun := time.Now()
	h.l.must(h.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case <-h.ended:
	case <-time.After(time.Minute):
		h.l.t.Fatalf("%s does not end", h.ip)
	}
	took := time.Since(begun)
	if code := h.cmd.ProcessState.ExitCode(); code != 0 {
		h.l.t.Errorf("%s ended with %d", h.ip, code)
	}
	return took
}

// open is a visitor's TLS connection, on which a request has been sent.
func (l *lab) open(g *host, name, path string) (*tls.Conn, *bufio.Reader, *http.Response, error) {
	roots, err := l.trusts(g)
	if err != nil {
		return nil, nil, nil, err
	}
	raw, err := l.dial(context.Background(), g)
	if err != nil {
		return nil, nil, nil, err
	}
	raw.SetDeadline(time.Now().Add(time.Minute))
	host := name + "." + labDomain
	c := tls.Client(raw, &tls.Config{RootCAs: roots, ServerName: host})
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", path, host)
	br := bufio.NewReader(c)
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		c.Close()
		return nil, nil, nil, err
	}
	return c, br, res, nil
}

func (l *lab) download(g *host, name string, letters int, begun chan<- struct{}) error {
	c, _, res, err := l.open(g, name, fmt.Sprintf("/slow?letters=%d", letters))
	begun <- struct{}{}
	if err != nil {
		return err
	}
	defer c.Close()
	b, err := io.ReadAll(res.Body)
	if err == nil && string(b) != strings.Repeat("x", letters) {
		err = fmt.Errorf("%d letters", len(b))
	}
	return err
}

// converse sends and hears back until ctx ends, and then ends as both agree.
func (l *lab) converse(ctx context.Context, g *host, name string, begun chan<- struct{}) error {
	c, br, res, err := l.open(g, name, "/echo")
	begun <- struct{}{}
	if err != nil {
		return err
	}
	defer c.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return fmt.Errorf("status %d", res.StatusCode)
	}
	b := make([]byte, 5)
	for ; ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		if _, err := io.WriteString(c, "hello"); err != nil {
			return err
		}
		if _, err := io.ReadFull(br, b); err != nil {
			return err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
		return fmt.Errorf("at the end: %q, %w", rest, err)
	}
	return nil
}
