// SPDX-License-Identifier: Apache-2.0

package settings

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// prefix is before the key of every record here.
const prefix = "settings/"

// Limits of a record.
const (
	maxRecord = 256 << 10 // bytes
	maxName   = 256       // bytes of a name that is for people
	maxID     = 64
	maxParam  = 4096 // bytes of a DNS provider's parameter
)

// LongestWait is the longest time that a certificate order may wait for DNS.
const LongestWait = time.Hour

// Key names a record of the kind T.
type Key[T any] string

// The keys of all records. Names are checked when a record is read or written.
const (
	DefaultDNSKey Key[DefaultDNS] = prefix + "dns-default"
	CertbotKey    Key[Certbot]    = prefix + "certbot"
)

// DNSKey is a credential's.
func DNSKey(id string) Key[DNS] { return Key[DNS](prefix + "dns/" + id) }

// DomainKey is a base domain's.
func DomainKey(name hostname.Name) Key[Domain] { return Key[Domain](prefix + "domain/" + string(name)) }

// NodeStatusKey is that of a gateway's status.
func NodeStatusKey(id uint32) Key[NodeStatus] { return Key[NodeStatus](nodeKey(id, "status")) }

// NodeURLKey is that of a gateway's URL.
func NodeURLKey(id uint32) Key[NodeURL] { return Key[NodeURL](nodeKey(id, "url")) }

func nodeKey(id uint32, what string) string {
	return prefix + "node/" + strconv.FormatUint(uint64(id), 10) + "/" + what
}

// PolicyKey is that of an operator's port policy of an instance.
func PolicyKey(id dstack.InstanceID) Key[Policy] {
	return Key[Policy](prefix + "policy/" + id.String())
}

// RemovedKey is that of an instance whose routes were ended.
func RemovedKey(id dstack.InstanceID) Key[Removed] {
	return Key[Removed](prefix + "removed/" + id.String())
}

// DrainedKey is that of an instance that gets no new connections.
func DrainedKey(id dstack.InstanceID) Key[Drained] {
	return Key[Drained](prefix + "drained/" + id.String())
}

// DNS is the right to change zones at a provider. It prints, and encodes, without Params.
type DNS struct {
	Name     string // for people
	Provider string
	Params   map[string]string // secrets among them
	TTL      time.Duration     // of TXT records; whole seconds
	Wait     time.Duration     // for a record to be seen; whole seconds
	Created  time.Time
	Updated  time.Time
}

// DefaultDNS names the credential of domains that name none.
type DefaultDNS struct{ ID string }

// Domain is a base domain that operators added.
type Domain struct {
	DNS      string // id of the credential; empty: the default one
	Port     uint16 // at which its names are reached
	Node     uint32 // the gateway that prefers it; 0: all
	Priority int32
}

// Certbot says how certificates are renewed. Zero values stand for what the configuration
// file has.
type Certbot struct {
	RenewInterval, RenewBefore, RenewTimeout time.Duration // whole seconds
	URL                                      string        // of the ACME directory
}

// NodeStatus says whether a gateway takes registrations.
type NodeStatus struct{ Down bool }

// NodeURL is where a gateway's RPC is reached.
type NodeURL struct{ URL string }

// Policy is the ports of an instance that its gateways let through, see
// [portpolicy.Decide].
type Policy struct{ Ports portpolicy.Policy }

// Removed is the moment up to which evidence of an instance counts no more.
type Removed struct{ At time.Time }

// Drained says that an instance gets no new connections.
type Drained struct{}

// String names the provider alone.
func (d DNS) String() string { return "credential of " + d.Provider }

// GoString is String.
func (d DNS) GoString() string { return d.String() }

// LogValue is String.
func (d DNS) LogValue() slog.Value { return slog.StringValue(d.String()) }

// MarshalJSON is String: what is stored is made by Put alone.
func (d DNS) MarshalJSON() ([]byte, error) { return json.Marshal(d.String()) }

// The stored forms. Each has its version, 1; times are Unix milliseconds, spans seconds.
type (
	storedDNS struct {
		Version  int               `json:"version"`
		Name     string            `json:"name"`
		Provider string            `json:"provider"`
		Params   map[string]string `json:"params"`
		TTL      int64             `json:"ttl"`
		Wait     int64             `json:"wait"`
		Created  int64             `json:"created"`
		Updated  int64             `json:"updated"`
	}
	storedDefaultDNS struct {
		Version int    `json:"version"`
		ID      string `json:"id"`
	}
	storedDomain struct {
		Version  int    `json:"version"`
		DNS      string `json:"dns"`
		Port     uint16 `json:"port"`
		Node     uint32 `json:"node"`
		Priority int32  `json:"priority"`
	}
	storedCertbot struct {
		Version       int    `json:"version"`
		RenewInterval int64  `json:"renew_interval"`
		RenewBefore   int64  `json:"renew_before"`
		RenewTimeout  int64  `json:"renew_timeout"`
		URL           string `json:"url"`
	}
	storedNodeStatus struct {
		Version int    `json:"version"`
		Status  string `json:"status"`
	}
	storedNodeURL struct {
		Version int    `json:"version"`
		URL     string `json:"url"`
	}
	storedPolicy struct {
		Version  int          `json:"version"`
		Restrict bool         `json:"restrict_mode"`
		Ports    []storedPort `json:"ports"`
	}
	storedPort struct {
		Port uint16 `json:"port"`
		PP   bool   `json:"pp"`
	}
	storedRemoved struct {
		Version int   `json:"version"`
		At      int64 `json:"at"`
	}
	storedDrained struct {
		Version int `json:"version"`
	}
)

// record is a kind of record: its stored form, and back. read judges form and meaning.
type record[T any] interface {
	*T
	stored() any
	read(text []byte) error
}

var errForm = errors.New("it is none of this version's")

func decode(text []byte, into any) error {
	return strictjson.Decode(text, into, strictjson.Limits{Size: maxRecord, Depth: 4})
}

// maxMillis is the end of the year 9999.
const maxMillis = 253402300799999

func millis(ms int64) (time.Time, bool) { return time.UnixMilli(ms), ms > 0 && ms <= maxMillis }

func span(seconds int64, most time.Duration) (time.Duration, bool) {
	return time.Duration(seconds) * time.Second, seconds >= 0 && seconds <= int64(most/time.Second)
}

func readable(s string, most int) bool {
	return len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// ValidID reports whether a text may be a credential's id: letters, digits and hyphens.
func ValidID(id string) bool {
	return id != "" && len(id) <= maxID && strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") == ""
}

func (d *DNS) stored() any {
	return storedDNS{1, d.Name, d.Provider, d.Params, int64(d.TTL / time.Second), int64(d.Wait / time.Second), d.Created.UnixMilli(), d.Updated.UnixMilli()}
}

func (d *DNS) read(text []byte) error {
	var s storedDNS
	if err := decode(text, &s); err != nil {
		return err
	}
	var ok [4]bool
	d.Name, d.Provider, d.Params = s.Name, s.Provider, s.Params
	d.TTL, ok[0] = span(s.TTL, LongestWait)
	d.Wait, ok[1] = span(s.Wait, LongestWait)
	d.Created, ok[2] = millis(s.Created)
	d.Updated, ok[3] = millis(s.Updated)
	switch {
	case s.Version != 1 || slices.Contains(ok[:], false):
		return errForm
	case d.TTL == 0 || d.Wait == 0:
		return errors.New("its TTL or wait is 0")
	case !readable(s.Name, maxName) || !readable(s.Provider, maxID) || s.Provider == "" || len(s.Params) > 16:
		return errors.New("its name or provider is none")
	}
	for name, value := range s.Params {
		if !readable(name, maxID) || name == "" || !readable(value, maxParam) {
			return errors.New("a parameter is none")
		}
	}
	return nil
}

func (d *DefaultDNS) stored() any { return storedDefaultDNS{1, d.ID} }

func (d *DefaultDNS) read(text []byte) error {
	var s storedDefaultDNS
	if err := decode(text, &s); err != nil {
		return err
	}
	if d.ID = s.ID; s.Version != 1 || !ValidID(s.ID) {
		return errForm
	}
	return nil
}

func (d *Domain) stored() any { return storedDomain{1, d.DNS, d.Port, d.Node, d.Priority} }

func (d *Domain) read(text []byte) error {
	var s storedDomain
	if err := decode(text, &s); err != nil {
		return err
	}
	*d = Domain{s.DNS, s.Port, s.Node, s.Priority}
	if s.Version != 1 || s.Port == 0 || s.DNS != "" && !ValidID(s.DNS) {
		return errForm
	}
	return nil
}

func (c *Certbot) stored() any {
	return storedCertbot{1, int64(c.RenewInterval / time.Second), int64(c.RenewBefore / time.Second), int64(c.RenewTimeout / time.Second), c.URL}
}

// Longest spans of Certbot.
const (
	LongestRenewInterval = 7 * 24 * time.Hour
	LongestRenewBefore   = 365 * 24 * time.Hour
	LongestRenewTimeout  = time.Hour
)

func (c *Certbot) read(text []byte) error {
	var s storedCertbot
	if err := decode(text, &s); err != nil {
		return err
	}
	var ok [3]bool
	c.RenewInterval, ok[0] = span(s.RenewInterval, LongestRenewInterval)
	c.RenewBefore, ok[1] = span(s.RenewBefore, LongestRenewBefore)
	c.RenewTimeout, ok[2] = span(s.RenewTimeout, LongestRenewTimeout)
	if c.URL = s.URL; s.Version != 1 || slices.Contains(ok[:], false) {
		return errForm
	}
	if s.URL != "" {
		return checkURL(s.URL, "https")
	}
	return nil
}

// checkURL demands a URL with a host and nothing that is secret or behind the path.
func checkURL(text string, schemes ...string) error {
	u, err := url.Parse(text)
	if err != nil || len(text) > 2048 || !readable(text, 2048) || !slices.Contains(schemes, u.Scheme) || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("its URL is none of " + strings.Join(schemes, " or ") + " with a host alone")
	}
	return nil
}

func (n *NodeStatus) stored() any {
	if n.Down {
		return storedNodeStatus{1, "down"}
	}
	return storedNodeStatus{1, "up"}
}

func (n *NodeStatus) read(text []byte) error {
	var s storedNodeStatus
	if err := decode(text, &s); err != nil {
		return err
	}
	if n.Down = s.Status == "down"; s.Version != 1 || s.Status != "down" && s.Status != "up" {
		return errForm
	}
	return nil
}

func (n *NodeURL) stored() any { return storedNodeURL{1, n.URL} }

func (n *NodeURL) read(text []byte) error {
	var s storedNodeURL
	if err := decode(text, &s); err != nil {
		return err
	}
	if n.URL = s.URL; s.Version != 1 {
		return errForm
	}
	return checkURL(s.URL, "http", "https")
}

func (p *Policy) stored() any {
	m := p.Ports.Manifest()
	s := storedPolicy{1, m.RestrictMode, []storedPort{}}
	for _, port := range m.Ports {
		s.Ports = append(s.Ports, storedPort{port.Port, port.PP})
	}
	return s
}

func (p *Policy) read(text []byte) (err error) {
	var s storedPolicy
	if err := decode(text, &s); err != nil {
		return err
	}
	m := manifest.PortPolicy{RestrictMode: s.Restrict}
	for _, port := range s.Ports {
		m.Ports = append(m.Ports, manifest.Port{Port: port.Port, PP: port.PP})
	}
	if p.Ports, err = portpolicy.New(m); err == nil && s.Version != 1 {
		return errForm
	}
	return err
}

func (r *Removed) stored() any { return storedRemoved{1, r.At.UnixMilli()} }

func (r *Removed) read(text []byte) error {
	var s storedRemoved
	if err := decode(text, &s); err != nil {
		return err
	}
	var ok bool
	if r.At, ok = millis(s.At); !ok || s.Version != 1 {
		return errForm
	}
	return nil
}

func (*Drained) stored() any { return storedDrained{1} }

func (*Drained) read(text []byte) error {
	var s storedDrained
	if err := decode(text, &s); err != nil {
		return err
	}
	if s.Version != 1 {
		return errForm
	}
	return nil
}

// Get returns a record and its revision; an error that is fs.ErrNotExist when there is
// none. Code settings_record: it does not parse.
func Get[T any, P record[T]](ctx context.Context, s Store, k Key[T]) (v T, at int64, err error) {
	e, err := s.Get(ctx, string(k))
	if err != nil {
		return v, 0, err
	}
	if err := P(&v).read(e.Value); err != nil {
		var none T
		return none, e.Revision, corrupt(string(k), err)
	}
	return v, e.Revision, nil
}

func corrupt(key string, err error) error {
	return fault.Wrap(err, "settings_record", "the record %s does not parse, and nothing is taken in its place", key).
		WithFix("set it anew, or delete it")
}

// Put writes a record that is still at the revision, see [Store]. Code settings_value: no
// reader would take it.
func Put[T any, P record[T]](ctx context.Context, s Store, k Key[T], v T, at int64) error {
	text, err := json.Marshal(P(&v).stored())
	if err != nil {
		return err
	}
	defer clear(text) // some have secrets
	var again T
	if err := P(&again).read(text); err != nil {
		return fault.Wrap(err, "settings_value", "the record %s", k)
	}
	if err := checkKey(string(k)); err != nil {
		return fault.Wrap(err, "settings_value", "the record %.200q", k)
	}
	return s.Put(ctx, string(k), slices.Clone(text), at)
}

// Delete removes a record that is still at the revision, see [Store].
func Delete[T any](ctx context.Context, s Store, k Key[T], at int64) error {
	return s.Delete(ctx, string(k), at)
}

// Absent reports whether an error is that there is no such record.
func Absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// Bad is a record that is not applied.
type Bad struct {
	Key   string
	Value []byte
	Err   error
}

// Snapshot is all records that parse, and those that do not.
type Snapshot struct {
	DNS        map[string]DNS
	DefaultDNS string // empty: there is none
	Domains    map[hostname.Name]Domain
	Certbot    *Certbot
	Down       map[uint32]bool // by gateway, of those that have a status
	URLs       map[uint32]string
	// Policies has, for a record that does not parse, the policy that admits nothing:
	// what it closed stays closed.
	Policies map[dstack.InstanceID]*portpolicy.Policy
	Removed  map[dstack.InstanceID]time.Time
	Drained  map[dstack.InstanceID]bool
	Bad      []Bad
}

// Load reads all records.
func Load(ctx context.Context, s Store) (*Snapshot, error) {
	entries, err := s.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := &Snapshot{
		DNS: map[string]DNS{}, Domains: map[hostname.Name]Domain{}, Down: map[uint32]bool{}, URLs: map[uint32]string{},
		Policies: map[dstack.InstanceID]*portpolicy.Policy{}, Removed: map[dstack.InstanceID]time.Time{}, Drained: map[dstack.InstanceID]bool{},
	}
	for _, e := range entries {
		if err := out.add(e); err != nil {
			out.Bad = append(out.Bad, Bad{e.Key, e.Value, corrupt(e.Key, err)})
		}
	}
	return out, nil
}

// Keep takes from an earlier snapshot what records said that do not parse now: a record that
// rots on one gateway ends nothing there. Policies are not kept, since those that do not
// parse admit nothing already.
func (s *Snapshot) Keep(earlier *Snapshot) {
	if earlier == nil {
		return
	}
	for _, b := range s.Bad {
		kind, name := kindOf(b.Key)
		id, _ := strconv.ParseUint(name, 10, 32)
		instance, _ := dstack.ParseInstanceID(name)
		switch kind {
		case "dns":
			keep(s.DNS, earlier.DNS, name)
		case "dns-default":
			s.DefaultDNS = earlier.DefaultDNS
		case "domain":
			keep(s.Domains, earlier.Domains, hostname.Name(name))
		case "certbot":
			s.Certbot = earlier.Certbot
		case "node/status":
			keep(s.Down, earlier.Down, uint32(id))
		case "node/url":
			keep(s.URLs, earlier.URLs, uint32(id))
		case "removed":
			keep(s.Removed, earlier.Removed, instance)
		case "drained":
			keep(s.Drained, earlier.Drained, instance)
		}
	}
}

func keep[K comparable, V any](into, from map[K]V, k K) {
	if v, ok := from[k]; ok {
		into[k] = v
	}
}

// kindOf splits a key into the kind of its record and the name within it.
func kindOf(key string) (kind, name string) {
	kind, name, _ = strings.Cut(strings.TrimPrefix(key, prefix), "/")
	if kind == "node" {
		id, what, _ := strings.Cut(name, "/")
		kind, name = kind+"/"+what, id
	}
	return kind, name
}

func checkKey(key string) error {
	return new(Snapshot).parse(Entry{Key: key}, true)
}

func (s *Snapshot) add(e Entry) error { return s.parse(e, false) }

// parse takes an entry; with nameOnly it judges the key alone.
func (s *Snapshot) parse(e Entry, nameOnly bool) error {
	kind, name := kindOf(e.Key)
	if !strings.HasPrefix(e.Key, prefix) {
		return errors.New("it is no setting")
	}
	var id uint64
	var instance dstack.InstanceID
	var host hostname.Name
	var err error
	switch kind {
	case "dns":
		if !ValidID(name) {
			err = errors.New("its id is none")
		}
	case "domain":
		if host, err = hostname.ParseBase(name); err == nil && string(host) != name {
			err = errors.New("its name is not in normal form")
		}
	case "node/status", "node/url":
		if id, err = strconv.ParseUint(name, 10, 32); err == nil && (id == 0 || strconv.FormatUint(id, 10) != name) {
			err = errors.New("its gateway's number is none")
		}
	case "policy", "removed", "drained":
		if instance, err = dstack.ParseInstanceID(name); err == nil && instance.String() != name {
			err = errors.New("its instance is not in normal form")
		}
	case "dns-default", "certbot":
		if name != "" {
			err = errors.New("it has no name")
		}
	default:
		err = errors.New("its kind is unknown")
	}
	if err != nil || nameOnly {
		return err
	}
	switch kind {
	case "dns":
		var v DNS
		if err = v.read(e.Value); err == nil {
			s.DNS[name] = v
		}
	case "dns-default":
		var v DefaultDNS
		if err = v.read(e.Value); err == nil {
			s.DefaultDNS = v.ID
		}
	case "domain":
		var v Domain
		if err = v.read(e.Value); err == nil {
			s.Domains[host] = v
		}
	case "certbot":
		var v Certbot
		if err = v.read(e.Value); err == nil {
			s.Certbot = &v
		}
	case "node/status":
		var v NodeStatus
		if err = v.read(e.Value); err == nil {
			s.Down[uint32(id)] = v.Down
		}
	case "node/url":
		var v NodeURL
		if err = v.read(e.Value); err == nil {
			s.URLs[uint32(id)] = v.URL
		}
	case "policy":
		var v Policy
		if err = v.read(e.Value); err != nil {
			v = Policy{}
		}
		s.Policies[instance] = &v.Ports
	case "removed":
		var v Removed
		if err = v.read(e.Value); err == nil {
			s.Removed[instance] = v.At
		}
	case "drained":
		var v Drained
		if err = v.read(e.Value); err == nil {
			s.Drained[instance] = true
		}
	}
	return err
}

// Credential is the credential of a base domain: that which it names, or the default one.
// ok is false when there is none.
func (s *Snapshot) Credential(d Domain) (DNS, bool) {
	id := d.DNS
	if id == "" {
		id = s.DefaultDNS
	}
	c, ok := s.DNS[id]
	return c, ok
}

// Names are the base domains that operators added, the preferred first, as gateway node
// prefers them: by priority, those of every gateway before its own, by name.
func (s *Snapshot) Names(node uint32) []hostname.Name {
	names := slices.Sorted(maps.Keys(s.Domains))
	rank := func(n hostname.Name) (other, priority, own int) {
		d := s.Domains[n]
		if d.Node != 0 && d.Node != node {
			other = 1
		}
		if d.Node == node {
			own = 1
		}
		return other, -int(d.Priority), own
	}
	slices.SortStableFunc(names, func(a, b hostname.Name) int {
		o1, p1, n1 := rank(a)
		o2, p2, n2 := rank(b)
		switch {
		case o1 != o2:
			return o1 - o2
		case p1 != p2:
			return p1 - p2
		}
		return n1 - n2
	})
	return names
}
