// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// images is what pulling needs of the engine.
type images interface {
	Pull(ctx context.Context, ref string, progress func(string)) error
	Image(ctx context.Context, ref string) (*Image, error)
	Tag(ctx context.Context, ref, repo, tag string) error
}

// lockedTag is the tag given to an image whose compose reference has a digest and
// no tag. The engine resolves repo@digest through any name of the repository.
const lockedTag = "dstack-locked"

// PullLocked fetches every image of the lock (reference in the compose file ->
// "sha256:<64 hex>") from registry (host:port) by digest, gives it the reference's
// name, and checks that the image store holds exactly that digest under the name.
// Nothing may run before it has returned nil.
//
// Codes: image_pull (not to be had, or its content does not hash to the digest),
// image_digest_mismatch, image_reference.
func PullLocked(ctx context.Context, e images, registry string, lock map[string]string, progress func(string)) error {
	pulled := map[string]bool{}
	for _, ref := range slices.Sorted(maps.Keys(lock)) {
		digest := lock[ref]
		repo, tag, err := splitRef(ref, digest)
		if err != nil {
			return err
		}
		source := registry + "/" + RegistryRepo + "@" + digest
		if !pulled[digest] {
			if err := e.Pull(ctx, source, progress); err != nil {
				return fault.Wrap(err, "image_pull", "image %s (%s) cannot be fetched from the host", ref, digest).
					WithFix("deploy again so that the image is in the host's blob store")
			}
			pulled[digest] = true
		}
		if err := e.Tag(ctx, source, repo, tag); err != nil {
			return fault.Wrap(err, "image_reference", "image %s cannot be named", ref)
		}
		if err := checkDigest(ctx, e, repo+":"+tag, digest); err != nil {
			return err
		}
	}
	return nil
}

// checkDigest compares what the image store holds under ref with digest.
func checkDigest(ctx context.Context, e images, ref, digest string) error {
	img, err := e.Image(ctx, ref)
	if err != nil {
		return fault.Wrap(err, "image_pull", "image %s is not in the image store after it was fetched", ref)
	}
	if img.ID != digest {
		return fault.New("image_digest_mismatch", "image %s is %s in the image store, but the lock says %s", ref, img.ID, digest)
	}
	return nil
}

// splitRef splits a compose reference into the repository and tag to give. A
// digest in the reference must be the lock's.
func splitRef(ref, digest string) (repo, tag string, err error) {
	name, inRef, hasDigest := strings.Cut(ref, "@")
	if hasDigest && inRef != digest {
		return "", "", fault.New("image_digest_mismatch", "the compose file names image %s, but the lock says %s", ref, digest)
	}
	repo, tag = name, "latest"
	if hasDigest {
		tag = lockedTag
	}
	// A colon behind the last slash begins a tag; before it, a port.
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		repo, tag = name[:i], name[i+1:]
	}
	if repo == "" || tag == "" {
		return "", "", fault.New("image_reference", "%q is not an image reference", ref)
	}
	return repo, tag, nil
}
