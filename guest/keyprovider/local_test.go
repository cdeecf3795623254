// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/nacl/box"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
)

func TestUpstreamsSealedBoxesOpen(t *testing.T) {
	var doc struct {
		Vectors []struct {
			Public  string `json:"public_key"`
			Secret  string `json:"secret_key"`
			Message string `json:"message"`
			Sealed  string `json:"sealed_box"`
		} `json:"vectors"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/sealed-box.json"), &doc); err != nil || len(doc.Vectors) == 0 {
		t.Fatal(err)
	}
	for _, v := range doc.Vectors {
		unhex := func(s string) []byte { b, _ := hex.DecodeString(s); return b }
		public, secret := [32]byte(unhex(v.Public)), [32]byte(unhex(v.Secret))
		got, ok := box.OpenAnonymous(nil, unhex(v.Sealed), &public, &secret)
		if !ok || hex.EncodeToString(got) != v.Message {
			t.Errorf("%s: %x, %t", v.Sealed, got, ok)
		}
	}
}

// providerServer speaks the protocol of the local key provider on a loopback port,
// with quotes of a simulated machine.
type providerServer struct {
	t        *testing.T
	platform *tdxtest.Platform
	enclave  [32]byte
	sealing  []byte
	addr     string
	report   func([]byte)            // changes the enclave's report
	answer   func([]byte) []byte     // changes the sealed key after the quote
	seed     func([]byte) []byte     // changes the seed
	to       func([32]byte) [32]byte // changes the recipient
}

func newProviderServer(t *testing.T) *providerServer {
	s := &providerServer{t: t, platform: tdxtest.New(t), enclave: [32]byte(bytes.Repeat([]byte{0x4d}, 32)), sealing: []byte("sealing key")}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				if err := s.serve(c); err != nil {
					t.Error(err)
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return s
}

func numbers(b []byte) []int {
	out := make([]int, len(b))
	for i, v := range b {
		out[i] = int(v)
	}
	return out
}

func bytesOf(n []int) []byte {
	out := make([]byte, len(n))
	for i, v := range n {
		out[i] = byte(v)
	}
	return out
}

func readFrame(r io.Reader, v any) error {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return err
	}
	body := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	return json.Unmarshal(body, v)
}

func writeFrame(w io.Writer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

func (s *providerServer) serve(c net.Conn) error {
	var req struct {
		Quote []int `json:"quote"`
	}
	if err := readFrame(c, &req); err != nil {
		return err
	}
	q, err := tdx.ParseQuote(bytesOf(req.Quote))
	if err != nil {
		return err
	}
	b := q.Body()
	h := sha256.New()
	h.Write(s.sealing)
	h.Write(b.MRTD[:])
	for _, r := range b.RTMR {
		h.Write(r[:])
	}
	seed := h.Sum(nil)
	if s.seed != nil {
		seed = s.seed(seed)
	}
	to := [32]byte(b.ReportData[:32])
	if s.to != nil {
		to = s.to(to)
	}
	sealed, err := box.SealAnonymous(nil, seed, &to, rand.Reader)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(sealed)
	var data dstack.ReportData
	copy(data[:], sum[:])
	report := tdxtest.EnclaveReport(s.enclave, data)
	if s.report != nil {
		s.report(report)
	}
	quote := s.platform.EnclaveQuote(report)
	if s.answer != nil {
		sealed = s.answer(sealed)
	}
	return writeFrame(c, map[string]any{"encrypted_key": numbers(sealed), "provider_quote": numbers(quote)})
}

// local is a guest whose host carries its messages to the server.
func (s *providerServer) local(pin []byte) *Local {
	td := tdxtest.New(s.t)
	return &Local{
		Pin: pin, Roots: []attest.Roots{s.platform.Roots()},
		Now: func() time.Time { return tdxtest.Issued.Add(time.Hour) },
		Quote: func(_ context.Context, data dstack.ReportData) ([]byte, error) {
			body := td.Body()
			body.ReportData = data
			return td.Quote(body), nil
		},
		SealingKey: func(_ context.Context, quote []byte) ([]byte, []byte, error) {
			c, err := net.Dial("tcp", s.addr)
			if err != nil {
				return nil, nil, err
			}
			defer c.Close()
			if err := writeFrame(c, map[string]any{"quote": numbers(quote)}); err != nil {
				return nil, nil, err
			}
			var r struct {
				Key   []int `json:"encrypted_key"`
				Quote []int `json:"provider_quote"`
			}
			err = readFrame(c, &r)
			return bytesOf(r.Key), bytesOf(r.Quote), err
		},
		Collateral: func(_ context.Context, want collateral.Request) (*collateral.Bundle, error) {
			if want.FMSPC != "90c06f000000" {
				return nil, errors.New("of another platform")
			}
			return &collateral.Bundle{TDX: s.platform.EnclaveCollateral()}, nil
		},
	}
}

func TestASeedOfTheLocalProvider(t *testing.T) {
	s := newProviderServer(t)
	var all []*Grant
	for _, pin := range [][]byte{s.enclave[:], nil} {
		g, err := s.local(pin).Keys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if p := g.Keys.Provider; p.Kind != keys.Local || !bytes.Equal(p.MR, s.enclave[:]) || g.Unpinned != (pin == nil) {
			t.Errorf("%+v", g)
		}
		all = append(all, g)
	}
	if !bytes.Equal(all[0].Keys.Disk.Bytes(), all[1].Keys.Disk.Bytes()) {
		t.Error("the same guest on the same machine got another seed")
	}
	event, err := all[0].Keys.Provider.Event()
	if err != nil || string(event) != `{"name":"local-sgx","id":"`+hex.EncodeToString(s.enclave[:])+`"}` {
		t.Errorf("%s, %v", event, err)
	}
}

func TestAnswersOfTheLocalProviderThatAreRefused(t *testing.T) {
	for _, c := range []struct {
		name, code string
		server     func(*providerServer)
		guest      func(*Local)
	}{
		{"another enclave", "provider_pin", func(s *providerServer) { s.enclave[0] ^= 1 }, nil},
		{"a pin of another length", "provider_pin", nil, func(l *Local) { l.Pin = l.Pin[:31] }},
		{"a debug enclave", "enclave_debug", func(s *providerServer) { s.report = func(r []byte) { r[tdx.QEOffAttributes] |= 2 } }, nil},
		{"another key put in", "provider_binding", func(s *providerServer) {
			s.answer = func(b []byte) []byte { b[40] ^= 1; return b }
		}, nil},
		{"a quote with more in its report data", "provider_binding", func(s *providerServer) {
			s.report = func(r []byte) { r[tdx.QEOffReportData+63] = 1 }
		}, nil},
		{"sealed to another", "provider_sealed", func(s *providerServer) {
			s.to = func(k [32]byte) [32]byte { k[0] ^= 1; return k }
		}, nil},
		{"a long seed", "provider_sealed", func(s *providerServer) { s.seed = func(b []byte) []byte { return append(b, 0) } }, nil},
		{"a short seed", "provider_sealed", func(s *providerServer) { s.seed = func(b []byte) []byte { return b[:31] } }, nil},
		{"a seed of zeros", "provider_sealed", func(s *providerServer) { s.seed = func([]byte) []byte { return make([]byte, 32) } }, nil},
		{"old firmware", "provider_tcb", func(s *providerServer) {
			e := tdxtest.Extension()
			e.Components[0] = 2
			s.platform.PCK = s.platform.IssuePCK(s.platform.PCKCA, e, nil)
		}, nil},
		{"roots of others", "unknown_root", nil, func(l *Local) { l.Roots = []attest.Roots{tdxtest.New(t).Roots()} }},
		{"no answer", "provider_unavailable", nil, func(l *Local) {
			l.SealingKey = func(context.Context, []byte) ([]byte, []byte, error) { return nil, nil, errors.New("refused") }
		}},
		{"a host that says no", "provider_unavailable", nil, func(l *Local) {
			l.SealingKey = func(context.Context, []byte) ([]byte, []byte, error) {
				return nil, nil, fault.New("key_provider_unpinned", "no \x1b[2J provider")
			}
		}},
		{"no collateral", "collateral_not_found", nil, func(l *Local) {
			l.Collateral = func(context.Context, collateral.Request) (*collateral.Bundle, error) {
				return nil, fault.New("collateral_not_found", "no such machine")
			}
		}},
		{"no quote", "quote_malformed", nil, func(l *Local) {
			l.SealingKey = func(context.Context, []byte) ([]byte, []byte, error) { return nil, nil, nil }
		}},
		{"no host", "provider_unavailable", nil, func(l *Local) { l.SealingKey = nil }},
	} {
		s := newProviderServer(t)
		l := s.local(bytes.Clone(s.enclave[:]))
		if c.server != nil {
			c.server(s)
		}
		if c.guest != nil {
			c.guest(l)
		}
		_, err := l.Keys(t.Context())
		t.Run(c.name, func(t *testing.T) {
			wantCode(t, err, c.code)
			if err != nil && strings.Contains(err.Error(), "\x1b") {
				t.Errorf("the host writes to the console: %q", err)
			}
		})
	}
}

// A02: keys of quoting enclaves leak. What a leaked or made-up one signs is refused as
// far as the vendor's statements tell: by who signed the enclave and its report, and
// once the vendor has revoked the machine's certificate or the enclave's level.
func TestThreat_A02_ProviderWithADeniedOrForgedQuotingEnclave(t *testing.T) {
	for _, c := range []struct {
		name, code string
		change     func(*tdxtest.Platform)
	}{
		{"an enclave of another signer", "qe_mrsigner", func(p *tdxtest.Platform) { p.QEReport[tdx.QEOffMRSigner] ^= 1 }},
		{"another enclave of the same signer", "qe_isvprodid", func(p *tdxtest.Platform) { p.QEReport[tdx.QEOffISVProdID] ^= 1 }},
		{"an enclave that can be debugged", "qe_debug", func(p *tdxtest.Platform) { p.QEReport[tdx.QEOffAttributes] |= 2 }},
		{"a key of one's own", "qe_report_data", func(p *tdxtest.Platform) { p.KeepReportData = true }},
		{"a report signed by another machine", "qe_report_signature", func(p *tdxtest.Platform) {
			p.PCK.Key = p.IssuePCK(p.PCKCA, tdxtest.Extension(), nil).Key
		}},
		{"a level that is revoked", "tcb_revoked", func(p *tdxtest.Platform) {
			p.QEIdentity["tcbLevels"] = []any{tdxtest.Level(1, tdx.Revoked)}
		}},
		{"a machine that is revoked", "pck_revoked", func(p *tdxtest.Platform) {
			p.PCKCRL.Revoked = append(p.PCKCRL.Revoked, p.PCK.Cert.SerialNumber)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newProviderServer(t)
			c.change(s.platform)
			_, err := s.local(bytes.Clone(s.enclave[:])).Keys(t.Context())
			wantCode(t, err, c.code)
		})
	}
}
