// SPDX-License-Identifier: Apache-2.0

package appimage

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/dstack-go/dstack/internal/fault"
)

// binaryPath is where the binary lies in its image.
const binaryPath = "app"

// loadBinary wraps a static binary: one layer that holds /app with mode 0755,
// owner 0:0 and the time 0, and a config that starts it.
func (l *loader) loadBinary(size int64) (*Image, error) {
	if size > maxBinary {
		return nil, fault.New("app_image_too_large", "%s has %d bytes, more than %d", l.path, size, maxBinary)
	}
	if err := l.checkELF(); err != nil {
		return nil, err
	}
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	if err := w.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: binaryPath, Mode: 0o755, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR,
	}); err != nil {
		return nil, fmt.Errorf("image %s: %w", l.ref, err)
	}
	// The content is padded to 512 bytes; two empty blocks end the archive.
	tail := make([]byte, (512-size%512)%512+1024)
	open := func() (io.ReadCloser, error) {
		f, err := os.Open(l.path)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.MultiReader(bytes.NewReader(head.Bytes()), f, bytes.NewReader(tail)), f}, nil
	}
	r, err := open()
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	n, err := io.Copy(h, r)
	r.Close()
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", l.ref, err)
	}
	if want := int64(head.Len()) + size + int64(len(tail)); n != want {
		return nil, l.malformed("it changed while it was read")
	}
	layer := Blob{Digest: "sha256:" + hex.EncodeToString(h.Sum(nil)), Size: n, Open: open}
	config, err := json.Marshal(v1.ConfigFile{
		Architecture: wantArch, OS: wantOS,
		Config: v1.Config{Entrypoint: []string{"/" + binaryPath}, Env: []string{"PATH=/"}, WorkingDir: "/"},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{hashOf(layer.Digest)}},
	})
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", l.ref, err)
	}
	l.out.Kind = "binary"
	return l.assemble(config, []Blob{layer})
}

// checkELF demands a 64-bit x86 program that needs no interpreter and no library:
// the image will hold nothing else.
func (l *loader) checkELF() error {
	f, err := elf.Open(l.path)
	if err != nil {
		return l.malformed("it is a damaged ELF file: %v", err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fault.New("app_image_platform", "%s is a program for %s (%s), not for linux/amd64", l.path, f.Machine, f.Class).
			WithFix("build it for linux/amd64: GOOS=linux GOARCH=amd64 CGO_ENABLED=0 go build")
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return l.malformed("it is an ELF file of type %s, not a program", f.Type)
	}
	if f.Entry == 0 {
		return l.malformed("it is a library, not a program")
	}
	dynamic := fault.New("app_image_not_static", "%s is not static: it needs a dynamic linker or libraries, which the image would not have", l.path).
		WithFix("link it statically (Go: CGO_ENABLED=0 go build; Rust: --target x86_64-unknown-linux-musl; C: -static), or give a whole image")
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return dynamic
		}
	}
	if libs, err := f.ImportedLibraries(); err == nil && len(libs) > 0 {
		return dynamic
	}
	return nil
}
