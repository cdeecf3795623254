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

// layers are the verity devices that the kernel command line names.
type layers struct {
	root disk.Verity
	// scripts is what a manifest's scripts run in (design.md §6); nil on an image
	// that has none.
	scripts *disk.Verity
}

// parseCmdline takes the verity parameters from the kernel command line:
//
//	dstack.rootfs_hash=<64 lowercase hex digits> dstack.rootfs_size=<bytes>
//	dstack.scripts_hash=<64 lowercase hex digits> dstack.scripts_size=<bytes>
//
// The first two are required, once; the other two stand together, once, or not at
// all. The line is measured, yet any other key beginning with dstack. stops the boot
// (threats.md D04): a key that some other version understands must not be silently
// inert here, nor the reverse. Everything else belongs to the kernel. Codes:
// cmdline_unknown, cmdline_malformed, cmdline_missing.
func parseCmdline(line string) (layers, error) {
	var none, l layers
	var scripts disk.Verity
	if len(line) > maxCmdline {
		return none, fault.New("cmdline_malformed", "the kernel command line has %d bytes, more than %d", len(line), maxCmdline)
	}
	seen := map[string]bool{}
	for _, token := range strings.Fields(line) {
		// The kernel strips double quotes around a token or its value. One more way
		// to write the same key is one too many.
		if strings.ContainsRune(token, '"') && strings.Contains(token, "dstack.") {
			return none, fault.New("cmdline_malformed", "kernel command line: %q has quotes", token)
		}
		if !strings.HasPrefix(strings.ToLower(token), "dstack.") {
			continue
		}
		key, value, _ := strings.Cut(token, "=")
		if seen[key] {
			return none, fault.New("cmdline_malformed", "kernel command line: %s is given twice", key)
		}
		seen[key] = true
		var err error
		switch key {
		case "dstack.rootfs_hash":
			l.root.RootHash, err = parseRootHash(key, value)
		case "dstack.rootfs_size":
			l.root.DataSize, err = parseDataSize(key, value)
		case "dstack.scripts_hash":
			scripts.RootHash, err = parseRootHash(key, value)
		case "dstack.scripts_size":
			scripts.DataSize, err = parseDataSize(key, value)
		default:
			err = fault.New("cmdline_unknown", "kernel command line: %s is not a key that this system knows", key).
				WithFix("use the command line of the image's metadata.json unchanged")
		}
		if err != nil {
			return none, err
		}
	}
	required := []string{"dstack.rootfs_hash", "dstack.rootfs_size"}
	if seen["dstack.scripts_hash"] || seen["dstack.scripts_size"] {
		required = append(required, "dstack.scripts_hash", "dstack.scripts_size")
		l.scripts = &scripts
	}
	for _, key := range required {
		if !seen[key] {
			return none, fault.New("cmdline_missing", "kernel command line: %s is missing", key).
				WithFix("use the command line of the image's metadata.json unchanged")
		}
	}
	return l, nil
}

func parseRootHash(key, value string) (hash [32]byte, err error) {
	b, err := hex.DecodeString(value)
	if err != nil || len(b) != len(hash) || value != strings.ToLower(value) {
		return hash, fault.New("cmdline_malformed", "kernel command line: %s is not 64 lowercase hexadecimal digits", key)
	}
	return [32]byte(b), nil
}

func parseDataSize(key, value string) (uint64, error) {
	n, err := strconv.ParseUint(value, 10, 63)
	if err != nil || n == 0 || n%disk.VerityBlock != 0 || strconv.FormatUint(n, 10) != value {
		return 0, fault.New("cmdline_malformed", "kernel command line: %s=%s is not a positive multiple of %d", key, value, disk.VerityBlock)
	}
	return n, nil
}
