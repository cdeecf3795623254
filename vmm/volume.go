// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// maxVolumes keeps the root bus of a VM within what its ACPI tables can describe.
const maxVolumes = 16

// volumeForm is the source of a volume: one component of a path, without what
// separates QEMU's options.
var volumeForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// attachments names the volumes that a manifest wants attached, in its order. A
// root hash that several targets share is attached once, from the source that comes
// first (vmm.md §6.4). What the guest mounts its manifest decides by the root hash;
// a wrong file is no more than a missing one.
//
// Codes: volume_limit, volume_name, volume_missing.
func (s *Server) attachments(m *manifest.Manifest) ([]string, error) {
	var out []string
	roots := map[[32]byte]bool{}
	for _, v := range m.VerityVolumes {
		if roots[v.Root] {
			continue
		}
		roots[v.Root] = true
		if _, err := s.volume(v.Source); err != nil {
			return nil, err
		}
		if !slices.Contains(out, v.Source) { // one file advertises one root
			out = append(out, v.Source)
		}
	}
	if len(out) > maxVolumes {
		return nil, fault.New("volume_limit", "the manifest has %d volumes, more than %d", len(out), maxVolumes).WithFix("put several into one image")
	}
	return out, nil
}

// volume returns the path of a volume's file. Links are followed, but not out of the
// directory.
func (s *Server) volume(name string) (string, error) {
	if !volumeForm.MatchString(name) {
		return "", fault.New("volume_name", "the volume source %.150q is not a plain file name", name).
			WithFix("use letters, digits, '_', '.' and '-', at most 128, beginning with a letter or digit")
	}
	missing := func(err error, why string) error {
		f := fault.New("volume_missing", "there is no volume %s in %s%s", name, s.config.CVM.VolumesDir, why)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			f = fault.Wrap(err, "volume_missing", "volume %s in %s", name, s.config.CVM.VolumesDir)
		}
		return f.WithFix("put the volume's image there, or deploy with --volume")
	}
	dir, err := filepath.EvalSymlinks(s.config.CVM.VolumesDir)
	if err != nil {
		return "", missing(err, "")
	}
	path, err := filepath.EvalSymlinks(filepath.Join(dir, name))
	if err != nil {
		return "", missing(err, "")
	}
	if !strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") {
		return "", missing(nil, ": it is a link to the outside")
	}
	if fi, err := os.Stat(path); err != nil || !fi.Mode().IsRegular() {
		return "", missing(err, ": it is not a regular file")
	}
	return path, nil
}
