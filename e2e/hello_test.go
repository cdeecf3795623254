// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/testkit"
)

func TestAppAnswersFromInsideTheVM(t *testing.T) {
	app := helloApp(t)
	body, err := get(app.httpURL)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(body, "hello from a confidential VM") {
		t.Fatalf("body %q", body)
	}
}

func TestVerdictIsAcceptedAndSaysDevelopment(t *testing.T) {
	app := helloApp(t)
	v, exit := verify(t, app.AttestURL, "--lock", app.Lock, "--dev-roots", shared.devRoots())
	if !v.Accepted || exit != 0 {
		t.Fatalf("exit %d: %+v", exit, v)
	}
	if v.Trust != "development" {
		t.Fatalf("trust %q", v.Trust)
	}
	text := dstack(t, "verify", app.AttestURL, "--lock", app.Lock, "--dev-roots", shared.devRoots()).must(t).stdout
	if first, _, _ := strings.Cut(text, "\n"); first != "trust: development" {
		t.Fatalf("first line %q", first)
	}
	for _, warning := range []string{"time_host", "firmware_distribution"} {
		if !slices.Contains(v.codes("warning"), warning) {
			t.Errorf("no warning %s in %v", warning, v.codes("warning"))
		}
	}
	// The ACPI digests are computed for the VM's shape, not taken from the log.
	if slices.Contains(v.codes("warning"), "acpi_not_checked") {
		t.Errorf("the ACPI tables were not compared: %v", v.codes("warning"))
	}
}

func TestVerdictOverPlainHTTPSaysTheChannelIsUnbound(t *testing.T) {
	app := helloApp(t)
	url := strings.Replace(app.AttestURL, "https://", "http://", 1)
	v, exit := verify(t, url, "--lock", app.Lock, "--dev-roots", shared.devRoots())
	if !v.Accepted || exit != 0 || !slices.Contains(v.codes("warning"), "channel_unbound") {
		t.Fatalf("exit %d: %+v", exit, v)
	}
}

func TestVerdictRefuses(t *testing.T) {
	app := helloApp(t)
	dir := t.TempDir()
	saved := filepath.Join(dir, "evidence.json")
	dstack(t, "verify", app.AttestURL, "--lock", app.Lock, "--dev-roots", shared.devRoots(), "--save", saved).must(t)
	other := strings.Repeat("ab", 32)
	otherRoots := filepath.Join(dir, "pki")
	if out, err := command(filepath.Join(shared.bin, "dstack-simtee"), "pki", "--out", otherRoots); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, c := range []struct {
		name, code string
		args       []string
	}{
		{"another compose hash", "compose_hash_mismatch", []string{app.AttestURL, "--compose-hash", other, "--dev-roots", shared.devRoots()}},
		{"another app id", "app_id_mismatch", []string{app.AttestURL, "--lock", app.Lock, "--app-id", other[:40], "--dev-roots", shared.devRoots()}},
		{"another image", "image_hash_mismatch", []string{app.AttestURL, "--lock", app.Lock, "--os-image-hash", other, "--dev-roots", shared.devRoots()}},
		{"evidence replayed for another nonce", "nonce_mismatch", []string{saved, "--lock", app.Lock, "--nonce", other, "--dev-roots", shared.devRoots()}},
		{"no roots given", "unknown_root", []string{app.AttestURL, "--lock", app.Lock}},
		{"roots of another installation", "unknown_root", []string{app.AttestURL, "--lock", app.Lock, "--dev-roots", filepath.Join(otherRoots, "dev-roots.json")}},
		{"no workload given", "workload_not_specified", []string{app.AttestURL, "--dev-roots", shared.devRoots()}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, exit := verify(t, c.args...)
			wantRefused(t, v, exit, c.code)
		})
	}
}

// The order in which a VM really boots is the list of guest/boot, read from the
// console.
func TestBootOrderEqualsTheList(t *testing.T) {
	app := helloApp(t)
	log := console(t, app.ID)
	var got []string
	for _, m := range regexp.MustCompile(`dstack: phase (\S+) ok`).FindAllStringSubmatch(log, -1) {
		got = append(got, m[1])
	}
	data, err := os.ReadFile(filepath.Join(testkit.Root(), "guest", "boot", "testdata", "phases.txt"))
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(string(data))
	if !slices.Equal(got, want) {
		t.Fatalf("booted in the order\n%v\nwant\n%v", got, want)
	}
}

// The evidence's event log holds the events of attestation.md §3.5 in their order.
func TestEventOrder(t *testing.T) {
	app := helloApp(t)
	saved := filepath.Join(t.TempDir(), "evidence.json")
	dstack(t, "verify", app.AttestURL, "--lock", app.Lock, "--dev-roots", shared.devRoots(), "--save", saved).must(t)
	got := runtimeEvents(t, saved)
	want := []string{"system-preparing", "app-id", "compose-hash", "gpu-policy-hash", "instance-id", "boot-mr-done",
		"key-provider", "storage-fs", "system-channel-key", "system-ready"}
	if !slices.Equal(got, want) {
		t.Fatalf("events %v, want %v", got, want)
	}
}

func TestPsAndInfoNameTheApp(t *testing.T) {
	app := helloApp(t)
	var rows []struct{ ID, Name, Status string }
	if err := json.Unmarshal([]byte(dstack(t, "--json", "ps").must(t).stdout), &rows); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, r := range rows {
		found = found || r.ID == app.ID && r.Name == "hello" && r.Status == "running"
	}
	if !found {
		t.Fatalf("rows %+v", rows)
	}
	if out := dstack(t, "info", "hello").must(t).stdout; !strings.Contains(out, app.AppID) {
		t.Fatalf("info:\n%s", out)
	}
}

// The VMM may come and go; the VM and its TEE's registers stay.
func TestVMMRestartLeavesTheVMAlone(t *testing.T) {
	app := helloApp(t)
	killVMM(t)
	if _, err := get(app.httpURL); err != nil {
		t.Fatalf("the app stopped with the VMM: %v", err)
	}
	dstack(t, "up", "--image", shared.imageDir()).must(t)
	deadline := time.Now().Add(30 * time.Second)
	for {
		v, exit := verifyQuietly(t, app.AttestURL, "--lock", app.Lock, "--dev-roots", shared.devRoots())
		if exit == 0 && v.Accepted {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after the VMM's restart: exit %d %+v", exit, v)
		}
		time.Sleep(500 * time.Millisecond)
	}
	if info := vmInfo(t, app.ID); info.Status != "running" {
		t.Fatalf("status %s", info.Status)
	}
}
