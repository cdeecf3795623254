// SPDX-License-Identifier: Apache-2.0

package fetch_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	sevabi "github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/kds"
	"github.com/google/go-sev-guest/verify/trust"
	"github.com/google/go-tdx-guest/pcs"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/cache"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

const (
	tcbPath  = "/tdx/certification/v4/tcb"
	qePath   = "/tdx/certification/v4/qe/identity"
	crlPath  = "/sgx/certification/v4/pckcrl"
	rootPath = "/sgx/certification/v4/rootcacrl"

	sgxTCBPath = "/sgx/certification/v4/tcb"
	sgxQEPath  = "/sgx/certification/v4/qe/identity"
)

// service answers real collateral by path, counts what it is asked, and lets a test
// answer a path otherwise.
type service struct {
	*httptest.Server
	mux    map[string]http.HandlerFunc // by path
	mu     sync.Mutex
	asked  []string // request URIs
	agents map[string]bool
}

func newService(t testing.TB, mux map[string]http.HandlerFunc) *service {
	s := &service{mux: mux, agents: map[string]bool{}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.URL.RequestURI())
		s.agents[r.UserAgent()] = true
		answer := s.mux[r.URL.Path]
		s.mu.Unlock()
		if answer == nil {
			http.NotFound(w, r)
			return
		}
		answer(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *service) count(path string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, uri := range s.asked {
		if strings.HasPrefix(uri, path) {
			n++
		}
	}
	return n
}

func send(body []byte, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.Write(body)
	}
}

func realSet(t testing.TB, version string) collateral.TDX {
	t.Helper()
	set, err := collateral.ParseTDX(testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_"+version+"_collateral.json"))
	if err != nil {
		t.Fatal(err)
	}
	return *set
}

// pccs splits a set into the endpoints of a PCCS.
func pccs(set collateral.TDX) map[string]http.HandlerFunc {
	signed := func(member, doc string, sig []byte) []byte {
		return fmt.Appendf(nil, `{"%s":%s,"signature":"%x"}`, member, doc, sig)
	}
	// Both url encodings are met: of queries and of paths.
	chain := func(pem string) string { return strings.ReplaceAll(url.QueryEscape(pem), "+", "%20") }
	return map[string]http.HandlerFunc{
		tcbPath:  send(signed("tcbInfo", set.TCBInfo, set.TCBInfoSignature), "TCB-Info-Issuer-Chain", chain(set.TCBInfoIssuerChain)),
		qePath:   send(signed("enclaveIdentity", set.QEIdentity, set.QEIdentitySignature), "SGX-Enclave-Identity-Issuer-Chain", url.PathEscape(set.QEIdentityIssuerChain)),
		crlPath:  send(set.PCKCRL, "SGX-PCK-CRL-Issuer-Chain", chain(set.PCKCRLIssuerChain)),
		rootPath: send([]byte(hex.EncodeToString(set.RootCACRL))),
	}
}

// fast retries without waiting.
var fast = fetch.HTTP{Backoff: time.Millisecond, Timeout: 5 * time.Second}

func newPCS(t testing.TB, o fetch.PCSOptions) *fetch.PCS {
	t.Helper()
	if o.HTTP == (fetch.HTTP{}) {
		o.HTTP = fast
	}
	p, err := fetch.NewPCS(o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

var wantTDX = collateral.Request{FMSPC: "b0c06f000000", PCKCA: collateral.Platform}

func TestPCSReturnsWhatTheServiceHas(t *testing.T) {
	for _, version := range []string{"v4", "v5"} {
		set := realSet(t, version)
		s := newService(t, pccs(set))
		for _, base := range []string{s.URL, s.URL + "/", s.URL + "/sgx/certification/v4/", s.URL + "/tdx/certification/v4"} {
			b, err := newPCS(t, fetch.PCSOptions{Base: base}).Collateral(t.Context(), wantTDX)
			if err != nil {
				t.Fatal(err)
			}
			if want := set; fmt.Sprintf("%q", b.TDX) != fmt.Sprintf("%q", want) {
				t.Errorf("%s from %s differs from the set that was served", version, base)
			}
		}
		if len(s.agents) != 1 || !s.agents["dstack"] {
			t.Errorf("user agents %v", s.agents)
		}
	}
}

// From a service by way of the cache to a verdict, and without the service as long
// as what was kept is good.
func TestFetchedAndKeptCollateralVerifiesARealQuote(t *testing.T) {
	set := realSet(t, "v4")
	quote := testkit.Vectors(t, "attestation/tdx/dcap-qvl-tdx_quote_v4.bin")
	now := time.Date(2025, 6, 20, 0, 0, 0, 0, time.UTC)
	s := newService(t, pccs(set))
	c, err := cache.Open(filepath.Join(t.TempDir(), "cache"), fetch.Vendors{PCS: newPCS(t, fetch.PCSOptions{Base: s.URL})},
		cache.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		at   time.Time
		code string
	}{
		{"from the service", now, ""},
		{"from the cache", now.Add(time.Hour), ""},
		{"from the cache, stale", now.Add(48 * time.Hour), ""},
		{"past its end", now.Add(60 * 24 * time.Hour), "collateral_network"},
	} {
		now = step.at
		b, err := c.Collateral(t.Context(), wantTDX)
		if fault.Code(err) != step.code {
			t.Fatalf("%s: %v, want %q", step.name, err, step.code)
		}
		s.Close() // after the first
		if err != nil {
			continue
		}
		claims, err := tdxtest.Verify(quote, b.TDX, []attest.Roots{tdx.VendorRoots()}, now)
		if err != nil || claims.TCBStatus != "UpToDate" || claims.TCBEvaluation != 17 {
			t.Errorf("%s: %+v, %v", step.name, claims, err)
		}
	}
}

// The URLs are those that google/go-tdx-guest asks, plus the update channel.
func TestPCSAsksWhatTheSpecificationSays(t *testing.T) {
	for _, c := range []struct {
		update fetch.Update
		ca     collateral.CA
		want   string
	}{
		{"", collateral.Platform, "standard"}, {fetch.Standard, collateral.Processor, "standard"}, {fetch.Early, collateral.Platform, "early"},
	} {
		s := newService(t, pccs(realSet(t, "v4")))
		want := wantTDX
		want.PCKCA = c.ca
		if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL, Update: c.update}).Collateral(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		theirs := func(u string) string {
			parsed, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			return parsed.RequestURI()
		}
		for _, uri := range []string{
			theirs(pcs.TcbInfoURL("B0C06F000000")) + "&update=" + c.want,
			theirs(pcs.QeIdentityURL()) + "?update=" + c.want,
			theirs(pcs.PckCrlURL(string(c.ca))),
			rootPath,
		} {
			if s.count(uri) != 1 {
				t.Errorf("%s was asked %d times, want once; asked %q", uri, s.count(uri), s.asked)
			}
		}
	}
	if _, err := fetch.NewPCS(fetch.PCSOptions{Update: "latest"}); fault.Code(err) != "collateral_update" {
		t.Errorf("an unknown channel: %v", err)
	}
}

// enclaveService serves the collateral of a simulated platform as a PCCS has it: TDX's
// and SGX's documents under paths of their own, the revocation lists once.
func enclaveService(t testing.TB, p *tdxtest.Platform) *service {
	mux := pccs(p.Collateral())
	sgx := pccs(p.EnclaveCollateral())
	mux[sgxTCBPath], mux[sgxQEPath] = sgx[tcbPath], sgx[qePath]
	return newService(t, mux)
}

var wantEnclave = collateral.Request{FMSPC: "90c06f000000", PCKCA: collateral.Platform, Enclave: true}

func TestCollateralOfSGXVerifiesAnEnclavesQuote(t *testing.T) {
	p := tdxtest.New(t)
	s := enclaveService(t, p)
	quote := p.EnclaveQuote(tdxtest.EnclaveReport([32]byte{1}, dstack.ReportData{2}))
	want, err := tdx.EnclaveRequest(quote)
	if err != nil || want != wantEnclave {
		t.Fatalf("%+v, %v", want, err)
	}
	verify := func(b *collateral.Bundle) error {
		_, err := tdx.VerifyEnclave(attest.Input{
			Evidence: &attest.Evidence{Quote: quote}, Collateral: b, Roots: []attest.Roots{p.Roots()}, At: tdxtest.Issued.Add(time.Hour),
		})
		return err
	}
	now := tdxtest.Issued.Add(time.Hour)
	c, err := cache.Open(filepath.Join(t.TempDir(), "cache"), fetch.Vendors{PCS: newPCS(t, fetch.PCSOptions{Base: s.URL + "/sgx/certification/v4"})},
		cache.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	td := want
	td.Enclave = false
	// The cache is asked in turns: neither answer may stand for the other.
	for range 2 {
		b, err := c.Collateral(t.Context(), td)
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(b); fault.Code(err) != "tcb_info_id" {
			t.Errorf("an enclave with TDX's documents: %v", err)
		}
		if _, err := tdxtest.Verify(p.Quote(p.Body()), b.TDX, []attest.Roots{p.Roots()}, now); err != nil {
			t.Error(err)
		}
		if b, err = c.Collateral(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		if err := verify(b); err != nil {
			t.Error(err)
		}
	}
	for _, uri := range []string{
		sgxTCBPath + "?fmspc=90C06F000000&update=standard", sgxQEPath + "?update=standard",
		tcbPath + "?fmspc=90C06F000000&update=standard", qePath + "?update=standard",
	} {
		if s.count(uri) != 1 {
			t.Errorf("%s was asked %d times, want once; asked %q", uri, s.count(uri), s.asked)
		}
	}
}

func TestAnswersAboutSGXAreRefusedForTheirOwnReason(t *testing.T) {
	p := tdxtest.New(t)
	good := pccs(p.EnclaveCollateral())
	set := p.EnclaveCollateral()
	for _, c := range []struct {
		name  string
		path  string
		serve http.HandlerFunc
		code  string
	}{
		{"an unknown machine", sgxTCBPath, sendStatus(404), "collateral_not_found"},
		{"no QE identity", sgxQEPath, sendStatus(404), "collateral_not_found"},
		{"a server that fails", sgxQEPath, sendStatus(500), "collateral_unavailable"},
		{"QE identity instead of TCB info", sgxTCBPath, good[qePath], "collateral_response"},
		{"TCB info instead of QE identity", sgxQEPath, good[tcbPath], "collateral_response"},
		{"no issuer chain", sgxTCBPath, send(fmt.Appendf(nil, `{"tcbInfo":%s,"signature":"%x"}`, set.TCBInfo, set.TCBInfoSignature)), "collateral_issuer_chain"},
		{"no issuer chain of the identity", sgxQEPath, send(fmt.Appendf(nil, `{"enclaveIdentity":%s,"signature":"%x"}`, set.QEIdentity, set.QEIdentitySignature)), "collateral_issuer_chain"},
		{"a document beyond the limit", sgxTCBPath, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, io.LimitReader(zeros{}, 1<<30)) }, "collateral_too_large"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := enclaveService(t, p)
			s.mux[c.path] = c.serve
			_, err := newPCS(t, fetch.PCSOptions{Base: s.URL}).Collateral(t.Context(), wantEnclave)
			if fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
			if s.count("/tdx/") != 0 {
				t.Errorf("TDX's documents were asked for: %q", s.asked)
			}
		})
	}
}

func TestPCSFallsBackToTheConfiguredRootList(t *testing.T) {
	set := realSet(t, "v4")
	mux := pccs(set)
	delete(mux, rootPath)
	mux["/IntelSGXRootCA.der"] = send(set.RootCACRL, "Content-Type", "application/pkix-crl")
	s := newService(t, mux)
	b, err := newPCS(t, fetch.PCSOptions{Base: s.URL, RootCRL: s.URL + "/IntelSGXRootCA.der"}).Collateral(t.Context(), wantTDX)
	if err != nil || string(b.RootCACRL) != string(set.RootCACRL) {
		t.Errorf("%v", err)
	}
	// A failing service is no reason to ask elsewhere.
	s.mux[rootPath] = func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }
	before := s.count("/Intel")
	if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL, RootCRL: s.URL + "/IntelSGXRootCA.der"}).Collateral(t.Context(), wantTDX); fault.Code(err) != "collateral_unavailable" || s.count("/Intel") != before {
		t.Errorf("after 503: %v", err)
	}
}

func TestAnswersAreRefusedForTheirOwnReason(t *testing.T) {
	set := realSet(t, "v4")
	elsewhere := newService(t, map[string]http.HandlerFunc{"/": send(set.PCKCRL)})
	good := pccs(set)
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			w.Write([]byte("SECRET \x1b[2J"))
		}
	}
	redirect := func(to string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) }
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	io.Copy(z, io.LimitReader(zeros{}, 64<<20))
	z.Close()
	huge := func(w http.ResponseWriter, r *http.Request) { io.Copy(w, io.LimitReader(zeros{}, 1<<30)) }
	truncated := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100000")
		w.Write([]byte("{"))
	}
	slow := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	drop := func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }
	chain := url.PathEscape(set.TCBInfoIssuerChain)
	body := fmt.Appendf(nil, `{"tcbInfo":%s,"signature":"%x"}`, set.TCBInfo, set.TCBInfoSignature)
	const header = "TCB-Info-Issuer-Chain"
	html := []byte("<html><h1>Log in to the hotel's network</h1></html>")

	for _, c := range []struct {
		name  string
		path  string
		serve http.HandlerFunc
		code  string
		times int // that the path is asked; zero if the transport repeats requests, too
	}{
		{"an unknown machine", tcbPath, status(404), "collateral_not_found", 1},
		{"a bad request", tcbPath, status(400), "collateral_refused", 1},
		{"a demand to log in", tcbPath, status(401), "collateral_refused", 1},
		{"an empty success", tcbPath, status(204), "collateral_refused", 1},
		{"too many requests", tcbPath, status(429), "collateral_rate_limited", 3},
		{"a server that fails", tcbPath, status(500), "collateral_unavailable", 3},
		{"a gateway that fails", crlPath, status(502), "collateral_unavailable", 3},
		{"a server that is down for long", tcbPath, sendStatus(503, "Retry-After", "3600"), "collateral_unavailable", 1},
		{"a redirect to another host", crlPath, redirect(elsewhere.URL), "collateral_redirect", 1},
		{"a redirect to itself without end", crlPath, redirect(crlPath), "collateral_redirect", 4},
		{"a redirect to a file", crlPath, redirect("file:///etc/passwd"), "collateral_redirect", 1},
		{"a redirect to another scheme", crlPath, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://"+r.Host+crlPath, http.StatusFound)
		}, "collateral_redirect", 1},
		{"a status of redirection only", crlPath, status(304), "collateral_redirect", 1},
		{"a connection dropped", qePath, drop, "collateral_network", 0},
		{"a body cut short", qePath, truncated, "collateral_network", 3},
		{"a body that never comes", qePath, slow, "collateral_timeout", 3},
		{"a body of a gigabyte", rootPath, huge, "collateral_too_large", 1},
		{"64 MiB in gzip", rootPath, send(bomb.Bytes(), "Content-Encoding", "gzip"), "collateral_too_large", 1},
		{"a page instead of a list", rootPath, send(html), "collateral_response", 1},
		{"a page instead of PCK's list", crlPath, send(html), "collateral_response", 1},
		{"a page instead of a document", tcbPath, send(html, header, chain), "collateral_response", 1},
		{"QE identity instead of TCB info", tcbPath, good[qePath], "collateral_response", 1},
		{"a document without signature", tcbPath, send([]byte(`{"tcbInfo":`+set.TCBInfo+`}`), header, chain), "collateral_response", 1},
		{"a document twice", tcbPath, send([]byte(`{"tcbInfo":{},"tcbInfo":`+set.TCBInfo+`}`), header, chain), "collateral_response", 1},
		{"a list cut short", crlPath, send(set.PCKCRL[:50], "SGX-PCK-CRL-Issuer-Chain", chain), "collateral_response", 1},
		{"no issuer chain", tcbPath, send(body), "collateral_issuer_chain", 1},
		{"no issuer chain of the list", crlPath, send(set.PCKCRL), "collateral_issuer_chain", 1},
		{"an issuer chain that is text", tcbPath, send(body, header, "none"), "collateral_response", 1},
		{"an issuer chain with a bad escape", tcbPath, send(body, header, "%zz"), "collateral_response", 1},
		{"an issuer chain cut short", tcbPath, send(body, header, chain[:len(chain)-40]), "collateral_response", 1},
		{"an issuer chain of 10 certificates", tcbPath, send(body, header, strings.Repeat(chain, 5)), "collateral_response", 1},
		{"a header beyond the limit", tcbPath, send(body, header, strings.Repeat("a", 200<<10)), "collateral_network", 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			mux := pccs(set)
			mux[c.path] = c.serve
			s := newService(t, mux)
			p := newPCS(t, fetch.PCSOptions{Base: s.URL, RootCRL: s.URL + "/none", HTTP: fetch.HTTP{Backoff: time.Millisecond, Timeout: 300 * time.Millisecond}})
			_, err := p.Collateral(t.Context(), wantTDX)
			if fault.Code(err) != c.code {
				t.Fatalf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
			if n := s.count(c.path); c.times > 0 && n != c.times {
				t.Errorf("asked %d times, want %d", n, c.times)
			}
			if fault.Fix(err) == "" && c.code != "collateral_too_large" {
				t.Error("there is no fix")
			}
			if strings.ContainsAny(err.Error(), "\x1b") || strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "hotel") {
				t.Errorf("the error repeats what the server said: %v", err)
			}
		})
	}
	if n := elsewhere.count("/"); n != 0 {
		t.Errorf("the other host was asked %d times", n)
	}
}

func sendStatus(code int, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// What a service calls its content does not matter; that it is signed does.
func TestContentTypeDoesNotMatter(t *testing.T) {
	set := realSet(t, "v4")
	mux := pccs(set)
	plain := mux[tcbPath]
	mux[tcbPath] = func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "image/png")
		plain(w, r)
	}
	s := newService(t, mux)
	if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL}).Collateral(t.Context(), wantTDX); err != nil {
		t.Error(err)
	}
}

func TestAPassingFailureIsRetried(t *testing.T) {
	for _, c := range []struct {
		name  string
		after func() string
		code  int
		min   time.Duration
	}{
		{"a server that fails once", func() string { return "" }, 503, 0},
		{"a limit that passes in a second", func() string { return "1" }, 429, time.Second},
		{"a limit that passes at a time", func() string { return time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat) }, 429, 900 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			mux := pccs(realSet(t, "v4"))
			good := mux[tcbPath]
			var n atomic.Int32
			mux[tcbPath] = func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1) == 1 {
					sendStatus(c.code, "Retry-After", c.after())(w, r)
					return
				}
				good(w, r)
			}
			s := newService(t, mux)
			start := time.Now()
			if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL}).Collateral(t.Context(), wantTDX); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d < c.min {
				t.Errorf("asked again after %v, want at least %v", d, c.min)
			}
			if s.count(tcbPath) != 2 {
				t.Errorf("asked %d times", s.count(tcbPath))
			}
		})
	}
}

func TestRedirectsWithinTheServiceAreFollowed(t *testing.T) {
	mux := pccs(realSet(t, "v4"))
	mux["/moved"] = mux[rootPath]
	mux[rootPath] = func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/moved", http.StatusMovedPermanently)
	}
	s := newService(t, mux)
	if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL}).Collateral(t.Context(), wantTDX); err != nil {
		t.Error(err)
	}
}

func TestEqualRequestsAreSentOnce(t *testing.T) {
	mux := pccs(realSet(t, "v4"))
	release := make(chan struct{})
	for path, h := range mux {
		mux[path] = func(w http.ResponseWriter, r *http.Request) { <-release; h(w, r) }
	}
	s := newService(t, mux)
	p := newPCS(t, fetch.PCSOptions{Base: s.URL})

	// One of the callers leaves early; the others get their answer nonetheless.
	ctx, leave := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 8 {
		ctx := ctx
		if i > 0 {
			ctx = t.Context()
		}
		wg.Go(func() {
			_, err := p.Collateral(ctx, wantTDX)
			if i == 0 && (fault.Code(err) != "collateral_cancelled" || !errors.Is(err, context.Canceled)) || i > 0 && err != nil {
				t.Errorf("caller %d: %v", i, err)
			}
		})
	}
	for s.count("/") < 4 {
		time.Sleep(time.Millisecond)
	}
	leave()
	time.Sleep(20 * time.Millisecond)
	close(release)
	wg.Wait()
	if n := s.count("/"); n != 4 {
		t.Errorf("8 callers at once made %d requests, want 4", n)
	}
}

func TestTheLastCallerToLeaveEndsTheRequest(t *testing.T) {
	gone := make(chan struct{})
	mux := pccs(realSet(t, "v4"))
	mux[tcbPath] = func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(gone)
	}
	s := newService(t, mux)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := newPCS(t, fetch.PCSOptions{Base: s.URL, HTTP: fetch.HTTP{Timeout: time.Minute}}).Collateral(ctx, wantTDX); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v", err)
	}
	select {
	case <-gone:
	case <-time.After(5 * time.Second):
		t.Error("the request goes on without anybody waiting for it")
	}
}

// Whatever evidence says, only the service is asked, and only under its paths.
func TestThreat_B15_NoURLComesFromEvidence(t *testing.T) {
	s := newService(t, pccs(realSet(t, "v4")))
	p, k := newPCS(t, fetch.PCSOptions{Base: s.URL}), newKDS(t, s.URL)
	for _, c := range []struct {
		name   string
		source collateral.Source
		want   collateral.Request
	}{
		{"an FMSPC with a parameter", p, collateral.Request{FMSPC: "b0c06f000000&x=y", PCKCA: "platform"}},
		{"an FMSPC of 11 digits", p, collateral.Request{FMSPC: "b0c06f00000", PCKCA: "platform"}},
		{"an FMSPC with a line after it", p, collateral.Request{FMSPC: "b0c06f000000\n", PCKCA: "platform"}},
		{"an FMSPC in capitals", p, collateral.Request{FMSPC: "B0C06F000000", PCKCA: "platform"}},
		{"an FMSPC that is a path", p, collateral.Request{FMSPC: "../../../../", PCKCA: "platform"}},
		{"no FMSPC", p, collateral.Request{PCKCA: "platform"}},
		{"a PCK issuer of another name", p, collateral.Request{FMSPC: "b0c06f000000", PCKCA: "root"}},
		{"a PCK issuer with a parameter", p, collateral.Request{FMSPC: "b0c06f000000", PCKCA: "platform&encoding=pem"}},
		{"no PCK issuer", p, collateral.Request{FMSPC: "b0c06f000000"}},
		{"a product that is a path", k, collateral.Request{Product: "Milan/../../x"}},
		{"a product in small letters", k, collateral.Request{Product: "milan"}},
		{"no product", k, collateral.Request{}},
		{"nothing at all", fetch.Vendors{PCS: p, KDS: k}, collateral.Request{}},
	} {
		if _, err := c.source.Collateral(t.Context(), c.want); fault.Code(err) != "collateral_request" {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if n := s.count("/"); n != 0 {
		t.Errorf("the service was asked %d times: %q", n, s.asked)
	}
}

func TestBasesAreRefusedForTheirOwnReason(t *testing.T) {
	for _, base := range []string{"http://pccs.example.com", "ftp://localhost", "pccs.example.com", "https://", "https://u:p@x", "https://x?y", "https://x#y", "://", "http://127.0.0.1.example.com"} {
		if _, err := fetch.NewPCS(fetch.PCSOptions{Base: base}); fault.Code(err) != "collateral_url" {
			t.Errorf("PCS %s: %v", base, err)
		}
		if _, err := fetch.NewPCS(fetch.PCSOptions{RootCRL: base}); fault.Code(err) != "collateral_url" {
			t.Errorf("root list %s: %v", base, err)
		}
		if _, err := fetch.NewKDS(fetch.KDSOptions{Base: base}); fault.Code(err) != "collateral_url" {
			t.Errorf("KDS %s: %v", base, err)
		}
	}
	for _, base := range []string{"", "https://pccs.example.com:8081", "http://localhost:8081", "http://[::1]:8081/sub", "http://127.0.0.1"} {
		if _, err := fetch.NewPCS(fetch.PCSOptions{Base: base}); err != nil {
			t.Errorf("%s: %v", base, err)
		}
	}
	p := newPCS(t, fetch.PCSOptions{})
	early := newPCS(t, fetch.PCSOptions{Update: fetch.Early})
	if p.Scope() == early.Scope() || !strings.Contains(p.Scope(), fetch.IntelPCS) {
		t.Errorf("scopes %q and %q", p.Scope(), early.Scope())
	}
	if k, err := fetch.NewKDS(fetch.KDSOptions{Base: "https://kdsintf.amd.com/vcek/v1/"}); err != nil || k.Scope() != "kds "+fetch.AMDKDS {
		t.Errorf("upstream's base: %v", err)
	}
}

func newKDS(t testing.TB, base string) *fetch.KDS {
	t.Helper()
	k, err := fetch.NewKDS(fetch.KDSOptions{Base: base, HTTP: fast})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// revocationList is of an authority of its own; the source does not judge.
func revocationList(t testing.TB, next time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "ARK-Test"}, SubjectKeyId: []byte{1}, KeyUsage: x509.KeyUsageCRLSign}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(3), ThisUpdate: next.Add(-time.Hour), NextUpdate: next}, ca, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func vector(t testing.TB, name string) []byte {
	block, _ := pem.Decode(testkit.Vectors(t, "attestation/sev-snp/"+name))
	return block.Bytes
}

func TestKDSReturnsChainListAndVCEK(t *testing.T) {
	crl := revocationList(t, time.Now().Add(time.Hour))
	ask, vcek := vector(t, "sev_snp_ask.pem"), vector(t, "sev_snp_vcek.pem")
	chip := [64]byte{0: 0xab, 7: 0xcd, 8: 0xef, 63: 1}
	tcb := kds.TCBParts{BlSpl: 4, TeeSpl: 1, SnpSpl: 24, UcodeSpl: 219}
	version, err := kds.ComposeTCBParts(tcb)
	if err != nil {
		t.Fatal(err)
	}
	chain := trust.AskArkMilanVcekBytes
	for _, c := range []struct {
		name  string
		want  collateral.Request
		path  string // of the VCEK, with its query
		certs int
	}{
		{"Milan", collateral.Request{Product: "Milan", ChipID: chip, TCB: uint64(version)}, strings.TrimPrefix(kds.VCEKCertURL("Milan", chip[:], version), fetch.AMDKDS), 3},
		{"Genoa", collateral.Request{Product: "Genoa", ChipID: chip, TCB: uint64(version)}, strings.TrimPrefix(kds.VCEKCertURL("Genoa", chip[:], version), fetch.AMDKDS), 3},
		// go-sev-guest v0.15 has no layout of Turin; this is AMD 57230 revision 1.00.
		{"Turin", collateral.Request{Product: "Turin", ChipID: chip, TCB: 0xdb000000_18010402 + 1}, "/vcek/v1/Turin/ab000000000000cd?fmcSPL=3&blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219", 3},
		{"a chip that hides its id", collateral.Request{Product: "Milan"}, "", 2},
		{"a VLEK", collateral.Request{Product: "Milan", VLEK: true, ChipID: chip}, "", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := "/vcek/v1/" + c.want.Product
			signer := sevabi.VcekReportSigner
			if c.want.VLEK {
				root, signer = "/vlek/v1/"+c.want.Product, sevabi.VlekReportSigner
			}
			path, _, _ := strings.Cut(c.path, "?")
			s := newService(t, map[string]http.HandlerFunc{
				strings.TrimPrefix(kds.ProductCertChainURL(signer, c.want.Product), fetch.AMDKDS): send(chain),
				strings.TrimPrefix(kds.CrlLinkByKey(c.want.Product, signer), fetch.AMDKDS):        send(crl),
				path: send(vcek),
			})
			k := newKDS(t, s.URL)
			b, err := k.Collateral(t.Context(), c.want)
			if err != nil {
				t.Fatal(err)
			}
			if len(b.Certificates) != c.certs || string(b.Certificates[0]) != string(ask) || c.certs == 3 && string(b.Certificates[2]) != string(vcek) {
				t.Errorf("%d certificates, want %d, ASK first, VCEK last", len(b.Certificates), c.certs)
			}
			if len(b.CRLs) != 1 || string(b.CRLs[0]) != string(crl) {
				t.Error("the revocation list is missing")
			}
			if c.path != "" && s.count(c.path) != 1 {
				t.Errorf("asked %q, want %q", s.asked, c.path)
			}
			// The product's part is kept while its list lasts; the chip's is asked again.
			if _, err := k.Collateral(t.Context(), c.want); err != nil {
				t.Fatal(err)
			}
			if s.count(root+"/cert_chain") != 1 || s.count(root+"/crl") != 1 || c.path != "" && s.count(c.path) != 2 {
				t.Errorf("asked %q", s.asked)
			}
		})
	}
}

func TestThreat_B02_KDSKeepsNoListPastItsNextUpdate(t *testing.T) {
	s := newService(t, map[string]http.HandlerFunc{
		"/vcek/v1/Milan/cert_chain": send(trust.AskArkMilanVcekBytes),
		"/vcek/v1/Milan/crl":        send(revocationList(t, time.Now().Add(-time.Minute))),
	})
	k := newKDS(t, s.URL)
	for range 2 {
		if _, err := k.Collateral(t.Context(), collateral.Request{Product: "Milan"}); err != nil {
			t.Fatal(err)
		}
	}
	if s.count("/vcek/v1/Milan/crl") != 2 {
		t.Error("an expired list was kept")
	}
}

func TestKDSAnswersAreRefusedForTheirOwnReason(t *testing.T) {
	good := func() map[string]http.HandlerFunc {
		return map[string]http.HandlerFunc{
			"/vcek/v1/Milan/cert_chain":                    send(trust.AskArkMilanVcekBytes),
			"/vcek/v1/Milan/crl":                           send(revocationList(t, time.Now().Add(time.Hour))),
			"/vcek/v1/Milan/01" + strings.Repeat("00", 63): send(vector(t, "sev_snp_vcek.pem")),
		}
	}
	want := collateral.Request{Product: "Milan", ChipID: [64]byte{1}}
	if _, err := newKDS(t, newService(t, good()).URL).Collateral(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	vcek := "/vcek/v1/Milan/01" + strings.Repeat("00", 63)
	for _, c := range []struct {
		name, path string
		serve      http.HandlerFunc
		code       string
	}{
		{"an unknown chip", vcek, nil, "collateral_not_found"},
		{"a limit", vcek, sendStatus(429, "Retry-After", "3600"), "collateral_rate_limited"},
		{"two VCEKs", vcek, send(trust.AskArkMilanVcekBytes), "collateral_response"},
		{"no VCEK", vcek, send(nil), "collateral_response"},
		{"a VCEK beyond the limit", vcek, send(make([]byte, collateral.MaxCert+1)), "collateral_too_large"},
		{"a chain that is a page", "/vcek/v1/Milan/cert_chain", send([]byte("<html>")), "collateral_response"},
		{"no list", "/vcek/v1/Milan/crl", nil, "collateral_not_found"},
		{"a list that is a certificate", "/vcek/v1/Milan/crl", send(vector(t, "sev_snp_ask.pem")), "collateral_response"},
	} {
		mux := good()
		mux[c.path] = c.serve
		if _, err := newKDS(t, newService(t, mux).URL).Collateral(t.Context(), want); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", c.name, err, c.code)
		}
	}
}

func TestVendorsAsksTheServiceOfTheTEE(t *testing.T) {
	s := newService(t, pccs(realSet(t, "v4")))
	p := newPCS(t, fetch.PCSOptions{Base: s.URL})
	b, err := fetch.Vendors{PCS: p}.Collateral(t.Context(), wantTDX)
	if err != nil || !b.HasTDX() {
		t.Errorf("TDX: %v", err)
	}
	for _, want := range []collateral.Request{{Product: "Milan"}, wantTDX} {
		if _, err := (fetch.Vendors{}).Collateral(t.Context(), want); fault.Code(err) != "collateral_source" {
			t.Errorf("without a service: %v", err)
		}
	}
}

// roundTripper answers without a network.
type roundTripper func(*http.Request) *http.Response

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r), nil }

// Whatever a service answers, the sources return a bundle within the limits or an
// error with a code.
func FuzzAnswers(f *testing.F) {
	set := realSet(f, "v4")
	for path, serve := range pccs(set) {
		w := httptest.NewRecorder()
		serve(w, httptest.NewRequest("GET", path, nil))
		for _, header := range []string{"TCB-Info-Issuer-Chain", "SGX-Enclave-Identity-Issuer-Chain", "SGX-PCK-CRL-Issuer-Chain"} {
			if v := w.Header().Get(header); v != "" || path == rootPath {
				f.Add(path, v, w.Body.Bytes())
				f.Add(strings.Replace(path, "/tdx/", "/sgx/", 1), v, w.Body.Bytes())
			}
		}
	}
	f.Add("/vcek/v1/Milan/cert_chain", "", trust.AskArkMilanVcekBytes)
	f.Add("/vcek/v1/Milan/crl", "", []byte(set.PCKCRL))
	f.Fuzz(func(t *testing.T, path, header string, body []byte) {
		answers := pccs(set)
		answers[sgxTCBPath], answers[sgxQEPath] = answers[tcbPath], answers[qePath]
		answers["/vcek/v1/Milan/cert_chain"] = send(trust.AskArkMilanVcekBytes)
		answers["/vcek/v1/Milan/crl"] = send(set.PCKCRL)
		h := fetch.HTTP{Attempts: 1, RoundTripper: roundTripper(func(r *http.Request) *http.Response {
			w := httptest.NewRecorder()
			if serve := answers[r.URL.Path]; r.URL.Path != path && serve != nil {
				serve(w, r)
			} else {
				send(body, "TCB-Info-Issuer-Chain", header, "SGX-Enclave-Identity-Issuer-Chain", header, "SGX-PCK-CRL-Issuer-Chain", header)(w, r)
			}
			return w.Result()
		})}
		k, err := fetch.NewKDS(fetch.KDSOptions{HTTP: h})
		if err != nil {
			t.Fatal(err)
		}
		all := fetch.Vendors{PCS: newPCS(t, fetch.PCSOptions{HTTP: h}), KDS: k}
		for _, want := range []collateral.Request{wantTDX, wantEnclave, {Product: "Milan"}} {
			b, err := all.Collateral(t.Context(), want)
			if err != nil && fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			if err == nil && b.Check() != nil {
				t.Fatalf("a bundle beyond its limits: %v", b.Check())
			}
		}
	})
}
