// SPDX-License-Identifier: Apache-2.0

// Package netlab makes network namespaces for tests that need machines of their own. They
// go with the test. Needs root; without, the test is skipped.
package netlab

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// In runs f in a namespace. What it opens or starts stays there.
func In(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// New makes a namespace whose loopback is up.
func New(t testing.TB) (ns netns.NsHandle) {
	t.Helper()
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		var err error
		ns, err = netns.New()
		made <- err
	}()
	err := <-made
	if errors.Is(err, syscall.EPERM) {
		t.Skip("SKIP: making network namespaces needs root")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	if err := In(ns, func() error { return Up("lo") }); err != nil {
		t.Fatal(err)
	}
	return ns
}

// Up brings an interface of the calling namespace up, with addresses in CIDR form, which
// count at once.
func Up(name string, addrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, text := range addrs {
		a, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %s on %s: %w", text, name, err)
		}
	}
	return netlink.LinkSetUp(link)
}
