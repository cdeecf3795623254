// SPDX-License-Identifier: Apache-2.0

package custody

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"testing"

	"github.com/dstack-go/dstack/keys/derive"
)

// One GetAppKey's worth of work, and a certificate's two signatures: from roots in a
// locked page, parsed anew for each call, beside the same library calls on keys that
// lie ready in ordinary memory.
func BenchmarkAnApp(b *testing.B) {
	digest := sha256.Sum256(nil)
	r := fixed(b)
	for _, epoch := range []uint64{0, 1, 100} {
		b.Run(fmt.Sprintf("custody/epoch=%d", epoch), func(b *testing.B) {
			ca := r.CA()
			s := Scope{App: app, Epoch: epoch, Instance: instance}
			for b.Loop() {
				key := must(r.AppKey(ctx, s))
				env, disk := must(r.EnvKey(ctx, s)), must(r.DiskKey(ctx, s))
				must(r.Sign(ctx, app[:], must(derive.K256Public(key.Bytes()))))
				must(ca.Sign(nil, digest[:], crypto.SHA256))
				must(must(r.AppCA(ctx, app)).Sign(nil, digest[:], crypto.SHA256))
				key.Wipe()
				env.Wipe()
				disk.Wipe()
			}
		})
	}
	b.Run("library/epoch=0", func(b *testing.B) {
		roots := derive.Roots{CA: sequence(1), K256: sequence(0x41)}
		ca := must(derive.P256FromScalar(roots.CA))
		for b.Loop() {
			key := must(roots.App(app))
			must(roots.Env(app))
			must(roots.Disk(app, instance))
			must(derive.Sign(roots.K256, app[:], must(derive.K256Public(key.Bytes()))))
			must(ecdsa.SignASN1(rand.Reader, ca, digest[:]))
			must(ecdsa.SignASN1(rand.Reader, must(roots.AppCA(app)), digest[:]))
		}
	})
}

// The farthest epoch that can be asked for: what one call may cost.
func BenchmarkFarthestEpoch(b *testing.B) {
	r := fixed(b)
	_, last := r.Epochs()
	for b.Loop() {
		must(r.EnvKey(ctx, Scope{App: app, Epoch: last}))
	}
}
