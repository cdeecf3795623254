// SPDX-License-Identifier: Apache-2.0

package backup

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	pemType    = "PRIVATE KEY" // PKCS #8
	maxKeyFile = 4 << 10       // bytes
	publicSize = 32            // of an X25519 key
	maxName    = 64
)

// Operator is someone to whom a share is sealed.
type Operator struct {
	Name   string // 1 to 64 of a-z, A-Z, 0-9, '.', '_', '-', '@'
	Public []byte // X25519, 32 bytes
}

// String returns the form that [ParseOperator] reads: name:key, the key in hexadecimal.
func (o Operator) String() string { return o.Name + ":" + hex.EncodeToString(o.Public) }

// ParseOperator reads an operator. Code operator_malformed.
func ParseOperator(text string) (Operator, error) {
	name, key, _ := strings.Cut(text, ":")
	o := Operator{Name: name}
	if len(key) == 2*publicSize && strings.ToLower(key) == key {
		o.Public, _ = hex.DecodeString(key) // nil, which check refuses
	}
	return o, o.check()
}

func (o Operator) check() error {
	bad := func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-@", r))
	}
	if o.Name == "" || len(o.Name) > maxName || strings.ContainsFunc(o.Name, bad) {
		return fault.New("operator_malformed", "%.80q is no operator's name: 1 to %d letters, digits, '.', '_', '-', '@'", o.Name, maxName)
	}
	if len(o.Public) != publicSize {
		return fault.New("operator_malformed", "operator %s has no X25519 public key of %d hexadecimal digits", o.Name, 2*publicSize)
	}
	return nil
}

// Key is an operator's private key. It cannot be printed, compared or serialised.
type Key struct {
	_ [0]func()
	h *hidden
}

// hidden keeps the key two pointers away: fmt follows one, for a verb that does not
// fit, where the Key is an unexported field and Format is out of its reach.
type hidden struct{ k *ecdh.PrivateKey }

// Public returns the X25519 public key, 32 bytes.
func (k *Key) Public() []byte { return k.h.k.PublicKey().Bytes() }

func (k Key) String() string               { return "[operator key]" }
func (k Key) Format(f fmt.State, _ rune)   { fmt.Fprint(f, k.String()) }
func (k Key) LogValue() slog.Value         { return slog.StringValue(k.String()) }
func (k Key) MarshalText() ([]byte, error) { return nil, errSerialise }

var errSerialise = errors.New("a secret of a backup is not serialised by itself")

// CreateKey makes an operator's key and writes it to a new file with mode 0600. Codes
// operator_key_exists, operator_key_write.
func CreateKey(path string) (*Key, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
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
		return nil, fault.New("operator_key_exists", "there is a file %s already", path).
			WithFix("use the key that is there, or choose another name: backups may be sealed to it")
	}
	if err != nil {
		return nil, fault.Wrap(err, "operator_key_write", "write the operator's key")
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(path)
		return nil, fault.Wrap(err, "operator_key_write", "write the operator's key %s", path)
	}
	return &Key{h: &hidden{key}}, nil
}

// OpenKey reads an operator's key. Codes operator_key_missing, operator_key_mode,
// operator_key_malformed.
func OpenKey(path string) (*Key, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fault.Wrap(err, "operator_key_missing", "open the operator's key")
	}
	defer f.Close()
	info, err := f.Stat() // of the open file: what the name means may change
	if err != nil {
		return nil, fault.Wrap(err, "operator_key_missing", "open the operator's key %s", path)
	}
	if !info.Mode().IsRegular() {
		return nil, fault.New("operator_key_malformed", "%s is no regular file", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fault.New("operator_key_mode", "others than its owner may use the operator's key %s (mode %04o)", path, perm).
			WithFix("chmod 600 %s; if others could read it, make a new key and a new backup, and destroy the old backup", path)
	}
	if sys, ok := info.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() {
		return nil, fault.New("operator_key_mode", "the operator's key %s belongs to another user", path)
	}
	text := make([]byte, maxKeyFile+1)
	defer clear(text)
	n, err := io.ReadFull(f, text)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fault.Wrap(err, "operator_key_missing", "read the operator's key %s", path)
	}
	key, err := parseKey(text[:n])
	if err != nil {
		return nil, fault.Wrap(err, "operator_key_malformed", "the operator's key %s", path)
	}
	return key, nil
}

func parseKey(text []byte) (*Key, error) {
	block, rest := pem.Decode(text)
	if len(text) > maxKeyFile || block == nil || block.Type != pemType || len(rest) > 0 {
		return nil, errors.New("it is no PEM file of one private key")
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("it is no PKCS #8 key")
	}
	key, ok := parsed.(*ecdh.PrivateKey) // of X25519; the library reads other curves as ECDSA's
	if !ok {
		return nil, errors.New("it is no X25519 key")
	}
	return &Key{h: &hidden{key}}, nil
}
