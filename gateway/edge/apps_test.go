// SPDX-License-Identifier: Apache-2.0

package edge

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/hostname"
)

// accesses is an access log in memory.
type accesses struct {
	mu  sync.Mutex
	all []Ended
}

func (a *accesses) take(e Ended) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, e)
}

func (a *accesses) those() []Ended {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all)
}

func TestConnectionsAreCountedForTheirApp(t *testing.T) {
	log := &accesses{}
	r := newRig(t, func(c *Config) { c.Ended = log.take; c.Timeouts.Idle = time.Second })
	one := r.instance(1, 1)
	r.instance(2, 2)
	r.serve(1, 80, echo)
	r.serve(2, 443, tlsEcho)
	conn, err := r.tls(host(appID(1), ""))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, conn, 1000)
	quiet, err := r.tls(host(appID(2), "-s"))
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, quiet, 50_000)
	quiet.Close()
	if conn, err = r.tls(host(appID(1), "")); err != nil {
		t.Fatal(err)
	}
	io.ReadAll(conn) // until it is idle
	if _, err = r.tls(host(appID(3), "")); err == nil {
		t.Error("an app that is not there answered")
	}
	r.eventually(func() bool { return len(log.those()) == 4 }, func() string { return fmt.Sprintf("%+v", log.those()) })

	byApp := map[dstack.AppID]AppStats{}
	for _, s := range r.edge.Apps() {
		byApp[s.App] = s
	}
	s := byApp[appID(1)]
	if s.Joined != [3]uint64{hostname.Terminate: 2} || s.Up != [3]uint64{hostname.Terminate: 1000} || s.Down != s.Up || s.Relaying != [3]int64{} {
		t.Errorf("app 1: %+v", s)
	}
	// TLS ends at the app there: more bytes than were said.
	if s := byApp[appID(2)]; s.Joined != [3]uint64{hostname.Passthrough: 1} || s.Up[hostname.Passthrough] < 50_500 || s.Down[hostname.Passthrough] < 50_500 {
		t.Errorf("app 2: %+v", s)
	}
	if total := r.edge.Stats(); total.BytesUp != byApp[appID(1)].Up[0]+byApp[appID(2)].Up[2] || total.BytesDown != byApp[appID(1)].Down[0]+byApp[appID(2)].Down[2] {
		t.Errorf("the apps' bytes are not those of all: %+v, %+v", total, byApp)
	}
	if len(byApp) != 3 || byApp[dstack.AppID{}].Joined != [3]uint64{} {
		t.Errorf("%+v", byApp)
	}

	var ended, idle, refused int
	for _, e := range log.those() {
		switch {
		case e.Code == "route_unknown" && e.App == (dstack.AppID{}) && e.How == "":
			refused++
		case e.How == "idle" && e.App == appID(1) && e.Up == 0:
			idle++
		case e.How == "end" && e.App == appID(1) && e.Instance == one && e.Port == 80 && e.Up == 1000 && e.Down == 1000 && e.Took > 0 && e.Client.Addr().IsLoopback():
			ended++
		case e.How == "end" && e.App == appID(2) && e.Mode == hostname.Passthrough && e.Port == 443:
			ended++
		default:
			t.Errorf("%+v", e)
		}
	}
	if ended != 2 || idle != 1 || refused != 1 {
		t.Errorf("%d ended, %d idle, %d refused", ended, idle, refused)
	}
}

func TestThreat_K08_AppsBeyondTheCapAreCountedTogether(t *testing.T) {
	var a apps
	now := time.Unix(1000, 0)
	id := func(n int) dstack.AppID { return dstack.AppID{1, byte(n >> 8), byte(n)} }
	held := a.begin(id(0), hostname.Terminate, now)
	for n := 1; n < 4*MaxApps; n++ {
		a.end(a.begin(id(n), hostname.Terminate, now), hostname.Terminate, now)
	}
	if len(a.each) != MaxApps || a.other.joined[hostname.Terminate].Load() != 3*MaxApps {
		t.Errorf("%d apps have counters, %d connections are of the others", len(a.each), a.other.joined[hostname.Terminate].Load())
	}
	// After a rest the counters are others', but never those of an app with a connection.
	later := now.Add(appRest)
	for n := 4 * MaxApps; n < 8*MaxApps; n++ {
		a.end(a.begin(id(n), hostname.Terminate, later), hostname.Terminate, later)
	}
	if len(a.each) != MaxApps || a.each[id(0)] != held || a.each[id(4*MaxApps)] == nil {
		t.Errorf("%d apps have counters; the connected one: %v", len(a.each), a.each[id(0)] == held)
	}
}
