// SPDX-License-Identifier: Apache-2.0

// Package chain reads the governance contracts of a chain that it does not ask, but
// checks, and is an authority by them.
//
// Several endpoints, of different operators, must agree on the hash of one finalised
// block; the hash is computed here from the header. All else is proven against the
// header's state root by Merkle proofs, so that any endpoint will do and none is believed:
// code, implementation and storage of the registry and of the app. What the contracts
// would answer is computed from their storage, in their own order and words; that is
// possible because their code is ours, which is proven, too. A registry of other code is
// refused, and so is an app, unless the configuration takes foreign apps: then what the
// registry answers about one is computed by an EVM that sees nothing but proven code and
// storage.
//
// Grants come from finality, revocations from the head: a request is allowed only if both
// the finalised block and the newest block that enough endpoints agree on allow it. A
// finalised block that is too old, or older than one seen before, allows nothing.
//
// Trusted: that not as many endpoints as the threshold collude or are deceived together;
// the clock, for staleness. Attacker-controlled: every byte of an endpoint.
//
// Implements spec/governance.md §5 and §8; threats.md G03, G06.
package chain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/crypto"
	"github.com/ethereum/go-ethereum/ethclient"
	"github.com/ethereum/go-ethereum/ethdb/memorydb"
	"github.com/ethereum/go-ethereum/rlp"
	"github.com/ethereum/go-ethereum/rpc"
	"github.com/ethereum/go-ethereum/trie"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of an endpoint.
const (
	maxAnswer = 4 << 20 // bytes
	maxNodes  = 64      // of one proof
	maxNode   = 16 << 10
	maxCode   = 64 << 10
	// skew is how far a block's time may be ahead of ours.
	skew = 5 * time.Minute
	// fresh is how long a view of the chain serves.
	fresh = time.Second
)

// Config says which chain is read, and whom it is read from.
type Config struct {
	RPC       []string // endpoints, of different operators
	Threshold int      // how many must agree
	ChainID   uint64
	Registry  common.Address
	// Confirmations is how many blocks behind the head count as final; 0 takes the chain's
	// own finality.
	Confirmations uint64
	MaxStaleness  time.Duration // of the finalised block; 30 min
	// File remembers the highest finalised block, which never falls; required.
	File string
	Now  func() time.Time // time.Now if nil
	// Patience is how long an endpoint is waited for; 4 s. All are waited for, so that a
	// fast one that is behind does not speak for a slow one that is not.
	Patience time.Duration
	// Foreign lets apps have contracts of other code than ours. What they answer is
	// computed by an EVM from proven code and storage; what they may become, nobody knows.
	Foreign bool
}

// Endpoints reads a list of endpoints separated by commas.
func Endpoints(text string) []string {
	var out []string
	for url := range strings.SplitSeq(text, ",") {
		if url = strings.TrimSpace(url); url != "" {
			out = append(out, url)
		}
	}
	return out
}

// Reader reads the chain. Make it with Open.
type Reader struct {
	cfg       Config
	endpoints []*endpoint

	mu    sync.Mutex
	views struct {
		at          time.Time
		final, head *types.Header
	}
	floor uint64
}

// endpoint is one operator's node.
type endpoint struct {
	url string
	rpc *rpc.Client
	eth *ethclient.Client
	// failed says that it gave no answer the last time; others are then asked first.
	failed atomic.Bool
}

// limited cuts what an endpoint sends.
type limited struct{ http.RoundTripper }

func (l limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	}
	return resp, err
}

// Open returns a reader; no endpoint is asked yet. Codes chain_config, chain_floor.
func Open(cfg Config) (*Reader, error) {
	bad := func(format string, args ...any) (*Reader, error) {
		return nil, fault.New("chain_config", format, args...)
	}
	switch {
	case cfg.Threshold < 1 || cfg.Threshold > len(cfg.RPC) || len(cfg.RPC) > 32:
		return bad("%d of %d endpoints must agree: the threshold is 1 to their number, and there are 32 at most", cfg.Threshold, len(cfg.RPC))
	case cfg.ChainID == 0 || cfg.Registry == (common.Address{}):
		return bad("the chain's id and the registry's address are needed")
	case cfg.File == "":
		return bad("a file is needed that remembers the highest finalised block")
	}
	if cfg.MaxStaleness == 0 {
		cfg.MaxStaleness = 30 * time.Minute
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Patience == 0 {
		cfg.Patience = 4 * time.Second
	}
	r := &Reader{cfg: cfg}
	switch text, err := os.ReadFile(cfg.File); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fault.Wrap(err, "chain_floor", "read the highest block seen")
	default:
		if r.floor, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64); err != nil {
			return nil, fault.New("chain_floor", "%s is no block number", cfg.File).WithFix("an older state of the disk may have been put back; remove the file to begin anew")
		}
	}
	seen := map[string]bool{}
	for _, url := range cfg.RPC {
		if seen[url] || !strings.HasPrefix(url, "https://") && !strings.HasPrefix(url, "http://") {
			r.Close()
			return bad("endpoint %.100q is no URL of its own: one operator counts once", url)
		}
		seen[url] = true
		client := &http.Client{Timeout: cfg.Patience, Transport: limited{http.DefaultTransport.(*http.Transport).Clone()},
			CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("an endpoint may not redirect") }}
		c, err := rpc.DialOptions(context.Background(), url, rpc.WithHTTPClient(client))
		if err != nil {
			r.Close()
			return nil, fault.Wrap(err, "chain_config", "endpoint %.100q", url)
		}
		r.endpoints = append(r.endpoints, &endpoint{url: url, rpc: c, eth: ethclient.NewClient(c)})
	}
	return r, nil
}

// Close ends the connections.
func (r *Reader) Close() {
	for _, e := range r.endpoints {
		e.rpc.Close()
	}
}

// inquiry is one look at the chain. Who gives no answer has no say in the rest of it, so
// that it costs one patience.
type inquiry map[*endpoint]error

// each asks all endpoints at once and returns their answers in order; nil where there is
// none.
func each[T any](ctx context.Context, r *Reader, in inquiry, ask func(context.Context, *endpoint) (T, error)) ([]*T, []error) {
	out, errs := make([]*T, len(r.endpoints)), make([]error, len(r.endpoints))
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Patience)
	defer cancel()
	var wg sync.WaitGroup
	for i, e := range r.endpoints {
		if errs[i] = in[e]; errs[i] != nil {
			continue
		}
		wg.Go(func() {
			v, err := ask(ctx, e)
			e.failed.Store(err != nil)
			if err != nil {
				errs[i] = fmt.Errorf("%s: %w", e.url, err)
				return
			}
			out[i] = &v
		})
	}
	wg.Wait()
	for i, e := range r.endpoints {
		if errs[i] != nil {
			in[e] = errs[i]
		}
	}
	return out, errs
}

// willing are the endpoints, those that answered the last time first.
func (r *Reader) willing() []*endpoint {
	var out, last []*endpoint
	for _, e := range r.endpoints {
		if e.failed.Load() {
			last = append(last, e)
		} else {
			out = append(out, e)
		}
	}
	return append(out, last...)
}

// agree returns the header of the highest block, of those that pick names, on whose hash
// enough endpoints agree. Code chain_no_agreement.
func (r *Reader) agree(ctx context.Context, in inquiry, pick func(context.Context, *endpoint) (uint64, error)) (*types.Header, error) {
	numbers, errs := each(ctx, r, in, pick)
	var list []uint64
	for _, n := range numbers {
		if n != nil {
			list = append(list, *n)
		}
	}
	none := func(why string) error {
		return fault.Wrap(errors.Join(errs...), "chain_no_agreement", "%s, and %d of %d must", why, r.cfg.Threshold, len(r.endpoints)).
			WithFix("see whether the endpoints are of chain %d, in step and reachable", r.cfg.ChainID)
	}
	if len(list) < r.cfg.Threshold {
		return nil, none(fmt.Sprintf("%d endpoints answer", len(list)))
	}
	// The highest block that as many endpoints have as must agree on it.
	for i := range list {
		for j := i + 1; j < len(list); j++ {
			if list[j] > list[i] {
				list[i], list[j] = list[j], list[i]
			}
		}
	}
	number := list[r.cfg.Threshold-1]
	headers, failed := each(ctx, r, in, func(ctx context.Context, e *endpoint) (*types.Header, error) {
		h, err := e.eth.HeaderByNumber(ctx, new(big.Int).SetUint64(number))
		if err == nil && (h == nil || h.Number == nil || h.Number.Cmp(new(big.Int).SetUint64(number)) != 0) {
			err = errors.New("it shows another block than was asked for")
		}
		return h, err
	})
	errs = failed
	votes := map[common.Hash]int{}
	for _, h := range headers {
		if h == nil {
			continue
		}
		hash := (*h).Hash() // computed from the header, whatever the endpoint calls it
		if votes[hash]++; votes[hash] >= r.cfg.Threshold {
			return *h, nil
		}
	}
	return nil, none(fmt.Sprintf("the endpoints show %d different blocks of number %d", len(votes), number))
}

// identified refuses an endpoint of another chain.
func (r *Reader) identified(ctx context.Context, e *endpoint) error {
	id, err := e.eth.ChainID(ctx)
	if err == nil && (!id.IsUint64() || id.Uint64() != r.cfg.ChainID) {
		err = fmt.Errorf("it is of chain %s", id)
	}
	return err
}

// view returns the finalised block and the head. Codes chain_no_agreement, chain_stale,
// chain_rollback, chain_floor.
func (r *Reader) view(ctx context.Context) (final, head *types.Header, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.cfg.Now()
	if v := r.views; v.final != nil && now.Sub(v.at) < fresh && now.Sub(v.at) >= 0 {
		return v.final, v.head, nil
	}
	number := func(ctx context.Context, e *endpoint, tag rpc.BlockNumber) (uint64, error) {
		if err := r.identified(ctx, e); err != nil {
			return 0, err
		}
		h, err := e.eth.HeaderByNumber(ctx, big.NewInt(tag.Int64()))
		if err != nil {
			return 0, err
		}
		if h == nil || h.Number == nil || !h.Number.IsUint64() {
			return 0, errors.New("it shows no block")
		}
		return h.Number.Uint64(), nil
	}
	in := inquiry{}
	head, err = r.agree(ctx, in, func(ctx context.Context, e *endpoint) (uint64, error) { return number(ctx, e, rpc.LatestBlockNumber) })
	if err != nil {
		return nil, nil, err
	}
	final, err = r.agree(ctx, in, func(ctx context.Context, e *endpoint) (uint64, error) {
		if r.cfg.Confirmations == 0 {
			return number(ctx, e, rpc.FinalizedBlockNumber)
		}
		n := head.Number.Uint64()
		return n - min(n, r.cfg.Confirmations), nil
	})
	if err != nil {
		return nil, nil, err
	}
	age := now.Sub(time.Unix(int64(final.Time), 0))
	if age > r.cfg.MaxStaleness || age < -skew {
		return nil, nil, fault.New("chain_stale", "the finalised block %s is from %s, %s ago, more than %s", final.Number, time.Unix(int64(final.Time), 0).UTC().Format(time.RFC3339), age.Round(time.Second), r.cfg.MaxStaleness).
			WithFix("the endpoints may be cut off from the chain, or this machine's clock may be wrong")
	}
	n := final.Number.Uint64()
	if n < r.floor {
		return nil, nil, fault.New("chain_rollback", "the finalised block is %d, and %d was seen before", n, r.floor).
			WithFix("the endpoints are behind, or show another chain")
	}
	if head.Number.Uint64() < n {
		return nil, nil, fault.New("chain_rollback", "the head %s is before the finalised block %d", head.Number, n)
	}
	if n > r.floor {
		if err := durable.WriteFile(r.cfg.File, []byte(strconv.FormatUint(n, 10)+"\n"), 0o600); err != nil {
			return nil, nil, fault.Wrap(err, "chain_floor", "remember the highest block seen")
		}
		r.floor = n
	}
	r.views.at, r.views.final, r.views.head = now, final, head
	return final, head, nil
}

// forget lets the next view be agreed anew.
func (r *Reader) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.views.final = nil
}

// proof is eth_getProof's answer (EIP-1186).
type proof struct {
	AccountProof []hexutil.Bytes `json:"accountProof"`
	StorageProof []struct {
		Proof []hexutil.Bytes `json:"proof"`
	} `json:"storageProof"`
}

// account is what is proven of one.
type account struct {
	codeHash common.Hash // of nothing where there is no code
	words    map[common.Hash]common.Hash
	is       *types.StateAccount // nil: there is none
}

// verify holds a proof of an account and slots against a state root.
func verify(p *proof, root common.Hash, at common.Address, slots []common.Hash) (*account, error) {
	if len(p.StorageProof) != len(slots) {
		return nil, fmt.Errorf("%d proofs of %d slots", len(p.StorageProof), len(slots))
	}
	value, err := walk(root, crypto.Keccak256(at[:]), p.AccountProof)
	if err != nil {
		return nil, fmt.Errorf("account %s: %w", at, err)
	}
	out := &account{codeHash: types.EmptyCodeHash, words: map[common.Hash]common.Hash{}}
	storage := types.EmptyRootHash
	if value != nil {
		var a types.StateAccount
		if err := rlp.DecodeBytes(value, &a); err != nil || len(a.CodeHash) != common.HashLength {
			return nil, fmt.Errorf("account %s is malformed (%v)", at, err)
		}
		out.codeHash, storage, out.is = common.BytesToHash(a.CodeHash), a.Root, &a
	}
	for i, slot := range slots {
		if storage == types.EmptyRootHash {
			out.words[slot] = common.Hash{} // there is none, which the account's proof shows
			continue
		}
		value, err := walk(storage, crypto.Keccak256(slot[:]), p.StorageProof[i].Proof)
		if err != nil {
			return nil, fmt.Errorf("slot %s of %s: %w", slot, at, err)
		}
		var word []byte
		if value != nil {
			if err := rlp.DecodeBytes(value, &word); err != nil || len(word) > common.HashLength {
				return nil, fmt.Errorf("slot %s of %s is malformed (%v)", slot, at, err)
			}
		}
		out.words[slot] = common.BytesToHash(word)
	}
	return out, nil
}

// walk returns the value of a key in the trie of a root; nil where there is none, which is
// proven, too.
func walk(root common.Hash, key []byte, nodes []hexutil.Bytes) ([]byte, error) {
	if len(nodes) > maxNodes {
		return nil, fmt.Errorf("a proof of %d nodes", len(nodes))
	}
	db := memorydb.New()
	defer db.Close()
	for _, n := range nodes {
		if len(n) > maxNode {
			return nil, fmt.Errorf("a node of %d bytes", len(n))
		}
		if err := db.Put(crypto.Keccak256(n), n); err != nil {
			return nil, err
		}
	}
	return trie.VerifyProof(root, key, db)
}

// read returns what is proven of an account at a block, by whichever endpoint proves it.
// Code chain_proof.
func (r *Reader) read(ctx context.Context, block *types.Header, at common.Address, slots []common.Hash) (*account, error) {
	var errs []error
	slots = append([]common.Hash{}, slots...) // an empty list is written [], not null
	for _, e := range r.willing() {
		a, err := func() (*account, error) {
			ctx, cancel := context.WithTimeout(ctx, r.cfg.Patience)
			defer cancel()
			var raw json.RawMessage
			if err := e.rpc.CallContext(ctx, &raw, "eth_getProof", at, slots, hexutil.EncodeBig(block.Number)); err != nil {
				return nil, err
			}
			var p proof
			if err := json.Unmarshal(raw, &p); err != nil {
				return nil, err
			}
			return verify(&p, block.Root, at, slots)
		}()
		e.failed.Store(err != nil)
		if err == nil {
			return a, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", e.url, err))
	}
	return nil, fault.Wrap(errors.Join(errs...), "chain_proof", "no endpoint proves the state of %s at block %s", at, block.Number).
		WithFix("use endpoints that serve eth_getProof at finalised blocks")
}

// ours are the codes of our contracts, by name.
var ours = sync.OnceValues(func() (map[string]*contracts.Artefact, error) {
	out := map[string]*contracts.Artefact{}
	for _, name := range []string{contracts.KMS, contracts.App, contracts.Proxy} {
		a, err := contracts.Load(name)
		if err != nil {
			return nil, err
		}
		out[name] = a
	}
	return out, nil
})

// known proves that a proxy runs one of our contracts: its own code and its
// implementation's, in which the constructor wrote its own address (UUPS's __self).
func (r *Reader) known(ctx context.Context, block *types.Header, name string, at common.Address, a *account) error {
	list, err := ours()
	if err != nil {
		return err
	}
	foreign := func(why string) error {
		return fault.New("chain_foreign", "%s at block %s %s: what it answers cannot be computed from its storage", at, block.Number, why).
			WithFix("check the address; an app may have other code where chain.foreign is true, and for dstack verify with --chain-foreign")
	}
	if a.codeHash != crypto.Keccak256Hash(list[contracts.Proxy].DeployedBytecode) {
		return foreign("is no proxy of ours")
	}
	to := common.BytesToAddress(a.words[registry.ImplementationSlot].Bytes())
	implementation, err := r.read(ctx, block, to, nil)
	if err != nil {
		return err
	}
	code, err := r.code(ctx, block, to, implementation.codeHash)
	if err != nil {
		return err
	}
	want := list[name]
	if len(code) == len(want.DeployedBytecode) {
		itself := true
		for _, s := range want.Immutables {
			written := code[s.Start : s.Start+s.Length]
			itself = itself && bytes.Equal(written, common.LeftPadBytes(to[:], s.Length))
			clear(written)
		}
		if itself && bytes.Equal(code, want.DeployedBytecode) {
			return nil
		}
	}
	return foreign(fmt.Sprintf("runs %s, which is not the %s of this version", to, name))
}

// code returns the code with a hash. Code chain_proof.
func (r *Reader) code(ctx context.Context, block *types.Header, at common.Address, hash common.Hash) ([]byte, error) {
	var errs []error
	for _, e := range r.willing() {
		code, err := func() ([]byte, error) {
			ctx, cancel := context.WithTimeout(ctx, r.cfg.Patience)
			defer cancel()
			return e.eth.CodeAt(ctx, at, block.Number)
		}()
		switch {
		case err == nil && len(code) <= maxCode && crypto.Keccak256Hash(code) == hash:
			return code, nil
		case err == nil:
			err = errors.New("it shows other code than is proven")
		}
		errs = append(errs, fmt.Errorf("%s: %w", e.url, err))
	}
	return nil, fault.Wrap(errors.Join(errs...), "chain_proof", "no endpoint shows the code of %s", at)
}
