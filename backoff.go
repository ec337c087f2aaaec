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

// backoff remembers the last failure, and until when nothing is tried again.
// The zero value is one without a failure. It has no lock of its own.
type backoff struct {
	failures int // in a row
	last     *mintError
	failedAt time.Time
	until    time.Time
}

// blocks reports whether nothing may be tried at now.
func (b *backoff) blocks(now time.Time) bool { return now.Before(b.until) }

// fail takes in the failure of a mint that was started at that time. Mints that
// were under way together when the trouble began count as one failure. random
// is uniform in [0, 1).
func (b *backoff) fail(failed *mintError, started, now time.Time, random float64) {
	if b.failures == 0 || !started.Before(b.failedAt) {
		b.failures++
	}
	b.last, b.failedAt = failed, now
	// Up to a fifth is taken off, so that nodes that failed together do not
	// come back together.
	wait := min(longestBackoff, shortestBackoff<<min(b.failures-1, 10))
	b.until = now.Add(wait - lifetime.Share(wait/5, random))
}

// endBy has the back-off end at that time at the latest, if it is to come.
func (b *backoff) endBy(at, now time.Time) {
	if at.After(now) && at.Before(b.until) {
		b.until = at
	}
}

// succeed takes in the success of a mint that was started at that time. One
// that was started before the last failure says nothing about what came after.
func (b *backoff) succeed(started time.Time) {
	if b.failures > 0 && !started.Before(b.failedAt) {
		*b = backoff{}
	}
}
