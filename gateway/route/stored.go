// SPDX-License-Identifier: Apache-2.0

package route

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash/crc32"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// A stored record is a line: CRC-32C of the document in eight lower-case hexadecimal
// digits, a space, the document (JSON, compact), a line feed. The sum tells a torn or
// rotten line; it is no defence against whoever writes one.

// MaxRecord is the longest document in bytes.
const MaxRecord = 256 << 10

// maxMillis is the end of the year 9999.
const maxMillis = 253402300799999

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type stored struct {
	Version         int               `json:"version"` // 1
	App             dstack.AppID      `json:"app_id"`
	Instance        dstack.InstanceID `json:"instance_id"`
	Compose         string            `json:"compose_hash"`
	Key             string            `json:"key"` // base64
	Address         string            `json:"address"`
	Policy          *storedPolicy     `json:"port_policy"` // null when not known
	Attested        int64             `json:"attested"`    // Unix milliseconds
	Until           int64             `json:"until"`       // Unix milliseconds
	CertificateOnly bool              `json:"certificate_only,omitempty"`
	Domains         []storedDomain    `json:"custom_domains,omitempty"`
}

type storedDomain struct {
	Domain string `json:"domain"`
	Port   uint16 `json:"port"`
}

type storedPolicy struct {
	Restrict bool         `json:"restrict_mode"`
	Ports    []storedPort `json:"ports"`
}

type storedPort struct {
	Port uint16 `json:"port"`
	PP   bool   `json:"pp"`
	TLS  string `json:"tls"`
}

// Line returns the record as it is stored, with its line feed.
func (r *Record) Line() ([]byte, error) {
	s := stored{
		Version: 1, App: r.App, Instance: r.Instance, Compose: r.Compose.String(), Key: r.Key.String(),
		Address: r.Address.String(), Attested: r.Attested.UnixMilli(), Until: r.Until.UnixMilli(), CertificateOnly: r.CertificateOnly,
	}
	if r.Policy != nil {
		m := r.Policy.Manifest()
		s.Policy = &storedPolicy{m.RestrictMode, []storedPort{}}
		for _, p := range m.Ports {
			s.Policy.Ports = append(s.Policy.Ports, storedPort{p.Port, p.PP, p.TLS})
		}
	}
	for _, d := range r.Domains {
		s.Domains = append(s.Domains, storedDomain{string(d.Name), d.Port})
	}
	doc, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	line := append(hex.AppendEncode(nil, sum(doc)), ' ')
	return append(append(line, doc...), '\n'), nil
}

func sum(doc []byte) []byte {
	c := crc32.Checksum(doc, castagnoli)
	return []byte{byte(c >> 24), byte(c >> 16), byte(c >> 8), byte(c)}
}

// ParseLine reads a line without its line feed. It judges form alone. Code route_record.
func ParseLine(line []byte) (Record, error) {
	r, err := parseLine(line)
	if err != nil {
		return Record{}, fault.Wrap(err, "route_record", "a stored route")
	}
	return r, nil
}

func parseLine(line []byte) (r Record, err error) {
	digits, doc, ok := bytes.Cut(line, []byte(" "))
	if !ok || !bytes.Equal(digits, hex.AppendEncode(nil, sum(doc))) {
		return r, errors.New("its checksum is another")
	}
	var s stored
	if err := strictjson.Decode(doc, &s, strictjson.Limits{Size: MaxRecord, Depth: 4}); err != nil {
		return r, err
	}
	if s.Version != 1 {
		return r, errors.New("its version is not 1")
	}
	r = Record{App: s.App, Instance: s.Instance, CertificateOnly: s.CertificateOnly}
	if r.Compose, err = dstack.ParseComposeHash(s.Compose); err != nil {
		return r, err
	}
	if r.Key, err = wgconfig.ParsePublicKey(s.Key); err != nil {
		return r, err
	}
	if r.Address, err = netip.ParseAddr(s.Address); err != nil || r.Address.Zone() != "" {
		return r, errors.New("its address is none")
	}
	if s.Policy != nil {
		m := manifest.PortPolicy{RestrictMode: s.Policy.Restrict}
		for _, p := range s.Policy.Ports {
			m.Ports = append(m.Ports, manifest.Port{Port: p.Port, PP: p.PP, TLS: p.TLS})
		}
		p, err := portpolicy.New(m)
		if err != nil {
			return r, err
		}
		r.Policy = &p
	}
	if len(s.Domains) > MaxDomains {
		return r, errors.New("it has too many custom domains")
	}
	for _, d := range s.Domains {
		name, err := hostname.ParseName(d.Domain)
		if err != nil || string(name) != d.Domain || d.Port == 0 {
			return r, errors.New("a custom domain is none")
		}
		r.Domains = append(r.Domains, Domain{name, d.Port})
	}
	for _, v := range []int64{s.Attested, s.Until} {
		if v <= 0 || v > maxMillis {
			return r, errors.New("a time is out of range")
		}
	}
	r.Attested, r.Until = time.UnixMilli(s.Attested), time.UnixMilli(s.Until)
	return r, nil
}

// Dump returns all records as lines, for the disk or for another gateway.
func (t *Table) Dump() ([]byte, error) {
	var out []byte
	for _, r := range t.Records() {
		line, err := r.Line()
		if err != nil {
			return nil, err
		}
		out = append(out, line...)
	}
	return out, nil
}

// Merge applies the lines that can be and quarantines the others, each by itself. source
// names where they are from. It returns how many were applied or known, and how many not;
// records that only lost against newer ones, or whose lease has ended, are neither.
func (t *Table) Merge(source string, lines []byte) (applied, bad int) {
	now := t.cfg.Now()
	for line := range bytes.SplitSeq(lines, []byte("\n")) {
		if len(line) == 0 {
			continue
		}
		rec, err := ParseLine(line)
		if err == nil {
			err = t.check(&rec, now)
		}
		if err == nil {
			_, err = t.put(&rec, now)
		}
		switch code := fault.Code(err); {
		case err == nil:
			applied++
		case code == "route_replayed" || code == "route_ended" || code == "route_removed":
		default:
			bad++
			t.quarantine.add(Bad{Source: source, Digest: sha256.Sum256(line), At: now, Err: err})
		}
	}
	return applied, bad
}

// Bad is a record that was not applied.
type Bad struct {
	Source string
	Digest [32]byte // SHA-256 of the line
	At     time.Time
	Err    error
}

// maxQuarantine is how many bad records are remembered; the oldest go first.
const maxQuarantine = 256

type quarantine struct {
	mu    sync.Mutex
	bad   []Bad
	total uint64
}

func (q *quarantine) add(b Bad) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.total++
	if len(q.bad) == maxQuarantine {
		q.bad = slices.Delete(q.bad, 0, 1)
	}
	q.bad = append(q.bad, b)
}

// Quarantine returns the latest records that were not applied, and how many there ever were.
func (t *Table) Quarantine() (latest []Bad, total uint64) {
	t.quarantine.mu.Lock()
	defer t.quarantine.mu.Unlock()
	return slices.Clone(t.quarantine.bad), t.quarantine.total
}
