// SPDX-License-Identifier: Apache-2.0

// Package mrconfig is the launch commitment: what the host tells the TEE, before
// the first instruction of the guest, about the app that is to run.
//
// On TDX it is the 48-byte MRCONFIGID, on SEV-SNP the 32-byte HOST_DATA. The
// host chooses the value, the TEE reports it, and the guest and the verifier
// compare it with what really runs; so it is a commitment, not a measurement.
// A document received from anywhere is attacker-controlled: hash its exact
// bytes, compare the hash with verified evidence, and only then believe it.
// Specification: attestation.md §6.
package mrconfig

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"golang.org/x/crypto/sha3"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Forms of MRCONFIGID: its first byte.
const (
	FormNone = 0
	FormV1   = 1
	FormV2   = 2
	FormV3   = 3
)

// MaxDocument bounds a document in bytes.
const MaxDocument = 64 << 10

// maxScripts is how many init scripts a document may pin.
const maxScripts = 5

// maxKeyProviderID bounds the key provider's identity (a DER SPKI) in bytes.
const maxKeyProviderID = 4 << 10

// keyProviders gives each kind its byte in the second form.
var keyProviders = map[string]byte{"none": 0, "local": 1, "kms": 2, "tpm": 3}

// Document is the third form: what is pinned about an app. Nil pins nothing.
type Document struct {
	AppID         *dstack.AppID
	ComposeHash   dstack.ComposeHash
	GPUPolicyHash []byte // 32 bytes or nil
	// InitScriptHashes are SHA-256 (32 bytes each), at most five, in order. Nil
	// pins nothing; empty but not nil allows no script.
	InitScriptHashes [][]byte
	InstanceID       *dstack.InstanceID
	KeyProvider      string // none, local, kms or tpm
	KeyProviderID    []byte // such as the DER SPKI of the KMS's root; nil pins nothing
}

// Bytes returns the document in RFC 8785 form: keys sorted, no white space,
// lowercase hex.
func (d Document) Bytes() []byte {
	b := []byte{'{'}
	field := func(key, value string) {
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, "%q:%s", key, value)
	}
	quoted := func(v []byte) string { return `"` + hex.EncodeToString(v) + `"` }
	if d.AppID != nil {
		field("app_id", quoted(d.AppID[:]))
	}
	field("compose_hash", quoted(d.ComposeHash[:]))
	if d.GPUPolicyHash != nil {
		field("gpu_policy_hash", quoted(d.GPUPolicyHash))
	}
	if d.InitScriptHashes != nil {
		list := []byte{'['}
		for i, h := range d.InitScriptHashes {
			if i > 0 {
				list = append(list, ',')
			}
			list = append(list, quoted(h)...)
		}
		field("init_script_hashes", string(append(list, ']')))
	}
	if d.InstanceID != nil {
		field("instance_id", quoted(d.InstanceID[:]))
	}
	provider, _ := json.Marshal(d.KeyProvider)
	field("key_provider", string(provider))
	if d.KeyProviderID != nil {
		field("key_provider_id", quoted(d.KeyProviderID))
	}
	field("version", "3")
	return append(b, '}')
}

// wire mirrors the document's JSON. Pointers tell absent from empty.
type wire struct {
	AppID            *string   `json:"app_id"`
	ComposeHash      *string   `json:"compose_hash"`
	GPUPolicyHash    *string   `json:"gpu_policy_hash"`
	InitScriptHashes *[]string `json:"init_script_hashes"`
	InstanceID       *string   `json:"instance_id"`
	KeyProvider      *string   `json:"key_provider"`
	KeyProviderID    *string   `json:"key_provider_id"`
	Version          *int      `json:"version"`
}

// Parse reads a document. Unknown fields, wrong lengths and unknown key
// providers are errors. To compare it with evidence hash the received bytes with
// [IDv3], not the bytes of the parsed document.
func Parse(doc []byte) (Document, error) {
	var w wire
	if err := strictjson.Decode(doc, &w, strictjson.Limits{Size: MaxDocument, Depth: 2}); err != nil {
		return Document{}, fault.Wrap(err, "mr_config_malformed", "launch config document")
	}
	var d Document
	if w.Version != nil && *w.Version != 3 {
		return Document{}, fault.New("mr_config_version", "launch config document has version %d, want 3", *w.Version)
	}
	if w.ComposeHash == nil || w.KeyProvider == nil {
		return Document{}, fault.New("mr_config_malformed", "launch config document lacks compose_hash or key_provider")
	}
	if _, ok := keyProviders[*w.KeyProvider]; !ok {
		return Document{}, fault.New("mr_config_malformed", "launch config document has unknown key_provider %q", *w.KeyProvider)
	}
	d.KeyProvider = *w.KeyProvider
	var app, instance, compose []byte
	for _, f := range []struct {
		name     string
		text     *string
		min, max int
		dst      *[]byte
	}{
		{"app_id", w.AppID, 20, 20, &app},
		{"compose_hash", w.ComposeHash, 32, 32, &compose},
		{"gpu_policy_hash", w.GPUPolicyHash, 32, 32, &d.GPUPolicyHash},
		{"instance_id", w.InstanceID, 20, 20, &instance},
		{"key_provider_id", w.KeyProviderID, 0, maxKeyProviderID, &d.KeyProviderID},
	} {
		if f.text == nil {
			continue
		}
		v, err := decodeHex(*f.text)
		if err != nil {
			return Document{}, fault.Wrap(err, "mr_config_malformed", "%s of the launch config document", f.name)
		}
		if len(v) < f.min || len(v) > f.max {
			return Document{}, fault.New("mr_config_length", "%s of the launch config document has %d bytes, want %d to %d", f.name, len(v), f.min, f.max)
		}
		*f.dst = v
	}
	d.ComposeHash = dstack.ComposeHash(compose)
	if app != nil {
		d.AppID = (*dstack.AppID)(app)
	}
	if instance != nil {
		d.InstanceID = (*dstack.InstanceID)(instance)
	}
	if w.InitScriptHashes != nil {
		if n := len(*w.InitScriptHashes); n > maxScripts {
			return Document{}, fault.New("mr_config_length", "launch config document pins %d init scripts, at most %d allowed", n, maxScripts)
		}
		d.InitScriptHashes = [][]byte{}
		for i, text := range *w.InitScriptHashes {
			v, err := decodeHex(text)
			if err != nil || len(v) != 32 {
				return Document{}, fault.New("mr_config_length", "init_script_hashes[%d] of the launch config document is not 32 bytes of lowercase hex", i)
			}
			d.InitScriptHashes = append(d.InitScriptHashes, v)
		}
	}
	return d, nil
}

// decodeHex takes lowercase only, so that a value has one spelling. The result
// is not nil.
func decodeHex(s string) ([]byte, error) {
	v, err := hex.DecodeString(s)
	if err != nil {
		return nil, err
	}
	if hex.EncodeToString(v) != s {
		return nil, fmt.Errorf("%q is not lowercase hex", s)
	}
	return append([]byte{}, v...), nil
}

// Digest returns D = SHA-256("dstack-mr-config-v3:" ‖ 0x00 ‖ doc), the whole of
// SEV-SNP's HOST_DATA. It takes the document's exact bytes.
func Digest(doc []byte) [32]byte {
	return sha256.Sum256(append([]byte("dstack-mr-config-v3:\x00"), doc...))
}

// IDv3 returns 03 ‖ D ‖ 0¹⁵ over the exact bytes of a document.
func IDv3(doc []byte) dstack.MRConfigID {
	d := Digest(doc)
	return id(FormV3, d[:])
}

// IDv1 returns 01 ‖ compose hash ‖ 0¹⁵.
func IDv1(compose dstack.ComposeHash) dstack.MRConfigID { return id(FormV1, compose[:]) }

// IDv2 returns 02 ‖ Keccak-256(compose hash ‖ app id ‖ kind ‖ key provider id) ‖ 0¹⁵,
// a legacy form on TDX. The kind is none, local, kms or tpm.
func IDv2(compose dstack.ComposeHash, app dstack.AppID, kind string, keyProviderID []byte) (dstack.MRConfigID, error) {
	k, ok := keyProviders[kind]
	if !ok {
		return dstack.MRConfigID{}, fault.New("mr_config_malformed", "unknown key provider kind %q", kind)
	}
	h := sha3.NewLegacyKeccak256()
	h.Write(bytes.Join([][]byte{compose[:], app[:], {k}, keyProviderID}, nil))
	return id(FormV2, h.Sum(nil)), nil
}

func id(form byte, digest []byte) (out dstack.MRConfigID) {
	out[0] = form
	copy(out[1:], digest)
	return out
}

// Form returns the form of an id: FormNone only when all bytes are zero. An
// unknown first byte, or bytes where the form has none, is an error.
func Form(v dstack.MRConfigID) (int, error) {
	if v.IsZero() {
		return FormNone, nil
	}
	if v[0] < FormV1 || v[0] > FormV3 {
		return 0, fault.New("mr_config_form", "MRCONFIGID begins with unknown form %d", v[0])
	}
	if !bytes.Equal(v[33:], make([]byte, 15)) {
		return 0, fault.New("mr_config_form", "MRCONFIGID of form %d does not end in 15 zero bytes", v[0])
	}
	return int(v[0]), nil
}
