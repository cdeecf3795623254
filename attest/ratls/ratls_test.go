// SPDX-License-Identifier: Apache-2.0

package ratls

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"math/big"
	"net"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func wantCode(t testing.TB, err error, code string) {
	t.Helper()
	if got := fault.Code(err); got != code {
		t.Fatalf("error %v has code %q, want %q", err, got, code)
	}
}

func newKey(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key, spki
}

// certificate makes a self-signed certificate of key.
func certificate(t testing.TB, key crypto.Signer, edit func(*x509.Certificate), ext ...pkix.Extension) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"}, DNSNames: []string{"app.test"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		ExtraExtensions: ext,
	}
	if edit != nil {
		edit(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func wrapped(t testing.TB, ext int, payload []byte) pkix.Extension {
	t.Helper()
	value, err := asn1.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: OID(ext), Value: value}
}

// evidenceOver is real evidence of upstream's simulator whose container claims
// the report data of spki.
func evidenceOver(t testing.TB, spki []byte) *attest.Evidence {
	t.Helper()
	e, err := container.Decode(testkit.Vectors(t, "attestation/simulator/attestation.bin"))
	if err != nil {
		t.Fatal(err)
	}
	e.ReportData = ReportData(spki)
	return e
}

func encode(t testing.TB, e *attest.Evidence) []byte {
	t.Helper()
	raw, err := container.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func zipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	buf.WriteString(compressedLog)
	z := gzip.NewWriter(&buf)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

const smallLog = `[{"imr":3,"event_type":134217729,"digest":"","event":"app-id","event_payload":"00"}]`

func TestReportDataIsThatOfTheVector(t *testing.T) {
	var v struct {
		RATLS struct {
			SPKI string `json:"spki_der"`
			Data string `json:"report_data"`
		} `json:"ra_tls"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/crypto.json"), &v); err != nil {
		t.Fatal(err)
	}
	spki, err := hex.DecodeString(v.RATLS.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	if got := ReportData(spki).String(); got != v.RATLS.Data {
		t.Errorf("report data %s, want %s", got, v.RATLS.Data)
	}
}

func TestACertificateGivesBackItsContainer(t *testing.T) {
	key, spki := newKey(t)
	for _, v1 := range []bool{false, true} {
		e := evidenceOver(t, spki)
		raw := encode(t, e)
		if v1 {
			var err error
			if raw, err = container.EncodeV1(e); err != nil {
				t.Fatal(err)
			}
		}
		ext, err := Extensions(Issued{}, raw)
		if err != nil {
			t.Fatal(err)
		}
		// The legacy pair beside it is not looked at.
		ext = append(ext, wrapped(t, ExtQuote, []byte("junk")))
		got, err := FromCertificate(certificate(t, key, nil, ext...))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Container, raw) || got.Legacy || got.ReportData != ReportData(spki) || got.Evidence.TEE != dstack.TDX {
			t.Errorf("attestation %+v", got)
		}
	}
}

func TestTheLegacyPairBecomesAContainer(t *testing.T) {
	key, spki := newKey(t)
	quote := testkit.Vectors(t, "attestation/tdx/ra-tls-tdx_quote.bin")
	for name, log := range map[string][]byte{"plain": []byte(smallLog), "compressed": zipped(t, []byte(smallLog))} {
		t.Run(name, func(t *testing.T) {
			got, err := FromCertificate(certificate(t, key, nil, wrapped(t, ExtQuote, quote), wrapped(t, ExtEventLog, log)))
			if err != nil {
				t.Fatal(err)
			}
			if !got.Legacy || !bytes.Equal(got.Evidence.Quote, quote) || len(got.Evidence.EventLog) != 1 || got.Evidence.ReportDataClaimed {
				t.Errorf("attestation %+v", got)
			}
			e, err := container.Decode(got.Container)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(e.Quote, quote) || e.ReportData != ReportData(spki) || e.EventLog[0].Name != "app-id" {
				t.Errorf("container decodes to %+v", e)
			}
		})
	}
}

func TestHostileExtensionsAreRefused(t *testing.T) {
	key, spki := newKey(t)
	good := wrapped(t, ExtContainer, encode(t, evidenceOver(t, spki)))
	quote := wrapped(t, ExtQuote, []byte{1})
	stray := append(bytes.Clone(good.Value), 0)
	for _, c := range []struct {
		name, code string
		ext        []pkix.Extension
	}{
		{"no evidence", "ratls_no_evidence", nil},
		{"a log without a quote", "ratls_no_evidence", []pkix.Extension{wrapped(t, ExtEventLog, []byte(smallLog))}},
		{"a quote without a log", "ratls_event_log_missing", []pkix.Extension{quote}},
		{"evidence wrapped once", "ratls_extension_malformed", []pkix.Extension{{Id: OID(ExtContainer), Value: []byte{0x80, 1}}}},
		{"bytes after the wrapping", "ratls_extension_malformed", []pkix.Extension{{Id: OID(ExtContainer), Value: stray}}},
		{"an empty container", "container_malformed", []pkix.Extension{wrapped(t, ExtContainer, nil)}},
		{"a broken container beside a good pair", "container_version", []pkix.Extension{wrapped(t, ExtContainer, []byte{0x7b}), quote, wrapped(t, ExtEventLog, []byte(smallLog))}},
		{"oversize evidence", "ratls_too_large", []pkix.Extension{wrapped(t, ExtContainer, make([]byte, MaxEvidence+1))}},
		{"evidence far too large", "ratls_too_large", []pkix.Extension{wrapped(t, ExtContainer, make([]byte, MaxEvidence+100))}},
		{"an oversize quote", "ratls_too_large", []pkix.Extension{wrapped(t, ExtQuote, make([]byte, attest.MaxQuote+1))}},
		{"evidence of another key", "ratls_report_data_mismatch", []pkix.Extension{wrapped(t, ExtContainer, testkit.Vectors(t, "attestation/simulator/attestation.bin"))}},
		{"a log that is not JSON", "log_malformed", []pkix.Extension{quote, wrapped(t, ExtEventLog, []byte("x"))}},
		{"a log that is not gzip", "ratls_event_log_compressed", []pkix.Extension{quote, wrapped(t, ExtEventLog, []byte("ELGZv1x"))}},
		{"a cut gzip log", "ratls_event_log_compressed", []pkix.Extension{quote, wrapped(t, ExtEventLog, zipped(t, []byte(smallLog))[:40])}},
		{"bytes after the gzip log", "ratls_event_log_compressed", []pkix.Extension{quote, wrapped(t, ExtEventLog, append(zipped(t, []byte(smallLog)), 0))}},
		{"a log one byte too long", "ratls_too_large", []pkix.Extension{quote, wrapped(t, ExtEventLog, zipped(t, bytes.Repeat([]byte(" "), MaxInflated+1)))}},
		{"a log of the longest size that is blank", "log_malformed", []pkix.Extension{quote, wrapped(t, ExtEventLog, zipped(t, bytes.Repeat([]byte(" "), MaxInflated)))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := FromCertificate(certificate(t, key, nil, c.ext...))
			wantCode(t, err, c.code)
			if got != nil {
				t.Error("an attestation beside an error")
			}
		})
	}
	// Go's parser refuses duplicates by itself; certificates made otherwise do not pass it.
	cert := certificate(t, key, nil, good)
	cert.Extensions = append(cert.Extensions, good)
	_, err := FromCertificate(cert)
	wantCode(t, err, "ratls_extension_duplicate")
}

// Threat B15: a kilobyte must not become gigabytes.
func TestThreat_B15_CompressedLogsCannotExhaustMemory(t *testing.T) {
	key, _ := newKey(t)
	bomb := zipped(t, make([]byte, 64<<20))
	cert := certificate(t, key, nil, wrapped(t, ExtQuote, []byte{1}), wrapped(t, ExtEventLog, bomb))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	_, err := FromCertificate(cert)
	runtime.ReadMemStats(&after)
	wantCode(t, err, "ratls_too_large")
	if used := after.TotalAlloc - before.TotalAlloc; used > 1<<20 {
		t.Errorf("a bomb of %d bytes made %d bytes of garbage", len(bomb), used)
	}
}

// --- the issuer's word ---

func sampleInfo() *AppInfo {
	a := &AppInfo{
		InstanceID: bytes.Repeat([]byte{3}, 20), OSImageHash: bytes.Repeat([]byte{7}, 32),
		KeyProvider: []byte(strings.Repeat("k", 300)), InitScriptHashes: [][]byte{bytes.Repeat([]byte{9}, 32)},
	}
	for i, b := range [][]byte{a.AppID[:], a.ComposeHash[:], a.DeviceID[:], a.MRSystem[:], a.MRAggregated[:]} {
		copy(b, bytes.Repeat([]byte{byte(0x10 + i)}, len(b)))
	}
	return a
}

func TestIssuerClaimsComeBack(t *testing.T) {
	key, _ := newKey(t)
	id := dstack.AppID{1, 2, 3}
	in := Issued{AppID: &id, Usage: UsageKMS, Info: sampleInfo()}
	ext, err := Extensions(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, e := range ext {
		order = append(order, e.Id.String())
	}
	if want := "1.3.6.1.4.1.62397.1.3 1.3.6.1.4.1.62397.1.9 1.3.6.1.4.1.62397.1.4"; strings.Join(order, " ") != want {
		t.Errorf("extensions %v", order)
	}
	out, err := IssuerClaims(certificate(t, key, nil, ext...))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(in, out) {
		t.Errorf("got %+v, want %+v", out, in)
	}
	if out, err = IssuerClaims(certificate(t, key, nil)); err != nil || !reflect.DeepEqual(out, Issued{}) {
		t.Errorf("a bare certificate gives %+v, %v", out, err)
	}
	for _, c := range []struct {
		name, code string
		ext        pkix.Extension
	}{
		{"a short app id", "ratls_extension_malformed", wrapped(t, ExtAppID, make([]byte, 19))},
		{"a long app id", "ratls_too_large", wrapped(t, ExtAppID, make([]byte, 21))},
		{"a usage that is not text", "ratls_extension_malformed", wrapped(t, ExtUsage, []byte{0xff})},
		{"an endless usage", "ratls_too_large", wrapped(t, ExtUsage, make([]byte, maxUsage+1))},
		{"broken app info", "ratls_app_info_malformed", wrapped(t, ExtAppInfo, []byte{0x99})},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := IssuerClaims(certificate(t, key, nil, c.ext))
			wantCode(t, err, c.code)
		})
	}
}

func TestAppInfoIsWhatAnotherLibraryWritesAndReads(t *testing.T) {
	for name, a := range map[string]*AppInfo{
		"full": sampleInfo(), "bare": {}, "no scripts allowed": {InitScriptHashes: [][]byte{}},
		"long provider": {KeyProvider: make([]byte, 1<<16-400)},
	} {
		t.Run(name, func(t *testing.T) {
			var scripts any
			if a.InitScriptHashes != nil {
				list := []any{}
				for _, h := range a.InitScriptHashes {
					list = append(list, h)
				}
				scripts = list
			}
			nonNil := func(b []byte) []byte { return append([]byte{}, b...) } // nil is not bin
			theirs, err := msgpack.Marshal([]any{
				a.AppID[:], a.ComposeHash[:], nonNil(a.InstanceID), a.DeviceID[:], a.MRSystem[:], a.MRAggregated[:],
				nonNil(a.OSImageHash), nonNil(a.KeyProvider), scripts,
			})
			if err != nil {
				t.Fatal(err)
			}
			if ours := a.Marshal(); !bytes.Equal(ours, theirs) {
				t.Fatalf("ours %x\ntheirs %x", ours, theirs)
			}
			back, err := ParseAppInfo(theirs)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(a, back) {
				t.Errorf("got %+v, want %+v", back, a)
			}
		})
	}
}

func TestAppInfoForms(t *testing.T) {
	full := sampleInfo().Marshal()
	bare := sampleInfo()
	bare.InitScriptHashes = nil
	old := bare.Marshal()
	old = old[:len(old)-1] // without the nil
	old[0]--
	if a, err := ParseAppInfo(old); err != nil || a.InitScriptHashes != nil || a.AppID != bare.AppID {
		t.Errorf("eight elements: %+v, %v", a, err)
	}
	edit := func(f func(b []byte) []byte) []byte { return f(bytes.Clone(full)) }
	for _, c := range []struct {
		name string
		data []byte
	}{
		{"nothing", nil},
		{"ten elements", edit(func(b []byte) []byte { b[0]++; return b })},
		{"seven elements", edit(func(b []byte) []byte { b[0] -= 2; return b })},
		{"a map", edit(func(b []byte) []byte { b[0] = 0x89; return b })},
		{"a text app id", edit(func(b []byte) []byte { b[1] = 0xd9; return b })},
		{"a short app id", edit(func(b []byte) []byte { b[2] = 19; return b })},
		{"a byte more", append(bytes.Clone(full), 0)},
		{"an endless byte string", []byte{0x99, packBin32, 0xff, 0xff, 0xff, 0xff}},
		{"six scripts", edit(func(b []byte) []byte { return append(b[:len(b)-35], packArray|6) })},
		{"an oversize document", make([]byte, maxAppInfo+1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseAppInfo(c.data)
			wantCode(t, err, "ratls_app_info_malformed")
		})
	}
	for n := range full {
		_, err := ParseAppInfo(full[:n])
		wantCode(t, err, "ratls_app_info_malformed")
	}
}

func TestAFileOfACertificateMustBeWhole(t *testing.T) {
	key, _ := newKey(t)
	other, _ := newKey(t)
	if err := CheckStandalone(certificate(t, key, nil), now); err != nil {
		t.Fatal(err)
	}
	client := certificate(t, key, func(c *x509.Certificate) {
		c.ExtKeyUsage, c.DNSNames = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, nil
		c.IPAddresses = []net.IP{{10, 0, 0, 1}}
	})
	if err := CheckStandalone(client, now); err != nil {
		t.Fatal(err)
	}
	issued := func() *x509.Certificate {
		leaf := certificate(t, key, nil)
		parent := certificate(t, other, func(c *x509.Certificate) { c.Subject.CommonName = "issuer" })
		der, err := x509.CreateCertificate(rand.Reader, leaf, parent, key.Public(), other)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}()
	forged := certificate(t, key, nil)
	forged.Signature[len(forged.Signature)-1] ^= 1
	for _, c := range []struct {
		name, code string
		cert       *x509.Certificate
		at         time.Time
	}{
		{"issued by another", "ratls_not_self_signed", issued, now},
		{"signed by another key", "ratls_not_self_signed", forged, now},
		{"before its time", "ratls_not_yet_valid", certificate(t, key, nil), now.Add(-2 * time.Hour)},
		{"after its time", "ratls_expired", certificate(t, key, nil), now.Add(2 * time.Hour)},
		{"not for signing", "ratls_key_usage", certificate(t, key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }), now},
		{"for no TLS role", "ratls_ext_key_usage", certificate(t, key, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), now},
		{"nameless", "ratls_no_name", certificate(t, key, func(c *x509.Certificate) { c.DNSNames = nil }), now},
	} {
		t.Run(c.name, func(t *testing.T) { wantCode(t, CheckStandalone(c.cert, c.at), c.code) })
	}
}

func TestOversizeEvidenceIsNotWritten(t *testing.T) {
	_, err := Extensions(Issued{}, make([]byte, MaxEvidence+1))
	wantCode(t, err, "ratls_too_large")
}

// --- fuzzing ---

func FuzzFromCertificate(f *testing.F) {
	key, spki := newKey(f)
	quote := testkit.Vectors(f, "attestation/tdx/ra-tls-tdx_quote.bin")
	wrap := func(b []byte) []byte { return wrapped(f, ExtContainer, b).Value }
	f.Add(wrap(encode(f, evidenceOver(f, spki))), []byte(nil), []byte(nil))
	f.Add([]byte(nil), wrap(quote), wrap([]byte(smallLog)))
	f.Add([]byte(nil), wrap(quote), wrap(zipped(f, []byte(smallLog))))
	f.Add([]byte{4, 0x84, 0xff, 0xff, 0xff, 0xff}, []byte{4, 0x80}, []byte{4, 1})
	base := certificate(f, key, nil)
	f.Fuzz(func(t *testing.T, c, q, log []byte) {
		cert := *base
		for ext, value := range map[int][]byte{ExtContainer: c, ExtQuote: q, ExtEventLog: log} {
			if value != nil {
				cert.Extensions = append(cert.Extensions[:len(cert.Extensions):len(cert.Extensions)], pkix.Extension{Id: OID(ext), Value: value})
			}
		}
		a, err := FromCertificate(&cert)
		if (a == nil) == (err == nil) || err != nil && fault.Code(err) == "" {
			t.Fatalf("attestation %v, error %v", a, err)
		}
		if a == nil {
			return
		}
		e, err := container.Decode(a.Container)
		if err != nil && !(a.Legacy && strings.HasPrefix(fault.Code(err), "container_log")) {
			t.Fatalf("the container that was returned does not decode: %v", err)
		}
		if err == nil && e.ReportData != ReportData(spki) {
			t.Fatal("the container is about another key")
		}
	})
}

func FuzzParseAppInfo(f *testing.F) {
	f.Add(sampleInfo().Marshal())
	f.Add((&AppInfo{}).Marshal())
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := ParseAppInfo(data)
		if err != nil {
			wantCode(t, err, "ratls_app_info_malformed")
			return
		}
		b, err := ParseAppInfo(a.Marshal())
		if err != nil || !reflect.DeepEqual(a, b) {
			t.Fatalf("%+v becomes %+v, %v", a, b, err)
		}
		if len(a.InitScriptHashes) > eventlog.MaxInitScripts {
			t.Fatal("too many scripts")
		}
	})
}
