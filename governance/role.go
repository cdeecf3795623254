// SPDX-License-Identifier: Apache-2.0

package governance

import "slices"

// MayAsk reports whether a purpose belongs to a role: an app never asks for root keys,
// nor does a KMS for an app's.
func (r Role) MayAsk(p Purpose) bool {
	switch r {
	case App:
		return slices.Contains([]Purpose{Keys, Certificate, Renewal}, p)
	case KMS:
		return slices.Contains([]Purpose{Replication, Service, Source}, p)
	}
	return false
}
