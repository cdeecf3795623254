// SPDX-License-Identifier: Apache-2.0

// Package config reads a component's settings: defaults in a struct, then a TOML
// file, then environment variables.
//
// Guarantees: a key that the struct does not have is an error that names the key
// and its line, in the file as in the environment, so a misspelt safety setting
// cannot be silently ignored; a value of the wrong type names the key; a secret
// never shows in an error or in a printed configuration. It validates nothing
// else: what a value means is its component's affair.
//
// The file and the environment are trusted (they belong to the operator).
package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"reflect"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/pelletier/go-toml/v2"
)

// MaxFile is the largest configuration file in bytes.
const MaxFile = 1 << 20

// Env says which environment variables overlay the file: those that start with
// Prefix. The rest of the name is the key in capitals, with "__" for each dot:
// DSTACK_VMM_CVM__PORT_MAPPING__ENABLED sets cvm.port_mapping.enabled.
type Env struct {
	Prefix  string
	Environ []string // as of os.Environ
	// Ignore lists names (without Prefix) that share the prefix but belong to
	// somebody else, such as a client's URL.
	Ignore []string
}

// Load fills dst, a pointer to a struct that already holds the defaults, from
// the TOML file at path (none when path is empty) and then from env.
//
// Codes: config_missing, config_malformed, config_unknown_key, config_value.
func Load(dst any, path string, env Env) error {
	if path != "" {
		data, err := readBounded(path)
		if err != nil {
			return err
		}
		if err := decode(dst, path, data); err != nil {
			return err
		}
	}
	return overlay(reflect.ValueOf(dst).Elem(), env)
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "config_missing", "read configuration").WithFix("create %s or give another --config", path)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fault.Wrap(err, "config_missing", "read configuration %s", path)
	}
	if len(data) > MaxFile {
		return nil, fault.New("config_malformed", "configuration %s is larger than %d bytes", path, MaxFile)
	}
	return data, nil
}

func decode(dst any, path string, data []byte) error {
	d := toml.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(dst)
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		first := missing.Errors[0]
		row, _ := first.Position()
		return fault.New("config_unknown_key", "%s:%d: unknown key %s", path, row, strings.Join(first.Key(), ".")).
			WithFix("remove it, or correct its spelling")
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, col := bad.Position()
		// bad.Error() says what is wrong; bad.String() would quote the line,
		// which may hold a secret.
		return fault.New("config_malformed", "%s:%d:%d: %s", path, row, col, bad.Error())
	}
	if err != nil {
		return fault.Wrap(err, "config_malformed", "%s", path)
	}
	return nil
}

func overlay(root reflect.Value, env Env) error {
	for _, kv := range env.Environ {
		name, value, ok := strings.Cut(kv, "=")
		rest, has := strings.CutPrefix(name, env.Prefix)
		if !ok || !has || env.Prefix == "" || ignored(rest, env.Ignore) {
			continue
		}
		keys := strings.Split(strings.ToLower(rest), "__")
		field, ok := find(root, keys)
		if !ok {
			return fault.New("config_unknown_key", "environment variable %s sets unknown key %s", name, strings.Join(keys, ".")).
				WithFix("unset it, or correct its spelling (a dot is written as two underscores)")
		}
		if err := set(field, value); err != nil {
			return fault.New("config_value", "environment variable %s: %v", name, err)
		}
	}
	return nil
}

func ignored(name string, list []string) bool {
	for _, s := range list {
		if s == name {
			return true
		}
	}
	return false
}

func find(v reflect.Value, keys []string) (reflect.Value, bool) {
	for _, key := range keys {
		if v.Kind() != reflect.Struct {
			return v, false
		}
		next := reflect.Value{}
		for i := range v.NumField() {
			tag, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
			if tag == key && tag != "" {
				next = v.Field(i)
			}
		}
		if !next.IsValid() {
			return v, false
		}
		v = next
	}
	return v, true
}

func set(v reflect.Value, text string) error {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("want true or false")
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int32, reflect.Int64:
		n, err := strconv.ParseInt(text, 0, v.Type().Bits())
		if err != nil {
			return errors.New("want a number")
		}
		v.SetInt(n)
	case reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		n, err := strconv.ParseUint(text, 0, v.Type().Bits())
		if err != nil {
			return errors.New("want a number that is not negative")
		}
		v.SetUint(n)
	case reflect.Float64:
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
			return errors.New("want a number")
		}
		v.SetFloat(n)
	case reflect.Slice:
		elem := v.Type().Elem()
		out := reflect.MakeSlice(v.Type(), 0, 4)
		if text != "" {
			for _, part := range strings.Split(text, ",") {
				e := reflect.New(elem).Elem()
				if err := set(e, strings.TrimSpace(part)); err != nil {
					return err
				}
				out = reflect.Append(out, e)
			}
		}
		v.Set(out)
	default:
		return fmt.Errorf("a %s cannot be set from the environment", v.Kind())
	}
	return nil
}
