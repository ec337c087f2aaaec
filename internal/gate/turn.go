// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"context"
	"errors"
	"time"
)

// This file is the gate as a mint, and those that wait for its token, see it.

// Turn is the turn of one mint. It lasts for all of the mint's requests.
type Turn struct {
	gate   *Gate
	key    placeKey
	number uint64 // turns are numbered in the order of their creation

	// The gate's lock protects the rest.
	ended     func(error) // called, under the lock, when the wait ends
	state     turnState
	ready     time.Time // since when its request could leave
	hurts     time.Time // when waiting hurts, or will begin to hurt
	rank      time.Time // of its place when its request last left
	place     *place    // where it waits, or last waited
	inPlace   int       // index
	joined    bool      // by a waiter, ever
	waiters   int
	late      []*Waiter // those that have no time left if the request is throttled
	departure departure // of the request that left last
}

type turnState int

const (
	idle    turnState = iota // not waiting: before the first attempt, or throttled
	waiting                  // in the queue
	out                      // its request has left and was not throttled
	gone                     // abandoned
)

// Turn creates a turn for a request. It does not wait yet.
func (g *Gate) Turn(role string, kind Kind) *Turn {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.turns++
	return &Turn{
		gate:    g,
		key:     placeKey{role, kind},
		number:  g.turns,
		inPlace: -1,
	}
}

// Waiter waits for the result of a turn.
type Waiter struct {
	turn     *Turn
	deadline time.Time
	tooLate  chan struct{}
	err      *NoTurnError // set before tooLate is closed
	index    int
	left     bool
}

// Join adds a waiter for the turn's result. A waiter with a zero deadline waits without
// end, as a renewal does. hurts is when waiting began or will begin to hurt: the turn's
// rank is the earliest of them.
//
// Join returns false if the turn accepts no more waiters, because all of them have left
// or because it is a rotation whose request has left. The caller then needs a new turn.
func (t *Turn) Join(deadline, hurts time.Time) (*Waiter, bool) {
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if t.state == gone || t.state == out && t.key.kind == Rotation {
		return nil, false
	}
	t.joined = true
	t.waiters++
	if t.hurts.IsZero() || hurts.Before(t.hurts) {
		t.hurts = hurts
		if t.state == waiting {
			g.queue.raised(t)
		}
	}
	return g.watch(t, deadline), true
}

// watch notifies w when no turn can come before its deadline. The caller holds g.mu.
func (g *Gate) watch(t *Turn, deadline time.Time) *Waiter {
	w := &Waiter{turn: t, deadline: deadline, tooLate: make(chan struct{}), index: -1}
	if !deadline.IsZero() {
		g.deadlines.set(w, true)
		g.notifyLate()
	}
	return w
}

// TooLate is closed when the request waits and the endpoint's Retry-After outlasts the
// waiter's deadline. Err is then the reason.
func (w *Waiter) TooLate() <-chan struct{} { return w.tooLate }

// Err is a *NoTurnError that says why the waiter, which no longer waits, got no turn.
func (w *Waiter) Err() *NoTurnError {
	g := w.turn.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	return g.noTurn(OutOfTime)
}

// Leave ends the wait. If no one else waits and the request has not left, the turn leaves
// the queue.
func (w *Waiter) Leave() {
	t := w.turn
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.left {
		return
	}
	w.left = true
	g.deadlines.set(w, false)
	t.waiters--
	if t.waiters == 0 && t.state == waiting {
		g.queue.remove(t)
		t.state = gone
		t.ended(ErrAbandoned)
		g.advance()
	}
}

// notifyLate notifies the waiters whose deadline passes before the gate opens again. The
// caller holds g.mu.
func (g *Gate) notifyLate() {
	for w := g.deadlines.first(); w != nil && w.deadline.Before(g.pace.closed); w = g.deadlines.first() {
		g.deadlines.set(w, false)
		if w.turn.state == out {
			w.turn.late = append(w.turn.late, w)
			continue
		}
		w.tell(g.noTurn(RetryAfter))
	}
}

func (w *Waiter) tell(err *NoTurnError) {
	w.err = err
	close(w.tooLate)
}

// Wait blocks until the turn's request may leave. A request that must be sent again waits
// again and keeps its rank. The error is
//
//   - a *NoTurnError if the context's deadline passes, or would pass before the gate opens
//     again, or if too many more urgent requests wait,
//   - ErrAbandoned if the last waiter has left,
//   - ErrClosed, or the context's error if it is canceled.
func (t *Turn) Wait(ctx context.Context) (*Pass, error) {
	g := t.gate
	if ctx.Err() != nil {
		return nil, g.outOf(ctx)
	}
	deadline, _ := ctx.Deadline()
	ended := make(chan error, 1)
	self, err := g.enter(t, deadline, func(err error) { ended <- err })
	if err != nil {
		return nil, err
	}
	select {
	case err = <-ended:
		g.unwatch(self)
	case <-ctx.Done():
		if g.withdraw(t, self) {
			return nil, g.outOf(ctx)
		}
		err = <-ended
	case <-self.tooLate:
		if g.withdraw(t, self) {
			return nil, self.err
		}
		err = <-ended
	}
	if err != nil {
		return nil, err
	}
	return &Pass{turn: t, departure: t.departure}, nil
}

// enter makes t wait. ended is called, under the lock, when the wait ends; without an
// error, the request leaves. w watches the deadline and does not count as joined.
func (g *Gate) enter(t *Turn, deadline time.Time, ended func(error)) (*Waiter, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.closed:
		return nil, ErrClosed
	case t.joined && t.waiters == 0:
		t.state = gone
		return nil, ErrAbandoned
	}
	t.ready = g.clock.Now()
	if t.hurts.IsZero() {
		t.hurts = t.ready
	}
	t.state, t.ended = waiting, ended
	g.queue.add(t)
	if p := g.queue.overflow(); p != nil {
		g.turnAway(p, g.noTurn(Crowded))
	}
	for _, w := range t.late {
		w.tell(g.noTurn(RetryAfter))
	}
	t.late = nil
	self := g.watch(t, deadline)
	g.advance()
	return self, nil
}

func (g *Gate) unwatch(w *Waiter) {
	if w.deadline.IsZero() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadlines.set(w, false)
}

// withdraw ends the wait of t. It returns false if the wait has just ended in another
// way.
func (g *Gate) withdraw(t *Turn, self *Waiter) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deadlines.set(self, false)
	if t.state != waiting {
		return false
	}
	g.queue.remove(t)
	t.state = idle
	g.advance()
	return true
}

// outOf is why a wait ended whose context is done.
func (g *Gate) outOf(ctx context.Context) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.noTurn(OutOfTime)
}

// Pass is permission for one request.
type Pass struct {
	turn      *Turn
	departure departure
	done      bool // under the gate's lock
}

// Answer is the outcome of a request.
type Answer int

// The answers of an endpoint, as far as its pace is concerned.
const (
	NoAnswer  Answer = iota // no answer: a broken connection, or a timeout
	Answered                // any answer except a 429
	Throttled               // a 429
)

// Done reports the outcome of the request, and the Retry-After of its answer if any. It
// must be called once for each pass.
func (p *Pass) Done(answer Answer, retryAfter time.Duration) {
	t := p.turn
	g := t.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.done {
		return
	}
	p.done = true
	g.inFlight--
	g.queue.landed(t)
	now := g.clock.Now()
	switch answer {
	case Throttled:
		t.state = idle
		g.pace.throttled(now, p.departure, retryAfter)
	case Answered:
		g.pace.close(now, retryAfter)
		g.pace.answered(now, p.departure, g.queue.demand(now))
	}
	g.notifyLate()
	g.advance()
}
