// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/manifest"
)

// systemDir is what the system remembers on the data disk. Containers see it only
// where the manifest lets them see everything.
const systemDir = persistent + "/dstack"

// envVersionFile holds the highest version of the environment that was used.
const envVersionFile = "env-version"

// env decrypts the environment. Its values go to compose and to scripts that upstream
// gives them to; nothing of the system reads them.
func (m *Machine) env(ctx context.Context) error {
	sealed := m.files[hostshare.EncryptedEnvName]
	if len(sealed) == 0 {
		if len(m.manifest.EnvSigners) > 0 {
			return fault.New("env_missing", "the manifest names who signs the environment, and the host passed none on").
				WithFix("deploy again with the app's variables")
		}
		return nil
	}
	app := m.appKeys()
	if app.Env.IsZero() {
		return fault.New("env_without_key_provider", "there is an encrypted environment, but the key provider %s has no key to decrypt it", m.manifest.KeyProviderKind()).
			WithFix("deploy without encrypted variables, or with the key provider kms")
	}
	defer app.Env.Wipe()
	seen, err := readEnvVersion(m.remembers)
	if err != nil {
		return err
	}
	opened, err := envelope.Opening{
		Key: app.Env, App: m.identity.appID, Compose: m.identity.composeHash, Signers: m.manifest.EnvSigners,
		MinVersion: seen, Allowed: m.manifest.AllowedEnvs, Strict: m.manifest.ImagePolicy == manifest.ImagePolicyDigest,
	}.Open(sealed)
	if err != nil {
		return err
	}
	if len(opened.Skipped) > 0 {
		m.console.Log("variables that allowed_envs lacks: " + oneLine(strings.Join(opened.Skipped, ", ")))
	}
	m.variables = opened.Variables
	if opened.Version > 0 {
		if err := writeEnvVersion(m.remembers, opened.Version); err != nil {
			return err
		}
		// Without signers in the manifest the version is anybody's.
		if len(m.manifest.EnvSigners) > 0 {
			if err := m.log.System(ctx, eventlog.EnvVersion, binary.BigEndian.AppendUint64(nil, opened.Version)); err != nil {
				return err
			}
		}
	}
	if engine.RefersToEnvFiles(append([]string{m.manifest.DockerComposeFile, m.manifest.BashScript, m.manifest.PreLaunchScript}, m.manifest.InitScripts...)...) {
		return engine.WriteEnvFiles(workDir, m.variables)
	}
	return nil
}

// readEnvVersion returns what writeEnvVersion wrote, 0 before. The disk is
// authenticated: what does not read as a number was not written by the host, and is
// refused all the same.
func readEnvVersion(dir string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(dir, envVersionFile))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	var version uint64
	if err == nil {
		version, err = strconv.ParseUint(string(text), 10, 64)
	}
	if err != nil {
		return 0, fault.Wrap(err, "env_version", "read which version of the environment was used before")
	}
	return version, nil
}

// writeEnvVersion remembers a version, durably: what is not remembered could be
// rolled back.
func writeEnvVersion(dir string, version uint64) error {
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = durable.WriteFile(filepath.Join(dir, envVersionFile), []byte(strconv.FormatUint(version, 10)), 0o600)
	}
	if err != nil {
		return fault.Wrap(err, "env_version", "remember which version of the environment is used")
	}
	return nil
}
