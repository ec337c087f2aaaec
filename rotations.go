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

// This file replaces a role's token before it is due: a mint next to whatever is cached
// or in progress, and the slot for its token.

// rotations has each role's rotation that can still be joined.
type rotations struct {
	mu sync.Mutex // never held across I/O
	of map[string]*rotation
}

// rotation is a mint whose token replaces the role's.
type rotation struct {
	*flight
	saved chan struct{} // closed when the token has been saved, or when there is none
}

// saver makes tok, which was minted for a spec, the token of its role.
type saver func(context.Context, *spec, *cachedToken) (*cachedToken, error)

func newRotations() rotations { return rotations{of: make(map[string]*rotation)} }

// rotate mints a token for a role and saves it. Callers that arrive before the request of
// a rotation has left share that rotation. It ignores a back-off, but not the gate. The
// caller waits for the mint until timed ends, and for saving until ctx ends. The errors
// are those of await and of save.
func (c *tokenCache) rotate(ctx, timed context.Context, q *query, save saver) (*cachedToken, error) {
	// Only the present token, perhaps in storage, shows whether tok is a new one.
	if q.config.entry.persistsTokens() { // otherwise nothing would free a new slot
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
	select { // storage may take longer than MojoAuth
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
	// It continues when the caller leaves, but not when the mount is closed.
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

// successor returns the token that a spec's role has after a rotation that minted tok:
// tok, or one that is cached already and was minted after it. It counts as in use if the
// token that it replaces does. The error is an *unavailable if tok is not a new token.
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

// prepare creates the slot of a spec that no reader can have yet, with a token in it.
// roleChanged wakes it once the role is saved.
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

// unprepare makes a prepared slot match what storage has of its role, after saving the
// role failed.
func (c *tokenCache) unprepare(s *slot) {
	s.mu.Lock()
	s.prepared = false
	s.mu.Unlock()
	c.roleForgotten(s.key.role)
}
