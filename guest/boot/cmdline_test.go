// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"strings"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
)

const (
	testHash = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	goodLine = "console=ttyS0 init=/init panic=-1 net.ifnames=0 dstack.rootfs_hash=" + testHash + " dstack.rootfs_size=8192\n"
)

func TestParseCmdline(t *testing.T) {
	v, err := parseCmdline(goodLine)
	if err != nil {
		t.Fatal(err)
	}
	if v.DataSize != 8192 || v.RootHash[1] != 0x11 || v.RootHash[31] != 0xff {
		t.Fatalf("parsed %+v", v)
	}
}

func TestParseCmdlineRefuses(t *testing.T) {
	hash, size := "dstack.rootfs_hash="+testHash, "dstack.rootfs_size=8192"
	for name, c := range map[string]struct{ line, code string }{
		"nothing":                    {"", "cmdline_missing"},
		"no hash":                    {size, "cmdline_missing"},
		"no size":                    {hash, "cmdline_missing"},
		"an unknown key":             {goodLine + " dstack.storage_encrypted=false", "cmdline_unknown"},
		"an unknown key, no value":   {goodLine + " dstack.debug", "cmdline_unknown"},
		"an unknown key in capitals": {goodLine + " DSTACK.debug", "cmdline_unknown"},
		"a dash for an underscore":   {goodLine + " dstack.rootfs-hash=" + testHash, "cmdline_unknown"},
		"behind the kernel's --":     {goodLine + " -- dstack.shell=1", "cmdline_unknown"},
		"an upstream key we lack":    {goodLine + " dstack.rootfs_device=/dev/vdb", "cmdline_unknown"},
		"a hash given twice":         {hash + " " + hash + " " + size, "cmdline_malformed"},
		"a size given twice":         {hash + " " + size + " " + size, "cmdline_malformed"},
		"a short hash":               {"dstack.rootfs_hash=00 " + size, "cmdline_malformed"},
		"a capital hash":             {"dstack.rootfs_hash=" + strings.ToUpper(testHash) + " " + size, "cmdline_malformed"},
		"a hash that is not hex":     {"dstack.rootfs_hash=" + strings.Repeat("z", 64) + " " + size, "cmdline_malformed"},
		"an empty hash":              {"dstack.rootfs_hash= " + size, "cmdline_malformed"},
		"a quoted key":               {`"dstack.debug=1" ` + goodLine, "cmdline_malformed"},
		"a quoted value":             {hash + ` dstack.rootfs_size="8192"`, "cmdline_malformed"},
		"size zero":                  {hash + " dstack.rootfs_size=0", "cmdline_malformed"},
		"size not a block multiple":  {hash + " dstack.rootfs_size=8193", "cmdline_malformed"},
		"a negative size":            {hash + " dstack.rootfs_size=-4096", "cmdline_malformed"},
		"a size with a plus":         {hash + " dstack.rootfs_size=+8192", "cmdline_malformed"},
		"a size with zeros":          {hash + " dstack.rootfs_size=08192", "cmdline_malformed"},
		"a size of 2^63":             {hash + " dstack.rootfs_size=9223372036854775808", "cmdline_malformed"},
		"too long a line":            {strings.Repeat("x", 5000) + goodLine, "cmdline_malformed"},
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
	f.Fuzz(func(t *testing.T, line string) {
		v, err := parseCmdline(line)
		if err == nil && (v.DataSize == 0 || strings.Count(line, "dstack.") < 2) {
			t.Fatalf("%q gave %+v", line, v)
		}
	})
}
