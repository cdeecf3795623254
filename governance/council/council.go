// SPDX-License-Identifier: Apache-2.0

// Package council is proposals of an owner of m of n (contracts.Council): a file with the
// calls that the council is to make, which its members sign one after another, wherever
// they are, and anybody submits.
//
// Guarantees: what a member signs is computed here from the file's calls, chain, council,
// nonce and deadline, and from nothing that a node says; signatures that do not verify are
// not carried along.
//
// Trusted: the signers. Attacker-controlled: a proposal's file, whoever sent it; it is
// parsed strictly, has no text of its own, and is shown as what its calls are.
//
// Implements spec/governance.md §8; threats.md G06.
package council

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/big"
	"slices"
	"strconv"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of a proposal.
const (
	MaxFile       = 1 << 20
	maxCalls      = 64
	maxData       = 64 << 10
	maxSignatures = 256
	// MaxValid is how long signatures may be good.
	MaxValid = 90 * 24 * time.Hour
)

// Call is what the council is to call.
type Call struct {
	To   common.Address `json:"to"`
	Data hexutil.Bytes  `json:"data"`
}

// Signature is a member's.
type Signature struct {
	Member    common.Address `json:"member"`
	Signature hexutil.Bytes  `json:"signature"`
}

// Proposal is calls to be made together, or not at all.
type Proposal struct {
	ChainID    uint64         `json:"chain_id"`
	Council    common.Address `json:"council"`
	Nonce      uint64         `json:"nonce"`
	Deadline   int64          `json:"deadline"` // seconds since 1970
	Calls      []Call         `json:"calls"`
	Signatures []Signature    `json:"signatures"`
}

func bad(format string, args ...any) error {
	return fault.New("council_proposal", format, args...).WithFix("`dstack council propose` makes one")
}

// Parse reads a proposal and checks its signatures. Codes council_proposal,
// council_signature.
func Parse(text []byte) (*Proposal, error) {
	if len(text) > MaxFile {
		return nil, bad("a proposal of more than %d bytes", MaxFile)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	p := new(Proposal)
	if err := d.Decode(p); err != nil {
		return nil, fault.Wrap(err, "council_proposal", "this is no proposal")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, bad("something is behind the proposal")
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	had := p.Signatures
	p.Signatures = nil
	for _, s := range had {
		if err := p.Add(s); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (p *Proposal) check() error {
	switch {
	case p.ChainID == 0 || p.Council == (common.Address{}):
		return bad("the proposal names no chain, or no council")
	case len(p.Calls) == 0 || len(p.Calls) > maxCalls:
		return bad("a proposal of %d calls, not of 1 to %d", len(p.Calls), maxCalls)
	case p.Deadline <= 0 || p.Deadline > 1<<40:
		return bad("the proposal has no deadline")
	case len(p.Signatures) > maxSignatures:
		return bad("a proposal of %d signatures", len(p.Signatures))
	}
	for i, c := range p.Calls {
		if c.To == (common.Address{}) || len(c.Data) < 4 || len(c.Data) > maxData {
			return bad("call %d is none: it has %d bytes of data", i+1, len(c.Data))
		}
	}
	return nil
}

// New makes a proposal. Code council_proposal.
func New(chainID uint64, at common.Address, nonce uint64, deadline time.Time, calls ...Call) (*Proposal, error) {
	p := &Proposal{ChainID: chainID, Council: at, Nonce: nonce, Deadline: deadline.Unix(), Calls: calls, Signatures: []Signature{}}
	return p, p.check()
}

// Until is when signatures end to be good.
func (p *Proposal) Until() time.Time { return time.Unix(p.Deadline, 0).UTC() }

// steps are the calls as the contract has them.
func (p *Proposal) steps() []registry.Step {
	var out []registry.Step
	for _, c := range p.Calls {
		out = append(out, registry.Step{Target: c.To, Data: c.Data})
	}
	return out
}

// Hashes of EIP-712, as the contract has them.
var (
	domainType  = crypto.Keccak256([]byte("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"))
	callType    = crypto.Keccak256([]byte("Call(address target,bytes data)"))
	executeType = crypto.Keccak256([]byte("Execute(Call[] calls,uint256 nonce,uint256 deadline)Call(address target,bytes data)"))
	domainName  = "dstack council"
)

func word(n uint64) []byte { return common.BigToHash(new(big.Int).SetUint64(n)).Bytes() }

func address(a common.Address) []byte { return common.LeftPadBytes(a[:], 32) }

// Digest is what members sign.
func (p *Proposal) Digest() common.Hash {
	domain := crypto.Keccak256(domainType, crypto.Keccak256([]byte(domainName)), crypto.Keccak256([]byte("1")), word(p.ChainID), address(p.Council))
	var calls []byte
	for _, c := range p.Calls {
		calls = append(calls, crypto.Keccak256(callType, address(c.To), crypto.Keccak256(c.Data))...)
	}
	message := crypto.Keccak256(executeType, crypto.Keccak256(calls), word(p.Nonce), word(uint64(p.Deadline)))
	return crypto.Keccak256Hash([]byte{0x19, 0x01}, domain, message)
}

// typed is the same for wallets.
func (p *Proposal) typed() transact.Typed {
	type field struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	calls := []map[string]any{}
	for _, c := range p.Calls {
		calls = append(calls, map[string]any{"target": c.To.Hex(), "data": c.Data.String()})
	}
	return transact.Typed{Digest: p.Digest(), JSON: map[string]any{
		"types": map[string][]field{
			"EIP712Domain": {{"name", "string"}, {"version", "string"}, {"chainId", "uint256"}, {"verifyingContract", "address"}},
			"Call":         {{"target", "address"}, {"data", "bytes"}},
			"Execute":      {{"calls", "Call[]"}, {"nonce", "uint256"}, {"deadline", "uint256"}},
		},
		"primaryType": "Execute",
		"domain":      map[string]any{"name": domainName, "version": "1", "chainId": strconv.FormatUint(p.ChainID, 10), "verifyingContract": p.Council.Hex()},
		"message":     map[string]any{"calls": calls, "nonce": strconv.FormatUint(p.Nonce, 10), "deadline": strconv.FormatInt(p.Deadline, 10)},
	}}
}

// Sign adds a member's signature. Codes: those of transact.SignTyped.
func (p *Proposal) Sign(ctx context.Context, by transact.Signer) error {
	signature, err := transact.SignTyped(ctx, by, p.typed())
	if err != nil {
		return err
	}
	return p.Add(Signature{by.Address(), signature})
}

// Add adds a signature, unless its member's is there. Code council_signature.
func (p *Proposal) Add(s Signature) error {
	if who, ok := transact.SignedTyped(p.Digest(), s.Signature); !ok || who != s.Member {
		return fault.New("council_signature", "the signature of %s is not over these calls", s.Member.Hex()).WithFix("the proposal was changed after it was signed: propose it again")
	}
	if !slices.ContainsFunc(p.Signatures, func(o Signature) bool { return o.Member == s.Member }) {
		p.Signatures = append(p.Signatures, s)
	}
	return nil
}

// Merge adds the signatures of the same proposal. Code council_mismatch.
func (p *Proposal) Merge(other *Proposal) error {
	if p.Digest() != other.Digest() {
		return fault.New("council_mismatch", "the files are of different proposals").WithFix("give files that were made of one by `dstack council confirm`")
	}
	for _, s := range other.Signatures {
		if err := p.Add(s); err != nil {
			return err
		}
	}
	return nil
}

// Standing is what a council makes of a proposal.
type Standing struct {
	Signed    []common.Address `json:"signed"`  // members that have
	Missing   []common.Address `json:"missing"` // members that have not
	Strangers []common.Address `json:"strangers"`
	Threshold uint64           `json:"threshold"`
}

// Enough reports whether the council makes the calls.
func (s Standing) Enough() bool { return uint64(len(s.Signed)) >= s.Threshold }

// Hold holds a proposal against the council's state. Codes council_nonce,
// council_expired.
func (p *Proposal) Hold(s registry.CouncilStatus, now time.Time) (*Standing, error) {
	switch {
	case s.Nonce != p.Nonce:
		return nil, fault.New("council_nonce", "the proposal has the nonce %d, the council's next is %d", p.Nonce, s.Nonce).
			WithFix("another proposal was executed since: propose it again")
	case now.After(p.Until()):
		return nil, fault.New("council_expired", "the signatures were good until %s", p.Until().Format(time.RFC3339)).WithFix("propose it again")
	}
	out := &Standing{Threshold: s.Threshold, Signed: []common.Address{}, Missing: []common.Address{}, Strangers: []common.Address{}}
	has := func(a common.Address) bool {
		return slices.ContainsFunc(p.Signatures, func(s Signature) bool { return s.Member == a })
	}
	for _, m := range s.Members {
		if len(m) != common.AddressLength {
			continue // of another kind of key, which signs elsewhere
		}
		if a := common.BytesToAddress(m); has(a) {
			out.Signed = append(out.Signed, a)
		} else {
			out.Missing = append(out.Missing, a)
		}
	}
	for _, sig := range p.Signatures {
		if !slices.Contains(out.Signed, sig.Member) {
			out.Strangers = append(out.Strangers, sig.Member)
		}
	}
	return out, nil
}

// Execution is the call that submits a proposal with what its members signed. Code
// council_signatures.
func (p *Proposal) Execution(s *Standing) (registry.Call, error) {
	if !s.Enough() {
		return registry.Call{}, fault.New("council_signatures", "%d of %d members that are needed have signed", len(s.Signed), s.Threshold).
			WithFix("`dstack council confirm`, by one of those that `dstack council show` lists as missing")
	}
	var by []registry.Confirmation
	for _, sig := range p.Signatures {
		if slices.Contains(s.Signed, sig.Member) {
			by = append(by, registry.Confirmation{Member: sig.Member.Bytes(), Signature: sig.Signature})
		}
	}
	return registry.CouncilAt(p.Council).Execute(p.steps(), uint64(p.Deadline), by), nil
}

// Digested asks the contract what it would have its members sign.
func (p *Proposal) Digested() registry.Call {
	return registry.CouncilAt(p.Council).DigestView(p.steps(), p.Nonce, uint64(p.Deadline))
}
