// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Ownable2StepUpgradeable} from "@openzeppelin/contracts-upgradeable/access/Ownable2StepUpgradeable.sol";

/// Changes that give somebody more are announced in public and take effect no sooner
/// than `notice` seconds later; changes that take away are immediate (threats.md G06).
///
/// A change is named by a policy and a value. A setter of more is called twice: the
/// owner's call announces the change, and a call after `effectiveAt` makes it. The
/// second call is anybody's, so that the owners of an m-of-n contract sign once.
/// Without notice the owner's first call makes the change. An announcement that nobody
/// used for `LAPSE` after its time is void.
///
/// Revocations are the owner's or the guardian's. A revocation also cancels what was
/// announced. The guardian can do nothing else, and cannot cancel its replacement.
abstract contract Notice is Ownable2StepUpgradeable {
    /// One entry per change: pending from announcement to effect, and afterwards the
    /// record of how much notice was given.
    struct Change {
        uint64 announcedAt;
        uint64 effectiveAt;
        bool pending;
    }

    /// @custom:storage-location erc7201:dstack.storage.Notice
    struct NoticeStorage {
        uint64 notice;
        address guardian;
        mapping(bytes32 policy => mapping(bytes32 value => Change)) changes;
    }

    // keccak256(abi.encode(uint256(keccak256("dstack.storage.Notice")) - 1)) & ~bytes32(uint256(0xff))
    bytes32 internal constant NOTICE_STORAGE = 0x128f6e97751ce910949346a3d2d569e9aa1d886d1d01a3ae888f050103f79d00;

    uint64 public constant MAX_NOTICE = 365 days;
    uint64 public constant LAPSE = 14 days;

    bytes32 internal constant POLICY_NOTICE = keccak256("notice");
    bytes32 internal constant POLICY_GUARDIAN = keccak256("guardian");
    bytes32 internal constant POLICY_UPGRADE = keccak256("implementation-upgrade");

    /// Upstream's log of policy: replaying it gives what the contract holds.
    event PolicyChanged(address indexed actor, bytes32 indexed policy, bytes32 indexed value, bool enabled);
    event ChangeAnnounced(address indexed actor, bytes32 indexed policy, bytes32 indexed value, uint64 effectiveAt);
    event ChangeCancelled(address indexed actor, bytes32 indexed policy, bytes32 indexed value);
    event NoticeSet(uint64 notice);
    event GuardianSet(address guardian);

    error NoticeNotOver(uint64 effectiveAt);
    error NoticeTooLong(uint64 notice);
    error NotRevoker(address account);
    error NothingAnnounced(bytes32 policy, bytes32 value);
    error ZeroValue();

    /// The owner or the guardian.
    modifier onlyRevoker() {
        _checkRevoker();
        _;
    }

    function notice() public view returns (uint64) {
        return _noticeStorage().notice;
    }

    function guardian() public view returns (address) {
        return _noticeStorage().guardian;
    }

    /// The change's announcement, or the record of it once it took effect; zeros when
    /// there was none or when it was revoked.
    function change(bytes32 policy, bytes32 value)
        external
        view
        returns (uint64 announcedAt, uint64 effectiveAt, bool pending)
    {
        Change storage c = _noticeStorage().changes[policy][value];
        return (c.announcedAt, c.effectiveAt, c.pending);
    }

    /// More notice holds at once, for what is announced from then on; less is a change
    /// that takes the notice that it ends.
    function setNotice(uint64 seconds_) external {
        NoticeStorage storage $ = _noticeStorage();
        require(seconds_ <= MAX_NOTICE, NoticeTooLong(seconds_));
        if (seconds_ >= $.notice) {
            _checkOwner();
        } else if (!_allowed(POLICY_NOTICE, bytes32(uint256(seconds_)))) {
            return;
        }
        $.notice = seconds_;
        emit NoticeSet(seconds_);
        emit PolicyChanged(_msgSender(), POLICY_NOTICE, bytes32(uint256(seconds_)), true);
    }

    /// The first guardian is there at once. Replacing one takes notice, or whoever stole
    /// the owner's key would begin with the guardian.
    function setGuardian(address account) external {
        NoticeStorage storage $ = _noticeStorage();
        bytes32 value = bytes32(uint256(uint160(account)));
        if ($.guardian == address(0)) {
            _checkOwner();
        } else if (!_allowed(POLICY_GUARDIAN, value)) {
            return;
        }
        $.guardian = account;
        emit GuardianSet(account);
        emit PolicyChanged(_msgSender(), POLICY_GUARDIAN, value, true);
    }

    /// Withdraws an announcement.
    function cancel(bytes32 policy, bytes32 value) external {
        if (policy == POLICY_GUARDIAN) _checkOwner();
        else _checkRevoker();
        require(_noticeStorage().changes[policy][value].pending, NothingAnnounced(policy, value));
        _forget(policy, value);
    }

    /// Reports whether a change that gives more takes effect in this call. If not, the
    /// call has announced it and must change nothing.
    function _allowed(bytes32 policy, bytes32 value) internal returns (bool) {
        _beforeAllowing();
        NoticeStorage storage $ = _noticeStorage();
        Change storage c = $.changes[policy][value];
        // Upper and lower bound: neither an early nor a forgotten announcement counts.
        if (c.pending && block.timestamp >= c.effectiveAt && block.timestamp <= c.effectiveAt + LAPSE) {
            c.pending = false;
            return true;
        }
        _checkOwner();
        require(!c.pending || block.timestamp > c.effectiveAt, NoticeNotOver(c.effectiveAt));
        uint64 since = uint64(block.timestamp);
        uint64 wait = $.notice;
        $.changes[policy][value] = Change(since, since + wait, wait != 0);
        if (wait == 0) return true;
        emit ChangeAnnounced(_msgSender(), policy, value, since + wait);
        return false;
    }

    /// Forgets a change and so withdraws its announcement: called by every revocation,
    /// or what was taken away could be brought back by anybody.
    function _forget(bytes32 policy, bytes32 value) internal {
        NoticeStorage storage $ = _noticeStorage();
        if ($.changes[policy][value].pending) emit ChangeCancelled(_msgSender(), policy, value);
        delete $.changes[policy][value];
    }

    /// Whether the announcement of a change still waits or is due.
    function _pending(bytes32 policy, bytes32 value) internal view returns (bool) {
        Change storage c = _noticeStorage().changes[policy][value];
        return c.pending && block.timestamp <= c.effectiveAt + LAPSE;
    }

    /// Records what an initialiser allows: it was there from the start.
    function _allowedFromStart(bytes32 policy, bytes32 value) internal {
        uint64 since = uint64(block.timestamp);
        _noticeStorage().changes[policy][value] = Change(since, since, false);
    }

    /// Reverts where nothing more may be given.
    function _beforeAllowing() internal view virtual {}

    function _setFirstNotice(uint64 seconds_, address guardian_) internal {
        require(seconds_ <= MAX_NOTICE, NoticeTooLong(seconds_));
        NoticeStorage storage $ = _noticeStorage();
        $.notice = seconds_;
        emit NoticeSet(seconds_);
        emit PolicyChanged(_msgSender(), POLICY_NOTICE, bytes32(uint256(seconds_)), true);
        if (guardian_ == address(0)) return;
        $.guardian = guardian_;
        emit GuardianSet(guardian_);
        emit PolicyChanged(_msgSender(), POLICY_GUARDIAN, bytes32(uint256(uint160(guardian_))), true);
    }

    function _checkRevoker() internal view {
        address sender = _msgSender();
        require(sender == owner() || sender == _noticeStorage().guardian, NotRevoker(sender));
    }

    function _noticeStorage() private pure returns (NoticeStorage storage $) {
        bytes32 slot = NOTICE_STORAGE;
        assembly ("memory-safe") {
            $.slot := slot
        }
    }
}
