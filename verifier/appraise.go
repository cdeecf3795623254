// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
)

// missing are the codes of inputs that are absent rather than wrong.
var missing = map[string]bool{"collateral_missing": true, "tee_unsupported": true}

// appraisal is one run. Fields are set in the order of Appraise, and only from
// what earlier steps established.
type appraisal struct {
	src   *Source
	ref   *Reference
	pol   Policy
	fresh Freshness
	v     *Verdict

	ev     *attest.Evidence   // decoded, unverified
	claims *attest.Claims     // of the verified quote
	id     *eventlog.Identity // of the log that replays to the quote's RTMR3
	man    *manifest.Manifest // whose hash is in that log
	cfg    config             // claimed by the host

	asserted      []dstack.ImageHash // image hashes that the evidence names
	imageAnchored bool
}

// Appraise judges evidence at a stated time. roots are the trust anchors (those of
// development trust count only if the policy says so); col is the collateral of
// the caller, or nil to use what the evidence carries.
func Appraise(src Source, roots []tdx.Roots, col *collateral.TDX, ref Reference, pol Policy, fresh Freshness, at time.Time) *Verdict {
	a := &appraisal{src: &src, ref: &ref, pol: pol, fresh: fresh, v: &Verdict{
		Version: 1, At: at.UTC(), Trust: dstack.TrustProduction, Freshness: FreshNone, Channel: ChannelNone,
		Findings: []Finding{}, Anchored: []Anchor{}, SelfConsistent: []Anchor{}, Assumptions: []string{},
	}}
	a.run(roots, col, at)
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

func (a *appraisal) run(roots []tdx.Roots, col *collateral.TDX, at time.Time) {
	if len(a.pol.AcceptedTCB) == 0 {
		a.add(Error, "policy_zero", "policy", "name the accepted TCB statuses, such as UpToDate", "the policy accepts no TCB status, so it denies everything")
	}
	roots = a.usableRoots(roots)
	if err := a.src.check(); err != nil {
		a.fail(err, "source", "evidence_malformed")
		return
	}
	a.nonce()
	ev, err := container.Decode(a.src.Container)
	if err != nil {
		a.fail(err, "container", "container_malformed")
		return
	}
	a.ev = ev
	if ev.TEE != dstack.TDX || ev.TPMQuote != nil {
		kind := string(ev.TEE)
		if ev.TPMQuote != nil {
			kind += " with a vTPM"
		}
		a.add(Error, "tee_unsupported", "container", "", "this version does not verify evidence of %s", kind)
		return
	}
	if !a.quote(roots, col, at) {
		return
	}
	if a.eventLog() {
		a.manifest()
		a.launchCommitment()
	}
	a.binding()
	a.workload()
	a.image()
	a.policy()
}

// usableRoots drops development roots that the policy does not allow.
func (a *appraisal) usableRoots(roots []tdx.Roots) []tdx.Roots {
	var out []tdx.Roots
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

// nonce compares what was asked with what was answered. The echo proves nothing;
// a wrong one is a replay whatever the quote says.
func (a *appraisal) nonce() {
	switch {
	case a.fresh.Nonce == nil || a.fresh.ReportData != nil:
	case len(a.fresh.Nonce) < minNonce:
		a.add(Error, "nonce_length", "", fmt.Sprintf("use %d random bytes", 32), "the nonce has %d bytes, fewer than %d: an answer could have been made in advance", len(a.fresh.Nonce), minNonce)
	case !bytes.Equal(a.src.Nonce, a.fresh.Nonce):
		a.add(Error, "nonce_mismatch", "nonce", "ask the instance itself, again", "the evidence was made for another nonce (%s, asked %s): it is replayed", clipHex(a.src.Nonce), clipHex(a.fresh.Nonce))
	}
}

func clipHex(b []byte) string {
	switch {
	case len(b) == 0:
		return "none"
	case len(b) > 8:
		return hexString(b[:8]) + "…"
	}
	return hexString(b)
}

// quote verifies the hardware's signature and the vendor's collateral.
func (a *appraisal) quote(roots []tdx.Roots, col *collateral.TDX, at time.Time) bool {
	opt := tdx.Options{AllowDebug: a.pol.AllowDebug}
	// The caller's collateral decides alone: evidence that brought its own could
	// bring revocation lists from before its revocation (B03).
	set := col
	if set == nil {
		set = a.src.Collateral
	}
	none := set == nil
	if none {
		// Without collateral nothing can be accepted, but a quote that is malformed
		// or of an unknown root can be refused.
		set = &collateral.TDX{}
	}
	claims, first := tdx.VerifyOptions(a.ev.Quote, *set, roots, at, opt)
	if first == nil {
		a.claims, a.v.Claims, a.v.Trust = claims, claims, claims.Trust
		a.anchor("TEE quote", fmt.Sprintf("TDX, TCB %s", claims.TCBStatus), claims.Root)
		return true
	}
	code := fault.Code(first)
	switch {
	case none && (code == "crl_missing" || code == "pck_chain" || code == "quote_cert_type"):
		a.add(Error, "collateral_missing", "collateral", "give it with --collateral FILE, or --dev-roots FILE for a development TEE",
			"there is no collateral (TCB info, revocation lists) to verify the quote with")
	case code == "unknown_root" || code == "no_roots":
		fix := "for a development TEE, add its public roots with --dev-roots FILE; its evidence proves nothing about hardware"
		if a.pol.DevRoots {
			fix = "give the development roots of the installation that the instance runs on"
		}
		a.add(Error, code, "quote", fix, "%v", first)
	default:
		a.fail(first, "quote", "quote_malformed")
	}
	return false
}

// eventLog replays the log and reads the identity from it.
func (a *appraisal) eventLog() bool {
	events := a.ev.EventLog
	ok := true
	rtmr3, err := eventlog.Replay(events, eventlog.RuntimeIMR)
	switch {
	case err != nil:
		a.fail(err, "event_log", "log_malformed")
		ok = false
	case rtmr3 != a.claims.RTMR[3]:
		a.add(Error, "log_replay_mismatch", "quote.rtmr[3]", "", "the runtime events replay to %s, the quote has RTMR3 %s: the log was altered or is not of this boot", short(rtmr3), short(a.claims.RTMR[3]))
		ok = false
	}
	for imr := range uint32(3) {
		boot := slices.DeleteFunc(slices.Clone(events), func(e eventlog.Event) bool { return e.IMR != imr || e.IsRuntime() })
		// A stripped log keeps the three ACPI events only (attestation.md §3.4).
		stripped := imr == 0 && !slices.ContainsFunc(boot, func(e eventlog.Event) bool { return !e.IsACPI() })
		if len(boot) == 0 || stripped {
			continue
		}
		got, err := eventlog.Replay(events, imr)
		switch {
		case err != nil:
			a.fail(err, "event_log", "log_malformed")
		case got != a.claims.RTMR[imr]:
			a.add(Error, "log_replay_mismatch", fmt.Sprintf("quote.rtmr[%d]", imr), "", "the boot events of register %d replay to %s, the quote has %s", imr, short(got), short(a.claims.RTMR[imr]))
		}
	}
	if !ok {
		return false
	}
	id, err := eventlog.Boundary(events)
	if err != nil {
		a.fail(err, "event_log", "log_malformed")
		return false
	}
	a.id = &id
	a.v.Workload = &Workload{
		AppID: id.AppID, ComposeHash: id.ComposeHash, InstanceID: hexString(id.InstanceID), KeyProvider: id.KeyProvider, ChannelKey: hexString(id.ChannelKey),
	}
	return true
}

// manifest binds the manifest's text to the measured compose hash and holds what
// the guest measured against what the manifest says.
func (a *appraisal) manifest() {
	if a.src.Manifest == "" {
		a.add(Warning, "manifest_missing", "manifest", "", "the evidence has no manifest: what its hash stands for is not shown here")
		return
	}
	if got := dstack.ComposeHash(sha256.Sum256([]byte(a.src.Manifest))); got != a.id.ComposeHash {
		a.add(Error, "manifest_hash_mismatch", "manifest", "", "the manifest shown has hash %s, the guest measured %s: it is not the one that runs", short(got), short(a.id.ComposeHash))
		return
	}
	m, err := manifest.Parse([]byte(a.src.Manifest))
	if err != nil {
		a.fail(err, "manifest", "manifest_malformed")
		return
	}
	a.man = m
	w := a.v.Workload
	w.Name, w.RunsScripts, w.PublicLogs = m.Name, m.RunsScripts(), m.PublicLogs

	// Guests before 0.6 committed to neither scripts nor GPU policy.
	if a.id.GPUPolicyHash != nil {
		if want := m.GPUPolicyHash(); !bytes.Equal(a.id.GPUPolicyHash, want[:]) {
			a.add(Error, "gpu_policy_mismatch", "event_log.gpu-policy-hash", "", "the guest measured another GPU policy than the manifest has")
		}
		if !slices.EqualFunc(a.id.InitScriptHashes, m.InitScriptHashes(), bytes.Equal) {
			a.add(Error, "init_script_mismatch", "event_log.init-script-hash", "", "the guest measured other init scripts than the manifest has")
		}
	}
	if m.NoInstanceID != (len(a.id.InstanceID) == 0) {
		a.add(Error, "instance_id_mismatch", "event_log.instance-id", "", "the manifest has no_instance_id %v, the guest measured the instance id %q", m.NoInstanceID, hexString(a.id.InstanceID))
	}
	a.keyProvider(m)

	if m.Runner != manifest.RunnerBash && m.ImagePolicy != manifest.ImagePolicyDigest {
		a.add(lenient(a.pol.AllowUnpinnedImages), "images_unpinned", "manifest.image_policy", "deploy with `dstack deploy`, which writes image_policy and image_lock",
			"the manifest does not demand images by digest: the same tags may stand for other programs")
	}
	if !m.WantsSecureTime() {
		a.add(Warning, "time_host", "manifest.secure_time", "", "time: host. The manifest does not wait for an authenticated clock; the guest believes the host's")
	}
	if m.RunsScripts() {
		a.add(Warning, "runs_scripts", "manifest", "", "the manifest runs shell scripts in the guest; read them as you read the images' source")
	}
	if m.PublicLogs {
		a.add(Warning, "public_logs", "manifest.public_logs", "", "anyone can read the containers' logs")
	}
	if m.KeyProviderKind() == manifest.KeyProviderKMS && len(m.KeyProviderID) == 0 {
		a.add(Warning, "key_provider_unpinned", "manifest.key_provider_id", "", "the manifest does not pin which KMS gives the keys; the host chose it")
	}
}

// keyProvider compares the measured key provider with the manifest's.
func (a *appraisal) keyProvider(m *manifest.Manifest) {
	if a.id.KeyProvider == "" {
		return // a local-sgx guest of older releases
	}
	name, id, err := parseKeyProvider(a.id.KeyProvider)
	if err != nil {
		a.add(Error, "key_provider_mismatch", "event_log.key-provider", "", "the measured key provider does not parse: %v", err)
		return
	}
	if kind := m.KeyProviderKind(); name != kind {
		a.add(Error, "key_provider_mismatch", "event_log.key-provider", "", "the guest's keys come from %q, the manifest says %q", name, kind)
	} else if len(m.KeyProviderID) > 0 && id != hexString(m.KeyProviderID) {
		a.add(Error, "key_provider_mismatch", "event_log.key-provider", "", "the guest's keys come from another %s than the manifest pins", kind)
	}
}

// parseKeyProvider reads {"name":…,"id":…} and spells local-sgx as manifests do.
func parseKeyProvider(text string) (kind, id string, err error) {
	var p struct {
		Name *string `json:"name"`
		ID   *string `json:"id"`
	}
	if err := strictjson.Decode([]byte(text), &p, strictjson.Limits{Size: 16 << 10, Depth: 1}); err != nil {
		return "", "", err
	}
	if p.Name == nil || p.ID == nil {
		return "", "", errors.New("name or id is missing")
	}
	if *p.Name == "local-sgx" {
		return manifest.KeyProviderLocal, *p.ID, nil
	}
	return *p.Name, *p.ID, nil
}

// binding ties the quote to the caller's nonce and connection.
func (a *appraisal) binding() {
	unbound := func() {
		a.add(Warning, "channel_unbound", "", "ask over https, directly", "nothing ties the evidence to a connection: what answers there may be something else")
	}
	stale := func() {
		a.add(lenient(!a.pol.RequireFresh), "freshness_none", "nonce", "ask the running instance, by its URL", "the evidence does not answer a nonce of this run: it may be old, and the instance gone")
	}
	got := a.claims.ReportData
	if a.ev.ReportData != got {
		a.add(Error, "report_data_mismatch", "container.report_data", "", "the container claims other report data than the quote has")
		return
	}
	if want := a.fresh.ReportData; want != nil {
		if got != *want {
			a.add(Error, "report_data_mismatch", "quote.report_data", "", "the quote has report data %s, expected %s", short(got), short(*want))
			return
		}
		a.v.Freshness = FreshReportData
		unbound()
		return
	}
	if len(a.src.Nonce) == 0 {
		unbound()
		stale()
		return
	}
	if a.id == nil {
		return // the envelope holds the identity, which is not established
	}
	made := func(spki []byte) bool {
		return got == binding.Envelope(a.src.Nonce, spki, a.id.AppID, a.id.InstanceID)
	}
	served := func(match func([]byte) bool) int { return slices.IndexFunc(a.src.ServedSPKIs, match) }
	conn := a.fresh.ConnectionSPKI
	switch {
	case len(conn) > 0 && served(func(k []byte) bool { return bytes.Equal(k, conn) }) < 0:
		a.add(Error, "spki_mismatch", "served_spkis", "connect to the instance itself, without a proxy that ends TLS", "the key of this connection is none of those that the instance serves: someone is in between")
		return
	case len(conn) > 0 && made(conn):
		if !a.channelKey(conn) {
			return
		}
		a.v.Channel = ChannelTLS
	case len(conn) > 0 && (made(nil) || served(made) >= 0):
		a.add(Error, "spki_mismatch", "quote.report_data", "connect to the instance itself, without a proxy that ends TLS", "the evidence was made for another connection than this one")
		return
	case len(conn) == 0 && made(nil):
		unbound()
	case len(conn) == 0 && served(made) >= 0:
		// Saved evidence: made for a connection that is gone.
		if !a.channelKey(a.src.ServedSPKIs[served(made)]) {
			return
		}
		unbound()
	default:
		a.add(Error, "report_data_mismatch", "quote.report_data", "", "the quote does not commit to this nonce, connection and identity")
		return
	}
	if a.fresh.Nonce == nil {
		stale()
	} else if !a.v.Has(Error, "nonce_mismatch") && !a.v.Has(Error, "nonce_length") {
		a.v.Freshness = FreshNonce
	}
}

// channelKey demands that the guest's init committed to the key before any app
// ran. Report data alone do not show it: an app may ask for a quote over bytes of
// its own choice (threats.md B20).
func (a *appraisal) channelKey(spki []byte) bool {
	switch sum := sha256.Sum256(spki); {
	case a.id.ChannelKey == nil:
		a.add(Error, "channel_key_uncommitted", "event_log.system-channel-key", "use an OS image that commits to its channel key", "the guest did not commit to a channel key before the app started, so an app may have made this evidence")
	case !bytes.Equal(a.id.ChannelKey, sum[:]):
		a.add(Error, "channel_key_mismatch", "event_log.system-channel-key", "", "the connection's key is not the one that the guest committed to before the app started")
	default:
		return true
	}
	return false
}

// launchCommitment checks MRCONFIGID: what the host committed to before the first
// instruction must be what runs.
func (a *appraisal) launchCommitment() {
	id := a.claims.MRConfigID
	mismatch := func(format string, args ...any) {
		a.add(Error, "mr_config_mismatch", "quote.mr_config_id", "", format, args...)
	}
	if cfg, err := parseConfig(a.ev.Config); err != nil {
		a.fail(err, "container.config", "vm_config_malformed")
	} else {
		a.cfg = cfg
	}
	form, err := mrconfig.Form(id)
	if err != nil {
		a.fail(err, "quote.mr_config_id", "mr_config_form")
		return
	}
	switch form {
	case mrconfig.FormNone:
		a.add(lenient(a.pol.AllowNoMRConfig), "mr_config_missing", "quote.mr_config_id", "start the VM with a host that commits to the configuration", "the launch committed to no configuration (MRCONFIGID is zero)")
		return
	case mrconfig.FormV1:
		if id != mrconfig.IDv1(a.id.ComposeHash) {
			mismatch("the launch committed to another manifest than the guest measured")
			return
		}
	case mrconfig.FormV2:
		kind, kpID, err := parseKeyProvider(a.id.KeyProvider)
		var raw []byte
		if err == nil {
			raw, err = decodeHex(kpID)
		}
		var want dstack.MRConfigID
		if err == nil {
			want, err = mrconfig.IDv2(a.id.ComposeHash, a.id.AppID, kind, raw)
		}
		if err != nil || id != want {
			mismatch("the launch committed to another app, manifest or key provider than the guest measured")
			return
		}
	case mrconfig.FormV3:
		if !a.document(id, mismatch) {
			return
		}
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"launch commitment", fmt.Sprintf("MRCONFIGID form %d equals what runs", form), "the host, before launch"})
}

// document checks the third form. The document may be carried by the evidence;
// where it is not, it can only be one of those that pin a subset of what runs.
func (a *appraisal) document(id dstack.MRConfigID, mismatch func(string, ...any)) bool {
	if a.cfg.document == "" {
		if slices.ContainsFunc(a.truthful(), func(d mrconfig.Document) bool { return mrconfig.IDv3(d.Bytes()) == id }) {
			return true
		}
		mismatch("the launch committed to a document that the evidence does not carry, and that pins something else than what runs")
		return false
	}
	if mrconfig.IDv3([]byte(a.cfg.document)) != id {
		mismatch("the configuration document that the evidence carries is not the one committed at launch")
		return false
	}
	doc, err := mrconfig.Parse([]byte(a.cfg.document))
	if err != nil {
		a.fail(err, "container.config.mr_config", "mr_config_malformed")
		return false
	}
	kind, kpID, kpErr := parseKeyProvider(a.id.KeyProvider)
	switch {
	case doc.ComposeHash != a.id.ComposeHash:
		mismatch("the launch committed to the manifest %s, the guest measured %s", short(doc.ComposeHash), short(a.id.ComposeHash))
	case doc.AppID != nil && *doc.AppID != a.id.AppID:
		mismatch("the launch committed to the app %s, the guest measured %s", short(doc.AppID), short(a.id.AppID))
	case doc.InstanceID != nil && !bytes.Equal(doc.InstanceID[:], a.id.InstanceID):
		mismatch("the launch committed to the instance %s, the guest measured %s", short(doc.InstanceID), hexString(a.id.InstanceID))
	case a.id.KeyProvider != "" && (kpErr != nil || doc.KeyProvider != kind):
		mismatch("the launch committed to the key provider %s, the guest measured %q", doc.KeyProvider, kind)
	case len(doc.KeyProviderID) > 0 && hexString(doc.KeyProviderID) != kpID:
		mismatch("the launch committed to another key provider's identity than the guest measured")
	case doc.GPUPolicyHash != nil && !bytes.Equal(doc.GPUPolicyHash, a.id.GPUPolicyHash):
		mismatch("the launch committed to another GPU policy than the guest measured")
	case doc.InitScriptHashes != nil && !slices.EqualFunc(doc.InitScriptHashes, a.id.InitScriptHashes, bytes.Equal):
		mismatch("the launch committed to other init scripts than the guest measured")
	default:
		return true
	}
	return false
}

// truthful returns every document that our own hosts would write for what runs:
// each optional field is there or not, and true when it is.
func (a *appraisal) truthful() []mrconfig.Document {
	kind, kpID, err := parseKeyProvider(a.id.KeyProvider)
	if err != nil {
		return nil
	}
	raw, err := decodeHex(kpID)
	if err != nil {
		return nil
	}
	var out []mrconfig.Document
	for bits := range 32 {
		d := mrconfig.Document{ComposeHash: a.id.ComposeHash, KeyProvider: kind}
		if bits&1 != 0 {
			d.AppID = &a.id.AppID
		}
		if bits&2 != 0 && len(a.id.InstanceID) == dstack.InstanceIDSize {
			d.InstanceID = (*dstack.InstanceID)(a.id.InstanceID)
		}
		if bits&4 != 0 {
			d.GPUPolicyHash = a.id.GPUPolicyHash
		}
		if bits&8 != 0 {
			d.InitScriptHashes = append([][]byte{}, a.id.InitScriptHashes...)
		}
		if bits&16 != 0 {
			d.KeyProviderID = raw
		}
		out = append(out, d)
	}
	return out
}

// workload compares what runs with what is expected.
func (a *appraisal) workload() {
	if !a.ref.expectsWorkload() {
		fix := "say what is expected: --lock dstack.lock.json, --compose app-compose.json or --compose-hash HEX"
		if a.id != nil {
			fix = fmt.Sprintf("look at the manifest, and if it is what you expect, say so: --compose-hash %s --app-id %s", a.id.ComposeHash, a.id.AppID)
		}
		a.add(Error, "workload_not_specified", "", fix, "no workload is expected, so none can be accepted; an app id alone does not say what runs")
	}
	if a.id == nil {
		return
	}
	composeBy, appBy := "", ""
	for _, e := range a.ref.all() {
		if len(e.compose) > 0 && !slices.Contains(e.compose, a.id.ComposeHash) {
			a.add(Error, "compose_hash_mismatch", "event_log.compose-hash", "", "the guest runs the manifest %s; %s expects %s", a.id.ComposeHash, e.origin, list(e.compose))
		} else if len(e.compose) > 0 {
			composeBy = e.origin
		}
		if e.app != nil && *e.app != a.id.AppID {
			a.add(Error, "app_id_mismatch", "event_log.app-id", "", "the guest is the app %s; %s expects %s", a.id.AppID, e.origin, *e.app)
		} else if e.app != nil {
			appBy = e.origin
		}
	}
	if a.v.Has(Error, "compose_hash_mismatch") {
		composeBy = ""
	}
	if a.v.Has(Error, "app_id_mismatch") {
		appBy = ""
	}
	a.vouch("compose_hash", a.id.ComposeHash.String(), composeBy)
	a.vouch("app_id", a.id.AppID.String(), appBy)
	if len(a.id.InstanceID) > 0 {
		a.vouch("instance_id", hexString(a.id.InstanceID), "")
	}
}

func (a *appraisal) anchor(what, value, origin string) {
	a.v.Anchored = append(a.v.Anchored, Anchor{what, value, origin})
}

// vouch lists a measured value under the one who expected it, or as the guest's own.
func (a *appraisal) vouch(what, value, origin string) {
	if origin != "" {
		a.anchor(what, value, origin)
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{what, value, "the guest"})
}

func list[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, " or ")
}

// image compares the launch registers and the image's name with what is expected.
func (a *appraisal) image() {
	a.assertedImages()
	matched := map[dstack.ImageHash]string{} // expected and asserted
	for _, e := range a.ref.all() {
		if len(e.images) == 0 {
			continue
		}
		for _, h := range a.asserted {
			if slices.Contains(e.images, h) {
				matched[h] = e.origin
				continue
			}
			a.add(Error, "image_hash_mismatch", "container.config.os_image_hash", "", "the guest runs the OS image %s; %s expects %s", h, e.origin, list(e.images))
		}
	}
	direct := false
	for _, e := range a.ref.all() {
		if e.tdx == nil {
			continue
		}
		direct = true
		if !a.registers(e.tdx, e.origin) {
			continue
		}
		a.anchor("launch registers", "MRTD "+short(a.claims.MRTD)+", RTMR0 to RTMR2", e.origin)
		a.imageAnchored = true
		if len(e.images) == 1 {
			a.anchor("os_image_hash", e.images[0].String(), e.origin)
			if a.v.Workload != nil {
				a.v.Workload.OSImageHash = e.images[0].String()
			}
			delete(matched, e.images[0])
		}
	}
	if !direct {
		a.ownDocument(matched)
	}
	if a.imageAnchored {
		return
	}
	for _, h := range a.asserted {
		a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"os_image_hash", h.String(), "the guest"})
	}
	if a.v.Has(Error, "image_hash_mismatch") || slices.ContainsFunc(registerCodes, func(c string) bool { return a.v.Has(Error, c) }) {
		return // says more
	}
	a.add(lenient(a.pol.AllowUnanchoredImage), "image_unanchored", "quote.mrtd", "give --lock dstack.lock.json, or the release directory with --image DIR",
		"that the guest runs this OS image is only its own word: no expected registers were given, or nothing ties them to it")
}

// assertedImages collects the names that the evidence gives its OS image.
func (a *appraisal) assertedImages() {
	if a.id != nil && a.id.OSImageHash != nil {
		a.asserted = append(a.asserted, dstack.ImageHash(a.id.OSImageHash))
	}
	if text := a.cfg.vm.OSImageHash; text != "" {
		h, err := dstack.ParseImageHash(text)
		if err != nil {
			a.add(Error, "image_hash_malformed", "container.config.os_image_hash", "", "%v", err)
		} else if !slices.Contains(a.asserted, h) {
			if len(a.asserted) > 0 {
				a.add(Error, "image_hash_inconsistent", "container.config.os_image_hash", "", "the configuration names the OS image %s, the event log %s", h, a.asserted[0])
			}
			a.asserted = append(a.asserted, h)
		}
	}
	if w := a.v.Workload; w != nil && len(a.asserted) > 0 {
		w.OSImageHash = a.asserted[0].String()
	}
}

// ownDocument takes the registers from the measurement document that the evidence
// itself carries. They are the image's only when the checksum file that names the
// document is what the expected image hash is the hash of; otherwise whoever made
// the evidence made up both (threats.md B10).
func (a *appraisal) ownDocument(expected map[dstack.ImageHash]string) {
	split := a.cfg.vm.TDXMeasurement
	if split == nil {
		return
	}
	h, err := dstack.ParseImageHash(a.cfg.vm.OSImageHash)
	if err != nil {
		return // reported
	}
	if err := split.Bind(h, measure.TDXDocumentName); err != nil {
		a.fail(err, "container.config.tdx_measurement", "measurement_malformed")
		return
	}
	doc, err := measure.ParseTDXDocument(split.Measurement)
	if err != nil {
		a.fail(err, "container.config.tdx_measurement", "measurement_malformed")
		return
	}
	twoPass, err := a.cfg.vm.TwoPass()
	if err != nil {
		a.fail(err, "container.config", "vm_config_malformed")
		return
	}
	want, err := doc.TDX(a.cfg.vm.MemorySize, twoPass)
	if err != nil {
		a.add(Info, fault.Code(err), "container.config.memory_size", fault.Fix(err), "%v", err)
		return
	}
	origin, anchored := expected[h]
	if !anchored {
		origin = "the evidence's own measurement document"
	}
	if !a.registers(want, origin) {
		return
	}
	if anchored {
		a.imageAnchored = true
		a.anchor("os_image_hash", h.String(), origin)
		a.anchor("launch registers", "MRTD "+short(a.claims.MRTD)+", RTMR0 to RTMR2", "the measurement document named by the OS image hash")
		return
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"launch registers", "MRTD " + short(a.claims.MRTD) + ", RTMR0 to RTMR2", origin})
}

var registerCodes = []string{"mrtd_mismatch", "rtmr0_mismatch", "rtmr1_mismatch", "rtmr2_mismatch"}

// registers compares the launch registers of the quote with expected ones.
func (a *appraisal) registers(want *measure.TDX, origin string) bool {
	ok := true
	compare := func(code, evidence, what string, got, want dstack.Measurement) {
		if got != want {
			a.add(Error, code, evidence, "", "%s is %s; %s expects %s", what, short(got), origin, short(want))
			ok = false
		}
	}
	compare("mrtd_mismatch", "quote.mrtd", "the firmware (MRTD)", a.claims.MRTD, want.MRTD)

	var acpi []dstack.Measurement
	if slices.ContainsFunc(want.RTMR0, func(e measure.RTMR0Event) bool { return e.Digest == nil }) {
		for _, e := range a.ev.EventLog {
			if e.IsACPI() && len(e.Digest) == dstack.MeasurementSize {
				acpi = append(acpi, dstack.Measurement(e.Digest))
			}
		}
		a.add(Warning, "acpi_not_checked", "event_log", "", "the ACPI tables that the host gave the guest are as the event log says, and were not compared with expected ones")
	}
	if rtmr0, err := want.ReplayRTMR0(acpi); err != nil {
		a.add(Error, "rtmr0_mismatch", "event_log", "", "the event log has not the ACPI events that RTMR0 needs: %v", err)
		ok = false
	} else {
		compare("rtmr0_mismatch", "quote.rtmr[0]", "the firmware's configuration and the VM's shape (RTMR0)", a.claims.RTMR[0], rtmr0)
	}
	compare("rtmr1_mismatch", "quote.rtmr[1]", "the kernel (RTMR1)", a.claims.RTMR[1], want.RTMR1)
	compare("rtmr2_mismatch", "quote.rtmr[2]", "the command line and initramfs (RTMR2)", a.claims.RTMR[2], want.RTMR2)
	return ok
}

// policy applies what the relying party accepts to what was established.
func (a *appraisal) policy() {
	c, p := a.claims, a.pol
	if len(p.AcceptedTCB) > 0 && !slices.Contains(p.AcceptedTCB, c.TCBStatus) {
		advisories := ""
		if len(c.Advisories) > 0 {
			advisories = " (" + strings.Join(c.Advisories, ", ") + ")"
		}
		a.add(Error, "tcb_status", "claims.tcb_status", "have the host's firmware and microcode updated", "the platform's TCB is %s%s; accepted: %s", c.TCBStatus, advisories, strings.Join(p.AcceptedTCB, ", "))
	}
	for _, advisory := range c.Advisories {
		if slices.Contains(p.DeniedAdvisories, advisory) {
			a.add(Error, "advisory_denied", "claims.advisories", "", "%s applies to the platform", advisory)
		}
	}
	if c.TCBEvaluation < p.MinTCBEvaluation {
		a.add(Error, "tcb_evaluation_low", "claims.tcb_evaluation", "fetch current collateral", "the collateral has evaluation number %d, the least accepted is %d: it is old", c.TCBEvaluation, p.MinTCBEvaluation)
	}
	if slices.Contains(p.DeniedFMSPC, c.FMSPC) {
		a.add(Error, "platform_denied", "claims.fmspc", "", "platforms of FMSPC %s are not accepted", c.FMSPC)
	}
	if len(p.Devices) > 0 && !slices.Contains(p.Devices, c.DeviceID) {
		a.add(Error, "device_not_allowed", "claims.device_id", "", "the machine %s is not among those accepted", c.DeviceID)
	}
	if c.Debug {
		// The quote verifier refuses it unless the policy allows it.
		a.add(Warning, "td_debug", "quote.td_attributes", "", "the TD runs in debug mode: the host can read its memory")
	}
	dev := c.Trust == dstack.TrustDevelopment
	switch {
	case dev:
		a.add(Warning, "dev_image", "", "", "only development images run in a development TEE")
	case a.ref.DevImage != nil && *a.ref.DevImage:
		a.add(lenient(p.AllowDevImage), "dev_image", "", "run a production image", "the expected OS image is one for development")
	}
	if dev || strings.HasPrefix(a.ref.Firmware, "debian") {
		a.add(Warning, "firmware_distribution", "quote.mrtd", "", "the firmware is a distribution's build, which nobody has reproduced")
	}
}

// conclude draws the outcome from the findings.
func (a *appraisal) conclude() {
	v := a.v
	errs, absent := 0, 0
	for _, f := range v.Findings {
		if f.Level == Error {
			errs++
			if missing[f.Code] {
				absent++
				v.Reason = f.Message
			}
		}
	}
	switch {
	case errs == 0 && a.claims != nil && a.id != nil && a.ref.expectsWorkload():
		v.Accepted = true
	case errs == absent && errs > 0:
		v.Undecided = true
	}
	if !v.Undecided {
		v.Reason = ""
	}
	a.assume()
}

// assume lists what remains to be trusted.
func (a *appraisal) assume() {
	say := func(s string) { a.v.Assumptions = append(a.v.Assumptions, s) }
	if a.v.Trust == dstack.TrustDevelopment {
		say("development TEE: nothing about hardware is shown; whoever runs the host can read and change everything in the guest")
	} else {
		say("the TEE's vendor, its signing keys, and that nobody has physical access to the machine's memory bus")
	}
	if a.v.Has(Warning, "firmware_distribution") {
		say("the distribution that built the firmware")
	}
	if a.v.Has(Warning, "acpi_not_checked") {
		say("the guest kernel: ACPI tables of the host cannot make it read or write private memory")
	}
	if a.v.Has(Warning, "time_host") || a.man == nil {
		say("the host for the guest's clock")
	}
	say("the host for availability: it can stop or slow the guest, drop its traffic, and start it from an older disk")
	if a.man != nil && a.man.KeyProviderKind() == manifest.KeyProviderKMS {
		say("the key management service that gives the guest its keys, which this verdict does not cover")
	}
	if a.man != nil && a.man.GatewayWanted() {
		say("the gateway in front of the guest, where TLS ends there, which this verdict does not cover")
	}
	if a.man != nil && a.man.KeyProviderKind() == manifest.KeyProviderNone {
		say("no key management, gateway or governance took part: keys end with this boot, and nothing binds a next version")
	}
	say("that you, or someone you trust, has read what the expected values stand for: manifest, container images, OS image")
}

func decodeHex(s string) ([]byte, error) {
	var h collateral.Hex
	err := h.UnmarshalText([]byte(s))
	return h, err
}
