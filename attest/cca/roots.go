// SPDX-License-Identifier: Apache-2.0

package cca

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"strings"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// ParseRootKey reads a platform attestation key: exactly one PEM block PUBLIC KEY
// of an ECDSA key on P-256, P-384 or P-521 (cca_root_key). Name is for people.
func ParseRootKey(name, text string) (attest.RootKey, error) {
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "PUBLIC KEY" || strings.TrimSpace(string(rest)) != "" {
		return attest.RootKey{}, fault.New("cca_root_key", "%s is not exactly one PEM public key", name)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return attest.RootKey{}, fault.Wrap(err, "cca_root_key", "%s", name)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok || ec.Curve.Params().BitSize < 256 {
		return attest.RootKey{}, fault.New("cca_root_key", "%s is not an ECDSA key on P-256, P-384 or P-521", name)
	}
	return attest.RootKey{Name: name, Key: ec}, nil
}

// CallerRoots returns platform keys that the caller answers for.
func CallerRoots(keys ...attest.RootKey) attest.Roots {
	return attest.Roots{TEE: dstack.CCA, Trust: dstack.TrustCaller, Keys: keys}
}

// DevelopmentRoots returns the platform key of a development trust anchor
// (dev_roots_malformed). Evidence accepted under it says nothing about hardware.
func DevelopmentRoots(d *collateral.DevRoots) (attest.Roots, error) {
	key, err := ParseRootKey("cca_key_pem of "+d.Name, d.CCAKeyPEM)
	if err != nil {
		return attest.Roots{}, fault.Wrap(err, "dev_roots_malformed", "development roots")
	}
	return attest.Roots{TEE: dstack.CCA, Trust: dstack.TrustDevelopment, Keys: []attest.RootKey{key}}, nil
}
