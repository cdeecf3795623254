// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/history"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/qemu"
)

// changes are the methods that change something; only they are audited.
var changes = map[string]bool{
	"CreateVm": true, "StartVm": true, "StopVm": true, "ShutdownVm": true, "RemoveVm": true, "UpdateVm": true, "UpgradeApp": true, "ResizeVm": true,
	"Shutdown": true, // of the guest's API
}

type (
	peerKey  struct{}
	tokenKey struct{}
)

// withPeer notes who is at the other end of a unix socket, by the kernel's word.
func withPeer(ctx context.Context, conn net.Conn) context.Context {
	if inner, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = inner.NetConn()
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }) != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, fmt.Sprintf("uid %d pid %d", cred.Uid, cred.Pid))
}

// who says who made a request: the peer of the unix socket, or the number of the
// token.
func who(ctx context.Context) string {
	if n, _ := ctx.Value(tokenKey{}).(int); n > 0 {
		return "token " + strconv.Itoa(n)
	}
	if peer, ok := ctx.Value(peerKey{}).(string); ok {
		return peer
	}
	return "unknown"
}

// audited records each request for a change with its outcome before it is answered.
func (s *Server) audited(methods []prpc.Method) []prpc.Method {
	for i, m := range methods {
		if !changes[m.Name] {
			continue
		}
		handle := m.Handle
		methods[i].Handle = func(ctx context.Context, in proto.Message) (proto.Message, error) {
			out, err := handle(ctx, in)
			s.audit(ctx, m.Name, in, out, err)
			return out, err
		}
	}
	return methods
}

func (s *Server) audit(ctx context.Context, method string, in, out proto.Message, err error) {
	if s.past == nil {
		return
	}
	a := history.Audit{TimeMS: time.Now().UnixMilli(), Who: who(ctx), Method: method, Outcome: "ok"}
	type named interface{ GetId() string }
	if n, ok := in.(named); ok {
		a.VM = cut(n.GetId(), 64)
	} else if n, ok := out.(named); ok && err == nil {
		a.VM = n.GetId()
	}
	if err != nil {
		if a.Outcome = fault.Code(err); a.Outcome == "" {
			a.Outcome = "failed"
		}
	}
	// The caller may have gone; what it did is recorded all the same.
	if err := s.past.Audit(context.WithoutCancel(ctx), a); err != nil {
		s.log.Error("audit", "method", method, "vm", a.VM, "who", a.Who, "outcome", a.Outcome, "error", err)
	}
}

const sampleEvery = time.Minute

// sample records what running VMs use.
func (s *Server) sample(ctx context.Context) {
	if s.past == nil {
		return
	}
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, v := range s.list() {
			if m, ok := v.usage(); ok {
				s.past.Sample(m)
			}
		}
	}
}

// usage is what a running VM uses now.
func (v *vm) usage() (m history.Sample, ok bool) {
	if v.state().Phase != lifecycle.Running {
		return m, false
	}
	id, err := qemuSlot(v.dir).Holder()
	if err != nil || id == nil {
		return m, false
	}
	m = history.Sample{VM: v.spec().ID, TimeMS: time.Now().UnixMilli()}
	// proc_pid_stat(5): utime and stime are fields 14 and 15, in 1/100 s; rss is
	// field 24, in pages. The command before them may hold anything.
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(id.PID), "stat"))
	if err != nil {
		return m, false
	}
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 22 {
		return m, false
	}
	number := func(i int) int64 { n, _ := strconv.ParseInt(string(fields[i]), 10, 64); return n }
	m.CPUMS = (number(11) + number(12)) * 10
	m.RSSBytes = number(21) * int64(os.Getpagesize())
	if fi, err := os.Stat(filepath.Join(v.dir, qemu.DataDisk)); err == nil {
		if st, ok := fi.Sys().(*syscall.Stat_t); ok {
			m.DiskBytes = st.Blocks * 512
		}
	}
	return m, true
}

// history answers questions about the past, also of VMs that were removed.
func (s *Server) history(w http.ResponseWriter, r *http.Request) {
	if s.past == nil {
		httpError(w, http.StatusServiceUnavailable, fault.New("history_off", "this VMM keeps no history").WithFix("its log says why"))
		return
	}
	form := r.URL.Query()
	q := history.Query{VM: form.Get("id")}
	for name, set := range map[string]func(int64){"since": func(n int64) { q.SinceMS = n }, "limit": func(n int64) { q.Limit = int(min(n, history.MaxResults)) }} {
		text := form.Get(name)
		if text == "" {
			continue
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			httpError(w, http.StatusBadRequest, fault.New("query_invalid", "%s is %.40q, not a number", name, text))
			return
		}
		set(n)
	}
	var lines []any
	var err error
	switch kind := form.Get("kind"); kind {
	case "", "events":
		lines, err = collect(s.past.Events(r.Context(), q))
	case "audit":
		lines, err = collect(s.past.Audits(r.Context(), q))
	case "samples":
		lines, err = collect(s.past.Samples(r.Context(), q))
	default:
		err = fault.New("query_invalid", "unknown kind %.40q", kind).WithFix("use events, audit or samples")
	}
	if err != nil {
		httpError(w, http.StatusBadRequest, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	enc := json.NewEncoder(streamWriter{w, http.NewResponseController(w)})
	for _, line := range lines {
		if enc.Encode(line) != nil {
			return
		}
	}
}

func collect[T any](list []T, err error) ([]any, error) {
	out := make([]any, len(list))
	for i := range list {
		out[i] = list[i]
	}
	return out, err
}
