// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {UUPSUpgradeable} from "@openzeppelin/contracts-upgradeable/proxy/utils/UUPSUpgradeable.sol";
import {AppBootInfo} from "./IAppAuth.sol";
import {Notice} from "./Notice.sol";

/// What the registry and an app have in common beyond notice: upgrades that are
/// announced with their arguments, the platforms that they require, and key epochs.
abstract contract Governed is Notice, UUPSUpgradeable {
    /// @custom:storage-location erc7201:dstack.storage.Governed
    struct GovernedStorage {
        bool platformRequired;
        uint64 keyEpoch;
        uint64 oldestKeyEpoch;
        mapping(bytes32 => bool) teeVariants;
        mapping(bytes32 => bool) tcbStatuses;
        mapping(bytes32 => bool) blockedAdvisories;
    }

    // keccak256(abi.encode(uint256(keccak256("dstack.storage.Governed")) - 1)) & ~bytes32(uint256(0xff))
    bytes32 internal constant GOVERNED_STORAGE = 0xa985a91e5182e9cfbb9896accbc7057675965340746a03227f28b136de47ec00;

    bytes32 internal constant POLICY_PLATFORM_REQUIRED = keccak256("platform-required");
    bytes32 internal constant POLICY_TEE_VARIANT = keccak256("tee-variant");
    bytes32 internal constant POLICY_TCB_STATUS = keccak256("tcb-status");
    bytes32 internal constant POLICY_ADVISORY_BLOCKED = keccak256("advisory-blocked");
    bytes32 internal constant POLICY_KEY_EPOCH = keccak256("key-epoch");
    bytes32 internal constant POLICY_OLDEST_KEY_EPOCH = keccak256("oldest-key-epoch");

    /// The platform's words themselves; PolicyChanged has their hashes.
    event TeeVariantSet(string teeVariant, bool allowed);
    event TcbStatusSet(string tcbStatus, bool allowed);
    event AdvisoryBlockedSet(string advisoryId, bool blocked);
    event PlatformRequiredSet(bool required);
    event KeyEpochSet(uint64 current, uint64 oldest);
    event UpgradeAnnounced(address implementation, bytes data);

    error KeyEpochOutOfOrder(uint64 current, uint64 oldest);
    error ValueBeforeEffect();

    // Upgrades.

    /// The announcement binds the call that the new code is started with: the same code
    /// with other arguments is another change.
    function upgradeToAndCall(address newImplementation, bytes memory data)
        public
        payable
        override
        onlyProxy
        onlyOwner
    {
        _checkUpgradable();
        bytes32 value = keccak256(abi.encode(newImplementation, data));
        if (!_allowed(POLICY_UPGRADE, value)) {
            require(msg.value == 0, ValueBeforeEffect());
            emit UpgradeAnnounced(newImplementation, data);
            return;
        }
        // The new code may be anything, so that the log comes before it.
        emit PolicyChanged(_msgSender(), POLICY_UPGRADE, bytes32(uint256(uint160(newImplementation))), true);
        super.upgradeToAndCall(newImplementation, data);
    }

    function _authorizeUpgrade(address) internal view override onlyOwner {
        _checkUpgradable();
    }

    function _checkUpgradable() internal view virtual;

    // Platforms.

    function platformRequired() external view returns (bool) {
        return _governedStorage().platformRequired;
    }

    function allowedTeeVariants(string calldata teeVariant) external view returns (bool) {
        return _governedStorage().teeVariants[_hash(teeVariant)];
    }

    function allowedTcbStatuses(string calldata tcbStatus) external view returns (bool) {
        return _governedStorage().tcbStatuses[_hash(tcbStatus)];
    }

    function blockedAdvisories(string calldata advisoryId) external view returns (bool) {
        return _governedStorage().blockedAdvisories[_hash(advisoryId)];
    }

    /// With true, only the listed kinds of TEE with the listed statuses may run: none,
    /// while a list is empty.
    function setPlatformRequired(bool required) external {
        if (required) {
            _checkRevoker();
            _forget(POLICY_PLATFORM_REQUIRED, 0);
        } else if (!_allowed(POLICY_PLATFORM_REQUIRED, 0)) {
            return;
        }
        _governedStorage().platformRequired = required;
        emit PlatformRequiredSet(required);
        emit PolicyChanged(_msgSender(), POLICY_PLATFORM_REQUIRED, 0, required);
    }

    function addTeeVariant(string calldata teeVariant) external {
        bytes32 value = _hash(teeVariant);
        if (_allowed(POLICY_TEE_VARIANT, value)) _setTeeVariant(teeVariant, value, true);
    }

    function removeTeeVariant(string calldata teeVariant) external onlyRevoker {
        bytes32 value = _hash(teeVariant);
        _forget(POLICY_TEE_VARIANT, value);
        _setTeeVariant(teeVariant, value, false);
    }

    function addTcbStatus(string calldata tcbStatus) external {
        bytes32 value = _hash(tcbStatus);
        if (_allowed(POLICY_TCB_STATUS, value)) _setTcbStatus(tcbStatus, value, true);
    }

    function removeTcbStatus(string calldata tcbStatus) external onlyRevoker {
        bytes32 value = _hash(tcbStatus);
        _forget(POLICY_TCB_STATUS, value);
        _setTcbStatus(tcbStatus, value, false);
    }

    /// Denies every platform to which the advisory applies.
    function blockAdvisory(string calldata advisoryId) external onlyRevoker {
        bytes32 value = _hash(advisoryId);
        _forget(POLICY_ADVISORY_BLOCKED, value);
        _setAdvisoryBlocked(advisoryId, value, true);
    }

    function unblockAdvisory(string calldata advisoryId) external {
        bytes32 value = _hash(advisoryId);
        if (_allowed(POLICY_ADVISORY_BLOCKED, value)) _setAdvisoryBlocked(advisoryId, value, false);
    }

    /// The reason to refuse a platform; empty when there is none. An empty teeVariant is
    /// a caller that cannot tell.
    function _refusePlatform(AppBootInfo calldata bootInfo, string memory teeVariant)
        internal
        view
        returns (string memory)
    {
        GovernedStorage storage $ = _governedStorage();
        for (uint256 i = 0; i < bootInfo.advisoryIds.length; ++i) {
            if ($.blockedAdvisories[keccak256(bytes(bootInfo.advisoryIds[i]))]) return "Advisory is not allowed";
        }
        if (!$.platformRequired) return "";
        if (bytes(teeVariant).length == 0) return "TEE variant is unknown";
        if (!$.teeVariants[keccak256(bytes(teeVariant))]) return "TEE variant is not allowed";
        if (!$.tcbStatuses[keccak256(bytes(bootInfo.tcbStatus))]) return "TCB status is not allowed";
        return "";
    }

    function _setTeeVariant(string calldata teeVariant, bytes32 value, bool allowed) private {
        _governedStorage().teeVariants[value] = allowed;
        emit TeeVariantSet(teeVariant, allowed);
        emit PolicyChanged(_msgSender(), POLICY_TEE_VARIANT, value, allowed);
    }

    function _setTcbStatus(string calldata tcbStatus, bytes32 value, bool allowed) private {
        _governedStorage().tcbStatuses[value] = allowed;
        emit TcbStatusSet(tcbStatus, allowed);
        emit PolicyChanged(_msgSender(), POLICY_TCB_STATUS, value, allowed);
    }

    function _setAdvisoryBlocked(string calldata advisoryId, bytes32 value, bool blocked) private {
        _governedStorage().blockedAdvisories[value] = blocked;
        emit AdvisoryBlockedSet(advisoryId, blocked);
        emit PolicyChanged(_msgSender(), POLICY_ADVISORY_BLOCKED, value, blocked);
    }

    /// Nothing that is not named can be allowed, or blocked.
    function _hash(string calldata word) private pure returns (bytes32) {
        require(bytes(word).length != 0, ZeroValue());
        return keccak256(bytes(word));
    }

    // Key epochs.

    function keyEpoch() external view returns (uint64) {
        return _governedStorage().keyEpoch;
    }

    /// The oldest epoch whose keys are still given.
    function oldestKeyEpoch() external view returns (uint64) {
        return _governedStorage().oldestKeyEpoch;
    }

    /// New keys from now on. Those of earlier epochs are still given, so that this takes
    /// nothing from anybody and gives nothing to anybody. Epochs are counted one by one,
    /// so that no stolen key can use them up.
    function setKeyEpoch(uint64 current) external onlyOwner {
        GovernedStorage storage $ = _governedStorage();
        require(current == $.keyEpoch + 1, KeyEpochOutOfOrder(current, $.oldestKeyEpoch));
        $.keyEpoch = current;
        emit KeyEpochSet(current, $.oldestKeyEpoch);
        emit PolicyChanged(_msgSender(), POLICY_KEY_EPOCH, bytes32(uint256(current)), true);
    }

    /// Keys before the epoch are no longer given. That makes data unreadable that was not
    /// carried over, so that it takes notice although it gives nothing.
    function setOldestKeyEpoch(uint64 oldest) external {
        GovernedStorage storage $ = _governedStorage();
        require(oldest > $.oldestKeyEpoch && oldest <= $.keyEpoch, KeyEpochOutOfOrder($.keyEpoch, oldest));
        if (!_allowed(POLICY_OLDEST_KEY_EPOCH, bytes32(uint256(oldest)))) return;
        $.oldestKeyEpoch = oldest;
        emit KeyEpochSet($.keyEpoch, oldest);
        emit PolicyChanged(_msgSender(), POLICY_OLDEST_KEY_EPOCH, bytes32(uint256(oldest)), true);
    }

    function _governedStorage() private pure returns (GovernedStorage storage $) {
        bytes32 slot = GOVERNED_STORAGE;
        assembly ("memory-safe") {
            $.slot := slot
        }
    }
}
