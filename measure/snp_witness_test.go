// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtee/sev-snp-measure-go/cpuid"
	"github.com/virtee/sev-snp-measure-go/gctx"
	"github.com/virtee/sev-snp-measure-go/guest"
	"github.com/virtee/sev-snp-measure-go/ovmf"
	"github.com/virtee/sev-snp-measure-go/vmmtypes"
	theirvmsa "github.com/virtee/sev-snp-measure-go/vmsa"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestOnePageOfALaunchDigest(t *testing.T) {
	var ld launchDigest
	ld.extend(pageNormal, 0x1000, sha384([]byte("page")))
	const want = "3ebc1a70acc0bae5ae2788fae29a0371f983b19a68faf9843064f36040f58571ce5bb6bcdc9c361087073f8cffd92635"
	if got := hex.EncodeToString(ld[:]); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestCPUSignaturesAreThoseOfTheLibrary(t *testing.T) {
	for model, want := range cpuid.CpuSigs {
		if got, ok := cpuSignature(model); !ok || got != uint32(want) {
			t.Errorf("%s: %#x, want %#x", model, got, want)
		}
	}
	// What the library lacks: QEMU's family 26, model 0, stepping 0.
	for _, model := range []string{"EPYC-Turin", "epyc-turin-v1"} {
		if got, ok := cpuSignature(model); !ok || got != 0x00b00f00 {
			t.Errorf("%s: %#x", model, got)
		}
	}
	for _, model := range []string{"EPYC-v0", "EPYC-v6", "EPYC-v", "EPYC-v11", "EPYC-IBPB-v1", "EPYC-Turin-v2", "EPYC-", "xEPYC", "", strings.Repeat("EPYC", 100)} {
		if got, ok := cpuSignature(model); ok {
			t.Errorf("%s has signature %#x", model, got)
		}
	}
}

func TestSaveAreasAreThoseOfTheLibrary(t *testing.T) {
	const signature = 0x800f12
	for _, eip := range []uint32{0x80b004, bootEIP, 0xffff, 1} {
		for _, features := range []uint64{1, 0x21, 1<<63 | 1} {
			v, err := theirvmsa.New(eip, features, signature, vmmtypes.QEMU)
			if err != nil {
				t.Fatal(err)
			}
			pages, err := v.Pages(2)
			if err != nil {
				t.Fatal(err)
			}
			if string(pages[0]) != string(vmsa(bootEIP, signature, features)) {
				t.Errorf("the first vCPU's save area with features %#x differs", features)
			}
			if string(pages[1]) != string(vmsa(eip, signature, features)) {
				t.Errorf("the save area at %#x with features %#x differs", eip, features)
			}
		}
	}
}

// The library refuses the page of hashes, so that it is given the digest after
// that page, which comes first here, and goes on from there.
func TestLaunchDigestsAreThoseOfTheLibrary(t *testing.T) {
	for _, model := range []string{"EPYC-v4", "EPYC-Milan-v2", "EPYC-Genoa"} {
		for _, vcpus := range []int{1, 2, 64} {
			rest := []SNPSection{
				{0x800000, 0x9000, SNPSecMem}, {0x80d000, 0x1000, SNPSecrets}, {0x80e000, 0x1000, SNPCPUID},
				{0x80f000, 0x2000, SNPSVSMCAA}, {0x811000, 0xf000, SNPSecMem},
			}
			d := &SNPDocument{
				Cmdline: "console=ttyS0", OVMFHash: sha384([]byte("firmware")), KernelHash: [32]byte{1}, InitrdHash: [32]byte{2},
				HashesTableGPA: 0x820c00, ResetEIP: 0x80b004,
				Sections: append([]SNPSection{{0x820000, 0x1000, SNPKernelHashes}}, rest...),
			}
			ours, err := d.Measurement(SNPShape{VCPUs: vcpus, VCPUType: model, GuestFeatures: 1})
			if err != nil {
				t.Fatal(err)
			}
			g := gctx.New(d.OVMFHash[:])
			if err := g.UpdateNormalPages(0x820000, d.hashPage()); err != nil {
				t.Fatal(err)
			}
			wrapper := ovmf.MetadataWrapper{ResetEIP: d.ResetEIP, OVMFHash: g.LD()}
			for _, s := range rest {
				wrapper.MetadataItems = append(wrapper.MetadataItems, ovmf.MetadataSection{GPA: s.GPA, Size: s.Size, SectionTypeInt: uint32(s.Type)})
			}
			theirs, err := guest.LaunchDigestFromMetadataWrapper(wrapper, 1, vcpus, vmmtypes.QEMU, model)
			if err != nil {
				t.Fatal(err)
			}
			if dstack.Measurement(theirs) != ours {
				t.Errorf("%s, %d vCPUs: %s, the library says %x", model, vcpus, ours, theirs)
			}
		}
	}
}

// realFirmware returns paths of firmware images with SEV metadata: the two of the
// library's own tests, with the digests that AMD's sev-snp-measure.py gives for
// them, and the distribution's where it is installed.
func realFirmware(t *testing.T) map[string]string {
	images := map[string]string{}
	if dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/virtee/sev-snp-measure-go").Output(); err == nil {
		data := filepath.Join(strings.TrimSpace(string(dir)), "guest", "testdata")
		images[filepath.Join(data, "ovmf_img_1.bin")] = "a58211791a556a630a4319dc9e2ea96cc0e9784dd9f20a4fadf81b26c98d163fcdcb6703884bbbb80d7b1de45b3d84d0"
		images[filepath.Join(data, "ovmf_img_2.bin")] = "2027a27bb9f7acfd280e4c7bd68a73973b94bf0756e5b282e004b9395f597b8d0eb4defa7d8f6549375aa4d2b146f0f3"
	}
	images["/usr/share/ovmf/OVMF.fd"] = ""
	for path := range images {
		if _, err := os.Stat(path); err != nil {
			t.Logf("SKIP: %v", err)
			delete(images, path)
		}
	}
	if len(images) == 0 {
		t.Skip("SKIP: no real firmware here")
	}
	return images
}

func TestRealFirmwareIsReadAsTheLibraryReadsIt(t *testing.T) {
	for path, published := range realFirmware(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			firmware, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := ovmf.New(path)
			if err != nil {
				t.Fatal(err)
			}
			hash, err := guest.OVMFHash(theirs)
			if err != nil {
				t.Fatal(err)
			}
			ours := firmwareHash(firmware)
			if ours != dstack.Measurement(hash) || published != "" && ours.String() != published {
				t.Errorf("firmware measures %s, the library says %x, published is %s", ours, hash, published)
			}
			entries := 0
			err = walkGUIDTable(firmware, func(id [16]byte, data []byte) error {
				entries++
				text := guidText(id)
				if want, err := theirs.TableItem(text); err != nil || string(want) != string(data) {
					t.Errorf("entry %s has %x, the library says %x, %v", text, data, want, err)
				}
				if id != snpMetadataGUID {
					return nil
				}
				sections, err := parseSEVMetadata(firmware, binary.LittleEndian.Uint32(data))
				if err != nil {
					return err
				}
				if len(sections) != len(theirs.MetadataItems()) {
					t.Fatalf("%d sections, the library says %d", len(sections), len(theirs.MetadataItems()))
				}
				for i, want := range theirs.MetadataItems() {
					if got := sections[i]; got != (SNPSection{want.GPA, want.Size, SNPSectionType(want.SectionTypeInt)}) {
						t.Errorf("section %d is %+v, the library says %+v", i, got, want)
					}
				}
				return nil
			})
			if err != nil || entries == 0 {
				t.Errorf("%d entries, %v", entries, err)
			}
			// None of them has a page for hashes: a kernel would go unmeasured.
			_, err = ComputeSNP(SNPLaunch{Firmware: firmware, Kernel: []byte("kernel"), SNPShape: SNPShape{1, "EPYC", 1}})
			if fault.Code(err) != "firmware_not_snp" {
				t.Errorf("a kernel that the firmware does not check: %v", err)
			}
		})
	}
}

// guidText returns the text of a GUID.
func guidText(id [16]byte) string {
	g := mixed(id)
	return fmt.Sprintf("%x-%x-%x-%x-%x", g[:4], g[4:6], g[6:8], g[8:10], g[10:])
}

func mixed(g [16]byte) [16]byte {
	slices.Reverse(g[:4])
	slices.Reverse(g[4:6])
	slices.Reverse(g[6:8])
	return g
}

func BenchmarkSNPLaunchDigest(b *testing.B) {
	firmware := make([]byte, 4<<20)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(firmware)))
		for b.Loop() {
			firmwareHash(firmware)
		}
	})
	b.Run("sev-snp-measure-go", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(firmware)))
		for b.Loop() {
			g := gctx.New(nil)
			if err := g.UpdateNormalPages(highBase-uint64(len(firmware)), firmware); err != nil {
				b.Fatal(err)
			}
		}
	})
}
