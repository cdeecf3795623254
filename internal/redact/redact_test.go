// SPDX-License-Identifier: Apache-2.0

package redact

import (
	"strconv"
	"testing"
)

func TestValuesAreTakenOut(t *testing.T) {
	r := New(map[string]string{"PASSWORD": "hunter2", "LONGER": "hunter2-and-more", "KEY": "first line\nsecond line\n", "SHORT": "a", "TAB": "x\ty\tz", "EMPTY": "", "SPACES": "     "})
	for text, want := range map[string]string{
		"parsing \"hunter2\": no":   `parsing "[PASSWORD]": no`,
		"hunter2-and-more":          "[LONGER]",
		"hunter2hunter2":            "[PASSWORD][PASSWORD]",
		"got second line; a":        "got [KEY]; a",
		strconv.Quote("x\ty\tz"):    `"[TAB]"`,
		"first line\nsecond line\n": "[KEY]",
		"nothing of it":             "nothing of it",
		"":                          "",
	} {
		if got := r.Text(text); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
	if (*Redactor)(nil).Text("hunter2") != "hunter2" || New(nil).Text("hunter2") != "hunter2" {
		t.Error("nothing to take out, and something is")
	}
}
