// SPDX-License-Identifier: Apache-2.0

package backup

import "testing"

func BenchmarkSealAndRestore(b *testing.B) {
	r := roots(b)
	operators, private := people(b, 5)
	for b.Loop() {
		backup := must(Parse(must(Seal(r, operators, 3))))
		must(backup.Restore(open(b, backup, private[:3]), r.Identity())).Wipe()
	}
}
