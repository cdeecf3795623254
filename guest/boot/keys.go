// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/guest/keyprovider"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/releaselog"
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
	p, network, err := m.provider()
	if err != nil {
		return err
	}
	var grant *keyprovider.Grant
	ask := func() (err error) {
		grant, err = p.Keys(ctx)
		return err
	}
	if network {
		err = outbound(ask)
	} else {
		err = ask()
	}
	if err != nil {
		return err
	}
	app := grant.Keys
	m.secrets.mu.Lock()
	m.secrets.app = app
	m.secrets.mu.Unlock()
	m.imageHash = grant.OSImageHash
	m.kms, m.grant = p, *grant
	m.grant.Keys = nil
	if app.Provider.Kind == keys.KMS {
		m.console.Log(fmt.Sprintf("keys of the KMS %.200s, attested channel: %t, release log: %d entries, lease: %t",
			oneLine(app.Provider.URL), grant.Session, grant.Head.Size(), grant.Lease != nil))
	}
	if grant.Unpinned {
		m.console.Log("the manifest does not pin its key provider: the host chose it")
	}
	return checkProvider(m.manifest, app.Provider)
}

// checkProvider holds where the keys are from against the manifest, whatever the
// provider itself made sure of. Code key_provider_mismatch.
func checkProvider(m *manifest.Manifest, p keys.Provider) error {
	if kind := m.KeyProviderKind(); p.Kind != kind {
		return fault.New("key_provider_mismatch", "the keys are from a provider of kind %s, and the manifest says %s", p.Kind, kind)
	}
	if pin := m.KeyProviderID; len(pin) > 0 && !bytes.Equal(pin, p.ID()) {
		return fault.New("key_provider_mismatch", "the keys are from the provider %x, and the manifest pins %x", p.ID(), pin).
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

// releaseLogs is where the heads of the KMS's release logs are remembered.
const releaseLogs = "release-logs.json"

// releaseLogLimit is for asking one KMS a few times.
const releaseLogLimit = 3 * time.Minute

// releaseLog holds the head of the KMS's release log, in which it proved the grant to
// be, against what earlier boots saw of it (threats.md G10). The keys came before the
// disk that remembers: nothing has used them but to open it. A KMS that never showed a
// log is upstream's. Codes: those of releaselog.Memory, and of asking the KMS.
func (m *Machine) releaseLog(ctx context.Context) error {
	p := m.appKeys().Provider
	if p.Kind != keys.KMS {
		return nil
	}
	if err := os.MkdirAll(m.remembers, 0o700); err != nil {
		return fault.Wrap(err, "data_disk", "make %s", m.remembers)
	}
	memory := releaselog.OpenMemory(filepath.Join(m.remembers, releaseLogs))
	if m.grant.Head.IsZero() {
		m.console.Log("the KMS shows no release log: what it gives to whom is not to be seen")
		return memory.Missing(p.SPKI)
	}
	kms, ok := m.kms.(*keyprovider.KMS)
	if !ok {
		return fault.New("internal", "keys of a KMS from a %T", m.kms)
	}
	return outbound(func() error { return kms.Observe(ctx, memory, m.grant.Head, p.URL) })
}

// provider returns the key provider that the manifest names, and whether asking it
// takes the network. Codes: key_provider_unavailable, and collateral_url for a PCCS that
// cannot be asked.
func (m *Machine) provider() (p keyprovider.Provider, network bool, err error) {
	attester := channel.AttesterFunc(m.evidence)
	switch kind := m.manifest.KeyProviderKind(); kind {
	case manifest.KeyProviderNone:
		return keyprovider.None{Attester: attester}, false, nil
	case manifest.KeyProviderTPM:
		return &keyprovider.TPM{
			PCRs: keyprovider.PCRsGoogle, App: m.identity.appID[:], Development: m.development(), Attester: attester,
			FirstBoot: m.instance.DataDisk == hostshare.DataDiskNew,
		}, false, nil
	case manifest.KeyProviderKMS:
		policy, err := kmsclient.PolicyOf(m.manifest.KMSPolicy, m.development(), m.sysConfig.PCCS())
		if err != nil {
			return nil, false, err
		}
		return &keyprovider.KMS{
			URLs: m.sysConfig.KMSURLs, Pin: m.manifest.KeyProviderID, Policy: policy,
			App: m.identity.appID, Instance: m.identity.instanceID, Compose: m.identity.composeHash,
			VMConfig: m.sysConfig.VMConfig, Attester: attester,
		}, true, nil
	case manifest.KeyProviderLocal:
		service, err := fetch.NewPCS(fetch.PCSOptions{Base: m.sysConfig.PCCS(), HTTP: fetch.HTTP{Timeout: collateralAttempt, Total: collateralLimit}})
		if err != nil {
			return nil, false, err
		}
		// The hardware's vendor vouches for the enclave, in an image for development
		// too: one that a simulated TEE vouches for could be anyone's.
		return &keyprovider.Local{
			Pin: m.manifest.KeyProviderID, Quote: m.tee.Quote, SealingKey: m.sealingKey, Collateral: service.Collateral,
			Roots: []attest.Roots{tdx.VendorRoots()}, Attester: attester,
		}, true, nil
	default:
		return nil, false, fault.New("key_provider_unavailable", "the manifest asks for the key provider %s, which this image does not have", kind).
			WithFix("use the key provider kms")
	}
}

// The wait for collateral ends before the key provider's own limit does, for the
// failure to say what was waited for.
const (
	collateralAttempt = 6 * time.Second
	collateralLimit   = 15 * time.Second
)

// sealingKey asks the host for the answer of its local key provider to a quote.
func (m *Machine) sealingKey(ctx context.Context, quote []byte) (sealed, providerQuote []byte, err error) {
	var answer hostapi.GetSealingKeyResponse
	if err := m.hostAPI().Call(ctx, "GetSealingKey", &hostapi.GetSealingKeyRequest{Quote: quote}, &answer); err != nil {
		return nil, nil, err
	}
	return answer.EncryptedKey, answer.ProviderQuote, nil
}

// development reports whether this image is for development; what does not say that
// it is for production is. The root, where this is read, is measured.
func (m *Machine) development() bool { return readOSRelease(osRelease)["VARIANT_ID"] != "prod" }

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
