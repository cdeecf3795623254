// SPDX-License-Identifier: Apache-2.0

// Package identity derives the values by which upstream's clients, key management
// services and contracts know an app, an instance, a machine and what was measured:
// app_info, with mr_system, mr_aggregated and device_id.
//
// [Of] is pure. It takes claims that a TEE's verification established and the
// evidence they are of, and uses of the latter only what the claims bind: the
// runtime log after it replayed to the register, the configuration document after
// its digest was compared. The one exception is the app id of an AWS Nitro enclave,
// which nothing measures: upstream shows it all the same, so it is here, but it is only
// what the sender says (threats.md B19).
//
// The three derived hashes are identifiers to compare, not verdicts: equal values
// say that the same things were measured, not that they are good. A device id made
// here compares with upstream's; attest.Claims.DeviceID is the better one where the
// two differ (enclaves, see [DeviceID]).
//
// Specification: attestation.md §5.1 to §5.5, §8.4.
package identity

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/internal/fault"
)

// Mode says which part of a boot counts.
type Mode int

const (
	// Final is an instance that is up: the whole log counts, and system-ready must
	// be in it.
	Final Mode = iota
	// BootTime is an instance that asks for its keys: what came up to and with
	// boot-mr-done counts, and the key provider, not chosen yet, is left out.
	BootTime
)

// Input is what an identity is derived from.
type Input struct {
	Claims   *attest.Claims   // of a successful verification
	Evidence *attest.Evidence // that they are of
	// Document is the text of the configuration document that the evidence carries
	// in its vm_config; Evidence.MRConfig comes before it. Only TEEs without a
	// runtime register need it.
	Document string
	// Image is the OS image hash, 32 bytes, or nil when it is unknown. It enters
	// mr_system on Google Cloud, so that the hash must be a verified one there.
	Image []byte
	Mode  Mode
}

// Of returns the identity. Codes: those of eventlog.Boundary and ReplayRuntime;
// log_replay_mismatch for a log that is not the one that was measured;
// mr_config_mismatch, mr_config_document_missing and mr_config_malformed for a
// configuration document; identity_tee for a TEE that has no identity of this form;
// identity_register for evidence that lacks a register of the formulas;
// identity_image where the image's hash is needed and not given.
func Of(in Input) (*ratls.AppInfo, error) {
	c := in.Claims
	if c == nil || in.Evidence == nil {
		return nil, fault.New("identity_tee", "there are no claims to derive an identity from")
	}
	out := &ratls.AppInfo{OSImageHash: bytes.Clone(in.Image)}
	var err error
	if out.DeviceID, err = DeviceID(c); err != nil {
		return nil, err
	}
	switch {
	case c.SNP != nil:
		err = in.fromDocument(out)
	case c.TEE == dstack.Nitro:
		err = in.fromEnclave(out)
	default:
		err = in.fromLog(out)
	}
	if err != nil {
		return nil, err
	}
	return out, in.hashes(out)
}

// fromLog reads the identity from a log that replays to every runtime register.
func (in Input) fromLog(out *ratls.AppInfo) error {
	registers := in.Claims.RuntimeRegisters()
	if len(registers) == 0 {
		return fault.New("identity_tee", "evidence of %s has no runtime register, so nothing binds an identity", in.Claims.TEE)
	}
	for _, r := range registers {
		got, err := eventlog.ReplayRuntime(in.Evidence.EventLog, r.Hash)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, r.Value) {
			return fault.New("log_replay_mismatch", "the runtime events replay to %x, the quote has %s %x", got, r.Name, r.Value)
		}
	}
	read := eventlog.Boundary
	if in.Mode == BootTime {
		read = eventlog.LaunchIdentity
	}
	id, err := read(in.Evidence.EventLog)
	if err != nil {
		return err
	}
	out.AppID, out.ComposeHash, out.InstanceID, out.InitScriptHashes = id.AppID, id.ComposeHash, id.InstanceID, append([][]byte{}, id.InitScriptHashes...)
	if in.Mode == Final {
		out.KeyProvider = []byte(id.KeyProvider)
	}
	return nil
}

// fromDocument reads it from the document that SEV-SNP's HOST_DATA is the digest of.
func (in Input) fromDocument(out *ratls.AppInfo) error {
	text := in.Evidence.MRConfig
	if text == "" {
		text = in.Document
	}
	if text == "" {
		return fault.New("mr_config_document_missing", "the evidence carries no configuration document, which HOST_DATA is the digest of")
	}
	if got := mrconfig.Digest([]byte(text)); got != in.Claims.SNP.HostData {
		return fault.New("mr_config_mismatch", "the configuration document has the digest %x, HOST_DATA is %x", got, in.Claims.SNP.HostData)
	}
	doc, err := mrconfig.Parse([]byte(text))
	if err != nil {
		return fault.Wrap(err, "mr_config_malformed", "the configuration document")
	}
	if doc.AppID == nil {
		return fault.New("mr_config_mismatch", "the configuration document names no app id")
	}
	out.AppID, out.ComposeHash, out.InitScriptHashes = *doc.AppID, doc.ComposeHash, doc.InitScriptHashes
	if doc.InstanceID != nil {
		out.InstanceID = doc.InstanceID[:]
	}
	if in.Mode == Final {
		name := doc.KeyProvider
		if name == "local" {
			name = "local-sgx" // as the event log spells it
		}
		out.KeyProvider = fmt.Appendf(nil, `{"name":%q,"id":"%x"}`, name, doc.KeyProviderID)
	}
	return nil
}

// fromEnclave takes the image for the manifest, and the app id as it is claimed.
func (in Input) fromEnclave(out *ratls.AppInfo) error {
	h, err := nitro.ImageHash(in.Claims.PCRs())
	if err != nil {
		return err
	}
	out.ComposeHash = dstack.ComposeHash(h)
	out.InitScriptHashes = [][]byte{}
	for _, e := range in.Evidence.Unbound {
		if e.Name == eventlog.SystemReady {
			break
		}
		if e.Name == eventlog.AppIDEvent && len(e.Payload) == dstack.AppIDSize {
			out.AppID = dstack.AppID(e.Payload)
			break
		}
	}
	return nil
}

// DeviceID returns upstream's device id: SHA-256 of the PPID (16 bytes; TDX, also on
// Google Cloud), of the chip id (64 bytes; SEV-SNP), of the module id of a NitroTPM, of
// the module id up to its first hyphen for an enclave, and, by upstream's proposal, of
// the UEID (33 bytes; Arm CCA). Every enclave has the same ("i"), as upstream has it: do
// not tell machines apart by it. The code is identity_tee for evidence without one.
func DeviceID(c *attest.Claims) (dstack.DeviceID, error) {
	switch {
	case c.TDX != nil:
		return sha256.Sum256(c.TDX.PPID[:]), nil
	case c.SNP != nil:
		return sha256.Sum256(c.SNP.ChipID[:]), nil
	case c.TEE == dstack.Nitro:
		head, _, _ := strings.Cut(c.Nitro.ModuleID, "-")
		return sha256.Sum256([]byte(head)), nil
	case c.TEE == dstack.NitroTPM:
		return sha256.Sum256([]byte(c.Nitro.ModuleID)), nil
	}
	if c.CCA != nil {
		return sha256.Sum256(c.CCA.InstanceID), nil
	}
	return dstack.DeviceID{}, fault.New("identity_tee", "evidence of %s has no device id of upstream's form", c.TEE)
}

// hashes computes mr_system and mr_aggregated (attestation.md §5.3). Fields of fixed
// length are run together; each formula has one length, so that nothing is ambiguous
// but upstream's optional suffix of three registers, which is three or none. Arm CCA
// has upstream's proposal (attestation.md §8.4).
func (in Input) hashes(out *ratls.AppInfo) error {
	c := in.Claims
	var mkp [32]byte
	if in.Mode == Final && len(out.KeyProvider) > 0 {
		mkp = sha256.Sum256(out.KeyProvider)
	}
	switch pcrs := c.PCRs(); {
	case c.TDX != nil && c.TPM == nil:
		t := c.TDX
		launch := bytes.Join([][]byte{t.MRTD[:], t.RTMR[0][:], t.RTMR[1][:], t.RTMR[2][:]}, nil)
		rt3, err := in.runtime("sha-384")
		if err != nil {
			return err
		}
		out.MRSystem = hash(launch, mkp[:])
		if t.MRConfigID != (dstack.MRConfigID{}) || t.MROwner != (dstack.Measurement{}) || t.MROwnerConfig != (dstack.Measurement{}) {
			rt3 = bytes.Join([][]byte{rt3, t.MRConfigID[:], t.MROwner[:], t.MROwnerConfig[:]}, nil)
		}
		out.MRAggregated = hash(launch, rt3)
	case c.TDX != nil:
		if len(in.Image) != dstack.ImageHashSize {
			return fault.New("identity_image", "mr_system on Google Cloud is made of the OS image hash, which is not known")
		}
		if err := need(pcrs, sha256.Size, 0, 2); err != nil {
			return err
		}
		rt14, err := in.runtime("sha-256")
		if err != nil {
			return err
		}
		out.MRSystem, out.MRAggregated = hash(in.Image, mkp[:]), hash(pcrs[0], pcrs[2], rt14)
	case c.CCA != nil:
		a := c.CCA
		rem3, err := in.runtime(a.HashAlgorithm)
		if err != nil {
			return err
		}
		launch := bytes.Join([][]byte{a.RIM, a.REM[0], a.REM[1], a.REM[2]}, nil)
		out.MRSystem, out.MRAggregated = hash(launch, mkp[:]), hash(launch, rem3, a.RPV[:])
	case c.SNP != nil:
		out.MRSystem, out.MRAggregated = hash(c.SNP.Measurement[:]), hash(c.SNP.Measurement[:], c.SNP.HostData[:])
	case c.TEE == dstack.Nitro:
		h := [32]byte(out.ComposeHash)
		out.MRSystem, out.MRAggregated = h, h
	case c.TEE == dstack.NitroTPM:
		if err := need(pcrs, nitro.PCRSize, 4, 7, 12); err != nil {
			return err
		}
		rt14, err := in.runtime("sha-384")
		if err != nil {
			return err
		}
		out.MRSystem, out.MRAggregated = hash(pcrs[4], pcrs[7], pcrs[12], mkp[:]), hash(pcrs[4], pcrs[7], pcrs[12], rt14)
	default:
		return fault.New("identity_tee", "evidence of %s has no mr_system", c.TEE)
	}
	return nil
}

// runtime replays the runtime events, in BootTime up to and with boot-mr-done.
func (in Input) runtime(name string) ([]byte, error) {
	events := eventlog.Runtime(in.Evidence.EventLog)
	if in.Mode == BootTime {
		for i, e := range events {
			if e.Name == eventlog.BootMRDone {
				events = events[:i+1]
				break
			}
		}
	}
	return eventlog.ReplayRuntime(events, name)
}

func need(pcrs map[uint32][]byte, size int, indices ...uint32) error {
	for _, i := range indices {
		if len(pcrs[i]) != size {
			return fault.New("identity_register", "register %d has %d bytes, want %d", i, len(pcrs[i]), size)
		}
	}
	return nil
}

func hash(parts ...[]byte) [32]byte { return sha256.Sum256(bytes.Join(parts, nil)) }
