// SPDX-License-Identifier: Apache-2.0

// Package modules loads the kernel modules that an image with the distribution's
// kernel brings, and then ends the loading of modules for good. An image with the
// project's own kernel has neither modules nor a list, and nothing is loaded.
//
// Guarantees: exactly the files of the list are loaded, in its order, from its
// directory; a module that the image holds to be necessary and that does not load
// ends the boot; after Seal no module enters the kernel until the next boot,
// whoever asks.
//
// It trusts the image: list and modules lie in the initramfs, which is measured, or
// in the root, which is read through verity. The list is checked in form all the
// same, so that a mistake of the builder is refused and not guessed at. Nothing here
// comes from the host (design.md §3).
package modules

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	// Dir holds modules and list, in the initramfs as in the root.
	Dir = "/usr/lib/modules"
	// ListName is the file of Dir that names the modules in the order of loading.
	ListName = "load.list"
)

// Limits of a list. The longest one of an image has about 60 lines.
const (
	maxList    = 32 << 10
	maxModules = 512
)

// A Module is one line of the list: the name of a file and, after a space, the word
// "optional" if it is the driver of hardware that the machine may not have.
type Module struct {
	File     string
	Optional bool
}

var fileRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.ko$`)

// Parse reads a list.
func Parse(text []byte) ([]Module, error) {
	bad := func(format string, args ...any) error {
		return fault.New("modules_list", "list of kernel modules: "+format, args...).WithFix("the image is broken: build it anew")
	}
	if len(text) > maxList {
		return nil, bad("%d bytes; at most %d are allowed", len(text), maxList)
	}
	if len(text) != 0 && text[len(text)-1] != '\n' {
		return nil, bad("the last line does not end")
	}
	var list []Module
	seen := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		file, word, more := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		switch {
		case !fileRE.MatchString(file):
			return nil, bad("line %d: %q is not the name of a module", len(list)+1, file)
		case more && word != "optional":
			return nil, bad("line %d: %q behind the name", len(list)+1, word)
		case seen[file]:
			return nil, bad("line %d: %s a second time", len(list)+1, file)
		case len(list) == maxModules:
			return nil, bad("more than %d modules", maxModules)
		}
		seen[file] = true
		list = append(list, Module{File: file, Optional: more})
	}
	return list, nil
}

// Load loads the modules that the list in dir names, and returns how many. Without
// a list there is nothing to load.
func Load(dir string) (int, error) { return load(dir, finit) }

func load(dir string, insert func(path string) error) (int, error) {
	text, err := readList(filepath.Join(dir, ListName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fault.Wrap(err, "modules_list", "read the list of kernel modules")
	}
	list, err := Parse(text)
	if err != nil {
		return 0, err
	}
	loaded := 0
	for _, m := range list {
		err := insert(filepath.Join(dir, m.File))
		switch {
		case err == nil:
			loaded++
		case m.Optional && errors.Is(err, unix.ENODEV):
		default:
			return loaded, fault.Wrap(err, "module_load", "load kernel module %s", m.File).WithFix("kernel and modules of the image do not match: build it anew")
		}
	}
	return loaded, nil
}

func readList(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxList+1))
}

func finit(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// Seal ends the loading of modules until the next boot. A kernel without the
// setting was built without modules.
func Seal(proc string) error {
	err := os.WriteFile(filepath.Join(proc, "sys/kernel/modules_disabled"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(fmt.Errorf("set kernel.modules_disabled: %w", err), "modules_seal", "end the loading of kernel modules")
	}
	return nil
}
