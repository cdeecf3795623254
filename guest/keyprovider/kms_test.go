// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
)

func startKMS(t *testing.T, opt kmstest.Options) *kmstest.Server {
	t.Helper()
	s, err := kmstest.Start(opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func client(t *testing.T, pin []byte, urls ...string) *KMS {
	return &KMS{URLs: urls, Pin: pin, App: testApp, VMConfig: `{"cpu":1}`, Attester: newGuest(t)}
}

func ask(t *testing.T, k *KMS) (*Grant, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return k.Keys(ctx)
}

func TestKeysOfAKMSAreUpstreams(t *testing.T) {
	var v map[string]map[string]string
	text := testkit.Vectors(t, "kms/derivations.json")
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil {
		t.Fatal(err)
	}
	v = map[string]map[string]string{}
	for name, body := range raw {
		var m map[string]string
		if json.Unmarshal(body, &m) == nil {
			v[name] = m
		}
	}
	in, want := v["inputs"], v["kms_derivations"]
	unhex := func(s string) []byte { b, _ := hex.DecodeString(s); return b }
	image := bytes.Repeat([]byte{7}, 32)
	s := startKMS(t, kmstest.Options{RootCA: unhex(in["root_ca_p256_scalar"]), RootK256: unhex(in["root_k256_scalar"]), GatewayAppID: "any", OSImageHash: image})
	if got := hex.EncodeToString(s.SPKI()); got != in["root_ca_spki_der"] {
		t.Fatalf("the root is %s", got)
	}
	for name, pin := range map[string][]byte{"pinned": s.SPKI(), "unpinned": nil} {
		g, err := ask(t, client(t, pin, s.URL+"/"))
		if err != nil {
			t.Fatal(name, err)
		}
		k := g.Keys
		for field, got := range map[string][]byte{
			"disk_crypt_key": k.Disk.Bytes(), "env_crypt_key": k.Env.Bytes(), "app_k256_key": k.App.Bytes(), "k256_signature": k.AppSignature,
		} {
			if hex.EncodeToString(got) != want[field] {
				t.Errorf("%s: %s = %x, want %s", name, field, got, want[field])
			}
		}
		if g.Unpinned != (pin == nil) || !bytes.Equal(g.OSImageHash, image) || k.GatewayAppID != "any" || g.Created {
			t.Errorf("%s: %+v", name, g)
		}
		if p := k.Provider; p.Kind != keys.KMS || p.URL != s.URL+"/prpc" || !bytes.Equal(p.SPKI, s.SPKI()) || p.TempCACert == "" || len(p.TempCAKey) == 0 {
			t.Errorf("%s: the provider is %+v", name, p)
		}
		// What upstream's agent would read.
		file, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := keys.Parse(file); err != nil {
			t.Error(err)
		}
	}
	for _, c := range s.Calls() {
		if c.Method != "GetAppKey" || c.Identity.AppID != testApp || c.VMConfig != `{"cpu":1}` {
			t.Errorf("the KMS saw %+v", c)
		}
	}
}

// Threat C03: what was verified on the first connection counts for nothing on the
// second, when somebody else answers that.
func TestThreat_C03_AnotherKMSOnTheSecondConnection(t *testing.T) {
	good, evil := startKMS(t, kmstest.Options{}), startKMS(t, kmstest.Options{})
	for name, pin := range map[string][]byte{"pinned": good.SPKI(), "unpinned": nil} {
		l := switchboard(t, func(n int) string {
			if n == 0 {
				return good.URL
			}
			return evil.URL
		})
		_, err := ask(t, client(t, pin, "https://"+l))
		wantCode(t, err, "channel_issuer")
		if n := len(evil.Calls()); n != 0 {
			t.Errorf("%s: the other KMS took %d calls", name, n)
		}
	}
}

// switchboard forwards connection n to where the function says.
func switchboard(t *testing.T, to func(n int) string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", strings.TrimPrefix(to(n), "https://"))
			if err != nil {
				in.Close()
				continue
			}
			wg.Go(func() { io.Copy(out, in); out.Close() })
			wg.Go(func() { io.Copy(in, out); in.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

func TestThreat_C04_AKMSThatIsNotThePinnedOne(t *testing.T) {
	pinned, other := startKMS(t, kmstest.Options{}), startKMS(t, kmstest.Options{})
	_, err := ask(t, client(t, pinned.SPKI(), other.URL))
	wantCode(t, err, "channel_issuer")
	if len(other.Calls()) != 0 {
		t.Error("it was asked for keys")
	}

	// A server of the pinned root that is no KMS.
	for _, pin := range [][]byte{nil, {}} {
		app := startKMS(t, kmstest.Options{Usage: ratls.UsageApp})
		if pin != nil {
			pin = app.SPKI()
		}
		_, err = ask(t, client(t, pin, app.URL))
		wantCode(t, err, "channel_usage")
	}

	named := startKMS(t, kmstest.Options{Names: []string{"kms.example.com"}})
	_, err = ask(t, client(t, named.SPKI(), named.URL))
	wantCode(t, err, "channel_certificate_name")

	k := client(t, pinned.SPKI(), pinned.URL)
	k.Now = func() time.Time { return time.Now().Add(20 * 365 * 24 * time.Hour) }
	_, err = ask(t, k)
	wantCode(t, err, "channel_certificate_time")

	_, err = ask(t, client(t, []byte("not a key"), pinned.URL))
	wantCode(t, err, "kms_pin")
}

func TestADenialHasTheWordsOfTheKMS(t *testing.T) {
	s := startKMS(t, kmstest.Options{Allow: func(c kmstest.Call) error { return errors.New("compose hash is not on the list") }})
	_, err := ask(t, client(t, s.SPKI(), s.URL))
	wantCode(t, err, "kms_denied")
	if !strings.Contains(err.Error(), "Boot denied: compose hash is not on the list") {
		t.Errorf("the reason is lost: %v", err)
	}
}

// The words of a server do not write to the console that shows them.
func TestADenialIsPrintable(t *testing.T) {
	for _, pad := range []string{"", "x"} { // a cut falls on a character, and inside one
		s := startKMS(t, kmstest.Options{Allow: func(kmstest.Call) error {
			return errors.New("no\x1b[31m\r\n\u202e" + pad + strings.Repeat("é", 600))
		}})
		_, err := ask(t, client(t, s.SPKI(), s.URL))
		wantCode(t, err, "kms_denied")
		if text := err.Error(); strings.ContainsAny(text, "\x1b\r\n\u202e") || !utf8.ValidString(text) || len(text) > 700 || !strings.Contains(text, "éé") {
			t.Errorf("%d bytes: %q", len(text), text)
		}
	}
}

func TestEvidenceOverAnotherKeyIsRefusedByTheKMS(t *testing.T) {
	s := startKMS(t, kmstest.Options{})
	k := client(t, s.SPKI(), s.URL)
	k.Attester.(*guest).wrong = true
	_, err := ask(t, k)
	wantCode(t, err, "kms_denied")
}

func TestMalformedAnswersAreRefused(t *testing.T) {
	for name, change := range map[string]func(*kmsapi.AppKeyResponse){
		"disk":         func(r *kmsapi.AppKeyResponse) { r.DiskCryptKey = r.DiskCryptKey[:31] },
		"env":          func(r *kmsapi.AppKeyResponse) { r.EnvCryptKey = nil },
		"app":          func(r *kmsapi.AppKeyResponse) { r.K256Key = append(bytes.Clone(r.K256Key), 0) },
		"app of zeros": func(r *kmsapi.AppKeyResponse) { r.K256Key = make([]byte, 32) },
		"env of zeros": func(r *kmsapi.AppKeyResponse) { r.EnvCryptKey = make([]byte, 32) },
		"signature":    func(r *kmsapi.AppKeyResponse) { r.K256Signature = r.K256Signature[:64] },
		"image":        func(r *kmsapi.AppKeyResponse) { r.OsImageHash = []byte{1} },
		"gateway":      func(r *kmsapi.AppKeyResponse) { r.GatewayAppId = strings.Repeat("a", 5000) },
		"gateway's id": func(r *kmsapi.AppKeyResponse) { r.GatewayAppId = strings.Repeat("ab", 19) },
		"any gateway":  func(r *kmsapi.AppKeyResponse) { r.GatewayAppId = strings.Repeat("ab", 20) + ",any" },
		"root":         func(r *kmsapi.AppKeyResponse) { r.CaCert = "" },
		"too large":    func(r *kmsapi.AppKeyResponse) { r.TproxyAppId = strings.Repeat("a", kmsclient.MaxReply) },
	} {
		s := startKMS(t, kmstest.Options{Answer: change})
		_, err := ask(t, client(t, s.SPKI(), s.URL))
		if fault.Code(err) != "kms_reply" {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := startKMS(t, kmstest.Options{})
	for _, pinned := range []bool{true, false} {
		s := startKMS(t, kmstest.Options{Answer: func(r *kmsapi.AppKeyResponse) { r.CaCert = other.RootPEM() }})
		k := client(t, nil, s.URL)
		if pinned {
			k.Pin = s.SPKI()
		}
		_, err := ask(t, k)
		wantCode(t, err, "kms_reply")
	}
}

// A stream without end and without a length, statuses that no KMS gives, and a
// redirect to where the answers would be.
func TestServersThatAreNoKMS(t *testing.T) {
	real := startKMS(t, kmstest.Options{})
	var mode atomic.Value
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch mode.Load() {
		case "endless":
			for {
				if _, err := w.Write(make([]byte, 32<<10)); err != nil {
					return
				}
			}
		case "redirect":
			http.Redirect(w, r, real.URL+r.URL.Path, http.StatusTemporaryRedirect)
		default:
			w.WriteHeader(http.StatusBadGateway)
		}
	}))
	// Its certificate is the KMS's own kind, so that only the answer is wrong.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ext, err := ratls.Extensions(ratls.Issued{Usage: ratls.UsageKMS}, nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtraExtensions: ext}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	s.StartTLS()
	defer s.Close()
	for _, m := range []string{"endless", "redirect", "status"} {
		mode.Store(m)
		_, err := ask(t, client(t, nil, s.URL))
		if fault.Code(err) != "kms_reply" {
			t.Errorf("%s: %v", m, err)
		}
	}
	if len(real.Calls()) != 0 {
		t.Error("the redirect was followed")
	}
}

func TestSeveralKMSs(t *testing.T) {
	dead := func() string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return "https://" + l.Addr().String()
	}
	good := startKMS(t, kmstest.Options{})
	denying := startKMS(t, kmstest.Options{Allow: func(kmstest.Call) error { return errors.New("no") }})
	g, err := ask(t, client(t, good.SPKI(), dead(), denying.URL, good.URL))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(g.Keys.Provider.URL, good.URL) {
		t.Errorf("keys of %s", g.Keys.Provider.URL)
	}

	one, two := dead(), dead()
	// A KMS that refuses has decided something; the others are merely not there.
	_, err = ask(t, client(t, nil, one, two, denying.URL))
	wantCode(t, err, "kms_denied")
	for _, part := range []string{one, two, denying.URL, "refused", "Boot denied: no"} {
		if !strings.Contains(fmt.Sprint(err), part) {
			t.Errorf("%q is missing in: %v", part, err)
		}
	}

	_, err = ask(t, client(t, nil))
	wantCode(t, err, "kms_url")
	_, err = ask(t, client(t, nil, make([]string, 17)...))
	wantCode(t, err, "kms_url")
	for _, bad := range []string{"http://127.0.0.1:1", "https://", "https://u:p@h", "https://h/?q", "https://h/#f", "::"} {
		_, err = ask(t, client(t, nil, bad))
		wantCode(t, err, "kms_url")
	}
}

// A server that accepts and says nothing costs the connect timeout, no more.
func TestASilentServerIsGivenUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	start := time.Now()
	_, err = ask(t, client(t, nil, "https://"+l.Addr().String()))
	wantCode(t, err, "kms_unreachable")
	if d := time.Since(start); d > 3*kmsclient.ConnectTimeout {
		t.Errorf("it took %s", d)
	}
}

// answerKeys puts the first n bytes of a canary in place of the disk's and the
// environment's key.
func answerKeys(canary []byte, n int) func(*kmsapi.AppKeyResponse) {
	return func(r *kmsapi.AppKeyResponse) {
		r.DiskCryptKey, r.EnvCryptKey = bytes.Clone(canary), bytes.Clone(canary[:n])
	}
}

// Who answers first must name the root that issued his own certificate; until that
// is sure no evidence is made for him.
func TestFirstAnswersThatAreRefused(t *testing.T) {
	other := startKMS(t, kmstest.Options{})
	for _, c := range []struct {
		name, code string
		pinned     bool
		change     func(*kmsapi.GetTempCaCertResponse)
	}{
		{"another root", "channel_issuer", false, func(r *kmsapi.GetTempCaCertResponse) { r.CaCert = other.RootPEM() }},
		{"another root than the pinned", "kms_reply", true, func(r *kmsapi.GetTempCaCertResponse) { r.CaCert = other.RootPEM() }},
		{"a root that is none", "kms_reply", false, func(r *kmsapi.GetTempCaCertResponse) { r.CaCert = "x" }},
		{"no key", "kms_reply", false, func(r *kmsapi.GetTempCaCertResponse) { r.TempCaKey = "" }},
		{"a key of another", "kms_reply", true, func(r *kmsapi.GetTempCaCertResponse) { r.TempCaCert = other.RootPEM() }},
	} {
		s := startKMS(t, kmstest.Options{AnswerTemp: c.change})
		k := client(t, nil, s.URL)
		if c.pinned {
			k.Pin = s.SPKI()
		}
		_, err := ask(t, k)
		if fault.Code(err) != c.code || len(k.Attester.(*guest).made) > 0 {
			t.Errorf("%s: %v, want %s; evidence made: %d", c.name, err, c.code, len(k.Attester.(*guest).made))
		}
	}
}

// A KMS's text with more certificates than the one that was checked makes nobody else
// a root of the app.
func TestThreat_C04_OnlyTheCheckedRootIsTrusted(t *testing.T) {
	stranger, err := kmstest.Start(kmstest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	s, err := kmstest.Start(kmstest.Options{Answer: func(r *kmsapi.AppKeyResponse) { r.CaCert += stranger.RootPEM() }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g, err := ask(t, client(t, s.SPKI(), s.URL))
	if err != nil {
		t.Fatal(err)
	}
	if g.Keys.CACert != s.RootPEM() {
		t.Errorf("the app would trust\n%s", g.Keys.CACert)
	}
}
