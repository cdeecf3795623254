// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/config"
	"github.com/dstack-go/dstack/vmm/history"
)

// asked lists "method vm outcome" of the audit.
func (w *world) asked() (out []string) {
	w.t.Helper()
	status, body := w.get("/history?kind=audit")
	if status != 200 {
		w.t.Fatalf("%d %s", status, body)
	}
	for line := range strings.Lines(body) {
		var a history.Audit
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			w.t.Fatal(err)
		}
		if want := fmt.Sprintf("uid %d pid %d", os.Getuid(), os.Getpid()); a.Who != want {
			w.t.Errorf("who: %q, want %q", a.Who, want)
		}
		out = append(out, a.Method+" "+a.VM+" "+a.Outcome)
	}
	return out
}

func TestChangesAreAudited(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt)).open()
	req := request()
	req.Stopped, req.NoTee, req.EncryptedEnv, req.UserConfig = true, true, []byte("sealed secret"), "launch token"
	id := w.mustCreate(req)
	w.info(id) // reads leave no trace
	if _, err := w.update(&vmmpb.UpdateVmRequest{Id: id, Memory: ptr[uint32](1)}); err == nil {
		t.Fatal("taken")
	}
	w.do("StartVm", "nobody")
	w.must("StartVm", id)
	if m, ok := w.server.vms[id].usage(); !ok || m.RSSBytes < 1<<20 || m.VM != id {
		t.Errorf("%+v %v", m, ok)
	}
	w.must("RemoveVm", id)
	w.until("gone", func() bool { return w.info(id) == nil })
	want := []string{"CreateVm " + id + " ok", "UpdateVm " + id + " memory_limit", "StartVm nobody vm_not_found", "StartVm " + id + " ok", "RemoveVm " + id + " ok"}
	if got := w.asked(); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s", strings.Join(got, "\n"))
	}
	w.close()
	w.open()
	// The past of a VM outlives it and the VMM.
	status, body := w.get("/history?id=" + id)
	if status != 200 || !strings.Contains(body, "vm.created") || !strings.Contains(body, `"vm.start"`) {
		t.Errorf("%d %s", status, body)
	}
	for _, secret := range []string{"sealed secret", "launch token", "c2VhbGVk"} {
		if data, _ := os.ReadFile(w.config.StateDir + "/history.db"); strings.Contains(string(data), secret) {
			t.Errorf("%s is in the history", secret)
		}
	}
	for query, want := range map[string]int{"kind=audit&limit=1": 200, "kind=samples": 200, "kind=secrets": 400, "since=yesterday": 400, "limit=-1": 400, "since=99999999999999": 200} {
		if status, body := w.get("/history?" + query); status != want || query == "since=99999999999999" && body != "" {
			t.Errorf("%s: %d %s", query, status, body)
		}
	}
}

func TestVMsDoNotDependOnTheHistory(t *testing.T) {
	w := newWorld(t, bootDisk(t, "", codeHalt))
	os.Mkdir(w.config.StateDir+"/history.db", 0o700)
	w.open()
	req := request()
	req.NoTee = true
	id := w.mustCreate(req)
	w.must("StopVm", id)
	if status, body := w.get("/history?id=" + id); status != 503 || !strings.Contains(body, "history_off") {
		t.Errorf("%d %s", status, body)
	}
}

// Over TCP the number of the token says who it was, and never the token.
func TestAuditNamesTheToken(t *testing.T) {
	w := newWorld(t, "")
	w.config.Auth.Tokens = []config.Secret{config.NewSecret("first-token-of-sixteen"), config.NewSecret("second-token-of-sixteen")}
	w.open()
	call := func(token string) int {
		r := httptest.NewRequest(http.MethodPost, "/prpc/StopVm?json", strings.NewReader(`{"id":"x"}`))
		r.Header.Set("Authorization", "Bearer "+token)
		rec := httptest.NewRecorder()
		w.server.Handler().ServeHTTP(rec, r)
		return rec.Code
	}
	if got := call("second-token-of-sixteen"); got != 400 {
		t.Fatal(got)
	}
	for _, bad := range []string{"", "third-token-of-sixteen"} {
		if got := call(bad); got != 401 {
			t.Fatalf("%q: %d", bad, got)
		}
	}
	audits, err := w.server.past.Audits(t.Context(), history.Query{})
	if err != nil || len(audits) != 1 || audits[0].Who != "token 2" || audits[0].Outcome != "vm_not_found" {
		t.Fatal(audits, err)
	}
}
