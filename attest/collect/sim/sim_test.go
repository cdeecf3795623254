// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/internal/fault"
)

// host is a host that answers every request alike, and counts them.
func host(t *testing.T, status int, body string) (*Client, *int) {
	t.Helper()
	requests := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		io.Copy(io.Discard, r.Body)
		if status == http.StatusFound {
			w.Header().Set("Location", "/registers")
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(server.Close)
	return New(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", server.Listener.Addr().String())
	}), &requests
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if err == nil || fault.Code(err) != code {
		t.Fatalf("error %v has code %q, want %q", err, fault.Code(err), code)
	}
}

func TestHostileReplies(t *testing.T) {
	digest := strings.Repeat("0", 96)
	for _, test := range []struct {
		name   string
		status int
		body   string
		code   string
	}{
		{"nothing", 200, "", "tee_reply"},
		{"not JSON", 200, "<html>", "tee_reply"},
		{"JSON of another kind", 200, "[]", "tee_reply"},
		{"an unknown field", 200, `{"quote":"00","extra":1,"mrtd":"` + digest + `"}`, "tee_reply"},
		{"two values", 200, `{}{}`, "tee_reply"},
		{"an endless reply", 200, `{"quote":"` + strings.Repeat("0", maxReply) + `"}`, "tee_reply"},
		{"a redirect", 302, "", "tee_reply"},
		{"a refusal without reason", 500, "", "tee_reply"},
		{"a refusal with a code", 400, `{"error":"no","code":"register_not_extendable"}`, "register_not_extendable"},
		{"a refusal with nonsense for a code", 400, `{"error":"no","code":"\u001b[31m ok"}`, "tee_reply"},
		{"a refusal with an endless code", 400, `{"error":"no","code":"` + strings.Repeat("x", 100) + `"}`, "tee_reply"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, requests := host(t, test.status, test.body)
			_, err := c.Quote(t.Context(), dstack.ReportData{})
			wantCode(t, err, test.code)
			if strings.ContainsRune(err.Error(), 0x1b) {
				t.Errorf("error passes control characters on: %q", err)
			}
			if *requests != 1 {
				t.Errorf("%d requests", *requests)
			}
		})
	}
	t.Run("an empty quote", func(t *testing.T) {
		c, _ := host(t, 200, `{"quote":""}`)
		_, err := c.Quote(t.Context(), dstack.ReportData{})
		wantCode(t, err, "tee_reply")
	})
	t.Run("boot events for a runtime register", func(t *testing.T) {
		c, _ := host(t, 200, `{"events":[{"imr":3,"event_type":134217729,"digest":"","event":"app-id","event_payload":""}]}`)
		_, err := c.BootLog(t.Context())
		wantCode(t, err, "tee_reply")
	})
	t.Run("an unknown kind of boot event", func(t *testing.T) {
		c, _ := host(t, 200, `{"events":[{"imr":1,"event_type":4,"digest":"00","event":"","event_payload":""}]}`)
		_, err := c.BootLog(t.Context())
		wantCode(t, err, "tee_reply")
	})
}

// A connection that breaks after the request leaves the extend open: it must be
// reported and never sent again.
func TestBrokenExtendIsNotRepeated(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	requests := make(chan struct{}, 10)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))
			requests <- struct{}{}
			conn.Close()
		}
	}()
	c := New(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	})
	if err := c.Extend(t.Context(), 3, dstack.Measurement{1}); err == nil {
		t.Fatal("a broken extend succeeded")
	}
	if len(requests) != 1 {
		t.Errorf("the extend was sent %d times", len(requests))
	}
}

func TestDriverReportsABrokenTEE(t *testing.T) {
	env := collect.Env{Dial: func(context.Context, string) (net.Conn, error) {
		a, b := net.Pipe()
		b.Close()
		return a, nil
	}}
	_, err := collect.Open(t.Context(), env, []collect.Driver{Driver()})
	wantCode(t, err, "tee_failed")
}
