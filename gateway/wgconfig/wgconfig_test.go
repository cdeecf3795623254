// SPDX-License-Identifier: Apache-2.0

package wgconfig

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/curve25519"
	"pgregory.net/rapid"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// key returns the public half of a fixed private key.
func key(t testing.TB, n byte) PublicKey {
	t.Helper()
	return private(t, n).Public()
}

func private(t testing.TB, n byte) PrivateKey {
	t.Helper()
	k, err := NewPrivateKey(bytes.Repeat([]byte{n}, KeySize))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func secret(n byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{n}, KeySize))
}

func sample(t testing.TB) *Interface {
	return &Interface{
		Key: private(t, 1), Port: 51820, Address: netip.MustParseAddr("10.0.0.1"), Network: netip.MustParsePrefix("10.0.0.0/24"),
		Peers: []Peer{
			{Key: key(t, 2), Address: netip.MustParseAddr("10.0.0.2"), Keepalive: Keepalive},
			{Key: key(t, 3), Address: netip.MustParseAddr("10.0.0.3"), Keepalive: Keepalive},
		},
	}
}

// meaning is a file without its blank lines.
func meaning(text string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(text, "\n"), func(l string) bool { return strings.TrimSpace(l) == "" }), "\n")
}

// The vectors have words for keys, which are no keys here; the same places get real ones.
func TestGatewayVectors(t *testing.T) {
	i := sample(t)
	words := strings.NewReplacer("PrivateKey = ", "PrivateKey = "+secret(1), "test-pubkey-0", i.Peers[0].Key.String(), "test-pubkey-1", i.Peers[1].Key.String())
	for name, peers := range map[string][]Peer{"gateway/wg-gateway-empty.conf": nil, "gateway/wg-gateway-two-peers.conf": i.Peers} {
		want := words.Replace(string(testkit.Vectors(t, name)))
		i.Peers = peers
		got, err := i.Text(SyncConf)
		if err != nil || meaning(string(got)) != meaning(want) {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, got, want)
		}
	}
	for _, word := range []string{"test-pubkey-0", "AAA=", "BBB=", ""} {
		if _, err := ParsePublicKey(word); fault.Code(err) != "wg_key" {
			t.Errorf("%q: %v", word, err)
		}
	}
}

func TestGuestVector(t *testing.T) {
	var v struct {
		WG struct {
			ClientIP string `json:"client_ip"`
			Servers  []struct{ PK, IP, Endpoint string }
		}
	}
	if err := json.Unmarshal(testkit.Vectors(t, "gateway/wg-guest.input.json"), &v); err != nil {
		t.Fatal(err)
	}
	// Two keys whose text sorts as that of the vector's.
	keys := []PublicKey{key(t, 2), key(t, 3)}
	slices.SortFunc(keys, func(a, b PublicKey) int { return strings.Compare(a.String(), b.String()) })
	words := map[string]PublicKey{"AAA=": keys[0], "BBB=": keys[1]}
	i := Interface{Key: private(t, 1), Port: 9182, Address: netip.MustParseAddr(v.WG.ClientIP)}
	for _, s := range v.WG.Servers {
		a, err := ParseAddress(s.IP)
		if err != nil {
			t.Fatal(err)
		}
		e, err := ParseEndpoint(s.Endpoint)
		if err != nil {
			t.Fatal(err)
		}
		i.Peers = append(i.Peers, Peer{words[s.PK], a, e, Keepalive})
	}
	Sort(i.Peers)
	want := strings.NewReplacer("<sk>", secret(1), "AAA=", keys[0].String(), "BBB=", keys[1].String()).Replace(string(testkit.Vectors(t, "gateway/wg-guest.conf")))
	got, err := i.Text(Quick)
	if err != nil || string(got) != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
}

func TestKeys(t *testing.T) {
	good := key(t, 7).String()
	loose := good[:42] + string(good[42]+1) + "=" // bits behind the last byte
	b31, b33 := base64.StdEncoding.EncodeToString(make([]byte, 31)), base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{9}, 33))
	lowOrder, _ := hex.DecodeString("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
	for _, c := range []struct{ name, text, code string }{
		{"a key", good, ""},
		{"31 bytes", b31, "wg_key"},
		{"33 bytes", b33, "wg_key"},
		{"a line feed behind", good + "\n", "wg_key"},
		{"a line feed for a character", good[:43] + "\n", "wg_key"},
		{"line feeds within", good[:40] + "\n\n\n\n", "wg_key"},
		{"a line of its own", good + "\nEndpoint = 192.0.2.1:1", "wg_key"},
		{"without padding", good[:43], "wg_key"},
		{"in the alphabet of URLs", strings.Repeat("_", 43) + "=", "wg_key"},
		{"another spelling of the same bytes", loose, "wg_key"},
		{"hexadecimal", strings.Repeat("ab", 32), "wg_key"},
		{"space", " " + good[:43], "wg_key"},
		{"zero", base64.StdEncoding.EncodeToString(make([]byte, 32)), "wg_key"},
		{"a point of low order", base64.StdEncoding.EncodeToString(lowOrder), "wg_key"},
		{"one", base64.StdEncoding.EncodeToString(append([]byte{1}, make([]byte, 31)...)), "wg_key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, err := ParsePublicKey(c.text)
			if fault.Code(err) != c.code {
				t.Errorf("code %q (%v), want %q", fault.Code(err), err, c.code)
			}
			if err == nil && k.String() != c.text || err != nil && !k.IsZero() {
				t.Errorf("%s", k)
			}
		})
	}
	if _, err := NewPublicKey(make([]byte, 31)); fault.Code(err) != "wg_key" {
		t.Error(err)
	}
	if _, err := NewPrivateKey(make([]byte, 33)); fault.Code(err) != "wg_key" {
		t.Error(err)
	}
}

func TestPublicHalf(t *testing.T) {
	want, err := curve25519.X25519(bytes.Repeat([]byte{5}, KeySize), curve25519.Basepoint)
	if got := key(t, 5).Bytes(); err != nil || !bytes.Equal(got[:], want) {
		t.Errorf("%x, want %x (%v)", got, want, err)
	}
	one, two := GeneratePrivateKey(), GeneratePrivateKey()
	if one.Public() == two.Public() || one.IsZero() {
		t.Error("two keys are one")
	}
	if _, err := ParsePublicKey(one.Public().String()); err != nil {
		t.Error(err)
	}
	if !(PrivateKey{}).IsZero() || !(PrivateKey{}).Public().IsZero() {
		t.Error("no key has one")
	}
}

func TestPrivateKeysDoNotPrint(t *testing.T) {
	k := private(t, 0x5a)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", k, "in", Interface{Key: k})
	text := fmt.Sprintf("%v %+v %#v %s %x %d %q %v %+v", k, k, k, k, k, k, k, Interface{Key: k}, struct{ k PrivateKey }{k}) + log.String()
	for _, bad := range []string{"5a5a", "5A5A", "90 90", "ZZZZ", "WlpaWl"} {
		if strings.Contains(text, bad) {
			t.Errorf("%q is in %s", bad, text)
		}
	}
	if _, err := json.Marshal(k); err == nil {
		t.Error("a private key as JSON")
	}
	k.Wipe()
	PrivateKey{}.Wipe()
	if *k.k.b != [KeySize]byte{} {
		t.Error("it is not wiped")
	}
}

func TestEndpoints(t *testing.T) {
	for _, c := range []struct{ name, in, want, code string }{
		{"IPv4", "203.0.113.1:51820", "203.0.113.1:51820", ""},
		{"IPv6", "[2001:db8::1]:51820", "[2001:db8::1]:51820", ""},
		{"IPv4 in IPv6", "[::ffff:203.0.113.1]:1", "203.0.113.1:1", ""},
		{"a name", "GW.example.:51820", "gw.example:51820", ""},
		{"no port", "203.0.113.1", "", "wg_endpoint"},
		{"port 0", "203.0.113.1:0", "", "wg_endpoint"},
		{"port 65536", "203.0.113.1:65536", "", "wg_endpoint"},
		{"a service's name", "gw.example:http", "", "wg_endpoint"},
		{"a line feed behind", "203.0.113.1:1\n", "", "wg_endpoint"},
		{"a line of its own in the name", "gw.example\nAllowedIPs = 0.0.0.0/0\n:1", "", "wg_endpoint"},
		{"a zone", "[fe80::1%eth0]:1", "", "wg_endpoint"},
		{"a zone with a line feed", "[fe80::1%\nEndpoint = x]:1", "", "wg_endpoint"},
		{"nobody", "0.0.0.0:1", "", "wg_endpoint"},
		{"many", "224.0.0.1:1", "", "wg_endpoint"},
		{"no host", ":1", "", "wg_endpoint"},
		{"IPv6 without brackets", "2001:db8::1:51820", "", "wg_endpoint"},
		{"nothing", "", "", "wg_endpoint"},
		{"too long", strings.Repeat("a", 300) + ":1", "", "wg_endpoint"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, err := ParseEndpoint(c.in)
			if fault.Code(err) != c.code || e.String() != c.want || e.IsZero() != (err != nil) {
				t.Errorf("%s, %v, want %s, %q", e, err, c.want, c.code)
			}
		})
	}
	if e := EndpointOf(netip.MustParseAddrPort("[::ffff:192.0.2.1]:5")); e.String() != "192.0.2.1:5" {
		t.Error(e)
	}
}

func TestAddresses(t *testing.T) {
	for _, c := range []struct{ name, in, want, code string }{
		{"bare", "10.8.0.1", "10.8.0.1", ""},
		{"with a prefix length, which is cut", "10.8.64.1/16", "10.8.64.1", ""},
		{"IPv6", "fd00::1/48", "fd00::1", ""},
		{"two lengths", "10.8.0.1/16/8", "", "wg_address"},
		{"a length beyond", "10.8.0.1/33", "", "wg_address"},
		{"a line feed", "10.8.0.1\n", "", "wg_address"},
		{"a second address", "10.8.0.1/32, 0.0.0.0/0", "", "wg_address"},
		{"everything", "0.0.0.0/0", "", "wg_address"},
		{"loopback", "127.0.0.1", "", "wg_address"},
		{"loopback in IPv6's clothes", "::ffff:127.0.0.1", "", "wg_address"},
		{"broadcast", "255.255.255.255", "", "wg_address"},
		{"multicast", "224.0.0.1", "", "wg_address"},
		{"of one link, where metadata services are", "169.254.169.254", "", "wg_address"},
		{"a zone", "fd00::1%eth0", "", "wg_address"},
		{"leading zeros", "10.08.0.1", "", "wg_address"},
		{"nothing", "", "", "wg_address"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := ParseAddress(c.in)
			if fault.Code(err) != c.code || err == nil && a.String() != c.want {
				t.Errorf("%s, %v, want %s, %q", a, err, c.want, c.code)
			}
		})
	}
}

func TestChecks(t *testing.T) {
	addr := netip.MustParseAddr
	for _, c := range []struct {
		name   string
		change func(*Interface)
		code   string
	}{
		{"as it is", func(i *Interface) {}, ""},
		{"no private key", func(i *Interface) { i.Key = PrivateKey{} }, "wg_key"},
		{"no port", func(i *Interface) { i.Port = 0 }, "wg_port"},
		{"a peer without a key", func(i *Interface) { i.Peers[1].Key = PublicKey{} }, "wg_key"},
		{"one key twice", func(i *Interface) { i.Peers[1].Key = i.Peers[0].Key }, "wg_key_duplicate"},
		{"the interface's key", func(i *Interface) { i.Peers[1].Key = i.Key.Public() }, "wg_key_own"},
		{"one address twice", func(i *Interface) { i.Peers[1].Address = i.Peers[0].Address }, "wg_address_duplicate"},
		{"one address in two spellings", func(i *Interface) { i.Peers[1].Address = addr("::ffff:10.0.0.2") }, "wg_address_duplicate"},
		{"the interface's address", func(i *Interface) { i.Peers[1].Address = i.Address }, "wg_address_own"},
		{"outside", func(i *Interface) { i.Peers[1].Address = addr("10.0.1.3") }, "wg_address_outside"},
		{"the network's address", func(i *Interface) { i.Peers[1].Address = addr("10.0.0.0") }, "wg_address_outside"},
		{"the broadcast address", func(i *Interface) { i.Peers[1].Address = addr("10.0.0.255") }, "wg_address_outside"},
		{"outside, with no network told", func(i *Interface) { i.Network, i.Peers[1].Address = netip.Prefix{}, addr("10.9.9.9") }, ""},
		{"no address", func(i *Interface) { i.Peers[1].Address = netip.Addr{} }, "wg_address"},
		{"loopback", func(i *Interface) { i.Peers[1].Address = addr("127.0.0.1") }, "wg_address"},
		{"an address with a zone", func(i *Interface) { i.Peers[1].Address = addr("fd00::1%x\nPostUp=y") }, "wg_address"},
		{"an own address with a zone", func(i *Interface) { i.Address = addr("fd00::1%x\nPostUp=y") }, "wg_address"},
		{"a keepalive of half a second", func(i *Interface) { i.Peers[1].Keepalive = time.Second / 2 }, "wg_keepalive"},
		{"a keepalive of a day", func(i *Interface) { i.Peers[1].Keepalive = 24 * time.Hour }, "wg_keepalive"},
		{"a negative keepalive", func(i *Interface) { i.Peers[1].Keepalive = -time.Second }, "wg_keepalive"},
		{"too many peers", func(i *Interface) { i.Peers = make([]Peer, MaxPeers+1) }, "wg_peers"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := sample(t)
			c.change(i)
			text, err := i.Text(SyncConf)
			uapi, uerr := i.UAPI()
			if fault.Code(err) != c.code || fault.Code(uerr) != c.code {
				t.Errorf("codes %q, %q (%v), want %q", fault.Code(err), fault.Code(uerr), err, c.code)
			}
			if (err != nil) != (text == nil) || (uerr != nil) != (uapi == nil) {
				t.Error("a configuration beside an error")
			}
		})
	}
}

func TestInside(t *testing.T) {
	for _, c := range []struct {
		network, addr string
		want          bool
	}{
		{"10.0.0.0/24", "10.0.0.1", true}, {"10.0.0.7/24", "10.0.0.0", false}, {"10.0.0.0/24", "10.0.0.255", false}, {"10.0.0.0/31", "10.0.0.0", true},
		{"10.0.0.0/31", "10.0.0.1", true}, {"10.0.0.5/32", "10.0.0.5", true}, {"fd00::/64", "fd00::", false}, {"fd00::/64", "fd00::ffff:ffff:ffff:ffff", true},
		{"10.0.0.0/24", "::ffff:10.0.0.9", true}, {"10.0.0.0/24", "fd00::1", false},
	} {
		if got := Inside(netip.MustParsePrefix(c.network), netip.MustParseAddr(c.addr)); got != c.want {
			t.Errorf("%s in %s: %t", c.addr, c.network, got)
		}
	}
}

func TestUAPI(t *testing.T) {
	i := sample(t)
	i.Peers = i.Peers[:1]
	i.Peers[0].Endpoint = EndpointOf(netip.MustParseAddrPort("192.0.2.1:7"))
	k := i.Peers[0].Key.Bytes()
	want := "private_key=" + strings.Repeat("01", 32) + "\nlisten_port=51820\nreplace_peers=true\npublic_key=" + hex.EncodeToString(k[:]) +
		"\nendpoint=192.0.2.1:7\npersistent_keepalive_interval=25\nreplace_allowed_ips=true\nallowed_ip=10.0.0.2/32\n"
	if got, err := i.UAPI(); err != nil || string(got) != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	if got := Remove(i.Peers[0].Key); string(got) != "public_key="+hex.EncodeToString(k[:])+"\nremove=true\n" {
		t.Errorf("%s", got)
	}
	i.Peers[0].Endpoint, _ = ParseEndpoint("gw.example:7")
	if _, err := i.UAPI(); fault.Code(err) != "wg_endpoint" {
		t.Error(err)
	}
}

// The text's private key lies in the returned bytes alone.
func TestTextDoesNotMove(t *testing.T) {
	i := sample(t)
	long, err := ParseEndpoint(strings.Repeat("a.", 120) + "example:65535")
	if err != nil {
		t.Fatal(err)
	}
	for n := range i.Peers {
		i.Peers[n].Endpoint = long
		i.Peers[n].Address = netip.MustParseAddr(fmt.Sprintf("fd00:1111:2222:3333:4444:5555:6666:777%d", n))
	}
	i.Network = netip.Prefix{}
	got, err := i.Text(SyncConf)
	if err != nil || len(got) > 256+256*len(i.Peers)+hostnames(i.Peers) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// K01: whatever text a peer sends for its key, endpoint or address, the file has exactly
// one peer with exactly one key, address and endpoint, or there is no file.
func TestThreat_K01_NoValueBringsALineOfItsOwn(t *testing.T) {
	good := key(t, 2).String()
	lines := []string{"\nEndpoint = 203.0.113.9:1", "\n[Peer]\nPublicKey = " + key(t, 9).String(), "\r\nAllowedIPs = 0.0.0.0/0", "\u2028PostUp = x", " # ", ",0.0.0.0/0", "\x00", "\x0b", "\x85"}
	for _, l := range lines {
		for _, c := range [][3]string{{good + l, "192.0.2.1:1", "10.0.0.2"}, {l + good, "192.0.2.1:1", "10.0.0.2"}, {good, "192.0.2.1:1" + l, "10.0.0.2"}, {good, "a.example" + l + ":1", "10.0.0.2"}, {good, "192.0.2.1:1", "10.0.0.2" + l}, {good, "192.0.2.1:1", "10.0.0.2/" + l}} {
			_, err1 := ParsePublicKey(c[0])
			_, err2 := ParseEndpoint(c[1])
			_, err3 := ParseAddress(c[2])
			code := fault.Code(err1) + fault.Code(err2) + fault.Code(err3)
			if code != "wg_key" && code != "wg_endpoint" && code != "wg_address" {
				t.Errorf("%q: codes %q", c, code)
			}
		}
	}
}

func TestPropertyOneLineForEachValue(t *testing.T) {
	keys := make([]PublicKey, 20)
	for i := range keys {
		keys[i] = key(t, byte(i+2))
	}
	base := sample(t)
	rapid.Check(t, func(t *rapid.T) {
		i := *base
		i.Peers, i.Network = nil, netip.Prefix{}
		endpoints := 0
		for n := range rapid.IntRange(0, len(keys)).Draw(t, "peers") {
			p := Peer{Key: keys[n], Address: netip.AddrFrom4([4]byte{10, 1, rapid.Byte().Draw(t, "octet"), byte(n + 1)})}
			if e, err := ParseEndpoint(rapid.StringMatching(`[ -~\n]{1,20}(:[0-9]{1,5})?`).Draw(t, "endpoint")); err == nil {
				p.Endpoint = e
				endpoints++
			}
			i.Peers = append(i.Peers, p)
		}
		text, err := i.Text(Quick)
		if err != nil {
			t.Fatal(err)
		}
		for what, want := range map[string]int{"\n[Peer]\n": len(i.Peers), "\nPublicKey = ": len(i.Peers), "\nAllowedIPs = ": len(i.Peers), "\nEndpoint = ": endpoints, "[Interface]\nPrivateKey": 1} {
			if got := strings.Count(string(text), what); got != want {
				t.Fatalf("%q: %d times, not %d\n%s", what, got, want, text)
			}
		}
	})
}

// uapiState is what wireguard-go answers, and the same as `wg show dump`.
func states(t testing.TB) (uapi, dump string, want []Status) {
	a, b := key(t, 2), key(t, 3)
	ab, bb := a.Bytes(), b.Bytes()
	uapi = "private_key=" + strings.Repeat("01", 32) + "\nlisten_port=51820\npublic_key=" + hex.EncodeToString(ab[:]) +
		"\npreshared_key=" + strings.Repeat("00", 32) + "\nprotocol_version=1\nendpoint=192.0.2.1:4000\nlast_handshake_time_sec=1700000000\nlast_handshake_time_nsec=0\ntx_bytes=5\nrx_bytes=6\npersistent_keepalive_interval=25\nallowed_ip=10.0.0.2/32\nallowed_ip=fd00::2/128\n" +
		"public_key=" + hex.EncodeToString(bb[:]) + "\nlast_handshake_time_sec=0\nlast_handshake_time_nsec=0\ntx_bytes=0\nrx_bytes=0\nerrno=0\n\n"
	dump = secret(1) + "\t" + key(t, 1).String() + "\t51820\toff\n" +
		a.String() + "\t(none)\t192.0.2.1:4000\t10.0.0.2/32,fd00::2/128\t1700000000\t6\t5\t25\n" +
		b.String() + "\t(none)\t(none)\t(none)\t0\t0\t0\toff\n"
	want = []Status{
		{a, netip.MustParseAddrPort("192.0.2.1:4000"), []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("fd00::2/128")}, time.Unix(1700000000, 0), 6, 5},
		{Key: b},
	}
	return uapi, dump, want
}

func TestStatus(t *testing.T) {
	uapi, dump, want := states(t)
	if got, err := ParseUAPI(strings.NewReader(uapi)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := ParseDump(strings.NewReader(dump)); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	nothing := strings.SplitAfter(dump, "\n")[0]
	if got, err := ParseDump(strings.NewReader(nothing)); err != nil || len(got) != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	hexed := key(t, 2).Bytes()
	peer := "public_key=" + hex.EncodeToString(hexed[:]) + "\n"
	row := strings.SplitAfter(dump, "\n")[1]
	for _, c := range []struct {
		name string
		uapi bool
		text string
	}{
		{"cut", true, uapi[:len(uapi)-10]},
		{"nothing", true, ""},
		{"an error", true, "errno=-1\n\n"},
		{"lines behind the end", true, "errno=0\nlisten_port=1\n"},
		{"a line without =", true, "x\nerrno=0\n"},
		{"a key too short", true, "public_key=00\nerrno=0\n"},
		{"a key that is none", true, "public_key=" + strings.Repeat("zz", 32) + "\nerrno=0\n"},
		{"a peer twice", true, peer + peer + "errno=0\n"},
		{"a handshake beyond all time", true, peer + "last_handshake_time_sec=18446744073709551615\nerrno=0\n"},
		{"a handshake before all time", true, peer + "last_handshake_time_sec=-1\nerrno=0\n"},
		{"nanoseconds of a second", true, peer + "last_handshake_time_nsec=1000000000\nerrno=0\n"},
		{"an endpoint that is none", true, peer + "endpoint=x\nerrno=0\n"},
		{"an address that is none", true, peer + "allowed_ip=x\nerrno=0\n"},
		{"too many addresses", true, peer + strings.Repeat("allowed_ip=10.0.0.2/32\n", maxAllowed+1) + "errno=0\n"},
		{"bytes that are none", true, peer + "rx_bytes=-1\nerrno=0\n"},
		{"a line without end", true, "x=" + strings.Repeat("y", maxLine)},
		{"dump: nothing", false, ""},
		{"dump: a peer first", false, row},
		{"dump: a field less", false, nothing + strings.TrimSuffix(row, "\t25\n")},
		{"dump: a peer twice", false, nothing + row + row},
		{"dump: a time", false, nothing + strings.Replace(row, "1700000000", "99999999999999", 1)},
		{"dump: an endpoint", false, nothing + strings.Replace(row, "192.0.2.1:4000", "x", 1)},
		{"dump: an address", false, nothing + strings.Replace(row, "10.0.0.2/32", "x", 1)},
		{"dump: bytes", false, nothing + strings.Replace(row, "\t6\t", "\tx\t", 1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			parse := ParseDump
			if c.uapi {
				parse = ParseUAPI
			}
			if got, err := parse(strings.NewReader(c.text)); fault.Code(err) != "wg_status" || got != nil {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	if _, err := ParseDump(strings.NewReader(nothing + strings.Replace(row, row[:4], "!!!!", 1))); fault.Code(err) != "wg_key" {
		t.Errorf("dump: a key: %v", err)
	}
}

func FuzzStatus(f *testing.F) {
	uapi, dump, _ := states(f)
	f.Add(uapi)
	f.Add(dump)
	f.Fuzz(func(t *testing.T, s string) {
		for _, parse := range []func() ([]Status, error){func() ([]Status, error) { return ParseUAPI(strings.NewReader(s)) }, func() ([]Status, error) { return ParseDump(strings.NewReader(s)) }} {
			got, err := parse()
			if err != nil && (got != nil || fault.Code(err) == "") {
				t.Fatalf("%+v, %v", got, err)
			}
			seen := map[PublicKey]bool{}
			for _, p := range got {
				if seen[p.Key] || p.Handshake.Year() > 9999 {
					t.Fatalf("%+v", p)
				}
				seen[p.Key] = true
			}
		}
	})
}

// Text from a peer becomes a value that writes itself back as one word, or nothing.
func FuzzValues(f *testing.F) {
	f.Add("10.8.0.1/16")
	f.Add("gw.example:51820")
	f.Add("[2001:db8::1]:1")
	f.Add(key(f, 2).String())
	f.Add("AAAA\nEndpoint = 1.2.3.4:5")
	f.Fuzz(func(t *testing.T, s string) {
		var out []string
		if k, err := ParsePublicKey(s); err == nil {
			out = append(out, k.String())
		}
		if e, err := ParseEndpoint(s); err == nil {
			if again, err := ParseEndpoint(e.String()); err != nil || again != e {
				t.Fatalf("%q becomes %s, %v", s, again, err)
			}
			out = append(out, e.String())
		}
		if a, err := ParseAddress(s); err == nil {
			out = append(out, single(a).String())
		}
		for _, o := range out {
			if o == "" || strings.ContainsFunc(o, func(r rune) bool { return r <= ' ' || r > '~' || r == '#' || r == ',' }) {
				t.Fatalf("%q is written as %q", s, o)
			}
		}
	})
}
