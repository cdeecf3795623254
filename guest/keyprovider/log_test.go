// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/guest/keyprovider/kmstest"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/releaselog"
)

var testCompose = dstack.ComposeHash(bytes.Repeat([]byte{0x22}, 32))

// logged is a KMS with a release log and leases.
func logged(t *testing.T, opt kmstest.Options) *kmstest.Server {
	if opt.RootCA == nil {
		opt.RootCA = bytes.Repeat([]byte{7}, 32)
	}
	if opt.LogDir == "" {
		opt.LogDir = filepath.Join(t.TempDir(), "log")
	}
	if opt.Lease == 0 {
		opt.Lease = time.Hour
	}
	return startKMS(t, opt)
}

func instance(t *testing.T, s *kmstest.Server) *KMS {
	k := client(t, s.SPKI(), s.URL)
	k.Instance, k.Compose = testInstance, testCompose
	return k
}

func TestAGrantIsProvedAndLeased(t *testing.T) {
	s := logged(t, kmstest.Options{})
	for n := range 3 {
		g, err := ask(t, instance(t, s))
		if err != nil {
			t.Fatal(err)
		}
		if g.Head.Size() != uint64(n+1) || !bytes.Equal(g.Head.SPKI(), s.SPKI()) {
			t.Errorf("the head is %s", g.Head)
		}
		d, err := instance(t, s).subject().Lease(&kmsapi.Lease{Document: g.Lease.Document, Signature: g.Lease.Signature}, s.SPKI(), time.Now())
		if err != nil || d.Log != g.Head.Log() || d.Index != uint64(n) {
			t.Errorf("the lease is %+v, %v", d, err)
		}
	}
	// Upstream's has neither.
	old := startKMS(t, kmstest.Options{})
	g, err := ask(t, instance(t, old))
	if err != nil || !g.Head.IsZero() || g.Lease != nil {
		t.Errorf("%+v, %v", g, err)
	}
}

func TestThreat_G10_AGrantThatIsNotProvedIsNone(t *testing.T) {
	for _, c := range []struct {
		name, code string
		change     func(*kmsapi.AppKeyResponse)
	}{
		{"another entry", "release_log_entry", func(r *kmsapi.AppKeyResponse) { r.Release.Entry = append(r.Release.Entry, ' ') }},
		{"a proof too many", "release_log_inclusion", func(r *kmsapi.AppKeyResponse) { r.Release.Inclusion = append(r.Release.Inclusion, make([]byte, 32)) }},
		{"another index", "release_log_inclusion", func(r *kmsapi.AppKeyResponse) { r.Release.Index++ }},
		{"no head", "release_log_missing", func(r *kmsapi.AppKeyResponse) { r.Release.Head = nil }},
		{"a log that the root does not vouch for", "release_log_key", func(r *kmsapi.AppKeyResponse) { r.Release.Head.LogKeySignature[8] ^= 1 }},
		{"a head that is not signed", "release_log_head", func(r *kmsapi.AppKeyResponse) { r.Release.Head.Checkpoint = "x" + r.Release.Head.Checkpoint }},
	} {
		s := logged(t, kmstest.Options{Answer: c.change})
		if g, err := ask(t, instance(t, s)); g != nil || fault.Code(err) != c.code {
			t.Errorf("%s: %v (code %q), want %q", c.name, err, fault.Code(err), c.code)
		}
	}
	// The log of a grant to somebody else.
	for name, edit := range map[string]func(*KMS){
		"app":      func(k *KMS) { k.App[0] ^= 1 },
		"instance": func(k *KMS) { k.Instance = nil },
		"manifest": func(k *KMS) { k.Compose[0] ^= 1 },
	} {
		k := instance(t, logged(t, kmstest.Options{}))
		edit(k)
		if _, err := ask(t, k); fault.Code(err) != "release_other" {
			t.Errorf("another %s: %v", name, err)
		}
	}
}

func TestLeasesThatAreNotThisInstances(t *testing.T) {
	for _, c := range []struct {
		name, code string
		change     func(*kmsapi.AppKeyResponse)
		edit       func(*KMS)
	}{
		{"another signer", "lease_signature", func(r *kmsapi.AppKeyResponse) { r.Lease.Signature[9] ^= 1 }, nil},
		{"another text", "lease_signature", func(r *kmsapi.AppKeyResponse) { r.Lease.Document[9] ^= 1 }, nil},
		{"nothing in it", "lease_signature", func(r *kmsapi.AppKeyResponse) { r.Lease = &kmsapi.Lease{} }, nil},
		{"another app", "lease_other", func(r *kmsapi.AppKeyResponse) { r.Release = nil }, func(k *KMS) { k.App[0] ^= 1 }},
		{"another instance", "lease_other", func(r *kmsapi.AppKeyResponse) { r.Release = nil }, func(k *KMS) { k.Instance = bytes.Repeat([]byte{1}, 20) }},
		{"another manifest", "lease_other", func(r *kmsapi.AppKeyResponse) { r.Release = nil }, func(k *KMS) { k.Compose[0] ^= 1 }},
	} {
		k := instance(t, logged(t, kmstest.Options{Answer: c.change}))
		if c.edit != nil {
			c.edit(k)
		}
		if _, err := ask(t, k); fault.Code(err) != c.code {
			t.Errorf("%s: %v (code %q), want %q", c.name, err, fault.Code(err), c.code)
		}
	}
	late := logged(t, kmstest.Options{Lease: time.Second, Answer: func(*kmsapi.AppKeyResponse) { time.Sleep(1100 * time.Millisecond) }})
	_, err := ask(t, instance(t, late))
	wantCode(t, err, "lease_ended")
}

// observe is what a boot does once its disk is open.
func observe(t *testing.T, s *kmstest.Server, m *releaselog.Memory) error {
	t.Helper()
	k := instance(t, s)
	g, err := ask(t, k)
	if err != nil {
		t.Fatal(err)
	}
	return k.Observe(t.Context(), m, g.Head, g.Keys.Provider.URL)
}

func TestALogThatGrowsIsRemembered(t *testing.T) {
	s := logged(t, kmstest.Options{})
	m := releaselog.OpenMemory(filepath.Join(t.TempDir(), "heads"))
	k := instance(t, s)
	first, err := ask(t, k)
	if err != nil {
		t.Fatal(err)
	}
	// Others get keys between the grant and the question, and after it.
	for range 3 {
		if _, err := ask(t, instance(t, s)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := k.Observe(t.Context(), m, first.Head, s.URL); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if err := observe(t, s, m); err != nil {
			t.Fatal(err)
		}
	}
	heads, err := m.Heads(s.SPKI())
	if err != nil || len(heads) != 1 || heads[0].Size() != 7 {
		t.Errorf("remembered: %v, %v", heads, err)
	}
	grant, err := ask(t, k)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask(t, instance(t, s)); err != nil {
		t.Fatal(err)
	}
	if err := k.Observe(t.Context(), m, grant.Head, s.URL); err != nil {
		t.Fatal(err)
	}
	wantCode(t, k.Observe(t.Context(), m, first.Head, s.URL), "release_log_shrunk")
}

// Threat G10: a KMS that shows this guest another log than before gets no boot.
func TestThreat_G10_GuestRefusesForkedLog(t *testing.T) {
	dir := t.TempDir()
	root, log, copied := bytes.Repeat([]byte{7}, 32), filepath.Join(dir, "log"), filepath.Join(dir, "copy")
	m := releaselog.OpenMemory(filepath.Join(dir, "heads"))
	run := func(logDir string, grants int) error {
		t.Helper()
		s, err := kmstest.Start(kmstest.Options{RootCA: root, LogDir: logDir, Lease: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for range grants {
			if _, err := ask(t, instance(t, s)); err != nil {
				t.Fatal(err)
			}
		}
		return observe(t, s, m)
	}
	if err := run(log, 1); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(copied, os.DirFS(log)); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"log.key", "head.json", "entries.jsonl"} {
		if err := os.Chmod(filepath.Join(copied, f), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(log, 2); err != nil {
		t.Fatal(err)
	}
	wantCode(t, run(copied, 2), "release_log_fork") // as many entries, others
	wantCode(t, run(copied, 2), "release_log_fork") // more of them
	wantCode(t, m.Missing(kmsRoot(t, root)), "release_log_missing")
	if err := run(log, 0); err != nil { // the true one is welcome still
		t.Error(err)
	}
}

func kmsRoot(t *testing.T, scalar []byte) []byte {
	s, err := kmstest.Start(kmstest.Options{RootCA: scalar})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	return s.SPKI()
}
