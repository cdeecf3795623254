// SPDX-License-Identifier: Apache-2.0

// Package tdx collects evidence from Intel TDX inside a guest: quotes through the
// kernel's configfs-tsm, extends of runtime registers through the sysfs attributes
// of the TDX guest driver (Linux 6.16 and later), and the firmware's event log
// from the ACPI table CCEL.
//
// It has been tested against a directory tree that imitates the kernel's, not on
// hardware.
//
// All paths are constants, and the file systems behind them are checked to be the
// kernel's: no environment variable, file or flag leads the driver elsewhere
// (threats.md B13). Trusted: the guest's kernel. The host decides whether and when
// a quote is made, so calls are bounded in time; what comes back is checked for
// its form by size only, since the relying party verifies it.
//
// Implements spec/attestation.md §1.1 and §1.2 (without the vsock path, which
// configfs-tsm replaces).
package tdx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/collect"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// Where the kernel shows the TEE.
const (
	reportDir   = "/sys/kernel/config/tsm/report"
	guestDevice = "/dev/tdx_guest"
	rtmrDir     = "/sys/devices/virtual/misc/tdx_guest/measurements"
	ccelFile    = "/sys/firmware/acpi/tables/data/CCEL"

	provider = "tdx_guest"
)

// Magic numbers of file systems (linux/magic.h; configfs has its own in
// fs/configfs/mount.c).
const (
	configfsMagic = 0x62656570
	sysfsMagic    = 0x62656572
)

// Bounds (spec/attestation.md §1.2).
const (
	minQuote = 1020 // exclusive
	maxQuote = 8192 // exclusive

	busyTries  = 3
	busyWait   = 10 * time.Second
	settleStep = 10 * time.Millisecond
	settleTime = 5 * time.Second
)

// errEntryTaken says that someone else wrote to our report entry.
var errEntryTaken = errors.New("the report entry was written by someone else")

// Driver finds TDX on this machine.
func Driver() collect.Driver {
	return collect.Driver{Name: "TDX", Open: func(ctx context.Context, _ collect.Env) (collect.TEE, error) {
		return open(ctx, &kernel{
			report: reportDir, device: guestDevice, rtmr: rtmrDir, ccel: ccelFile,
			mkdir: func(path string) error { return os.Mkdir(path, 0o700) }, rmdir: syscall.Rmdir,
			checkFS: checkFS, write: writeOnce, sleep: sleep,
		})
	}}
}

// kernel is what the driver touches. Production code has one instance of it, with
// the constants above; tests have a directory tree.
type kernel struct {
	report, device, rtmr, ccel string

	mkdir   func(path string) error
	rmdir   func(path string) error
	checkFS func(path string, magic int64) error
	write   func(path string, data []byte) error
	sleep   func(ctx context.Context, d time.Duration) error
}

// TDX is the TEE of this machine. It is safe for concurrent use.
type TDX struct {
	k *kernel

	mu      sync.Mutex // the driver is not concurrent
	entries int
}

var (
	_ collect.TEE      = (*TDX)(nil)
	_ collect.Extender = (*TDX)(nil)
	_ collect.Logger   = (*TDX)(nil)
)

func open(ctx context.Context, k *kernel) (*TDX, error) {
	_, deviceErr := os.Stat(k.device)
	if deviceErr != nil && !errors.Is(deviceErr, fs.ErrNotExist) {
		return nil, deviceErr
	}
	hasDevice := deviceErr == nil
	t := &TDX{k: k}
	err := t.withEntry(func(entry string) error {
		name, err := readSmall(filepath.Join(entry, "provider"))
		if err != nil {
			return err
		}
		if got := strings.TrimSpace(string(name)); got != provider {
			return fmt.Errorf("%w: reports come from %.40q", collect.ErrAbsent, got)
		}
		return nil
	})
	if err == nil {
		return t, nil
	}
	// Without the device, a missing directory (no TSM support) and ENXIO (no
	// provider registered) say that there is no TDX.
	if !hasDevice && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENXIO)) {
		return nil, collect.ErrAbsent
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, "tsm_missing", "%s exists, but the kernel's report interface does not", k.device).
			WithFix("mount configfs on /sys/kernel/config; the kernel needs CONFIG_TSM_REPORTS")
	}
	if hasDevice && errors.Is(err, collect.ErrAbsent) {
		// The device is TDX's, so another provider is a fault, not an absence.
		return nil, fault.New("tee_provider", "%s exists, but quotes are not its: %v", k.device, err)
	}
	return nil, err
}

// Kind is TDX.
func (t *TDX) Kind() dstack.TEE { return dstack.TDX }

// withEntry makes a report entry of its own, which the kernel's interface gives
// each client so that they do not mix, calls f and removes it.
func (t *TDX) withEntry(f func(entry string) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, err := os.Stat(t.k.report); err != nil {
		return err
	}
	if err := t.k.checkFS(t.k.report, configfsMagic); err != nil {
		return err
	}
	t.entries++
	entry := filepath.Join(t.k.report, "dstack-"+strconv.Itoa(os.Getpid())+"-"+strconv.Itoa(t.entries))
	err := t.k.mkdir(entry)
	if errors.Is(err, fs.ErrExist) {
		// Left by a process that was killed and had our number.
		if err = t.k.rmdir(entry); err == nil {
			err = t.k.mkdir(entry)
		}
	}
	if err != nil {
		return fmt.Errorf("make report entry: %w", err)
	}
	defer t.k.rmdir(entry)
	return f(entry)
}

// Quote returns a quote over the report data. It takes up to a minute when the
// host's quoting service is busy; the context ends the waiting between tries. The
// code is quote_failed.
func (t *TDX) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	var quote []byte
	err := t.withEntry(func(entry string) (err error) {
		quote, err = t.quote(ctx, entry, data)
		return err
	})
	if err != nil {
		return nil, fault.Wrap(err, "quote_failed", "get a TDX quote")
	}
	return quote, nil
}

func (t *TDX) quote(ctx context.Context, entry string, data dstack.ReportData) ([]byte, error) {
	before, err := generation(entry)
	if err != nil {
		return nil, err
	}
	inblob := filepath.Join(entry, "inblob")
	if err := t.retry(ctx, func() error { return t.k.write(inblob, data[:]) }, syscall.EBUSY); err != nil {
		return nil, err
	}
	// The kernel counts writes. A count that grows by more than ours means that
	// the quote would be over someone else's data.
	for waited := time.Duration(0); ; waited += settleStep {
		now, err := generation(entry)
		if err != nil {
			return nil, err
		}
		if now == before+1 {
			break
		}
		if now != before {
			return nil, errEntryTaken
		}
		if waited >= settleTime {
			return nil, fmt.Errorf("the kernel took no report data in %v", settleTime)
		}
		if err := t.k.sleep(ctx, settleStep); err != nil {
			return nil, err
		}
	}
	var quote []byte
	outblob := filepath.Join(entry, "outblob")
	err = t.retry(ctx, func() (err error) {
		quote, err = readBounded(outblob, maxQuote)
		return err
	}, syscall.EBUSY, syscall.EINTR, syscall.ETIMEDOUT)
	if err != nil {
		return nil, err
	}
	after, err := generation(entry)
	if err != nil {
		return nil, err
	}
	if after != before+1 {
		return nil, errEntryTaken
	}
	if len(quote) <= minQuote || len(quote) >= maxQuote {
		return nil, fmt.Errorf("a quote of %d bytes is not one: want more than %d and less than %d", len(quote), minQuote, maxQuote)
	}
	return quote, nil
}

// retry tries again after the given errors, with a pause between tries.
func (t *TDX) retry(ctx context.Context, f func() error, on ...syscall.Errno) error {
	for try := 1; ; try++ {
		err := f()
		again := false
		for _, errno := range on {
			again = again || errors.Is(err, errno)
		}
		if !again || try == busyTries {
			return err
		}
		if err := t.k.sleep(ctx, busyWait); err != nil {
			return err
		}
	}
}

// Extend extends RTMR2 or RTMR3. Codes: register_not_extendable, extend_failed.
func (t *TDX) Extend(_ context.Context, register int, digest dstack.Measurement) error {
	if register != 2 && register != 3 {
		return fault.New("register_not_extendable", "register %d cannot be extended by a guest, only 2 and 3 can", register)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	path := filepath.Join(t.k.rtmr, fmt.Sprintf("rtmr%d:sha384", register))
	if _, err := os.Stat(path); err != nil {
		return fault.Wrap(err, "extend_failed", "extend RTMR%d", register).
			WithFix("use a kernel from 6.16 with CONFIG_TSM_MEASUREMENTS and the TDX guest driver")
	}
	if err := t.k.checkFS(t.k.rtmr, sysfsMagic); err != nil {
		return fault.Wrap(err, "extend_failed", "extend RTMR%d", register)
	}
	if err := t.k.write(path, digest[:]); err != nil {
		return fault.Wrap(err, "extend_failed", "extend RTMR%d", register)
	}
	return nil
}

// BootLog returns the firmware's events, imr 0 to 2. The code is boot_log.
func (t *TDX) BootLog(context.Context) ([]eventlog.Event, error) {
	if err := t.k.checkFS(filepath.Dir(t.k.ccel), sysfsMagic); err != nil {
		return nil, fault.Wrap(err, "boot_log", "read the firmware's event log")
	}
	data, err := readBounded(t.k.ccel, eventlog.MaxCCEL)
	if err != nil {
		return nil, fault.Wrap(err, "boot_log", "read the firmware's event log")
	}
	events, err := eventlog.ParseCCEL(data)
	if err != nil {
		return nil, fault.Wrap(err, "boot_log", "read the firmware's event log")
	}
	kept := events[:0]
	for _, e := range events {
		if e.IMR <= 2 {
			kept = append(kept, e)
		}
	}
	return kept, nil
}

func generation(entry string) (uint64, error) {
	text, err := readSmall(filepath.Join(entry, "generation"))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(text)), 10, 63)
	if err != nil {
		return 0, fmt.Errorf("generation of the report entry: %w", err)
	}
	return n, nil
}

func readSmall(path string) ([]byte, error) { return readBounded(path, 256) }

// readBounded reads a file of at most limit bytes. Attributes of configfs and
// sysfs do not know their size, so it reads until the end.
func readBounded(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, err
	}
	if len(data) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, nil
}

// writeOnce writes an attribute with a single system call: the kernel takes each
// call as a value of its own, so a rest must not be written after a short one, and
// an interrupted one must not be repeated unseen (an extend is not idempotent).
func writeOnce(path string, data []byte) error {
	fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	n, err := syscall.Write(fd, data)
	// configfs hands a binary attribute to the driver when the file is closed, and
	// drops the driver's verdict: that it was taken shows in the generation.
	closeErr := syscall.Close(fd)
	switch {
	case err != nil:
		return &fs.PathError{Op: "write", Path: path, Err: err}
	case n != len(data):
		return &fs.PathError{Op: "write", Path: path, Err: io.ErrShortWrite}
	case closeErr != nil:
		return &fs.PathError{Op: "close", Path: path, Err: closeErr}
	}
	return nil
}

// checkFS refuses a directory that is not the kernel's own: something mounted over
// it could answer in its place.
func checkFS(path string, magic int64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if int64(st.Type) != magic {
		return fault.New("tee_filesystem", "%s is not on the kernel's file system (magic %#x, want %#x)", path, st.Type, magic)
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
