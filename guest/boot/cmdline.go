// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"encoding/hex"
	"strconv"
	"strings"

	"github.com/dstack-go/dstack/guest/disk"
	"github.com/dstack-go/dstack/internal/fault"
)

// maxCmdline is the longest command line of x86-64 (COMMAND_LINE_SIZE is 2048) and
// then some.
const maxCmdline = 4096

// parseCmdline takes the root's verity parameters from the kernel command line:
//
//	dstack.rootfs_hash=<64 lowercase hex digits> dstack.rootfs_size=<bytes>
//
// Both are required, once. The line is measured, yet any other key beginning with
// dstack. stops the boot (threats.md D04): a key that some other version understands
// must not be silently inert here, nor the reverse. Everything else belongs to the
// kernel. Codes: cmdline_unknown, cmdline_malformed, cmdline_missing.
func parseCmdline(line string) (disk.Verity, error) {
	var v disk.Verity
	if len(line) > maxCmdline {
		return v, fault.New("cmdline_malformed", "the kernel command line has %d bytes, more than %d", len(line), maxCmdline)
	}
	seen := map[string]bool{}
	for _, token := range strings.Fields(line) {
		// The kernel strips double quotes around a token or its value. One more way
		// to write the same key is one too many.
		if strings.ContainsRune(token, '"') && strings.Contains(token, "dstack.") {
			return v, fault.New("cmdline_malformed", "kernel command line: %q has quotes", token)
		}
		if !strings.HasPrefix(strings.ToLower(token), "dstack.") {
			continue
		}
		key, value, _ := strings.Cut(token, "=")
		if seen[key] {
			return v, fault.New("cmdline_malformed", "kernel command line: %s is given twice", key)
		}
		seen[key] = true
		switch key {
		case "dstack.rootfs_hash":
			b, err := hex.DecodeString(value)
			if err != nil || len(b) != len(v.RootHash) || value != strings.ToLower(value) {
				return v, fault.New("cmdline_malformed", "kernel command line: %s is not 64 lowercase hexadecimal digits", key)
			}
			copy(v.RootHash[:], b)
		case "dstack.rootfs_size":
			n, err := strconv.ParseUint(value, 10, 63)
			if err != nil || n == 0 || n%disk.VerityBlock != 0 || strconv.FormatUint(n, 10) != value {
				return v, fault.New("cmdline_malformed", "kernel command line: %s=%s is not a positive multiple of %d", key, value, disk.VerityBlock)
			}
			v.DataSize = n
		default:
			return v, fault.New("cmdline_unknown", "kernel command line: %s is not a key that this system knows", key).
				WithFix("use the command line of the image's metadata.json unchanged")
		}
	}
	for _, key := range []string{"dstack.rootfs_hash", "dstack.rootfs_size"} {
		if !seen[key] {
			return v, fault.New("cmdline_missing", "kernel command line: %s is missing", key).
				WithFix("use the command line of the image's metadata.json unchanged")
		}
	}
	return v, nil
}
