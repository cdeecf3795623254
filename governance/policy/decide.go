// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
)

// skew is how far a clock may be behind that of whoever issued a document.
const skew = 5 * time.Minute

// Codes of denials; docs/kms-policy.md says each.
const (
	codeExpired          = "policy_expired"
	codeFuture           = "policy_future"
	codeMissing          = "policy_missing"
	codePurpose          = "purpose_denied"
	codeInstanceID       = "instance_id_length"
	codeDevTrust         = "dev_trust_refused"
	codeTrust            = "trust_refused"
	codeTCB              = "tcb_not_allowed"
	codeAdvisory         = "advisory_denied"
	codeImage            = "os_image_not_allowed"
	codeImageUnproven    = "os_image_unproven"
	codeDevImage         = "dev_image_refused"
	codeEpoch            = "os_epoch_too_old"
	codeApp              = "app_unknown"
	codeCompose          = "compose_hash_not_allowed"
	codeComposeRevoked   = "compose_hash_revoked"
	codeComposeNotBefore = "compose_hash_not_yet"
	codeDevice           = "device_not_allowed"
	codeSession          = "session_required"
	codeKMS              = "kms_not_allowed"
)

// refusal is why not; nil is no objection.
type refusal struct{ code, reason string }

func refuse(code, format string, args ...any) *refusal {
	return &refusal{code, fmt.Sprintf(format, args...)}
}

// Decide answers a request by the document. It is pure: all that it looks at is in its
// arguments, time included.
func (d *Document) Decide(r governance.Request) governance.Decision {
	app, no := d.judge(r)
	if no != nil {
		return governance.Deny(by(d), no.code, no.reason)
	}
	out := governance.Decision{
		Allowed: true, By: by(d), Lease: d.lease(), Names: []string{},
		Epoch: d.KeyEpoch.Current, OldestEpoch: d.KeyEpoch.Oldest,
	}
	if d.GatewayAppID != nil {
		out.GatewayAppID = d.GatewayAppID.String()
	}
	if app == nil {
		return out
	}
	if app.LeaseSeconds > 0 {
		out.Lease = min(out.Lease, time.Duration(app.LeaseSeconds)*time.Second)
	}
	if app.AnyName {
		out.Names = nil
	} else {
		out.Names = append(out.Names, app.Names...)
	}
	return out
}

func by(d *Document) string { return fmt.Sprintf("policy %d", d.Sequence) }

// judge returns the app's entry, nil for a KMS.
func (d *Document) judge(r governance.Request) (*App, *refusal) {
	if no := d.inForce(r.At); no != nil {
		return nil, no
	}
	if !r.Role.MayAsk(r.Purpose) {
		return nil, refuse(codePurpose, "a machine of role %.20q cannot ask for %.20q", r.Role, r.Purpose)
	}
	if n := len(r.Boot.InstanceID); n != 0 && n != dstack.InstanceIDSize {
		return nil, refuse(codeInstanceID, "the instance id has %d bytes, want %d or none", n, dstack.InstanceIDSize)
	}
	if no := d.platform(r); no != nil {
		return nil, no
	}
	if no := d.image(r); no != nil {
		return nil, no
	}
	if r.Role == governance.KMS {
		return nil, d.member(r)
	}
	return d.app(r)
}

// inForce looks at the time alone.
func (d *Document) inForce(at time.Time) *refusal {
	switch {
	case at.Before(d.Issued.Add(-skew)):
		return refuse(codeFuture, "the policy was issued at %s, and it is %s", d.Issued.UTC().Format(time.RFC3339), at.UTC().Format(time.RFC3339))
	case !at.Before(d.Expires):
		return refuse(codeExpired, "the policy expired at %s", d.Expires.UTC().Format(time.RFC3339))
	}
	return nil
}

func (d *Document) platform(r governance.Request) *refusal {
	switch {
	case r.Trust == dstack.TrustProduction:
	case r.Trust != dstack.TrustDevelopment:
		return refuse(codeTrust, "evidence of trust %.20q counts for no policy", r.Trust)
	case d.Trust != dstack.TrustDevelopment:
		return refuse(codeDevTrust, "the evidence proves nothing about hardware, and the policy is for production")
	}
	status := r.Boot.TCBStatus
	if status == "" {
		status = notReported
	}
	if !slices.Contains(d.TCB.Accept, status) {
		return refuse(codeTCB, "the platform's TCB is %.60q; accepted: %s", status, strings.Join(d.TCB.Accept, ", "))
	}
	for _, a := range r.Boot.AdvisoryIDs {
		if slices.ContainsFunc(d.TCB.DenyAdvisories, func(deny string) bool { return strings.EqualFold(deny, a) }) {
			return refuse(codeAdvisory, "the advisory %.60q applies to the platform", a)
		}
	}
	return nil
}

func (d *Document) image(r governance.Request) *refusal {
	i := slices.IndexFunc(d.OSImages, func(img Image) bool { return bytes.Equal(img.Hash[:], r.Boot.OSImageHash) })
	if i < 0 {
		return refuse(codeImage, "the OS image %.64x is not listed", r.Boot.OSImageHash)
	}
	img := &d.OSImages[i]
	if !r.ImageBound && !img.launchedAs(r) {
		return refuse(codeImageUnproven, "only the guest's word says that OS image %s runs: the evidence is not bound to it, and its launch registers are not listed", img.Hash)
	}
	dev := img.Dev || r.DevImage != nil && *r.DevImage
	if dev && (d.Trust != dstack.TrustDevelopment || r.Trust != dstack.TrustDevelopment) {
		return refuse(codeDevImage, "OS image %s is for development", img.Hash)
	}
	epoch := img.Epoch
	if r.OSEpoch != nil {
		epoch = min(epoch, *r.OSEpoch)
	}
	if epoch < d.MinOSEpoch {
		return refuse(codeEpoch, "OS image %s has security epoch %d, the least accepted is %d", img.Hash, epoch, d.MinOSEpoch)
	}
	return nil
}

// launchedAs reports whether the launch registers are those of one entry, all that the
// TEE has. A TEE whose registers do not cover the whole image has no such entry.
func (img *Image) launchedAs(r governance.Request) bool {
	names := launchRegisters[r.Boot.TEEVariant]
	if names == nil {
		return false
	}
	return slices.ContainsFunc(img.Launch, func(want map[string]Register) bool {
		return !slices.ContainsFunc(names, func(n string) bool {
			value, listed := want[n]
			return !listed || !bytes.Equal(value[:], r.Launch[n])
		})
	})
}

func (d *Document) member(r governance.Request) *refusal {
	if !slices.ContainsFunc(d.KMS.Allow, func(m Member) bool {
		if m.MRAggregated != nil {
			return *m.MRAggregated == r.Boot.MRAggregated
		}
		return m.AppID != nil && m.ComposeHash != nil && m.OSImageHash != nil &&
			*m.AppID == r.Boot.AppID && *m.ComposeHash == r.Boot.ComposeHash && bytes.Equal(m.OSImageHash[:], r.Boot.OSImageHash)
	}) {
		return refuse(codeKMS, "nothing that may be a KMS has mr_aggregated %x, or app %s with compose hash %s", r.Boot.MRAggregated, r.Boot.AppID, r.Boot.ComposeHash)
	}
	if !slices.Contains(d.KMS.Devices, r.Boot.DeviceID) {
		return refuse(codeDevice, "the device %s is not one of the KMS's", r.Boot.DeviceID)
	}
	return nil
}

func (d *Document) app(r governance.Request) (*App, *refusal) {
	i := slices.IndexFunc(d.Apps, func(a App) bool { return a.AppID == r.Boot.AppID })
	if i < 0 {
		return nil, refuse(codeApp, "the app %s is not listed", r.Boot.AppID)
	}
	app := &d.Apps[i]
	j := slices.IndexFunc(app.ComposeHashes, func(c Compose) bool { return c.Hash == r.Boot.ComposeHash })
	if j < 0 {
		return nil, refuse(codeCompose, "the compose hash %s is not listed for app %s", r.Boot.ComposeHash, app.AppID)
	}
	switch c := app.ComposeHashes[j]; {
	case c.Revoked != nil:
		return nil, refuse(codeComposeRevoked, "the compose hash %s was revoked: %s", c.Hash, c.Revoked.Reason)
	case c.NotBefore != nil && r.At.Before(*c.NotBefore):
		return nil, refuse(codeComposeNotBefore, "the compose hash %s may not run before %s", c.Hash, c.NotBefore.UTC().Format(time.RFC3339))
	}
	if app.OSImages != nil && !slices.ContainsFunc(app.OSImages, func(h dstack.ImageHash) bool { return bytes.Equal(h[:], r.Boot.OSImageHash) }) {
		return nil, refuse(codeImage, "the OS image %.64x is not one of app %s", r.Boot.OSImageHash, app.AppID)
	}
	if !d.Devices.Any && !slices.Contains(d.Devices.IDs, r.Boot.DeviceID) || app.Devices != nil && !slices.Contains(app.Devices, r.Boot.DeviceID) {
		return nil, refuse(codeDevice, "the device %s is not listed for app %s", r.Boot.DeviceID, app.AppID)
	}
	if app.RequireSession && !r.Session {
		return nil, refuse(codeSession, "the evidence was made for a key, and app %s demands it for the connection", app.AppID)
	}
	return app, nil
}
