// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestCustomDomains(t *testing.T) {
	const ports = `"gateway_enabled":true,"port_policy":{"ports":[{"port":8080,"tls":"app"},{"port":9090,"tls":"gateway"},{"port":7070}]}`
	entry := func(name string, port int) string { return fmt.Sprintf(`{"domain":%q,"port":%d}`, name, port) }
	long := strings.Repeat("a", 63)
	for _, c := range []struct{ name, list, with, code string }{
		{"one", entry("shop.example.com", 8080), ports, ""},
		{"two of one port", entry("shop.example.com", 8080) + "," + entry("example.com", 8080), ports, ""},
		{"the longest label", entry(long+".example.com", 8080), ports, ""},
		{"digits and hyphens", entry("0-9.xn--e1afmkfd.example", 8080), ports, ""},
		{"a label too long", entry("a"+long+".example.com", 8080), ports, "manifest_field"},
		{"a name too long", entry(strings.Repeat("a.", 126)+"aa", 8080), ports, "manifest_field"},
		{"upper case", entry("Shop.example.com", 8080), ports, "manifest_field"},
		{"a trailing dot", entry("shop.example.com.", 8080), ports, "manifest_field"},
		{"a wildcard", entry("*.example.com", 8080), ports, "manifest_field"},
		{"one label", entry("localhost", 8080), ports, "manifest_field"},
		{"an address", entry("192.0.2.1", 8080), ports, "manifest_field"},
		{"an underscore", entry("_a.example.com", 8080), ports, "manifest_field"},
		{"a hyphen first", entry("-a.example.com", 8080), ports, "manifest_field"},
		{"nothing", entry("", 8080), ports, "manifest_field"},
		{"twice", entry("a.example", 8080) + "," + entry("a.example", 8080), ports, "manifest_field"},
		{"a port that is not listed", entry("a.example", 8081), ports, "manifest_field"},
		{"a port whose TLS ends at the gateway", entry("a.example", 9090), ports, "manifest_field"},
		{"a port whose TLS is the app's own", entry("a.example", 7070), ports, "manifest_field"},
		{"port 0", entry("a.example", 0), ports, "manifest_field"},
		{"no port", `{"domain":"a.example"}`, ports, "manifest_field"},
		{"another member", `{"domain":"a.example","port":8080,"wildcard":true}`, ports, "manifest_unknown_field"},
		{"a text", `"a.example"`, ports, "manifest_field"},
		{"without a gateway", entry("a.example", 8080), strings.Replace(ports, "true", "false", 1), "manifest_field"},
	} {
		m, err := Parse([]byte(`{"manifest_version":2,"name":"n","runner":"docker-compose",` + c.with + `,"custom_domains":[` + c.list + `]}`))
		if fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %q", c.name, err, c.code)
		}
		if err != nil {
			continue
		}
		b, err := Build(Draft{Name: "n", GatewayEnabled: true, PortPolicy: &m.PortPolicy, CustomDomains: m.CustomDomains})
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse(b); err != nil || !slices.Equal(again.CustomDomains, m.CustomDomains) {
			t.Errorf("%s: %+v, %v", c.name, again, err)
		}
	}
	var many []string
	for i := range MaxCustomDomains + 1 {
		many = append(many, entry(fmt.Sprintf("a%d.example", i), 8080))
	}
	if _, err := Parse([]byte(`{"manifest_version":2,"name":"n","runner":"docker-compose",` + ports + `,"custom_domains":[` + strings.Join(many, ",") + `]}`)); fault.Code(err) != "manifest_field" {
		t.Errorf("too many: %v", err)
	}
}
