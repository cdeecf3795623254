// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"crypto/x509"
	"os"

	"github.com/dstack-go/dstack/internal/fault"
)

// defaultHosts are public NTS servers (guest-os.md §2.7), one of each operator, so that
// an operator has one vote: Cloudflare, PTB, Netnod, SIDN, System76.
var defaultHosts = []string{
	"time.cloudflare.com:4460",
	"ptbtime1.ptb.de:4460",
	"nts.netnod.se:4460",
	"ntppool1.time.nl:4460",
	"virginia.time.system76.com:4460",
}

// DefaultServers is the list of the image, which is measured with this code. The roots
// are the image's.
func DefaultServers(roots *x509.CertPool) []Server {
	var out []Server
	for _, host := range defaultHosts {
		out = append(out, Server{host, roots})
	}
	return out
}

// Sources asks each of the servers by NTS.
func Sources(servers []Server, sys System) []Source {
	var out []Source
	for _, s := range servers {
		out = append(out, NTS(s, sys))
	}
	return out
}

// ParseRoots reads certificate authorities in PEM form. Code time_roots when there are
// none.
func ParseRoots(pem []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fault.New("time_roots", "there is no certificate of an authority for the time servers").
			WithFix("give it in PEM form")
	}
	return pool, nil
}

// ReadRoots is ParseRoots on a file of the measured image.
func ReadRoots(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fault.Wrap(err, "time_roots", "read the certificate authorities")
	}
	return ParseRoots(pem)
}
