// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"

	"google.golang.org/protobuf/proto"

	agentpb "github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/manifest"
)

// info is the answer to Info: for apps, and for strangers as far as the
// manifest lets them see.
type info struct {
	app    *agentpb.AppInfo
	public *agentpb.AppInfo
}

// infoSource is what Info is made of.
type infoSource struct {
	manifest *manifest.Manifest
	identity eventlog.Identity
	events   []eventlog.Event
	body     *tdx.ReportBody // nil without a TDX quote

	vmConfig       string // returned verbatim
	evidenceConfig string // of the evidence; its os_image_hash counts
	certificate    string // PEM

	cloudVendor, cloudProduct string
}

// localDeviceID is what upstream reports on TDX, where unverified local evidence
// has no device id: SHA-256 of nothing. It must never be used for policy
// (attestation.md §5.1).
var localDeviceID = sha256.Sum256(nil)

// tcbInfo is the JSON in AppInfo.tcb_info (guest-agent.md §7.1). Registers are
// "" without a TDX quote, where upstream's null breaks typed clients.
type tcbInfo struct {
	MRTD         string           `json:"mrtd"`
	RTMR0        string           `json:"rtmr0"`
	RTMR1        string           `json:"rtmr1"`
	RTMR2        string           `json:"rtmr2"`
	RTMR3        string           `json:"rtmr3"`
	MRAggregated string           `json:"mr_aggregated"`
	OSImageHash  string           `json:"os_image_hash"`
	ComposeHash  string           `json:"compose_hash"`
	DeviceID     string           `json:"device_id"`
	EventLog     []eventlog.Event `json:"event_log"`
	AppCompose   string           `json:"app_compose"`
}

func newInfo(src infoSource) (*info, error) {
	hash := imageHash(src.evidenceConfig)
	t := tcbInfo{
		OSImageHash: hex.EncodeToString(hash),
		ComposeHash: src.identity.ComposeHash.String(),
		DeviceID:    hex.EncodeToString(localDeviceID[:]),
		EventLog:    src.events,
		AppCompose:  string(src.manifest.Raw),
	}
	var aggregated []byte
	if b := src.body; b != nil {
		rt3, err := eventlog.Replay(src.events, eventlog.RuntimeIMR)
		if err != nil {
			return nil, err
		}
		t.MRTD, t.RTMR0, t.RTMR1, t.RTMR2, t.RTMR3 = b.MRTD.String(), b.RTMR[0].String(), b.RTMR[1].String(), b.RTMR[2].String(), rt3.String()
		// attestation.md §5.3
		h := sha256.New()
		for _, m := range [][]byte{b.MRTD[:], b.RTMR[0][:], b.RTMR[1][:], b.RTMR[2][:], rt3[:]} {
			h.Write(m)
		}
		if !b.MRConfigID.IsZero() || !b.MROwner.IsZero() || !b.MROwnerConfig.IsZero() {
			h.Write(b.MRConfigID[:])
			h.Write(b.MROwner[:])
			h.Write(b.MROwnerConfig[:])
		}
		aggregated = h.Sum(nil)
		t.MRAggregated = hex.EncodeToString(aggregated)
	}
	if t.EventLog == nil || src.body == nil {
		t.EventLog = []eventlog.Event{}
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(t); err != nil {
		return nil, err
	}
	app := &agentpb.AppInfo{
		AppId:           src.identity.AppID[:],
		InstanceId:      src.identity.InstanceID,
		AppCert:         src.certificate,
		TcbInfo:         strings.TrimSuffix(text.String(), "\n"),
		AppName:         src.manifest.Name,
		DeviceId:        localDeviceID[:],
		MrAggregated:    aggregated,
		OsImageHash:     hash,
		KeyProviderInfo: src.identity.KeyProvider,
		ComposeHash:     src.identity.ComposeHash[:],
		VmConfig:        src.vmConfig,
		CloudVendor:     src.cloudVendor,
		CloudProduct:    src.cloudProduct,
	}
	public := proto.Clone(app).(*agentpb.AppInfo)
	if !src.manifest.PublicTCBInfo {
		public.TcbInfo, public.VmConfig = "", ""
	}
	return &info{app: app, public: public}, nil
}

// imageHash returns os_image_hash (32 bytes) of a vm_config, or of the vm_config
// that a whole sys-config nests, or nil: the host wrote it, and may have written
// anything.
func imageHash(config string) []byte {
	for range 2 {
		var c struct {
			OSImageHash string  `json:"os_image_hash"`
			VMConfig    *string `json:"vm_config"`
		}
		if json.Unmarshal([]byte(config), &c) != nil {
			return nil
		}
		if c.VMConfig != nil {
			config = *c.VMConfig
			continue
		}
		hash, err := hex.DecodeString(c.OSImageHash)
		if err != nil || len(hash) != sha256.Size {
			return nil
		}
		return hash
	}
	return nil
}

// cloud returns what the machine calls itself. The host controls it.
func cloud() (vendor, product string) {
	read := func(name string) string {
		b, err := os.ReadFile("/sys/class/dmi/id/" + name)
		if err != nil {
			return ""
		}
		return strings.ToValidUTF8(strings.TrimSpace(string(b)), "")
	}
	return read("sys_vendor"), read("product_name")
}
