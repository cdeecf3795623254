// SPDX-License-Identifier: Apache-2.0

// Package engine runs the container engine of the guest: dockerd with containerd in
// its process, the loopback registry it pulls from, and docker compose.
//
// The engine is reached through its unix socket only. Images come from the host
// over hostlink, through a read-only registry on the guest's own loopback; the host
// is not believed: every image is pulled by the digest that the measured manifest
// names, and its identity in the image store is compared with that digest before
// it gets the name that the compose file uses. Compose then runs with pulling
// switched off.
//
// Attacker-controlled: what the registry stream answers; what containers do.
// Trusted: the engine's binaries, which come from the measured root.
// Implements design.md §3, spec/guest-os.md §8.3, guest-os-prototype.md §9.
package engine
