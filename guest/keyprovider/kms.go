// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/certificate"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/releaselog"
)

const maxGateways = 4 << 10 // bytes of gateway_app_id

// KMS asks a KMS for the keys of an app, which are the same on every machine: package
// kmsclient says whom it takes for one. What the KMS says of its release log must prove
// that these keys were logged as given to this very instance (threats.md G10); a lease
// must be of this instance, too. Upstream's KMS has neither.
type KMS struct {
	// URLs are tried until one gives keys; https, without /prpc.
	URLs []string
	// Pin is key_provider_id of the manifest: the DER SubjectPublicKeyInfo of the
	// KMS's root CA. Empty: none.
	Pin []byte
	// Policy is what the KMS's evidence must show; nil: nothing.
	Policy *kmsclient.Policy
	// App, Instance (20 bytes or empty) and Compose are whose keys they are.
	App      dstack.AppID
	Instance []byte
	Compose  dstack.ComposeHash
	// VMConfig is what the KMS computes expected measurements from.
	VMConfig string
	// Attester makes the evidence of this end; required.
	Attester channel.Attester
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Lease is how long the KMS authorises the instance, as package lease verifies it.
type Lease struct{ Document, Signature []byte }

// Keys implements [Provider].
//
// Codes: those of kmsclient.New and kmsclient.Ask, kms_reply, those of
// kmsclient.Subject.
func (k *KMS) Keys(ctx context.Context) (*Grant, error) {
	client, err := kmsclient.New(kmsclient.Config{URLs: k.URLs, Root: k.Pin, Policy: k.Policy, Attester: k.Attester, Now: k.Now})
	if err != nil {
		return nil, err
	}
	var grant *Grant
	err = kmsclient.Ask(ctx, client, "GetAppKey", &kmsapi.GetAppKeyRequest{ApiVersion: 1, VmConfig: k.VMConfig},
		func(reply *kmsapi.AppKeyResponse, from kmsclient.Answer) (err error) {
			grant, err = k.take(reply, from)
			return err
		})
	return grant, err
}

// take turns an answer into a grant, or refuses it.
func (k *KMS) take(reply *kmsapi.AppKeyResponse, from kmsclient.Answer) (*Grant, error) {
	root, err := from.RootOf(reply.CaCert)
	if err != nil {
		return nil, err
	}
	out := &Grant{OSImageHash: bytes.Clone(reply.OsImageHash), Unpinned: len(k.Pin) == 0}
	spki, me := root.RawSubjectPublicKeyInfo, k.subject()
	if reply.Release != nil {
		if out.Head, err = me.Release(reply.Release, spki); err != nil {
			return nil, err
		}
	}
	if l := reply.Lease; l != nil {
		if _, err := me.Lease(l, spki, clock(k.Now)); err != nil {
			return nil, err
		}
		out.Lease = &Lease{bytes.Clone(l.Document), bytes.Clone(l.Signature)}
	}
	app, err := k.appKeys(reply)
	if err != nil {
		return nil, err
	}
	// What was checked, and not what else the text holds: the app trusts it.
	app.CACert = certificate.Encode(root.Raw)
	app.Provider = keys.Provider{
		Kind: keys.KMS, URL: from.URL, SPKI: spki,
		TempCACert: from.TempCACert, TempCAKey: []byte(from.TempCAKey),
	}
	out.Keys, out.Session = app, from.Session
	return out, nil
}

// Observe holds the head of a grant against what is remembered of the release log, and
// remembers it. The KMS at url, which gave the grant, is asked for the proof that it
// continues what was seen. Codes: those of releaselog.Memory and of kmsclient.
func (k *KMS) Observe(ctx context.Context, memory *releaselog.Memory, head releaselog.Head, url string) error {
	client, err := kmsclient.New(kmsclient.Config{URLs: []string{url}, Root: head.SPKI(), Policy: k.Policy, Attester: k.Attester, Now: k.Now})
	if err != nil {
		return err
	}
	return memory.Observe(ctx, head, func(from uint64) (proof [][]byte, err error) {
		err = kmsclient.Ask(ctx, client, "GetLogConsistency", &kmsapi.LogConsistencyRequest{From: from, To: head.Size()},
			func(r *kmsapi.LogConsistencyResponse, _ kmsclient.Answer) error {
				for _, p := range r.Proof {
					proof = append(proof, bytes.Clone(p))
				}
				return nil
			})
		return proof, err
	})
}

func (k *KMS) subject() kmsclient.Subject {
	return kmsclient.Subject{App: k.App, Instance: k.Instance, Compose: k.Compose}
}

func malformed(format string, args ...any) error {
	return fault.New("kms_reply", "the KMS's answer is not acceptable: "+format, args...)
}

// appKeys reads the keys out of an answer.
func (k *KMS) appKeys(r *kmsapi.AppKeyResponse) (*keys.AppKeys, error) {
	out := &keys.AppKeys{AppSignature: bytes.Clone(r.K256Signature), GatewayAppID: r.GatewayAppId}
	err := func() (err error) {
		if out.Disk, err = keys.NewDiskKey(r.DiskCryptKey); err != nil {
			return err
		}
		if out.Env, err = keys.NewEnvKey(r.EnvCryptKey); err != nil {
			return err
		}
		if out.App, err = keys.NewAppKey(r.K256Key); err != nil {
			return err
		}
		if out.Disk.IsZero() || out.Env.IsZero() {
			return errors.New("a key is all zeros")
		}
		public, err := derive.K256Public(out.App.Bytes())
		if err != nil {
			return err
		}
		// By whom is for those to check who know the KMS's second key; a signature it is.
		if _, err := derive.RecoverApp(r.K256Signature, k.App, public); err != nil {
			return fmt.Errorf("the signature over the app's key: %w", err)
		}
		if n := len(r.OsImageHash); n != 0 && n != dstack.ImageHashSize {
			return fmt.Errorf("the OS image hash has %d bytes, not %d", n, dstack.ImageHashSize)
		}
		return checkGateways(out.GatewayAppID)
	}()
	if err != nil {
		out.Wipe()
		return nil, malformed("%v", err)
	}
	return out, nil
}

// checkGateways takes what keys.AppKeys.GatewayAppID may be, or the word any.
func checkGateways(text string) error {
	if len(text) > maxGateways {
		return fmt.Errorf("gateway_app_id has %d bytes, more than %d", len(text), maxGateways)
	}
	if text == "" || text == "any" {
		return nil
	}
	for id := range strings.SplitSeq(text, ",") {
		b, err := hex.DecodeString(strings.TrimPrefix(strings.TrimSpace(id), "0x"))
		if err != nil || len(b) != len(dstack.AppID{}) {
			return fmt.Errorf("gateway_app_id: %.100q is no app id", id)
		}
	}
	return nil
}
