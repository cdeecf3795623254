// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest/binding"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/keys/derive"
	"github.com/dstack-go/dstack/prpc"
)

type keyVector struct {
	Algorithm, Path, Purpose, Key string
	PublicKey                     string `json:"public_key"`
	Chain0                        string `json:"signature_chain_0"`
}

type cryptoVectors struct {
	GetKey []keyVector `json:"get_key"`
	Sign   []struct {
		Algorithm string
		DataHex   string `json:"data_hex"`
		PublicKey string `json:"public_key"`
		Signature string
	}
	AppKeyAttestation []struct {
		Algorithm  string
		ReportData string `json:"report_data"`
	} `json:"app_key_attestation"`
	KMSLink struct {
		AppID         string `json:"app_id"`
		K256Signature string `json:"k256_signature"`
		MessageHex    string `json:"message_hex"`
		Digest        string `json:"digest_keccak256"`
		Recovered     string `json:"recovered_kms_k256_pubkey"`
	} `json:"kms_link"`
	SimulatorAppKey struct {
		Public    string `json:"app_public_key"`
		Key       string `json:"k256_key"`
		Signature string `json:"k256_signature"`
	} `json:"simulator_app_key"`
	TappdDeriveKey []struct {
		Path, PEM, Scalar string
		DER               string `json:"pkcs8_der"`
	} `json:"tappd_derive_key"`
	UnitTestAppKey struct {
		Key           string    `json:"k256_key"`
		Ed25519Text   string    `json:"ed25519_report_data_text"`
		Secp256k1Text string    `json:"secp256k1_report_data_text"`
		Ed25519       keyVector `json:"get_key_vms_ed25519"`
		Secp256k1     keyVector `json:"get_key_vms_secp256k1"`
	} `json:"unit_test_app_key"`
}

func vectors(t testing.TB) cryptoVectors {
	t.Helper()
	var v cryptoVectors
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/crypto.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// fixture serves the files of upstream's simulator.
func fixture(t testing.TB) *guest {
	t.Helper()
	ev, err := container.Decode(testkit.Vectors(t, "guest-agent/simulator/attestation.bin"))
	if err != nil {
		t.Fatal(err)
	}
	var sys struct {
		VMConfig string `json:"vm_config"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/simulator/sys-config.json"), &sys); err != nil {
		t.Fatal(err)
	}
	cfg, init := config(t, testManifest)
	cfg.Manifest, cfg.VMConfig, cfg.Events = testkit.Vectors(t, "guest-agent/simulator/app-compose.json"), sys.VMConfig, ev.EventLog
	cfg.AppKeys = testkit.Vectors(t, "guest-agent/simulator/appkeys.json")
	init.quoteFile = ev.Quote
	return serve(t, cfg, init, Options{fixtureConfig: ev.Config})
}

func (g *guest) dstack(t testing.TB) *prpc.Client {
	return &prpc.Client{BaseURL: "http://x", HTTP: g.client(t, initrpc.ListenDstack), JSON: true}
}

func (g *guest) tappd(t testing.TB) *prpc.Client {
	return &prpc.Client{BaseURL: "http://x/prpc", HTTP: g.client(t, initrpc.ListenTappd), JSON: true}
}

func TestTheSimulatorsFixtureIsServedAsUpstreamServesIt(t *testing.T) {
	g := fixture(t)
	var want map[string]any
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/simulator-info.json"), &want); err != nil {
		t.Fatal(err)
	}
	delete(want, "_note")
	for _, c := range []struct{ sock, url string }{{initrpc.ListenDstack, "http://x/Info"}, {initrpc.ListenTappd, "http://x/prpc/Tappd.Info"}, {initrpc.ListenExternal, "http://x/prpc/Info?json"}} {
		_, body, _ := post(t, g.client(t, c.sock), c.url, `{}`)
		var got, tcb map[string]any
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(got["tcb_info"].(string)), &tcb); err != nil {
			t.Fatal(err)
		}
		got["tcb_info"] = tcb
		for name := range want { // the vector leaves certificate and cloud out
			if d := cmp.Diff(want[name], got[name]); d != "" {
				t.Errorf("%s: %s differs (-want +got):\n%s", c.sock, name, d)
			}
		}
	}
	var quote agentpb.GetQuoteResponse
	if err := g.dstack(t).Call(context.Background(), "GetQuote", &agentpb.RawQuoteArgs{ReportData: []byte("test")}, &quote); err != nil {
		t.Fatal(err)
	}
	if got := reportData(t, quote.Quote); got != (dstack.ReportData{'t', 'e', 's', 't'}) || !strings.Contains(quote.VmConfig, "64f0d154") {
		t.Errorf("quote over %s, vm_config %s", got, quote.VmConfig)
	}
}

func TestGetKeyIsUpstreams(t *testing.T) {
	g := fixture(t)
	v := vectors(t)
	for _, k := range v.GetKey {
		var got agentpb.GetKeyResponse
		req := &agentpb.GetKeyArgs{Path: k.Path, Purpose: k.Purpose, Algorithm: k.Algorithm}
		if err := g.dstack(t).Call(context.Background(), "GetKey", req, &got); err != nil {
			t.Errorf("%s %q: %v", k.Algorithm, k.Path, err)
			continue
		}
		chain := []string{k.Chain0, v.SimulatorAppKey.Signature}
		if hex.EncodeToString(got.Key) != k.Key || len(got.SignatureChain) != 2 ||
			hex.EncodeToString(got.SignatureChain[0]) != chain[0] || hex.EncodeToString(got.SignatureChain[1]) != chain[1] {
			t.Errorf("%s %q: key %x, chain %x", k.Algorithm, k.Path, got.Key, got.SignatureChain)
		}
		// And as a client verifies it (guest-agent.md §8.2).
		public := unhex(t, k.PublicKey)
		app, err := derive.Recover(got.SignatureChain[0], []byte(k.Purpose+":"+hex.EncodeToString(public)))
		if err != nil || hex.EncodeToString(app) != v.SimulatorAppKey.Public {
			t.Errorf("%q: signed by %x, %v", k.Path, app, err)
		}
		root, err := derive.RecoverApp(got.SignatureChain[1], dstack.AppID(unhex(t, v.KMSLink.AppID)), app)
		if err != nil || hex.EncodeToString(root) != v.KMSLink.Recovered {
			t.Errorf("%q: the app's key was issued by %x, %v", k.Path, root, err)
		}

		var old agentpb.DeriveK256KeyResponse
		if err := g.tappd(t).Call(context.Background(), "Tappd.DeriveK256Key", req, &old); err != nil ||
			!bytes.Equal(old.K256Key, got.Key) || !cmp.Equal(old.K256SignatureChain, got.SignatureChain) {
			t.Errorf("DeriveK256Key %q: %v, %v", k.Path, &old, err)
		}
	}
	for _, alias := range []string{"", "k256"} {
		var got agentpb.GetKeyResponse
		if err := g.tappd(t).Call(context.Background(), "GetKey", &agentpb.GetKeyArgs{Path: "/", Purpose: "test", Algorithm: alias}, &got); err != nil ||
			hex.EncodeToString(got.Key) != v.GetKey[1].Key || hex.EncodeToString(got.SignatureChain[0]) != v.GetKey[1].Chain0 {
			t.Errorf("algorithm %q: %v, %v", alias, &got, err)
		}
	}
	for _, name := range []string{"rsa", "secp256k1_prehashed", "ED25519", strings.Repeat("x", 1000)} {
		err := g.dstack(t).Call(context.Background(), "GetKey", &agentpb.GetKeyArgs{Algorithm: name}, &agentpb.GetKeyResponse{})
		if fault.Code(err) != "key_algorithm" || !strings.Contains(err.Error(), "Unsupported algorithm") || len(err.Error()) > 200 {
			t.Errorf("algorithm %.20q: %v", name, err)
		}
	}
	status, body, _ := get(t, g.client(t, initrpc.ListenDstack), "http://x/GetKey?path=%2F&purpose=test")
	if status != 200 || !strings.Contains(body, v.GetKey[1].Key) {
		t.Errorf("GET: %d %s", status, body)
	}
}

// The address that upstream's tests know its simulator's wallet by.
func TestTheWalletOfTheFixture(t *testing.T) {
	var want struct {
		Address string `json:"eth_test_address"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/crypto.json"), &want); err != nil {
		t.Fatal(err)
	}
	g := fixture(t)
	var got agentpb.GetKeyResponse
	if err := g.dstack(t).Call(context.Background(), "GetKey", &agentpb.GetKeyArgs{Path: "eth/test", Purpose: "wallet"}, &got); err != nil {
		t.Fatal(err)
	}
	point := secp256k1.PrivKeyFromBytes(got.Key).PubKey().SerializeUncompressed()[1:]
	if address := "0x" + hex.EncodeToString(derive.Keccak256(point)[12:]); address != want.Address {
		t.Errorf("address %s, want %s", address, want.Address)
	}
}

// With no KMS there is no signature of the app's key, and the chain says so.
func TestTheChainOfAnAppWithoutKMSEndsEmpty(t *testing.T) {
	g := newGuest(t)
	_, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/GetKey", `{}`)
	var got struct {
		Chain []string `json:"signature_chain"`
	}
	if json.Unmarshal([]byte(body), &got); len(got.Chain) != 2 || len(got.Chain[0]) != 130 || got.Chain[1] != "" {
		t.Errorf("GetKey: %s", body)
	}
}

func TestSignIsUpstreams(t *testing.T) {
	g := fixture(t)
	v := vectors(t)
	ctx := context.Background()
	chain1 := map[string]string{}
	for _, k := range v.GetKey {
		if k.Path == "vms" {
			chain1[k.Algorithm] = k.Chain0
		}
	}
	for _, s := range v.Sign {
		var got agentpb.SignResponse
		req := &agentpb.SignRequest{Algorithm: s.Algorithm, Data: unhex(t, s.DataHex)}
		if err := g.dstack(t).Call(ctx, "Sign", req, &got); err != nil {
			t.Errorf("%s: %v", s.Algorithm, err)
			continue
		}
		base := strings.TrimSuffix(s.Algorithm, "_prehashed")
		if hex.EncodeToString(got.Signature) != s.Signature || hex.EncodeToString(got.PublicKey) != s.PublicKey || len(got.SignatureChain) != 3 ||
			!bytes.Equal(got.SignatureChain[0], got.Signature) || hex.EncodeToString(got.SignatureChain[1]) != chain1[base] ||
			hex.EncodeToString(got.SignatureChain[2]) != v.SimulatorAppKey.Signature {
			t.Errorf("%s: %v", s.Algorithm, &got)
		}
		for name, change := range map[string]func(*agentpb.VerifyRequest){
			"":      func(*agentpb.VerifyRequest) {},
			"data":  func(r *agentpb.VerifyRequest) { r.Data[0] ^= 1 },
			"s":     func(r *agentpb.VerifyRequest) { r.Signature[40] ^= 1 },
			"other": func(r *agentpb.VerifyRequest) { r.Signature[5] ^= 1 },
		} {
			r := &agentpb.VerifyRequest{Algorithm: s.Algorithm, Data: bytes.Clone(req.Data), Signature: bytes.Clone(got.Signature), PublicKey: got.PublicKey}
			change(r)
			var verdict agentpb.VerifyResponse
			if err := g.dstack(t).Call(ctx, "Verify", r, &verdict); err != nil || verdict.Valid != (name == "") {
				t.Errorf("%s with another %q: %v, %v", s.Algorithm, name, verdict.Valid, err)
			}
		}
	}
	for _, c := range []struct{ algorithm, code, text string }{
		{"", "key_algorithm", "Unsupported algorithm"}, {"rsa", "key_algorithm", "Unsupported algorithm"}, {"secp256k1_prehashed", "digest_length", "32-byte digest"},
	} {
		err := g.dstack(t).Call(ctx, "Sign", &agentpb.SignRequest{Algorithm: c.algorithm, Data: make([]byte, 31)}, &agentpb.SignResponse{})
		if fault.Code(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("Sign %q: %v", c.algorithm, err)
		}
	}
}

func TestVerifyTellsMalformedFromWrong(t *testing.T) {
	g := fixture(t)
	v := vectors(t)
	ed, k := v.Sign[0], v.Sign[1]
	// n − s: the same signature with a high s, which upstream's library does not take.
	order := unhex(t, "fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141")
	high := unhex(t, k.Signature)
	borrow := 0
	for i := 31; i >= 0; i-- {
		d := int(order[i]) - int(high[32+i]) - borrow
		borrow = 0
		if d < 0 {
			d, borrow = d+256, 1
		}
		high[32+i] = byte(d)
	}
	notOnCurve := make([]byte, 32)
	notOnCurve[0] = 2 // y = 2: no x (RFC 8032)
	full := func(prefix byte) []byte { return append([]byte{prefix}, make([]byte, 64)...) }
	point, err := secp256k1.ParsePubKey(unhex(t, k.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	hybrid := point.SerializeUncompressed()
	hybrid[0] = 6 | hybrid[64]&1
	uncompressed := unhex(t, "04"+"6105f01d1fd781568f7c208b087b1c4f522601410ed7e9c7870d573de7c46d54")
	for _, c := range []struct {
		name, algorithm   string
		data, sig, public []byte
		code              string // "" means valid:false
	}{
		{"a high s", "secp256k1", unhex(t, k.DataHex), high, unhex(t, k.PublicKey), ""},
		{"a short signature", "secp256k1", nil, make([]byte, 63), unhex(t, k.PublicKey), "signature_malformed"},
		{"r of zero", "secp256k1", nil, make([]byte, 64), unhex(t, k.PublicKey), "signature_malformed"},
		{"r of the order", "k256", nil, append(bytes.Clone(order), order...), unhex(t, k.PublicKey), "signature_malformed"},
		{"no key", "secp256k1", nil, high, nil, "signature_malformed"},
		{"a point that is none", "secp256k1", nil, high, full(4), "signature_malformed"},
		{"a hybrid key", "secp256k1", unhex(t, k.DataHex), unhex(t, k.Signature), hybrid, "signature_malformed"},
		{"half a point", "secp256k1", nil, high, uncompressed, "signature_malformed"},
		{"a short digest", "secp256k1_prehashed", make([]byte, 31), high, unhex(t, k.PublicKey), "digest_length"},
		{"a long digest", "secp256k1_prehashed", make([]byte, 33), high, unhex(t, k.PublicKey), "digest_length"},
		{"another message", "ed25519", []byte("x"), unhex(t, ed.Signature), unhex(t, ed.PublicKey), ""},
		{"a short signature", "ed25519", nil, make([]byte, 63), unhex(t, ed.PublicKey), "signature_malformed"},
		{"a short key", "ed25519", nil, make([]byte, 64), make([]byte, 31), "signature_malformed"},
		{"a key that is no point", "ed25519", nil, make([]byte, 64), notOnCurve, "signature_malformed"},
		{"no algorithm", "", nil, nil, nil, "key_algorithm"},
	} {
		var verdict agentpb.VerifyResponse
		err := g.dstack(t).Call(context.Background(), "Verify", &agentpb.VerifyRequest{Algorithm: c.algorithm, Data: c.data, Signature: c.sig, PublicKey: c.public}, &verdict)
		if fault.Code(err) != c.code || verdict.Valid {
			t.Errorf("%s: %v, %v, want code %q", c.name, verdict.Valid, err, c.code)
		}
	}
}

// onEdwards25519 agrees with the keys that exist and with what RFC 8032 excludes.
func TestPointsOnEdwards25519(t *testing.T) {
	seed := make([]byte, 32)
	for i := range 50 {
		seed[0] = byte(i)
		if !onEdwards25519(ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey)) {
			t.Fatalf("the key of seed %d is said to be no point", i)
		}
	}
	on := 0
	for i := range 200 {
		y := make([]byte, 32)
		y[0], y[9] = byte(i), 1
		if onEdwards25519(y) {
			on++
		}
	}
	if on < 60 || on > 140 { // half of all y have an x
		t.Errorf("%d of 200 y have a point", on)
	}
}

func TestEvidenceForTheAppsKey(t *testing.T) {
	g := fixture(t)
	v := vectors(t)
	pc := &prpc.Client{BaseURL: "http://x/prpc", HTTP: g.client(t, initrpc.ListenExternal), JSON: true}
	before := g.init.quotes.Load()
	for range 5 {
		for _, c := range v.AppKeyAttestation {
			var got agentpb.GetQuoteResponse
			if err := pc.Call(context.Background(), "Worker.GetAttestationForAppKey", &agentpb.GetAttestationForAppKeyRequest{Algorithm: c.Algorithm}, &got); err != nil {
				t.Fatal(err)
			}
			if hex.EncodeToString(got.ReportData) != c.ReportData || reportData(t, got.Quote) != dstack.ReportData(got.ReportData) {
				t.Errorf("%s: %q", c.Algorithm, got.ReportData)
			}
		}
	}
	if n := g.init.quotes.Load() - before; n != 2 {
		t.Errorf("10 questions took %d quotes, want one for each algorithm", n)
	}
	for _, name := range []string{"", "secp256k1_prehashed", "rsa"} {
		err := pc.Call(context.Background(), "GetAttestationForAppKey", &agentpb.GetAttestationForAppKeyRequest{Algorithm: name}, &agentpb.GetQuoteResponse{})
		if fault.Code(err) != "key_algorithm" {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestUpstreamsUnitTestKey(t *testing.T) {
	v := vectors(t).UnitTestAppKey
	app, err := keys.NewAppKey(unhex(t, v.Key))
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{keys: &keys.AppKeys{App: app}}
	for _, c := range []struct {
		want keyVector
		text string
	}{{v.Ed25519, v.Ed25519Text}, {v.Secp256k1, v.Secp256k1Text}} {
		d, err := a.derive("vms", "signing", c.want.Algorithm)
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(d.key) != c.want.Key || hex.EncodeToString(d.public) != c.want.PublicKey || hex.EncodeToString(d.chain[0]) != c.want.Chain0 {
			t.Errorf("%s: %x %x", c.want.Algorithm, d.key, d.public)
		}
		data, err := a.appKeyData(c.want.Algorithm)
		if err != nil || string(bytes.TrimRight(data[:], "\x00")) != c.text {
			t.Errorf("%s: %q, %v", c.want.Algorithm, data[:], err)
		}
	}
}

// What the rest of the file of vectors says, held against the packages it is about.
func TestTheOtherVectors(t *testing.T) {
	var v struct {
		RATLS struct {
			SPKI    string `json:"spki_der"`
			Data    string `json:"report_data"`
			KMSRoot string `json:"kms_root_ca_report_data"`
		} `json:"ra_tls"`
		DH struct {
			Context []string
			Root    string `json:"root_pkcs8"`
			Derived string `json:"derived_pkcs8"`
			Secret  string
		} `json:"dh_secret"`
	}
	if err := json.Unmarshal(testkit.Vectors(t, "guest-agent/crypto.json"), &v); err != nil {
		t.Fatal(err)
	}
	spki := unhex(t, v.RATLS.SPKI)
	if got := ratls.ReportData(spki); got.String() != v.RATLS.Data {
		t.Errorf("ratls-cert: %s", got)
	}
	if got := binding.ReportData("kms-root-ca", spki); got.String() != v.RATLS.KMSRoot {
		t.Errorf("kms-root-ca: %s", got)
	}
	root := unhex(t, v.DH.Root)[36:68] // the scalar
	var context [][]byte
	for _, c := range v.DH.Context {
		context = append(context, []byte(c))
	}
	key, err := derive.P256(root, context...)
	if err != nil {
		t.Fatal(err)
	}
	der, err := derive.PKCS8(key)
	if err != nil || hex.EncodeToString(der) != v.DH.Derived {
		t.Errorf("derived key %x, %v", der, err)
	}
	if secret, err := derive.DH(root, context...); err != nil || hex.EncodeToString(secret) != v.DH.Secret {
		t.Errorf("secret %x, %v", secret, err)
	}
}

// The vector of the link from the KMS to the app, as a client checks it.
func TestTheKMSLinkVector(t *testing.T) {
	v := vectors(t)
	message := unhex(t, v.KMSLink.MessageHex)
	if hex.EncodeToString(derive.Keccak256(message)) != v.KMSLink.Digest {
		t.Error("digest")
	}
	root, err := derive.Recover(unhex(t, v.KMSLink.K256Signature), message)
	if err != nil || hex.EncodeToString(root) != v.KMSLink.Recovered {
		t.Errorf("recovered %x, %v", root, err)
	}
	public, err := derive.K256Public(unhex(t, v.SimulatorAppKey.Key))
	if err != nil || hex.EncodeToString(public) != v.SimulatorAppKey.Public {
		t.Errorf("public key %x, %v", public, err)
	}
}

// Events of the app.

func TestEmitEventReachesLaterEvidence(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	before := len(g.state.Load().events)
	status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/EmitEvent", `{"event":"deployed","payload":"0102"}`)
	if status != 200 || body != "null" {
		t.Fatalf("EmitEvent: %d %s", status, body)
	}
	if err := g.tappd(t).Call(ctx, "Tappd.EmitEvent", &agentpb.EmitEventArgs{Event: "again"}, nil); err != nil {
		t.Fatal(err)
	}
	var quote agentpb.GetQuoteResponse
	if err := g.dstack(t).Call(ctx, "GetQuote", &agentpb.RawQuoteArgs{ReportData: []byte("x")}, &quote); err != nil {
		t.Fatal(err)
	}
	log, err := eventlog.ParseJSON([]byte(quote.EventLog))
	if err != nil {
		t.Fatal(err)
	}
	if len(log) != before+2 || log[before].Name != "deployed" || !bytes.Equal(log[before].Payload, []byte{1, 2}) || log[before+1].Name != "again" {
		t.Errorf("log %+v", log[before:])
	}
	mr, err := eventlog.Replay(log, 3)
	if err != nil || mr != g.init.rtmr3 {
		t.Errorf("the log replays to %s, %v; the register is %s", mr, err, g.init.rtmr3)
	}
	var info agentpb.AppInfo
	if err := g.dstack(t).Call(ctx, "Info", &emptypb.Empty{}, &info); err != nil {
		t.Fatal(err)
	}
	var tcb tcbInfo
	if err := json.Unmarshal([]byte(info.TcbInfo), &tcb); err != nil {
		t.Fatal(err)
	}
	if tcb.RTMR3 != mr.String() || len(tcb.EventLog) != before+2 || tcb.MRAggregated != hex.EncodeToString(info.MrAggregated) {
		t.Errorf("Info does not know of the events: %s", tcb.RTMR3)
	}
	if id, err := eventlog.Boundary(tcb.EventLog); err != nil || id.AppID != testApp {
		t.Errorf("identity after app events: %v, %v", id.AppID, err)
	}
}

// Threat B09: no application can write what the system commits its identity by.
func TestThreat_B09_AppsCannotEmitReservedNames(t *testing.T) {
	g := newGuest(t)
	for _, c := range []struct{ name, code string }{
		{"compose-hash", "event_name_reserved"}, {"app-id", "event_name_reserved"}, {"system-ready", "event_name_reserved"}, {"boot-mr-done", "event_name_reserved"},
		{"system-anything", "event_name_reserved"}, {"dstack-anything", "event_name_reserved"}, {"a:b", "event_name_reserved"}, {"key-provider", "event_name_reserved"},
		{"", "event_name_length"}, {strings.Repeat("x", 129), "event_name_length"},
	} {
		for _, pc := range []*prpc.Client{g.dstack(t), g.tappd(t)} {
			if err := pc.Call(context.Background(), "EmitEvent", &agentpb.EmitEventArgs{Event: c.name}, nil); fault.Code(err) != c.code {
				t.Errorf("%.20q: %v, want code %s", c.name, err, c.code)
			}
		}
	}
	if g.init.extends != 0 {
		t.Errorf("%d of them reached init", g.init.extends)
	}
	// The agent refuses on its own: an init that does not look (the simulator's) is not
	// asked either.
	cfg, init := config(t, testManifest)
	a, err := New(context.Background(), cfg, init, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.emitEvent(context.Background(), &agentpb.EmitEventArgs{Event: "compose-hash"}); fault.Code(err) != "event_name_reserved" || init.extends != 0 {
		t.Errorf("without initrpc: %v, %d events", err, init.extends)
	}
}

func TestAppEventsAreBounded(t *testing.T) {
	cfg, init := config(t, testManifest)
	key := bytes.Clone(cfg.ChannelKey)
	g := serve(t, cfg, init, Options{})
	emit := func(pc *prpc.Client, e *agentpb.EmitEventArgs) string {
		return fault.Code(pc.Call(context.Background(), "EmitEvent", e, nil))
	}
	pc := g.dstack(t)
	if code := emit(pc, &agentpb.EmitEventArgs{Event: "big", Payload: make([]byte, maxAppEventBytes)}); code != "event_log_full" {
		t.Errorf("a large event: %s", code)
	}
	for i := range maxAppEvents {
		if code := emit(pc, &agentpb.EmitEventArgs{Event: "e"}); code != "" {
			t.Fatalf("event %d: %s", i, code)
		}
	}
	if code := emit(pc, &agentpb.EmitEventArgs{Event: "e"}); code != "event_log_full" {
		t.Errorf("one event too many: %s", code)
	}
	// An agent that init starts again counts on from what the log has.
	cfg2, init2 := config(t, testManifest)
	cfg2.Events, cfg2.ChannelKey = g.state.Load().events, key
	init2.rtmr3 = init.rtmr3
	if code := emit(serve(t, cfg2, init2, Options{}).dstack(t), &agentpb.EmitEventArgs{Event: "e"}); code != "event_log_full" {
		t.Errorf("after a restart: %s", code)
	}
}

// When it is not known whether the register was extended, no evidence leaves that
// the log might not explain. Keys go on.
func TestALostEventEndsEvidence(t *testing.T) {
	g := newGuest(t)
	ctx := context.Background()
	g.init.extendFail = fault.New("log_full", "full")
	if err := g.dstack(t).Call(ctx, "EmitEvent", &agentpb.EmitEventArgs{Event: "e"}, nil); fault.Code(err) != "log_full" {
		t.Errorf("a refusal: %v", err)
	}
	if err := g.dstack(t).Call(ctx, "GetQuote", &agentpb.RawQuoteArgs{}, nil); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
	g.init.extendFail = fault.New("extend_failed", "unknown")
	if err := g.dstack(t).Call(ctx, "EmitEvent", &agentpb.EmitEventArgs{Event: "e"}, nil); fault.Code(err) != "extend_failed" {
		t.Errorf("a failure: %v", err)
	}
	g.init.extendFail = nil
	for method, req := range map[string]*agentpb.RawQuoteArgs{"GetQuote": {}, "Attest": {}} {
		if err := g.dstack(t).Call(ctx, method, req, nil); fault.Code(err) != "event_log_lost" {
			t.Errorf("%s: %v", method, err)
		}
	}
	if err := g.dstack(t).Call(ctx, "EmitEvent", &agentpb.EmitEventArgs{Event: "e"}, nil); fault.Code(err) != "event_log_lost" {
		t.Errorf("another event: %v", err)
	}
	if err := g.dstack(t).Call(ctx, "GetKey", &agentpb.GetKeyArgs{}, nil); err != nil {
		t.Errorf("GetKey: %v", err)
	}
}

func TestEventsNeedARegister(t *testing.T) {
	cfg, init := config(t, testManifest)
	cfg.TEE = dstack.SEVSNP
	g := serve(t, cfg, init, Options{})
	if err := g.dstack(t).Call(context.Background(), "EmitEvent", &agentpb.EmitEventArgs{Event: "e"}, nil); fault.Code(err) != "events_unsupported" {
		t.Errorf("%v", err)
	}
}

// Scopes.

// Threat J06: a service with key scopes derives the keys of its paths and no
// others, whichever method it tries; the other sockets stay as they were.
func TestThreat_J06_AServiceDerivesItsOwnKeysOnly(t *testing.T) {
	cfg, init := config(t, testManifest)
	cfg.Scopes = map[string][]string{"web": {"web/", "shared"}, "signer": {"vms"}, "none": {}}
	g := serve(t, cfg, init, Options{})
	ctx := context.Background()
	at := func(service string) *prpc.Client {
		return &prpc.Client{BaseURL: "http://x", HTTP: g.client(t, initrpc.ListenScope+service)}
	}
	for _, c := range []struct {
		service, path string
		allowed       bool
	}{
		{"web", "web/a", true}, {"web", "web/", true}, {"web", "web/../signer", true}, {"web", "shared", true},
		{"web", "web", false}, {"web", "webx/a", false}, {"web", "shared/x", false}, {"web", "", false}, {"web", "/web/a", false}, {"web", "vms", false}, {"web", "other", false},
		{"signer", "vms", true}, {"signer", "vms/", false}, {"none", "", false}, {"none", "x", false},
	} {
		for method, req := range map[string]*agentpb.GetKeyArgs{"GetKey": {Path: c.path}, "prpc/Tappd.GetKey": {Path: c.path, Algorithm: "ed25519"}, "prpc/Tappd.DeriveK256Key": {Path: c.path}} {
			var got, want agentpb.GetKeyResponse
			err := at(c.service).Call(ctx, method, req, &got)
			if c.allowed != (err == nil) || err != nil && fault.Code(err) != "key_scope" {
				t.Errorf("%s %s %q: %v", c.service, method, c.path, err)
			}
			// Within the scope it is the key that the whole app has.
			if err := g.dstack(t).Call(ctx, "GetKey", req, &want); err != nil || c.allowed && !bytes.Equal(got.Key, want.Key) {
				t.Errorf("%s %q: another key, %v", method, c.path, err)
			}
		}
		err := at(c.service).Call(ctx, "prpc/Tappd.DeriveKey", &agentpb.DeriveKeyArgs{Path: c.path}, nil)
		if c.allowed != (err == nil) || err != nil && fault.Code(err) != "key_scope" {
			t.Errorf("%s DeriveKey %q: %v", c.service, c.path, err)
		}
	}
	sign := &agentpb.SignRequest{Algorithm: "ed25519", Data: []byte("x")}
	for service, code := range map[string]string{"web": "key_scope", "none": "key_scope", "signer": ""} {
		if err := at(service).Call(ctx, "Sign", sign, nil); fault.Code(err) != code {
			t.Errorf("%s Sign: %v", service, err)
		}
		if err := at(service).Call(ctx, "EmitEvent", &agentpb.EmitEventArgs{Event: "e"}, nil); fault.Code(err) != "key_scope" {
			t.Errorf("%s EmitEvent: %v", service, err)
		}
		if err := at(service).Call(ctx, "GetTlsKey", &agentpb.GetTlsKeyArgs{}, nil); err != nil {
			t.Errorf("%s GetTlsKey: %v", service, err)
		}
		if err := at(service).Call(ctx, "prpc/DeriveKey", &agentpb.DeriveKeyArgs{Path: "other", RandomSeed: true}, nil); err != nil {
			t.Errorf("%s DeriveKey of a random seed: %v", service, err)
		}
		for _, method := range []string{"Info", "Version", "GetQuote", "prpc/Tappd.TdxQuote", "prpc/Tappd.Info"} {
			if err := at(service).Call(ctx, method, nil, nil); err != nil {
				t.Errorf("%s %s: %v", service, method, err)
			}
		}
	}
	if err := g.dstack(t).Call(ctx, "Sign", sign, nil); err != nil {
		t.Errorf("Sign without a scope: %v", err)
	}
}

// The methods that upstream's tappd clients inherit, and those of a client that
// puts the service's name in front.
func TestAliases(t *testing.T) {
	g := newGuest(t)
	for _, url := range []string{"http://x/prpc/Tappd.GetKey", "http://x/prpc/GetKey", "http://x/prpc/DstackGuest.GetKey", "http://x/prpc/Tappd.Sign"} {
		if status, body, _ := post(t, g.client(t, initrpc.ListenTappd), url, `{"algorithm":"ed25519"}`); status != 200 {
			t.Errorf("%s: %d %s", url, status, body)
		}
	}
	if status, body, _ := post(t, g.client(t, initrpc.ListenDstack), "http://x/DstackGuest.GetKey", `{}`); status != 200 {
		t.Errorf("%d %s", status, body)
	}
}

func TestTheLocalPortHasEverythingForThisMachineOnly(t *testing.T) {
	g := newGuest(t)
	c := g.client(t, initrpc.ListenLocal)
	for _, path := range []string{"/GetKey", "/prpc/Tappd.DeriveK256Key", "/prpc/GetKey", "/", "/Info"} {
		for host, want := range map[string]int{"localhost:8090": 200, "127.0.0.1:1": 200, "[::1]:8090": 200, "dstack": 200, "evil.example": 421, "localhost.evil.example:80": 421} {
			if status, body, _ := get(t, c, "http://"+host+path); status != want {
				t.Errorf("%s%s: %d %s", host, path, status, body)
			}
		}
	}
	if status, _, _ := get(t, c, "http://localhost/metrics"); status != 404 {
		t.Errorf("private metrics: %d", status)
	}
}
