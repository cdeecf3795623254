// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/chain"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/verifier"
)

// verifyChainFlags say which contracts are asked whether they allow what runs.
type verifyChainFlags struct {
	ChainRPC       string        `name:"chain-rpc" help:"Nodes of the chain that governs the app, of different operators, separated by commas; the lock's by default." placeholder:"URL[,URL…]"`
	Registry       string        `help:"Address of the KMS's registry on that chain; the lock's by default." placeholder:"0x…"`
	ChainID        uint64        `name:"chain-id" help:"Id of that chain; the lock's, or what the nodes say, by default." placeholder:"N"`
	ChainThreshold int           `name:"chain-threshold" help:"How many of the nodes must agree; more than half by default." placeholder:"K"`
	ChainForeign   bool          `name:"chain-foreign" help:"Take an app whose contract is of other code than this version's: its answer is computed from proven code and storage."`
	MaxStaleness   time.Duration `name:"max-staleness" help:"How old the chain's finalised block may be." default:"30m"`
}

// source is what the flags and a lock (nil: none) say of the chain; false: nothing.
func (f *verifyChainFlags) source(l *lock.Lock) (chain.Config, bool, error) {
	var cfg chain.Config
	if l != nil && l.Governance != nil {
		g := l.Governance
		cfg.RPC, cfg.ChainID, cfg.Registry = g.RPC, g.ChainID, common.HexToAddress(g.Registry)
	}
	if f.ChainRPC != "" {
		cfg.RPC = chain.Endpoints(f.ChainRPC)
	}
	if f.Registry != "" {
		at, err := parseAddress("--registry", f.Registry)
		if err != nil {
			return cfg, false, err
		}
		cfg.Registry = at
	}
	if f.ChainID != 0 {
		cfg.ChainID = f.ChainID
	}
	switch {
	case len(cfg.RPC) == 0 && cfg.Registry == (common.Address{}):
		if f.ChainID != 0 || f.ChainThreshold != 0 || f.ChainForeign {
			return cfg, false, usage("--chain-id, --chain-threshold and --chain-foreign go with --chain-rpc and --registry")
		}
		return cfg, false, nil
	case len(cfg.RPC) == 0:
		return cfg, false, usage("--registry wants --chain-rpc, which says whom to ask")
	case cfg.Registry == (common.Address{}):
		return cfg, false, usage("--chain-rpc wants --registry, which says which contract to ask")
	}
	cfg.MaxStaleness, cfg.Threshold, cfg.Foreign = f.MaxStaleness, f.ChainThreshold, f.ChainForeign
	if cfg.Threshold == 0 {
		cfg.Threshold = len(cfg.RPC)/2 + 1
	}
	return cfg, true, nil
}

// governed asks the contracts about what a verdict shows; nil: there is nothing to ask.
// That they cannot be asked is an answer, too.
func (f *verifyChainFlags) governed(a *app, cfg chain.Config, v *verifier.Verdict) (*verifier.Governance, error) {
	if v.Workload == nil || v.Claims == nil {
		return nil, nil
	}
	a.step("ask the contract %s about the app %s", cfg.Registry.Hex(), v.Workload.AppID)
	if cfg.ChainID == 0 {
		id, err := chainOf(a.ctx, cfg.RPC)
		if err != nil {
			return &verifier.Governance{Unavailable: err}, nil
		}
		cfg.ChainID = id // the reader demands it of every node that it counts
	}
	dir, err := os.UserConfigDir()
	if err == nil {
		dir = filepath.Join(dir, "dstack", "chain")
		err = durable.MkdirAll(dir, 0o700)
	}
	if err != nil { // no home, as in a container that verifies once
		if dir, err = os.MkdirTemp("", "dstack-chain-"); err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
	}
	cfg.File = filepath.Join(dir, strconv.FormatUint(cfg.ChainID, 10)+"-"+cfg.Registry.Hex())
	r, err := chain.Open(cfg)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	q := question(v)
	s, err := chain.NewAuthority(r).Standing(a.ctx, q)
	if err != nil {
		if a.ctx.Err() != nil {
			return nil, err
		}
		return &verifier.Governance{Unavailable: err}, nil
	}
	out := &verifier.Governance{
		ChainID: s.ChainID, Registry: s.Registry.Hex(), Block: s.Block, BlockHash: s.BlockHash.Hex(), BlockTime: s.BlockTime,
		Threshold: s.Threshold, Endpoints: s.Endpoints,
		AppID: q.Boot.AppID, ComposeHash: q.Boot.ComposeHash, DeviceID: q.Boot.DeviceID,
		Allowed: s.Allowed, Code: s.Code, Reason: s.Reason,
		NoticeSeconds: int64(s.Notice / time.Second), RegistryNoticeSeconds: int64(s.RegistryNotice / time.Second),
		Announced: s.Announced, Frozen: s.Frozen, Foreign: s.Foreign,
	}
	if q.ImageBound {
		out.OSImageHash = dstack.ImageHash(q.Boot.OSImageHash).String()
	}
	return out, nil
}

// question is what a KMS would ask about the workload of a verdict.
func question(v *verifier.Verdict) governance.Request {
	w, c := v.Workload, v.Claims
	q := governance.Request{
		Role: governance.App, Purpose: governance.Renewal, Trust: c.Trust, At: v.At,
		Boot: governance.BootInfo{
			TEEVariant: applicant.Variant(c), AppID: w.AppID, ComposeHash: w.ComposeHash, DeviceID: c.DeviceID,
			TCBStatus: c.TCBStatus, AdvisoryIDs: c.Advisories,
		},
	}
	if c.TEE == dstack.Nitro {
		q.Boot.TCBStatus = "" // as a KMS sends it
	}
	if i := slices.IndexFunc(v.Anchors, func(a verifier.Anchor) bool { return a.What == "os_image_hash" }); i >= 0 {
		if h, err := dstack.ParseImageHash(v.Anchors[i].Value); err == nil {
			q.Boot.OSImageHash, q.ImageBound = h[:], true
		}
	}
	return q
}

// chainOf is the id of the chain that the first node to answer says it is of.
func chainOf(ctx context.Context, urls []string) (uint64, error) {
	var errs []error
	for _, url := range urls {
		id, err := func() (uint64, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			node, err := ethclient.DialContext(ctx, url)
			if err != nil {
				return 0, err
			}
			defer node.Close()
			id, err := node.ChainID(ctx)
			if err == nil && (!id.IsUint64() || id.Sign() == 0) {
				err = errors.New("it names no chain")
			}
			if err != nil {
				return 0, err
			}
			return id.Uint64(), nil
		}()
		if err == nil {
			return id, nil
		}
		errs = append(errs, err)
	}
	return 0, fault.Wrap(errors.Join(errs...), "chain_unreachable", "no node says which chain it is of").WithFix("give --chain-id, or other nodes")
}
