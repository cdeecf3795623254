// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/channel"
)

// `dstack verify host:port` judges the RA-TLS certificate that is served there, by
// the key of the connection it came over; a saved certificate is judged alike, but
// for the connection.
func TestVerifyRATLSEndpoint(t *testing.T) {
	platform := tdxtest.New(t)
	key, err := channel.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	guest := &tdxtest.Guest{Platform: platform, AppID: dstack.AppID{1}, InstanceID: dstack.InstanceID{2}, ComposeHash: dstack.ComposeHash{3}, ChannelSPKI: key.SPKI()}
	now := func() time.Time { return tdxtest.At }
	certifier, err := channel.NewCertifier(t.Context(), channel.CertifierConfig{Attester: guest, Key: key, Names: []string{"127.0.0.1"}, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := channel.ListenRATLS(inner, certifier, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()

	dir := t.TempDir()
	raw, err := platform.DevRoots().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(dir, "dev-roots.json")
	policy := filepath.Join(dir, "policy.json")
	for path, data := range map[string][]byte{roots: raw, policy: []byte(`{"tcb":{"accept":["UpToDate"]},"image":{"allow_unanchored":true}}`)} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at := tdxtest.At.Add(time.Minute).Format(time.RFC3339)
	saved := filepath.Join(dir, "cert.der")
	args := []string{"--dev-roots", roots, "--policy", policy, "--at", at}
	v, code := run(t, nil, append(args, inner.Addr().String(), "--compose-hash", guest.ComposeHash.String(), "--save", saved)...)
	if code != 0 || !*v.Accepted || v.Trust != "development" || v.Channel != "tls" || v.Freshness != "none" {
		t.Errorf("exit %d, %+v", code, v)
	}
	v, code = run(t, nil, append(args, saved, "--compose-hash", guest.ComposeHash.String())...)
	if code != 0 || v.Channel != "none" {
		t.Errorf("saved: exit %d, %+v", code, v)
	}
	if v, code = run(t, nil, append(args, saved, "--compose-hash", dstack.ComposeHash{9}.String())...); code != 1 || !slices.Contains(v.codes(), "compose_hash_mismatch") {
		t.Errorf("another workload: exit %d, %v", code, v.codes())
	}
	late := []string{"--dev-roots", roots, "--policy", policy, "--at", tdxtest.At.Add(48 * time.Hour).Format(time.RFC3339)}
	if v, code = run(t, nil, append(late, saved, "--compose-hash", guest.ComposeHash.String())...); code != 1 || !slices.Contains(v.codes(), "ratls_expired") {
		t.Errorf("two days later: exit %d, %v", code, v.codes())
	}
	if v, code = run(t, nil, "--policy", policy, "--at", at, "--offline", saved); code != 1 || !slices.Contains(v.codes(), "unknown_root") {
		t.Errorf("without the development roots: exit %d, %v", code, v.codes())
	}
}
