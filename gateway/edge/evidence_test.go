// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/channel"
)

// witness answers who asks for evidence, with what is known of the connection.
func witness(c *Config) {
	c.Evidence = func(w http.ResponseWriter, r *http.Request, a Asked) {
		body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<10))
		fmt.Fprintf(w, "%q|%x|%s|%s|%s", body, a.SPKI, a.Instance, a.Address, r.Method)
	}
}

func ask(t *testing.T, c io.ReadWriter, request string) string {
	t.Helper()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func TestThreat_C05_WhereTLSEndsHereTheGatewayAnswersForItself(t *testing.T) {
	r := newRig(t, witness)
	id := r.instance(1, 1)
	// The app waits for the client, as HTTP does, and says what it got.
	got := make(chan string, 8)
	r.serve(1, 8080, func(c net.Conn) {
		b, _ := io.ReadAll(c)
		got <- string(b)
	})
	conn, err := r.tls(host(appID(1), "-8080"))
	if err != nil {
		t.Fatal(err)
	}
	body := ask(t, conn, "POST "+channel.EvidencePath+" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
	if want := fmt.Sprintf(`"{}"|%x|%s|%s|POST`, certificate().Leaf.RawSubjectPublicKeyInfo, id, address(1)); body != want {
		t.Errorf("answer %s, want %s", body, want)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection goes on: %v", err)
	}
	if b := <-got; b != "" {
		t.Errorf("the app got %q", b)
	}

	// With the client that `dstack verify` has, in a world where the name leads here.
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", r.addr)
	}
	_, spki, err := channel.FetchEvidenceBy(t.Context(), dial, "https://"+host(appID(1), "-8080"), bytes.Repeat([]byte{7}, 32))
	if !bytes.Equal(spki, nil) || err == nil || !strings.Contains(err.Error(), "not JSON") {
		t.Errorf("fetch: %s, %v", hex.EncodeToString(spki), err)
	}
	<-got
}

func TestWhatIsNotEvidenceIsTheApps(t *testing.T) {
	r := newRig(t, witness)
	r.instance(1, 1)
	r.serve(1, 8080, echo)
	for _, c := range []struct{ name, first string }{
		{"another path", "POST " + channel.EvidencePath + "/more HTTP/1.1\r\n\r\n"},
		{"another method", "GET " + channel.EvidencePath + " HTTP/1.1\r\n\r\n"},
		{"the beginning alone", "POST "},
		{"later on the connection", "GET / HTTP/1.1\r\n\r\nPOST " + channel.EvidencePath + " HTTP/1.1\r\n\r\n"},
	} {
		conn, err := r.tls(host(appID(1), "-8080"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, c.first); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(c.first))
		if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != c.first {
			t.Errorf("%s: %q, %v", c.name, buf, err)
		}
		// The second message of a connection is the app's whatever it says.
		if _, err := io.WriteString(conn, evidenceRequest); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, buf[:1]); err != nil || buf[0] != 'P' {
			t.Errorf("%s: then %q, %v", c.name, buf[:1], err)
		}
		conn.Close()
	}
	// TLS that ends in the app is the app's too.
	r.serve(1, 8443, tlsEcho)
	conn, err := r.tls(host(appID(1), "-8443s"), "http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(conn, evidenceRequest)
	if b := make([]byte, len(evidenceRequest)); func() bool { _, err := io.ReadFull(conn, b); return err != nil || string(b) != evidenceRequest }() {
		t.Error("the gateway answers where TLS ends in the app")
	}
}

// An app that speaks first speaks no HTTP: whoever answers then would answer amidst it.
func TestAnAppThatSpeaksFirstIsNotInterrupted(t *testing.T) {
	r := newRig(t, witness)
	r.instance(1, 1)
	r.serve(1, 25, func(c net.Conn) {
		io.WriteString(c, "220 ready\r\n")
		io.Copy(io.Discard, c)
	})
	conn, err := r.tls(host(appID(1), "-25"))
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 11)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "220 ready\r\n" {
		t.Fatalf("%q, %v", b, err)
	}
	io.WriteString(conn, "POST "+channel.EvidencePath+" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := conn.Read(b); n > 0 || err == nil {
		t.Errorf("an answer amidst the app's: %q", b[:n])
	}
}

// A session that is resumed shows no certificate, so there is no key to answer for.
func TestAResumedSessionHasNoKeyToAnswerFor(t *testing.T) {
	r := newRig(t, witness)
	r.instance(1, 1)
	r.serve(1, 8080, func(c net.Conn) { io.Copy(io.Discard, c) })
	cache := tls.NewLRUClientSessionCache(1)
	for i := range 2 {
		conn, err := r.handshake(r.tcp(), &tls.Config{ServerName: host(appID(1), "-8080"), RootCAs: roots(), ClientSessionCache: cache})
		if err != nil {
			t.Fatal(err)
		}
		body := ask(t, conn, "POST "+channel.EvidencePath+" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
		if resumed := conn.ConnectionState().DidResume; resumed != (i == 1) || strings.Contains(body, "||") != resumed {
			t.Errorf("connection %d: resumed %v, %s", i, resumed, body)
		}
	}
	r.eventually(func() bool { return r.edge.Stats().Open == 0 }, func() string { return fmt.Sprintf("%+v", r.edge.Stats()) })
}
