// SPDX-License-Identifier: Apache-2.0

package contracts

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/derive"
)

var all = []string{KMS, App, Council, Proxy}

// The limit of EIP-170.
const maxCode = 24_576

type parameter struct {
	Name       string
	Type       string
	Indexed    bool
	Components []parameter
}

type entry struct {
	Type    string
	Name    string
	Inputs  []parameter
	Outputs []parameter
}

func (p parameter) canonical() string {
	rest, tuple := strings.CutPrefix(p.Type, "tuple")
	if !tuple {
		return p.Type
	}
	return "(" + types(p.Components) + ")" + rest
}

func types(list []parameter) string {
	var names []string
	for _, p := range list {
		names = append(names, p.canonical())
	}
	return strings.Join(names, ",")
}

func (e entry) signature() string { return e.Name + "(" + types(e.Inputs) + ")" }

func keccak(text string) []byte { return derive.Keccak256([]byte(text)) }

func load(t *testing.T, name string) (*Artefact, []entry) {
	t.Helper()
	a, err := Load(name)
	if err != nil {
		t.Fatal(err)
	}
	var entries []entry
	if err := json.Unmarshal(a.ABI, &entries); err != nil {
		t.Fatal(err)
	}
	return a, entries
}

func TestContractsFitOnAChain(t *testing.T) {
	for _, name := range all {
		a, entries := load(t, name)
		if a.Name != name || len(entries) == 0 || len(a.Bytecode) <= len(a.DeployedBytecode) {
			t.Errorf("%s: the artefact is not whole", name)
		}
		if len(a.DeployedBytecode) == 0 || len(a.DeployedBytecode) > maxCode {
			t.Errorf("%s is %d bytes, want 1 to %d", name, len(a.DeployedBytecode), maxCode)
		}
		for _, s := range a.Immutables {
			if s.Start < 0 || s.Start+s.Length > len(a.DeployedBytecode) ||
				!bytes.Equal(a.DeployedBytecode[s.Start:s.Start+s.Length], make([]byte, s.Length)) {
				t.Errorf("%s: no place for an immutable at %+v", name, s)
			}
		}
	}
}

// The sources changed and scripts/contracts.sh was not run.
func TestArtefactsAreOfTheseSources(t *testing.T) {
	data, err := os.ReadFile("sources.sha256")
	if err != nil {
		t.Fatal(err)
	}
	listed := 0
	for line := range strings.Lines(string(data)) {
		sum, file, _ := strings.Cut(strings.TrimSpace(line), "  ")
		src, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sha256.Sum256(src)); got != sum {
			t.Errorf("%s is not what the artefacts were made from: run scripts/contracts.sh", file)
		}
		if strings.HasPrefix(file, "src/") {
			listed++
		}
	}
	if have := len(sources(t)); listed != have {
		t.Errorf("the artefacts were made from %d sources, and there are %d", listed, have)
	}
}

func TestUnknownContractIsAnError(t *testing.T) {
	if _, err := Load("Nothing"); err == nil {
		t.Error("a contract that is not there was loaded")
	}
	var c Code
	for _, text := range []string{"00", "0x0", "0xzz"} {
		if err := c.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("code %q was read", text)
		}
	}
}

// TestInterfaceIsUpstreams compares every selector, topic and id of the vectors with
// what the committed interfaces have.
func TestInterfaceIsUpstreams(t *testing.T) {
	data := testkit.Vectors(t, "kms/contract-ids.txt")
	have := map[string]bool{}
	for _, name := range all {
		_, entries := load(t, name)
		for _, e := range entries {
			switch e.Type {
			case "function", "error":
				have[fmt.Sprintf("S 0x%x %s", keccak(e.signature())[:4], e.signature())] = true
			case "event":
				have[fmt.Sprintf("E 0x%x %s", keccak(e.signature()), e.signature())] = true
			}
		}
	}
	// OpenZeppelin 5.0's name of FailedCall, which it was until 5.1.
	const renamed = "S 0x1425ea42 FailedInnerCall()"
	counts := map[string]int{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		line := lines.Text()
		kind, rest, _ := strings.Cut(line, " ")
		counts[kind]++
		switch kind {
		case "S", "E":
			if !have[line] && line != renamed {
				t.Errorf("not in our contracts: %s", line)
			}
		case "P":
			hash, word, _ := strings.Cut(rest, " ")
			if got := fmt.Sprintf("0x%x", keccak(word)); got != hash {
				t.Errorf("policy %s is %s, want %s", word, got, hash)
			}
			if !sourcesSay(t, `keccak256("`+word+`")`) {
				t.Errorf("no source has the policy %s", word)
			}
		case "IF":
			ids := strings.Fields(rest)
			_, app := load(t, App)
			if got := interfaceID(app, "isAppAllowed"); got != ids[0] {
				t.Errorf("IAppAuth is %s, want %s", got, ids[0])
			}
			if got := interfaceID(app, "addComposeHash", "removeComposeHash", "addDevice", "removeDevice"); got != ids[1] {
				t.Errorf("IAppAuthBasicManagement is %s, want %s", got, ids[1])
			}
			if got := interfaceID(app, "supportsInterface"); got != ids[2] {
				t.Errorf("ERC-165 is %s, want %s", got, ids[2])
			}
		case "N":
			slot, id, _ := strings.Cut(rest, " ")
			if got := namespace(id); got != slot {
				t.Errorf("namespace %s is %s, want %s", id, got, slot)
			}
			a, _ := load(t, App)
			if !bytes.Contains(a.DeployedBytecode, unhex(t, slot)) {
				t.Errorf("%s does not use the namespace %s", App, id)
			}
		case "I":
			for _, name := range []string{KMS, App, Proxy} {
				if a, _ := load(t, name); !bytes.Contains(a.DeployedBytecode, unhex(t, rest)) {
					t.Errorf("%s does not use the slot of the implementation", name)
				}
			}
		default:
			t.Errorf("what is %q?", line)
		}
	}
	for _, kind := range []string{"S", "E", "P", "IF", "N", "I"} {
		if counts[kind] == 0 {
			t.Errorf("no vectors of kind %s", kind)
		}
	}
}

// TestEventsAreIndexedAsUpstreams: a topic says nothing of what is indexed.
func TestEventsAreIndexedAsUpstreams(t *testing.T) {
	indexed := map[string][]int{
		"PolicyChanged": {0, 1, 2}, "AppDeployedViaFactory": {0, 1}, "Upgraded": {0},
		"OwnershipTransferStarted": {0, 1}, "OwnershipTransferred": {0, 1},
		"ComposeHashAdded": nil, "ComposeHashRemoved": nil, "DeviceAdded": nil, "DeviceRemoved": nil,
		"AllowAnyDeviceSet": nil, "RequireTcbUpToDateSet": nil, "UpgradesDisabled": nil, "Initialized": nil,
		"AppRegistered": nil, "KmsInfoSet": nil, "KmsAggregatedMrAdded": nil, "KmsAggregatedMrRemoved": nil,
		"KmsDeviceAdded": nil, "KmsDeviceRemoved": nil, "OsImageHashAdded": nil, "OsImageHashRemoved": nil,
		"GatewayAppIdSet": nil, "AppImplementationSet": nil,
	}
	seen := map[string]bool{}
	for _, name := range []string{KMS, App} {
		_, entries := load(t, name)
		for _, e := range entries {
			want, upstreams := indexed[e.Name]
			if e.Type != "event" || !upstreams {
				continue
			}
			seen[e.Name] = true
			var got []int
			for i, p := range e.Inputs {
				if p.Indexed {
					got = append(got, i)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s of %s: indexed are %v, want %v", e.Name, name, got, want)
			}
		}
	}
	for event := range indexed {
		if !seen[event] {
			t.Errorf("no event %s", event)
		}
	}
}

// TestCallsAreUpstreams encodes by the committed interface what the vectors have.
func TestCallsAreUpstreams(t *testing.T) {
	var v struct {
		BootInfo struct {
			AppID        string `json:"appId"`
			ComposeHash  string
			InstanceID   string `json:"instanceId"`
			DeviceID     string `json:"deviceId"`
			MRAggregated string `json:"mrAggregated"`
			MRSystem     string `json:"mrSystem"`
			OSImageHash  string `json:"osImageHash"`
			TCBStatus    string `json:"tcbStatus"`
			AdvisoryIDs  []string
		} `json:"boot_info"`
		IsAppAllowed  string   `json:"isAppAllowed_calldata"`
		TwoAdvisories string   `json:"isAppAllowed_calldata_two_advisories"`
		IsKMSAllowed  string   `json:"isKmsAllowed_calldata"`
		Allowed       string   `json:"return_allowed"`
		NotRegistered string   `json:"return_denied_app_not_registered"`
		Advisories    []string `json:"two_advisories"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/contract-calls.json"), &v); err != nil {
		t.Fatal(err)
	}
	b := v.BootInfo
	info := func(advisories []string) map[string]any {
		return map[string]any{
			"appId": unhex(t, b.AppID), "composeHash": unhex(t, b.ComposeHash), "instanceId": unhex(t, b.InstanceID),
			"deviceId": unhex(t, b.DeviceID), "mrAggregated": unhex(t, b.MRAggregated), "mrSystem": unhex(t, b.MRSystem),
			"osImageHash": unhex(t, b.OSImageHash), "tcbStatus": b.TCBStatus, "advisoryIds": advisories,
		}
	}
	for _, c := range []struct {
		contract, function string
		advisories         []string
		want               string
	}{
		{KMS, "isAppAllowed", nil, v.IsAppAllowed},
		{App, "isAppAllowed", nil, v.IsAppAllowed},
		{KMS, "isAppAllowed", v.Advisories, v.TwoAdvisories},
		{KMS, "isKmsAllowed", nil, v.IsKMSAllowed},
	} {
		f := function(t, c.contract, c.function)
		got := append(keccak(f.signature())[:4], encode(t, f.Inputs, []any{info(c.advisories)})...)
		if fmt.Sprintf("0x%x", got) != c.want {
			t.Errorf("%s.%s with %d advisories: %x, want %s", c.contract, c.function, len(c.advisories), got, c.want)
		}
		for want, answer := range map[string][]any{v.Allowed: {true, ""}, v.NotRegistered: {false, "App not registered"}} {
			if got := fmt.Sprintf("0x%x", encode(t, f.Outputs, answer)); got != want {
				t.Errorf("%s.%s answers %s, want %s", c.contract, c.function, got, want)
			}
		}
	}
	if !sourcesSay(t, `"App not registered"`) {
		t.Error("no source has the reason of the vectors")
	}
}

type variable struct {
	Label, Slot, Type string
	Offset            int
	Members           []variable
}

func layout(t *testing.T) map[string][]variable {
	t.Helper()
	data, err := os.ReadFile("storage-layout.json")
	if err != nil {
		t.Fatal(err)
	}
	var l map[string][]variable
	if err := json.Unmarshal(data, &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// Upstream's variables stay in upstream's slots (spec/governance.md 4.3, 4.4), where
// storage proofs find them.
func TestThreat_G07_StorageLiesWhereUpstreamsDoes(t *testing.T) {
	want := map[string][]string{
		App: {
			"0+0 allowedComposeHashes t_mapping(t_bytes32,t_bool)", "1+0 _upgradesDisabled t_bool", "1+1 allowAnyDevice t_bool",
			"2+0 allowedDeviceIds t_mapping(t_bytes32,t_bool)", "3+0 requireTcbUpToDate t_bool", "4+0 __gap t_array(t_uint256)49_storage",
		},
		KMS: {
			"0+0 kmsInfo t_struct(KmsInfo)_storage", "4+0 gatewayAppId t_string_storage",
			"5+0 registeredApps t_mapping(t_address,t_bool)", "6+0 kmsAllowedAggregatedMrs t_mapping(t_bytes32,t_bool)",
			"7+0 kmsAllowedDeviceIds t_mapping(t_bytes32,t_bool)", "8+0 allowedOsImages t_mapping(t_bytes32,t_bool)",
			"9+0 appImplementation t_address", "10+0 __gap t_array(t_uint256)50_storage",
		},
	}
	have := layout(t)
	for contract, rows := range want {
		var got []string
		for _, v := range have[contract] {
			got = append(got, fmt.Sprintf("%s+%d %s %s", v.Slot, v.Offset, v.Label, v.Type))
		}
		if !slices.Equal(got, rows) {
			t.Errorf("%s:\n got %s\nwant %s", contract, strings.Join(got, "\n     "), strings.Join(rows, "\n     "))
		}
	}
}

func TestThreat_G07_StorageSlotsAreTheVectors(t *testing.T) {
	var v struct {
		Slots map[string]string `json:"storage_slots"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/contract-calls.json"), &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Slots) == 0 {
		t.Fatal("no slots in the vectors")
	}
	have := layout(t)
	key := regexp.MustCompile(`^(\w+)\.(\w+)\[0x(\w\w)\*(\d+)\]$`)
	for name, want := range v.Slots {
		m := key.FindStringSubmatch(name)
		if m == nil {
			t.Errorf("what is %q?", name)
			continue
		}
		i := slices.IndexFunc(have[m[1]], func(v variable) bool { return v.Label == m[2] })
		if i < 0 {
			t.Errorf("no variable %s.%s", m[1], m[2])
			continue
		}
		size, _ := strconv.Atoi(m[4])
		slot, ok := new(big.Int).SetString(have[m[1]][i].Slot, 10)
		if !ok {
			t.Fatalf("slot %q", have[m[1]][i].Slot)
		}
		got := derive.Keccak256(pad(bytes.Repeat(unhex(t, m[3]), size)), slot.FillBytes(make([]byte, 32)))
		if fmt.Sprintf("0x%x", got) != want {
			t.Errorf("%s is %x, want %s", name, got, want)
		}
	}
}

// Our own namespaces are named in the sources and lie where their names say.
func TestNamespacesAreTheirNames(t *testing.T) {
	name := regexp.MustCompile(`erc7201:(dstack\.storage\.\w+)`)
	found := 0
	for _, src := range sources(t) {
		for _, m := range name.FindAllStringSubmatch(src, -1) {
			found++
			if !strings.Contains(src, "= "+namespace(m[1])+";") {
				t.Errorf("%s is not at %s", m[1], namespace(m[1]))
			}
		}
	}
	if found != 4 {
		t.Errorf("%d namespaces, want 4", found)
	}
}

func sources(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("src/*.sol")
	if err != nil || len(files) == 0 {
		t.Fatal("no sources", err)
	}
	var texts []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(data))
	}
	return texts
}

func sourcesSay(t *testing.T, text string) bool {
	return slices.ContainsFunc(sources(t), func(src string) bool { return strings.Contains(src, text) })
}

// namespace is the slot of a namespace (ERC-7201).
func namespace(id string) string {
	n := new(big.Int).SetBytes(keccak(id))
	n.Sub(n, big.NewInt(1))
	slot := derive.Keccak256(n.FillBytes(make([]byte, 32)))
	slot[31] = 0
	return fmt.Sprintf("0x%x", slot)
}

// interfaceID is the exclusive or of the functions' selectors (ERC-165).
func interfaceID(entries []entry, names ...string) string {
	id := make([]byte, 4)
	for _, e := range entries {
		if e.Type != "function" || !slices.Contains(names, e.Name) {
			continue
		}
		for i, b := range keccak(e.signature())[:4] {
			id[i] ^= b
		}
	}
	return fmt.Sprintf("0x%x", id)
}

func function(t *testing.T, contract, name string) entry {
	t.Helper()
	_, entries := load(t, contract)
	i := slices.IndexFunc(entries, func(e entry) bool { return e.Type == "function" && e.Name == name })
	if i < 0 {
		t.Fatalf("%s has no function %s", contract, name)
	}
	return entries[i]
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	data, err := hex.DecodeString(strings.TrimPrefix(text, "0x"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func pad(b []byte) []byte { return append(make([]byte, 32-len(b)), b...) }

func word(n int) []byte { return big.NewInt(int64(n)).FillBytes(make([]byte, 32)) }

// encode is the Contract ABI's encoding, of the types that the decisions need.
func encode(t *testing.T, params []parameter, values []any) []byte {
	t.Helper()
	if len(params) != len(values) {
		t.Fatalf("%d values for %d parameters", len(values), len(params))
	}
	var head, tail []byte
	for i, p := range params {
		value, dynamic := encodeOne(t, p, values[i])
		if !dynamic {
			head = append(head, value...)
			continue
		}
		head = append(head, word(32*len(params)+len(tail))...)
		tail = append(tail, value...)
	}
	return append(head, tail...)
}

func encodeOne(t *testing.T, p parameter, value any) (encoded []byte, dynamic bool) {
	t.Helper()
	switch p.Type {
	case "bool":
		if value.(bool) {
			return word(1), false
		}
		return word(0), false
	case "address", "bytes32":
		return pad(value.([]byte)), false
	case "string":
		text := []byte(value.(string))
		return slices.Concat(word(len(text)), text, make([]byte, -len(text)&31)), true
	case "string[]":
		var elements []parameter
		var values []any
		for _, text := range value.([]string) {
			elements, values = append(elements, parameter{Type: "string"}), append(values, text)
		}
		return append(word(len(values)), encode(t, elements, values)...), true
	case "tuple":
		// By name: so the order is the interface's and not the test's.
		var values []any
		for _, c := range p.Components {
			values = append(values, value.(map[string]any)[c.Name])
		}
		return encode(t, p.Components, values), true
	}
	t.Fatalf("no encoding of %s", p.Type)
	return nil, false
}
