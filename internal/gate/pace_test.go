// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"math"
	"testing"
	"time"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// busy is a pace under test that always has more to send.
type busy struct {
	*testing.T
	pace
	now  time.Time
	sent departure // the last one
}

func newBusy(t *testing.T, limit int) *busy {
	return &busy{T: t, pace: newPace(limit), now: epoch}
}

// send lets n requests leave as soon as they may, and returns the last.
func (b *busy) send(n int) departure {
	b.Helper()
	for range n {
		b.now = latest(b.now, b.opens())
		b.sent = b.leave(b.now, epoch)
	}
	return b.sent
}

// answer records n answers other than 429 to the last request, while an urgent request is
// waiting.
func (b *busy) answer(n int) {
	for range n {
		b.answered(b.now, b.sent, demand{waiting: 1, hurts: true})
	}
}

func (b *busy) wantRate(want float64, when string) {
	b.Helper()
	if math.Abs(b.rate-want) > 0.001 {
		b.Errorf("got a rate of %.3f a second %s, want %.3f", b.rate, when, want)
	}
}

func TestPaceStartsAtFiveAndGrowsByOneForEachAnswer(t *testing.T) {
	b := newBusy(t, 20)
	b.wantRate(5, "at the start")
	for i := range 30 {
		b.send(10)
		b.answer(1)
		b.wantRate(min(float64(6+i), 20), "after another answer")
	}
	if b := newBusy(t, 2); b.rate != 2 {
		t.Errorf("the rate starts at %v a second, above a limit of 2", b.rate)
	}
}

func TestPaceGrowsOnlyWhileItIsUsed(t *testing.T) {
	b := newBusy(t, 20)
	b.send(5)
	b.answered(b.now, b.sent, demand{})
	b.wantRate(5, "when no request waits")

	b.now = b.now.Add(900 * time.Millisecond)
	b.answer(1)
	b.wantRate(5, "when less than half the rate was used in the last second")
}

// Renewals can wait: they need room for what arrives, not everything the endpoint allows.
func TestPaceForRenewalsGrowsToWhatTheyNeed(t *testing.T) {
	b := newBusy(t, 1000)
	b.send(10)
	b.answered(b.now, b.sent, demand{waiting: 50})
	b.wantRate(5, "with no more waiting than can leave in ten seconds")
	b.answered(b.now, b.sent, demand{waiting: 51})
	b.wantRate(6, "with more waiting")
	b.answered(b.now, b.sent, demand{waiting: 51})
	b.wantRate(6, "when that can now leave in ten seconds")
}

func TestRequestsLeaveEvenly(t *testing.T) {
	b := newBusy(t, 20)
	b.send(1)
	for range 10 {
		last := b.now
		b.send(1)
		if apart := b.now.Sub(last); apart != 200*time.Millisecond {
			t.Errorf("at 5 a second, two requests left %v apart", apart)
		}
	}
}

// On a busy machine, goroutines wake up late.
func TestLateRequestDoesNotDelayLaterOnes(t *testing.T) {
	b := newBusy(t, 20)
	b.rate = 20
	b.send(1)
	for range 40 {
		b.now = b.opens().Add(30 * time.Millisecond)
		if d := b.leave(b.now, epoch); d.inSecond > 20 {
			t.Fatalf("got %d requests in a second, want at most 20", d.inSecond)
		}
	}
	// One delay a second remains: no second may have more than the limit.
	if took, most := b.now.Sub(epoch), 2*window+3*30*time.Millisecond; took > most {
		t.Errorf("40 requests, each waking up 30 ms late, took %v, want at most %v", took, most)
	}

	// A request that has just arrived is not late, and the pace does not make up for a
	// long stall.
	b.now = b.opens().Add(20 * time.Millisecond)
	b.leave(b.now, b.now)
	if apart := b.opens().Sub(b.now); apart < 50*time.Millisecond {
		t.Errorf("the next request leaves %v after one that did not wait", apart)
	}
	b.now = b.now.Add(time.Minute)
	for range 2 {
		b.leave(b.now, epoch)
	}
	if !b.opens().After(b.now) {
		t.Error("after a stall, three requests leave at the same time")
	}
}

func TestNoSecondHasMoreThanTheLimit(t *testing.T) {
	for _, limit := range []int{1, 3, 7, 20, 999} {
		b := newBusy(t, limit)
		b.rate = float64(limit)
		for range 3 * limit {
			if d := b.send(1); d.inSecond > limit {
				t.Fatalf("got %d requests in a second, want at most %d", d.inSecond, limit)
			}
		}
	}
}

// Requests that leave a second apart may arrive closer together.
func TestNoSecondHasMoreThanTheLimitOnArrival(t *testing.T) {
	const limit, late = 20, 49 * time.Millisecond
	b := newBusy(t, limit)
	b.rate = limit
	b.send(1)
	first := b.now.Add(late)
	b.send(limit)
	if apart := b.now.Sub(first); apart < time.Second {
		t.Errorf("request %d may arrive %v after the first, which was %v late", limit+1, apart, late)
	}
}

func TestLowerLimitAppliesToTheCurrentSecond(t *testing.T) {
	b := newBusy(t, 50)
	b.rate = 50
	b.send(60)
	b.setLimit(5)
	b.wantRate(5, "under a limit of 5")
	changed := b.now
	b.send(1)
	if n := b.inSecond(b.now); n > 5 {
		t.Errorf("%v after the limit became 5, a request leaves as number %d of its second", b.now.Sub(changed), n)
	}
	b.setLimit(50)
	b.wantRate(5, "right after the limit was raised again")
}

func TestThrottlingHalvesTheUsedRate(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	d := b.send(100)
	b.throttled(b.now, d, 0)
	b.wantRate(20, "after a 429 to the 40th request of a second")

	// A rate that has just grown has not been used yet.
	b = newBusy(t, 1000)
	b.rate = 40
	b.send(100)
	b.rate = 60
	d = b.send(1)
	b.throttled(b.now, d, 0)
	b.wantRate(float64(d.inSecond)/2, "after a 429 at a rate of 60 with 40 requests in the second")

	// After a rest, few requests have left in the second, which says nothing.
	b = newBusy(t, 1000)
	b.rate = 40
	d = b.send(1)
	b.throttled(b.now, d, 0)
	b.wantRate(10, "after a 429 to the first request at 40 a second")

	// When the rate has just fallen, more requests have left than it allows.
	b = newBusy(t, 1000)
	b.rate = 40
	b.send(100)
	b.rate = 10
	b.throttled(b.now, b.send(1), 0)
	b.wantRate(5, "after a 429 at 10 a second with more requests in the second")
}

func TestPaceNeverFallsBelowOneInThirtySeconds(t *testing.T) {
	b := newBusy(t, 20)
	for range 20 {
		d := b.send(2)
		b.throttled(b.now, d, 0)
	}
	b.wantRate(1.0/30, "after twenty cuts")
}

func TestPaceRecoversAMinuteAfterTheLast429(t *testing.T) {
	b := newBusy(t, 20)
	for range 10 {
		d := b.send(1)
		b.throttled(b.now, d, 0)
	}
	b.wantRate(slowestRate, "after ten cuts")
	b.now = b.now.Add(recoverAfter - 1)
	b.recover(b.now)
	b.wantRate(slowestRate, "within the minute")
	b.now = b.now.Add(1)
	b.recover(b.now)
	b.wantRate(1, "after the minute")

	b = newBusy(t, 20)
	b.now = b.now.Add(time.Hour)
	b.recover(b.now)
	b.wantRate(5, "without any 429")
}

// Two kinds of 429 cause no further cut: answers to requests that were in flight at the
// cut, and answers to requests of the next second, which the endpoint counts together with
// those before.
func TestOneExcessIsOneCut(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	d := b.send(100)
	b.throttled(b.now, d, 0)
	b.throttled(b.now, d, 0)
	b.wantRate(20, "after a second 429 to a request from before the cut")
	cut := b.now

	for b.now.Sub(cut) < time.Second {
		d = b.send(1)
	}
	b.throttled(b.now, d, 0)
	b.wantRate(20, "after a 429 to a request from the first second after the cut")

	d = b.send(3)
	b.throttled(b.now, d, 0)
	b.wantRate(10, "after a 429 to a later request")
}

func TestPaceReturnsToWhatWasSafe(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	d := b.send(100)
	b.throttled(b.now, d, 0)
	b.send(1)
	b.answer(5)
	b.wantRate(25, "five answers after the cut")
	b.throttled(b.now, d, 0)
	b.wantRate(24, "after a late 429, which takes back an answer's growth")
	b.answer(100)
	b.wantRate(36, "after many answers: nine tenths of the requests before the cut")
}

func TestPaceProbesWhenTheCutIsOver(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	d := b.send(100)
	b.throttled(b.now, d, 0)
	b.answer(50)
	for {
		d := b.send(1)
		if !d.at.Before(b.cutAt.Add(steadyFor)) {
			break
		}
		b.answer(1)
		b.wantRate(36, "after an answer to a request from the three seconds after the cut")
	}
	b.answer(1)
	b.wantRate(36+probeStep, "after an answer to a later request")
	for b.rate < wellAbove*40 {
		b.send(1)
		before := b.rate
		b.answer(1)
		b.wantRate(before+probeStep, "up to a tenth above the requests before the cut")
	}
}

// Each answer shows that the endpoint allows more than it did at the cut.
func TestPaceProbesFasterTheFartherAboveTheCutItIs(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	b.throttled(b.now, b.send(100), 0)
	for _, c := range []struct{ rate, step float64 }{
		{36, probeStep}, {44, probeStep}, {48, 0.1}, {60, 0.4}, {80, 0.9}, {100, 1},
	} {
		b.rate = c.rate
		b.now = b.now.Add(steadyFor)
		b.send(100)
		b.answer(1)
		b.wantRate(c.rate+c.step, "after an answer to a request at that rate")
	}
}

func TestPaceHardlyProbesForRenewals(t *testing.T) {
	b := newBusy(t, 1000)
	b.rate = 40
	d := b.send(100)
	b.throttled(b.now, d, 0)
	b.answer(50)
	b.send(10 * 36 * 2)
	b.answered(b.now, b.sent, demand{waiting: 36 * 10})
	b.wantRate(36, "with no more waiting than can leave in ten seconds")
	b.answered(b.now, b.sent, demand{waiting: 36*10 + 1})
	b.wantRate(36+creepStep, "with more waiting")
}

func TestRetryAfterClosesTheGate(t *testing.T) {
	b := newBusy(t, 20)
	b.throttled(b.now, b.send(1), 7*time.Second)
	if got := b.opens().Sub(b.now); got != 7*time.Second {
		t.Errorf("after a Retry-After of 7 s, the gate opens in %v", got)
	}
	b.close(b.now, 2*time.Second)
	if got := b.opens().Sub(b.now); got != 7*time.Second {
		t.Errorf("after a shorter Retry-After, the gate opens in %v", got)
	}
	b.close(b.now, 24*time.Hour)
	if got := b.opens().Sub(b.now); got != 10*time.Minute {
		t.Errorf("after a Retry-After of a day, the gate opens in %v", got)
	}
}

func TestPaceIsSteadyUntilRequestsFromAfterTheCutAreAnswered(t *testing.T) {
	b := newBusy(t, 20)
	b.rate = 20
	b.throttled(b.now, b.send(40), 0)
	b.send(1)
	b.answer(20)
	b.wantRate(18, "after the cut")
	early := b.send(10)
	b.send(200)
	b.answered(b.now, early, demand{waiting: 1, hurts: true})
	b.wantRate(18, "after a late answer to a request from right after the cut")
	b.answer(1)
	b.wantRate(18+probeStep, "after an answer to a request from ten seconds after the cut")
}

func TestPaceIsSteadyForLongAfterALongRetryAfter(t *testing.T) {
	b := newBusy(t, 20)
	b.throttled(b.now, b.send(1), 4*time.Second)
	if got := b.steady.Sub(b.cutAt); got != time.Minute {
		t.Errorf("after a Retry-After of 4 s, the rate is steady for %v", got)
	}
}
