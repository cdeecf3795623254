// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/guest/firewall"
)

// Bounds of the end of a machine. Each step has its own; the last one is for all
// of them together and cuts off whatever hangs.
const (
	failureBound  = 10 * time.Second
	shutdownBound = 45 * time.Second
	stopGraceApp  = 10 * time.Second
	hostBound     = 2 * time.Second
)

// RequestShutdown asks for an orderly end; more than the first request are one.
func (m *Machine) RequestShutdown(reason string) {
	select {
	case m.shutdowns <- reason:
	default:
	}
}

// signals turns the signals that PID 1 may get into shutdown requests.
func (m *Machine) signals() {
	c := make(chan os.Signal, 4)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR)
	// A dead reader of the console or of a pipe is no reason to end PID 1.
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP)
	go func() {
		for s := range c {
			m.RequestShutdown(s.String())
		}
	}()
}

// fail ends a boot that failed. What it does must work in every state of the
// machine, and none of it may prevent the power switch.
func (m *Machine) fail(f *Failure) {
	off := time.AfterFunc(failureBound, m.off)
	defer off.Stop()
	m.secrets.Wipe()
	m.sup.Stop()
	_ = firewall.Closed() // whatever was let in is no longer
	m.host.Notify(eventError, f.String())
	if e := m.runningEngine(); e != nil {
		// The reason may be in the daemons' last words; each already on one line.
		m.console.Log("dockerd: " + e.Log.LastLines(5))
	}
	m.host.Flush(hostBound)
	_ = syscall.Kill(-1, syscall.SIGKILL) // agent, engine, and what a half-started app left
	m.endDisks()
	m.off()
}

// shutdown ends a machine in order: the app first, then what it stands on.
func (m *Machine) shutdown(reason string) {
	m.console.Log("shutting down: " + oneLine(reason))
	off := time.AfterFunc(shutdownBound, m.off)
	defer off.Stop()
	m.host.Notify(eventShutdown, "powering off")
	if m.stopWatch != nil {
		m.stopWatch() // it must not bring up again what is being stopped
	}
	if m.compose != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stopGraceApp+10*time.Second)
		if err := m.compose.Stop(ctx, stopGraceApp); err != nil {
			m.console.Log("stop the app: " + err.Error())
		}
		cancel()
	}
	m.sup.Stop()
	if m.agent != nil {
		m.agent.Stop()
	}
	if e := m.runningEngine(); e != nil {
		e.Stop()
	}
	m.secrets.Wipe()
	killAll("/proc")
	m.endDisks()
	m.host.Flush(hostBound)
	m.off()
}

// killAll ends every other process: politely, then not.
func killAll(proc string) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		_ = syscall.Kill(-1, sig)
		for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline) && others(proc); {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// others reports whether any process but this one has a program: kernel threads
// have an empty command line, and so have zombies.
func others(proc string) bool {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return false
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if text, err := os.ReadFile(proc + "/" + e.Name() + "/cmdline"); err == nil && len(text) > 0 {
			return true
		}
	}
	return false
}

// endDisks unmounts the data disk and removes its mappings, which takes the keys out
// of the kernel. Errors are of no consequence but for a file system that is checked at
// the next boot: the keys die with the power too.
func (m *Machine) endDisks() {
	unix.Sync()
	if m.swap != nil {
		if err := m.swap.Close(); err != nil {
			m.console.Log("end the swap space: " + err.Error())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	var targets []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 1 &&
			(strings.HasPrefix(f[1], "/var/lib") || strings.HasPrefix(f[1], persistent) || strings.HasPrefix(f[1], "/run/")) {
			targets = append(targets, f[1])
		}
	}
	slices.Reverse(targets)
	for _, t := range targets {
		_ = unix.Unmount(t, unix.MNT_DETACH)
	}
	if m.volume != nil {
		if err := m.volume.Close(); err != nil {
			m.console.Log("close the data disk: " + err.Error())
		}
		return
	}
	for range 20 {
		if err := m.mapper.Remove(dataMapping); err == nil || errors.Is(err, unix.ENXIO) || !errors.Is(err, unix.EBUSY) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// off flushes the console and switches the power off. It does not return.
func (m *Machine) off() {
	m.console.Log("power off")
	m.console.Flush()
	unix.Sync()
	for {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		// No power switch: a reset ends the VM as well.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		time.Sleep(time.Second)
	}
}
