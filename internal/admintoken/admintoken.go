// SPDX-License-Identifier: Apache-2.0

// Package admintoken lets administrators of a component's RPC in, and nobody else.
//
// A request shows a token (X-Admin-Token, bearer, Basic, or for GET ?token=) or a name and
// password of an htpasswd file. Guarantees: without a credential to compare with, nobody is
// let in unless that is said (Open); secrets are compared by digests of one length, in
// constant time; what a browser adds by itself (a remembered password, the user's network)
// never carries a call that another site made; a query's token goes no further than here.
// Guesses are slowed: a wrong one is answered late, and a name whose password was guessed
// wrong several times in a row is not tried again for a while.
//
// Attacker-controlled: requests. Trusted: the configuration, the htpasswd file.
//
// Implements spec/gateway.md §1.2; threats.md G11.
package admintoken

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

// Shortest is the least length of a token in bytes: a shorter one can be guessed.
const Shortest = 16

// Limits of an htpasswd file.
const (
	maxUsers   = 256
	maxFile    = 64 << 10
	maxCost    = 14 // of bcrypt; about a second
	maxSecret  = 4096
	maxWaiting = 64
)

// FromEnv returns the first of the named variables that is set and not empty, as the token
// that a configuration file left out.
func FromEnv(environ []string, names ...string) config.Secret {
	for _, name := range names {
		for _, kv := range environ {
			if key, value, _ := strings.Cut(kv, "="); key == name && value != "" {
				return config.NewSecret(value)
			}
		}
	}
	return config.Secret{}
}

// Config says who is let in.
type Config struct {
	Realm string        // shown to browsers
	Token config.Secret // of at least Shortest bytes; empty: no token is taken
	// Htpasswd is a file of names and bcrypt hashes; empty: none is taken.
	Htpasswd string
	// Query takes ?token= of GET requests.
	Query bool
	// Open lets everyone in who reaches the listener, but no other site's pages.
	Open bool
	// Delay is how late a wrong credential is answered; 250 ms.
	Delay time.Duration
	Now   func() time.Time // time.Now if nil
}

// Guard decides over requests.
type Guard struct {
	cfg     Config
	token   *[sha256.Size]byte
	users   map[string][]byte
	nobody  []byte        // what an unknown name's password is compared with
	hashing chan struct{} // passwords that are compared at once
	waiting chan struct{} // wrong ones that wait for their answer

	mu     sync.Mutex
	missed map[string]miss // by name of the file, so bounded
}

// miss is how often in a row a name's password was wrong, and until when it is not tried.
type miss struct {
	count int
	until time.Time
}

// New checks the configuration. Codes admin_token (too short), admin_htpasswd,
// admin_no_credential.
func New(c Config) (*Guard, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Delay == 0 {
		c.Delay = 250 * time.Millisecond
	}
	g := &Guard{cfg: c, hashing: make(chan struct{}, 2), waiting: make(chan struct{}, maxWaiting), missed: map[string]miss{}}
	if t := c.Token.Reveal(); t != "" {
		if len(t) < Shortest || len(t) > maxSecret || strings.TrimSpace(t) != t {
			return nil, fault.New("admin_token", "the administrators' token is shorter than %d bytes, or begins or ends with a space", Shortest).WithFix("openssl rand -hex 32 makes one")
		}
		sum := sha256.Sum256([]byte(t))
		g.token = &sum
	}
	if c.Htpasswd != "" {
		text, err := os.ReadFile(c.Htpasswd)
		if err != nil {
			return nil, fault.Wrap(err, "admin_htpasswd", "read the administrators' passwords")
		}
		if g.users, err = ParseHtpasswd(text); err != nil {
			return nil, err
		}
		for _, hash := range g.users {
			g.nobody = hash
			break
		}
	}
	if g.token == nil && g.users == nil && !c.Open {
		return nil, fault.New("admin_no_credential", "administrators have neither a token nor a password, so that none could come in").
			WithFix("set a token (auth_token) or htpasswd_file; insecure_no_auth lets everyone in who reaches the listener")
	}
	return g, nil
}

// ParseHtpasswd reads lines of a name, a colon and a bcrypt hash; empty lines and those
// that begin with # are none. Code admin_htpasswd.
func ParseHtpasswd(text []byte) (map[string][]byte, error) {
	bad := func(line int, format string, args ...any) error {
		args = append([]any{line}, args...)
		return fault.New("admin_htpasswd", "line %d of the htpasswd file: "+format, args...).WithFix("htpasswd -B makes such lines")
	}
	if len(text) > maxFile {
		return nil, fault.New("admin_htpasswd", "the htpasswd file has more than %d bytes", maxFile)
	}
	users := map[string][]byte{}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, hash, ok := strings.Cut(line, ":")
		if !ok || name == "" || len(name) > 128 {
			return nil, bad(n, "no name and hash")
		}
		if len(hash) != 60 || !strings.HasPrefix(hash, "$2a$") && !strings.HasPrefix(hash, "$2b$") && !strings.HasPrefix(hash, "$2y$") {
			return nil, bad(n, "the hash is not bcrypt's, and weaker ones are not taken")
		}
		if cost, err := bcrypt.Cost([]byte(hash)); err != nil || cost > maxCost {
			return nil, bad(n, "the cost of the hash is none, or more than %d", maxCost)
		}
		if users[name] != nil {
			return nil, bad(n, "the name is there twice")
		}
		if len(users) == maxUsers {
			return nil, bad(n, "more than %d names", maxUsers)
		}
		users[name] = []byte(hash)
	}
	if len(users) == 0 {
		return nil, fault.New("admin_htpasswd", "the htpasswd file has no name").WithFix("htpasswd -B makes lines of it")
	}
	return users, nil
}

type key struct{}

// Caller is who a request is of.
type Caller struct {
	Name string // token, open, or user and the name
	// Ambient says that a browser could have shown the credential by itself.
	Ambient bool
}

// Who returns the caller of a request that a guard let in.
func Who(ctx context.Context) Caller {
	c, _ := ctx.Value(key{}).(Caller)
	return c
}

// Handler lets administrators through to next.
func (g *Guard) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !g.sameSite(r) {
			http.Error(w, "another site's page asked for this", http.StatusForbidden)
			return
		}
		who, err := g.check(r)
		if err != nil {
			select {
			case g.waiting <- struct{}{}:
				t := time.NewTimer(g.cfg.Delay)
				select {
				case <-t.C:
				case <-r.Context().Done():
				}
				t.Stop()
				<-g.waiting
			default:
			}
			if errors.Is(err, errLater) {
				w.Header().Set("Retry-After", "60")
				http.Error(w, err.Error(), http.StatusTooManyRequests)
				return
			}
			w.Header().Set("WWW-Authenticate", `Basic realm=`+strconv.Quote(g.cfg.Realm))
			http.Error(w, err.Error(), http.StatusUnauthorized)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), key{}, who))
		r.URL = withoutToken(r.URL)
		r.RequestURI = r.URL.RequestURI()
		next.ServeHTTP(w, r)
	})
}

var (
	errWrong = errors.New("the administrators' token is missing or wrong")
	errLater = errors.New("too many wrong passwords; try later")
)

// sameSite reports whether no page of another site made the request. Programs say nothing
// of sites. With Open a page that gave its own name our address (DNS rebinding) would look
// like ours, so that then only addresses and localhost are names of this listener.
func (g *Guard) sameSite(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
	default:
		return false
	}
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || !strings.EqualFold(u.Host, r.Host) {
			return false
		}
	}
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); g.cfg.Open && ok && a.Network() == "tcp" {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		_, err := netip.ParseAddr(strings.Trim(host, "[]"))
		return err == nil || host == "localhost"
	}
	return true
}

// check finds whose credential a request shows.
func (g *Guard) check(r *http.Request) (Caller, error) {
	var caller Caller
	token := func(text string, ambient bool) bool {
		if g.token == nil || text == "" || len(text) > maxSecret {
			return false
		}
		// The digests have one length, so that the comparison tells none.
		given := sha256.Sum256([]byte(text))
		if subtle.ConstantTimeCompare(given[:], g.token[:]) != 1 {
			return false
		}
		caller = Caller{"token", ambient}
		return true
	}
	user, password, basic := r.BasicAuth()
	bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	switch {
	case token(r.Header.Get("X-Admin-Token"), false), ok && token(bearer, false):
		return caller, nil
	case basic && (token(password, true) || password == "" && token(user, true)):
		return caller, nil
	case g.cfg.Query && r.Method == http.MethodGet && token(r.URL.Query().Get("token"), false):
		return caller, nil
	case g.cfg.Open:
		return Caller{"open", true}, nil
	case basic && g.users != nil:
		return g.password(r.Context(), user, password)
	}
	return Caller{}, errWrong
}

// password compares the password of a user of the file.
func (g *Guard) password(ctx context.Context, user, password string) (Caller, error) {
	hash, known := g.users[user]
	if !known {
		hash = g.nobody // as long as for a name that there is
	}
	now := g.cfg.Now()
	g.mu.Lock()
	later := known && now.Before(g.missed[user].until)
	g.mu.Unlock()
	if later {
		return Caller{}, errLater
	}
	select {
	case g.hashing <- struct{}{}:
		defer func() { <-g.hashing }()
	case <-ctx.Done():
		return Caller{}, errLater
	}
	err := bcrypt.CompareHashAndPassword(hash, []byte(password))
	if err == nil && known {
		g.mu.Lock()
		delete(g.missed, user)
		g.mu.Unlock()
		return Caller{"user " + user, true}, nil
	}
	if known {
		g.mu.Lock()
		m := g.missed[user]
		m.count++
		if m.count >= 5 {
			m.until = now.Add(min(time.Second<<min(m.count-5, 6), time.Minute))
		}
		g.missed[user] = m
		g.mu.Unlock()
	}
	return Caller{}, errWrong
}

// withoutToken takes the token out of a query, before anyone logs it.
func withoutToken(u *url.URL) *url.URL {
	if !strings.Contains(u.RawQuery, "token") {
		return u
	}
	var keep []string
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		name, _, _ := strings.Cut(pair, "=")
		if name, err := url.QueryUnescape(name); err == nil && name == "token" {
			continue
		}
		keep = append(keep, pair)
	}
	c := *u
	c.RawQuery = strings.Join(keep, "&")
	return &c
}
