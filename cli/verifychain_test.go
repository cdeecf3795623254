// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/verifier"
)

// What a verdict shows is asked of the contracts on a real chain, and what they say comes
// back with contract and block.
func TestThreat_G03_VerifyAsksTheContracts(t *testing.T) {
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	dir := t.TempDir()
	d, err := devchain.Start(t.Context(), devchain.Config{Dir: dir, Step: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	defer devchain.Stop(dir, 10*time.Second)
	pass, err := os.ReadFile(d.Passphrase)
	if err != nil {
		t.Fatal(err)
	}
	key, err := transact.OpenKeystore(d.Keystore, bytes.TrimSpace(pass))
	if err != nil {
		t.Fatal(err)
	}
	node, err := ethclient.DialContext(t.Context(), d.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	sender := &transact.Sender{Node: node, Signer: key, Timeout: 30 * time.Second}
	do := func(c registry.Call) *transact.Outcome {
		t.Helper()
		out, err := sender.Do(t.Context(), c)
		if err == nil {
			err = d.Mine(t.Context(), 70)
		}
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	image, compose := dstack.ImageHash{1}, dstack.ComposeHash{2}
	do(registry.KMSAt(d.Registry).AddOSImage(image, 0))
	out := do(registry.KMSAt(d.Registry).DeployApp(registry.AppConfig{Owner: d.Owner, Notice: 3600, AllowAnyDevice: true, ComposeHashes: [][32]byte{compose}}))
	id, err := created(out.Receipt, d.Registry)
	if err != nil {
		t.Fatal(err)
	}

	t.Setenv("HOME", t.TempDir())
	t.Setenv("XDG_CONFIG_HOME", "")
	a := &app{ui: &ui{out: io.Discard, err: io.Discard}, ctx: t.Context()}
	v := &verifier.Verdict{
		Workload: &verifier.Workload{AppID: dstack.AppID(id), ComposeHash: compose}, Claims: &attest.Claims{TEE: dstack.TDX, TDX: &attest.TDX{}, TCBStatus: "UpToDate"},
		Anchors: []verifier.Anchor{{What: "os_image_hash", Value: image.String()}},
	}
	ask := func(f verifyChainFlags, l *lock.Lock) *verifier.Governance {
		t.Helper()
		f.MaxStaleness = 3 * time.Hour
		cfg, ok, err := f.source(l)
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		g, err := f.governed(a, cfg, v)
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	flags := verifyChainFlags{ChainRPC: d.RPC, Registry: d.Registry.Hex()}
	g := ask(flags, nil)
	if !g.Allowed || g.NoticeSeconds != 3600 || g.RegistryNoticeSeconds != 0 || g.Frozen || g.Announced.IsZero() || g.ChainID != d.ChainID ||
		g.Registry != d.Registry.Hex() || g.Block == 0 || len(g.BlockHash) != 66 || g.AppID != dstack.AppID(id) || g.ComposeHash != compose || g.OSImageHash != image.String() {
		t.Errorf("%+v", g)
	}
	if h, err := node.HeaderByHash(t.Context(), common.HexToHash(g.BlockHash)); err != nil || h.Number.Uint64() != g.Block {
		t.Error("no such block", err)
	}
	// A lock names chain and contract, and flags come before it.
	named := &lock.Lock{Governance: &lock.Governance{ChainID: d.ChainID, Registry: d.Registry.Hex(), RPC: []string{d.RPC}}}
	if g := ask(verifyChainFlags{}, named); !g.Allowed {
		t.Errorf("%+v", g)
	}
	if g := ask(verifyChainFlags{ChainID: d.ChainID + 1}, named); fault.Code(g.Unavailable) != "chain_no_agreement" {
		t.Errorf("%+v", g)
	}
	if g := ask(verifyChainFlags{ChainRPC: "http://127.0.0.1:1"}, named); fault.Code(g.Unavailable) != "chain_no_agreement" {
		t.Errorf("%+v", g)
	}
	if g := ask(verifyChainFlags{ChainRPC: "http://127.0.0.1:1", Registry: d.Registry.Hex()}, nil); fault.Code(g.Unavailable) != "chain_unreachable" {
		t.Errorf("%+v", g)
	}
	if g := ask(verifyChainFlags{Registry: id.Hex()}, named); fault.Code(g.Unavailable) != "chain_foreign" {
		t.Errorf("%+v", g)
	}

	// An image that nobody vouches for is not asked about.
	v.Anchors = nil
	if g := ask(flags, nil); g.Allowed || g.Code != "image_unbound" || g.OSImageHash != "" {
		t.Errorf("%+v", g)
	}
}

func TestVerifyChainFlags(t *testing.T) {
	at := "0x" + strings.Repeat("aa", 20)
	for name, f := range map[string]verifyChainFlags{
		"a contract without nodes":  {Registry: at},
		"nodes without a contract":  {ChainRPC: "http://127.0.0.1:1"},
		"a contract that is none":   {ChainRPC: "http://127.0.0.1:1", Registry: "0x12"},
		"an id of no chain's nodes": {ChainID: 1},
		"a threshold of none":       {ChainThreshold: 1},
		"foreign apps of none":      {ChainForeign: true},
	} {
		if _, ok, err := f.source(nil); ok || fault.Code(err) != "usage" {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	if _, ok, err := new(verifyChainFlags).source(new(lock.Lock)); ok || err != nil {
		t.Error(ok, err)
	}
	cfg, ok, err := (&verifyChainFlags{ChainRPC: "http://a, http://b,http://c", Registry: at}).source(nil)
	if err != nil || !ok || len(cfg.RPC) != 3 || cfg.Threshold != 2 {
		t.Errorf("%+v %v", cfg, err)
	}
}
