// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"time"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// Verify is not complete yet.
func Verify(quote []byte, col collateral.TDX, roots []Roots, at time.Time) (*attest.Claims, error) {
	return nil, fault.New("not_implemented", "TDX verification")
}
