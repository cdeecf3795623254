// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"

	"github.com/dstack-go/dstack/internal/fault"
)

// Where the kernel of an image comes from.
const (
	// KernelOwn is built from locked source with the committed configuration.
	KernelOwn = "own"
	// KernelDistribution is Debian's packaged cloud kernel, with the modules that
	// the guest needs.
	KernelDistribution = "distribution"
)

// modulesDir holds modules and load.list, in the initramfs as in the root; the names
// and the format are package guest/modules'.
const (
	modulesDir  = "usr/lib/modules"
	modulesList = "load.list"
)

// earlyModules are needed until the root is open, rootModules after it. What they
// depend on follows (see moduleSet.closure). They are what kernel.config has built
// in and Debian has not.
var (
	earlyModules = []string{"configfs", "virtio_blk", "dm-mod", "dm-verity", "squashfs"}
	rootModules  = []string{
		"virtio-rng", "tsm_report", "tdx-guest", "sev-guest", "aesni-intel",
		"dm-crypt", "dm-integrity", "loop", "overlay", "xfs",
		"virtio_net", "vmw_vsock_virtio_transport",
		"bridge", "veth", "tun", "dummy", "8021q", "vxlan", "ipvlan", "macvlan", "wireguard", "tls",
		"nf_tables", "nf_conntrack", "nf_conntrack_netlink", "nf_nat", "nft_chain_nat", "nft_ct", "nft_nat", "nft_masq", "nft_redir",
		"nft_reject", "nft_reject_ipv4", "nft_reject_ipv6", "nft_reject_inet", "nft_log", "nft_limit",
		"nft_fib_ipv4", "nft_fib_ipv6", "nft_fib_inet", "nft_hash", "nft_numgen", "br_netfilter",
	}
	// optionalModules drive hardware that not every machine has.
	optionalModules = []string{"tdx-guest", "sev-guest", "aesni-intel"}
)

// distributionConfig is what the guest cannot do without and loads no module for.
var distributionConfig = []string{
	"BLK_DEV_INITRD", "MODULES", "VIRTIO_PCI", "VIRTIO_CONSOLE", "DEVTMPFS", "TMPFS", "EXT4_FS", "EFI_STUB", "EFI_PARTITION", "RTC_DRV_CMOS",
	"SQUASHFS_LZ4", "SQUASHFS_ZSTD", "CRYPTO_XTS", "CRYPTO_HMAC", "CRYPTO_SHA256", "UNACCEPTED_MEMORY",
	"NF_TABLES_INET", "NF_TABLES_IPV4", "NF_TABLES_IPV6", "BRIDGE_VLAN_FILTERING",
	"MEMCG", "CGROUP_BPF", "CGROUP_PIDS", "CPUSETS", "CFS_BANDWIDTH", "BLK_DEV_THROTTLING", "SECCOMP_FILTER", "USER_NS", "POSIX_MQUEUE", "SECURITY_LANDLOCK",
	"AMD_MEM_ENCRYPT", "INTEL_TDX_GUEST", "TSM_MEASUREMENTS", "TCG_TPM", "TCG_TIS", "TCG_CRB",
}

// Bounds of what a kernel package may hold.
const (
	maxKernelFile = 64 << 20
	maxModule     = 32 << 20 // decompressed
)

// distributionRE matches the packages of one release of Debian's kernel: the image,
// the modules, and what both need.
var distributionRE = regexp.MustCompile(`^linux-(binary|modules|base)-(([0-9]+)\.([0-9]+)\.([0-9]+)\+[a-z0-9.]+-cloud-amd64)$`)

// distributionKernel returns the release of the pinned distribution kernel, such as
// "7.3.4+deb13-cloud-amd64". Its three packages are of one version.
func (l *LockFile) distributionKernel() (string, error) {
	release, version := "", ""
	count := 0
	for _, p := range l.Packages {
		m := distributionRE.FindStringSubmatch(p.Name)
		if m == nil {
			continue
		}
		if count > 0 && (m[2] != release || p.Version != version) {
			return "", fault.New("image_lock_incomplete", "the lock's packages of the distribution's kernel are of two versions").WithFix("run `dstack image lock`")
		}
		release, version = m[2], p.Version
		count++
	}
	if count != 3 {
		return "", fault.New("image_lock_incomplete", "the lock has %d of the 3 packages of the distribution's kernel", count).WithFix("run `dstack image lock`")
	}
	return release, nil
}

func distributionPackages(release string) []string {
	return []string{"linux-base-" + release, "linux-binary-" + release, "linux-modules-" + release}
}

// usesPackage reports whether the build takes a locked package: each kernel leaves
// the packages of the other alone.
func (b *build) usesPackage(name string) bool {
	if b.Kernel == KernelDistribution {
		return !kernelSourceRE.MatchString(name)
	}
	return !distributionRE.MatchString(name)
}

// module is a kernel module of an image.
type module struct {
	name string // of the file, without suffix
	data []byte // ELF, with Debian's signature behind it
}

// distributionKernel takes kernel and modules from Debian's packages.
func (b *build) distributionKernel(_ context.Context, p *artifacts) (bool, error) {
	release, err := b.lock.distributionKernel()
	if err != nil {
		return false, err
	}
	dir := modulesDir + "/" + release + "/"
	set := moduleSet{packed: map[string]packedModule{}, builtin: map[string]bool{}}
	var config []byte
	for _, pkg := range distributionPackages(release) {
		f, err := b.openDeb(pkg)
		if err != nil {
			return false, err
		}
		err = debFiles(f, func(h *tar.Header, r io.Reader) error {
			name, ok := strings.CutPrefix(h.Name, dir)
			if !ok || h.Typeflag != tar.TypeReg {
				return nil
			}
			isModule := strings.HasPrefix(name, "kernel/") && strings.HasSuffix(name, ".ko.xz")
			if !isModule && name != "vmlinuz" && name != "config" && name != "modules.builtin" {
				return nil
			}
			data, err := readAtMost(r, maxKernelFile)
			if err != nil {
				return fmt.Errorf("%s: %w", h.Name, err)
			}
			switch {
			case isModule:
				set.add(strings.TrimSuffix(path.Base(name), ".ko.xz"), data)
			case name == "vmlinuz":
				p.kernel = data
			case name == "config":
				config = data
			default:
				for line := range strings.Lines(string(data)) {
					set.builtin[moduleKey(strings.TrimSuffix(path.Base(strings.TrimSpace(line)), ".ko"))] = true
				}
			}
			return nil
		})
		f.Close()
		if err != nil {
			return false, fmt.Errorf("package %s: %w", pkg, err)
		}
	}
	if p.kernel == nil || config == nil || len(set.packed) == 0 {
		return false, fault.New("image_input_incomplete", "the packages of kernel %s lack vmlinuz, config or modules", release).WithFix("the packages changed: adapt image/distribution.go")
	}
	if err := checkDistributionConfig(config); err != nil {
		return false, err
	}
	if p.early, err = set.closure(earlyModules, nil); err != nil {
		return false, err
	}
	if p.late, err = set.closure(rootModules, p.early); err != nil {
		return false, err
	}
	// Which modules an image has is committed like the files of its root.
	t := tree{}
	addModules(t, "initramfs/", p.early)
	addModules(t, "root/", p.late)
	return true, b.compareFileList("modules", t)
}

// checkDistributionConfig refuses a kernel that lacks something the guest needs.
func checkDistributionConfig(config []byte) error {
	have := map[string]bool{}
	for line := range strings.Lines(string(config)) {
		have[strings.TrimSpace(line)] = true
	}
	var lost []string
	for _, option := range distributionConfig {
		if !have["CONFIG_"+option+"=y"] {
			lost = append(lost, "CONFIG_"+option)
		}
	}
	if len(lost) != 0 {
		return fault.New("kernel_config", "the distribution's kernel does not have %s built in", strings.Join(lost, ", ")).
			WithFix("build with --kernel own, or add the module to image/distribution.go")
	}
	return nil
}

// packedModule is a module as it lies in the package.
type packedModule struct {
	name string
	xz   []byte
}

// moduleSet is what a kernel has, by key.
type moduleSet struct {
	packed  map[string]packedModule
	builtin map[string]bool
}

// moduleKey is the name the kernel knows a module by: files and dependencies are
// written with either sign.
func moduleKey(name string) string { return strings.ReplaceAll(name, "-", "_") }

func (s moduleSet) add(name string, xz []byte) { s.packed[moduleKey(name)] = packedModule{name, xz} }

// closure returns the wanted modules and all they depend on, without those of have,
// each behind its dependencies. The dependencies are those that the modules
// themselves name, from which depmod makes its modules.dep: the packages have no
// such file.
func (s moduleSet) closure(wanted []string, have []module) ([]module, error) {
	const visiting, done = 1, 2
	state := map[string]int{}
	for _, m := range have {
		state[moduleKey(m.name)] = done
	}
	var out []module
	var visit func(name, by string) error
	visit = func(name, by string) error {
		k := moduleKey(name)
		switch state[k] {
		case done:
			return nil
		case visiting:
			return fault.New("kernel_modules", "kernel module %s depends on itself", name)
		}
		packed, ok := s.packed[k]
		if !ok {
			if s.builtin[k] {
				return nil
			}
			return fault.New("kernel_modules", "the distribution's kernel has no module %s, which %s needs", name, by).
				WithFix("build with --kernel own, or adapt image/distribution.go")
		}
		state[k] = visiting
		data, err := unpackModule(packed.xz)
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", packed.name, err)
		}
		depends, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("kernel module %s: %w", packed.name, err)
		}
		for _, d := range depends {
			if err := visit(d, packed.name); err != nil {
				return err
			}
		}
		state[k] = done
		out = append(out, module{packed.name, data})
		return nil
	}
	for _, name := range wanted {
		if err := visit(name, "the guest"); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func unpackModule(packed []byte) ([]byte, error) {
	r, err := xz.NewReader(bufio.NewReader(bytes.NewReader(packed)))
	if err != nil {
		return nil, err
	}
	return readAtMost(r, maxModule)
}

func readAtMost(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	return data, err
}

// moduleDepends returns the names behind "depends=" in a module's .modinfo, a list
// of strings that each end with a zero byte.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		list, ok := strings.CutPrefix(entry, "depends=")
		if !ok {
			continue
		}
		if list == "" {
			return nil, nil
		}
		return strings.Split(list, ","), nil
	}
	return nil, errors.New(".modinfo says nothing of dependencies")
}

// addModules adds modules and the list by which the guest loads them, in order; none
// for the project's own kernel.
func addModules(t tree, prefix string, modules []module) {
	if len(modules) == 0 {
		return
	}
	var list strings.Builder
	for _, m := range modules {
		name := m.name + ".ko"
		t.add(prefix+modulesDir+"/"+name, node{kind: file, mode: 0o644, data: m.data})
		list.WriteString(name)
		if slices.Contains(optionalModules, m.name) {
			list.WriteString(" optional")
		}
		list.WriteByte('\n')
	}
	t.add(prefix+modulesDir+"/"+modulesList, node{kind: file, mode: 0o644, data: []byte(list.String())})
}
