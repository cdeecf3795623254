// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"context"
	"fmt"
	"math"
	"math/big"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

// Authority decides by the contracts. It implements governance.Authority.
type Authority struct{ r *Reader }

// NewAuthority returns the authority of what a reader reads.
func NewAuthority(r *Reader) *Authority { return &Authority{r} }

// Close closes the reader.
func (a *Authority) Close() error {
	a.r.Close()
	return nil
}

// refusal is a contract's reason, under a code of ours.
type refusal struct{ code, reason string }

var upToDate = "UpToDate"

// Decide answers by the finalised block and the head, and denies if either does. Errors
// are those of the reader: then there is no answer. Codes of denials: image_unbound,
// app_not_registered, os_image_not_allowed, os_image_epoch, app_not_deployed,
// advisory_blocked, tee_not_allowed, tcb_not_allowed, compose_hash_not_allowed,
// device_not_allowed, mr_not_allowed; app_refuses: a foreign app does, in its own words.
func (a *Authority) Decide(ctx context.Context, q governance.Request) (governance.Decision, error) {
	s, err := a.Standing(ctx, q)
	if err != nil {
		return governance.Decision{}, err
	}
	return s.Decision, nil
}

// Standing is what the contracts say of an app or a KMS, and where they say it.
type Standing struct {
	governance.Decision
	ChainID   uint64
	Registry  common.Address
	Block     uint64 // the finalised block; of a denial, the one that denies
	BlockHash common.Hash
	BlockTime time.Time
	// Threshold of Endpoints agree on the block.
	Threshold, Endpoints int

	// What follows is of an app that is allowed, by that of the two blocks that promises
	// less. Notice is how long the app's contract, and RegistryNotice how long the
	// registry, announces what it is to allow.
	Notice, RegistryNotice time.Duration
	// Announced is when the app's contract was told to allow the manifest, if only by being
	// deployed; zero: nothing tells.
	Announced time.Time
	// Frozen says that nothing can be added to the app, ever.
	Frozen bool
	// Foreign says that the app's contract is of other code than ours: notice and freezing
	// are then not known, and are not promised.
	Foreign bool
}

// Standing answers as Decide does, and tells what else a relying party needs to know
// (threats.md G06). Codes: those of Decide.
//
// The head may have given way to another block since it was agreed on, of which then no
// endpoint proves anything: what is not proven is asked once more, of a head agreed anew.
func (a *Authority) Standing(ctx context.Context, q governance.Request) (*Standing, error) {
	s, err := a.standing(ctx, q)
	if fault.Code(err) == "chain_proof" {
		a.r.forget()
		s, err = a.standing(ctx, q)
	}
	return s, err
}

func (a *Authority) standing(ctx context.Context, q governance.Request) (*Standing, error) {
	final, head, err := a.r.view(ctx)
	if err != nil {
		return nil, err
	}
	at := func(b *types.Header, d governance.Decision) *Standing {
		d.By = a.by(b)
		return &Standing{Decision: d, ChainID: a.r.cfg.ChainID, Registry: a.r.cfg.Registry, Block: b.Number.Uint64(), BlockHash: b.Hash(),
			BlockTime: seconds(b.Time), Threshold: a.r.cfg.Threshold, Endpoints: len(a.r.endpoints)}
	}
	if q.Role == governance.App && !q.ImageBound {
		return at(final, governance.Deny("", "image_unbound", "the OS image is the guest's own word: its launch registers were not derived from it")), nil
	}
	// The head first: a revocation need not be final to count.
	var newest *terms
	for _, block := range []*types.Header{head, final} {
		t, no, err := a.ask(ctx, block, q)
		if err != nil {
			return nil, err
		}
		if no != nil {
			return at(block, governance.Deny("", no.code, no.reason)), nil
		}
		if newest == nil {
			newest = t
			continue
		}
		out := at(final, t.Decision)
		out.Allowed = true
		out.Notice, out.RegistryNotice = duration(min(t.notice, newest.notice)), duration(min(t.registryNotice, newest.registryNotice))
		out.Frozen, out.Foreign = t.frozen && newest.frozen, t.foreign || newest.foreign
		if out.Foreign {
			out.By += " foreign app"
		}
		if announced := max(t.announced, newest.announced); announced != 0 {
			out.Announced = seconds(announced)
		}
		return out, nil
	}
	panic("unreachable")
}

// terms are what an app is allowed on at a block; times are the chain's seconds.
type terms struct {
	governance.Decision
	notice, registryNotice, announced uint64
	frozen, foreign                   bool
}

func seconds(t uint64) time.Time { return time.Unix(int64(min(t, math.MaxInt32*4)), 0).UTC() }

func duration(s uint64) time.Duration { return time.Duration(min(s, math.MaxInt32)) * time.Second }

// by names what decided: the anchor of a verdict, and what the release log says.
func (a *Authority) by(b *types.Header) string {
	return fmt.Sprintf("chain %d contract %s block %s %s", a.r.cfg.ChainID, a.r.cfg.Registry.Hex(), b.Number, b.Hash().Hex())
}

// ask is what the contracts answer at a block.
func (a *Authority) ask(ctx context.Context, block *types.Header, q governance.Request) (*terms, *refusal, error) {
	b, kms := q.Boot, registry.KMSAt(a.r.cfg.Registry)
	var image dstack.ImageHash
	copy(image[:], b.OSImageHash)
	appAt := common.Address(b.AppID)
	registered, allowed, epoch, least := kms.RegisteredAppSlot(appAt), kms.OSImageSlot(image), kms.OSImageEpochSlot(image), kms.MinOSEpochSlot()
	mr, device, waits := kms.MRSlot(b.MRAggregated), kms.DeviceSlot(b.DeviceID), kms.NoticeSlot()
	fields := append([]registry.Field{registered, allowed, epoch, least, mr, device, waits}, platformFields(kms, b)...)
	reg, err := a.load(ctx, block, contracts.KMS, a.r.cfg.Registry, fields, kms.GatewaySlot())
	if err != nil {
		return nil, nil, err
	}
	image_ := func() *refusal {
		switch {
		case len(b.OSImageHash) != dstack.ImageHashSize || !reg.true(allowed):
			return &refusal{"os_image_not_allowed", "OS image is not allowed"}
		case reg.number(epoch) < reg.number(least):
			return &refusal{"os_image_epoch", "OS image is older than the security epoch"}
		}
		return nil
	}
	if q.Role == governance.KMS {
		switch no := image_(); {
		case b.TCBStatus != upToDate:
			return nil, &refusal{"tcb_not_allowed", "TCB status is not up to date"}, nil
		case no != nil:
			return nil, no, nil
		case !reg.true(mr):
			return nil, &refusal{"mr_not_allowed", "Aggregated MR not allowed"}, nil
		case !reg.true(device):
			return nil, &refusal{"device_not_allowed", "KMS is not allowed to boot on this device"}, nil
		}
		return new(terms), reg.platform(kms, b), nil
	}
	if !reg.true(registered) {
		return nil, &refusal{"app_not_registered", "App not registered"}, nil
	}
	if no := image_(); no != nil {
		return nil, no, nil
	}
	app := registry.AppAt(appAt)
	tcb, compose, any, on := app.RequireTCBSlot(), app.ComposeHashSlot(b.ComposeHash), app.AllowAnyDeviceSlot(), app.DeviceSlot(b.DeviceID)
	now, oldest, notice, frozen := app.KeyEpochSlot(), app.OldestKeyEpochSlot(), app.NoticeSlot(), app.FrozenSlot()
	announced := app.AnnouncedSlot(registry.Change{Policy: registry.PolicyID("compose-hash"), Value: common.Hash(b.ComposeHash)})
	own, err := a.load(ctx, block, contracts.App, appAt, append([]registry.Field{tcb, compose, any, on, now, oldest, notice, frozen, announced}, platformFields(app, b)...))
	foreign := a.r.cfg.Foreign && fault.Code(err) == "chain_foreign"
	if err != nil && !foreign {
		return nil, nil, err
	}
	if own == nil {
		return nil, &refusal{"app_not_deployed", "App not deployed or invalid address"}, nil
	}
	if no := reg.platform(kms, b); no != nil {
		return nil, no, nil
	}
	if foreign {
		if no, err := a.execute(ctx, block, q); no != nil || err != nil {
			return nil, no, err
		}
		gateway, err := a.gateway(ctx, block, reg)
		return &terms{Decision: governance.Decision{GatewayAppID: gateway}, registryNotice: reg.number(waits), foreign: true}, nil, err
	}
	switch {
	case own.true(tcb) && b.TCBStatus != upToDate:
		return nil, &refusal{"tcb_not_allowed", "TCB status is not up to date"}, nil
	case !own.true(compose):
		return nil, &refusal{"compose_hash_not_allowed", "Compose hash not allowed"}, nil
	case !own.true(any) && !own.true(on):
		return nil, &refusal{"device_not_allowed", "Device not allowed"}, nil
	}
	if no := own.platform(app, b); no != nil {
		return nil, no, nil
	}
	gateway, err := a.gateway(ctx, block, reg)
	return &terms{
		Decision: governance.Decision{GatewayAppID: gateway, Epoch: own.number(now), OldestEpoch: own.number(oldest)},
		notice:   own.number(notice), registryNotice: reg.number(waits), announced: own.number(announced), frozen: own.true(frozen),
	}, nil, err
}

// state is proven storage.
type state struct{ *account }

func (s state) true(f registry.Field) bool { return f.True(s.words[f.Slot]) }

func (s state) number(f registry.Field) uint64 {
	return new(big.Int).SetBytes(f.Of(s.words[f.Slot]).Bytes()).Uint64()
}

// load proves a contract of ours and some of its fields; nil where there is no code. Codes
// chain_proof, chain_foreign.
func (a *Authority) load(ctx context.Context, block *types.Header, name string, at common.Address, fields []registry.Field, words ...common.Hash) (*state, error) {
	slots := append([]common.Hash{registry.ImplementationSlot}, words...)
	for _, f := range fields {
		slots = append(slots, f.Slot)
	}
	acc, err := a.r.read(ctx, block, at, slots)
	if err != nil {
		return nil, err
	}
	if acc.codeHash == types.EmptyCodeHash && name == contracts.App {
		return nil, nil
	}
	return &state{acc}, a.r.known(ctx, block, name, at, acc)
}

// governed is what both contracts have.
type governed interface {
	AdvisoryBlockedSlot(word string) registry.Field
	PlatformRequiredSlot() registry.Field
	TEEVariantSlot(word string) registry.Field
	TCBStatusSlot(word string) registry.Field
}

func platformFields(g governed, b governance.BootInfo) []registry.Field {
	out := []registry.Field{g.PlatformRequiredSlot(), g.TEEVariantSlot(b.TEEVariant), g.TCBStatusSlot(b.TCBStatus)}
	for _, id := range b.AdvisoryIDs {
		out = append(out, g.AdvisoryBlockedSlot(id))
	}
	return out
}

// platform is Governed._refusePlatform.
func (s state) platform(g governed, b governance.BootInfo) *refusal {
	for _, id := range b.AdvisoryIDs {
		if s.true(g.AdvisoryBlockedSlot(id)) {
			return &refusal{"advisory_blocked", "Advisory is not allowed"}
		}
	}
	switch {
	case !s.true(g.PlatformRequiredSlot()):
		return nil
	case b.TEEVariant == "":
		return &refusal{"tee_not_allowed", "TEE variant is unknown"}
	case !s.true(g.TEEVariantSlot(b.TEEVariant)):
		return &refusal{"tee_not_allowed", "TEE variant is not allowed"}
	case !s.true(g.TCBStatusSlot(b.TCBStatus)):
		return &refusal{"tcb_not_allowed", "TCB status is not allowed"}
	}
	return nil
}

// gateway reads the registry's gatewayAppId, a Solidity string of at most 31 bytes in its
// slot, or longer from keccak256(slot) on.
func (a *Authority) gateway(ctx context.Context, block *types.Header, reg *state) (string, error) {
	slot := registry.KMSAt(a.r.cfg.Registry).GatewaySlot()
	word := reg.words[slot]
	if word[31]&1 == 0 {
		return string(word[:min(int(word[31]/2), 31)]), nil
	}
	size := new(big.Int).SetBytes(word[:])
	size.Rsh(size, 1)
	if !size.IsUint64() || size.Uint64() > 256 {
		return "", nil // no list of app ids is so long
	}
	var slots []common.Hash
	first := new(big.Int).SetBytes(crypto.Keccak256(slot[:]))
	for i := uint64(0); i*32 < size.Uint64(); i++ {
		slots = append(slots, common.BigToHash(new(big.Int).Add(first, new(big.Int).SetUint64(i))))
	}
	more, err := a.r.read(ctx, block, a.r.cfg.Registry, slots)
	if err != nil {
		return "", err
	}
	var out []byte
	for _, s := range slots {
		w := more.words[s]
		out = append(out, w[:]...)
	}
	return string(out[:size.Uint64()]), nil
}

// About tells the contract, and proves that it is ours.
func (a *Authority) About(ctx context.Context) (governance.About, error) {
	final, _, err := a.r.view(ctx)
	if err != nil {
		return governance.About{}, err
	}
	kms := registry.KMSAt(a.r.cfg.Registry)
	implementation := kms.AppImplementationSlot()
	reg, err := a.load(ctx, final, contracts.KMS, a.r.cfg.Registry, []registry.Field{implementation}, kms.GatewaySlot())
	if err != nil {
		return governance.About{}, err
	}
	gateway, err := a.gateway(ctx, final, reg)
	return governance.About{
		GatewayAppID: gateway, Contract: a.r.cfg.Registry.Hex(), ChainID: a.r.cfg.ChainID, By: a.by(final),
		Implementation: common.BytesToAddress(implementation.Of(reg.words[implementation.Slot]).Bytes()).Hex(),
	}, err
}
