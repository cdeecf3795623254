// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beevik/ntp"
	"github.com/beevik/nts"
)

func field(kind uint16, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, kind)
	return append(binary.BigEndian.AppendUint16(b, uint16(4+len(body))), body...)
}

func sealed(nonce, ciphertext int) []byte {
	b := []byte{byte(nonce >> 8), byte(nonce), byte(ciphertext >> 8), byte(ciphertext)}
	return append(b, make([]byte, padded(nonce)+padded(ciphertext))...)
}

func packet(mode byte, fields ...[]byte) []byte {
	h := make([]byte, headerSize)
	h[0] = 4<<3 | mode
	for i := 24; i < 48; i++ {
		h[i] = 9 // origin and transmit alike
	}
	return append(h, bytes.Join(fields, nil)...)
}

func TestCheckReply(t *testing.T) {
	id, otherID := field(fieldUniqueID, bytes.Repeat([]byte{1}, 32)...), field(fieldUniqueID, bytes.Repeat([]byte{2}, 32)...)
	auth := field(fieldAuthenticator, sealed(16, 16)...)
	question := packet(3, id, field(0x0204, make([]byte, 100)...), auth)
	for name, c := range map[string]struct {
		reply []byte
		want  string // "" for accepted
	}{
		"good":                    {packet(4, id, auth), ""},
		"with new cookies":        {packet(4, id, field(fieldAuthenticator, sealed(16, 116)...)), ""},
		"another field before":    {packet(4, field(0x2222, make([]byte, 12)...), id, auth), ""},
		"empty":                   {nil, "0 bytes"},
		"cut header":              {packet(4)[:47], "47 bytes"},
		"too large":               {packet(4, id, field(fieldAuthenticator, sealed(16, 5000)...)), "bytes"},
		"no field":                {packet(4), "no authenticator"},
		"no authenticator":        {packet(4, id), "no authenticator"},
		"no identifier":           {packet(4, auth), "no unique identifier"},
		"identifier after":        {packet(4, auth, id), "no unique identifier"},
		"two identifiers":         {packet(4, id, id, auth), "two unique identifiers"},
		"other identifier":        {packet(4, otherID, auth), "unique identifier"},
		"something after":         {packet(4, id, auth, field(0x2222, make([]byte, 12)...)), "follows the authenticator"},
		"two authenticators":      {packet(4, id, auth, auth), "follows the authenticator"},
		"half a field":            {packet(4, id, []byte{1, 2}), "cut off"},
		"a field of 0 bytes":      {packet(4, id, []byte{1, 2, 0, 0}), "0 bytes"},
		"a field of 12 bytes":     {packet(4, id, field(0x2222, make([]byte, 8)...), auth), "12 bytes"},
		"an odd field":            {packet(4, id, field(0x2222, make([]byte, 13)...), auth), "17 bytes"},
		"a field past the end":    {packet(4, id, []byte{1, 2, 1, 0, 0, 0, 0, 0}), "256 bytes"},
		"no nonce":                {packet(4, id, field(fieldAuthenticator, sealed(0, 16)...)), "nonce of 0"},
		"another nonce":           {packet(4, id, field(fieldAuthenticator, sealed(12, 16)...)), "nonce has 12"},
		"no room for the tag":     {packet(4, id, field(fieldAuthenticator, sealed(16, 15)...)), "ciphertext of 15"},
		"a nonce past the end":    {packet(4, id, field(fieldAuthenticator, append([]byte{1, 0, 0, 16}, make([]byte, 32)...)...)), "nonce of 256"},
		"a ciphertext past it":    {packet(4, id, field(fieldAuthenticator, append([]byte{0, 16, 0, 17}, make([]byte, 32)...)...)), "ciphertext of 17"},
		"our own question":        {question, "no answer"},
		"another origin":          {func() []byte { p := packet(4, id, auth); p[24]++; return p }(), "origin timestamp"},
		"an answer to a question": {packet(2, id, auth), "no answer"},
	} {
		err := checkReply(question, c.reply)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	if err := checkReply(packet(3, id), packet(4, id, auth)); err == nil {
		t.Error("a question without authenticator was answered")
	}
}

// FuzzReply sends what an attacker could send through the check to the library, with
// the origin timestamp and, as wished, the identifier right, which the attacker sees.
// Without the keys nothing may be believed, and nothing may panic.
func FuzzReply(f *testing.F) {
	sessions := map[bool]*nts.Session{false: newSession(f, 15), true: newSession(f, 30)}
	for _, rest := range [][]byte{nil, {1, 4, 0, 0}, field(fieldAuthenticator, sealed(16, 16)...), field(fieldAuthenticator, sealed(12, 16)...),
		field(fieldAuthenticator, sealed(0, 16)...), field(fieldAuthenticator, sealed(12, 120)...), {4, 4, 0, 4}, {4, 4, 0, 8, 0, 0, 0, 0}} {
		f.Add(true, true, rest)
		f.Add(true, false, rest)
		f.Add(false, false, rest)
	}
	f.Fuzz(func(t *testing.T, withID, gcm bool, rest []byte) {
		memory := &memoryConn{reply: func(q []byte) []byte {
			b := bytes.Clone(q[:headerSize])
			b[0], b[1] = 4<<3|4, 2
			copy(b[24:32], q[40:48])
			if withID {
				b = append(b, q[headerSize:headerSize+36]...)
			}
			return append(b, rest...)
		}}
		guard := &guardConn{Conn: memory, now: func() time.Duration { return 0 }}
		r, err := sessions[gcm].QueryWithOptions(&ntp.QueryOptions{Dialer: func(_, _ string) (net.Conn, error) { return guard, nil }})
		if err == nil {
			t.Fatalf("%x was believed: %+v", rest, r)
		}
	})
}

// memoryConn answers once.
type memoryConn struct {
	net.Conn
	reply func([]byte) []byte
	out   []byte
}

func (c *memoryConn) Write(b []byte) (int, error) { c.out = c.reply(b); return len(b), nil }

func (c *memoryConn) Read(b []byte) (int, error) {
	if c.out == nil {
		return 0, io.EOF
	}
	n := copy(b, c.out)
	c.out = nil
	return n, nil
}

func (c *memoryConn) Close() error                { return nil }
func (c *memoryConn) SetDeadline(time.Time) error { return nil }

// newSession makes a key exchange over memory, which gives keys for the algorithm.
func newSession(t testing.TB, algorithm byte) *nts.Session {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(240 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	answer := []byte{0x80, 1, 0, 2, 0, 0, 0x80, 4, 0, 2, 0, algorithm, 4, 0, 0, 0}
	for range 8 {
		answer = append(answer, 0, 5, 0, 4, 1, 2, 3, 4)
	}
	answer = append(answer, 0, 6, 0, 9)
	answer = append(answer, "localhost"...)
	answer = append(answer, 0x80, 0, 0, 0)
	serverConfig := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"ntske/1"}}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	session, err := nts.NewSessionWithOptions("localhost", &nts.SessionOptions{
		TLSConfig: &tls.Config{RootCAs: roots, ServerName: "localhost"},
		Dialer: func(_, _ string, cfg *tls.Config) (*tls.Conn, error) {
			ours, theirs := net.Pipe()
			wg.Go(func() {
				defer theirs.Close()
				conn := tls.Server(theirs, serverConfig)
				_, _ = conn.Read(make([]byte, 1024))
				_, _ = conn.Write(answer)
				_, _ = conn.Read(make([]byte, 1))
			})
			conn := tls.Client(ours, cfg)
			return conn, conn.Handshake()
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return session
}
