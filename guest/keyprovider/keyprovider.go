// SPDX-License-Identifier: Apache-2.0

// Package keyprovider gets an app its keys: from nowhere ([None]), from a TPM
// ([TPM]), from an SGX enclave on the same machine ([Local]) or from a KMS ([KMS]).
//
// The manifest, which is measured, says which provider and may pin it; the keys that
// come out belong to that provider and no other, or there is an error with a code
// and no keys. What a guest got its keys from it measures (keys.Provider.Event), so
// that a verifier sees it, too.
//
// Trusted: the machine's TEE, and the one provider that the manifest pins. Without a
// pin a guest takes keys from whatever KMS or enclave the host leads it to, as
// upstream's does: [Grant.Unpinned] says so, and a verifier who checks the event is
// the only one who notices (spec/kms.md §5.1).
// Attacker-controlled: addresses, names and every byte of an answer; the network;
// for a TPM that is not vouched for, the TPM.
//
// Implements spec/kms.md §5 and spec/guest-os.md §6; design.md §7; threats.md C03,
// C04, E06.
package keyprovider

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"time"

	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/releaselog"
)

// Provider gives an app its keys.
type Provider interface {
	// Keys returns the app's keys; the caller wipes them. It may be called once.
	Keys(ctx context.Context) (*Grant, error)
}

// Grant is what a provider gave.
type Grant struct {
	Keys *keys.AppKeys
	// OSImageHash is 32 bytes with a KMS that said which image it found, else nil: the
	// payload of the event os-image-hash.
	OSImageHash []byte
	// Unpinned says that the manifest pins no provider where it could: the keys may be
	// the host's.
	Unpinned bool
	// Session says that a KMS gave the keys over an attested channel.
	Session bool
	// Head is that of the KMS's release log, in which this grant is; zero for a KMS that
	// shows no log.
	Head releaselog.Head
	// Lease is how long the KMS authorises the instance; nil when it does not say.
	Lease *Lease
	// Created says that a seed was made and stored just now.
	Created bool
}

// appRoot is the certificate of an app's own root, upstream's.
var appRoot = certificate.Subject{Name: "App Root Cert", Path: 1}

// seeded makes the keys that follow from a seed, and the app's own root, whose
// certificate carries evidence over its key; the seed is wiped.
func seeded(ctx context.Context, seed keys.Seed, p keys.Provider, attester channel.Attester, now time.Time) (*keys.AppKeys, error) {
	defer seed.Wipe()
	d, err := derive.FromSeed(seed)
	if err != nil {
		return nil, fault.Wrap(err, "key_derivation", "derive the app's keys from its seed")
	}
	k := &keys.AppKeys{Disk: d.Disk, App: d.App, Provider: p}
	fail := func(err error) (*keys.AppKeys, error) {
		k.Wipe()
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(d.CA.Public())
	if err != nil {
		return fail(err)
	}
	var evidence []byte
	if attester != nil {
		if evidence, err = attester.Attest(ctx, ratls.ReportData(spki)); err != nil {
			return fail(fault.Wrap(err, "key_evidence", "make evidence for the app's root certificate"))
		}
	}
	root, err := certificate.Self(d.CA, appRoot, ratls.Issued{}, evidence, now)
	if err != nil {
		return fail(fault.Wrap(err, "key_derivation", "make the app's root certificate"))
	}
	k.CACert = root.PEM()
	if k.Provider.CAKey, err = derive.PEM(d.CA); err != nil {
		return fail(err)
	}
	if p.Kind == keys.TPM {
		k.Provider.SPKI = spki
	}
	return k, nil
}

// None makes new keys at each boot: what they encrypt does not outlive it.
type None struct {
	Attester channel.Attester // for the app's root certificate; nil: none
	Now      func() time.Time // nil: time.Now
}

// Keys implements [Provider]. Codes key_derivation, key_evidence.
func (n None) Keys(ctx context.Context) (*Grant, error) {
	var b [keys.Size]byte
	rand.Read(b[:])
	defer clear(b[:])
	seed, err := keys.NewSeed(b[:])
	if err != nil {
		return nil, err
	}
	k, err := seeded(ctx, seed, keys.Provider{Kind: keys.None}, n.Attester, clock(n.Now))
	if err != nil {
		return nil, err
	}
	return &Grant{Keys: k}, nil
}

func clock(now func() time.Time) time.Time {
	if now == nil {
		return time.Now()
	}
	return now()
}
