// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Linux is the machine's own clocks; setting them takes CAP_SYS_TIME.
type Linux struct{}

var _ System = Linux{}

func read(id int32) unix.Timespec {
	var ts unix.Timespec
	// It fails for a clock that the kernel lacks or a bad address only.
	_ = unix.ClockGettime(id, &ts)
	return ts
}

func (Linux) Real() time.Time {
	ts := read(unix.CLOCK_REALTIME)
	return time.Unix(ts.Unix())
}

func (Linux) Monotonic() time.Duration {
	ts := read(unix.CLOCK_MONOTONIC)
	return time.Duration(ts.Nano())
}

func (Linux) Boottime() time.Duration {
	ts := read(unix.CLOCK_BOOTTIME)
	return time.Duration(ts.Nano())
}

// RTC reads /dev/rtc0, to the second.
func (Linux) RTC() (time.Time, error) {
	fd, err := unix.Open("/dev/rtc0", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return time.Time{}, err
	}
	defer unix.Close(fd)
	t, err := unix.IoctlGetRTCTime(fd)
	if err != nil {
		return time.Time{}, err
	}
	return time.Date(int(t.Year)+1900, time.Month(t.Mon+1), int(t.Mday), int(t.Hour), int(t.Min), int(t.Sec), 0, time.UTC), nil
}

func (Linux) Set(t time.Time) error {
	ts, err := unix.TimeToTimespec(t)
	if err != nil {
		return err
	}
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// adjOffsetSingleshot is ADJ_OFFSET_SINGLESHOT of include/uapi/linux/timex.h: adjtime(3),
// in microseconds, at 500 ppm.
const adjOffsetSingleshot = 0x8001

func (Linux) Slew(offset time.Duration) error {
	_, err := unix.Adjtimex(&unix.Timex{Modes: adjOffsetSingleshot, Offset: offset.Microseconds()})
	return err
}
