// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// Bounds of the log of keys: a key stays for keyGrace after its last certificate ended, so
// that whoever reads certificate transparency late still finds it.
const (
	keyGrace = 90 * 24 * time.Hour
	maxKeys  = 20_000
	// maxKeyNames is the most names that are noted of a key.
	maxKeyNames = 128
	// MaxInfoKeys is the most keys that one answer of AcmeInfo holds.
	MaxInfoKeys = 200
	// infoLife is how long an answer is given again: anyone asks.
	infoLife = 5 * time.Second
)

// keyRecord is a key that this gateway ordered certificates for.
type keyRecord struct {
	Version     int      `json:"version"` // 1
	SPKI        []byte   `json:"spki"`
	Names       []string `json:"names"`
	At          int64    `json:"at"`    // Unix seconds
	Until       int64    `json:"until"` // Unix seconds; end of its last certificate
	Quote       string   `json:"quote"`
	Attestation string   `json:"attestation"`
}

func keyLogKey(spki []byte) string {
	sum := sha256.Sum256(spki)
	return keyOf("keys", hex.EncodeToString(sum[:]))
}

func (r *keyRecord) check(key string) error {
	if r.Version != 1 || len(r.SPKI) == 0 || len(r.SPKI) > 4096 || keyLogKey(r.SPKI) != key {
		return fault.New("acme_record", "the record %s is not of the key it is named after", key)
	}
	return nil
}

func (m *Manager) keyRecord(ctx context.Context, key string) (*keyRecord, error) {
	r := &keyRecord{}
	if err := load(ctx, m.cfg.Storage, key, r); err != nil {
		return nil, err
	}
	return r, r.check(key)
}

// attestKey puts the key of a request into the log, with evidence, before anything is
// ordered for it: a certificate in a public log whose key is not here is nobody's of ours.
func (m *Manager) attestKey(ctx context.Context, csr *x509.CertificateRequest) error {
	key := keyLogKey(csr.RawSubjectPublicKeyInfo)
	r, err := m.keyRecord(ctx, key)
	switch {
	case err == nil && (r.Quote != "" || r.Attestation != "" || m.cfg.Attest == nil):
		return nil
	case err != nil && !errors.Is(err, errAbsent):
		return err
	}
	now := time.Now()
	r = &keyRecord{
		Version: 1, SPKI: csr.RawSubjectPublicKeyInfo, Names: slices.Clone(csr.DNSNames),
		At: now.Unix(), Until: now.Add(orderTime).Unix(),
	}
	if m.cfg.Attest != nil {
		if r.Quote, r.Attestation, err = m.cfg.Attest(ctx, CertReportData(r.SPKI)); err != nil {
			return fault.Wrap(err, "acme_attest", "attesting the key of %s", clip(strings.Join(csr.DNSNames, ", ")))
		}
	}
	return store(ctx, m.cfg.Storage, key, r)
}

// certified notes how long the certificate of a key lasts.
func (m *Manager) certified(ctx context.Context, leaf *x509.Certificate) error {
	key := keyLogKey(leaf.RawSubjectPublicKeyInfo)
	r, err := m.keyRecord(ctx, key)
	if err != nil {
		return err
	}
	r.Until = max(r.Until, leaf.NotAfter.Unix())
	for _, name := range leaf.DNSNames { // one key has certificates for several sets of names
		if !slices.Contains(r.Names, name) && len(r.Names) < maxKeyNames {
			r.Names = append(r.Names, name)
		}
	}
	m.addCustom(r)
	return store(ctx, m.cfg.Storage, key, r)
}

// customEvery is how often the log of keys is read for what other nodes certified.
const customEvery = 10 * time.Minute

// addCustom notes names outside the base domains whose control was proven: a key is in the
// log before that, for no longer than an order takes.
func (m *Manager) addCustom(r *keyRecord) {
	if r.Until-r.At <= int64(orderTime/time.Second) {
		return
	}
	for _, text := range r.Names {
		if name, err := hostname.ParseName(text); err == nil && m.domainOf(string(name)) == nil {
			m.mu.Lock()
			if m.custom == nil {
				m.custom = map[hostname.Name]int64{}
			}
			m.custom[name] = max(m.custom[name], r.Until)
			m.mu.Unlock()
		}
	}
}

// CustomNames are the names outside the base domains that a certificate is good for which
// this gateway, or another on its storage, ordered; those of others may be ten minutes late.
func (m *Manager) CustomNames(ctx context.Context) []hostname.Name {
	m.mu.Lock()
	read := time.Since(m.customAt) > customEvery
	if read {
		m.customAt = time.Now()
	}
	m.mu.Unlock()
	if read {
		records, err := m.keyRecords(ctx)
		if err != nil {
			m.log.Warn("reading what custom domains were certified", "error", err)
		}
		for _, r := range records {
			m.addCustom(r)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []hostname.Name
	for name, until := range m.custom {
		if until < time.Now().Unix() {
			delete(m.custom, name)
			continue
		}
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// KnownKey reports whether a certificate with this key may exist: it is in the log of keys
// that certificates were ordered for. spki is the SHA-256 of the SubjectPublicKeyInfo in DER.
func (m *Manager) KnownKey(ctx context.Context, spki [32]byte) (bool, error) {
	_, err := m.keyRecord(ctx, keyOf("keys", hex.EncodeToString(spki[:])))
	if errors.Is(err, errAbsent) {
		return false, nil
	}
	return err == nil, err
}

// Key is a key that certificates were ordered for.
type Key struct {
	SPKI               []byte // DER
	Names              []string
	At, Until          time.Time
	Quote, Attestation string
}

// Keys returns keys in the log, newest first, from offset on, at most limit (0 is
// MaxInfoKeys), and how many there are. name, when not empty, keeps the keys that had a
// certificate for this very name. Records that do not parse are left out and logged.
func (m *Manager) Keys(ctx context.Context, name string, offset, limit int) ([]Key, int, error) {
	if limit <= 0 || limit > MaxInfoKeys {
		limit = MaxInfoKeys
	}
	records, err := m.keyRecords(ctx)
	if err != nil {
		return nil, 0, err
	}
	if name != "" {
		records = slices.DeleteFunc(records, func(r *keyRecord) bool { return !slices.Contains(r.Names, name) })
	}
	total := len(records)
	records = records[min(max(offset, 0), total):]
	records = records[:min(limit, len(records))]
	keys := make([]Key, len(records))
	for i, r := range records {
		keys[i] = Key{r.SPKI, r.Names, time.Unix(r.At, 0), time.Unix(r.Until, 0), r.Quote, r.Attestation}
	}
	return keys, total, nil
}

func (m *Manager) keyRecords(ctx context.Context) ([]*keyRecord, error) {
	list, err := m.cfg.Storage.List(ctx, keyOf("keys"), false)
	if err != nil {
		if exists := m.cfg.Storage.Exists(ctx, keyOf("keys")); !exists {
			return nil, nil
		}
		return nil, fault.Wrap(err, "acme_record", "listing the keys")
	}
	var records []*keyRecord
	for _, key := range list[:min(len(list), maxKeys)] {
		r, err := m.keyRecord(ctx, keyOf("keys", path.Base(key)))
		if err != nil {
			m.log.Error("a key's record is left out", "record", key, "error", err)
			continue
		}
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b *keyRecord) int {
		return cmp.Or(cmp.Compare(b.At, a.At), bytes.Compare(a.SPKI, b.SPKI))
	})
	return records, nil
}

// Prune removes keys whose certificates ended long ago; with more than maxKeys left, those
// that ended first. It returns how many went. To be called about daily, on any node.
func (m *Manager) Prune(ctx context.Context) (int, error) {
	records, err := m.keyRecords(ctx)
	if err != nil {
		return 0, err
	}
	slices.SortFunc(records, func(a, b *keyRecord) int { return cmp.Compare(b.Until, a.Until) })
	gone := 0
	limit := time.Now().Add(-keyGrace).Unix()
	for i, r := range records {
		if r.Until >= limit && i < maxKeys {
			continue
		}
		if err := m.cfg.Storage.Delete(ctx, keyLogKey(r.SPKI)); err != nil {
			return gone, fault.Wrap(err, "acme_record", "removing an old key")
		}
		gone++
	}
	return gone, nil
}

// AcmeInfo is what anyone may ask: the account of the first CA that has one, and the newest
// keys, with evidence for each. It holds at most MaxInfoKeys keys, and may be some seconds
// old; it is not to be changed.
func (m *Manager) AcmeInfo(ctx context.Context) (*gateway.AcmeInfoResponse, error) {
	m.mu.RLock()
	info, at := m.info, m.infoAt
	m.mu.RUnlock()
	if info != nil && time.Since(at) < infoLife {
		return info, nil
	}
	info, _, err := m.asking.Do(ctx, m.ctx, struct{}{}, m.makeInfo)
	return info, err
}

func (m *Manager) makeInfo(ctx context.Context) (*gateway.AcmeInfoResponse, error) {
	accounts, err := m.Accounts(ctx)
	if err != nil {
		return nil, err
	}
	info := &gateway.AcmeInfoResponse{}
	if len(accounts) > 0 {
		a := accounts[0]
		info.AccountUri, info.AccountQuote, info.AccountAttestation = a.URI, a.Quote, a.Attestation
	}
	keys, _, err := m.Keys(ctx, "", 0, MaxInfoKeys)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		info.QuotedHistKeys = append(info.QuotedHistKeys, &gateway.QuotedPublicKey{PublicKey: k.SPKI, Quote: k.Quote, Attestation: k.Attestation})
	}
	m.mu.Lock()
	m.info, m.infoAt = info, time.Now()
	m.mu.Unlock()
	return info, nil
}
