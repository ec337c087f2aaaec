// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package gate paces the requests to one token endpoint, and orders waiting requests by
// when waiting begins to hurt.
//
// A mint takes a [Turn] for its request, waits for it, and reports the outcome of the
// request. Everyone who waits for the token joins the turn. When the last one leaves, the
// turn leaves the queue:
//
//	turn := g.Turn("reports", gate.Whole)
//	waiter, ok := turn.Join(deadline, time.Now())
//	...
//	pass, err := turn.Wait(ctx) // in the goroutine of the mint, before each attempt
//	...
//	pass.Done(gate.Throttled, retryAfter) // then Wait again: the turn keeps its rank
//
// No library does this. golang.org/x/time/rate neither adapts its rate nor orders its
// waiters. Libraries that adapt and have priorities, such as
// github.com/failsafe-go/failsafe-go, limit the requests in flight, not those in a second.
package gate

import (
	"errors"
	"fmt"
	"sync"
	"time"
)

// maxInFlight is the highest number of requests in flight.
const maxInFlight = 2000

var (
	// ErrClosed means that the gate was closed for good.
	ErrClosed = errors.New("the gate is closed")

	// ErrAbandoned means that the turn's last waiter left before its request did.
	ErrAbandoned = errors.New("nobody waits for this request any more")
)

// Clock is the source of a gate's time.
type Clock interface {
	Now() time.Time
	// AfterFunc calls f in its own goroutine after d unless stop is called before.
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

// Gate lets requests leave one after the other.
type Gate struct {
	clock Clock

	mu        sync.Mutex // never held across anything that blocks
	pace      pace
	queue     queue
	inFlight  int
	turns     uint64           // created so far
	deadlines ordered[*Waiter] // those with a deadline, earliest first
	alarm     func() bool      // stops the timer; nil if it is not running
	alarmAt   time.Time        // when the timer fires
	closed    bool             // for good
	sent      uint64           // requests that have left
	peaks     peaks
}

// New returns a gate that lets at most limit requests leave in any second. A nil clock is
// the system's.
func New(limit int, clock Clock) *Gate {
	if clock == nil {
		clock = systemClock{}
	}
	return &Gate{
		clock: clock,
		pace:  newPace(limit),
		queue: newQueue(),
		deadlines: ordered[*Waiter]{
			before: func(v, w *Waiter) bool { return v.deadline.Before(w.deadline) },
			index:  func(w *Waiter) *int { return &w.index },
		},
	}
}

// SetLimit changes how many requests may leave in a second, including those that wait.
func (g *Gate) SetLimit(limit int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pace.setLimit(limit)
	g.advance()
}

// Close turns away everyone, now and later. It does not affect requests in flight.
func (g *Gate) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for p := g.queue.all.first(); p != nil; p = g.queue.all.first() {
		g.turnAway(p, ErrClosed)
	}
	g.advance()
}

// Stats is the state of a gate at one moment.
type Stats struct {
	Waiting     int       // requests that wait
	InFlight    int       // requests in flight
	Sent        uint64    // requests that have left since the start
	Pace        float64   // requests a second allowed now
	Limit       int       // requests a second allowed at most
	Throttled   bool      // the endpoint throttled a short while ago
	ClosedUntil time.Time // nothing leaves before, because of a Retry-After; zero if it has passed
	Peak        int       // most requests in a second since the start
	PeakHour    int       // most requests in a second of the last hour
}

// Stats returns the state of the gate.
func (g *Gate) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.clock.Now()
	s := Stats{
		Waiting:   g.queue.turns,
		InFlight:  g.inFlight,
		Sent:      g.sent,
		Pace:      g.pace.rate,
		Limit:     g.pace.limit,
		Throttled: g.pace.isThrottled(now),
		Peak:      g.peaks.ever,
		PeakHour:  g.peaks.lastHour(now),
	}
	if g.pace.closed.After(now) {
		s.ClosedUntil = g.pace.closed
	}
	return s
}

// peaks is the most requests that left in any second, ever and in each of the last
// minutes.
type peaks struct {
	ever    int
	minutes [61]struct {
		minute int64 // since 1970
		most   int
	}
}

func (p *peaks) record(now time.Time, inSecond int) {
	p.ever = max(p.ever, inSecond)
	minute := now.Unix() / 60
	m := &p.minutes[minute%int64(len(p.minutes))]
	if m.minute != minute {
		m.minute, m.most = minute, 0
	}
	m.most = max(m.most, inSecond)
}

func (p *peaks) lastHour(now time.Time) (most int) {
	for _, m := range p.minutes {
		if m.minute > now.Unix()/60-int64(len(p.minutes)) {
			most = max(most, m.most)
		}
	}
	return most
}

// advance lets requests leave whose turn it is, and sets the timer for the next one. The
// caller holds g.mu.
func (g *Gate) advance() {
	now := g.clock.Now()
	g.pace.recover(now)
	for {
		t := g.queue.next()
		if t == nil || g.inFlight >= maxInFlight {
			g.wakeAt(time.Time{})
			return
		}
		if opens := g.pace.opens(); opens.After(now) {
			g.wakeAt(opens)
			return
		}
		g.queue.leave(t, now)
		g.inFlight++
		g.sent++
		t.state = out
		t.departure = g.pace.leave(now, t.ready)
		g.peaks.record(now, t.departure.inSecond)
		t.ended(nil)
	}
}

// wakeAt sets the timer, or stops it if at is zero. The caller holds g.mu.
func (g *Gate) wakeAt(at time.Time) {
	if g.alarm != nil {
		if g.alarmAt.Equal(at) {
			return
		}
		g.alarm()
		g.alarm = nil
	}
	if at.IsZero() {
		return
	}
	g.alarmAt = at
	g.alarm = g.clock.AfterFunc(at.Sub(g.clock.Now()), func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.alarm = nil
		g.advance()
	})
}

// turnAway ends the wait of all turns in p. The caller holds g.mu.
func (g *Gate) turnAway(p *place, err error) {
	for t := p.turns.first(); t != nil; t = p.turns.first() {
		g.queue.remove(t)
		t.state = idle
		t.ended(err)
	}
}

// Reason says why a request got no turn.
type Reason string

// The reasons of a NoTurnError.
const (
	OutOfTime  Reason = "its turn did not come in time"
	RetryAfter Reason = "the endpoint asked for a longer wait than there is time"
	Crowded    Reason = "too many requests wait that are more urgent"
)

// NoTurnError says why a request did not leave, and describes the gate at that moment.
type NoTurnError struct {
	Reason    Reason
	Waiting   int           // requests that wait
	Pace      float64       // requests a second
	Throttled bool          // the endpoint answers 429, or did a short while ago
	ComeBack  time.Duration // from when the error was created
}

func (e *NoTurnError) Error() string {
	throttles := "does not throttle"
	if e.Throttled {
		throttles = "throttles"
	}
	return fmt.Sprintf("the request was not sent: %s; %d wait, at a pace of %.3g a second; the endpoint %s; try again in %s",
		e.Reason, e.Waiting, e.Pace, throttles, e.ComeBack)
}

// NoTurn returns the error for someone whose time is up and who waited for the turn of
// another.
func (g *Gate) NoTurn() *NoTurnError {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.noTurn(OutOfTime)
}

// noTurn creates the error. The caller holds g.mu. It does not estimate when the queue
// will be empty: those that wait keep their rank, and those that stay away that long
// leave the gate idle.
func (g *Gate) noTurn(reason Reason) *NoTurnError {
	now := g.clock.Now()
	back := max(g.pace.closed.Sub(now), 0) + max(time.Second, time.Duration(float64(time.Second)/g.pace.rate))
	return &NoTurnError{
		Reason:    reason,
		Waiting:   g.queue.turns,
		Pace:      g.pace.rate,
		Throttled: g.pace.isThrottled(now),
		ComeBack:  back.Round(time.Second),
	}
}
