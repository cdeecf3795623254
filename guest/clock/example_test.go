// SPDX-License-Identifier: Apache-2.0

package clock_test

import (
	"context"
	"fmt"
	"time"

	"github.com/dstack-go/dstack/guest/clock"
)

// What the boot phase "time" does for a manifest with secure_time. The firewall must
// let out name resolution, TCP to the key exchanges and UDP to NTP by then.
func Example() {
	phase := func(ctx, life context.Context, log func(string)) error {
		roots, err := clock.ReadRoots("/etc/ssl/certs/ca-certificates.crt")
		if err != nil {
			return err
		}
		c, err := clock.New(clock.Config{
			Sources: clock.Sources(clock.DefaultServers(roots), clock.Linux{}), System: clock.Linux{},
			Bounds: []clock.LowerBound{{Time: time.Unix(1767225600, 0), Why: "the build of the image"}},
			OnGap:  func(clock.Gap) { /* lock what a lease guards, then renew it */ }, Log: log,
		})
		if err != nil {
			return err
		}
		proof, err := c.Prove(ctx)
		if err != nil {
			return err // time_unproven, time_disagreement, time_before_bound
		}
		log("time: nts: " + proof.String())
		go c.Keep(life)
		return nil
	}
	fmt.Println(phase != nil)
	// Output: true
}
