// SPDX-License-Identifier: Apache-2.0

package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/csr"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/releaselog"
)

// kills is how often a real process is killed.
const kills = 20

// soak is a real program over one data directory, and what its clients saw of it.
type soak struct {
	*world
	bin  string
	dir  string
	port uint16
	root string // DER, once it was seen

	mu       sync.Mutex
	heads    []releaselog.Head
	receipts []*kmsapi.Release
	answers  int
	sequence uint64 // of the newest policy that a reply said is in force
}

func (s *soak) start() *process {
	s.t.Helper()
	roots, err := s.platform.DevRoots().Bytes()
	s.check(err)
	cmd := exec.Command(s.bin, "serve", "--log-level", "ERROR")
	cmd.Env = []string{
		"DSTACK_KMS_RPC__ADDRESS=127.0.0.1", fmt.Sprintf("DSTACK_KMS_RPC__PORT=%d", s.port), "DSTACK_KMS_CORE__DATA_DIR=" + s.dir,
		"DSTACK_KMS_CORE__ONBOARD__AUTO_BOOTSTRAP_DOMAIN=kms.test", "DSTACK_KMS_CORE__GUEST__SOCKET=",
		"DSTACK_KMS_CORE__ATTESTATION__DEV_ROOTS=" + string(roots),
		fmt.Sprintf("DSTACK_KMS_CORE__AUTH_API__POLICY__KEYS=%x", s.owner.Public()), "DSTACK_KMS_CORE__AUTH_API__POLICY__THRESHOLD=1",
		"DSTACK_KMS_CORE__AUTH_API__POLICY__FILE=" + string(s.first()), "DSTACK_KMS_CORE__LIMITS__LEASE=5m",
		"DSTACK_KMS_CORE__LIMITS__PEER_RATE=1000000", "DSTACK_KMS_CORE__LIMITS__APP_RATE=1000000",
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	s.check(err)
	s.check(cmd.Start())
	lines := make(chan string, 1)
	go func() {
		scan := bufio.NewScanner(out)
		for scan.Scan() {
			select {
			case lines <- scan.Text():
			default:
			}
		}
		close(lines)
	}()
	s.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return &process{cmd, lines}
}

type process struct {
	*exec.Cmd
	lines <-chan string
}

// serves waits until it does.
func (p *process) serves() error {
	select {
	case line := <-p.lines:
		if !strings.HasPrefix(line, "listening on ") {
			return fmt.Errorf("it said %q", line)
		}
		return nil
	case <-time.After(60 * time.Second):
		return fmt.Errorf("it does not serve")
	}
}

// first is the policy of the beginning, whatever is in force.
func (s *soak) first() []byte {
	was := s.doc
	defer func() { s.doc = was }()
	d := *was
	d.Sequence, d.KeyEpoch = 1, policy.KeyEpoch{}
	s.doc = &d
	return s.signed()
}

func (s *soak) kill(cmd *process) {
	s.t.Helper()
	s.check(cmd.Process.Signal(syscall.SIGKILL))
	cmd.Wait()
}

// saw remembers a head that a client was given.
func (s *soak) saw(wire *kmsapi.LogHead) {
	h, err := releaselog.VerifyHead(wire, []byte(s.root))
	if err != nil {
		s.t.Errorf("a head: %v", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heads = append(s.heads, h)
}

// guestClient is a client with evidence of an app's guest, under the temporary CA.
func (s *soak) guestClient(temp *kmsapi.GetTempCaCertResponse) *prpc.Client {
	s.t.Helper()
	key, evidence := ephemeralOf(s.world, &tdxtest.Guest{
		Platform: s.platform, AppID: app, InstanceID: dstack.InstanceID{7}, ComposeHash: good, Booting: true, Config: s.guest(1).Config,
	})
	ca, err := certificate.Open([]byte(temp.TempCaCert), []byte(temp.TempCaKey))
	s.check(err)
	der, err := ca.Issue(certificate.Leaf{Config: csr.Config{Subject: "x", ClientAuth: true}, Public: &key.PublicKey, Evidence: evidence}, time.Now())
	s.check(err)
	cfg, err := channel.Issued{FirstContact: true, Usage: ratls.UsageKMS, Certificate: &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}}.Config("kms.test")
	s.check(err)
	addr := net.JoinHostPort("127.0.0.1", itoa(s.port))
	tr := &http.Transport{TLSClientConfig: cfg, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &prpc.Client{BaseURL: "https://kms.test/prpc", HTTP: &http.Client{Transport: tr, Timeout: 20 * time.Second}}
}

// load asks until the process is gone.
func (s *soak) load(update bool) (stopped chan struct{}) {
	s.t.Helper()
	plain := s.clientOf(net.JoinHostPort("127.0.0.1", itoa(s.port)))
	temp, err := call[kmsapi.GetTempCaCertResponse](plain, "GetTempCaCert", nil)
	s.check(err)
	var wg sync.WaitGroup
	for range 2 {
		c := s.guestClient(temp)
		wg.Go(func() {
			for {
				r, err := call[kmsapi.AppKeyResponse](c, "GetAppKey", nil)
				if err != nil {
					return
				}
				s.saw(r.Release.Head)
				s.mu.Lock()
				s.receipts, s.answers = append(s.receipts, r.Release), s.answers+1
				s.mu.Unlock()
			}
		})
	}
	if update {
		wg.Go(func() {
			for {
				s.mu.Lock()
				s.doc.Sequence++
				// Each of them has the KMS erase an epoch, too.
				s.doc.KeyEpoch = policy.KeyEpoch{Current: s.doc.Sequence + 1, Oldest: s.doc.Sequence}
				next, signed := s.doc.Sequence, s.signed()
				s.mu.Unlock()
				if _, err := call[kmsapi.Policy](plain, "UpdatePolicy", &kmsapi.Policy{Signed: signed}); err != nil {
					return
				}
				s.mu.Lock()
				s.sequence = next
				s.mu.Unlock()
			}
		})
	}
	stopped = make(chan struct{})
	go func() { wg.Wait(); close(stopped) }()
	return stopped
}

// agrees checks that what serves now is what its clients knew.
func (s *soak) agrees() {
	s.t.Helper()
	c := s.clientOf(net.JoinHostPort("127.0.0.1", itoa(s.port)))
	meta, err := call[kmsapi.GetMetaResponse](c, "GetMeta", nil)
	s.check(err)
	cert, err := certificate.Parse([]byte(meta.CaCert))
	s.check(err)
	if s.root == "" {
		s.root = string(cert.RawSubjectPublicKeyInfo)
	}
	if string(cert.RawSubjectPublicKeyInfo) != s.root {
		s.t.Fatal("another root")
	}
	now, err := releaselog.VerifyHead(meta.LogHead, []byte(s.root))
	s.check(err)
	s.mu.Lock()
	defer s.mu.Unlock()
	sizes := map[uint64][][]byte{}
	for _, h := range s.heads {
		proof, asked := sizes[h.Size()]
		if !asked && h.Size() < now.Size() && h.Size() > 0 {
			r, err := call[kmsapi.LogConsistencyResponse](c, "GetLogConsistency", &kmsapi.LogConsistencyRequest{From: h.Size()})
			s.check(err)
			proof = r.Proof
			sizes[h.Size()] = proof
			if now, err = releaselog.VerifyHead(r.Head, []byte(s.root)); err != nil {
				s.t.Fatal(err)
			}
		}
		if err := releaselog.Compare(h, now, proof); err != nil {
			s.t.Fatalf("the log that a client saw with %d entries does not go on: %v", h.Size(), err)
		}
	}
	for _, r := range s.receipts {
		got, err := call[kmsapi.LogEntriesResponse](c, "GetLogEntries", &kmsapi.LogEntriesRequest{Start: r.Index, Count: 1})
		s.check(err)
		if len(got.Entries) != 1 || !bytes.Equal(got.Entries[0], r.Entry) {
			s.t.Fatalf("the entry %d of a grant is gone", r.Index)
		}
	}
	p, err := call[kmsapi.Policy](c, "GetPolicy", nil)
	s.check(err)
	text, err := policy.Bytes(p.Signed)
	s.check(err)
	doc, err := policy.Parse(text)
	s.check(err)
	if doc.Sequence < s.sequence {
		s.t.Fatalf("the policy %d was in force, and now it is %d", s.sequence, doc.Sequence)
	}
	// One that a kill cut off may be in force although nobody was told.
	s.doc.Sequence = max(s.doc.Sequence, doc.Sequence)
	s.doc.KeyEpoch = doc.KeyEpoch
	// Once compared, only the newest is worth comparing again.
	s.heads, s.receipts = []releaselog.Head{now}, nil
}

// TestSoakKMSKills kills a real KMS again and again, while it makes its keys, serves
// and takes policies: it starts again with the root that it had, and its log continues
// every head that a client ever saw.
func TestSoakKMSKills(t *testing.T) {
	if os.Getenv("DSTACK_SOAK") == "" {
		t.Skip("set DSTACK_SOAK=1")
	}
	bin := filepath.Join(t.TempDir(), "dstack-kms-dev")
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "dstack_sim", "-o", bin, "./cmd/dstack-kms")
	build.Dir = testkit.Root()
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	// The process has the machine's clock.
	issued, next, at := tdxtest.Issued, tdxtest.NextUpdate, tdxtest.At
	t.Cleanup(func() { tdxtest.Issued, tdxtest.NextUpdate, tdxtest.At = issued, next, at })
	now := time.Now().UTC().Truncate(time.Second)
	tdxtest.Issued, tdxtest.NextUpdate, tdxtest.At = now.AddDate(0, 0, -1), now.AddDate(0, 0, 1), now
	fresh := func() *soak {
		return &soak{world: newWorld(t), bin: bin, dir: filepath.Join(t.TempDir(), "data"), port: freePort(t)}
	}

	s := fresh()
	bootstraps, made, early := 0, 0, kills/2
	for i := range kills {
		if i < early { // while it makes its keys, each time in a new directory
			b := fresh()
			cmd := b.start()
			delay := time.Duration(rand.Int64N(int64(50 * time.Millisecond)))
			time.Sleep(delay)
			b.kill(cmd)
			bootstraps++
			had := ""
			if roots, err := custody.Open(onboard.RootFile(b.dir)); err == nil {
				had = string(roots.Identity().CA)
				roots.Wipe()
				made++
			}
			again := b.start()
			if err := again.serves(); err != nil {
				t.Fatalf("killed after %s, it does not start: %v", delay, err)
			}
			b.agrees()
			if had != "" && b.root != had {
				t.Fatalf("killed after %s, it made another root", delay)
			}
			b.kill(again)
			continue
		}
		cmd := s.start()
		if err := cmd.serves(); err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		s.agrees()
		stopped := s.load(i%2 == 0)
		time.Sleep(300*time.Millisecond + time.Duration(rand.Int64N(int64(500*time.Millisecond))))
		s.kill(cmd)
		<-stopped
	}
	cmd := s.start()
	if err := cmd.serves(); err != nil {
		t.Fatal(err)
	}
	s.agrees()
	s.kill(cmd)
	roots, err := custody.Open(onboard.RootFile(s.dir))
	if err != nil {
		t.Fatal(err)
	}
	defer roots.Wipe()
	if first, _ := roots.Epochs(); first < 2 || string(roots.Identity().CA) != s.root {
		t.Errorf("the root keys begin with epoch %d", first)
	}
	t.Logf("%d kills: %d while it made keys (%d of them with keys on the disk already), the rest after %d answers and policy %d", kills, bootstraps, made, s.answers, s.sequence)
	if s.answers == 0 || s.sequence == 0 {
		t.Error("nothing was asked")
	}
}
