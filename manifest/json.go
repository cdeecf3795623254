// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"sort"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/dstack-go/dstack/internal/fault"
)

// encoding/json is not used to read manifests: it matches keys without regard to
// case, lets the last of two equal keys win, and turns broken surrogates into
// U+FFFD. Upstream's parser does none of these, so the two would disagree on
// what the measured bytes mean.

const (
	maxDepth  = 64      // nesting of arrays and objects
	maxValues = 1 << 18 // values of any kind in one document; bounds memory
)

// number is a JSON number in its source text.
type number string

// object keeps its members by exact key; order does not matter to any reader.
type object map[string]any

type jsonReader struct {
	in     []byte
	pos    int
	depth  int
	values int
}

// parseJSON reads one RFC 8259 value into nil, bool, string, number, []any or
// object, refusing duplicate keys, invalid UTF-8, lone surrogates and trailing data.
func parseJSON(in []byte) (any, error) {
	if !utf8.Valid(in) {
		return nil, fault.New("manifest_malformed", "the manifest is not valid UTF-8").
			WithFix("save the file as UTF-8 without a byte-order mark")
	}
	r := &jsonReader{in: in}
	v, err := r.value()
	if err != nil {
		return nil, err
	}
	r.space()
	if r.pos != len(r.in) {
		return nil, r.fail("unexpected data after the JSON value")
	}
	return v, nil
}

func (r *jsonReader) fail(format string, args ...any) error {
	line := 1 + strings.Count(string(r.in[:min(r.pos, len(r.in))]), "\n")
	return fault.New("manifest_malformed", "manifest line %d (byte %d): %s", line, r.pos, fmt.Sprintf(format, args...))
}

func (r *jsonReader) space() {
	for r.pos < len(r.in) {
		switch r.in[r.pos] {
		case ' ', '\t', '\n', '\r':
			r.pos++
		default:
			return
		}
	}
}

func (r *jsonReader) peek() byte {
	if r.pos < len(r.in) {
		return r.in[r.pos]
	}
	return 0
}

func (r *jsonReader) value() (any, error) {
	if r.values++; r.values > maxValues {
		return nil, fault.New("manifest_too_large", "the manifest holds more than %d JSON values", maxValues)
	}
	r.space()
	if r.pos >= len(r.in) {
		return nil, r.fail("unexpected end of input")
	}
	switch c := r.in[r.pos]; {
	case c == '{':
		return r.object()
	case c == '[':
		return r.array()
	case c == '"':
		return r.str()
	case c == '-' || c >= '0' && c <= '9':
		return r.number()
	}
	for _, lit := range []struct {
		text  string
		value any
	}{{"true", true}, {"false", false}, {"null", nil}} {
		if strings.HasPrefix(string(r.in[r.pos:min(r.pos+5, len(r.in))]), lit.text) {
			r.pos += len(lit.text)
			return lit.value, nil
		}
	}
	return nil, r.fail("unexpected character %q", r.in[r.pos])
}

func (r *jsonReader) enter() error {
	if r.depth++; r.depth > maxDepth {
		return r.fail("nested deeper than %d levels", maxDepth)
	}
	return nil
}

func (r *jsonReader) object() (any, error) {
	if err := r.enter(); err != nil {
		return nil, err
	}
	r.pos++
	out := object{}
	r.space()
	if r.peek() == '}' {
		r.pos++
		r.depth--
		return out, nil
	}
	for {
		r.space()
		if r.peek() != '"' {
			return nil, r.fail("expected a member name")
		}
		key, err := r.str()
		if err != nil {
			return nil, err
		}
		if _, dup := out[key]; dup {
			return nil, fault.New("manifest_duplicate_key",
				"the manifest has the key %q twice in one object (byte %d): readers would disagree on which one counts", clip(key), r.pos).
				WithFix("remove one of the two")
		}
		r.space()
		if r.peek() != ':' {
			return nil, r.fail("expected ':' after the name %q", clip(key))
		}
		r.pos++
		v, err := r.value()
		if err != nil {
			return nil, err
		}
		out[key] = v
		r.space()
		switch r.peek() {
		case ',':
			r.pos++
		case '}':
			r.pos++
			r.depth--
			return out, nil
		default:
			return nil, r.fail("expected ',' or '}'")
		}
	}
}

func (r *jsonReader) array() (any, error) {
	if err := r.enter(); err != nil {
		return nil, err
	}
	r.pos++
	out := []any{}
	r.space()
	if r.peek() == ']' {
		r.pos++
		r.depth--
		return out, nil
	}
	for {
		v, err := r.value()
		if err != nil {
			return nil, err
		}
		out = append(out, v)
		r.space()
		switch r.peek() {
		case ',':
			r.pos++
		case ']':
			r.pos++
			r.depth--
			return out, nil
		default:
			return nil, r.fail("expected ',' or ']'")
		}
	}
}

func (r *jsonReader) str() (string, error) {
	r.pos++
	start := r.pos
	// The common case has no escapes and needs no copy but the final one.
	for r.pos < len(r.in) && r.in[r.pos] != '"' && r.in[r.pos] != '\\' && r.in[r.pos] >= 0x20 {
		r.pos++
	}
	if r.peek() == '"' && r.pos < len(r.in) {
		s := string(r.in[start:r.pos])
		r.pos++
		return s, nil
	}
	var b strings.Builder
	b.Write(r.in[start:r.pos])
	for r.pos < len(r.in) {
		c := r.in[r.pos]
		switch {
		case c == '"':
			r.pos++
			return b.String(), nil
		case c < 0x20:
			return "", r.fail("control character %#02x in a string", c)
		case c != '\\':
			b.WriteByte(c)
			r.pos++
			continue
		}
		r.pos++
		esc := r.peek()
		r.pos++
		switch esc {
		case '"', '\\', '/':
			b.WriteByte(esc)
		case 'b':
			b.WriteByte('\b')
		case 'f':
			b.WriteByte('\f')
		case 'n':
			b.WriteByte('\n')
		case 'r':
			b.WriteByte('\r')
		case 't':
			b.WriteByte('\t')
		case 'u':
			u, err := r.hex4()
			if err != nil {
				return "", err
			}
			if utf16.IsSurrogate(u) {
				if !strings.HasPrefix(string(r.in[r.pos:min(r.pos+2, len(r.in))]), `\u`) {
					return "", r.fail("lone surrogate \\u%04x in a string", u)
				}
				r.pos += 2
				low, err := r.hex4()
				if err != nil {
					return "", err
				}
				pair := utf16.DecodeRune(u, low)
				if pair == utf8.RuneError {
					return "", r.fail("broken surrogate pair in a string")
				}
				u = pair
			}
			b.WriteRune(u)
		default:
			return "", r.fail("unknown escape in a string")
		}
	}
	return "", r.fail("unterminated string")
}

func (r *jsonReader) hex4() (rune, error) {
	if r.pos+4 > len(r.in) {
		return 0, r.fail("unterminated \\u escape")
	}
	v, err := strconv.ParseUint(string(r.in[r.pos:r.pos+4]), 16, 16)
	if err != nil {
		return 0, r.fail("malformed \\u escape")
	}
	r.pos += 4
	return rune(v), nil
}

func (r *jsonReader) number() (any, error) {
	start := r.pos
	digits := func() int {
		n := 0
		for c := r.peek(); r.pos < len(r.in) && c >= '0' && c <= '9'; c = r.peek() {
			r.pos++
			n++
		}
		return n
	}
	if r.peek() == '-' {
		r.pos++
	}
	zero := r.peek() == '0'
	if n := digits(); n == 0 || zero && n > 1 {
		return nil, r.fail("malformed number")
	}
	if r.peek() == '.' {
		r.pos++
		if digits() == 0 {
			return nil, r.fail("malformed number")
		}
	}
	if c := r.peek(); c == 'e' || c == 'E' {
		r.pos++
		if c := r.peek(); c == '+' || c == '-' {
			r.pos++
		}
		if digits() == 0 {
			return nil, r.fail("malformed number")
		}
	}
	return number(r.in[start:r.pos]), nil
}

func clip(s string) string {
	if len(s) > 60 {
		return s[:60] + "…"
	}
	return s
}

// appendJCS appends the RFC 8785 form of v: keys by UTF-16 code unit, shortest
// escapes, ECMAScript numbers.
func appendJCS(b []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return append(b, "null"...), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case string:
		return appendJCSString(b, v), nil
	case int:
		return strconv.AppendInt(b, int64(v), 10), nil
	case uint64:
		return strconv.AppendUint(b, v, 10), nil
	case number:
		f, err := strconv.ParseFloat(string(v), 64)
		if err != nil {
			return nil, fault.New("manifest_malformed", "the number %s does not fit a double", clip(string(v)))
		}
		return appendJCSNumber(b, f), nil
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			var err error
			if b, err = appendJCS(b, e); err != nil {
				return nil, err
			}
		}
		return append(b, ']'), nil
	case object:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Slice(keys, func(i, j int) bool { return lessUTF16(keys[i], keys[j]) })
		b = append(b, '{')
		for i, k := range keys {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendJCSString(b, k), ':')
			var err error
			if b, err = appendJCS(b, v[k]); err != nil {
				return nil, err
			}
		}
		return append(b, '}'), nil
	}
	return nil, fmt.Errorf("manifest: no JSON form for %T", v)
}

// lessUTF16 orders by UTF-16 code unit, which differs from byte order only where
// an astral character meets one in U+E000–U+FFFF.
func lessUTF16(a, b string) bool {
	x, y := utf16.Encode([]rune(a)), utf16.Encode([]rune(b))
	for i := 0; i < len(x) && i < len(y); i++ {
		if x[i] != y[i] {
			return x[i] < y[i]
		}
	}
	return len(x) < len(y)
}

func appendJCSString(b []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	b = append(b, '"')
	for i := 0; i < len(s); i++ {
		switch c := s[i]; c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, `\b`...)
		case '\f':
			b = append(b, `\f`...)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			if c < 0x20 {
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			} else {
				b = append(b, c)
			}
		}
	}
	return append(b, '"')
}

// appendJCSNumber writes f as ECMA-262 Number::toString does (RFC 8785 §3.2.2.3).
func appendJCSNumber(b []byte, f float64) []byte {
	abs := f
	if abs < 0 {
		abs = -abs
	}
	if f == 0 { // also negative zero
		return append(b, '0')
	}
	if abs >= 1e-6 && abs < 1e21 {
		return strconv.AppendFloat(b, f, 'f', -1, 64)
	}
	s := strconv.FormatFloat(f, 'e', -1, 64)
	// Go pads the exponent to two digits, ECMAScript does not.
	if n := len(s); n >= 4 && s[n-2] == '0' && (s[n-3] == '-' || s[n-3] == '+') {
		s = s[:n-2] + s[n-1:]
	}
	return append(b, s...)
}
