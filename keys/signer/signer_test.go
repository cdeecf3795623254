// SPDX-License-Identifier: Apache-2.0

package signer

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestAKeyComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deployer.key")
	key, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	again, err := Open(path)
	if err != nil || !again.Equal(key) {
		t.Errorf("%v", err)
	}
	before, _ := os.ReadFile(path)
	if _, err := Create(path); fault.Code(err) != "signer_key_exists" {
		t.Errorf("made over another: %v", err)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("the key was written over")
	}
	if _, err := Create(filepath.Join(path, "x")); fault.Code(err) != "signer_key_write" {
		t.Errorf("%v", err)
	}
}

func TestThreat_E06_AKeyThatOthersMayReadIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deployer.key")
	if _, err := Create(path); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o644} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); fault.Code(err) != "signer_key_mode" {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}

func TestFilesThatAreNoKey(t *testing.T) {
	dir := t.TempDir()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(dir, "good")
	if _, err := Create(good); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"empty": "", "text": "key", "twice": string(text) + string(text), "long": string(text) + strings.Repeat("\n", maxFile),
		"cut":   string(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: []byte{0x30}})),
		"p256":  string(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})),
		"other": strings.ReplaceAll(string(text), pemType, "PUBLIC KEY"),
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); fault.Code(err) != "signer_key_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); fault.Code(err) != "signer_key_malformed" {
		t.Errorf("a directory: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "none")); fault.Code(err) != "signer_key_missing" {
		t.Errorf("no file: %v", err)
	}
}
