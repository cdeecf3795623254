// SPDX-License-Identifier: Apache-2.0

// Package verifyd is dstack-verifier: the service that judges evidence for clients
// who would rather ask than link a verifier, with upstream's API.
//
// # Two answers
//
// A reply has upstream's is_valid, reason and details, and beside them a verdict.
// is_valid keeps upstream's meaning: signatures, certificate chains and event log
// hold, and the launch registers are those of the image that the evidence itself
// names. It asks neither whether that image is one the caller wants, nor what runs
// in it, nor how current the platform is, nor whether the evidence is fresh; each of
// these is how an attacker with a genuine machine passes. The verdict is package
// verifier's, under the caller's policy or the service's, and denies by default
// (threats.md B04, B10). Nobody should act on is_valid alone.
//
// # Guarantees
//
// Requests, evidence and images are bounded in size, time and number, and no program
// is run. URLs come from the configuration alone. What a request makes the service
// fetch is collateral of a spelling that was checked, and images by hash, which are
// the hash's or refused.
//
// # Trust
//
// Everything in a request is attacker-controlled, its time and its policy too: they
// concern nobody but the one who asks. Configuration and files it names are the
// operator's. A client that asks over a network must have a reason to believe that
// the reply comes from this service, such as TLS in front of it or running it itself.
//
// Specification: verifier.md; attestation.md §5, §9, §10.
package verifyd

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/cache"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/collateral/floor"
	"github.com/dstack-go/dstack/verifier"
	"github.com/dstack-go/dstack/verifyd/imagecache"
)

// Options are what tests and embedders set beside the configuration. The zero value
// is for production.
type Options struct {
	Log        *slog.Logger      // nil: nothing is logged
	Now        func() time.Time  // nil: time.Now
	Collateral collateral.Source // nil: the configured services
}

// Service verifies. Its methods may be called concurrently. Close it when done.
type Service struct {
	config Config
	policy verifier.Policy
	roots  []attest.Roots
	dev    *collateral.Bundle // of a development installation; nil: none
	extra  *collateral.Bundle // joins what is fetched; nil: none
	source collateral.Source  // nil: nothing is fetched
	images *imagecache.Cache
	floors *floor.Store
	memo   attest.Memo
	known  measurements
	log    *slog.Logger
	now    func() time.Time

	metrics metrics
}

// New opens a service of a configuration that was checked: it reads the files that
// the configuration names and opens the caches. Errors have the codes of what they
// are about: trust_anchor, dev_roots_malformed, policy_malformed, image_cache_dir,
// collateral_url, directory_unsafe, file_missing.
func New(c Config, o Options) (*Service, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	s := &Service{config: c, log: o.Log, now: o.Now, source: o.Collateral}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	var err error
	if s.policy, err = c.readPolicy(); err != nil {
		return nil, err
	}
	if s.roots, s.dev, err = c.Attestation.trustAnchors(); err != nil {
		return nil, err
	}
	if dir := c.Attestation.ExtraCollateral; dir != "" {
		if s.extra, _, err = collateral.FromFS(os.DirFS(dir)); err != nil {
			return nil, err
		}
	}
	// First, since it makes the directory that the collateral's lies in by default.
	s.images, err = imagecache.Open(c.ImageCacheDir, imagecache.Options{
		URL: c.ImageDownloadURL, Timeout: time.Duration(c.ImageDownloadTimeoutSecs) * time.Second,
		MaxDownload: int64(c.ImageMaxDownload), MaxUnpacked: int64(c.ImageMaxUnpacked), MaxCache: int64(c.ImageCacheSize),
	})
	if err != nil {
		return nil, err
	}
	if s.floors, err = floor.Open(filepath.Join(c.ImageCacheDir, "floor")); err != nil {
		s.images.Close()
		return nil, err
	}
	if s.source == nil && c.Attestation.FetchCollateral {
		if s.source, err = c.services(s.log); err != nil {
			s.images.Close()
			return nil, err
		}
	}
	return s, nil
}

// services are the configured sources of collateral behind a cache.
func (c *Config) services(log *slog.Logger) (collateral.Source, error) {
	pcs, err := fetch.NewPCS(fetch.PCSOptions{Base: c.Attestation.URLs.PCCS})
	if err != nil {
		return nil, err
	}
	kds, err := fetch.NewKDS(fetch.KDSOptions{Base: c.Attestation.URLs.AMDKDS})
	if err != nil {
		return nil, err
	}
	return cache.Open(c.collateralDir(), fetch.Vendors{PCS: pcs, KDS: kds}, cache.Options{
		Warn: func(err error) { log.Warn("collateral", "error", err) },
	})
}

// Close ends downloads under way.
func (s *Service) Close() { s.images.Close() }

// collateralFor returns what the evidence needs, from the services. An error is
// logged and returned; the verdict says what is missing all the same.
func (s *Service) collateralFor(ctx context.Context, src *verifier.Source) (*collateral.Bundle, error) {
	if s.source == nil {
		return nil, nil
	}
	want, ok, err := verifier.CollateralFor(src)
	if err != nil || !ok {
		return nil, err
	}
	s.metrics.fetches.Add(1)
	b, err := s.source.Collateral(ctx, want)
	if err != nil {
		s.metrics.fetchFailures.Add(1)
		s.log.Warn("no collateral", "fmspc", want.FMSPC, "product", want.Product, "error", err)
	}
	return b, err
}
