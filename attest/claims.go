// SPDX-License-Identifier: Apache-2.0

package attest

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	dstack "github.com/dstack-go/dstack"
)

// NotReported is the TCB status of a platform that does not tell one; a policy
// must accept it by name (threats.md B18). The other statuses are Intel's words
// (UpToDate, OutOfDate, …), which SEV-SNP and CCA use as far as they apply.
const NotReported = "NotReported"

// Claims is what verification established about one piece of evidence at one time.
// Exactly one of the typed parts is set, but for Google Cloud TDX, which has TDX
// and TPM.
type Claims struct {
	TEE   dstack.TEE
	Trust dstack.Trust
	Root  string // subject and SHA-256 fingerprint of the root that vouches

	TDX   *TDX
	SNP   *SNP
	CCA   *CCA
	TPM   *TPM
	Nitro *Nitro

	// ReportData is what the guest had signed: report data, challenge, user data or
	// qualifying data; 64 bytes but for TPM and Nitro, which allow any length.
	ReportData []byte

	TCBStatus  string    // worst of all parts
	Advisories []string  // sorted, without duplicates
	TCBDate    time.Time // publication of the oldest level that applies; zero when unknown

	// TCBEvaluation orders the vendor's statements that the grade rests on: for TDX
	// the lower of the evaluation data numbers of TCB info and QE identity, for
	// SEV-SNP the number of AMD's revocation list, zero elsewhere. A floor on it, of
	// one Product, detects replayed collateral (threats.md B03).
	TCBEvaluation uint32

	Product string // processor family in the vendor's words, such as Genoa, or an FMSPC of 12 hex digits
	Debug   bool   // the host can read the VM's memory

	// DeviceID is the SHA-256 of the machine identity that DeviceScheme names: ppid,
	// chip-id, cca-instance, nitro-module, ak. Ids of different schemes cannot be
	// compared. Zero with an empty scheme when the evidence names no machine.
	DeviceID     dstack.DeviceID
	DeviceScheme string

	// Unchecked names what an option allowed to go unchecked, in words that complete
	// "not checked: …", such as "certificate revocation list". Empty means that
	// nothing was left out.
	Unchecked []string

	Made    time.Time // when the hardware signed, where it says so (Nitro); zero elsewhere
	At      time.Time // when this was verified
	Expires time.Time // when the first thing relied upon ends; zero when nothing does
}

// TDX is the TD report of a verified quote, and the parts of its TCB grade.
type TDX struct {
	MRTD           dstack.Measurement
	RTMR           [4]dstack.Measurement
	MRConfigID     dstack.MRConfigID
	MROwner        dstack.Measurement
	MROwnerConfig  dstack.Measurement
	MRSEAM         dstack.Measurement
	MRSignerSEAM   dstack.Measurement
	MRServiceTD    dstack.Measurement // TDX 1.5; zero otherwise
	SEAMAttributes [8]byte            // memory order, as all byte arrays here
	TDAttributes   [8]byte
	XFAM           [8]byte
	TEETCBSVN      [16]byte // [0] module ISVSVN, [1] module version
	TEETCBSVN2     [16]byte // TDX 1.5: what the module is now
	V15            bool     // the body is of TDX 1.5

	PlatformStatus string // of the matching TCB level
	ModuleStatus   string // of the TDX module, empty when it has no identity of its own
	QEStatus       string // of the quoting enclave
	PPID           [16]byte
	FMSPC          [6]byte
}

// SNP is a verified SEV-SNP attestation report. TCB versions are the report's
// 64-bit values, little-endian in memory; which byte means what depends on the
// product.
type SNP struct {
	Version      uint32 // of the report, 2 to 5
	GuestSVN     uint32
	Policy       uint64
	FamilyID     [16]byte
	ImageID      [16]byte
	VMPL         uint32
	PlatformInfo uint64
	KeyInfo      uint32
	Measurement  dstack.Measurement
	HostData     [32]byte
	IDKeyDigest  [48]byte // zero without an ID block
	AuthorKey    [48]byte
	ReportID     [32]byte
	ReportIDMA   [32]byte
	ChipID       [64]byte
	CurrentTCB   uint64
	ReportedTCB  uint64
	CommittedTCB uint64
	LaunchTCB    uint64
	CertifiedTCB uint64   // from the extensions of the signing certificate, in the report's layout
	CPUID        [3]byte  // family, model, stepping (report version 3 and later)
	Product      string   // Milan, Genoa, Turin
	SigningKey   string   // VCEK or VLEK
	CSPID        string   // VLEK: the cloud provider that the certificate names
	Parts        SNPParts // CertifiedTCB, taken apart
}

// SNPParts are the security versions inside a SEV-SNP TCB version.
type SNPParts struct {
	FMC        uint8 `json:"fmc"` // Turin and later
	Bootloader uint8 `json:"bootloader"`
	TEE        uint8 `json:"tee"`
	SNP        uint8 `json:"snp"`
	Microcode  uint8 `json:"microcode"`
}

// CCA is a verified Arm CCA attestation token.
type CCA struct {
	RIM              []byte    // realm initial measurement
	REM              [4][]byte // realm extensible measurements; 3 holds dstack's runtime events
	RPV              [64]byte  // realm personalisation value, chosen by the host
	HashAlgorithm    string    // of RIM and REM: sha-256, sha-384 or sha-512
	ImplementationID [32]byte
	InstanceID       []byte // UEID, 33 bytes
	Lifecycle        uint16 // 0x3000 to 0x30ff: secured
	PlatformProfile  string
	RealmProfile     string
	PlatformConfig   []byte
	Challenge        []byte // of the platform token: the hash of the realm's key
	RealmKey         []byte // as the realm token spells it
	Components       []CCAComponent
}

// CCAComponent is one piece of platform firmware.
type CCAComponent struct {
	Type          string
	Measurement   []byte
	Version       string
	SignerID      []byte
	HashAlgorithm string
}

// TPM is a verified TPM 2.0 quote.
type TPM struct {
	PCRs            []PCR // those that the quote covers
	PCRDigest       []byte
	Clock           uint64 // milliseconds
	ResetCount      uint32
	RestartCount    uint32
	Safe            bool
	FirmwareVersion uint64
	AKSubject       string
}

// Nitro is a verified attestation document of AWS Nitro: of an enclave, or of a
// NitroTPM.
type Nitro struct {
	ModuleID  string
	PCRs      map[uint32][]byte // 48 bytes each
	PublicKey []byte
	UserData  []byte
	Nonce     []byte
}

// Register is one value that the hardware signed, under the vendor's name.
type Register struct {
	Name  string
	Value []byte
}

// Registers returns every signed value in a fixed order.
func (c *Claims) Registers() []Register {
	var out []Register
	add := func(name string, value []byte) { out = append(out, Register{name, value}) }
	u64 := func(name string, v uint64) { add(name, binary.LittleEndian.AppendUint64(nil, v)) }
	u32 := func(name string, v uint32) { add(name, binary.LittleEndian.AppendUint32(nil, v)) }
	if t := c.TDX; t != nil {
		add("mrtd", t.MRTD[:])
		for i := range t.RTMR {
			add("rtmr"+strconv.Itoa(i), t.RTMR[i][:])
		}
		add("report_data", c.ReportData)
		add("mr_config_id", t.MRConfigID[:])
		add("mr_owner", t.MROwner[:])
		add("mr_owner_config", t.MROwnerConfig[:])
		add("td_attributes", t.TDAttributes[:])
		add("xfam", t.XFAM[:])
		add("mr_seam", t.MRSEAM[:])
		add("mr_signer_seam", t.MRSignerSEAM[:])
		add("seam_attributes", t.SEAMAttributes[:])
		add("tee_tcb_svn", t.TEETCBSVN[:])
		if t.V15 {
			add("tee_tcb_svn2", t.TEETCBSVN2[:])
			add("mr_service_td", t.MRServiceTD[:])
		}
		add("ppid", t.PPID[:])
		add("fmspc", t.FMSPC[:])
	}
	if s := c.SNP; s != nil {
		add("measurement", s.Measurement[:])
		add("host_data", s.HostData[:])
		add("report_data", c.ReportData)
		u64("policy", s.Policy)
		u32("vmpl", s.VMPL)
		u32("guest_svn", s.GuestSVN)
		add("family_id", s.FamilyID[:])
		add("image_id", s.ImageID[:])
		u64("platform_info", s.PlatformInfo)
		u32("key_info", s.KeyInfo)
		add("id_key_digest", s.IDKeyDigest[:])
		add("author_key_digest", s.AuthorKey[:])
		add("report_id", s.ReportID[:])
		add("report_id_ma", s.ReportIDMA[:])
		add("chip_id", s.ChipID[:])
		u64("current_tcb", s.CurrentTCB)
		u64("reported_tcb", s.ReportedTCB)
		u64("committed_tcb", s.CommittedTCB)
		u64("launch_tcb", s.LaunchTCB)
		u64("certified_tcb", s.CertifiedTCB)
	}
	if a := c.CCA; a != nil {
		add("rim", a.RIM)
		for i := range a.REM {
			add("rem"+strconv.Itoa(i), a.REM[i])
		}
		add("challenge", c.ReportData)
		add("rpv", a.RPV[:])
		add("implementation_id", a.ImplementationID[:])
		add("instance_id", a.InstanceID)
		add("lifecycle", binary.BigEndian.AppendUint16(nil, a.Lifecycle))
		add("platform_challenge", a.Challenge)
		add("platform_config", a.PlatformConfig)
		add("realm_key", a.RealmKey)
	}
	if t := c.TPM; t != nil {
		add("extra_data", c.tpmQualifyingData())
		add("pcr_digest", t.PCRDigest)
		u64("firmware_version", t.FirmwareVersion)
		u64("clock", t.Clock)
		u32("reset_count", t.ResetCount)
		u32("restart_count", t.RestartCount)
	}
	if n := c.Nitro; n != nil {
		add("user_data", n.UserData)
		add("nonce", n.Nonce)
		add("public_key", n.PublicKey)
	}
	return out
}

// tpmQualifyingData is the report data of a bare TPM quote. Beside a TDX quote it
// is the hash of that quote, which verification has compared.
func (c *Claims) tpmQualifyingData() []byte {
	if c.TDX != nil {
		return nil
	}
	return c.ReportData
}

// PCRs returns the quoted platform configuration registers by index, of TPM and
// Nitro evidence; nil otherwise.
func (c *Claims) PCRs() map[uint32][]byte {
	switch {
	case c.Nitro != nil:
		return c.Nitro.PCRs
	case c.TPM != nil:
		m := map[uint32][]byte{}
		for _, p := range c.TPM.PCRs {
			m[p.Index] = p.Value
		}
		return m
	}
	return nil
}

// MarshalJSON writes the signed values only, under the vendors' names, as
// lowercase hexadecimal in memory order (numbers little-endian, as in the report;
// CCA's lifecycle big-endian, as in CBOR); pcrs is an object by index.
func (c *Claims) MarshalJSON() ([]byte, error) {
	m := map[string]any{}
	for _, r := range c.Registers() {
		if len(r.Value) > 0 {
			m[r.Name] = hex.EncodeToString(r.Value)
		}
	}
	if pcrs := c.PCRs(); pcrs != nil {
		out := map[string]string{}
		for i, v := range pcrs {
			out[fmt.Sprint(i)] = hex.EncodeToString(v)
		}
		m["pcrs"] = out
	}
	return json.Marshal(m)
}

// RuntimeRegister is a register that the running guest extends with the events of
// its log: register ← H(register ‖ H(event)), from zero.
type RuntimeRegister struct {
	Name  string // such as rtmr3
	Hash  string // sha-256, sha-384 or sha-512
	Value []byte
}

// RuntimeRegisters returns the registers that bind dstack's runtime events. None
// means that nothing vouches for a log beside this evidence (threats.md B19).
func (c *Claims) RuntimeRegisters() []RuntimeRegister {
	var out []RuntimeRegister
	if c.TDX != nil {
		out = append(out, RuntimeRegister{"rtmr3", "sha-384", c.TDX.RTMR[3][:]})
	}
	if c.CCA != nil {
		out = append(out, RuntimeRegister{"rem3", c.CCA.HashAlgorithm, c.CCA.REM[3]})
	}
	if v, ok := c.PCRs()[14]; ok && c.TEE != dstack.Nitro {
		hash := map[int]string{32: "sha-256", 48: "sha-384", 64: "sha-512"}[len(v)]
		out = append(out, RuntimeRegister{"pcr14", hash, v})
	}
	return out
}

// ConfigCommitment is the field by which a host commits to a VM's configuration
// before its first instruction. Digest is the 32 bytes of a configuration document
// (SEV-SNP, CCA); ID is TDX's MRCONFIGID, whose first byte says what follows.
type ConfigCommitment struct {
	Name   string
	ID     *dstack.MRConfigID
	Digest *[32]byte
}

// ConfigCommitment returns that field, or nil where the TEE has none.
func (c *Claims) ConfigCommitment() *ConfigCommitment {
	switch {
	case c.TDX != nil:
		return &ConfigCommitment{Name: "mr_config_id", ID: &c.TDX.MRConfigID}
	case c.SNP != nil:
		return &ConfigCommitment{Name: "host_data", Digest: &c.SNP.HostData}
	case c.CCA != nil:
		// The document's digest stands in the first half; the rest must be zero, or it
		// is a commitment to something else.
		d := [32]byte(c.CCA.RPV[:32])
		if [32]byte(c.CCA.RPV[32:]) != [32]byte{} {
			return nil
		}
		return &ConfigCommitment{Name: "rpv", Digest: &d}
	}
	return nil
}
