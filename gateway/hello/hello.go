// SPDX-License-Identifier: Apache-2.0

// Package hello reads the ClientHello at the beginning of a TLS connection: the name it
// is for, without taking part in the handshake, and the exact bytes, to be sent on to
// whoever does.
//
// A hello may lie in one record or in many, and records may come in pieces of any size.
// Encrypted ClientHello is told from its outer form; its inner name is not for us to see,
// and a client that only pretends to have one (GREASE) looks the same.
//
// Guarantees: at most [MaxSize] bytes are read and kept, and memory grows with what was
// sent, not with what was announced; the work is linear in the bytes, however they are cut;
// a message that breaks TLS's form is refused and never half understood. The name is one
// [hostname.Name]: a list of several names, and IP addresses, are refused.
//
// Stricter than crypto/tls: other name types than host_name and bytes behind the hello in
// its record are refused. Laxer: a trailing dot of the name is removed (spec/gateway.md §2.1).
//
// Attacker-controlled: every byte, and when it comes. Deadlines are the caller's.
//
// Implements spec/gateway.md §2.1 step 3; RFC 8446 §4.1.2, §5.1; RFC 6066 §3; RFC 7301 §3.1;
// RFC 8701 (GREASE); RFC 9849 §5 (ECH).
package hello

import (
	"bytes"
	"errors"
	"io"
	"slices"

	"golang.org/x/crypto/cryptobyte"

	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// MaxSize is the most bytes of a hello with its record headers: far above any
	// post-quantum key share in use (X25519MLKEM768 is 1216), and what crypto/tls takes.
	MaxSize = 64 << 10
	// MaxRecord is the most bytes that a record carries (RFC 8446 §5.1).
	MaxRecord = 1 << 14
	// MaxExtensions is the most extensions of a hello; clients send some twenty.
	MaxExtensions = 128

	recordHeader    = 5
	handshakeHeader = 4
	firstRead       = 2 << 10 // holds every hello in common use
)

// Numbers of the IANA TLS registries.
const (
	typeAlert      = 21
	typeHandshake  = 22
	msgClientHello = 1

	extServerName        = 0
	extALPN              = 16
	extSupportedVersions = 43
	extECH               = 0xfe0d

	nameTypeHost = 0
	echOuter     = 0
	echInner     = 1
)

// Hello is what a ClientHello says.
type Hello struct {
	ServerName hostname.Name // empty when there is none
	ALPN       []string      // in the client's order, without GREASE
	Versions   []uint16      // in the client's order, without GREASE
	ECH        bool          // ServerName is the outer name of an Encrypted ClientHello
	Size       int           // bytes of the hello on the wire, record headers included
}

// Read reads a hello from r. raw is all that was read, the hello and perhaps what followed
// it, and is to be sent on; it is also returned with an error, for a caller that answers
// strangers. raw uses the capacity of buf as far as that goes, and fresh memory beyond.
//
// Codes: hello_http (a plain HTTP request), hello_not_tls, hello_malformed, hello_too_large,
// hello_name (a server name that is no host name, or several), hello_truncated (the end
// within the hello), hello_read (any other error of r, which is wrapped).
func Read(r io.Reader, buf []byte) (h Hello, raw []byte, err error) {
	p := Parser{raw: buf[:0]}
	empty := 0
	for {
		room := p.room()
		n, err := r.Read(room)
		p.raw = p.raw[:len(p.raw)+min(max(n, 0), len(room))]
		if n > 0 {
			empty = 0
			if done, perr := p.advance(); done || perr != nil {
				return p.hello, p.raw, perr
			}
		} else if empty++; empty == 100 && err == nil {
			err = io.ErrNoProgress
		}
		switch {
		case errors.Is(err, io.EOF):
			return Hello{}, p.raw, fault.New("hello_truncated", "the connection ended after %d bytes of a ClientHello", len(p.raw))
		case err != nil:
			return Hello{}, p.raw, fault.Wrap(err, "hello_read", "read a ClientHello")
		}
	}
}

// Parser takes a hello in pieces. The zero value is ready.
type Parser struct {
	raw  []byte // all that was fed
	next int    // where the next record begins in raw
	// msg is the handshake message so far, when it lies in more than one record.
	msg   []byte
	hello Hello
	done  bool
	err   error
}

// Feed takes the next bytes and reports whether the hello is complete. Once it has
// returned true or an error, it keeps doing so. Codes as for [Read].
func (p *Parser) Feed(b []byte) (bool, error) {
	if p.done || p.err != nil {
		return p.done, p.err
	}
	if over := len(p.raw) + len(b) - MaxSize; over > 0 {
		b = b[:len(b)-over]
		p.raw = append(p.raw, b...)
		done, err := p.advance()
		if !done && err == nil {
			p.err = tooLarge()
		}
		return p.done, p.err
	}
	p.raw = append(p.raw, b...)
	return p.advance()
}

// Hello returns the hello once Feed has returned true.
func (p *Parser) Hello() Hello { return p.hello }

func tooLarge() error {
	return fault.New("hello_too_large", "the ClientHello has more than %d bytes", MaxSize)
}

// room returns free capacity behind raw, at most up to MaxSize and at least one byte, for
// advance has refused a raw of that size.
func (p *Parser) room() []byte {
	if len(p.raw) == cap(p.raw) {
		p.raw = slices.Grow(p.raw, min(max(firstRead, len(p.raw)), MaxSize-len(p.raw)))
	}
	return p.raw[len(p.raw):min(cap(p.raw), MaxSize)]
}

// advance takes the whole records that raw has beyond next.
func (p *Parser) advance() (bool, error) {
	if !p.done && p.err == nil {
		p.err = p.records()
		if p.err == nil && !p.done && len(p.raw) >= MaxSize {
			p.err = tooLarge()
		}
	}
	return p.done, p.err
}

func (p *Parser) records() error {
	for {
		rest := p.raw[p.next:]
		if whole, err := checkHeader(rest, p.next == 0); err != nil || !whole {
			return err
		}
		size := int(rest[3])<<8 | int(rest[4])
		if size > MaxRecord || size == 0 {
			return fault.New("hello_malformed", "a TLS record of %d bytes", size)
		}
		if len(rest) < recordHeader+size {
			// What a first record already shows to be wrong is not waited for.
			if p.msg == nil && len(rest) > recordHeader {
				_, err := messageSize(rest[recordHeader:])
				return err
			}
			return nil
		}
		fragment := rest[recordHeader : recordHeader+size]
		p.next += recordHeader + size
		msg := fragment
		if p.msg != nil {
			p.msg = append(p.msg, fragment...)
			msg = p.msg
		}
		want, err := messageSize(msg)
		switch {
		case err != nil:
			return err
		case want != 0 && len(msg) > want:
			return fault.New("hello_malformed", "bytes behind the ClientHello in its record")
		case want != 0 && len(msg) == want:
			h, err := parse(msg[handshakeHeader:])
			if err != nil {
				return err
			}
			h.Size = p.next
			p.hello, p.done, p.msg = h, true, nil
			return nil
		}
		if p.msg == nil {
			p.msg = bytes.Clone(fragment)
		}
	}
}

// checkHeader judges as much of a record's header as there is. whole is false while
// it is too short to tell, or to have a length.
func checkHeader(b []byte, first bool) (whole bool, err error) {
	switch {
	case len(b) == 0:
		return false, nil
	case b[0] == typeHandshake && (len(b) == 1 || b[1] == 3):
		return len(b) >= recordHeader, nil
	case !first:
		return false, fault.New("hello_malformed", "a record of another kind within the ClientHello")
	case slices.ContainsFunc(methods, func(m string) bool { return bytes.HasPrefix(b, []byte(m)) }):
		return false, fault.New("hello_http", "a plain HTTP request where TLS is spoken").WithFix("use https://")
	case slices.ContainsFunc(methods, func(m string) bool { return bytes.HasPrefix([]byte(m), b) }):
		return false, nil
	}
	return false, fault.New("hello_not_tls", "the connection does not begin with a TLS handshake")
}

var methods = []string{"GET ", "HEAD ", "POST ", "PUT ", "DELETE ", "OPTIONS ", "PATCH ", "CONNECT ", "TRACE ", "PRI * HTTP/2"}

// messageSize returns the size of the handshake message that begins with b, its header
// included, or 0 when b is too short to tell.
func messageSize(b []byte) (int, error) {
	if len(b) > 0 && b[0] != msgClientHello {
		return 0, fault.New("hello_malformed", "handshake message %d where a ClientHello is due", b[0])
	}
	if len(b) < handshakeHeader {
		return 0, nil
	}
	size := handshakeHeader + int(b[1])<<16 + int(b[2])<<8 + int(b[3])
	if size+recordHeader > MaxSize {
		return 0, tooLarge()
	}
	return size, nil
}

// parse reads the body of a ClientHello.
func parse(body []byte) (Hello, error) {
	var (
		h                            Hello
		s                            = cryptobyte.String(body)
		version                      uint16
		session, suites, compression cryptobyte.String
	)
	malformed := func(what string) (Hello, error) {
		return Hello{}, fault.New("hello_malformed", "ClientHello: %s", what)
	}
	if !s.ReadUint16(&version) || !s.Skip(32) || !s.ReadUint8LengthPrefixed(&session) || len(session) > 32 ||
		!s.ReadUint16LengthPrefixed(&suites) || len(suites) < 2 || len(suites)%2 != 0 ||
		!s.ReadUint8LengthPrefixed(&compression) || len(compression) == 0 {
		return malformed("its fixed part")
	}
	h.Versions = []uint16{version}
	if s.Empty() {
		return h, nil
	}
	var extensions cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return malformed("the length of its extensions")
	}
	var seen [MaxExtensions]uint16
	for n := 0; !extensions.Empty(); n++ {
		var (
			kind uint16
			data cryptobyte.String
		)
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) {
			return malformed("an extension's length")
		}
		if n == MaxExtensions {
			return malformed("too many extensions")
		}
		if slices.Contains(seen[:n], kind) {
			return malformed("an extension twice")
		}
		seen[n] = kind
		var err error
		switch kind {
		case extServerName:
			h.ServerName, err = serverName(data)
		case extALPN:
			h.ALPN, err = alpn(data)
		case extSupportedVersions:
			h.Versions, err = versions(data)
		case extECH:
			var form uint8
			if !data.ReadUint8(&form) || form != echOuter && form != echInner || form == echInner && !data.Empty() {
				return malformed("encrypted_client_hello")
			}
			h.ECH = form == echOuter
		}
		if err != nil {
			return Hello{}, err
		}
	}
	return h, nil
}

// serverName reads server_name: exactly one host name.
func serverName(data cryptobyte.String) (hostname.Name, error) {
	var (
		list, name cryptobyte.String
		kind       uint8
	)
	if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || !list.ReadUint8(&kind) || !list.ReadUint16LengthPrefixed(&name) {
		return "", fault.New("hello_malformed", "ClientHello: server_name")
	}
	if kind != nameTypeHost || !list.Empty() {
		return "", fault.New("hello_name", "the ClientHello has another server name than one host name")
	}
	n, err := hostname.ParseName(string(name))
	if err != nil {
		return "", fault.Wrap(err, "hello_name", "the ClientHello's server name")
	}
	return n, nil
}

func alpn(data cryptobyte.String) ([]string, error) {
	var list cryptobyte.String
	if !data.ReadUint16LengthPrefixed(&list) || !data.Empty() || list.Empty() {
		return nil, fault.New("hello_malformed", "ClientHello: ALPN")
	}
	var out []string
	for !list.Empty() {
		var name cryptobyte.String
		if !list.ReadUint8LengthPrefixed(&name) || name.Empty() {
			return nil, fault.New("hello_malformed", "ClientHello: ALPN")
		}
		if len(name) == 2 && grease(uint16(name[0])<<8|uint16(name[1])) {
			continue
		}
		out = append(out, string(name))
	}
	return out, nil
}

func versions(data cryptobyte.String) ([]uint16, error) {
	var list cryptobyte.String
	if !data.ReadUint8LengthPrefixed(&list) || !data.Empty() || list.Empty() || len(list)%2 != 0 {
		return nil, fault.New("hello_malformed", "ClientHello: supported_versions")
	}
	var out []uint16
	for !list.Empty() {
		var v uint16
		list.ReadUint16(&v)
		if !grease(v) {
			out = append(out, v)
		}
	}
	return out, nil
}

// grease reports whether a value is reserved to be ignored (RFC 8701 §2).
func grease(v uint16) bool { return v&0x0f0f == 0x0a0a && v>>8 == v&0xff }

// Alert is a TLS alert description.
type Alert uint8

// Alerts that a gateway sends before it has a session.
const (
	RecordOverflow   Alert = 22
	DecodeError      Alert = 50
	InternalError    Alert = 80
	UnrecognizedName Alert = 112
)

// AlertFor returns the alert that answers an error of this package; ok is false where none
// does: the other side speaks no TLS, or is gone.
func AlertFor(err error) (a Alert, ok bool) {
	switch fault.Code(err) {
	case "hello_malformed":
		return DecodeError, true
	case "hello_too_large":
		return RecordOverflow, true
	case "hello_name":
		return UnrecognizedName, true
	}
	return 0, false
}

// Record returns the alert as a fatal one on the wire.
func (a Alert) Record() []byte { return []byte{typeAlert, 3, 1, 0, 2, 2, byte(a)} }
