// SPDX-License-Identifier: Apache-2.0

package hostlink

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// quick options find a dead peer in well under a second.
func quick() Options {
	return Options{MaxStreams: 8, KeepAlive: 100 * time.Millisecond, Timeout: 500 * time.Millisecond, HandshakeTimeout: 2 * time.Second}
}

// patient options never give a live peer up on a busy machine.
func patient() Options { return Options{MaxStreams: 8} }

func socketpair(t testing.TB) (a, b io.ReadWriteCloser) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
}

// transports are the pipes that every test of sessions runs over.
var transports = map[string]func(testing.TB) (host, guest io.ReadWriteCloser){
	"net.Pipe":   func(testing.TB) (io.ReadWriteCloser, io.ReadWriteCloser) { return net.Pipe() },
	"socketpair": socketpair,
	"dirty port": func(t testing.TB) (io.ReadWriteCloser, io.ReadWriteCloser) {
		p := newPort()
		p.toGuest, p.toHost = garbage(10_000), garbage(10_000)
		h, _ := p.dialHost(t.Context())
		g, _ := p.dialGuest(t.Context())
		return h, g
	},
}

// garbage looks like what an old session may leave: frames, cut handshakes, noise.
func garbage(n int) []byte {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	out := []byte("\xd5dstack-hel")
	out = append(out, message(magicReply, nonce{1})...)
	out = append(out, message(magicGo, nonce{2})...)
	for len(out) < n {
		out = append(out, byte(rng.Uint32()))
	}
	return append(out, magicHello[:9]...)
}

func sessions(t testing.TB, pair func(testing.TB) (io.ReadWriteCloser, io.ReadWriteCloser), opt Options) (host, guest *Session) {
	t.Helper()
	h, g := pair(t)
	var wg sync.WaitGroup
	var herr, gerr error
	wg.Go(func() { host, herr = Host(deadline(t), h, opt) })
	wg.Go(func() { guest, gerr = Guest(deadline(t), g, opt) })
	wg.Wait()
	if herr != nil || gerr != nil {
		t.Fatalf("host: %v; guest: %v", herr, gerr)
	}
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest
}

type opener interface {
	Open(context.Context, string) (net.Conn, error)
	Listen(string) (net.Listener, error)
}

// echo serves a stream that returns what it gets.
func echo(t testing.TB, s opener, name string) net.Listener {
	t.Helper()
	l, err := s.Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				conns.Wait()
				return
			}
			conns.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	}()
	t.Cleanup(func() { l.Close() })
	return l
}

// roundTrip sends n bytes through an echo stream and compares what returns.
func roundTrip(t testing.TB, s opener, name string, n int) error {
	c, err := s.Open(deadline(t), name)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	sent := make([]byte, n)
	for i := range sent {
		sent[i] = byte(i * 7)
	}
	var wg sync.WaitGroup
	var werr error
	wg.Go(func() { _, werr = c.Write(sent) })
	got := make([]byte, n)
	_, err = io.ReadFull(c, got)
	wg.Wait()
	if err = errors.Join(err, werr); err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return errors.New("other bytes came back")
	}
	return nil
}

func TestConformance(t *testing.T) {
	for name, pair := range transports {
		t.Run(name, func(t *testing.T) {
			t.Run("streams in both directions", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, StreamHostAPI)
				echo(t, guest, StreamGuestAPI)
				var wg sync.WaitGroup
				for range 3 {
					wg.Go(func() {
						if err := roundTrip(t, host, StreamGuestAPI, 1<<20); err != nil {
							t.Error(err)
						}
					})
					wg.Go(func() {
						if err := roundTrip(t, guest, StreamHostAPI, 1<<20); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
			})
			t.Run("unknown and impossible names", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, "known")
				if _, err := guest.Open(deadline(t), "unknown"); !errors.Is(err, ErrNoStream) {
					t.Errorf("error %v, want ErrNoStream", err)
				}
				for _, bad := range []string{"", "Known", "a b", "../x", strings.Repeat("x", 33)} {
					if _, err := guest.Open(deadline(t), bad); err == nil || errors.Is(err, ErrNoStream) {
						t.Errorf("open %q: error %v", bad, err)
					}
					if _, err := guest.Listen(bad); err == nil {
						t.Errorf("listen %q succeeded", bad)
					}
				}
				if _, err := host.Listen("known"); err == nil {
					t.Error("two listeners of one name")
				}
				if err := roundTrip(t, guest, "known", 10); err != nil {
					t.Errorf("after the refusals: %v", err)
				}
			})
			t.Run("a name is free again after its listener closed", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, "x").Close()
				if _, err := guest.Open(deadline(t), "x"); !errors.Is(err, ErrNoStream) {
					t.Errorf("error %v, want ErrNoStream", err)
				}
				echo(t, host, "x")
				if err := roundTrip(t, guest, "x", 10); err != nil {
					t.Error(err)
				}
			})
			t.Run("too many streams", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, "x")
				var open []net.Conn
				for range patient().MaxStreams {
					c, err := guest.Open(deadline(t), "x")
					if err != nil {
						t.Fatal(err)
					}
					open = append(open, c)
				}
				if _, err := guest.Open(deadline(t), "x"); !errors.Is(err, ErrBusy) {
					t.Errorf("error %v, want ErrBusy", err)
				}
				// A peer that ignores its own limit meets ours.
				guest.out = make(chan struct{}, 100)
				if _, err := guest.Open(deadline(t), "x"); !errors.Is(err, ErrBusy) {
					t.Errorf("error %v, want ErrBusy", err)
				}
				for _, c := range open {
					c.(*conn).release = func() {}
					c.Close()
				}
				eventually(t, func() error { return roundTrip(t, guest, "x", 10) })
			})
			t.Run("a slow reader blocks nobody else", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, "echo")
				l, err := host.Listen("slow")
				if err != nil {
					t.Fatal(err)
				}
				stuck, err := guest.Open(deadline(t), "slow")
				if err != nil {
					t.Fatal(err)
				}
				defer stuck.Close()
				c, err := l.Accept() // and never reads
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				stuck.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				n, err := stuck.Write(make([]byte, 1<<20))
				if ne := net.Error(nil); !errors.As(err, &ne) || !ne.Timeout() || n != 256<<10-len("\x04slow") {
					t.Errorf("wrote %d bytes to the slow reader: %v; want a window of 256 KiB, less the header, and a timeout", n, err)
				}
				if err := roundTrip(t, guest, "echo", 100_000); err != nil {
					t.Error(err)
				}
			})
			t.Run("the end of a session is not the end of a stream", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				l, err := host.Listen("x")
				if err != nil {
					t.Fatal(err)
				}
				lost, err := guest.Open(deadline(t), "x")
				if err != nil {
					t.Fatal(err)
				}
				closed, err := guest.Open(deadline(t), "x")
				if err != nil {
					t.Fatal(err)
				}
				for range 2 {
					c, err := l.Accept()
					if err != nil {
						t.Fatal(err)
					}
					io.WriteString(c, "half a re")
					if c.(*conn).StreamID() == closed.(*conn).StreamID() {
						c.Close()
					}
				}
				if got, err := io.ReadAll(closed); err != nil || string(got) != "half a re" {
					t.Errorf("a closed stream reads %q, %v", got, err)
				}
				host.Close()
				if got, err := io.ReadAll(lost); !errors.Is(err, ErrSessionLost) {
					t.Errorf("a lost stream reads %q, %v", got, err)
				}
				if _, err := lost.Write([]byte("x")); !errors.Is(err, ErrSessionLost) {
					t.Errorf("a lost stream writes: %v", err)
				}
				if _, err := guest.Open(deadline(t), "x"); !errors.Is(err, ErrSessionLost) {
					t.Errorf("open after the end: %v", err)
				}
				if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
					t.Errorf("accept after the end: %v", err)
				}
				<-guest.Done()
				if guest.Err() == nil || host.Err() == nil {
					t.Error("no reason for the end")
				}
				lost.Close()
				closed.Close()
			})
			t.Run("HTTP", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				l, err := guest.Listen(StreamGuestAPI)
				if err != nil {
					t.Fatal(err)
				}
				body := strings.Repeat("x", 300_000)
				srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					io.WriteString(w, body)
				})}
				go srv.Serve(l)
				defer srv.Close()
				client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return host.Open(ctx, StreamGuestAPI)
				}}}
				defer client.CloseIdleConnections()
				for range 20 {
					resp, err := client.Post("http://guest/", "", strings.NewReader(body))
					if err != nil {
						t.Fatal(err)
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					if err != nil || string(got) != body {
						t.Fatalf("%d bytes, %v", len(got), err)
					}
				}
			})
			t.Run("many short streams", func(t *testing.T) {
				host, guest := sessions(t, pair, patient())
				echo(t, host, "x")
				for range 300 {
					if err := roundTrip(t, guest, "x", 1); err != nil {
						t.Fatal(err)
					}
				}
			})
		})
	}
}

func eventually(t testing.TB, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Error(err)
}

func TestOpenEndsWithItsContext(t *testing.T) {
	a, b := socketpair(t)
	defer b.Close()
	// A peer that shakes hands and then only reads.
	go func() {
		if _, err := shakeGuest(b); err == nil {
			io.Copy(io.Discard, b)
		}
	}()
	host, err := Host(deadline(t), a, patient())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := host.Open(ctx, "x"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestSilentPeerIsGivenUp(t *testing.T) {
	a, b := socketpair(t)
	defer b.Close()
	go func() {
		if _, err := shakeGuest(b); err == nil {
			io.Copy(io.Discard, b)
		}
	}()
	host, err := Host(deadline(t), a, quick())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	select {
	case <-host.Done():
	case <-time.After(patience):
		t.Error("the session goes on without the peer")
	}
}

// A hello that was repeated while the guest was not reading is answered once: what
// follows the first reply is read by the host as frames.
func TestGuestRepliesOncePerNonce(t *testing.T) {
	var in, out, want bytes.Buffer
	for _, n := range []nonce{{11}, {11}, {12}, {12}, {12}} {
		in.Write(garbage(50))
		in.Write(message(magicHello, n))
	}
	in.Write(message(magicGo, nonce{11})) // of a host that has gone
	in.Write(message(magicGo, nonce{12}))
	in.WriteString("frames")
	want.Write(message(magicReply, nonce{11}))
	want.Write(message(magicReply, nonce{12}))
	rest, err := shakeGuest(struct {
		io.Reader
		io.Writer
	}{&in, &out})
	if err != nil {
		t.Fatal(err)
	}
	if tail, _ := io.ReadAll(rest); string(tail) != "frames" || !bytes.Equal(out.Bytes(), want.Bytes()) {
		t.Errorf("replies %x, rest %q", out.Bytes(), tail)
	}
}

func TestHostWaitsForTheReplyToItsOwnNonce(t *testing.T) {
	a, b := socketpair(t)
	defer a.Close()
	defer b.Close()
	go func() {
		_, own, err := newScanner(b).next(magicHello)
		if err != nil {
			return
		}
		b.Write(message(magicReply, nonce{7}))
		b.Write(garbage(100))
		b.Write(append(message(magicReply, own), "frames"...))
		b.(*os.File).SetReadDeadline(time.Now().Add(patience))
		if _, got, err := newScanner(b).next(magicGo); err != nil || got != own {
			t.Errorf("go with nonce %x, %v", got, err)
		}
		b.Close()
	}()
	rest, err := shakeHost(deadline(t), a)
	if err != nil {
		t.Fatal(err)
	}
	if tail, _ := io.ReadAll(rest); string(tail) != "frames" {
		t.Errorf("rest %q", tail)
	}
}

func TestHandshakeEndsWithItsContext(t *testing.T) {
	for name, shake := range map[string]func(context.Context, io.ReadWriteCloser, Options) (*Session, error){"host": Host, "guest": Guest} {
		a, b := net.Pipe() // unbuffered: the host's write blocks
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := shake(ctx, a, patient()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: error %v", name, err)
		}
		cancel()
		if _, err := b.Write([]byte("x")); err == nil {
			t.Errorf("%s: the pipe was left open", name)
		}
	}
}

// endless yields a pattern for ever, and counts.
type endless struct {
	pattern []byte
	read    int
}

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.pattern[(e.read+i)%len(e.pattern)]
	}
	e.read += len(p)
	return len(p), nil
}
func (e *endless) Write(p []byte) (int, error) { return len(p), nil }
func (e *endless) Close() error                { return nil }

func TestPeerThatFloodsInsteadOfShakingHandsIsBounded(t *testing.T) {
	for name, pattern := range map[string][]byte{
		"zeros":          {0},
		"first bytes":    {0xd5},
		"hellos":         message(magicHello, nonce{1}),
		"others' reply":  message(magicReply, nonce{1}),
		"go without all": message(magicGo, nonce{}),
	} {
		for side, shake := range map[string]func(context.Context, io.ReadWriteCloser, Options) (*Session, error){"host": Host, "guest": Guest} {
			e := &endless{pattern: pattern}
			if _, err := shake(deadline(t), e, patient()); !errors.Is(err, ErrHandshake) {
				t.Errorf("%s, %s: error %v", side, name, err)
			}
			if e.read > maxGarbage+8192 {
				t.Errorf("%s, %s: %d bytes read", side, name, e.read)
			}
		}
	}
}

// frame is one yamux frame.
func frame(kind byte, flags uint16, stream, length uint32) []byte {
	b := []byte{0, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return binary.BigEndian.AppendUint32(b, length)
}

func TestPeerThatBreaksTheProtocolEndsItsSession(t *testing.T) {
	header := append([]byte{1}, 'x')
	for name, attack := range map[string]func(i uint32) []byte{
		"pings":              func(i uint32) []byte { return frame(2, flagSYN, 0, i) },
		"streams":            func(i uint32) []byte { return frame(1, flagSYN, 2*i+2, 0) },
		"streams with data":  func(i uint32) []byte { return append(frame(0, flagSYN, 2*i+2, 2), header...) },
		"another hello":      func(i uint32) []byte { return message(magicHello, nonce{9}) },
		"not frames":         func(i uint32) []byte { return frame(4, 0, 0, 0) },
		"data over window":   func(i uint32) []byte { return append(frame(0, flagSYN, 2*i+2, 1<<20), make([]byte, 1<<20)...) },
		"a stream of 4 GiB":  func(i uint32) []byte { return append(frame(0, flagSYN, 2*i+2, 1<<32-1), make([]byte, 1000)...) },
		"a duplicate stream": func(i uint32) []byte { return frame(1, flagSYN, 2, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := socketpair(t)
			shaken := make(chan error, 1)
			go func() { _, err := shakeGuest(b); shaken <- err }()
			host, err := Host(deadline(t), a, patient())
			if err != nil || <-shaken != nil {
				t.Fatal(err)
			}
			defer host.Close()
			before := runtime.NumGoroutine()
			var wg sync.WaitGroup
			wg.Go(func() { io.Copy(io.Discard, b) })
			for i := uint32(0); ; i++ {
				if _, err := b.Write(attack(i)); err != nil {
					break
				}
				if i > 100_000 {
					t.Error("still accepted")
					break
				}
			}
			if n := runtime.NumGoroutine(); n > before+20*patient().MaxStreams {
				t.Errorf("%d goroutines, %d before", n, before)
			}
			b.Close()
			wg.Wait()
			<-host.Done()
		})
	}
}

// A stream whose header never comes, or is none, takes a place for a while and then
// is gone; others work meanwhile.
func TestStreamsWithoutHeader(t *testing.T) {
	host, guest := sessions(t, socketpair, patient())
	echo(t, host, "x")
	for _, header := range []string{"", "\x00", "\x21" + strings.Repeat("x", 33), "\x03A/B", "\x05x"} {
		raw, err := guest.mux.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		io.WriteString(raw, header)
		if header == "" || header == "\x05x" {
			continue // the server waits for more
		}
		raw.SetReadDeadline(time.Now().Add(patience))
		if n, err := raw.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("header %q: %d bytes, %v", header, n, err)
		}
	}
	if err := roundTrip(t, guest, "x", 10); err != nil {
		t.Error(err)
	}
}

func TestListenerThatIsNotServedFillsUp(t *testing.T) {
	host, guest := sessions(t, socketpair, Options{MaxStreams: backlog + 10})
	l, err := host.Listen("x")
	if err != nil {
		t.Fatal(err)
	}
	var last error
	for range backlog + 1 {
		var c net.Conn
		if c, last = guest.Open(deadline(t), "x"); last == nil {
			defer c.Close()
		}
	}
	if !errors.Is(last, ErrBusy) {
		t.Errorf("error %v, want ErrBusy", last)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if c, err := guest.Open(deadline(t), "x"); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
	l.Close() // closes the streams in its queue
}

func TestOpenVirtioPort(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	for node, name := range map[string]string{"vport0p1": "other", "vport2p3": PortName + "\n", "evil": PortName} {
		if err := os.MkdirAll(filepath.Join(sys, node), 0o700); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(sys, node, "name"), []byte(name), 0o600)
	}
	if _, err := openVirtioPort(sys, dev, PortName); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no device node: %v", err)
	}
	if err := syscall.Mkfifo(filepath.Join(dev, "vport2p3"), 0o600); err != nil {
		t.Fatal(err)
	}
	port, err := openVirtioPort(sys, dev, PortName)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { port.Close() })
	if _, err := port.Read(make([]byte, 1)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Close does not end Read: %v", err)
	}
	if _, err := openVirtioPort(sys, dev, "absent"); err == nil || !strings.Contains(err.Error(), "no port has that name") {
		t.Errorf("error %v", err)
	}
	if _, err := openVirtioPort(filepath.Join(sys, "none"), dev, "x"); err == nil {
		t.Error("no ports at all, and no error")
	}
}

func TestTooLongAHeaderIsNotRead(t *testing.T) {
	for _, n := range []byte{0, maxName + 1, 255} {
		r := bytes.NewReader(append([]byte{n}, strings.Repeat("x", 255)...))
		if _, err := readHeader(r); !errors.Is(err, errProtocol) || r.Len() != 255 {
			t.Errorf("length %d: error %v, %d bytes left", n, err, r.Len())
		}
	}
}

func FuzzHandshake(f *testing.F) {
	f.Add([]byte{})
	f.Add(message(magicHello, nonce{1}))
	f.Add(append(message(magicHello, nonce{1}), message(magicGo, nonce{1})...))
	f.Add(append(append(garbage(100), message(magicHello, nonce{1})...), append(message(magicHello, nonce{2}), append(message(magicGo, nonce{1}), message(magicGo, nonce{2})...)...)...))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		rest, err := shakeGuest(struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(data), &out})
		if out.Len()%32 != 0 || out.Len() > len(data)/32*32 {
			t.Fatalf("%d bytes in, %d bytes out", len(data), out.Len())
		}
		if err != nil {
			return
		}
		// It was established, so the last go that was read carries the last reply's nonce.
		tail, _ := io.ReadAll(rest)
		seen := data[:len(data)-len(tail)]
		if !bytes.Equal(seen[len(seen)-16:], out.Bytes()[out.Len()-16:]) || !bytes.Equal(seen[len(seen)-32:len(seen)-16], magicGo[:]) {
			t.Fatal("established without a matching go")
		}
	})
}

func FuzzStreamHeader(f *testing.F) {
	f.Add([]byte("\x07hostapi"))
	f.Add([]byte("\x00"))
	f.Add([]byte("\x20" + strings.Repeat("x", 32)))
	f.Fuzz(func(t *testing.T, data []byte) {
		name, err := readHeader(bytes.NewReader(data))
		if err == nil && (!nameRule.MatchString(name) || len(name) != int(data[0])) {
			t.Fatalf("accepted %q", name)
		}
	})
}

// The guard sees the same frames however the bytes are cut.
func FuzzGuard(f *testing.F) {
	f.Add(append(frame(0, 1, 2, 3), append([]byte("abc"), frame(2, 1, 0, 0)...)...), byte(5))
	f.Add(frame(4, 0, 0, 0), byte(1))
	f.Fuzz(func(t *testing.T, data []byte, cut byte) {
		fresh := func() *guard {
			g := newGuard(nil, nil)
			g.streams, g.maxStreams, g.pings = func() int { return 0 }, 1, 1e9
			return g
		}
		whole, parts := fresh(), fresh()
		a := whole.inspect(data)
		var b error
		for rest := data; len(rest) > 0 && b == nil; {
			n := min(len(rest), int(cut)+1)
			b = parts.inspect(rest[:n])
			rest = rest[n:]
		}
		if fmt.Sprint(a) != fmt.Sprint(b) {
			t.Fatalf("whole: %v; in parts: %v", a, b)
		}
	})
}
