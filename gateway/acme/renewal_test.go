// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/pem"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mholt/acmez/v3/acme"

	"github.com/dstack-go/dstack/gateway/acme/acmetest"
	"github.com/dstack-go/dstack/gateway/hostname"
)

// A CA that wants certificates renewed now, as before it revokes them, is heeded (RFC 9773).
func TestThreat_K11_RenewalInTheWindowOfTheCA(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := openWith(t, t.TempDir(), d, func(c *Config) { c.CheckEvery = 200 * time.Millisecond }, caOf("pebble", ca))
	ready(t, m, log)
	serial := func() string {
		cert, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: app + "." + base})
		if err != nil {
			t.Fatal(err)
		}
		return cert.Leaf.SerialNumber.String()
	}
	cert, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: app + "." + base})
	if err != nil {
		t.Fatal(err)
	}
	before, orders := serial(), ca.Orders()
	time.Sleep(2 * time.Second)
	if serial() != before || ca.Orders() != orders {
		t.Error("a certificate that is not due is renewed")
	}
	ca.SetRenewal(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})), time.Now().Add(-time.Hour), time.Now().Add(-time.Minute))
	until(t, log, "the renewal of the wildcard", func() bool { return serial() != before })
	if n := ca.Orders() - orders; n != 1 {
		t.Errorf("%d orders", n)
	}
}

// So is a guest's, which is told to ask again when the CA may have changed its mind.
func TestThreat_K11_AGuestsCertificateIsRenewedInTheWindow(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	m.minAsk = time.Second
	ready(t, m, log)
	key, name := newKey(t), hostname.Name(app+"-443."+base)
	sign := func() ([]byte, time.Time) {
		chain, _, again, err := m.Sign(t.Context(), csr(t, key, string(name)), []hostname.Name{name})
		if err != nil {
			t.Fatalf("%v\n%s", err, log)
		}
		return chain, again
	}
	first, again := sign()
	if wait := time.Until(again); wait > 3*time.Second {
		t.Errorf("to be asked again in %s, against the CA's word", wait)
	}
	time.Sleep(time.Until(again) + 100*time.Millisecond)
	orders := ca.Orders()
	if same, _ := sign(); !bytes.Equal(same, first) || ca.Orders() != orders {
		t.Error("what is not due was renewed")
	}
	ca.SetRenewal(t, string(first), time.Now().Add(-time.Hour), time.Now().Add(-time.Minute))
	time.Sleep(2 * time.Second)
	next, again := sign()
	if bytes.Equal(next, first) || ca.Orders() != orders+1 {
		t.Error("what is due was not renewed")
	}
	if !time.Now().Before(again) {
		t.Errorf("the next is due at %s", again)
	}
}

func TestWindowsThatHelpNobodyAreIgnored(t *testing.T) {
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1)
	m, log := open(t, t.TempDir(), d, caOf("pebble", ca))
	ready(t, m, log)
	cert, err := m.GetCertificate(&tls.ClientHelloInfo{ServerName: app + "." + base})
	if err != nil {
		t.Fatal(err)
	}
	r := &signedRecord{}
	late := acme.RenewalInfo{SelectedTime: cert.Leaf.NotAfter.Add(time.Hour)}
	late.SuggestedWindow.Start, late.SuggestedWindow.End = cert.Leaf.NotAfter, cert.Leaf.NotAfter.Add(2*time.Hour)
	retry := time.Now().Add(1000 * time.Hour)
	late.RetryAfter = &retry
	r.schedule(cert.Leaf, minAsk, &late, nil)
	if s := r.signed(); s.renewAt.After(cert.Leaf.NotAfter) || time.Until(s.askAt) > maxAsk {
		t.Errorf("%+v", s)
	}
	retry = time.Now()
	r.schedule(cert.Leaf, minAsk, &late, nil)
	if s := r.signed(); time.Until(s.askAt) < minAsk-2*time.Second {
		t.Errorf("a CA has us ask every %s", time.Until(s.askAt))
	}
	r.schedule(cert.Leaf, minAsk, nil, acme.ErrUnsupported)
	if s := r.signed(); !s.next().Equal(s.renewAt) {
		t.Errorf("%+v", s)
	}
}

// Threat K10: neither does the key of an external account leave. Accounts at such a CA are
// made with it, and not without.
func TestThreat_K10_TheExternalAccountsKeyStaysInside(t *testing.T) {
	mac := base64.RawURLEncoding.EncodeToString([]byte("canary-of-the-external-account-key"))
	d := acmetest.NewDNS(t, base)
	ca := acmetest.NewCA(t, d, 1, 1, [2]string{"kid-1", mac})
	with := caOf("pebble", ca)
	with.KeyID, with.MACKey = "kid-1", mac
	dir := t.TempDir()
	m, log := open(t, dir, d, with)
	ready(t, m, log)
	m.log.Error("an error that quotes "+mac, "and", mac)
	if strings.Contains(log.String(), mac) {
		t.Error("the log has the key")
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(mac)) {
			t.Errorf("%s has the key", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}

	without, _ := open(t, t.TempDir(), d, caOf("pebble", ca))
	_, err = without.Register(t.Context())
	wantCode(t, err, "acme_account")
	wrong := with
	wrong.MACKey = base64.RawURLEncoding.EncodeToString([]byte("another-key-of-the-external-account"))
	other, _ := open(t, t.TempDir(), d, wrong)
	if _, err = other.Register(t.Context()); err == nil || strings.Contains(err.Error(), wrong.MACKey) {
		t.Errorf("with another's key: %v", err)
	}
	half := with
	half.MACKey = ""
	_, err = New(Config{Storage: m.cfg.Storage, CAs: []CA{half}})
	wantCode(t, err, "acme_ca")
}
