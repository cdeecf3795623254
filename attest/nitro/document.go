// SPDX-License-Identifier: Apache-2.0

// Package nitro verifies attestation documents of AWS Nitro: of enclaves, and of
// EC2 instances with a NitroTPM.
//
// [Verify] is pure: a document, roots, revocation lists as far as the caller has
// any, and a time, against which the certificates (of a few hours) must be valid.
// It guarantees that the claims were signed by a key that chains to one given
// root, that the document is of the kind that the evidence says, and that every
// field has its type and length. Whether the document is fresh enough, and
// whether its registers are the right ones, is for the caller's policy: AWS
// publishes no security versions, so the TCB status is NotReported (threats.md
// B18), and an event log beside a document of an enclave is bound by nothing
// (B19).
//
// The document, its certificates and the revocation lists are attacker-controlled.
// Specification: attestation.md §8.3, §5.1, §5.3.
package nitro

import (
	"bytes"
	"strings"
	"time"

	dstack "github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest/cose"
	"github.com/dstack-go/dstack/attest/cose/strictcbor"
	"github.com/dstack-go/dstack/internal/fault"
)

// Limits in bytes, and counts (threats.md B15). Those of user data, nonce and
// public key are AWS's for requests.
const (
	MaxUserData  = 512
	MaxNonce     = 512
	MaxPublicKey = 1024
	MaxModuleID  = 128
	MaxCert      = 4096 // AWS says 1024
	MaxChain     = 8    // certificates of cabundle, so also of the chain from the leaf to below the root
	PCRSize      = 48   // SHA-384
	EnclavePCRs  = 32   // indices of an enclave's document are below
	TPMPCRs      = 24   // and of a NitroTPM's

	maxFraming = 16
	maxMillis  = 253402300799999 // the end of the year 9999
)

// Document is a parsed attestation document; unverified.
type Document struct {
	Kind        dstack.TEE        // Nitro or NitroTPM, from the name of the registers
	ModuleID    string            // of the Nitro module: <instance id>-enc<…> or <instance id>-tpm<…>
	Made        time.Time         // milliseconds, of AWS's clock
	PCRs        map[uint32][]byte // 48 bytes each
	Certificate []byte            // DER, of the signing key
	CABundle    [][]byte          // DER, from the root down to the issuer of Certificate
	PublicKey   []byte            // chosen by the guest, as are the next two; nil when absent
	UserData    []byte
	Nonce       []byte

	message *cose.Message
}

// ParseDocument reads the COSE_Sign1 message (RFC 9052) that the Nitro module
// returns. Bytes of a transport may stand before the message, at most 16, and then
// after it as well; without such a prefix nothing may follow.
//
// Errors have a code for each field: nitro_framing, those of cose.Parse,
// nitro_algorithm, nitro_document, nitro_kind, nitro_module_id, nitro_digest,
// nitro_timestamp, nitro_pcrs, nitro_pcr_index, nitro_pcr_size, nitro_pcr_missing,
// nitro_certificate, nitro_cabundle, nitro_chain_length, nitro_public_key,
// nitro_user_data, nitro_nonce.
func ParseDocument(quote []byte) (*Document, error) {
	raw, err := unframe(quote)
	if err != nil {
		return nil, err
	}
	message, err := cose.Parse(raw)
	if err != nil {
		return nil, err
	}
	if message.Algorithm != cose.ES384 {
		return nil, fault.New("nitro_algorithm", "the attestation document is signed by COSE algorithm %d, want ES384 (%d)", message.Algorithm, cose.ES384)
	}
	payload, err := strictcbor.Definite(message.Payload) // enclaves' documents are open maps
	if err != nil {
		return nil, fault.Wrap(err, "nitro_document", "attestation document")
	}
	item, err := strictcbor.Decode(payload)
	if err != nil {
		return nil, fault.Wrap(err, "nitro_document", "attestation document")
	}
	m, err := item.Map()
	if err != nil {
		return nil, fault.Wrap(err, "nitro_document", "attestation document")
	}
	d := &Document{message: message}
	for _, read := range []func(strictcbor.Map) error{d.readHead, d.readPCRs, d.readCertificates, d.readChosen} {
		if err := read(m); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// unframe finds the message in what carries it: an array of four whose first part
// is the protected header {1: -35}.
func unframe(quote []byte) ([]byte, error) {
	start := []byte{0x84, 0x44, 0xa1, 0x01, 0x38, 0x22}
	if len(quote) > cose.MaxMessage {
		return nil, fault.New("cose_too_large", "attestation document of %d bytes exceeds %d", len(quote), cose.MaxMessage)
	}
	if len(quote) == 0 {
		return nil, fault.New("nitro_framing", "there is no attestation document")
	}
	const array4, majorTag = 0x84, 6
	if quote[0] == array4 || quote[0]>>5 == majorTag {
		return quote, nil
	}
	at := bytes.Index(quote[:min(len(quote), maxFraming+len(start))], start)
	if at < 0 {
		return nil, fault.New("nitro_framing", "no COSE message begins in the first %d bytes", maxFraming+1)
	}
	raw, err := strictcbor.First(quote[at:])
	if err != nil {
		return nil, fault.Wrap(err, "nitro_framing", "COSE message at byte %d", at)
	}
	return raw, nil
}

// registers are the members that hold registers, by kind, and the registers that
// verification and image identity rest on.
var registers = []struct {
	kind   dstack.TEE
	member string
	limit  uint64
	need   []uint32
}{
	{dstack.Nitro, "pcrs", EnclavePCRs, []uint32{0, 1, 2}},
	{dstack.NitroTPM, "nitrotpm_pcrs", TPMPCRs, []uint32{4, 7, 12}},
}

func (d *Document) readHead(m strictcbor.Map) error {
	item, err := m.Need("module_id")
	if err == nil {
		d.ModuleID, err = item.Text(1, MaxModuleID)
	}
	if err != nil {
		return fault.Wrap(err, "nitro_module_id", "module_id")
	}
	if strings.ContainsFunc(d.ModuleID, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fault.New("nitro_module_id", "module_id %q is not printable ASCII", d.ModuleID)
	}

	var digest string
	if item, err = m.Need("digest"); err == nil {
		digest, err = item.Text(1, 16)
	}
	if err != nil {
		return fault.Wrap(err, "nitro_digest", "digest")
	}
	if digest != "SHA384" {
		return fault.New("nitro_digest", "the registers are of %s, want SHA384", digest)
	}

	var ms uint64
	if item, err = m.Need("timestamp"); err == nil {
		ms, err = item.Uint(maxMillis)
	}
	if err != nil {
		return fault.Wrap(err, "nitro_timestamp", "timestamp")
	}
	if ms == 0 {
		return fault.New("nitro_timestamp", "the document has no timestamp")
	}
	d.Made = time.UnixMilli(int64(ms)).UTC()
	return nil
}

func (d *Document) readPCRs(m strictcbor.Map) error {
	kind := -1
	for n, r := range registers {
		if _, ok := m.Get(r.member); ok {
			if kind >= 0 {
				return fault.New("nitro_kind", "the document has registers of an enclave and of a NitroTPM")
			}
			kind = n
		}
	}
	if kind < 0 {
		return fault.New("nitro_kind", "the document has neither pcrs nor nitrotpm_pcrs")
	}
	r := registers[kind]
	d.Kind = r.kind
	item, _ := m.Get(r.member)
	list, err := item.Map()
	if err != nil {
		return fault.Wrap(err, "nitro_pcrs", "%s", r.member)
	}
	d.PCRs = make(map[uint32][]byte, len(list))
	for key, value := range list {
		index, ok := key.(int64)
		if !ok || index < 0 || uint64(index) >= r.limit {
			return fault.New("nitro_pcr_index", "%s has a register %v, want numbers below %d", r.member, key, r.limit)
		}
		v, err := value.Bytes(PCRSize, PCRSize)
		if err != nil {
			return fault.Wrap(err, "nitro_pcr_size", "register %d", index)
		}
		d.PCRs[uint32(index)] = v
	}
	for _, index := range r.need {
		if _, ok := d.PCRs[index]; !ok {
			return fault.New("nitro_pcr_missing", "%s lacks register %d", r.member, index)
		}
	}
	return nil
}

func (d *Document) readCertificates(m strictcbor.Map) error {
	item, err := m.Need("certificate")
	if err == nil {
		d.Certificate, err = item.Bytes(1, MaxCert)
	}
	if err != nil {
		return fault.Wrap(err, "nitro_certificate", "certificate")
	}
	var bundle []strictcbor.Item
	if item, err = m.Need("cabundle"); err == nil {
		bundle, err = item.Array(1, strictcbor.MaxItems)
	}
	if err != nil {
		return fault.Wrap(err, "nitro_cabundle", "cabundle")
	}
	if len(bundle) > MaxChain {
		return fault.New("nitro_chain_length", "cabundle has %d certificates, at most %d", len(bundle), MaxChain)
	}
	for n, item := range bundle {
		cert, err := item.Bytes(1, MaxCert)
		if err != nil {
			return fault.Wrap(err, "nitro_cabundle", "certificate %d of cabundle", n)
		}
		d.CABundle = append(d.CABundle, cert)
	}
	return nil
}

// readChosen reads what the guest chose; null and absence mean the same.
func (d *Document) readChosen(m strictcbor.Map) (err error) {
	optional := func(member string, most int) ([]byte, error) {
		item, ok := m.Get(member)
		if !ok || item.IsNull() {
			return nil, nil
		}
		return item.Bytes(0, most)
	}
	if d.PublicKey, err = optional("public_key", MaxPublicKey); err != nil {
		return fault.Wrap(err, "nitro_public_key", "public_key")
	}
	if d.UserData, err = optional("user_data", MaxUserData); err != nil {
		return fault.Wrap(err, "nitro_user_data", "user_data")
	}
	if d.Nonce, err = optional("nonce", MaxNonce); err != nil {
		return fault.Wrap(err, "nitro_nonce", "nonce")
	}
	return nil
}
