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

// This file is the storage that the nodes of a simulation share. It is slow at times, and
// fails before or after it performs an operation.

var errSimStorage = errors.New("simulated storage failure")

// simStorage is a node's access to the shared storage.
type simStorage struct {
	logical.Storage // shared by all nodes
	node            *simNode
}

// simReload is how long the engine may wait before it tries to load an entry again.
const simReload = 30 * time.Second

// simStorageWeather is how storage behaves for a while.
type simStorageWeather struct {
	slow     float64 // share of operations that take time
	longest  time.Duration
	failRead float64
	failPut  float64
	crawls   float64 // share of slow operations on stored tokens that take seconds
}

// simPlan is how an operation goes.
type simPlan struct {
	op            *simOp // the request that it is part of, nil for none
	before, after time.Duration
	fail          float64 // below 0.5, it fails before it is done; below 1, after
	dies          bool    // the node dies when the operation is done
}

// plan decides how an operation goes. If the engine may hold a mutex meanwhile, the
// operation takes no time unless nothing else can wait for that mutex: a goroutine that
// waits for a sync.Mutex keeps time in the bubble from passing. The engine orders its
// operations on stored tokens without a mutex.
func (s *simStorage) plan(ctx context.Context, what, key string, write bool) (p simPlan, err error) {
	w := s.node.w
	w.mu.Lock()
	defer w.mu.Unlock()
	burns := !s.node.cut && s.node.burns(write)
	if burns && s.node.fuse.before {
		w.mu.Unlock()
		s.node.expire()
		w.mu.Lock()
	}
	if s.node.cut {
		return p, errSimDied
	}
	p.dies = burns
	token := strings.HasPrefix(key, simTokenPrefix)
	if !token || what != "list" { // sweeps list forever
		w.storageOps++
	}
	w.count()
	op, _ := ctx.Value(simOpKey{}).(*simOp)
	p.op = op
	dice := w.dice(what, s.node.name, key)
	weather := w.storageWeather
	if op != nil {
		op.storageOps++
	}
	if op == nil && (!write || token) || op != nil && op.slow {
		if dice.Float64() < weather.slow {
			p.before = time.Duration(dice.Int64N(int64(weather.longest)))
			p.after = time.Duration(dice.Int64N(int64(weather.longest)))
			if token && op == nil && dice.Float64() < weather.crawls {
				p.before += time.Duration(dice.Int64N(int64(simCrawl)))
			}
		}
	}
	odds := weather.failRead
	if write {
		odds = weather.failPut
	}
	p.fail = 1
	if dice.Float64() < odds {
		p.fail = dice.Float64()
		s.node.storageFailed = w.now()
		if op != nil {
			op.storageFailed = true
		} else {
			s.node.unsettled = w.now() + simReload
		}
	}
	return p, nil
}

// blurs is called when the node must look in storage to know what it wrote.
func (n *simNode) blurs(key string) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.blurred(n, key)
}

// ended returns why an operation has no result: its node died.
func (s *simStorage) ended(p simPlan) error {
	if p.dies {
		s.node.expire()
	}
	if s.node.isCut() {
		return errSimDied
	}
	return nil
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
	p, err := s.plan(ctx, "get", key, false)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(key, simTokenPrefix) {
		return s.get(ctx, key, p)
	}
	look := s.node.lookUpBegins(p.op, key)
	entry, err := s.get(ctx, key, p)
	s.node.lookUpEnds(look, entry, err)
	return entry, err
}

func (s *simStorage) get(ctx context.Context, key string, p simPlan) (*logical.StorageEntry, error) {
	if err := s.pause(ctx, p.op, p.before); err != nil {
		return nil, err
	}
	number := s.node.stored(key)
	entry, err := s.Storage.Get(ctx, key)
	if err := s.pause(ctx, p.op, p.after); err != nil {
		return nil, err
	}
	if err := s.ended(p); err != nil {
		return nil, err
	}
	if p.fail < 1 {
		s.node.w.note("%s: storage fails to get %s", s.node.name, key)
		return nil, errSimStorage
	}
	s.node.sees(key, number)
	return entry, err
}

func (s *simStorage) List(ctx context.Context, prefix string) ([]string, error) {
	p, err := s.plan(ctx, "list", prefix, false)
	if err != nil {
		return nil, err
	}
	if p.op == nil && strings.HasPrefix(prefix, simTokenPrefix) {
		s.node.sweeps(prefix)
	}
	if err := s.pause(ctx, p.op, p.before); err != nil {
		return nil, err
	}
	if err := s.ended(p); err != nil {
		return nil, err
	}
	if p.fail < 1 {
		return nil, errSimStorage
	}
	return s.Storage.List(ctx, prefix)
}

func (s *simStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.write(ctx, entry.Key, entry.Value, func() error { return s.Storage.Put(ctx, entry) })
}

func (s *simStorage) Delete(ctx context.Context, key string) error {
	return s.write(ctx, key, nil, func() error { return s.Storage.Delete(ctx, key) })
}

// write puts a value, or deletes the key when value is nil.
func (s *simStorage) write(ctx context.Context, key string, value []byte, apply func() error) error {
	p, err := s.plan(ctx, "write", key, true)
	if err != nil {
		return err
	}
	token := strings.HasPrefix(key, simTokenPrefix)
	if s.node.readOnly {
		s.node.w.violate("%s, a standby, wrote %s", s.node.name, key)
		return logical.ErrReadOnly
	}
	if token {
		s.node.w.tokenWriteBegins(s.node, p.op, key, value)
	}
	if err := s.pause(ctx, p.op, p.before); err != nil {
		return err
	}
	if s.node.isCut() {
		return errSimDied
	}
	if p.fail < 1 && !token {
		defer s.node.blurs(key)
	}
	if p.fail < 0.5 {
		s.node.w.note("%s: storage fails to write %s", s.node.name, key)
		if err := s.ended(p); err != nil {
			return err
		}
		return errSimStorage
	}
	if err := apply(); err != nil {
		return err
	}
	if token {
		s.node.w.tokenWritten(s.node, key, value)
	} else {
		s.node.w.written(s.node, p.op, key)
	}
	if err := s.ended(p); err != nil {
		return err
	}
	if err := s.pause(ctx, p.op, p.after); err != nil {
		return err
	}
	if err := s.ended(p); err != nil {
		return err
	}
	if p.fail < 1 {
		s.node.w.note("%s: storage fails after it wrote %s", s.node.name, key)
		return errSimStorage
	}
	return nil
}
