// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"strings"
	"unicode"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/ratls"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// AsContainer is the kind of ReadEvidence that takes containers and replies of an
// instance only, and no bare evidence.
const AsContainer = "dstack"

// ReadEvidence reads evidence in any of the forms that the field has:
//
//   - this program's own: the reply of the attest endpoint, a saved file, a bundle
//   - a V0 or V1 container, an upstream /verify request, GetQuote, Attest or Info reply
//   - a TDX quote, SEV-SNP report (with or without a certificate table behind it),
//     Arm CCA token, Nitro document, or TPM bundle (JSON)
//   - an RA-TLS certificate, DER or PEM
//
// each of them binary or as hexadecimal or base64 text. The kind is found by
// looking, unless kind names one: tdx, sev-snp, cca, tpm, nitro, nitro-tpm, or
// dstack (AsContainer). Nothing is verified. Codes: evidence_unknown,
// evidence_malformed, evidence_too_large, and those of the parsers.
func ReadEvidence(data []byte, kind string) (*Source, error) {
	if len(data) > MaxSource {
		return nil, fault.New("evidence_too_large", "evidence of %d bytes, more than %d", len(data), MaxSource)
	}
	if _, ok := tees[dstack.TEE(kind)]; !ok && kind != "" && kind != AsContainer {
		return nil, fault.New("tee_unknown", "unknown kind of TEE %q", kind).WithFix("one of tdx, sev-snp, cca, tpm, nitro, nitro-tpm, dstack")
	}
	src, err := readEvidence(data, kind)
	if err != nil {
		return nil, err
	}
	return src, src.check()
}

func readEvidence(data []byte, kind string) (*Source, error) {
	text := bytes.TrimSpace(data)
	switch {
	case len(text) == 0:
		return nil, fault.New("evidence_malformed", "the evidence is empty")
	case text[0] == '{':
		return readJSON(text, kind)
	case bytes.HasPrefix(text, []byte("-----BEGIN CERTIFICATE-----")):
		block, _ := pem.Decode(text)
		if block == nil {
			return nil, fault.New("evidence_malformed", "the certificate is not PEM")
		}
		return readCertificate(block.Bytes)
	}
	if src, err := readBinary(data, kind); src != nil || err != nil {
		return src, err
	}
	if raw := fromText(text); raw != nil {
		if t := bytes.TrimSpace(raw); len(t) > 0 && t[0] == '{' {
			return readJSON(t, kind)
		}
		if src, err := readBinary(raw, kind); src != nil || err != nil {
			return src, err
		}
	}
	return nil, fault.New("evidence_unknown", "this is no evidence of a kind that this program knows").
		WithFix("give a quote, report, token, document, container or certificate, binary or in hex or base64, or say what it is with --tee")
}

// fromText decodes hexadecimal, with or without 0x and line breaks, or base64 of
// either alphabet; nil when it is neither.
func fromText(text []byte) []byte {
	s := strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, string(text))
	if b, err := hex.DecodeString(strings.TrimPrefix(s, "0x")); err == nil {
		return b
	}
	s = strings.TrimRight(strings.NewReplacer("-", "+", "_", "/").Replace(s), "=")
	if b, err := base64.RawStdEncoding.DecodeString(s); err == nil {
		return b
	}
	return nil
}

const snpReportSize = 1184

// readBinary returns nil and no error when data is of no known binary form.
func readBinary(data []byte, kind string) (*Source, error) {
	bare := func(tee dstack.TEE, quote []byte) (*Source, error) {
		return &Source{Version: sourceFormat, Evidence: &attest.Evidence{TEE: tee, Quote: quote}}, nil
	}
	switch tee := dstack.TEE(kind); tee {
	case "":
	case AsContainer:
		if isContainer(data) {
			return &Source{Version: sourceFormat, Container: data}, nil
		}
		return nil, nil
	case dstack.SEVSNP:
		return readSNP(data)
	case dstack.TPM:
		return nil, nil // JSON only
	default:
		// Hexadecimal and base64 are of printable characters; no binary form is.
		if isText(data) {
			return nil, nil
		}
		return bare(tee, data)
	}
	if len(data) < 8 {
		return nil, nil
	}
	u16, u32 := binary.LittleEndian.Uint16(data), binary.LittleEndian.Uint32(data)
	switch {
	case u16 >= 3 && u16 <= 5 && (data[2] == 2 || data[2] == 3) && data[3] == 0:
		return bare(dstack.TDX, data)
	case u32 >= 1 && u32 <= 8 && len(data) >= snpReportSize:
		return readSNP(data)
	case bytes.HasPrefix(data, []byte{0xd9, 0x01, 0x8f}), bytes.HasPrefix(data, []byte{0xd9, 0x03, 0x8b}):
		return bare(dstack.CCA, data)
	case isCOSE(data):
		if bytes.Contains(data, []byte("nitrotpm_pcrs")) {
			return bare(dstack.NitroTPM, data)
		}
		return bare(dstack.Nitro, data)
	case data[0] == 0x30 && data[1] == 0x82:
		return readCertificate(data)
	case isContainer(data):
		return &Source{Version: sourceFormat, Container: data}, nil
	}
	return nil, nil
}

func isText(data []byte) bool {
	for _, b := range data {
		if b >= 0x7f || b < ' ' && b != '\n' && b != '\r' && b != '\t' {
			return false
		}
	}
	return true
}

func isContainer(data []byte) bool {
	switch b := data[0]; {
	case b == 0:
		return len(data) > 1 && data[1] <= 4
	case b == 0xde, b == 0xdf, b >= 0x80 && b <= 0x8f:
		return true
	}
	return false
}

// isCOSE finds a COSE_Sign1 of ES384 with a protected header of four bytes, tagged
// or not, possibly behind the length that the Nitro driver puts before it.
func isCOSE(data []byte) bool {
	at := bytes.Index(data[:min(len(data), 32)], []byte{0x84, 0x44, 0xa1, 0x01})
	return at >= 0 && at <= 16
}

// readSNP takes a report and, behind it, a certificate table (GHCB specification,
// SNP Extended Guest Request).
func readSNP(data []byte) (*Source, error) {
	if len(data) < snpReportSize || isText(data) {
		return nil, nil
	}
	e := &attest.Evidence{TEE: dstack.SEVSNP, Quote: data[:snpReportSize]}
	if table := data[snpReportSize:]; len(bytes.Trim(table, "\x00")) > 0 {
		e.CertChain = [][]byte{table}
	}
	return &Source{Version: sourceFormat, Evidence: e}, nil
}

// anyEvidence is the union of what JSON evidence may have. Which members count
// depends on which are there; the rest is ignored, as upstream does.
type anyEvidence struct {
	Container   string          `json:"container"`
	Attestation string          `json:"attestation"` // /verify request, Attest reply
	Evidence    string          `json:"evidence"`    // bundle: the source it was saved from
	Quote       string          `json:"quote"`
	EventLog    json.RawMessage `json:"event_log"`
	VMConfig    string          `json:"vm_config"`
	ReportData  string          `json:"report_data"`
	AppCompose  string          `json:"app_compose"`
	TCBInfo     json.RawMessage `json:"tcb_info"`
	Message     string          `json:"message"` // TPM bundle
	PCRValues   json.RawMessage `json:"pcr_values"`
}

func readJSON(data []byte, kind string) (*Source, error) {
	var j anyEvidence
	if err := strictjson.Decode(data, &j, strictjson.Limits{Size: MaxSource, Depth: 12, Unknown: true}); err != nil {
		return nil, fault.Wrap(err, "evidence_malformed", "the evidence is not JSON of a known form").
			WithFix("give the reply of /.well-known/dstack/attest, a GetQuote reply, or a file that `dstack verify --save` wrote")
	}
	unhex := func(name, text string) ([]byte, error) {
		b, err := hex.DecodeString(strings.TrimPrefix(text, "0x"))
		if err != nil {
			return nil, fault.Wrap(err, "evidence_malformed", "%s of the evidence", name)
		}
		return b, nil
	}
	switch {
	case j.Evidence != "":
		raw, err := unhex("evidence", j.Evidence)
		if err != nil {
			return nil, err
		}
		inner, err := readNested(raw, kind)
		if err != nil {
			return nil, err
		}
		if inner.Collateral == nil {
			if inner.Collateral, err = collateral.ParseBundle(data); err != nil {
				return nil, err
			}
		}
		return inner, nil
	case j.Container != "":
		return ParseSource(data)
	case j.Attestation != "":
		raw, err := unhex("attestation", j.Attestation)
		if err != nil {
			return nil, err
		}
		return &Source{Version: sourceFormat, Container: raw}, nil
	case j.Quote != "":
		return readQuote(j, unhex)
	case j.Message != "" && j.PCRValues != nil:
		return readTPMBundle(data)
	case j.TCBInfo != nil:
		return nil, fault.New("info_without_quote", "this Info reply has no quote, so nothing in it is signed by hardware").
			WithFix("ask GetQuote or Attest, or merge their quote into it")
	}
	return nil, fault.New("evidence_unknown", "this JSON is no evidence of a kind that this program knows").
		WithFix("give the reply of /.well-known/dstack/attest, a GetQuote reply, or a file that `dstack verify --save` wrote")
}

// readNested reads the evidence inside a bundle, which must not be a bundle.
func readNested(raw []byte, kind string) (*Source, error) {
	if t := bytes.TrimSpace(raw); len(t) > 0 && t[0] == '{' {
		var j anyEvidence
		if err := strictjson.Decode(t, &j, strictjson.Limits{Size: MaxSource, Depth: 12, Unknown: true}); err == nil && j.Evidence != "" {
			return nil, fault.New("evidence_malformed", "a bundle inside a bundle")
		}
	}
	return readEvidence(raw, kind)
}

// readQuote takes a TDX quote with its log, as GetQuote replies and /verify asks,
// or an Info reply that a quote was merged into.
func readQuote(j anyEvidence, unhex func(string, string) ([]byte, error)) (*Source, error) {
	quote, err := unhex("quote", j.Quote)
	if err != nil {
		return nil, err
	}
	log, manifest := j.EventLog, j.AppCompose
	if len(j.TCBInfo) > 0 {
		text := []byte(j.TCBInfo)
		var nested string
		if json.Unmarshal(text, &nested) == nil {
			text = []byte(nested)
		}
		var info struct {
			EventLog   json.RawMessage `json:"event_log"`
			AppCompose string          `json:"app_compose"`
		}
		if err := strictjson.Decode(text, &info, strictjson.Limits{Size: MaxSource, Depth: 12, Unknown: true}); err != nil {
			return nil, fault.Wrap(err, "evidence_malformed", "tcb_info of the evidence")
		}
		if len(log) == 0 {
			log = info.EventLog
		}
		if manifest == "" {
			manifest = info.AppCompose
		}
	}
	e := &attest.Evidence{TEE: dstack.TDX, Quote: quote, Config: j.VMConfig}
	if e.EventLog, err = ReadEventLog(log); err != nil {
		return nil, err
	}
	if j.ReportData != "" {
		if e.ReportData, err = dstack.ParseReportData(j.ReportData); err != nil {
			return nil, fault.Wrap(err, "evidence_malformed", "report_data of the evidence")
		}
		e.ReportDataClaimed = true
	}
	return &Source{Version: sourceFormat, Evidence: e, Manifest: manifest}, nil
}

// ReadEventLog reads an event log: the JSON array of attestation.md §3.1, bare or as
// a JSON string of it, or a firmware's binary CCEL. Empty is no log.
func ReadEventLog(data []byte) ([]eventlog.Event, error) {
	text := bytes.TrimSpace(data)
	if len(text) == 0 || string(text) == "null" {
		return nil, nil
	}
	if text[0] == '"' {
		var nested string
		if err := json.Unmarshal(text, &nested); err != nil {
			return nil, fault.Wrap(err, "log_malformed", "the event log")
		}
		if text = bytes.TrimSpace([]byte(nested)); len(text) == 0 {
			return nil, nil
		}
	}
	if text[0] == '[' {
		return eventlog.ParseJSON(text)
	}
	return eventlog.ParseCCEL(data)
}

// AddEventLog joins a log to bare evidence that came without one.
func (s *Source) AddEventLog(events []eventlog.Event) error {
	if s.Evidence == nil || len(s.Evidence.EventLog) > 0 {
		return fault.New("event_log_twice", "the evidence carries an event log of its own").WithFix("leave --event-log out")
	}
	s.Evidence.EventLog = events
	return nil
}

func readCertificate(der []byte) (*Source, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fault.Wrap(err, "evidence_malformed", "the certificate does not parse")
	}
	return FromCertificate(cert)
}

// FromCertificate takes the evidence that an RA-TLS certificate carries.
func FromCertificate(cert *x509.Certificate) (*Source, error) {
	a, err := ratls.FromCertificate(cert)
	if err != nil {
		return nil, err
	}
	return &Source{
		Version: sourceFormat, Container: a.Container,
		RATLS: cert.RawSubjectPublicKeyInfo, Issued: cert.NotBefore, Certificate: cert,
	}, nil
}

func readTPMBundle(data []byte) (*Source, error) {
	q, err := tpm.ParseBundle(data)
	if err != nil {
		return nil, err
	}
	return &Source{Version: sourceFormat, Evidence: &attest.Evidence{TEE: dstack.TPM, TPMQuote: q}}, nil
}
