// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of /logs. Streams are for strangers, so there are few of them, and fewer
// than init has requests for the rest of the agent.
const (
	maxLogStreams = 4
	maxLogTail    = 100_000
	maxLogFrame   = 64 << 10 // bytes shown in one piece; longer frames come in several
	logSilence    = 600 * time.Second
)

// logQuery is the query of /logs/<container> (guest-agent.md §12).
type logQuery struct {
	since, until int64 // Unix seconds; 0: no bound
	tail         int   // negative: all

	follow, text, timestamps, bare, ansi bool
}

// parseLogQuery reads a query at a time. Codes: logs_since, logs_until, logs_query.
func parseLogQuery(raw string, now time.Time) (logQuery, error) {
	var q logQuery
	values, err := url.ParseQuery(raw)
	if err != nil {
		return q, fault.Wrap(err, "logs_query", "Invalid query")
	}
	var ok bool
	if q.since, ok = moment(values.Get("since"), now); !ok {
		return q, fault.New("logs_since", "Invalid since").WithFix("use Unix seconds, or an age such as 90s, 10m, 2h or 1d")
	}
	if q.until, ok = moment(values.Get("until"), now); !ok {
		return q, fault.New("logs_until", "Invalid until").WithFix("use Unix seconds, or an age such as 90s, 10m, 2h or 1d")
	}
	q.tail = 1000
	switch tail := values.Get("tail"); tail {
	case "":
	case "all":
		q.tail = -1
	default:
		n, err := strconv.ParseUint(tail, 10, 31)
		if err != nil {
			return q, fault.New("logs_query", "Invalid tail").WithFix("use a number of lines, or all")
		}
		q.tail = int(min(n, maxLogTail))
	}
	for name, at := range map[string]*bool{"follow": &q.follow, "text": &q.text, "timestamps": &q.timestamps, "bare": &q.bare, "ansi": &q.ansi} {
		if !values.Has(name) {
			continue
		}
		switch values.Get(name) {
		case "", "true", "on", "yes":
			*at = true
		case "false", "off", "no":
		default:
			return q, fault.New("logs_query", "Invalid %s", name).WithFix("use true or false")
		}
	}
	return q, nil
}

// moment returns the Unix seconds that a text means: digits are that, digits and a
// unit are an age, nothing is 0. An age that reaches back beyond 1970 means 1970.
func moment(text string, now time.Time) (int64, bool) {
	if text == "" {
		return 0, true
	}
	units := map[byte]uint64{'s': 1, 'm': 60, 'h': 3600, 'd': 86400}
	scale, age := units[text[len(text)-1]]
	digits := text
	if age {
		digits = text[:len(text)-1]
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || digits[0] == '+' {
		return 0, false
	}
	if !age {
		return int64(n), true
	}
	if n > math.MaxInt64/scale {
		return 1, true
	}
	return max(1, now.Unix()-int64(n*scale)), true
}

// serveLogs is GET /logs/<container>. Whatever goes wrong is said in the stream,
// with status 200, as upstream's clients expect it; only too many streams are a
// status of their own.
func (a *Agent) serveLogs(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	select {
	case a.logs <- struct{}{}:
		defer func() { <-a.logs }()
	default:
		h.Set("Retry-After", "5")
		writeError(w, http.StatusTooManyRequests, fault.New("logs_busy", "%d streams of logs are open already", maxLogStreams).WithFix("close one, or try again later"))
		return
	}
	// Containers write what they like: nothing of it is for a browser to interpret.
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'; sandbox")
	// Waiting for a container is no slowness of the client.
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Time{})
	rc.SetWriteDeadline(time.Time{})
	fail := func(err error) {
		text, _ := json.Marshal(map[string]string{"error": err.Error(), "code": fault.Code(err)})
		w.Write(append(text, '\n'))
	}
	q, err := parseLogQuery(r.URL.RawQuery, a.now())
	if err != nil {
		fail(err)
		return
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	logs, err := a.init.Logs(ctx, initrpc.LogsRequest{
		Container: r.PathValue("container"), Since: q.since, Until: q.until, Tail: q.tail, Follow: q.follow, Timestamps: q.timestamps,
	})
	if err != nil {
		fail(err)
		return
	}
	defer logs.Stream.Close()
	silence := time.AfterFunc(logSilence, cancel)
	defer silence.Stop()
	err = readLogs(logs, func(channel byte, message []byte) error {
		silence.Reset(logSilence)
		if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
			return err
		}
		if _, err := w.Write(q.line(channel, message)); err != nil {
			return err
		}
		if err := rc.Flush(); err != nil {
			return err
		}
		return rc.SetWriteDeadline(time.Time{})
	})
	if err != nil && ctx.Err() == nil {
		fail(err)
	}
}

var logChannels = [4]string{"stdin", "stdout", "stderr", "console"}

// readLogs calls show for each frame of a container's output, in pieces of at most
// maxLogFrame bytes. Output without frames is that of a console.
func readLogs(logs initrpc.Logs, show func(channel byte, message []byte) error) error {
	buf := make([]byte, maxLogFrame)
	if !logs.Framed {
		for {
			n, err := logs.Stream.Read(buf)
			if n > 0 {
				if err := show(3, buf[:n]); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	for {
		var head [8]byte
		if _, err := io.ReadFull(logs.Stream, head[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if head[0] > 3 || head[1]|head[2]|head[3] != 0 {
			return fault.New("logs_malformed", "the engine's stream of logs is not framed as it says")
		}
		for left := binary.BigEndian.Uint32(head[4:]); left > 0; {
			piece := buf[:min(left, maxLogFrame)]
			if _, err := io.ReadFull(logs.Stream, piece); err != nil {
				return err
			}
			if err := show(head[0], piece); err != nil {
				return err
			}
			left -= uint32(len(piece))
		}
	}
}

// line is how one frame is shown.
func (q logQuery) line(channel byte, message []byte) []byte {
	var text string
	switch {
	case !q.text:
		text = base64.StdEncoding.EncodeToString(message)
	case q.bare && !q.ansi:
		text = stripANSI(string(message))
	default:
		text = string(message)
	}
	if q.bare {
		return []byte(text)
	}
	line, _ := json.Marshal(struct {
		Channel string `json:"channel"`
		Message string `json:"message"`
	}{logChannels[channel], text})
	return append(line, '\n')
}

// stripANSI removes the control sequences of terminals (ECMA-48 §5.4: CSI, up to
// its final byte; OSC, up to BEL or ST; and escapes of one byte).
func stripANSI(s string) string {
	if !strings.Contains(s, "\x1b") {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != 0x1b {
			b.WriteByte(s[i])
			continue
		}
		i++
		if i == len(s) {
			break
		}
		switch s[i] {
		case '[':
			for i++; i < len(s) && (s[i] < 0x40 || s[i] > 0x7e); i++ {
			}
		case ']':
			for i++; i < len(s) && s[i] != 7; i++ {
				if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '\\' {
					i++
					break
				}
			}
		}
	}
	return b.String()
}
