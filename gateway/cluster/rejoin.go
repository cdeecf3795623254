// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.uber.org/zap/zapcore"
)

// A member whose disk was set back to an older state must not go on with it: it has
// forgotten what it told the others, on which etcd relies, so much so that it ends the
// process when it notices. That, and a store that it cannot read, is marked; at the next
// start the member becomes one anew with an empty store, on the word of its evidence alone:
// it is listed already.

// brokenFile is the mark, in the directory.
const brokenFile = "broken"

// broken is what happens when etcd gives up: zap would end the process without a word.
type broken struct{ dir string }

// OnWrite implements zapcore.CheckWriteHook.
func (b broken) OnWrite(e *zapcore.CheckedEntry, _ []zapcore.Field) {
	_ = os.WriteFile(filepath.Join(b.dir, brokenFile), []byte(e.Message+"\n"), 0o600) // or the next start ends here again
	fmt.Fprintf(os.Stderr, "the gateway ends: the store of its cluster is broken: %s\n", e.Message)
	os.Exit(exitBroken)
}

// exitBroken is how the process ends then; whoever supervises it starts it again.
const exitBroken = 70

// rejoin makes this member one anew, with an empty store. Codes are those of the member
// that is asked.
func (c *Cluster) rejoin() error {
	var last error
	for _, n := range c.state.Members {
		ctx, cancel := context.WithTimeout(c.ctx, 5*patience)
		text, err := c.Call(ctx, n.UUID, "rejoin", nil)
		cancel()
		if err != nil {
			last = err
			continue
		}
		s, err := c.admitted(text)
		if err != nil {
			return err
		}
		aside := filepath.Join(c.cfg.Dir, time.Now().UTC().Format("stale-20060102-150405"))
		if err := os.Rename(filepath.Join(c.cfg.Dir, etcdDir), aside); err != nil && !os.IsNotExist(err) {
			return err
		}
		c.state = *s
		c.log.Warn("cluster: a member anew, with an empty store", "by", n.UUID)
		if err := s.write(c.cfg.Dir); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(c.cfg.Dir, brokenFile)); err != nil && !os.IsNotExist(err) {
			return err
		}
		return nil
	}
	return last
}

// readmit gives a member an empty place in the cluster, in place of the one that it has.
func (c *Cluster) readmit(ctx context.Context, n Node) ([]byte, error) {
	u, err := types.NewURLs([]string{peerURL(n.UUID)})
	if err != nil {
		return nil, err
	}
	if m := c.etcdMembers()[n.UUID]; m != nil {
		wait, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		if _, err := c.server.etcd.RemoveMember(wait, uint64(m.ID)); err != nil {
			return nil, quorum(err)
		}
	}
	if err := c.learn(ctx, u); err != nil {
		return nil, err
	}
	return c.admission(ctx, n)
}
