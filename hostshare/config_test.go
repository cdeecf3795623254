// SPDX-License-Identifier: Apache-2.0

package hostshare

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

func writeFile(path string, data []byte) error { return os.WriteFile(path, data, 0o600) }

// The table names each file, and each field of each structured file, exactly once.
func TestEveryFileAndFieldHasAClass(t *testing.T) {
	want := map[string]bool{}
	for _, e := range entries {
		want[e.name] = true
	}
	var walk func(file, path string, typ reflect.Type)
	walk = func(file, path string, typ reflect.Type) {
		for f := range typ.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "" || name == "-" {
				t.Errorf("%s: field %s has no JSON name", typ, f.Name)
			}
			want[file+" "+path+name] = true
			inner := f.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			if inner.Kind() == reflect.Struct && inner.PkgPath() == typ.PkgPath() {
				walk(file, path+name+".", inner)
			}
		}
	}
	walk(SysConfigName, "", reflect.TypeFor[SysConfig]())
	walk(InstanceInfoName, "", reflect.TypeFor[InstanceInfo]())

	got := map[string]bool{}
	for _, c := range Classes() {
		key := strings.TrimSpace(c.File + " " + c.Field)
		if got[key] {
			t.Errorf("%s is classed twice", key)
		}
		got[key] = true
		if c.Class != Measured && c.Class != Crypto && c.Class != Transport {
			t.Errorf("%s has class %q", key, c.Class)
		}
		if c.Why == "" {
			t.Errorf("%s has no reason", key)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields of the types (-) and of the table (+) differ:\n%s", diff)
	}
}

func TestParseSysConfig(t *testing.T) {
	got, err := ParseSysConfig([]byte(`{
		"kms_urls": ["https://kms.example:8000"], "tproxy_urls": ["https://gw.example"],
		"pccs_url": "https://old.example", "collateral_urls": {"pccs": "https://new.example", "amd_kds": ""},
		"nvidia_attestation_proxy_url": null, "docker_registry": "",
		"host_api_url": "vsock://2:10000/api", "mr_config": null,
		"vm_config": "{\"mr_config\":\"doc\"}",
		"network": {"address": "10.0.2.15/24", "gateway": "10.0.2.2", "dns": ["10.0.2.3"]},
		"a key of tomorrow": {"KMS_URLS": 1}, "KMS_URLS": ["https://shadow.example"]
	}`))
	if err != nil {
		t.Fatal(err)
	}
	want := &SysConfig{
		KMSURLs: []string{"https://kms.example:8000"}, GatewayURLs: []string{"https://gw.example"},
		PCCSURL: "https://old.example", CollateralURLs: &CollateralURLs{PCCS: "https://new.example"},
		HostAPIURL: "vsock://2:10000/api", VMConfig: `{"mr_config":"doc"}`,
		Network: &Network{Address: netip.MustParsePrefix("10.0.2.15/24"), Gateway: netip.MustParseAddr("10.0.2.2"),
			DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got.PCCS() != "https://new.example" || got.ConfigDocument() != "doc" {
		t.Errorf("PCCS %q, config document %q", got.PCCS(), got.ConfigDocument())
	}
	data, err := got.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := ParseSysConfig(data); err != nil || !reflect.DeepEqual(again, want) {
		t.Errorf("after Encode %s: %+v, %v", data, again, err)
	}
}

func TestSysConfigFallbacks(t *testing.T) {
	for _, c := range []struct{ in, pccs, doc string }{
		{`{}`, "", ""},
		{`{"pccs_url":"https://a.example"}`, "https://a.example", ""},
		{`{"pccs_url":"https://a.example","collateral_urls":{"amd_kds":"https://b.example"}}`, "https://a.example", ""},
		{`{"mr_config":"own","vm_config":"{\"mr_config\":\"other\"}"}`, "", "own"},
		{`{"vm_config":"{\"mr_config\":7}"}`, "", ""},
	} {
		got, err := ParseSysConfig([]byte(c.in))
		if err != nil {
			t.Fatalf("%s: %v", c.in, err)
		}
		if got.PCCS() != c.pccs || got.ConfigDocument() != c.doc {
			t.Errorf("%s: PCCS %q, document %q", c.in, got.PCCS(), got.ConfigDocument())
		}
	}
}

func TestParseSysConfigRefuses(t *testing.T) {
	url := func(u string) string { return fmt.Sprintf(`{"kms_urls":[%q]}`, u) }
	network := func(s string) string { return `{"network":{` + s + `}}` }
	for name, c := range map[string]struct{ in, reason string }{
		"nothing":                        {``, "not a JSON object"},
		"null":                           {`null`, "not a JSON object"},
		"an array":                       {`[]`, "not a JSON object"},
		"trailing data":                  {`{}{}`, "invalid character"},
		"a cut object":                   {`{"a":`, "unexpected end"},
		"bytes that are not UTF-8":       {"{\"a\":\"\xff\"}", "not UTF-8"},
		"a key twice":                    {`{"kms_urls":[],"kms_urls":[]}`, `key "kms_urls" occurs twice`},
		"an escaped key twice":           {`{"vm_config":"","vm\u005fconfig":""}`, `key "vm_config" occurs twice`},
		"an inner key twice":             {`{"network":{"address":"10.0.2.15/24","address":"10.0.2.16/24"}}`, "occurs twice"},
		"a key twice in an array":        {`{"x":[1,{"a":[],"b":{},"a":1}]}`, "occurs twice"},
		"a number for a string":          {`{"pccs_url":1}`, "cannot unmarshal"},
		"a string for a list":            {`{"kms_urls":"https://a.example"}`, "cannot unmarshal"},
		"an unknown collateral key":      {`{"collateral_urls":{"azure":"x"}}`, `unknown key "azure"`},
		"a collateral key of other case": {`{"collateral_urls":{"PCCS":"https://a.example"}}`, `unknown key "PCCS"`},
		"an unknown network key":         {network(`"address":"10.0.2.15/24","mac":"x"`), `unknown key "mac"`},
		"a file URL":                     {url("file:///etc/passwd"), "not an URL with a host"},
		"a path":                         {url("/etc/passwd"), "not an URL with a host"},
		"an URL without host":            {url("https:///x"), "not an URL with a host"},
		"a vsock URL for a KMS":          {url("vsock://2:1"), "schemes http, https"},
		"an URL with a newline":          {url("https://a.example/\nHost: b"), "invalid control character"},
		"a very long URL":                {url("https://a.example/" + strings.Repeat("x", 2048)), "more than the allowed 2048"},
		"seventeen URLs":                 {`{"gateway_urls":[` + strings.Repeat(`"https://a.example",`, 16) + `""]}`, "17 entries"},
		"a bad host API URL":             {`{"host_api_url":"unix:/x"}`, "host_api_url"},
		"a vm_config that is not JSON":   {`{"vm_config":"{"}`, "not a JSON object"},
		"a vm_config that is no object":  {`{"vm_config":"[]"}`, "not a JSON object"},
		"an address without prefix":      {network(`"address":"10.0.2.15"`), "no '/'"},
		"no address":                     {network(`"gateway":"10.0.2.2"`), "network.address"},
		"a loopback address":             {network(`"address":"127.0.0.1/8"`), "network.address"},
		"a multicast address":            {network(`"address":"224.0.0.1/8"`), "network.address"},
		"a gateway elsewhere":            {network(`"address":"10.0.2.15/24","gateway":"10.0.3.1"`), "not in 10.0.2.0/24"},
		"a loopback name server":         {network(`"address":"10.0.2.15/24","dns":["127.0.0.1"]`), "network.dns"},
		"an address with a zone":         {network(`"address":"10.0.2.15/24","dns":["fe80::1%eth0"]`), "network.dns"},
		"five name servers":              {network(`"address":"10.0.2.15/24","dns":["1.1.1.1","1.1.1.1","1.1.1.1","1.1.1.1","1.1.1.1"]`), "5 entries"},
		"a file over the limit":          {`{"x":"` + strings.Repeat("x", 32<<10) + `"}`, "more than the allowed 32768"},
	} {
		_, err := ParseSysConfig([]byte(c.in))
		if fault.Code(err) != "sys_config_malformed" || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.reason)
		}
	}
}

func TestInstanceInfo(t *testing.T) {
	app, _ := dstack.ParseAppID(strings.Repeat("ab", 20))
	inst, _ := dstack.ParseInstanceID(strings.Repeat("cd", 20))
	for in, want := range map[string]InstanceInfo{
		`{}`: {},
		`{"instance_id_seed":"","instance_id":"","app_id":"","x":1}`:                           {},
		fmt.Sprintf(`{"instance_id_seed":"00FF","instance_id":"%s","app_id":"%s"}`, inst, app): {HexBytes{0, 255}, &inst, &app, DataDiskNew},
	} {
		got, err := ParseInstanceInfo([]byte(in))
		if err != nil || len(got.InstanceIDSeed) != len(want.InstanceIDSeed) || !reflect.DeepEqual(got.AppID, want.AppID) || !reflect.DeepEqual(got.InstanceID, want.InstanceID) || got.DataDisk != want.DataDisk {
			t.Errorf("%s: %+v, %v", in, got, err)
			continue
		}
		data, err := got.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseInstanceInfo(data); err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%s does not survive Encode: %s, %v", in, data, err)
		}
	}
	for name, c := range map[string]struct{ in, reason string }{
		"an app id of 21 bytes": {`{"app_id":"` + strings.Repeat("ab", 21) + `"}`, "app id must be 40"},
		"an app id with 0x":     {`{"app_id":"0x` + strings.Repeat("ab", 20) + `"}`, "app id must be 40"},
		"an instance id of 32":  {`{"instance_id":"` + strings.Repeat("ab", 32) + `"}`, "instance id must be 40"},
		"an odd seed":           {`{"instance_id_seed":"abc"}`, "odd length"},
		"a seed over the limit": {`{"instance_id_seed":"` + strings.Repeat("ab", 65) + `"}`, "more than the allowed 128"},
		"a number":              {`{"app_id":1}`, "cannot unmarshal"},
		"a key twice":           {`{"app_id":"","app_id":""}`, "occurs twice"},
		"a disk in other words": {`{"data_disk":"Ready"}`, "neither empty nor"},
		"a file over the limit": {`{"x":"` + strings.Repeat("x", 10<<10) + `"}`, "more than the allowed 10240"},
	} {
		_, err := ParseInstanceInfo([]byte(c.in))
		if fault.Code(err) != "instance_info_malformed" || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.reason)
		}
	}
}

func FuzzParseSysConfig(f *testing.F) {
	f.Add([]byte(`{"kms_urls":["https://a.example"],"network":{"address":"10.0.2.15/24","gateway":"10.0.2.2","dns":["10.0.2.3"]}}`))
	f.Add([]byte(`{"collateral_urls":{"pccs":"http://x"},"vm_config":"{}","mr_config":"{}"}`))
	f.Add([]byte(`{"a":[{"b":[[]]}],"tproxy_urls":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseSysConfig(data)
		if err != nil {
			return
		}
		if len(data) > 20<<10 { // re-encoding may grow the text over the file's limit
			return
		}
		out, err := c.Encode()
		if err != nil {
			t.Fatalf("accepted, but does not encode: %v", err)
		}
		if again, err := ParseSysConfig(out); err != nil || !reflect.DeepEqual(again.PCCS(), c.PCCS()) {
			t.Fatalf("accepted, but not after Encode: %v", err)
		}
	})
}

// The guest's instance.info is of this form too, and then comes from a stranger.
func FuzzParseInstanceInfo(f *testing.F) {
	f.Add([]byte(`{"instance_id_seed":"00ff","app_id":"` + strings.Repeat("ab", 20) + `","data_disk":"ready"}`))
	f.Add([]byte(`{"instance_id":"","data_disk":""}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		info, err := ParseInstanceInfo(data)
		if err != nil {
			if fault.Code(err) != "instance_info_malformed" {
				t.Fatal(err)
			}
			return
		}
		out, err := info.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseInstanceInfo(out); err != nil || !reflect.DeepEqual(again.AppID, info.AppID) || again.DataDisk != info.DataDisk {
			t.Fatalf("%s became %s, %v", data, out, err)
		}
	})
}
