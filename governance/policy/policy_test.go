// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

var now = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

var (
	appID    = dstack.AppID{0xa}
	compose  = dstack.ComposeHash{0xc0}
	image    = dstack.ImageHash{0x05}
	devImage = dstack.ImageHash{0xde}
	device   = dstack.DeviceID{0xd}
	kmsDev   = dstack.DeviceID{0xd, 2}
	kmsMR    = Hash{0x66}
	kmsApp   = dstack.AppID{0xee}
	kmsHash  = dstack.ComposeHash{0xee, 1}
	gateway  = dstack.AppID{0x9a}
)

func launch(last byte) map[string]Register {
	return map[string]Register{"mrtd": {1}, "rtmr0": {2}, "rtmr1": {3}, "rtmr2": {last}}
}

// document allows one app and one KMS.
func document() *Document {
	d := New(dstack.TrustProduction, now, 30*24*time.Hour)
	d.Sequence = 7
	d.GatewayAppID = &gateway
	d.OSImages = []Image{
		{Hash: image, Name: "dstack-0.6", Epoch: 3, Launch: []map[string]Register{launch(9), launch(4), {"measurement": {7}}}},
		{Hash: devImage, Dev: true, Epoch: 3},
	}
	d.MinOSEpoch = 3
	d.Devices.IDs = []dstack.DeviceID{device}
	d.TCB = TCB{Accept: []string{"UpToDate"}, DenyAdvisories: []string{"INTEL-SA-00001"}}
	d.KMS = KMS{
		Allow:   []Member{{MRAggregated: &kmsMR}, {AppID: &kmsApp, ComposeHash: &kmsHash, OSImageHash: &image}},
		Devices: []dstack.DeviceID{kmsDev},
	}
	d.Apps = []App{{AppID: appID, Name: "web", ComposeHashes: []Compose{{Hash: compose}}, Names: []string{"web.example.org"}}}
	d.KeyEpoch = KeyEpoch{Current: 2, Oldest: 1}
	return d
}

// request is of the app that document allows.
func request() governance.Request {
	return governance.Request{
		Role: governance.App, Purpose: governance.Keys, Trust: dstack.TrustProduction, ImageBound: true, At: now.Add(time.Hour),
		Boot: governance.BootInfo{
			TEEVariant: "dstack-tdx", OSImageHash: image[:], AppID: appID, ComposeHash: compose,
			InstanceID: make([]byte, 20), DeviceID: device, TCBStatus: "UpToDate",
		},
	}
}

// kmsRequest is of the KMS that document allows.
func kmsRequest() governance.Request {
	r := request()
	r.Role, r.Purpose = governance.KMS, governance.Replication
	r.Boot.MRAggregated, r.Boot.DeviceID, r.Boot.AppID = kmsMR, kmsDev, dstack.AppID{0xff}
	return r
}

func development(d *Document, r *governance.Request) {
	d.Trust, r.Trust = dstack.TrustDevelopment, dstack.TrustDevelopment
}

func TestDecisions(t *testing.T) {
	yes, no, epoch2, epoch3 := true, false, 2, 3
	later := now.Add(2 * time.Hour)
	registers := func(r *governance.Request) {
		r.ImageBound = false
		r.Launch = map[string][]byte{"mrconfigid": {1}}
		for name, v := range launch(4) {
			r.Launch[name] = v[:]
		}
	}
	for _, c := range []struct {
		what string
		make func() governance.Request // nil: request
		edit func(*Document, *governance.Request)
		code string // empty: allowed
	}{
		{"the app as the policy has it", nil, nil, ""},
		{"a renewal", nil, func(_ *Document, r *governance.Request) { r.Purpose = governance.Renewal }, ""},
		{"a certificate", nil, func(_ *Document, r *governance.Request) { r.Purpose = governance.Certificate }, ""},
		{"an app that asks for root keys", nil, func(_ *Document, r *governance.Request) { r.Purpose = governance.Replication }, codePurpose},
		{"no purpose", nil, func(_ *Document, r *governance.Request) { r.Purpose = "" }, codePurpose},
		{"no role", nil, func(_ *Document, r *governance.Request) { r.Role = "" }, codePurpose},
		{"a KMS that asks for an app's keys", kmsRequest, func(_ *Document, r *governance.Request) { r.Purpose = governance.Keys }, codePurpose},
		{"no instance id", nil, func(_ *Document, r *governance.Request) { r.Boot.InstanceID = nil }, ""},
		{"an instance id of 19 bytes", nil, func(_ *Document, r *governance.Request) { r.Boot.InstanceID = make([]byte, 19) }, codeInstanceID},

		{"before it was issued", nil, func(d *Document, r *governance.Request) { r.At = now.Add(-skew - time.Second) }, codeFuture},
		{"as much before as clocks may differ", nil, func(d *Document, r *governance.Request) { r.At = now.Add(-skew) }, ""},
		{"no time", nil, func(d *Document, r *governance.Request) { r.At = time.Time{} }, codeFuture},
		{"the last moment", nil, func(d *Document, r *governance.Request) { r.At = d.Expires.Add(-1) }, ""},
		{"expired", nil, func(d *Document, r *governance.Request) { r.At = d.Expires }, codeExpired},

		{"development evidence for production", nil, func(_ *Document, r *governance.Request) { r.Trust = dstack.TrustDevelopment }, codeDevTrust},
		{"development evidence for development", nil, development, ""},
		{"production evidence for development", nil, func(d *Document, _ *governance.Request) { d.Trust = dstack.TrustDevelopment }, ""},
		{"a caller's own key", nil, func(_ *Document, r *governance.Request) { r.Trust = dstack.TrustCaller }, codeTrust},
		{"a caller's own key for development", nil, func(d *Document, r *governance.Request) { development(d, r); r.Trust = dstack.TrustCaller }, codeTrust},
		{"no trust", nil, func(_ *Document, r *governance.Request) { r.Trust = "" }, codeTrust},

		{"an old TCB", nil, func(_ *Document, r *governance.Request) { r.Boot.TCBStatus = "OutOfDate" }, codeTCB},
		{"an old TCB that is accepted", nil, func(d *Document, r *governance.Request) {
			r.Boot.TCBStatus = "OutOfDate"
			d.TCB.Accept = append(d.TCB.Accept, "OutOfDate")
		}, ""},
		{"no TCB status", nil, func(_ *Document, r *governance.Request) { r.Boot.TCBStatus = "" }, codeTCB},
		{"no TCB status, accepted by its name", nil, func(d *Document, r *governance.Request) {
			r.Boot.TCBStatus = ""
			d.TCB.Accept = []string{"NotReported"}
		}, ""},
		{"no status accepted", nil, func(d *Document, _ *governance.Request) { d.TCB.Accept = nil }, codeTCB},
		{"a denied advisory", nil, func(_ *Document, r *governance.Request) {
			r.Boot.AdvisoryIDs = []string{"INTEL-SA-00002", "intel-sa-00001"}
		}, codeAdvisory},
		{"another advisory", nil, func(_ *Document, r *governance.Request) { r.Boot.AdvisoryIDs = []string{"INTEL-SA-00002"} }, ""},

		{"an unknown image", nil, func(_ *Document, r *governance.Request) { r.Boot.OSImageHash = make([]byte, 32) }, codeImage},
		{"no image hash", nil, func(_ *Document, r *governance.Request) { r.Boot.OSImageHash = nil }, codeImage},
		{"an image hash cut short", nil, func(_ *Document, r *governance.Request) { r.Boot.OSImageHash = image[:31] }, codeImage},
		{"an image that the guest only names", nil, func(_ *Document, r *governance.Request) { r.ImageBound = false }, codeImageUnproven},
		{"registers of the list", nil, func(_ *Document, r *governance.Request) { registers(r) }, ""},
		{"one register differs", nil, func(_ *Document, r *governance.Request) {
			registers(r)
			r.Launch["rtmr2"] = make([]byte, 48)
		}, codeImageUnproven},
		{"one register lacks", nil, func(_ *Document, r *governance.Request) { registers(r); delete(r.Launch, "rtmr0") }, codeImageUnproven},
		{"a register cut short", nil, func(_ *Document, r *governance.Request) {
			registers(r)
			r.Launch["mrtd"] = r.Launch["mrtd"][:47]
		}, codeImageUnproven},
		{"registers of another image", nil, func(d *Document, r *governance.Request) {
			registers(r)
			d.OSImages[0].Launch, d.OSImages[1].Launch = nil, d.OSImages[0].Launch
		}, codeImageUnproven},
		{"SNP's measurement", nil, func(_ *Document, r *governance.Request) {
			m := Register{7}
			r.ImageBound, r.Boot.TEEVariant, r.Launch = false, "dstack-amd-sev-snp", map[string][]byte{"measurement": m[:]}
		}, ""},
		{"another measurement", nil, func(_ *Document, r *governance.Request) {
			m := Register{8}
			r.ImageBound, r.Boot.TEEVariant, r.Launch = false, "dstack-amd-sev-snp", map[string][]byte{"measurement": m[:]}
		}, codeImageUnproven},
		{"SNP's measurement shown by TDX", nil, func(_ *Document, r *governance.Request) {
			m := Register{7}
			r.ImageBound, r.Launch = false, map[string][]byte{"measurement": m[:]}
		}, codeImageUnproven},
		{"a TEE whose registers are not all of the image", nil, func(_ *Document, r *governance.Request) {
			registers(r)
			r.Boot.TEEVariant = "dstack-gcp-tdx"
		}, codeImageUnproven},

		{"a development image", nil, func(_ *Document, r *governance.Request) { r.Boot.OSImageHash = devImage[:] }, codeDevImage},
		{"a development image on development evidence", nil, func(d *Document, r *governance.Request) {
			development(d, r)
			r.Boot.OSImageHash = devImage[:]
		}, ""},
		{"a development image on hardware", nil, func(d *Document, r *governance.Request) {
			d.Trust = dstack.TrustDevelopment
			r.Boot.OSImageHash = devImage[:]
		}, codeDevImage},
		{"an image that says itself that it is for development", nil, func(_ *Document, r *governance.Request) { r.DevImage = &yes }, codeDevImage},
		{"an image that says that it is for production", nil, func(_ *Document, r *governance.Request) { r.DevImage = &no }, ""},
		{"a development image that says that it is none", nil, func(_ *Document, r *governance.Request) {
			r.Boot.OSImageHash, r.DevImage = devImage[:], &no
		}, codeDevImage},
		{"an image of an old epoch", nil, func(d *Document, _ *governance.Request) { d.MinOSEpoch = 4 }, codeEpoch},
		{"an image that says an old epoch", nil, func(_ *Document, r *governance.Request) { r.OSEpoch = &epoch2 }, codeEpoch},
		{"an image that says the epoch", nil, func(_ *Document, r *governance.Request) { r.OSEpoch = &epoch3 }, ""},
		{"an image whose word is newer than the list's", nil, func(d *Document, r *governance.Request) {
			d.OSImages[0].Epoch, r.OSEpoch = 2, &epoch3
		}, codeEpoch},

		{"an unknown app", nil, func(_ *Document, r *governance.Request) { r.Boot.AppID[19] = 1 }, codeApp},
		{"an unknown compose hash", nil, func(_ *Document, r *governance.Request) { r.Boot.ComposeHash[31] = 1 }, codeCompose},
		{"the compose hash of another app", nil, func(d *Document, r *governance.Request) {
			d.Apps = append(d.Apps, App{AppID: dstack.AppID{0xb}, ComposeHashes: []Compose{{Hash: dstack.ComposeHash{1}}}})
			r.Boot.ComposeHash = dstack.ComposeHash{1}
		}, codeCompose},
		{"a revoked compose hash", nil, func(d *Document, _ *governance.Request) {
			d.Apps[0].ComposeHashes[0].Revoked = &Revocation{At: now, Reason: "leaks"}
		}, codeComposeRevoked},
		{"a compose hash whose revocation is dated ahead", nil, func(d *Document, _ *governance.Request) {
			d.Apps[0].ComposeHashes[0].Revoked = &Revocation{At: later, Reason: "leaks"}
		}, codeComposeRevoked},
		{"a compose hash before its time", nil, func(d *Document, _ *governance.Request) { d.Apps[0].ComposeHashes[0].NotBefore = &later }, codeComposeNotBefore},
		{"a compose hash in its time", nil, func(d *Document, r *governance.Request) { d.Apps[0].ComposeHashes[0].NotBefore, r.At = &later, later }, ""},
		{"the image is not the app's", nil, func(d *Document, _ *governance.Request) { d.Apps[0].OSImages = []dstack.ImageHash{devImage} }, codeImage},
		{"the app has no image", nil, func(d *Document, _ *governance.Request) { d.Apps[0].OSImages = []dstack.ImageHash{} }, codeImage},
		{"the image is the app's", nil, func(d *Document, _ *governance.Request) { d.Apps[0].OSImages = []dstack.ImageHash{image} }, ""},
		{"another device", nil, func(_ *Document, r *governance.Request) { r.Boot.DeviceID[31] = 1 }, codeDevice},
		{"no devices", nil, func(d *Document, _ *governance.Request) { d.Devices.IDs = nil }, codeDevice},
		{"any device", nil, func(d *Document, r *governance.Request) { d.Devices = Devices{Any: true}; r.Boot.DeviceID[31] = 1 }, ""},
		{"any device but for the app", nil, func(d *Document, r *governance.Request) {
			d.Devices, d.Apps[0].Devices = Devices{Any: true}, []dstack.DeviceID{kmsDev}
		}, codeDevice},
		{"the app's devices are narrower", nil, func(d *Document, _ *governance.Request) { d.Apps[0].Devices = []dstack.DeviceID{} }, codeDevice},
		{"the app's devices are not wider", nil, func(d *Document, r *governance.Request) {
			d.Apps[0].Devices, r.Boot.DeviceID = []dstack.DeviceID{kmsDev}, kmsDev
		}, codeDevice},
		{"the device is on both lists", nil, func(d *Document, _ *governance.Request) { d.Apps[0].Devices = []dstack.DeviceID{device} }, ""},
		{"a session is demanded", nil, func(d *Document, _ *governance.Request) { d.Apps[0].RequireSession = true }, codeSession},
		{"a session is demanded for a renewal", nil, func(d *Document, r *governance.Request) {
			d.Apps[0].RequireSession, r.Purpose = true, governance.Renewal
		}, codeSession},
		{"a session is there", nil, func(d *Document, r *governance.Request) { d.Apps[0].RequireSession, r.Session = true, true }, ""},
		{"a session is demanded for a certificate", nil, func(d *Document, r *governance.Request) {
			d.Apps[0].RequireSession, r.Purpose = true, governance.Certificate
		}, codeSession},

		{"a KMS by its registers", kmsRequest, nil, ""},
		{"a KMS that may go on", kmsRequest, func(_ *Document, r *governance.Request) { r.Purpose = governance.Service }, ""},
		{"a KMS to take keys from", kmsRequest, func(_ *Document, r *governance.Request) { r.Purpose = governance.Source }, ""},
		{"a KMS by what it runs", kmsRequest, func(_ *Document, r *governance.Request) {
			r.Boot.MRAggregated, r.Boot.AppID, r.Boot.ComposeHash = [32]byte{1}, kmsApp, kmsHash
		}, ""},
		{"a KMS of another app id", kmsRequest, func(_ *Document, r *governance.Request) {
			r.Boot.MRAggregated, r.Boot.ComposeHash = [32]byte{1}, kmsHash
		}, codeKMS},
		{"a KMS of another manifest", kmsRequest, func(_ *Document, r *governance.Request) {
			r.Boot.MRAggregated, r.Boot.AppID = [32]byte{1}, kmsApp
		}, codeKMS},
		{"a KMS on another image", kmsRequest, func(d *Document, r *governance.Request) {
			r.Boot.MRAggregated, r.Boot.AppID, r.Boot.ComposeHash = [32]byte{1}, kmsApp, kmsHash
			r.Boot.OSImageHash = devImage[:]
			development(d, r)
		}, codeKMS},
		{"an entry that says nothing", kmsRequest, func(d *Document, _ *governance.Request) { d.KMS.Allow = []Member{{}} }, codeKMS},
		{"an app that would be a KMS", kmsRequest, func(_ *Document, r *governance.Request) {
			r.Boot.MRAggregated, r.Boot.AppID, r.Boot.ComposeHash = [32]byte{1}, appID, compose
		}, codeKMS},
		{"a KMS on an app's device", kmsRequest, func(_ *Document, r *governance.Request) { r.Boot.DeviceID = device }, codeDevice},
		{"a KMS of an unlisted image", kmsRequest, func(_ *Document, r *governance.Request) { r.Boot.OSImageHash = nil }, codeImage},
		{"a KMS whose image is unproven", kmsRequest, func(_ *Document, r *governance.Request) { r.ImageBound = false }, codeImageUnproven},
		{"a KMS with an old TCB", kmsRequest, func(_ *Document, r *governance.Request) { r.Boot.TCBStatus = "OutOfDate" }, codeTCB},
	} {
		r := request()
		if c.make != nil {
			r = c.make()
		}
		d := document()
		if c.edit != nil {
			c.edit(d, &r)
		}
		got := d.Decide(r)
		if got.Allowed != (c.code == "") || got.Code != c.code || (got.Reason == "") != got.Allowed || got.By != "policy 7" {
			t.Errorf("%s: %+v, want code %q", c.what, got, c.code)
		}
		if !got.Allowed && (got.Lease != 0 || got.GatewayAppID != "" || got.Epoch != 0) {
			t.Errorf("%s: a denial gives something: %+v", c.what, got)
		}
	}
}

func TestADecisionCarriesWhatTheDocumentSays(t *testing.T) {
	d, r := document(), request()
	got := d.Decide(r)
	if got.Lease != time.Hour || got.GatewayAppID != gateway.String() || got.Epoch != 2 || got.OldestEpoch != 1 || !reflect.DeepEqual(got.Names, []string{"web.example.org"}) {
		t.Errorf("%+v", got)
	}
	d.LeaseSeconds, d.Apps[0].LeaseSeconds, d.GatewayAppID = 600, 60, nil
	d.Apps[0].Names = nil
	if got = d.Decide(r); got.Lease != time.Minute || got.GatewayAppID != "" || got.Names == nil || len(got.Names) != 0 {
		t.Errorf("%+v: an app without names has none", got)
	}
	d.Apps[0].LeaseSeconds, d.Apps[0].AnyName = 0, true
	if got = d.Decide(r); got.Lease != 10*time.Minute || got.Names != nil {
		t.Errorf("%+v: any_name is any", got)
	}
	// A caller that changes its decision does not change the policy.
	d = document()
	d.Decide(r).Names[0] = "evil.example.org"
	if d.Apps[0].Names[0] != "web.example.org" {
		t.Error("a decision shares its names with the document")
	}
}

// A01: evidence that is right in everything, of a machine that nobody listed.
func TestThreat_A01_UnlistedDeviceRefused(t *testing.T) {
	d := document()
	for _, r := range []governance.Request{request(), kmsRequest()} {
		if got := d.Decide(r); !got.Allowed {
			t.Fatalf("%+v", got)
		}
		r.Boot.DeviceID = dstack.DeviceID{0x77}
		if got := d.Decide(r); got.Allowed || got.Code != codeDevice {
			t.Errorf("%s on an unlisted device: %+v", r.Role, got)
		}
	}
	// The word for any machine is not for machines that hold the roots.
	d.Devices = Devices{Any: true}
	r := kmsRequest()
	r.Boot.DeviceID = dstack.DeviceID{0x77}
	if got := d.Decide(r); got.Allowed || got.Code != codeDevice {
		t.Errorf("any device is a KMS: %+v", got)
	}
	d.KMS.Devices = nil
	if got := d.Decide(kmsRequest()); got.Allowed || got.Code != codeDevice {
		t.Errorf("an empty list of KMS devices: %+v", got)
	}
}

// D11: an image of an old epoch is listed still, and gets no keys.
func TestThreat_D11_OldEpochGetsNoKeys(t *testing.T) {
	d := document()
	d.MinOSEpoch = 4
	for _, r := range []governance.Request{request(), kmsRequest()} {
		if got := d.Decide(r); got.Allowed || got.Code != codeEpoch {
			t.Errorf("%+v", got)
		}
	}
	if err := Successor(d, document()); fault.Code(err) != "policy_rollback" {
		t.Error(err)
	}
	next := document()
	next.Sequence = 8
	if err := Successor(d, next); fault.Code(err) != "policy_epoch" {
		t.Errorf("a lower epoch follows: %v", err)
	}
}

// D12: a development image on the list by mistake.
func TestThreat_D12_ListedDevelopmentImageRefused(t *testing.T) {
	d, r := document(), request()
	r.Boot.OSImageHash = devImage[:]
	if got := d.Decide(r); got.Allowed || got.Code != codeDevImage {
		t.Errorf("%+v", got)
	}
	d.OSImages[1].Dev = false // the list says that it is for production
	yes := true
	r.DevImage = &yes
	if got := d.Decide(r); got.Allowed || got.Code != codeDevImage {
		t.Errorf("%+v", got)
	}
}

// J07: a fresh policy knows no app.
func TestThreat_J07_FreshPolicyDeniesUnknown(t *testing.T) {
	fresh := New(dstack.TrustProduction, now, 24*time.Hour)
	if got := fresh.Decide(request()); got.Allowed {
		t.Errorf("%+v", got)
	}
	// All but the app is in order.
	d := document()
	d.Apps = nil
	if got := d.Decide(request()); got.Allowed || got.Code != codeApp {
		t.Errorf("%+v", got)
	}
	// An upgrade that nobody allowed.
	r := request()
	r.Boot.ComposeHash = dstack.ComposeHash{0xbd}
	if got := document().Decide(r); got.Allowed || got.Code != codeCompose {
		t.Errorf("%+v", got)
	}
}

// G08: nothing that a document can switch on allows everything. Every boolean is set,
// one by one and all together, in documents that name nothing of the request.
func TestThreat_G08_NoSwitchAllowsEverything(t *testing.T) {
	var zero Document
	other := func() *Document { // whatever is listed is of somebody else
		d := document()
		d.OSImages[0].Hash, d.OSImages[1].Hash = dstack.ImageHash{0x71}, dstack.ImageHash{0x72}
		d.Apps[0].AppID, d.Apps[0].ComposeHashes[0].Hash = dstack.AppID{0x73}, dstack.ComposeHash{0x74}
		d.KMS.Allow = d.KMS.Allow[:1]
		d.KMS.Allow[0].MRAggregated = &Hash{0x75}
		return d
	}
	fresh := func() *Document {
		d := New(dstack.TrustDevelopment, now, 24*time.Hour)
		d.TCB.Accept = []string{"UpToDate"}
		d.OSImages = []Image{{Hash: image}}
		d.Apps, d.KMS.Allow = []App{{}}, []Member{{}}
		return d
	}
	requests := []governance.Request{request(), kmsRequest()}
	for _, r := range requests {
		if got := zero.Decide(r); got.Allowed {
			t.Errorf("the zero document: %+v", got)
		}
	}
	switches := 0
	for _, make := range []func() *Document{other, fresh} {
		n := len(booleans(reflect.ValueOf(make()).Elem()))
		switches += n
		for i := range n + 1 {
			d := make()
			for j, b := range booleans(reflect.ValueOf(d).Elem()) {
				if i == n || i == j {
					b.SetBool(true)
				}
			}
			for _, r := range requests {
				r.Session = true
				if got := d.Decide(r); got.Allowed {
					t.Errorf("switch %d of %d: %s %s is allowed", i, n, r.Role, r.Purpose)
				}
			}
		}
	}
	if switches < 8 {
		t.Errorf("the walk found %d switches only", switches)
	}
	// And there is no word for all in what is a list.
	for _, edit := range [][2]string{
		{`"apps": [`, `"apps": ["any", `}, {`"apps": [`, `"any_app": true, "apps": [`}, {`"allow": [`, `"any": true, "allow": [`},
		{gateway.String(), "any"}, {compose.String(), "*"}, {appID.String(), "any"}, {`"accept": [`, `"accept": ["any", `}, {`"accept": [`, `"accept": ["Revoked", `},
	} {
		data := encode(t, document())
		edited := bytes.Replace(data, []byte(edit[0]), []byte(edit[1]), 1)
		if bytes.Equal(data, edited) {
			t.Fatalf("%q is not in the document", edit[0])
		}
		if _, err := Parse(edited); fault.Code(err) != "policy_malformed" {
			t.Errorf("%s: %v", edit[1], err)
		}
	}
}

// booleans finds every boolean that a value has.
func booleans(v reflect.Value) (out []reflect.Value) {
	switch v.Kind() {
	case reflect.Bool:
		return []reflect.Value{v}
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			return nil
		}
		for i := range v.NumField() {
			out = append(out, booleans(v.Field(i))...)
		}
	case reflect.Slice:
		for i := range v.Len() {
			out = append(out, booleans(v.Index(i))...)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			return booleans(v.Elem())
		}
	}
	return out
}

func encode(t testing.TB, d *Document) []byte {
	t.Helper()
	data, err := d.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestADocumentSurvivesItsBytes(t *testing.T) {
	d := document()
	at := now.Add(time.Hour)
	d.Apps[0].Devices, d.Apps[0].OSImages = []dstack.DeviceID{}, []dstack.ImageHash{image}
	d.Apps[0].ComposeHashes[0].NotBefore = &at
	d.Apps[0].ComposeHashes[0].Revoked = &Revocation{At: at, Reason: "it <leaks>"}
	data := encode(t, d)
	got, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if again := encode(t, got); !bytes.Equal(data, again) {
		t.Errorf("%s\nbecame\n%s", data, again)
	}
	if got.Apps[0].Devices == nil {
		t.Error("an empty list of devices, which denies, became none, which does not")
	}
}

func TestMalformedDocuments(t *testing.T) {
	data := encode(t, document())
	if _, err := Parse(data); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ what, old, new string }{
		{"an unknown key", `"sequence"`, `"allow_all": true, "sequence"`},
		{"a key twice", `"sequence": 7`, `"sequence": 7, "sequence": 8`},
		{"a key twice in another case", `"sequence": 7`, `"sequence": 7, "Sequence": 8`},
		{"null", `"sequence": 7`, `"sequence": 7, "devices": null`},
		{"null inside", `"name": "web"`, `"name": "web", "devices": null`},
		{"an app id of 19 bytes", appID.String(), appID.String()[:38]},
		{"an app id of 21 bytes", appID.String(), appID.String() + "00"},
		{"a compose hash of 31 bytes", compose.String(), compose.String()[:62]},
		{"a device id of 31 bytes", device.String(), device.String()[:62]},
		{"an image hash with 0x", image.String(), "0x" + image.String()[2:]},
		{"a register of 47 bytes", `"mrtd": "01`, `"mrtd": "`},
		{"an mr_aggregated of 31 bytes", `"mr_aggregated": "66`, `"mr_aggregated": "`},
		{"another version", `"version": 1`, `"version": 2`},
		{"sequence zero", `"sequence": 7`, `"sequence": 0`},
		{"a negative sequence", `"sequence": 7`, `"sequence": -1`},
		{"another trust", `"production"`, `"caller"`},
		{"no end", `"expires": "2026-12-28T12:00:00Z",`, ``},
		{"an end before the beginning", `"2026-12-28T12:00:00Z"`, `"2026-11-28T12:00:00Z"`},
		{"more than a year", `"2026-12-28T12:00:00Z"`, `"2027-11-30T12:00:00Z"`},
		{"a time that is none", `"2026-12-28T12:00:00Z"`, `"28.12.2026"`},
		{"no beginning", `"issued": "2026-11-28T12:00:00Z",`, ``},
		{"a lease of more than an hour", `"sequence": 7`, `"sequence": 7, "lease_seconds": 3601`},
		{"an app's lease of more than the document's", `"sequence": 7`, `"lease_seconds": 10, "sequence": 7`},
		{"a register too few", `"rtmr2"`, `"rtmr3"`},
		{"a register too many", `"measurement"`, `"mrtd": "` + strings.Repeat("00", 48) + `", "measurement"`},
		{"an image twice", devImage.String(), image.String()},
		{"a negative epoch", `"epoch": 3`, `"epoch": -3`},
		{"a negative least epoch", `"min_os_epoch": 3`, `"min_os_epoch": -3`},
		{"a status that cannot be accepted", `"UpToDate"`, `"Revoked"`},
		{"an empty advisory", `"INTEL-SA-00001"`, `""`},
		{"a KMS by half of what it runs", `"app_id": "` + kmsApp.String() + `",`, ``},
		{"a KMS by both", `"app_id": "` + kmsApp.String() + `"`, `"mr_aggregated": "` + strings.Repeat("00", 32) + `", "app_id": "` + kmsApp.String() + `"`},
		{"any beside devices", `"ids": [`, `"any": true, "ids": [`},
		{"any for a KMS", `"kms": {`, `"kms": {"any": true, `},
		{"any name beside names", `"name": "web"`, `"name": "web", "any_name": true`},
		{"a name that is a pattern for all", `"web.example.org"`, `"*"`},
		{"a name in upper case", `"web.example.org"`, `"WEB.example.org"`},
		{"a name that is too long", `"name": "web"`, `"name": "` + strings.Repeat("w", 257) + `"`},
		{"a revocation without a reason", `"hash": "` + compose.String() + `"`, `"hash": "` + compose.String() + `", "revoked": {"at": "2026-11-28T12:00:00Z", "reason": " "}`},
		{"a revocation without a time", `"hash": "` + compose.String() + `"`, `"hash": "` + compose.String() + `", "revoked": {"reason": "x"}`},
		{"the oldest epoch after the current", `"oldest": 1`, `"oldest": 3`},
		{"an epoch without the oldest", `"oldest": 1`, `"oldest": 0`},
		{"more behind it", "\n}\n", "\n}{}"},
	} {
		edit := data
		if c.what == "an app's lease of more than the document's" {
			edit = bytes.Replace(edit, []byte(`"name": "web"`), []byte(`"name": "web", "lease_seconds": 11`), 1)
		}
		edited := bytes.Replace(edit, []byte(c.old), []byte(c.new), 1)
		if bytes.Equal(edit, edited) {
			t.Fatalf("%s: %q is not in\n%s", c.what, c.old, data)
		}
		if d, err := Parse(edited); fault.Code(err) != "policy_malformed" || d != nil {
			t.Errorf("%s: %v", c.what, err)
		}
	}
	for _, twice := range []func(*Document){
		func(d *Document) { d.Apps = append(d.Apps, d.Apps[0]) },
		func(d *Document) { d.Apps[0].ComposeHashes = append(d.Apps[0].ComposeHashes, Compose{Hash: compose}) },
	} {
		d := document()
		twice(d)
		if _, err := d.Encode(); fault.Code(err) != "policy_malformed" {
			t.Error(err)
		}
	}
	big := append(data, bytes.Repeat([]byte(" "), MaxDocument)...)
	if _, err := Parse(big); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}
}

func key(n byte) ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{n}, 32)) }

func public(n byte) ed25519.PublicKey { return key(n).Public().(ed25519.PublicKey) }

// sign signs a document by keys.
func sign(t testing.TB, d *Document, by ...byte) []byte {
	t.Helper()
	out, err := Sign(encode(t, d), key(by[0]))
	for _, n := range by[1:] {
		if err == nil {
			out, err = AddSignature(out, key(n))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestOpen(t *testing.T) {
	d := document()
	two := Keys{Keys: []ed25519.PublicKey{public(1), public(2), public(3)}, Threshold: 2}
	edit := func(data []byte, change func(*signed)) []byte {
		var s signed
		if err := json.Unmarshal(data, &s); err != nil {
			t.Fatal(err)
		}
		change(&s)
		out, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	with := func(keys Keys, threshold int) Keys { keys.Threshold = threshold; return keys }
	for _, c := range []struct {
		what string
		data []byte
		keys Keys
		at   time.Time
		code string
	}{
		{"two of three", sign(t, d, 1, 3), two, now, ""},
		{"all of three", sign(t, d, 1, 2, 3), two, now, ""},
		{"a stranger beside two", sign(t, d, 9, 1, 2), two, now, ""},
		{"one of three", sign(t, d, 1), two, now, "policy_threshold"},
		{"one and a stranger", sign(t, d, 1, 9), two, now, "policy_threshold"},
		{"strangers", sign(t, d, 8, 9), two, now, "policy_signature"},
		{"one twice", edit(sign(t, d, 1), func(s *signed) { s.Signatures = append(s.Signatures, s.Signatures[0]) }), two, now, "policy_threshold"},
		{"one that is pinned twice", sign(t, d, 1), Keys{[]ed25519.PublicKey{public(1), public(1)}, 2}, now, "policy_threshold"},
		{"none", edit(sign(t, d, 1), func(s *signed) { s.Signatures = []signature{} }), two, now, "policy_signature"},
		{"a threshold of none", sign(t, d, 1, 2, 3), with(two, 0), now, "policy_threshold"},
		{"a threshold below none", sign(t, d, 1, 2, 3), with(two, -1), now, "policy_threshold"},
		{"no keys", sign(t, d, 1, 2, 3), Keys{Threshold: 1}, now, "policy_signature"},
		{"a pinned key of no length", sign(t, d, 1), Keys{[]ed25519.PublicKey{nil, public(1)[:31]}, 1}, now, "policy_signature"},
		{"a signature by the name of a key of no length", edit(sign(t, d, 1), func(s *signed) { s.Signatures[0].KeyID = KeyID(nil) }), Keys{[]ed25519.PublicKey{nil}, 1}, now, "policy_signature"},
		{"a document changed after it was signed", edit(sign(t, d, 1, 2), func(s *signed) {
			s.Document = bytes.Replace(s.Document, []byte(`"sequence": 7`), []byte(`"sequence": 9`), 1)
		}), two, now, "policy_signature"},
		{"a signature cut short", edit(sign(t, d, 1, 2), func(s *signed) { s.Signatures[1].Signature = s.Signatures[1].Signature[:63] }), two, now, "policy_signature"},
		{"one wrong beside enough", edit(sign(t, d, 1, 2, 3), func(s *signed) { s.Signatures[2].Signature[0] ^= 1 }), two, now, "policy_signature"},
		{"a signature without the domain", edit(sign(t, d, 1), func(s *signed) { s.Signatures[0].Signature = ed25519.Sign(key(1), s.Document) }), with(two, 1), now, "policy_signature"},
		{"another's signature under a pinned name", edit(sign(t, d, 9), func(s *signed) { s.Signatures[0].KeyID = KeyID(public(1)) }), with(two, 1), now, "policy_signature"},
		{"bytes that are signed and no document", edit(sign(t, d, 1), func(s *signed) {
			s.Document = []byte(`{"version": 1}`)
			s.Signatures[0].Signature = ed25519.Sign(key(1), message(s.Document))
		}), with(two, 1), now, "policy_malformed"},
		{"no JSON", []byte("policy"), two, now, "policy_malformed"},
		{"an unknown key", []byte(`{"document":"e30=","signatures":[],"trusted":true}`), two, now, "policy_malformed"},
		{"no document", []byte(`{"signatures":[]}`), two, now, "policy_malformed"},
		{"null", []byte(`{"document":"e30=","signatures":null}`), two, now, "policy_malformed"},
		{"too many signatures", edit(sign(t, d, 1, 2), func(s *signed) {
			for range maxSignatures {
				s.Signatures = append(s.Signatures, s.Signatures[0])
			}
		}), two, now, "policy_malformed"},
		{"too many bytes", bytes.Repeat([]byte(" "), MaxSigned+1), two, now, "policy_malformed"},
		{"before it was issued", sign(t, d, 1, 2), two, now.Add(-time.Hour), "policy_future"},
		{"its last second", sign(t, d, 1, 2), two, d.Expires.Add(-time.Second), ""},
		{"expired", sign(t, d, 1, 2), two, d.Expires, "policy_expired"},
	} {
		got, err := Open(c.data, c.keys, c.at)
		if fault.Code(err) != c.code || (got != nil) != (c.code == "") {
			t.Errorf("%s: %v, want code %q", c.what, err, c.code)
		}
	}
	if _, err := Sign([]byte("{}"), key(1)); fault.Code(err) != "policy_malformed" {
		t.Errorf("signed what is no document: %v", err)
	}
	if _, err := Sign(encode(t, d), nil); fault.Code(err) != "policy_signature" {
		t.Error(err)
	}
	if raw, err := Bytes(sign(t, d, 1)); err != nil || !bytes.Equal(raw, encode(t, d)) {
		t.Error(err)
	}
	if once, twice := sign(t, d, 1), sign(t, d, 1, 1); !bytes.Equal(once, twice) {
		t.Error("a key that signs again has two signatures")
	}
}

func TestSuccessor(t *testing.T) {
	frozenApp := func() *Document { d := document(); d.Apps[0].Frozen = true; return d }
	at := now.Add(time.Hour)
	for _, c := range []struct {
		what     string
		old, new func(*Document)
		code     string
	}{
		{"the next", nil, nil, ""},
		{"a jump", nil, func(d *Document) { d.Sequence += 10 }, ""},
		{"the same sequence", nil, func(d *Document) { d.Sequence = 7 }, "policy_rollback"},
		{"a lower sequence", nil, func(d *Document) { d.Sequence = 6 }, "policy_rollback"},
		{"a lower key epoch", nil, func(d *Document) { d.KeyEpoch = KeyEpoch{1, 1} }, "policy_epoch"},
		{"key epochs no more", nil, func(d *Document) { d.KeyEpoch = KeyEpoch{} }, "policy_epoch"},
		{"an older key epoch given again", func(d *Document) { d.KeyEpoch = KeyEpoch{2, 2} }, nil, "policy_epoch"},
		{"a higher key epoch", nil, func(d *Document) { d.KeyEpoch = KeyEpoch{3, 2} }, ""},
		{"a lower least epoch of images", nil, func(d *Document) { d.MinOSEpoch = 2 }, "policy_epoch"},
		{"a higher least epoch of images", nil, func(d *Document) { d.MinOSEpoch = 4 }, ""},
		{"trust falls", nil, func(d *Document) { d.Trust = dstack.TrustDevelopment }, "policy_trust"},
		{"trust rises", func(d *Document) { d.Trust = dstack.TrustDevelopment }, nil, "policy_trust"},
		{"an app that is not frozen changes", func(d *Document) { d.Apps[0].Frozen = false }, func(d *Document) { d.Apps[0].Name = "x" }, ""},
		{"an app that is not frozen goes", func(d *Document) { d.Apps[0].Frozen = false }, func(d *Document) { d.Apps = nil }, ""},
		{"a frozen app stays", nil, nil, ""},
		{"a frozen app's hash is revoked", nil, func(d *Document) { d.Apps[0].ComposeHashes[0].Revoked = &Revocation{now, "leaks"} }, ""},
		{"a frozen app gets a hash", nil, func(d *Document) {
			d.Apps[0].ComposeHashes = append(d.Apps[0].ComposeHashes, Compose{Hash: dstack.ComposeHash{1}})
		}, "policy_frozen"},
		{"a frozen app's hash is another", nil, func(d *Document) { d.Apps[0].ComposeHashes[0].Hash[0]++ }, "policy_frozen"},
		{"a frozen app loses a hash", nil, func(d *Document) { d.Apps[0].ComposeHashes = nil }, "policy_frozen"},
		{"a frozen app goes", nil, func(d *Document) { d.Apps = nil }, "policy_frozen"},
		{"a frozen app thaws", nil, func(d *Document) { d.Apps[0].Frozen = false }, "policy_frozen"},
		{"a frozen app's names", nil, func(d *Document) { d.Apps[0].Names = append(d.Apps[0].Names, "b.example.org") }, "policy_frozen"},
		{"a frozen app's devices", nil, func(d *Document) { d.Apps[0].Devices = []dstack.DeviceID{} }, "policy_frozen"},
		{"a frozen app's date comes nearer", func(d *Document) { d.Apps[0].ComposeHashes[0].NotBefore = &at }, nil, "policy_frozen"},
		{"a frozen app's revocation is undone", func(d *Document) { d.Apps[0].ComposeHashes[0].Revoked = &Revocation{now, "leaks"} }, nil, "policy_frozen"},
		{"a frozen app's revocation changes", func(d *Document) { d.Apps[0].ComposeHashes[0].Revoked = &Revocation{now, "leaks"} },
			func(d *Document) { d.Apps[0].ComposeHashes[0].Revoked = &Revocation{now, "does not"} }, "policy_frozen"},
		{"another app comes", nil, func(d *Document) { d.Apps = append([]App{{AppID: dstack.AppID{1}}}, d.Apps...) }, ""},
	} {
		old, next := frozenApp(), frozenApp()
		next.Sequence++
		if c.old != nil {
			c.old(old)
		}
		if c.new != nil {
			c.new(next)
		}
		if err := Successor(old, next); fault.Code(err) != c.code || (err != nil) != (c.code != "") {
			t.Errorf("%s: %v, want code %q", c.what, err, c.code)
		}
	}
}

func TestAuthority(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.json")
	keys := Keys{[]ed25519.PublicKey{public(1), public(2)}, 1}
	clock := func() time.Time { return now }
	reopen := func(keys Keys) *Authority {
		t.Helper()
		a, err := OpenAuthority(path, keys, clock)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	decide := func(a *Authority, r governance.Request) governance.Decision {
		t.Helper()
		d, err := a.Decide(context.Background(), r)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	seq := func(n uint64) *Document { d := document(); d.Sequence = n; return d }

	a := reopen(keys)
	if got := decide(a, request()); got.Allowed || got.Code != codeMissing {
		t.Errorf("without a document: %+v", got)
	}
	if _, err := a.About(context.Background()); fault.Code(err) != "policy_missing" {
		t.Error(err)
	}
	if a.Signed() != nil {
		t.Error("a document from nowhere")
	}
	first := sign(t, seq(5), 1)
	if err := a.Update(first); err != nil {
		t.Fatal(err)
	}
	got := decide(a, request())
	if !got.Allowed || !regexp.MustCompile(`^policy 5 sha256:[0-9a-f]{16}$`).MatchString(got.By) {
		t.Errorf("%+v", got)
	}
	about, err := a.About(context.Background())
	if err != nil || about.Dev || about.GatewayAppID != gateway.String() || about.By != got.By {
		t.Errorf("%+v %v", about, err)
	}
	if !bytes.Equal(a.Signed(), first) {
		t.Error("another document in force")
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Error(fi, err)
	}

	// The same once more, then what may not follow.
	if err := a.Update(first); err != nil {
		t.Error(err)
	}
	other := seq(5)
	other.Apps[0].Name = "other"
	expired := seq(6)
	expired.Issued, expired.Expires = now.Add(-2*time.Hour), now.Add(-time.Hour)
	for _, again := range []*Authority{a, reopen(keys)} {
		for _, c := range []struct {
			what string
			data []byte
			code string
		}{
			{"older", sign(t, seq(4), 1), "policy_rollback"},
			{"another of the same sequence", sign(t, other, 1), "policy_conflict"},
			{"a stranger's", sign(t, seq(6), 9), "policy_signature"},
			{"an expired one", sign(t, expired, 1), "policy_expired"},
			{"none", nil, "policy_malformed"},
		} {
			if err := again.Update(c.data); fault.Code(err) != c.code {
				t.Errorf("%s: %v, want %s", c.what, err, c.code)
			}
		}
		if got := decide(again, request()); !got.Allowed || !strings.HasPrefix(got.By, "policy 5 ") {
			t.Errorf("after refused updates: %+v", got)
		}
	}

	// Frozen over a restart.
	a = reopen(keys)
	fixed := seq(6)
	fixed.Apps[0].Frozen = true
	if err := a.Update(sign(t, fixed, 2)); err != nil {
		t.Fatal(err)
	}
	a = reopen(keys)
	thawed := seq(7)
	if err := a.Update(sign(t, thawed, 1)); fault.Code(err) != "policy_frozen" {
		t.Error(err)
	}

	// An expired document decides nothing, and does not make room for an older one.
	late := request()
	late.At = fixed.Expires.Add(time.Hour)
	if got := decide(a, late); got.Allowed || got.Code != codeExpired || !strings.Contains(got.By, "sha256:") {
		t.Errorf("%+v", got)
	}
	if got := decide(a, request()); !got.Allowed {
		t.Errorf("%+v", got)
	}

	// Other keys: what they did not sign does not count, and is the floor still.
	b := reopen(Keys{[]ed25519.PublicKey{public(3)}, 1})
	if got := decide(b, request()); got.Allowed || got.Code != codeMissing {
		t.Errorf("%+v", got)
	}
	if err := b.Update(sign(t, seq(5), 3)); fault.Code(err) != "policy_rollback" {
		t.Error(err)
	}
	if err := b.Update(sign(t, fixed, 3)); err != nil {
		t.Errorf("the same document signed by the new keys: %v", err)
	}
	if got := decide(b, request()); !got.Allowed {
		t.Errorf("%+v", got)
	}
}

func TestAnAuthorityWithoutItsFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.json")
	keys := Keys{[]ed25519.PublicKey{public(1)}, 1}
	clock := func() time.Time { return now }
	a, err := OpenAuthority(path, keys, clock)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Update(sign(t, document(), 1)); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, data := range map[string][]byte{
		"empty":              nil,
		"cut":                good[:len(good)/2],
		"another sequence":   bytes.Replace(good, []byte(`"sequence":7`), []byte(`"sequence":6`), 1),
		"another hash":       bytes.Replace(good, []byte(`"sha256":"`), []byte(`"sha256":"00`), 1),
		"another version":    bytes.Replace(good, []byte(`"version":1`), []byte(`"version":2`), 1),
		"an unknown key":     bytes.Replace(good, []byte(`"version":1`), []byte(`"version":1,"x":1`), 1),
		"another's document": bytes.Replace(good, []byte(`"signed":"`), []byte(`"signed":"AAAA`), 1),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenAuthority(path, keys, clock); fault.Code(err) != "policy_floor" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o622); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(path, keys, clock); fault.Code(err) != "policy_floor" {
		t.Errorf("a file that others may write: %v", err)
	}

	// A document that cannot be remembered does not count.
	lost, err := OpenAuthority(filepath.Join(dir, "absent", "policy.json"), keys, clock)
	if err != nil {
		t.Fatal(err)
	}
	if err := lost.Update(sign(t, document(), 1)); fault.Code(err) != "policy_floor" {
		t.Error(err)
	}
	if got, _ := lost.Decide(context.Background(), request()); got.Allowed || got.Code != codeMissing {
		t.Errorf("%+v", got)
	}
}

func TestEdits(t *testing.T) {
	d := document()
	before := encode(t, d)
	other := dstack.ComposeHash{0xc1}
	step := func(next *Document, err error) *Document {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if next.Sequence != d.Sequence+1 {
			t.Errorf("sequence %d after %d", next.Sequence, d.Sequence)
		}
		return next
	}
	hashes := []Compose{{Hash: other}}
	next := step(d.AllowApp(App{AppID: appID, ComposeHashes: hashes, RequireSession: true}))
	hashes[0].Hash[5] = 9 // what was given is no part of the document
	if a := next.Apps[0]; len(a.ComposeHashes) != 2 || a.ComposeHashes[1].Hash != other || !a.RequireSession || a.Name != "web" || len(a.Names) != 1 {
		t.Errorf("%+v", a)
	}
	r := request()
	r.Boot.ComposeHash, r.Session = other, true
	if got := next.Decide(r); !got.Allowed {
		t.Errorf("%+v", got)
	}
	added := step(d.AllowApp(App{AppID: dstack.AppID{0xb}, ComposeHashes: []Compose{{Hash: other}}, AnyName: true}))
	r.Boot.AppID = dstack.AppID{0xb}
	if got := added.Decide(r); !got.Allowed || got.Names != nil {
		t.Errorf("%+v", got)
	}
	set := step(d.AllowApp(App{AppID: appID, Name: "n", Devices: []dstack.DeviceID{}, Names: []string{}, LeaseSeconds: 5, OSImages: []dstack.ImageHash{image}, Frozen: true, ComposeHashes: []Compose{{Hash: compose, NotBefore: &now}}}))
	if a := set.Apps[0]; a.Name != "n" || a.Devices == nil || a.Names == nil || a.LeaseSeconds != 5 || len(a.OSImages) != 1 || !a.Frozen || a.ComposeHashes[0].NotBefore == nil {
		t.Errorf("%+v", a)
	}

	one := step(d.Revoke(appID, &compose, now, "it leaks"))
	if got := one.Decide(request()); got.Allowed || got.Code != codeComposeRevoked || !strings.Contains(got.Reason, "it leaks") {
		t.Errorf("%+v", got)
	}
	if _, err := one.AllowApp(App{AppID: appID, ComposeHashes: []Compose{{Hash: compose}}}); fault.Code(err) != "policy_edit" {
		t.Errorf("a revoked hash came back: %v", err)
	}
	all, err := next.Revoke(appID, nil, now, "owner left")
	if err != nil || all.Apps[0].ComposeHashes[0].Revoked == nil || all.Apps[0].ComposeHashes[1].Revoked == nil {
		t.Errorf("%+v %v", all, err)
	}
	for what, err := range map[string]error{
		"another hash": second(d.Revoke(appID, &other, now, "x")), "another app": second(d.Revoke(dstack.AppID{}, nil, now, "x")),
		"an app to freeze": second(d.Freeze(dstack.AppID{})),
	} {
		if fault.Code(err) != "policy_edit" {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := d.Revoke(appID, &compose, now, ""); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}

	frozen := step(d.Freeze(appID))
	if _, err := frozen.AllowApp(App{AppID: appID, ComposeHashes: []Compose{{Hash: other}}}); fault.Code(err) != "policy_frozen" {
		t.Error(err)
	}
	if _, err := frozen.Revoke(appID, &compose, now, "it leaks"); err != nil {
		t.Error(err)
	}

	img := step(d.AllowImage(Image{Hash: image, Epoch: 5}))
	if len(img.OSImages) != 2 || img.OSImages[1].Epoch != 5 {
		t.Errorf("%+v", img.OSImages)
	}
	dev := step(d.AllowDevice(kmsDev))
	if len(dev.Devices.IDs) != 2 || len(step(d.AllowDevice(device)).Devices.IDs) != 1 {
		t.Errorf("%+v", dev.Devices)
	}
	open := document()
	open.Devices = Devices{Any: true}
	if got := step(open.AllowDevice(device)); got.Devices.Any || len(got.Devices.IDs) != 1 {
		t.Errorf("%+v", got.Devices)
	}
	mr := Hash{9}
	k := step(d.AllowKMS(Member{MRAggregated: &mr}, device, kmsDev))
	if len(k.KMS.Allow) != 3 || len(k.KMS.Devices) != 2 {
		t.Errorf("%+v", k.KMS)
	}
	if _, err := d.AllowKMS(Member{}); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}
	if _, err := d.AllowApp(App{AppID: dstack.AppID{2}, Names: []string{"*"}}); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}
	for _, c := range []struct{ from, to KeyEpoch }{{KeyEpoch{}, KeyEpoch{1, 1}}, {KeyEpoch{1, 1}, KeyEpoch{2, 1}}, {KeyEpoch{2, 1}, KeyEpoch{3, 2}}} {
		d := document()
		d.KeyEpoch = c.from
		if got, err := d.Rotate(); err != nil || got.KeyEpoch != c.to {
			t.Errorf("%+v: %+v, %v", c.from, got.KeyEpoch, err)
		}
	}
	renewed := step(d.Renew(now.Add(20*24*time.Hour), 24*time.Hour))
	if renewed.Expires != now.Add(21*24*time.Hour) {
		t.Error(renewed.Expires)
	}
	if _, err := d.Renew(now, 2*MaxValidity); fault.Code(err) != "policy_malformed" {
		t.Error(err)
	}
	if !bytes.Equal(before, encode(t, d)) {
		t.Error("an edit changed its own document")
	}
}

func second(_ *Document, err error) error { return err }

// docs/kms-policy.md: its example means what it says, and it names every code.
func TestThePageIsTrue(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(testkit.Root(), "docs", "kms-policy.md"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?s)```json\n(.*?)```").FindSubmatch(page)
	if m == nil {
		t.Fatal("the page has no example")
	}
	d, err := Parse(m[1])
	if err != nil {
		t.Fatal(err)
	}
	r := request()
	r.At = d.Issued.Add(time.Hour)
	r.Boot.AppID, r.Boot.ComposeHash, r.Boot.DeviceID = d.Apps[0].AppID, d.Apps[0].ComposeHashes[1].Hash, d.Devices.IDs[0]
	r.Boot.OSImageHash, r.Session = d.OSImages[0].Hash[:], true
	if got := d.Decide(r); !got.Allowed || got.Lease != 30*time.Minute || got.Epoch != 2 || len(got.Names) != 2 {
		t.Errorf("%+v", got)
	}
	r.Boot.ComposeHash = d.Apps[0].ComposeHashes[0].Hash
	if got := d.Decide(r); got.Code != codeComposeRevoked {
		t.Errorf("%+v", got)
	}
	r.Role, r.Purpose = governance.KMS, governance.Replication
	r.Boot.MRAggregated, r.Boot.DeviceID = *d.KMS.Allow[0].MRAggregated, d.KMS.Devices[0]
	if got := d.Decide(r); !got.Allowed {
		t.Errorf("%+v", got)
	}
	for _, code := range []string{
		codeExpired, codeFuture, codeMissing, codePurpose, codeInstanceID, codeDevTrust, codeTrust, codeTCB, codeAdvisory, codeImage, codeImageUnproven,
		codeDevImage, codeEpoch, codeApp, codeCompose, codeComposeRevoked, codeComposeNotBefore, codeDevice, codeSession, codeKMS,
		"policy_signature", "policy_threshold", "policy_malformed", "policy_rollback", "policy_conflict", "policy_epoch", "policy_trust", "policy_frozen", "policy_floor",
		"webhook_signature", "webhook_expired", "webhook_mismatch", "webhook_unreachable", "webhook_malformed", "webhook_too_large", "webhook_url", "webhook_denied",
	} {
		if !bytes.Contains(page, []byte("`"+code+"`")) {
			t.Errorf("the page does not name %s", code)
		}
	}
	// Every key of a document is in a table.
	var walk func(reflect.Type)
	seen := map[reflect.Type]bool{}
	walk = func(ty reflect.Type) {
		for ty.Kind() == reflect.Pointer || ty.Kind() == reflect.Slice || ty.Kind() == reflect.Map {
			ty = ty.Elem()
		}
		if ty.Kind() != reflect.Struct || seen[ty] || ty == reflect.TypeFor[time.Time]() {
			return
		}
		seen[ty] = true
		for i := range ty.NumField() {
			name, _, _ := strings.Cut(ty.Field(i).Tag.Get("json"), ",")
			if !bytes.Contains(page, []byte("`"+name+"`")) && !bytes.Contains(page, []byte("."+name+"`")) {
				t.Errorf("the page does not say what %s is", name)
			}
			walk(ty.Field(i).Type)
		}
	}
	walk(reflect.TypeFor[Document]())
}

func FuzzParse(f *testing.F) {
	f.Add(encode(f, document()))
	f.Add([]byte(`{"version":1,"sequence":1,"issued":"2026-11-28T12:00:00Z","expires":"2026-11-29T12:00:00Z","trust":"development","devices":{"any":true}}`))
	f.Add([]byte(`{"version":1,"apps":[{"app_id":"00"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse(data)
		if err != nil {
			if fault.Code(err) != "policy_malformed" {
				t.Fatal(err)
			}
			return
		}
		r := request()
		r.At = d.Issued
		if got := d.Decide(r); got.Allowed && (len(d.Apps) == 0 || len(d.OSImages) == 0 || len(d.TCB.Accept) == 0 || !d.Devices.Any && len(d.Devices.IDs) == 0) {
			t.Fatalf("%s allows %+v", data, got)
		}
		again, err := d.Encode()
		if err != nil {
			// Indented, it may be larger than it came.
			if len(data) < MaxDocument/16 {
				t.Fatalf("%s: %v", data, err)
			}
			return
		}
		if _, err := Parse(again); err != nil {
			t.Fatalf("%s\nbecame\n%s: %v", data, again, err)
		}
	})
}

func FuzzOpen(f *testing.F) {
	data := encode(f, document())
	one, err := Sign(data, key(1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(one)
	f.Add([]byte(`{"document":"e30=","signatures":[{"key_id":"","signature":""}]}`))
	keys := Keys{[]ed25519.PublicKey{public(1)}, 1}
	f.Fuzz(func(t *testing.T, in []byte) {
		d, err := Open(in, keys, now)
		if err == nil {
			// Only the document that was signed can come of it.
			if got := encode(t, d); !bytes.Equal(got, data) {
				t.Fatalf("%s opened as %s", in, got)
			}
			return
		}
		if fault.Code(err) == "" || d != nil {
			t.Fatal(d, err)
		}
	})
}

func Example() {
	d := New(dstack.TrustProduction, now, 90*24*time.Hour)
	got := d.Decide(request())
	fmt.Println(got.Allowed, got.Code)
	// Output: false tcb_not_allowed
}
