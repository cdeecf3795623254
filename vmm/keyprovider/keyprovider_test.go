// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// provider is a local key provider: it reads one request per connection and has
// answer write whatever it likes.
func provider(t *testing.T, answer func(conn net.Conn, request []byte)) *Client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	t.Cleanup(func() { l.Close(); group.Wait() })
	group.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer conn.Close()
				var head [4]byte
				if _, err := io.ReadFull(conn, head[:]); err != nil {
					return
				}
				n := binary.BigEndian.Uint32(head[:])
				if n < 1 || n > MaxFrame {
					t.Errorf("a request of %d bytes", n)
					return
				}
				body := make([]byte, n)
				if _, err := io.ReadFull(conn, body); err == nil {
					answer(conn, body)
				}
			})
		}
	})
	return New(l.Addr().String())
}

func frame(body string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
}

func TestKeyOfAQuote(t *testing.T) {
	quote := bytes.Repeat([]byte{0, 7, 255}, MaxQuote/3)
	c := provider(t, func(conn net.Conn, body []byte) {
		// The form is the provider's: numbers, not text.
		var in struct {
			Quote []int `json:"quote"`
		}
		if err := json.Unmarshal(body, &in); err != nil || len(in.Quote) != len(quote) || in.Quote[1] != 7 || in.Quote[2] != 255 {
			t.Errorf("%d bytes, %v", len(in.Quote), err)
		}
		conn.Write(frame(` {"provider_quote": [ 3 ,4], "encrypted_key":[1,2,255],"later":{}} `))
	})
	key, err := c.SealingKey(t.Context(), quote)
	if err != nil || !bytes.Equal(key.Encrypted, []byte{1, 2, 255}) || !bytes.Equal(key.Quote, []byte{3, 4}) {
		t.Fatal(key, err)
	}
}

func TestBadQuotesAreNotSent(t *testing.T) {
	c := provider(t, func(net.Conn, []byte) { t.Error("it was sent") })
	for _, n := range []int{0, MaxQuote + 1} {
		if _, err := c.SealingKey(t.Context(), make([]byte, n)); fault.Code(err) != "sealing_quote_invalid" {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestBadAnswers(t *testing.T) {
	ones := func(n int) string { return "[" + strings.Repeat("1,", n-1) + "1]" }
	for name, tc := range map[string]struct {
		answer []byte
		code   string
	}{
		"none":                     {nil, "key_provider_answer"},
		"half a length":            {[]byte{0, 0}, "key_provider_answer"},
		"an empty frame":           {frame(""), "key_provider_answer"},
		"a frame over the limit":   {binary.BigEndian.AppendUint32(nil, MaxFrame+1), "key_provider_answer"},
		"a huge frame":             {binary.BigEndian.AppendUint32(nil, 1<<32-1), "key_provider_answer"},
		"a frame that is cut":      {frame(`{"encrypted_key":[1],"provider_quote":[1]}`)[:20], "key_provider_answer"},
		"not JSON":                 {frame("{"), "key_provider_answer"},
		"text for bytes":           {frame(`{"encrypted_key":"AQ==","provider_quote":[1]}`), "key_provider_answer"},
		"a number over 255":        {frame(`{"encrypted_key":[256],"provider_quote":[1]}`), "key_provider_answer"},
		"a negative number":        {frame(`{"encrypted_key":[-1],"provider_quote":[1]}`), "key_provider_answer"},
		"a fraction":               {frame(`{"encrypted_key":[1.0],"provider_quote":[1]}`), "key_provider_answer"},
		"a nested array":           {frame(`{"encrypted_key":[[1]],"provider_quote":[1]}`), "key_provider_answer"},
		"no key":                   {frame(`{"provider_quote":[1]}`), "key_provider_answer"},
		"null for a key":           {frame(`{"encrypted_key":null,"provider_quote":[1]}`), "key_provider_answer"},
		"an empty key":             {frame(`{"encrypted_key":[],"provider_quote":[1]}`), "key_provider_answer"},
		"a key over the limit":     {frame(`{"encrypted_key":` + ones(maxKey+1) + `,"provider_quote":[1]}`), "key_provider_answer"},
		"no quote":                 {frame(`{"encrypted_key":[1]}`), "key_provider_answer"},
		"a quote over the limit":   {frame(`{"encrypted_key":[1],"provider_quote":` + ones(MaxQuote+1) + `}`), "key_provider_answer"},
		"a key twice":              {frame(`{"encrypted_key":[1],"encrypted_key":[2],"provider_quote":[1]}`), "key_provider_answer"},
		"an error of the provider": {frame(`{"error":"QE ids differ"}`), "key_provider_refused"},
	} {
		c := provider(t, func(conn net.Conn, _ []byte) { conn.Write(tc.answer) })
		key, err := c.SealingKey(t.Context(), []byte{1})
		if fault.Code(err) != tc.code {
			t.Errorf("%s: %v, %v, want %s", name, key, err, tc.code)
		}
		// It is refused for its length, before anything of it is read.
		if n := len(tc.answer); n == 4 && !strings.Contains(err.Error(), "announces") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestProviderThatIsNotThereOrSilent(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	if _, err := New(addr).SealingKey(t.Context(), []byte{1}); fault.Code(err) != "key_provider_unreachable" || fault.Fix(err) == "" {
		t.Error(err)
	}
	release := make(chan struct{})
	c := provider(t, func(conn net.Conn, _ []byte) {
		conn.Write([]byte{0})
		<-release
	})
	c.timeout = 100 * time.Millisecond
	began := time.Now()
	if _, err := c.SealingKey(t.Context(), []byte{1}); fault.Code(err) != "key_provider_timeout" || time.Since(began) > 10*time.Second {
		t.Error(err)
	}
	c.timeout = time.Minute
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := c.SealingKey(ctx, []byte{1}); err != context.Canceled {
		t.Error(err)
	}
	close(release)
}

func TestOnlySoManyAtOnce(t *testing.T) {
	release := make(chan struct{})
	c := provider(t, func(conn net.Conn, _ []byte) {
		<-release
		conn.Write(frame(`{"encrypted_key":[1],"provider_quote":[1]}`))
	})
	var group sync.WaitGroup
	for range MaxConnections {
		group.Go(func() {
			if _, err := c.SealingKey(context.Background(), []byte{1}); err != nil {
				t.Error(err)
			}
		})
	}
	for len(c.slots) < MaxConnections {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.SealingKey(t.Context(), []byte{1}); fault.Code(err) != "key_provider_busy" || fault.Fix(err) == "" {
		t.Error(err)
	}
	close(release)
	group.Wait()
	if _, err := c.SealingKey(t.Context(), []byte{1}); err != nil {
		t.Error(err)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"encrypted_key":[1,2,255],"provider_quote":[3]}`))
	f.Add([]byte(`{"encrypted_key":[],"provider_quote":null,"error":"x"}`))
	f.Add([]byte(`{"encrypted_key":[ 1 , 2 ],"provider_quote":[0]} `))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := answer(data)
		if err != nil {
			if c := fault.Code(err); c != "key_provider_answer" && c != "key_provider_refused" {
				t.Fatal(err)
			}
			return
		}
		if len(key.Encrypted) == 0 || len(key.Encrypted) > maxKey || len(key.Quote) == 0 {
			t.Fatal(key)
		}
		// encoding/json reads the same.
		var in struct {
			Key []int `json:"encrypted_key"`
		}
		if err := json.Unmarshal(data, &in); err != nil || fmt.Sprint(in.Key) != fmt.Sprint(key.Encrypted) {
			t.Fatalf("%v, %v: %v", in.Key, key.Encrypted, err)
		}
	})
}
