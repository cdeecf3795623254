// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
)

// PortName is the name of the virtio-serial port, as in QEMU's
// -device virtserialport,chardev=…,name=org.dstack.hostlink.0.
const PortName = "org.dstack.hostlink.0"

// VsockPort is the port that a guest listens on when the link goes over vsock.
const VsockPort = 10240

// virtioPorts is where Linux lists virtio-serial ports; virtioNode is how it calls
// them (drivers/char/virtio_console.c, "vport%up%u").
const virtioPorts = "/sys/class/virtio-ports"

var virtioNode = regexp.MustCompile(`^vport[0-9]+p[0-9]+$`)

// OpenVirtioPort opens the virtio-serial port of a name from inside a guest. The
// port stays the same across host processes: while no host is connected reads
// return EOF and writes block. Only one file may have the port open.
func OpenVirtioPort(name string) (io.ReadWriteCloser, error) {
	return openVirtioPort(virtioPorts, "/dev", name)
}

func openVirtioPort(sys, dev, name string) (io.ReadWriteCloser, error) {
	entries, err := os.ReadDir(sys)
	if err != nil {
		return nil, fmt.Errorf("find virtio-serial port %s: %w", name, err)
	}
	for _, e := range entries {
		if !virtioNode.MatchString(e.Name()) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(sys, e.Name(), "name"))
		if err != nil || strings.TrimSuffix(string(text), "\n") != name {
			continue
		}
		// O_NONBLOCK lets Go's poller wait for the port, so that Close ends a Read.
		f, err := os.OpenFile(filepath.Join(dev, e.Name()), os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("open virtio-serial port %s: %w", name, err)
		}
		return f, nil
	}
	return nil, fmt.Errorf("find virtio-serial port %s: no port has that name", name)
}

// DialUnix returns a function for NewHostLink that connects to the unix socket of
// QEMU's -chardev socket,path=…,server=on,wait=off.
func DialUnix(path string) func(context.Context) (io.ReadWriteCloser, error) {
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
}

// DialVsock returns a function for NewHostLink that connects to a guest by its CID.
func DialVsock(cid uint32) func(context.Context) (io.ReadWriteCloser, error) {
	return func(context.Context) (io.ReadWriteCloser, error) {
		return vsock.Dial(cid, VsockPort, nil)
	}
}

// AcceptVsock listens for the host and returns a function for NewGuestLink that
// takes the next connection from it. Connections from other CIDs are closed.
func AcceptVsock() (dial func(context.Context) (io.ReadWriteCloser, error), l io.Closer, err error) {
	listener, err := vsock.Listen(VsockPort, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("listen on vsock port %d: %w", VsockPort, err)
	}
	return func(ctx context.Context) (io.ReadWriteCloser, error) {
		listener.SetDeadline(time.Time{})
		// A deadline in the past wakes Accept when ctx ends.
		stop := context.AfterFunc(ctx, func() { listener.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		for {
			c, err := listener.Accept()
			if err != nil {
				return nil, err
			}
			if a, ok := c.RemoteAddr().(*vsock.Addr); ok && a.ContextID == vsock.Host {
				return c, nil
			}
			c.Close()
		}
	}, listener, nil
}
