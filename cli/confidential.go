// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/collateral/fetch"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/manifest/lock"
	"github.com/dstack-go/dstack/stack"
	"github.com/dstack-go/dstack/verifier"
)

// kmsImage is how the compose files of the stack's KMSs name their image.
const kmsImage = "dstack-kms:stack"

// kmsPort is where a KMS listens in its VM.
const kmsPort = 8000

// confidentialKMS runs the stack's KMSs as apps in CVMs: the first makes the root keys,
// each other one gets them from it, each once the policy allows what its own evidence
// shows. What runs already is left running; an interrupted call goes on where it was.
func confidentialKMS(a *app, replicas int) error {
	governor, err := a.stack.GovernanceKey()
	if err != nil {
		return err
	}
	var first *stack.KMSNode
	var roots string // of the simulated TEE
	if text, err := os.ReadFile(a.stack.DevRoots()); err == nil {
		roots = string(text)
	}
	for i := range replicas {
		name := kmsName(i)
		node, l, err := deployKMS(a, name, first, governor.Public().(ed25519.PublicKey), roots)
		if err != nil {
			return err
		}
		if err := admitKMS(a, *node, l, roots); err != nil {
			return err
		}
		a.step("wait for %s to have its root keys", name)
		if _, err := a.stack.AddNode(a.ctx, *node, 3*time.Minute); err != nil {
			return err
		}
		if first == nil {
			first = node
		}
	}
	return a.stack.AppraisedBy(roots)
}

func kmsName(i int) string { return "kms-" + strconv.Itoa(i) }

// deployKMS runs one KMS, unless it does already.
func deployKMS(a *app, name string, source *stack.KMSNode, governor ed25519.PublicKey, roots string) (*stack.KMSNode, *lock.Lock, error) {
	dir := filepath.Join(a.stack.Dir, "services", name)
	lockFile := filepath.Join(dir, "dstack.lock.json")
	if k, err := a.stack.Keys(); err == nil {
		for _, n := range k.Nodes {
			if n.Name == name {
				a.step("%s is there already", name)
				l, err := lock.Read(lockFile)
				return &n, l, err
			}
		}
	}
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	port, err := a.stack.KMSPort(name)
	if err != nil {
		return nil, nil, err
	}
	node := &stack.KMSNode{
		Name: name, VM: name, URL: "https://127.0.0.1:" + strconv.Itoa(port), GuestURL: "https://" + net.JoinHostPort(stack.GuestHost, strconv.Itoa(port)),
	}
	compose := filepath.Join(dir, "docker-compose.yaml")
	if err := durable.WriteFile(compose, []byte(kmsCompose(source, governor, roots)), 0o600); err != nil {
		return nil, nil, err
	}
	// Its own disk: sealed by a software TPM where the TEE is simulated, too.
	binary, provider := "dstack-kms-dev", manifest.KeyProviderTPM
	if roots == "" {
		binary, provider = "dstack-kms", manifest.KeyProviderNone
		a.step("%s %s keeps its root keys for one boot only: whatever stops its VM, another KMS, or a backup, must have them", a.paint(amber, "warning:"), name)
	}
	d := deployCmd{
		Compose: compose, Name: name, Disk: 4, Timeout: 10 * time.Minute,
		workload: workload{
			AppImage: map[string]string{kmsImage: filepath.Join(a.stack.Bin, binary)},
			Port:     []string{fmt.Sprintf("%d:%d", port, kmsPort)}, Lock: lockFile, KeyProvider: provider,
		},
	}
	if source != nil {
		d.AppID = source.AppID.String()
	}
	if vm, err := findVM(a, name); err == nil {
		// An attempt before this one deployed it, and did not see its keys.
		a.step("%s is deployed already (%s)", name, vm.Status)
	} else if fault.Code(err) != "app_unknown" {
		return nil, nil, err
	} else if err := d.Run(&app{ui: a.quiet(), ctx: a.ctx, stack: a.stack}); err != nil {
		return nil, nil, err
	}
	l, err := lock.Read(lockFile)
	if err != nil {
		return nil, nil, err
	}
	node.AppID = l.AppID
	return node, l, nil
}

// kmsCompose is the compose file of a KMS: everything that decides about its keys is in
// it, and so is measured.
func kmsCompose(source *stack.KMSNode, governor ed25519.PublicKey, roots string) string {
	onboard := `      DSTACK_KMS_CORE__ONBOARD__AUTO_BOOTSTRAP_DOMAIN: kms.dstack.localhost
`
	if source != nil {
		onboard = fmt.Sprintf(`      DSTACK_KMS_CORE__DOMAIN: kms.dstack.localhost
      DSTACK_KMS_CORE__ONBOARD__SOURCE_URL: %s
`, source.GuestURL)
	}
	if roots != "" {
		onboard += fmt.Sprintf("      DSTACK_KMS_CORE__ATTESTATION__DEV_ROOTS: %s\n", yamlQuote(roots))
	}
	return fmt.Sprintf(`# Written by dstack up --confidential-services.
services:
  kms:
    image: %s
    restart: always
    environment:
      DSTACK_KMS_RPC__PORT: "%d"
      DSTACK_KMS_CORE__DATA_DIR: /data/kms
      DSTACK_KMS_CORE__NAMES: localhost,127.0.0.1,%s
      DSTACK_KMS_CORE__REPLICATION: "true"
      DSTACK_KMS_CORE__AUTH_API__POLICY__KEYS: %x
      DSTACK_KMS_CORE__AUTH_API__POLICY__THRESHOLD: "1"
%s    volumes: ["data:/data", "/var/run/dstack.sock:/var/run/dstack.sock"]
    ports: ["%d:%d"]
volumes:
  data:
`, kmsImage, kmsPort, stack.GuestHost, governor, onboard, kmsPort, kmsPort)
}

// yamlQuote returns text as a YAML string that compose does not interpolate.
func yamlQuote(text string) string {
	out := []byte{'\''}
	for _, c := range []byte(text) {
		switch c {
		case '\'':
			out = append(out, "''"...)
		case '$':
			out = append(out, "$$"...)
		case '\n':
			// JSON that is indented means the same on one line.
			out = append(out, ' ')
		default:
			out = append(out, c)
		}
	}
	return string(append(out, '\''))
}

// admitKMS lets the policy name a KMS, on the machine that its own evidence shows, once
// that evidence is of exactly what was deployed.
func admitKMS(a *app, node stack.KMSNode, l *lock.Lock, roots string) error {
	a.step("check the evidence of %s", node.Name)
	shown, err := kmsEvidence(a.ctx, node, roots)
	if err != nil {
		return err
	}
	b := shown.Request.Boot
	if b.AppID != l.AppID || b.ComposeHash != l.ComposeHash || hex.EncodeToString(b.OSImageHash) != l.OSImageHash.String() || !shown.Request.ImageBound {
		return fault.New("kms_evidence", "what answers at %s is not the KMS that was deployed", node.URL).WithFix("remove it with `dstack rm --force %s`, and run `dstack up` again", node.Name)
	}
	return a.stack.Govern(a.ctx, func(d *policy.Document) (*policy.Document, error) {
		next, err := d.AllowImage(policy.Image{Hash: l.OSImageHash, Name: l.Image, Dev: roots != "", Epoch: 0})
		if err != nil {
			return nil, err
		}
		return next.AllowKMS(policy.Member{AppID: &l.AppID, ComposeHash: &l.ComposeHash, OSImageHash: &l.OSImageHash}, b.DeviceID)
	}, node)
}

// kmsEvidence verifies what a KMS shows in its certificate, which it has from its start.
func kmsEvidence(ctx context.Context, node stack.KMSNode, roots string) (*applicant.Applicant, error) {
	u, err := url.Parse(node.URL)
	if err != nil {
		return nil, err
	}
	var der, spki []byte
	for deadline := time.Now().Add(3 * time.Minute); ; {
		if der, spki, err = channel.FetchCertificate(ctx, u.Host); err == nil {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, err
		}
		time.Sleep(500 * time.Millisecond)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	shown, err := ratls.FromCertificate(cert)
	if err != nil {
		return nil, err
	}
	judge, err := judgeOf(roots)
	if err != nil {
		return nil, err
	}
	return judge.Judge(ctx, applicant.Evidence{Container: shown.Container, ReportData: ratls.ReportData(spki)})
}

// judgeOf verifies evidence of the stack's TEE.
func judgeOf(roots string) (*applicant.Judge, error) {
	if roots == "" {
		pcs, err := fetch.NewPCS(fetch.PCSOptions{})
		if err != nil {
			return nil, err
		}
		kds, err := fetch.NewKDS(fetch.KDSOptions{})
		if err != nil {
			return nil, err
		}
		return &applicant.Judge{Roots: verifier.VendorRoots(), Collateral: fetch.Vendors{PCS: pcs, KDS: kds}}, nil
	}
	d, err := collateral.ParseDevRoots([]byte(roots))
	if err != nil {
		return nil, err
	}
	list, err := verifier.DevelopmentRoots(d)
	if err != nil {
		return nil, err
	}
	return &applicant.Judge{Roots: list, Development: true, Collateral: collateral.Static{Bundle: d.Bundle()}}, nil
}

// quiet is the same tool without results: a step of a larger one.
func (u *ui) quiet() *ui {
	return &ui{in: u.in, out: u.err, err: u.err, json: false, tty: u.tty}
}
