// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
)

// Reference is what a relying party expects, and on whose word.
//
// The exported fields are one set of expectations of the caller's own. The Add
// methods add more, each with its origin; evidence must meet all of them, so a
// flag beside a lock file narrows and never widens what is accepted.
type Reference struct {
	ComposeHashes []dstack.ComposeHash // any one of these
	AppID         *dstack.AppID
	ImageHashes   []dstack.ImageHash // any one of these
	TDX           *measure.TDX       // launch registers of that image

	// DevImage says whether the expected image is a development one; nil when
	// unknown. Firmware is the image's own word for its firmware's origin, such as
	// debian-ovmf; empty when unknown.
	DevImage *bool
	Firmware string

	// OSEpoch is the security epoch of the expected image; nil when unknown.
	OSEpoch *int

	added []expectation
}

// expectation is one party's word.
type expectation struct {
	origin   string
	compose  []dstack.ComposeHash
	app      *dstack.AppID
	instance *dstack.InstanceID
	images   []dstack.ImageHash
	tdx      *measure.TDX
}

// addPolicy expects what a policy says of the workload.
func (r *Reference) addPolicy(w WorkloadPolicy) {
	if len(w.ComposeHashes) > 0 || w.AppID != nil || w.InstanceID != nil || len(w.ImageHashes) > 0 {
		r.added = append(slices.Clone(r.added), expectation{origin: "the policy", compose: w.ComposeHashes, app: w.AppID, instance: w.InstanceID, images: w.ImageHashes})
	}
}

// AddInstanceID expects one instance of an app.
func (r *Reference) AddInstanceID(id dstack.InstanceID, origin string) {
	r.added = append(r.added, expectation{origin: origin, instance: &id})
}

// AddComposeHash expects a workload.
func (r *Reference) AddComposeHash(h dstack.ComposeHash, origin string) {
	r.added = append(r.added, expectation{origin: origin, compose: []dstack.ComposeHash{h}})
}

// AddManifest expects the workload that these exact bytes define.
func (r *Reference) AddManifest(raw []byte, origin string) {
	r.AddComposeHash(sha256.Sum256(raw), origin)
}

// AddAppID expects an app. It does not say what runs: a compose hash is needed too.
func (r *Reference) AddAppID(id dstack.AppID, origin string) {
	r.added = append(r.added, expectation{origin: origin, app: &id})
}

// AddImageHash expects an OS image by name.
func (r *Reference) AddImageHash(h dstack.ImageHash, origin string) {
	r.added = append(r.added, expectation{origin: origin, images: []dstack.ImageHash{h}})
}

// AddImage expects an OS image and the registers that it launches to.
func (r *Reference) AddImage(h dstack.ImageHash, m *measure.TDX, origin string) {
	r.added = append(r.added, expectation{origin: origin, images: []dstack.ImageHash{h}, tdx: m})
}

// AddLock expects what a deployment was locked to.
func (r *Reference) AddLock(l *lock.Lock, origin string) {
	app := l.AppID
	r.added = append(r.added, expectation{
		origin: origin, compose: []dstack.ComposeHash{l.ComposeHash}, app: &app, images: []dstack.ImageHash{l.OSImageHash}, tdx: l.Measurements,
	})
	// Images are named dstack-<flavour>-<version> (guest-os.md §2); all flavours but
	// prod are for development.
	for _, flavour := range []string{"dstack-sim-", "dstack-debug-", "dstack-dev-"} {
		if strings.HasPrefix(l.Image, flavour) {
			dev := true
			r.DevImage = &dev
		}
	}
}

// all returns every expectation, the caller's own fields first.
func (r *Reference) all() []expectation {
	own := expectation{origin: "the caller", compose: r.ComposeHashes, app: r.AppID, images: r.ImageHashes, tdx: r.TDX}
	return append([]expectation{own}, r.added...)
}

// expects reports whether any expectation names a workload.
func (r *Reference) expectsWorkload() bool {
	return slices.ContainsFunc(r.all(), func(e expectation) bool { return len(e.compose) > 0 })
}
