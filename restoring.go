// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"time"
)

// This file connects a slot to its stored token: when to look it up, restore it, save it,
// and delete it.

// look is a look-up of a slot's token in storage, shared by all readers that want it.
type look struct {
	done chan struct{} // closed when the slot has restored what was found
	// notified is set if another node's write caused the look-up, and again if another write
	// arrived that the look-up may have missed.
	notified, again bool
}

// restored answers a reader that found no token with the stored one if that is as fresh
// as the reader wants. The error says why the reader did not wait for the look-up.
func (s *slot) restored(ctx context.Context, q *query) (answer served, ok bool, err error) {
	looked, err := s.recall(ctx, &q.spec)
	if err != nil || !looked {
		return served{}, false, err
	}
	if tok := s.held(&q.spec); tok != nil {
		answer, ok = tok.hit(q, s.cache.random)
		answer.outcome = outcomeRestored
	}
	return answer, ok, nil
}

// recall looks up the token of a slot without one in storage, once, and waits for the
// result. It reports whether there was anything to wait for.
func (s *slot) recall(ctx context.Context, spec *spec) (looked bool, err error) {
	s.mu.Lock()
	l, now := s.look, time.Now()
	mayLook := s.lookedAt.IsZero() || !s.lookAgain.IsZero() && !now.Before(s.lookAgain)
	switch {
	case s.freed || s.flight != nil || s.held(spec).usable(now):
		l = nil
	case l == nil && mayLook && s.key.narrowed == "" && spec.config.entry.persistsTokens():
		l = s.startLook(spec, false)
	}
	s.mu.Unlock()
	if l == nil {
		return false, nil
	}
	return true, s.waitForLook(ctx, l)
}

// startLook starts a look-up. It returns nil if the mount is closed. The caller holds
// s.mu.
func (s *slot) startLook(spec *spec, notified bool) *look {
	l := &look{done: make(chan struct{}), notified: notified}
	if !s.cache.spawn(func() {
		ctx, cancel := context.WithTimeout(s.cache.ctx, storagePatience)
		defer cancel()
		stored, err := s.cache.store.load(ctx, storeKey(s.key.config, s.key.role))
		s.found(l, stored, err)
	}) {
		return nil
	}
	s.spec, s.look, s.lookedAt, s.lookAgain = spec, l, time.Now(), time.Time{}
	return l
}

func (s *slot) waitForLook(ctx context.Context, l *look) error {
	select {
	case <-l.done:
		return nil
	case <-ctx.Done():
		return inTime(ctx, context.Cause(ctx))
	case <-s.cache.ctx.Done():
		return errClosed
	}
}

// found records the result of a look-up. stored is nil if there is nothing. A node that
// may write has the newest token in memory, if there is one; any other node follows
// storage.
func (s *slot) found(l *look, stored *storedToken, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(l.done)
	s.look = nil
	if s.freed {
		return
	}
	relies := s.cache.relies(s.spec)
	s.doubted = false
	if err == nil {
		now, old := time.Now(), s.token.Load()
		tok := stored.restore(s.spec, now, s.cache.random())
		switch {
		case relies && !tok.same(old):
			s.unannounced = l.notified && tok != nil
			if s.unannounced {
				s.unsure.Store(true)
			}
			s.token.Store(tok)
		case !relies && tok != nil && !old.usable(now):
			s.token.Store(tok)
			s.saved = tok
		}
		s.next()
	} else {
		if !relies {
			s.lookAgain = time.Now().Add(storagePatience)
		}
		s.wakeIn(rememberFor)
	}
	s.unsure.Store(s.doubted || s.unannounced)
	if l.again && !s.freed {
		s.startLook(s.spec, true)
	}
}

// toSave returns the slot's token in its stored form, or nil if it is stored already or
// there is none. The caller stores it.
func (s *slot) toSave() *storedToken {
	s.mu.Lock()
	defer s.mu.Unlock()
	tok := s.token.Load()
	if !tok.usable(time.Now()) || tok.same(s.saved) { // a freed slot still saves its token: closing frees it too
		return nil
	}
	s.saved = tok
	return newStoredToken(tok, s.key)
}

// unsave deletes the slot's expired token from storage. The caller holds s.mu.
func (s *slot) unsave() {
	if s.saved == nil || s.cache.standby {
		return
	}
	s.saved = nil
	s.cache.spawn(func() {
		ctx, cancel := s.cache.background()
		defer cancel()
		// A failure is recorded, and the sweep deletes the token.
		_ = s.cache.prune(ctx, s.cache.storage, s.key.config, s.key.role)
	})
}
