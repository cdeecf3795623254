// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"bytes"
	"io"
	"math/big"
	"os"
	"time"

	"github.com/charmbracelet/x/term"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
)

// chainFlags name a chain and a registry on it; the stack's own by default.
type chainFlags struct {
	RPC      string `name:"rpc" help:"Node of the chain; the stack's own by default." placeholder:"URL"`
	Registry string `name:"registry" help:"Address of the KMS's registry; the stack's own by default." placeholder:"0x…"`
}

// accountFlags say whose account signs.
type accountFlags struct {
	Keystore       string `help:"Key file of an Ethereum wallet that signs." type:"path" placeholder:"FILE"`
	PassphraseFile string `name:"passphrase-file" help:"File whose first line opens the key file; asked for otherwise." type:"path" placeholder:"FILE"`
	Signer         string `help:"Program that signs, as Clef does: a unix socket or a URL." placeholder:"ENDPOINT"`
	From           string `help:"Account of that program." placeholder:"0x…"`
}

// sendFlags say who signs a transaction, and how long to wait for it.
type sendFlags struct {
	accountFlags
	Confirmations uint64        `help:"Blocks to wait for, the transaction's own included." default:"1"`
	ChainTimeout  time.Duration `name:"chain-timeout" help:"How long to wait for them." default:"5m"`
	MaxFee        string        `name:"max-fee" help:"The most that a transaction may cost, in wei." placeholder:"WEI"`
}

// signFlags are those of a verb that makes a call.
type signFlags struct {
	chainFlags
	sendFlags
	DryRun bool `name:"dry-run" help:"Print the call and send nothing."`
	Safe   bool `help:"With --dry-run: print it as a Safe transaction builder's file."`
}

// onchain is a registry, and a node to reach it by.
type onchain struct {
	node     *ethclient.Client
	registry common.Address
	chainID  uint64
	// The owner's key of the stack's own chain.
	keystore, passphrase string
}

// governedByChain reports whether verbs that policies and chains both have mean a chain.
func (f *chainFlags) governedByChain(a *app) bool {
	if f.RPC != "" || f.Registry != "" || a.stack.GovernedByChain() {
		return true
	}
	if _, err := os.Stat(a.stack.PolicyFile()); err == nil {
		return false
	}
	_, err := a.stack.Chain() // of `dstack chain dev`, with no stack beside it
	return err == nil
}

// connect reaches the chain, and knows the registry. Codes: registry_missing,
// chain_unreachable.
func (f *chainFlags) connect(a *app) (*onchain, error) {
	o, url, err := f.named(a)
	if err == nil && o.registry == (common.Address{}) {
		err = fault.New("registry_missing", "nothing says which registry of the chain").WithFix("--registry 0x…")
	}
	if err != nil {
		return nil, err
	}
	return o, o.dial(a, url)
}

// reach reaches the chain, whatever the registry. Code chain_unreachable.
func (f *chainFlags) reach(a *app) (*onchain, error) {
	o, url, err := f.named(a)
	if err != nil {
		return nil, err
	}
	return o, o.dial(a, url)
}

// named is what the flags and the stack say of a chain, and where its node is.
func (f *chainFlags) named(a *app) (*onchain, string, error) {
	o := new(onchain)
	url := f.RPC
	d, err := a.stack.Chain()
	switch {
	case err == nil && (url == "" || url == d.RPC):
		url, o.registry, o.keystore, o.passphrase = d.RPC, d.Registry, d.Keystore, d.Passphrase
	case url == "":
		return nil, "", err
	}
	if f.Registry != "" {
		if o.registry, err = parseAddress("--registry", f.Registry); err != nil {
			return nil, "", err
		}
	}
	return o, url, nil
}

// dial asks the node which chain it is of.
func (o *onchain) dial(a *app, url string) error {
	var err error
	if o.node, err = ethclient.DialContext(a.ctx, url); err != nil {
		return registry.Explain(err)
	}
	id, err := o.node.ChainID(a.ctx)
	if err != nil {
		o.node.Close()
		return registry.Explain(err)
	}
	o.chainID = id.Uint64()
	return nil
}

// appAddress takes an app's id, or the name of one of this stack's.
func appAddress(a *app, text string) (common.Address, error) {
	if !common.IsHexAddress(text) && a.stack.Responding(a.ctx) {
		if vm, err := findVM(a, text); err == nil {
			text = vm.AppId
		}
	}
	return parseAddress("the app, by its id or by the name of one that the stack runs,", text)
}

func parseAddress(what, text string) (common.Address, error) {
	if !common.IsHexAddress(text) {
		return common.Address{}, usage("%s wants an address, 40 hexadecimal digits, not %q", what, text)
	}
	return common.HexToAddress(text), nil
}

// signer is who signs: as told, or the owner of the stack's own chain.
func (f *accountFlags) signer(a *app, o *onchain) (transact.Signer, error) {
	if f.Signer != "" {
		if f.Keystore != "" {
			return nil, usage("--signer and --keystore exclude each other")
		}
		var account *common.Address
		if f.From != "" {
			at, err := parseAddress("--from", f.From)
			if err != nil {
				return nil, err
			}
			account = &at
		}
		return transact.DialExternal(a.ctx, f.Signer, account)
	}
	keystore, passphraseFile := f.Keystore, f.PassphraseFile
	if keystore == "" {
		keystore, passphraseFile = o.keystore, o.passphrase
	}
	if keystore == "" {
		return nil, fault.New("signer_missing", "nothing says who signs").WithFix("--keystore FILE, --signer ENDPOINT, or --dry-run to sign elsewhere")
	}
	passphrase, err := readPassphrase(a, passphraseFile)
	if err != nil {
		return nil, err
	}
	defer clear(passphrase)
	return transact.OpenKeystore(keystore, passphrase)
}

// readPassphrase reads it of a file, or asks for it.
func readPassphrase(a *app, file string) ([]byte, error) {
	return readSecret(a, file, "passphrase of the key file", fault.New("keystore_passphrase", "nothing opens the key file").WithFix("--passphrase-file FILE"))
}

// readSecret reads the first line of a file, or, without a file, asks for it or takes that
// of the standard input; none is the error.
func readSecret(a *app, file, what string, none error) ([]byte, error) {
	if file != "" {
		text, err := readLimited(file, 4096)
		if err != nil {
			return nil, err
		}
		line, _, _ := bytes.Cut(text, []byte("\n"))
		return bytes.TrimSuffix(line, []byte("\r")), nil
	}
	if f, ok := a.in.(*os.File); ok && term.IsTerminal(f.Fd()) {
		a.step("%s:", what)
		return term.ReadPassword(f.Fd())
	}
	line, err := bufio.NewReader(io.LimitReader(a.in, 4096)).ReadBytes('\n')
	if err != nil && len(line) == 0 {
		return nil, none
	}
	return bytes.TrimRight(line, "\r\n"), nil
}

// call is a call that still has to know who signs it.
type call func(self common.Address) registry.Call

func fixed(c registry.Call) call { return func(common.Address) registry.Call { return c } }

// act makes a call, or prints it. Nil: it was a dry run.
func (f *signFlags) act(a *app, o *onchain, what string, make call) (*transact.Outcome, error) {
	if f.Safe && !f.DryRun {
		return nil, usage("--safe goes with --dry-run")
	}
	if f.DryRun {
		self := common.Address{}
		if f.From != "" {
			var err error
			if self, err = parseAddress("--from", f.From); err != nil {
				return nil, err
			}
		}
		p := transact.Propose(o.chainID, make(self))
		if f.Safe {
			safe := transact.Safe(what, time.Now(), p)
			was := a.json
			a.json = true
			defer func() { a.json = was }()
			return nil, a.result(safe)
		}
		a.printf("To      %s (chain %d)\nValue   %s\nData    %s\nCall    %s\n", p.To.Hex(), p.ChainID, p.Value, p.Data, p.Call)
		return nil, a.result(p)
	}
	s, err := f.sender(a, o)
	if err != nil {
		return nil, err
	}
	defer s.Signer.Close()
	return sent(a, what, s, make(s.Signer.Address()))
}

// sender is who signs and sends; its signer is the caller's to close.
func (f *sendFlags) sender(a *app, o *onchain) (*transact.Sender, error) {
	s := &transact.Sender{Node: o.node, Confirmations: f.Confirmations, Timeout: f.ChainTimeout, Progress: a.step}
	if f.MaxFee != "" {
		limit, ok := new(big.Int).SetString(f.MaxFee, 10)
		if !ok || limit.Sign() < 0 {
			return nil, usage("--max-fee wants a number of wei, not %q", f.MaxFee)
		}
		s.MaxFee = limit
	}
	var err error
	s.Signer, err = f.signer(a, o)
	return s, err
}

// sent makes a call and says what became of it.
func sent(a *app, what string, s *transact.Sender, c registry.Call) (*transact.Outcome, error) {
	out, err := s.Do(a.ctx, c)
	if err != nil {
		return nil, err
	}
	switch out.State {
	case transact.Already:
		a.step("%s: it is so already", what)
	case transact.Waiting:
		a.step("%s: announced before; run this again after %s", what, when(*out.Effective))
	case transact.Announced:
		a.step("%s: announced in block %d; run this again after %s, within 14 days of it", what, out.Block, when(*out.Effective))
	default:
		a.step("%s: done in block %d", what, out.Block)
	}
	return out, nil
}

func when(t time.Time) string {
	return t.Format(time.RFC3339) + " (" + max(time.Until(t), 0).Round(time.Second).String() + " from now)"
}

// do makes a call and prints the outcome: the whole of most verbs.
func (f *signFlags) do(a *app, what string, calls func(*onchain) (call, error)) error {
	o, err := f.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	c, err := calls(o)
	if err != nil {
		return err
	}
	out, err := f.act(a, o, what, c)
	if err != nil || out == nil {
		return err
	}
	return a.result(out)
}

// created is the app that a receipt tells of.
func created(receipt *types.Receipt, at common.Address) (common.Address, error) {
	for _, l := range receipt.Logs {
		if l.Address != at {
			continue
		}
		e, ok, err := registry.ParseLog(contracts.KMS, *l)
		if err != nil {
			return common.Address{}, err
		}
		if id, is := e.Args["appId"].(common.Address); ok && is && e.Name == "AppDeployedViaFactory" {
			return id, nil
		}
	}
	return common.Address{}, fault.New("chain_answer", "the receipt tells of no app")
}

// history prints what was done to a contract.
func (o *onchain) history(a *app, contract string, at common.Address, first uint64) error {
	head, err := o.node.BlockNumber(a.ctx)
	if err != nil {
		return registry.Explain(err)
	}
	entries, err := registry.History(a.ctx, o.node, contract, at, first, head)
	if err != nil {
		return err
	}
	for _, e := range entries {
		a.printf("%8d  %s  %s  %s\n", e.Block, e.Time.Format(time.RFC3339), e.Who.Hex(), printable(e.Sentence()))
	}
	if entries == nil {
		entries = []registry.Entry{}
	}
	return a.result(map[string]any{"contract": at, "chain_id": o.chainID, "first": first, "last": head, "entries": entries})
}

// lists is what a history leaves of a contract's lists, and what waits.
func (o *onchain) lists(a *app, contract string, at common.Address, words ...string) (map[string]any, error) {
	head, err := o.node.HeaderByNumber(a.ctx, nil)
	if err != nil {
		return nil, registry.Explain(err)
	}
	entries, err := registry.History(a.ctx, o.node, contract, at, 0, head.Number.Uint64())
	if err != nil {
		return nil, err
	}
	out := map[string]any{"contract": at, "chain_id": o.chainID, "block": head.Number.Uint64()}
	for _, word := range words {
		values := []string{}
		for _, h := range registry.Members(entries, word) {
			text := common.Bytes2Hex(h[:])
			if word == "registered-app" {
				text = common.Bytes2Hex(h[12:])
			}
			values = append(values, text)
			a.printf("%-18s  %s\n", word, text)
		}
		out[word] = values
	}
	pending := registry.Pending(entries, time.Unix(int64(head.Time), 0))
	for _, e := range pending {
		a.printf("%-18s  %s %s, from %s\n", "announced", e.Policy, e.Value, when(*e.Effective))
	}
	out["announced"] = append([]registry.Entry{}, pending...)
	return out, nil
}

// status prints what a contract says of itself.
func (o *onchain) status(a *app, s registry.Status) {
	a.printf("Owner               %s\n", s.Owner.Hex())
	if s.PendingOwner != (common.Address{}) {
		a.printf("Offered to          %s, who has not accepted\n", s.PendingOwner.Hex())
	}
	if s.Guardian != (common.Address{}) {
		a.printf("Guardian            %s\n", s.Guardian.Hex())
	}
	notice := a.paint(amber, "none: what is allowed takes effect at once")
	if s.Notice != 0 {
		notice = (time.Duration(s.Notice) * time.Second).String()
	}
	a.printf("Notice              %s\n", notice)
}
