// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// What a KMS found in the evidence of a guest. The fields and their order are
/// upstream's (spec/governance.md 4.1); an absent value is zero or empty.
struct AppBootInfo {
    address appId;
    bytes32 composeHash;
    address instanceId;
    bytes32 deviceId;
    bytes32 mrAggregated;
    bytes32 mrSystem;
    bytes32 osImageHash;
    string tcbStatus;
    string[] advisoryIds;
}

/// Who may run, as an app decides it. The id of ERC-165 is 0x1e079198.
interface IAppAuth {
    function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool isAllowed, string memory reason);
}

/// IAppAuth for callers that also know the kind of TEE, in the words of
/// spec/governance.md 2 ("dstack-tdx" ...). An app that requires kinds of TEE denies
/// every caller of IAppAuth.
interface IAppAuthPlatform {
    function isAppAllowedOn(AppBootInfo calldata bootInfo, string calldata teeVariant)
        external
        view
        returns (bool isAllowed, string memory reason);
}

/// The lists of an app. The id of ERC-165 is 0x8fd37527.
interface IAppAuthBasicManagement {
    event ComposeHashAdded(bytes32 composeHash);
    event ComposeHashRemoved(bytes32 composeHash);
    event DeviceAdded(bytes32 deviceId);
    event DeviceRemoved(bytes32 deviceId);

    function addComposeHash(bytes32 composeHash) external;
    function removeComposeHash(bytes32 composeHash) external;
    function addDevice(bytes32 deviceId) external;
    function removeDevice(bytes32 deviceId) external;
}
