// SPDX-License-Identifier: Apache-2.0

package history

import (
	"bufio"
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/internal/fault"
)

const roleEnv = "DSTACK_HISTORY_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(roleEnv); path != "" {
		writer(path)
		return
	}
	goleak.VerifyTestMain(m)
}

// writer records requests until it is killed, and says each that was recorded.
func writer(path string) {
	s, err := Open(context.Background(), path, DefaultLimits)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := 1; ; i++ {
		s.Event(Event{VM: "v", TimeMS: time.Now().UnixMilli(), Event: "e", Body: "b"})
		if err := s.Audit(context.Background(), Audit{TimeMS: time.Now().UnixMilli(), Method: fmt.Sprint(i)}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

func open1(t *testing.T, path string, l Limits) *Store {
	t.Helper()
	s, err := Open(t.Context(), path, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func now() int64 { return time.Now().UnixMilli() }

func TestWhatIsWrittenIsRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd ?%#name.db")
	s := open1(t, path, DefaultLimits)
	at := now()
	for i := range 5 {
		s.Event(Event{"a", at + int64(i), "boot.progress", fmt.Sprintf("phase %d '; DROP TABLE events; --", i)})
		s.Event(Event{"b", at, "x", ""})
	}
	s.Sample(Sample{"a", at, 1, 2, 3})
	want := Audit{at, "uid 0 pid 1", "StopVm", "a", "ok"}
	if err := s.Audit(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Audits(t.Context(), Query{}); err != nil || len(got) != 1 || got[0] != want {
		t.Fatal(got, err)
	}
	s.Close() // writes what is queued
	s = open1(t, path, DefaultLimits)
	got, err := s.Events(t.Context(), Query{VM: "a", SinceMS: at + 1, Limit: 2})
	if err != nil || len(got) != 2 || got[1].TimeMS != at+4 || got[0].TimeMS != at+3 || !strings.HasPrefix(got[1].Body, "phase 4 ';") {
		t.Fatal(got, err)
	}
	if all, err := s.Events(t.Context(), Query{}); err != nil || len(all) != 10 {
		t.Fatal(len(all), err)
	}
	if m, err := s.Samples(t.Context(), Query{VM: "a"}); err != nil || len(m) != 1 || m[0] != (Sample{"a", at, 1, 2, 3}) {
		t.Fatal(m, err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if fi, err := os.Stat(path + suffix); err == nil && fi.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", suffix, fi.Mode())
		}
	}
}

func TestThePastIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h.db")
	s := open1(t, path, Limits{PerVM: 50, Rows: 120, MaxAge: time.Hour})
	s.Event(Event{"quiet", now(), "kept", ""})
	s.Event(Event{"quiet", now() - 2*time.Hour.Milliseconds(), "old", ""})
	for i := range 3 * pruneAfter {
		s.Event(Event{"loud", now(), "e", fmt.Sprint(i)})
		for len(s.queue) > maxQueue/2 {
			time.Sleep(time.Millisecond)
		}
	}
	for i := range 200 {
		s.Audit(t.Context(), Audit{TimeMS: now(), Method: fmt.Sprint(i)})
	}
	s.Close()
	s = open1(t, path, Limits{PerVM: 50, Rows: 120, MaxAge: time.Hour})
	s.Event(Event{"loud", now(), "e", "last"}) // the first batch prunes
	s.Close()
	s = open1(t, path, Limits{PerVM: 50, Rows: 120, MaxAge: time.Hour})
	loud, err := s.Events(t.Context(), Query{VM: "loud"})
	if err != nil || len(loud) > 50 || loud[len(loud)-1].Body != "last" {
		t.Errorf("%d events of one VM, %v", len(loud), err)
	}
	if quiet, _ := s.Events(t.Context(), Query{VM: "quiet"}); len(quiet) != 1 || quiet[0].Event != "kept" {
		t.Errorf("another VM's past: %v", quiet)
	}
	if audits, _ := s.Audits(t.Context(), Query{}); len(audits) > 120 || audits[len(audits)-1].Method != "199" {
		t.Errorf("%d requests", len(audits))
	}
	long := strings.Repeat("x", 3*maxText)
	s.Audit(t.Context(), Audit{TimeMS: now(), Who: long})
	if audits, _ := s.Audits(t.Context(), Query{Limit: 1}); len(audits[0].Who) != maxText {
		t.Error(len(audits[0].Who))
	}
}

func TestFullQueueLosesAndSaysSo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h.db")
	s := open1(t, path, DefaultLimits)
	conn, err := s.db.Conn(t.Context()) // nothing can be written
	if err != nil {
		t.Fatal(err)
	}
	for range maxQueue + batch + 100 {
		s.Event(Event{VM: "v", TimeMS: now(), Event: "e"})
	}
	conn.Close()
	s.Close()
	s = open1(t, path, DefaultLimits)
	lost, err := s.Events(t.Context(), Query{Limit: MaxResults})
	if err != nil {
		t.Fatal(err)
	}
	said := false
	for _, e := range lost {
		said = said || e.Event == "history.lost" && e.Body != "0"
	}
	if !said {
		t.Errorf("%d events, and none says that others were lost", len(lost))
	}
}

// A writer killed with SIGKILL has lost nothing that it was told is recorded.
func TestAuditSurvivesAKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h.db")
	for range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), roleEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		said := ""
		sc := bufio.NewScanner(out)
		for n := 0; sc.Scan(); n++ {
			if said = sc.Text(); n == 50 {
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
		s := open1(t, path, DefaultLimits)
		audits, err := s.Audits(t.Context(), Query{})
		if err != nil || len(audits) == 0 {
			t.Fatal(len(audits), err)
		}
		found := false
		for _, a := range audits[max(0, len(audits)-3):] {
			found = found || a.Method == said
		}
		if !found {
			t.Errorf("request %s is lost; the last is %s", said, audits[len(audits)-1].Method)
		}
		s.Close()
	}
}

func TestForeignAndBrokenDatabases(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "h.db")
	// Of a newer program: left as it is.
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("PRAGMA user_version = 99; CREATE TABLE later (x)"); err != nil {
		t.Fatal(err)
	}
	db.Close()
	before, _ := os.ReadFile(path)
	if _, err := Open(t.Context(), path, DefaultLimits); fault.Code(err) != "history_newer" || fault.Fix(err) == "" {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(path); len(after) != len(before) {
		t.Error("it was changed")
	}
	// No database, and a damaged one: put aside.
	for name, damage := range map[string]func([]byte) []byte{
		"text": func([]byte) []byte { return []byte(strings.Repeat("this is no database ", 500)) },
		"damaged": func(b []byte) []byte {
			for i := 4096; i < len(b); i++ {
				b[i] ^= 0x5a
			}
			return b
		},
	} {
		path := filepath.Join(dir, name)
		s := open1(t, path, DefaultLimits)
		s.Audit(t.Context(), Audit{TimeMS: now()})
		s.Close()
		data, _ := os.ReadFile(path)
		os.WriteFile(path, damage(data), 0o600)
		s = open1(t, path, DefaultLimits)
		if audits, err := s.Audits(t.Context(), Query{}); err != nil || len(audits) != 0 {
			t.Errorf("%s: %v %v", name, audits, err)
		}
		if _, err := os.Stat(path + ".broken"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		s.Close()
	}
	// What is no file is not put aside.
	os.Mkdir(filepath.Join(dir, "d"), 0o700)
	if _, err := Open(t.Context(), filepath.Join(dir, "d"), DefaultLimits); fault.Code(err) != "history_open" {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "d.broken")); err == nil {
		t.Error("a directory was renamed")
	}
}
