// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"time"
)

// boundLog cuts an append-mode log that a process keeps writing: what is there
// becomes the one older file, and the live file starts again. What is written
// between copy and cut is lost, which a log can bear.
func boundLog(path string, limit int64) error {
	fi, err := os.Lstat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Size() <= limit {
		return err
	}
	src, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	// The end is what matters: of a log that grew far beyond its limit while no
	// VMM ran, only the last part is kept.
	if _, err := src.Seek(max(0, fi.Size()-limit), io.SeekStart); err != nil {
		return err
	}
	dst, err := os.OpenFile(path+".1", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, io.LimitReader(src, limit+1<<20))
	if e := dst.Close(); err == nil {
		err = e
	}
	// Cut even when the copy failed: a full disk is the worst time to keep it.
	return errors.Join(err, src.Truncate(0))
}

// boundLogs watches logs until ctx ends.
func boundLogs(ctx context.Context, limit int64, paths ...string) {
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, p := range paths {
			boundLog(p, limit) // an absent log is no error; the rest shows in doctor's disk check
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// tailBytes returns up to n last bytes of a log, reaching into its older file,
// and the offset in the live file at which they end.
func tailBytes(path string, n int64) (out []byte, end int64) {
	for i, name := range []string{path, path + ".1"} {
		f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		fi, err := f.Stat()
		if err == nil && fi.Mode().IsRegular() {
			if i == 0 {
				end = fi.Size()
			}
			part := make([]byte, min(fi.Size(), n-int64(len(out))))
			m, _ := f.ReadAt(part, max(0, fi.Size()-int64(len(part))))
			out = append(part[:m:m], out...)
		}
		f.Close()
	}
	return out, end
}

const (
	maxLogTail  = 8 << 20 // bytes looked at for the last lines
	heartbeat   = "[vmm heartbeat]\n"
	heartbeatIn = 60 * time.Second
	followEvery = 200 * time.Millisecond
)

// lastLines returns the last n lines.
func lastLines(data []byte, n int) []byte {
	if n <= 0 {
		return nil
	}
	end := len(data)
	if end > 0 && data[end-1] == '\n' {
		end--
	}
	for i := end - 1; i >= 0; i-- {
		if data[i] == '\n' {
			if n--; n == 0 {
				return data[i+1:]
			}
		}
	}
	return data
}

// streamLog writes the last lines of a log, and with follow what is appended
// until ctx ends.
func streamLog(ctx context.Context, w io.Writer, flush func(), path string, lines int, follow, ansi bool) error {
	var out io.Writer = w
	if !ansi {
		out = &stripper{w: w}
	}
	tail, offset := tailBytes(path, maxLogTail)
	if _, err := out.Write(lastLines(tail, lines)); err != nil {
		return err
	}
	flush()
	if !follow {
		return nil
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		n, err := copyFrom(out, path, &offset)
		if err != nil {
			return err
		}
		switch {
		case n > 0:
			last = time.Now()
			flush()
		case time.Since(last) >= heartbeatIn:
			if _, err := io.WriteString(w, heartbeat); err != nil {
				return err
			}
			last = time.Now()
			flush()
		}
	}
}

// copyFrom copies what is new since offset. A log that shrank was cut.
func copyFrom(w io.Writer, path string, offset *int64) (int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, nil // not there yet
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return 0, nil
	}
	if fi.Size() < *offset {
		*offset = 0
	}
	n, err := io.Copy(w, io.NewSectionReader(f, *offset, fi.Size()-*offset))
	*offset += n
	return n, err
}

// stripper removes terminal control from what a guest printed (threats.md L03):
// escape sequences and all control characters but newline and tab.
type stripper struct {
	w     io.Writer
	state int // 0 text, 1 after ESC, 2 in CSI, 3 in a string (OSC, DCS, …), 4 ESC in a string
}

func (s *stripper) Write(p []byte) (int, error) {
	out := make([]byte, 0, len(p))
	for _, c := range p {
		switch s.state {
		case 0:
			switch {
			case c == 0x1b:
				s.state = 1
			case c == '\n' || c == '\t' || c >= 0x20 && c != 0x7f:
				out = append(out, c)
			}
		case 1:
			switch {
			case c == '[':
				s.state = 2
			case c == ']' || c == 'P' || c == 'X' || c == '^' || c == '_':
				s.state = 3
			case c >= 0x20 && c <= 0x2f: // intermediate bytes
			case c == 0x1b:
			default:
				s.state = 0
			}
		case 2:
			if c >= 0x40 && c <= 0x7e {
				s.state = 0
			} else if c == '\n' { // a broken sequence must not swallow the log
				s.state = 0
				out = append(out, c)
			}
		case 3:
			switch c {
			case 0x07:
				s.state = 0
			case 0x1b:
				s.state = 4
			case '\n':
				s.state = 0
				out = append(out, c)
			}
		case 4:
			s.state = 3
			if c == '\\' {
				s.state = 0
			}
		}
	}
	if _, err := s.w.Write(bytes.ReplaceAll(out, []byte("\u009b"), nil)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// lastMatching returns the last line of a log that contains a word.
func lastMatching(path, word string) string {
	tail, _ := tailBytes(path, 64<<10)
	sc := bufio.NewScanner(bytes.NewReader(tail))
	sc.Buffer(nil, 128<<10)
	found := ""
	for sc.Scan() {
		if line := sc.Text(); len(line) < 4096 && bytes.Contains(sc.Bytes(), []byte(word)) {
			found = line
		}
	}
	return found
}
