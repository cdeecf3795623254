// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// scope says which keys the callers of one listener may derive. nil is the whole
// app, as upstream has it; one with no paths derives nothing (threats.md J06).
//
// Upstream's derivation knows no algorithm and no purpose: one path is one set of
// 32 bytes, whatever method asks for it (guest-agent.md §8.1). The path alone is
// therefore what a scope is about, and it is compared as the bytes that are derived
// from: "a/../b" is a path of its own and no way to "b".
type scope struct {
	service string
	paths   []string // as manifest.InScope reads them
}

// signPath is the path of the key by which Sign signs (guest-agent.md §8.3).
const signPath = "vms"

// allow refuses a path outside the scope; code key_scope.
func (s *scope) allow(path string) error {
	if s == nil || manifest.InScope(s.paths, path) {
		return nil
	}
	shown := path
	if len(shown) > 100 {
		shown = shown[:100] + "…"
	}
	return fault.New("key_scope", "the service %s may not use the key path %q", s.service, shown).
		WithFix("add it to key_scopes.%s of the manifest", s.service)
}
