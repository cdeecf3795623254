// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"context"
	"fmt"
	"math/big"
	"strconv"

	"github.com/ethereum/go-ethereum"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	evmstate "github.com/ethereum/go-ethereum/core/state"
	"github.com/ethereum/go-ethereum/core/tracing"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/core/vm"
	"github.com/ethereum/go-ethereum/params"
	"github.com/holiman/uint256"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of one execution.
const (
	maxReads  = 128 // questions to endpoints
	maxHinted = 512 // slots that an endpoint says will be read
	maxReason = 200 // bytes of a foreign app's words
	// patiences is how many of an endpoint's an execution may take.
	patiences = 5
)

// execution is an EVM's view of one block: code and storage as they are proven, fetched when
// they are read. What cannot be proven ends the execution, whatever the code makes of it.
type execution struct {
	ctx   context.Context
	r     *Reader
	block *types.Header
	cfg   *params.ChainConfig

	seen  map[common.Address]*account
	codes map[common.Hash][]byte
	reads int
	err   error
	stop  func()
}

// execute is what the registry answers about a foreign app, computed by an EVM: the
// registry's code is ours, so that gas and shape of the app's answer are bounded as it
// bounds them. Codes chain_proof, chain_execution.
func (a *Authority) execute(ctx context.Context, block *types.Header, q governance.Request) (*refusal, error) {
	call, err := registry.KMSAt(a.r.cfg.Registry).Allowed(q.Role, q.Boot, q.Boot.TEEVariant != "")
	if err != nil {
		return nil, fault.Wrap(err, "chain_execution", "ask the app")
	}
	ctx, cancel := context.WithTimeout(ctx, patiences*a.r.cfg.Patience)
	defer cancel()
	m := &execution{ctx: ctx, r: a.r, block: block, cfg: rules(a.r.cfg.ChainID), seen: map[common.Address]*account{}, codes: map[common.Hash][]byte{}}
	m.prefetch(call)
	values, err := registry.View(ctx, m, call, block.Number)
	if m.err != nil { // what a View says of it is not what went wrong
		err = m.err
	}
	if err != nil {
		return nil, err
	}
	if allowed, reason := values[0].(bool), values[1].(string); !allowed {
		return &refusal{"app_refuses", said(reason)}, nil
	}
	return nil, nil
}

// said quotes words that may be anything.
func said(reason string) string {
	return "the app's contract says " + strconv.QuoteToASCII(reason[:min(len(reason), maxReason)])
}

// rules are those of a chain: Ethereum's own as they were at a block's time, and for all
// other chains the newest that are known.
func rules(chain uint64) *params.ChainConfig {
	for _, c := range []*params.ChainConfig{params.MainnetChainConfig, params.SepoliaChainConfig, params.HoodiChainConfig} {
		if c.ChainID.IsUint64() && c.ChainID.Uint64() == chain {
			return c
		}
	}
	c := *params.MergedTestChainConfig
	c.ChainID = new(big.Int).SetUint64(chain)
	return &c
}

// only is a state database of which nothing but its kind is asked.
type only struct{ evmstate.Database }

func (only) Type() evmstate.DatabaseType { return evmstate.TypeMPT }

// CallContract runs a call that changes nothing. It implements registry.Caller.
func (m *execution) CallContract(_ context.Context, msg ethereum.CallMsg, _ *big.Int) (out []byte, err error) {
	// Anybody may write the code: should the EVM fail at some, it must not take others along.
	defer func() {
		if p := recover(); p != nil {
			out, err = nil, m.fail(fault.New("chain_execution", "the EVM fails at the app's contract: %v", p))
		}
	}()
	if m.block.BaseFee == nil {
		return nil, m.fail(fault.New("chain_execution", "the chain is older than EIP-1559"))
	}
	db, err := evmstate.NewWithReader(m.block.Root, only{}, m)
	if err != nil {
		return nil, err
	}
	block := vm.BlockContext{
		CanTransfer: func(vm.StateDB, common.Address, *uint256.Int) bool { return false },
		GetHash:     m.hash,
		Coinbase:    m.block.Coinbase, GasLimit: m.block.GasLimit, BlockNumber: m.block.Number, Time: m.block.Time,
		Difficulty: m.block.Difficulty, BaseFee: m.block.BaseFee, Random: &m.block.MixDigest,
		BlobBaseFee: new(big.Int), // whoever reads it is stopped
	}
	evm := vm.NewEVM(block, db, m.cfg, vm.Config{NoBaseFee: true, Tracer: &tracing.Hooks{OnOpcode: m.step}})
	m.stop = evm.Cancel
	r := m.cfg.Rules(m.block.Number, true, m.block.Time)
	db.Prepare(r, msg.From, m.block.Coinbase, msg.To, vm.ActivePrecompiles(r), nil)
	out, _, err = evm.StaticCall(msg.From, *msg.To, msg.Data, vm.NewGasBudget(msg.Gas, 0))
	switch {
	case m.err != nil:
		return nil, m.err
	case db.Error() != nil:
		return nil, m.fail(fault.Wrap(db.Error(), "chain_execution", "run the app's contract"))
	case err != nil:
		return nil, m.fail(fault.Wrap(err, "chain_execution", "run the registry"))
	}
	return out, nil
}

// fail ends the execution: nothing that it answers counts.
func (m *execution) fail(err error) error {
	if m.err == nil {
		m.err = err
	}
	if m.stop != nil {
		m.stop()
	}
	return m.err
}

// step refuses what no header proves.
func (m *execution) step(_ uint64, op byte, _, _ uint64, _ tracing.OpContext, _ []byte, _ int, _ error) {
	if vm.OpCode(op) == vm.BLOBBASEFEE {
		m.fail(fault.New("chain_execution", "the app's contract reads the fee of blobs, which is not proven"))
	}
}

// hash is that of an earlier block: the header proves its parent's.
func (m *execution) hash(n uint64) common.Hash {
	if n+1 == m.block.Number.Uint64() {
		return m.block.ParentHash
	}
	m.fail(fault.New("chain_execution", "the app's contract reads the hash of block %d, which is not proven", n))
	return common.Hash{}
}

// prove asks for an account and slots of it, and remembers them.
func (m *execution) prove(at common.Address, slots ...common.Hash) (*account, error) {
	if m.err != nil {
		return nil, m.err
	}
	if m.reads++; m.reads > maxReads {
		return nil, m.fail(fault.New("chain_execution", "the app's contract reads more than %d places", maxReads))
	}
	a, err := m.r.read(m.ctx, m.block, at, slots)
	if err != nil {
		return nil, m.fail(err)
	}
	if old := m.seen[at]; old != nil {
		for slot, word := range a.words {
			old.words[slot] = word
		}
		return old, nil
	}
	m.seen[at] = a
	return a, nil
}

// prefetch proves at once what an endpoint says will be read. That is a hint: what it
// leaves out is fetched when it is read, and what it adds is read by nobody.
func (m *execution) prefetch(c registry.Call) {
	for _, e := range m.r.willing() {
		var hint struct {
			List types.AccessList `json:"accessList"`
		}
		ctx, cancel := context.WithTimeout(m.ctx, m.r.cfg.Patience)
		err := e.rpc.CallContext(ctx, &hint, "eth_createAccessList", map[string]any{"to": c.To, "data": hexutil.Bytes(c.Data)}, hexutil.EncodeBig(m.block.Number))
		cancel()
		if err != nil {
			continue
		}
		slots := 0
		for _, place := range hint.List[:min(len(hint.List), maxReads/4)] {
			if slots += len(place.StorageKeys); slots > maxHinted {
				return
			}
			if _, err := m.prove(place.Address, place.StorageKeys...); err != nil {
				m.err = nil // one endpoint's hint decides nothing
				return
			}
		}
		return
	}
}

// What follows implements evmstate.Reader.

func (m *execution) account(at common.Address) (*account, error) {
	if a := m.seen[at]; a != nil && m.err == nil {
		return a, nil
	}
	return m.prove(at)
}

// Account is a proven account; nil where there is none.
func (m *execution) Account(at common.Address) (*types.StateAccount, error) {
	a, err := m.account(at)
	if err != nil || a.is == nil {
		return nil, err
	}
	return a.is.Copy(), nil
}

// Storage is a proven word.
func (m *execution) Storage(at common.Address, slot common.Hash) (common.Hash, error) {
	if a := m.seen[at]; a != nil && m.err == nil {
		if word, ok := a.words[slot]; ok {
			return word, nil
		}
	}
	a, err := m.prove(at, slot)
	if err != nil {
		return common.Hash{}, err
	}
	return a.words[slot], nil
}

// Code is the code of a hash that is proven to be an account's.
func (m *execution) Code(at common.Address, hash common.Hash) []byte {
	if code, ok := m.codes[hash]; ok {
		return code
	}
	if m.err != nil {
		return nil
	}
	if m.reads++; m.reads > maxReads {
		m.fail(fault.New("chain_execution", "the app's contract reads more than %d places", maxReads))
		return nil
	}
	code, err := m.r.code(m.ctx, m.block, at, hash)
	if err != nil {
		m.fail(fmt.Errorf("run the app's contract: %w", err))
		return nil
	}
	m.codes[hash] = code
	return code
}

// CodeSize is the size of Code.
func (m *execution) CodeSize(at common.Address, hash common.Hash) int { return len(m.Code(at, hash)) }

// Has reports whether there is Code.
func (m *execution) Has(at common.Address, hash common.Hash) bool { return len(m.Code(at, hash)) > 0 }
