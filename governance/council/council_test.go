// SPDX-License-Identifier: Apache-2.0

package council

import (
	"bytes"
	"context"
	"encoding/json"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/core/types"
	"github.com/ethereum/go-ethereum/ethclient"
	"github.com/ethereum/go-ethereum/signer/core/apitypes"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
)

func newKey(t *testing.T) transact.Signer {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	if _, err := devchain.NewKey(file, file+".pass"); err != nil {
		t.Fatal(err)
	}
	return openKey(t, file, file+".pass")
}

func openKey(t *testing.T, file, passphrase string) transact.Signer {
	t.Helper()
	pass, err := os.ReadFile(passphrase)
	if err != nil {
		t.Fatal(err)
	}
	s, err := transact.OpenKeystore(file, bytes.TrimSpace(pass))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func sample() *Proposal {
	return &Proposal{ChainID: 31337, Council: common.Address{1}, Nonce: 4, Deadline: 1 << 31, Calls: []Call{{common.Address{2}, []byte{1, 2, 3, 4, 5}}}, Signatures: []Signature{}}
}

// Threat G06: a proposal's file goes from hand to hand, and whoever changes it has no
// signatures on it.
func TestThreat_G06_SignaturesAreOfOneProposal(t *testing.T) {
	key := newKey(t)
	p := sample()
	if err := p.Sign(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse(text)
	if err != nil || again.Digest() != p.Digest() || len(again.Signatures) != 1 {
		t.Fatalf("%+v, %v", again, err)
	}
	seen := map[common.Hash]string{p.Digest(): "as it is"}
	for name, edit := range map[string]func(*Proposal){
		"another chain":    func(p *Proposal) { p.ChainID++ },
		"another council":  func(p *Proposal) { p.Council[19]++ },
		"another nonce":    func(p *Proposal) { p.Nonce++ },
		"a later deadline": func(p *Proposal) { p.Deadline++ },
		"another target":   func(p *Proposal) { p.Calls[0].To[19]++ },
		"other data":       func(p *Proposal) { p.Calls[0].Data[4]++ },
		"one more call":    func(p *Proposal) { p.Calls = append(p.Calls, p.Calls[0]) },
	} {
		var c Proposal
		if err := json.Unmarshal(text, &c); err != nil {
			t.Fatal(err)
		}
		edit(&c)
		if was := seen[c.Digest()]; was != "" {
			t.Errorf("%s is signed as %s", name, was)
		}
		seen[c.Digest()] = name
		changed, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(changed); fault.Code(err) != "council_signature" {
			t.Errorf("%s: %v", name, err)
		}
		if err := p.Merge(&c); fault.Code(err) != "council_mismatch" {
			t.Errorf("%s: %v", name, err)
		}
	}
	stolen := *p
	stolen.Signatures = []Signature{{Member: common.Address{9}, Signature: p.Signatures[0].Signature}}
	if changed, _ := json.Marshal(stolen); fault.Code(second(Parse(changed))) != "council_signature" {
		t.Error("a signature counts for somebody else")
	}
	// The other form of the same signature, which contracts do not take.
	n, _ := new(big.Int).SetString("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141", 16)
	other := slices.Clone(p.Signatures[0].Signature)
	new(big.Int).Sub(n, new(big.Int).SetBytes(other[32:64])).FillBytes(other[32:64])
	other[64] = 27 + 28 - other[64]
	if err := sample().Add(Signature{key.Address(), other}); fault.Code(err) != "council_signature" {
		t.Errorf("a malleable signature: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestProposalsThatAreNone(t *testing.T) {
	for name, edit := range map[string]func(*Proposal){
		"no chain":         func(p *Proposal) { p.ChainID = 0 },
		"no council":       func(p *Proposal) { p.Council = common.Address{} },
		"no call":          func(p *Proposal) { p.Calls = nil },
		"too many calls":   func(p *Proposal) { p.Calls = make([]Call, maxCalls+1) },
		"no deadline":      func(p *Proposal) { p.Deadline = 0 },
		"no time":          func(p *Proposal) { p.Deadline = 1 << 50 },
		"no target":        func(p *Proposal) { p.Calls[0].To = common.Address{} },
		"no function":      func(p *Proposal) { p.Calls[0].Data = []byte{1, 2, 3} },
		"too much data":    func(p *Proposal) { p.Calls[0].Data = make([]byte, maxData+1) },
		"many signatures":  func(p *Proposal) { p.Signatures = make([]Signature, maxSignatures+1) },
		"a negative epoch": func(p *Proposal) { p.Deadline = -1 },
	} {
		p := sample()
		edit(p)
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(text); fault.Code(err) != "council_proposal" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, text := range []string{"", "{}", `{"chain_id":1}`, `{"call":"x"}`, strings.Repeat(" ", MaxFile+1)} {
		if _, err := Parse([]byte(text)); fault.Code(err) != "council_proposal" {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	text, _ := json.Marshal(sample())
	if _, err := Parse(append(text, '1')); fault.Code(err) != "council_proposal" {
		t.Errorf("a tail: %v", err)
	}
}

// What members sign, and how it is submitted, is what the contract on a real chain takes.
func TestTheContractTakesWhatMembersSigned(t *testing.T) {
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	dir := t.TempDir()
	d, err := devchain.Start(t.Context(), devchain.Config{Dir: dir, Step: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	defer devchain.Stop(dir, 10*time.Second)
	node, err := ethclient.DialContext(t.Context(), d.RPC)
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	sender := &transact.Sender{Node: node, Signer: openKey(t, d.Keystore, d.Passphrase), Timeout: 30 * time.Second}
	var keys []transact.Signer
	var members [][]byte
	for range 5 {
		k := newKey(t)
		keys, members = append(keys, k), append(members, k.Address().Bytes())
	}
	code, err := registry.Creation(contracts.Council, members, uint64(3))
	if err != nil {
		t.Fatal(err)
	}
	made, err := sender.Deploy(t.Context(), code)
	if err != nil {
		t.Fatal(err)
	}
	at := made.Receipt.ContractAddress
	kms := registry.KMSAt(d.Registry)
	if _, err := sender.Do(t.Context(), kms.Transfer(at)); err != nil {
		t.Fatal(err)
	}
	state := func() registry.CouncilStatus {
		t.Helper()
		s, err := registry.CouncilAt(at).Status(t.Context(), node, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := state()
	if len(s.Members) != 5 || s.Threshold != 3 || s.Nonce != 0 {
		t.Fatalf("%+v", s)
	}
	accept, add := kms.Accept(at), kms.AddOSImage(dstack.ImageHash{1}, 2)
	p, err := New(d.ChainID, at, 0, time.Now().Add(time.Hour), Call{accept.To, accept.Data}, Call{add.To, add.Data})
	if err != nil {
		t.Fatal(err)
	}
	values, err := registry.View(t.Context(), node, p.Digested(), nil)
	if err != nil || common.Hash(values[0].([32]byte)) != p.Digest() {
		t.Fatalf("the contract has %v signed, not %s (%v)", values, p.Digest(), err)
	}
	sign := func(by ...int) {
		t.Helper()
		for _, i := range by {
			if err := p.Sign(t.Context(), keys[i]); err != nil {
				t.Fatal(err)
			}
		}
	}
	sign(4, 4, 1)
	if err := p.Sign(t.Context(), newKey(t)); err != nil { // a stranger's counts for nothing
		t.Fatal(err)
	}
	held, err := p.Hold(state(), time.Now())
	if err != nil || held.Enough() || len(held.Signed) != 2 || len(held.Missing) != 3 || len(held.Strangers) != 1 {
		t.Fatalf("%+v, %v", held, err)
	}
	if _, err := p.Execution(held); fault.Code(err) != "council_signatures" {
		t.Errorf("two of three: %v", err)
	}
	// The contract itself says so as well.
	short := *held
	short.Threshold = 1
	call, err := p.Execution(&short)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sender.Do(t.Context(), call); fault.Code(err) != "contract_signatures" {
		t.Errorf("two of three, submitted: %v", err)
	}
	sign(0, 2)
	if held, err = p.Hold(state(), time.Now()); err != nil || !held.Enough() || len(held.Signed) != 4 {
		t.Fatalf("%+v, %v", held, err)
	}
	if call, err = p.Execution(held); err != nil {
		t.Fatal(err)
	}
	if _, err := sender.Do(t.Context(), call); err != nil {
		t.Fatal(err)
	}
	status, err := kms.Status(t.Context(), node, nil)
	if err != nil || status.Owner != at {
		t.Errorf("%+v, %v", status, err)
	}
	if ok, err := add.Done.Holds(t.Context(), node, nil); err != nil || !ok {
		t.Errorf("the image is not allowed: %v", err)
	}
	// Once, and not twice.
	if _, err := p.Hold(state(), time.Now()); fault.Code(err) != "council_nonce" {
		t.Errorf("a second time: %v", err)
	}
	if _, err := sender.Do(t.Context(), call); fault.Code(err) != "contract_signatures" {
		t.Errorf("a second time, submitted: %v", err)
	}
	if _, err := sample().Hold(registry.CouncilStatus{Nonce: 4}, time.Unix(1<<31+1, 0)); fault.Code(err) != "council_expired" {
		t.Errorf("too late: %v", err)
	}
}

// wallet is a signer that gives what it is told to.
type wallet struct {
	transact.Signer
	typed     transact.Typed
	signature []byte
}

func (w *wallet) SignTyped(_ context.Context, t transact.Typed) ([]byte, error) {
	w.typed = t
	return w.signature, nil
}

func (w *wallet) Sign(context.Context, *types.Transaction, *big.Int) (*types.Transaction, error) {
	panic("no transaction is asked for")
}

// A wallet that computes the hash itself is shown the same, and one that signs something
// else is not believed.
func TestAWalletsAnswerIsChecked(t *testing.T) {
	key := newKey(t)
	p, q := sample(), sample()
	q.Nonce++
	if err := q.Sign(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	w := &wallet{Signer: key, signature: q.Signatures[0].Signature}
	if err := p.Sign(t.Context(), w); fault.Code(err) != "signer_answer" || len(p.Signatures) != 0 {
		t.Errorf("another statement signed: %v", err)
	}
	w.signature = hexutil.Bytes{1}
	if err := p.Sign(t.Context(), w); fault.Code(err) != "signer_answer" {
		t.Errorf("no signature: %v", err)
	}
	text, err := json.Marshal(w.typed.JSON)
	var read apitypes.TypedData
	if err == nil {
		err = json.Unmarshal(text, &read)
	}
	if err != nil {
		t.Fatal(err)
	}
	if hash, _, err := apitypes.TypedDataAndHash(read); err != nil || common.BytesToHash(hash) != p.Digest() {
		t.Errorf("a wallet computes %x of %s, not %s (%v)", hash, text, p.Digest(), err)
	}
}

func FuzzProposal(f *testing.F) {
	text, err := json.Marshal(sample())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"chain_id":1,"calls":[{}],"signatures":[{"member":"0x0100000000000000000000000000000000000000","signature":"0x00"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			return
		}
		again, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		q, err := Parse(again)
		if err != nil || q.Digest() != p.Digest() || len(q.Signatures) != len(p.Signatures) {
			t.Fatalf("%s: %v", again, err)
		}
		for _, s := range p.Signatures {
			if who, ok := transact.SignedTyped(p.Digest(), s.Signature); !ok || who != s.Member {
				t.Fatal("a signature that does not verify was taken")
			}
		}
	})
}
