// SPDX-License-Identifier: Apache-2.0

package appimage

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/dstack-go/dstack/internal/fault"
)

// testImage returns an image for a platform with two layers.
func testImage(t *testing.T, arch string) v1.Image {
	t.Helper()
	img, err := random.Image(3000, 2)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

func digest(t *testing.T, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func writeLayout(t *testing.T, add func(layout.Path)) string {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	add(p)
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// check reads every blob and lets another implementation validate the image that
// they make up.
func check(t *testing.T, got *Image) v1.Image {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, empty.Index)
	must(t, err)
	for _, b := range got.Blobs {
		r, err := b.Open()
		must(t, err)
		h, err := v1.NewHash(b.Digest)
		must(t, err)
		must(t, p.WriteBlob(h, r))
		st, err := os.Stat(filepath.Join(dir, "blobs", "sha256", h.Hex))
		must(t, err)
		if st.Size() != b.Size {
			t.Errorf("blob %s has %d bytes, said %d", b.Digest, st.Size(), b.Size)
		}
	}
	h, err := v1.NewHash(got.Digest)
	must(t, err)
	must(t, p.AppendDescriptor(v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: h, Size: got.Blobs[0].Size}))
	img, err := p.Image(h)
	must(t, err)
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Error(err)
	}
	return img
}

func TestOCILayout(t *testing.T) {
	img := testImage(t, "amd64")
	dir := writeLayout(t, func(p layout.Path) { must(t, p.AppendImage(img)) })
	got, err := Load("hello:1", dir)
	must(t, err)
	if got.Digest != digest(t, img) || got.Kind != "oci" || len(got.Blobs) != 4 {
		t.Errorf("%+v, want %s", got, digest(t, img))
	}
	check(t, got)
}

func TestOCILayoutWithSeveralPlatforms(t *testing.T) {
	amd, arm := testImage(t, "amd64"), testImage(t, "arm64")
	platform := func(img v1.Image, os, arch string) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: arch}}}
	}
	dir := writeLayout(t, func(p layout.Path) {
		idx := mutate.AppendManifests(empty.Index, platform(arm, "linux", "arm64"), platform(amd, "linux", "amd64"), platform(testImage(t, "amd64"), "unknown", "unknown"))
		must(t, p.AppendIndex(idx))
	})
	got, err := Load("hello", dir)
	must(t, err)
	if got.Digest != digest(t, amd) {
		t.Errorf("chose %s, want %s", got.Digest, digest(t, amd))
	}
	only := writeLayout(t, func(p layout.Path) {
		must(t, p.AppendIndex(mutate.AppendManifests(empty.Index, platform(arm, "linux", "arm64"))))
	})
	if _, err := Load("hello", only); fault.Code(err) != "app_image_platform" {
		t.Error(err)
	}
}

func TestOCILayoutChoosesByName(t *testing.T) {
	a, b := testImage(t, "amd64"), testImage(t, "amd64")
	dir := writeLayout(t, func(p layout.Path) {
		must(t, p.AppendImage(a, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "docker.io/library/a:latest"})))
		must(t, p.AppendImage(b, layout.WithAnnotations(map[string]string{"io.containerd.image.name": "docker.io/library/b:2"})))
	})
	for ref, want := range map[string]v1.Image{"a": a, "b:2": b} {
		got, err := Load(ref, dir)
		must(t, err)
		if got.Digest != digest(t, want) {
			t.Errorf("%s is %s, want %s", ref, got.Digest, digest(t, want))
		}
	}
	if _, err := Load("c", dir); fault.Code(err) != "app_image_ambiguous" {
		t.Error(err)
	}
}

func saveTar(t *testing.T, images map[string]v1.Image) string {
	t.Helper()
	refs := map[name.Tag]v1.Image{}
	for ref, img := range images {
		tag, err := name.NewTag(ref)
		must(t, err)
		refs[tag] = img
	}
	path := filepath.Join(t.TempDir(), "image.tar")
	must(t, tarball.MultiWriteToFile(path, refs))
	return path
}

// uncompressed returns the image with layers as docker save writes them.
func uncompressed(t *testing.T, img v1.Image) v1.Image {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	cfg, err := img.ConfigFile()
	must(t, err)
	out := v1.Image(empty.Image)
	for _, l := range layers {
		l, err := tarball.LayerFromOpener(l.Uncompressed, tarball.WithMediaType(types.DockerUncompressedLayer))
		must(t, err)
		out, err = mutate.AppendLayers(out, plain{l})
		must(t, err)
	}
	c, err := out.ConfigFile()
	must(t, err)
	c = c.DeepCopy()
	c.OS, c.Architecture = cfg.OS, cfg.Architecture
	out, err = mutate.ConfigFile(out, c)
	must(t, err)
	return out
}

// plain writes a layer as it is, without gzip.
type plain struct{ v1.Layer }

func (p plain) Compressed() (io.ReadCloser, error) { return p.Uncompressed() }
func (p plain) Digest() (v1.Hash, error)           { return p.DiffID() }
func (p plain) Size() (int64, error) {
	r, err := p.Uncompressed()
	if err != nil {
		return 0, err
	}
	return io.Copy(io.Discard, r)
}

func TestDockerSave(t *testing.T) {
	img := uncompressed(t, testImage(t, "amd64"))
	path := saveTar(t, map[string]v1.Image{"hello:1": img, "other:2": uncompressed(t, testImage(t, "amd64"))})
	got, err := Load("hello:1", path)
	must(t, err)
	again, err := Load("docker.io/library/hello:1", path)
	must(t, err)
	if got.Kind != "docker-save" || got.Digest != again.Digest {
		t.Errorf("%+v %+v", got, again)
	}
	loaded := check(t, got)
	want, err := img.ConfigName()
	must(t, err)
	if have, err := loaded.ConfigName(); err != nil || have != want {
		t.Errorf("config %s, want %s: %v", have, want, err)
	}
	if _, err := Load("third", path); fault.Code(err) != "app_image_ambiguous" {
		t.Error(err)
	}
	if _, err := Load("hello", saveTar(t, map[string]v1.Image{"hello": uncompressed(t, testImage(t, "arm64"))})); fault.Code(err) != "app_image_platform" {
		t.Error(err)
	}
}

// tarDir writes the files of a directory, and more, to a tarball.
func tarDir(t *testing.T, dir string, more map[string]string) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	put := func(name string, data []byte) {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o644}))
		_, err := w.Write(data)
		must(t, err)
	}
	must(t, fs.WalkDir(os.DirFS(dir), ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, p))
		if err == nil {
			put(p, data)
		}
		return err
	}))
	for name, data := range more {
		put(name, []byte(data))
	}
	must(t, w.Close())
	path := filepath.Join(t.TempDir(), "image.tar")
	must(t, os.WriteFile(path, buf.Bytes(), 0o600))
	return path
}

// docker 25 and later put an OCI layout into the tarball; its digest is the one
// that a registry would show.
func TestDockerSaveWithOCIIndex(t *testing.T) {
	img := testImage(t, "amd64")
	dir := writeLayout(t, func(p layout.Path) { must(t, p.AppendImage(img)) })
	got, err := Load("hello:1", tarDir(t, dir, map[string]string{"manifest.json": `[{"Config":"x","RepoTags":["hello:1"],"Layers":[]}]`}))
	must(t, err)
	if got.Kind != "oci" || got.Digest != digest(t, img) {
		t.Errorf("%+v, want %s", got, digest(t, img))
	}
	check(t, got)
}

// elfFile makes an ELF64 header with one program header of each given type.
func elfFile(machine uint16, kind uint16, progs ...uint32) []byte {
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	le := binary.LittleEndian
	b = le.AppendUint16(b, kind)
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, 0x400000) // entry
	b = le.AppendUint64(b, 64)       // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, uint16(len(progs)), 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	for _, p := range progs {
		b = le.AppendUint32(b, p)
		b = append(b, make([]byte, 52)...)
	}
	return b
}

var fileTime = time.Unix(1_000_000_000, 0)

const (
	execFile, sharedFile = 2, 3
	amd64, arm64         = 62, 183
	ptLoad, ptInterp     = 1, 3
)

func TestStaticBinary(t *testing.T) {
	dir := t.TempDir()
	data := append(elfFile(amd64, execFile, ptLoad), make([]byte, 1000)...)
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	must(t, os.WriteFile(first, data, 0o755))
	must(t, os.WriteFile(second, data, 0o600))
	must(t, os.Chtimes(second, fileTime, fileTime))
	a, err := Load("hello:1", first)
	must(t, err)
	b, err := Load("other:2", second)
	must(t, err)
	// Pinned: a change of this digest breaks every lock made from a binary.
	// Pinned: a change of this digest breaks every lock that was made from a binary.
	const want = "sha256:e665ea8de64738ecc26b571595a60f1a0b79c1743159aee1edd4cd29cf415400"
	if a.Digest != want || b.Digest != want || a.Kind != "binary" {
		t.Errorf("%s and %s", a.Digest, b.Digest)
	}
	img := check(t, a)
	cfg, err := img.ConfigFile()
	must(t, err)
	if cfg.OS != "linux" || cfg.Architecture != "amd64" || cfg.Config.Entrypoint[0] != "/app" || !cfg.Created.IsZero() {
		t.Errorf("%+v", cfg)
	}
	layers, err := img.Layers()
	must(t, err)
	r, err := layers[0].Uncompressed()
	must(t, err)
	tr := tar.NewReader(r)
	h, err := tr.Next()
	must(t, err)
	body, err := io.ReadAll(tr)
	must(t, err)
	if h.Name != "app" || h.Mode != 0o755 || h.Uid != 0 || h.ModTime.Unix() != 0 || !bytes.Equal(body, data) {
		t.Errorf("%+v", h)
	}
	if _, err := tr.Next(); err != io.EOF {
		t.Errorf("after the binary: %v", err)
	}
}

func TestBinaryOfTheHostIsRefusedOrTaken(t *testing.T) {
	// The test's own binary is static or not as the platform has it; both ways
	// must be decided, not crash.
	self, err := os.Executable()
	must(t, err)
	if _, err := Load("x", self); err != nil && fault.Code(err) != "app_image_not_static" && fault.Code(err) != "app_image_platform" {
		t.Error(err)
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		must(t, os.WriteFile(p, data, 0o600))
		return p
	}
	img := testImage(t, "amd64")
	good := func() string { return writeLayout(t, func(p layout.Path) { must(t, p.AppendImage(img)) }) }
	blob := func(dir, digest string) string {
		return filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
	}
	m, err := img.Manifest()
	must(t, err)
	edit := func(f func(dir string)) string {
		d := good()
		f(d)
		return d
	}
	rewriteIndex := func(dir string, f func(*v1.IndexManifest)) {
		raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
		must(t, err)
		var idx v1.IndexManifest
		must(t, json.Unmarshal(raw, &idx))
		f(&idx)
		raw, err = json.Marshal(idx)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "index.json"), raw, 0o600))
	}
	flip := func(path string) {
		data, err := os.ReadFile(path)
		must(t, err)
		data[len(data)/2] ^= 1
		must(t, os.WriteFile(path, data, 0o600))
	}
	saved, err := os.ReadFile(saveTar(t, map[string]v1.Image{"a": uncompressed(t, img)}))
	must(t, err)

	for _, tc := range []struct{ name, path, code string }{
		{"a path that does not exist", filepath.Join(dir, "none"), "app_image_missing"},
		{"an empty file", file("empty", nil), "app_image_malformed"},
		{"a text file", file("text", []byte("#!/bin/sh\n")), "app_image_malformed"},
		{"an empty directory", t.TempDir(), "app_image_malformed"},
		{"a compressed tarball", file("gz", []byte{0x1f, 0x8b, 8, 0}), "app_image_malformed"},
		{"a Windows program", file("exe", []byte("MZ\x90")), "app_image_platform"},
		{"a dynamic binary", file("dyn", elfFile(amd64, sharedFile, ptLoad, ptInterp)), "app_image_not_static"},
		{"a binary for another machine", file("arm", elfFile(arm64, execFile, ptLoad)), "app_image_platform"},
		{"a core dump", file("core", elfFile(amd64, 4, ptLoad)), "app_image_malformed"},
		{"a damaged binary", file("elf", []byte("\x7fELF\x02\x01\x01")), "app_image_malformed"},
		{"a tarball that breaks off", file("cut", saved[:len(saved)/2+100]), "app_image_malformed"},
		{"a tarball of something else", tarDir(t, t.TempDir(), map[string]string{"x": "y"}), "app_image_malformed"},
		{"a tarball with an entry twice", tarDir(t, good(), map[string]string{"./index.json": "{}"}), "app_image_malformed"},
		{"a layout without oci-layout", edit(func(d string) { must(t, os.Remove(filepath.Join(d, "oci-layout"))) }), "app_image_malformed"},
		{"a layout of another version", edit(func(d string) {
			must(t, os.WriteFile(filepath.Join(d, "oci-layout"), []byte(`{"imageLayoutVersion":"2.0.0"}`), 0o600))
		}), "app_image_malformed"},
		{"an index that is not JSON", edit(func(d string) { must(t, os.WriteFile(filepath.Join(d, "index.json"), []byte(`x`), 0o600)) }), "app_image_malformed"},
		{"an empty index", edit(func(d string) { rewriteIndex(d, func(i *v1.IndexManifest) { i.Manifests = nil }) }), "app_image_malformed"},
		{"an altered manifest", edit(func(d string) { flip(blob(d, digest(t, img))) }), "app_image_malformed"},
		{"an altered config", edit(func(d string) { flip(blob(d, m.Config.Digest.String())) }), "app_image_malformed"},
		{"an altered layer", edit(func(d string) { flip(blob(d, m.Layers[1].Digest.String())) }), "app_image_malformed"},
		{"a missing layer", edit(func(d string) { must(t, os.Remove(blob(d, m.Layers[0].Digest.String()))) }), "app_image_malformed"},
		{"a truncated layer", edit(func(d string) { must(t, os.Truncate(blob(d, m.Layers[0].Digest.String()), 10)) }), "app_image_malformed"},
		{"a manifest of a wrong size", edit(func(d string) { rewriteIndex(d, func(i *v1.IndexManifest) { i.Manifests[0].Size++ }) }), "app_image_malformed"},
		{"a digest that climbs out", edit(func(d string) {
			rewriteIndex(d, func(i *v1.IndexManifest) {
				i.Manifests[0].Digest = v1.Hash{Algorithm: "sha256", Hex: "../../../etc/passwd"}
			})
		}), "app_image_malformed"},
		{"a layer behind a link out of the layout", edit(func(d string) {
			p := blob(d, m.Layers[0].Digest.String())
			data, err := os.ReadFile(p)
			must(t, err)
			must(t, os.Remove(p))
			must(t, os.Symlink(file("outside", data), p))
		}), ""},
		{"a manifest.json that is not JSON", tarDir(t, t.TempDir(), map[string]string{"manifest.json": "x"}), "app_image_malformed"},
		{"a manifest.json without images", tarDir(t, t.TempDir(), map[string]string{"manifest.json": "[]"}), "app_image_malformed"},
		{"a manifest.json without its config", tarDir(t, t.TempDir(), map[string]string{"manifest.json": `[{"Config":"c","Layers":[]}]`}), "app_image_malformed"},
		{"a docker layer that is not the config's", tarDir(t, t.TempDir(), map[string]string{
			"manifest.json": `[{"Config":"c","Layers":["l"]}]`, "l": "layer",
			"c": `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]}}`,
		}), "app_image_malformed"},
		{"a config with more layers than there are", tarDir(t, t.TempDir(), map[string]string{
			"manifest.json": `[{"Config":"c","Layers":[]}]`,
			"c":             `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["sha256:` + strings.Repeat("0", 64) + `"]}}`,
		}), "app_image_malformed"},
		{"a config that is not under its digest", tarDir(t, t.TempDir(), map[string]string{
			"manifest.json": `[{"Config":"` + strings.Repeat("0", 64) + `.json","Layers":[]}]`, strings.Repeat("0", 64) + ".json": `{}`,
		}), "app_image_malformed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Load("a", tc.path)
			if err == nil {
				t.Fatalf("accepted: %+v", got)
			}
			if fault.Code(err) != tc.code {
				t.Errorf("code %q, want %q: %v", fault.Code(err), tc.code, err)
			}
			if tc.code != "" && fault.Fix(err) == "" {
				t.Errorf("no fix: %v", err)
			}
		})
	}
}

// What was checked when it was indexed is checked again when it is read.
func TestBlobThatChangesLaterIsNotRead(t *testing.T) {
	img := testImage(t, "amd64")
	dir := writeLayout(t, func(p layout.Path) { must(t, p.AppendImage(img)) })
	got, err := Load("a", dir)
	must(t, err)
	last := got.Blobs[len(got.Blobs)-1]
	path := filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(last.Digest, "sha256:"))
	data, err := os.ReadFile(path)
	must(t, err)
	for name, changed := range map[string][]byte{
		"altered": append([]byte{data[0] ^ 1}, data[1:]...), "shorter": data[1:], "longer": append(bytes.Clone(data), 0),
	} {
		must(t, os.Chmod(path, 0o600))
		must(t, os.WriteFile(path, changed, 0o600))
		r, err := last.Open()
		must(t, err)
		_, err = io.Copy(io.Discard, r)
		r.Close()
		if fault.Code(err) != "app_image_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(elfFile(amd64, execFile, ptLoad))
	f.Add([]byte{0x1f, 0x8b})
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, data := range map[string]string{
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": `{"schemaVersion":2,"manifests":[]}`, "manifest.json": `[{"Config":"c","Layers":["l"]}]`,
		"c": `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`,
	} {
		if w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644}) == nil {
			w.Write([]byte(data))
		}
	}
	w.Close()
	f.Add(buf.Bytes())
	path := filepath.Join(f.TempDir(), "image")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := Load("a:1", path)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		for _, b := range img.Blobs {
			r, err := b.Open()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				t.Fatal(err)
			}
			r.Close()
		}
	})
}
