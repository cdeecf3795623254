// SPDX-License-Identifier: Apache-2.0

package simtee

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
)

// LaunchSpec says what the VM is started with. The VMM writes it as JSON.
type LaunchSpec struct {
	Firmware    string            `json:"firmware"` // path
	Kernel      string            `json:"kernel"`   // path
	Initrd      string            `json:"initrd"`   // path
	Cmdline     string            `json:"cmdline"`
	VCPUs       int               `json:"vcpus"`
	MemoryBytes uint64            `json:"memory_bytes"`
	MRConfigID  dstack.MRConfigID `json:"mr_config_id"`
	// VMConfig is the vm_config text of the VM. The ACPI digests of RTMR0 are those
	// that QEMU would give a TD of this shape; of a shape without, or empty, they are
	// the digest of nothing.
	VMConfig string `json:"vm_config,omitempty"`
	// NoMachine says that there is no VM: the agent runs beside its simulated TEE (dstack
	// simulator). Nothing is launched, so that the registers begin as zeros, which no
	// image has, and files, vCPUs and vm_config must be absent.
	NoMachine bool `json:"no_machine,omitempty"`
	// Debug sets TD_ATTRIBUTES.DEBUG, which every verifier refuses; for negative
	// tests.
	Debug bool `json:"debug"`
}

// ParseLaunchSpec reads a launch file strictly. The code of every error is
// launch_malformed.
func ParseLaunchSpec(data []byte) (LaunchSpec, error) {
	var s LaunchSpec
	if err := strictjson.Decode(data, &s, strictjson.Limits{Size: 1 << 20, Depth: 2}); err != nil {
		return s, fault.Wrap(err, "launch_malformed", "launch file")
	}
	if s.NoMachine {
		if (s != LaunchSpec{NoMachine: true, MRConfigID: s.MRConfigID}) {
			return s, fault.New("launch_malformed", "launch file says no_machine and describes one")
		}
		return s, nil
	}
	for name, path := range map[string]string{"firmware": s.Firmware, "kernel": s.Kernel, "initrd": s.Initrd} {
		if path == "" {
			return s, fault.New("launch_malformed", "launch file names no %s", name)
		}
	}
	if s.VCPUs < 1 {
		return s, fault.New("launch_malformed", "launch file has %d vCPUs", s.VCPUs)
	}
	return s, nil
}

// StateFile is the name of the file that holds the registers.
const StateFile = "registers.json"

// state is what survives the process. Its form on disk is {"state":…,"sha256":…}.
type state struct {
	Version int                   `json:"version"` // 1
	Launch  LaunchSpec            `json:"launch"`
	Files   map[string]fileRecord `json:"files"` // what was measured
	MRTD    dstack.Measurement    `json:"mrtd"`
	RTMR    [4]dstack.Measurement `json:"rtmr"`
	Extends uint64                `json:"extends"` // how many were done
	BootLog []eventlog.Event      `json:"boot_log"`
}

type fileRecord struct {
	Size   int            `json:"size"`
	SHA256 collateral.Hex `json:"sha256"`
}

type stateFile struct {
	State  json.RawMessage `json:"state"`
	SHA256 collateral.Hex  `json:"sha256"` // of the compact form of state
}

// maxStateFile bounds the state file in bytes.
const maxStateFile = 1 << 20

// Machine is the simulated TEE of one VM. It is safe for concurrent use.
type Machine struct {
	pki    *PKI
	path   string
	unlock func()

	mu     sync.RWMutex
	state  state
	failed error // set when the state on disk is no longer known
}

// Open starts the TEE of a VM: it resumes the state in dir, or measures the
// launch when dir holds none. Codes: state_locked when another process has it,
// state_damaged, state_other_launch, and those of package measure.
func Open(pki *PKI, spec LaunchSpec, dir string) (m *Machine, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	unlock, err := lock(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	m = &Machine{pki: pki, path: filepath.Join(dir, StateFile), unlock: unlock}
	text, err := readLimited(m.path, maxStateFile)
	switch {
	case err == nil:
		if m.state, err = parseState(text); err != nil {
			return nil, fault.Wrap(err, "state_damaged", "register state %s", m.path).
				WithFix("the registers of this VM are lost: stop the VM, remove %s and start it again", dir)
		}
		if m.state.Launch != spec {
			return nil, fault.New("state_other_launch", "register state %s belongs to another launch", m.path).
				WithFix("a VM that starts anew needs a fresh state directory: remove %s", dir)
		}
		return m, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fault.Wrap(err, "state_damaged", "register state %s", m.path)
	}
	if m.state, err = launch(spec); err != nil {
		return nil, err
	}
	if err := m.write(m.state); err != nil {
		return nil, fmt.Errorf("write register state: %w", err)
	}
	return m, nil
}

// Close gives up the state directory.
func (m *Machine) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed == nil {
		m.failed = fault.New("tee_closed", "the simulated TEE is shutting down")
	}
	m.unlock()
}

// maxBootFile bounds each measured file in bytes.
const maxBootFile = 1 << 30

func launch(spec LaunchSpec) (state, error) {
	s := state{Version: 1, Launch: spec, Files: map[string]fileRecord{}}
	if spec.NoMachine {
		return s, nil
	}
	l := measure.Launch{Cmdline: spec.Cmdline, VCPUs: spec.VCPUs, MemoryBytes: spec.MemoryBytes}
	for _, file := range []struct {
		name, path string
		to         *[]byte
	}{{"firmware", spec.Firmware, &l.Firmware}, {"kernel", spec.Kernel, &l.Kernel}, {"initrd", spec.Initrd, &l.Initrd}} {
		data, err := readLimited(file.path, maxBootFile)
		if err != nil {
			return s, fault.Wrap(err, "launch_file", "read %s", file.name)
		}
		sum := sha256.Sum256(data)
		s.Files[file.name] = fileRecord{len(data), sum[:]}
		*file.to = data
	}
	if spec.VMConfig != "" {
		vm, err := measure.ParseVMConfig([]byte(spec.VMConfig))
		if err != nil {
			return s, err
		}
		if shape, err := vm.Shape(); err == nil {
			l.ACPI = &shape
		}
	}
	tdx, err := measure.ComputeTDX(l)
	if err != nil {
		return s, err
	}
	s.MRTD, s.RTMR[1], s.RTMR[2] = tdx.MRTD, tdx.RTMR1, tdx.RTMR2
	var acpi []dstack.Measurement
	if tdx.NoACPI != nil {
		empty := dstack.Measurement(sha512.Sum384(nil))
		acpi = []dstack.Measurement{empty, empty, empty}
	}
	if s.RTMR[0], err = tdx.ReplayRTMR0(acpi); err != nil {
		return s, err
	}
	s.BootLog = tdx.BootLog()
	return s, nil
}

// readLimited reads a regular file of at most limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, limit)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}

func (s state) marshal() ([]byte, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	return json.Marshal(stateFile{State: text, SHA256: sum[:]})
}

func parseState(text []byte) (s state, err error) {
	limits := strictjson.Limits{Size: maxStateFile, Depth: 8}
	var file stateFile
	if err := strictjson.Decode(text, &file, limits); err != nil {
		return s, err
	}
	if sum := sha256.Sum256(file.State); !bytes.Equal(sum[:], file.SHA256) {
		return s, errors.New("its checksum does not match its content")
	}
	if err := strictjson.Decode(file.State, &s, limits); err != nil {
		return s, err
	}
	if s.Version != 1 {
		return s, fmt.Errorf("version %d, want 1", s.Version)
	}
	// The registers that nobody can extend must be what the launch made them.
	for imr := range uint32(2) {
		if got, err := eventlog.Replay(s.BootLog, imr); err != nil || got != s.RTMR[imr] {
			return s, fmt.Errorf("register %d is not what its boot log replays to (%v)", imr, err)
		}
	}
	return s, nil
}

func (m *Machine) write(s state) error {
	text, err := s.marshal()
	if err != nil {
		return err
	}
	return durable.WriteFile(m.path, text, 0o600)
}

// Extend extends register 2 or 3 with a digest. When it returns nil the new value
// is durable. When the write fails the value on disk is unknown, and the machine
// refuses everything from then on (code state_unknown): a restart reads what is
// there. Code register_not_extendable for other registers.
func (m *Machine) Extend(register int, digest dstack.Measurement) error {
	if register != 2 && register != 3 {
		return fault.New("register_not_extendable", "register %d cannot be extended by a guest, only 2 and 3 can", register)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed != nil {
		return m.failed
	}
	next := m.state
	next.RTMR[register] = eventlog.Extend(next.RTMR[register], digest)
	next.Extends++
	if err := m.write(next); err != nil {
		m.failed = fault.Wrap(err, "state_unknown", "the register state could not be written; its content is unknown").
			WithFix("mend the disk of the state directory and restart dstack-simtee")
		return m.failed
	}
	m.state = next
	return nil
}

// Quote returns a quote over the registers as they are.
func (m *Machine) Quote(data dstack.ReportData) ([]byte, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.failed != nil {
		return nil, m.failed
	}
	return m.pki.Quote(Body{
		MRTD: m.state.MRTD, RTMR: m.state.RTMR, MRConfigID: m.state.Launch.MRConfigID,
		ReportData: data, Debug: m.state.Launch.Debug,
	})
}

// Registers returns MRTD and the four runtime registers.
func (m *Machine) Registers() (mrtd dstack.Measurement, rtmr [4]dstack.Measurement, err error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state.MRTD, m.state.RTMR, m.failed
}

// BootLog returns the launch events, imr 0 to 2.
func (m *Machine) BootLog() []eventlog.Event {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state.BootLog
}

// Serve makes the simulated TEE of one VM and answers requests on the socket until
// stop is closed. It calls ready once the socket listens.
func Serve(pkiDir, launchFile, stateDir, socket string, now time.Time, ready func(), stop <-chan struct{}) error {
	text, err := readLimited(launchFile, 1<<20)
	if err != nil {
		return fault.Wrap(err, "launch_malformed", "read launch file")
	}
	spec, err := ParseLaunchSpec(text)
	if err != nil {
		return err
	}
	pki, err := LoadPKI(pkiDir, now)
	if err != nil {
		return err
	}
	m, err := Open(pki, spec, stateDir)
	if err != nil {
		return err
	}
	defer m.Close()
	l, err := Listen(socket)
	if err != nil {
		return err
	}
	ready()
	return NewServer(m).Serve(l, stop)
}
