// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC165Upgradeable} from "@openzeppelin/contracts-upgradeable/utils/introspection/ERC165Upgradeable.sol";
import {AppBootInfo, IAppAuth, IAppAuthBasicManagement, IAppAuthPlatform} from "./IAppAuth.sol";
import {Governed} from "./Governed.sol";

/// How an app begins. Whatever stands here needs no notice: there are no keys yet.
struct AppConfig {
    address owner;
    address guardian; // zero: none
    uint64 notice; // seconds
    bool disableUpgrades;
    bool frozen;
    bool requireTcbUpToDate;
    bool allowAnyDevice;
    bytes32[] deviceIds;
    bytes32[] composeHashes;
}

/// One app: the manifests that may run as it, and where. Its address is the app id.
///
/// Upstream's interface and storage (spec/governance.md 4.3), and notice, freezing,
/// required platforms and key epochs. An app without a listed manifest, or with an empty
/// list of devices and no `allowAnyDevice`, runs nowhere. A frozen app can revoke, and
/// can never again allow or upgrade.
contract DstackApp is Governed, ERC165Upgradeable, IAppAuth, IAppAuthPlatform, IAppAuthBasicManagement {
    // Upstream's slots 0 to 3: storage proofs read them. What is ours lies in namespaces.
    mapping(bytes32 => bool) public allowedComposeHashes;
    bool private _upgradesDisabled;
    bool public allowAnyDevice;
    mapping(bytes32 => bool) public allowedDeviceIds;
    bool public requireTcbUpToDate;
    uint256[49] private __gap;

    /// @custom:storage-location erc7201:dstack.storage.App
    struct AppStorage {
        bool frozen;
    }

    // keccak256(abi.encode(uint256(keccak256("dstack.storage.App")) - 1)) & ~bytes32(uint256(0xff))
    bytes32 internal constant APP_STORAGE = 0xda36538b5f74f748809dce2fa2a3e482459e08a77656429ad89ae838e8fcf800;

    bytes32 internal constant POLICY_COMPOSE_HASH = keccak256("compose-hash");
    bytes32 internal constant POLICY_DEVICE = keccak256("device");
    bytes32 internal constant POLICY_ALLOW_ANY_DEVICE = keccak256("allow-any-device");
    bytes32 internal constant POLICY_REQUIRE_TCB = keccak256("require-tcb-up-to-date");
    bytes32 internal constant POLICY_UPGRADES_DISABLED = keccak256("upgrades-disabled");
    bytes32 internal constant POLICY_FROZEN = keccak256("frozen");

    event UpgradesDisabled();
    event AllowAnyDeviceSet(bool allowAny);
    event RequireTcbUpToDateSet(bool requireUpToDate);
    event Frozen();

    error AppFrozen();

    /// @custom:oz-upgrades-unsafe-allow constructor
    constructor() {
        _disableInitializers();
    }

    function initialize(
        address initialOwner,
        bool disableUpgrades_,
        bool requireTcbUpToDate_,
        bool allowAnyDevice_,
        bytes32 deviceId,
        bytes32 composeHash
    ) external initializer {
        _start(initialOwner, disableUpgrades_, requireTcbUpToDate_, allowAnyDevice_);
        if (deviceId != 0) _startDevice(deviceId);
        if (composeHash != 0) _startComposeHash(composeHash);
    }

    function initialize(
        address initialOwner,
        bool disableUpgrades_,
        bool allowAnyDevice_,
        bytes32 deviceId,
        bytes32 composeHash
    ) external initializer {
        _start(initialOwner, disableUpgrades_, false, allowAnyDevice_);
        if (deviceId != 0) _startDevice(deviceId);
        if (composeHash != 0) _startComposeHash(composeHash);
    }

    function initialize(AppConfig calldata config) external initializer {
        _start(config.owner, config.disableUpgrades, config.requireTcbUpToDate, config.allowAnyDevice);
        _setFirstNotice(config.notice, config.guardian);
        for (uint256 i = 0; i < config.deviceIds.length; ++i) {
            _startDevice(config.deviceIds[i]);
        }
        for (uint256 i = 0; i < config.composeHashes.length; ++i) {
            _startComposeHash(config.composeHashes[i]);
        }
        if (config.frozen) _freeze();
    }

    function version() external pure returns (uint256) {
        return 3;
    }

    function supportsInterface(bytes4 id) public view override returns (bool) {
        return id == type(IAppAuth).interfaceId || id == type(IAppAuthBasicManagement).interfaceId
            || id == type(IAppAuthPlatform).interfaceId || super.supportsInterface(id);
    }

    // Decisions.

    function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool, string memory) {
        return _decide(bootInfo, "");
    }

    function isAppAllowedOn(AppBootInfo calldata bootInfo, string calldata teeVariant)
        external
        view
        returns (bool, string memory)
    {
        return _decide(bootInfo, teeVariant);
    }

    function _decide(AppBootInfo calldata bootInfo, string memory teeVariant)
        private
        view
        returns (bool, string memory)
    {
        if (requireTcbUpToDate && keccak256(bytes(bootInfo.tcbStatus)) != keccak256("UpToDate")) {
            return (false, "TCB status is not up to date");
        }
        if (!allowedComposeHashes[bootInfo.composeHash]) return (false, "Compose hash not allowed");
        if (!allowAnyDevice && !allowedDeviceIds[bootInfo.deviceId]) return (false, "Device not allowed");
        string memory refusal = _refusePlatform(bootInfo, teeVariant);
        return (bytes(refusal).length == 0, refusal);
    }

    // Lists.

    function addComposeHash(bytes32 composeHash) external {
        require(composeHash != 0, ZeroValue());
        if (_allowed(POLICY_COMPOSE_HASH, composeHash)) _addComposeHash(composeHash);
    }

    function removeComposeHash(bytes32 composeHash) external onlyRevoker {
        _forget(POLICY_COMPOSE_HASH, composeHash);
        allowedComposeHashes[composeHash] = false;
        emit ComposeHashRemoved(composeHash);
        emit PolicyChanged(_msgSender(), POLICY_COMPOSE_HASH, composeHash, false);
    }

    function addDevice(bytes32 deviceId) external {
        require(deviceId != 0, ZeroValue());
        if (_allowed(POLICY_DEVICE, deviceId)) _addDevice(deviceId);
    }

    function removeDevice(bytes32 deviceId) external onlyRevoker {
        _forget(POLICY_DEVICE, deviceId);
        allowedDeviceIds[deviceId] = false;
        emit DeviceRemoved(deviceId);
        emit PolicyChanged(_msgSender(), POLICY_DEVICE, deviceId, false);
    }

    function setAllowAnyDevice(bool allowAny) external {
        if (!allowAny) {
            _checkRevoker();
            _forget(POLICY_ALLOW_ANY_DEVICE, 0);
        } else if (!_allowed(POLICY_ALLOW_ANY_DEVICE, 0)) {
            return;
        }
        allowAnyDevice = allowAny;
        emit AllowAnyDeviceSet(allowAny);
        emit PolicyChanged(_msgSender(), POLICY_ALLOW_ANY_DEVICE, 0, allowAny);
    }

    function setRequireTcbUpToDate(bool requireUpToDate) external {
        if (requireUpToDate) {
            _checkRevoker();
            _forget(POLICY_REQUIRE_TCB, 0);
        } else if (!_allowed(POLICY_REQUIRE_TCB, 0)) {
            return;
        }
        requireTcbUpToDate = requireUpToDate;
        emit RequireTcbUpToDateSet(requireUpToDate);
        emit PolicyChanged(_msgSender(), POLICY_REQUIRE_TCB, 0, requireUpToDate);
    }

    // For ever.

    function disableUpgrades() external onlyOwner {
        _disableUpgrades();
    }

    /// Ends additions and upgrades for ever, announced ones included. Revocations stay.
    function freeze() external onlyOwner {
        _freeze();
    }

    function frozen() public view returns (bool) {
        return _appStorage().frozen;
    }

    function _beforeAllowing() internal view override {
        require(!frozen(), AppFrozen());
    }

    function _checkUpgradable() internal view override {
        require(!_upgradesDisabled, "Upgrades are permanently disabled");
    }

    function _start(address owner_, bool disableUpgrades_, bool requireTcbUpToDate_, bool allowAnyDevice_) private {
        require(owner_ != address(0), "invalid owner address");
        __Ownable_init(owner_);
        if (disableUpgrades_) _disableUpgrades();
        if (requireTcbUpToDate_) {
            requireTcbUpToDate = true;
            emit RequireTcbUpToDateSet(true);
            emit PolicyChanged(_msgSender(), POLICY_REQUIRE_TCB, 0, true);
        }
        if (allowAnyDevice_) {
            _allowedFromStart(POLICY_ALLOW_ANY_DEVICE, 0);
            allowAnyDevice = true;
            emit AllowAnyDeviceSet(true);
            emit PolicyChanged(_msgSender(), POLICY_ALLOW_ANY_DEVICE, 0, true);
        }
    }

    function _startDevice(bytes32 deviceId) private {
        require(deviceId != 0, ZeroValue());
        _allowedFromStart(POLICY_DEVICE, deviceId);
        _addDevice(deviceId);
    }

    function _startComposeHash(bytes32 composeHash) private {
        require(composeHash != 0, ZeroValue());
        _allowedFromStart(POLICY_COMPOSE_HASH, composeHash);
        _addComposeHash(composeHash);
    }

    function _addDevice(bytes32 deviceId) private {
        allowedDeviceIds[deviceId] = true;
        emit DeviceAdded(deviceId);
        emit PolicyChanged(_msgSender(), POLICY_DEVICE, deviceId, true);
    }

    function _addComposeHash(bytes32 composeHash) private {
        allowedComposeHashes[composeHash] = true;
        emit ComposeHashAdded(composeHash);
        emit PolicyChanged(_msgSender(), POLICY_COMPOSE_HASH, composeHash, true);
    }

    function _disableUpgrades() private {
        _upgradesDisabled = true;
        emit UpgradesDisabled();
        emit PolicyChanged(_msgSender(), POLICY_UPGRADES_DISABLED, 0, true);
    }

    function _freeze() private {
        // Also as upstream says it, for readers that know only upstream's slots.
        if (!_upgradesDisabled) _disableUpgrades();
        _appStorage().frozen = true;
        emit Frozen();
        emit PolicyChanged(_msgSender(), POLICY_FROZEN, 0, true);
    }

    function _appStorage() private pure returns (AppStorage storage $) {
        bytes32 slot = APP_STORAGE;
        assembly ("memory-safe") {
            $.slot := slot
        }
    }
}
