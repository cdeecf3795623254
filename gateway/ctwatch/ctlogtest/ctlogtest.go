// SPDX-License-Identifier: Apache-2.0

// Package ctlogtest is a certificate transparency log for tests, with the API of RFC 6962 and
// that of C2SP static-ct-api at once, over the same tree. It can be made to lie. For tests
// alone.
package ctlogtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/crypto/cryptobyte"
)

var hasher = rfc6962.DefaultHasher

// Log is a log.
type Log struct {
	URL    string
	Key    []byte // DER SubjectPublicKeyInfo
	Client *http.Client

	key *ecdsa.PrivateKey
	mu  sync.Mutex
	// leaves are the tree; extra is what of a TileLeaf is not in the leaf.
	leaves, extra [][]byte
	at            time.Time
	requests      int
	lie           func([]byte) []byte
	slow          int // entries of an answer, at most
}

// New starts a log.
func New(t testing.TB) *Log {
	t.Helper()
	l := &Log{slow: 1 << 20}
	var err error
	if l.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if l.Key, err = x509.MarshalPKIXPublicKey(&l.key.PublicKey); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(l)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	l.URL, l.Client = s.URL+"/2026h2", s.Client()
	return l
}

// Add logs a certificate, and returns its index.
func (l *Log) Add(c *x509.Certificate) uint64 { return l.add(0, nil, c.Raw) }

// AddPre logs what is signed of a certificate, as of a precertificate.
func (l *Log) AddPre(c *x509.Certificate) uint64 {
	return l.add(1, make([]byte, sha256.Size), c.RawTBSCertificate)
}

// AddRaw logs bytes in the place of a certificate.
func (l *Log) AddRaw(b []byte) uint64 { return l.add(0, nil, b) }

func (l *Log) add(kind uint16, issuer, body []byte) uint64 {
	var b cryptobyte.Builder
	b.AddUint64(uint64(time.Now().UnixMilli()))
	b.AddUint16(kind)
	b.AddBytes(issuer)
	b.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(body) })
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte{0, 0, 5, 0, 0, 0, 0, 1}) }) // leaf_index, opaque here
	var extra cryptobyte.Builder
	if kind == 1 {
		extra.AddUint24LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte("precertificate")) })
	}
	extra.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(make([]byte, 2*sha256.Size)) })
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leaves = append(l.leaves, append([]byte{0, 0}, b.BytesOrPanic()...))
	l.extra = append(l.extra, extra.BytesOrPanic())
	return uint64(len(l.leaves) - 1)
}

// Filler adds entries that are nobody's.
func (l *Log) Filler(n int) {
	for i := range n {
		l.AddRaw(fmt.Appendf(nil, "filler %d", i))
	}
}

// Change replaces an entry, as no log may.
func (l *Log) Change(index uint64, body []byte) {
	i := l.AddRaw(body)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leaves[index], l.leaves = l.leaves[i], l.leaves[:i]
	l.extra = l.extra[:i]
}

// Lie lets entries be served changed, while the tree stays; nil ends it.
func (l *Log) Lie(f func(leaf []byte) []byte) {
	l.mu.Lock()
	l.lie = f
	l.mu.Unlock()
}

// Truncate forgets entries.
func (l *Log) Truncate(n int) {
	l.mu.Lock()
	l.leaves, l.extra = l.leaves[:n], l.extra[:n]
	l.mu.Unlock()
}

// Signed lets heads be of a moment; the zero time is now.
func (l *Log) Signed(at time.Time) {
	l.mu.Lock()
	l.at = at
	l.mu.Unlock()
}

// Slow bounds the entries of an answer.
func (l *Log) Slow(n int) {
	l.mu.Lock()
	l.slow = n
	l.mu.Unlock()
}

// Requests returns how many there were.
func (l *Log) Requests() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.requests
}

// root is MTH of RFC 6962 §2.1.
func root(leaves [][]byte) []byte {
	switch len(leaves) {
	case 0:
		return hasher.EmptyRoot()
	case 1:
		return hasher.HashLeaf(leaves[0])
	}
	k := split(len(leaves))
	return hasher.HashChildren(root(leaves[:k]), root(leaves[k:]))
}

// path is PATH of RFC 6962 §2.1.1.
func path(m int, leaves [][]byte) [][]byte {
	if len(leaves) == 1 {
		return nil
	}
	if k := split(len(leaves)); m < k {
		return append(path(m, leaves[:k]), root(leaves[k:]))
	} else {
		return append(path(m-k, leaves[k:]), root(leaves[:k]))
	}
}

func split(n int) int {
	k := 1
	for 2*k < n {
		k *= 2
	}
	return k
}

func (l *Log) head() (at uint64, sig []byte) {
	when := l.at
	if when.IsZero() {
		when = time.Now()
	}
	at = uint64(when.UnixMilli())
	m := binary.BigEndian.AppendUint64([]byte{0, 1}, at)
	m = append(binary.BigEndian.AppendUint64(m, uint64(len(l.leaves))), root(l.leaves)...)
	sum := sha256.Sum256(m)
	der, err := ecdsa.SignASN1(rand.Reader, l.key, sum[:])
	if err != nil {
		panic(err)
	}
	return at, append(binary.BigEndian.AppendUint16([]byte{4, 3}, uint16(len(der))), der...)
}

func (l *Log) served(i int) []byte {
	if l.lie != nil {
		return l.lie(l.leaves[i])
	}
	return l.leaves[i]
}

// ServeHTTP answers.
func (l *Log) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.requests++
	p, ok := strings.CutPrefix(r.URL.Path, "/2026h2")
	if !ok {
		http.NotFound(w, r)
		return
	}
	switch {
	case p == "/ct/v1/get-sth":
		at, sig := l.head()
		json.NewEncoder(w).Encode(map[string]any{"tree_size": len(l.leaves), "timestamp": at, "sha256_root_hash": root(l.leaves), "tree_head_signature": sig})
	case p == "/ct/v1/get-entries":
		start, _ := strconv.Atoi(r.FormValue("start"))
		end, _ := strconv.Atoi(r.FormValue("end"))
		entries := []map[string][]byte{}
		for i := start; i <= end && i < len(l.leaves) && i < start+l.slow; i++ {
			entries = append(entries, map[string][]byte{"leaf_input": l.served(i), "extra_data": l.extra[i]})
		}
		json.NewEncoder(w).Encode(map[string]any{"entries": entries})
	case p == "/ct/v1/get-proof-by-hash":
		hash, size := r.FormValue("hash"), len(l.leaves)
		fmt.Sscan(r.FormValue("tree_size"), &size)
		for i := size - 1; i >= 0; i-- {
			if base64.StdEncoding.EncodeToString(hasher.HashLeaf(l.leaves[i])) == hash {
				json.NewEncoder(w).Encode(map[string]any{"leaf_index": i, "audit_path": path(i, l.leaves[:size])})
				return
			}
		}
		http.NotFound(w, r)
	case p == "/checkpoint":
		const origin = "submit.ct.test/2026h2"
		at, sig := l.head()
		id := sha256.Sum256(l.Key)
		key := sha256.Sum256(append([]byte(origin+"\n\x05"), id[:]...))
		note := append(binary.BigEndian.AppendUint64(key[:4:4], at), sig...)
		fmt.Fprintf(w, "%s\n%d\n%s\n\n— witness.test %s\n— %s %s\n", origin, len(l.leaves), base64.StdEncoding.EncodeToString(root(l.leaves)),
			base64.StdEncoding.EncodeToString(make([]byte, 68)), origin, base64.StdEncoding.EncodeToString(note))
	case strings.HasPrefix(p, "/tile/"):
		l.tile(w, r, strings.TrimPrefix(p, "/tile/"))
	default:
		http.NotFound(w, r)
	}
}

func (l *Log) tile(w http.ResponseWriter, r *http.Request, p string) {
	kind, p, _ := strings.Cut(p, "/")
	p, part, partial := strings.Cut(p, ".p/")
	n, err := strconv.Atoi(strings.ReplaceAll(strings.ReplaceAll(p, "x", ""), "/", ""))
	width := 256
	if partial && err == nil {
		width, err = strconv.Atoi(part)
	}
	level, bad := strconv.Atoi(kind)
	if kind == "data" {
		level, bad = 0, nil
	}
	each := 1 << (8 * level)
	if err != nil || bad != nil || (n*256+width)*each > len(l.leaves) {
		http.NotFound(w, r)
		return
	}
	for i := n * 256; i < n*256+width; i++ {
		if kind == "data" {
			w.Write(l.served(i)[2:])
			w.Write(l.extra[i])
		} else {
			w.Write(root(l.leaves[i*each : (i+1)*each]))
		}
	}
}
