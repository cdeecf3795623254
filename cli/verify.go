// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/verifier"
)

type verifyCmd struct {
	Source      string `arg:"" help:"URL of a running app's agent, or a file of saved evidence."`
	Lock        string `help:"dstack.lock.json that deploy wrote: workload, image and registers to expect." placeholder:"FILE"`
	Compose     string `help:"app-compose.json to expect, byte for byte." placeholder:"FILE"`
	ComposeHash string `help:"SHA-256 of the app-compose.json to expect." placeholder:"HEX"`
	AppID       string `name:"app-id" help:"App id to expect. It does not pin what runs: give a compose hash as well." placeholder:"HEX"`
	Image       string `help:"OS image release directory to expect; its registers are computed from its files." placeholder:"DIR"`
	OSImageHash string `name:"os-image-hash" help:"OS image hash to expect." placeholder:"HEX"`
	ReportData  string `help:"Report data to expect, instead of the nonce's envelope (saved evidence)." placeholder:"HEX"`
	Nonce       string `help:"Nonce to send, or that saved evidence must answer; random by default." placeholder:"HEX"`
	DevRoots    string `help:"Accept the public roots of a development TEE for this run: trust is then development." placeholder:"FILE"`
	Collateral  string `help:"Collateral for the quote (upstream's JSON), instead of what the evidence carries." placeholder:"FILE"`
	Save        string `help:"Write the evidence to a file, to be verified again or by others." placeholder:"FILE"`
}

func (c *verifyCmd) Run(a *app) error {
	at := time.Now().UTC()
	var (
		ref   verifier.Reference
		pol   = verifier.Policy{AcceptedTCB: []string{"UpToDate"}}
		fresh verifier.Freshness
		src   *verifier.Source
		err   error
	)
	if fresh.Nonce, err = c.nonce(); err != nil {
		return err
	}
	if c.ReportData != "" {
		rd, err := dstack.ParseReportData(c.ReportData)
		if err != nil {
			return usage("--report-data: %v", err)
		}
		fresh.ReportData = &rd
	}

	if strings.HasPrefix(c.Source, "http://") || strings.HasPrefix(c.Source, "https://") {
		a.step("ask %s with nonce %s…", c.Source, hex.EncodeToString(fresh.Nonce)[:16])
		raw, spki, err := channel.FetchEvidence(a.ctx, c.Source, fresh.Nonce)
		if err != nil {
			return err
		}
		fresh.ConnectionSPKI = spki
		pol.RequireFresh = true
		if c.Save != "" {
			if err := os.WriteFile(c.Save, raw, 0o644); err != nil {
				return fault.Wrap(err, "save", "save the evidence")
			}
		}
		if src, err = verifier.ParseSource(raw); err != nil {
			return err
		}
	} else {
		raw, err := readLimited(c.Source, 16<<20)
		if err != nil {
			return err
		}
		if src, err = verifier.ParseSource(raw); err != nil {
			return err
		}
		if c.Nonce == "" {
			fresh.Nonce = nil // nothing was asked of it now
		}
	}

	roots := []tdx.Roots{tdx.VendorRoots()}
	var col *collateral.TDX
	if c.DevRoots != "" {
		raw, err := readLimited(c.DevRoots, 4<<20)
		if err != nil {
			return err
		}
		dev, err := collateral.ParseDevRoots(raw)
		if err != nil {
			return err
		}
		devRoots, err := tdx.DevelopmentRoots(dev)
		if err != nil {
			return err
		}
		roots = append(roots, devRoots)
		col = &dev.TDX
		pol.DevRoots = true
	}
	if c.Collateral != "" {
		raw, err := readLimited(c.Collateral, 4<<20)
		if err != nil {
			return err
		}
		if col, err = collateral.ParseTDX(raw); err != nil {
			return err
		}
	}
	if err := c.reference(&ref, src); err != nil {
		return err
	}

	verdict := verifier.Appraise(*src, roots, col, ref, pol, fresh, at)
	if a.json {
		if err := a.result(verdict); err != nil {
			return err
		}
	} else {
		a.printf("%s", verdict.String())
	}
	switch {
	case verdict.Accepted:
		return nil
	case verdict.Undecided:
		return exitError(exitUndecided)
	default:
		return exitError(exitFailed)
	}
}

func (c *verifyCmd) nonce() ([]byte, error) {
	if c.Nonce == "" {
		b := make([]byte, 32)
		_, err := rand.Read(b)
		return b, err
	}
	b, err := hex.DecodeString(c.Nonce)
	if err != nil || len(b) < 16 || len(b) > 64 {
		return nil, usage("--nonce must be 32 to 128 hexadecimal digits")
	}
	return b, nil
}

// reference collects what the caller expects, each value with where it came from.
func (c *verifyCmd) reference(ref *verifier.Reference, src *verifier.Source) error {
	if c.Lock != "" {
		l, err := lock.Read(c.Lock)
		if err != nil {
			return err
		}
		ref.AddLock(l, "lock file "+c.Lock)
	}
	if c.ComposeHash != "" {
		h, err := dstack.ParseComposeHash(c.ComposeHash)
		if err != nil {
			return usage("--compose-hash: %v", err)
		}
		ref.AddComposeHash(h, "--compose-hash")
	}
	if c.Compose != "" {
		raw, err := readLimited(c.Compose, 10<<20)
		if err != nil {
			return err
		}
		ref.AddManifest(raw, "--compose "+c.Compose)
	}
	if c.AppID != "" {
		id, err := dstack.ParseAppID(c.AppID)
		if err != nil {
			return usage("--app-id: %v", err)
		}
		ref.AddAppID(id, "--app-id")
	}
	if c.OSImageHash != "" {
		h, err := dstack.ParseImageHash(c.OSImageHash)
		if err != nil {
			return usage("--os-image-hash: %v", err)
		}
		ref.AddImageHash(h, "--os-image-hash")
	}
	if c.Image != "" {
		img, err := osimage.Load(c.Image)
		if err != nil {
			return err
		}
		vm, err := src.VMConfig()
		if err != nil {
			return err
		}
		m, err := measureImage(img, vm)
		if err != nil {
			return err
		}
		ref.AddImage(img.Hash, m, "--image "+c.Image)
		ref.DevImage, ref.Firmware = &img.Metadata.IsDev, img.Metadata.Firmware
	}
	return nil
}

// measureImage computes the registers of an image on a VM of the given shape.
func measureImage(img *osimage.Image, vm measure.VMConfig) (*measure.TDX, error) {
	twoPass, err := vm.TwoPass()
	if err != nil {
		return nil, err
	}
	l := measure.Launch{Cmdline: img.Metadata.Cmdline, VCPUs: int(vm.CPUCount), MemoryBytes: vm.MemorySize, TwoPassAddPages: twoPass}
	for _, f := range []struct {
		path string
		into *[]byte
	}{{img.Firmware(), &l.Firmware}, {img.Kernel(), &l.Kernel}, {img.Initrd(), &l.Initrd}} {
		data, err := os.ReadFile(f.path)
		if err != nil {
			return nil, fault.Wrap(err, "image_missing", "read the image")
		}
		*f.into = data
	}
	return measure.ComputeTDX(l)
}

func usage(format string, args ...any) error { return fault.New("usage", format, args...) }

// readLimited reads a file that must not be larger than limit bytes.
func readLimited(path string, limit int64) ([]byte, error) {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New("file_missing", "%s does not exist", path).WithFix("give the path of a file that does")
	}
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fault.New("file_kind", "%s is not a regular file", path).WithFix("give the path of a file")
	}
	if st.Size() > limit {
		return nil, fault.New("file_too_large", "%s has %d bytes, the limit is %d", path, st.Size(), limit).WithFix("give the right file; none of its kind is that large")
	}
	return os.ReadFile(path)
}
