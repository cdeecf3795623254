// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"crypto/sha512"
	"crypto/tls"
	"slices"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// commitmentTag is the domain of a channel's evidence.
	commitmentTag = "dstack-channel-v1"
	// exporterLabel is private to dstack (RFC 5705 §4).
	exporterLabel = "EXPERIMENTAL dstack-attest/1"
	exporterSize  = 32
)

// commitment is what one end's evidence says beyond what it is.
type commitment struct {
	role     Role   // of the end that attests
	exported []byte // 32 bytes of this TLS session
	own      []byte // DER SPKI of the attesting end's leaf
	peer     []byte // DER SPKI of the verifying end's leaf; empty when it presented none
	nonce    []byte // 32 bytes of the verifying end
	intended []byte // encoding of whom the verifying end means
}

// reportData returns
//
//	SHA-512( LP("dstack-channel-v1") ‖ LP(role) ‖ LP(exported) ‖ LP(own SPKI) ‖ LP(peer SPKI) ‖ LP(nonce) ‖ LP(intended) )
//
// where LP(x) is the length of x as u32 big-endian, then x. Each part stops one
// attack (threats.md C01): the role reflection, the exported secret relay by
// whoever has a copy of the TLS key, the keys a swap of ends, the nonce replay,
// the intended identity diversion.
func (c commitment) reportData() dstack.ReportData {
	return sha512.Sum512(lp(nil, []byte(commitmentTag), []byte(c.role), c.exported, c.own, c.peer, c.nonce, c.intended))
}

// exporter is a TLS session that can derive secrets (RFC 8446 §7.5).
type exporter interface {
	ExportKeyingMaterial(label string, context []byte, length int) ([]byte, error)
}

var _ exporter = (*tls.ConnectionState)(nil)

// export derives the session's 32 bytes from both nonces, the client's first. A
// session that cannot, ends: nothing else tells it from a relayed one.
func export(tls exporter, client, server []byte) ([]byte, error) {
	out, err := tls.ExportKeyingMaterial(exporterLabel, slices.Concat(client, server), exporterSize)
	if err != nil {
		return nil, fault.Wrap(err, "channel_exporter", "this TLS session exports no keying material")
	}
	if len(out) != exporterSize {
		return nil, fault.New("channel_exporter", "this TLS session exported %d bytes, want %d", len(out), exporterSize)
	}
	return out, nil
}
