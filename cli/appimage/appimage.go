// SPDX-License-Identifier: Apache-2.0

// Package appimage turns what a developer has, namely an OCI layout, the output
// of `docker save` or a static binary, into the digest and blobs of one container
// image for linux/amd64.
//
// The digest goes into the measured manifest, so it depends on content only: an
// OCI image keeps the digest it has; the layers of an older `docker save` are taken
// uncompressed as they are, under their diff ids; and a static binary becomes one
// layer with fixed times and owners. No program is run and nothing is fetched.
//
// Attacker-controlled: the input, which may come from anywhere. Every blob is
// checked against its digest and size when it is indexed and again each time it
// is read; counts and sizes are bounded; a layout is read without leaving its
// directory.
//
// Formats: OCI image layout and image manifest 1.1; docker image specification 1.2
// (save format).
package appimage

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/distribution/reference"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits.
const (
	maxLayers   = 256
	maxDocument = 4 << 20  // bytes of an index, manifest or config
	maxBlob     = 16 << 30 // bytes of a layer
	maxEntries  = 20_000   // of a tarball or an index
	maxIndexes  = 3        // nesting of indexes
	maxBinary   = 1 << 30  // bytes of a static binary
)

// The platform that guests run.
const (
	wantOS   = "linux"
	wantArch = "amd64"
)

// Image is one container image, ready for the blob store.
type Image struct {
	Ref    string // as the compose file has it
	Digest string // of the manifest: "sha256:<64 hex>"
	Blobs  []Blob // manifest, config and layers, each digest once
	Kind   string // what it was made from: oci, docker-save or binary
}

// Size returns the bytes of all blobs together.
func (i *Image) Size() int64 {
	var n int64
	for _, b := range i.Blobs {
		n += b.Size
	}
	return n
}

// Blob is one content-addressed piece of an image.
type Blob struct {
	Digest    string // "sha256:<64 hex>"
	Size      int64  // bytes
	MediaType string

	// Open returns the content. Reading it to the end fails when the content no
	// longer has the digest and size.
	Open func() (io.ReadCloser, error)
}

// Load reads the image that stands for ref from path: a directory in OCI image
// layout, a tarball written by `docker save` (with or without an OCI layout in
// it) or a static ELF binary.
//
// Codes: app_image_missing, app_image_malformed, app_image_platform,
// app_image_not_static, app_image_ambiguous, app_image_too_large.
func Load(ref, path string) (*Image, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("app_image_missing", "%s, from which the image %s was to be taken, does not exist", path, ref).
			WithFix("give an OCI layout, a docker-save tarball or a static binary")
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	l := &loader{ref: ref, path: path, seen: map[string]bool{}}
	switch {
	case st.IsDir():
		l.store, err = openDir(path)
		if err != nil {
			return nil, err
		}
		return l.loadStore()
	case !st.Mode().IsRegular():
		return nil, l.malformed("it is neither a file nor a directory")
	}
	magic := make([]byte, 512)
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	n, _ := io.ReadFull(f, magic)
	f.Close()
	magic = magic[:n]
	switch {
	case bytes.HasPrefix(magic, []byte("\x7fELF")):
		return l.loadBinary(st.Size())
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}), bytes.HasPrefix(magic, []byte("\x28\xb5\x2f\xfd")), bytes.HasPrefix(magic, []byte("\xfd7zXZ")):
		return nil, fault.New("app_image_malformed", "%s is compressed", path).WithFix("decompress it first: gunzip, zstd -d or xz -d")
	case bytes.HasPrefix(magic, []byte("MZ")), bytes.HasPrefix(magic, []byte("\xcf\xfa\xed\xfe")), bytes.HasPrefix(magic, []byte("\xca\xfe\xba\xbe")):
		return nil, fault.New("app_image_platform", "%s is a program for another operating system", path).WithFix("build it for linux/amd64: GOOS=linux GOARCH=amd64 CGO_ENABLED=0 go build")
	case len(magic) == 512 && string(magic[257:262]) == "ustar":
		l.store, err = openTar(path, l)
		if err != nil {
			return nil, err
		}
		return l.loadStore()
	}
	return nil, l.malformed("it is neither an OCI layout, nor a docker-save tarball, nor an ELF binary")
}

type loader struct {
	ref, path string
	store     store
	seen      map[string]bool // digests already among the blobs
	out       Image
}

func (l *loader) malformed(format string, args ...any) error {
	return fault.New("app_image_malformed", "%s cannot be read as image %s: %s", l.path, l.ref, fmt.Sprintf(format, args...)).
		WithFix("write it again, such as with `docker save -o %s.tar %s`", "image", l.ref)
}

func (l *loader) platform(found string) error {
	return fault.New("app_image_platform", "%s has no image for %s/%s, only %s", l.path, wantOS, wantArch, found).
		WithFix("build with --platform %s/%s", wantOS, wantArch)
}

// store is a tree of files by slash-separated name.
type store interface {
	// size returns a file's size, or fs.ErrNotExist.
	size(name string) (int64, error)
	open(name string) (io.ReadCloser, error)
}

// document reads a small file whole.
func (l *loader) document(name string) ([]byte, error) {
	n, err := l.store.size(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, l.malformed("it lacks %s", name)
	}
	if err != nil {
		return nil, err
	}
	if n > maxDocument {
		return nil, fault.New("app_image_too_large", "%s of %s has %d bytes, more than %d", name, l.path, n, maxDocument)
	}
	r, err := l.store.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, maxDocument+1))
}

func blobName(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }

// documentBlob reads and verifies a small blob and adds it to the image.
func (l *loader) documentBlob(d v1.Descriptor) ([]byte, error) {
	if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != 64 {
		return nil, l.malformed("digest %.80q is not SHA-256", d.Digest.String())
	}
	data, err := l.document(blobName(d.Digest.String()))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != d.Size {
		return nil, l.malformed("blob %s has %d bytes, want %d", d.Digest, len(data), d.Size)
	}
	if got := digestOf(data); got != d.Digest.String() {
		return nil, l.malformed("blob %s hashes to %s", d.Digest, got)
	}
	return data, nil
}

func (l *loader) addBytes(mediaType types.MediaType, data []byte) string {
	digest := digestOf(data)
	l.add(Blob{Digest: digest, Size: int64(len(data)), MediaType: string(mediaType), Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(data)), nil
	}})
	return digest
}

func (l *loader) add(b Blob) {
	if l.seen[b.Digest] {
		return
	}
	l.seen[b.Digest] = true
	inner := b.Open
	b.Open = func() (io.ReadCloser, error) {
		r, err := inner()
		if err != nil {
			return nil, err
		}
		return &verifiedReader{r: r, h: sha256.New(), digest: b.Digest, size: b.Size, fail: l.malformed}, nil
	}
	l.out.Blobs = append(l.out.Blobs, b)
}

// loadStore reads a layout or a docker-save tree.
func (l *loader) loadStore() (*Image, error) {
	if _, err := l.store.size("index.json"); err == nil {
		if _, err := l.store.size("oci-layout"); err != nil {
			return nil, l.malformed("it has index.json but no oci-layout")
		}
		return l.loadOCI()
	}
	if _, err := l.store.size("manifest.json"); err == nil {
		return l.loadDocker()
	}
	return nil, l.malformed("it has neither index.json (OCI layout) nor manifest.json (docker save)")
}

func (l *loader) loadOCI() (*Image, error) {
	raw, err := l.document("oci-layout")
	if err != nil {
		return nil, err
	}
	var layout struct {
		Version string `json:"imageLayoutVersion"`
	}
	if json.Unmarshal(raw, &layout) != nil || layout.Version != "1.0.0" {
		return nil, l.malformed("oci-layout has version %.20q, want 1.0.0", layout.Version)
	}
	if raw, err = l.document("index.json"); err != nil {
		return nil, err
	}
	d, err := l.choose(raw, true)
	if err != nil {
		return nil, err
	}
	for depth := 0; d.MediaType.IsIndex(); depth++ {
		if depth == maxIndexes {
			return nil, l.malformed("indexes nest deeper than %d", maxIndexes)
		}
		if raw, err = l.documentBlob(d); err != nil {
			return nil, err
		}
		if d, err = l.choose(raw, false); err != nil {
			return nil, err
		}
	}
	if !d.MediaType.IsImage() {
		return nil, l.malformed("media type %.80q is not that of an image", d.MediaType)
	}
	if raw, err = l.documentBlob(d); err != nil {
		return nil, err
	}
	m, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil || m.SchemaVersion != 2 {
		return nil, l.malformed("manifest %s does not parse: %v", d.Digest, err)
	}
	config, err := l.documentBlob(m.Config)
	if err != nil {
		return nil, err
	}
	diffIDs, err := l.config(config)
	if err != nil {
		return nil, err
	}
	if len(m.Layers) != len(diffIDs) || len(m.Layers) > maxLayers {
		return nil, l.malformed("%d layers for %d diff ids", len(m.Layers), len(diffIDs))
	}
	l.out.Ref, l.out.Kind = l.ref, "oci"
	l.out.Digest = l.addBytes(d.MediaType, raw)
	l.addBytes(m.Config.MediaType, config)
	for _, layer := range m.Layers {
		if !layer.MediaType.IsLayer() || !layer.MediaType.IsDistributable() {
			return nil, l.malformed("layer %s has media type %.80q", layer.Digest, layer.MediaType)
		}
		if layer.Digest.Algorithm != "sha256" || len(layer.Digest.Hex) != 64 {
			return nil, l.malformed("digest %.80q is not SHA-256", layer.Digest.String())
		}
		name := blobName(layer.Digest.String())
		if err := l.addFile(name, layer.Digest.String(), layer.Size, layer.MediaType); err != nil {
			return nil, err
		}
	}
	return &l.out, nil
}

// addFile adds a layer that lies in the store, after hashing it.
func (l *loader) addFile(name, digest string, size int64, mediaType types.MediaType) error {
	n, err := l.store.size(name)
	if errors.Is(err, fs.ErrNotExist) {
		return l.malformed("it lacks the layer %s", name)
	}
	if err != nil {
		return err
	}
	if n > maxBlob {
		return fault.New("app_image_too_large", "layer %s of %s has %d bytes, more than %d", digest, l.path, n, int64(maxBlob))
	}
	if n != size {
		return l.malformed("layer %s has %d bytes, want %d", digest, n, size)
	}
	l.add(Blob{Digest: digest, Size: size, MediaType: string(mediaType), Open: func() (io.ReadCloser, error) { return l.store.open(name) }})
	r, err := l.out.Blobs[len(l.out.Blobs)-1].Open()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(io.Discard, r)
	return err
}

// choose picks one descriptor of an index: at the top the one that is named ref
// (or the only one), below that the one for our platform.
func (l *loader) choose(raw []byte, top bool) (v1.Descriptor, error) {
	var none v1.Descriptor
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil || index.SchemaVersion != 2 {
		return none, l.malformed("an index does not parse: %v", err)
	}
	if len(index.Manifests) > maxEntries {
		return none, l.malformed("an index has %d entries", len(index.Manifests))
	}
	var images, named []v1.Descriptor
	var others []string
	for _, d := range index.Manifests {
		if p := d.Platform; p != nil && (p.OS != wantOS || p.Architecture != wantArch) {
			// BuildKit's attestations carry unknown/unknown.
			if p.OS != "unknown" {
				others = append(others, p.String())
			}
			continue
		}
		if !d.MediaType.IsIndex() && !d.MediaType.IsImage() {
			continue
		}
		images = append(images, d)
		for _, key := range []string{"io.containerd.image.name", "org.opencontainers.image.ref.name"} {
			if n := d.Annotations[key]; n != "" && sameRef(n, l.ref) {
				named = append(named, d)
				break
			}
		}
	}
	pick := images
	if top && len(named) > 0 {
		pick = named
	}
	// The same image may be listed once for each of its names.
	distinct := map[v1.Hash]v1.Descriptor{}
	for _, d := range pick {
		distinct[d.Digest] = d
	}
	switch {
	case len(distinct) == 1:
		return pick[0], nil
	case len(distinct) == 0 && len(others) > 0:
		return none, l.platform(strings.Join(others, ", "))
	case len(distinct) == 0:
		return none, l.malformed("an index lists no image")
	}
	return none, fault.New("app_image_ambiguous", "%s holds %d images, and none or several of them are named %s", l.path, len(distinct), l.ref).
		WithFix("save just the one: docker save -o image.tar %s", l.ref)
}

// sameRef compares references as docker writes them: hello:1 is
// docker.io/library/hello:1, and no tag means latest.
func sameRef(a, b string) bool {
	x, err := reference.ParseNormalizedNamed(a)
	if err != nil {
		return false
	}
	y, err := reference.ParseNormalizedNamed(b)
	if err != nil {
		return false
	}
	return reference.TagNameOnly(x).String() == reference.TagNameOnly(y).String()
}

// config checks an image's configuration and returns the digests of its
// uncompressed layers.
func (l *loader) config(raw []byte) ([]v1.Hash, error) {
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, l.malformed("the image's config does not parse: %v", err)
	}
	if c.OS != wantOS || c.Architecture != wantArch {
		return nil, l.platform(c.OS + "/" + c.Architecture)
	}
	if c.RootFS.Type != "layers" {
		return nil, l.malformed("rootfs of type %.40q", c.RootFS.Type)
	}
	return c.RootFS.DiffIDs, nil
}

// loadDocker reads the save format of docker before 25, and of other tools:
// manifest.json names a config and the uncompressed layers.
func (l *loader) loadDocker() (*Image, error) {
	raw, err := l.document("manifest.json")
	if err != nil {
		return nil, err
	}
	var images []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(raw, &images); err != nil {
		return nil, l.malformed("manifest.json: %v", err)
	}
	chosen := -1
	for i, img := range images {
		for _, tag := range img.RepoTags {
			if sameRef(tag, l.ref) {
				chosen = i
			}
		}
	}
	switch {
	case len(images) == 0:
		return nil, l.malformed("manifest.json lists no image")
	case chosen < 0 && len(images) > 1:
		return nil, fault.New("app_image_ambiguous", "%s holds %d images, none of which is named %s", l.path, len(images), l.ref).
			WithFix("save just the one: docker save -o image.tar %s", l.ref)
	case chosen < 0:
		chosen = 0
	}
	img := images[chosen]
	config, err := l.document(img.Config)
	if err != nil {
		return nil, err
	}
	// docker names the config by its digest; hold it to that.
	if h := strings.TrimSuffix(img.Config[strings.LastIndexByte(img.Config, '/')+1:], ".json"); len(h) == 64 && "sha256:"+h != digestOf(config) {
		return nil, l.malformed("config %s hashes to %s", img.Config, digestOf(config))
	}
	diffIDs, err := l.config(config)
	if err != nil {
		return nil, err
	}
	if len(diffIDs) != len(img.Layers) || len(diffIDs) > maxLayers {
		return nil, l.malformed("%d layers for %d diff ids", len(img.Layers), len(diffIDs))
	}
	var layers []Blob
	for i, name := range img.Layers {
		size, err := l.store.size(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, l.malformed("it lacks the layer %.120q", name)
		}
		if err != nil {
			return nil, err
		}
		layers = append(layers, Blob{Digest: diffIDs[i].String(), Size: size, MediaType: string(types.OCIUncompressedLayer), Open: func() (io.ReadCloser, error) { return l.store.open(name) }})
	}
	l.out.Kind = "docker-save"
	return l.assemble(config, layers)
}

// assemble writes an OCI manifest over a config and uncompressed layers. The
// layers are added without compression: gzip's output depends on who compresses,
// and the digest must not.
func (l *loader) assemble(config []byte, layers []Blob) (*Image, error) {
	m := v1.Manifest{
		SchemaVersion: 2, MediaType: types.OCIManifestSchema1,
		Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Size: int64(len(config)), Digest: hashOf(digestOf(config))},
		Layers: []v1.Descriptor{},
	}
	for _, b := range layers {
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: types.OCIUncompressedLayer, Size: b.Size, Digest: hashOf(b.Digest)})
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", l.ref, err)
	}
	l.out.Ref = l.ref
	l.out.Digest = l.addBytes(types.OCIManifestSchema1, raw)
	l.addBytes(types.OCIConfigJSON, config)
	for _, b := range layers {
		if b.Size > maxBlob {
			return nil, fault.New("app_image_too_large", "layer %s of %s has %d bytes, more than %d", b.Digest, l.path, b.Size, int64(maxBlob))
		}
		before := len(l.out.Blobs)
		l.add(b)
		if len(l.out.Blobs) == before {
			continue
		}
		r, err := l.out.Blobs[before].Open()
		if err != nil {
			return nil, err
		}
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if err != nil {
			return nil, err
		}
	}
	return &l.out, nil
}

func hashOf(digest string) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: strings.TrimPrefix(digest, "sha256:")}
}

func digestOf(data []byte) string {
	h := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(h[:])
}
