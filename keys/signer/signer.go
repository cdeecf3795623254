// SPDX-License-Identifier: Apache-2.0

// Package signer keeps the key by which a deployer signs an app's environment: an
// Ed25519 key in a file of its owner's alone, whose public half the manifest names
// (env_signers).
//
// Guarantees: a key is never written over another; a file that others may read is
// refused, not repaired, since they may have read it. Trusted: the file system and
// its owner. Implements design.md §7; threats.md E06, J03.
package signer

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	pemType = "PRIVATE KEY" // PKCS #8
	maxFile = 4 << 10       // bytes
)

// Create makes a key and writes it to a new file with mode 0600. Codes
// signer_key_exists, signer_key_write.
func Create(path string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})
	defer func() { clear(der); clear(text) }()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, fault.New("signer_key_exists", "there is a file %s already", path).WithFix("use the key that is there, or move it away")
	}
	if err != nil {
		return nil, fault.Wrap(err, "signer_key_write", "write the deployer's key")
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		os.Remove(path)
		return nil, fault.Wrap(err, "signer_key_write", "write the deployer's key %s", path)
	}
	return key, nil
}

// Open reads a key. Codes signer_key_missing, signer_key_mode, signer_key_malformed.
func Open(path string) (ed25519.PrivateKey, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "signer_key_missing", "open the deployer's key")
	}
	defer f.Close()
	// Of the open file: what the name means may change.
	info, err := f.Stat()
	if err != nil {
		return nil, fault.Wrap(err, "signer_key_missing", "open the deployer's key %s", path)
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, fault.New("signer_key_malformed", "%s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, fault.New("signer_key_mode", "others than its owner may use the deployer's key %s (mode %04o)", path, info.Mode().Perm()).
			WithFix("chmod 600 %s; if others could read it, make a new key and name that in env_signers", path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	defer clear(text)
	if err != nil {
		return nil, fault.Wrap(err, "signer_key_missing", "read the deployer's key %s", path)
	}
	malformed := func(why string) (ed25519.PrivateKey, error) {
		return nil, fault.New("signer_key_malformed", "the deployer's key %s is %s", path, why).
			WithFix("restore it from a backup, or move it away: a new one is made, and apps get it with their next upgrade")
	}
	block, rest := pem.Decode(text)
	if len(text) > maxFile || block == nil || block.Type != pemType || len(rest) > 0 {
		return malformed("no PEM file of one private key")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return malformed("no PKCS #8 key")
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return malformed("no Ed25519 key")
	}
	return key, nil
}
