// SPDX-License-Identifier: Apache-2.0

// Package transact sends calls to the governance contracts and waits until the chain
// has them.
//
// Guarantees: a call is tried by eth_call before anything is signed, and a refusal is
// said in the contract's words; what is so already is not sent again, and an
// announcement that waits is not announced again; a call is done when its transaction
// has the confirmations that were asked for and is still in its block. With a Sender
// that has no signer nothing can be sent: the call is for somebody else to sign.
//
// Trusted: the signer. The node is taken at its word for nonce, fees and receipts: what
// a lying node can reach is that a call is not made or paid too dear (Fee bounds it); no
// key and no decision about keys depends on it.
//
// Implements spec/governance.md §6.
package transact

import (
	"context"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/ethereum/go-ethereum"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

// State is what became of a call.
type State string

const (
	Already   State = "already"   // it was so before
	Waiting   State = "waiting"   // announced before, and its time has not come
	Announced State = "announced" // announced now
	Made      State = "made"
)

// Outcome is what became of a call, and where.
type Outcome struct {
	State     State          `json:"state"`
	Effective *time.Time     `json:"effective_at,omitempty"` // of an announcement
	Tx        *common.Hash   `json:"tx,omitempty"`
	Block     uint64         `json:"block,omitempty"`
	Gas       uint64         `json:"gas_used,omitempty"`
	Receipt   *types.Receipt `json:"-"`
}

// Sender sends calls.
type Sender struct {
	Node   *ethclient.Client
	Signer Signer
	// Confirmations is how many blocks, its own included, a transaction must have; 0: 1.
	Confirmations uint64
	// Timeout is how long to wait for them; 0: five minutes.
	Timeout time.Duration
	// MaxFee bounds what a transaction may cost, in wei; nil: 0.5 ether.
	MaxFee *big.Int
	// Progress is told what happens, one line each; may be nil.
	Progress func(format string, args ...any)

	poll time.Duration
}

func (s *Sender) progress(format string, args ...any) {
	if s.Progress != nil {
		s.Progress(format, args...)
	}
}

// Before says what is so already of a call at the newest block; nil: it must be sent.
// Codes: those of registry.View.
func Before(ctx context.Context, node *ethclient.Client, c registry.Call) (*Outcome, error) {
	if c.Done != nil {
		so, err := c.Done.Holds(ctx, node, nil)
		if err != nil {
			return nil, err
		}
		if so && c.Forgets != nil {
			a, err := registry.ReadChange(ctx, node, c.Contract, c.To, *c.Forgets, nil)
			if err != nil {
				return nil, err
			}
			so = !a.Pending
		}
		if so {
			return &Outcome{State: Already}, nil
		}
	}
	if c.Change == nil {
		return nil, nil
	}
	a, err := registry.ReadChange(ctx, node, c.Contract, c.To, *c.Change, nil)
	if err != nil || !a.Pending {
		return nil, err
	}
	head, err := node.HeaderByNumber(ctx, nil)
	if err != nil {
		return nil, registry.Explain(err)
	}
	// The next block is later than the head; a node that judges by its own clock says so
	// when the call is tried.
	if now := time.Now(); now.Before(a.Effective) && time.Unix(int64(head.Time), 0).Before(a.Effective) {
		return &Outcome{State: Waiting, Effective: &a.Effective}, nil
	}
	return nil, nil
}

// Do makes a call, unless it is made already. Codes: those of registry.Explain; chain_fee,
// chain_funds, chain_timeout, chain_replaced, chain_dropped, and those of the signer.
func (s *Sender) Do(ctx context.Context, c registry.Call) (*Outcome, error) {
	if before, err := Before(ctx, s.Node, c); before != nil || err != nil {
		return before, err
	}
	out, err := s.send(ctx, &c.To, c.Data)
	if err != nil || c.Change == nil {
		return out, err
	}
	a, err := registry.ReadChange(ctx, s.Node, c.Contract, c.To, *c.Change, nil)
	if err != nil {
		return nil, err
	}
	if a.Pending {
		out.State, out.Effective = Announced, &a.Effective
	}
	return out, nil
}

// Deploy makes a contract of its creation code; the receipt names its address. Codes:
// those of Do.
func (s *Sender) Deploy(ctx context.Context, code []byte) (*Outcome, error) {
	return s.send(ctx, nil, code)
}

// send signs and sends what it has tried, and waits; to nil makes a contract.
func (s *Sender) send(ctx context.Context, to *common.Address, data []byte) (*Outcome, error) {
	tx, err := s.prepare(ctx, to, data)
	if err != nil {
		return nil, err
	}
	chain := tx.ChainId()
	signed, err := s.Signer.Sign(ctx, tx, chain)
	if err != nil {
		return nil, err
	}
	// Whoever signed, it must be what was asked for.
	by := types.LatestSignerForChainID(chain)
	if from, err := types.Sender(by, signed); err != nil || from != s.Signer.Address() || by.Hash(signed) != by.Hash(tx) {
		return nil, fault.New("signer_answer", "the signer signed something else, or with another key")
	}
	if err := s.Node.SendTransaction(ctx, signed); err != nil {
		return nil, registry.Explain(err)
	}
	s.progress("sent %s", signed.Hash().Hex())
	receipt, err := s.wait(ctx, signed)
	if err != nil {
		return nil, err
	}
	if receipt.Status != types.ReceiptStatusSuccessful {
		return nil, s.failed(ctx, tx, receipt)
	}
	hash := signed.Hash()
	return &Outcome{State: Made, Tx: &hash, Block: receipt.BlockNumber.Uint64(), Gas: receipt.GasUsed, Receipt: receipt}, nil
}

// prepare tries the call and fills in what a transaction needs.
func (s *Sender) prepare(ctx context.Context, to *common.Address, data []byte) (*types.Transaction, error) {
	from := s.Signer.Address()
	msg := ethereum.CallMsg{From: from, To: to, Data: data}
	if _, err := s.Node.CallContract(ctx, msg, nil); err != nil {
		return nil, registry.Explain(err)
	}
	gas, err := s.Node.EstimateGas(ctx, msg)
	if err != nil {
		return nil, registry.Explain(err)
	}
	gas += gas / 5 // storage may be another by then
	chain, err := s.Node.ChainID(ctx)
	if err != nil {
		return nil, registry.Explain(err)
	}
	head, err := s.Node.HeaderByNumber(ctx, nil)
	if err != nil {
		return nil, registry.Explain(err)
	}
	if head.BaseFee == nil {
		return nil, fault.New("chain_node", "the chain has no base fee: it is older than EIP-1559")
	}
	tip, err := s.Node.SuggestGasTipCap(ctx)
	if err != nil {
		return nil, registry.Explain(err)
	}
	most := new(big.Int).Add(tip, new(big.Int).Mul(head.BaseFee, big.NewInt(2)))
	limit := s.MaxFee
	if limit == nil {
		limit = big.NewInt(5e17)
	}
	cost := new(big.Int).Mul(most, new(big.Int).SetUint64(gas))
	if cost.Cmp(limit) > 0 {
		return nil, fault.New("chain_fee", "the call may cost %s wei, more than the limit of %s", cost, limit).WithFix("wait for lower fees, or raise --max-fee")
	}
	balance, err := s.Node.BalanceAt(ctx, from, nil)
	if err != nil {
		return nil, registry.Explain(err)
	}
	if balance.Cmp(cost) < 0 {
		return nil, fault.New("chain_funds", "%s has %s wei, and the call may cost %s", from.Hex(), balance, cost).WithFix("give the account ether")
	}
	nonce, err := s.Node.PendingNonceAt(ctx, from)
	if err != nil {
		return nil, registry.Explain(err)
	}
	return types.NewTx(&types.DynamicFeeTx{
		ChainID: chain, Nonce: nonce, To: to, Gas: gas, GasTipCap: tip, GasFeeCap: most, Value: new(big.Int), Data: data,
	}), nil
}

// wait waits for the confirmations.
func (s *Sender) wait(ctx context.Context, tx *types.Transaction) (*types.Receipt, error) {
	want, timeout, poll := max(s.Confirmations, 1), s.Timeout, s.poll
	if timeout == 0 {
		timeout = 5 * time.Minute
	}
	if poll == 0 {
		poll = 200 * time.Millisecond
	}
	deadline := time.Now().Add(timeout)
	var told, missing uint64
	for {
		receipt, err := s.Node.TransactionReceipt(ctx, tx.Hash())
		switch {
		case err == nil:
			missing = 0
			head, err := s.Node.BlockNumber(ctx)
			if err != nil {
				return nil, registry.Explain(err)
			}
			have := uint64(1)
			if at := receipt.BlockNumber.Uint64(); head > at {
				have += head - at
			}
			if have >= want {
				return receipt, nil
			}
			if have != told {
				s.progress("block %d has it: %d of %d confirmations", receipt.BlockNumber, have, want)
				told = have
			}
		case errors.Is(err, ethereum.NotFound):
			if told > 0 {
				s.progress("the chain went another way: the transaction is in no block again")
				told = 0
			}
			if err := s.lost(ctx, tx, &missing); err != nil {
				return nil, err
			}
		default:
			return nil, registry.Explain(err)
		}
		if time.Now().After(deadline) {
			return nil, fault.New("chain_timeout", "%s has no %d confirmations after %s", tx.Hash().Hex(), want, timeout).
				WithFix("run the command again: it goes on where the chain is")
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(poll):
		}
	}
}

// lost tells when a transaction without a receipt will never have one.
func (s *Sender) lost(ctx context.Context, tx *types.Transaction, missing *uint64) error {
	_, _, err := s.Node.TransactionByHash(ctx, tx.Hash())
	if err == nil {
		*missing = 0
		return nil
	}
	if !errors.Is(err, ethereum.NotFound) {
		return registry.Explain(err)
	}
	// A node may learn of its own transaction late.
	if *missing++; *missing < 10 {
		return nil
	}
	nonce, err := s.Node.NonceAt(ctx, s.Signer.Address(), nil)
	if err != nil {
		return registry.Explain(err)
	}
	if nonce > tx.Nonce() {
		return fault.New("chain_replaced", "another transaction of %s took the place of %s", s.Signer.Address().Hex(), tx.Hash().Hex()).
			WithFix("run the command again")
	}
	return fault.New("chain_dropped", "the node has dropped %s", tx.Hash().Hex()).WithFix("run the command again")
}

// failed asks why a transaction failed that did not fail when it was tried.
func (s *Sender) failed(ctx context.Context, tx *types.Transaction, receipt *types.Receipt) error {
	_, err := s.Node.CallContract(ctx, ethereum.CallMsg{From: s.Signer.Address(), To: tx.To(), Data: tx.Data()}, receipt.BlockNumber)
	if err != nil {
		return fmt.Errorf("in block %d: %w", receipt.BlockNumber, registry.Explain(err))
	}
	return fault.New("contract_refused", "the transaction failed in block %d", receipt.BlockNumber)
}

// Proposal is a call for somebody else to sign.
type Proposal struct {
	ChainID uint64         `json:"chain_id"`
	To      common.Address `json:"to"`
	Value   string         `json:"value"`
	Data    string         `json:"data"`
	Call    string         `json:"call"`
}

// Propose writes a call down.
func Propose(chainID uint64, c registry.Call) Proposal {
	return Proposal{chainID, c.To, "0", fmt.Sprintf("0x%x", c.Data), c.Describe()}
}

// Safe is the calls as Safe's transaction builder reads them (format 1.0).
func Safe(name string, at time.Time, proposals ...Proposal) map[string]any {
	var txs []map[string]any
	chain := uint64(0)
	for _, p := range proposals {
		chain = p.ChainID
		txs = append(txs, map[string]any{"to": p.To.Hex(), "value": p.Value, "data": p.Data, "contractMethod": nil, "contractInputsValues": nil})
	}
	return map[string]any{
		"version": "1.0", "chainId": fmt.Sprint(chain), "createdAt": at.UnixMilli(),
		"meta": map[string]any{"name": name}, "transactions": txs,
	}
}
