// SPDX-License-Identifier: Apache-2.0

// Package imagetest makes small releases for tests of what measures images, and
// archives that no builder would make.
package imagetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
)

// Release is a release whose files measure like real ones.
type Release struct {
	Hash   dstack.ImageHash
	Launch measure.Launch // of a VM of 2 GiB
	Sums   []byte         // sha256sum.txt
	TDX    []byte         // measurement.tdx.cbor
	Files  map[string][]byte
}

// New returns a release of the given version, for development or not.
func New(t testing.TB, version string, dev bool) *Release {
	t.Helper()
	l := measuretest.Launch()
	l.MemoryBytes = 2 << 30
	r := &Release{Launch: l}
	var err error
	if r.TDX, err = measure.TDXDocument(l); err != nil {
		t.Fatal(err)
	}
	meta, err := json.Marshal(map[string]any{
		"bios": "ovmf.fd", "kernel": "bzImage", "initrd": "initramfs.cpio.gz", "rootfs": "rootfs.img.parted.verity",
		"cmdline": l.Cmdline, "version": version, "is_dev": dev, "shared_ro": true,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Files = map[string][]byte{"ovmf.fd": l.Firmware, "bzImage": l.Kernel, "initramfs.cpio.gz": l.Initrd, "metadata.json": meta, "measurement.tdx.cbor": r.TDX}
	r.Seal()
	return r
}

// Seal writes sha256sum.txt anew over the files, in upstream's order, and with it
// the hash.
func (r *Release) Seal() {
	var sums bytes.Buffer
	for _, name := range []string{"ovmf.fd", "bzImage", "initramfs.cpio.gz", "metadata.json", "measurement.tdx.cbor"} {
		if data, ok := r.Files[name]; ok {
			fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(data), name)
		}
	}
	r.Sums = sums.Bytes()
	r.Hash = sha256.Sum256(r.Sums)
}

// Archive returns the release as its server has it: mr_<hash>.tar.gz.
func (r *Release) Archive(t testing.TB) []byte {
	t.Helper()
	entries := []Entry{{tar.Header{Name: "./", Typeflag: tar.TypeDir}, ""}}
	names := []string{"sha256sum.txt"}
	for name := range r.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		data := r.Files[name]
		if name == "sha256sum.txt" {
			data = r.Sums
		}
		entries = append(entries, Entry{tar.Header{Name: "./" + name, Typeflag: tar.TypeReg}, string(data)})
	}
	return Archive(t, entries...)
}

// Entry is one entry of an archive; its size is that of Data.
type Entry struct {
	tar.Header
	Data string
}

// Archive returns a tar.gz of the entries, whatever they are.
func Archive(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	for _, e := range entries {
		h := e.Header
		h.Size, h.Mode = int64(len(e.Data)), 0o644
		if h.Typeflag != tar.TypeReg {
			h.Size = 0
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(e.Data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
