// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AppBootInfo, IAppAuth} from "../src/IAppAuth.sol";

/// What a foreign app keeps somewhere else.
contract ForeignList {
    mapping(bytes32 => bool) public allowed;

    function allow(bytes32 composeHash, bool yes) external {
        allowed[composeHash] = yes;
    }
}

/// An app of somebody else's code: what is allowed stands in another contract, and it can
/// be told to answer as no app should. The Go tests deploy it; nobody else does.
contract ForeignApp is IAppAuth {
    ForeignList private list = new ForeignList();
    uint256 private mood;
    uint256[1000] private many;

    function supportsInterface(bytes4 id) external pure returns (bool) {
        return id == 0x01ffc9a7 || id == type(IAppAuth).interfaceId;
    }

    function allow(bytes32 composeHash, bool yes) external {
        list.allow(composeHash, yes);
    }

    function behave(uint256 mood_) external {
        mood = mood_;
    }

    function isAppAllowed(AppBootInfo calldata bootInfo) external view returns (bool, string memory) {
        if (mood == 1) revert("no");
        if (mood == 2) while (true) {}
        if (mood == 3) {
            assembly ("memory-safe") {
                mstore(0, 7)
                return(0, 32)
            }
        }
        if (mood == 4) return (blockhash(block.number - 2) != 0, "");
        if (mood == 5) return (block.blobbasefee != 0, "");
        if (mood == 6) return (false, string(new bytes(3000)));
        if (mood == 7) {
            uint256 sum;
            for (uint256 i = 0; i < 600; ++i) {
                sum += many[i];
            }
            return (sum == 0, "");
        }
        if (mood == 8) {
            // What a block is, in words that can be compared.
            bytes32 is_ = keccak256(
                abi.encode(
                    blockhash(block.number - 1),
                    block.number,
                    block.timestamp,
                    block.chainid,
                    block.prevrandao,
                    block.coinbase,
                    block.gaslimit,
                    msg.sender,
                    tx.origin,
                    address(list).codehash,
                    address(list).code.length,
                    address(this).balance,
                    sha256("precompiled")
                )
            );
            return (false, string(abi.encodePacked(hex"22", hex"0a", _digits(is_))));
        }
        return list.allowed(bootInfo.composeHash) ? (true, "") : (false, "Not on the list");
    }

    function _digits(bytes32 word) private pure returns (bytes memory out) {
        out = new bytes(64);
        bytes16 digits = "0123456789abcdef";
        for (uint256 i = 0; i < 64; ++i) {
            out[i] = digits[uint256(word) >> (252 - 4 * i) & 15];
        }
    }
}
