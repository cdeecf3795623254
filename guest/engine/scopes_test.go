// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

func scoped(names ...string) map[string][]string {
	out := map[string][]string{}
	for _, n := range names {
		out[n] = []string{n + "/"}
	}
	return out
}

// mounts returns "source target" of a service as the engine's compose merged it.
func mounts(out map[string]any, service string) (list []string) {
	volumes, _ := member(out, "services", service, "volumes").([]any)
	for _, v := range volumes {
		text := fmt.Sprint(member(v, "source"), " ", member(v, "target"))
		if member(v, "read_only") == true {
			text += " ro"
		}
		list = append(list, text)
	}
	slices.Sort(list)
	return list
}

// The engine's own compose, with the override merged, mounts a scoped service's own
// socket wherever the file has the agent's, and leaves everything else alone.
func TestThreat_J06_ScopedServicesMountTheirOwnSocket(t *testing.T) {
	const text = `
x-socket: &socket ["/var/run/dstack.sock:/var/run/dstack.sock"]
services:
  plain: {image: "a:1", volumes: *socket}
  short: {image: "a:1", volumes: *socket}
  long:
    image: a:1
    volumes:
      - {type: bind, source: /run/dstack.sock, target: /agent.sock, read_only: true, bind: {create_host_path: true, propagation: rshared}}
      - data:/data
      - /run/tappd.sock:/var/run/tappd.sock:ro
  directory: {image: "a:1", volumes: ["/var/run/dstack:/var/run/dstack", "/var/run/dstack/dstack.sock:/s"]}
  none: {image: "a:1", volumes: ["data:/data"]}
  bare: {image: "a:1"}
  extended: {image: "a:1", extends: {service: short}}
  spelled: {image: "a:1", volumes: ["/run/../run//dstack.sock:/var/run//dstack.sock"]}
  two: {image: "a:1", volumes: ["/run/dstack.sock:/a", "/run/dstack.sock:/b"]}
  profiled: {image: "a:1", profiles: [x], volumes: *socket}
  hooked: {image: "a:1", volumes: *socket, pre_start: [{image: "a:1", command: [x]}]}
volumes: {data: {}}
`
	scopes := scoped("short", "long", "directory", "none", "bare", "extended", "spelled", "two", "hooked")
	override, err := ScopeOverride(text, scopes)
	if err != nil {
		t.Fatal(err)
	}
	out := config(t, &Compose{Override: override, Env: map[string]string{"X": "x"}}, text)
	s := func(name string) string { return "/run/dstack/scopes/" + name }
	for name, want := range map[string][]string{
		"plain":     {"/var/run/dstack.sock /var/run/dstack.sock"},
		"short":     {s("short/dstack.sock") + " /var/run/dstack.sock"},
		"long":      {s("long/dstack.sock") + " /agent.sock ro", s("long/dstack.sock") + " /var/run/tappd.sock ro", "data /data"},
		"directory": {s("directory") + " /var/run/dstack", s("directory/dstack.sock") + " /s"},
		"none":      {s("none/dstack.sock") + " /var/run/dstack.sock", "data /data"},
		"bare":      {s("bare/dstack.sock") + " /var/run/dstack.sock"},
		"extended":  {s("extended/dstack.sock") + " /var/run/dstack.sock"},
		"spelled":   {s("spelled/dstack.sock") + " /var/run/dstack.sock"},
		"two":       {s("two/dstack.sock") + " /a", s("two/dstack.sock") + " /b"},
		"hooked":    {s("hooked/dstack.sock") + " /var/run/dstack.sock"},
	} {
		if got := mounts(out, name); !slices.Equal(got, want) {
			t.Errorf("%s mounts %q, want %q", name, got, want)
		}
	}
	for name := range scopes {
		text := fmt.Sprint(member(out, "services", name))
		for _, reach := range []string{"source:/run/dstack.sock", "source:/var/run/dstack", "tappd.sock target:/run"} {
			if strings.Contains(text, reach) {
				t.Errorf("%s still reaches a socket without a scope: %s", name, text)
			}
		}
	}
	if member(out, "name") != "dstack" {
		t.Errorf("the project is called %v", member(out, "name"))
	}
}

func TestThreat_J06_ScopesThatCanBeGotAroundAreRefused(t *testing.T) {
	web := func(lines string) string { return "services:\n  web:\n    image: a:1\n" + lines }
	for name, text := range map[string]string{
		"the directory of run":          web("    volumes: [\"/run:/r\"]\n"),
		"the directory of var run":      web("    volumes: [\"/var/run/:/r\"]\n"),
		"the root":                      web("    volumes: [\"/:/r\"]\n"),
		"the engine's socket":           web("    volumes: [\"/var/run/docker.sock:/s\"]\n"),
		"the engine's socket by option": web("    use_api_socket: true\n"),
		"another service's scope":       web("    volumes: [\"/run/dstack/scopes/db/dstack.sock:/s\"]\n"),
		"all scopes":                    web("    volumes: [\"/run/dstack/scopes:/s\"]\n"),
		"the host's door":               web("    volumes: [\"/run/dstack/guestapi.sock:/s\"]\n"),
		"privileges":                    web("    privileged: true\n"),
		"a capability":                  web("    cap_add: [SYS_PTRACE]\n"),
		"the guest's processes":         web("    pid: host\n"),
		"another service's processes":   web("    pid: \"service:db\"\n  db: {image: \"a:1\", volumes: [\"/run/dstack.sock:/s\"]}\n"),
		"volumes of another service":    web("    volumes_from: [db]\n  db: {image: \"a:1\", volumes: [\"/run/dstack.sock:/s\"]}\n"),
		"volumes of a container":        web("    volumes_from: [\"container:x\"]\n"),
		"a mount by a variable":         web("    volumes: [\"${V}:/s\"]\n"),
		"a target by a variable":        web("    volumes: [\"/run/dstack.sock:${T}\"]\n"),
		"a whole mount by a variable":   web("    volumes: [\"${V}\"]\n"),
		"a volume that is the socket":   web("    volumes: [\"s:/s\"]\n") + "volumes:\n  s: {driver_opts: {type: none, o: bind, device: /run/dstack.sock}}\n",
		"a config that is the socket":   web("    configs: [c]\n") + "configs:\n  c: {file: /var/run/dstack.sock}\n",
		"a secret that is the socket":   web("    secrets: [c]\n") + "secrets:\n  c: {file: ../run/dstack.sock}\n",
		"a container before it":         web("    pre_start: [{image: \"a:1\", command: [x], volumes: [\"/run/dstack.sock:/s\"]}]\n"),
		"privileges of what it extends": web("    extends: db\n  db: {image: \"a:1\", privileged: true}\n"),
		"a second document":             web("    tty: true\n") + "---\nservices:\n  web:\n    volumes: [\"/run:/r\"]\n",
		"devices":                       web("    devices: [\"/dev/vda:/dev/vda\"]\n"),
		"a target that merging misses":  web("    volumes: [{type: bind, source: /run/dstack.sock, target: /a//b/}]\n"),
		"an include":                    "include: [x.yaml]\n" + web("    tty: true\n"),
		"no YAML":                       web("    tty: [\n"),
	} {
		t.Run(name, func(t *testing.T) {
			if over, err := ScopeOverride(text, scoped("web")); fault.Code(err) != "scope_bypass" && !(name == "no YAML" && fault.Code(err) == "scope_service") {
				t.Fatalf("override %s, error %v", over, err)
			}
		})
	}
	for _, name := range []string{"db", "", "..", "a/b", "../web", "web\n"} {
		if _, err := ScopeOverride(web("    tty: true\n"), scoped(name)); fault.Code(err) != "scope_service" {
			t.Errorf("%q: %v", name, err)
		}
	}
	// A name that compose would take and that is a path.
	if _, err := ScopeOverride("services:\n  ..: {image: a}\n", scoped("..")); fault.Code(err) != "scope_service" {
		t.Error(err)
	}
	// Services without a scope may do what they did.
	if over, err := ScopeOverride(web("    tty: true\n  db: {image: \"a:1\", privileged: true, volumes: [\"/run/dstack.sock:/s\"]}\n"), scoped("web")); err != nil || strings.Contains(string(over), `"db"`) {
		t.Errorf("%s, %v", over, err)
	}
	if over, err := ScopeOverride(web("    privileged: true\n"), nil); over != nil || err != nil {
		t.Error(over, err)
	}
}
