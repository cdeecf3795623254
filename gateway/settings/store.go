// SPDX-License-Identifier: Apache-2.0

// Package settings is what operators decide for a gateway, and all gateways of a cluster
// share: records of strict JSON in a store that the cluster agrees on.
//
// A record that does not parse is an error to whoever needs it, and never a default: no
// corrupt record makes a gateway ask another authority, or open a port (threats.md K02).
//
// Trusted: the members of the cluster, each of which can write every record.
//
// Implements spec/gateway.md §1.2 and §5.5 D and E.
package settings

import "context"

// Any is the revision that every record is at.
const Any = -1

// Entry is one record as stored.
type Entry struct {
	Key      string
	Value    []byte
	Revision int64 // from 1; it grows with each change
}

// Store keeps records. Reading gives what this node has, with or without a quorum;
// writing needs one and is linearizable.
type Store interface {
	// Get returns a record; an error that is fs.ErrNotExist when there is none.
	Get(ctx context.Context, key string) (Entry, error)
	// List returns the records whose keys begin with prefix, by key.
	List(ctx context.Context, prefix string) ([]Entry, error)
	// Put writes a record that is still at the revision: 0 is that there is none, Any
	// whatever there is. Codes state_conflict, state_quorum.
	Put(ctx context.Context, key string, value []byte, at int64) error
	// Delete removes a record that is still at the revision. Codes as Put's; an error that
	// is fs.ErrNotExist when there is none.
	Delete(ctx context.Context, key string, at int64) error
	// Watch calls changed after records below prefix changed, until ctx ends, and once at
	// the start.
	Watch(ctx context.Context, prefix string, changed func())
}
