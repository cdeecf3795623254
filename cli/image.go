// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dstack-go/dstack/image"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/osimage"
)

type imageCmd struct {
	Build  imageBuildCmd  `cmd:"" help:"Build an OS image; cached by the content of its inputs."`
	Ls     imageLsCmd     `cmd:"" help:"List the images of the stack."`
	Verify imageVerifyCmd `cmd:"" help:"Check every file of an image against its digests."`
	Lock   imageLockCmd   `cmd:"" help:"Refresh the lock of the image's inputs from the mirrors."`
}

type imageBuildCmd struct {
	Flavour     string `arg:"" optional:"" help:"${enum}. prod needs a real TEE; sim adds the simulated TEE's driver; debug adds a shell." enum:"prod,sim,debug" default:"sim"`
	Kernel      string `help:"${enum}. own is built from source, without modules; distribution is Debian's packaged cloud kernel with the modules that the guest needs." enum:"own,distribution" default:"own"`
	Source      string `help:"Source tree to build from; the one around the working directory by default." type:"existingdir" placeholder:"DIR"`
	Out         string `help:"Where the release directory goes; the build cache by default." placeholder:"DIR"`
	Check       bool   `help:"Build twice with another directory, umask, time zone and locale, and compare every byte."`
	CheckKernel bool   `help:"With --check, build the kernel twice as well (minutes)."`
}

func (c *imageBuildCmd) Run(a *app) error {
	source, err := sourceTree(c.Source)
	if err != nil {
		return err
	}
	opt := image.Options{Flavour: c.Flavour, Kernel: c.Kernel, Source: source, Out: c.Out, Log: a.err}
	if c.Check {
		if err := image.Check(a.ctx, opt, c.CheckKernel); err != nil {
			return err
		}
		a.step("two builds with another directory, umask, time zone and locale are the same, byte for byte")
	}
	res, err := image.Build(a.ctx, opt)
	if err != nil {
		return err
	}
	a.printf("Image      %s\nos_image_hash %s\nSize       %.1f MB compressed\nTime       %s\n", res.Dir, res.Hash, float64(res.CompressedBytes)/1e6, seconds(res.Elapsed))
	return a.result(map[string]any{"dir": res.Dir, "os_image_hash": res.Hash, "compressed_bytes": res.CompressedBytes, "seconds": res.Elapsed.Seconds()})
}

// buildImage builds, or takes from the cache, the image of a flavour.
func buildImage(a *app, flavour, source string) (string, error) {
	source, err := sourceTree(source)
	if err != nil {
		return "", err
	}
	a.step("build the %s image (the first time takes about as long as a kernel build)", flavour)
	began := time.Now()
	res, err := image.Build(a.ctx, image.Options{Flavour: flavour, Source: source, Log: a.err})
	if err != nil {
		return "", err
	}
	a.step("image %s, %.1f MB compressed, after %s", filepath.Base(res.Dir), float64(res.CompressedBytes)/1e6, seconds(time.Since(began)))
	return res.Dir, nil
}

// sourceTree finds the checkout of this project at or above dir.
func sourceTree(dir string) (string, error) {
	if dir == "" {
		var err error
		if dir, err = os.Getwd(); err != nil {
			return "", err
		}
	}
	for at := dir; ; at = filepath.Dir(at) {
		data, err := os.ReadFile(filepath.Join(at, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module github.com/dstack-go/dstack\n") {
			return at, nil
		}
		if at == filepath.Dir(at) {
			return "", fault.New("source_missing", "%s does not lie in a checkout of dstack, which the image is built from", dir).
				WithFix("run it inside the checkout, give --source, or `dstack up --image DIR` with a built image")
		}
	}
}

type imageLsCmd struct{}

func (c *imageLsCmd) Run(a *app) error {
	entries, err := os.ReadDir(a.stack.ImagesDir())
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	type row struct {
		Name    string `json:"name"`
		Version string `json:"version,omitempty"`
		Dev     bool   `json:"is_dev"`
		Hash    string `json:"os_image_hash,omitempty"`
		Scripts bool   `json:"scripts"`
		Error   string `json:"error,omitempty"`
	}
	rows := []row{}
	for _, e := range entries {
		if !e.IsDir() || strings.HasSuffix(e.Name(), ".new") {
			continue
		}
		r := row{Name: e.Name()}
		img, err := osimage.Load(filepath.Join(a.stack.ImagesDir(), e.Name()))
		if err != nil {
			r.Error = err.Error()
		} else {
			r.Version, r.Dev, r.Hash, r.Scripts = img.Metadata.Version, img.Metadata.IsDev, img.Hash.String(), img.Scripts.Size > 0
		}
		rows = append(rows, r)
	}
	if a.json {
		return a.result(rows)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tVERSION\tDEV\tSCRIPTS\tOS_IMAGE_HASH")
	for _, r := range rows {
		if r.Error != "" {
			fmt.Fprintf(w, "%s\tbroken: %s\n", r.Name, r.Error)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%s\n", r.Name, r.Version, r.Dev, r.Scripts, r.Hash)
	}
	return w.Flush()
}

type imageVerifyCmd struct {
	Dir string `arg:"" help:"Release directory, or the name of an image of the stack."`
}

func (c *imageVerifyCmd) Run(a *app) error {
	dir := c.Dir
	if !strings.Contains(dir, "/") {
		if _, err := os.Stat(filepath.Join(a.stack.ImagesDir(), dir)); err == nil {
			dir = filepath.Join(a.stack.ImagesDir(), dir)
		}
	}
	img, err := osimage.Load(dir)
	if err != nil {
		return err
	}
	if err := img.VerifyRootfs(); err != nil {
		return err
	}
	a.printf("%s is whole\nos_image_hash %s\nroot          %x\n", dir, img.Hash, img.RootHash)
	res := map[string]any{"dir": dir, "os_image_hash": img.Hash, "root_hash": hex.EncodeToString(img.RootHash[:]), "ok": true}
	if img.Scripts.Size > 0 {
		a.printf("scripts layer %x\n", img.Scripts.Hash)
		res["scripts_hash"] = hex.EncodeToString(img.Scripts.Hash[:])
	} else {
		a.printf("scripts layer none: manifests with scripts do not run on this image\n")
	}
	return a.result(res)
}

type imageLockCmd struct {
	Source string `help:"Source tree whose lock to refresh." type:"existingdir" placeholder:"DIR"`
}

func (c *imageLockCmd) Run(a *app) error {
	source, err := sourceTree(c.Source)
	if err != nil {
		return err
	}
	changes, err := image.Lock(a.ctx, image.Options{Source: source, Log: a.err})
	if err != nil {
		return err
	}
	for _, line := range changes {
		a.printf("%s\n", line)
	}
	return a.result(map[string]any{"changes": changes})
}
