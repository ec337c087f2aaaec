// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"math"
	"slices"
	"sort"
	"time"
)

// This file decides when the next request may leave: arithmetic over times and
// answers, without a clock, a queue or a lock.

const (
	firstRate   = 5.0      // requests a second, before any answer
	slowestRate = 1.0 / 30 // requests a second, however often the endpoint throttles

	// An answer adds to the rate: a whole request a second up to what was safe at
	// the last cut, and very little beyond that, the less when those who wait have
	// time. It adds more again, up to a whole one, as far as its request left well
	// above the cut: then the endpoint allows more than it did.
	steepStep = 1.0
	probeStep = 0.02
	creepStep = 0.001

	safe      = 0.9 // of what left in the second of the cut
	wellAbove = 1.1 // times what left in the second of the cut

	// Requests that leave within steadyFor of a cut do not make the rate exceed
	// what was safe, nor those that leave within steadyClosed times as long as the
	// cut kept the gate closed. So little is refused however long an excess goes
	// unnoticed, and the gate is closed for a small part of the time.
	steadyFor    = 3 * time.Second
	steadyClosed = 15

	// After recoverAfter without a 429 the rate is at least recoveredRate, whoever asked
	// meanwhile: what an endpoint refused to all is not held against it for ever.
	recoverAfter  = time.Minute
	recoveredRate = 1.0

	// backlog is how long those who have time have to wait before the rate grows
	// for their sake. So it becomes what they need, not what the endpoint allows.
	backlog = 10 * time.Second

	longestRetryAfter = 10 * time.Minute

	// window is the second of the limit and a little more: requests that leave a
	// second apart may arrive closer together, and the endpoint counts arrivals.
	window = time.Second + 50*time.Millisecond

	// maxLate is how much of a delay of the process is made up for.
	maxLate = 50 * time.Millisecond

	// echo is how long after a cut the endpoint's second still holds requests
	// that left before it.
	echo = time.Second + 100*time.Millisecond
)

// pace is how fast requests leave.
type pace struct {
	limit int     // requests a second, at most
	rate  float64 // requests a second, now

	cutAt   time.Time // zero: never
	cutFrom float64   // requests a second that left when the endpoint throttled
	steady  time.Time // requests from before do not make the rate exceed the safe share of that
	refused time.Time // when the last 429 came

	closed time.Time   // until then nothing leaves: the endpoint asked for it
	last   time.Time   // when the last request left, or should have
	left   []time.Time // when those of the last window left, oldest first
}

// departure is what the pace has to know of a request when its answer comes.
type departure struct {
	at       time.Time
	rate     float64 // that it left at
	inSecond int     // requests that left in the second up to it, itself included
}

// demand is how badly requests wait for their turn.
type demand struct {
	waiting int
	hurts   bool // somebody is hurt by the waiting
}

func newPace(limit int) pace {
	limit = max(limit, 1)
	return pace{limit: limit, rate: min(firstRate, float64(limit)), cutFrom: math.Inf(1)}
}

// setLimit changes the limit. When it becomes higher, the rate grows by itself.
func (p *pace) setLimit(limit int) {
	p.limit = max(limit, 1)
	p.rate = min(p.rate, float64(p.limit))
}

// recover makes the rate what it is at least so long after the last 429.
func (p *pace) recover(now time.Time) {
	if p.rate < recoveredRate && now.Sub(p.refused) >= recoverAfter {
		p.rate, p.cutFrom = recoveredRate, max(p.cutFrom, recoveredRate)
	}
}

// opens is the earliest time at which the next request may leave. It may be in
// the past.
func (p *pace) opens() time.Time {
	at := p.closed
	if p.last.IsZero() { // the first
		return at
	}
	at = latest(at, p.last.Add(max(interval(p.rate), window/time.Duration(p.limit)+1)))
	if n := len(p.left); n >= p.limit { // after the limit has become lower
		at = latest(at, p.left[n-p.limit].Add(window))
	}
	return at
}

func interval(rate float64) time.Duration {
	return time.Duration(math.Ceil(float64(time.Second) / rate))
}

// leave records that a request leaves now that has been ready since then. If a
// busy machine lets it leave late, that does not slow down those after it, up to
// maxLate.
func (p *pace) leave(now, ready time.Time) departure {
	due := p.opens()
	begin := now.Add(-window)
	old := sort.Search(len(p.left), func(i int) bool { return p.left[i].After(begin) })
	p.left = append(slices.Delete(p.left, 0, old), now)
	p.last = latest(latest(due, ready), now.Add(-maxLate))
	return departure{at: now, rate: p.rate, inSecond: p.inSecond(now)}
}

// inSecond is how many requests left in the second up to now.
func (p *pace) inSecond(now time.Time) int {
	begin := now.Add(-time.Second)
	return len(p.left) - sort.Search(len(p.left), func(i int) bool { return p.left[i].After(begin) })
}

// answered takes in an answer that is no 429. The rate grows only while it is
// needed and used: while waiting hurts somebody, or more wait than leave within
// backlog, and at least half of it has left in the last second (which is less
// than one request below two a second).
func (p *pace) answered(now time.Time, from departure, d demand) {
	needed := d.hurts || float64(d.waiting) > p.rate*backlog.Seconds()
	if !needed || float64(p.inSecond(now)) < math.Floor(p.rate/2) {
		return
	}
	switch {
	case p.rate < safe*p.cutFrom:
		p.rate = min(p.rate+steepStep, safe*p.cutFrom)
	case from.at.Before(p.steady):
	default:
		step := creepStep
		if d.hurts {
			step = probeStep
		}
		p.rate += min(max(step, from.rate/p.cutFrom-wellAbove), steepStep)
	}
	p.rate = min(p.rate, float64(p.limit))
}

// throttled takes in a 429. When its request left after the last cut, the rate
// is cut anew. If not, it says nothing of the rate in force, but it takes back
// what an answer has added since: as long as the 429s outnumber the answers, the
// rate does not grow.
func (p *pace) throttled(now time.Time, d departure, retryAfter time.Duration) {
	p.close(now, retryAfter)
	p.refused = now
	if p.cutAt.IsZero() || d.at.After(p.cutAt.Add(echo)) {
		p.cutAt = now
		p.cutFrom = min(max(float64(d.inSecond), d.rate/2), d.rate)
		p.rate = min(max(p.cutFrom/2, slowestRate), float64(p.limit))
		p.steady = now.Add(steadyFor)
	} else if p.rate <= safe*p.cutFrom {
		p.rate = max(p.rate-steepStep, min(p.rate, p.cutFrom/2))
	}
	p.steady = latest(p.steady, p.cutAt.Add(steadyClosed*max(p.closed.Sub(p.cutAt), 0)))
}

// close keeps the gate closed for as long as the endpoint asked.
func (p *pace) close(now time.Time, retryAfter time.Duration) {
	if retryAfter > 0 {
		p.closed = latest(p.closed, now.Add(min(retryAfter, longestRetryAfter)))
	}
}

// isThrottled reports whether the endpoint throttled a short while ago: within the time
// in which two requests leave, or a cut is in force.
func (p *pace) isThrottled(now time.Time) bool {
	return !p.refused.IsZero() && (now.Before(p.steady) || now.Sub(p.refused) < 2*interval(p.rate))
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
