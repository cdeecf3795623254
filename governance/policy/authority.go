// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Authority decides by the newest signed document that it was given. Its methods may be
// called concurrently; one process at a time uses a file.
//
// The file holds the newest document that was ever accepted, and is written before the
// document counts: a KMS that starts again refuses an older one and keeps apps frozen.
type Authority struct {
	keys Keys
	path string
	now  func() time.Time

	mu     sync.Mutex
	floor  *accepted // newest ever accepted; nil: none
	inUse  *accepted // floor, if the keys in use signed it; nil: none
	signed []byte    // its signed form
}

// accepted is a document with its name.
type accepted struct {
	doc    *Document
	digest string
}

// stored is the file.
type stored struct {
	Version  int    `json:"version"` // 1
	Sequence uint64 `json:"sequence"`
	SHA256   string `json:"sha256"` // of the document's bytes
	Signed   []byte `json:"signed"` // the signed form
}

const maxStored = MaxSigned/3*4 + 4096

// OpenAuthority returns the authority whose file is path, in a directory that only its
// owner may write. A file that is not there is a first use; one that cannot be read has
// the code policy_floor and stays an error. The stored document counts again if the
// keys signed it; with other keys it is a floor only. now is the clock of Update, nil
// meaning time.Now: decisions have their own time.
func OpenAuthority(path string, keys Keys, now func() time.Time) (*Authority, error) {
	if now == nil {
		now = time.Now
	}
	a := &Authority{keys: keys, path: path, now: now}
	data, err := readRegular(path)
	if errors.Is(err, fs.ErrNotExist) {
		return a, nil
	}
	var file stored
	if err == nil {
		err = strictjson.Decode(data, &file, strictjson.Limits{Size: maxStored, Depth: 2})
	}
	var s *signed
	if err == nil {
		s, err = parseSigned(file.Signed)
	}
	var doc *Document
	if err == nil {
		doc, err = Parse(s.Document)
	}
	if err == nil && (file.Version != 1 || doc.Sequence != file.Sequence || digest(s.Document) != file.SHA256) {
		err = errors.New("it does not hold the document that it names")
	}
	if err != nil {
		return nil, fault.Wrap(err, "policy_floor", "read the newest policy accepted, %s", path).
			WithFix("restore the file; without it an older policy would count as the newest")
	}
	a.floor = &accepted{doc, file.SHA256}
	if keys.verify(s) == nil {
		a.inUse, a.signed = a.floor, file.Signed
	}
	return a, nil
}

func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
		return nil, errors.New("it is not a regular file that only its owner may write")
	}
	return io.ReadAll(io.LimitReader(f, maxStored+1))
}

// Update takes a signed document if it continues the newest one; when it returns nil
// the document is in force and stays the floor, over a power cut too. The one in force
// is taken again without effect. Codes: those of [Open] and [Successor],
// policy_conflict for another document of the same sequence, policy_floor when the file
// cannot be written, which leaves the old document in force.
func (a *Authority) Update(signedForm []byte) error {
	doc, raw, err := open(signedForm, a.keys)
	if err != nil {
		return err
	}
	if err := current(doc, a.now()); err != nil {
		return err
	}
	next := &accepted{doc, digest(raw)}
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.floor; old != nil && old.digest != next.digest {
		if doc.Sequence == old.doc.Sequence {
			return fault.New("policy_conflict", "two policies have sequence %d: sha256:%.16s, which is in force, and sha256:%.16s", doc.Sequence, old.digest, next.digest).
				WithFix("give the new policy a higher sequence, and ask the signers why there are two")
		}
		if err := Successor(old.doc, doc); err != nil {
			return err
		}
	}
	file, err := json.Marshal(stored{Version: 1, Sequence: doc.Sequence, SHA256: next.digest, Signed: signedForm})
	if err == nil {
		err = durable.WriteFile(a.path, file, 0o600)
	}
	if err != nil {
		return fault.Wrap(err, "policy_floor", "remember the newest policy").WithFix("make room and check the permissions of %s", a.path)
	}
	a.floor, a.inUse, a.signed = next, next, append([]byte(nil), signedForm...)
	return nil
}

// Signed returns the signed form of the document in force, nil for none.
func (a *Authority) Signed() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]byte(nil), a.signed...)
}

func (a *Authority) use() *accepted {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inUse
}

func (d *accepted) by() string { return by(d.doc) + " sha256:" + d.digest[:16] }

var _ governance.Authority = (*Authority)(nil)

// Decide implements governance.Authority. It has an answer always.
func (a *Authority) Decide(_ context.Context, r governance.Request) (governance.Decision, error) {
	in := a.use()
	if in == nil {
		return governance.Deny("policy", codeMissing, "there is no policy, or other keys signed it"), nil
	}
	out := in.doc.Decide(r)
	out.By = in.by()
	return out, nil
}

// About implements governance.Authority: of an expired document too, by which nothing
// is decided. Without a document the code is policy_missing.
func (a *Authority) About(context.Context) (governance.About, error) {
	in := a.use()
	if in == nil {
		return governance.About{}, fault.New("policy_missing", "there is no policy, or other keys signed it").WithFix("give the KMS a signed policy")
	}
	out := governance.About{Dev: in.doc.Trust == dstack.TrustDevelopment, By: in.by()}
	if in.doc.GatewayAppID != nil {
		out.GatewayAppID = in.doc.GatewayAppID.String()
	}
	return out, nil
}
