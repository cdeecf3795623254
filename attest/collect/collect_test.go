// SPDX-License-Identifier: Apache-2.0

package collect

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

type fakeTEE string

func (f fakeTEE) Kind() dstack.TEE { return dstack.TEE(f) }
func (f fakeTEE) Quote(context.Context, dstack.ReportData) ([]byte, error) {
	return []byte(f), nil
}

func present(name string) Driver {
	return Driver{Name: name, Open: func(context.Context, Env) (TEE, error) { return fakeTEE(name), nil }}
}

func failing(name string, err error) Driver {
	return Driver{Name: name, Open: func(context.Context, Env) (TEE, error) { return nil, err }}
}

func TestOpen(t *testing.T) {
	absent := fmt.Errorf("look for device: %w", ErrAbsent)
	broken := errors.New("device answers nonsense")
	for _, test := range []struct {
		name    string
		drivers []Driver
		want    string
		code    string
		mention string
	}{
		{"takes the first TEE present", []Driver{failing("a", absent), present("b"), present("c")}, "b", "", ""},
		{"refuses when every driver finds nothing", []Driver{failing("a", ErrAbsent), failing("b", absent)}, "", "no_tee", "a, b: look for device"},
		{"refuses without drivers", nil, "", "no_tee", "no TEE driver"},
		{"does not fall through to a weaker TEE when the first one is broken", []Driver{failing("a", broken), present("b")}, "", "tee_failed", "nonsense"},
	} {
		t.Run(test.name, func(t *testing.T) {
			tee, err := Open(t.Context(), Env{}, test.drivers)
			if test.code == "" {
				if err != nil || string(tee.Kind()) != test.want {
					t.Fatalf("Open = %v, %v; want %s", tee, err, test.want)
				}
				return
			}
			if fault.Code(err) != test.code || !strings.Contains(err.Error(), test.mention) {
				t.Fatalf("error %q with code %q; want code %q mentioning %q", err, fault.Code(err), test.code, test.mention)
			}
		})
	}
}
