// SPDX-License-Identifier: Apache-2.0

// Package self is a program that runs as an app of a dstack guest: who it is, by its
// guest agent, and evidence of it.
//
// Trusted: the guest agent, which is part of the machine that the evidence is of.
package self

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	agentapi "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// App is this program as an app.
type App struct {
	ID       dstack.AppID
	Instance *dstack.InstanceID // nil: instances of this app are not told apart
	Compose  dstack.ComposeHash
	Manifest string // app-compose.json; empty where the agent does not tell
	VMConfig string // belongs to its evidence
	agent    *prpc.Client
}

// patience is how long the agent may take to answer who this is.
const patience = 60 * time.Second

// Open asks the guest agent at a unix socket. Code app_self.
func Open(ctx context.Context, socket string) (*App, error) {
	a := &App{agent: prpc.NewClient("http://dstack", func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	})}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var info agentapi.AppInfo
	if err := a.agent.Call(ctx, "Info", nil, &info); err != nil {
		return nil, fault.Wrap(err, "app_self", "ask the guest agent at %s who this is", socket).WithFix("mount the guest agent's socket into the container")
	}
	if len(info.AppId) != dstack.AppIDSize {
		return nil, fault.New("app_self", "the guest agent names an app id of %d bytes", len(info.AppId))
	}
	a.ID, a.VMConfig = dstack.AppID(info.AppId), info.VmConfig
	if len(info.InstanceId) == dstack.InstanceIDSize {
		id := dstack.InstanceID(info.InstanceId)
		a.Instance = &id
	}
	if len(info.ComposeHash) == dstack.ComposeHashSize {
		a.Compose = dstack.ComposeHash(info.ComposeHash)
	}
	var tcb struct {
		AppCompose string `json:"app_compose"`
	}
	// What is not there is not shown; whoever verifies the evidence is told so.
	_ = json.Unmarshal([]byte(info.TcbInfo), &tcb)
	a.Manifest = tcb.AppCompose
	return a, nil
}

// Certificate has a key and a certificate of it issued, for a server and client of these
// names, with evidence and what the issuer knows of the app: by the KMS, when the app's
// keys come from one. Code app_self.
func (a *App) Certificate(ctx context.Context, subject string, names ...string) (*tls.Certificate, error) {
	var out agentapi.GetTlsKeyResponse
	err := a.agent.Call(ctx, "GetTlsKey", &agentapi.GetTlsKeyArgs{
		Subject: subject, AltNames: names, UsageRaTls: true, UsageServerAuth: true, UsageClientAuth: true, WithAppInfo: true,
	}, &out)
	if err != nil {
		return nil, err
	}
	key := []byte(out.Key)
	defer clear(key)
	cert, err := tls.X509KeyPair([]byte(strings.Join(out.CertificateChain, "\n")), key)
	if err != nil {
		return nil, fault.Wrap(err, "app_self", "the certificate that the guest agent returned")
	}
	return &cert, nil
}

// Attest implements channel.Attester.
func (a *App) Attest(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	var out agentapi.AttestResponse
	if err := a.agent.Call(ctx, "Attest", &agentapi.RawQuoteArgs{ReportData: data[:]}, &out); err != nil {
		return nil, err
	}
	return out.Attestation, nil
}
