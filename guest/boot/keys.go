// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"context"
	"crypto/x509"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/manifest"
)

// appKeys returns the app's keys, which are there from the phase key-provider on.
func (m *Machine) appKeys() *keys.AppKeys {
	m.secrets.mu.Lock()
	defer m.secrets.mu.Unlock()
	return m.secrets.app
}

// keyProvider obtains the app's keys from the provider that the manifest names. What
// the provider is, is measured next; a manifest that pins it gets keys of no other.
func (m *Machine) keyProvider(ctx context.Context) error {
	app, imageHash, err := m.obtainKeys(ctx)
	if err != nil {
		return err
	}
	m.secrets.mu.Lock()
	m.secrets.app = app
	m.secrets.mu.Unlock()
	m.imageHash = imageHash
	if pin := m.manifest.KeyProviderID; len(pin) > 0 && !bytes.Equal(pin, app.Provider.ID()) {
		return fault.New("key_provider_mismatch", "the keys are from the provider %x, and the manifest pins %x", app.Provider.ID(), pin).
			WithFix("use the provider that key_provider_id of the manifest names")
	}
	return nil
}

// runtimeEvents measures where the keys are from and what the disk is to be.
func (m *Machine) runtimeEvents(ctx context.Context) error {
	if len(m.imageHash) > 0 {
		if err := m.log.System(ctx, eventlog.OSImageHash, m.imageHash); err != nil {
			return err
		}
	}
	event, err := m.appKeys().Provider.Event()
	if err != nil {
		return err
	}
	if err := m.log.System(ctx, eventlog.KeyProvider, event); err != nil {
		return err
	}
	fs, err := disk.ParseFS(m.manifest.StorageFS)
	if err != nil {
		return err
	}
	if !m.lasting() && fs != disk.Ext4 {
		return fault.New("storage_fs", "storage_fs %s needs a data disk that outlives the boot, which the key provider none does not give", fs).
			WithFix("use ext4, or another key provider")
	}
	return m.log.System(ctx, eventlog.StorageFS, []byte(fs.String()))
}

// obtainKeys asks the provider. The second result is the hash of the OS image, where
// the provider knows it.
func (m *Machine) obtainKeys(ctx context.Context) (*keys.AppKeys, []byte, error) {
	switch kind := m.manifest.KeyProviderKind(); kind {
	case manifest.KeyProviderNone:
		var raw [keys.Size]byte
		defer clear(raw[:])
		if err := fillRandom(raw[:]); err != nil {
			return nil, nil, err
		}
		seed, err := keys.NewSeed(raw[:])
		if err != nil {
			return nil, nil, err
		}
		app, err := m.fromSeed(ctx, keys.None, seed)
		return app, nil, err
	default:
		return nil, nil, fault.New("key_provider_unavailable", "the manifest asks for the key provider %s, which this image does not have yet", kind).
			WithFix(`use the key provider "none"; its data disk does not outlive a reboot`)
	}
}

// fromSeed makes an app's keys of a seed, and the root certificate that vouches for
// the app's others, with evidence over its key.
func (m *Machine) fromSeed(ctx context.Context, kind string, seed keys.Seed) (*keys.AppKeys, error) {
	defer seed.Wipe()
	s, err := derive.FromSeed(seed)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(s.CA.Public())
	if err != nil {
		return nil, err
	}
	evidence, err := m.evidence(ctx, ratls.ReportData(spki))
	if err != nil {
		return nil, err
	}
	root, err := certificate.Self(s.CA, certificate.Subject{Name: "App Root Cert", Path: 1}, ratls.Issued{}, evidence, time.Now())
	if err != nil {
		return nil, err
	}
	text, err := derive.PEM(s.CA)
	if err != nil {
		return nil, err
	}
	return &keys.AppKeys{Disk: s.Disk, App: s.App, CACert: root.PEM(), Provider: keys.Provider{Kind: kind, CAKey: text}}, nil
}

// evidence returns a container of evidence over the report data, with the log as far
// as it has come.
func (m *Machine) evidence(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	quote, err := m.tee.Quote(ctx, data)
	if err != nil {
		return nil, fault.Wrap(err, "quote_failed", "get a quote")
	}
	return container.Encode(&attest.Evidence{
		TEE: m.tee.Kind(), Quote: quote, EventLog: m.log.Log(), Config: m.sysConfig.VMConfig, ReportData: data,
	})
}
