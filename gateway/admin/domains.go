// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/hostname"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
)

// Upstream's defaults of a credential.
const (
	defaultTTL  = 60
	defaultWait = 300
)

// cloudflare is the provider of upstream's fields, and its API the only one of it.
const (
	cloudflare    = "cloudflare"
	cloudflareAPI = "https://api.cloudflare.com/client/v4"
)

// redacted shows of a secret what tells it from another: its first and last four
// characters, and nothing of a short one.
func redacted(secret string) string {
	if len(secret) <= 8 {
		return strings.Repeat("*", len(secret))
	}
	return secret[:4] + "..." + secret[len(secret)-4:]
}

func credentialInfo(id string, d settings.DNS) *api.DnsCredentialInfo {
	ttl, wait := uint32(d.TTL/time.Second), uint32(d.Wait/time.Second)
	out := &api.DnsCredentialInfo{Id: id, Name: d.Name, ProviderType: d.Provider, DnsTxtTtl: &ttl, MaxDnsWait: &wait, CreatedAt: seconds(d.Created), UpdatedAt: seconds(d.Updated)}
	if d.Provider == cloudflare {
		out.CfApiToken, out.CfApiUrl = redacted(d.Params["api_token"]), cloudflareAPI
	}
	return out
}

// credential reads a credential. Codes dns_credential_unknown, settings_record.
func (s *Service) credential(ctx context.Context, id string) (settings.DNS, int64, error) {
	d, at, err := settings.Get(ctx, s.cfg.Store, settings.DNSKey(id))
	if !settings.ValidID(id) || settings.Absent(err) {
		return d, 0, fault.New("dns_credential_unknown", "dns credential not found").WithFix("`dstack gateway credential ls` lists them")
	}
	return d, at, err
}

func (s *Service) listDNSCredentials(ctx context.Context, _ *empty) (*api.ListDnsCredentialsResponse, error) {
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	out := &api.ListDnsCredentialsResponse{}
	for _, id := range slices.Sorted(maps.Keys(all.DNS)) {
		out.Credentials = append(out.Credentials, credentialInfo(id, all.DNS[id]))
	}
	if all.DefaultDNS != "" {
		out.DefaultId = &all.DefaultDNS
	}
	return out, nil
}

func (s *Service) getDNSCredential(ctx context.Context, r *api.GetDnsCredentialRequest) (*api.DnsCredentialInfo, error) {
	d, _, err := s.credential(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	return credentialInfo(r.Id, d), nil
}

// within gives seconds that are given, or a default; 0 is refused. Code dns_credential.
func within(name string, given *uint32, def uint32) (time.Duration, error) {
	v := def
	if given != nil {
		v = *given
	}
	if v == 0 || time.Duration(v)*time.Second > settings.LongestWait {
		return 0, fault.New("dns_credential", "%s is %d, not from 1 to %d seconds", name, v, int(settings.LongestWait/time.Second))
	}
	return time.Duration(v) * time.Second, nil
}

func checkAPI(given *string) error {
	if given != nil && *given != "" && strings.TrimSuffix(*given, "/") != cloudflareAPI {
		return fault.New("dns_credential", "another address of Cloudflare's API than %s is not taken: it would get the token", cloudflareAPI).WithFix("leave cf_api_url empty")
	}
	return nil
}

func (s *Service) createDNSCredential(ctx context.Context, r *api.CreateDnsCredentialRequest) (*api.DnsCredentialInfo, error) {
	now := s.now()
	d := settings.DNS{Name: r.Name, Provider: r.ProviderType, Params: map[string]string{}, Created: now, Updated: now}
	maps.Copy(d.Params, r.Settings)
	if r.CfApiToken != "" {
		d.Params["api_token"] = r.CfApiToken
	}
	if err := s.timed(&d, r.DnsTxtTtl, r.MaxDnsWait, r.CfApiUrl, defaultTTL, defaultWait); err != nil {
		return nil, err
	}
	suffix := make([]byte, 4)
	rand.Read(suffix)
	id := strconv.FormatInt(now.UnixMilli(), 16) + hex.EncodeToString(suffix)
	if err := settings.Put(ctx, s.cfg.Store, settings.DNSKey(id), d, 0); err != nil {
		return nil, err
	}
	if r.SetAsDefault {
		if err := settings.Put(ctx, s.cfg.Store, settings.DefaultDNSKey, settings.DefaultDNS{ID: id}, settings.Any); err != nil {
			return nil, err
		}
	}
	return credentialInfo(id, d), nil
}

// timed sets the times of a credential, in seconds, and checks it as a whole.
func (s *Service) timed(d *settings.DNS, ttl, wait *uint32, apiURL *string, usualTTL, usualWait uint32) (err error) {
	if d.TTL, err = within("dns_txt_ttl", ttl, usualTTL); err != nil {
		return err
	}
	if d.Wait, err = within("max_dns_wait", wait, usualWait); err != nil {
		return err
	}
	if err := checkAPI(apiURL); err != nil {
		return err
	}
	return s.cfg.CheckDNS(d.Provider, d.Params)
}

func (s *Service) updateDNSCredential(ctx context.Context, r *api.UpdateDnsCredentialRequest) (*api.DnsCredentialInfo, error) {
	d, at, err := s.credential(ctx, r.Id)
	if err != nil {
		return nil, err
	}
	if r.Name != nil {
		d.Name = *r.Name
	}
	maps.Copy(d.Params, r.Settings)
	if r.CfApiToken != nil && *r.CfApiToken != "" {
		d.Params["api_token"] = *r.CfApiToken
	}
	if err := s.timed(&d, r.DnsTxtTtl, r.MaxDnsWait, r.CfApiUrl, uint32(d.TTL/time.Second), uint32(d.Wait/time.Second)); err != nil {
		return nil, err
	}
	d.Updated = s.now()
	if err := settings.Put(ctx, s.cfg.Store, settings.DNSKey(r.Id), d, at); err != nil {
		return nil, err
	}
	return credentialInfo(r.Id, d), nil
}

func (s *Service) deleteDNSCredential(ctx context.Context, r *api.DeleteDnsCredentialRequest) (*empty, error) {
	_, at, err := s.credential(ctx, r.Id)
	if err != nil && fault.Code(err) != "settings_record" {
		return nil, err
	}
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	if all.DefaultDNS == r.Id {
		return nil, fault.New("dns_credential_used", "the credential is the default one").WithFix("make another one the default first")
	}
	for _, name := range slices.Sorted(maps.Keys(all.Domains)) {
		if all.Domains[name].DNS == r.Id {
			return nil, fault.New("dns_credential_used", "the base domain %s uses the credential", name).WithFix("give it another one first")
		}
	}
	return nil, settings.Delete(ctx, s.cfg.Store, settings.DNSKey(r.Id), at)
}

func (s *Service) getDefaultDNSCredential(ctx context.Context, _ *empty) (*api.GetDefaultDnsCredentialResponse, error) {
	def, _, err := settings.Get(ctx, s.cfg.Store, settings.DefaultDNSKey)
	if settings.Absent(err) {
		return &api.GetDefaultDnsCredentialResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	out := &api.GetDefaultDnsCredentialResponse{DefaultId: def.ID}
	d, _, err := s.credential(ctx, def.ID)
	if err == nil {
		out.Credential = credentialInfo(def.ID, d)
	} else if fault.Code(err) != "dns_credential_unknown" {
		return nil, err
	}
	return out, nil
}

func (s *Service) setDefaultDNSCredential(ctx context.Context, r *api.SetDefaultDnsCredentialRequest) (*empty, error) {
	if _, _, err := s.credential(ctx, r.Id); err != nil {
		return nil, err
	}
	return nil, settings.Put(ctx, s.cfg.Store, settings.DefaultDNSKey, settings.DefaultDNS{ID: r.Id}, settings.Any)
}

// fixed is a base domain of the configuration file.
func (s *Service) fixed(name hostname.Name) (gateway.Domain, bool) {
	i := slices.IndexFunc(s.cfg.Fixed, func(d gateway.Domain) bool { return d.Name == name })
	if i < 0 {
		return gateway.Domain{}, false
	}
	return s.cfg.Fixed[i], true
}

func errFixed(name hostname.Name) error {
	return fault.New("domain_fixed", "%s is in the gateway's configuration file, which is measured", name).WithFix("change core.domains, and deploy the gateway anew")
}

func (s *Service) domainInfo(name hostname.Name, d settings.Domain) *api.ZtDomainInfo {
	c := &api.ZtDomainConfig{Domain: string(name), Port: uint32(d.Port), Priority: d.Priority}
	if d.DNS != "" {
		c.DnsCredId = &d.DNS
	}
	if d.Node != 0 {
		c.Node = &d.Node
	}
	var st CertificateStatus
	switch {
	case s.cfg.Certificates != nil:
		st = s.cfg.Certificates.Status(name)
	case s.cfg.Private != nil:
		st = s.cfg.Private()
	}
	out := &api.ZtDomainInfo{Config: c, CertStatus: &api.ZtDomainCertStatus{Error: st.Err}}
	if !st.NotAfter.IsZero() {
		out.CertStatus.HasCert, out.CertStatus.NotAfter, out.CertStatus.IssuedAt, out.CertStatus.LoadedInMemory = true, seconds(st.NotAfter), seconds(st.NotBefore), st.Served
	}
	return out
}

func (s *Service) listZtDomains(ctx context.Context, _ *empty) (*api.ListZtDomainsResponse, error) {
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	out := &api.ListZtDomainsResponse{}
	for _, d := range s.cfg.Fixed {
		out.Domains = append(out.Domains, s.domainInfo(d.Name, settings.Domain{Port: d.Port}))
	}
	for _, name := range all.Names(s.cfg.Node().ID) {
		if _, ok := s.fixed(name); !ok {
			out.Domains = append(out.Domains, s.domainInfo(name, all.Domains[name]))
		}
	}
	return out, nil
}

var errNoDomain = fault.New("domain_unknown", "ZT-Domain config not found").WithFix("`dstack gateway domain ls` lists them")

// domain reads a base domain that operators added. Codes host_base, domain_fixed,
// domain_unknown, settings_record.
func (s *Service) domain(ctx context.Context, text string) (hostname.Name, settings.Domain, int64, error) {
	name, err := hostname.ParseBase(text)
	if err != nil {
		return "", settings.Domain{}, 0, err
	}
	if _, ok := s.fixed(name); ok {
		return name, settings.Domain{}, 0, errFixed(name)
	}
	d, at, err := settings.Get(ctx, s.cfg.Store, settings.DomainKey(name))
	if settings.Absent(err) {
		err = errNoDomain
	}
	return name, d, at, err
}

func (s *Service) getZtDomain(ctx context.Context, r *api.GetZtDomainRequest) (*api.ZtDomainInfo, error) {
	name, d, _, err := s.domain(ctx, r.Domain)
	if f, ok := s.fixed(name); ok {
		return s.domainInfo(name, settings.Domain{Port: f.Port}), nil
	}
	if err != nil {
		return nil, err
	}
	return s.domainInfo(name, d), nil
}

// parseDomain judges a request. Codes host_base, domain_port, domain_fixed, domain_node,
// dns_credential_unknown, dns_credential (none, where a public authority wants one), those
// of CheckDomain.
func (s *Service) parseDomain(ctx context.Context, r *api.ZtDomainConfig) (hostname.Name, settings.Domain, error) {
	name, err := hostname.ParseBase(r.Domain)
	if err != nil {
		return "", settings.Domain{}, err
	}
	if _, ok := s.fixed(name); ok {
		return name, settings.Domain{}, errFixed(name)
	}
	if r.Port == 0 || r.Port > 65535 {
		return name, settings.Domain{}, fault.New("domain_port", "the port %d is not from 1 to 65535", r.Port)
	}
	d := settings.Domain{Port: uint16(r.Port), Priority: r.Priority}
	if r.Node != nil {
		if d.Node = *r.Node; d.Node == 0 {
			return name, d, fault.New("domain_node", "gateways are numbered from 1").WithFix("leave node out for all gateways")
		}
	}
	if r.DnsCredId != nil {
		if d.DNS = *r.DnsCredId; d.DNS != "" {
			if _, _, err := s.credential(ctx, d.DNS); err != nil {
				return name, d, err
			}
		}
	}
	if s.cfg.Certificates != nil && d.DNS == "" {
		if def, err := s.getDefaultDNSCredential(ctx, nil); err != nil {
			return name, d, err
		} else if def.Credential == nil {
			return name, d, fault.New("dns_credential", "there is neither a credential for %s nor a default one, and a wildcard is proven by DNS alone", name).
				WithFix("`dstack gateway credential add` first")
		}
	}
	if s.cfg.CheckDomain != nil {
		if err := s.cfg.CheckDomain(name); err != nil {
			return name, d, err
		}
	}
	return name, d, nil
}

func (s *Service) addZtDomain(ctx context.Context, r *api.ZtDomainConfig) (*api.ZtDomainInfo, error) {
	name, d, err := s.parseDomain(ctx, r)
	if err != nil {
		return nil, err
	}
	err = settings.Put(ctx, s.cfg.Store, settings.DomainKey(name), d, 0)
	if fault.Code(err) == "state_conflict" {
		return nil, fault.New("domain_exists", "the base domain %s is there already", name).WithFix("UpdateZtDomain changes it")
	}
	if err != nil {
		return nil, err
	}
	return s.domainInfo(name, d), nil
}

func (s *Service) updateZtDomain(ctx context.Context, r *api.ZtDomainConfig) (*api.ZtDomainInfo, error) {
	_, _, at, err := s.domain(ctx, r.Domain)
	if err != nil && fault.Code(err) != "settings_record" { // which a new value mends
		return nil, err
	}
	name, d, err := s.parseDomain(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := settings.Put(ctx, s.cfg.Store, settings.DomainKey(name), d, at); err != nil {
		return nil, err
	}
	return s.domainInfo(name, d), nil
}

// deleteZtDomain ends the routing of a base domain: its names lead nowhere any more, and
// its certificate is not served (upstream's stays routable).
func (s *Service) deleteZtDomain(ctx context.Context, r *api.DeleteZtDomainRequest) (*empty, error) {
	name, _, at, err := s.domain(ctx, r.Domain)
	if err != nil && fault.Code(err) != "settings_record" {
		return nil, err
	}
	return nil, settings.Delete(ctx, s.cfg.Store, settings.DomainKey(name), at)
}

// names are all base domains.
func (s *Service) names(ctx context.Context) ([]hostname.Name, error) {
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	var out []hostname.Name
	for _, d := range s.cfg.Fixed {
		out = append(out, d.Name)
	}
	for _, n := range all.Names(s.cfg.Node().ID) {
		if !slices.Contains(out, n) {
			out = append(out, n)
		}
	}
	return out, nil
}

func (s *Service) certificates() (Certificates, error) {
	if s.cfg.Certificates == nil {
		return nil, unavailable("this gateway has no public authority: its private CA makes certificates by itself", "set core.acme.directories")
	}
	return s.cfg.Certificates, nil
}

// each does something for all base domains, and says of which it failed.
func (s *Service) each(ctx context.Context, do func(hostname.Name) error) error {
	names, err := s.names(ctx)
	if err != nil {
		return err
	}
	var errs []error
	var failed []string
	for _, name := range names {
		if err := do(name); err != nil {
			errs, failed = append(errs, err), append(failed, string(name))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	code := fault.Code(errs[0])
	if code == "" {
		code = "admin_certificates"
	}
	return fault.Wrap(errors.Join(errs...), code, "%d of %d base domains: %s", len(failed), len(names), strings.Join(failed, ", "))
}

func (s *Service) renewCert(ctx context.Context, _ *empty) (*api.RenewCertResponse, error) {
	c, err := s.certificates()
	if err != nil {
		return nil, err
	}
	out := &api.RenewCertResponse{}
	err = s.each(ctx, func(name hostname.Name) error {
		renewed, _, err := c.Renew(ctx, name, false)
		out.Renewed = out.Renewed || renewed
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

func (s *Service) reloadCert(ctx context.Context, _ *empty) (*empty, error) {
	c, err := s.certificates()
	if err != nil {
		return nil, err
	}
	return nil, s.each(ctx, func(name hostname.Name) error { return c.Reload(ctx, name) })
}

// anyDomain finds a base domain, of the file or of operators.
func (s *Service) anyDomain(ctx context.Context, text string) (hostname.Name, error) {
	name, _, _, err := s.domain(ctx, text)
	if fault.Code(err) == "domain_fixed" {
		err = nil
	}
	return name, err
}

func (s *Service) renewZtDomainCert(ctx context.Context, r *api.RenewZtDomainCertRequest) (*api.RenewZtDomainCertResponse, error) {
	c, err := s.certificates()
	if err != nil {
		return nil, err
	}
	name, err := s.anyDomain(ctx, r.Domain)
	if err != nil {
		return nil, err
	}
	renewed, notAfter, err := c.Renew(ctx, name, r.Force)
	if err != nil {
		return nil, err
	}
	return &api.RenewZtDomainCertResponse{Renewed: renewed, NotAfter: seconds(notAfter)}, nil
}

func (s *Service) forceReleaseCertLock(ctx context.Context, r *api.ForceReleaseCertLockRequest) (*empty, error) {
	c, err := s.cluster()
	if err != nil {
		return nil, err
	}
	name, err := s.anyDomain(ctx, r.Domain)
	if err != nil {
		return nil, err
	}
	return nil, c.ReleaseLock(ctx, name)
}

func (s *Service) listCertAttestations(ctx context.Context, r *api.ListCertAttestationsRequest) (*api.ListCertAttestationsResponse, error) {
	c, err := s.certificates()
	if err != nil {
		return nil, err
	}
	name, err := s.anyDomain(ctx, r.Domain)
	if err != nil {
		return nil, err
	}
	keys, err := c.Attested(ctx, name, int(min(r.Limit, 1<<20)))
	if err != nil {
		return nil, err
	}
	out := &api.ListCertAttestationsResponse{}
	for _, k := range keys {
		out.History = append(out.History, &api.CertAttestationInfo{PublicKey: k.SPKI, Quote: k.Quote, GeneratedAt: seconds(k.At)})
	}
	if len(out.History) > 0 {
		out.Latest = out.History[0]
	}
	return out, nil
}

func (s *Service) accounts() (Accounts, error) {
	if s.cfg.Accounts == nil {
		return nil, unavailable("this gateway has no account at a public authority", "set core.acme.directories")
	}
	return s.cfg.Accounts, nil
}

func (s *Service) setCAA(ctx context.Context, _ *empty) (*empty, error) {
	a, err := s.accounts()
	if err != nil {
		return nil, err
	}
	return nil, a.SetCAA(ctx)
}

func (s *Service) rotateAcmeCredentials(ctx context.Context, _ *empty) (*api.RotateAcmeCredentialsResponse, error) {
	a, err := s.accounts()
	if err != nil {
		return nil, err
	}
	uri, n, err := a.RotateAccount(ctx)
	if err != nil {
		return nil, err
	}
	return &api.RotateAcmeCredentialsResponse{AccountUri: uri, DomainsUpdated: uint32(n)}, nil
}

func (s *Service) ctStatus(context.Context, *empty) (*api.CtStatusResponse, error) {
	w, err := s.watch()
	if err != nil {
		return nil, err
	}
	return w.Response(), nil
}

func (s *Service) ctAcknowledge(_ context.Context, r *api.CtAcknowledgeRequest) (*api.CtStatusResponse, error) {
	w, err := s.watch()
	if err == nil {
		err = w.Acknowledge(r.Log, r.Index)
	}
	if err != nil {
		return nil, err
	}
	return w.Response(), nil
}

func (s *Service) watch() (Watch, error) {
	if s.cfg.CT == nil {
		return nil, unavailable("this gateway watches no certificate logs", "set core.ct.logs")
	}
	return s.cfg.CT, nil
}

func (s *Service) getCertbotConfig(ctx context.Context, _ *empty) (*api.CertbotConfigResponse, error) {
	c, _, err := settings.Get(ctx, s.cfg.Store, settings.CertbotKey)
	if err != nil && !settings.Absent(err) {
		return nil, err
	}
	out := &api.CertbotConfigResponse{
		RenewIntervalSecs: uint64(c.RenewInterval / time.Second), RenewBeforeExpirationSecs: uint64(c.RenewBefore / time.Second),
		RenewTimeoutSecs: uint64(c.RenewTimeout / time.Second), AcmeUrl: c.URL,
	}
	if out.AcmeUrl == "" && len(s.cfg.Directories) > 0 {
		out.AcmeUrl = s.cfg.Directories[0]
	}
	return out, nil
}

// setCertbotConfig changes the times of renewal. Which authorities there are is the
// configuration file's to say, which is measured: a call may name the one that it has.
func (s *Service) setCertbotConfig(ctx context.Context, r *api.SetCertbotConfigRequest) (*empty, error) {
	if _, err := s.certificates(); err != nil {
		return nil, err
	}
	c, at, err := settings.Get(ctx, s.cfg.Store, settings.CertbotKey)
	if err != nil && !settings.Absent(err) && fault.Code(err) != "settings_record" {
		return nil, err
	}
	for _, f := range []struct {
		name  string
		given *uint64
		into  *time.Duration
		most  time.Duration
	}{
		{"renew_interval_secs", r.RenewIntervalSecs, &c.RenewInterval, settings.LongestRenewInterval},
		{"renew_before_expiration_secs", r.RenewBeforeExpirationSecs, &c.RenewBefore, settings.LongestRenewBefore},
		{"renew_timeout_secs", r.RenewTimeoutSecs, &c.RenewTimeout, settings.LongestRenewTimeout},
	} {
		if f.given == nil {
			continue
		}
		if *f.given == 0 && f.name == "renew_timeout_secs" || *f.given > uint64(f.most/time.Second) {
			return nil, fault.New("certbot_config", "%s is %d, more than %d or no time", f.name, *f.given, int64(f.most/time.Second))
		}
		*f.into = time.Duration(*f.given) * time.Second
	}
	if r.AcmeUrl != nil && *r.AcmeUrl != "" {
		if !slices.Contains(s.cfg.Directories, *r.AcmeUrl) {
			return nil, fault.New("certbot_config", "%q is none of this gateway's authorities", clip(*r.AcmeUrl)).WithFix("name it in core.acme.directories, and deploy the gateway anew")
		}
		c.URL = *r.AcmeUrl
	}
	return nil, settings.Put(ctx, s.cfg.Store, settings.CertbotKey, c, at)
}
