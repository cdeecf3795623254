// SPDX-License-Identifier: Apache-2.0

// Package redact takes secret values out of text that leaves the guest: messages of
// programs that quote what they were given, and what scripts print.
//
// It is a second line, not a guarantee: a value that was changed on its way (cut,
// encoded) is not recognised, and values shorter than [Shortest] are left, since
// they would blank out ordinary words and say little.
package redact

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// Shortest is the length in bytes from which a value is taken out.
const Shortest = 4

// Redactor knows a set of values. Its zero value, and nil, take nothing out.
type Redactor struct{ words []word }

type word struct{ text, name string }

// New returns a Redactor of the values of an environment. Each is known whole, line
// by line, without the spaces around it, and as Go quotes it.
func New(env map[string]string) *Redactor {
	r := &Redactor{}
	for name, value := range env {
		for _, v := range append(strings.Split(value, "\n"), value) {
			quoted := strconv.Quote(v)
			for _, form := range []string{v, strings.TrimSpace(v), quoted[1 : len(quoted)-1]} {
				if len(form) >= Shortest {
					r.words = append(r.words, word{form, name})
				}
			}
		}
	}
	// Longest first, or a value that is part of another leaves the rest of it.
	slices.SortFunc(r.words, func(a, b word) int {
		return cmp.Or(len(b.text)-len(a.text), strings.Compare(a.text, b.text), strings.Compare(a.name, b.name))
	})
	r.words = slices.CompactFunc(r.words, func(a, b word) bool { return a.text == b.text })
	return r
}

// Text returns the text with "[NAME]" in place of each value.
func (r *Redactor) Text(text string) string {
	if r == nil {
		return text
	}
	for _, w := range r.words {
		text = strings.ReplaceAll(text, w.text, "["+w.name+"]")
	}
	return text
}
