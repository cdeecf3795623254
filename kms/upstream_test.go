// SPDX-License-Identifier: Apache-2.0

package kms_test

import (
	"testing"

	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/kms"
)

// A client that knows upstream's protocol from its description alone gets its keys.
func TestUpstreamsClient(t *testing.T) {
	k := kms.NewKnown(t)
	runUpstreamClient(t, upstreamFixture{
		addr: k.Addr, name: k.Name, now: k.Now, evidence: k.Evidence, stranger: k.Stranger,
		app: k.App[:], instance: k.Instance[:], image: k.Image[:], version: k.Version,
		vectors: func(name string) []byte { return testkit.Vectors(t, name) },
	})
}
