// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"io"
	"net"
	"net/netip"
	"testing"
)

// BenchmarkPassthroughConnection is a whole short connection, with its client and its app.
// bench/gateway compares; this finds where the time goes.
func BenchmarkPassthroughConnection(b *testing.B) {
	r := newRig(b, nil)
	r.instance(1, 1)
	raw := rawHello(b, host(appID(1), "-s"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.ReadFull(c, make([]byte, len(raw)))
				c.Write(raw[:64])
				c.Close()
			}()
		}
	}()
	r.where[netip.AddrPortFrom(address(1), 443)] = l.Addr().String()
	b.ReportAllocs()
	buf := make([]byte, 64)
	for b.Loop() {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			b.Fatal(err)
		}
		c.Write(raw)
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}
