// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC1967Proxy} from "@openzeppelin/contracts/proxy/ERC1967/ERC1967Proxy.sol";
import {AppBootInfo, IAppAuth, IAppAuthBasicManagement, IAppAuthPlatform} from "../src/IAppAuth.sol";
import {AppConfig, DstackApp} from "../src/DstackApp.sol";
import {Governed} from "../src/Governed.sol";
import {Notice} from "../src/Notice.sol";
import {Base} from "./Base.sol";

/// The next version of an app, with an initialiser of its own.
contract NextApp is DstackApp {
    uint256 public marker;

    function mark(uint256 value) external reinitializer(2) {
        marker = value;
    }
}

contract DstackAppTest is Base {
    DstackApp internal app;

    function setUp() public override {
        super.setUp();
        app = deployApp(startWith(plainConfig()));
    }

    function announced(bytes32 policy, bytes32 value) internal view returns (uint64 effectiveAt, bool pending) {
        (, effectiveAt, pending) = app.change(policy, value);
    }

    // Decisions, in upstream's order.

    function test_listed_app_is_allowed() external view {
        (bool ok, string memory reason) = app.isAppAllowed(boot(address(app)));
        allows(ok, reason);
    }

    function test_denials_come_in_upstreams_order() external {
        vm.prank(OWNER);
        app.setRequireTcbUpToDate(true);
        AppBootInfo memory b = boot(address(app));
        b.tcbStatus = "OutOfDate";
        b.composeHash = bytes32(uint256(1));
        b.deviceId = bytes32(uint256(1));
        (bool ok, string memory reason) = app.isAppAllowed(b);
        denies(ok, reason, "TCB status is not up to date");
        b.tcbStatus = "UpToDate";
        (ok, reason) = app.isAppAllowed(b);
        denies(ok, reason, "Compose hash not allowed");
        b.composeHash = COMPOSE;
        (ok, reason) = app.isAppAllowed(b);
        denies(ok, reason, "Device not allowed");
        b.deviceId = DEVICE;
        (ok, reason) = app.isAppAllowed(b);
        allows(ok, reason);
    }

    function testFuzz_only_what_is_listed_is_allowed(bytes32 compose, bytes32 device) external view {
        AppBootInfo memory b = boot(address(app));
        b.composeHash = compose;
        b.deviceId = device;
        (bool ok,) = app.isAppAllowed(b);
        require(ok == (compose == COMPOSE && device == DEVICE), "not the list");
    }

    function test_Threat_A01_empty_device_list_denies_without_the_explicit_flag() external {
        AppConfig memory c = plainConfig();
        c.deviceIds = new bytes32[](0);
        app = deployApp(startWith(c));
        AppBootInfo memory b = boot(address(app));
        (bool ok, string memory reason) = app.isAppAllowed(b);
        denies(ok, reason, "Device not allowed");
        b.deviceId = 0;
        (ok, reason) = app.isAppAllowed(b);
        denies(ok, reason, "Device not allowed");
        c.allowAnyDevice = true;
        app = deployApp(startWith(c));
        (ok, reason) = app.isAppAllowed(b);
        allows(ok, reason);
    }

    function test_zero_is_nobody() external {
        vm.startPrank(OWNER);
        revertsWith(Notice.ZeroValue.selector);
        app.addDevice(0);
        revertsWith(Notice.ZeroValue.selector);
        app.addComposeHash(0);
        revertsWith(Notice.ZeroValue.selector);
        app.addTeeVariant("");
        vm.stopPrank();
        AppConfig memory c = plainConfig();
        c.deviceIds[0] = 0;
        DstackApp implementation = new DstackApp();
        revertsWith(Notice.ZeroValue.selector);
        new ERC1967Proxy(address(implementation), startWith(c));
    }

    // Beginning.

    function test_upstreams_initialisers() external {
        app = deployApp(
            abi.encodeWithSignature(
                "initialize(address,bool,bool,bool,bytes32,bytes32)", OWNER, true, true, false, DEVICE, COMPOSE
            )
        );
        require(app.requireTcbUpToDate() && !app.allowAnyDevice(), "flags");
        require(app.allowedDeviceIds(DEVICE) && app.allowedComposeHashes(COMPOSE), "lists");
        // Slot 1 is upstream's: byte 0 upgrades disabled, byte 1 any device.
        same(vm.load(address(app), bytes32(uint256(1))), bytes32(uint256(1)));
        app = deployApp(
            abi.encodeWithSignature("initialize(address,bool,bool,bytes32,bytes32)", OWNER, false, true, 0, COMPOSE)
        );
        same(vm.load(address(app), bytes32(uint256(1))), bytes32(uint256(0x100)));
        require(!app.requireTcbUpToDate() && app.owner() == OWNER && app.version() == 3, "start");
        require(!app.allowedDeviceIds(0), "zero device is none");
    }

    function test_Threat_G07_initialises_once_by_whichever_way() external {
        bytes[] memory starts = new bytes[](3);
        starts[0] = abi.encodeWithSignature(
            "initialize(address,bool,bool,bool,bytes32,bytes32)", STRANGER, false, false, true, 0, 0
        );
        starts[1] =
            abi.encodeWithSignature("initialize(address,bool,bool,bytes32,bytes32)", STRANGER, false, true, 0, 0);
        starts[2] = startWith(plainConfig());
        DstackApp implementation = new DstackApp();
        for (uint256 i = 0; i < 3; ++i) {
            for (uint256 j = 0; j < 3; ++j) {
                address made = address(new ERC1967Proxy(address(implementation), starts[i]));
                (bool ok, bytes memory why) = made.call(starts[j]);
                require(!ok && bytes4(why) == bytes4(keccak256("InvalidInitialization()")), "initialised twice");
            }
            (bool bare, bytes memory reason) = address(implementation).call(starts[i]);
            require(
                !bare && bytes4(reason) == bytes4(keccak256("InvalidInitialization()")), "implementation initialised"
            );
        }
    }

    function test_needs_an_owner() external {
        DstackApp implementation = new DstackApp();
        reverts("invalid owner address");
        new ERC1967Proxy(
            address(implementation),
            abi.encodeWithSignature("initialize(address,bool,bool,bytes32,bytes32)", address(0), false, true, 0, 0)
        );
    }

    function test_interfaces() external view {
        require(app.supportsInterface(0x1e079198) && type(IAppAuth).interfaceId == 0x1e079198, "IAppAuth");
        require(
            app.supportsInterface(0x8fd37527) && type(IAppAuthBasicManagement).interfaceId == 0x8fd37527, "management"
        );
        require(app.supportsInterface(0x01ffc9a7), "ERC-165");
        require(app.supportsInterface(type(IAppAuthPlatform).interfaceId), "platform");
        require(!app.supportsInterface(0xffffffff), "not this");
    }

    // Notice.

    function test_Threat_G06_addition_waits_for_its_notice() external {
        bytes32 next = bytes32(uint256(0x33));
        uint64 due = uint64(block.timestamp) + DAY;
        vm.expectEmit(address(app));
        emit ChangeAnnounced(OWNER, COMPOSE_HASH, next, due);
        vm.prank(OWNER);
        app.addComposeHash(next);
        AppBootInfo memory b = boot(address(app));
        b.composeHash = next;
        (bool ok, string memory reason) = app.isAppAllowed(b);
        denies(ok, reason, "Compose hash not allowed");

        vm.warp(due - 1);
        vm.expectRevert(abi.encodeWithSelector(Notice.NoticeNotOver.selector, due));
        vm.prank(OWNER);
        app.addComposeHash(next);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        app.addComposeHash(next);

        vm.warp(due);
        // Time alone allows nothing: storage proofs read what is in storage.
        (ok, reason) = app.isAppAllowed(b);
        denies(ok, reason, "Compose hash not allowed");
        vm.expectEmit(address(app));
        emit IAppAuthBasicManagement.ComposeHashAdded(next);
        vm.expectEmit(address(app));
        emit PolicyChanged(STRANGER, COMPOSE_HASH, next, true);
        vm.prank(STRANGER);
        app.addComposeHash(next);
        (ok, reason) = app.isAppAllowed(b);
        allows(ok, reason);
        (uint64 announcedAt, uint64 effectiveAt, bool pending) = app.change(COMPOSE_HASH, next);
        require(announcedAt == due - DAY && effectiveAt == due && !pending, "record");
    }

    function test_Threat_G06_revoked_change_comes_back_only_by_a_new_announcement() external {
        bytes32 next = bytes32(uint256(0x33));
        vm.prank(OWNER);
        app.addComposeHash(next);
        vm.warp(block.timestamp + DAY);
        app.addComposeHash(next);
        vm.prank(GUARDIAN);
        app.removeComposeHash(next);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        app.addComposeHash(next);
        require(!app.allowedComposeHashes(next), "came back");
    }

    function test_applied_change_cannot_be_applied_again_by_anybody() external {
        bytes32 next = bytes32(uint256(0x33));
        vm.prank(OWNER);
        app.addComposeHash(next);
        vm.warp(block.timestamp + DAY);
        app.addComposeHash(next);
        revertsNotOwner(address(this));
        app.addComposeHash(next);
    }

    function test_revocation_is_immediate_and_cancels() external {
        bytes32 next = bytes32(uint256(0x33));
        vm.prank(OWNER);
        app.addComposeHash(next);
        vm.expectEmit(address(app));
        emit ChangeCancelled(GUARDIAN, COMPOSE_HASH, next);
        vm.prank(GUARDIAN);
        app.removeComposeHash(next);
        vm.warp(block.timestamp + DAY);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        app.addComposeHash(next);

        vm.expectEmit(address(app));
        emit IAppAuthBasicManagement.ComposeHashRemoved(COMPOSE);
        vm.expectEmit(address(app));
        emit PolicyChanged(OWNER, COMPOSE_HASH, COMPOSE, false);
        vm.prank(OWNER);
        app.removeComposeHash(COMPOSE);
        (bool ok, string memory reason) = app.isAppAllowed(boot(address(app)));
        denies(ok, reason, "Compose hash not allowed");
    }

    function test_strangers_can_do_nothing() external {
        vm.startPrank(STRANGER);
        bytes4 not = Notice.NotRevoker.selector;
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.removeComposeHash(COMPOSE);
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.removeDevice(DEVICE);
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.setAllowAnyDevice(false);
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.setRequireTcbUpToDate(true);
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.setPlatformRequired(true);
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.blockAdvisory("x");
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.removeTeeVariant("x");
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.removeTcbStatus("x");
        vm.expectRevert(abi.encodeWithSelector(not, STRANGER));
        app.cancel(COMPOSE_HASH, COMPOSE);
        vm.stopPrank();
        // And the guardian can give nothing.
        for (uint256 i = 0; i < 2; ++i) {
            address who = i == 0 ? STRANGER : GUARDIAN;
            bytes[] memory calls = new bytes[](15);
            calls[0] = abi.encodeCall(app.addComposeHash, (MR));
            calls[1] = abi.encodeCall(app.addDevice, (MR));
            calls[2] = abi.encodeCall(app.setAllowAnyDevice, (true));
            calls[3] = abi.encodeCall(app.setRequireTcbUpToDate, (false));
            calls[4] = abi.encodeCall(app.setPlatformRequired, (false));
            calls[5] = abi.encodeCall(app.unblockAdvisory, ("x"));
            calls[6] = abi.encodeCall(app.addTeeVariant, ("x"));
            calls[7] = abi.encodeCall(app.addTcbStatus, ("x"));
            calls[8] = abi.encodeCall(app.setNotice, (DAY - 1));
            calls[9] = abi.encodeCall(app.setNotice, (DAY + 1));
            calls[10] = abi.encodeCall(app.setGuardian, (STRANGER));
            calls[11] = abi.encodeCall(app.setKeyEpoch, (1));
            calls[12] = abi.encodeCall(app.freeze, ());
            calls[13] = abi.encodeCall(app.disableUpgrades, ());
            calls[14] = abi.encodeCall(app.upgradeToAndCall, (address(1), ""));
            for (uint256 j = 0; j < calls.length; ++j) {
                vm.prank(who);
                (bool ok, bytes memory why) = address(app).call(calls[j]);
                require(!ok, "a stranger's call passed");
                same(keccak256(why), keccak256(abi.encodeWithSignature("OwnableUnauthorizedAccount(address)", who)));
            }
        }
    }

    function test_announcement_lapses() external {
        bytes32 next = bytes32(uint256(0x33));
        vm.prank(OWNER);
        app.addComposeHash(next);
        vm.warp(block.timestamp + DAY + app.LAPSE() + 1);
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        app.addComposeHash(next);
        vm.prank(OWNER);
        app.addComposeHash(next);
        require(!app.allowedComposeHashes(next), "lapsed, and yet there");
        (uint64 due, bool pending) = announced(COMPOSE_HASH, next);
        require(pending && due == block.timestamp + DAY, "not announced anew");
    }

    function test_without_notice_changes_are_immediate() external {
        AppConfig memory c = plainConfig();
        c.notice = 0;
        app = deployApp(startWith(c));
        vm.startPrank(OWNER);
        app.addComposeHash(MR);
        app.addDevice(MR);
        app.setAllowAnyDevice(true);
        require(app.allowedComposeHashes(MR) && app.allowedDeviceIds(MR) && app.allowAnyDevice(), "not immediate");
    }

    function test_Threat_G06_less_notice_takes_the_notice_that_it_ends() external {
        vm.startPrank(OWNER);
        app.setNotice(0);
        require(app.notice() == DAY, "shortened at once");
        app.addComposeHash(MR);
        require(!app.allowedComposeHashes(MR), "added at once");
        app.setNotice(3 * DAY);
        require(app.notice() == 3 * DAY, "not lengthened at once");
        vm.warp(block.timestamp + DAY);
        app.setNotice(0);
        require(app.notice() == 0, "not shortened when due");
        vm.expectRevert(abi.encodeWithSelector(Notice.NoticeTooLong.selector, 365 days + 1));
        app.setNotice(365 days + 1);
    }

    function test_Threat_G06_guardian_is_not_replaced_at_once() external {
        vm.startPrank(OWNER);
        app.setGuardian(STRANGER);
        require(app.guardian() == GUARDIAN, "replaced at once");
        vm.stopPrank();
        bytes32 value = bytes32(uint256(uint160(STRANGER)));
        revertsNotOwner(GUARDIAN);
        vm.prank(GUARDIAN);
        app.cancel(keccak256("guardian"), value);
        vm.warp(block.timestamp + DAY);
        vm.prank(OWNER);
        app.setGuardian(STRANGER);
        require(app.guardian() == STRANGER, "not replaced when due");
    }

    function test_cancel() external {
        vm.prank(OWNER);
        app.setNotice(0);
        vm.prank(GUARDIAN);
        app.cancel(keccak256("notice"), 0);
        vm.expectRevert(abi.encodeWithSelector(Notice.NothingAnnounced.selector, keccak256("notice"), bytes32(0)));
        vm.prank(GUARDIAN);
        app.cancel(keccak256("notice"), 0);
        vm.warp(block.timestamp + DAY);
        revertsNotOwner(address(this));
        app.setNotice(0);
    }

    function test_flags_loosen_with_notice_and_tighten_at_once() external {
        vm.startPrank(OWNER);
        app.setAllowAnyDevice(true);
        app.setRequireTcbUpToDate(true);
        app.setRequireTcbUpToDate(false);
        require(!app.allowAnyDevice() && app.requireTcbUpToDate(), "loosened at once");
        vm.warp(block.timestamp + DAY);
        app.setAllowAnyDevice(true);
        app.setRequireTcbUpToDate(false);
        require(app.allowAnyDevice() && !app.requireTcbUpToDate(), "not loosened when due");
        app.setAllowAnyDevice(false);
        require(!app.allowAnyDevice(), "not tightened at once");
        vm.stopPrank();
        revertsNotOwner(address(this));
        app.setAllowAnyDevice(true);
    }

    function testFuzz_no_addition_before_its_notice(uint64 notice, uint64 wait) external {
        notice = notice % (365 days) + 1;
        AppConfig memory c = plainConfig();
        c.notice = notice;
        app = deployApp(startWith(c));
        vm.prank(OWNER);
        app.addDevice(MR);
        vm.warp(block.timestamp + wait);
        (bool ok,) = address(app).call(abi.encodeCall(app.addDevice, (MR)));
        bool due = wait >= notice && wait <= uint256(notice) + app.LAPSE();
        require(ok == due && app.allowedDeviceIds(MR) == due, "not when due");
    }

    // Frozen.

    function test_Threat_G06_frozen_app_can_only_revoke() external {
        vm.startPrank(OWNER);
        app.addComposeHash(MR);
        app.freeze();
        app.freeze();
        vm.warp(block.timestamp + DAY);
        bytes4 no = DstackApp.AppFrozen.selector;
        revertsWith(no);
        app.addComposeHash(MR);
        revertsWith(no);
        app.addDevice(MR);
        revertsWith(no);
        app.setAllowAnyDevice(true);
        revertsWith(no);
        app.setRequireTcbUpToDate(false);
        revertsWith(no);
        app.addTeeVariant("dstack-tdx");
        revertsWith(no);
        app.addTcbStatus("UpToDate");
        revertsWith(no);
        app.setPlatformRequired(false);
        revertsWith(no);
        app.unblockAdvisory("x");
        revertsWith(no);
        app.setNotice(0);
        address next = address(new NextApp());
        reverts("Upgrades are permanently disabled");
        app.upgradeToAndCall(next, "");
        require(app.frozen(), "not frozen");
        same(vm.load(address(app), bytes32(uint256(1))), bytes32(uint256(1)));
        (bool ok, string memory reason) = app.isAppAllowed(boot(address(app)));
        allows(ok, reason);
        app.removeComposeHash(COMPOSE);
        (ok, reason) = app.isAppAllowed(boot(address(app)));
        denies(ok, reason, "Compose hash not allowed");
    }

    function test_born_frozen() external {
        AppConfig memory c = plainConfig();
        c.frozen = true;
        c.notice = 0;
        app = deployApp(startWith(c));
        (bool ok, string memory reason) = app.isAppAllowed(boot(address(app)));
        allows(ok, reason);
        revertsWith(DstackApp.AppFrozen.selector);
        vm.prank(OWNER);
        app.addComposeHash(MR);
    }

    // Upgrades.

    function test_Threat_G06_upgrade_waits_and_binds_its_arguments() external {
        address next = address(new NextApp());
        bytes memory start = abi.encodeCall(NextApp.mark, (7));
        vm.startPrank(OWNER);
        vm.expectEmit(address(app));
        emit Governed.UpgradeAnnounced(next, start);
        app.upgradeToAndCall(next, start);
        vm.expectRevert(abi.encodeWithSelector(Notice.NoticeNotOver.selector, uint64(block.timestamp) + DAY));
        app.upgradeToAndCall(next, start);
        vm.warp(block.timestamp + DAY);
        vm.stopPrank();
        revertsNotOwner(STRANGER);
        vm.prank(STRANGER);
        app.upgradeToAndCall(next, start);
        vm.startPrank(OWNER);
        // Other arguments are another change.
        app.upgradeToAndCall(next, abi.encodeCall(NextApp.mark, (8)));
        (bool is_, bytes memory got) = address(app).staticcall(abi.encodeWithSignature("marker()"));
        require(!is_ && got.length == 0, "upgraded by other arguments");
        app.upgradeToAndCall(next, start);
        same(NextApp(address(app)).marker(), 7);
        require(app.allowedComposeHashes(COMPOSE) && app.owner() == OWNER && app.notice() == DAY, "state was lost");
    }

    function test_disableUpgrades_is_for_ever_and_does_not_freeze() external {
        vm.startPrank(OWNER);
        app.disableUpgrades();
        app.disableUpgrades();
        address next = address(new NextApp());
        reverts("Upgrades are permanently disabled");
        app.upgradeToAndCall(next, "");
        app.addComposeHash(MR);
        vm.warp(block.timestamp + DAY);
        app.addComposeHash(MR);
        require(app.allowedComposeHashes(MR), "frozen by disableUpgrades");
    }

    function test_only_a_uups_implementation() external {
        AppConfig memory c = plainConfig();
        c.notice = 0;
        app = deployApp(startWith(c));
        vm.startPrank(OWNER);
        vm.expectRevert(abi.encodeWithSignature("ERC1967InvalidImplementation(address)", address(this)));
        app.upgradeToAndCall(address(this), "");
        DstackApp bare = new DstackApp();
        vm.expectRevert(abi.encodeWithSignature("UUPSUnauthorizedCallContext()"));
        bare.upgradeToAndCall(address(bare), "");
    }

    // Ownership.

    function test_owner_changes_in_two_steps() external {
        vm.prank(OWNER);
        app.transferOwnership(STRANGER);
        require(app.owner() == OWNER && app.pendingOwner() == STRANGER, "one step");
        revertsNotOwner(GUARDIAN);
        vm.prank(GUARDIAN);
        app.acceptOwnership();
        vm.prank(STRANGER);
        app.acceptOwnership();
        require(app.owner() == STRANGER, "no second step");
    }

    // Platforms.

    function test_required_platform() external {
        vm.startPrank(OWNER);
        app.setPlatformRequired(true);
        AppBootInfo memory b = boot(address(app));
        (bool ok, string memory reason) = app.isAppAllowed(b);
        denies(ok, reason, "TEE variant is unknown");
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        denies(ok, reason, "TEE variant is not allowed");
        app.addTeeVariant("dstack-tdx");
        app.addTcbStatus("UpToDate");
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        denies(ok, reason, "TEE variant is not allowed");
        vm.warp(block.timestamp + DAY);
        app.addTeeVariant("dstack-tdx");
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        denies(ok, reason, "TCB status is not allowed");
        app.addTcbStatus("UpToDate");
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        allows(ok, reason);
        require(app.allowedTeeVariants("dstack-tdx") && app.allowedTcbStatuses("UpToDate"), "getters");
        b.tcbStatus = "Revoked";
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        denies(ok, reason, "TCB status is not allowed");
        app.removeTeeVariant("dstack-tdx");
        (ok, reason) = app.isAppAllowedOn(b, "dstack-tdx");
        denies(ok, reason, "TEE variant is not allowed");
        app.removeTcbStatus("UpToDate");
        require(!app.allowedTcbStatuses("UpToDate"), "still there");
        app.setPlatformRequired(false);
        require(app.platformRequired(), "loosened at once");
        vm.warp(block.timestamp + DAY);
        app.setPlatformRequired(false);
        require(!app.platformRequired(), "not loosened when due");
    }

    function test_blocked_advisory() external {
        AppBootInfo memory b = boot(address(app));
        b.advisoryIds = new string[](2);
        b.advisoryIds[0] = "INTEL-SA-00960";
        b.advisoryIds[1] = "INTEL-SA-00982";
        (bool ok, string memory reason) = app.isAppAllowed(b);
        allows(ok, reason);
        vm.prank(GUARDIAN);
        app.blockAdvisory("INTEL-SA-00982");
        (ok, reason) = app.isAppAllowed(b);
        denies(ok, reason, "Advisory is not allowed");
        vm.prank(OWNER);
        app.unblockAdvisory("INTEL-SA-00982");
        require(app.blockedAdvisories("INTEL-SA-00982"), "unblocked at once");
        vm.warp(block.timestamp + DAY);
        app.unblockAdvisory("INTEL-SA-00982");
        (ok, reason) = app.isAppAllowed(b);
        allows(ok, reason);
    }

    // Key epochs.

    function test_key_epochs_only_rise() external {
        vm.startPrank(OWNER);
        vm.expectRevert(abi.encodeWithSelector(Governed.KeyEpochOutOfOrder.selector, 2, 0));
        app.setKeyEpoch(2);
        app.setKeyEpoch(1);
        app.setKeyEpoch(2);
        vm.expectRevert(abi.encodeWithSelector(Governed.KeyEpochOutOfOrder.selector, 2, 3));
        app.setOldestKeyEpoch(3);
        app.setOldestKeyEpoch(1);
        same(app.oldestKeyEpoch(), 0);
        vm.warp(block.timestamp + DAY);
        app.setOldestKeyEpoch(1);
        same(app.oldestKeyEpoch(), 1);
        same(app.keyEpoch(), 2);
        vm.expectRevert(abi.encodeWithSelector(Governed.KeyEpochOutOfOrder.selector, 2, 1));
        app.setOldestKeyEpoch(1);
    }
}
