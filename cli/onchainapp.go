// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/fault"
)

// onApp makes a call of an app's contract.
func (f *signFlags) onApp(a *app, id, what string, c func(registry.App) (registry.Call, error)) error {
	at, err := appAddress(a, id)
	if err != nil {
		return err
	}
	return f.do(a, what, func(*onchain) (call, error) {
		made, err := c(registry.AppAt(at))
		return fixed(made), err
	})
}

type appCreateCmd struct {
	signFlags
	Owner      string        `help:"Owner; who signs by default." placeholder:"0x…"`
	Guardian   string        `help:"Who else may revoke." placeholder:"0x…"`
	Notice     time.Duration `help:"How long what is allowed later is announced before it takes effect."`
	Hashes     []string      `name:"compose-hash" help:"Manifest that may run from the start; may be given again." placeholder:"HEX"`
	Devices    []string      `name:"device" help:"Machine that may run it; may be given again." placeholder:"HEX"`
	AnyDevice  bool          `name:"any-device" help:"Any machine may run it that the KMS takes."`
	Frozen     bool          `help:"Freeze it from the start: nothing can be added, ever."`
	RequireTCB bool          `name:"require-tcb-up-to-date" help:"Refuse platforms with known weaknesses."`
}

// config is the app as the flags have it; the owner is filled in by who signs.
func (c *appCreateCmd) config() (registry.AppConfig, error) {
	cfg := registry.AppConfig{
		Notice: uint64(c.Notice / time.Second), DisableUpgrades: c.Frozen, Frozen: c.Frozen,
		RequireTcbUpToDate: c.RequireTCB, AllowAnyDevice: c.AnyDevice,
	}
	var err error
	if c.Owner != "" {
		if cfg.Owner, err = parseAddress("--owner", c.Owner); err != nil {
			return cfg, err
		}
	} else if c.DryRun && c.From == "" {
		return cfg, usage("--owner says whose it will be: with --dry-run nothing else does")
	}
	if c.Guardian != "" {
		if cfg.Guardian, err = parseAddress("--guardian", c.Guardian); err != nil {
			return cfg, err
		}
	}
	for _, text := range c.Hashes {
		h, err := dstack.ParseComposeHash(text)
		if err != nil {
			return cfg, usage("--compose-hash: %v", err)
		}
		cfg.ComposeHashes = append(cfg.ComposeHashes, h)
	}
	for _, text := range c.Devices {
		d, err := parse32("--device", text)
		if err != nil {
			return cfg, err
		}
		cfg.DeviceIds = append(cfg.DeviceIds, d)
	}
	return cfg, nil
}

func parse32(what, text string) ([32]byte, error) {
	h, err := dstack.ParseComposeHash(text) // any 32 bytes
	if err != nil {
		return [32]byte{}, usage("%s wants 64 hexadecimal digits, not %q", what, text)
	}
	return h, nil
}

func (c *appCreateCmd) Run(a *app) error {
	cfg, err := c.config()
	if err != nil {
		return err
	}
	if c.Frozen && len(cfg.ComposeHashes) == 0 {
		return usage("--frozen without --compose-hash is an app that can run nothing, ever")
	}
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	id, out, err := c.create(a, o, cfg)
	if err != nil || out == nil {
		return err
	}
	a.printf("App id  %s\n", common.Bytes2Hex(id[:]))
	return a.result(map[string]any{"app_id": common.Bytes2Hex(id[:]), "outcome": out})
}

// create deploys an app. A nil outcome: it was a dry run.
func (f *signFlags) create(a *app, o *onchain, cfg registry.AppConfig) (common.Address, *transact.Outcome, error) {
	out, err := f.act(a, o, "create the app", func(self common.Address) registry.Call {
		own := cfg
		if own.Owner == (common.Address{}) {
			own.Owner = self
		}
		return registry.KMSAt(o.registry).DeployApp(own)
	})
	if err != nil || out == nil {
		return common.Address{}, out, err
	}
	id, err := created(out.Receipt, o.registry)
	return id, out, err
}

type appAddCmd struct {
	signFlags
	App       string `arg:"" help:"App id."`
	Hash      string `name:"compose-hash" help:"SHA-256 of a manifest." placeholder:"HEX"`
	Device    string `help:"Id of a machine." placeholder:"HEX"`
	AnyDevice bool   `name:"any-device" help:"Any machine that the KMS takes."`
}

func (c *appAddCmd) Run(a *app) error {
	n := 0
	for _, given := range []bool{c.Hash != "", c.Device != "", c.AnyDevice} {
		if given {
			n++
		}
	}
	if n != 1 {
		return usage("give one of --compose-hash, --device and --any-device")
	}
	return c.onApp(a, c.App, "add to the app", func(x registry.App) (registry.Call, error) {
		switch {
		case c.AnyDevice:
			return x.SetAllowAnyDevice(true), nil
		case c.Device != "":
			d, err := parse32("--device", c.Device)
			return x.AddDevice(d), err
		}
		h, err := dstack.ParseComposeHash(c.Hash)
		if err != nil {
			return registry.Call{}, usage("--compose-hash: %v", err)
		}
		return x.AddComposeHash(h), nil
	})
}

func (f *signFlags) allowOnChain(a *app, id string, hash dstack.ComposeHash) error {
	return f.onApp(a, id, "allow the manifest", func(x registry.App) (registry.Call, error) { return x.AddComposeHash(hash), nil })
}

func (c *appRevokeCmd) onChain(a *app) error {
	if c.Hash != "" && c.Device != "" {
		return usage("--compose-hash and --device exclude each other")
	}
	if c.Hash == "" && c.Device == "" {
		at, err := appAddress(a, c.App)
		if err != nil {
			return err
		}
		return c.do(a, "withdraw the app", func(o *onchain) (call, error) { return fixed(registry.KMSAt(o.registry).WithdrawApp(at)), nil })
	}
	return c.onApp(a, c.App, "revoke", func(x registry.App) (registry.Call, error) {
		if c.Device != "" {
			d, err := parse32("--device", c.Device)
			return x.RemoveDevice(d), err
		}
		h, err := dstack.ParseComposeHash(c.Hash)
		if err != nil {
			return registry.Call{}, usage("--compose-hash: %v", err)
		}
		return x.RemoveComposeHash(h), nil
	})
}

func (c *appFreezeCmd) onChain(a *app) error {
	if !c.Yes && !c.DryRun {
		return fault.New("confirm", "a frozen app can never be changed again, only revoked").WithFix("--yes")
	}
	return c.onApp(a, c.App, "freeze the app", func(x registry.App) (registry.Call, error) { return x.Freeze(), nil })
}

type appRotateCmd struct {
	signFlags
	App string `arg:"" help:"App id."`
}

func (c *appRotateCmd) Run(a *app) error {
	if c.RPC == "" && c.Registry == "" && !c.governedByChain(a) {
		return fault.New("governed_by_policy", "a signed policy governs this stack, whose key epochs are of all apps together").WithFix("`dstack kms rotate`")
	}
	at, err := appAddress(a, c.App)
	if err != nil {
		return err
	}
	return c.do(a, "begin the next key epoch", func(o *onchain) (call, error) {
		s, err := registry.AppAt(at).Status(a.ctx, o.node, nil)
		if err != nil {
			return nil, err
		}
		a.step("key epoch %d follows %d", s.KeyEpoch+1, s.KeyEpoch)
		return fixed(registry.AppAt(at).SetKeyEpoch(s.KeyEpoch + 1)), nil
	})
}

// listed is one app of a registry.
type listed struct {
	AppID string `json:"app_id"`
	Name  string `json:"name,omitempty"` // of the VM that this stack runs of it
	// Foreign says that its contract does not answer as ours do; all else is then empty.
	Foreign       bool            `json:"foreign,omitempty"`
	Owner         *common.Address `json:"owner,omitempty"`
	Notice        uint64          `json:"notice_seconds"`
	Frozen        bool            `json:"frozen"`
	KeyEpoch      uint64          `json:"key_epoch"`
	ComposeHashes []string        `json:"compose_hashes"`
}

// onChain lists the apps of a registry, with what their contracts allow.
func (c *appLsCmd) onChain(a *app) error {
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	head, err := o.node.BlockNumber(a.ctx)
	if err != nil {
		return registry.Explain(err)
	}
	members := func(contract string, at common.Address, list string) ([]common.Hash, error) {
		entries, err := registry.History(a.ctx, o.node, contract, at, 0, head)
		return registry.Members(entries, list), err
	}
	ids, err := members(contracts.KMS, o.registry, "registered-app")
	if err != nil {
		return err
	}
	names := map[string]string{}
	if a.stack.Responding(a.ctx) {
		vms, err := listVMs(a)
		if err != nil {
			return err
		}
		for _, vm := range vms {
			names[vm.AppId] = vm.Name
		}
	}
	a.printf("Registry %s, chain %d, block %d\n", o.registry.Hex(), o.chainID, head)
	apps := []listed{}
	for _, id := range ids {
		at := common.BytesToAddress(id[:])
		x := listed{AppID: common.Bytes2Hex(at[:]), ComposeHashes: []string{}}
		x.Name = names[x.AppID]
		s, err := registry.AppAt(at).Status(a.ctx, o.node, nil)
		switch fault.Code(err) {
		case "":
			if err != nil {
				return err
			}
			x.Owner, x.Notice, x.Frozen, x.KeyEpoch = &s.Owner, s.Notice, s.Frozen, s.KeyEpoch
			hashes, err := members(contracts.App, at, "compose-hash")
			if err != nil {
				return err
			}
			for _, h := range hashes {
				x.ComposeHashes = append(x.ComposeHashes, common.Bytes2Hex(h[:]))
			}
		case "contract_absent", "chain_answer", "contract_refused":
			x.Foreign = true
		default:
			return err
		}
		note := ""
		switch {
		case x.Foreign:
			note = "  " + a.paint(amber, "a contract of other code")
		case x.Frozen:
			note = "  frozen"
		}
		a.printf("%s  %s%s\n", x.AppID, x.Name, note)
		for _, h := range x.ComposeHashes {
			a.printf("    %s  allowed\n", h)
		}
		apps = append(apps, x)
	}
	return a.result(map[string]any{"registry": o.registry, "chain_id": o.chainID, "block": head, "apps": apps})
}

type appTransferCmd struct {
	signFlags
	App string `arg:"" help:"App id."`
	To  string `required:"" help:"The new owner, who must accept." placeholder:"0x…"`
}

func (c *appTransferCmd) Run(a *app) error {
	to, err := parseAddress("--to", c.To)
	if err != nil {
		return err
	}
	return c.onApp(a, c.App, "offer the app", func(x registry.App) (registry.Call, error) { return x.Transfer(to), nil })
}

type appAcceptCmd struct {
	signFlags
	App string `arg:"" help:"App id."`
}

func (c *appAcceptCmd) Run(a *app) error {
	at, err := appAddress(a, c.App)
	if err != nil {
		return err
	}
	return c.do(a, "accept the app", func(*onchain) (call, error) { return registry.AppAt(at).Accept, nil })
}

type appStatusCmd struct {
	chainFlags
	App string `arg:"" help:"App id."`
}

func (c *appStatusCmd) Run(a *app) error {
	at, err := appAddress(a, c.App)
	if err != nil {
		return err
	}
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := registry.AppAt(at).Status(a.ctx, o.node, nil)
	if err != nil {
		return err
	}
	if s.Registered, err = registry.KMSAt(o.registry).RegisterApp(at).Done.Holds(a.ctx, o.node, nil); err != nil {
		return err
	}
	o.status(a, s)
	yes := func(b bool) string { return map[bool]string{true: "yes", false: "no"}[b] }
	a.printf("Registered          %s\nFrozen              %s\nAny machine         %s\n", yes(s.Registered), yes(s.Frozen), yes(s.AllowAnyDevice))
	out, err := o.lists(a, contracts.App, at, "compose-hash", "device")
	if err != nil {
		return err
	}
	out["status"] = s
	return a.result(out)
}

type appHistoryCmd struct {
	chainFlags
	App   string `arg:"" help:"App id."`
	Since uint64 `help:"First block." default:"0"`
}

func (c *appHistoryCmd) Run(a *app) error {
	at, err := appAddress(a, c.App)
	if err != nil {
		return err
	}
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	return o.history(a, contracts.App, at, c.Since)
}
