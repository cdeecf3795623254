// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/blob"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

type world struct {
	t     *testing.T
	store *blob.Store
}

func newWorld(t *testing.T) world {
	s, err := blob.Open(t.TempDir(), 1<<20, 0)
	if err != nil {
		t.Fatal(err)
	}
	return world{t, s}
}

func (w world) put(data string) blob.Digest {
	w.t.Helper()
	d := blob.Digest(sha256.Sum256([]byte(data)))
	if err := w.store.Put(d, strings.NewReader(data)); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w world) json(v any) blob.Digest {
	w.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.put(string(b))
}

type m = map[string]any

func (w world) image(seed string) (manifest, config, layer blob.Digest) {
	config, layer = w.put(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"seed":"`+seed+`"}`), w.put("layer "+seed)
	manifest = w.json(m{"schemaVersion": 2, "mediaType": typeOCIManifest,
		"config": m{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.String(), "size": 1},
		"layers": []m{{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer.String(), "size": len("layer " + seed)}}})
	return
}

func TestOnlyTheClosureIsServed(t *testing.T) {
	w := newWorld(t)
	mine, config, layer := w.image("mine")
	other, otherConfig, otherLayer := w.image("other")
	absent := blob.Digest(sha256.Sum256([]byte("absent")))
	index := w.json(m{"mediaType": typeOCIIndex, "manifests": []m{{"digest": mine.String()}, {"digest": absent.String()}}})
	closure, err := Resolve(w.store, []blob.Digest{index})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(Handler(w.store, func() Closure { return closure }))
	defer srv.Close()
	get := func(method, path string) (int, string) {
		req, _ := http.NewRequest(method, srv.URL+path, nil)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		io.Copy(io.Discard, res.Body)
		return res.StatusCode, res.Header.Get("Content-Type")
	}
	for _, tc := range []struct {
		name, method, path string
		status             int
	}{
		{"version check", "GET", "/v2/", 200},
		{"locked index", "GET", "/v2/app/manifests/" + index.String(), 200},
		{"child manifest", "HEAD", "/v2/app/manifests/" + mine.String(), 200},
		{"configuration", "GET", "/v2/app/blobs/" + config.String(), 200},
		{"layer under any name", "GET", "/v2/library/app/blobs/" + layer.String(), 200},
		{"another app's manifest", "GET", "/v2/app/manifests/" + other.String(), 404},
		{"another app's configuration", "GET", "/v2/app/blobs/" + otherConfig.String(), 404},
		{"another app's layer", "GET", "/v2/app/blobs/" + otherLayer.String(), 404},
		{"child that was not uploaded", "GET", "/v2/app/manifests/" + absent.String(), 404},
		{"manifest as a blob", "GET", "/v2/app/blobs/" + mine.String(), 404},
		{"layer as a manifest", "GET", "/v2/app/manifests/" + layer.String(), 404},
		{"tag", "GET", "/v2/app/manifests/latest", 404},
		{"tag list", "GET", "/v2/app/tags/list", 404},
		{"catalogue", "GET", "/v2/_catalog", 404},
		{"traversal", "GET", "/v2/app/blobs/..%2f..%2fetc%2fpasswd", 404},
		{"upload", "POST", "/v2/app/blobs/uploads/", 405},
		{"delete", "DELETE", "/v2/app/blobs/" + layer.String(), 405},
		{"root", "GET", "/", 404},
	} {
		if status, _ := get(tc.method, tc.path); status != tc.status {
			t.Errorf("%s: %d, want %d", tc.name, status, tc.status)
		}
	}
	if _, ct := get("GET", "/v2/app/manifests/"+mine.String()); ct != typeOCIManifest {
		t.Errorf("media type %q", ct)
	}
	req, _ := http.NewRequest("GET", srv.URL+"/v2/app/blobs/"+layer.String(), nil)
	req.Header.Set("Range", "bytes=6-")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, _ := io.ReadAll(res.Body); res.StatusCode != 206 || string(b) != "mine" {
		t.Errorf("range: %d %q", res.StatusCode, b)
	}
}

// An independent client pulls through it.
func TestGoContainerRegistryPulls(t *testing.T) {
	w := newWorld(t)
	mine, _, _ := w.image("mine")
	closure, err := Resolve(w.store, []blob.Digest{mine})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(Handler(w.store, func() Closure { return closure }))
	defer srv.Close()
	ref, err := name.NewDigest(strings.TrimPrefix(srv.URL, "http://")+"/app@"+mine.String(), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	rc, err := layers[0].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(rc); err != nil || !bytes.Equal(b, []byte("layer mine")) {
		t.Fatalf("%q %v", b, err)
	}
}

func TestWhatCannotBeServedIsNamed(t *testing.T) {
	w := newWorld(t)
	mine, config, layer := w.image("x")
	absent := blob.Digest(sha256.Sum256([]byte("absent"))).String()
	for _, tc := range []struct {
		name string
		d    blob.Digest
		code string
	}{
		{"manifest that is not there", blob.Digest{1}, "blob_missing"},
		{"layer that is not there", w.json(m{"config": m{"digest": config.String()}, "layers": []m{{"digest": absent}}}), "blob_missing"},
		{"index of nothing that is there", w.json(m{"manifests": []m{{"digest": absent}}}), "blob_missing"},
		{"not JSON", layer, "image_malformed"},
		{"neither manifest nor index", w.put("{}"), "image_malformed"},
		{"index that says it is a manifest", w.json(m{"mediaType": typeOCIManifest, "manifests": []m{{"digest": mine.String()}}}), "image_malformed"},
		{"unknown media type", w.json(m{"mediaType": "text/html", "config": m{"digest": config.String()}}), "image_malformed"},
		{"malformed digest", w.json(m{"config": m{"digest": "sha256:../../../etc/passwd"}}), "image_malformed"},
		{"index of an index of an index", w.json(m{"manifests": []m{{"digest": w.json(m{"manifests": []m{{"digest": w.json(m{"manifests": []m{{"digest": mine.String()}}}).String()}}}).String()}}}), "image_malformed"},
	} {
		if _, err := Resolve(w.store, []blob.Digest{tc.d}); fault.Code(err) != tc.code {
			t.Errorf("%s: %q %v", tc.name, fault.Code(err), err)
		}
	}
	many := make([]m, maxDigests+1)
	for i := range many {
		many[i] = m{"digest": blob.Digest(sha256.Sum256(fmt.Append(nil, i))).String()}
	}
	if _, err := Resolve(w.store, []blob.Digest{w.json(m{"config": m{"digest": config.String()}, "layers": many})}); fault.Code(err) != "image_malformed" {
		t.Errorf("too many layers: %v", err)
	}
}

func TestLocked(t *testing.T) {
	if _, err := Locked(map[string]string{"nginx": "latest"}); fault.Code(err) != "image_malformed" {
		t.Fatal(err)
	}
}

func FuzzResolve(f *testing.F) {
	store, err := blob.Open(f.TempDir(), 1<<20, 0)
	if err != nil {
		f.Fatal(err)
	}
	config := `{}`
	d := blob.Digest(sha256.Sum256([]byte(config)))
	if err := store.Put(d, strings.NewReader(config)); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(`{"mediaType":"` + typeOCIManifest + `","config":{"digest":"` + d.String() + `"},"layers":[]}`))
	f.Add([]byte(`{"manifests":[{"digest":"` + d.String() + `"}]}`))
	f.Add([]byte(`{"config":{"digest":"sha256:x"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		self := blob.Digest(sha256.Sum256(data))
		if err := store.Put(self, bytes.NewReader(data)); err != nil {
			t.Skip()
		}
		c, err := Resolve(store, []blob.Digest{self})
		if err != nil {
			return
		}
		for d, e := range c {
			if !store.Has(d) || e.Kind == Manifest && e.MediaType == "" {
				t.Fatalf("%s: %+v", d, e)
			}
		}
	})
}
