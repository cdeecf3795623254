// SPDX-License-Identifier: Apache-2.0

package page

import (
	"encoding/json"
	"flag"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit/chromium"
)

var screenshots = flag.String("screenshots", "", "save pictures of the page to this directory")

// The page names no other origin, has no script or style of its own and makes no markup of
// text.
func TestThePageUsesNothingOfOthers(t *testing.T) {
	others := regexp.MustCompile("(?i)(?:https?:|[\"'(=`])//[a-z0-9.-]+\\.[a-z]{2,}")
	markup := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc|createContextualFragment`)
	inline := regexp.MustCompile(`(?i)<style|\sstyle=|\son[a-z]+=|<script[^>]*>[^<]|javascript:`)
	entries, err := fs.ReadDir(files, ".")
	if err != nil || len(entries) != 3 {
		t.Fatal(entries, err)
	}
	for _, e := range entries {
		data, err := files.ReadFile(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		for what, pattern := range map[string]*regexp.Regexp{"names another origin": others, "makes markup of text": markup} {
			if found := pattern.Find(data); found != nil {
				t.Errorf("%s %s: %s", e.Name(), what, found)
			}
		}
		if found := inline.Find(data); found != nil && strings.HasSuffix(e.Name(), ".html") {
			t.Errorf("%s has script or style of its own: %s", e.Name(), found)
		}
	}
}

func TestThePolicyGoesWithEachFile(t *testing.T) {
	mux := http.NewServeMux()
	Register(mux)
	for _, file := range []string{"/", "/status.css", "/status.js"} {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest("GET", file, nil))
		h := w.Result().Header
		if w.Code != http.StatusOK || !strings.HasPrefix(h.Get("Content-Security-Policy"), "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ") ||
			!strings.Contains(h.Get("Content-Security-Policy"), "frame-ancestors 'none'") || strings.Contains(h.Get("Content-Security-Policy"), "unsafe") ||
			h.Get("X-Frame-Options") != "DENY" || h.Get("Cache-Control") != "no-store" || h.Get("Referrer-Policy") != "no-referrer" || h.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %d %v", file, w.Code, h)
		}
	}
	for _, other := range []string{"/index.html", "/page.go", "/status.js/"} {
		w := httptest.NewRecorder()
		if mux.ServeHTTP(w, httptest.NewRequest("GET", other, nil)); w.Code != http.StatusNotFound {
			t.Errorf("%s: %d", other, w.Code)
		}
	}
}

// liar answers as a gateway does whose every text is a stranger's.
type liar struct {
	mu      sync.Mutex
	answers map[string]any // by method; nil fails
	metrics string
	drained []string
}

func (l *liar) set(method string, answer any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answers[method] = answer
}

func (l *liar) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := strings.TrimPrefix(path.Base(r.URL.Path), "Admin.")
	if name == "metrics" {
		io.WriteString(w, l.metrics)
		return
	}
	body, _ := io.ReadAll(r.Body)
	if name == "Drain" {
		l.drained = append(l.drained, string(body))
	}
	answer, ok := l.answers[name]
	if !ok {
		w.WriteHeader(http.StatusBadRequest)
		answer = map[string]string{"error": "this gateway was not given " + name, "code": "admin_unavailable"}
	}
	if err, ok := answer.(error); ok {
		w.WriteHeader(http.StatusBadRequest)
		answer = map[string]string{"error": err.Error()}
	}
	json.NewEncoder(w).Encode(answer)
}

type object = map[string]any

type refusal string

func (r refusal) Error() string { return string(r) }

// Whatever names, domains, addresses and errors are, the page shows them as text: in a real
// browser.
func TestHostileTextIsTextOnThePage(t *testing.T) {
	b := chromium.Start(t)
	evil := func(where string) string {
		return "<img src=x onerror=\"window.pwned='" + where + "'\"><script>window.pwned='" + where + "'</script>&lt;b&gt;\u202egpj\u0000\u001b[31m " + where
	}
	now := float64(time.Now().Unix())
	hosts := []any{nil, object{}}
	for range 600 {
		hosts = append(hosts, object{"app_id": evil("app"), "instance_id": evil("instance"), "num_connections": evil("count"), "latest_handshake": now, "attested": "1e99", "lease_until": -5})
	}
	l := &liar{metrics: "dstack_gateway_connections_refused_total{code=\"" + evil("code") + "\"} 7\ndstack_gateway_connections_open 3\ngarbage{\n"}
	l.answers = map[string]any{
		"Status": object{"id": evil("id"), "url": "javascript:window.pwned=1//" + evil("url"), "uuid": evil("uuid"), "trust": evil("trust"), "tunnel": evil("tunnel"), "draining": false,
			"hosts": hosts, "unready": []string{evil("unready")}},
		"GetMeta":        object{"registered": evil("n"), "online": 1},
		"ListZtDomains":  object{"domains": []any{nil, object{"config": object{"domain": evil("domain"), "port": evil("port")}, "cert_status": object{"has_cert": true, "not_after": now + 86400, "error": evil("error")}}, object{}}},
		"ListMembers":    object{"quorum": false, "members": []any{object{"name": evil("member"), "url": evil("url"), "leader": true}}},
		"ListQuarantine": object{"total": 1, "records": []any{object{"source": evil("source"), "at": now, "code": evil("code"), "error": evil("why"), "digest": strings.Repeat("A", 100000)}}},
		"CtStatus":       object{"checked_at": now, "logs": []any{object{"name": evil("log"), "size": 5, "error": evil("logerror")}}, "alarms": []any{object{"log": evil("log"), "index": 1, "names": []string{evil("name")}, "key": evil("key"), "at": now, "kind": evil("kind"), "text": evil("text")}}},
	}
	mux := http.NewServeMux()
	Register(mux)
	mux.Handle("/prpc/", l)
	mux.Handle("/metrics", l)
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)

	b.Open(server.URL)
	b.Wait("all parts", `return document.querySelectorAll("#instances tbody tr").length > 0 && document.querySelector("#ct table") !== null;`)
	b.Script(`
		window.broken = [];
		document.addEventListener("securitypolicyviolation", (e) => window.broken.push(e.effectiveDirective));`, nil)
	if *screenshots != "" {
		b.Screenshot(filepath.Join(*screenshots, "hostile"))
	}
	var got struct {
		Pwned, Trust, Title string
		Markup, Rows        int
		Outside             []string
		Text                map[string]bool
		Longest             int
	}
	b.Script(`
		const words = ["app", "instance", "count", "domain", "port", "error", "member", "url", "source", "code", "why", "log", "logerror", "name", "key", "unready", "id", "uuid", "trust", "tunnel"];
		const values = [...document.querySelectorAll("bdi")].map((e) => e.textContent);
		return {
			Pwned: String(window.pwned), Trust: getComputedStyle(document.getElementById("trust")).display + " " + document.getElementById("trust").textContent, Title: document.title,
			Markup: document.querySelectorAll("main img, main script, main a, main b, main iframe").length,
			Rows: document.querySelectorAll("#instances tbody tr").length,
			Outside: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith(location.origin + "/")),
			Text: Object.fromEntries(words.map((w) => [w, values.some((v) => v.includes("<img src=x onerror=\"window.pwned='" + w + "'\">"))])),
			Longest: Math.max(...values.map((v) => v.length)),
		};`, &got)
	if got.Pwned != "undefined" || got.Markup != 0 || len(got.Outside) != 0 {
		t.Errorf("%+v", got)
	}
	for where, shown := range got.Text {
		if !shown {
			t.Errorf("the page does not show the text of %s", where)
		}
	}
	if got.Rows != 500 || got.Longest > 301 {
		t.Errorf("%d rows, %d characters", got.Rows, got.Longest)
	}
	// What is no known trust is no trust.
	if !strings.HasPrefix(got.Trust, "block DEVELOPMENT TRUST") || !strings.HasPrefix(got.Title, "[development] ") {
		t.Errorf("%q %q", got.Trust, got.Title)
	}

	t.Run("the browser keeps script and markup out", func(t *testing.T) {
		b.T = t
		var tried struct {
			Ran, Fetched    bool
			Thrown, Blocked []string
		}
		b.Script(`
			const thrown = [];
			const s = document.createElement("script");
			try { s.textContent = "window.ran = true;"; document.head.append(s); } catch (e) { thrown.push("script"); }
			try { const i = document.createElement("p"); i.setAttribute("onclick", "window.ran = true;"); i.click(); } catch (e) { thrown.push("onclick"); }
			try { document.body.innerHTML = "<p>x</p>"; } catch (e) { thrown.push("innerHTML"); }
			try { setTimeout("window.ran = true;", 0); } catch (e) { thrown.push("setTimeout"); }
			let fetched = false;
			try { await fetch("http://127.0.0.1:9/"); fetched = true; } catch (e) { thrown.push("fetch"); }
			await new Promise((r) => setTimeout(r, 100));
			return {Ran: Boolean(window.ran), Thrown: thrown, Blocked: window.broken, Fetched: fetched};`, &tried)
		if tried.Ran || tried.Fetched || !strings.Contains(strings.Join(tried.Thrown, " "), "innerHTML") || !strings.Contains(strings.Join(tried.Blocked, " "), "connect-src") {
			t.Errorf("%+v", tried)
		}
	})

	t.Run("production is told as such, and what is missing or fails is told apart", func(t *testing.T) {
		b.T = t
		l.set("Status", object{"id": 1, "trust": "production", "authority": "public"})
		l.set("ListMembers", refusal("boom "+evil("boom")))
		l.mu.Lock()
		delete(l.answers, "CtStatus")
		l.mu.Unlock()
		b.Wait("production", `return document.getElementById("trust").hidden && document.title === "dstack gateway 1";`)
		b.Wait("the failure", `return document.querySelector("#members .warn")?.textContent.includes("boom <img");`)
		b.Wait("what it was not given", `return document.querySelector("#ct .soft")?.textContent === "this gateway was not given CtStatus";`)
	})

	t.Run("a drain is pressed twice", func(t *testing.T) {
		b.T = t
		l.set("Status", object{"id": 1, "trust": "production", "hosts": []any{object{"app_id": "a", "instance_id": evil("drain")}}})
		l.set("Drain", object{})
		b.Wait("the instance", `return document.querySelectorAll("#instances tbody tr").length === 1;`)
		b.Click("#instances button")
		b.Wait("a question", `return document.querySelector("#instances button.sure") !== null;`)
		l.mu.Lock()
		early := len(l.drained)
		l.mu.Unlock()
		b.Click("#instances button")
		b.Wait("it is done", `return document.getElementById("message").textContent.endsWith(": done.");`)
		l.mu.Lock()
		defer l.mu.Unlock()
		var body struct {
			ID string `json:"instance_id"`
			On bool
		}
		if early != 0 || len(l.drained) != 1 || json.Unmarshal([]byte(l.drained[0]), &body) != nil || body.ID != evil("drain") || !body.On {
			t.Errorf("%d, %q", early, l.drained)
		}
	})

	t.Run("a gateway that is gone is told", func(t *testing.T) {
		b.T = t
		server.CloseClientConnections()
		server.Listener.Close()
		b.Wait("the end", `return document.getElementById("fresh").className === "bad";`)
	})
}
