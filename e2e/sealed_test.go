// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	dstackid "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/stack"
)

// sealedCompose has an app with a volume, a secret, a scope of keys and a restart
// policy, and beside it one that may look at the whole machine.
const sealedCompose = `services:
  web:
    image: sealed:1
    restart: always
    environment:
      SECRET: ${SECRET}
      COUNT_AS: web-starts
    volumes: ["data:/data", "/var/run/dstack.sock:/var/run/dstack.sock"]
    ports: ["8080:8080"]
  scan:
    image: sealed:1
    privileged: true
    volumes: ["/proc:/guest/proc"]
    ports: ["8081:8080"]
volumes:
  data:
`

const goodScript = `set -ux
test -z "${SECRET:-}"                 # values of the environment are not for init scripts
test ! -e /run/docker.sock            # nor is the engine
test ! -e /persistent/var             # nor the data disk
jq --version >/dev/null
curl --silent --unix-socket /run/dstack.sock http://dstack/Version | jq -r .version
echo "the gate is open"
`

// sealedApp is one app over several boots, on the disk that a KMS's key opens.
type sealedApp struct {
	t         *testing.T
	dir       string
	web, scan string // base URLs
	flags     []string
	deployed
}

func (s *sealedApp) file(name, text string) string {
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// run deploys or upgrades and waits until the app answers.
func (s *sealedApp) run(args ...string) result {
	s.t.Helper()
	r := dstack(s.t, append(append([]string{"--json"}, args...), s.flags...)...)
	if r.code != 0 {
		return r
	}
	if err := json.Unmarshal([]byte(r.stdout), &s.deployed); err != nil {
		s.t.Fatal(err)
	}
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(300 * time.Millisecond) {
		_, errWeb := get(s.web + "env?name=COUNT_AS")
		_, errScan := get(s.scan + "env?name=COUNT_AS")
		if errWeb == nil && errScan == nil {
			return r
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the app does not answer: %v, %v\n%s", errWeb, errScan, console(s.t, s.ID))
		}
	}
}

func (s *sealedApp) get(path string, query ...string) string {
	s.t.Helper()
	v := url.Values{}
	for i := 0; i < len(query); i += 2 {
		v.Set(query[i], query[i+1])
	}
	body, err := get(s.web + path + "?" + v.Encode())
	if err != nil {
		s.t.Fatalf("%s: %v", path, err)
	}
	return body
}

// find asks the app that sees the whole machine who shows the secret.
func (s *sealedApp) find(secret []byte) []string {
	s.t.Helper()
	resp, err := http.Post(s.scan+"scan", "application/octet-stream", strings.NewReader(string(secret)))
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	var found []string
	if err == nil {
		err = json.Unmarshal(text, &found)
	}
	if err != nil {
		s.t.Fatalf("scan: %v: %s", err, text)
	}
	return found
}

// An app with sealed storage: keys from the stack's KMS, which the manifest pins, an
// encrypted environment, scripts, scopes, swap, a release log that each boot remembers;
// over a boot that a gate stops (threats.md J04) and an upgrade in place, until the app
// is revoked (G05).
func TestSealedApp(t *testing.T) {
	st, err := stack.Open(shared.state)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := custody.Open(filepath.Join(shared.state, "kms", "root.keys"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(roots.Wipe)
	s := &sealedApp{t: t, dir: t.TempDir()}
	binary := filepath.Join(s.dir, "sealedapp")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", binary, "./e2e/sealedapp")
	build.Dir = testkit.Root()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	web, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	scan, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	s.web, s.scan = fmt.Sprintf("http://127.0.0.1:%d/", web), fmt.Sprintf("http://127.0.0.1:%d/", scan)
	const first, second = "canary-Zq7 'first' $HOME", "canary-Zq7-second"
	envFile := s.file("env", "SECRET="+first+"\n")
	compose := s.file("docker-compose.yaml", sealedCompose)
	lockFile := filepath.Join(s.dir, "dstack.lock.json")
	s.flags = []string{
		"-c", compose, "--lock", lockFile, "--env-file", envFile, "--allow-mutable",
	}
	s.run("deploy", "-n", "sealed", "--image", shared.image, "--disk", "4", "--app-image", "sealed:1="+binary,
		"--port", fmt.Sprintf("%d:8080", web), "--port", fmt.Sprintf("%d:8081", scan),
		"--swap", "64M", "--gateway-tls", "8081",
		"--key-scope", "web=web/", "--script-init", s.file("gate.sh", goodScript)).must(t)
	t.Cleanup(func() { dstack(t, "rm", "--force", "sealed") })
	accept := s.file("policy.json", `{"tcb":{"accept":["UpToDate"]},"workload":{"allow_mutable":true}}`)

	if got := s.get("env", "name", "SECRET"); got != first {
		t.Errorf("the app has the secret %q", got)
	}
	s.get("put", "name", "note", "value", "kept")
	starts := func() int { return strings.Count(s.get("get", "name", "web-starts"), "started") }
	if n := starts(); n != 1 {
		t.Errorf("%d starts", n)
	}

	t.Run("a service gets the keys of its scope", func(t *testing.T) {
		if got := s.get("key", "path", "web/session"); !strings.Contains(got, `"key":"`) {
			t.Errorf("its own: %s", got)
		}
		for _, path := range []string{"db/main", "web", "", "vms"} {
			if got := s.get("key", "path", path); !strings.Contains(got, "key_scope") {
				t.Errorf("the path %q: %s", path, got)
			}
		}
	})

	t.Run("TestThreat_K12_GuestDoesNotReachTheHost", s.egress)

	if body, err := get(s.scan + "env?name=COUNT_AS"); err != nil || body != "" {
		t.Fatalf("the scanner says that it counts as %q, %v", body, err)
	}
	appID, err := dstackid.ParseAppID(s.AppID)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("TestThreat_E06_NoSecretWhereOthersCouldRead", func(t *testing.T) {
		app, err := roots.AppKey(t.Context(), custody.Scope{App: appID})
		if err != nil {
			t.Fatal(err)
		}
		env, err := roots.EnvKey(t.Context(), custody.Scope{App: appID})
		if err != nil {
			t.Fatal(err)
		}
		info := vmInfo(t, s.ID)
		instance, err := hex.DecodeString(info.GetInstanceId())
		if err != nil {
			t.Fatal(err)
		}
		disk, err := roots.DiskKey(t.Context(), custody.Scope{App: appID, Instance: instance})
		if err != nil {
			t.Fatal(err)
		}
		for name, key := range map[string][]byte{"app": app.Bytes(), "env": env.Bytes(), "disk": disk.Bytes()} {
			for form, text := range map[string][]byte{"raw": key, "hex": []byte(hex.EncodeToString(key))} {
				if found := s.find(text); len(found) > 0 {
					t.Errorf("the %s key (%s) shows in %q", name, form, found)
				}
			}
		}
		// The app's own process has its own variable, and the engine keeps what it
		// starts containers with, where only root looks.
		found := slices.DeleteFunc(s.find([]byte(first)), func(f string) bool {
			return strings.HasPrefix(f, "root's file /run/containerd/") || strings.HasPrefix(f, "root's file /run/docker/")
		})
		if !slices.Equal(found, []string{"environ of app"}) {
			t.Errorf("the secret shows in %q", found)
		}
		if log := console(t, s.ID); strings.Contains(log, "canary") {
			t.Error("the secret is on the console")
		}
	})

	t.Run("the verdict names what a relying party should know", func(t *testing.T) {
		args := []string{s.AttestURL, "--lock", lockFile, "--dev-roots", shared.devRoots()}
		v, exit := verify(t, args...)
		wantRefused(t, v, exit, "mutable")
		v, exit = verify(t, append(args, "--policy", accept)...)
		if !v.Accepted || exit != 0 {
			t.Fatalf("%+v", v)
		}
		for level, codes := range map[string][]string{"info": {"storage_new", "env_version"}, "warning": {"runs_scripts", "mutable"}} {
			for _, code := range codes {
				if !slices.Contains(v.codes(level), code) {
					t.Errorf("no %s %s in %v", level, code, v.codes(level))
				}
			}
		}
	})

	// A gate that fails stops the boot before any container: the one that restarts
	// always did not start.
	s.flags[slices.Index(s.flags, envFile)] = s.file("env2", "SECRET="+second+"\n")
	s.run("upgrade", "sealed", "--script-init", s.file("shut.sh", "echo shut; exit 3\n")).refused(t, "script_failed")
	if log := console(t, s.ID); !strings.Contains(log, "init_script") || strings.Contains(log, "phase engine") && strings.LastIndex(log, "phase engine") > strings.LastIndex(log, "script_failed") {
		t.Errorf("console:\n%s", log)
	}

	// From the next boot on its lease is a short one.
	const leaseSeconds = 60
	err = st.Govern(t.Context(), func(d *policy.Document) (*policy.Document, error) {
		return d.AllowApp(policy.App{AppID: appID, LeaseSeconds: leaseSeconds})
	})
	if err != nil {
		t.Fatal(err)
	}
	old, err := lock.Read(lockFile)
	if err != nil {
		t.Fatal(err)
	}
	oldFile := filepath.Join(s.dir, "old.json")
	if err := lock.Write(oldFile, old); err != nil {
		t.Fatal(err)
	}
	dstack(t, "resize", "sealed", "--disk", "5").must(t)
	dstack(t, "resize", "sealed", "--disk", "3").refused(t, "disk_shrink")
	s.run("upgrade", "sealed", "--script-init", s.file("gate.sh", goodScript+"echo again\n")).must(t)
	if got := s.get("get", "name", "note"); got != "kept" {
		t.Errorf("the volume has %q", got)
	}
	if n := starts(); n != 2 {
		t.Errorf("the app started %d times; it was to start at the first and third boot", n)
	}
	if got := s.get("env", "name", "SECRET"); got != second {
		t.Errorf("the app has the secret %q", got)
	}
	if log := console(t, s.ID); !strings.Contains(log, "new: false, grown: true") {
		t.Errorf("the disk did not grow:\n%s", log)
	}
	v, exit := verify(t, s.AttestURL, "--lock", lockFile, "--dev-roots", shared.devRoots(), "--policy", accept)
	if !v.Accepted || exit != 0 || slices.Contains(v.codes("info"), "storage_new") {
		t.Errorf("%+v", v)
	}
	// The lock of the first deployment is for another manifest of the same app.
	v, exit = verify(t, s.AttestURL, "--lock", oldFile, "--dev-roots", shared.devRoots(), "--policy", accept)
	wantRefused(t, v, exit, "compose_hash_mismatch")
	t.Run("ThePublicName", s.public)
	t.Run("TestThreat_G05_RevokedAppLosesLeaseAndKeys", func(t *testing.T) { s.revoked(2 * leaseSeconds * time.Second) })
}

// revoked revokes the app: what runs loses its lease, and gets no new keys; its data and
// its containers stay; and its next boot is refused with the reason.
func (s *sealedApp) revoked(patience time.Duration) {
	t := s.t
	if got := s.get("key", "path", "web/session"); !strings.Contains(got, `"key":"`) {
		t.Fatalf("before it is revoked: %s", got)
	}
	if r := dstack(t, "--json", "app", "ls").must(t); !strings.Contains(r.stdout, s.AppID) || !strings.Contains(r.stdout, s.ComposeHash) {
		t.Errorf("the app is not listed:\n%s", r.stdout)
	}
	if r := dstack(t, "kms", "status").must(t); !strings.Contains(r.stdout, "development trust") {
		t.Errorf("status:\n%s", r.stdout)
	}
	dstack(t, "app", "freeze", "sealed").refused(t, "confirm")
	dstack(t, "app", "revoke", "nobody", "--reason", "x").refused(t, "app_unknown")
	dstack(t, "kms", "policy", "--submit").must(t)
	copied := filepath.Join(s.dir, "witness")
	dstack(t, "kms", "log", "--copy", copied).must(t)
	dstack(t, "app", "revoke", "sealed", "--reason", "it leaks canaries").must(t)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Second) {
		got := s.get("key", "path", "web/session")
		if strings.Contains(got, "lease_lost") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it still gets keys: %s\n%s", got, console(t, s.ID))
		}
	}
	if got := s.get("get", "name", "note"); got != "kept" {
		t.Errorf("the container that goes on has %q", got)
	}
	// The route was until the lease's end, and nobody renews it.
	for client, deadline := gatewayClient(t), time.Now().Add(patience); ; time.Sleep(time.Second) {
		if _, err := client.Get(s.URLs[0]); err != nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a revoked app is reached by its public name still")
		}
	}
	dstack(t, "stop", "sealed").must(t)
	r := dstack(t, "start", "sealed")
	r.refused(t, "kms_denied")
	if !strings.Contains(r.stderr, "it leaks canaries") {
		t.Errorf("the refusal does not say why:\n%s", r.stderr)
	}
	log := dstack(t, "--json", "kms", "log", "--copy", copied).must(t) // it continues what was copied
	for _, want := range []string{`"kind": "grant"`, `"purpose": "renewal"`, `"kind": "refusal"`, "compose_hash_revoked"} {
		if !strings.Contains(log.stdout, want) {
			t.Errorf("the release log has no %s", want)
		}
	}
}

// egress asks the app for what listens on this machine: 10.0.2.2 is its loopback.
func (s *sealedApp) egress(t *testing.T) {
	if got := vmInfo(t, s.ID).Interfaces[0].Egress; got != "filtered" {
		if os.Getuid() != 0 {
			t.Skip("SKIP: the VMM filters what guests send as root only")
		}
		t.Fatalf("egress is %q", got)
	}
	listen := func(addr string) (port string, came func() bool) {
		t.Helper()
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		_, port, err = net.SplitHostPort(l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return port, func() bool {
			_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(300 * time.Millisecond))
			c, err := l.Accept()
			if err == nil {
				c.Close()
			}
			return err == nil
		}
	}
	allowed, came := listen(fmt.Sprintf("127.0.0.1:%d", shared.reached))
	if got := s.get("dial", "addr", net.JoinHostPort(stack.GuestHost, allowed)); got != "reached" || !came() {
		t.Errorf("what the stack allows: %s", got)
	}
	port, came := listen("0.0.0.0:0")
	for _, host := range append(ownAddresses(t), stack.GuestHost) {
		if got := s.get("dial", "addr", net.JoinHostPort(host, port)); got == "reached" || came() {
			t.Errorf("%s, where anything listens: %s", host, got)
		}
	}
	if got := s.get("dial", "addr", "169.254.169.254:80"); got == "reached" || strings.Contains(got, "timeout") {
		t.Errorf("metadata: %s", got)
	}
	if got := s.get("env", "name", "COUNT_AS"); got != "web-starts" {
		t.Errorf("the app says %q", got)
	}
}

// ownAddresses are those of this machine's interfaces, IPv4.
func ownAddresses(t *testing.T) (out []string) {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			out = append(out, n.IP.String())
		}
	}
	return out
}
