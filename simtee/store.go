// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Files of a PKI directory.
const (
	PrivateFile  = "private.json"   // mode 0600
	DevRootsFile = "dev-roots.json" // mode 0644; collateral.DevRoots
	lockFile     = "lock"
)

// privateJSON is the content of PrivateFile.
type privateJSON struct {
	Version int               `json:"version"` // 1
	Notice  string            `json:"notice"`
	Keys    map[string]string `json:"keys"`         // name -> PKCS #8 in PEM
	Chain   string            `json:"certificates"` // PCK, PCK CA, TCB signing, root in PEM
	PPID    collateral.Hex    `json:"ppid"`         // 16 bytes
	QEAuth  collateral.Hex    `json:"qe_auth_data"` // 32 bytes
}

const notice = "Keys of a simulated TEE. Evidence made with them is for development only and proves nothing about hardware."

// EnsurePKI makes a PKI in dir, which is created with mode 0700 when it is
// absent, or keeps the one that is there. It reports whether it made one. The
// public file is written last: a directory without it was left by a crash and is
// completed anew, since nobody can have relied on it. Codes: pki_damaged,
// pki_expired, pki_permissions.
func EnsurePKI(dir string, now time.Time) (made bool, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, fmt.Errorf("make directory for the test PKI: %w", err)
	}
	unlock, err := lock(dir, true)
	if err != nil {
		return false, err
	}
	defer unlock()
	if _, err := os.Lstat(filepath.Join(dir, DevRootsFile)); err == nil {
		_, err := LoadPKI(dir, now)
		return false, err
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	p, err := NewPKI(now)
	if err != nil {
		return false, err
	}
	private, err := p.marshalPrivate()
	if err != nil {
		return false, err
	}
	public, err := p.devRoots.Bytes()
	if err != nil {
		return false, err
	}
	if err := durable.WriteFile(filepath.Join(dir, PrivateFile), private, 0o600); err != nil {
		return false, err
	}
	return true, durable.WriteFile(filepath.Join(dir, DevRootsFile), public, 0o644)
}

func (p *PKI) marshalPrivate() ([]byte, error) {
	w := privateJSON{
		Version: 1, Notice: notice, Keys: map[string]string{},
		Chain: pemChain(p.pckCert, p.caCert, p.tcbCert, p.rootCert),
		PPID:  p.ppid[:], QEAuth: p.qeAuth[:],
	}
	for _, key := range p.keys() {
		der, err := x509.MarshalPKCS8PrivateKey(*key.at)
		if err != nil {
			return nil, err
		}
		w.Keys[key.name] = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	return json.MarshalIndent(w, "", "  ")
}

// LoadPKI reads a PKI directory and checks that its parts belong together. The
// collateral must be valid at now: the TEE would otherwise sign quotes that no
// verifier accepts.
func LoadPKI(dir string, now time.Time) (*PKI, error) {
	path := filepath.Join(dir, PrivateFile)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, "pki_missing", "no test PKI in %s", dir).WithFix("make one with: dstack-simtee pki --out %s", dir)
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fault.New("pki_permissions", "%s is open to others (%v)", path, info.Mode()).WithFix("chmod 600 %s", path)
	}
	private, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	public, err := os.ReadFile(filepath.Join(dir, DevRootsFile))
	if err != nil {
		return nil, fault.Wrap(err, "pki_damaged", "test PKI in %s", dir).WithFix("run: dstack-simtee pki --out %s", dir)
	}
	p, err := parsePKI(private, public)
	if err != nil {
		return nil, fault.Wrap(err, "pki_damaged", "test PKI in %s", dir).WithFix("remove %s and run: dstack-simtee pki --out %s", dir, dir)
	}
	crl, err := x509.ParseRevocationList(p.devRoots.TDX.RootCACRL)
	if err != nil {
		return nil, fault.Wrap(err, "pki_damaged", "test PKI in %s: root CRL", dir)
	}
	if now.After(crl.NextUpdate) {
		return nil, fault.New("pki_expired", "the collateral of the test PKI in %s expired on %s", dir, crl.NextUpdate.Format(time.DateOnly)).
			WithFix("remove %s and run: dstack-simtee pki --out %s", dir, dir)
	}
	return p, nil
}

func parsePKI(private, public []byte) (*PKI, error) {
	var w privateJSON
	if err := strictjson.Decode(private, &w, strictjson.Limits{Size: 1 << 20, Depth: 4}); err != nil {
		return nil, fmt.Errorf("%s: %w", PrivateFile, err)
	}
	roots, err := collateral.ParseDevRoots(public)
	if err != nil {
		return nil, err
	}
	p := &PKI{devRoots: *roots}
	if w.Version != 1 || len(w.PPID) != len(p.ppid) || len(w.QEAuth) != len(p.qeAuth) {
		return nil, fmt.Errorf("%s has version %d, want 1, or fields of other lengths", PrivateFile, w.Version)
	}
	copy(p.ppid[:], w.PPID)
	copy(p.qeAuth[:], w.QEAuth)
	for _, key := range p.keys() {
		block, _ := pem.Decode([]byte(w.Keys[key.name]))
		if block == nil {
			return nil, fmt.Errorf("%s lacks key %s", PrivateFile, key.name)
		}
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: key %s is malformed", PrivateFile, key.name) // err could quote the key
		}
		ec, ok := parsed.(*ecdsa.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("%s: key %s is not an ECDSA key", PrivateFile, key.name)
		}
		*key.at = ec
	}
	rest := []byte(w.Chain)
	for _, c := range []struct {
		at  **x509.Certificate
		key *ecdsa.PrivateKey
	}{{&p.pckCert, p.pck}, {&p.caCert, p.ca}, {&p.tcbCert, p.tcb}, {&p.rootCert, p.root}} {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return nil, fmt.Errorf("%s: fewer than four certificates", PrivateFile)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", PrivateFile, err)
		}
		if !c.key.PublicKey.Equal(cert.PublicKey) {
			return nil, fmt.Errorf("%s: key does not belong to certificate %q", PrivateFile, cert.Subject.CommonName)
		}
		*c.at = cert
	}
	if roots.TDXRootPEM != pemChain(p.rootCert) {
		return nil, fmt.Errorf("%s and %s have different roots", PrivateFile, DevRootsFile)
	}
	return p, nil
}

// lock takes the advisory lock of a directory until the returned function is
// called or the process ends. Without wait, a held lock is an error.
func lock(dir string, wait bool) (unlock func(), err error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	how := syscall.LOCK_EX
	if !wait {
		how |= syscall.LOCK_NB
	}
	for {
		err = syscall.Flock(int(f.Fd()), how)
		if err != syscall.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		if err == syscall.EWOULDBLOCK {
			return nil, fault.New("state_locked", "%s is in use by another process", dir).WithFix("stop the other dstack-simtee first; one process serves one VM")
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}
