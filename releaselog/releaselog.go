// SPDX-License-Identifier: Apache-2.0

// Package releaselog is the append-only log of what a KMS gave and refused: a Merkle
// tree (RFC 6962) of entries, whose signed heads travel in the KMS's replies.
//
// Who remembers a head ([Memory]) can demand that every later one continues it; two
// heads that do not are proof, signed by the KMS's own root, that it showed
// different logs to different people. A KMS whose log is lost or damaged gives
// nothing: [Open] refuses (threats.md G10).
//
// Implements design.md §7; RFC 6962 §2.1; C2SP tlog-checkpoint and signed-note.
package releaselog
