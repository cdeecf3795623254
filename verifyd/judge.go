// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/identity"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// What reasons begin with (verifier.md §3); clients match on them.
const (
	prefixInternal = "Internal error: "
	prefixQuote    = "Quote verification failed: "
	prefixImage    = "OS image hash verification failed: "
	prefixLog      = "Event log verification failed: "
)

// crlTimeout bounds the wait for revocation lists of evidence that brings all else
// with it: is_valid does not need them, the verdict says that they are missing.
const crlTimeout = 10 * time.Second

// inquiry is a request that was read.
type inquiry struct {
	src      verifier.Source
	evidence *attest.Evidence
	at       time.Time
	stated   bool // the request states the time
	policy   verifier.Policy
	expect   []byte // report data, or nil
	nonce    []byte // or nil
	col      *collateral.Bundle
	debug    bool
	download bool // whether an image may be downloaded

	claims *attest.Claims // once the quote is verified
}

// Verify judges a request. It never fails: what cannot be read is a reply that says
// so.
func (s *Service) Verify(ctx context.Context, r *Request) *Response {
	out := &Response{Details: Details{AdvisoryIDs: []string{}}}
	q, err := s.read(r)
	if err != nil {
		out.refuse(prefixInternal + internalText(err))
		out.Verdict = verifier.Refuse(err, "", q.at)
		return out
	}
	s.judge(ctx, q, out)
	if r.ReturnCollateral {
		out.Collateral = q.col
	}
	return out
}

func (r *Response) refuse(reason string) { r.IsValid, r.Reason = false, &reason }

func internalText(err error) string {
	switch fault.Code(err) {
	case "container_version":
		return "Unknown attestation wire format: " + err.Error()
	case "container_payload_mismatch":
		return "report_data does not match report_data_payload: " + err.Error()
	}
	return err.Error()
}

// read turns the members into evidence and what to judge it by. The inquiry is
// never nil.
func (s *Service) read(r *Request) (*inquiry, error) {
	q := &inquiry{at: s.now().UTC(), policy: s.policy, col: r.Collateral, debug: r.Debug, download: true}
	unhex := func(name, text string, least, most int) ([]byte, error) {
		b, err := hex.DecodeString(strings.TrimPrefix(text, "0x"))
		if err != nil || len(b) < least || len(b) > most {
			return nil, fault.New("request_member", "%s is not hexadecimal of %d to %d bytes", name, least, most)
		}
		return b, nil
	}
	var err error
	if r.At != nil {
		at, perr := time.Parse(time.RFC3339, *r.At)
		if perr != nil || at.Year() < 2015 || at.Year() > 2100 {
			return q, fault.New("request_member", "at is not a time such as 2026-01-31T12:00:00Z")
		}
		q.at, q.stated = at.UTC(), true
	}
	if len(r.Policy) > 0 && string(r.Policy) != "null" {
		p, err := verifier.ParsePolicy(r.Policy)
		if err != nil {
			return q, err
		}
		q.policy = *p
	}
	if r.Collateral != nil {
		if err := r.Collateral.Check(); err != nil {
			return q, err
		}
	}
	if r.ExpectedReportData != nil {
		if q.expect, err = unhex("expected_report_data", *r.ExpectedReportData, dstack.ReportDataSize, dstack.ReportDataSize); err != nil {
			return q, err
		}
	}
	if r.Nonce != nil {
		if q.nonce, err = unhex("nonce", *r.Nonce, 16, 64); err != nil {
			return q, err
		}
	}
	q.src = verifier.Source{Version: 1, Manifest: r.Manifest, Nonce: q.nonce}
	for _, text := range r.ServedSPKIs {
		k, err := unhex("served_spkis", text, 1, 4<<10)
		if err != nil {
			return q, err
		}
		q.src.ServedSPKIs = append(q.src.ServedSPKIs, k)
	}
	if r.Attestation != nil {
		if r.Quote != nil || r.EventLog != nil || r.VMConfig != nil {
			s.log.Warn("attestation is given: quote, event_log and vm_config are ignored")
		}
		raw, err := unhex("attestation", *r.Attestation, 1, container.MaxSize)
		if err != nil {
			return q, err
		}
		return q, q.container(raw)
	}
	return q, q.raw(r, unhex)
}

func (q *inquiry) container(raw []byte) (err error) {
	q.src.Container = raw
	q.evidence, err = container.Decode(raw)
	return err
}

// raw takes a TDX quote and its log, as GetQuote gives them.
func (q *inquiry) raw(r *Request, unhex func(name, text string, least, most int) ([]byte, error)) error {
	if r.Quote == nil {
		return fault.New("request_member", "Quote is required")
	}
	if r.EventLog == nil {
		return fault.New("request_member", "Event log is required")
	}
	ev := &attest.Evidence{TEE: dstack.TDX}
	q.evidence, q.src.Evidence = ev, ev
	var err error
	if ev.Quote, err = unhex("quote", *r.Quote, 1, attest.MaxQuote); err != nil {
		return err
	}
	if ev.EventLog, err = eventlog.ParseJSON([]byte(*r.EventLog)); err != nil {
		return err
	}
	if r.VMConfig != nil {
		ev.Config = *r.VMConfig
	}
	if r.ReportData != nil {
		if ev.ReportData, err = dstack.ParseReportData(*r.ReportData); err != nil {
			return fault.Wrap(err, "request_member", "report_data")
		}
		ev.ReportDataClaimed = true
	}
	return nil
}

// compatible is the policy behind is_valid: upstream's, which leaves to its caller
// everything but signatures, chains, log and the image's own consistency.
func (s *Service) compatible(tee dstack.TEE) verifier.Policy {
	p := verifier.Policy{
		TCB: verifier.TCBPolicy{Accept: []string{
			"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
			"OutOfDateConfigurationNeeded", "TDRelaunchAdvised", "TDRelaunchAdvisedConfigurationNeeded", attest.NotReported,
		}},
		AllowMissingCRL: true, // upstream looks at none for SEV-SNP
		// An enclave in debug mode fails the check of its image instead.
		AllowDebug: tee == dstack.Nitro,
		DevRoots:   s.config.Attestation.InsecureAllowExternalTrustAnchors,
	}
	p.SNP.Products, p.SNP.AllowNoAliasCheck = []string{"Milan", "Genoa", "Turin"}, true
	p.Image.AllowDev, p.Image.AllowUnanchored, p.Image.AllowLite = true, true, true
	p.Workload.AllowUncommitted, p.Workload.AllowUnpinnedImages, p.Workload.AllowMutable = true, true, true
	return p
}

// judge fills in the reply, in the order of verifier.md §3.
func (s *Service) judge(ctx context.Context, q *inquiry, out *Response) {
	fetchErr := s.complete(ctx, q)
	base := verifier.Request{Source: q.src, Roots: s.roots, Collateral: q.col, At: q.at, Memo: &s.memo}
	base.Freshness.ReportData = q.expect

	compat := base
	compat.Policy = s.compatible(q.evidence.TEE)
	compat.Source.Manifest, compat.Source.Nonce = "", nil
	if q.evidence.TEE == dstack.TDX {
		// checkImage does what follows from the configuration.
		bare := *q.evidence
		bare.Config = ""
		compat.Source.Container, compat.Source.Evidence = nil, &bare
	}
	v := verifier.Appraise(compat)
	ref := s.compare(ctx, q, v, fetchErr, out)

	strict := base
	strict.Policy, strict.Reference = q.policy, ref
	strict.Policy.DevRoots = s.config.Attestation.InsecureAllowExternalTrustAnchors
	strict.Freshness.Nonce = q.nonce
	s.floor(q, &strict)
	out.Verdict = verifier.Appraise(strict)
	s.raise(ctx, q, out.Verdict)
}

// floor demands collateral no older than what the service has seen of the product
// (threats.md B03), unless the request states a time, when others were current. A
// store that cannot be read denies everything.
func (s *Service) floor(q *inquiry, r *verifier.Request) {
	if q.stated {
		return
	}
	want, ok, err := verifier.CollateralFor(&q.src)
	if err != nil || !ok || want.FMSPC+want.Product == "" {
		return
	}
	least, err := s.floors.Floor(want.FMSPC + want.Product)
	if err != nil {
		s.log.Error("collateral floor", "error", err)
		least = math.MaxUint32
	}
	r.Policy.Floor = uint32(min(least, math.MaxUint32))
}

func (s *Service) raise(ctx context.Context, q *inquiry, v *verifier.Verdict) {
	if q.stated || v.Signature != verifier.SignatureValid || v.Trust != dstack.TrustProduction || v.Platform.TCBEvaluation == 0 || v.Has(verifier.Error, "collateral_rollback") {
		return
	}
	if err := s.floors.Raise(ctx, v.Platform.Product, uint64(v.Platform.TCBEvaluation)); err != nil {
		s.log.Error("collateral floor", "error", err)
	}
}

// complete finds collateral where the request brings none. What leads to no root that
// counts makes nobody ask for anything.
func (s *Service) complete(ctx context.Context, q *inquiry) error {
	if q.col != nil || q.src.Collateral != nil {
		return nil
	}
	probe := verifier.Request{Source: q.src, Roots: s.roots, Policy: verifier.SignaturePolicy(), At: q.at, Memo: &s.memo}
	probe.Policy.DevRoots = s.config.Attestation.InsecureAllowExternalTrustAnchors
	v := verifier.Appraise(probe)
	complete := q.evidence.TEE == dstack.SEVSNP && v.Signature == verifier.SignatureValid // but for revocation lists
	if !complete && !v.Has(verifier.Error, "collateral_missing") {
		return nil
	}
	if s.dev != nil {
		// Evidence that leads to a development root, whatever else is wrong with it.
		probe.Roots, probe.Collateral = nil, s.dev
		for _, r := range s.roots {
			if r.Trust == dstack.TrustDevelopment {
				probe.Roots = append(probe.Roots, r)
			}
		}
		if v := verifier.Appraise(probe); !v.Has(verifier.Error, "unknown_root") && !v.Has(verifier.Error, "no_roots") {
			q.col = s.dev
			return nil
		}
	}
	if complete {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, crlTimeout)
		defer cancel()
	}
	b, err := s.collateralFor(ctx, &q.src)
	if s.extra != nil {
		joined := new(collateral.Bundle)
		joined.Add(s.extra)
		joined.Add(b)
		b = joined
	}
	q.col = b
	return err
}

// compare does the steps behind is_valid. It returns what the image is expected to
// be, for the verdict, where the caller's policy names it and it was measured.
func (s *Service) compare(ctx context.Context, q *inquiry, v *verifier.Verdict, fetchErr error, out *Response) (ref verifier.Reference) {
	d := &out.Details
	if reason := quoteReason(q, v); reason != "" {
		if v.Has(verifier.Error, "collateral_missing") && fetchErr != nil {
			reason += ": " + fetchErr.Error()
		}
		out.refuse(prefixQuote + reason)
		return ref
	}
	c := v.Claims
	q.claims, d.QuoteVerified = c, true
	d.TEEVariant = text(variantOf(c))
	d.ReportData = text(hex.EncodeToString(c.ReportData))
	d.AdvisoryIDs = append(d.AdvisoryIDs, c.Advisories...)
	// Enclaves have no status upstream, so that a gate fails closed. A NitroTPM has
	// UpToDate there, which nobody said (threats.md B18).
	if c.TEE != dstack.Nitro {
		d.TCBStatus = text(c.TCBStatus)
	}

	vm, err := q.src.VMConfig()
	if err != nil {
		out.refuse(prefixImage + err.Error())
		return ref
	}
	img, err := s.checkImage(ctx, q.evidence, c, vm, q.download)
	d.OSImageIsDev, d.OSImageVersion = img.dev, img.version
	if img.acpi != nil && q.debug {
		d.ACPITables = &ACPITables{Tables: img.acpi.Tables, RSDP: img.acpi.RSDP, Loader: img.acpi.Loader}
	}
	if err != nil {
		if q.debug && c.TDX != nil {
			d.RTMRDebug = img.debugRTMRs(q.evidence, c.TDX)
		}
		out.refuse(prefixImage + err.Error())
		return ref
	}
	d.OSImageHashVerified, d.ACPITablesVerified = true, img.acpi != nil
	if slices.Contains(q.policy.Workload.ImageHashes, img.hash) && img.version != nil {
		ref.AddImage(img.hash, img.want, "the image of the hash that the policy names")
		ref.DevImage = img.dev
	}

	if f := first(v, isLog); f != nil {
		out.refuse(prefixLog + f.Message)
		return ref
	}
	info, err := identity.Of(identity.Input{Claims: c, Evidence: q.evidence, Document: vm.MRConfig, Image: img.hash[:]})
	if err != nil {
		out.refuse(prefixLog + err.Error())
		return ref
	}
	d.EventLogVerified = len(c.RuntimeRegisters()) > 0
	d.AppInfo = newAppInfo(info)
	d.KeyProvider = parseKeyProvider(info.KeyProvider)
	status := ""
	if d.TCBStatus != nil {
		status = *d.TCBStatus
	}
	a := d.AppInfo
	d.BootInfo = &BootInfo{
		TEEVariant: *d.TEEVariant, MRAggregated: a.MRAggregated, OSImageHash: img.hash[:], MRSystem: a.MRSystem, AppID: a.AppID,
		ComposeHash: a.ComposeHash, InstanceID: a.InstanceID, DeviceID: a.DeviceID, KeyProviderInfo: a.KeyProviderInfo,
		TCBStatus: status, AdvisoryIDs: d.AdvisoryIDs,
	}
	out.IsValid = true
	return ref
}

func text(s string) *string { return &s }

// first returns the first error that pick wants, or nil.
func first(v *verifier.Verdict, pick func(*verifier.Verdict, *verifier.Finding) bool) *verifier.Finding {
	for i := range v.Findings {
		if f := &v.Findings[i]; f.Level == verifier.Error && pick(v, f) {
			return f
		}
	}
	return nil
}

// elsewhere are the errors that is_valid does not ask about: the caller's
// expectations; what checkImage judges itself; and the commitment of the host to the
// configuration of a TD or of an instance with a NitroTPM, which upstream leaves to
// the guest. Every other error is fatal, also one that is new.
var elsewhere = []string{
	"workload_not_specified", "image_unanchored", "image_hash_inconsistent", "image_hash_malformed", "image_hash_mismatch",
	"mrtd_mismatch", "rtmr0_mismatch", "rtmr1_mismatch", "rtmr2_mismatch", "measurement_mismatch", "nitro_debug",
}

func isElsewhere(v *verifier.Verdict, f *verifier.Finding) bool {
	valid := v.Signature == verifier.SignatureValid
	switch {
	case !valid:
		return false
	case strings.HasPrefix(f.Code, "mr_config_"):
		return v.TEE == dstack.TDX || v.TEE == dstack.NitroTPM
	case strings.HasPrefix(f.Evidence, "container.config"), f.Evidence == "container.tpm_quote":
		return true // of the image: the vTPM's own faults leave no valid signature
	}
	return slices.Contains(elsewhere, f.Code)
}

// isLog picks what is wrong with a log that does replay: upstream comes to it last.
func isLog(v *verifier.Verdict, f *verifier.Finding) bool {
	return v.Signature == verifier.SignatureValid && strings.HasPrefix(f.Code, "log_") && f.Code != "log_replay_mismatch"
}

// quoteReason says why the platform's part does not hold, in upstream's words where
// clients match on them; empty when it does.
func quoteReason(q *inquiry, v *verifier.Verdict) string {
	f := first(v, func(v *verifier.Verdict, f *verifier.Finding) bool { return !isElsewhere(v, f) && !isLog(v, f) })
	switch {
	case f == nil && v.Signature != verifier.SignatureValid:
		return "no signature was verified"
	case f == nil:
		return ""
	}
	known := ""
	switch c := v.Claims; f.Code {
	case "report_data_mismatch":
		known = map[dstack.TEE]string{
			dstack.TDX: "tdx report_data mismatch", dstack.SEVSNP: "amd sev-snp report_data mismatch",
			dstack.Nitro: "NSM user_data does not match report_data", dstack.NitroTPM: "NSM user_data does not match report_data",
		}[v.TEE]
		if q.src.RATLS != nil {
			known = "report data mismatch"
		}
	case "td_debug", "snp_debug":
		known = "Debug mode is not allowed"
	case "mr_signer_seam", "module_mrsigner":
		known = "Invalid mr signer seam"
	case "td_service_td":
		known = "Invalid mr service td"
	case "gcp_quote_binding":
		known = "tpm qualified_data mismatch"
	case "log_replay_mismatch":
		for _, r := range c.RuntimeRegisters() {
			if f.Evidence != "claims."+r.Name {
				continue
			}
			if got, err := eventlog.ReplayRuntime(q.evidence.EventLog, r.Hash); err == nil {
				return fmt.Sprintf("%s mismatch, quoted: %x, replayed: %x", strings.ToUpper(r.Name), r.Value, got)
			}
		}
	case "mr_config_mismatch":
		if c != nil && c.SNP != nil {
			want := mrconfig.Digest([]byte(q.evidence.MRConfig))
			known = fmt.Sprintf("amd sev-snp HOST_DATA mismatch, quoted: %x, expected: %x", c.SNP.HostData, want)
		}
	}
	if known == "" {
		return f.Message
	}
	return known + ": " + f.Message
}
