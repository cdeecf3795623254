// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"errors"
	"slices"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"

	"github.com/dstack-go/dstack/gateway/caa"
	"github.com/dstack-go/dstack/internal/fault"
)

// maxOldAccounts is how many accounts of before are remembered.
const maxOldAccounts = 16

// accountRecord is an account at a CA with its key.
type accountRecord struct {
	Version   int      `json:"version"` // 1
	CA        string   `json:"ca"`
	Directory string   `json:"directory"`
	URI       string   `json:"uri"`
	Key       []byte   `json:"key_pkcs8"`
	At        int64    `json:"at"` // Unix seconds
	Old       []string `json:"old"`
	Identity  string   `json:"identity,omitempty"` // as the directory told it
	// Retiring is the key of the first of Old until that account is deactivated.
	Retiring []byte `json:"retiring_pkcs8,omitempty"`
	// Evidence that this gateway holds the account; empty until it is made.
	Quote       string `json:"quote"`
	Attestation string `json:"attestation"`
}

// Account is an ACME account of this gateway.
type Account struct {
	CA       string
	Identity string // of the CA in CAA records
	URI      string
	SPKI     []byte   // DER
	Old      []string // URIs of accounts before it
	// Evidence that binds URI, as AcmeInfo shows it; may be empty.
	Quote, Attestation string
}

func (i *caIssuer) accountKey() string { return keyOf("accounts", safe(i.ca.Name)) }

// account returns the account at the CA, and makes one when there is none. Code acme_account.
func (i *caIssuer) account(ctx context.Context, client *acme.Client) (acme.Account, error) {
	r, key, err := i.stored(ctx)
	if errors.Is(err, errAbsent) {
		err = locked(ctx, i.m.cfg.Storage, i.accountKey(), func() error {
			// Another node may have been first.
			if r, key, err = i.stored(ctx); !errors.Is(err, errAbsent) {
				return err
			}
			r, key, err = i.register(ctx, client, nil)
			return err
		})
	}
	if err != nil {
		return acme.Account{}, err
	}
	if r.Quote == "" && r.Attestation == "" && i.m.cfg.Attest != nil {
		if err := i.attestAccount(ctx, r); err != nil {
			return acme.Account{}, err
		}
	}
	return acme.Account{Status: acme.StatusValid, Location: r.URI, PrivateKey: key}, nil
}

func (i *caIssuer) stored(ctx context.Context) (*accountRecord, *ecdsa.PrivateKey, error) {
	r := &accountRecord{}
	if err := load(ctx, i.m.cfg.Storage, i.accountKey(), r); err != nil {
		return nil, nil, err
	}
	key, err := r.check()
	if err != nil {
		return nil, nil, fault.Wrap(err, "acme_account", "the stored account at the CA %s", i.ca.Name).
			WithFix("restore the record from a backup; deleting it makes a new account, which CAA records do not name")
	}
	if r.Directory != i.ca.Directory {
		return nil, nil, fault.New("acme_account", "the stored account of the CA %s is one at %s, not at %s", i.ca.Name, clip(r.Directory), i.ca.Directory).
			WithFix("give the new CA another name, or rotate the account")
	}
	return r, key, nil
}

func (r *accountRecord) check() (*ecdsa.PrivateKey, error) {
	if r.Version != 1 {
		return nil, errors.New("its version is not 1")
	}
	if r.URI == "" || len(r.URI) > 2048 || len(r.Old) > maxOldAccounts || len(r.Identity) > 253 || len(r.Retiring) > 0 && len(r.Old) == 0 {
		return nil, errors.New("it has no URI, or too long ones")
	}
	return parseKey(r.Key)
}

func parseKey(pkcs8 []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, errors.New("its key does not parse")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("its key is not of P-256")
	}
	return key, nil
}

// register makes an account with a new key and stores it. The caller holds the account's lock.
func (i *caIssuer) register(ctx context.Context, client *acme.Client, before *accountRecord) (*accountRecord, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	account := acme.Account{TermsOfServiceAgreed: true, PrivateKey: key}
	if i.ca.Contact != "" {
		account.Contact = []string{"mailto:" + i.ca.Contact}
	}
	if i.ca.KeyID != "" {
		if err := account.SetExternalAccountBinding(ctx, client, acme.EAB{KeyID: i.ca.KeyID, MACKey: i.ca.MACKey}); err != nil {
			return nil, nil, err
		}
	}
	if account, err = client.NewAccount(ctx, account); err != nil {
		return nil, nil, fault.Wrap(err, "acme_account", "making an account at the CA %s", i.ca.Name)
	}
	r := &accountRecord{Version: 1, CA: i.ca.Name, Directory: i.ca.Directory, URI: account.Location, At: time.Now().Unix(), Old: []string{}}
	if r.Identity, err = i.identity(ctx, client); err != nil {
		return nil, nil, err
	}
	if before != nil {
		r.Retiring = before.Key
		r.Old = append(r.Old, before.URI)
		r.Old = append(r.Old, before.Old[:min(len(before.Old), maxOldAccounts-1)]...)
	}
	if r.Key, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, nil, err
	}
	if _, err := r.check(); err != nil {
		return nil, nil, fault.Wrap(err, "acme_account", "the new account at the CA %s", i.ca.Name)
	}
	if before == nil {
		err = store(ctx, i.m.cfg.Storage, i.accountKey(), r)
	}
	return r, key, err
}

// AccountReportData is what evidence of an account binds (spec §4.5).
func AccountReportData(uri string) [64]byte {
	return sha512.Sum512(append([]byte("acme-account:"), uri...))
}

// CertReportData is what evidence of a certified key binds: its SubjectPublicKeyInfo in DER.
func CertReportData(spki []byte) [64]byte {
	return sha512.Sum512(append([]byte("zt-cert:"), spki...))
}

func (i *caIssuer) attestAccount(ctx context.Context, r *accountRecord) error {
	quote, attestation, err := i.m.cfg.Attest(ctx, AccountReportData(r.URI))
	if err != nil {
		return fault.Wrap(err, "acme_attest", "attesting the account at the CA %s", i.ca.Name)
	}
	r.Quote, r.Attestation = quote, attestation
	return store(ctx, i.m.cfg.Storage, i.accountKey(), r)
}

func (i *caIssuer) public(r *accountRecord, key *ecdsa.PrivateKey) (Account, error) {
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	return Account{
		CA: i.ca.Name, Identity: cmp.Or(i.ca.Identity, r.Identity), URI: r.URI, SPKI: spki, Old: slices.Clone(r.Old),
		Quote: r.Quote, Attestation: r.Attestation,
	}, err
}

// Accounts returns the accounts there are, in the order of the CAs; a CA that none was
// needed at yet is left out. It reads storage alone. Code acme_account.
func (m *Manager) Accounts(ctx context.Context) ([]Account, error) {
	var list []Account
	for _, i := range m.issuers {
		r, key, err := i.stored(ctx)
		if errors.Is(err, errAbsent) {
			continue
		}
		if err != nil {
			return nil, err
		}
		a, err := i.public(r, key)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, nil
}

// Register makes the accounts that are missing and returns all, with the CAs' identities,
// so that CAA can name them before the first order. Codes acme_ca_down, acme_order,
// acme_account, acme_attest.
func (m *Manager) Register(ctx context.Context) ([]Account, error) {
	for _, i := range m.issuers {
		if err := i.rest(); err != nil {
			return nil, err
		}
		_, err := i.account(ctx, i.client().Client)
		if err = i.settle(err); err != nil {
			return nil, err
		}
	}
	list, err := m.Accounts(ctx)
	if err != nil {
		return nil, err
	}
	for n, i := range m.issuers {
		if list[n].Identity != "" {
			continue
		}
		list[n].Identity, err = i.identity(ctx, i.client().Client)
		if err = i.settle(err); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// identity is what CAA calls the CA. Code acme_ca: nobody says.
func (i *caIssuer) identity(ctx context.Context, client *acme.Client) (string, error) {
	if i.ca.Identity != "" {
		return i.ca.Identity, nil
	}
	dir, err := client.GetDirectory(ctx)
	if err != nil {
		return "", err
	}
	if dir.Meta == nil || len(dir.Meta.CAAIdentities) == 0 || len(dir.Meta.CAAIdentities[0]) > 253 {
		return "", fault.New("acme_ca", "the CA %s does not say what CAA calls it", i.ca.Name).WithFix("configure its identity")
	}
	return dir.Meta.CAAIdentities[0], nil
}

// RotateAccount replaces the account at each CA by one with a new key: the new account is
// named by CAA beside the old, attested, and used; then CAA names it alone, and the old one
// is deactivated. It returns the accounts there are then. An account whose successor CAA
// cannot be made to name stays. Codes acme_ca_down, acme_order, acme_account, acme_attest,
// acme_pin, and those of SetCAA and acme_deactivate, with which the new account is in use.
func (m *Manager) RotateAccount(ctx context.Context) ([]Account, error) {
	if _, err := m.Register(ctx); err != nil {
		return nil, err
	}
	for _, i := range m.issuers {
		err := locked(ctx, m.cfg.Storage, i.accountKey(), func() error { return i.rotate(ctx) })
		if err != nil {
			return nil, err
		}
	}
	accounts, err := m.Accounts(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	if m.cfg.CAA != CAAOff {
		errs = append(errs, m.pin(ctx, pins(accounts)))
	}
	for _, i := range m.issuers {
		errs = append(errs, i.retire(ctx))
	}
	return accounts, errors.Join(errs...)
}

// rotate makes the next account the one in use. The caller holds the account's lock.
func (i *caIssuer) rotate(ctx context.Context) error {
	if err := i.rest(); err != nil {
		return err
	}
	old, _, err := i.stored(ctx)
	if err != nil {
		return err
	}
	if len(old.Retiring) > 0 {
		// Two keys cannot wait; the one before goes first.
		if err := i.deactivate(ctx, old); err != nil {
			return err
		}
	}
	r, key, err := i.register(ctx, i.client().Client, old)
	if err = i.settle(err); err != nil {
		return err
	}
	next, err := i.public(r, key)
	if err != nil {
		return err
	}
	if err := i.m.pinNext(ctx, next); err != nil {
		return fault.Wrap(err, "acme_pin", "the new account %s at the CA %s is not named by CAA; the old one stays", r.URI, i.ca.Name).
			WithFix("give the gateway a DNS credential for the domains' own zones, or name both accounts by hand until it is done")
	}
	if i.m.cfg.Attest != nil {
		return i.attestAccount(ctx, r)
	}
	return store(ctx, i.m.cfg.Storage, i.accountKey(), r)
}

// pinNext lets CAA name an account beside those in use, or sees that it lets it issue.
func (m *Manager) pinNext(ctx context.Context, next Account) error {
	if m.cfg.CAA == CAAOff {
		return nil
	}
	accounts, err := m.Accounts(ctx)
	if err != nil {
		return err
	}
	err = m.pin(ctx, pins(append(accounts, next)))
	if err == nil {
		return nil
	}
	for _, d := range m.managedDomains() {
		_, set, bad := caa.Lookup(ctx, certmagic.RecursiveNameservers(m.cfg.Resolvers), string(d.Name))
		for _, wildcard := range []bool{false, true} {
			if bad != nil || !caa.Permits(set, caa.Request{Issuer: next.Identity, Account: next.URI, Method: string(DNS01), Wildcard: wildcard}) {
				return errors.Join(err, bad)
			}
		}
	}
	m.log.Warn("CAA is not ours to set, and lets the new account issue", "error", err)
	return nil
}

// retire deactivates the account before, if that is still to be done. Code acme_deactivate.
func (i *caIssuer) retire(ctx context.Context) error {
	return locked(ctx, i.m.cfg.Storage, i.accountKey(), func() error {
		r, _, err := i.stored(ctx)
		if errors.Is(err, errAbsent) || err == nil && len(r.Retiring) == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		return i.deactivate(ctx, r)
	})
}

func (i *caIssuer) deactivate(ctx context.Context, r *accountRecord) error {
	key, err := parseKey(r.Retiring)
	if err == nil {
		client := i.client().Client
		if _, err = client.GetDirectory(ctx); err == nil {
			_, err = client.UpdateAccount(ctx, acme.Account{Status: acme.StatusDeactivated, Location: r.Old[0], PrivateKey: key})
		}
		var problem acme.Problem
		if errors.As(err, &problem) && (problem.Type == acme.ProblemTypeUnauthorized || problem.Type == acme.ProblemTypeAccountDoesNotExist) {
			err = nil // it is already
		}
	}
	if err != nil {
		return fault.Wrap(i.m.secrets.error(err), "acme_deactivate", "deactivating the old account %s at the CA %s; it is tried again", clip(r.Old[0]), i.ca.Name)
	}
	r.Retiring = nil
	return store(ctx, i.m.cfg.Storage, i.accountKey(), r)
}
