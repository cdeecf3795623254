// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"
	"github.com/ethereum/go-ethereum/ethclient"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
)

// world is a real node with the contracts, and somebody who owns them.
type world struct {
	t      *testing.T
	chain  *devchain.Chain
	sender *transact.Sender
	node   *ethclient.Client
	offset atomic.Int64 // of the chain's time before ours, seconds
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, devchain.Config{})
}

func newWorldOf(t *testing.T, cfg devchain.Config) *world {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	dir := t.TempDir()
	cfg.Dir, cfg.Step = dir, t.Logf
	c, err := devchain.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := devchain.Stop(dir, 10*time.Second); err != nil {
			t.Error(err)
		}
	})
	pass, err := os.ReadFile(c.Passphrase)
	if err != nil {
		t.Fatal(err)
	}
	key, err := transact.OpenKeystore(c.Keystore, bytes.TrimSpace(pass))
	if err != nil {
		t.Fatal(err)
	}
	node, err := ethclient.DialContext(t.Context(), c.RPC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(node.Close)
	return &world{t: t, chain: c, node: node, sender: &transact.Sender{Node: node, Signer: key, Timeout: 30 * time.Second}}
}

// do makes a call, and makes it final unless told otherwise.
func (w *world) do(c registry.Call) *transact.Outcome {
	w.t.Helper()
	out, err := w.sender.Do(w.t.Context(), c)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) finalise() {
	w.t.Helper()
	if err := w.chain.Mine(w.t.Context(), 70); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) advance(d time.Duration) {
	w.t.Helper()
	if err := w.chain.Advance(w.t.Context(), d); err != nil {
		w.t.Fatal(err)
	}
	w.offset.Add(int64(d / time.Second))
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.offset.Load()) * time.Second) }

// authority reads by the given endpoints; each question sees the chain as it is.
func (w *world) authority(threshold int, urls ...string) *Authority {
	w.t.Helper()
	a, err := w.open(threshold, urls...)
	if err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) open(threshold int, urls ...string) (*Authority, error) {
	return w.openBy(func(*Config) {}, threshold, urls...)
}

// openBy is open with other settings.
func (w *world) openBy(edit func(*Config), threshold int, urls ...string) (*Authority, error) {
	var ticks atomic.Int64
	cfg := Config{RPC: urls, Threshold: threshold, ChainID: w.chain.ChainID, Registry: w.chain.Registry, File: filepath.Join(w.t.TempDir(), "floor"), MaxStaleness: 3 * time.Hour,
		Now: func() time.Time { return w.now().Add(time.Duration(ticks.Add(2)) * time.Second) }}
	edit(&cfg)
	r, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(r.Close)
	return NewAuthority(r), nil
}

// app deploys one that allows a manifest on any device.
func (w *world) app(edit func(*registry.AppConfig)) common.Address {
	w.t.Helper()
	c := registry.AppConfig{Owner: w.chain.Owner, AllowAnyDevice: true, ComposeHashes: [][32]byte{compose}}
	if edit != nil {
		edit(&c)
	}
	out := w.do(registry.KMSAt(w.chain.Registry).DeployApp(c))
	for _, l := range out.Receipt.Logs {
		if e, ok, err := registry.ParseLog(contracts.KMS, *l); err == nil && ok && e.Name == "AppDeployedViaFactory" {
			return e.Args["appId"].(common.Address)
		}
	}
	w.t.Fatal("no app was deployed")
	return common.Address{}
}

var (
	compose = dstack.ComposeHash{0xc0}
	other   = dstack.ComposeHash{0xee}
	image   = dstack.ImageHash{0x1a}
	mr      = [32]byte{0x3b}
	machine = dstack.DeviceID{0xde}
)

func question(app common.Address, h dstack.ComposeHash) governance.Request {
	return governance.Request{Role: governance.App, Purpose: governance.Keys, ImageBound: true, Boot: governance.BootInfo{
		TEEVariant: "dstack-tdx", AppID: dstack.AppID(app), ComposeHash: h, OSImageHash: image[:], MRAggregated: mr, DeviceID: machine, TCBStatus: "UpToDate"}}
}

// want asks, and demands a code; "" is allowed.
func (w *world) want(a *Authority, q governance.Request, code string) governance.Decision {
	w.t.Helper()
	d, err := a.Decide(w.t.Context(), q)
	got := d.Code
	if err != nil {
		got = fault.Code(err)
	}
	if got != code || d.Allowed != (code == "" && err == nil) {
		w.t.Fatalf("want %q, got %q: %+v, %v", code, got, d, err)
	}
	return d
}

func TestTheContractsDecide(t *testing.T) {
	w := newWorld(t)
	kms := registry.KMSAt(w.chain.Registry)
	a := w.authority(1, w.chain.RPC)
	app := w.app(nil)
	w.finalise()
	w.want(a, question(app, compose), "os_image_not_allowed")
	w.do(kms.AddOSImage(image, 3))
	w.do(kms.SetGateway("0x" + strings.Repeat("9a", 20)))
	w.finalise()
	d := w.want(a, question(app, compose), "")
	if !strings.Contains(d.By, w.chain.Registry.Hex()) || !strings.Contains(d.By, " block ") || d.GatewayAppID != "0x"+strings.Repeat("9a", 20) {
		t.Errorf("%+v", d)
	}
	w.want(a, question(app, other), "compose_hash_not_allowed")
	w.want(a, question(common.Address{7}, compose), "app_not_registered")
	q := question(app, compose)
	q.ImageBound = false
	w.want(a, q, "image_unbound")

	// What is added counts when it is final, what is removed at once.
	w.do(registry.AppAt(app).AddComposeHash(other))
	w.want(a, question(app, other), "compose_hash_not_allowed")
	w.finalise()
	w.want(a, question(app, other), "")
	w.do(registry.AppAt(app).RemoveComposeHash(other))
	w.want(a, question(app, other), "compose_hash_not_allowed")

	w.do(kms.SetMinOSEpoch(4))
	w.want(a, question(app, compose), "os_image_epoch")
	newer := dstack.ImageHash{0x2b}
	w.do(kms.AddOSImage(newer, 4))
	w.finalise()
	q = question(app, compose)
	q.Boot.OSImageHash = newer[:]
	w.want(a, q, "")

	// Devices, and the TCB.
	strict := w.app(func(c *registry.AppConfig) { c.AllowAnyDevice, c.RequireTcbUpToDate = false, true })
	w.finalise()
	q.Boot.AppID = dstack.AppID(strict)
	w.want(a, q, "device_not_allowed")
	w.do(registry.AppAt(strict).AddDevice(machine))
	w.finalise()
	w.want(a, q, "")
	q.Boot.TCBStatus = "OutOfDate"
	w.want(a, q, "tcb_not_allowed")

	// KMSs.
	k := q
	k.Role, k.Boot.TCBStatus = governance.KMS, "UpToDate"
	w.want(a, k, "mr_not_allowed")
	w.do(kms.AddMR(mr))
	w.finalise()
	w.want(a, k, "device_not_allowed")
	w.do(kms.AddDevice(machine))
	w.finalise()
	w.want(a, k, "")
	k.Boot.TCBStatus = "SWHardeningNeeded"
	w.want(a, k, "tcb_not_allowed")

	about, err := a.About(t.Context())
	if err != nil || about.ChainID != w.chain.ChainID || !strings.EqualFold(about.Contract, w.chain.Registry.Hex()) || !strings.EqualFold(about.Implementation, w.chain.AppImplementation.Hex()) {
		t.Errorf("%+v, %v", about, err)
	}

	// What is computed from storage is what the contract answers.
	for _, q := range []governance.Request{question(app, compose), question(app, other), q, k, question(common.Address{7}, compose)} {
		call, err := kms.Allowed(q.Role, q.Boot, true)
		if err != nil {
			t.Fatal(err)
		}
		values, err := registry.View(t.Context(), w.node, call, nil)
		if err != nil {
			t.Fatal(err)
		}
		d, err := a.Decide(t.Context(), q)
		if err != nil || d.Allowed != values[0].(bool) || d.Reason != values[1].(string) {
			t.Errorf("computed %+v (%v), the contract says %v", d, err, values)
		}
	}
}

// Threat G06: who has the owner's key must wait, in public; and a frozen app stays.
func TestThreat_G06_NoticeAndFrozenApps(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(func(c *registry.AppConfig) { c.Notice = 3600 })
	frozen := w.app(func(c *registry.AppConfig) { c.Frozen = true })
	w.finalise()
	a := w.authority(1, w.chain.RPC)
	add := registry.AppAt(app).AddComposeHash(other)
	if out := w.do(add); out.State != transact.Announced {
		t.Fatalf("%+v", out)
	}
	w.finalise()
	w.want(a, question(app, other), "compose_hash_not_allowed")
	w.advance(2 * time.Hour)
	w.want(a, question(app, other), "compose_hash_not_allowed") // announced is not made
	w.do(add)
	w.finalise()
	w.want(a, question(app, other), "")
	// What a relying party needs to know of that.
	s, err := a.Standing(t.Context(), question(app, other))
	if err != nil || !s.Allowed || s.Notice != time.Hour || s.RegistryNotice != 0 || s.Frozen || s.BlockTime.Sub(s.Announced) < 2*time.Hour || s.BlockTime.Sub(s.Announced) > 3*time.Hour {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := a.Standing(t.Context(), question(frozen, compose)); err != nil || !s.Frozen || s.Announced.IsZero() || s.Block == 0 || s.BlockHash == (common.Hash{}) || s.Threshold != 1 || s.Endpoints != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	// More notice counts when it is final.
	w.do(registry.AppAt(app).SetNotice(2 * time.Hour))
	if s, err := a.Standing(t.Context(), question(app, compose)); err != nil || s.Notice != time.Hour {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := w.sender.Do(t.Context(), registry.AppAt(frozen).AddComposeHash(other)); err == nil {
		t.Error("a frozen app was changed")
	}
	w.want(a, question(frozen, compose), "")
	w.want(a, question(frozen, other), "compose_hash_not_allowed")
}

// liar is an endpoint between a reader and a node.
type liar struct {
	*httptest.Server
	mu     sync.Mutex
	answer func(method string, result json.RawMessage) json.RawMessage
	before func(http.ResponseWriter) bool
	ask    func(body []byte) []byte // what the node is asked instead
}

func newLiar(t *testing.T, node string) *liar {
	t.Helper()
	to, err := url.Parse(node)
	if err != nil {
		t.Fatal(err)
	}
	l := &liar{}
	l.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l.mu.Lock()
		answer, before, ask := l.answer, l.before, l.ask
		l.mu.Unlock()
		if before != nil && before(w) {
			return
		}
		body, _ := io.ReadAll(r.Body)
		if ask != nil {
			body = ask(body)
		}
		var q struct {
			Method string `json:"method"`
		}
		json.Unmarshal(body, &q)
		resp, err := http.Post(to.String(), "application/json", bytes.NewReader(body))
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		var out map[string]json.RawMessage
		if answer != nil && json.Unmarshal(text, &out) == nil && out["result"] != nil {
			out["result"] = answer(q.Method, out["result"])
			text, _ = json.Marshal(out)
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(text)
	}))
	t.Cleanup(l.Close)
	return l
}

func (l *liar) lie(answer func(string, json.RawMessage) json.RawMessage, before func(http.ResponseWriter) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.answer, l.before = answer, before
}

// edit changes a field of results of a method.
func edit(method, field string, change func(json.RawMessage) any) func(string, json.RawMessage) json.RawMessage {
	return func(m string, result json.RawMessage) json.RawMessage {
		if m != method {
			return result
		}
		if field == "" {
			out, _ := json.Marshal(change(result))
			return out
		}
		var o map[string]json.RawMessage
		if json.Unmarshal(result, &o) != nil {
			return result
		}
		o[field], _ = json.Marshal(change(o[field]))
		out, _ := json.Marshal(o)
		return out
	}
}

// Threat G03: endpoints that lie, lag, or are of another chain.
func TestThreat_G03_EndpointsAreCheckedNotBelieved(t *testing.T) {
	w := newWorld(t)
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	bad := newLiar(t, w.chain.RPC)
	good := question(app, compose)
	w.want(w.authority(1, bad.URL), good, "") // it tells the truth so far

	flip := func(nodes json.RawMessage) any {
		var list []hexutil.Bytes
		json.Unmarshal(nodes, &list)
		for _, n := range list {
			n[len(n)-1] ^= 1
		}
		return list
	}
	for name, c := range map[string]struct {
		answer func(string, json.RawMessage) json.RawMessage
		before func(http.ResponseWriter) bool
		code   string
	}{
		"an altered proof of the account": {edit("eth_getProof", "accountProof", flip), nil, "chain_proof"},
		"altered storage": {edit("eth_getProof", "storageProof", func(raw json.RawMessage) any {
			var list []map[string]json.RawMessage
			json.Unmarshal(raw, &list)
			for _, p := range list {
				out, _ := json.Marshal(flip(p["proof"]))
				p["proof"] = out
			}
			return list
		}), nil, "chain_proof"},
		"no proof":           {edit("eth_getProof", "storageProof", func(json.RawMessage) any { return []any{} }), nil, "chain_proof"},
		"another state root": {edit("eth_getBlockByNumber", "stateRoot", func(json.RawMessage) any { return common.Hash{1} }), nil, "chain_proof"},
		"other code":         {edit("eth_getCode", "", func(json.RawMessage) any { return "0x00" }), nil, "chain_proof"},
		"another chain":      {edit("eth_chainId", "", func(json.RawMessage) any { return "0x1" }), nil, "chain_no_agreement"},
		"an old block":       {edit("eth_getBlockByNumber", "timestamp", func(json.RawMessage) any { return "0x10" }), nil, "chain_stale"},
		"a block to come":    {edit("eth_getBlockByNumber", "timestamp", func(json.RawMessage) any { return "0xffffffff" }), nil, "chain_stale"},
		"not JSON":           {nil, func(w http.ResponseWriter) bool { io.WriteString(w, "<html>"); return true }, "chain_no_agreement"},
		"a redirect": {nil, func(rw http.ResponseWriter) bool {
			rw.Header().Set("Location", w.chain.RPC)
			rw.WriteHeader(http.StatusTemporaryRedirect)
			return true
		}, "chain_no_agreement"},
		"too much": {nil, func(rw http.ResponseWriter) bool {
			io.WriteString(rw, `{"jsonrpc":"2.0","id":1,"result":"`)
			for range 300 {
				io.WriteString(rw, strings.Repeat("0", 32<<10))
			}
			return true
		}, "chain_no_agreement"},
	} {
		bad.lie(c.answer, c.before)
		w.want(w.authority(1, bad.URL), good, c.code)
		t.Log(name)
		// Beside two that do not, it changes nothing.
		b, d := newLiar(t, w.chain.RPC), newLiar(t, w.chain.RPC)
		w.want(w.authority(2, bad.URL, b.URL, d.URL), good, "")
		w.want(w.authority(2, bad.URL, b.URL, d.URL), question(app, other), "compose_hash_not_allowed")
	}
	// What was no proof once, as of a head that gave way, is asked for again, and not more.
	for failures, code := range []string{"", "", "chain_proof"} {
		var asked atomic.Int64
		bad.lie(edit("eth_getProof", "accountProof", func(nodes json.RawMessage) any {
			if asked.Add(1) <= int64(failures) {
				return flip(nodes)
			}
			return nodes
		}), nil)
		w.want(w.authority(1, bad.URL), good, code)
	}
	bad.lie(nil, nil)

	// Fewer than must agree.
	down := newLiar(t, w.chain.RPC)
	down.Server.Close()
	w.want(w.authority(2, bad.URL, down.URL), good, "chain_no_agreement")
	forked := newWorld(t) // another chain of the same id, with a history of its own
	forked.finalise()
	w.want(w.authority(2, bad.URL, forked.chain.RPC), good, "chain_no_agreement")

	// The registry at another address is nothing of ours.
	r, err := Open(Config{RPC: []string{bad.URL}, Threshold: 1, ChainID: w.chain.ChainID, Registry: app, File: filepath.Join(t.TempDir(), "f"), MaxStaleness: 3 * time.Hour, Now: w.now})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := NewAuthority(r).Decide(t.Context(), good); fault.Code(err) != "chain_foreign" {
		t.Errorf("an app for a registry: %v", err)
	}
	// An app of other code than ours is not computed from its storage.
	w.do(registry.AppAt(app).Upgrade(w.chain.KMSImplementation, nil))
	w.want(w.authority(1, bad.URL), good, "chain_foreign")
}

// Code that is as long as ours, and whose constructor wrote what ours writes, is not ours.
func TestThreat_G03_CodeOfTheSameLengthIsForeign(t *testing.T) {
	w := newWorldOf(t, devchain.Config{BlockTime: 24 * time.Hour})
	w.do(registry.KMSAt(w.chain.Registry).AddOSImage(image, 0))
	app := w.app(nil)
	w.finalise()
	a, q := w.authority(1, w.chain.RPC), question(app, compose)
	w.want(a, q, "")
	for name, at := range map[string]common.Address{contracts.KMS: w.chain.KMSImplementation, contracts.App: w.chain.AppImplementation} {
		code, err := w.node.CodeAt(t.Context(), at, nil)
		if err != nil {
			t.Fatal(err)
		}
		list, err := ours()
		if err != nil {
			t.Fatal(err)
		}
		spans := list[name].Immutables
		if len(spans) == 0 {
			t.Fatalf("%s has no address of its own in its code", name)
		}
		for place, i := range map[string]int{"the first byte": 0, "the middle": len(code) / 2, "the last byte": len(code) - 1, "its own address": spans[0].Start + spans[0].Length - 1, "a second time its own address": spans[len(spans)-1].Start} {
			forged := bytes.Clone(code)
			forged[i] ^= 1
			w.call(nil, "anvil_setCode", at, hexutil.Bytes(forged))
			w.finalise()
			t.Log(name, place)
			w.want(a, q, "chain_foreign")
		}
		w.call(nil, "anvil_setCode", at, hexutil.Bytes(code))
		w.finalise()
		w.want(a, q, "")
	}
	// So is a proxy that is not OpenZeppelin's, byte for byte.
	code, err := w.node.CodeAt(t.Context(), app, nil)
	if err != nil {
		t.Fatal(err)
	}
	code[len(code)-1] ^= 1
	w.call(nil, "anvil_setCode", app, hexutil.Bytes(code))
	w.finalise()
	w.want(a, q, "chain_foreign")
}

// A finalised block never falls, over restarts, too.
func TestThreat_G03_TheFinalisedBlockNeverFalls(t *testing.T) {
	w := newWorld(t)
	w.finalise()
	file := filepath.Join(t.TempDir(), "floor")
	cfg := Config{RPC: []string{w.chain.RPC}, Threshold: 1, ChainID: w.chain.ChainID, Registry: w.chain.Registry, File: file, MaxStaleness: 3 * time.Hour, Now: w.now}
	r, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := NewAuthority(r).About(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var n uint64
	fmt.Sscan(string(text), &n)
	if n == 0 {
		t.Fatal("nothing is remembered")
	}
	if err := os.WriteFile(file, []byte(fmt.Sprint(n+1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := NewAuthority(again).About(t.Context()); fault.Code(err) != "chain_rollback" {
		t.Error(err)
	}
	os.WriteFile(file, []byte("x"), 0o600)
	if _, err := Open(cfg); fault.Code(err) != "chain_floor" {
		t.Error(err)
	}
}

func TestConfigurationsThatDecideNothing(t *testing.T) {
	good := Config{RPC: []string{"http://127.0.0.1:1"}, Threshold: 1, ChainID: 1, Registry: common.Address{1}, File: "x"}
	for name, edit := range map[string]func(*Config){
		"no endpoint":          func(c *Config) { c.RPC = nil },
		"a threshold of none":  func(c *Config) { c.Threshold = 0 },
		"a threshold too high": func(c *Config) { c.Threshold = 2 },
		"one endpoint twice":   func(c *Config) { c.RPC, c.Threshold = []string{c.RPC[0], c.RPC[0]}, 2 },
		"no chain":             func(c *Config) { c.ChainID = 0 },
		"no registry":          func(c *Config) { c.Registry = common.Address{} },
		"no memory":            func(c *Config) { c.File = "" },
		"no URL":               func(c *Config) { c.RPC = []string{"/tmp/geth.ipc"} },
	} {
		c := good
		edit(&c)
		if r, err := Open(c); fault.Code(err) != "chain_config" {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				r.Close()
			}
		}
	}
}

func FuzzProof(f *testing.F) {
	f.Add([]byte(`{"accountProof":["0x00"],"storageProof":[{"proof":["0xc0"]}]}`))
	f.Add([]byte(`{"accountProof":[],"storageProof":[]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var p proof
		if json.Unmarshal(text, &p) != nil {
			return
		}
		// A root that nobody has a preimage of proves nothing.
		if a, err := verify(&p, common.Hash{1}, common.Address{1}, []common.Hash{{1}}); err == nil {
			t.Errorf("proven: %+v", a)
		}
	})
}
