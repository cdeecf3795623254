// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	otherHash = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100"
	testHash  = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	goodLine  = "console=ttyS0 init=/init panic=-1 net.ifnames=0 dstack.rootfs_hash=" + testHash + " dstack.rootfs_size=8192\n"
)

func TestParseCmdline(t *testing.T) {
	l, err := parseCmdline(goodLine)
	if err != nil {
		t.Fatal(err)
	}
	if v := l.root; v.DataSize != 8192 || v.RootHash[1] != 0x11 || v.RootHash[31] != 0xff || l.scripts != nil {
		t.Fatalf("parsed %+v", l)
	}
	// The order does not matter.
	l, err = parseCmdline("dstack.scripts_size=4096 dstack.scripts_hash=" + otherHash + " " + goodLine)
	if err != nil {
		t.Fatal(err)
	}
	if v := l.scripts; l.root.DataSize != 8192 || l.root.RootHash[0] != 0 || v == nil || v.DataSize != 4096 || v.RootHash[0] != 0xff {
		t.Fatalf("parsed %+v", l)
	}
}

func TestParseCmdlineRefuses(t *testing.T) {
	hash, size := "dstack.rootfs_hash="+testHash, "dstack.rootfs_size=8192"
	scriptsHash, scriptsSize := "dstack.scripts_hash="+otherHash, "dstack.scripts_size=4096"
	for name, c := range map[string]struct{ line, code string }{
		"nothing":                           {"", "cmdline_missing"},
		"no hash":                           {size, "cmdline_missing"},
		"no size":                           {hash, "cmdline_missing"},
		"an unknown key":                    {goodLine + " dstack.storage_encrypted=false", "cmdline_unknown"},
		"an unknown key, no value":          {goodLine + " dstack.debug", "cmdline_unknown"},
		"an unknown key in capitals":        {goodLine + " DSTACK.debug", "cmdline_unknown"},
		"a dash for an underscore":          {goodLine + " dstack.rootfs-hash=" + testHash, "cmdline_unknown"},
		"behind the kernel's --":            {goodLine + " -- dstack.shell=1", "cmdline_unknown"},
		"an upstream key we lack":           {goodLine + " dstack.rootfs_device=/dev/vdb", "cmdline_unknown"},
		"a hash given twice":                {hash + " " + hash + " " + size, "cmdline_malformed"},
		"a size given twice":                {hash + " " + size + " " + size, "cmdline_malformed"},
		"a short hash":                      {"dstack.rootfs_hash=00 " + size, "cmdline_malformed"},
		"a capital hash":                    {"dstack.rootfs_hash=" + strings.ToUpper(testHash) + " " + size, "cmdline_malformed"},
		"a hash that is not hex":            {"dstack.rootfs_hash=" + strings.Repeat("z", 64) + " " + size, "cmdline_malformed"},
		"an empty hash":                     {"dstack.rootfs_hash= " + size, "cmdline_malformed"},
		"a quoted key":                      {`"dstack.debug=1" ` + goodLine, "cmdline_malformed"},
		"a quoted value":                    {hash + ` dstack.rootfs_size="8192"`, "cmdline_malformed"},
		"size zero":                         {hash + " dstack.rootfs_size=0", "cmdline_malformed"},
		"size not a block multiple":         {hash + " dstack.rootfs_size=8193", "cmdline_malformed"},
		"a negative size":                   {hash + " dstack.rootfs_size=-4096", "cmdline_malformed"},
		"a size with a plus":                {hash + " dstack.rootfs_size=+8192", "cmdline_malformed"},
		"a size with zeros":                 {hash + " dstack.rootfs_size=08192", "cmdline_malformed"},
		"a size of 2^63":                    {hash + " dstack.rootfs_size=9223372036854775808", "cmdline_malformed"},
		"a scripts hash alone":              {goodLine + " " + scriptsHash, "cmdline_missing"},
		"a scripts size alone":              {goodLine + " " + scriptsSize, "cmdline_missing"},
		"the scripts layer without a root":  {scriptsHash + " " + scriptsSize, "cmdline_missing"},
		"a scripts hash given twice":        {goodLine + " " + scriptsHash + " " + scriptsHash + " " + scriptsSize, "cmdline_malformed"},
		"a scripts size given twice":        {goodLine + " " + scriptsHash + " " + scriptsSize + " " + scriptsSize, "cmdline_malformed"},
		"a short scripts hash":              {goodLine + " dstack.scripts_hash=00 " + scriptsSize, "cmdline_malformed"},
		"a capital scripts hash":            {goodLine + " dstack.scripts_hash=" + strings.ToUpper(otherHash) + " " + scriptsSize, "cmdline_malformed"},
		"an empty scripts hash":             {goodLine + " dstack.scripts_hash= " + scriptsSize, "cmdline_malformed"},
		"scripts size zero":                 {goodLine + " " + scriptsHash + " dstack.scripts_size=0", "cmdline_malformed"},
		"scripts size not a block multiple": {goodLine + " " + scriptsHash + " dstack.scripts_size=4097", "cmdline_malformed"},
		"a quoted scripts size":             {goodLine + " " + scriptsHash + ` dstack.scripts_size="4096"`, "cmdline_malformed"},
		"another key of the scripts layer":  {goodLine + " " + scriptsHash + " " + scriptsSize + " dstack.scripts_device=/dev/vdb", "cmdline_unknown"},
		"too long a line":                   {strings.Repeat("x", 5000) + goodLine, "cmdline_malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parseCmdline(c.line); fault.Code(err) != c.code {
				t.Fatalf("error %v, want code %s", err, c.code)
			}
		})
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add(goodLine)
	f.Add(`"dstack.a" dstack.rootfs_size=4096`)
	f.Add(goodLine + " dstack.scripts_hash=" + otherHash + " dstack.scripts_size=4096")
	f.Fuzz(func(t *testing.T, line string) {
		l, err := parseCmdline(line)
		if err != nil {
			return
		}
		if l.root.DataSize == 0 || strings.Count(line, "dstack.") < 2 {
			t.Fatalf("%q gave %+v", line, l)
		}
		if l.scripts != nil && (l.scripts.DataSize == 0 || strings.Count(line, "dstack.scripts_") < 2) {
			t.Fatalf("%q gave %+v", line, *l.scripts)
		}
	})
}
