// SPDX-License-Identifier: Apache-2.0

package wgconfig

import (
	"bufio"
	"encoding/hex"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

// Status is what WireGuard tells of a peer.
type Status struct {
	Key       PublicKey
	Endpoint  netip.AddrPort // zero until the peer was heard of
	Allowed   []netip.Prefix
	Handshake time.Time // zero when there was none
	Received  uint64    // bytes
	Sent      uint64    // bytes
}

// Limits of a state that is read.
const (
	maxLine    = 64 << 10 // a peer's allowed addresses are one line of `wg show dump`
	maxAllowed = 256      // of one peer
)

// lines calls take for each line. Codes wg_status, wg_peers from take.
func lines(r io.Reader, take func(line string) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLine)
	for s.Scan() {
		if err := take(s.Text()); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return fault.Wrap(err, "wg_status", "read the state of a WireGuard interface")
	}
	return nil
}

func statusError(what string) error {
	return fault.New("wg_status", "the state of a WireGuard interface: %s", what)
}

// ParseUAPI reads the answer to `get` of WireGuard's cross-platform interface: peers in its
// order. It is whole or refused: a peer that is left out would look as if it had never
// been heard of. Codes wg_status, wg_peers.
func ParseUAPI(r io.Reader) ([]Status, error) {
	var (
		peers   []Status
		seen    = map[PublicKey]bool{}
		ended   bool
		seconds int64
		nanos   int64
	)
	finish := func() {
		if len(peers) > 0 && (seconds != 0 || nanos != 0) {
			peers[len(peers)-1].Handshake = time.Unix(seconds, nanos)
		}
		seconds, nanos = 0, 0
	}
	err := lines(r, func(line string) error {
		if line == "" {
			return nil
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || ended {
			return statusError("a line without meaning")
		}
		if key == "errno" {
			ended = true
			if value != "0" {
				return statusError("WireGuard reports error " + clip(strconv.Quote(value)))
			}
			return nil
		}
		if key == "public_key" {
			finish()
			k, err := hexKey(value)
			switch {
			case err != nil:
				return err
			case seen[k]:
				return statusError("a peer twice")
			case len(peers) == MaxPeers:
				return fault.New("wg_peers", "more than %d peers", MaxPeers)
			}
			seen[k] = true
			peers = append(peers, Status{Key: k})
			return nil
		}
		if len(peers) == 0 {
			return nil // of the interface, the private key among it
		}
		p := &peers[len(peers)-1]
		var err error
		switch key {
		case "endpoint":
			p.Endpoint, err = netip.ParseAddrPort(value)
		case "allowed_ip":
			err = p.allow(value)
		case "last_handshake_time_sec":
			seconds, err = bounded(value, maxSeconds)
		case "last_handshake_time_nsec":
			nanos, err = bounded(value, 1e9-1)
		case "rx_bytes":
			p.Received, err = strconv.ParseUint(value, 10, 64)
		case "tx_bytes":
			p.Sent, err = strconv.ParseUint(value, 10, 64)
		}
		if err != nil {
			return statusError("a value of " + clip(strconv.Quote(key)))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	finish()
	if !ended {
		return nil, statusError("it does not end")
	}
	return peers, nil
}

// maxSeconds is the end of the year 9999.
const maxSeconds = 253402300799

func bounded(s string, limit int64) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || int64(n) > limit {
		return 0, statusError("a time out of range")
	}
	return int64(n), nil
}

func hexKey(s string) (k PublicKey, err error) {
	if len(s) != 2*KeySize {
		return k, statusError("a key of another length")
	}
	if _, err := hex.Decode(k.b[:], []byte(s)); err != nil {
		return k, statusError("a key that is no hexadecimal")
	}
	return k, nil
}

func (p *Status) allow(s string) error {
	if len(p.Allowed) == maxAllowed {
		return statusError("a peer with too many addresses")
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		return err
	}
	p.Allowed = append(p.Allowed, prefix)
	return nil
}

// ParseDump reads `wg show <interface> dump`: a line of the interface, which has the
// private key and is skipped, and a line for each peer. Codes wg_status, wg_peers.
func ParseDump(r io.Reader) ([]Status, error) {
	var (
		peers []Status
		seen  = map[PublicKey]bool{}
		first = true
	)
	err := lines(r, func(line string) error {
		f := strings.Split(line, "\t")
		if first {
			first = false
			if len(f) != 4 {
				return statusError("its first line is not of an interface")
			}
			return nil
		}
		if len(f) != 8 {
			return statusError("a line that is not of a peer")
		}
		k, err := decodeKey(f[0])
		switch {
		case err != nil:
			return err
		case seen[k]:
			return statusError("a peer twice")
		case len(peers) == MaxPeers:
			return fault.New("wg_peers", "more than %d peers", MaxPeers)
		}
		seen[k] = true
		p := Status{Key: k}
		if f[2] != "(none)" {
			if p.Endpoint, err = netip.ParseAddrPort(f[2]); err != nil {
				return statusError("an endpoint")
			}
		}
		if f[3] != "(none)" {
			for a := range strings.SplitSeq(f[3], ",") {
				if p.allow(a) != nil {
					return statusError("an allowed address")
				}
			}
		}
		seconds, err := bounded(f[4], maxSeconds)
		if err != nil {
			return err
		}
		if seconds != 0 {
			p.Handshake = time.Unix(seconds, 0)
		}
		var rx, tx error
		p.Received, rx = strconv.ParseUint(f[5], 10, 64)
		p.Sent, tx = strconv.ParseUint(f[6], 10, 64)
		if rx != nil || tx != nil {
			return statusError("a number of bytes")
		}
		peers = append(peers, p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if first {
		return nil, statusError("it is empty")
	}
	return peers, nil
}
