// SPDX-License-Identifier: Apache-2.0

package initrpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// helperEnv makes the test binary act as an agent that Spawn started.
const helperEnv = "INITRPC_TEST_HELPER"

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		os.Exit(helper(mode))
	}
	goleak.VerifyTestMain(m)
}

type fakeInit struct {
	quote      func(ctx context.Context, data dstack.ReportData) ([]byte, error)
	containers []Container
	logs       func(context.Context, LogsRequest) (Logs, error)
	events     atomic.Int32
	shutdown   atomic.Pointer[ShutdownRequest]
	lease      atomic.Pointer[LeaseChange]
}

func (f *fakeInit) Quote(ctx context.Context, data dstack.ReportData) ([]byte, error) {
	if f.quote != nil {
		return f.quote(ctx, data)
	}
	return append([]byte("quote:"), data[:]...), nil
}

func (f *fakeInit) Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error) {
	f.events.Add(1)
	return eventlog.RuntimeV1(name, payload)
}

func (f *fakeInit) Containers(ctx context.Context) ([]Container, error) { return f.containers, nil }

func (f *fakeInit) Shutdown(ctx context.Context, r ShutdownRequest) error {
	f.shutdown.Store(&r)
	return nil
}

func (f *fakeInit) Tunnel(context.Context, TunnelChange) (TunnelStatus, error) {
	return TunnelStatus{}, nil
}

func (f *fakeInit) Lease(ctx context.Context, c LeaseChange) error {
	f.lease.Store(&c)
	return nil
}

func (f *fakeInit) Logs(ctx context.Context, r LogsRequest) (Logs, error) {
	if f.logs == nil {
		return Logs{}, fault.New("container_unknown", "no container %s", r.Container)
	}
	return f.logs(ctx, r)
}

func (f *fakeInit) Status(ctx context.Context) (Status, error) {
	return Status{Phase: "compose-up", Failed: "x: y"}, fault.New("status_code", "no status").WithFix("wait")
}

// pair starts Serve on one end and returns the other.
func pair(t *testing.T, init Init, onReady func()) (net.Conn, func() error) {
	t.Helper()
	ours, theirs, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() { done <- Serve(ctx, ours, init, onReady) }()
	var once sync.Once
	var result error
	wait := func() error {
		once.Do(func() {
			select {
			case result = <-done:
			case <-time.After(10 * time.Second):
				t.Error("Serve did not end")
			}
		})
		return result
	}
	t.Cleanup(func() { conn.Close(); wait(); cancel() })
	return conn, wait
}

func TestEachMethodReachesInit(t *testing.T) {
	f := &fakeInit{containers: []Container{{ID: "a", Names: []string{"/n"}, Created: 1 << 40, State: "running"}}}
	ready := 0
	conn, wait := pair(t, f, func() { ready++ })
	c := NewClient(conn)
	ctx := context.Background()

	data := dstack.ReportData{1, 2, 63: 9}
	quote, err := c.Quote(ctx, data)
	if err != nil || !bytes.Equal(quote, append([]byte("quote:"), data[:]...)) {
		t.Errorf("quote %x, %v", quote, err)
	}
	event, err := c.Extend(ctx, "my-event", []byte{0, 255})
	want, _ := eventlog.RuntimeV1("my-event", []byte{0, 255})
	if err != nil || !cmp.Equal(event, want) {
		t.Errorf("event %+v, %v", event, err)
	}
	list, err := c.Containers(ctx)
	if err != nil || !cmp.Equal(list, f.containers) {
		t.Errorf("containers %+v, %v", list, err)
	}
	if err := c.Shutdown(ctx, ShutdownRequest{Reason: "host asked"}); err != nil || f.shutdown.Load().Reason != "host asked" {
		t.Errorf("shutdown %v, %v", f.shutdown.Load(), err)
	}
	change := LeaseChange{State: LeaseLost, Until: time.Unix(1_800_000_000, 0).UTC(), Reason: "no"}
	if err := c.Lease(ctx, change); err != nil || *f.lease.Load() != change {
		t.Errorf("lease %v, %v", f.lease.Load(), err)
	}
	_, err = c.Status(ctx)
	if fault.Code(err) != "status_code" || err.Error() != "no status" || fault.Fix(err) != "wait" {
		t.Errorf("an error lost something on the way: %v, code %q, fix %q", err, fault.Code(err), fault.Fix(err))
	}
	for range 2 {
		if err := c.Ready(ctx); err != nil {
			t.Error(err)
		}
	}
	if ready != 1 {
		t.Errorf("ready was reported %d times", ready)
	}
	c.Close()
	if err := wait(); err != nil {
		t.Errorf("Serve after hang-up: %v", err)
	}
	if _, err := c.Quote(ctx, data); fault.Code(err) != "init_gone" {
		t.Errorf("call after the end: %v", err)
	}
}

func TestReservedEventsNeverReachInit(t *testing.T) {
	f := &fakeInit{}
	conn, _ := pair(t, f, nil)
	c := NewClient(conn)
	defer c.Close()
	for _, name := range []string{
		"app-id", "compose-hash", "instance-id", "key-provider", "system-ready", "system-channel-key", "boot-mr-done",
		"os-image-hash", "system-anything", "dstack-anything", "a:b", "app-id:x",
	} {
		if _, err := c.Extend(context.Background(), name, nil); fault.Code(err) != "event_name_reserved" {
			t.Errorf("event %q: %v", name, err)
		}
	}
	for _, name := range []string{"", strings.Repeat("n", MaxEventName+1)} {
		if _, err := c.Extend(context.Background(), name, nil); fault.Code(err) != "event_name_length" {
			t.Errorf("event of %d bytes: %v", len(name), err)
		}
	}
	if _, err := c.Extend(context.Background(), "big", make([]byte, MaxPayload+1)); fault.Code(err) != "event_payload_too_large" {
		t.Errorf("big payload: %v", err)
	}
	if n := f.events.Load(); n != 0 {
		t.Errorf("%d refused events reached init", n)
	}
}

func TestQuotesAreSerialised(t *testing.T) {
	var now, most atomic.Int32
	f := &fakeInit{quote: func(context.Context, dstack.ReportData) ([]byte, error) {
		n := now.Add(1)
		defer now.Add(-1)
		for {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		time.Sleep(time.Millisecond)
		return []byte{1}, nil
	}}
	conn, _ := pair(t, f, nil)
	c := NewClient(conn)
	defer c.Close()
	var wg sync.WaitGroup
	for range 3 * MaxInFlight { // more than the limit: the client queues
		wg.Go(func() {
			if _, err := c.Quote(context.Background(), dstack.ReportData{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if most.Load() != 1 {
		t.Errorf("%d quotes at a time", most.Load())
	}
}

func TestCancellationReachesInit(t *testing.T) {
	entered, cancelled := make(chan struct{}), make(chan struct{})
	f := &fakeInit{quote: func(ctx context.Context, _ dstack.ReportData) ([]byte, error) {
		entered <- struct{}{}
		<-ctx.Done()
		cancelled <- struct{}{}
		return nil, ctx.Err()
	}}
	conn, _ := pair(t, f, nil)
	c := NewClient(conn)
	defer c.Close()
	for range MaxInFlight { // a slot that leaked would block this loop
		ctx, cancel := context.WithCancel(context.Background())
		go func() { <-entered; cancel() }()
		if _, err := c.Quote(ctx, dstack.ReportData{}); !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled quote: %v", err)
		}
		<-cancelled
	}
}

func TestABrokenAgentIsCutOff(t *testing.T) {
	frame := func(s string) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
	}
	blocked := func(ctx context.Context, _ dstack.ReportData) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() }
	quote := `{"id":%d,"method":"quote","params":{"report_data":"` + strings.Repeat("00", 64) + `"}}`
	var many []byte
	for i := range MaxInFlight + 1 {
		many = append(many, frame(fmt.Sprintf(quote, i))...)
	}
	for _, c := range []struct {
		name, text string
		bytes      []byte
	}{
		{"a frame that is too large", "frame length", []byte{0, 0x10, 0, 1}},
		{"a frame that is too small", "frame length", []byte{0, 0, 0, 1, '0'}},
		{"a frame that is not JSON", "parse request", frame("xx")},
		{"an unknown field", "unknown field", frame(`{"id":1,"method":"status","x":1}`)},
		{"two values in a frame", "trailing data", frame(`{"id":1,"method":"status"}{}`)},
		{"an id used twice", "twice at a time", append(frame(fmt.Sprintf(quote, 1)), frame(fmt.Sprintf(quote, 1))...)},
		{"too many requests", "more than", many},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, wait := pair(t, &fakeInit{quote: blocked}, nil)
			if _, err := conn.Write(c.bytes); err != nil {
				t.Fatal(err)
			}
			if err := wait(); err == nil || !strings.Contains(err.Error(), c.text) {
				t.Errorf("Serve ended with %v, want %q", err, c.text)
			}
		})
	}
}

func TestBadParametersAreAnswered(t *testing.T) {
	conn, _ := pair(t, &fakeInit{}, nil)
	c := NewClient(conn)
	defer c.Close()
	ctx := context.Background()
	for _, p := range []any{nil, map[string]string{"report_data": "00"}, map[string]any{"report_data": strings.Repeat("0", 128), "x": 1}} {
		if err := c.call(ctx, methodQuote, p, nil); fault.Code(err) != "init_bad_request" {
			t.Errorf("quote with %v: %v", p, err)
		}
	}
	if err := c.call(ctx, "reboot", nil, nil); fault.Code(err) != "init_unknown_method" {
		t.Errorf("unknown method: %v", err)
	}
}

func TestConfigIsSealed(t *testing.T) {
	cfg := &Config{
		Version: "0.6.0", TEE: dstack.TDX, Manifest: []byte("{\xff<>}"), VMConfig: "{}", ChannelKey: []byte{1, 2, 3},
		Events: []eventlog.Event{{IMR: 0, EventType: 10, Digest: make([]byte, 48), Payload: []byte("ACPI DATA")}},
	}
	f, err := cfg.Seal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the sealed memfd: %v", err)
	}
	if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate the sealed memfd: %v", err)
	}
	got, err := ReadConfig(f)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(cfg, got); d != "" {
		t.Error(d)
	}
	got.Wipe()
	if !bytes.Equal(got.ChannelKey, make([]byte, 3)) {
		t.Error("key not wiped")
	}
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Error("the memfd stayed open")
	}

	plain, err := os.Create(filepath.Join(t.TempDir(), "config"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConfig(plain); err == nil || !strings.Contains(err.Error(), "memfd") {
		t.Errorf("a plain file was taken for a configuration: %v", err)
	}
	fd, err := unix.MemfdCreate("open", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadConfig(os.NewFile(uintptr(fd), "open")); err == nil || !strings.Contains(err.Error(), "not sealed") {
		t.Errorf("an unsealed memfd was accepted: %v", err)
	}
}

// helper is the agent's side of the Spawn tests.
func helper(mode string) int {
	in, err := Inherit()
	if err != nil {
		fmt.Println("inherit:", err)
		return 3
	}
	ctx := context.Background()
	switch mode {
	case "serve":
		env := os.Environ()
		groups, _ := os.Getgroups()
		fmt.Printf("uid=%d gid=%d groups=%v env=%v key=%x ambient=%d\n", os.Getuid(), os.Getgid(), groups, env, in.Config.ChannelKey, capabilities())
		if _, err := in.Init.Quote(ctx, dstack.ReportData{}); err != nil {
			fmt.Println("quote:", err)
			return 4
		}
		go func() {
			conn, err := in.Listeners[ListenDstack].Accept()
			if err == nil {
				fmt.Fprint(conn, "hello")
				conn.Close()
			}
		}()
		in.Init.Ready(ctx)
		<-in.Init.Done()
		return 0
	case "break":
		in.Init.conn.Write([]byte{0xff, 0xff, 0xff, 0xff})
	case "hangup":
		in.Init.Close()
	}
	time.Sleep(time.Hour)
	return 0
}

// capabilities returns the effective, permitted and inheritable sets, or'ed.
func capabilities() uint32 {
	var data [2]unix.CapUserData
	unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0])
	var all uint32
	for _, d := range data {
		all |= d.Effective | d.Permitted | d.Inheritable
	}
	return all
}

type syncBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}

func spawn(t *testing.T, ctx context.Context, mode string, log io.Writer) (*Process, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: only root can start a process as another user")
	}
	path := filepath.Join(t.TempDir(), "dstack.sock")
	sock, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	p, err := Spawn(ctx, SpawnOptions{
		Path: "/proc/self/exe", UID: 990, GID: 990, Env: []string{helperEnv + "=" + mode},
		Config: &Config{ChannelKey: []byte{0xab}}, Init: &fakeInit{},
		Listeners: map[string]*os.File{ListenDstack: sock}, Log: log,
		Start: func(cmd *exec.Cmd) (Child, error) { return startCmd(cmd) },
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, path
}

func TestSpawnedAgentIsUnprivilegedAndServes(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var log syncBuffer
	p, path := spawn(t, ctx, "serve", &log)
	select {
	case <-p.Ready():
	case <-p.Done():
		t.Fatalf("agent ended: %v\n%s", p.Wait(), log.String())
	case <-time.After(20 * time.Second):
		t.Fatal("agent not ready")
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("socket mode %v, %v", info.Mode(), err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if hello, _ := io.ReadAll(conn); string(hello) != "hello" {
		t.Errorf("socket answered %q", hello)
	}
	cancel()
	p.Wait()
	want := "uid=990 gid=990 groups=[] env=[" + helperEnv + "=serve] key=ab ambient=0\n"
	if log.String() != want {
		t.Errorf("agent logged %q, want %q", log.String(), want)
	}
}

func TestAMisbehavingAgentIsKilled(t *testing.T) {
	t.Run("protocol", func(t *testing.T) {
		p, _ := spawn(t, context.Background(), "break", nil)
		if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "frame length") || !strings.Contains(err.Error(), "killed") {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("hang-up", func(t *testing.T) {
		p, _ := spawn(t, context.Background(), "hangup", nil)
		if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestSpawnReportsAMissingBinary(t *testing.T) {
	_, err := Spawn(context.Background(), SpawnOptions{Path: "/nonexistent", UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Config: &Config{}, Init: &fakeInit{}})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestTheAgentInheritsNoEnvironment(t *testing.T) {
	t.Setenv("SECRET", "x")
	refuse := errors.New("not today")
	_, err := Spawn(context.Background(), SpawnOptions{
		Path: "/proc/self/exe", UID: 990, GID: 991, Config: &Config{}, Init: &fakeInit{},
		Start: func(cmd *exec.Cmd) (Child, error) {
			if len(cmd.Environ()) != 0 { // the child's; a nil Env would mean ours
				t.Errorf("environment %q", cmd.Environ())
			}
			if cmd.Args[1] != "agent" || cmd.SysProcAttr.Credential.Uid != 990 || cmd.SysProcAttr.Credential.Gid != 991 {
				t.Errorf("command %+v, %+v", cmd, cmd.SysProcAttr)
			}
			return Child{}, refuse
		},
	})
	if !errors.Is(err, refuse) {
		t.Errorf("Spawn: %v", err)
	}
}

func TestListenUnixRefusesARelativePath(t *testing.T) {
	for _, path := range []string{"@abstract", "relative.sock", ""} {
		if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "not absolute") {
			t.Errorf("%q: %v", path, err)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, '{', '}'})
	f.Add([]byte{0, 0x10, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add(append([]byte{0, 0, 0, 26}, `{"id":1,"method":"status"}`...))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		frame, err := readFrame(r)
		if err != nil {
			return
		}
		if len(frame) < 2 || len(frame) > MaxFrame || len(frame)+4+r.Len() != len(data) {
			t.Fatalf("frame of %d bytes, %d left of %d", len(frame), r.Len(), len(data))
		}
		var req request
		if decodeStrict(frame, &req) != nil {
			return
		}
		var out bytes.Buffer
		if err := writeFrame(&out, req); err != nil {
			return // a frame may grow beyond the limit by escaping
		}
		again, err := readFrame(&out)
		var req2 request
		if err != nil || decodeStrict(again, &req2) != nil || req2.ID != req.ID || req2.Method != req.Method || !json.Valid(again) {
			t.Fatalf("round trip of %q gave %q: %v", frame, again, err)
		}
	})
}

func TestLogsArePulled(t *testing.T) {
	var closed atomic.Int32
	f := &fakeInit{logs: func(ctx context.Context, r LogsRequest) (Logs, error) {
		if r != (LogsRequest{Container: "web", Since: 1, Until: 2, Tail: -1, Follow: true, Timestamps: true}) {
			t.Errorf("request %+v", r)
		}
		return Logs{Framed: true, Stream: &closeCounter{Reader: bytes.NewReader(bytes.Repeat([]byte("0123456789"), 20_000)), closed: &closed}}, nil
	}}
	conn, _ := pair(t, f, nil)
	c := NewClient(conn)
	defer c.Close()
	ctx := context.Background()
	logs, err := c.Logs(ctx, LogsRequest{Container: "web", Since: 1, Until: 2, Tail: -1, Follow: true, Timestamps: true})
	if err != nil || !logs.Framed {
		t.Fatal(logs, err)
	}
	data, err := io.ReadAll(logs.Stream)
	if err != nil || !bytes.Equal(data, bytes.Repeat([]byte("0123456789"), 20_000)) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if err := logs.Stream.Close(); err != nil || closed.Load() != 1 {
		t.Errorf("Close: %v, closed %d times", err, closed.Load())
	}
	if _, err := logs.Stream.(*logStream).client.Containers(ctx); err != nil {
		t.Error(err)
	}
	var r logsReadResult
	if err := c.call(ctx, methodLogsRead, logsParams{1}, &r); fault.Code(err) != "logs_closed" {
		t.Errorf("a closed stream: %v", err)
	}
}

type closeCounter struct {
	io.Reader
	closed *atomic.Int32
}

func (c *closeCounter) Close() error { c.closed.Add(1); return nil }

// waiting is a stream on which nothing comes until it is closed.
type waiting struct {
	closed chan struct{}
	once   sync.Once
}

func (w *waiting) Read([]byte) (int, error) { <-w.closed; return 0, io.EOF }
func (w *waiting) Close() error             { w.once.Do(func() { close(w.closed) }); return nil }

func TestLogStreamsAreFewAndEnd(t *testing.T) {
	var streams []*waiting
	var mu sync.Mutex
	f := &fakeInit{logs: func(ctx context.Context, r LogsRequest) (Logs, error) {
		w := &waiting{closed: make(chan struct{})}
		mu.Lock()
		streams = append(streams, w)
		mu.Unlock()
		return Logs{Stream: w}, nil
	}}
	conn, wait := pair(t, f, nil)
	c := NewClient(conn)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var all []Logs
	for range MaxLogs {
		logs, err := c.Logs(ctx, LogsRequest{Container: "web"})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, logs)
	}
	if _, err := c.Logs(ctx, LogsRequest{Container: "web"}); fault.Code(err) != "logs_busy" {
		t.Errorf("one too many: %v", err)
	}
	// A read that is cancelled ends its stream, and makes room.
	read, give := context.WithCancel(ctx)
	all[0].Stream.(*logStream).ctx = read
	ended := make(chan error, 1)
	go func() { _, err := all[0].Stream.Read(make([]byte, 1)); ended <- err }()
	time.Sleep(50 * time.Millisecond)
	give()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled read: %v", err)
	}
	<-streams[0].closed
	if _, err := c.Logs(ctx, LogsRequest{Container: "web"}); err != nil {
		t.Errorf("after one ended: %v", err)
	}
	for _, name := range []string{"", "a/b", "../x", "a?b", "a b", strings.Repeat("x", 256)} {
		if _, err := c.Logs(ctx, LogsRequest{Container: name}); fault.Code(err) != "container_unknown" {
			t.Errorf("%q: %v", name, err)
		}
	}
	// The end of the connection ends the rest, one of them while it is read.
	go all[1].Stream.Read(make([]byte, 1))
	time.Sleep(50 * time.Millisecond)
	c.Close()
	wait()
	for _, s := range streams {
		select {
		case <-s.closed:
		case <-time.After(5 * time.Second):
			t.Fatal("a stream outlives the connection")
		}
	}
}
