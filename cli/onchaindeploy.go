// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
)

// ownerSigns is the owner of the stack's own chain, who signs what deploy needs.
func ownerSigns() *signFlags { return &signFlags{Confirmations: 1, ChainTimeout: time.Minute} }

// effective makes calls that must take effect now. Code change_announced: one has notice.
func effective(a *app, calls func(*onchain) []registry.Call) error {
	f := ownerSigns()
	o, err := f.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	for _, c := range calls(o) {
		out, err := f.act(a, o, c.Describe(), fixed(c))
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
	f := ownerSigns()
	o, err := f.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	id, _, err := f.create(a, o, registry.AppConfig{
		AllowAnyDevice: true, Frozen: frozen, DisableUpgrades: frozen, ComposeHashes: [][32]byte{p.lock.ComposeHash},
	})
	if err != nil {
		return err
	}
	p.lock.AppID = dstack.AppID(id)
	a.step("the app's contract, and so its id, is %s", p.lock.AppID)
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
	epoch := uint64(max(p.image.Epoch, 0))
	return effective(a, func(o *onchain) []registry.Call {
		return []registry.Call{
			registry.KMSAt(o.registry).AddOSImage(p.image.Hash, epoch),
			registry.AppAt(common.Address(p.lock.AppID)).AddComposeHash(p.lock.ComposeHash),
		}
	})
}

// freeze ends changes of the app for ever.
func (p *plan) freeze(a *app) error {
	if !a.stack.GovernedByChain() {
		return a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) { return d.Freeze(p.lock.AppID) })
	}
	return effective(a, func(*onchain) []registry.Call {
		return []registry.Call{registry.AppAt(common.Address(p.lock.AppID)).Freeze()}
	})
}
