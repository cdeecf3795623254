// SPDX-License-Identifier: Apache-2.0

// Package collect is the guest's side of attestation: it asks the TEE the guest
// runs in for evidence.
//
// A [TEE] signs quotes. What else a TEE can do is an optional capability that a
// caller finds by a type assertion: an [Extender] has a runtime register, a
// [Logger] has the launch events. A TEE without a register (SEV-SNP) is not an
// Extender, and nothing pretends otherwise.
//
// Each TEE is one [Driver] in a package below this one. Which drivers a binary
// has is decided by what it links, never by configuration: there is no
// environment variable, file or flag by which a guest can be pointed at another
// source of quotes (threats.md B13).
//
// Guarantees: [Open] takes the first TEE present in the order given, and never
// goes on to the next one when a TEE that is present fails. Nothing here verifies
// evidence; the relying party does. Implements design.md §3 (boot phase "tee")
// and spec/attestation.md §1.1 and §1.2.
package collect

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/internal/fault"
)

// TEE produces evidence of the machine it belongs to. It is safe for concurrent
// use.
type TEE interface {
	// Kind names the TEE.
	Kind() dstack.TEE
	// Quote returns the raw hardware evidence over the 64 bytes given: for TDX, a
	// quote with its signature data.
	Quote(ctx context.Context, data dstack.ReportData) ([]byte, error)
}

// Extender is a TEE with runtime registers. Only registers 2 and 3 can be
// extended by the OS (spec/attestation.md §1.2).
type Extender interface {
	// Extend sets register = SHA-384(register ‖ digest). When it returns nil, every
	// later quote shows the new value. When it returns an error the register may or
	// may not have been extended: read it back through a quote before going on.
	Extend(ctx context.Context, register int, digest dstack.Measurement) error
}

// Logger is a TEE that holds the events of its own launch.
type Logger interface {
	// BootLog returns the events with imr 0, 1 and 2, in order.
	BootLog(ctx context.Context) ([]eventlog.Event, error)
}

// Env is what drivers may use of the guest.
type Env struct {
	// Dial opens the hostlink stream of that name. It is nil where there is no
	// hostlink.
	Dial func(ctx context.Context, stream string) (net.Conn, error)
}

// Driver finds one kind of TEE.
type Driver struct {
	Name string
	// Open returns the TEE, ErrAbsent when this machine has no such TEE, or another
	// error when it has one that does not work.
	Open func(ctx context.Context, env Env) (TEE, error)
}

// ErrAbsent says that the machine has no TEE of the driver's kind.
var ErrAbsent = errors.New("no such TEE")

// Open returns the first TEE that is present. A TEE that is present but fails is
// an error, code tee_failed: falling through would let a host choose the weaker
// TEE by breaking the stronger one. Without any, the code is no_tee.
func Open(ctx context.Context, env Env, drivers []Driver) (TEE, error) {
	var tried []string
	for _, driver := range drivers {
		tee, err := driver.Open(ctx, env)
		if err == nil {
			return tee, nil
		}
		if !errors.Is(err, ErrAbsent) {
			return nil, fault.Wrap(err, "tee_failed", "the %s of this machine does not work", driver.Name)
		}
		look := driver.Name
		if err != ErrAbsent { // it says more than that
			look += ": " + strings.ReplaceAll(err.Error(), "\n", ": ")
		}
		tried = append(tried, look)
	}
	looked := "this binary has no TEE driver"
	if len(tried) > 0 {
		looked = "looked for " + strings.Join(tried, ", ")
	}
	return nil, fault.New("no_tee", "this machine has no TEE (%s)", looked).
		WithFix("run the image on a machine with a TEE, or use the sim image for development")
}
