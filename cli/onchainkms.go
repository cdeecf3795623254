// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"time"

	"github.com/ethereum/go-ethereum/common"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance/contracts"
	"github.com/dstack-go/dstack/governance/registry"
)

// onRegistry makes a call of the registry.
func (f *signFlags) onRegistry(a *app, what string, c func(registry.KMS) registry.Call) error {
	return f.do(a, what, func(o *onchain) (call, error) { return fixed(c(registry.KMSAt(o.registry))), nil })
}

// on32 is onRegistry of a value of 32 bytes.
func (f *signFlags) on32(a *app, what, text string, c func(registry.KMS, [32]byte) registry.Call) error {
	v, err := parse32("the value", text)
	if err != nil {
		return err
	}
	return f.onRegistry(a, what, func(k registry.KMS) registry.Call { return c(k, v) })
}

type kmsRegisterCmd struct {
	signFlags
	App string `arg:"" help:"App id: the address of its contract."`
}

func (c *kmsRegisterCmd) Run(a *app) error {
	at, err := appAddress(a, c.App)
	if err != nil {
		return err
	}
	return c.onRegistry(a, "register the app", func(k registry.KMS) registry.Call { return k.RegisterApp(at) })
}

type kmsAddImageCmd struct {
	signFlags
	Hash  string `arg:"" help:"Hash of the image."`
	Epoch uint64 `help:"Its security epoch, which stays." default:"0"`
}

func (c *kmsAddImageCmd) Run(a *app) error {
	return c.on32(a, "allow the image", c.Hash, func(k registry.KMS, v [32]byte) registry.Call { return k.AddOSImage(v, c.Epoch) })
}

// valueCmd is a verb of one value of 32 bytes.
type valueCmd struct {
	signFlags
	Value string `arg:"" help:"64 hexadecimal digits."`
}

type (
	kmsAddDeviceCmd    struct{ valueCmd }
	kmsAddMRCmd        struct{ valueCmd }
	kmsRemoveImageCmd  struct{ valueCmd }
	kmsRemoveDeviceCmd struct{ valueCmd }
	kmsRemoveMRCmd     struct{ valueCmd }
)

func (c *kmsAddDeviceCmd) Run(a *app) error {
	return c.on32(a, "allow the machine", c.Value, func(k registry.KMS, v [32]byte) registry.Call { return k.AddDevice(v) })
}

func (c *kmsAddMRCmd) Run(a *app) error {
	return c.on32(a, "allow the measurement", c.Value, registry.KMS.AddMR)
}

func (c *kmsRemoveImageCmd) Run(a *app) error {
	return c.on32(a, "revoke the image", c.Value, func(k registry.KMS, v [32]byte) registry.Call { return k.RemoveOSImage(dstack.ImageHash(v)) })
}

func (c *kmsRemoveDeviceCmd) Run(a *app) error {
	return c.on32(a, "revoke the machine", c.Value, func(k registry.KMS, v [32]byte) registry.Call { return k.RemoveDevice(v) })
}

func (c *kmsRemoveMRCmd) Run(a *app) error {
	return c.on32(a, "revoke the measurement", c.Value, registry.KMS.RemoveMR)
}

type kmsNoticeCmd struct {
	signFlags
	Notice time.Duration `arg:"" help:"Such as 48h."`
}

func (c *kmsNoticeCmd) Run(a *app) error {
	if c.Notice < 0 {
		return usage("a notice is not negative")
	}
	return c.onRegistry(a, "set the notice", func(k registry.KMS) registry.Call { return k.SetNotice(c.Notice) })
}

type kmsTransferCmd struct {
	signFlags
	To string `required:"" help:"The new owner, who must accept." placeholder:"0x…"`
}

func (c *kmsTransferCmd) Run(a *app) error {
	to, err := parseAddress("--to", c.To)
	if err != nil {
		return err
	}
	return c.onRegistry(a, "offer the registry", func(k registry.KMS) registry.Call { return k.Transfer(to) })
}

type kmsAcceptCmd struct{ signFlags }

func (c *kmsAcceptCmd) Run(a *app) error {
	return c.do(a, "accept the registry", func(o *onchain) (call, error) { return registry.KMSAt(o.registry).Accept, nil })
}

type kmsHistoryCmd struct {
	chainFlags
	Since uint64 `help:"First block." default:"0"`
}

func (c *kmsHistoryCmd) Run(a *app) error {
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	return o.history(a, contracts.KMS, o.registry, c.Since)
}

func (c *kmsStatusCmd) onChain(a *app) error {
	o, err := c.connect(a)
	if err != nil {
		return err
	}
	defer o.node.Close()
	s, err := registry.KMSAt(o.registry).Status(a.ctx, o.node, nil)
	if err != nil {
		return err
	}
	a.printf("Registry            %s, chain %d\n", o.registry.Hex(), o.chainID)
	o.status(a, s)
	if s.GatewayAppID != "" {
		a.printf("Gateway app         %s\n", printable(s.GatewayAppID))
	}
	if s.AppImplementation != (common.Address{}) {
		a.printf("New apps' code      %s\n", s.AppImplementation.Hex())
	}
	out, err := o.lists(a, contracts.KMS, o.registry, "os-image", "kms-aggregated-mr", "kms-device", "registered-app")
	if err != nil {
		return err
	}
	out["status"] = s
	if k, err := a.stack.Keys(); err == nil {
		out["nodes"] = k.Nodes
	}
	return a.result(out)
}
