// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

const (
	// patience is how long a reader waits for a mint while the old token is still usable.
	patience = 2 * time.Second

	// demandPause is the shortest time between two mints that readers demand although the
	// cached token is fresh. No reader may drive the token endpoint.
	demandPause = 30 * time.Second

	// rememberFor is how long a failure is remembered after its back-off when there is no
	// token, so the next failure doubles the back-off. A key that fails alone is
	// remembered longer: once forgotten, it would back off its whole config again.
	rememberFor      = 5 * time.Minute
	rememberAloneFor = 24 * time.Hour
)

// errDemanded is for a reader that wants a newer token than the cached one too soon after
// another reader demanded one.
var errDemanded = fmt.Errorf("one was requested less than %s ago", demandPause)

// slot holds the token of one key: one role, or one scope subset of it, in one generation
// of role and config. Its key never changes. A slot mints the next token, one mint at a
// time, and frees itself when it has nothing left to keep.
type slot struct {
	cache *tokenCache
	key   slotKey

	// token is what readers get, or nil. It changes under mu.
	token atomic.Pointer[cachedToken]
	// unsure is set if the token is doubted or unannounced, so the next reader must not
	// rely on token alone. It changes under mu.
	unsure atomic.Bool

	mu      sync.Mutex // never held across I/O
	spec    *spec      // role and config as last seen
	flight  *flight    // the mint in progress, or nil
	backoff backoff    // for failures that concern only this key
	history history
	timer   *time.Timer
	// demanded is when a reader last demanded a newer token than a fresh one.
	demanded time.Time
	// look is the storage look-up in progress, or nil. lookedAt is when the last one
	// began. A node that may write needs no second look-up, since no other node writes.
	// After a failed look-up, lookAgain is when to try the next one; otherwise it is
	// zero.
	look      *look
	lookedAt  time.Time
	lookAgain time.Time
	// saved is the token that is in storage or being written there, or nil.
	saved *cachedToken
	// doubted and unannounced matter on a standby: storage may hold another token by now,
	// and the active node does not know yet that this token is read.
	doubted, unannounced bool
	freed                bool
	// prepared is set until the role that the slot is for is saved.
	prepared bool
}

// flight is one mint. Once its request has left, it continues even if its readers give
// up.
type flight struct {
	spec    *spec
	up      *upstream
	leave   leave
	past    history
	turn    *turn
	started time.Time
	done    chan struct{} // closed when token and err are set

	// renews is set if the slot itself waits for the token. replaces is set if the token
	// replaces the cached one in any case. The slot's lock protects both.
	renews, replaces bool

	token *cachedToken
	err   error
}

// await answers a reader that found no fresh token. It joins or starts a mint, and serves
// the old token if the mint is slow or fails. The errors are those of tokenCache.await.
func (s *slot) await(ctx context.Context, q *query) (served, error) {
	deadline, _ := ctx.Deadline()
	for {
		if answer, ok, err := s.restored(ctx, q); ok || err != nil {
			return answer, err
		}
		f, waiter, err := s.board(q, deadline)
		old := s.held(&q.spec)
		switch {
		case errors.Is(err, errOutdated):
			return served{}, err
		case err != nil:
			if answer, ok := old.stale(q, err, s.cache.random); ok {
				return answer, nil
			}
			var refusal *unavailable
			if !errors.As(err, &refusal) || refusal.probe == nil {
				return served{}, err
			}
			// Another mint is finding out whether the outage is over.
			if err := s.cache.waitForProbe(ctx, refusal, q.arrived); err != nil {
				return served{}, err
			}
		case f == nil:
			if answer, ok := old.hit(q, s.cache.random); ok {
				return answer, nil
			}
		case waiter == nil: // the mint was just abandoned
			if err := s.cache.wait(ctx, f.done, nil, f.up); err != nil {
				return served{}, err
			}
		default:
			over, err := s.cache.waitFor(ctx, f, waiter, old)
			waiter.Leave()
			if !over && err == nil {
				return s.arrived(f, q, old)
			}
			if answer, ok := old.stale(q, err, s.cache.random); ok {
				return answer, nil
			}
			if !over {
				return served{}, err
			}
		}
	}
}

// board returns the mint that a reader should wait for, starts one if needed, and joins
// its turn. It returns neither a mint nor an error if the cached token is fresh. The
// error says why no mint may start.
func (s *slot) board(q *query, deadline time.Time) (*flight, *gate.Waiter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed {
		return nil, nil, errOutdated
	}
	now := time.Now()
	old := s.held(&q.spec)
	fresh := old.fresh(q.minTTL, now)
	refused := old.usable(now) && !old.isAfter(q.mintedAfter)
	switch {
	case fresh && !refused:
		return nil, nil, nil
	case fresh && s.flight == nil && now.Sub(s.demanded) < demandPause:
		return nil, nil, errDemanded
	}
	if old != nil {
		old.markUsed() // so the next one is minted automatically if this mint fails
	}
	s.spec = &q.spec
	f, err := s.start(now)
	if err != nil {
		s.next()
		return nil, nil, err
	}
	hurts := q.arrived
	if old.usable(now) {
		hurts = old.hurtsAt()
		if old.phase(now) == lifetime.Due {
			f.renew(old)
		}
	}
	if refused {
		f.replaces, s.demanded = true, now
		f.renew(old) // continues without the reader, because no one may demand again so soon
	}
	waiter, _ := f.turn.Join(deadline, hurts)
	return f, waiter, nil
}

// renew lets a mint continue without readers, because old is about to expire or was
// refused. The caller holds the slot's lock.
func (f *flight) renew(old *cachedToken) {
	if !f.renews {
		_, f.renews = f.turn.Join(time.Time{}, old.hurtsAt())
	}
}

// held returns the slot's token as served for spec, or nil.
func (s *slot) held(spec *spec) *cachedToken {
	if tok := s.token.Load(); tok != nil {
		return tok.under(spec)
	}
	return nil
}

// start joins the mint in progress or starts one if allowed. The caller holds s.mu.
func (s *slot) start(now time.Time) (*flight, error) {
	if s.flight != nil {
		return s.flight, nil
	}
	up, err := s.cache.upstream(s.spec.config)
	if err != nil {
		return nil, err
	}
	if s.backoff.blocks(now) {
		return nil, &unavailable{mintError: s.backoff.last, config: up.config.name, next: s.backoff.until}
	}
	leave, err := up.admit(s.key, now)
	if err != nil {
		return nil, err
	}
	f := s.cache.newFlight(s.spec, up, leave, s.history)
	if !s.cache.spawn(func() { s.fly(f) }) {
		up.settle(leave, nil)
		return nil, errClosed
	}
	s.flight = f
	return f, nil
}

// fly carries out a mint.
func (s *slot) fly(f *flight) {
	tok, err := s.cache.mint(f)
	news := s.land(f, tok, err)
	if news != nil {
		f.up.log(f.spec, news)
	}
	if err == nil { // its readers have their answers
		ctx, cancel := s.cache.background()
		defer cancel()
		s.cache.save(ctx, s)
	}
}

// land ends a flight, keeps its token, and records its failure. It returns a failure that
// must be logged.
func (s *slot) land(f *flight, tok *cachedToken, err error) (news *mintError) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(f.done)
	s.flight = nil
	now := time.Now()
	f.token, f.err = tok, err
	if err == nil {
		f.token, f.err = s.keep(tok.under(s.spec), f, now)
	}
	var (
		failure *unavailable
		late    *noTurnError
	)
	if errors.As(f.err, &failure) && s.cache.isCurrent(f.up) {
		if err != nil && !failure.unasked {
			s.history = history{failedAt: now, alone: failure.alone}
		}
		if failure.keyOnly {
			if s.backoff.last == nil || s.backoff.last.class != failure.class {
				news = failure.mintError
			}
			s.backoff.fail(failure.mintError, f.started, now, s.cache.random())
			if failure.class == classNothingNewer {
				// MojoAuth works: a reader that finds the cached token expired may try.
				s.backoff.endBy(s.token.Load().servableUntil(), now)
			}
			failure.next = s.backoff.until
		}
	}
	if s.key.narrowed != "" && !s.cache.narrowed.has(s) {
		s.free() // it was kept only for its mint
	}
	if errors.As(err, &late) && !s.freed {
		s.wakeIn(late.ComeBack) // others are more urgent now
		return nil
	}
	s.next()
	return news
}

// keep makes tok, which f brought, the slot's token unless it renews nothing: of two
// tokens, the one that can be served longer stays. The caller holds s.mu.
func (s *slot) keep(tok *cachedToken, f *flight, now time.Time) (*cachedToken, error) {
	old := s.held(s.spec)
	s.history = history{}
	var failed *mintError
	switch {
	case old != nil && old.accessToken == tok.accessToken:
		failed = repeats(old)
		old = old.repeatedBy(tok)
	case old.usable(now) && !f.replaces && !tok.servableUntil().After(old.servableUntil()):
		failed = &mintError{class: classNothingNewer, reason: fmt.Sprintf("the new token, which expires at %s, can be served no longer than the cached one", formatTime(tok.endsAt))}
	default:
		s.backoff = backoff{}
		s.token.Store(tok)
		return tok, nil
	}
	s.token.Store(old)
	old.use.Add(-1) // do not renew an idle role's token again and again
	return old, &unavailable{mintError: failed, config: f.up.config.name, keyOnly: true}
}

// repeats is the failure of a mint that returned the cached token again.
func repeats(old *cachedToken) *mintError {
	return &mintError{class: classNothingNewer, reason: "it returned the same token as at " + formatTime(old.mintedAt)}
}

// arrived answers a reader after the mint that it waited for.
func (s *slot) arrived(f *flight, q *query, old *cachedToken) (served, error) {
	now := time.Now()
	if errors.Is(f.err, errOutdated) {
		return served{}, f.err
	}
	if f.err != nil {
		if answer, ok := s.held(&q.spec).stale(q, f.err, s.cache.random); ok {
			return answer, nil
		}
		if s.cache.outdated(&q.spec, f.up) {
			return served{}, errOutdated // a later write overrides an earlier failure
		}
		return served{}, f.err
	}
	tok := f.token.under(&q.spec)
	if !tok.usable(now) {
		return served{}, &unavailable{mintError: expiredOnArrival(tok), config: f.up.config.name}
	}
	how := outcomeMinted
	if old.usable(now) {
		how = outcomeRefreshed
	}
	return tok.serve(tok.scheduleFor(q.minTTL), tok.timeLeft(now), how, s.cache.random), nil
}

// next decides what the slot does without a reader; nothing else does. It starts a mint
// that is due, sets the timer for when something may be due, or frees the slot. It must
// be called after anything that may change the decision. The caller holds s.mu.
func (s *slot) next() {
	if s.freed || s.flight != nil {
		return // land calls it again
	}
	s.catchUp()
	now := time.Now()
	tok := s.token.Load()
	switch {
	case !tok.usable(now):
		s.unsave()
		if until := s.rememberUntil(); now.Before(until) {
			s.wakeIn(until.Sub(now))
		} else {
			s.free()
		}
	case s.cache.relies(s.spec):
		s.wakeIn(tok.timeLeft(now) - tok.schedule.Floor) // the active node renews
	case tok.renewIn(now) > 0:
		s.wakeIn(tok.renewIn(now))
	case !tok.inUse() && tok.phase(now) == lifetime.Fresh: // it may still be read
		s.wakeIn(tok.timeLeft(now) - tok.schedule.Refresh)
	case !tok.inUse(): // unread, it expires
		s.wakeIn(tok.timeLeft(now) - tok.schedule.Floor)
	default:
		s.renew(tok, now)
	}
}

// catchUp makes the slot use the role and config in memory. A reader may bring older ones
// that were replaced before it reached the slot. The caller holds s.mu.
func (s *slot) catchUp() {
	role, config := s.cache.roles.current(s.key.role), s.cache.configs.current(s.key.config)
	if s.spec == nil || role == nil || config == nil || role == s.spec.role && config == s.spec.config {
		return
	}
	now := &spec{role: role, config: config, scopes: s.spec.scopes, narrowed: s.spec.narrowed}
	if now.key() != s.key {
		return // it is about to be freed, or prepared for what is not saved yet
	}
	s.spec = now
	if tok := s.token.Load(); tok != nil {
		s.token.Store(tok.under(now))
	}
}

// rememberUntil is when the slot forgets its failures, and that storage had no token. The
// caller holds s.mu.
func (s *slot) rememberUntil() time.Time {
	if s.history.alone {
		return s.history.failedAt.Add(rememberAloneFor)
	}
	last := latest(s.history.failedAt, s.lookedAt)
	if s.backoff.failures > 0 {
		last = latest(last, s.backoff.until)
	}
	return last.Add(rememberFor)
}

// renew starts the mint of the next token with no reader waiting, or sets the timer for
// the next attempt. The caller holds s.mu.
func (s *slot) renew(tok *cachedToken, now time.Time) {
	role, config := s.cache.roles.current(s.key.role), s.cache.configs.current(s.key.config)
	if role == nil || config == nil { // deleted, or about to be loaded
		s.wakeIn(time.Second)
		return
	}
	spec := &spec{role: role, config: config, scopes: s.spec.scopes, narrowed: s.spec.narrowed}
	if spec.key() != s.key {
		s.free()
		return
	}
	s.spec = spec
	f, err := s.start(now)
	if err == nil {
		f.renew(tok)
		return
	}
	wait := time.Second
	var refusal *unavailable
	if errors.As(err, &refusal) && refusal.probe == nil {
		wait = refusal.next.Sub(now)
		if refusal.yields {
			wait += precedence / 2
		}
	}
	s.wakeIn(wait)
}

// wakeIn schedules next after wait plus up to a millisecond, so slots that were minted
// together do not wake together. The caller holds s.mu.
func (s *slot) wakeIn(wait time.Duration) {
	wait = max(wait, time.Millisecond) + lifetime.Share(time.Millisecond, s.cache.random())
	if s.timer == nil {
		s.timer = time.AfterFunc(wait, func() { s.cache.spawn(s.wake) })
		return
	}
	s.timer.Reset(wait)
}

func (s *slot) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next()
}

// written updates the slot after a write of its role or config. The write may have fixed
// the cause of a failure.
func (s *slot) written(change func(spec) spec) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed || s.spec == nil { // without a spec, its first reader is about to set one
		return
	}
	now := change(*s.spec)
	s.spec, s.prepared = &now, false
	s.backoff, s.history = backoff{}, history{}
	if !s.cache.relies(&now) { // storage no longer matters
		s.doubted, s.unannounced = false, false
		s.unsure.Store(false)
	}
	if tok := s.token.Load(); tok != nil {
		s.token.Store(tok.under(&now))
	}
	s.next()
}

// evict frees the slot. If a mint is in progress, land frees it, so a key never has two
// mints.
func (s *slot) evict() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.flight == nil {
		s.free()
	}
}

// outdate frees the slot after a change to another key, unless the slot was prepared for
// a change to come.
func (s *slot) outdate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.prepared {
		s.free()
	}
}

// drop frees the slot. Readers that wait for its mint still get the token.
func (s *slot) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free()
}

// free removes the slot from the cache for good. The caller holds s.mu.
func (s *slot) free() {
	s.freed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.flight != nil {
		s.flight.turn.interrupt(errOutdated)
	}
	s.cache.remove(s)
}

// succeeded clears the key's failures after a rotation succeeded.
func (s *slot) succeeded() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history = history{}
}

// past returns what the slot knows of the key's failures.
func (s *slot) past() history {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.history
}
