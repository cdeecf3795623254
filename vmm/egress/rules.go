// SPDX-License-Identifier: Apache-2.0

package egress

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

// refusedNetworks are those of the IANA's special-purpose registries (RFC 6890) that are
// near this machine or nowhere, and a cloud's own host at a public address.
var refusedNetworks = prefixes(
	"0.0.0.0/8",         // this machine (RFC 1122 §3.2.1.3)
	"10.0.0.0/8",        // private (RFC 1918)
	"100.64.0.0/10",     // shared (RFC 6598): carriers, overlays, one cloud's metadata
	"127.0.0.0/8",       // loopback
	"168.63.129.16/32",  // Azure's host, which gives VMs their certificates
	"169.254.0.0/16",    // link-local (RFC 3927): metadata services
	"172.16.0.0/12",     // private
	"192.0.0.0/24",      // protocol assignments; one cloud's metadata
	"192.168.0.0/16",    // private
	"198.18.0.0/15",     // test beds (RFC 2544)
	"224.0.0.0/4",       // multicast
	"240.0.0.0/4",       // reserved, and the limited broadcast
	"::/127",            // unspecified and loopback
	"::ffff:0.0.0.0/96", // IPv4 in another form
	"fc00::/7",          // private (RFC 4193), metadata of one cloud
	"fe80::/10",         // link-local
	"fec0::/10",         // site-local, which was private once
	"ff00::/8",          // multicast
)

func prefixes(texts ...string) (out []netip.Prefix) {
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// Types of addresses (include/uapi/linux/rtnetlink.h).
var refusedTypes = []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST}

// Names of the chains.
const (
	chainOutput = "output"
	chainGuests = "guests"
	chainRefuse = "refuse"
)

// priority of the hook: after the destinations of what this machine sends were translated
// (-100), so that what is compared is where a packet goes.
const priority = 0

// rules are what the table follows from.
type rules struct {
	bases    []base
	allow    []Allow
	names    []netip.Addr   // name servers
	attached []netip.Prefix // networks of this machine
}

func (r rules) equal(o rules) bool {
	return slices.Equal(r.bases, o.bases) && slices.Equal(r.allow, o.allow) && slices.Equal(r.names, o.names) && slices.Equal(r.attached, o.attached)
}

// chains are the rules by chain.
func (r rules) chains() map[string][][]expr.Any {
	var output [][]expr.Any
	for _, b := range r.bases {
		output = append(output, rule(inCgroup(b), to(expr.VerdictGoto, chainGuests)))
	}
	guests := [][]expr.Any{rule(isReply(), accept())}
	for _, a := range r.allow {
		if a.Port == 0 {
			guests = append(guests, rule(toNet(a.Net), accept()))
			continue
		}
		proto := byte(unix.IPPROTO_TCP)
		if a.UDP {
			proto = unix.IPPROTO_UDP
		}
		guests = append(guests, rule(toNet(a.Net), toPort(proto, a.Port), accept()))
	}
	for _, a := range r.names {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			guests = append(guests, rule(toNet(netip.PrefixFrom(a, a.BitLen())), toPort(proto, 53), accept()))
		}
	}
	for _, t := range refusedTypes {
		guests = append(guests, rule(toType(t), to(expr.VerdictGoto, chainRefuse)))
	}
	for _, p := range append(slices.Clone(refusedNetworks), r.attached...) {
		guests = append(guests, rule(toNet(p), to(expr.VerdictGoto, chainRefuse)))
	}
	return map[string][][]expr.Any{
		chainOutput: output,
		chainGuests: append(guests, accept()),
		chainRefuse: {
			{&expr.Counter{}},
			// At once, or a guest's program waits for minutes.
			rule(meta(expr.MetaKeyL4PROTO, unix.IPPROTO_TCP), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
			{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}},
		},
	}
}

func (r rules) count() (n int) {
	for _, c := range r.chains() {
		n += len(c)
	}
	return n
}

func tableOf(name string) *nftables.Table {
	return &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
}

// replace puts a table with these rules in the place of what has its name, in one
// transaction.
func (r rules) replace(name string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open netlink for nftables: %w", err)
	}
	// Adding the table first makes the deletion valid when there is none yet.
	table := tableOf(name)
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	policy := nftables.ChainPolicyAccept
	chains := map[string]*nftables.Chain{
		chainRefuse: {Name: chainRefuse, Table: table},
		chainGuests: {Name: chainGuests, Table: table},
		chainOutput: {Name: chainOutput, Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput,
			Priority: nftables.ChainPriorityRef(priority), Policy: &policy},
	}
	all := r.chains()
	for _, c := range []string{chainRefuse, chainGuests, chainOutput} { // one that is gone to before one that goes
		conn.AddChain(chains[c])
		for _, exprs := range all[c] {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chains[c], Exprs: exprs})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("load table inet %s: %w", name, err)
	}
	return nil
}

// look returns how many rules the table has, and how many packets it refused.
func (f *Filter) look() (n int, refused uint64, err error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, 0, err
	}
	table := tableOf(f.table)
	for _, c := range []string{chainOutput, chainGuests, chainRefuse} {
		list, err := conn.GetRules(table, &nftables.Chain{Name: c, Table: table})
		if errors.Is(err, os.ErrNotExist) {
			return 0, 0, nil
		}
		if err != nil {
			return 0, 0, fmt.Errorf("read table inet %s: %w", f.table, err)
		}
		n += len(list)
		for _, r := range list {
			for _, e := range r.Exprs {
				if c, ok := e.(*expr.Counter); ok {
					refused += c.Packets
				}
			}
		}
	}
	return n, refused, nil
}

// drop removes a table, if there is one.
func drop(name string) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	table := tableOf(name)
	conn.AddTable(table)
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("remove table inet %s: %w", name, err)
	}
	return nil
}

func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

func to(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func meta(key expr.MetaKey, value byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{value}}}
}

// inCgroup matches packets of sockets that were made below the cgroup.
func inCgroup(b base) []expr.Any {
	return []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(b.level), Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint64(nil, b.id)},
	}
}

// isReply matches packets against the direction in which their flow began: who began it
// is not the guest.
func isReply() []expr.Any {
	const dirReply = 1 // IP_CT_DIR_REPLY
	return []expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{dirReply}}}
}

// toNet matches the destination's network.
func toNet(p netip.Prefix) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(16), 4
	if p.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, 24, 16
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return append(meta(expr.MetaKeyNFPROTO, family),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size)},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size), Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

// toPort matches the destination's port.
func toPort(proto byte, port uint16) []expr.Any {
	return append(meta(expr.MetaKeyL4PROTO, proto),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)})
}

// toType matches what the routes say of the destination.
func toType(kind uint32) []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, kind)},
	}
}
