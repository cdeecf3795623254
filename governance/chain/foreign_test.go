// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"encoding/json"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/core/types"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

// stranger is an app's contract of somebody else's code (contracts/test/Foreign.sol).
type stranger struct {
	w   *world
	at  common.Address
	abi abi.ABI
}

// stranger deploys one, and registers it.
func (w *world) stranger() *stranger {
	w.t.Helper()
	text, err := os.ReadFile("../contracts/testdata/ForeignApp.json")
	if err != nil {
		w.t.Fatal(err)
	}
	var built struct {
		ABI      json.RawMessage `json:"abi"`
		Bytecode hexutil.Bytes   `json:"bytecode"`
	}
	if err := json.Unmarshal(text, &built); err != nil {
		w.t.Fatal(err)
	}
	s := &stranger{w: w}
	if s.abi, err = abi.JSON(strings.NewReader(string(built.ABI))); err != nil {
		w.t.Fatal(err)
	}
	w.call(nil, "anvil_impersonateAccount", w.chain.Owner)
	s.at = w.transact(nil, built.Bytecode).ContractAddress
	w.do(registry.KMSAt(w.chain.Registry).RegisterApp(s.at))
	return s
}

// transact sends from the owner, and waits.
func (w *world) transact(to *common.Address, data []byte) *types.Receipt {
	w.t.Helper()
	var hash common.Hash
	w.call(&hash, "eth_sendTransaction", map[string]any{"from": w.chain.Owner, "to": to, "data": hexutil.Bytes(data), "gas": "0x5b8d80"})
	for range 100 {
		if r, err := w.node.TransactionReceipt(w.t.Context(), hash); err == nil {
			if r.Status != types.ReceiptStatusSuccessful {
				w.t.Fatal("the transaction failed")
			}
			return r
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.t.Fatal("the transaction is in no block")
	return nil
}

func (s *stranger) do(name string, args ...any) {
	s.w.t.Helper()
	data, err := s.abi.Pack(name, args...)
	if err != nil {
		s.w.t.Fatal(err)
	}
	s.w.transact(&s.at, data)
	s.w.finalise()
}

// Moods of a ForeignApp.
const (
	honest int64 = iota
	reverts
	burns
	malformed
	readsOldHash
	readsBlobFee
	talks
	readsMuch
	describes
)

func TestThreat_G03_AForeignAppIsExecutedOverProvenState(t *testing.T) {
	w := newWorldOf(t, devchain.Config{BlockTime: 24 * time.Hour}) // no block by the clock: the node proves badly while it makes one
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.stranger()
	app.do("allow", [32]byte(compose), true)
	lies := newLiar(t, w.chain.RPC)
	foreign := func(threshold int, urls ...string) *Authority {
		t.Helper()
		a, err := w.openBy(func(c *Config) { c.Foreign = true }, threshold, urls...)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a, q := foreign(1, lies.URL), question(app.at, compose)

	w.want(w.authority(1, w.chain.RPC), q, "chain_foreign") // unless it is configured
	w.want(a, q, "")
	s, err := a.Standing(t.Context(), q)
	if err != nil || !s.Allowed || !s.Foreign || s.Frozen || s.Notice != 0 || !s.Announced.IsZero() || !strings.HasSuffix(s.By, " foreign app") {
		t.Errorf("%+v, %v", s, err)
	}
	d := w.want(a, question(app.at, other), "app_refuses")
	if d.Reason != `the app's contract says "Not on the list"` {
		t.Errorf("%+v", d)
	}
	noImage := q
	noImage.Boot.OSImageHash = make([]byte, 32)
	w.want(a, noImage, "os_image_not_allowed")
	// Apps of ours are answered as ever.
	own := w.app(nil)
	w.finalise()
	w.want(a, question(own, compose), "")
	if s, err := a.Standing(t.Context(), question(own, compose)); err != nil || s.Foreign {
		t.Errorf("%+v, %v", s, err)
	}

	// A grant counts when it is final, a revocation at once.
	data, err := app.abi.Pack("allow", [32]byte(other), true)
	if err != nil {
		t.Fatal(err)
	}
	w.transact(&app.at, data)
	w.want(a, question(app.at, other), "app_refuses")
	w.finalise()
	w.want(a, question(app.at, other), "")
	if data, err = app.abi.Pack("allow", [32]byte(other), false); err != nil {
		t.Fatal(err)
	}
	w.transact(&app.at, data)
	w.want(a, question(app.at, other), "app_refuses")

	// Whatever an endpoint shows, it is proven or not there.
	for name, c := range map[string]struct {
		answer func(string, json.RawMessage) json.RawMessage
		code   string
	}{
		"no hint":      {edit("eth_createAccessList", "", func(json.RawMessage) any { return "no" }), ""},
		"nothing read": {edit("eth_createAccessList", "accessList", func(json.RawMessage) any { return []any{} }), ""},
		"other places read": {edit("eth_createAccessList", "accessList", func(json.RawMessage) any {
			return types.AccessList{{Address: common.Address{1}, StorageKeys: []common.Hash{{1}, {2}}}, {Address: app.at, StorageKeys: []common.Hash{{3}}}}
		}), ""},
		"too much read": {edit("eth_createAccessList", "accessList", func(json.RawMessage) any {
			return types.AccessList{{Address: app.at, StorageKeys: make([]common.Hash, 100_000)}}
		}), ""},
		"altered storage": {edit("eth_getProof", "storageProof", func(raw json.RawMessage) any {
			var list []map[string]json.RawMessage
			json.Unmarshal(raw, &list)
			for _, p := range list {
				var nodes []hexutil.Bytes
				json.Unmarshal(p["proof"], &nodes)
				for _, n := range nodes {
					n[len(n)-1] ^= 1
				}
				p["proof"], _ = json.Marshal(nodes)
			}
			return list
		}), "chain_proof"},
		// The registry's code is ours, which is not asked for by its length.
		"other code": {edit("eth_getCode", "", func(raw json.RawMessage) any {
			var code hexutil.Bytes
			json.Unmarshal(raw, &code)
			if n := len(code); n > 0 && n < 4000 { // the foreign ones'
				code[n-1] ^= 1
			}
			return code
		}), "chain_proof"},
	} {
		lies.lie(c.answer, nil)
		t.Log(name)
		w.want(a, q, c.code)
		if c.code == "" {
			w.want(a, question(app.at, other), "app_refuses")
		}
	}
	lies.lie(nil, nil)

	// What the registry makes of bad answers, and what nobody can prove.
	for mood, want := range map[int64]struct{ code, reason string }{
		reverts:      {"app_refuses", "app policy reverted"},
		burns:        {"app_refuses", "app policy reverted"},
		malformed:    {"app_refuses", "app policy is malformed"},
		readsOldHash: {"chain_execution", ""},
		readsBlobFee: {"chain_execution", ""},
		readsMuch:    {"chain_execution", ""},
		talks:        {"app_refuses", `\x00\x00`},
	} {
		app.do("behave", big.NewInt(mood))
		d := w.want(a, q, want.code)
		if !strings.Contains(d.Reason, want.reason) || len(d.Reason) > 5*maxReason {
			t.Errorf("mood %d: %q", mood, d.Reason)
		}
	}

	// Its view of a block is the node's.
	app.do("behave", big.NewInt(describes))
	head, err := w.node.HeaderByNumber(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	call, err := registry.KMSAt(w.chain.Registry).Allowed(governance.App, q.Boot, true)
	if err != nil {
		t.Fatal(err)
	}
	values, err := registry.View(t.Context(), w.node, call, head.Number)
	if err != nil {
		t.Fatal(err)
	}
	_, no, err := a.ask(t.Context(), head, q)
	if err != nil || no == nil || len(values[1].(string)) != 66 || no.reason != said(values[1].(string)) {
		t.Errorf("the node computes %q, here it is %+v (%v)", values[1], no, err)
	}

	// A registry of other code is none.
	r, err := Open(Config{RPC: []string{w.chain.RPC}, Threshold: 1, ChainID: w.chain.ChainID, Registry: app.at, File: t.TempDir() + "/f", MaxStaleness: 3 * time.Hour, Now: w.now, Foreign: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := NewAuthority(r).Decide(t.Context(), q); fault.Code(err) != "chain_foreign" {
		t.Errorf("a foreign registry: %v", err)
	}
}
