// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/stack"
)

// Whose account a deployment is told to sign with owns the app's contract; what only the
// registry's owner may do, the stack's own key does.
func TestADeploymentIsSignedAsTold(t *testing.T) {
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	st := &stack.Stack{Dir: t.TempDir()}
	d, err := st.StartChain(t.Context(), 0, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer st.StopChain(10 * time.Second)
	if err := os.WriteFile(filepath.Join(st.Dir, "governed-by-chain"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	node, err := ethclient.DialContext(t.Context(), d.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	file := filepath.Join(t.TempDir(), "key.json")
	wallet, err := devchain.NewKey(file, file+".pass")
	if err == nil {
		err = d.Fund(t.Context(), wallet)
	}
	if err != nil {
		t.Fatal(err)
	}
	a := &app{ui: &ui{out: io.Discard, err: io.Discard}, ctx: t.Context(), stack: st}
	n := byte(0)
	deploy := func(send sendFlags) (registry.Status, error) {
		t.Helper()
		n++
		p := &plan{lock: &lock.Lock{ComposeHash: dstack.ComposeHash{n}}, image: policy.Image{Hash: dstack.ImageHash{n}, Epoch: 1}, send: send}
		defer p.close()
		if err := p.createOnChain(a, false); err != nil {
			return registry.Status{}, err
		}
		p.lock.ComposeHash[1] = 1 // another manifest, as an upgrade allows
		if err := p.allowOnChain(a); err != nil {
			return registry.Status{}, err
		}
		if err := p.freeze(a); err != nil {
			return registry.Status{}, err
		}
		app, kms := registry.AppAt(common.Address(p.lock.AppID)), registry.KMSAt(d.Registry)
		for _, c := range []registry.Call{app.AddComposeHash(p.lock.ComposeHash), kms.AddOSImage(p.image.Hash, 1)} {
			if ok, err := c.Done.Holds(t.Context(), node, nil); err != nil || !ok {
				t.Errorf("%s: %v %v", c.Describe(), ok, err)
			}
		}
		return app.Status(t.Context(), node, nil)
	}
	if s, err := deploy(sendFlags{}); err != nil || s.Owner != d.Owner || !s.Frozen {
		t.Errorf("the stack's own: %+v, %v", s, err)
	}
	told := sendFlags{accountFlags: accountFlags{Keystore: file, PassphraseFile: file + ".pass"}}
	if s, err := deploy(told); err != nil || s.Owner != wallet || !s.Frozen {
		t.Errorf("as told: %+v, %v", s, err)
	}
	told.MaxFee = "1"
	if _, err := deploy(told); fault.Code(err) != "chain_fee" {
		t.Errorf("too dear: %v", err)
	}
	if _, err := deploy(sendFlags{accountFlags: accountFlags{Signer: filepath.Join(st.Dir, "nothing.sock")}}); fault.Code(err) != "signer_unreachable" {
		t.Errorf("no signer: %v", err)
	}
	// Where no chain governs, an account signs for nothing.
	if _, err := (&workload{sendFlags: told}).plan(&app{ui: a.ui, ctx: a.ctx, stack: &stack.Stack{Dir: t.TempDir()}}, "x", "", nil, nil); fault.Code(err) != "usage" {
		t.Errorf("no chain: %v", err)
	}
}
