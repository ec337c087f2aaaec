// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"sync/atomic"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// repeatedFloor is the floor of a token, below its usual one, that MojoAuth
// returns again and again: there is no other to be had.
const repeatedFloor = 5 * time.Second

// cachedToken is a token as it is served for a spec. It does not change, but for the
// note that it was read. What an answer needs is made here, once, and not at each read.
type cachedToken struct {
	*token
	// use is above 0 while the token counts as in use: since it was read, until
	// MojoAuth gave nothing newer that many times. All views of the token share it.
	use *atomic.Int32
	// repeatedUntil is when a token expires that MojoAuth has returned again, zero
	// for others. It is never later than what the first answer said.
	repeatedUntil time.Time
	// restored is set for a token that storage had: it was minted before all that this
	// process mints, whatever the clock of the node that minted it said.
	restored bool
	// draw is the random number, in [0, 1), of when the token is renewed.
	draw float64

	spec     *spec
	schedule lifetime.Schedule
	endsAt   time.Time
	assumed  bool     // MojoAuth reported no lifetime
	missing  []string // scopes that were requested and not granted
	common   tokenAnswer
}

// tokenAnswer is what all reads of a token are answered alike. The values are
// interfaces, as an answer's data holds them, so that a read does not allocate
// them anew.
type tokenAnswer struct {
	accessToken, tokenType, scope, expiresAt, expiresAtSeconds, rotationPeriod, lastVaultRotation any
}

func newCachedToken(tok *token, spec *spec, random float64) *cachedToken {
	return (&cachedToken{token: tok, use: new(atomic.Int32), draw: random}).view(spec)
}

// view is the token as it is served for a spec.
func (t *cachedToken) view(spec *spec) *cachedToken {
	role := &spec.role.entry
	life := lifetime.Effective(t.told, role.MaxTTL)
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
		assumed:       t.told <= 0 && role.MaxTTL <= 0,
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

// same reports whether both are one token, with the same end, or both none.
func (t *cachedToken) same(other *cachedToken) bool {
	if t == nil || other == nil {
		return t == other
	}
	return t.accessToken == other.accessToken && t.mintedAt.Equal(other.mintedAt) && t.repeatedUntil.Equal(other.repeatedUntil)
}

// repeated reports whether MojoAuth has returned the token more than once.
func (t *cachedToken) repeated() bool { return !t.repeatedUntil.IsZero() }

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// under is the token as it is served for a spec that has the same key: with other
// settings of the role, perhaps.
func (t *cachedToken) under(spec *spec) *cachedToken {
	was, is := &t.spec.role.entry, &spec.role.entry
	if t.spec.role == spec.role || was.MinTTL == is.MinTTL && was.MaxTTL == is.MaxTTL {
		return t
	}
	return t.view(spec)
}

// repeatedBy is the token after MojoAuth has returned it again: its life does not
// begin anew, and may only end sooner.
func (t *cachedToken) repeatedBy(again *cachedToken) *cachedToken {
	repeated := *t
	repeated.repeatedUntil = t.endsAt
	// expires_in has whole seconds: less than one is rounding.
	if t.endsAt.Sub(again.endsAt) >= time.Second {
		repeated.repeatedUntil = again.endsAt
	}
	return repeated.view(again.spec)
}

// timeLeft is how much of the token's life is left. Both clocks are asked, and the
// one that says less is believed: the monotonic one stands still while a laptop
// sleeps, and the wall clock may be set back.
func (t *cachedToken) timeLeft(now time.Time) time.Duration {
	return min(t.endsAt.Sub(now), t.endsAt.Round(0).Sub(now.Round(0)))
}

// phase is where in its life the token is at now.
func (t *cachedToken) phase(now time.Time) lifetime.Phase { return t.schedule.Phase(t.timeLeft(now)) }

// usable reports whether there is a token and it may be served at now.
func (t *cachedToken) usable(now time.Time) bool { return t != nil && t.phase(now) != lifetime.Spent }

// scheduleFor is the schedule for a reader who wants minTTL, which is never
// below the role's.
func (t *cachedToken) scheduleFor(minTTL time.Duration) lifetime.Schedule {
	if minTTL <= t.schedule.Refresh {
		return t.schedule
	}
	s := lifetime.New(t.schedule.Lifetime, minTTL)
	s.Floor = t.schedule.Floor
	return s
}

// servableUntil is when the token comes to its floor.
func (t *cachedToken) servableUntil() time.Time { return t.endsAt.Add(-t.schedule.Floor) }

// hurtsAt is when those who wait for the next token begin to be hurt by it: a minute
// before this one comes to its floor.
func (t *cachedToken) hurtsAt() time.Time { return t.servableUntil().Add(-time.Minute) }

// renewIn is how long after now the next token is to be asked for: 0 when it is time.
func (t *cachedToken) renewIn(now time.Time) time.Duration {
	return max(0, t.timeLeft(now)-t.schedule.Ahead(t.draw))
}

// fresh reports whether the token may be served at now to a reader who wants minTTL
// without a new one being due.
func (t *cachedToken) fresh(minTTL time.Duration, now time.Time) bool {
	return t != nil && t.scheduleFor(minTTL).Phase(t.timeLeft(now)) == lifetime.Fresh
}

// isAfter reports whether the token was minted after that time, by the whole seconds
// that are shown. It is, when the time is zero.
func (t *cachedToken) isAfter(at time.Time) bool {
	return at.IsZero() || t.mintedAt.Unix() > at.Unix()
}

// hit serves the token if it is fresh and as new as the reader wants it.
func (t *cachedToken) hit(q *query, random func() float64) (served, bool) {
	schedule, left := t.scheduleFor(q.minTTL), t.timeLeft(time.Now())
	if schedule.Phase(left) != lifetime.Fresh || !t.isAfter(q.mintedAfter) {
		return served{}, false
	}
	return t.serve(schedule, left, outcomeHit, random), true
}

// stale serves an old token, if there is one that may still be served. failure is
// why no new one could be had, nil when its mint is slow. A token that is fresh after
// all, since storage gave it meanwhile, is a hit.
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

// serve hands the token out.
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

// patienceForNewer is how often MojoAuth is asked for a newer token than one that
// nobody reads any more.
const patienceForNewer = 10

// markUsed notes that the token is in use, so that the next one is minted ahead.
func (t *cachedToken) markUsed() {
	if t.use.Load() != patienceForNewer { // loaded first: a write would slow all readers down
		t.use.Store(patienceForNewer)
	}
}

func (t *cachedToken) inUse() bool { return t.use.Load() > 0 }

// outcome is how a read was answered.
type outcome string

const (
	outcomeHit       outcome = "hit"       // the cached token
	outcomeRefreshed outcome = "refreshed" // a new token, though the old would have done
	outcomeMinted    outcome = "minted"    // a new token
	outcomeRestored  outcome = "restored"  // the token that storage has
	outcomeForwarded outcome = "forwarded" // by the active node
	outcomeStale     outcome = "stale"     // the old token, since no new one could be had
	outcomeError     outcome = "error"     // no token
)

// served is the answer to a read.
type served struct {
	*cachedToken
	schedule lifetime.Schedule
	outcome  outcome
	left     time.Duration // of the token's life
	ttl      int64         // seconds until the caller should read again
	lease    time.Duration // of a lease on the token, if it is to have one
	failure  error         // for outcomeStale: why, or nil when a mint is slow
}
