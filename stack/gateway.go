// SPDX-License-Identifier: Apache-2.0

package stack

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack"
	agentapi "github.com/dstack-go/dstack/api/agent"
	gatewayapi "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// GatewayDomain is the base domain of a stack's gateway. Names under localhost are this
// machine's loopback (RFC 6761 §6.3).
const GatewayDomain = "dstack.localhost"

// Gateway is the stack's gateway: a process of this machine, under development trust.
type Gateway struct {
	Domain   string       `json:"domain"`
	Port     int          `json:"port"`      // of public HTTPS
	RPC      int          `json:"rpc"`       // where guests register
	WG       int          `json:"wireguard"` // UDP
	GuestURL string       `json:"guest_url"`
	AppID    dstack.AppID `json:"app_id"`
	CA       string       `json:"ca"` // file of the private CA that certifies its names
	// Policy is what apps measure of the gateway: only such a one gets their traffic.
	Policy *manifest.PeerPolicy `json:"policy"`
}

// URL is where a port of an app is reached.
func (g *Gateway) URL(app dstack.AppID, port int) string {
	label := app.String()
	if port != 80 {
		label = fmt.Sprintf("%s-%d", label, port)
	}
	return fmt.Sprintf("https://%s.%s:%d", label, g.Domain, g.Port)
}

func (s *Stack) gatewayFile() string       { return filepath.Join(s.Dir, "gateway.json") }
func (s *Stack) gatewayDir() string        { return filepath.Join(s.Dir, "gateway") }
func (s *Stack) gatewayPIDFile() string    { return filepath.Join(s.Dir, "gateway.pid") }
func (s *Stack) gatewayIDPIDFile() string  { return filepath.Join(s.Dir, "gateway-identity.pid") }
func (s *Stack) gatewayConfigFile() string { return filepath.Join(s.Dir, "gateway.toml") }
func (s *Stack) GatewayLogFile() string    { return filepath.Join(s.Dir, "gateway.log") }

// GatewayAdmin is the socket of the gateway's administrators.
func (s *Stack) GatewayAdmin() string { return filepath.Join(s.gatewayDir(), "admin.sock") }

// Gateway returns the stack's gateway. Code gateway_absent.
func (s *Stack) Gateway() (*Gateway, error) {
	text, err := os.ReadFile(s.gatewayFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("gateway_absent", "this stack has no gateway").WithFix("run `dstack up` without --no-gateway")
	}
	if err != nil {
		return nil, err
	}
	g := new(Gateway)
	if err := json.Unmarshal(text, g); err != nil {
		return nil, fmt.Errorf("%s: %w", s.gatewayFile(), err)
	}
	return g, nil
}

// serving returns nil when the gateway answers guests.
func (g *Gateway) serving(ctx context.Context) error {
	roots := x509.NewCertPool()
	text, err := os.ReadFile(g.CA)
	if err != nil {
		return err
	}
	roots.AppendCertsFromPEM(text)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "gateway." + g.Domain, MinVersion: tls.VersionTLS13}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c := prpc.Client{BaseURL: fmt.Sprintf("https://127.0.0.1:%d/prpc", g.RPC), HTTP: &http.Client{Transport: transport}}
	return c.Call(ctx, "Info", nil, new(gatewayapi.InfoResponse))
}

// gatewayApp is the gateway as an app: what its simulated TEE measures.
const gatewayApp = `{"manifest_version":2,"name":"dstack-gateway","runner":"docker-compose","docker_compose_file":"services: {}\n","key_provider":"none","public_tcbinfo":true,"image_policy":"digest","image_lock":{}}
`

// StartGateway starts a gateway as a process of this machine, and another that is the
// simulated TEE of it, and waits for both. It routes to apps that the stack's KMS
// authorised, or, without a KMS, to every attested one.
func (s *Stack) StartGateway(ctx context.Context, step func(string, ...any)) (*Gateway, error) {
	auth, root := "attested", ""
	if k, err := s.Keys(); err == nil {
		auth, root = "lease", k.RootCA
	} else if fault.Code(err) != "kms_absent" {
		return nil, err
	}
	g, err := s.Gateway()
	if err == nil && g.serving(ctx) == nil {
		step("the gateway is running already")
		return g, nil
	}
	if fault.Code(err) == "gateway_absent" {
		g, err = s.newGateway()
	}
	if err != nil {
		return nil, err
	}
	// One half may be left of a gateway that ended.
	if err := s.StopGateway(5 * time.Second); err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(s.gatewayDir(), 0o700); err != nil {
		return nil, err
	}
	app := filepath.Join(s.gatewayDir(), "app-compose.json")
	if err := durable.WriteFile(app, []byte(gatewayApp), 0o600); err != nil {
		return nil, err
	}
	socket := filepath.Join(s.gatewayDir(), "dstack.sock")
	step("start the gateway (a process of this machine: development trust)")
	id, err := s.spawn("dstack", s.GatewayLogFile(), s.gatewayIDPIDFile(), "--state", s.Dir, "simulator", "--compose", app, "--keep", s.gatewayDir(), "--pki", s.PKIDir())
	if err != nil {
		return nil, err
	}
	if err := s.gatewayIdentity(ctx, g, socket, id.Exited); err != nil {
		return nil, fault.Wrap(err, "gateway_start", "the gateway's simulated TEE does not answer:\n%s", id.Tail()).WithFix("see %s", s.GatewayLogFile())
	}
	text := fmt.Sprintf(`# Written by dstack up. This gateway is a process of this machine: development trust.
address = "127.0.0.1"
port = %d

[core]
data_dir = %q
my_url = %q
domains = "%s:%d"

[core.wg]
listen = "127.0.0.1:%d"
endpoint = "%s:%d"
mode = "netstack"

[core.proxy]
listen_addr = "127.0.0.1"
listen_port = %d

[core.guest]
socket = %q

[core.attestation]
dev_roots = %q

[core.auth]
type = %q
kms_root = %q

# Of this user alone, by the socket's mode: dstack gateway.
[core.admin]
enabled = true
address = %q
insecure_no_auth = true
`, g.RPC, s.gatewayDir(), g.GuestURL, g.Domain, g.Port, g.WG, GuestHost, g.WG, g.Port, socket, s.DevRoots(), auth, root, "unix:"+s.GatewayAdmin())
	if err := durable.WriteFile(s.gatewayConfigFile(), []byte(text), 0o600); err != nil {
		return nil, err
	}
	p, err := s.spawn("dstack-gateway-dev", s.GatewayLogFile(), s.gatewayPIDFile(), "serve", "--config", s.gatewayConfigFile())
	if err != nil {
		return nil, err
	}
	err = await(ctx, 30*time.Second, p.Exited, func() error { return g.serving(ctx) })
	if err != nil {
		return nil, fault.Wrap(err, "gateway_start", "the gateway does not serve:\n%s", p.Tail()).WithFix("see %s", s.GatewayLogFile())
	}
	known, err := json.MarshalIndent(g, "", "  ")
	if err != nil {
		return nil, err
	}
	return g, durable.WriteFile(s.gatewayFile(), append(known, '\n'), 0o600)
}

// newGateway chooses the public port, which stays: bookmarks know it.
func (s *Stack) newGateway() (*Gateway, error) {
	g := &Gateway{Domain: GatewayDomain, CA: filepath.Join(s.gatewayDir(), "private-ca.pem")}
	ports, err := s.gatewayPorts()
	if err != nil {
		return nil, err
	}
	if g.Port, err = freePort("tcp", 8443); err != nil {
		return nil, err
	}
	g.RPC, g.WG = ports.RPC, ports.WG
	g.GuestURL = fmt.Sprintf("https://%s:%d", GuestHost, g.RPC)
	return g, nil
}

// gatewayPorts are where guests reach the stack's gateway. They are chosen before there
// is one, and stay: the VMM's egress filter and guests know them.
func (s *Stack) gatewayPorts() (p struct {
	RPC int `json:"rpc"`
	WG  int `json:"wireguard"`
}, err error) {
	if g, err := s.Gateway(); err == nil {
		p.RPC, p.WG = g.RPC, g.WG
		return p, nil
	}
	path := filepath.Join(s.Dir, "gateway-ports.json")
	text, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(text, &p); err != nil {
			return p, fmt.Errorf("%s: %w", path, err)
		}
		return p, nil
	case !errors.Is(err, fs.ErrNotExist):
		return p, err
	}
	if p.RPC, err = freePort("tcp", 0); err != nil {
		return p, err
	}
	if p.WG, err = freePort("udp", 0); err != nil {
		return p, err
	}
	if text, err = json.Marshal(p); err != nil {
		return p, err
	}
	return p, durable.WriteFile(path, text, 0o600)
}

// freePort returns a port of loopback that nobody has just now, the wished one if it is.
func freePort(proto string, wish int) (int, error) {
	for _, port := range []int{wish, 0} {
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		if proto == "udp" {
			if c, err := net.ListenPacket("udp", addr); err == nil {
				defer c.Close()
				return c.LocalAddr().(*net.UDPAddr).Port, nil
			}
			continue
		}
		if l, err := net.Listen("tcp", addr); err == nil {
			defer l.Close()
			return l.Addr().(*net.TCPAddr).Port, nil
		}
	}
	return 0, fault.New("port_taken", "no %s port of loopback is free", proto)
}

// gatewayIdentity learns what the gateway's evidence will show.
func (s *Stack) gatewayIdentity(ctx context.Context, g *Gateway, socket string, ended <-chan error) error {
	agent := prpc.NewClient("http://dstack", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	})
	var info agentapi.AppInfo
	if err := await(ctx, 30*time.Second, ended, func() error { return agent.Call(ctx, "Info", nil, &info) }); err != nil {
		return err
	}
	var tcb struct {
		MRTD  string `json:"mrtd"`
		RTMR0 string `json:"rtmr0"`
		RTMR1 string `json:"rtmr1"`
		RTMR2 string `json:"rtmr2"`
	}
	if err := json.Unmarshal([]byte(info.TcbInfo), &tcb); err != nil {
		return err
	}
	if len(info.AppId) != dstack.AppIDSize {
		return fault.New("gateway_start", "the simulator names no app id")
	}
	m, err := manifest.Parse([]byte(gatewayApp))
	if err != nil {
		return err
	}
	roots, err := os.ReadFile(s.DevRoots())
	if err != nil {
		return err
	}
	g.AppID = dstack.AppID(info.AppId)
	g.Policy = &manifest.PeerPolicy{AppID: g.AppID, ComposeHashes: []dstack.ComposeHash{m.Hash()}, Registers: map[string][][]byte{}, DevRoots: string(roots)}
	for name, text := range map[string]string{"mrtd": tcb.MRTD, "rtmr0": tcb.RTMR0, "rtmr1": tcb.RTMR1, "rtmr2": tcb.RTMR2} {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) == 0 {
			return fault.New("gateway_start", "the simulator's %s is %q", name, text)
		}
		g.Policy.Registers[name] = [][]byte{b}
	}
	return nil
}

// await asks until there is no error, the patience ends, or the process has ended.
func await(ctx context.Context, patience time.Duration, ended <-chan error, ask func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := ask()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-ended:
			return fmt.Errorf("it ended: %v (%w)", e, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// StopGateway stops the gateway and its simulated TEE.
func (s *Stack) StopGateway(grace time.Duration) error {
	return errors.Join(process.StopRecorded(s.gatewayPIDFile(), grace), process.StopRecorded(s.gatewayIDPIDFile(), grace))
}
