// SPDX-License-Identifier: Apache-2.0

package authority

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/policy"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/internal/fault"
)

func bad(format string, args ...any) *fault.Error { return fault.New("test_config", format, args...) }

var (
	key      = strings.Repeat("01", 32)
	registry = "0x" + strings.Repeat("aa", 20)
)

func TestAConfigurationNamesWhoDecides(t *testing.T) {
	for name, c := range map[string]struct {
		cfg  Config
		good bool
	}{
		"nobody":                         {Config{}, false},
		"everybody":                      {Config{Type: "dev"}, false},
		"another word":                   {Config{Type: "lease"}, false},
		"a policy":                       {Config{Type: TypePolicy, Policy: Policy{Keys: key + ", " + key, Threshold: 2}}, true},
		"a policy of no keys":            {Config{Type: TypePolicy, Policy: Policy{Threshold: 1}}, false},
		"a policy of no threshold":       {Config{Type: TypePolicy, Policy: Policy{Keys: key}}, false},
		"a threshold above the keys":     {Config{Type: TypePolicy, Policy: Policy{Keys: key, Threshold: 2}}, false},
		"a policy of half a key":         {Config{Type: TypePolicy, Policy: Policy{Keys: key[:32], Threshold: 1}}, false},
		"a webhook":                      {Config{Type: TypeWebhook, Webhook: Webhook{URL: "https://a.example", Key: key}}, true},
		"a webhook that signs nothing":   {Config{Type: TypeWebhook, Webhook: Webhook{URL: "https://a.example"}}, false},
		"a webhook nowhere":              {Config{Type: TypeWebhook, Webhook: Webhook{Key: key}}, false},
		"a chain":                        {Config{Type: TypeChain, Chain: Chain{RPC: "http://127.0.0.1:1", Threshold: 1, ChainID: 1, Registry: registry}}, true},
		"a chain of no contract":         {Config{Type: TypeChain, Chain: Chain{RPC: "http://127.0.0.1:1", Threshold: 1, ChainID: 1, Registry: "0x12"}}, false},
		"a chain of no endpoint":         {Config{Type: TypeChain, Chain: Chain{Threshold: 1, ChainID: 1, Registry: registry}}, false},
		"a chain that nobody must agree": {Config{Type: TypeChain, Chain: Chain{RPC: "http://127.0.0.1:1", ChainID: 1, Registry: registry}}, false},
		"a chain of no number":           {Config{Type: TypeChain, Chain: Chain{RPC: "http://127.0.0.1:1", Threshold: 1, Registry: registry}}, false},
	} {
		err := c.cfg.Check("core.auth", bad)
		switch {
		case c.good && err != nil, !c.good && (fault.Code(err) != "test_config" || !strings.Contains(err.Error(), "core.auth")):
			t.Errorf("%s: %v", name, err)
		case c.good:
			a, documents, err := Open(c.cfg, Options{Dir: t.TempDir()})
			if err != nil || a == nil || (documents != nil) != (c.cfg.Type == TypePolicy) {
				t.Errorf("%s: %v, %v, %v", name, a, documents, err)
			}
		default:
			if a, _, err := Open(c.cfg, Options{Dir: t.TempDir()}); c.cfg.Type != TypeChain && c.cfg.Type != TypeWebhook && (err == nil || a != nil) {
				t.Errorf("%s opens: %v", name, a)
			}
		}
	}
}

func TestAChainIsReadAsConfigured(t *testing.T) {
	c := Chain{RPC: "http://a, http://b", Threshold: 2, ChainID: 7, Registry: registry, MaxStaleness: config.Duration{Duration: time.Hour}, Confirmations: 9}
	got := c.config(Options{Dir: "/d"})
	if len(got.RPC) != 2 || got.Threshold != 2 || got.ChainID != 7 || !strings.EqualFold(got.Registry.Hex(), registry) || got.MaxStaleness != time.Hour || got.Confirmations != 9 || got.File != "/d/chain-finalised" || got.Foreign {
		t.Errorf("%+v", got)
	}
	c.Foreign = true
	if !c.config(Options{}).Foreign {
		t.Error("foreign apps are configured, and not taken")
	}
}

func TestThePolicysFileIsTheFirstDocument(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	signed := func(sequence uint64) string {
		d := policy.New(dstack.TrustProduction, now, time.Hour)
		d.Sequence = sequence
		text, err := d.Encode()
		if err == nil {
			text, err = policy.Sign(text, private)
		}
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "policy.json")
	c := Config{Type: TypePolicy, Policy: Policy{Keys: hex.EncodeToString(public), Threshold: 1, File: file}}
	if _, _, err := Open(c, Options{Dir: dir}); fault.Code(err) != "authority_policy" {
		t.Errorf("no file: %v", err)
	}
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(signed(2))
	_, a, err := Open(c, Options{Dir: dir})
	if err != nil || a.Signed() == nil {
		t.Fatal(err)
	}
	// An older file keeps nobody from starting, and does not count.
	write(signed(1))
	_, again, err := Open(c, Options{Dir: dir})
	if err != nil || string(again.Signed()) != string(a.Signed()) {
		t.Errorf("%v", err)
	}
	if err := c.Policy.Update(again); fault.Code(err) != "policy_rollback" {
		t.Errorf("an older document: %v", err)
	}
	c.Policy.File = signed(3) // as text
	if err := c.Policy.Update(again); err != nil {
		t.Error(err)
	}
	// In a directory of its own the older one is as new as any.
	c.Policy.File = file
	if _, _, err := Open(c, Options{Dir: t.TempDir()}); err != nil {
		t.Error(err)
	}
}
