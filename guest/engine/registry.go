// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// RegistryAddr is where the guest's own registry listens. Docker takes every
// loopback registry over plain HTTP.
const RegistryAddr = "127.0.0.1:5000"

// RegistryRepo is the one repository of the registry; images are told apart by
// digest.
const RegistryRepo = "app"

// maxConcurrent bounds the streams to the host; hostlink has 64 per direction for
// everything.
const maxConcurrent = 8

// Registry is a read-only OCI registry on loopback that passes requests on to the
// host. It exists until it is closed, which is as soon as the images are there:
// containers in the host's network namespace could reach it, and find only what
// the host serves anyway.
type Registry struct {
	Addr   string
	server *http.Server
	served sync.WaitGroup
}

// ServeRegistry listens on addr and passes GET and HEAD below /v2/ to the stream
// that dial opens.
func ServeRegistry(addr string, dial func(ctx context.Context) (net.Conn, error)) (*Registry, error) {
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for the loopback registry: %w", err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: "registry"})
			// Only what the distribution protocol needs goes to the host.
			keep := http.Header{}
			for _, name := range []string{"Accept", "Range", "If-None-Match"} {
				if v, ok := r.Out.Header[name]; ok {
					keep[name] = v
				}
			}
			r.Out.Header = keep
			r.Out.Body, r.Out.ContentLength = http.NoBody, 0
		},
		Transport: &http.Transport{
			DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
			MaxConnsPerHost:        maxConcurrent,
			MaxIdleConnsPerHost:    maxConcurrent,
			ResponseHeaderTimeout:  30 * time.Second,
			DisableCompression:     true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if !errors.Is(err, context.Canceled) {
				http.Error(w, "the host's registry does not answer: "+err.Error(), http.StatusBadGateway)
			}
		},
		ModifyResponse: func(r *http.Response) error {
			// A redirect or a challenge would send the engine elsewhere, or make it
			// hand out credentials; the host has nothing to say in either.
			if r.StatusCode/100 == 3 || r.StatusCode == http.StatusUnauthorized {
				return fmt.Errorf("the host answered %s", r.Status)
			}
			return nil
		},
	}
	r := &Registry{Addr: listener.Addr().String(), server: &http.Server{
		Handler:           readOnly(proxy),
		ReadHeaderTimeout: 10 * time.Second,
	}}
	r.served.Go(func() { _ = r.server.Serve(listener) })
	return r, nil
}

// readOnly admits GET and HEAD of clean paths below /v2/.
func readOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			http.Error(w, "this registry is read-only", http.StatusMethodNotAllowed)
		case r.URL.Path != "/v2/" && !strings.HasPrefix(r.URL.Path, "/v2/"+RegistryRepo+"/") ||
			slices.Contains(strings.Split(r.URL.Path, "/"), ".."):
			http.NotFound(w, r)
		default:
			if r.Body != nil {
				_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 1))
			}
			next.ServeHTTP(w, r)
		}
	})
}

// Close stops listening and ends what is under way.
func (r *Registry) Close() error {
	err := r.server.Close()
	r.served.Wait()
	return err
}
