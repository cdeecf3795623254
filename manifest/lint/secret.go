// SPDX-License-Identifier: Apache-2.0

package lint

import (
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
)

// The manifest is public: anyone who verifies the app reads it. Values that look
// like secrets are reported, and never repeated in the message.

// tokens are shapes of credentials that their issuers made recognisable.
var tokens = []struct {
	what    string
	pattern *regexp.Regexp
}{
	{"a private key", regexp.MustCompile(`-----BEGIN [A-Z ]*PRIVATE KEY-----`)},
	{"an AWS access key", regexp.MustCompile(`\b(AKIA|ASIA)[0-9A-Z]{16}\b`)},
	{"a GitHub token", regexp.MustCompile(`\b(gh[pousr]_[0-9A-Za-z]{30,}|github_pat_[0-9A-Za-z_]{30,})`)},
	{"a GitLab token", regexp.MustCompile(`\bglpat-[0-9A-Za-z_-]{20,}`)},
	{"a Slack token", regexp.MustCompile(`\bxox[abeoprs]-[0-9A-Za-z-]{10,}`)},
	{"an API key", regexp.MustCompile(`\bsk-[0-9A-Za-z_-]{20,}`)},
	{"a Google API key", regexp.MustCompile(`\bAIza[0-9A-Za-z_-]{35}`)},
	{"a Stripe key", regexp.MustCompile(`\b[rs]k_live_[0-9A-Za-z]{20,}`)},
	{"a Hugging Face token", regexp.MustCompile(`\bhf_[0-9A-Za-z]{30,}`)},
	{"a JSON web token", regexp.MustCompile(`\beyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}`)},
	{"a password in a URL", regexp.MustCompile(`\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@$]{4,}@`)},
}

// secretName matches names whose values are secrets by their meaning.
var secretName = regexp.MustCompile(`(?i)(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY|CREDENTIAL)S?$`)

// secrets walks the strings of the project that may hold one.
func (l *linter) secrets(p *types.Project) {
	const fix = "take it out of the file: name the variable only (`- NAME`), and give its value encrypted, or derive the key inside the app from /var/run/dstack.sock"
	report := func(service, where, what string) {
		l.add(Warning, "compose_secret_like", service, fix, "%s looks like %s, and the manifest is public", where, what)
	}
	check := func(service, where, name, value string) {
		if value == "" || hasVariable(value) {
			return
		}
		for _, t := range tokens {
			if t.pattern.MatchString(value) {
				report(service, where, t.what)
				return
			}
		}
		switch {
		case secretName.MatchString(name) && len(value) >= 4 && !strings.HasPrefix(value, "/") && value != "true" && value != "false":
			report(service, where, "a secret by its name")
		case highEntropy(value):
			report(service, where, "a random key")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		s := p.Services[name]
		raw := asMap(asMap(l.raw["services"])[name])
		for _, k := range slices.Sorted(maps.Keys(s.Environment)) {
			// A value that comes from a variable is not in the file.
			if v := s.Environment[k]; v != nil && !fromVariable(raw["environment"], k) {
				check(name, "the environment variable "+k, k, *v)
			}
		}
		for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
			check(name, "the label "+k, k, s.Labels[k])
		}
		for _, part := range []struct {
			what string
			args types.ShellCommand
		}{{"command", s.Command}, {"entrypoint", s.Entrypoint}} {
			for i, arg := range part.args {
				arg, prev := arg, ""
				if k, v, ok := strings.Cut(arg, "="); ok && strings.HasPrefix(k, "-") {
					arg, prev = v, k
				} else if i > 0 && strings.HasPrefix(part.args[i-1], "-") {
					prev = part.args[i-1]
				}
				check(name, "an argument of "+part.what, strings.ReplaceAll(strings.TrimLeft(prev, "-"), "-", "_"), arg)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.Configs)) {
		check("", "the content of config "+name, "", p.Configs[name].Content)
	}
	for _, name := range slices.Sorted(maps.Keys(p.Secrets)) {
		if p.Secrets[name].Content != "" {
			report("", "the content of secret "+name, "a secret by its place")
		}
	}
}

// fromVariable reports whether an environment entry of the uninterpolated model
// takes its value from a variable.
func fromVariable(env any, key string) bool {
	switch env := env.(type) {
	case map[string]any:
		s, _ := env[key].(string)
		return hasVariable(s)
	case []any:
		for _, e := range env {
			s, _ := e.(string)
			if k, v, ok := strings.Cut(s, "="); ok && k == key {
				return hasVariable(v)
			}
		}
	}
	return false
}

// highEntropy reports one word of 24 or more characters drawn from letters,
// digits and base64 signs, mixed enough to be random: hexadecimal of 32 digits or
// more, or at least 4 bits per character with upper case, lower case and digits.
// Digests are not secrets.
func highEntropy(s string) bool {
	if len(s) < 24 || len(s) > 512 || strings.HasPrefix(s, "sha256:") || strings.HasPrefix(s, "0x") {
		return false
	}
	var count [128]int
	var upper, lower, digit, hexOnly = false, false, false, true
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c >= '0' && c <= '9':
			digit = true
		case c >= 'a' && c <= 'z':
			lower = true
			hexOnly = hexOnly && c <= 'f'
		case c >= 'A' && c <= 'Z':
			upper = true
			hexOnly = hexOnly && c <= 'F'
		case c == '+' || c == '/' || c == '=' || c == '_' || c == '-':
			hexOnly = false
		default:
			return false
		}
		count[c]++
	}
	bits := 0.0
	for _, n := range count {
		if n > 0 {
			p := float64(n) / float64(len(s))
			bits -= p * math.Log2(p)
		}
	}
	if hexOnly {
		return len(s) >= 32 && digit && (lower || upper) && bits > 3
	}
	return upper && lower && digit && bits >= 4
}
