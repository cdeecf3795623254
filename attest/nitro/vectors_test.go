// SPDX-License-Identifier: Apache-2.0

package nitro_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/nitro"
	"github.com/dstack-go/dstack/attest/nitro/nitrotest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// vectors are documents of real enclaves, each in a container of form V0.
var vectors = []string{"nsm_attestation.bin", "versioned_nitro_attestation.bin", "versioned_nitro_attestation_dbg.bin"}

// vector returns what is to be verified at the time that the document states.
func vector(t testing.TB, name string) attest.Input {
	t.Helper()
	e, err := container.Decode(testkit.Vectors(t, "attestation/nitro/"+name))
	if err != nil {
		t.Fatal(err)
	}
	d, err := nitro.ParseDocument(e.Quote)
	if err != nil {
		t.Fatal(err)
	}
	return attest.Input{Evidence: e, Roots: nitro.VendorRoots(), At: d.Made}
}

// snapshot reads the JSON of an upstream snapshot.
func snapshot(t *testing.T, name string, v any) {
	t.Helper()
	text := string(testkit.Vectors(t, "attestation/nitro/"+name))
	_, body, ok := strings.Cut(strings.TrimPrefix(text, "---\n"), "---\n")
	if !ok {
		t.Fatalf("%s has no front matter", name)
	}
	if err := json.Unmarshal([]byte(body), v); err != nil {
		t.Fatal(err)
	}
}

func TestARealEnclaveVerifies(t *testing.T) {
	in := vector(t, "versioned_nitro_attestation.bin")
	c, err := nitro.Verify(in)
	if err != nil {
		t.Fatal(err)
	}
	var report struct {
		ModuleID  string `json:"module_id"`
		PCRs      struct{ PCR0, PCR1, PCR2 string }
		UserData  string `json:"user_data"`
		Timestamp int64
	}
	snapshot(t, "nitro_verify__nitro_report.snap", &report)
	for index, want := range []string{report.PCRs.PCR0, report.PCRs.PCR1, report.PCRs.PCR2} {
		if got := hex.EncodeToString(c.Nitro.PCRs[uint32(index)]); got != want {
			t.Errorf("register %d is %s, want %s", index, got, want)
		}
	}
	if c.Nitro.ModuleID != report.ModuleID || hex.EncodeToString(c.ReportData) != report.UserData || c.Made.UnixMilli() != report.Timestamp {
		t.Errorf("%s, user data %x, made %d", c.Nitro.ModuleID, c.ReportData, c.Made.UnixMilli())
	}
	if !bytes.Equal(c.ReportData, in.Evidence.ReportData[:]) {
		t.Error("user data are not the container's report data")
	}
	if c.Trust != dstack.TrustProduction || c.Root != "aws.nitro-enclaves (sha256 "+nitro.RootG1SHA256+")" {
		t.Errorf("%s under %s", c.Trust, c.Root)
	}
	if c.TCBStatus != attest.NotReported || c.Debug || len(c.Nitro.PCRs) != 16 {
		t.Errorf("claims %+v", c)
	}
	// The certificate began three seconds before the document and lives three hours.
	if left := c.Expires.Sub(c.Made); left > 3*time.Hour || left < 3*time.Hour-10*time.Second {
		t.Errorf("claims end %s after the document", left)
	}

	var info struct {
		ImageHash string `json:"os_image_hash"`
		DeviceID  string `json:"device_id"`
	}
	snapshot(t, "nitro_verify__app_info.snap", &info)
	hash, err := nitro.ImageHash(c.Nitro.PCRs)
	if err != nil || hash.String() != info.ImageHash {
		t.Errorf("image hash %s (%v), want %s", hash, err, info.ImageHash)
	}
	// Upstream's is the hash of nothing here (its decoder had not verified), and of
	// "i" for verified enclaves. Ours is the instance's.
	if want := sha256.Sum256([]byte("i-0827e799ec9232d44")); c.DeviceID != want || c.DeviceID.String() == info.DeviceID {
		t.Errorf("device %s", c.DeviceID)
	}
}

func TestEveryRealDocumentVerifiesAtItsTime(t *testing.T) {
	for _, name := range vectors {
		in := vector(t, name)
		in.Options.AllowDebug = true
		c, err := nitro.Verify(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(c.ReportData, in.Evidence.ReportData[:]) {
			t.Errorf("%s: user data are not the container's report data", name)
		}
		// Neither before the certificate nor after it.
		for at, want := range map[time.Time]string{
			c.Made.Add(-time.Minute): "nitro_cert_expired", c.Expires.Add(time.Second): "nitro_cert_expired",
			time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC): "root_expired", {}: "root_expired",
		} {
			in.At = at
			if _, err := nitro.Verify(in); fault.Code(err) != want {
				t.Errorf("%s at %s: %v", name, at, err)
			}
		}
	}
}

func TestThreat_B01_TheRealDebugEnclaveIsRefused(t *testing.T) {
	in := vector(t, "versioned_nitro_attestation_dbg.bin")
	c, err := nitro.Verify(in)
	if fault.Code(err) != "nitro_debug" || c == nil || !c.Debug {
		t.Fatalf("%+v, %v", c, err)
	}
	// The container's image hash is that of zeros, so to compare it would say nothing.
	zeros := sha256.Sum256(make([]byte, 3*48))
	if !strings.Contains(in.Evidence.Config, hex.EncodeToString(zeros[:])) {
		t.Errorf("config %s", in.Evidence.Config)
	}
	if _, err := nitro.ImageHash(c.Nitro.PCRs); fault.Code(err) != "nitro_debug" {
		t.Error(err)
	}
}

func TestTheImageHashOfARealContainerIsTheDocuments(t *testing.T) {
	for _, name := range vectors[:2] {
		in := vector(t, name)
		c, err := nitro.Verify(in)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		hash, err := nitro.ImageHash(c.Nitro.PCRs)
		if want := `{"os_image_hash":"` + hash.String() + `"}`; err != nil || in.Evidence.Config != want {
			t.Errorf("%s: config %s, want %s (%v)", name, in.Evidence.Config, want, err)
		}
	}
}

// The file is a container; its first four bytes are a frame around the message.
func TestARealDocumentIsFoundInItsContainer(t *testing.T) {
	raw := testkit.Vectors(t, "attestation/nitro/nsm_attestation.bin")
	in := vector(t, "nsm_attestation.bin")
	in.Evidence = &attest.Evidence{TEE: dstack.Nitro, Quote: raw}
	if _, err := nitro.Verify(in); err != nil {
		t.Error(err)
	}
}

// A real document is not accepted under the root of a development installation,
// nor a document of the installation under AWS's.
func TestThreat_B14_RealAndSimulatedDocumentsHaveDifferentRoots(t *testing.T) {
	in := vector(t, "nsm_attestation.bin")
	in.Roots = nitrotest.New(t).Roots()
	if _, err := nitro.Verify(in); fault.Code(err) != "unknown_root" {
		t.Error(err)
	}
}

func TestVendorRootIsTheOneAWSPublishes(t *testing.T) {
	roots := nitro.VendorRoots()
	if len(roots) != 2 || roots[0].TEE != dstack.Nitro || roots[1].TEE != dstack.NitroTPM {
		t.Fatalf("%+v", roots)
	}
	for _, r := range roots {
		if len(r.CA) != 1 || r.Trust != dstack.TrustProduction || len(r.Keys) != 0 {
			t.Errorf("%+v", r)
		}
		if sum := sha256.Sum256(r.CA[0].Raw); hex.EncodeToString(sum[:]) != nitro.RootG1SHA256 {
			t.Errorf("root %x", sum)
		}
	}
}

func TestDevelopmentRootsAreOfDevelopmentTrust(t *testing.T) {
	d := nitrotest.New(t).DevRoots()
	roots, err := nitro.DevelopmentRoots(d)
	if err != nil || len(roots) != 2 || roots[0].Trust != dstack.TrustDevelopment || roots[1].TEE != dstack.NitroTPM {
		t.Fatalf("%+v, %v", roots, err)
	}
	for name, text := range map[string]string{
		"nothing": "", "no PEM": "junk", "no certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"the vendor's root": string(vendorPEM(t)),
	} {
		d.NitroRootPEM = text
		if _, err := nitro.DevelopmentRoots(d); fault.Code(err) != "dev_roots_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func vendorPEM(t *testing.T) []byte {
	return testkit.Vectors(t, "attestation/roots/AWS_NitroEnclaves_Root-G1.pem")
}

func TestRegistersOfANitroTPMHashAsUpstreamDoes(t *testing.T) {
	var v struct {
		AWS struct {
			ConfigID string `json:"config_id"`
			PCR8     string `json:"pcr8"`
		} `json:"aws_pcr8"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	var id dstack.MRConfigID
	if err := id.UnmarshalText([]byte(v.AWS.ConfigID)); err != nil {
		t.Fatal(err)
	}
	if got := nitro.ConfigPCR8(id).String(); got != v.AWS.PCR8 {
		t.Errorf("PCR8 %s, want %s", got, v.AWS.PCR8)
	}

	pcrs := map[uint32][]byte{4: bytes.Repeat([]byte{4}, 48), 7: bytes.Repeat([]byte{7}, 48), 12: bytes.Repeat([]byte{12}, 48)}
	got, err := nitro.BootPCRDigest(pcrs)
	want := sha256.Sum256(append(append(bytes.Repeat([]byte{4}, 48), bytes.Repeat([]byte{7}, 48)...), bytes.Repeat([]byte{12}, 48)...))
	if err != nil || got != want {
		t.Errorf("boot digest %x, want %x (%v)", got, want, err)
	}
}

// Registers of other lengths could be joined to the same bytes.
func TestThreat_B17_RegistersOfOtherLengthsHaveNoHash(t *testing.T) {
	for _, n := range []int{0, 32, 47, 49, 64} {
		pcrs := map[uint32][]byte{}
		for _, index := range []uint32{0, 1, 2, 4, 7, 12} {
			pcrs[index] = bytes.Repeat([]byte{1}, 48)
		}
		pcrs[1], pcrs[7] = bytes.Repeat([]byte{1}, n), bytes.Repeat([]byte{1}, n)
		if _, err := nitro.ImageHash(pcrs); fault.Code(err) != "nitro_pcr_missing" {
			t.Errorf("a register of %d bytes: %v", n, err)
		}
		if _, err := nitro.BootPCRDigest(pcrs); fault.Code(err) != "nitro_pcr_missing" {
			t.Errorf("a register of %d bytes: %v", n, err)
		}
	}
	if _, err := nitro.ImageHash(nil); fault.Code(err) != "nitro_pcr_missing" {
		t.Error(err)
	}
}

func FuzzParseDocument(f *testing.F) {
	for _, name := range vectors {
		f.Add(vector(f, name).Evidence.Quote)
	}
	f.Add(nitrotest.New(f).Quote())
	f.Add(nitrotest.NewTPM(f).Quote())
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := nitro.ParseDocument(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		for index, v := range d.PCRs {
			if len(v) != nitro.PCRSize || index >= nitro.EnclavePCRs {
				t.Fatalf("register %d of %d bytes", index, len(v))
			}
		}
		if len(d.UserData) > nitro.MaxUserData || len(d.CABundle) > nitro.MaxChain || d.Made.IsZero() {
			t.Fatalf("%+v", d)
		}
	})
}

// FuzzVerify feeds hostile documents, leaves and revocation lists to everything
// behind the signature by signing them as the module would.
func FuzzVerify(f *testing.F) {
	m := nitrotest.New(f)
	payload, err := nitro.ParseDocument(m.Quote())
	if err != nil {
		f.Fatal(err)
	}
	var bundle []byte
	for _, der := range payload.CABundle {
		bundle = append(bundle, der...)
	}
	f.Add(m.Leaf.Cert.Raw, bundle, []byte(m.Sign(nitrotest.Revoke(m.Zone))), m.Doc["module_id"].(string), uint64(nitrotest.At.UnixMilli()))
	f.Fuzz(func(t *testing.T, leaf, bundle, crl []byte, id string, ms uint64) {
		m := m.For(t)
		var list []any
		for len(bundle) > 0 && len(list) < 10 {
			// Cut where certificates end, if there are any.
			n := len(bundle)
			if cert, err := firstCertificate(bundle); err == nil {
				n = len(cert)
			}
			list, bundle = append(list, bundle[:n]), bundle[n:]
		}
		m.Doc["certificate"], m.Doc["cabundle"], m.Doc["module_id"], m.Doc["timestamp"] = leaf, list, id, ms
		in := attest.Input{Evidence: m.Evidence(), Roots: m.Roots(), At: nitrotest.At}
		in.Collateral = bundleOf(crl)
		c, err := nitro.Verify(in)
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if (err == nil) != (c != nil) {
			t.Fatalf("%+v beside %v", c, err)
		}
	})
}

// firstCertificate returns the DER certificate that data begins with.
func firstCertificate(data []byte) ([]byte, error) {
	for n := 4; n <= len(data); n++ {
		if data[0] == 0x30 && data[1] == 0x82 && n == 4+int(data[2])<<8+int(data[3]) {
			_, err := x509.ParseCertificate(data[:n])
			return data[:n], err
		}
	}
	return nil, x509.ErrUnsupportedAlgorithm
}
