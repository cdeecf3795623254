// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	dstackid "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/keys/envelope"
	"github.com/dstack-go/dstack/keys/signer"
)

// The host gives an instance an older environment that its deployer once signed for
// the very same manifest, and then one of its own: the boot stops, and the first is
// taken again (threats.md J03).
func TestSoakStaleEnvironment(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("SKIP: four boots; run with make soak")
	}
	helloApp(t) // builds the app's image
	kms, err := kmstest.Start(kmstest.Options{Addr: fmt.Sprintf("127.0.0.1:%d", shared.reached), Names: []string{"127.0.0.1", "10.0.2.2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kms.Close() })
	dir := t.TempDir()
	compose := filepath.Join(dir, "docker-compose.yaml")
	text := "services:\n  web:\n    image: hello:1\n    environment:\n      GREETING: ${GREETING}\n    ports: [\"8080:80\"]\n"
	env := filepath.Join(dir, "env")
	for path, data := range map[string]string{compose: text, env: "GREETING=the present one\n"} {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	_, kmsPort, _ := strings.Cut(strings.TrimPrefix(kms.URL, "https://"), ":")
	r := dstack(t, "--json", "deploy", "-c", compose, "-n", "stale", "--image", shared.image, "--port", fmt.Sprintf("%d:8080", port),
		"--app-image", "hello:1="+filepath.Join(filepath.Dir(shared.bin), "hello"), "--key-provider", "kms", "--kms-id", hex.EncodeToString(kms.SPKI()),
		"--kms", "https://127.0.0.1:"+kmsPort, "--kms", "https://10.0.2.2:"+kmsPort, "--env-file", env).must(t)
	t.Cleanup(func() { dstack(t, "rm", "--force", "stale") })
	var app deployed
	if err := json.Unmarshal([]byte(r.stdout), &app); err != nil {
		t.Fatal(err)
	}
	dstack(t, "stop", "stale").must(t)

	appID, err := dstackid.ParseAppID(app.AppID)
	if err != nil {
		t.Fatal(err)
	}
	var compHash dstackid.ComposeHash
	if err := compHash.UnmarshalText([]byte(app.ComposeHash)); err != nil {
		t.Fatal(err)
	}
	key, err := kms.Roots().Env(appID)
	if err != nil {
		t.Fatal(err)
	}
	public, err := envelope.PublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	deployer, err := signer.Open(filepath.Join(shared.state, "deployer.key"))
	if err != nil {
		t.Fatal(err)
	}
	older, err := envelope.Seal(public, envelope.Binding{App: appID, Compose: compHash, Version: 1}, deployer, map[string]string{"GREETING": "an older one"})
	if err != nil {
		t.Fatal(err)
	}
	hosts, err := envelope.SealV1(public, map[string]string{"GREETING": "the host's"})
	if err != nil {
		t.Fatal(err)
	}
	// Where the VMM keeps it can change with each start.
	file := func() string {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(shared.state, "vms", app.ID, "shared*", hostshare.EncryptedEnvName))
		if err != nil || len(found) != 1 {
			t.Fatalf("%q, %v", found, err)
		}
		return found[0]
	}
	present, err := os.ReadFile(file())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, code string
		data       []byte
	}{{"an older one", "env_rollback", older}, {"one of the host's", "env_unsigned", hosts}, {"the present one", "", present}} {
		if err := os.WriteFile(file(), c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		r := dstack(t, "start", "stale")
		if c.code == "" {
			r.must(t)
			continue
		}
		if r.code == 0 || !strings.Contains(r.stderr, c.code) {
			t.Errorf("%s: exit %d\n%s", c.name, r.code, r.stderr)
		}
	}
}
