// SPDX-License-Identifier: Apache-2.0

package keys

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"

	"github.com/dstack-go/dstack/internal/fault"
)

// MaxAppKeys bounds .appkeys.json in bytes.
const MaxAppKeys = 256 << 10

// AppKeys is what a key provider gives an app: .appkeys.json.
type AppKeys struct {
	Disk DiskKey
	// Env is zero with every provider but a KMS.
	Env EnvKey
	App AppKey
	// AppSignature is the KMS root's recoverable signature over the app key, 65
	// bytes r ‖ s ‖ v; empty with every provider but a KMS.
	AppSignature []byte
	// GatewayAppID says which gateways are the KMS's own: hexadecimal app ids,
	// separated by commas, or empty.
	GatewayAppID string
	// CACert is PEM: the KMS's root, or the app's own root with other providers.
	CACert   string
	Provider Provider
}

// Kinds of [Provider].
const (
	None  = "none"
	Local = "local"
	TPM   = "tpm"
	KMS   = "kms"
)

// Provider says where the keys are from, with what is needed to have certificates
// signed. The zero value is no provider.
type Provider struct {
	Kind string // one of the constants

	// CAKey is the key of AppKeys.CACert, PEM of PKCS #8; not for KMS. Secret.
	CAKey []byte
	// MR is MRENCLAVE of a Local provider, 32 bytes.
	MR []byte
	// SPKI is the DER SubjectPublicKeyInfo of the KMS's root CA, or of the TPM
	// provider's key.
	SPKI []byte
	// URL is where the KMS answers, ending in /prpc.
	URL string
	// TempCAKey and TempCACert sign RA-TLS client certificates for the KMS, PEM.
	// The KMS gives the key to anyone: it proves nothing (spec/kms.md §3.1).
	TempCAKey  []byte
	TempCACert string
}

// ID identifies the provider: what key_provider_id pins. Empty for none and tpm.
func (p Provider) ID() []byte {
	switch p.Kind {
	case Local:
		return p.MR
	case KMS:
		return p.SPKI
	}
	return nil
}

// eventNames is how the event key-provider calls the kinds (spec/guest-os.md §5.1).
var eventNames = map[string]string{None: "none", Local: "local-sgx", TPM: "tpm", KMS: "kms"}

// Event is the payload of the event key-provider. Field order and compactness are
// measured (spec/attestation.md §5.4).
func (p Provider) Event() ([]byte, error) {
	name, ok := eventNames[p.Kind]
	if !ok {
		return nil, fmt.Errorf("no event for the key provider %q", p.Kind)
	}
	return fmt.Appendf(nil, `{"name":%q,"id":%q}`, name, hex.EncodeToString(p.ID())), nil
}

// Wipe overwrites every secret.
func (k *AppKeys) Wipe() {
	k.Disk.Wipe()
	k.Env.Wipe()
	k.App.Wipe()
	clear(k.Provider.CAKey)
	clear(k.Provider.TempCAKey)
}

// ForAgent returns a copy with the secrets that the agent has a use for: neither
// the disk's nor the environment's.
func (k *AppKeys) ForAgent() *AppKeys {
	c := *k
	c.Disk, c.Env = DiskKey{}, EnvKey{}
	c.App = k.App.Clone()
	c.Provider.CAKey = bytes.Clone(k.Provider.CAKey)
	c.Provider.TempCAKey = bytes.Clone(k.Provider.TempCAKey)
	return &c
}

// The file as upstream writes it: byte strings in lowercase hexadecimal, the
// provider tagged by its name.
type (
	fileJSON struct {
		Disk         string                     `json:"disk_crypt_key"`
		Env          string                     `json:"env_crypt_key"`
		App          string                     `json:"k256_key"`
		AppSignature string                     `json:"k256_signature"`
		GatewayAppID string                     `json:"gateway_app_id"`
		CACert       string                     `json:"ca_cert"`
		Provider     map[string]json.RawMessage `json:"key_provider"`
	}
	seedJSON struct {
		Key    string `json:"key"`
		MR     string `json:"mr,omitempty"`
		Pubkey string `json:"pubkey,omitempty"`
	}
	kmsJSON struct {
		URL        string `json:"url"`
		Pubkey     string `json:"pubkey"`
		TempCAKey  string `json:"tmp_ca_key"`
		TempCACert string `json:"tmp_ca_cert"`
	}
)

var tags = map[string]string{None: "None", Local: "Local", TPM: "Tpm", KMS: "Kms"}

// Encode returns .appkeys.json. The result is secret; the caller wipes it.
func (k *AppKeys) Encode() ([]byte, error) {
	tag, ok := tags[k.Provider.Kind]
	if !ok {
		return nil, fmt.Errorf("encode keys of the provider %q", k.Provider.Kind)
	}
	p := k.Provider
	var inner any = seedJSON{Key: string(p.CAKey), MR: hex.EncodeToString(p.MR), Pubkey: hex.EncodeToString(p.SPKI)}
	if p.Kind == KMS {
		inner = kmsJSON{URL: p.URL, Pubkey: hex.EncodeToString(p.SPKI), TempCAKey: string(p.TempCAKey), TempCACert: p.TempCACert}
	}
	body, err := json.Marshal(inner)
	if err != nil {
		return nil, err
	}
	return json.Marshal(fileJSON{
		Disk: hex.EncodeToString(k.Disk.Bytes()), Env: hex.EncodeToString(k.Env.Bytes()), App: hex.EncodeToString(k.App.Bytes()),
		AppSignature: hex.EncodeToString(k.AppSignature), GatewayAppID: k.GatewayAppID, CACert: k.CACert,
		Provider: map[string]json.RawMessage{tag: body},
	})
}

// Parse reads .appkeys.json. Code app_keys_malformed.
func Parse(data []byte) (*AppKeys, error) {
	k, err := parse(data)
	if err != nil {
		return nil, fault.Wrap(err, "app_keys_malformed", "the app's keys")
	}
	return k, nil
}

func parse(data []byte) (*AppKeys, error) {
	if len(data) > MaxAppKeys {
		return nil, fmt.Errorf("%d bytes, more than %d", len(data), MaxAppKeys)
	}
	var f fileJSON
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, err
	}
	k := &AppKeys{GatewayAppID: f.GatewayAppID, CACert: f.CACert}
	var err error
	field := func(name, text string, sizes ...int) []byte {
		b, e := hex.DecodeString(text)
		if e == nil {
			e = fmt.Errorf("%d bytes", len(b))
			for _, n := range sizes {
				if len(b) == n || n < 0 {
					e = nil
				}
			}
		}
		if e != nil && err == nil {
			err = fmt.Errorf("%s: %w", name, e)
		}
		return b
	}
	set := func(b []byte, put func([]byte) error) {
		if len(b) > 0 && err == nil {
			err = put(b)
		}
		clear(b)
	}
	set(field("disk_crypt_key", f.Disk, 0, Size), func(b []byte) (e error) { k.Disk, e = NewDiskKey(b); return })
	set(field("env_crypt_key", f.Env, 0, Size), func(b []byte) (e error) { k.Env, e = NewEnvKey(b); return })
	set(field("k256_key", f.App, Size), func(b []byte) (e error) { k.App, e = NewAppKey(b); return })
	k.AppSignature = field("k256_signature", f.AppSignature, 0, 65)
	if err != nil {
		return nil, err
	}
	if len(f.Provider) != 1 {
		return nil, fmt.Errorf("key_provider has %d kinds, not 1", len(f.Provider))
	}
	for kind, tag := range tags {
		body, ok := f.Provider[tag]
		if !ok {
			continue
		}
		k.Provider.Kind = kind
		if kind == KMS {
			var p kmsJSON
			if err := json.Unmarshal(body, &p); err != nil {
				return nil, fmt.Errorf("key_provider: %w", err)
			}
			k.Provider.URL, k.Provider.TempCACert, k.Provider.TempCAKey = p.URL, p.TempCACert, []byte(p.TempCAKey)
			k.Provider.SPKI = field("key_provider.pubkey", p.Pubkey, -1)
			return k, err
		}
		var p seedJSON
		if err := json.Unmarshal(body, &p); err != nil {
			return nil, fmt.Errorf("key_provider: %w", err)
		}
		if block, _ := pem.Decode([]byte(p.Key)); block == nil {
			return nil, fmt.Errorf("key_provider.key is not PEM")
		}
		k.Provider.CAKey = []byte(p.Key)
		k.Provider.MR = field("key_provider.mr", p.MR, 0, 32)
		k.Provider.SPKI = field("key_provider.pubkey", p.Pubkey, -1)
		return k, err
	}
	return nil, fmt.Errorf("key_provider has an unknown kind")
}
