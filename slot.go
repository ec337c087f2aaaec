// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// errEvicted is for a reader whose slot was dropped before it could use it.
var errEvicted = errors.New("the slot was dropped")

// slot holds the token of one role, or of one narrowed set of its scopes, and
// sees to its renewal.
type slot struct {
	cache *tokenCache
	key   slotKey

	// state is what readers go by. It is replaced as a whole, under mu.
	state atomic.Pointer[slotState]

	mu      sync.Mutex // never held across I/O
	flight  *flight    // the mint under way, or nil
	backoff backoff    // of failures that concern this request only
	timer   *time.Timer
	closed  bool
}

// slotState is the newest grant that a slot has seen, and the token for it.
type slotState struct {
	grant *grant
	token *cachedToken // nil when there is none
}

// flight is one mint. It goes on when its readers give up.
type flight struct {
	grant   *grant
	app     *application
	started time.Time
	done    chan struct{} // closed when what follows is set

	token *token
	read  *atomic.Bool
	err   error
}

// read answers a reader who found no fresh token: it joins or starts a mint, and
// serves the old token when that is slow or fails.
func (s *slot) read(ctx context.Context, g *grant, minTTL time.Duration) (served, error) {
	for {
		f, old, err := s.board(g, minTTL)
		var failure *unavailable
		switch {
		case errors.As(err, &failure): // nothing may be tried just now
			answer, err := s.fallBack(old, minTTL, failure)
			if err == nil || failure.probe == nil {
				return answer, err
			}
			// Another mint is finding out whether the trouble is over.
			select {
			case <-failure.probe:
				continue
			case <-ctx.Done():
				return served{}, ctx.Err()
			case <-s.cache.ctx.Done():
				return served{}, errClosed
			}
		case err != nil:
			return served{}, err
		case f == nil: // somebody else has minted meanwhile
			if answer, ok := old.hit(minTTL); ok {
				return answer, nil
			}
			continue
		}

		done, err := f.wait(ctx, s.cache.ctx, old)
		switch {
		case err != nil:
			return served{}, err
		case !done:
			if answer, ok := old.stale(minTTL, nil); ok {
				return answer, nil
			}
			continue
		case f.err == nil:
			return s.arrived(f, g, old, minTTL)
		case !s.cache.current(f.app):
			// The config was written meanwhile, which ends what failed before.
			return served{}, errOutdated
		case errors.As(f.err, &failure):
			return s.fallBack(old, minTTL, failure)
		case s.cache.ctx.Err() != nil:
			return served{}, errClosed
		default:
			return served{}, f.err
		}
	}
}

// board finds the mint that a reader of g should wait for, or starts one, and
// the old token if there is one. Without a mint and an error, the token is
// fresh. The error is an *unavailable when nothing may be tried.
func (s *slot) board(g *grant, minTTL time.Duration) (*flight, *cachedToken, error) {
	app, err := s.cache.application(g.config)
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errEvicted
	}
	if !s.adopt(g) {
		return nil, nil, errOutdated
	}
	tok := s.state.Load().token
	if tok != nil && tok.scheduleFor(minTTL).phase(tok.left(time.Now())) == phaseFresh {
		return nil, tok, nil
	}
	f, err := s.mint(g, app)
	if err != nil {
		if tok != nil {
			// It is in use, so that the next has to be minted when that is allowed
			// again; nobody may have seen to that while it was not read.
			tok.read.Store(true)
		}
		s.plan()
	}
	return f, tok, err
}

// mint joins the mint under way or starts one, if that is allowed. The caller
// holds s.mu.
func (s *slot) mint(g *grant, app *application) (*flight, error) {
	if s.flight != nil {
		return s.flight, nil
	}
	now := time.Now()
	if s.backoff.blocks(now) {
		return nil, app.unavailable(s.backoff.last, s.backoff.until)
	}
	leave, refusal := app.admit(now)
	if refusal != nil {
		return nil, refusal
	}
	f := &flight{grant: g, app: app, started: now, done: make(chan struct{})}
	if !s.cache.spawn(func() { s.run(f, leave) }) {
		return nil, errClosed
	}
	s.flight = f
	return f, nil
}

// run carries a mint out, and keeps its token unless what is asked for has
// changed since it began.
func (s *slot) run(f *flight, leave admission) {
	tok, err := f.app.mint(s.cache.ctx, leave, f.grant)
	if !s.cache.current(f.app) {
		f.app.close()
	}
	if news := s.land(f, tok, err); news != nil {
		f.app.log(f.grant, news)
	}
}

// land ends a flight with what came of it. A failure is returned if it is to be
// logged.
func (s *slot) land(f *flight, tok *token, err error) (news *mintError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(f.done)
	f.token, f.err, f.read = tok, err, new(atomic.Bool)
	if s.flight != f {
		return nil
	}
	s.flight = nil
	st := s.state.Load()
	if err == nil {
		cached := newCachedToken(tok, f.read, st.grant)
		if cached.schedule.phase(cached.left(time.Now())) != phaseSpent {
			s.backoff = backoff{}
			s.state.Store(&slotState{st.grant, cached})
		} else {
			f.err = f.app.unavailable(overOnArrival(cached.schedule.lifetime), time.Time{})
		}
	}
	var failure *unavailable
	if errors.As(f.err, &failure) && (failure.concernsRequest() || err == nil) && s.cache.current(f.app) {
		if s.backoff.last == nil || s.backoff.last.class != failure.class {
			news = failure.mintError
		}
		s.backoff.fail(failure.mintError, f.started, time.Now(), rand.Float64())
		failure.next = s.backoff.until
	}
	s.plan()
	return news
}

// overOnArrival is the failure of a mint whose token may not be served any more.
func overOnArrival(lifetime time.Duration) *mintError {
	return &mintError{class: classExpiredOnArrival, reason: "the token's life of " + lifetime.String() + " was over when it arrived"}
}

// adopt makes g what the slot goes by, unless it knows a newer grant: then it is
// false. A token stays when it serves g too, and so does a mint under way. The
// caller holds s.mu.
func (s *slot) adopt(g *grant) bool {
	st := s.state.Load()
	switch {
	case st == nil:
		s.state.Store(&slotState{grant: g})
		return true
	case st.grant.same(g):
		return true
	case g.olderThan(st.grant):
		return false
	}
	// Whoever wrote the role or config has perhaps mended what failed.
	s.backoff = backoff{}
	next := &slotState{grant: g}
	if st.grant.sharesTokens(g) {
		if st.token != nil {
			next.token = newCachedToken(st.token.token, st.token.read, g)
		}
	} else {
		s.flight = nil
	}
	s.state.Store(next)
	s.plan()
	return true
}

// put makes tok the slot's token under g, unless the slot knows a newer grant.
func (s *slot) put(g *grant, tok *cachedToken) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errEvicted
	}
	if s.adopt(g) {
		s.flight = nil // it began before, so that its token is an older one
		s.backoff = backoff{}
		s.state.Store(&slotState{g, tok})
		s.plan()
	}
	return nil
}

// wait waits for the mint: to its end, or, while the old token would do, until
// patience is over, when it is false.
func (f *flight) wait(ctx, closing context.Context, old *cachedToken) (done bool, err error) {
	var impatient <-chan time.Time
	if old != nil {
		now := time.Now()
		if good := old.left(now) - old.schedule.floor; good > 0 {
			timer := time.NewTimer(min(good, patience-now.Sub(f.started)))
			defer timer.Stop()
			impatient = timer.C
		}
	}
	select {
	case <-f.done:
		return true, nil
	case <-impatient:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	case <-closing.Done():
		return false, errClosed
	}
}

// arrived serves the token of a mint that succeeded.
func (s *slot) arrived(f *flight, g *grant, old *cachedToken, minTTL time.Duration) (served, error) {
	st := s.state.Load()
	tok := st.token
	if tok == nil || tok.token != f.token || !st.grant.same(g) {
		tok = newCachedToken(f.token, f.read, g)
	}
	now := time.Now()
	left := tok.left(now)
	schedule := tok.scheduleFor(minTTL)
	if schedule.phase(left) == phaseSpent {
		return served{}, f.app.unavailable(overOnArrival(schedule.lifetime), time.Time{})
	}
	how := outcomeMinted
	if old != nil && old.schedule.phase(old.left(now)) != phaseSpent {
		how = outcomeRefreshed
	}
	return tok.serve(schedule, left, how), nil
}

// fallBack serves the old token, or the failure when there is none to serve.
func (s *slot) fallBack(old *cachedToken, minTTL time.Duration, failure *unavailable) (served, error) {
	if answer, ok := old.stale(minTTL, failure); ok {
		return answer, nil
	}
	return served{}, failure
}

// stale serves an old token, if there is one that may still be served.
func (t *cachedToken) stale(minTTL time.Duration, failure *unavailable) (served, bool) {
	if t == nil {
		return served{}, false
	}
	schedule, left := t.scheduleFor(minTTL), t.left(time.Now())
	if schedule.phase(left) == phaseSpent {
		return served{}, false
	}
	answer := t.serve(schedule, left, outcomeStale)
	answer.failure = failure
	return answer, true
}

// remembered is how long after its end a back-off is remembered that no token
// outlives, so that the next failure doubles it.
const remembered = 5 * time.Minute

// plan sets the timer for what is due next: a new token when the old reaches
// its refresh point, or, past that, when a back-off ends; without a token, the end
// of the slot. The caller holds s.mu.
func (s *slot) plan() {
	st := s.state.Load()
	if s.closed || st == nil {
		return
	}
	now := time.Now()
	if st.token == nil {
		if s.flight == nil {
			s.wakeIn(s.nextTry(st.grant, now).Sub(now) + remembered)
		}
		return
	}
	wait := st.token.left(now) - st.token.schedule.refresh
	if wait <= 0 {
		wait = s.nextTry(st.grant, now).Sub(now)
	}
	s.wakeIn(wait)
}

// nextTry is when a mint that is due may be tried: now, or when the back-off
// that is in its way ends. The caller holds s.mu.
func (s *slot) nextTry(g *grant, now time.Time) time.Time {
	next := now
	if s.backoff.until.After(next) {
		next = s.backoff.until
	}
	s.cache.mu.RLock()
	app := s.cache.applications[g.config.name]
	s.cache.mu.RUnlock()
	if app != nil {
		app.mu.Lock()
		defer app.mu.Unlock()
		if app.backoff.until.After(next) {
			next = app.backoff.until
		}
	}
	return next
}

// wakeIn has wake called after that time. The caller holds s.mu.
func (s *slot) wakeIn(wait time.Duration) {
	if s.closed {
		return
	}
	wait = max(wait, 0)
	if s.timer == nil {
		s.timer = time.AfterFunc(wait, func() { s.cache.spawn(s.wake) })
		return
	}
	s.timer.Reset(wait)
}

// wake does what is due without a reader: it mints the next token if this one
// was read, and drops the slot when its token is spent or there is none.
func (s *slot) wake() {
	st := s.state.Load()
	if st.token == nil {
		s.retire(st)
		return
	}
	tok := st.token
	now := time.Now()
	left := tok.left(now)
	switch {
	case tok.schedule.phase(left) == phaseSpent:
		s.retire(st)
		return
	case tok.schedule.phase(left) == phaseFresh, !tok.read.Load():
		// Too early (the settings changed, or the clock), or nobody reads it.
		until := left - tok.schedule.refresh
		if until <= 0 {
			until = left - tok.schedule.floor
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.state.Load() == st { // else what is new has its own time
			s.wakeIn(until)
		}
		return
	}

	g, err := s.cache.lookUp(st.grant)
	switch {
	case err != nil: // storage failed: try again before long
		s.later(time.Second)
		return
	case g == nil: // the role or its config is gone, or asks for something else
		s.retire(st)
		return
	}
	app, err := s.cache.application(g.config)
	if err != nil {
		s.later(time.Second)
		return
	}
	select {
	case s.cache.ahead <- struct{}{}:
	default:
		s.later(time.Second/10 + rand.N(time.Second))
		return
	}
	f, err := s.ahead(g, app)
	if f != nil {
		select {
		case <-f.done:
		case <-s.cache.ctx.Done():
		}
	} else if err != nil {
		s.later(time.Second)
	}
	<-s.cache.ahead
}

// ahead starts the mint that wake found due, unless it turns out not to be.
func (s *slot) ahead(g *grant, app *application) (*flight, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || !s.adopt(g) {
		return nil, nil
	}
	tok := s.state.Load().token
	if tok == nil || tok.schedule.phase(tok.left(time.Now())) == phaseFresh {
		return nil, nil
	}
	return s.mint(g, app)
}

// later has wake called again, after a back-off if there is one, and after wait
// in any case.
func (s *slot) later(wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.state.Load(); st != nil {
		now := time.Now()
		wait = max(wait, s.nextTry(st.grant, now).Sub(now))
	}
	s.wakeIn(wait)
}

// retire drops the slot with the token it had in st, unless something has
// happened to it since, or still has to be remembered.
func (s *slot) retire(st *slotState) {
	s.mu.Lock()
	if s.state.Load() != st || s.flight != nil {
		s.mu.Unlock()
		return
	}
	if wait := time.Until(s.backoff.until.Add(remembered)); wait > 0 && s.backoff.failures > 0 {
		s.wakeIn(wait)
		s.mu.Unlock()
		return
	}
	s.stop()
	s.mu.Unlock()
	s.cache.remove(s)
}

// drop frees the slot, unless it has gone on from st.
func (s *slot) drop(st *slotState) {
	s.mu.Lock()
	if s.state.Load() != st {
		s.mu.Unlock()
		return
	}
	s.stop()
	s.mu.Unlock()
	s.cache.remove(s)
}

// close stops the slot's timer for good. Readers that wait for its mint still
// get the token.
func (s *slot) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stop()
}

// stop is close for a caller who holds s.mu.
func (s *slot) stop() {
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

// lookUp brings a grant up to date: its role and config as they are now. It is
// nil when either is gone, or the role no longer allows the scopes.
func (c *tokenCache) lookUp(g *grant) (*grant, error) {
	role, err := c.roles.get(c.ctx, c.storage, g.role.name)
	if err != nil || role == nil {
		return nil, err
	}
	config, err := c.configs.get(c.ctx, c.storage, role.entry.Config)
	if err != nil || config == nil {
		return nil, err
	}
	if role == g.role && config == g.config {
		return g, nil
	}
	now := &grant{role: role, config: config, scopes: g.scopes, narrowed: g.narrowed}
	if !now.sharesTokens(g) {
		return nil, nil
	}
	if g.narrowed == "" {
		now.scopes = role.entry.Scopes
	}
	return now, nil
}
