// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dstack-go/dstack"
	gatewayapi "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

type gatewayCmd struct {
	Status     gatewayStatusCmd     `cmd:"" help:"Show a gateway: who it is, which gateways it knows, how much it carries."`
	Routes     gatewayRoutesCmd     `cmd:"" help:"List the instances that it routes to."`
	Drain      gatewayDrainCmd      `cmd:"" help:"Give an instance, or the gateway itself, no new connections."`
	Resume     gatewayResumeCmd     `cmd:"" help:"Give it new connections again."`
	Remove     gatewayRemoveCmd     `cmd:"" help:"End the routes of an instance or an app now, at all gateways; only newer evidence brings them back."`
	Domain     gatewayDomainCmd     `cmd:"" help:"Base domains beside those of the configuration file."`
	Credential gatewayCredentialCmd `cmd:"" help:"Rights to change zones at DNS providers, for certificates of base domains."`
	Policy     gatewayPolicyCmd     `cmd:"" help:"Which ports of an instance the gateways let through."`
	Cert       gatewayCertCmd       `cmd:"" help:"Certificates of base domains."`
	CAA        gatewayCAACmd        `cmd:"" name:"caa" help:"CAA records of base domains, and the accounts that they name."`
	CT         gatewayCTCmd         `cmd:"" name:"ct" help:"What the watch of certificate logs found."`
	Node       gatewayNodeCmd       `cmd:"" help:"Say whether a gateway takes registrations, or where it is reached."`
	Members    gatewayMembersCmd    `cmd:"" help:"List the members of the gateway's cluster."`
	Invite     gatewayInviteCmd     `cmd:"" help:"Let one gateway join the cluster within the hour; prints the token that it shows."`
	Join       gatewayJoinCmd       `cmd:"" help:"Make the gateway a member of another's cluster."`
	Leave      gatewayLeaveCmd      `cmd:"" help:"Take a member out of the cluster for good; this gateway itself unless another is named."`
	Quarantine gatewayQuarantineCmd `cmd:"" help:"List records that were not applied, and why."`
}

// adminFlags say which gateway. Tokens are in files or asked for, never arguments, which
// every process sees.
type adminFlags struct {
	Admin     string `help:"Where administrators call: unix:/path, or a URL; the stack's own gateway by default." placeholder:"URL"`
	TokenFile string `name:"token-file" help:"File whose first line is the administrators' token for --admin URL; asked for otherwise." type:"path" placeholder:"FILE"`
	CAFile    string `name:"ca" help:"Certificates that the gateway at an https URL is checked with; the system's by default." type:"path" placeholder:"FILE"`
}

// bearer adds the token to each request.
type bearer struct {
	token string
	http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("X-Admin-Token", b.token)
	return b.RoundTripper.RoundTrip(r)
}

// client reaches the gateway. Codes gateway_absent, gateway_admin.
func (f *adminFlags) client(a *app) (*prpc.Client, error) {
	file, ok := strings.CutPrefix(f.Admin, "unix:")
	if f.Admin == "" {
		if _, err := a.stack.Gateway(); err != nil {
			return nil, err
		}
		file, ok = a.stack.GatewayAdmin(), true
	}
	if ok {
		return prpc.NewClient("http://gateway/prpc", func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", file)
		}), nil
	}
	u, err := url.Parse(f.Admin)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, usage("--admin is unix:/path or a URL without user and query")
	}
	transport := &http.Transport{DisableCompression: true}
	switch u.Scheme {
	case "http":
		if addr, err := netip.ParseAddr(u.Hostname()); u.Hostname() != "localhost" && (err != nil || !addr.IsLoopback()) {
			return nil, fault.New("gateway_admin", "the token would cross the network to %s in plain text", u.Host).WithFix("use https, or a tunnel to its loopback")
		}
	case "https":
		config := &tls.Config{MinVersion: tls.VersionTLS12}
		if f.CAFile != "" {
			text, err := readLimited(f.CAFile, 1<<20)
			if err != nil {
				return nil, err
			}
			if config.RootCAs = x509.NewCertPool(); !config.RootCAs.AppendCertsFromPEM(text) {
				return nil, usage("--ca: %s has no certificate", f.CAFile)
			}
		}
		transport.TLSClientConfig = config
	default:
		return nil, usage("--admin is unix:/path or an http or https URL")
	}
	token, err := readSecret(a, f.TokenFile, "administrators' token", fault.New("gateway_admin", "the administrators' token is missing").WithFix("--token-file FILE"))
	if err != nil {
		return nil, err
	}
	base := strings.TrimSuffix(u.String(), "/")
	return &prpc.Client{BaseURL: base + "/prpc", HTTP: &http.Client{
		Transport:     bearer{string(token), transport},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// ask calls a method, and prints the answer when JSON is wanted.
func (f *adminFlags) ask(a *app, method string, req, resp proto.Message) error {
	c, err := f.client(a)
	if err != nil {
		return err
	}
	return askOf(a, c, method, req, resp)
}

func askOf(a *app, c *prpc.Client, method string, req, resp proto.Message) error {
	if err := c.Call(a.ctx, method, req, resp); err != nil {
		if fault.Code(err) == "" {
			return fault.Wrap(err, "gateway_admin", "the gateway does not answer administrators").WithFix("`dstack up` starts the stack's own; --admin names another")
		}
		return err
	}
	return nil
}

// show prints an answer when JSON is wanted; nil is that it is done.
func show(a *app, resp proto.Message) error {
	if resp == nil {
		return a.result(map[string]any{"done": true})
	}
	text, err := prpc.MarshalJSON(resp)
	if err != nil {
		return err
	}
	return a.result(json.RawMessage(text))
}

// act calls a method that answers nothing.
func (f *adminFlags) act(a *app, method string, req proto.Message, done string, args ...any) error {
	if err := f.ask(a, method, req, nil); err != nil {
		return err
	}
	a.step(done, args...)
	return show(a, nil)
}

// ago is a moment of a reply for people.
func ago(at uint64) string {
	if at == 0 {
		return "never"
	}
	return time.Since(time.Unix(int64(at), 0)).Round(time.Second).String() + " ago"
}

func until(at uint64) string {
	if at == 0 {
		return "none"
	}
	return time.Unix(int64(at), 0).UTC().Format(time.RFC3339)
}

type gatewayStatusCmd struct{ adminFlags }

func (c *gatewayStatusCmd) Run(a *app) error {
	var r gatewayapi.StatusResponse
	if err := c.ask(a, "Status", nil, &r); err != nil {
		return err
	}
	state := "serving"
	if r.Draining {
		state = a.paint(amber, "draining")
	}
	a.printf("Gateway      %d, %s\nURL          %s\nTrust        %s\nTunnel       %s\nConnections  %d\nRoutes       %d\n", r.Id, state, printable(r.Url), printable(r.Trust), printable(r.Tunnel), r.NumConnections, len(r.Hosts))
	for _, n := range r.Nodes {
		a.printf("Node         %d  %s  %s\n", n.Id, printable(n.Url), printable(n.WgEndpoint))
	}
	return show(a, &r)
}

type gatewayRoutesCmd struct{ adminFlags }

func (c *gatewayRoutesCmd) Run(a *app) error {
	var r gatewayapi.StatusResponse
	if err := c.ask(a, "Status", nil, &r); err != nil {
		return err
	}
	if len(r.Hosts) == 0 {
		a.printf("The gateway routes to nobody.\n")
	}
	for _, h := range r.Hosts {
		note := ""
		if h.Draining {
			note = "  draining"
		}
		a.printf("%s  app %s  %s\n    seen %s, %d connections, until %s%s\n", printable(h.InstanceId), printable(h.AppId), printable(h.Ip), ago(h.LatestHandshake), h.NumConnections, until(h.LeaseUntil), note)
	}
	return show(a, &r)
}

type gatewayDrainCmd struct {
	adminFlags
	Instance string `arg:"" optional:"" help:"Instance id; the gateway itself without one."`
}

func (c *gatewayDrainCmd) Run(a *app) error {
	return c.act(a, "Drain", &gatewayapi.DrainRequest{InstanceId: c.Instance, On: true}, "%s gets no new connections", orSelf(c.Instance))
}

type gatewayResumeCmd struct {
	adminFlags
	Instance string `arg:"" optional:"" help:"Instance id; the gateway itself without one."`
}

func (c *gatewayResumeCmd) Run(a *app) error {
	return c.act(a, "Drain", &gatewayapi.DrainRequest{InstanceId: c.Instance}, "%s gets new connections", orSelf(c.Instance))
}

func orSelf(instance string) string {
	if instance == "" {
		return "the gateway"
	}
	return "instance " + instance
}

type gatewayRemoveCmd struct {
	adminFlags
	ID  string `arg:"" name:"instance" help:"Instance id, or with --app an app id."`
	App bool   `help:"Remove all instances of an app."`
}

func (c *gatewayRemoveCmd) Run(a *app) error {
	if _, err := dstack.ParseAppID(c.ID); err != nil {
		return usage("an id has 40 hexadecimal digits")
	}
	req := &gatewayapi.RemoveRoutesRequest{InstanceId: c.ID}
	if c.App {
		req = &gatewayapi.RemoveRoutesRequest{AppId: c.ID}
	}
	var r gatewayapi.RemoveRoutesResponse
	if err := c.ask(a, "RemoveRoutes", req, &r); err != nil {
		return err
	}
	a.step("%d routes are removed", r.Removed)
	return show(a, &r)
}

type gatewayDomainCmd struct {
	Add gatewayDomainAddCmd `cmd:"" help:"Add a base domain: names directly under it lead to apps."`
	Set gatewayDomainSetCmd `cmd:"" help:"Change one that was added; what is not given is as for add."`
	Ls  gatewayDomainLsCmd  `cmd:"" help:"List the base domains and their certificates."`
	Rm  gatewayDomainRmCmd  `cmd:"" help:"Remove one that was added: its names lead nowhere then."`
}

type domainFlags struct {
	adminFlags
	Domain     string `arg:"" help:"Such as apps.example.org."`
	Port       uint16 `help:"Port at which its names are reached." default:"443"`
	Credential string `help:"Id of the DNS credential; the default one without." placeholder:"ID"`
	Node       uint32 `help:"Only this gateway tells its guests of it first." placeholder:"N"`
	Priority   int32  `help:"The highest is told first." default:"0"`
}

func (f *domainFlags) set(a *app, method, done string) error {
	req := &gatewayapi.ZtDomainConfig{Domain: f.Domain, Port: uint32(f.Port), Priority: f.Priority}
	if f.Credential != "" {
		req.DnsCredId = &f.Credential
	}
	if f.Node != 0 {
		req.Node = &f.Node
	}
	var r gatewayapi.ZtDomainInfo
	if err := f.ask(a, method, req, &r); err != nil {
		return err
	}
	a.step(done, printable(r.GetConfig().GetDomain()))
	return show(a, &r)
}

type gatewayDomainAddCmd struct{ domainFlags }

func (c *gatewayDomainAddCmd) Run(a *app) error {
	return c.set(a, "AddZtDomain", "%s is a base domain")
}

type gatewayDomainSetCmd struct{ domainFlags }

func (c *gatewayDomainSetCmd) Run(a *app) error { return c.set(a, "UpdateZtDomain", "%s is changed") }

type gatewayDomainLsCmd struct{ adminFlags }

func (c *gatewayDomainLsCmd) Run(a *app) error {
	var r gatewayapi.ListZtDomainsResponse
	if err := c.ask(a, "ListZtDomains", nil, &r); err != nil {
		return err
	}
	for _, d := range r.Domains {
		cert := "no certificate of a public authority"
		if d.GetCertStatus().GetHasCert() {
			cert = "certificate until " + until(d.CertStatus.NotAfter)
		}
		a.printf("%s:%d  priority %d  %s\n", printable(d.GetConfig().GetDomain()), d.GetConfig().GetPort(), d.GetConfig().GetPriority(), cert)
		if why := d.GetCertStatus().GetError(); why != "" {
			a.printf("  %s\n", a.paint(amber, printable(why)))
		}
	}
	return show(a, &r)
}

type gatewayDomainRmCmd struct {
	adminFlags
	Domain string `arg:"" help:"The base domain."`
}

func (c *gatewayDomainRmCmd) Run(a *app) error {
	return c.act(a, "DeleteZtDomain", &gatewayapi.DeleteZtDomainRequest{Domain: c.Domain}, "%s is no base domain any more", c.Domain)
}

type gatewayCredentialCmd struct {
	Add     gatewayCredentialAddCmd     `cmd:"" help:"Add one. Its secret is the first line of --secret-file, or of the standard input."`
	Ls      gatewayCredentialLsCmd      `cmd:"" help:"List them, without their secrets."`
	Rm      gatewayCredentialRmCmd      `cmd:"" help:"Remove one that no base domain uses."`
	Default gatewayCredentialDefaultCmd `cmd:"" help:"Make one that of base domains that name none."`
}

// secretOf names the parameter of a DNS provider that is secret.
var secretOf = map[string]string{"cloudflare": "api_token", "gandi": "token", "hetzner": "token", "rfc2136": "key"}

type gatewayCredentialAddCmd struct {
	adminFlags
	Name       string            `arg:"" help:"A name for people."`
	Provider   string            `help:"${enum}." enum:"cloudflare,gandi,hetzner,rfc2136" default:"cloudflare"`
	Set        map[string]string `help:"Other parameters, none of them secret: server, key_name and key_alg of rfc2136." placeholder:"KEY=VALUE"`
	SecretFile string            `name:"secret-file" help:"File whose first line is the token or key; asked for otherwise." type:"path" placeholder:"FILE"`
	Default    bool              `help:"Make it that of base domains that name none."`
	TTL        uint32            `name:"ttl" help:"Of TXT records, in seconds." default:"60"`
	Wait       uint32            `help:"How long to wait until a record is seen, in seconds." default:"300"`
}

func (c *gatewayCredentialAddCmd) Run(a *app) error {
	name := secretOf[c.Provider]
	if _, ok := c.Set[name]; ok {
		return usage("--set %s would be seen by every process: --secret-file or the standard input takes it", name)
	}
	if c.SecretFile == "" && c.TokenFile == "" && strings.HasPrefix(c.Admin, "http") {
		return usage("with --admin URL one of --token-file and --secret-file is needed: only one secret can be asked for")
	}
	client, err := c.client(a)
	if err != nil {
		return err
	}
	secret, err := readSecret(a, c.SecretFile, "secret of the DNS provider", fault.New("gateway_secret", "the DNS provider's secret is missing").WithFix("--secret-file FILE, or the standard input"))
	if err != nil {
		return err
	}
	defer clear(secret)
	req := &gatewayapi.CreateDnsCredentialRequest{Name: c.Name, ProviderType: c.Provider, SetAsDefault: c.Default, DnsTxtTtl: &c.TTL, MaxDnsWait: &c.Wait, Settings: map[string]string{name: string(secret)}}
	for k, v := range c.Set {
		req.Settings[k] = v
	}
	var r gatewayapi.DnsCredentialInfo
	if err := askOf(a, client, "CreateDnsCredential", req, &r); err != nil {
		return err
	}
	a.step("credential %s is added", printable(r.Id))
	a.printf("%s\n", printable(r.Id))
	return show(a, &r)
}

type gatewayCredentialLsCmd struct{ adminFlags }

func (c *gatewayCredentialLsCmd) Run(a *app) error {
	var r gatewayapi.ListDnsCredentialsResponse
	if err := c.ask(a, "ListDnsCredentials", nil, &r); err != nil {
		return err
	}
	for _, d := range r.Credentials {
		def := ""
		if r.DefaultId != nil && *r.DefaultId == d.Id {
			def = "  default"
		}
		a.printf("%s  %s  %s  ttl %d s, wait %d s%s\n", printable(d.Id), printable(d.Name), printable(d.ProviderType), d.GetDnsTxtTtl(), d.GetMaxDnsWait(), def)
	}
	return show(a, &r)
}

type gatewayCredentialRmCmd struct {
	adminFlags
	ID string `arg:"" name:"id" help:"Id of the credential."`
}

func (c *gatewayCredentialRmCmd) Run(a *app) error {
	return c.act(a, "DeleteDnsCredential", &gatewayapi.DeleteDnsCredentialRequest{Id: c.ID}, "credential %s is removed", c.ID)
}

type gatewayCredentialDefaultCmd struct {
	adminFlags
	ID string `arg:"" name:"id" help:"Id of the credential."`
}

func (c *gatewayCredentialDefaultCmd) Run(a *app) error {
	return c.act(a, "SetDefaultDnsCredential", &gatewayapi.SetDefaultDnsCredentialRequest{Id: c.ID}, "credential %s is the default", c.ID)
}

type gatewayPolicyCmd struct {
	Set   gatewayPolicySetCmd   `cmd:"" help:"Close all ports of an instance but these. Nothing is opened that the app measured shut."`
	Clear gatewayPolicyClearCmd `cmd:"" help:"Go by the app's own list again."`
	Show  gatewayPolicyShowCmd  `cmd:"" help:"Show both lists, and which counts."`
}

type gatewayPolicySetCmd struct {
	adminFlags
	Instance string   `arg:"" help:"Instance id."`
	Port     []string `help:"A port; with :pp behind it the app gets a PROXY header." placeholder:"N[:pp]"`
	Others   bool     `help:"Other ports are open too."`
}

func (c *gatewayPolicySetCmd) Run(a *app) error {
	p := &gatewayapi.PortPolicy{RestrictMode: !c.Others}
	for _, text := range c.Port {
		number, pp := strings.CutSuffix(text, ":pp")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || n == 0 {
			return usage("--port %q is no port from 1 to 65535, with or without :pp", text)
		}
		p.Ports = append(p.Ports, &gatewayapi.PortAttrs{Port: uint32(n), Pp: pp})
	}
	return c.act(a, "SetInstancePortPolicy", &gatewayapi.SetInstancePortPolicyRequest{InstanceId: c.Instance, Policy: p}, "instance %s has the operator's list of ports", c.Instance)
}

type gatewayPolicyClearCmd struct {
	adminFlags
	Instance string `arg:"" help:"Instance id."`
}

func (c *gatewayPolicyClearCmd) Run(a *app) error {
	return c.act(a, "ClearInstancePortPolicy", &gatewayapi.ClearInstancePortPolicyRequest{InstanceId: c.Instance}, "instance %s has its app's list of ports", c.Instance)
}

type gatewayPolicyShowCmd struct {
	adminFlags
	Instance string `arg:"" help:"Instance id."`
}

func (c *gatewayPolicyShowCmd) Run(a *app) error {
	var r gatewayapi.GetInstancePortPolicyResponse
	if err := c.ask(a, "GetInstancePortPolicy", &gatewayapi.GetInstancePortPolicyRequest{InstanceId: c.Instance}, &r); err != nil {
		return err
	}
	line := func(name string, p *gatewayapi.PortPolicy) {
		if p == nil {
			a.printf("%-10s none\n", name)
			return
		}
		var ports []string
		for _, port := range p.Ports {
			text := strconv.FormatUint(uint64(port.Port), 10)
			if port.Pp {
				text += ":pp"
			}
			ports = append(ports, text)
		}
		if !p.RestrictMode {
			ports = append(ports, "and all others")
		}
		if len(ports) == 0 {
			ports = []string{"no port"}
		}
		a.printf("%-10s %s\n", name, strings.Join(ports, ", "))
	}
	a.printf("%-10s %s\n", "Source", printable(r.Source))
	line("Effective", r.Effective)
	line("App", r.InstanceReported)
	line("Operator", r.AdminOverride)
	return show(a, &r)
}

type gatewayCertCmd struct {
	Renew  gatewayCertRenewCmd  `cmd:"" help:"Renew what is due."`
	Reload gatewayCertReloadCmd `cmd:"" help:"Take what another gateway has stored."`
	Unlock gatewayCertUnlockCmd `cmd:"" help:"Release the lock of a base domain's certificates whose holder is gone."`
}

type gatewayCertRenewCmd struct {
	adminFlags
	Domain string `arg:"" optional:"" help:"Base domain; all of them without one."`
	Force  bool   `help:"Renew it also when it is not due."`
}

func (c *gatewayCertRenewCmd) Run(a *app) error {
	if c.Force && c.Domain == "" {
		return usage("--force is for one base domain: authorities limit how many they certify")
	}
	var renewed bool
	var resp proto.Message
	if c.Domain == "" {
		r := &gatewayapi.RenewCertResponse{}
		if err := c.ask(a, "RenewCert", nil, r); err != nil {
			return err
		}
		renewed, resp = r.Renewed, r
	} else {
		r := &gatewayapi.RenewZtDomainCertResponse{}
		if err := c.ask(a, "RenewZtDomainCert", &gatewayapi.RenewZtDomainCertRequest{Domain: c.Domain, Force: c.Force}, r); err != nil {
			return err
		}
		renewed, resp = r.Renewed, r
	}
	if renewed {
		a.step("renewed")
	} else {
		a.step("nothing was due")
	}
	return show(a, resp)
}

type gatewayCertReloadCmd struct{ adminFlags }

func (c *gatewayCertReloadCmd) Run(a *app) error {
	return c.act(a, "ReloadCert", nil, "the certificates are loaded")
}

type gatewayCertUnlockCmd struct {
	adminFlags
	Domain string `arg:"" help:"Base domain."`
}

func (c *gatewayCertUnlockCmd) Run(a *app) error {
	return c.act(a, "ForceReleaseCertLock", &gatewayapi.ForceReleaseCertLockRequest{Domain: c.Domain}, "the lock of %s is released", c.Domain)
}

type gatewayCAACmd struct {
	Set    gatewayCAASetCmd    `cmd:"" help:"Make CAA of all base domains name the gateway's accounts alone."`
	Rotate gatewayCAARotateCmd `cmd:"" help:"Make a new account at the authority, and CAA name it."`
}

type gatewayCAASetCmd struct{ adminFlags }

func (c *gatewayCAASetCmd) Run(a *app) error { return c.act(a, "SetCaa", nil, "CAA is set") }

type gatewayCAARotateCmd struct{ adminFlags }

func (c *gatewayCAARotateCmd) Run(a *app) error {
	var r gatewayapi.RotateAcmeCredentialsResponse
	if err := c.ask(a, "RotateAcmeCredentials", nil, &r); err != nil {
		return err
	}
	a.step("the account is %s, which CAA of %d domains names", printable(r.AccountUri), r.DomainsUpdated)
	return show(a, &r)
}

type gatewayCTCmd struct {
	Show        gatewayCTShowCmd        `cmd:"" default:"withargs" help:"Show logs and alarms; exits with 1 when there are alarms."`
	Acknowledge gatewayCTAcknowledgeCmd `cmd:"" help:"End the alarms of an entry of a log, which you have looked into."`
}

type gatewayCTAcknowledgeCmd struct {
	adminFlags
	Log   string `arg:"" help:"Name of the log, as shown."`
	Entry uint64 `arg:"" help:"Number of the entry, as shown."`
}

func (c *gatewayCTAcknowledgeCmd) Run(a *app) error {
	var r gatewayapi.CtStatusResponse
	if err := c.ask(a, "CtAcknowledge", &gatewayapi.CtAcknowledgeRequest{Log: c.Log, Index: c.Entry}, &r); err != nil {
		return err
	}
	a.step("acknowledged; %d alarms are left", uint64(len(r.Alarms))+r.Dropped)
	return show(a, &r)
}

type gatewayCTShowCmd struct{ adminFlags }

func (c *gatewayCTShowCmd) Run(a *app) error {
	var r gatewayapi.CtStatusResponse
	if err := c.ask(a, "CtStatus", nil, &r); err != nil {
		return err
	}
	a.printf("Looked     %s\n", ago(r.CheckedAt))
	for _, l := range r.Logs {
		a.printf("Log        %s, %d entries  %s\n", printable(l.Name), l.Size, printable(l.Error))
	}
	for _, x := range r.Alarms {
		what := printable(x.Kind)
		switch x.Kind {
		case "certificate":
			what = fmt.Sprintf("%s has a key that no gateway attested (%s)", printable(strings.Join(x.Names, ", ")), hex.EncodeToString(x.Key))
		case "unreadable":
			what = "a certificate with one of our names cannot be read"
		case "fork":
			what = "the log signed two trees"
		}
		a.printf("%s  %s entry %d: %s, %s\n  %s\n", a.paint(red, "Alarm"), printable(x.Log), x.Index, what, ago(x.At), printable(x.Text))
	}
	if r.Dropped > 0 {
		a.printf("%s  %d more, for which there was no room\n", a.paint(red, "Alarm"), r.Dropped)
	}
	if err := show(a, &r); err != nil {
		return err
	}
	if len(r.Alarms) > 0 || r.Dropped > 0 {
		return exitError(exitFailed)
	}
	return nil
}

type gatewayNodeCmd struct {
	Ls   gatewayNodeLsCmd   `cmd:"" help:"List the gateways, and whether they are up."`
	Up   gatewayNodeUpCmd   `cmd:"" help:"Let a gateway take registrations, and guests be told of it."`
	Down gatewayNodeDownCmd `cmd:"" help:"Take a gateway out of what guests are told; it takes no new instances."`
	URL  gatewayNodeURLCmd  `cmd:"" name:"url" help:"Tell guests another URL of a gateway."`
}

type gatewayNodeLsCmd struct{ adminFlags }

func (c *gatewayNodeLsCmd) Run(a *app) error {
	var r gatewayapi.GetNodeStatusesResponse
	if err := c.ask(a, "GetNodeStatuses", nil, &r); err != nil {
		return err
	}
	for _, n := range r.Statuses {
		a.printf("%d  %s\n", n.NodeId, printable(n.Status))
	}
	return show(a, &r)
}

type gatewayNodeUpCmd struct {
	adminFlags
	Node uint32 `arg:"" help:"Number of the gateway."`
}

func (c *gatewayNodeUpCmd) Run(a *app) error {
	return c.act(a, "SetNodeStatus", &gatewayapi.SetNodeStatusRequest{Id: c.Node, Status: "up"}, "gateway %d is up", c.Node)
}

type gatewayNodeDownCmd struct {
	adminFlags
	Node uint32 `arg:"" help:"Number of the gateway."`
}

func (c *gatewayNodeDownCmd) Run(a *app) error {
	return c.act(a, "SetNodeStatus", &gatewayapi.SetNodeStatusRequest{Id: c.Node, Status: "down"}, "gateway %d is down", c.Node)
}

type gatewayNodeURLCmd struct {
	adminFlags
	Node uint32 `arg:"" help:"Number of the gateway."`
	URL  string `arg:"" name:"url" help:"Where guests reach it."`
}

func (c *gatewayNodeURLCmd) Run(a *app) error {
	return c.act(a, "SetNodeUrl", &gatewayapi.SetNodeUrlRequest{Id: c.Node, Url: c.URL}, "guests are told %s of gateway %d", c.URL, c.Node)
}

type gatewayMembersCmd struct{ adminFlags }

func printMembers(a *app, r *gatewayapi.ListMembersResponse) {
	for _, m := range r.Members {
		var notes []string
		for _, n := range []struct {
			is   bool
			word string
		}{{m.Leader, "leader"}, {m.Learner, "not voting yet"}, {!m.Reachable, a.paint(red, "not reached")}} {
			if n.is {
				notes = append(notes, n.word)
			}
		}
		a.printf("%s  %s  %s  %s\n", printable(m.Id), printable(m.Name), printable(m.Url), strings.Join(notes, ", "))
	}
	if !r.Quorum {
		a.printf("%s\n", a.paint(red, "No quorum: what is agreed cannot change."))
	}
}

func (c *gatewayMembersCmd) Run(a *app) error {
	var r gatewayapi.ListMembersResponse
	if err := c.ask(a, "ListMembers", nil, &r); err != nil {
		return err
	}
	printMembers(a, &r)
	return show(a, &r)
}

type gatewayInviteCmd struct {
	adminFlags
	Out string `short:"o" help:"Write the token into this file, 0600, instead of printing it." type:"path" placeholder:"FILE"`
}

func (c *gatewayInviteCmd) Run(a *app) error {
	var r gatewayapi.InviteMemberResponse
	if err := c.ask(a, "InviteMember", nil, &r); err != nil {
		return err
	}
	a.step("one gateway may join at %s until %s", printable(r.Address), until(r.Until))
	if c.Out != "" {
		f, err := os.OpenFile(c.Out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = f.WriteString(r.Token + "\n")
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
		r.Token = ""
		return show(a, &r)
	}
	a.printf("%s\n", printable(r.Token))
	return show(a, &r)
}

type gatewayJoinCmd struct {
	adminFlags
	URL       string `arg:"" name:"address" help:"host:port of a member, as its invitation says."`
	TokenFrom string `name:"invitation" help:"File whose first line is the invitation's token; asked for otherwise." type:"path" placeholder:"FILE"`
}

func (c *gatewayJoinCmd) Run(a *app) error {
	if c.TokenFrom == "" && c.TokenFile == "" && strings.HasPrefix(c.Admin, "http") {
		return usage("with --admin URL one of --token-file and --invitation is needed: only one secret can be asked for")
	}
	client, err := c.client(a)
	if err != nil {
		return err
	}
	token, err := readSecret(a, c.TokenFrom, "token of the invitation", fault.New("gateway_secret", "the invitation's token is missing").WithFix("--invitation FILE, or the standard input"))
	if err != nil {
		return err
	}
	if err := askOf(a, client, "JoinCluster", &gatewayapi.JoinClusterRequest{Url: c.URL, Token: string(token)}, nil); err != nil {
		return err
	}
	a.step("the gateway has joined, and begins anew as a member")
	return show(a, nil)
}

type gatewayLeaveCmd struct {
	adminFlags
	ID string `arg:"" optional:"" name:"member" help:"Id of the member; the gateway itself without one."`
}

func (c *gatewayLeaveCmd) Run(a *app) error {
	client, err := c.client(a)
	if err != nil {
		return err
	}
	id := c.ID
	if id == "" {
		var s gatewayapi.StatusResponse
		if err := askOf(a, client, "Status", nil, &s); err != nil {
			return err
		}
		id = hex.EncodeToString(s.Uuid)
	}
	var r gatewayapi.ListMembersResponse
	if err := askOf(a, client, "RemoveMember", &gatewayapi.RemoveMemberRequest{Id: id}, &r); err != nil {
		return err
	}
	a.step("member %s is removed", printable(id))
	printMembers(a, &r)
	return show(a, &r)
}

type gatewayQuarantineCmd struct{ adminFlags }

func (c *gatewayQuarantineCmd) Run(a *app) error {
	var r gatewayapi.ListQuarantineResponse
	if err := c.ask(a, "ListQuarantine", nil, &r); err != nil {
		return err
	}
	for _, x := range r.Records {
		a.printf("%s  %s  %s  %s\n", ago(x.At), printable(x.Source), printable(x.Code), printable(x.Error))
	}
	a.printf("%d in all\n", r.Total)
	return show(a, &r)
}
