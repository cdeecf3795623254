// SPDX-License-Identifier: Apache-2.0

// Command peerinit is the first process of the boot benchmark's peer VM: it does
// the least that Debian's kernel, containerd, dockerd and docker-compose need to
// run a compose file, so that the comparison is with those and not with a service
// manager. Its commands come on the kernel's command line:
// peer.registry=ADDR:PORT peer.image=NAME@DIGEST peer.tag=NAME.
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var began = time.Now()

func say(format string, args ...any) {
	fmt.Printf("peer: %6.2f %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

func check(err error, what string) {
	if err != nil {
		say("FAILED %s: %v", what, err)
		unix.Sync()
		time.Sleep(100 * time.Millisecond)
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		select {}
	}
}

func mount(from, to, kind string, flags uintptr, data string) {
	_ = os.MkdirAll(to, 0o755)
	check(unix.Mount(from, to, kind, flags, data), "mount "+to)
}

func main() {
	mount("proc", "/proc", "proc", 0, "")
	mount("sysfs", "/sys", "sysfs", 0, "")
	mount("devtmpfs", "/dev", "devtmpfs", 0, "")
	console, err := os.OpenFile("/dev/console", os.O_RDWR, 0)
	check(err, "console")
	os.Stdout, os.Stderr = console, console
	cmdline, _ := os.ReadFile("/proc/cmdline")
	arg := map[string]string{}
	for _, f := range strings.Fields(string(cmdline)) {
		k, v, _ := strings.Cut(f, "=")
		arg[k] = v
	}
	order, err := os.ReadFile("/modules/order")
	check(err, "module list")
	for _, name := range strings.Fields(string(order)) {
		f, err := os.Open("/modules/" + name)
		check(err, name)
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
			say("module %s: %v", name, err)
		}
		f.Close()
	}
	say("modules loaded")
	mount("/dev/vda", "/root", "squashfs", unix.MS_RDONLY, "")
	for _, dir := range []string{"proc", "sys", "dev"} {
		check(unix.Mount("/"+dir, "/root/"+dir, "", unix.MS_MOVE, ""), "move "+dir)
	}
	check(unix.Chdir("/root"), "chdir")
	check(unix.Mount(".", "/", "", unix.MS_MOVE, ""), "move root")
	check(unix.Chroot("."), "chroot")
	check(unix.Chdir("/"), "chdir")
	mount("run", "/run", "tmpfs", 0, "mode=755")
	mount("tmp", "/tmp", "tmpfs", 0, "")
	mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	mount("devpts", "/dev/pts", "devpts", 0, "")
	mount("shm", "/dev/shm", "tmpfs", 0, "")
	mount("mqueue", "/dev/mqueue", "mqueue", 0, "")
	for _, c := range []string{"cpu", "memory", "pids", "io", "cpuset"} {
		_ = os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+"+c), 0)
	}
	for _, link := range []string{"lo", "eth0"} {
		l, err := netlink.LinkByName(link)
		check(err, link)
		check(netlink.LinkSetUp(l), link)
		if link == "eth0" {
			addr, _ := netlink.ParseAddr("10.0.2.15/24")
			check(netlink.AddrAdd(l, addr), "address")
			check(netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(10, 0, 2, 2)}), "route")
		}
	}
	_ = os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	check(os.WriteFile("/run/resolv.conf", []byte("nameserver 10.0.2.3\n"), 0o644), "resolv.conf")
	os.Setenv("PATH", "/usr/sbin:/usr/bin")
	say("mke2fs")
	run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1", "/dev/vdb")
	mount("/dev/vdb", "/data", "ext4", 0, "")
	for _, dir := range []string{"docker", "containerd"} {
		check(os.MkdirAll("/data/"+dir, 0o711), dir)
		check(unix.Mount("/data/"+dir, "/var/lib/"+dir, "", unix.MS_BIND, ""), dir)
	}
	memory("before-engine")
	start("containerd", "--log-level", "warn")
	start("dockerd", "--containerd=/run/containerd/containerd.sock", "--userland-proxy=false", "--insecure-registry", arg["peer.registry"],
		"--exec-opt", "native.cgroupdriver=cgroupfs", "--log-level", "warn")
	docker := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", "/run/docker.sock")
	}}}
	for {
		if resp, err := docker.Get("http://docker/_ping"); err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				break
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	say("dockerd answers")
	name, digest, _ := strings.Cut(arg["peer.image"], "@")
	from := arg["peer.registry"] + "/" + name
	post(docker, "/images/create?fromImage="+url.QueryEscape(from)+"&tag="+url.QueryEscape(digest))
	repo, tag, _ := strings.Cut(arg["peer.tag"], ":")
	post(docker, "/images/"+from+"@"+digest+"/tag?repo="+url.QueryEscape(repo)+"&tag="+url.QueryEscape(tag))
	say("image pulled")
	compose, err := io.ReadAll(blockFile("/dev/vdc"))
	check(err, "compose file")
	check(os.MkdirAll("/run/app", 0o755), "app directory")
	check(os.WriteFile("/run/app/docker-compose.yaml", bytes.TrimRight(compose, "\x00"), 0o644), "compose file")
	check(os.Chdir("/run/app"), "chdir")
	run("docker-compose", "up", "-d", "--pull", "never")
	say("compose up")
	memory("app-up")
	for {
		var status unix.WaitStatus
		if _, err := unix.Wait4(-1, &status, 0, nil); err != nil {
			time.Sleep(time.Second)
		}
	}
}

func blockFile(path string) io.Reader {
	f, err := os.Open(path)
	check(err, path)
	return io.LimitReader(f, 1<<20)
}

func run(name string, args ...string) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix:///run/docker.sock", "HOME=/tmp")
	if out, err := cmd.CombinedOutput(); err != nil {
		check(fmt.Errorf("%w: %s", err, out), name)
	}
}

func start(name string, args ...string) {
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	check(cmd.Start(), name)
}

func post(c *http.Client, path string) {
	resp, err := c.Post("http://docker"+path, "", nil)
	check(err, path)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	check(err, path)
	if resp.StatusCode/100 != 2 || bytes.Contains(body, []byte(`"error"`)) {
		check(fmt.Errorf("status %d: %s", resp.StatusCode, body), path)
	}
}

// memory prints what the guest uses: MemTotal less MemAvailable, in KiB.
func memory(phase string) {
	data, _ := os.ReadFile("/proc/meminfo")
	var total, available int
	for _, line := range strings.Split(string(data), "\n") {
		fmt.Sscanf(line, "MemTotal: %d kB", &total)
		fmt.Sscanf(line, "MemAvailable: %d kB", &available)
	}
	say("memory %s used_kib=%d listed_kib=%d", phase, total-available, listed())
}

// listed returns how much memory is free but on the list of a processor, in KiB:
// /proc/meminfo counts it neither as free nor as available.
func listed() (kib int) {
	data, _ := os.ReadFile("/proc/zoneinfo")
	for _, line := range strings.Split(string(data), "\n") {
		var pages int
		if n, _ := fmt.Sscanf(strings.TrimSpace(line), "count: %d", &pages); n == 1 {
			kib += 4 * pages
		}
	}
	return kib
}
