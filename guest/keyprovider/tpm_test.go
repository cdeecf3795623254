// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
)

// machine is a real swtpm whose state outlives its boots.
type machine struct {
	t     *testing.T
	state string
	tpm   transport.TPMCloser
	cmd   *exec.Cmd
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		t.Skip("SKIP: swtpm is not installed")
	}
	m := &machine{t: t, state: t.TempDir()}
	t.Cleanup(m.off)
	return m
}

func (m *machine) off() {
	if m.cmd == nil {
		return
	}
	m.tpm.Close()
	m.cmd.Process.Kill()
	_ = m.cmd.Wait()
	m.cmd = nil
}

// boot starts the TPM, its registers at zero, and measures what is booted.
func (m *machine) boot(measured ...string) {
	m.t.Helper()
	m.off()
	// Unix socket paths are short.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	m.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+m.state, "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path="+path, "--ctrl", "type=unixio,path="+path+".ctrl")
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	var conn net.Conn
	for deadline := time.Now().Add(10 * time.Second); ; {
		if conn, err = net.Dial("unix", path); err == nil {
			break
		}
		if time.Now().After(deadline) {
			m.t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.tpm = transport.FromReadWriteCloser(conn)
	for _, text := range measured {
		m.extend(text)
	}
}

func (m *machine) extend(text string) {
	m.t.Helper()
	h := sha256.Sum256([]byte(text))
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(14), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: h[:]}}},
	}).Execute(m.tpm); err != nil {
		m.t.Fatal(err)
	}
}

// keepOpen lets the provider close a connection that the test goes on with.
type keepOpen struct{ transport.TPM }

func (keepOpen) Close() error { return nil }

func (m *machine) provider(first bool) *TPM {
	return &TPM{
		Open: func() (transport.TPMCloser, error) { return keepOpen{m.tpm}, nil },
		PCRs: PCRsGoogle, Vouched: true, FirstBoot: first,
	}
}

func (m *machine) keys(first bool) (*Grant, error) {
	m.t.Helper()
	g, err := m.provider(first).Keys(context.Background())
	// Nothing stays behind in the TPM.
	for _, kind := range []uint32{uint32(tpm2.TPMHTTransient) << 24, uint32(tpm2.TPMHTLoadedSession) << 24} {
		list, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: kind, PropertyCount: 10}.Execute(m.tpm)
		if err != nil {
			m.t.Fatal(err)
		}
		if h, err := list.CapabilityData.Data.Handles(); err != nil || len(h.Handle) > 0 {
			m.t.Errorf("left in the TPM: %x, %v", h, err)
		}
	}
	return g, err
}

func TestASeedInATPMLasts(t *testing.T) {
	m := newMachine(t)
	m.boot("image", "app")
	first, err := m.keys(true)
	if err != nil {
		t.Fatal(err)
	}
	if !first.Created || first.Unpinned || first.Keys.Provider.Kind != keys.TPM || len(first.Keys.Provider.SPKI) == 0 {
		t.Errorf("first boot: %+v", first)
	}
	// Also when the first boot did not come to its end.
	for _, firstBoot := range []bool{false, true} {
		m.boot("image", "app")
		again, err := m.keys(firstBoot)
		if err != nil {
			t.Fatal(err)
		}
		if again.Created || !bytes.Equal(again.Keys.Disk.Bytes(), first.Keys.Disk.Bytes()) || !bytes.Equal(again.Keys.App.Bytes(), first.Keys.App.Bytes()) {
			t.Errorf("first boot %t: the keys are others", firstBoot)
		}
	}
	// Another machine has another.
	other := newMachine(t)
	other.boot("image", "app")
	theirs, err := other.keys(true)
	if err != nil || bytes.Equal(theirs.Keys.Disk.Bytes(), first.Keys.Disk.Bytes()) {
		t.Errorf("another machine: %v", err)
	}
}

func TestASeedInATPMOpensForItsImageOnly(t *testing.T) {
	m := newMachine(t)
	m.boot("image", "app")
	if _, err := m.keys(true); err != nil {
		t.Fatal(err)
	}
	m.boot("image", "another app")
	_, err := m.keys(false)
	wantCode(t, err, "tpm_policy")
	_, err = m.keys(true)
	wantCode(t, err, "tpm_policy")
	// The creation data are not what keeps the seed: the TPM itself does.
	s := &sealer{TPM: m.tpm, pcrs: PCRsGoogle}
	closePrimary, err := s.openPrimary()
	if err != nil {
		t.Fatal(err)
	}
	data, err := s.readIndex()
	if err != nil {
		t.Fatal(err)
	}
	closePrimary()
	parts, err := splitBlob(data)
	if err != nil {
		t.Fatal(err)
	}
	if openable(t, m.tpm, parts[0], parts[1]) {
		t.Error("the TPM unsealed the seed for another app")
	}
	// What is measured later closes it, too.
	m.boot("image", "app")
	if _, err := m.keys(false); err != nil {
		t.Fatal(err)
	}
	m.extend("system-ready")
	_, err = m.keys(false)
	wantCode(t, err, "tpm_policy")
}

// openable tries to unseal with no regard to creation data.
// Two apps that take turns on one machine do not get each other's seed.
func TestThreat_E05_ASeedInATPMIsOneApps(t *testing.T) {
	m := newMachine(t)
	ask := func(app string) (*Grant, error) {
		m.boot("image")
		p := m.provider(true)
		p.App = []byte(app)
		return p.Keys(context.Background())
	}
	first, err := ask("app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ask("other"); fault.Code(err) != "tpm_policy" {
		t.Errorf("another app: %v", err)
	}
	again, err := ask("app")
	if err != nil || !bytes.Equal(again.Keys.Disk.Bytes(), first.Keys.Disk.Bytes()) {
		t.Errorf("the same app again: %v", err)
	}
}

func openable(t *testing.T, tpm transport.TPM, public, private []byte) bool {
	t.Helper()
	s := &sealer{TPM: tpm, pcrs: PCRsGoogle}
	closePrimary, err := s.openPrimary()
	if err != nil {
		t.Fatal(err)
	}
	defer closePrimary()
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: s.primary.Handle, Name: s.primary.Name, Auth: tpm2.PasswordAuth(nil)},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public), InPrivate: tpm2.TPM2BPrivate{Buffer: private},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	defer s.flush(loaded.ObjectHandle)
	for _, auth := range []tpm2.Session{
		tpm2.PasswordAuth(nil),
		tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: s.selection()}.Execute(t)
			return err
		}),
	} {
		if _, err := (tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: auth}}).Execute(tpm); err == nil {
			return true
		}
	}
	return false
}

// A seed that another system knows must not become an app's: one sealed while the
// PCRs were others, to the PCRs of the app, and one whose ticket is not the TPM's.
func TestAPlantedSeedIsNotTaken(t *testing.T) {
	m := newMachine(t)
	m.boot("image", "app")
	s := &sealer{TPM: m.tpm, pcrs: PCRsGoogle}
	closePrimary, err := s.openPrimary()
	if err != nil {
		t.Fatal(err)
	}
	target, err := s.policy()
	if err != nil {
		t.Fatal(err)
	}
	expected, err := s.pcrDigest()
	if err != nil {
		t.Fatal(err)
	}
	closePrimary()

	plant := func(creation tpm2.TPMLPCRSelection, change func(parts [][]byte)) {
		t.Helper()
		s := &sealer{TPM: m.tpm, pcrs: PCRsGoogle}
		closePrimary, err := s.openPrimary()
		if err != nil {
			t.Fatal(err)
		}
		defer closePrimary()
		sealed, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: s.primary.Handle, Name: s.primary.Name, Auth: tpm2.PasswordAuth(nil)},
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: bytes.Repeat([]byte{1}, 32)}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: true},
				AuthPolicy:       tpm2.TPM2BDigest{Buffer: target},
			}),
			CreationPCR: creation,
		}.Execute(m.tpm)
		if err != nil {
			t.Fatal(err)
		}
		parts := [][]byte{sealed.OutPublic.Bytes(), sealed.OutPrivate.Buffer, sealed.CreationData.Bytes(), tpm2.Marshal(sealed.CreationTicket)}
		if change != nil {
			change(parts)
		}
		data := []byte(blobMagic)
		for _, p := range parts {
			data = append(binary.BigEndian.AppendUint16(data, uint16(len(p))), p...)
		}
		if err := s.writeIndex(data); err != nil {
			t.Fatal(err)
		}
	}
	evil := func(change func([][]byte)) {
		t.Helper()
		m.boot("another system")
		plant(s.selection(), change)
		m.boot("image", "app")
	}

	evil(nil)
	for _, first := range []bool{true, false} {
		_, err = m.keys(first)
		wantCode(t, err, "tpm_policy")
	}
	// It lies about the PCRs at the time.
	evil(func(parts [][]byte) {
		made, err := tpm2.Unmarshal[tpm2.TPMSCreationData](parts[2])
		if err != nil {
			t.Fatal(err)
		}
		made.PCRDigest.Buffer = expected
		parts[2] = tpm2.Marshal(*made)
	})
	_, err = m.keys(true)
	wantCode(t, err, "tpm_seed_foreign")
	// It had the TPM note no PCR at all.
	m.boot("another system")
	plant(tpm2.TPMLPCRSelection{}, nil)
	m.boot("image", "app")
	_, err = m.keys(true)
	wantCode(t, err, "tpm_seed_foreign")
	// Of another machine.
	evil(func(parts [][]byte) { parts[1][20] ^= 1 })
	_, err = m.keys(true)
	wantCode(t, err, "tpm_seed_foreign")
	for _, change := range []func([][]byte){
		func(p [][]byte) { p[2] = p[2][:5] },
		func(p [][]byte) { p[3] = nil },
	} {
		evil(change)
		_, err = m.keys(true)
		wantCode(t, err, "tpm_seed_malformed")
	}
}

func TestASeedIsMadeOnFirstBootOnly(t *testing.T) {
	m := newMachine(t)
	m.boot("image", "app")
	_, err := m.keys(false)
	wantCode(t, err, "tpm_seed_missing")

	// Power was cut while the index was written: its beginning is missing.
	s := &sealer{TPM: m.tpm, pcrs: PCRsGoogle}
	if err := s.writeIndex(make([]byte, 600)); err != nil {
		t.Fatal(err)
	}
	_, err = m.keys(false)
	wantCode(t, err, "tpm_seed_missing")
	g, err := m.keys(true)
	if err != nil || !g.Created {
		t.Errorf("after an interrupted first boot: %+v, %v", g, err)
	}
}

// cut loses power after some commands.
type cut struct {
	transport.TPM
	left int
}

func (c *cut) Send(b []byte) ([]byte, error) {
	if c.left--; c.left < 0 {
		return nil, errors.New("power lost")
	}
	return c.TPM.Send(b)
}

func (*cut) Close() error { return nil }

// Power is lost after each command of the making: whatever is left, the next boot of
// the still new instance gets a seed, and the one after that the same.
func TestACrashWhileASeedIsMadeIsRetried(t *testing.T) {
	for n := 1; ; n++ {
		m := newMachine(t)
		m.boot("image", "app")
		p := m.provider(true)
		p.Open = func() (transport.TPMCloser, error) { return &cut{TPM: m.tpm, left: n}, nil }
		if _, err := p.Keys(t.Context()); err == nil {
			if n < 10 {
				t.Errorf("%d commands made a seed", n)
			}
			return
		}
		m.boot("image", "app")
		made, err := m.keys(true)
		if err != nil {
			t.Fatalf("after %d commands: %v", n, err)
		}
		m.boot("image", "app")
		again, err := m.keys(false)
		if err != nil || !bytes.Equal(made.Keys.Disk.Bytes(), again.Keys.Disk.Bytes()) {
			t.Errorf("after %d commands there are two seeds, or %v", n, err)
		}
		m.off()
	}
}

func TestATPMThatNobodyVouchesFor(t *testing.T) {
	m := newMachine(t)
	m.boot("image", "app")
	p := m.provider(true)
	p.Vouched = false
	_, err := p.Keys(t.Context())
	wantCode(t, err, "tpm_unvouched")
	p.Development = true
	if _, err := p.Keys(t.Context()); err != nil {
		t.Errorf("a development image: %v", err)
	}
	p.Open = func() (transport.TPMCloser, error) { return nil, os.ErrNotExist }
	_, err = p.Keys(t.Context())
	wantCode(t, err, "tpm_unavailable")
}

func FuzzSplitBlob(f *testing.F) {
	f.Add([]byte(blobMagic + "\x00\x01a\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if !bytes.HasPrefix(data, []byte(blobMagic)) {
			return
		}
		_, _ = splitBlob(data)
	})
}
