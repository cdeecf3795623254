// SPDX-License-Identifier: Apache-2.0

// Package policy is authority as a document: what may have keys, signed by people
// whose keys a KMS's measured configuration pins.
//
// A [Document] denies whatever it does not name; the zero value, and a document that
// is absent or expired, deny everything. Nothing in it allows all apps, all manifests,
// all images or all machines that may be a KMS. [Open] reads one that enough pinned
// keys signed; [Authority] answers by the newest one that it was given and never goes
// back to an older one, also over restarts.
//
// Trusted: the pinned keys, each time enough of them sign; the directory of the
// Authority's file; the clock. Attacker-controlled: every byte of a signed document
// until its signatures hold, and when it is delivered. Whoever withholds a newer
// document can do so until the older one expires.
//
// Implements design.md §7; threats.md A01, D11, D12, G05, G06 (frozen apps), G08, J07.
//
// # The signed form
//
//	{"document": base64 of the exact bytes, "signatures": [{"key_id": …, "signature": base64}]}
//
// A signature is Ed25519 over "dstack-policy-v1\n" and the document's bytes; a key id is
// the first 8 bytes of the SHA-256 of the public key, in hexadecimal.
package policy

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	MaxDocument = 4 << 20 // bytes
	MaxValidity = 366 * 24 * time.Hour
	MaxLease    = time.Hour // threats.md G05
)

const maxText = 256 // bytes of a name or a reason

// Hash is 32 bytes that no other noun of the house names: mr_aggregated.
type Hash [32]byte

func (h Hash) MarshalText() ([]byte, error)  { return []byte(hex.EncodeToString(h[:])), nil }
func (h *Hash) UnmarshalText(b []byte) error { return exactHex(h[:], b) }

// Register is the value of a launch register: 48 bytes.
type Register [dstack.MeasurementSize]byte

func (r Register) MarshalText() ([]byte, error)  { return []byte(hex.EncodeToString(r[:])), nil }
func (r *Register) UnmarshalText(b []byte) error { return exactHex(r[:], b) }

func exactHex(dst, text []byte) error {
	if len(text) != 2*len(dst) {
		return fault.New("policy_malformed", "want %d hexadecimal digits, got %d characters", 2*len(dst), len(text))
	}
	_, err := hex.Decode(dst, bytes.ToLower(text))
	return err
}

// Document says who may have keys. Hashes and ids are hexadecimal of exactly their
// length, times RFC 3339. See docs/kms-policy.md.
type Document struct {
	Version  int       `json:"version"`  // 1
	Sequence uint64    `json:"sequence"` // rises with every document; from 1
	Issued   time.Time `json:"issued"`
	Expires  time.Time `json:"expires"` // at most MaxValidity after Issued

	// Trust is production or development. A document for development lets evidence
	// count that only a simulated TEE vouches for, and development images on such.
	Trust dstack.Trust `json:"trust"`

	// GatewayAppID is the app whose instances are the gateways.
	GatewayAppID *dstack.AppID `json:"gateway_app_id,omitzero"`

	// LeaseSeconds is how long an instance may go on before it asks again: 0 means
	// 3600, which is also the most.
	LeaseSeconds uint32 `json:"lease_seconds,omitzero"`

	OSImages   []Image `json:"os_images,omitzero"`
	MinOSEpoch int     `json:"min_os_epoch,omitzero"` // least security epoch of an image (D11)

	// Devices are the machines on which apps may run.
	Devices Devices `json:"devices,omitzero"`

	TCB      TCB      `json:"tcb,omitzero"`
	KMS      KMS      `json:"kms,omitzero"`
	Apps     []App    `json:"apps,omitzero"`
	KeyEpoch KeyEpoch `json:"key_epoch,omitzero"`
}

// Image is an OS image that may run.
type Image struct {
	Hash  dstack.ImageHash `json:"hash"`
	Name  string           `json:"name,omitzero"`
	Dev   bool             `json:"dev,omitzero"`   // for development: never on real hardware (D12)
	Epoch int              `json:"epoch,omitzero"` // its security epoch
	// Launch are the values of the launch registers with which it may start, for
	// evidence that does not carry the image's own measurement document: each entry
	// has all of mrtd, rtmr0, rtmr1 and rtmr2 (TDX), or measurement (SEV-SNP).
	Launch []map[string]Register `json:"launch,omitzero"`
}

// Devices are machines by device id. The zero value is none.
type Devices struct {
	IDs []dstack.DeviceID `json:"ids,omitzero"`
	// Any, the explicit word, is every machine. It holds for apps only, never for a KMS (A01).
	Any bool `json:"any,omitzero"`
}

// TCB is how current a platform must be.
type TCB struct {
	// Accept are the statuses that are good enough, in Intel's words; NotReported is
	// that of platforms that tell none. Empty denies all.
	Accept []string `json:"accept,omitzero"`
	// DenyAdvisories refuses a platform to which one of them applies.
	DenyAdvisories []string `json:"deny_advisories,omitzero"`
}

// KMS is which machines may hold the root keys.
type KMS struct {
	Allow []Member `json:"allow,omitzero"`
	// Devices are the only machines; there is no word for any (A01).
	Devices []dstack.DeviceID `json:"devices,omitzero"`
}

// Member is what a KMS runs: MRAggregated, or the other three.
type Member struct {
	MRAggregated *Hash               `json:"mr_aggregated,omitzero"`
	AppID        *dstack.AppID       `json:"app_id,omitzero"`
	ComposeHash  *dstack.ComposeHash `json:"compose_hash,omitzero"`
	OSImageHash  *dstack.ImageHash   `json:"os_image_hash,omitzero"`
}

// App is an app that may have keys.
type App struct {
	AppID         dstack.AppID `json:"app_id"`
	Name          string       `json:"name,omitzero"` // for people
	ComposeHashes []Compose    `json:"compose_hashes,omitzero"`
	// Devices, when given, narrows the document's devices.
	Devices []dstack.DeviceID `json:"devices,omitzero"`
	// Names are the DNS names that its certificates may have, as
	// governance.NameAllowed reads them; none without AnyName.
	Names   []string `json:"names,omitzero"`
	AnyName bool     `json:"any_name,omitzero"`
	// LeaseSeconds, when given, is less than the document's.
	LeaseSeconds uint32 `json:"lease_seconds,omitzero"`
	// Frozen apps stay as they are: a later document may revoke, and nothing else (G06).
	Frozen bool `json:"frozen,omitzero"`
	// RequireSession demands evidence made for the very connection that asks for keys.
	RequireSession bool `json:"require_session,omitzero"`
	// OSImages, when given, narrows the document's images.
	OSImages []dstack.ImageHash `json:"os_images,omitzero"`
}

// Compose is a manifest that may run.
type Compose struct {
	Hash      dstack.ComposeHash `json:"hash"`
	NotBefore *time.Time         `json:"not_before,omitzero"`
	// Revoked refuses it. The time says since when people know, and does not wait for
	// it: a clock put back brings nothing back.
	Revoked *Revocation `json:"revoked,omitzero"`
}

// Revocation is since when and why.
type Revocation struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"`
}

// KeyEpoch is which native keys are given: zeros mean that they are not in use.
type KeyEpoch struct {
	Current uint64 `json:"current,omitzero"`
	Oldest  uint64 `json:"oldest,omitzero"` // the oldest that is still given
}

// New returns a document that denies everything, with sequence 1.
func New(trust dstack.Trust, at time.Time, validity time.Duration) *Document {
	at = at.UTC().Truncate(time.Second)
	return &Document{Version: 1, Sequence: 1, Issued: at, Expires: at.Add(validity).Truncate(time.Second), Trust: trust}
}

// Parse reads a document's exact bytes, whose signatures hold, strictly: unknown and
// repeated keys, null, and ids of another length are errors, code policy_malformed.
func Parse(data []byte) (*Document, error) {
	var d Document
	err := strictjson.Decode(data, &d, strictjson.Limits{Size: MaxDocument, Depth: 8})
	if err == nil {
		err = noNull(data)
	}
	if err != nil {
		return nil, fault.Wrap(err, "policy_malformed", "the policy document does not parse").WithFix("docs/kms-policy.md lists the keys")
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return &d, nil
}

// noNull refuses null, which would make an empty list that denies one that is absent.
func noNull(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if tok == nil {
			return errors.New("null is no value")
		}
	}
}

// Encode returns bytes that Parse takes, for [Sign].
func (d *Document) Encode() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(d); err != nil {
		return nil, fault.Wrap(err, "policy_malformed", "write the policy document")
	}
	if out.Len() > MaxDocument {
		return nil, fault.New("policy_malformed", "the policy document has %d bytes, the most is %d", out.Len(), MaxDocument)
	}
	return out.Bytes(), nil
}

// statuses are those that a document may accept. Revoked and Unsupported are not
// among them.
var statuses = []string{
	"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
	"OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded", notReported,
}

const notReported = "NotReported"

// launchRegisters are what a TEE measures of a launch, all of it, by the vendors' names.
var launchRegisters = map[string][]string{
	"dstack-tdx":         {"mrtd", "rtmr0", "rtmr1", "rtmr2"},
	"dstack-amd-sev-snp": {"measurement"},
}

func (d *Document) check() error {
	bad := func(format string, args ...any) error {
		return fault.New("policy_malformed", "the policy document: "+format, args...).WithFix("docs/kms-policy.md lists the keys and values")
	}
	switch {
	case d.Version != 1:
		return bad("version %d, want 1", d.Version)
	case d.Sequence == 0:
		return bad("sequence must be at least 1")
	case d.Issued.IsZero():
		return bad("issued is missing")
	case !d.Expires.After(d.Issued):
		return bad("expires must be after issued")
	case d.Expires.Sub(d.Issued) > MaxValidity:
		return bad("it is valid for %s, the most is %s", d.Expires.Sub(d.Issued), MaxValidity)
	case d.Trust != dstack.TrustProduction && d.Trust != dstack.TrustDevelopment:
		return bad("trust must be production or development, not %.40q", d.Trust)
	case time.Duration(d.LeaseSeconds)*time.Second > MaxLease:
		return bad("lease_seconds is %d, the most is %d", d.LeaseSeconds, MaxLease/time.Second)
	case d.MinOSEpoch < 0:
		return bad("min_os_epoch is negative")
	case d.KeyEpoch.Oldest > d.KeyEpoch.Current || (d.KeyEpoch.Oldest == 0) != (d.KeyEpoch.Current == 0):
		return bad("key_epoch: oldest must be from 1 to current, or both absent")
	case d.Devices.Any && len(d.Devices.IDs) > 0:
		return bad("devices: any beside a list")
	}
	for i, img := range d.OSImages {
		if img.Epoch < 0 || len(img.Name) > maxText {
			return bad("os_images[%d]: a negative epoch or a name of more than %d bytes", i, maxText)
		}
		for _, l := range img.Launch {
			if !completeLaunch(l) {
				return bad("os_images[%d]: launch must have mrtd, rtmr0, rtmr1 and rtmr2, or measurement, and no others", i)
			}
		}
	}
	if h, ok := repeated(d.OSImages, func(i Image) dstack.ImageHash { return i.Hash }); ok {
		return bad("os_images: %s is there twice", h)
	}
	for _, s := range d.TCB.Accept {
		if !slices.Contains(statuses, s) {
			return bad("tcb.accept: %.40q is no status that can be accepted", s)
		}
	}
	for _, a := range d.TCB.DenyAdvisories {
		if a == "" || len(a) > maxText {
			return bad("tcb.deny_advisories: %.40q", a)
		}
	}
	for i, m := range d.KMS.Allow {
		whole := m.AppID != nil && m.ComposeHash != nil && m.OSImageHash != nil
		part := m.AppID != nil || m.ComposeHash != nil || m.OSImageHash != nil
		if (m.MRAggregated != nil) == part || part && !whole {
			return bad("kms.allow[%d] must have mr_aggregated, or app_id, compose_hash and os_image_hash", i)
		}
	}
	for i := range d.Apps {
		if err := d.Apps[i].check(d.lease()); err != nil {
			return bad("apps[%d]: %s", i, err)
		}
	}
	if id, ok := repeated(d.Apps, func(a App) dstack.AppID { return a.AppID }); ok {
		return bad("apps: %s is there twice", id)
	}
	return nil
}

func (a *App) check(most time.Duration) error {
	switch {
	case len(a.Name) > maxText:
		return errors.New("name is too long")
	case time.Duration(a.LeaseSeconds)*time.Second > most:
		return errors.New("lease_seconds is more than the document's")
	case a.AnyName && a.Names != nil:
		return errors.New("any_name beside names")
	}
	for _, n := range a.Names {
		if !governance.NameWellFormed(n) {
			return errors.New("names: want a name in lowercase ASCII, *.name, or an IP address")
		}
	}
	for _, c := range a.ComposeHashes {
		if r := c.Revoked; r != nil && (r.At.IsZero() || strings.TrimSpace(r.Reason) == "" || len(r.Reason) > maxText) {
			return errors.New("a revocation must have a time and a reason of at most 256 bytes")
		}
	}
	if h, ok := repeated(a.ComposeHashes, func(c Compose) dstack.ComposeHash { return c.Hash }); ok {
		return errors.New("compose hash " + h.String() + " is there twice")
	}
	return nil
}

// repeated returns the first key that two items have.
func repeated[T any, K comparable](items []T, key func(T) K) (k K, ok bool) {
	seen := make(map[K]bool, len(items))
	for _, it := range items {
		if k = key(it); seen[k] {
			return k, true
		}
		seen[k] = true
	}
	return k, false
}

func completeLaunch(l map[string]Register) bool {
	for _, names := range launchRegisters {
		if len(l) == len(names) && !slices.ContainsFunc(names, func(n string) bool { _, ok := l[n]; return !ok }) {
			return true
		}
	}
	return false
}

// lease is the document's lease.
func (d *Document) lease() time.Duration {
	if d.LeaseSeconds == 0 {
		return MaxLease
	}
	return time.Duration(d.LeaseSeconds) * time.Second
}
