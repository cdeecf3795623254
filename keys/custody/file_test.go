// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/derive"
)

// stored returns roots with a file, and its path.
func stored(t testing.TB) (*Roots, string) {
	t.Helper()
	r, path := fixed(t), filepath.Join(t.TempDir(), "root.keys")
	if err := r.Create(path); err != nil {
		t.Fatal(err)
	}
	return r, path
}

func opened(t testing.TB, path string) *Roots {
	t.Helper()
	r, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Wipe)
	return r
}

// same reports whether two roots hold the same secrets.
func same(a, b *Roots) bool {
	return bytes.Equal(a.s.page.b[:pageUsed], b.s.page.b[:pageUsed]) && a.s.first == b.s.first && a.Identity().Equal(b.Identity())
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	for _, e := range must(os.ReadDir(dir)) {
		out = append(out, e.Name())
	}
	return out
}

func TestAFileKeepsRoots(t *testing.T) {
	r, path := stored(t)
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	again := opened(t, path)
	if !same(r, again) {
		t.Error("other roots came back")
	}
	if p := again.Provenance(); p.Kind != Generated || p.Time.Unix() != 1_800_000_000 {
		t.Errorf("provenance %+v", p)
	}
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Errorf("the directory has %q", got)
	}
	wantCode(t, "a second file", again.Create(filepath.Join(t.TempDir(), "root.keys")), "root_stored")

	// Roots without epochs, and with a source.
	old := must(newRoots(sequence(9), sequence(10), nil, 0, Provenance{Kind: Replicated, Source: []byte{0x30, 1}, Time: time.Now()}))
	path = filepath.Join(t.TempDir(), "root.keys")
	if err := old.Create(path); err != nil {
		t.Fatal(err)
	}
	again = opened(t, path)
	if first, last := again.Epochs(); !same(old, again) || first != 0 || last != 0 {
		t.Errorf("epochs %d to %d", first, last)
	}
	if p := again.Provenance(); p.Kind != Replicated || !bytes.Equal(p.Source, []byte{0x30, 1}) {
		t.Errorf("provenance %+v", p)
	}
	wantCode(t, "erase where there is nothing", again.EraseBefore(1), "epoch_unavailable")
}

func TestThreat_G09_NeverOverwritesRoot(t *testing.T) {
	_, path := stored(t)
	before := must(os.ReadFile(path))
	wantCode(t, "create over roots", generate(t).Create(path), "root_exists")
	if !bytes.Equal(before, must(os.ReadFile(path))) {
		t.Error("the file changed")
	}
	// Whatever is there stands: a broken file may be all that is left of a root.
	for name, make := range map[string]func(string) error{
		"an empty file":   func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"a broken file":   func(p string) error { return os.WriteFile(p, before[:100], 0o644) },
		"a directory":     func(p string) error { return os.Mkdir(p, 0o700) },
		"a dangling link": func(p string) error { return os.Symlink(p+".nowhere", p) },
	} {
		dir := t.TempDir()
		p := filepath.Join(dir, "root.keys")
		if err := make(p); err != nil {
			t.Fatal(err)
		}
		r := generate(t)
		wantCode(t, "create over "+name, r.Create(p), "root_exists")
		if got := names(t, dir); len(got) != 1 {
			t.Errorf("over %s: the directory has %q", name, got)
		}
	}
	// The look before is a courtesy; what decides is link(2).
	p := filepath.Join(t.TempDir(), "root.keys")
	r := generate(t)
	r.s.step = func(step string) {
		if step == "write" {
			if err := os.WriteFile(p, []byte("other"), 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	wantCode(t, "a file that came in between", r.Create(p), "root_exists")
	if got := must(os.ReadFile(p)); string(got) != "other" {
		t.Errorf("it holds %q", got)
	}
	if got := names(t, filepath.Dir(p)); len(got) != 1 {
		t.Errorf("the directory has %q", got)
	}
}

func TestOfConcurrentCreatesOneWins(t *testing.T) {
	for range 20 {
		path := filepath.Join(t.TempDir(), "root.keys")
		var wg sync.WaitGroup
		var won atomic.Int32
		var winner atomic.Pointer[Roots]
		for range 8 {
			r := generate(t)
			wg.Go(func() {
				switch err := r.Create(path); fault.Code(err) {
				case "root_exists":
				case "":
					if err != nil {
						t.Error(err)
					}
					won.Add(1)
					winner.Store(r)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d creates won", won.Load())
		}
		if !same(winner.Load(), opened(t, path)) {
			t.Error("the file is not the winner's")
		}
	}
}

func TestFilesThatAreRefused(t *testing.T) {
	_, path := stored(t)
	good := string(must(os.ReadFile(path)))
	dir := t.TempDir()
	line := func(name string) string {
		for _, l := range strings.SplitAfter(good, "\n") {
			if strings.HasPrefix(l, name+" ") {
				return l
			}
		}
		t.Fatalf("no line %s", name)
		return ""
	}
	other := generate(t)
	// remade has a MAC that holds.
	remade := func(text string) string {
		head, _, _ := strings.Cut(text, "mac ")
		return head + "mac " + hex.EncodeToString(must(macOf(sequence(1), sequence(0x41), []byte(head)))) + "\n"
	}
	if remade(good) != good {
		t.Fatal("the test's MAC is not the file's")
	}
	zeroes := strings.Repeat("00", 32)
	for name, text := range map[string]string{
		"empty":                "",
		"a later version":      strings.Replace(good, "-v1", "-v2", 1),
		"cut short":            good[:len(good)/2],
		"without its end":      good[:len(good)-1],
		"with more":            good + "x\n",
		"too large":            good + strings.Repeat("\n", maxFile),
		"windows":              strings.ReplaceAll(good, "\n", "\r\n"),
		"upper case":           remade(strings.Replace(good, line("ca"), "ca "+strings.ToUpper(line("ca")[3:]), 1)),
		"no CA":                remade(strings.Replace(good, line("ca"), "", 1)),
		"a zero CA":            remade(strings.Replace(good, line("ca"), "ca "+zeroes+"\n", 1)),
		"a CA beyond":          remade(strings.Replace(good, line("ca"), "ca "+strings.Repeat("ff", 32)+"\n", 1)),
		"a zero k256":          remade(strings.Replace(good, line("k256"), "k256 "+zeroes+"\n", 1)),
		"a short k256":         remade(strings.Replace(good, line("k256"), "k256 01\n", 1)),
		"a zero epoch secret":  remade(strings.Replace(good, line("epoch"), "epoch 1 "+zeroes+"\n", 1)),
		"epoch 0":              remade(strings.Replace(good, "epoch 1 ", "epoch 0 ", 1)),
		"epoch 01":             remade(strings.Replace(good, "epoch 1 ", "epoch 01 ", 1)),
		"a huge epoch":         remade(strings.Replace(good, "epoch 1 ", "epoch 18446744073709551615 ", 1)),
		"another's identity":   remade(strings.Replace(good, line("identity"), fmt.Sprintf("identity %x %x\n", other.Identity().CA, other.Identity().K256), 1)),
		"an unknown kind":      remade(strings.Replace(good, "generated", "found", 1)),
		"no source":            remade(strings.Replace(good, "generated - ", "generated ", 1)),
		"a huge source":        remade(strings.Replace(good, "generated - ", "generated "+strings.Repeat("00", maxSource+1)+" ", 1)),
		"an empty source":      remade(strings.Replace(good, "generated - ", "generated  ", 1)),
		"no time":              remade(strings.Replace(good, "Z\n", "\n", 1)),
		"a time zone":          remade(strings.Replace(good, "Z\n", "+00:00\n", 1)),
		"another epoch secret": strings.Replace(good, line("epoch"), "epoch 1 "+strings.Repeat("01", 32)+"\n", 1),
		"another MAC":          good[:len(good)-65] + zeroes + "\n",
	} {
		if text == good {
			t.Fatalf("%s: the test changed nothing", name)
		}
		p := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(p)
		wantCode(t, name, err, "root_malformed")
		if err != nil && (strings.Contains(err.Error(), "0102030405") || strings.Contains(err.Error(), hex.EncodeToString(sequence(0x41))[:8])) {
			t.Errorf("%s: the error quotes a secret: %v", name, err)
		}
	}
	_, err := Open(filepath.Join(dir, "nothing"))
	wantCode(t, "no file", err, "root_missing")
	_, err = Open(dir)
	wantCode(t, "a directory", err, "root_malformed")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	_, err = Open(link)
	wantCode(t, "a link", err, "root_malformed")
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(pipe)
	wantCode(t, "a pipe", err, "root_malformed")
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := Open(path)
		wantCode(t, mode.String(), err, "root_mode")
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	opened(t, path)
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 4711, -1); err != nil {
			t.Fatal(err)
		}
		_, err = Open(path)
		wantCode(t, "another user's", err, "root_mode")
	}
}

// Every byte of a file, changed in several ways, is refused.
func TestATamperedFileIsRefused(t *testing.T) {
	_, path := stored(t)
	good := must(os.ReadFile(path))
	for i := range good {
		for _, x := range []byte{1, 2, 0x20, 0x80, 0xff} {
			bad := bytes.Clone(good)
			bad[i] ^= x
			if r, err := decode(bad); err == nil {
				r.Wipe()
				t.Errorf("byte %d ^ %#x: accepted", i, x)
			}
		}
		for _, bad := range [][]byte{append(bytes.Clone(good[:i]), good[i+1:]...), append(append(bytes.Clone(good[:i]), '0'), good[i:]...), good[:i]} {
			if _, err := decode(bad); fault.Code(err) != "root_malformed" {
				t.Errorf("byte %d inserted, deleted or the last: %v", i, err)
			}
		}
	}
}

// hold returns every file of a directory that contains a secret, raw or as text.
func hold(t testing.TB, dir string, secret []byte) []string {
	t.Helper()
	var out []string
	for _, name := range names(t, dir) {
		data := must(os.ReadFile(filepath.Join(dir, name)))
		if bytes.Contains(data, secret) || bytes.Contains(bytes.ToLower(data), []byte(hex.EncodeToString(secret))) {
			out = append(out, name)
		}
	}
	return out
}

func TestThreat_G02_ErasedEpochsAreGone(t *testing.T) {
	r, path := stored(t)
	dir := filepath.Dir(path)
	scope := func(epoch uint64) Scope { return Scope{App: app, Epoch: epoch, Instance: instance} }
	var want [8][]byte
	var secrets [8][]byte
	for e := range want {
		want[e] = bytes.Clone(must(r.DiskKey(ctx, scope(uint64(e)))).Bytes())
		if e > 0 {
			secrets[e] = must(r.s.material().at(uint64(e)))
		}
	}
	// Another name of the file, as a crash of Create or a curious neighbour makes it.
	other := filepath.Join(dir, "copy")
	if err := os.Link(path, other); err != nil {
		t.Fatal(err)
	}
	if len(hold(t, dir, secrets[1])) != 2 {
		t.Fatal("the search does not find a secret that is there")
	}
	// After a rotation to epoch 4 the one before stays readable and the rest does not.
	if err := r.EraseBefore(3); err != nil {
		t.Fatal(err)
	}
	for _, at := range []*Roots{r, opened(t, path)} {
		for e := uint64(1); e < 3; e++ {
			_, err := at.DiskKey(ctx, scope(e))
			wantCode(t, fmt.Sprintf("epoch %d", e), err, "epoch_unavailable")
		}
		for _, e := range []uint64{0, 3, 4, 7} {
			if k, err := at.DiskKey(ctx, scope(e)); err != nil || !bytes.Equal(k.Bytes(), want[e]) {
				t.Errorf("epoch %d: another key, %v", e, err)
			}
		}
		for _, secret := range secrets[1:3] {
			if bytes.Contains(at.s.page.b, secret) {
				t.Error("an erased secret is in memory")
			}
		}
	}
	for e, secret := range secrets[1:3] {
		if files := hold(t, dir, secret); files != nil {
			t.Errorf("the secret of epoch %d is in %q", e+1, files)
		}
	}
	if files := hold(t, dir, secrets[3]); len(files) != 1 {
		t.Errorf("the secret of epoch 3 is in %q", files)
	}
	// Erased again, and less than before: nothing to do.
	before := must(os.ReadFile(path))
	for _, e := range []uint64{0, 1, 3} {
		if err := r.EraseBefore(e); err != nil {
			t.Errorf("erase before %d: %v", e, err)
		}
	}
	if !bytes.Equal(before, must(os.ReadFile(path))) {
		t.Error("the file changed")
	}
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	// Roots without a file.
	free := fixed(t)
	if err := free.EraseBefore(2); err != nil || bytes.Contains(free.s.page.b, secrets[1]) {
		t.Errorf("in memory: %v", err)
	}
	if k := must(free.DiskKey(ctx, scope(7))); !bytes.Equal(k.Bytes(), want[7]) {
		t.Error("in memory: another key")
	}
}

// A process that still has the epochs does not write them back, and none writes over
// a file that is not its own.
func TestThreat_G02_ErasureIsNotUndone(t *testing.T) {
	r, path := stored(t)
	stale := opened(t, path)
	if err := r.EraseBefore(5); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "an older process's erasure", stale.EraseBefore(3), "root_changed")
	if first, _ := opened(t, path).Epochs(); first != 5 {
		t.Errorf("the file begins with epoch %d", first)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "no file", r.EraseBefore(6), "root_missing")
	foreign := generate(t)
	if err := foreign.Create(path); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "another root's file", r.EraseBefore(6), "root_changed")
	if !same(foreign, opened(t, path)) {
		t.Error("the other root is gone")
	}
}

const (
	crashVariable = "CUSTODY_TEST_CRASH" // operation:step
	pathVariable  = "CUSTODY_TEST_PATH"
)

// TestCrash is the process that TestThreat_G09_Crashes kills.
func TestCrash(t *testing.T) {
	operation, step, ok := strings.Cut(os.Getenv(crashVariable), ":")
	if !ok {
		t.Skip("run by TestThreat_G09_Crashes")
	}
	die := func(at string) {
		if at == step {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	path := os.Getenv(pathVariable)
	if operation == "create" {
		r := fixed(t)
		r.s.step = die
		_ = r.Create(path)
	} else {
		r := opened(t, path)
		r.s.step = die
		_ = r.EraseBefore(4)
	}
	t.Fatalf("no step %s of %s", step, operation)
}

// kill -9 after each step: Create leaves no file or the whole file, EraseBefore the
// epochs or not; the next start goes on from either, and nothing erased is left.
func TestThreat_G09_Crashes(t *testing.T) {
	self := must(os.Executable())
	crash := func(t *testing.T, what, path string) {
		t.Helper()
		cmd := exec.Command(self, "-test.run=^TestCrash$")
		cmd.Env = append(os.Environ(), crashVariable+"="+what, pathVariable+"="+path)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != -1 {
			t.Fatalf("the process was not killed: %v\n%s", err, out)
		}
	}
	for _, step := range []string{"create", "write", "link", "unlink", "sync"} {
		t.Run("create "+step, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "root.keys")
			crash(t, "create:"+step, path)
			there := false
			switch r, err := Open(path); fault.Code(err) {
			case "":
				there = true
				if !same(r, fixed(t)) {
					t.Error("other roots")
				}
			case "root_missing":
			default:
				t.Fatalf("neither nothing nor all: %v", err)
			}
			if want := step == "link" || step == "unlink" || step == "sync"; there != want {
				t.Errorf("the file is there: %t", there)
			}
			// The restart recovers, or begins anew.
			again := generate(t)
			if there {
				wantCode(t, "create again", again.Create(path), "root_exists")
			} else if err := again.Create(path); err != nil {
				t.Error(err)
			}
			// What was left is removed once it is old.
			for _, name := range names(t, filepath.Dir(path)) {
				if err := os.Chtimes(filepath.Join(filepath.Dir(path), name), time.Time{}, time.Now().Add(-2*time.Hour)); err != nil {
					t.Fatal(err)
				}
			}
			opened(t, path)
			if got := names(t, filepath.Dir(path)); len(got) != 1 {
				t.Errorf("the directory has %q", got)
			}
		})
	}
	for _, step := range []string{"create", "write", "exchange", "sync", "shred"} {
		t.Run("erase "+step, func(t *testing.T) {
			r, path := stored(t)
			first, third := bytes.Clone(r.s.material().epoch), must(r.s.material().at(3))
			crash(t, "erase:"+step, path)
			again := opened(t, path)
			begins, _ := again.Epochs()
			if done := step == "exchange" || step == "sync" || step == "shred"; done != (begins == 4) || !done && begins != 1 {
				t.Errorf("the file begins with epoch %d", begins)
			}
			if begins == 4 {
				if files := hold(t, filepath.Dir(path), first); files != nil {
					t.Errorf("the erased secret is in %q after the restart", files)
				}
			}
			if err := again.EraseBefore(4); err != nil {
				t.Fatal(err)
			}
			for _, secret := range [][]byte{first, third} {
				if files := hold(t, filepath.Dir(path), secret); files != nil {
					t.Errorf("an erased secret is in %q", files)
				}
			}
			if got := names(t, filepath.Dir(path)); len(got) != 1 {
				t.Errorf("the directory has %q", got)
			}
		})
	}
}

func TestRootsTravelToAReplica(t *testing.T) {
	r := fixed(t)
	if err := r.EraseBefore(3); err != nil {
		t.Fatal(err)
	}
	sent := must(r.Export())
	wire := must(r.Export())
	k256, secret := sent.K256Key, sent.EpochSecret
	got, err := Import(sent, r.Identity())
	if err != nil {
		t.Fatal(err)
	}
	if !same(r, got) {
		t.Error("the replica has other roots")
	}
	if !zero(k256) || !zero(secret) || sent.CaKey != "" || sent.K256Key != nil || sent.EpochSecret != nil {
		t.Error("the message still has secrets")
	}
	if p := got.Provenance(); p.Kind != Replicated || !bytes.Equal(p.Source, r.Identity().CA) || time.Since(p.Time) > time.Minute {
		t.Errorf("provenance %+v", p)
	}
	// From an upstream KMS: epoch 0 and nothing else.
	got, err = Import(&kmsapi.KmsKeys{CaKey: wire.CaKey, K256Key: wire.K256Key}, r.Identity())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := got.AppKey(ctx, Scope{App: app}); err != nil {
		t.Error(err)
	}
	_, err = got.AppKey(ctx, Scope{App: app, Epoch: 3})
	wantCode(t, "a native epoch of an upstream KMS", err, "epoch_unavailable")
	if k := must(got.Export()); k.EpochSecret != nil || k.FirstEpoch != 0 {
		t.Error("it exports an epoch secret")
	}
}

func TestThreat_C03_AttackerRootRefused(t *testing.T) {
	r, attacker := generate(t), generate(t)
	id, theirs := r.Identity(), attacker.Identity()
	for name, c := range map[string]struct {
		change func(*kmsapi.KmsKeys)
		want   Identity
		code   string
	}{
		"both roots":         {func(k *kmsapi.KmsKeys) { a := must(attacker.Export()); k.CaKey, k.K256Key = a.CaKey, a.K256Key }, id, "root_mismatch"},
		"the CA":             {func(k *kmsapi.KmsKeys) { k.CaKey = must(attacker.Export()).CaKey }, id, "root_mismatch"},
		"the secp256k1 root": {func(k *kmsapi.KmsKeys) { k.K256Key = must(attacker.Export()).K256Key }, id, "root_mismatch"},
		"nothing wanted":     {func(*kmsapi.KmsKeys) {}, Identity{}, "root_mismatch"},
		"no CA wanted":       {func(*kmsapi.KmsKeys) {}, Identity{K256: id.K256}, "root_mismatch"},
		"no k256 wanted":     {func(*kmsapi.KmsKeys) {}, Identity{CA: id.CA}, "root_mismatch"},
		"another CA wanted":  {func(*kmsapi.KmsKeys) {}, Identity{CA: theirs.CA, K256: id.K256}, "root_mismatch"},
		"no CA":              {func(k *kmsapi.KmsKeys) { k.CaKey = "" }, id, "root_malformed"},
		"two CAs":            {func(k *kmsapi.KmsKeys) { k.CaKey += k.CaKey }, id, "root_malformed"},
		"a huge CA":          {func(k *kmsapi.KmsKeys) { k.CaKey += strings.Repeat("\n", maxPEM) }, id, "root_malformed"},
		"no k256":            {func(k *kmsapi.KmsKeys) { k.K256Key = nil }, id, "root_malformed"},
		"a zero k256":        {func(k *kmsapi.KmsKeys) { k.K256Key = make([]byte, 32) }, id, "root_malformed"},
		"a short secret":     {func(k *kmsapi.KmsKeys) { k.EpochSecret = k.EpochSecret[:31] }, id, "root_malformed"},
		"a zero secret":      {func(k *kmsapi.KmsKeys) { k.EpochSecret = make([]byte, 32) }, id, "root_malformed"},
		"a secret, no epoch": {func(k *kmsapi.KmsKeys) { k.FirstEpoch = 0 }, id, "root_malformed"},
		"an epoch, no secret": {func(k *kmsapi.KmsKeys) {
			k.EpochSecret = nil
		}, id, "root_malformed"},
		"a huge epoch": {func(k *kmsapi.KmsKeys) { k.FirstEpoch = ^uint64(0) }, id, "root_malformed"},
	} {
		k := must(r.Export())
		c.change(k)
		k256 := k.K256Key
		got, err := Import(k, c.want)
		wantCode(t, name, err, c.code)
		if got != nil || !zero(k256) {
			t.Errorf("%s: roots %v, and the message wiped: %t", name, got, zero(k256))
		}
	}
	_, err := Import(nil, id)
	wantCode(t, "no message", err, "root_malformed")
}

func TestUpstreamsDirectory(t *testing.T) {
	write := func(t *testing.T, files map[string]string) string {
		dir := t.TempDir()
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	ca := string(must(derive.PEM(must(derive.P256FromScalar(sequence(1))))))
	k256 := string(sequence(0x41))
	dir := write(t, map[string]string{"root-ca.key": ca, "root-k256.key": k256, "root-ca.crt": "x"})
	r, err := OpenUpstream(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Identity().Equal(fixed(t).Identity()) || r.Provenance().Kind != Upstream {
		t.Errorf("other roots, or provenance %+v", r.Provenance())
	}
	if first, _ := r.Epochs(); first != 0 {
		t.Error("they have native epochs")
	}
	if err := r.Create(filepath.Join(t.TempDir(), "root.keys")); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		files map[string]string
		code  string
	}{
		"nothing":            {nil, "root_missing"},
		"the CA alone":       {map[string]string{"root-ca.key": ca}, "root_partial"},
		"k256 alone":         {map[string]string{"root-k256.key": k256}, "root_partial"},
		"k256 in hex":        {map[string]string{"root-ca.key": ca, "root-k256.key": hex.EncodeToString([]byte(k256))}, "root_malformed"},
		"k256 with newline":  {map[string]string{"root-ca.key": ca, "root-k256.key": k256 + "\n"}, "root_malformed"},
		"no PEM":             {map[string]string{"root-ca.key": "x", "root-k256.key": k256}, "root_malformed"},
		"an empty CA":        {map[string]string{"root-ca.key": "", "root-k256.key": k256}, "root_malformed"},
		"a CA too large":     {map[string]string{"root-ca.key": ca + strings.Repeat("\n", maxPEM), "root-k256.key": k256}, "root_malformed"},
		"a zero k256 scalar": {map[string]string{"root-ca.key": ca, "root-k256.key": string(make([]byte, 32))}, "root_malformed"},
	} {
		_, err := OpenUpstream(write(t, c.files))
		wantCode(t, name, err, c.code)
	}
	for _, name := range []string{"root-ca.key", "root-k256.key"} {
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := OpenUpstream(dir)
		wantCode(t, name+" readable by others", err, "root_mode")
		if err := os.Chmod(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRestoreHoldsTheIdentity(t *testing.T) {
	r := fixed(t)
	copyOf := func() (text []byte) {
		if err := r.Escrow(func(b []byte) error { text = bytes.Clone(b); return nil }); err != nil {
			t.Fatal(err)
		}
		return text
	}
	text := copyOf()
	got, err := Restore(text, r.Identity())
	if err != nil || !same(r, got) || got.Provenance().Kind != Restored || !zero(text) {
		t.Errorf("restored %v", err)
	}
	_, err = Restore(copyOf(), generate(t).Identity())
	wantCode(t, "other roots wanted", err, "root_mismatch")
	_, err = Restore(copyOf(), Identity{})
	wantCode(t, "none wanted", err, "root_mismatch")
	_, err = Restore(copyOf()[1:], r.Identity())
	wantCode(t, "damaged", err, "root_malformed")
}

// The pages of roots that nobody wipes are wiped and given back all the same.
func TestPagesAreGivenBack(t *testing.T) {
	size := func() int {
		return must(strconv.Atoi(strings.Fields(string(must(os.ReadFile("/proc/self/statm"))))[0]))
	}
	runtime.GC()
	before := size()
	for range 2000 {
		must(Generate(rand.Reader))
	}
	for range 50 {
		runtime.GC()
		if size() < before+1000 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d pages before, %d after", before, size())
}

func FuzzOpen(f *testing.F) {
	r := must(newRoots(sequence(1), sequence(0x41), sequence(0), 1, Provenance{Kind: Generated}))
	text := must(r.s.encode(r.s.material()))
	f.Add(text)
	f.Add(text[:len(text)/2])
	f.Add([]byte(fileVersion + "\nca \nepoch none\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decode(data)
		if err != nil {
			if fault.Code(err) != "root_malformed" {
				t.Fatal(err)
			}
			return
		}
		defer r.Wipe()
		if again := must(r.s.encode(r.s.material())); !bytes.Equal(again, data) {
			t.Fatalf("%q was read as %q", data, again)
		}
	})
}
