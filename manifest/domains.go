// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"
)

// Limits of custom_domains.
const (
	MaxCustomDomains = 16
	maxDomain        = 253 // bytes
	maxDomainLabel   = 63
)

// CustomDomain is a domain of the app's owner that leads to a port of the app, and for which
// the guest may ask a gateway for a certificate of its own channel key. What is not listed
// reaches the app's own TLS, or none.
type CustomDomain struct {
	Domain string // domain: in lower case, without a trailing dot, no wildcard
	Port   uint16 // port: one of port_policy, with tls app
}

func (d *decoder) customDomains() []CustomDomain {
	objects := d.objects("custom_domains")
	if len(objects) > MaxCustomDomains {
		d.fail("custom_domains", "has %d domains, more than %d", len(objects), MaxCustomDomains)
		return nil
	}
	var out []CustomDomain
	seen := map[string]bool{}
	for i, obj := range objects {
		in := &decoder{obj: obj, prefix: fmt.Sprintf("custom_domains[%d].", i)}
		in.only("domain", "port")
		c := CustomDomain{Domain: in.requiredString("domain"), Port: uint16(in.uint("port", 16))}
		switch {
		case in.err != nil:
		case !isDomain(c.Domain):
			in.fail("domain", "%q is not a domain in lower case, of two labels or more, without a wildcard", clip(c.Domain))
		case seen[c.Domain]:
			in.fail("domain", "%q is there twice", c.Domain)
		}
		seen[c.Domain] = true
		d.merge(in)
		out = append(out, c)
	}
	return out
}

// isDomain reports whether s is a host name of letters, digits and inner hyphens, and no
// address.
func isDomain(s string) bool {
	if len(s) > maxDomain || !strings.Contains(s, ".") {
		return false
	}
	letter := false // in the last label: a name that ends in a number is taken for an address
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxDomainLabel || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		letter = false
		for i := range len(label) {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
				return false
			}
			letter = letter || c >= 'a'
		}
	}
	return letter
}

// checkDomains sees that each domain leads to a port of which TLS ends in the guest.
func (m *Manifest) checkDomains() error {
	if len(m.CustomDomains) > 0 && !m.GatewayWanted() {
		return fieldError("custom_domains", "lead to the app by a gateway, but gateway_enabled is false")
	}
	for i, c := range m.CustomDomains {
		app := false
		for _, p := range m.PortPolicy.Ports {
			app = app || p.Port == c.Port && p.TLS == TLSApp
		}
		if !app {
			return fieldError(fmt.Sprintf("custom_domains[%d].port", i), "%d is no port of port_policy with tls app", c.Port)
		}
	}
	return nil
}
