// SPDX-License-Identifier: Apache-2.0

// Package lease is the statement by which a KMS lets an instance go on for a while:
// what was authorised, and until when. A guest whose lease has ended gives no new key
// material (design.md §7, threats.md G05); who relies on an instance can ask to see it.
//
// The document is JSON, signed by the KMS's root CA key over
// "dstack-lease-v1\n" and its bytes (ECDSA with SHA-256, ASN.1). Attacker-controlled:
// both, until [Verify] has accepted them.
package lease

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	MaxDocument  = 4 << 10 // bytes
	MaxSignature = 80      // bytes
	// Longest is the longest lease that is one.
	Longest = 24 * time.Hour
	// skew is how far behind the KMS's a clock may be.
	skew = 5 * time.Minute
)

// Context is what precedes the document in what is signed, less the line feed.
const Context = "dstack-lease-v1"

// Document is what a lease says.
type Document struct {
	AppID       dstack.AppID
	InstanceID  []byte // 20 bytes, or empty
	ComposeHash dstack.ComposeHash
	OSImageHash []byte // 32 bytes, or empty
	NotBefore   time.Time
	NotAfter    time.Time
	// Log is the name of the release log, and Index the number of the entry in it, that
	// the grant is written in.
	Log   string
	Index uint64
}

type wire struct {
	Version     int    `json:"version"` // 1
	AppID       string `json:"app_id"`
	InstanceID  string `json:"instance_id"`
	ComposeHash string `json:"compose_hash"`
	OSImageHash string `json:"os_image_hash"`
	NotBefore   string `json:"not_before"`
	NotAfter    string `json:"not_after"`
	Log         string `json:"log"`
	Index       uint64 `json:"index"`
}

// Encode returns the bytes that are signed. Times are cut to seconds.
func (d *Document) Encode() ([]byte, error) {
	return json.Marshal(wire{
		1, d.AppID.String(), hex.EncodeToString(d.InstanceID), d.ComposeHash.String(), hex.EncodeToString(d.OSImageHash),
		d.NotBefore.UTC().Format(time.RFC3339), d.NotAfter.UTC().Format(time.RFC3339), d.Log, d.Index,
	})
}

// Parse reads a document, strictly. Code lease_malformed.
func Parse(text []byte) (*Document, error) {
	d, err := parse(text)
	if err != nil {
		return nil, fault.Wrap(err, "lease_malformed", "the lease")
	}
	return d, nil
}

func parse(text []byte) (*Document, error) {
	bad := func(what string) (*Document, error) { return nil, fault.New("lease_malformed", "%s", what) }
	if len(text) > MaxDocument {
		return bad("it is too large")
	}
	var w wire
	if err := strictjson.Decode(text, &w, strictjson.Limits{Size: MaxDocument, Depth: 2}); err != nil {
		return nil, err
	}
	if w.Version != 1 {
		return bad("its version is not 1")
	}
	d := &Document{Log: w.Log, Index: w.Index}
	var err error
	if d.AppID, err = dstack.ParseAppID(w.AppID); err != nil {
		return nil, err
	}
	if d.ComposeHash, err = dstack.ParseComposeHash(w.ComposeHash); err != nil {
		return nil, err
	}
	for _, f := range []struct {
		to   *[]byte
		text string
		size int
		name string
	}{{&d.InstanceID, w.InstanceID, dstack.InstanceIDSize, "instance_id"}, {&d.OSImageHash, w.OSImageHash, dstack.ImageHashSize, "os_image_hash"}} {
		if *f.to, err = hex.DecodeString(f.text); err != nil || len(*f.to) != 0 && len(*f.to) != f.size {
			return bad(f.name + " is not hexadecimal of its length")
		}
	}
	for _, f := range []struct {
		to   *time.Time
		text string
	}{{&d.NotBefore, w.NotBefore}, {&d.NotAfter, w.NotAfter}} {
		if *f.to, err = time.Parse(time.RFC3339, f.text); err != nil {
			return bad("a time is not in RFC 3339")
		}
	}
	if life := d.NotAfter.Sub(d.NotBefore); life <= 0 || life > Longest {
		return bad("it lasts not at all, or longer than any lease")
	}
	return d, nil
}

// Verify returns the document that root, DER SubjectPublicKeyInfo of a KMS's root CA,
// signed, if it holds at the time. Codes lease_malformed, lease_signature,
// lease_not_yet, lease_ended.
func Verify(document, signature, root []byte, at time.Time) (*Document, error) {
	parsed, err := x509.ParsePKIXPublicKey(root)
	key, ok := parsed.(*ecdsa.PublicKey)
	if err != nil || !ok || key.Curve != elliptic.P256() {
		return nil, fault.New("lease_signature", "the KMS's root key is no P-256 key")
	}
	sum := sha256.Sum256(bytes.Join([][]byte{[]byte(Context), document}, []byte("\n")))
	if len(signature) > MaxSignature || !ecdsa.VerifyASN1(key, sum[:], signature) {
		return nil, fault.New("lease_signature", "the lease is not signed by the root key of this KMS")
	}
	d, err := Parse(document)
	switch {
	case err != nil:
		return nil, err
	case at.Add(skew).Before(d.NotBefore):
		return nil, fault.New("lease_not_yet", "the lease begins at %s", d.NotBefore.Format(time.RFC3339))
	case !at.Before(d.NotAfter):
		return nil, fault.New("lease_ended", "the lease ended at %s", d.NotAfter.Format(time.RFC3339))
	}
	return d, nil
}
