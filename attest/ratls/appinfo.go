// SPDX-License-Identifier: Apache-2.0

package ratls

import (
	"encoding/binary"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// AppInfo is what an issuer established about an app when it issued the
// certificate (guest-agent.md §9.3).
type AppInfo struct {
	AppID            dstack.AppID
	ComposeHash      dstack.ComposeHash
	InstanceID       []byte // 20 bytes, or empty
	DeviceID         dstack.DeviceID
	MRSystem         [32]byte
	MRAggregated     [32]byte
	OSImageHash      []byte   // 32 bytes, or empty when unknown
	KeyProvider      []byte   // JSON of the key-provider event, or empty
	InitScriptHashes [][]byte // 32 bytes each, at most 5
}

// MessagePack types in use.
const (
	packNil   = 0xc0
	packBin8  = 0xc4
	packBin16 = 0xc5
	packBin32 = 0xc6
	packArray = 0x90 // ‖ count of up to 15
)

// Marshal returns the MessagePack form: an array of nine, each byte string a bin
// of the shortest form, the hashes an array of bin.
func (a *AppInfo) Marshal() []byte {
	out := []byte{packArray | 9}
	bin := func(b []byte) {
		switch n := len(b); {
		case n < 1<<8:
			out = append(out, packBin8, byte(n))
		case n < 1<<16:
			out = binary.BigEndian.AppendUint16(append(out, packBin16), uint16(n))
		default:
			out = binary.BigEndian.AppendUint32(append(out, packBin32), uint32(n))
		}
		out = append(out, b...)
	}
	for _, b := range [][]byte{a.AppID[:], a.ComposeHash[:], a.InstanceID, a.DeviceID[:], a.MRSystem[:], a.MRAggregated[:], a.OSImageHash, a.KeyProvider} {
		bin(b)
	}
	if a.InitScriptHashes == nil {
		return append(out, packNil)
	}
	out = append(out, packArray|byte(len(a.InitScriptHashes)))
	for _, h := range a.InitScriptHashes {
		bin(h)
	}
	return out
}

// ParseAppInfo reads the MessagePack form, of nine elements or, as older issuers
// write it, of eight; at most 64 KiB. Code: ratls_app_info_malformed.
func ParseAppInfo(data []byte) (*AppInfo, error) {
	p := &unpacker{data: data}
	if len(data) > maxAppInfo {
		p.fail("it has %d bytes, more than %d", len(data), maxAppInfo)
	}
	n := p.array(9)
	if p.err == nil && n < 8 {
		p.fail("it has %d elements, want 8 or 9", n)
	}
	var a AppInfo
	copy(a.AppID[:], p.bin("app id", len(a.AppID)))
	copy(a.ComposeHash[:], p.bin("compose hash", len(a.ComposeHash)))
	a.InstanceID = p.bin("instance id", 0, dstack.InstanceIDSize)
	copy(a.DeviceID[:], p.bin("device id", len(a.DeviceID)))
	copy(a.MRSystem[:], p.bin("mr_system", len(a.MRSystem)))
	copy(a.MRAggregated[:], p.bin("mr_aggregated", len(a.MRAggregated)))
	a.OSImageHash = p.bin("os image hash", 0, dstack.ImageHashSize)
	a.KeyProvider = p.bin("key provider")
	if n == 9 && !p.none() {
		a.InitScriptHashes = [][]byte{}
		for count := p.array(eventlog.MaxInitScripts); count > 0 && p.err == nil; count-- {
			a.InitScriptHashes = append(a.InitScriptHashes, p.bin("init script hash", 32))
		}
	}
	if p.err == nil && len(p.data) > 0 {
		p.fail("%d bytes follow it", len(p.data))
	}
	if p.err != nil {
		return nil, p.err
	}
	return &a, nil
}

// unpacker reads MessagePack by schema and keeps its first error.
type unpacker struct {
	data []byte // what is left
	err  error
}

func (p *unpacker) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fault.New("ratls_app_info_malformed", "app info of the certificate: "+format, args...)
	}
}

// take returns the next n bytes; n may be hostile. It returns nil after an error.
func (p *unpacker) take(n uint64) []byte {
	if p.err == nil && n > uint64(len(p.data)) {
		p.fail("it ends early")
	}
	if p.err != nil {
		return nil
	}
	b := p.data[:n:n]
	p.data = p.data[n:]
	return b
}

func (p *unpacker) head() byte {
	if b := p.take(1); b != nil {
		return b[0]
	}
	return 0
}

// none consumes a nil, if that is what comes next.
func (p *unpacker) none() bool {
	if p.err != nil || len(p.data) == 0 || p.data[0] != packNil {
		return false
	}
	p.data = p.data[1:]
	return true
}

func (p *unpacker) array(limit int) int {
	h := p.head()
	n := int(h &^ packArray)
	if p.err == nil && (h&0xf0 != packArray || n > limit) {
		p.fail("MessagePack type %#02x where an array of at most %d is expected", h, limit)
	}
	if p.err != nil {
		return 0
	}
	return n
}

// bin reads a byte string of one of the lengths, or of any if there are none.
func (p *unpacker) bin(what string, lengths ...int) []byte {
	var n uint64
	h := p.head()
	if p.err == nil && (h < packBin8 || h > packBin32) {
		p.fail("%s has MessagePack type %#02x, want bin", what, h)
	}
	if p.err != nil {
		return nil
	}
	for _, b := range p.take(1 << (h - packBin8)) {
		n = n<<8 | uint64(b)
	}
	b := p.take(n)
	ok := len(lengths) == 0
	for _, l := range lengths {
		ok = ok || len(b) == l
	}
	if p.err == nil && !ok {
		p.fail("%s has %d bytes", what, len(b))
	}
	if len(b) == 0 {
		return nil
	}
	return b
}
