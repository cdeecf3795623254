// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

type chainCmd struct {
	Dev  chainDevCmd  `cmd:"" help:"Start a development chain with the governance contracts, and stay until interrupted."`
	Stop chainStopCmd `cmd:"" help:"Stop the development chain; its state stays."`
}

type chainDevCmd struct {
	Port       int  `help:"Port of loopback; as before, or a free one, by default."`
	Background bool `help:"Leave it running: dstack chain stop ends it."`
}

func (c *chainDevCmd) Run(a *app) error {
	chain, err := a.stack.StartChain(a.ctx, c.Port, a.step)
	if err != nil {
		return err
	}
	a.printf("RPC                %s (%s)\n", chain.RPC, a.paint(amber, "development: whoever reaches it can write any state"))
	a.printf("Chain id           %d\n", chain.ChainID)
	a.printf("Registry           %s\n", chain.Registry.Hex())
	a.printf("App implementation %s\n", chain.AppImplementation.Hex())
	a.printf("Owner              %s\n", chain.Owner.Hex())
	a.printf("Its key            %s\n", chain.Keystore)
	if err := a.result(chain.Deployment); err != nil || c.Background {
		return err
	}
	select {
	case <-a.ctx.Done():
	case err := <-chain.Exited: // nil, and never ready, of a chain that ran before
		return fault.New("devchain_ended", "the node ended by itself: %v", err)
	}
	if chain.Exited == nil {
		return nil // not ours to end
	}
	a.step("stop the chain")
	return a.stack.StopChain(20 * time.Second)
}

type chainStopCmd struct{}

func (*chainStopCmd) Run(a *app) error {
	if err := a.stack.StopChain(20 * time.Second); err != nil {
		return err
	}
	a.step("the chain is stopped")
	return a.result(map[string]any{"stopped": true})
}
