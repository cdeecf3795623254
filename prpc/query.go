// SPDX-License-Identifier: Apache-2.0

package prpc

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

const (
	maxParams = 1000 // parameters in one query
	maxDepth  = 8    // bracketed parts in one key
)

type param struct {
	path  []string // "networks[0][mode]" is networks, 0, mode; "ids[]" is ids, ""
	value string
}

// unmarshalQuery sets m from the arguments of a GET: urlencoded pairs with nested
// and array syntax, alt_names[0]=a or alt_names[]=a. Unknown keys are ignored.
func unmarshalQuery(raw string, m proto.Message) error {
	proto.Reset(m)
	r := m.ProtoReflect()
	if r.Descriptor().FullName() == emptyName {
		return nil
	}
	params, err := parseQuery(raw)
	if err != nil {
		return err
	}
	return setMessage(r, params)
}

func parseQuery(raw string) ([]param, error) {
	var params []param
	for raw != "" {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		if pair == "" {
			continue
		}
		if len(params) == maxParams {
			return nil, fmt.Errorf("query: more than %d parameters", maxParams)
		}
		key, value, _ := strings.Cut(pair, "=")
		k, err := url.QueryUnescape(key)
		if err == nil {
			value, err = url.QueryUnescape(value)
		}
		if err != nil {
			return nil, fmt.Errorf("query: %w", err)
		}
		if !utf8.ValidString(k) || !utf8.ValidString(value) {
			return nil, errors.New("query: not UTF-8")
		}
		path, err := splitKey(k)
		if err != nil {
			return nil, err
		}
		params = append(params, param{path, value})
	}
	return params, nil
}

func splitKey(key string) ([]string, error) {
	name, rest, found := strings.Cut(key, "[")
	path := []string{name}
	for found {
		var part string
		part, rest, found = strings.Cut(rest, "]")
		if !found || (rest != "" && rest[0] != '[') || len(path) > maxDepth {
			return nil, fmt.Errorf("query: malformed key %q", key)
		}
		path = append(path, part)
		_, rest, found = strings.Cut(rest, "[")
	}
	return path, nil
}

// setMessage sets the fields that the first part of each path names.
func setMessage(m protoreflect.Message, params []param) error {
	groups := make(map[string][]param)
	var order []string
	for _, p := range params {
		if p.path == nil {
			return errors.New("expected named parts")
		}
		if _, ok := groups[p.path[0]]; !ok {
			order = append(order, p.path[0])
		}
		groups[p.path[0]] = append(groups[p.path[0]], param{p.path[1:], p.value})
	}
	for _, name := range order {
		f := m.Descriptor().Fields().ByName(protoreflect.Name(name))
		if f == nil {
			continue
		}
		if err := setField(m, f, groups[name]); err != nil {
			return inField(name, err)
		}
	}
	return nil
}

func setField(m protoreflect.Message, f protoreflect.FieldDescriptor, params []param) error {
	if f.IsMap() {
		return errors.New("a map cannot be given in a query")
	}
	if !f.IsList() {
		v, err := queryValue(f, params, func() protoreflect.Value { return m.NewField(f) })
		if err == nil {
			m.Set(f, v)
		}
		return err
	}
	// Numbered elements in the order of their numbers, gaps closed; then the others.
	type element struct {
		index  int
		params []param
	}
	var elements []element
	at := make(map[int]int) // index to position in elements
	for _, p := range params {
		index := maxParams + len(elements)
		if len(p.path) > 0 && p.path[0] != "" {
			n, err := strconv.ParseUint(p.path[0], 10, 16)
			if err != nil || n >= maxParams {
				return fmt.Errorf("[%s] is not an index below %d", p.path[0], maxParams)
			}
			index = int(n)
		}
		if len(p.path) > 0 {
			p.path = p.path[1:]
		}
		i, ok := at[index]
		if !ok {
			i = len(elements)
			at[index] = i
			elements = append(elements, element{index: index})
		}
		elements[i].params = append(elements[i].params, p)
	}
	slices.SortStableFunc(elements, func(a, b element) int { return cmp.Compare(a.index, b.index) })
	list := m.Mutable(f).List()
	for i, e := range elements {
		v, err := queryValue(f, e.params, list.NewElement)
		if err != nil {
			return inField(fmt.Sprintf("[%d]", i), err)
		}
		list.Append(v)
	}
	return nil
}

func queryValue(f protoreflect.FieldDescriptor, params []param, newMessage func() protoreflect.Value) (protoreflect.Value, error) {
	if f.Kind() == protoreflect.MessageKind {
		v := newMessage()
		for _, p := range params {
			if len(p.path) == 0 {
				return v, errors.New("expected named parts, as in field[part]=value")
			}
		}
		return v, setMessage(v.Message(), params)
	}
	if len(params) != 1 {
		return protoreflect.Value{}, errors.New("occurs twice")
	}
	if len(params[0].path) != 0 {
		return protoreflect.Value{}, errors.New("has no parts")
	}
	return parseScalar(f, params[0].value)
}
