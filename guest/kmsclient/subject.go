// SPDX-License-Identifier: Apache-2.0

package kmsclient

import (
	"bytes"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/lease"
	"github.com/dstack-go/dstack/releaselog"
)

// Subject is whom a KMS gives something to.
type Subject struct {
	App      dstack.AppID
	Instance []byte // 20 bytes, or empty
	Compose  dstack.ComposeHash
}

// Release returns the head of the release log in which a grant to the subject is, by
// the proof in a reply of the KMS whose root key is given (threats.md G10). Codes: those
// of releaselog.VerifyRelease, release_other.
func (s Subject) Release(r *kmsapi.Release, root []byte) (releaselog.Head, error) {
	entry, head, err := releaselog.VerifyRelease(r, root)
	if err != nil {
		return releaselog.Head{}, err
	}
	var instance []byte
	if !entry.InstanceID.IsZero() {
		instance = entry.InstanceID[:]
	}
	if entry.AppID != s.App || !bytes.Equal(instance, s.Instance) || entry.ComposeHash != s.Compose {
		return releaselog.Head{}, fault.New("release_other", "the KMS proves that it logged a grant to the app %s, instance %x, manifest %s, which is not this one", entry.AppID, instance, entry.ComposeHash)
	}
	return head, nil
}

// Lease returns what a lease says, which must be the subject's and hold at the time.
// Codes: those of lease.Verify, lease_other.
func (s Subject) Lease(l *kmsapi.Lease, root []byte, at time.Time) (*lease.Document, error) {
	d, err := lease.Verify(l.GetDocument(), l.GetSignature(), root, at)
	if err != nil {
		return nil, err
	}
	if d.AppID != s.App || !bytes.Equal(d.InstanceID, s.Instance) || d.ComposeHash != s.Compose {
		return nil, fault.New("lease_other", "the KMS's lease is for the app %s, instance %x, manifest %s, which is not this one", d.AppID, d.InstanceID, d.ComposeHash)
	}
	return d, nil
}
