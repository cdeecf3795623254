// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/redact"
)

// Files of the decrypted environment in the work directory (spec/guest-os.md §6).
const (
	envFile     = ".decrypted-env"
	envFileJSON = ".decrypted-env.json"
)

// RefersToEnvFiles reports whether one of the texts (the compose file, the scripts)
// names the files of the decrypted environment. Where none does, the secrets are in
// no file.
func RefersToEnvFiles(texts ...string) bool {
	return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(t, envFile) })
}

// WriteEnvFiles writes .decrypted-env and .decrypted-env.json into dir, which must
// be on a tmpfs, readable by root only.
//
// A shell that sources the first and compose's env_file: read the same values,
// except where a value has a backtick beside what single quotes cannot hold; there
// the shell is right. Upstream's form loses backslashes and newlines. The second
// file is exact always.
func WriteEnvFiles(dir string, env map[string]string) error {
	var lines bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(env)) {
		fmt.Fprintf(&lines, "%s=%s\n", name, shellQuote(env[name]))
	}
	defer clear(lines.Bytes())
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	if env == nil {
		env = map[string]string{}
	}
	if err := enc.Encode(env); err != nil {
		return err
	}
	defer clear(text.Bytes())
	for name, data := range map[string][]byte{envFile: lines.Bytes(), envFileJSON: text.Bytes()} {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write(data)
		if closed := f.Close(); err == nil {
			err = closed
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
	}
	return nil
}

// shellQuote quotes for shells and for compose's dotenv files alike.
func shellQuote(v string) string {
	if !strings.ContainsAny(v, "'\r") && !strings.HasSuffix(v, `\`) {
		return "'" + v + "'"
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(v) + `"`
}

// composeEnv writes the variables in the syntax of compose's --env-file, so that every
// value arrives byte for byte: in double quotes, where compose-go undoes \\, \", \$
// and \r, and takes all else as it is; a carriage return is escaped lest a reader
// take it for a part of the line's end. Code env_value: a value that no environment can hold.
func composeEnv(env map[string]string) ([]byte, error) {
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "\r", `\r`)
	var out bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(env)) {
		if strings.ContainsRune(env[name], 0) {
			return nil, fault.New("env_value", "the value of the variable %s has a zero byte", name).
				WithFix("encode the value, in base64 for example")
		}
		fmt.Fprintf(&out, "%s=\"%s\"\n", name, escape.Replace(env[name]))
	}
	return out.Bytes(), nil
}

// redacted takes the values of the environment out of an error: compose quotes what
// it cannot make sense of, and errors go to the host's console.
func redacted(err error, env map[string]string) error {
	if err == nil {
		return nil
	}
	text := redact.New(env).Text(err.Error())
	if text == err.Error() {
		return err
	}
	return errors.New(text)
}
