// SPDX-License-Identifier: Apache-2.0

package boottest

import (
	"strings"
	"testing"
	"time"
)

func TestTheAppAnswers(t *testing.T) {
	b := setup(t)
	r := vm{draft: goodDraft(b, t)}.start(t, b)
	body, after := r.get(8080, 120*time.Second)
	if !strings.Contains(body, "hello from the boot test") {
		t.Errorf("the app answered %q", body)
	}
	t.Logf("first HTTP answer after %s, QEMU used %s of processor time", after.Round(time.Millisecond), r.cpu())
	for deadline := time.Now().Add(20 * time.Second); len(r.payloads("boot.timings")) == 0 && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("timings %v", r.payloads("boot.timings"))
	for _, e := range r.noted() {
		t.Logf("%8s cpu %7s %s %s", e.at.Round(time.Millisecond), e.cpu, e.name, e.payload)
	}
	for line := range strings.Lines(r.console.String()) {
		t.Log(strings.TrimSpace(line))
	}
}
