// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"encoding/hex"
	"encoding/json"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/verifier"
)

// Request is the body of POST /verify. All of it is attacker-controlled. The first
// group of members is upstream's; unknown members are ignored, so that a GetQuote
// reply can be posted as it is. openapi.json describes them.
type Request struct {
	Attestation *string `json:"attestation"` // hexadecimal container; the next three are then ignored
	Quote       *string `json:"quote"`       // hexadecimal TDX quote
	EventLog    *string `json:"event_log"`   // text of a JSON array
	VMConfig    *string `json:"vm_config"`   // text of a JSON object
	Debug       bool    `json:"debug"`

	// ReportData is what a GetQuote reply says beside its quote: a claim of the
	// sender's, 128 hexadecimal digits, compared with the quote. It does not make
	// evidence fresh.
	ReportData *string `json:"report_data"`

	// ExpectedReportData is what the caller demands, 128 hexadecimal digits.
	ExpectedReportData *string `json:"expected_report_data"`
	// Nonce is what the caller asked the instance's attest endpoint with, 16 to 64
	// bytes; ServedSPKIs are the DER keys that the endpoint named beside its answer.
	// They count for the verdict alone.
	Nonce       *string  `json:"nonce"`
	ServedSPKIs []string `json:"served_spkis"`
	Manifest    string   `json:"manifest"` // text of app-compose.json, for the verdict

	At         *string            `json:"at"`         // RFC 3339; now by default
	Collateral *collateral.Bundle `json:"collateral"` // decides alone where it is given
	Policy     json.RawMessage    `json:"policy"`     // docs/policy.md; the service's by default

	ReturnCollateral bool `json:"return_collateral"`
}

// Response is the reply. is_valid, reason and details have upstream's meaning: the
// evidence is cryptographically verified and consistent with the image that it
// names itself. Whether that is acceptable only the verdict says.
type Response struct {
	IsValid bool    `json:"is_valid"`
	Reason  *string `json:"reason"` // null when valid
	Details Details `json:"details"`

	Verdict *verifier.Verdict `json:"verdict"`
	// Collateral is what decided, when the request asks for it; with it and
	// verdict.at the same request gives the same reply offline.
	Collateral *collateral.Bundle `json:"collateral,omitempty"`
}

// Details is upstream's record of the checks. Byte strings are lowercase hexadecimal.
type Details struct {
	QuoteVerified       bool    `json:"quote_verified"`
	EventLogVerified    bool    `json:"event_log_verified"`
	OSImageHashVerified bool    `json:"os_image_hash_verified"` // self-consistent only (threats.md B10)
	ACPITablesVerified  bool    `json:"acpi_tables_verified"`
	OSImageIsDev        *bool   `json:"os_image_is_dev"`
	OSImageVersion      *string `json:"os_image_version"`
	TEEVariant          *string `json:"tee_variant"`
	ReportData          *string `json:"report_data"`

	TCBStatus   *string  `json:"tcb_status"`
	AdvisoryIDs []string `json:"advisory_ids"`

	KeyProvider *KeyProvider `json:"key_provider"`
	AppInfo     *AppInfo     `json:"app_info"`
	BootInfo    *BootInfo    `json:"boot_info,omitempty"` // only when valid

	ACPITables *ACPITables `json:"acpi_tables,omitempty"` // debug, TDX's older form
	RTMRDebug  []RTMRDebug `json:"rtmr_debug,omitempty"`  // debug, on a mismatch
}

// KeyProvider is the decoded key-provider event.
type KeyProvider struct {
	Name string `json:"name"`
	ID   string `json:"id"`
}

// Hex is bytes in lowercase hexadecimal.
type Hex []byte

// MarshalText implements encoding.TextMarshaler.
func (h Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *Hex) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

// AppInfo is attest/identity's record as upstream spells it.
type AppInfo struct {
	AppID            Hex   `json:"app_id"`
	ComposeHash      Hex   `json:"compose_hash"`
	InstanceID       Hex   `json:"instance_id"`
	DeviceID         Hex   `json:"device_id"`
	MRSystem         Hex   `json:"mr_system"`
	MRAggregated     Hex   `json:"mr_aggregated"`
	OSImageHash      Hex   `json:"os_image_hash"`
	KeyProviderInfo  Hex   `json:"key_provider_info"`
	InitScriptHashes []Hex `json:"init_script_hashes"` // null where they are not pinned
}

// BootInfo is what an authoriser is asked with.
type BootInfo struct {
	TEEVariant      string   `json:"teeVariant"`
	MRAggregated    Hex      `json:"mrAggregated"`
	OSImageHash     Hex      `json:"osImageHash"`
	MRSystem        Hex      `json:"mrSystem"`
	AppID           Hex      `json:"appId"`
	ComposeHash     Hex      `json:"composeHash"`
	InstanceID      Hex      `json:"instanceId"`
	DeviceID        Hex      `json:"deviceId"`
	KeyProviderInfo Hex      `json:"keyProviderInfo"`
	TCBStatus       string   `json:"tcbStatus"`
	AdvisoryIDs     []string `json:"advisoryIds"`
}

// ACPITables are the blobs that QEMU hands the firmware, as computed.
type ACPITables struct {
	Tables Hex `json:"tables"`
	RSDP   Hex `json:"rsdp"`
	Loader Hex `json:"loader"`
}

// RTMRDebug compares one register with what the image gives.
type RTMRDebug struct {
	RTMR            string      `json:"rtmr"` // RTMR0, RTMR1, RTMR2
	Expected        string      `json:"expected"`
	Actual          string      `json:"actual"`
	Events          []RTMREvent `json:"events"`
	MissingExpected []string    `json:"missing_expected_digests,omitempty"`
}

// RTMREvent is one event of the log beside the one expected in its place.
type RTMREvent struct {
	Index      int    `json:"index"`
	EventType  uint32 `json:"event_type"`
	EventName  string `json:"event_name"`
	Actual     string `json:"actual_digest"`
	Expected   string `json:"expected_digest,omitempty"`
	PayloadLen int    `json:"payload_len"`
	Status     string `json:"status"` // match, mismatch, extra, missing
}

// variants are upstream's names of TEEs.
var variants = map[dstack.TEE]string{
	dstack.TDX: "dstack-tdx", dstack.SEVSNP: "dstack-amd-sev-snp", dstack.Nitro: "dstack-nitro-enclave",
	dstack.NitroTPM: "dstack-aws-nitro-tpm", dstack.CCA: "dstack-arm-cca",
}

func variantOf(c *attest.Claims) string {
	if c.TDX != nil && c.TPM != nil {
		return "dstack-gcp-tdx"
	}
	return variants[c.TEE]
}

func newAppInfo(a *ratls.AppInfo) *AppInfo {
	out := &AppInfo{
		AppID: a.AppID[:], ComposeHash: a.ComposeHash[:], InstanceID: a.InstanceID, DeviceID: a.DeviceID[:],
		MRSystem: a.MRSystem[:], MRAggregated: a.MRAggregated[:], OSImageHash: a.OSImageHash, KeyProviderInfo: a.KeyProvider,
	}
	if a.InitScriptHashes != nil {
		out.InitScriptHashes = []Hex{}
	}
	for _, h := range a.InitScriptHashes {
		out.InitScriptHashes = append(out.InitScriptHashes, h)
	}
	return out
}

// parseKeyProvider returns null for what is empty or not JSON, as upstream does.
func parseKeyProvider(payload []byte) *KeyProvider {
	var p struct{ Name, ID *string }
	if json.Unmarshal(payload, &p) != nil || p.Name == nil || p.ID == nil {
		return nil
	}
	return &KeyProvider{*p.Name, *p.ID}
}
