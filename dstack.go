// SPDX-License-Identifier: Apache-2.0

// Package dstack is the vocabulary of the system: the identities, measurements
// and byte strings that every other package speaks of, each as a type of its own.
//
// It holds types only and imports the standard library only. Read it first: an
// application is named by an [AppID] and defined by the [ComposeHash] of its
// manifest; a running copy of it is an [InstanceID]; it runs on an OS image
// named by an [ImageHash], on a machine named by a [DeviceID]; a TEE vouches for
// all of that with [Measurement] values in a quote that also carries
// [ReportData] chosen by the guest.
//
// All fixed-length types are parsed from hexadecimal text of exactly the right
// length: nothing is padded or truncated, since a padded hash once stood for a
// different one (threats.md B17).
package dstack

import (
	"bytes"
	"encoding/hex"
	"fmt"
)

// Sizes in bytes.
const (
	AppIDSize       = 20
	InstanceIDSize  = 20
	ComposeHashSize = 32
	ImageHashSize   = 32
	DeviceIDSize    = 32
	MeasurementSize = 48
	ReportDataSize  = 64
	MRConfigIDSize  = 48
)

type (
	// AppID names an application across its upgrades: by default the first 20
	// bytes of the compose hash of its first manifest. It does not pin what
	// runs; a relying party checks the ComposeHash as well (threats.md B12).
	AppID [AppIDSize]byte

	// InstanceID names one deployed copy of an application:
	// SHA-256(seed ‖ app id)[0:20].
	InstanceID [InstanceIDSize]byte

	// ComposeHash is the SHA-256 of the exact bytes of app-compose.json.
	ComposeHash [ComposeHashSize]byte

	// ImageHash is the SHA-256 of the exact bytes of an OS image's
	// sha256sum.txt; upstream calls it os_image_hash.
	ImageHash [ImageHashSize]byte

	// DeviceID is the SHA-256 of a platform-specific machine identity (PPID,
	// chip id, …). Device ids of different schemes cannot be compared.
	DeviceID [DeviceIDSize]byte

	// Measurement is a SHA-384 register or digest: MRTD, an RTMR, an event digest.
	Measurement [MeasurementSize]byte

	// ReportData is the challenge field of a TDX or SNP report.
	ReportData [ReportDataSize]byte

	// MRConfigID is TDX's MRCONFIGID: first byte the form (1, 2 or 3; 0 = unused).
	MRConfigID [MRConfigIDSize]byte
)

// TEE names a kind of trusted execution environment, as `--tee` and JSON spell it.
type TEE string

// The kinds of TEE the project knows.
const (
	TDX      TEE = "tdx"
	SEVSNP   TEE = "sev-snp"
	CCA      TEE = "cca"
	TPM      TEE = "tpm"
	Nitro    TEE = "nitro"
	NitroTPM TEE = "nitro-tpm"
)

// Trust says under which roots evidence was accepted.
type Trust string

// Production evidence chains to a vendor's root; development evidence to a root
// that the caller added for this run, and proves nothing about hardware. Evidence
// under a key that the caller named (an Arm CCA platform key, which no public
// authority certifies) is as good as the caller's knowledge of whose key it is.
const (
	TrustProduction  Trust = "production"
	TrustDevelopment Trust = "development"
	TrustCaller      Trust = "caller"
)

func parseHex(kind string, dst, text []byte) error {
	if len(text) != 2*len(dst) {
		return fmt.Errorf("%s must be %d hexadecimal digits, got %d characters", kind, 2*len(dst), len(text))
	}
	if _, err := hex.Decode(dst, bytes.ToLower(text)); err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	return nil
}

// ParseAppID parses exactly 40 hexadecimal digits.
func ParseAppID(s string) (v AppID, err error) { err = v.UnmarshalText([]byte(s)); return }

// ParseInstanceID parses exactly 40 hexadecimal digits.
func ParseInstanceID(s string) (v InstanceID, err error) { err = v.UnmarshalText([]byte(s)); return }

// ParseComposeHash parses exactly 64 hexadecimal digits.
func ParseComposeHash(s string) (v ComposeHash, err error) { err = v.UnmarshalText([]byte(s)); return }

// ParseImageHash parses exactly 64 hexadecimal digits.
func ParseImageHash(s string) (v ImageHash, err error) { err = v.UnmarshalText([]byte(s)); return }

// ParseMeasurement parses exactly 96 hexadecimal digits.
func ParseMeasurement(s string) (v Measurement, err error) { err = v.UnmarshalText([]byte(s)); return }

// ParseReportData parses exactly 128 hexadecimal digits.
func ParseReportData(s string) (v ReportData, err error) { err = v.UnmarshalText([]byte(s)); return }

// Each type prints as lowercase hexadecimal and parses exactly its own length.

func (v AppID) String() string       { return hex.EncodeToString(v[:]) }
func (v InstanceID) String() string  { return hex.EncodeToString(v[:]) }
func (v ComposeHash) String() string { return hex.EncodeToString(v[:]) }
func (v ImageHash) String() string   { return hex.EncodeToString(v[:]) }
func (v DeviceID) String() string    { return hex.EncodeToString(v[:]) }
func (v Measurement) String() string { return hex.EncodeToString(v[:]) }
func (v ReportData) String() string  { return hex.EncodeToString(v[:]) }
func (v MRConfigID) String() string  { return hex.EncodeToString(v[:]) }

func (v AppID) MarshalText() ([]byte, error)       { return []byte(v.String()), nil }
func (v InstanceID) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }
func (v ComposeHash) MarshalText() ([]byte, error) { return []byte(v.String()), nil }
func (v ImageHash) MarshalText() ([]byte, error)   { return []byte(v.String()), nil }
func (v DeviceID) MarshalText() ([]byte, error)    { return []byte(v.String()), nil }
func (v Measurement) MarshalText() ([]byte, error) { return []byte(v.String()), nil }
func (v ReportData) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }
func (v MRConfigID) MarshalText() ([]byte, error)  { return []byte(v.String()), nil }

func (v *AppID) UnmarshalText(b []byte) error       { return parseHex("app id", v[:], b) }
func (v *InstanceID) UnmarshalText(b []byte) error  { return parseHex("instance id", v[:], b) }
func (v *ComposeHash) UnmarshalText(b []byte) error { return parseHex("compose hash", v[:], b) }
func (v *ImageHash) UnmarshalText(b []byte) error   { return parseHex("image hash", v[:], b) }
func (v *DeviceID) UnmarshalText(b []byte) error    { return parseHex("device id", v[:], b) }
func (v *Measurement) UnmarshalText(b []byte) error { return parseHex("measurement", v[:], b) }
func (v *ReportData) UnmarshalText(b []byte) error  { return parseHex("report data", v[:], b) }
func (v *MRConfigID) UnmarshalText(b []byte) error  { return parseHex("mr config id", v[:], b) }

// IsZero reports whether every byte is zero.
func (v AppID) IsZero() bool       { return v == AppID{} }
func (v InstanceID) IsZero() bool  { return v == InstanceID{} }
func (v ComposeHash) IsZero() bool { return v == ComposeHash{} }
func (v ImageHash) IsZero() bool   { return v == ImageHash{} }
func (v Measurement) IsZero() bool { return v == Measurement{} }
func (v MRConfigID) IsZero() bool  { return v == MRConfigID{} }
