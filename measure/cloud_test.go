// SPDX-License-Identifier: Apache-2.0

package measure

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Documents written out by hand from measurement.md §7: {"version":1,"uki_auth":b32}
// and {"boot_pcr_digest":b32}.
var (
	gcpUKI, _  = hex.DecodeString("9ab14a46f858662a89adc102d2a57a13f52f75c1769d65a4c34edbbfc8855f0f")
	gcpWire, _ = hex.DecodeString("a2" + "6776657273696f6e" + "01" + "68756b695f61757468" + "5820" + hex.EncodeToString(gcpUKI))
	awsWire, _ = hex.DecodeString("a1" + "6f626f6f745f7063725f646967657374" + "5820" + strings.Repeat("c3", 32))
)

func TestCloudDocumentsHaveUpstreamsBytes(t *testing.T) {
	gcp, err := ParseGCPDocument(gcpWire)
	if err != nil || !bytes.Equal(gcp.UKI[:], gcpUKI) {
		t.Fatalf("gcp = %x, %v", gcp, err)
	}
	if b, err := gcp.Marshal(); err != nil || !bytes.Equal(b, gcpWire) {
		t.Errorf("gcp marshals to %x, %v", b, err)
	}
	aws, err := ParseAWSDocument(awsWire)
	if err != nil || !bytes.Equal(aws.BootPCRs[:], bytes.Repeat([]byte{0xc3}, 32)) {
		t.Fatalf("aws = %x, %v", aws, err)
	}
	if b, err := aws.Marshal(); err != nil || !bytes.Equal(b, awsWire) {
		t.Errorf("aws marshals to %x, %v", b, err)
	}
}

func TestACloudDocumentIsBoundToItsImage(t *testing.T) {
	sums := fmt.Sprintf("%x  kernel\n%x  %s\n", sha256.Sum256(nil), sha256.Sum256(gcpWire), GCPDocumentName)
	s := Split{ChecksumFile: []byte(sums), Measurement: gcpWire}
	image := dstack.ImageHash(sha256.Sum256([]byte(sums)))
	if err := s.Bind(image, GCPDocumentName); err != nil {
		t.Error(err)
	}
	if err := s.Bind(image, AWSDocumentName); fault.Code(err) != "measurement_not_listed" {
		t.Errorf("under another name: %v", err)
	}
	s.Measurement = append(bytes.Clone(gcpWire[:len(gcpWire)-1]), 0)
	if err := s.Bind(image, GCPDocumentName); fault.Code(err) != "measurement_mismatch" {
		t.Errorf("changed: %v", err)
	}
}

func TestThreat_B17_ACloudDocumentOfAnotherLengthIsRefused(t *testing.T) {
	head := gcpWire[:len(gcpWire)-34]
	bytesOf := func(n int) []byte { return append([]byte{0x58, byte(n)}, make([]byte, n)...) }
	for _, n := range []int{0, 31, 33, 48, 64} {
		if _, err := ParseGCPDocument(append(bytes.Clone(head), bytesOf(n)...)); fault.Code(err) != "measurement_malformed" {
			t.Errorf("uki_auth of %d bytes: %v", n, err)
		}
		if _, err := ParseAWSDocument(append(bytes.Clone(awsWire[:len(awsWire)-34]), bytesOf(n)...)); fault.Code(err) != "measurement_malformed" {
			t.Errorf("boot_pcr_digest of %d bytes: %v", n, err)
		}
	}
	for _, c := range []struct {
		name string
		in   []byte
	}{
		{"empty", nil},
		{"with trailing bytes", append(bytes.Clone(gcpWire), 0)},
		{"of version 2", bytes.Replace(gcpWire, []byte("version\x01"), []byte("version\x02"), 1)},
		{"with a key in capitals", bytes.Replace(gcpWire, []byte("uki_auth"), []byte("UKI_AUTH"), 1)},
		{"with a text for bytes", bytes.Replace(gcpWire, []byte("\x58\x20"), []byte("\x78\x20"), 1)},
		{"of indefinite length", append(append([]byte{0xbf}, gcpWire[1:]...), 0xff)},
		{"with a key twice", append(append([]byte{0xa3}, gcpWire[1:]...), gcpWire[9:]...)},
		{"nested 60000 times", bytes.Repeat([]byte{0x81}, 60000)},
		{"larger than the limit", slices.Concat([]byte{0xa3}, gcpWire[1:], []byte{0x61, 'x', 0x5a, 0, 1, 0, 0}, make([]byte, 1<<16))},
	} {
		if _, err := ParseGCPDocument(c.in); fault.Code(err) != "measurement_malformed" {
			t.Errorf("a document %s: %v", c.name, err)
		}
	}
	if _, err := ParseAWSDocument([]byte{0xa0}); fault.Code(err) != "measurement_malformed" {
		t.Errorf("a document without its key: %v", err)
	}
	if _, err := ParseAWSDocument([]byte{0x01}); fault.Code(err) != "measurement_malformed" {
		t.Errorf("a document that is a number: %v", err)
	}
}

func FuzzParseCloudDocuments(f *testing.F) {
	f.Add(gcpWire)
	f.Add(awsWire)
	f.Fuzz(func(t *testing.T, data []byte) {
		gcp, err := ParseGCPDocument(data)
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if err == nil {
			wire, _ := gcp.Marshal()
			if again, err := ParseGCPDocument(wire); err != nil || *again != *gcp {
				t.Fatalf("written and read again differs: %v", err)
			}
		}
		if _, err := ParseAWSDocument(data); err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
	})
}
