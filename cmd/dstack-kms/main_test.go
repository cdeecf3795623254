// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/releaselog"
)

// build makes the program, with the tags given.
func build(t *testing.T, tags ...string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "dstack-kms")
	args := []string{"build", "-trimpath", "-buildvcs=false", "-tags", strings.Join(tags, ","), "-o", bin, "."}
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return bin
}

// The same configuration, given to both builds: what is for development exists in one.
func TestThreat_G08_TheReleasedProgramHasNoDevelopmentTrust(t *testing.T) {
	if testing.Short() {
		t.Skip("builds programs")
	}
	release, dev := build(t), build(t, "dstack_sim")
	roots, err := tdxtest.New(t).DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	rootsFile := filepath.Join(t.TempDir(), "roots.json")
	if err := os.WriteFile(rootsFile, roots, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(bin string, env ...string) (string, error) {
		dir := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, bin)
		cmd.Env = append([]string{
			"DSTACK_KMS_CORE__DOMAIN=kms.test", "DSTACK_KMS_CORE__DATA_DIR=" + dir, "DSTACK_KMS_RPC__ADDRESS=127.0.0.1", "DSTACK_KMS_RPC__PORT=0",
			"DSTACK_KMS_CORE__AUTH_API__POLICY__KEYS=" + strings.Repeat("01", 32), "DSTACK_KMS_CORE__AUTH_API__POLICY__THRESHOLD=1",
		}, env...)
		out, err := cmd.CombinedOutput()
		if names, _ := filepath.Glob(filepath.Join(dir, "root*")); len(names) > 0 {
			t.Errorf("it made keys: %s", names)
		}
		return string(out), err
	}
	noSocket, devRoots := "DSTACK_KMS_CORE__GUEST__SOCKET=", "DSTACK_KMS_CORE__ATTESTATION__DEV_ROOTS="+rootsFile
	for _, c := range []struct {
		name     string
		env      []string
		released string // code of the released program
		built    string // code of the program for development
	}{
		// What it is told no way to its keys proves that it came that far.
		{"development roots", []string{noSocket, devRoots}, "development_refused", "onboard_absent"},
		{"no guest agent", []string{noSocket}, "development_refused", "onboard_absent"},
		{"an authority that allows all", []string{noSocket, "DSTACK_KMS_CORE__AUTH_API__TYPE=dev"}, "kms_config", "kms_config"},
		{"no authorisation of itself", []string{"DSTACK_KMS_CORE__ENFORCE_SELF_AUTHORIZATION=false"}, "config_unknown_key", "config_unknown_key"},
		{"no attestation in its certificate", []string{"DSTACK_KMS_CORE__ATTEST_RPC_CERT=false"}, "config_unknown_key", "config_unknown_key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for bin, code := range map[string]string{release: c.released, dev: c.built} {
				out, err := run(bin, c.env...)
				var exit *exec.ExitError
				if !asExit(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, "code: "+code+"\n") {
					t.Errorf("want %s, got %v\n%s", code, err, out)
				}
			}
		})
	}
	for bin, want := range map[string]string{release: "built for production", dev: "built for development"} {
		if out, err := exec.Command(bin, "version").CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("version: %v %s", err, out)
		}
	}
	// What reads development roots is not in the released program at all.
	for bin, want := range map[string]bool{release: false, dev: true} {
		text, err := os.ReadFile(bin)
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(text, []byte("/verifier.DevelopmentRoots")); got != want {
			t.Errorf("%s has DevelopmentRoots: %v, want %v", bin, got, want)
		}
	}
}

func asExit(err error, to **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	*to = e
	return ok
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("want %s, got %q: %v", code, fault.Code(err), err)
	}
}

// capture returns what a command prints.
func capture(t *testing.T, run func() error) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	was := os.Stdout
	os.Stdout = w
	err = run()
	os.Stdout = was
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := out.ReadFrom(r); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// A KMS is lost, and its operators bring its keys back.
func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	n, err := onboard.Open(t.Context(), at("kms"), func() (*custody.Roots, error) { return custody.Generate(rand.Reader) }, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Begin(t.Context(), ""); err != nil {
		t.Fatal(err)
	}
	roots, err := custody.Open(onboard.RootFile(at("kms")))
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	id := roots.Identity()
	var operators []string
	for _, name := range []string{"ann", "bob", "eve"} {
		capture(t, (&operatorKeyCmd{Name: name, Output: at(name)}).Run)
		operators = append(operators, at(name+".pub"))
		if info, err := os.Stat(at(name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the key of %s: %v %v", name, info.Mode(), err)
		}
	}
	wantCode(t, (&operatorKeyCmd{Name: "ann", Output: at("ann")}).Run(), "operator_key_exists")
	wantCode(t, (&operatorKeyCmd{Name: "not a name", Output: at("new")}).Run(), "operator_malformed")
	if _, err := os.Stat(at("new")); err == nil {
		t.Error("a key was made for a name that is none")
	}

	seal := backupCmd{Data: at("kms"), Operator: operators, Threshold: 2, Output: at("backup")}
	// Not beside a KMS that serves.
	log, err := releaselog.Open(onboard.LogDir(at("kms")), id.CA)
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, seal.Run(), "release_log_locked")
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	out := capture(t, seal.Run)
	if !strings.Contains(out, hex.EncodeToString(id.CA)) {
		t.Errorf("it says %q", out)
	}
	wantCode(t, seal.Run(), "file_write") // the one that is there stays
	bad := seal
	bad.Threshold = 4
	wantCode(t, bad.Run(), "backup_quorum")
	bad = seal
	bad.Operator = append(bad.Operator, operators[0])
	wantCode(t, bad.Run(), "backup_quorum")
	bad = seal
	bad.Data = at("none")
	wantCode(t, bad.Run(), "root_missing")
	bad.Data, bad.Operator = at("kms"), []string{at("ann")} // the private key
	wantCode(t, bad.Run(), "operator_malformed")
	if log, err = releaselog.Open(onboard.LogDir(at("kms")), id.CA); err != nil {
		t.Fatal(err)
	}
	raw, _, err := log.Entries(0, 10)
	if err != nil || len(raw) == 0 || !bytes.Contains(raw[0], []byte("backup")) || !bytes.Contains(raw[0], []byte("ann bob eve")) {
		t.Errorf("the log: %q %v", raw, err)
	}
	log.Close()

	var shares []string
	for _, name := range []string{"ann", "eve"} {
		text := capture(t, (&shareCmd{Backup: at("backup"), Key: at(name)}).Run)
		capture(t, (&shareCmd{Backup: at("backup"), Key: at(name), Output: at(name + ".share")}).Run)
		if b, err := os.ReadFile(at(name + ".share")); err != nil || string(b) != text {
			t.Errorf("the share in a file: %v", err)
		}
		shares = append(shares, at(name+".share"))
	}
	restore := restoreCmd{Data: at("new-kms"), Backup: at("backup"), Share: shares, RootCA: hex.EncodeToString(id.CA)}
	few := restore
	few.Share = shares[:1]
	wantCode(t, few.Run(), "share_too_few")
	twice := restore
	twice.Share = []string{shares[0], shares[0]}
	wantCode(t, twice.Run(), "share_duplicate")
	other := restore
	other.RootCA = strings.Repeat("00", len(id.CA))
	wantCode(t, other.Run(), "root_mismatch")
	other.RootCA = "no digits"
	wantCode(t, other.Run(), "root_mismatch")
	if err := errors.Join(os.WriteFile(at("open.share"), nil, 0o644), os.Chmod(at("open.share"), 0o644)); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	open := restore
	open.Share = []string{at("open.share")}
	wantCode(t, open.Run(), "share_mode")
	over := restore
	over.Data = at("kms")
	wantCode(t, over.Run(), "already_bootstrapped")
	if _, err := os.Stat(onboard.RootFile(at("new-kms"))); err == nil {
		t.Fatal("a refusal left root keys")
	}
	for range 2 { // again after it was done, as after a crash: it changes nothing
		capture(t, restore.Run)
	}
	restored, err := custody.Open(onboard.RootFile(at("new-kms")))
	if err != nil {
		t.Fatal(err)
	}
	defer restored.Wipe()
	if !restored.Identity().Equal(id) || restored.Provenance().Kind != custody.Restored {
		t.Errorf("restored as %+v", restored.Provenance())
	}
	if log, err = releaselog.Open(onboard.LogDir(at("new-kms")), id.CA); err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	raw, _, err = log.Entries(0, 10)
	if err != nil || len(raw) != 1 || !bytes.Contains(raw[0], []byte("restored")) {
		t.Errorf("its log: %q %v", raw, err)
	}
	for _, name := range []string{"backup", "ann.share"} {
		if info, err := os.Stat(at(name)); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v", name, fmt.Sprint(info.Mode(), err))
		}
	}
}
