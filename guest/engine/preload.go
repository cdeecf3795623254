// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Bounds of one image.
const (
	maxManifest = 4 << 20 // bytes
	maxBlobs    = 1024
	maxBlob     = 64 << 30 // bytes
)

// manifestTypes are the documents that a lock may name.
var manifestTypes = []string{
	"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json",
	"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json",
}

var blobDigest = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// descriptor is a reference to a blob, in an OCI document.
type descriptor struct {
	Digest   string
	Size     int64
	Platform *struct{ OS, Architecture string }
}

// Preload puts what the images of a lock consist of where containerd keeps content,
// each blob whole and hashed here to the digest that leads to it from the lock: nothing
// else ever has a name there. A pull finds it and asks the registry for little more than
// the name. Without that each page of a layer passes from the host through us and a
// connection to the daemon.
//
// The daemon is running. What Preload did not get the pull does, and tells what is
// wrong with it; so an error need not end anything.
//
// Codes: image_manifest, image_digest_mismatch.
func Preload(ctx context.Context, cfg Config, dial func(ctx context.Context) (net.Conn, error), lock map[string]string) error {
	transport := &http.Transport{
		DialContext:  func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
		MaxIdleConns: 1, ResponseHeaderTimeout: 30 * time.Second, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize: 64 << 10,
	}
	defer transport.CloseIdleConnections()
	p := &preload{
		dir:    filepath.Join(cfg.Data, "containerd/io.containerd.content.v1.content/blobs/sha256"),
		nosync: cfg.Nosync, done: map[string]bool{},
		client: &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}
	// The daemon makes it with the first content.
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	parts, err := filepath.Glob(filepath.Join(p.parts(), partial+"*"))
	if err != nil {
		return err
	}
	for _, part := range parts { // of a boot that ended on the way
		if err := os.Remove(part); err != nil {
			return err
		}
	}
	for _, digest := range lock {
		if err := p.image(ctx, digest, 0); err != nil {
			return err
		}
	}
	return nil
}

// partial begins the names of files that are not whole.
const partial = ".preload-"

// parts is where these lie, beside the directory of blobs: the daemon looks only there.
func (p *preload) parts() string { return filepath.Dir(filepath.Dir(p.dir)) }

type preload struct {
	dir    string
	nosync bool
	client *http.Client
	done   map[string]bool
}

// image fetches a manifest, or the one of an index that is for this machine, and its
// blobs.
func (p *preload) image(ctx context.Context, digest string, depth int) error {
	path, err := p.blob(ctx, "manifests", descriptor{Digest: digest, Size: -1}, maxManifest)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var doc struct {
		Manifests, Layers []descriptor
		Config            *descriptor
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		return fault.Wrap(err, "image_manifest", "the manifest %s", digest)
	}
	if depth == 0 {
		for _, m := range doc.Manifests {
			if m.Platform != nil && m.Platform.OS == "linux" && m.Platform.Architecture == runtime.GOARCH {
				return p.image(ctx, m.Digest, 1)
			}
		}
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	for _, d := range blobs {
		if d.Size < 0 {
			return fault.New("image_manifest", "the manifest %s has a blob of %d bytes", digest, d.Size)
		}
		if _, err := p.blob(ctx, "blobs", d, maxBlob); err != nil {
			return err
		}
	}
	return nil
}

// blob fetches one blob into the store unless it is there, and returns its path. A size
// below zero is not known; the blob has at most max bytes.
func (p *preload) blob(ctx context.Context, kind string, d descriptor, max int64) (path string, err error) {
	if !blobDigest.MatchString(d.Digest) || d.Size > max || len(p.done) >= maxBlobs {
		return "", fault.New("image_manifest", "%d blobs, then %q of %d bytes", len(p.done), d.Digest, d.Size)
	}
	want := strings.TrimPrefix(d.Digest, "sha256:")
	path = filepath.Join(p.dir, want)
	if p.done[want] {
		return path, nil
	}
	p.done[want] = true
	switch info, err := os.Lstat(path); {
	case err == nil && info.Mode().IsRegular():
		return path, nil // of an earlier boot, and hashed then: the disk is authenticated
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://registry/v2/"+RegistryRepo+"/"+kind+"/"+d.Digest, nil)
	if err != nil {
		return "", err
	}
	if kind == "manifests" {
		req.Header["Accept"] = manifestTypes
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the host answers %s for %s", resp.Status, d.Digest)
	}
	f, err := os.CreateTemp(p.parts(), partial)
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if d.Size >= 0 {
		max = d.Size
	}
	hash := sha256.New()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(f, hash)}, io.LimitReader(resp.Body, max+1), make([]byte, 256<<10))
	if err != nil {
		return "", err
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != want || n > max || d.Size >= 0 && n != d.Size {
		return "", fault.New("image_digest_mismatch", "the host gave %d bytes that hash to %s for %s", n, got, d.Digest)
	}
	if err := f.Chmod(0o444); err != nil {
		return "", err
	}
	if !p.nosync {
		if err := f.Sync(); err != nil {
			return "", err
		}
	}
	return path, os.Rename(f.Name(), path)
}
