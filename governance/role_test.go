// SPDX-License-Identifier: Apache-2.0

package governance

import "testing"

func TestPurposesBelongToRoles(t *testing.T) {
	roles := map[Purpose]Role{Keys: App, Certificate: App, Renewal: App, Replication: KMS, Service: KMS, Source: KMS, "": "none", "other": "none"}
	for p, want := range roles {
		for _, r := range []Role{App, KMS, "", "other"} {
			if r.MayAsk(p) != (r == want) {
				t.Errorf("%q asks for %q: %v", r, p, r.MayAsk(p))
			}
		}
	}
}
