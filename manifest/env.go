// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// MaxEnvName is the longest name of an encrypted variable in bytes.
const MaxEnvName = 255

// deniedEnv are names by which a variable changes what a program does rather than
// what it works on: loaders, shells, interpreters, the engine and this system itself
// (threats.md D07). A trailing or leading "*" stands for any text.
var deniedEnv = []string{
	"LD_*", "PATH", "BASH_ENV", "ENV", "IFS", "SHELLOPTS", "BASHOPTS", "PS4", "PROMPT_COMMAND", "CDPATH", "GLIBC_TUNABLES", "MALLOC_*", "GCONV_PATH", "LOCPATH",
	"PYTHON*", "PERL5*", "PERLLIB", "RUBYOPT", "RUBYLIB", "NODE_OPTIONS", "NODE_PATH", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH", "GODEBUG",
	"DOCKER_*", "COMPOSE_*", "CONTAINERD_*", "DSTACK_*", "TAPPD_*", "*_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "HOSTALIASES", "RESOLV_HOST_CONF",
}

// CheckEnvName refuses what is no name of a variable; code env_name.
func CheckEnvName(name string) error {
	ok := name != "" && len(name) <= MaxEnvName
	for i, c := range []byte(name) {
		letter := c == '_' || c|0x20 >= 'a' && c|0x20 <= 'z'
		ok = ok && (letter || i > 0 && c >= '0' && c <= '9')
	}
	if !ok {
		return fault.New("env_name", "%.100q is not the name of a variable: letters, digits and '_', at most %d", name, MaxEnvName)
	}
	return nil
}

// DeniedEnv reports whether a variable of this name could change what runs; case
// does not matter, since some programs read both.
func DeniedEnv(name string) bool {
	upper := strings.ToUpper(name)
	for _, pattern := range deniedEnv {
		if head, ok := strings.CutSuffix(pattern, "*"); ok && strings.HasPrefix(upper, head) {
			return true
		}
		if tail, ok := strings.CutPrefix(pattern, "*"); ok && strings.HasSuffix(upper, tail) {
			return true
		}
		if upper == pattern {
			return true
		}
	}
	return false
}
