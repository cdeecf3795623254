// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/dstack-go/dstack/verifier/verifiertest"
)

// `dstack verify` of a name whose TLS ends at a gateway, which answers for itself and for
// the app.
func TestVerifyThroughATerminatingGateway(t *testing.T) {
	app, gateway := verifiertest.New(t, "shop"), verifiertest.New(t, "gateway")
	gateway.Platform = app.Platform
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q struct{ Nonce string }
		json.NewDecoder(r.Body).Decode(&q)
		nonce, _ := hex.DecodeString(q.Nonce)
		src, err := app.Answer(nonce, true)
		own, err2 := gateway.Answer(nonce, true)
		if err != nil || err2 != nil {
			t.Error(err, err2)
		}
		src.Gateway = &own
		json.NewEncoder(w).Encode(src)
	}))
	defer srv.Close()
	gateway.SPKI = srv.Certificate().RawSubjectPublicKeyInfo

	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	roots, ours, theirs := file("dev-roots.json", app.DevRoots()), file("app.json", app.Lock()), file("gateway.json", gateway.Lock())
	at := verifiertest.At.Format("2006-01-02T15:04:05Z")
	base := []string{srv.URL, "--dev-roots", roots, "--at", at, "--lock", ours}
	v, code := run(t, nil, append(base, "--allow-gateway-termination", "--gateway-lock", theirs)...)
	if code != 0 || !*v.Accepted || v.Channel != "gateway" || v.Freshness != "nonce" || len(v.Hops) != 2 {
		t.Errorf("exit %d, %+v", code, v)
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"nobody allowed it":    {[]string{"--gateway-lock", theirs}, "gateway_termination_denied"},
		"nobody said which":    {[]string{"--allow-gateway-termination"}, "gateway_not_specified"},
		"the app id alone":     {[]string{"--allow-gateway-termination", "--gateway-app-id", gateway.AppID.String()}, "gateway_not_specified"},
		"another than thought": {[]string{"--allow-gateway-termination", "--gateway-lock", ours}, "compose_hash_mismatch"},
		"an image not named":   {[]string{"--allow-gateway-termination", "--gateway-compose-hash", gateway.ComposeHash().String()}, "image_unanchored"},
	} {
		v, code := run(t, nil, append(slices.Clone(base), c.args...)...)
		if code == 0 || *v.Accepted || !slices.Contains(v.codes(), c.want) {
			t.Errorf("%s: exit %d, %v", name, code, v.codes())
		}
	}
	allowed := file("policy.json", []byte(`{"tcb":{"accept":["UpToDate"]},"gateway":{"allow_termination":true,"workload":{"compose_hashes":["`+gateway.ComposeHash().String()+`"]}}}`))
	if v, code := run(t, nil, append(base, "--policy", allowed, "--gateway-lock", theirs)...); code != 0 {
		t.Errorf("by the policy: exit %d, %v", code, v.codes())
	}
}
