// SPDX-License-Identifier: Apache-2.0

package appraiser_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/channel/appraiser"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// machine is a CVM with a simulated TEE.
type machine struct {
	platform *tdxtest.Platform
	app      dstack.AppID
	instance dstack.InstanceID
	compose  dstack.ComposeHash
	key      *channel.Key // committed before any app ran
	noConfig bool         // MRCONFIGID is zero
}

func (m *machine) Attest(_ context.Context, data dstack.ReportData) ([]byte, error) {
	var events []eventlog.Event
	sum := sha256.Sum256(m.key.SPKI())
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, m.app[:]}, {eventlog.ComposeHashEvent, m.compose[:]},
		{eventlog.InstanceIDEvent, m.instance[:]}, {eventlog.BootMRDone, nil}, {eventlog.SystemChannelKey, sum[:]}, {eventlog.SystemReady, nil},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			return nil, err
		}
		events = append(events, ev)
	}
	rtmr, err := eventlog.Replay(events, eventlog.RuntimeIMR)
	if err != nil {
		return nil, err
	}
	body := m.platform.Body()
	body.RTMR[3], body.ReportData = rtmr, data
	if !m.noConfig {
		body.MRConfigID = mrconfig.IDv1(m.compose)
	}
	return container.EncodeV1(&attest.Evidence{TEE: dstack.TDX, Quote: m.platform.Quote(body), EventLog: events, ReportData: data, Config: "{}"})
}

func newMachine(t *testing.T, p *tdxtest.Platform) *machine {
	key, err := channel.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return &machine{platform: p, app: dstack.AppID{1}, instance: dstack.InstanceID{2}, compose: dstack.ComposeHash{3}, key: key}
}

func (m *machine) appraiser() *appraiser.Appraiser {
	a := &appraiser.Appraiser{
		Roots:      append(verifier.VendorRoots(), m.platform.Roots()),
		Policy:     verifier.DefaultPolicy(),
		Collateral: collateral.Static{Bundle: &collateral.Bundle{TDX: m.platform.Collateral()}},
	}
	a.Policy.DevRoots, a.Policy.Image.AllowUnanchored = true, true
	a.Reference.AddComposeHash(m.compose, "the test")
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
	conn, err := connect(t, m, &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.app, InstanceID: &m.instance, ComposeHashes: []dstack.ComposeHash{m.compose}}})
	if err != nil {
		t.Fatal(err)
	}
	peer := conn.Peer()
	if peer.Identity.AppID != m.app || *peer.Identity.InstanceID != m.instance || peer.Trust != dstack.TrustDevelopment || !bytes.Equal(peer.SPKI, m.key.SPKI()) {
		t.Errorf("peer %+v", peer)
	}
}

func TestRefusalsHaveTheVerdictsReason(t *testing.T) {
	p := tdxtest.New(t)
	for _, c := range []struct {
		name, code string
		edit       func(answers *machine, a *appraiser.Appraiser, in *channel.Intended)
	}{
		{"C02: another instance of the same workload", "channel_wrong_instance", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.instance[0] ^= 1 }},
		{"another app", "channel_wrong_app", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.app[0] ^= 8 }},
		{"another workload", "compose_hash_mismatch", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.compose[0] ^= 1 }},
		{"a workload that the connection does not mean", "compose_hash_mismatch", func(_ *machine, _ *appraiser.Appraiser, in *channel.Intended) {
			in.ComposeHashes = []dstack.ComposeHash{{9}}
		}},
		{"a workload that the policy does not allow, though the connection means it", "compose_hash_mismatch", func(_ *machine, a *appraiser.Appraiser, _ *channel.Intended) {
			a.Policy.Workload.ComposeHashes = []dstack.ComposeHash{{9}}
		}},
		{"no workload expected", "workload_not_specified", func(_ *machine, a *appraiser.Appraiser, in *channel.Intended) {
			a.Reference, in.ComposeHashes = verifier.Reference{}, nil
		}},
		{"no commitment at launch", "mr_config_missing", func(m *machine, _ *appraiser.Appraiser, _ *channel.Intended) { m.noConfig = true }},
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
			in := channel.Intended{AppID: m.app, InstanceID: &m.instance, ComposeHashes: []dstack.ComposeHash{m.compose}}
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
	client := &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.app}}
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
	other := newMachine(t, m.platform)
	other.instance[0] ^= 1
	client := &channel.Config{Appraiser: m.appraiser(), Intended: channel.Intended{AppID: m.app, InstanceID: &m.instance}}
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
			in := channel.Intended{AppID: m.app}
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
