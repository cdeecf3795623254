// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC165Upgradeable} from "@openzeppelin/contracts-upgradeable/utils/introspection/ERC165Upgradeable.sol";
import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {ERC165Checker} from "@openzeppelin/contracts/utils/introspection/ERC165Checker.sol";
import {AppBootInfo, IAppAuth, IAppAuthPlatform} from "./IAppAuth.sol";
import {AppConfig, DstackApp} from "./DstackApp.sol";
import {Governed} from "./Governed.sol";

/// One KMS: which machines may be it, which images may run, which apps there are.
///
/// Upstream's interface and storage (spec/governance.md 4.4), and notice, security epochs
/// of images, required platforms and key epochs. Registering an app is anybody's, since
/// an app decides for itself and gets only its own keys. The answers of app contracts,
/// which may be anybody's code, are bounded in gas and size and read strictly.
contract DstackKms is Governed, ERC165Upgradeable {
    struct KmsInfo {
        bytes k256Pubkey;
        bytes caPubkey;
        bytes quote;
        bytes eventlog;
    }

    // Upstream's slots 0 to 9: storage proofs read them. What is ours lies in namespaces.
    KmsInfo public kmsInfo;
    string public gatewayAppId;
    mapping(address => bool) public registeredApps;
    mapping(bytes32 => bool) public kmsAllowedAggregatedMrs;
    mapping(bytes32 => bool) public kmsAllowedDeviceIds;
    mapping(bytes32 => bool) public allowedOsImages;
    address public appImplementation;
    uint256[50] private __gap;

    /// @custom:storage-location erc7201:dstack.storage.Kms
    struct KmsStorage {
        bool upgradesDisabled;
        uint64 minOsEpoch;
        mapping(bytes32 osImageHash => uint64) osImageEpochs;
        mapping(address app => bool) withdrawnApps;
    }

    // keccak256(abi.encode(uint256(keccak256("dstack.storage.Kms")) - 1)) & ~bytes32(uint256(0xff))
    bytes32 internal constant KMS_STORAGE = 0xa3536005a51736af0ee9b8b4f14bc24a7b26107e19195e5f553034eb5c5a6200;

    uint256 private constant APP_GAS = 2_000_000;
    uint256 private constant MAX_ANSWER = 4096; // bytes

    bytes32 internal constant POLICY_KMS_INFO = keccak256("kms-info");
    bytes32 internal constant POLICY_KMS_EVIDENCE = keccak256("kms-evidence");
    bytes32 internal constant POLICY_GATEWAY = keccak256("gateway-app-id");
    bytes32 internal constant POLICY_APP = keccak256("registered-app");
    bytes32 internal constant POLICY_APP_IMPLEMENTATION = keccak256("app-implementation");
    bytes32 internal constant POLICY_KMS_MR = keccak256("kms-aggregated-mr");
    bytes32 internal constant POLICY_KMS_DEVICE = keccak256("kms-device");
    bytes32 internal constant POLICY_OS_IMAGE = keccak256("os-image");
    bytes32 internal constant POLICY_MIN_OS_EPOCH = keccak256("min-os-epoch");
    bytes32 internal constant POLICY_UPGRADES_DISABLED = keccak256("upgrades-disabled");

    event AppRegistered(address appId);
    event AppWithdrawn(address appId);
    event KmsInfoSet(bytes k256Pubkey);
    event KmsEvidenceSet(bytes32 quoteHash, bytes32 eventlogHash);
    event KmsAggregatedMrAdded(bytes32 mrAggregated);
    event KmsAggregatedMrRemoved(bytes32 mrAggregated);
    event KmsDeviceAdded(bytes32 deviceId);
    event KmsDeviceRemoved(bytes32 deviceId);
    event OsImageHashAdded(bytes32 osImageHash);
    event OsImageHashRemoved(bytes32 osImageHash);
    event OsImageEpochSet(bytes32 osImageHash, uint64 epoch);
    event MinOsEpochSet(uint64 epoch);
    event GatewayAppIdSet(string gatewayAppId);
    event AppImplementationSet(address implementation);
    event AppDeployedViaFactory(address indexed appId, address indexed deployer);
    event UpgradesDisabled();

    error NotAnApp(address app);
    error NotTheAppsOwner(address account);
    error OsImageHasEpoch(uint64 epoch);
    error OsEpochOutOfOrder(uint64 minimum);
    error GatewayMustBeNamed();
    error OwnerIsNeeded();

    /// @custom:oz-upgrades-unsafe-allow constructor
    constructor() {
        _disableInitializers();
    }

    /// The owner sets the lists, and then the notice: until then nothing waits.
    function initialize(address initialOwner, address appImplementation_) external initializer {
        require(initialOwner != address(0), "invalid owner address");
        __Ownable_init(initialOwner);
        if (appImplementation_ == address(0)) return;
        _allowedFromStart(POLICY_APP_IMPLEMENTATION, bytes32(uint256(uint160(appImplementation_))));
        _setAppImplementation(appImplementation_);
    }

    function supportsInterface(bytes4 id) public view override returns (bool) {
        return
            id == type(IAppAuth).interfaceId || id == type(IAppAuthPlatform).interfaceId || super.supportsInterface(id);
    }

    // Decisions.

    function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool, string memory) {
        return _decideApp(bootInfo, "");
    }

    function isAppAllowedOn(AppBootInfo calldata bootInfo, string calldata teeVariant)
        external
        view
        returns (bool, string memory)
    {
        return _decideApp(bootInfo, teeVariant);
    }

    function isKmsAllowed(AppBootInfo calldata bootInfo) external view returns (bool, string memory) {
        return _decideKms(bootInfo, "");
    }

    function isKmsAllowedOn(AppBootInfo calldata bootInfo, string calldata teeVariant)
        external
        view
        returns (bool, string memory)
    {
        return _decideKms(bootInfo, teeVariant);
    }

    function _decideApp(AppBootInfo calldata bootInfo, string memory teeVariant)
        private
        view
        returns (bool, string memory)
    {
        if (!registeredApps[bootInfo.appId]) return (false, "App not registered");
        string memory refusal = _refuseImage(bootInfo.osImageHash);
        if (bytes(refusal).length != 0) return (false, refusal);
        if (bootInfo.appId.code.length == 0) return (false, "App not deployed or invalid address");
        refusal = _refusePlatform(bootInfo, teeVariant);
        if (bytes(refusal).length != 0) return (false, refusal);
        return _askApp(bootInfo, teeVariant);
    }

    function _decideKms(AppBootInfo calldata bootInfo, string memory teeVariant)
        private
        view
        returns (bool, string memory)
    {
        if (keccak256(bytes(bootInfo.tcbStatus)) != keccak256("UpToDate")) {
            return (false, "TCB status is not up to date");
        }
        string memory refusal = _refuseImage(bootInfo.osImageHash);
        if (bytes(refusal).length != 0) return (false, refusal);
        if (!kmsAllowedAggregatedMrs[bootInfo.mrAggregated]) return (false, "Aggregated MR not allowed");
        if (!kmsAllowedDeviceIds[bootInfo.deviceId]) return (false, "KMS is not allowed to boot on this device");
        refusal = _refusePlatform(bootInfo, teeVariant);
        return (bytes(refusal).length == 0, refusal);
    }

    function _refuseImage(bytes32 osImageHash) private view returns (string memory) {
        if (!allowedOsImages[osImageHash]) return "OS image is not allowed";
        KmsStorage storage $ = _kmsStorage();
        if ($.osImageEpochs[osImageHash] < $.minOsEpoch) return "OS image is older than the security epoch";
        return "";
    }

    /// The app's own answer. A revert, too much gas, and an answer of another shape than
    /// (bool, string) deny.
    function _askApp(AppBootInfo calldata bootInfo, string memory teeVariant)
        private
        view
        returns (bool, string memory)
    {
        address app = bootInfo.appId;
        bytes memory question = bytes(teeVariant).length != 0
            && ERC165Checker.supportsERC165InterfaceUnchecked(app, type(IAppAuthPlatform).interfaceId)
            ? abi.encodeCall(IAppAuthPlatform.isAppAllowedOn, (bootInfo, teeVariant))
            : abi.encodeCall(IAppAuth.isAppAllowed, (bootInfo));
        uint256 gasLimit = APP_GAS;
        bool ok;
        uint256 size;
        assembly ("memory-safe") {
            ok := staticcall(gasLimit, app, add(question, 32), mload(question), 0, 0)
            size := returndatasize()
        }
        if (!ok) return (false, "app policy reverted");
        // abi.decode reverts on bad answers, so that they are looked at here first.
        if (size < 96 || size > MAX_ANSWER) return (false, "app policy is malformed");
        bytes memory answer = new bytes(size);
        uint256 allowed;
        uint256 offset;
        uint256 length;
        assembly ("memory-safe") {
            returndatacopy(add(answer, 32), 0, size)
            allowed := mload(add(answer, 32))
            offset := mload(add(answer, 64))
            length := mload(add(answer, 96))
        }
        if (allowed > 1 || offset != 64 || length > size - 96) return (false, "app policy is malformed");
        return abi.decode(answer, (bool, string));
    }

    // What may be a KMS, and what may run.

    function addKmsAggregatedMr(bytes32 mrAggregated) external {
        require(mrAggregated != 0, ZeroValue());
        if (!_allowed(POLICY_KMS_MR, mrAggregated)) return;
        kmsAllowedAggregatedMrs[mrAggregated] = true;
        emit KmsAggregatedMrAdded(mrAggregated);
        emit PolicyChanged(_msgSender(), POLICY_KMS_MR, mrAggregated, true);
    }

    function removeKmsAggregatedMr(bytes32 mrAggregated) external onlyRevoker {
        _forget(POLICY_KMS_MR, mrAggregated);
        kmsAllowedAggregatedMrs[mrAggregated] = false;
        emit KmsAggregatedMrRemoved(mrAggregated);
        emit PolicyChanged(_msgSender(), POLICY_KMS_MR, mrAggregated, false);
    }

    function addKmsDevice(bytes32 deviceId) external {
        require(deviceId != 0, ZeroValue());
        if (!_allowed(POLICY_KMS_DEVICE, deviceId)) return;
        kmsAllowedDeviceIds[deviceId] = true;
        emit KmsDeviceAdded(deviceId);
        emit PolicyChanged(_msgSender(), POLICY_KMS_DEVICE, deviceId, true);
    }

    function removeKmsDevice(bytes32 deviceId) external onlyRevoker {
        _forget(POLICY_KMS_DEVICE, deviceId);
        kmsAllowedDeviceIds[deviceId] = false;
        emit KmsDeviceRemoved(deviceId);
        emit PolicyChanged(_msgSender(), POLICY_KMS_DEVICE, deviceId, false);
    }

    function addOsImageHash(bytes32 osImageHash) external {
        _addOsImage(osImageHash, 0);
    }

    /// The security epoch is announced with the image and stays the image's.
    function addOsImage(bytes32 osImageHash, uint64 epoch) external {
        _addOsImage(osImageHash, epoch);
    }

    function removeOsImageHash(bytes32 osImageHash) external onlyRevoker {
        _forget(POLICY_OS_IMAGE, osImageHash);
        allowedOsImages[osImageHash] = false;
        delete _kmsStorage().osImageEpochs[osImageHash];
        emit OsImageHashRemoved(osImageHash);
        emit PolicyChanged(_msgSender(), POLICY_OS_IMAGE, osImageHash, false);
    }

    function osImageEpoch(bytes32 osImageHash) external view returns (uint64) {
        return _kmsStorage().osImageEpochs[osImageHash];
    }

    function minOsEpoch() external view returns (uint64) {
        return _kmsStorage().minOsEpoch;
    }

    /// Revokes every image of an earlier epoch, for ever: it only rises (threats.md D11).
    /// The owner's alone, since nobody can take it back.
    function setMinOsEpoch(uint64 epoch) external onlyOwner {
        KmsStorage storage $ = _kmsStorage();
        require(epoch > $.minOsEpoch, OsEpochOutOfOrder($.minOsEpoch));
        $.minOsEpoch = epoch;
        emit MinOsEpochSet(epoch);
        emit PolicyChanged(_msgSender(), POLICY_MIN_OS_EPOCH, bytes32(uint256(epoch)), true);
    }

    function _addOsImage(bytes32 osImageHash, uint64 epoch) private {
        require(osImageHash != 0, ZeroValue());
        KmsStorage storage $ = _kmsStorage();
        // Whoever makes an announced addition cannot choose another epoch, and a listed
        // image does not become newer.
        bool known = allowedOsImages[osImageHash] || _pending(POLICY_OS_IMAGE, osImageHash);
        require(!known || epoch == $.osImageEpochs[osImageHash], OsImageHasEpoch($.osImageEpochs[osImageHash]));
        bool now_ = _allowed(POLICY_OS_IMAGE, osImageHash);
        if (!known) {
            $.osImageEpochs[osImageHash] = epoch;
            emit OsImageEpochSet(osImageHash, epoch);
        }
        if (!now_) return;
        allowedOsImages[osImageHash] = true;
        emit OsImageHashAdded(osImageHash);
        emit PolicyChanged(_msgSender(), POLICY_OS_IMAGE, osImageHash, true);
    }

    // The KMS's own identity.

    /// Clients encrypt to these keys, so that other keys are announced, all bytes of them.
    function setKmsInfo(KmsInfo calldata info) external {
        if (!_allowed(POLICY_KMS_INFO, keccak256(abi.encode(info)))) return;
        kmsInfo = info;
        emit KmsInfoSet(info.k256Pubkey);
        emit PolicyChanged(_msgSender(), POLICY_KMS_INFO, keccak256(info.k256Pubkey), true);
    }

    function setKmsQuote(bytes calldata quote) external onlyOwner {
        kmsInfo.quote = quote;
        _evidenceSet();
    }

    function setKmsEventlog(bytes calldata eventlog) external onlyOwner {
        kmsInfo.eventlog = eventlog;
        _evidenceSet();
    }

    /// The empty text is no gateway, at once. "any", by which upstream turns off what
    /// guests check, is no name (threats.md G08).
    function setGatewayAppId(string calldata appId) external {
        bytes32 value = keccak256(bytes(appId));
        require(value != keccak256("any"), GatewayMustBeNamed());
        if (bytes(appId).length == 0) _checkRevoker();
        else if (!_allowed(POLICY_GATEWAY, value)) return;
        gatewayAppId = appId;
        emit GatewayAppIdSet(appId);
        emit PolicyChanged(_msgSender(), POLICY_GATEWAY, value, true);
    }

    function _evidenceSet() private {
        bytes32 quoteHash = keccak256(kmsInfo.quote);
        bytes32 eventlogHash = keccak256(kmsInfo.eventlog);
        emit KmsEvidenceSet(quoteHash, eventlogHash);
        emit PolicyChanged(_msgSender(), POLICY_KMS_EVIDENCE, keccak256(abi.encode(quoteHash, eventlogHash)), true);
    }

    // Apps.

    function registerApp(address appId) external {
        require(appId != address(0), "Invalid app ID");
        require(ERC165Checker.supportsInterface(appId, type(IAppAuth).interfaceId), NotAnApp(appId));
        KmsStorage storage $ = _kmsStorage();
        if ($.withdrawnApps[appId]) {
            _checkAppOwner(appId);
            $.withdrawnApps[appId] = false;
        }
        _register(appId);
    }

    /// The app's owner takes it out, and only the app's owner can put it back.
    function withdrawApp(address appId) external {
        _checkAppOwner(appId);
        _kmsStorage().withdrawnApps[appId] = true;
        registeredApps[appId] = false;
        emit AppWithdrawn(appId);
        emit PolicyChanged(_msgSender(), POLICY_APP, bytes32(uint256(uint160(appId))), false);
    }

    function setAppImplementation(address implementation) external {
        require(implementation != address(0), "Invalid implementation address");
        if (!_allowed(POLICY_APP_IMPLEMENTATION, bytes32(uint256(uint160(implementation))))) return;
        _setAppImplementation(implementation);
    }

    function deployAndRegisterApp(
        address initialOwner,
        bool disableUpgrades_,
        bool requireTcbUpToDate,
        bool allowAnyDevice,
        bytes32 deviceId,
        bytes32 composeHash
    ) external returns (address) {
        return _deploy(
            initialOwner,
            abi.encodeWithSelector(
                bytes4(keccak256("initialize(address,bool,bool,bool,bytes32,bytes32)")),
                initialOwner,
                disableUpgrades_,
                requireTcbUpToDate,
                allowAnyDevice,
                deviceId,
                composeHash
            )
        );
    }

    function deployAndRegisterApp(
        address initialOwner,
        bool disableUpgrades_,
        bool allowAnyDevice,
        bytes32 deviceId,
        bytes32 composeHash
    ) external returns (address) {
        return _deploy(
            initialOwner,
            abi.encodeWithSelector(
                bytes4(keccak256("initialize(address,bool,bool,bytes32,bytes32)")),
                initialOwner,
                disableUpgrades_,
                allowAnyDevice,
                deviceId,
                composeHash
            )
        );
    }

    /// Deploys an app with notice, guardian and whole lists from its first block on.
    function deployAndRegisterApp(AppConfig calldata config) external returns (address) {
        return _deploy(
            config.owner,
            abi.encodeWithSelector(
                bytes4(keccak256("initialize((address,address,uint64,bool,bool,bool,bool,bytes32[],bytes32[]))")),
                config
            )
        );
    }

    function _deploy(address initialOwner, bytes memory start) private returns (address appId) {
        require(appImplementation != address(0), "DstackApp implementation not set");
        require(initialOwner != address(0), "Invalid owner address");
        appId = address(new ERC1967Proxy(appImplementation, start));
        _register(appId);
        emit AppDeployedViaFactory(appId, _msgSender());
    }

    function _register(address appId) private {
        registeredApps[appId] = true;
        emit AppRegistered(appId);
        emit PolicyChanged(_msgSender(), POLICY_APP, bytes32(uint256(uint160(appId))), true);
    }

    function _setAppImplementation(address implementation) private {
        appImplementation = implementation;
        emit AppImplementationSet(implementation);
        emit PolicyChanged(_msgSender(), POLICY_APP_IMPLEMENTATION, bytes32(uint256(uint160(implementation))), true);
    }

    function _checkAppOwner(address appId) private view {
        require(_msgSender() == DstackApp(appId).owner(), NotTheAppsOwner(_msgSender()));
    }

    // For ever.

    function disableUpgrades() external onlyOwner {
        _kmsStorage().upgradesDisabled = true;
        emit UpgradesDisabled();
        emit PolicyChanged(_msgSender(), POLICY_UPGRADES_DISABLED, 0, true);
    }

    function upgradesDisabled() external view returns (bool) {
        return _kmsStorage().upgradesDisabled;
    }

    /// A registry without an owner could never revoke.
    function renounceOwnership() public pure override {
        revert OwnerIsNeeded();
    }

    function _checkUpgradable() internal view override {
        require(!_kmsStorage().upgradesDisabled, "Upgrades are permanently disabled");
    }

    function _kmsStorage() private pure returns (KmsStorage storage $) {
        bytes32 slot = KMS_STORAGE;
        assembly ("memory-safe") {
            $.slot := slot
        }
    }
}
