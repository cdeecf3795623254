// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MultiSignerERC7913} from "@openzeppelin/contracts/utils/cryptography/signers/MultiSignerERC7913.sol";

/// An owner that is m of n people: calls that enough of them signed.
///
/// The signatures and the list of signers are OpenZeppelin's MultiSignerERC7913; here
/// is only what they sign: EIP-712 over the calls, a nonce and a deadline, with the
/// chain and this contract in the domain. Signers need no gas, whoever has enough
/// signatures submits them. The council changes itself by calls to itself.
contract Council is MultiSignerERC7913, EIP712 {
    struct Call {
        address target;
        bytes data;
    }

    bytes32 private constant CALL_TYPE = keccak256("Call(address target,bytes data)");
    bytes32 private constant EXECUTE_TYPE =
        keccak256("Execute(Call[] calls,uint256 nonce,uint256 deadline)Call(address target,bytes data)");

    /// Of the next execution.
    uint256 public nonce;

    event Executed(uint256 indexed nonce, address indexed submitter);

    error Expired(uint256 deadline);
    error NotEnoughSignatures();
    error OnlyCouncil(address account);
    error EmptyTarget(address target);

    modifier onlyCouncil() {
        require(msg.sender == address(this), OnlyCouncil(msg.sender));
        _;
    }

    constructor(bytes[] memory signers, uint64 threshold_)
        MultiSignerERC7913(signers, threshold_)
        EIP712("dstack council", "1")
    {}

    /// Makes the calls in order, all or none. `signatures` is
    /// abi.encode(bytes[] signers, bytes[] signatures), in the order of keccak256(signer).
    function execute(Call[] calldata calls, uint256 deadline, bytes calldata signatures) external {
        require(block.timestamp <= deadline, Expired(deadline));
        uint256 used = nonce;
        require(_rawSignatureValidation(digest(calls, used, deadline), signatures), NotEnoughSignatures());
        nonce = used + 1;
        emit Executed(used, msg.sender);
        for (uint256 i = 0; i < calls.length; ++i) {
            // A call to nothing succeeds and does nothing: the council meant something.
            require(calls[i].target.code.length != 0, EmptyTarget(calls[i].target));
            (bool ok, bytes memory result) = calls[i].target.call(calls[i].data);
            if (!ok) {
                assembly ("memory-safe") {
                    revert(add(result, 32), mload(result))
                }
            }
        }
    }

    /// What the members sign.
    function digest(Call[] calldata calls, uint256 nonce_, uint256 deadline) public view returns (bytes32) {
        bytes32[] memory hashes = new bytes32[](calls.length);
        for (uint256 i = 0; i < calls.length; ++i) {
            hashes[i] = keccak256(abi.encode(CALL_TYPE, calls[i].target, keccak256(calls[i].data)));
        }
        return
            _hashTypedDataV4(keccak256(abi.encode(EXECUTE_TYPE, keccak256(abi.encodePacked(hashes)), nonce_, deadline)));
    }

    function setMembers(bytes[] calldata remove, bytes[] calldata add, uint64 threshold_) external onlyCouncil {
        _addSigners(add);
        // The threshold first, which the removal is checked against.
        _setThreshold(threshold_);
        _removeSigners(remove);
    }
}
