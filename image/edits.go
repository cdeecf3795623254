// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// edit changes a file of a module that the engine is built from. Edits put off work
// that a start of the engine does for a feature which the start does not use; what a
// program can do stays the same.
type edit struct {
	Module, File string
	Replace      [][2]string // old, which the file has once, and new
}

// engineEdits are all differences between the pinned modules and what is built.
var engineEdits = []edit{
	// BuildKit makes two certificate authorities with RSA keys of 2048 bits when
	// dockerd starts, for a proxy that only a build asking for it has. That was half of
	// dockerd's start, and of random length. Make them for the first such build.
	{"github.com/moby/buildkit", "util/network/proxyprovider/provider_linux.go", [][2]string{
		{"\tcertPEM, ca, key, err := newCA()\n\tif err != nil {\n\t\treturn nil, err\n\t}\n", ""},
		{"\t\tcaPEM:                certPEM,\n\t\tca:                   ca,\n\t\tcaKey:                key,\n", ""},
		{"\tcaPEM []byte\n", "\tcaOnce sync.Once\n\tcaErr  error\n\tcaPEM []byte\n"},
		{"(_ network.ProxyNamespace, retErr error) {\n",
			"(_ network.ProxyNamespace, retErr error) {\n" +
				"\tp.caOnce.Do(func() { p.caPEM, p.ca, p.caKey, p.caErr = newCA() })\n" +
				"\tif p.caErr != nil {\n\t\treturn nil, p.caErr\n\t}\n"},
	}},
	// The schemas of JSON Schema itself were compiled when any program of the engine
	// started, a quarter of its package initialisation; compose alone compiles a schema.
	{"github.com/santhosh-tekuri/jsonschema/v6", "draft.go", [][2]string{
		{"\t\"strings\"\n)", "\t\"strings\"\n\t\"sync\"\n)"},
		{"func init() {\n\tc := NewCompiler()\n", "var loadDrafts sync.Once\n\nfunc compileDrafts() {\n\tc := newCompiler()\n"},
	}},
	{"github.com/santhosh-tekuri/jsonschema/v6", "compiler.go", [][2]string{
		{"func NewCompiler() *Compiler {\n", "func NewCompiler() *Compiler {\n\tloadDrafts.Do(compileDrafts)\n\treturn newCompiler()\n}\n\nfunc newCompiler() *Compiler {\n"},
	}},
}

// apply returns the text with every replacement made. Text that is not there once
// is an error: the module is not the one that the edit was written for.
func (e edit) apply(text string) (string, error) {
	for _, r := range e.Replace {
		if n := strings.Count(text, r[0]); n != 1 {
			return "", fault.New("engine_edit", "%s of module %s has the text %q %d times, and an edit needs it once", e.File, e.Module, r[0], n).
				WithFix("the module changed: adapt engineEdits in image/edits.go")
		}
		text = strings.Replace(text, r[0], r[1], 1)
	}
	return text, nil
}

// editedSource copies the engine's module from src to dir, beside it the modules that
// are edited, and lets the former take the latter. The path of a replacement becomes
// part of a binary, hence the copy: from dir it is the same everywhere.
func (b *build) editedSource(ctx context.Context, src, dir string) error {
	if err := copySources(src, dir); err != nil {
		return err
	}
	var modules []string
	for _, e := range engineEdits {
		to := filepath.Join(dir, "edited", filepath.FromSlash(e.Module))
		if _, err := os.Stat(to); err != nil {
			from, err := b.moduleDir(ctx, src, e.Module)
			if err != nil {
				return err
			}
			if err := copySources(from, to); err != nil {
				return err
			}
			modules = append(modules, e.Module)
		}
		file := filepath.Join(to, filepath.FromSlash(e.File))
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		edited, err := e.apply(string(text))
		if err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(edited), 0o644); err != nil {
			return err
		}
	}
	mod, err := os.OpenFile(filepath.Join(dir, "go.mod"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer mod.Close()
	for _, m := range modules {
		if _, err := fmt.Fprintf(mod, "\nreplace %s => ./%s\n", m, path.Join("edited", m)); err != nil {
			return err
		}
	}
	return mod.Close()
}

// moduleDir returns where a module of the engine lies, fetched and verified by go.sum.
func (b *build) moduleDir(ctx context.Context, src, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", module)
	cmd.Dir, cmd.Env = src, buildEnv(b.vary.env)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fault.Wrap(err, "go_build", "fetch module %s: %s", module, lastLines(errs.String(), 4))
	}
	var found struct{ Dir string }
	if err := json.Unmarshal(out, &found); err != nil || found.Dir == "" {
		return "", fault.New("go_build", "go names no directory of module %s", module)
	}
	return found.Dir, nil
}
