// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const greeting = `{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// fake serves one connection: it sends the greeting, answers qmp_capabilities,
// and hands each further command to serve.
func fake(t *testing.T, serve func(write func(string), command string, id uint64)) net.Conn {
	client, server := net.Pipe()
	t.Cleanup(func() { server.Close() })
	go func() {
		var mu sync.Mutex
		write := func(s string) { mu.Lock(); server.Write([]byte(s)); mu.Unlock() }
		write(greeting)
		r := bufio.NewScanner(server)
		for r.Scan() {
			var c struct {
				Execute string
				ID      uint64
			}
			if json.Unmarshal(r.Bytes(), &c) != nil {
				return
			}
			if c.Execute == "qmp_capabilities" {
				write(fmt.Sprintf(`{"return": {}, "id": %d}`+"\r\n", c.ID))
				continue
			}
			serve(write, c.Execute, c.ID)
		}
	}()
	return client
}

func open(t *testing.T, conn net.Conn) *Client {
	t.Helper()
	c, err := New(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestRepliesAreMatchedByID(t *testing.T) {
	var held []string
	c := open(t, fake(t, func(write func(string), command string, id uint64) {
		// Answer three commands in reverse order, with an event in between.
		held = append(held, fmt.Sprintf(`{"return": {"name": %q}, "id": %d}`+"\n", command, id))
		if len(held) == 3 {
			for i := range held {
				write(held[len(held)-1-i])
				write(`{"event": "RESUME", "timestamp": {"seconds": 12, "microseconds": 5}}` + "\n")
			}
		}
	}))
	if c.Version() != (Version{10, 0, 2}) {
		t.Fatalf("version %v", c.Version())
	}
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b", "c"} {
		wg.Go(func() {
			var out struct{ Name string }
			if err := c.Execute(t.Context(), name, nil, &out); err != nil || out.Name != name {
				t.Errorf("%s: got %q, %v", name, out.Name, err)
			}
		})
	}
	wg.Wait()
	if e := <-c.Events(); e.Name != "RESUME" || e.Time.Unix() != 12 {
		t.Fatalf("event %+v", e)
	}
}

func TestRefusalIsAnError(t *testing.T) {
	c := open(t, fake(t, func(write func(string), _ string, id uint64) {
		write(fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": %d}`+"\n", id))
	}))
	var refused *Error
	if err := c.Execute(t.Context(), "x", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Fatal(err)
	}
}

func TestAReplyToNobodyIsIgnored(t *testing.T) {
	c := open(t, fake(t, func(write func(string), _ string, id uint64) {
		write(fmt.Sprintf(`{"return": "wrong", "id": %d}`+"\n", id+100))
		write(fmt.Sprintf(`{"return": "right", "id": %d}`+"\n", id))
	}))
	var out string
	if err := c.Execute(t.Context(), "x", nil, &out); err != nil || out != "right" {
		t.Fatal(out, err)
	}
}

func TestWaitingCommandsEndWithTheConnection(t *testing.T) {
	for name, bad := range map[string]string{
		"malformed message": "{nonsense\n",
		"endless message":   strings.Repeat("x", MaxLine+10) + "\n",
		"reply without id":  `{"error": {"class": "GenericError", "desc": "cannot parse"}}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := open(t, fake(t, func(write func(string), _ string, _ uint64) { write(bad) }))
			if err := c.Execute(t.Context(), "x", nil, nil); !errors.Is(err, ErrClosed) {
				t.Fatal(err)
			}
			<-c.Done()
			if err := c.Execute(t.Context(), "y", nil, nil); !errors.Is(err, ErrClosed) {
				t.Fatal(err)
			}
		})
	}
}

func TestEventFloodKeepsTheNewest(t *testing.T) {
	c := open(t, fake(t, func(write func(string), _ string, id uint64) {
		for i := range 10 * maxEvents {
			write(fmt.Sprintf(`{"event": "E%d", "timestamp": {"seconds": 1, "microseconds": 0}}`+"\n", i))
		}
		write(fmt.Sprintf(`{"return": {}, "id": %d}`+"\n", id))
	}))
	if err := c.Execute(t.Context(), "x", nil, nil); err != nil {
		t.Fatal(err)
	}
	c.Close()
	n, last := 0, ""
	for e := range c.Events() {
		n, last = n+1, e.Name
	}
	if n != maxEvents || last != fmt.Sprintf("E%d", 10*maxEvents-1) {
		t.Fatalf("%d events, last %s", n, last)
	}
}

func TestSilentPeerDoesNotHang(t *testing.T) {
	client, server := net.Pipe()
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := New(ctx, client); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	// Command that is never answered.
	c := open(t, fake(t, func(func(string), string, uint64) {}))
	ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "x", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if len(c.waiting) != 0 {
		t.Fatal("the command is still registered")
	}
}

func TestNoGreeting(t *testing.T) {
	client, server := net.Pipe()
	go func() { server.Write([]byte(`{"return": {}}` + "\n")); server.Close() }()
	if _, err := New(t.Context(), client); err == nil || !strings.Contains(err.Error(), "not a greeting") {
		t.Fatal(err)
	}
}

func TestRealQEMU(t *testing.T) {
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("SKIP: no qemu-system-x86_64 on this machine")
	}
	dir, err := os.MkdirTemp("", "qmp")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "s")
	cmd := exec.Command(bin, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "unix:"+sock+",server=on,wait=off")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	defer cmd.Process.Kill()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var c *Client
	for {
		if c, err = Dial(ctx, sock); err == nil {
			break
		}
		select {
		case err := <-exited:
			t.Fatalf("QEMU ended: %v", err)
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	defer c.Close()
	var status struct{ Status string }
	if err := c.Execute(ctx, "query-status", nil, &status); err != nil || status.Status == "" {
		t.Fatalf("status %q: %v", status.Status, err)
	}
	var refused *Error
	if err := c.Execute(ctx, "no-such-command", nil, nil); !errors.As(err, &refused) {
		t.Fatal(err)
	}
	if err := c.Execute(ctx, "quit", nil, nil); err != nil {
		t.Fatal(err)
	}
	for e := range c.Events() {
		if e.Name == "SHUTDOWN" && strings.Contains(string(e.Data), "host-qmp-quit") {
			if err := <-exited; err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no SHUTDOWN event with its reason")
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(greeting))
	f.Add([]byte(`{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n"))
	f.Add([]byte(`{"return": [1, null], "id": 18446744073709551615}` + "\n"))
	f.Add([]byte(`{"error": {"class": 1}}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bufio.NewReader(strings.NewReader(string(data)))
		for {
			if _, err := readMessage(r); err != nil {
				return
			}
		}
	})
}
