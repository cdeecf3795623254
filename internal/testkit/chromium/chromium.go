// SPDX-License-Identifier: Apache-2.0

// Package chromium drives Debian's Chromium in tests of pages, by the W3C WebDriver protocol
// (https://www.w3.org/TR/webdriver2/).
package chromium

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"
)

// Browser is one headless Chromium. A failing command ends the test.
type Browser struct {
	T    testing.TB // whom a failing command ends; subtests take turns
	base string     // of the session
}

var startedOn = regexp.MustCompile(`started successfully on port (\d+)`)

// Start starts one, or skips the test where Debian's packages chromium and
// chromium-driver are not installed.
func Start(t testing.TB) *Browser {
	t.Helper()
	driver, err := exec.LookPath("chromedriver")
	if err != nil {
		t.Skip("SKIP: the page is not tested, there is no chromedriver; scripts/host-packages.sh installs it")
	}
	binary, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("SKIP: the page is not tested, there is no chromium; scripts/host-packages.sh installs it")
	}
	profile, err := os.MkdirTemp("", "dstack-chromium-")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(driver, "--port=0")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		// The browser may still be writing to its profile when its driver is gone.
		for range 50 {
			if os.RemoveAll(profile) == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	port := ""
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if m := startedOn.FindStringSubmatch(lines.Text()); m != nil {
			port = m[1]
			break
		}
	}
	if port == "" {
		t.Fatal("chromedriver did not say its port")
	}
	go io.Copy(io.Discard, stdout)

	b := &Browser{T: t, base: "http://127.0.0.1:" + port}
	args := []string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1000,1400", "--user-data-dir=" + profile,
	}
	var session struct{ SessionID string }
	b.call("POST", "/session", map[string]any{"capabilities": map[string]any{"alwaysMatch": map[string]any{
		"browserName": "chrome", "goog:chromeOptions": map[string]any{"binary": binary, "args": args},
		"timeouts": map[string]int{"script": 60000, "pageLoad": 60000},
	}}}, &session)
	b.base += "/session/" + session.SessionID
	t.Cleanup(func() { b.call("DELETE", "", nil, nil) })
	return b
}

func (b *Browser) call(method, path string, in, out any) {
	b.T.Helper()
	if err := b.try(method, path, in, out); err != nil {
		b.T.Fatal(err)
	}
}

func (b *Browser) try(method, path string, in, out any) error {
	var body io.Reader
	if method == http.MethodPost {
		if in == nil {
			in = map[string]any{}
		}
		raw, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequest(method, b.base+path, body)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("WebDriver %s %s: %s: %.200s", method, path, resp.Status, raw)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(raw, &struct{ Value any }{out})
}

// Open goes to a page.
func (b *Browser) Open(url string) {
	b.T.Helper()
	b.call("POST", "/url", map[string]any{"url": url}, nil)
}

// find returns the path of the one element that a CSS selector finds.
func (b *Browser) find(css string) string {
	b.T.Helper()
	var e map[string]string
	b.call("POST", "/element", map[string]any{"using": "css selector", "value": css}, &e)
	return "/element/" + e["element-6066-11e4-a52e-4f735466cecf"]
}

func (b *Browser) Click(css string) {
	b.T.Helper()
	b.call("POST", b.find(css)+"/click", nil, nil)
}

// Keys types text, or chooses a file by its path.
func (b *Browser) Keys(css, text string) {
	b.T.Helper()
	b.call("POST", b.find(css)+"/value", map[string]any{"text": text}, nil)
}

// Script runs the body of a function, which may be async, with arguments.
func (b *Browser) Script(body string, out any, args ...any) {
	b.T.Helper()
	if args == nil {
		args = []any{}
	}
	b.call("POST", "/execute/async", map[string]any{
		"script": "const done = arguments[arguments.length - 1]; (async function() {" + body + "}).apply(null, arguments).then((v) => done([v]), (e) => done(['', String(e)]));", "args": args,
	}, &scriptResult{b.T, out})
}

type scriptResult struct {
	t   testing.TB
	out any
}

func (r *scriptResult) UnmarshalJSON(data []byte) error {
	var pair []json.RawMessage
	if err := json.Unmarshal(data, &pair); err != nil {
		return err
	}
	if len(pair) == 2 {
		return fmt.Errorf("the script failed: %s", pair[1])
	}
	if r.out == nil {
		return nil
	}
	return json.Unmarshal(pair[0], r.out)
}

// Wait runs a function's body until it returns something true.
func (b *Browser) Wait(what, body string) {
	b.T.Helper()
	for end := time.Now().Add(40 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		var ok bool
		b.Script("return Boolean(await (async () => {"+body+"})());", &ok)
		if ok {
			return
		}
		if time.Now().After(end) {
			b.T.Fatalf("the page did not come to: %s", what)
		}
	}
}

// Screenshot saves the page as it stands, in its full height, in light and dark.
func (b *Browser) Screenshot(path string) {
	b.T.Helper()
	var height int
	b.Script("return document.body.scrollHeight;", &height)
	b.call("POST", "/window/rect", map[string]any{"width": 1000, "height": min(height+140, 8000)}, nil)
	for _, scheme := range []string{"dark", "light"} {
		b.call("POST", "/goog/cdp/execute", map[string]any{"cmd": "Emulation.setEmulatedMedia", "params": map[string]any{
			"features": []any{map[string]string{"name": "prefers-color-scheme", "value": scheme}},
		}}, nil)
		var png string
		b.call("GET", "/screenshot", nil, &png)
		raw, err := base64.StdEncoding.DecodeString(png)
		if err != nil {
			b.T.Fatal(err)
		}
		if err := os.WriteFile(path+"-"+scheme+".png", raw, 0o644); err != nil {
			b.T.Fatal(err)
		}
	}
	b.call("POST", "/window/rect", map[string]any{"width": 1000, "height": 1400}, nil)
}
