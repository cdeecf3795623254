// SPDX-License-Identifier: Apache-2.0

// Package devchain is a chain for development: a real node on loopback with the
// governance contracts deployed, kept under one directory.
//
// Guarantees: the node is the pinned one (package-lock.json's versions and hashes), from
// a cache named after them; it listens on loopback only; the owner's key is made for
// this directory and never given to the node; the contracts have the same addresses
// whenever the directory's chain runs, also when the node lost the last blocks.
//
// It is development trust and nothing else: whoever reaches the node's port can write
// any state, and there are no validators, so that what the node calls final is final by
// its word alone.
//
// Implements spec/governance.md §6; deps.md §2.6.
package devchain

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/ethereum/go-ethereum/accounts/keystore"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/crypto"
	"github.com/ethereum/go-ethereum/ethclient"
	"github.com/ethereum/go-ethereum/rpc"
	"github.com/google/uuid"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
)

// ChainID is what the node says unless it is told another: that of development nodes, so
// that wallets warn.
const ChainID = 31337

// Config says how a chain is started.
type Config struct {
	Dir  string // made when it is not there, 0700
	Port int    // of loopback; 0: as before, else a free one
	// BlockTime is how often there is a block without transactions; transactions have
	// theirs at once. 0: every second. Finality and freshness need blocks.
	BlockTime time.Duration
	ChainID   uint64 // 0: as before, else ChainID
	// Step is told what happens, one line each; may be nil.
	Step func(format string, args ...any)
}

// Deployment is a chain and what is deployed on it.
type Deployment struct {
	RPC     string `json:"rpc"`
	Port    int    `json:"port"`
	ChainID uint64 `json:"chain_id"`
	// Registry is the proxy of DstackKms, AppImplementation the code of new apps.
	Registry          common.Address `json:"registry"`
	KMSImplementation common.Address `json:"kms_implementation"`
	AppImplementation common.Address `json:"app_implementation"`
	Owner             common.Address `json:"owner"`
	// Keystore is the owner's key, Passphrase the file that opens it, both 0600.
	Keystore   string `json:"keystore"`
	Passphrase string `json:"passphrase_file"`
	BlockTime  int    `json:"block_time_seconds"`
}

// Chain is a running chain.
type Chain struct {
	Deployment
	Dir    string
	Exited <-chan error // of a node that this process started; nil otherwise
}

func file(dir, name string) string { return filepath.Join(dir, name) }

// Open returns what is deployed on the chain of a directory, whether it runs or not.
// Code devchain_absent.
func Open(dir string) (*Deployment, error) {
	text, err := os.ReadFile(file(dir, "chain.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("devchain_absent", "there is no development chain in %s", dir).WithFix("run `dstack chain dev`, or `dstack up --governance chain`")
	}
	if err != nil {
		return nil, err
	}
	d := new(Deployment)
	if err := json.Unmarshal(text, d); err != nil {
		return nil, fmt.Errorf("%s: %w", file(dir, "chain.json"), err)
	}
	return d, nil
}

// Start starts the chain of a directory, or finds it running, and deploys the contracts
// when they are not there. The node outlives this process: Stop ends it. Codes:
// devchain_start, devchain_port, devchain_deploy, and those of Install.
func Start(ctx context.Context, cfg Config) (*Chain, error) {
	step := cfg.Step
	if step == nil {
		step = func(string, ...any) {}
	}
	var err error
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fault.Wrap(err, "devchain_start", "make %s", cfg.Dir)
	}
	d, err := Open(cfg.Dir)
	if fault.Code(err) == "devchain_absent" {
		d, err = new(Deployment), nil
	}
	if err != nil {
		return nil, err
	}
	if cfg.ChainID != 0 && d.ChainID != 0 && cfg.ChainID != d.ChainID {
		return nil, fault.New("devchain_start", "the chain of %s has the id %d", cfg.Dir, d.ChainID).WithFix("use another directory for another chain")
	}
	if id, ok, err := process.Recorded(file(cfg.Dir, "anvil.pid")); err != nil {
		return nil, err
	} else if ok && id.Running() {
		if cfg.Port != 0 && cfg.Port != d.Port {
			return nil, fault.New("devchain_port", "the chain of %s runs at port %d", cfg.Dir, d.Port).WithFix("stop it first: `dstack chain stop`")
		}
		step("the development chain is running already")
		if err := d.deploy(ctx, cfg.Dir, step); err != nil {
			return nil, err
		}
		return &Chain{*d, cfg.Dir, nil}, nil
	}
	if err := d.configure(cfg); err != nil {
		return nil, err
	}
	node, err := Install(ctx, step)
	if err != nil {
		return nil, err
	}
	step("start a development chain at %s", d.RPC)
	// No account of the node's own: the keys that such nodes are known by are everybody's.
	cmd := exec.Command(node, "--host", "127.0.0.1", "--port", strconv.Itoa(d.Port), "--no-cors", "--quiet",
		"--accounts", "0", "--chain-id", strconv.FormatUint(d.ChainID, 10),
		"--block-time", strconv.Itoa(d.BlockTime), "--mixed-mining", "--slots-in-an-epoch", "1",
		"--state", file(cfg.Dir, "state.json"), "--state-interval", "30", "--cache-path", file(cfg.Dir, "cache"))
	cmd.Dir = cfg.Dir
	p, err := process.Spawn(cmd, file(cfg.Dir, "anvil.log"), file(cfg.Dir, "anvil.pid"))
	if err != nil {
		return nil, fault.Wrap(err, "devchain_start", "start the node")
	}
	err = d.await(ctx, p)
	if err == nil {
		err = d.deploy(ctx, cfg.Dir, step)
	}
	if err != nil {
		_ = Stop(cfg.Dir, 5*time.Second)
		return nil, err
	}
	return &Chain{*d, cfg.Dir, p.Exited}, nil
}

// configure fills in what is not decided yet, and writes it down.
func (d *Deployment) configure(cfg Config) error {
	if d.ChainID == 0 {
		if d.ChainID = cfg.ChainID; d.ChainID == 0 {
			d.ChainID = ChainID
		}
	}
	if cfg.Port != 0 {
		d.Port = cfg.Port
	}
	if cfg.BlockTime != 0 {
		d.BlockTime = int((cfg.BlockTime + time.Second - 1) / time.Second)
	} else if d.BlockTime == 0 {
		d.BlockTime = 1
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(d.Port)))
	// A node that was killed holds its port for a moment longer than it runs.
	for try := 0; err != nil && cfg.Port == 0 && try < 50; try++ {
		time.Sleep(50 * time.Millisecond)
		l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(d.Port)))
	}
	if err != nil {
		return fault.Wrap(err, "devchain_port", "port %d of loopback is taken", d.Port).WithFix("choose another with --port")
	}
	d.Port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	d.RPC = "http://127.0.0.1:" + strconv.Itoa(d.Port)
	d.Keystore, d.Passphrase = file(cfg.Dir, "owner.json"), file(cfg.Dir, "owner.passphrase")
	if _, err := os.Stat(d.Keystore); errors.Is(err, fs.ErrNotExist) {
		if _, err := NewKey(d.Keystore, d.Passphrase); err != nil {
			return err
		}
	}
	key, err := d.key()
	if err != nil {
		return err
	}
	d.Owner = crypto.PubkeyToAddress(key.PublicKey)
	return d.save(cfg.Dir)
}

func (d *Deployment) save(dir string) error {
	text, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(file(dir, "chain.json"), append(text, '\n'), 0o600)
}

// NewKey makes a key in the form that every wallet reads. The passphrase lies beside
// it: the form is for the tools, not for a secret that this directory does not have.
func NewKey(keyFile, passphraseFile string) (common.Address, error) {
	key, err := crypto.GenerateKey()
	if err != nil {
		return common.Address{}, err
	}
	at := crypto.PubkeyToAddress(key.PublicKey)
	var secret [32]byte
	_, _ = rand.Read(secret[:])
	passphrase := hex.EncodeToString(secret[:])
	text, err := keystore.EncryptKey(&keystore.Key{Id: uuid.New(), Address: at, PrivateKey: key},
		passphrase, keystore.LightScryptN, keystore.LightScryptP)
	if err != nil {
		return at, err
	}
	if err := durable.WriteFile(passphraseFile, []byte(passphrase+"\n"), 0o600); err != nil {
		return at, err
	}
	return at, durable.WriteFile(keyFile, text, 0o600)
}

func (d *Deployment) key() (*ecdsa.PrivateKey, error) {
	text, err := os.ReadFile(d.Keystore)
	if err != nil {
		return nil, err
	}
	passphrase, err := os.ReadFile(d.Passphrase)
	if err != nil {
		return nil, err
	}
	key, err := keystore.DecryptKey(text, string(passphrase[:max(0, len(passphrase)-1)]))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", d.Keystore, err)
	}
	return key.PrivateKey, nil
}

// await waits until the node answers.
func (d *Deployment) await(ctx context.Context, p *process.Spawned) error {
	for deadline := time.Now().Add(30 * time.Second); ; {
		err := d.answers(ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fault.Wrap(err, "devchain_start", "the node does not answer:\n%s", p.Tail()).WithFix("see %s", p.LogFile)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e := <-p.Exited:
			return fault.New("devchain_start", "the node stopped while starting (%v):\n%s", e, p.Tail()).WithFix("see %s", p.LogFile)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (d *Deployment) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	client, err := ethclient.DialContext(ctx, d.RPC)
	if err != nil {
		return err
	}
	defer client.Close()
	id, err := client.ChainID(ctx)
	if err != nil {
		return err
	}
	if !id.IsUint64() || id.Uint64() != d.ChainID {
		return fmt.Errorf("the node at %s is of chain %s", d.RPC, id)
	}
	return nil
}

// deploy deploys what is not there. The addresses depend on the owner and the order
// alone, so that after lost blocks they are the same.
func (d *Deployment) deploy(ctx context.Context, dir string, step func(string, ...any)) error {
	client, err := rpc.DialContext(ctx, d.RPC)
	if err != nil {
		return fault.Wrap(err, "devchain_deploy", "reach the node")
	}
	defer client.Close()
	eth := ethclient.NewClient(client)
	if d.Registry != (common.Address{}) {
		code, err := eth.CodeAt(ctx, d.Registry, nil)
		if err != nil {
			return fault.Wrap(err, "devchain_deploy", "ask the node for the registry")
		}
		if len(code) > 0 {
			return nil
		}
	}
	if err := d.Fund(ctx, d.Owner); err != nil {
		return err
	}
	step("deploy the governance contracts")
	app, err := registry.Creation(contracts.App)
	if err != nil {
		return err
	}
	kms, err := registry.Creation(contracts.KMS)
	if err != nil {
		return err
	}
	if d.AppImplementation, err = d.create(ctx, eth, 0, app); err != nil {
		return err
	}
	if d.KMSImplementation, err = d.create(ctx, eth, 1, kms); err != nil {
		return err
	}
	start := registry.KMSAt(common.Address{}).Initialize(d.Owner, d.AppImplementation)
	proxy, err := registry.Creation(contracts.Proxy, d.KMSImplementation, start.Data)
	if err != nil {
		return err
	}
	if d.Registry, err = d.create(ctx, eth, 2, proxy); err != nil {
		return err
	}
	return d.save(dir)
}

// create deploys with the owner's n-th transaction, unless that was made already.
func (d *Deployment) create(ctx context.Context, eth *ethclient.Client, nonce uint64, code []byte) (common.Address, error) {
	at := crypto.CreateAddress(d.Owner, nonce)
	made, err := eth.NonceAt(ctx, d.Owner, nil)
	if err != nil {
		return at, fault.Wrap(err, "devchain_deploy", "ask the node for the owner's transactions")
	}
	if made > nonce {
		return at, nil
	}
	key, err := d.key()
	if err != nil {
		return at, err
	}
	head, err := eth.HeaderByNumber(ctx, nil)
	if err != nil {
		return at, fault.Wrap(err, "devchain_deploy", "ask the node for its head")
	}
	tip := big.NewInt(1_000_000_000)
	tx, err := types.SignNewTx(key, types.LatestSignerForChainID(new(big.Int).SetUint64(d.ChainID)), &types.DynamicFeeTx{
		ChainID: new(big.Int).SetUint64(d.ChainID), Nonce: nonce, Gas: 6_000_000, Data: code,
		GasTipCap: tip, GasFeeCap: new(big.Int).Add(tip, new(big.Int).Mul(head.BaseFee, big.NewInt(4))),
	})
	if err != nil {
		return at, err
	}
	if err := eth.SendTransaction(ctx, tx); err != nil {
		return at, fault.Wrap(registry.Explain(err), "devchain_deploy", "deploy a contract")
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		receipt, err := eth.TransactionReceipt(ctx, tx.Hash())
		switch {
		case err == nil && receipt.Status == types.ReceiptStatusSuccessful && receipt.ContractAddress == at:
			return at, nil
		case err == nil:
			return at, fault.New("devchain_deploy", "the deployment of %s failed", at.Hex())
		case time.Now().After(deadline):
			return at, fault.Wrap(err, "devchain_deploy", "the deployment of %s is in no block", at.Hex())
		}
		select {
		case <-ctx.Done():
			return at, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// call asks the node for what only a development node does.
func (d *Deployment) call(ctx context.Context, method string, args ...any) error {
	client, err := rpc.DialContext(ctx, d.RPC)
	if err != nil {
		return fault.Wrap(err, "devchain_deploy", "reach the node")
	}
	defer client.Close()
	if err := client.CallContext(ctx, nil, method, args...); err != nil {
		return fault.Wrap(err, "devchain_deploy", "ask the node for %s", method)
	}
	return nil
}

// Fund gives an account ether out of nothing.
func (d *Deployment) Fund(ctx context.Context, account common.Address) error {
	ether := new(big.Int).Exp(big.NewInt(10), big.NewInt(22), nil)
	return d.call(ctx, "anvil_setBalance", account, "0x"+ether.Text(16))
}

// Mine makes blocks at once.
func (d *Deployment) Mine(ctx context.Context, blocks uint64) error {
	return d.call(ctx, "anvil_mine", "0x"+strconv.FormatUint(blocks, 16))
}

// Advance moves the chain's clock forward, with a block at the new time.
func (d *Deployment) Advance(ctx context.Context, by time.Duration) error {
	if err := d.call(ctx, "evm_increaseTime", uint64(by/time.Second)); err != nil {
		return err
	}
	return d.Mine(ctx, 1)
}

// Running reports whether the chain of a directory runs.
func Running(dir string) bool {
	id, ok, err := process.Recorded(file(dir, "anvil.pid"))
	return err == nil && ok && id.Running()
}

// Stop ends the node of a directory, which then writes its state. None is no error.
func Stop(dir string, grace time.Duration) error {
	return process.StopRecorded(file(dir, "anvil.pid"), grace)
}
