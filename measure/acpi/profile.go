// SPDX-License-Identifier: Apache-2.0

package acpi

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

// newest is the first release this package knows nothing about.
var newest = release{11, 2, 0}

func profileOf(version string) (profile, error) {
	r, err := parseRelease(version)
	if err != nil {
		return profile{}, err
	}
	if r.before(8, 0, 0) || !r.before(newest.major, newest.minor, newest.patch) {
		return profile{}, unsupported("qemu_version", "%s, want 8.0.0 to before %d.%d.%d", version, newest.major, newest.minor, newest.patch)
	}
	return profile{
		edgeTriggered: r.before(9, 2, 0),
		plainLabel: r.before(8, 2, 9) ||
			r.major == 9 && (r.minor == 0 || r.minor == 1 && r.patch < 3 || r.minor == 2 && r.patch < 1),
		ejectAtOnce:      r.before(10, 0, 0),
		legacyCPUHotplug: r.before(11, 0, 0),
		sharedSerialIRQ:  !r.before(11, 1, 0),
	}, nil
}
