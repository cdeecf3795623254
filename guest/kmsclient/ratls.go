// SPDX-License-Identifier: Apache-2.0

package kmsclient

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"

	"google.golang.org/protobuf/proto"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
)

// ratls makes one call over RA-TLS, upstream's way: a first connection for the
// temporary CA, under which this end shows its evidence on the second. On both the
// server must prove that the root key issued its certificate for being a KMS. With a
// root that is known it is that one, both times; without, it is on the second what it
// was on the first (threats.md C03).
func (c *Client) ratls(ctx context.Context, at endpoint, method string, req, reply proto.Message) (Answer, error) {
	answer := Answer{URL: at.base, Root: c.cfg.Root}
	temp := c.cfg.Temp
	if temp == nil || len(c.cfg.Root) == 0 {
		var err error
		if temp, err = c.firstContact(ctx, at, &answer); err != nil {
			return answer, err
		}
	}
	client, err := c.clientCertificate(ctx, temp)
	if err != nil {
		return answer, err
	}
	return answer, c.issued(ctx, at, channel.Issued{Issuer: answer.Root, Certificate: client}, method, req, reply, nil)
}

// firstContact gets the temporary CA, and the root where none is known.
func (c *Client) firstContact(ctx context.Context, at endpoint, answer *Answer) (*certificate.Authority, error) {
	var reply kmsapi.GetTempCaCertResponse
	var leaf *x509.Certificate
	server := channel.Issued{FirstContact: true}
	if len(c.cfg.Root) > 0 {
		server = channel.Issued{Issuer: c.cfg.Root}
	}
	if err := c.issued(ctx, at, server, "GetTempCaCert", nil, &reply, &leaf); err != nil {
		return nil, err
	}
	// Whoever answered first must have shown a certificate of the root that he names.
	cert, err := answer.RootOf(reply.CaCert)
	if err != nil {
		return nil, err
	}
	answer.Root = cert.RawSubjectPublicKeyInfo
	if err := channel.CheckIssuer(leaf, answer.Root); err != nil {
		return nil, err
	}
	temp, err := certificate.Open([]byte(reply.TempCaCert), []byte(reply.TempCaKey))
	if err != nil {
		return nil, malformed("its temporary authority: %v", err)
	}
	answer.TempCACert, answer.TempCAKey = reply.TempCaCert, reply.TempCaKey
	return temp, nil
}

// clientCertificate makes the certificate by which the KMS appraises this guest: a
// fresh key, with evidence over it, signed by the temporary CA.
func (c *Client) clientCertificate(ctx context.Context, ca *certificate.Authority) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	evidence, err := c.cfg.Attester.Attest(ctx, ratls.ReportData(spki))
	if err != nil {
		return nil, fault.Wrap(err, "key_evidence", "make evidence for the KMS")
	}
	der, err := ca.Issue(certificate.Leaf{
		Config: csr.Config{Subject: "RA-TLS TEMP Cert", ClientAuth: true},
		Public: &key.PublicKey, Evidence: evidence,
	}, c.cfg.Now())
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der, ca.Certificate.Raw}, PrivateKey: key}, nil
}

// issued makes one connection, which server describes, and one call on it. seen, if not
// nil, is set to the server's certificate.
func (c *Client) issued(ctx context.Context, at endpoint, server channel.Issued, method string, req, reply proto.Message, seen **x509.Certificate) error {
	server.Usage, server.Now = ratls.UsageKMS, c.cfg.Now
	server.Check = func(leaf *x509.Certificate) error {
		if seen != nil {
			*seen = leaf
		}
		return c.cfg.Policy.checkCertificate(ctx, leaf, c.cfg.Now())
	}
	cfg, err := server.Config(at.host)
	if err != nil {
		return err
	}
	transport := &http.Transport{
		TLSClientConfig: cfg, TLSHandshakeTimeout: handshakeTimeout(c.cfg.Policy),
		DialContext:       (&net.Dialer{Timeout: ConnectTimeout}).DialContext,
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}
	defer transport.CloseIdleConnections()
	return exchange(ctx, transport, at, method, req, reply)
}
