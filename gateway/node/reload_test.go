// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/governance/applicant"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// rules is the file of a policy that gives routes.
type rules struct {
	l     *lab
	file  string
	owner ed25519.PrivateKey
	doc   *policy.Document
}

// rules makes a policy whose first document allows no app.
func (l *lab) rules() *rules {
	l.t.Helper()
	_, owner, err := ed25519.GenerateKey(rand.Reader)
	l.must(err)
	return &rules{l: l, file: filepath.Join(l.dir, "policy.json"), owner: owner}
}

// allow writes a document that allows an app beside those before.
func (r *rules) allow(h *host) {
	r.l.t.Helper()
	if r.doc == nil {
		raw, err := h.guest.Attest(r.l.t.Context(), dstack.ReportData{})
		r.l.must(err)
		j := applicant.Judge{Roots: []attest.Roots{r.l.platform.Roots()}, Development: true, Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: r.l.platform.Collateral()}}}
		who, err := j.Judge(r.l.t.Context(), applicant.Evidence{Container: raw})
		r.l.must(err)
		launch := map[string]policy.Register{}
		for _, name := range []string{"mrtd", "rtmr0", "rtmr1", "rtmr2"} {
			launch[name] = policy.Register(who.Request.Launch[name])
		}
		r.doc = policy.New(dstack.TrustDevelopment, time.Now(), 24*time.Hour)
		r.doc.OSImages = []policy.Image{{Hash: labImage, Dev: true, Epoch: 1, Launch: []map[string]policy.Register{launch}}}
		r.doc.Devices = policy.Devices{Any: true}
		r.doc.TCB = policy.TCB{Accept: []string{"UpToDate"}}
		r.doc.LeaseSeconds = 600
	} else {
		r.doc.Sequence++
	}
	r.doc.Apps = append(r.doc.Apps, policy.App{AppID: h.guest.AppID, ComposeHashes: []policy.Compose{{Hash: h.guest.ComposeHash}}})
	text, err := r.doc.Encode()
	r.l.must(err)
	text, err = policy.Sign(text, r.owner)
	r.l.must(err)
	r.l.must(durable.WriteFile(r.file, text, 0o600))
}

// SIGHUP to the program itself: it takes limits, times, the level of its log and the
// policy's file, says what needs a restart, and ends no connection.
func TestSIGHUPReadsTheConfigurationAgain(t *testing.T) {
	l := newLab(t)
	program := filepath.Join(l.dir, "dstack-gateway")
	build := exec.Command("go", "build", "-buildvcs=false", "-tags", "dstack_sim", "-o", program, "./cmd/dstack-gateway")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	g := l.gateway(nil)
	r := l.rules()
	configure := func(top, proxy string, replace ...string) {
		t.Helper()
		g.configure(fmt.Sprintf("[core.auth.policy]\nkeys = %q\nthreshold = 1\nfile = %q\n", hex.EncodeToString(r.owner.Public().(ed25519.PublicKey)), r.file))
		text, err := os.ReadFile(g.file())
		l.must(err)
		replace = append(replace, "\nport = 8000\n", "\nport = 8000\n"+top, "listen_port = 443\n", "listen_port = 443\n"+proxy, `type = "attested"`, `type = "policy"`)
		l.must(os.WriteFile(g.file(), []byte(strings.NewReplacer(replace...).Replace(string(text))), 0o600))
	}
	configure("", "")
	g.program = []string{program, "serve", "--config", g.file()}
	logged := func() string {
		text, err := os.ReadFile(g.said.Name())
		l.must(err)
		return string(text)
	}
	reload := func() string {
		t.Helper()
		before := len(logged())
		l.must(g.cmd.Process.Signal(syscall.SIGHUP))
		l.eventually("it has read the configuration", func() bool {
			said := logged()[before:]
			return strings.Contains(said, "was read again") || strings.Contains(said, "configuration is not taken")
		})
		return logged()[before:]
	}
	refused := func(why string) {
		t.Helper()
		l.eventually(why, func() bool { _, err := l.visit(g, "shop"); return err != nil })
	}

	// The first document allows the shop; the bar comes with the next.
	shop := l.instance(1, 1, "shop", g)
	r.allow(shop)
	g.start()
	l.reached(g, shop, "shop")
	begun := make(chan struct{}, 2)
	talk, cancel := context.WithCancel(t.Context())
	defer cancel()
	spoken := make(chan error, 1)
	go func() { spoken <- l.converse(talk, g, shop.guest.AppID.String(), begun) }()
	<-begun
	bar := l.instance(2, 1, "bar", g)
	l.eventually("the bar is refused", func() bool { return strings.Contains(logged(), "app_unknown") })
	if said := reload(); strings.Contains(said, "not taken") || strings.Contains(said, "not all") {
		t.Errorf("nothing had changed:\n%s", said)
	}
	if body, err := l.visit(g, bar.guest.AppID.String()); err == nil {
		t.Errorf("the bar is open: %q", body)
	}
	r.allow(bar)
	if said := reload(); strings.Contains(said, "not all") {
		t.Errorf("the policy:\n%s", said)
	}
	l.reached(g, bar, "bar")

	// Limits: the conversation is the shop's one connection.
	configure("", "max_connections_per_app = 1\n")
	reload()
	if _, err := l.visit(g, shop.guest.AppID.String()); err == nil {
		t.Error("a second connection where one is the most")
	}
	l.reached(g, bar, "bar")
	// What needs a restart is named, and the rest counts.
	configure("log_level = \"DEBUG\"\n", "access_log = true\n", `"`+labDomain+`"`, `"other.example"`, "\"netstack\"", "\"tun\"")
	if said := reload(); !strings.Contains(said, "code=gateway_restart") || !strings.Contains(said, "core.domains, core.wg.mode, core.proxy.access_log count") {
		t.Errorf("what needs a restart:\n%s", said)
	}
	l.reached(g, shop, "shop")
	if strings.Contains(logged(), "level=DEBUG") {
		t.Error("it was at DEBUG before")
	}
	refused("a name of nobody's")
	l.eventually("the log has its level", func() bool { return strings.Contains(logged(), "level=DEBUG") })
	// A file that is none, and a document that does not follow, change nothing.
	l.must(os.WriteFile(g.file(), []byte("[core\n"), 0o600))
	if said := reload(); !strings.Contains(said, "code=config_malformed") {
		t.Errorf("a broken file:\n%s", said)
	}
	l.reached(g, shop, "shop")
	configure("", "")
	r.doc.Apps, r.doc.Sequence = r.doc.Apps[:0], 0
	r.allow(shop)
	if said := reload(); !strings.Contains(said, "code=policy_rollback") {
		t.Errorf("an older policy:\n%s", said)
	}
	l.reached(g, bar, "bar")
	select {
	case err := <-spoken:
		t.Errorf("a connection ended: %v", err)
	default:
	}
	cancel()
	if err := <-spoken; err != nil {
		t.Error(err)
	}
	g.stop()
}

func TestThePartsTakeWhatChanges(t *testing.T) {
	c, err := load(t, good)
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{cfg: c, log: slog.New(slog.DiscardHandler), Level: new(slog.LevelVar), reloading: reloading{cfg: c}}
	n.Level.Set(slog.LevelWarn)
	n.reloading.begin(n.Level)
	for _, step := range []struct {
		text  string
		code  string
		level slog.Level
		idle  time.Duration
	}{
		{"log_level = \"DEBUG\"\n" + good + "[core.proxy.timeouts]\nidle = \"1m\"\n", "", slog.LevelDebug, time.Minute},
		{"port = 9000\n" + good + "[core.proxy.timeouts]\nidle = \"2m\"\n", "gateway_restart", slog.LevelWarn, 2 * time.Minute},
		{good, "", slog.LevelWarn, 0},
	} {
		c, err := load(t, step.text)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Reload(t.Context(), c); fault.Code(err) != step.code {
			t.Errorf("%v, want %q", err, step.code)
		}
		now := n.reloading.config()
		if n.Level.Level() != step.level || now.Core.Proxy.adjustable().Timeouts.Idle != step.idle || now.Port != 8000 {
			t.Errorf("%s, %+v", n.Level.Level(), now)
		}
	}
	if _, err := load(t, "log_level = \"LOUD\"\n"+good); fault.Code(err) != "gateway_config" {
		t.Error(err)
	}
}
