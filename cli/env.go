// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"strconv"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// Limits of the guest on encrypted variables (spec/kms.md §4.2).
const (
	maxVariables     = 1024
	maxVariableName  = 255
	maxVariableValue = 128 << 10
	maxVariableBytes = 1 << 20
)

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// variable is one encrypted variable. Its value is printed nowhere.
type variable struct {
	name  string
	value []byte
}

// String keeps a value out of messages.
func (v variable) String() string { return v.name + "=<hidden>" }

// variables reads -e and --env-file: files first, so that -e prevails. No message
// repeats a value, nor a line, which may be one.
//
// Codes: env_needs_kms, env_malformed, env_missing, env_too_large, file_missing.
func (w *workload) variables(provider string) ([]variable, error) {
	if len(w.Env)+len(w.EnvFile) == 0 {
		return nil, nil
	}
	if provider != manifest.KeyProviderKMS {
		return nil, fault.New("env_needs_kms", "with the key provider %s there is no key to encrypt variables to before the app runs", provider).
			WithFix("--key-provider kms; or let the app derive its secrets from /var/run/dstack.sock")
	}
	values := map[string][]byte{}
	take := func(where string, text []byte) error {
		name, value, given := bytes.Cut(text, []byte("="))
		if len(name) > maxVariableName || !variableName.Match(name) {
			return fault.New("env_malformed", "%s does not begin with the name of a variable", where).
				WithFix("write KEY=VALUE or KEY; names have letters, digits and '_'")
		}
		if !given {
			from, ok := os.LookupEnv(string(name))
			if !ok {
				return fault.New("env_missing", "%s names %s, which has no value in this environment", where, name).WithFix("export %s, or write %s=VALUE into a file for --env-file", name, name)
			}
			value = []byte(from)
		}
		if len(value) > maxVariableValue {
			return fault.New("env_too_large", "%s has a value of %d bytes, more than %d", name, len(value), maxVariableValue).WithFix("give the app large data in another way")
		}
		values[string(name)] = bytes.Clone(value)
		return nil
	}
	for _, path := range w.EnvFile {
		data, err := readLimited(path, 2*maxVariableBytes)
		if err != nil {
			return nil, err
		}
		defer clear(data)
		for i, line := range bytes.Split(data, []byte("\n")) {
			line = bytes.TrimSuffix(line, []byte("\r"))
			if trimmed := bytes.TrimSpace(line); len(trimmed) == 0 || trimmed[0] == '#' {
				continue
			}
			if err := take(path+" line "+strconv.Itoa(i+1), line); err != nil {
				return nil, err
			}
		}
	}
	for i, text := range w.Env {
		if err := take("-e number "+strconv.Itoa(i+1), []byte(text)); err != nil {
			return nil, err
		}
	}
	var out []variable
	total := 0
	for name, value := range values {
		out = append(out, variable{name, value})
		total += len(name) + len(value)
	}
	if len(out) > maxVariables || total > maxVariableBytes {
		return nil, fault.New("env_too_large", "%d variables of %d bytes are more than %d of %d", len(out), total, maxVariables, maxVariableBytes).
			WithFix("give the app large data in another way")
	}
	slices.SortFunc(out, func(a, b variable) int { return bytes.Compare([]byte(a.name), []byte(b.name)) })
	return out, nil
}

func names(env []variable) []string {
	out := make([]string, len(env))
	for i, v := range env {
		out[i] = v.name
	}
	return out
}

// seal encrypts the variables to the app, and wipes them.
func (p *plan) seal(a *app) ([]byte, error) {
	if len(p.env) == 0 {
		return nil, nil
	}
	defer func() {
		for _, v := range p.env {
			clear(v.value)
		}
	}()
	return nil, fault.New("env_unsupported", "this version cannot ask a KMS for the key of an app's variables").WithFix("deploy without -e and --env-file")
}
