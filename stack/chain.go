// SPDX-License-Identifier: Apache-2.0

package stack

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/dstack-go/dstack/governance/devchain"
	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
)

// ChainDir is where the stack's own development chain is.
func (s *Stack) ChainDir() string { return filepath.Join(s.Dir, "chain") }

// Chain returns what is deployed on the stack's development chain. Code devchain_absent.
func (s *Stack) Chain() (*devchain.Deployment, error) { return devchain.Open(s.ChainDir()) }

func (s *Stack) chainGovernedFile() string { return filepath.Join(s.Dir, "governed-by-chain") }

// GovernedByChain reports whether the stack's KMSs decide by its chain, and not by a
// signed policy.
func (s *Stack) GovernedByChain() bool {
	_, err := os.Stat(s.chainGovernedFile())
	return err == nil
}

// StartChain starts the stack's development chain, or finds it running. Codes: those of
// devchain.Start.
func (s *Stack) StartChain(ctx context.Context, port int, step func(string, ...any)) (*devchain.Chain, error) {
	return devchain.Start(ctx, devchain.Config{Dir: s.ChainDir(), Port: port, Step: step})
}

// StopChain stops the stack's development chain; its state stays.
func (s *Stack) StopChain(grace time.Duration) error { return devchain.Stop(s.ChainDir(), grace) }

// governByChain starts the chain by which the stack's KMSs decide. What a stack is
// governed by stays. Code governance_fixed.
func (s *Stack) governByChain(ctx context.Context, step func(string, ...any)) error {
	if !s.GovernedByChain() {
		if _, err := os.Stat(s.PolicyFile()); err == nil {
			return fault.New("governance_fixed", "this stack is governed by a signed policy").
				WithFix("`dstack down` first, or another stack with --state")
		}
	}
	if _, err := s.StartChain(ctx, 0, step); err != nil {
		return err
	}
	return durable.WriteFile(s.chainGovernedFile(), nil, 0o600)
}

// chainAuthority is a KMS's configuration for deciding by the stack's chain.
func (s *Stack) chainAuthority() (string, error) {
	d, err := s.Chain()
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`[core.auth_api]
type = "chain"

[core.auth_api.chain]
rpc = %q
threshold = 1
registry = %q
chain_id = %d
max_staleness = "30m"
`, d.RPC, d.Registry.Hex(), d.ChainID), nil
}
