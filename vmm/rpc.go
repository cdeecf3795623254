// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/dstack-go/dstack"
	vmmpb "github.com/dstack-go/dstack/api/vmm"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/manifest"
	"github.com/dstack-go/dstack/prpc"
	"github.com/dstack-go/dstack/vmm/lifecycle"
	"github.com/dstack-go/dstack/vmm/proc"
)

type empty = emptypb.Empty

// methods is the service vmm.Vmm, as far as it goes.
func (s *Server) methods() []prpc.Method {
	return []prpc.Method{
		prpc.Unary("CreateVm", func(ctx context.Context, in *vmmpb.VmConfiguration) (*vmmpb.Id, error) {
			id, err := s.create(ctx, in)
			if err != nil {
				return nil, err
			}
			return &vmmpb.Id{Id: id}, nil
		}),
		prpc.Unary("StartVm", func(ctx context.Context, in *vmmpb.Id) (*empty, error) {
			v, err := s.get(ctx, in.Id)
			if err != nil {
				return nil, err
			}
			if !v.state().Active() {
				if err := tryPorts(ctx, v.spec().PortMap); err != nil {
					return nil, err
				}
			}
			return nil, v.start(ctx)
		}),
		prpc.Unary("StopVm", func(ctx context.Context, in *vmmpb.Id) (*empty, error) {
			v, err := s.get(ctx, in.Id)
			if err != nil {
				return nil, err
			}
			if err := v.post(lifecycle.Input{Kind: lifecycle.Stop}); err != nil {
				return nil, err
			}
			return nil, v.wait(ctx, func(st lifecycle.State, _ bool) bool { return !st.Active() || st.Started })
		}),
		prpc.Unary("ShutdownVm", func(ctx context.Context, in *vmmpb.Id) (*empty, error) {
			v, err := s.get(ctx, in.Id)
			if err != nil {
				return nil, err
			}
			return nil, v.shutdown(ctx)
		}),
		prpc.Unary("RemoveVm", func(ctx context.Context, in *vmmpb.Id) (*empty, error) {
			v, err := s.get(ctx, in.Id)
			if fault.Code(err) == "vm_broken" {
				return nil, s.removeBroken(in.Id)
			}
			if err != nil {
				return nil, err
			}
			return nil, v.post(lifecycle.Input{Kind: lifecycle.Remove})
		}),
		prpc.Unary("UpdateVm", s.update),
		prpc.Unary("UpgradeApp", s.update), // upstream's older name
		prpc.Unary("ResizeVm", s.resize),
		prpc.Unary("GetComposeHash", func(_ context.Context, in *vmmpb.VmConfiguration) (*vmmpb.ComposeHash, error) {
			if err := checkName(in.Name); err != nil {
				return nil, err
			}
			m, err := manifest.Parse([]byte(in.ComposeFile))
			if err != nil {
				return nil, err
			}
			return &vmmpb.ComposeHash{Hash: m.Hash().String()}, nil
		}),
		prpc.Unary("Status", s.status),
		prpc.Unary("GetInfo", func(ctx context.Context, in *vmmpb.Id) (*vmmpb.GetInfoResponse, error) {
			s.mu.Lock()
			v, ok := s.vms[in.Id]
			why, broken := s.broken[in.Id]
			s.mu.Unlock()
			switch {
			case ok:
				v.settle(ctx)
				return &vmmpb.GetInfoResponse{Found: true, Info: v.info(true)}, nil
			case broken:
				return &vmmpb.GetInfoResponse{Found: true, Info: brokenInfo(in.Id, why)}, nil
			}
			return &vmmpb.GetInfoResponse{}, nil
		}),
		prpc.Unary("Version", func(context.Context, *empty) (*vmmpb.VersionResponse, error) {
			return &vmmpb.VersionResponse{Version: s.version, Rev: s.revision}, nil
		}),
		prpc.Unary("GetMeta", func(context.Context, *empty) (*vmmpb.GetMetaResponse, error) { return s.meta(), nil }),
		prpc.Unary("ListImages", func(context.Context, *empty) (*vmmpb.ImageListResponse, error) { return s.listImages() }),
	}
}

func (s *Server) status(ctx context.Context, in *vmmpb.StatusRequest) (*vmmpb.StatusResponse, error) {
	wanted := map[string]bool{}
	for _, id := range in.Ids {
		wanted[id] = true
	}
	match := func(fields ...string) bool {
		if len(wanted) > 0 && !wanted[fields[0]] {
			return false
		}
		for _, f := range fields {
			if strings.Contains(f, in.Keyword) {
				return true
			}
		}
		return false
	}
	var all []*vmmpb.VmInfo
	for _, v := range s.list() {
		if match(v.spec().ID, v.spec().Name, v.spec().AppID.String(), v.spec().Image) {
			v.settle(ctx)
			all = append(all, v.info(!in.Brief))
		}
	}
	s.mu.Lock()
	var broken []string
	for id := range s.broken {
		broken = append(broken, id)
	}
	sort.Strings(broken)
	for _, id := range broken {
		if match(id) {
			all = append(all, brokenInfo(id, s.broken[id]))
		}
	}
	s.mu.Unlock()
	out := &vmmpb.StatusResponse{Total: uint32(len(all)), PortMappingEnabled: s.config.CVM.PortMapping.Enabled}
	if in.Page > 0 && in.PageSize > 0 {
		from := min(uint64(in.Page-1)*uint64(in.PageSize), uint64(len(all)))
		to := min(from+uint64(in.PageSize), uint64(len(all)))
		all = all[from:to]
	}
	out.Vms = all
	return out, nil
}

// brokenInfo shows a VM that cannot be loaded.
func brokenInfo(id string, why error) *vmmpb.VmInfo {
	return &vmmpb.VmInfo{Id: id, Status: "broken", Uptime: "never", BootError: "vm_broken: " + why.Error()}
}

// statusOf gives upstream's words (vmm.md §3.5), and "starting" before QEMU runs.
func statusOf(st lifecycle.State) string {
	switch st.Phase {
	case lifecycle.Removing, lifecycle.Removed:
		return "removing"
	case lifecycle.Preparing, lifecycle.StartingTEE, lifecycle.StartingQEMU:
		return "starting"
	case lifecycle.Running:
		if st.Started {
			return "running"
		}
		return "stopping"
	case lifecycle.Stopping:
		return "stopping"
	case lifecycle.Exited:
		if st.Started {
			return "exited"
		}
	}
	return "stopped"
}

// info describes a VM. Encrypted environment and user configuration are not told:
// the second may carry a launch token.
func (v *vm) info(full bool) *vmmpb.VmInfo {
	st, r, sp := v.state(), v.getReport(), v.spec()
	out := &vmmpb.VmInfo{
		Id: sp.ID, Name: sp.Name, Status: statusOf(st), Uptime: "never", AppId: sp.AppID.String(),
		BootProgress: r.Progress, BootError: r.Error, ShutdownProgress: r.ShutdownText, ImageVersion: sp.ImageVer,
		Health: r.Health, UpdatePending: v.next.Load() != nil,
		Interfaces: []*vmmpb.NetworkInterfaceStatus{{Mode: "user", Backend: "slirp", Mac: macOf(sp.ID), NetdevId: proto.String("net0"), Egress: v.server.egressState()}},
	}
	if name := v.server.config.CVM.Networking.Ifname; name != "" {
		out.Interfaces[0].Mode, out.Interfaces[0].Backend = "custom", "custom"
	}
	if st.Exit != nil && out.BootError == "" && st.Exit.Code != codePoweroff {
		out.BootError = st.Exit.Code + ": " + st.Exit.Reason
	}
	now := time.Now()
	if st.Phase == lifecycle.Running && r.StartedMS > 0 {
		out.Uptime = humantime(now.Sub(time.UnixMilli(r.StartedMS)))
	} else if r.ExitedMS > 0 {
		out.ExitedAt = proto.String(humantime(now.Sub(time.UnixMilli(r.ExitedMS))))
	}
	if r.Instance != nil {
		out.InstanceId = proto.String(r.Instance.String())
		if v.manifest().GatewayWanted() {
			out.AppUrl = proto.String(v.server.appURL(r.Instance))
		}
	}
	for _, e := range v.journal.list(v.server.config.EventBufferSize) {
		out.Events = append(out.Events, &vmmpb.GuestEvent{Event: e.Event, Body: e.Body, Timestamp: uint64(e.TimeMS)})
	}
	if full {
		out.Configuration = v.configuration()
	}
	return out
}

func (v *vm) configuration() *vmmpb.VmConfiguration {
	return v.now.Load().configuration(v.state().Started)
}

func (now *setup) configuration(started bool) *vmmpb.VmConfiguration {
	sp := now.spec
	out := &vmmpb.VmConfiguration{
		Name: sp.Name, Image: sp.Image, ComposeFile: string(now.manifest.Raw), Vcpu: sp.VCPU, Memory: sp.MemoryMB, DiskSize: sp.DiskGB,
		AppId: proto.String(sp.AppID.String()), KmsUrls: sp.KMSURLs, GatewayUrls: sp.GatewayURLs, NoTee: sp.NoTEE, Stopped: !started,
	}
	if sp.SimTEE != "" {
		out.SimulatedTee = proto.String(sp.SimTEE)
	}
	if sp.TPM {
		out.Tpm = proto.Bool(true)
	}
	for _, p := range sp.PortMap {
		out.Ports = append(out.Ports, &vmmpb.PortMapping{Protocol: p.Protocol, HostPort: uint32(p.From), VmPort: uint32(p.To), HostAddress: p.Address.String()})
	}
	return out
}

func (s *Server) appURL(instance *dstack.InstanceID) string {
	g := s.config.Gateway
	host := fmt.Sprintf("%s-%d.%s", instance, g.AgentPort, g.BaseDomain)
	if g.Port != 443 {
		host = net.JoinHostPort(host, strconv.Itoa(int(g.Port)))
	}
	return "https://" + host
}

// humantime writes a duration as upstream does: "1h 2m 3s".
func humantime(d time.Duration) string {
	n := int64(max(d, 0) / time.Second)
	var parts []string
	for _, u := range []struct {
		name string
		size int64
	}{{"d", 86400}, {"h", 3600}, {"m", 60}, {"s", 1}} {
		if n >= u.size {
			parts = append(parts, fmt.Sprintf("%d%s", n/u.size, u.name))
			n %= u.size
		}
	}
	if len(parts) == 0 {
		return "0s"
	}
	return strings.Join(parts, " ")
}

func (s *Server) meta() *vmmpb.GetMetaResponse {
	first := func(list []string) string {
		if len(list) == 0 {
			return ""
		}
		return list[0]
	}
	c := &s.config
	return &vmmpb.GetMetaResponse{
		Kms:     &vmmpb.KmsSettings{Url: first(c.CVM.KMSURLs), Urls: c.CVM.KMSURLs},
		Gateway: &vmmpb.GatewaySettings{Url: first(c.CVM.GatewayURLs), Urls: c.CVM.GatewayURLs, BaseDomain: c.Gateway.BaseDomain, Port: uint32(c.Gateway.Port), AgentPort: uint32(c.Gateway.AgentPort)},
		Resources: &vmmpb.ResourcesSettings{MaxCvmNumber: uint32(c.CVM.MaxVMs), MaxAllocableVcpu: c.CVM.MaxVCPU,
			MaxAllocableMemoryInMb: c.CVM.MaxMemoryMB},
		Networking: &vmmpb.NetworkingSettings{SupportedModes: []string{"user"}, DefaultMode: "user", Egress: s.egressState(),
			EgressReason: errorText(s.noEgress), EgressFix: fault.Fix(s.noEgress)},
	}
}

// listImages lists every directory of the image store; one that cannot be used is
// listed too, with the reason in place of its description.
func (s *Server) listImages() (*vmmpb.ImageListResponse, error) {
	entries, err := os.ReadDir(s.config.Image.Path)
	if err != nil {
		return nil, err
	}
	out := &vmmpb.ImageListResponse{}
	for _, e := range entries {
		if checkImageName(e.Name()) != nil || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if fi, err := os.Stat(filepath.Join(s.config.Image.Path, e.Name())); err != nil || !fi.IsDir() {
			continue
		}
		info := &vmmpb.ImageInfo{Name: e.Name()}
		var description any
		if img, err := s.loadImage(e.Name()); err != nil {
			description = map[string]string{"error": err.Error(), "code": fault.Code(err), "fix": fault.Fix(err)}
		} else {
			description = img.Metadata
			info.Version, info.IsDev = img.Metadata.Version, img.Metadata.IsDev
		}
		text, err := json.Marshal(description)
		if err != nil {
			return nil, err
		}
		info.Description = string(text)
		out.Images = append(out.Images, info)
	}
	return out, nil
}

type slotOf struct{ proc.Slot }

func (s slotOf) held() (bool, error) {
	id, err := s.Holder()
	return id != nil, err
}
