// SPDX-License-Identifier: Apache-2.0

package verify_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dstack-go/dstack/cmd/dstack-wasm/page"
	"github.com/dstack-go/dstack/cmd/dstack-wasm/page/pagetest"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/internal/testkit/chromium"
	"github.com/dstack-go/dstack/verifier/verifiertest"
	"github.com/dstack-go/dstack/web/verify"
)

var (
	screenshots = flag.String("screenshots", "", "save pictures of the page to this directory")
	updateSRI   = flag.Bool("update-integrity", false, "rewrite the integrity attributes of index.html")
)

// The page loads no script and style but those that it was written with.
func TestTheIntegrityOfScriptAndStyleIsThatOfTheFiles(t *testing.T) {
	index, err := verify.FS.ReadFile("index.html")
	if err != nil {
		t.Fatal(err)
	}
	want := index
	for _, name := range []string{"style.css", "verify.js"} {
		data, err := verify.FS.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha512.Sum384(data)
		attribute := regexp.MustCompile(`(="` + regexp.QuoteMeta(name) + `" integrity=")sha384-[^"]*`)
		if !attribute.Match(index) {
			t.Errorf("index.html does not pin %s", name)
		}
		want = attribute.ReplaceAll(want, []byte("${1}sha384-"+base64.StdEncoding.EncodeToString(sum[:])))
	}
	if bytes.Equal(index, want) {
		return
	}
	if *updateSRI {
		if err := os.WriteFile("index.html", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Error("index.html pins other files: run go test ./web/verify -run Integrity -update-integrity")
}

// Threat C06: the page names no other origin, and has no way to make markup of text.
func TestThreat_C06_ThePageUsesNothingOfOthers(t *testing.T) {
	others := regexp.MustCompile("(?i)(?:https?:|[\"'(=`])//[a-z0-9.-]+\\.[a-z]{2,}")
	markup := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|srcdoc`)
	index, err := verify.FS.ReadFile("index.html")
	if err != nil {
		t.Fatal(err)
	}
	const policy = `"default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; worker-src 'self'; connect-src 'self' https: http:; base-uri 'none'; form-action 'none'; trusted-types dstack; require-trusted-types-for 'script'"`
	if !bytes.Contains(index, []byte(`<meta http-equiv="Content-Security-Policy" content=`+policy)) {
		t.Error("the page has another content security policy")
	}
	entries, err := fs.ReadDir(verify.FS, ".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := verify.FS.ReadFile(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range others.FindAllString(string(data), -1) {
			if !strings.Contains(found, "example.org") {
				t.Errorf("%s names %s", e.Name(), found)
			}
		}
		if found := markup.Find(data); found != nil {
			t.Errorf("%s makes markup of text: %s", e.Name(), found)
		}
	}
}

// site builds the page as a release does and returns its directory and the module.
func site(t testing.TB) (dir string, wasm []byte) {
	t.Helper()
	dir = t.TempDir()
	if out, err := exec.Command(filepath.Join(testkit.Root(), "scripts", "web.sh"), dir).CombinedOutput(); err != nil {
		t.Fatalf("scripts/web.sh: %v\n%s", err, out)
	}
	f, err := os.Open(filepath.Join(dir, "dstack.wasm.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	if wasm, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	return dir, wasm
}

func serve(t testing.TB, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// endpoint answers as an instance does, on an origin of its own.
type endpoint struct {
	answer  func(w http.ResponseWriter, nonce []byte)
	private bool         // no page may ask
	asked   atomic.Value // the last nonce, in hexadecimal
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !e.private {
		w.Header().Set("Access-Control-Allow-Origin", "*")
	}
	if r.Method == http.MethodOptions {
		w.Header().Set("Access-Control-Allow-Methods", "POST")
		w.Header().Set("Access-Control-Allow-Headers", "Content-Type")
		w.WriteHeader(http.StatusNoContent)
		return
	}
	var ask struct{ Nonce string }
	body, _ := io.ReadAll(r.Body)
	nonce, err := []byte(nil), json.Unmarshal(body, &ask)
	if err == nil {
		nonce, err = hex.DecodeString(ask.Nonce)
	}
	if err != nil || r.Method != http.MethodPost || r.URL.Path != "/.well-known/dstack/attest" || r.Header.Get("Cookie") != "" {
		http.Error(w, "not how an instance is asked", http.StatusBadRequest)
		return
	}
	e.asked.Store(ask.Nonce)
	e.answer(w, nonce)
}

// shown is what a visitor reads.
type shown struct {
	Outcome, Code, Word, Text string
	Kind                      string // of the headline, which the style colours
	Errors                    []string
}

// visit is one use of the page.
type visit struct {
	*chromium.Browser
	t       *testing.T
	address string
}

func (v visit) fresh() {
	v.t.Helper()
	v.Open(v.address)
	v.Wait("a loaded verifier", `return document.getElementById("status").textContent === "Ready.";`)
}

func (v visit) file(id, name string, data []byte) {
	v.t.Helper()
	path := filepath.Join(v.t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		v.t.Fatal(err)
	}
	v.open1(id)
	v.Keys("#"+id, path)
}

// field fills one in.
func (v visit) field(id, text string) {
	v.t.Helper()
	v.open1(id)
	v.Keys("#"+id, text)
}

// open1 unfolds what hides a field.
func (v visit) open1(id string) {
	v.t.Helper()
	v.Script(`document.getElementById(arguments[0]).closest("details")?.setAttribute("open", "");`, nil, id)
}

func (v visit) paste(text string) {
	v.t.Helper()
	v.Click("input[name=source][value=report]")
	v.Script(`document.getElementById("report").value = arguments[0];`, nil, text)
}

func (v visit) verify() shown {
	v.t.Helper()
	v.Click("#verify")
	v.Wait("an outcome", `return document.getElementById("result").dataset.outcome;`)
	var s shown
	v.Script(`
		const r = document.getElementById("result");
		return {
			Outcome: r.dataset.outcome, Code: r.dataset.code, Word: r.querySelector("h2").textContent, Text: r.textContent,
			Kind: r.querySelector(".outcome").className,
			Errors: [...r.querySelectorAll(".findings .error code")].map((e) => e.textContent),
		};`, &s)
	if *screenshots != "" {
		name := strings.NewReplacer(" ", "-", "/", "-").Replace(strings.SplitN(v.t.Name(), "/", 2)[1])
		v.Screenshot(filepath.Join(*screenshots, name))
	}
	return s
}

func (s shown) check(t *testing.T, outcome, word string, errors ...string) {
	t.Helper()
	if s.Outcome != outcome || s.Word != word {
		t.Errorf("outcome %s %q, want %s %q; it shows %.600s", s.Outcome, s.Word, outcome, word, s.Text)
	}
	for _, e := range errors {
		if !slices.Contains(s.Errors, e) {
			t.Errorf("findings %v lack %s", s.Errors, e)
		}
	}
}

func (s shown) says(t *testing.T, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(s.Text, w) {
			t.Errorf("the page does not say %q but %.3000s", w, s.Text)
		}
	}
}

func TestThePageInChromium(t *testing.T) {
	b := chromium.Start(t)
	dir, wasm := site(t)
	hash := sha256.Sum256(wasm)

	files := http.StripPrefix("/some/path", http.FileServer(http.Dir(dir)))
	origin := serve(t, files)
	i := verifiertest.New(t, "hello")
	good := &endpoint{answer: func(w http.ResponseWriter, nonce []byte) {
		src, err := i.Answer(nonce, false)
		if err != nil {
			t.Error(err)
		}
		json.NewEncoder(w).Encode(src)
	}}
	instance := serve(t, good)
	at := verifiertest.At.Format(time.RFC3339)

	visit{b, t, origin + "/some/path/"}.fresh() // or there is nothing to test

	run := func(name string, f func(t *testing.T, v visit)) {
		t.Run(name, func(t *testing.T) {
			old := b.T
			b.T = t
			defer func() { b.T = old }()
			v := visit{b, t, origin + "/some/path/"}
			v.fresh()
			f(t, v)
		})
	}
	// expecting fills in what a caller knows who expects this instance.
	expecting := func(v visit) {
		v.field("url", instance)
		v.file("lock", "dstack.lock.json", i.Lock())
		v.file("dev_roots", "roots.json", i.DevRoots())
		v.field("at", at)
	}
	from := func(v visit, h http.Handler) {
		v.Script(`document.getElementById("url").value = arguments[0];`, nil, serve(v.t, h))
	}

	run("what was expected is accepted, as development", func(t *testing.T, v visit) {
		expecting(v)
		v.field("compose_hash", i.ComposeHash().String())
		s := v.verify()
		s.check(t, "accepted", "Accepted, for development only")
		nonce, _ := good.asked.Load().(string)
		s.says(t, nonce, "answers the nonce of this question", "proves nothing about hardware", "not checked: a browser cannot",
			i.ComposeHash().String(), i.AppID.String(), "hello", hex.EncodeToString(hash[:]), "the guest's own word", at)
		if len(nonce) != 64 || strings.Contains(s.Kind, "accepted") || !strings.Contains(s.Kind, "limited") {
			t.Errorf("nonce %q, shown as %q", nonce, s.Kind)
		}
		again := v.verify()
		again.check(t, "accepted", "Accepted, for development only")
		if second, _ := good.asked.Load().(string); second == nonce {
			t.Errorf("two questions have the nonce %s", nonce)
		}
	})
	run("another compose hash is refused", func(t *testing.T, v visit) {
		expecting(v)
		v.field("compose_hash", strings.Repeat("ab", 32))
		s := v.verify()
		s.check(t, "refused", "Refused", "compose_hash_mismatch")
	})
	run("an expectation that is no hash is no verdict", func(t *testing.T, v visit) {
		expecting(v)
		v.field("compose_hash", "abc")
		s := v.verify()
		s.check(t, "error", "Not verified")
		if s.Code != "options_malformed" {
			t.Errorf("code %q", s.Code)
		}
	})
	run("without an expectation nothing is accepted, and the fix leads to the field", func(t *testing.T, v visit) {
		v.field("url", instance)
		v.file("dev_roots", "roots.json", i.DevRoots())
		v.field("at", at)
		s := v.verify()
		s.check(t, "refused", "Refused", "workload_not_specified")
		v.Click(".findings .error button.link")
		var focus string
		v.Script(`return document.activeElement.id;`, &focus)
		if focus != "compose_hash" {
			t.Errorf("the fix leads to %q", focus)
		}
	})
	run("an answer for another nonce is refused", func(t *testing.T, v visit) {
		expecting(v)
		old, err := i.Answer(pagetest.Nonce, false)
		if err != nil {
			t.Fatal(err)
		}
		from(v, &endpoint{answer: func(w http.ResponseWriter, _ []byte) { json.NewEncoder(w).Encode(old) }})
		s := v.verify()
		s.check(t, "refused", "Refused", "nonce_mismatch")
	})
	run("an old quote under a new nonce is refused", func(t *testing.T, v visit) {
		expecting(v)
		old, err := i.Answer(pagetest.Nonce, false)
		if err != nil {
			t.Fatal(err)
		}
		from(v, &endpoint{answer: func(w http.ResponseWriter, nonce []byte) {
			src := old
			src.Nonce = nonce
			json.NewEncoder(w).Encode(src)
		}})
		s := v.verify()
		s.check(t, "refused", "Refused", "report_data_mismatch")
	})
	run("an answer to no nonce is refused", func(t *testing.T, v visit) {
		expecting(v)
		from(v, &endpoint{answer: func(w http.ResponseWriter, nonce []byte) {
			src, err := i.Answer(nonce, false)
			if err != nil {
				t.Error(err)
			}
			json.NewEncoder(w).Encode(map[string]string{"attestation": hex.EncodeToString(src.Container)})
		}})
		s := v.verify()
		s.check(t, "refused", "Refused", "freshness_none")
	})
	run("a root that nobody trusts is refused", func(t *testing.T, v visit) {
		v.field("url", instance)
		v.file("lock", "dstack.lock.json", i.Lock())
		v.field("at", at)
		bundle, err := json.Marshal(i.Collateral())
		if err != nil {
			t.Fatal(err)
		}
		v.file("collateral", "bundle.json", bundle)
		s := v.verify()
		s.check(t, "refused", "Refused", "unknown_root")
	})
	run("what is no evidence is refused", func(t *testing.T, v visit) {
		expecting(v)
		from(v, &endpoint{answer: func(w http.ResponseWriter, _ []byte) { io.WriteString(w, `{"hello":1}`) }})
		s := v.verify()
		s.check(t, "refused", "Refused", "evidence_unknown")
	})
	run("an endless answer is cut off", func(t *testing.T, v visit) {
		expecting(v)
		from(v, &endpoint{answer: func(w http.ResponseWriter, _ []byte) {
			part := bytes.Repeat([]byte{'0'}, 1<<20)
			for range 64 {
				if _, err := w.Write(part); err != nil {
					return
				}
			}
			t.Error("the page read 64 MiB")
		}})
		if s := v.verify(); s.Outcome != "error" || s.Code != "evidence_too_large" {
			t.Errorf("%+v", s)
		}
	})
	run("a file that is too large is not read", func(t *testing.T, v visit) {
		v.Click("input[name=source][value=report]")
		v.file("report-file", "huge.bin", make([]byte, 17<<20))
		if s := v.verify(); s.Outcome != "error" || s.Code != "evidence_too_large" {
			t.Errorf("%+v", s)
		}
	})
	run("an instance that declines is quoted, not obeyed", func(t *testing.T, v visit) {
		expecting(v)
		from(v, &endpoint{answer: func(w http.ResponseWriter, _ []byte) {
			w.WriteHeader(http.StatusTooManyRequests)
			json.NewEncoder(w).Encode(map[string]string{
				"error": `<img src=x onerror="window.pwned=1">` + "\u202eevil\x1b", "code": "<b>evidence_rate_limited", "fix": `<a href="javascript:window.pwned=1">click</a>`,
			})
		}})
		s := v.verify()
		s.check(t, "error", "Not verified")
		s.says(t, "declined with status 429", `<img src=x onerror="window.pwned=1">`, "\uFFFDevil\uFFFD", "ask again in a while")
		if strings.Contains(s.Text, "javascript:") {
			t.Error("an instance's advice is shown as this page's")
		}
		var markup bool
		v.Script(`return window.pwned !== undefined || document.querySelector("#result img, #result a, #result b") !== null;`, &markup)
		if markup || s.Code != "evidence_refused" {
			t.Errorf("text of an instance became markup, code %q", s.Code)
		}
	})
	run("an endpoint that is closed to pages, or moves, cannot be asked", func(t *testing.T, v visit) {
		expecting(v)
		from(v, &endpoint{private: true, answer: good.answer})
		if s := v.verify(); s.Outcome != "error" || s.Code != "evidence_unreachable" {
			t.Errorf("closed: %+v", s)
		}
		from(v, &endpoint{answer: func(w http.ResponseWriter, _ []byte) {
			w.Header().Set("Location", instance+"/.well-known/dstack/attest")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}})
		if s := v.verify(); s.Outcome != "error" || s.Code != "evidence_unreachable" {
			t.Errorf("redirect: %+v", s)
		}
		for _, bad := range []string{"ftp://x", "https://a:b@c", "https://x/?q=1", "::"} {
			v.Script(`document.getElementById("url").value = arguments[0];`, nil, bad)
			if s := v.verify(); s.Outcome != "error" || s.Code != "evidence_url" {
				t.Errorf("%s: %+v", bad, s)
			}
		}
	})
	run("saved evidence is accepted, and may be old", func(t *testing.T, v visit) {
		src, err := i.Answer(pagetest.Nonce, true)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(src)
		if err != nil {
			t.Fatal(err)
		}
		expecting(v)
		v.paste(string(raw))
		s := v.verify()
		s.check(t, "accepted", "Accepted, for development only")
		key := sha256.Sum256(i.SPKI)
		s.says(t, "unknown: the evidence may be old", hex.EncodeToString(key[:]))
	})
	run("the signature of a real quote holds", func(t *testing.T, v visit) {
		quote, collateral, ok := pagetest.RealQuote(t)
		if !ok {
			t.Skip("SKIP: no shared vectors")
		}
		v.paste(hex.EncodeToString(quote))
		v.file("collateral", "collateral.json", collateral)
		v.Script(`document.getElementById("policy").value = "signature-only";`, nil)
		v.field("at", pagetest.VectorAt)
		s := v.verify()
		s.check(t, "accepted", "Signature holds")
		s.says(t, "What runs was not", "Intel SGX Root CA", "UpToDate", "b0c06f000000")
		if !strings.Contains(s.Kind, "limited") {
			t.Errorf("shown as %q", s.Kind)
		}
		quote[200] ^= 1
		v.paste(hex.EncodeToString(quote))
		s = v.verify()
		s.check(t, "refused", "Refused", "quote_signature")
	})
	run("a verdict is undecided without collateral", func(t *testing.T, v visit) {
		quote, _, ok := pagetest.RealQuote(t)
		if !ok {
			t.Skip("SKIP: no shared vectors")
		}
		v.paste(base64.StdEncoding.EncodeToString(quote))
		v.Script(`document.getElementById("policy").value = "signature-only";`, nil)
		s := v.verify()
		s.check(t, "undecided", "Undecided", "collateral_missing")
	})
	run("the page shows what it is", func(t *testing.T, v visit) {
		var text, origins string
		v.Script(`return document.getElementById("page-hash").textContent;`, &text)
		v.Script(`return document.getElementById("page-origin").textContent;`, &origins)
		if text != hex.EncodeToString(hash[:]) || origins != origin {
			t.Errorf("hash %s, origin %s", text, origins)
		}
	})
	run("the browser enforces the page's policy", func(t *testing.T, v visit) {
		var got map[string]string
		v.Script(`
			// In a task of its own: WebDriver lifts the policy for the script that it runs.
			const attempt = (f) => new Promise((resolve) => setTimeout(() => { try { f(); resolve("allowed"); } catch (e) { resolve(e.name); } }));
			return {
				markup: await attempt(() => { document.body.innerHTML = "<b>x</b>"; }),
				evaluate: await attempt(() => Function("return 1")()),
				policy: await attempt(() => trustedTypes.createPolicy("another", {})),
				worker: await attempt(() => new Worker("other.js")),
			};`, &got)
		for what, name := range got {
			if name == "allowed" {
				t.Errorf("%s: %s", what, name)
			}
		}
	})
	run("every field has a label, and keys suffice", func(t *testing.T, v visit) {
		var unlabelled []string
		v.Script(`return [...document.querySelectorAll("input, select, textarea, button")].filter((e) => e.labels?.length === 0 && !e.textContent).map((e) => e.id);`, &unlabelled)
		if len(unlabelled) > 0 {
			t.Errorf("no label: %v", unlabelled)
		}
		v.field("url", instance+"\ue007") // Enter
		v.Wait("an outcome", `return document.getElementById("result").dataset.outcome;`)
		var focus string
		v.Script(`return document.activeElement.tagName;`, &focus)
		if focus != "H2" {
			t.Errorf("after an answer the focus is on %s", focus)
		}
	})

	t.Run("a verifier that is missing or broken is no verdict", func(t *testing.T) {
		old := b.T
		b.T = t
		defer func() { b.T = old }()
		for _, c := range []struct {
			code string
			h    http.HandlerFunc
		}{
			{"verifier_missing", http.NotFound},
			{"verifier_failed", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "no module") }},
		} {
			mux := http.NewServeMux()
			mux.Handle("/", http.FileServer(http.Dir(dir)))
			mux.Handle("/dstack.wasm.gz", c.h)
			v := visit{b, t, serve(t, mux)}
			v.Open(v.address)
			v.Wait("a word on the verifier", `return document.getElementById("result").dataset.outcome;`)
			v.field("url", instance)
			if s := v.verify(); s.Outcome != "error" || s.Code != c.code {
				t.Errorf("%+v, want %s", s, c.code)
			}
		}
	})

	// Threat F03: the server of the page tells a later time than the browser's clock.
	late := time.Now().AddDate(4, 0, 0).UTC().Truncate(time.Second)
	ahead := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", late.Format(http.TimeFormat))
		http.FileServer(http.Dir(dir)).ServeHTTP(w, r)
	}))
	t.Run("TestThreat_F03 the later of two clocks counts, from any path", func(t *testing.T) {
		old := b.T
		b.T = t
		defer func() { b.T = old }()
		v := visit{b, t, ahead + "/index.html"}
		v.fresh()
		v.field("url", instance)
		v.file("dev_roots", "roots.json", i.DevRoots())
		v.file("lock", "dstack.lock.json", i.Lock())
		s := v.verify()
		s.check(t, "refused", "Refused", "crl_expired")
		s.says(t, fmt.Sprintf("%d-", late.Year()), "the later of your browser's clock and the clock of this page's server")
	})

	// The browser and the server read the same bytes alike.
	t.Run("Chromium answers as the native code to the byte", func(t *testing.T) {
		bare(t, b, dir)
		for _, c := range pagetest.Cases(t) {
			var answer string
			b.Script(`return ask(...arguments);`, &answer, base64.StdEncoding.EncodeToString(c.Input), c.Text, c.Options)
			c.Check(t, []byte(answer))
			if native := c.Native(); answer != string(native) {
				t.Errorf("%s: Chromium says\n%s\nthe native code\n%s", c.Name, answer, native)
			}
		}
	})
}

// bare is a page without policy that has the module's functions.
func bare(t testing.TB, b *chromium.Browser, dir string) {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle("/", http.FileServer(http.Dir(dir)))
	mux.HandleFunc("/bare", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `<!doctype html><title>bare</title><script src="wasm_exec.js"></script>`)
	})
	b.Open(serve(t, mux) + "/bare")
	b.Script(`
		const stream = (await fetch("dstack.wasm.gz")).body.pipeThrough(new DecompressionStream("gzip"));
		const go = new Go();
		const { instance } = await WebAssembly.instantiate(await new Response(stream).arrayBuffer(), go.importObject);
		go.run(instance);
		window.ask = (input, text, options) => {
			const b = Uint8Array.from(atob(input), (c) => c.charCodeAt(0));
			return dstackVerify(text ? new TextDecoder().decode(b) : b, options);
		};`, nil)
}

// BenchmarkVerify verifies a real TDX quote with its collateral, warm, in Chromium
// and natively in one run. ms/median is the middle of at least 50 verifications.
func BenchmarkVerify(b *testing.B) {
	quote, collateral, ok := pagetest.RealQuote(b)
	if !ok {
		b.Skip("SKIP: no shared vectors")
	}
	options, err := json.Marshal(map[string]any{"policy": "signature-only", "at": pagetest.VectorAt, "collateral": json.RawMessage(collateral)})
	if err != nil {
		b.Fatal(err)
	}
	median := func(b *testing.B, ms []float64) {
		slices.Sort(ms)
		b.ReportMetric(ms[len(ms)/2], "ms/median")
		b.ReportMetric(ms[0], "ms/least")
	}
	b.Run("native", func(b *testing.B) {
		b.ReportAllocs()
		var ms []float64
		for b.Loop() {
			start := time.Now()
			page.Verify(quote, options, time.Time{})
			ms = append(ms, float64(time.Since(start).Microseconds())/1000)
		}
		median(b, ms)
	})
	b.Run("chromium", func(b *testing.B) {
		c := chromium.Start(b)
		dir, _ := site(b)
		bare(b, c, dir)
		const measure = `
			const out = [];
			for (let i = 0; i < arguments[2]; i++) {
				const start = performance.now();
				ask(arguments[0], false, arguments[1]);
				out.push(performance.now() - start);
			}
			return out;`
		input := base64.StdEncoding.EncodeToString(quote)
		c.Script(measure, nil, input, string(options), 20)
		b.ResetTimer()
		var ms []float64
		c.Script(measure, &ms, input, string(options), max(b.N, 50))
		b.StopTimer()
		b.ReportMetric(0, "ns/op")
		median(b, ms)
	})
}
