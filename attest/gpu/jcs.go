// SPDX-License-Identifier: Apache-2.0

package gpu

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// MaxPolicy bounds a policy in JSON, in bytes.
const MaxPolicy = 256 << 10

// PolicyHash returns SHA-256(JCS(policy)), the payload of the gpu-policy-hash event,
// of requirements.gpu_policy as an app's manifest spells it: a JSON object, or
// nothing or null, which count as {}. Members are not judged; a default that is
// written out changes the hash. The code is gpu_policy_malformed.
func PolicyHash(policy []byte) ([sha256.Size]byte, error) {
	if len(bytes.TrimSpace(policy)) == 0 {
		policy = []byte("{}")
	}
	var v any
	if err := strictjson.Decode(policy, &v, strictjson.Limits{Size: MaxPolicy, Depth: 8, Unknown: true}); err != nil {
		return [sha256.Size]byte{}, fault.Wrap(err, "gpu_policy_malformed", "gpu_policy")
	}
	if v == nil {
		v = map[string]any{}
	}
	if _, ok := v.(map[string]any); !ok {
		return [sha256.Size]byte{}, fault.New("gpu_policy_malformed", "gpu_policy is not an object")
	}
	canonical, err := appendJCS(nil, v)
	if err != nil {
		return [sha256.Size]byte{}, fault.Wrap(err, "gpu_policy_malformed", "gpu_policy")
	}
	return sha256.Sum256(canonical), nil
}

// appendJCS appends the RFC 8785 form of what encoding/json decodes into an any. Keys
// are ASCII, as strictjson demands, so that their order is that of bytes.
func appendJCS(b []byte, v any) ([]byte, error) {
	var err error
	switch v := v.(type) {
	case nil:
		return append(b, "null"...), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case float64:
		return appendNumber(b, v), nil
	case string:
		return appendString(b, v)
	case []any:
		b = append(b, '[')
		for i, e := range v {
			if i > 0 {
				b = append(b, ',')
			}
			if b, err = appendJCS(b, e); err != nil {
				return nil, err
			}
		}
		return append(b, ']'), nil
	case map[string]any:
		b = append(b, '{')
		for i, k := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				b = append(b, ',')
			}
			if b, err = appendString(b, k); err != nil {
				return nil, err
			}
			if b, err = appendJCS(append(b, ':'), v[k]); err != nil {
				return nil, err
			}
		}
		return append(b, '}'), nil
	}
	return nil, fmt.Errorf("no JSON form of a %T", v)
}

// appendString quotes as RFC 8785 §3.2.2.2 does: short escapes where JSON has them,
// \u00xx for other control characters, everything else verbatim. encoding/json puts
// U+FFFD in the place of half a surrogate pair, which has no form.
func appendString(b []byte, s string) ([]byte, error) {
	if strings.ContainsRune(s, utf8.RuneError) {
		return nil, fmt.Errorf("a string holds U+FFFD or half a surrogate pair")
	}
	b = append(b, '"')
	for i := range len(s) {
		c := s[i]
		if at := strings.IndexByte("\"\\\b\f\n\r\t", c); at >= 0 {
			b = append(b, '\\', `"\bfnrt`[at])
		} else if c < 0x20 {
			b = fmt.Appendf(b, `\u%04x`, c)
		} else {
			b = append(b, c)
		}
	}
	return append(b, '"'), nil
}

// appendNumber writes a double as ECMA-262 Number::toString does (RFC 8785 §3.2.2.3).
func appendNumber(b []byte, f float64) []byte {
	switch abs := math.Abs(f); {
	case abs == 0: // also negative zero
		return append(b, '0')
	case abs >= 1e-6 && abs < 1e21:
		return strconv.AppendFloat(b, f, 'f', -1, 64)
	}
	// Go pads exponents to two digits, ECMAScript does not.
	s := strconv.FormatFloat(f, 'e', -1, 64)
	mantissa, exponent, _ := strings.Cut(s, "e")
	return append(b, mantissa+"e"+exponent[:1]+strings.TrimLeft(exponent[1:], "0")...)
}
