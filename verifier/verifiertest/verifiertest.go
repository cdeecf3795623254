// SPDX-License-Identifier: Apache-2.0

// Package verifiertest makes an instance for the tests of what verifies: a
// machine with a PKI of its own that measured a workload, answers nonces with
// evidence as a guest agent does, and can be expected by all that identifies it.
//
// It is for tests only. Evidence is accepted under the development roots that
// the instance comes with and no others, at [At].
package verifiertest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
	"github.com/dstack-go/dstack/verifier"
)

// At is a time at which the collateral of every instance is current.
var At = tdxtest.At

// Instance is one running workload. Its parts must not be changed while it answers.
type Instance struct {
	Platform   *tdxtest.Platform
	Manifest   []byte
	AppID      dstack.AppID
	InstanceID dstack.InstanceID
	ImageHash  dstack.ImageHash
	SPKI       []byte // DER, the key that the instance serves TLS with

	t         testing.TB
	name      string
	registers *measure.TDX
}

// New returns an instance of a workload with the given name.
func New(t testing.TB, name string) *Instance {
	t.Helper()
	off := false
	image := name + ":1"
	raw, err := manifest.Build(manifest.Draft{
		Name: name, DockerComposeFile: "services:\n  web:\n    image: " + image + "\n", KeyProvider: "none", SecureTime: &off,
		ImagePolicy: manifest.ImagePolicyDigest, ImageLock: map[string]string{image: "sha256:" + hex.EncodeToString(bytes.Repeat([]byte{0xab}, 32))},
	})
	if err != nil {
		t.Fatal(err)
	}
	registers, err := measure.ComputeTDX(measuretest.Launch())
	if err != nil {
		t.Fatal(err)
	}
	i := &Instance{
		Platform: tdxtest.New(t), Manifest: raw, InstanceID: dstack.InstanceID{0x15, 0x01}, ImageHash: dstack.ImageHash{0x1a, 0x2b},
		SPKI: []byte("the subject public key info of " + name), t: t, name: name, registers: registers,
	}
	hash := i.ComposeHash()
	copy(i.AppID[:], hash[:])
	return i
}

// ComposeHash returns the hash of the workload's manifest.
func (i *Instance) ComposeHash() dstack.ComposeHash { return sha256.Sum256(i.Manifest) }

// Answer returns what the instance replies to a nonce, over TLS or plain HTTP.
func (i *Instance) Answer(nonce []byte, tls bool) (verifier.Source, error) {
	runtime, err := i.events()
	if err != nil {
		return verifier.Source{}, err
	}
	launch := measuretest.Launch()
	hash := i.ComposeHash()
	document := (&mrconfig.Document{AppID: &i.AppID, ComposeHash: hash, KeyProvider: "none"}).Bytes()
	config, err := json.Marshal(measure.VMConfig{
		OSImageHash: i.ImageHash.String(), CPUCount: uint32(launch.VCPUs), MemorySize: launch.MemoryBytes, NumNICs: 1, MRConfig: string(document),
	})
	if err != nil {
		return verifier.Source{}, err
	}
	var spki []byte
	if tls {
		spki = i.SPKI
	}
	body, log := i.Platform.Body(), append(i.registers.BootLog(), runtime...)
	body.MRTD, body.MRConfigID = i.registers.MRTD, mrconfig.IDv3(document)
	body.ReportData = binding.Envelope(nonce, spki, i.AppID, i.InstanceID[:])
	for imr := range uint32(4) {
		if body.RTMR[imr], err = eventlog.Replay(log, imr); err != nil {
			return verifier.Source{}, err
		}
	}
	raw, err := container.EncodeV1(&attest.Evidence{
		TEE: dstack.TDX, Quote: i.Platform.Quote(body), EventLog: log, Config: string(config), ReportData: body.ReportData,
	})
	return verifier.Source{Version: 1, Container: raw, Manifest: string(i.Manifest), Nonce: nonce, ServedSPKIs: [][]byte{i.SPKI}}, err
}

// events are those that the guest's init commits.
func (i *Instance) events() ([]eventlog.Event, error) {
	hash, gpu, key := i.ComposeHash(), sha256.Sum256([]byte("{}")), sha256.Sum256(i.SPKI)
	var out []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, i.AppID[:]}, {eventlog.ComposeHashEvent, hash[:]},
		{eventlog.GPUPolicyHash, gpu[:]}, {eventlog.InstanceIDEvent, i.InstanceID[:]}, {eventlog.BootMRDone, nil},
		{eventlog.KeyProvider, []byte(`{"name":"none","id":""}`)}, {eventlog.StorageFS, []byte("ext4")},
		{eventlog.SystemChannelKey, key[:]}, {eventlog.SystemReady, nil},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			return nil, err
		}
		out = append(out, ev)
	}
	return out, nil
}

// Collateral returns the bundle that the instance's evidence needs.
func (i *Instance) Collateral() *collateral.Bundle { return i.Platform.DevRoots().Bundle() }

// DevRoots returns the file that --dev-roots takes.
func (i *Instance) DevRoots() []byte {
	i.t.Helper()
	raw, err := i.Platform.DevRoots().Bytes()
	if err != nil {
		i.t.Fatal(err)
	}
	return raw
}

// Lock returns the dstack.lock.json of the deployment.
func (i *Instance) Lock() []byte {
	i.t.Helper()
	raw, err := json.Marshal(&lock.Lock{
		Version: lock.Version, Name: i.name, ComposeHash: i.ComposeHash(), AppID: i.AppID, OSImageHash: i.ImageHash,
		Image: "dstack-sim-0.1", TEE: dstack.TDX, Measurements: i.registers, Created: At.Format(time.RFC3339),
	})
	if err != nil {
		i.t.Fatal(err)
	}
	return raw
}
