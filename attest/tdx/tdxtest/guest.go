// SPDX-License-Identifier: Apache-2.0

package tdxtest

import (
	"context"
	"crypto/sha256"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/mrconfig"
	"github.com/dstack-go/dstack/attest/tdx"
)

// Guest is a dstack guest on a platform: what it committed to at boot.
type Guest struct {
	Platform    *Platform
	AppID       dstack.AppID
	InstanceID  dstack.InstanceID
	ComposeHash dstack.ComposeHash
	ChannelSPKI []byte                // whose hash was committed before any app ran; nil for none
	NoConfig    bool                  // MRCONFIGID is zero
	Booting     bool                  // it has not got its keys yet: the log ends at boot-mr-done
	Provider    []byte                // payload of the event key-provider; nil for none
	Config      string                // vm_config; empty for {}
	Edit        func(*tdx.ReportBody) // last change before the quote is signed; may be nil
}

// Events returns the guest's runtime events.
func (g *Guest) Events() ([]eventlog.Event, error) {
	var events []eventlog.Event
	for _, e := range []struct {
		name    string
		payload []byte
	}{
		{eventlog.SystemPreparing, nil}, {eventlog.AppIDEvent, g.AppID[:]}, {eventlog.ComposeHashEvent, g.ComposeHash[:]},
		{eventlog.InstanceIDEvent, g.InstanceID[:]}, {eventlog.BootMRDone, nil}, {eventlog.KeyProvider, g.Provider}, {eventlog.SystemChannelKey, nil}, {eventlog.SystemReady, nil},
	} {
		if e.name == eventlog.KeyProvider && g.Provider == nil {
			continue
		}
		if e.name == eventlog.SystemChannelKey {
			if g.ChannelSPKI == nil {
				continue
			}
			sum := sha256.Sum256(g.ChannelSPKI)
			e.payload = sum[:]
		}
		ev, err := eventlog.RuntimeV1(e.name, e.payload)
		if err != nil {
			return nil, err
		}
		events = append(events, ev)
		if g.Booting && e.name == eventlog.BootMRDone {
			break
		}
	}
	return events, nil
}

// Attest returns a container with a quote over data, as the guest's system makes
// it, and just as well what any of its apps gets for 64 bytes of its choice.
func (g *Guest) Attest(_ context.Context, data dstack.ReportData) ([]byte, error) {
	events, err := g.Events()
	if err != nil {
		return nil, err
	}
	rtmr, err := eventlog.Replay(events, eventlog.RuntimeIMR)
	if err != nil {
		return nil, err
	}
	body := g.Platform.Body()
	body.RTMR[eventlog.RuntimeIMR], body.ReportData = rtmr, data
	if !g.NoConfig {
		body.MRConfigID = mrconfig.IDv1(g.ComposeHash)
	}
	if g.Edit != nil {
		g.Edit(&body)
	}
	config := g.Config
	if config == "" {
		config = "{}"
	}
	return container.EncodeV1(&attest.Evidence{
		TEE: dstack.TDX, Quote: g.Platform.Quote(body), EventLog: events, ReportData: data, Config: config,
	})
}
