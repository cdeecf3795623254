// SPDX-License-Identifier: Apache-2.0

package gwclient

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
)

func answer() *api.RegisterCvmResponse {
	return &api.RegisterCvmResponse{
		Wg: &api.WireGuardConfig{ClientIp: "100.96.0.9", Servers: []*api.WireGuardPeer{{
			Pk: base64.StdEncoding.EncodeToString(append(make([]byte, 31), 9)), Ip: "100.96.0.1/11", Endpoint: "192.0.2.1:51820",
		}}},
		Agent:      &api.GuestAgentConfig{Domain: "Apps.Example"},
		LeaseUntil: uint64(time.Now().Add(time.Hour).Unix()),
	}
}

func TestAnswersOfGateways(t *testing.T) {
	r, err := parse(t.Context(), answer())
	if err != nil || r.domain != "apps.example" || r.peer.Address.String() != "100.96.0.1" || r.address.String() != "100.96.0.9" {
		t.Fatalf("%+v, %v", r, err)
	}
	upstreams := answer()
	upstreams.LeaseUntil = 0
	if r, err := parse(t.Context(), upstreams); err != nil || time.Until(r.until) > 15*time.Minute {
		t.Errorf("upstream's: %+v, %v", r, err)
	}
	many := make([]*api.WireGuardPeer, 65)
	for name, c := range map[string]struct {
		edit func(*api.RegisterCvmResponse)
		code string
	}{
		"nothing":      {func(r *api.RegisterCvmResponse) { r.Wg = nil }, "gateway_reply"},
		"no server":    {func(r *api.RegisterCvmResponse) { r.Wg.Servers = nil }, "gateway_reply"},
		"many servers": {func(r *api.RegisterCvmResponse) { r.Wg.Servers = append(r.Wg.Servers, many...) }, "gateway_reply"},
		"no agent":     {func(r *api.RegisterCvmResponse) { r.Agent = nil }, "gateway_reply"},
		"a short key": {func(r *api.RegisterCvmResponse) {
			r.Wg.Servers[0].Pk = base64.StdEncoding.EncodeToString(make([]byte, 31))
		}, "gateway_reply"},
		"a key with a line":     {func(r *api.RegisterCvmResponse) { r.Wg.Servers[0].Pk += "\nPostUp = sh" }, "gateway_reply"},
		"loopback for a client": {func(r *api.RegisterCvmResponse) { r.Wg.ClientIp = "127.0.0.1" }, "tunnel_malformed"},
		"IPv6 for a client":     {func(r *api.RegisterCvmResponse) { r.Wg.ClientIp = "2001:db8::1" }, "tunnel_malformed"},
		"the client's address":  {func(r *api.RegisterCvmResponse) { r.Wg.Servers[0].Ip = "100.96.0.9" }, "tunnel_malformed"},
		"no address":            {func(r *api.RegisterCvmResponse) { r.Wg.Servers[0].Ip = "any" }, "gateway_reply"},
		"no endpoint":           {func(r *api.RegisterCvmResponse) { r.Wg.Servers[0].Endpoint = "192.0.2.1" }, "gateway_reply"},
		"nobody's endpoint":     {func(r *api.RegisterCvmResponse) { r.Wg.Servers[0].Endpoint = "0.0.0.0:1" }, "tunnel_malformed"},
		"a domain of spaces":    {func(r *api.RegisterCvmResponse) { r.Agent.Domain = "a b" }, "gateway_reply"},
		"a domain with a line":  {func(r *api.RegisterCvmResponse) { r.Agent.Domain = "a.example\nb" }, "gateway_reply"},
		"a long domain":         {func(r *api.RegisterCvmResponse) { r.Agent.Domain = strings.Repeat("a", 201) }, "gateway_reply"},
		"a lease that ended":    {func(r *api.RegisterCvmResponse) { r.LeaseUntil = 1 }, "gateway_reply"},
		"a lease for ever":      {func(r *api.RegisterCvmResponse) { r.LeaseUntil = 1 << 62 }, "gateway_reply"},
	} {
		r := answer()
		c.edit(r)
		if _, err := parse(t.Context(), r); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
}

func FuzzParse(f *testing.F) {
	good, _ := proto.Marshal(answer())
	f.Add(good)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r api.RegisterCvmResponse
		if proto.Unmarshal(b, &r) != nil {
			return
		}
		for _, s := range r.GetWg().GetServers() {
			if _, err := netip.ParseAddrPort(s.GetEndpoint()); err != nil {
				s.Endpoint = "192.0.2.1:1" // no lookups
			}
		}
		out, err := parse(t.Context(), &r)
		if err != nil {
			return
		}
		c := initrpc.TunnelChange{Set: true, Addresses: []netip.Addr{out.address}, Peers: []initrpc.TunnelPeer{out.peer}}
		if err := c.Check(); err != nil {
			t.Error(err)
		}
	})
}

func TestCertificatesOfGateways(t *testing.T) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := channel.KeyOf(signer)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{Key: key, Signer: signer, App: dstack.AppID{1}, Instance: dstack.InstanceID{2}, Ports: []uint16{80, 8080}})
	if err != nil {
		t.Fatal(err)
	}
	names := c.names("apps.example")
	if len(names) != 6 || names[dstack.AppID{1}.String()+".apps.example"] != 80 || names[dstack.InstanceID{2}.String()+"-8080.apps.example"] != 8080 {
		t.Fatalf("%v", names)
	}
	var list []string
	for n := range names {
		list = append(list, n)
	}
	make := func(signer *ecdsa.PrivateKey, until time.Time, names ...string) string {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotAfter: until}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, signer.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	soon := time.Now().Add(time.Hour)
	s, err := c.take(&api.GetCertificateResponse{Chain: make(signer, soon, list...)}, names)
	if err != nil {
		t.Fatal(err)
	}
	here, there := netip.MustParseAddr("100.96.0.1"), netip.MustParseAddr("100.96.0.2")
	c.gateways["g"] = &gateway{now: &registered{peer: initrpc.TunnelPeer{Address: here}}, certs: map[string]*due{"": {have: s}}}
	if _, port, err := c.Certificate(dstack.AppID{1}.String()+"-8080.APPS.example.", here); err != nil || port != 8080 {
		t.Errorf("%d, %v", port, err)
	}
	for _, host := range []string{"", "apps.example", dstack.AppID{3}.String() + ".apps.example", dstack.AppID{1}.String() + ".other.example"} {
		if _, _, err := c.Certificate(host, here); fault.Code(err) != "gateway_name" {
			t.Errorf("%q: %v", host, err)
		}
	}
	if _, _, err := c.Certificate(dstack.AppID{1}.String()+".apps.example", there); fault.Code(err) != "gateway_name" {
		t.Errorf("another gateway's: %v", err)
	}
	for name, chain := range map[string]string{
		"none": "", "garbage": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"another key": make(other, soon, list...), "a name too few": make(signer, soon, list[1:]...), "ended": make(signer, time.Now().Add(-time.Minute), list...),
	} {
		if _, err := c.take(&api.GetCertificateResponse{Chain: chain}, names); fault.Code(err) != "gateway_certificate" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestGatewaysAreFew(t *testing.T) {
	c, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		if err := c.add(fmt.Sprintf("https://gateway%d.example:8000", i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(c.gateways) != initrpc.MaxPeers {
		t.Errorf("%d gateways", len(c.gateways))
	}
	for _, u := range []string{"http://x.example", "https://", "https://u:p@x.example", "https://x.example/?q", "://"} {
		if err := c.add(u); fault.Code(err) != "gateway_url" {
			t.Errorf("%s: %v", u, err)
		}
	}
}
