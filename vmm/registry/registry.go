// SPDX-License-Identifier: Apache-2.0

// Package registry is the read-only container registry that one guest sees on
// its hostlink: the OCI distribution API over exactly the content that its
// manifest's image lock names.
//
// Guarantees: only digests in the closure of the lock are served (the locked
// manifests, the child manifests of an index, their configurations and layers);
// everything else, tags and repository listings included, is 404, so that one
// guest cannot read what another deployed. GET and HEAD only. The content behind
// a digest is untrusted; the guest checks it.
//
// Attacker-controlled: the request (the guest) and the stored manifests (whoever
// deploys), which are parsed with limits.
package registry

import (
	"encoding/json"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/blob"
)

// Limits on stored manifests.
const (
	MaxManifest = 4 << 20 // bytes, as the distribution specification recommends
	maxDepth    = 2       // index -> manifest
	maxDigests  = 4096
)

// Kind tells manifests, which are fetched under /manifests/ with their media
// type, from blobs.
type Kind string

// Kinds of content.
const (
	Manifest Kind = "manifest"
	Blob     Kind = "blob"
)

// Entry is one digest of a closure.
type Entry struct {
	Kind      Kind
	MediaType string // of a manifest
}

// Closure is what a guest may fetch.
type Closure map[blob.Digest]Entry

type descriptor struct {
	Digest string `json:"digest"`
}

type document struct {
	MediaType string       `json:"mediaType"`
	Manifests []descriptor `json:"manifests"`
	Config    *descriptor  `json:"config"`
	Layers    []descriptor `json:"layers"`
}

// Resolve returns the closure of the given manifest digests.
//
// A child of an index may be absent from the store: deploy uploads one platform
// only. Codes: blob_missing (a locked manifest, or something that a present
// manifest needs, is not in the store), image_malformed.
func Resolve(store *blob.Store, locked []blob.Digest) (Closure, error) {
	c := Closure{}
	for _, d := range locked {
		if err := c.add(store, d, 0); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c Closure) add(store *blob.Store, d blob.Digest, depth int) error {
	if c[d].Kind == Manifest {
		return nil
	}
	raw, err := store.Read(d, MaxManifest)
	if err != nil {
		return err
	}
	var doc document
	if err := json.Unmarshal(raw, &doc); err != nil {
		return fault.Wrap(err, "image_malformed", "image manifest %s", d)
	}
	mediaType, err := doc.mediaType()
	if err != nil {
		return fault.Wrap(err, "image_malformed", "image manifest %s", d)
	}
	if len(c)+len(doc.Manifests)+len(doc.Layers) > maxDigests {
		return fault.New("image_malformed", "image %s names more than %d blobs", d, maxDigests)
	}
	c[d] = Entry{Manifest, mediaType}
	present := 0
	for _, m := range doc.Manifests {
		child, err := blob.ParseDigest(m.Digest)
		if err != nil {
			return fault.Wrap(err, "image_malformed", "image index %s", d)
		}
		if !store.Has(child) {
			continue
		}
		present++
		if depth+1 >= maxDepth {
			return fault.New("image_malformed", "image index %s is nested too deeply", d)
		}
		if err := c.add(store, child, depth+1); err != nil {
			return err
		}
	}
	if len(doc.Manifests) > 0 && present == 0 {
		return fault.New("blob_missing", "no image of index %s is in the store", d).WithFix("upload it, as dstack deploy does")
	}
	parts := doc.Layers
	if doc.Config != nil {
		parts = append(parts, *doc.Config)
	}
	for _, p := range parts {
		part, err := blob.ParseDigest(p.Digest)
		if err != nil {
			return fault.Wrap(err, "image_malformed", "image manifest %s", d)
		}
		if !store.Has(part) {
			return fault.New("blob_missing", "blob %s of image %s is not in the store", part, d).WithFix("upload it, as dstack deploy does")
		}
		if _, ok := c[part]; !ok {
			c[part] = Entry{Kind: Blob}
		}
	}
	return nil
}

const (
	typeOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	typeOCIIndex       = "application/vnd.oci.image.index.v1+json"
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
)

func (d document) mediaType() (string, error) {
	isIndex := len(d.Manifests) > 0
	switch d.MediaType {
	case typeOCIManifest, typeDockerManifest:
		if isIndex || d.Config == nil {
			return "", errors.New("it is not what its media type says")
		}
		return d.MediaType, nil
	case typeOCIIndex, typeDockerList:
		if !isIndex {
			return "", errors.New("it is not what its media type says")
		}
		return d.MediaType, nil
	case "": // optional in OCI
		if isIndex {
			return typeOCIIndex, nil
		}
		if d.Config != nil {
			return typeOCIManifest, nil
		}
	}
	return "", errors.New("it is neither an image manifest nor an index")
}

// target matches /v2/<name>/manifests/<ref> and /v2/<name>/blobs/<ref>. The name
// is not looked at further: content is addressed by digest alone.
var target = regexp.MustCompile(`^/v2/[a-z0-9][a-z0-9._/-]{0,254}/(manifests|blobs)/(sha256:[0-9a-f]{64})$`)

// Handler serves the closure. lookup is called per request, so that a guest
// started before its images were resolved sees them once they are.
func Handler(store *blob.Store, lookup func() Closure) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			fail(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
			return
		}
		if r.URL.Path == "/v2/" || r.URL.Path == "/v2" {
			w.Header().Set("Content-Type", "application/json")
			w.Write([]byte("{}"))
			return
		}
		m := target.FindStringSubmatch(r.URL.Path)
		if m == nil {
			fail(w, http.StatusNotFound, "NAME_UNKNOWN", "only content by digest is served")
			return
		}
		d, err := blob.ParseDigest(m[2])
		if err != nil {
			fail(w, http.StatusNotFound, "DIGEST_INVALID", "no such content")
			return
		}
		entry, ok := lookup()[d]
		if !ok || (m[1] == "manifests") != (entry.Kind == Manifest) {
			fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such content in this application's image lock")
			return
		}
		f, _, err := store.Open(d)
		if err != nil {
			fail(w, http.StatusNotFound, "BLOB_UNKNOWN", "no such content")
			return
		}
		defer f.Close()
		w.Header().Set("Content-Type", "application/octet-stream")
		if entry.Kind == Manifest {
			w.Header().Set("Content-Type", entry.MediaType)
		}
		w.Header().Set("Docker-Content-Digest", d.String())
		w.Header().Set("ETag", `"`+d.String()+`"`)
		http.ServeContent(w, r, "", time.Time{}, f)
	})
}

func fail(w http.ResponseWriter, status int, code, message string) {
	body, _ := json.Marshal(map[string]any{"errors": []any{map[string]string{"code": code, "message": message}}})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(body)
}

// Locked returns the digests of an image lock, whose values are "sha256:<hex>".
func Locked(lock map[string]string) ([]blob.Digest, error) {
	var out []blob.Digest
	for ref, text := range lock {
		d, err := blob.ParseDigest(strings.TrimSpace(text))
		if err != nil {
			return nil, fault.Wrap(err, "image_malformed", "image_lock of %q", ref)
		}
		out = append(out, d)
	}
	return out, nil
}
