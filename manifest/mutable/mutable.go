// SPDX-License-Identifier: Apache-2.0

// Package mutable says which services of a compose file could change what runs in
// the guest after it was measured: take over the engine, the kernel, the guest's
// own files, or another container.
//
// The deployer's linter and every verifier judge by this one reading, so a relying
// party sees what the deployer was told. It does not interpret the file as the
// engine does; it takes the union of all that the file says: of every document, of
// merged and extended mappings, of values that a later one replaces, of services
// behind a profile. A value that a variable decides counts as the worst one. So it
// may find what does not take effect, but not miss what does. lint's tests hold it
// against compose-go, which the engine uses.
//
// Attacker-controlled: the text. The work that it can cause is bounded; what cannot
// be read is a finding itself. Pure: for the verifier, in WASM too.
//
// Implements spec/threats.md J01, J02.
package mutable

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// Rule is a kind of finding. Its text is stable.
type Rule string

// The rules.
const (
	Privileged   Rule = "privileged"    // all capabilities and devices
	Capability   Rule = "capability"    // one that reaches past the container
	EngineSocket Rule = "engine_socket" // the engine's API: any image, privileged
	HostPID      Rule = "host_pid"
	HostNetwork  Rule = "host_network" // or a network that the firewall does not see
	Namespace    Rule = "host_namespace"
	Unconfined   Rule = "unconfined" // seccomp or another confinement off
	Device       Rule = "device"
	HostPath     Rule = "host_path" // of the guest's own system
	Runtime      Rule = "runtime"   // another runtime, or orders to it
	Outside      Rule = "outside"   // content that the file does not hold
	Unreadable   Rule = "unreadable"
)

// Finding is one way in which a service could change what runs.
type Finding struct {
	Service string // empty: the file as a whole
	Rule    Rule
	What    string // a clause whose subject is the service
}

// String returns "service: what".
func (f Finding) String() string {
	if f.Service == "" {
		return f.What
	}
	return f.Service + ": " + f.What
}

// Mount is one mount of a service as the file has it. Source is a path of the
// guest, cleaned and with /var/run as /run, or the name of a volume.
type Mount struct {
	Source, Target string
	ReadOnly       bool
}

// Service is what the file says of one service.
type Service struct {
	Mounts      []Mount
	HookMounts  []Mount  // of containers run before it
	VolumesFrom []string // as written
	PID         []string // pid: as written
}

// File is a reading of a compose file.
type File struct {
	Name     string // of the project; the last one given
	Services map[string]*Service
	// Paths are those of the guest for which configs, secrets and volumes stand.
	Paths    []string
	Findings []Finding // by service, rule and text, without repetition
}

// Bounds.
const (
	maxSize     = 1 << 20 // bytes of text
	maxVisits   = 200_000 // nodes looked at, aliases followed included
	maxFindings = 256
	maxText     = 120 // bytes of one quoted value
)

// Scan returns the findings alone.
func Scan(text []byte) []Finding { return Read(text).Findings }

// Read reads a compose file. It never fails: what cannot be read is a finding with
// the rule Unreadable.
func Read(text []byte) *File {
	r := &reader{file: &File{Services: map[string]*Service{}}, defs: map[string][]*yaml.Node{}, seen: map[Finding]bool{}}
	r.read(text)
	if r.visits > maxVisits {
		r.add("", Unreadable, "the compose file is too large to be read")
	}
	slices.SortFunc(r.file.Findings, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.Service, b.Service), strings.Compare(string(a.Rule), string(b.Rule)), strings.Compare(a.What, b.What))
	})
	return r.file
}

type reader struct {
	file   *File
	defs   map[string][]*yaml.Node // service -> its definitions
	seen   map[Finding]bool
	visits int
	// usedBy are the services that mount a named volume.
	usedBy map[string][]string
}

func (r *reader) add(service string, rule Rule, what string) {
	f := Finding{service, rule, what}
	if r.seen[f] || len(r.seen) >= maxFindings {
		return
	}
	r.seen[f] = true
	r.file.Findings = append(r.file.Findings, f)
}

func (r *reader) read(text []byte) {
	if len(text) > maxSize {
		r.add("", Unreadable, "the compose file is too large to be read")
		return
	}
	var docs []*yaml.Node
	defer func() {
		// The parser is not ours; a shape that it did not expect must not take the
		// verifier down.
		if recover() != nil {
			r.add("", Unreadable, "the compose file cannot be read")
		}
	}()
	for dec := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var doc yaml.Node
		err := dec.Decode(&doc)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			r.add("", Unreadable, "the compose file is no YAML")
			break
		}
		docs = append(docs, &doc)
	}
	var volumes, networks []*yaml.Node
	for _, doc := range docs {
		for _, top := range doc.Content {
			r.entries(top, func(key string, v *yaml.Node) {
				switch key {
				case "name":
					r.file.Name = r.scalar(v)
				case "include":
					r.add("", Outside, "the compose file includes others")
				case "services", "jobs":
					r.entries(v, func(name string, def *yaml.Node) { r.defs[name] = append(r.defs[name], def) })
				case "volumes":
					volumes = append(volumes, v)
				case "networks":
					networks = append(networks, v)
				case "configs", "secrets":
					r.entries(v, func(name string, def *yaml.Node) {
						r.entries(def, func(k string, f *yaml.Node) {
							if k == "file" {
								r.path("", r.scalar(f))
							}
						})
					})
				}
			})
		}
	}
	r.usedBy = map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(r.defs)) {
		s := &Service{}
		r.file.Services[name] = s
		for _, def := range r.definitions(name, map[string]bool{}) {
			r.service(name, s, def)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.defs)) {
		r.inherit(name, r.file.Services[name].VolumesFrom, map[string]bool{name: true})
	}
	for _, v := range volumes {
		r.entries(v, r.namedVolume)
	}
	for _, v := range networks {
		r.entries(v, r.network)
	}
}

// definitions returns the mappings that make up a service: its own, and those of
// the services that it extends.
func (r *reader) definitions(name string, seen map[string]bool) []*yaml.Node {
	if seen[name] {
		return nil
	}
	seen[name] = true
	all := slices.Clone(r.defs[name])
	for _, def := range r.defs[name] {
		r.entries(def, func(key string, v *yaml.Node) {
			if key != "extends" {
				return
			}
			base := r.scalar(v)
			r.entries(v, func(k string, v *yaml.Node) {
				switch k {
				case "service":
					base = r.scalar(v)
				case "file":
					r.add(name, Outside, "extends a service of another file")
				}
			})
			all = append(all, r.definitions(base, seen)...)
		})
	}
	return all
}

// inherit adds the findings about mounts of services whose volumes another takes.
func (r *reader) inherit(name string, from []string, seen map[string]bool) {
	for _, f := range from {
		base, _, _ := strings.Cut(f, ":")
		if strings.HasPrefix(f, "container:") || hasVariable(f) {
			r.add(name, HostPath, "takes the volumes of the container "+clip(f))
			continue
		}
		if seen[base] || r.file.Services[base] == nil {
			continue
		}
		seen[base] = true
		for _, m := range r.file.Services[base].Mounts {
			r.mountSource(name, m.Source)
		}
		r.inherit(name, r.file.Services[base].VolumesFrom, seen)
	}
}

// dangerous are capabilities that reach past a container's namespaces.
var dangerous = map[string]bool{
	"ALL": true, "SYS_ADMIN": true, "SYS_MODULE": true, "SYS_RAWIO": true, "SYS_PTRACE": true, "SYS_BOOT": true, "SYS_TIME": true,
	"SYSLOG": true, "BPF": true, "PERFMON": true, "DAC_READ_SEARCH": true, "MAC_ADMIN": true, "MAC_OVERRIDE": true, "CHECKPOINT_RESTORE": true,
}

// service reads one definition of a service, or of a container run before it.
func (r *reader) service(name string, s *Service, def *yaml.Node) {
	add := func(rule Rule, what string) { r.add(name, rule, what) }
	namespace := func(key, value string, rule Rule, what string) {
		switch {
		case value == "host":
			add(rule, what)
		case hasVariable(value):
			add(rule, "lets a variable decide "+key+":")
		}
	}
	r.entries(def, func(key string, v *yaml.Node) {
		value := r.scalar(v)
		switch key {
		case "privileged":
			if !isFalse(value) {
				add(Privileged, "is privileged")
			}
		case "cap_add":
			for _, c := range r.list(v) {
				if c := strings.ToUpper(r.scalar(c)); dangerous[strings.TrimPrefix(c, "CAP_")] || hasVariable(c) {
					add(Capability, "adds the capability "+clip(c))
				}
			}
		case "use_api_socket":
			if !isFalse(value) {
				add(EngineSocket, "uses the engine's socket")
			}
		case "pid":
			s.PID = append(s.PID, value)
			namespace(key, value, HostPID, "shares the guest's processes")
		case "network_mode", "net":
			namespace(key, value, HostNetwork, "uses the guest's network")
		case "ipc", "uts", "cgroup", "userns_mode":
			namespace(key, value, Namespace, "shares the guest's "+strings.TrimSuffix(key, "_mode")+" namespace")
		case "cgroup_parent":
			if value != "" {
				add(Namespace, "chooses its place among the guest's cgroups")
			}
		case "security_opt":
			for _, o := range r.list(v) {
				if o := r.scalar(o); !strings.HasPrefix(o, "no-new-privileges") {
					add(Unconfined, "changes its confinement ("+clip(o)+")")
				}
			}
		case "devices", "device_cgroup_rules":
			if n := r.list(v); len(n) > 0 {
				add(Device, "uses devices of the guest ("+clip(r.deviceName(n[0]))+")")
			}
		case "runtime":
			if value != "" && value != "crun" && value != "runc" {
				add(Runtime, "asks for the runtime "+clip(value))
			}
		case "annotations":
			check := func(k string) {
				if strings.HasPrefix(k, "run.oci.") || strings.HasPrefix(k, "org.criu.") || hasVariable(k) {
					add(Runtime, "gives orders to the runtime ("+clip(k)+")")
				}
			}
			r.entries(v, func(k string, _ *yaml.Node) { check(k) })
			for _, a := range r.list(v) {
				k, _, _ := strings.Cut(r.scalar(a), "=")
				check(k)
			}
		case "provider":
			add(Outside, "is provided by a program outside of the compose file")
		case "build":
			add(Outside, "is built in the guest")
		case "volumes":
			for _, m := range r.list(v) {
				r.mount(name, s, m)
			}
		case "volumes_from":
			for _, f := range r.list(v) {
				s.VolumesFrom = append(s.VolumesFrom, r.scalar(f))
			}
		case "pre_start":
			for _, hook := range r.list(v) {
				var h Service
				r.service(name, &h, hook)
				s.HookMounts = append(s.HookMounts, h.Mounts...)
				s.VolumesFrom = append(s.VolumesFrom, h.VolumesFrom...)
				s.PID = append(s.PID, h.PID...)
			}
		case "post_start", "pre_stop":
			for _, hook := range r.list(v) {
				r.entries(hook, func(k string, v *yaml.Node) {
					if k == "privileged" && !isFalse(r.scalar(v)) {
						add(Privileged, "runs a privileged hook")
					}
				})
			}
		}
	})
}

func (r *reader) deviceName(n *yaml.Node) string {
	text := r.scalar(n)
	r.entries(n, func(k string, v *yaml.Node) {
		if k == "source" {
			text = r.scalar(v)
		}
	})
	return text
}

// mount reads one entry of volumes:, in its short or its long form.
func (r *reader) mount(name string, s *Service, n *yaml.Node) {
	var m Mount
	kind := ""
	if text := r.scalar(n); text != "" {
		m.Source, m.Target, m.ReadOnly = shortMount(text)
	}
	r.entries(n, func(k string, v *yaml.Node) {
		switch k {
		case "type":
			kind = r.scalar(v)
		case "source":
			m.Source = r.scalar(v)
		case "target":
			m.Target = r.scalar(v)
		case "read_only":
			m.ReadOnly = !isFalse(r.scalar(v))
		}
	})
	if kind == "image" || kind == "tmpfs" || m.Source == "" {
		return
	}
	if kind == "bind" && !isPath(m.Source) && !hasVariable(m.Source) {
		m.Source = "./" + m.Source
	}
	m.Source = resolve(m.Source)
	s.Mounts = append(s.Mounts, m)
	r.mountSource(name, m.Source)
}

func (r *reader) mountSource(name, source string) {
	if isPath(source) || hasVariable(source) {
		r.hostPath(name, source)
		return
	}
	if !slices.Contains(r.usedBy[source], name) {
		r.usedBy[source] = append(r.usedBy[source], name)
	}
}

// shortMount splits SOURCE:TARGET[:OPTIONS]; colons inside ${…} do not count.
func shortMount(text string) (source, target string, readOnly bool) {
	var parts []string
	depth, from := 0, 0
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] == '$' && i+1 < len(text) && text[i+1] == '{':
			depth++
		case text[i] == '}' && depth > 0:
			depth--
		case text[i] == ':' && depth == 0:
			parts = append(parts, text[from:i])
			from = i + 1
		}
	}
	parts = append(parts, text[from:])
	if len(parts) == 1 {
		if hasVariable(text) {
			return text, "", false // may hold a whole mount
		}
		return "", text, false
	}
	if len(parts) > 2 {
		readOnly = slices.Contains(strings.Split(parts[2], ","), "ro")
	}
	return parts[0], parts[1], readOnly
}

func isPath(source string) bool {
	return strings.HasPrefix(source, "/") || strings.HasPrefix(source, ".") || strings.HasPrefix(source, "~")
}

// workDir is where the guest starts compose; relative paths begin there.
const workDir = "/dstack"

// resolve cleans a path; volume names stay as they are.
func resolve(source string) string {
	switch {
	case !isPath(source):
		return source
	case strings.HasPrefix(source, "~"):
		// The home directory of whoever runs compose, below /run in the guest.
		return path.Clean("/run/engine/" + strings.TrimLeft(source, "~"))
	case !strings.HasPrefix(source, "/"):
		source = workDir + "/" + source
	}
	source = path.Clean(source)
	if rest, ok := strings.CutPrefix(source, "/var/run"); ok && (rest == "" || rest[0] == '/') {
		source = "/run" + rest
	}
	return source
}

// agentPaths are what the guest has for apps to mount.
var agentPaths = []string{"/run/dstack.sock", "/run/tappd.sock", "/run/dstack", "/run/dstack/dstack.sock"}

// plainPaths are files of the measured root that programs like to see and that
// say nothing about this guest.
var plainPaths = []string{"/etc/localtime", "/etc/timezone", "/etc/ssl/certs"}

// systemPaths are directories through which a container reads the guest's state or
// writes what the guest, or another container, uses. The rest of the root is
// read-only and measured.
var systemPaths = []string{"/proc", "/sys", "/dev", "/etc", "/run", "/var", "/tmp", "/root", "/boot", "/persistent"}

func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// path is hostPath for what has a name of its own in the file.
func (r *reader) path(service, source string) {
	r.file.Paths = append(r.file.Paths, resolve(source))
	r.hostPath(service, source)
}

// hostPath adds a finding when a path of the guest, mounted into a container, gives
// it more than a directory of its own.
func (r *reader) hostPath(service, source string) {
	if rule, what := judgePath(source); rule != "" {
		r.add(service, rule, what)
	}
}

// PathRule returns the rule that a bind mount of the path breaks, or "".
func PathRule(source string) Rule {
	rule, _ := judgePath(source)
	return rule
}

func judgePath(source string) (Rule, string) {
	if hasVariable(source) {
		return HostPath, "lets a variable decide what it mounts (" + clip(source) + ")"
	}
	p := resolve(source)
	within := func(dirs []string) bool {
		return slices.ContainsFunc(dirs, func(d string) bool { return under(p, d) })
	}
	switch base := path.Base(p); {
	case slices.Contains(agentPaths, p) || within(plainPaths):
	case strings.HasSuffix(base, "docker.sock") || strings.HasSuffix(base, "containerd.sock") || under(p, "/run/containerd") || under(p, "/run/docker"):
		return EngineSocket, "mounts the engine's socket (" + clip(p) + ")"
	case p == "/" || p == "/run":
		return HostPath, "mounts " + p + " of the guest, and with it the engine's socket"
	case within(systemPaths):
		return HostPath, "mounts " + clip(p) + " of the guest"
	case under(p, workDir):
		// One directory below the work directory is the app's own. The directory
		// itself holds the compose file and the environment; and what lies deeper
		// may be a link that a container made in what lies above.
		rest := strings.TrimPrefix(strings.TrimPrefix(p, workDir), "/")
		if rest == "" || strings.Contains(rest, "/") || strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "docker-compose") || strings.HasPrefix(rest, "app-compose") {
			return HostPath, "mounts " + clip(p) + " of the guest's work directory"
		}
	}
	return "", ""
}

// namedVolume looks for what a volume's name hides.
func (r *reader) namedVolume(name string, def *yaml.Node) {
	var kind, device string
	given := false
	r.entries(def, func(key string, v *yaml.Node) {
		if key != "driver_opts" {
			return
		}
		r.entries(v, func(k string, v *yaml.Node) {
			given = true
			switch k {
			case "type":
				kind = r.scalar(v)
			case "device":
				device = r.scalar(v)
			}
		})
	})
	if !given {
		return
	}
	services := r.usedBy[name]
	if len(services) == 0 {
		services = []string{""}
	}
	for _, s := range services {
		switch {
		case kind == "tmpfs" || kind == "nfs" || kind == "nfs4" || kind == "cifs":
			// None shows the guest's own files. lint warns of the network.
		case hasVariable(kind) || hasVariable(device):
			r.add(s, HostPath, "lets a variable decide what the volume "+clip(name)+" is")
		case isPath(device) && (kind == "none" || kind == ""):
			r.path(s, device)
		default:
			r.add(s, HostPath, "mounts a file system of its own choice by the volume "+clip(name)+" ("+clip(kind)+")")
		}
	}
}

// network looks for networks that are the guest's own, or pass by its firewall.
func (r *reader) network(name string, def *yaml.Node) {
	real := name
	r.entries(def, func(key string, v *yaml.Node) {
		switch value := r.scalar(v); key {
		case "name":
			real = value
		case "driver":
			if value == "host" || value == "macvlan" || value == "ipvlan" || hasVariable(value) {
				r.add("", HostNetwork, "the network "+clip(name)+" passes by the guest's firewall ("+clip(value)+")")
			}
		}
	})
	if real == "host" || hasVariable(real) {
		r.add("", HostNetwork, "the network "+clip(name)+" is the guest's own")
	}
}

// node follows an alias and counts the visit.
func (r *reader) node(n *yaml.Node) *yaml.Node {
	r.visits++
	if r.visits > maxVisits {
		return &yaml.Node{}
	}
	for i := 0; n != nil && n.Kind == yaml.AliasNode && i < 8; i++ {
		n = n.Alias
	}
	if n == nil {
		return &yaml.Node{}
	}
	return n
}

// entries calls f for every member of a mapping, those of merged mappings included.
func (r *reader) entries(n *yaml.Node, f func(key string, value *yaml.Node)) { r.merged(n, f, 0) }

const maxMergeDepth = 16

func (r *reader) merged(n *yaml.Node, f func(string, *yaml.Node), depth int) {
	n = r.node(n)
	if n.Kind != yaml.MappingNode {
		return
	}
	if depth > maxMergeDepth {
		r.visits = maxVisits + 1
		return
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := r.node(n.Content[i]), n.Content[i+1]
		if key.Value != "<<" {
			f(key.Value, value)
			continue
		}
		if v := r.node(value); v.Kind == yaml.SequenceNode {
			for _, m := range v.Content {
				r.merged(m, f, depth+1)
			}
		} else {
			r.merged(v, f, depth+1)
		}
	}
}

// list returns the members of a sequence; a scalar is a list of one.
func (r *reader) list(n *yaml.Node) []*yaml.Node {
	switch n = r.node(n); n.Kind {
	case yaml.SequenceNode:
		return n.Content
	case yaml.ScalarNode:
		if n.Value != "" && n.Tag != "!!null" {
			return []*yaml.Node{n}
		}
	}
	return nil
}

// scalar returns the text of a scalar; null and everything else is empty.
func (r *reader) scalar(n *yaml.Node) string {
	n = r.node(n)
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		return ""
	}
	return n.Value
}

// isFalse accepts the spellings of false that compose casts.
func isFalse(s string) bool {
	switch strings.ToLower(s) {
	case "", "false", "no", "off", "n", "f", "0":
		return true
	}
	return false
}

// hasVariable reports an interpolation; $$ is an escaped dollar.
func hasVariable(s string) bool { return strings.Contains(strings.ReplaceAll(s, "$$", ""), "$") }

// clip makes a value of the file safe for messages.
func clip(s string) string {
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
