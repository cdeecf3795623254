// SPDX-License-Identifier: Apache-2.0

package releaselog

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/proto"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/keys/custody"
)

// forge makes a log key for any name, vouched for by the authority: what a KMS could
// do that keeps its root and lies.
func (a *authority) forge(t testing.TB, name string, seed byte) (*logKey, *kmsapi.LogHead) {
	t.Helper()
	key, text, err := newLogKey(name, bytes.Repeat([]byte{seed}, ed25519.SeedSize))
	must(t, err)
	sig, err := a.attest(t.Context(), []byte(text))
	must(t, err)
	return key, &kmsapi.LogHead{LogKey: text, LogKeySignature: sig}
}

// sign has a forged log show a body of a checkpoint.
func (k *logKey) show(t testing.TB, wire *kmsapi.LogHead, text string) *kmsapi.LogHead {
	t.Helper()
	signed, err := note.Sign(&note.Note{Text: text}, k)
	must(t, err)
	wire = proto.Clone(wire).(*kmsapi.LogHead)
	wire.Checkpoint = string(signed)
	return wire
}

// head makes a verified head of any tree.
func (a *authority) head(t testing.TB, log string, seed byte, size uint64, root Hash) Head {
	t.Helper()
	name := namePrefix(a.spki) + log
	key, wire := a.forge(t, name, seed)
	h, err := VerifyHead(key.show(t, wire, checkpointText(name, size, root)), a.spki)
	must(t, err)
	return h
}

const logA, logB = "00000000000000aa", "00000000000000bb"

func TestThePurposeIsThatOfCustody(t *testing.T) {
	if Purpose != custody.PurposeReleaseLog || string(AttestedMessage([]byte("x"))) != custody.PurposeReleaseLog+"\nx" {
		t.Fatalf("%q, custody has %q", AttestedMessage([]byte("x")), custody.PurposeReleaseLog)
	}
}

func TestVerifyHeadRefuses(t *testing.T) {
	a, b := newAuthority(t), newAuthority(t)
	l, _ := a.create(t)
	r := grow(t, l, 2)[1]
	good := r.Head.Wire()
	h, err := VerifyHead(good, a.spki)
	must(t, err)
	if h != r.Head {
		t.Fatalf("%s verified as %s", r.Head, h)
	}
	with := func(change func(*kmsapi.LogHead)) *kmsapi.LogHead {
		h := proto.Clone(good).(*kmsapi.LogHead)
		change(h)
		return h
	}
	name := namePrefix(a.spki) + logA
	key, wire := a.forge(t, name, 1)
	root := base64.StdEncoding.EncodeToString(make([]byte, 32))
	stray, strayWire := a.forge(t, namePrefix(b.spki)+logA, 1)
	plain, plainWire := a.forge(t, "example.com/log", 1)
	otherName, _ := a.forge(t, namePrefix(a.spki)+logB, 1)
	p224 := "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE"
	for name, c := range map[string]struct {
		head *kmsapi.LogHead
		spki []byte
		code string
	}{
		"no head":                        {nil, a.spki, "release_log_missing"},
		"an empty head":                  {&kmsapi.LogHead{}, a.spki, "release_log_key"},
		"another root":                   {good, b.spki, "release_log_key"},
		"no root":                        {good, nil, "release_log_key"},
		"a root that is none":            {good, []byte(p224), "release_log_key"},
		"a long root":                    {good, make([]byte, maxSPKI+1), "release_log_head"},
		"a key nobody vouches for":       {with(func(h *kmsapi.LogHead) { h.LogKey = wire.LogKey }), a.spki, "release_log_key"},
		"no signature of the root":       {with(func(h *kmsapi.LogHead) { h.LogKeySignature = nil }), a.spki, "release_log_key"},
		"a log of another root's name":   {stray.show(t, strayWire, checkpointText(namePrefix(b.spki)+logA, 1, Hash{})), a.spki, "release_log_key"},
		"a log that is no KMS's":         {plain.show(t, plainWire, checkpointText("example.com/log", 1, Hash{})), a.spki, "release_log_key"},
		"signed by another log":          {with(func(h *kmsapi.LogHead) { h.LogKey, h.LogKeySignature = wire.LogKey, wire.LogKeySignature }), a.spki, "release_log_head"},
		"another size":                   {with(func(h *kmsapi.LogHead) { h.Checkpoint = strings.Replace(h.Checkpoint, "\n2\n", "\n3\n", 1) }), a.spki, "release_log_head"},
		"no signature":                   {with(func(h *kmsapi.LogHead) { h.Checkpoint = strings.Split(h.Checkpoint, "—")[0] }), a.spki, "release_log_head"},
		"no checkpoint":                  {with(func(h *kmsapi.LogHead) { h.Checkpoint = "" }), a.spki, "release_log_head"},
		"a long checkpoint":              {with(func(h *kmsapi.LogHead) { h.Checkpoint += strings.Repeat("\n", maxCheckpoint) }), a.spki, "release_log_head"},
		"a long key":                     {with(func(h *kmsapi.LogHead) { h.LogKey += strings.Repeat("A", maxLogKey) }), a.spki, "release_log_head"},
		"a long signature":               {with(func(h *kmsapi.LogHead) { h.LogKeySignature = make([]byte, maxSignature+1) }), a.spki, "release_log_head"},
		"a checkpoint of another origin": {key.show(t, wire, checkpointText(otherName.Name(), 1, Hash{})), a.spki, "release_log_head"},
		"an extension":                   {key.show(t, wire, checkpointText(name, 1, Hash{})+"more\n"), a.spki, "release_log_head"},
		"two lines":                      {key.show(t, wire, name+"\n1\n"), a.spki, "release_log_head"},
		"a size with a zero before":      {key.show(t, wire, name+"\n01\n"+root+"\n"), a.spki, "release_log_head"},
		"a size with a sign":             {key.show(t, wire, name+"\n+1\n"+root+"\n"), a.spki, "release_log_head"},
		"a size beyond all":              {key.show(t, wire, checkpointText(name, math.MaxUint64, Hash{})), a.spki, "release_log_head"},
		"a short root":                   {key.show(t, wire, name+"\n1\nAAAA\n"), a.spki, "release_log_head"},
		"a root spelled otherwise":       {key.show(t, wire, name+"\n1\n"+root[:42]+"B=\n"), a.spki, "release_log_head"},
		"nothing with a root":            {key.show(t, wire, checkpointText(name, 0, Hash{})), a.spki, "release_log_head"},
	} {
		t.Run(name, func(t *testing.T) {
			h, err := VerifyHead(c.head, c.spki)
			wantCode(t, err, c.code)
			if !h.IsZero() {
				t.Fatal("a head that did not verify")
			}
		})
	}
}

func TestAHeadTravelsAsJSON(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	data, err := json.Marshal(l.Head())
	must(t, err)
	h, err := ParseHead(data, a.spki)
	must(t, err)
	if h != l.Head() {
		t.Fatalf("%s became %s", l.Head(), h)
	}
	_, err = ParseHead(data, newAuthority(t).spki)
	wantCode(t, err, "release_log_key")
	for _, text := range []string{"", "{}{}", `{"x":1}`, string(data) + "{}", strings.Repeat(" ", maxHeadFile+1)} {
		_, err = ParseHead([]byte(text), a.spki)
		wantCode(t, err, "release_log_head")
	}
}

func TestThreat_G10_AReleaseProvesThatItWasLogged(t *testing.T) {
	a := newAuthority(t)
	l, _ := a.create(t)
	rs := grow(t, l, 300)
	refused := testEntry(300)
	refused.Kind = Refusal
	refusal, err := l.Append(t.Context(), refused)
	must(t, err)
	for i := range rs {
		_, _, err := VerifyRelease(rs[i].Release(), a.spki)
		must(t, err)
	}
	good := rs[299].Release()
	with := func(change func(*kmsapi.Release)) *kmsapi.Release {
		r := proto.Clone(good).(*kmsapi.Release)
		change(r)
		return r
	}
	for name, c := range map[string]struct {
		release *kmsapi.Release
		code    string
	}{
		"no release":              {nil, "release_log_missing"},
		"no head":                 {with(func(r *kmsapi.Release) { r.Head = nil }), "release_log_missing"},
		"another root's head":     {with(func(r *kmsapi.Release) { r.Head = newAuthority(t).head(t, logA, 1, 1, Hash{}).Wire() }), "release_log_key"},
		"a head from before":      {with(func(r *kmsapi.Release) { r.Head = rs[298].Head.Wire() }), "release_log_inclusion"},
		"no entry":                {with(func(r *kmsapi.Release) { r.Entry = nil }), "release_log_entry"},
		"another entry":           {with(func(r *kmsapi.Release) { r.Entry = rs[298].Entry }), "release_log_inclusion"},
		"another index":           {with(func(r *kmsapi.Release) { r.Index-- }), "release_log_inclusion"},
		"an index beyond":         {with(func(r *kmsapi.Release) { r.Index = math.MaxUint64 }), "release_log_inclusion"},
		"no proof":                {with(func(r *kmsapi.Release) { r.Inclusion = nil }), "release_log_inclusion"},
		"a proof too long":        {with(func(r *kmsapi.Release) { r.Inclusion = append(r.Inclusion, make([]byte, 32)) }), "release_log_inclusion"},
		"a proof without end":     {with(func(r *kmsapi.Release) { r.Inclusion = make([][]byte, maxProof+1) }), "release_log_inclusion"},
		"a proof of short hashes": {with(func(r *kmsapi.Release) { r.Inclusion[0] = r.Inclusion[0][:31] }), "release_log_inclusion"},
		"a proof changed":         {with(func(r *kmsapi.Release) { r.Inclusion[0][0] ^= 1 }), "release_log_inclusion"},
		"a refusal":               {refusal.Release(), "release_log_not_granted"},
	} {
		t.Run(name, func(t *testing.T) {
			_, head, err := VerifyRelease(c.release, a.spki)
			wantCode(t, err, c.code)
			if !head.IsZero() {
				t.Fatal("a head for a release that does not verify")
			}
		})
	}
}

// forked makes two logs under one name and key, which part at an entry.
func (a *authority) forked(t testing.TB, parts, size int) (left, right *growing, heads func(g *growing) Head) {
	t.Helper()
	left, right = newTree(), newTree()
	for i := range size {
		e := testEntry(i)
		data, err := e.encode()
		must(t, err)
		must(t, left.append(data))
		if i >= parts {
			e.Note = "another"
		}
		data, err = e.encode()
		must(t, err)
		must(t, right.append(data))
	}
	return left, right, func(g *growing) Head {
		root, err := g.root()
		must(t, err)
		return a.head(t, logA, 1, g.size, root)
	}
}

func wantFork(t testing.TB, err error, one, other Head) {
	t.Helper()
	var f *Fork
	if !errors.As(err, &f) || !(f.Old == one && f.New == other || f.Old == other && f.New == one) {
		t.Fatalf("%v carries no proof of the fork of %s and %s", err, one, other)
	}
	// Both heads travel in it, each verifiable.
	data, err := json.Marshal(f)
	must(t, err)
	var sent struct{ Old, New json.RawMessage }
	must(t, json.Unmarshal(data, &sent))
	for i, h := range []Head{f.Old, f.New} {
		back, err := ParseHead([][]byte{sent.Old, sent.New}[i], h.SPKI())
		if err != nil || back != h {
			t.Fatalf("%s became %s (%v)", h, back, err)
		}
	}
}

func TestThreat_G10_ASplitViewIsDetected(t *testing.T) {
	a := newAuthority(t)
	left, right, head := a.forked(t, 4, 7)
	sizes := func(g *growing, n uint64) Head {
		cut := newTree()
		for i := range n {
			e := testEntry(int(i))
			if g == right && i >= 4 {
				e.Note = "another"
			}
			data, err := e.encode()
			must(t, err)
			must(t, cut.append(data))
		}
		return head(cut)
	}
	l, r := head(left), head(right)
	none := &bytes.Reader{}
	t.Run("as many entries each", func(t *testing.T) {
		err := Compare(l, r, nil)
		wantCode(t, err, "release_log_fork")
		wantFork(t, err, l, r)
	})
	t.Run("one more than the other", func(t *testing.T) {
		for _, n := range []uint64{1, 2, 3, 4, 5, 6} {
			small := sizes(left, n)
			proof, err := right.consistency(none, n, 7)
			must(t, err)
			err = Compare(small, r, proof)
			if n <= 4 { // they have not parted yet
				must(t, err)
				must(t, Compare(r, small, proof))
				continue
			}
			wantCode(t, err, "release_log_fork")
			wantFork(t, err, small, r)
			wantCode(t, Compare(r, small, proof), "release_log_fork")
		}
	})
	t.Run("no proof", func(t *testing.T) {
		wantCode(t, Compare(sizes(left, 3), l, nil), "release_log_fork")
		wantCode(t, Compare(sizes(left, 3), l, make([][]byte, maxProof+1)), "release_log_fork")
	})
	t.Run("the same", func(t *testing.T) { must(t, Compare(l, l, nil)) })
	t.Run("from nothing", func(t *testing.T) { must(t, Compare(sizes(left, 0), r, nil)) })
	t.Run("two keys of one log", func(t *testing.T) {
		root, _ := left.root()
		other := a.head(t, logA, 2, 7, root)
		err := Compare(l, other, nil)
		wantCode(t, err, "release_log_fork")
		wantFork(t, err, l, other)
	})
	t.Run("two logs", func(t *testing.T) {
		root, _ := left.root()
		wantCode(t, Compare(l, a.head(t, logB, 2, 7, root), nil), "release_log_other")
		wantCode(t, Compare(l, newAuthority(t).head(t, logA, 1, 7, root), nil), "release_log_other")
		collision := l // of the 8 bytes of a root that the name has
		collision.spki = string(newAuthority(t).spki)
		wantCode(t, Compare(l, collision, nil), "release_log_other")
	})
	t.Run("none", func(t *testing.T) {
		wantCode(t, Compare(l, Head{}, nil), "release_log_missing")
		wantCode(t, Compare(Head{}, l, nil), "release_log_missing")
	})
}

func FuzzCheckpoint(f *testing.F) {
	a := newAuthority(f)
	name := namePrefix(a.spki) + logA
	key, wire := a.forge(f, name, 1)
	for _, seed := range []string{checkpointText(name, 0, Hash(hasher.EmptyRoot())), checkpointText(name, 3, Hash{}), "", "\n\n\n", name + "\n1\n", fmt.Sprintf("%s\n%d\n\n", name, uint64(math.MaxUint64))} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		// As it is, and as the body of a note that is signed.
		for _, checkpoint := range []string{text, string(mustSign(text, key))} {
			w := proto.Clone(wire).(*kmsapi.LogHead)
			w.Checkpoint = checkpoint
			h, err := VerifyHead(w, a.spki)
			if err != nil {
				wantCode(t, err, "release_log_head")
				continue
			}
			if checkpointText(h.Log(), h.Size(), h.Root()) != text {
				t.Fatalf("%q is read as %s", text, h)
			}
		}
	})
}

func mustSign(text string, key *logKey) []byte {
	signed, err := note.Sign(&note.Note{Text: text}, key)
	if err != nil {
		return nil // not a text that a note may have
	}
	return signed
}
