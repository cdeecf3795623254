// SPDX-License-Identifier: Apache-2.0

package eventlog

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"slices"
	"testing"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/internal/testkit"
)

const gcpLog = "attestation/gcp/tpm_eventlog.bin"

// gcpPCR2 are the digests of measurement.md §8, computed independently.
var gcpPCR2 = []string{
	"df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119",
	"00b8a357e652623798d1bbd16c375ec90fbed802b4269affa3e78e6eb19386cf",
	"9ab14a46f858662a89adc102d2a57a13f52f75c1769d65a4c34edbbfc8855f0f",
	"ade943a0a7a3189a3201ba17d7df778eb380cbd33ce5e361176e974ccf7cdedb",
}

func TestTheLogOfAGoogleCloudVMHasItsKnownEvents(t *testing.T) {
	log, err := ParseTPMLog(testkit.Vectors(t, gcpLog))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range log.Events {
		if e.PCR == 2 {
			got = append(got, hex.EncodeToString(e.Digest(BankSHA256)))
		}
	}
	if !slices.Equal(got, gcpPCR2) || log.PlatformClass != 0 || log.StartupLocality != 0 {
		t.Errorf("class %d, locality %d, PCR 2: %q", log.PlatformClass, log.StartupLocality, got)
	}
	// Upstream's constant for the one firmware it knows (attestation.md §8.2).
	pcr0, err := log.Replay(BankSHA256, 0)
	if err != nil || hex.EncodeToString(pcr0) != "0cca9ec161b09288802e5a112255d21340ed5b797f5fe29cecccfd8f67b9f802" {
		t.Errorf("PCR 0 = %x, %v", pcr0, err)
	}
}

// TestTheWitnessReadsTheSameEvents compares every event with google/go-eventlog,
// and lets it judge the values that we replay. It keeps the events of type
// EV_NO_ACTION, which we leave out.
func TestTheWitnessReadsTheSameEvents(t *testing.T) {
	raw := testkit.Vectors(t, gcpLog)
	ours, err := ParseTPMLog(raw)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := tcg.ParseEventLog(raw, tcg.ParseOpts{})
	if err != nil {
		t.Fatal(err)
	}
	for bank, alg := range map[Bank]struct {
		id   register.HashAlg
		hash crypto.Hash
	}{BankSHA256: {register.HashSHA256, crypto.SHA256}, BankSHA384: {register.HashSHA384, crypto.SHA384}} {
		events := slices.DeleteFunc(theirs.Events(alg.id), func(e tcg.Event) bool { return e.Type == evNoAction })
		if len(events) != len(ours.Events) || len(events) == 0 {
			t.Fatalf("%s: we read %d events, the witness %d", bank, len(ours.Events), len(events))
		}
		seen := map[uint32]bool{}
		for i, e := range events {
			o := ours.Events[i]
			if uint32(e.Index) != o.PCR || uint32(e.Type) != o.Type || !bytes.Equal(e.Digest, o.Digest(bank)) || !bytes.Equal(e.Data, o.Data) {
				t.Errorf("%s: event %d differs: ours PCR %d type %#x %x", bank, i, o.PCR, o.Type, o.Digest(bank))
			}
			seen[o.PCR] = true
		}
		var mrs []register.MR
		for pcr := range seen {
			value, err := ours.Replay(bank, pcr)
			if err != nil {
				t.Fatal(err)
			}
			mrs = append(mrs, register.PCR{Index: int(pcr), Digest: value, DigestAlg: alg.hash})
		}
		if _, err := theirs.Verify(mrs); err != nil {
			t.Errorf("%s: the witness replays to other values: %v", bank, err)
		}
	}
}

// tpmLog writes a log whose head declares the algorithms, in their sizes.
func tpmLog(sizes map[uint16]int, algorithms []uint16, records ...[]byte) []byte {
	head := append([]byte(specIDHeader), 0, 0, 0, 0, 0, 2, 0, 2)
	head = binary.LittleEndian.AppendUint32(head, uint32(len(algorithms)))
	for _, a := range algorithms {
		head = binary.LittleEndian.AppendUint16(head, a)
		head = binary.LittleEndian.AppendUint16(head, uint16(sizes[a]))
	}
	return slices.Concat(tpmHead(append(head, 0)), slices.Concat(records...))
}

func tpmHead(specID []byte) []byte {
	b := binary.LittleEndian.AppendUint32(make([]byte, 4), evNoAction)
	b = binary.LittleEndian.AppendUint32(append(b, make([]byte, 20)...), uint32(len(specID)))
	return append(b, specID...)
}

// tpmRecord writes one record with digests of the algorithms, all of one byte.
func tpmRecord(pcr, typ uint32, fill byte, data []byte, algorithms ...uint16) []byte {
	b := binary.LittleEndian.AppendUint32(nil, pcr)
	b = binary.LittleEndian.AppendUint32(b, typ)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(algorithms)))
	for _, a := range algorithms {
		b = binary.LittleEndian.AppendUint16(b, a)
		b = append(b, bytes.Repeat([]byte{fill}, tcgDigestSize[a])...)
	}
	return append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
}

func TestStartupLocalityIsWherePCR0Begins(t *testing.T) {
	locality := append([]byte(localityHeader), 3)
	event := tpmRecord(0, 8, 7, nil, 0xB)
	log, err := ParseTPMLog(tpmLog(tcgDigestSize, []uint16{0xB}, tpmRecord(0, evNoAction, 0, locality, 0xB), event))
	if err != nil || log.StartupLocality != 3 || len(log.Events) != 1 {
		t.Fatalf("log = %+v, %v", log, err)
	}
	start := append(make([]byte, 31), 3)
	want := BankSHA256.Sum(append(start, bytes.Repeat([]byte{7}, 32)...))
	if got, err := log.Replay(BankSHA256, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("PCR 0 = %x, %v, want %x", got, err, want)
	}
	if got, err := log.Replay(BankSHA256, 1); err != nil || !bytes.Equal(got, make([]byte, 32)) {
		t.Errorf("an untouched PCR = %x, %v", got, err)
	}
	for name, records := range map[string][]byte{
		"a locality that comes late":    slices.Concat(event, tpmRecord(0, evNoAction, 0, locality, 0xB)),
		"a locality of another PCR":     slices.Concat(tpmRecord(1, evNoAction, 0, locality, 0xB), event),
		"a locality of no length":       slices.Concat(tpmRecord(0, evNoAction, 0, locality[:16], 0xB), event),
		"something that is no locality": slices.Concat(tpmRecord(0, evNoAction, 0, make([]byte, 17), 0xB), event),
	} {
		log, err = ParseTPMLog(tpmLog(tcgDigestSize, []uint16{0xB}, records))
		if err != nil || log.StartupLocality != 0 || len(log.Events) != 1 {
			t.Errorf("%s: log = %+v, %v", name, log, err)
		}
	}
}

func TestABankWithoutDigestsCannotBeReplayed(t *testing.T) {
	log, err := ParseTPMLog(tpmLog(tcgDigestSize, []uint16{0x4, 0xB}, tpmRecord(2, 8, 7, nil, 0x4, 0xB)))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range []Bank{BankSHA384, "sha1", ""} {
		if v, err := log.Replay(b, 2); fault.Code(err) != "log_bank" {
			t.Errorf("bank %q: %x, %v", b, v, err)
		}
	}
	if v, err := log.Replay("sha1", 9); fault.Code(err) != "log_bank" {
		t.Errorf("an untouched PCR of an unknown bank: %x, %v", v, err)
	}
}

func TestATPMLogIsRefusedForItsOwnReason(t *testing.T) {
	good := testkit.Vectors(t, gcpLog)
	one := func(records ...[]byte) []byte { return tpmLog(tcgDigestSize, []uint16{0xB}, records...) }
	record := tpmRecord(2, 8, 7, []byte("data"), 0xB)
	for _, c := range []struct {
		name string
		in   []byte
		code string
	}{
		{"empty", nil, "log_malformed"},
		{"larger than the limit", make([]byte, MaxCCEL+1), "log_too_large"},
		{"cut in the last event", good[:len(good)-1], "log_malformed"},
		{"cut after a register", append(bytes.Clone(good), 0, 0, 0, 0), "log_malformed"},
		{"with padding", append(bytes.Clone(good), make([]byte, 64)...), "log_malformed"},
		{"with filler", append(bytes.Clone(good), bytes.Repeat([]byte{0xff}, 64)...), "log_malformed"},
		{"that begins with another PCR", append([]byte{1}, good[1:]...), "log_malformed"},
		{"that begins with another type", slices.Concat(good[:4], []byte{4}, good[5:]), "log_malformed"},
		{"of the SHA-1 form", tpmHead([]byte("no specification")), "log_malformed"},
		{"of another version of the form", bytes.Replace(one(record), []byte("Event03"), []byte("Event02"), 1), "log_malformed"},
		{"whose specification is cut", tpmHead([]byte(specIDHeader)), "log_malformed"},
		{"whose vendor data are cut", tpmHead(append(one()[32:len(one())-1], 1)), "log_malformed"},
		{"without algorithms", tpmLog(tcgDigestSize, nil), "log_malformed"},
		{"of 17 algorithms", tpmLog(tcgDigestSize, slices.Repeat([]uint16{0xB}, 17)), "log_malformed"},
		{"of an unknown algorithm", tpmLog(map[uint16]int{0x99: 32}, []uint16{0x99}), "log_malformed"},
		{"of SHA-256 with 20 bytes", tpmLog(map[uint16]int{0xB: 20}, []uint16{0xB}), "log_malformed"},
		{"with a PCR that no TPM has", one(tpmRecord(24, 8, 7, nil, 0xB)), "log_malformed"},
		{"with an event that lacks a declared digest", tpmLog(tcgDigestSize, []uint16{0x4, 0xB}, record), "log_malformed"},
		{"with an event of another digest", one(tpmRecord(2, 8, 7, nil, 0xC)), "log_malformed"},
		{"with a repeated digest", one(tpmRecord(2, 8, 7, nil, 0xB, 0xB)), "log_malformed"},
		{"with data of 4 GiB", one(append(record[:len(record)-8:len(record)-8], 0xff, 0xff, 0xff, 0xff)), "log_too_large"},
		{"of 10001 events", one(bytes.Repeat(tpmRecord(2, 8, 7, nil, 0xB), MaxEvents+1)), "log_too_large"},
		{"of 10001 events that only inform", one(bytes.Repeat(tpmRecord(2, evNoAction, 7, nil, 0xB), MaxEvents+1)), "log_too_large"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ParseTPMLog(c.in); fault.Code(err) != c.code {
				t.Errorf("err = %v (code %q), want %q", err, fault.Code(err), c.code)
			}
		})
	}
	if log, err := ParseTPMLog(one(record, record)); err != nil || len(log.Events) != 2 || string(log.Events[1].Data) != "data" {
		t.Errorf("the log that these are made of: %+v, %v", log, err)
	}
}

func FuzzParseTPMLog(f *testing.F) {
	f.Add(testkit.Vectors(f, gcpLog))
	f.Add(tpmLog(tcgDigestSize, []uint16{0xB}, tpmRecord(0, evNoAction, 0, append([]byte(localityHeader), 3), 0xB), tpmRecord(2, 8, 7, []byte("data"), 0xB)))
	f.Fuzz(func(t *testing.T, data []byte) {
		log, err := ParseTPMLog(data)
		if err != nil {
			if fault.Code(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		for _, b := range []Bank{BankSHA256, BankSHA384} {
			for pcr := range uint32(24) {
				if v, err := log.Replay(b, pcr); (err == nil) != (len(v) == b.Size()) {
					t.Fatalf("%s: %x, %v", b, v, err)
				}
			}
		}
	})
}
