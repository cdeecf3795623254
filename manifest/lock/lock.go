// SPDX-License-Identifier: Apache-2.0

// Package lock is dstack.lock.json: what `dstack deploy` decided and measured, so
// that `dstack verify` can later expect exactly that.
//
// A lock is the caller's own statement: a value taken from it is anchored in the
// caller's keeping of the file, and in nothing else. Keep it under version
// control beside the compose file. Parsing is strict (unknown and duplicate keys,
// lengths, digests), since a field that is not understood may be one that the
// caller relies on.
//
// Implements design.md §3.
package lock

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
)

// MaxSize is the largest lock file in bytes.
const MaxSize = 1 << 20

// Version is the format that this package writes and the only one it reads.
const Version = 1

// Lock pins one deployment.
type Lock struct {
	Version      int                `json:"version"` // 1
	Name         string             `json:"name"`    // of the app
	ComposeHash  dstack.ComposeHash `json:"compose_hash"`
	AppID        dstack.AppID       `json:"app_id"`
	OSImageHash  dstack.ImageHash   `json:"os_image_hash"`
	Image        string             `json:"image"`                  // name of the OS image
	VMConfig     json.RawMessage    `json:"vm_config,omitempty"`    // shape of the VM (measurement.md §2)
	TEE          dstack.TEE         `json:"tee"`                    // kind of TEE that the measurements are for
	Measurements *measure.TDX       `json:"measurements,omitempty"` // expected launch registers
	Images       map[string]string  `json:"images"`                 // container image reference -> "sha256:<64 hex>"
	Created      string             `json:"created"`                // RFC 3339; informative
	Governance   *Governance        `json:"governance,omitempty"`   // the contracts that allow the app; nil: none
}

// Governance names the contracts that govern an app, and whom to ask about them.
type Governance struct {
	ChainID  uint64   `json:"chain_id"`
	Registry string   `json:"registry"` // the contract's address, 0x and 40 hexadecimal digits
	RPC      []string `json:"rpc"`      // JSON-RPC endpoints of the chain
}

var contractAddress = regexp.MustCompile(`^0x[0-9a-fA-F]{40}$`)

// Parse reads a lock. The code of every error is lock_malformed.
func Parse(data []byte) (*Lock, error) {
	var l Lock
	if err := strictjson.Decode(data, &l, strictjson.Limits{Size: MaxSize, Depth: 12}); err != nil {
		return nil, fault.Wrap(err, "lock_malformed", "the lock does not parse").
			WithFix("write it anew with `dstack deploy`")
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	return &l, nil
}

func (l *Lock) check() error {
	bad := func(format string, args ...any) error {
		return fault.New("lock_malformed", "the lock: "+format, args...).WithFix("write it anew with `dstack deploy`")
	}
	switch {
	case l.Version != Version:
		return bad("version is %d, this program reads %d", l.Version, Version)
	case l.Name == "":
		return bad("name is missing")
	case l.ComposeHash.IsZero():
		return bad("compose_hash is missing or zero")
	case l.AppID.IsZero():
		return bad("app_id is missing or zero")
	case l.OSImageHash.IsZero():
		return bad("os_image_hash is missing or zero")
	case l.TEE == "":
		return bad("tee is missing")
	case l.Measurements != nil && l.TEE != dstack.TDX:
		return bad("measurements are those of tdx, but tee is %s", l.TEE)
	}
	if m := l.Measurements; m != nil {
		if m.MRTD.IsZero() || m.RTMR1.IsZero() || m.RTMR2.IsZero() || len(m.RTMR0) == 0 {
			return bad("measurements are incomplete")
		}
		if len(m.RTMR0) > 64 {
			return bad("measurements hold %d events of RTMR0", len(m.RTMR0))
		}
	}
	if g := l.Governance; g != nil {
		switch {
		case g.ChainID == 0 || !contractAddress.MatchString(g.Registry):
			return bad("governance names no contract of a chain")
		case len(g.RPC) == 0 || len(g.RPC) > 32:
			return bad("governance names %d endpoints, want 1 to 32", len(g.RPC))
		}
	}
	for ref, digest := range l.Images {
		if !manifest.IsDigest(digest) {
			return bad("image %.80q has the digest %.80q, want sha256:<64 hexadecimal digits>", ref, digest)
		}
	}
	if len(l.VMConfig) > 0 {
		if _, err := measure.ParseVMConfig(l.VMConfig); err != nil {
			return bad("%v", err)
		}
	}
	if _, err := time.Parse(time.RFC3339, l.Created); err != nil {
		return bad("created is not a time: %v", err)
	}
	return nil
}

// Read reads the lock in a file. A file that is not there has the code lock_missing.
func Read(path string) (*Lock, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("lock_missing", "there is no lock file %s", path).
			WithFix("`dstack deploy` writes it beside the compose file")
	}
	if err != nil {
		return nil, fmt.Errorf("open lock %s: %w", path, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read lock %s: %w", path, err)
	}
	l, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

// Write writes the lock so that it survives a power cut, mode 0644, and refuses
// to write one that Parse would not read.
func Write(path string, l *Lock) error {
	data, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	data = append(data, '\n')
	if _, err := Parse(data); err != nil {
		return err
	}
	if err := durable.WriteFile(path, data, 0o644); err != nil {
		return fmt.Errorf("write lock %s: %w", path, err)
	}
	return nil
}
