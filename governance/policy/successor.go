// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"reflect"
	"slices"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Successor says whether a document may follow another. Codes: policy_rollback when the
// sequence does not rise, policy_epoch when a key epoch or the least security epoch
// falls, policy_trust when the kind of trust changes, policy_frozen when a frozen app's
// entry changes otherwise than by a revocation.
func Successor(old, next *Document) error {
	switch {
	case next.Sequence <= old.Sequence:
		return fault.New("policy_rollback", "the policy has sequence %d, and %d was accepted before", next.Sequence, old.Sequence).
			WithFix("edit the newest policy instead")
	case next.KeyEpoch.Current < old.KeyEpoch.Current || next.KeyEpoch.Oldest < old.KeyEpoch.Oldest:
		return fault.New("policy_epoch", "the key epochs fall from %d (oldest %d) to %d (oldest %d)",
			old.KeyEpoch.Current, old.KeyEpoch.Oldest, next.KeyEpoch.Current, next.KeyEpoch.Oldest)
	case next.MinOSEpoch < old.MinOSEpoch:
		return fault.New("policy_epoch", "the least security epoch of OS images falls from %d to %d", old.MinOSEpoch, next.MinOSEpoch)
	case next.Trust != old.Trust:
		return fault.New("policy_trust", "the trust changes from %s to %s: keys that one kind of evidence had would be given to the other", old.Trust, next.Trust).
			WithFix("set up another KMS")
	}
	for i := range old.Apps {
		was := &old.Apps[i]
		if !was.Frozen {
			continue
		}
		j := slices.IndexFunc(next.Apps, func(a App) bool { return a.AppID == was.AppID })
		if j < 0 {
			return frozen(was.AppID, "is gone")
		}
		if !onlyRevoked(was, &next.Apps[j]) {
			return frozen(was.AppID, "changes otherwise than by a revocation")
		}
	}
	return nil
}

func frozen(app dstack.AppID, what string) error {
	return fault.New("policy_frozen", "the entry of app %s %s, and the app is frozen", app, what).WithFix("revoke its compose hashes, or register another app")
}

// onlyRevoked reports whether next is was with revocations added, the order of compose
// hashes included.
func onlyRevoked(was, next *App) bool {
	a, b := *was, *next
	a.ComposeHashes, b.ComposeHashes = nil, nil
	if !reflect.DeepEqual(a, b) || len(was.ComposeHashes) != len(next.ComposeHashes) {
		return false
	}
	for i, c := range was.ComposeHashes {
		n := next.ComposeHashes[i]
		if c.Hash != n.Hash || !sameTime(c, n) {
			return false
		}
		if r := c.Revoked; r != nil && (n.Revoked == nil || !n.Revoked.At.Equal(r.At) || n.Revoked.Reason != r.Reason) {
			return false
		}
	}
	return true
}

func sameTime(a, b Compose) bool {
	if a.NotBefore == nil || b.NotBefore == nil {
		return a.NotBefore == b.NotBefore
	}
	return a.NotBefore.Equal(*b.NotBefore)
}
