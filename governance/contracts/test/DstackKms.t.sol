// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {AppBootInfo, IAppAuth} from "../src/IAppAuth.sol";
import {AppConfig, DstackApp} from "../src/DstackApp.sol";
import {DstackKms} from "../src/DstackKms.sol";
import {Notice} from "../src/Notice.sol";
import {Base, Vm} from "./Base.sol";

/// An app contract of somebody who means harm.
contract HostileApp {
    enum Mode {
        Allow,
        Revert,
        BurnGas,
        ShortAnswer,
        HugeAnswer,
        OddBool,
        FarOffset,
        LongString,
        WriteState
    }

    Mode private mode;
    address public owner;
    uint256 private written;

    constructor(Mode mode_) {
        mode = mode_;
        owner = msg.sender;
    }

    function supportsInterface(bytes4 id) external pure returns (bool) {
        return id == 0x01ffc9a7 || id == type(IAppAuth).interfaceId;
    }

    fallback() external {
        if (mode == Mode.Revert) revert("no");
        if (mode == Mode.BurnGas) while (true) {}
        if (mode == Mode.WriteState) written = 1;
        uint256 allowed = mode == Mode.OddBool ? 2 : 1;
        uint256 offset = mode == Mode.FarOffset ? type(uint256).max : 64;
        uint256 length = mode == Mode.LongString ? 4096 : 0;
        uint256 size = mode == Mode.ShortAnswer ? 64 : mode == Mode.HugeAnswer ? 500_000 : 96;
        assembly {
            mstore(0, allowed)
            mstore(32, offset)
            mstore(64, length)
            return(0, size)
        }
    }
}

/// An app that answers what it is told to.
contract EchoApp {
    bytes private answer;

    constructor(bytes memory answer_) {
        answer = answer_;
    }

    function supportsInterface(bytes4 id) external pure returns (bool) {
        return id == 0x01ffc9a7 || id == type(IAppAuth).interfaceId;
    }

    fallback(bytes calldata) external returns (bytes memory) {
        return answer;
    }
}

contract NotAnApp {}

contract NextKms is DstackKms {
    function next() external pure returns (bool) {
        return true;
    }
}

contract DstackKmsTest is Base {
    DstackKms internal kms;
    DstackApp internal app;

    function setUp() public override {
        super.setUp();
        kms = deployKms(address(new DstackApp()));
        app = DstackApp(kms.deployAndRegisterApp(plainConfig()));
        vm.startPrank(OWNER);
        kms.addOsImageHash(IMAGE);
        kms.addKmsAggregatedMr(MR);
        kms.addKmsDevice(DEVICE);
        kms.setGuardian(GUARDIAN);
        kms.setNotice(2 * DAY);
        vm.stopPrank();
    }

    // Decisions, in upstream's order.

    function test_app_denials_come_in_upstreams_order() external {
        AppBootInfo memory b = boot(STRANGER);
        b.osImageHash = bytes32(uint256(1));
        (bool ok, string memory reason) = kms.isAppAllowed(b);
        denies(ok, reason, "App not registered");
        b.appId = address(app);
        (ok, reason) = kms.isAppAllowed(b);
        denies(ok, reason, "OS image is not allowed");
        b.osImageHash = IMAGE;
        b.composeHash = bytes32(uint256(1));
        (ok, reason) = kms.isAppAllowed(b);
        denies(ok, reason, "Compose hash not allowed");
        b.composeHash = COMPOSE;
        (ok, reason) = kms.isAppAllowed(b);
        allows(ok, reason);
        vm.prank(GUARDIAN);
        kms.removeOsImageHash(IMAGE);
        (ok, reason) = kms.isAppAllowed(b);
        denies(ok, reason, "OS image is not allowed");
    }

    function test_kms_denials_come_in_upstreams_order() external view {
        AppBootInfo memory b;
        (bool ok, string memory reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "TCB status is not up to date");
        b.tcbStatus = "UpToDate";
        (ok, reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "OS image is not allowed");
        b.osImageHash = IMAGE;
        (ok, reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "Aggregated MR not allowed");
        b.mrAggregated = MR;
        (ok, reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "KMS is not allowed to boot on this device");
        b.deviceId = DEVICE;
        (ok, reason) = kms.isKmsAllowed(b);
        allows(ok, reason);
    }

    function testFuzz_Threat_A01_kms_runs_only_where_it_is_listed(bytes32 mr, bytes32 device, bytes32 image)
        external
        view
    {
        AppBootInfo memory b = boot(address(0));
        (b.mrAggregated, b.deviceId, b.osImageHash) = (mr, device, image);
        (bool ok,) = kms.isKmsAllowed(b);
        require(ok == (mr == MR && device == DEVICE && image == IMAGE), "not the list");
    }

    function test_kms_revocations_are_immediate() external {
        vm.startPrank(GUARDIAN);
        kms.removeKmsDevice(DEVICE);
        (bool ok, string memory reason) = kms.isKmsAllowed(boot(address(0)));
        denies(ok, reason, "KMS is not allowed to boot on this device");
        kms.removeKmsAggregatedMr(MR);
        (ok, reason) = kms.isKmsAllowed(boot(address(0)));
        denies(ok, reason, "Aggregated MR not allowed");
    }

    function test_destroyed_or_foreign_apps_are_no_apps() external {
        reverts("Invalid app ID");
        kms.registerApp(address(0));
        vm.expectRevert(abi.encodeWithSelector(DstackKms.NotAnApp.selector, STRANGER));
        kms.registerApp(STRANGER);
        address other = address(new NotAnApp());
        vm.expectRevert(abi.encodeWithSelector(DstackKms.NotAnApp.selector, other));
        kms.registerApp(other);
    }

    // Hostile apps.

    function ask(HostileApp.Mode mode) internal returns (bool, string memory) {
        HostileApp hostile = new HostileApp(mode);
        kms.registerApp(address(hostile));
        return kms.isAppAllowed(boot(address(hostile)));
    }

    function test_hostile_apps_harm_nobody_else() external {
        (bool ok, string memory reason) = ask(HostileApp.Mode.Allow);
        allows(ok, reason);
        (ok, reason) = ask(HostileApp.Mode.Revert);
        denies(ok, reason, "app policy reverted");
        (ok, reason) = ask(HostileApp.Mode.WriteState);
        denies(ok, reason, "app policy reverted");
        uint256 before = gasleft();
        (ok, reason) = ask(HostileApp.Mode.BurnGas);
        denies(ok, reason, "app policy reverted");
        require(before - gasleft() < 3_000_000, "the app burnt the caller's gas");
        (ok, reason) = ask(HostileApp.Mode.ShortAnswer);
        denies(ok, reason, "app policy is malformed");
        (ok, reason) = ask(HostileApp.Mode.HugeAnswer);
        denies(ok, reason, "app policy is malformed");
        (ok, reason) = ask(HostileApp.Mode.OddBool);
        denies(ok, reason, "app policy is malformed");
        (ok, reason) = ask(HostileApp.Mode.FarOffset);
        denies(ok, reason, "app policy is malformed");
        (ok, reason) = ask(HostileApp.Mode.LongString);
        denies(ok, reason, "app policy is malformed");
    }

    function echo(bytes memory answer) internal returns (bool, string memory) {
        EchoApp app_ = new EchoApp(answer);
        kms.registerApp(address(app_));
        return kms.isAppAllowed(boot(address(app_)));
    }

    function testFuzz_no_answer_of_an_app_reverts(bool allowed, uint256 length, bytes calldata text) external {
        length = length % 4 == 0 ? length : length % 200;
        (bool ok, string memory reason) = echo(abi.encodePacked(uint256(allowed ? 1 : 0), uint256(64), length, text));
        if (length > text.length) denies(ok, reason, "app policy is malformed");
        else require(ok == allowed && keccak256(bytes(reason)) == keccak256(text[:length]), "not the app's answer");
        (ok,) = echo(text);
        require(!ok || text.length >= 96, "a short answer allowed");
    }

    function testFuzz_an_apps_answer_is_passed_on(bool allowed, string calldata why) external {
        bytes memory answer = abi.encode(allowed, why);
        (bool ok, string memory reason) = echo(answer);
        if (answer.length > 4096) denies(ok, reason, "app policy is malformed");
        else require(ok == allowed && keccak256(bytes(reason)) == keccak256(bytes(why)), "not the app's answer");
    }

    // Notice.

    function additions() internal pure returns (bytes[] memory calls) {
        calls = new bytes[](9);
        bytes32 x = bytes32(uint256(0x99));
        calls[0] = abi.encodeCall(DstackKms.addKmsAggregatedMr, (x));
        calls[1] = abi.encodeCall(DstackKms.addKmsDevice, (x));
        calls[2] = abi.encodeCall(DstackKms.addOsImageHash, (x));
        calls[3] = abi.encodeCall(DstackKms.addOsImage, (bytes32(uint256(0x98)), 3));
        calls[4] = abi.encodeCall(DstackKms.setAppImplementation, (STRANGER));
        calls[5] = abi.encodeCall(DstackKms.setGatewayAppId, ("4141414141414141414141414141414141414141"));
        calls[6] = abi.encodeCall(DstackKms.setKmsInfo, (DstackKms.KmsInfo("k", "c", "q", "e")));
        calls[7] = abi.encodeWithSignature("setGuardian(address)", STRANGER);
        calls[8] = abi.encodeWithSignature("setNotice(uint64)", 0);
    }

    function holds() internal view returns (bytes32) {
        bytes32 x = bytes32(uint256(0x99));
        (bytes memory k, bytes memory c, bytes memory q, bytes memory e) = kms.kmsInfo();
        return keccak256(
            abi.encode(
                kms.kmsAllowedAggregatedMrs(x),
                kms.kmsAllowedDeviceIds(x),
                kms.allowedOsImages(x),
                kms.allowedOsImages(bytes32(uint256(0x98))),
                kms.appImplementation(),
                kms.gatewayAppId(),
                keccak256(abi.encode(k, c, q, e)),
                kms.guardian(),
                kms.notice()
            )
        );
    }

    function test_Threat_G06_every_grant_of_the_registry_waits() external {
        bytes[] memory calls = additions();
        bytes32 before = holds();
        for (uint256 i = 0; i < calls.length; ++i) {
            vm.prank(STRANGER);
            (bool ok, bytes memory why) = address(kms).call(calls[i]);
            require(!ok, "a stranger announced");
            same(keccak256(why), keccak256(abi.encodeWithSignature("OwnableUnauthorizedAccount(address)", STRANGER)));
            vm.prank(OWNER);
            (ok,) = address(kms).call(calls[i]);
            require(ok, "not announced");
            same(holds(), before);
        }
        vm.warp(block.timestamp + 2 * DAY - 1);
        for (uint256 i = 0; i < calls.length; ++i) {
            vm.prank(OWNER);
            (bool ok, bytes memory why) = address(kms).call(calls[i]);
            require(!ok && bytes4(why) == Notice.NoticeNotOver.selector, "early");
        }
        vm.warp(block.timestamp + 1);
        for (uint256 i = 0; i < calls.length; ++i) {
            before = holds();
            (bool ok,) = address(kms).call(calls[i]);
            require(ok && holds() != before, "not made when due");
        }
        same(kms.osImageEpoch(bytes32(uint256(0x98))), 3);
    }

    function test_Threat_G06_upgrade_waits_and_can_be_ended() external {
        address next = address(new NextKms());
        vm.startPrank(OWNER);
        kms.upgradeToAndCall(next, "");
        vm.expectRevert(abi.encodeWithSelector(Notice.NoticeNotOver.selector, uint64(block.timestamp) + 2 * DAY));
        kms.upgradeToAndCall(next, "");
        vm.warp(block.timestamp + 2 * DAY);
        kms.upgradeToAndCall(next, "");
        require(NextKms(address(kms)).next() && kms.allowedOsImages(IMAGE), "not upgraded");
        kms.disableUpgrades();
        require(kms.upgradesDisabled(), "not disabled");
        reverts("Upgrades are permanently disabled");
        kms.upgradeToAndCall(next, "");
    }

    function test_announcement_of_keys_binds_all_of_them() external {
        vm.prank(OWNER);
        kms.setKmsInfo(DstackKms.KmsInfo("k", "c", "q", "e"));
        vm.warp(block.timestamp + 2 * DAY);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        kms.setKmsInfo(DstackKms.KmsInfo("k", "other", "q", "e"));
    }

    function test_kms_evidence() external {
        vm.startPrank(OWNER);
        kms.setKmsQuote("quote");
        kms.setKmsEventlog("log");
        vm.stopPrank();
        (,, bytes memory quote, bytes memory eventlog) = kms.kmsInfo();
        require(keccak256(quote) == keccak256("quote") && keccak256(eventlog) == keccak256("log"), "not stored");
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        kms.setKmsQuote("");
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        kms.setKmsEventlog("");
    }

    function test_Threat_G08_gateway_is_a_name_or_none() external {
        vm.startPrank(OWNER);
        revertsWith(DstackKms.GatewayMustBeNamed.selector);
        kms.setGatewayAppId("any");
        vm.stopPrank();
        vm.expectRevert(abi.encodeWithSelector(Notice.NotRevoker.selector, STRANGER));
        vm.prank(STRANGER);
        kms.setGatewayAppId("");
        vm.prank(GUARDIAN);
        kms.setGatewayAppId("");
    }

    // Security epochs of images.

    function test_Threat_D11_epoch_revokes_all_older_images() external {
        bytes32 newer = bytes32(uint256(0x78));
        vm.prank(OWNER);
        kms.addOsImage(newer, 4);
        vm.warp(block.timestamp + 2 * DAY);
        kms.addOsImage(newer, 4);
        vm.prank(OWNER);
        kms.setMinOsEpoch(4);
        AppBootInfo memory b = boot(address(app));
        (bool ok, string memory reason) = kms.isAppAllowed(b);
        denies(ok, reason, "OS image is older than the security epoch");
        (ok, reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "OS image is older than the security epoch");
        b.osImageHash = newer;
        (ok, reason) = kms.isAppAllowed(b);
        allows(ok, reason);
        vm.expectRevert(abi.encodeWithSelector(DstackKms.OsEpochOutOfOrder.selector, 4));
        vm.prank(OWNER);
        kms.setMinOsEpoch(3);
        revertsNotOwner(GUARDIAN);
        vm.prank(GUARDIAN);
        kms.setMinOsEpoch(5);
    }

    function test_Threat_D11_epoch_of_an_image_is_the_announced_one() external {
        bytes32 next = bytes32(uint256(0x79));
        vm.prank(OWNER);
        kms.addOsImage(next, 1);
        vm.warp(block.timestamp + 2 * DAY);
        vm.expectRevert(abi.encodeWithSelector(DstackKms.OsImageHasEpoch.selector, 1));
        vm.prank(STRANGER);
        kms.addOsImage(next, 9);
        kms.addOsImage(next, 1);
        vm.expectRevert(abi.encodeWithSelector(DstackKms.OsImageHasEpoch.selector, 1));
        vm.prank(OWNER);
        kms.addOsImage(next, 9);
        vm.prank(GUARDIAN);
        kms.removeOsImageHash(next);
        same(kms.osImageEpoch(next), 0);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        kms.addOsImage(next, 9);
    }

    // Platforms.

    function test_registry_requires_platforms_of_all() external {
        AppBootInfo memory b = boot(address(app));
        vm.prank(GUARDIAN);
        kms.setPlatformRequired(true);
        (bool ok, string memory reason) = kms.isAppAllowed(b);
        denies(ok, reason, "TEE variant is unknown");
        (ok, reason) = kms.isKmsAllowed(b);
        denies(ok, reason, "TEE variant is unknown");
        vm.startPrank(OWNER);
        kms.addTeeVariant("dstack-tdx");
        kms.addTcbStatus("UpToDate");
        vm.warp(block.timestamp + 2 * DAY);
        kms.addTeeVariant("dstack-tdx");
        kms.addTcbStatus("UpToDate");
        vm.stopPrank();
        (ok, reason) = kms.isKmsAllowedOn(b, "dstack-amd-sev-snp");
        denies(ok, reason, "TEE variant is not allowed");
        (ok, reason) = kms.isKmsAllowedOn(b, "dstack-tdx");
        allows(ok, reason);
        (ok, reason) = kms.isAppAllowedOn(b, "dstack-tdx");
        allows(ok, reason);
        b.appId = address(new HostileApp(HostileApp.Mode.Allow));
        kms.registerApp(b.appId);
        (ok, reason) = kms.isAppAllowedOn(b, "dstack-tdx");
        allows(ok, reason);
    }

    function test_app_requires_a_platform_through_the_registry() external {
        AppBootInfo memory b = boot(address(app));
        vm.startPrank(OWNER);
        app.addTeeVariant("dstack-tdx");
        app.addTcbStatus("UpToDate");
        vm.warp(block.timestamp + DAY);
        app.addTeeVariant("dstack-tdx");
        app.addTcbStatus("UpToDate");
        app.setPlatformRequired(true);
        (bool ok, string memory reason) = kms.isAppAllowed(b);
        denies(ok, reason, "TEE variant is unknown");
        (ok, reason) = kms.isAppAllowedOn(b, "dstack-amd-sev-snp");
        denies(ok, reason, "TEE variant is not allowed");
        (ok, reason) = kms.isAppAllowedOn(b, "dstack-tdx");
        allows(ok, reason);
    }

    // Apps.

    function test_factory_of_upstream() external {
        vm.recordLogs();
        vm.prank(STRANGER);
        address made = kms.deployAndRegisterApp(OWNER, false, true, false, DEVICE, COMPOSE);
        sawFactoryEvent(made);
        require(kms.registeredApps(made) && DstackApp(made).owner() == OWNER, "not made");
        require(DstackApp(made).requireTcbUpToDate() && DstackApp(made).allowedComposeHashes(COMPOSE), "settings");
        made = kms.deployAndRegisterApp(OWNER, true, true, 0, COMPOSE);
        require(DstackApp(made).allowAnyDevice() && !DstackApp(made).requireTcbUpToDate(), "five arguments");
        reverts("Invalid owner address");
        kms.deployAndRegisterApp(address(0), true, true, 0, COMPOSE);
        DstackKms bare = deployKms(address(0));
        reverts("DstackApp implementation not set");
        bare.deployAndRegisterApp(OWNER, true, true, 0, COMPOSE);
    }

    function sawFactoryEvent(address made) private {
        bytes32 topic = keccak256("AppDeployedViaFactory(address,address)");
        bool seen;
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            bytes32[] memory topics = logs[i].topics;
            if (topics[0] != topic) continue;
            same(topics[1], bytes32(uint256(uint160(made))));
            same(topics[2], bytes32(uint256(uint160(STRANGER))));
            seen = true;
        }
        require(seen, "no AppDeployedViaFactory");
    }

    function test_withdrawn_app_is_put_back_by_its_owner_only() external {
        vm.expectRevert(abi.encodeWithSelector(DstackKms.NotTheAppsOwner.selector, STRANGER));
        vm.prank(STRANGER);
        kms.withdrawApp(address(app));
        vm.prank(OWNER);
        kms.withdrawApp(address(app));
        (bool ok, string memory reason) = kms.isAppAllowed(boot(address(app)));
        denies(ok, reason, "App not registered");
        vm.expectRevert(abi.encodeWithSelector(DstackKms.NotTheAppsOwner.selector, STRANGER));
        vm.prank(STRANGER);
        kms.registerApp(address(app));
        vm.prank(OWNER);
        kms.registerApp(address(app));
        (ok, reason) = kms.isAppAllowed(boot(address(app)));
        allows(ok, reason);
    }

    // Ownership and beginning.

    function test_registry_always_has_an_owner() external {
        revertsWith(DstackKms.OwnerIsNeeded.selector);
        vm.prank(OWNER);
        kms.renounceOwnership();
        DstackKms implementation = new DstackKms();
        reverts("invalid owner address");
        new ERC1967Proxy(address(implementation), abi.encodeCall(DstackKms.initialize, (address(0), address(0))));
        reverts("Invalid implementation address");
        kms.setAppImplementation(address(0));
    }

    function test_Threat_G07_registry_initialises_once() external {
        vm.expectRevert(abi.encodeWithSignature("InvalidInitialization()"));
        kms.initialize(STRANGER, address(0));
        DstackKms implementation = new DstackKms();
        vm.expectRevert(abi.encodeWithSignature("InvalidInitialization()"));
        implementation.initialize(STRANGER, address(0));
    }

    function test_registry_grants_nothing_zero() external {
        vm.startPrank(OWNER);
        revertsWith(Notice.ZeroValue.selector);
        kms.addKmsAggregatedMr(0);
        revertsWith(Notice.ZeroValue.selector);
        kms.addKmsDevice(0);
        revertsWith(Notice.ZeroValue.selector);
        kms.addOsImageHash(0);
    }
}
