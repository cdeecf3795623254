// SPDX-License-Identifier: Apache-2.0

package tdx

import (
	"bytes"
	"crypto/ecdsa"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
)

// TCB statuses (Intel PCS API v4, tcbStatus).
const (
	UpToDate                             = "UpToDate"
	SWHardeningNeeded                    = "SWHardeningNeeded"
	ConfigurationNeeded                  = "ConfigurationNeeded"
	ConfigurationAndSWHardeningNeeded    = "ConfigurationAndSWHardeningNeeded"
	OutOfDate                            = "OutOfDate"
	OutOfDateConfigurationNeeded         = "OutOfDateConfigurationNeeded"
	Revoked                              = "Revoked"
	Unsupported                          = "Unsupported"                          // below every published level; never in TCB info
	TDRelaunchAdvised                    = "TDRelaunchAdvised"                    // ours to conclude, never in TCB info
	TDRelaunchAdvisedConfigurationNeeded = "TDRelaunchAdvisedConfigurationNeeded" // same
)

var platformStatuses = []string{UpToDate, SWHardeningNeeded, ConfigurationNeeded, ConfigurationAndSWHardeningNeeded, OutOfDate, OutOfDateConfigurationNeeded, Revoked}

// enclaveStatuses are those of modules and quoting enclaves.
var enclaveStatuses = []string{UpToDate, OutOfDate, Revoked}

// What the vendor's documents are for: TDs, or enclaves.
const (
	idTDX  = "TDX" // TCB info
	idSGX  = "SGX"
	idTDQE = "TD_QE" // QE identity
	idQE   = "QE"
)

// maxLevels bounds the levels of one list; Intel publishes a few dozen at most.
const maxLevels = 256

// tcbDoc is the JSON of TCB info version 3. Fields that loosen the check when
// absent are pointers.
type tcbDoc struct {
	ID         string     `json:"id"`
	Version    int        `json:"version"`
	IssueDate  string     `json:"issueDate"`
	NextUpdate string     `json:"nextUpdate"`
	FMSPC      string     `json:"fmspc"`
	PCEID      string     `json:"pceId"`
	Evaluation uint32     `json:"tcbEvaluationDataNumber"`
	Module     module     `json:"tdxModule"`
	Identities []module   `json:"tdxModuleIdentities"`
	Levels     []tcbLevel `json:"tcbLevels"`
}

// tcbLevel is a level of the platform; TDX is absent from TCB info for SGX.
type tcbLevel struct {
	TCB struct {
		SGX    []component `json:"sgxtcbcomponents"`
		TDX    []component `json:"tdxtcbcomponents"`
		PCESVN *uint16     `json:"pcesvn"`
	} `json:"tcb"`
	Date       string   `json:"tcbDate"`
	Status     string   `json:"tcbStatus"`
	Advisories []string `json:"advisoryIDs"`
}

type component struct {
	SVN *uint8 `json:"svn"`
}

type module struct {
	ID             string         `json:"id"`
	MRSigner       string         `json:"mrsigner"`
	Attributes     string         `json:"attributes"`
	AttributesMask string         `json:"attributesMask"`
	Levels         []enclaveLevel `json:"tcbLevels"`
}

// enclaveLevel is a level of a module or of the quoting enclave.
type enclaveLevel struct {
	TCB struct {
		ISVSVN *uint16 `json:"isvsvn"`
	} `json:"tcb"`
	Date       string   `json:"tcbDate"`
	Status     string   `json:"tcbStatus"`
	Advisories []string `json:"advisoryIDs"`
}

type qeDoc struct {
	ID             string         `json:"id"`
	Version        int            `json:"version"`
	IssueDate      string         `json:"issueDate"`
	NextUpdate     string         `json:"nextUpdate"`
	Evaluation     uint32         `json:"tcbEvaluationDataNumber"`
	MiscSelect     string         `json:"miscselect"`
	MiscSelectMask string         `json:"miscselectMask"`
	Attributes     string         `json:"attributes"`
	AttributesMask string         `json:"attributesMask"`
	MRSigner       string         `json:"mrsigner"`
	ISVProdID      *uint16        `json:"isvprodid"`
	Levels         []enclaveLevel `json:"tcbLevels"`
}

// signed verifies one of the vendor's JSON documents: issuer chain, signature over
// the exact bytes, syntax, and what check says of it; check fills in what it was
// made over. The role is tcb_info or qe_identity. Times are the caller's to judge.
func signed[T any](v *verification, role, raw string, sig []byte, chainPEM string, check func(*T) error) (*T, error) {
	if raw == "" {
		return nil, fault.New(role+"_missing", "collateral has no %s", role).WithFix("fetch complete collateral")
	}
	chain, err := v.chain(role, []byte(chainPEM))
	if err != nil {
		return nil, err
	}
	if err := v.checkChain(role, chain, []string{CNTCBSigning}); err != nil {
		return nil, err
	}
	signer := chain[0]
	doc, err := v.memo.Do("tdx "+role, [][]byte{[]byte(raw), sig, signer.Raw}, func() (any, error) {
		if !verifyRaw(signer.PublicKey.(*ecdsa.PublicKey), []byte(raw), sig) {
			return nil, fault.New(role+"_signature", "%s is not signed by %q", role, signer.Subject.CommonName)
		}
		doc := new(T)
		if err := strictjson.Decode([]byte(raw), doc, strictjson.Limits{Size: collateral.MaxDocument, Depth: 8, Unknown: true}); err != nil {
			return nil, fault.Wrap(err, role+"_malformed", "%s", role)
		}
		return doc, check(doc)
	})
	if err != nil {
		return nil, err
	}
	return doc.(*T), nil
}

// inTime checks issueDate ≤ at ≤ nextUpdate.
func (v *verification) inTime(role, issued, next string) error {
	from, err := time.Parse(time.RFC3339, issued)
	if err != nil {
		return fault.Wrap(err, role+"_malformed", "issueDate of %s", role)
	}
	to, err := time.Parse(time.RFC3339, next)
	if err != nil {
		return fault.Wrap(err, role+"_malformed", "nextUpdate of %s", role)
	}
	if v.at.Before(from) {
		return fault.New(role+"_not_yet_valid", "%s is of %s, after %s", role, day(from), day(v.at))
	}
	if v.at.After(to) {
		return fault.New(role+"_expired", "%s was good until %s, not at %s", role, day(to), day(v.at)).
			WithFix("fetch fresh collateral, or state the time at which to verify")
	}
	v.until(to)
	return nil
}

// info is verified TCB info.
type info struct {
	tcbDoc
	fmspc [6]byte
	pceID [2]byte
}

// tcbInfo reads TCB info for TDX or for SGX, as id says.
func (v *verification) tcbInfo(col collateral.TDX, id string) (*info, error) {
	t, err := signed(v, "tcb_info", col.TCBInfo, col.TCBInfoSignature, col.TCBInfoIssuerChain, (*info).check)
	if err != nil {
		return nil, err
	}
	// Not in check, whose outcome is remembered whatever the document is read for.
	if t.ID != id {
		return nil, fault.New("tcb_info_id", "TCB info is for %q, want %s", t.ID, id)
	}
	return t, v.inTime("tcb_info", t.IssueDate, t.NextUpdate)
}

// check demands everything of TCB info that appraise relies on.
func (t *info) check() error {
	const role = "tcb_info"
	if t.ID != idTDX && t.ID != idSGX {
		return fault.New("tcb_info_id", "TCB info is for %q, want %s or %s", t.ID, idTDX, idSGX)
	}
	if t.Version != 3 {
		return fault.New("tcb_info_version", "TCB info has version %d, want 3", t.Version)
	}
	if err := hexInto(t.fmspc[:], t.FMSPC); err != nil {
		return fault.Wrap(err, role+"_malformed", "fmspc of TCB info")
	}
	if err := hexInto(t.pceID[:], t.PCEID); err != nil {
		return fault.Wrap(err, role+"_malformed", "pceId of TCB info")
	}
	if n := len(t.Levels); n == 0 || n > maxLevels {
		return fault.New(role+"_malformed", "TCB info has %d levels", n)
	}
	for i, l := range t.Levels {
		absent := func(c component) bool { return c.SVN == nil }
		if len(l.TCB.SGX) != 16 || t.ID == idTDX && len(l.TCB.TDX) != 16 || l.TCB.PCESVN == nil ||
			slices.ContainsFunc(l.TCB.SGX, absent) || slices.ContainsFunc(l.TCB.TDX, absent) {
			return fault.New(role+"_malformed", "level %d of TCB info lacks component SVNs", i)
		}
		if err := checkLevel(l.Status, l.Date, platformStatuses); err != nil {
			return fmt.Errorf("level %d of TCB info: %w", i, err)
		}
	}
	if t.ID == idSGX {
		return nil
	}
	for _, m := range append([]module{t.Module}, t.Identities...) {
		if _, err := m.parse(); err != nil {
			return err
		}
	}
	for _, m := range t.Identities {
		if err := checkLevels("TDX module "+m.ID, m.Levels); err != nil {
			return err
		}
	}
	return nil
}

func checkLevels(what string, levels []enclaveLevel) error {
	if n := len(levels); n == 0 || n > maxLevels {
		return fault.New("tcb_info_malformed", "%s has %d levels", what, n)
	}
	for i, l := range levels {
		if l.TCB.ISVSVN == nil {
			return fault.New("tcb_info_malformed", "level %d of %s lacks isvsvn", i, what)
		}
		if err := checkLevel(l.Status, l.Date, enclaveStatuses); err != nil {
			return fmt.Errorf("level %d of %s: %w", i, what, err)
		}
	}
	return nil
}

func checkLevel(status, date string, statuses []string) error {
	if !slices.Contains(statuses, status) {
		return fault.New("tcb_status_unknown", "unknown TCB status %q", status)
	}
	if _, err := time.Parse(time.RFC3339, date); err != nil {
		return fault.Wrap(err, "tcb_info_malformed", "tcbDate")
	}
	return nil
}

// identity is a verified QE identity.
type identity struct {
	qeDoc
	miscSelect, miscSelectMask [4]byte // little-endian in the report, big-endian text
	attributes, attributesMask [16]byte
	mrSigner                   [32]byte
}

// qeIdentity reads the identity of the quoting enclave that id names.
func (v *verification) qeIdentity(col collateral.TDX, id string) (*identity, error) {
	q, err := signed(v, "qe_identity", col.QEIdentity, col.QEIdentitySignature, col.QEIdentityIssuerChain, (*identity).check)
	if err != nil {
		return nil, err
	}
	if q.ID != id {
		return nil, fault.New("qe_identity_id", "QE identity is of %q, want %s", q.ID, id)
	}
	return q, v.inTime("qe_identity", q.IssueDate, q.NextUpdate)
}

// check demands everything of a QE identity that appraise relies on.
func (q *identity) check() error {
	const role = "qe_identity"
	if q.ID != idTDQE && q.ID != idQE {
		return fault.New("qe_identity_id", "QE identity is of %q, want %s or %s", q.ID, idTDQE, idQE)
	}
	if q.Version != 2 && q.Version != 3 {
		return fault.New("qe_identity_version", "QE identity has version %d, want 2 or 3", q.Version)
	}
	for _, f := range []struct {
		name, text string
		dst        []byte
	}{
		{"miscselect", q.MiscSelect, q.miscSelect[:]}, {"miscselectMask", q.MiscSelectMask, q.miscSelectMask[:]},
		{"attributes", q.Attributes, q.attributes[:]}, {"attributesMask", q.AttributesMask, q.attributesMask[:]},
		{"mrsigner", q.MRSigner, q.mrSigner[:]},
	} {
		if err := hexInto(f.dst, f.text); err != nil {
			return fault.Wrap(err, role+"_malformed", "%s of QE identity", f.name)
		}
	}
	if q.ISVProdID == nil {
		return fault.New(role+"_malformed", "QE identity lacks isvprodid")
	}
	if err := checkLevels("QE identity", q.Levels); err != nil {
		return err
	}
	return nil
}

// appraise compares a QE report, whose signature is verified, with the identity
// and returns the level it reaches.
func (q *identity) appraise(report []byte) (enclaveLevel, error) {
	none := enclaveLevel{}
	if got := report[QEOffMRSigner : QEOffMRSigner+32]; !bytes.Equal(got, q.mrSigner[:]) {
		return none, fault.New("qe_mrsigner", "the quoting enclave is signed by %x, want %x", got, q.mrSigner)
	}
	if got := binary.LittleEndian.Uint16(report[QEOffISVProdID:]); got != *q.ISVProdID {
		return none, fault.New("qe_isvprodid", "the quoting enclave has product id %d, want %d", got, *q.ISVProdID)
	}
	// The report holds MISCSELECT little-endian, the identity as a number.
	misc := binary.BigEndian.AppendUint32(nil, binary.LittleEndian.Uint32(report[QEOffMiscSelect:]))
	if !masked(misc, q.miscSelectMask[:], q.miscSelect[:]) {
		return none, fault.New("qe_miscselect", "the quoting enclave has MISCSELECT %x, want %x under mask %x", misc, q.miscSelect, q.miscSelectMask)
	}
	attr := report[QEOffAttributes : QEOffAttributes+16]
	if attr[0]&2 != 0 {
		return none, fault.New("qe_debug", "the quoting enclave runs in debug mode")
	}
	if !masked(attr, q.attributesMask[:], q.attributes[:]) {
		return none, fault.New("qe_attributes", "the quoting enclave has attributes %x, want %x under mask %x", attr, q.attributes, q.attributesMask)
	}
	svn := binary.LittleEndian.Uint16(report[QEOffISVSVN:])
	level, ok := reached(q.Levels, svn)
	if !ok {
		return none, fault.New("qe_tcb_unsupported", "the quoting enclave has ISVSVN %d, below every published level", svn)
	}
	if level.Status == Revoked {
		return none, fault.New("tcb_revoked", "the quoting enclave's level ISVSVN %d is revoked", *level.TCB.ISVSVN)
	}
	return level, nil
}

// reached returns the first level that svn reaches; lists go from new to old.
func reached(levels []enclaveLevel, svn uint16) (enclaveLevel, bool) {
	for _, l := range levels {
		if svn >= *l.TCB.ISVSVN {
			return l, true
		}
	}
	return enclaveLevel{}, false
}

// grade is the outcome of a TCB appraisal.
type grade struct {
	status, platform, module string
	advisories               []string
	date                     time.Time
}

// appraise grades a platform as Intel's current quote verification library does
// (attestation.md, Field notes): platform level, TDX module, quoting enclave,
// and for TDX 1.5 whether the module was updated since the TD was launched.
func (t *info) appraise(b ReportBody, ext PCKExtension, qe enclaveLevel) (*grade, error) {
	g := &grade{}
	add := func(date string, advisories []string) {
		d, _ := time.Parse(time.RFC3339, date) // checked when the document was read
		if g.date.IsZero() || d.Before(g.date) {
			g.date = d
		}
		g.advisories = append(g.advisories, advisories...)
	}

	// The module's identity: mrsigner and attributes come from the identity of
	// its version, or from the document's own for version 0.
	expected, svn, version := t.Module, b.TEETCBSVN[0], b.TEETCBSVN[1]
	if version > 0 {
		m, ok := t.moduleIdentity(version)
		if !ok {
			return nil, fault.New("module_unknown", "TCB info has no identity of TDX module version %d", version)
		}
		expected = m
	}
	if err := expected.check(b); err != nil {
		return nil, err
	}

	// Platform level. The first level that the SGX part alone reaches matters
	// only for the relaunch rule.
	sgx, tdx := -1, -1
	for i, l := range t.Levels {
		if !reaches(ext.Components[:], l.TCB.SGX) || ext.PCESVN < *l.TCB.PCESVN {
			continue
		}
		if sgx < 0 {
			sgx = i
		}
		// Components 0 and 1 are the module's, which has levels of its own from
		// version 1 on.
		skip := 0
		if version > 0 {
			skip = 2
		}
		if reaches(b.TEETCBSVN[skip:], l.TCB.TDX[skip:]) {
			tdx = i
			break
		}
	}
	if tdx < 0 {
		return nil, fault.New("tcb_unsupported", "the platform (CPUSVN components %v, PCESVN %d, TEE_TCB_SVN %x) is below every published TCB level", ext.Components, ext.PCESVN, b.TEETCBSVN)
	}
	g.platform = t.Levels[tdx].Status
	add(t.Levels[tdx].Date, t.Levels[tdx].Advisories)
	if g.platform == Revoked || t.Levels[sgx].Status == Revoked {
		return nil, fault.New("tcb_revoked", "the platform's TCB level is revoked")
	}

	g.status = g.platform
	if version > 0 {
		level, ok := reached(expected.Levels, uint16(svn))
		if !ok {
			return nil, fault.New("module_tcb_unsupported", "TDX module %s has ISVSVN %d, below every published level", expected.ID, svn)
		}
		if level.Status == Revoked {
			return nil, fault.New("tcb_revoked", "level ISVSVN %d of TDX module %s is revoked", *level.TCB.ISVSVN, expected.ID)
		}
		g.module = level.Status
		g.status = converge(g.status, level.Status)
		add(level.Date, level.Advisories)
	}
	if b.V15 && qe.Status != OutOfDate {
		s, err := t.relaunch(b.TEETCBSVN2, t.Levels[sgx].Status, g)
		if err != nil {
			return nil, err
		}
		g.status = s
	}
	g.status = converge(g.status, qe.Status)
	add(qe.Date, qe.Advisories)
	slices.Sort(g.advisories)
	g.advisories = slices.Compact(g.advisories)
	return g, nil
}

// converge lowers a status by that of a module or quoting enclave.
func converge(status, other string) string {
	if other != OutOfDate {
		return status
	}
	switch status {
	case UpToDate, SWHardeningNeeded:
		return OutOfDate
	case ConfigurationNeeded, ConfigurationAndSWHardeningNeeded:
		return OutOfDateConfigurationNeeded
	}
	return status
}

// relaunch tells a TD that was launched under an old module, since updated, from
// one whose platform is old: only launching it again helps it.
func (t *info) relaunch(svn2 [16]byte, sgxStatus string, g *grade) (string, error) {
	outOfDate := g.status == OutOfDate || g.status == OutOfDateConfigurationNeeded
	if !outOfDate || g.module != OutOfDate || sgxStatus == OutOfDate || sgxStatus == OutOfDateConfigurationNeeded {
		return g.status, nil
	}
	newest := t.Levels[0].TCB.TDX
	current := svn2[0] >= *newest[0].SVN
	if version := svn2[1]; version > 0 {
		m, ok := t.moduleIdentity(version)
		if !ok {
			return "", fault.New("module_unknown", "TCB info has no identity of the present TDX module version %d", version)
		}
		current = uint16(svn2[0]) >= *m.Levels[0].TCB.ISVSVN
	}
	if !current || svn2[2] < *newest[2].SVN {
		return g.status, nil
	}
	configuration := []string{ConfigurationNeeded, ConfigurationAndSWHardeningNeeded, OutOfDateConfigurationNeeded}
	if slices.Contains(configuration, sgxStatus) || slices.Contains(configuration, g.status) {
		return TDRelaunchAdvisedConfigurationNeeded, nil
	}
	return TDRelaunchAdvised, nil
}

func (t *info) moduleIdentity(version byte) (module, bool) {
	id := fmt.Sprintf("TDX_%02X", version)
	for _, m := range t.Identities {
		if strings.ToUpper(m.ID) == id {
			return m, true
		}
	}
	return module{}, false
}

// moduleValues are what identifies a module.
type moduleValues struct {
	signer     [48]byte
	attr, mask [8]byte
}

func (m module) parse() (v moduleValues, err error) {
	if hexInto(v.signer[:], m.MRSigner) != nil || hexInto(v.attr[:], m.Attributes) != nil || hexInto(v.mask[:], m.AttributesMask) != nil {
		return v, fault.New("tcb_info_malformed", "identity %q of the TDX module lacks mrsigner, attributes or mask", m.ID)
	}
	return v, nil
}

// check compares the module that ran the TD with its published identity.
func (m module) check(b ReportBody) error {
	v, err := m.parse()
	if err != nil {
		return err
	}
	if b.MRSignerSEAM != v.signer {
		return fault.New("module_mrsigner", "the TDX module is signed by %s, want %x", b.MRSignerSEAM, v.signer)
	}
	// Beyond the mask no attribute may be set at all.
	if !masked(b.SEAMAttributes[:], v.mask[:], v.attr[:]) || b.SEAMAttributes != v.attr {
		return fault.New("module_attributes", "the TDX module has attributes %x, want %x under mask %x", b.SEAMAttributes, v.attr, v.mask)
	}
	return nil
}

// reaches reports whether every SVN is at least the level's.
func reaches(have []byte, want []component) bool {
	for i, c := range want {
		if have[i] < *c.SVN {
			return false
		}
	}
	return true
}

func masked(value, mask, want []byte) bool {
	for i := range value {
		if value[i]&mask[i] != want[i] {
			return false
		}
	}
	return true
}

func hexInto(dst []byte, text string) error {
	b, err := hex.DecodeString(text)
	if err != nil {
		return err
	}
	if len(b) != len(dst) {
		return fmt.Errorf("%d bytes, want %d", len(b), len(dst))
	}
	copy(dst, b)
	return nil
}
