// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// TDXDocumentName is the name of the document in an image and in its
// sha256sum.txt.
const TDXDocumentName = "measurement.tdx.cbor"

// Limits on split measurement material.
const (
	maxDocument     = 64 << 10
	maxChecksumFile = 64 << 10
)

// upstreamCFV is the digest of the configuration volume of upstream's firmware,
// which a document of version 3 without "cfv_sha384" stands for.
var upstreamCFV = dstack.Measurement{
	0x34, 0x4b, 0xc5, 0x1c, 0x98, 0x0b, 0xa6, 0x21, 0xaa, 0xa0, 0x0d, 0xa3, 0xed, 0x74, 0x36, 0xf7,
	0xd6, 0xe5, 0x49, 0x19, 0x7d, 0xfe, 0x69, 0x95, 0x15, 0xdf, 0xa2, 0xc6, 0x58, 0x3d, 0x95, 0xe6,
	0x41, 0x2a, 0xf2, 0x1c, 0x09, 0x7d, 0x47, 0x31, 0x55, 0x87, 0x5f, 0xfd, 0x56, 0x1d, 0x67, 0x90,
}

// Document is the content of measurement.tdx.cbor, version 3: what a verifier
// needs of an image to derive the registers of the VM shapes for which the kernel
// is patched alike ([KernelIsConstant]), and for some small ones (spec/measurement.md §7).
type Document struct {
	Cmdline    dstack.Measurement // SHA-384 of the command line as measured
	Kernel     dstack.Measurement // Authenticode SHA-384 of the patched kernel
	Initrd     dstack.Measurement // SHA-384
	SinglePass dstack.Measurement // MRTD
	TwoPass    dstack.Measurement // MRTD in the page order of QEMU 8
	HOB        HOBLayout
	// CFV is the SHA-384 of the firmware's configuration volume. Upstream's
	// documents do not carry it, since all their images have one firmware; ours has
	// the additional key "cfv_sha384" in "tdvf" when it differs, which upstream's
	// decoders ignore.
	CFV dstack.Measurement
	// Small are the kernel's digests for small memories, which upstream's documents do
	// not carry; ours has them as the additional key "kernel_authenticode_mib" in
	// "image".
	Small []SmallKernel
}

// SmallKernel is the Authenticode SHA-384 of the kernel as a VM with so much memory
// gets it.
type SmallKernel struct {
	MiB    uint64
	Digest dstack.Measurement
}

// smallMemories are those for which a document of ours has the kernel's digest, in MiB.
var smallMemories = []uint64{512, 768, 1024, 1536}

// The CBOR form. Field order is the order on the wire.
type (
	wireDocument struct {
		Version uint64    `cbor:"version"`
		Image   wireImage `cbor:"image"`
		TDVF    wireTDVF  `cbor:"tdvf"`
	}
	wireImage struct {
		Cmdline []byte `cbor:"cmdline_sha384"`
		Kernel  []byte `cbor:"kernel_authenticode"`
		Initrd  []byte `cbor:"initrd_sha384"`

		Small []wireSmall `cbor:"kernel_authenticode_mib,omitempty"`
	}
	wireSmall struct {
		_      struct{} `cbor:",toarray"`
		MiB    uint64
		Digest []byte
	}
	wireTDVF struct {
		OVMF string   `cbor:"ovmf"`
		MRTD wireMRTD `cbor:"mrtd"`
		HOB  []byte   `cbor:"td_hob"`
		CFV  []byte   `cbor:"cfv_sha384,omitempty"`
	}
	wireMRTD struct {
		SinglePass []byte `cbor:"single_pass"`
		TwoPass    []byte `cbor:"two_pass"`
	}
)

const ovmfPre202505 = "pre202505"

// TDXDocument returns the document of an image: its firmware, kernel, initrd and
// command line. The VM's shape in l is not looked at.
func TDXDocument(l Launch) ([]byte, error) {
	f, err := newFacts(l)
	if err != nil {
		return nil, err
	}
	kernel, err := PatchKernel(l.Kernel, len(l.Initrd), highSplit)
	if err != nil {
		return nil, err
	}
	if f.kernel, err = kernelDigest(kernel); err != nil {
		return nil, err
	}
	d := &Document{
		Cmdline: f.cmdline, Kernel: f.kernel, Initrd: f.initrd,
		SinglePass: f.singlePass, TwoPass: f.twoPass, HOB: f.hob, CFV: f.cfv,
	}
	for _, mib := range smallMemories {
		kernel, err := PatchKernel(l.Kernel, len(l.Initrd), mib<<20)
		if err != nil {
			continue // the initrd does not fit
		}
		digest, err := kernelDigest(kernel)
		if err != nil {
			return nil, err
		}
		d.Small = append(d.Small, SmallKernel{MiB: mib, Digest: digest})
	}
	return d.Marshal()
}

// Marshal returns the CBOR form: definite lengths, keys in upstream's order.
func (d *Document) Marshal() ([]byte, error) {
	if err := d.HOB.check(); err != nil {
		return nil, err
	}
	w := wireDocument{
		Version: 3,
		Image:   wireImage{Cmdline: d.Cmdline[:], Kernel: d.Kernel[:], Initrd: d.Initrd[:]},
		TDVF: wireTDVF{
			OVMF: ovmfPre202505,
			MRTD: wireMRTD{SinglePass: d.SinglePass[:], TwoPass: d.TwoPass[:]},
			HOB:  d.HOB.encode(),
		},
	}
	if d.CFV != upstreamCFV {
		w.TDVF.CFV = d.CFV[:]
	}
	for _, k := range d.Small {
		w.Image.Small = append(w.Image.Small, wireSmall{MiB: k.MiB, Digest: k.Digest[:]})
	}
	return cbor.Marshal(w)
}

func badDocument(format string, args ...any) error {
	return fault.New("measurement_malformed", "measurement document: "+format, args...)
}

// ParseTDXDocument reads a document of version 3. Unknown keys are ignored,
// duplicate keys, indefinite lengths and trailing bytes are refused. Codes:
// measurement_malformed; ovmf_variant for a firmware layout not known here.
func ParseTDXDocument(data []byte) (*Document, error) {
	if len(data) > maxDocument {
		return nil, badDocument("%d bytes, want at most %d", len(data), maxDocument)
	}
	mode, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		MaxNestedLevels:   8,
		MaxArrayElements:  64,
		MaxMapPairs:       64,
	}.DecMode()
	if err != nil {
		return nil, err
	}
	var w wireDocument
	if err := mode.Unmarshal(data, &w); err != nil {
		return nil, fault.Wrap(err, "measurement_malformed", "measurement document")
	}
	if w.Version != 3 {
		return nil, badDocument("version %d, want 3", w.Version)
	}
	if w.TDVF.OVMF != ovmfPre202505 {
		return nil, fault.New("ovmf_variant", "measurement document: firmware layout %.32q is not known, want %q", w.TDVF.OVMF, ovmfPre202505)
	}
	d := &Document{CFV: upstreamCFV}
	for _, field := range []struct {
		name string
		from []byte
		to   *dstack.Measurement
	}{
		{"cmdline_sha384", w.Image.Cmdline, &d.Cmdline},
		{"kernel_authenticode", w.Image.Kernel, &d.Kernel},
		{"initrd_sha384", w.Image.Initrd, &d.Initrd},
		{"single_pass", w.TDVF.MRTD.SinglePass, &d.SinglePass},
		{"two_pass", w.TDVF.MRTD.TwoPass, &d.TwoPass},
		{"cfv_sha384", w.TDVF.CFV, &d.CFV},
	} {
		if field.from == nil && field.to == &d.CFV {
			continue
		}
		if len(field.from) != dstack.MeasurementSize {
			return nil, badDocument("%s has %d bytes, want %d", field.name, len(field.from), dstack.MeasurementSize)
		}
		*field.to = dstack.Measurement(field.from)
	}
	for i, k := range w.Image.Small {
		if len(k.Digest) != dstack.MeasurementSize || i > 0 && k.MiB <= w.Image.Small[i-1].MiB {
			return nil, badDocument("kernel_authenticode_mib has a digest of %d bytes, or is not in order", len(k.Digest))
		}
		d.Small = append(d.Small, SmallKernel{MiB: k.MiB, Digest: dstack.Measurement(k.Digest)})
	}
	if d.HOB, err = parseHOBLayout(w.TDVF.HOB); err != nil {
		return nil, fault.Wrap(err, "measurement_malformed", "measurement document")
	}
	return d, nil
}

// TDX returns the registers of a VM with this image and memory bytes of memory.
// The code is memory_not_constant when the kernel's measurement depends on that
// size: the document does not hold it.
func (d *Document) TDX(memory uint64, twoPass bool) (*TDX, error) {
	if err := checkMemory(memory); err != nil {
		return nil, err
	}
	kernel, ok := d.kernel(memory)
	if !ok {
		return nil, fault.New("memory_not_constant", "the measurement of a VM with %d bytes of memory does not follow from a measurement document", memory).
			WithFix("give the VM 1 or 2 GiB, or at least 2816 MiB, or verify with the image's files")
	}
	f := facts{
		singlePass: d.SinglePass, twoPass: d.TwoPass, hob: d.HOB, cfv: d.CFV,
		kernel: kernel, cmdline: d.Cmdline, initrd: d.Initrd,
	}
	return f.tdx(memory, twoPass)
}

// kernel returns the digest of the kernel in a VM with so much memory.
func (d *Document) kernel(memory uint64) (dstack.Measurement, bool) {
	if KernelIsConstant(memory) {
		return d.Kernel, true
	}
	for _, k := range d.Small {
		if k.MiB<<20 == memory {
			return k.Digest, true
		}
	}
	return dstack.Measurement{}, false
}

// Split is a measurement document together with the checksum file that names it,
// as a VM's configuration carries it. In JSON both are standard base64.
type Split struct {
	ChecksumFile []byte `json:"checksum_file"`
	Measurement  []byte `json:"measurement"`
}

// Bind checks that the document belongs to the image: the image's hash is the
// SHA-256 of the checksum file, and exactly one of its lines is for the file of
// that name and has the document's SHA-256. Codes: image_hash_mismatch,
// measurement_not_listed, measurement_mismatch.
func (s Split) Bind(image dstack.ImageHash, name string) error {
	if len(s.ChecksumFile) > maxChecksumFile || len(s.Measurement) > maxDocument {
		return badDocument("checksum file of %d and document of %d bytes", len(s.ChecksumFile), len(s.Measurement))
	}
	if got := dstack.ImageHash(sha256.Sum256(s.ChecksumFile)); got != image {
		return fault.New("image_hash_mismatch", "checksum file has hash %s, the image is %s", got, image)
	}
	var listed []byte
	for line := range bytes.Lines(s.ChecksumFile) {
		fields := strings.Fields(string(line))
		if len(fields) < 2 || fields[1] != name {
			continue
		}
		if listed != nil {
			return fault.New("measurement_not_listed", "checksum file lists %s more than once", name)
		}
		digest, err := hex.DecodeString(fields[0])
		if err != nil || len(digest) != sha256.Size {
			return fault.New("measurement_not_listed", "checksum file has no SHA-256 for %s", name)
		}
		listed = digest
	}
	if listed == nil {
		return fault.New("measurement_not_listed", "checksum file does not list %s", name)
	}
	if got := sha256.Sum256(s.Measurement); !bytes.Equal(got[:], listed) {
		return fault.New("measurement_mismatch", "%s has SHA-256 %x, the checksum file says %x", name, got, listed)
	}
	return nil
}
