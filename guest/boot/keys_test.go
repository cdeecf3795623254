// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/guest/keyprovider"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// fakeTEE quotes for a simulated TDX platform.
type fakeTEE struct{ platform *tdxtest.Platform }

func (fakeTEE) Kind() dstack.TEE { return dstack.TDX }

func (f fakeTEE) Quote(_ context.Context, data dstack.ReportData) ([]byte, error) {
	body := f.platform.Body()
	body.ReportData = data
	return f.platform.Quote(body), nil
}

// fakeLink carries streams of one name to a listener.
type fakeLink struct{ stream, addr string }

func (l fakeLink) Open(ctx context.Context, stream string) (net.Conn, error) {
	if stream != l.stream {
		return nil, errors.New("no stream " + stream)
	}
	return new(net.Dialer).DialContext(ctx, "tcp", l.addr)
}

func (fakeLink) Listen(string) (net.Listener, error) { return nil, errors.New("not here") }

// localHost is a host with a key provider on a simulated platform, and a PCCS that
// has its collateral.
type localHost struct {
	platform *tdxtest.Platform
	pccs     string
	link     fakeLink

	mu     sync.Mutex
	quotes int      // that the host was asked to pass on
	paths  []string // that the PCCS was asked for
}

func newLocalHost(t *testing.T) *localHost {
	h := &localHost{platform: tdxtest.New(t)}
	set := h.platform.EnclaveCollateral()
	answers := map[string]struct{ header, chain, body string }{
		"/sgx/certification/v4/tcb":         {"TCB-Info-Issuer-Chain", set.TCBInfoIssuerChain, fmt.Sprintf(`{"tcbInfo":%s,"signature":"%x"}`, set.TCBInfo, set.TCBInfoSignature)},
		"/sgx/certification/v4/qe/identity": {"SGX-Enclave-Identity-Issuer-Chain", set.QEIdentityIssuerChain, fmt.Sprintf(`{"enclaveIdentity":%s,"signature":"%x"}`, set.QEIdentity, set.QEIdentitySignature)},
		"/sgx/certification/v4/pckcrl":      {"SGX-PCK-CRL-Issuer-Chain", set.PCKCRLIssuerChain, string(set.PCKCRL)},
		"/sgx/certification/v4/rootcacrl":   {"", "", string(set.RootCACRL)},
	}
	pccs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.paths = append(h.paths, r.URL.Path)
		h.mu.Unlock()
		a, ok := answers[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		if a.header != "" {
			w.Header().Set(a.header, url.PathEscape(a.chain))
		}
		w.Write([]byte(a.body))
	}))
	t.Cleanup(pccs.Close)
	h.pccs = pccs.URL
	api := httptest.NewServer(http.StripPrefix("/api", prpc.NewMux([]string{"HostApi."},
		prpc.Unary("GetSealingKey", func(_ context.Context, in *hostapi.GetSealingKeyRequest) (*hostapi.GetSealingKeyResponse, error) {
			h.mu.Lock()
			h.quotes++
			h.mu.Unlock()
			if _, err := tdx.ParseQuote(in.Quote); err != nil {
				return nil, err
			}
			report := tdxtest.EnclaveReport([32]byte(bytes.Repeat([]byte{0x4d}, 32)), dstack.ReportData{})
			return &hostapi.GetSealingKeyResponse{EncryptedKey: []byte("sealed"), ProviderQuote: h.platform.EnclaveQuote(report)}, nil
		}))))
	t.Cleanup(api.Close)
	h.link = fakeLink{"hostapi", api.Listener.Addr().String()}
	return h
}

func (h *localHost) machine(t *testing.T, d manifest.Draft) *Machine {
	return &Machine{
		manifest: parsed(t, d), sysConfig: &hostshare.SysConfig{PCCSURL: h.pccs}, instance: &hostshare.InstanceInfo{},
		tee: fakeTEE{tdxtest.New(t)}, link: h.link,
	}
}

// The provider `local` is asked by way of the host and judged by the vendor alone: a
// simulated one is refused, in whatever image.
func TestTheLocalProviderIsJudgedByTheVendor(t *testing.T) {
	h := newLocalHost(t)
	pin := bytes.Repeat([]byte{0x4d}, 32)
	p, network, err := h.machine(t, manifest.Draft{KeyProvider: "local", KeyProviderID: pin}).provider()
	if err != nil || !network {
		t.Fatalf("%t, %v", network, err)
	}
	local, ok := p.(*keyprovider.Local)
	if !ok || !bytes.Equal(local.Pin, pin) || local.Attester == nil {
		t.Fatalf("%+v", p)
	}
	for _, r := range local.Roots {
		if r.Trust != dstack.TrustProduction {
			t.Errorf("a root of trust %s", r.Trust)
		}
	}
	local.Now = func() time.Time { return tdxtest.Issued.Add(time.Hour) }
	if _, err := local.Keys(t.Context()); fault.Code(err) != "unknown_root" {
		t.Errorf("a simulated provider: %v (code %q)", err, fault.Code(err))
	}
	if h.quotes != 1 || len(h.paths) != 4 || strings.Contains(strings.Join(h.paths, " "), "/tdx/") {
		t.Errorf("%d quotes, collateral of %q", h.quotes, h.paths)
	}
	// With a root that vouches for the platform it is the answer's turn.
	local.Roots = []attest.Roots{h.platform.Roots()}
	if _, err := local.Keys(t.Context()); fault.Code(err) != "provider_binding" {
		t.Errorf("an answer that the quote does not speak of: %v (code %q)", err, fault.Code(err))
	}
}

func TestTheLocalProviderIsRefusedForItsOwnReason(t *testing.T) {
	for _, c := range []struct {
		name, code string
		edit       func(*Machine)
	}{
		{"a PCCS by HTTP", "collateral_url", func(m *Machine) { m.sysConfig.PCCSURL = "http://10.0.2.2:8081" }},
		{"no hostlink", "provider_unavailable", func(m *Machine) { m.link = nil }},
		{"a host without the stream", "provider_unavailable", func(m *Machine) { m.link = fakeLink{"other", ""} }},
		{"a PCCS that has no such machine", "collateral_not_found", func(m *Machine) {
			s := httptest.NewServer(http.NotFoundHandler())
			t.Cleanup(s.Close)
			m.sysConfig.PCCSURL = s.URL
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newLocalHost(t).machine(t, manifest.Draft{KeyProvider: "local"})
			c.edit(m)
			p, _, err := m.provider()
			if err == nil {
				_, err = p.Keys(t.Context())
			}
			if fault.Code(err) != c.code {
				t.Errorf("%v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

func TestWhichProvidersTakeTheNetwork(t *testing.T) {
	h := newLocalHost(t)
	for kind, want := range map[string]bool{"none": false, "tpm": false, "kms": true, "local": true} {
		if _, network, err := h.machine(t, manifest.Draft{KeyProvider: kind}).provider(); err != nil || network != want {
			t.Errorf("%s: %t, %v", kind, network, err)
		}
	}
}
