// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

var all = []string{contracts.KMS, contracts.App, contracts.Council, contracts.Proxy}

// TestIDsAreTheVectors compares every selector, topic, policy, namespace and interface id.
func TestIDsAreTheVectors(t *testing.T) {
	have := map[string]bool{}
	for _, name := range all {
		a, err := ABI(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range a.Methods {
			have[fmt.Sprintf("S 0x%x %s", m.ID, m.Sig)] = true
		}
		for _, e := range a.Errors {
			have[fmt.Sprintf("S 0x%x %s", e.ID[:4], e.Sig)] = true
		}
		for _, e := range a.Events {
			have[fmt.Sprintf("E 0x%x %s", e.ID, e.Sig)] = true
		}
	}
	have["S 0x1425ea42 FailedInnerCall()"] = true // OpenZeppelin 5.0's name of FailedCall
	for id, word := range policies() {
		have[fmt.Sprintf("P %s %s", id, word)] = true
	}
	for _, id := range []string{"openzeppelin.storage.Ownable", "openzeppelin.storage.Ownable2Step", "openzeppelin.storage.Initializable"} {
		have[fmt.Sprintf("N %s %s", Namespace(id), id)] = true
	}
	have[fmt.Sprintf("I %s", ImplementationSlot)] = true
	have[fmt.Sprintf("IF 0x%x 0x%x 0x%x", IAppAuth, IAppAuthBasicManagement, IERC165)] = true
	n := 0
	for lines := bufio.NewScanner(bytes.NewReader(testkit.Vectors(t, "kms/contract-ids.txt"))); lines.Scan(); n++ {
		if !have[lines.Text()] {
			t.Errorf("not ours: %s", lines.Text())
		}
	}
	if n == 0 {
		t.Fatal("no vectors")
	}
	if OwnerSlot != Namespace("openzeppelin.storage.Ownable") || PendingOwnerSlot != Namespace("openzeppelin.storage.Ownable2Step") {
		t.Error("the owner's slots are not their namespaces")
	}
}

type vectors struct {
	BootInfo struct {
		AppID        string `json:"appId"`
		ComposeHash  string
		InstanceID   string `json:"instanceId"`
		DeviceID     string `json:"deviceId"`
		MRAggregated string `json:"mrAggregated"`
		MRSystem     string `json:"mrSystem"`
		OSImageHash  string `json:"osImageHash"`
		TCBStatus    string `json:"tcbStatus"`
	} `json:"boot_info"`
	IsAppAllowed  string            `json:"isAppAllowed_calldata"`
	TwoAdvisories string            `json:"isAppAllowed_calldata_two_advisories"`
	IsKMSAllowed  string            `json:"isKmsAllowed_calldata"`
	Advisories    []string          `json:"two_advisories"`
	Slots         map[string]string `json:"storage_slots"`
}

func readVectors(t *testing.T) (v vectors, b governance.BootInfo) {
	t.Helper()
	if err := json.Unmarshal(testkit.Vectors(t, "kms/contract-calls.json"), &v); err != nil {
		t.Fatal(err)
	}
	raw := func(s string) []byte {
		x, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	copy(b.AppID[:], raw(v.BootInfo.AppID))
	copy(b.ComposeHash[:], raw(v.BootInfo.ComposeHash))
	copy(b.DeviceID[:], raw(v.BootInfo.DeviceID))
	copy(b.MRAggregated[:], raw(v.BootInfo.MRAggregated))
	copy(b.MRSystem[:], raw(v.BootInfo.MRSystem))
	b.InstanceID, b.OSImageHash, b.TCBStatus = raw(v.BootInfo.InstanceID), raw(v.BootInfo.OSImageHash), v.BootInfo.TCBStatus
	return v, b
}

func TestQuestionsAreTheVectors(t *testing.T) {
	v, b := readVectors(t)
	kms, app := KMSAt(common.Address{1}), AppAt(common.Address{2})
	two := b
	two.AdvisoryIDs = v.Advisories
	for _, c := range []struct {
		name string
		call func() (Call, error)
		want string
	}{
		{"the registry of an app", func() (Call, error) { return kms.Allowed(governance.App, b, false) }, v.IsAppAllowed},
		{"the app", func() (Call, error) { return app.Allowed(b, false) }, v.IsAppAllowed},
		{"with advisories", func() (Call, error) { return kms.Allowed(governance.App, two, false) }, v.TwoAdvisories},
		{"of a KMS", func() (Call, error) { return kms.Allowed(governance.KMS, b, false) }, v.IsKMSAllowed},
	} {
		got, err := c.call()
		if err != nil || fmt.Sprintf("0x%x", got.Data) != c.want {
			t.Errorf("%s: %x, %v, want %s", c.name, got.Data, err, c.want)
		}
	}
	b.OSImageHash = b.OSImageHash[1:]
	if _, err := kms.Allowed(governance.App, b, true); err == nil {
		t.Error("an image's hash that is too short was padded")
	}
}

func TestThreat_G07_SlotsAreTheVectors(t *testing.T) {
	v, _ := readVectors(t)
	full := func(b byte) (h [32]byte) {
		for i := range h {
			h[i] = b
		}
		return h
	}
	kms, app := KMSAt(common.Address{}), AppAt(common.Address{})
	for name, want := range v.Slots {
		var key byte
		contract, rest, _ := strings.Cut(name, ".")
		variable, index, _ := strings.Cut(rest, "[0x")
		if _, err := fmt.Sscanf(index, "%02x", &key); err != nil {
			t.Fatal(err)
		}
		var f Field
		switch contract + "." + variable {
		case "DstackApp.allowedComposeHashes":
			f = app.ComposeHashSlot(full(key))
		case "DstackApp.allowedDeviceIds":
			f = app.DeviceSlot(full(key))
		case "DstackKms.registeredApps":
			f = kms.RegisteredAppSlot(common.Address(bytes.Repeat([]byte{key}, 20)))
		case "DstackKms.kmsAllowedAggregatedMrs":
			f = kms.MRSlot(full(key))
		case "DstackKms.kmsAllowedDeviceIds":
			f = kms.DeviceSlot(full(key))
		case "DstackKms.allowedOsImages":
			f = kms.OSImageSlot(full(key))
		default:
			t.Errorf("no slot of %s", name)
		}
		if f.Slot.Hex() != want || f.Width != 1 || f.Offset != 0 {
			t.Errorf("%s is %+v, want %s", name, f, want)
		}
	}
	if len(v.Slots) == 0 {
		t.Fatal("no slots")
	}
}

// What lies where is what the compiler said.
func TestThreat_G07_FieldsAreTheLayouts(t *testing.T) {
	data, err := os.ReadFile("../contracts/storage-layout.json")
	if err != nil {
		t.Fatal(err)
	}
	type variable struct {
		Label   string
		Slot    string
		Offset  int
		Members []variable
	}
	var layout map[string][]variable
	if err := json.Unmarshal(data, &layout); err != nil {
		t.Fatal(err)
	}
	at := map[string]string{}
	for contract, vars := range layout {
		for _, v := range vars {
			at[contract+"."+v.Label] = v.Slot + "+" + fmt.Sprint(v.Offset)
			for _, m := range v.Members {
				at[v.Label+"."+m.Label] = m.Slot + "+" + fmt.Sprint(m.Offset)
			}
		}
	}
	kms, app := KMSAt(common.Address{}), AppAt(common.Address{})
	base := map[string]common.Hash{"noticeStorage": noticeSlot, "governedStorage": governedSlot, "appStorage": appSlot, "kmsStorage": kmsSlot}
	for name, f := range map[string]Field{
		"DstackApp._upgradesDisabled": app.UpgradesDisabledSlot(), "DstackApp.allowAnyDevice": app.AllowAnyDeviceSlot(),
		"DstackApp.requireTcbUpToDate": app.RequireTCBSlot(), "DstackKms.appImplementation": kms.AppImplementationSlot(),
		"noticeStorage.notice": app.NoticeSlot(), "noticeStorage.guardian": app.GuardianSlot(),
		"governedStorage.platformRequired": app.PlatformRequiredSlot(), "governedStorage.keyEpoch": app.KeyEpochSlot(),
		"governedStorage.oldestKeyEpoch": app.OldestKeyEpochSlot(), "appStorage.frozen": app.FrozenSlot(),
		"kmsStorage.upgradesDisabled": kms.KMSUpgradesDisabledSlot(), "kmsStorage.minOsEpoch": kms.MinOSEpochSlot(),
	} {
		owner, _, _ := strings.Cut(name, ".")
		var slot uint64
		var offset int
		if _, err := fmt.Sscanf(at[name], "%d+%d", &slot, &offset); err != nil {
			t.Errorf("%s: no such variable", name)
			continue
		}
		if want := plus(base[owner], slot); f.Slot != want || f.Offset != offset {
			t.Errorf("%s is at %s+%d, want %s+%d", name, f.Slot, f.Offset, want, offset)
		}
	}
	word := common.HexToHash("0x0000000000000000000000000000000000000000000000000000000000000100")
	if app.UpgradesDisabledSlot().True(word) || !app.AllowAnyDeviceSlot().True(word) {
		t.Error("two flags of one word were mixed up")
	}
}

// Every custom error of the contracts has a sentence of its own.
func TestEveryRevertHasASentence(t *testing.T) {
	n := 0
	for _, name := range all {
		for _, e := range mustABI(name).Errors {
			n++
			args := make([]any, len(e.Inputs))
			for i, in := range e.Inputs {
				switch in.Type.String() {
				case "address":
					args[i] = common.Address{7}
				case "uint64":
					args[i] = uint64(9)
				case "uint256":
					args[i] = big.NewInt(11)
				case "bytes32":
					args[i] = [32]byte(PolicyID("device"))
				case "bytes":
					args[i] = []byte{1}
				case "string":
					args[i] = "x"
				}
			}
			packed, err := e.Inputs.Pack(args...)
			if err != nil {
				t.Fatal(e.Sig, err)
			}
			r, ok := ParseRevert(append(e.ID[:4:4], packed...))
			if !ok || r.Name != e.Name {
				t.Errorf("%s was read as %+v", e.Sig, r)
				continue
			}
			err = r.Err()
			if fault.Code(err) == "" || strings.Contains(err.Error(), e.Name+"(") && e.Name != "StringTooLong" && fault.Code(err) != "contract_upgrade" && e.Name != "InvalidShortString" {
				t.Errorf("%s: %v", e.Sig, err)
			}
		}
	}
	if n < 30 {
		t.Errorf("%d errors only", n)
	}
	packed, _ := abi.Arguments{{Type: mustABI(contracts.App).Methods["addTcbStatus"].Inputs[0].Type}}.Pack("Upgrades are permanently disabled")
	r, ok := ParseRevert(append([]byte{0x08, 0xc3, 0x79, 0xa0}, packed...))
	if err := r.Err(); !ok || fault.Code(err) != "contract_refused" || !strings.Contains(err.Error(), "permanently disabled") {
		t.Errorf("a reason in words: %v", err)
	}
	if _, ok := ParseRevert([]byte{1, 2, 3, 4}); ok {
		t.Error("four unknown bytes were understood")
	}
	if err := Explain(errors.New("dial")); fault.Code(err) != "chain_unreachable" {
		t.Errorf("a node that is not there: %v", err)
	}
}

func TestHistoryLeavesWhatHolds(t *testing.T) {
	at := time.Unix(1000, 0).UTC()
	v := func(b byte) common.Hash { return common.Hash{b} }
	e := func(act Act, word string, value common.Hash) Entry {
		return Entry{Act: act, PolicyID: PolicyID(word), ValueHash: value, Policy: word, Effective: &at}
	}
	h := []Entry{
		e(Granted, "device", v(1)), e(Granted, "device", v(2)), e(Granted, "device", v(2)), e(Revoked, "device", v(1)),
		e(Granted, "compose-hash", v(3)), e(Announced, "device", v(4)), e(Announced, "device", v(5)), e(Granted, "device", v(5)),
		e(Announced, "device", v(6)), e(Cancelled, "device", v(6)),
	}
	if got := Members(h, "device"); len(got) != 2 || got[0] != v(2) || got[1] != v(5) {
		t.Errorf("members %v", got)
	}
	if got := Pending(h, at); len(got) != 1 || got[0].ValueHash != v(4) {
		t.Errorf("pending %v", got)
	}
	if got := Pending(h, at.Add(Lapse+time.Second)); len(got) != 0 {
		t.Errorf("lapsed, and still pending: %v", got)
	}
}

func TestCallsSayWhatTheyDo(t *testing.T) {
	c := AppAt(common.Address{1}).AddDevice([32]byte{2})
	if got := c.Describe(); !strings.HasPrefix(got, "addDevice(deviceId: 0x0200") {
		t.Error(got)
	}
	if c.Change.Policy != PolicyID("device") || PolicyWord(c.Change.Policy) != "device" {
		t.Error("the call names another announcement")
	}
	if _, err := Method(contracts.App, []byte{1, 2, 3, 4}); fault.Code(err) != "call_unknown" {
		t.Errorf("an unknown selector: %v", err)
	}
}

// Whatever a node says is no panic.
func FuzzNodesWords(f *testing.F) {
	for _, name := range []string{contracts.KMS, contracts.App} {
		for _, e := range mustABI(name).Events {
			f.Add(e.ID.Bytes(), make([]byte, 96))
		}
		for _, e := range mustABI(name).Errors {
			f.Add(make([]byte, 32), append(e.ID[:4:4], make([]byte, 64)...))
		}
	}
	f.Fuzz(func(t *testing.T, topics, data []byte) {
		if r, ok := ParseRevert(data); ok {
			_ = r.Err().Error()
		}
		l := types.Log{Data: data}
		for i := 0; i+32 <= len(topics) && i < 128; i += 32 {
			l.Topics = append(l.Topics, common.Hash(topics[i:i+32]))
		}
		for _, name := range all {
			if e, ok, err := ParseLog(name, l); err == nil && ok {
				if entry, ok := e.entry(); ok {
					_ = entry.Sentence()
				}
			}
			_ = Call{Contract: name, Data: data}.Describe()
		}
	})
}
