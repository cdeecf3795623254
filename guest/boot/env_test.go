// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/manifest"
)

// envMachine is a machine before the phase env, whose provider has a key for it.
func envMachine(t *testing.T, d manifest.Draft) (*Machine, ed25519.PrivateKey, []byte) {
	t.Helper()
	signer := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{3}, ed25519.SeedSize))
	if d.EnvSigners != nil {
		d.EnvSigners = [][]byte{signer.Public().(ed25519.PublicKey)}
	}
	d.KeyProvider = manifest.KeyProviderKMS
	d.AllowedEnvs = []string{"A"}
	m := newMachine(Options{})
	m.manifest, m.remembers, m.files = parsed(t, d), filepath.Join(t.TempDir(), "dstack"), hostshare.Files{}
	var err error
	if m.identity, err = newIdentity(m.manifest, &hostshare.InstanceInfo{}, nil, fill(1)); err != nil {
		t.Fatal(err)
	}
	if m.log, err = newRecorder(t.TempDir(), 1, nil, nil); err != nil {
		t.Fatal(err)
	}
	env, err := keys.NewEnvKey(bytes.Repeat([]byte{9}, keys.Size))
	if err != nil {
		t.Fatal(err)
	}
	public, err := envelope.PublicKey(env)
	if err != nil {
		t.Fatal(err)
	}
	m.secrets.app = &keys.AppKeys{Env: env, Provider: keys.Provider{Kind: keys.KMS}}
	return m, signer, public
}

func seal(t *testing.T, m *Machine, signer ed25519.PrivateKey, public []byte, version uint64) []byte {
	t.Helper()
	data, err := envelope.Seal(public, envelope.Binding{App: m.identity.appID, Compose: m.identity.composeHash, Version: version}, signer, map[string]string{"A": "secret"})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestThreat_J03_AGuestRemembersTheEnvironmentsVersion(t *testing.T) {
	ctx := context.Background()
	m, signer, public := envMachine(t, manifest.Draft{EnvSigners: [][]byte{}, ImagePolicy: manifest.ImagePolicyDigest})
	disk := m.remembers
	m.files[hostshare.EncryptedEnvName] = seal(t, m, signer, public, 7)
	if err := m.env(ctx); err != nil {
		t.Fatal(err)
	}
	if m.variables["A"] != "secret" || !m.secrets.app.Env.IsZero() {
		t.Errorf("variables %v, the key is wiped: %v", m.variables, m.secrets.app.Env.IsZero())
	}
	events := m.log.Log()
	if e := events[len(events)-1]; e.Name != eventlog.EnvVersion || binary.BigEndian.Uint64(e.Payload) != 7 {
		t.Errorf("the last event is %s", e.Name)
	}
	for _, c := range []struct {
		version uint64
		code    string
	}{{7, ""}, {6, "env_rollback"}, {8, ""}, {7, "env_rollback"}} {
		m, _, _ := envMachine(t, manifest.Draft{EnvSigners: [][]byte{}, ImagePolicy: manifest.ImagePolicyDigest})
		m.remembers = disk // the next boot, on the same disk
		m.files[hostshare.EncryptedEnvName] = seal(t, m, signer, public, c.version)
		if err := m.env(ctx); fault.Code(err) != c.code {
			t.Errorf("version %d: %v, want %q", c.version, err, c.code)
		}
	}
	if err := os.WriteFile(filepath.Join(disk, envVersionFile), []byte("no number"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readEnvVersion(disk); fault.Code(err) != "env_version" {
		t.Errorf("a version that is no number: %v", err)
	}
}

func TestEnvironmentsThatAreRefused(t *testing.T) {
	ctx := context.Background()
	m, _, public := envMachine(t, manifest.Draft{EnvSigners: [][]byte{}})
	if err := m.env(ctx); fault.Code(err) != "env_missing" {
		t.Errorf("taken away: %v", err)
	}
	old, err := envelope.SealV1(public, map[string]string{"A": "the host's"})
	if err != nil {
		t.Fatal(err)
	}
	m.files[hostshare.EncryptedEnvName] = old
	if err := m.env(ctx); fault.Code(err) != "env_unsigned" {
		t.Errorf("unsigned: %v", err)
	}
	// A manifest of upstream's has no signers, and takes what upstream's takes.
	m, _, _ = envMachine(t, manifest.Draft{})
	if err := m.env(ctx); err != nil {
		t.Errorf("none: %v", err)
	}
	m.files[hostshare.EncryptedEnvName] = old
	if err := m.env(ctx); err != nil || m.variables["A"] != "the host's" {
		t.Errorf("upstream's: %v, %v", m.variables, err)
	}
	if n := len(m.log.Log()); n != 0 {
		t.Errorf("%d events for it", n)
	}
	m, _, _ = envMachine(t, manifest.Draft{})
	m.files[hostshare.EncryptedEnvName] = old
	m.secrets.app.Env = keys.EnvKey{}
	if err := m.env(ctx); fault.Code(err) != "env_without_key_provider" {
		t.Errorf("no key: %v", err)
	}
}

func TestKeysComeFromTheProviderOfTheManifest(t *testing.T) {
	pinned := parsed(t, manifest.Draft{KeyProvider: manifest.KeyProviderKMS, KeyProviderID: []byte{1, 2}})
	for name, c := range map[string]struct {
		p    keys.Provider
		code string
	}{
		"the pinned one":  {keys.Provider{Kind: keys.KMS, SPKI: []byte{1, 2}}, ""},
		"another KMS":     {keys.Provider{Kind: keys.KMS, SPKI: []byte{1, 3}}, "key_provider_mismatch"},
		"another kind":    {keys.Provider{Kind: keys.None}, "key_provider_mismatch"},
		"one without key": {keys.Provider{Kind: keys.KMS}, "key_provider_mismatch"},
	} {
		if err := checkProvider(pinned, c.p); fault.Code(err) != c.code {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
	}
}
