// SPDX-License-Identifier: Apache-2.0

// Package lint reads a compose file as the guest's engine will, and says what
// in it cannot work in a confidential VM, or takes away what one is for.
//
// The guest has the manifest and nothing else: no build context, no files beside
// the compose file, no network to include from. So whatever a compose file takes
// from outside itself is refused (compose_external), and nothing is read from
// this machine either: no file, no environment but the variables given in
// [Options]. Findings of level error stop a deployment; warnings tell a relying
// party what they would want to know. What lets a container change what runs
// (package mutable, by which verifiers judge too) is an error unless
// [Options.AllowMutable] makes it a warning.
//
// Attacker-controlled: the text. It is bounded in size and in the work that
// aliases can cause; the parser is compose-go's.
//
// Implements the compose rules of spec/threats.md J01, J02 and J08.
package lint

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/template"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/distribution/reference"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/mutable"
)

// MaxSize is the largest compose file in bytes.
const MaxSize = 1 << 20

// maxNodeVisits bounds the work that YAML aliases can cause.
const maxNodeVisits = 200_000

// Level says what a finding does.
type Level = string

// An Error stops a deployment; a Warning is shown and does not.
const (
	Error   Level = "error"
	Warning Level = "warning"
)

// Finding is one thing that the compose file does and should not, or should know.
type Finding struct {
	Level   Level  `json:"level"`
	Code    string `json:"code"`
	Service string `json:"service,omitempty"`
	Message string `json:"message"`
	Fix     string `json:"fix,omitempty"`
}

// Port is one port that a service publishes.
type Port struct {
	Service   string `json:"service"`
	HostIP    string `json:"host_ip,omitempty"`
	Published uint16 `json:"published"` // in the guest; 0 = any free port
	Target    uint16 `json:"target"`    // in the container
	Protocol  string `json:"protocol"`  // tcp or udp
}

// Service is one service of the compose file.
type Service struct {
	Name  string `json:"name"`
	Image string `json:"image,omitempty"` // as written; "" when it is only built
	Build bool   `json:"build,omitempty"` // has a build: section
	Ports []Port `json:"ports,omitempty"`
}

// Compose is what a compose file asks for.
type Compose struct {
	Name     string    `json:"name"`     // project name given in the file, or ""
	Services []Service `json:"services"` // by name
	// Images are the distinct references, sorted: of services, of containers run
	// before them, of mounted images. One that a variable decides is there as it is
	// written, so that no lock can have it.
	Images   []string  `json:"images"`
	Ports    []Port    `json:"ports"`    // of all services, by published port
	Findings []Finding `json:"findings"` // errors first, then by service and code
}

// Options is what the reader of a compose file is given from outside of it.
type Options struct {
	// Env are the values of variables. No other variable has a value; in
	// particular the environment of this process is never consulted.
	Env map[string]string

	// AllowedEnvs names variables that are given to the guest encrypted. They
	// have no value here, and are not measured.
	AllowedEnvs []string

	// AllowMutable makes warnings of the errors about containers that could take
	// over the guest. The verdict carries them either way.
	AllowMutable bool
}

// Load reads a compose file; name stands for it in messages. It fails only when
// the text cannot be understood or takes something from outside, with the codes
// compose_too_large, compose_not_yaml and compose_external; all else is a finding.
func Load(data []byte, name string) (*Compose, error) {
	return LoadWith(data, name, Options{})
}

// Err returns the first finding of level error as an error with its code and fix,
// or nil.
func (c *Compose) Err() error {
	for _, f := range c.Findings {
		if f.Level == Error {
			return fault.New(f.Code, "%s", f.text()).WithFix("%s", f.Fix)
		}
	}
	return nil
}

func (f Finding) text() string {
	if f.Service == "" {
		return f.Message
	}
	return "service " + f.Service + ": " + f.Message
}

// LoadWith is Load with options.
func LoadWith(data []byte, name string, opt Options) (c *Compose, err error) {
	if len(data) > MaxSize {
		return nil, fault.New("compose_too_large", "%s has %d bytes, more than %d", name, len(data), MaxSize).
			WithFix("move data out of the compose file into the image")
	}
	defer func() {
		// compose-go walks untyped trees; a shape it did not expect must not take
		// the caller down.
		if r := recover(); r != nil {
			c, err = nil, notYAML(name, fmt.Errorf("%v", r))
		}
	}()
	// First the text as it stands, without values: what decides an image or
	// brings in a file must be seen before interpolation and merging hide it.
	raw, err := loader.LoadModelWithContext(context.Background(), details(data, name, nil), func(o *loader.Options) {
		offline(o)
		o.SkipInclude, o.SkipExtends, o.SkipInterpolation = true, true, true
		o.SkipValidation, o.SkipNormalization, o.SkipConsistencyCheck, o.SkipDefaultValues = true, true, true, true
	})
	if err != nil {
		return nil, notYAML(name, err)
	}
	if err := external(raw, name); err != nil {
		return nil, err
	}
	l := &linter{opt: opt, unset: map[string]bool{}}
	load := func(consistent bool) (*types.Project, error) {
		p, err := loader.LoadWithContext(context.Background(), details(data, name, opt.Env), func(o *loader.Options) {
			offline(o)
			o.Interpolate.Substitute = l.substitute
			o.Profiles = []string{"*"}
			o.SkipConsistencyCheck = !consistent
		})
		if errors.Is(err, errOutside) {
			return nil, outside(name, "it includes or extends another file")
		}
		if err != nil {
			return nil, notYAML(name, err)
		}
		return p, nil
	}
	project, err := load(false)
	if err != nil {
		return nil, err
	}
	// The consistency check (dependencies, names of networks and volumes) also
	// fails on a service without an image, which is a finding of its own here.
	complete := true
	for _, s := range project.Services {
		complete = complete && (s.Image != "" || s.Build != nil)
	}
	if complete {
		if project, err = load(true); err != nil {
			return nil, err
		}
	}
	c = &Compose{}
	if s, ok := raw["name"].(string); ok {
		c.Name = s
	}
	l.raw, l.out = raw, c
	l.mutable(data)
	l.project(project)
	return c, nil
}

// MountSources loads a compose file with another merged over it, as compose does,
// and returns what each service, and each container run before it, then mounts.
func MountSources(base, over []byte) (sources map[string][]string, err error) {
	defer func() {
		if r := recover(); r != nil {
			sources, err = nil, notYAML("the merged compose file", fmt.Errorf("%v", r))
		}
	}()
	d := details(base, "docker-compose.yaml", nil)
	d.ConfigFiles = append(d.ConfigFiles, types.ConfigFile{Filename: "override.yaml", Content: over})
	p, err := loader.LoadWithContext(context.Background(), d, func(o *loader.Options) {
		offline(o)
		o.Profiles, o.SkipConsistencyCheck = []string{"*"}, true
		// A required variable says nothing about mounts.
		o.Interpolate.Substitute = (&linter{unset: map[string]bool{}, anyVariable: true}).substitute
	})
	if err != nil {
		return nil, notYAML("the merged compose file", err)
	}
	sources = map[string][]string{}
	for name, s := range p.Services {
		volumes := slices.Clone(s.Volumes)
		for _, h := range s.PreStart {
			volumes = append(volumes, h.Volumes...)
		}
		for _, v := range volumes {
			sources[name] = append(sources[name], v.Source)
		}
	}
	return sources, nil
}

// details never leaves Environment nil: compose-go would still not read the
// process's, but an empty map says so.
func details(data []byte, name string, env map[string]string) types.ConfigDetails {
	return types.ConfigDetails{
		WorkingDir:  "/dstack",
		ConfigFiles: []types.ConfigFile{{Filename: name, Content: data}},
		Environment: maps.Clone(types.Mapping(env)),
	}
}

// offline switches off everything in compose-go that reads files.
func offline(o *loader.Options) {
	o.SetProjectName("dstack", true)
	o.ResolvePaths = false
	o.SkipResolveEnvironment = true
	o.SkipResolveLabels = true
	o.MaxNodeVisits = maxNodeVisits
	o.ResourceLoaders = []loader.ResourceLoader{refuseFiles{}}
}

var errOutside = errors.New("takes a file from outside")

// refuseFiles answers for every path that include: and extends: name, before
// compose-go's own loader of local files is asked.
type refuseFiles struct{}

func (refuseFiles) Accept(string) bool                           { return true }
func (refuseFiles) Load(context.Context, string) (string, error) { return "", errOutside }
func (refuseFiles) Dir(string) string                            { return "" }

func notYAML(name string, err error) error {
	return fault.Wrap(err, "compose_not_yaml", "%s is not a compose file", name).
		WithFix("check it with `docker compose -f %s config`", name)
}

func outside(name, what string) error {
	return fault.New("compose_external", "%s is not complete in itself: %s, which is not there inside the confidential VM and not measured", name, what).
		WithFix("write the content into the compose file itself")
}

// external looks for members that read files, in the uninterpolated model.
func external(raw map[string]any, name string) error {
	if _, ok := raw["include"]; ok {
		return outside(name, "it includes other files (include:)")
	}
	for svc, s := range members(raw["services"]) {
		s := asMap(s)
		if e, ok := asMap(s["extends"])["file"]; ok {
			return outside(name, fmt.Sprintf("service %s extends a service of the file %v", svc, e))
		}
		for _, key := range []string{"env_file", "label_file", "provider", "credential_spec"} {
			if v, ok := s[key]; ok && v != nil {
				return outside(name, fmt.Sprintf("service %s uses %s:", svc, key))
			}
		}
	}
	for _, kind := range []string{"configs", "secrets"} {
		for n, v := range members(raw[kind]) {
			if _, ok := asMap(v)["file"]; ok {
				return outside(name, fmt.Sprintf("%s.%s is read from a file", kind, n))
			}
		}
	}
	return nil
}

func asMap(v any) map[string]any { m, _ := v.(map[string]any); return m }

// members iterates a mapping in the order of its keys.
func members(v any) func(func(string, any) bool) {
	m := asMap(v)
	return func(yield func(string, any) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

type linter struct {
	opt Options
	// anyVariable gives every variable without a value a stand-in.
	anyVariable bool
	raw         map[string]any
	unset       map[string]bool
	out         *Compose
}

// substitute interpolates as compose does, and notes the variables that have no
// value. A variable that the file requires (${X:?}) and that the guest will be
// given gets a stand-in, since its value is not known here.
func (l *linter) substitute(text string, lookup template.Mapping) (string, error) {
	known := func(name string) (string, bool) {
		v, ok := lookup(name)
		if !ok {
			l.unset[name] = true
			if l.anyVariable || slices.Contains(l.opt.AllowedEnvs, name) {
				return "0", true
			}
		}
		return v, ok
	}
	return template.SubstituteWithOptions(text, known, template.WithoutLogging)
}

func (l *linter) add(level Level, code, service, fix, format string, args ...any) {
	l.out.Findings = append(l.out.Findings, Finding{level, code, service, fmt.Sprintf(format, args...), fix})
}

func (l *linter) project(p *types.Project) {
	images := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		s := p.Services[name]
		svc := Service{Name: name, Image: s.Image, Build: s.Build != nil}
		if s.Image != "" {
			images[s.Image] = true
		}
		if written, _ := asMap(asMap(l.raw["services"])[name])["image"].(string); hasVariable(written) {
			images[written] = true
		}
		l.furtherImages(p, name, s, images)
		l.image(name, s)
		for _, v := range s.Volumes {
			l.volume(name, v)
		}
		for _, port := range s.Ports {
			svc.Ports = append(svc.Ports, l.port(name, port)...)
		}
		l.out.Ports = append(l.out.Ports, svc.Ports...)
		l.out.Services = append(l.out.Services, svc)
	}
	l.out.Images = slices.Sorted(maps.Keys(images))
	if len(l.out.Services) == 0 {
		l.add(Error, "compose_no_service", "", "add a service with an image", "the compose file has no service")
	}
	l.namedVolumes(p)
	l.secrets(p)
	l.conflicts()
	for _, name := range slices.Sorted(maps.Keys(l.unset)) {
		if slices.Contains(l.opt.AllowedEnvs, name) {
			continue
		}
		l.add(Warning, "compose_variable_unset", "", fmt.Sprintf("write the value into the file, or a default: ${%s:-value}", name),
			"the variable %s has no value: the confidential VM does not see this machine's environment", name)
	}
	sort.SliceStable(l.out.Findings, func(i, j int) bool {
		a, b := l.out.Findings[i], l.out.Findings[j]
		if a.Level != b.Level {
			return a.Level == Error
		}
		if a.Service != b.Service {
			return a.Service < b.Service
		}
		return a.Code < b.Code
	})
	sort.SliceStable(l.out.Ports, func(i, j int) bool { return l.out.Ports[i].Published < l.out.Ports[j].Published })
}

func (l *linter) image(name string, s types.ServiceConfig) {
	rawImage, _ := asMap(asMap(l.raw["services"])[name])["image"].(string)
	ref := s.Image
	if ref == "" || hasVariable(rawImage) {
		ref = imageName(name) + ":1"
	}
	switch {
	case s.Build != nil:
		l.add(Error, "compose_build", name,
			fmt.Sprintf("build it first (`docker build -t %[1]s . && docker save %[1]s -o %[2]s.tar`), write `image: %[1]s` instead of build:, and deploy with `--app-image %[1]s=%[2]s.tar`", ref, imageName(name)),
			"build: is not supported: there is no build context inside the confidential VM, and what was built there would not be measured")
		if s.Image == "" {
			return
		}
	case s.Image == "":
		l.add(Error, "compose_no_image", name, "add image: with the reference of an image", "has no image")
		return
	}
	if hasVariable(rawImage) {
		l.add(Error, "compose_image_variable", name, "write the image reference out",
			"the image is decided by a variable (%s), whose value is not measured", rawImage)
		return
	}
	if _, err := reference.ParseNormalizedNamed(s.Image); err != nil {
		l.add(Error, "compose_image_invalid", name, "correct the reference, such as nginx:1.27 or ghcr.io/you/app@sha256:…", "%q is not an image reference: %v", s.Image, err)
	}
	switch s.PullPolicy {
	case "", types.PullPolicyMissing, types.PullPolicyIfNotPresent, types.PullPolicyNever:
	default:
		l.add(Warning, "compose_pull_always", name, "remove pull_policy:",
			"pull_policy %q is ignored: images are exactly those of the lock, and are never fetched anew", s.PullPolicy)
	}
}

// furtherImages adds the images that a service mounts, or runs before it starts.
// One that a variable decides is listed as it is written, so that no lock has it.
func (l *linter) furtherImages(p *types.Project, name string, s types.ServiceConfig, images map[string]bool) {
	rawService := asMap(asMap(l.raw["services"])[name])
	var written []string // as the file has them
	for _, v := range list(rawService["volumes"]) {
		if m := asMap(v); m["type"] == types.VolumeTypeImage {
			text, _ := m["source"].(string)
			written = append(written, text)
		}
	}
	for _, h := range list(rawService["pre_start"]) {
		text, _ := asMap(h)["image"].(string)
		written = append(written, text)
	}
	var used []string
	for _, v := range s.Volumes {
		if v.Type == types.VolumeTypeImage {
			used = append(used, v.Source)
		}
	}
	for _, h := range s.PreStart {
		used = append(used, h.Image)
		for _, v := range h.Volumes {
			if v.Type == types.VolumeTypeImage {
				used = append(used, v.Source)
			}
		}
	}
	for _, ref := range slices.Concat(written, used) {
		if hasVariable(ref) {
			l.add(Error, "compose_image_variable", name, "write the image reference out",
				"an image that it uses is decided by a variable (%s), whose value is not measured", ref)
		}
		// The name of a service stands for that service's image.
		if _, service := p.Services[ref]; ref != "" && !service {
			images[ref] = true
		}
	}
}

func list(v any) []any { l, _ := v.([]any); return l }

func imageName(service string) string { return strings.ToLower(strings.ReplaceAll(service, "_", "-")) }

// hasVariable reports an interpolation; $$ is an escaped dollar.
func hasVariable(s string) bool { return strings.Contains(strings.ReplaceAll(s, "$$", ""), "$") }

// rules are how findings of package mutable are called here, and what to do.
var rules = map[mutable.Rule]struct{ code, fix string }{
	mutable.Privileged:   {"compose_privileged", "remove privileged:, and add only the capabilities it needs with cap_add:"},
	mutable.Capability:   {"compose_privileged", "remove the capability"},
	mutable.EngineSocket: {"compose_docker_socket", "remove the mount of the engine's socket: whoever has it can start any image, privileged, none of which is measured"},
	mutable.HostPID:      {"compose_host_pid", "remove pid: host"},
	mutable.HostNetwork:  {"compose_host_network", "publish the ports it needs with ports:"},
	mutable.Namespace:    {"compose_host_namespace", "remove it"},
	mutable.Unconfined:   {"compose_unconfined", "remove it from security_opt:"},
	mutable.Device:       {"compose_device", "remove it; a GPU is asked for with gpus: or deploy.resources.reservations.devices"},
	mutable.HostPath:     {"compose_host_path", "use a named volume for data; for the agent, mount /var/run/dstack.sock"},
	mutable.Runtime:      {"compose_runtime", "remove it"},
	mutable.Unreadable:   {"compose_unreadable", "write the compose file in a simpler way"},
}

// mutable adds what lets a container change what runs.
func (l *linter) mutable(data []byte) {
	level := Error
	if l.opt.AllowMutable {
		level = Warning
	}
	for _, f := range mutable.Scan(data) {
		// What comes from outside was refused, or has a finding of its own.
		if r, ok := rules[f.Rule]; ok {
			l.add(level, r.code, f.Service, r.fix, "%s, and could change what runs", f.What)
		}
	}
}

func (l *linter) volume(name string, v types.ServiceVolumeConfig) {
	if v.Type != types.VolumeTypeBind {
		return
	}
	l.bind(name, v.Source)
}

// agentSocket reports a path that the guest has for apps to mount.
func agentSocket(path string) bool {
	switch strings.TrimPrefix(strings.TrimRight(path, "/"), "/var") {
	case "/run/dstack.sock", "/run/tappd.sock", "/run/dstack", "/run/dstack/dstack.sock":
		return true
	}
	return false
}

func (l *linter) bind(name, source string) {
	switch {
	case agentSocket(source):
	case !strings.HasPrefix(source, "/"):
		l.add(Error, "compose_bind_mount", name, "use a named volume for data, put files into the image, or use configs: with content:",
			"mounts %q from beside the compose file: that directory does not exist inside the confidential VM", source)
	case mutable.PathRule(source) == "": // else it has a finding
		l.add(Warning, "compose_bind_mount", name, "use a named volume",
			"mounts %s of the guest's own file system, where nothing of yours is, and which is not kept across restarts", source)
	}
}

// namedVolumes finds bind mounts and outside storage behind volume names.
func (l *linter) namedVolumes(p *types.Project) {
	for _, name := range slices.Sorted(maps.Keys(p.Volumes)) {
		v := p.Volumes[name]
		if bool(v.External) {
			l.add(Error, "compose_external_volume", "", "remove external: true", "the volume %s is external: a new confidential VM has no volume to find", name)
		}
		if o := v.DriverOpts["o"]; slices.Contains(strings.Split(o, ","), "bind") {
			l.bind("", v.DriverOpts["device"])
		}
		switch v.DriverOpts["type"] {
		case "nfs", "nfs4", "cifs":
			l.add(Warning, "compose_network_volume", "", "use a plain named volume, which lies on the encrypted disk",
				"the volume %s lies on a network server (%s), outside of the confidential VM and not encrypted", name, v.DriverOpts["type"])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.Networks)) {
		if bool(p.Networks[name].External) {
			l.add(Error, "compose_external_network", "", "remove external: true", "the network %s is external: a new confidential VM has no network to find", name)
		}
	}
}

func (l *linter) port(name string, p types.ServicePortConfig) []Port {
	port := Port{Service: name, HostIP: p.HostIP, Protocol: p.Protocol}
	if port.Protocol == "" {
		port.Protocol = "tcp"
	}
	if p.Target == 0 || p.Target > 65535 {
		l.add(Error, "compose_port", name, "write a port from 1 to 65535", "the container port %d is none", p.Target)
		return nil
	}
	port.Target = uint16(p.Target)
	from, to, isRange := strings.Cut(p.Published, "-")
	if p.Published == "" {
		l.add(Warning, "compose_port_random", name, fmt.Sprintf(`write "%d:%d"`, p.Target, p.Target),
			"publishes container port %d on a random port, which no one outside can know", p.Target)
		return []Port{port}
	}
	n, err := strconv.ParseUint(from, 10, 16)
	if err != nil || n == 0 || isRange {
		l.add(Error, "compose_port", name, "write one port from 1 to 65535", "the published port %q is not one port (%s)", p.Published, to)
		return nil
	}
	port.Published = uint16(n)
	if strings.HasPrefix(p.HostIP, "127.") || p.HostIP == "::1" {
		l.add(Warning, "compose_port_loopback", name, fmt.Sprintf(`write "%d:%d"`, n, p.Target),
			"publishes port %d on the guest's loopback only: nothing outside the guest can reach it", n)
	}
	return []Port{port}
}

// conflicts finds two services that publish the same port.
func (l *linter) conflicts() {
	type key struct {
		port  uint16
		proto string
	}
	first := map[key]Port{}
	for _, p := range l.out.Ports {
		k := key{p.Published, p.Protocol}
		if q, ok := first[k]; ok && p.Published != 0 && (p.HostIP == q.HostIP || p.HostIP == "" || q.HostIP == "") {
			l.add(Error, "compose_port_conflict", p.Service, "publish one of them on another port", "publishes port %d/%s, as service %s does", p.Published, p.Protocol, q.Service)
			continue
		}
		first[k] = p
	}
	for _, p := range l.out.Ports {
		if p.Published == agentPort && p.Protocol == "tcp" {
			l.add(Error, "compose_port_conflict", p.Service, "publish it on another port", "publishes port %d, on which the guest agent answers", agentPort)
		}
		if p.Published == manifest.TLSPort && p.Protocol == "tcp" {
			l.add(Error, "compose_port_conflict", p.Service, "publish it on another port", "publishes port %d, at which the guest agent ends TLS for gateways", manifest.TLSPort)
		}
	}
}

// agentPort is where the guest agent answers the outside (guest-agent.md).
const agentPort = 8090
