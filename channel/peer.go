// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/internal/fault"
)

// Attester makes evidence of the machine that it runs on.
type Attester interface {
	// Attest returns a container (attestation.md §7), at most MaxEvidence bytes,
	// whose hardware evidence is over exactly data. It is called from many
	// goroutines, and for strangers: an implementation bounds its own work.
	Attest(ctx context.Context, data dstack.ReportData) (container []byte, err error)
}

// AttesterFunc is an Attester that is one function.
type AttesterFunc func(ctx context.Context, data dstack.ReportData) ([]byte, error)

// Attest implements Attester.
func (f AttesterFunc) Attest(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	return f(ctx, data)
}

// Appraiser decides whether a peer is one that this end may talk to.
type Appraiser interface {
	// Appraise returns what was established about an accepted peer, or the error
	// that refuses it, which carries a stable code. There is no third outcome.
	//
	// It must verify the hardware's signatures, replay the event log to the
	// registers that the hardware signed, and judge workload and platform. That
	// the report data and the committed key are those of this connection and that
	// the identity is the intended one, this package checks again by itself from
	// what Appraise returns: whoever forgets it is still safe.
	Appraise(ctx context.Context, c Candidate) (*Appraisal, error)
}

// Candidate is all that is known about a peer before it is judged.
type Candidate struct {
	Container  []byte            // hostile; at most MaxEvidence bytes
	ReportData dstack.ReportData // what the hardware must have signed
	SPKI       []byte            // DER, of this very connection; possession is proved by TLS
	Role       Role              // of the candidate
	Intended   Intended          // whom this end means
	Binding    Binding           // what ReportData ties the evidence to
	At         time.Time

	// Issued is when the RA-TLS certificate that carried the evidence began to be
	// valid, by its own word; zero for evidence that was made for this connection.
	Issued time.Time
}

// Appraisal is what an appraiser established about a peer that it accepted.
type Appraisal struct {
	Identity   Identity
	ReportData dstack.ReportData // as the hardware signed it
	Trust      dstack.Trust
	Claims     *attest.Claims // what the hardware said, for authorisation and logs; may be nil

	// Booting says that the log ends before system-ready: no app has run, so that the
	// guest's init made this evidence.
	Booting bool
	// Detail is whatever the appraiser has for those who serve the connection.
	Detail any
}

// Identity is who a machine is, as its event log proves.
type Identity struct {
	AppID       dstack.AppID
	InstanceID  *dstack.InstanceID // nil for an app without instance ids
	ComposeHash dstack.ComposeHash

	// ChannelKey is the SHA-256 (32 bytes) of the DER SubjectPublicKeyInfo that the
	// guest's init committed to before any app ran (event system-channel-key); nil
	// when it committed to none.
	ChannelKey []byte
}

// Peer is a peer that was accepted. It comes from a connection only.
type Peer struct {
	Identity Identity
	Trust    dstack.Trust
	Claims   *attest.Claims // may be nil
	SPKI     []byte         // DER, of the connection
	Role     Role
	Binding  Binding
	At       time.Time // when it was accepted
	Detail   any       // of the Appraisal
}

// Role is an end of a connection: whoever dials is the client.
type Role string

// The two roles. Evidence of one is never evidence of the other (threats.md C01).
const (
	ClientRole Role = "client"
	ServerRole Role = "server"
)

func (r Role) other() Role {
	if r == ClientRole {
		return ServerRole
	}
	return ClientRole
}

// Binding says what evidence is tied to.
type Binding string

const (
	// BindingSession is evidence made for this TLS session, this peer and this
	// nonce: it cannot be old and cannot be another's.
	BindingSession Binding = "session"
	// BindingKey is evidence about a TLS key, made at some time (RA-TLS). Whoever
	// has a copy of the key can use it (threats.md B08, C01).
	BindingKey Binding = "key"
)

// Intended is whom one end means to talk to. Fields left zero admit any value; the
// appraiser's own policy applies beside it, and it is the appraiser that must say
// which workloads are good where ComposeHashes is empty: an app id alone does not
// say what runs (threats.md B12).
type Intended struct {
	AppID         dstack.AppID
	InstanceID    *dstack.InstanceID
	ComposeHashes []dstack.ComposeHash // any of these, at most 64
}

const maxComposeHashes = 64

// Check returns nil when id is intended, or an error: channel_wrong_app,
// channel_wrong_instance, channel_wrong_workload.
func (in Intended) Check(id Identity) error {
	if !in.AppID.IsZero() && id.AppID != in.AppID {
		return fault.New("channel_wrong_app", "it is app %s, not app %s", id.AppID, in.AppID)
	}
	if in.InstanceID != nil && (id.InstanceID == nil || *id.InstanceID != *in.InstanceID) {
		got := "without an id"
		if id.InstanceID != nil {
			got = id.InstanceID.String()
		}
		return fault.New("channel_wrong_instance", "it is instance %s, not instance %s", got, in.InstanceID).
			WithFix("another copy of the same app answered: check the address, or allow any instance")
	}
	if len(in.ComposeHashes) > 0 && !slices.Contains(in.ComposeHashes, id.ComposeHash) {
		return fault.New("channel_wrong_workload", "it runs compose hash %s, which is none of the %d expected", id.ComposeHash, len(in.ComposeHashes))
	}
	return nil
}

// encode returns the canonical form:
//
//	LP(app id, 20 bytes or none) ‖ LP(instance id, 20 bytes or none) ‖ LP(compose hashes, ascending)
//
// where LP(x) is the length of x as u32 big-endian, then x.
func (in Intended) encode() ([]byte, error) {
	if len(in.ComposeHashes) > maxComposeHashes {
		return nil, fault.New("channel_config", "%d intended compose hashes, more than %d", len(in.ComposeHashes), maxComposeHashes)
	}
	var app, instance, hashes []byte
	if !in.AppID.IsZero() {
		app = in.AppID[:]
	}
	if in.InstanceID != nil {
		instance = in.InstanceID[:]
	}
	sorted := slices.Clone(in.ComposeHashes)
	slices.SortFunc(sorted, func(a, b dstack.ComposeHash) int { return bytes.Compare(a[:], b[:]) })
	for _, h := range slices.Compact(sorted) {
		hashes = append(hashes, h[:]...)
	}
	return lp(nil, app, instance, hashes), nil
}

// decodeIntended reads exactly what encode writes.
func decodeIntended(data []byte) (in Intended, err error) {
	bad := fault.New("channel_protocol", "the peer's intended identity is malformed")
	app, data, ok1 := cutLP(data)
	instance, data, ok2 := cutLP(data)
	hashes, data, ok3 := cutLP(data)
	n := len(hashes) / dstack.ComposeHashSize
	switch {
	case !ok1 || !ok2 || !ok3 || len(data) > 0,
		len(app) != 0 && len(app) != dstack.AppIDSize,
		len(instance) != 0 && len(instance) != dstack.InstanceIDSize,
		len(hashes)%dstack.ComposeHashSize != 0 || n > maxComposeHashes:
		return Intended{}, bad
	}
	copy(in.AppID[:], app)
	if len(app) > 0 && in.AppID.IsZero() {
		return Intended{}, bad
	}
	if len(instance) > 0 {
		id := dstack.InstanceID(instance)
		in.InstanceID = &id
	}
	for h := range slices.Chunk(hashes, dstack.ComposeHashSize) {
		if n := len(in.ComposeHashes); n > 0 && bytes.Compare(in.ComposeHashes[n-1][:], h) >= 0 {
			return Intended{}, bad
		}
		in.ComposeHashes = append(in.ComposeHashes, dstack.ComposeHash(h))
	}
	return in, nil
}

// lp appends each part behind its length as u32 big-endian.
func lp(dst []byte, parts ...[]byte) []byte {
	for _, p := range parts {
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(p)))
		dst = append(dst, p...)
	}
	return dst
}

func cutLP(data []byte) (part, rest []byte, ok bool) {
	if len(data) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(data)
	if data = data[4:]; uint64(n) > uint64(len(data)) {
		return nil, nil, false
	}
	return data[:n], data[n:], true
}

// admit has a candidate appraised and turns it into a peer. What the appraiser
// returns is held against the connection once more.
//
// A session's key must be the one that the guest's init committed to: report data
// alone do not show that the system made the evidence, since an app may ask for a
// quote over any 64 bytes, and so over the binding of a connection of its own
// (threats.md B20).
func admit(ctx context.Context, a Appraiser, c Candidate, committed bool) (*Peer, error) {
	r, err := a.Appraise(ctx, c)
	if err == nil {
		err = confirm(r, c, committed)
	}
	switch {
	case err == nil:
	case fault.Code(err) == "":
		return nil, fault.Wrap(err, "channel_appraisal", "appraise the %s", c.Role)
	default:
		return nil, fmt.Errorf("the %s is not accepted: %w", c.Role, err)
	}
	return &Peer{
		Identity: r.Identity, Trust: r.Trust, Claims: r.Claims,
		SPKI: c.SPKI, Role: c.Role, Binding: c.Binding, At: c.At, Detail: r.Detail,
	}, nil
}

func confirm(r *Appraisal, c Candidate, committed bool) error {
	switch {
	case r == nil || r.Identity.AppID.IsZero() || r.Trust == "":
		return fault.New("channel_appraisal", "the appraiser named no error and no identity")
	case r.ReportData != c.ReportData:
		return fault.New("channel_report_data", "the evidence was made for another connection, nonce, role or key")
	}
	if err := c.Intended.Check(r.Identity); err != nil {
		return err
	}
	if !committed || r.Booting {
		return nil
	}
	switch sum := sha256.Sum256(c.SPKI); {
	case len(r.Identity.ChannelKey) == 0:
		return fault.New("channel_key_uncommitted", "the guest committed to no channel key before its app started, so an app may have made this evidence").
			WithFix("use an OS image that commits to its channel key")
	case !bytes.Equal(r.Identity.ChannelKey, sum[:]):
		return fault.New("channel_key_mismatch", "the connection's key is not the one that the guest committed to before its app started")
	}
	return nil
}
