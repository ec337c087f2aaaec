// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file is the storage that the nodes of a simulation share: slow, and failing,
// before or after it did what it was asked for.

var errSimStorage = errors.New("simulated storage failure")

// simStorage is a node's way to the storage.
type simStorage struct {
	logical.Storage // that all nodes share
	node            *simNode
}

// simReload is how long the engine may wait before it loads an entry again.
const simReload = 30 * time.Second

// simStorageWeather is how storage fares.
type simStorageWeather struct {
	slow     float64 // share of operations that take time
	longest  time.Duration
	failRead float64
	failPut  float64
}

// plan decides how an operation goes. One that may hold a lock of the engine takes
// no time unless nothing else can wait for that lock: a goroutine that waits for a
// sync.Mutex keeps a bubble's time from passing.
func (s *simStorage) plan(ctx context.Context, what, key string, write bool) (op *simOp, before, after time.Duration, fail float64) {
	w := s.node.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.storageOps++
	w.count()
	op, _ = ctx.Value(simOpKey{}).(*simOp)
	dice := w.dice(what, s.node.name, key)
	weather := w.storageWeather
	if op != nil {
		op.storageOps++
	}
	if op == nil && !write || op != nil && op.slow {
		if dice.Float64() < weather.slow {
			before = time.Duration(dice.Int64N(int64(weather.longest)))
			after = time.Duration(dice.Int64N(int64(weather.longest)))
		}
	}
	if strings.HasPrefix(key, "tokens/") {
		before, after = 0, 0
	}
	odds := weather.failRead
	if write {
		odds = weather.failPut
	}
	fail = 1
	if dice.Float64() < odds {
		fail = dice.Float64() // below a half: before it was done
		s.node.storageFailed = w.now()
		if op != nil {
			op.storageFailed = true
		} else {
			s.node.unsettled = w.now() + simReload
		}
	}
	return op, before, after, fail
}

func (s *simStorage) pause(ctx context.Context, op *simOp, d time.Duration) error {
	if d > 0 {
		if op != nil {
			s.node.w.mu.Lock()
			op.storageTime += d
			s.node.w.mu.Unlock()
		}
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			s.node.w.mu.Lock()
			s.node.storageFailed = s.node.w.now()
			s.node.w.mu.Unlock()
		}
	}
	return ctx.Err()
}

func (s *simStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	op, before, after, fail := s.plan(ctx, "get", key, false)
	if err := s.pause(ctx, op, before); err != nil {
		return nil, err
	}
	number := s.node.stored(key)
	entry, err := s.Storage.Get(ctx, key)
	if err := s.pause(ctx, op, after); err != nil {
		return nil, err
	}
	if fail < 1 {
		s.node.w.note("%s storage fails to get %s", s.node.name, key)
		return nil, errSimStorage
	}
	s.node.sees(key, number)
	return entry, err
}

func (s *simStorage) List(ctx context.Context, prefix string) ([]string, error) {
	op, before, _, fail := s.plan(ctx, "list", prefix, false)
	if err := s.pause(ctx, op, before); err != nil {
		return nil, err
	}
	if fail < 1 {
		return nil, errSimStorage
	}
	return s.Storage.List(ctx, prefix)
}

func (s *simStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.write(ctx, entry.Key, func() error { return s.Storage.Put(ctx, entry) })
}

func (s *simStorage) Delete(ctx context.Context, key string) error {
	return s.write(ctx, key, func() error { return s.Storage.Delete(ctx, key) })
}

func (s *simStorage) write(ctx context.Context, key string, apply func() error) error {
	op, before, after, fail := s.plan(ctx, "write", key, true)
	if s.node.readOnly {
		s.node.w.violate("%s may not write, and wrote %s", s.node.name, key)
		return logical.ErrReadOnly
	}
	if err := s.pause(ctx, op, before); err != nil {
		return err
	}
	if fail < 0.5 {
		s.node.w.note("%s storage fails to write %s", s.node.name, key)
		return errSimStorage
	}
	if err := apply(); err != nil {
		return err
	}
	s.node.w.written(s.node, op, key)
	if err := s.pause(ctx, op, after); err != nil {
		return err
	}
	if fail < 1 {
		s.node.w.note("%s storage fails after it wrote %s", s.node.name, key)
		return errSimStorage
	}
	return nil
}
