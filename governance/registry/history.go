// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/ethereum/go-ethereum"
	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"

	"github.com/dstack-go/dstack/internal/fault"
)

// Event is one event of a contract, with the names of its interface.
type Event struct {
	Contract common.Address
	Name     string
	Args     map[string]any
	Block    uint64
	Tx       common.Hash
	Index    uint // in the block
}

// maxLog bounds an event's data: kmsInfo's key is the largest that we have.
const maxLog = 64 << 10

// ParseLog decodes an event. It returns false for one that the contract does not have,
// which its code may well emit: an upgrade brings what it likes. Code chain_answer: the
// event is of the contract and malformed.
func ParseLog(contract string, l types.Log) (Event, bool, error) {
	a, err := ABI(contract)
	if err != nil {
		return Event{}, false, err
	}
	e := Event{Contract: l.Address, Block: l.BlockNumber, Tx: l.TxHash, Index: l.Index, Args: map[string]any{}}
	if len(l.Topics) == 0 {
		return e, false, nil
	}
	kind, err := a.EventByID(l.Topics[0])
	if err != nil {
		return e, false, nil
	}
	e.Name = kind.Name
	var indexed abi.Arguments
	for _, in := range kind.Inputs {
		if in.Indexed {
			indexed = append(indexed, in)
		}
	}
	if len(l.Topics) != 1+len(indexed) || len(l.Data) > maxLog {
		return e, false, fault.New("chain_answer", "the event %s of block %d is malformed", kind.Name, l.BlockNumber)
	}
	if err := abi.ParseTopicsIntoMap(e.Args, indexed, l.Topics[1:]); err != nil {
		return e, false, fault.Wrap(err, "chain_answer", "the event %s of block %d is malformed", kind.Name, l.BlockNumber)
	}
	if err := kind.Inputs.UnpackIntoMap(e.Args, l.Data); err != nil && len(kind.Inputs.NonIndexed()) > 0 {
		return e, false, fault.Wrap(err, "chain_answer", "the event %s of block %d is malformed", kind.Name, l.BlockNumber)
	}
	return e, true, nil
}

// Act is what somebody did to a contract.
type Act string

// The acts. Granted and revoked are said of a list's value; set of everything else.
const (
	Announced Act = "announced" // it takes effect at Effective, if somebody then makes it
	Cancelled Act = "cancelled"
	Granted   Act = "granted"
	Revoked   Act = "revoked"
	Set       Act = "set"
	Offered   Act = "offered" // the ownership, to Value
	Owner     Act = "owner"   // Value is the owner from here on
	Upgraded  Act = "upgraded"
)

// Entry is one act in a contract's history.
type Entry struct {
	Block  uint64         `json:"block"`
	Time   time.Time      `json:"time"`
	Tx     common.Hash    `json:"tx"`
	Index  uint           `json:"index"`
	Who    common.Address `json:"who"`
	Act    Act            `json:"act"`
	Policy string         `json:"policy,omitempty"` // its word, or its id where that is unknown
	Value  string         `json:"value,omitempty"`
	// Effective is when an announcement may take effect.
	Effective *time.Time `json:"effective_at,omitempty"`

	// Raw is what the event names, for who goes on with it.
	PolicyID, ValueHash common.Hash `json:"-"`
}

// Sentence says the entry in words.
func (e Entry) Sentence() string {
	what := strings.TrimSpace(strings.ReplaceAll(e.Policy, "-", " ") + " " + e.Value)
	switch e.Act {
	case Announced:
		return fmt.Sprintf("announced %s, from %s", what, e.Effective.Format(time.RFC3339))
	case Cancelled:
		return "withdrew the announcement of " + what
	case Granted:
		return "allowed " + what
	case Revoked:
		return "revoked " + what
	case Offered:
		return "offered the ownership to " + e.Value
	case Owner:
		return "made " + e.Value + " the owner"
	case Upgraded:
		return "replaced the code by " + e.Value
	}
	return "set " + what
}

// LogReader is what a history is read from; ethclient.Client is one.
type LogReader interface {
	FilterLogs(ctx context.Context, q ethereum.FilterQuery) ([]types.Log, error)
	HeaderByNumber(ctx context.Context, number *big.Int) (*types.Header, error)
	TransactionInBlock(ctx context.Context, blockHash common.Hash, index uint) (*types.Transaction, error)
	TransactionSender(ctx context.Context, tx *types.Transaction, block common.Hash, index uint) (common.Address, error)
}

const (
	logSpan    = 10_000 // blocks of one question: what most nodes answer
	maxEntries = 100_000
)

// History reads what was done to a contract between two blocks, both included, in order.
// It is one node's word: events are proven by nobody, and a node may leave some out.
// Codes: those of Explain; chain_answer, history_too_long.
func History(ctx context.Context, from LogReader, contract string, at common.Address, first, last uint64) ([]Entry, error) {
	var out []Entry
	times := map[uint64]time.Time{}
	for start := first; start <= last; start += logSpan {
		end := min(start+logSpan-1, last)
		logs, err := from.FilterLogs(ctx, ethereum.FilterQuery{
			FromBlock: new(big.Int).SetUint64(start), ToBlock: new(big.Int).SetUint64(end), Addresses: []common.Address{at},
		})
		if err != nil {
			return nil, Explain(err)
		}
		for _, l := range logs {
			if l.Address != at || l.BlockNumber < start || l.BlockNumber > end || l.Removed {
				return nil, fault.New("chain_answer", "the node answers with an event that was not asked for")
			}
			event, ok, err := ParseLog(contract, l)
			if err != nil {
				return nil, err
			}
			if !ok {
				continue
			}
			entry, ok := event.entry()
			if !ok {
				continue
			}
			if entry.Who == (common.Address{}) {
				if entry.Who, err = sender(ctx, from, l); err != nil {
					return nil, Explain(err)
				}
			}
			if _, known := times[l.BlockNumber]; !known {
				h, err := from.HeaderByNumber(ctx, new(big.Int).SetUint64(l.BlockNumber))
				if err != nil {
					return nil, Explain(err)
				}
				times[l.BlockNumber] = time.Unix(int64(min(h.Time, 1<<40)), 0).UTC()
			}
			entry.Time = times[l.BlockNumber]
			if out = append(out, entry); len(out) > maxEntries {
				return nil, fault.New("history_too_long", "there are more than %d entries", maxEntries).WithFix("ask for fewer blocks")
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Entry) int {
		if a.Block != b.Block {
			return int(int64(a.Block) - int64(b.Block))
		}
		return int(a.Index) - int(b.Index)
	})
	return out, nil
}

func sender(ctx context.Context, from LogReader, l types.Log) (common.Address, error) {
	tx, err := from.TransactionInBlock(ctx, l.BlockHash, l.TxIndex)
	if err != nil {
		return common.Address{}, err
	}
	return from.TransactionSender(ctx, tx, l.BlockHash, l.TxIndex)
}

// lists are the policies whose values are allowed or not; the others are set.
var lists = map[string]bool{
	"compose-hash": true, "device": true, "registered-app": true, "kms-aggregated-mr": true,
	"kms-device": true, "os-image": true, "tee-variant": true, "tcb-status": true, "allow-any-device": true,
}

// entry makes an act of an event; false for one that says what another says, too.
func (e Event) entry() (Entry, bool) {
	out := Entry{Block: e.Block, Tx: e.Tx, Index: e.Index}
	named := func() {
		out.Who, _ = e.Args["actor"].(common.Address)
		policy, _ := e.Args["policy"].([32]byte)
		value, _ := e.Args["value"].([32]byte)
		out.PolicyID, out.ValueHash = policy, value
		if out.Policy = PolicyWord(policy); out.Policy == "" {
			out.Policy = out.PolicyID.Hex()
		}
		out.Value = describeValue(out.Policy, value)
	}
	switch e.Name {
	case "PolicyChanged":
		named()
		enabled, _ := e.Args["enabled"].(bool)
		switch {
		case out.Policy == "implementation-upgrade":
			return Entry{}, false // Upgraded says it
		case lists[out.Policy] && enabled:
			out.Act = Granted
		case lists[out.Policy]:
			out.Act = Revoked
		default:
			out.Act = Set
			if out.Value == "" {
				out.Value = map[bool]string{true: "on", false: "off"}[enabled]
			}
		}
	case "ChangeAnnounced":
		named()
		at, _ := e.Args["effectiveAt"].(uint64)
		t := time.Unix(int64(min(at, 1<<40)), 0).UTC()
		out.Act, out.Effective = Announced, &t
	case "ChangeCancelled":
		named()
		out.Act = Cancelled
	case "OwnershipTransferStarted":
		to, _ := e.Args["newOwner"].(common.Address)
		out.Who, _ = e.Args["previousOwner"].(common.Address)
		out.Act, out.Value = Offered, to.Hex()
	case "OwnershipTransferred":
		to, _ := e.Args["newOwner"].(common.Address)
		out.Act, out.Value = Owner, to.Hex() // by whom, the transaction tells
	case "Upgraded":
		to, _ := e.Args["implementation"].(common.Address)
		out.Act, out.Value = Upgraded, to.Hex()
	default:
		return Entry{}, false
	}
	return out, true
}

// Members is what a history leaves of a list: the values that are allowed.
func Members(history []Entry, policy string) []common.Hash {
	var out []common.Hash
	id := PolicyID(policy)
	for _, e := range history {
		if e.PolicyID != id {
			continue
		}
		out = slices.DeleteFunc(out, func(h common.Hash) bool { return h == e.ValueHash && (e.Act == Granted || e.Act == Revoked) })
		if e.Act == Granted {
			out = append(out, e.ValueHash)
		}
	}
	return out
}

// Pending is what a history leaves announced: neither made, cancelled nor lapsed at now.
func Pending(history []Entry, now time.Time) []Entry {
	var out []Entry
	for _, e := range history {
		out = slices.DeleteFunc(out, func(p Entry) bool {
			return p.PolicyID == e.PolicyID && p.ValueHash == e.ValueHash && e.PolicyID != (common.Hash{})
		})
		if e.Act == Announced {
			out = append(out, e)
		}
	}
	return slices.DeleteFunc(out, func(e Entry) bool { return now.After(e.Effective.Add(Lapse)) })
}
