// SPDX-License-Identifier: Apache-2.0

// Package proxyproto is the PROXY protocol's header, versions 1 and 2: what a load
// balancer in front of the gateway says of its client, and what the gateway says to an app
// whose measured policy asks for it.
//
// github.com/pires/go-proxyproto reads and writes the formats. This package bounds what is
// read before a byte of it is understood, takes a header in pieces of any size, and leaves
// what follows it unread, so that the connection can be spliced.
//
// Guarantees: at most [MaxV1] or [MaxV2] bytes are read, and never one beyond the header;
// an address is either IPv4 or IPv6, never IPv4 in the disguise of IPv6. TLVs are skipped.
//
// Attacker-controlled: every byte, where the other side is not one of [Sources]: whoever
// can write the header can be any client.
//
// Implements spec/gateway.md §2.7; HAProxy's proxy-protocol.txt §2.
package proxyproto

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"

	lib "github.com/pires/go-proxyproto"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// MaxV1 is the most bytes of a header of version 1, its CR and LF included.
	MaxV1 = 107
	// MaxV2 is the most bytes of a header of version 2, as upstream has it.
	MaxV2 = 2048

	shortest = len("PROXY UNKNOWN\r\n") // less than any of version 2
	fixedV2  = 16
)

var signatureV2 = []byte("\r\n\r\n\x00\r\nQUIT\n")

// Header is what a PROXY header says. A header without addresses (LOCAL, UNKNOWN: the
// balancer's own connection) has the zero Source and Destination.
type Header struct {
	Version     int // 1 or 2
	Source      netip.AddrPort
	Destination netip.AddrPort
}

// Local reports whether the header tells no client.
func (h Header) Local() bool { return !h.Source.IsValid() }

// Read reads a header from r and nothing behind it. Codes proxy_missing, proxy_malformed,
// proxy_too_large, proxy_unsupported (not TCP), proxy_truncated, proxy_read (any other
// error of r, which is wrapped).
func Read(r io.Reader) (Header, error) {
	raw, err := collect(r)
	if err != nil {
		return Header{}, err
	}
	h, err := lib.Read(bufio.NewReaderSize(bytes.NewReader(raw), len(raw)))
	if err != nil {
		return Header{}, fault.Wrap(err, "proxy_malformed", "read the PROXY header")
	}
	out := Header{Version: int(h.Version)}
	if h.Command.IsLocal() {
		return out, nil
	}
	source, destination, ok := h.TCPAddrs()
	if !ok {
		return Header{}, fault.New("proxy_unsupported", "the PROXY header tells of another protocol than TCP")
	}
	out.Source, out.Destination = plain(source), plain(destination)
	return out, nil
}

func plain(a *net.TCPAddr) netip.AddrPort {
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// collect reads the bytes of a header.
func collect(r io.Reader) ([]byte, error) {
	buf := make([]byte, 0, 256)
	for len(buf) < shortest {
		var err error
		if buf, err = more(r, buf, shortest-len(buf), false); err != nil {
			return nil, err
		}
		if !begins(buf, lib.SIGV1) && !begins(buf, signatureV2) {
			return nil, fault.New("proxy_missing", "the connection does not begin with a PROXY header").
				WithFix("send one from the load balancer, or turn inbound_pp_enabled off")
		}
	}
	if begins(buf, lib.SIGV1) {
		for !bytes.HasSuffix(buf, []byte("\r\n")) {
			if len(buf) == MaxV1 {
				return nil, fault.New("proxy_too_large", "the PROXY header has no end within %d bytes", MaxV1)
			}
			var err error
			if buf, err = more(r, buf, 1, true); err != nil {
				return nil, err
			}
		}
		return buf, nil
	}
	buf, err := more(r, buf, fixedV2-len(buf), true)
	if err != nil {
		return nil, err
	}
	size := int(buf[14])<<8 | int(buf[15])
	if fixedV2+size > MaxV2 {
		return nil, fault.New("proxy_too_large", "the PROXY header has %d bytes, more than %d", fixedV2+size, MaxV2)
	}
	return more(r, buf, size, true)
}

// begins reports whether b is the beginning of signature, or begins with it.
func begins(b, signature []byte) bool {
	n := min(len(b), len(signature))
	return bytes.Equal(b[:n], signature[:n])
}

// more appends up to n bytes of r, or all of them.
func more(r io.Reader, buf []byte, n int, all bool) ([]byte, error) {
	start := len(buf)
	least := min(n, 1)
	if all {
		least = n
	}
	buf = append(buf, make([]byte, n)...)
	got, err := io.ReadAtLeast(r, buf[start:], least)
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return nil, fault.New("proxy_truncated", "the connection ended within the PROXY header")
	case err != nil:
		return nil, fault.Wrap(err, "proxy_read", "read the PROXY header")
	}
	return buf[:start+got], nil
}

// Bytes returns the header on the wire; version 0 stands for 2. Of addresses of two
// families the IPv4 one is mapped to IPv6. Code proxy_header: another version, or one
// address alone.
func (h Header) Bytes() ([]byte, error) {
	if h.Version < 0 || h.Version > 2 || h.Source.IsValid() != h.Destination.IsValid() {
		return nil, fault.New("proxy_header", "no PROXY header has version %d, source %s and destination %s", h.Version, h.Source, h.Destination)
	}
	var source, destination net.Addr
	if h.Source.IsValid() {
		source, destination = net.TCPAddrFromAddrPort(bare(h.Source)), net.TCPAddrFromAddrPort(bare(h.Destination))
	}
	out, err := lib.HeaderProxyFromAddrs(byte(h.Version), source, destination).Format()
	if err != nil {
		return nil, fault.Wrap(err, "proxy_header", "write a PROXY header")
	}
	return out, nil
}

// bare removes the zone, which means nothing beyond this machine.
func bare(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}

// Sources are the load balancers whose header is believed. The zero value is none.
type Sources []netip.Prefix

// Trust reports whether the header of a connection from addr is believed.
func (s Sources) Trust(addr netip.Addr) bool {
	addr = addr.WithZone("").Unmap()
	for _, p := range s {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}
