// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"bytes"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/rpc"

	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

// call asks the world's node for what only a development node does.
func (w *world) call(result any, method string, args ...any) {
	w.t.Helper()
	c, err := rpc.DialContext(w.t.Context(), w.chain.RPC)
	if err != nil {
		w.t.Fatal(err)
	}
	defer c.Close()
	if err := c.CallContext(w.t.Context(), result, method, args...); err != nil {
		w.t.Fatal(err)
	}
}

// says is what the contract itself answers at the head.
func (w *world) says(q governance.Request) bool {
	w.t.Helper()
	call, err := registry.KMSAt(w.chain.Registry).Allowed(q.Role, q.Boot, true)
	if err != nil {
		w.t.Fatal(err)
	}
	values, err := registry.View(w.t.Context(), w.node, call, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return values[0].(bool)
}

// Threat G03: a grant that a reorganisation takes back before it was final released
// nothing; and a finalised block that is taken back is not followed.
func TestThreat_G03_AReorganisedGrantNeverReleases(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	const lag = 40 // blocks behind the head that are not final yet: more than this test takes
	a, err := w.openBy(func(c *Config) { c.Confirmations = lag }, 1, w.chain.RPC)
	if err != nil {
		t.Fatal(err)
	}
	w.want(a, question(app, compose), "")
	granted := question(app, other)

	var before string
	w.call(&before, "evm_snapshot")
	w.do(registry.AppAt(app).AddComposeHash(other))
	if !w.says(granted) {
		t.Fatal("the head does not have the grant")
	}
	w.want(a, granted, "compose_hash_not_allowed")
	if err := w.chain.Mine(t.Context(), lag/2); err != nil {
		t.Fatal(err)
	}
	w.want(a, granted, "compose_hash_not_allowed")
	// Another branch wins, which is longer and has no grant.
	w.call(nil, "evm_revert", before)
	if err := w.chain.Mine(t.Context(), 2*lag); err != nil {
		t.Fatal(err)
	}
	if w.says(granted) {
		t.Fatal("the grant was not taken back")
	}
	w.want(a, granted, "compose_hash_not_allowed")
	w.want(a, question(app, compose), "")

	// The same grant, which stays, releases when it is final and not a block before.
	w.call(&before, "evm_snapshot")
	out := w.do(registry.AppAt(app).AddComposeHash(other))
	for {
		d, err := a.Decide(t.Context(), granted)
		if err != nil {
			t.Fatal(err)
		}
		head, err := w.node.BlockNumber(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if d.Allowed {
			if head < out.Block+lag {
				t.Errorf("released at head %d, granted in %d", head, out.Block)
			}
			break
		}
		if d.Code != "compose_hash_not_allowed" || head > out.Block+2*lag {
			t.Fatalf("%+v at %d", d, head)
		}
		if err := w.chain.Mine(t.Context(), 5); err != nil {
			t.Fatal(err)
		}
	}
	// A revocation counts before it is final, and is gone when a reorganisation takes it.
	var after string
	w.call(&after, "evm_snapshot")
	w.do(registry.AppAt(app).RemoveComposeHash(other))
	w.want(a, granted, "compose_hash_not_allowed")
	w.call(nil, "evm_revert", after)
	if err := w.chain.Mine(t.Context(), 5); err != nil {
		t.Fatal(err)
	}
	w.want(a, granted, "")
	// What was final is taken back: nothing is decided by that chain.
	w.call(nil, "evm_revert", before)
	w.want(a, granted, "chain_rollback")
	w.want(a, question(app, compose), "chain_rollback")
}

// frozen has an endpoint show an old block as the newest.
func frozen(l *liar, block uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ask = func(body []byte) []byte {
		old := fmt.Appendf(nil, `"0x%x"`, block)
		return bytes.ReplaceAll(bytes.ReplaceAll(body, []byte(`"latest"`), old), []byte(`"finalized"`), old)
	}
}

// Threat G03: endpoints that are behind hide no revocation as long as fewer of them than
// must agree are; and when too many are, the age of their block tells.
func TestThreat_G03_StaleEndpointsHideNoRevocation(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	q := question(app, compose)
	one, two, three := newLiar(t, w.chain.RPC), newLiar(t, w.chain.RPC), newLiar(t, w.chain.RPC)
	n, err := w.node.BlockNumber(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	urls := []string{one.URL, two.URL, three.URL}
	w.want(w.authority(2, urls...), q, "")
	frozen(one, n)
	w.do(registry.AppAt(app).RemoveComposeHash(compose))
	w.want(w.authority(2, urls...), q, "compose_hash_not_allowed")
	// Two of three show the old block, which is what the threshold trusts them for; but
	// only for so long.
	frozen(two, n)
	w.want(w.authority(2, urls...), q, "")
	w.want(w.authority(3, urls...), q, "")
	w.advance(4 * time.Hour)
	w.want(w.authority(2, urls...), q, "chain_stale")
	// Where the newest was seen before, they do not get that far.
	a, err := w.openBy(func(c *Config) { c.MaxStaleness = 100 * time.Hour }, 1, three.URL)
	if err != nil {
		t.Fatal(err)
	}
	w.finalise()
	w.want(a, q, "compose_hash_not_allowed")
	frozen(three, n)
	w.want(a, q, "chain_rollback")
}

// Threat G03: an endpoint that does not answer costs one patience, and no decision; and
// fewer than must agree decide nothing.
func TestThreat_G03_SlowAndSilentEndpoints(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	q := question(app, compose)
	slow, good, other := newLiar(t, w.chain.RPC), newLiar(t, w.chain.RPC), newLiar(t, w.chain.RPC)
	end := make(chan struct{})
	t.Cleanup(func() { close(end) }) // before the servers close, which wait for it
	hang := func(http.ResponseWriter) bool { <-end; return true }
	slow.lie(nil, hang)
	patient := func(c *Config) { c.Patience = time.Second }
	for name, urls := range map[string][]string{"first": {slow.URL, good.URL, other.URL}, "last": {good.URL, other.URL, slow.URL}} {
		a, err := w.openBy(patient, 2, urls...)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		w.want(a, q, "")
		t.Logf("%s: %s", name, time.Since(began).Round(time.Millisecond))
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the slow endpoint %s of three: %s", name, took)
		}
	}
	other.lie(nil, hang)
	a, err := w.openBy(patient, 2, slow.URL, good.URL, other.URL)
	if err != nil {
		t.Fatal(err)
	}
	w.want(a, q, "chain_no_agreement")
	// Nobody at all, and one who comes back.
	gone, err := w.openBy(patient, 1, "http://127.0.0.1:1")
	if err != nil {
		t.Fatal(err)
	}
	w.want(gone, q, "chain_no_agreement")
	other.lie(nil, nil)
	w.want(a, q, "")
}

// Threat G03: two of three that are of another history do not outvote it silently: the
// agreed block must prove the registry, and the one that was seen before is not left.
func TestThreat_G03_AForkHasNoContracts(t *testing.T) {
	w, fork := newWorld(t), newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	fork.finalise()
	q := question(app, compose)
	mirror := newLiar(t, fork.chain.RPC)
	urls := []string{w.chain.RPC, fork.chain.RPC, mirror.URL}
	w.want(w.authority(3, urls...), q, "chain_no_agreement")
	w.want(w.authority(2, w.chain.RPC, fork.chain.RPC), q, "chain_no_agreement")
	if d, err := w.authority(2, urls...).Decide(t.Context(), q); d.Allowed || fault.Code(err) != "chain_foreign" {
		t.Errorf("%+v %v", d, err)
	}
	file := filepath.Join(t.TempDir(), "floor")
	a, err := w.openBy(func(c *Config) { c.File = file }, 1, w.chain.RPC)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.chain.Mine(t.Context(), 500); err != nil {
		t.Fatal(err)
	}
	w.want(a, q, "")
	if a, err = w.openBy(func(c *Config) { c.File = file }, 2, urls...); err != nil {
		t.Fatal(err)
	}
	w.want(a, q, "chain_rollback")
}

// Threat G07: code of the same length that is not ours to the byte is foreign, whatever the
// state's root vouches for; and so is code that takes itself for another contract's.
func TestThreat_G07_CodeIsComparedToTheByte(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	a := w.authority(1, w.chain.RPC)
	list, err := ours()
	if err != nil {
		t.Fatal(err)
	}
	for name, at := range map[string]common.Address{contracts.KMS: w.chain.KMSImplementation, contracts.App: w.chain.AppImplementation} {
		code, err := w.node.CodeAt(t.Context(), at, nil)
		if err != nil {
			t.Fatal(err)
		}
		immutable := list[name].Immutables
		if len(immutable) == 0 {
			t.Fatal("nothing is written by a constructor")
		}
		for what, i := range map[string]int{"its first byte": 0, "its last byte": len(code) - 1, "a byte in between": len(code) / 2, "its own address": immutable[0].Start + immutable[0].Length - 1} {
			forged := bytes.Clone(code)
			forged[i] ^= 1
			w.call(nil, "anvil_setCode", at, hexutil.Bytes(forged))
			w.finalise()
			if d, err := a.Decide(t.Context(), question(app, compose)); d.Allowed || fault.Code(err) != "chain_foreign" {
				t.Errorf("%s with another %s: %+v %v", name, what, d, err)
			}
		}
		w.call(nil, "anvil_setCode", at, hexutil.Bytes(code))
		w.finalise()
		w.want(a, question(app, compose), "")
	}
	// The proxy itself, too.
	code, err := w.node.CodeAt(t.Context(), app, nil)
	if err != nil {
		t.Fatal(err)
	}
	code[len(code)-1] ^= 1
	w.call(nil, "anvil_setCode", app, hexutil.Bytes(code))
	w.finalise()
	w.want(a, question(app, compose), "chain_foreign")
}
