// SPDX-License-Identifier: Apache-2.0

package envelope

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys/derive"
)

func TestSignaturesOverEnvironmentKeys(t *testing.T) {
	var v struct {
		Inputs   map[string]string `json:"inputs"`
		Want     map[string]string `json:"kms_derivations"`
		Upstream map[string]string `json:"env_pubkey_signature_upstream_v0"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "kms/derivations.json"), &v); err != nil {
		t.Fatal(err)
	}
	at, err := strconv.ParseUint(v.Inputs["timestamp"], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	public := unhex(t, v.Want["env_encrypt_pubkey"])
	v0, v1, err := SignKey(derive.Signer(unhex(t, v.Inputs["root_k256_scalar"])), dstack.AppID(unhex(t, v.Inputs["app_id"])), public, at)
	if err != nil || hex.EncodeToString(v0) != v.Want["env_pubkey_signature_v0"] || hex.EncodeToString(v1) != v.Want["env_pubkey_signature_v1"] {
		t.Errorf("%x\n%x\n%v", v0, v1, err)
	}
	if err := VerifyKey(unhex(t, v.Inputs["root_k256_pubkey_compressed"]), dstack.AppID(unhex(t, v.Inputs["app_id"])), public, v1, at, time.Unix(int64(at)+10, 0)); err != nil {
		t.Error(err)
	}
	u := v.Upstream
	signer, err := derive.Recover(unhex(t, u["signature"]), keyMessage(dstack.AppID{}, nil, unhex(t, u["public_key"]))...)
	if err != nil || hex.EncodeToString(signer) != u["recovered_signer_compressed"] {
		t.Errorf("upstream's signer %x, %v", signer, err)
	}
}

// The host gives the deployer another key to encrypt to (threats.md G12).
func TestThreat_G12_AnotherEnvironmentKey(t *testing.T) {
	root, other := bytes.Repeat([]byte{3}, 32), bytes.Repeat([]byte{4}, 32)
	kms, _ := derive.K256Public(root)
	app, public, now := dstack.AppID{1}, bytes.Repeat([]byte{5}, 32), time.Unix(1_800_000_000, 0)
	at := uint64(now.Unix())
	sign := func(root []byte, app dstack.AppID, public []byte, at uint64) []byte {
		_, v1, err := SignKey(derive.Signer(root), app, public, at)
		if err != nil {
			t.Fatal(err)
		}
		return v1
	}
	v0, good, _ := SignKey(derive.Signer(root), app, public, at)
	if err := VerifyKey(kms, app, public, good, at, now); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		kms, public, signature []byte
		app                    dstack.AppID
		at                     uint64
		code                   string
	}{
		"signed by another":           {kms, public, sign(other, app, public, at), app, at, "env_key_signer"},
		"another key":                 {kms, bytes.Repeat([]byte{6}, 32), good, app, at, "env_key_signer"},
		"another app's":               {kms, public, sign(root, dstack.AppID{2}, public, at), app, at, "env_key_signer"},
		"the time changed":            {kms, public, good, app, at - 1, "env_key_signer"},
		"the signature without time":  {kms, public, v0, app, at, "env_key_signer"},
		"no signature":                {kms, public, nil, app, at, "env_key_signer"},
		"no KMS known":                {nil, public, good, app, at, "env_key_signer"},
		"a short key":                 {kms, public[:31], sign(root, app, public[:31], at), app, at, "env_key_signer"},
		"five minutes and a second":   {kms, public, sign(root, app, public, at-301), app, at - 301, "env_key_stale"},
		"61 seconds in the future":    {kms, public, sign(root, app, public, at+61), app, at + 61, "env_key_stale"},
		"at the end of all time":      {kms, public, sign(root, app, public, ^uint64(0)), app, ^uint64(0), "env_key_stale"},
		"five minutes, just in time":  {kms, public, sign(root, app, public, at-300), app, at - 300, ""},
		"a minute ahead, just enough": {kms, public, sign(root, app, public, at+60), app, at + 60, ""},
	} {
		if err := VerifyKey(c.kms, c.app, c.public, c.signature, c.at, now); fault.Code(err) != c.code || (err == nil) != (c.code == "") {
			t.Errorf("%s: %v, want %q", name, err, c.code)
		}
	}
	if !strings.Contains(VerifyKey(kms, app, public, sign(other, app, public, at), at, now).Error(), hex.EncodeToString(kms)) {
		t.Error("the message does not say who was meant")
	}
}
