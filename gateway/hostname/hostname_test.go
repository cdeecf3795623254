// SPDX-License-Identifier: Apache-2.0

package hostname

import (
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

const (
	app  = "3327603e03f5bd1f830812ca4a789277fc31f577"
	base = Name("app.example.com")
)

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("code %q (%v), want %q", fault.Code(err), err, code)
	}
}

func TestNames(t *testing.T) {
	label := strings.Repeat("a", 63)
	long := strings.Repeat("a.", 126) + "b" // 253 bytes
	for _, c := range []struct{ name, in, want, code string }{
		{"lower case stays", "a.example", "a.example", ""},
		{"upper case is lowered", "A.eXample", "a.example", ""},
		{"one trailing dot goes", "a.example.", "a.example", ""},
		{"two trailing dots are an empty label", "a.example..", "", "host_malformed"},
		{"a dot alone", ".", "", "host_malformed"},
		{"nothing", "", "", "host_malformed"},
		{"a leading dot", ".example", "", "host_malformed"},
		{"an empty label within", "a..example", "", "host_malformed"},
		{"the longest label", label + ".x", label + ".x", ""},
		{"a label one longer", label + "a.x", "", "host_malformed"},
		{"the longest name", long, long, ""},
		{"a name one longer", long + "b", "", "host_malformed"},
		{"hyphens at the ends, as in <app>-", "app-.example", "app-.example", ""},
		{"an underscore", "_x.example", "_x.example", ""},
		{"a space", "a .example", "", "host_malformed"},
		{"a NUL", "a\x00.example", "", "host_malformed"},
		{"a line feed", "a.example\n", "", "host_malformed"},
		{"a slash", "a/.example", "", "host_malformed"},
		{"bytes beyond ASCII", "ä.example", "", "host_malformed"},
		{"the Kelvin sign is no k", "\u212a.example", "", "host_malformed"},
		{"IPv4", "192.0.2.1", "", "host_address"},
		{"IPv4 with a trailing dot", "192.0.2.1.", "", "host_address"},
		{"IPv4 of two parts", "127.1", "", "host_address"},
		{"a number", "2130706433", "", "host_address"},
		{"a name that ends in a number", "a.1", "", "host_address"},
		{"IPv6", "2001:db8::1", "", "host_address"},
		{"IPv6 in brackets", "[::1]", "", "host_address"},
		{"digits first", "1.example", "1.example", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseName(c.in)
			wantCode(t, err, c.code)
			if string(got) != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestBases(t *testing.T) {
	for _, c := range []struct{ name, in, want, code string }{
		{"plain", "app.example.com", "app.example.com", ""},
		{"as a wildcard, with space and dot", " *.APP.example.com. ", "app.example.com", ""},
		{"one label", "localhost", "localhost", ""},
		{"a hyphen first", "-a.example", "", "host_base"},
		{"a hyphen last", "a-.example", "", "host_base"},
		{"an underscore", "_a.example", "", "host_base"},
		{"two wildcards", "*.*.example", "", "host_base"},
		{"an address", "10.0.0.1", "", "host_base"},
		{"nothing", " ", "", "host_base"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseBase(c.in)
			wantCode(t, err, c.code)
			if string(got) != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

type vectors struct {
	Base  string `json:"base_domain"`
	Parse []struct {
		Label, ID, Mode string
		Port            uint16
	}
	Reject []struct{ Label, Why string }
	TXT    []struct {
		Value, ID string
		Port      uint16
		Error     bool
	}
	Names []struct {
		SNI, Prefix string
		Compat      bool
		Order       []Name
	} `json:"txt_names"`
	Certs struct{ Store, Hit, Miss []string } `json:"cert_resolution"`
}

func load(t testing.TB) (v vectors) {
	t.Helper()
	if err := json.Unmarshal(testkit.Vectors(t, "gateway/sni_labels.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestVectors(t *testing.T) {
	v := load(t)
	if len(v.Parse) == 0 || len(v.Reject) == 0 || len(v.TXT) == 0 || len(v.Names) == 0 {
		t.Fatal("the vectors are not those that this test knows")
	}
	for _, c := range v.Parse {
		got, err := ParseLabel(c.Label)
		if err != nil || string(got.ID) != c.ID || got.Port != c.Port || got.Mode.String() != c.Mode {
			t.Errorf("%q: %+v, %v, want %+v", c.Label, got, err, c)
		}
		d, err := Rules{Bases: []Name{Name(v.Base)}}.Resolve(Name(c.Label + "." + v.Base))
		if err != nil || d.Kind != App || d.Label != got || string(d.Base) != v.Base {
			t.Errorf("%q on the base: %+v, %v", c.Label, d, err)
		}
	}
	codes := map[string]string{"app id is empty": "host_label", "invalid sni format": "host_label", "both s and g": "host_label", "invalid port": "host_port"}
	for _, c := range v.Reject {
		_, err := ParseLabel(c.Label)
		if codes[c.Why] == "" {
			t.Fatalf("a reason that this test does not know: %s", c.Why)
		}
		wantCode(t, err, codes[c.Why])
	}
	for _, c := range v.TXT {
		got, err := ParseTXT(c.Value)
		if c.Error != (err != nil) || string(got.ID) != c.ID || got.Port != c.Port {
			t.Errorf("TXT %q: %+v, %v", c.Value, got, err)
		}
	}
	for _, c := range v.Names {
		q, err := TXTNames(Name(c.SNI), c.Prefix, c.Compat)
		if err != nil || !reflect.DeepEqual(append(q.Exact, q.Wildcard), c.Order) {
			t.Errorf("%s: %+v, %v, want %v", c.SNI, q, err, c.Order)
		}
	}
	rules := Rules{Bases: []Name{Name(v.Certs.Store[0])}}
	for _, host := range v.Certs.Hit {
		if d, err := rules.Resolve(Name(host)); err != nil || d.Kind != App {
			t.Errorf("%s: %+v, %v", host, d, err)
		}
	}
	for _, host := range v.Certs.Miss {
		if d, err := rules.Resolve(Name(host)); err != nil || d.Kind != Custom {
			t.Errorf("%s: %+v, %v", host, d, err)
		}
	}
}

// Rows that the vectors do not have.
func TestLabels(t *testing.T) {
	for _, c := range []struct {
		name, label string
		want        Label
		code        string
	}{
		{"a suffix counts behind the hyphen alone", "appg", Label{"appg", 80, Terminate}, ""},
		{"the highest port", "a-65535s", Label{"a", 65535, Passthrough}, ""},
		{"port 0 is refused, where upstream fails to connect", "a-0", Label{}, "host_port"},
		{"port 0 with a suffix", "a-00s", Label{}, "host_port"},
		{"a sign, which upstream takes", "a-+80", Label{}, "host_port"},
		{"a minus", "a--80", Label{}, "host_label"},
		{"suffixes twice", "a-80ss", Label{}, "host_port"},
		{"g twice", "a-80gg", Label{}, "host_port"},
		{"s within", "a-8s0", Label{}, "host_port"},
		{"the port in hexadecimal", "a-0x50", Label{}, "host_port"},
		{"underscores in numbers", "a-8_0", Label{}, "host_port"},
		{"a port of many digits", "a-" + strings.Repeat("0", 50) + "80", Label{"a", 80, Terminate}, ""},
		{"a hyphen alone", "-", Label{}, "host_label"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseLabel(c.label)
			wantCode(t, err, c.code)
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestResolve(t *testing.T) {
	closed, open := Rules{Bases: []Name{"other.example", base}}, Rules{Bases: []Name{base}, Loopback: true}
	for _, c := range []struct {
		name  string
		rules Rules
		host  Name
		kind  Kind
		label Label
		code  string
	}{
		{"an app", closed, app + "-8090s.app.example.com", App, Label{app, 8090, Passthrough}, ""},
		{"on the other base", closed, app + ".other.example", App, Label{app, 80, Terminate}, ""},
		{"the gateway", closed, "gateway.app.example.com", Gateway, Label{"gateway", 80, Terminate}, ""},
		{"the gateway as HTTP/2", closed, "gateway-g.app.example.com", Gateway, Label{"gateway", 80, TerminateH2}, ""},
		{"the gateway passed through", closed, "gateway-s.app.example.com", None, Label{}, "host_reserved"},
		{"the gateway passed through at 80", closed, "gateway-80s.app.example.com", None, Label{}, "host_reserved"},
		{"the gateway at its admin port", closed, "gateway-8001.app.example.com", None, Label{}, "host_reserved"},
		{"health", closed, "health.app.example.com", Health, Label{"health", 80, Terminate}, ""},
		{"health at another port", closed, "health-81.app.example.com", None, Label{}, "host_reserved"},
		{"loopback", closed, "localhost-8001.app.example.com", None, Label{}, "host_loopback"},
		{"loopback in development", open, "localhost-8001.app.example.com", Loopback, Label{"localhost", 8001, Terminate}, ""},
		{"the base itself", closed, base, Custom, Label{Mode: Passthrough}, ""},
		{"two levels below the base", closed, "a.b.app.example.com", Custom, Label{Mode: Passthrough}, ""},
		{"a name that ends like the base", closed, "a.evilapp.example.com", Custom, Label{Mode: Passthrough}, ""},
		{"a reserved word elsewhere", closed, "gateway.shop.example", Custom, Label{Mode: Passthrough}, ""},
		{"one label", closed, "localhost", None, Label{}, "host_single_label"},
		{"no rules", Rules{}, "gateway.app.example.com", Custom, Label{Mode: Passthrough}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := c.rules.Resolve(c.host)
			wantCode(t, err, c.code)
			if d.Kind != c.kind || d.Label != c.label {
				t.Errorf("got %+v", d)
			}
			if err == nil && d.Name != c.host {
				t.Errorf("name %q", d.Name)
			}
		})
	}
}

func TestIDs(t *testing.T) {
	if b, ok := ID(app).Bytes(); !ok || b[0] != 0x33 || b[19] != 0x77 {
		t.Errorf("%x, %t", b, ok)
	}
	for _, id := range []ID{"", "myapp", ID(app[:38]), app + "00", ID("z" + app[1:])} {
		if _, ok := id.Bytes(); ok {
			t.Errorf("%q is the hexadecimal of 20 bytes", id)
		}
	}
}

func TestTXTValues(t *testing.T) {
	for _, c := range []struct {
		name, value string
		want        Answer
		code        string
	}{
		{"upper case", strings.ToUpper(app) + ":80", Answer{app, 80}, ""},
		{"an id of digits", "1234:80", Answer{"1234", 80}, ""},
		{"port 0", "app:0", Answer{}, "host_port"},
		{"a sign", "app:+80", Answer{}, "host_port"},
		{"no port", "app:", Answer{}, "host_port"},
		{"more behind the port", "app:80:81", Answer{}, "host_port"},
		{"space behind the port", "app:80 ", Answer{}, "host_port"},
		{"no id", ":80", Answer{}, "host_txt"},
		{"an id with a hyphen", "app-1:80", Answer{}, "host_txt"},
		{"an id with a dot", "app.b:80", Answer{}, "host_txt"},
		{"an id with a trailing dot", "app.:80", Answer{}, "host_txt"},
		{"the gateway's loopback", "localhost:8001", Answer{}, "host_txt"},
		{"the gateway's loopback in upper case", "LOCALHOST:8001", Answer{}, "host_txt"},
		{"the gateway", "gateway:80", Answer{}, "host_txt"},
		{"an address", "127.0.0.1:80", Answer{}, "host_txt"},
		{"too long", strings.Repeat("a", 64) + ":65535", Answer{}, "host_txt"},
		{"a port of many zeros", "a:" + strings.Repeat("0", 70) + "80", Answer{}, "host_txt"},
		{"nothing", "", Answer{}, "host_txt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseTXT(c.value)
			wantCode(t, err, c.code)
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestTXTNames(t *testing.T) {
	long := Name(strings.Repeat("a.", 120) + "example")
	for _, c := range []struct {
		name   string
		sni    Name
		prefix string
		compat bool
		want   Queries
		code   string
	}{
		{"upstream's default", "a.b.example", "", true, Queries{[]Name{"_dstack-app-address.a.b.example", "_tapp-address.a.b.example"}, "_dstack-app-address-wildcard.b.example"}, ""},
		{"without the older name", "a.b.example", "", false, Queries{[]Name{"_dstack-app-address.a.b.example"}, "_dstack-app-address-wildcard.b.example"}, ""},
		{"the older name once", "a.b.example", "_tapp-address", true, Queries{[]Name{"_tapp-address.a.b.example"}, "_tapp-address-wildcard.b.example"}, ""},
		{"no wildcard of a top-level domain", "shop.example", "", false, Queries{[]Name{"_dstack-app-address.shop.example"}, ""}, ""},
		{"no name is too long for all", long, "", true, Queries{}, "host_malformed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := TXTNames(c.sni, c.prefix, c.compat)
			wantCode(t, err, c.code)
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

// What is written in the grammar is read back, whatever the case of its letters.
func TestPropertyLabelsComeBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := Label{ID: ID(rapid.StringMatching(`[a-z0-9_]{1,50}`).Draw(t, "id")), Mode: Mode(rapid.IntRange(0, 2).Draw(t, "mode"))}
		suffix := []string{"", "g", "s"}[want.Mode]
		want.Port = []uint16{80, 80, 443}[want.Mode]
		port := ""
		if rapid.Bool().Draw(t, "port named") {
			n := rapid.IntRange(1, 65535).Draw(t, "port")
			want.Port, port = uint16(n), strings.Repeat("0", rapid.IntRange(0, 3).Draw(t, "zeros"))+strconv.Itoa(n)
		}
		text := string(want.ID) + "-" + port + suffix + "." + string(base)
		if rapid.Bool().Draw(t, "upper") {
			text = strings.ToUpper(text)
		}
		name, err := ParseName(text)
		if err != nil {
			t.Fatal(err)
		}
		d, err := Rules{Bases: []Name{base}, Loopback: true}.Resolve(name)
		if reserved(want.ID) {
			return
		}
		if err != nil || d.Kind != App || d.Label != want {
			t.Fatalf("%s: %+v, %v, want %+v", text, d, err, want)
		}
	})
}

// No name leads to the loopback or to the gateway's other ports, in any spelling.
func TestPropertyReservedIDsStayReserved(t *testing.T) {
	rules := Rules{Bases: []Name{base}}
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.SampledFrom([]string{"localhost", "gateway", "health", "LocalHost", "GATEWAY"}).Draw(t, "id")
		rest := rapid.StringMatching(`(-[0-9]{0,6}[sg]{0,2})?`).Draw(t, "rest")
		name, err := ParseName(id + rest + "." + string(base))
		if err != nil {
			t.Fatal(err)
		}
		d, err := rules.Resolve(name)
		if err == nil && (d.Kind == App || d.Kind == Loopback || d.Kind == Custom || d.Port != 80 || d.Mode == Passthrough) {
			t.Fatalf("%s: %+v", name, d)
		}
		if a, err := ParseTXT(id + ":80"); err == nil {
			t.Fatalf("TXT: %+v", a)
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"a.example", "A-8090S.app.example.com.", "192.0.2.1", "localhost-80s.app.example.com", "gateway.app.example.com", "a-0.app.example.com"} {
		f.Add(s)
	}
	rules := Rules{Bases: []Name{base}}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			if n != "" || fault.Code(err) == "" {
				t.Fatalf("%q, %v", n, err)
			}
			return
		}
		if again, err := ParseName(string(n)); err != nil || again != n || len(n) > MaxName {
			t.Fatalf("%q becomes %q: %v", n, again, err)
		}
		d, err := rules.Resolve(n)
		switch {
		case err != nil:
			if d != (Destination{}) || fault.Code(err) == "" {
				t.Fatalf("%+v, %v", d, err)
			}
		case d.Kind == None || d.Kind == Loopback || d.Kind != Custom && (d.Port == 0 || d.ID == "" || d.Base != base):
			t.Fatalf("%+v", d)
		case d.Kind == Custom:
			if q, err := TXTNames(n, "", true); err == nil && len(q.Exact) > 2 {
				t.Fatalf("%+v", q)
			}
		}
	})
}

func FuzzTXT(f *testing.F) {
	f.Add(app + ":8090")
	f.Add("localhost:80")
	f.Add("1.2.3.4:80")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseTXT(s)
		if err != nil {
			if a != (Answer{}) || fault.Code(err) == "" {
				t.Fatalf("%+v, %v", a, err)
			}
			return
		}
		// What a TXT record leads to is what the same id and port on a base leads to.
		l, err := ParseLabel(string(a.ID) + "-" + strconv.Itoa(int(a.Port)))
		if err != nil || l.ID != a.ID || l.Port != a.Port || reserved(a.ID) {
			t.Fatalf("%q: %+v, %+v, %v", s, a, l, err)
		}
	})
}
