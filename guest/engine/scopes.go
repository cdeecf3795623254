// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"encoding/json"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lint"
	"github.com/dstack-go/dstack/manifest/mutable"
)

// ScopesDir holds a directory for each service with a key scope, with the socket
// ScopedSocket in it that serves only that scope.
const (
	ScopesDir    = "/run/dstack/scopes"
	ScopedSocket = "dstack.sock"
)

// fullSockets are the agent's sockets without a scope, and the directory that has
// one and all the scoped ones.
var fullSockets = []string{"/run/dstack.sock", "/run/tappd.sock", "/run/dstack/dstack.sock"}

const fullDirectory = "/run/dstack"

// ordinaryTarget is where a service that mounts no socket gets its own.
const ordinaryTarget = "/var/run/dstack.sock"

var serviceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// ScopeOverride returns a compose file that, merged over the manifest's, gives each
// service of scopes (key_scopes of the manifest) its own socket where it mounts the
// agent's, and at /var/run/dstack.sock where it mounts none. It returns nil for no
// scopes. Services without a scope keep what they mount.
//
// A scope that its service could get around is worse than none, so the compose file
// is refused where a scoped service could reach a socket without a scope in any
// other way: what it mounts besides, privileges, another container's processes or
// volumes. The result is merged as compose merges it and looked at again.
//
// Codes: scope_service (a name that is no service), scope_bypass.
func ScopeOverride(compose string, scopes map[string][]string) ([]byte, error) {
	if len(scopes) == 0 {
		return nil, nil
	}
	type volume struct {
		Type     string          `json:"type"`
		Source   string          `json:"source"`
		Target   string          `json:"target"`
		ReadOnly bool            `json:"read_only,omitempty"`
		Bind     map[string]bool `json:"bind"`
	}
	type service struct {
		Volumes []volume `json:"volumes"`
	}
	bypass := func(name, format string, args ...any) error {
		return fault.New("scope_bypass", "service "+name+" has a key scope, but "+format, args...).
			WithFix("take it out of the compose file, or the service out of key_scopes")
	}
	file := mutable.Read([]byte(compose))
	override := struct {
		Services map[string]service `json:"services"`
	}{map[string]service{}}
	for _, name := range slices.Sorted(maps.Keys(scopes)) {
		s := file.Services[name]
		if s == nil || !serviceName.MatchString(name) {
			return nil, fault.New("scope_service", "key_scopes names %q, which is no service of the compose file", name).
				WithFix("name a service")
		}
		for _, f := range file.Findings {
			if f.Service == name || f.Rule == mutable.Unreadable || f.Service == "" && f.Rule == mutable.Outside {
				return nil, bypass(name, "it %s", f.What)
			}
		}
		for _, p := range file.Paths {
			if p == "/run" || strings.HasPrefix(p, "/run/") || !strings.HasPrefix(p, "/") {
				return nil, bypass(name, "the compose file has a config, secret or volume that stands for %s", p)
			}
		}
		if len(s.VolumesFrom) > 0 {
			return nil, bypass(name, "it takes the volumes of %s", s.VolumesFrom[0])
		}
		for _, pid := range s.PID {
			if pid != "" {
				return nil, bypass(name, "it shares processes (pid: %s)", pid)
			}
		}
		for _, m := range s.HookMounts {
			if full(m.Source) {
				return nil, bypass(name, "a container that runs before it mounts %s", m.Source)
			}
		}
		own := path.Join(ScopesDir, name)
		var volumes []volume
		for _, m := range s.Mounts {
			if !full(m.Source) {
				continue
			}
			if strings.Contains(m.Target, "$") || !strings.HasPrefix(m.Target, "/") {
				return nil, bypass(name, "it mounts %s at %q, which is no plain path", m.Source, m.Target)
			}
			source := path.Join(own, ScopedSocket)
			if m.Source == fullDirectory {
				source = own
			}
			// Compose finds the mount to replace by its cleaned target.
			v := volume{"bind", source, path.Clean(m.Target), m.ReadOnly, map[string]bool{"create_host_path": false}}
			if i := slices.IndexFunc(volumes, func(o volume) bool { return o.Target == v.Target }); i >= 0 {
				volumes[i] = v
				continue
			}
			volumes = append(volumes, v)
		}
		if len(volumes) == 0 {
			volumes = []volume{{"bind", path.Join(own, ScopedSocket), ordinaryTarget, false, map[string]bool{"create_host_path": false}}}
		}
		override.Services[name] = service{volumes}
	}
	text, err := json.Marshal(override)
	if err != nil {
		return nil, err
	}
	sources, err := lint.MountSources([]byte(compose), text)
	if err != nil {
		return nil, fault.Wrap(err, "scope_bypass", "the compose file with its key scopes cannot be read")
	}
	for _, name := range slices.Sorted(maps.Keys(scopes)) {
		scoped := false
		for _, source := range sources[name] {
			under := strings.HasPrefix(path.Clean(source)+"/", path.Join(ScopesDir, name)+"/")
			if scoped = scoped || under; !under && mutable.PathRule(source) != "" || full(resolved(source)) {
				return nil, bypass(name, "with its scope it still mounts %s", source)
			}
		}
		if !scoped {
			return nil, bypass(name, "its own socket is not mounted")
		}
	}
	return text, nil
}

func full(source string) bool { return source == fullDirectory || slices.Contains(fullSockets, source) }

// resolved spells a path of the guest in the one way.
func resolved(source string) string {
	source = path.Clean(source)
	if rest, ok := strings.CutPrefix(source, "/var/run/"); ok {
		return "/run/" + rest
	}
	return source
}
