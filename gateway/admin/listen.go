// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// Listen opens the administrators' listener: unix:/path, a socket of this user alone, or an
// address and port. In plain text it listens on loopback only: a password on a network is
// everybody's. Codes admin_plain, gateway_listen.
func Listen(address string, port uint16, secure *tls.Config) (net.Listener, error) {
	if file, ok := strings.CutPrefix(address, "unix:"); ok {
		return listenUnix(file)
	}
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return nil, fault.New("gateway_config", "core.admin.address %q is no IP address, and no unix:/path", address)
	}
	if !addr.IsLoopback() && secure == nil {
		return nil, fault.New("admin_plain", "administrators' credentials would cross the network at %s in plain text", address).
			WithFix("listen on 127.0.0.1 or unix:/path, or set core.admin.tls = true")
	}
	l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
	if err != nil {
		return nil, fault.Wrap(err, "gateway_listen", "listen for administrators").WithFix("set another port, or stop who has this one")
	}
	if secure != nil {
		return tls.NewListener(l, secure), nil
	}
	return l, nil
}

func listenUnix(file string) (net.Listener, error) {
	bad := func(err error) error {
		return fault.Wrap(err, "gateway_listen", "listen for administrators at %s", file)
	}
	// What a gateway left that was killed is in the way; one that answers is not ours.
	if c, err := net.DialTimeout("unix", file, time.Second); err == nil {
		c.Close()
		return nil, bad(errors.New("somebody answers there"))
	}
	if fi, err := os.Lstat(file); err == nil && fi.Mode().Type() == os.ModeSocket {
		os.Remove(file)
	}
	old := syscall.Umask(0o177) // never for a moment anybody else's
	l, err := net.Listen("unix", file)
	syscall.Umask(old)
	if err != nil {
		return nil, bad(err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		l.Close()
		return nil, bad(err)
	}
	return own{l}, nil
}

// own takes connections of this user and of root alone, whatever became of the file's mode.
type own struct{ net.Listener }

func (o own) Accept() (net.Conn, error) {
	for {
		c, err := o.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c.(*net.UnixConn)); err == nil && (uid == 0 || uid == uint32(os.Geteuid())) {
			return c, nil
		}
		c.Close()
	}
}

func peerUID(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// Serve answers on l, which it owns, until ctx ends.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	server := prpc.Server(s.Handler())
	server.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
	server.BaseContext = func(net.Listener) context.Context { return context.WithoutCancel(ctx) }
	server.MaxHeaderBytes = 64 << 10
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// Whoever asked for the end is told that it comes.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := server.Shutdown(end); err != nil {
		server.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
