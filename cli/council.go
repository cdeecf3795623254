// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"io"
	"slices"
	"time"

	"github.com/ethereum/go-ethereum"
	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/council"
	"github.com/dstack-go/dstack/governance/registry"
	"github.com/dstack-go/dstack/governance/transact"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

type councilCmd struct {
	Create  councilCreateCmd  `cmd:"" help:"Deploy a council: m of n accounts that own contracts together."`
	Show    councilShowCmd    `cmd:"" help:"Show a council, or a proposal and who has signed it."`
	Propose councilProposeCmd `cmd:"" help:"Write calls down for a council's members to sign."`
	Confirm councilConfirmCmd `cmd:"" help:"Show a proposal's calls and sign them as a member; nothing is sent."`
	Execute councilExecuteCmd `cmd:"" help:"Submit a proposal that enough members have signed."`
}

// addresses reads accounts.
func addresses(what string, texts []string) ([][]byte, error) {
	var out [][]byte
	for _, text := range texts {
		at, err := parseAddress(what, text)
		if err != nil {
			return nil, err
		}
		out = append(out, at.Bytes())
	}
	return out, nil
}

type councilCreateCmd struct {
	chainFlags
	sendFlags
	Member    []string `required:"" help:"Account of a member; given again for each." placeholder:"0x…"`
	Threshold uint64   `required:"" help:"How many of them must sign." placeholder:"M"`
}

func (c *councilCreateCmd) Run(a *app) error {
	members, err := addresses("--member", c.Member)
	if err != nil {
		return err
	}
	if c.Threshold < 1 || c.Threshold > uint64(len(members)) {
		return usage("--threshold is 1 to the number of members, which are %d", len(members))
	}
	code, err := registry.Creation(contracts.Council, members, c.Threshold)
	if err != nil {
		return err
	}
	o, err := c.reach(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := c.sender(a, o)
	if err != nil {
		return err
	}
	defer s.Signer.Close()
	out, err := s.Deploy(a.ctx, code)
	if err != nil {
		return err
	}
	at := out.Receipt.ContractAddress
	a.step("the council of %d, of whom %d must sign, is %s", len(members), c.Threshold, at.Hex())
	a.printf("Council  %s\n", at.Hex())
	return a.result(map[string]any{"council": at, "outcome": out})
}

// readProposal reads a proposal's file.
func readProposal(file string) (*council.Proposal, error) {
	text, err := readLimited(file, council.MaxFile)
	if err != nil {
		return nil, err
	}
	return council.Parse(text)
}

// shown is a call as people read it.
type shown struct {
	To   common.Address `json:"to"`
	Call string         `json:"call"`
	// Known says that the call is of a function of the governance contracts.
	Known bool `json:"known"`
}

// show prints what a proposal's calls are, and reports whether all are known.
func showProposal(a *app, p *council.Proposal) ([]shown, bool) {
	a.printf("Council   %s, chain %d\nNonce     %d\nGood till %s\nDigest    %s\n", p.Council.Hex(), p.ChainID, p.Nonce, when(p.Until()), p.Digest().Hex())
	var out []shown
	all := true
	for i, c := range p.Calls {
		text, known := registry.DescribeData(c.To, c.Data)
		note := ""
		if !known {
			note = "  " + a.paint(amber, "of no function of the governance contracts")
		}
		a.printf("Call %-4d %s  %s%s\n", i+1, c.To.Hex(), printable(text), note)
		out, all = append(out, shown{c.To, text, known}), all && known
	}
	return out, all
}

// hold holds a proposal against its council on the chain. Code council_chain.
func (o *onchain) hold(a *app, p *council.Proposal) (*council.Standing, error) {
	if o.chainID != p.ChainID {
		return nil, fault.New("council_chain", "the proposal is of chain %d, and the node of chain %d", p.ChainID, o.chainID).WithFix("name a node of its chain with --rpc")
	}
	s, err := registry.CouncilAt(p.Council).Status(a.ctx, o.node, nil)
	if err != nil {
		return nil, err
	}
	head, err := o.node.HeaderByNumber(a.ctx, nil)
	if err != nil {
		return nil, registry.Explain(err)
	}
	return p.Hold(s, time.Unix(int64(head.Time), 0))
}

func showStanding(a *app, s *council.Standing) {
	for _, m := range s.Signed {
		a.printf("Signed    %s\n", m.Hex())
	}
	for _, m := range s.Missing {
		a.printf("Missing   %s\n", m.Hex())
	}
	for _, m := range s.Strangers {
		a.printf("%s %s\n", a.paint(amber, "No member"), m.Hex())
	}
	a.printf("Needed    %d of %d\n", s.Threshold, len(s.Signed)+len(s.Missing))
}

type councilShowCmd struct {
	chainFlags
	What string `arg:"" help:"Address of a council, or the file of a proposal." placeholder:"0x…|FILE"`
}

func (c *councilShowCmd) Run(a *app) error {
	o, err := c.reach(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	if !common.IsHexAddress(c.What) {
		p, err := readProposal(c.What)
		if err != nil {
			return err
		}
		calls, _ := showProposal(a, p)
		s, err := o.hold(a, p)
		if err != nil {
			return err
		}
		showStanding(a, s)
		return a.result(map[string]any{"proposal": p, "digest": p.Digest(), "calls": calls, "standing": s, "enough": s.Enough()})
	}
	at := common.HexToAddress(c.What)
	s, err := registry.CouncilAt(at).Status(a.ctx, o.node, nil)
	if err != nil {
		return err
	}
	a.printf("Council   %s, chain %d\nNeeded    %d of %d\nNonce     %d\n", at.Hex(), o.chainID, s.Threshold, len(s.Members), s.Nonce)
	members := []string{}
	for _, m := range s.Members {
		text := "0x" + common.Bytes2Hex(m)
		if len(m) == common.AddressLength {
			text = common.BytesToAddress(m).Hex()
		}
		members = append(members, text)
		a.printf("Member    %s\n", text)
	}
	return a.result(map[string]any{"council": at, "chain_id": o.chainID, "threshold": s.Threshold, "nonce": s.Nonce, "members": members})
}

type councilProposeCmd struct {
	chainFlags
	Council   string        `arg:"" help:"Address of the council." placeholder:"0x…"`
	Call      []string      `arg:"" optional:"" help:"Files with calls, as other verbs print them with --json --dry-run, in the order in which they are made; - is the standard input." placeholder:"FILE"`
	Add       []string      `name:"add-member" help:"Account that becomes a member; may be given again." placeholder:"0x…"`
	Remove    []string      `name:"remove-member" help:"Account that is no longer a member; may be given again." placeholder:"0x…"`
	Threshold uint64        `help:"How many members must sign from then on." placeholder:"M"`
	For       time.Duration `help:"How long the signatures are good." default:"72h"`
	Out       string        `short:"o" help:"File to write; the standard output by default." type:"path" placeholder:"FILE"`
}

func (c *councilProposeCmd) Run(a *app) error {
	at, err := parseAddress("the council", c.Council)
	if err != nil {
		return err
	}
	if c.For <= 0 || c.For > council.MaxValid {
		return usage("--for is more than nothing and at most %s", council.MaxValid)
	}
	o, err := c.reach(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := registry.CouncilAt(at).Status(a.ctx, o.node, nil)
	if err != nil {
		return err
	}
	var calls []council.Call
	for _, file := range c.Call {
		one, err := readCall(a, file, o.chainID)
		if err != nil {
			return err
		}
		calls = append(calls, one)
	}
	if len(c.Add)+len(c.Remove) > 0 || c.Threshold != 0 {
		add, err := addresses("--add-member", c.Add)
		if err != nil {
			return err
		}
		remove, err := addresses("--remove-member", c.Remove)
		if err != nil {
			return err
		}
		threshold := c.Threshold
		if threshold == 0 {
			threshold = s.Threshold
		}
		calls = append(calls, council.Call{To: at, Data: registry.CouncilAt(at).SetMembers(remove, add, threshold).Data})
	}
	if len(calls) == 0 {
		return usage("there is nothing to propose: give files with calls, or --add-member, --remove-member, --threshold")
	}
	head, err := o.node.HeaderByNumber(a.ctx, nil)
	if err != nil {
		return registry.Explain(err)
	}
	p, err := council.New(o.chainID, at, s.Nonce, time.Unix(int64(head.Time), 0).Add(c.For), calls...)
	if err != nil {
		return err
	}
	// What is no council of this version would have its members sign something else.
	values, err := registry.View(a.ctx, o.node, p.Digested(), nil)
	if err != nil {
		return err
	}
	if digest := common.Hash(values[0].([32]byte)); digest != p.Digest() {
		return fault.New("council_foreign", "what is at %s has its members sign something else than a council of this version", at.Hex())
	}
	// A call alone is tried; of several, later ones may need what earlier ones do.
	if len(calls) == 1 {
		if code, err := o.node.CodeAt(a.ctx, calls[0].To, nil); err != nil {
			return registry.Explain(err)
		} else if len(code) == 0 {
			return fault.New("council_call", "there is no contract at %s", calls[0].To.Hex())
		}
		if _, err := o.node.CallContract(a.ctx, ethereum.CallMsg{From: at, To: &calls[0].To, Data: calls[0].Data}, nil); err != nil {
			return registry.Explain(err)
		}
	}
	shown, _ := showTo(a, p)
	if c.Out == "" {
		return writeProposal(a, p)
	}
	if err := saveProposal(c.Out, p); err != nil {
		return err
	}
	a.step("%s has the proposal: each member runs `dstack council confirm %s`", c.Out, c.Out)
	return a.result(map[string]any{"file": c.Out, "digest": p.Digest(), "calls": shown})
}

// showTo shows a proposal beside the result.
func showTo(a *app, p *council.Proposal) ([]shown, bool) {
	quiet := *a
	quiet.ui = a.ui.quiet()
	return showProposal(&quiet, p)
}

// writeProposal prints a proposal, which is JSON in any case.
func writeProposal(a *app, p *council.Proposal) error {
	was := a.json
	a.json = true
	defer func() { a.json = was }()
	return a.result(p)
}

func saveProposal(file string, p *council.Proposal) error {
	text, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(file, append(text, '\n'), 0o644)
}

// readCall reads a call that another verb printed. Codes file_missing, council_call,
// council_chain.
func readCall(a *app, file string, chainID uint64) (council.Call, error) {
	var text []byte
	var err error
	if file == "-" {
		text, err = io.ReadAll(io.LimitReader(a.in, council.MaxFile))
	} else {
		text, err = readLimited(file, council.MaxFile)
	}
	if err != nil {
		return council.Call{}, err
	}
	var t transact.Proposal
	if err := json.Unmarshal(text, &t); err != nil || t.Value != "0" {
		return council.Call{}, fault.New("council_call", "%s is no call without ether", file).WithFix("write it by `dstack --json … --dry-run`, such as `dstack --json kms add-image … --dry-run`")
	}
	if t.ChainID != chainID {
		return council.Call{}, fault.New("council_chain", "the call in %s is of chain %d, and the node of chain %d", file, t.ChainID, chainID)
	}
	return council.Call{To: t.To, Data: common.FromHex(t.Data)}, nil
}

type councilConfirmCmd struct {
	chainFlags
	accountFlags
	File  string `arg:"" help:"File of the proposal." type:"path"`
	Out   string `short:"o" help:"File to write with the signature; the same by default." type:"path" placeholder:"FILE"`
	Blind bool   `help:"Sign calls that are of no function of the governance contracts, and so are shown as bytes."`
	Yes   bool   `help:"Sign what is shown."`
}

func (c *councilConfirmCmd) Run(a *app) error {
	p, err := readProposal(c.File)
	if err != nil {
		return err
	}
	o, err := c.reach(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := o.hold(a, p)
	if err != nil {
		return err
	}
	calls, known := showProposal(a, p)
	switch {
	case !known && !c.Blind:
		return fault.New("council_blind", "the proposal has a call that can be shown as bytes only").WithFix("--blind, if you know what it does")
	case !c.Yes:
		return fault.New("confirm", "these calls are signed when you have read them").WithFix("--yes")
	}
	signer, err := c.signer(a, o)
	if err != nil {
		return err
	}
	defer signer.Close()
	if self := signer.Address(); !slices.Contains(s.Missing, self) && !slices.Contains(s.Signed, self) {
		return fault.New("council_member", "%s is no member of the council", self.Hex()).WithFix("`dstack council show %s` lists them", p.Council.Hex())
	}
	if err := p.Sign(a.ctx, signer); err != nil {
		return err
	}
	out := c.Out
	if out == "" {
		out = c.File
	}
	// Others may have written their signatures meanwhile.
	if now, err := readProposal(out); err == nil {
		if err := p.Merge(now); err != nil {
			return err
		}
	} else if fault.Code(err) != "file_missing" {
		return err
	}
	if s, err = o.hold(a, p); err != nil {
		return err
	}
	if err := saveProposal(out, p); err != nil {
		return err
	}
	a.step("%s signed: %d of %d that are needed have", signer.Address().Hex(), len(s.Signed), s.Threshold)
	return a.result(map[string]any{"file": out, "member": signer.Address(), "digest": p.Digest(), "calls": calls, "standing": s, "enough": s.Enough()})
}

type councilExecuteCmd struct {
	chainFlags
	sendFlags
	File []string `arg:"" help:"File of the proposal, or several of the same one, whose signatures count together." type:"path"`
}

func (c *councilExecuteCmd) Run(a *app) error {
	p, err := readProposal(c.File[0])
	if err != nil {
		return err
	}
	for _, file := range c.File[1:] {
		more, err := readProposal(file)
		if err == nil {
			err = p.Merge(more)
		}
		if err != nil {
			return err
		}
	}
	o, err := c.reach(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := o.hold(a, p)
	if err != nil {
		return err
	}
	showTo(a, p)
	execution, err := p.Execution(s)
	if err != nil {
		return err
	}
	send, err := c.sender(a, o)
	if err != nil {
		return err
	}
	defer send.Signer.Close()
	out, err := sent(a, "make the council's calls", send, execution)
	if err != nil {
		return err
	}
	return a.result(out)
}
