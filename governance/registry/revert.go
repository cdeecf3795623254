// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/rpc"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/internal/fault"
)

// Revert is why a contract refused a call.
type Revert struct {
	Name string // of the custom error; Error or Panic for Solidity's own
	Args []any
}

// maxRevert bounds what is read of a contract's word; ours have less.
const maxRevert = 4096

// ParseRevert decodes what a contract returned on refusing. It reports false for data of
// no error that the contracts have.
func ParseRevert(data []byte) (Revert, bool) {
	if len(data) < 4 || len(data) > maxRevert {
		return Revert{}, false
	}
	for _, name := range []string{contracts.KMS, contracts.App, contracts.Council, contracts.Proxy} {
		for _, e := range mustABI(name).Errors {
			if !bytes.Equal(e.ID[:4], data[:4]) {
				continue
			}
			args, err := e.Inputs.Unpack(data[4:])
			if err != nil {
				return Revert{}, false
			}
			return Revert{e.Name, args}, true
		}
	}
	text, err := abi.UnpackRevert(data)
	if err != nil {
		return Revert{}, false
	}
	if bytes.Equal(data[:4], []byte{0x4e, 0x48, 0x7b, 0x71}) {
		return Revert{"Panic", []any{text}}, true
	}
	return Revert{"Error", []any{text}}, true
}

// Err says a refusal in words. Codes: contract_owner, contract_revoker, contract_frozen,
// contract_notice, contract_initialised, contract_order, contract_argument,
// contract_signatures, contract_upgrade, contract_refused.
func (r Revert) Err() error {
	address := func(i int) string { return r.Args[i].(common.Address).Hex() }
	number := func(i int) uint64 { return r.Args[i].(uint64) }
	switch r.Name {
	case "OwnableUnauthorizedAccount":
		return fault.New("contract_owner", "%s is not the owner, and only the owner may do this", address(0)).
			WithFix("`status` says who is; sign with that account, or give the call to it with --dry-run")
	case "OwnableInvalidOwner":
		return fault.New("contract_argument", "%s cannot be an owner", address(0))
	case "NotRevoker":
		return fault.New("contract_revoker", "%s is neither the owner nor the guardian, and only they may revoke", address(0)).
			WithFix("`status` says who they are")
	case "NotTheAppsOwner":
		return fault.New("contract_owner", "%s is not the owner of the app", address(0))
	case "OwnerIsNeeded":
		return fault.New("contract_owner", "the registry cannot be without an owner").WithFix("transfer it instead")
	case "AppFrozen":
		return fault.New("contract_frozen", "the app is frozen: nothing can be added to it ever again").
			WithFix("deploy another app; revocations go on working")
	case "NoticeNotOver":
		at := time.Unix(int64(min(number(0), 1<<40)), 0).UTC()
		return fault.New("contract_notice", "this was announced and takes effect no sooner than %s", at.Format(time.RFC3339)).
			WithFix("run the same command again after that time")
	case "NoticeTooLong":
		return fault.New("contract_argument", "a notice of %d s is more than the contract's limit of 365 days", number(0))
	case "NothingAnnounced":
		return fault.New("contract_argument", "nothing of the policy %s with the value %s is announced", policyName(r.Args[0]), show(r.Args[1]))
	case "ZeroValue":
		return fault.New("contract_argument", "the value is zero or empty, which no list may have")
	case "NotAnApp":
		return fault.New("contract_argument", "%s is no app's contract: it does not say that it has isAppAllowed (ERC-165)", address(0))
	case "GatewayMustBeNamed":
		return fault.New("contract_argument", "a gateway must be named: any is no name")
	case "OsImageHasEpoch":
		return fault.New("contract_order", "the image is listed or announced with the security epoch %d, which stays", number(0)).
			WithFix("give that epoch, or remove the image first")
	case "OsEpochOutOfOrder":
		return fault.New("contract_order", "the security epoch only rises, and is %d", number(0))
	case "KeyEpochOutOfOrder":
		return fault.New("contract_order", "key epochs are counted one by one: the current is given as %d, the oldest as %d", number(0), number(1))
	case "InvalidInitialization":
		return fault.New("contract_initialised", "the contract is initialised already")
	case "NotInitializing":
		return fault.New("contract_refused", "the contract is not being initialised")
	case "UUPSUnauthorizedCallContext":
		return fault.New("contract_upgrade", "an upgrade must be asked of the proxy, not of the code behind it")
	case "UUPSUnsupportedProxiableUUID", "ERC1967InvalidImplementation", "ERC1967NonPayable", "ERC1967ProxyUninitialized", "AddressEmptyCode":
		return fault.New("contract_upgrade", "the new code cannot be that of this proxy (%s)", r)
	case "FailedCall":
		return fault.New("contract_refused", "a call that the contract made failed without a reason")
	case "ValueBeforeEffect":
		return fault.New("contract_argument", "an announcement takes no ether")
	case "EmptyTarget":
		return fault.New("contract_argument", "there is no contract at %s", address(0))
	case "Expired":
		return fault.New("contract_signatures", "the signatures were good until %s", show(deadline(r.Args[0])))
	case "NotEnoughSignatures":
		return fault.New("contract_signatures", "not enough members of the council have signed these calls with its present nonce")
	case "OnlyCouncil":
		return fault.New("contract_owner", "%s is not the council, which alone may change itself", address(0))
	case "MultiSignerERC7913AlreadyExists":
		return fault.New("contract_argument", "%s is a member of the council already", show(r.Args[0]))
	case "MultiSignerERC7913NonexistentSigner":
		return fault.New("contract_argument", "%s is no member of the council", show(r.Args[0]))
	case "MultiSignerERC7913InvalidSigner":
		return fault.New("contract_argument", "%s cannot be a member of a council", show(r.Args[0]))
	case "MultiSignerERC7913UnreachableThreshold":
		return fault.New("contract_argument", "a council of %d cannot need %d signatures", number(0), number(1))
	case "MultiSignerERC7913ZeroThreshold":
		return fault.New("contract_argument", "a council must need one signature at least")
	case "Error":
		return fault.New("contract_refused", "the contract says: %q", r.Args[0])
	case "Panic":
		return fault.New("contract_refused", "the contract failed: %s", r.Args[0])
	}
	return fault.New("contract_refused", "the contract refused: %s", r)
}

func (r Revert) String() string {
	s := r.Name + "("
	for i, a := range r.Args {
		if i > 0 {
			s += ", "
		}
		s += show(a)
	}
	return s + ")"
}

func policyName(v any) string {
	id := common.Hash(v.([32]byte))
	if word := PolicyWord(id); word != "" {
		return word
	}
	return id.Hex()
}

// deadline is a time of the council, whose numbers are wider than time's.
func deadline(v any) any {
	if n, ok := v.(*big.Int); ok && n.IsInt64() && n.Int64() < 1<<40 {
		return time.Unix(n.Int64(), 0).UTC().Format(time.RFC3339)
	}
	return v
}

// Explain turns what a node answers into an error with a code: a contract's refusal into
// its sentence (codes of Revert.Err), anything else into chain_node.
func Explain(err error) error {
	if err == nil || fault.Code(err) != "" {
		return err
	}
	var de rpc.DataError
	if errors.As(err, &de) {
		var data []byte
		if text, ok := de.ErrorData().(string); ok {
			data, _ = hexutil.Decode(text)
		}
		if r, ok := ParseRevert(data); ok {
			return r.Err()
		}
		if len(data) > 0 {
			return fault.New("contract_refused", "the contract refused in words that are none of ours: %s", show(data[:min(len(data), maxRevert)]))
		}
	}
	var re rpc.Error
	if errors.As(err, &re) {
		if re.ErrorCode() == 3 {
			return fault.Wrap(err, "contract_refused", "the contract refused and gave no reason")
		}
		return fault.Wrap(err, "chain_node", "the node answers with an error (%d)", re.ErrorCode())
	}
	return fault.Wrap(err, "chain_unreachable", "ask the chain's node").WithFix("check the address of the node and that it runs")
}

// describeValue writes a policy's value as what it is.
func describeValue(word string, v common.Hash) string {
	switch word {
	case "allow-any-device", "require-tcb-up-to-date", "upgrades-disabled", "frozen", "platform-required":
		return ""
	case "registered-app", "app-implementation", "guardian":
		return common.BytesToAddress(v[:]).Hex()
	case "notice":
		if n := v.Big(); n.IsUint64() {
			return (time.Duration(min(n.Uint64(), 1<<33)) * time.Second).String()
		}
	case "key-epoch", "oldest-key-epoch", "min-os-epoch":
		return v.Big().String()
	}
	return fmt.Sprintf("%x", v[:])
}
