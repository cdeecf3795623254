// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var nonce = bytes.Repeat([]byte{7}, 32)

// instance answers like an agent and counts connections.
type instance struct {
	*httptest.Server
	conns atomic.Int32
}

func newInstance(t *testing.T, encrypted bool, h http.HandlerFunc) *instance {
	t.Helper()
	in := &instance{}
	in.Server = httptest.NewUnstartedServer(h)
	in.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			in.conns.Add(1)
		}
	}
	in.Config.ErrorLog = nil
	if encrypted {
		in.StartTLS()
	} else {
		in.Start()
	}
	t.Cleanup(in.Close)
	return in
}

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if got := fault.Code(err); got != code {
		t.Fatalf("error %v has code %q, want %q", err, got, code)
	}
}

func TestEvidenceComesWithTheKeyOfItsConnection(t *testing.T) {
	for _, encrypted := range []bool{true, false} {
		t.Run(fmt.Sprintf("tls=%v", encrypted), func(t *testing.T) {
			in := newInstance(t, encrypted, func(w http.ResponseWriter, r *http.Request) {
				var req struct{ Nonce string }
				body, _ := io.ReadAll(r.Body)
				if err := json.Unmarshal(body, &req); err != nil || req.Nonce != hex.EncodeToString(nonce) {
					t.Errorf("request body %q: %v", body, err)
				}
				if r.Method != "POST" || r.URL.Path != EvidencePath || r.ContentLength != int64(len(body)) {
					t.Errorf("request is %s %s, length %d", r.Method, r.URL.Path, r.ContentLength)
				}
				fmt.Fprintf(w, `{"version":1}`)
			})
			reply, spki, err := FetchEvidence(context.Background(), in.URL, nonce)
			if err != nil {
				t.Fatal(err)
			}
			if string(reply) != `{"version":1}` {
				t.Errorf("reply %q", reply)
			}
			var want []byte
			if encrypted {
				want = in.Certificate().RawSubjectPublicKeyInfo
			}
			if !bytes.Equal(spki, want) {
				t.Errorf("spki %x, want %x", spki, want)
			}
			if n := in.conns.Load(); n != 1 {
				t.Errorf("%d connections, want 1", n)
			}
		})
	}
}

// A server whose second connection reaches another backend cannot matter,
// because there is no second connection, even when the first one is cut.
func TestABrokenConnectionIsNotDialledAgain(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if conns.Add(1) == 1 {
				c.Read(make([]byte, 4096)) // takes the request, then hangs up
			} else {
				fmt.Fprint(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
			}
			c.Close()
		}
	}()
	_, _, err = FetchEvidence(context.Background(), "http://"+ln.Addr().String(), nonce)
	ln.Close()
	<-done
	wantCode(t, err, "evidence_unreachable")
	if n := conns.Load(); n != 1 {
		t.Fatalf("%d connections, want 1", n)
	}
}

func TestRefusedAndMalformedReplies(t *testing.T) {
	elsewhere := newInstance(t, false, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{}`) })
	for _, c := range []struct {
		name, code, text string
		h                http.HandlerFunc
	}{
		{"a redirect is not followed", "evidence_refused", "redirects", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		}},
		{"an instance without the endpoint is named", "evidence_endpoint_absent", "does not exist", http.NotFound},
		{"a refusal is quoted", "evidence_refused", `"no \x1b[31mquote"`, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(400)
			json.NewEncoder(w).Encode(map[string]string{"error": "no \x1b[31mquote"})
		}},
		{"a rate limit is a refusal", "evidence_refused", "429", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "3")
			w.WriteHeader(429)
		}},
		{"an announced oversize reply is refused", "evidence_malformed", "larger", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(MaxReply+1))
			w.WriteHeader(200)
		}},
		{"a streamed oversize reply is refused", "evidence_malformed", "larger", func(w http.ResponseWriter, r *http.Request) {
			chunk := bytes.Repeat([]byte(" "), 1<<20)
			for range 18 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}},
		{"a page is not evidence", "evidence_malformed", "not JSON", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "<html>")
		}},
		{"a compressed reply is refused", "evidence_malformed", "content encoding", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(w, `{}`)
		}},
		{"a cut reply is no reply", "evidence_unreachable", "", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, `{}`)
			w.(http.Flusher).Flush()
			c, _, _ := w.(http.Hijacker).Hijack()
			c.Close()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := newInstance(t, true, c.h)
			reply, spki, err := FetchEvidence(context.Background(), in.URL, nonce)
			wantCode(t, err, c.code)
			if !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %q lacks %q", err, c.text)
			}
			if reply != nil || spki != nil {
				t.Error("a failed fetch returned bytes")
			}
			if fault.Fix(err) == "" && c.code == "evidence_endpoint_absent" {
				t.Error("no fix")
			}
		})
	}
	if elsewhere.conns.Load() != 0 {
		t.Error("the redirect was followed")
	}
}

func TestEndlessHeadersAreRefused(t *testing.T) {
	ours, theirs := net.Pipe() // unbuffered: what is written was read
	sent := make(chan int)
	go func() {
		defer theirs.Close()
		go io.Copy(io.Discard, theirs) // the request
		n := 0
		for part := "HTTP/1.1 200 OK\r\n"; ; part = "X-A: " + strings.Repeat("a", 1000) + "\r\n" {
			m, err := io.WriteString(theirs, part)
			if n += m; err != nil {
				sent <- n
				return
			}
		}
	}()
	u, _, err := parseTarget("http://h")
	if err != nil {
		t.Fatal(err)
	}
	_, err = exchange(context.Background(), ours, u, nonce)
	ours.Close()
	wantCode(t, err, "evidence_malformed")
	if n := <-sent; n > maxHeader+8<<10 {
		t.Errorf("%d bytes of header were read", n)
	}
}

func TestOnlyTLS13IsSpoken(t *testing.T) {
	in := newInstance(t, true, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{}`) })
	in.TLS.MaxVersion = tls.VersionTLS12
	_, _, err := FetchEvidence(context.Background(), in.URL, nonce)
	wantCode(t, err, "evidence_unreachable")
}

func TestTheProxyOfTheEnvironmentIsIgnored(t *testing.T) {
	in := newInstance(t, true, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{}`) })
	for _, v := range []string{"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"} {
		t.Setenv(v, "http://127.0.0.1:1")
	}
	if _, _, err := FetchEvidence(context.Background(), in.URL, nonce); err != nil {
		t.Fatal(err)
	}
}

func TestCancellationEndsAWaitingFetch(t *testing.T) {
	release := make(chan struct{})
	in := newInstance(t, true, func(w http.ResponseWriter, r *http.Request) { <-release })
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, _, err := FetchEvidence(ctx, in.URL, nonce)
	close(release)
	wantCode(t, err, "evidence_unreachable")
	if time.Since(start) > 5*time.Second {
		t.Error("cancellation took too long")
	}
}

func TestTargets(t *testing.T) {
	for _, c := range []struct{ target, url, addr string }{
		{"https://h:8090", "https://h:8090" + EvidencePath, "h:8090"},
		{"https://h:8090/", "https://h:8090" + EvidencePath, "h:8090"},
		{"https://h/x/", "https://h/x" + EvidencePath, "h:443"},
		{"http://[::1]:1" + EvidencePath, "http://[::1]:1" + EvidencePath, "[::1]:1"},
		{"https://app.dstack.localhost:9443", "https://app.dstack.localhost:9443" + EvidencePath, "127.0.0.1:9443"},
		{"https://localhost", "https://localhost" + EvidencePath, "127.0.0.1:443"},
		{"https://notlocalhost", "https://notlocalhost" + EvidencePath, "notlocalhost:443"},
	} {
		u, addr, err := parseTarget(c.target)
		if err != nil || u.String() != c.url || addr != c.addr {
			t.Errorf("%s: %v %s %v", c.target, u, addr, err)
		}
	}
	for _, target := range []string{"", "h:8090", "ftp://h", "https://", "https://u:p@h", "https://h?x=1", "https://h#f", "unix:///x", "https://h\x00"} {
		_, _, err := FetchEvidence(context.Background(), target, nonce)
		wantCode(t, err, "evidence_url")
	}
	for _, n := range []int{0, 15, 65} {
		_, _, err := FetchEvidence(context.Background(), "https://127.0.0.1:1", make([]byte, n))
		wantCode(t, err, "evidence_url")
	}
	_, _, err := FetchEvidence(context.Background(), "https://127.0.0.1:1", nonce)
	wantCode(t, err, "evidence_unreachable")
}
