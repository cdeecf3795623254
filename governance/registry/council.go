// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/big"
	"slices"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/internal/fault"
)

// Council is an owner of m of n.
type Council struct{ at common.Address }

// CouncilAt returns the council at an address.
func CouncilAt(at common.Address) Council { return Council{at} }

// Step is a call that a council makes.
type Step struct {
	Target common.Address
	Data   []byte
}

// Confirmation is a member's signature.
type Confirmation struct{ Member, Signature []byte }

func (c Council) call(signature string, args ...any) Call {
	return call(contracts.Council, c.at, signature, args...)
}

// SetMembers changes the council; it is the council's own call.
func (c Council) SetMembers(remove, add [][]byte, threshold uint64) Call {
	if remove == nil {
		remove = [][]byte{}
	}
	if add == nil {
		add = [][]byte{}
	}
	return c.call("setMembers(bytes[],bytes[],uint64)", remove, add, threshold)
}

// DigestView asks what members sign for steps.
func (c Council) DigestView(steps []Step, nonce, deadline uint64) Call {
	return c.call("digest((address,bytes)[],uint256,uint256)", steps, new(big.Int).SetUint64(nonce), new(big.Int).SetUint64(deadline))
}

// Execute makes steps that members have signed: anybody's call. The signatures go in the
// order of their members' hashes, which the contract demands.
func (c Council) Execute(steps []Step, deadline uint64, by []Confirmation) Call {
	by = slices.Clone(by)
	slices.SortFunc(by, func(a, b Confirmation) int {
		return bytes.Compare(crypto.Keccak256(a.Member), crypto.Keccak256(b.Member))
	})
	members, signatures := [][]byte{}, [][]byte{}
	for _, s := range by {
		members, signatures = append(members, s.Member), append(signatures, s.Signature)
	}
	list := mustABI(contracts.Council).Methods["setMembers"].Inputs[0].Type // bytes[]
	packed, err := abi.Arguments{{Type: list}, {Type: list}}.Pack(members, signatures)
	if err != nil {
		panic(err)
	}
	return c.call("execute((address,bytes)[],uint256,bytes)", steps, new(big.Int).SetUint64(deadline), packed)
}

// CouncilStatus is what a council says of itself.
type CouncilStatus struct {
	Members   [][]byte // an account's address, or a verifier's with a key (ERC-7913)
	Threshold uint64
	Nonce     uint64 // of the next execution
}

// Status asks a council. Codes: those of View.
func (c Council) Status(ctx context.Context, from Caller, block *big.Int) (s CouncilStatus, err error) {
	values, err := View(ctx, from, c.call("getSigners(uint64,uint64)", uint64(0), uint64(math.MaxUint64)), block)
	if err != nil {
		return s, err
	}
	s.Members = values[0].([][]byte)
	if values, err = View(ctx, from, c.call("threshold()"), block); err != nil {
		return s, err
	}
	s.Threshold = values[0].(uint64)
	if values, err = View(ctx, from, c.call("nonce()"), block); err != nil {
		return s, err
	}
	n := values[0].(*big.Int)
	if !n.IsUint64() {
		return s, fault.New("chain_answer", "the council's nonce is %s", n)
	}
	s.Nonce = n.Uint64()
	return s, nil
}

// DescribeData writes call data of any of the contracts, and reports whether it is of one.
func DescribeData(to common.Address, data []byte) (string, bool) {
	for _, name := range []string{contracts.KMS, contracts.App, contracts.Council} {
		m, err := Method(name, data)
		if err != nil {
			continue
		}
		// What is behind the arguments, or in another form of them, would not be shown.
		values, err := m.Inputs.Unpack(data[4:])
		if err != nil {
			continue
		}
		if again, err := m.Inputs.Pack(values...); err != nil || !bytes.Equal(again, data[4:]) {
			continue
		}
		return Call{Contract: name, To: to, Data: data}.Describe(), true
	}
	return fmt.Sprintf("0x%x", data), false
}
