// SPDX-License-Identifier: Apache-2.0

package mrconfig

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

type vectors struct {
	V struct {
		ComposeHash   dstack.ComposeHash `json:"compose_hash"`
		AppID         dstack.AppID       `json:"app_id"`
		KeyProvider   string             `json:"key_provider"`
		KeyProviderID string             `json:"key_provider_id"`
		V1, V2        string
		Document      string `json:"v3_document"`
		HostData      string `json:"v3_snp_host_data"`
		V3            string `json:"v3_tdx_mr_config_id"`
	} `json:"mr_config"`
}

func TestIDsMatchTheVectors(t *testing.T) {
	var v vectors
	if err := json.Unmarshal(testkit.Vectors(t, "attestation/computed_vectors.json"), &v); err != nil {
		t.Fatal(err)
	}
	id, err := hex.DecodeString(v.V.KeyProviderID)
	if err != nil {
		t.Fatal(err)
	}
	if got := IDv1(v.V.ComposeHash).String(); got != v.V.V1 {
		t.Errorf("V1 %s, want %s", got, v.V.V1)
	}
	if got, err := IDv2(v.V.ComposeHash, v.V.AppID, v.V.KeyProvider, id); err != nil || got.String() != v.V.V2 {
		t.Errorf("V2 %s (%v), want %s", got, err, v.V.V2)
	}
	if _, err := IDv2(v.V.ComposeHash, v.V.AppID, "sgx", id); fault.Code(err) != "mr_config_malformed" {
		t.Errorf("V2 with an unknown kind: %v", err)
	}
	doc, err := Parse([]byte(v.V.Document))
	if err != nil {
		t.Fatal(err)
	}
	if string(doc.Bytes()) != v.V.Document {
		t.Errorf("document %s, want %s", doc.Bytes(), v.V.Document)
	}
	if d := Digest(doc.Bytes()); hex.EncodeToString(d[:]) != v.V.HostData {
		t.Errorf("HOST_DATA %x, want %s", d, v.V.HostData)
	}
	if got := IDv3(doc.Bytes()); got.String() != v.V.V3 {
		t.Errorf("V3 %s, want %s", got, v.V.V3)
	}
	for form, text := range map[int]string{FormV1: v.V.V1, FormV2: v.V.V2, FormV3: v.V.V3, FormNone: strings.Repeat("0", 96)} {
		var id dstack.MRConfigID
		if err := id.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, err := Form(id); err != nil || got != form {
			t.Errorf("form of %s is %d (%v), want %d", text, got, err, form)
		}
	}
}

func TestRealDocumentHashesToTheReportsHostData(t *testing.T) {
	raw := testkit.Vectors(t, "attestation/sev-snp/mr_config.json")
	report := testkit.Vectors(t, "attestation/sev-snp/report.bin")
	if d := Digest(raw); !bytes.Equal(d[:], report[0xc0:0xe0]) {
		t.Errorf("digest %x, report says %x", d, report[0xc0:0xe0])
	}
	doc, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(doc.Bytes(), raw) {
		t.Errorf("document %s, want %s", doc.Bytes(), raw)
	}
}

func TestAbsentAndEmptyScriptsDiffer(t *testing.T) {
	d := Document{KeyProvider: "none"}
	absent := string(d.Bytes())
	d.InitScriptHashes = [][]byte{}
	if empty := string(d.Bytes()); strings.Contains(absent, "init_script") || !strings.Contains(empty, `"init_script_hashes":[]`) {
		t.Errorf("absent %s, empty %s", absent, empty)
	}
	for i := range 2 {
		d.InitScriptHashes = append(d.InitScriptHashes, bytes.Repeat([]byte{byte(i)}, 32))
	}
	back, err := Parse(d.Bytes())
	if err != nil || len(back.InitScriptHashes) != 2 || !bytes.Equal(back.Bytes(), d.Bytes()) {
		t.Errorf("read back %+v (%v)", back, err)
	}
	if back, err := Parse([]byte(absent)); err != nil || back.InitScriptHashes != nil {
		t.Errorf("absent read as %+v (%v)", back, err)
	}
}

func TestDocumentsAreRefusedForTheirOwnReason(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	base := `"compose_hash":"` + hash + `","key_provider":"none"`
	list := func(n int) string { return `["` + strings.Join(make([]string, n), hash+`","`) + hash + `"]` }
	for _, c := range []struct{ name, in, code string }{
		{"not JSON", `{`, "mr_config_malformed"},
		{"an unknown field", `{` + base + `,"debug":true}`, "mr_config_malformed"},
		{"a field twice", `{` + base + `,"key_provider":"kms"}`, "mr_config_malformed"},
		{"something after it", `{` + base + `}x`, "mr_config_malformed"},
		{"no compose hash", `{"key_provider":"none"}`, "mr_config_malformed"},
		{"no key provider", `{"compose_hash":"` + hash + `"}`, "mr_config_malformed"},
		{"an unknown key provider", `{"compose_hash":"` + hash + `","key_provider":"sgx"}`, "mr_config_malformed"},
		{"uppercase hex", `{"compose_hash":"` + strings.ToUpper(hash) + `","key_provider":"none"}`, "mr_config_malformed"},
		{"version 2", `{` + base + `,"version":2}`, "mr_config_version"},
		{"B17: a compose hash of 31 bytes", `{"compose_hash":"` + hash[2:] + `","key_provider":"none"}`, "mr_config_length"},
		{"B16: an app id of 19 bytes", `{` + base + `,"app_id":"` + hash[:38] + `"}`, "mr_config_length"},
		{"an empty app id", `{` + base + `,"app_id":""}`, "mr_config_length"},
		{"an instance id of 21 bytes", `{` + base + `,"instance_id":"` + hash[:42] + `"}`, "mr_config_length"},
		{"a GPU policy hash of 33 bytes", `{` + base + `,"gpu_policy_hash":"` + hash + `00"}`, "mr_config_length"},
		{"a key provider id of 5 KiB", `{` + base + `,"key_provider_id":"` + strings.Repeat("00", 5<<10) + `"}`, "mr_config_length"},
		{"six scripts", `{` + base + `,"init_script_hashes":` + list(6) + `}`, "mr_config_length"},
		{"a script hash of 31 bytes", `{` + base + `,"init_script_hashes":["` + hash[2:] + `"]}`, "mr_config_length"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := Parse([]byte(c.in)); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	if _, err := Parse([]byte(`{` + base + `,"init_script_hashes":` + list(5) + `}`)); err != nil {
		t.Errorf("five scripts: %v", err)
	}
}

func TestUnknownFormsAreRefused(t *testing.T) {
	for name, id := range map[string]dstack.MRConfigID{
		"form 4":                   {4},
		"form 0 with other bytes":  {0, 1},
		"form 1 with a longer end": {1, 47: 1},
	} {
		if _, err := Form(id); fault.Code(err) != "mr_config_form" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(testkit.Vectors(f, "attestation/sev-snp/mr_config.json"))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := Parse(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		again, err := Parse(d.Bytes())
		if err != nil || !bytes.Equal(again.Bytes(), d.Bytes()) {
			t.Fatalf("%s is not read back: %v", d.Bytes(), err)
		}
	})
}
