// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

// imageHost answers as the host's registry does, with what it was given under a name.
type imageHost struct {
	mu     sync.Mutex
	blobs  map[string]string // digest -> what is given for it
	asked  []string
	server *httptest.Server
}

func newImageHost(t *testing.T) *imageHost {
	t.Helper()
	h := &imageHost{blobs: map[string]string{}}
	h.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		defer h.mu.Unlock()
		digest := path.Base(r.URL.Path)
		h.asked = append(h.asked, digest)
		content, ok := h.blobs[digest]
		if !ok {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(content))
	}))
	t.Cleanup(h.server.Close)
	return h
}

func (h *imageHost) dial(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "tcp", h.server.Listener.Addr().String())
}

func hashed(content string) string {
	sum := sha256.Sum256([]byte(content))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func (h *imageHost) add(content string) (digest string) {
	digest = hashed(content)
	h.blobs[digest] = content
	return digest
}

// image adds an image of one layer and returns its manifest's digest.
func (h *imageHost) image(layer string) string {
	config := `{"os":"linux"}` + layer
	return h.add(fmt.Sprintf(`{"config":{"digest":%q,"size":%d},"layers":[{"digest":%q,"size":%d}]}`, h.add(config), len(config), h.add(layer), len(layer)))
}

// stored returns the digests in containerd's store of content, and fails when a file
// is not what its name says, or one lies beside the store.
func stored(t *testing.T, cfg Config) (digests []string) {
	t.Helper()
	root := filepath.Join(cfg.Data, "containerd/io.containerd.content.v1.content")
	names, err := filepath.Glob(filepath.Join(root, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if digest := "sha256:" + filepath.Base(name); hashed(string(content)) != digest {
			t.Errorf("%s is in the store with other content", digest)
		} else {
			digests = append(digests, digest)
		}
	}
	if rest, _ := filepath.Glob(filepath.Join(root, ".*")); len(rest) > 0 {
		t.Errorf("%q are left", rest)
	}
	slices.Sort(digests)
	return digests
}

func TestPreload(t *testing.T) {
	h, cfg := newImageHost(t), Config{Data: t.TempDir()}
	plain := h.image("one layer")
	other := h.image("of another machine")
	mine := h.image("of this machine")
	index := h.add(fmt.Sprintf(`{"manifests":[{"digest":%q,"size":1,"platform":{"os":"linux","architecture":"mips"}},`+
		`{"digest":%q,"size":1,"platform":{"os":"linux","architecture":"amd64"}}]}`, other, mine))
	h.add("nothing that an image needs")
	part := filepath.Join(cfg.Data, "containerd/io.containerd.content.v1.content", partial+"1")
	if err := os.MkdirAll(filepath.Dir(part), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(part, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	lock := map[string]string{"a": plain, "b": index, "c": plain}
	if err := Preload(context.Background(), cfg, h.dial, lock); err != nil {
		t.Fatal(err)
	}
	got := stored(t, cfg)
	if len(got) != 7 || !slices.Contains(got, plain) || !slices.Contains(got, index) || !slices.Contains(got, mine) || slices.Contains(got, other) {
		t.Errorf("the store has %q", got)
	}
	asked := len(h.asked)
	if err := Preload(context.Background(), cfg, h.dial, lock); err != nil || asked != 7 || len(h.asked) != asked {
		t.Errorf("%d requests, and %d more when all is there, %v", asked, len(h.asked)-asked, err)
	}
}

func TestThreat_J01_PreloadStoresNothingButTheLock(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(h *imageHost, manifest, layer string) (lock string)
		code  string
	}{
		"another manifest": {func(h *imageHost, manifest, _ string) string {
			h.blobs[manifest] = h.blobs[h.image("evil")]
			return manifest
		}, "image_digest_mismatch"},
		"another layer":   {func(h *imageHost, m, layer string) string { h.blobs[layer] = "THE LAYER"; return m }, "image_digest_mismatch"},
		"a longer layer":  {func(h *imageHost, m, layer string) string { h.blobs[layer] += "x"; return m }, "image_digest_mismatch"},
		"a shorter layer": {func(h *imageHost, m, layer string) string { h.blobs[layer] = "the"; return m }, "image_digest_mismatch"},
		"no layer":        {func(h *imageHost, m, layer string) string { delete(h.blobs, layer); return m }, ""},
		"a path": {func(h *imageHost, _, _ string) string {
			return h.add(`{"layers":[{"digest":"sha256:../../../x","size":1}]}`)
		}, "image_manifest"},
		"no digest": {func(*imageHost, string, string) string { return "latest" }, "image_manifest"},
		"a size below zero": {func(h *imageHost, _, layer string) string {
			return h.add(fmt.Sprintf(`{"layers":[{"digest":%q,"size":-1}]}`, layer))
		}, "image_manifest"},
		"another size": {func(h *imageHost, _, layer string) string {
			return h.add(fmt.Sprintf(`{"layers":[{"digest":%q,"size":1}]}`, layer))
		}, "image_digest_mismatch"},
		"no JSON": {func(h *imageHost, _, _ string) string { return h.add("x") }, "image_manifest"},
	} {
		t.Run(name, func(t *testing.T) {
			h, cfg := newImageHost(t), Config{Data: t.TempDir()}
			manifest := h.image("the layer")
			locked := c.spoil(h, manifest, hashed("the layer"))
			err := Preload(context.Background(), cfg, h.dial, map[string]string{"app": locked})
			if err == nil || fault.Code(err) != c.code {
				t.Errorf("%v, want code %q", err, c.code)
			}
			for _, d := range stored(t, cfg) {
				if d == hashed("evil") || d == hashed("THE LAYER") {
					t.Errorf("%s got into the store", d)
				}
			}
		})
	}
}
