// SPDX-License-Identifier: Apache-2.0

package stack

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// running starts a stack without an OS image: its KMS and its VMM.
func running(t *testing.T) *Stack {
	t.Helper()
	bin := t.TempDir()
	for _, b := range [][]string{{"dstack-vmm"}, {"dstack-simtee"}, {"dstack-kms", "-tags", "dstack_sim"}} {
		name := strings.Replace(b[0], "dstack-kms", "dstack-kms-dev", 1)
		cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-buildvcs=false"}, b[1:]...), "-o", filepath.Join(bin, name), "./cmd/"+b[0])...)
		cmd.Dir = testkit.Root()
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	dir, err := os.MkdirTemp("", "st-") // sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	s := &Stack{Dir: filepath.Join(dir, "s"), Bin: bin}
	t.Cleanup(func() {
		for _, stop := range []func(time.Duration) error{s.StopKMS, s.StopVMM} {
			if err := stop(20 * time.Second); err != nil {
				t.Error(err)
			}
		}
		os.RemoveAll(dir)
	})
	if err := s.Up(t.Context(), UpOptions{TEE: "sim"}); err != nil {
		t.Fatal(err)
	}
	return s
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

// The stack's policy is its KMS's, and what does not arrive there is an error.
func TestTheStackGovernsItsKMS(t *testing.T) {
	s := running(t)
	ctx := t.Context()
	k, err := s.Keys()
	if err != nil {
		t.Fatal(err)
	}
	if len(k.Nodes) != 1 || k.Nodes[0].VM != "" || k.Policy != nil || len(k.Pin()) == 0 {
		t.Fatalf("%+v", k)
	}
	for _, path := range []string{s.governanceFile(), s.PolicyFile(), s.keysFile(), filepath.Join(s.kmsDir(), "root.keys")} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	config, err := os.ReadFile(s.ConfigFile())
	if err != nil || !strings.Contains(string(config), `kms_urls = ["https://10.0.2.2:`) {
		t.Errorf("the VMM is told of no KMS: %v\n%s", err, config)
	}
	ports, err := s.gatewayPorts()
	if want := fmt.Sprintf(`egress_allow = ["127.0.0.1:%d/tcp","127.0.0.1:%d/udp"]`, ports.RPC, ports.WG); err != nil || ports.RPC == 0 || !strings.Contains(string(config), want) {
		t.Errorf("guests do not reach the gateway, %s: %v\n%s", want, err, config)
	}
	first, err := s.Policy()
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Apps) != 0 || len(first.KMS.Allow) != 0 || first.Trust != dstack.TrustDevelopment {
		t.Errorf("a new stack allows %+v", first)
	}

	app := policy.App{AppID: dstack.AppID{1}, Name: "one", ComposeHashes: []policy.Compose{{Hash: dstack.ComposeHash{2}}}}
	if undelivered, err := s.AllowApp(ctx, app, policy.Image{Hash: dstack.ImageHash{3}, Dev: true}); err != nil || undelivered != nil {
		t.Fatal(err, undelivered)
	}
	inForce := func() *policy.Document {
		t.Helper()
		var reply kmsapi.Policy
		if err := k.Nodes[0].Call(ctx, k.Pin(), "GetPolicy", nil, &reply); err != nil {
			t.Fatal(err)
		}
		text, err := policy.Bytes(reply.Signed)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := policy.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return doc
	}
	if got := inForce(); len(got.Apps) != 1 || got.Apps[0].Name != "one" || got.Sequence <= first.Sequence {
		t.Errorf("the KMS decides by %+v", got)
	}

	// A stack that goes up again keeps its root.
	if err := s.StopKMS(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	revoke := func() error {
		return s.Govern(ctx, func(d *policy.Document) (*policy.Document, error) { return d.Revoke(app.AppID, nil, time.Now(), "why") })
	}
	wantCode(t, revoke(), "policy_undelivered")
	if _, err := s.AllowApp(ctx, policy.App{AppID: dstack.AppID{9}}, policy.Image{Hash: dstack.ImageHash{3}, Dev: true}); fault.Code(err) != "policy_undelivered" {
		t.Errorf("an app that no KMS knows of is allowed: %v", err)
	}
	if err := s.Up(ctx, UpOptions{TEE: "sim"}); err != nil {
		t.Fatal(err)
	}
	again, err := s.Keys()
	if err != nil {
		t.Fatal(err)
	}
	if again.RootCA != k.RootCA || again.Nodes[0].URL != k.Nodes[0].URL {
		t.Errorf("it came back as %+v", again)
	}
	if err := s.SubmitPolicy(ctx); err != nil {
		t.Fatal(err)
	}
	if got := inForce(); got.Apps[0].ComposeHashes[0].Revoked == nil {
		t.Errorf("the revocation did not arrive: %+v", got.Apps)
	}

	// Another root is never taken for the stack's.
	k.K256 = strings.Repeat("00", 33)
	if err := s.saveKeys(k); err != nil {
		t.Fatal(err)
	}
	_, err = s.AddNode(ctx, k.Nodes[0], time.Second)
	wantCode(t, err, "kms_root")
}

func TestAStackWithoutAKMS(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	_, err := s.Keys()
	wantCode(t, err, "kms_absent")
	_, err = s.Policy()
	wantCode(t, err, "policy_missing")
	if err := (KMSNode{Name: "x", URL: "https://127.0.0.1:1"}).Call(context.Background(), nil, "GetMeta", nil, nil); fault.Code(err) != "kms_unreachable" {
		t.Errorf("%v", err)
	}
	a, err := s.KMSPort("kms-0")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.KMSPort("kms-1")
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := s.KMSPort("kms-0"); again != a || a == b || a == 0 {
		t.Errorf("ports %d, %d, %d", a, b, again)
	}
}

func TestWhatGuestsReachIsKept(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	for _, text := range []string{"localhost:80", "0.0.0.0/0"} {
		if _, _, err := s.guestReaches([]string{text}); fault.Code(err) != "guest_reaches" {
			t.Errorf("%s: %v", text, err)
		}
	}
	first, added, err := s.guestReaches([]string{"127.0.0.1:8000/tcp"})
	if err != nil || !added || len(first) != 3 || first[0] != "127.0.0.1:8000/tcp" {
		t.Fatal(first, added, err)
	}
	again, added, err := s.guestReaches([]string{"127.0.0.1:8000/tcp"})
	if err != nil || added || !slices.Equal(first, again) {
		t.Error(again, added, err)
	}
	if g, err := s.newGateway(); err != nil || first[1] != fmt.Sprintf("127.0.0.1:%d/tcp", g.RPC) || first[2] != fmt.Sprintf("127.0.0.1:%d/udp", g.WG) {
		t.Error(g, err)
	}
}
