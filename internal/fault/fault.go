// SPDX-License-Identifier: Apache-2.0

// Package fault is the error that people and programs act on: a stable code, a
// sentence saying what is wrong, and the fix.
//
// Codes are lowercase words joined by underscores; they never change meaning and
// are what tests, `--json` consumers and the boot report compare. An error
// without a code is a bug in this software or a failure of the machine.
package fault

import (
	"errors"
	"fmt"
)

// Error is an error with a stable code.
type Error struct {
	Code    string // such as port_busy
	Message string // what is wrong, naming the thing
	Fix     string // what to do about it; may be empty
	Err     error  // the cause; may be nil
}

// New returns an error with a code, a formatted message and no fix.
func New(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Wrap returns an error with a code that has err as its cause.
func Wrap(err error, code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...), Err: err}
}

// WithFix returns the same error carrying the given remedy.
func (e *Error) WithFix(format string, args ...any) *Error {
	c := *e
	c.Fix = fmt.Sprintf(format, args...)
	return &c
}

// Error returns the message and its cause, without code and fix.
func (e *Error) Error() string {
	if e.Err != nil {
		return e.Message + ": " + e.Err.Error()
	}
	return e.Message
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Code returns the code of the outermost Error in err's chain, or "".
func Code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Fix returns the first non-empty remedy in err's chain, or "".
func Fix(err error) string {
	for err != nil {
		var e *Error
		if !errors.As(err, &e) {
			return ""
		}
		if e.Fix != "" {
			return e.Fix
		}
		err = e.Err
	}
	return ""
}
