// SPDX-License-Identifier: Apache-2.0

package dstack_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dstack-go/dstack"

// An importRule forbids the packages From (a prefix, relative to the module)
// from depending on any package of Never, directly or through others. Tests are
// not held to the rules.
type importRule struct {
	Why   string
	From  []string
	Never []string
	// Except names packages that From lists by prefix but that the rule spares.
	Except []string
}

var components = []string{"vmm", "gateway", "kms", "guest", "image"}

// The import table of the house (docs/architecture.md).
var importTable = []importRule{
	{
		Why:   "components meet in wire contracts and on the ground floor only",
		From:  []string{"vmm"},
		Never: []string{"gateway", "kms", "guest", "image", "stack", "cli", "cmd", "simtee"},
	},
	{
		Why:   "components meet in wire contracts and on the ground floor only",
		From:  []string{"guest"},
		Never: []string{"vmm", "gateway", "kms", "image", "stack", "cli", "cmd", "simtee"},
	},
	{
		Why:   "components meet in wire contracts and on the ground floor only",
		From:  []string{"image"},
		Never: []string{"vmm", "gateway", "kms", "guest", "stack", "cli", "cmd", "simtee"},
	},
	{
		Why: "the ground floor knows no component",
		From: []string{"api", "prpc", "hostlink", "hostshare", "attest", "collateral", "measure", "manifest",
			"verifier", "channel", "osimage", "internal"},
		Never: append([]string{"stack", "cli", "cmd", "simtee"}, components...),
	},
	{
		Why:   "generated messages stand alone",
		From:  []string{"api"},
		Never: []string{"prpc", "hostlink", "hostshare", "attest", "manifest", "measure", "internal", "verifier", "."},
	},
	{
		Why:   "the verifier is pure: it opens no socket and runs no program",
		From:  []string{"verifier", "measure", "attest", "collateral", "manifest"},
		Never: []string{"net/http", "os/exec"},
		Except: []string{
			"manifest/lint", "manifest/lock", "collateral/fetch", "attest/collect", "attest/collect/tdx", "attest/collect/sim",
			// Simulated platforms for tests, which need package testing.
			"attest/tdx/tdxtest", "attest/sevsnp/sevsnptest", "attest/nitro/nitrotest", "attest/cca/ccatest", "attest/tpm/tpmtest",
		},
	},
	{
		Why:    "the simulated TEE stays out of every other binary",
		From:   []string{"cmd", "cli", "stack"},
		Never:  []string{"simtee"},
		Except: []string{"cmd/dstack-simtee"},
	},
	{
		Why:   "a guest for production has no trace of the simulated TEE's driver",
		From:  []string{"cmd/dstack-guest", "cmd/dstack", "cmd/dstack-vmm"},
		Never: []string{"attest/collect/sim"}, Except: []string{"cmd/dstack-simtee"},
	},
	{
		Why:   "the vocabulary needs nothing",
		From:  []string{"."},
		Never: []string{"api", "prpc", "internal", "attest", "net"},
	},
}

type listedPackage struct {
	ImportPath string
	Deps       []string
}

func listPackages(t *testing.T) []listedPackage {
	t.Helper()
	out, err := exec.Command("go", "list", "-deps=false", "-json=ImportPath,Deps", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var list []listedPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); dec.More(); {
		var p listedPackage
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

// inside reports whether the package path lies in one of the given places,
// which are module-relative prefixes, "." for the root package alone, or paths
// of the standard library.
func inside(path string, places []string) bool {
	for _, place := range places {
		full := module + "/" + place
		switch {
		case place == ".":
			if path == module {
				return true
			}
		case path == full || strings.HasPrefix(path, full+"/"):
			return true
		case path == place:
			return true
		}
	}
	return false
}

// violations returns what in list breaks the table.
func violations(list []listedPackage, table []importRule) []string {
	var bad []string
	for _, p := range list {
		for _, rule := range table {
			if !inside(p.ImportPath, rule.From) || inside(p.ImportPath, rule.Except) {
				continue
			}
			for _, dep := range p.Deps {
				if inside(dep, rule.Never) {
					bad = append(bad, p.ImportPath+" depends on "+dep+": "+rule.Why)
				}
			}
		}
	}
	return bad
}

func TestImportTable(t *testing.T) {
	list := listPackages(t)
	if len(list) < 5 {
		t.Fatalf("go list found %d packages only", len(list))
	}
	for _, v := range violations(list, importTable) {
		t.Error(v)
	}
}

func TestImportTableCatchesTransitiveImports(t *testing.T) {
	list := []listedPackage{
		{ImportPath: module + "/vmm", Deps: []string{"net/http", module + "/guest/boot"}},
		{ImportPath: module + "/verifier", Deps: []string{"net/http"}},
		{ImportPath: module + "/cmd/dstack", Deps: []string{module + "/simtee"}},
		{ImportPath: module + "/cmd/dstack-simtee", Deps: []string{module + "/simtee"}},
	}
	if got := violations(list, importTable); len(got) != 3 {
		t.Fatalf("want 3 violations, got %d: %q", len(got), got)
	}
}

func TestPackageNames(t *testing.T) {
	for _, p := range listPackages(t) {
		if name := filepath.Base(p.ImportPath); slices.Contains([]string{"util", "utils", "helper", "helpers", "common", "misc"}, name) {
			t.Errorf("%s: a package is named after the thing it is about", p.ImportPath)
		}
	}
}

// goFiles calls visit for each Go file of the project.
func goFiles(t *testing.T, visit func(path string, src []byte)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) == ".go" {
			src, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			visit(path, src)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryFileNamesItsLicence(t *testing.T) {
	goFiles(t, func(path string, src []byte) {
		head := src[:min(len(src), 200)]
		if !bytes.Contains(head, []byte("SPDX-License-Identifier: Apache-2.0")) && !bytes.Contains(head, []byte("Code generated")) {
			t.Errorf("%s has no SPDX line", path)
		}
	})
}

// Threat C04: no client in the project may skip certificate checks, but for the
// package that replaces them by attestation.
func TestThreat_C04_OnlyChannelSkipsCertificateChecks(t *testing.T) {
	word := []byte("Insecure" + "SkipVerify:")
	goFiles(t, func(path string, src []byte) {
		if bytes.Contains(src, word) && !strings.HasPrefix(path, "channel/") && !strings.HasSuffix(path, "_test.go") {
			t.Errorf("%s sets %s", path, word)
		}
	})
}

// Threat B13: what collects evidence takes no path or switch from the environment.
func TestThreat_B13_EvidenceCollectionReadsNoEnvironment(t *testing.T) {
	words := [][]byte{[]byte("os.Get" + "env("), []byte("os.Lookup" + "Env("), []byte("os.Env" + "iron(")}
	goFiles(t, func(path string, src []byte) {
		if strings.HasSuffix(path, "_test.go") || !strings.HasPrefix(path, "attest/") && !strings.HasPrefix(path, "guest/") {
			return
		}
		for _, w := range words {
			if bytes.Contains(src, w) {
				t.Errorf("%s reads the environment (%s)", path, w)
			}
		}
	})
}

// Threat M05: no exported function of what verifies returns a bare bool for a
// verdict, and none appraises without a policy.
func TestThreat_M05_VerdictsAreNoBooleans(t *testing.T) {
	// What these functions tell is a fact about a value, not a verdict on evidence.
	facts := []string{"IsZero", "IsRuntime", "IsACPI", "Reserved", "Has", "HasTDX", "Lite", "KernelIsConstant", "IsNull", "IsText"}
	goFiles(t, func(path string, src []byte) {
		if strings.HasSuffix(path, "_test.go") || !slices.ContainsFunc([]string{"attest/", "verifier/", "channel/"}, func(p string) bool { return strings.HasPrefix(path, p) }) {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, src, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !fn.Name.IsExported() || fn.Type.Results == nil || len(fn.Type.Results.List) != 1 {
				continue
			}
			if id, ok := fn.Type.Results.List[0].Type.(*ast.Ident); ok && id.Name == "bool" && !slices.Contains(facts, fn.Name.Name) {
				t.Errorf("%s: %s returns a bare bool", path, fn.Name.Name)
			}
		}
	})
}

// Threat B14, G08: release binaries hold no simulated TEE and no roots beyond
// the vendors'. The files are built as a release builds them and searched.
func TestThreat_B14_ReleaseBinariesHoldNoDevelopmentTrust(t *testing.T) {
	if testing.Short() {
		t.Skip("builds three binaries")
	}
	dir := t.TempDir()
	for _, name := range []string{"dstack", "dstack-vmm", "dstack-guest"} {
		bin := filepath.Join(dir, name)
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", bin, "./cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
		data, err := os.ReadFile(bin)
		if err != nil {
			t.Fatal(err)
		}
		for _, word := range []string{module + "/simtee", module + "/attest/collect/sim."} {
			if bytes.Contains(data, []byte(word)) {
				t.Errorf("%s contains %s", name, word)
			}
		}
		if certs := bytes.Count(data, []byte("-----BEGIN CERTIFICATE-----\n")); certs > len(vendorRoots) {
			t.Errorf("%s embeds %d certificates, the committed list has %d", name, certs, len(vendorRoots))
		}
	}
	// The same search finds the driver in a development guest, so it can fail.
	bin := filepath.Join(dir, "dstack-guest-sim")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "dstack_sim", "-o", bin, "./cmd/dstack-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build dstack-guest with its simulated driver: %v\n%s", err, out)
	}
	if data, _ := os.ReadFile(bin); !bytes.Contains(data, []byte(module+"/attest/collect/sim.")) {
		t.Error("the search does not find the driver in a development guest")
	}
}

// vendorRoots are the certificates that release binaries may embed.
var vendorRoots = []string{"Intel SGX Root CA"}
