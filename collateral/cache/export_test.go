// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"

	"github.com/dstack-go/dstack/collateral"
)

// WriteEntry writes an entry as a hostile process of the same user could: any
// content, under the right key and checksum.
func WriteEntry(c *Cache, want collateral.Request, at string, content []byte, bundle bool) error {
	key, suffix, member := c.key(want), missSuffix, "miss"
	if bundle {
		suffix, member = bundleSuffix, "bundle"
	}
	body := fmt.Appendf(nil, `{"key":%q,"at":%q,%q:%s}`, key, at, member, content)
	data := append(fmt.Appendf(nil, "%x\n", sha256.Sum256(body)), body...)
	return os.WriteFile(filepath.Join(c.dir, key+suffix), data, 0o600)
}
