// SPDX-License-Identifier: Apache-2.0

// Package registry is the governance contracts as Go speaks to them: calls, the words
// of their reverts, where their storage lies, and their events as a history.
//
// Guarantees: selectors, topics, ids and slots are those of the compiled contracts
// (package contracts), which are upstream's where upstream has them; every custom error
// of the contracts has a sentence. Nothing here opens a connection: a Caller and a
// LogReader are given.
//
// Trusted: the committed interfaces. Attacker-controlled: whatever a node answers; it is
// decoded strictly, and what it says is that node's word only. A decision about keys is
// read with proofs, by package chain.
//
// Implements spec/governance.md §4, §6; threats.md G06, G07.
package registry

import (
	"context"
	"fmt"
	"math/big"
	"strings"
	"sync"

	"github.com/ethereum/go-ethereum"
	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/internal/fault"
)

// ids of ERC-165.
var (
	IAppAuth                = [4]byte{0x1e, 0x07, 0x91, 0x98}
	IAppAuthBasicManagement = [4]byte{0x8f, 0xd3, 0x75, 0x27}
	IERC165                 = [4]byte{0x01, 0xff, 0xc9, 0xa7}
)

var parsed sync.Map // name of a contract to *abi.ABI

// ABI returns the interface of one of the contracts of package contracts.
func ABI(contract string) (*abi.ABI, error) {
	if a, ok := parsed.Load(contract); ok {
		return a.(*abi.ABI), nil
	}
	artefact, err := contracts.Load(contract)
	if err != nil {
		return nil, err
	}
	a, err := abi.JSON(strings.NewReader(string(artefact.ABI)))
	if err != nil {
		return nil, fmt.Errorf("interface of %s: %w", contract, err)
	}
	parsed.Store(contract, &a)
	return &a, nil
}

// mustABI is of a contract that is embedded: a test loads them all.
func mustABI(contract string) *abi.ABI {
	a, err := ABI(contract)
	if err != nil {
		panic(err)
	}
	return a
}

// Call is one call of a contract's function.
type Call struct {
	Contract string // as in package contracts
	To       common.Address
	Data     []byte

	// Change is what the contract announces when it has notice; nil: the call is
	// immediate.
	Change *Change
	// Forgets is the announcement that the call withdraws, if there is one.
	Forgets *Change
	// Done asks whether what the call wants is so already; nil: nothing tells.
	Done *Question
}

// Change names an announcement: Notice.change(policy, value).
type Change struct{ Policy, Value common.Hash }

// Question is a view and the answer that is hoped for.
type Question struct {
	Call Call
	Want any // bool, uint64, string or common.Address
}

// call makes a Call. The signature names one overload; its arguments are of the types
// that package abi wants, so that a mistake is one of this package, and its tests' to
// find.
func call(contract string, to common.Address, signature string, args ...any) Call {
	a := mustABI(contract)
	for _, m := range a.Methods {
		if m.Sig != signature {
			continue
		}
		packed, err := m.Inputs.Pack(args...)
		if err != nil {
			panic(fmt.Sprintf("%s.%s: %v", contract, signature, err))
		}
		return Call{Contract: contract, To: to, Data: append(common.CopyBytes(m.ID), packed...)}
	}
	panic(fmt.Sprintf("%s has no %s", contract, signature))
}

func (c Call) announced(policy string, value common.Hash) Call {
	c.Change = &Change{PolicyID(policy), value}
	return c
}

func (c Call) forgets(policy string, value common.Hash) Call {
	c.Forgets = &Change{PolicyID(policy), value}
	return c
}

func (c Call) done(view Call, want any) Call {
	c.Done = &Question{view, want}
	return c
}

// PolicyID is how contracts name a policy: keccak256 of upstream's or our word.
func PolicyID(word string) common.Hash { return crypto.Keccak256Hash([]byte(word)) }

// Policies are the words that PolicyChanged and ChangeAnnounced speak of, by their ids.
var policies = sync.OnceValue(func() map[common.Hash]string {
	m := map[common.Hash]string{}
	for _, word := range []string{
		"compose-hash", "device", "allow-any-device", "require-tcb-up-to-date", "upgrades-disabled",
		"implementation-upgrade", "app-implementation", "kms-info", "gateway-app-id", "registered-app",
		"kms-aggregated-mr", "kms-device", "os-image",
		"notice", "guardian", "frozen", "platform-required", "tee-variant", "tcb-status", "advisory-blocked",
		"key-epoch", "oldest-key-epoch", "min-os-epoch", "kms-evidence",
	} {
		m[PolicyID(word)] = word
	}
	return m
})

// PolicyWord is the inverse of PolicyID; "" for a policy that is none of ours.
func PolicyWord(id common.Hash) string { return policies()[id] }

// addressHash is an address as a value of a policy.
func addressHash(a common.Address) common.Hash { return common.BytesToHash(a[:]) }

// uintHash is a number as a value of a policy.
func uintHash(n uint64) common.Hash { return common.BigToHash(new(big.Int).SetUint64(n)) }

// Method returns the function that a call is of. Code call_unknown.
func Method(contract string, data []byte) (*abi.Method, error) {
	a, err := ABI(contract)
	if err != nil {
		return nil, err
	}
	if len(data) < 4 {
		return nil, fault.New("call_unknown", "call data of %d bytes names no function of %s", len(data), contract)
	}
	m, err := a.MethodById(data[:4])
	if err != nil {
		return nil, fault.New("call_unknown", "no function of %s has the selector %x", contract, data[:4])
	}
	return m, nil
}

// Describe writes a call with its arguments, such as addDevice(deviceId: 0x44…). Data
// that is of no function of the contract is said to be so.
func (c Call) Describe() string {
	m, err := Method(c.Contract, c.Data)
	if err != nil {
		return fmt.Sprintf("0x%x", c.Data)
	}
	values, err := m.Inputs.Unpack(c.Data[4:])
	if err != nil {
		return fmt.Sprintf("%s(malformed)", m.RawName)
	}
	var args []string
	for i, in := range m.Inputs {
		args = append(args, strings.TrimSuffix(in.Name, "_")+": "+show(values[i]))
	}
	return m.RawName + "(" + strings.Join(args, ", ") + ")"
}

// show writes a value as people read it. Text of a contract is quoted: it may hold
// anything.
func show(v any) string {
	switch v := v.(type) {
	case common.Address:
		return v.Hex()
	case common.Hash:
		return v.Hex()
	case [32]byte:
		return fmt.Sprintf("0x%x", v)
	case [4]byte:
		return fmt.Sprintf("0x%x", v)
	case []byte:
		if len(v) > 64 {
			return fmt.Sprintf("0x%x… (%d bytes)", v[:32], len(v))
		}
		return fmt.Sprintf("0x%x", v)
	case [][32]byte:
		var parts []string
		for _, b := range v {
			parts = append(parts, show(b))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case string:
		return fmt.Sprintf("%q", v)
	case bool, uint64, *big.Int, uint8:
		return fmt.Sprint(v)
	default:
		// A struct of package abi: its fields in order.
		return fmt.Sprintf("%+v", v)
	}
}

// Caller asks a contract; block nil is the newest. ethclient.Client is one.
type Caller interface {
	CallContract(ctx context.Context, msg ethereum.CallMsg, block *big.Int) ([]byte, error)
}

// viewGas bounds what a question may cost the node.
const viewGas = 5_000_000

// View asks a contract and decodes the answer. Codes: those of Explain; chain_answer.
func View(ctx context.Context, from Caller, c Call, block *big.Int) ([]any, error) {
	m, err := Method(c.Contract, c.Data)
	if err != nil {
		return nil, err
	}
	out, err := from.CallContract(ctx, ethereum.CallMsg{To: &c.To, Gas: viewGas, Data: c.Data}, block)
	if err != nil {
		return nil, Explain(err)
	}
	if len(out) == 0 && len(m.Outputs) > 0 {
		return nil, fault.New("contract_absent", "%s is no %s: %s has no answer", c.To.Hex(), c.Contract, m.RawName).
			WithFix("check the address, and that the node is of the right chain")
	}
	values, err := m.Outputs.Unpack(out)
	if err != nil {
		return nil, fault.Wrap(err, "chain_answer", "the answer of %s at %s is malformed", m.RawName, c.To.Hex())
	}
	return values, nil
}

// Holds asks the question.
func (q *Question) Holds(ctx context.Context, from Caller, block *big.Int) (bool, error) {
	values, err := View(ctx, from, q.Call, block)
	if err != nil {
		return false, err
	}
	return len(values) > 0 && values[0] == q.Want, nil
}
