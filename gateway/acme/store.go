// SPDX-License-Identifier: Apache-2.0

package acme

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path"

	"github.com/caddyserver/certmagic"

	"github.com/dstack-go/dstack/attest/strictjson"
	"github.com/dstack-go/dstack/internal/fault"
)

// Everything of ours lies below root, beside what CertMagic stores.
const root = "dstack"

// maxRecord is the longest record in bytes; two quotes with their event logs fit.
const maxRecord = 1 << 20

// errAbsent is that there is no such record.
var errAbsent = errors.New("there is no such record")

// load reads a record; errAbsent when there is none. Code acme_record.
func load(ctx context.Context, s certmagic.Storage, key string, into any) error {
	data, err := s.Load(ctx, key)
	if errors.Is(err, fs.ErrNotExist) {
		return errAbsent
	}
	if err != nil {
		return fault.Wrap(err, "acme_record", "reading %s", key)
	}
	if err := parseRecord(data, into); err != nil {
		return fault.Wrap(err, "acme_record", "the record %s does not parse, and is not replaced", key).
			WithFix("restore the record from a backup, or delete it knowingly")
	}
	return nil
}

func parseRecord(data []byte, into any) error {
	return strictjson.Decode(data, into, strictjson.Limits{Size: maxRecord, Depth: 8})
}

func store(ctx context.Context, s certmagic.Storage, key string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	if len(data) > maxRecord {
		return fault.New("acme_record", "the record %s has %d bytes, more than %d", key, len(data), maxRecord)
	}
	if err := s.Store(ctx, key, data); err != nil {
		return fault.Wrap(err, "acme_record", "writing %s", key)
	}
	return nil
}

// locked runs work while this node holds a lock of the cluster.
func locked(ctx context.Context, s certmagic.Storage, name string, work func() error) (err error) {
	if err := s.Lock(ctx, name); err != nil {
		return fault.Wrap(err, "acme_lock", "waiting for the lock %s", name)
	}
	// The end of the work's context must not leave the lock taken.
	defer func() { err = errors.Join(err, s.Unlock(context.WithoutCancel(ctx), name)) }()
	return work()
}

// safe makes a part of a key of a text.
func safe(part string) string { return certmagic.StorageKeys.Safe(part) }

func keyOf(parts ...string) string { return path.Join(append([]string{root}, parts...)...) }
