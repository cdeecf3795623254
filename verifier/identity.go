// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/mutable"
)

// eventLog replays the log and reads the identity from it.
func (a *appraisal) eventLog() {
	registers := a.claims.RuntimeRegisters()
	if n := len(a.ev.Unbound); n > 0 || len(registers) == 0 && len(a.ev.EventLog) > 0 {
		a.add(Warning, "log_unbound", "event_log", "", "%d events came with the evidence, and no register of %s vouches for them: they are dropped", n+len(a.ev.EventLog), a.ev.TEE)
	}
	if len(registers) == 0 {
		return
	}
	events := a.ev.EventLog
	if len(eventlog.Runtime(events)) == 0 {
		a.add(Error, "event_log_missing", "event_log", "give the event log with --event-log FILE, or evidence in a container", "there is no log of runtime events, so what runs is not known")
		return
	}
	ok := true
	for _, r := range registers {
		got, err := eventlog.ReplayRuntime(events, r.Hash)
		switch {
		case err != nil:
			a.fail(err, "event_log", "log_malformed")
			ok = false
		case !bytes.Equal(got, r.Value):
			a.add(Error, "log_replay_mismatch", "claims."+r.Name, "", "the runtime events replay to %s, the quote has %s %s: the log was altered or is not of this boot", clipHex(got), r.Name, clipHex(r.Value))
			ok = false
		}
	}
	if t := a.claims.TDX; t != nil {
		a.bootLog(events, t)
	}
	if !ok {
		return
	}
	read := eventlog.Boundary
	if a.launching {
		read = eventlog.LaunchIdentity
	}
	id, err := read(events)
	if err != nil {
		a.fail(err, "event_log", "log_malformed")
		return
	}
	a.identify(&id, registers[0].Name)
}

// bootLog replays the firmware's events as far as the log has them.
func (a *appraisal) bootLog(events []eventlog.Event, t *attest.TDX) {
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
		case got != t.RTMR[imr]:
			a.add(Error, "log_replay_mismatch", fmt.Sprintf("claims.rtmr%d", imr), "", "the boot events of register %d replay to %s, the quote has %s", imr, short(got), short(t.RTMR[imr]))
		}
	}
}

// identify records who runs and which register says so.
func (a *appraisal) identify(id *eventlog.Identity, boundBy string) {
	a.id = id
	a.v.Workload = &Workload{
		AppID: id.AppID, ComposeHash: id.ComposeHash, InstanceID: hexString(id.InstanceID),
		KeyProvider: id.KeyProvider, ChannelKey: hexString(id.ChannelKey), BoundBy: boundBy,
	}
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
	}
	if a.id.GPUPolicyHash != nil && !a.documentOnly || a.id.InitScriptHashes != nil {
		if !slices.EqualFunc(a.id.InitScriptHashes, m.InitScriptHashes(), bytes.Equal) {
			a.add(Error, "init_script_mismatch", "event_log.init-script-hash", "", "the guest measured other init scripts than the manifest has")
		}
	}
	if unpinned := a.documentOnly && len(a.id.InstanceID) == 0; !unpinned && m.NoInstanceID != (len(a.id.InstanceID) == 0) {
		a.add(Error, "instance_id_mismatch", "event_log.instance-id", "", "the manifest has no_instance_id %v, the guest measured the instance id %q", m.NoInstanceID, hexString(a.id.InstanceID))
	}
	a.keyProvider(m)

	if m.Runner != manifest.RunnerBash && m.ImagePolicy != manifest.ImagePolicyDigest {
		a.add(lenient(a.pol.Workload.AllowUnpinnedImages), "images_unpinned", "manifest.image_policy", "deploy with `dstack deploy`, which writes image_policy and image_lock",
			"the manifest does not demand images by digest: the same tags may stand for other programs")
	}
	a.mutable(m)
	if !m.WantsSecureTime() {
		a.add(Warning, "time_host", "manifest.secure_time", "", "time: host. The manifest does not wait for an authenticated clock; the guest believes the host's")
	} else {
		a.add(Info, "time_nts", "manifest.secure_time", "", "time: nts. The manifest makes the guest wait for authenticated time before it gets keys, from %s", timeServers(m))
	}
	if m.RunsScripts() {
		a.add(Warning, "runs_scripts", "manifest", "", "the manifest runs shell scripts in the guest; read them as you read the images' source")
	}
	if a.id.StorageNew {
		a.add(Info, "storage_new", "event_log.storage-new", "", "the data disk was made new in this boot: if this instance had data before, the host took it away")
	}
	if len(m.EnvSigners) > 0 && a.id.EnvVersion > 0 {
		a.add(Info, "env_version", "event_log.env-version", "", "the guest runs with version %d of the environment that the manifest's signers signed", a.id.EnvVersion)
	}
	if m.PublicLogs {
		a.add(Warning, "public_logs", "manifest.public_logs", "", "anyone can read the containers' logs")
	}
	if m.KeyProviderKind() == manifest.KeyProviderKMS && len(m.KeyProviderID) == 0 {
		a.add(Warning, "key_provider_unpinned", "manifest.key_provider_id", "", "the manifest does not pin which KMS gives the keys; the host chose it")
	}
	a.lease(m)
}

// lease says what the guest demands of its KMS, and what becomes of it when the KMS no
// longer authorises it.
func (a *appraisal) lease(m *manifest.Manifest) {
	if m.KeyProviderKind() != manifest.KeyProviderKMS {
		return
	}
	if p := m.KMSPolicy; p == nil {
		a.add(Warning, "kms_unappraised", "manifest.kms_policy", "", "the guest takes its keys from the KMS without appraising it: what the KMS runs, its pin does not say")
	} else {
		a.add(Info, "kms_appraised", "manifest.kms_policy", "", "the guest takes its keys only from the app %s that shows evidence of one of %d manifests", p.AppID, len(p.ComposeHashes))
		if p.DevRoots != "" {
			a.add(Warning, "kms_dev_roots", "manifest.kms_policy.dev_roots", "", "the guest appraises its KMS under development roots, which say nothing about hardware")
		}
	}
	what := "no new keys, and the containers keep running"
	if m.OnLeaseLoss == manifest.OnLeaseLossStop {
		what = "no new keys, and the app stops"
	}
	a.add(Info, "on_lease_loss", "manifest.on_lease_loss", "", "when a lease of the KMS ends without another: %s", what)
}

// mutable names the services that could change what runs after it was measured.
func (a *appraisal) mutable(m *manifest.Manifest) {
	if m.Runner == manifest.RunnerBash || m.DockerComposeFile == "" {
		return
	}
	const most = 8
	found := mutable.Scan([]byte(m.DockerComposeFile))
	if len(found) == 0 {
		return
	}
	var why []string
	for _, f := range found[:min(len(found), most)] {
		why = append(why, f.String())
	}
	if n := len(found) - most; n > 0 {
		why = append(why, fmt.Sprintf("and %d more", n))
	}
	a.add(lenient(a.pol.Workload.AllowMutable), "mutable", "manifest.docker_compose_file", "deploy without these, or accept them with workload.allow_mutable in the policy",
		"what was measured need not be what runs, for containers could change it: %s", strings.Join(why, "; "))
}

// timeServers says who vouches for the guest's clock.
func timeServers(m *manifest.Manifest) string {
	if len(m.TimeServers) == 0 {
		return "the OS image's time servers"
	}
	var list []string
	for _, s := range m.TimeServers {
		authority := "public authority"
		if s.CACert != "" {
			authority = "authority in the manifest"
		}
		list = append(list, fmt.Sprintf("%.100q (%s)", s.Host, authority))
	}
	return "the manifest's time servers " + strings.Join(list, ", ")
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

// launchCommitment checks what the host committed to before the first instruction:
// it must be what runs. On a TEE without a runtime register it is all that says
// what runs.
func (a *appraisal) launchCommitment() {
	switch c := a.claims.ConfigCommitment(); {
	case c == nil && a.claims.TEE == dstack.Nitro:
		a.enclave()
	case c == nil && a.claims.TEE == dstack.NitroTPM && a.id != nil:
		a.nitroTPMCommitment()
	case c == nil:
	case c.ID != nil:
		if a.id != nil {
			a.mrConfigID(*c.ID)
		}
	default:
		a.digestCommitment(c.Name, *c.Digest)
	}
}

// enclave identifies an AWS Nitro enclave: its image holds the app, so the hash of
// the image stands for the manifest too (attestation.md §5.1). App and instance are
// not measured.
func (a *appraisal) enclave() {
	h, err := nitro.ImageHash(a.claims.PCRs())
	if err != nil {
		a.fail(err, "claims.pcrs", "nitro_pcr_missing")
		return
	}
	a.identify(&eventlog.Identity{ComposeHash: dstack.ComposeHash(h), OSImageHash: h[:]}, "pcr0 to pcr2")
}

// digestCommitment checks HOST_DATA of SEV-SNP or RPV of Arm CCA: the digest of a
// configuration document that the evidence must carry.
func (a *appraisal) digestCommitment(name string, digest [32]byte) {
	where := "claims." + name
	if digest == [32]byte{} {
		a.add(Error, "mr_config_missing", where, "start the VM with a host that commits to the configuration", "the launch committed to no configuration (%s is zero)", name)
		return
	}
	text := a.ev.MRConfig
	if text == "" {
		text = a.cfg.document
	}
	if text == "" {
		a.add(Error, "mr_config_document_missing", "container.mr_config", "give evidence in a container, which carries the document", "the launch committed to a configuration document (%s) that the evidence does not carry", name)
		return
	}
	if id := mrconfig.IDv3([]byte(text)); [32]byte(id[1:33]) != digest {
		a.add(Error, "mr_config_mismatch", where, "", "the configuration document that the evidence carries is not the one committed at launch")
		return
	}
	doc, err := mrconfig.Parse([]byte(text))
	if err != nil {
		a.fail(err, "container.mr_config", "mr_config_malformed")
		return
	}
	if a.id != nil {
		mismatch := func(format string, args ...any) {
			a.add(Error, "mr_config_mismatch", where, "", format, args...)
		}
		if !a.describes(doc, mismatch) {
			return
		}
	} else if len(a.claims.RuntimeRegisters()) > 0 {
		return // the log did not hold; the document alone does not make up for it
	} else {
		if doc.AppID == nil {
			a.add(Error, "mr_config_mismatch", where, "", "the configuration document names no app id, and this TEE has no register that would")
			return
		}
		id := &eventlog.Identity{AppID: *doc.AppID, ComposeHash: doc.ComposeHash, GPUPolicyHash: doc.GPUPolicyHash, InitScriptHashes: doc.InitScriptHashes}
		if doc.InstanceID != nil {
			id.InstanceID = doc.InstanceID[:]
		}
		id.KeyProvider = fmt.Sprintf(`{"name":%q,"id":%q}`, doc.KeyProvider, hexString(doc.KeyProviderID))
		a.identify(id, name)
		a.documentOnly = true
	}
	a.v.SelfConsistent = append(a.v.SelfConsistent, Anchor{"launch commitment", name + " equals what runs", "the host, before launch"})
}

// mrConfigID checks MRCONFIGID of TDX.
func (a *appraisal) mrConfigID(id dstack.MRConfigID) {
	mismatch := func(format string, args ...any) {
		a.add(Error, "mr_config_mismatch", "claims.mr_config_id", "", format, args...)
	}
	form, err := mrconfig.Form(id)
	if err != nil {
		a.fail(err, "claims.mr_config_id", "mr_config_form")
		return
	}
	switch form {
	case mrconfig.FormNone:
		a.add(lenient(a.pol.Workload.AllowUncommitted), "mr_config_missing", "claims.mr_config_id", "start the VM with a host that commits to the configuration", "the launch committed to no configuration (MRCONFIGID is zero)")
		return
	case mrconfig.FormV1:
		if id != mrconfig.IDv1(a.id.ComposeHash) {
			mismatch("the launch committed to another manifest than the guest measured")
			return
		}
	case mrconfig.FormV2:
		if a.unprovided() {
			a.add(lenient(a.pol.Workload.AllowUncommitted), "mr_config_open", "claims.mr_config_id", "", "the launch committed to a key provider in a form that cannot be checked before the guest has one")
			return
		}
		kind, kpID, err := parseKeyProvider(a.provider())
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
	return a.describes(doc, mismatch)
}

// provider is the key provider that the guest measured, or that one who has not yet is
// taken to get.
func (a *appraisal) provider() string {
	if a.launching && a.id.KeyProvider == "" {
		return a.assumed
	}
	return a.id.KeyProvider
}

// unprovided says that nothing is known of the key provider, and need not be. That the
// guest takes the one that the document pins, it sees to itself.
func (a *appraisal) unprovided() bool { return a.launching && a.provider() == "" }

// describes compares a committed document with what runs.
func (a *appraisal) describes(doc mrconfig.Document, mismatch func(string, ...any)) bool {
	kind, kpID, kpErr := parseKeyProvider(a.provider())
	switch {
	case doc.ComposeHash != a.id.ComposeHash:
		mismatch("the launch committed to the manifest %s, the guest measured %s", short(doc.ComposeHash), short(a.id.ComposeHash))
	case doc.AppID != nil && *doc.AppID != a.id.AppID:
		mismatch("the launch committed to the app %s, the guest measured %s", short(doc.AppID), short(a.id.AppID))
	case doc.InstanceID != nil && !bytes.Equal(doc.InstanceID[:], a.id.InstanceID):
		mismatch("the launch committed to the instance %s, the guest measured %s", short(doc.InstanceID), hexString(a.id.InstanceID))
	case a.provider() != "" && (kpErr != nil || doc.KeyProvider != kind):
		mismatch("the launch committed to the key provider %s, the guest measured %q", doc.KeyProvider, kind)
	case len(doc.KeyProviderID) > 0 && hexString(doc.KeyProviderID) != kpID && !a.unprovided():
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
	kind, kpID, err := parseKeyProvider(a.provider())
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
