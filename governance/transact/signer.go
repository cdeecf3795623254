// SPDX-License-Identifier: Apache-2.0

package transact

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"io"
	"math/big"
	"os"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/crypto"
	"github.com/ethereum/go-ethereum/rpc"

	"github.com/dstack-go/dstack/internal/fault"
)

// Signer signs for one account.
type Signer interface {
	Address() common.Address
	Sign(ctx context.Context, tx *types.Transaction, chainID *big.Int) (*types.Transaction, error)
	// SignTyped signs a statement of EIP-712; use SignTyped, which checks the answer.
	SignTyped(ctx context.Context, t Typed) ([]byte, error)
	// Close forgets the key.
	Close()
}

// Typed is a statement of EIP-712: as wallets read it, and the hash that is signed.
type Typed struct {
	JSON   any
	Digest common.Hash
}

// SignTyped has a statement signed: r, s and 27 or 28. Codes: those of the signer;
// signer_answer.
func SignTyped(ctx context.Context, by Signer, t Typed) ([]byte, error) {
	signature, err := by.SignTyped(ctx, t)
	if err != nil {
		return nil, err
	}
	if who, ok := SignedTyped(t.Digest, signature); !ok || who != by.Address() {
		return nil, fault.New("signer_answer", "the signer signed something else, or with another key")
	}
	return signature, nil
}

// SignedTyped is the account that signed a hash; false: it is no signature that contracts
// take.
func SignedTyped(digest common.Hash, signature []byte) (common.Address, bool) {
	if len(signature) != crypto.SignatureLength {
		return common.Address{}, false
	}
	r, s, v := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:64]), signature[64]
	if v != 27 && v != 28 || !crypto.ValidateSignatureValues(v-27, r, s, true) {
		return common.Address{}, false
	}
	plain := append(append([]byte{}, signature[:64]...), v-27)
	key, err := crypto.SigToPub(digest[:], plain)
	if err != nil {
		return common.Address{}, false
	}
	return crypto.PubkeyToAddress(*key), true
}

type keySigner struct{ key *ecdsa.PrivateKey }

func (k *keySigner) Address() common.Address { return crypto.PubkeyToAddress(k.key.PublicKey) }

func (k *keySigner) Sign(_ context.Context, tx *types.Transaction, chainID *big.Int) (*types.Transaction, error) {
	return types.SignTx(tx, types.LatestSignerForChainID(chainID), k.key)
}

func (k *keySigner) SignTyped(_ context.Context, t Typed) ([]byte, error) {
	signature, err := crypto.Sign(t.Digest[:], k.key)
	if err != nil {
		return nil, fault.Wrap(err, "signer_refused", "sign the statement")
	}
	signature[64] += 27
	return signature, nil
}

func (k *keySigner) Close() {
	//lint:ignore SA1019 secp256k1 is none of the curves that have another way to wipe a key
	words := k.key.D.Bits()
	clear(words[:cap(words)])
}

// maxKeystore bounds a key file: real ones have 500 bytes.
const maxKeystore = 16 << 10

// OpenKeystore opens a key file of Ethereum's wallets. Codes: keystore_file,
// keystore_passphrase.
func OpenKeystore(path string, passphrase []byte) (Signer, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "keystore_file", "open the key file").WithFix("give it with --keystore")
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxKeystore+1))
	if err != nil {
		return nil, fault.Wrap(err, "keystore_file", "read the key file %s", path)
	}
	if len(text) > maxKeystore {
		return nil, fault.New("keystore_file", "%s is no key file: it has more than %d bytes", path, maxKeystore)
	}
	key, err := keystore.DecryptKey(text, string(passphrase))
	if errors.Is(err, keystore.ErrDecrypt) {
		return nil, fault.New("keystore_passphrase", "the passphrase does not open %s", path)
	}
	if err != nil {
		return nil, fault.Wrap(err, "keystore_file", "%s is no key file of this form", path)
	}
	return &keySigner{key.PrivateKey}, nil
}

// external asks another program to sign.
type external struct {
	client  *rpc.Client
	account common.Address
}

// DialExternal reaches a signer that speaks Clef's protocol (account_list,
// account_signTransaction, account_signTypedData) at a unix socket or a URL. Without an account it must have
// exactly one. Codes: signer_unreachable, signer_account.
func DialExternal(ctx context.Context, endpoint string, account *common.Address) (Signer, error) {
	client, err := rpc.DialContext(ctx, endpoint)
	if err != nil {
		return nil, fault.Wrap(err, "signer_unreachable", "reach the signer at %s", endpoint)
	}
	var have []common.Address
	if err := client.CallContext(ctx, &have, "account_list"); err != nil {
		client.Close()
		return nil, fault.Wrap(err, "signer_unreachable", "ask the signer at %s for its accounts", endpoint)
	}
	for _, a := range have {
		if account != nil && a == *account || account == nil && len(have) == 1 {
			return &external{client, a}, nil
		}
	}
	client.Close()
	if account != nil {
		return nil, fault.New("signer_account", "the signer has no account %s", account.Hex())
	}
	return nil, fault.New("signer_account", "the signer has %d accounts", len(have)).WithFix("name one with --from")
}

func (e *external) Address() common.Address { return e.account }

func (e *external) Close() { e.client.Close() }

// Sign asks. That the answer is what was asked for, Sender checks. Codes:
// signer_refused, signer_answer.
func (e *external) Sign(ctx context.Context, tx *types.Transaction, chainID *big.Int) (*types.Transaction, error) {
	var answer struct {
		Raw hexutil.Bytes `json:"raw"`
	}
	err := e.client.CallContext(ctx, &answer, "account_signTransaction", map[string]any{
		"from": e.account, "to": tx.To(), "gas": hexutil.Uint64(tx.Gas()), "nonce": hexutil.Uint64(tx.Nonce()),
		"maxFeePerGas": (*hexutil.Big)(tx.GasFeeCap()), "maxPriorityFeePerGas": (*hexutil.Big)(tx.GasTipCap()),
		"value": (*hexutil.Big)(tx.Value()), "data": hexutil.Bytes(tx.Data()), "chainId": (*hexutil.Big)(chainID),
	})
	if err != nil {
		return nil, fault.Wrap(err, "signer_refused", "the signer does not sign")
	}
	signed := new(types.Transaction)
	if err := signed.UnmarshalBinary(answer.Raw); err != nil {
		return nil, fault.Wrap(err, "signer_answer", "the signer's answer is no transaction")
	}
	return signed, nil
}

// SignTyped asks. Code signer_refused.
func (e *external) SignTyped(ctx context.Context, t Typed) ([]byte, error) {
	var signature hexutil.Bytes
	if err := e.client.CallContext(ctx, &signature, "account_signTypedData", e.account, t.JSON); err != nil {
		return nil, fault.Wrap(err, "signer_refused", "the signer does not sign")
	}
	return signature, nil
}
