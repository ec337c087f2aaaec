// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file replaces a role's token before its time: a mint beside whatever is cached
// or under way, and the slot that it is for.

// rotations has the rotation of each role that still may be joined.
type rotations struct {
	mu sync.Mutex // never held across I/O
	of map[string]*flight
}

func newRotations() rotations { return rotations{of: make(map[string]*flight)} }

// rotate mints a token of a role and has it saved. Those who ask before the request of
// a rotation has left share it. A back-off is ignored, the gate is not. The errors are
// those of await and of save.
func (c *tokenCache) rotate(ctx context.Context, q *query, save func(context.Context, *spec, *cachedToken) (*cachedToken, error)) (*cachedToken, error) {
	f, waiter, err := c.rotation(ctx, q, save)
	if err != nil {
		return nil, err
	}
	defer waiter.Leave()
	if err := c.toTheEnd(ctx, f, waiter); err != nil {
		return nil, err
	}
	return f.token, f.err
}

// rotation joins the rotation of a role, or starts one.
func (c *tokenCache) rotation(ctx context.Context, q *query, save func(context.Context, *spec, *cachedToken) (*cachedToken, error)) (*flight, *gate.Waiter, error) {
	up, err := c.upstream(q.config)
	if err != nil {
		return nil, nil, err
	}
	deadline, _ := ctx.Deadline()

	r := &c.rotations
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.of[q.role.name]; f != nil && f.up == up && f.spec.role == q.role {
		if waiter, ok := f.turn.Join(deadline, q.arrived); ok {
			return f, waiter, nil
		}
	}
	var past history
	if s := c.peek(q.key()); s != nil {
		past = s.past()
	}
	f := c.newFlight(&q.spec, up, leave{key: q.key(), now: true}, past)
	waiter, _ := f.turn.Join(deadline, q.arrived)
	if !c.spawn(func() {
		defer close(f.done)
		f.token, f.err = c.mint(f)
		switch {
		case f.err == nil:
			f.token, f.err = save(c.ctx, f.spec, f.token)
		case c.outdated(f.spec, up), errors.Is(f.err, gate.ErrAbandoned):
			f.err = errOutdated
		}
		r.remove(f)
	}) {
		return nil, nil, errClosed
	}
	r.of[q.role.name] = f
	return f, waiter, nil
}

func (r *rotations) remove(f *flight) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[f.spec.role.name] == f {
		delete(r.of, f.spec.role.name)
	}
}

// successor is the token that a spec's role has after a rotation that minted tok: tok,
// or one that was minted after it and is there already. It counts as in use when the
// token is that it replaces. The error is an *unavailable when tok is no new token.
func (c *tokenCache) successor(spec *spec, tok *cachedToken) (*cachedToken, error) {
	next := tok.view(spec)
	if s := c.peek(spec.key()); s != nil {
		if old := s.held(spec); old != nil {
			switch {
			case old.accessToken == tok.accessToken:
				return nil, &unavailable{mintError: repeats(old), config: spec.config.name}
			case old.mintedAt.After(tok.mintedAt):
				next = old
			}
			next.use.Store(old.use.Load())
		}
	}
	if !next.usable(time.Now()) {
		return nil, &unavailable{mintError: expiredOnArrival(next), config: spec.config.name}
	}
	return next, nil
}

// prepare makes the slot of a spec that no reader can have yet, with a token in it.
// roleChanged wakes it, once the role is saved.
func (c *tokenCache) prepare(spec *spec, tok *cachedToken) (*slot, error) {
	s, err := c.slot(spec)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spec, s.prepared = spec, true
	s.token.Store(tok)
	return s, nil
}

// unprepare has a prepared slot go by what storage has of its role, after saving it
// failed.
func (c *tokenCache) unprepare(s *slot) {
	s.mu.Lock()
	s.prepared = false
	s.mu.Unlock()
	c.roleForgotten(s.key.role)
}
