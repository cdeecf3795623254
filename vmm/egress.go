// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"syscall"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/vmm/egress"
	"github.com/dstack-go/dstack/vmm/proc"
)

// Values of cvm.networking.egress.
const (
	egressAuto     = "auto"
	egressFiltered = "filtered"
	egressOpen     = "open"
)

// maxEgressAllow bounds the allow list: each entry is a rule that packets pass.
const maxEgressAllow = 256

func (c *Config) checkEgress() error {
	n := c.CVM.Networking
	if !slices.Contains([]string{egressAuto, egressFiltered, egressOpen}, n.Egress) {
		return fmt.Errorf("egress: want auto, filtered or open, not %q", n.Egress)
	}
	if n.Mode == "tap" && n.Egress == egressFiltered {
		return errors.New("egress: what a tap interface lets through is not the VMM's to filter; filter it where it ends")
	}
	if len(n.EgressAllow) > maxEgressAllow {
		return fmt.Errorf("egress_allow: more than %d entries", maxEgressAllow)
	}
	_, err := c.egressAllow()
	return err
}

// egressAllow is what guests reach near them: the list of the configuration, and where
// the configuration itself sends them.
func (c *Config) egressAllow() (out []egress.Allow, err error) {
	for _, text := range c.CVM.Networking.EgressAllow {
		a, err := egress.ParseAllow(text)
		if err != nil {
			return nil, fmt.Errorf("egress_allow: %w", err)
		}
		out = append(out, a)
	}
	own := []string{c.CVM.PCCSURL, c.CVM.DockerRegistry, c.CVM.NvidiaAttestationProxyURL}
	for _, text := range slices.Concat(c.CVM.KMSURLs, c.CVM.GatewayURLs, own) {
		if a, ok := c.allowURL(text); ok && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

// allowURL is where a URL of an address leads a guest; names need public addresses.
func (c *Config) allowURL(text string) (a egress.Allow, ok bool) {
	u, err := url.Parse(text)
	if err != nil {
		return a, false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil || addr.Zone() != "" {
		return a, false
	}
	if u.Hostname() == c.CVM.Networking.Gateway {
		addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	port := uint64(443)
	if u.Scheme == "http" {
		port = 80
	}
	if u.Port() != "" {
		if port, err = strconv.ParseUint(u.Port(), 10, 16); err != nil || port == 0 {
			return a, false
		}
	}
	return egress.Allow{Net: netip.PrefixFrom(addr, addr.BitLen()), Port: uint16(port)}, true
}

// openEgress loads the egress filter, or notes why there is none.
func (s *Server) openEgress() {
	n := s.config.CVM.Networking
	if n.Egress == egressOpen {
		if err := egress.Remove(s.config.StateDir); err != nil {
			s.log.Warn("remove the egress filter of an earlier configuration", "error", err)
		}
		return
	}
	allow, err := s.config.egressAllow()
	switch {
	case err != nil:
		s.noEgress = err // Check refused it
	case n.Mode != "user":
		s.noEgress = fault.New(egress.Code, "what guests send goes to the interface %s, which the VMM does not filter", n.Ifname).
			WithFix("filter it where it ends")
	default:
		s.egress, s.noEgress = egress.Open(egress.Config{Dir: s.config.StateDir, Allow: allow, Log: s.log})
	}
	if s.noEgress != nil {
		s.log.Error("GUESTS REACH this machine's loopback and its networks", "error", s.noEgress, "fix", fault.Fix(s.noEgress),
			"refused_to_start", n.Egress == egressFiltered)
		return
	}
	s.group.Go(func() { s.egress.Watch(s.ctx) })
}

// egressState is the word of the API.
func (s *Server) egressState() string {
	if s.egress != nil {
		return egressFiltered
	}
	return egressOpen
}

// startQEMU starts QEMU where the egress filter sees what it sends. Code vmm_egress.
func (v *vm) startQEMU(slot proc.Slot, cmd *exec.Cmd, run uint64) (*proc.Child, error) {
	s := v.server
	if s.egress == nil {
		if s.config.CVM.Networking.Egress == egressFiltered {
			return nil, fault.Wrap(s.noEgress, egress.Code, "the guest could not be kept from this machine, and egress is filtered").
				WithFix("%s; or set cvm.networking.egress to open", fault.Fix(s.noEgress))
		}
		return slot.Start(cmd, run)
	}
	dir, err := s.egress.Cgroup(v.spec().ID)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return slot.Start(cmd, run)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
