// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/cli/appimage"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lint"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/osimage"
)

// agentPort is where the agent of every VM answers the outside.
const agentPort = 8090

type deployCmd struct {
	workload
	Compose    string        `short:"c" help:"The docker-compose.yaml, run unchanged." default:"docker-compose.yaml" placeholder:"FILE"`
	Name       string        `short:"n" help:"Name of the app; by default the directory of the compose file." placeholder:"NAME"`
	Disk       int           `help:"Data disk in GiB." default:"10"`
	Timeout    time.Duration `help:"How long to wait for the app." default:"5m"`
	Frozen     bool          `help:"Freeze the app: it can never run another manifest, only be revoked."`
	DryRun     bool          `help:"Show what would be measured and stop."`
	KeepFailed bool          `help:"Keep a VM whose boot failed, to look at."`
}

// deployment is what deploy reports.
type deployment struct {
	Name        string             `json:"name"`
	ID          string             `json:"id,omitempty"`
	AppID       dstack.AppID       `json:"app_id"`
	ComposeHash dstack.ComposeHash `json:"compose_hash"`
	OSImageHash dstack.ImageHash   `json:"os_image_hash"`
	Lock        string             `json:"lock,omitempty"`
	Ports       []string           `json:"ports"`
	URLs        []string           `json:"urls,omitempty"` // through the gateway
	AttestURL   string             `json:"attest_url,omitempty"`
	Seconds     float64            `json:"seconds"`
	DryRun      bool               `json:"dry_run,omitempty"`
}

var appName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

func (c *deployCmd) Run(a *app) error {
	began := time.Now()
	if err := a.stack.Require(a.ctx); err != nil {
		return err
	}
	raw, err := readLimited(c.Compose, 10<<20)
	if err != nil {
		if fault.Code(err) == "file_missing" {
			return fault.New("compose_missing", "%s does not exist", c.Compose).WithFix("give the file with -c")
		}
		return err
	}
	if c.Name == "" {
		abs, err := filepath.Abs(c.Compose)
		if err != nil {
			return err
		}
		c.Name = filepath.Base(filepath.Dir(abs))
	}
	if !appName.MatchString(c.Name) {
		return fault.New("name_malformed", "%q cannot be an app's name", c.Name).WithFix("use letters, digits, '-', '_' and '.', at most 63 characters: -n NAME")
	}
	if _, err := findVM(a, c.Name); err == nil {
		return fault.New("name_taken", "there is an app %q already", c.Name).WithFix("`dstack upgrade %s` to replace what it runs, `dstack rm %s`, or another name with -n", c.Name, c.Name)
	} else if fault.Code(err) != "app_unknown" && fault.Code(err) != "app_ambiguous" {
		return err
	}
	p, err := c.plan(a, c.Name, c.Compose, raw, nil)
	if err != nil {
		return err
	}
	defer p.close()
	out := deployment{Name: c.Name, AppID: p.lock.AppID, ComposeHash: p.lock.ComposeHash, OSImageHash: p.lock.OSImageHash, Lock: c.lockFile(c.Compose)}
	if c.DryRun {
		out.DryRun = true
		out.Seconds = time.Since(began).Seconds()
		a.printf("%s\n", p.text)
		return a.result(out)
	}
	if c.Frozen && p.governed == nil {
		return usage("--frozen is of an app whose keys come from the stack's KMSs")
	}
	if p.governed != nil && a.stack.GovernedByChain() && c.AppID == "" {
		// Its contract's address is its id, which its keys and variables hang on.
		if err := p.createOnChain(a, c.Frozen); err != nil {
			return err
		}
		c.AppID = p.lock.AppID.String()
		out.AppID = p.lock.AppID
	}
	sealed, err := p.seal(a)
	if err != nil {
		return err
	}
	if err := p.allow(a); err != nil {
		return err
	}
	if c.Frozen {
		if err := p.freeze(a); err != nil {
			return err
		}
	}
	if err := p.store(a); err != nil {
		return err
	}
	attest, err := freePort()
	if err != nil {
		return err
	}
	config := &vmmpb.VmConfiguration{
		Name: c.Name, Image: p.lock.Image, ComposeFile: string(p.text), Vcpu: p.vm.CPUCount, Memory: uint32(p.vm.MemorySize >> 20), DiskSize: uint32(c.Disk),
		Ports: p.portMappings(attest), EncryptedEnv: sealed, KmsUrls: c.KMS, GatewayUrls: p.gatewayURLs(),
	}
	if c.AppID != "" {
		config.AppId = &c.AppID
	}
	var id vmmpb.Id
	created := time.Now()
	if err := a.stack.VMM().Call(a.ctx, "CreateVm", config, &id); err != nil {
		return err
	}
	out.ID = id.Id
	if err := watchBoot(a, id.Id, created, c.Timeout); err != nil {
		if !c.KeepFailed {
			explain(a, id.Id)
			_ = removeVM(a, &vmmpb.VmInfo{Id: id.Id, Name: c.Name})
		}
		return err
	}
	return p.report(a, out, attest, began)
}

// report writes the lock of what runs now, and says where it is and how to check it.
func (p *plan) report(a *app, out deployment, attest int, began time.Time) error {
	if err := lock.Write(out.Lock, p.lock); err != nil {
		return err
	}
	out.AttestURL = fmt.Sprintf("https://127.0.0.1:%d", attest)
	out.Seconds = time.Since(began).Seconds()
	a.step("%s runs after %s", out.Name, seconds(time.Since(began)))
	for _, m := range p.ports {
		out.Ports = append(out.Ports, m.String())
		a.printf("App      %s\n", m.url())
		if p.gateway != nil && m.proto == "tcp" {
			u := p.gateway.URL(p.lock.AppID, m.vm)
			out.URLs = append(out.URLs, u)
			a.printf("Public   %s\n", u)
		}
	}
	a.printf("Lock     %s\n", out.Lock)
	verify := "dstack verify " + out.AttestURL + " --lock " + out.Lock
	if _, err := os.Stat(a.stack.DevRoots()); err == nil {
		verify += " --dev-roots " + a.stack.DevRoots()
	}
	a.printf("Verify   %s\n", verify)
	return a.result(out)
}

// gatewayURLs are where the guest finds its gateway.
func (p *plan) gatewayURLs() []string {
	if p.gateway == nil {
		return nil
	}
	return []string{p.gateway.GuestURL}
}

// explain prints the end of the console of a VM that is about to be removed.
func explain(a *app, id string) {
	resp, err := a.stack.HTTP().Get("http://vmm/logs?follow=false&ansi=false&lines=15&ch=serial&id=" + id)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if len(text) > 0 {
		a.step("the end of its console:")
		for _, line := range strings.Split(strings.TrimRight(string(text), "\n"), "\n") {
			fmt.Fprintf(a.err, "    %s\n", printable(line))
		}
	}
}

// osImage loads the OS image to run on.
func (w *workload) osImage(a *app, name string) (*osimage.Image, error) {
	if name == "" {
		entries, err := os.ReadDir(a.stack.ImagesDir())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		var names []string
		for _, e := range entries {
			if e.IsDir() && !strings.HasSuffix(e.Name(), ".new") {
				names = append(names, e.Name())
			}
		}
		switch len(names) {
		case 0:
			return nil, fault.New("image_missing", "the stack has no OS image").WithFix("run `dstack up`")
		case 1:
			name = names[0]
		default:
			return nil, fault.New("image_ambiguous", "the stack has %d OS images: %s", len(names), strings.Join(names, ", ")).WithFix("choose one with --image")
		}
	}
	if strings.ContainsAny(name, "/\\") || name == ".." {
		return nil, fault.New("image_name", "%q is not an image's name", name).WithFix("`dstack image ls` lists them")
	}
	return osimage.Load(filepath.Join(a.stack.ImagesDir(), name))
}

// mapping publishes a port of the VM on the host.
type mapping struct {
	addr     string
	host, vm int
	proto    string
}

func (m mapping) String() string {
	return fmt.Sprintf("%s:%d:%d/%s", m.addr, m.host, m.vm, m.proto)
}

func (m mapping) url() string {
	if m.proto != "tcp" {
		return m.String()
	}
	return "http://" + net.JoinHostPort(m.addr, strconv.Itoa(m.host))
}

// mappings returns the ports to publish: as told, or as they were, and each other
// port that the compose file publishes, on loopback.
func (w *workload) mappings(compose *lint.Compose, file string, was []mapping) ([]mapping, error) {
	published := map[string]bool{}
	for _, p := range compose.Ports {
		published[fmt.Sprint(p.Published, "/", p.Protocol)] = true
	}
	var out []mapping
	for _, text := range w.Port {
		m, err := parseMapping(text)
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	if len(w.Port) == 0 {
		has := map[string]bool{}
		for _, m := range was {
			if key := fmt.Sprint(m.vm, "/", m.proto); published[key] {
				out, has[key] = append(out, m), true
			}
		}
		for _, p := range compose.Ports {
			if !has[fmt.Sprint(p.Published, "/", p.Protocol)] {
				out = append(out, mapping{addr: "127.0.0.1", host: int(p.Published), vm: int(p.Published), proto: p.Protocol})
			}
		}
	}
	for _, m := range out {
		if m.vm == agentPort || m.vm == manifest.TLSPort && m.proto == "tcp" {
			return nil, fault.New("port_reserved", "port %d of the VM is the agent's", m.vm).WithFix("publish the service on another port")
		}
		if !published[fmt.Sprint(m.vm, "/", m.proto)] {
			return nil, fault.New("port_not_published", "no service of the compose file publishes port %d/%s", m.vm, m.proto).WithFix("add it under ports: in %s", file)
		}
	}
	return out, nil
}

// parseMapping reads [ADDR:]HOST:VM[/PROTO].
func parseMapping(text string) (mapping, error) {
	bad := fault.New("port_malformed", "%q is not a port mapping", text).WithFix("write HOST:VM, such as 8080:80, or ADDR:HOST:VM/udp")
	body, proto, ok := strings.Cut(text, "/")
	if !ok {
		proto = "tcp"
	}
	if proto != "tcp" && proto != "udp" {
		return mapping{}, bad
	}
	parts := strings.Split(body, ":")
	addr := "127.0.0.1"
	if len(parts) == 3 {
		addr, parts = parts[0], parts[1:]
		if net.ParseIP(addr) == nil {
			return mapping{}, bad
		}
	}
	if len(parts) != 2 {
		return mapping{}, bad
	}
	host, err1 := strconv.ParseUint(parts[0], 10, 16)
	vm, err2 := strconv.ParseUint(parts[1], 10, 16)
	if err1 != nil || err2 != nil || host == 0 || vm == 0 {
		return mapping{}, bad
	}
	return mapping{addr: addr, host: int(host), vm: int(vm), proto: proto}, nil
}

// resolve finds every image of the compose file and returns the lock from
// reference to digest and the blobs to give to the VMM. An image that the app had
// already stays the one it was.
func (c *workload) resolve(a *app, compose *lint.Compose, was map[string]string) (map[string]string, []appimage.Blob, error) {
	images := map[string]string{}
	var blobs []appimage.Blob
	used := map[string]bool{}
	for _, ref := range compose.Images {
		path, ok := c.AppImage[ref]
		used[ref] = ok
		if !ok {
			digest := pinned(ref)
			if digest == "" {
				digest = was[ref]
			}
			if digest != "" && stored(a, digest) {
				images[ref] = digest
				continue
			}
			return nil, nil, fault.New("image_unresolved", "nothing says which bytes image %q is", ref).
				WithFix("--app-image %s=PATH with an OCI layout, a docker-save tarball or a static binary", ref)
		}
		a.step("import %s from %s", ref, path)
		img, err := appimage.Load(ref, path)
		if err != nil {
			return nil, nil, err
		}
		if digest := pinned(ref); digest != "" && digest != img.Digest {
			return nil, nil, fault.New("image_digest_mismatch", "%s is %s, the compose file pins another digest", path, img.Digest).WithFix("give the image that %s names", ref)
		}
		images[ref] = img.Digest
		blobs = append(blobs, img.Blobs...)
	}
	for name := range c.AppImage {
		if !used[name] {
			return nil, nil, fault.New("image_unused", "--app-image names %q, which no service uses", name).WithFix("the compose file uses: %s", strings.Join(compose.Images, ", "))
		}
	}
	return images, blobs, nil
}

func pinned(ref string) string {
	if _, digest, ok := strings.Cut(ref, "@"); ok {
		return digest
	}
	return ""
}

func blobRequest(a *app, method, digest string, body io.Reader, size int64) (int, string, error) {
	req, err := http.NewRequestWithContext(a.ctx, method, "http://vmm/blobs/"+strings.Replace(digest, ":", "/", 1), body)
	if err != nil {
		return 0, "", err
	}
	req.ContentLength = size
	resp, err := a.stack.HTTP().Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	return resp.StatusCode, strings.TrimSpace(string(text)), nil
}

func stored(a *app, digest string) bool {
	status, _, err := blobRequest(a, http.MethodHead, digest, nil, 0)
	return err == nil && status == http.StatusOK
}

func push(a *app, b appimage.Blob) error {
	if stored(a, b.Digest) {
		return nil
	}
	r, err := b.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	status, text, err := blobRequest(a, http.MethodPut, b.Digest, r, b.Size)
	if err != nil {
		return fault.Wrap(err, "blob_push", "store blob %s", b.Digest)
	}
	if status/100 != 2 {
		var e struct{ Error, Code, Fix string }
		if json.Unmarshal([]byte(text), &e) == nil && e.Code != "" {
			return fault.New(e.Code, "store blob %s: %s", b.Digest, e.Error).WithFix("%s", e.Fix)
		}
		return fault.New("blob_push", "store blob %s: status %d: %s", b.Digest, status, text)
	}
	return nil
}

// freePort returns a loopback port that is free now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
