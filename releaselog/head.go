// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/transparency-dev/merkle/proof"
	"golang.org/x/mod/sumdb/note"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/fault"
)

// Purpose is what the root CA key signs a log's key for: custody.PurposeReleaseLog.
const Purpose = "dstack-release-log-v1"

// AttestedMessage returns what is signed to vouch for a log's key, whose verifier key
// as signed notes spell it is document: Purpose, a newline, document. The signature
// is ECDSA over P-256 with SHA-256, in ASN.1.
func AttestedMessage(document []byte) []byte {
	return append([]byte(Purpose+"\n"), document...)
}

// Limits of what arrives.
const (
	maxCheckpoint = 2048 // room for the signatures of a dozen witnesses
	maxLogKey     = 256
	maxSignature  = 128
	maxSPKI       = 256
	maxHeadFile   = 8 << 10
	maxProof      = 64 // hashes
	maxSize       = 1 << 48
)

// Head is a signed head of a log whose key a root vouches for: verified, or the zero
// Head, which every function refuses. It carries what others need to verify it again.
type Head struct {
	spki, checkpoint, logKey, logKeySignature string

	name string
	size uint64
	root Hash
}

func (h Head) IsZero() bool { return h.checkpoint == "" }

// Log is the name of the log: dstack-kms/<first 8 bytes of the SHA-256 of the root CA's
// SubjectPublicKeyInfo>/<8 random bytes>, in hexadecimal.
func (h Head) Log() string { return h.name }

// Size is the number of entries.
func (h Head) Size() uint64 { return h.size }

// Root is the Merkle tree hash (RFC 6962 §2.1).
func (h Head) Root() Hash { return h.root }

// SPKI is the root CA key by which the head verified, DER.
func (h Head) SPKI() []byte { return []byte(h.spki) }

func (h Head) String() string { return fmt.Sprintf("%s with %d entries, %s", h.name, h.size, h.root) }

// Wire is the head as replies carry it.
func (h Head) Wire() *kmsapi.LogHead {
	return &kmsapi.LogHead{Checkpoint: h.checkpoint, LogKey: h.logKey, LogKeySignature: []byte(h.logKeySignature)}
}

// headDocument is a head as files hold it and people exchange it.
type headDocument struct {
	RootCA          []byte `json:"root_ca"` // DER SubjectPublicKeyInfo
	Checkpoint      string `json:"checkpoint"`
	LogKey          string `json:"log_key"`
	LogKeySignature []byte `json:"log_key_signature"`
}

func (h Head) document() headDocument {
	return headDocument{[]byte(h.spki), h.checkpoint, h.logKey, []byte(h.logKeySignature)}
}

func (d headDocument) verify() (Head, error) {
	return VerifyHead(&kmsapi.LogHead{Checkpoint: d.Checkpoint, LogKey: d.LogKey, LogKeySignature: d.LogKeySignature}, d.RootCA)
}

// MarshalJSON is what [ParseHead] reads.
func (h Head) MarshalJSON() ([]byte, error) { return json.Marshal(h.document()) }

// ParseHead returns a head from its JSON form, verified as [VerifyHead] does.
func ParseHead(data, rootSPKI []byte) (Head, error) {
	var d headDocument
	if len(data) > maxHeadFile {
		return Head{}, fault.New("release_log_head", "a head of %d bytes", len(data))
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil || dec.More() {
		return Head{}, fault.New("release_log_head", "the saved head of the release log is no head (%v)", err)
	}
	if !bytes.Equal(d.RootCA, rootSPKI) {
		return Head{}, fault.New("release_log_key", "the saved head of the release log belongs to another root")
	}
	return d.verify()
}

// VerifyHead returns the head that a reply carries, if the root CA key (DER
// SubjectPublicKeyInfo, P-256) vouches for the log's key, and that key signed it.
//
// Codes: release_log_missing (none there), release_log_key (the root does not vouch for
// the log's key), release_log_head (malformed, or not signed by that key).
func VerifyHead(wire *kmsapi.LogHead, rootSPKI []byte) (Head, error) {
	if wire == nil {
		return Head{}, fault.New("release_log_missing", "the KMS's reply has no head of its release log")
	}
	if len(wire.Checkpoint) > maxCheckpoint || len(wire.LogKey) > maxLogKey || len(wire.LogKeySignature) > maxSignature || len(rootSPKI) > maxSPKI {
		return Head{}, fault.New("release_log_head", "the head of the release log is too long")
	}
	public, err := x509.ParsePKIXPublicKey(rootSPKI)
	root, ok := public.(*ecdsa.PublicKey)
	if err != nil || !ok || root.Curve != elliptic.P256() {
		return Head{}, fault.New("release_log_key", "the KMS's root CA key is no P-256 key")
	}
	digest := sha256.Sum256(AttestedMessage([]byte(wire.LogKey)))
	if !ecdsa.VerifyASN1(root, digest[:], wire.LogKeySignature) {
		return Head{}, fault.New("release_log_key", "the KMS's root does not vouch for the key of the release log")
	}
	verifier, err := note.NewVerifier(wire.LogKey)
	if err != nil {
		return Head{}, fault.Wrap(err, "release_log_key", "read the key of the release log")
	}
	if !logName.MatchString(verifier.Name()) || !strings.HasPrefix(verifier.Name(), namePrefix(rootSPKI)) {
		return Head{}, fault.New("release_log_key", "%.80q is not the name of a release log of this root", verifier.Name())
	}
	signed, err := note.Open([]byte(wire.Checkpoint), note.VerifierList(verifier))
	if err != nil {
		return Head{}, fault.Wrap(err, "release_log_head", "verify the head of the release log %s", verifier.Name())
	}
	h := Head{spki: string(rootSPKI), checkpoint: wire.Checkpoint, logKey: wire.LogKey, logKeySignature: string(wire.LogKeySignature), name: verifier.Name()}
	if h.size, h.root, err = parseCheckpoint(signed.Text, h.name); err != nil {
		return Head{}, err
	}
	return h, nil
}

var logName = regexp.MustCompile(`^dstack-kms/[0-9a-f]{16}/[0-9a-f]{16}$`)

func namePrefix(rootSPKI []byte) string {
	sum := sha256.Sum256(rootSPKI)
	return fmt.Sprintf("dstack-kms/%x/", sum[:8])
}

// checkpointText is the body of a C2SP tlog-checkpoint without extensions.
func checkpointText(name string, size uint64, root Hash) string {
	return fmt.Sprintf("%s\n%d\n%s\n", name, size, base64.StdEncoding.EncodeToString(root[:]))
}

func parseCheckpoint(text, name string) (size uint64, root Hash, err error) {
	lines := strings.Split(text, "\n")
	if len(lines) < 4 {
		return 0, Hash{}, fault.New("release_log_head", "the checkpoint of %s has fewer than 3 lines", name)
	}
	size, err = strconv.ParseUint(lines[1], 10, 64)
	sum, err2 := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || err2 != nil || size > maxSize || len(sum) != len(root) {
		return 0, Hash{}, fault.New("release_log_head", "the checkpoint of %s has no size or no root", name)
	}
	root = Hash(sum)
	if text != checkpointText(name, size, root) || size == 0 && root != Hash(hasher.EmptyRoot()) {
		return 0, Hash{}, fault.New("release_log_head", "the checkpoint of %s is not spelled as checkpoints are", name)
	}
	return size, root, nil
}

// logKey signs the heads of one log; it is a note.Signer.
type logKey struct {
	note.Verifier
	private ed25519.PrivateKey
}

func (k *logKey) Sign(message []byte) ([]byte, error) {
	return ed25519.Sign(k.private, message), nil
}

// newLogKey returns the signer of a seed, and the text that names its public half.
func newLogKey(name string, seed []byte) (*logKey, string, error) {
	private := ed25519.NewKeyFromSeed(seed)
	text, err := note.NewEd25519VerifierKey(name, private.Public().(ed25519.PublicKey))
	if err != nil {
		return nil, "", err
	}
	verifier, err := note.NewVerifier(text)
	if err != nil {
		return nil, "", err
	}
	return &logKey{verifier, private}, text, nil
}

func (k *logKey) checkpoint(size uint64, root Hash) (string, error) {
	signed, err := note.Sign(&note.Note{Text: checkpointText(k.Name(), size, root)}, k)
	return string(signed), err
}

// VerifyRelease returns what a KMS logged of a grant that it makes, and the log's head,
// if the head verifies and proves the entry to be in the log. The caller compares the
// entry with what it asked for and was given, and has its [Memory] observe the head.
//
// Codes: those of [VerifyHead], release_log_entry, release_log_inclusion, and
// release_log_not_granted, if the entry tells of something else.
func VerifyRelease(release *kmsapi.Release, rootSPKI []byte) (Entry, Head, error) {
	head, err := VerifyHead(release.GetHead(), rootSPKI)
	if err != nil {
		return Entry{}, Head{}, err
	}
	entry, err := ParseEntry(release.Entry)
	if err != nil {
		return Entry{}, Head{}, err
	}
	if !wellFormed(release.Inclusion) ||
		proof.VerifyInclusion(hasher, release.Index, head.size, hasher.HashLeaf(release.Entry), release.Inclusion, head.root[:]) != nil {
		return Entry{}, Head{}, fault.New("release_log_inclusion", "the KMS does not prove that it logged what it gave")
	}
	if entry.Kind != Grant {
		return Entry{}, Head{}, fault.New("release_log_not_granted", "the KMS logged a %s, not that it gave something", entry.Kind)
	}
	return entry, head, nil
}

// wellFormed tells whether something may be a proof.
func wellFormed(hashes [][]byte) bool {
	return len(hashes) <= maxProof && !slices.ContainsFunc(hashes, func(h []byte) bool { return len(h) != len(Hash{}) })
}

// Fork is two heads of one log of which neither was shown to continue the other. With
// as many entries each, or with different keys for the log, the two heads alone are
// proof against the root that vouches for both. Find it in an error by errors.As.
type Fork struct {
	Old Head `json:"old"`
	New Head `json:"new"`
}

func (f *Fork) Error() string { return fmt.Sprintf("%s; %s", f.Old, f.New) }

// Compare holds two heads of one log against each other, as two people do who both
// remember one. The proof (RFC 6962 §2.1.2) leads from the smaller to the larger.
//
// Codes: release_log_fork, with a [Fork]; release_log_other (they are not of one log);
// release_log_missing (a zero Head).
func Compare(a, b Head, consistency [][]byte) error {
	if a.IsZero() || b.IsZero() {
		return fault.New("release_log_missing", "no head of a release log to compare")
	}
	if a.name != b.name || a.spki != b.spki {
		return fault.New("release_log_other", "%s and %s are different logs", a.name, b.name)
	}
	fork := &Fork{a, b}
	if a.size > b.size {
		a, b = b, a
	}
	switch {
	case a.logKey != b.logKey:
		return fault.Wrap(fork, "release_log_fork", "the KMS's root vouches for two keys of one release log")
	case a.size == b.size && a.root != b.root:
		return fault.Wrap(fork, "release_log_fork", "the KMS signed two release logs under one name")
	case a.size == b.size || a.size == 0: // Every log continues the empty one.
		return nil
	}
	if !wellFormed(consistency) || proof.VerifyConsistency(hasher, a.size, b.size, consistency, a.root[:], b.root[:]) != nil {
		return fault.Wrap(fork, "release_log_fork", "the KMS's release log of %d entries was not shown to continue that of %d", b.size, a.size)
	}
	return nil
}
