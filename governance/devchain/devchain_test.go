// SPDX-License-Identifier: Apache-2.0

package devchain

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
)

func needNPM(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
}

func start(t *testing.T, cfg Config) *Chain {
	t.Helper()
	needNPM(t)
	cfg.Step = t.Logf
	c, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Stop(cfg.Dir, 10*time.Second); err != nil {
			t.Error(err)
		}
	})
	return c
}

func owner(t *testing.T, c *Chain) common.Address {
	t.Helper()
	client, err := ethclient.DialContext(t.Context(), c.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	q := registry.KMSAt(c.Registry).Accept(c.Owner).Done
	values, err := registry.View(t.Context(), client, q.Call, nil)
	if err != nil {
		t.Fatal(err)
	}
	return values[0].(common.Address)
}

func TestChainKeepsItsContractsAndItsAddresses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "chain")
	c := start(t, Config{Dir: dir})
	if got := owner(t, c); got != c.Owner {
		t.Errorf("the registry's owner is %s, want %s", got, c.Owner)
	}
	for _, name := range []string{"chain.json", "owner.json", "owner.passphrase", "anvil.log"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", name, st, err)
		}
	}
	before := c.Deployment
	again, err := Start(t.Context(), Config{Dir: dir, Step: t.Logf})
	if err != nil || again.Deployment != before || again.Exited != nil {
		t.Fatalf("a running chain is %+v, %v", again, err)
	}

	client, err := ethclient.DialContext(t.Context(), c.RPC)
	if err != nil {
		t.Fatal(err)
	}
	height, err := client.BlockNumber(t.Context())
	client.Close()
	if err != nil {
		t.Fatal(err)
	}
	if err := Stop(dir, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if Running(dir) {
		t.Fatal("it runs after it was stopped")
	}
	c = start(t, Config{Dir: dir})
	if c.Deployment != before {
		t.Errorf("after a restart %+v, want %+v", c.Deployment, before)
	}
	if client, err = ethclient.DialContext(t.Context(), c.RPC); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if now, err := client.BlockNumber(t.Context()); err != nil || now < height {
		t.Errorf("the chain is at block %d after a restart, and was at %d (%v)", now, height, err)
	}
	if got := owner(t, c); got != c.Owner {
		t.Errorf("after a restart the registry's owner is %s", got)
	}
}

func TestChainThatLostItsBlocksHasTheSameAddresses(t *testing.T) {
	dir := t.TempDir()
	c := start(t, Config{Dir: dir})
	before := c.Deployment
	id, _, err := process.Recorded(filepath.Join(dir, "anvil.pid"))
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Signal(9); err != nil {
		t.Fatal(err)
	}
	for id.Running() {
		time.Sleep(10 * time.Millisecond)
	}
	_ = os.Remove(filepath.Join(dir, "state.json"))
	c = start(t, Config{Dir: dir})
	if c.Deployment != before {
		t.Errorf("after a crash %+v, want %+v", c.Deployment, before)
	}
	if got := owner(t, c); got != c.Owner {
		t.Errorf("after a crash the registry's owner is %s", got)
	}
}

func TestTwoChainsHaveOtherKeys(t *testing.T) {
	a, b := start(t, Config{Dir: t.TempDir()}), start(t, Config{Dir: t.TempDir(), ChainID: 1337})
	if a.Owner == b.Owner || a.Registry == b.Registry {
		t.Error("two chains have the same owner")
	}
	if b.ChainID != 1337 {
		t.Errorf("the chain's id is %d", b.ChainID)
	}
	// The first of the accounts that development nodes are known by.
	client, err := ethclient.DialContext(t.Context(), a.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	balance, err := client.BalanceAt(t.Context(), common.HexToAddress("0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266"), nil)
	if err != nil || balance.Sign() != 0 {
		t.Errorf("everybody's account has %v (%v)", balance, err)
	}
}

func TestChainMovesOn(t *testing.T) {
	c := start(t, Config{Dir: t.TempDir()})
	client, err := ethclient.DialContext(t.Context(), c.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	head := func() (uint64, uint64) {
		h, err := client.HeaderByNumber(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return h.Number.Uint64(), h.Time
	}
	n, at := head()
	if err := c.Mine(t.Context(), 10); err != nil {
		t.Fatal(err)
	}
	if m, _ := head(); m < n+10 {
		t.Errorf("block %d after mining 10 on %d", m, n)
	}
	if err := c.Advance(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, later := head(); later < at+3600 {
		t.Errorf("the clock moved from %d to %d only", at, later)
	}
	code, err := client.CodeAt(t.Context(), c.AppImplementation, nil)
	if err != nil {
		t.Fatal(err)
	}
	want, err := contracts.Load(contracts.App)
	if err != nil || len(code) != len(want.DeployedBytecode) {
		t.Errorf("the app's code has %d bytes, want %d (%v)", len(code), len(want.DeployedBytecode), err)
	}
}

func TestChainIsRefused(t *testing.T) {
	if _, err := Open(t.TempDir()); fault.Code(err) != "devchain_absent" {
		t.Errorf("no chain: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Start(t.Context(), Config{Dir: t.TempDir(), Port: l.Addr().(*net.TCPAddr).Port}); fault.Code(err) != "devchain_port" {
		t.Errorf("a port that is taken: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	t.Setenv("DSTACK_CACHE", t.TempDir())
	_, err = Start(t.Context(), Config{Dir: t.TempDir()})
	if fault.Code(err) != "npm_missing" || !strings.Contains(fault.Fix(err), "npm") {
		t.Errorf("without npm: %v", err)
	}
	if _, err := Start(context.Background(), Config{Dir: "/proc/nowhere"}); fault.Code(err) != "devchain_start" {
		t.Errorf("a directory that cannot be: %v", err)
	}
}
