// SPDX-License-Identifier: Apache-2.0

package prpc

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
)

// echo methods return their argument, so that a test sees what was understood.
func methods() []Method {
	return []Method{
		Unary("Tls", func(_ context.Context, m *agent.GetTlsKeyArgs) (*agent.GetTlsKeyArgs, error) { return m, nil }),
		Unary("Quote", func(_ context.Context, m *agent.GetQuoteResponse) (*agent.GetQuoteResponse, error) { return m, nil }),
		Unary("Chain", func(_ context.Context, m *agent.GetKeyResponse) (*agent.GetKeyResponse, error) { return m, nil }),
		Unary("Vm", func(_ context.Context, m *vmm.VmConfiguration) (*vmm.VmConfiguration, error) { return m, nil }),
		Unary("Info", func(_ context.Context, _ *emptypb.Empty) (*agent.AppInfo, error) {
			return &agent.AppInfo{AppName: "né \U0001F600 \"\\\n\x01<&>", AppId: []byte{0xab}}, nil
		}),
		Unary("Nothing", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) { return nil, nil }),
		Unary("Fail", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
			return nil, fmt.Errorf("outer: %w", errors.New("inner é"))
		}),
		Unary("Busy", func(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
			return nil, fault.New("port_busy", "port 80 is taken").WithFix("use another port")
		}),
		Unary("Big", func(context.Context, *emptypb.Empty) (*agent.GetTlsKeyResponse, error) {
			return &agent.GetTlsKeyResponse{Key: strings.Repeat("é", 100_000)}, nil
		}),
	}
}

// serve runs the service on a unix socket, mounted as the tappd socket is.
func serve(t testing.TB) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/prpc/", NewMux([]string{"Tappd.", "Worker."}, methods()...))
	srv := Server(mux)
	srv.ErrorLog = log.New(io.Discard, "", 0)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return socket
}

type answer struct {
	status  int
	typ     string
	body    string
	length  int64
	chunked bool
	header  http.Header
}

// send writes a raw request and reads one reply, then expects the connection to be
// as keepAlive says.
func send(t testing.TB, socket, request string) answer {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	return receive(t, bufio.NewReader(c))
}

func receive(t testing.TB, r *bufio.Reader) answer {
	t.Helper()
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header.Get("Content-Type"), string(body), resp.ContentLength, resp.TransferEncoding != nil, resp.Header}
}

func request(verb, target, contentType, body string) string {
	ct := ""
	if contentType != "" {
		ct = "Content-Type: " + contentType + "\r\n"
	}
	return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", verb, target, ct, len(body), body)
}

func post(method, body string) string {
	return request("POST", "/prpc/"+method, "application/json", body)
}

// Shapes of full replies, in order of declaration and with every field.
const (
	tlsDefault   = `{"subject":"","alt_names":[],"usage_ra_tls":false,"usage_server_auth":false,"usage_client_auth":false,"not_before":null,"not_after":null,"with_app_info":false}`
	quoteDefault = `{"quote":"","event_log":"","report_data":"","vm_config":""}`
	infoReply    = `{"app_id":"ab","instance_id":"","app_cert":"","tcb_info":"","app_name":"n\u00e9 \ud83d\ude00 \"\\\n\u0001<&>","device_id":"","mr_aggregated":"","os_image_hash":"","key_provider_info":"","compose_hash":"","vm_config":"","cloud_vendor":"","cloud_product":"","lease":""}`
	vmDefault    = `{"name":"","image":"","compose_file":"","vcpu":0,"memory":0,"disk_size":0,"ports":[],"encrypted_env":"","app_id":null,"user_config":"","hugepages":false,"pin_numa":false,"gpus":null,"kms_urls":[],"gateway_urls":[],"stopped":false,"no_tee":false,"networking":null,"networks":[],"simulated_tee":null,"tpm":null}`
)

func with(base string, pairs ...string) string {
	for i := 0; i < len(pairs); i += 2 {
		out := strings.Replace(base, pairs[i], pairs[i+1], 1)
		if out == base {
			panic("no " + pairs[i])
		}
		base = out
	}
	return base
}

func fails(reason string) string { return "400 " + reason }

func TestDialect(t *testing.T) {
	socket := serve(t)
	protoTls, _ := proto.Marshal(&agent.GetTlsKeyArgs{Subject: "s", NotBefore: proto.Uint64(0)})
	const get = "GET /prpc/"
	host := " HTTP/1.1\r\nHost: x\r\n\r\n"
	for _, c := range []struct {
		rule, request, want string // want: the JSON body, or "400 <text in error>"
	}{
		// Method names.
		{"bare name", post("Tls", "{}"), tlsDefault},
		{"prefix is stripped", post("Tappd.Tls", "{}"), tlsDefault},
		{"prefix is stripped repeatedly", post("Worker.Tappd.Worker.Tls", "{}"), tlsDefault},
		{"case counts", post("tls", "{}"), fails("Service not found: tls")},
		{"other prefixes do not count", post("DstackGuest.Tls", "{}"), fails("Service not found: DstackGuest.Tls")},
		{"unknown method", post("Tappd.Nope", "{}"), fails("Service not found: Nope")},
		{"no method", post("", "{}"), fails("Service not found: ")},

		// When JSON is selected.
		{"content type with parameters", request("POST", "/prpc/Tls", "Application/JSON; charset=utf-8", "{}"), tlsDefault},
		{"content type with broken parameters", request("POST", "/prpc/Tls", "application/json; x", "{}"), tlsDefault},
		{"query json", request("POST", "/prpc/Tls?json", "", "{}"), tlsDefault},
		{"query json=", request("POST", "/prpc/Tls?a=b&json=", "", "{}"), tlsDefault},
		{"query json=1", request("POST", "/prpc/Tls?json=1", "text/plain", "{}"), tlsDefault},
		{"query json=true", request("POST", "/prpc/Tls?json=true", "", "{}"), tlsDefault},

		// GET.
		{"GET without arguments", get + "Tls" + host, tlsDefault},
		{"GET with unknown arguments", get + "Tls?json&nope=1&%C3%A9[0]=1" + host, tlsDefault},
		{"GET with scalars", get + "Tls?subject=a+b%26&usage_ra_tls=true&not_before=18446744073709551615" + host,
			with(tlsDefault, `"subject":""`, `"subject":"a b&"`, `"usage_ra_tls":false`, `"usage_ra_tls":true`, `"not_before":null`, `"not_before":18446744073709551615`)},
		{"GET with arrays by index", get + "Tls?alt_names[1]=b&alt_names[0]=a&alt_names%5B7%5D=c" + host, with(tlsDefault, "[]", `["a","b","c"]`)},
		{"GET with arrays without index", get + "Tls?alt_names[]=b&alt_names[]=a" + host, with(tlsDefault, "[]", `["b","a"]`)},
		{"GET with a repeated name", get + "Tls?alt_names=b&alt_names=a" + host, with(tlsDefault, "[]", `["b","a"]`)},
		{"GET with bytes", get + "Quote?quote=0x0x0AfF&event_log=%C3%A9" + host, with(quoteDefault, `"quote":""`, `"quote":"0aff"`, `"event_log":""`, `"event_log":"\u00e9"`)},
		{"GET with nested messages", get + "Vm?networks[0][mode]=bridge&networks[0][bridge_name]=br0&networks[1][mode]=user&networking[mode]=user&gpus[gpus][0][slot]=1" + host,
			with(vmDefault, `"gpus":null`, `"gpus":{"gpus":[{"slot":"1"}],"attach_mode":""}`, `"networking":null,"networks":[]`,
				`"networking":{"mode":"user","bridge_name":""},"networks":[{"mode":"bridge","bridge_name":"br0"},{"mode":"user","bridge_name":""}]`)},
		{"GET with a bad boolean", get + "Tls?usage_ra_tls=1" + host, fails("usage_ra_tls: expected true or false")},
		{"GET with a bad number", get + "Tls?not_after=x" + host, fails("not_after: expected an unsigned integer of 64 bits")},
		{"GET with bad bytes", get + "Quote?quote=abc" + host, fails("quote: invalid hexadecimal")},
		{"GET with a scalar twice", get + "Tls?subject=a&subject=b" + host, fails("subject: occurs twice")},
		{"GET with parts of a scalar", get + "Tls?subject[a]=a" + host, fails("subject: has no parts")},
		{"GET with a scalar for a message", get + "Vm?gpus=a" + host, fails("gpus: expected named parts")},
		{"GET with an index that is none", get + "Tls?alt_names[x]=a" + host, fails("alt_names: [x] is not an index")},
		{"GET with a malformed key", get + "Tls?subject[a=a" + host, fails("malformed key")},
		{"GET with a malformed escape", get + "Tls?subject=%zz" + host, fails("invalid URL escape")},
		{"GET with text that is not UTF-8", get + "Tls?subject=%ff" + host, fails("not UTF-8")},
		{"GET with too many parameters", get + "Tls?" + strings.Repeat("a&", 1001) + host, fails("more than 1000 parameters")},
		{"GET with too deep a key", get + "Vm?gpus" + strings.Repeat("[a]", 9) + "=1" + host, fails("malformed key")},

		// POST bodies.
		{"empty body", post("Tls", ""), tlsDefault},
		{"no body at all", "POST /prpc/Tls?json HTTP/1.1\r\nHost: x\r\n\r\n", tlsDefault},
		{"chunked body", "POST /prpc/Tls?json HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", tlsDefault},
		{"no arguments: {}", post("Info", "{}"), infoReply},
		{"no arguments: null", post("Info", "null"), infoReply},
		{"no arguments: garbage", post("Info", "\xff{"), infoReply},
		{"no arguments: nothing", post("Info", ""), infoReply},
		{"no arguments: GET with garbage", get + "Info?json&%zz" + host, infoReply},

		// JSON input.
		{"names are the proto's", post("Tls", `{"altNames":["a"],"Subject":"b"}`), tlsDefault},
		{"unknown fields are ignored", post("Tls", `{"x":{"y":[1,null]},"subject":"a"}`), with(tlsDefault, `"subject":""`, `"subject":"a"`)},
		{"bytes in any case, 0x repeated", post("Quote", `{"quote":"0x0x0x0AfF"}`), with(quoteDefault, `"quote":""`, `"quote":"0aff"`)},
		{"bytes of odd length", post("Quote", `{"quote":"0xabc"}`), fails("quote: invalid hexadecimal text of 3 characters: an odd number of digits")},
		{"bytes that are not hex", post("Quote", `{"quote":"zz"}`), fails("not a hexadecimal digit")},
		{"0X is not a prefix", post("Quote", `{"quote":"0Xab"}`), fails("not a hexadecimal digit")},
		{"arrays of bytes", post("Chain", `{"signature_chain":["0xAB",""]}`), `{"key":"","signature_chain":["ab",""]}`},
		{"bytes in an array name their place", post("Chain", `{"signature_chain":["ab","a"]}`), fails("signature_chain[1]: invalid hexadecimal")},
		{"64-bit numbers are numbers", post("Tls", `{"not_before":18446744073709551615}`), with(tlsDefault, `"not_before":null`, `"not_before":18446744073709551615`)},
		{"64-bit numbers are not strings", post("Tls", `{"not_before":"1"}`), fails("not_before: expected a number, found a string")},
		{"number out of range", post("Tls", `{"not_before":18446744073709551616}`), fails("not_before: expected an unsigned integer of 64 bits")},
		{"32-bit number out of range", post("Vm", `{"vcpu":4294967296}`), fails("vcpu: expected an unsigned integer of 32 bits")},
		{"negative number", post("Vm", `{"vcpu":-1}`), fails("vcpu: expected an unsigned")},
		{"fraction", post("Vm", `{"vcpu":1.0}`), fails("vcpu: expected an unsigned")},
		{"exponent", post("Vm", `{"vcpu":1e2}`), fails("vcpu: expected an unsigned")},
		{"optional null is unset", post("Tls", `{"not_before":null,"not_after":0}`), with(tlsDefault, `"not_after":null`, `"not_after":0`)},
		{"optional string set to empty", post("Vm", `{"app_id":""}`), with(vmDefault, `"app_id":null`, `"app_id":""`)},
		{"message null is unset", post("Vm", `{"gpus":null,"networking":null}`), vmDefault},
		{"message set to empty", post("Vm", `{"networking":{}}`), with(vmDefault, `"networking":null`, `"networking":{"mode":"","bridge_name":""}`)},
		{"null for a string", post("Tls", `{"subject":null}`), fails("subject: expected a string, found null")},
		{"null for a bool", post("Tls", `{"usage_ra_tls":null}`), fails("usage_ra_tls: expected true or false, found null")},
		{"null for a number", post("Vm", `{"vcpu":null}`), fails("vcpu: expected a number, found null")},
		{"null for bytes", post("Quote", `{"quote":null}`), fails("quote: expected a string, found null")},
		{"null for an array", post("Tls", `{"alt_names":null}`), fails("alt_names: expected an array, found null")},
		{"null in an array", post("Tls", `{"alt_names":[null]}`), fails("alt_names[0]: expected a string, found null")},
		{"wrong type: number for a string", post("Tls", `{"subject":1}`), fails("subject: expected a string, found a number")},
		{"wrong type: string for a bool", post("Tls", `{"usage_ra_tls":"true"}`), fails("found a string")},
		{"wrong type: string for an array", post("Tls", `{"alt_names":"a"}`), fails("alt_names: expected an array, found a string")},
		{"wrong type: array for a message", post("Vm", `{"gpus":[]}`), fails("gpus: expected an object, found an array")},
		{"wrong type deep inside", post("Vm", `{"gpus":{"gpus":[{},{"slot":{}}]}}`), fails("gpus.gpus[1].slot: expected a string, found an object")},
		{"a field twice", post("Tls", `{"subject":"a","subject":"b"}`), fails("field subject occurs twice")},
		{"null for the message", post("Tls", `null`), fails("expected an object, found null")},
		{"an array for the message", post("Tls", `[]`), fails("expected an object, found an array")},
		{"cut JSON", post("Tls", `{"subject":`), fails("invalid JSON")},
		{"loose JSON", post("Tls", `{"alt_names":["a",]}`), fails("invalid JSON")},
		{"two values", post("Tls", `{}{}`), fails("invalid JSON")},
		{"input that is not UTF-8", post("Tls", "{\"subject\":\"\xff\"}"), fails("not UTF-8")},
		{"escapes", post("Tls", `{"subject":"\ud83d\ude00\u00e9\\u\/"}`), with(tlsDefault, `"subject":""`, `"subject":"\ud83d\ude00\u00e9\\u/"`)},
		{"half a surrogate pair", post("Tls", `{"subject":"\ud83d"}`), fails("half of a surrogate pair at byte 12")},
		{"surrogates in wrong order", post("Tls", `{"subject":"\ude00\ud83d"}`), fails("half of a surrogate pair")},
		{"surrogate before another escape", post("Tls", `{"subject":"\ud83d\n12345"}`), fails("half of a surrogate pair")},

		// JSON output.
		{"attestation is left out only when empty", post("Quote", `{"attestation":"01"}`), with(quoteDefault, `"vm_config":""`, `"vm_config":"","attestation":"01"`)},
		{"empty response", post("Nothing", ""), "null"},
		{"all fields of a large message", post("Vm", `{}`), vmDefault},

		// Errors.
		{"chain of causes", post("Fail", ""), fails("outer: inner é")},
		{"oversized body known by Content-Type", post("Tls", strings.Repeat(" ", MaxBody+1)), fails("request body larger than 10485760 bytes")},

		// Requests that net/http alone refuses or reads otherwise.
		{"no Host header", "POST /prpc/Tls HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"absolute form without Host", "POST http://unix.socket/prpc/Tappd.Tls?json HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"absolute form with Host", "POST http://localhost/prpc/Tls?json HTTP/1.1\r\nHost: dstack\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"Host as hex of the socket's path", "POST /prpc/Tls?json HTTP/1.1\r\nHost: 2f7661722f72756e:0\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"HTTP/1.0", "POST /prpc/Tls?json HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"lines that end in LF", "POST /prpc/Tls?json HTTP/1.1\nContent-Length: 2\n\n{}", tlsDefault},
		{"host in other case", "POST /prpc/Tls?json HTTP/1.1\r\nhOsT: x\r\nContent-Length: 2\r\n\r\n{}", tlsDefault},
		{"protobuf by default", request("POST", "/prpc/Tls", "", string(protoTls)), string(protoTls)},
	} {
		t.Run(c.rule, func(t *testing.T) {
			got := send(t, socket, c.request)
			if got.chunked || got.length != int64(len(got.body)) {
				t.Errorf("chunked %v, Content-Length %d for %d bytes", got.chunked, got.length, len(got.body))
			}
			if c.rule == "protobuf by default" {
				if got.body != c.want || got.typ != "application/octet-stream" {
					t.Errorf("got %s %q", got.typ, got.body)
				}
				return
			}
			for _, b := range []byte(got.body) {
				if b > '~' {
					t.Fatalf("reply is not ASCII: %q", got.body)
				}
			}
			if got.typ != "application/json" {
				t.Errorf("Content-Type %q", got.typ)
			}
			if reason, isErr := strings.CutPrefix(c.want, "400 "); isErr {
				var e struct{ Error string }
				if err := json.Unmarshal([]byte(got.body), &e); err != nil {
					t.Fatal(err)
				}
				if got.status != 400 || !strings.Contains(e.Error, reason) || !strings.HasPrefix(got.body, "{\n  \"error\": ") {
					t.Errorf("got %d %q, want 400 with %q", got.status, got.body, reason)
				}
				return
			}
			if got.status != 200 || got.body != c.want {
				t.Errorf("got %d %s\nwant    %s", got.status, got.body, c.want)
			}
		})
	}
}

func TestErrorBodies(t *testing.T) {
	socket := serve(t)
	for method, want := range map[string]string{
		"Fail": "{\n  \"error\": \"outer: inner \\u00e9\"\n}",
		"Busy": "{\n  \"error\": \"port 80 is taken\",\n  \"code\": \"port_busy\",\n  \"fix\": \"use another port\"\n}",
	} {
		if got := send(t, socket, post(method, "")); got.body != want {
			t.Errorf("%s: %s", method, got.body)
		}
	}
	got := send(t, socket, request("POST", "/prpc/Busy", "", ""))
	num, _, n := protowire.ConsumeTag([]byte(got.body))
	text, _ := protowire.ConsumeString([]byte(got.body[n:]))
	if got.status != 400 || got.typ != "application/octet-stream" || num != 1 || text != "port 80 is taken" {
		t.Errorf("protobuf error %d %s: field %d = %q", got.status, got.typ, num, text)
	}
	if got := send(t, socket, request("POST", "/prpc/Tls", "", "\xff\xff")); got.status != 400 || got.typ != "application/octet-stream" {
		t.Errorf("malformed protobuf: %d %s", got.status, got.typ)
	}
	if got := send(t, socket, request("POST", "/prpc/Tls?json=0", "", strings.Repeat(" ", MaxBody+1))); got.typ != "application/octet-stream" {
		t.Errorf("oversized protobuf answered with %s", got.typ)
	}
}

func TestOtherVerbsAndRoutesAre404(t *testing.T) {
	socket := serve(t)
	for _, r := range []string{
		request("PUT", "/prpc/Tls", "application/json", "{}"),
		request("DELETE", "/prpc/Tls", "", ""),
		request("OPTIONS", "/prpc/Tls", "", ""),
		request("POST", "/Tls", "application/json", "{}"),
	} {
		if got := send(t, socket, r); got.status != 404 {
			t.Errorf("%.20q: status %d", r, got.status)
		}
	}
}

// A reply larger than net/http's buffer would be chunked without an explicit length.
func TestLargeRepliesCarryContentLength(t *testing.T) {
	got := send(t, serve(t), post("Big", ""))
	if got.chunked || got.length != int64(len(got.body)) || len(got.body) < 600_000 {
		t.Errorf("chunked %v, length %d, body %d", got.chunked, got.length, len(got.body))
	}
}

func TestConnectionIsKeptForClientsWithHostAndClosedForThoseWithout(t *testing.T) {
	socket := serve(t)
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	r := bufio.NewReader(c)
	for range 3 {
		io.WriteString(c, post("Tls", `{"subject":"`+strings.Repeat("x", 9000)+`"}`))
		if got := receive(t, r); got.status != 200 || got.header.Get("Connection") == "close" {
			t.Fatalf("%d, %v", got.status, got.header)
		}
	}
	got := send(t, socket, "POST /prpc/Tls?json HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
	if got.status != 200 {
		t.Errorf("status %d", got.status)
	}
	d, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	d.SetDeadline(time.Now().Add(20 * time.Second))
	// Byte by byte: the header is found however it arrives.
	for _, b := range []byte("POST /prpc/Tls?json HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}") {
		if _, err := d.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := io.ReadAll(d)
	if err != nil || !bytes.Contains(all, []byte("Connection: close")) || !bytes.HasSuffix(all, []byte(tlsDefault)) {
		t.Errorf("%q, %v", all, err)
	}
}

func TestListenerPassesOtherProtocols(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	c := &hostConn{Conn: b}
	if c.NetConn() != b {
		t.Error("NetConn is not the inner connection")
	}
	for _, sent := range []string{"\x16\x03\x01hello", "lower case\n\n"} {
		c := &hostConn{Conn: b}
		go io.WriteString(a, sent)
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != sent {
			t.Errorf("read %q, %v", got, err)
		}
	}
	// A header without end passes unchanged once it is too long to be mended.
	long := "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 2*maxHead)
	go func() { io.WriteString(a, long); a.Close() }()
	if got, err := io.ReadAll(&hostConn{Conn: b}); err != nil || string(got) != long {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

func TestSlowHeaderIsCutOff(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	c := &hostConn{Conn: b}
	go io.WriteString(a, "GET / HT")
	b.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := c.Read(make([]byte, 10)); err == nil || !err.(net.Error).Timeout() {
		t.Fatalf("error %v", err)
	}
	b.SetReadDeadline(time.Time{})
	go func() { io.WriteString(a, "TP/1.1\n\n"); a.Close() }()
	if got, err := io.ReadAll(c); err != nil || string(got) != "GET / HTTP/1.1\nHost: dstack\r\nConnection: close\r\n\n" {
		t.Errorf("after the deadline: %q, %v", got, err)
	}
}

func TestClient(t *testing.T) {
	socket := serve(t)
	for _, asJSON := range []bool{false, true} {
		c := NewClient("http://any/prpc/", func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		})
		c.JSON = asJSON
		defer c.HTTP.CloseIdleConnections()
		ctx := t.Context()

		var tls agent.GetTlsKeyArgs
		want := &agent.GetTlsKeyArgs{Subject: "é\U0001F600", AltNames: []string{"a"}, NotAfter: proto.Uint64(1 << 63)}
		if err := c.Call(ctx, "Tls", want, &tls); err != nil || !proto.Equal(&tls, want) {
			t.Errorf("json=%v: %v, %v", asJSON, &tls, err)
		}
		if err := c.Call(ctx, "Nothing", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
			t.Error(err)
		}
		err := c.Call(ctx, "Busy", &emptypb.Empty{}, &emptypb.Empty{})
		if fault.Code(err) != "port_busy" || fault.Fix(err) != "use another port" || err.Error() != "port 80 is taken" {
			t.Errorf("json=%v: error %v, code %q, fix %q", asJSON, err, fault.Code(err), fault.Fix(err))
		}
		err = c.Call(ctx, "Fail", &emptypb.Empty{}, &emptypb.Empty{})
		if fault.Code(err) != "rpc_failed" || err.Error() != "Fail: outer: inner é" {
			t.Errorf("json=%v: error %v", asJSON, err)
		}
		if err = c.Call(ctx, "Big", &emptypb.Empty{}, &agent.GetTlsKeyResponse{}); err != nil {
			t.Error(err)
		}
		c.BaseURL = "http://any/elsewhere"
		if err = c.Call(ctx, "Tls", want, &tls); fault.Code(err) != "rpc_failed" || !strings.Contains(err.Error(), "404") {
			t.Errorf("json=%v: error %v", asJSON, err)
		}
	}
	gone := NewClient("http://any", func(context.Context) (net.Conn, error) { return nil, errors.New("no route") })
	if err := gone.Call(t.Context(), "Tls", &emptypb.Empty{}, &emptypb.Empty{}); err == nil || !strings.Contains(err.Error(), "call Tls:") {
		t.Errorf("error %v", err)
	}
}

func TestHandlerSeesTheCallersContext(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := Server(NewMux(nil, Unary("Wait", func(ctx context.Context, _ *vmm.Id) (*vmm.Id, error) {
		close(started)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	})))
	go srv.Serve(l)
	defer srv.Close()
	c := NewClient("http://x", func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", socket) })
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	if err := c.Call(ctx, "Wait", &vmm.Id{}, &vmm.Id{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	<-ended
}

func TestNewMuxPanicsOnAMethodDeclaredTwice(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	NewMux(nil, methods()[0], methods()[0])
}

func TestOmittedFieldsExist(t *testing.T) {
	f := (&agent.GetQuoteResponse{}).ProtoReflect().Descriptor().Fields().ByName("attestation")
	if len(omitEmpty) != 1 || !omitEmpty[f.FullName()] {
		t.Errorf("omitEmpty %v does not name %s", omitEmpty, f.FullName())
	}
}

func TestSignedAndNestedOutput(t *testing.T) {
	got, err := MarshalJSON(&guestapi.ListContainersResponse{Containers: []*guestapi.Container{{Created: -5, Names: []string{"/a"}}, {}}})
	want := `{"containers":[{"id":"","names":["/a"],"image":"","image_id":"","created":-5,"state":"","status":""},` +
		`{"id":"","names":[],"image":"","image_id":"","created":0,"state":"","status":""}]}`
	if err != nil || string(got) != want {
		t.Errorf("got %s, %v", got, err)
	}
	var back guestapi.ListContainersResponse
	if err := UnmarshalJSON(got, &back); err != nil || back.Containers[0].Created != -5 {
		t.Errorf("%v, %v", &back, err)
	}
}

// What is decoded encodes and decodes to the same, in ASCII.
func FuzzUnmarshalJSON(f *testing.F) {
	for _, s := range []string{"", "null", vmDefault, `{"networks":[{"mode":"user"}],"app_id":"x","gpus":{"gpus":[{}]}}`,
		`{"encrypted_env":"0xAb","vcpu":1e3}`, `{"name":"\ud83d\ude00"}`, `{"name":"\ud83d"}`, `[`, `{"x":[[[{}]]]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var m, again vmm.VmConfiguration
		if UnmarshalJSON(data, &m) != nil {
			return
		}
		out, err := MarshalJSON(&m)
		if err != nil {
			t.Fatal(err)
		}
		if i := bytes.IndexFunc(out, func(r rune) bool { return r > '~' }); i >= 0 || !json.Valid(out) {
			t.Fatalf("not ASCII JSON: %q", out)
		}
		if err := UnmarshalJSON(out, &again); err != nil || !proto.Equal(&m, &again) {
			t.Fatalf("%q becomes %v, then %v (%v)", data, &m, &again, err)
		}
	})
}

func FuzzQuery(f *testing.F) {
	for _, s := range []string{"", "json", "name=a&vcpu=1&networks[0][mode]=user&kms_urls[]=x", "gpus[gpus][3][slot]=1", "a[=", "%zz", "ports[999][host_port]=1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		var m vmm.VmConfiguration
		if unmarshalQuery(raw, &m) == nil {
			if _, err := proto.Marshal(&m); err != nil {
				t.Fatalf("%q gives a message that does not encode: %v", raw, err)
			}
		}
	})
}

// Whatever arrives, wrapping the connection adds nothing but the two lines.
func FuzzHostConn(f *testing.F) {
	f.Add("GET / HTTP/1.1\r\n\r\n")
	f.Add("GET / HTTP/1.1\nHost: x\n\n")
	f.Add("\x16\x03")
	f.Fuzz(func(t *testing.T, sent string) {
		a, b := net.Pipe()
		go func() { io.WriteString(a, sent); a.Close() }()
		got, err := io.ReadAll(&hostConn{Conn: b})
		b.Close()
		if err != nil || strings.Replace(string(got), "Host: dstack\r\nConnection: close\r\n", "", 1) != sent && string(got) != sent {
			t.Fatalf("%q became %q, %v", sent, got, err)
		}
	})
}
