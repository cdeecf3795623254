// SPDX-License-Identifier: Apache-2.0

package dstack_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/testkit"
)

// threat is one row of the catalogue of attacks. A row is proven by tests whose
// names begin with TestThreat_ and its id.
type threat struct {
	id, attack string
	open       string // what no test of ours shows yet
	hardware   string // what only TEE hardware can show
}

// threats is the catalogue, in the order of its sections.
var threats = []threat{
	{"A01", "TEE.fail: attestation keys read from the memory bus sign quotes for anything", "the threshold KMS over two vendors", ""},
	{"A02", "WireTap: attestation keys of older SGX and TDX platforms read from the memory bus", "", ""},
	{"A03", "Battering RAM, BadRAM: memory aliases after or despite boot checks", "", ""},
	{"A04", "Milan chip keys extracted by software alone", "", ""},
	{"A05", "CacheWarp, StackWarp, RMPocalypse, Heracles: SEV-SNP guests attacked through old firmware or settings", "a signed table of AMD's bulletins; the least TCB is the policy's to state", ""},
	{"A06", "TDX module: migration, partitioning and debug attributes", "", ""},
	{"A07", "Heckler, WeSee, Sigy: injected interrupts", "a test of the kernel's configuration and an injected interrupt", "the injection itself"},
	{"A08", "TDXdown, ciphertext side channels", "timing tests of signing and comparison", ""},
	{"A09", "Single stepping, page faults, performance counters", "a page that lists each class with its date", ""},
	{"A10", "GPU: relay, hot swap, debug tools, mixed devices", "attestation again on a timer, hot plug after ready", "a GPU"},
	{"B01", "Debug VM passed off as production", "", ""},
	{"B02", "Revocation not checked", "", ""},
	{"B03", "Old collateral replayed before it expires", "", ""},
	{"B04", "A TCB that is not current accepted", "", ""},
	{"B05", "Statuses and advisories converged wrongly", "", ""},
	{"B06", "Forged quoting enclave, mismatched platform or PCE", "", ""},
	{"B07", "TCB as the report says instead of as certified", "", ""},
	{"B08", "Evidence replayed", "", ""},
	{"B09", "Event log forged", "", ""},
	{"B10", "Image hash minted by the evidence itself", "", ""},
	{"B11", "No commitment to the configuration at launch", "", ""},
	{"B12", "App id taken for what runs", "", ""},
	{"B13", "Environment variable turns quotes into fakes", "", ""},
	{"B14", "Simulated TEE in production", "", ""},
	{"B15", "Bombs in evidence", "", ""},
	{"B16", "Fields run together without lengths", "", ""},
	{"B17", "Hashes of other lengths padded", "", ""},
	{"B18", "TCB status made up for platforms that tell none", "", ""},
	{"B19", "Evidence of one platform judged by another's rules", "", ""},
	{"B20", "Quotes over bytes of an app's choice", "", ""},
	{"C01", "Evidence relayed to another connection", "a model of the protocol, checked by machine", ""},
	{"C02", "Same measurement, another machine", "", ""},
	{"C03", "One connection verified, another one used", "", ""},
	{"C04", "Certificate authorities instead of attestation", "", ""},
	{"C05", "TLS ends in the gateway", "a verdict that names a gateway where TLS ends there", ""},
	{"C06", "Browsers cannot see the connection", "body encryption to an attested key, a release log of the page", ""},
	{"C07", "Certificate issued to somebody else", "", ""},
	{"D01", "ACPI tables of the host run code in the guest", "the kernel's AML sandbox", "the write to private memory"},
	{"D02", "Firmware that trusts the VMM", "our own firmware", ""},
	{"D03", "VM started without a TEE", "", ""},
	{"D04", "Command line switches security off", "a test by name", ""},
	{"D05", "Tricks with the shared folder", "a test by name", ""},
	{"D06", "Unmeasured configuration", "a test by name", ""},
	{"D07", "Environment loaded after measurement", "", ""},
	{"D08", "Back doors in the image", "a test by name", ""},
	{"D09", "Injected devices", "hot plug after boot", ""},
	{"D10", "Entropy of the host's choice", "a test with two VMs of one snapshot", ""},
	{"D11", "Older image started", "", ""},
	{"D12", "Development image allowed by mistake", "", ""},
	{"D13", "Shape of the VM changes registers", "", ""},
	{"E01", "LUKS header exchanged", "", ""},
	{"E02", "Header changed between check and use", "", ""},
	{"E03", "Disk rolled back", "freshness of the disk as a whole, for which something outside must remember", ""},
	{"E04", "Blocks changed or moved", "", ""},
	{"E05", "Disks swapped between apps", "", ""},
	{"E06", "Secrets in process lists and files", "", ""},
	{"E07", "Swap, core dumps, journals", "", ""},
	{"E08", "Read-only volumes changed", "", ""},
	{"F01", "Clock of the host", "", ""},
	{"F02", "VM frozen for months", "leases: a gap is noticed and said, and nothing is locked because of it yet", ""},
	{"F03", "Verification at the attacker's time", "", ""},
	{"G01", "One root key", "the threshold KMS", ""},
	{"G02", "Keys that cannot be rotated", "guests that use the epochs that a KMS gives", ""},
	{"G03", "Chain view manipulated", "a light client of the consensus, in place of endpoints that agree", ""},
	{"G04", "Authorisation over unsigned HTTP", "", ""},
	{"G05", "Revocation does not reach running instances", "", ""},
	{"G06", "Owner's key stolen", "", ""},
	{"G07", "Bugs in contracts", "a second reader of the contracts' sources", ""},
	{"G08", "Development switches in production", "", ""},
	{"G09", "Bootstrap open to anyone", "", ""},
	{"G10", "Key releases leave no trace", "", ""},
	{"G11", "Path traversal, unsafe downloads", "", ""},
	{"G12", "Environment encrypted to another key", "", ""},
	{"G13", "One key for two algorithms", "", ""},
	{"G14", "Threshold epochs rolled back or forked", "the threshold KMS", ""},
	{"J01", "Image tags change", "", ""},
	{"J02", "Engine features replace what runs", "", ""},
	{"J03", "Encrypted environment replaced", "", ""},
	{"J04", "Containers before the gates", "", ""},
	{"J05", "Logs open by default", "", ""},
	{"J06", "One trust domain for all containers", "", ""},
	{"J07", "Scripts of an upgrade leak keys", "", ""},
	{"J08", "Secrets in the compose file", "a test by name", ""},
	{"J09", "Restarts as an oracle", "the KMS", ""},
	{"K01", "Routes taken over", "", ""},
	{"K02", "Replicated state corrupted", "", ""},
	{"K03", "Certificate's word before live attestation", "", ""},
	{"K04", "Routing flags of the client's choice", "", ""},
	{"K05", "Packets before attestation", "", ""},
	{"K06", "Mesh between instances", "a mesh: there is the way through gateways alone", ""},
	{"K07", "DNS of the host", "", ""},
	{"K08", "Floods", "another app's p99 beside 2,000 new connections a second, which two cores do not hold (docs/figures.md)", ""},
	{"K09", "Request smuggling", "", ""},
	{"K10", "DNS and ACME credentials stolen", "", ""},
	{"K11", "Certificate authority fails", "a test of renewal in the window that the authority names (ARI)", ""},
	{"K12", "Guest reaches the host's network", "", ""},
	{"L01", "VMM API open", "tokens and roles", ""},
	{"L02", "Injection into QEMU's arguments", "a test by name", ""},
	{"L03", "Escapes in logs", "a test by name", ""},
	{"L04", "One tenant exhausts the host", "quotas", ""},
	{"L05", "Two instances with one disk", "the KMS's lease", ""},
	{"L06", "Dashboard of the host lies", "the console", ""},
	{"M01", "Image that nobody can rebuild", "a second builder's hash", ""},
	{"M02", "Different releases for different people", "a release log", ""},
	{"M03", "Too many dependencies", "vulnerability data, which cannot be fetched everywhere", ""},
	{"M04", "Roots of trust without origin", "", ""},
	{"M05", "Verification without a policy", "", ""},
	{"M06", "Compose hashes differ between languages", "other languages' SDKs", ""},
	{"M07", "Versions mixed in an upgrade", "an old guest against a new KMS", ""},
}

var sections = map[byte]string{
	'A': "Hardware and platform", 'B': "Evidence", 'C': "Channels", 'D': "Boot and firmware", 'E': "Storage", 'F': "Time",
	'G': "Keys and governance", 'J': "Application", 'K': "Gateway and network", 'L': "Host", 'M': "Supply chain and use",
}

var threatTest = regexp.MustCompile(`(?m)^func (TestThreat_([A-M][0-9]{2})_[A-Za-z0-9_]+)\(`)

// docs/threats.md says of each attack which tests prove the defence, and what is
// open.
func TestThreatsPage(t *testing.T) {
	proof := map[string][]string{}
	goFiles(t, func(path string, src []byte) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, m := range threatTest.FindAllStringSubmatch(string(src), -1) {
			proof[m[2]] = append(proof[m[2]], fmt.Sprintf("%s (%s)", m[1], filepath.ToSlash(filepath.Dir(path))))
		}
	})
	var page bytes.Buffer
	page.WriteString("# Attacks, and the tests that prove the defence\n\nGenerated from the tests' names (`go test -run TestThreatsPage . -args -update-pages`). *Proven*:\neach named test attempts the attack and asserts the refusal and its reason. *Partly*: so, and\nwhat is named is open. *Needs hardware*: what a TEE alone can show.\n")
	count := map[string]int{}
	section := byte(0)
	for _, th := range threats {
		if th.id[0] != section {
			section = th.id[0]
			fmt.Fprintf(&page, "\n## %s\n\n| | Attack | State | Tests | Open |\n|---|---|---|---|---|\n", sections[section])
		}
		tests := slices.Sorted(slices.Values(proof[th.id]))
		state := "open"
		switch {
		case len(tests) > 0 && th.open == "" && th.hardware == "":
			state = "proven"
		case len(tests) > 0:
			state = "partly"
		case th.hardware != "" && th.open == "":
			state = "needs hardware"
		}
		count[state]++
		open := th.open
		if th.hardware != "" {
			open = strings.TrimPrefix(open+"; on hardware: "+th.hardware, "; ")
		}
		fmt.Fprintf(&page, "| %s | %s | %s | %s | %s |\n", th.id, cell(th.attack), state, cell(strings.Join(tests, ", ")), cell(open))
		if state == "open" && open == "" {
			t.Errorf("%s has neither a test nor a word on what is open", th.id)
		}
		delete(proof, th.id)
	}
	for id, tests := range proof {
		t.Errorf("%v are named after %s, which is no row", tests, id)
	}
	fmt.Fprintf(&page, "\n%d proven, %d partly, %d open, %d need hardware, of %d.\n", count["proven"], count["partly"], count["open"], count["needs hardware"], len(threats))
	compare(t, "docs/threats.md", page.Bytes())
}

// The catalogue has the rows of the specification, no more and no fewer.
func TestThreatsAreThoseOfTheSpecification(t *testing.T) {
	raw, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(testkit.VectorPath(t, "attestation/README.md"))), "..", "spec", "threats.md"))
	if err != nil {
		t.Fatal(err)
	}
	var want, have []string
	for _, m := range regexp.MustCompile(`(?m)^\| ([A-M][0-9]{2}) \|`).FindAllStringSubmatch(string(raw), -1) {
		want = append(want, m[1])
	}
	for _, th := range threats {
		have = append(have, th.id)
	}
	slices.Sort(want)
	slices.Sort(have)
	if !slices.Equal(want, have) {
		t.Errorf("rows %v, the specification has %v", have, want)
	}
}
