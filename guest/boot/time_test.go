// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

func TestTimeServersOfTheManifest(t *testing.T) {
	m := parsed(t, manifest.Draft{TimeServers: []manifest.TimeServer{
		{Host: "a:4460", CACert: testCA}, {Host: "b:4460", CACert: testCA}, {Host: "c:4460", CACert: testCA},
	}})
	servers, err := timeServers(m)
	if err != nil || len(servers) != 3 || servers[1].Host != "b:4460" || servers[1].Roots == nil {
		t.Errorf("%v, %v", servers, err)
	}
	m.TimeServers[2].CACert = "no certificate"
	if _, err := timeServers(m); fault.Code(err) != "time_roots" {
		t.Errorf("an authority that is none: %v", err)
	}
}

func TestTheBuildIsTheLowerBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "os-release")
	if _, err := buildTime(path); fault.Code(err) != "time_unproven" {
		t.Errorf("no file: %v", err)
	}
	at := time.Unix(1767225600, 0)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
	if b, err := buildTime(path); err != nil || !b.Time.Equal(at) {
		t.Errorf("%v, %v", b, err)
	}
}

// testCA is a certificate of nobody.
var testCA = selfSigned("authority")

func selfSigned(name string) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}
