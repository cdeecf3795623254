// SPDX-License-Identifier: Apache-2.0

package registry

import (
	"context"
	"fmt"
	"math/big"
	"time"

	"github.com/ethereum/go-ethereum/accounts/abi"
	"github.com/ethereum/go-ethereum/common"
	"github.com/ethereum/go-ethereum/crypto"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/governance"
	"github.com/dstack-go/dstack/governance/contracts"
)

// governed is what both contracts have: owner, guardian, notice.
type governed struct {
	contract string
	at       common.Address
}

func (g governed) call(signature string, args ...any) Call {
	return call(g.contract, g.at, signature, args...)
}

// Address is the contract's.
func (g governed) Address() common.Address { return g.at }

// Transfer offers the contract to a new owner, who must accept.
func (g governed) Transfer(to common.Address) Call {
	return g.call("transferOwnership(address)", to).done(g.call("pendingOwner()"), to)
}

// Accept takes the ownership that was offered to the sender.
func (g governed) Accept(self common.Address) Call {
	return g.call("acceptOwnership()").done(g.call("owner()"), self)
}

// SetNotice sets how long grants are announced before they take effect.
func (g governed) SetNotice(notice time.Duration) Call {
	s := uint64(notice / time.Second)
	return g.call("setNotice(uint64)", s).announced("notice", uintHash(s)).done(g.call("notice()"), s)
}

// SetGuardian names who else may revoke.
func (g governed) SetGuardian(account common.Address) Call {
	return g.call("setGuardian(address)", account).announced("guardian", addressHash(account)).done(g.call("guardian()"), account)
}

// Cancel withdraws an announcement.
func (g governed) Cancel(c Change) Call {
	return g.call("cancel(bytes32,bytes32)", c.Policy, c.Value)
}

// SetKeyEpoch begins the next key epoch.
func (g governed) SetKeyEpoch(epoch uint64) Call {
	return g.call("setKeyEpoch(uint64)", epoch).done(g.call("keyEpoch()"), epoch)
}

// Upgrade replaces the code.
func (g governed) Upgrade(implementation common.Address, data []byte) Call {
	args := abi.Arguments{{Type: mustABI(g.contract).Methods["owner"].Outputs[0].Type}, {Type: mustABI(g.contract).Methods["upgradeToAndCall"].Inputs[1].Type}}
	packed, err := args.Pack(implementation, data)
	if err != nil {
		panic(err)
	}
	return g.call("upgradeToAndCall(address,bytes)", implementation, data).announced("implementation-upgrade", crypto.Keccak256Hash(packed))
}

// ChangeView asks for an announcement.
func (g governed) ChangeView(c Change) Call {
	return g.call("change(bytes32,bytes32)", c.Policy, c.Value)
}

// Announcement is what Notice.change tells. Zero times: there was none.
type Announcement struct {
	Announced time.Time `json:"announced"`
	Effective time.Time `json:"effective"`
	Pending   bool      `json:"pending"`
}

// Lapse is how long after its time an announcement may still be used.
const Lapse = 14 * 24 * time.Hour

// ReadChange asks a contract for an announcement. Codes: those of View.
func ReadChange(ctx context.Context, from Caller, contract string, at common.Address, c Change, block *big.Int) (Announcement, error) {
	values, err := View(ctx, from, governed{contract, at}.ChangeView(c), block)
	if err != nil {
		return Announcement{}, err
	}
	announced, effective := values[0].(uint64), values[1].(uint64)
	if announced == 0 {
		return Announcement{}, nil
	}
	// A time beyond what time.Time counts is no time.
	const most = 1 << 40
	return Announcement{time.Unix(int64(min(announced, most)), 0).UTC(), time.Unix(int64(min(effective, most)), 0).UTC(), values[2].(bool)}, nil
}

// App is one app's contract.
type App struct{ governed }

// AppAt returns the app at an address. The address is the app id.
func AppAt(at common.Address) App { return App{governed{contracts.App, at}} }

func (a App) allowed(view string, value [32]byte) Call { return a.call(view+"(bytes32)", value) }

// AddComposeHash allows a manifest.
func (a App) AddComposeHash(h dstack.ComposeHash) Call {
	return a.call("addComposeHash(bytes32)", h).announced("compose-hash", common.Hash(h)).done(a.allowed("allowedComposeHashes", h), true)
}

// RemoveComposeHash revokes a manifest, or withdraws its announcement.
func (a App) RemoveComposeHash(h dstack.ComposeHash) Call {
	return a.call("removeComposeHash(bytes32)", h).forgets("compose-hash", common.Hash(h)).done(a.allowed("allowedComposeHashes", h), false)
}

// AddDevice allows a machine.
func (a App) AddDevice(d dstack.DeviceID) Call {
	return a.call("addDevice(bytes32)", d).announced("device", common.Hash(d)).done(a.allowed("allowedDeviceIds", d), true)
}

// RemoveDevice revokes a machine, or withdraws its announcement.
func (a App) RemoveDevice(d dstack.DeviceID) Call {
	return a.call("removeDevice(bytes32)", d).forgets("device", common.Hash(d)).done(a.allowed("allowedDeviceIds", d), false)
}

// SetAllowAnyDevice allows every machine, or the listed ones only.
func (a App) SetAllowAnyDevice(any bool) Call {
	c := a.call("setAllowAnyDevice(bool)", any).done(a.call("allowAnyDevice()"), any)
	if !any {
		return c.forgets("allow-any-device", common.Hash{})
	}
	return c.announced("allow-any-device", common.Hash{})
}

// SetRequireTCBUpToDate demands that platforms have no known weakness, or ends that.
func (a App) SetRequireTCBUpToDate(require bool) Call {
	c := a.call("setRequireTcbUpToDate(bool)", require).done(a.call("requireTcbUpToDate()"), require)
	if require {
		return c.forgets("require-tcb-up-to-date", common.Hash{})
	}
	return c.announced("require-tcb-up-to-date", common.Hash{})
}

// Freeze ends additions and upgrades for ever.
func (a App) Freeze() Call { return a.call("freeze()").done(a.call("frozen()"), true) }

// KMS is the registry of one KMS.
type KMS struct{ governed }

// KMSAt returns the registry at an address.
func KMSAt(at common.Address) KMS { return KMS{governed{contracts.KMS, at}} }

func (k KMS) allowed(view string, value [32]byte) Call { return k.call(view+"(bytes32)", value) }

// AddOSImage allows an image with its security epoch.
func (k KMS) AddOSImage(h dstack.ImageHash, epoch uint64) Call {
	return k.call("addOsImage(bytes32,uint64)", h, epoch).announced("os-image", common.Hash(h)).done(k.allowed("allowedOsImages", h), true)
}

// RemoveOSImage revokes an image, or withdraws its announcement.
func (k KMS) RemoveOSImage(h dstack.ImageHash) Call {
	return k.call("removeOsImageHash(bytes32)", h).forgets("os-image", common.Hash(h)).done(k.allowed("allowedOsImages", h), false)
}

// SetMinOSEpoch revokes every image of an earlier security epoch, for ever.
func (k KMS) SetMinOSEpoch(epoch uint64) Call {
	return k.call("setMinOsEpoch(uint64)", epoch).done(k.call("minOsEpoch()"), epoch)
}

// AddDevice lets a machine be the KMS.
func (k KMS) AddDevice(d dstack.DeviceID) Call {
	return k.call("addKmsDevice(bytes32)", d).announced("kms-device", common.Hash(d)).done(k.allowed("kmsAllowedDeviceIds", d), true)
}

// RemoveDevice revokes a machine of the KMS, or withdraws its announcement.
func (k KMS) RemoveDevice(d dstack.DeviceID) Call {
	return k.call("removeKmsDevice(bytes32)", d).forgets("kms-device", common.Hash(d)).done(k.allowed("kmsAllowedDeviceIds", d), false)
}

// AddMR lets what has this aggregated measurement be the KMS.
func (k KMS) AddMR(mr [32]byte) Call {
	return k.call("addKmsAggregatedMr(bytes32)", mr).announced("kms-aggregated-mr", mr).done(k.allowed("kmsAllowedAggregatedMrs", mr), true)
}

// RemoveMR revokes a measurement, or withdraws its announcement.
func (k KMS) RemoveMR(mr [32]byte) Call {
	return k.call("removeKmsAggregatedMr(bytes32)", mr).forgets("kms-aggregated-mr", mr).done(k.allowed("kmsAllowedAggregatedMrs", mr), false)
}

// Info is who the KMS is, as clients and guests are told.
type Info struct {
	K256Pubkey []byte
	CaPubkey   []byte
	Quote      []byte
	Eventlog   []byte
}

// SetInfo says who the KMS is.
func (k KMS) SetInfo(i Info) Call {
	c := k.call("setKmsInfo((bytes,bytes,bytes,bytes))", i)
	return c.announced("kms-info", crypto.Keccak256Hash(c.Data[4:]))
}

// SetGateway names the app id of the gateways; empty: none.
func (k KMS) SetGateway(id string) Call {
	c := k.call("setGatewayAppId(string)", id).done(k.call("gatewayAppId()"), id)
	if id != "" {
		c = c.announced("gateway-app-id", PolicyID(id))
	}
	return c
}

// SetAppImplementation says which code new apps have.
func (k KMS) SetAppImplementation(at common.Address) Call {
	return k.call("setAppImplementation(address)", at).announced("app-implementation", addressHash(at)).done(k.call("appImplementation()"), at)
}

// RegisterApp registers an app's contract: anybody's call.
func (k KMS) RegisterApp(app common.Address) Call {
	return k.call("registerApp(address)", app).done(k.call("registeredApps(address)", app), true)
}

// WithdrawApp takes an app out: its owner's call.
func (k KMS) WithdrawApp(app common.Address) Call {
	return k.call("withdrawApp(address)", app).done(k.call("registeredApps(address)", app), false)
}

// AppConfig is how an app begins, in the order of the contract's struct.
type AppConfig struct {
	Owner              common.Address
	Guardian           common.Address
	Notice             uint64 // seconds
	DisableUpgrades    bool
	Frozen             bool
	RequireTcbUpToDate bool
	AllowAnyDevice     bool
	DeviceIds          [][32]byte
	ComposeHashes      [][32]byte
}

// DeployApp deploys an app's contract and registers it.
func (k KMS) DeployApp(c AppConfig) Call {
	if c.DeviceIds == nil {
		c.DeviceIds = [][32]byte{}
	}
	if c.ComposeHashes == nil {
		c.ComposeHashes = [][32]byte{}
	}
	return k.call("deployAndRegisterApp((address,address,uint64,bool,bool,bool,bool,bytes32[],bytes32[]))", c)
}

// bootInfo is governance.BootInfo as the contracts have it: spec/governance.md §4.1.
type bootInfo struct {
	AppId        common.Address
	ComposeHash  [32]byte
	InstanceId   common.Address
	DeviceId     [32]byte
	MrAggregated [32]byte
	MrSystem     [32]byte
	OsImageHash  [32]byte
	TcbStatus    string
	AdvisoryIds  []string
}

// question puts a boot into the contracts' form. What is absent is zero; what does not
// fit is an error, since cut short it would stand for something else.
func question(b governance.BootInfo) (bootInfo, error) {
	q := bootInfo{
		AppId: common.Address(b.AppID), ComposeHash: b.ComposeHash, DeviceId: b.DeviceID,
		MrAggregated: b.MRAggregated, MrSystem: b.MRSystem, TcbStatus: b.TCBStatus, AdvisoryIds: b.AdvisoryIDs,
	}
	if q.AdvisoryIds == nil {
		q.AdvisoryIds = []string{}
	}
	if n := len(b.OSImageHash); n != 0 && n != 32 {
		return q, fmt.Errorf("an image's hash of %d bytes", n)
	}
	if n := len(b.InstanceID); n != 0 && n != 20 {
		return q, fmt.Errorf("an instance id of %d bytes", n)
	}
	copy(q.OsImageHash[:], b.OSImageHash)
	copy(q.InstanceId[:], b.InstanceID)
	return q, nil
}

const bootInfoTypes = "(address,bytes32,address,bytes32,bytes32,bytes32,bytes32,string,string[])"

// Allowed asks whether a machine may boot in a role. With platform, the kind of TEE is
// told as well (isAppAllowedOn, isKmsAllowedOn), which upstream's contracts do not know.
func (k KMS) Allowed(role governance.Role, b governance.BootInfo, platform bool) (Call, error) {
	q, err := question(b)
	if err != nil {
		return Call{}, err
	}
	name := "isAppAllowed"
	if role == governance.KMS {
		name = "isKmsAllowed"
	}
	if platform {
		return k.call(name+"On("+bootInfoTypes+",string)", q, b.TEEVariant), nil
	}
	return k.call(name+"("+bootInfoTypes+")", q), nil
}

// Allowed asks the app itself whether a machine may run it.
func (a App) Allowed(b governance.BootInfo, platform bool) (Call, error) {
	q, err := question(b)
	if err != nil {
		return Call{}, err
	}
	if platform {
		return a.call("isAppAllowedOn("+bootInfoTypes+",string)", q, b.TEEVariant), nil
	}
	return a.call("isAppAllowed("+bootInfoTypes+")", q), nil
}

// Status is what both contracts say of themselves.
type Status struct {
	Owner        common.Address `json:"owner"`
	PendingOwner common.Address `json:"pending_owner,omitzero"`
	Guardian     common.Address `json:"guardian,omitzero"`
	// Notice is how long a grant is announced before it takes effect, in seconds.
	Notice         uint64 `json:"notice_seconds"`
	KeyEpoch       uint64 `json:"key_epoch"`
	OldestKeyEpoch uint64 `json:"oldest_key_epoch"`

	// Of an app.
	Registered         bool `json:"registered,omitempty"`
	Frozen             bool `json:"frozen,omitempty"`
	AllowAnyDevice     bool `json:"allow_any_device,omitempty"`
	RequireTCBUpToDate bool `json:"require_tcb_up_to_date,omitempty"`
	// Of the registry.
	GatewayAppID      string         `json:"gateway_app_id,omitempty"`
	AppImplementation common.Address `json:"app_implementation,omitzero"`
	MinOSEpoch        uint64         `json:"min_os_epoch,omitempty"`
	UpgradesDisabled  bool           `json:"upgrades_disabled,omitempty"`
}

// ask reads views without arguments into where they belong.
func (g governed) ask(ctx context.Context, from Caller, block *big.Int, into map[string]any) error {
	for view, place := range into {
		values, err := View(ctx, from, g.call(view+"()"), block)
		if err != nil {
			return err
		}
		switch p := place.(type) {
		case *common.Address:
			*p = values[0].(common.Address)
		case *uint64:
			*p = values[0].(uint64)
		case *bool:
			*p = values[0].(bool)
		case *string:
			*p = values[0].(string)
		}
	}
	return nil
}

func (g governed) common(s *Status) map[string]any {
	return map[string]any{
		"owner": &s.Owner, "pendingOwner": &s.PendingOwner, "guardian": &s.Guardian, "notice": &s.Notice,
		"keyEpoch": &s.KeyEpoch, "oldestKeyEpoch": &s.OldestKeyEpoch,
	}
}

// Status asks an app. Codes: those of View.
func (a App) Status(ctx context.Context, from Caller, block *big.Int) (s Status, err error) {
	views := a.common(&s)
	views["frozen"], views["allowAnyDevice"], views["requireTcbUpToDate"] = &s.Frozen, &s.AllowAnyDevice, &s.RequireTCBUpToDate
	return s, a.ask(ctx, from, block, views)
}

// Status asks the registry. Codes: those of View.
func (k KMS) Status(ctx context.Context, from Caller, block *big.Int) (s Status, err error) {
	views := k.common(&s)
	views["gatewayAppId"], views["appImplementation"] = &s.GatewayAppID, &s.AppImplementation
	views["minOsEpoch"], views["upgradesDisabled"] = &s.MinOSEpoch, &s.UpgradesDisabled
	return s, k.ask(ctx, from, block, views)
}

// Initialize is the call by which a registry's proxy is started.
func (k KMS) Initialize(owner, appImplementation common.Address) Call {
	return k.call("initialize(address,address)", owner, appImplementation)
}

// Creation is the code that deploys a contract, with its constructor's arguments.
func Creation(contract string, args ...any) ([]byte, error) {
	a, err := contracts.Load(contract)
	if err != nil {
		return nil, err
	}
	packed, err := mustABI(contract).Pack("", args...)
	if err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", contract, err)
	}
	return append([]byte(a.Bytecode), packed...), nil
}
