// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Council} from "../src/Council.sol";
import {DstackApp} from "../src/DstackApp.sol";
import {Notice} from "../src/Notice.sol";
import {Base} from "./Base.sol";

/// 2 of 3 own an app.
contract CouncilTest is Base {
    Council internal council;
    DstackApp internal app;
    uint256[] internal keys;

    function setUp() public override {
        super.setUp();
        keys = [uint256(11), 22, 33];
        bytes[] memory signers = new bytes[](3);
        for (uint256 i = 0; i < 3; ++i) {
            signers[i] = abi.encodePacked(vm.addr(keys[i]));
        }
        council = new Council(signers, 2);
        app = deployApp(startWith(plainConfig()));
        vm.prank(OWNER);
        app.transferOwnership(address(council));
        council.execute(
            one(abi.encodeCall(app.acceptOwnership, ())),
            later(),
            signed2(abi.encodeCall(app.acceptOwnership, ()), 11, 22)
        );
        require(app.owner() == address(council), "not the council's");
    }

    function later() internal view returns (uint256) {
        return block.timestamp + 1 hours;
    }

    function one(bytes memory data) internal view returns (Council.Call[] memory calls) {
        calls = new Council.Call[](1);
        calls[0] = Council.Call(address(app), data);
    }

    function signed(bytes32 digest, uint256[] memory by) internal returns (bytes memory) {
        // In the order of the hashes of the signers.
        for (uint256 i = 0; i < by.length; ++i) {
            for (uint256 j = i + 1; j < by.length; ++j) {
                if (keccak256(abi.encodePacked(vm.addr(by[i]))) > keccak256(abi.encodePacked(vm.addr(by[j])))) {
                    (by[i], by[j]) = (by[j], by[i]);
                }
            }
        }
        bytes[] memory signers = new bytes[](by.length);
        bytes[] memory signatures = new bytes[](by.length);
        for (uint256 i = 0; i < by.length; ++i) {
            (uint8 v, bytes32 r, bytes32 s) = vm.sign(by[i], digest);
            signers[i] = abi.encodePacked(vm.addr(by[i]));
            signatures[i] = abi.encodePacked(r, s, v);
        }
        return abi.encode(signers, signatures);
    }

    function signed2(bytes memory data, uint256 a, uint256 b) internal returns (bytes memory) {
        uint256[] memory by = new uint256[](2);
        (by[0], by[1]) = (a, b);
        return signed(council.digest(one(data), council.nonce(), later()), by);
    }

    function refuses(bytes memory data, bytes memory signatures, string memory why) internal {
        bytes memory call = abi.encodeCall(council.execute, (one(data), later(), signatures));
        (bool ok, bytes memory reason) = address(council).call(call);
        require(!ok && bytes4(reason) == Council.NotEnoughSignatures.selector, why);
    }

    function test_Threat_G06_one_stolen_key_changes_nothing() external {
        bytes memory data = abi.encodeCall(app.removeComposeHash, (COMPOSE));
        uint256[] memory single = new uint256[](1);
        single[0] = 11;
        bytes32 digest = council.digest(one(data), council.nonce(), later());
        refuses(data, signed(digest, single), "one of two");
        refuses(data, signed2(data, 11, 11), "one twice");
        refuses(data, signed2(data, 11, 44), "one and a stranger");
        refuses(data, "", "none");
        refuses(data, hex"01", "no signatures at all");
        refuses(abi.encodeCall(app.freeze, ()), signed2(data, 11, 22), "another call");
        require(app.allowedComposeHashes(COMPOSE), "changed");
        council.execute(one(data), later(), signed2(data, 33, 11));
        require(!app.allowedComposeHashes(COMPOSE), "two of three are enough");
    }

    function test_signatures_count_once() external {
        bytes memory data = abi.encodeCall(app.addComposeHash, (MR));
        bytes memory signatures = signed2(data, 11, 22);
        council.execute(one(data), later(), signatures);
        refuses(data, signatures, "replay");
        // The council's addition waits as every owner's does, and then is anybody's to make.
        require(!app.allowedComposeHashes(MR), "no notice");
        vm.warp(block.timestamp + DAY);
        app.addComposeHash(MR);
        require(app.allowedComposeHashes(MR), "not made when due");
    }

    function test_signatures_expire() external {
        bytes memory data = abi.encodeCall(app.freeze, ());
        bytes memory signatures = signed2(data, 11, 22);
        uint256 deadline = later();
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(Council.Expired.selector, deadline));
        council.execute(one(data), deadline, signatures);
    }

    function test_signatures_are_for_one_council() external {
        bytes[] memory signers = new bytes[](3);
        for (uint256 i = 0; i < 3; ++i) {
            signers[i] = abi.encodePacked(vm.addr(keys[i]));
        }
        Council other = new Council(signers, 2);
        bytes memory data = abi.encodeCall(app.removeComposeHash, (COMPOSE));
        bytes memory signatures = signed2(data, 11, 22);
        Council.Call[] memory calls = one(data);
        uint256 deadline = later();
        while (other.nonce() != council.nonce()) {
            Council.Call[] memory none = new Council.Call[](0);
            uint256[] memory by = new uint256[](2);
            (by[0], by[1]) = (11, 22);
            other.execute(none, deadline, signed(other.digest(none, other.nonce(), deadline), by));
        }
        vm.expectRevert(abi.encodeWithSelector(Council.NotEnoughSignatures.selector));
        other.execute(calls, deadline, signatures);
    }

    function test_all_calls_or_none() external {
        Council.Call[] memory calls = new Council.Call[](2);
        calls[0] = Council.Call(address(app), abi.encodeCall(app.removeComposeHash, (COMPOSE)));
        calls[1] = Council.Call(address(app), abi.encodeCall(app.addDevice, (0)));
        uint256[] memory by = new uint256[](2);
        (by[0], by[1]) = (11, 22);
        bytes memory signatures = signed(council.digest(calls, council.nonce(), later()), by);
        uint256 deadline = later();
        revertsWith(Notice.ZeroValue.selector);
        council.execute(calls, deadline, signatures);
        require(app.allowedComposeHashes(COMPOSE), "half was done");
        calls[1].target = STRANGER;
        signatures = signed(council.digest(calls, council.nonce(), deadline), by);
        vm.expectRevert(abi.encodeWithSelector(Council.EmptyTarget.selector, STRANGER));
        council.execute(calls, deadline, signatures);
    }

    function test_council_changes_itself_only() external {
        bytes[] memory none = new bytes[](0);
        bytes[] memory remove = new bytes[](1);
        remove[0] = abi.encodePacked(vm.addr(33));
        bytes[] memory add = new bytes[](1);
        add[0] = abi.encodePacked(vm.addr(44));
        vm.expectRevert(abi.encodeWithSelector(Council.OnlyCouncil.selector, address(this)));
        council.setMembers(none, add, 1);

        Council.Call[] memory calls = new Council.Call[](1);
        calls[0] = Council.Call(address(council), abi.encodeCall(council.setMembers, (remove, add, 3)));
        uint256[] memory by = new uint256[](2);
        (by[0], by[1]) = (11, 22);
        bytes memory signatures = signed(council.digest(calls, council.nonce(), later()), by);
        council.execute(calls, later(), signatures);
        require(council.threshold() == 3 && !council.isSigner(remove[0]) && council.isSigner(add[0]), "members");
        bytes memory data = abi.encodeCall(app.freeze, ());
        refuses(data, signed2(data, 11, 22), "two of three, of which three are needed");

        // A threshold that nobody can reach is no threshold.
        calls[0] = Council.Call(address(council), abi.encodeCall(council.setMembers, (none, none, 4)));
        by = new uint256[](3);
        (by[0], by[1], by[2]) = (11, 22, 44);
        signatures = signed(council.digest(calls, council.nonce(), later()), by);
        uint256 deadline = later();
        vm.expectRevert(abi.encodeWithSignature("MultiSignerERC7913UnreachableThreshold(uint64,uint64)", 3, 4));
        council.execute(calls, deadline, signatures);
    }
}
