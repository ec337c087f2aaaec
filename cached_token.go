// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"sync/atomic"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// repeatedFloor replaces the usual, higher floor of a token that MojoAuth returns again
// and again, because no other token is available.
const repeatedFloor = 5 * time.Second

// cachedToken is a token as served for a spec. It is immutable except for its use count.
// All that an answer needs is computed here once, not at each read.
type cachedToken struct {
	*token
	// use is above 0 while the token counts as in use: from its first read until MojoAuth
	// returned nothing newer that many times. All views of the token share it.
	use *atomic.Int32
	// repeatedUntil is when a token that MojoAuth returned again expires, never later
	// than the first answer said. It is zero for other tokens.
	repeatedUntil time.Time
	// restored is set for a token from storage. It counts as minted before everything
	// this process mints, whatever the clock of the node that minted it.
	restored bool
	// draw is the random number in [0, 1) that determines when the token is renewed.
	draw float64

	spec     *spec
	schedule lifetime.Schedule
	endsAt   time.Time
	assumed  bool     // MojoAuth reported no lifetime
	missing  []string // scopes that were requested but not granted
	common   tokenAnswer
}

// tokenAnswer holds the values that are the same in all answers for a token. They are
// interfaces, as in the answer's data, so a read does not allocate them.
type tokenAnswer struct {
	accessToken, tokenType, scope, expiresAt, expiresAtSeconds, rotationPeriod, lastVaultRotation any
}

func newCachedToken(tok *token, spec *spec, random float64) *cachedToken {
	return (&cachedToken{token: tok, use: new(atomic.Int32), draw: random}).view(spec)
}

// view returns the token as served for a spec.
func (t *cachedToken) view(spec *spec) *cachedToken {
	role := &spec.role.entry
	life := lifetime.Effective(t.reported, role.MaxTTL)
	endsAt := t.mintedAt.Add(life)
	schedule := lifetime.New(life, role.MinTTL)
	if t.repeated() {
		schedule.Floor = min(schedule.Floor, repeatedFloor)
		if t.repeatedUntil.Before(endsAt) {
			endsAt = t.repeatedUntil
		}
	}
	return &cachedToken{
		token:         t.token,
		use:           t.use,
		repeatedUntil: t.repeatedUntil,
		restored:      t.restored,
		draw:          t.draw,
		spec:          spec,
		schedule:      schedule,
		endsAt:        endsAt,
		assumed:       t.reported <= 0 && role.MaxTTL <= 0,
		missing:       missingScopes(spec.scopes, t.scope),
		common: tokenAnswer{
			accessToken:       t.accessToken,
			tokenType:         t.tokenType,
			scope:             t.scope,
			expiresAt:         formatTime(endsAt),
			expiresAtSeconds:  endsAt.Unix(),
			rotationPeriod:    schedule.RotationPeriod(),
			lastVaultRotation: formatTime(t.mintedAt),
		},
	}
}

// same reports whether a and b are the same token with the same expiry, or both nil.
func (t *cachedToken) same(other *cachedToken) bool {
	if t == nil || other == nil {
		return t == other
	}
	return t.accessToken == other.accessToken && t.mintedAt.Equal(other.mintedAt) && t.repeatedUntil.Equal(other.repeatedUntil)
}

// repeated reports whether MojoAuth returned the token more than once.
func (t *cachedToken) repeated() bool { return !t.repeatedUntil.IsZero() }

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// under returns the token as served for another spec with the same key, which may have
// other settings.
func (t *cachedToken) under(spec *spec) *cachedToken {
	was, is := &t.spec.role.entry, &spec.role.entry
	if t.spec.role == spec.role || was.MinTTL == is.MinTTL && was.MaxTTL == is.MaxTTL {
		return t
	}
	return t.view(spec)
}

// repeatedBy returns the token after MojoAuth returned it again: its lifetime does not
// start over and can only become shorter.
func (t *cachedToken) repeatedBy(again *cachedToken) *cachedToken {
	repeated := *t
	repeated.repeatedUntil = t.endsAt
	// expires_in is in whole seconds: a difference below one is rounding
	if t.endsAt.Sub(again.endsAt) >= time.Second {
		repeated.repeatedUntil = again.endsAt
	}
	return repeated.view(again.spec)
}

// timeLeft is the time until the token expires. It uses whichever clock says less: the
// monotonic clock stops while a laptop sleeps, and the wall clock may be set back.
func (t *cachedToken) timeLeft(now time.Time) time.Duration {
	return min(t.endsAt.Sub(now), t.endsAt.Round(0).Sub(now.Round(0)))
}

// phase is the phase of the token's lifetime at now.
func (t *cachedToken) phase(now time.Time) lifetime.Phase { return t.schedule.Phase(t.timeLeft(now)) }

// usable reports whether there is a token that may be served at now.
func (t *cachedToken) usable(now time.Time) bool { return t != nil && t.phase(now) != lifetime.Spent }

// scheduleFor is the schedule for a reader that wants minTTL, which is at least the
// role's.
func (t *cachedToken) scheduleFor(minTTL time.Duration) lifetime.Schedule {
	if minTTL <= t.schedule.Refresh {
		return t.schedule
	}
	s := lifetime.New(t.schedule.Lifetime, minTTL)
	s.Floor = t.schedule.Floor
	return s
}

// servableUntil is when the token reaches its floor.
func (t *cachedToken) servableUntil() time.Time { return t.endsAt.Add(-t.schedule.Floor) }

// hurtsAt is when waiting for the next token begins to hurt: a minute before this token
// reaches its floor.
func (t *cachedToken) hurtsAt() time.Time { return t.servableUntil().Add(-time.Minute) }

// renewIn is the time from now until the next token should be requested, or 0 if it is
// due.
func (t *cachedToken) renewIn(now time.Time) time.Duration {
	return max(0, t.timeLeft(now)-t.schedule.Ahead(t.draw))
}

// fresh reports whether the token may be served at now to a reader that wants minTTL,
// without being due for renewal.
func (t *cachedToken) fresh(minTTL time.Duration, now time.Time) bool {
	return t != nil && t.scheduleFor(minTTL).Phase(t.timeLeft(now)) == lifetime.Fresh
}

// isAfter reports whether the token was minted after at, in whole seconds as shown to
// readers. It is true if at is zero.
func (t *cachedToken) isAfter(at time.Time) bool {
	return at.IsZero() || t.mintedAt.Unix() > at.Unix()
}

// hit serves the token if it is fresh and as new as the reader wants.
func (t *cachedToken) hit(q *query, random func() float64) (served, bool) {
	schedule, left := t.scheduleFor(q.minTTL), t.timeLeft(time.Now())
	if schedule.Phase(left) != lifetime.Fresh || !t.isAfter(q.mintedAfter) {
		return served{}, false
	}
	return t.serve(schedule, left, outcomeHit, random), true
}

// stale serves the old token if it is still usable. failure says why there is no new
// token; it is nil if the mint is slow. If storage has since brought a fresh token, that is
// a hit.
func (t *cachedToken) stale(q *query, failure error, random func() float64) (served, bool) {
	if !t.usable(time.Now()) {
		return served{}, false
	}
	if answer, ok := t.hit(q, random); ok {
		return answer, true
	}
	answer := t.serve(t.scheduleFor(q.minTTL), t.timeLeft(time.Now()), outcomeStale, random)
	answer.failure = failure
	return answer, true
}

// serve builds the answer to a read.
func (t *cachedToken) serve(schedule lifetime.Schedule, left time.Duration, how outcome, random func() float64) served {
	t.markUsed()
	answer := served{cachedToken: t, schedule: schedule, outcome: how, left: left}
	if how == outcomeStale {
		wait := lifetime.StaleWait(left, random())
		answer.ttl, answer.lease = lifetime.WholeSeconds(wait), wait
	} else {
		answer.ttl, answer.lease = schedule.TTL(left, random()), schedule.Lease(left)
	}
	return answer
}

// patienceForNewer is how often to request a newer token than one that is no longer read.
const patienceForNewer = 10

// markUsed records that the token is in use, so the next one is minted ahead of time.
func (t *cachedToken) markUsed() {
	if t.use.Load() != patienceForNewer { // load first: a write would slow down all readers
		t.use.Store(patienceForNewer)
	}
}

func (t *cachedToken) inUse() bool { return t.use.Load() > 0 }

// outcome is how a read was answered.
type outcome string

const (
	outcomeHit       outcome = "hit"       // the cached token
	outcomeRefreshed outcome = "refreshed" // a new token, although the old one was usable
	outcomeMinted    outcome = "minted"    // a new token
	outcomeRestored  outcome = "restored"  // the stored token
	outcomeForwarded outcome = "forwarded" // by the active node
	outcomeStale     outcome = "stale"     // the old token, because there was no new one
	outcomeError     outcome = "error"     // no token
)

// served is the answer to a read.
type served struct {
	*cachedToken
	schedule lifetime.Schedule
	outcome  outcome
	left     time.Duration // until the token expires
	ttl      int64         // seconds until the caller should read again
	lease    time.Duration // duration of a lease on the token, if it gets one
	failure  error         // for outcomeStale: the reason, or nil if a mint is slow
}
