// SPDX-License-Identifier: Apache-2.0

package tpm_test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tpm"
	"github.com/dstack-go/dstack/attest/tpm/tpmtest"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

// sameAttest compares our reading of a message with that of google/go-tpm.
func sameAttest(t *testing.T, message []byte) {
	t.Helper()
	ours, err := tpm.ParseAttest(message)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := tpm2.Unmarshal[tpm2.TPMSAttest](message)
	if err != nil {
		t.Fatalf("the witness does not read the message: %v", err)
	}
	quote, err := theirs.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	clock := theirs.ClockInfo
	if !bytes.Equal(ours.QualifiedSigner, theirs.QualifiedSigner.Buffer) || !bytes.Equal(ours.ExtraData, theirs.ExtraData.Buffer) ||
		ours.Clock != clock.Clock || ours.ResetCount != clock.ResetCount || ours.RestartCount != clock.RestartCount || ours.Safe != bool(clock.Safe) ||
		ours.FirmwareVersion != theirs.FirmwareVersion || !bytes.Equal(ours.PCRDigest, quote.PCRDigest.Buffer) {
		t.Errorf("we read %+v, the witness %+v", ours, theirs)
	}
	if len(ours.Banks) != len(quote.PCRSelect.PCRSelections) {
		t.Fatalf("we read %d banks, the witness %d", len(ours.Banks), len(quote.PCRSelect.PCRSelections))
	}
	for i, s := range quote.PCRSelect.PCRSelections {
		if ours.Banks[i].Hash != uint16(s.Hash) {
			t.Errorf("bank %d: we read %#x, the witness %#x", i, ours.Banks[i].Hash, s.Hash)
		}
		for pcr := range uint32(8 * len(s.PCRSelect)) {
			if selected := s.PCRSelect[pcr/8]>>(pcr%8)&1 == 1; selected != slices.Contains(ours.Banks[i].PCRs, pcr) {
				t.Errorf("PCR %d of bank %d: the witness says %v", pcr, i, selected)
			}
		}
	}
	// What the maker writes is what the witness would.
	if got := tpmtest.MarshalAttest(*ours); !bytes.Equal(got, message) || !bytes.Equal(tpm2.Marshal(theirs), message) {
		t.Errorf("the message is written back differently")
	}
}

func TestTheWitnessReadsTheSameMessages(t *testing.T) {
	sameAttest(t, testkit.Vectors(t, "attestation/tpm/tpm_quote_sample.bin"))
	m := booted(t)
	sameAttest(t, m.Quote(challenge, 0, 2, 7, 14).Message)
	sameAttest(t, m.Quote(nil, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23).Message)
	m.Bank = eventlog.BankSHA384
	boot(m)
	sameAttest(t, m.Quote(bytes.Repeat([]byte{1}, 66), 23).Message)
}

func TestTheWitnessReadsTheSameSignatures(t *testing.T) {
	for scheme, name := range map[uint16]string{tpm.AlgECDSA: "ECDSA", tpm.AlgRSASSA: "RSASSA", tpm.AlgRSAPSS: "RSAPSS"} {
		t.Run(name, func(t *testing.T) {
			m := tpmtest.New(t)
			if scheme != tpm.AlgECDSA {
				m.UseRSA(scheme)
			}
			raw := m.Sign([]byte("message"))
			ours, err := tpm.ParseSignature(raw)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := tpm2.Unmarshal[tpm2.TPMTSignature](raw)
			if err != nil || uint16(theirs.SigAlg) != ours.Scheme {
				t.Fatalf("scheme %#x, %v", theirs.SigAlg, err)
			}
			switch scheme {
			case tpm.AlgECDSA:
				s, err := theirs.Signature.ECDSA()
				if err != nil || !bytes.Equal(s.SignatureR.Buffer, ours.R) || !bytes.Equal(s.SignatureS.Buffer, ours.S) {
					t.Errorf("%v", err)
				}
			case tpm.AlgRSASSA:
				s, err := theirs.Signature.RSASSA()
				if err != nil || !bytes.Equal(s.Sig.Buffer, ours.RSA) {
					t.Errorf("%v", err)
				}
			case tpm.AlgRSAPSS:
				s, err := theirs.Signature.RSAPSS()
				if err != nil || !bytes.Equal(s.Sig.Buffer, ours.RSA) {
					t.Errorf("%v", err)
				}
			}
		})
	}
}

// TestX509AgreesAboutChains compares our search for a chain with crypto/x509's. It
// knows nothing of revocation, of the purpose of TPM keys and of a limit of eight,
// so those mutations are left out; so is what is no matter of the chain. It
// evaluates constraints on names, which we refuse to understand.
func TestX509AgreesAboutChains(t *testing.T) {
	chainCodes := []string{"unknown_root", "chain_extension", "chain_path_length", "ak_cert_expired", "ak_issuer_expired", "root_expired"}
	n := 0
	for _, c := range append(mutations(), mutation{name: "no mutation"}) {
		if c.code != "" && !slices.Contains(chainCodes, c.code) || c.name == "an authority that constrains names" {
			continue
		}
		n++
		t.Run(c.name, func(t *testing.T) {
			m := booted(t)
			if c.machine != nil {
				c.machine(m)
			}
			in := m.Input(m.Quote(challenge, 0))
			if c.input != nil {
				c.input(m, &in)
			}
			leaf, err := x509.ParseCertificate(in.Evidence.TPMQuote.AKCert)
			if err != nil {
				t.Fatal(err)
			}
			opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: in.At, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
			for _, ca := range in.Roots[0].CA {
				opts.Roots.AddCert(ca)
			}
			if in.Collateral != nil {
				for _, der := range in.Collateral.Certificates {
					if cert, err := x509.ParseCertificate(der); err == nil {
						opts.Intermediates.AddCert(cert)
					}
				}
			}
			_, theirs := leaf.Verify(opts)
			_, ours := tpm.Verify(in)
			if fault.Code(ours) != c.code {
				t.Fatalf("ours: %v", ours)
			}
			switch c.name {
			case "a self-signed root for the attestation key's certificate", "an intermediate with a key of 1024 bits":
				// A root is a chain of one to x509, and it has no limit on keys.
				if theirs != nil {
					t.Errorf("x509 refuses too: %v", theirs)
				}
			default:
				if (ours == nil) != (theirs == nil) {
					t.Errorf("ours: %v; x509: %v", ours, theirs)
				}
			}
		})
	}
	if n < 12 {
		t.Errorf("only %d mutations were compared", n)
	}
}

// swtpm starts a software TPM, or skips the test loudly.
func swtpm(t *testing.T) transport.TPM {
	path, err := exec.LookPath("swtpm")
	if err != nil {
		t.Skip("SKIP: swtpm is not installed (scripts/host-packages.sh installs it): no quote of a real TPM implementation was verified")
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "tpm.sock")
	var log bytes.Buffer
	cmd := exec.Command(path, "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+filepath.Join(dir, "ctrl.sock"), "--flags", "not-need-init,startup-clear")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			t.Cleanup(func() { conn.Close() })
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			return transport.FromReadWriter(conn.(io.ReadWriter))
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm does not listen: %v\n%s", err, log.String())
		}
	}
}

// signer is the template of a restricted signing key.
func signer(kind tpm2.TPMAlgID, parms tpm2.TPMUPublicParms) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: kind, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true},
		Parameters:       parms,
	}
}

func rsaParms(scheme tpm2.TPMAlgID) tpm2.TPMUPublicParms {
	contents := tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})
	if scheme == tpm2.TPMAlgRSAPSS {
		contents = tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: tpm2.TPMAlgSHA256})
	}
	return tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048, Scheme: tpm2.TPMTRSAScheme{Scheme: scheme, Details: contents}})
}

func eccParms(curve tpm2.TPMECCCurve, hash tpm2.TPMAlgID) tpm2.TPMUPublicParms {
	return tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: curve, Scheme: tpm2.TPMTECCScheme{
		Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: hash}),
	}})
}

// TestQuotesOfASoftwareTPMVerify lets swtpm, which is no code of ours, make keys,
// extend registers and sign quotes; only its certificate is the test's.
func TestQuotesOfASoftwareTPMVerify(t *testing.T) {
	device := swtpm(t)
	m := tpmtest.New(t)

	// dstack's runtime events go to PCR 14 of the SHA-256 bank, and their replay must
	// come to what the TPM has.
	var runtime []eventlog.Event
	var logged []attest.PCREvent
	for _, name := range []string{"system-preparing", "compose-hash", "system-ready"} {
		e, err := eventlog.RuntimeV2(name, []byte(name+" payload"))
		if err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256(eventlog.PreimageOf(e))
		runtime = append(runtime, e)
		logged = append(logged, attest.PCREvent{Index: 14, Digest: digest[:]})
		_, err = tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(14), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest[:]}, {HashAlg: tpm2.TPMAlgSHA384, Digest: eventlog.BankSHA384.Sum(eventlog.PreimageOf(e))}}},
		}.Execute(device)
		if err != nil {
			t.Fatalf("extend: %v", err)
		}
	}

	for _, c := range []struct {
		name     string
		template tpm2.TPMTPublic
		bank     eventlog.Bank
	}{
		{"RSASSA", signer(tpm2.TPMAlgRSA, rsaParms(tpm2.TPMAlgRSASSA)), eventlog.BankSHA256},
		{"RSAPSS", signer(tpm2.TPMAlgRSA, rsaParms(tpm2.TPMAlgRSAPSS)), eventlog.BankSHA256},
		{"ECDSA P-256", signer(tpm2.TPMAlgECC, eccParms(tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256)), eventlog.BankSHA256},
		{"ECDSA P-384 with SHA-384", signer(tpm2.TPMAlgECC, eccParms(tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384)), eventlog.BankSHA256},
		{"ECDSA P-256 over the SHA-384 bank", signer(tpm2.TPMAlgECC, eccParms(tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256)), eventlog.BankSHA384},
	} {
		t.Run(c.name, func(t *testing.T) {
			created, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(c.template)}.Execute(device)
			if err != nil {
				t.Fatalf("create the attestation key: %v", err)
			}
			defer tpm2.FlushContext{FlushHandle: created.ObjectHandle}.Execute(device)
			public, err := created.OutPublic.Contents()
			if err != nil {
				t.Fatal(err)
			}
			key, err := tpm2.Pub(*public)
			if err != nil {
				t.Fatal(err)
			}
			bank := map[eventlog.Bank]tpm2.TPMAlgID{eventlog.BankSHA256: tpm2.TPMAlgSHA256, eventlog.BankSHA384: tpm2.TPMAlgSHA384}[c.bank]
			selection := tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: bank, PCRSelect: tpm2.PCClientCompatible.PCRs(0, 2, 14)}}}
			quoted, err := tpm2.Quote{
				SignHandle:     tpm2.AuthHandle{Handle: created.ObjectHandle, Name: created.Name, Auth: tpm2.PasswordAuth(nil)},
				QualifyingData: tpm2.TPM2BData{Buffer: challenge}, PCRSelect: selection, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			}.Execute(device)
			if err != nil {
				t.Fatalf("quote: %v", err)
			}
			read, err := tpm2.PCRRead{PCRSelectionIn: selection}.Execute(device)
			if err != nil {
				t.Fatalf("read the registers: %v", err)
			}
			q := &attest.TPMQuote{
				Message:   quoted.Quoted.Bytes(),
				Signature: tpm2.Marshal(quoted.Signature),
				AKCert:    m.Certify(m.Intermediate, key, "key of a software TPM", nil).Raw,
			}
			for i, index := range []uint32{0, 2, 14} {
				q.PCRs = append(q.PCRs, attest.PCR{Index: index, Algorithm: string(c.bank), Value: read.PCRValues.Digests[i].Buffer})
			}
			if c.bank == eventlog.BankSHA256 {
				q.EventLog = logged
				want, err := eventlog.ReplayRuntime(runtime, "sha-256")
				if err != nil || !bytes.Equal(q.PCRs[2].Value, want) {
					t.Errorf("PCR 14 is %x, the runtime events lead to %x, %v", q.PCRs[2].Value, want, err)
				}
			}
			sameAttest(t, q.Message)
			claims, err := tpm.Verify(m.Input(q))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(claims.ReportData, challenge) || claims.TPM.FirmwareVersion == 0 {
				t.Errorf("claims = %+v", claims)
			}
			// Negative twins: another value, another nonce.
			q.PCRs[0].Value = bytes.Repeat([]byte{7}, c.bank.Size())
			if _, err := tpm.Verify(m.Input(q)); fault.Code(err) != "tpm_pcr_digest" {
				t.Errorf("a changed register: %v", err)
			}
			q.Message = bytes.Replace(q.Message, challenge, []byte("QUALIFYING DATA"), 1)
			if _, err := tpm.Verify(m.Input(q)); fault.Code(err) != "tpm_signature" {
				t.Errorf("a changed nonce: %v", err)
			}
		})
	}

	// A restricted key refuses to sign what looks like a quote: the reason why a
	// certified key is enough to believe its messages.
	created, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(signer(tpm2.TPMAlgRSA, rsaParms(tpm2.TPMAlgRSASSA)))}.Execute(device)
	if err != nil {
		t.Fatal(err)
	}
	forged := sha256.Sum256(m.Quote(challenge, 0).Message)
	_, err = tpm2.Sign{
		KeyHandle: tpm2.AuthHandle{Handle: created.ObjectHandle, Name: created.Name, Auth: tpm2.PasswordAuth(nil)},
		Digest:    tpm2.TPM2BDigest{Buffer: forged[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
	}.Execute(device)
	if err == nil {
		t.Error("a restricted key signed a forged message")
	}
}

func FuzzParseAttest(f *testing.F) {
	f.Add(testkit.Vectors(f, "attestation/tpm/tpm_quote_sample.bin"))
	m := booted(f)
	f.Add(m.Quote(challenge, 0, 2, 7, 14).Message)
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := tpm.ParseAttest(data)
		if err != nil {
			if fault.Code(err) == "" || a != nil {
				t.Fatalf("attest %v, an error without a code: %v", a, err)
			}
			return
		}
		// Our maker always writes bitmaps of three bytes.
		for _, s := range a.Banks {
			if slices.ContainsFunc(s.PCRs, func(i uint32) bool { return i > 23 }) {
				return
			}
		}
		again, err := tpm.ParseAttest(tpmtest.MarshalAttest(*a))
		if err != nil || !bytes.Equal(again.PCRDigest, a.PCRDigest) || len(again.Banks) != len(a.Banks) {
			t.Fatalf("written and read again differs: %v", err)
		}
	})
}

func FuzzParseSignature(f *testing.F) {
	m := tpmtest.New(f)
	f.Add(m.Sign([]byte("message")))
	m.UseRSA(tpm.AlgRSASSA)
	f.Add(m.Sign([]byte("message")))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := tpm.ParseSignature(data)
		if err != nil && (fault.Code(err) == "" || s != nil) {
			t.Fatalf("signature %v, an error without a code: %v", s, err)
		}
		if err == nil && len(s.R)+len(s.S)+len(s.RSA) > len(data) {
			t.Fatal("fields are not of the signature")
		}
	})
}

// FuzzVerify feeds hostile parts to all of verification.
func FuzzVerify(f *testing.F) {
	m := booted(f)
	good := m.Quote(challenge, 0, 2)
	col := m.Collateral()
	roots := []attest.Roots{m.Roots()}
	f.Add(good.Message, good.Signature, good.AKCert, []byte(col.Certificates[0]), []byte(col.CRLs[0]), []byte(col.CRLs[1]), good.PCRs[0].Value)
	f.Fuzz(func(t *testing.T, message, signature, ak, ca, crl0, crl1, value []byte) {
		q := *good
		q.Message, q.Signature, q.AKCert = message, signature, ak
		q.PCRs = slices.Clone(good.PCRs)
		q.PCRs[0].Value = value
		claims, err := tpm.Verify(attest.Input{
			Evidence:   &attest.Evidence{TEE: "tpm", TPMQuote: &q},
			Collateral: &collateral.Bundle{Certificates: []collateral.Hex{ca}, CRLs: []collateral.Hex{crl0, crl1}},
			Roots:      roots, At: tpmtest.At,
		})
		if err != nil && fault.Code(err) == "" {
			t.Fatalf("an error without a code: %v", err)
		}
		if (err == nil) != (claims != nil) {
			t.Fatal("claims and error disagree")
		}
		if claims != nil && !bytes.Equal(message, good.Message) {
			t.Fatal("a message that the TPM did not sign is accepted")
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	for _, c := range []struct {
		name string
		set  func(*machine)
	}{
		{"ECDSA-P256", func(*machine) {}},
		{"RSA-2048", func(m *machine) { m.UseRSA(tpm.AlgRSASSA) }},
	} {
		b.Run(c.name, func(b *testing.B) {
			m := tpmtest.New(b)
			c.set(m)
			boot(m)
			in := m.Input(m.Quote(challenge, 0, 2, 14))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := tpm.Verify(in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkParseAttest has google/go-tpm beside it.
func BenchmarkParseAttest(b *testing.B) {
	message := booted(b).Quote(challenge, 0, 2, 14).Message
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := tpm.ParseAttest(message); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-tpm", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := tpm2.Unmarshal[tpm2.TPMSAttest](message); err != nil {
				b.Fatal(err)
			}
		}
	})
}
