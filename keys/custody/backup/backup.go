// SPDX-License-Identifier: Apache-2.0

// Package backup keeps the root keys of a KMS for the day when no KMS is left:
// encrypted to operators of whom a quorum, and nobody less, can restore them.
//
// [Seal] encrypts the roots under a fresh key, shares that key among n operators so
// that m shares give it (Shamir), and seals each share to its operator's X25519 key
// (HPKE, RFC 9180). The result is a text to keep anywhere. To restore, m operators each
// run [Backup.OpenShare] where their key is, and send the share's line to whoever runs
// [Backup.Restore], in an attested VM: that machine sees the roots, and the way to it
// must be as confidential as a share.
//
// Guarantees: fewer than m shares tell nothing of the roots; a share, a header or a
// body that was changed, mixed or repeated is refused with a code; the roots that come
// out have the identity that the header and the caller name.
//
// Not guaranteed: who made a backup. Anyone can seal other roots to the same
// operators, hence the wanted identity is the caller's to know (key_provider_id, the
// chain) and never to take from the backup. A backup holds the key epochs of its day
// (FirstEpoch): erasing them in the KMS does not reach it, destroying the backup or the
// operators' keys does. X25519 does not resist a quantum computer, so that a copy
// kept by an adversary is not safe forever.
//
// Trusted: this process, m operators not to conspire. Attacker-controlled: the
// backup's text and the shares' until their checks hold.
//
// Implements design.md §7; threats.md G01, G09.
package backup

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/custody"
)

// The text of a backup, one field in a line, in this order; byte strings are in
// lowercase hexadecimal:
//
//	dstack-root-backup-v1
//	id <16 random bytes>
//	made <RFC 3339, UTC, seconds>
//	identity <root CA's SubjectPublicKeyInfo, DER> <secp256k1 root, compressed>
//	epoch <first native epoch in it, decimal; 0: none>
//	quorum <m> <n>
//	operator <index from 1> <name> <X25519 key> <commitment> <sealed share>      n times
//	roots <AES-256-GCM of the roots' file>
//
// A share is an evaluation, at its index, of a random polynomial of degree m - 1 over
// the scalars of ristretto255, whose value at 0 is the secret. commitment is SHA-256 of
// "dstack-root-share-v1", id, index (1 byte) and share. The share is sealed by HPKE
// (DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM; base mode, no AAD) with, as
// info, the lines up to and including quorum and its own operator line as far as the
// commitment, without the space after. The key of the roots is HKDF-SHA-256 of the
// secret (32 bytes, little-endian), salt id, info "dstack-root-backup-v1 roots"; its
// nonce is zero, since no other message has that key; its AAD is all lines before.
const (
	version   = "dstack-root-backup-v1"
	rootsInfo = "dstack-root-backup-v1 roots"

	// MaxOperators is the largest n.
	MaxOperators = 16
	// MaxSize bounds a backup's text in bytes.
	MaxSize = 32 << 10

	boxSize  = publicSize + shareSize + 16
	maxRoots = 8 << 10
)

// Backup is what a backup says in the clear. Parse makes one.
type Backup struct {
	ID       [idSize]byte
	Made     time.Time
	Identity custody.Identity // as the one who sealed says
	// FirstEpoch is the first native key epoch that the roots in it give; 0: none.
	FirstEpoch uint64
	Quorum     int        // how many shares restore
	Operators  []Operator // share i is of operator i - 1

	boxes [][]byte
	sums  [][sha256.Size]byte // commitments
	roots []byte
}

// scalars is where shares live: arithmetic modulo the order of ristretto255, which the
// library does in constant time, unlike that of its NIST groups.
var scalars = group.Ristretto255

func suite() (hpke.KDF, hpke.AEAD) { return hpke.HKDFSHA256(), hpke.AES256GCM() }

// Seal encrypts roots to operators of whom m restore them, and returns the backup's
// text. Codes backup_quorum, operator_malformed, root_wiped.
func Seal(r *custody.Roots, operators []Operator, m int) ([]byte, error) {
	n := len(operators)
	if n < 1 || n > MaxOperators || m < 1 || m > n {
		return nil, fault.New("backup_quorum", "%d of %d operators are no quorum: from 1 to n of at most %d", m, n, MaxOperators)
	}
	b := &Backup{Made: time.Now().UTC().Truncate(time.Second), Identity: r.Identity(), Quorum: m, Operators: operators}
	for i, o := range operators {
		if err := o.check(); err != nil {
			return nil, err
		}
		for _, other := range operators[:i] {
			if other.Name == o.Name || bytes.Equal(other.Public, o.Public) {
				return nil, fault.New("backup_quorum", "operators %s and %s have the same name or key: one person would count twice", other.Name, o.Name)
			}
		}
	}
	rand.Read(b.ID[:])
	secret := scalars.RandomNonZeroScalar(rand.Reader)
	shares := make([]*share, n)
	for i, s := range secretsharing.New(rand.Reader, uint(m-1), secret).Share(uint(n)) {
		value, err := s.Value.MarshalBinary()
		if err != nil {
			return nil, err
		}
		shares[i] = &share{backup: b.ID, index: i + 1, value: new([shareSize]byte)}
		copy(shares[i].value[:], value)
		clear(value)
		defer clear(shares[i].value[:])
		b.sums = append(b.sums, shares[i].commitment())
	}
	// Before the roots are read: an erasure in between leaves a header that promises
	// more epochs than there are, and none that keeps silent about one.
	b.FirstEpoch, _ = r.Epochs()
	for i, o := range operators {
		public, err := ecdh.X25519().NewPublicKey(o.Public)
		if err != nil {
			return nil, fault.Wrap(err, "operator_malformed", "operator %s", o.Name)
		}
		to, err := hpke.NewDHKEMPublicKey(public)
		if err != nil {
			return nil, fault.Wrap(err, "operator_malformed", "operator %s", o.Name)
		}
		kdf, aead := suite()
		box, err := hpke.Seal(to, kdf, aead, b.info(i), shares[i].value[:])
		if err != nil { // of a key of small order
			return nil, fault.Wrap(err, "operator_malformed", "operator %s", o.Name)
		}
		b.boxes = append(b.boxes, box)
	}
	aead, err := b.cipher(secret)
	if err != nil {
		return nil, err
	}
	header := b.header()
	err = r.Escrow(func(encoded []byte) error {
		b.roots = aead.Seal(nil, make([]byte, aead.NonceSize()), encoded, header)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b.encode(), nil
}

// cipher returns the AEAD of the roots under a shared secret.
func (b *Backup) cipher(secret group.Scalar) (cipher.AEAD, error) {
	raw, err := secret.MarshalBinary()
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	key, err := hkdf.Key(sha256.New, raw, b.ID[:], rootsInfo, 32)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// preamble is the lines before the operators.
func (b *Backup) preamble() []byte {
	return fmt.Appendf(nil, "%s\nid %x\nmade %s\nidentity %x %x\nepoch %d\nquorum %d %d\n", version, b.ID,
		b.Made.Format(time.RFC3339), b.Identity.CA, b.Identity.K256, b.FirstEpoch, b.Quorum, len(b.Operators))
}

// operator is the line of an operator but for the sealed share.
func (b *Backup) operator(i int) []byte {
	return fmt.Appendf(nil, "operator %d %s %x %x", i+1, b.Operators[i].Name, b.Operators[i].Public, b.sums[i])
}

// info binds a sealed share to the backup and its place in it.
func (b *Backup) info(i int) []byte { return append(b.preamble(), b.operator(i)...) }

func (b *Backup) header() []byte {
	text := b.preamble()
	for i := range b.Operators {
		text = append(text, b.operator(i)...)
		text = fmt.Appendf(text, " %x\n", b.boxes[i])
	}
	return text
}

func (b *Backup) encode() []byte { return fmt.Appendf(b.header(), "roots %x\n", b.roots) }

// Parse reads a backup's text. Nothing in it is to be believed before Restore. Code
// backup_malformed.
func Parse(text []byte) (*Backup, error) {
	b, err := parse(text)
	if err != nil {
		return nil, fault.Wrap(err, "backup_malformed", "the backup of root keys").
			WithFix("use another copy of it")
	}
	return b, nil
}

func parse(text []byte) (*Backup, error) {
	if len(text) > MaxSize {
		return nil, fmt.Errorf("more than %d bytes", MaxSize)
	}
	first, rest, _ := bytes.Cut(text, []byte("\n"))
	if string(first) != version {
		return nil, errors.New("it is of no known version")
	}
	var failed error
	fail := func(format string, args ...any) {
		if failed == nil {
			failed = fmt.Errorf(format, args...)
		}
	}
	line := func(name string, n int) []string {
		var l []byte
		l, rest, _ = bytes.Cut(rest, []byte("\n"))
		var parts []string
		for p := range bytes.SplitSeq(l, []byte(" ")) {
			parts = append(parts, string(p))
		}
		if parts[0] != name || len(parts) != n+1 {
			fail("its field %s is missing or has not %d values", name, n)
			return make([]string, n)
		}
		return parts[1:]
	}
	number := func(s string, to uint64) uint64 {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil || v > to {
			fail("%.30q is no number up to %d", s, to)
			return 0
		}
		return v
	}
	unhex := func(s string, from, to int) []byte {
		v, err := hex.DecodeString(s)
		if err != nil || len(v) < from || len(v) > to {
			fail("a field is not %d to %d bytes in hexadecimal", from, to)
			return make([]byte, from)
		}
		return v
	}
	b := &Backup{}
	copy(b.ID[:], unhex(line("id", 1)[0], idSize, idSize))
	made, err := time.Parse(time.RFC3339, line("made", 1)[0])
	if err != nil {
		fail("it has no time")
	}
	b.Made = made.UTC()
	identity := line("identity", 2)
	b.Identity = custody.Identity{CA: unhex(identity[0], 1, 256), K256: unhex(identity[1], 33, 33)}
	b.FirstEpoch = number(line("epoch", 1)[0], 1<<64-1)
	quorum := line("quorum", 2)
	m, n := number(quorum[0], MaxOperators), number(quorum[1], MaxOperators)
	if m < 1 || m > n {
		fail("%d of %d is no quorum", m, n)
	}
	b.Quorum = int(m)
	for i := uint64(0); i < n && failed == nil; i++ {
		v := line("operator", 5)
		if number(v[0], MaxOperators) != i+1 {
			fail("its operators are not in order")
		}
		o := Operator{Name: v[1], Public: unhex(v[2], publicSize, publicSize)}
		if err := o.check(); err != nil {
			fail("%w", err)
		}
		b.Operators = append(b.Operators, o)
		b.sums = append(b.sums, [sha256.Size]byte(unhex(v[3], sha256.Size, sha256.Size)))
		b.boxes = append(b.boxes, unhex(v[4], boxSize, boxSize))
	}
	b.roots = unhex(line("roots", 1)[0], 1, maxRoots)
	if failed != nil {
		return nil, failed
	}
	if !bytes.Equal(b.encode(), text) {
		return nil, errors.New("it is not in its one form")
	}
	return b, nil
}

// OpenShare opens the share of the operator whose key it is. Codes operator_unknown,
// backup_altered.
func (b *Backup) OpenShare(key *Key) (Share, error) {
	public := key.Public()
	i := slices.IndexFunc(b.Operators, func(o Operator) bool { return bytes.Equal(o.Public, public) })
	if i < 0 {
		return Share{}, fault.New("operator_unknown", "the backup has no share for this key").
			WithFix("use the key that was an operator's when the backup was made")
	}
	private, err := hpke.NewDHKEMPrivateKey(key.h.k)
	if err != nil {
		return Share{}, err
	}
	kdf, aead := suite()
	value, err := hpke.Open(private, kdf, aead, b.info(i), b.boxes[i])
	if err != nil {
		return Share{}, fault.Wrap(err, "backup_altered", "open the share of operator %s", b.Operators[i].Name).
			WithFix("use another copy of the backup")
	}
	defer clear(value)
	s := &share{backup: b.ID, index: i + 1, value: new([shareSize]byte)}
	if len(value) != shareSize {
		return Share{}, fault.New("backup_altered", "the share of operator %s has %d bytes, not %d", b.Operators[i].Name, len(value), shareSize)
	}
	copy(s.value[:], value)
	if s.commitment() != b.sums[i] {
		clear(s.value[:])
		return Share{}, fault.New("backup_altered", "the share of operator %s is not the one that the backup names", b.Operators[i].Name)
	}
	return Share{s: s}, nil
}

// Restore makes roots of a quorum of shares, if they are the wanted ones. They have no
// file yet, and give the native epochs of the backup's day.
//
// Codes: share_foreign (of another backup), share_duplicate, share_altered,
// share_too_few; backup_altered; root_mismatch, root_malformed.
func (b *Backup) Restore(shares []Share, want custody.Identity) (*custody.Roots, error) {
	seen := map[int]bool{}
	var points []secretsharing.Share
	for _, s := range shares {
		switch {
		case s.s == nil || s.s.backup != b.ID || s.s.index < 1 || s.s.index > len(b.Operators):
			return nil, fault.New("share_foreign", "a share is of another backup").
				WithFix("have its operator open the share of the backup with the id %x", b.ID)
		case seen[s.s.index]:
			return nil, fault.New("share_duplicate", "the share of operator %s is there twice", b.Operators[s.s.index-1].Name)
		case s.s.commitment() != b.sums[s.s.index-1]:
			return nil, fault.New("share_altered", "the share of operator %s is not the one that the backup names", b.Operators[s.s.index-1].Name)
		}
		seen[s.s.index] = true
		value := scalars.NewScalar()
		if err := value.UnmarshalBinary(s.s.value[:]); err != nil {
			return nil, fault.Wrap(err, "share_altered", "the share of operator %s", b.Operators[s.s.index-1].Name)
		}
		points = append(points, secretsharing.Share{ID: scalars.NewScalar().SetUint64(uint64(s.s.index)), Value: value})
	}
	if len(points) < b.Quorum {
		return nil, fault.New("share_too_few", "%d shares, and the backup needs %d of %d", len(points), b.Quorum, len(b.Operators)).
			WithFix("ask more of its operators")
	}
	if !b.Identity.Equal(want) {
		return nil, fault.New("root_mismatch", "the backup is of other root keys than the expected ones").
			WithFix("check key_provider_id and the KMS's entry on the chain against the backup that you mean")
	}
	secret, err := secretsharing.Recover(uint(b.Quorum-1), points)
	if err != nil {
		return nil, err
	}
	aead, err := b.cipher(secret)
	if err != nil {
		return nil, err
	}
	encoded, err := aead.Open(nil, make([]byte, aead.NonceSize()), b.roots, b.header())
	if err != nil {
		return nil, fault.Wrap(err, "backup_altered", "decrypt the root keys").
			WithFix("use another copy of the backup")
	}
	return custody.Restore(encoded, want)
}
