// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifyd/imagecache/imagetest"
)

// certificate returns a self-signed RA-TLS certificate of the guest.
func (g *guest) certificate(edit func(*x509.Certificate), change func(*attest.Evidence)) []byte {
	g.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(g.t, err)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	check(g.t, err)
	own := *g
	own.body.ReportData = ratls.ReportData(spki)
	ev := own.evidence()
	if change != nil {
		change(ev)
	}
	raw, err := container.Encode(ev)
	check(g.t, err)
	ext, err := ratls.Extensions(ratls.Issued{}, raw)
	check(g.t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "guest"}, DNSNames: []string{"guest.example"},
		NotBefore: tdxtest.At.Add(-time.Hour), NotAfter: tdxtest.At.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, ExtraExtensions: ext,
	}
	if edit != nil {
		edit(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	check(g.t, err)
	return der
}

func TestRATLSCertificatesAreJudged(t *testing.T) {
	lite, legacy := newGuest(t, imagetest.New(t, "0.6.0", false), true), newGuest(t, imagetest.New(t, "0.5.9", false), false)
	legacy.platform = lite.platform
	url, asked := imageServer(t, legacy.release)
	s := setup(t, lite.roots(), func(c *Config, o *Options) { c.ImageDownloadURL = url })
	der := lite.certificate(nil, nil)
	for form, data := range map[string][]byte{"DER": der, "PEM": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})} {
		out, err := s.VerifyCertificate(t.Context(), data)
		if err != nil {
			t.Fatalf("%s: %v", form, err)
		}
		cert, _ := x509.ParseCertificate(der)
		d := out.Details
		if !out.IsValid || d.TEEVariant != "dstack-tdx" || !bytes.Equal(d.PublicKeyDER, cert.RawSubjectPublicKeyInfo) || len(d.ReportData) != 64 ||
			d.AppInfo == nil || !d.AppInfo.OSImageHashVerified || len(d.AppInfo.AppID) != 20 || out.Verdict.Accepted {
			text, _ := json.Marshal(out)
			t.Errorf("%s: %s", form, text)
		}
		var flat map[string]any
		text, err := json.Marshal(d.AppInfo)
		check(t, err)
		check(t, json.Unmarshal(text, &flat))
		if flat["app_id"] == nil || flat["os_image_hash_verified"] != true {
			t.Errorf("app_info is %s", text)
		}
	}
	// The older form would need its image: nothing is downloaded for a certificate.
	out, err := s.VerifyCertificate(t.Context(), legacy.certificate(nil, nil))
	check(t, err)
	if out.Details.AppInfo == nil || out.Details.AppInfo.OSImageHashVerified || asked.Load() != 0 {
		t.Errorf("%+v, asked %d times", out.Details, asked.Load())
	}
	for _, c := range []struct {
		name, code string
		edit       func(*x509.Certificate)
		change     func(*attest.Evidence)
	}{
		{"expired", "ratls_expired", func(c *x509.Certificate) { c.NotAfter = tdxtest.At.Add(-time.Minute) }, nil},
		{"not valid yet", "ratls_not_yet_valid", func(c *x509.Certificate) { c.NotBefore = tdxtest.At.Add(time.Minute) }, nil},
		{"for encryption", "ratls_key_usage", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, nil},
		{"for e-mail", "ratls_ext_key_usage", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }, nil},
		{"of nobody", "ratls_no_name", func(c *x509.Certificate) { c.DNSNames = nil }, nil},
		{"without evidence", "ratls_no_evidence", func(c *x509.Certificate) { c.ExtraExtensions = nil }, nil},
		{"with altered evidence", "certificate_evidence", nil, func(e *attest.Evidence) { e.Quote[700] ^= 1 }},
		{"with the evidence of another key", "ratls_report_data_mismatch", nil, func(e *attest.Evidence) {
			o := lite.evidence()
			e.Quote, e.ReportData = o.Quote, o.ReportData
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := s.VerifyCertificate(t.Context(), lite.certificate(c.edit, c.change)); fault.Code(err) != c.code {
				t.Errorf("%v (%q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	for name, data := range map[string][]byte{"text": []byte("hello"), "a key": []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "nothing": nil, "2 MiB": make([]byte, 2<<20)} {
		if _, err := s.VerifyCertificate(t.Context(), data); fault.Code(err) != "certificate_malformed" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFilesAreJudgedOnce(t *testing.T) {
	g := newGuest(t, imagetest.New(t, "0.6.0", false), true)
	s := setup(t, g.roots(), nil)
	dir := t.TempDir()
	put := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		check(t, os.WriteFile(path, data, 0o600))
		return path
	}
	request, err := json.Marshal(map[string]any{"attestation": g.attestation().Attestation})
	check(t, err)
	var line bytes.Buffer
	path := put("request.json", request)
	out, err := s.VerifyFile(t.Context(), path, &line)
	check(t, err)
	valid(t, out)
	if bytes.Count(line.Bytes(), []byte("\n")) != 1 || !bytes.HasPrefix(line.Bytes(), []byte(`{"is_valid":true,"reason":null,"details":{`)) {
		t.Errorf("%s", line.Bytes())
	}
	saved, err := os.ReadFile(path + ReplySuffix)
	check(t, err)
	var a, b bytes.Buffer
	check(t, json.Compact(&a, saved))
	check(t, json.Compact(&b, line.Bytes()))
	if a.String() != b.String() || bytes.Count(saved, []byte("\n")) < 10 {
		t.Errorf("saved %s", saved)
	}
	for name, data := range map[string][]byte{"rubbish": []byte("rubbish"), "empty": nil, "large": make([]byte, MaxBody+1)} {
		line.Reset()
		out, err := s.VerifyFile(t.Context(), put(name, data), &line)
		check(t, err)
		invalid(t, out, prefixInternal, "")
	}
	line.Reset()
	out, err = s.VerifyFile(t.Context(), filepath.Join(dir, "none"), &line)
	check(t, err)
	invalid(t, out, prefixInternal, "")

	line.Reset()
	path = put("cert.der", g.certificate(nil, nil))
	check(t, s.VerifyCertificateFile(t.Context(), path, &line))
	if _, err := os.Stat(path + CertificateSuffix); err != nil || !bytes.HasPrefix(line.Bytes(), []byte(`{"is_valid":true,"details":{"tee_variant":"dstack-tdx"`)) {
		t.Errorf("%v %s", err, line.Bytes())
	}
	line.Reset()
	path = put("bad.der", []byte(hex.EncodeToString([]byte("no"))))
	if err := s.VerifyCertificateFile(t.Context(), path, &line); err == nil || line.Len() != 0 {
		t.Errorf("%v %s", err, line.Bytes())
	}
	if _, err := os.Stat(path + CertificateSuffix); err == nil {
		t.Error("a file was written for a certificate that does not hold")
	}
}
