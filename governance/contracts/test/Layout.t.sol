// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {DstackApp} from "../src/DstackApp.sol";
import {DstackKms} from "../src/DstackKms.sol";
import {Governed} from "../src/Governed.sol";
import {Notice} from "../src/Notice.sol";

/// The namespaces' members as state variables, since the compiler tells the layout of
/// nothing else. Its layout is committed and compared.
contract Namespaces {
    Notice.NoticeStorage internal noticeStorage;
    Governed.GovernedStorage internal governedStorage;
    DstackApp.AppStorage internal appStorage;
    DstackKms.KmsStorage internal kmsStorage;
}

contract AppSlots is DstackApp {
    function slots() external pure returns (bytes32, bytes32, bytes32) {
        return (NOTICE_STORAGE, GOVERNED_STORAGE, APP_STORAGE);
    }
}

contract KmsSlots is DstackKms {
    function slot() external pure returns (bytes32) {
        return KMS_STORAGE;
    }
}

contract LayoutTest {
    function namespace(string memory id) private pure returns (bytes32) {
        return keccak256(abi.encode(uint256(keccak256(bytes(id))) - 1)) & ~bytes32(uint256(0xff));
    }

    function test_namespaces_lie_where_their_names_say() external {
        (bytes32 notice, bytes32 governed, bytes32 app) = new AppSlots().slots();
        require(notice == namespace("dstack.storage.Notice"), "notice");
        require(governed == namespace("dstack.storage.Governed"), "governed");
        require(app == namespace("dstack.storage.App"), "app");
        require(new KmsSlots().slot() == namespace("dstack.storage.Kms"), "kms");
    }
}
