// SPDX-License-Identifier: Apache-2.0

package mutable

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

func corpus(t testing.TB) []txtar.File {
	t.Helper()
	a, err := txtar.ParseFile("testdata/corpus.txtar")
	if err != nil {
		t.Fatal(err)
	}
	return a.Files
}

func wanted(text []byte) (want []string) {
	for line := range strings.Lines(string(text)) {
		if w, ok := strings.CutPrefix(strings.TrimSpace(line), "# want: "); ok {
			want = append(want, w)
		}
	}
	slices.Sort(want)
	return want
}

func rules(findings []Finding) (got []string) {
	for _, f := range findings {
		service := f.Service
		if service == "" {
			service = "-"
		}
		got = append(got, fmt.Sprintf("%s %s", f.Rule, service))
	}
	slices.Sort(got)
	return got
}

// Ways by which a compose file gets around the image lock, each found (J02).
func TestThreat_J02_EveryWayAroundTheLockIsFound(t *testing.T) {
	files := corpus(t)
	if len(files) < 60 {
		t.Fatalf("%d compose files", len(files))
	}
	for _, f := range files {
		t.Run(f.Name, func(t *testing.T) {
			if diff := cmp.Diff(wanted(f.Data), rules(Scan(f.Data))); diff != "" {
				t.Errorf("-want +got:\n%s\n%s", diff, f.Data)
			}
		})
	}
}

func TestFileIsRead(t *testing.T) {
	f := Read([]byte("name: shop\nservices:\n  web:\n    image: a\n    pid: service:db\n    volumes_from: [db]\n    volumes: ['/var/run/dstack.sock:/x:ro', {type: bind, source: /run/tappd.sock, target: /y}, 'd:/d']\n  db: {image: b}\n"))
	want := &File{Name: "shop", Services: map[string]*Service{
		"db":  {},
		"web": {Mounts: []Mount{{"/run/dstack.sock", "/x", true}, {"/run/tappd.sock", "/y", false}, {"d", "/d", false}}, VolumesFrom: []string{"db"}, PID: []string{"service:db"}},
	}}
	if diff := cmp.Diff(want, f); diff != "" {
		t.Error(diff)
	}
}

// The work is bounded, and what was not looked at is not passed over in silence.
func TestHostileFilesAreUnreadable(t *testing.T) {
	chain := strings.Builder{}
	chain.WriteString("services:\n")
	for i := range 2000 {
		fmt.Fprintf(&chain, "  s%d: {image: a, extends: s%d}\n", i, i+1)
	}
	bomb := strings.Builder{}
	bomb.WriteString("x0: &a0 {privileged: true}\n")
	for i := 1; i < 30; i++ {
		fmt.Fprintf(&bomb, "x%d: &a%d\n  <<: [*a%d, *a%d]\n", i, i, i-1, i-1)
	}
	bomb.WriteString("services:\n  web:\n    <<: *a29\n")
	for name, text := range map[string]string{
		"too large":          "# " + strings.Repeat("x", maxSize),
		"a chain of extends": chain.String(),
		"an alias bomb":      bomb.String(),
		"a tab":              "services:\n\tweb: {}\n",
		"nested merges":      strings.Repeat("<<: {", 100) + strings.Repeat("}", 100),
		"an endless extends": "services: {web: {extends: web, privileged: true}}",
		"an endless alias":   "services: &s\n  web: *s\n",
	} {
		begin := time.Now()
		got := Scan([]byte(text))
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%s: took %s", name, took)
		}
		if name != "an endless alias" && len(got) == 0 {
			t.Errorf("%s: nothing found", name)
		}
	}
}

func TestValuesAreShortAndOnOneLine(t *testing.T) {
	for _, f := range Scan([]byte("services:\n  web:\n    devices: [\"/dev/" + strings.Repeat("x", 5000) + "\"]\n    runtime: \"a\\nb\\e[31m\"\n")) {
		if len(f.What) > 250 || strings.ContainsAny(f.What, "\n\x1b") {
			t.Errorf("%q", f.What)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, c := range corpus(f) {
		f.Add(c.Data)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, finding := range Read(text).Findings {
			if finding.Rule == "" || finding.What == "" {
				t.Fatalf("%+v", finding)
			}
		}
	})
}
