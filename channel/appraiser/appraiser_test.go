// SPDX-License-Identifier: Apache-2.0

package appraiser_test

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/appraiser"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// machine is a CVM with a simulated TEE, and the channel key that it committed to.
type machine struct {
	tdxtest.Guest
	key *channel.Key
}

func newMachine(t *testing.T, p *tdxtest.Platform) *machine {
	key, err := channel.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return &machine{tdxtest.Guest{
		Platform: p, AppID: dstack.AppID{1}, InstanceID: dstack.InstanceID{2}, ComposeHash: dstack.ComposeHash{3}, ChannelSPKI: key.SPKI(),
	}, key}
}

func (m *machine) appraiser() *appraiser.Appraiser {
	a := &appraiser.Appraiser{
		Roots:      append(verifier.VendorRoots(), m.Platform.Roots()),
		Policy:     verifier.DefaultPolicy(),
		Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: m.Platform.Collateral()}},
	}
	a.Policy.DevRoots, a.Policy.Image.AllowUnanchored = true, true
	a.Reference.AddComposeHash(m.ComposeHash, "the test")
	return a
}

// connect has a client that means m talk to the machine that answers.
func connect(t *testing.T, answers *machine, client *channel.Config) (*channel.Conn, error) {
	t.Helper()
	return connectWith(t, answers, answers.key, client)
}

func TestVerifierJudgesChannels(t *testing.T) {
	p := tdxtest.New(t)
	m := newMachine(t, p)
	conn, err := connect(t, m, &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.AppID, InstanceID: &m.InstanceID, ComposeHashes: []dstack.ComposeHash{m.ComposeHash}}})
	if err != nil {
		t.Fatal(err)
	}
	peer := conn.Peer()
	if peer.Identity.AppID != m.AppID || *peer.Identity.InstanceID != m.InstanceID || peer.Trust != dstack.TrustDevelopment || !bytes.Equal(peer.SPKI, m.key.SPKI()) {
		t.Errorf("peer %+v", peer)
	}
}

func TestRefusalsHaveTheVerdictsReason(t *testing.T) {
	p := tdxtest.New(t)
	for _, c := range []struct {
		name, code string
		edit       func(answers *machine, a *appraiser.Appraiser, in *channel.Intended)
	}{
		{"C02: another instance of the same workload", "channel_wrong_instance", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.InstanceID[0] ^= 1 }},
		{"another app", "channel_wrong_app", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.AppID[0] ^= 8 }},
		{"another workload", "compose_hash_mismatch", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.ComposeHash[0] ^= 1 }},
		{"a workload that the connection does not mean", "compose_hash_mismatch", func(_ *machine, _ *appraiser.Appraiser, in *channel.Intended) {
			in.ComposeHashes = []dstack.ComposeHash{{9}}
		}},
		{"a workload that the policy does not allow, though the connection means it", "compose_hash_mismatch", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) {
			a.Policy.Workload.ComposeHashes = []dstack.ComposeHash{{9}}
		}},
		{"no workload expected", "workload_not_specified", func(_ *machine, a *appraiser.Appraiser, in *channel.Intended) {
			a.Reference, in.ComposeHashes = verifier.Reference{}, nil
		}},
		{"no commitment at launch", "mr_config_missing", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.NoConfig = true }},
		{"the vendor's roots alone", "unknown_root", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) { a.Policy.DevRoots = false }},
		{"the zero policy", "policy_zero", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) {
			a.Policy = verifier.Policy{DevRoots: true}
		}},
		{"no collateral", "collateral_missing", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) { a.Collateral = nil }},
		{"an image that nobody vouches for", "image_unanchored", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) { a.Policy.Image.AllowUnanchored = false }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, p)
			answers := *m
			a := m.appraiser()
			in := channel.Intended{AppID: m.AppID, InstanceID: &m.InstanceID, ComposeHashes: []dstack.ComposeHash{m.ComposeHash}}
			c.edit(&answers, a, &in)
			if _, err := connect(t, &answers, &channel.Config{Appraiser: a, Intended: in}); fault.Code(err) != c.code {
				t.Errorf("%v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
}

// connectWith is connect to a server whose TLS key is not the committed one.
func connectWith(t *testing.T, answers *machine, key *channel.Key, client *channel.Config) (*channel.Conn, error) {
	t.Helper()
	now := func() time.Time { return tdxtest.At }
	client.Now = now
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() {
		raw, err := l.Accept()
		if err != nil {
			return
		}
		if conn, err := channel.Server(ctx, raw, &channel.Config{AnyClient: true, Attester: answers, Key: key, Now: now}); err == nil {
			conn.Close()
		}
	}()
	conn, err := channel.Dial(ctx, "tcp", l.Addr().String(), client)
	if err == nil {
		conn.Close()
	}
	return conn, err
}

// B20: an app of the genuine machine has a quote made over the very bytes that the
// channel demands, for a key of its own. The log commits to the system's key.
func TestThreat_B20_AppsOwnKeyIsNoChannelKey(t *testing.T) {
	m := newMachine(t, tdxtest.New(t))
	rogue, err := channel.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	client := &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.AppID}}
	if _, err := connectWith(t, m, rogue, client); fault.Code(err) != "channel_key_mismatch" {
		t.Error(err)
	}
	if _, err := connect(t, m, client); err != nil {
		t.Error(err)
	}
}

// C02: the same image and workload on another machine is not the instance meant.
func TestThreat_C02_SameWorkloadAnotherInstance(t *testing.T) {
	m := newMachine(t, tdxtest.New(t))
	other := newMachine(t, m.Platform)
	other.InstanceID[0] ^= 1
	client := &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.AppID, InstanceID: &m.InstanceID}}
	if _, err := connect(t, other, client); fault.Code(err) != "channel_wrong_instance" {
		t.Error(err)
	}
}

// B08: a policy about age and freshness takes evidence made for the session, and
// of RA-TLS what the certificate's age allows; RA-TLS is never fresh.
func TestThreat_B08_RATLSEvidenceIsNeverFresh(t *testing.T) {
	m := newMachine(t, tdxtest.New(t))
	for _, c := range []struct {
		name     string
		evidence verifier.EvidencePolicy
		age      time.Duration // of the certificate
		session  string        // code for an attested channel
		ratls    string        // code for RA-TLS
	}{
		{"no demands", verifier.EvidencePolicy{}, time.Hour, "", ""},
		{"freshness", verifier.EvidencePolicy{RequireFresh: true}, time.Hour, "", "freshness_none"},
		{"an age that the certificate has not reached", verifier.EvidencePolicy{MaxAgeSeconds: 7200}, time.Hour, "", ""},
		{"an age that the certificate has passed", verifier.EvidencePolicy{MaxAgeSeconds: 1800}, time.Hour, "", "evidence_too_old"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := m.appraiser()
			a.Policy.Evidence = c.evidence
			in := channel.Intended{AppID: m.AppID}
			if _, err := connect(t, m, &channel.Config{Appraiser: a, Intended: in}); fault.Code(err) != c.session {
				t.Errorf("session: %v, want code %q", err, c.session)
			}
			now := func() time.Time { return tdxtest.At }
			made, err := channel.NewCertifier(t.Context(), channel.CertifierConfig{
				Attester: m, Key: m.key, Names: []string{"app.test"}, Now: func() time.Time { return tdxtest.At.Add(5*time.Minute - c.age) },
			})
			if err != nil {
				t.Fatal(err)
			}
			inner, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			l, err := channel.ListenRATLS(inner, made, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			conn, err := channel.DialRATLS(t.Context(), "tcp", l.Addr().String(), &channel.RATLS{Appraiser: a, Intended: in, Now: now})
			if fault.Code(err) != c.ratls {
				t.Errorf("RA-TLS: %v, want code %q", err, c.ratls)
			}
			if err == nil {
				conn.Close()
			}
		})
	}
}
