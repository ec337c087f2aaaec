// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

const (
	shortestBackoff = 5 * time.Second
	longestBackoff  = 30 * time.Second
)

// backoff remembers the last failure and when the next attempt is allowed. The zero value
// has no failure. It has no lock of its own.
type backoff struct {
	failures int // consecutive
	last     *mintError
	failedAt time.Time
	until    time.Time
}

// blocks reports whether an attempt at now is too early.
func (b *backoff) blocks(now time.Time) bool { return now.Before(b.until) }

// fail records the failure of a mint that started at started. Mints that were in progress
// together when the outage began count as one failure. random is uniform in [0, 1).
func (b *backoff) fail(failed *mintError, started, now time.Time, random float64) {
	if b.failures == 0 || !started.Before(b.failedAt) {
		b.failures++
	}
	b.last, b.failedAt = failed, now
	// Subtract up to a fifth, so nodes that failed together do not return together.
	wait := min(longestBackoff, shortestBackoff<<min(b.failures-1, 10))
	b.until = now.Add(wait - lifetime.Share(wait/5, random))
}

// endBy shortens the back-off to end at at, if at lies ahead.
func (b *backoff) endBy(at, now time.Time) {
	if at.After(now) && at.Before(b.until) {
		b.until = at
	}
}

// succeed records the success of a mint that started at started. A mint that started
// before the last failure proves nothing about what came after.
func (b *backoff) succeed(started time.Time) {
	if b.failures > 0 && !started.Before(b.failedAt) {
		*b = backoff{}
	}
}
