// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"html"
	"io/fs"
	"regexp"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/web/verify"
)

// What the browser page needs, by its own policy, the service's header admits: a
// browser enforces both.
func TestTheServicesPolicyAdmitsThePage(t *testing.T) {
	page, err := fs.ReadFile(verify.FS, "index.html")
	check(t, err)
	m := regexp.MustCompile(`http-equiv="Content-Security-Policy" content="([^"]*)"`).FindSubmatch(page)
	if m == nil {
		t.Fatal("the page has no policy of its own")
	}
	directives := func(text string) map[string]string {
		out := map[string]string{}
		for _, d := range strings.Split(text, ";") {
			name, value, _ := strings.Cut(strings.TrimSpace(d), " ")
			out[name] = value
		}
		return out
	}
	wants, has := directives(html.UnescapeString(string(m[1]))), directives(headers["Content-Security-Policy"])
	for _, name := range []string{"script-src", "style-src", "worker-src", "connect-src"} {
		if wants[name] == "" || wants[name] != has[name] {
			t.Errorf("%s: the page needs %q, the header admits %q", name, wants[name], has[name])
		}
	}
}
