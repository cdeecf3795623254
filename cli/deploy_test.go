// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure/measuretest"
	"github.com/dstack-go/dstack/osimage/gpt"
	"github.com/dstack-go/dstack/osimage/verity"
	"github.com/dstack-go/dstack/osimage/volume"
	"github.com/dstack-go/dstack/prpc"
)

// desk is a stack whose VMM is this test: it notes what it is asked for, and its
// VMs boot at once.
type desk struct {
	*testing.T
	dir string

	mu      sync.Mutex
	vms     map[string]*vmmpb.VmInfo
	created *vmmpb.VmConfiguration
	updated *vmmpb.UpdateVmRequest
	calls   []string
	refuse  map[string]error
}

func newDesk(t *testing.T) *desk {
	dir, err := os.MkdirTemp("", "desk") // short, for the socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &desk{T: t, dir: dir, vms: map[string]*vmmpb.VmInfo{}, refuse: map[string]error{}}
	d.image("dstack-sim-1", "console=ttyS0")
	mux := http.NewServeMux()
	mux.Handle("/prpc/", prpc.NewMux(nil, d.methods()...))
	mux.HandleFunc("/logs", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "console") })
	mux.HandleFunc("/history", func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.calls = append(d.calls, "history "+r.URL.RawQuery)
		if r.URL.Query().Get("kind") == "audit" {
			fmt.Fprintln(w, `{"time_ms":1000,"who":"uid 0 pid 1","method":"StopVm","vm":"x","outcome":"ok"}`)
			return
		}
		fmt.Fprintln(w, `{"vm":"x","time_ms":1000,"event":"boot.progress","body":"\u001b[31mdone"}`)
	})
	mux.HandleFunc("/blobs/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			return // has all
		}
		w.WriteHeader(http.StatusCreated)
	})
	l, err := net.Listen("unix", filepath.Join(dir, "vmm.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return d
}

// image puts an OS image into the stack that can be measured.
func (d *desk) image(name, cmdline string) {
	dir := filepath.Join(d.dir, "images", name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		d.Fatal(err)
	}
	root := bytes.Repeat([]byte("root"), 1024)
	tree, hash, err := verity.Tree(bytes.NewReader(root), int64(len(root)))
	if err != nil {
		d.Fatal(err)
	}
	var disk bytes.Buffer
	content := append(root, tree...)
	if err := gpt.Write(&disk, gpt.Content{Data: bytes.NewReader(content), Size: int64(len(content))}, gpt.Content{}); err != nil {
		d.Fatal(err)
	}
	meta, _ := json.Marshal(map[string]any{"bios": "ovmf.fd", "kernel": "bzImage", "initrd": "initramfs.cpio.gz", "rootfs": "rootfs.img.parted.verity",
		"cmdline": fmt.Sprintf("%s dstack.rootfs_hash=%x dstack.rootfs_size=%d", cmdline, hash, len(root)), "version": "0.1.0", "flavour": "sim", "is_dev": true})
	files := map[string][]byte{"ovmf.fd": measuretest.Firmware(), "bzImage": measuretest.Kernel(), "initramfs.cpio.gz": []byte("initrd"), "metadata.json": meta}
	sums := ""
	for _, name := range []string{"ovmf.fd", "bzImage", "initramfs.cpio.gz", "metadata.json"} {
		sums += fmt.Sprintf("%x  %s\n", sha256.Sum256(files[name]), name)
	}
	files["sha256sum.txt"] = []byte(sums)
	files["digest.txt"] = fmt.Appendf(nil, "%x\n", sha256.Sum256([]byte(sums)))
	files["rootfs.img.parted.verity"] = disk.Bytes()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			d.Fatal(err)
		}
	}
}

func (d *desk) enter(name string) error {
	d.calls = append(d.calls, name)
	return d.refuse[name]
}

func (d *desk) methods() []prpc.Method {
	state := func(name, status, progress string) prpc.Method {
		return prpc.Unary(name, func(_ context.Context, in *vmmpb.Id) (*emptypb.Empty, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if err := d.enter(name); err != nil {
				return nil, err
			}
			d.vms[in.Id].Status, d.vms[in.Id].BootProgress = status, progress
			return nil, nil
		})
	}
	return []prpc.Method{
		prpc.Unary("Version", func(context.Context, *emptypb.Empty) (*vmmpb.VersionResponse, error) {
			return &vmmpb.VersionResponse{Version: "0"}, nil
		}),
		prpc.Unary("Status", func(context.Context, *vmmpb.StatusRequest) (*vmmpb.StatusResponse, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			out := &vmmpb.StatusResponse{}
			for _, vm := range d.vms {
				out.Vms = append(out.Vms, proto.Clone(vm).(*vmmpb.VmInfo))
			}
			return out, nil
		}),
		prpc.Unary("GetInfo", func(_ context.Context, in *vmmpb.Id) (*vmmpb.GetInfoResponse, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			vm, ok := d.vms[in.Id]
			if !ok {
				return &vmmpb.GetInfoResponse{}, nil
			}
			return &vmmpb.GetInfoResponse{Found: true, Info: proto.Clone(vm).(*vmmpb.VmInfo)}, nil
		}),
		prpc.Unary("CreateVm", func(_ context.Context, in *vmmpb.VmConfiguration) (*vmmpb.Id, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if err := d.enter("CreateVm"); err != nil {
				return nil, err
			}
			d.created = proto.Clone(in).(*vmmpb.VmConfiguration)
			m, err := manifest.Parse([]byte(in.ComposeFile))
			if err != nil {
				return nil, err
			}
			d.vms["vm-"+in.Name] = &vmmpb.VmInfo{Id: "vm-" + in.Name, Name: in.Name, Status: "running", BootProgress: "done", AppId: m.Hash().String()[:40], Configuration: d.created}
			return &vmmpb.Id{Id: "vm-" + in.Name}, nil
		}),
		prpc.Unary("UpdateVm", func(_ context.Context, in *vmmpb.UpdateVmRequest) (*vmmpb.Id, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if err := d.enter("UpdateVm"); err != nil {
				return nil, err
			}
			d.updated = proto.Clone(in).(*vmmpb.UpdateVmRequest)
			c := d.vms[in.Id].Configuration
			c.ComposeFile, c.Ports = in.ComposeFile, in.Ports
			return &vmmpb.Id{}, nil
		}),
		prpc.Unary("ResizeVm", func(_ context.Context, in *vmmpb.ResizeVmRequest) (*emptypb.Empty, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			return nil, d.enter(fmt.Sprint("ResizeVm ", *in.DiskSize))
		}),
		state("ShutdownVm", "stopped", ""), state("StartVm", "running", "done"), state("RemoveVm", "stopped", ""),
	}
}

type outcome struct {
	code     int
	out, err string
}

func (d *desk) dstack(args ...string) outcome {
	d.Helper()
	var out, errOut bytes.Buffer
	code := Main(append([]string{"--state", d.dir}, args...), strings.NewReader(""), &out, &errOut)
	return outcome{code, out.String(), errOut.String()}
}

func (d *desk) must(args ...string) outcome {
	d.Helper()
	o := d.dstack(args...)
	if o.code != 0 {
		d.Fatalf("%q: exit %d\n%s%s", args, o.code, o.out, o.err)
	}
	return o
}

// refused wants a code and a fix.
func (d *desk) refused(code string, args ...string) outcome {
	d.Helper()
	o := d.dstack(args...)
	if o.code == 0 || !strings.Contains(o.err, "["+code+"]") || !strings.Contains(o.err, "fix:") && code != "usage" {
		d.Errorf("%q: exit %d, want %s with a fix\n%s%s", args, o.code, code, o.out, o.err)
	}
	return o
}

func (d *desk) file(name, text string) string {
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		d.Fatal(err)
	}
	return path
}

var webDigest = "sha256:" + strings.Repeat("ab", 32)

func composeFile(more string) string {
	return "services:\n  web:\n    image: web@" + webDigest + "\n    ports: [\"8080:80\"]\n" + more
}

func (d *desk) manifest(text string) *manifest.Manifest {
	d.Helper()
	m, err := manifest.Parse([]byte(text))
	if err != nil {
		d.Fatal(err)
	}
	return m
}

// rootKey is the public key of a KMS's root, as --kms-id wants it.
func rootKey(t *testing.T) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(der)
}

func TestDeployWritesWhatItIsTold(t *testing.T) {
	d := newDesk(t)
	c := d.file("c.yaml", composeFile(""))
	init1, init2, pre := d.file("1.sh", "echo 1"), d.file("2.sh", "echo 2"), d.file("p.sh", "echo p")
	ca, id := d.file("ca.pem", "PEM"), rootKey(t)
	d.must("deploy", "-c", c, "-n", "app", "--key-provider", "kms", "--kms", "https://a.example:1", "--kms", "https://b.example", "--kms-id", id,
		"--no-instance-id", "--storage-fs", "xfs", "--swap", "1G", "--script-init", init1, "--script-init", init2, "--script-pre-launch", pre,
		"--time-server", "a.example:4460="+ca, "--time-server", "b.example:4460", "--time-server", "c.example:4460",
		"--key-scope", "web=app/", "--key-scope", "web=x", "--vcpu", "2", "--memory", "512", "--disk", "3", "--public-logs")
	m := d.manifest(d.created.ComposeFile)
	if m.KeyProvider != "kms" || hex.EncodeToString(m.KeyProviderID) != id || !m.NoInstanceID || m.StorageFS != "xfs" || m.SwapSize != 1<<30 || !m.PublicLogs ||
		strings.Join(m.InitScripts, "|") != "echo 1|echo 2" || m.PreLaunchScript != "echo p" || m.SecureTime == nil || !*m.SecureTime ||
		len(m.TimeServers) != 3 || m.TimeServers[0].CACert != "PEM" || m.TimeServers[1].CACert != "" || strings.Join(m.KeyScopes["web"], "|") != "app/|x" || m.ImagePolicy != "digest" {
		t.Errorf("%+v", m)
	}
	if r := d.created; len(r.KmsUrls) != 2 || r.Vcpu != 2 || r.Memory != 512 || r.DiskSize != 3 || len(r.Ports) != 2 || len(r.EncryptedEnv) != 0 {
		t.Errorf("%+v", r)
	}
	l, err := lock.Read(filepath.Join(d.dir, "dstack.lock.json"))
	if err != nil || l.ComposeHash != m.Hash() || l.Images["web@"+webDigest] != webDigest {
		t.Errorf("%+v %v", l, err)
	}
	// The defaults are those of an app without lasting keys.
	d.must("deploy", "-c", c, "-n", "plain", "--lock", filepath.Join(d.dir, "l2"))
	m = d.manifest(d.created.ComposeFile)
	if m.KeyProvider != "none" || len(m.KeyProviderID) != 0 || m.NoInstanceID || m.StorageFS != "" || m.SwapSize != 0 || m.SecureTime == nil || *m.SecureTime || len(m.AllowedEnvs) != 0 || m.KeyScopes != nil {
		t.Errorf("%+v", m)
	}
	if r := d.created; r.Vcpu != 1 || r.Memory != 1024 || r.DiskSize != 10 {
		t.Errorf("%+v", r)
	}
	// What a software TPM costs is said, and no reason to stop.
	if o := d.must("deploy", "-c", c, "-n", "tpm", "--key-provider", "tpm", "--lock", filepath.Join(d.dir, "l3")); !strings.Contains(o.err, "acpi_shape_unsupported") {
		t.Error(o.err)
	}
	if l, err = lock.Read(filepath.Join(d.dir, "l3")); err != nil || !strings.Contains(string(l.VMConfig), `"swtpm"`) {
		t.Errorf("%+v %v", l, err)
	}
}

func TestDeployRefusesWhatIsUnsafeOrUnclear(t *testing.T) {
	d := newDesk(t)
	c, id := d.file("c.yaml", composeFile("")), rootKey(t)
	deploy := func(more ...string) []string { return append([]string{"deploy", "-c", c, "-n", "app"}, more...) }
	os.Unsetenv("DSTACK_TEST_ABSENT")
	t.Setenv("DSTACK_TEST_LARGE", strings.Repeat("x", envelope.MaxValue+1))
	kms := []string{"--key-provider", "kms", "--kms-id", id}
	withKMS := append(kms, "--kms", "https://a.example")
	for _, tc := range []struct {
		code string
		args []string
	}{
		{"key_provider_unpinned", []string{"--key-provider", "kms", "--kms", "https://a.example"}},
		{"key_provider_unpinned", []string{"--key-provider", "local"}},
		{"key_provider_id", []string{"--key-provider", "kms", "--kms-id", "zz"}},
		{"key_provider_id", []string{"--key-provider", "kms", "--kms-id", strings.Repeat("ab", 32)}},
		{"key_provider_id", []string{"--key-provider", "local", "--kms-id", id}},
		{"key_provider_unused", []string{"--kms", "https://a.example"}},
		{"key_provider_unused", []string{"--key-provider", "tpm", "--kms-id", id}},
		{"usage", append(kms, "--kms", "http://a.example")},
		{"env_needs_kms", []string{"-e", "A=1"}},
		{"env_needs_kms", []string{"--key-provider", "tpm", "--env-file", d.file("env", "A=1")}},
		{"env_missing", append(kms, "-e", "DSTACK_TEST_ABSENT")},
		{"env_malformed", append(kms, "-e", "1A=hunter2")},
		{"env_malformed", append(kms, "-e", strings.Repeat("a", 256)+"=1")},
		{"env_malformed", append(kms, "--env-file", d.file("bad", "# fine\n\nA=1\nhunter2 hunter2\n"))},
		{"env_too_large", append(kms, "-e", "DSTACK_TEST_LARGE")},
		{"env_malformed", append(kms, "--env-file", d.file("empty", "# none\n"))},
		{"kms_url_missing", append(kms, "-e", "A=hunter2")},
		{"kms_signer", append(withKMS, "-e", "A=hunter2", "--kms-signer", "02abcd")},
		{"file_missing", append(kms, "--env-file", filepath.Join(d.dir, "absent"))},
		{"script_missing", []string{"--script-init", filepath.Join(d.dir, "absent")}},
		{"script_missing", []string{"--script-pre-launch", filepath.Join(d.dir, "absent")}},
		{"time_server", []string{"--time-server", "a:1", "--time-server", "b:1"}},
		{"time_server", []string{"--time-server", "a"}},
		{"usage", []string{"--no-secure-time", "--time-server", "a:1"}},
		{"key_scope", []string{"--key-scope", "db=x"}},
		{"key_scope", []string{"--key-scope", "web"}},
		{"custom_domain", []string{"--domain", "shop.example.com=80"}},
		{"usage", []string{"--swap", "lots"}},
	} {
		o := d.refused(tc.code, deploy(tc.args...)...)
		if strings.Contains(o.err+o.out, "hunter2") {
			t.Errorf("%v: a value is printed:\n%s", tc.args, o.err)
		}
	}
	if len(d.calls) != 0 {
		t.Errorf("asked for %v", d.calls)
	}
	d.must(deploy()...)
	d.refused("name_taken", deploy()...)
}

func TestVariablesAreReadAndNotPrinted(t *testing.T) {
	t.Setenv("DSTACK_TEST_TOKEN", "from the environment")
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte("# comment\r\nA=a=b\r\n\n  \nB=file\nDSTACK_TEST_TOKEN\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := &workload{Env: []string{"B=line", "C="}, EnvFile: []string{file}}
	got, err := w.variables("kms")
	if err != nil {
		t.Fatal(err)
	}
	var text []string
	for _, v := range got {
		text = append(text, v.name+"="+string(v.value))
	}
	if strings.Join(text, "|") != "A=a=b|B=line|C=|DSTACK_TEST_TOKEN=from the environment" {
		t.Errorf("%q", text)
	}
	if s := fmt.Sprintf("%v %s %+v", got, got[0], got); strings.Contains(s, "a=b") || strings.Contains(s, "from the") {
		t.Error(s)
	}
	var many []string
	for i := range envelope.MaxVariables + 1 {
		many = append(many, fmt.Sprintf("V%d=", i))
	}
	if _, err := (&workload{Env: many}).variables("kms"); fault.Code(err) != "env_too_large" {
		t.Error(err)
	}
}

func TestUpgradeKeepsWhatItIsNotTold(t *testing.T) {
	d := newDesk(t)
	c, id := d.file("c.yaml", composeFile("")), rootKey(t)
	d.must("deploy", "-c", c, "-n", "app", "--key-provider", "kms", "--kms", "https://a.example", "--kms-id", id, "--storage-fs", "xfs", "--memory", "512",
		"--port", "127.0.0.1:9000:8080", "--script-pre-launch", d.file("p.sh", "echo p"))
	first := d.manifest(d.created.ComposeFile)
	lockPath := filepath.Join(d.dir, "dstack.lock.json")
	before, err := lock.Read(lockPath)
	if err != nil {
		t.Fatal(err)
	}
	d.calls = nil
	d.file("c.yaml", composeFile("    command: [\"two\"]\n"))
	var out deployment
	if o := d.must("--json", "upgrade", "app", "-c", c); json.Unmarshal([]byte(o.out), &out) != nil || out.ID != "vm-app" {
		t.Fatal(o.out)
	}
	if got := strings.Join(d.calls, " "); got != "UpdateVm ShutdownVm StartVm" {
		t.Errorf("calls %s", got)
	}
	m := d.manifest(d.updated.ComposeFile)
	if m.KeyProvider != "kms" || hex.EncodeToString(m.KeyProviderID) != id || m.StorageFS != "xfs" || m.PreLaunchScript != "echo p" || !strings.Contains(m.DockerComposeFile, "two") || m.Hash() == first.Hash() {
		t.Errorf("%+v", m)
	}
	if u := d.updated; *u.Memory != 512 || u.Image != nil || u.UpdateKmsUrls || len(u.Ports) != 2 || u.Ports[0].HostPort != d.created.Ports[0].HostPort || u.Ports[1].HostPort != 9000 || len(u.EncryptedEnv) != 0 {
		t.Errorf("%+v", u)
	}
	after, err := lock.Read(lockPath)
	if err != nil || after.AppID != before.AppID || after.ComposeHash != m.Hash() || out.AppID != before.AppID {
		t.Errorf("%+v, was %+v, %v", after, before, err)
	}
	// Without a compose file it stays the one that it was; other things change.
	d.image("dstack-sim-2", "console=ttyS1")
	d.must("upgrade", "app", "--image", "dstack-sim-2", "--public-logs", "--lock", lockPath)
	if m := d.manifest(d.updated.ComposeFile); !strings.Contains(m.DockerComposeFile, "two") || !m.PublicLogs || *d.updated.Image != "dstack-sim-2" {
		t.Errorf("%+v", d.updated)
	}
	if l, err := lock.Read(lockPath); err != nil || l.Image != "dstack-sim-2" || l.OSImageHash == after.OSImageHash || l.AppID != before.AppID {
		t.Errorf("%+v %v", l, err)
	}
}

func TestUpgradeRefusals(t *testing.T) {
	d := newDesk(t)
	c := d.file("c.yaml", composeFile(""))
	d.must("deploy", "-c", c, "-n", "app")
	d.must("deploy", "-c", c, "-n", "other", "--lock", filepath.Join(d.dir, "other.json"), "--swap", "1G")
	d.calls = nil
	d.refused("app_unknown", "upgrade", "nobody")
	d.refused("compose_missing", "upgrade", "app", "-c", filepath.Join(d.dir, "absent.yaml"))
	d.refused("lock_foreign", "upgrade", "other", "-c", c)
	d.refused("key_provider_unpinned", "upgrade", "app", "-c", c, "--key-provider", "kms")
	d.file("bad.json", "{")
	d.refused("lock_malformed", "upgrade", "app", "-c", c, "--lock", filepath.Join(d.dir, "bad.json"))
	if len(d.calls) != 0 {
		t.Errorf("calls %v", d.calls)
	}
	before, _ := os.ReadFile(filepath.Join(d.dir, "dstack.lock.json"))
	d.refuse["UpdateVm"] = fault.New("disk_incompatible", "no").WithFix("do not")
	d.refused("disk_incompatible", "upgrade", "app", "-c", c, "--swap", "2G")
	if strings.Join(d.calls, " ") != "UpdateVm" || d.vms["vm-app"].Status != "running" {
		t.Errorf("a refused upgrade stopped the app: %v", d.calls)
	}
	if after, _ := os.ReadFile(filepath.Join(d.dir, "dstack.lock.json")); !bytes.Equal(before, after) {
		t.Error("the lock was rewritten")
	}
}

func TestResize(t *testing.T) {
	d := newDesk(t)
	d.must("deploy", "-c", d.file("c.yaml", composeFile("")), "-n", "app")
	d.calls = nil
	if o := d.must("resize", "app", "--disk", "20"); strings.Join(d.calls, " ") != "ResizeVm 20" || !strings.Contains(o.err, "from its next start on") {
		t.Errorf("%v\n%s", d.calls, o.err)
	}
	d.must("stop", "app")
	if o := d.must("--json", "resize", "app", "--disk", "21"); !strings.Contains(o.out, `"applied": true`) {
		t.Error(o.out)
	}
	d.refused("app_unknown", "resize", "nobody", "--disk", "20")
	if o := d.dstack("resize", "app"); o.code != 2 || !strings.Contains(o.err, "--disk") {
		t.Error(o)
	}
}

func TestHealthIsShown(t *testing.T) {
	d := newDesk(t)
	d.must("deploy", "-c", d.file("c.yaml", composeFile("")), "-n", "app")
	d.vms["vm-app"].Health = `{"state":"degraded","reason":"web: \u001b[31mexit 1","x":{}}`
	if o := d.must("ps"); !strings.Contains(o.out, "degraded") || strings.Contains(o.out, "\x1b") {
		t.Error(o.out)
	}
	if o := d.must("--json", "ps"); !strings.Contains(o.out, `"health": "degraded"`) || !strings.Contains(o.out, `"health_reason": "web: ?[31mexit 1"`) {
		t.Error(o.out)
	}
	if o := d.must("info", "app"); !strings.Contains(o.out, "web: ?[31mexit 1") || strings.Contains(o.out, "\x1b") {
		t.Error(o.out)
	}
	if o := d.must("logs", "app"); !strings.Contains(o.err, "the app is degraded: web:") || o.out != "console\n" {
		t.Errorf("%q %q", o.out, o.err)
	}
	d.vms["vm-app"].Health, d.vms["vm-app"].UpdatePending = "{", true
	if o := d.must("info", "app"); !strings.Contains(o.out, "at the next start") || strings.Contains(o.out, "health") {
		t.Error(o.out)
	}
}

// volumeImage is the beginning of a volume's image, as far as deploy looks.
func volumeImage(change func(meta []byte)) string {
	disk := make([]byte, 1<<20+8192)
	copy(disk[512:], "EFI PART")
	disk[1024+33] = 2048 >> 8
	meta := disk[1<<20 : 1<<20+4096]
	copy(meta, "DSTACK_VOLUME\x00\x00\x00\x01\x00\x00\x00"+strings.Repeat("\xab", 32))
	if change != nil {
		change(meta)
	}
	return string(disk)
}

func TestDeployStoresVolumes(t *testing.T) {
	d := newDesk(t)
	c, image := d.file("c.yaml", composeFile("")), d.file("model.img", volumeImage(nil))
	d.must("deploy", "-c", c, "-n", "app", "--volume", "model="+image, "--volume", "m2="+image+":/models/two")
	m := d.manifest(d.created.ComposeFile)
	if v := m.VerityVolumes; len(v) != 2 || v[0].Source != "model-abababababababab" || v[0].Target != "/dstack/volumes/model" || v[0].Root[31] != 0xab || v[1].Target != "/models/two" {
		t.Errorf("%+v", v)
	}
	stored := filepath.Join(d.dir, "volumes", "model-abababababababab")
	data, err := os.ReadFile(stored)
	if err != nil || string(data) != volumeImage(nil) {
		t.Error(len(data), err)
	}
	if entries, _ := os.ReadDir(filepath.Join(d.dir, "volumes")); len(entries) != 2 {
		t.Errorf("stored %v", entries)
	}
	// A later change of the file is none of the app's.
	os.WriteFile(image, []byte("other"), 0o600)
	if data, _ := os.ReadFile(stored); string(data) != volumeImage(nil) {
		t.Error("the stored volume changed")
	}
	// An upgrade keeps volumes that it is not told of.
	d.must("upgrade", "app", "-c", c, "--swap", "1G")
	if v := d.manifest(d.updated.ComposeFile).VerityVolumes; len(v) != 2 {
		t.Errorf("%+v", v)
	}
	for name, text := range map[string]string{
		"empty": "", "no table": strings.Replace(volumeImage(nil), "EFI PART", "EFI PARX", 1), "cut": volumeImage(nil)[:1<<20+100],
		"no magic": volumeImage(func(m []byte) { m[0] = 'd' }), "another kind": volumeImage(func(m []byte) { m[16] = 2 }),
		"more behind": volumeImage(func(m []byte) { m[4095] = 1 }), "no root": volumeImage(func(m []byte) { clear(m[20:52]) }),
		"a partition nowhere": strings.Replace(volumeImage(nil), "\x08", "\x00", 1),
	} {
		t.Run(name, func(t *testing.T) {
			d.refused("volume_malformed", "deploy", "-c", c, "-n", "other", "--volume", "model="+d.file("bad.img", text))
		})
	}
	d.refused("file_missing", "deploy", "-c", c, "-n", "other", "--volume", "model=/nonexistent")
	for _, text := range []string{"model", "=x", "../x=" + image, "model="} {
		d.refused("usage", "deploy", "-c", c, "-n", "other", "--volume", text)
	}
}

func TestEvents(t *testing.T) {
	d := newDesk(t)
	d.must("deploy", "-c", d.file("c.yaml", composeFile("")), "-n", "app")
	d.calls = nil
	if o := d.must("events", "app"); o.out != "1970-01-01T00:00:01Z  boot.progress      ?[31mdone\n" {
		t.Errorf("%q", o.out)
	}
	if o := d.must("--json", "events", "app", "--audit", "--since", "1970-01-01T00:00:02Z", "-n", "7"); !strings.Contains(o.out, `"method": "StopVm"`) {
		t.Error(o.out)
	}
	gone := "01234567-89ab-4def-8123-456789abcdef"
	d.must("events", gone, "--since", "1h")
	if d.calls[0] != "history id=vm-app&kind=events&limit=200" || d.calls[1] != "history id=vm-app&kind=audit&limit=7&since=2000" || !strings.HasPrefix(d.calls[2], "history id="+gone) {
		t.Errorf("%q", d.calls)
	}
	d.refused("app_unknown", "events", "nobody")
	for _, since := range []string{"yesterday", "-1h", "1969-01-01T00:00:00Z"} {
		d.refused("usage", "events", "app", "--since="+since)
	}
}

// A volume as the builder makes it is read as deploy reads it.
func TestRootOfABuiltVolume(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "v.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := bytes.Repeat([]byte("data"), 4096)
	want, err := volume.Build(f, bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := volumeRoot(f.Name()); err != nil || got != want {
		t.Errorf("%x, want %x, %v", got, want, err)
	}
}

func TestVolumeBuild(t *testing.T) {
	d := newDesk(t)
	fs := append([]byte("hsqs"), bytes.Repeat([]byte("data"), 2047)...)
	in, out := d.file("v.squashfs", string(fs)), filepath.Join(d.dir, "v.img")
	o := d.must("--json", "volume", "build", in, "-o", out)
	root, err := volumeRoot(out)
	if err != nil || !strings.Contains(o.out, hex.EncodeToString(root[:])) {
		t.Errorf("%s: %x, %v", o.out, root, err)
	}
	d.refused("volume_fs", "volume", "build", d.file("text", "no file system"), "-o", out)
	d.refused("file_missing", "volume", "build", filepath.Join(d.dir, "absent"), "-o", out)
	d.refused("volume_fs", "volume", "build", d.file("odd", string(fs)+"x"), "-o", out)
	d.refused("file_missing", "volume", "build", d.dir, "-o", out)
	d.refused("volume_write", "volume", "build", in, "-o", filepath.Join(d.dir, "no", "v.img"))
	if again, err := volumeRoot(out); err != nil || again != root {
		t.Errorf("a refusal changed the volume: %x, %v", again, err)
	}
}

func FuzzAdvertisedRoot(f *testing.F) {
	f.Add([]byte(volumeImage(nil))[:1<<10+64])
	// A small disk whose first partition follows the table.
	small := []byte(volumeImage(nil))
	small = append(small[:2048:2048], small[1<<20:1<<20+4096]...)
	small[1024+32], small[1024+33] = 4, 0
	f.Add(small)
	f.Fuzz(func(t *testing.T, data []byte) {
		root, err := advertisedRoot(bytes.NewReader(data))
		if err == nil && !bytes.Contains(data, volume.Metadata(root)) {
			t.Fatalf("root %x is nowhere", root)
		}
	})
}

func TestVariablesAreSealedToTheAppAndSigned(t *testing.T) {
	d := newDesk(t)
	now := time.Now()
	k, err := kmstest.Start(kmstest.Options{Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	pin := hex.EncodeToString(k.SPKI())
	c := d.file("c.yaml", composeFile("    environment: [\"A=${A}\"]\n"))
	t.Setenv("CLI_TEST_TOKEN", "hunter2")
	deploy := []string{"deploy", "-c", c, "-n", "app", "--key-provider", "kms", "--kms", "https://127.0.0.1:1", "--kms", k.URL, "--kms-id", pin,
		"--kms-signer", hex.EncodeToString(k.K256()), "-e", "A=hunter1", "-e", "CLI_TEST_TOKEN"}
	with := func(flag, value string) []string {
		out := slices.Clone(deploy)
		out[slices.Index(out, flag)+1] = value
		return out
	}

	// Nothing is encrypted to a key that the pinned KMS did not give.
	d.refused("channel_issuer", with("--kms-id", rootKey(t))...)
	d.refused("kms_signer", with("--kms-signer", "02"+strings.Repeat("ab", 32))...)
	now = now.Add(-10 * time.Minute)
	d.refused("env_key_stale", deploy...)
	now = time.Now()
	nobody := slices.Clone(deploy)
	nobody[slices.Index(nobody, k.URL)] = "https://127.0.0.1:2"
	d.refused("kms_unreachable", nobody...)
	d.refused("env_name_denied", append(deploy, "-e", "LD_PRELOAD=/x")...)
	if len(d.calls) != 0 {
		t.Fatalf("calls %v", d.calls)
	}

	o := d.must(deploy...)
	if strings.Contains(o.out+o.err, "hunter") || strings.Contains(d.created.String(), "hunter") {
		t.Error("a value is printed, or sent as it is")
	}
	m := d.manifest(d.created.ComposeFile)
	appID := appIDOf(m)
	env, err := k.Roots().Env(appID)
	if err != nil {
		t.Fatal(err)
	}
	opening := envelope.Opening{Key: env, App: appID, Compose: m.Hash(), Signers: m.EnvSigners, Allowed: m.AllowedEnvs, Strict: true}
	first, err := opening.Open(d.created.EncryptedEnv)
	if err != nil || first.Variables["A"] != "hunter1" || first.Variables["CLI_TEST_TOKEN"] != "hunter2" || len(first.Skipped) != 0 || len(m.EnvSigners) != 1 {
		t.Fatal(first, err)
	}
	fi, err := os.Stat(filepath.Join(d.dir, "deployer.key"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi, err)
	}

	// They are sealed to this manifest: another one needs them again.
	d.refused("env_again", "upgrade", "app", "-c", c, "--swap", "1G")
	d.must("upgrade", "app", "-c", c)
	if len(d.updated.EncryptedEnv) != 0 || d.updated.ComposeFile != string(m.Raw) {
		t.Error("an upgrade to the same changes something")
	}
	time.Sleep(2 * time.Millisecond)
	d.must("upgrade", "app", "-c", c, "--swap", "1G", "-e", "A=hunter3")
	m2 := d.manifest(d.updated.ComposeFile)
	opening.Compose, opening.Allowed, opening.MinVersion = m2.Hash(), m2.AllowedEnvs, first.Version
	second, err := opening.Open(d.updated.EncryptedEnv)
	if err != nil || second.Variables["A"] != "hunter3" || len(second.Variables) != 1 || second.Version <= first.Version || !bytes.Equal(m2.EnvSigners[0], m.EnvSigners[0]) {
		t.Fatal(second, err)
	}
	d.refused("usage", "upgrade", "app", "--no-env", "-e", "A=1")
	d.file("c.yaml", composeFile(""))
	d.must("upgrade", "app", "-c", c, "--no-env")
	if m := d.manifest(d.updated.ComposeFile); len(m.AllowedEnvs)+len(m.EnvSigners) != 0 {
		t.Errorf("%+v", m)
	}
	d.file("deployer.key", "short")
	d.refused("signer_key_malformed", "upgrade", "app", "-c", c, "-e", "A=1")
}

func appIDOf(m *manifest.Manifest) dstack.AppID {
	h := m.Hash()
	return dstack.AppID(h[:dstack.AppIDSize])
}
