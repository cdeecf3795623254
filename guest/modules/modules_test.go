// SPDX-License-Identifier: Apache-2.0

package modules

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestParseRefuses(t *testing.T) {
	var many strings.Builder
	for i := range maxModules + 1 {
		fmt.Fprintf(&many, "m%d.ko\n", i)
	}
	for _, c := range []struct{ name, says, text string }{
		{"a path", "not the name", "../x.ko\n"},
		{"an absolute path", "not the name", "/x.ko\n"},
		{"a compressed module", "not the name", "x.ko.xz\n"},
		{"a hidden file", "not the name", ".ko\n"},
		{"an option", "not the name", "-x.ko\n"},
		{"an empty line", "not the name", "a.ko\n\nb.ko\n"},
		{"a comment", "not the name", "# a\n"},
		{"a carriage return", "not the name", "a.ko\r\n"},
		{"a parameter", "behind the name", "a.ko max_loop=3\n"},
		{"a word too many", "behind the name", "a.ko optional optional\n"},
		{"a trailing space", "behind the name", "a.ko \n"},
		{"a module twice", "second time", "a.ko\na.ko optional\n"},
		{"a cut line", "does not end", "a.ko\nb.k"},
		{"too many modules", "more than", many.String()},
		{"too many bytes", "at most", strings.Repeat("x", maxList+1)},
	} {
		t.Run(c.name, func(t *testing.T) {
			list, err := Parse([]byte(c.text))
			if fault.Code(err) != "modules_list" || !strings.Contains(err.Error(), c.says) {
				t.Fatalf("list %v, error %v; want modules_list with %q", list, err, c.says)
			}
		})
	}
}

// dirWith returns a directory with a list.
func dirWith(t *testing.T, list string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ListName), []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestLoadKeepsTheOrderOfTheList(t *testing.T) {
	dir := dirWith(t, "dm-mod.ko\naesni-intel.ko optional\ndm-crypt.ko\n")
	var got []string
	n, err := load(dir, func(path string) error {
		got = append(got, path)
		if strings.Contains(path, "aesni") {
			return unix.ENODEV
		}
		return nil
	})
	want := []string{dir + "/dm-mod.ko", dir + "/aesni-intel.ko", dir + "/dm-crypt.ko"}
	if err != nil || n != 2 || !slices.Equal(got, want) {
		t.Fatalf("loaded %d of %v, %v", n, got, err)
	}
}

func TestLoadWithoutAListLoadsNothing(t *testing.T) {
	n, err := load(t.TempDir(), func(string) error { return errors.New("called") })
	if n != 0 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
}

func TestLoadStopsAtAModuleThatFails(t *testing.T) {
	for _, c := range []struct {
		name, list string
		err        error
	}{
		{"hardware that must be there", "a.ko\nb.ko\n", unix.ENODEV},
		{"an optional module of another kernel", "a.ko optional\nb.ko\n", unix.ENOEXEC},
		{"an optional module that is refused", "a.ko optional\nb.ko\n", unix.EPERM},
		{"an optional module that is absent", "a.ko optional\nb.ko\n", unix.ENOENT},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls := 0
			n, err := load(dirWith(t, c.list), func(string) error { calls++; return c.err })
			if fault.Code(err) != "module_load" || !errors.Is(err, c.err) || n != 0 || calls != 1 {
				t.Fatalf("%d loaded by %d calls, %v", n, calls, err)
			}
		})
	}
	_, err := load(dirWith(t, strings.Repeat("x", maxList+1)), nil)
	if fault.Code(err) != "modules_list" {
		t.Fatalf("error %v", err)
	}
}

func TestSeal(t *testing.T) {
	proc := t.TempDir()
	if err := Seal(proc); err != nil {
		t.Fatalf("a kernel without modules: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(proc, "sys/kernel/modules_disabled"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Seal(proc); fault.Code(err) != "modules_seal" {
		t.Fatalf("a setting that cannot be made: %v", err)
	}
	setting := filepath.Join(proc, "sys/kernel/modules_disabled")
	if err := errors.Join(os.Remove(setting), os.WriteFile(setting, []byte("0"), 0o644), Seal(proc)); err != nil {
		t.Fatal(err)
	}
	if text, err := fs.ReadFile(os.DirFS(proc), "sys/kernel/modules_disabled"); err != nil || string(text) != "1" {
		t.Fatalf("setting %q, %v", text, err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "dm-mod.ko\n", "tdx-guest.ko optional\n", "../x.ko\n", "a.ko\na.ko\n", "a.ko", "a.ko  optional\n", "\x00\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := Parse(text)
		if err != nil {
			if fault.Code(err) != "modules_list" {
				t.Fatalf("error without its code: %v", err)
			}
			return
		}
		// What is accepted is the list that these modules have, and no other.
		var again strings.Builder
		for _, m := range list {
			if filepath.Base(m.File) != m.File || filepath.Ext(m.File) != ".ko" {
				t.Fatalf("file %q", m.File)
			}
			again.WriteString(m.File)
			if m.Optional {
				again.WriteString(" optional")
			}
			again.WriteByte('\n')
		}
		if again.String() != string(text) {
			t.Fatalf("%q is read as %q", text, again.String())
		}
	})
}
