// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"crypto/sha256"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// identity is who this instance is, before anything secret exists
// (spec/attestation.md §5.1).
type identity struct {
	composeHash dstack.ComposeHash
	appID       dstack.AppID
	seed        []byte
	instanceID  []byte // 20 bytes, or empty when the manifest wants none
}

// newIdentity derives the identity. random fills a fresh seed.
//
// With the key provider none the seed is fresh at each boot, as upstream has it,
// for nothing outlives the boot that it could name; unless the host's launch
// document pins the instance id, as it does when the launch commits to the
// instance: then the host's seed counts, and the commitment is compared later.
func newIdentity(m *manifest.Manifest, info *hostshare.InstanceInfo, doc *mrconfig.Document, random func([]byte) error) (identity, error) {
	id := identity{composeHash: m.Hash()}
	if info.AppID != nil {
		id.appID = *info.AppID
	} else {
		copy(id.appID[:], id.composeHash[:])
	}
	pinned := doc != nil && doc.InstanceID != nil
	id.seed = info.InstanceIDSeed
	if len(id.seed) == 0 || m.KeyProviderKind() == manifest.KeyProviderNone && !pinned {
		id.seed = make([]byte, dstack.InstanceIDSize)
		if err := random(id.seed); err != nil {
			return identity{}, err
		}
	}
	if !m.NoInstanceID {
		h := sha256.New()
		h.Write(id.seed)
		h.Write(id.appID[:])
		id.instanceID = h.Sum(nil)[:dstack.InstanceIDSize]
	}
	return id, nil
}

// checkConfigID compares the launch commitment that the TEE reports with what
// this guest is about to run (spec/attestation.md §6). text is the document from
// the host's blob, believed only if its hash is the commitment.
//
// An absent commitment (all zero) is accepted as upstream does, but not for a
// manifest that pins its key provider or its images: those came from tools that
// always commit, so somebody took the commitment away.
// Every refusal has the code mr_config_mismatch.
func checkConfigID(id dstack.MRConfigID, text string, m *manifest.Manifest, local identity) error {
	refuse := func(format string, args ...any) error {
		return fault.New("mr_config_mismatch", format, args...).
			WithFix("start the VM with the launch configuration that belongs to this manifest")
	}
	switch id[0] {
	case mrconfig.FormNone:
		if !id.IsZero() {
			return refuse("the launch commitment %s has an unknown form", id)
		}
		if len(m.KeyProviderID) > 0 || m.ImagePolicy != "" {
			return refuse("the launch commits to nothing, but the manifest has key_provider_id or image_policy")
		}
		return nil
	case mrconfig.FormV1:
		if id != mrconfig.IDv1(local.composeHash) {
			return refuse("the launch commits to another manifest than the one with hash %s", local.composeHash)
		}
		return nil
	case mrconfig.FormV2:
		want, err := mrconfig.IDv2(local.composeHash, local.appID, m.KeyProviderKind(), m.KeyProviderID)
		if err != nil || id != want {
			return refuse("the launch commits to another app, manifest or key provider")
		}
		return nil
	case mrconfig.FormV3:
	default:
		return refuse("the launch commitment has the unknown form %d", id[0])
	}
	if text == "" {
		return refuse("the launch commits to a document that the host did not pass on")
	}
	if mrconfig.IDv3([]byte(text)) != id {
		return refuse("the document that the host passed on is not the one committed at launch")
	}
	doc, err := mrconfig.Parse([]byte(text))
	if err != nil {
		return fault.Wrap(err, "mr_config_mismatch", "the document committed at launch")
	}
	gpu := m.GPUPolicyHash()
	switch {
	case doc.ComposeHash != local.composeHash:
		return refuse("the launch commits to the manifest %s, but this one is %s", doc.ComposeHash, local.composeHash)
	case doc.KeyProvider != m.KeyProviderKind():
		return refuse("the launch commits to the key provider %s, but the manifest has %s", doc.KeyProvider, m.KeyProviderKind())
	case doc.AppID != nil && *doc.AppID != local.appID:
		return refuse("the launch commits to the app %s, but this one is %s", doc.AppID, local.appID)
	case doc.InstanceID != nil && !bytes.Equal(doc.InstanceID[:], local.instanceID):
		return refuse("the launch commits to the instance %s, but this one is %x", doc.InstanceID, local.instanceID)
	case doc.KeyProviderID != nil && !bytes.Equal(doc.KeyProviderID, m.KeyProviderID):
		return refuse("the launch commits to another key_provider_id than the manifest has")
	case doc.GPUPolicyHash != nil && !bytes.Equal(doc.GPUPolicyHash, gpu[:]):
		return refuse("the launch commits to another GPU policy")
	case doc.InitScriptHashes != nil && !equalHashes(doc.InitScriptHashes, m.InitScriptHashes()):
		return refuse("the launch commits to other init scripts")
	}
	return nil
}

func equalHashes(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
