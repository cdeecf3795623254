// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack/guest/boot/supervise"
	"github.com/dstack-go/dstack/internal/fault"
)

// fakeEngine answers the Engine API on a unix socket.
type fakeEngine struct {
	mu    sync.Mutex
	calls []string
	names map[string]string // reference -> image id
	// store is what a pull of a digest puts into the image store.
	store func(digest string) string
}

func newFake(t *testing.T) (*fakeEngine, *Client) {
	t.Helper()
	f := &fakeEngine{names: map[string]string{}, store: func(d string) string { return d }}
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: f}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return f, NewClient(socket)
}

func (f *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path, ok := strings.CutPrefix(r.URL.Path, "/"+apiVersion)
	f.calls = append(f.calls, strings.TrimSuffix(r.Method+" "+path+"?"+r.URL.RawQuery, "?"))
	refuse := func(status int, text string) {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(map[string]string{"message": text})
	}
	image, isImage := strings.CutPrefix(path, "/images/")
	switch {
	case !ok:
		refuse(400, "no version in "+r.URL.Path)
	case path == "/_ping":
		io.WriteString(w, "OK")
	case path == "/images/create":
		ref := r.URL.Query().Get("fromImage")
		_, digest, _ := strings.Cut(ref, "@")
		if digest == digestOf("missing") {
			io.WriteString(w, `{"status":"Pulling from app"}`+"\r\n"+`{"error":"manifest unknown"}`+"\r\n")
			return
		}
		f.names[ref] = f.store(digest)
		io.WriteString(w, `{"status":"Pulling fs layer","id":"abc"}`+"\n"+`{"status":"done"}`+"\n")
	case isImage && strings.HasSuffix(image, "/json"):
		id, ok := f.names[strings.TrimSuffix(image, "/json")]
		if !ok {
			refuse(404, "No such image")
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"Id": id})
	case isImage && strings.HasSuffix(image, "/tag"):
		q := r.URL.Query()
		f.names[q.Get("repo")+":"+q.Get("tag")] = f.names[strings.TrimSuffix(image, "/tag")]
		w.WriteHeader(201)
	case path == "/containers/json":
		io.WriteString(w, `[{"Id":"c1","Names":["/dstack-web-1"],"State":"running","Created":7}]`)
	case path == "/containers/c1/update":
		io.WriteString(w, `{"Warnings":null}`)
	case path == "/containers/c1/logs":
		w.Write([]byte("\x01\x00\x00\x00\x00\x00\x00\x04out\n\x02\x00\x00\x00\x00\x00\x00\x04err\n"))
	default:
		refuse(500, "no such call")
	}
}

func digestOf(seed string) string {
	return "sha256:" + strings.Repeat(fmt.Sprintf("%02x", seed[0]), 32)
}

func TestClient(t *testing.T) {
	_, c := newFake(t)
	ctx := context.Background()
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	list, err := c.Containers(ctx)
	if err != nil || len(list) != 1 || list[0].ID != "c1" || list[0].Created != 7 {
		t.Fatalf("containers %+v, %v", list, err)
	}
	text, err := c.Logs(ctx, "c1", 10, 1000)
	if err != nil || text != "out\nerr\n" {
		t.Fatalf("logs %q, %v", text, err)
	}
	if _, err := c.Image(ctx, "nothing:1"); !NotFound(err) || !strings.Contains(err.Error(), "No such image") {
		t.Fatalf("error %v", err)
	}
	var lines []string
	if err := c.Pull(ctx, "r/app@"+digestOf("a"), func(l string) { lines = append(lines, l) }); err != nil || len(lines) != 2 {
		t.Fatalf("pull %v, %q", err, lines)
	}
}

func TestPullLockedNamesWhatItChecked(t *testing.T) {
	f, c := newFake(t)
	lock := map[string]string{
		"hello:1": digestOf("a"), "localhost:5000/x/y": digestOf("b"), "db@" + digestOf("c"): digestOf("c"),
		"web:2@" + digestOf("a"): digestOf("a"), "alias": digestOf("a"),
	}
	if err := PullLocked(context.Background(), c, "127.0.0.1:5000", lock, nil); err != nil {
		t.Fatal(err)
	}
	for ref := range f.names {
		if strings.HasPrefix(ref, "127.0.0.1:5000/app@") {
			delete(f.names, ref)
		}
	}
	want := map[string]string{
		"hello:1": digestOf("a"), "localhost:5000/x/y:latest": digestOf("b"), "db:" + lockedTag: digestOf("c"),
		"web:2": digestOf("a"), "alias:latest": digestOf("a"),
	}
	if !maps.Equal(f.names, want) {
		t.Errorf("names %v, want %v", f.names, want)
	}
	pulls := 0
	for _, call := range f.calls {
		if strings.HasPrefix(call, "POST /images/create") {
			pulls++
		}
	}
	if pulls != 3 {
		t.Errorf("%d pulls for 3 digests", pulls)
	}
}

func TestThreat_J01_PullLockedRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		lock  map[string]string
		store func(string) string
		code  string
	}{
		"an image that the host does not have":       {map[string]string{"a:1": digestOf("missing")}, nil, "image_pull"},
		"an image store with another digest":         {map[string]string{"a:1": digestOf("a")}, func(string) string { return digestOf("b") }, "image_digest_mismatch"},
		"a reference whose digest is not the lock's": {map[string]string{"a@" + digestOf("b"): digestOf("a")}, nil, "image_digest_mismatch"},
		"a reference without a name":                 {map[string]string{":1": digestOf("a")}, nil, "image_reference"},
	} {
		t.Run(name, func(t *testing.T) {
			f, client := newFake(t)
			if c.store != nil {
				f.store = c.store
			}
			err := PullLocked(context.Background(), client, "127.0.0.1:5000", c.lock, nil)
			if fault.Code(err) != c.code {
				t.Fatalf("error %v, want code %s", err, c.code)
			}
		})
	}
}

// hostRegistry stands for the host's end of the registry stream.
func hostRegistry(t *testing.T, h http.HandlerFunc) func(context.Context) (net.Conn, error) {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", s.Listener.Addr().String())
	}
}

func TestRegistryIsReadOnlyAndNarrow(t *testing.T) {
	var mu sync.Mutex
	var seen []string
	dial := hostRegistry(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Method+" "+r.URL.Path)
		for _, secret := range []string{"Authorization", "Cookie", "User-Agent", "X-Forwarded-For"} {
			if v := r.Header.Get(secret); v != "" {
				t.Errorf("the host was told %s: %s", secret, v)
			}
		}
		switch {
		case strings.HasSuffix(r.URL.Path, "redirect"):
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusTemporaryRedirect)
		case strings.HasSuffix(r.URL.Path, "login"):
			w.WriteHeader(http.StatusUnauthorized)
		default:
			io.WriteString(w, "blob")
		}
	})
	r, err := ServeRegistry("127.0.0.1:0", dial)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, c := range []struct {
		method, path string
		status       int
	}{
		{"GET", "/v2/", 200}, {"GET", "/v2/app/blobs/x", 200}, {"HEAD", "/v2/app/manifests/x", 200},
		{"POST", "/v2/app/blobs/uploads/", 405}, {"PUT", "/v2/app/manifests/x", 405}, {"DELETE", "/v2/app/blobs/x", 405},
		{"GET", "/", 404}, {"GET", "/api/Notify", 404}, {"GET", "/v2/other/blobs/x", 404}, {"GET", "/v2/app/../../api/Notify", 404},
		{"GET", "/v2/app/redirect", 502}, {"GET", "/v2/app/login", 502},
	} {
		req, err := http.NewRequest(c.method, "http://"+r.Addr+c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer secret")
		req.Header.Set("Cookie", "a=b")
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: %s, want %d", c.method, c.path, resp.Status, c.status)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	want := []string{"GET /v2/", "GET /v2/app/blobs/x", "HEAD /v2/app/manifests/x", "GET /v2/app/redirect", "GET /v2/app/login"}
	if !slices.Equal(seen, want) {
		t.Errorf("the host saw %q", seen)
	}
}

func TestRegistryWithoutHost(t *testing.T) {
	r, err := ServeRegistry("127.0.0.1:0", func(context.Context) (net.Conn, error) { return nil, errors.New("no hostlink") })
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	resp, err := http.Get("http://" + r.Addr + "/v2/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusBadGateway || !strings.Contains(string(body), "no hostlink") {
		t.Fatalf("%s %s", resp.Status, body)
	}
}

// fakeRunner notes commands and fails as told.
type fakeRunner struct {
	commands []supervise.Command
	errs     []error
}

func (f *fakeRunner) Run(_ context.Context, c supervise.Command) error {
	f.commands = append(f.commands, c)
	if n := len(f.commands); n <= len(f.errs) {
		return f.errs[n-1]
	}
	return nil
}

func TestComposeUp(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dstack")
	run := &fakeRunner{errs: []error{errors.New("exit 1: port is busy")}}
	var reports []string
	c := &Compose{Config: Default(), Dir: dir, Runner: run, NeverPull: true, Retries: []time.Duration{time.Millisecond},
		Report: func(n int, err error, wait time.Duration) { reports = append(reports, fmt.Sprint(n, err, wait)) }}
	const text = "services: {}\n# with odd bytes: \x00é\r\n"
	if err := c.Write(text); err != nil {
		t.Fatal(err)
	}
	if err := c.Up(context.Background()); err != nil {
		t.Fatal(err)
	}
	if len(reports) != 1 || !strings.Contains(reports[0], "port is busy") {
		t.Errorf("reports %q", reports)
	}
	if len(run.commands) != 2 {
		t.Fatalf("%d attempts", len(run.commands))
	}
	cmd := run.commands[0]
	line := strings.Join(cmd.Args, " ")
	if cmd.Path != "/usr/bin/docker-compose" || !strings.Contains(line, "up -d --remove-orphans") || !strings.HasSuffix(line, "--pull never --no-build") || cmd.Dir != dir {
		t.Errorf("command %s %q in %s", cmd.Path, line, cmd.Dir)
	}
	if !slices.Contains(cmd.Env, "DOCKER_HOST=unix:///run/docker.sock") {
		t.Errorf("environment %q", cmd.Env)
	}
	if data, err := readFile(c.File()); err != nil || data != text {
		t.Errorf("compose file %q, %v", data, err)
	}
}

func TestComposeUpGivesUp(t *testing.T) {
	why := errors.New("exit 1: unhealthy")
	for name, c := range map[string]struct {
		errs     []error
		attempts int
	}{
		"after its retries":           {[]error{why, why, why, why}, 3},
		"at once for a missing image": {[]error{errors.New("exit 1: Error response from daemon: No such image: x:1")}, 1},
		"at once for a bad file":      {[]error{errors.New("exit 15: yaml: line 3: could not find expected ':'")}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			run := &fakeRunner{errs: c.errs}
			err := (&Compose{Config: Default(), Dir: t.TempDir(), Runner: run, Retries: []time.Duration{1, 1}}).Up(context.Background())
			if fault.Code(err) != "compose_failed" || !errors.Is(err, c.errs[0]) || len(run.commands) != c.attempts {
				t.Fatalf("error %v after %d attempts", err, len(run.commands))
			}
		})
	}
}

// The daemon's configuration: what must not change by accident.
func TestDaemonConfiguration(t *testing.T) {
	text, err := Default().dockerdConfig()
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{
		"hosts": "[unix:///run/docker.sock]", "firewall-backend": "nftables", "userland-proxy": "false", "live-restore": "false",
		"default-runtime": "crun", "log-driver": "local", "features": "map[containerd-snapshotter:true embedded-containerd:true]", "data-root": "/var/lib/docker",
	} {
		if fmt.Sprint(got[key]) != want {
			t.Errorf("%s is %v, want %s", key, got[key], want)
		}
	}
	c := Default()
	c.GCPercent, c.Nosync = 400, true
	want := []string{"PATH=/usr/bin:/usr/sbin:/sbin:/bin", "HOME=/run/engine", "TMPDIR=/tmp", "GOGC=400", "DOCKER_CONTAINERD_ROOT=/var/lib/containerd", "ENGINE_NOSYNC=1"}
	if env := c.daemonEnv(); !slices.Equal(env, want) {
		t.Errorf("the daemon gets %q, want %q", env, want)
	}
	if env := Default().daemonEnv(); slices.Contains(env, "ENGINE_NOSYNC=1") {
		t.Errorf("without being told, the daemon syncs nothing: %q", env)
	}
}

func readFile(path string) (string, error) {
	data, err := os.ReadFile(path)
	return string(data), err
}
