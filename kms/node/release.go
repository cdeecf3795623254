// SPDX-License-Identifier: Apache-2.0

//go:build !dstack_sim

package node

import "github.com/dstack-go/dstack/governance/applicant"

// development admits development trust.
const development = false

// useDevRoots makes development roots count: here nothing does.
var useDevRoots func(*applicant.Judge, []byte) error
