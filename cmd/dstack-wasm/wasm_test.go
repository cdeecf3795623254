// SPDX-License-Identifier: Apache-2.0

package main_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/cmd/dstack-wasm/page/pagetest"
	"github.com/dstack-go/dstack/internal/testkit"
)

// maxCompressed is the most that a visitor downloads, in bytes.
const maxCompressed = 2_500_000

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

func TestTheModuleIsSmallAndOpensNoConnection(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the module")
	}
	compressed, wasm := module(t, build(t))
	t.Logf("dstack.wasm: %d bytes, %d compressed", len(wasm), compressed)
	if compressed > maxCompressed {
		t.Errorf("dstack.wasm.gz has %d bytes, more than %d", compressed, maxCompressed)
	}
	cmd := exec.Command("go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm", "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	for _, never := range []string{"net/http", "os/exec", "crypto/tls", "github.com/pelletier/go-toml/v2", "google.golang.org/protobuf/proto"} {
		for _, d := range deps {
			if d == never {
				t.Errorf("the module links %s", never)
			}
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

func TestTheModuleAnswersAsTheNativeCodeToTheByte(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the module")
	}
	cases := pagetest.Cases(t)
	var questions []question
	for _, c := range cases {
		questions = append(questions, question{c.Input, c.Text, c.Options})
	}
	var answers []string
	node(t, build(t), `return input.map(ask);`, questions, &answers)
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

// Whatever JavaScript hands over, the functions answer with a string, and go on
// working afterwards.
func TestTheModuleSurvivesWhatJavaScriptHandsOver(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the module")
	}
	c := pagetest.Cases(t)[0]
	var answers map[string]string
	node(t, build(t), `
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
