// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"math"
	"slices"
	"sort"
	"time"
)

// This file decides when the next request may leave: arithmetic over times and answers,
// without a clock, a queue, or a lock.

const (
	firstRate   = 5.0      // requests a second, before any answer
	slowestRate = 1.0 / 30 // requests a second, however often the endpoint throttles

	// An answer adds to the rate: a whole request a second up to what was safe at the
	// last cut, and very little above that, even less if those that wait have time. It
	// adds more again, up to a whole request, the further above the cut its request left:
	// then the endpoint allows more than it did.
	steepStep = 1.0
	probeStep = 0.02
	creepStep = 0.001

	safe      = 0.9 // of what left in the second of the cut
	wellAbove = 1.1 // times what left in the second of the cut

	// Requests that leave within steadyFor of a cut do not raise the rate above what was
	// safe. Nor do those that leave within steadyClosed times as long as the cut kept the
	// gate closed. So few requests are refused however long an excess stays unnoticed,
	// and the gate is closed for a small part of the time.
	steadyFor    = 3 * time.Second
	steadyClosed = 15

	// After recoverAfter without a 429, the rate is at least recoveredRate, whether or
	// not requests were sent: a past refusal is not held against the endpoint forever.
	recoverAfter  = time.Minute
	recoveredRate = 1.0

	// backlog is how long requests that have time must wait before the rate grows for
	// them. So the rate becomes what they need, not what the endpoint allows.
	backlog = 10 * time.Second

	longestRetryAfter = 10 * time.Minute

	// window is the second of the limit and a little more: requests that leave a second
	// apart may arrive closer together, and the endpoint counts arrivals.
	window = time.Second + 50*time.Millisecond

	// maxLate is how much of a delay of the process is made up for.
	maxLate = 50 * time.Millisecond

	// echo is how long after a cut the endpoint's second still contains requests that
	// left before it.
	echo = time.Second + 100*time.Millisecond
)

// pace is how fast requests leave.
type pace struct {
	limit int     // requests a second, at most
	rate  float64 // requests a second, now

	cutAt   time.Time // zero if never
	cutFrom float64   // requests a second that left when the endpoint throttled
	steady  time.Time // earlier requests do not raise the rate above the safe share of cutFrom
	refused time.Time // when the last 429 arrived

	closed time.Time   // nothing leaves before, because the endpoint asked for it
	last   time.Time   // when the last request left, or should have left
	left   []time.Time // when the requests of the last window left, oldest first
}

// departure is what the pace must know of a request when its answer arrives.
type departure struct {
	at       time.Time
	rate     float64 // when it left
	inSecond int     // requests that left in the second up to it, including itself
}

// demand is how urgently requests wait for their turn.
type demand struct {
	waiting int
	hurts   bool // waiting hurts someone
}

func newPace(limit int) pace {
	limit = max(limit, 1)
	return pace{limit: limit, rate: min(firstRate, float64(limit)), cutFrom: math.Inf(1)}
}

// setLimit changes the limit. If it becomes higher, the rate grows with the next answers.
func (p *pace) setLimit(limit int) {
	p.limit = max(limit, 1)
	p.rate = min(p.rate, float64(p.limit))
}

// recover raises the rate to the minimum for the time since the last 429.
func (p *pace) recover(now time.Time) {
	if p.rate < recoveredRate && now.Sub(p.refused) >= recoverAfter {
		p.rate, p.cutFrom = recoveredRate, max(p.cutFrom, recoveredRate)
	}
}

// opens is the earliest time at which the next request may leave. It may be in the past.
func (p *pace) opens() time.Time {
	at := p.closed
	if p.last.IsZero() { // the first request
		return at
	}
	at = latest(at, p.last.Add(max(interval(p.rate), window/time.Duration(p.limit)+1)))
	if n := len(p.left); n >= p.limit { // the limit was lowered
		at = latest(at, p.left[n-p.limit].Add(window))
	}
	return at
}

func interval(rate float64) time.Duration {
	return time.Duration(math.Ceil(float64(time.Second) / rate))
}

// leave records that a request leaves now that has been ready since ready. If a busy
// machine delays it, later requests are not delayed, up to maxLate.
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

// answered records an answer other than a 429. The rate grows only while it is needed and
// used: while waiting hurts someone, or more requests wait than leave within backlog, and
// at least half of the rate left in the last second (which is less than one request if
// the rate is below two).
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

// throttled records a 429. If its request left after the last cut, the rate is cut again.
// If not, it says nothing about the present rate, but it takes back what an answer added
// since: while 429s outnumber answers, the rate does not grow.
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
// in which two requests leave, or since a cut that still counts.
func (p *pace) isThrottled(now time.Time) bool {
	return !p.refused.IsZero() && (now.Before(p.steady) || now.Sub(p.refused) < 2*interval(p.rate))
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
