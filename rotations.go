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
	of map[string]*rotation
}

// rotation is a mint whose token replaces what its role has.
type rotation struct {
	*flight
	saved chan struct{} // closed when the token has been saved or there is none
}

// saver makes a token, which was minted for a spec, that of its role.
type saver func(context.Context, *spec, *cachedToken) (*cachedToken, error)

func newRotations() rotations { return rotations{of: make(map[string]*rotation)} }

// rotate mints a token of a role and has it saved. Those who ask before the request of
// a rotation has left share it. A back-off is ignored, the gate is not. The caller waits
// for the mint as long as timed, and for saving as long as ctx. The errors are those of
// await and of save.
func (c *tokenCache) rotate(ctx, timed context.Context, q *query, save saver) (*cachedToken, error) {
	// Whether a token is a new one shows by the one that is there, perhaps in storage.
	if q.config.entry.persistsTokens() { // else a new slot would have nothing to end it
		s, err := c.slot(&q.spec)
		if err == nil {
			_, err = s.recall(timed, &q.spec)
		}
		if err != nil {
			return nil, err
		}
	}
	r, waiter, err := c.rotation(ctx, timed, q, save)
	if err != nil {
		return nil, err
	}
	defer waiter.Leave()
	if err := c.toTheEnd(timed, r.flight, waiter); err != nil {
		return nil, err
	}
	select { // storage may take longer than MojoAuth may
	case <-r.saved:
		return r.token, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-c.ctx.Done():
		return nil, errClosed
	}
}

// rotation joins the rotation of a role, or starts one.
func (c *tokenCache) rotation(ctx, timed context.Context, q *query, save saver) (*rotation, *gate.Waiter, error) {
	up, err := c.upstream(q.config)
	if err != nil {
		return nil, nil, err
	}
	deadline, _ := timed.Deadline()

	all := &c.rotations
	all.mu.Lock()
	defer all.mu.Unlock()
	if r := all.of[q.role.name]; r != nil && r.up == up && r.spec.role == q.role {
		if waiter, ok := r.turn.Join(deadline, q.arrived); ok {
			return r, waiter, nil
		}
	}
	var past history
	s := c.peek(q.key())
	if s != nil {
		past = s.past()
	}
	f := c.newFlight(&q.spec, up, leave{key: q.key(), now: true}, past)
	r := &rotation{flight: f, saved: make(chan struct{})}
	waiter, _ := f.turn.Join(deadline, q.arrived)
	// It goes on when the caller has left, but not when the mount is closed.
	saving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(c.ctx, cancel)
	if !c.spawn(func() {
		defer cancel()
		defer unhook()
		defer close(r.saved)
		tok, err := c.mint(f)
		all.remove(r)
		close(f.done)
		switch {
		case err == nil:
			if s != nil {
				s.succeeded()
			}
			r.token, r.err = save(saving, f.spec, tok)
		case c.outdated(f.spec, up), errors.Is(err, gate.ErrAbandoned):
			r.err = errOutdated
		default:
			r.err = err
		}
	}) {
		unhook()
		cancel()
		return nil, nil, errClosed
	}
	all.of[q.role.name] = r
	return r, waiter, nil
}

func (r *rotations) remove(ended *rotation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[ended.spec.role.name] == ended {
		delete(r.of, ended.spec.role.name)
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
			case !old.restored && old.mintedAt.After(tok.mintedAt):
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
