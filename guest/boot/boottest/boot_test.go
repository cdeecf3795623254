// SPDX-License-Identifier: Apache-2.0

package boottest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/hostlink"
	"github.com/dstack-go/dstack/hostshare"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// order is the boot of design.md §3 as the console shows it.
var order = []string{
	"hostlink", "mounts", "open-root", "entropy", "tee", "read-blob", "parse", "launch-events", "config-document",
	"firewall", "network", "time", "key-provider", "runtime-events", "data-disk", "release-log", "env", "channel-key", "system-ready",
	"ingress", "scripts", "engine", "images", "compose-up", "done",
}

// seen lists the phases that the console says went well, and the one that failed.
func (r *running) seen() (ok []string, failed string) {
	for line := range strings.Lines(r.console.String()) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] != "dstack:" || f[1] != "phase" {
			continue
		}
		if f[3] == "ok" {
			ok = append(ok, f[2])
		} else if f[3] == "FAILED" {
			failed = f[2] + " " + f[4]
		}
	}
	return ok, failed
}

// One boot shows the good case from the first phase to power off.
func TestABootFromFirstPhaseToPowerOff(t *testing.T) {
	b := setup(t)
	r := vm{draft: goodDraft(b, t)}.start(t, b)
	body, after := r.get(8080, 240*time.Second)
	if !strings.Contains(body, "hello from the boot test") {
		t.Errorf("the app answered %q", body)
	}
	t.Logf("first HTTP answer after %s, QEMU used %s of processor time", after.Round(time.Millisecond), r.cpu())
	for deadline := time.Now().Add(30 * time.Second); len(r.payloads("boot.timings")) == 0 && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
	}
	if ok, failed := r.seen(); !slices.Equal(ok, order) || failed != "" {
		t.Errorf("phases %v, failed %q", ok, failed)
	}
	var timings []struct {
		Name string
		MS   int64
	}
	if got := r.payloads("boot.timings"); len(got) != 1 || json.Unmarshal([]byte(got[0]), &timings) != nil || len(timings) != len(order) {
		t.Errorf("timings %q", got)
	}
	for _, e := range r.noted() {
		t.Logf("%8s cpu %7s %s %s", e.at.Round(time.Millisecond), e.cpu, e.name, e.payload)
	}
	progress := r.payloads("boot.progress")
	if len(progress) == 0 || progress[len(progress)-1] != "done" || len(r.payloads("boot.error")) != 0 {
		t.Errorf("progress %q, errors %q", progress, r.payloads("boot.error"))
	}
	if info := r.payloads("instance.info"); len(info) != 1 || !strings.Contains(info[0], `"instance_id":"`) {
		t.Errorf("instance info %q", info)
	}

	t.Run("evidence on the agent's port, plain and TLS", func(t *testing.T) {
		for _, scheme := range []string{"http", "https"} {
			nonce := make([]byte, 32)
			_, _ = rand.Read(nonce)
			reply, spki, err := channel.FetchEvidence(t.Context(), fmt.Sprintf("%s://127.0.0.1:%d", scheme, r.ports[8090]), nonce)
			if err != nil {
				t.Fatalf("%s: %v", scheme, err)
			}
			var source struct {
				Version             int
				Container, Manifest string
				Nonce               string
				ServedSPKIs         []string `json:"served_spkis"`
			}
			if err := json.Unmarshal(reply, &source); err != nil || source.Version != 1 || len(source.Container) < 1000 ||
				source.Nonce != hex.EncodeToString(nonce) || !strings.Contains(source.Manifest, "hello:1") {
				t.Errorf("%s: %.300s", scheme, reply)
			}
			if scheme == "https" && !slices.Contains(source.ServedSPKIs, hex.EncodeToString(spki)) {
				t.Errorf("the connection's key %x is not among the served %q", spki, source.ServedSPKIs)
			}
		}
	})
	t.Run("a port outside the policy is silent", func(t *testing.T) {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", r.ports[8081]), 3*time.Second)
		if err != nil {
			return
		}
		defer c.Close()
		// slirp accepts first and dials then: nothing may come back.
		c.SetDeadline(time.Now().Add(time.Second))
		io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		if n, _ := c.Read(make([]byte, 10)); n > 0 {
			t.Error("it answered")
		}
	})
	t.Run("the host asks for an orderly end", func(t *testing.T) {
		api := prpc.NewClient("http://guest/api", func(ctx context.Context) (net.Conn, error) { return r.link.Open(ctx, hostlink.StreamGuestAPI) })
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		begin := time.Now()
		if err := api.Call(ctx, "Shutdown", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
			t.Fatal(err)
		}
		r.waitOff(90 * time.Second)
		t.Logf("off after %s", time.Since(begin).Round(time.Millisecond))
		if got := r.payloads("shutdown.progress"); len(got) != 1 || got[0] != "powering off" {
			t.Errorf("shutdown progress %q", got)
		}
		if text := r.console.String(); !strings.Contains(text, "dstack: power off") || strings.Contains(text, "panic") {
			t.Error("the machine did not end in order")
		}
	})
}

// Machines that must not come up. Only the first few run by default: each is a boot.
func TestBootsThatMustFail(t *testing.T) {
	b := setup(t)
	change := func(f func(*manifest.Draft)) manifest.Draft {
		d := goodDraft(b, t)
		f(&d)
		return d
	}
	for _, c := range []struct {
		name        string
		vm          func() vm
		phase, code string
		always      bool
	}{
		{"a root with one byte changed", func() vm { return vm{draft: goodDraft(b, t), root: tampered(t, b)} }, "open-root", "root_verity", true},
		{"a machine without a TEE", func() vm { return vm{draft: goodDraft(b, t), noTEE: true} }, "tee", "no_tee", true},
		{"an unknown key on the command line", func() vm {
			return vm{draft: goodDraft(b, t), cmdline: func(s string) string { return s + " dstack.debug=1" }}
		}, "open-root", "cmdline_unknown", false},
		{"another root hash", func() vm {
			return vm{draft: goodDraft(b, t), cmdline: otherHash}
		}, "open-root", "root_verity", false},
		{"no hostlink at all", func() vm { return vm{draft: goodDraft(b, t), noLink: true} }, "tee", "no_tee", false},
		{"a launch that commits to another document", func() vm { return vm{draft: goodDraft(b, t), wrongID: true} }, "config-document", "mr_config_mismatch", true},
		{"a launch that commits to nothing", func() vm { return vm{draft: goodDraft(b, t), noID: true} }, "config-document", "mr_config_mismatch", false},
		{"a blob of noise", func() vm {
			return vm{draft: goodDraft(b, t), raw: bytes.Repeat([]byte("noise..."), 512)}
		}, "read-blob", "shared_malformed", false},
		{"secure time without servers in reach (and an address from DHCP)", func() vm {
			return vm{draft: change(func(d *manifest.Draft) {
				d.SecureTime = nil
				for _, host := range []string{"10.0.2.2:1", "10.0.2.2:2", "10.0.2.2:3"} {
					d.TimeServers = append(d.TimeServers, manifest.TimeServer{Host: host})
				}
			}), dhcp: true}
		}, "time", "time_unproven", false},
		{"a key provider that is not there", func() vm {
			return vm{draft: change(func(d *manifest.Draft) { d.KeyProvider = "kms" })}
		}, "key-provider", "kms_url", false},
		{"a local key provider of a host that has none", func() vm {
			return vm{draft: change(func(d *manifest.Draft) { d.KeyProvider = "local" })}
		}, "key-provider", "provider_unavailable", false},
		{"no data disk", func() vm { return vm{draft: goodDraft(b, t), noData: true} }, "data-disk", "disk_missing", false},
		{"an encrypted environment without a key", func() vm {
			return vm{draft: goodDraft(b, t), files: hostshare.Files{hostshare.EncryptedEnvName: []byte("x")}}
		}, "env", "env_without_key_provider", false},
		{"a script that fails", func() vm {
			return vm{draft: change(func(d *manifest.Draft) { d.PreLaunchScript = "exit 3" })}
		}, "scripts", "script_failed", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !c.always && os.Getenv("DSTACK_TEST_BOOTS") != "all" {
				t.Skip("SKIP: DSTACK_TEST_BOOTS is not all")
			}
			r := c.vm().start(t, b)
			r.waitOff(90 * time.Second)
			ok, failed := r.seen()
			if want := c.phase + " code=" + c.code; !strings.HasPrefix(failed, want) {
				t.Fatalf("failed %q, want %q", failed, want)
			}
			at := slices.Index(order, c.phase)
			if !slices.Equal(ok, order[:at]) {
				t.Errorf("phases before: %v", ok)
			}
			text := r.console.String()
			if !strings.Contains(text, "dstack: power off") || strings.Contains(text, "panic") {
				t.Error("the machine did not power off by itself")
			}
			if r.link != nil {
				if errs := r.payloads("boot.error"); len(errs) != 1 || !strings.HasPrefix(errs[0], c.code) || !strings.Contains(errs[0], ": ") {
					t.Errorf("the host was told %q", errs)
				}
			}
			if strings.Contains(c.name, "DHCP") && !strings.Contains(text, "network: eth0 dhcp 10.0.2.15/24") {
				t.Error("no address from DHCP")
			}
			t.Logf("%s", failed)
		})
	}
}

// otherHash changes the first digit of the root hash.
func otherHash(cmdline string) string {
	const key = "rootfs_hash="
	at := strings.Index(cmdline, key) + len(key)
	digit := "0"
	if cmdline[at] == '0' {
		digit = "1"
	}
	return cmdline[:at] + digit + cmdline[at+1:]
}

// tampered returns a copy of the root image with one bit of its first data block
// changed, in bytes that are read when it is mounted.
func tampered(t *testing.T, b *built) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(b.image, "rootfs.img.parted.verity"))
	must(t, err)
	data[1<<20+40] ^= 1 // squashfs superblock, at the start of the partition at 1 MiB
	path := filepath.Join(t.TempDir(), "root")
	must(t, os.WriteFile(path, data, 0o600))
	return path
}
