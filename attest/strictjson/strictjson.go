// SPDX-License-Identifier: Apache-2.0

// Package strictjson reads JSON from strangers so that every reader of the same
// bytes sees the same values.
//
// encoding/json alone takes the last of two equal keys, matches keys without
// regard to case, replaces broken UTF-8 and ignores what follows the first
// value; each of these has let two readers of one signed document disagree
// (threats.md B15, B19). Decode refuses such documents before it decodes them.
//
// Everything given to it is attacker-controlled. It guarantees bounded depth,
// bounded size, and object keys that are ASCII and unique without regard to case.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Limits bounds one document. The zero value refuses every document.
type Limits struct {
	Size    int  // bytes of the whole document
	Depth   int  // nesting of arrays and objects
	Unknown bool // whether fields that the target does not have are tolerated
}

// Decode checks data against the limits and decodes its single value into v.
func Decode(data []byte, v any, l Limits) error {
	if len(data) > l.Size {
		return fmt.Errorf("%d bytes of JSON exceed the limit of %d", len(data), l.Size)
	}
	if !utf8.Valid(data) {
		return errors.New("JSON is not valid UTF-8")
	}
	if err := check(data, l.Depth); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if !l.Unknown {
		dec.DisallowUnknownFields()
	}
	return dec.Decode(v)
}

// check walks the tokens once. A frame per open object or array holds the keys
// seen so far, so memory is bounded by the document's size.
func check(data []byte, depth int) error {
	type frame struct {
		keys map[string]bool // nil for an array
		key  bool            // the next string is a key
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	var stack []frame
	for {
		tok, err := dec.Token()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("malformed JSON at byte %d: %w", dec.InputOffset(), err)
		}
		switch d := tok.(type) {
		case json.Delim:
			switch d {
			case '{', '[':
				if len(stack) >= depth {
					return fmt.Errorf("JSON nests deeper than %d at byte %d", depth, dec.InputOffset())
				}
				f := frame{}
				if d == '{' {
					f = frame{keys: map[string]bool{}, key: true}
				}
				stack = append(stack, f)
				continue
			default:
				stack = stack[:len(stack)-1]
			}
		case string:
			if n := len(stack); n > 0 && stack[n-1].keys != nil && stack[n-1].key {
				if err := addKey(stack[n-1].keys, d); err != nil {
					return fmt.Errorf("%w at byte %d", err, dec.InputOffset())
				}
				stack[n-1].key = false
				continue
			}
		}
		if len(stack) == 0 {
			break // the single top-level value is complete
		}
		if top := &stack[len(stack)-1]; top.keys != nil {
			top.key = true
		}
	}
	if rest := bytes.TrimLeft(data[dec.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return fmt.Errorf("%d bytes follow the JSON value", len(rest))
	}
	return nil
}

func addKey(keys map[string]bool, k string) error {
	for i := range len(k) {
		if k[i] >= utf8.RuneSelf {
			return fmt.Errorf("JSON key %q is not ASCII", k)
		}
	}
	fold := strings.ToLower(k)
	if keys[fold] {
		return fmt.Errorf("JSON key %q occurs twice", k)
	}
	keys[fold] = true
	return nil
}
