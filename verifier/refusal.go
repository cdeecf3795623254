// SPDX-License-Identifier: Apache-2.0

package verifier

import "github.com/dstack-go/dstack/internal/fault"

// Refusal returns the errors of a verdict that is not accepted as one: the code and the
// fix of the first, and the messages of all. Code channel_appraisal if it names none.
func (v *Verdict) Refusal() error {
	code, text, fix := "channel_appraisal", "", ""
	for _, f := range v.Findings {
		if f.Level != Error {
			continue
		}
		if text == "" {
			code, text, fix = f.Code, f.Message, f.Fix
		} else {
			text += "; " + f.Message
		}
	}
	return (&fault.Error{Code: code, Message: "the evidence is refused: " + text}).WithFix("%s", fix)
}
