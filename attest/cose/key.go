// SPDX-License-Identifier: Apache-2.0

package cose

import (
	"crypto/ecdsa"
	"slices"

	"github.com/dstack-go/dstack/attest/cose/strictcbor"
	"github.com/dstack-go/dstack/internal/fault"
)

// Labels of a COSE_Key (RFC 9052 §7.1, RFC 9053 §7.1.1) and the values used here.
const (
	keyType      = 1
	keyAlgorithm = 3
	keyOps       = 4
	keyCurve     = -1
	keyX         = -2
	keyY         = -3
	keyPrivate   = -4

	typeEC2  = 2
	opVerify = 2
)

// curves are the algorithms by the number of their COSE curve.
func curveAlgorithm(n int64) (Algorithm, bool) {
	switch n {
	case 1:
		return ES256, true
	case 2:
		return ES384, true
	case 3:
		return ES512, true
	}
	return 0, false
}

// ParseKey reads a COSE_Key of type EC2: a public point with both coordinates of
// full length, on P-256, P-384 or P-521. An algorithm or a list of operations in
// it must admit verification with it. Every error has the code cose_key.
func ParseKey(data []byte) (*ecdsa.PublicKey, error) {
	item, err := strictcbor.Decode(data)
	if err != nil {
		return nil, fault.Wrap(err, "cose_key", "COSE key")
	}
	m, err := item.Map()
	if err != nil {
		return nil, fault.Wrap(err, "cose_key", "COSE key")
	}
	number := func(label int) (int64, error) {
		v, err := m.Need(label)
		if err != nil {
			return 0, fault.Wrap(err, "cose_key", "COSE key")
		}
		n, err := v.Int()
		if err != nil {
			return 0, fault.Wrap(err, "cose_key", "label %d of the COSE key", label)
		}
		return n, nil
	}
	kind, err := number(keyType)
	if err != nil {
		return nil, err
	}
	curve, err := number(keyCurve)
	if err != nil {
		return nil, err
	}
	alg, ok := curveAlgorithm(curve)
	if kind != typeEC2 || !ok {
		return nil, fault.New("cose_key", "COSE key has type %d and curve %d, want EC2 on P-256, P-384 or P-521", kind, curve)
	}
	if _, ok := m.Get(keyPrivate); ok {
		return nil, fault.New("cose_key", "COSE key holds a private key")
	}
	if _, ok := m.Get(keyAlgorithm); ok {
		if n, err := number(keyAlgorithm); err != nil || Algorithm(n) != alg {
			return nil, fault.New("cose_key", "COSE key is for another algorithm than its curve's (%d)", alg)
		}
	}
	if ops, ok := m.Get(keyOps); ok {
		list, err := ops.Array(1, strictcbor.MaxItems)
		if err != nil || !slices.ContainsFunc(list, func(i strictcbor.Item) bool { n, err := i.Int(); return err == nil && n == opVerify }) {
			return nil, fault.New("cose_key", "COSE key is not for verification")
		}
	}
	s, _ := alg.suite()
	point := []byte{4}
	for _, label := range []int{keyX, keyY} {
		v, err := m.Need(label)
		if err != nil {
			return nil, fault.Wrap(err, "cose_key", "COSE key")
		}
		b, err := v.Bytes(s.size, s.size)
		if err != nil {
			return nil, fault.Wrap(err, "cose_key", "coordinate %d of the COSE key", label)
		}
		point = append(point, b...)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(s.curve, point)
	if err != nil {
		return nil, fault.Wrap(err, "cose_key", "point of the COSE key")
	}
	return key, nil
}
