// SPDX-License-Identifier: Apache-2.0

//go:build dstack_sim

package main

import "github.com/dstack-go/dstack/attest/collect/sim"

func init() { drivers = append(drivers, sim.Driver()) }
