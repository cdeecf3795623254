// SPDX-License-Identifier: Apache-2.0

package channel

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"time"
)

// Key is the key of one end of a channel. It belongs to one machine and one boot:
// it lives in memory only, cannot be exported, printed or compared, and must never
// be a key that instances share, such as one that a KMS derives (threats.md C01).
type Key struct {
	_    [0]func()
	cert tls.Certificate
}

// NewKey makes an ephemeral key, ECDSA on P-256. Peers that judge by evidence
// accept it only if the guest's init commits to it.
func NewKey() (*Key, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return KeyOf(key)
}

// KeyOf returns the key behind signer: in a guest, the system channel key, which
// init made and committed to at boot.
func KeyOf(signer crypto.Signer) (*Key, error) {
	// A channel's certificate carries the key and nothing else: its name and dates
	// are looked at by nobody.
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "dstack channel"},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}, &x509.Certificate{Subject: pkix.Name{CommonName: "dstack channel"}}, signer.Public(), signer)
	if err != nil {
		return nil, fmt.Errorf("certificate of a channel key: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certificate of a channel key: %w", err)
	}
	return &Key{cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: signer, Leaf: leaf}}, nil
}

// SPKI returns the public half: DER SubjectPublicKeyInfo.
func (k Key) SPKI() []byte { return k.cert.Leaf.RawSubjectPublicKeyInfo }

// String names the key by the SHA-256 of its SPKI, as the event log does.
func (k Key) String() string { return fmt.Sprintf("channel key sha256:%x", sha256.Sum256(k.SPKI())) }

// Format prints a key as String does, whatever the verb: never what is inside.
func (k Key) Format(f fmt.State, _ rune) { fmt.Fprint(f, k.String()) }

func (k *Key) signer() crypto.Signer { return k.cert.PrivateKey.(crypto.Signer) }
