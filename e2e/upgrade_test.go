// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/manifest/lock"
)

// An upgrade in place: another compose file on a larger disk, the same app; the new
// lock is what verifies it, and the old one no longer does.
func TestUpgradeInPlace(t *testing.T) {
	hello := helloApp(t) // builds the app's image and stores it
	dir := t.TempDir()
	binary := filepath.Join(filepath.Dir(shared.bin), "hello")
	compose := func(greeting string) string {
		path := filepath.Join(dir, "docker-compose.yaml")
		text := fmt.Sprintf("services:\n  web:\n    image: hello:1\n    environment:\n      GREETING: %s\n    ports:\n      - \"8080:80\"\n", greeting)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	answer := func(want string) {
		t.Helper()
		body := ""
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
			if body, err = get(fmt.Sprintf("http://127.0.0.1:%d/", port)); err == nil && strings.Contains(body, want) {
				return
			}
		}
		t.Fatalf("the app says %q (%v), want %q", body, err, want)
	}
	dstack(t, "deploy", "-c", compose("the first"), "-n", "upgraded", "--image", shared.image, "--port", fmt.Sprintf("%d:8080", port), "--app-image", "hello:1="+binary).must(t)
	t.Cleanup(func() { dstack(t, "rm", "--force", "upgraded") })
	answer("the first")
	lockFile := filepath.Join(dir, "dstack.lock.json")
	before, err := lock.Read(lockFile)
	if err != nil {
		t.Fatal(err)
	}
	old := filepath.Join(dir, "old.json")
	if err := lock.Write(old, before); err != nil {
		t.Fatal(err)
	}

	dstack(t, "resize", "upgraded", "--disk", "11").must(t)
	dstack(t, "resize", "upgraded", "--disk", "9").refused(t, "disk_shrink")
	dstack(t, "upgrade", "upgraded", "-c", compose("bad"), "--lock", hello.Lock).refused(t, "lock_foreign")
	var out deployed
	r := dstack(t, "--json", "upgrade", "upgraded", "-c", compose("the second")).must(t)
	if err := json.Unmarshal([]byte(r.stdout), &out); err != nil {
		t.Fatal(err)
	}
	answer("the second")
	after, err := lock.Read(lockFile)
	if err != nil || after.AppID != before.AppID || after.ComposeHash == before.ComposeHash {
		t.Fatalf("%+v, was %+v, %v", after, before, err)
	}
	if v, exit := verify(t, out.AttestURL, "--lock", lockFile, "--dev-roots", shared.devRoots()); !v.Accepted || exit != 0 {
		again := dstack(t, "verify", out.AttestURL, "--lock", lockFile, "--dev-roots", shared.devRoots())
		t.Fatalf("exit %d: %+v\nthen %d:\n%s%s\n%s", exit, v, again.code, again.stdout, again.stderr, console(t, out.ID))
	}
	v, exit := verify(t, out.AttestURL, "--lock", old, "--dev-roots", shared.devRoots())
	wantRefused(t, v, exit, "compose_hash_mismatch")
	if info := vmInfo(t, out.ID); info.AppId != before.AppID.String() || info.Configuration.DiskSize != 11 {
		t.Errorf("%s, %d GiB", info.AppId, info.Configuration.DiskSize)
	}
}
