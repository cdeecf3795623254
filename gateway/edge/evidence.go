// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
)

// Whoever ends TLS must be able to say who that is: on names whose TLS ends here, the path
// of evidence is the gateway's own. It is the first request of a connection or none, so
// that nothing else of an app is read, and a connection that asked is not the app's any
// more. An app that speaks first is asked nothing.

const evidenceRequest = "POST " + channel.EvidencePath + " "

// Asked is the connection whose client wants evidence.
type Asked struct {
	// SPKI is the DER SubjectPublicKeyInfo of the certificate that the connection was
	// shown; nil when it was shown none, since it resumed a session.
	SPKI     []byte
	Instance dstack.InstanceID // that it was joined to
	Address  netip.Addr        // of that one in the tunnel
}

var errAsked = errors.New("the client asks for evidence")

// asks reports whether the first bytes that a client sends, whose TLS ends here, ask for
// evidence.
func (r *relay) asks(b []byte) bool {
	if r.answered == nil || r.began {
		return false
	}
	r.began = true
	if !bytes.HasPrefix(b, []byte(evidenceRequest)) {
		return false
	}
	r.first = bytes.Clone(b)
	return true
}

// answer takes the connection from the app and returns when it is closed.
func (r *relay) answer() error {
	r.taken.Store(true)
	r.app.bare().Close()
	<-r.answered
	if r.spoke.Load() {
		return errAsked // that was no HTTP: the app has spoken first
	}
	if u := r.client.under; u != nil {
		u.poll = false
	}
	a := Asked{Instance: r.target.id, Address: r.target.addr.Addr()}
	if u, ok := r.client.tls.NetConn().(*replay); ok {
		a.SPKI = u.shown
	}
	r.e.evidence.answer(&asking{Conn: r.client.tls, first: r.first, asked: a})
	return nil
}

// asking is a connection that asked.
type asking struct {
	net.Conn
	first []byte
	asked Asked
}

func (a *asking) Read(b []byte) (int, error) {
	if len(a.first) > 0 {
		n := copy(b, a.first)
		a.first = a.first[n:]
		return n, nil
	}
	return a.Conn.Read(b)
}

type askedKey struct{}

// evidencePages serves connections that asked.
func evidencePages(answer func(http.ResponseWriter, *http.Request, Asked)) *pages {
	p := newPages(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, _ := r.Context().Value(askedKey{}).(Asked)
		answer(w, r, a)
	}))
	p.server.WriteTimeout = 90 * time.Second // quotes of two machines
	p.server.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if a, ok := c.(*watched).Conn.(*asking); ok {
			return context.WithValue(ctx, askedKey{}, a.asked)
		}
		return ctx
	}
	p.server.SetKeepAlivesEnabled(false)
	return p
}
