// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/vault/sdk/logical"
)

// entries keeps the storage entries of one kind (configs, or roles) and holds
// each that was read in memory, so that serving a cached token touches no
// storage. What is held changes with this node's own writes, and is forgotten
// when Vault says that another node wrote (logical.Backend.InvalidateKey).
//
// Held entries are shared and must not be changed.
type entries[T any] struct {
	prefix string         // of the storage keys, with a trailing slash
	seq    *atomic.Uint64 // one sequence for all kinds of a mount

	// writing lets one writer at a time load, change and save an entry. Only
	// writers take it, so that it may be held across storage I/O.
	writing sync.Mutex

	mu   sync.RWMutex // never held across I/O
	held map[string]*held[T]
	// changes counts writes and invalidations. A load that began before a
	// change must not be held after it.
	changes uint64
}

// held is a storage entry in memory. The same pointer means the same entry.
type held[T any] struct {
	name  string
	entry T
	// seq grows with every load and write: of two versions of one entry, the
	// one with the higher seq is the newer.
	seq uint64
}

func newEntries[T any](prefix string, seq *atomic.Uint64) *entries[T] {
	return &entries[T]{prefix: prefix, seq: seq, held: make(map[string]*held[T])}
}

// get returns the entry of that name, from memory when it is held there, else
// from storage. It is nil when there is none.
func (e *entries[T]) get(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	e.mu.RLock()
	h, changes := e.held[name], e.changes
	if h != nil {
		e.mu.RUnlock()
		return h, nil
	}
	// Numbered together with changes and before the read, so that whatever is held
	// after a change has a higher number than what was read before it.
	seq := e.seq.Add(1)
	e.mu.RUnlock()

	loaded, err := e.loadAs(ctx, s, name, seq)
	if err != nil || loaded == nil {
		return nil, err
	}

	e.mu.Lock()
	defer e.mu.Unlock()
	if h := e.held[name]; h != nil {
		return h, nil
	}
	if e.changes == changes {
		e.held[name] = loaded
	}
	return loaded, nil
}

// load reads the entry from storage, and leaves alone what is held.
func (e *entries[T]) load(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	return e.loadAs(ctx, s, name, e.seq.Add(1))
}

func (e *entries[T]) loadAs(ctx context.Context, s logical.Storage, name string, seq uint64) (*held[T], error) {
	h := &held[T]{name: name, seq: seq}
	stored, err := s.Get(ctx, e.prefix+name)
	if err != nil || stored == nil {
		return nil, err
	}
	if err := stored.DecodeJSON(&h.entry); err != nil {
		return nil, fmt.Errorf("what is stored as %s cannot be read: %w", stored.Key, err)
	}
	return h, nil
}

// put saves the entry and holds it. When saving fails nothing is known of what
// storage now has, so that the entry is forgotten and read again.
func (e *entries[T]) put(ctx context.Context, s logical.Storage, name string, entry T) (*held[T], error) {
	stored, err := logical.StorageEntryJSON(e.prefix+name, entry)
	if err != nil {
		return nil, err
	}
	if err := s.Put(ctx, stored); err != nil {
		e.forget(name)
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	h := &held[T]{name: name, entry: entry, seq: e.seq.Add(1)}
	e.changes++
	e.held[name] = h
	return h, nil
}

func (e *entries[T]) delete(ctx context.Context, s logical.Storage, name string) error {
	err := s.Delete(ctx, e.prefix+name)
	e.forget(name)
	return err
}

// forget makes the next get read from storage.
func (e *entries[T]) forget(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.changes++
	delete(e.held, name)
}

func (e *entries[T]) list(ctx context.Context, s logical.Storage) ([]string, error) {
	return s.List(ctx, e.prefix)
}
