// SPDX-License-Identifier: Apache-2.0

// Package contracts is the governance contracts as they are deployed: the interface,
// code and storage layout that scripts/contracts.sh made from the Solidity sources in
// this directory (docs/contracts.md).
//
// Guarantees: the sources give exactly these bytes (contracts.sh --check), and the
// interface and the storage are upstream's where upstream has them, so that upstream's
// webhooks and readers of storage proofs work.
//
// Trusted: the Solidity compiler and OpenZeppelin's contracts, by version and hash.
// Nothing here comes from outside.
//
// Implements spec/governance.md §4 and §7; threats.md D11, G06, G07.
package contracts

import (
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
)

//go:embed abi/*.json
var artefacts embed.FS

// Artefact is a contract as it is deployed.
type Artefact struct {
	Name     string          `json:"contractName"`
	Compiler string          `json:"compiler"`
	ABI      json.RawMessage `json:"abi"`      // the Contract ABI's JSON
	Bytecode Code            `json:"bytecode"` // before the constructor's arguments
	// DeployedBytecode has zeros where the constructor writes, at Immutables.
	DeployedBytecode Code   `json:"deployedBytecode"`
	Immutables       []Span `json:"immutables"`
}

// Span is a stretch of code, in bytes.
type Span struct {
	Start  int `json:"start"`
	Length int `json:"length"`
}

// Code is bytes of the EVM; in JSON hexadecimal after 0x.
type Code []byte

func (c *Code) UnmarshalText(text []byte) error {
	digits, ok := strings.CutPrefix(string(text), "0x")
	if !ok {
		return fmt.Errorf("code does not begin with 0x")
	}
	code, err := hex.DecodeString(digits)
	*c = code
	return err
}

// The contracts.
const (
	KMS     = "DstackKms"    // the registry of one KMS
	App     = "DstackApp"    // one app; its proxy's address is the app id
	Council = "Council"      // an owner of m of n
	Proxy   = "ERC1967Proxy" // what KMS and App are deployed behind
)

// Load returns one of the contracts above.
func Load(name string) (*Artefact, error) {
	data, err := artefacts.ReadFile("abi/" + name + ".json")
	if err != nil {
		return nil, fmt.Errorf("contract %s: %w", name, err)
	}
	var a Artefact
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, fmt.Errorf("contract %s: %w", name, err)
	}
	return &a, nil
}
