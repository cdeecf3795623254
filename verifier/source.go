// SPDX-License-Identifier: Apache-2.0

package verifier

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/attest"
	"github.com/dstack-go/dstack/attest/container"
	"github.com/dstack-go/dstack/attest/gpu"
	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/collateral"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/measure"
)

// Limits on a Source.
const (
	MaxSource    = 16 << 20 // bytes of its JSON
	maxNonce     = 64
	minNonce     = 16
	maxSPKIs     = 16
	maxSPKI      = 4 << 10
	sourceFormat = 1
)

// Source is what was obtained from an instance: the reply of its attest endpoint,
// which is also the form of a saved evidence file, or what ReadEvidence made of
// evidence in another form. In JSON, bytes are lowercase hexadecimal. All of it is
// attacker-controlled.
type Source struct {
	Version     int                // 1
	Container   []byte             // V0 or V1 container (attestation.md §7)
	Manifest    string             // text of app-compose.json; empty when unknown
	Nonce       []byte             // the nonce that was answered; empty for upstream's evidence
	ServedSPKIs [][]byte           // DER SPKIs of the certificates that the instance serves
	Collateral  *collateral.Bundle // optional; used only when the caller has none

	// GPU is the output of NVIDIA's verifier that the guest recorded at boot, byte for
	// byte; empty when unknown.
	GPU []byte

	// Gateway is the evidence of the gateway at which TLS ends, when it answered for the
	// instance: made for the key of the gateway's connection with whoever asked. What is
	// above is then of the instance, made for the key of its connection with the gateway.
	// It holds no other gateway.
	Gateway *Source

	// Evidence is bare evidence, in place of Container. It has no JSON form.
	Evidence *attest.Evidence
	// RATLS is the DER SPKI of the RA-TLS certificate that carried the evidence, and
	// Issued the start of that certificate's validity; nil and zero otherwise.
	RATLS  []byte
	Issued time.Time

	Certificate *x509.Certificate // that one, whole; its form is checked when it is there
}

// decode returns the evidence, unverified.
func (s *Source) decode() (*attest.Evidence, error) {
	if s.Evidence != nil {
		e := *s.Evidence
		return &e, nil
	}
	return container.Decode(s.Container)
}

// TEE returns the kind of TEE that the evidence claims to be of.
func (s *Source) TEE() (dstack.TEE, error) {
	e, err := s.decode()
	if err != nil {
		return "", err
	}
	return e.TEE, nil
}

type sourceJSON struct {
	Version     int                `json:"version"`
	Container   collateral.Hex     `json:"container"`
	Manifest    string             `json:"manifest"`
	Nonce       collateral.Hex     `json:"nonce"`
	ServedSPKIs []collateral.Hex   `json:"served_spkis"`
	Collateral  *collateral.Bundle `json:"collateral,omitempty"`
	GPU         string             `json:"gpu_evidence,omitempty"` // text, as nvattest printed it
	Gateway     *sourceJSON        `json:"gateway,omitempty"`
}

// MarshalJSON writes the wire form.
func (s Source) MarshalJSON() ([]byte, error) { return json.Marshal(s.wire()) }

func (s *Source) wire() *sourceJSON {
	w := &sourceJSON{Version: s.Version, Container: s.Container, Manifest: s.Manifest, Nonce: s.Nonce, ServedSPKIs: []collateral.Hex{}, Collateral: s.Collateral, GPU: string(s.GPU)}
	for _, k := range s.ServedSPKIs {
		w.ServedSPKIs = append(w.ServedSPKIs, k)
	}
	if s.Gateway != nil {
		w.Gateway = s.Gateway.wire()
	}
	return w
}

// UnmarshalJSON reads the wire form as ParseSource does.
func (s *Source) UnmarshalJSON(data []byte) error {
	p, err := ParseSource(data)
	if err != nil {
		return err
	}
	*s = *p
	return nil
}

// ParseSource reads evidence, strictly: unknown and duplicate keys and everything
// beyond the limits are errors, with the codes evidence_malformed,
// evidence_too_large and evidence_version.
func ParseSource(data []byte) (*Source, error) {
	if len(data) > MaxSource {
		return nil, fault.New("evidence_too_large", "evidence of %d bytes, more than %d", len(data), MaxSource)
	}
	var w sourceJSON
	if err := strictjson.Decode(data, &w, strictjson.Limits{Size: MaxSource, Depth: 5}); err != nil {
		return nil, fault.Wrap(err, "evidence_malformed", "this is not evidence of a dstack instance").
			WithFix("give the reply of /.well-known/dstack/attest, or a file that `dstack verify --save` wrote")
	}
	s, err := w.source()
	if err == nil {
		err = s.check()
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (w *sourceJSON) source() (*Source, error) {
	if w.Version != sourceFormat {
		return nil, fault.New("evidence_version", "evidence has version %d, this program reads %d", w.Version, sourceFormat)
	}
	s := &Source{Version: w.Version, Container: w.Container, Manifest: w.Manifest, Nonce: w.Nonce, Collateral: w.Collateral}
	if w.GPU != "" {
		s.GPU = []byte(w.GPU)
	}
	for _, k := range w.ServedSPKIs {
		s.ServedSPKIs = append(s.ServedSPKIs, k)
	}
	if w.Gateway != nil {
		gateway, err := w.Gateway.source()
		if err != nil {
			return nil, err
		}
		s.Gateway = gateway
	}
	return s, nil
}

func (s *Source) check() error {
	large := func(what string, n, limit int) error {
		return fault.New("evidence_too_large", "%s of the evidence: %d, more than %d", what, n, limit)
	}
	switch {
	case s.Evidence != nil && len(s.Evidence.Quote) > attest.MaxQuote:
		return large("bytes of the evidence", len(s.Evidence.Quote), attest.MaxQuote)
	case len(s.Container) == 0 && s.Evidence == nil:
		return fault.New("evidence_malformed", "the evidence holds no container")
	case len(s.Container) > container.MaxSize:
		return large("bytes of the container", len(s.Container), container.MaxSize)
	case len(s.Manifest) > manifest.MaxSize:
		return large("bytes of the manifest", len(s.Manifest), manifest.MaxSize)
	case len(s.GPU) > gpu.MaxEvidence:
		return large("bytes of the GPU evidence", len(s.GPU), gpu.MaxEvidence)
	case len(s.Nonce) > maxNonce:
		return large("bytes of the nonce", len(s.Nonce), maxNonce)
	case len(s.ServedSPKIs) > maxSPKIs:
		return large("served keys", len(s.ServedSPKIs), maxSPKIs)
	}
	if g := s.Gateway; g != nil {
		if g.Gateway != nil {
			return fault.New("evidence_malformed", "the evidence is of more than one gateway")
		}
		if err := g.check(); err != nil {
			return err
		}
	}
	for _, k := range s.ServedSPKIs {
		if len(k) > maxSPKI {
			return large("bytes of a served key", len(k), maxSPKI)
		}
	}
	if s.Collateral != nil {
		return s.Collateral.Check()
	}
	return nil
}

// VMConfig returns the shape of the VM as the evidence claims it. The host chose
// it; registers computed for it still have to match those of the quote.
func (s *Source) VMConfig() (measure.VMConfig, error) {
	ev, err := s.decode()
	if err != nil {
		return measure.VMConfig{}, err
	}
	c, err := parseConfig(ev.Config)
	return c.vm, err
}

// config is what a container's configuration text claims.
type config struct {
	vm       measure.VMConfig
	document string // of the launch commitment, or empty
}

// parseConfig takes a vm_config, or a whole sys-config that nests it as a string
// (attestation.md §7.3).
func parseConfig(text string) (config, error) {
	var c config
	if text == "" {
		return c, nil
	}
	var outer struct {
		VMConfig *string `json:"vm_config"`
		MRConfig string  `json:"mr_config"`
	}
	if err := strictjson.Decode([]byte(text), &outer, strictjson.Limits{Size: 1 << 20, Depth: 8, Unknown: true}); err != nil {
		return c, fault.Wrap(err, "vm_config_malformed", "the evidence's configuration")
	}
	inner := text
	if outer.VMConfig != nil {
		inner = *outer.VMConfig
	}
	if inner == "" || inner == "{}" {
		return config{document: outer.MRConfig}, nil
	}
	vm, err := measure.ParseVMConfig([]byte(inner))
	if err != nil {
		return c, err
	}
	c.vm, c.document = *vm, outer.MRConfig
	if c.document == "" {
		c.document = vm.MRConfig
	}
	return c, nil
}

func hexString(b []byte) string { return hex.EncodeToString(b) }

// short abbreviates a value for a message.
func short(v fmt.Stringer) string {
	s := v.String()
	if len(s) > 16 {
		return s[:16] + "…"
	}
	return s
}
