// SPDX-License-Identifier: Apache-2.0

package proxyproto

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

func header(version int, source, destination string) Header {
	return Header{version, netip.MustParseAddrPort(source), netip.MustParseAddrPort(destination)}
}

// v2 writes a header of version 2 by hand.
func v2(command, family byte, body string) string {
	return string(signatureV2) + string([]byte{command, family}) + string(binary.BigEndian.AppendUint16(nil, uint16(len(body)))) + body
}

const addresses4 = "\x01\x02\x03\x04\x05\x06\x07\x08\x2b\x67\x56\xce"

func TestVectors(t *testing.T) {
	var v struct {
		Accept []struct {
			Hex, Src, Dst string
			Version       int
		}
		Reject []struct{ Hex, Why string }
	}
	if err := json.Unmarshal(testkit.Vectors(t, "gateway/proxy_protocol.json"), &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Accept) == 0 || len(v.Reject) == 0 {
		t.Fatal("the vectors are not those that this test knows")
	}
	for _, c := range v.Accept {
		raw, _ := hex.DecodeString(c.Hex)
		want := header(c.Version, c.Src, c.Dst)
		if h, err := Read(bytes.NewReader(raw)); err != nil || h != want {
			t.Errorf("%s: %+v, %v", c.Hex, h, err)
		}
		if out, err := want.Bytes(); err != nil || !bytes.Equal(out, raw) {
			t.Errorf("written as %x, %v, want %s", out, err, c.Hex)
		}
	}
	codes := map[string]string{"no valid proxy protocol header detected": "proxy_missing", "v1 terminator not found within 107 bytes": "proxy_too_large", "v2 header longer than 2048 bytes in total": "proxy_too_large"}
	for _, c := range v.Reject {
		raw, _ := hex.DecodeString(c.Hex)
		if _, err := Read(bytes.NewReader(raw)); codes[c.Why] == "" || fault.Code(err) != codes[c.Why] {
			t.Errorf("%s: %v", c.Why, err)
		}
	}
}

func TestHeaders(t *testing.T) {
	v4 := header(2, "1.2.3.4:11111", "5.6.7.8:22222")
	for _, c := range []struct {
		name, raw string
		want      Header
		code      string
	}{
		{"v1, TCP4", "PROXY TCP4 1.2.3.4 5.6.7.8 11111 22222\r\n", header(1, "1.2.3.4:11111", "5.6.7.8:22222"), ""},
		{"v1, TCP6", "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n", header(1, "[2001:db8::1]:1", "[2001:db8::2]:2"), ""},
		{"v1, IPv4 in IPv6 comes out as IPv4", "PROXY TCP6 ::ffff:1.2.3.4 2001:db8::2 1 2\r\n", header(1, "1.2.3.4:1", "[2001:db8::2]:2"), ""},
		{"v1, unknown", "PROXY UNKNOWN\r\n", Header{Version: 1}, ""},
		{"v1, unknown with the rest ignored", "PROXY UNKNOWN x y z\r\n", Header{Version: 1}, ""},
		{"v1 at its longest", "PROXY UNKNOWN " + strings.Repeat("x", MaxV1-16) + "\r\n", Header{Version: 1}, ""},
		{"v1 one longer", "PROXY UNKNOWN " + strings.Repeat("x", MaxV1-15) + "\r\n", Header{}, "proxy_too_large"},
		{"v1, a line feed alone", "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\nmore\r\n", Header{}, "proxy_malformed"},
		{"v1, other protocol", "PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n", Header{}, "proxy_malformed"},
		{"v1, a word joined on", "PROXYX TCP4 1.2.3.4 5.6.7.8 1 2\r\n", Header{}, "proxy_malformed"},
		{"v1, one address", "PROXY TCP4 1.2.3.4 1 2\r\n", Header{}, "proxy_malformed"},
		{"v1, one word more", "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 3\r\n", Header{}, "proxy_malformed"},
		{"v1, IPv6 where IPv4 is said", "PROXY TCP4 ::1 ::2 1 2\r\n", Header{}, "proxy_malformed"},
		{"v1, a zone", "PROXY TCP6 fe80::1%eth0 ::2 1 2\r\n", Header{}, "proxy_malformed"},
		{"v1, port 65536", "PROXY TCP4 1.2.3.4 5.6.7.8 65536 2\r\n", Header{}, "proxy_malformed"},
		{"v1, a port with a sign", "PROXY TCP4 1.2.3.4 5.6.7.8 +1 2\r\n", Header{}, "proxy_malformed"},
		{"v2", v2(0x21, 0x11, addresses4), v4, ""},
		{"v2, TLVs are skipped", v2(0x21, 0x11, addresses4+"\x04\x00\x03abc\xee\x00\x00"), v4, ""},
		{"v2 at its longest", v2(0x21, 0x11, addresses4+"\x04\x07\xe1"+strings.Repeat("x", MaxV2-31)), v4, ""},
		{"v2 one longer", v2(0x21, 0x11, addresses4+"\x04\x07\xe2"+strings.Repeat("x", MaxV2-30)), Header{}, "proxy_too_large"},
		{"v2, the longest that can be announced", string(signatureV2) + "\x21\x11\xff\xff", Header{}, "proxy_too_large"},
		{"v2, local", v2(0x20, 0, ""), Header{Version: 2}, ""},
		{"v2, local with addresses", v2(0x20, 0x11, addresses4), Header{Version: 2}, ""},
		{"v2, local, too long for its family", v2(0x20, 0, strings.Repeat("x", 20)), Header{Version: 2}, ""},
		{"v2, UDP", v2(0x21, 0x12, addresses4), Header{}, "proxy_unsupported"},
		{"v2, a socket of this machine", v2(0x21, 0x31, strings.Repeat("/", 216)), Header{}, "proxy_unsupported"},
		{"v2, no family", v2(0x21, 0, ""), Header{}, "proxy_malformed"},
		{"v2, an unknown transport", v2(0x21, 0x13, addresses4), Header{}, "proxy_malformed"},
		{"v2, version 3", v2(0x31, 0x11, addresses4), Header{}, "proxy_malformed"},
		{"v2, an unknown command", v2(0x22, 0x11, addresses4), Header{}, "proxy_malformed"},
		{"v2, too short for its addresses", v2(0x21, 0x11, addresses4[:11]), Header{}, "proxy_malformed"},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", Header{}, "proxy_missing"},
		{"one wrong byte", "X", Header{}, "proxy_missing"},
		{"a signature that goes wrong", "\r\n\r\n\x00\r\nQUIX\n", Header{}, "proxy_missing"},
		{"nothing", "", Header{}, "proxy_truncated"},
		{"v1 cut", "PROXY TCP4 1.2.3.4 5.6", Header{}, "proxy_truncated"},
		{"v2 cut in its fixed part", string(signatureV2) + "\x21", Header{}, "proxy_truncated"},
		{"v2 cut", v2(0x21, 0x11, addresses4)[:20], Header{}, "proxy_truncated"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, slow := range []bool{false, true} {
				rest := "what follows"
				if c.code == "proxy_truncated" || c.code == "proxy_missing" {
					rest = ""
				}
				var r io.Reader = strings.NewReader(c.raw + rest)
				if slow {
					r = iotest.OneByteReader(r)
				}
				got, err := Read(r)
				if fault.Code(err) != c.code || got != c.want {
					t.Fatalf("%+v, code %q (%v), want %+v, %q", got, fault.Code(err), err, c.want, c.code)
				}
				if left, _ := io.ReadAll(r); err == nil && string(left) != rest {
					t.Errorf("%d bytes are left of %d", len(left), len(rest))
				}
			}
		})
	}
	if _, err := Read(iotest.ErrReader(io.ErrClosedPipe)); fault.Code(err) != "proxy_read" || !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a reader that fails: %v", err)
	}
}

func TestWrite(t *testing.T) {
	for _, c := range []struct {
		name string
		h    Header
		want string
		code string
	}{
		{"version 0 is 2", header(0, "1.2.3.4:11111", "5.6.7.8:22222"), v2(0x21, 0x11, addresses4), ""},
		{"two families, v1", header(1, "1.2.3.4:1", "[2001:db8::2]:2"), "PROXY TCP6 ::ffff:1.2.3.4 2001:db8::2 1 2\r\n", ""},
		{"a zone is cut", header(1, "[fe80::1%eth0]:1", "[fe80::2]:2"), "PROXY TCP6 fe80::1 fe80::2 1 2\r\n", ""},
		{"local, v1", Header{Version: 1}, "PROXY UNKNOWN\r\n", ""},
		{"local, v2", Header{}, v2(0x20, 0, ""), ""},
		{"version 3", header(3, "1.2.3.4:1", "5.6.7.8:2"), "", "proxy_header"},
		{"one address", Header{Source: netip.MustParseAddrPort("1.2.3.4:1")}, "", "proxy_header"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := c.h.Bytes()
			if fault.Code(err) != c.code || string(got) != c.want {
				t.Errorf("%q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestSources(t *testing.T) {
	s := Sources{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}
	for addr, want := range map[string]bool{"10.1.2.3": true, "11.0.0.1": false, "::ffff:10.1.2.3": true, "2001:db8::1": true, "2001:db9::1": false, "2001:db8::1%eth0": true} {
		if got := s.Trust(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %t", addr, got)
		}
	}
	if (Sources{}).Trust(netip.MustParseAddr("127.0.0.1")) || s.Trust(netip.Addr{}) {
		t.Error("somebody is trusted by nobody's word")
	}
}

func FuzzRead(f *testing.F) {
	for _, s := range []string{"PROXY TCP4 1.2.3.4 5.6.7.8 11111 22222\r\nrest", "PROXY UNKNOWN\r\n", v2(0x21, 0x11, addresses4+"\x04\x00\x01x"), v2(0x21, 0x21, strings.Repeat("a", 36)), v2(0x20, 0, ""), v2(0x21, 0x31, strings.Repeat("/", 216))} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := bytes.NewReader(raw)
		h, err := Read(r)
		used := len(raw) - r.Len()
		if used > MaxV2 {
			t.Fatalf("%d bytes were read", used)
		}
		slow, serr := Read(iotest.OneByteReader(bytes.NewReader(raw)))
		if slow != h || fault.Code(serr) != fault.Code(err) {
			t.Fatalf("in pieces %+v, %v; whole %+v, %v", slow, serr, h, err)
		}
		if err != nil {
			if fault.Code(err) == "" || h != (Header{}) {
				t.Fatalf("%+v, %v", h, err)
			}
			return
		}
		// What was read can be sent on, and means the same.
		out, err := h.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Read(bytes.NewReader(out)); err != nil || again != h {
			t.Fatalf("%+v becomes %+v, %v", h, again, err)
		}
	})
}
