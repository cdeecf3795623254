// SPDX-License-Identifier: Apache-2.0

package hello

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	utls "github.com/refraction-networking/utls"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// capture returns what a client sends first, and sends it an alert in return.
func capture(t testing.TB, handshake func(net.Conn) error) []byte {
	t.Helper()
	client, server := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- handshake(client) }()
	server.SetDeadline(time.Now().Add(10 * time.Second))
	_, raw, err := Read(server, nil)
	if err != nil {
		t.Fatalf("a client's real hello: %v\n%x", err, raw)
	}
	if _, err := server.Write(UnrecognizedName.Record()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("the client, sent the alert: %v", err)
	}
	server.Close()
	return raw
}

func goClient(cfg *tls.Config) func(net.Conn) error {
	return func(c net.Conn) error {
		defer c.Close()
		return tls.Client(c, cfg).Handshake()
	}
}

func TestClientsOfCryptoTLS(t *testing.T) {
	for _, c := range []struct {
		name string
		cfg  *tls.Config
		want Hello
		min  int // bytes
	}{
		{"as it comes", &tls.Config{ServerName: "a.example"}, Hello{ServerName: "a.example", Versions: []uint16{0x304, 0x303}}, 1216},
		{"TLS 1.2", &tls.Config{ServerName: "a.example", MaxVersion: tls.VersionTLS12}, Hello{ServerName: "a.example", Versions: []uint16{0x303}}, 100},
		{"without a post-quantum share", &tls.Config{ServerName: "a.example", CurvePreferences: []tls.CurveID{tls.X25519}}, Hello{ServerName: "a.example", Versions: []uint16{0x304, 0x303}}, 100},
		{"upper case", &tls.Config{ServerName: "A.EXAMPLE"}, Hello{ServerName: "a.example", Versions: []uint16{0x304, 0x303}}, 100},
		{"no name", &tls.Config{InsecureSkipVerify: true}, Hello{Versions: []uint16{0x304, 0x303}}, 100},
		{"ALPN", &tls.Config{ServerName: "a.example", NextProtos: []string{"h2", "http/1.1"}}, Hello{ServerName: "a.example", ALPN: []string{"h2", "http/1.1"}, Versions: []uint16{0x304, 0x303}}, 100},
		{"a hello of many records", &tls.Config{ServerName: "a.example", NextProtos: slices.Repeat([]string{strings.Repeat("p", 255)}, 200)}, Hello{ServerName: "a.example", ALPN: slices.Repeat([]string{strings.Repeat("p", 255)}, 200), Versions: []uint16{0x304, 0x303}}, 3 * MaxRecord},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw := capture(t, goClient(c.cfg))
			if len(raw) < c.min {
				t.Errorf("the hello has %d bytes", len(raw))
			}
			check(t, raw, c.want)
		})
	}
}

// check reads a hello whole and in pieces of every kind and wants the same result.
func check(t *testing.T, raw []byte, want Hello) {
	t.Helper()
	want.Size = len(raw)
	for name, r := range map[string]io.Reader{
		"whole": bytes.NewReader(raw), "byte by byte": iotest.OneByteReader(bytes.NewReader(raw)), "with the end": iotest.DataErrReader(bytes.NewReader(raw)),
		"followed": io.MultiReader(bytes.NewReader(raw), strings.NewReader("more")),
	} {
		h, got, err := Read(r, nil)
		if err != nil || !reflect.DeepEqual(h, want) {
			t.Errorf("%s: %+v, %v, want %+v", name, h, err, want)
		}
		if !bytes.Equal(got, raw) {
			t.Errorf("%s: %d bytes were kept of %d", name, len(got), len(raw))
		}
	}
	refragmented := refragment(raw, 1)
	if len(refragmented) <= MaxSize {
		want.Size = len(refragmented)
		if h, _, err := Read(bytes.NewReader(refragmented), nil); err != nil || !reflect.DeepEqual(h, want) {
			t.Errorf("in records of one byte: %+v, %v", h, err)
		}
	}
}

// refragment writes the hello in raw as records of n bytes.
func refragment(raw []byte, n int) (out []byte) {
	var msg []byte
	for len(raw) > 0 {
		size := int(binary.BigEndian.Uint16(raw[3:]))
		msg = append(msg, raw[5:5+size]...)
		raw = raw[5+size:]
	}
	for part := range slices.Chunk(msg, n) {
		out = append(out, record(part)...)
	}
	return out
}

func record(part []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{22, 3, 1}, uint16(len(part))), part...)
}

// Browsers' hellos: GREASE, padding, ECH that may be GREASE, post-quantum shares.
func TestBrowsers(t *testing.T) {
	for _, c := range []struct {
		id  utls.ClientHelloID
		ech bool
	}{
		{utls.HelloChrome_133, true}, {utls.HelloChrome_120, true}, {utls.HelloChrome_100, false}, {utls.HelloFirefox_120, true},
		{utls.HelloFirefox_105, false}, {utls.HelloSafari_16_0, false}, {utls.HelloIOS_14, false}, {utls.HelloEdge_106, false}, {utls.HelloRandomizedALPN, false},
	} {
		t.Run(c.id.Str(), func(t *testing.T) {
			raw := capture(t, func(conn net.Conn) error {
				defer conn.Close()
				return utls.UClient(conn, &utls.Config{ServerName: "shop.example"}, c.id).Handshake()
			})
			h, _, err := Read(bytes.NewReader(raw), nil)
			if err != nil || h.ServerName != "shop.example" || h.ECH != c.ech || h.Size != len(raw) || !slices.Contains(h.ALPN, "http/1.1") {
				t.Fatalf("%+v, %v", h, err)
			}
			for _, v := range h.Versions {
				if v < 0x301 || v > 0x304 {
					t.Errorf("version %x", v)
				}
			}
			check(t, raw, Hello{h.ServerName, h.ALPN, h.Versions, h.ECH, 0})
		})
	}
}

// With a real ECH configuration the outer name alone is seen.
func TestEncryptedClientHello(t *testing.T) {
	list, _ := hex.DecodeString(echConfigList)
	raw := capture(t, goClient(&tls.Config{ServerName: "secret.example", MinVersion: tls.VersionTLS13, EncryptedClientHelloConfigList: list}))
	h, _, err := Read(bytes.NewReader(raw), nil)
	if err != nil || h.ServerName != "public.example" || !h.ECH {
		t.Errorf("%+v, %v", h, err)
	}
	if bytes.Contains(raw, []byte("secret")) {
		t.Error("the inner name is in the clear")
	}
}

// One ECHConfig (RFC 9849 §4) of X25519 with the base point for a key: id 1,
// HKDF-SHA256 with AES-128-GCM, public name public.example.
const echConfigList = "0041fe0d003d0100200020090000000000000000000000000000000000000000000000000000000000000000040001000100" +
	"0e7075626c69632e6578616d706c650000"

func TestVectors(t *testing.T) {
	var v struct {
		SNI      string
		ALPN     []string
		Single   string `json:"single_record_hex"`
		Fragment string `json:"fragmented_two_records_hex"`
		NoSNI    string `json:"no_sni_hex"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "gateway/client_hello.json"), &v); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		raw, sni string
		alpn     []string
	}{"single": {v.Single, v.SNI, v.ALPN}, "fragmented": {v.Fragment, v.SNI, v.ALPN}, "no name": {v.NoSNI, "", nil}} {
		raw, err := hex.DecodeString(c.raw)
		if err != nil || len(raw) == 0 {
			t.Fatal(name, err)
		}
		h, got, err := Read(bytes.NewReader(raw), nil)
		if err != nil || string(h.ServerName) != c.sni || len(c.alpn) > 0 && !slices.Equal(h.ALPN, c.alpn) || !bytes.Equal(got, raw) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
		for n := range raw {
			var p Parser
			if done, err := p.Feed(raw[:n]); done || err != nil {
				t.Fatalf("%s: the first %d bytes: %t, %v", name, n, done, err)
			}
			if done, err := p.Feed(raw[n:]); !done || err != nil || p.Hello().ServerName != h.ServerName {
				t.Fatalf("%s: cut at %d: %t, %v", name, n, done, err)
			}
			if _, kept, err := Read(bytes.NewReader(raw[:n]), nil); fault.Code(err) != "hello_truncated" || !bytes.Equal(kept, raw[:n]) {
				t.Fatalf("%s: ended at %d: %v", name, n, err)
			}
		}
	}
}

// part is one extension.
type part struct {
	kind uint16
	data string
}

func u8(s string) string  { return string([]byte{byte(len(s))}) + s }
func u16(s string) string { return string([]byte{byte(len(s) >> 8), byte(len(s))}) + s }
func sni(s string) part   { return part{0, u16("\x00" + u16(s))} }

func body(parts ...part) string {
	var ext string
	for _, p := range parts {
		ext += string([]byte{byte(p.kind >> 8), byte(p.kind)}) + u16(p.data)
	}
	return "\x03\x03" + strings.Repeat("r", 32) + u8("") + u16("\x13\x01") + u8("\x00") + u16(ext)
}

func message(body string) []byte {
	return []byte("\x01\x00" + u16(body) + body)[0 : 4+len(body)]
}

func wire(body string) []byte { return record(message(body)) }

func TestRefusals(t *testing.T) {
	ok := body(sni("a.example"))
	var many []part
	for i := range MaxExtensions + 1 {
		many = append(many, part{uint16(1000 + i), ""})
	}
	mutate := func(at int, b byte) []byte {
		raw := wire(ok)
		raw[at] = b
		return raw
	}
	for _, c := range []struct {
		name string
		raw  []byte
		code string
	}{
		{"HTTP", []byte("GET / HTTP/1.1\r\n"), "hello_http"},
		{"HTTP with a method of five letters and more", []byte("DELETE / HTTP/1.1\r\n"), "hello_http"},
		{"HTTP/2 without TLS", []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), "hello_http"},
		{"a method that is none", []byte("DELIVER / HTTP/1.1\r\n"), "hello_not_tls"},
		{"SSH", []byte("SSH-2.0-x\r\n"), "hello_not_tls"},
		{"zeros", make([]byte, 64), "hello_not_tls"},
		{"SSL 2", []byte{0x80, 0x2e, 1, 0, 2}, "hello_not_tls"},
		{"an alert first", []byte{21, 3, 1, 0, 2, 2, 40}, "hello_not_tls"},
		{"another major version of records", mutate(1, 2), "hello_not_tls"},
		{"a record too long", []byte{22, 3, 1, 0x40, 1}, "hello_malformed"},
		{"a record of nothing", []byte{22, 3, 1, 0, 0}, "hello_malformed"},
		{"a record of nothing within", append(record(message(ok)[:9]), 22, 3, 1, 0, 0), "hello_malformed"},
		{"a ServerHello", mutate(5, 2), "hello_malformed"},
		{"a ServerHello told from its first byte", []byte{22, 3, 1, 0, 200, 2}, "hello_malformed"},
		{"an alert within", append(record(message(ok)[:9]), 21, 3, 1, 0, 2), "hello_malformed"},
		{"application data within", append(record(message(ok)[:9]), 23, 3, 3, 0, 2), "hello_malformed"},
		{"announced too large", record([]byte{1, 1, 0, 0}), "hello_too_large"},
		{"bytes behind the message", record(append(message(ok), 1)), "hello_malformed"},
		{"bytes behind the extensions", wire(ok + "x"), "hello_malformed"},
		{"a session id too long", wire("\x03\x03" + strings.Repeat("r", 32) + u8(strings.Repeat("i", 33)) + u16("\x13\x01") + u8("\x00")), "hello_malformed"},
		{"no cipher suite", wire("\x03\x03" + strings.Repeat("r", 32) + u8("") + u16("") + u8("\x00")), "hello_malformed"},
		{"half a cipher suite", wire("\x03\x03" + strings.Repeat("r", 32) + u8("") + u16("\x13\x01\x13") + u8("\x00")), "hello_malformed"},
		{"no compression method", wire("\x03\x03" + strings.Repeat("r", 32) + u8("") + u16("\x13\x01") + u8("")), "hello_malformed"},
		{"nothing", wire(""), "hello_malformed"},
		{"the name twice", wire(body(sni("a.example"), sni("b.example"))), "hello_malformed"},
		{"another extension twice", wire(body(part{10, ""}, sni("a.example"), part{10, ""})), "hello_malformed"},
		{"too many extensions", wire(body(many...)), "hello_malformed"},
		{"an extension cut", wire("\x03\x03" + strings.Repeat("r", 32) + u8("") + u16("\x13\x01") + u8("\x00") + u16("\x00\x00\x00\x09a")), "hello_malformed"},
		{"two names in the list", wire(body(part{0, u16("\x00" + u16("a.example") + "\x00" + u16("b.example"))})), "hello_name"},
		{"the same name twice in the list", wire(body(part{0, u16("\x00" + u16("a.example") + "\x00" + u16("a.example"))})), "hello_name"},
		{"a name of another kind", wire(body(part{0, u16("\x01" + u16("a.example"))})), "hello_name"},
		{"a name of another kind beside", wire(body(part{0, u16("\x00" + u16("a.example") + "\x01" + u16("b"))})), "hello_name"},
		{"an empty list of names", wire(body(part{0, u16("")})), "hello_malformed"},
		{"an empty server_name", wire(body(part{0, ""})), "hello_malformed"},
		{"bytes behind the list of names", wire(body(part{0, u16("\x00"+u16("a.example")) + "x"})), "hello_malformed"},
		{"an empty name", wire(body(sni(""))), "hello_name"},
		{"a name of a dot", wire(body(sni("."))), "hello_name"},
		{"a name with NUL", wire(body(sni("a.example\x00.b"))), "hello_name"},
		{"a name with a line feed", wire(body(sni("a.example\n"))), "hello_name"},
		{"a name too long", wire(body(sni(strings.Repeat("a.", 128)))), "hello_name"},
		{"a giant name", wire(body(sni(strings.Repeat("a", 16000)))), "hello_name"},
		{"IPv4", wire(body(sni("192.0.2.1"))), "hello_name"},
		{"IPv6", wire(body(sni("2001:db8::1"))), "hello_name"},
		{"ALPN of nothing", wire(body(part{16, u16("")})), "hello_malformed"},
		{"an empty ALPN name", wire(body(part{16, u16(u8(""))})), "hello_malformed"},
		{"half a version", wire(body(part{43, u8("\x03\x04\x03")})), "hello_malformed"},
		{"no version", wire(body(part{43, u8("")})), "hello_malformed"},
		{"ECH of an unknown form", wire(body(part{0xfe0d, "\x02"})), "hello_malformed"},
		{"ECH of nothing", wire(body(part{0xfe0d, ""})), "hello_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, raw, err := Read(bytes.NewReader(c.raw), nil)
			if fault.Code(err) != c.code {
				t.Errorf("code %q (%v), want %q", fault.Code(err), err, c.code)
			}
			if !reflect.DeepEqual(h, Hello{}) || !bytes.Equal(raw, c.raw) {
				t.Errorf("%+v, %d bytes kept of %d", h, len(raw), len(c.raw))
			}
			if _, _, slow := Read(iotest.OneByteReader(bytes.NewReader(c.raw)), nil); fault.Code(slow) != c.code {
				t.Errorf("byte by byte: code %q (%v), want %q", fault.Code(slow), slow, c.code)
			}
			want := map[string]Alert{"hello_malformed": DecodeError, "hello_too_large": RecordOverflow, "hello_name": UnrecognizedName}[c.code]
			if a, ok := AlertFor(err); a != want || ok != (want != 0) {
				t.Errorf("alert %d, %t", a, ok)
			}
		})
	}
}

func TestForms(t *testing.T) {
	for _, c := range []struct {
		name string
		raw  []byte
		want Hello
	}{
		{"a name", wire(body(sni("a.example"))), Hello{ServerName: "a.example", Versions: []uint16{0x303}}},
		{"a trailing dot and upper case", wire(body(sni("A.Example."))), Hello{ServerName: "a.example", Versions: []uint16{0x303}}},
		{"no extensions", wire(body()[:len(body())-2]), Hello{Versions: []uint16{0x303}}},
		{"extensions of nothing", wire(body()), Hello{Versions: []uint16{0x303}}},
		{"GREASE everywhere", wire(body(part{0x0a0a, ""}, part{43, u8("\x5a\x5a\x03\x04")}, part{16, u16(u8("\x6a\x6a") + u8("h2"))}, part{0xfafa, "\x00"})), Hello{ALPN: []string{"h2"}, Versions: []uint16{0x304}}},
		{"ECH, outer", wire(body(sni("public.example"), part{0xfe0d, "\x00rest"})), Hello{ServerName: "public.example", Versions: []uint16{0x303}, ECH: true}},
		{"ECH, inner", wire(body(part{0xfe0d, "\x01"})), Hello{Versions: []uint16{0x303}}},
		{"as many extensions as may be", wire(body(func() (all []part) {
			for i := range MaxExtensions {
				all = append(all, part{uint16(1000 + i), ""})
			}
			return all
		}()...)), Hello{Versions: []uint16{0x303}}},
	} {
		t.Run(c.name, func(t *testing.T) { check(t, c.raw, c.want) })
	}
}

// sized returns a hello of exactly n bytes on the wire, in records as large as may be.
func sized(n int) []byte {
	records := (n + MaxRecord + 4) / (MaxRecord + 5)
	fill := n - 5*records - len(message(body(part{21, ""})))
	return refragment(wireLong(body(part{21, strings.Repeat("\x00", fill)})), MaxRecord)
}

func wireLong(body string) []byte {
	msg := append([]byte{1, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	var out []byte
	for p := range slices.Chunk(msg, MaxRecord) {
		out = append(out, record(p)...)
	}
	return out
}

func TestTheLargestHello(t *testing.T) {
	raw := sized(MaxSize - 1)
	if h, got, err := Read(bytes.NewReader(raw), nil); err != nil || h.Size != MaxSize-1 || !bytes.Equal(got, raw) {
		t.Errorf("one byte below the limit: %d bytes, %v", len(got), err)
	}
	raw = sized(MaxSize)
	if h, _, err := Read(bytes.NewReader(raw), nil); err != nil || h.Size != MaxSize {
		t.Errorf("at the limit (%d): %v", len(raw), err)
	}
	if _, _, err := Read(bytes.NewReader(sized(MaxSize+1)), nil); fault.Code(err) != "hello_too_large" {
		t.Errorf("above the limit: %v", err)
	}
	// Headers count too: a small message in records of one byte never ends.
	raw = refragment(wireLong(body(part{21, strings.Repeat("\x00", MaxSize/5)})), 1)
	_, got, err := Read(bytes.NewReader(raw), nil)
	if fault.Code(err) != "hello_too_large" || len(got) > MaxSize {
		t.Errorf("records of one byte: %d bytes were kept, %v", len(got), err)
	}
	var p Parser
	if _, err := p.Feed(raw); fault.Code(err) != "hello_too_large" || len(p.raw) > MaxSize {
		t.Errorf("fed at once: %v", err)
	}
	if _, again := p.Feed([]byte("x")); !errors.Is(again, err) && fault.Code(again) != "hello_too_large" {
		t.Errorf("fed again: %v", again)
	}
}

// What is announced costs nothing until it is sent.
func TestThreat_K08_HelloMemoryFollowsTheBytesSent(t *testing.T) {
	start := wireLong(body(part{21, strings.Repeat("\x00", 60000)}))[:20]
	const clients = 1000
	held := make([][]byte, clients)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range held {
		_, held[i], _ = Read(bytes.NewReader(start), nil)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := int64(after.HeapAlloc-before.HeapAlloc) / clients; each > firstRead+512 {
		t.Errorf("%d bytes are held for each client that sent %d", each, len(start))
	}
	runtime.KeepAlive(held)
}

func TestReadersThatFail(t *testing.T) {
	boom := errors.New("boom")
	_, raw, err := Read(io.MultiReader(bytes.NewReader([]byte{22, 3}), iotest.ErrReader(boom)), nil)
	if fault.Code(err) != "hello_read" || !errors.Is(err, boom) || len(raw) != 2 {
		t.Errorf("%v, %x", err, raw)
	}
	if _, ok := AlertFor(err); ok {
		t.Error("an alert to somebody who is gone")
	}
	if _, _, err = Read(stuck{}, nil); fault.Code(err) != "hello_read" || !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("a reader without progress: %v", err)
	}
}

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

// The buffer that the caller lends is used, and nothing is written beyond it.
func TestLentBuffer(t *testing.T) {
	raw := wire(body(sni("a.example")))
	buf := make([]byte, 4096)
	_, got, err := Read(bytes.NewReader(raw), buf)
	if err != nil || &got[0] != &buf[0] {
		t.Errorf("%v", err)
	}
	small := bytes.Repeat([]byte{9}, 64)
	_, got, err = Read(bytes.NewReader(raw), small[:0:32])
	if err != nil || !bytes.Equal(got, raw) || small[32] != 9 {
		t.Errorf("%x, %v", got, err)
	}
}

// serverSees returns what crypto/tls makes of the bytes.
func serverSees(raw []byte) (info *tls.ClientHelloInfo) {
	server := tls.Server(&replay{r: bytes.NewReader(raw)}, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		info = h
		return nil, errors.New("seen")
	}})
	server.Handshake()
	return info
}

type replay struct {
	net.Conn
	r io.Reader
}

func (c *replay) Read(b []byte) (int, error)       { return c.r.Read(b) }
func (c *replay) Write(b []byte) (int, error)      { return len(b), nil }
func (c *replay) Close() error                     { return nil }
func (c *replay) SetDeadline(time.Time) error      { return nil }
func (c *replay) SetWriteDeadline(time.Time) error { return nil }
func (c *replay) RemoteAddr() net.Addr             { return nil }

// Whatever both this package and crypto/tls take, they understand alike: otherwise a
// connection could be judged by one name and served by another.
func FuzzHello(f *testing.F) {
	for _, b := range []string{body(sni("a.example")), body(), body(part{16, u16(u8("h2"))}, part{43, u8("\x03\x04")}), body(part{0xfe0d, "\x00"}), body(sni("A.EXAMPLE."))} {
		f.Add(wire(b), uint8(3))
		f.Add(refragment(wire(b), 7), uint8(0))
	}
	f.Add(capture(f, goClient(&tls.Config{ServerName: "a.example", NextProtos: []string{"h2"}})), uint8(100))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint8(1))
	f.Fuzz(func(t *testing.T, raw []byte, step uint8) {
		h, kept, err := Read(bytes.NewReader(raw), nil)
		if !bytes.HasPrefix(raw, kept) || len(kept) > MaxSize {
			t.Fatalf("kept %d bytes that were not sent, or too many", len(kept))
		}
		if err != nil && (fault.Code(err) == "" || !reflect.DeepEqual(h, Hello{})) {
			t.Fatalf("%+v, %v", h, err)
		}
		if err == nil && h.Size > len(kept) {
			t.Fatalf("size %d of %d", h.Size, len(kept))
		}
		// Pieces change nothing.
		var p Parser
		var done bool
		var perr error
		for chunk := range slices.Chunk(raw, int(step)+1) {
			if done, perr = p.Feed(chunk); done || perr != nil {
				break
			}
		}
		if done != (err == nil) || done && !reflect.DeepEqual(p.Hello(), h) || perr != nil && fault.Code(perr) != fault.Code(err) {
			t.Fatalf("in pieces %t, %+v, %v; whole %+v, %v", done, p.Hello(), perr, h, err)
		}
		if err != nil {
			return
		}
		info := serverSees(kept)
		if info == nil {
			return // crypto/tls checks more of what does not concern us
		}
		if !strings.EqualFold(info.ServerName, string(h.ServerName)) {
			t.Fatalf("crypto/tls sees %q, this package %q", info.ServerName, h.ServerName)
		}
		theirs := slices.DeleteFunc(slices.Clone(info.SupportedProtos), func(s string) bool { return len(s) == 2 && grease(uint16(s[0])<<8|uint16(s[1])) })
		if !slices.Equal(theirs, h.ALPN) {
			t.Fatalf("crypto/tls sees %q, this package %q", theirs, h.ALPN)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	for name, raw := range map[string][]byte{
		"one record":          wire(body(sni("a.example"))),
		"post-quantum":        capture(b, goClient(&tls.Config{ServerName: "a.example", NextProtos: []string{"h2"}})),
		"the largest":         sized(MaxSize),
		"records of one byte": refragment(wireLong(body(part{21, strings.Repeat("\x00", 10000)})), 1),
	} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, MaxSize)
			b.ReportAllocs()
			b.SetBytes(int64(len(raw)))
			for b.Loop() {
				if _, _, err := Read(bytes.NewReader(raw), buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
