// SPDX-License-Identifier: Apache-2.0

// Package vmm creates, starts, watches, stops and removes confidential VMs on one
// host, and serves the management API of spec/vmm.md.
//
// # Guarantees
//
//   - A VM is a directory; it appears whole or not at all, and what was
//     acknowledged survives a power cut.
//   - VMs outlive this process. Whoever takes over the state directory adopts
//     those that run, finishes what was begun, and never starts a second QEMU or
//     TEE beside a first (packages lifecycle and proc).
//   - An update of a VM takes effect whole or not at all, and never on a run under
//     way. App id, instance and data disk stay; the disk never shrinks.
//   - A VM whose directory cannot be read is shown as broken; it is neither
//     deleted nor killed.
//   - Guests reach the internet and not this machine or its networks, where this
//     program may see to it (package egress); where not, it says so.
//   - Nothing listens on TCP without a token; the unix socket is mode 0600.
//   - What a guest sends (hostlink, console) is bounded in memory and on disk.
//
// # Trust
//
// A confidential VM does not trust this program: identity and content are measured
// and checked inside. This program trusts its state directory, its configuration
// and QEMU's binary. It does not trust guests, what they report, uploaded blobs,
// or callers beyond what their token or file permissions say.
//
// Implements spec/vmm.md §2–§5, §6.3, §7 (user network), §9. Not in this version:
// automatic restarts (off, and no option), GPUs, bridged networks.
package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/blob"
	"github.com/dstack-go/dstack/vmm/egress"
	"github.com/dstack-go/dstack/vmm/history"
	"github.com/dstack-go/dstack/vmm/keyprovider"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// Options are what a program passes beside the configuration.
type Options struct {
	Log      *slog.Logger // nil: nowhere
	Version  string       // without "v"
	Revision string

	// For tests: another argument list for QEMU, further environment of children,
	// and a hook at the points where a crash would matter.
	args     func(qemu.Spec) ([]string, error)
	childEnv []string
	crash    func(point string)
}

// Server is one VMM on one state directory.
type Server struct {
	config   Config
	log      *slog.Logger
	version  string
	revision string
	args     func(qemu.Spec) ([]string, error)
	childEnv []string
	crash    func(string)

	ctx    context.Context // ends with the server
	cancel context.CancelFunc
	group  sync.WaitGroup
	lock   *os.File
	blobs  *blob.Store
	sealer *keyprovider.Client // nil: there is no local key provider
	past   *history.Store      // nil: it could not be opened
	egress *egress.Filter      // nil: guests are not filtered, as noEgress says
	pkiMu  sync.Mutex

	noEgress error // why there is no egress filter; nil: none was wanted

	createMu sync.Mutex // held while a VM is made, for names and ports

	mu     sync.Mutex
	vms    map[string]*vm
	broken map[string]error

	hostMu   sync.Mutex
	hostDone bool
	binary   *qemu.Binary
	accel    qemu.Choice

	imageMu sync.Mutex
	images  map[string]cachedImage
}

type cachedImage struct {
	stamp string
	image *osimage.Image
}

// Open takes over a state directory: it locks it, loads the VMs and continues
// them in the background. Close releases it; VMs keep running.
//
// Codes: state_dir_open, already_running.
func Open(config Config, opt Options) (*Server, error) {
	if err := config.Check(); err != nil {
		return nil, err
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{config: config, log: opt.Log, version: opt.Version, revision: opt.Revision, args: opt.args, childEnv: opt.childEnv, crash: opt.crash,
		vms: map[string]*vm{}, broken: map[string]error{}, images: map[string]cachedImage{}}
	if k := config.KeyProvider; k.Enabled {
		s.sealer = keyprovider.New(net.JoinHostPort(k.Address, strconv.Itoa(int(k.Port))))
	}
	if err := durable.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, diskFull(err, "make the state directory")
	}
	if fi, err := os.Stat(config.StateDir); err != nil {
		return nil, err
	} else if fi.Mode().Perm()&0o077 != 0 {
		return nil, fault.New("state_dir_open", "state directory %s can be used by others (mode %04o)", config.StateDir, fi.Mode().Perm()).
			WithFix("chmod 700 %s", config.StateDir)
	}
	if err := s.takeLock(); err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	// VMs do not depend on it.
	var err error
	if s.past, err = history.Open(s.ctx, filepath.Join(config.StateDir, "history.db"), history.DefaultLimits); err != nil {
		s.log.Error("no history is kept", "error", err, "fix", fault.Fix(err))
	}
	s.openEgress()
	if err := s.load(); err != nil {
		s.Close()
		return nil, err
	}
	s.group.Go(func() { s.sample(s.ctx) })
	s.group.Go(func() { s.host(s.ctx) }) // the probe takes a while; let it be done by the first start
	return s, nil
}

// takeLock makes this the only VMM of the state directory. A predecessor that was
// just killed may leave a child that holds the lock until it execs.
func (s *Server) takeLock() error {
	f, err := os.OpenFile(filepath.Join(s.config.StateDir, "vmm.lock"), os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			s.lock = f
			return nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(deadline) {
			f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				return fault.New("already_running", "another VMM uses the state directory %s", s.config.StateDir).
					WithFix("use that one, or stop it first")
			}
			return fmt.Errorf("lock the state directory: %w", err)
		}
	}
}

func (s *Server) vmsDir() string { return filepath.Join(s.config.StateDir, "vms") }

func (s *Server) load() error {
	for _, dir := range []string{s.vmsDir(), s.config.Image.Path} {
		if err := durable.MkdirAll(dir, 0o700); err != nil {
			return diskFull(err, "make the state directory")
		}
	}
	var err error
	if s.blobs, err = blob.Open(filepath.Join(s.config.StateDir, "blobs"), int64(s.config.Blobs.MaxSize), uint64(s.config.CVM.MinFreeDisk)); err != nil {
		return diskFull(err, "open the blob store")
	}
	entries, err := os.ReadDir(s.vmsDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.vmsDir(), e.Name())
		switch {
		case durable.Leftover(e.Name()): // half made or half removed
			if err := os.RemoveAll(path); err != nil {
				s.log.Warn("remove leftover", "path", path, "error", err)
			}
		case !idForm.MatchString(e.Name()) || !e.IsDir():
			s.log.Warn("not a VM directory", "path", path)
		default:
			v, err := loadVM(s, path, e.Name())
			if err != nil {
				s.log.Error("VM cannot be loaded; it is left as it is", "vm", e.Name(), "error", err)
				s.broken[e.Name()] = err
				continue
			}
			s.vms[e.Name()] = v
			s.run(v, true)
		}
	}
	return nil
}

// run starts the goroutine of a VM.
func (s *Server) run(v *vm, takeOver bool) {
	v.ready = make(chan struct{})
	s.group.Go(func() {
		for takeOver {
			err := v.takeOver(s.ctx)
			if err == nil {
				break
			}
			if s.ctx.Err() != nil {
				return
			}
			v.log.Warn("take over VM", "error", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
		close(v.ready)
		v.work(s.ctx)
	})
}

// forget drops a VM that was removed.
func (s *Server) forget(v *vm) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.vms[v.spec().ID] == v {
		delete(s.vms, v.spec().ID)
	}
}

// get returns a VM by id. Codes: vm_not_found, vm_broken.
func (s *Server) get(ctx context.Context, id string) (*vm, error) {
	s.mu.Lock()
	v, ok := s.vms[id]
	why, broken := s.broken[id]
	s.mu.Unlock()
	switch {
	case ok:
		select {
		case <-v.ready:
			return v, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	case broken:
		return nil, fault.Wrap(why, "vm_broken", "VM %s cannot be loaded", id).
			WithFix("mend or remove %s and restart the VMM", filepath.Join(s.vmsDir(), id))
	}
	return nil, fault.New("vm_not_found", "there is no VM %.80q", id).WithFix("list the VMs to see their ids")
}

// list returns all VMs, oldest first.
func (s *Server) list() []*vm {
	s.mu.Lock()
	out := make([]*vm, 0, len(s.vms))
	for _, v := range s.vms {
		out = append(out, v)
	}
	s.mu.Unlock()
	sort.Slice(out, func(i, j int) bool {
		a, b := out[i].spec(), out[j].spec()
		if a.CreatedAtMS != b.CreatedAtMS {
			return a.CreatedAtMS < b.CreatedAtMS
		}
		return a.ID < b.ID
	})
	return out
}

// host returns QEMU and the accelerator, found out once per process; a failure is
// not remembered, so that an installed QEMU is found without a restart.
func (s *Server) host(ctx context.Context) (*qemu.Binary, qemu.Choice, error) {
	s.hostMu.Lock()
	defer s.hostMu.Unlock()
	if s.hostDone {
		return s.binary, s.accel, nil
	}
	b, err := qemu.Find(ctx, s.config.CVM.QEMUPath)
	if err != nil {
		return nil, qemu.Choice{}, err
	}
	c, err := qemu.Choose(ctx, b, s.config.CVM.Accel)
	if err != nil {
		return nil, qemu.Choice{}, err
	}
	if ctx.Err() != nil { // a probe that was cut short says nothing
		return nil, qemu.Choice{}, ctx.Err()
	}
	s.binary, s.accel, s.hostDone = b, c, true
	s.log.Info("QEMU", "path", b.Path, "version", b.Version.String(), "machine", b.Machine, "accel", string(c.Accel), "why_not_kvm", c.WhyNotKVM)
	return b, c, nil
}

// loadImage returns a checked image. Files are hashed again when their size or
// time has changed.
func (s *Server) loadImage(name string) (*osimage.Image, error) {
	if err := checkImageName(name); err != nil {
		return nil, err
	}
	dir := filepath.Join(s.config.Image.Path, name)
	stamp := ""
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			stamp += fmt.Sprintf("%s %d %d\n", e.Name(), fi.Size(), fi.ModTime().UnixNano())
		}
	}
	s.imageMu.Lock()
	defer s.imageMu.Unlock()
	if c, ok := s.images[name]; ok && c.stamp == stamp {
		return c.image, nil
	}
	delete(s.images, name)
	img, err := osimage.Load(dir)
	if err != nil {
		return nil, err
	}
	s.images[name] = cachedImage{stamp, img}
	return img, nil
}

// Listen opens the configured socket. A stale unix socket is replaced; one that
// answers is not.
func (s *Server) Listen() (net.Listener, error) {
	network, addr, err := s.config.listen()
	if err != nil {
		return nil, err
	}
	if network == "tcp" {
		return net.Listen("tcp", addr)
	}
	if fi, err := os.Lstat(addr); err == nil {
		if fi.Mode()&fs.ModeSocket == 0 {
			return nil, fault.New("address_in_use", "%s exists and is not a socket", addr).WithFix("choose another address")
		}
		if c, err := net.Dial("unix", addr); err == nil {
			c.Close()
			return nil, fault.New("address_in_use", "another program listens on %s", addr).WithFix("choose another address")
		}
		if err := os.Remove(addr); err != nil {
			return nil, err
		}
	}
	// Bound under a private name first, so that the socket is never there with a
	// wider mode than 0600.
	tmp := addr + ".new"
	os.Remove(tmp)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, addr)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Serve answers the API until ctx ends, then lets requests finish for a moment.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := prpc.Server(s.Handler())
	srv.BaseContext = func(net.Listener) context.Context { return s.ctx }
	srv.ConnContext = withPeer
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.cancel() // streams end, waiting calls are told
		limit, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if srv.Shutdown(limit) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(l)
	if !stop() {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return err
}

// Close ends this VMM's work and releases the state directory. VMs keep running.
func (s *Server) Close() error {
	s.cancel()
	s.group.Wait()
	for _, v := range s.list() {
		v.mu.Lock()
		c := v.conn
		v.conn = nil
		v.mu.Unlock()
		if c != nil {
			c.close()
		}
	}
	if s.egress != nil {
		if err := s.egress.Close(); err != nil {
			s.log.Warn("remove the egress filter", "error", err)
		}
	}
	if s.past != nil {
		if err := s.past.Close(); err != nil {
			s.log.Warn("close the history", "error", err)
		}
	}
	return s.lock.Close()
}
