// SPDX-License-Identifier: Apache-2.0

// Package stack is the local stack: everything one machine needs to run apps,
// kept under one state directory and started and stopped as one thing.
//
// It holds the test PKI of the simulated TEE, one OS image, the VMM, a KMS, and the
// key and the policy by which that KMS decides.
// Up is idempotent: what already runs is left running. Down stops every process
// that Up or the VMM started, by its recorded process id and start time, and
// removes the state directory; nothing else on the machine is touched.
//
// The stack is development trust: its TEE is simulated unless the VMM's
// configuration names a real one.
package stack

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/keys/signer"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/egress"
)

// Stack is a local stack by its state directory.
type Stack struct {
	// Dir is the absolute path of the state directory, mode 0700.
	Dir string
	// Bin is the directory that holds dstack-vmm and dstack-simtee.
	Bin string
}

// DefaultDir returns the state directory for the calling user:
// $DSTACK_STATE, else $XDG_STATE_HOME/dstack, else ~/.local/state/dstack.
func DefaultDir() string {
	if dir := os.Getenv("DSTACK_STATE"); dir != "" {
		return dir
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "dstack")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		home = "/root"
	}
	return filepath.Join(home, ".local", "state", "dstack")
}

// Open returns the stack at dir without starting anything.
func Open(dir string) (*Stack, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return nil, err
	}
	return &Stack{Dir: abs, Bin: filepath.Dir(exe)}, nil
}

// Paths inside the state directory.
func (s *Stack) Socket() string     { return filepath.Join(s.Dir, "vmm.sock") }
func (s *Stack) ConfigFile() string { return filepath.Join(s.Dir, "vmm.toml") }
func (s *Stack) LogFile() string    { return filepath.Join(s.Dir, "vmm.log") }
func (s *Stack) PIDFile() string    { return filepath.Join(s.Dir, "vmm.pid") }
func (s *Stack) PKIDir() string     { return filepath.Join(s.Dir, "dev-pki") }
func (s *Stack) DevRoots() string   { return filepath.Join(s.PKIDir(), "dev-roots.json") }
func (s *Stack) ImagesDir() string  { return filepath.Join(s.Dir, "images") }
func (s *Stack) VolumesDir() string { return filepath.Join(s.Dir, "volumes") }

// DeployerKey returns the key by which this user's deployments sign apps' variables,
// making it at the first use. It is the stack's; its public half is in the manifests
// of those apps. Codes: those of package signer.
func (s *Stack) DeployerKey() (ed25519.PrivateKey, error) {
	path := filepath.Join(s.Dir, "deployer.key")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return signer.Create(path)
	}
	return signer.Open(path)
}

// HTTP returns a client that reaches the VMM's socket whatever host the URL names.
func (s *Stack) HTTP() *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", s.Socket())
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
}

// VMM returns a client of the VMM's RPC service.
func (s *Stack) VMM() *prpc.Client {
	return &prpc.Client{BaseURL: "http://vmm/prpc", HTTP: s.HTTP()}
}

// Responding reports whether the VMM answers on its socket.
func (s *Stack) Responding(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://vmm/prpc/Version", nil)
	if err != nil {
		return false
	}
	resp, err := s.HTTP().Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
	return resp.StatusCode == http.StatusOK
}

// Require returns an error naming the fix when the VMM does not answer.
func (s *Stack) Require(ctx context.Context) error {
	if s.Responding(ctx) {
		return nil
	}
	return fault.New("stack_down", "no VMM answers at %s", s.Socket()).WithFix("run `dstack up`, or name another stack with --state")
}

// UpOptions says what Up starts with.
type UpOptions struct {
	// ImageDir is a verified OS image release directory; Up copies it into the
	// state directory under its own name.
	ImageDir string
	// TEE is sim (default) or tdx.
	TEE string
	// NoKMS starts no KMS: apps then have keys of their own boot only.
	NoKMS bool
	// ConfidentialKMS names the KMSs that will run in CVMs, in place of one that is a
	// process of this machine; guests are told where they will be.
	ConfidentialKMS []string
	// Chain has the KMS decide by a development chain, in place of a signed policy. A
	// stack that began with one keeps it.
	Chain bool
	// GuestReaches is what guests reach of this machine and its networks beside the
	// stack's own services, as the VMM's egress_allow. A stack keeps what it was told.
	GuestReaches []string
	// Step is told what Up does, one line each; may be nil.
	Step func(format string, args ...any)
}

// Up makes the state directory, the test PKI, places the image and starts the VMM.
func (s *Stack) Up(ctx context.Context, opt UpOptions) error {
	step := opt.Step
	if step == nil {
		step = func(string, ...any) {}
	}
	if opt.TEE == "" {
		opt.TEE = "sim"
	}
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return fault.Wrap(err, "state_dir", "make the state directory %s", s.Dir).WithFix("choose a writable directory with --state or DSTACK_STATE")
	}
	if n := len(s.Socket()); n > 90 {
		return fault.New("state_path_long", "the state directory's path is too long for unix sockets (%d bytes with the socket's name)", n).
			WithFix("choose a shorter directory with --state")
	}
	if opt.TEE == "sim" {
		if _, err := os.Stat(s.DevRoots()); errors.Is(err, fs.ErrNotExist) {
			step("make a test PKI for the simulated TEE (development trust only)")
			if err := s.run(ctx, "dstack-simtee", "pki", "--out", s.PKIDir()); err != nil {
				return err
			}
		}
	}
	if opt.ImageDir != "" {
		if err := s.placeImage(opt.ImageDir, step); err != nil {
			return err
		}
	}
	var guestKMS []string
	if opt.Chain || s.GovernedByChain() {
		if err := s.governByChain(ctx, step); err != nil {
			return err
		}
	} else if !opt.NoKMS {
		if err := s.foundPolicy(opt.TEE); err != nil {
			return err
		}
	}
	for _, name := range opt.ConfidentialKMS {
		port, err := s.KMSPort(name)
		if err != nil {
			return err
		}
		guestKMS = append(guestKMS, fmt.Sprintf("https://%s:%d", GuestHost, port))
	}
	if !opt.NoKMS && opt.ConfidentialKMS == nil {
		k, err := s.startKMS(ctx, opt.TEE, step)
		if err != nil {
			return err
		}
		for _, n := range k.Nodes {
			guestKMS = append(guestKMS, n.GuestURL)
		}
	}
	allow, added, err := s.guestReaches(opt.GuestReaches)
	if err != nil {
		return err
	}
	if s.Responding(ctx) {
		step("the VMM is running already")
		if added {
			step("what its guests reach changes when it starts again: dstack down --keep, then dstack up")
		}
		return nil
	}
	if err := s.writeConfig(opt.TEE, guestKMS, allow); err != nil {
		return err
	}
	step("start the VMM")
	return s.startVMM(ctx)
}

func (s *Stack) run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(s.Bin, name), args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fault.Wrap(err, "binary_missing", "%s is not beside dstack", name).WithFix("run `make build` and use bin/dstack")
		}
		return fmt.Errorf("%s %s: %w\n%s", name, args[0], err, out)
	}
	return nil
}

// placeImage copies a release directory into the stack, by hard links where
// the file system allows it. An image of the same digest is left alone.
func (s *Stack) placeImage(dir string, step func(string, ...any)) error {
	name := filepath.Base(dir)
	target := filepath.Join(s.ImagesDir(), name)
	want, err := os.ReadFile(filepath.Join(dir, "digest.txt"))
	if err != nil {
		return fault.Wrap(err, "image_missing", "read the image at %s", dir).WithFix("build it with `dstack image build`")
	}
	if have, err := os.ReadFile(filepath.Join(target, "digest.txt")); err == nil && string(have) == string(want) {
		return nil
	}
	step("place the image %s", name)
	temp := target + ".new"
	if err := os.RemoveAll(temp); err != nil {
		return err
	}
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		if err := copyFile(filepath.Join(dir, e.Name()), filepath.Join(temp, e.Name())); err != nil {
			return fault.Wrap(err, "image_copy", "copy %s into the stack", e.Name()).WithFix("check the free space of %s", s.Dir)
		}
	}
	if err := os.RemoveAll(target); err != nil {
		return err
	}
	return os.Rename(temp, target)
}

// PlaceVolume copies a volume's image to where VMs can be given it, under a name that
// tells its content. One of that name is left alone. It is a copy: what its owner
// does to the file later must not reach an app.
func (s *Stack) PlaceVolume(file, name string) error {
	target := filepath.Join(s.VolumesDir(), name)
	if _, err := os.Stat(target); err == nil {
		return nil
	}
	if err := durable.MkdirAll(s.VolumesDir(), 0o700); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(s.VolumesDir(), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if err := copyContent(file, filepath.Join(temp, name)); err != nil {
		return fault.Wrap(err, "volume_copy", "copy %s into the stack", file).WithFix("check the free space of %s", s.Dir)
	}
	return os.Rename(filepath.Join(temp, name), target)
}

func copyFile(from, to string) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	return copyContent(from, to)
}

func copyContent(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	if err := out.Sync(); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// guestReaches adds to what guests reach, and returns all of it: what this and earlier
// Ups were told, and the gateway, for guests go there. The VMM itself adds the KMSs.
// Code guest_reaches.
func (s *Stack) guestReaches(more []string) (all []string, added bool, err error) {
	path := filepath.Join(s.Dir, "guest-reaches.json")
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	for _, m := range more {
		if _, err := egress.ParseAllow(m); err != nil {
			return nil, false, fault.Wrap(err, "guest_reaches", "what guests reach").WithFix("write 127.0.0.1:8000/tcp for a port of this machine's loopback")
		}
		if !slices.Contains(all, m) {
			all, added = append(all, m), true
		}
	}
	if added {
		if text, err = json.Marshal(all); err != nil {
			return nil, false, err
		}
		if err := durable.WriteFile(path, text, 0o600); err != nil {
			return nil, false, err
		}
	}
	p, err := s.gatewayPorts()
	if err != nil {
		return nil, false, err
	}
	return append(all, fmt.Sprintf("127.0.0.1:%d/tcp", p.RPC), fmt.Sprintf("127.0.0.1:%d/udp", p.WG)), added, nil
}

func (s *Stack) writeConfig(tee string, kms, allow []string) error {
	urls, err := json.Marshal(kms) // an array of strings is the same in TOML
	if err != nil {
		return err
	}
	if kms == nil {
		urls = []byte("[]")
	}
	reach, err := json.Marshal(allow)
	if err != nil {
		return err
	}
	text := fmt.Sprintf(`# Written by dstack up.
address = %q
state_dir = %q

[cvm]
tee = %q
tee_helper = %q
tee_pki = %q
kms_urls = %s

[cvm.networking]
egress_allow = %s
`, "unix:"+s.Socket(), s.Dir, tee, filepath.Join(s.Bin, "dstack-simtee"), s.PKIDir(), urls, reach)
	return durable.WriteFile(s.ConfigFile(), []byte(text), 0o600)
}

// spawn starts a program of the stack, which outlives this command.
func (s *Stack) spawn(program, logFile, pidFile string, args ...string) (*process.Spawned, error) {
	p, err := process.Spawn(exec.Command(filepath.Join(s.Bin, program), args...), logFile, pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, "binary_missing", "start %s", program).WithFix("run `make build` and use bin/dstack")
	}
	return p, err
}

func (s *Stack) startVMM(ctx context.Context) error {
	p, err := s.spawn("dstack-vmm", s.LogFile(), s.PIDFile(), "serve", "--config", s.ConfigFile())
	if err != nil {
		return err
	}
	deadline := time.After(60 * time.Second)
	for {
		if s.Responding(ctx) {
			return nil
		}
		select {
		case <-p.Exited:
			return fault.New("vmm_start", "the VMM stopped while starting:\n%s", p.Tail()).WithFix("run `dstack doctor`; the whole log is %s", s.LogFile())
		case <-deadline:
			return fault.New("vmm_start", "the VMM did not answer within 60 s:\n%s", p.Tail()).WithFix("see %s", s.LogFile())
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// StopVMM asks the VMM to stop and waits for it; VMs go on running. A VMM that
// does not stop within the grace time is killed.
func (s *Stack) StopVMM(grace time.Duration) error { return process.StopRecorded(s.PIDFile(), grace) }

// RemoveState deletes the state directory.
func (s *Stack) RemoveState() error {
	if _, err := os.Stat(s.ConfigFile()); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(s.PKIDir()); errors.Is(err, fs.ErrNotExist) {
			return nil // not a directory that Up made
		}
	}
	return os.RemoveAll(s.Dir)
}

// Restart starts the VMM of a stack that has been up before.
func (s *Stack) Restart(ctx context.Context) error {
	if s.Responding(ctx) {
		return nil
	}
	return s.startVMM(ctx)
}
