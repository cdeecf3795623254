// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/releaselog"
	"github.com/dstack-go/dstack/stack"
)

type appCmd struct {
	Ls     appLsCmd     `cmd:"" help:"List the apps that the stack's policy or registry has, with their manifests."`
	Allow  appAllowCmd  `cmd:"" help:"Allow a manifest of an app."`
	Revoke appRevokeCmd `cmd:"" help:"Revoke an app, or one of its manifests: the next boot gets no keys, and running instances lose their lease."`
	Freeze appFreezeCmd `cmd:"" help:"Let an app change no more: it may be revoked, and nothing else."`

	Create   appCreateCmd   `cmd:"" help:"Deploy an app's contract on the chain and register it: its address is the app id."`
	Add      appAddCmd      `cmd:"" help:"Allow a manifest or a machine in an app's contract."`
	Rotate   appRotateCmd   `cmd:"" help:"Begin the next key epoch of an app's contract; keys of the one before are still given."`
	Transfer appTransferCmd `cmd:"" help:"Offer an app's contract to a new owner."`
	Accept   appAcceptCmd   `cmd:"" help:"Accept an app's contract that was offered."`
	Status   appStatusCmd   `cmd:"" help:"Show what an app's contract allows."`
	History  appHistoryCmd  `cmd:"" help:"Show who changed an app's contract, when, and what."`
}

// governedApp finds an app of the policy by the name of a VM, the name in the policy,
// or its id. Codes app_unknown, app_ambiguous.
func governedApp(a *app, name string) (*policy.App, error) {
	doc, err := a.stack.Policy()
	if err != nil {
		return nil, err
	}
	var found []policy.App
	for _, x := range doc.Apps {
		if x.Name == name || x.AppID.String() == name || len(name) >= 8 && strings.HasPrefix(x.AppID.String(), name) {
			found = append(found, x)
		}
	}
	switch len(found) {
	case 0:
		return nil, fault.New("app_unknown", "the policy has no app %q", name).WithFix("`dstack app ls` lists them")
	case 1:
		return &found[0], nil
	}
	return nil, fault.New("app_ambiguous", "the policy has %d apps %q", len(found), name).WithFix("give the app id: `dstack app ls`")
}

type appLsCmd struct{ chainFlags }

func (c *appLsCmd) Run(a *app) error {
	if c.governedByChain(a) {
		return c.onChain(a)
	}
	doc, err := a.stack.Policy()
	if err != nil {
		return err
	}
	a.printf("Policy %d, %s, expires %s\n", doc.Sequence, doc.Trust, doc.Expires.Format(time.RFC3339))
	for _, x := range doc.Apps {
		frozen := ""
		if x.Frozen {
			frozen = "  frozen"
		}
		a.printf("%s  %s%s\n", x.AppID, x.Name, frozen)
		for _, c := range x.ComposeHashes {
			state := "allowed"
			switch {
			case c.Revoked != nil:
				state = a.paint(red, "revoked") + " " + c.Revoked.At.Format(time.RFC3339) + ": " + printable(c.Revoked.Reason)
			case c.NotBefore != nil && c.NotBefore.After(time.Now()):
				state = "from " + c.NotBefore.Format(time.RFC3339)
			}
			a.printf("    %s  %s\n", c.Hash, state)
		}
	}
	apps := doc.Apps
	if apps == nil {
		apps = []policy.App{}
	}
	return a.result(map[string]any{"sequence": doc.Sequence, "trust": doc.Trust, "expires": doc.Expires, "apps": apps})
}

type appAllowCmd struct {
	signFlags
	App  string `arg:"" help:"App id, 40 hexadecimal digits, or the name of one that the policy has."`
	Hash string `name:"compose-hash" required:"" help:"SHA-256 of the manifest." placeholder:"HEX"`
	Name string `help:"Name of an app that is new to the policy." placeholder:"NAME"`
}

func (c *appAllowCmd) Run(a *app) error {
	hash, err := dstack.ParseComposeHash(c.Hash)
	if err != nil {
		return usage("--compose-hash: %v", err)
	}
	if c.governedByChain(a) {
		return c.allowOnChain(a, c.App, hash)
	}
	entry := policy.App{Name: c.Name, ComposeHashes: []policy.Compose{{Hash: hash}}, AnyName: true}
	if x, err := governedApp(a, c.App); err == nil {
		entry.AppID, entry.Name = x.AppID, x.Name
	} else if entry.AppID, err = dstack.ParseAppID(c.App); err != nil {
		return fault.New("app_unknown", "%q is neither an app of the policy nor an app id", c.App).WithFix("give 40 hexadecimal digits")
	}
	return c.govern(a, entry)
}

func (c *appAllowCmd) govern(a *app, entry policy.App) error {
	err := a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) { return d.AllowApp(entry) })
	if err != nil {
		return err
	}
	a.step("app %s may run %s", entry.AppID, entry.ComposeHashes[0].Hash)
	return a.result(map[string]any{"app_id": entry.AppID, "compose_hash": entry.ComposeHashes[0].Hash})
}

type appRevokeCmd struct {
	signFlags
	App    string `arg:"" help:"Name or app id."`
	Hash   string `name:"compose-hash" help:"Revoke this manifest only." placeholder:"HEX"`
	Device string `help:"Revoke this machine only, of a contract." placeholder:"HEX"`
	Reason string `help:"Why, for those who are refused; a policy must have it."`
}

func (c *appRevokeCmd) Run(a *app) error {
	if c.governedByChain(a) {
		return c.onChain(a)
	}
	if c.Reason == "" {
		return usage("--reason says why, for those who are refused")
	}
	if c.Device != "" {
		return usage("--device is of a contract: a policy has machines for all apps")
	}
	x, err := governedApp(a, c.App)
	if err != nil {
		return err
	}
	var hash *dstack.ComposeHash
	if c.Hash != "" {
		h, err := dstack.ParseComposeHash(c.Hash)
		if err != nil {
			return usage("--compose-hash: %v", err)
		}
		hash = &h
	}
	err = a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) {
		return d.Revoke(x.AppID, hash, time.Now(), c.Reason)
	})
	if err != nil {
		return err
	}
	a.step("app %s is revoked: its next boot gets no keys, and what runs loses its lease within the hour", x.AppID)
	return a.result(map[string]any{"app_id": x.AppID, "revoked": true})
}

type appFreezeCmd struct {
	signFlags
	App string `arg:"" help:"Name or app id."`
	Yes bool   `help:"Do it: it cannot be undone."`
}

func (c *appFreezeCmd) Run(a *app) error {
	if c.governedByChain(a) {
		return c.onChain(a)
	}
	x, err := governedApp(a, c.App)
	if err != nil {
		return err
	}
	if !c.Yes {
		return fault.New("confirm", "a frozen app can never be changed again, only revoked").WithFix("--yes")
	}
	if err := a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) { return d.Freeze(x.AppID) }); err != nil {
		return err
	}
	a.step("app %s is frozen", x.AppID)
	return a.result(map[string]any{"app_id": x.AppID, "frozen": true})
}

type kmsCmd struct {
	Status       kmsStatusCmd       `cmd:"" help:"Show the stack's KMSs, whether they answer, and by what policy they decide."`
	Log          kmsLogCmd          `cmd:"" help:"Show a KMS's release log, and check that it is whole and continues what was seen before."`
	Policy       kmsPolicyCmd       `cmd:"" help:"Print the signed policy, or give it to the KMSs again."`
	Register     kmsRegisterCmd     `cmd:"" help:"Register an app's contract with the chain's registry."`
	AddImage     kmsAddImageCmd     `cmd:"" help:"Allow an OS image in the chain's registry."`
	AddDevice    kmsAddDeviceCmd    `cmd:"" help:"Let a machine be the KMS."`
	AddMR        kmsAddMRCmd        `cmd:"" name:"add-mr" help:"Let what has an aggregated measurement be the KMS."`
	RemoveImage  kmsRemoveImageCmd  `cmd:"" help:"Revoke an OS image."`
	RemoveDevice kmsRemoveDeviceCmd `cmd:"" help:"Revoke a machine of the KMS."`
	RemoveMR     kmsRemoveMRCmd     `cmd:"" name:"remove-mr" help:"Revoke a measurement of the KMS."`
	Notice       kmsNoticeCmd       `cmd:"" help:"Set how long the registry announces what it allows; less takes the notice that it ends."`
	Transfer     kmsTransferCmd     `cmd:"" help:"Offer the registry to a new owner."`
	Accept       kmsAcceptCmd       `cmd:"" help:"Accept the registry that was offered."`
	History      kmsHistoryCmd      `cmd:"" help:"Show who changed the registry, when, and what."`

	Rotate kmsRotateCmd `cmd:"" help:"Begin the next key epoch of native keys; the one before is given beside it, and the KMSs erase older ones for good."`
}

type kmsStatusCmd struct{ chainFlags }

// kmsStatus is what is known of one KMS.
type kmsStatus struct {
	stack.KMSNode
	Answers bool   `json:"answers"`
	Error   string `json:"error,omitempty"`
	Policy  uint64 `json:"policy_sequence,omitempty"`
	Log     string `json:"log,omitempty"`
	Entries uint64 `json:"log_entries,omitempty"`
}

func (c *kmsStatusCmd) Run(a *app) error {
	if c.governedByChain(a) {
		return c.onChain(a)
	}
	k, err := a.stack.Keys()
	if err != nil {
		return err
	}
	var out []kmsStatus
	for _, n := range k.Nodes {
		s := kmsStatus{KMSNode: n}
		var meta kmsapi.GetMetaResponse
		var p kmsapi.Policy
		err := n.Call(a.ctx, k.Pin(), "GetMeta", nil, &meta)
		if err == nil {
			err = n.Call(a.ctx, k.Pin(), "GetPolicy", nil, &p)
		}
		if err == nil {
			var head releaselog.Head
			if head, err = releaselog.VerifyHead(meta.LogHead, k.Pin()); err == nil {
				s.Log, s.Entries = head.Log(), head.Size()
			}
		}
		if err == nil {
			var text []byte
			if text, err = policy.Bytes(p.Signed); err == nil {
				var doc *policy.Document
				if doc, err = policy.Parse(text); err == nil {
					s.Policy = doc.Sequence
				}
			}
		}
		where := "a CVM, " + n.VM
		if n.VM == "" {
			where = a.paint(amber, "a process of this machine: development trust")
		}
		a.printf("%s  %s  (%s)\n", n.Name, n.URL, where)
		if s.Answers = err == nil; err != nil {
			s.Error = err.Error()
			a.printf("    %s %s\n", a.paint(red, "does not answer as it should:"), printable(s.Error))
		} else {
			a.printf("    policy %d, log %s with %d entries\n", s.Policy, s.Log, s.Entries)
		}
		out = append(out, s)
	}
	a.printf("Root CA    %s\nSigner     %s\n", k.RootCA, k.K256)
	return a.result(map[string]any{"root_ca": k.RootCA, "k256": k.K256, "nodes": out})
}

type kmsLogCmd struct {
	Node string `arg:"" optional:"" help:"Name of a KMS; the first by default."`
	Last uint64 `help:"How many entries to show." default:"20"`
	Copy string `help:"Keep a whole copy of the log in this directory, or bring the one there up to date: a witness's." type:"path" placeholder:"DIR"`
}

func (c *kmsLogCmd) Run(a *app) error {
	k, err := a.stack.Keys()
	if err != nil {
		return err
	}
	var node *stack.KMSNode
	for i, n := range k.Nodes {
		if n.Name == c.Node || c.Node == "" && i == 0 {
			node = &k.Nodes[i]
		}
	}
	if node == nil {
		return fault.New("kms_unknown", "the stack has no KMS %q", c.Node).WithFix("`dstack kms status` lists them")
	}
	ask := func(method string, req, resp proto.Message) error {
		return node.Call(a.ctx, k.Pin(), method, req, resp)
	}
	var reply kmsapi.LogHead
	if err := ask("GetLogHead", nil, &reply); err != nil {
		return err
	}
	if err := observe(a.ctx, a, k.Pin(), &reply, ask); err != nil {
		return err
	}
	head, err := releaselog.VerifyHead(&reply, k.Pin())
	if err != nil {
		return err
	}
	fetch := func(ctx context.Context, start, count uint64) ([][]byte, error) {
		var page kmsapi.LogEntriesResponse
		err := node.Call(ctx, k.Pin(), "GetLogEntries", &kmsapi.LogEntriesRequest{Start: start, Count: min(count, releaselog.MaxEntries)}, &page)
		return page.Entries, err
	}
	if c.Copy != "" {
		if err := releaselog.Export(a.ctx, c.Copy, head, fetch); err != nil {
			return err
		}
		a.step("the copy in %s is whole: its %d entries are those of the signed head", c.Copy, head.Size())
	}
	start := uint64(0)
	if head.Size() > c.Last {
		start = head.Size() - c.Last
	}
	var raw [][]byte
	for uint64(len(raw)) < head.Size()-start {
		page, err := fetch(a.ctx, start+uint64(len(raw)), head.Size()-start-uint64(len(raw)))
		if err != nil {
			return err
		}
		if len(page) == 0 {
			return fault.New("release_log_entries", "the KMS shows fewer entries than its head has")
		}
		raw = append(raw, page...)
	}
	a.printf("%s\n  %d entries, root %s; it continues what was seen before\n", head.Log(), head.Size(), head.Root())
	var entries []releaselog.Entry
	for i, text := range raw {
		e, err := releaselog.ParseEntry(text)
		if err != nil {
			return err
		}
		entries = append(entries, e)
		what := string(e.Kind)
		if e.Purpose != "" {
			what += " " + e.Purpose
		}
		line := fmt.Sprintf("%6d  %s  %-16s", start+uint64(i), e.Time.Format(time.RFC3339), what)
		if e.AppID != (dstack.AppID{}) {
			line += "  app " + e.AppID.String()
		}
		if e.Code != "" {
			line += "  " + a.paint(red, e.Code)
		}
		a.printf("%s  %s\n", line, printable(strings.TrimSpace(e.Reason+" "+e.Note)))
	}
	return a.result(map[string]any{"log": head.Log(), "size": head.Size(), "root": head.Root(), "start": start, "entries": entries})
}

// observe holds the head of a KMS's release log against the one that this stack's tool
// saw last, and remembers it. A KMS that never showed a log, as upstream's, has none.
// Codes: those of releaselog.Memory.
func observe(ctx context.Context, a *app, root []byte, head *kmsapi.LogHead, ask func(method string, req, resp proto.Message) error) error {
	memory := releaselog.OpenMemory(filepath.Join(a.stack.Dir, "kms-heads.json"))
	if head == nil {
		return memory.Missing(root)
	}
	h, err := releaselog.VerifyHead(head, root)
	if err != nil {
		return err
	}
	return memory.Observe(ctx, h, func(from uint64) ([][]byte, error) {
		var proof kmsapi.LogConsistencyResponse
		err := ask("GetLogConsistency", &kmsapi.LogConsistencyRequest{From: from, To: h.Size()}, &proof)
		return proof.Proof, err
	})
}

type kmsPolicyCmd struct {
	Submit bool `help:"Give the stack's policy to its KMSs again."`
}

// noPolicy refuses what is of signed policies where contracts decide. Code
// governed_by_chain.
func noPolicy(a *app, instead string) error {
	if !a.stack.GovernedByChain() {
		return nil
	}
	return fault.New("governed_by_chain", "contracts on a chain govern this stack, and no signed policy").WithFix("%s", instead)
}

func (c *kmsPolicyCmd) Run(a *app) error {
	if err := noPolicy(a, "`dstack kms status` and `dstack app status` show what the contracts allow"); err != nil {
		return err
	}
	if c.Submit {
		if err := a.stack.SubmitPolicy(a.ctx); err != nil {
			return err
		}
		a.step("the stack's KMSs have the policy")
	}
	doc, err := a.stack.Policy()
	if err != nil {
		return err
	}
	text, err := doc.Encode()
	if err != nil {
		return err
	}
	key, err := a.stack.GovernanceKey()
	if err != nil {
		return err
	}
	a.printf("%s\n", text)
	return a.result(map[string]any{"document": doc, "signer": hex.EncodeToString(key[32:])})
}

type kmsRotateCmd struct{}

func (*kmsRotateCmd) Run(a *app) error {
	if err := noPolicy(a, "`dstack app rotate APP`: on a chain each app has key epochs of its own"); err != nil {
		return err
	}
	var epoch policy.KeyEpoch
	err := a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) {
		next, err := d.Rotate()
		if err == nil {
			epoch = next.KeyEpoch
		}
		return next, err
	})
	if err != nil {
		return err
	}
	a.step("key epoch %d is in force; %d is the oldest that is given", epoch.Current, epoch.Oldest)
	return a.result(epoch)
}
