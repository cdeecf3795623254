// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/cmd/dstack-wasm/page/pagetest"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/verifier"
)

// maxCompressed is the most that a visitor downloads, in bytes.
const maxCompressed = 2_600_000

// build makes the page's directory as a release does.
func build(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command(filepath.Join(testkit.Root(), "scripts", "web.sh"), dir).CombinedOutput()
	if err != nil {
		t.Fatalf("scripts/web.sh: %v\n%s", err, out)
	}
	return dir
}

func module(t testing.TB, dir string) (compressed int, wasm []byte) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(dir, "dstack.wasm.gz"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	if wasm, err = io.ReadAll(r); err != nil {
		t.Fatal(err)
	}
	return len(raw), wasm
}

// TestModule builds the module once, as a release does, and looks at it and asks it.
func TestModule(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the module")
	}
	dir := build(t)
	compressed, wasm := module(t, dir)
	t.Run("is small", func(t *testing.T) {
		t.Logf("dstack.wasm: %d bytes, %d compressed", len(wasm), compressed)
		if compressed > maxCompressed {
			t.Errorf("dstack.wasm.gz has %d bytes, more than %d", compressed, maxCompressed)
		}
	})
	t.Run("is the same when it is built again", func(t *testing.T) {
		if _, again := module(t, build(t)); !bytes.Equal(wasm, again) {
			t.Error("two builds of one source differ, so that nobody can compare hashes")
		}
	})
	t.Run("answers as the native code to the byte", func(t *testing.T) { answersAsNative(t, dir) })
	t.Run("survives what JavaScript hands over", func(t *testing.T) { survives(t, dir) })
	t.Run("trusts the vendors alone", func(t *testing.T) { trustsVendors(t, wasm) })
}

// Threat B15, M03: the module has no network, no processes and no parser that it
// does not need.
func TestThreat_M03_TheModuleLinksLittle(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm", "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	allowed := []string{"github.com/dstack-go/", "golang.org/x/crypto", "golang.org/x/sys/cpu", "github.com/fxamacker/cbor/v2", "github.com/x448/float16",
		"go.yaml.in/yaml/v4"} // reads compose files as compose does, for what could change what runs
	never := []string{"net/http", "os/exec", "crypto/tls", "testing", "html/template"}
	for _, d := range strings.Fields(string(out)) {
		if slices.Contains(never, d) || strings.HasPrefix(d, "github.com/dstack-go/") && strings.HasSuffix(d, "test") && !strings.HasSuffix(d, "/attest") {
			t.Errorf("the module links %s", d)
		}
		if strings.Contains(strings.Split(d, "/")[0], ".") && !slices.ContainsFunc(allowed, func(p string) bool { return strings.HasPrefix(d, p) }) {
			t.Errorf("the module links %s, which is not among what it may", d)
		}
	}
}

// trustsVendors holds that the certificates in the module are exactly the vendors'
// roots that the verifier names, byte for byte (threats.md B14, M04).
func trustsVendors(t *testing.T, wasm []byte) {
	want := map[[32]byte]string{}
	for _, r := range verifier.VendorRoots() {
		if r.Trust != dstack.TrustProduction {
			t.Errorf("%s has roots of trust %s", r.TEE, r.Trust)
		}
		for _, c := range r.CA {
			want[sha256.Sum256(c.Raw)] = c.Subject.String()
		}
	}
	found := 0
	begin := []byte("-----BEGIN CERTIFICATE-----\n")
	for rest := wasm; ; {
		at := bytes.Index(rest, begin)
		if at < 0 {
			break
		}
		rest = rest[at:]
		block, _ := pem.Decode(rest[:min(len(rest), 16<<10)])
		rest = rest[len(begin):]
		if block == nil {
			continue // the words alone, as in a comparison
		}
		found++
		if _, ok := want[sha256.Sum256(block.Bytes)]; !ok {
			t.Errorf("the module embeds a certificate that is no vendor's root, of %d bytes", len(block.Bytes))
		}
	}
	if found == 0 || found > len(want) {
		t.Errorf("the module embeds %d certificates, the verifier names %d roots", found, len(want))
	}
	for _, word := range []string{"dstack/simtee", "tdxtest", "sevsnptest", "verifiertest"} {
		if bytes.Contains(wasm, []byte(word)) {
			t.Errorf("the module contains %s", word)
		}
	}
}

// question and the answers to it as the Node script below exchanges them.
type question struct {
	Input   []byte `json:"input"`
	Text    bool   `json:"text"`
	Options string `json:"options"`
}

// node runs a script of ours, which has ask(question) and the module's functions.
func node(t *testing.T, dir, script string, in, out any) {
	t.Helper()
	bin, err := exec.LookPath("node")
	if err != nil {
		t.Skip("SKIP: the module is not tested, there is no node on this machine")
	}
	_, wasm := module(t, dir)
	path := filepath.Join(dir, "dstack.wasm")
	if err := os.WriteFile(path, wasm, 0o600); err != nil {
		t.Fatal(err)
	}
	stdin, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-e", `
		const fs = require("fs");
		require(process.argv[1] + "/wasm_exec.js");
		const go = new Go();
		WebAssembly.instantiate(fs.readFileSync(process.argv[1] + "/dstack.wasm"), go.importObject).then(({instance}) => {
			go.run(instance);
			const input = JSON.parse(fs.readFileSync(0, "utf8"));
			const ask = (q) => {
				const b = Buffer.from(q.input || "", "base64");
				return dstackVerify(q.text ? b.toString("utf8") : new Uint8Array(b), q.options);
			};
			fs.writeSync(1, JSON.stringify((() => {`+script+`})()));
			process.exit(0);
		});
	`, dir)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("node: %v\n%s", err, stderr.Bytes())
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
		t.Fatalf("%v in %.300q, stderr %s", err, stdout.String(), stderr.Bytes())
	}
}

func answersAsNative(t *testing.T, dir string) {
	cases := pagetest.Cases(t)
	var questions []question
	for _, c := range cases {
		questions = append(questions, question{c.Input, c.Text, c.Options})
	}
	var answers []string
	node(t, dir, `return input.map(ask);`, questions, &answers)
	if len(answers) != len(cases) {
		t.Fatalf("%d answers to %d questions", len(answers), len(cases))
	}
	for i, c := range cases {
		c.Check(t, []byte(answers[i]))
		if native := c.Native(); answers[i] != string(native) {
			t.Errorf("%s: the module says\n%s\nthe native code\n%s", c.Name, answers[i], native)
		}
	}
}

// survives holds that whatever JavaScript hands over, the functions answer with a
// string, and go on working afterwards.
func survives(t *testing.T, dir string) {
	c := pagetest.Cases(t)[0]
	var answers map[string]string
	node(t, dir, `
		const cyclic = {}; cyclic.self = cyclic;
		const detached = new Uint8Array(8); structuredClone(detached.buffer, {transfer: [detached.buffer]});
		const many = {}; for (let i = 0; i < 100000; i++) many["k" + i] = i;
		return {
			none: dstackVerify(),
			number: dstackVerify(5),
			null: dstackVerify(null, null),
			object: dstackVerify({length: 1e9}),
			buffer: dstackVerify(new ArrayBuffer(4)),
			hugeBytes: dstackVerify(new Uint8Array((16 << 20) + 1)),
			hugeText: dstackVerify("0".repeat((16 << 20) + 1)),
			hugeOptions: dstackVerify("00", " ".repeat((64 << 20) + 1)),
			deepOptions: dstackVerify("00", "[".repeat(1 << 20)),
			cyclic: dstackVerify("00", cyclic),
			badOptions: dstackVerify("00", 5),
			surrogate: dstackVerify("\ud800"),
			detached: dstackVerify(detached),
			many: dstackVerify("00", many),
			requestNone: dstackRequest(),
			requestKind: dstackRequest("00", 7),
			optionsObject: dstackVerify("{}", {at: "2026-01-01T00:00:00Z"}),
			after: ask(input),
		};`, question{c.Input, c.Text, c.Options}, &answers)
	want := map[string]string{
		"none": "arguments", "number": "arguments", "null": "arguments", "object": "arguments", "buffer": "arguments",
		"hugeBytes": "evidence_too_large", "hugeText": "evidence_too_large", "hugeOptions": "options_malformed", "deepOptions": "options_malformed",
		"cyclic": "internal", "badOptions": "arguments", "surrogate": "evidence_unknown", "detached": "evidence_malformed",
		"many": "options_malformed", "requestNone": "arguments", "requestKind": "arguments", "optionsObject": "evidence_unknown",
	}
	for name, code := range want {
		if !strings.Contains(answers[name], `"code":"`+code+`"`) {
			t.Errorf("%s: %.400s, want code %s", name, answers[name], code)
		}
	}
	c.Check(t, []byte(answers["after"]))
}
