// SPDX-License-Identifier: Apache-2.0

package acpi

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// profile is what changed in the tables from one QEMU to another.
type profile struct {
	// edgeTriggered: every legacy interrupt is reported as edge triggered, in the
	// MADT and in the link devices. Intel's patch for TDX before QEMU had TDX
	// itself: "hw/i386: add option to forcibly report edge trigger in acpi tables",
	// in distributions' QEMU 8. Upstream's build of 9.2.1 does not have it.
	edgeTriggered bool

	// plainLabel: _DSM function 7 returns a name for devices that have none.
	// QEMU commit 0b053391985a ended it, and went to 9.2.1, 9.1.3 and 8.2.9 too.
	plainLabel bool

	// ejectAtOnce: CSCN reports a processor that is to be removed while it scans,
	// not afterwards. Ended in QEMU 10.0 ("cpuhp: make sure that remove events are
	// handled within the same SCI").
	ejectAtOnce bool

	// legacyCPUHotplug: PRES has an _INI that leaves the old interface for adding
	// processors. Ended in QEMU 11.0.
	legacyCPUHotplug bool

	// sharedSerialIRQ: COM1's interrupt is level triggered and shared. From QEMU
	// 11.1 on.
	sharedSerialIRQ bool
}

// oldest is the first release known here: 8.1 and older differ in more than a
// profile says. beyond is the first of which nothing is known.
var (
	oldest = release{8, 2, 0}
	beyond = release{11, 2, 0}
)

// profileOf returns the profile of a release. What is known is from
//
//   - logs of real TDs: 8.2.2, 9.2.1
//   - a register published by upstream: 9.1.0
//   - the QEMU itself: 10.0.2, 10.0.13, 11.1.3
//
// all of which the tests repeat, and for releases in between from QEMU's history.
func (s *Shape) profileOf() (profile, error) {
	r, err := parseRelease(s.QEMU)
	if err != nil {
		return profile{}, err
	}
	if r.before(oldest) || !r.before(beyond) {
		return profile{}, unsupported("qemu_version", "%s, want %s to before %s", s.QEMU, oldest, beyond)
	}
	if !s.PIC && r.before(release{9, 1, 0}) {
		// QEMU commit 292dd287e78e made the MADT say so; whether a patched build has it
		// cannot be told from its version.
		return profile{}, unsupported("pic", "off, before QEMU 9.1")
	}
	return profile{
		edgeTriggered: r.before(release{9, 2, 0}),
		plainLabel: r.before(release{8, 2, 9}) ||
			r.major == 9 && (r.minor == 0 || r.minor == 1 && r.patch < 3 || r.minor == 2 && r.patch < 1),
		ejectAtOnce:      r.before(release{10, 0, 0}),
		legacyCPUHotplug: r.before(release{11, 0, 0}),
		sharedSerialIRQ:  !r.before(release{11, 1, 0}),
	}, nil
}

// release is a QEMU version.
type release struct{ major, minor, patch int }

func (r release) String() string { return fmt.Sprintf("%d.%d.%d", r.major, r.minor, r.patch) }

func (r release) before(o release) bool {
	return cmp.Or(cmp.Compare(r.major, o.major), cmp.Compare(r.minor, o.minor), cmp.Compare(r.patch, o.patch)) < 0
}

func parseRelease(s string) (release, error) {
	var n [3]int
	parts := strings.Split(s, ".")
	bad := len(s) > 16 || len(parts) != len(n)
	for i := 0; i < len(n) && !bad; i++ {
		v, err := strconv.ParseUint(parts[i], 10, 16)
		n[i], bad = int(v), err != nil
	}
	if bad {
		return release{}, unsupported("qemu_version", "%.32q, want X.Y.Z", s)
	}
	return release{n[0], n[1], n[2]}, nil
}
