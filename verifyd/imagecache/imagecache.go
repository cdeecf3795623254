// SPDX-License-Identifier: Apache-2.0

// Package imagecache keeps OS images that a verifier measures, by their hash, and
// downloads those it has not got.
//
// # Guarantees
//
// What [Cache.Get] returns is what the hash names: the SHA-256 of sha256sum.txt is
// the image hash, and every file used has the SHA-256 that it lists, checked when it
// arrives and again each time it is read. Where an image comes from is the
// operator's template alone, into which 64 hexadecimal digits are put: nothing in
// evidence can choose a host or a path, and redirects leave neither host nor scheme
// (threats.md G11). An image is downloaded once for all who ask at one time; one that
// could not be had is not asked for again for a while. Downloads, unpacked sizes,
// entries, time and the size of the whole cache are bounded. No program is run.
//
// # Trust
//
// None in the server, and none in the archive: entries that are neither regular
// files nor directories, and names that lead anywhere else, refuse the whole archive.
// The cache's directory must belong to this user alone, or Open refuses it.
//
// Specification: verifier.md §4, measurement.md §1.
package imagecache

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/flight"
	"github.com/dstack-go/dstack/measure"
)

// Placeholder stands for the hash in a URL template.
const Placeholder = "{OS_IMAGE_HASH}"

// Options configures a Cache. Zero sizes and times mean the defaults named.
type Options struct {
	URL          string            // http or https, with Placeholder; empty: nothing is downloaded
	Timeout      time.Duration     // of one download with all that follows; 300 s
	MaxDownload  int64             // bytes of one archive; 1 GiB
	MaxUnpacked  int64             // bytes of its files; 2 GiB
	MaxCache     int64             // bytes of all images kept; 10 GiB
	RoundTripper http.RoundTripper // nil for one of our own
	Now          func() time.Time  // nil for time.Now
}

// How long a failure is remembered: of an image that the server says it has not
// got, and of anything else.
const (
	rememberMissing = 5 * time.Minute
	rememberFailure = 30 * time.Second
	maxRemembered   = 1024
)

// maxWork is how many images are downloaded or read at one time: they are large.
const maxWork = 2

// Cache is a directory of images. Close it when done.
type Cache struct {
	Options
	dir    string
	http   *http.Client
	ctx    context.Context
	cancel context.CancelFunc
	work   chan struct{} // a token for each image under way

	flights flight.Group[dstack.ImageHash, *Image]

	mu     sync.Mutex
	failed map[dstack.ImageHash]failure

	hits, downloads, failures atomic.Uint64
}

type failure struct {
	err   error
	until time.Time
}

// Stats are counts since Open.
type Stats struct {
	Hits      uint64 // images found in the directory, or on their way for another caller
	Downloads uint64 // that succeeded
	Failures  uint64
}

// Stats returns them.
func (c *Cache) Stats() Stats {
	return Stats{c.hits.Load(), c.downloads.Load(), c.failures.Load()}
}

// Image is a release as far as measurements depend on it.
type Image struct {
	Hash     dstack.ImageHash
	Metadata Metadata
	Firmware []byte
	Kernel   []byte
	Initrd   []byte
}

// Launch is the launch of the image on a VM of the given shape.
func (i *Image) Launch(vm measure.VMConfig) (measure.Launch, error) {
	twoPass, err := vm.TwoPass()
	if err != nil {
		return measure.Launch{}, err
	}
	return measure.Launch{
		Firmware: i.Firmware, Kernel: i.Kernel, Initrd: i.Initrd, Cmdline: i.Metadata.Cmdline,
		VCPUs: int(vm.CPUCount), MemoryBytes: vm.MemorySize, TwoPassAddPages: twoPass,
	}, nil
}

// CheckURL checks a URL template (code image_url).
func CheckURL(template string) error {
	bad := func(why string) error {
		return fault.New("image_url", "image_download_url %q %s", template, why).WithFix("give a URL such as https://images.example/mr_%s.tar.gz", Placeholder)
	}
	if !strings.Contains(template, Placeholder) {
		return bad("does not contain " + Placeholder)
	}
	u, err := url.Parse(strings.ReplaceAll(template, Placeholder, strings.Repeat("0", 64)))
	switch {
	case err != nil || u.Host == "" || u.Opaque != "":
		return bad("is not a URL with a host")
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("is neither http nor https")
	case strings.Contains(u.Host, strings.Repeat("0", 64)) || u.User != nil:
		return bad("has the hash in its host, or a user")
	}
	return nil
}

// Open makes the directory if need be and removes what interrupted downloads left.
// Codes: image_url, image_cache_dir (a directory that others can write to).
func Open(dir string, o Options) (*Cache, error) {
	if o.URL != "" {
		if err := CheckURL(o.URL); err != nil {
			return nil, err
		}
	}
	o.Timeout = cmp.Or(o.Timeout, 300*time.Second)
	o.MaxDownload = cmp.Or(o.MaxDownload, 1<<30)
	o.MaxUnpacked = cmp.Or(o.MaxUnpacked, 2<<30)
	o.MaxCache = cmp.Or(o.MaxCache, 10<<30)
	if o.Now == nil {
		o.Now = time.Now
	}
	var own *http.Transport
	if o.RoundTripper == nil {
		own = &http.Transport{
			Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, DisableCompression: true,
			TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: 30 * time.Second, IdleConnTimeout: 10 * time.Second,
			MaxConnsPerHost: maxWork, MaxResponseHeaderBytes: 64 << 10,
		}
		o.RoundTripper = own
	}
	images := filepath.Join(dir, "images")
	if err := os.MkdirAll(images, 0o700); err != nil {
		return nil, fault.Wrap(err, "image_cache_dir", "make the image cache").WithFix("give another image_cache_dir")
	}
	if err := checkPrivate(dir); err != nil {
		return nil, err
	}
	if err := checkPrivate(images); err != nil {
		return nil, err
	}
	tmp := filepath.Join(images, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return nil, fault.Wrap(err, "image_cache_dir", "make the image cache")
	}
	sweep(tmp, o.Now().Add(-leftoverAge))
	c := &Cache{
		Options: o, dir: images, work: make(chan struct{}, maxWork),
		failed: map[dstack.ImageHash]failure{},
		http:   &http.Client{Transport: o.RoundTripper, CheckRedirect: sameHost},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if own != nil {
		context.AfterFunc(c.ctx, own.CloseIdleConnections)
	}
	return c, nil
}

// leftoverAge is how old an abandoned download must be before it is removed; younger
// ones may belong to another process.
const leftoverAge = time.Hour

// sweep removes what is older from a directory. It is best effort: a leftover costs
// space.
func sweep(dir string, before time.Time) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if st, err := e.Info(); err == nil && st.ModTime().Before(before) {
			_ = os.RemoveAll(filepath.Join(dir, e.Name()))
		}
	}
}

// checkPrivate refuses a directory that another user owns or can write to, or can put
// another in place of: images are hashed as they are read, but nobody else should fill
// the disk or choose what is removed.
func checkPrivate(dir string) error {
	bad := func(path, why string) error {
		return fault.New("image_cache_dir", "%s %s", path, why).WithFix("give another image_cache_dir, or chmod 700 this one")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fault.Wrap(err, "image_cache_dir", "look at the image cache")
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fault.Wrap(err, "image_cache_dir", "look at the image cache")
	}
	if !st.IsDir() || owner(st) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return bad(dir, "is not a directory of this user that nobody else can write to")
	}
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		st, err := os.Stat(parent)
		if err != nil {
			return fault.Wrap(err, "image_cache_dir", "look at the image cache")
		}
		if uid := owner(st); uid != 0 && uid != os.Geteuid() {
			return bad(parent, "belongs to another user, who could replace what is in it")
		}
		if st.Mode().Perm()&0o002 != 0 && st.Mode()&fs.ModeSticky == 0 {
			return bad(parent, "can be written to by everyone, who could replace what is in it")
		}
		if parent == filepath.Dir(parent) {
			return nil
		}
	}
}

// owner is the user id of a file's owner, or -1.
func owner(st fs.FileInfo) int {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// Close ends downloads under way and waits for them.
func (c *Cache) Close() {
	c.cancel()
	c.flights.Wait()
}

// Get returns an image. Codes: image_missing (not in the cache, and nothing may be
// downloaded), image_not_found, image_download, image_timeout, image_cancelled,
// image_too_large, image_archive, image_checksums, image_hash_mismatch,
// image_altered, image_metadata.
func (c *Cache) Get(ctx context.Context, h dstack.ImageHash) (*Image, error) {
	c.mu.Lock()
	if f, ok := c.failed[h]; ok && c.Now().Before(f.until) {
		c.mu.Unlock()
		return nil, f.err
	}
	c.mu.Unlock()
	img, shared, err := c.flights.Do(ctx, c.ctx, h, func(ctx context.Context) (*Image, error) {
		work, cancel := context.WithTimeout(ctx, c.Timeout)
		defer cancel()
		img, err := c.get(work, h)
		if err != nil && work.Err() != context.Canceled {
			c.remember(h, err)
		}
		return img, err
	})
	if shared {
		c.hits.Add(1)
	}
	if err != nil && err == ctx.Err() {
		return nil, fault.Wrap(err, "image_cancelled", "get the image %s", h)
	}
	return img, err
}

// remember keeps a failure, so that evidence of an image that nobody has does not
// make us ask for it each time.
func (c *Cache) remember(h dstack.ImageHash, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.Now()
	if len(c.failed) >= maxRemembered {
		for k, f := range c.failed {
			if !now.Before(f.until) || len(c.failed) >= maxRemembered {
				delete(c.failed, k)
			}
		}
	}
	keep := rememberFailure
	if code := fault.Code(err); code == "image_not_found" {
		keep = rememberMissing
	}
	c.failed[h] = failure{err, now.Add(keep)}
}

func (c *Cache) get(ctx context.Context, h dstack.ImageHash) (*Image, error) {
	select {
	case c.work <- struct{}{}:
		defer func() { <-c.work }()
	case <-ctx.Done():
		return nil, fault.Wrap(ctx.Err(), "image_timeout", "wait for other images")
	}
	final := filepath.Join(c.dir, h.String())
	img, err := load(final, h)
	if err == nil {
		c.hits.Add(1)
		now := c.Now()
		_ = os.Chtimes(final, now, now) // for eviction; a wrong order costs a download
		return img, nil
	}
	if c.URL == "" {
		return nil, fault.New("image_missing", "the image %s is not in the cache, and no URL to download from is configured", h)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		// It was altered on disk: what is downloaded replaces it.
		if err := durable.RemoveAll(final); err != nil {
			return nil, fault.Wrap(err, "image_altered", "remove an altered image")
		}
	}
	if img, err = c.download(ctx, h, final); err != nil {
		c.failures.Add(1)
		return nil, err
	}
	c.downloads.Add(1)
	c.evict(h)
	return img, nil
}

// download gets, unpacks and checks one image and moves it into place.
func (c *Cache) download(ctx context.Context, h dstack.ImageHash, final string) (*Image, error) {
	tmp, err := os.MkdirTemp(filepath.Join(c.dir, "tmp"), "tmp-download-")
	if err != nil {
		return nil, fault.Wrap(err, "image_cache_dir", "make a directory for the image")
	}
	defer os.RemoveAll(tmp)
	body, err := c.fetch(ctx, strings.ReplaceAll(c.URL, Placeholder, h.String()))
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if err := unpack(bounded(body, c.MaxDownload), tmp, c.MaxUnpacked); err != nil {
		if ctx.Err() != nil {
			return nil, fault.Wrap(ctx.Err(), "image_timeout", "download the image %s", h)
		}
		return nil, err
	}
	img, err := checkAll(ctx, tmp, h)
	if err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, final); err != nil {
		if other, lerr := load(final, h); lerr == nil {
			return other, nil // another process was faster
		}
		return nil, fault.Wrap(err, "image_cache_dir", "keep the image")
	}
	return img, nil
}

// evict removes images, least recently used first, until the rest fits.
func (c *Cache) evict(keep dstack.ImageHash) {
	type entry struct {
		path string
		size int64
		used time.Time
	}
	var list []entry
	total := int64(0)
	dirs, _ := os.ReadDir(c.dir)
	for _, d := range dirs {
		if _, err := dstack.ParseImageHash(d.Name()); err != nil || !d.IsDir() {
			continue
		}
		e := entry{path: filepath.Join(c.dir, d.Name())}
		if st, err := d.Info(); err == nil {
			e.used = st.ModTime()
		}
		files, _ := os.ReadDir(e.path)
		for _, f := range files {
			if st, err := f.Info(); err == nil {
				e.size += st.Size()
			}
		}
		total += e.size
		if d.Name() != keep.String() {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b entry) int { return a.used.Compare(b.used) })
	for _, e := range list {
		if total <= c.MaxCache {
			return
		}
		if durable.RemoveAll(e.path) == nil {
			total -= e.size
		}
	}
}

// load reads a kept image, each file against its hash. The error is fs.ErrNotExist
// where there is none.
func load(dir string, h dstack.ImageHash) (*Image, error) {
	sums, err := readSums(dir, h)
	if err != nil {
		return nil, err
	}
	raw, err := readListed(dir, metadataName, sums, maxMetadata)
	if err != nil {
		return nil, err
	}
	m, err := parseMetadata(raw)
	if err != nil {
		return nil, err
	}
	img := &Image{Hash: h, Metadata: *m}
	for _, f := range []struct {
		name string
		into *[]byte
	}{{m.BIOS, &img.Firmware}, {m.Kernel, &img.Kernel}, {m.Initrd, &img.Initrd}} {
		if *f.into, err = readListed(dir, f.name, sums, maxFile); err != nil {
			return nil, err
		}
	}
	return img, nil
}

func readListed(dir, name string, sums map[string][32]byte, limit int64) ([]byte, error) {
	want, ok := sums[name]
	if !ok {
		return nil, fault.New("image_metadata", "%q is not listed in %s", name, sumsName)
	}
	data, err := readFile(filepath.Join(dir, name), limit)
	if err != nil {
		return nil, err
	}
	if got := sha256.Sum256(data); got != want {
		return nil, fault.New("image_altered", "%s has SHA-256 %x, %s says %x", name, got, sumsName, want)
	}
	return data, nil
}
