// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"encoding/hex"
	"fmt"
	"time"

	"github.com/dstack-go/dstack"
)

// Governance is what the contracts of a chain say of a workload, as the caller has
// proven it (package governance/chain). The caller asks about the workload that an
// earlier verdict shows; Appraise holds the two against each other.
type Governance struct {
	ChainID   uint64    `json:"chain_id"`
	Registry  string    `json:"registry"` // the contract's address, 0x-prefixed
	Block     uint64    `json:"block"`
	BlockHash string    `json:"block_hash"`
	BlockTime time.Time `json:"block_time"`
	// Threshold of Endpoints agree on the block; all else is proven against it.
	Threshold int `json:"threshold"`
	Endpoints int `json:"endpoints"`

	// What was asked about.
	AppID       dstack.AppID       `json:"app_id"`
	ComposeHash dstack.ComposeHash `json:"compose_hash"`
	DeviceID    dstack.DeviceID    `json:"device_id"`
	OSImageHash string             `json:"os_image_hash"`

	Allowed bool   `json:"allowed"`
	Code    string `json:"code,omitempty"` // of a denial
	Reason  string `json:"reason,omitempty"`

	// NoticeSeconds is how long the app's contract announces what it is to allow, and
	// RegistryNoticeSeconds how long the registry does. Announced is when the manifest
	// was, if only by deploying the contract; zero: nothing tells.
	NoticeSeconds         int64     `json:"notice_seconds"`
	RegistryNoticeSeconds int64     `json:"registry_notice_seconds"`
	Announced             time.Time `json:"announced,omitzero"`
	Frozen                bool      `json:"frozen"` // nothing can be added to the app, ever
	// Foreign says that the app's contract is of other code than ours: its answer was
	// computed, and what its owner can change, and how fast, is not known.
	Foreign bool `json:"foreign,omitempty"`

	// Unavailable says why the chain could not be asked; all else is then empty.
	Unavailable error `json:"-"`
}

// GovernancePolicy is about the contracts that govern the app. Without any of it, what
// they say is shown where the caller asked them, and a denial refuses.
type GovernancePolicy struct {
	// Required refuses an app of which no contract is known to allow it.
	Required bool `json:"required,omitempty"`
	// MinNoticeSeconds is how long changes must be announced before they take effect, by
	// the registry and, unless the app is frozen, by its contract, to which the manifest
	// must then have been announced for as long (G06).
	MinNoticeSeconds int64 `json:"min_notice_seconds,omitempty"`
	// RequireFrozen refuses an app that can still be changed.
	RequireFrozen bool `json:"require_frozen,omitempty"`
}

func (p GovernancePolicy) demands() bool {
	return p.Required || p.MinNoticeSeconds > 0 || p.RequireFrozen
}

// governance holds what the contracts say against what runs, and against the policy.
func (a *appraisal) governance() {
	g, p := a.gov, a.pol.Governance
	const where = "governance"
	switch {
	case g == nil && p.demands():
		a.add(Error, "governance_missing", where, "give --chain-rpc URL and --registry 0x…, or a lock that names them", "the policy demands contracts that allow the app, and none were asked")
		return
	case g == nil || a.id == nil:
		return
	case g.Unavailable != nil:
		a.add(Error, "governance_unavailable", where, "give other endpoints with --chain-rpc; --offline does not ask, and then a revocation does not show", "whether the contracts still allow the app is not known: %v", g.Unavailable)
		return
	}
	shown := *g
	a.v.Governance = &shown
	image := ""
	for _, anchor := range a.v.Anchors {
		if anchor.What == "os_image_hash" {
			image = anchor.Value
		}
	}
	if g.AppID != a.id.AppID || g.ComposeHash != a.id.ComposeHash || g.DeviceID != a.claims.DeviceID || g.OSImageHash != image {
		a.add(Error, "governance_mismatch", where, "", "the contracts were asked about the app %s with the manifest %s, which is not what runs here", g.AppID, short(g.ComposeHash))
		return
	}
	at := fmt.Sprintf("contract %s on chain %d, block %d %s of %s", g.Registry, g.ChainID, g.Block, g.BlockHash, g.BlockTime.UTC().Format(time.RFC3339))
	if !g.Allowed {
		a.add(Error, "governance_denied", where, "", "the %s does not allow it: %s (%s)", at, g.Reason, g.Code)
		return
	}
	rest := "proofs for the rest"
	if g.Foreign {
		rest = "an EVM over proven code and storage for the rest"
	}
	a.anchor("governance", at+", finalised", fmt.Sprintf("%d of %d endpoints for the block, %s", g.Threshold, g.Endpoints, rest))
	a.anchor("compose_hash", a.id.ComposeHash.String(), "the app's contract 0x"+hex.EncodeToString(a.id.AppID[:]))
	a.governed = true

	least := time.Duration(p.MinNoticeSeconds) * time.Second
	notice, registry := time.Duration(g.NoticeSeconds)*time.Second, time.Duration(g.RegistryNoticeSeconds)*time.Second
	const later = "its owner must set a longer notice; or wait, or accept less with governance.min_notice_seconds"
	switch {
	case g.Frozen:
		a.add(Info, "governance_frozen", where, "", "the app is frozen: nothing can be added to it, ever")
	case p.RequireFrozen:
		a.add(Error, "governance_not_frozen", where, "its owner must freeze it", "the app's owner can still change what it runs, and the policy demands that nobody can")
	case notice < least:
		a.add(Error, "governance_notice", where, later, "the app's contract announces what it is to allow for %s, the policy demands %s", notice, least)
	case g.Foreign:
		a.add(Warning, "governance_foreign", where, "", "the app's contract is of other code than this version's: it allows the app, and what its owner can change, and how fast, is not known")
	case notice == 0:
		a.add(Warning, "governance_no_notice", where, "", "the app's contract has no notice: its owner can allow another manifest from one block to the next")
	default:
		a.add(Info, "governance_noticed", where, "", "the app's contract announces what it is to allow for %s", notice)
	}
	if least == 0 {
		return
	}
	if registry < least {
		a.add(Error, "governance_notice", where, later, "the registry announces new OS images and KMSs for %s, the policy demands %s", registry, least)
	}
	if since := g.BlockTime.Sub(g.Announced); !g.Frozen && since < least {
		a.add(Error, "governance_notice", where, later, "the manifest was announced %s before the block, the policy demands %s", since, least)
	}
}
