// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding"
	"reflect"
	"strings"
)

// Changed returns the keys of which two configurations, of one struct type, have other
// values, in the struct's order. It names keys alone: values may be secret.
func Changed[T any](a, b *T) []string {
	return changed(nil, nil, reflect.ValueOf(a).Elem(), reflect.ValueOf(b).Elem())
}

func changed(out, path []string, a, b reflect.Value) []string {
	_, text := a.Addr().Interface().(encoding.TextUnmarshaler)
	if a.Kind() != reflect.Struct || text {
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			out = append(out, strings.Join(path, "."))
		}
		return out
	}
	for i := range a.NumField() {
		tag, _, _ := strings.Cut(a.Type().Field(i).Tag.Get("toml"), ",")
		if tag != "" {
			out = changed(out, append(path[:len(path):len(path)], tag), a.Field(i), b.Field(i))
		}
	}
	return out
}
