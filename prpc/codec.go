// SPDX-License-Identifier: Apache-2.0

package prpc

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// omitEmpty lists the fields that JSON leaves out when they are empty, against the
// rule that every field is present. Upstream has one (guest-agent.md §2).
var omitEmpty = map[protoreflect.FullName]bool{
	"dstack_guest.GetQuoteResponse.attestation": true,
}

const emptyName protoreflect.FullName = "google.protobuf.Empty"

// MarshalJSON returns the message in the dialect's JSON: compact, ASCII only, every
// field in order of declaration. A google.protobuf.Empty is null.
func MarshalJSON(m proto.Message) ([]byte, error) {
	return appendMessage(nil, m.ProtoReflect())
}

func appendMessage(b []byte, m protoreflect.Message) ([]byte, error) {
	if m.Descriptor().FullName() == emptyName {
		return append(b, "null"...), nil
	}
	b = append(b, '{')
	fields := m.Descriptor().Fields()
	first := true
	for i := range fields.Len() {
		f := fields.Get(i)
		if omitEmpty[f.FullName()] && !m.Has(f) {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(appendString(b, string(f.Name())), ':')
		var err error
		if b, err = appendField(b, m, f); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name(), err)
		}
	}
	return append(b, '}'), nil
}

func appendField(b []byte, m protoreflect.Message, f protoreflect.FieldDescriptor) (_ []byte, err error) {
	switch {
	case f.IsList():
		list := m.Get(f).List()
		b = append(b, '[')
		for i := range list.Len() {
			if i > 0 {
				b = append(b, ',')
			}
			if b, err = appendValue(b, f, list.Get(i)); err != nil {
				return nil, fmt.Errorf("[%d]: %w", i, err)
			}
		}
		return append(b, ']'), nil
	case f.IsMap():
		type entry struct {
			key string
			v   protoreflect.Value
		}
		var all []entry
		m.Get(f).Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			all = append(all, entry{k.String(), v})
			return true
		})
		slices.SortFunc(all, func(x, y entry) int { return cmp.Compare(x.key, y.key) })
		b = append(b, '{')
		for i, e := range all {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(appendString(b, e.key), ':')
			if b, err = appendValue(b, f.MapValue(), e.v); err != nil {
				return nil, fmt.Errorf("[%q]: %w", e.key, err)
			}
		}
		return append(b, '}'), nil
	case f.HasPresence() && !m.Has(f):
		return append(b, "null"...), nil
	}
	return appendValue(b, f, m.Get(f))
}

func appendValue(b []byte, f protoreflect.FieldDescriptor, v protoreflect.Value) ([]byte, error) {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool()), nil
	case protoreflect.StringKind:
		return appendString(b, v.String()), nil
	case protoreflect.BytesKind:
		b = append(b, '"')
		b = hex.AppendEncode(b, v.Bytes())
		return append(b, '"'), nil
	case protoreflect.EnumKind: // a number, as upstream's generated code has it
		return strconv.AppendInt(b, int64(v.Enum()), 10), nil
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind,
		protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return strconv.AppendInt(b, v.Int(), 10), nil
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10), nil
	case protoreflect.FloatKind, protoreflect.DoubleKind:
		if f := v.Float(); math.IsNaN(f) || math.IsInf(f, 0) {
			return append(b, "null"...), nil
		}
		return strconv.AppendFloat(b, v.Float(), 'g', -1, 64), nil
	case protoreflect.MessageKind:
		return appendMessage(b, v.Message())
	}
	return nil, fmt.Errorf("fields of kind %s do not exist in this dialect", f.Kind())
}

// appendString quotes s in ASCII. Bytes that are not UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r == '\r':
			b = append(b, '\\', 'r')
		case r == '\t':
			b = append(b, '\\', 't')
		case r >= ' ' && r <= '~':
			b = append(b, byte(r))
		case r > 0xffff:
			hi, lo := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, hi, lo)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
	}
	return append(b, '"')
}

// UnmarshalJSON sets m to the message in the dialect's JSON. Empty input is a
// message of defaults, and any input is a google.protobuf.Empty. Unknown fields are
// ignored; a known field that occurs twice, null for a field that is not optional,
// a value of the wrong type or out of range and broken UTF-8 or UTF-16 are errors
// that name the field.
func UnmarshalJSON(data []byte, m proto.Message) error {
	proto.Reset(m)
	r := m.ProtoReflect()
	if len(data) == 0 || r.Descriptor().FullName() == emptyName {
		return nil
	}
	if !utf8.Valid(data) {
		return errors.New("invalid JSON: not UTF-8")
	}
	if err := syntax(data); err != nil {
		return fmt.Errorf("invalid JSON: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	tok, err := dec.Token()
	if err != nil {
		return fmt.Errorf("invalid JSON: %w", err)
	}
	if tok != json.Delim('{') {
		return fmt.Errorf("invalid JSON: expected an object, found %s", describe(tok))
	}
	return decodeMessage(dec, r)
}

// syntax checks the whole text, which json.Decoder.Token alone does loosely, and
// that each \u escape of a surrogate has its other half: encoding/json would put
// U+FFFD there, and a changed compose file has another hash.
func syntax(data []byte) error {
	var raw json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil {
		return err
	}
	for i := 0; i < len(data); i++ {
		if data[i] != '\\' { // a backslash occurs within strings only
			continue
		}
		i++
		if data[i] != 'u' {
			continue
		}
		r := unit(data[i+1:])
		i += 4
		if !utf16.IsSurrogate(r) {
			continue
		}
		rest := data[i+1:]
		if len(rest) < 6 || rest[0] != '\\' || rest[1] != 'u' || utf16.DecodeRune(r, unit(rest[2:])) == utf8.RuneError {
			return fmt.Errorf("half of a surrogate pair at byte %d", i-5)
		}
		i += 6
	}
	return nil
}

// unit parses four hexadecimal digits, known to be there.
func unit(b []byte) rune {
	v, _ := strconv.ParseUint(string(b[:4]), 16, 16)
	return rune(v)
}

// decodeMessage reads the members of an object whose brace was read.
func decodeMessage(dec *json.Decoder, m protoreflect.Message) error {
	fields := m.Descriptor().Fields()
	seen := make(map[protoreflect.FieldNumber]bool)
	for {
		tok, err := dec.Token()
		if err != nil {
			return err
		}
		if tok == json.Delim('}') {
			return nil
		}
		f := fields.ByName(protoreflect.Name(tok.(string)))
		if f == nil {
			var skipped json.RawMessage
			if err := dec.Decode(&skipped); err != nil {
				return err
			}
			continue
		}
		if seen[f.Number()] {
			return fmt.Errorf("field %s occurs twice", f.Name())
		}
		seen[f.Number()] = true
		if err := decodeField(dec, m, f); err != nil {
			return inField(string(f.Name()), err)
		}
	}
}

func decodeField(dec *json.Decoder, m protoreflect.Message, f protoreflect.FieldDescriptor) error {
	tok, err := dec.Token()
	if err != nil {
		return err
	}
	switch {
	case f.IsList():
		if tok != json.Delim('[') {
			return fmt.Errorf("expected an array, found %s", describe(tok))
		}
		list := m.Mutable(f).List()
		for i := 0; dec.More(); i++ {
			tok, err := dec.Token()
			if err != nil {
				return err
			}
			v, err := decodeValue(dec, tok, f, list.NewElement)
			if err != nil {
				return inField(fmt.Sprintf("[%d]", i), err)
			}
			list.Append(v)
		}
		_, err := dec.Token()
		return err
	case f.IsMap():
		if tok != json.Delim('{') {
			return fmt.Errorf("expected an object, found %s", describe(tok))
		}
		entries := m.Mutable(f).Map()
		for dec.More() {
			tok, err := dec.Token()
			if err != nil {
				return err
			}
			name := tok.(string)
			key, err := parseScalar(f.MapKey(), name)
			if err != nil {
				return inField(fmt.Sprintf("[%q]", name), err)
			}
			if tok, err = dec.Token(); err != nil {
				return err
			}
			v, err := decodeValue(dec, tok, f.MapValue(), entries.NewValue)
			if err != nil {
				return inField(fmt.Sprintf("[%q]", name), err)
			}
			entries.Set(key.MapKey(), v)
		}
		_, err := dec.Token()
		return err
	case tok == nil && f.HasPresence():
		return nil
	}
	v, err := decodeValue(dec, tok, f, func() protoreflect.Value { return m.NewField(f) })
	if err == nil {
		m.Set(f, v)
	}
	return err
}

// decodeValue reads one value, whose first token was read.
func decodeValue(dec *json.Decoder, tok json.Token, f protoreflect.FieldDescriptor, newMessage func() protoreflect.Value) (protoreflect.Value, error) {
	var none protoreflect.Value
	switch f.Kind() {
	case protoreflect.MessageKind:
		v := newMessage()
		if f.Message().FullName() == emptyName && tok == nil {
			return v, nil
		}
		if tok != json.Delim('{') {
			return none, fmt.Errorf("expected an object, found %s", describe(tok))
		}
		return v, decodeMessage(dec, v.Message())
	case protoreflect.BoolKind:
		if b, ok := tok.(bool); ok {
			return protoreflect.ValueOfBool(b), nil
		}
		return none, fmt.Errorf("expected true or false, found %s", describe(tok))
	case protoreflect.StringKind, protoreflect.BytesKind:
		if s, ok := tok.(string); ok {
			return parseScalar(f, s)
		}
		return none, fmt.Errorf("expected a string, found %s", describe(tok))
	default:
		if n, ok := tok.(json.Number); ok {
			return parseScalar(f, n.String())
		}
		return none, fmt.Errorf("expected a number, found %s", describe(tok))
	}
}

// parseScalar parses the text of a scalar: a JSON number's or string's content, or
// what a query parameter says.
func parseScalar(f protoreflect.FieldDescriptor, text string) (protoreflect.Value, error) {
	var none protoreflect.Value
	fail := func(what string) (protoreflect.Value, error) {
		if len(text) > 40 {
			text = text[:40] + "…"
		}
		return none, fmt.Errorf("expected %s, found %q", what, text)
	}
	switch kind := f.Kind(); kind {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(text), nil
	case protoreflect.BytesKind:
		for strings.HasPrefix(text, "0x") {
			text = text[2:]
		}
		data, err := hex.DecodeString(text)
		if err != nil { // the content may be secret: say what is wrong with it only
			return none, fmt.Errorf("invalid hexadecimal text of %d characters: %w", len(text), hexReason(err))
		}
		return protoreflect.ValueOfBytes(data), nil
	case protoreflect.BoolKind:
		switch text {
		case "true":
			return protoreflect.ValueOfBool(true), nil
		case "false":
			return protoreflect.ValueOfBool(false), nil
		}
		return fail("true or false")
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		if v, err := strconv.ParseInt(text, 10, 32); err == nil {
			return protoreflect.ValueOfInt32(int32(v)), nil
		}
		return fail("an integer of 32 bits")
	case protoreflect.EnumKind:
		if v, err := strconv.ParseInt(text, 10, 32); err == nil {
			return protoreflect.ValueOfEnum(protoreflect.EnumNumber(v)), nil
		}
		return fail("an integer of 32 bits")
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		if v, err := strconv.ParseUint(text, 10, 32); err == nil {
			return protoreflect.ValueOfUint32(uint32(v)), nil
		}
		return fail("an unsigned integer of 32 bits")
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		if v, err := strconv.ParseInt(text, 10, 64); err == nil {
			return protoreflect.ValueOfInt64(v), nil
		}
		return fail("an integer of 64 bits")
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		if v, err := strconv.ParseUint(text, 10, 64); err == nil {
			return protoreflect.ValueOfUint64(v), nil
		}
		return fail("an unsigned integer of 64 bits")
	case protoreflect.FloatKind:
		if v, err := strconv.ParseFloat(text, 32); err == nil {
			return protoreflect.ValueOfFloat32(float32(v)), nil
		}
		return fail("a number")
	case protoreflect.DoubleKind:
		if v, err := strconv.ParseFloat(text, 64); err == nil {
			return protoreflect.ValueOfFloat64(v), nil
		}
		return fail("a number")
	default:
		return none, fmt.Errorf("fields of kind %s cannot be given as text", kind)
	}
}

func hexReason(err error) error {
	if errors.Is(err, hex.ErrLength) {
		return errors.New("an odd number of digits")
	}
	return errors.New("a character that is not a hexadecimal digit")
}

// describe names what was found without repeating it, since it may be secret.
func describe(tok json.Token) string {
	switch t := tok.(type) {
	case nil:
		return "null"
	case bool:
		return strconv.FormatBool(t)
	case json.Number:
		return "a number"
	case string:
		return "a string"
	case json.Delim:
		if t == '[' {
			return "an array"
		}
	}
	return "an object"
}

// inField puts the name of a field before an error, as in "networks[0].mode: …".
func inField(name string, err error) error {
	var at *fieldError
	if errors.As(err, &at) {
		sep := "."
		if strings.HasPrefix(at.path, "[") {
			sep = ""
		}
		return &fieldError{name + sep + at.path, at.err}
	}
	return &fieldError{name, err}
}

type fieldError struct {
	path string
	err  error
}

func (e *fieldError) Error() string { return e.path + ": " + e.err.Error() }
func (e *fieldError) Unwrap() error { return e.err }
