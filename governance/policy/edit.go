// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Each edit returns a new document with the next sequence and leaves its own alone.
// What could not follow the document, or would be malformed, is refused with the codes
// of [Successor] and [Parse]; what is not there to be changed has the code policy_edit.

// edit changes a deep copy.
func (d *Document) edit(change func(*Document) error) (*Document, error) {
	data, err := d.Encode()
	if err != nil {
		return nil, err
	}
	next, err := Parse(data)
	if err != nil {
		return nil, err
	}
	next.Sequence++
	if err := change(next); err != nil {
		return nil, err
	}
	// Once more through its bytes, so that nothing is shared with the arguments.
	if data, err = next.Encode(); err != nil {
		return nil, err
	}
	if next, err = Parse(data); err != nil {
		return nil, err
	}
	if err := Successor(d, next); err != nil {
		return nil, err
	}
	return next, nil
}

// AllowApp adds an app. Of one that is there, compose hashes are added, and settings
// that a has replace those there. A revoked compose hash stays revoked: policy_edit.
func (d *Document) AllowApp(a App) (*Document, error) {
	return d.edit(func(n *Document) error {
		i := slices.IndexFunc(n.Apps, func(o App) bool { return o.AppID == a.AppID })
		if i < 0 {
			n.Apps = append(n.Apps, a)
			return nil
		}
		have := &n.Apps[i]
		for _, c := range a.ComposeHashes {
			j := slices.IndexFunc(have.ComposeHashes, func(o Compose) bool { return o.Hash == c.Hash })
			switch {
			case j < 0:
				have.ComposeHashes = append(have.ComposeHashes, c)
			case have.ComposeHashes[j].Revoked != nil:
				return fault.New("policy_edit", "compose hash %s of app %s was revoked: %s", c.Hash, a.AppID, have.ComposeHashes[j].Revoked.Reason).
					WithFix("change the manifest, which gives it another hash")
			default:
				have.ComposeHashes[j] = c
			}
		}
		if a.Name != "" {
			have.Name = a.Name
		}
		if a.Devices != nil {
			have.Devices = a.Devices
		}
		if a.Names != nil || a.AnyName {
			have.Names, have.AnyName = a.Names, a.AnyName
		}
		if a.LeaseSeconds != 0 {
			have.LeaseSeconds = a.LeaseSeconds
		}
		if a.OSImages != nil {
			have.OSImages = a.OSImages
		}
		have.Frozen = have.Frozen || a.Frozen
		have.RequireSession = have.RequireSession || a.RequireSession
		return nil
	})
}

// Revoke refuses one compose hash of an app, or with nil all that it has.
func (d *Document) Revoke(app dstack.AppID, hash *dstack.ComposeHash, at time.Time, reason string) (*Document, error) {
	return d.editApp(app, func(a *App) error {
		found := false
		for i := range a.ComposeHashes {
			c := &a.ComposeHashes[i]
			if hash != nil && c.Hash != *hash {
				continue
			}
			found = true
			if c.Revoked == nil {
				c.Revoked = &Revocation{At: at.UTC().Truncate(time.Second), Reason: reason}
			}
		}
		if !found {
			return fault.New("policy_edit", "app %s has no such compose hash", app).WithFix("take one of those that the policy lists")
		}
		return nil
	})
}

// Freeze lets an app's entry change by revocations alone from now on.
func (d *Document) Freeze(app dstack.AppID) (*Document, error) {
	return d.editApp(app, func(a *App) error { a.Frozen = true; return nil })
}

func (d *Document) editApp(app dstack.AppID, change func(*App) error) (*Document, error) {
	return d.edit(func(n *Document) error {
		i := slices.IndexFunc(n.Apps, func(a App) bool { return a.AppID == app })
		if i < 0 {
			return fault.New("policy_edit", "there is no app %s", app).WithFix("allow the app first")
		}
		return change(&n.Apps[i])
	})
}

// AllowImage adds an OS image, or replaces what is said of it.
func (d *Document) AllowImage(img Image) (*Document, error) {
	return d.edit(func(n *Document) error {
		n.OSImages = slices.DeleteFunc(n.OSImages, func(o Image) bool { return o.Hash == img.Hash })
		n.OSImages = append(n.OSImages, img)
		return nil
	})
}

// AllowDevice adds a machine on which apps may run. Where any may, this changes it to
// the ones listed.
func (d *Document) AllowDevice(id dstack.DeviceID) (*Document, error) {
	return d.edit(func(n *Document) error {
		n.Devices.Any = false
		n.Devices.IDs = with(n.Devices.IDs, id)
		return nil
	})
}

// AllowKMS adds what may be a KMS, on the machines given beside those there.
func (d *Document) AllowKMS(m Member, devices ...dstack.DeviceID) (*Document, error) {
	return d.edit(func(n *Document) error {
		n.KMS.Allow = append(n.KMS.Allow, m)
		for _, id := range devices {
			n.KMS.Devices = with(n.KMS.Devices, id)
		}
		return nil
	})
}

func with(ids []dstack.DeviceID, id dstack.DeviceID) []dstack.DeviceID {
	if slices.Contains(ids, id) {
		return ids
	}
	return append(ids, id)
}

// Rotate begins the next key epoch; the one before is given beside it, so that data can
// move, and older ones no more.
func (d *Document) Rotate() (*Document, error) {
	return d.edit(func(n *Document) error {
		n.KeyEpoch.Oldest = max(n.KeyEpoch.Current, 1)
		n.KeyEpoch.Current++
		return nil
	})
}

// Renew makes the document valid from a time on.
func (d *Document) Renew(at time.Time, validity time.Duration) (*Document, error) {
	return d.edit(func(n *Document) error {
		fresh := New(d.Trust, at, validity)
		n.Issued, n.Expires = fresh.Issued, fresh.Expires
		return nil
	})
}
