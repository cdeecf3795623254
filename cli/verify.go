// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/osimage"
	"github.com/dstack-go/dstack/verifier"
)

type verifyCmd struct {
	Source string `arg:"" help:"URL of a running app's agent, host:port that serves an RA-TLS certificate, or a file: evidence of any kind, binary, hex or base64 ('-' for standard input)."`

	Tee      string `help:"What the file is, when looking at it does not tell: tdx, sev-snp, cca, tpm, nitro, nitro-tpm, or dstack (a container or reply)." enum:",tdx,sev-snp,cca,tpm,nitro,nitro-tpm,dstack" default:"" placeholder:"KIND"`
	EventLog string `name:"event-log" help:"Event log that belongs to a bare quote: JSON, or a binary CCEL." placeholder:"FILE"`

	GPUEvidence string `name:"gpu-evidence" help:"What NVIDIA's verifier printed in the guest at boot, byte for byte." placeholder:"FILE"`

	Lock        string `help:"dstack.lock.json that deploy wrote: workload, image and registers to expect." placeholder:"FILE"`
	Compose     string `help:"app-compose.json to expect, byte for byte." placeholder:"FILE"`
	ComposeHash string `help:"SHA-256 of the app-compose.json to expect." placeholder:"HEX"`
	AppID       string `name:"app-id" help:"App id to expect. It does not pin what runs: give a compose hash as well." placeholder:"HEX"`
	InstanceID  string `name:"instance-id" help:"Instance to expect." placeholder:"HEX"`
	Image       string `help:"OS image release directory to expect; its registers are computed from its files." placeholder:"DIR"`
	OSImageHash string `name:"os-image-hash" help:"OS image hash to expect." placeholder:"HEX"`

	AllowGatewayTermination bool   `name:"allow-gateway-termination" help:"Accept a gateway that ends TLS, and so sees plaintext, if its own evidence is that of the gateway expected."`
	GatewayLock             string `name:"gateway-lock" help:"dstack.lock.json of that gateway. By default it is the one that the app's own manifest names (gateway_policy)." placeholder:"FILE"`
	GatewayComposeHash      string `name:"gateway-compose-hash" help:"SHA-256 of that gateway's app-compose.json." placeholder:"HEX"`
	GatewayAppID            string `name:"gateway-app-id" help:"App id of that gateway. It does not pin what runs: give a compose hash as well." placeholder:"HEX"`

	ReportData  string   `help:"Report data to expect, instead of the nonce's envelope (saved evidence)." placeholder:"HEX"`
	Nonce       string   `help:"Nonce to send, or that saved evidence must answer; random by default." placeholder:"HEX"`
	Policy      string   `help:"What to accept: a policy in TOML or JSON (docs/policy.md), or signature-only." placeholder:"FILE"`
	At          string   `help:"Time at which to verify, RFC 3339; now by default." placeholder:"TIME"`
	DevRoots    string   `help:"Accept the public roots of a development TEE for this run: trust is then development." placeholder:"FILE"`
	TrustAnchor []string `name:"trust-anchor" help:"Public key of an Arm CCA platform (PEM or JWK) that you vouch for: trust is then caller." placeholder:"FILE"`

	verifyChainFlags

	Collateral string `help:"Collateral: a directory of certificates and CRLs (DER or PEM, any names), or a JSON bundle; instead of fetching or of what the evidence carries. Public keys in a directory are taken as --trust-anchor takes them." placeholder:"DIR|FILE"`
	Offline    bool   `help:"Fetch nothing."`
	PCCS       string `name:"pccs" help:"Where to fetch TDX collateral: Intel's service, or a cache of it." placeholder:"URL"`
	KDS        string `name:"kds" help:"Where to fetch SEV-SNP certificates: AMD's service, or a cache of it." placeholder:"URL"`
	Save       string `help:"Write the evidence to a file, to be verified again or by others." placeholder:"FILE"`
	SaveBundle string `name:"save-bundle" help:"Write evidence and collateral to one file, to be verified offline." placeholder:"FILE"`
}

func (c *verifyCmd) Run(a *app) error {
	at := time.Now().UTC()
	if c.At != "" {
		t, err := time.Parse(time.RFC3339, c.At)
		if err != nil {
			return usage("--at must be a time such as 2026-01-31T12:00:00Z")
		}
		at = t.UTC()
	}
	req := verifier.Request{At: at, Roots: verifier.VendorRoots()}
	pol, err := c.policy()
	if err != nil {
		return err
	}
	req.Policy = *pol
	if c.AllowGatewayTermination {
		req.Policy.Gateway.AllowTermination = true
	}
	if req.Freshness.Nonce, err = c.nonce(); err != nil {
		return err
	}
	if c.ReportData != "" {
		if req.Freshness.ReportData, err = hex.DecodeString(c.ReportData); err != nil || len(req.Freshness.ReportData) > dstack.ReportDataSize {
			return usage("--report-data must be up to 128 hexadecimal digits")
		}
	}
	dev, err := c.anchors(&req)
	if err != nil {
		return err
	}

	raw, src, err := c.obtain(a, &req)
	if err != nil {
		return err
	}
	if src == nil { // obtained, and not evidence
		return a.verdict(verifier.Refuse(raw.err, pol.Scope, at))
	}
	req.Source = *src
	l, err := c.reference(&req.Reference, src)
	if err != nil {
		return err
	}
	contracts, governed, err := c.source(l)
	if err != nil {
		return err
	}
	if _, err := expect(&req.Gateway, "--gateway-", c.GatewayLock, c.GatewayComposeHash, c.GatewayAppID); err != nil {
		return err
	}
	if err := c.given(a, &req, dev); err != nil {
		return err
	}
	verdict, err := c.appraise(a, &req)
	if err != nil {
		return err
	}
	switch {
	case !governed:
	case c.Offline:
		a.step("the contract %s is not asked: --offline", contracts.Registry.Hex())
	default:
		if req.Governance, err = c.governed(a, contracts, verdict); err != nil {
			return err
		}
		if req.Governance != nil {
			verdict = verifier.Appraise(req)
		}
	}
	if c.SaveBundle != "" {
		col := req.Collateral
		if col == nil {
			col = src.Collateral
		}
		if err := saveBundle(c.SaveBundle, raw.data, col); err != nil {
			return err
		}
	}
	return a.verdict(verdict)
}

// appraise judges, fetching collateral when that is all that is lacking.
func (c *verifyCmd) appraise(a *app, req *verifier.Request) (*verifier.Verdict, error) {
	floors, err := c.floors()
	if err != nil {
		return nil, err
	}
	gateway := req.Source.Gateway
	for _, hop := range []struct {
		src *verifier.Source
		pol *uint32
	}{{&req.Source, &req.Policy.Floor}, {gateway, &req.Policy.Gateway.Floor}} {
		if floors == nil || hop.src == nil {
			continue
		}
		if want, ok, err := verifier.CollateralFor(hop.src); err == nil && ok && want.FMSPC+want.Product != "" {
			least, err := floors.Floor(want.FMSPC + want.Product)
			if err != nil {
				return nil, err
			}
			*hop.pol = uint32(min(least, math.MaxUint32))
		}
	}
	carried, ofGateway := req.Source.Collateral, (*collateral.Bundle)(nil)
	if gateway != nil {
		ofGateway = gateway.Collateral
	}
	if !c.Offline {
		req.Source.Collateral = nil // what is fetched comes first
		if gateway != nil {
			gateway.Collateral = nil
		}
	}
	v := verifier.Appraise(*req)
	if !c.Offline && lacks(v) {
		given := req.Collateral
		// Twice: what a cache had may be bad or replaced, and is then asked for anew.
		for range 2 {
			got, err := c.fetch(a, &req.Source)
			if err != nil || got == nil {
				if err != nil {
					a.step("no collateral could be fetched: %v", err)
				}
				break
			}
			req.Collateral = got.bundle
			req.Collateral.Add(given)
			forget := got.forget
			if gateway != nil {
				of, err := c.fetch(a, gateway)
				if err != nil {
					a.step("no collateral of the gateway could be fetched: %v", err)
				} else if of != nil {
					req.GatewayCollateral = of.bundle
					req.GatewayCollateral.Add(given)
					forget = func() { got.forget(); of.forget() }
				}
			}
			v = verifier.Appraise(*req)
			if v.Signature == verifier.SignatureValid && (gateway == nil || !lacks(v)) && !v.Has(verifier.Error, "collateral_rollback") {
				break
			}
			forget()
		}
		if lacks(v) && (carried != nil || ofGateway != nil) && req.Collateral == nil {
			a.step("use the collateral that the evidence carries")
			req.Source.Collateral = carried
			if gateway != nil {
				gateway.Collateral = ofGateway
			}
			v = verifier.Appraise(*req)
		}
	}
	seen := floors != nil && v.Signature == verifier.SignatureValid && v.Trust == dstack.TrustProduction && v.Platform.TCBEvaluation > req.Policy.Floor
	if seen {
		if err := floors.Raise(a.ctx, v.Platform.Product, uint64(v.Platform.TCBEvaluation)); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// verdict prints one and turns it into an exit code.
func (a *app) verdict(v *verifier.Verdict) error {
	if a.json {
		if err := a.result(v); err != nil {
			return err
		}
	} else {
		a.printf("%s", v.String())
	}
	switch {
	case v.Accepted:
		return nil
	case v.Undecided:
		return exitError(exitUndecided)
	default:
		return exitError(exitFailed)
	}
}

func (c *verifyCmd) policy() (*verifier.Policy, error) {
	switch c.Policy {
	case "":
		p := verifier.DefaultPolicy()
		return &p, nil
	case "signature-only":
		p := verifier.SignaturePolicy()
		return &p, nil
	}
	raw, err := readLimited(c.Policy, 1<<20)
	if err != nil {
		return nil, err
	}
	if strings.EqualFold(filepath.Ext(c.Policy), ".toml") {
		var tree map[string]any
		if err := toml.Unmarshal(raw, &tree); err != nil {
			return nil, fault.Wrap(err, "policy_malformed", "%s is not TOML", c.Policy).WithFix("docs/policy.md lists the keys")
		}
		if raw, err = json.Marshal(tree); err != nil {
			return nil, fault.Wrap(err, "policy_malformed", "%s", c.Policy)
		}
	}
	return verifier.ParsePolicy(raw)
}

// anchors adds the roots that the caller vouches for. The collateral that comes
// with development roots is returned.
func (c *verifyCmd) anchors(req *verifier.Request) (*collateral.Bundle, error) {
	for _, path := range c.TrustAnchor {
		raw, err := readLimited(path, 1<<20)
		if err != nil {
			return nil, err
		}
		_, keys, err := collateral.FromFiles(map[string][]byte{path: raw})
		if err != nil {
			return nil, err
		}
		if len(keys) == 0 {
			return nil, fault.New("trust_anchor", "%s holds no public key", path).WithFix("give a PEM PUBLIC KEY or a JWK")
		}
		req.Roots = append(req.Roots, verifier.CallerKeys(keys))
	}
	if c.DevRoots == "" {
		return nil, nil
	}
	raw, err := readLimited(c.DevRoots, collateral.MaxBundle)
	if err != nil {
		return nil, err
	}
	dev, err := collateral.ParseDevRoots(raw)
	if err != nil {
		return nil, err
	}
	roots, err := verifier.DevelopmentRoots(dev)
	if err != nil {
		return nil, err
	}
	req.Roots = append(req.Roots, roots...)
	req.Policy.DevRoots = true
	return dev.Bundle(), nil
}

// obtained is what came from the source, before it was read.
type obtained struct {
	data []byte
	err  error
}

// obtain gets the evidence: from a URL, an RA-TLS endpoint or a file. A nil source
// without an error means that what came is no evidence; obtained.err says why.
func (c *verifyCmd) obtain(a *app, req *verifier.Request) (obtained, *verifier.Source, error) {
	var raw []byte
	var err error
	switch {
	case strings.HasPrefix(c.Source, "http://"), strings.HasPrefix(c.Source, "https://"):
		if c.Offline {
			return obtained{}, nil, usage("--offline verifies files: %s would have to be asked", c.Source)
		}
		a.step("ask %s with nonce %s…", c.Source, hex.EncodeToString(req.Freshness.Nonce)[:16])
		raw, req.Freshness.ConnectionSPKI, err = channel.FetchEvidence(a.ctx, c.Source, req.Freshness.Nonce)
		req.Policy.Evidence.RequireFresh = true
	case isHostPort(c.Source):
		if c.Offline {
			return obtained{}, nil, usage("--offline verifies files: %s would have to be asked", c.Source)
		}
		a.step("connect to %s for its RA-TLS certificate", c.Source)
		raw, req.Freshness.ConnectionSPKI, err = channel.FetchCertificate(a.ctx, c.Source)
		req.Freshness.Nonce = nil // a certificate answers none
	case c.Source == "-":
		raw, err = io.ReadAll(io.LimitReader(a.in, verifier.MaxSource+1))
	default:
		raw, err = readLimited(c.Source, verifier.MaxSource)
	}
	if err != nil {
		return obtained{}, nil, err
	}
	if c.Nonce == "" && req.Freshness.ConnectionSPKI == nil && !req.Policy.Evidence.RequireFresh {
		req.Freshness.Nonce = nil // nothing was asked of it now
	}
	if c.Save != "" {
		if err := os.WriteFile(c.Save, raw, 0o644); err != nil {
			return obtained{}, nil, fault.Wrap(err, "save", "save the evidence")
		}
	}
	src, err := verifier.ReadEvidence(raw, c.Tee)
	if err != nil {
		return obtained{err: err}, nil, nil
	}
	if c.EventLog != "" {
		text, err := readLimited(c.EventLog, 16<<20)
		if err != nil {
			return obtained{}, nil, err
		}
		events, err := verifier.ReadEventLog(text)
		if err == nil {
			err = src.AddEventLog(events)
		}
		if err != nil {
			return obtained{err: err}, nil, nil
		}
	}
	if c.GPUEvidence != "" {
		if src.GPU, err = readLimited(c.GPUEvidence, 1<<20); err != nil {
			return obtained{}, nil, err
		}
	}
	return obtained{data: raw}, src, nil
}

// isHostPort tells an address from the name of a file.
func isHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || port == "" || strings.ContainsAny(s, `/\`) {
		return false
	}
	_, err = os.Lstat(s)
	return errors.Is(err, fs.ErrNotExist)
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

// reference collects what the caller expects, each value with where it came from, and
// returns the lock if there is one.
func (c *verifyCmd) reference(ref *verifier.Reference, src *verifier.Source) (*lock.Lock, error) {
	named, err := expect(ref, "--", c.Lock, c.ComposeHash, c.AppID)
	if err != nil {
		return nil, err
	}
	if c.Compose != "" {
		raw, err := readLimited(c.Compose, 10<<20)
		if err != nil {
			return nil, err
		}
		ref.AddManifest(raw, "--compose "+c.Compose)
	}
	if c.InstanceID != "" {
		id, err := dstack.ParseInstanceID(c.InstanceID)
		if err != nil {
			return nil, usage("--instance-id: %v", err)
		}
		ref.AddInstanceID(id, "--instance-id")
	}
	if c.OSImageHash != "" {
		h, err := dstack.ParseImageHash(c.OSImageHash)
		if err != nil {
			return nil, usage("--os-image-hash: %v", err)
		}
		ref.AddImageHash(h, "--os-image-hash")
	}
	if c.Image != "" {
		img, err := osimage.Load(c.Image)
		if err != nil {
			return nil, err
		}
		vm, err := src.VMConfig()
		if err != nil {
			return nil, err
		}
		m, err := measureImage(img, vm)
		if err != nil {
			return nil, err
		}
		ref.AddImage(img.Hash, m, "--image "+c.Image)
		ref.DevImage, ref.Firmware, ref.OSEpoch = &img.Metadata.IsDev, img.Metadata.Firmware, &img.Metadata.SecurityEpoch
	}
	return named, nil
}

// expect adds what the flags of a prefix name; empty ones name nothing. It returns the
// lock if there is one.
func expect(ref *verifier.Reference, prefix, file, hash, app string) (named *lock.Lock, err error) {
	if file != "" {
		if named, err = lock.Read(file); err != nil {
			return nil, err
		}
		ref.AddLock(named, "lock file "+file)
	}
	if hash != "" {
		h, err := dstack.ParseComposeHash(hash)
		if err != nil {
			return nil, usage("%scompose-hash: %v", prefix, err)
		}
		ref.AddComposeHash(h, prefix+"compose-hash")
	}
	if app != "" {
		id, err := dstack.ParseAppID(app)
		if err != nil {
			return nil, usage("%sapp-id: %v", prefix, err)
		}
		ref.AddAppID(id, prefix+"app-id")
	}
	return named, nil
}

// measureImage computes the registers of an image on a VM of the given shape.
func measureImage(img *osimage.Image, vm measure.VMConfig) (*measure.TDX, error) {
	twoPass, err := vm.TwoPass()
	if err != nil {
		return nil, err
	}
	l := measure.Launch{Cmdline: img.Metadata.Cmdline, VCPUs: int(vm.CPUCount), MemoryBytes: vm.MemorySize, TwoPassAddPages: twoPass}
	if shape, err := vm.Shape(); err == nil {
		l.ACPI = &shape
	}
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
