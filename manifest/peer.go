// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/hex"
	"maps"
	"slices"

	"github.com/dstack-go/dstack"
)

// What happens to running containers when the KMS no longer authorises the instance.
const (
	OnLeaseLossContinue = "continue"
	OnLeaseLossStop     = "stop"
)

// Limits of kms_policy and gateway_policy.
const (
	MaxPeerHashes    = 16      // compose hashes, image hashes and devices, each
	MaxPeerRegisters = 32      // names, and values of one name
	MaxDevRoots      = 1 << 20 // bytes
)

// PeerPolicy says which service the guest believes, by what its evidence shows: whom it
// takes the app's keys from (kms_policy), and to whom it gives the app's traffic
// (gateway_policy). The guest appraises the service before anything else.
type PeerPolicy struct {
	AppID         dstack.AppID         // app_id: the service's own
	ComposeHashes []dstack.ComposeHash // compose_hashes: 1 to 16, any of which it may run
	// OSImageHashes (os_image_hashes) and Registers (register name -> values, any one
	// of which) anchor the system that it runs on; one of them has something.
	OSImageHashes []dstack.ImageHash
	Registers     map[string][][]byte
	Devices       []dstack.DeviceID // devices: the only machines; empty = any
	// DevRoots (dev_roots) is the text of a file of development roots, by which the service's
	// evidence is judged in place of the vendors'. Images for production refuse it.
	DevRoots string
	// RequireSession (require_session; of a KMS) refuses keys over RA-TLS, of which the
	// evidence speaks of a key and not of the connection.
	RequireSession bool
}

// peerPolicy reads kms_policy or gateway_policy.
func (d *decoder) peerPolicy(field string) *PeerPolicy {
	v := d.obj[field]
	if v == nil {
		return nil
	}
	obj, ok := v.(object)
	if !ok {
		d.fail(field, "must be an object, not %s", kind(v))
		return nil
	}
	in := &decoder{obj: obj, prefix: field + "."}
	known := []string{"app_id", "compose_hashes", "os_image_hashes", "devices", "registers", "dev_roots"}
	if field == "kms_policy" {
		known = append(known, "require_session")
	}
	in.only(known...)
	p := &PeerPolicy{DevRoots: in.optionalString("dev_roots"), RequireSession: in.boolean("require_session", false)}
	in.requiredString("app_id")
	copy(p.AppID[:], in.hex("app_id", dstack.AppIDSize))
	p.ComposeHashes = hashes[dstack.ComposeHash](in, "compose_hashes")
	p.OSImageHashes = hashes[dstack.ImageHash](in, "os_image_hashes")
	p.Devices = hashes[dstack.DeviceID](in, "devices")
	p.Registers = in.registers()
	if _, ok := obj["devices"]; ok && len(p.Devices) == 0 {
		in.fail("devices", "is empty: leave it out to accept any machine") // it would read as none
	}
	switch {
	case in.err != nil:
	case p.AppID.IsZero():
		in.fail("app_id", "is zero")
	case len(p.ComposeHashes) == 0:
		in.fail("compose_hashes", "is empty: none could be accepted")
	case len(p.OSImageHashes) == 0 && len(p.Registers) == 0:
		in.fail("os_image_hashes", "is empty, and so is registers: nothing would vouch for the system that it runs on")
	case len(p.DevRoots) > MaxDevRoots:
		in.fail("dev_roots", "has %d bytes, more than %d", len(p.DevRoots), MaxDevRoots)
	}
	d.merge(in)
	return p
}

// hashes reads an array of distinct hashes of 32 bytes.
func hashes[T ~[32]byte](d *decoder, field string) []T {
	texts := d.strings(field)
	if len(texts) > MaxPeerHashes {
		d.fail(field, "has %d elements, more than %d", len(texts), MaxPeerHashes)
		return nil
	}
	var out []T
	for i, text := range texts {
		b, err := hex.DecodeString(text)
		if err != nil || len(b) != 32 {
			d.fail(field, "element %d is not 64 hexadecimal digits", i)
			return nil
		}
		out = append(out, T(b))
	}
	return out
}

func (d *decoder) registers() map[string][][]byte {
	v, ok := d.obj["registers"]
	if !ok {
		return nil
	}
	obj, ok := v.(object)
	if !ok {
		d.fail("registers", "must be an object, not %s", kind(v))
		return nil
	}
	if len(obj) > MaxPeerRegisters {
		d.fail("registers", "has %d names, more than %d", len(obj), MaxPeerRegisters)
		return nil
	}
	in := &decoder{obj: obj, prefix: d.prefix + "registers."}
	out := make(map[string][][]byte, len(obj))
	for _, name := range slices.Sorted(maps.Keys(obj)) {
		if name == "" || len(name) > 32 {
			in.fail(clip(name), "is not the name of a register")
			break
		}
		texts := in.strings(name)
		if len(texts) == 0 || len(texts) > MaxPeerRegisters {
			in.fail(name, "has %d values, not 1 to %d", len(texts), MaxPeerRegisters)
			break
		}
		for i, text := range texts {
			b, err := hex.DecodeString(text)
			if err != nil || len(b) == 0 || len(b) > 64 {
				in.fail(name, "value %d is not a register's in hexadecimal", i)
				break
			}
			out[name] = append(out[name], b)
		}
	}
	d.merge(in)
	return out
}

// document is the policy as a manifest has it.
func (p *PeerPolicy) document() object {
	o := object{"app_id": p.AppID.String(), "compose_hashes": texts(p.ComposeHashes)}
	if len(p.OSImageHashes) > 0 {
		o["os_image_hashes"] = texts(p.OSImageHashes)
	}
	if len(p.Devices) > 0 {
		o["devices"] = texts(p.Devices)
	}
	if len(p.Registers) > 0 {
		registers := object{}
		for name, values := range p.Registers {
			list := []any{}
			for _, v := range values {
				list = append(list, hex.EncodeToString(v))
			}
			registers[name] = list
		}
		o["registers"] = registers
	}
	if p.DevRoots != "" {
		o["dev_roots"] = p.DevRoots
	}
	if p.RequireSession {
		o["require_session"] = true
	}
	return o
}

func texts[T interface{ String() string }](values []T) []any {
	out := make([]any, len(values))
	for i, v := range values {
		out[i] = v.String()
	}
	return out
}
