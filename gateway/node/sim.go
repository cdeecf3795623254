// SPDX-License-Identifier: Apache-2.0

//go:build dstack_sim

package node

// development admits development trust.
const development = true
