// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strconv"
	"strings"
)

// Version requirements in the syntax of Cargo (doc.rust-lang.org/cargo,
// "Specifying Dependencies"), which requirements.os_version uses: comparators
// joined by commas, all of which must hold; no operator means "^".

// semver is a SemVer 2.0.0 version without its build metadata.
type semver struct {
	num [3]uint64
	pre []string
}

type comparator struct {
	op    string // = > >= < <= ~ ^
	parts int    // how many of major, minor, patch were written; 0 = "*"
	v     semver
}

// MatchOSVersion reports whether an OS version meets a requirement. A malformed
// requirement or version is an error, never a match.
func MatchOSVersion(requirement, version string) (bool, error) {
	req, err := parseVersionReq(requirement)
	if err != nil {
		return false, err
	}
	v, err := parseSemver(version)
	if err != nil {
		return false, err
	}
	for _, c := range req {
		if !c.matches(v) {
			return false, nil
		}
	}
	if len(v.pre) == 0 {
		return true, nil
	}
	// A pre-release is met only by a requirement that names a pre-release of the
	// very same version.
	for _, c := range req {
		if c.parts == 3 && c.v.num == v.num && len(c.v.pre) > 0 {
			return true, nil
		}
	}
	return false, nil
}

func parseVersionReq(s string) ([]comparator, error) {
	if len(s) > 256 {
		return nil, fmt.Errorf("version requirement longer than 256 characters")
	}
	var out []comparator
	for _, part := range strings.Split(s, ",") {
		c, err := parseComparator(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("version requirement %q: %w", clip(s), err)
		}
		out = append(out, c)
	}
	if len(out) > 1 {
		for _, c := range out {
			if c.parts == 0 {
				return nil, fmt.Errorf("version requirement %q: * must stand alone", clip(s))
			}
		}
	}
	return out, nil
}

func parseComparator(s string) (c comparator, err error) {
	for _, op := range []string{">=", "<=", ">", "<", "=", "~", "^"} {
		if rest, ok := strings.CutPrefix(s, op); ok {
			c.op, s = op, strings.TrimSpace(rest)
			break
		}
	}
	if s == "" {
		return c, fmt.Errorf("a version is missing")
	}
	core, _, hasBuild := strings.Cut(s, "+")
	if hasBuild && !validIdentifiers(s[len(core)+1:], false) {
		return c, fmt.Errorf("malformed build metadata")
	}
	core, pre, hasPre := strings.Cut(core, "-")
	fields := strings.Split(core, ".")
	if len(fields) > 3 {
		return c, fmt.Errorf("%q has more than three numbers", clip(s))
	}
	wild := false
	for i, f := range fields {
		if f == "*" || f == "x" || f == "X" {
			wild = true
			continue
		}
		if wild {
			return c, fmt.Errorf("a number after a wildcard in %q", clip(s))
		}
		if c.v.num[i], err = parseNumeric(f); err != nil {
			return c, err
		}
		c.parts++
	}
	if (hasPre || hasBuild) && c.parts != 3 {
		return c, fmt.Errorf("%q needs three numbers before a pre-release or build", clip(s))
	}
	if wild && c.parts == 0 && c.op != "" {
		return c, fmt.Errorf("an operator before *")
	}
	if hasPre {
		if !validIdentifiers(pre, true) {
			return c, fmt.Errorf("malformed pre-release %q", clip(pre))
		}
		c.v.pre = strings.Split(pre, ".")
	}
	if c.op == "" {
		c.op = "^"
		if wild {
			c.op = "=" // 1.* is any 1.x
		}
	}
	return c, nil
}

func parseSemver(s string) (semver, error) {
	var v semver
	if len(s) > 256 {
		return v, fmt.Errorf("version longer than 256 characters")
	}
	core, build, hasBuild := strings.Cut(s, "+")
	if hasBuild && !validIdentifiers(build, false) {
		return v, fmt.Errorf("version %q: malformed build metadata", clip(s))
	}
	core, pre, hasPre := strings.Cut(core, "-")
	fields := strings.Split(core, ".")
	if len(fields) != 3 {
		return v, fmt.Errorf("version %q does not have three numbers", clip(s))
	}
	for i, f := range fields {
		n, err := parseNumeric(f)
		if err != nil {
			return v, fmt.Errorf("version %q: %w", clip(s), err)
		}
		v.num[i] = n
	}
	if hasPre {
		if !validIdentifiers(pre, true) {
			return v, fmt.Errorf("version %q: malformed pre-release", clip(s))
		}
		v.pre = strings.Split(pre, ".")
	}
	return v, nil
}

func parseNumeric(s string) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != s {
		return 0, fmt.Errorf("%q is not a version number", clip(s))
	}
	return n, nil
}

// validIdentifiers checks dot-separated [0-9A-Za-z-]+; a numeric pre-release
// identifier has no leading zero.
func validIdentifiers(s string, pre bool) bool {
	for _, id := range strings.Split(s, ".") {
		if id == "" {
			return false
		}
		digits := true
		for i := 0; i < len(id); i++ {
			c := id[i]
			isDigit := c >= '0' && c <= '9'
			digits = digits && isDigit
			if !isDigit && c != '-' && (c|0x20 < 'a' || c|0x20 > 'z') {
				return false
			}
		}
		if pre && digits && len(id) > 1 && id[0] == '0' {
			return false
		}
	}
	return true
}

func (a semver) compare(b semver) int {
	for i := range a.num {
		if a.num[i] != b.num[i] {
			if a.num[i] < b.num[i] {
				return -1
			}
			return 1
		}
	}
	switch {
	case len(a.pre) == 0 && len(b.pre) == 0:
		return 0
	case len(a.pre) == 0:
		return 1
	case len(b.pre) == 0:
		return -1
	}
	for i := 0; i < len(a.pre) && i < len(b.pre); i++ {
		x, y := a.pre[i], b.pre[i]
		if x == y {
			continue
		}
		nx, ex := strconv.ParseUint(x, 10, 64)
		ny, ey := strconv.ParseUint(y, 10, 64)
		switch {
		case ex == nil && ey == nil:
			if nx < ny {
				return -1
			}
			return 1
		case ex == nil: // numbers sort below words
			return -1
		case ey == nil:
			return 1
		case x < y:
			return -1
		}
		return 1
	}
	return len(a.pre) - len(b.pre)
}

// matches applies one comparator; a comparator with missing parts stands for the
// range of all versions that begin with the given ones.
func (c comparator) matches(v semver) bool {
	if c.parts == 0 {
		return true
	}
	low := c.v
	// next is the first version after everything that begins with the first n numbers.
	next := func(n int) semver {
		var u semver
		copy(u.num[:n], c.v.num[:n])
		u.num[n-1]++
		return u
	}
	switch c.op {
	case "=":
		if c.parts == 3 {
			return v.compare(low) == 0
		}
		return v.compare(low) >= 0 && below(v, next(c.parts))
	case ">":
		if c.parts == 3 {
			return v.compare(low) > 0
		}
		return v.compare(next(c.parts)) >= 0
	case ">=":
		return v.compare(low) >= 0
	case "<":
		return v.compare(low) < 0
	case "<=":
		if c.parts == 3 {
			return v.compare(low) <= 0
		}
		return below(v, next(c.parts))
	case "~":
		return v.compare(low) >= 0 && below(v, next(min(c.parts, 2)))
	}
	// ^: the leftmost non-zero number may not change.
	fixed := 1
	for fixed < c.parts && c.v.num[fixed-1] == 0 {
		fixed++
	}
	return v.compare(low) >= 0 && below(v, next(fixed))
}

// below compares numbers only: 1.3.0-alpha is not below 1.3.0 for a range's end.
func below(v, end semver) bool {
	v.pre = nil
	return v.compare(end) < 0
}
