// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
)

// MaxConfig bounds the configuration in bytes of JSON: a 10 MiB manifest in
// base64, a 1 MiB event log, and what is left is small.
const MaxConfig = 20 << 20

// Config is everything the agent knows, handed over once by init. It carries
// secrets: it is never logged and travels only in the memfd.
type Config struct {
	Version  string     `json:"version"`  // of this software, such as 0.6.0
	Revision string     `json:"revision"` // such as git:<20 hex digits>
	TEE      dstack.TEE `json:"tee"`
	IsDev    bool       `json:"is_dev"` // the measured flag of the image

	Manifest  []byte `json:"manifest"`   // app-compose.json, the measured bytes
	SysConfig []byte `json:"sys_config"` // .sys-config.json, transport: never trusted
	VMConfig  string `json:"vm_config"`  // JSON text, as sys-config has it; hostile

	// Events is the event log up to and including system-ready: boot events
	// (imr 0 to 2), then runtime events (imr 3). The agent takes its identity
	// from it, so that what it says and what it can prove are the same thing.
	// Init starts an agent again with the log as it is then, app events included.
	Events []eventlog.Event `json:"events"`

	ChannelKey []byte   `json:"channel_key"` // PKCS#8 DER of the system channel key
	AppKeys    []byte   `json:"app_keys"`    // keys.AppKeys.ForAgent().Encode(); secret
	DataDisks  []string `json:"data_disks"`  // mount points that SysInfo reports

	// KMSURLs are further addresses of the KMS, and PCCSURL is where its evidence's
	// collateral is: transport, as the host gave them.
	KMSURLs []string `json:"kms_urls,omitempty"`
	PCCSURL string   `json:"pccs_url,omitempty"`
	// Lease and LeaseSignature are the KMS's lease for this instance; empty when it
	// gives none.
	Lease          []byte `json:"lease,omitempty"`
	LeaseSignature []byte `json:"lease_signature,omitempty"`

	// GatewayURLs are where gateways may be: transport, as the host gave them.
	GatewayURLs []string `json:"gateway_urls,omitempty"`

	// Scopes is key_scopes of the manifest: what the listener of each service may
	// derive. Without an entry, a service has no listener of its own.
	Scopes map[string][]string `json:"scopes,omitempty"`

	// Listeners names the inherited listeners, in the order of their file
	// descriptors; [Spawn] fills it in.
	Listeners []string `json:"listeners"`
}

// Wipe overwrites the secrets.
func (c *Config) Wipe() {
	clear(c.ChannelKey)
	clear(c.AppKeys)
}

// seals forbid every later change; init keeps no way to write either.
const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Seal writes the configuration to a new sealed memfd, positioned at its start.
// The memory lives until the last descriptor is closed: the caller closes its
// copy once the agent has been started.
func (c *Config) Seal() (*os.File, error) {
	data, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode configuration of the agent: %w", err)
	}
	defer clear(data)
	if len(data) > MaxConfig {
		return nil, fmt.Errorf("configuration of the agent has %d bytes, allowed %d", len(data), MaxConfig)
	}
	const name = "dstack-agent-config"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // MFD_NOEXEC_SEAL needs Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("create memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write memfd: %w", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, fmt.Errorf("seal memfd: %w", err)
	}
	return f, nil
}

// ReadConfig reads a sealed configuration and closes the descriptor; the bytes
// read are wiped. It refuses a memfd that somebody could still change.
func ReadConfig(f *os.File) (*Config, error) {
	defer f.Close()
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("configuration is not on a memfd: %w", err)
	}
	if got&seals != seals {
		return nil, fmt.Errorf("configuration memfd is not sealed: seals %#x, want %#x", got, seals)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > MaxConfig {
		return nil, fmt.Errorf("configuration has %d bytes, allowed %d", info.Size(), MaxConfig)
	}
	data := make([]byte, info.Size())
	defer clear(data)
	if _, err := io.ReadFull(io.NewSectionReader(f, 0, info.Size()), data); err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c := new(Config)
	if err := decodeStrict(data, c); err != nil {
		return nil, fmt.Errorf("parse configuration: %w", err)
	}
	return c, nil
}
