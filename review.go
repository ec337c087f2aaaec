// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"sync"
	"time"
)

// This file brings slots up to date after a write of their role or config, here or
// on another node. A reader would do that too; without one, a token that may not be
// served any more would be kept, and what the write has mended would be waited for.

// reviewPause is how long a review waits after storage has failed.
const reviewPause = time.Second

// reviews are the slots that have to be looked at. They are looked at one by one, so
// that a crowd of writes is no crowd of storage reads.
type reviews struct {
	mu      sync.Mutex // never held across I/O
	waiting map[*slot]struct{}
	running bool
}

func (r *reviews) add(s *slot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting[s] = struct{}{}
}

// start tells whether somebody has to begin to take slots out: nobody does.
func (r *reviews) start() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running || len(r.waiting) == 0 {
		return false
	}
	r.running = true
	return true
}

// next takes a slot out. With nil the taking out has ended.
func (r *reviews) next() *slot {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.waiting {
		delete(r.waiting, s)
		return s
	}
	r.running = false
	return nil
}

// review has the slots looked at, soon.
func (c *tokenCache) review(slots []*slot) {
	for _, s := range slots {
		c.reviews.add(s)
	}
	if c.reviews.start() {
		c.spawn(c.runReviews) // unless the cache is closed: then nothing has to be up to date
	}
}

// runReviews looks at the slots until none waits. When storage fails, it tries again
// after a while.
func (c *tokenCache) runReviews() {
	for s := c.reviews.next(); s != nil; s = c.reviews.next() {
		if s.review() == nil {
			continue
		}
		c.reviews.add(s)
		select {
		case <-time.After(reviewPause):
		case <-c.ctx.Done():
			return
		}
	}
}

// review makes the slot go by its role and config as they are now, or drops it when
// its token would not be served under them. The error is storage's.
func (s *slot) review() error {
	st := s.state.Load()
	if st == nil {
		return nil // its first reader is about to bring a grant
	}
	g, err := s.cache.lookUp(st.grant)
	if err != nil {
		return err
	}
	if g == nil {
		s.drop(st)
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.adopt(g)
	}
	return nil
}
