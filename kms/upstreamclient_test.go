// SPDX-License-Identifier: Apache-2.0

package kms_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	p256 "crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	k256 "github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	"golang.org/x/crypto/sha3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	kmsapi "github.com/dstack-go/dstack/api/kms"
)

// This is a client of upstream's protocol, written from spec/kms.md and from nothing
// else: of this module it has the generated messages. What it needs of the world, the
// fixture gives it as values.

// upstreamFixture is a KMS with the root keys of vectors/kms/derivations.json, and a
// guest that it allows.
type upstreamFixture struct {
	addr, name string // where it listens, and the name in its certificate
	now        func() time.Time
	// evidence makes a container of the guest's over report data of 64 bytes.
	evidence func(data []byte) []byte
	// stranger does so for a guest of an app that nobody allows.
	stranger func(data []byte) []byte
	app      []byte // 20 bytes
	instance []byte // 20 bytes
	image    []byte // 32 bytes
	version  string // of the program
	vectors  func(name string) []byte
}

// Extensions, kms.md §2.2.
var (
	oidAppID    = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, 3}
	oidUsage    = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, 4}
	oidEvidence = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, 8}
	oidAppInfo  = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 62397, 1, 9}
)

type upstreamClient struct {
	t *testing.T
	f upstreamFixture
	// ca is what GetTempCaCert gave.
	ca *kmsapi.GetTempCaCertResponse
}

func (c *upstreamClient) check(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *upstreamClient) unhex(s string) []byte {
	c.t.Helper()
	b, err := hex.DecodeString(s)
	c.check(err)
	return b
}

// client makes an HTTP client. Without roots nothing of the server is checked, which is
// how upstream's guests meet a KMS first.
func (c *upstreamClient) client(roots *x509.CertPool, own *tls.Certificate) *http.Client {
	cfg := &tls.Config{ServerName: c.f.name, RootCAs: roots, Time: c.f.now}
	if roots == nil {
		cfg.InsecureSkipVerify = true
		cfg.VerifyConnection = func(tls.ConnectionState) error { return nil }
	}
	if own != nil {
		cfg.Certificates = []tls.Certificate{*own}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own, nil }
	}
	tr := &http.Transport{TLSClientConfig: cfg, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", c.f.addr)
	}}
	c.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

type httpReply struct {
	status int
	header http.Header
	body   []byte
}

func (c *upstreamClient) do(h *http.Client, method, path, contentType string, body []byte) httpReply {
	c.t.Helper()
	req, err := http.NewRequest(method, "https://"+c.f.name+path, bytes.NewReader(body))
	c.check(err)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := h.Do(req)
	c.check(err)
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	c.check(err)
	if resp.Header.Get("X-App-Version") != c.f.version {
		c.t.Errorf("%s: X-App-Version %q", path, resp.Header.Get("X-App-Version"))
	}
	return httpReply{resp.StatusCode, resp.Header, out}
}

// proto calls a method in protobuf.
func (c *upstreamClient) proto(h *http.Client, method string, req, resp proto.Message) {
	c.t.Helper()
	var body []byte
	if req != nil {
		var err error
		body, err = proto.Marshal(req)
		c.check(err)
	}
	r := c.do(h, "POST", "/prpc/"+method, "application/octet-stream", body)
	if r.status != http.StatusOK {
		c.t.Fatalf("%s: %d %q", method, r.status, r.body)
	}
	c.check(proto.Unmarshal(r.body, resp))
}

// json calls a method in JSON.
func (c *upstreamClient) json(h *http.Client, path, contentType, body string) map[string]any {
	c.t.Helper()
	r := c.do(h, "POST", path, contentType, []byte(body))
	if r.status != http.StatusOK || r.header.Get("Content-Type") != "application/json" {
		c.t.Fatalf("%s: %d %q %q", path, r.status, r.header.Get("Content-Type"), r.body)
	}
	out := map[string]any{}
	c.check(json.Unmarshal(r.body, &out))
	return out
}

func (c *upstreamClient) cert(text string) *x509.Certificate {
	c.t.Helper()
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
		c.t.Fatalf("no single certificate: %q", text)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	c.check(err)
	return cert
}

// extension returns what is in the inner OCTET STRING.
func (c *upstreamClient) extension(cert *x509.Certificate, oid asn1.ObjectIdentifier) []byte {
	c.t.Helper()
	for _, e := range cert.Extensions {
		if e.Id.Equal(oid) {
			var inner []byte
			rest, err := asn1.Unmarshal(e.Value, &inner)
			if err != nil || len(rest) > 0 {
				c.t.Fatalf("extension %s is no OCTET STRING in itself: %v", oid, err)
			}
			return inner
		}
	}
	return nil
}

func ratlsReportData(spki []byte) []byte {
	sum := sha512.Sum512(append([]byte("ratls-cert:"), spki...))
	return sum[:]
}

// ratls makes the client certificate of §2.2 and §5.1 (b).
func (c *upstreamClient) ratls(evidence func([]byte) []byte) *tls.Certificate {
	c.t.Helper()
	key, err := p256.GenerateKey(elliptic.P256(), rand.Reader)
	c.check(err)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	c.check(err)
	value, err := asn1.Marshal(evidence(ratlsReportData(spki)))
	c.check(err)
	block, _ := pem.Decode([]byte(c.ca.TempCaKey))
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	c.check(err)
	sum := sha256.Sum256(spki)
	sum[0] &= 0x7f
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(sum[:20]), Subject: pkix.Name{CommonName: "RA-TLS TEMP Cert"},
		NotBefore: time.Date(1975, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: c.f.now().AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: []pkix.Extension{{Id: oidEvidence, Value: value}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert(c.ca.TempCaCert), key.Public(), parsed)
	c.check(err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// derivations of §4, from known roots.
type knownRoots struct{ d, k []byte }

func kdf(ikm []byte, contexts ...[]byte) []byte {
	out, err := hkdf.Key(sha256.New, ikm, []byte("RATLS"), string(slices.Concat(contexts...)), 32)
	if err != nil {
		panic(err)
	}
	return out
}

func p256Point(scalar []byte) []byte {
	key, err := ecdh.P256().NewPrivateKey(scalar)
	if err != nil {
		panic(err)
	}
	return key.PublicKey().Bytes()
}

func (r knownRoots) dh(contexts ...[]byte) []byte {
	s := kdf(r.d, contexts...)
	prefix, _ := hex.DecodeString("308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b0201010420")
	middle, _ := hex.DecodeString("a144034200")
	sum := sha256.Sum256(slices.Concat(prefix, s, middle, p256Point(s)))
	return sum[:]
}

func keccak(parts ...[]byte) []byte {
	h := sha3.NewLegacyKeccak256()
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

// signer recovers the compressed key that signed, of r ‖ s ‖ v.
func (c *upstreamClient) signer(signature []byte, parts ...[]byte) []byte {
	c.t.Helper()
	if len(signature) != 65 || signature[64] > 3 {
		c.t.Fatalf("a signature of %d bytes: %x", len(signature), signature)
	}
	compact := append([]byte{signature[64] + 27 + 4}, signature[:64]...)
	key, _, err := k256.RecoverCompact(compact, keccak(parts...))
	c.check(err)
	return key.SerializeCompressed()
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// SCALE, §3.4.
func scaleLen(n int) []byte {
	switch {
	case n < 1<<6:
		return []byte{byte(n << 2)}
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(nil, uint16(n<<2|1))
	default:
		return binary.LittleEndian.AppendUint32(nil, uint32(n<<2|2))
	}
}

func scaleBytes(b []byte) []byte { return append(scaleLen(len(b)), b...) }

func scaleBool(v bool) []byte {
	if v {
		return []byte{1}
	}
	return []byte{0}
}

type scaleConfig struct {
	Org     *string  `json:"org_name"`
	Subject string   `json:"subject"`
	Names   []string `json:"subject_alt_names"`
	Server  bool     `json:"usage_server_auth"`
	Client  bool     `json:"usage_client_auth"`
	Quote   bool     `json:"ext_quote"`
	Info    bool     `json:"ext_app_info"`
	Before  *uint64  `json:"not_before"`
	After   *uint64  `json:"not_after"`
}

func scaleCSR(confirm string, pubkey []byte, c scaleConfig, attestation []byte) []byte {
	out := slices.Concat(scaleBytes([]byte(confirm)), scaleBytes(pubkey))
	if c.Org == nil {
		out = append(out, 0)
	} else {
		out = slices.Concat(out, []byte{1}, scaleBytes([]byte(*c.Org)))
	}
	out = slices.Concat(out, scaleBytes([]byte(c.Subject)), scaleLen(len(c.Names)))
	for _, n := range c.Names {
		out = append(out, scaleBytes([]byte(n))...)
	}
	out = slices.Concat(out, scaleBool(c.Server), scaleBool(c.Client), scaleBool(c.Quote), scaleBool(c.Info))
	for _, v := range []*uint64{c.Before, c.After} {
		if v == nil {
			out = append(out, 0)
		} else {
			out = binary.LittleEndian.AppendUint64(append(out, 1), *v)
		}
	}
	return append(out, attestation...)
}

// runUpstreamClient is the whole conversation.
func runUpstreamClient(t *testing.T, f upstreamFixture) {
	c := &upstreamClient{t: t, f: f}
	var vectors struct {
		Inputs struct {
			App      string `json:"app_id"`
			Instance string `json:"instance_id"`
			CA       string `json:"root_ca_p256_scalar"`
			CASPKI   string `json:"root_ca_spki_der"`
			K256     string `json:"root_k256_scalar"`
			K256Pub  string `json:"root_k256_pubkey_compressed"`
		} `json:"inputs"`
		Derived map[string]string `json:"kms_derivations"`
	}
	c.check(json.Unmarshal(f.vectors("kms/derivations.json"), &vectors))
	roots := knownRoots{c.unhex(vectors.Inputs.CA), c.unhex(vectors.Inputs.K256)}
	rootSPKI, rootK256 := c.unhex(vectors.Inputs.CASPKI), c.unhex(vectors.Inputs.K256Pub)
	if !bytes.Equal(f.app, c.unhex(vectors.Inputs.App)) || !bytes.Equal(f.instance, c.unhex(vectors.Inputs.Instance)) {
		t.Fatal("the fixture is not that of the vectors")
	}

	// First contact: nobody is checked.
	unverified := c.client(nil, nil)
	c.ca = new(kmsapi.GetTempCaCertResponse)
	c.proto(unverified, "GetTempCaCert", nil, c.ca)
	root, temp := c.cert(c.ca.CaCert), c.cert(c.ca.TempCaCert)
	for _, a := range []struct {
		cert *x509.Certificate
		name string
		path int
	}{{root, "Dstack KMS CA", 1}, {temp, "Dstack Client Temp CA", 0}} {
		if a.cert.Subject.CommonName != a.name || !slices.Equal(a.cert.Subject.Organization, []string{"Dstack"}) || !a.cert.IsCA ||
			a.cert.MaxPathLen != a.path || a.cert.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign|x509.KeyUsageCRLSign ||
			a.cert.CheckSignatureFrom(a.cert) != nil || len(a.cert.AuthorityKeyId) != 0 {
			t.Errorf("%s: %+v", a.name, a.cert.Subject)
		}
	}
	if !bytes.Equal(root.RawSubjectPublicKeyInfo, rootSPKI) {
		t.Fatal("another root")
	}
	if again := c.json(unverified, "/prpc/KMS.GetTempCaCert?json", "", "{}"); again["temp_ca_key"] != c.ca.TempCaKey || again["ca_cert"] != c.ca.CaCert {
		t.Error("JSON says another temporary CA")
	}

	// The second connection: the root that was given, and nothing else.
	pool := x509.NewCertPool()
	pool.AddCert(root)
	plain := c.client(pool, nil)
	resp, err := plain.Get("https://" + f.name + "/health")
	c.check(err)
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	c.check(err)
	leaf := resp.TLS.PeerCertificates[0]
	if string(text) != "OK" || string(c.extension(leaf, oidUsage)) != "kms:rpc" || leaf.Subject.CommonName != f.name ||
		len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) != 0 || c.extension(leaf, oidEvidence) == nil {
		t.Errorf("health %q, leaf %+v for %q", text, leaf.Subject, c.extension(leaf, oidUsage))
	}
	guest := c.client(pool, c.ratls(f.evidence))

	t.Run("GetAppKey", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		var keys kmsapi.AppKeyResponse
		c.proto(guest, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, &keys)
		wantDisk := roots.dh(f.app, f.instance, []byte("app-disk-crypt-key"))
		wantEnv := roots.dh(f.app, []byte("env-encrypt-key"))
		wantK256 := kdf(roots.k, f.app, []byte("app-key"))
		for _, v := range []struct {
			name   string
			got    []byte
			want   []byte
			vector string
		}{
			{"disk", keys.DiskCryptKey, wantDisk, "disk_crypt_key"}, {"env", keys.EnvCryptKey, wantEnv, "env_crypt_key"},
			{"k256", keys.K256Key, wantK256, "app_k256_key"},
		} {
			if !bytes.Equal(v.got, v.want) || hex.EncodeToString(v.got) != vectors.Derived[v.vector] {
				t.Errorf("%s: %x, derived %x, vector %s", v.name, v.got, v.want, vectors.Derived[v.vector])
			}
		}
		public := c.unhex(vectors.Derived["app_k256_pubkey_compressed"])
		if got := c.signer(keys.K256Signature, []byte("dstack-kms-issued"), []byte(":"), f.app, public); !bytes.Equal(got, rootK256) ||
			hex.EncodeToString(keys.K256Signature) != vectors.Derived["k256_signature"] {
			t.Errorf("the app's key is signed by %x: %x", got, keys.K256Signature)
		}
		if !bytes.Equal(c.cert(keys.CaCert).RawSubjectPublicKeyInfo, rootSPKI) || !bytes.Equal(keys.OsImageHash, f.image) || keys.TproxyAppId != keys.GatewayAppId {
			t.Errorf("ca_cert, image %x, gateway %q and %q", keys.OsImageHash, keys.TproxyAppId, keys.GatewayAppId)
		}
		for _, form := range []struct{ path, contentType string }{
			{"/prpc/KMS.GetAppKey?json", ""}, {"/prpc/GetAppKey?json=1", ""}, {"/prpc/KMS.GetAppKey?json=true", "application/octet-stream"}, {"/prpc/GetAppKey", "application/json"},
		} {
			out := c.json(guest, form.path, form.contentType, `{"api_version":0,"vm_config":""}`)
			if out["disk_crypt_key"] != hex.EncodeToString(wantDisk) || out["env_crypt_key"] != hex.EncodeToString(wantEnv) ||
				out["k256_key"] != hex.EncodeToString(wantK256) || out["os_image_hash"] != hex.EncodeToString(f.image) {
				t.Errorf("%s: %v", form.path, out)
			}
		}
	})

	t.Run("GetAppEnvEncryptPubKey", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		var r kmsapi.PublicKeyResponse
		c.proto(plain, "KMS.GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: f.app}, &r)
		if hex.EncodeToString(r.PublicKey) != vectors.Derived["env_encrypt_pubkey"] || r.Timestamp != uint64(f.now().Unix()) {
			t.Errorf("key %x at %d", r.PublicKey, r.Timestamp)
		}
		label := []byte("dstack-env-encrypt-pubkey:")
		if got := c.signer(r.Signature, label, f.app, r.PublicKey); !bytes.Equal(got, rootK256) || hex.EncodeToString(r.Signature) != vectors.Derived["env_pubkey_signature_v0"] {
			t.Errorf("v0 is signed by %x", got)
		}
		if got := c.signer(r.SignatureV1, label, f.app, u64(r.Timestamp), r.PublicKey); !bytes.Equal(got, rootK256) {
			t.Errorf("v1 is signed by %x", got)
		}
		for _, text := range []string{hex.EncodeToString(f.app), "0x" + hex.EncodeToString(f.app)} {
			if out := c.json(plain, "/prpc/GetAppEnvEncryptPubKey?json", "", `{"app_id":"`+text+`"}`); out["public_key"] != vectors.Derived["env_encrypt_pubkey"] {
				t.Errorf("in JSON: %v", out)
			}
		}
		// GET is JSON, with the request in the query.
		got := c.do(plain, "GET", "/prpc/GetAppEnvEncryptPubKey?app_id="+hex.EncodeToString(f.app), "", nil)
		if got.status != http.StatusOK || !bytes.Contains(got.body, []byte(vectors.Derived["env_encrypt_pubkey"])) {
			t.Errorf("by GET: %d %q", got.status, got.body)
		}
	})

	t.Run("SignCert", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		var scale struct {
			Vectors []struct {
				Confirm     string      `json:"confirm"`
				Pubkey      string      `json:"pubkey"`
				Config      scaleConfig `json:"config"`
				Attestation struct {
					Quote      string `json:"quote"`
					ReportData string `json:"report_data"`
				} `json:"attestation"`
				Scale string `json:"scale"`
			} `json:"vectors"`
		}
		c.check(json.Unmarshal(f.vectors("kms/csr-v2-scale.json"), &scale))
		for _, v := range scale.Vectors {
			// Version 0, TDX, quote, no events, no runtime events, report data, no config.
			attestation := slices.Concat([]byte{0, 0}, scaleBytes(c.unhex(v.Attestation.Quote)), []byte{0, 0}, c.unhex(v.Attestation.ReportData), []byte{0})
			if got := hex.EncodeToString(scaleCSR(v.Confirm, c.unhex(v.Pubkey), v.Config, attestation)); got != v.Scale {
				t.Errorf("this client's SCALE is not that of the vectors:\n%s\n%s", got, v.Scale)
			}
		}
		key, err := p256.GenerateKey(elliptic.P256(), rand.Reader)
		c.check(err)
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		c.check(err)
		sign := func(confirm string, cfg scaleConfig) *kmsapi.SignCertRequest {
			csr := scaleCSR(confirm, spki, cfg, f.evidence(ratlsReportData(spki)))
			sum := sha256.Sum256(csr)
			signature, err := p256.SignASN1(rand.Reader, key, sum[:])
			c.check(err)
			return &kmsapi.SignCertRequest{ApiVersion: 2, Csr: csr, Signature: signature}
		}
		const confirm = "please sign cert:"
		org := "Example"
		var out kmsapi.SignCertResponse
		c.proto(plain, "SignCert", sign(confirm, scaleConfig{Org: &org, Subject: "web", Names: []string{"web.apps.test"}, Server: true, Client: true, Quote: true, Info: true}), &out)
		if len(out.CertificateChain) != 3 {
			t.Fatalf("%d certificates", len(out.CertificateChain))
		}
		leaf, ca, top := c.cert(out.CertificateChain[0]), c.cert(out.CertificateChain[1]), c.cert(out.CertificateChain[2])
		between := x509.NewCertPool()
		between.AddCert(ca)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, CurrentTime: f.now(), DNSName: "web.apps.test"}); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, spki) || !bytes.Equal(c.extension(leaf, oidAppID), f.app) || string(c.extension(leaf, oidUsage)) != "app:custom" ||
			c.extension(leaf, oidEvidence) == nil || c.extension(leaf, oidAppInfo) == nil || leaf.Subject.CommonName != "web" || !slices.Equal(leaf.Subject.Organization, []string{org}) ||
			!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
			t.Errorf("leaf %+v", leaf.Subject)
		}
		if !bytes.Equal(point(c, ca), p256Point(kdf(roots.d, f.app, []byte("app-ca")))) || string(c.extension(ca, oidUsage)) != "app:ca" ||
			!bytes.Equal(c.extension(ca, oidAppID), f.app) || ca.MaxPathLen != 0 || ca.Subject.CommonName != "Dstack App CA" {
			t.Errorf("app CA %+v", ca.Subject)
		}
		if !bytes.Equal(top.RawSubjectPublicKeyInfo, rootSPKI) {
			t.Error("the chain ends elsewhere")
		}
		c.refused(plain, "SignCert", sign("please sign this:", scaleConfig{Subject: "x"}), "Invalid confirm word")
		r := sign(confirm, scaleConfig{Subject: "x"})
		r.ApiVersion = 3
		c.refused(plain, "SignCert", r, "Unsupported API version: 3")
	})

	t.Run("GetMeta", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		for _, path := range []string{"/prpc/GetMeta?json", "/prpc/KMS.GetMeta?json="} {
			m := c.json(plain, path, "", "")
			for _, name := range []string{"ca_cert", "allow_any_upgrade", "k256_pubkey", "bootstrap_info", "is_dev", "gateway_app_id", "kms_contract_address", "chain_id", "app_auth_implementation"} {
				if _, there := m[name]; !there {
					t.Errorf("%s: no field %s", path, name)
				}
			}
			for _, name := range []string{"bootstrap_info", "gateway_app_id", "kms_contract_address", "chain_id", "app_auth_implementation"} {
				if m[name] != nil {
					t.Errorf("%s: %s is %v, not null", path, name, m[name])
				}
			}
			if m["k256_pubkey"] != hex.EncodeToString(rootK256) || m["is_dev"] != m["allow_any_upgrade"] || m["ca_cert"] != c.ca.CaCert {
				t.Errorf("%s: %v", path, m)
			}
		}
		if got := c.do(plain, "GET", "/prpc/GetMeta", "", nil); got.status != http.StatusOK || got.header.Get("Content-Type") != "application/json" {
			t.Errorf("by GET: %d %q", got.status, got.body)
		}
	})

	t.Run("refusals", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		c.refused(guest, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 2}, "Unsupported API version: 2")
		c.refused(plain, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, "No attestation provided")
		c.refused(plain, "GetAppEnvEncryptPubKey", &kmsapi.AppId{AppId: make([]byte, 19)}, "app_id must be 20 bytes")
		c.refused(c.client(pool, c.ratls(f.stranger)), "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, "Boot denied: ")
		// Evidence over another key than the certificate's.
		c.refused(c.client(pool, c.ratls(func([]byte) []byte { return f.evidence(make([]byte, 64)) })), "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1}, "")
		r := c.do(plain, "POST", "/prpc/KMS.NoSuchMethod?json", "", nil)
		if r.status != http.StatusBadRequest {
			t.Errorf("a method that is none: %d %q", r.status, r.body)
		}
	})

	t.Run("metrics", func(t *testing.T) {
		c := &upstreamClient{t, f, c.ca}
		body := c.do(plain, "GET", "/metrics", "", nil).body
		for _, name := range []string{"dstack_kms_attestation_requests_total", "dstack_kms_attestation_failures_total"} {
			if !regexp.MustCompile(`(?m)^` + name + ` [1-9][0-9]*$`).Match(body) {
				t.Errorf("no %s in\n%s", name, body)
			}
		}
	})
}

// refused calls a method both ways and wants status 400 with a text.
func (c *upstreamClient) refused(h *http.Client, method string, req proto.Message, want string) {
	c.t.Helper()
	body, err := proto.Marshal(req)
	c.check(err)
	r := c.do(h, "POST", "/prpc/"+method, "", body)
	number, _, n := protowire.ConsumeTag(r.body)
	var text string
	if n > 0 && number == 1 {
		text, _ = protowire.ConsumeString(r.body[n:])
	}
	if r.status != http.StatusBadRequest || text == "" || !strings.Contains(text, want) {
		c.t.Errorf("%s: %d %q, want 400 and %q", method, r.status, r.body, want)
	}
	fields := map[string]any{}
	req.ProtoReflect().Range(jsonFields(fields))
	asJSON, err := json.Marshal(fields)
	c.check(err)
	r = c.do(h, "POST", "/prpc/KMS."+method+"?json", "", asJSON)
	var e struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal(r.body, &e); err != nil || r.status != http.StatusBadRequest || !strings.Contains(e.Error, want) || e.Error == "" {
		c.t.Errorf("%s in JSON: %d %q, want 400 and %q", method, r.status, r.body, want)
	}
}

// jsonFields writes a flat message's fields as §3.1 says.
func jsonFields(to map[string]any) func(protoreflect.FieldDescriptor, protoreflect.Value) bool {
	return func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		to[string(f.Name())] = v.Interface()
		if f.Kind() == protoreflect.BytesKind {
			to[string(f.Name())] = hex.EncodeToString(v.Bytes())
		}
		return true
	}
}

// point is the uncompressed point of a certificate's key.
func point(c *upstreamClient, cert *x509.Certificate) []byte {
	c.t.Helper()
	key, ok := cert.PublicKey.(*p256.PublicKey)
	if !ok {
		c.t.Fatalf("a key %T", cert.PublicKey)
	}
	b, err := key.Bytes()
	c.check(err)
	return b
}
