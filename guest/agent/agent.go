// SPDX-License-Identifier: Apache-2.0

// Package agent is the guest agent: the unprivileged process inside a
// confidential VM that tells apps and strangers who they run in, and proves it.
//
// It serves four listeners, all bound by init (guest-agent.md §1):
//
//	dstack.sock  DstackGuest at /<Method>           apps of this guest
//	tappd.sock   the same, and Tappd at             apps of old
//	             /prpc/<Method>
//	scope:<name> as tappd.sock                      one service of the app
//	external     Worker at /prpc/<Method>, pages,   anyone
//	             POST /.well-known/dstack/attest
//	guestapi     GuestApi at /api/<Method>          the host, through init
//
// A service with key_scopes in the manifest has a socket of its own, on which it
// derives the keys of its paths only (threats.md J06); the other sockets give every
// key to whoever reaches them, as upstream's do.
//
// Everything that arrives on them is attacker-controlled, the host's and the
// apps' requests included. The agent trusts init ([initrpc]) and its sealed
// configuration, except for the parts of it that the host made (sys-config,
// vm_config), which it passes on and never acts on.
//
// Guarantees: it holds no capability, may not start programs ([Harden]) and asks
// init for every quote. What Info says is what the event log proves: identity is
// read from the log (eventlog.Boundary), and the agent does not start unless the
// log replays to the register that the hardware reports. Info costs no quote
// (upstream takes one per call, guest-agent.md §16.1). Evidence for strangers is
// enveloped: no caller chooses its 64 bytes (threats.md B20), and its rate is
// limited. Keys are in the memory of this process, which nothing can read
// ([Harden]), in answers to those who asked, and nowhere else (threats.md E06).
package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dstack-go/dstack"
	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/attest/eventlog"
	"github.com/dstack-go/dstack/attest/tdx"
	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/clock"
	"github.com/dstack-go/dstack/guest/gwclient"
	"github.com/dstack-go/dstack/guest/kmsclient"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
)

// Limits of the servers.
const (
	readTimeout     = 60 * time.Second
	writeTimeout    = 120 * time.Second
	maxHeader       = 32 << 10
	shutdownTimeout = 2 * time.Second

	gcPercent    = 20
	memoryTarget = 6 << 20 // bytes; the collector works harder beyond it, and gives memory back
)

// Options tune an agent. The zero value is the production setting.
type Options struct {
	EvidenceRate  float64          // quotes a second for strangers; 0 means 2
	EvidenceBurst int              // 0 means 10
	Now           func() time.Time // nil means time.Now
	Log           *slog.Logger     // nil discards
	WholeLog      bool             // GetQuote gives digests, too, as upstream's simulator does

	// Of tests: where the GPUs' evidence is, and the configuration in the fixture of
	// upstream's simulator, whose log knows neither its manifest nor a channel key.
	gpuEvidence   string
	fixtureConfig string
	boottime      func() time.Duration // nil: CLOCK_BOOTTIME
}

// Init is what the agent asks of init; [initrpc.Client] implements it.
type Init interface {
	Quote(ctx context.Context, data dstack.ReportData) ([]byte, error)
	Extend(ctx context.Context, name string, payload []byte) (eventlog.Event, error)
	Status(ctx context.Context) (initrpc.Status, error)
	Logs(ctx context.Context, request initrpc.LogsRequest) (initrpc.Logs, error)
	Containers(ctx context.Context) ([]initrpc.Container, error)
	Shutdown(ctx context.Context, request initrpc.ShutdownRequest) error
	Lease(ctx context.Context, change initrpc.LeaseChange) error
	Tunnel(ctx context.Context, change initrpc.TunnelChange) (initrpc.TunnelStatus, error)
}

// Agent is a guest agent. Make it with [New].
type Agent struct {
	init     Init
	log      *slog.Logger
	version  string
	revision string
	tee      dstack.TEE
	disks    []string

	gpuEvidence    string
	evidenceConfig string // the vm_config in evidence
	wholeLog       bool
	now            func() time.Time
	boottime       func() time.Duration

	manifest *manifest.Manifest
	vmConfig string
	identity eventlog.Identity
	body     *tdx.ReportBody // of the quote at start; nil where there is no TDX quote
	keys     *keys.AppKeys
	issuer   issuer
	kms      *kmsclient.Client            // nil: the keys are not from a KMS
	kmsRoot  []byte                       // DER SubjectPublicKeyInfo of its root CA
	tenure   *tenure                      // nil: the KMS gives no leases
	lease    atomic.Pointer[kmsapi.Lease] // the latest, as gateways want to see it
	gateways *gwclient.Client             // nil: the app has none
	scopes   map[string][]string

	// extending is held while the register and the log change, and by those who
	// need both to stay as they are.
	extending sync.RWMutex
	logLost   bool // the log may not explain the register
	state     atomic.Pointer[state]
	appCert   atomic.Pointer[[]string] // PEM, leaf first

	appCertDue time.Duration // when the first one is renewed

	cert tls.Certificate // self-signed by the system channel key
	spki []byte          // its SubjectPublicKeyInfo, DER

	evidence   evidenceDesk
	appKeys    quoteCache
	containers containerList
	statuses   statusMemo
	logs       chan struct{} // streams of /logs
}

// New returns an agent that asks init. It takes one quote over zeros, for the
// registers that Info reports, and one for the certificate that Info shows. The
// configuration's secrets are wiped.
//
// Error codes: those of eventlog.Boundary and manifest.Parse, log_replay_mismatch
// (the log does not explain the runtime register), compose_hash_mismatch (the
// manifest is not the one that was committed), channel_key_mismatch (the channel
// key is not the one that was committed), app_keys_malformed, those of
// kmsclient.PolicyOf and of kmsclient.Subject for the lease.
func New(ctx context.Context, cfg *initrpc.Config, init Init, opt Options) (*Agent, error) {
	defer cfg.Wipe()
	if opt.EvidenceRate == 0 {
		opt.EvidenceRate = 2
	}
	if opt.EvidenceBurst == 0 {
		opt.EvidenceBurst = 10
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	a := &Agent{
		init: init, log: opt.Log, version: cfg.Version, revision: cfg.Revision, tee: cfg.TEE,
		disks: cfg.DataDisks, vmConfig: cfg.VMConfig, scopes: cfg.Scopes,
		gpuEvidence: opt.gpuEvidence, now: opt.Now, wholeLog: opt.WholeLog, logs: make(chan struct{}, maxLogStreams),
	}
	if a.boottime = opt.boottime; a.boottime == nil {
		a.boottime = clock.Linux{}.Boottime
	}
	if a.gpuEvidence == "" {
		a.gpuEvidence = gpuEvidence
	}
	if a.evidenceConfig = opt.fixtureConfig; a.evidenceConfig == "" {
		a.evidenceConfig = cfg.VMConfig
	}
	a.evidence.init(newBucket(opt.EvidenceRate, opt.EvidenceBurst, opt.Now))

	var err error
	if a.identity, err = eventlog.Boundary(cfg.Events); err != nil {
		return nil, fmt.Errorf("event log of this boot: %w", err)
	}
	if a.manifest, err = manifest.Parse(cfg.Manifest); err != nil {
		return nil, err
	}
	if got := a.manifest.Hash(); got != a.identity.ComposeHash && opt.fixtureConfig == "" {
		return nil, fault.New("compose_hash_mismatch", "the manifest hashes to %s, the log committed %s", got, a.identity.ComposeHash)
	}
	if a.cert, err = channelCertificate(cfg.ChannelKey); err != nil {
		return nil, err
	}
	a.spki = a.cert.Leaf.RawSubjectPublicKeyInfo
	if sum := sha256.Sum256(a.spki); !bytes.Equal(sum[:], a.identity.ChannelKey) && opt.fixtureConfig == "" {
		return nil, fault.New("channel_key_mismatch", "the channel key hashes to %x, the log committed %x", sum, a.identity.ChannelKey)
	}

	if a.keys, err = keys.Parse(cfg.AppKeys); err != nil {
		return nil, err
	}
	if a.issuer, err = newIssuer(a, cfg); err != nil {
		return nil, err
	}
	if err := a.takeLease(cfg); err != nil {
		return nil, err
	}
	if a.gateways, err = newGateways(a, cfg); err != nil {
		return nil, err
	}
	if a.tee == dstack.TDX {
		raw, err := init.Quote(ctx, dstack.ReportData{})
		if err != nil {
			return nil, fmt.Errorf("quote at start: %w", err)
		}
		q, err := tdx.ParseQuote(raw)
		if err != nil {
			return nil, fmt.Errorf("quote at start: %w", err)
		}
		b := q.Body()
		a.body = &b
		replayed, err := eventlog.Replay(cfg.Events, eventlog.RuntimeIMR)
		if err != nil {
			return nil, err
		}
		if replayed != b.RTMR[eventlog.RuntimeIMR] {
			return nil, fault.New("log_replay_mismatch", "the event log replays to %s, the hardware reports %s", replayed, b.RTMR[eventlog.RuntimeIMR])
		}
	}
	first, err := a.firstState(cfg.Events)
	if err != nil {
		return nil, err
	}
	a.state.Store(first)
	// A KMS that cannot be reached now is asked again while the agent serves.
	start, cancel := context.WithTimeout(ctx, appCertPatience)
	defer cancel()
	if a.appCertDue, err = a.renewAppCert(start); err != nil {
		a.log.Warn("certificate of the app", "error", err)
		a.appCertDue = appCertRetry
	}
	return a, nil
}

// makeInfo describes the app with a log of now.
func (a *Agent) makeInfo(events []eventlog.Event) (*info, error) {
	vendor, product := cloud()
	src := infoSource{
		manifest: a.manifest, identity: a.identity, events: events, body: a.body,
		vmConfig: a.vmConfig, evidenceConfig: a.evidenceConfig, cloudVendor: vendor, cloudProduct: product,
	}
	if chain := a.appCert.Load(); chain != nil {
		src.certificate = strings.Join(*chain, "\n")
	}
	return newInfo(src)
}

// Certificate returns the certificate that the external listener serves, DER.
func (a *Agent) Certificate() []byte { return a.cert.Leaf.Raw }

// channelCertificate makes a self-signed certificate of the system channel key,
// PKCS#8 DER. Its names and dates carry no meaning: whoever verifies compares
// the key with evidence.
func channelCertificate(pkcs8 []byte) (tls.Certificate, error) {
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("system channel key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return tls.Certificate{}, fmt.Errorf("system channel key: a %T cannot sign", key)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "dstack system channel"},
		DNSNames:     []string{"dstack-system-channel"},
		NotBefore:    time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 §4.1.2.5: no end
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate of the system channel key: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: signer, Leaf: leaf}, nil
}

// Serve serves the listeners, by name, until ctx ends or one of them fails. It
// owns them. The names are those of initrpc; an unknown one, or one of a service
// without a scope, is an error. Afterwards the agent has no keys.
func (a *Agent) Serve(ctx context.Context, listeners map[string]net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var (
		wg      sync.WaitGroup
		servers []*prpc.HTTPServer
		failed  = make(chan error, 2*len(listeners)+1)
	)
	start := func(name string, h http.Handler, serve func(*prpc.HTTPServer) error) {
		s := prpc.Server(ident(h))
		s.ReadTimeout, s.WriteTimeout = readTimeout, writeTimeout
		s.MaxHeaderBytes = maxHeader
		s.ErrorLog = slog.NewLogLogger(a.log.Handler(), slog.LevelDebug)
		servers = append(servers, s)
		wg.Go(func() {
			err := serve(s)
			if ctx.Err() != nil && errors.Is(err, net.ErrClosed) {
				return // with the context, before its server was told
			}
			if err != nil && !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", name, err)
			}
		})
	}
	for name, ln := range listeners {
		ln := limit(ln, maxConns)
		on := func(ln net.Listener) func(*prpc.HTTPServer) error {
			return func(s *prpc.HTTPServer) error { return s.Serve(ln) }
		}
		switch name {
		case initrpc.ListenDstack:
			start(name, a.caller(nil).dstackHandler(), on(ln))
		case initrpc.ListenTappd:
			start(name, a.caller(nil).bothHandler(), on(ln))
		case initrpc.ListenLocal:
			start(name, a.localHandler(), on(ln))
		case initrpc.ListenGuestAPI:
			start(name, a.guestAPIHandler(), on(ln))
		case initrpc.ListenExternal:
			plain, encrypted := split(ctx, ln)
			h := a.externalHandler()
			start(name, h, on(plain))
			start(name, h, func(s *prpc.HTTPServer) error {
				s.TLSConfig = a.tlsConfig()
				return s.ServeTLS(encrypted, "", "")
			})
		case initrpc.ListenTunnel:
			if a.gateways == nil { // an app without an instance id has no route
				ln.Close()
				break
			}
			wg.Go(func() {
				if err := a.terminator().Serve(ctx, ln); err != nil {
					failed <- err
				}
			})
			wg.Go(func() { a.gateways.Run(ctx) })
		default:
			service, ok := strings.CutPrefix(name, initrpc.ListenScope)
			paths, scoped := a.scopes[service]
			if !ok || !scoped {
				failed <- fmt.Errorf("unknown listener %q", name)
				break
			}
			start(name, a.caller(&scope{service: service, paths: paths}).bothHandler(), on(ln))
		}
	}
	wg.Go(func() { a.keepAppCert(ctx) })
	wg.Go(func() { a.keepLease(ctx) })
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	grace, stop := context.WithTimeout(context.Background(), shutdownTimeout)
	defer stop()
	for _, s := range servers {
		if s.Shutdown(grace) != nil {
			s.Close()
		}
	}
	cancel() // the split external listener ends with it
	for _, ln := range listeners {
		ln.Close()
	}
	wg.Wait()
	a.evidence.wait()
	a.keys.Wipe()
	return err
}

func (a *Agent) tlsConfig() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{a.cert},
		MinVersion:   tls.VersionTLS13,
		// Every handshake shows the certificate that evidence names.
		SessionTicketsDisabled: true,
	}
}

// Run is the agent's whole life as a process that init started: give up what it
// does not need, take over what it inherited, serve until init ends or ctx does.
func Run(ctx context.Context, log io.Writer) error {
	// A guest's memory is the app's. The agent makes little garbage and can afford to
	// look for it often.
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryTarget)
	if err := Harden(); err != nil { // before the key is in memory
		return err
	}
	in, err := initrpc.Inherit()
	if err != nil {
		return err
	}
	defer in.Init.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		<-in.Init.Done()
		cancel()
	}()
	logger := slog.New(slog.NewTextHandler(log, nil))
	a, err := New(ctx, in.Config, in.Init, Options{Log: logger})
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- a.Serve(ctx, in.Listeners) }()
	// The listeners have been accepting connections since init bound them, so
	// there is nothing to wait for before saying so.
	if err := in.Init.Ready(ctx); err != nil {
		cancel()
		return errors.Join(err, <-served)
	}
	go keepTrim(ctx)
	logger.Info("agent serves", "app", a.identity.AppID, "version", a.version)
	return <-served
}
