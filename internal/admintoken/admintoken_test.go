// SPDX-License-Identifier: Apache-2.0

package admintoken

import (
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

const secret = "0123456789abcdef0123456789abcdef"

func htpasswd(t *testing.T) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte("a good password"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "htpasswd")
	text := "# administrators\n\nalice:" + string(hash) + "\nbob:$2y" + string(hash[3:]) + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func guard(t *testing.T, c Config) *Guard {
	t.Helper()
	c.Realm, c.Delay = "dstack admin", time.Millisecond
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// ask sends a request; header are pairs.
func ask(g *Guard, method, target string, header ...string) (*httptest.ResponseRecorder, *http.Request) {
	r := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
			continue
		}
		r.Header.Set(header[i], header[i+1])
	}
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, net.Addr(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80})))
	w := httptest.NewRecorder()
	var seen *http.Request
	g.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen = r })).ServeHTTP(w, r)
	return w, seen
}

func basic(text string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(text))
}

func TestThreat_G11_AdministratorsShowACredential(t *testing.T) {
	g := guard(t, Config{Token: config.NewSecret(secret), Htpasswd: htpasswd(t), Query: true})
	for _, c := range []struct {
		name, header, value string
		who                 Caller // zero: refused
	}{
		{"a token", "X-Admin-Token", secret, Caller{"token", false}},
		{"a bearer", "Authorization", "Bearer " + secret, Caller{"token", false}},
		{"Basic, any name", "Authorization", basic("anyone:" + secret), Caller{"token", true}},
		{"Basic, the token as name", "Authorization", basic(secret + ":"), Caller{"token", true}},
		{"a password", "Authorization", basic("alice:a good password"), Caller{"user alice", true}},
		{"a password, $2y$", "Authorization", basic("bob:a good password"), Caller{"user bob", true}},
		{"nothing", "", "", Caller{}},
		{"an empty token", "X-Admin-Token", "", Caller{}},
		{"a part of the token", "X-Admin-Token", secret[:31], Caller{}},
		{"more than the token", "X-Admin-Token", secret + "0", Caller{}},
		{"an empty bearer", "Authorization", "Bearer ", Caller{}},
		{"another scheme", "Authorization", "bearer " + secret, Caller{}},
		{"no scheme", "Authorization", secret, Caller{}},
		{"the token as name, with a password", "Authorization", basic(secret + ":x"), Caller{}},
		{"nothing in Basic", "Authorization", basic(":"), Caller{}},
		{"a wrong password", "Authorization", basic("alice:a bad password"), Caller{}},
		{"no password", "Authorization", basic("alice:"), Caller{}},
		{"nobody's password", "Authorization", basic("carol:a good password"), Caller{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var header []string
			if c.header != "" {
				header = []string{c.header, c.value}
			}
			w, seen := ask(g, "POST", "/prpc/Status", header...)
			if c.who == (Caller{}) {
				if seen != nil || w.Code != 401 || w.Header().Get("WWW-Authenticate") != `Basic realm="dstack admin"` || strings.Contains(w.Body.String(), secret[:8]) {
					t.Errorf("%d %q", w.Code, w.Body)
				}
				return
			}
			if seen == nil || Who(seen.Context()) != c.who {
				t.Errorf("%d %q", w.Code, w.Body)
			}
		})
	}
	// A token in a query is taken for GET, and goes no further.
	w, seen := ask(g, "GET", "/prpc/GetInfo?id=ab&token="+secret+"&x=1&%74oken=2")
	if seen == nil || seen.URL.RawQuery != "id=ab&x=1" || strings.Contains(seen.RequestURI, secret) {
		t.Errorf("%d, %v", w.Code, seen)
	}
	if w, seen := ask(g, "POST", "/prpc/Exit?token="+secret); seen != nil || w.Code != 401 {
		t.Errorf("a query's token for POST: %d", w.Code)
	}
	closed := guard(t, Config{Token: config.NewSecret(secret)})
	if w, seen := ask(closed, "GET", "/?token="+secret); seen != nil || w.Code != 401 {
		t.Errorf("a query's token where none is taken: %d", w.Code)
	}
}

func TestNobodyIsLetInByAnEmptyConfiguration(t *testing.T) {
	weak := filepath.Join(t.TempDir(), "weak")
	if err := os.WriteFile(weak, []byte("alice:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cfg  Config
		code string
	}{
		"nothing":                     {Config{}, "admin_no_credential"},
		"a short token":               {Config{Token: config.NewSecret("0123456789abcde")}, "admin_token"},
		"a short token, however open": {Config{Token: config.NewSecret("x"), Open: true}, "admin_token"},
		"a line's end":                {Config{Token: config.NewSecret(secret + "\n")}, "admin_token"},
		"a missing file":              {Config{Htpasswd: "/nonexistent"}, "admin_htpasswd"},
		"weak hashes":                 {Config{Htpasswd: weak}, "admin_htpasswd"},
	} {
		if _, err := New(c.cfg); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	for want, environ := range map[string][]string{"first": {"AB=x", "B=second", "A=first"}, "second": {"A=", "B=second"}, "": {"B=", "AB=x"}} {
		if s := FromEnv(environ, "A", "B"); s.Reveal() != want {
			t.Errorf("%v: %q", environ, s.Reveal())
		}
	}
}

func TestOtherSitesPagesCannotCall(t *testing.T) {
	closed, open := guard(t, Config{Token: config.NewSecret(secret)}), guard(t, Config{Open: true})
	for _, c := range []struct {
		name   string
		header []string
		ok     bool
		rebind bool // only Open minds it
	}{
		{"a program", nil, true, false},
		{"our page", []string{"Sec-Fetch-Site", "same-origin", "Origin", "http://127.0.0.1:8011"}, true, false},
		{"typed in", []string{"Sec-Fetch-Site", "none"}, true, false},
		{"another site", []string{"Sec-Fetch-Site", "cross-site"}, false, false},
		{"a neighbour", []string{"Sec-Fetch-Site", "same-site"}, false, false},
		{"an old browser's form", []string{"Origin", "https://evil.example"}, false, false},
		{"an opaque origin", []string{"Origin", "null"}, false, false},
		{"our address under another name", []string{"Host", "evil.example", "Origin", "http://evil.example"}, true, true},
		{"localhost", []string{"Host", "localhost:8011", "Origin", "http://localhost:8011"}, true, false},
		{"IPv6", []string{"Host", "[::1]:8011"}, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			header := append([]string{"Host", "127.0.0.1:8011"}, c.header...)
			if _, seen := ask(open, "GET", "/prpc/Exit", header...); (seen != nil) != (c.ok && !c.rebind) {
				t.Errorf("open: %v", seen)
			}
			if _, seen := ask(closed, "POST", "/prpc/Exit", append(header, "Authorization", basic("x:"+secret))...); (seen != nil) != c.ok {
				t.Errorf("with a token: %v", seen)
			}
		})
	}
}

func TestGuessesAreSlowed(t *testing.T) {
	now := time.Unix(1e9, 0)
	g := guard(t, Config{Token: config.NewSecret(secret), Htpasswd: htpasswd(t), Now: func() time.Time { return now }})
	try := func(password string) int {
		w, _ := ask(g, "POST", "/", "Authorization", basic("alice:"+password))
		return w.Code
	}
	for range 5 {
		if code := try("guess"); code != 401 {
			t.Fatalf("status %d", code)
		}
	}
	if code := try("a good password"); code != 429 {
		t.Errorf("the sixth guess was tried: %d", code)
	}
	if w, seen := ask(g, "POST", "/", "Authorization", "Bearer "+secret); seen == nil {
		t.Errorf("guesses of a password lock the token out: %d", w.Code)
	}
	now = now.Add(2 * time.Second)
	if code := try("a good password"); code != 200 {
		t.Errorf("after a while: %d", code)
	}
	if code := try("guess"); code != 401 {
		t.Errorf("the count begins anew: %d", code)
	}
	// A wrong credential is answered late.
	g.cfg.Delay = 50 * time.Millisecond
	began := time.Now()
	ask(g, "POST", "/", "X-Admin-Token", "wrong")
	if d := time.Since(began); d < 50*time.Millisecond {
		t.Errorf("answered after %s", d)
	}
}

func FuzzParseHtpasswd(f *testing.F) {
	for _, s := range []string{"", "#x\n", "alice:$2y$04$" + strings.Repeat("a", 53), "a:b\na:b", ":x", "alice:$2y$99$" + strings.Repeat("a", 53)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		users, err := ParseHtpasswd(text)
		if err != nil && fault.Code(err) != "admin_htpasswd" || err == nil && (len(users) == 0 || len(users) > maxUsers) {
			t.Fatalf("%d names, %v", len(users), err)
		}
	})
}
