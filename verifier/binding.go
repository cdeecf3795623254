// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

// nonce compares what was asked with what was answered. The echo proves nothing;
// a wrong one is a replay whatever the quote says.
func (a *appraisal) nonce() {
	switch {
	case a.fresh.Nonce == nil || a.fresh.ReportData != nil || a.src.Container == nil || a.src.RATLS != nil:
	case len(a.fresh.Nonce) < minNonce:
		a.add(Error, "nonce_length", "", fmt.Sprintf("use %d random bytes", 32), "the nonce has %d bytes, fewer than %d: an answer could have been made in advance", len(a.fresh.Nonce), minNonce)
	case !bytes.Equal(a.src.Nonce, a.fresh.Nonce):
		a.add(Error, "nonce_mismatch", "nonce", "ask the instance itself, again", "the evidence was made for another nonce (%s, asked %s): it is replayed", clipHex(a.src.Nonce), clipHex(a.fresh.Nonce))
	}
}

func clipHex(b []byte) string {
	switch {
	case len(b) == 0:
		return "none"
	case len(b) > 8:
		return hexString(b[:8]) + "…"
	}
	return hexString(b)
}

// binding ties the quote to the caller's nonce and connection.
func (a *appraisal) binding() {
	signatureOnly := a.v.Scope == ScopeSignature
	unbound := func() {
		if signatureOnly || a.gateway != nil { // whether the gateway is bound, its evidence says
			return
		}
		a.add(Warning, "channel_unbound", "", "ask over https, directly", "nothing ties the evidence to a connection: what answers there may be something else")
	}
	stale := func() {
		a.add(lenient(!a.pol.Evidence.RequireFresh), "freshness_none", "nonce", "ask the running instance, by its URL", "the evidence does not answer a nonce of this run: it may be old, and the instance gone")
	}
	got := a.claims.ReportData
	if a.ev.ReportDataClaimed && !bytes.Equal(a.ev.ReportData[:], got) {
		a.add(Error, "report_data_mismatch", "container.report_data", "", "the container claims other report data than the quote has")
		return
	}
	if want := a.fresh.ReportData; want != nil {
		if !bytes.Equal(got, want) {
			a.add(Error, "report_data_mismatch", "claims.report_data", "", "the quote has report data %s, expected %s", clipHex(got), clipHex(want))
			return
		}
		a.v.Freshness = FreshReportData
		unbound()
		return
	}
	if signatureOnly {
		return
	}
	if spki := a.src.RATLS; spki != nil {
		a.ratls(spki)
		stale()
		return
	}
	if n := a.claims.Nitro; n != nil && len(a.fresh.Nonce) > 0 && bytes.Equal(n.Nonce, a.fresh.Nonce) {
		a.v.Freshness = FreshNonce
		unbound()
		return
	}
	if len(a.src.Nonce) == 0 {
		unbound()
		stale()
		return
	}
	if a.id == nil {
		return // the envelope holds the identity, which is not established
	}
	made := func(spki []byte) bool {
		want := binding.Envelope(a.src.Nonce, spki, a.id.AppID, a.id.InstanceID)
		return bytes.Equal(got, want[:])
	}
	served := func(match func([]byte) bool) int { return slices.IndexFunc(a.src.ServedSPKIs, match) }
	conn := a.fresh.ConnectionSPKI
	switch {
	case len(conn) > 0 && served(func(k []byte) bool { return bytes.Equal(k, conn) }) < 0 && a.pol.Gateway.AllowTermination && a.role == "":
		a.add(Error, "gateway_evidence_missing", "source.gateway", "ask by a name whose TLS ends in the app, or update the gateway", "TLS ends before the instance, at something that shows no evidence of itself")
		return
	case len(conn) > 0 && served(func(k []byte) bool { return bytes.Equal(k, conn) }) < 0:
		a.add(Error, "spki_mismatch", "served_spkis", "connect to the instance itself, without a proxy that ends TLS", "the key of this connection is none of those that the instance serves: someone is in between")
		return
	case len(conn) > 0 && made(conn):
		if !a.channelKey(conn) {
			return
		}
		a.v.Channel = ChannelTLS
	case len(conn) > 0 && (made(nil) || served(made) >= 0):
		a.add(Error, "spki_mismatch", "claims.report_data", "connect to the instance itself, without a proxy that ends TLS", "the evidence was made for another connection than this one")
		return
	case a.gateway != nil && made(nil):
		a.add(Error, "gateway_unbound", "claims.report_data", "update the gateway", "the app's evidence was made for no TLS connection: nothing shows that it is of the instance that the gateway reached")
		return
	case len(conn) == 0 && made(nil):
		unbound()
	case len(conn) == 0 && served(made) >= 0:
		// Saved evidence: made for a connection that is gone.
		if !a.channelKey(a.src.ServedSPKIs[served(made)]) {
			return
		}
		unbound()
	default:
		a.add(Error, "report_data_mismatch", "claims.report_data", "", "the quote does not commit to this nonce, connection and identity")
		return
	}
	if a.fresh.Nonce == nil {
		stale()
	} else if !a.v.Has(Error, "nonce_mismatch") && !a.v.Has(Error, "nonce_length") {
		a.v.Freshness = FreshNonce
	}
}

// ratls checks evidence that an RA-TLS certificate carries: it commits to the
// certificate's key, once, when the certificate was made.
func (a *appraisal) ratls(spki []byte) {
	if want := binding.ReportData(binding.TagRATLS, spki); !bytes.Equal(want[:], a.claims.ReportData) {
		a.add(Error, "report_data_mismatch", "claims.report_data", "", "the quote does not commit to the key of the certificate that carries it")
		return
	}
	if cert := a.src.Certificate; cert != nil {
		switch err := ratls.CheckStandalone(cert, a.at); {
		case err == nil:
		case fault.Code(err) == "ratls_not_self_signed":
			a.add(Info, "ratls_issued", "certificate", "", "the certificate was issued by %q, whose word on it was not judged", cert.Issuer)
		default:
			a.fail(err, "certificate", "ratls_malformed")
		}
	}
	switch conn := a.fresh.ConnectionSPKI; {
	case conn == nil:
		a.add(Warning, "channel_unbound", "", "connect to the instance itself, as host:port", "nothing ties the evidence to a connection: what answers there may be something else")
	case !bytes.Equal(conn, spki):
		a.add(Error, "spki_mismatch", "certificate", "connect to the instance itself, without a proxy that ends TLS", "the certificate's key is not the one of this connection")
		return
	default:
		a.v.Channel = ChannelTLS
	}
	// Any container with the agent's socket may ask for a quote over such bytes (B20).
	if sum := sha256.Sum256(spki); a.id != nil && !bytes.Equal(a.id.ChannelKey, sum[:]) {
		a.add(Warning, "channel_key_uncommitted", "event_log.system-channel-key", "", "the guest's init did not commit to this key before the app started: any part of the app may hold it")
	}
}

// channelKey demands that the guest's init committed to the key before any app
// ran. Report data alone do not show it: an app may ask for a quote over bytes of
// its own choice (threats.md B20).
func (a *appraisal) channelKey(spki []byte) bool {
	if a.role == HopGateway {
		return true // the gateway is an app: its evidence is what that app made, and what the app is, is expected
	}
	switch sum := sha256.Sum256(spki); {
	case a.id.ChannelKey == nil:
		a.add(Error, "channel_key_uncommitted", "event_log.system-channel-key", "use an OS image that commits to its channel key", "the guest did not commit to a channel key before the app started, so an app may have made this evidence")
	case !bytes.Equal(a.id.ChannelKey, sum[:]):
		a.add(Error, "channel_key_mismatch", "event_log.system-channel-key", "", "the connection's key is not the one that the guest committed to before the app started")
	default:
		return true
	}
	return false
}
