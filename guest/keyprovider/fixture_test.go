// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx/tdxtest"
	"github.com/dstack-go/dstack/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	testApp      = dstack.AppID(bytes.Repeat([]byte{0x11}, 20))
	testInstance = bytes.Repeat([]byte{0x33}, 20)
)

// guest makes evidence of a simulated TDX guest.
type guest struct {
	t        *testing.T
	platform *tdxtest.Platform
	mu       sync.Mutex
	made     []dstack.ReportData
	wrong    bool // quotes over other report data
}

func newGuest(t *testing.T) *guest {
	return &guest{t: t, platform: tdxtest.New(t)}
}

func (g *guest) Attest(_ context.Context, data dstack.ReportData) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.made = append(g.made, data)
	var log []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{"system-preparing", nil}, {"app-id", testApp[:]}, {"compose-hash", bytes.Repeat([]byte{0x22}, 32)},
		{"instance-id", testInstance}, {"boot-mr-done", nil},
	} {
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			return nil, err
		}
		log = append(log, ev)
	}
	body := g.platform.Body()
	body.ReportData = data
	if g.wrong {
		body.ReportData[0] ^= 1
	}
	return container.Encode(&attest.Evidence{
		TEE: dstack.TDX, Quote: g.platform.Quote(body), EventLog: log, ReportData: data, ReportDataClaimed: true,
	})
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("error %v (code %q), want code %q", err, fault.Code(err), code)
	}
}
