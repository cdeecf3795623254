// SPDX-License-Identifier: Apache-2.0

// Package releaselog is the append-only log of what a KMS gave and refused: a Merkle
// tree (RFC 6962) of entries, whose signed heads travel in the KMS's replies.
//
// Who remembers a head ([Memory]) can demand that every later one continues it; two
// heads that do not are proof, signed by the KMS's own root, that it showed
// different logs to different people. A KMS whose log is lost or damaged gives
// nothing: [Open] refuses (threats.md G10).
//
// # Guarantees
//
// When [Log.Append] returns a [Receipt], entry and head are on the disk. An error
// gives no receipt, and nothing to hand out a key with; its entry may be in the log
// all the same, so the log tells of everything given and perhaps of a little more.
// After one failed write or fsync every Append fails until the log is opened anew.
//
// # On the disk
//
// A log is a directory of three files. entries.jsonl holds one entry a line, in
// order. head.json is the newest signed head, replaced only once the entries that it
// covers are synced; whatever lies beyond it was never acknowledged. log.key is the
// seed of the log's Ed25519 key, mode 0600. Open reads and hashes all of it. In
// memory are the hashes of whole tiles of 256 entries and above, and where each tile
// begins: 0.3 MB per million entries; the rest is read again when a proof needs it.
//
// # Trust
//
// Trusted: the root CA key, which vouches for the log's key, and who runs the KMS's
// code. The files are checked against each other, which finds damage and loss; that
// all of them are an older copy only someone who remembers can tell. Heads, proofs
// and entries that come over the network are the attacker's until their signatures
// and proofs hold: a [Head] exists only verified.
//
// Implements design.md §7; RFC 6962 §2.1; C2SP tlog-checkpoint and signed-note.
package releaselog
