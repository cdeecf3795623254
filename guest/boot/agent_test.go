// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/dstack-go/dstack/guest/agent/initrpc"
)

// The agent waits for a client or for the end of the boot, whichever is first, and the
// client's connection is still there for it.
func TestAgentStartsWhenWanted(t *testing.T) {
	for name, trigger := range map[string]func(a *agentKeeper, socket string) error{
		"client": func(_ *agentKeeper, socket string) error {
			c, err := net.Dial("unix", socket)
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return err
		},
		"start": func(a *agentKeeper, _ string) error { a.Start(); a.Start(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			f, err := initrpc.ListenUnix(socket)
			if err != nil {
				t.Fatal(err)
			}
			a := &agentKeeper{listeners: map[string]*os.File{"s": f}}
			defer f.Close()
			if a.wanted, a.want, err = os.Pipe(); err != nil {
				t.Fatal(err)
			}
			defer a.wanted.Close()
			defer a.Start()
			done := make(chan struct{})
			go func() { a.awaitClient(); close(done) }()
			select {
			case <-done:
				t.Fatal("nobody asked, and the agent would start")
			case <-time.After(50 * time.Millisecond):
			}
			if err := trigger(a, socket); err != nil {
				t.Fatal(err)
			}
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				t.Fatal("the agent would not start")
			}
			if name != "client" {
				return
			}
			l, err := net.FileListener(f)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
		})
	}
}
