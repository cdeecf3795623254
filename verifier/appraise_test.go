// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestBaselineIsAccepted(t *testing.T) {
	g := newGuest(t)
	v := g.request().appraise(g.evidence())
	if !v.Accepted || v.Undecided || v.Trust != dstack.TrustDevelopment || v.Freshness != FreshNonce || v.Channel != ChannelTLS {
		t.Fatal(show(v))
	}
	var warnings []string
	for _, f := range v.Findings {
		warnings = append(warnings, f.Level+" "+f.Code)
	}
	want := []string{"warning time_host", "warning dev_image", "warning firmware_distribution"}
	if diff := cmp.Diff(want, warnings); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	var anchored []string
	for _, a := range v.Anchors {
		anchored = append(anchored, a.What)
	}
	if diff := cmp.Diff([]string{"TEE quote", "compose_hash", "app_id", "launch registers", "os_image_hash"}, anchored); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// The same bytes and the same time give the same verdict.
	src := g.evidence()
	a, _ := json.Marshal(g.request().appraise(src))
	b, _ := json.Marshal(g.request().appraise(src))
	if !bytes.Equal(a, b) {
		t.Error("not deterministic")
	}
}

// golden replaces what differs from run to run: keys, and what is signed by them.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	got = regexp.MustCompile(`sha256 [0-9a-f]{64}`).ReplaceAll(got, []byte("sha256 ROOT"))
	got = regexp.MustCompile(`(fingerprint) [0-9a-f]{64}`).ReplaceAll(got, []byte("$1 ROOT"))
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (-want +got), go test ./verifier -update rewrites it:\n%s", name, diff)
	}
}

func TestGolden(t *testing.T) {
	for name, run := range map[string]func(*guest, *request){
		"accepted": func(*guest, *request) {},
		"refused": func(g *guest, r *request) {
			r.ref.AddComposeHash(dstack.ComposeHash{1}, "--compose-hash")
			r.fresh.Nonce = bytes.Repeat([]byte{8}, 32)
			g.launch.Kernel = flip(g.launch.Kernel)
		},
		"undecided":     func(g *guest, r *request) { r.col = nil },
		"not-specified": func(g *guest, r *request) { r.ref = Reference{} },
		"unknown-root":  func(g *guest, r *request) { r.pol.DevRoots = false },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			r := g.request()
			run(g, r)
			v := r.appraise(g.evidence())
			j, err := json.MarshalIndent(v, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name+".json", append(j, '\n'))
			golden(t, name+".txt", []byte(v.String()))
			first, rest, _ := strings.Cut(v.String(), "\n")
			second, _, _ := strings.Cut(rest, "\n")
			outcome := map[bool]string{true: "ACCEPTED", false: "REFUSED"}[v.Accepted]
			if v.Undecided {
				outcome = "UNDECIDED"
			}
			if first != "trust: "+string(v.Trust) || !strings.HasPrefix(second, outcome) {
				t.Errorf("%q, %q", first, second)
			}
		})
	}
}

// mutation is one attack or mistake, and the error that must name it.
type mutation struct {
	name string
	code string
	run  func(*guest, *request)
	// also are further errors that follow from it; others are a failure.
	also []string
}

func insert(at int, e eventlog.Event) func([]eventlog.Event) []eventlog.Event {
	return func(l []eventlog.Event) []eventlog.Event { return slices.Insert(slices.Clone(l), at, e) }
}

func without(name string) func([]eventlog.Event) []eventlog.Event {
	return func(l []eventlog.Event) []eventlog.Event {
		return slices.DeleteFunc(slices.Clone(l), func(e eventlog.Event) bool { return e.Name == name })
	}
}

func find(l []eventlog.Event, name string) int {
	return slices.IndexFunc(l, func(e eventlog.Event) bool { return e.Name == name })
}

// remanifest gives the guest another manifest, measured and committed.
func remanifest(g *guest, r *request, d manifest.Draft) {
	raw, err := manifest.Build(d)
	g.check(err)
	g.manifest = raw
	h := g.composeHash()
	g.document.ComposeHash = h
	r.ref = Reference{}
	r.ref.AddComposeHash(h, "--compose-hash")
	r.ref.AddImage(g.image, g.expected(), "--image")
}

func draft() manifest.Draft {
	off := false
	return manifest.Draft{Name: "x", KeyProvider: "none", SecureTime: &off, ImagePolicy: "digest"}
}

var other = bytes.Repeat([]byte{0xee}, 32)

// unknownShape states a VM whose ACPI tables cannot be computed.
func unknownShape(c *measure.VMConfig) { c.QEMUVersion = "" }

// certified makes the evidence that of an RA-TLS certificate of the connection.
func certified(g *guest, r *request) {
	g.edit.envelope = func() dstack.ReportData { return binding.ReportData(binding.TagRATLS, g.spki) }
	g.edit.source = func(s *Source) {
		s.RATLS, s.Issued, s.Nonce, s.ServedSPKIs = g.spki, testTime.Add(-time.Hour), nil, nil
	}
	r.fresh = Freshness{ConnectionSPKI: bytes.Clone(g.spki)}
}

func mutations(t *testing.T) []mutation {
	return []mutation{
		// Policy.
		{"an advisory that is not among those accepted", "advisory_not_accepted", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
			r.pol.TCB.Accept, r.pol.Advisories.Accept = []string{"UpToDate", "OutOfDate"}, []string{"INTEL-SA-00002"}
		}, nil},
		{"a grace window that is over", "tcb_status", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
			r.pol.TCB.GraceDays = 1
		}, nil},
		{"a kind of TEE that is not accepted", "tee_denied", func(g *guest, r *request) { r.pol.TEEs = []dstack.TEE{dstack.SEVSNP} }, nil},
		{"a platform that is not among those allowed", "platform_denied", func(g *guest, r *request) { r.pol.TDX.AllowFMSPC = []string{"000000000000"} }, nil},
		{"a TDX module that is too old", "module_svn_low", func(g *guest, r *request) { r.pol.TDX.MinModuleSVN = 200 }, nil},
		{"another instance of the same app", "instance_id_mismatch", func(g *guest, r *request) { r.ref.AddInstanceID(dstack.InstanceID{9}, "--instance-id") }, nil},
		{"another workload than the policy's", "compose_hash_mismatch", func(g *guest, r *request) { r.pol.Workload.ComposeHashes = []dstack.ComposeHash{{9}} }, nil},
		{"a register with another value than the policy's", "register_mismatch", func(g *guest, r *request) {
			r.pol.Registers = map[string][]collateral.Hex{"mrtd": {make([]byte, 48)}}
		}, nil},
		{"a register that the TEE has not", "register_mismatch", func(g *guest, r *request) {
			r.pol.Registers = map[string][]collateral.Hex{"pcr4": {make([]byte, 32)}}
		}, nil},
		{"an image whose epoch is too low", "os_epoch_low", func(g *guest, r *request) { e := 3; r.ref.OSEpoch, r.pol.Image.MinEpoch = &e, 4 }, nil},
		{"an image of unknown epoch", "os_epoch_unknown", func(g *guest, r *request) { r.pol.Image.MinEpoch = 4 }, nil},
		{"evidence of unknown age", "evidence_age_unknown", func(g *guest, r *request) {
			r.pol.Evidence.MaxAgeSeconds = 60
			r.fresh.Nonce = nil
		}, nil},
		{"an RA-TLS certificate that is too old", "evidence_too_old", func(g *guest, r *request) {
			certified(g, r)
			r.pol.Evidence.MaxAgeSeconds = 3600
			g.edit.source = func(s *Source) { s.RATLS, s.Issued = g.spki, testTime.Add(-2*time.Hour) }
		}, nil},
		{"an RA-TLS certificate with a quote for another key", "report_data_mismatch", func(g *guest, r *request) {
			certified(g, r)
			g.edit.envelope = func() dstack.ReportData { return binding.ReportData(binding.TagRATLS, other) }
		}, nil},
		{"an RA-TLS certificate of another connection", "spki_mismatch", func(g *guest, r *request) {
			certified(g, r)
			r.fresh.ConnectionSPKI = other
		}, nil},
		{"the zero policy", "policy_zero", func(g *guest, r *request) { r.pol = Policy{DevRoots: true} }, nil},
		{"the zero policy without roots", "policy_zero", func(g *guest, r *request) { r.pol = Policy{} }, []string{"unknown_root"}},
		{"a TCB that is out of date", "tcb_status", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			c := g.platform.Collateral()
			r.col = &collateral.Bundle{TDX: c}
		}, nil},
		{"an advisory that is denied", "advisory_denied", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			c := g.platform.Collateral()
			r.col = &collateral.Bundle{TDX: c}
			r.pol.TCB.Accept = append(r.pol.TCB.Accept, "OutOfDate")
			r.pol.Advisories.Deny = []string{"INTEL-SA-00001"}
		}, nil},
		{"collateral below the floor", "tcb_evaluation_low", func(g *guest, r *request) { r.pol.TCB.MinEvaluation = 19 }, nil},
		{"a processor family that is denied", "platform_denied", func(g *guest, r *request) { r.pol.TDX.DenyFMSPC = []string{"90c06f000000"} }, nil},
		{"a machine that is not listed", "device_not_allowed", func(g *guest, r *request) { r.pol.Devices = []dstack.DeviceID{{1}} }, nil},

		// Roots and collateral.
		{"no roots", "no_roots", func(g *guest, r *request) { r.roots = nil }, nil},
		{"vendor roots only", "unknown_root", func(g *guest, r *request) { r.roots = []attest.Roots{tdx.VendorRoots()} }, nil},
		{"development roots that the policy does not allow", "unknown_root", func(g *guest, r *request) { r.pol.DevRoots = false }, nil},
		{"roots and collateral of another installation", "unknown_root", func(g *guest, r *request) {
			q := tdxtest.New(t)
			c := q.Collateral()
			r.roots, r.col = []attest.Roots{q.Roots()}, &collateral.Bundle{TDX: c}
		}, nil},
		{"expired collateral", "crl_expired", func(g *guest, r *request) { r.at = tdxtest.NextUpdate.Add(time.Hour) }, nil},
		{"collateral without a revocation list", "crl_missing", func(g *guest, r *request) { r.col.PCKCRL = nil }, nil},
		{"a revoked platform", "pck_revoked", func(g *guest, r *request) {
			g.platform.PCKCRL.Revoked = append(g.platform.PCKCRL.Revoked, new(big.Int).Set(g.platform.PCK.Cert.SerialNumber))
			c := g.platform.Collateral()
			r.col = &collateral.Bundle{TDX: c}
		}, nil},
		{"B03: a revoked platform that brings collateral from before", "pck_revoked", func(g *guest, r *request) {
			before := g.platform.Collateral()
			g.edit.source = func(s *Source) { s.Collateral = &collateral.Bundle{TDX: before} }
			g.platform.PCKCRL.Revoked = append(g.platform.PCKCRL.Revoked, new(big.Int).Set(g.platform.PCK.Cert.SerialNumber))
			c := g.platform.Collateral()
			r.col = &collateral.Bundle{TDX: c}
		}, nil},

		// The quote.
		{"a TD in debug mode", "td_debug", func(g *guest, r *request) { g.edit.body = func(b *tdx.ReportBody) { b.TDAttributes[0] |= 1 } }, nil},
		{"a TD that may be migrated", "td_migratable", func(g *guest, r *request) { g.edit.body = func(b *tdx.ReportBody) { b.TDAttributes[3] |= 0x20 } }, nil},
		{"a quote with a flipped bit", "quote_signature", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) { e.Quote[48+tdx.OffRTMR0] ^= 1 }
		}, nil},
		{"a truncated quote", "quote_malformed", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) { e.Quote = e.Quote[:700] }
		}, nil},
		{"an altered container", "container_malformed", func(g *guest, r *request) {
			g.edit.source = func(s *Source) { s.Container = s.Container[:len(s.Container)-1] }
		}, nil},
		{"no container", "evidence_malformed", func(g *guest, r *request) { g.edit.source = func(s *Source) { s.Container = nil } }, nil},

		// Freshness and channel.
		{"an answer to another nonce", "nonce_mismatch", func(g *guest, r *request) { r.fresh.Nonce = other }, nil},
		{"an answer to another nonce, with the echo corrected", "report_data_mismatch", func(g *guest, r *request) {
			r.fresh.Nonce = other
			g.edit.source = func(s *Source) { s.Nonce = other }
		}, nil},
		{"an answer without a nonce", "nonce_mismatch", func(g *guest, r *request) { g.edit.source = func(s *Source) { s.Nonce = nil } }, nil},
		{"a nonce of 8 bytes", "nonce_length", func(g *guest, r *request) {
			g.nonce = g.nonce[:8]
			r.fresh.Nonce = g.nonce
		}, nil},
		{"evidence that is not fresh, where the policy wants it", "freshness_none", func(g *guest, r *request) {
			r.fresh.Nonce = nil
			r.pol.Evidence.RequireFresh = true
		}, nil},
		{"another connection than the instance serves", "spki_mismatch", func(g *guest, r *request) { r.fresh.ConnectionSPKI = []byte("a proxy's key") }, nil},
		{"another connection, added to the served keys", "spki_mismatch", func(g *guest, r *request) {
			r.fresh.ConnectionSPKI = []byte("a proxy's key")
			g.edit.source = func(s *Source) { s.ServedSPKIs = append(s.ServedSPKIs, []byte("a proxy's key")) }
		}, nil},
		{"evidence for plain HTTP over TLS", "spki_mismatch", func(g *guest, r *request) {
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, nil, g.app, g.instance) }
		}, nil},
		{"evidence of another app's identity", "report_data_mismatch", func(g *guest, r *request) {
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, g.spki, dstack.AppID{1}, g.instance) }
		}, nil},
		{"evidence of another instance's identity", "report_data_mismatch", func(g *guest, r *request) {
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, g.spki, g.app, nil) }
		}, nil},
		{"a container that claims other report data", "report_data_mismatch", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) { e.ReportData[0] ^= 1 }
		}, nil},
		{"report data other than demanded", "report_data_mismatch", func(g *guest, r *request) { r.fresh.ReportData = make([]byte, 64) }, nil},
		{"a channel key that init did not commit", "channel_key_uncommitted", func(g *guest, r *request) { g.edit.runtime = without(eventlog.SystemChannelKey) }, nil},
		{"a channel key other than init committed", "channel_key_mismatch", func(g *guest, r *request) {
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
				l[find(l, eventlog.SystemChannelKey)] = event(t, eventlog.SystemChannelKey, other)
				return l
			}
		}, nil},
		{"saved evidence of a key other than init committed", "channel_key_mismatch", func(g *guest, r *request) {
			r.fresh = Freshness{}
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
				l[find(l, eventlog.SystemChannelKey)] = event(t, eventlog.SystemChannelKey, other)
				return l
			}
		}, nil},

		// The event log.
		{"a runtime event that was not measured", "log_replay_mismatch", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) { e.EventLog = append(e.EventLog, event(t, "more", nil)) }
		}, []string{}},
		{"a runtime event taken out", "log_replay_mismatch", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) { e.EventLog = slices.Delete(e.EventLog, len(e.EventLog)-3, len(e.EventLog)-2) }
		}, nil},
		{"a payload changed, with the old digest", "log_digest_mismatch", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) {
				i := find(e.EventLog, eventlog.ComposeHashEvent)
				e.EventLog[i].Payload = other
			}
		}, nil},
		{"a boot event changed", "log_replay_mismatch", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) {
				i := slices.IndexFunc(e.EventLog, func(e eventlog.Event) bool { return e.IMR == 1 })
				e.EventLog[i].Digest = bytes.Repeat([]byte{1}, 48)
			}
		}, nil},
		{"a boot event without its digest", "log_malformed", func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) {
				i := slices.IndexFunc(e.EventLog, func(e eventlog.Event) bool { return e.IMR == 2 })
				e.EventLog[i].Digest = nil
			}
		}, nil},
		{"a second compose hash after system-ready", "log_reserved_after_ready", func(g *guest, r *request) { g.edit.runtime = insert(10, event(t, eventlog.ComposeHashEvent, other)) }, nil},
		{"a second compose hash before system-ready", "log_duplicate_event", func(g *guest, r *request) { g.edit.runtime = insert(3, event(t, eventlog.ComposeHashEvent, other)) }, nil},
		{"no system-ready", "log_boundary_missing", func(g *guest, r *request) { g.edit.runtime = without(eventlog.SystemReady) }, nil},
		{"no boot-mr-done", "log_boundary_missing", func(g *guest, r *request) { g.edit.runtime = without(eventlog.BootMRDone) }, nil},
		{"system-ready twice", "log_boundary_duplicate", func(g *guest, r *request) { g.edit.runtime = insert(10, event(t, eventlog.SystemReady, nil)) }, nil},
		{"events in another order", "log_order", func(g *guest, r *request) {
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event { l[1], l[2] = l[2], l[1]; return l }
		}, nil},
		{"a compose hash of 31 bytes", "log_payload_length", func(g *guest, r *request) {
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
				l[2] = event(t, eventlog.ComposeHashEvent, other[:31])
				return l
			}
		}, nil},

		// The workload.
		{"no workload expected", "workload_not_specified", func(g *guest, r *request) {
			r.ref = Reference{}
			r.ref.AddImage(g.image, g.expected(), "--image")
		}, nil},
		{"another compose hash expected", "compose_hash_mismatch", func(g *guest, r *request) { r.ref.AddComposeHash(dstack.ComposeHash{1}, "--compose-hash") }, nil},
		{"another compose hash expected by field", "compose_hash_mismatch", func(g *guest, r *request) { r.ref.ComposeHashes = []dstack.ComposeHash{{1}, {2}} }, nil},
		{"another manifest expected", "compose_hash_mismatch", func(g *guest, r *request) { r.ref.AddManifest([]byte("{}"), "--compose") }, nil},
		{"another app expected", "app_id_mismatch", func(g *guest, r *request) { r.ref.AddAppID(dstack.AppID{1}, "--app-id") }, nil},
		{"another lock", "compose_hash_mismatch", func(g *guest, r *request) {
			r.ref.AddLock(&lock.Lock{ComposeHash: dstack.ComposeHash{1}, AppID: g.app, OSImageHash: g.image, Measurements: g.expected()}, "lock file")
		}, nil},
		{"another manifest shown than measured", "manifest_hash_mismatch", func(g *guest, r *request) { g.edit.source = func(s *Source) { s.Manifest += " " } }, nil},
		{"a manifest that readers take in two ways", "manifest_duplicate_key", func(g *guest, r *request) {
			g.manifest = []byte(`{"manifest_version":2,"name":"a","name":"b","runner":"bash"}`)
			g.document.ComposeHash = g.composeHash()
			r.ref = Reference{}
			r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
			r.ref.AddImage(g.image, g.expected(), "--image")
		}, nil},
		{"a container with the engine's socket", "mutable", func(g *guest, r *request) {
			d := draft()
			d.DockerComposeFile = mutableService
			remanifest(g, r, d)
		}, nil},
		{"images that are not pinned", "images_unpinned", func(g *guest, r *request) {
			d := draft()
			d.ImagePolicy = ""
			remanifest(g, r, d)
		}, nil},
		{"another GPU policy measured than written", "gpu_policy_mismatch", func(g *guest, r *request) {
			g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
				l[find(l, eventlog.GPUPolicyHash)] = event(t, eventlog.GPUPolicyHash, other)
				return l
			}
		}, nil},
		{"an init script measured that is not written", "init_script_mismatch", func(g *guest, r *request) {
			g.edit.runtime = insert(3, event(t, eventlog.InitScriptHash, other))
		}, nil},
		{"no instance id where the manifest wants one", "instance_id_mismatch", func(g *guest, r *request) { g.instance = nil }, nil},
		{"keys from elsewhere than written", "key_provider_mismatch", func(g *guest, r *request) { g.provider = `{"name":"kms","id":"00"}` }, []string{"mr_config_mismatch"}},
		{"a key provider that does not parse", "key_provider_mismatch", func(g *guest, r *request) { g.provider = `{"name":"none"}` }, []string{"mr_config_mismatch"}},
		{"another KMS than pinned", "key_provider_mismatch", func(g *guest, r *request) {
			d := draft()
			d.KeyProvider, d.KeyProviderID = "kms", []byte{1, 2}
			g.document.KeyProvider = "kms"
			g.provider = `{"name":"kms","id":"0103"}`
			remanifest(g, r, d)
		}, nil},

		// The launch commitment.
		{"no launch commitment", "mr_config_missing", func(g *guest, r *request) { g.document = nil }, nil},
		{"a commitment of an unknown form", "mr_config_form", func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID = dstack.MRConfigID{4} }
		}, nil},
		{"a commitment to another document", "mr_config_mismatch", func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID[1] ^= 1 }
		}, nil},
		{"a commitment to another manifest", "mr_config_mismatch", func(g *guest, r *request) { g.document.ComposeHash = dstack.ComposeHash{1} }, nil},
		{"a commitment to another manifest, not carried", "mr_config_mismatch", func(g *guest, r *request) {
			g.document.ComposeHash = dstack.ComposeHash{1}
			g.carry = false
		}, nil},
		{"a commitment to another app", "mr_config_mismatch", func(g *guest, r *request) { g.document.AppID = &dstack.AppID{1} }, nil},
		{"a commitment to another instance", "mr_config_mismatch", func(g *guest, r *request) { g.document.InstanceID = &dstack.InstanceID{1} }, nil},
		{"a commitment to another key provider", "mr_config_mismatch", func(g *guest, r *request) { g.document.KeyProvider = "local" }, nil},
		{"a commitment to another key provider's identity", "mr_config_mismatch", func(g *guest, r *request) { g.document.KeyProviderID = []byte{1} }, nil},
		{"a commitment to another GPU policy", "mr_config_mismatch", func(g *guest, r *request) { g.document.GPUPolicyHash = other }, nil},
		{"a commitment to init scripts", "mr_config_mismatch", func(g *guest, r *request) { g.document.InitScriptHashes = [][]byte{other} }, nil},
		{"a commitment of form 1 to another manifest", "mr_config_mismatch", func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID = mrconfig.IDv1(dstack.ComposeHash{1}) }
		}, nil},
		{"a commitment of form 2 to another app", "mr_config_mismatch", func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) {
				b.MRConfigID, _ = mrconfig.IDv2(g.composeHash(), dstack.AppID{1}, "none", nil)
			}
		}, nil},
		{"a commitment document that does not parse", "mr_config_malformed", func(g *guest, r *request) {
			g.edit.vm = func(c *measure.VMConfig) { c.MRConfig = `{"x":1}` }
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID = mrconfig.IDv3([]byte(`{"x":1}`)) }
		}, nil},
		{"a configuration that does not parse", "vm_config_malformed", func(g *guest, r *request) { g.edit.configure = func(string) string { return `{"a":1,"a":2}` } }, nil},

		// The image.
		{"another firmware", "mrtd_mismatch", func(g *guest, r *request) {
			g.launch.Firmware = bytes.Clone(g.launch.Firmware)
			g.launch.Firmware[0x5000] ^= 1
		}, nil},
		{"another configuration volume", "rtmr0_mismatch", func(g *guest, r *request) {
			g.launch.Firmware = bytes.Clone(g.launch.Firmware)
			g.launch.Firmware[0x10] ^= 1
		}, nil},
		{"another kernel", "rtmr1_mismatch", func(g *guest, r *request) { g.launch.Kernel = flip(g.launch.Kernel) }, nil},
		{"another initramfs", "rtmr2_mismatch", func(g *guest, r *request) { g.launch.Initrd = flip(g.launch.Initrd) }, nil},
		{"another command line", "rtmr2_mismatch", func(g *guest, r *request) { g.launch.Cmdline += " init=/bin/sh" }, nil},
		{"more memory than expected", "rtmr0_mismatch", func(g *guest, r *request) { g.launch.MemoryBytes *= 2 }, []string{"rtmr1_mismatch"}},
		{"ACPI events taken out of the log", "rtmr0_mismatch", func(g *guest, r *request) {
			g.edit.vm = unknownShape
			g.edit.evidence = func(e *attest.Evidence) {
				e.EventLog = slices.DeleteFunc(e.EventLog, func(e eventlog.Event) bool { return e.IMR == 0 })
			}
		}, nil},
		{"another image's name", "image_hash_mismatch", func(g *guest, r *request) { g.image = dstack.ImageHash{9} }, nil},
		{"another image expected by name", "image_hash_mismatch", func(g *guest, r *request) { r.ref.AddImageHash(dstack.ImageHash{9}, "--os-image-hash") }, nil},
		{"an image's name of 31 bytes", "image_hash_malformed", func(g *guest, r *request) {
			g.edit.vm = func(c *measure.VMConfig) { c.OSImageHash = c.OSImageHash[2:] }
		}, nil},
		{"two names for the image", "image_hash_inconsistent", func(g *guest, r *request) {
			g.edit.runtime = insert(6, event(t, eventlog.OSImageHash, other))
		}, []string{"image_hash_mismatch"}},
		{"an image that only the guest names", "image_unanchored", func(g *guest, r *request) {
			r.ref = Reference{}
			r.ref.AddComposeHash(g.composeHash(), "--compose-hash")
		}, nil},
		{"an image expected by name only", "image_unanchored", func(g *guest, r *request) {
			r.ref = Reference{ComposeHashes: []dstack.ComposeHash{g.composeHash()}, ImageHashes: []dstack.ImageHash{g.image}}
		}, nil},
		{"a development image under production roots", "dev_image", func(g *guest, r *request) {
			roots := g.platform.Roots()
			roots.Trust = dstack.TrustProduction
			dev := true
			r.roots, r.ref.DevImage, r.pol.Image.AllowLite = []attest.Roots{roots}, &dev, true
		}, nil},
		{"ACPI tables of the host's own making", "acpi_mismatch", func(g *guest, r *request) { g.tables = &dstack.Measurement{1} }, nil},
		{"ACPI tables that nobody compared, under production roots", "acpi_not_checked", func(g *guest, r *request) {
			g.edit.vm = unknownShape
			roots := g.platform.Roots()
			roots.Trust = dstack.TrustProduction
			r.roots = []attest.Roots{roots}
		}, nil},
		{"a development image under production roots, by the lock's name", "dev_image", func(g *guest, r *request) {
			roots := g.platform.Roots()
			roots.Trust = dstack.TrustProduction
			r.roots, r.pol.Image.AllowLite = []attest.Roots{roots}, true
			r.ref.AddLock(&lock.Lock{ComposeHash: g.composeHash(), AppID: g.app, OSImageHash: g.image, Measurements: g.expected(), Image: "dstack-sim-0.1"}, "lock file")
		}, nil},
	}
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}

// Each mutation is refused for its own reason and for no other that does not
// follow from it. Run with a check taken out, its row fails.
func TestMutationsAreRefused(t *testing.T) {
	for _, m := range mutations(t) {
		t.Run(m.name, func(t *testing.T) {
			g := newGuest(t)
			r := g.request()
			m.run(g, r)
			v := r.appraise(g.evidence())
			if v.Accepted || v.Undecided {
				t.Fatalf("accepted=%v undecided=%v%s", v.Accepted, v.Undecided, show(v))
			}
			got := v.errors()
			if !slices.Contains(got, m.code) {
				t.Fatalf("errors %v, want %s%s", got, m.code, show(v))
			}
			for _, c := range got {
				if c != m.code && !slices.Contains(m.also, c) {
					t.Errorf("unexpected error %s%s", c, show(v))
				}
			}
		})
	}
}

// What the caller's policy allows by name is a warning, and accepted.
func TestPolicyMayAllow(t *testing.T) {
	for _, tc := range []struct {
		code string
		run  func(*guest, *request)
	}{
		{"td_debug", func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.TDAttributes[0] |= 1 }
			r.pol.AllowDebug = true
		}},
		{"mr_config_missing", func(g *guest, r *request) { g.document = nil; r.pol.Workload.AllowUncommitted = true }},
		{"images_unpinned", func(g *guest, r *request) {
			d := draft()
			d.ImagePolicy = ""
			remanifest(g, r, d)
			r.pol.Workload.AllowUnpinnedImages = true
		}},
		{"mutable", func(g *guest, r *request) {
			d := draft()
			d.DockerComposeFile = mutableService
			remanifest(g, r, d)
			r.pol.Workload.AllowMutable = true
		}},
		{"image_unanchored", func(g *guest, r *request) {
			r.ref = Reference{ComposeHashes: []dstack.ComposeHash{g.composeHash()}}
			r.pol.Image.AllowUnanchored = true
		}},
		{"dev_image", func(g *guest, r *request) {
			roots := g.platform.Roots()
			roots.Trust = dstack.TrustProduction
			dev := true
			r.roots, r.ref.DevImage = []attest.Roots{roots}, &dev
			r.pol.Image.AllowDev, r.pol.Image.AllowLite = true, true
		}},
		{"acpi_not_checked", func(g *guest, r *request) {
			g.edit.vm = unknownShape
			roots := g.platform.Roots()
			roots.Trust = dstack.TrustProduction
			r.roots = []attest.Roots{roots}
			r.pol.Image.AllowLite = true
		}},
		{"tcb_grace", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
			r.pol.TCB.GraceDays = 3650
		}},
		{"tcb_accepted", func(g *guest, r *request) {
			g.platform.TCBInfo = tdxtest.Edit(g.platform.TCBInfo, "tdxModuleIdentities", []any{g.platform.Module("TDX_01", tdxtest.Level(4, tdx.OutOfDate, "INTEL-SA-00001"))})
			r.col = &collateral.Bundle{TDX: g.platform.Collateral()}
			r.pol.TCB.Accept = []string{"UpToDate", "OutOfDate"}
		}},
		{"channel_unbound", func(g *guest, r *request) {
			g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, nil, g.app, g.instance) }
			r.fresh.ConnectionSPKI = nil
		}},
		{"freshness_none", func(g *guest, r *request) { r.fresh = Freshness{} }},
		{"manifest_missing", func(g *guest, r *request) { g.edit.source = func(s *Source) { s.Manifest = "" } }},
		{"runs_scripts", func(g *guest, r *request) {
			d := draft()
			d.PreLaunchScript = "true"
			remanifest(g, r, d)
		}},
		{"public_logs", func(g *guest, r *request) {
			d := draft()
			d.PublicLogs = true
			remanifest(g, r, d)
		}},
		{"key_provider_unpinned", func(g *guest, r *request) {
			d := draft()
			d.KeyProvider = "kms"
			g.provider, g.document.KeyProvider = `{"name":"kms","id":"00"}`, "kms"
			remanifest(g, r, d)
		}},
		{"kms_unappraised", func(g *guest, r *request) {
			d := draft()
			d.KeyProvider = "kms"
			g.provider, g.document.KeyProvider = `{"name":"kms","id":"00"}`, "kms"
			remanifest(g, r, d)
		}},
		{"kms_dev_roots", func(g *guest, r *request) {
			d := draft()
			d.KeyProvider, d.KMSPolicy = "kms", kmsPolicy()
			d.KMSPolicy.DevRoots = "{}"
			g.provider, g.document.KeyProvider = `{"name":"kms","id":"00"}`, "kms"
			remanifest(g, r, d)
		}},
	} {
		t.Run(tc.code, func(t *testing.T) {
			g := newGuest(t)
			r := g.request()
			tc.run(g, r)
			v := r.appraise(g.evidence())
			if !v.Accepted || !v.Has(Warning, tc.code) {
				t.Error(show(v))
			}
		})
	}
}

func kmsPolicy() *manifest.PeerPolicy {
	return &manifest.PeerPolicy{AppID: dstack.AppID{1}, ComposeHashes: []dstack.ComposeHash{{2}}, OSImageHashes: []dstack.ImageHash{{3}}}
}

// The verdict says what the guest demands of its KMS, and what a lost lease does.
func TestKMSPolicyIsShown(t *testing.T) {
	for _, tc := range []struct {
		loss, words string
	}{{"", "keep running"}, {"stop", "the app stops"}} {
		g := newGuest(t)
		r := g.request()
		d := draft()
		d.KeyProvider, d.KMSPolicy, d.OnLeaseLoss = "kms", kmsPolicy(), tc.loss
		g.provider, g.document.KeyProvider = `{"name":"kms","id":"00"}`, "kms"
		remanifest(g, r, d)
		v := r.appraise(g.evidence())
		i := slices.IndexFunc(v.Findings, func(f Finding) bool { return f.Code == "on_lease_loss" })
		if !v.Accepted || !v.Has(Info, "kms_appraised") || v.Has(Warning, "kms_unappraised") || i < 0 || !strings.Contains(v.Findings[i].Message, tc.words) {
			t.Error(show(v))
		}
	}
}

// A guest that proves its clock no longer has the host for it; who has taken the
// host's place is said.
func TestThreat_F01_TheVerdictSaysWhoseTimeItIs(t *testing.T) {
	own := []manifest.TimeServer{{Host: "a.example:4460"}, {Host: "b.example:4460"}, {Host: "c.example:4460"}}
	for _, tc := range []struct {
		name        string
		secure      bool
		servers     []manifest.TimeServer
		level       Level
		code, words string
	}{
		{"host", false, nil, Warning, "time_host", "the host for the guest's clock"},
		// Servers that the manifest names and does not wait for change nothing.
		{"host, with servers", false, own, Warning, "time_host", "the host for the guest's clock"},
		{"the image's servers", true, nil, Info, "time_nts", "the OS image's time servers"},
		{"the manifest's servers", true, own, Info, "time_nts", `"b.example:4460" (public authority)`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newGuest(t)
			r := g.request()
			d := draft()
			d.SecureTime, d.TimeServers = &tc.secure, tc.servers
			remanifest(g, r, d)
			v := r.appraise(g.evidence())
			var codes []string
			for _, f := range v.Findings {
				if strings.HasPrefix(f.Code, "time_") {
					codes = append(codes, string(f.Level)+" "+f.Code)
				}
			}
			if want := []string{string(tc.level) + " " + tc.code}; !v.Accepted || !slices.Equal(codes, want) {
				t.Errorf("got %q, want %q\n%s", codes, want, show(v))
			}
			var about []string
			for _, s := range v.Assumptions {
				if strings.Contains(s, "clock") {
					about = append(about, s)
				}
			}
			if len(about) != 1 || !strings.Contains(about[0], tc.words) {
				t.Errorf("assumptions about the clock: %q, want one with %q", about, tc.words)
			}
		})
	}
}

// What is merely spelled otherwise is accepted.
func TestAccepted(t *testing.T) {
	for name, run := range map[string]func(*guest, *request){
		"report data as demanded": func(g *guest, r *request) {
			want := dstack.ReportData{1, 2, 3}
			g.edit.envelope = func() dstack.ReportData { return want }
			r.fresh = Freshness{ReportData: want[:]}
		},
		"a document that is not carried": func(g *guest, r *request) { g.carry = false },
		"a document with every field": func(g *guest, r *request) {
			gpu := sha256.Sum256([]byte("{}"))
			g.document.InstanceID = (*dstack.InstanceID)(g.instance)
			g.document.GPUPolicyHash, g.document.InitScriptHashes = gpu[:], [][]byte{}
		},
		"a document with every field, not carried": func(g *guest, r *request) {
			gpu := sha256.Sum256([]byte("{}"))
			g.document.InstanceID = (*dstack.InstanceID)(g.instance)
			g.document.GPUPolicyHash, g.document.InitScriptHashes = gpu[:], [][]byte{}
			g.carry = false
		},
		"a commitment of form 1": func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID = mrconfig.IDv1(g.composeHash()) }
		},
		"a commitment of form 2": func(g *guest, r *request) {
			g.edit.body = func(b *tdx.ReportBody) { b.MRConfigID, _ = mrconfig.IDv2(g.composeHash(), g.app, "none", nil) }
		},
		"a configuration inside a sys-config": func(g *guest, r *request) {
			g.edit.configure = func(s string) string {
				b, _ := json.Marshal(map[string]string{"vm_config": s, "mr_config": string(g.document.Bytes())})
				return string(b)
			}
		},
		"a stripped log": func(g *guest, r *request) {
			g.edit.evidence = func(e *attest.Evidence) {
				e.EventLog = slices.DeleteFunc(e.EventLog, func(e eventlog.Event) bool { return !e.IsRuntime() && !e.IsACPI() })
				for i := range e.EventLog {
					if e.EventLog[i].IsRuntime() {
						e.EventLog[i].Digest = nil
					}
				}
			}
		},
		"events of the application after system-ready": func(g *guest, r *request) { g.edit.runtime = insert(10, event(t, "my-event", []byte("x"))) },
		"collateral that the evidence carries": func(g *guest, r *request) {
			c := r.col
			r.col = nil
			g.edit.source = func(s *Source) { s.Collateral = c }
		},
		"an app without instance ids": func(g *guest, r *request) {
			d := draft()
			d.NoInstanceID = true
			g.instance = nil
			remanifest(g, r, d)
		},
		"a lock": func(g *guest, r *request) {
			r.ref = Reference{}
			r.ref.AddLock(&lock.Lock{ComposeHash: g.composeHash(), AppID: g.app, OSImageHash: g.image, Measurements: g.expected(), Image: "dstack-sim-0.1"}, "lock file")
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			r := g.request()
			run(g, r)
			if v := r.appraise(g.evidence()); !v.Accepted {
				t.Error(show(v))
			}
		})
	}
}

func TestUndecided(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.col = nil
	v := r.appraise(g.evidence())
	if !v.Undecided || v.Accepted || v.Reason == "" || !cmp.Equal(v.errors(), []string{"collateral_missing"}) {
		t.Error(show(v))
	}
	// Wrong beats missing.
	r.fresh.Nonce = other
	if v := r.appraise(g.evidence()); v.Undecided || v.Accepted {
		t.Error(show(v))
	}
}

// lite makes the guest carry a measurement document of its image, and a checksum
// file that names it, after edit has had its way with that.
func lite(g *guest, edit func(checksums []byte) []byte) {
	g.launch.MemoryBytes = 2 << 30
	doc, err := measure.TDXDocument(g.launch)
	g.check(err)
	sums := fmt.Appendf(nil, "%x  bzImage\n%x  %s\n", sha256.Sum256([]byte("kernel")), sha256.Sum256(doc), measure.TDXDocumentName)
	if edit != nil {
		sums = edit(sums)
	}
	g.image = sha256.Sum256(sums)
	g.edit.vm = func(c *measure.VMConfig) {
		c.TDXVariant, c.TDXMeasurement = "lite", &measure.Split{ChecksumFile: sums, Measurement: doc}
	}
}

// The attack of upstream's PR 1266: a line is appended to the checksum file and
// the image hash is made to fit. Everything agrees with itself, and nobody but the
// evidence says so.
func TestThreat_B10_MintedImageHashIsSelfConsistentOnly(t *testing.T) {
	g := newGuest(t)
	lite(g, nil)
	genuine := g.image
	r := g.request()
	r.ref = Reference{ComposeHashes: []dstack.ComposeHash{g.composeHash()}, ImageHashes: []dstack.ImageHash{genuine}}
	v := r.appraise(g.evidence())
	if !v.Accepted || !slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "os_image_hash" && a.Value == genuine.String() }) {
		t.Fatal("the genuine image, expected by its hash:", show(v))
	}

	platform := g.platform
	g = newGuest(t)
	g.platform = platform
	lite(g, func(sums []byte) []byte { return append(sums, strings.Repeat("0", 64)+"  extra\n"...) })
	if v := r.appraise(g.evidence()); v.Accepted || !v.Has(Error, "image_hash_mismatch") {
		t.Error("a minted hash under the genuine one:", show(v))
	}
	r.ref = Reference{ComposeHashes: []dstack.ComposeHash{g.composeHash()}}
	v = r.appraise(g.evidence())
	if v.Accepted || !v.Has(Error, "image_unanchored") {
		t.Error("a minted hash without an expected one:", show(v))
	}
	for _, a := range v.Anchors {
		if a.What == "os_image_hash" || a.What == "launch registers" {
			t.Errorf("%+v is anchored", a)
		}
	}
	for _, want := range []string{"os_image_hash", "launch registers"} {
		if !slices.ContainsFunc(v.SelfConsistent, func(a Anchor) bool { return a.What == want }) {
			t.Errorf("%s is not among the self-consistent: %+v", want, v.SelfConsistent)
		}
	}
	if strings.Contains(strings.ToLower(v.String()), "verified") {
		t.Error("the word verified for something that is not")
	}
}

func TestThreat_B10_OwnMeasurementDocumentMustMatchTheQuote(t *testing.T) {
	for name, tc := range map[string]struct {
		code string
		run  func(*guest)
	}{
		"another kernel runs": {"rtmr1_mismatch", func(g *guest) { g.launch.Kernel = flip(g.launch.Kernel) }},
		"the document is not the one listed": {"measurement_mismatch", func(g *guest) {
			inner := g.edit.vm
			g.edit.vm = func(c *measure.VMConfig) { inner(c); c.TDXMeasurement.Measurement = flip(c.TDXMeasurement.Measurement) }
		}},
		"a document that is none, listed rightly": {"measurement_malformed", func(g *guest) {
			sums := fmt.Appendf(nil, "%x  %s\n", sha256.Sum256([]byte("x")), measure.TDXDocumentName)
			g.image = sha256.Sum256(sums)
			g.edit.vm = func(c *measure.VMConfig) {
				c.TDXVariant, c.TDXMeasurement = "lite", &measure.Split{ChecksumFile: sums, Measurement: []byte("x")}
			}
		}},
		"the checksum file is not the image's": {"image_hash_mismatch", func(g *guest) {
			inner := g.edit.vm
			g.edit.vm = func(c *measure.VMConfig) {
				inner(c)
				c.TDXMeasurement.ChecksumFile = append(c.TDXMeasurement.ChecksumFile, '\n')
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			lite(g, nil)
			r := g.request()
			r.ref = Reference{ComposeHashes: []dstack.ComposeHash{g.composeHash()}, ImageHashes: []dstack.ImageHash{g.image}}
			tc.run(g)
			if v := r.appraise(g.evidence()); v.Accepted || !v.Has(Error, tc.code) {
				t.Error(show(v))
			}
		})
	}
}

func TestThreat_B08_CapturedEvidenceIsRefusedByAnotherVerifier(t *testing.T) {
	g := newGuest(t)
	captured := g.evidence()
	if v := g.request().appraise(captured); !v.Accepted {
		t.Fatal(show(v))
	}
	second := g.request()
	second.fresh.Nonce = other
	if v := second.appraise(captured); v.Accepted || !v.Has(Error, "nonce_mismatch") {
		t.Error(show(v))
	}
	captured.Nonce = other
	if v := second.appraise(captured); v.Accepted || !v.Has(Error, "report_data_mismatch") {
		t.Error(show(v))
	}
}

func TestThreat_B09_ForgedEventsAreRefused(t *testing.T) {
	for _, m := range mutations(t) {
		if strings.HasPrefix(m.code, "log_") {
			t.Run(m.name, func(t *testing.T) {
				g := newGuest(t)
				r := g.request()
				m.run(g, r)
				boot := strings.HasPrefix(m.name, "a boot event") // which identity does not rest on
				if v := r.appraise(g.evidence()); v.Accepted || !v.Has(Error, m.code) || v.Workload != nil && !boot {
					t.Error(show(v))
				}
			})
		}
	}
}

// What was not established must not be shown as if it were.
func TestRefusedEvidenceMakesNoClaims(t *testing.T) {
	for _, m := range mutations(t) {
		g := newGuest(t)
		r := g.request()
		m.run(g, r)
		v := r.appraise(g.evidence())
		switch m.name {
		case "a runtime event that was not measured", "a runtime event taken out", "a payload changed, with the old digest":
			if v.Workload != nil {
				t.Errorf("%s: a workload is shown from a log that does not replay%s", m.name, show(v))
			}
		}
		if strings.HasPrefix(m.code, "mr_config") && slices.ContainsFunc(v.SelfConsistent, func(a Anchor) bool { return a.What == "launch commitment" }) {
			t.Errorf("%s: the launch commitment is shown as kept%s", m.name, show(v))
		}
		if (strings.HasPrefix(m.code, "mrtd_") || strings.HasPrefix(m.code, "rtmr")) && slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "os_image_hash" || a.What == "launch registers" }) {
			t.Errorf("%s: the image is shown as anchored%s", m.name, show(v))
		}
		if m.code == "compose_hash_mismatch" && slices.ContainsFunc(v.Anchors, func(a Anchor) bool { return a.What == "compose_hash" }) {
			t.Errorf("%s: the compose hash is shown as anchored%s", m.name, show(v))
		}
	}
}

func TestThreat_B11_NoLaunchCommitmentIsDenied(t *testing.T) {
	g := newGuest(t)
	g.document = nil
	if v := g.request().appraise(g.evidence()); v.Accepted || !v.Has(Error, "mr_config_missing") {
		t.Error(show(v))
	}
}

func TestThreat_B12_AppIDAloneAcceptsNothing(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.ref = Reference{AppID: &g.app}
	r.ref.AddImage(g.image, g.expected(), "--image")
	v := r.appraise(g.evidence())
	if v.Accepted || !cmp.Equal(v.errors(), []string{"workload_not_specified"}) {
		t.Fatal(show(v))
	}
	flags := "--compose-hash " + g.composeHash().String() + " --app-id " + g.app.String()
	if !strings.Contains(v.Findings[slices.IndexFunc(v.Findings, func(f Finding) bool { return f.Code == "workload_not_specified" })].Fix, flags) {
		t.Errorf("no flags to paste: %s", show(v))
	}

	// The same app id with another manifest: what an operator could deploy.
	app := g.app
	r = g.request()
	remanifest(g, &request{}, draft())
	g.app = app
	if v := r.appraise(g.evidence()); v.Accepted || !cmp.Equal(v.errors(), []string{"compose_hash_mismatch"}) {
		t.Error(show(v))
	}
}

func TestThreat_B14_SimulatedEvidenceUnderProductionRoots(t *testing.T) {
	g := newGuest(t)
	r := g.request()
	r.roots, r.pol.DevRoots = []attest.Roots{tdx.VendorRoots()}, false
	v := r.appraise(g.evidence())
	if v.Accepted || !cmp.Equal(v.errors(), []string{"unknown_root"}) || v.Claims != nil || v.Trust != dstack.TrustProduction {
		t.Error(show(v))
	}
	// It needs no collateral to be refused.
	r.col = nil
	if v := r.appraise(g.evidence()); v.Undecided || !v.Has(Error, "unknown_root") {
		t.Error(show(v))
	}
}

func TestThreat_B17_HashesHaveOneLength(t *testing.T) {
	for _, n := range []int{0, 31, 33, 64} {
		g := newGuest(t)
		payload := bytes.Repeat([]byte{1}, n)
		g.edit.runtime = func(l []eventlog.Event) []eventlog.Event {
			l[2] = event(t, eventlog.ComposeHashEvent, payload)
			return l
		}
		if v := g.request().appraise(g.evidence()); v.Accepted || !v.Has(Error, "log_payload_length") {
			t.Errorf("a compose hash of %d bytes: %s", n, show(v))
		}
		if n == 0 {
			continue
		}
		g = newGuest(t)
		g.edit.vm = func(c *measure.VMConfig) { c.OSImageHash = hex.EncodeToString(payload) }
		if v := g.request().appraise(g.evidence()); v.Accepted || !v.Has(Error, "image_hash_malformed") {
			t.Errorf("an image hash of %d bytes: %s", n, show(v))
		}
	}
}

// An app may have a quote over 64 bytes of its choice, so an envelope alone does
// not speak for the system; the key that init committed does.
func TestThreat_B20_EnvelopeMadeByAnAppIsRefused(t *testing.T) {
	g := newGuest(t)
	rogue := []byte("a key that the app made")
	g.edit.envelope = func() dstack.ReportData { return binding.Envelope(g.nonce, rogue, g.app, g.instance) }
	g.edit.source = func(s *Source) { s.ServedSPKIs = [][]byte{rogue} }
	r := g.request()
	r.fresh.ConnectionSPKI = rogue
	if v := r.appraise(g.evidence()); v.Accepted || !cmp.Equal(v.errors(), []string{"channel_key_mismatch"}) || v.Channel != ChannelNone {
		t.Error(show(v))
	}
}

func TestThreat_B15_EvidenceIsBounded(t *testing.T) {
	g := newGuest(t)
	src := g.evidence()
	good, err := json.Marshal(src)
	g.check(err)
	got, err := ParseSource(good)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&src, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	replace := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("%s is not there", old)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	for name, tc := range map[string]struct {
		data []byte
		code string
	}{
		"not JSON":         {[]byte("x"), "evidence_malformed"},
		"an unknown key":   {replace(`"version"`, `"extra":1,"version"`), "evidence_malformed"},
		"a duplicate key":  {replace(`"version"`, `"version":1,"version"`), "evidence_malformed"},
		"a key's case":     {replace(`"manifest"`, `"Manifest":"","manifest"`), "evidence_malformed"},
		"trailing data":    {append(bytes.Clone(good), '{'), "evidence_malformed"},
		"bytes not in hex": {replace(`"container":"`, `"container":"zz`), "evidence_malformed"},
		"another version":  {replace(`"version":1`, `"version":2`), "evidence_version"},
		"no container":     {[]byte(`{"version":1,"container":"","manifest":"","nonce":"","served_spkis":[]}`), "evidence_malformed"},
		"a long nonce":     {replace(`"nonce":"`, `"nonce":"`+strings.Repeat("00", 64)), "evidence_too_large"},
		"many keys":        {replace(`"served_spkis":[`, `"served_spkis":[`+strings.Repeat(`"00",`, 16)), "evidence_too_large"},
		"a long key":       {replace(`"served_spkis":["`, `"served_spkis":["`+strings.Repeat("00", 4096)), "evidence_too_large"},
		"too deep":         {[]byte(`{"collateral":` + strings.Repeat("[", 100)), "evidence_malformed"},
		"more than 16 MiB": {make([]byte, MaxSource+1), "evidence_too_large"},
	} {
		if _, err := ParseSource(tc.data); fault.Code(err) != tc.code {
			t.Errorf("%s: code %q, want %q: %v", name, fault.Code(err), tc.code, err)
		}
	}
	// Callers that build a Source themselves meet the same limits.
	src.Container = make([]byte, container.MaxSize+1)
	if v := g.request().appraise(src); v.Accepted || !v.Has(Error, "evidence_too_large") {
		t.Error(show(v))
	}
}

// Evidence of real hardware, made by upstream: neither nonce nor launch
// commitment nor channel key.
func TestUpstreamEvidence(t *testing.T) {
	var req struct{ Attestation string }
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/tdx/tdx-lite-attestation.json"), &req); err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(req.Attestation)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)
	src := Source{Version: 1, Container: raw}
	pol := Policy{TCB: TCBPolicy{Accept: []string{"UpToDate"}}}
	v := Appraise(Request{Source: src, Roots: VendorRoots(), Policy: pol, At: at})
	if v.Accepted || !v.Undecided || !cmp.Equal(v.errors(), []string{"collateral_missing"}) {
		t.Error(show(v))
	}
	if vm, err := src.VMConfig(); err != nil || vm.MemorySize != 2<<30 || !vm.Lite() {
		t.Errorf("%+v, %v", vm, err)
	}

	// What follows the quote's verification, with the claims that its signed body
	// would give: the collateral of that day is not among the vectors.
	ev, err := container.Decode(raw)
	if err != nil {
		t.Fatal(err)
	}
	q, err := tdx.ParseQuote(ev.Quote)
	if err != nil {
		t.Fatal(err)
	}
	body := q.Body()
	a := &appraisal{src: &src, ref: &Reference{}, pol: pol, ev: ev, v: &Verdict{Freshness: FreshNone, Channel: ChannelNone, At: at}, claims: &attest.Claims{
		TEE: dstack.TDX, Trust: dstack.TrustProduction, ReportData: body.ReportData[:], TCBStatus: "UpToDate",
		TDX: &attest.TDX{MRTD: body.MRTD, RTMR: body.RTMR, MRConfigID: body.MRConfigID},
	}}
	if a.eventLog(); a.id == nil {
		t.Fatal(show(a.v))
	}
	if a.cfg, err = parseConfig(ev.Config); err != nil {
		t.Fatal(err)
	}
	a.launchCommitment()
	a.manifest()
	a.binding()
	a.workload()
	a.image()
	a.policy()
	a.conclude()
	if a.v.Accepted || a.v.Freshness != FreshNone || !a.v.Has(Warning, "freshness_none") || !a.v.Has(Error, "workload_not_specified") {
		t.Error(show(a.v))
	}
	for _, code := range imageCodes {
		if a.v.Has(Error, code) {
			t.Errorf("%s: %s", code, show(a.v))
		}
	}
	if !slices.ContainsFunc(a.v.SelfConsistent, func(a Anchor) bool { return a.What == "launch registers" }) {
		t.Errorf("the registers do not follow from its own measurement document: %s", show(a.v))
	}
	// The fixture's configuration was rewritten; its event log names another image.
	if !a.v.Has(Error, "image_hash_inconsistent") {
		t.Error(show(a.v))
	}
}

// A verifier that runs in a page must not be able to reach anything.
func TestVerifierReachesNothing(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/dstack-go/dstack/verifier").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		for _, bad := range []string{"net/http", "os/exec", "os/signal", "github.com/compose-spec", "github.com/dstack-go/dstack/simtee", "github.com/dstack-go/dstack/attest/tdx/tdxtest", "testing"} {
			if dep == bad || strings.HasPrefix(dep, bad+"/") {
				t.Errorf("the verifier depends on %s", dep)
			}
		}
	}
}

func TestCompilesToWebAssembly(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: builds for another platform")
	}
	cmd := exec.Command("go", "build", "github.com/dstack-go/dstack/verifier")
	cmd.Env = append(os.Environ(), "GOOS=js", "GOARCH=wasm")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Hostile text in a verdict must not move the cursor or forge a line.
func TestStringIsPrintable(t *testing.T) {
	v := &Verdict{Findings: []Finding{{Level: Error, Code: "x", Message: "a\nACCEPTED\x1b[2J\u202e"}}}
	s := v.String()
	if strings.ContainsAny(s, "\x1b\u202e") || strings.Contains(s, "\nACCEPTED") {
		t.Errorf("%q", s)
	}
}

func FuzzParseSource(f *testing.F) {
	f.Add([]byte(`{"version":1,"container":"00","manifest":"","nonce":"","served_spkis":["00"]}`))
	f.Add([]byte(`{"version":1,"container":"` + strings.Repeat("80", 10) + `","manifest":"{}","nonce":"07","served_spkis":[],"collateral":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseSource(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		v := Appraise(Request{Source: *s, Roots: VendorRoots(), Policy: DefaultPolicy(), At: testTime})
		if v.Accepted {
			t.Fatal(show(v))
		}
		_ = v.String()
	})
}
