// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/hostlink"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/process"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/qemu"
	"github.com/dstack-go/dstack/vmm/qmp"
	"github.com/dstack-go/dstack/vmm/registry"
)

const hostlinkPort = hostlink.PortName

// connection is what ties this VMM to one run of a VM: QEMU's monitor and the
// host's end of the hostlink. It is made anew after a restart of the VMM.
type connection struct {
	v      *vm
	run    uint64
	link   *hostlink.Link
	guest  *prpc.Client
	cancel context.CancelFunc
	group  sync.WaitGroup
	stops  []func() error

	mu       sync.Mutex
	monitor  *qmp.Client
	shutdown string        // reason in QEMU's SHUTDOWN event
	ended    chan struct{} // closed when the monitor's connection has ended for good

	sealing sync.Mutex // held while the guest waits for the local key provider
}

func teeExited(run uint64) lifecycle.Input {
	return lifecycle.Input{Kind: lifecycle.TEEExited, Run: run}
}

// connect makes it so that QEMU is watched and talked to. It does not wait for
// either: QEMU may end, and the guest need not answer.
func (v *vm) connect(run uint64) error {
	v.mu.Lock()
	old := v.conn
	if old != nil && old.run == run {
		v.mu.Unlock()
		return nil
	}
	v.mu.Unlock()
	if old != nil {
		old.close()
	}
	c, err := newConnection(v, run)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.conn = c
	v.mu.Unlock()
	if v.spec().TEE == TEESim {
		if id, err := teeSlot(v.dir).Holder(); err == nil && id != nil {
			v.watchTEE(*id, run)
		}
	}
	id, err := qemuSlot(v.dir).Holder()
	if err != nil {
		return err
	}
	if id == nil {
		c.qemuEnded(nil)
		return nil
	}
	child := v.child(*id)
	v.watch(*id, func() {
		if child != nil {
			c.qemuEnded(child.Err())
		} else {
			c.qemuEnded(nil)
		}
	})
	return nil
}

func (v *vm) watchTEE(id process.ID, run uint64) {
	v.watch(id, func() {
		if v.state().Phase == lifecycle.Running {
			v.event(eventTEE, "the simulated TEE's process ended and is started again on its state")
		}
		v.post(teeExited(run))
	})
}

func newConnection(v *vm, run uint64) (*connection, error) {
	ctx, cancel := context.WithCancel(v.server.ctx)
	c := &connection{v: v, run: run, cancel: cancel, ended: make(chan struct{})}
	c.link = hostlink.NewHostLink(hostlink.DialUnix(filepath.Join(v.dir, qemu.HostlinkSock)), hostlink.Options{Log: v.log})
	c.stops = append(c.stops, c.link.Close)
	c.guest = prpc.NewClient("http://guest/api", func(ctx context.Context) (net.Conn, error) {
		return c.link.Open(ctx, hostlink.StreamGuestAPI)
	})
	services := map[string]http.Handler{
		hostlink.StreamHostAPI:  c.hostAPI(),
		hostlink.StreamRegistry: registry.Handler(v.server.blobs, v.closure()),
	}
	for name, h := range services {
		l, err := c.link.Listen(name)
		if err != nil {
			c.close()
			return nil, err
		}
		srv := prpc.Server(h)
		srv.MaxHeaderBytes = 32 << 10
		c.stops = append(c.stops, srv.Close)
		c.group.Go(func() { srv.Serve(l) })
	}
	if v.spec().TEE == TEESim {
		l, err := c.link.Listen(hostlink.StreamTEE)
		if err != nil {
			c.close()
			return nil, err
		}
		c.group.Go(func() { bridge(ctx, l, filepath.Join(v.dir, teeSock)) })
	}
	c.group.Go(func() { c.watchMonitor(ctx) })
	c.group.Go(func() {
		boundLogs(ctx, int64(v.server.config.CVM.Log.MaxBytes), filepath.Join(v.dir, qemu.SerialLog), filepath.Join(v.dir, stderrLog), filepath.Join(v.dir, teeLog), filepath.Join(v.dir, tpmLog))
	})
	return c, nil
}

func (c *connection) close() {
	c.cancel()
	for _, stop := range c.stops {
		stop()
	}
	c.group.Wait()
}

// watchMonitor keeps a connection to QEMU's monitor and remembers why QEMU says
// that it ends.
func (c *connection) watchMonitor(ctx context.Context) {
	defer close(c.ended)
	path := filepath.Join(c.v.dir, qemu.QMPSock)
	for wait := 20 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, time.Second) {
		dialCtx, cancel := context.WithTimeout(ctx, 10*time.Second)
		m, err := qmp.Dial(dialCtx, path)
		cancel()
		if err == nil {
			c.setMonitor(m)
			stop := context.AfterFunc(ctx, func() { m.Close() })
			for e := range m.Events() {
				c.monitorEvent(e)
			}
			stop()
			m.Close()
			c.setMonitor(nil)
			c.mu.Lock()
			over := c.shutdown != ""
			c.mu.Unlock()
			if over {
				return
			}
			wait = 20 * time.Millisecond
		} else if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
			return // QEMU made the socket before it was reported as started, so it is gone
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

func (c *connection) setMonitor(m *qmp.Client) {
	c.mu.Lock()
	c.monitor = m
	c.mu.Unlock()
}

func (c *connection) monitorEvent(e qmp.Event) {
	if e.Name != "SHUTDOWN" {
		return
	}
	var data struct {
		Reason string `json:"reason"`
	}
	json.Unmarshal(e.Data, &data)
	c.mu.Lock()
	c.shutdown = cut(data.Reason, 100)
	c.mu.Unlock()
}

// quit asks QEMU to end in good order.
func (c *connection) quit(ctx context.Context) error {
	c.mu.Lock()
	m := c.monitor
	c.mu.Unlock()
	if m == nil {
		return errors.New("not connected to QEMU's monitor")
	}
	return m.Execute(ctx, "quit", nil, nil)
}

// qemuEnded says why, by all that is known: what QEMU announced, how it exited,
// what the guest reported and printed.
func (c *connection) qemuEnded(exit error) {
	v := c.v
	// The monitor may still hold unread words.
	select {
	case <-c.ended:
	case <-time.After(time.Second):
	}
	c.mu.Lock()
	reason := c.shutdown
	c.mu.Unlock()
	x := &lifecycle.Exit{}
	panicked := lastMatching(filepath.Join(v.dir, qemu.SerialLog), "Kernel panic")
	bootError := v.getReport().Error
	var status *exec.ExitError
	switch {
	case bootError != "":
		x.Code, x.Reason = "boot_failed", bootError
	case reason == "guest-panic" || reason == "guest-reset" && panicked != "":
		x.Code, x.Reason = "guest_panic", "the guest's kernel panicked: "+plain(panicked)
	case reason == "guest-reset":
		x.Code, x.Reason = "guest_reset", "the guest asked for a reboot"
	case reason == "guest-shutdown":
		x.Code, x.Reason = codePoweroff, "the guest powered off"
	case errors.As(exit, &status):
		tail, _ := tailBytes(filepath.Join(v.dir, stderrLog), 1000)
		x.Code, x.Reason = "qemu_failed", fmt.Sprintf("QEMU ended (%v): %s", status, plain(strings.TrimSpace(string(tail))))
	case reason != "":
		x.Code, x.Reason = "qemu_ended", "QEMU ended: "+plain(reason)
	default:
		x.Code, x.Reason = "qemu_ended", "QEMU ended and did not say why"
	}
	x.Reason = cut(x.Reason, 2000)
	v.post(lifecycle.Input{Kind: lifecycle.QEMUExited, Run: c.run, Exit: x})
}

// plain removes control characters from text that a guest influences.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' {
			return ' '
		}
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return -1
		}
		return r
	}, cut(text, 1000))
}

// kill makes it so that neither QEMU nor the simulated TEE nor the software TPM of
// this VM runs.
func (v *vm) kill(ctx context.Context) error {
	v.mu.Lock()
	c := v.conn
	v.conn = nil
	v.mu.Unlock()
	slot := qemuSlot(v.dir)
	id, err := slot.Holder()
	if err != nil {
		return err
	}
	if id != nil {
		v.quit(ctx, c, *id)
		for deadline := time.Now().Add(quitWait); id.Running() && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
		if id.Running() {
			v.log.Warn("QEMU does not quit; killing it", "pid", id.PID)
		}
		if err := id.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, process.ErrGone) {
			return err
		}
		for deadline := time.Now().Add(quitWait); id.Running(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				return fmt.Errorf("QEMU (process %d) does not end after SIGKILL", id.PID)
			}
		}
	}
	if c != nil {
		c.close()
	}
	tee := teeSlot(v.dir)
	if id, err = tee.Holder(); err != nil {
		return err
	}
	if id != nil {
		if err := id.Stop(quitWait); err != nil {
			return err
		}
	}
	if err := v.stopTPM(); err != nil {
		return err
	}
	for _, s := range []interface{ Holder() (*process.ID, error) }{slot, tee, tpmSlot(v.dir)} {
		if id, err := s.Holder(); err != nil || id != nil {
			return fmt.Errorf("process %v still runs: %w", id, err)
		}
	}
	return nil
}

const quitWait = 5 * time.Second

// quit asks QEMU to end in good order: over the monitor, which takes one client at
// a time, or else by the signal that means the same.
func (v *vm) quit(ctx context.Context, c *connection, id process.ID) {
	limit, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if c != nil {
		for limit.Err() == nil && id.Running() { // it may just be connecting
			if c.quit(limit) == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	} else if m, err := qmp.Dial(limit, filepath.Join(v.dir, qemu.QMPSock)); err == nil {
		defer m.Close()
		if m.Execute(limit, "quit", nil, nil) == nil {
			return
		}
	}
	id.Signal(syscall.SIGTERM)
}

// guestClient returns the client of the running guest's API.
func (v *vm) guestClient() (*prpc.Client, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.conn == nil {
		return nil, fault.New("vm_not_running", "VM %s is not running", v.spec().ID).WithFix("start it")
	}
	return v.conn.guest, nil
}

var guestCallLimit = 15 * time.Second // a variable for tests

// shutdown asks the guest to power off, and cuts the power when it has not in
// time. It returns when the guest was asked.
func (v *vm) shutdown(ctx context.Context) error {
	if !v.state().Active() {
		return v.post(lifecycle.Input{Kind: lifecycle.Stop})
	}
	g, err := v.guestClient()
	if err == nil {
		callCtx, cancel := context.WithTimeout(ctx, guestCallLimit)
		err = g.Call(callCtx, "Shutdown", &emptypb.Empty{}, &emptypb.Empty{})
		cancel()
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		v.log.Warn("guest does not take the request to shut down; cutting the power", "error", err)
		return v.post(lifecycle.Input{Kind: lifecycle.Stop})
	}
	run := v.state().Run
	if err := v.post(lifecycle.Input{Kind: lifecycle.GuestOff}); err != nil {
		return err
	}
	v.server.group.Go(func() {
		limit, cancel := context.WithTimeout(v.server.ctx, v.server.config.CVM.ShutdownWait.Duration)
		defer cancel()
		err := v.wait(limit, func(s lifecycle.State, _ bool) bool { return s.Run != run || !s.Active() })
		if errors.Is(err, context.DeadlineExceeded) && v.server.ctx.Err() == nil {
			v.log.Warn("guest did not power off in time; cutting the power")
			v.post(lifecycle.Input{Kind: lifecycle.Stop})
		}
	})
	return nil
}

// hostAPI is what the guest may call. Everything in a request is the guest's word.
func (c *connection) hostAPI() http.Handler {
	v := c.v
	return prpc.NewMux([]string{"HostApi."},
		prpc.Unary("Info", func(context.Context, *emptypb.Empty) (*hostapi.HostInfo, error) {
			return &hostapi.HostInfo{Name: "dstack VMM", Version: v.server.version}, nil
		}),
		prpc.Unary("Notify", func(_ context.Context, n *hostapi.Notification) (*emptypb.Empty, error) {
			if !v.notify.take(time.Now()) {
				v.flood()
				return nil, fault.New("rate_limited", "too many notifications")
			}
			if v.state().Run != c.run {
				return nil, fault.New("vm_not_running", "this run is over")
			}
			if n.Event == eventHealth {
				return nil, v.takeHealth(n.Payload)
			}
			v.guestEvent(n.Event, n.Payload)
			if n.Event == "instance.info" {
				return nil, v.takeInstanceInfo(c.run, n.Payload)
			}
			return nil, nil
		}),
		prpc.Unary("GetSealingKey", func(ctx context.Context, in *hostapi.GetSealingKeyRequest) (*hostapi.GetSealingKeyResponse, error) {
			if v.server.sealer == nil {
				return nil, fault.New("not_supported", "this host has no local key provider").WithFix("set key_provider in the VMM's configuration")
			}
			// A guest that asks without end must not take the place of others.
			if !c.sealing.TryLock() {
				return nil, fault.New("rate_limited", "this guest waits for the local key provider already")
			}
			defer c.sealing.Unlock()
			key, err := v.server.sealer.SealingKey(ctx, in.Quote)
			if err != nil {
				v.log.Warn("sealing key", "error", err)
				return nil, err
			}
			return &hostapi.GetSealingKeyResponse{EncryptedKey: key.Encrypted, ProviderQuote: key.Quote}, nil
		}),
	)
}

// guestEvent records a notification and follows it (vmm.md §9.1).
func (v *vm) guestEvent(name, payload string) {
	if strings.HasPrefix(name, "vm.") { // names of the VMM's own events
		name = "guest." + name
	}
	v.event(name, payload)
	if name == "shutdown.progress" && payload == "powering off" {
		v.post(lifecycle.Input{Kind: lifecycle.GuestOff})
	}
}

// maxHealth is the largest app.health; half of one would be no JSON.
const maxHealth = 4096

// takeHealth keeps how the app does. What is as before is no event: a guest may say
// it again and again. Code: health_malformed.
func (v *vm) takeHealth(payload string) error {
	var h map[string]any
	if err := strictjson.Decode([]byte(payload), &h, strictjson.Limits{Size: maxHealth, Depth: 8}); err != nil {
		return fault.Wrap(err, "health_malformed", "%s", eventHealth)
	}
	if state, ok := h["state"].(string); !ok || state == "" {
		return fault.New("health_malformed", "%s has no state", eventHealth)
	}
	if v.getReport().Health != payload {
		v.event(eventHealth, payload)
	}
	return nil
}

// flood notes, at most once a minute, that the guest sends too much.
func (v *vm) flood() {
	v.mu.Lock()
	now := time.Now()
	say := now.Sub(v.floodSaid) > time.Minute
	if say {
		v.floodSaid = now
	}
	v.mu.Unlock()
	if say {
		v.event(eventFlood, "the guest sends more notifications than are taken")
	}
}

// closure returns the lookup of what this VM's guest may pull.
func (v *vm) closure() func() registry.Closure {
	var mu sync.Mutex
	var known registry.Closure
	var tried time.Time
	return func() registry.Closure {
		mu.Lock()
		defer mu.Unlock()
		if known == nil && time.Since(tried) > 2*time.Second {
			tried = time.Now()
			locked, err := registry.Locked(v.manifest().ImageLock)
			if err == nil {
				known, err = registry.Resolve(v.server.blobs, locked)
			}
			if err != nil {
				v.log.Warn("images of the guest", "error", err)
			}
		}
		return known
	}
}

// bridge joins each stream to a new connection to a unix socket.
func bridge(ctx context.Context, l net.Listener, path string) {
	var group sync.WaitGroup
	defer group.Wait()
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		group.Go(func() {
			defer in.Close()
			var d net.Dialer
			dialCtx, cancel := context.WithTimeout(ctx, 5*time.Second)
			out, err := d.DialContext(dialCtx, "unix", path)
			cancel()
			if err != nil {
				return
			}
			defer out.Close()
			stop := context.AfterFunc(ctx, func() { in.Close(); out.Close() })
			defer stop()
			done := make(chan struct{})
			go func() {
				defer close(done)
				io.Copy(out, in)
				// The request is over; the answer may still come.
				if u, ok := out.(*net.UnixConn); ok {
					u.CloseWrite()
				}
			}()
			io.Copy(in, out)
			in.Close()
			out.Close()
			<-done
		})
	}
}

// guestMethods are forwarded to the guest, by VM id (vmm.md §3.1).
func (s *Server) guestMethods() []prpc.Method {
	call := func(ctx context.Context, id, method string, resp proto.Message) error {
		v, err := s.get(ctx, id)
		if err != nil {
			return err
		}
		g, err := v.guestClient()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, guestCallLimit)
		defer cancel()
		if err := g.Call(ctx, method, &emptypb.Empty{}, resp); err != nil {
			if fault.Code(err) == "" {
				return fault.Wrap(err, "guest_unreachable", "the guest of VM %s does not answer", id).WithFix("look at its log: it may still be booting")
			}
			return err
		}
		return nil
	}
	type id = guestapi.Id
	return []prpc.Method{
		prpc.Unary("Info", func(ctx context.Context, in *id) (out *guestapi.GuestInfo, err error) {
			out = &guestapi.GuestInfo{}
			return out, call(ctx, in.Id, "Info", out)
		}),
		prpc.Unary("SysInfo", func(ctx context.Context, in *id) (out *guestapi.SystemInfo, err error) {
			out = &guestapi.SystemInfo{}
			return out, call(ctx, in.Id, "SysInfo", out)
		}),
		prpc.Unary("NetworkInfo", func(ctx context.Context, in *id) (out *guestapi.NetworkInformation, err error) {
			out = &guestapi.NetworkInformation{}
			return out, call(ctx, in.Id, "NetworkInfo", out)
		}),
		prpc.Unary("ListContainers", func(ctx context.Context, in *id) (out *guestapi.ListContainersResponse, err error) {
			out = &guestapi.ListContainersResponse{}
			return out, call(ctx, in.Id, "ListContainers", out)
		}),
		prpc.Unary("Shutdown", func(ctx context.Context, in *id) (*emptypb.Empty, error) {
			return &emptypb.Empty{}, call(ctx, in.Id, "Shutdown", &emptypb.Empty{})
		}),
	}
}
