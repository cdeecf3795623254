// SPDX-License-Identifier: Apache-2.0

package hostshare

import "slices"

// Class says why a value from the host may be used.
type Class string

const (
	// Measured values enter a register before they have any effect: whoever checks
	// the evidence sees them.
	Measured Class = "measured"
	// Crypto values are useless unless a key, a signature or a digest that the host
	// cannot make fits them.
	Crypto Class = "crypto"
	// Transport values say where to find something that is checked on its own. A lie
	// costs availability and decides nothing else.
	Transport Class = "transport"
)

// FieldClass classes one file (Field is "") or one field of a file (its JSON path).
type FieldClass struct {
	File  string
	Field string
	Class Class
	Why   string
}

var classes = []FieldClass{
	{AppComposeName, "", Measured, "event compose-hash is the SHA-256 of its bytes"},

	{SysConfigName, "", Transport, "field by field below; unknown fields are not read"},
	{SysConfigName, "kms_urls", Transport, "the KMS is known by its evidence and by key_provider_id in the manifest, never by its address"},
	{SysConfigName, "gateway_urls", Transport, "the gateway is known by its evidence"},
	{SysConfigName, "pccs_url", Transport, "collateral is signed by the TEE vendor"},
	{SysConfigName, "collateral_urls", Transport, "collateral is signed by the TEE vendor"},
	{SysConfigName, "collateral_urls.pccs", Transport, "collateral is signed by the TEE vendor"},
	{SysConfigName, "collateral_urls.amd_kds", Transport, "collateral is signed by the TEE vendor"},
	{SysConfigName, "nvidia_attestation_proxy_url", Transport, "GPU evidence and its collateral are signed by the vendor"},
	{SysConfigName, "docker_registry", Transport, "images are pinned by digest in the manifest; under an upstream manifest without pins the verdict carries that finding"},
	{SysConfigName, "host_api_url", Transport, "the host API takes reports and gives a sealing key bound to the quote"},
	{SysConfigName, "mr_config", Crypto, "its digest must be the MRCONFIGID or HOST_DATA in the quote"},
	{SysConfigName, "vm_config", Crypto, "verifiers compute the launch measurements from it; a lie does not match the quote"},
	{SysConfigName, "network", Transport, "field by field below"},
	{SysConfigName, "network.address", Transport, "peers are known by their evidence; the firewall does not depend on the address"},
	{SysConfigName, "network.gateway", Transport, "all packets pass the host anyway"},
	{SysConfigName, "network.dns", Transport, "names never establish identity"},

	{InstanceInfoName, "", Measured, "field by field below"},
	{InstanceInfoName, "instance_id_seed", Measured, "through instance_id, the SHA-256 of seed and app id"},
	{InstanceInfoName, "instance_id", Measured, "event instance-id"},
	{InstanceInfoName, "app_id", Measured, "event app-id"},
	{InstanceInfoName, "data_disk", Transport, "a host that lies costs availability, or data that it could destroy anyway; the guest measures that it formats a disk"},

	{EncryptedEnvName, "", Crypto, "sealed to the app's key by AEAD; who sealed it is for the manifest to pin (threats.md J03)"},
	{UserConfigName, "", Transport, "handed to the app as a file that is documented as untrusted"},
}

// Classes returns the class of each file and of each field, in the order of
// guest-os.md §3.
func Classes() []FieldClass { return slices.Clone(classes) }
