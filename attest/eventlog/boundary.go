// SPDX-License-Identifier: Apache-2.0

package eventlog

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Names of the events that the guest's init commits, in boot order
// (attestation.md §3.5; StorageNew, EnvVersion and SystemChannelKey are ours).
const (
	SystemPreparing  = "system-preparing"   // empty
	AppIDEvent       = "app-id"             // 20 bytes
	ComposeHashEvent = "compose-hash"       // 32 bytes
	InitScriptHash   = "init-script-hash"   // 32 bytes, up to five times
	GPUPolicyHash    = "gpu-policy-hash"    // 32 bytes
	GPUAttestation   = "gpu-attestation"    // compact JSON
	InstanceIDEvent  = "instance-id"        // 20 bytes or empty
	BootMRDone       = "boot-mr-done"       // empty; end of the launch events
	OSImageHash      = "os-image-hash"      // 32 bytes
	KeyProvider      = "key-provider"       // compact JSON {"name":…,"id":…}
	StorageFS        = "storage-fs"         // ASCII
	StorageNew       = "storage-new"        // empty; ours: a lasting data disk was made in this boot
	EnvVersion       = "env-version"        // uint64, big-endian; ours: of the signed environment in use
	SystemChannelKey = "system-channel-key" // 32 bytes, SHA-256 of the SPKI in DER
	SystemReady      = "system-ready"       // empty; what follows is the application's
)

// MaxInitScripts is how many init-script-hash events a boot may have.
const MaxInitScripts = 5

// reserved describes the events that only init may emit. Rank is the order in
// which they must occur; length is that of the payload, -1 for any.
var reserved = map[string]struct {
	rank, length int
	repeats      int
}{
	SystemPreparing:  {0, 0, 1},
	AppIDEvent:       {1, dstack.AppIDSize, 1},
	ComposeHashEvent: {2, dstack.ComposeHashSize, 1},
	InitScriptHash:   {3, 32, MaxInitScripts},
	GPUPolicyHash:    {4, 32, 1},
	GPUAttestation:   {5, -1, 1},
	InstanceIDEvent:  {6, -1, 1}, // 20 or 0, checked apart
	BootMRDone:       {7, 0, 1},
	OSImageHash:      {8, dstack.ImageHashSize, 1},
	KeyProvider:      {9, -1, 1},
	StorageFS:        {10, -1, 1},
	StorageNew:       {11, 0, 1},
	EnvVersion:       {12, 8, 1},
	SystemChannelKey: {13, 32, 1},
	SystemReady:      {14, 0, 1},
}

// reservedPrefixes are kept for the system: a name that begins with one and is
// not in the table above was made by something that has no right to it, or by a
// newer system whose meaning this verifier cannot know.
var reservedPrefixes = []string{"system-", "dstack-"}

// Reserved reports whether an application may not emit an event of this name.
// A colon ends the name, as it does in the preimage of the first event form.
func Reserved(name string) bool {
	name, _, _ = strings.Cut(name, ":")
	if _, ok := reserved[name]; ok {
		return true
	}
	return slices.ContainsFunc(reservedPrefixes, func(p string) bool { return strings.HasPrefix(name, p) })
}

// Identity is what the guest's init committed to the runtime register.
type Identity struct {
	AppID            dstack.AppID
	ComposeHash      dstack.ComposeHash
	InstanceID       []byte   // 20 bytes, or empty when the app has none
	KeyProvider      string   // raw JSON of the key-provider event, or empty
	StorageFS        string   // such as ext4, or empty
	StorageNew       bool     // whether the lasting data disk was made in this boot
	EnvVersion       uint64   // of the signed environment, or 0
	OSImageHash      []byte   // 32 bytes, or nil when the event is absent
	ChannelKey       []byte   // SHA-256 of the system channel key's SPKI, or nil
	InitScriptHashes [][]byte // 32 bytes each
	GPUPolicyHash    []byte   // 32 bytes, or nil
	GPUAttestation   string   // raw JSON, or empty
	SystemReady      bool     // whether the boot was over
}

// Boundary reads the identity from a log, which the caller must have replayed.
// It looks at runtime events only, and demands that each boundary, boot-mr-done
// and system-ready, occurs exactly once, that identity events occur once, in
// boot order and before their boundary, and that nothing after system-ready
// bears a reserved name (threats.md B09).
func Boundary(events []Event) (Identity, error) { return boundary(events, true) }

// LaunchIdentity reads the identity from the log of a guest that has not got its
// keys yet: boot-mr-done is demanded, system-ready may be absent.
func LaunchIdentity(events []Event) (Identity, error) { return boundary(events, false) }

func boundary(events []Event, ready bool) (Identity, error) {
	var id Identity
	count := map[string]int{}
	last, lastName := -1, ""
	for i, e := range events {
		if err := e.Check(); err != nil {
			return Identity{}, err
		}
		if !e.IsRuntime() {
			continue
		}
		if e.Name == SystemReady || e.Name == BootMRDone {
			if count[e.Name] > 0 {
				return Identity{}, fault.New("log_boundary_duplicate", "event %q occurs again as event %d", e.Name, i)
			}
		}
		if id.SystemReady {
			if Reserved(e.Name) {
				return Identity{}, fault.New("log_reserved_after_ready", "event %d bears the reserved name %q after system-ready", i, e.Name)
			}
			continue
		}
		if e.Version == 0 && strings.Contains(e.Name, ":") {
			return Identity{}, fault.New("log_name_ambiguous", "event %d before system-ready has a colon in its name %q", i, e.Name)
		}
		spec, known := reserved[e.Name]
		if !known {
			if Reserved(e.Name) {
				return Identity{}, fault.New("log_reserved_unknown", "event %d has the unknown reserved name %q", i, e.Name)
			}
			continue // of an older or newer system; it cannot feed identity
		}
		if count[e.Name]++; count[e.Name] > spec.repeats {
			return Identity{}, fault.New("log_duplicate_event", "event %q occurs %d times, at most %d allowed", e.Name, count[e.Name], spec.repeats)
		}
		if spec.rank < last {
			return Identity{}, fault.New("log_order", "event %d %q comes after %q, the boot order is the reverse", i, e.Name, lastName)
		}
		last, lastName = spec.rank, e.Name
		if n := len(e.Payload); spec.length >= 0 && n != spec.length ||
			e.Name == InstanceIDEvent && n != 0 && n != dstack.InstanceIDSize {
			return Identity{}, fault.New("log_payload_length", "event %q has a payload of %d bytes", e.Name, n)
		}
		id.take(e)
	}
	for _, name := range []string{BootMRDone, SystemReady} {
		if count[name] == 0 && (name == BootMRDone || ready) {
			return Identity{}, fault.New("log_boundary_missing", "the event log has no %s event", name)
		}
	}
	for _, name := range []string{AppIDEvent, ComposeHashEvent, InstanceIDEvent} {
		if count[name] == 0 {
			return Identity{}, fault.New("log_identity_missing", "the event log has no %s event before %s", name, BootMRDone)
		}
	}
	return id, nil
}

func (id *Identity) take(e Event) {
	switch e.Name {
	case AppIDEvent:
		copy(id.AppID[:], e.Payload)
	case ComposeHashEvent:
		copy(id.ComposeHash[:], e.Payload)
	case InitScriptHash:
		id.InitScriptHashes = append(id.InitScriptHashes, bytes.Clone(e.Payload))
	case GPUPolicyHash:
		id.GPUPolicyHash = bytes.Clone(e.Payload)
	case GPUAttestation:
		id.GPUAttestation = string(e.Payload)
	case InstanceIDEvent:
		id.InstanceID = bytes.Clone(e.Payload)
	case OSImageHash:
		id.OSImageHash = bytes.Clone(e.Payload)
	case KeyProvider:
		id.KeyProvider = string(e.Payload)
	case StorageFS:
		id.StorageFS = string(e.Payload)
	case StorageNew:
		id.StorageNew = true
	case EnvVersion:
		id.EnvVersion = binary.BigEndian.Uint64(e.Payload)
	case SystemChannelKey:
		id.ChannelKey = bytes.Clone(e.Payload)
	case SystemReady:
		id.SystemReady = true
	}
}
