// SPDX-License-Identifier: Apache-2.0

// Package strictcbor reads CBOR (RFC 8949) from strangers so that every reader of
// the same bytes sees the same values.
//
// A CBOR library alone takes an array of numbers for a byte string, null for
// nothing, and one of two equal keys; each lets two readers of one signed document
// disagree (threats.md B15, B19). Here an item is read as the type that is asked
// for or refused. It guarantees definite lengths, nesting of at most [MaxDepth],
// arrays and maps of at most [MaxItems], unique keys that are numbers or text,
// valid UTF-8, no tag but the one that [Untag] takes off, no map of indefinite
// length but the one that [Definite] closes, and nothing after the item. Memory is bounded by a small multiple of the input.
//
// Everything given to it is attacker-controlled. Values need not be in their
// shortest form, as signatures cover the bytes as they came.
package strictcbor

import (
	"github.com/fxamacker/cbor/v2"

	"github.com/dstack-go/dstack/internal/fault"
)

// Limits (threats.md B15). The largest known array or map is the 32 registers of
// an AWS Nitro document.
const (
	MaxDepth = 8
	MaxItems = 64
)

// The modes are constants that the library can only make at run time.
var (
	strict = mode(cbor.TagsForbidden)
	tagged = mode(cbor.TagsAllowed)
)

func mode(tags cbor.TagsMode) cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey:       cbor.DupMapKeyEnforcedAPF,
		IndefLength:     cbor.IndefLengthForbidden,
		TagsMd:          tags,
		MaxNestedLevels: MaxDepth, MaxArrayElements: MaxItems, MaxMapPairs: MaxItems,
		IntDec: cbor.IntDecConvertSignedOrFail,
		UTF8:   cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic("attest/cose/strictcbor: " + err.Error())
	}
	return m
}

// Item is one well-formed data item, not decoded yet.
type Item struct{ raw []byte }

// Decode takes data for exactly one item (cbor_malformed). The item shares its
// memory.
func Decode(data []byte) (Item, error) {
	if err := strict.Wellformed(data); err != nil {
		return Item{}, fault.Wrap(err, "cbor_malformed", "CBOR")
	}
	return Item{data}, nil
}

// Untag returns the number of the tag that data begins with and what it holds,
// which is for Decode to check; ok is false, and content all of data, where there
// is no tag.
func Untag(data []byte) (number uint64, content []byte, ok bool, err error) {
	if len(data) == 0 || data[0]>>5 != majorTag {
		return 0, data, false, nil
	}
	var t cbor.RawTag
	if err := tagged.Unmarshal(data, &t); err != nil {
		return 0, nil, false, fault.Wrap(err, "cbor_malformed", "tagged CBOR")
	}
	return t.Number, t.Content, true, nil
}

// First returns the bytes of the item, tagged or not, that data begins with, and
// leaves unexamined what follows. The item is well-formed but may hold more tags.
func First(data []byte) ([]byte, error) {
	var item cbor.RawMessage
	if _, err := tagged.UnmarshalFirst(data, &item); err != nil {
		return nil, fault.Wrap(err, "cbor_malformed", "CBOR")
	}
	return item, nil
}

// Definite gives a length to an outermost map that has none, as the documents of
// AWS Nitro have it, so that Decode takes it; other data it returns as they are.
// Everything inside must be definite (cbor_malformed).
func Definite(data []byte) ([]byte, error) {
	const openMap, end, oneByteLength = majorMap<<5 | 31, 0xff, 24
	if len(data) == 0 || data[0] != openMap {
		return data, nil
	}
	rest, items := data[1:], 0
	for len(rest) > 0 && rest[0] != end {
		var item cbor.RawMessage
		var err error
		if rest, err = strict.UnmarshalFirst(rest, &item); err != nil {
			return nil, fault.Wrap(err, "cbor_malformed", "CBOR map of indefinite length")
		}
		if items++; items > 2*MaxItems {
			return nil, fault.New("cbor_malformed", "CBOR map of indefinite length has more than %d members", MaxItems)
		}
	}
	if len(rest) != 1 || items%2 != 0 {
		return nil, fault.New("cbor_malformed", "CBOR map of indefinite length does not end with the data")
	}
	return append([]byte{majorMap<<5 | oneByteLength, byte(items / 2)}, data[1:len(data)-1]...), nil
}

// Major types (RFC 8949 §3.1), in the upper three bits of an item's first byte.
const (
	majorUint  = 0
	majorNeg   = 1
	majorBytes = 2
	majorText  = 3
	majorArray = 4
	majorMap   = 5
	majorTag   = 6
)

// null is the simple value 22.
const null = 0xf6

func (i Item) is(major byte) bool { return len(i.raw) > 0 && i.raw[0]>>5 == major }

func (i Item) decode(major byte, name string, v any) error {
	if !i.is(major) {
		return fault.New("cbor_type", "CBOR item is not %s", name)
	}
	if err := strict.Unmarshal(i.raw, v); err != nil {
		return fault.Wrap(err, "cbor_malformed", "CBOR %s", name)
	}
	return nil
}

// IsNull tells whether the item is null.
func (i Item) IsNull() bool { return len(i.raw) == 1 && i.raw[0] == null }

// IsText tells whether the item is a text string, for fields that have two types.
func (i Item) IsText() bool { return i.is(majorText) }

// Bytes returns a byte string of least to most bytes (cbor_type, cbor_size).
func (i Item) Bytes(least, most int) ([]byte, error) {
	var b []byte
	if err := i.decode(majorBytes, "a byte string", &b); err != nil {
		return nil, err
	}
	return b, inRange("byte string", len(b), least, most)
}

// Text returns a text string of least to most bytes (cbor_type, cbor_size).
func (i Item) Text(least, most int) (string, error) {
	var s string
	if err := i.decode(majorText, "a text string", &s); err != nil {
		return "", err
	}
	return s, inRange("text string", len(s), least, most)
}

// Int returns an integer of -2^63 to 2^63-1 (cbor_type, cbor_malformed beyond).
func (i Item) Int() (int64, error) {
	var n int64
	major := byte(majorUint)
	if i.is(majorNeg) {
		major = majorNeg
	}
	return n, i.decode(major, "an integer", &n)
}

// Uint returns an integer of 0 to most, which must not exceed 2^63-1 (cbor_type,
// cbor_size).
func (i Item) Uint(most uint64) (uint64, error) {
	n, err := i.Int()
	if err != nil {
		return 0, err
	}
	if n < 0 || uint64(n) > most {
		return 0, fault.New("cbor_size", "CBOR integer %d is not between 0 and %d", n, most)
	}
	return uint64(n), nil
}

// Array returns the elements of an array of least to most elements (cbor_type,
// cbor_size).
func (i Item) Array(least, most int) ([]Item, error) {
	var list []cbor.RawMessage
	if err := i.decode(majorArray, "an array", &list); err != nil {
		return nil, err
	}
	if err := inRange("array", len(list), least, most); err != nil {
		return nil, err
	}
	items := make([]Item, len(list))
	for n, raw := range list {
		items[n] = Item{raw}
	}
	return items, nil
}

// Map is a map that was read but whose values were not; its keys are int64 or
// string. Use Get and Need, which take an int.
type Map map[any]Item

// Map returns a map. Keys that are neither integers (of 64 bits with sign) nor
// text, and equal keys, are refused (cbor_type, cbor_malformed).
func (i Item) Map() (Map, error) {
	var raw map[any]cbor.RawMessage
	if err := i.decode(majorMap, "a map", &raw); err != nil {
		return nil, err
	}
	m := make(Map, len(raw))
	for key, value := range raw {
		switch key.(type) {
		case int64, string:
			m[key] = Item{value}
		default:
			return nil, fault.New("cbor_type", "CBOR map has a key that is neither a number nor text")
		}
	}
	return m, nil
}

// Get returns the value of a key, an int or string; ok is false without it.
func (m Map) Get(key any) (value Item, ok bool) {
	if n, is := key.(int); is {
		key = int64(n)
	}
	value, ok = m[key]
	return value, ok
}

// Need returns the value of a key, an int or string, or cbor_missing.
func (m Map) Need(key any) (Item, error) {
	value, ok := m.Get(key)
	if !ok {
		return Item{}, fault.New("cbor_missing", "CBOR map has no member %v", key)
	}
	return value, nil
}

func inRange(what string, n, least, most int) error {
	if n < least || n > most {
		if least == most {
			return fault.New("cbor_size", "CBOR %s of length %d, want %d", what, n, most)
		}
		return fault.New("cbor_size", "CBOR %s of length %d, want %d to %d", what, n, least, most)
	}
	return nil
}
