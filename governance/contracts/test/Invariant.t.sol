// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AppBootInfo} from "../src/IAppAuth.sol";
import {DstackApp} from "../src/DstackApp.sol";
import {DstackKms} from "../src/DstackKms.sol";
import {Base, Vm} from "./Base.sol";

/// Owner, guardian and a stranger do anything in any order. The model beside the
/// contract is the specification of isAppAllowed: what was announced, when, and what
/// was revoked.
contract Actors is Base {
    DstackApp public app;
    bytes32 public constant DEVICES = keccak256("device");

    // Few values, so that actions meet.
    uint256 public constant VALUES = 4;

    struct Model {
        bool allowed;
        bool pending;
        uint64 due;
    }

    mapping(bytes32 policy => mapping(bytes32 value => Model)) public model;
    uint64 public notice;
    uint64 public noticeDue;
    bool public noticePending;
    bool public frozen;

    // Upstream's log replayed.
    mapping(bytes32 policy => mapping(bytes32 value => bool)) public replayed;

    // What went another way than in the model.
    string public broken;

    constructor() {
        vm.warp(1_800_000_000);
        app = deployApp(startWith(plainConfig()));
        model[COMPOSE_HASH][COMPOSE].allowed = true;
        model[DEVICES][DEVICE].allowed = true;
        replayed[COMPOSE_HASH][COMPOSE] = true;
        replayed[DEVICES][DEVICE] = true;
        notice = DAY;
    }

    /// Would set the clock back.
    function setUp() public override {}

    function value(uint256 seed) public pure returns (bytes32) {
        return bytes32((seed % VALUES) * 0x11 + 0x11);
    }

    function who(uint256 seed) internal pure returns (address) {
        return seed % 4 == 0 ? STRANGER : seed % 4 == 1 ? GUARDIAN : OWNER;
    }

    function add(uint256 actor, uint256 kind, uint256 seed) external {
        bytes32 policy = kind % 2 == 0 ? COMPOSE_HASH : DEVICES;
        bytes32 v = value(seed);
        Model storage m = model[policy][v];
        bool due = m.pending && block.timestamp >= m.due && block.timestamp <= m.due + app.LAPSE();
        bool waits = m.pending && block.timestamp < m.due;
        bool want = !frozen && (due || (who(actor) == OWNER && !waits));
        bool ok = act(
            who(actor),
            policy == COMPOSE_HASH ? abi.encodeCall(app.addComposeHash, (v)) : abi.encodeCall(app.addDevice, (v))
        );
        if (ok != want) broken = "an addition passed or failed otherwise";
        if (!ok) return;
        if (due || notice == 0) {
            m.allowed = true;
            m.pending = false;
        } else {
            m.pending = true;
            m.due = uint64(block.timestamp) + notice;
        }
    }

    function remove(uint256 actor, uint256 kind, uint256 seed) external {
        bytes32 policy = kind % 2 == 0 ? COMPOSE_HASH : DEVICES;
        bytes32 v = value(seed);
        bool ok = act(
            who(actor),
            policy == COMPOSE_HASH ? abi.encodeCall(app.removeComposeHash, (v)) : abi.encodeCall(app.removeDevice, (v))
        );
        if (ok != (who(actor) != STRANGER)) broken = "a revocation passed or failed otherwise";
        if (ok) delete model[policy][v];
    }

    function setNotice(uint256 actor, bool more) external {
        uint64 want = more ? 2 * DAY : 0;
        bool ok = act(who(actor), abi.encodeCall(app.setNotice, (want)));
        if (!ok) return;
        if (want >= notice) {
            if (who(actor) != OWNER) broken = "not the owner's notice";
            notice = want;
        } else if (noticePending && block.timestamp >= noticeDue && block.timestamp <= noticeDue + app.LAPSE()) {
            notice = want;
            noticePending = false;
        } else {
            if (who(actor) != OWNER) broken = "not the owner's announcement";
            noticePending = true;
            noticeDue = uint64(block.timestamp) + notice;
        }
    }

    function wait(uint256 seconds_) external {
        vm.warp(block.timestamp + seconds_ % (3 days));
    }

    function waitLong(uint256 seed) external {
        if (seed % 8 == 0) vm.warp(block.timestamp + 20 days);
    }

    function freeze(uint256 actor, uint256 seed) external {
        if (seed % 16 != 0) return;
        if (act(who(actor), abi.encodeCall(app.freeze, ()))) frozen = true;
    }

    /// Nobody becomes owner, and no code changes, by these.
    function meddle(uint256 seed) external {
        address sender = seed % 2 == 0 ? STRANGER : GUARDIAN;
        bool any = act(sender, abi.encodeCall(app.transferOwnership, (sender)))
            || act(sender, abi.encodeCall(app.acceptOwnership, ()))
            || act(sender, abi.encodeCall(app.upgradeToAndCall, (address(app), "")))
            || act(sender, abi.encodeCall(app.setGuardian, (sender))) || act(sender, startWith(plainConfig()));
        if (any) broken = "meddled";
    }

    function act(address sender, bytes memory call) private returns (bool ok) {
        vm.recordLogs();
        vm.prank(sender);
        (ok,) = address(app).call(call);
        Vm.Log[] memory logs = vm.getRecordedLogs();
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].topics[0] != keccak256("PolicyChanged(address,bytes32,bytes32,bool)")) continue;
            replayed[logs[i].topics[2]][logs[i].topics[3]] = abi.decode(logs[i].data, (bool));
        }
    }
}

contract InvariantTest is Base {
    Actors internal actors;
    DstackApp internal app;

    function setUp() public override {
        actors = new Actors();
        app = actors.app();
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(actors);
    }

    function invariant_storage_is_the_model_and_the_replayed_log() external view {
        bytes32 devices = actors.DEVICES();
        for (uint256 i = 0; i < actors.VALUES(); ++i) {
            bytes32 v = actors.value(i);
            (bool allowed,,) = actors.model(COMPOSE_HASH, v);
            require(app.allowedComposeHashes(v) == allowed, "compose hash is not the model's");
            require(actors.replayed(COMPOSE_HASH, v) == allowed, "compose hash is not the log's");
            (allowed,,) = actors.model(devices, v);
            require(app.allowedDeviceIds(v) == allowed, "device is not the model's");
            require(actors.replayed(devices, v) == allowed, "device is not the log's");
        }
        require(app.notice() == actors.notice(), "notice is not the model's");
        require(app.frozen() == actors.frozen(), "frozen is not the model's");
    }

    function invariant_every_call_went_as_the_model_says() external view {
        require(bytes(actors.broken()).length == 0, actors.broken());
    }

    function invariant_owner_and_guardian_stay() external view {
        require(app.owner() == OWNER && app.guardian() == GUARDIAN && app.pendingOwner() == address(0), "changed");
    }

    function invariant_decision_is_the_lists() external view {
        for (uint256 i = 0; i < actors.VALUES(); ++i) {
            for (uint256 j = 0; j < actors.VALUES(); ++j) {
                (bool c,,) = actors.model(COMPOSE_HASH, actors.value(i));
                (bool d,,) = actors.model(actors.DEVICES(), actors.value(j));
                (bool ok,) = app.isAppAllowed(info(actors.value(i), actors.value(j)));
                require(ok == (c && d), "decided otherwise");
            }
        }
    }

    function info(bytes32 compose, bytes32 device) private view returns (AppBootInfo memory b) {
        b = boot(address(app));
        (b.composeHash, b.deviceId) = (compose, device);
    }
}

/// The same for the registry: whatever order the calls come in, a KMS is only what was
/// announced a notice ago and not revoked since, and images do not become newer.
contract RegistryActors is Base {
    DstackKms public kms;
    uint256 public constant VALUES = 4;
    uint64 public constant NOTICE = 2 days;

    mapping(uint256 list => mapping(bytes32 value => uint64)) public announcedAt;
    mapping(uint256 list => mapping(bytes32 value => bool)) public replayed;
    mapping(bytes32 value => uint64) public epochs;
    uint64 public minEpoch;
    string public broken;

    constructor() {
        vm.warp(1_800_000_000);
        kms = deployKms(address(0));
        vm.prank(OWNER);
        kms.setGuardian(GUARDIAN);
        vm.prank(OWNER);
        kms.setNotice(NOTICE);
    }

    function setUp() public override {}

    function value(uint256 seed) public pure returns (bytes32) {
        return bytes32(seed % VALUES + 1);
    }

    function holds(uint256 list, bytes32 v) public view returns (bool) {
        return
            list == 0 ? kms.kmsAllowedAggregatedMrs(v) : list == 1 ? kms.kmsAllowedDeviceIds(v) : kms.allowedOsImages(v);
    }

    function add(uint256 actor, uint256 list, uint256 seed, uint64 epoch) external {
        (list, epoch) = (list % 3, epoch % 3);
        bytes32 v = value(seed);
        bool before = holds(list, v);
        uint64 epochBefore = kms.osImageEpoch(v);
        bool ok = act(
            actor,
            list == 0
                ? abi.encodeCall(kms.addKmsAggregatedMr, (v))
                : list == 1 ? abi.encodeCall(kms.addKmsDevice, (v)) : abi.encodeCall(kms.addOsImage, (v, epoch))
        );
        if (before && kms.osImageEpoch(v) != epochBefore) broken = "a listed image became newer";
        if (!ok) return;
        if (!before && holds(list, v)) {
            if (announcedAt[list][v] == 0 || block.timestamp < announcedAt[list][v] + NOTICE) broken = "no notice";
            if (list == 2 && epochs[v] != kms.osImageEpoch(v)) broken = "another epoch than was announced";
            return;
        }
        if (actor % 3 != 0) {
            if (!before) broken = "announced by another than the owner";
        }
        announcedAt[list][v] = uint64(block.timestamp);
        if (list == 2) epochs[v] = epoch;
    }

    function remove(uint256 actor, uint256 list, uint256 seed) external {
        list = list % 3;
        bytes32 v = value(seed);
        bool ok = act(
            actor,
            list == 0
                ? abi.encodeCall(kms.removeKmsAggregatedMr, (v))
                : list == 1 ? abi.encodeCall(kms.removeKmsDevice, (v)) : abi.encodeCall(kms.removeOsImageHash, (v))
        );
        if (ok != (actor % 3 != 1)) broken = "a revocation passed or failed otherwise";
        if (!ok) return;
        if (holds(list, v)) broken = "not revoked";
        announcedAt[list][v] = 0;
    }

    function raise(uint256 actor, uint256 seed) external {
        if (seed % 8 != 0 || minEpoch == 2) return;
        if (act(actor, abi.encodeCall(kms.setMinOsEpoch, (minEpoch + 1)))) {
            if (actor % 3 != 0) broken = "not the owner's epoch";
            minEpoch += 1;
        }
    }

    function wait(uint256 seconds_) external {
        vm.warp(block.timestamp + seconds_ % (4 days));
    }

    function act(uint256 actor, bytes memory call) private returns (bool ok) {
        vm.recordLogs();
        vm.prank(actor % 3 == 0 ? OWNER : actor % 3 == 1 ? STRANGER : GUARDIAN);
        (ok,) = address(kms).call(call);
        Vm.Log[] memory logs = vm.getRecordedLogs();
        bytes32[3] memory policies = [keccak256("kms-aggregated-mr"), keccak256("kms-device"), keccak256("os-image")];
        for (uint256 i = 0; i < logs.length; ++i) {
            if (logs[i].topics[0] != keccak256("PolicyChanged(address,bytes32,bytes32,bool)")) continue;
            for (uint256 list = 0; list < 3; ++list) {
                if (logs[i].topics[2] != policies[list]) continue;
                replayed[list][logs[i].topics[3]] = abi.decode(logs[i].data, (bool));
            }
        }
    }
}

contract RegistryInvariantTest is Base {
    RegistryActors internal actors;
    DstackKms internal kms;

    function setUp() public override {
        actors = new RegistryActors();
        kms = actors.kms();
    }

    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(actors);
    }

    function invariant_every_call_went_as_the_model_says() external view {
        require(bytes(actors.broken()).length == 0, actors.broken());
    }

    function invariant_storage_is_the_replayed_log() external view {
        for (uint256 list = 0; list < 3; ++list) {
            for (uint256 i = 0; i < actors.VALUES(); ++i) {
                bytes32 v = actors.value(i);
                require(actors.holds(list, v) == actors.replayed(list, v), "not the log's");
            }
        }
    }

    function invariant_a_kms_is_only_what_is_listed_and_new_enough() external view {
        AppBootInfo memory b;
        b.tcbStatus = "UpToDate";
        for (uint256 i = 0; i < actors.VALUES(); ++i) {
            bytes32 v = actors.value(i);
            (b.mrAggregated, b.deviceId, b.osImageHash) = (v, v, v);
            (bool ok,) = kms.isKmsAllowed(b);
            bool want = actors.holds(0, v) && actors.holds(1, v) && actors.holds(2, v)
                && kms.osImageEpoch(v) >= actors.minEpoch();
            require(ok == want, "decided otherwise");
        }
    }
}
