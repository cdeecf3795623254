// SPDX-License-Identifier: Apache-2.0

package derive

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
)

func vectors(t *testing.T) map[string]map[string]string {
	t.Helper()
	text := testkit.Vectors(t, "kms/derivations.json")
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(text, &raw); err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]string{}
	for name, body := range raw {
		var m map[string]string
		if json.Unmarshal(body, &m) == nil {
			out[name] = m
		}
	}
	return out
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDerivationsOfAKMS(t *testing.T) {
	v := vectors(t)
	in, want := v["inputs"], v["kms_derivations"]
	r := Roots{CA: unhex(t, in["root_ca_p256_scalar"]), K256: unhex(t, in["root_k256_scalar"])}
	app := dstack.AppID(unhex(t, in["app_id"]))
	check := func(name string, got []byte, err error) {
		t.Helper()
		if err != nil || hex.EncodeToString(got) != want[name] {
			t.Errorf("%s = %x, %v, want %s", name, got, err, want[name])
		}
	}
	ca, err := r.AppCA(app)
	if err != nil {
		t.Fatal(err)
	}
	scalar, err := ca.Bytes()
	check("app_ca_p256_scalar", scalar, err)
	disk, err := r.Disk(app, unhex(t, in["instance_id"]))
	check("disk_crypt_key", disk.Bytes(), err)
	disk, err = r.Disk(app, nil)
	check("disk_crypt_key_empty_instance_id", disk.Bytes(), err)
	env, err := r.Env(app)
	check("env_crypt_key", env.Bytes(), err)
	key, err := r.App(app)
	check("app_k256_key", key.Bytes(), err)
	public, err := K256Public(key.Bytes())
	check("app_k256_pubkey_compressed", public, err)
	sig, err := SignApp(r.K256, app, public)
	check("k256_signature", sig, err)
	signer, err := RecoverApp(sig, app, public)
	if err != nil || hex.EncodeToString(signer) != in["root_k256_pubkey_compressed"] {
		t.Errorf("recovered %x, %v", signer, err)
	}
}

func TestDerivationsFromASeed(t *testing.T) {
	want := vectors(t)["seed_provider_derivations"]
	seed, err := keys.NewSeed(unhex(t, want["seed"]))
	if err != nil {
		t.Fatal(err)
	}
	s, err := FromSeed(seed)
	if err != nil {
		t.Fatal(err)
	}
	scalar, _ := s.CA.Bytes()
	for name, got := range map[string][]byte{
		"app_root_p256_scalar": scalar, "disk_crypt_key": s.Disk.Bytes(), "k256_key": s.App.Bytes(),
	} {
		if hex.EncodeToString(got) != want[name] {
			t.Errorf("%s = %x, want %s", name, got, want[name])
		}
	}
}

func TestUpstreamsOwnVector(t *testing.T) {
	v := vectors(t)
	got, err := DH(unhex(t, v["inputs"]["root_ca_p256_scalar"]), []byte("context one"), []byte("context two"))
	if err != nil || hex.EncodeToString(got) != v["upstream_fixture"]["derive_dh_secret"] {
		t.Errorf("DH = %x, %v", got, err)
	}
}

// A 19-byte instance id beside a longer suffix must not become another identity's
// input (threats.md B16).
func TestThreat_B16_InstanceIDsHaveAFixedLength(t *testing.T) {
	r := Roots{CA: bytes.Repeat([]byte{7}, 32), K256: bytes.Repeat([]byte{8}, 32)}
	for _, n := range []int{1, 19, 21, 32} {
		if _, err := r.Disk(dstack.AppID{}, make([]byte, n)); err == nil {
			t.Errorf("an instance id of %d bytes was accepted", n)
		}
	}
}

// Keys of different instances of an app, of none and of twenty zero bytes differ
// (threats.md E05).
func TestThreat_E05_DiskKeysDiffer(t *testing.T) {
	r := Roots{CA: bytes.Repeat([]byte{7}, 32), K256: bytes.Repeat([]byte{8}, 32)}
	seen := map[string]string{}
	for name, in := range map[string]struct {
		app      dstack.AppID
		instance []byte
	}{
		"no instance":    {},
		"zero instance":  {instance: make([]byte, 20)},
		"an instance":    {instance: bytes.Repeat([]byte{1}, 20)},
		"another":        {instance: bytes.Repeat([]byte{2}, 20)},
		"another app":    {app: dstack.AppID{1}},
		"app + instance": {app: dstack.AppID{1}, instance: bytes.Repeat([]byte{1}, 20)},
	} {
		k, err := r.Disk(in.app, in.instance)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[string(k.Bytes())]; ok {
			t.Errorf("%s has the disk key of %s", name, other)
		}
		seen[string(k.Bytes())] = name
	}
}

func TestRecoverRefusesMalformedSignatures(t *testing.T) {
	sig, err := Sign(bytes.Repeat([]byte{9}, 32), []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	public, _ := K256Public(bytes.Repeat([]byte{9}, 32))
	if got, err := Recover(sig, []byte("m")); err != nil || !bytes.Equal(got, public) {
		t.Fatalf("recovered %x, %v", got, err)
	}
	if got, _ := Recover(sig, []byte("n")); bytes.Equal(got, public) {
		t.Error("another message recovers the same key")
	}
	for name, bad := range map[string][]byte{
		"short": sig[:64], "long": append(bytes.Clone(sig), 0), "v": append(bytes.Clone(sig[:64]), 27), "zero": make([]byte, 65), "empty": nil,
	} {
		if _, err := Recover(bad, []byte("m")); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
