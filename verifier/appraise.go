// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"fmt"
	"slices"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// missing are the codes of inputs that are absent rather than wrong.
var missing = map[string]bool{"collateral_missing": true, "event_log_missing": true, "governance_missing": true, "governance_unavailable": true}

// appraisal is one run. Fields are set in the order of run, and only from what
// earlier steps established.
type appraisal struct {
	src       *Source
	ref       *Reference
	pol       Policy
	fresh     Freshness
	at        time.Time
	memo      *attest.Memo
	assumed   string // key provider of a guest that has none yet
	launching bool   // the log may end before system-ready
	v         *Verdict

	ev     *attest.Evidence   // decoded, unverified
	claims *attest.Claims     // of the verified quote
	id     *eventlog.Identity // of the log that replays to the quote's register, or of the committed document
	man    *manifest.Manifest // whose hash is in that identity
	cfg    config             // claimed by the host

	// documentOnly says that id comes from the configuration document alone, in which
	// what is absent is not pinned.
	documentOnly bool

	asserted      []dstack.ImageHash // image hashes that the evidence names
	imageAnchored bool

	gov      *Governance
	governed bool // the contracts allow what runs

	gpuAssumptions []string

	// gateway is the appraisal of the gateway at which TLS ends; role is HopGateway in
	// that one.
	gateway *appraisal
	role    string
}

// Appraise judges evidence at a stated time.
func Appraise(req Request) *Verdict {
	scope := req.Policy.Scope
	if scope == "" {
		scope = ScopeWorkload
	}
	ref := req.Reference
	ref.addPolicy(req.Policy.Workload)
	a := &appraisal{src: &req.Source, ref: &ref, pol: req.Policy, fresh: req.Freshness, at: req.At, memo: req.Memo, launching: req.Launching, assumed: req.Provider, gov: req.Governance, v: newVerdict(scope, req.At)}
	if req.Source.Gateway != nil {
		a.gateway = &appraisal{src: req.Source.Gateway, fresh: req.Freshness, at: req.At, memo: req.Memo, role: HopGateway, v: newVerdict(scope, req.At)}
		// What the caller asked and saw is of the gateway; of the app, only what was asked.
		a.gateway.fresh.ReportData, a.fresh.ConnectionSPKI = nil, nil
	}
	a.run(req.Roots, req.Collateral)
	if a.gateway != nil {
		a.hops(&req)
	}
	a.conclude()
	return a.v
}

func (a *appraisal) add(level Level, code, evidence, fix, format string, args ...any) {
	f := Finding{Level: level, Code: code, Message: fmt.Sprintf(format, args...), Evidence: evidence, Fix: fix}
	if !slices.Contains(a.v.Findings, f) {
		a.v.Findings = append(a.v.Findings, f)
	}
}

// fail adds an error that another package found, under its own code.
func (a *appraisal) fail(err error, evidence, otherwise string) {
	code := fault.Code(err)
	if code == "" {
		code = otherwise
	}
	a.add(Error, code, evidence, fault.Fix(err), "%v", err)
}

// lenient is the level of what a policy may let pass.
func lenient(allowed bool) Level {
	if allowed {
		return Warning
	}
	return Error
}

func (a *appraisal) run(roots []attest.Roots, col *collateral.Bundle) {
	if err := a.pol.check(); err != nil {
		a.fail(err, "policy", "policy_malformed")
		return
	}
	if a.v.Scope == ScopeWorkload && len(a.pol.TCB.Accept) == 0 {
		a.add(Error, "policy_zero", "policy", "name the accepted TCB statuses, such as UpToDate", "the policy accepts no TCB status, so it denies everything")
	}
	roots = a.usableRoots(roots)
	if err := a.src.check(); err != nil {
		a.fail(err, "source", "evidence_malformed")
		return
	}
	a.nonce()
	ev, err := a.src.decode()
	if err != nil {
		a.fail(err, "container", "container_malformed")
		return
	}
	a.ev, a.v.TEE = ev, ev.TEE
	if len(a.pol.TEEs) > 0 && !slices.Contains(a.pol.TEEs, ev.TEE) {
		a.add(Error, "tee_denied", "policy.tees", "", "evidence of %s is not accepted", ev.TEE)
	}
	if !a.quote(roots, col) {
		return
	}
	if a.v.Scope == ScopeSignature {
		a.binding()
		return
	}
	if cfg, err := parseConfig(ev.Config); err != nil {
		a.fail(err, "container.config", "vm_config_malformed")
	} else {
		a.cfg = cfg
	}
	a.eventLog()
	a.launchCommitment()
	if a.id != nil {
		a.manifest()
	}
	a.gpus()
	a.binding()
	a.workload()
	a.image()
	a.governance()
	a.policy()
}

// usableRoots drops development roots that the policy does not allow.
func (a *appraisal) usableRoots(roots []attest.Roots) []attest.Roots {
	var out []attest.Roots
	for _, r := range roots {
		if r.Trust == dstack.TrustDevelopment {
			if !a.pol.DevRoots {
				continue
			}
			a.v.Trust = dstack.TrustDevelopment
		}
		out = append(out, r)
	}
	return out
}

// platformCodes are judgements that concern the platform, not the VM: they refuse
// in every scope.
var platformCodes = []string{"tcb_revoked", "tcb_unsupported", "module_unknown", "module_mrsigner", "module_attributes", "module_tcb_unsupported", "mr_signer_seam"}

// quote verifies the hardware's signature and the vendor's collateral.
func (a *appraisal) quote(roots []attest.Roots, col *collateral.Bundle) bool {
	verify, known := tees[a.ev.TEE]
	if !known {
		a.add(Error, "tee_unsupported", "container", "", "this version does not verify evidence of %s", a.ev.TEE)
		return false
	}
	// The caller's collateral decides alone: evidence that brought its own could
	// bring revocation lists from before its revocation (B03).
	if col == nil {
		col = a.src.Collateral
	}
	var attributes uint64
	for _, name := range a.pol.TDX.Attributes {
		attributes |= tdxAttributes[name]
	}
	in := attest.Input{
		Evidence: a.ev, Collateral: col, Roots: roots, At: a.at, Memo: a.memo,
		Options: attest.Options{
			AllowDebug: a.pol.AllowDebug, TDXAttributes: attributes, SNPAllowMigration: a.pol.SNP.AllowMigration,
			AllowMissingCRL: a.pol.AllowMissingCRL || a.v.Scope == ScopeSignature,
		},
	}
	claims, err := verify(in)
	if claims == nil {
		a.unverified(err)
		return false
	}
	if a.ev.TEE == dstack.TDX && a.ev.TPMQuote != nil && !a.vtpm(in, claims) {
		return false
	}
	a.claims = claims
	v := a.v
	v.Claims, v.Trust, v.Signature, v.TCBStatus = claims, claims.Trust, SignatureValid, claims.TCBStatus
	v.Advisories = append(v.Advisories, claims.Advisories...)
	v.Platform = platform(claims)
	for _, what := range claims.Unchecked {
		a.add(Warning, "not_checked", "collateral", "give what it needs with --collateral", "not checked: %s", what)
	}
	a.anchor("TEE quote", fmt.Sprintf("%s, TCB %s", claims.TEE, claims.TCBStatus), claims.Root)
	if floor := a.pol.Floor; claims.Trust == dstack.TrustProduction && claims.TCBEvaluation < floor {
		a.add(Error, "collateral_rollback", "platform.tcb_evaluation", "fetch current collateral; who handed this out replays an old one", "the collateral has number %d, and number %d was seen before: it is out of date although it has not expired", claims.TCBEvaluation, floor)
	}
	if err == nil {
		return true
	}
	if v.Scope == ScopeSignature && !slices.Contains(platformCodes, fault.Code(err)) {
		a.add(Warning, fault.Code(err), "quote", fault.Fix(err), "%v", err)
		return true
	}
	a.fail(err, "quote", "quote_malformed")
	return false
}

// unverified says why there are no claims.
func (a *appraisal) unverified(err error) {
	fix := fault.Fix(err)
	switch code := fault.Code(err); code {
	case "collateral_missing":
		fix = "give it with --collateral, or let it be fetched (without --offline); for a development TEE give --dev-roots FILE"
	case "unknown_root", "no_roots":
		switch {
		case a.ev.TEE == dstack.CCA:
			fix = "give the platform's attestation key with --trust-anchor FILE; Arm CCA has no public authority"
		case a.pol.DevRoots:
			fix = "give the development roots of the installation that the instance runs on"
		default:
			fix = "for a development TEE, add its public roots with --dev-roots FILE; its evidence proves nothing about hardware"
		}
	}
	code := fault.Code(err)
	if code == "" {
		code = "quote_malformed"
	}
	a.add(Error, code, "quote", fix, "%v", err)
}

// platform shows what the claims say of the machine.
func platform(c *attest.Claims) *Platform {
	p := &Platform{
		Root: c.Root, Product: c.Product, DeviceID: c.DeviceID, DeviceScheme: c.DeviceScheme,
		TCBDate: c.TCBDate, TCBEvaluation: c.TCBEvaluation, Debug: c.Debug, Made: c.Made, Expires: c.Expires,
		Bound: []string{"registers at launch", "report data"}, NotBound: []string{}, Unchecked: append([]string{}, c.Unchecked...),
	}
	if t := c.TDX; t != nil {
		p.PlatformStatus, p.ModuleStatus, p.QEStatus = t.PlatformStatus, t.ModuleStatus, t.QEStatus
	}
	if s := c.SNP; s != nil {
		parts := s.Parts
		p.CertifiedTCB = &parts
	}
	if registers := c.RuntimeRegisters(); len(registers) > 0 {
		for _, r := range registers {
			p.Bound = append(p.Bound, "runtime event log ("+r.Name+")")
		}
	} else {
		p.NotBound = append(p.NotBound, "runtime event log")
	}
	if commitment := c.ConfigCommitment(); commitment != nil {
		p.Bound = append(p.Bound, "configuration at launch ("+commitment.Name+")")
	} else {
		p.NotBound = append(p.NotBound, "configuration at launch")
	}
	return p
}

// Refuse is the verdict on bytes that are no evidence.
func Refuse(err error, scope string, at time.Time) *Verdict {
	if scope == "" {
		scope = ScopeWorkload
	}
	a := &appraisal{ref: &Reference{}, v: newVerdict(scope, at)}
	a.fail(err, "source", "evidence_malformed")
	a.conclude()
	return a.v
}

func newVerdict(scope string, at time.Time) *Verdict {
	return &Verdict{
		Version: 1, At: at.UTC(), Scope: scope, Trust: dstack.TrustProduction, Signature: SignatureInvalid,
		Freshness: FreshNone, Channel: ChannelNone,
		Advisories: []string{}, Findings: []Finding{}, Anchors: []Anchor{}, SelfConsistent: []Anchor{}, Assumptions: []string{},
	}
}
