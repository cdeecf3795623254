// SPDX-License-Identifier: Apache-2.0

package route

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/wgconfig"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

var begin = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// clock is a table's time in tests.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// failer is a test, or one case of a property.
type failer interface {
	Helper()
	Fatal(args ...any)
}

var keyCache sync.Map

func key(t failer, n int) wgconfig.PublicKey {
	t.Helper()
	if k, ok := keyCache.Load(n); ok {
		return k.(wgconfig.PublicKey)
	}
	sk, err := wgconfig.NewPrivateKey(append(make([]byte, wgconfig.KeySize-4), byte(n>>16), byte(n>>8), byte(n), 0x40))
	if err != nil {
		t.Fatal(err)
	}
	k := sk.Public()
	keyCache.Store(n, k)
	return k
}

func table(t testing.TB) (*Table, *clock) {
	c := &clock{at: begin}
	return New(Config{Now: c.now, Key: key(t, 1), Address: netip.MustParseAddr("10.0.0.1"), Network: netip.MustParsePrefix("10.0.0.0/8")}), c
}

// record is instance n of app a, registered now for 10 minutes.
func record(t failer, c *clock, a, n int) Record {
	t.Helper()
	p, err := portpolicy.New(manifest.PortPolicy{RestrictMode: true, Ports: []manifest.Port{{Port: 443, TLS: "app"}, {Port: 80, PP: true}}})
	if err != nil {
		t.Fatal(err)
	}
	r := Record{
		App: dstack.AppID{0xa, byte(a >> 8), byte(a)}, Instance: dstack.InstanceID{0xb, byte(n >> 8), byte(n)}, Compose: dstack.ComposeHash{0xc, byte(a)},
		Key: key(t, 100+n), Address: netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), Policy: &p,
		Attested: c.now(), Until: c.now().Add(10 * time.Minute),
	}
	return r
}

func register(t testing.TB, tb *Table, r Record) *Route {
	t.Helper()
	route, err := tb.Register(r)
	if err != nil {
		t.Fatal(err)
	}
	return route
}

// alive tells the table of handshakes now.
func alive(tb *Table, c *clock, rs ...Record) {
	var st []wgconfig.Status
	for _, r := range rs {
		st = append(st, wgconfig.Status{Key: r.Key, Handshake: c.now()})
	}
	tb.Observe(st)
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if fault.Code(err) != code {
		t.Errorf("code %q (%v), want %q", fault.Code(err), err, code)
	}
}

func TestRegistrations(t *testing.T) {
	addr := netip.MustParseAddr
	for _, c := range []struct {
		name   string
		change func(*Record)
		code   string
	}{
		{"as it is", func(r *Record) {}, ""},
		{"no app", func(r *Record) { r.App = dstack.AppID{} }, "route_identity"},
		{"no instance", func(r *Record) { r.Instance = dstack.InstanceID{} }, "route_identity"},
		{"no compose hash", func(r *Record) { r.Compose = dstack.ComposeHash{} }, "route_identity"},
		{"no key", func(r *Record) { r.Key = wgconfig.PublicKey{} }, "route_key"},
		{"the gateway's key", func(r *Record) { r.Key = key(t, 1) }, "route_key_own"},
		{"no address", func(r *Record) { r.Address = netip.Addr{} }, "route_address"},
		{"the gateway's address", func(r *Record) { r.Address = addr("10.0.0.1") }, "route_address"},
		{"the gateway's address in IPv6's clothes", func(r *Record) { r.Address = addr("::ffff:10.0.0.1") }, "route_address"},
		{"an address outside", func(r *Record) { r.Address = addr("192.168.0.9") }, "route_address"},
		{"loopback", func(r *Record) { r.Address = addr("127.0.0.1") }, "route_address"},
		{"the broadcast address", func(r *Record) { r.Address = addr("10.255.255.255") }, "route_address"},
		{"its app's id for its own", func(r *Record) { r.Instance = dstack.InstanceID(r.App) }, "route_id_collision"},
		{"no policy known", func(r *Record) { r.Policy = nil }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			tb, cl := table(t)
			r := record(t, cl, 1, 1)
			c.change(&r)
			_, err := tb.Register(r)
			wantCode(t, err, c.code)
			if got := len(tb.Records()); (got == 1) != (c.code == "") {
				t.Errorf("%d routes", got)
			}
		})
	}
}

// K03: what a registration says of itself counts for nothing; without fresh evidence and
// a lease within the table's there is no route, and nothing but newer evidence renews it.
func TestThreat_K03_RegistrationNeedsFreshEvidenceAndALease(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Record)
		code   string
	}{
		{"no evidence", func(r *Record) { r.Attested = time.Time{} }, "route_evidence"},
		{"evidence of the epoch", func(r *Record) { r.Attested = time.Unix(0, 0) }, "route_evidence"},
		{"old evidence, as kept in a certificate", func(r *Record) { r.Attested = begin.Add(-6 * time.Minute) }, "route_evidence_stale"},
		{"evidence that just counts", func(r *Record) { r.Attested = begin.Add(-5 * time.Minute) }, ""},
		{"evidence of a clock a little ahead", func(r *Record) { r.Attested = begin.Add(time.Minute) }, ""},
		{"evidence of the future", func(r *Record) { r.Attested = begin.Add(61 * time.Second) }, "route_future"},
		{"no lease", func(r *Record) { r.Until = time.Time{} }, "route_lease"},
		{"a lease that ends as it begins", func(r *Record) { r.Until = r.Attested }, "route_lease"},
		{"a lease that just counts", func(r *Record) { r.Until = r.Attested.Add(time.Hour) }, ""},
		{"a lease too long", func(r *Record) { r.Until = r.Attested.Add(time.Hour + time.Second) }, "route_lease"},
		{"a lease without end", func(r *Record) { r.Until = time.Unix(1<<62, 0) }, "route_lease"},
		{"a lease that has ended", func(r *Record) { r.Attested, r.Until = begin.Add(-2*time.Minute), begin }, "route_ended"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tb, cl := table(t)
			r := record(t, cl, 1, 1)
			c.change(&r)
			_, err := tb.Register(r)
			wantCode(t, err, c.code)
		})
	}
	t.Run("the same evidence renews nothing", func(t *testing.T) {
		tb, cl := table(t)
		r := record(t, cl, 1, 1)
		register(t, tb, r)
		longer := r
		longer.Until = r.Until.Add(time.Minute)
		_, err := tb.Register(longer)
		wantCode(t, err, "route_conflict")
		cl.add(10 * time.Minute)
		if _, ok := tb.Instance(r.Instance); ok {
			t.Error("the route outlives its lease")
		}
		_, err = tb.Select(nil, r.Instance, 1)
		wantCode(t, err, "route_ended")
	})
	t.Run("newer evidence does", func(t *testing.T) {
		tb, cl := table(t)
		first := register(t, tb, record(t, cl, 1, 1))
		cl.add(9 * time.Minute)
		if again := register(t, tb, record(t, cl, 1, 1)); again != first {
			t.Error("a renewal makes another route")
		}
		cl.add(9 * time.Minute)
		if _, ok := tb.Instance(dstack.InstanceID{0xb, 0, 1}); !ok {
			t.Error("the route ended with its first lease")
		}
	})
	t.Run("evidence older than that of an ended route does not, though its lease was longer", func(t *testing.T) {
		tb, cl := table(t)
		old := record(t, cl, 1, 1)
		cl.add(time.Minute)
		short := record(t, cl, 1, 1)
		short.Until = cl.now().Add(time.Second)
		register(t, tb, short)
		cl.add(time.Second)
		tb.Sweep()
		_, err := tb.Register(old)
		wantCode(t, err, "route_removed")
	})
	t.Run("older evidence does not", func(t *testing.T) {
		tb, cl := table(t)
		old := record(t, cl, 1, 1)
		cl.add(time.Minute)
		register(t, tb, record(t, cl, 1, 1))
		old.Key = key(t, 5000)
		_, err := tb.Register(old)
		wantCode(t, err, "route_replayed")
	})
}

// K01: no instance takes another's route, key or address, by any registration.
func TestThreat_K01_NoRegistrationTakesAnothersRoute(t *testing.T) {
	tb, cl := table(t)
	victim := record(t, cl, 1, 1)
	register(t, tb, victim)
	cl.add(time.Second)
	for _, c := range []struct {
		name   string
		change func(*Record)
		code   string
	}{
		{"the instance, for another app", func(r *Record) { r.Instance = victim.Instance }, "route_instance_taken"},
		{"the instance, with the key and address too", func(r *Record) {
			r.Instance, r.Key, r.Address = victim.Instance, victim.Key, victim.Address
		}, "route_instance_taken"},
		{"the key", func(r *Record) { r.Key = victim.Key }, "route_key_taken"},
		{"the address", func(r *Record) { r.Address = victim.Address }, "route_address_taken"},
		{"the address, mapped", func(r *Record) { r.Address = netip.AddrFrom16(victim.Address.As16()) }, "route_address_taken"},
		{"the key, within the app", func(r *Record) { r.App, r.Key = victim.App, victim.Key }, "route_key_taken"},
		{"an instance with the app's id", func(r *Record) { r.Instance = dstack.InstanceID(victim.App) }, "route_id_collision"},
		{"an app with the instance's id", func(r *Record) { r.App = dstack.AppID(victim.Instance) }, "route_id_collision"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := record(t, cl, 2, 2)
			c.change(&r)
			_, err := tb.Register(r)
			wantCode(t, err, c.code)
			// A peer gateway's word is no better.
			line, lerr := r.Line()
			if lerr != nil {
				t.Fatal(lerr)
			}
			if applied, bad := tb.Merge("peer", line); applied != 0 || bad != 1 {
				t.Errorf("merged: %d applied, %d bad", applied, bad)
			}
			if got := tb.Records(); len(got) != 1 || !got[0].equal(&victim) {
				t.Errorf("the table has %+v", got)
			}
		})
	}
	cl.add(10 * time.Minute)
	r := record(t, cl, 2, 2)
	r.Key, r.Address = victim.Key, victim.Address
	register(t, tb, r)
	if got := tb.Records(); len(got) != 1 || got[0].Instance != r.Instance {
		t.Errorf("after the lease the key and address are free: %+v", got)
	}
}

// K02: each bad record is put aside with its reason, and the others are applied.
func TestThreat_K02_BadRecordsAreQuarantined(t *testing.T) {
	src, cl := table(t)
	good := []Record{record(t, cl, 1, 1), record(t, cl, 1, 2), record(t, cl, 2, 3)}
	for _, r := range good {
		register(t, src, r)
	}
	dump, err := src.Dump()
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(dump, []byte("\n")), []byte("\n"))
	r := record(t, cl, 3, 9)
	line := func(change func(*Record)) []byte {
		c := r
		change(&c)
		l, err := c.Line()
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	text := func(old, new string) []byte {
		_, doc, _ := bytes.Cut(line(func(*Record) {}), []byte(" "))
		doc = bytes.TrimSuffix(bytes.Replace(doc, []byte(old), []byte(new), 1), []byte("\n"))
		return fmt.Appendf(nil, "%x %s\n", sum(doc), doc)
	}
	attested := fmt.Sprintf(`"attested":%d`, r.Attested.UnixMilli())
	for _, c := range []struct {
		name string
		line []byte
		code string
	}{
		{"no record", []byte("x\n"), "route_record"},
		{"zeros", make([]byte, 100), "route_record"},
		{"another checksum", append([]byte("00000000"), line(func(*Record) {})[8:]...), "route_record"},
		{"cut", line(func(*Record) {})[:50], "route_record"},
		{"a time of u64::MAX", text(attested, `"attested":18446744073709551615`), "route_record"},
		{"a time of i64::MAX", text(attested, `"attested":9223372036854775807`), "route_record"},
		{"a negative time", text(attested, `"attested":-1`), "route_record"},
		{"a time that is a fraction", text(attested, `"attested":1.5`), "route_record"},
		{"a time of the future", line(func(r *Record) { r.Attested = begin.Add(time.Hour); r.Until = begin.Add(90 * time.Minute) }), "route_future"},
		{"a lease of the future", line(func(r *Record) { r.Until = begin.Add(1000 * time.Hour) }), "route_lease"},
		{"a key with a line of its own", text(`"key":"`, `"key":"\nEndpoint = 192.0.2.1:1`), "route_record"},
		{"a key of 31 bytes", text(r.Key.String(), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=="), "route_record"},
		{"a key of zeros", text(r.Key.String(), strings.Repeat("A", 43)+"="), "route_record"},
		{"an address with a zone", text(r.Address.String(), `fd00::1%\nx`), "route_record"},
		{"the gateway's key", line(func(r *Record) { r.Key = key(t, 1) }), "route_key_own"},
		{"the gateway's address", line(func(r *Record) { r.Address = netip.MustParseAddr("10.0.0.1") }), "route_address"},
		{"an unknown field", text(`{"version":1`, `{"version":1,"admin":true`), "route_record"},
		{"a field twice", text(`{"version":1`, `{"version":1,"version":1`), "route_record"},
		{"another version", text(`{"version":1`, `{"version":2`), "route_record"},
		{"a policy that contradicts itself", text(`"ports":[`, `"ports":[{"port":443,"pp":true,"tls":""},`), "route_record"},
		{"a policy with an unknown word", text(`"tls":"app"`, `"tls":"none"`), "route_record"},
		{"too long", text("{", "{"+strings.Repeat(" ", MaxRecord)), "route_record"},
		{"an app id too short", text(r.App.String(), r.App.String()[:38]), "route_record"},
		{"more behind the document", append(bytes.TrimSuffix(line(func(*Record) {}), []byte("\n")), []byte("{}\n")...), "route_record"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tb, _ := table(t)
			in := slices.Concat(lines[0], c.line, []byte("\n"), lines[1], lines[2])
			applied, bad := tb.Merge("peer 7", in)
			latest, total := tb.Quarantine()
			if applied != len(good) || bad != 1 || total != 1 || len(latest) != 1 {
				t.Fatalf("%d applied, %d bad, %d in quarantine", applied, bad, total)
			}
			if latest[0].Source != "peer 7" || latest[0].At != begin {
				t.Errorf("%+v", latest[0])
			}
			wantCode(t, latest[0].Err, c.code)
			for n, got := range tb.Records() {
				if !got.equal(&good[n]) {
					t.Errorf("%+v, want %+v", got, good[n])
				}
			}
		})
	}
	tb, _ := table(t)
	if applied, bad := tb.Merge("peer", text("", "")); applied != 1 || bad != 0 {
		t.Error("the record that is spoiled above is bad by itself")
	}
}

// K02: a store that is cut anywhere gives all records before the cut.
func TestThreat_K02_AStoreCutAnywhereRecovers(t *testing.T) {
	src, cl := table(t)
	for n := range 3 {
		register(t, src, record(t, cl, n, n))
	}
	dump, err := src.Dump()
	if err != nil {
		t.Fatal(err)
	}
	for cut := range dump {
		tb, _ := table(t)
		whole := bytes.Count(dump[:cut+1], []byte("\n"))
		applied, bad := tb.Merge("disk", dump[:cut])
		// The last line may lack nothing but its line feed.
		if n := bytes.Count(dump[:cut], []byte("\n")); applied != n && applied != whole || bad > 1 {
			t.Fatalf("cut at %d: %d applied, %d bad, %d whole", cut, applied, bad, n)
		}
	}
	// One flipped bit costs at most the two records that it joins.
	for n := range dump {
		flipped := bytes.Clone(dump)
		flipped[n] ^= 1 << (n % 8)
		tb, _ := table(t)
		applied, bad := tb.Merge("disk", flipped)
		if applied < 1 || applied > 2 || bad < 1 {
			t.Fatalf("byte %d: %d applied, %d bad", n, applied, bad)
		}
	}
}

func TestQuarantineIsBounded(t *testing.T) {
	tb, _ := table(t)
	for n := range maxQuarantine + 10 {
		tb.Merge("peer", fmt.Appendf(nil, "bad %d\n", n))
	}
	latest, total := tb.Quarantine()
	if len(latest) != maxQuarantine || total != maxQuarantine+10 || latest[0].Digest == latest[1].Digest {
		t.Errorf("%d of %d", len(latest), total)
	}
}

// E of the availability contract: neither an old store nor a peer that slept brings back
// what was removed.
func TestRemovedStaysRemoved(t *testing.T) {
	tb, cl := table(t)
	r := record(t, cl, 1, 1)
	route := register(t, tb, r)
	dump, err := tb.Dump()
	if err != nil {
		t.Fatal(err)
	}
	cl.add(time.Minute)
	if got, ok := tb.Remove(r.Instance); !ok || got.Key != r.Key {
		t.Errorf("%+v, %t", got, ok)
	}
	select {
	case <-route.Gone():
	default:
		t.Error("the route is not gone")
	}
	if applied, bad := tb.Merge("disk", dump); applied != 0 || bad != 0 || len(tb.Records()) != 0 {
		t.Errorf("the old store: %d applied, %d bad", applied, bad)
	}
	_, err = tb.Register(r)
	wantCode(t, err, "route_removed")
	tb.Sweep()
	_, err = tb.Register(r)
	wantCode(t, err, "route_removed")
	cl.add(time.Second)
	register(t, tb, record(t, cl, 1, 1))
	if _, ok := tb.Remove(dstack.InstanceID{9}); ok {
		t.Error("a stranger was removed")
	}
	early := record(t, cl, 1, 9)
	tb.Remove(early.Instance)
	_, err = tb.Register(early)
	wantCode(t, err, "route_removed")
	cl.add(2 * time.Hour)
	tb.Sweep()
	if len(tb.spent) != 0 {
		t.Errorf("%d removals are remembered for ever", len(tb.spent))
	}
	ahead := record(t, cl, 1, 10)
	ahead.Attested = cl.now().Add(30 * time.Second)
	register(t, tb, ahead)
	tb.Remove(ahead.Instance)
	_, err = tb.Register(ahead)
	wantCode(t, err, "route_removed")
}

// Another gateway's removal, as its record tells it.
func TestEnd(t *testing.T) {
	tb, cl := table(t)
	r := record(t, cl, 1, 1)
	register(t, tb, r)
	dump, err := tb.Dump()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := tb.End(r.Instance, r.Attested.Add(-time.Millisecond)); ok || err != nil || len(tb.Records()) != 1 {
		t.Errorf("older than the evidence: %t, %v", ok, err)
	}
	_, _, err = tb.End(r.Instance, cl.now().Add(2*time.Minute))
	wantCode(t, err, "route_future")
	if len(tb.Records()) != 1 {
		t.Error("a removal from the future ends a route")
	}
	cl.add(time.Minute)
	if got, ok, err := tb.End(r.Instance, cl.now()); !ok || err != nil || got.Key != r.Key {
		t.Errorf("%+v, %t, %v", got, ok, err)
	}
	if applied, _ := tb.Merge("disk", dump); applied != 0 || len(tb.Records()) != 0 {
		t.Error("the old store brings it back")
	}
	// A gateway that begins with the old store and hears of the removal then.
	late, lateClock := table(t)
	lateClock.add(time.Minute)
	if applied, _ := late.Merge("disk", dump); applied != 1 {
		t.Fatal("the store was not taken")
	}
	if _, ok, err := late.End(r.Instance, lateClock.now()); !ok || err != nil || len(late.Records()) != 0 {
		t.Errorf("%t, %v", ok, err)
	}
	cl.add(time.Second)
	register(t, tb, record(t, cl, 1, 1))
	if _, ok, err := tb.End(r.Instance, cl.now().Add(-time.Second)); ok || err != nil {
		t.Errorf("an old removal ends a newer route: %t, %v", ok, err)
	}
}

func TestDrainOnly(t *testing.T) {
	tb, cl := table(t)
	a, b := register(t, tb, record(t, cl, 1, 1)), record(t, cl, 1, 2)
	tb.DrainOnly(map[dstack.InstanceID]bool{b.Instance: true})
	if later := register(t, tb, b); !later.Draining() || a.Draining() {
		t.Errorf("%t, %t", later.Draining(), a.Draining())
	}
	tb.DrainOnly(map[dstack.InstanceID]bool{a.Record().Instance: true})
	if later, _ := tb.Instance(b.Instance); later.Draining() || !a.Draining() {
		t.Error("it is not these alone")
	}
	tb.DrainOnly(nil)
	if a.Draining() {
		t.Error("it drains still")
	}
}

func TestRemoveApp(t *testing.T) {
	tb, cl := table(t)
	for n := range 5 {
		register(t, tb, record(t, cl, n/3, n))
	}
	cl.add(time.Second)
	between := record(t, cl, 0, 0)
	cl.add(time.Second)
	if got := tb.RemoveApp(dstack.AppID{0xa}); len(got) != 3 {
		t.Errorf("%d removed", len(got))
	}
	if got := tb.RemoveApp(dstack.AppID{0xa}); got != nil {
		t.Errorf("%d removed again", len(got))
	}
	_, err := tb.Select(nil, dstack.AppID{0xa}, 1)
	wantCode(t, err, "route_unknown")
	for _, r := range []Record{between, record(t, cl, 0, 0)} {
		_, err = tb.Register(r)
		wantCode(t, err, "route_removed")
	}
	check(t, tb)
}

func TestSweep(t *testing.T) {
	tb, cl := table(t)
	a := register(t, tb, record(t, cl, 1, 1))
	cl.add(5 * time.Minute)
	b := register(t, tb, record(t, cl, 1, 2))
	if got := tb.Sweep(); got != nil {
		t.Errorf("swept %v", got)
	}
	cl.add(5 * time.Minute)
	if got := tb.Sweep(); len(got) != 1 || got[0].Instance != a.Record().Instance {
		t.Errorf("swept %v", got)
	}
	select {
	case <-a.Gone():
	default:
		t.Error("the swept route is not gone")
	}
	select {
	case <-b.Gone():
		t.Error("the other is")
	default:
	}
	wantCode(t, a.Begin(), "route_ended")
	if err := b.Begin(); err != nil {
		t.Error(err)
	}
	check(t, tb)
}

func TestSelection(t *testing.T) {
	id := dstack.AppID{0xa, 0, 1}
	tb, cl := table(t)
	_, err := tb.Select(nil, id, 3)
	wantCode(t, err, "route_unknown")
	var recs []Record
	for n := range 4 {
		recs = append(recs, record(t, cl, 1, n))
		recs[n].Until = begin.Add(time.Hour)
		register(t, tb, recs[n])
	}
	_, err = tb.Select(nil, id, 3)
	wantCode(t, err, "route_none")
	order := func(n int) (out []int) {
		t.Helper()
		got, err := tb.Select(nil, id, n)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range got {
			out = append(out, int(r.Record().Instance[2]))
		}
		return out
	}
	want := func(what string, got, want []int) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	for n, age := range []time.Duration{3 * time.Minute, time.Minute, 2 * time.Minute, 31 * time.Minute} {
		tb.Observe([]wgconfig.Status{{Key: recs[n].Key, Handshake: begin.Add(-age)}})
	}
	want("the latest handshake first, the stale one not", order(8), []int{1, 2, 0})
	want("as many as asked", order(2), []int{1, 2})
	want("at least one", order(0), []int{1})
	busy, _ := tb.Instance(recs[1].Instance)
	if err := busy.Begin(); err != nil {
		t.Fatal(err)
	}
	want("the busy one last", order(8), []int{2, 0, 1})
	busy.End()
	want("until it is not", order(8), []int{1, 2, 0})
	if err := tb.Drain(recs[2].Instance, true); err != nil {
		t.Fatal(err)
	}
	want("a draining one not", order(8), []int{1, 0})
	got, err := tb.Select(nil, recs[2].Instance, 8)
	if err != nil || len(got) != 1 || !got[0].Draining() {
		t.Errorf("a draining one by its own id: %v, %v", got, err)
	}
	got, err = tb.Select(nil, recs[3].Instance, 8)
	if err != nil || len(got) != 1 {
		t.Errorf("a stale one by its own id: %v, %v", got, err)
	}
	cl.add(time.Second)
	again := recs[2]
	again.Attested = cl.now()
	register(t, tb, again)
	want("which a renewal does not change", order(8), []int{1, 0})
	if err := tb.Drain(recs[2].Instance, false); err != nil {
		t.Fatal(err)
	}
	want("and resumes", order(8), []int{1, 2, 0})
	wantCode(t, tb.Drain(dstack.InstanceID{1}, true), "route_unknown")
	for _, r := range recs {
		tb.Drain(r.Instance, true)
	}
	_, err = tb.Select(nil, id, 1)
	wantCode(t, err, "route_none")
	kept := []*Route{busy}
	if out, err := tb.Select(kept, recs[0].Instance, 1); err != nil || len(out) != 2 || out[0] != busy {
		t.Errorf("what was in dst: %v, %v", out, err)
	}
}

func TestHandshakes(t *testing.T) {
	tb, cl := table(t)
	r := record(t, cl, 1, 1)
	route := register(t, tb, r)
	see := func(at time.Time) time.Time {
		tb.Observe([]wgconfig.Status{{Key: r.Key, Handshake: at}})
		return route.Handshake()
	}
	if got := see(time.Time{}); !got.IsZero() {
		t.Errorf("none: %s", got)
	}
	if got := see(begin.Add(2 * time.Minute)); !got.IsZero() {
		t.Errorf("of the future: %s", got)
	}
	if got := see(time.Unix(1<<55, 0)); !got.IsZero() {
		t.Errorf("beyond nanoseconds: %s", got)
	}
	if got := see(begin); !got.Equal(begin) {
		t.Errorf("now: %s", got)
	}
	if got := see(begin.Add(-time.Hour)); !got.Equal(begin) {
		t.Errorf("older: %s", got)
	}
	if got := tb.Observe([]wgconfig.Status{{Key: key(t, 7)}, {Key: r.Key}}); len(got) != 1 || got[0] != key(t, 7) {
		t.Errorf("strangers: %v", got)
	}
	cl.add(time.Second)
	r = record(t, cl, 1, 1)
	r.Key = key(t, 6)
	register(t, tb, r)
	if !route.Handshake().IsZero() {
		t.Error("the handshake of the old key counts for the new one")
	}
	if got := tb.Observe([]wgconfig.Status{{Key: key(t, 101)}}); len(got) != 1 {
		t.Error("the old key is still a route's")
	}
	check(t, tb)
}

func TestLimits(t *testing.T) {
	c := &clock{at: begin}
	tb := New(Config{Now: c.now, Instances: 2, PerApp: 2})
	a := register(t, tb, record(t, c, 1, 1))
	b := register(t, tb, record(t, c, 1, 2))
	_, err := tb.Register(record(t, c, 1, 3))
	wantCode(t, err, "route_full")
	if err := errors.Join(a.Begin(), b.Begin()); err != nil {
		t.Fatal(err)
	}
	wantCode(t, a.Begin(), "route_app_full")
	if a.Connections() != 1 {
		t.Errorf("a refused connection counts: %d", a.Connections())
	}
	b.End()
	if err := a.Begin(); err != nil {
		t.Error(err)
	}
	c.add(time.Second)
	register(t, tb, record(t, c, 1, 1)) // a renewal needs no room
}

// A taker of an ended lease's key and address, which are one holder's.
func TestOneHolderOfTwoThings(t *testing.T) {
	tb, cl := table(t)
	for n := range 3 {
		register(t, tb, record(t, cl, 1, n))
	}
	cl.add(11 * time.Minute)
	r := record(t, cl, 1, 1)
	r.Key, r.Address = key(t, 102), netip.AddrFrom4([4]byte{10, 1, 0, 0}) // of 2, and of 0
	register(t, tb, r)
	check(t, tb)
	if len(tb.instances) != 1 {
		t.Errorf("%d routes", len(tb.instances))
	}
}

// check is what holds in every table.
func check(t rapid.TB, tb *Table) {
	t.Helper()
	tb.mu.RLock()
	defer tb.mu.RUnlock()
	n := 0
	for id, a := range tb.apps {
		if len(a.routes) == 0 {
			t.Fatalf("app %s without instances", id)
		}
		if _, ok := tb.instances[dstack.InstanceID(id)]; ok {
			t.Fatalf("%s is an app and an instance", id)
		}
		for i, r := range a.routes {
			rec := r.Record()
			if r.index != i || r.app != a || rec.App != id || tb.instances[rec.Instance] != r || tb.keys[rec.Key] != r || tb.addresses[rec.Address] != r {
				t.Fatalf("the route of %s is not where it should be", rec.Instance)
			}
			select {
			case <-r.gone:
				t.Fatalf("the route of %s is gone and in the table", rec.Instance)
			default:
			}
			n++
		}
	}
	if n != len(tb.instances) || n != len(tb.keys) || n != len(tb.addresses) {
		t.Fatalf("%d routes, %d instances, %d keys, %d addresses", n, len(tb.instances), len(tb.keys), len(tb.addresses))
	}
}

// Any schedule of registrations, time, removals and old stores.
func TestPropertyTheTableStaysWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cl := &clock{at: begin}
		tb := New(Config{Now: cl.now, Key: key(t, 1), Instances: 6})
		var dumps [][]byte
		latest := map[dstack.InstanceID]time.Time{}
		t.Repeat(map[string]func(*rapid.T){
			"register": func(t *rapid.T) {
				r := record(t, cl, rapid.IntRange(0, 2).Draw(t, "app"), rapid.IntRange(0, 7).Draw(t, "instance"))
				r.Key = key(t, 100+rapid.IntRange(0, 7).Draw(t, "key"))
				r.Address = netip.AddrFrom4([4]byte{10, 1, 0, byte(rapid.IntRange(1, 7).Draw(t, "address"))})
				if rapid.IntRange(0, 9).Draw(t, "odd") == 0 {
					r.App = dstack.AppID(record(t, cl, 0, rapid.IntRange(0, 7).Draw(t, "as")).Instance)
				}
				r.Attested = r.Attested.Add(time.Duration(rapid.IntRange(-400, 90).Draw(t, "age")) * time.Second)
				r.Until = r.Attested.Add(time.Duration(rapid.IntRange(1, 1200).Draw(t, "lease")) * time.Second)
				if _, err := tb.Register(r); err == nil {
					if r.Attested.Before(latest[r.Instance]) {
						t.Fatalf("%s went back in time", r.Instance)
					}
					latest[r.Instance] = r.Attested
				} else if fault.Code(err) == "" {
					t.Fatal(err)
				}
			},
			"wait":  func(t *rapid.T) { cl.add(time.Duration(rapid.IntRange(1, 600).Draw(t, "s")) * time.Second) },
			"sweep": func(t *rapid.T) { tb.Sweep() },
			"remove": func(t *rapid.T) {
				id := record(t, cl, 0, rapid.IntRange(0, 7).Draw(t, "instance")).Instance
				tb.Remove(id)
				latest[id] = cl.now()
			},
			"dump": func(t *rapid.T) {
				d, err := tb.Dump()
				if err != nil {
					t.Fatal(err)
				}
				dumps = append(dumps, d)
			},
			"merge an old store": func(t *rapid.T) {
				if len(dumps) > 0 {
					tb.Merge("disk", dumps[rapid.IntRange(0, len(dumps)-1).Draw(t, "which")])
				}
			},
			"": func(t *rapid.T) {
				check(t, tb)
				for _, r := range tb.Records() {
					if !cl.now().Before(r.Until) || r.Until.Sub(r.Attested) > time.Hour {
						t.Fatalf("a route beyond its lease: %+v", r)
					}
				}
			},
		})
	})
}

func TestConcurrentUse(t *testing.T) {
	tb, cl := table(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	run := func(f func(*rand.Rand)) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(1, 2))
			for {
				select {
				case <-stop:
					return
				default:
					f(rnd)
				}
			}
		}()
	}
	run(func(r *rand.Rand) {
		rec := record(t, cl, r.IntN(4), r.IntN(64))
		if _, err := tb.Register(rec); err != nil && fault.Code(err) == "" {
			t.Error(err)
		}
		alive(tb, cl, rec)
	})
	for range 2 {
		run(func(r *rand.Rand) {
			var buf [MaxSelect]*Route
			got, err := tb.Select(buf[:0], dstack.AppID{0xa, 0, byte(r.IntN(4))}, 3)
			if err != nil && fault.Code(err) == "" {
				t.Error(err)
			}
			for _, route := range got {
				if route.Begin() == nil {
					_ = route.Record()
					route.End()
				}
			}
		})
	}
	run(func(r *rand.Rand) {
		cl.add(time.Second)
		tb.Sweep()
		tb.Drain(dstack.InstanceID{0xb, 0, byte(r.IntN(64))}, r.IntN(2) == 0)
		tb.Remove(dstack.InstanceID{0xb, 0, byte(r.IntN(64))})
	})
	run(func(*rand.Rand) {
		d, err := tb.Dump()
		if err != nil {
			t.Error(err)
		}
		tb.Merge("self", d)
	})
	time.Sleep(300 * time.Millisecond)
	close(stop)
	wg.Wait()
	check(t, tb)
	for _, r := range tb.instances {
		if r.Connections() != 0 || r.app.conns.Load() != 0 {
			t.Errorf("%d connections are left", r.Connections())
		}
	}
}

func FuzzMerge(f *testing.F) {
	tb, cl := table(f)
	register(f, tb, record(f, cl, 1, 1))
	register(f, tb, record(f, cl, 1, 2))
	d, err := tb.Dump()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(d, false)
	_, doc, _ := bytes.Cut(bytes.Split(d, []byte("\n"))[0], []byte(" "))
	f.Add(doc, true)
	f.Add([]byte(`{"version":1,"attested":18446744073709551615}`), true)
	f.Fuzz(func(t *testing.T, b []byte, summed bool) {
		if summed {
			b = fmt.Appendf(nil, "%x %s", sum(b), b)
		}
		tb, _ := table(t)
		tb.Merge("fuzz", b)
		check(t, tb)
		for _, r := range tb.Records() {
			line, err := r.Line()
			if err != nil {
				t.Fatal(err)
			}
			again, err := ParseLine(bytes.TrimSuffix(line, []byte("\n")))
			if err != nil || !again.equal(&r) {
				t.Fatalf("%+v becomes %+v, %v", r, again, err)
			}
			if r.Attested.After(begin.Add(time.Minute)) || !r.Until.After(begin) || r.Key.IsZero() {
				t.Fatalf("applied: %+v", r)
			}
		}
	})
}

// filled is a table of n routes, ten of each app, all alive.
func filled(b *testing.B, n int) (*Table, *clock, []Record) {
	tb, cl := table(b)
	var recs []Record
	var st []wgconfig.Status
	for i := range n {
		r := record(b, cl, i/10, i)
		register(b, tb, r)
		recs = append(recs, r)
		st = append(st, wgconfig.Status{Key: r.Key, Handshake: begin})
	}
	tb.Observe(st)
	return tb, cl, recs
}

func BenchmarkTable10k(b *testing.B) {
	tb, cl, recs := filled(b, 10000)
	b.Run("select", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			var buf [MaxSelect]*Route
			for i := 0; pb.Next(); i++ {
				if _, err := tb.Select(buf[:0], recs[i%len(recs)].App, 3); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
	b.Run("renew", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			r := recs[i%len(recs)]
			if i%len(recs) == 0 {
				cl.add(time.Millisecond)
			}
			r.Attested = cl.now()
			if _, err := tb.Register(r); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("observe all", func(b *testing.B) {
		st := make([]wgconfig.Status, len(recs))
		for i := range st {
			st[i] = wgconfig.Status{Key: recs[i].Key, Handshake: begin}
		}
		for b.Loop() {
			tb.Observe(st)
		}
	})
	b.Run("sweep", func(b *testing.B) {
		for b.Loop() {
			tb.Sweep()
		}
	})
	b.Run("dump", func(b *testing.B) {
		for b.Loop() {
			if _, err := tb.Dump(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
