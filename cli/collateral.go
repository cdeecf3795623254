// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/cache"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// given takes the collateral that the caller named, and that of development roots.
// Public keys in a directory are the caller's word for an Arm CCA platform.
func (c *verifyCmd) given(a *app, req *verifier.Request, dev *collateral.Bundle) error {
	if dev != nil {
		req.Collateral = dev
	}
	if c.Collateral == "" {
		return nil
	}
	bundle, keys, err := readCollateral(a, c.Collateral)
	if err != nil {
		return err
	}
	if req.Collateral == nil {
		req.Collateral = new(collateral.Bundle)
	}
	req.Collateral.Add(bundle)
	if len(keys) > 0 {
		req.Roots = append(req.Roots, verifier.CallerKeys(keys))
	}
	return nil
}

func readCollateral(a *app, path string) (*collateral.Bundle, []collateral.NamedKey, error) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, fault.New("file_missing", "%s does not exist", path).WithFix("give a directory of certificates and CRLs, or a JSON bundle")
	case err != nil:
		return nil, nil, err
	case st.IsDir():
		return readDirectory(a, path)
	}
	raw, err := readLimited(path, collateral.MaxBundle)
	if err != nil {
		return nil, nil, err
	}
	return collateral.FromFiles(map[string][]byte{filepath.Base(path): raw})
}

// readDirectory takes every file of a directory that is collateral, and says which
// are not: what is then missing, the verdict names.
func readDirectory(a *app, path string) (*collateral.Bundle, []collateral.NamedKey, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, nil, fault.Wrap(err, "directory_unreadable", "collateral directory")
	}
	files := map[string][]byte{}
	var others []string
	for _, e := range entries {
		name := e.Name()
		if !e.Type().IsRegular() || strings.HasPrefix(name, ".") || len(files) == collateral.MaxFiles {
			others = append(others, name)
			continue
		}
		data, err := readLimited(filepath.Join(path, name), collateral.MaxDirectory)
		if err != nil {
			return nil, nil, err
		}
		if _, _, err := collateral.FromFiles(map[string][]byte{name: data}); fault.Code(err) == "directory_unknown_file" {
			others = append(others, name)
			continue
		}
		files[name] = data
	}
	if len(others) > 0 {
		a.step("no collateral, left alone: %s", strings.Join(others, ", "))
	}
	return collateral.FromFiles(files)
}

// lacks reports whether a verdict could be another one with collateral that can be
// fetched.
func lacks(v *verifier.Verdict) bool {
	return v.Has(verifier.Error, "collateral_missing") || v.TEE == dstack.SEVSNP && v.Has(verifier.Error, "crl_missing")
}

// fetched is collateral from the vendors' services.
type fetched struct {
	bundle *collateral.Bundle
	forget func() // drops what the cache has, so that the service is asked again
}

// fetch asks the vendors' services, or caches of them.
func (c *verifyCmd) fetch(a *app, src *verifier.Source) (*fetched, error) {
	want, ok, err := verifier.CollateralFor(src)
	if err != nil || !ok {
		return nil, err
	}
	pcs, err := fetch.NewPCS(fetch.PCSOptions{Base: c.PCCS})
	if err != nil {
		return nil, err
	}
	kds, err := fetch.NewKDS(fetch.KDSOptions{Base: c.KDS})
	if err != nil {
		return nil, err
	}
	var source collateral.Source = fetch.Vendors{PCS: pcs, KDS: kds}
	out := &fetched{forget: func() {}}
	if dir, err := os.UserCacheDir(); err == nil {
		kept, err := cache.Open(filepath.Join(dir, "dstack", "collateral"), source, cache.Options{Warn: func(err error) { a.step("collateral: %v", err) }})
		if err != nil {
			return nil, err
		}
		source, out.forget = kept, func() { kept.Forget(want) }
	}
	a.step("fetch collateral for %s", describe(want))
	out.bundle, err = source.Collateral(a.ctx, want)
	return out, err
}

func describe(want collateral.Request) string {
	if want.FMSPC != "" {
		return "TDX, FMSPC " + want.FMSPC
	}
	return "SEV-SNP, " + want.Product
}

// floors opens the highest numbers of collateral that this user has seen, by product
// (threats.md B03). Verification at a stated time has none: the past had others.
func (c *verifyCmd) floors() (*floor.Store, error) {
	if c.At != "" {
		return nil, nil
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return nil, nil // no home, as in a container that verifies once
	}
	return floor.Open(filepath.Join(dir, "dstack", "floor"))
}

// saveBundle writes evidence and collateral: a bundle that verifies offline, by
// itself or as the collateral of the same evidence.
func saveBundle(path string, evidence []byte, col *collateral.Bundle) error {
	if col == nil {
		col = new(collateral.Bundle)
	}
	raw, err := json.MarshalIndent(struct {
		Version int `json:"version"`
		collateral.Bundle
		Evidence collateral.Hex `json:"evidence"` // the source, byte for byte
	}{1, *col, evidence}, "", "  ")
	if err != nil {
		return fmt.Errorf("write the bundle: %w", err)
	}
	if err := durable.WriteFile(path, append(raw, '\n'), 0o644); err != nil {
		return fault.Wrap(err, "save", "save the bundle")
	}
	return nil
}
