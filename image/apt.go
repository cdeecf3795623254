// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// apt is the host's apt-get with a private state: its own lists and sources,
// which are derived from the host's, so that mirror and proxy stay the
// administrator's choice and the suites ours. The host's own state is not
// touched.
type apt struct {
	dir     string
	options []string
}

const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// hostSources writes apt's sources for suites, from the host's own mirror.
func hostSources(suites []string) (string, error) {
	mirror, err := hostMirror()
	if err != nil {
		return "", err
	}
	signed := ""
	if _, err := os.Stat(archiveKeyring); err == nil {
		signed = "[signed-by=" + archiveKeyring + "] "
	}
	var list strings.Builder
	for _, s := range suites {
		fmt.Fprintf(&list, "deb %s%s %s main\n", signed, mirror, s)
	}
	return list.String(), nil
}

func (b *build) apt(suites []string) (*apt, error) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return nil, fault.New("host_not_debian", "apt-get is missing; the image is built on Debian").WithFix("build on Debian 12 or 13, or use a built image")
	}
	list, err := b.sources(suites)
	if err != nil {
		return nil, err
	}
	a := &apt{dir: filepath.Join(string(b.cache), "apt")}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial", "etc"} {
		if err := os.MkdirAll(filepath.Join(a.dir, d), 0o755); err != nil {
			return nil, diskFull(err)
		}
	}
	sources := filepath.Join(a.dir, "etc", "sources.list")
	for path, data := range map[string]string{sources: list, filepath.Join(a.dir, "state", "status"): ""} {
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			return nil, diskFull(err)
		}
	}
	for k, v := range map[string]string{
		"Dir::State": filepath.Join(a.dir, "state"), "Dir::State::status": filepath.Join(a.dir, "state", "status"),
		"Dir::Cache": filepath.Join(a.dir, "cache"), "Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null",
		"Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
		"APT::Architecture": "amd64", "APT::Architectures": "amd64", "Acquire::Languages": "none",
	} {
		a.options = append(a.options, "-o", k+"="+v)
	}
	if os.Geteuid() == 0 {
		// apt's own user may not enter a private cache; every file is hashed
		// against the lock afterwards.
		a.options = append(a.options, "-o", "APT::Sandbox::User=root")
	}
	return a, nil
}

// hostMirror returns the address of the Debian archive that the host is
// configured with: the source of its own release's main component.
func hostMirror() (string, error) {
	codename, err := osRelease("VERSION_CODENAME")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("apt-get", "indextargets", "--format", "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)", "Created-By: Packages").Output()
	if err != nil {
		return "", fault.Wrap(err, "apt_sources", "ask apt for its sources").WithFix("see `apt-get indextargets`")
	}
	return chooseMirror(string(out), codename)
}

func chooseMirror(targets, codename string) (string, error) {
	for line := range strings.Lines(targets) {
		f := strings.Split(strings.TrimSpace(line), "|")
		// The origin is known once lists were fetched; before, it is empty or
		// stays as the unexpanded "$(ORIGIN)".
		if len(f) == 4 && f[2] == "main" && (f[1] == codename || f[1] == "stable") && (f[3] == "Debian" || f[3] == "" || strings.HasPrefix(f[3], "$(")) {
			return strings.TrimSuffix(f[0], "/"), nil
		}
	}
	return "", fault.New("apt_sources", "apt has no source for %q main of Debian, from which to derive the mirror", codename).
		WithFix("add the archive of the host's own release to apt's sources")
}

func osRelease(key string) (string, error) {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return strings.Trim(v, `"`), nil
		}
	}
	return "", fmt.Errorf("/etc/os-release has no %s", key)
}

func (a *apt) run(ctx context.Context, dir, tool string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, tool, append(append([]string{}, a.options...), args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", tool, args[0], err, lastLines(errs.String(), 4))
	}
	return out.String(), nil
}

func (a *apt) update(ctx context.Context) error {
	if _, err := a.run(ctx, a.dir, "apt-get", "update", "-q"); err != nil {
		return fault.Wrap(err, "mirror_unreachable", "fetch the package lists").WithFix("check the network and apt's sources: `apt-get update` must work")
	}
	return nil
}

// The line of `apt-get download --print-uris`: 'URI' file size SHA256:hex
var uriLine = regexp.MustCompile(`^'[^']*' (\S+) ([0-9]+) SHA256:([0-9a-f]{64})$`)

// candidate returns the version of a package that apt would install.
func (a *apt) candidate(ctx context.Context, name string) (Package, error) {
	out, err := a.run(ctx, a.dir, "apt-get", "download", "--print-uris", "-q", name)
	if err != nil {
		return Package{}, fault.Wrap(err, "image_input_gone", "the mirror has no package %s", name)
	}
	m := uriLine.FindStringSubmatch(strings.TrimSpace(out))
	if m == nil {
		return Package{}, fmt.Errorf("package %s: apt gives no SHA-256: %q", name, strings.TrimSpace(out))
	}
	p := Package{Name: name, SHA256: m[3]}
	if p.Size, err = strconv.ParseInt(m[2], 10, 64); err != nil {
		return Package{}, err
	}
	// name_version_arch.deb, the colon of an epoch written as %3a
	f := strings.Split(strings.TrimSuffix(m[1], ".deb"), "_")
	if len(f) != 3 {
		return Package{}, fmt.Errorf("package %s: file name %q", name, m[1])
	}
	p.Version, p.Arch = strings.ReplaceAll(f[1], "%3a", ":"), f[2]
	if out, err = a.run(ctx, a.dir, "apt-cache", "madison", name); err != nil {
		return Package{}, err
	}
	for line := range strings.Lines(out) {
		// name | version | URI suite/component arch Packages
		f := strings.Split(line, "|")
		if len(f) != 3 || strings.TrimSpace(f[1]) != p.Version {
			continue
		}
		if where := strings.Fields(f[2]); len(where) > 1 {
			p.Suite, _, _ = strings.Cut(where[1], "/")
		}
	}
	return p, nil
}

var kernelSourceRE = regexp.MustCompile(`^linux-source-([0-9]+)\.([0-9]+)$`)

// newestKernelSource returns the name of the newest kernel source package.
func (a *apt) newestKernelSource(ctx context.Context) (string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "pkgnames", "linux-source-")
	if err != nil {
		return "", err
	}
	best, bestName := [2]int{}, ""
	for line := range strings.Lines(out) {
		name := strings.TrimSpace(line)
		m := kernelSourceRE.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		major, _ := strconv.Atoi(m[1])
		minor, _ := strconv.Atoi(m[2])
		if major > best[0] || major == best[0] && minor > best[1] {
			best, bestName = [2]int{major, minor}, name
		}
	}
	// 6.16 brought the runtime measurement registers to sysfs.
	if best[0] < 6 || best[0] == 6 && best[1] < 16 {
		return "", fault.New("kernel_too_old", "the mirror's newest kernel source is %q; 6.16 is the least that can extend RTMRs", bestName)
	}
	return bestName, nil
}

// newestDistributionKernel returns the release of the newest packaged cloud kernel.
func (a *apt) newestDistributionKernel(ctx context.Context) (string, error) {
	out, err := a.run(ctx, a.dir, "apt-cache", "pkgnames", "linux-modules-")
	if err != nil {
		return "", err
	}
	best, release := []int{6, 16, 0}, "" // the least that can extend RTMRs
	for line := range strings.Lines(out) {
		m := distributionRE.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			continue
		}
		version := make([]int, 3)
		for i := range version {
			version[i], _ = strconv.Atoi(m[3+i])
		}
		if slices.Compare(version, best) > 0 {
			best, release = version, m[2]
		}
	}
	if release == "" {
		return "", fault.New("kernel_too_old", "the mirror has no linux-modules-*-cloud-amd64 of 6.16 or later, which is the least that can extend RTMRs")
	}
	return release, nil
}

// fetch makes sure that every locked package of the build lies in the cache.
func (b *build) fetch(ctx context.Context, _ *artifacts) (bool, error) {
	missing := b.missing()
	if len(missing) == 0 {
		return true, nil
	}
	gone, err := b.download(ctx, missing)
	if err != nil {
		return false, err
	}
	if len(gone) == 0 {
		return false, nil
	}
	fix := "run `dstack image lock`, review the change and build again"
	if b.Flavour == Prod {
		return false, fault.New("image_input_gone", "the mirror no longer has %s as the lock pins it", strings.Join(gone, ", ")).WithFix("%s", fix)
	}
	b.logf("image: WARNING: the mirror no longer has %s as the lock pins it; locking anew, so this image differs from the committed one", strings.Join(gone, ", "))
	changes, err := b.relock(ctx)
	if err != nil {
		return false, err
	}
	for _, line := range changes {
		b.logf("image: WARNING: lock: %s", line)
	}
	if gone, err = b.download(ctx, b.missing()); err == nil && len(gone) != 0 {
		err = fault.New("image_input_gone", "the mirror announces, but does not hand out, %s", strings.Join(gone, ", ")).WithFix("try again, or use another mirror")
	}
	return false, err
}

func (b *build) deb(p Package) string {
	return filepath.Join(string(b.cache), "debs", p.SHA256+".deb")
}

// missing returns the locked packages that the build takes and that are not in the cache, whole.
func (b *build) missing() []Package {
	var out []Package
	for _, p := range b.lock.Packages {
		if !b.usesPackage(p.Name) {
			continue
		}
		if st, err := os.Stat(b.deb(p)); err != nil || st.Size() != p.Size {
			out = append(out, p)
		}
	}
	return out
}

// download fetches packages into the cache and names those that the mirror
// does not have with the pinned content.
func (b *build) download(ctx context.Context, list []Package) (gone []string, err error) {
	if len(list) == 0 {
		return nil, nil
	}
	a, err := b.apt(b.lock.Suites)
	if err != nil {
		return nil, err
	}
	if err := a.update(ctx); err != nil {
		return nil, err
	}
	work, err := b.cache.scratch("debs")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	var specs []string
	var total int64
	for _, p := range list {
		specs = append(specs, p.Name+"="+p.Version)
		total += p.Size
	}
	b.logf("image: fetching %d packages, %.1f MB", len(list), float64(total)/1e6)
	if _, err := a.run(ctx, work, "apt-get", append([]string{"download", "-q"}, specs...)...); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		// One missing version fails the whole call: ask one by one who it is.
		for _, s := range specs {
			a.run(ctx, work, "apt-get", "download", "-q", s)
		}
	}
	found := map[string]string{}
	files, err := os.ReadDir(work)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		path := filepath.Join(work, f.Name())
		sum, err := hashFile(path)
		if err != nil {
			return nil, diskFull(err)
		}
		found[sum] = path
	}
	for _, p := range list {
		path, ok := found[p.SHA256]
		if !ok {
			gone = append(gone, p.Name+" "+p.Version)
			continue
		}
		if err := os.Chmod(path, 0o644); err != nil {
			return nil, err
		}
		if err := os.Rename(path, b.deb(p)); err != nil {
			return nil, err
		}
	}
	return gone, ctx.Err()
}

// openDeb opens a locked package in the cache and checks it against the lock.
func (b *build) openDeb(name string) (*os.File, error) {
	p, err := b.lock.Package(name)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(b.deb(p))
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		f.Close()
		return nil, err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != p.SHA256 {
		f.Close()
		os.Remove(b.deb(p)) // so that the next build fetches it anew
		return nil, fault.New("image_input_altered", "cached package %s has sha256 %s, the lock says %s", name, got, p.SHA256).WithFix("build again: it is fetched anew")
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// lastLines returns the end of a program's output, for an error message.
func lastLines(s string, n int) string {
	var lines []string
	for sc := bufio.NewScanner(strings.NewReader(s)); sc.Scan(); {
		if t := strings.TrimSpace(sc.Text()); t != "" {
			lines = append(lines, t)
		}
	}
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, " / ")
}

// diskFull gives a full disk its name, wherever it is met.
func diskFull(err error) error {
	if errors.Is(err, errNoSpace) {
		return fault.Wrap(err, "disk_full", "no space left").WithFix("the build cache needs about 4 GB; DSTACK_CACHE moves it")
	}
	if errors.Is(err, fs.ErrPermission) {
		return fault.Wrap(err, "cache_missing", "write to the build cache").WithFix("set DSTACK_CACHE to a directory you may write to")
	}
	return err
}
