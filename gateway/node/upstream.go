// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"net"
	"net/netip"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/tunnel"
	"github.com/dstack-go/dstack/internal/fault"
)

// upstreamCert is the gateway's certificate for upstream's guests: of the KMS that they have
// their keys from, with the gateway's app id, by which they know it.
type upstreamCert struct {
	n    *Node
	ca   []byte // of the KMS: DER SubjectPublicKeyInfo
	cert atomic.Pointer[tls.Certificate]
}

// certificateRetry is how long to wait before the guest agent is asked again.
const certificateRetry = time.Minute

// upstream returns nil when upstream's guests are none of this gateway's.
func (n *Node) upstream(tn *tunnel.Tunnel) (*gateway.Upstream, *upstreamCert, error) {
	c := &n.cfg.Core
	if !c.UpstreamGuests {
		return nil, nil, nil
	}
	ca, err := hex.DecodeString(c.kmsCA())
	if err != nil {
		return nil, nil, err
	}
	u := &upstreamCert{n: n, ca: ca}
	return &gateway.Upstream{
		CA: ca, Certificate: u.cert.Load,
		Dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) { return tn.Dial(ctx, to) },
	}, u, nil
}

// keep has the certificate made and renews it when a third of its life is left, until ctx
// ends. Nothing waits for it.
func (u *upstreamCert) keep(ctx context.Context) error {
	for {
		wait, err := u.renew(ctx)
		if err != nil && ctx.Err() == nil {
			u.n.log.Warn("the certificate for upstream's guests", "code", fault.Code(err), "error", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// renew gets one and says when the next is due. Code gateway_certificate.
func (u *upstreamCert) renew(ctx context.Context) (time.Duration, error) {
	at, err := url.Parse(u.n.cfg.Core.MyURL)
	if err != nil {
		return certificateRetry, err
	}
	ctx, cancel := context.WithTimeout(ctx, certificateRetry)
	defer cancel()
	cert, err := u.n.self.Certificate(ctx, "dstack-gateway", at.Hostname())
	if err != nil {
		return certificateRetry, err
	}
	leaf, err := u.check(cert, time.Now())
	if err != nil {
		return certificateRetry, err
	}
	u.cert.Store(cert)
	u.n.log.Info("certificate for upstream's guests", "not_after", leaf.NotAfter)
	return max(certificateRetry, time.Until(leaf.NotAfter)*2/3), nil
}

// check sees to it that upstream's guests would know the gateway by it.
func (u *upstreamCert) check(cert *tls.Certificate, now time.Time) (*x509.Certificate, error) {
	bad := func(format string, args ...any) (*x509.Certificate, error) {
		return nil, fault.New("gateway_certificate", "the gateway's own certificate "+format, args...).
			WithFix("run the gateway as an app of the KMS that core.kms_ca names")
	}
	if len(cert.Certificate) < 2 {
		return bad("comes without that of its app CA: the gateway's keys come from no KMS")
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, err
	}
	app, err := x509.ParseCertificate(cert.Certificate[1])
	if err != nil {
		return nil, err
	}
	if channel.CheckIssuer(app, u.ca) != nil || leaf.CheckSignatureFrom(app) != nil {
		return bad("is not of the KMS that core.kms_ca names")
	}
	claims, err := ratls.IssuerClaims(leaf)
	if err != nil {
		return nil, err
	}
	if claims.AppID == nil || *claims.AppID != u.n.self.ID {
		return bad("does not name its app id %s", u.n.self.ID)
	}
	if !now.Before(leaf.NotAfter) {
		return bad("has run out")
	}
	cert.Leaf = leaf
	return leaf, nil
}
