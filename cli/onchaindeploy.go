// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
)

// owners make the calls on a chain that a deployment needs.
type owners struct {
	*onchain
	app      *transact.Sender // as told, or the owner of the stack's own chain
	registry *transact.Sender // the same, unless only the stack's owner may change the registry
}

func (o *owners) close() {
	o.app.Signer.Close()
	if o.registry != o.app {
		o.registry.Signer.Close()
	}
	o.node.Close()
}

// owners opens them, once for all of a deployment's calls.
func (p *plan) owners(a *app) (*owners, error) {
	if p.signs != nil {
		return p.signs, nil
	}
	chain, err := new(chainFlags).connect(a)
	if err != nil {
		return nil, err
	}
	o := &owners{onchain: chain}
	if o.app, err = p.send.sender(a, chain); err != nil {
		chain.node.Close()
		return nil, err
	}
	o.registry = o.app
	k, err := registry.KMSAt(chain.registry).Status(a.ctx, chain.node, nil)
	if err == nil && k.Owner != o.app.Signer.Address() && (p.send.Keystore != "" || p.send.Signer != "") {
		own := p.send
		own.accountFlags = accountFlags{}
		var s *transact.Sender
		if s, err = own.sender(a, chain); err == nil {
			o.registry = s
		}
	}
	if err != nil {
		o.close()
		return nil, err
	}
	p.signs = o
	return o, nil
}

// effective makes calls that must take effect now. Code change_announced: one has notice.
func effective(a *app, s *transact.Sender, calls ...registry.Call) error {
	for _, c := range calls {
		out, err := sent(a, c.Describe(), s, c)
		if err != nil {
			return err
		}
		if out.State == transact.Waiting || out.State == transact.Announced {
			return fault.New("change_announced", "the change is announced and may be made from %s on", when(*out.Effective)).
				WithFix("run the same command again after that time")
		}
	}
	return nil
}

// createOnChain deploys the contract of the app as it is planned, whose address becomes
// its id.
func (p *plan) createOnChain(a *app, frozen bool) error {
	o, err := p.owners(a)
	if err != nil {
		return err
	}
	out, err := sent(a, "create the app", o.app, registry.KMSAt(o.onchain.registry).DeployApp(registry.AppConfig{
		Owner: o.app.Signer.Address(), AllowAnyDevice: true, Frozen: frozen, DisableUpgrades: frozen, ComposeHashes: [][32]byte{p.lock.ComposeHash},
	}))
	if err != nil {
		return err
	}
	id, err := created(out.Receipt, o.onchain.registry)
	if err != nil {
		return err
	}
	p.lock.AppID = dstack.AppID(id)
	a.step("the app's contract, and so its id, is %s; its owner is %s", p.lock.AppID, o.app.Signer.Address().Hex())
	return nil
}

// allowOnChain allows the image and the manifest on the stack's chain, which the lock
// then names.
func (p *plan) allowOnChain(a *app) error {
	d, err := a.stack.Chain()
	if err != nil {
		return err
	}
	p.lock.Governance = &lock.Governance{ChainID: d.ChainID, Registry: d.Registry.Hex(), RPC: []string{d.RPC}}
	o, err := p.owners(a)
	if err != nil {
		return err
	}
	epoch := uint64(max(p.image.Epoch, 0))
	if err := effective(a, o.registry, registry.KMSAt(o.onchain.registry).AddOSImage(p.image.Hash, epoch)); err != nil {
		return err
	}
	return effective(a, o.app, registry.AppAt(common.Address(p.lock.AppID)).AddComposeHash(p.lock.ComposeHash))
}

// freeze ends changes of the app for ever.
func (p *plan) freeze(a *app) error {
	if !a.stack.GovernedByChain() {
		return a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) { return d.Freeze(p.lock.AppID) })
	}
	o, err := p.owners(a)
	if err != nil {
		return err
	}
	return effective(a, o.app, registry.AppAt(common.Address(p.lock.AppID)).Freeze())
}
