// SPDX-License-Identifier: Apache-2.0

package dstack_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
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

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/sevsnp"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/verifier"
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
		Why:   "components meet in wire contracts and on the ground floor only",
		From:  []string{"kms"},
		Never: []string{"vmm", "gateway", "guest", "image", "stack", "cli", "cmd", "simtee"},
	},
	{
		Why:   "components meet in wire contracts and on the ground floor only",
		From:  []string{"gateway"},
		Never: []string{"vmm", "kms", "guest", "image", "stack", "cli", "cmd", "simtee"},
	},
	{
		Why:   "what decides where a connection goes opens no socket and runs no program",
		From:  []string{"gateway/hello", "gateway/hostname", "gateway/portpolicy", "gateway/proxyproto", "gateway/wgconfig", "gateway/route"},
		Never: []string{"net/http", "os/exec"},
	},
	{
		Why: "the ground floor knows no component",
		From: []string{"api", "prpc", "hostlink", "hostshare", "attest", "collateral", "measure", "manifest",
			"verifier", "channel", "keys", "osimage", "internal", "governance", "releaselog"},
		Never: append([]string{"stack", "cli", "cmd", "simtee", "authd"}, components...),
	},
	{
		Why:   "generated messages stand alone",
		From:  []string{"api"},
		Never: []string{"prpc", "hostlink", "hostshare", "attest", "manifest", "measure", "internal", "verifier", "."},
	},
	{
		Why:   "the verifier is pure: it opens no socket and runs no program",
		From:  []string{"verifier", "measure", "attest", "collateral", "manifest", "keys", "governance/policy"},
		Never: []string{"net/http", "os/exec"},
		Except: []string{
			"manifest/lint", "manifest/lock", "collateral/fetch", "attest/collect", "attest/collect/tdx", "attest/collect/sim",
			// Simulated platforms for tests, which need package testing.
			"attest/tdx/tdxtest", "attest/sevsnp/sevsnptest", "attest/nitro/nitrotest", "attest/cca/ccatest", "attest/tpm/tpmtest",
		},
	},
	{
		Why:   "the verifier service serves the ground floor's verdicts and knows no component",
		From:  []string{"verifyd", "cmd/dstack-verifier"},
		Never: append([]string{"stack", "cli", "simtee", "attest/collect", "os/exec"}, components...),
	},
	{
		Why:   "the webhook serves the ground floor's decisions and knows no component",
		From:  []string{"authd", "cmd/dstack-auth"},
		Never: append([]string{"stack", "cli", "simtee"}, components...),
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
		Why:    "a KMS that verifies nothing is for tests alone",
		From:   []string{"cmd", "cli", "stack", "guest", "kms", "keys", "simtee"},
		Never:  []string{"guest/keyprovider/kmstest"},
		Except: []string{"guest/keyprovider/kmstest"},
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
		// Packages named …test and testdata are of tests only.
		of := filepath.Dir(path)
		if strings.HasSuffix(path, "_test.go") || strings.HasSuffix(of, "test") || strings.Contains(of, "/testdata") ||
			!strings.HasPrefix(path, "attest/") && !strings.HasPrefix(path, "guest/") {
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
		t.Skip("builds five binaries")
	}
	dir := t.TempDir()
	for _, name := range []string{"dstack", "dstack-vmm", "dstack-guest", "dstack-verifier", "dstack-kms"} {
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
		// The verifier's tool has every vendor's root, and no other certificate; the
		// rest have none beyond.
		found := embedded(t, name, data)
		for sum, subject := range found {
			if vendorRoots[sum] == "" {
				t.Errorf("%s embeds the certificate of %q (sha256 %s), which is not on the committed list", name, subject, sum)
			}
		}
		if name == "dstack" && len(found) != len(vendorRoots) {
			t.Errorf("dstack embeds %d certificates, the committed list has %d", len(found), len(vendorRoots))
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

// vendorRoots are the certificates that release binaries may embed: SHA-256 of the
// DER form, and where the vendor publishes them.
var vendorRoots = map[string]string{
	tdx.IntelRootSHA256:    "https://certificates.trustedservices.intel.com/Intel_SGX_Provisioning_Certification_RootCA.pem",
	sevsnp.MilanRootSHA256: "https://kdsintf.amd.com/vcek/v1/Milan/cert_chain",
	sevsnp.GenoaRootSHA256: "https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain",
	sevsnp.TurinRootSHA256: "https://kdsintf.amd.com/vcek/v1/Turin/cert_chain",
	nitro.RootG1SHA256:     "https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip",
	tpm.GoogleRootSHA256:   "http://privateca-content-62d71773-0000-21da-852e-f4f5e80d7778.storage.googleapis.com/032bf9d39db4fa06aade/ca.crt",
}

// embedded returns the subjects of the certificates that a binary holds in PEM, by
// fingerprint.
func embedded(t *testing.T, name string, data []byte) map[string]string {
	found := map[string]string{}
	begin := []byte("-----BEGIN CERTIFICATE-----")
	for at := bytes.Index(data, begin); at >= 0; {
		if block, _ := pem.Decode(data[at:min(len(data), at+8192)]); block != nil {
			if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
				sum := sha256.Sum256(cert.Raw)
				found[hex.EncodeToString(sum[:])] = cert.Subject.String()
			}
		}
		next := bytes.Index(data[at+1:], begin)
		if next < 0 {
			break
		}
		at += 1 + next
	}
	return found
}

// M04: the roots that verification trusts are those of the committed list, with
// their fingerprints and the addresses where the vendors publish them.
func TestThreat_M04_TrustedRootsAreTheCommittedOnes(t *testing.T) {
	var page bytes.Buffer
	page.WriteString("# Roots of trust\n\nThe certificates that release binaries embed, and nothing else; a test holds the built\nfile against this list (`TestThreat_B14_ReleaseBinariesHoldNoDevelopmentTrust`). Arm CCA has\nno public authority: platform keys are the caller's to name. This page is generated\n(`go test -run TestThreat_M04 . -args -update-pages`).\n\n| For | Subject | SHA-256 of the DER form | Valid until | Published at |\n|---|---|---|---|---|\n")
	seen := map[string]bool{}
	for _, roots := range verifier.VendorRoots() {
		if roots.Trust != dstack.TrustProduction || len(roots.Keys) > 0 {
			t.Errorf("roots of %s have trust %s and %d bare keys", roots.TEE, roots.Trust, len(roots.Keys))
		}
		for _, ca := range roots.CA {
			sum := sha256.Sum256(ca.Raw)
			text := hex.EncodeToString(sum[:])
			seen[text] = true
			if vendorRoots[text] == "" {
				t.Errorf("root %q of %s is not on the committed list", ca.Subject, roots.TEE)
			}
			fmt.Fprintf(&page, "| %s | %s | `%s` | %s | %s |\n", roots.TEE, cell(ca.Subject.CommonName), text, ca.NotAfter.Format("2006-01-02"), vendorRoots[text])
		}
	}
	if len(seen) != len(vendorRoots) {
		t.Errorf("%d roots are trusted, the committed list has %d", len(seen), len(vendorRoots))
	}
	compare(t, "docs/roots.md", page.Bytes())
}
