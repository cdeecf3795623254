// SPDX-License-Identifier: Apache-2.0

package transact

import (
	"context"
	"errors"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/ethclient"
	"github.com/ethereum/go-ethereum/rpc"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/fault"
)

var chain *devchain.Chain // of this run; nil without npm

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if _, err := exec.LookPath("npm"); err != nil {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "transact")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if chain, err = devchain.Start(context.Background(), devchain.Config{Dir: dir}); err != nil {
			panic(err)
		}
		defer devchain.Stop(dir, 10*time.Second)
		return m.Run()
	}())
}

// sender is a Sender of a new account with ether, so that tests do not share nonces.
func sender(t *testing.T) *Sender {
	t.Helper()
	if chain == nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	file := filepath.Join(t.TempDir(), "key")
	at, err := devchain.NewKey(file, file+".pass")
	if err != nil {
		t.Fatal(err)
	}
	if err := chain.Fund(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	pass, err := os.ReadFile(file + ".pass")
	if err != nil {
		t.Fatal(err)
	}
	key, err := OpenKeystore(file, pass[:len(pass)-1])
	if err != nil {
		t.Fatal(err)
	}
	node, err := ethclient.DialContext(t.Context(), chain.RPC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(node.Close)
	return &Sender{Node: node, Signer: key, Progress: t.Logf, poll: 20 * time.Millisecond, Timeout: 20 * time.Second}
}

// app deploys an app of the sender's.
func app(t *testing.T, s *Sender, notice time.Duration) registry.App {
	t.Helper()
	out, err := s.Do(t.Context(), registry.KMSAt(chain.Registry).DeployApp(registry.AppConfig{
		Owner: s.Signer.Address(), Notice: uint64(notice / time.Second), AllowAnyDevice: true,
	}))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range out.Receipt.Logs {
		e, ok, err := registry.ParseLog(contracts.KMS, *l)
		if err != nil {
			t.Fatal(err)
		}
		if ok && e.Name == "AppDeployedViaFactory" {
			return registry.AppAt(e.Args["appId"].(common.Address))
		}
	}
	t.Fatal("no app was made")
	panic("unreachable")
}

func hash(b byte) dstack.ComposeHash { return dstack.ComposeHash{31: b} }

func TestThreat_G06_AdditionsAreAnnouncedFirst(t *testing.T) {
	s := sender(t)
	x := app(t, s, time.Hour)
	want := func(state State) *Outcome {
		t.Helper()
		out, err := s.Do(t.Context(), x.AddComposeHash(hash(1)))
		if err != nil || out.State != state {
			t.Fatalf("%+v, %v, want %s", out, err, state)
		}
		return out
	}
	out := want(Announced)
	if wait := time.Until(*out.Effective); wait < 55*time.Minute {
		t.Errorf("it takes effect in %s already", wait)
	}
	so, err := x.AddComposeHash(hash(1)).Done.Holds(t.Context(), s.Node, nil)
	if err != nil || so {
		t.Errorf("what is announced is allowed already (%v)", err)
	}
	want(Waiting)
	if err := chain.Advance(t.Context(), time.Hour+time.Second); err != nil {
		t.Fatal(err)
	}
	want(Made)
	want(Already)
	if _, err := s.Do(t.Context(), x.Freeze()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Do(t.Context(), x.AddComposeHash(hash(2))); fault.Code(err) != "contract_frozen" {
		t.Errorf("an addition to a frozen app: %v", err)
	}
	if out, err := s.Do(t.Context(), x.RemoveComposeHash(hash(1))); err != nil || out.State != Made {
		t.Errorf("a revocation of a frozen app: %+v, %v", out, err)
	}
}

func TestStrangersAreRefusedBeforeTheySign(t *testing.T) {
	s, other := sender(t), sender(t)
	x := app(t, s, 0)
	before, _ := s.Node.NonceAt(t.Context(), other.Signer.Address(), nil)
	if _, err := other.Do(t.Context(), x.AddComposeHash(hash(1))); fault.Code(err) != "contract_owner" {
		t.Errorf("somebody else's addition: %v", err)
	}
	if _, err := other.Do(t.Context(), x.RemoveComposeHash(hash(1))); err != nil {
		t.Errorf("to revoke what is not there is done already: %v", err)
	}
	if after, _ := s.Node.NonceAt(t.Context(), other.Signer.Address(), nil); after != before {
		t.Error("a transaction was sent that was known to fail")
	}
	other.MaxFee = big.NewInt(1)
	if _, err := other.Do(t.Context(), registry.KMSAt(chain.Registry).DeployApp(registry.AppConfig{Owner: common.Address{1}})); fault.Code(err) != "chain_fee" {
		t.Errorf("a call that is too dear: %v", err)
	}
}

func TestTransactionsThatAreLost(t *testing.T) {
	s := sender(t)
	x := app(t, s, 0)
	admin, err := rpc.DialContext(t.Context(), chain.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	ask := func(method string, args ...any) {
		t.Helper()
		if err := admin.CallContext(context.Background(), nil, method, args...); err != nil {
			t.Error(err)
		}
	}
	ask("evm_setAutomine", false)
	ask("evm_setIntervalMining", 0)
	defer func() { ask("evm_setIntervalMining", 1); ask("evm_setAutomine", true) }()
	lose := func(b byte, then func(sent common.Hash)) error {
		c := *s
		c.Progress = func(format string, args ...any) {
			t.Logf(format, args...)
			if format == "sent %s" && then != nil {
				then(common.HexToHash(args[0].(string)))
			}
		}
		c.Timeout = 2 * time.Second
		_, err := c.Do(t.Context(), x.AddComposeHash(hash(b)))
		return err
	}
	if err := lose(1, func(h common.Hash) { ask("anvil_dropTransaction", h) }); fault.Code(err) != "chain_dropped" {
		t.Errorf("a dropped transaction: %v", err)
	}
	if err := lose(2, func(h common.Hash) {
		tx, _, err := s.Node.TransactionByHash(t.Context(), h)
		if err != nil {
			t.Error(err)
			return
		}
		to := s.Signer.Address()
		rival, err := s.Signer.Sign(t.Context(), types.NewTx(&types.DynamicFeeTx{ChainID: tx.ChainId(), Nonce: tx.Nonce(), To: &to, Gas: 21000,
			GasTipCap: new(big.Int).Mul(tx.GasTipCap(), big.NewInt(3)), GasFeeCap: new(big.Int).Mul(tx.GasFeeCap(), big.NewInt(3))}), tx.ChainId())
		if err == nil {
			err = s.Node.SendTransaction(t.Context(), rival)
		}
		if err != nil {
			t.Error(err)
		}
		ask("evm_mine")
	}); fault.Code(err) != "chain_replaced" {
		t.Errorf("a replaced transaction: %v", err)
	}
	if err := lose(3, nil); fault.Code(err) != "chain_timeout" {
		t.Errorf("a transaction that nobody mines: %v", err)
	}
}

// clef is a signer as Clef is one.
type clef struct {
	inner Signer
	bend  func(*types.DynamicFeeTx) // what it changes
	err   error
}

func (c *clef) List() []common.Address { return []common.Address{c.inner.Address()} }

type sendArgs struct {
	From                 common.Address
	To                   *common.Address
	Gas, Nonce           hexutil.Uint64
	MaxFeePerGas         *hexutil.Big
	MaxPriorityFeePerGas *hexutil.Big
	Value, ChainID       *hexutil.Big
	Data                 hexutil.Bytes
}

func (c *clef) SignTransaction(ctx context.Context, a sendArgs) (map[string]any, error) {
	if c.err != nil {
		return nil, c.err
	}
	tx := &types.DynamicFeeTx{ChainID: a.ChainID.ToInt(), Nonce: uint64(a.Nonce), To: a.To, Gas: uint64(a.Gas),
		GasTipCap: a.MaxPriorityFeePerGas.ToInt(), GasFeeCap: a.MaxFeePerGas.ToInt(), Value: a.Value.ToInt(), Data: a.Data}
	if c.bend != nil {
		c.bend(tx)
	}
	signed, err := c.inner.Sign(ctx, types.NewTx(tx), tx.ChainID)
	if err != nil {
		return nil, err
	}
	raw, err := signed.MarshalBinary()
	return map[string]any{"raw": hexutil.Bytes(raw), "tx": signed}, err
}

func TestExternalSigner(t *testing.T) {
	s := sender(t)
	x := app(t, s, 0)
	c := &clef{inner: s.Signer}
	server := rpc.NewServer()
	defer server.Stop()
	if err := server.RegisterName("account", c); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "clef") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "s.ipc")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { _ = server.ServeListener(l) }()

	other := common.Address{1}
	if _, err := DialExternal(t.Context(), socket, &other); fault.Code(err) != "signer_account" {
		t.Errorf("an account that it does not have: %v", err)
	}
	if _, err := DialExternal(t.Context(), socket+"x", nil); fault.Code(err) != "signer_unreachable" {
		t.Errorf("no signer: %v", err)
	}
	far, err := DialExternal(t.Context(), socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	e := *s
	e.Signer = far
	if out, err := e.Do(t.Context(), x.AddComposeHash(hash(1))); err != nil || out.State != Made {
		t.Fatalf("%+v, %v", out, err)
	}
	c.bend = func(tx *types.DynamicFeeTx) { tx.Value = big.NewInt(1) }
	if _, err := e.Do(t.Context(), x.AddComposeHash(hash(2))); fault.Code(err) != "signer_answer" {
		t.Errorf("a signer that signs something else: %v", err)
	}
	c.bend, c.err = nil, errors.New("the user said no")
	if _, err := e.Do(t.Context(), x.AddComposeHash(hash(2))); fault.Code(err) != "signer_refused" {
		t.Errorf("a signer that refuses: %v", err)
	}
}

func TestKeystoreIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if _, err := devchain.NewKey(file, file+".pass"); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenKeystore(file, []byte("wrong")); fault.Code(err) != "keystore_passphrase" {
		t.Errorf("a wrong passphrase: %v", err)
	}
	for name, text := range map[string][]byte{"empty": nil, "other": []byte("{}"), "long": make([]byte, maxKeystore+1)} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenKeystore(path, nil); fault.Code(err) != "keystore_file" {
			t.Errorf("%s: %v", name, err)
		}
	}
}
