// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"time"

	"github.com/dstack-go/dstack"
	api "github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/gateway/portpolicy"
	"github.com/dstack-go/dstack/gateway/route"
	"github.com/dstack-go/dstack/gateway/settings"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
)

// instance finds a route. Code instance_unknown.
func (s *Service) instance(text string) (*route.Route, error) {
	if id, err := dstack.ParseInstanceID(text); err == nil {
		if rt, ok := s.cfg.Routes.Instance(id); ok {
			return rt, nil
		}
	}
	return nil, unknown(text)
}

func unknown(text string) error {
	return fault.New("instance_unknown", "instance %s not found", clip(text)).WithFix("`dstack gateway routes` lists them")
}

func policyOf(p *api.PortPolicy) (portpolicy.Policy, error) {
	if p == nil {
		return portpolicy.Policy{}, fault.New("port_policy", "the port policy is missing").WithFix("ClearInstancePortPolicy takes the operator's policy away")
	}
	m := manifest.PortPolicy{RestrictMode: p.RestrictMode}
	for _, port := range p.Ports {
		if port.Port == 0 || port.Port > 65535 {
			return portpolicy.Policy{}, fault.New("port_policy", "port %d is not from 1 to 65535", port.Port)
		}
		m.Ports = append(m.Ports, manifest.Port{Port: uint16(port.Port), PP: port.Pp})
	}
	return portpolicy.New(m)
}

func policyMessage(p *portpolicy.Policy) *api.PortPolicy {
	if p == nil {
		return nil
	}
	m := p.Manifest()
	out := &api.PortPolicy{RestrictMode: m.RestrictMode}
	for _, port := range m.Ports {
		out.Ports = append(out.Ports, &api.PortAttrs{Port: uint32(port.Port), Pp: port.PP})
	}
	return out
}

func (s *Service) setInstancePortPolicy(ctx context.Context, r *api.SetInstancePortPolicyRequest) (*empty, error) {
	rt, err := s.instance(r.InstanceId)
	if err != nil {
		return nil, err
	}
	p, err := policyOf(r.Policy)
	if err != nil {
		return nil, err
	}
	return nil, settings.Put(ctx, s.cfg.Store, settings.PolicyKey(rt.Record().Instance), settings.Policy{Ports: p}, settings.Any)
}

func (s *Service) clearInstancePortPolicy(ctx context.Context, r *api.ClearInstancePortPolicyRequest) (*empty, error) {
	id, err := dstack.ParseInstanceID(r.InstanceId)
	if err != nil {
		return nil, unknown(r.InstanceId)
	}
	// The record may be of an instance that is away, or be one that does not parse.
	err = settings.Delete(ctx, s.cfg.Store, settings.PolicyKey(id), settings.Any)
	if settings.Absent(err) {
		_, err = s.instance(r.InstanceId)
	}
	return nil, err
}

func (s *Service) getInstancePortPolicy(ctx context.Context, r *api.GetInstancePortPolicyRequest) (*api.GetInstancePortPolicyResponse, error) {
	rt, err := s.instance(r.InstanceId)
	if err != nil {
		return nil, err
	}
	rec := rt.Record()
	out := &api.GetInstancePortPolicyResponse{Source: "none", InstanceReported: policyMessage(rec.Policy)}
	p, _, err := settings.Get(ctx, s.cfg.Store, settings.PolicyKey(rec.Instance))
	switch {
	case err == nil:
		out.Source, out.AdminOverride = "admin", policyMessage(&p.Ports)
		if rec.Policy != nil { // an operator closes ports, and opens none that the app measured shut
			left := rec.Policy.Narrowed(p.Ports)
			out.Effective = policyMessage(&left)
		}
	case !settings.Absent(err):
		return nil, err
	case rec.Policy != nil:
		out.Source, out.Effective = "instance", out.InstanceReported
	}
	return out, nil
}

func (s *Service) drain(ctx context.Context, r *api.DrainRequest) (*empty, error) {
	if r.InstanceId == "" {
		if s.cfg.Public == nil {
			return nil, unavailable("this gateway has no listener that drains", "stop its process")
		}
		return nil, s.cfg.Public.Drain(r.On)
	}
	rt, err := s.instance(r.InstanceId)
	if err != nil {
		return nil, err
	}
	id := rt.Record().Instance
	if err := s.cfg.Routes.Drain(id, r.On); err != nil {
		return nil, err
	}
	if r.On {
		return nil, s.elsewhere(settings.Put(ctx, s.cfg.Store, settings.DrainedKey(id), settings.Drained{}, settings.Any))
	}
	if err := settings.Delete(ctx, s.cfg.Store, settings.DrainedKey(id), settings.Any); !settings.Absent(err) {
		return nil, s.elsewhere(err)
	}
	return nil, nil
}

// elsewhere says of an error that the change is made here all the same.
func (s *Service) elsewhere(err error) error {
	if err == nil {
		return nil
	}
	return fault.Wrap(err, cmp.Or(fault.Code(err), "admin_elsewhere"), "it is done at this gateway, and no other knows it").WithFix("do it again when a majority of the gateways is up")
}

func (s *Service) removeRoutes(ctx context.Context, r *api.RemoveRoutesRequest) (*api.RemoveRoutesResponse, error) {
	var gone []route.Record
	switch {
	case (r.InstanceId == "") == (r.AppId == ""):
		return nil, fault.New("remove_what", "an instance or an app is named, and not both")
	case r.AppId != "":
		id, err := dstack.ParseAppID(r.AppId)
		if err != nil {
			return nil, fault.New("app_unknown", "%q is no app id", clip(r.AppId))
		}
		gone = s.cfg.Routes.RemoveApp(id)
	default:
		id, err := dstack.ParseInstanceID(r.InstanceId)
		if err != nil {
			return nil, unknown(r.InstanceId)
		}
		rec, ok := s.cfg.Routes.Remove(id)
		if rec.Instance = id; !ok {
			rec.Attested = time.Time{} // it is told to the others all the same
		}
		gone = append(gone, rec)
	}
	if s.cfg.Applied != nil {
		s.cfg.Applied()
	}
	out := &api.RemoveRoutesResponse{}
	var errs []error
	for _, rec := range gone {
		if !rec.Attested.IsZero() {
			out.Removed++
		}
		at := s.now()
		if rec.Attested.After(at) {
			at = rec.Attested
		}
		errs = append(errs, settings.Put(ctx, s.cfg.Store, settings.RemovedKey(rec.Instance), settings.Removed{At: at}, settings.Any))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, s.elsewhere(err)
	}
	return out, nil
}

func (s *Service) listQuarantine(ctx context.Context, _ *empty) (*api.ListQuarantineResponse, error) {
	bad, total := s.cfg.Routes.Quarantine()
	out := &api.ListQuarantineResponse{Total: total}
	for _, b := range slices.Backward(bad) {
		out.Records = append(out.Records, &api.QuarantinedRecord{Source: b.Source, Digest: b.Digest[:], At: seconds(b.At), Code: fault.Code(b.Err), Error: b.Err.Error()})
	}
	all, err := settings.Load(ctx, s.cfg.Store)
	if err != nil {
		return nil, err
	}
	for _, b := range all.Bad {
		sum := sha256.Sum256(b.Value)
		out.Total++
		out.Records = append(out.Records, &api.QuarantinedRecord{Source: clip(b.Key), Digest: sum[:], At: seconds(s.now()), Code: fault.Code(b.Err), Error: b.Err.Error()})
	}
	return out, nil
}
