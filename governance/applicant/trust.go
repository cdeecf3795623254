// SPDX-License-Identifier: Apache-2.0

package applicant

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/cache"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// Trust is whose evidence counts, as a configuration says it.
type Trust struct {
	PCCS string // where TDX collateral comes from; empty: the vendor's service
	KDS  string // where SEV-SNP certificates come from; empty: the vendor's service
	// DevRoots is the file or text of development roots, which then count alone.
	DevRoots string
	// Development is UseDevRoots in a program built for development, and nil in others,
	// which then have no trace of it (threats.md G08); code development_refused.
	Development func(*Judge, []byte) error
	Dir         string // keeps collateral, and the newest seen
	Warn        func(error)
}

// Judge returns the judge of such evidence.
func (t Trust) Judge() (*Judge, error) {
	j := &Judge{Roots: verifier.VendorRoots()}
	if t.DevRoots == "" {
		pcs, err := fetch.NewPCS(fetch.PCSOptions{Base: t.PCCS})
		if err != nil {
			return nil, err
		}
		kds, err := fetch.NewKDS(fetch.KDSOptions{Base: t.KDS})
		if err != nil {
			return nil, err
		}
		j.Collateral, err = cache.Open(filepath.Join(t.Dir, "collateral"), fetch.Vendors{PCS: pcs, KDS: kds}, cache.Options{Warn: t.Warn})
		if err != nil {
			return nil, err
		}
		j.Floor, err = floor.Open(filepath.Join(t.Dir, "collateral-floor"))
		return j, err
	}
	if t.Development == nil {
		return nil, fault.New("development_refused", "development roots are configured, and this program is built for production").
			WithFix("use a build for development (dstack up does)")
	}
	text := []byte(t.DevRoots)
	if !strings.HasPrefix(strings.TrimSpace(t.DevRoots), "{") {
		var err error
		if text, err = os.ReadFile(t.DevRoots); err != nil {
			return nil, fault.Wrap(err, "dev_roots_missing", "read the development roots")
		}
	}
	return j, t.Development(j, text)
}

// UseDevRoots makes the judge take development roots, and nothing of a vendor's: the two
// are not mixed.
func UseDevRoots(j *Judge, text []byte) error {
	roots, err := collateral.ParseDevRoots(text)
	if err != nil {
		return err
	}
	if j.Roots, err = verifier.DevelopmentRoots(roots); err != nil {
		return err
	}
	j.Development, j.Collateral = true, collateral.Static{Bundle: roots.Bundle()}
	return nil
}
