// SPDX-License-Identifier: Apache-2.0

// Package envelope is the encrypted environment of an app: variables that the host
// carries and cannot read.
//
// There are two forms. Upstream's ([SealV1]) is encrypted to the app's public key and
// says nothing of who wrote it: whoever has that key, the host included, can replace
// it (threats.md J03). Ours ([Seal]) is signed by a deployer whom the measured
// manifest names, for one app and one manifest, with a version that only rises.
//
// [Opening.Open] takes both, but only the second where the manifest has env_signers.
// A guest remembers the highest version on its sealed disk; the first boot of an
// instance has nothing to remember and takes any that is signed.
//
// Attacker-controlled: every byte of an envelope. Trusted: the key it is opened
// with, the manifest. Values of variables end up in strings, which cannot be wiped.
//
// Implements spec/kms.md §4.2 and spec/guest-os.md §6.
//
// # The second form
//
//	16  magic "dstack-env-v2", zeros
//	 4  key epoch, big-endian
//	 8  version, big-endian
//	32  compose hash of the manifest it is for
//	32  Ed25519 public key of the signer
//	64  its signature
//	32  HPKE encapsulated key
//	 n  HPKE ciphertext
//
// HPKE is RFC 9180 base mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and
// AES-256-GCM; info is LP("dstack-env-v2") ‖ LP(app id) ‖ LP(epoch). The signature is
// over LP("dstack-env-v2 signature") ‖ LP(app id) ‖ LP(compose hash) ‖ LP(epoch) ‖
// LP(version) ‖ LP(encapsulated key) ‖ LP(ciphertext), where LP puts the length in
// front, four bytes big-endian.
package envelope

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ed25519"
	"crypto/hpke"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/manifest"
)

// Limits (spec/kms.md §4.2).
const (
	MaxSize      = 4 << 20 // of an envelope, in bytes
	MaxVariables = 1024
	MaxValue     = 128 << 10 // bytes
	MaxTotal     = 1 << 20   // bytes of all names and values
)

const (
	keySize   = 32
	nonceSize = 12
	tagSize   = 16

	magic  = "dstack-env-v2\x00\x00\x00"
	header = len(magic) + 4 + 8 + dstack.ComposeHashSize + ed25519.PublicKeySize + ed25519.SignatureSize + keySize
)

// Binding says what an envelope is for.
type Binding struct {
	App     dstack.AppID
	Compose dstack.ComposeHash
	Version uint64 // 1 or more; higher than the one before
	Epoch   uint32 // of the app's key; 0 unless the KMS says otherwise
}

// PublicKey returns the X25519 public key of an app's environment key.
func PublicKey(key keys.EnvKey) ([]byte, error) {
	private, err := ecdh.X25519().NewPrivateKey(key.Bytes())
	if err != nil {
		return nil, err
	}
	return private.PublicKey().Bytes(), nil
}

// Seal encrypts variables to the app's public key (X25519, 32 bytes) and signs them.
// Names that a guest of ours refuses are refused here: codes env_name,
// env_name_denied, env_too_large.
func Seal(public []byte, b Binding, signer ed25519.PrivateKey, variables map[string]string) ([]byte, error) {
	for _, name := range slices.Sorted(maps.Keys(variables)) {
		if err := denied(name); err != nil {
			return nil, err
		}
	}
	plain, err := encode(variables)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	if b.Version == 0 {
		return nil, errors.New("envelope: version 0")
	}
	to, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("the app's public key: %w", err)
	}
	enc, sender, err := hpke.NewSender(to, hpke.HKDFSHA256(), hpke.AES256GCM(), b.info())
	if err != nil {
		return nil, err
	}
	ct, err := sender.Seal(nil, plain)
	if err != nil {
		return nil, err
	}
	out := []byte(magic)
	out = binary.BigEndian.AppendUint32(out, b.Epoch)
	out = binary.BigEndian.AppendUint64(out, b.Version)
	out = append(out, b.Compose[:]...)
	out = append(out, signer.Public().(ed25519.PublicKey)...)
	out = append(out, ed25519.Sign(signer, b.signed(enc, ct))...)
	out = append(out, enc...)
	return append(out, ct...), nil
}

// SealV1 encrypts variables as upstream's clients do, for guests that know no other
// form: nobody vouches for them. Codes env_name, env_too_large.
func SealV1(public []byte, variables map[string]string) ([]byte, error) {
	plain, err := encode(variables)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	to, err := ecdh.X25519().NewPublicKey(public)
	if err != nil {
		return nil, err
	}
	ephemeral, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	aead, err := v1AEAD(ephemeral, to)
	if err != nil {
		return nil, err
	}
	out := append(ephemeral.PublicKey().Bytes(), make([]byte, nonceSize)...)
	if _, err := rand.Read(out[keySize:]); err != nil {
		return nil, err
	}
	return aead.Seal(out, out[keySize:], plain, nil), nil
}

// v1AEAD keys AES-256-GCM by the raw shared secret; ECDH itself refuses one that is
// all zeros.
func v1AEAD(private *ecdh.PrivateKey, public *ecdh.PublicKey) (cipher.AEAD, error) {
	shared, err := private.ECDH(public)
	if err != nil {
		return nil, err
	}
	defer clear(shared)
	block, err := aes.NewCipher(shared)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// Opening is what a guest knows when it opens an envelope.
type Opening struct {
	Key     keys.EnvKey
	App     dstack.AppID
	Compose dstack.ComposeHash
	Epoch   uint32
	// Signers are env_signers of the manifest. With any, only an envelope that one of
	// them signed is opened.
	Signers [][]byte
	// MinVersion is the highest version seen before.
	MinVersion uint64
	// Allowed are allowed_envs of the manifest: other variables are left out.
	Allowed []string
	// Strict refuses names by which a variable could change what runs. Without it
	// they pass, as upstream lets them.
	Strict bool
}

// Opened is the content of an envelope.
type Opened struct {
	Variables map[string]string
	Version   uint64   // 0: the first form, which has none
	Skipped   []string // names that the manifest does not allow, sorted
}

// Open decrypts an envelope. Codes: env_too_large, env_malformed, env_decrypt (not for
// this key, or altered), env_unsigned, env_signer, env_signature, env_binding (for
// another manifest, or key epoch), env_rollback, env_name, env_name_denied.
func (o Opening) Open(data []byte) (*Opened, error) {
	if len(data) > MaxSize {
		return nil, fault.New("env_too_large", "the encrypted environment has %d bytes, more than %d", len(data), MaxSize)
	}
	out := new(Opened)
	var plain []byte
	var err error
	switch {
	case bytes.HasPrefix(data, []byte(magic)):
		plain, out.Version, err = o.openV2(data)
	case len(o.Signers) > 0:
		return nil, fault.New("env_unsigned", "the manifest names who may write the environment, and nobody signed this one").
			WithFix("deploy again with dstack, which signs it")
	default:
		plain, err = o.openV1(data)
	}
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	all, err := decode(plain)
	if err != nil {
		return nil, err
	}
	out.Variables = map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !slices.Contains(o.Allowed, name) {
			out.Skipped = append(out.Skipped, name)
			continue
		}
		if o.Strict {
			if err := denied(name); err != nil {
				return nil, err
			}
		}
		out.Variables[name] = all[name]
	}
	return out, nil
}

func (o Opening) openV1(data []byte) ([]byte, error) {
	if len(data) < keySize+nonceSize+tagSize {
		return nil, fault.New("env_malformed", "the encrypted environment has %d bytes, at least %d are needed", len(data), keySize+nonceSize+tagSize)
	}
	private, err := ecdh.X25519().NewPrivateKey(o.Key.Bytes())
	if err != nil {
		return nil, undecryptable(err)
	}
	public, err := ecdh.X25519().NewPublicKey(data[:keySize])
	if err != nil {
		return nil, undecryptable(err)
	}
	aead, err := v1AEAD(private, public)
	if err != nil {
		return nil, undecryptable(err)
	}
	plain, err := aead.Open(nil, data[keySize:keySize+nonceSize], data[keySize+nonceSize:], nil)
	if err != nil {
		return nil, undecryptable(err)
	}
	return plain, nil
}

func undecryptable(err error) error {
	return fault.Wrap(err, "env_decrypt", "the environment is not encrypted to this app's key, or it was altered").
		WithFix("deploy again: variables are encrypted to one app's key of one KMS")
}

func (o Opening) openV2(data []byte) (plain []byte, version uint64, err error) {
	if len(data) < header+tagSize {
		return nil, 0, fault.New("env_malformed", "the encrypted environment has %d bytes, at least %d are needed", len(data), header+tagSize)
	}
	rest := data[len(magic):]
	take := func(n int) []byte {
		b := rest[:n:n]
		rest = rest[n:]
		return b
	}
	b := Binding{App: o.App}
	b.Epoch = binary.BigEndian.Uint32(take(4))
	b.Version = binary.BigEndian.Uint64(take(8))
	b.Compose = dstack.ComposeHash(take(dstack.ComposeHashSize))
	signer, signature, enc, ct := take(ed25519.PublicKeySize), take(ed25519.SignatureSize), take(keySize), rest
	if len(o.Signers) > 0 && !slices.ContainsFunc(o.Signers, func(s []byte) bool { return bytes.Equal(s, signer) }) {
		return nil, 0, fault.New("env_signer", "the environment is signed by %x, whom the manifest does not name", signer).
			WithFix("sign it with a key that env_signers of the manifest has")
	}
	// The app id is in what was signed: an envelope for another app fails here.
	if !ed25519.Verify(signer, b.signed(enc, ct), signature) {
		return nil, 0, fault.New("env_signature", "the environment's signature is wrong, or it is for another app than %s", o.App)
	}
	if b.Compose != o.Compose {
		return nil, 0, fault.New("env_binding", "the environment is for the manifest %s, and this is %s", b.Compose, o.Compose).
			WithFix("deploy the environment again with the new manifest")
	}
	if b.Epoch != o.Epoch {
		return nil, 0, fault.New("env_binding", "the environment is for epoch %d of the app's key, and this is %d", b.Epoch, o.Epoch)
	}
	if b.Version < o.MinVersion || b.Version == 0 {
		return nil, 0, fault.New("env_rollback", "the environment has version %d, and this instance had version %d before", b.Version, o.MinVersion).
			WithFix("the host gave an older one; deploy again")
	}
	private, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(o.Key.Bytes())
	if err != nil {
		return nil, 0, undecryptable(err)
	}
	recipient, err := hpke.NewRecipient(enc, private, hpke.HKDFSHA256(), hpke.AES256GCM(), b.info())
	if err != nil {
		return nil, 0, undecryptable(err)
	}
	if plain, err = recipient.Open(nil, ct); err != nil {
		return nil, 0, undecryptable(err)
	}
	return plain, b.Version, nil
}

func (b Binding) info() []byte {
	return lp([]byte("dstack-env-v2"), b.App[:], binary.BigEndian.AppendUint32(nil, b.Epoch))
}

func (b Binding) signed(enc, ct []byte) []byte {
	return lp([]byte("dstack-env-v2 signature"), b.App[:], b.Compose[:], binary.BigEndian.AppendUint32(nil, b.Epoch),
		binary.BigEndian.AppendUint64(nil, b.Version), enc, ct)
}

// lp joins parts, each behind its length: no two lists of parts have one encoding.
func lp(parts ...[]byte) []byte {
	var out []byte
	for _, p := range parts {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(p))), p...)
	}
	return out
}

func denied(name string) error {
	if manifest.DeniedEnv(name) {
		return fault.New("env_name_denied", "a variable called %s could change what runs instead of what it works on", name).
			WithFix("use another name, and map it in the compose file: environment: {%s: ${OTHER_NAME}}", name)
	}
	return nil
}

// document is the plaintext: upstream's.
type document struct {
	Env []entry `json:"env"`
}

type entry struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

func encode(variables map[string]string) ([]byte, error) {
	d := document{Env: []entry{}}
	for _, name := range slices.Sorted(maps.Keys(variables)) {
		d.Env = append(d.Env, entry{name, variables[name]})
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}

// decode reads the plaintext; of a name that occurs twice the last value counts, as
// upstream has it.
func decode(plain []byte) (map[string]string, error) {
	var d document
	dec := json.NewDecoder(bytes.NewReader(plain))
	err := dec.Decode(&d)
	if err == nil {
		if _, trailing := dec.Token(); trailing != io.EOF {
			err = errors.New("there is more after the document")
		}
	}
	if err != nil {
		// What the decoder says may quote the plaintext.
		return nil, fault.New("env_malformed", "the decrypted environment is not a document of variables")
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, e := range d.Env {
		out[e.Key] = e.Value
	}
	return out, nil
}

func (d document) check() error {
	tooLarge := func(format string, args ...any) error {
		return fault.New("env_too_large", format, args...).WithFix("give the app large data in another way")
	}
	if len(d.Env) > MaxVariables {
		return tooLarge("%d variables, more than %d", len(d.Env), MaxVariables)
	}
	total := 0
	for _, e := range d.Env {
		if err := manifest.CheckEnvName(e.Key); err != nil {
			return err
		}
		if len(e.Value) > MaxValue {
			return tooLarge("the value of %s has %d bytes, more than %d", e.Key, len(e.Value), MaxValue)
		}
		if !utf8.ValidString(e.Value) {
			return fault.New("env_malformed", "the value of %s is not UTF-8", e.Key).WithFix("encode it, in base64 for example")
		}
		total += len(e.Key) + len(e.Value)
	}
	if total > MaxTotal {
		return tooLarge("variables of %d bytes, more than %d", total, MaxTotal)
	}
	return nil
}
