// SPDX-License-Identifier: Apache-2.0

package hostshare

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits of single values in .sys-config.json, whose file is at most 32 KiB.
const (
	maxURLs     = 16
	maxURLBytes = 2048
	maxDNS      = 4
)

// SysConfig is .sys-config.json (guest-os.md §3.1): where to find services. It is
// not measured; see [Classes] for why each field may be believed or need not be.
// An empty string is the same as an absent one.
type SysConfig struct {
	KMSURLs []string `json:"kms_urls,omitempty"`
	// GatewayURLs also accepts upstream's older name tproxy_urls.
	GatewayURLs []string `json:"gateway_urls,omitempty"`
	// PCCSURL is the older form of CollateralURLs.PCCS; read it through PCCS.
	PCCSURL                   string          `json:"pccs_url,omitempty"`
	CollateralURLs            *CollateralURLs `json:"collateral_urls,omitempty"`
	NvidiaAttestationProxyURL string          `json:"nvidia_attestation_proxy_url,omitempty"`
	DockerRegistry            string          `json:"docker_registry,omitempty"`
	HostAPIURL                string          `json:"host_api_url,omitempty"`
	// MRConfig is the text of the config document; read it through ConfigDocument.
	MRConfig string `json:"mr_config,omitempty"`
	// VMConfig is a JSON object as text (vmm.md §6.3), passed on byte by byte.
	VMConfig string   `json:"vm_config,omitempty"`
	Network  *Network `json:"network,omitempty"`
}

// CollateralURLs says where to fetch attestation collateral. Unknown keys are
// errors, as upstream has it.
type CollateralURLs struct {
	PCCS   string `json:"pccs,omitempty"`
	AMDKDS string `json:"amd_kds,omitempty"`
}

// Network is the guest's address when the host assigns it; ours, unknown upstream.
type Network struct {
	Address netip.Prefix `json:"address"` // of the interface, such as 10.0.2.15/24
	Gateway netip.Addr   `json:"gateway,omitzero"`
	DNS     []netip.Addr `json:"dns,omitempty"`
}

// InstanceInfo is .instance_info (guest-os.md §3.2).
type InstanceInfo struct {
	// InstanceIDSeed is at most 64 bytes, upstream's has 20; hex in JSON.
	InstanceIDSeed HexBytes           `json:"instance_id_seed,omitempty"`
	InstanceID     *dstack.InstanceID `json:"instance_id,omitempty"`
	AppID          *dstack.AppID      `json:"app_id,omitempty"`
	// DataDisk is what the host knows of the data disk; ours, unknown upstream.
	DataDisk DataDisk `json:"data_disk,omitempty"`
}

// DataDisk says whether a data disk holds an instance's data already.
type DataDisk string

// States of a data disk.
const (
	// DataDiskNew is a disk that no guest has reported to be in use.
	DataDiskNew DataDisk = ""
	// DataDiskReady is a disk that a guest made or opened: it must open again, and
	// is never formatted.
	DataDiskReady DataDisk = "ready"
)

// HexBytes are bytes that JSON spells as lowercase hexadecimal text.
type HexBytes []byte

// MarshalText returns lowercase hexadecimal text.
func (b HexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

// UnmarshalText parses hexadecimal text of any even length.
func (b *HexBytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.DecodeString(string(text))
	return err
}

// PCCS returns the URL of the PCCS, or "".
func (c *SysConfig) PCCS() string {
	if c.CollateralURLs != nil && c.CollateralURLs.PCCS != "" {
		return c.CollateralURLs.PCCS
	}
	return c.PCCSURL
}

// ConfigDocument returns the text of the config document: mr_config, or else the
// member mr_config of vm_config, or else "".
func (c *SysConfig) ConfigDocument() string {
	if c.MRConfig != "" || c.VMConfig == "" {
		return c.MRConfig
	}
	var inner struct {
		MRConfig string `json:"mr_config"`
	}
	if err := json.Unmarshal([]byte(c.VMConfig), &inner); err != nil {
		return ""
	}
	return inner.MRConfig
}

// ParseSysConfig parses .sys-config.json. Unknown keys are ignored at the top
// level, as upstream has it; a key that occurs twice, a wrong type, an URL of
// another scheme and a value over its limit are errors, code sys_config_malformed.
func ParseSysConfig(data []byte) (*SysConfig, error) {
	var c struct {
		SysConfig
		TproxyURLs []string `json:"tproxy_urls"`
	}
	err := parse(SysConfigName, data, &c)
	if err == nil {
		if c.GatewayURLs == nil {
			c.GatewayURLs = c.TproxyURLs
		}
		err = c.SysConfig.check()
	}
	if err != nil {
		return nil, fault.Wrap(err, "sys_config_malformed", "%s", SysConfigName)
	}
	return &c.SysConfig, nil
}

// Encode returns the JSON text, which ParseSysConfig accepts.
func (c *SysConfig) Encode() ([]byte, error) {
	data, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", SysConfigName, err)
	}
	_, err = ParseSysConfig(data)
	return data, err
}

func (c *SysConfig) check() error {
	var extra CollateralURLs
	if c.CollateralURLs != nil {
		extra = *c.CollateralURLs
	}
	web, host := []string{"http", "https"}, []string{"http", "https", "vsock", "hostlink"}
	for _, f := range []struct {
		name    string
		urls    []string
		schemes []string
	}{
		{"kms_urls", c.KMSURLs, web},
		{"gateway_urls", c.GatewayURLs, web},
		{"pccs_url", []string{c.PCCSURL}, web},
		{"collateral_urls.pccs", []string{extra.PCCS}, web},
		{"collateral_urls.amd_kds", []string{extra.AMDKDS}, web},
		{"nvidia_attestation_proxy_url", []string{c.NvidiaAttestationProxyURL}, web},
		{"docker_registry", []string{c.DockerRegistry}, web},
		{"host_api_url", []string{c.HostAPIURL}, host},
	} {
		if len(f.urls) > maxURLs {
			return fmt.Errorf("%s: %d entries, more than the allowed %d", f.name, len(f.urls), maxURLs)
		}
		for _, u := range f.urls {
			if err := checkURL(u, f.schemes); err != nil {
				return fmt.Errorf("%s: %w", f.name, err)
			}
		}
	}
	if c.VMConfig != "" && (!json.Valid([]byte(c.VMConfig)) || !strings.HasPrefix(strings.TrimSpace(c.VMConfig), "{")) {
		return fmt.Errorf("vm_config: the text is not a JSON object")
	}
	if n := c.Network; n != nil {
		if !usable(n.Address.Addr()) {
			return fmt.Errorf("network.address: %s is not a usable address and prefix length", n.Address)
		}
		if n.Gateway.IsValid() && (!usable(n.Gateway) || !n.Address.Contains(n.Gateway)) {
			return fmt.Errorf("network.gateway: %s is not in %s", n.Gateway, n.Address.Masked())
		}
		if len(n.DNS) > maxDNS {
			return fmt.Errorf("network.dns: %d entries, more than the allowed %d", len(n.DNS), maxDNS)
		}
		for _, a := range n.DNS {
			if !usable(a) {
				return fmt.Errorf("network.dns: %s is not a usable address", a)
			}
		}
	}
	return nil
}

// usable excludes addresses that would point the guest at itself or at many, and
// zones, which name an interface.
func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast()
}

func checkURL(text string, schemes []string) error {
	if text == "" {
		return nil
	}
	if len(text) > maxURLBytes {
		return fmt.Errorf("an URL of %d bytes, more than the allowed %d", len(text), maxURLBytes)
	}
	u, err := url.Parse(text)
	if err != nil {
		return err
	}
	if !slices.Contains(schemes, u.Scheme) || u.Host == "" {
		return fmt.Errorf("%q is not an URL with a host and one of the schemes %s", text, strings.Join(schemes, ", "))
	}
	return nil
}

// ParseInstanceInfo parses .instance_info. Absent and empty fields are the same.
// Errors have the code instance_info_malformed.
func ParseInstanceInfo(data []byte) (*InstanceInfo, error) {
	var raw struct {
		Seed       string `json:"instance_id_seed"`
		InstanceID string `json:"instance_id"`
		AppID      string `json:"app_id"`
		DataDisk   string `json:"data_disk"`
	}
	var info InstanceInfo
	err := parse(InstanceInfoName, data, &raw)
	if err == nil && len(raw.Seed) > 128 {
		err = fmt.Errorf("instance_id_seed: %d hexadecimal digits, more than the allowed 128", len(raw.Seed))
	}
	if err == nil && raw.Seed != "" {
		if err = info.InstanceIDSeed.UnmarshalText([]byte(raw.Seed)); err != nil {
			err = fmt.Errorf("instance_id_seed: %w", err)
		}
	}
	if err == nil && raw.InstanceID != "" {
		info.InstanceID = new(dstack.InstanceID)
		err = info.InstanceID.UnmarshalText([]byte(raw.InstanceID))
	}
	if err == nil && raw.AppID != "" {
		info.AppID = new(dstack.AppID)
		err = info.AppID.UnmarshalText([]byte(raw.AppID))
	}
	if info.DataDisk = DataDisk(raw.DataDisk); err == nil && info.DataDisk != DataDiskNew && info.DataDisk != DataDiskReady {
		err = fmt.Errorf("data_disk: %.40q is neither empty nor %q", raw.DataDisk, DataDiskReady)
	}
	if err != nil {
		return nil, fault.Wrap(err, "instance_info_malformed", "%s", InstanceInfoName)
	}
	return &info, nil
}

// Encode returns the JSON text, which ParseInstanceInfo accepts.
func (i *InstanceInfo) Encode() ([]byte, error) {
	data, err := json.Marshal(i)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", InstanceInfoName, err)
	}
	_, err = ParseInstanceInfo(data)
	return data, err
}

// UnmarshalJSON refuses unknown keys.
func (c *CollateralURLs) UnmarshalJSON(data []byte) error {
	type plain CollateralURLs
	return object(data, (*plain)(c), false)
}

// UnmarshalJSON refuses unknown keys.
func (n *Network) UnmarshalJSON(data []byte) error {
	type plain Network
	return object(data, (*plain)(n), false)
}

// parse decodes one file: its size, encoding and structure, then its fields.
func parse(name string, data []byte, v any) error {
	if limit, _ := Limit(name); int64(len(data)) > limit {
		return fmt.Errorf("%d bytes, more than the allowed %d", len(data), limit)
	}
	if !utf8.Valid(data) {
		return fmt.Errorf("not UTF-8")
	}
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return fmt.Errorf("not a JSON object")
	}
	if err := uniqueKeys(data); err != nil {
		return err
	}
	return object(data, v, true)
}

// object decodes a JSON object into a struct. encoding/json alone would also take a
// key in other letter case, so that two programs could read one file differently.
func object(data []byte, v any, unknownOK bool) error {
	if bytes.Equal(data, []byte("null")) {
		return nil
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(data, &members); err != nil {
		return err
	}
	known := keys(reflect.TypeOf(v).Elem())
	for key := range members {
		if !slices.Contains(known, key) {
			if !unknownOK {
				return fmt.Errorf("unknown key %q", key)
			}
			delete(members, key)
		}
	}
	exact, err := json.Marshal(members)
	if err != nil {
		return err
	}
	return json.Unmarshal(exact, v)
}

// keys lists the JSON names of a struct's fields, embedded structs included.
func keys(t reflect.Type) (names []string) {
	for f := range t.Fields() {
		if f.Anonymous {
			names = append(names, keys(f.Type)...)
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		names = append(names, name)
	}
	return names
}

// uniqueKeys refuses a document in which some object has one key twice: which of
// the two counts depends on the parser.
func uniqueKeys(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	type level struct {
		seen map[string]bool // nil in an array
		key  bool            // the next string is a key
	}
	var stack []level
	for {
		tok, err := dec.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if d, ok := tok.(json.Delim); ok {
			switch d {
			case '{':
				stack = append(stack, level{map[string]bool{}, true})
			case '[':
				stack = append(stack, level{})
			default:
				stack = stack[:len(stack)-1]
				if n := len(stack); n > 0 && stack[n-1].seen != nil {
					stack[n-1].key = true
				}
			}
			continue
		}
		n := len(stack)
		if n == 0 || stack[n-1].seen == nil {
			continue
		}
		if top := &stack[n-1]; top.key {
			key := tok.(string)
			if top.seen[key] {
				return fmt.Errorf("key %q occurs twice", key)
			}
			top.seen[key], top.key = true, false
		} else {
			top.key = true
		}
	}
}
