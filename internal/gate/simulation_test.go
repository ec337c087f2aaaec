// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// This file is the world of simulated_test.go: a clock that jumps from event to event in
// one goroutine, token endpoints that throttle, and roles that need tokens. The seed is
// fixed, so every run of a test is the same.

// world has roles, an endpoint, and a gate between them.
type world struct {
	now    time.Time
	start  time.Time
	events ordered[*event]
	number int
	rand   *rand.Rand

	gate *Gate
	endpoint

	asked, refused int // requests
	left           []time.Time
	served         int // cold roles that got their token
	failed         int // reads that ended without a token
	renewed, ended int // warm roles; those that reached their floor
	worst          time.Duration
}

type endpoint struct {
	allows     func(at time.Time) bool // reports whether a request is within the limit
	throttle   func(limit int) func(at time.Time) bool
	latency    time.Duration
	jitter     time.Duration // on the way to the endpoint
	retryAfter time.Duration // 0: none is sent
}

type event struct {
	at     time.Time
	number int
	index  int
	do     func()
}

func newWorld(limit int, e endpoint) *world {
	w := &world{
		now:      time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		rand:     rand.New(rand.NewPCG(1, 2)),
		endpoint: e,
		events: ordered[*event]{
			index: func(e *event) *int { return &e.index },
			before: func(a, b *event) bool {
				if !a.at.Equal(b.at) {
					return a.at.Before(b.at)
				}
				return a.number < b.number
			},
		},
	}
	w.start = w.now
	w.gate = New(limit, w)
	return w
}

// seed makes the randomness differ from other tests.
func (w *world) seed(n uint64) { w.rand = rand.New(rand.NewPCG(n, 2)) }

func (w *world) Now() time.Time { return w.now }

func (w *world) AfterFunc(d time.Duration, f func()) func() bool {
	w.number++
	e := &event{at: w.now.Add(max(d, 0)), number: w.number, index: -1, do: f}
	w.events.set(e, true)
	return func() bool {
		waits := e.index >= 0
		w.events.set(e, false)
		return waits
	}
}

// run lets time pass until done returns true, or until no events are left.
func (w *world) run(done func() bool) {
	for !done() {
		e := w.events.first()
		if e == nil {
			return
		}
		w.events.set(e, false)
		w.now = e.at
		e.do()
	}
}

func (w *world) runFor(d time.Duration) {
	end := w.now.Add(d)
	w.AfterFunc(d, func() {})
	w.run(func() bool { return !w.now.Before(end) })
}

func (w *world) upTo(d time.Duration) time.Duration {
	return time.Duration(w.rand.Int64N(int64(d) + 1))
}

// sliding allows limit requests in any second.
func sliding(limit int) func(time.Time) bool {
	var seen []time.Time
	return func(at time.Time) bool {
		for len(seen) > 0 && !seen[0].After(at.Add(-time.Second)) {
			seen = seen[1:]
		}
		if len(seen) >= limit {
			return false
		}
		seen = append(seen, at)
		return true
	}
}

// calendar allows limit requests in each second of the clock.
func calendar(limit int) func(time.Time) bool {
	var second int64
	var seen int
	return func(at time.Time) bool {
		if at.Unix() != second {
			second, seen = at.Unix(), 0
		}
		seen++
		return seen <= limit
	}
}

// bucket allows a burst of limit requests, and limit a second in the long run.
func bucket(limit int) func(time.Time) bool {
	var last time.Time
	full := float64(limit)
	level := full
	return func(at time.Time) bool {
		if !last.IsZero() {
			level = min(full, level+at.Sub(last).Seconds()*full)
		}
		last = at
		if level < 1 {
			return false
		}
		level--
		return true
	}
}

// mint has t wait and send its request until the answer is a token. It calls minted with
// the time at which the successful request left, or abandoned if no reader waits any
// longer.
func (w *world) mint(t *Turn, minted func(left time.Time), abandoned func()) {
	_, err := w.gate.enter(t, time.Time{}, func(err error) {
		w.AfterFunc(0, func() {
			if err != nil {
				abandoned()
				return
			}
			pass := &Pass{turn: t, departure: t.departure}
			left := w.now
			w.left = append(w.left, left)
			w.AfterFunc(w.upTo(w.jitter), func() {
				w.asked++
				ok := w.allows(w.now)
				if !ok {
					w.refused++
				}
				w.AfterFunc(w.latency, func() {
					if ok {
						pass.Done(Answered, 0)
						minted(left)
						return
					}
					pass.Done(Throttled, w.retryAfter)
					w.mint(t, minted, abandoned)
				})
			})
		})
	})
	if err != nil {
		abandoned()
	}
}

// patience is how long a reader waits in a read, and pause how long it waits after a
// failed read.
const (
	patience = 10 * time.Second
	pause    = time.Second
)

// cold adds a reader that tries again until the role has a token.
func (w *world) cold(role string, kind Kind) {
	w.read(role, kind, func(time.Duration) { w.served++ })
}

// read adds a reader that tries again until there is a token, and calls done with the
// time that took. A request in progress continues after the reader leaves.
func (w *world) read(role string, kind Kind, done func(took time.Duration)) {
	began := w.now
	var turn *Turn // nil if no mint is in progress
	var come func()
	come = func() {
		starts := turn == nil
		if starts {
			turn = w.gate.Turn(role, kind)
		}
		waiter, _ := turn.Join(w.now.Add(patience), w.now)
		leave := w.AfterFunc(patience, func() {
			waiter.Leave()
			w.failed++
			w.AfterFunc(pause, func() {
				if done != nil {
					come()
				}
			})
		})
		if !starts {
			return
		}
		w.mint(turn, func(time.Time) {
			leave()
			waiter.Leave()
			done(w.now.Sub(began))
			done = nil
		}, func() { turn = nil })
	}
	come()
}

// warm adds a role whose token, minted at the given time, is renewed before it expires.
func (w *world) warm(role string, minted time.Time, life time.Duration) {
	floor := min(time.Minute, life/10)
	ends := minted.Add(life)
	due := ends.Add(-life/4 - life/100 - w.upTo(life/20-life/100))
	w.AfterFunc(due.Sub(w.now), func() {
		turn := w.gate.Turn(role, Whole)
		turn.Join(time.Time{}, ends.Add(-floor-time.Minute))
		w.mint(turn, func(left time.Time) {
			w.renewed++
			w.worst = max(w.worst, w.now.Sub(due))
			if !w.now.Before(ends.Add(-floor)) {
				w.ended++
			}
			w.warm(role, left, life)
		}, func() {})
	})
}

func (w *world) String() string {
	return fmt.Sprintf("%.1f s, %d requests, %d throttled (%.1f %%), %d reads failed, %d renewed, %d of them too late",
		w.now.Sub(w.start).Seconds(), w.asked, w.refused, 100*float64(w.refused)/float64(max(w.asked, 1)), w.failed, w.renewed, w.ended)
}
