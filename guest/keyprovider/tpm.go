// SPDX-License-Identifier: Apache-2.0

package keyprovider

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"

	"github.com/dstack-go/dstack/channel"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
)

// PCRs are the registers to which a seed is sealed.
type PCRs struct {
	Bank  tpm2.TPMIAlgHash
	Index []uint
}

// Where upstream seals to (spec/guest-os.md §6).
var (
	PCRsGoogle = PCRs{tpm2.TPMAlgSHA256, []uint{0, 2, 14}}
	PCRsAWS    = PCRs{tpm2.TPMAlgSHA384, []uint{4, 7, 8, 12, 14}}
)

const (
	seedIndex = 0x01801101 // NV, upstream's
	tpmDevice = "/dev/tpmrm0"
	blobMagic = "dstack-tpmseed-1"
	maxBlob   = 2048 // bytes; TPMs have no larger index
	nvChunk   = 256  // bytes of one NV command; every TPM takes that many
)

// TPM keeps a seed in the machine's TPM, sealed to PCRs: the same image on the same
// machine gets the same keys at each boot.
//
// The TPM is the host's unless platform evidence says otherwise, and a host that
// emulates it has the seed. Keys is refused unless the caller says who vouches.
//
// The seed is 32 bytes from the kernel and the TPM together, in a sealed object under
// the storage primary of the owner hierarchy, whose NV index 0x01801101 holds. Both
// are open to whatever ran on the machine before. A seed that another system planted,
// and knows, is recognised by its creation data, to which the TPM's ticket attests:
// they hold the PCRs at the time when the object was made.
//
// In the index:
//
//	magic (16) ‖ LP(public area) ‖ LP(private area) ‖ LP(creation data) ‖ LP(creation ticket)
//
// where LP puts the length in front, two bytes big-endian; the parts are TPM
// structures without their own size.
type TPM struct {
	// Open connects to the TPM; nil means /dev/tpmrm0.
	Open func() (transport.TPMCloser, error)
	PCRs PCRs
	// App is whose seed it is; it goes into the last of PCRs before the seed is opened,
	// so that what another app of this machine left, or will find, is not its own.
	// Empty on platforms whose runtime events go there anyway.
	App []byte
	// Vouched says that evidence of the platform vouches for the TPM.
	Vouched bool
	// Development says that this image is for development, which takes any TPM.
	Development bool
	// FirstBoot allows that a seed be made where there is none. Without it a seed that
	// is gone is an error: with new keys the data disk would be lost silently.
	FirstBoot bool
	Attester  channel.Attester // for the app's root certificate; nil: none
	Now       func() time.Time // nil: time.Now
}

// Keys implements [Provider]. Codes: tpm_unvouched, tpm_unavailable, tpm_failed,
// tpm_policy (the PCRs are not those of the seed), tpm_seed_missing, tpm_seed_foreign
// (another system made it), tpm_seed_malformed, key_derivation, key_evidence.
func (t *TPM) Keys(ctx context.Context) (*Grant, error) {
	if !t.Vouched && !t.Development {
		return nil, fault.New("tpm_unvouched", "nothing vouches for this machine's TPM: the host may emulate it and read the seed").
			WithFix("use the key provider kms or local, or a platform whose evidence covers its TPM")
	}
	open := t.Open
	if open == nil {
		open = func() (transport.TPMCloser, error) { return linuxtpm.Open(tpmDevice) }
	}
	tpm, err := open()
	if err != nil {
		return nil, fault.Wrap(err, "tpm_unavailable", "open the TPM").WithFix("give the VM a TPM, or use another key provider")
	}
	defer tpm.Close()
	raw, created, err := t.seed(tpm)
	if err != nil {
		if fault.Code(err) == "" {
			err = fault.Wrap(err, "tpm_failed", "the TPM")
		}
		return nil, err
	}
	defer clear(raw)
	seed, err := keys.NewSeed(raw)
	if err != nil {
		return nil, fault.Wrap(err, "tpm_seed_malformed", "the sealed seed")
	}
	k, err := seeded(ctx, seed, keys.Provider{Kind: keys.TPM}, t.Attester, clock(t.Now))
	if err != nil {
		return nil, err
	}
	return &Grant{Keys: k, Created: created}, nil
}

// seed returns the stored seed, or makes one if this is the first boot.
func (t *TPM) seed(tpm transport.TPM) (seed []byte, created bool, err error) {
	s := &sealer{TPM: tpm, pcrs: t.PCRs}
	if len(t.App) > 0 {
		if err := s.measure(t.App); err != nil {
			return nil, false, err
		}
	}
	closePrimary, err := s.openPrimary()
	if err != nil {
		return nil, false, err
	}
	defer closePrimary()
	data, err := s.readIndex()
	if err != nil {
		return nil, false, err
	}
	if data != nil {
		seed, err = s.unseal(data)
		return seed, false, err
	}
	if !t.FirstBoot {
		return nil, false, fault.New("tpm_seed_missing", "the TPM has no seed, and this instance had one").
			WithFix("the TPM was cleared or is another one: restore it; what the data disk holds cannot be read without")
	}
	seed, err = s.create()
	return seed, true, err
}

// sealer has a TPM with the storage primary in it.
type sealer struct {
	transport.TPM
	pcrs    PCRs
	primary tpm2.NamedHandle
	public  tpm2.TPMTPublic
}

func (s *sealer) openPrimary() (closePrimary func(), err error) {
	created, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(s)
	if err != nil {
		return nil, fmt.Errorf("make the storage primary: %w", err)
	}
	public, err := created.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	s.primary, s.public = tpm2.NamedHandle{Handle: created.ObjectHandle, Name: created.Name}, *public
	return func() { s.flush(s.primary.Handle) }, nil
}

func (s *sealer) flush(h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(s) }

// measure extends the last PCR by a digest of the app.
func (s *sealer) measure(app []byte) error {
	hash, err := s.pcrs.Bank.Hash()
	if err != nil {
		return err
	}
	h := hash.New()
	h.Write([]byte("dstack-tpm-app-v1:"))
	h.Write(app)
	last := s.pcrs.Index[len(s.pcrs.Index)-1]
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(last), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: s.pcrs.Bank, Digest: h.Sum(nil)}}},
	}.Execute(s)
	if err != nil {
		return fmt.Errorf("extend PCR %d: %w", last, err)
	}
	return nil
}

// session encrypts parameters under a secret that only the primary's holder learns,
// so that who listens between kernel and TPM does not read the seed.
func (s *sealer) session(direction tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(s.primary.Handle, s.public), direction)
}

func (s *sealer) selection() tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: s.pcrs.Bank, PCRSelect: tpm2.PCClientCompatible.PCRs(s.pcrs.Index...),
	}}}
}

// pcrDigest returns SHA-256 over the PCRs as they are now. The TPM returns a few at a
// time, those of the lowest index first.
func (s *sealer) pcrDigest() ([]byte, error) {
	h := sha256.New()
	for _, index := range s.pcrs.Index {
		read, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
			Hash: s.pcrs.Bank, PCRSelect: tpm2.PCClientCompatible.PCRs(index),
		}}}}.Execute(s)
		if err != nil {
			return nil, fmt.Errorf("read PCR %d: %w", index, err)
		}
		if len(read.PCRValues.Digests) != 1 {
			return nil, fmt.Errorf("PCR %d is not in the bank", index)
		}
		h.Write(read.PCRValues.Digests[0].Buffer)
	}
	return h.Sum(nil), nil
}

// policy returns the policy that unsealing needs: the PCRs as they are now.
func (s *sealer) policy() ([]byte, error) {
	session, closeSession, err := tpm2.PolicySession(s, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return nil, err
	}
	defer func() { _ = closeSession() }()
	if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: s.selection()}).Execute(s); err != nil {
		return nil, err
	}
	digest, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(s)
	if err != nil {
		return nil, err
	}
	return digest.PolicyDigest.Buffer, nil
}

// create makes a seed, seals and stores it.
func (s *sealer) create() ([]byte, error) {
	theirs, err := tpm2.GetRandom{BytesRequested: keys.Size}.Execute(s, s.session(tpm2.AESEncryption(128, tpm2.EncryptOut)))
	if err != nil {
		return nil, fmt.Errorf("random bytes of the TPM: %w", err)
	}
	var ours [keys.Size]byte
	rand.Read(ours[:])
	h := sha256.New() // one buffer of its own, where append would leave a copy
	h.Write(ours[:])
	h.Write(theirs.RandomBytes.Buffer)
	seed := h.Sum(nil)
	h.Reset()
	clear(ours[:])
	clear(theirs.RandomBytes.Buffer)
	policy, err := s.policy()
	if err != nil {
		return nil, fmt.Errorf("policy of the seed: %w", err)
	}
	sealed, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: s.primary.Handle, Name: s.primary.Name, Auth: s.session(tpm2.AESEncryption(128, tpm2.EncryptIn))},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: seed}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			// Neither user nor administrator but by the policy.
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, AdminWithPolicy: true, NoDA: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: policy},
		}),
		CreationPCR: s.selection(),
	}.Execute(s)
	if err != nil {
		clear(seed)
		return nil, fmt.Errorf("seal the seed: %w", err)
	}
	data := []byte(blobMagic)
	for _, part := range [][]byte{
		sealed.OutPublic.Bytes(), sealed.OutPrivate.Buffer, sealed.CreationData.Bytes(), tpm2.Marshal(sealed.CreationTicket),
	} {
		data = append(binary.BigEndian.AppendUint16(data, uint16(len(part))), part...)
	}
	if err := s.writeIndex(data); err != nil {
		clear(seed)
		return nil, fmt.Errorf("store the sealed seed: %w", err)
	}
	// What cannot be read back now will not be there at the next boot.
	again, err := s.readIndex()
	if err == nil && !bytes.Equal(again, data) {
		err = errors.New("it is not what was written")
	}
	if err != nil {
		clear(seed)
		return nil, fmt.Errorf("read the sealed seed back: %w", err)
	}
	return seed, nil
}

// unseal opens what create stored.
func (s *sealer) unseal(data []byte) ([]byte, error) {
	parts, err := splitBlob(data)
	if err != nil {
		return nil, fault.Wrap(err, "tpm_seed_malformed", "the sealed seed")
	}
	public, private, creation, ticketBytes := parts[0], parts[1], parts[2], parts[3]
	ticket, err := tpm2.Unmarshal[tpm2.TPMTTKCreation](ticketBytes)
	if err != nil {
		return nil, fault.Wrap(err, "tpm_seed_malformed", "the sealed seed's ticket")
	}
	made, err := tpm2.Unmarshal[tpm2.TPMSCreationData](creation)
	if err != nil {
		return nil, fault.Wrap(err, "tpm_seed_malformed", "the sealed seed's creation data")
	}
	foreign := func(err error, why string) ([]byte, error) {
		return nil, fault.Wrap(err, "tpm_seed_foreign", "the seed in the TPM is not this image's: %s", why).
			WithFix("another system on this machine made it, or the TPM was cleared; clear the TPM and deploy anew")
	}
	loaded, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: s.primary.Handle, Name: s.primary.Name, Auth: tpm2.PasswordAuth(nil)},
		InPublic:     tpm2.BytesAs2B[tpm2.TPMTPublic](public), InPrivate: tpm2.TPM2BPrivate{Buffer: private},
	}.Execute(s)
	if err != nil {
		return foreign(err, "it does not load")
	}
	defer s.flush(loaded.ObjectHandle)
	object := tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: loaded.Name}

	// The ticket is the TPM's word that it made this object with these creation data;
	// to check it needs no signing key.
	sum := sha256.Sum256(creation)
	if _, err := (tpm2.CertifyCreation{
		SignHandle:   tpm2.AuthHandle{Handle: tpm2.TPMRHNull, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: object, CreationHash: tpm2.TPM2BDigest{Buffer: sum[:]},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, CreationTicket: *ticket,
	}).Execute(s); err != nil {
		return foreign(err, "the TPM does not confirm how it was made")
	}
	if !bytes.Equal(tpm2.Marshal(made.PCRSelect), tpm2.Marshal(s.selection())) {
		return foreign(nil, "it was made without regard to the PCRs")
	}
	now, err := s.pcrDigest()
	if err != nil {
		return nil, err
	}
	changed := func(err error) ([]byte, error) {
		return nil, fault.Wrap(err, "tpm_policy", "the PCRs of this boot are not those that the seed is sealed to").
			WithFix("boot the image, firmware and app that the instance was made with: a seed in a TPM does not survive their change")
	}
	if !bytes.Equal(made.PCRDigest.Buffer, now) {
		return changed(nil)
	}
	out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: object.Handle, Name: object.Name,
		Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, session tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
			_, err := tpm2.PolicyPCR{PolicySession: session, Pcrs: s.selection()}.Execute(t)
			return err
		}, tpm2.Salted(s.primary.Handle, s.public), tpm2.AESEncryption(128, tpm2.EncryptOut)),
	}}.Execute(s)
	switch {
	case errors.Is(err, tpm2.TPMRCPolicyFail):
		return changed(err)
	case err != nil:
		return nil, fmt.Errorf("unseal the seed: %w", err)
	}
	return out.OutData.Buffer, nil
}

func splitBlob(data []byte) (parts [4][]byte, err error) {
	rest := data[len(blobMagic):]
	for i := range parts {
		if len(rest) < 2 || len(rest)-2 < int(binary.BigEndian.Uint16(rest)) {
			return parts, fmt.Errorf("part %d ends early", i)
		}
		n := int(binary.BigEndian.Uint16(rest))
		parts[i], rest = rest[2:2+n:2+n], rest[2+n:]
	}
	if len(rest) > 0 {
		return parts, fmt.Errorf("%d bytes follow it", len(rest))
	}
	return parts, nil
}

// readIndex returns what create stored, or nil where there is nothing: no index, or
// one whose writing did not come to its end, which begins with the magic.
func (s *sealer) readIndex() ([]byte, error) {
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(seedIndex)}.Execute(s)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at NV index %#x: %w", seedIndex, err)
	}
	info, err := public.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	if !info.Attributes.Written {
		return nil, nil
	}
	if info.DataSize > maxBlob {
		return nil, fault.New("tpm_seed_malformed", "NV index %#x has %d bytes, more than %d", seedIndex, info.DataSize, maxBlob)
	}
	out := make([]byte, 0, info.DataSize)
	for at := uint16(0); at < info.DataSize; {
		read, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(seedIndex), Name: public.NVName},
			Size:       min(nvChunk, info.DataSize-at), Offset: at,
		}.Execute(s)
		if err != nil {
			return nil, fmt.Errorf("read NV index %#x: %w", seedIndex, err)
		}
		if len(read.Data.Buffer) == 0 {
			return nil, fmt.Errorf("read NV index %#x: nothing comes", seedIndex)
		}
		out = append(out, read.Data.Buffer...)
		at += uint16(len(read.Data.Buffer))
	}
	if !bytes.HasPrefix(out, []byte(blobMagic)) {
		return nil, nil
	}
	return out, nil
}

// writeIndex defines the index anew and writes its beginning last.
func (s *sealer) writeIndex(data []byte) error {
	if len(data) > maxBlob {
		return fmt.Errorf("the sealed seed has %d bytes, more than %d", len(data), maxBlob)
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	if old, err := (tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(seedIndex)}).Execute(s); err == nil {
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(seedIndex), Name: old.NVName}}).Execute(s); err != nil {
			return fmt.Errorf("remove what an interrupted boot left: %w", err)
		}
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(seedIndex), NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true},
	})}).Execute(s); err != nil {
		return fmt.Errorf("define NV index %#x: %w", seedIndex, err)
	}
	for at := (len(data) - 1) / nvChunk * nvChunk; at >= 0; at -= nvChunk {
		public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(seedIndex)}.Execute(s)
		if err != nil {
			return err
		}
		if _, err := (tpm2.NVWrite{
			AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(seedIndex), Name: public.NVName},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+nvChunk, len(data))]}, Offset: uint16(at),
		}).Execute(s); err != nil {
			return err
		}
	}
	return nil
}
