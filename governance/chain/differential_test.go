// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"math/big"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/common/hexutil"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/governance/registry"
)

// send makes a call that may well be refused, unsigned, as anybody.
func (w *world) send(from, to common.Address, data []byte) {
	var hash common.Hash
	w.call(&hash, "eth_sendTransaction", map[string]any{"from": from, "to": to, "data": hexutil.Bytes(data), "gas": "0x5b8d80"})
	// It is answered before there is a block with it.
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := w.node.TransactionReceipt(w.t.Context(), hash); err == nil {
			return
		} else if time.Now().After(end) {
			w.t.Fatal(err)
		}
	}
}

// What is computed from proven storage is what the contracts answer at the same block, over
// random registries and apps, foreign ones among them, and whatever happens to them: notice that elapses or not,
// revocations, withdrawals, epochs, platforms, freezing. SEED=N repeats a run.
func TestThreat_G03_ComputedAnswersAreTheContracts(t *testing.T) {
	differential(t, 250, 12*time.Second)
}

func TestSoakComputedAnswersAreTheContracts(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: thousands of states of a chain; make soak runs them")
	}
	differential(t, 6000, 10*time.Minute)
}

// differential asks in so many states, or in as many as the time is enough for.
func differential(t *testing.T, states int, enough time.Duration) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	// No block by the clock: what is read in turn is of one state.
	w := newWorldOf(t, devchain.Config{BlockTime: 24 * time.Hour})
	owner := w.chain.Owner
	w.call(nil, "anvil_impersonateAccount", owner)
	kms := registry.KMSAt(w.chain.Registry)
	a, err := w.openBy(func(c *Config) { c.Foreign = true }, 1, w.chain.RPC)
	if err != nil {
		t.Fatal(err)
	}

	// Few of everything, so that what is asked is often what is there.
	pick := func(n int) byte { return byte(1 + r.IntN(n)) }
	hash := func() [32]byte { return [32]byte{pick(3)} }
	word := func(list ...string) string { return list[r.IntN(len(list))] }
	tee := func() string { return word("dstack-tdx", "dstack-amd-sev-snp", "") }
	tcb := func() string { return word("UpToDate", "UpToDate", "OutOfDate", "") }
	advisory := func() string { return word("INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3") }
	coin := func() bool { return r.IntN(2) == 0 }
	var apps []common.Address
	var strangers []*stranger
	deploy := func() {
		if r.IntN(4) == 0 {
			s := w.stranger()
			strangers, apps = append(strangers, s), append(apps, s.at)
			apps = apps[max(0, len(apps)-4):]
			return
		}
		apps = append(apps, w.app(func(c *registry.AppConfig) {
			c.ComposeHashes, c.DeviceIds = [][32]byte{hash()}, [][32]byte{hash()}
			c.AllowAnyDevice, c.RequireTcbUpToDate, c.Frozen = coin(), coin(), r.IntN(4) == 0
			if coin() {
				c.Notice = 600
			}
		}))
		apps = apps[max(0, len(apps)-4):]
	}
	deploy()
	someApp := func() common.Address {
		if r.IntN(12) == 0 {
			return common.Address{7} // nothing is there
		}
		return apps[r.IntN(len(apps))]
	}
	// raw is a function that only the contracts' owners call by hand.
	raw := func(contract string, name string, args ...any) []byte {
		parsed, err := registry.ABI(contract)
		if err != nil {
			t.Fatal(err)
		}
		data, err := parsed.Pack(name, args...)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	change := func() {
		contract, at := contracts.KMS, w.chain.Registry
		app := registry.AppAt(someApp())
		if coin() {
			contract, at = contracts.App, app.Address()
		}
		do := func(c registry.Call) { w.send(owner, c.To, c.Data) }
		switch r.IntN(25) {
		case 24:
			if len(strangers) == 0 {
				return
			}
			s, name, args := strangers[r.IntN(len(strangers))], "allow", []any{hash(), coin()}
			if r.IntN(4) == 0 {
				name, args = "behave", []any{big.NewInt([]int64{honest, reverts, malformed, talks, describes}[r.IntN(5)])}
			}
			data, err := s.abi.Pack(name, args...)
			if err != nil {
				t.Fatal(err)
			}
			w.send(owner, s.at, data)
		case 0, 1, 2:
			do(kms.AddOSImage(hash(), uint64(r.IntN(3))))
		case 3:
			do(kms.RemoveOSImage(hash()))
		case 4:
			if r.IntN(12) == 0 {
				do(kms.SetMinOSEpoch(uint64(r.IntN(3))))
			}
		case 5, 6:
			do(kms.AddMR(hash()))
		case 7:
			do(kms.RemoveMR(hash()))
		case 8, 9:
			do(kms.AddDevice(hash()))
		case 10:
			do(kms.RemoveDevice(hash()))
		case 11:
			do(kms.WithdrawApp(app.Address()))
		case 12, 13:
			do(kms.RegisterApp(app.Address()))
		case 14:
			do(app.AddComposeHash(hash()))
		case 15:
			do(app.RemoveComposeHash(hash()))
		case 16:
			do(app.AddDevice(hash()))
		case 17:
			do(app.SetAllowAnyDevice(coin()))
		case 18:
			do(app.SetRequireTCBUpToDate(coin()))
		case 19:
			if r.IntN(4) == 0 {
				do(app.Freeze())
			} else if r.IntN(4) == 0 { // as a contract that destroyed itself was, once
				w.call(nil, "anvil_setCode", app.Address(), "0x")
				if err := w.chain.Mine(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			deploy()
		case 20:
			do(app.SetNotice(time.Duration(r.IntN(2)) * 600 * time.Second))
		case 21:
			w.advance(time.Duration(r.IntN(900)) * time.Second)
		case 22:
			switch r.IntN(4) {
			case 0:
				w.send(owner, at, raw(contract, "setPlatformRequired", coin() && (contract == contracts.App || r.IntN(4) == 0)))
			case 1:
				w.send(owner, at, raw(contract, word("addTeeVariant", "addTeeVariant", "removeTeeVariant"), word("dstack-tdx", "dstack-amd-sev-snp")))
			case 2:
				w.send(owner, at, raw(contract, word("addTcbStatus", "addTcbStatus", "removeTcbStatus"), word("UpToDate", "OutOfDate")))
			case 3:
				w.send(owner, at, raw(contract, word("blockAdvisory", "unblockAdvisory"), advisory()))
			}
		case 23:
			gateway := word("", "0x1234", "a gateway whose name is longer than the thirty-one bytes of a slot")
			do(kms.SetGateway(gateway))
		}
	}

	seen, asked, began := map[string]int{}, 0, time.Now()
	for ; asked < states && time.Since(began) < enough; asked++ {
		for range 1 + r.IntN(4) {
			change()
		}
		for range 4 {
			q := governance.Request{Role: governance.App, Purpose: governance.Keys, ImageBound: true, Boot: governance.BootInfo{
				TEEVariant: tee(), AppID: dstack.AppID(someApp()), ComposeHash: hash(), DeviceID: hash(), MRAggregated: hash(), TCBStatus: tcb(),
			}}
			if image := hash(); r.IntN(20) != 0 {
				q.Boot.OSImageHash = image[:]
			}
			if coin() {
				q.Boot.AdvisoryIDs = []string{advisory()}
			}
			if r.IntN(4) == 0 {
				q.Role, q.Purpose = governance.KMS, governance.Service
			}
			call, err := kms.Allowed(q.Role, q.Boot, q.Boot.TEEVariant != "")
			if err != nil {
				t.Fatal(err)
			}
			got, code := w.compare(a, q, call)
			seen[code]++
			if got != nil && q.Role == governance.App && !got.foreign {
				w.agrees(t, q, got)
			}
		}
	}
	t.Logf("%d states: %v", asked, seen)
	// A few states meet most answers, and thousands all of them.
	must := []string{"allowed", "app app_not_registered", "app compose_hash_not_allowed", "app os_image_not_allowed", "kms tcb_not_allowed"}
	if asked >= 1000 {
		must = append(must, "app app_not_deployed", "app device_not_allowed", "app app_refuses", "app tcb_not_allowed", "app tee_not_allowed", "app advisory_blocked", "app os_image_epoch",
			"kms mr_not_allowed", "kms device_not_allowed", "kms advisory_blocked", "kms tee_not_allowed")
	}
	for _, code := range must {
		if seen[code] == 0 && asked >= 100 {
			t.Errorf("no question was answered %q", code)
		}
	}
}

// compare asks both at the head, and returns what was computed and under which code. While
// the node makes a block it proves of the last one what is of the next: a difference counts
// when it stays.
func (w *world) compare(a *Authority, q governance.Request, call registry.Call) (*terms, string) {
	w.t.Helper()
	for try := 1; ; try++ {
		block, err := w.node.HeaderByNumber(w.t.Context(), nil)
		if err != nil {
			w.t.Fatal(err)
		}
		values, err := registry.View(w.t.Context(), w.node, call, block.Number)
		if err != nil {
			w.t.Fatal(err)
		}
		got, no, err := a.ask(w.t.Context(), block, q)
		reason, code := "", "allowed"
		if no != nil {
			reason, code = no.reason, string(q.Role)+" "+no.code
		}
		says := values[1].(string)
		if no != nil && no.code == "app_refuses" {
			says = said(says)
		}
		if err == nil && (no == nil) == values[0].(bool) && reason == says {
			return got, code
		}
		if try == 10 {
			w.t.Fatalf("block %s, %+v: computed %q (%v), the contract says %v %q", block.Number, q, reason, err, values[0], values[1])
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// agrees holds what else is read of an app that is allowed against what the contracts'
// views say.
func (w *world) agrees(t *testing.T, q governance.Request, got *terms) {
	t.Helper()
	app, err := registry.AppAt(common.Address(q.Boot.AppID)).Status(t.Context(), w.node, nil)
	if err != nil {
		t.Fatal(err)
	}
	reg, err := registry.KMSAt(w.chain.Registry).Status(t.Context(), w.node, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := registry.Change{Policy: registry.PolicyID("compose-hash"), Value: common.Hash(q.Boot.ComposeHash)}
	announced, err := registry.ReadChange(t.Context(), w.node, contracts.App, common.Address(q.Boot.AppID), c, nil)
	if err != nil {
		t.Fatal(err)
	}
	at := uint64(0)
	if !announced.Announced.IsZero() {
		at = uint64(announced.Announced.Unix())
	}
	if got.notice != app.Notice || got.frozen != app.Frozen || got.registryNotice != reg.Notice || got.GatewayAppID != reg.GatewayAppID || got.announced != at {
		t.Fatalf("read %+v, the contracts say %+v, %+v, %+v", got, app, reg, announced)
	}
}
