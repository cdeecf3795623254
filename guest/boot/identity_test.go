// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func parsed(t *testing.T, d manifest.Draft) *manifest.Manifest {
	t.Helper()
	if d.Name == "" {
		d.Name = "app"
	}
	if d.DockerComposeFile == "" {
		d.DockerComposeFile = "services: {web: {image: 'hello:1'}}"
	}
	raw, err := manifest.Build(d)
	if err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func fill(b byte) func([]byte) error {
	return func(dst []byte) error { copy(dst, bytes.Repeat([]byte{b}, len(dst))); return nil }
}

func TestIdentity(t *testing.T) {
	none := parsed(t, manifest.Draft{KeyProvider: "none"})
	kms := parsed(t, manifest.Draft{KeyProvider: "kms"})
	anonymous := parsed(t, manifest.Draft{KeyProvider: "kms", NoInstanceID: true})
	app := dstack.AppID{1, 2, 3}
	seed := bytes.Repeat([]byte{7}, 20)
	derive := func(seed []byte, app dstack.AppID) []byte {
		h := sha256.Sum256(append(bytes.Clone(seed), app[:]...))
		return h[:20]
	}
	fresh := bytes.Repeat([]byte{0xee}, 20)
	var ownApp dstack.AppID
	hash := none.Hash()
	copy(ownApp[:], hash[:])
	pin := &mrconfig.Document{InstanceID: &dstack.InstanceID{}}
	for name, c := range map[string]struct {
		m        *manifest.Manifest
		info     hostshare.InstanceInfo
		doc      *mrconfig.Document
		app      dstack.AppID
		instance []byte
	}{
		"the app id is the start of the compose hash":     {none, hostshare.InstanceInfo{}, nil, ownApp, derive(fresh, ownApp)},
		"without a key provider the seed is always fresh": {none, hostshare.InstanceInfo{InstanceIDSeed: seed}, nil, ownApp, derive(fresh, ownApp)},
		"unless the launch commits to the instance":       {none, hostshare.InstanceInfo{InstanceIDSeed: seed}, pin, ownApp, derive(seed, ownApp)},
		"the host may name the app":                       {kms, hostshare.InstanceInfo{AppID: &app, InstanceIDSeed: seed}, nil, app, derive(seed, app)},
		"with a key provider the seed stays":              {kms, hostshare.InstanceInfo{AppID: &app, InstanceIDSeed: seed}, nil, app, derive(seed, app)},
		"with a key provider a missing seed is made":      {kms, hostshare.InstanceInfo{AppID: &app}, nil, app, derive(fresh, app)},
		"the host's instance id is never taken":           {kms, hostshare.InstanceInfo{AppID: &app, InstanceIDSeed: seed, InstanceID: &dstack.InstanceID{9}}, nil, app, derive(seed, app)},
		"an app without instance id":                      {anonymous, hostshare.InstanceInfo{AppID: &app, InstanceIDSeed: seed}, nil, app, nil},
	} {
		t.Run(name, func(t *testing.T) {
			id, err := newIdentity(c.m, &c.info, c.doc, fill(0xee))
			if err != nil {
				t.Fatal(err)
			}
			if id.appID != c.app || !bytes.Equal(id.instanceID, c.instance) || id.composeHash != c.m.Hash() {
				t.Fatalf("identity %+v", id)
			}
		})
	}
}

func TestConfigDocument(t *testing.T) {
	m := parsed(t, manifest.Draft{KeyProvider: "none", ImagePolicy: "digest", InitScripts: []string{"true"}})
	plain := parsed(t, manifest.Draft{KeyProvider: "none"})
	pinned := parsed(t, manifest.Draft{KeyProvider: "kms", KeyProviderID: []byte{1, 2}})
	id, err := newIdentity(m, &hostshare.InstanceInfo{}, nil, fill(1))
	if err != nil {
		t.Fatal(err)
	}
	idOf := func(m *manifest.Manifest) identity {
		v, err := newIdentity(m, &hostshare.InstanceInfo{}, nil, fill(1))
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	gpu := m.GPUPolicyHash()
	instance := dstack.InstanceID(id.instanceID)
	full := mrconfig.Document{
		AppID: &id.appID, ComposeHash: id.composeHash, GPUPolicyHash: gpu[:], InitScriptHashes: m.InitScriptHashes(),
		InstanceID: &instance, KeyProvider: "none",
	}
	change := func(f func(*mrconfig.Document)) mrconfig.Document {
		d := full
		f(&d)
		return d
	}
	v2, err := mrconfig.IDv2(idOf(pinned).composeHash, idOf(pinned).appID, "kms", []byte{1, 2})
	if err != nil {
		t.Fatal(err)
	}
	type test struct {
		m    *manifest.Manifest
		id   dstack.MRConfigID
		text string
		code string
	}
	v3 := func(d mrconfig.Document, code string) test {
		return test{m, mrconfig.IDv3(d.Bytes()), string(d.Bytes()), code}
	}
	const refused = "mr_config_mismatch"
	other := change(func(d *mrconfig.Document) { d.ComposeHash[0] ^= 1 })
	unknown := dstack.MRConfigID{9}
	dirty := dstack.MRConfigID{0, 1}
	for name, c := range map[string]test{
		"a document that pins everything":           v3(full, ""),
		"a document that pins little":               v3(mrconfig.Document{ComposeHash: id.composeHash, KeyProvider: "none"}, ""),
		"another compose hash":                      v3(other, refused),
		"another key provider":                      v3(change(func(d *mrconfig.Document) { d.KeyProvider = "kms" }), refused),
		"another app":                               v3(change(func(d *mrconfig.Document) { d.AppID = &dstack.AppID{1} }), refused),
		"another instance":                          v3(change(func(d *mrconfig.Document) { d.InstanceID = &dstack.InstanceID{1} }), refused),
		"another key provider id":                   v3(change(func(d *mrconfig.Document) { d.KeyProviderID = []byte{1} }), refused),
		"another GPU policy":                        v3(change(func(d *mrconfig.Document) { d.GPUPolicyHash = make([]byte, 32) }), refused),
		"no scripts allowed, but there is one":      v3(change(func(d *mrconfig.Document) { d.InitScriptHashes = [][]byte{} }), refused),
		"another script":                            v3(change(func(d *mrconfig.Document) { d.InitScriptHashes = [][]byte{make([]byte, 32)} }), refused),
		"a commitment whose document is withheld":   {m, mrconfig.IDv3(full.Bytes()), "", refused},
		"a document other than the committed one":   {m, mrconfig.IDv3(other.Bytes()), string(full.Bytes()), refused},
		"a committed text that is no document":      {m, mrconfig.IDv3([]byte("{}")), "{}", refused},
		"no commitment for a plain manifest":        {plain, dstack.MRConfigID{}, "", ""},
		"no commitment, yet the images are pinned":  {m, dstack.MRConfigID{}, "", refused},
		"no commitment, yet the provider is pinned": {pinned, dstack.MRConfigID{}, "", refused},
		"the first form":                            {plain, mrconfig.IDv1(plain.Hash()), "", ""},
		"the first form of another manifest":        {plain, mrconfig.IDv1(m.Hash()), "", refused},
		"the second form":                           {pinned, v2, "", ""},
		"the second form of another app":            {plain, v2, "", refused},
		"an unknown form":                           {plain, unknown, "", refused},
		"form zero with something in it":            {plain, dirty, "", refused},
	} {
		t.Run(name, func(t *testing.T) {
			local := id
			if c.m != m {
				local = idOf(c.m)
			}
			if err := checkConfigID(c.id, c.text, c.m, local); fault.Code(err) != c.code {
				t.Fatalf("error %v, want code %q", err, c.code)
			}
		})
	}
}

func TestInstanceInfoIsWhatTheHostStores(t *testing.T) {
	m := newMachine(Options{})
	m.manifest = parsed(t, manifest.Draft{KeyProvider: "none"})
	var err error
	if m.identity, err = newIdentity(m.manifest, &hostshare.InstanceInfo{}, nil, fill(1)); err != nil {
		t.Fatal(err)
	}
	info, err := hostshare.ParseInstanceInfo([]byte(m.instanceInfo()))
	if err != nil || !bytes.Equal(info.InstanceID[:], m.identity.instanceID) || *info.AppID != m.identity.appID {
		t.Fatalf("%s: %+v, %v", m.instanceInfo(), info, err)
	}
}

func TestUnsupportedManifests(t *testing.T) {
	for name, c := range map[string]struct {
		draft manifest.Draft
		code  string
	}{
		"a plain one":                  {manifest.Draft{}, ""},
		"bash":                         {manifest.Draft{Runner: "bash", BashScript: "true"}, ""},
		"bash without a script":        {manifest.Draft{Runner: "bash"}, "manifest_field"},
		"scopes without services":      {manifest.Draft{Runner: "bash", BashScript: "true", KeyScopes: map[string][]string{"a": {"a/"}}}, "manifest_unsupported"},
		"nerdctl":                      {manifest.Draft{Runner: "nerdctl-compose"}, "manifest_unsupported"},
		"a policy for GPUs":            {manifest.Draft{Requirements: json.RawMessage(`{"gpu_policy":{"rego":"package policy"}}`)}, "manifest_unsupported"},
		"a platform list without ours": {manifest.Draft{Requirements: json.RawMessage(`{"platforms":["dstack-amd-sev-snp"]}`)}, "requirement_platform"},
		"a platform list with ours":    {manifest.Draft{Requirements: json.RawMessage(`{"platforms":["dstack-tdx"]}`)}, ""},
		"an empty platform list":       {manifest.Draft{Requirements: json.RawMessage(`{"platforms":[]}`)}, "requirement_platform"},
		"a newer OS":                   {manifest.Draft{Requirements: json.RawMessage(`{"os_version":">=0.8"}`)}, "requirement_os_version"},
		"an older OS":                  {manifest.Draft{Requirements: json.RawMessage(`{"os_version":">=0.5.3, <1"}`)}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := Supported(parsed(t, c.draft), dstack.TDX, "0.7.0")
			if fault.Code(err) != c.code {
				t.Fatalf("error %v, want code %q", err, c.code)
			}
		})
	}
}

func TestTheFormOfACPIMeasurement(t *testing.T) {
	for name, c := range map[string]struct{ requirements, config, code string }{
		"no demand":                {`{}`, `{"tdx_attestation_variant":"lite"}`, ""},
		"all tables, and so it is": {`{"tdx_measure_acpi_tables":true}`, `{}`, ""},
		"all tables, by name":      {`{"tdx_measure_acpi_tables":true}`, `{"tdx_attestation_variant":"legacy"}`, ""},
		"all tables, and lite":     {`{"tdx_measure_acpi_tables":true}`, `{"tdx_attestation_variant":"lite"}`, "requirement_acpi"},
		"lite, and so it is":       {`{"tdx_measure_acpi_tables":false}`, `{"tdx_attestation_variant":"lite"}`, ""},
		"lite, and all tables":     {`{"tdx_measure_acpi_tables":false}`, ``, "requirement_acpi"},
		"no object":                {`{"tdx_measure_acpi_tables":true}`, `[]`, "requirement_acpi"},
	} {
		if err := acpiVariant(parsed(t, manifest.Draft{Requirements: json.RawMessage(c.requirements)}), c.config); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
	}
}

func TestTheLaunchToken(t *testing.T) {
	const token = "unit-test-launch-token-0000000001"
	hash, err := manifest.LaunchTokenHash(token)
	if err != nil {
		t.Fatal(err)
	}
	m := parsed(t, manifest.Draft{Requirements: json.RawMessage(fmt.Sprintf(`{"launch_token_hash":"%x"}`, hash))})
	for name, c := range map[string]struct{ config, code string }{
		"the token":               {`{"dstack":{"launch_token":"` + token + `"},"app":1}`, ""},
		"another":                 {`{"dstack":{"launch_token":"` + token + `x"}}`, "launch_token"},
		"a short one":             {`{"dstack":{"launch_token":"test"}}`, "launch_token"},
		"none":                    {`{"dstack":{}}`, "launch_token"},
		"in another place":        {`{"launch_token":"` + token + `"}`, "launch_token"},
		"no user configuration":   {``, "launch_token"},
		"a configuration of text": {token, "launch_token"},
	} {
		if err := launchToken(m, []byte(c.config)); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
	}
	if err := launchToken(parsed(t, manifest.Draft{}), nil); err != nil {
		t.Errorf("without the demand: %v", err)
	}
}

func TestThreat_J01_EveryImageOfTheComposeFileIsLocked(t *testing.T) {
	lock := map[string]string{"a:1": "sha256:" + testHash, "b": "sha256:" + testHash}
	for name, c := range map[string]struct{ compose, code string }{
		"all locked":             {"services:\n  x: {image: 'a:1'}\n  y: {image: b}\n", ""},
		"one is missing":         {"services:\n  x: {image: 'a:1'}\n  y: {image: 'c:2'}\n", "image_not_locked"},
		"another tag":            {"services:\n  x: {image: 'a:2'}\n", "image_not_locked"},
		"a name spelt otherwise": {"services:\n  x: {image: docker.io/library/b}\n", "image_not_locked"},
		"not YAML":               {"services: [", "compose_malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			err := allLocked(parsed(t, manifest.Draft{DockerComposeFile: c.compose, ImagePolicy: "digest", ImageLock: lock}))
			if fault.Code(err) != c.code {
				t.Fatalf("error %v, want code %q", err, c.code)
			}
		})
	}
}
