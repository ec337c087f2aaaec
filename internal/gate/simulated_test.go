// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"fmt"
	"testing"
	"time"
)

// The tests in this file measure what the gate is for, in the world of
// simulation_test.go. go test -v prints the figures.

var throttles = []struct {
	name string
	by   func(limit int) func(time.Time) bool
}{
	{"sliding window", sliding},
	{"calendar seconds", calendar},
	{"bucket", bucket},
}

const jitter = 100 * time.Millisecond

var (
	latencies   = []time.Duration{50 * time.Millisecond, time.Second, 4 * time.Second}
	retryAfters = []time.Duration{0, time.Second}
)

// eachEndpoint runs test, in parallel, against each kind of endpoint that allows limit
// requests a second.
func eachEndpoint(t *testing.T, limit int, retryAfters []time.Duration, test func(t *testing.T, e endpoint)) {
	for _, throttle := range throttles {
		for _, latency := range latencies {
			for _, retryAfter := range retryAfters {
				if raced && (latency != time.Second || retryAfter > 0) {
					continue
				}
				t.Run(fmt.Sprintf("%s/latency %v/Retry-After %v", throttle.name, latency, retryAfter), func(t *testing.T) {
					t.Parallel()
					test(t, endpoint{throttle.by(limit), throttle.by, latency, jitter, retryAfter})
				})
			}
		}
	}
}

// unlimited allows everything.
func unlimited(time.Time) bool { return true }

// wantLimit fails if more requests than the limit left in any second.
func (w *world) wantLimit(t *testing.T, limit int) {
	t.Helper()
	first := 0
	for i, at := range w.left {
		for !w.left[first].After(at.Add(-time.Second)) {
			first++
		}
		if n := i - first + 1; n > limit {
			t.Fatalf("got %d requests in the second up to %v, want at most %d", n, at.Sub(w.start), limit)
		}
	}
}

// coldRoles adds a reader for each of n roles, all within the first second.
func (w *world) coldRoles(n int) {
	for i := range n {
		w.AfterFunc(w.upTo(time.Second), func() { w.cold(fmt.Sprint("cold-", i), Whole) })
	}
}

// warmRoles adds n roles whose tokens were minted at random times within the given age.
func (w *world) warmRoles(n int, age, life time.Duration) {
	for i := range n {
		w.warm(fmt.Sprint("warm-", i), w.now.Add(-w.upTo(age)), life)
	}
}

func size(n int) int {
	if raced {
		return n / 10
	}
	return n
}

// With 4 s of latency and a Retry-After of a second, the 429s in flight at a cut keep the
// gate closed for 5 s, which is longer than 1.3 times the shortest possible time.
func TestColdRolesGetTheirTokensAlmostAsFastAsTheEndpointAllows(t *testing.T) {
	eachEndpoint(t, 50, retryAfters, func(t *testing.T, e endpoint) {
		n := size(5000)
		w := newWorld(1000, e)
		w.coldRoles(n)
		w.run(func() bool { return w.served == n })
		took := w.now.Sub(w.start)
		least := time.Duration(n/50-1)*time.Second + e.latency
		t.Logf("%.2f times the shortest possible time: %v", took.Seconds()/least.Seconds(), w)
		most := 1.3
		if e.retryAfter > 0 && e.latency > time.Second {
			most = 1.4
		}
		if took.Seconds() > most*least.Seconds() && !raced {
			t.Errorf("%d cold roles took %v, want at most %v times the shortest possible time of %v", n, took, most, least)
		}
		share := 0.05
		if e.latency > time.Second {
			share = 0.15
		}
		if refused := float64(w.refused) / float64(w.asked); refused > share && !raced {
			t.Errorf("%.1f %% of the requests were throttled, want at most %v %%", 100*refused, 100*share)
		}
		w.wantLimit(t, 1000)
	})
}

func TestColdRolesDoNotLetWarmTokensExpire(t *testing.T) {
	eachEndpoint(t, 50, retryAfters[:1], func(t *testing.T, e endpoint) {
		n := size(5000)
		w := newWorld(1000, e)
		w.warmRoles(size(1000), 200*time.Second, 5*time.Minute)
		w.coldRoles(n)
		w.run(func() bool { return w.served == n && w.now.Sub(w.start) > 100*time.Second })
		t.Log(w)
		if w.ended > 0 || w.renewed < size(300) {
			t.Errorf("%d of %d five-minute tokens reached their floor", w.ended, w.renewed)
		}
	})
}

func TestGateReachesItsOwnLimit(t *testing.T) {
	const n, limit = 5000, 1000
	w := newWorld(limit, endpoint{unlimited, nil, 4 * time.Second, jitter, 0})
	w.coldRoles(n)
	w.run(func() bool { return w.served == n })
	t.Log(w)
	if took := w.now.Sub(w.start); took > n/limit*time.Second+30*time.Second {
		t.Errorf("%d cold roles took %v at a limit of %d", n, took, limit)
	}
	w.wantLimit(t, limit)
}

func TestManyRolesThatWereMintedTogetherAreRenewedInTime(t *testing.T) {
	for _, limit := range []int{20, 1000} {
		n := size(10_000)
		w := newWorld(limit, endpoint{unlimited, nil, 3 * time.Second, jitter, 0})
		w.warmRoles(n, time.Minute, time.Hour)
		w.runFor(2 * time.Hour)
		t.Logf("limit %d: %v; the longest renewal took %v", limit, w, w.worst)
		if w.ended > 0 || w.renewed < 2*n {
			t.Errorf("limit %d: %d of %d one-hour tokens reached their floor", limit, w.ended, w.renewed)
		}
		w.wantLimit(t, limit)
	}
}

// In a sliding window, 46 requests a second that arrive up to 100 ms late are sometimes
// more than 50. Some are throttled, however evenly they leave. A Retry-After would keep
// the gate closed for longer than the capacity left over can make up for.
func TestSteadyRenewalsCloseToTheEndpointsLimitAreHardlyThrottled(t *testing.T) {
	eachEndpoint(t, 50, retryAfters[:1], func(t *testing.T, e endpoint) {
		for seed := range uint64(2) {
			e := e
			e.allows = e.throttle(50)
			w := newWorld(1000, e)
			w.seed(1 + seed)
			number := 0
			var due func()
			due = func() { // at random, 46 a second
				number++
				at := w.now
				turn := w.gate.Turn(fmt.Sprint(number), Whole)
				turn.Join(time.Time{}, at.Add(13*time.Minute)) // as with one-hour tokens
				w.mint(turn, func(time.Time) {
					w.renewed++
					w.worst = max(w.worst, w.now.Sub(at))
				}, func() { w.ended++ })
				w.AfterFunc(time.Duration(w.rand.ExpFloat64()/46*float64(time.Second)), due)
			}
			due()
			w.runFor(2 * time.Minute)
			before := w.refused
			w.runFor(time.Duration(size(58)) * time.Minute)
			t.Logf("throttled: %d in two minutes, %d afterward; renewed %d, the slowest after %v", before, w.refused-before, w.renewed, w.worst)
			if w.refused > 150 {
				t.Errorf("%d requests were throttled in the hour", w.refused)
			}
			if w.ended > 0 || w.worst > 14*time.Minute {
				t.Errorf("%d renewals got no turn; the slowest took %v", w.ended, w.worst)
			}
		}
	})
}

// saturate adds n roles that each always need a token.
func (w *world) saturate(n int) {
	var again func(role string)
	again = func(role string) {
		turn := w.gate.Turn(role, Whole)
		turn.Join(time.Time{}, w.now)
		w.mint(turn, func(time.Time) { w.served++; again(role) }, nil)
	}
	for i := range n {
		again(fmt.Sprint(i))
	}
}

// settled returns how long it takes until at most a fifth of the requests are throttled
// and at least three fifths of the limit are used in every five seconds of the remaining
// time.
func (w *world) settled(limit int, rest time.Duration) (after time.Duration) {
	const step = 5 * time.Second
	for passed := step; passed <= rest; passed += step {
		served, refused := w.served, w.refused
		w.runFor(step)
		served, refused = w.served-served, w.refused-refused
		if 5*refused > served+refused || float64(served) < 0.6*float64(limit)*step.Seconds() {
			after = passed
		}
	}
	return after
}

// Half a minute is enough for endpoints that answer within a second without a
// Retry-After. If they take 4 s, each step up waits that long for its answer; a
// Retry-After keeps the gate closed after each step too far. The test prints how both
// affect the time.
func TestPaceFollowsALimitThatFallsAndRises(t *testing.T) {
	eachEndpoint(t, 50, retryAfters, func(t *testing.T, e endpoint) {
		var falls, rises []time.Duration
		for seed, low := range []time.Duration{60 * time.Second, 67 * time.Second, 74 * time.Second} {
			e := e
			e.allows = e.throttle(50)
			w := newWorld(1000, e)
			w.seed(uint64(1 + seed))
			w.saturate(1000)
			w.runFor(100 * time.Second)
			w.allows = e.throttle(5)
			fall := w.settled(5, low)
			w.allows = e.throttle(50)
			rise := w.settled(50, 100*time.Second)
			falls, rises = append(falls, fall), append(rises, rise)
			if e.latency <= time.Second && e.retryAfter == 0 && max(fall, rise) > 30*time.Second {
				t.Errorf("the pace settled %v after a fall, and %v after the rise %v later", fall, rise, low)
			}
		}
		t.Logf("settled after a fall in %v, after a rise in %v", falls, rises)
	})
}

func TestEndpointThatThrottlesEverythingGetsFewRequests(t *testing.T) {
	w := newWorld(20, endpoint{func(time.Time) bool { return false }, nil, 50 * time.Millisecond, jitter, 0})
	w.coldRoles(1000)
	w.runFor(time.Minute)
	asked := w.asked
	w.allows = unlimited
	w.run(func() bool { return w.served == 1000 })
	t.Logf("%d requests in the minute; afterward 1,000 roles are served within %v", asked, w.now.Sub(w.start)-time.Minute)
	if asked > 20 || asked < 3 {
		t.Errorf("got %d requests in a minute of 429s", asked)
	}
}

// delay measures the longest that a cold read of the role takes, without the others and
// with them.
func delay(limit int, role string, others func(w *world)) (without, with time.Duration) {
	measure := func(others func(w *world)) (worst time.Duration) {
		w := newWorld(limit, endpoint{unlimited, nil, 50 * time.Millisecond, 0, 0})
		if others != nil {
			others(w)
		}
		w.runFor(time.Second)
		for range 20 {
			w.runFor(700*time.Millisecond + w.upTo(time.Second))
			done := false
			w.read(role, Whole, func(took time.Duration) {
				worst = max(worst, took)
				done = true
			})
			w.run(func() bool { return done })
		}
		return worst
	}
	return measure(nil), measure(others)
}

func TestReadingManySubsetsDelaysNoOthers(t *testing.T) {
	for _, atOnce := range []int{1, 64, 4096} {
		subsets := func(w *world) {
			left := 4096
			var next func()
			next = func() {
				if left--; left >= 0 {
					w.read("greedy", Narrowed, func(time.Duration) { next() })
				}
			}
			for range atOnce {
				next()
			}
		}
		for _, role := range []string{"other", "greedy"} {
			without, with := delay(20, role, subsets)
			t.Logf("%4d concurrent subsets: a cold read of all the %s role's scopes takes at most %v, %v without them", atOnce, role, with, without)
			if with-without >= time.Second {
				t.Errorf("%d concurrent subsets delay a cold read of the %s role by %v", atOnce, role, with-without)
			}
		}
	}
}

func TestRotatingInALoopDelaysNoOthers(t *testing.T) {
	rotations := func(roles int) func(w *world) {
		return func(w *world) {
			for i := range roles {
				var again func()
				again = func() {
					turn := w.gate.Turn(fmt.Sprint("rotating-", i), Rotation)
					turn.Join(time.Time{}, w.now)
					w.mint(turn, func(time.Time) { again() }, func() {})
				}
				again()
			}
		}
	}
	for _, roles := range []int{1, 50} {
		without, with := delay(20, "other", rotations(roles))
		t.Logf("rotating %d roles in a loop: a cold read takes at most %v, %v without", roles, with, without)
		if with-without >= time.Second {
			t.Errorf("rotating %d roles in a loop delays a cold read by %v", roles, with-without)
		}

		w := newWorld(1, endpoint{unlimited, nil, 50 * time.Millisecond, 0, 0})
		rotations(roles)(w)
		w.coldRoles(100)
		w.run(func() bool { return w.served == 100 })
		took := w.now.Sub(w.start)
		t.Logf("at a limit of 1, 100 cold roles are served within %v", took)
		if took > 160*time.Second {
			t.Errorf("at a limit of 1, 100 cold roles took %v", took)
		}
	}
}
