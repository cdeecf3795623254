// SPDX-License-Identifier: Apache-2.0

// Package firewall holds the guest's packet filter: one nftables table, "inet
// dstack", for IPv4 and IPv6 alike, loaded over netlink without any tool.
//
// Its base chains on input, output and forward have the policy drop and a priority
// before the container engine's, and a verdict drop is final in netfilter while
// accept only passes the packet on to later chains. So whatever rules the engine
// adds, a packet that this table drops stays dropped.
//
// Three states. [Closed], loaded before the network interface comes up: loopback
// and nothing else; not one packet from outside is accepted. [Outbound], while the
// boot asks for the time or for keys: connections that PID 1 itself opens, and the
// replies to them; whoever knocks is dropped still. [Open], after the boot has
// measured system-ready: in addition exactly the ports of the measured policy, and
// what the app's containers send out.
//
// Guarantees: each change is one netlink transaction, so there is no moment with
// half a rule set or none. Trusts: the kernel, and the manifest, which is measured.
// Attacker-controlled: every packet. A container that the measured manifest makes
// privileged, or puts on a macvlan, can get around this table; that is visible in
// the manifest. Implements design.md §3 (boot order) and threats.md §4.
package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is the name of the table, of family inet.
const Table = "dstack"

// Priority of the base chains: before the engine's filter chains, which are at 0,
// and after its destination NAT at -100, so that conntrack knows the original port.
const Priority = -10

// AgentPort is the guest agent's external TCP port. It is always open, for it is
// how anyone obtains evidence (design.md §4).
const AgentPort = 8090

// Policy says what comes in once the firewall is open. The zero Policy lets in
// nothing but the agent's port.
type Policy struct {
	// AnyPort admits connections to every port, for manifests without a
	// restrictive port policy: whatever the app publishes or listens on, as
	// upstream.
	AnyPort bool
	// Ports are the published ports admitted, TCP and UDP, when AnyPort is false.
	Ports []uint16
	// Tunnel is the one to the app's gateways; nil: there is none.
	Tunnel *Tunnel
}

// Tunnel is a WireGuard interface. Over it comes what Policy admits, TCP alone, and
// connections to TLSPort, which nobody reaches another way. TLSPort and the agent's port
// are the agent's over it, whatever ports containers publish.
type Tunnel struct {
	Interface string
	Port      uint16           // UDP, of WireGuard itself: for Endpoints alone
	TLSPort   uint16           // TCP: where the agent ends TLS
	Endpoints []netip.AddrPort // of the gateways
	Gateways  []netip.Addr     // their addresses in the tunnel, IPv4
}

// Numbers of include/uapi/linux/netfilter/nf_tables.h and
// nf_conntrack_common.h that the library has no names for.
const (
	metaIIFKind  expr.MetaKey = 26 // NFT_META_IIFKIND
	metaOIFKind  expr.MetaKey = 27 // NFT_META_OIFKIND
	ctStatusDNAT              = 1 << 5
	dirOriginal               = 0
)

// kindBridge is rtnl_link_ops.kind of a bridge in an interface-name register.
var kindBridge = ifname("bridge")

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// Closed loads the table in its closed state, replacing what it held.
func Closed(opts ...nftables.ConnOption) error { return load(closed, nil, opts...) }

// Outbound loads the table in the state in which the machine may ask and not be asked.
func Outbound(opts ...nftables.ConnOption) error { return load(outbound, nil, opts...) }

// Open loads the table in its open state under the policy.
func Open(p Policy, opts ...nftables.ConnOption) error { return load(open, &p, opts...) }

// state is how far the table is open.
type state int

const (
	closed state = iota
	outbound
	open
)

// load replaces the whole table in one transaction. p is for the state open.
func load(s state, p *Policy, opts ...nftables.ConnOption) error {
	conn, err := nftables.New(opts...)
	if err != nil {
		return fmt.Errorf("open netlink for nftables: %w", err)
	}
	// Adding the table first makes the deletion valid when there is none yet.
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)

	var ports *nftables.Set
	if p != nil && !p.AnyPort {
		if ports, err = portSet(conn, table, p.Ports); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		name  string
		hook  *nftables.ChainHook
		rules [][]expr.Any
	}{
		{"input", nftables.ChainHookInput, inputRules(s, p, ports)},
		{"output", nftables.ChainHookOutput, outputRules(s)},
		{"forward", nftables.ChainHookForward, forwardRules(s, p, ports)},
	} {
		drop := nftables.ChainPolicyDrop
		chain := conn.AddChain(&nftables.Chain{
			Name: c.name, Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: c.hook, Priority: nftables.ChainPriorityRef(Priority), Policy: &drop,
		})
		for _, exprs := range c.rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: exprs})
		}
	}
	if p != nil && p.Tunnel != nil {
		p.Tunnel.reserve(conn, table)
	}
	if err := conn.Flush(); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("load table inet %s (does the kernel have nf_tables with inet, ct and meta?): %w", Table, err)
		}
		return fmt.Errorf("load table inet %s: %w", Table, err)
	}
	return nil
}

// reserve keeps the agent's ports from the engine, which translates the destination of
// what is published: a connection that is not tracked is not translated.
func (t *Tunnel) reserve(conn *nftables.Conn, table *nftables.Table) {
	const source, dest = 0, 2 // offsets of TCP's ports
	policy := nftables.ChainPolicyAccept
	for _, c := range []struct {
		name   string
		hook   *nftables.ChainHook
		key    expr.MetaKey
		offset uint32
	}{
		{"reserve-in", nftables.ChainHookPrerouting, expr.MetaKeyIIFNAME, dest},
		{"reserve-out", nftables.ChainHookOutput, expr.MetaKeyOIFNAME, source},
	} {
		chain := conn.AddChain(&nftables.Chain{
			Name: c.name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: c.hook, Priority: nftables.ChainPriorityRaw, Policy: &policy,
		})
		for _, port := range []uint16{t.TLSPort, AgentPort} {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule(
				meta(c.key, ifname(t.Interface)), meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}),
				[]expr.Any{
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: c.offset, Len: 2},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
					&expr.Notrack{},
				})})
		}
	}
}

// portSet adds the constant set of the policy's ports and the agent's.
func portSet(conn *nftables.Conn, table *nftables.Table, ports []uint16) (*nftables.Set, error) {
	set := &nftables.Set{Table: table, Name: "ports", KeyType: nftables.TypeInetService, Constant: true}
	all := append([]uint16{AgentPort}, ports...)
	slices.Sort(all)
	var elems []nftables.SetElement
	for _, port := range slices.Compact(all) {
		elems = append(elems, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(port)})
	}
	if err := conn.AddSet(set, elems); err != nil {
		return nil, fmt.Errorf("add the set of ports: %w", err)
	}
	return set, nil
}

func inputRules(s state, p *Policy, ports *nftables.Set) [][]expr.Any {
	rules := [][]expr.Any{
		rule(meta(expr.MetaKeyIIFNAME, ifname("lo")), accept()),
	}
	if s == closed {
		// No established traffic either: nothing was allowed to start any.
		return rules
	}
	rules = append(rules,
		rule(ctState(expr.CtStateBitINVALID), drop()),
		rule(ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept()))
	// Neighbour discovery, the IPv6 counterpart of ARP: solicitation 135 and
	// advertisement 136, from the link only. No router advertisements.
	for _, typ := range []byte{135, 136} {
		rules = append(rules, rule(icmp6(typ), hopLimit255(), accept()))
	}
	if s == outbound {
		return rules
	}
	if t := p.Tunnel; t != nil {
		rules = append(rules, t.input(p, ports)...)
	}
	if p.AnyPort {
		for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			rules = append(rules, rule(meta(expr.MetaKeyL4PROTO, []byte{proto}), accept()))
		}
		return rules
	}
	for _, proto := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		rules = append(rules, rule(
			meta(expr.MetaKeyL4PROTO, []byte{proto}),
			[]expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID},
			},
			accept()))
	}
	return rules
}

// input are the rules of the tunnel, which come before those that may admit everything.
func (t *Tunnel) input(p *Policy, ports *nftables.Set) [][]expr.Any {
	var rules [][]expr.Any
	over := func() []expr.Any { return meta(expr.MetaKeyIIFNAME, ifname(t.Interface)) }
	tcp := func() []expr.Any { return meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}) }
	for _, g := range t.Gateways {
		from := rule(over(), sourceIs(g, 12), tcp())
		rules = append(rules, rule(from, destination(t.TLSPort), accept()))
		if p.AnyPort {
			rules = append(rules, rule(from, accept()))
			continue
		}
		rules = append(rules, rule(from, []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID},
		}, accept()))
	}
	rules = append(rules, rule(over(), drop()))
	udp := func() []expr.Any {
		return rule(meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_UDP}), destination(t.Port))
	}
	for _, e := range t.Endpoints {
		if e.Addr().Is4() {
			rules = append(rules, rule(udp(), sourceIs(e.Addr(), 12), accept()))
		} else {
			rules = append(rules, rule(udp(), sourceIs(e.Addr(), 8), accept()))
		}
	}
	return append(rules, rule(udp(), drop()), rule(tcp(), destination(t.TLSPort), drop()))
}

// sourceIs matches the source of a packet, at the offset of its network header that the
// address's family has.
func sourceIs(a netip.Addr, offset uint32) []expr.Any {
	family := byte(unix.NFPROTO_IPV4)
	if a.Is6() {
		family = unix.NFPROTO_IPV6
	}
	return append(meta(expr.MetaKeyNFPROTO, []byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(a.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()})
}

// destination matches the destination port of TCP or UDP.
func destination(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

func outputRules(s state) [][]expr.Any {
	if s == closed {
		// DHCP needs no rule: its client sends and receives on a packet socket,
		// which netfilter does not see.
		return [][]expr.Any{rule(meta(expr.MetaKeyOIFNAME, ifname("lo")), accept())}
	}
	// Before the app there is nobody but PID 1 to send anything. Once it runs it may
	// talk to anyone, also from the guest's own network namespace (network_mode: host).
	return [][]expr.Any{rule(accept())}
}

func forwardRules(s state, p *Policy, ports *nftables.Set) [][]expr.Any {
	if s != open {
		return nil
	}
	rules := [][]expr.Any{
		rule(ctState(expr.CtStateBitINVALID), drop()),
		rule(ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept()),
		// From containers to anywhere. Between containers too: which networks may
		// reach each other is the engine's decision, in its own later chains.
		rule(meta(metaIIFKind, kindBridge), accept()),
	}
	// From outside: only what the engine translated for a published port, and only
	// to a bridge. The port compared is the one the client dialled, not the
	// container's own.
	dnat := []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: native32(ctStatusDNAT), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(0)},
	}
	published := rule(meta(metaOIFKind, kindBridge), dnat)
	if !p.AnyPort {
		published = append(published,
			&expr.Ct{Key: expr.CtKeyPROTODST, Register: 1, Direction: dirOriginal},
			&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID})
	}
	if t := p.Tunnel; t != nil {
		// Over the tunnel the same, of gateways and by TCP alone.
		over := meta(expr.MetaKeyIIFNAME, ifname(t.Interface))
		for _, g := range t.Gateways {
			rules = append(rules, rule(over, sourceIs(g, 12), meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}), published, accept()))
		}
		rules = append(rules, rule(over, drop()))
	}
	return append(rules, rule(published, accept()))
}

// rule joins matches and a verdict.
func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

// meta matches a meta key that equals value.
func meta(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
	}
}

// ctState matches packets in any of the conntrack states.
func ctState(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: native32(bits), Xor: native32(0)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: native32(0)},
	}
}

// icmp6 matches an ICMPv6 message type.
func icmp6(typ byte) []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_ICMPV6}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{typ}})
}

// hopLimit255 matches IPv6 packets that no router has forwarded (RFC 4861 §7.1).
func hopLimit255() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 7, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{255}},
	}
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
