// SPDX-License-Identifier: Apache-2.0

// Package clock gives the guest a time that its host cannot choose: it asks several
// NTS servers (RFC 8915) of different operators and believes what a majority of them
// agrees on.
//
// # Guarantees
//
// After [Clock.Prove] the real-time clock is within 2 s of the truth as long as fewer
// than half of the configured servers lie, or nothing is changed and the refusal has a
// code: time_unproven, time_disagreement, time_before_bound. The argument:
//
//   - An answer carries the server's time of sending. The guest made the request's
//     identifier fresh, so that moment lies between its own sending and receiving, both
//     read from the monotonic clock. With half of that span and the distance that the
//     server claims from its own reference, an answer is an interval; one wider than
//     1 s to each side is not used, so delaying packets gains the host no more than
//     that.
//   - The intervals of honest servers all contain the truth. What a majority of all
//     configured servers (not of those that the host lets answer) has in common lies
//     within the interval of an honest one, hence at most its width, 2 s, off. The
//     result is the median of that majority, kept inside what they have in common.
//   - At least [Required] servers must have answered, whatever the majority is.
//
// The real-time clock starts from the RTC, which is the host's, and is used for one
// thing: as the first guess at which moment to check certificates (below).
//
// # Certificates without a clock
//
// A certificate must be valid at a time, and the time is what is being found. Every
// chain is checked by crypto/tls in full, at some moment not before the highest lower
// bound: at the real-time clock's, and when the chain does not hold then, once more
// over a new connection at a moment when it does. Once a majority agrees, each chain
// that it used is checked again at the time found; an answer whose chain does not hold
// at that time is dropped, and the majority must stand without it. So the result is a
// time at which all certificates that vouch for it are valid. What is left to the host:
// with the private keys of a majority of operators, stolen together with certificates
// that had not expired at the highest lower bound, it can turn the clock back, no
// further than that bound. Revocation is not asked for; it would need a clock, too.
//
// Lower bounds are signed or measured facts that prove "not earlier than": the build
// of the image, the issue of TCB info, the time of an attested KMS ([Clock.Raise]).
// There is no upper bound: nothing signed can say that a moment has not come yet, so
// against a clock that runs ahead there is the majority alone.
//
// # While running
//
// [Clock.Keep] asks again every 17 minutes and slews or steps. It reports a gap when
// the machine did not run for longer than a limit (threats.md F02): suspended, stopped
// with its timers late, or stopped together with its monotonic clock, which shows only
// against authenticated time. The RTC is watched as a hint to ask at once.
//
// # Trust
//
// The servers' majority, the certificate authorities given for them, and the
// monotonic clock, which the TEE must provide (on TDX the TSC, whose rate and offset
// the module keeps). On a machine where the host can stop that clock, the time falls
// behind by as much until the next answer.
//
// # Attacker-controlled
//
// Name resolution, every packet and its delay, the RTC, and when the machine runs. A
// host that keeps the servers away costs the boot, not the truth.
//
// Packets are parsed and authenticated by github.com/beevik/nts, which by itself takes
// an answer without any authenticator for a good one and panics on some malformed ones.
// Every datagram therefore passes checkReply first, which lets only answers through
// whose header the library is bound to authenticate.
//
// Implements issue "Time", guest-os.md §2.7 and §5.1 step 4, threats.md F01 and F02.
package clock
