// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// tree imitates the kernel's files in a directory. Its fields change how it
// behaves.
type tree struct {
	t    *testing.T
	root string
	k    *kernel

	provider string
	busy     int  // writes refused with EBUSY
	ignore   bool // take no report data
	others   int  // writes by someone else, between ours and the quote
	size     int  // of a quote
	slept    time.Duration
	entries  map[string]bool
	registry map[string][]byte // last written digest by register file
	badFS    string            // path with a foreign file system
}

func newTree(t *testing.T) *tree {
	x := &tree{t: t, root: t.TempDir(), provider: "tdx_guest\n", size: 5000, entries: map[string]bool{}, registry: map[string][]byte{}}
	x.k = &kernel{
		report: filepath.Join(x.root, "report"), device: filepath.Join(x.root, "tdx_guest"),
		rtmr: filepath.Join(x.root, "measurements"), ccel: filepath.Join(x.root, "CCEL"),
		mkdir: x.mkdir, rmdir: x.rmdir, write: x.write,
		checkFS: func(path string, _ int64) error {
			if x.badFS != "" && strings.HasPrefix(path, x.badFS) {
				return fault.New("tee_filesystem", "foreign")
			}
			return nil
		},
		sleep: func(ctx context.Context, d time.Duration) error {
			x.slept += d
			return ctx.Err()
		},
	}
	x.must(os.Mkdir(x.k.report, 0o700))
	x.must(os.Mkdir(x.k.rtmr, 0o700))
	x.must(os.WriteFile(x.k.device, nil, 0o600))
	for i := range 4 {
		x.must(os.WriteFile(filepath.Join(x.k.rtmr, fmt.Sprintf("rtmr%d:sha384", i)), nil, 0o600))
	}
	return x
}

func (x *tree) must(err error) {
	x.t.Helper()
	if err != nil {
		x.t.Fatal(err)
	}
}

func (x *tree) mkdir(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	x.entries[path] = true
	for name, content := range map[string]string{"provider": x.provider, "generation": "0\n", "inblob": "", "outblob": ""} {
		x.must(os.WriteFile(filepath.Join(path, name), []byte(content), 0o600))
	}
	return nil
}

func (x *tree) rmdir(path string) error {
	delete(x.entries, path)
	return os.RemoveAll(path)
}

func (x *tree) write(path string, data []byte) error {
	if x.busy > 0 {
		x.busy--
		return &fs.PathError{Op: "write", Path: path, Err: syscall.EBUSY}
	}
	dir, name := filepath.Split(path)
	if name != "inblob" {
		x.registry[name] = bytes.Clone(data)
		return nil
	}
	if x.ignore {
		return nil
	}
	quote := append(bytes.Clone(data), make([]byte, max(0, x.size-len(data)))...)
	x.must(os.WriteFile(filepath.Join(dir, "outblob"), quote, 0o600))
	x.must(os.WriteFile(filepath.Join(dir, "generation"), fmt.Appendf(nil, "%d\n", 1+x.others), 0o600))
	return nil
}

func (x *tree) open() *TDX {
	x.t.Helper()
	tee, err := open(x.t.Context(), x.k)
	x.must(err)
	return tee
}

func wantCode(t *testing.T, err error, code, says string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want code %s", code)
	}
	if fault.Code(err) != code || !strings.Contains(err.Error(), says) {
		t.Fatalf("error %q has code %q, want %q, saying %q", err, fault.Code(err), code, says)
	}
}

func TestOpen(t *testing.T) {
	x := newTree(t)
	tee := x.open()
	if tee.Kind() != dstack.TDX {
		t.Errorf("kind %s", tee.Kind())
	}
	if len(x.entries) != 0 {
		t.Errorf("entries left behind: %v", x.entries)
	}
	t.Run("without the device the provider decides", func(t *testing.T) {
		x := newTree(t)
		x.must(os.Remove(x.k.device))
		x.open()
	})
	for _, test := range []struct {
		name   string
		change func(x *tree)
	}{
		{"no device and no report interface", func(x *tree) { os.Remove(x.k.device); os.Remove(x.k.report) }},
		{"no device and no provider", func(x *tree) {
			os.Remove(x.k.device)
			x.k.mkdir = func(path string) error { return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENXIO} }
		}},
		{"no device and the provider of another TEE", func(x *tree) { os.Remove(x.k.device); x.provider = "sev_guest\n" }},
	} {
		t.Run("absent: "+test.name, func(t *testing.T) {
			x := newTree(t)
			test.change(x)
			if _, err := open(t.Context(), x.k); !errors.Is(err, collect.ErrAbsent) {
				t.Fatalf("error %v, want ErrAbsent", err)
			}
		})
	}
	for _, test := range []struct {
		name   string
		change func(x *tree)
		code   string
	}{
		{"a device without report interface", func(x *tree) { os.Remove(x.k.report) }, "tsm_missing"},
		{"a device with the provider of another TEE", func(x *tree) { x.provider = "sev_guest\n" }, "tee_provider"},
		{"a report interface that something else imitates", func(x *tree) { x.badFS = x.k.report }, "tee_filesystem"},
		{"the same without a device", func(x *tree) { x.badFS = x.k.report; os.Remove(x.k.device) }, "tee_filesystem"},
	} {
		t.Run("broken, hence not absent: "+test.name, func(t *testing.T) {
			x := newTree(t)
			test.change(x)
			_, err := open(t.Context(), x.k)
			wantCode(t, err, test.code, "")
			if errors.Is(err, collect.ErrAbsent) {
				t.Fatal("a broken TEE counts as absent")
			}
		})
	}
}

func TestQuote(t *testing.T) {
	data := dstack.ReportData{1, 2, 3}
	x := newTree(t)
	tee := x.open()
	quote, err := tee.Quote(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	if len(quote) != 5000 || !bytes.HasPrefix(quote, data[:]) {
		t.Errorf("quote of %d bytes over %x", len(quote), quote[:64])
	}
	if len(x.entries) != 0 {
		t.Errorf("entries left behind: %v", x.entries)
	}
	t.Run("waits while the host is busy", func(t *testing.T) {
		x.busy, x.slept = busyTries-1, 0
		if _, err := tee.Quote(t.Context(), data); err != nil || x.slept < 2*busyWait {
			t.Fatalf("slept %v, %v", x.slept, err)
		}
	})
	t.Run("but not forever", func(t *testing.T) {
		x.busy = busyTries
		_, err := tee.Quote(t.Context(), data)
		wantCode(t, err, "quote_failed", "busy")
		x.busy = 0
	})
	t.Run("nor beyond its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		x.busy = 1
		if _, err := tee.Quote(ctx, data); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		x.busy = 0
	})
	t.Run("takes the place of an entry that a killed process left", func(t *testing.T) {
		x.must(x.mkdir(filepath.Join(x.k.report, fmt.Sprintf("dstack-%d-%d", os.Getpid(), tee.entries+1))))
		if _, err := tee.Quote(t.Context(), data); err != nil {
			t.Fatal(err)
		}
	})
	for _, test := range []struct {
		name   string
		change func(x *tree)
		says   string
	}{
		{"report data that the kernel did not take", func(x *tree) { x.ignore = true }, "took no report data"},
		{"an entry that someone else wrote to", func(x *tree) { x.others = 1 }, "someone else"},
		{"a quote of 1020 bytes", func(x *tree) { x.size = 1020 }, "1020 bytes"},
		{"a quote of 8192 bytes", func(x *tree) { x.size = 8192 }, "8192 bytes"},
		{"an endless quote", func(x *tree) { x.size = 1 << 20 }, "more than"},
		{"an interface that something else took over", func(x *tree) { x.badFS = x.k.report }, "foreign"},
	} {
		t.Run("refuses "+test.name, func(t *testing.T) {
			x := newTree(t)
			tee := x.open()
			test.change(x)
			_, err := tee.Quote(t.Context(), data)
			wantCode(t, err, "quote_failed", test.says)
			if len(x.entries) != 0 {
				t.Errorf("entries left behind: %v", x.entries)
			}
		})
	}
	t.Run("refuses a quote made while someone else wrote", func(t *testing.T) {
		x := newTree(t)
		tee := x.open()
		// The count moves between our check and the read of the quote.
		write := x.k.write
		x.k.write = func(path string, data []byte) error {
			err := write(path, data)
			fifo := filepath.Join(filepath.Dir(path), "outblob")
			x.must(os.Remove(fifo))
			x.must(syscall.Mkfifo(fifo, 0o600))
			go func() {
				out, err := os.OpenFile(fifo, os.O_WRONLY, 0)
				if err != nil {
					return
				}
				os.WriteFile(filepath.Join(filepath.Dir(path), "generation"), []byte("2\n"), 0o600)
				out.Write(make([]byte, 5000))
				out.Close()
			}()
			return err
		}
		_, err := tee.Quote(t.Context(), data)
		wantCode(t, err, "quote_failed", "someone else")
	})
	t.Run("serves many at once", func(t *testing.T) {
		x := newTree(t)
		tee := x.open()
		var wg sync.WaitGroup
		for i := range byte(8) {
			wg.Go(func() {
				quote, err := tee.Quote(t.Context(), dstack.ReportData{i})
				if err != nil || quote[0] != i {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		wg.Wait()
	})
}

func TestExtend(t *testing.T) {
	x := newTree(t)
	tee := x.open()
	for _, register := range []int{2, 3} {
		digest := dstack.Measurement{byte(register)}
		if err := tee.Extend(t.Context(), register, digest); err != nil {
			t.Fatal(err)
		}
		if got := x.registry[fmt.Sprintf("rtmr%d:sha384", register)]; !bytes.Equal(got, digest[:]) {
			t.Errorf("register %d was given %x", register, got)
		}
	}
	clear(x.registry)
	for _, register := range []int{-1, 0, 1, 4} {
		wantCode(t, tee.Extend(t.Context(), register, dstack.Measurement{}), "register_not_extendable", "")
	}
	if len(x.registry) != 0 {
		t.Error("a refused extend was written")
	}
	x.busy = 1
	wantCode(t, tee.Extend(t.Context(), 3, dstack.Measurement{}), "extend_failed", "busy")
	x.badFS = x.k.rtmr
	wantCode(t, tee.Extend(t.Context(), 3, dstack.Measurement{}), "extend_failed", "foreign")
	x.badFS = ""
	x.must(os.RemoveAll(x.k.rtmr))
	err := tee.Extend(t.Context(), 3, dstack.Measurement{})
	wantCode(t, err, "extend_failed", "no such file")
	if !strings.Contains(fault.Fix(err), "6.16") {
		t.Errorf("fix %q", fault.Fix(err))
	}
}

func TestBootLog(t *testing.T) {
	x := newTree(t)
	tee := x.open()
	_, err := tee.BootLog(t.Context())
	wantCode(t, err, "boot_log", "no such file")
	x.must(os.WriteFile(x.k.ccel, []byte("nonsense"), 0o600))
	_, err = tee.BootLog(t.Context())
	wantCode(t, err, "boot_log", "")
	x.must(os.WriteFile(x.k.ccel, make([]byte, eventlog.MaxCCEL+1), 0o600))
	_, err = tee.BootLog(t.Context())
	wantCode(t, err, "boot_log", "more than")

	x.must(os.WriteFile(x.k.ccel, testkit.Vectors(t, "attestation/event-logs/ccel.bin"), 0o600))
	events, err := tee.BootLog(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(events) == 0 {
		t.Fatal("no events")
	}
	for i, e := range events {
		if e.IMR > 2 {
			t.Errorf("event %d is for register %d", i, e.IMR)
		}
	}
	x.badFS = x.root
	_, err = tee.BootLog(t.Context())
	wantCode(t, err, "boot_log", "foreign")
}

func TestWriteOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "attribute")
	if err := writeOnce(path, []byte("x")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("made a file that was not there: %v", err)
	}
	if err := os.WriteFile(path, []byte("abc"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeOnce(path, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); string(got) != "xbc" {
		t.Errorf("file holds %q", got)
	}
}

func TestCheckFS(t *testing.T) {
	if err := checkFS(t.TempDir(), configfsMagic); fault.Code(err) != "tee_filesystem" {
		t.Errorf("an ordinary directory passes for configfs: %v", err)
	}
	if err := checkFS("/sys", sysfsMagic); err != nil {
		t.Skipf("SKIP: /sys of this machine is not sysfs: %v", err)
	}
}

// The driver must not be led elsewhere by its environment (threats.md B13).
func TestEnvironmentIsIgnored(t *testing.T) {
	x := newTree(t)
	for _, name := range []string{"DCAP_TDX_QUOTE_CONFIGFS_PATH", "DCAP_TDX_RTMR_SYSFS_PATH", "DSTACK_CCEL_FILE"} {
		t.Setenv(name, x.k.report)
	}
	if _, err := os.Stat(guestDevice); err == nil {
		t.Skip("SKIP: this machine is a TD")
	}
	if _, err := Driver().Open(t.Context(), collect.Env{}); !errors.Is(err, collect.ErrAbsent) {
		t.Fatalf("found a TEE where there is none: %v", err)
	}
}
