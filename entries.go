// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// entries keeps the storage entries of one kind (configs or roles) in memory after they
// are read, so serving a cached token touches no storage. A write on this node replaces
// the entry in memory. An invalidation by Vault (logical.Backend.InvalidateKey) means
// that another node wrote it: the entry is forgotten, and read from storage the next
// time.
//
// Entries in memory are shared and must not be modified.
type entries[T any] struct {
	prefix string // of the storage keys, with a trailing slash

	// changed is called after an entry changed, with the new entry, or nil if it was
	// deleted. forgotten is called when an entry may have changed. Neither may do I/O.
	// The caller holds no lock except writing.
	changed   func(name string, now *held[T])
	forgotten func(name string)

	// writing admits one writer at a time to load, change, and save an entry. Only
	// writers wait for it, so it may be held across storage I/O.
	writing chan struct{}

	mu   sync.RWMutex // never held across I/O
	held map[string]*held[T]
	// doubted has the entries in memory that the next get compares with storage.
	doubted map[string]struct{}
	// loads has a marker for each name that is being read from storage. A change removes
	// the marker: what was read before a change must not be kept after it.
	loads map[string]*load
}

// held is a storage entry in memory.
type held[T any] struct {
	name   string
	entry  T
	stored []byte // as in storage
}

// same reports whether a and b are the same stored entry. Either may be nil.
func (h *held[T]) same(other *held[T]) bool {
	return h == other || h != nil && other != nil && bytes.Equal(h.stored, other.stored)
}

type load struct{ readers int }

func newEntries[T any](prefix string) *entries[T] {
	return &entries[T]{prefix: prefix, writing: make(chan struct{}, 1), held: make(map[string]*held[T]), loads: make(map[string]*load)}
}

// get returns the entry with that name, from memory if possible, otherwise from storage.
// It returns nil if there is none.
func (e *entries[T]) get(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	e.mu.RLock()
	h := e.held[name]
	_, doubted := e.doubted[name]
	e.mu.RUnlock()
	switch {
	case h == nil:
		return e.fresh(ctx, s, name)
	case doubted && e.settleDoubt(name):
		return e.verified(ctx, s, h)
	default:
		return h, nil
	}
}

// doubt makes the next get compare each entry in memory with storage.
func (e *entries[T]) doubt() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.doubted = make(map[string]struct{}, len(e.held))
	for name := range e.held {
		e.doubted[name] = struct{}{}
	}
}

// settleDoubt reports whether the caller must compare the entry with storage.
func (e *entries[T]) settleDoubt(name string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, doubted := e.doubted[name]
	delete(e.doubted, name)
	return doubted
}

// verified returns the entry from storage, or the one in memory if storage fails.
func (e *entries[T]) verified(ctx context.Context, s logical.Storage, h *held[T]) (*held[T], error) {
	bounded, cancel := context.WithTimeout(ctx, storagePatience)
	defer cancel()
	now, err := e.fresh(bounded, s, h.name)
	var broken *unreadable
	if err == nil || errors.As(err, &broken) {
		return now, err
	}
	if ctx.Err() != nil { // the reader left: leave the comparison to the next one
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.held[h.name] == h {
			e.doubted[h.name] = struct{}{}
		}
	}
	return h, ctx.Err()
}

// standing returns the entry from memory, otherwise from storage, without keeping it.
func (e *entries[T]) standing(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	if h := e.current(name); h != nil {
		return h, nil
	}
	return e.load(ctx, s, name)
}

// current returns the entry in memory, or nil.
func (e *entries[T]) current(name string) *held[T] {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.held[name]
}

// fresh reads the entry from storage in any case and keeps it.
func (e *entries[T]) fresh(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	e.mu.Lock()
	marker := e.loads[name]
	if marker == nil {
		marker = new(load)
		e.loads[name] = marker
	}
	marker.readers++
	e.mu.Unlock()

	loaded, err := e.load(ctx, s, name)
	now, changed := e.hold(name, marker, loaded, err)
	if err != nil {
		return nil, err
	}
	if changed {
		e.changed(name, now)
	}
	return now, nil
}

// hold ends a load. It returns the valid entry, and reports whether that entry replaces
// another one in memory.
func (e *entries[T]) hold(name string, marker *load, loaded *held[T], err error) (now *held[T], changed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	undisturbed := e.loads[name] == marker
	if marker.readers--; marker.readers == 0 && undisturbed {
		delete(e.loads, name)
	}
	before := e.held[name]
	switch {
	case err != nil:
		return nil, false
	case !undisturbed && before != nil:
		return before, false
	case !undisturbed:
		return loaded, false
	case before != nil && before.same(loaded):
		return before, false
	case loaded == nil:
		delete(e.held, name)
	default:
		e.held[name] = loaded
	}
	return loaded, before != nil
}

// load reads the entry from storage without keeping it.
func (e *entries[T]) load(ctx context.Context, s logical.Storage, name string) (*held[T], error) {
	stored, err := s.Get(ctx, e.prefix+name)
	if err != nil || stored == nil {
		return nil, err
	}
	h := &held[T]{name: name, stored: stored.Value}
	if err := stored.DecodeJSON(&h.entry); err != nil {
		return nil, &unreadable{key: stored.Key, err: err}
	}
	return h, nil
}

// unreadable is a stored entry that cannot be decoded. Storage is not at fault, and a
// retry does not help.
type unreadable struct {
	key string
	err error
}

func (u *unreadable) Error() string {
	return fmt.Sprintf("the stored entry %s cannot be decoded: %s. Delete %s and write it again", u.key, u.err, u.key)
}

func (u *unreadable) Unwrap() error { return u.err }

// update loads the entry, lets change derive the next one, and saves it. It returns the
// previous entry, or nil. If change fails, update returns its error as is and saves
// nothing. Writes go one at a time: to storage, then to memory, then to what depends on
// the entry.
func (e *entries[T]) update(ctx context.Context, s logical.Storage, name string, change func(old *held[T]) (*T, error)) (old *held[T], err error) {
	done, err := e.beginWriting(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if old, err = e.load(ctx, s, name); err != nil {
		return nil, err
	}
	next, err := change(old)
	if err != nil {
		return nil, err
	}
	stored, err := logical.StorageEntryJSON(e.prefix+name, next)
	if err != nil {
		return nil, err
	}
	now := &held[T]{name: name, entry: *next, stored: stored.Value}
	return old, e.settle(name, now, s.Put(ctx, stored))
}

// remove deletes the entry, in the same order as update, and returns it. It returns nil
// if there was no entry or it could not be decoded.
func (e *entries[T]) remove(ctx context.Context, s logical.Storage, name string) (old *held[T], err error) {
	done, err := e.beginWriting(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var broken *unreadable
	if old, err = e.load(ctx, s, name); err != nil && !errors.As(err, &broken) {
		return nil, err
	}
	return old, e.settle(name, nil, s.Delete(ctx, e.prefix+name))
}

// beginWriting waits until no other write is in progress. The caller must call done after
// its own write.
func (e *entries[T]) beginWriting(ctx context.Context) (done func(), err error) {
	select {
	case e.writing <- struct{}{}:
		return func() { <-e.writing }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// settle ends a write. If storage failed, it may hold the old entry or the new one: the
// next reader finds out.
func (e *entries[T]) settle(name string, now *held[T], err error) error {
	if err != nil {
		e.forget(name)
		return err
	}
	e.replace(name, now)
	e.changed(name, now)
	return nil
}

// forget makes the next get read from storage.
func (e *entries[T]) forget(name string) {
	e.replace(name, nil)
	e.forgotten(name)
}

// replace keeps now, or nothing, instead of what is in memory or being read.
func (e *entries[T]) replace(name string, now *held[T]) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.loads, name)
	delete(e.doubted, name)
	if now == nil {
		delete(e.held, name)
	} else {
		e.held[name] = now
	}
}

func (e *entries[T]) list(ctx context.Context, s logical.Storage) ([]string, error) {
	return s.List(ctx, e.prefix)
}
