// SPDX-License-Identifier: Apache-2.0

package ctwatch

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
	"golang.org/x/time/rate"

	"github.com/dstack-go/dstack/internal/fault"
)

// Bounds of an answer.
const (
	requestTime = 30 * time.Second
	maxHead     = 64 << 10
	maxBatch    = 16 << 20 // bytes
	maxEntries  = 256      // asked for at once
	tileWidth   = 256
	maxSize     = 1 << 48 // entries of a log
)

// Head is a signed tree head (RFC 6962 §3.5).
type Head struct {
	Size      uint64 `json:"size"`
	Timestamp uint64 `json:"timestamp"` // Unix milliseconds
	Root      []byte `json:"root"`
	Signature []byte `json:"signature"` // DigitallySigned
}

// At is when the log signed.
func (h Head) At() time.Time { return time.UnixMilli(int64(h.Timestamp)) }

// logKey parses the key of a log: P-256, or RSA from 2048 bits (RFC 6962 §2.1.4).
func logKey(spki []byte) (crypto.PublicKey, error) {
	key, err := x509.ParsePKIXPublicKey(spki)
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return k, nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 {
			return k, nil
		}
	}
	return nil, errors.Join(errors.New("it is none of P-256, or RSA from 2048 bits"), err)
}

// message is what the signature of a head is over (RFC 6962 §3.5).
func (h Head) message() []byte {
	m := binary.BigEndian.AppendUint64([]byte{0, 1}, h.Timestamp)
	return append(binary.BigEndian.AppendUint64(m, h.Size), h.Root...)
}

// verify checks a head's signature, a DigitallySigned of RFC 5246 §4.7. Code ct_head.
func (h Head) verify(key crypto.PublicKey) error {
	bad := func(why string) error { return fault.New("ct_head", "the log's head %s", why) }
	if len(h.Root) != sha256.Size || h.Size > maxSize || h.Timestamp > 1<<50 {
		return bad("is not one of a log")
	}
	in := cryptobyte.String(h.Signature)
	var hash, kind uint8
	var sig cryptobyte.String
	if !in.ReadUint8(&hash) || !in.ReadUint8(&kind) || !in.ReadUint16LengthPrefixed(&sig) || !in.Empty() || hash != 4 {
		return bad("has a malformed signature")
	}
	sum := sha256.Sum256(h.message())
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if kind == 3 && ecdsa.VerifyASN1(k, sum[:], sig) {
			return nil
		}
	case *rsa.PublicKey:
		if kind == 1 && rsa.VerifyPKCS1v15(k, crypto.SHA256, sum[:], sig) == nil {
			return nil
		}
	}
	return bad("is not signed by the log's key")
}

// asker gets what a log serves.
type asker struct {
	http  *http.Client
	base  string
	limit *rate.Limiter
}

// errAbsent is status 404.
var errAbsent = errors.New("there is none")

// get returns an answer of at most limit bytes. Code ct_log.
func (a *asker) get(ctx context.Context, path string, limit int) ([]byte, error) {
	bad := func(err error) error {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return fault.Wrap(err, "ct_log", "asking %s%s", a.base, path)
	}
	if err := a.limit.Wait(ctx); err != nil {
		return nil, bad(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.base+path, nil)
	if err != nil {
		return nil, bad(err)
	}
	resp, err := a.http.Do(req)
	if err != nil {
		return nil, bad(err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotFound:
		return nil, bad(errAbsent)
	case resp.StatusCode != http.StatusOK:
		return nil, bad(errors.New("it answers " + resp.Status))
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = errTooLong
	}
	if err != nil {
		return nil, bad(err)
	}
	return data, nil
}

var errTooLong = errors.New("the answer is too long")

func (a *asker) json(ctx context.Context, path string, limit int, into any) error {
	data, err := a.get(ctx, path, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fault.Wrap(err, "ct_log", "the answer of %s%s", a.base, path)
	}
	return nil
}

// rfc6962Log is a log with the API of RFC 6962 §4.
type rfc6962Log struct {
	*asker
	key   crypto.PublicKey
	batch uint64 // entries that fit an answer, when fewer than maxEntries
}

func (l *rfc6962Log) head(ctx context.Context) (Head, error) {
	var r struct {
		Size      uint64 `json:"tree_size"`
		Timestamp uint64 `json:"timestamp"`
		Root      []byte `json:"sha256_root_hash"`
		Signature []byte `json:"tree_head_signature"`
	}
	if err := l.json(ctx, "/ct/v1/get-sth", maxHead, &r); err != nil {
		return Head{}, err
	}
	h := Head(r)
	return h, h.verify(l.key)
}

func (l *rfc6962Log) leaves(ctx context.Context, from, end uint64) ([][]byte, error) {
	if l.batch == 0 {
		l.batch = maxEntries
	}
	var r struct {
		Entries []struct {
			Leaf []byte `json:"leaf_input"`
		} `json:"entries"`
	}
	for {
		n := min(l.batch, end-from)
		err := l.json(ctx, fmt.Sprintf("/ct/v1/get-entries?start=%d&end=%d", from, from+n-1), maxBatch, &r)
		if errors.Is(err, errTooLong) && n > 1 {
			l.batch = n / 2
			continue
		}
		if err != nil {
			return nil, err
		}
		l.batch = min(2*l.batch, maxEntries)
		var out [][]byte
		for _, e := range r.Entries[:min(uint64(len(r.Entries)), n)] {
			out = append(out, e.Leaf)
		}
		return out, nil
	}
}

// edge takes it from the proof of the last leaf, whose siblings are all to its left.
func (l *rfc6962Log) edge(ctx context.Context, h Head) ([][]byte, error) {
	last, err := l.leaves(ctx, h.Size-1, h.Size)
	if err != nil {
		return nil, err
	}
	if len(last) != 1 {
		return nil, fault.New("ct_log", "the log has no entry %d", h.Size-1)
	}
	hash := rfc6962.DefaultHasher.HashLeaf(last[0])
	var r struct {
		Index uint64   `json:"leaf_index"`
		Path  [][]byte `json:"audit_path"`
	}
	if err := l.json(ctx, "/ct/v1/get-proof-by-hash?hash="+url.QueryEscape(base64.StdEncoding.EncodeToString(hash))+"&tree_size="+strconv.FormatUint(h.Size, 10), maxHead, &r); err != nil {
		return nil, err
	}
	height := 0
	for h.Size>>height&1 == 0 {
		height++
	}
	if r.Index != h.Size-1 || len(r.Path) < height {
		return nil, fault.New("ct_log", "the log's proof of its last entry is one of another")
	}
	for _, sibling := range r.Path[:height] {
		hash = rfc6962.DefaultHasher.HashChildren(sibling, hash)
	}
	edge := r.Path[height:]
	slices.Reverse(edge)
	return append(edge, hash), nil
}

// tiledLog is a log of C2SP static-ct-api.
type tiledLog struct {
	*asker
	key crypto.PublicKey
	id  [32]byte
}

func (l *tiledLog) head(ctx context.Context) (Head, error) {
	data, err := l.get(ctx, "/checkpoint", maxHead)
	if err != nil {
		return Head{}, err
	}
	h, err := parseCheckpoint(data, l.id)
	if err != nil {
		return Head{}, fault.Wrap(err, "ct_head", "the checkpoint of %s", l.base)
	}
	return h, h.verify(l.key)
}

// parseCheckpoint reads a signed note with the log's signature, of the kind
// RFC6962NoteSignature, which is not verified yet (C2SP signed-note, static-ct-api). The
// origin is where certificates are submitted, and need not be where tiles are.
func parseCheckpoint(data []byte, id [32]byte) (h Head, err error) {
	text, sigs, ok := bytes.Cut(data, []byte("\n\n"))
	lines := strings.SplitN(string(text), "\n", 4)
	if !ok || len(lines) < 3 || lines[0] == "" {
		return h, errors.New("it is no checkpoint")
	}
	origin := lines[0]
	if h.Size, err = strconv.ParseUint(lines[1], 10, 63); err != nil || strconv.FormatUint(h.Size, 10) != lines[1] {
		return h, errors.New("its size is none")
	}
	if h.Root, err = base64.StdEncoding.DecodeString(lines[2]); err != nil || len(h.Root) != sha256.Size {
		return h, errors.New("its root is none")
	}
	if len(lines) > 3 {
		return h, errors.New("it has an extension") // which the signature would not be over
	}
	sum := sha256.Sum256(append([]byte(origin+"\n\x05"), id[:]...))
	for line := range strings.Lines(string(sigs)) {
		name, sig, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(line, "— "), "\n"), " ")
		raw, err := base64.StdEncoding.DecodeString(sig)
		if !ok || err != nil || name != origin || len(raw) < 4+8 || !bytes.Equal(raw[:4], sum[:4]) {
			continue
		}
		h.Timestamp, h.Signature = binary.BigEndian.Uint64(raw[4:]), raw[12:]
		return h, nil
	}
	return h, errors.New("it has no signature of this log")
}

// tilePath is the path of a tile: its number in threes of digits (C2SP tlog-tiles).
func tilePath(kind string, n uint64, width uint64) string {
	path := fmt.Sprintf("%03d", n%1000)
	for n /= 1000; n > 0; n /= 1000 {
		path = fmt.Sprintf("x%03d/%s", n%1000, path)
	}
	path = "/tile/" + kind + "/" + path
	if width < tileWidth {
		path += ".p/" + strconv.FormatUint(width, 10)
	}
	return path
}

// tile gets a tile of a level, in a tree of a size; the whole one where the part is gone.
func (l *tiledLog) tile(ctx context.Context, kind string, n, width uint64, limit int) ([]byte, error) {
	data, err := l.get(ctx, tilePath(kind, n, width), limit)
	if errors.Is(err, errAbsent) && width < tileWidth {
		return l.get(ctx, tilePath(kind, n, tileWidth), limit)
	}
	return data, err
}

func (l *tiledLog) leaves(ctx context.Context, from, end uint64) ([][]byte, error) {
	n := from / tileWidth
	data, err := l.tile(ctx, "data", n, min(tileWidth, end-n*tileWidth), maxBatch)
	if err != nil {
		return nil, err
	}
	var out [][]byte
	in := cryptobyte.String(data)
	for i := n * tileWidth; i < end && i < (n+1)*tileWidth; i++ {
		leaf, ok := readTileLeaf(&in)
		if !ok {
			return nil, fault.New("ct_log", "entry %d of the log's tile %d does not parse", i%tileWidth, n)
		}
		if i >= from {
			out = append(out, leaf)
		}
	}
	return out, nil
}

// readTileLeaf reads a TileLeaf, and returns the MerkleTreeLeaf that is in it.
func readTileLeaf(in *cryptobyte.String) ([]byte, bool) {
	start := *in
	var kind uint16
	var body, skip cryptobyte.String
	if !in.Skip(8) || !in.ReadUint16(&kind) || kind > 1 || kind == 1 && !in.Skip(sha256.Size) ||
		!in.ReadUint24LengthPrefixed(&body) || !in.ReadUint16LengthPrefixed(&skip) {
		return nil, false
	}
	leaf := append([]byte{0, 0}, start[:len(start)-len(*in)]...)
	if kind == 1 && !in.ReadUint24LengthPrefixed(&skip) {
		return nil, false
	}
	return leaf, in.ReadUint16LengthPrefixed(&skip)
}

func (l *tiledLog) edge(ctx context.Context, h Head) ([][]byte, error) {
	var edge [][]byte
	tiles := map[string][]byte{}
	begin := uint64(0)
	for level := 63; level >= 0; level-- {
		if h.Size>>level&1 == 0 {
			continue
		}
		// The subtree from begin on, of 2^level leaves, is 2^(level%8) hashes of one tile.
		up := level / 8
		first, count := begin>>(8*up), uint64(1)<<(level%8)
		n := first / tileWidth
		kind := strconv.Itoa(up)
		key := kind + "/" + strconv.FormatUint(n, 10)
		if tiles[key] == nil {
			var err error
			if tiles[key], err = l.tile(ctx, kind, n, min(tileWidth, h.Size>>(8*up)-n*tileWidth), tileWidth*sha256.Size); err != nil {
				return nil, err
			}
		}
		at := first % tileWidth
		if uint64(len(tiles[key])) < (at+count)*sha256.Size {
			return nil, fault.New("ct_log", "the log's tile %s is too short", key)
		}
		hashes := slices.Collect(slices.Chunk(tiles[key][at*sha256.Size:(at+count)*sha256.Size], sha256.Size))
		for len(hashes) > 1 {
			for i := range len(hashes) / 2 {
				hashes[i] = rfc6962.DefaultHasher.HashChildren(hashes[2*i], hashes[2*i+1])
			}
			hashes = hashes[:len(hashes)/2]
		}
		edge = append(edge, hashes[0])
		begin += 1 << level
	}
	return edge, nil
}

// parseLeaf reads the certificate of a MerkleTreeLeaf; that of a precertificate has no
// signature.
func parseLeaf(leaf []byte) (*x509.Certificate, error) {
	in := cryptobyte.String(leaf)
	var version, kind uint8
	var entry uint16
	var body, extensions cryptobyte.String
	if !in.ReadUint8(&version) || version != 0 || !in.ReadUint8(&kind) || kind != 0 || !in.Skip(8) || !in.ReadUint16(&entry) || entry > 1 ||
		entry == 1 && !in.Skip(sha256.Size) || !in.ReadUint24LengthPrefixed(&body) || !in.ReadUint16LengthPrefixed(&extensions) || !in.Empty() {
		return nil, errors.New("the entry is none of RFC 6962")
	}
	if entry == 0 {
		return x509.ParseCertificate(body)
	}
	// A parser wants a whole certificate: the signature's algorithm is in what is signed.
	var tbs, algorithm cryptobyte.String
	whole := body
	if !whole.ReadASN1(&tbs, asn1.SEQUENCE) || !tbs.SkipOptionalASN1(asn1.Tag(0).ContextSpecific().Constructed()) ||
		!tbs.SkipASN1(asn1.INTEGER) || !tbs.ReadASN1Element(&algorithm, asn1.SEQUENCE) {
		return nil, errors.New("the precertificate does not parse")
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(body)
		b.AddBytes(algorithm)
		b.AddASN1BitString([]byte{0})
	})
	der, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
