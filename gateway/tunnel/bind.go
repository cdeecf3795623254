// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"net"
	"net/netip"
	"sync"

	"golang.zx2c4.com/wireguard/conn"
)

// newBind returns the sockets of WireGuard in this process: at all addresses with
// batches of packets, or at one address alone, which WireGuard's own code cannot.
func newBind(at netip.Addr) conn.Bind {
	if at.IsUnspecified() {
		return conn.NewDefaultBind()
	}
	return &bind{at: at}
}

// bind is one UDP socket at one address. Of an implementation of conn.Bind it leaves
// out what Linux gives for speed only.
type bind struct {
	at netip.Addr

	mu   sync.Mutex
	sock *net.UDPConn
}

// Open implements conn.Bind.
func (b *bind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sock != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	sock, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.at, port)))
	if err != nil {
		return nil, 0, err
	}
	b.sock = sock
	receive := func(packets [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		n, from, err := sock.ReadFromUDPAddrPort(packets[0])
		if err != nil {
			return 0, err
		}
		sizes[0], eps[0] = n, &conn.StdNetEndpoint{AddrPort: netip.AddrPortFrom(from.Addr().Unmap(), from.Port())}
		return 1, nil
	}
	return []conn.ReceiveFunc{receive}, sock.LocalAddr().(*net.UDPAddr).AddrPort().Port(), nil
}

// Close implements conn.Bind.
func (b *bind) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sock == nil {
		return nil
	}
	err := b.sock.Close()
	b.sock = nil
	return err
}

// Send implements conn.Bind.
func (b *bind) Send(packets [][]byte, to conn.Endpoint) error {
	b.mu.Lock()
	sock := b.sock
	b.mu.Unlock()
	if sock == nil {
		return net.ErrClosed
	}
	ep, ok := to.(*conn.StdNetEndpoint)
	if !ok {
		return conn.ErrWrongEndpointType
	}
	for _, p := range packets {
		if _, err := sock.WriteToUDPAddrPort(p, ep.AddrPort); err != nil {
			return err
		}
	}
	return nil
}

// ParseEndpoint implements conn.Bind.
func (b *bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return nil, err
	}
	return &conn.StdNetEndpoint{AddrPort: ap}, nil
}

// SetMark implements conn.Bind: there is no mark to set.
func (b *bind) SetMark(uint32) error { return nil }

// BatchSize implements conn.Bind.
func (b *bind) BatchSize() int { return 1 }
