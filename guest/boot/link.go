// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"
	"io"

	"github.com/dstack-go/dstack/hostlink"
)

// openLink starts the guest's end of hostlink on the virtio-serial port. It does
// not wait for the host: whoever needs a stream does.
func openLink(context.Context) (Link, error) {
	port, err := hostlink.OpenVirtioPort(hostlink.PortName)
	if err != nil {
		return nil, err
	}
	// The port exists; the link opens it anew for each session, the first time
	// with the file already at hand.
	first := make(chan io.ReadWriteCloser, 1)
	first <- port
	return hostlink.NewGuestLink(func(context.Context) (io.ReadWriteCloser, error) {
		select {
		case p := <-first:
			return p, nil
		default:
			return hostlink.OpenVirtioPort(hostlink.PortName)
		}
	}, hostlink.Options{}), nil
}
