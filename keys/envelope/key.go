// SPDX-License-Identifier: Apache-2.0

package envelope

import (
	"bytes"
	"encoding/binary"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/derive"
)

// Ages of a KMS's answer (spec/kms.md §4.1).
const (
	MaxKeyAge    = 300 * time.Second
	maxKeyFuture = 60 * time.Second
)

// keyMessage is what a KMS signs about an app's environment key.
func keyMessage(app dstack.AppID, at *uint64, public []byte) [][]byte {
	m := [][]byte{[]byte("dstack-env-encrypt-pubkey:"), app[:]}
	if at != nil {
		m = append(m, binary.BigEndian.AppendUint64(nil, *at))
	}
	return append(m, public)
}

// SignKey has an app's environment public key signed by the KMS's secp256k1 root:
// without a time, which old clients read and anyone can replay, and with one.
func SignKey(root func(message ...[]byte) ([]byte, error), app dstack.AppID, public []byte, at uint64) (v0, v1 []byte, err error) {
	if v0, err = root(keyMessage(app, nil, public)...); err != nil {
		return nil, nil, err
	}
	v1, err = root(keyMessage(app, &at, public)...)
	return v0, v1, err
}

// VerifyKey checks that an app's environment public key is the KMS's own answer, and
// a fresh one, before anything is encrypted to it (threats.md G12): the host, which
// may sit in between, knows other keys. kms is the compressed secp256k1 key, 33 bytes,
// of the KMS that is meant; there is no way to accept another. Codes env_key_signer,
// env_key_stale.
func VerifyKey(kms []byte, app dstack.AppID, public, signatureV1 []byte, at uint64, now time.Time) error {
	if len(kms) != 33 || len(public) != keySize {
		return fault.New("env_key_signer", "the KMS's key has %d bytes and the app's %d, not 33 and %d", len(kms), len(public), keySize)
	}
	signer, err := derive.Recover(signatureV1, keyMessage(app, &at, public)...)
	if err != nil {
		return fault.Wrap(err, "env_key_signer", "the KMS's signature over the app's key")
	}
	if !bytes.Equal(signer, kms) {
		return fault.New("env_key_signer", "the app's key is signed by %x, and the KMS that is meant is %x", signer, kms).
			WithFix("somebody answers in the KMS's place, or its key is another than you were told; do not deploy")
	}
	// A time far away would overflow a Duration.
	age := now.Unix() - int64(min(at, 1<<40))
	if age > int64(MaxKeyAge/time.Second) || -age > int64(maxKeyFuture/time.Second) {
		return fault.New("env_key_stale", "the KMS's answer is %d s old; 0 to %d s are accepted", age, int64(MaxKeyAge/time.Second)).
			WithFix("set this machine's clock, and ask the KMS again")
	}
	return nil
}
