// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"path/filepath"
	"strings"
)

// scriptsName is the packed scripts layer within its part of the cache.
const scriptsName = "scripts.squashfs.verity"

// scripts assembles and packs the scripts layer (design.md §6): a root of its own
// with a shell and the programs that a manifest's scripts may use. The root has
// none of it; the guest mounts the layer only for a manifest that has scripts.
func (b *build) scripts(ctx context.Context, p *artifacts) (bool, error) {
	t, err := b.scriptsTree(p.pool)
	if err != nil {
		return false, err
	}
	if err := b.compareFileList("scripts", t); err != nil {
		return false, err
	}
	k, err := b.packKey(t)
	if err != nil {
		return false, err
	}
	var cached bool
	p.scripts, cached, err = b.layerPart("scripts", key(k), scriptsName, func(dir string) (layer, error) {
		return squash(ctx, t, b.compression(), filepath.Join(dir, scriptsName), b.vary)
	})
	return cached, err
}

func (b *build) scriptsTree(p *pool) (tree, error) {
	t := tree{}
	if err := b.skeleton(t); err != nil {
		return nil, err
	}
	if err := p.addScripts(t); err != nil {
		return nil, err
	}
	return t, p.closure(t)
}

// addScripts adds what the layer has of its own.
func (p *pool) addScripts(t tree) error {
	for name, text := range scriptsTexts {
		t.add(name, node{kind: file, mode: 0o644, data: []byte(text)})
	}
	if err := p.addFiles(t, scriptsFiles); err != nil {
		return err
	}
	for _, pkg := range scriptsPrograms {
		if err := p.addPrograms(t, pkg); err != nil {
			return err
		}
	}
	for name, target := range scriptsAliases {
		t.add(name, node{kind: hardlink, mode: 0o755, target: target})
	}
	for name, target := range scriptsLinks {
		t.add(name, node{kind: symlink, mode: 0o777, target: target})
	}
	// Not executable: a script that calls one where the guest mounted nothing over
	// it must fail, while an empty program would succeed.
	for _, name := range scriptsBinds {
		t.add(name, node{kind: file, mode: 0o644})
	}
	return nil
}

// addPrograms adds every program of a package.
func (p *pool) addPrograms(t tree, pkg string) error {
	var list []debianFile
	for name := range p.files {
		if of, file, _ := strings.Cut(name, ":"); of == pkg && strings.HasPrefix(file, "usr/bin/") {
			list = append(list, debianFile{pkg, file, file})
		}
	}
	if len(list) == 0 {
		// The error of a package without programs is that of one without the first.
		list = []debianFile{{pkg, "usr/bin/" + pkg, "usr/bin/" + pkg}}
	}
	return p.addFiles(t, list)
}
