// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {AppBootInfo} from "../src/IAppAuth.sol";
import {AppConfig, DstackApp} from "../src/DstackApp.sol";
import {DstackKms} from "../src/DstackKms.sol";

/// forge's cheat codes that the tests use.
interface Vm {
    struct Log {
        bytes32[] topics;
        bytes data;
        address emitter;
    }

    function warp(uint256 timestamp) external;
    function prank(address sender) external;
    function startPrank(address sender) external;
    function stopPrank() external;
    function assume(bool condition) external;
    function addr(uint256 key) external returns (address);
    function sign(uint256 key, bytes32 digest) external returns (uint8 v, bytes32 r, bytes32 s);
    function expectRevert(bytes calldata reason) external;
    function expectEmit(address emitter) external;
    function load(address account, bytes32 slot) external view returns (bytes32);
    function recordLogs() external;
    function getRecordedLogs() external returns (Log[] memory);
}

abstract contract Base {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

    address internal constant OWNER = address(0xA11CE);
    address internal constant GUARDIAN = address(0x60A2D);
    address internal constant STRANGER = address(0xBAD);
    uint64 internal constant DAY = 1 days;

    bytes32 internal constant COMPOSE = bytes32(uint256(0x22));
    bytes32 internal constant DEVICE = bytes32(uint256(0x44));
    bytes32 internal constant MR = bytes32(uint256(0x66));
    bytes32 internal constant IMAGE = bytes32(uint256(0x77));

    bytes32 internal constant COMPOSE_HASH = keccak256("compose-hash");

    event PolicyChanged(address indexed actor, bytes32 indexed policy, bytes32 indexed value, bool enabled);
    event ChangeAnnounced(address indexed actor, bytes32 indexed policy, bytes32 indexed value, uint64 effectiveAt);
    event ChangeCancelled(address indexed actor, bytes32 indexed policy, bytes32 indexed value);

    function setUp() public virtual {
        vm.warp(1_800_000_000);
    }

    function deployApp(bytes memory start) internal returns (DstackApp) {
        DstackApp implementation = new DstackApp();
        return DstackApp(address(new ERC1967Proxy(address(implementation), start)));
    }

    function plainConfig() internal pure returns (AppConfig memory c) {
        c.owner = OWNER;
        c.guardian = GUARDIAN;
        c.notice = DAY;
        c.deviceIds = new bytes32[](1);
        c.deviceIds[0] = DEVICE;
        c.composeHashes = new bytes32[](1);
        c.composeHashes[0] = COMPOSE;
    }

    function startWith(AppConfig memory c) internal pure returns (bytes memory) {
        return abi.encodeWithSelector(
            bytes4(keccak256("initialize((address,address,uint64,bool,bool,bool,bool,bytes32[],bytes32[]))")), c
        );
    }

    function deployKms(address appImplementation) internal returns (DstackKms) {
        return DstackKms(
            address(
                new ERC1967Proxy(
                    address(new DstackKms()), abi.encodeCall(DstackKms.initialize, (OWNER, appImplementation))
                )
            )
        );
    }

    function boot(address app) internal pure returns (AppBootInfo memory b) {
        b.appId = app;
        b.composeHash = COMPOSE;
        b.deviceId = DEVICE;
        b.mrAggregated = MR;
        b.osImageHash = IMAGE;
        b.tcbStatus = "UpToDate";
    }

    function reverts(string memory reason) internal {
        vm.expectRevert(abi.encodeWithSignature("Error(string)", reason));
    }

    function revertsNotOwner(address account) internal {
        vm.expectRevert(abi.encodeWithSignature("OwnableUnauthorizedAccount(address)", account));
    }

    function revertsWith(bytes4 selector) internal {
        vm.expectRevert(abi.encodeWithSelector(selector));
    }

    function allows(bool ok, string memory reason) internal pure {
        require(ok, reason);
        require(bytes(reason).length == 0, "a reason although allowed");
    }

    function denies(bool ok, string memory reason, string memory want) internal pure {
        require(!ok, string.concat("allowed, want: ", want));
        require(keccak256(bytes(reason)) == keccak256(bytes(want)), string.concat(reason, " != ", want));
    }

    function same(bytes32 a, bytes32 b) internal pure {
        require(a == b, "not the same");
    }

    function same(uint256 a, uint256 b) internal pure {
        require(a == b, "not the same");
    }
}
