// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"bufio"
	"bytes"
	"net"
	"net/http"
	"strings"

	"github.com/dstack-go/dstack/gateway/hostname"
)

const acmePath = "/.well-known/acme-challenge/"

// Redirect is the handler for port 80: certificate authorities' HTTP-01 challenges go to
// challenge (nil for none), requests for names that lead somewhere to HTTPS, and all
// others get 404.
func (e *Edge) Redirect(challenge http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if challenge != nil && strings.HasPrefix(r.URL.Path, acmePath) {
			challenge.ServeHTTP(w, r)
			return
		}
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if !e.known(host) {
			http.NotFound(w, r)
			return
		}
		redirect(w, r, host)
	})
}

func redirect(w http.ResponseWriter, r *http.Request, host string) {
	w.Header().Set("Location", "https://"+host+r.URL.RequestURI())
	w.WriteHeader(http.StatusPermanentRedirect)
}

// known reports whether a host is a form on a base domain, or a custom domain that led to
// an app lately: a request without TLS makes no DNS query.
func (e *Edge) known(host string) bool {
	name, err := hostname.ParseName(host)
	if err != nil {
		return false
	}
	d, err := e.cfg.Rules().Resolve(name)
	return err == nil && (d.Kind != hostname.Custom || e.custom.knows(name))
}

// knows reports whether a custom domain is remembered to lead to an app.
func (r *resolver) knows(name hostname.Name) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	f, ok := r.cache[name]
	return ok && f.err == nil && r.now().Before(f.until)
}

// answerHTTP answers a plain HTTP request on the port of TLS, as far as it has come.
func (e *Edge) answerHTTP(raw []byte) []byte {
	const head = "Connection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
	if err == nil {
		host, port, perr := net.SplitHostPort(req.Host)
		if perr != nil {
			host, port = req.Host, ""
		}
		if uri := req.URL.RequestURI(); e.known(host) && strings.HasPrefix(uri, "/") && (port == "" || digits(port)) {
			if port != "" {
				host += ":" + port
			}
			return []byte("HTTP/1.1 308 Permanent Redirect\r\n" + head + "Location: https://" + host + uri + "\r\nContent-Length: 0\r\n\r\n")
		}
	}
	const text = "This port speaks TLS. Use https://.\n"
	return []byte("HTTP/1.1 400 Bad Request\r\n" + head + "Content-Length: 36\r\n\r\n" + text)
}

func digits(s string) bool { return strings.Trim(s, "0123456789") == "" }
