// SPDX-License-Identifier: Apache-2.0

// Package wgconfig is the configuration of a WireGuard interface and the state of its
// peers, in the forms that WireGuard's tools and implementations speak.
//
// A configuration is made of typed values alone: a key is 32 bytes, an address is an
// address, a port a number. No text from outside reaches what is written, so that no key,
// address or endpoint can bring a line of its own (threats.md K01). [Interface.Check]
// refuses what would let one peer take another's traffic: a key or address twice, the
// interface's own, or an address outside its network.
//
// The private key is of a type that cannot be printed or compared by accident.
//
// Attacker-controlled: the text that [ParsePublicKey], [ParseEndpoint], [ParseAddress] read,
// and for the state of peers nothing but its endpoints.
//
// Implements spec/gateway.md §3.1 and §3.2; wg(8); wireguard.com/xplatform.
package wgconfig

import (
	"cmp"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

// KeySize is the length of a key in bytes.
const KeySize = 32

// Keepalive is how often peers behind address translation send something.
const Keepalive = 25 * time.Second

// MaxPeers is the most peers of one interface.
const MaxPeers = 1 << 16

// PublicKey is a peer's X25519 public key. The zero value is none; any other has been
// checked by [NewPublicKey], or comes from WireGuard itself.
type PublicKey struct{ b [KeySize]byte }

// ParsePublicKey reads standard base64 of exactly 32 bytes: 44 characters, padded, and no
// other spelling of the same key. Code wg_key, also for points of low order, with which a
// tunnel would have a key that everybody knows.
func ParsePublicKey(s string) (PublicKey, error) {
	k, err := decodeKey(s)
	if err != nil {
		return PublicKey{}, err
	}
	return NewPublicKey(k.b[:])
}

func decodeKey(s string) (k PublicKey, err error) {
	if len(s) == base64.StdEncoding.EncodedLen(KeySize) && !strings.ContainsAny(s, "\r\n") {
		if b, err := base64.StdEncoding.Strict().DecodeString(s); err == nil && len(b) == KeySize {
			copy(k.b[:], b)
			return k, nil
		}
	}
	return k, fault.New("wg_key", "a WireGuard key is 44 characters of base64")
}

// NewPublicKey takes 32 bytes. Code wg_key.
func NewPublicKey(b []byte) (k PublicKey, err error) {
	if len(b) != KeySize {
		return k, fault.New("wg_key", "a WireGuard key has %d bytes, not %d", len(b), KeySize)
	}
	point, err := ecdh.X25519().NewPublicKey(b)
	if err == nil {
		// Any scalar will do: with a point of low order each gives zero, which is refused.
		_, err = anyScalar.ECDH(point)
	}
	if err != nil {
		return k, fault.Wrap(err, "wg_key", "the WireGuard key is no usable point")
	}
	copy(k.b[:], b)
	return k, nil
}

var anyScalar = func() *ecdh.PrivateKey {
	k, err := ecdh.X25519().NewPrivateKey(append(make([]byte, KeySize-1), 0x40))
	if err != nil {
		panic(err)
	}
	return k
}()

// String returns the key in base64.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k.b[:]) }

// Bytes returns the 32 bytes.
func (k PublicKey) Bytes() [KeySize]byte { return k.b }

// IsZero reports whether there is no key.
func (k PublicKey) IsZero() bool { return k == PublicKey{} }

// PrivateKey is an interface's X25519 private key. It prints as its role.
type PrivateKey struct {
	_ [0]func() // not comparable
	k *hidden
}

type hidden struct{ b *[KeySize]byte }

// NewPrivateKey takes 32 bytes, which stay the caller's to wipe. Code wg_key.
func NewPrivateKey(b []byte) (PrivateKey, error) {
	if len(b) != KeySize {
		return PrivateKey{}, fault.New("wg_key", "a WireGuard private key has %d bytes, not %d", len(b), KeySize)
	}
	k := PrivateKey{k: &hidden{new([KeySize]byte)}}
	copy(k.k.b[:], b)
	return k, nil
}

// GeneratePrivateKey makes a key.
func GeneratePrivateKey() PrivateKey {
	k := PrivateKey{k: &hidden{new([KeySize]byte)}}
	rand.Read(k.k.b[:])
	k.k.b[0] &= 248
	k.k.b[31] = k.k.b[31]&127 | 64
	return k
}

// IsZero reports whether there is no key.
func (k PrivateKey) IsZero() bool { return k.k == nil }

// Public returns the public half, or none of none.
func (k PrivateKey) Public() PublicKey {
	if k.k == nil {
		return PublicKey{}
	}
	sk, err := ecdh.X25519().NewPrivateKey(k.k.b[:])
	if err != nil {
		return PublicKey{} // not for 32 bytes
	}
	return PublicKey{[KeySize]byte(sk.PublicKey().Bytes())}
}

// Bytes returns a copy of the 32 bytes, the caller's to wipe; zeros of no key.
func (k PrivateKey) Bytes() (b [KeySize]byte) {
	if k.k != nil {
		b = *k.k.b
	}
	return b
}

// Wipe overwrites the key wherever the value was copied to.
func (k PrivateKey) Wipe() {
	if k.k != nil {
		clear(k.k.b[:])
	}
}

// Format shows the role for every verb.
func (PrivateKey) Format(f fmt.State, _ rune) { f.Write([]byte("[WireGuard private key]")) }

// LogValue shows the role.
func (PrivateKey) LogValue() slog.Value { return slog.StringValue("[WireGuard private key]") }

// MarshalJSON refuses.
func (PrivateKey) MarshalJSON() ([]byte, error) {
	return nil, fault.New("wg_key", "a private key is not written as JSON")
}

// Endpoint is where a peer is reached: an address or a name, and a port.
type Endpoint struct {
	addr netip.Addr
	name hostname.Name
	port uint16
}

// EndpointOf is an endpoint at an address.
func EndpointOf(ap netip.AddrPort) Endpoint {
	return Endpoint{addr: ap.Addr().Unmap(), port: ap.Port()}
}

// ParseEndpoint reads `host:port`; IPv6 stands in brackets, without a zone. Code wg_endpoint.
func ParseEndpoint(s string) (Endpoint, error) {
	if len(s) > hostname.MaxName+6 {
		return Endpoint{}, fault.New("wg_endpoint", "the endpoint has %d bytes", len(s))
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return Endpoint{}, fault.New("wg_endpoint", "the endpoint %q is not host:port", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return Endpoint{}, fault.New("wg_endpoint", "the endpoint %q has no port from 1 to 65535", s)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return Endpoint{}, fault.New("wg_endpoint", "the endpoint %q is nobody's address", s)
		}
		return Endpoint{addr: a.Unmap(), port: uint16(n)}, nil
	}
	name, err := hostname.ParseName(host)
	if err != nil {
		return Endpoint{}, fault.Wrap(err, "wg_endpoint", "the endpoint %q", s)
	}
	return Endpoint{name: name, port: uint16(n)}, nil
}

// IsZero reports whether there is no endpoint: the peer is to call first.
func (e Endpoint) IsZero() bool { return e == Endpoint{} }

// Addr returns the address and port; ok is false for a name, and for none.
func (e Endpoint) Addr() (ap netip.AddrPort, ok bool) {
	return netip.AddrPortFrom(e.addr, e.port), e.addr.IsValid()
}

// String returns host:port.
func (e Endpoint) String() string {
	switch {
	case e.addr.IsValid():
		return netip.AddrPortFrom(e.addr, e.port).String()
	case e.name != "":
		return string(e.name) + ":" + strconv.Itoa(int(e.port))
	}
	return ""
}

// ParseAddress reads a peer's address in the tunnel, as upstream's gateways send it: with
// a prefix length or without, which is cut. Code wg_address.
func ParseAddress(s string) (netip.Addr, error) {
	text, bits, cidr := strings.Cut(s, "/")
	a, err := netip.ParseAddr(text)
	if err == nil && cidr {
		_, err = netip.ParsePrefix(text + "/" + bits)
	}
	if err != nil {
		return netip.Addr{}, fault.New("wg_address", "%q is no IP address", clip(s))
	}
	if a, err = plainAddr(a); err != nil {
		return netip.Addr{}, err
	}
	return a, nil
}

// plainAddr refuses addresses that no peer can have.
func plainAddr(a netip.Addr) (netip.Addr, error) {
	a = a.Unmap()
	if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return netip.Addr{}, fault.New("wg_address", "%s is no address that a peer can have", a)
	}
	return a, nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// Peer is one peer of an interface.
type Peer struct {
	Key       PublicKey
	Address   netip.Addr // its one address in the tunnel
	Endpoint  Endpoint   // zero where the peer calls
	Keepalive time.Duration
}

// Interface is a WireGuard interface with its peers.
type Interface struct {
	Key     PrivateKey
	Port    uint16
	Address netip.Addr   // its own address in the tunnel
	Network netip.Prefix // where peers' addresses lie; zero for no such check
	Peers   []Peer
}

// Check refuses configurations with codes wg_key (none), wg_port (none), wg_peers (too
// many), wg_key_duplicate, wg_key_own, wg_address, wg_address_duplicate, wg_address_own,
// wg_address_outside (of the network, or the network's own or broadcast address),
// wg_keepalive (not whole seconds up to 65535).
func (i *Interface) Check() error {
	if i.Key.IsZero() {
		return fault.New("wg_key", "the interface has no private key")
	}
	if i.Port == 0 {
		return fault.New("wg_port", "the interface has no port")
	}
	if len(i.Peers) > MaxPeers {
		return fault.New("wg_peers", "the interface has %d peers, more than %d", len(i.Peers), MaxPeers)
	}
	if i.Address.IsValid() {
		if _, err := plainAddr(i.Address); err != nil {
			return err
		}
	}
	own, keys, addrs := i.Key.Public(), make(map[PublicKey]bool, len(i.Peers)), make(map[netip.Addr]bool, len(i.Peers))
	for _, p := range i.Peers {
		a, err := plainAddr(p.Address)
		switch {
		case p.Key.IsZero():
			return fault.New("wg_key", "a peer has no key")
		case err != nil:
			return err
		case p.Key == own:
			return fault.New("wg_key_own", "a peer has the interface's own key")
		case keys[p.Key]:
			return fault.New("wg_key_duplicate", "two peers have the key %s", p.Key)
		case a == i.Address.Unmap():
			return fault.New("wg_address_own", "a peer has the interface's own address %s", a)
		case addrs[a]:
			return fault.New("wg_address_duplicate", "two peers have the address %s", a)
		case i.Network.IsValid() && !Inside(i.Network, a):
			return fault.New("wg_address_outside", "the peer's address %s is no host of %s", a, i.Network)
		case p.Keepalive < 0 || p.Keepalive%time.Second != 0 || p.Keepalive > 65535*time.Second:
			return fault.New("wg_keepalive", "a keepalive of %s", p.Keepalive)
		}
		keys[p.Key], addrs[a] = true, true
	}
	return nil
}

// Inside reports whether a is a host of the network: in it, and neither its own address
// nor its broadcast address.
func Inside(network netip.Prefix, a netip.Addr) bool {
	network, a = network.Masked(), a.Unmap()
	if !network.Contains(a) || a == network.Addr() && network.Bits() < a.BitLen()-1 {
		return false
	}
	return !a.Is4() || network.Bits() >= 31 || network.Contains(a.Next())
}

// Sort orders peers by their keys' text, as upstream's guests do.
func Sort(peers []Peer) {
	slices.SortFunc(peers, func(a, b Peer) int { return cmp.Compare(a.Key.String(), b.Key.String()) })
}

// Style is whose file is written.
type Style uint8

const (
	SyncConf Style = iota // `wg syncconf`, as the gateway uses it: no Address
	Quick                 // `wg-quick`, as upstream's guests have it
)

// Text returns the configuration in the format of wg(8), peers in the order given. It has
// the private key, so the file is 0600 and the bytes are the caller's to wipe. Codes of
// [Interface.Check].
func (i *Interface) Text(style Style) ([]byte, error) {
	if err := i.Check(); err != nil {
		return nil, err
	}
	// Enough that append never moves the key to another place.
	b := make([]byte, 0, 256+256*len(i.Peers)+hostnames(i.Peers))
	b = append(b, "[Interface]\nPrivateKey = "...)
	b = base64.StdEncoding.AppendEncode(b, i.Key.k.b[:])
	b = fmt.Appendf(b, "\nListenPort = %d\n", i.Port)
	if style == Quick && i.Address.IsValid() {
		b = fmt.Appendf(b, "Address = %s\n", single(i.Address))
	}
	for n, p := range i.Peers {
		if style == SyncConf || n == 0 {
			b = append(b, '\n')
		}
		b = fmt.Appendf(b, "[Peer]\nPublicKey = %s\nAllowedIPs = %s\n", p.Key, single(p.Address))
		if !p.Endpoint.IsZero() {
			b = fmt.Appendf(b, "Endpoint = %s\n", p.Endpoint)
		}
		if p.Keepalive > 0 {
			b = fmt.Appendf(b, "PersistentKeepalive = %d\n", p.Keepalive/time.Second)
		}
	}
	return b, nil
}

func hostnames(peers []Peer) (n int) {
	for _, p := range peers {
		n += len(p.Endpoint.name)
	}
	return n
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}

// UAPI returns the configuration as a `set` of WireGuard's cross-platform interface, which
// replaces all peers. Endpoints that are names must have been looked up: code wg_endpoint.
// It has the private key. Codes of [Interface.Check].
func (i *Interface) UAPI() ([]byte, error) {
	if err := i.Check(); err != nil {
		return nil, err
	}
	b := make([]byte, 0, 256+256*len(i.Peers))
	b = append(b, "private_key="...)
	b = hex.AppendEncode(b, i.Key.k.b[:])
	b = fmt.Appendf(b, "\nlisten_port=%d\nreplace_peers=true\n", i.Port)
	for _, p := range i.Peers {
		set, err := p.Set()
		if err != nil {
			return nil, err
		}
		b = append(b, set...)
	}
	return b, nil
}

// Set returns the lines that add or change this one peer, so that a registration costs one
// peer and not all of them.
func (p Peer) Set() ([]byte, error) {
	b := fmt.Appendf(nil, "public_key=%s\n", hex.EncodeToString(p.Key.b[:]))
	if ap, ok := p.Endpoint.Addr(); ok {
		b = fmt.Appendf(b, "endpoint=%s\n", ap)
	} else if !p.Endpoint.IsZero() {
		return nil, fault.New("wg_endpoint", "the endpoint %s is a name, which WireGuard itself does not look up", p.Endpoint)
	}
	b = fmt.Appendf(b, "persistent_keepalive_interval=%d\nreplace_allowed_ips=true\nallowed_ip=%s\n", p.Keepalive/time.Second, single(p.Address))
	return b, nil
}

// Remove returns the lines that remove the peer with the key.
func Remove(k PublicKey) []byte {
	return fmt.Appendf(nil, "public_key=%s\nremove=true\n", hex.EncodeToString(k.b[:]))
}
