// SPDX-License-Identifier: Apache-2.0

package lock

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
)

func sample() *Lock {
	one := dstack.Measurement{1}
	return &Lock{
		Version: 1, Name: "hello", ComposeHash: dstack.ComposeHash{1}, AppID: dstack.AppID{2}, OSImageHash: dstack.ImageHash{3},
		Image: "dstack-sim-0.1", VMConfig: json.RawMessage(`{"cpu_count":1,"memory_size":1073741824}`), TEE: dstack.TDX,
		Measurements: &measure.TDX{MRTD: one, RTMR1: one, RTMR2: one, RTMR0: []measure.RTMR0Event{{Name: "td-hob", Digest: &one}, {Name: "acpi-loader"}}},
		Images:       map[string]string{"hello:1": "sha256:" + strings.Repeat("ab", 32)}, Created: "2026-01-02T03:04:05Z",
		Governance: &Governance{ChainID: 1, Registry: "0x" + strings.Repeat("aa", 20), RPC: []string{"https://node.example"}},
	}
}

func TestWriteAndRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dstack.lock.json")
	want := sample()
	if err := Write(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := Read(path)
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if json.Unmarshal(want.VMConfig, &a) != nil || json.Unmarshal(got.VMConfig, &b) != nil || !cmp.Equal(a, b) {
		t.Errorf("vm_config %s", got.VMConfig)
	}
	got.VMConfig = want.VMConfig
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(measure.TDX{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestRefused(t *testing.T) {
	good, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) string {
		if !strings.Contains(string(good), old) {
			t.Fatalf("%s is not in %s", old, good)
		}
		return strings.Replace(string(good), old, new, 1)
	}
	for name, text := range map[string]string{
		"not JSON":             "x",
		"an unknown key":       replace(`"name"`, `"nam":1,"name"`),
		"a duplicate key":      replace(`"name"`, `"name":"x","name"`),
		"trailing data":        string(good) + "{}",
		"another version":      replace(`"version":1`, `"version":2`),
		"no name":              replace(`"name":"hello"`, `"name":""`),
		"a short compose hash": replace(`"compose_hash":"01`, `"compose_hash":"`),
		"no compose hash":      replace(`"compose_hash":"01`, `"compose_hash":"00`),
		"no app id":            replace(`"app_id":"02`, `"app_id":"00`),
		"no image hash":        replace(`"os_image_hash":"03`, `"os_image_hash":"00`),
		"no tee":               replace(`"tee":"tdx"`, `"tee":""`),
		"another tee":          replace(`"tee":"tdx"`, `"tee":"sev-snp"`),
		"a zero mrtd":          replace(`"mrtd":"01`, `"mrtd":"00`),
		"a short mrtd":         replace(`"mrtd":"01`, `"mrtd":"`),
		"a tag for a digest":   replace(`sha256:ab`, `sha512:ab`),
		"a bad vm_config":      replace(`"cpu_count":1`, `"cpu_count":"x"`),
		"no time":              replace(`2026-01-02T03:04:05Z`, `yesterday`),
		"no chain":             replace(`"chain_id":1`, `"chain_id":0`),
		"no contract":          replace(`"registry":"0xaa`, `"registry":"0x`),
		"no endpoint":          replace(`["https://node.example"]`, `[]`),
		"too large":            string(good) + strings.Repeat(" ", MaxSize),
	} {
		if l, err := Parse([]byte(text)); fault.Code(err) != "lock_malformed" {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
	bad := sample()
	bad.Name = ""
	path := filepath.Join(t.TempDir(), "l")
	if err := Write(path, bad); fault.Code(err) != "lock_malformed" {
		t.Error(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a lock that cannot be read was written")
	}
	if _, err := Read(path); fault.Code(err) != "lock_missing" {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	good, _ := json.Marshal(sample())
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		if l, err := Parse(data); err != nil && fault.Code(err) != "lock_malformed" || err == nil && l.Version != 1 {
			t.Fatal(l, err)
		}
	})
}
