// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// The tests in this file run in a bubble, where time passes when all goroutines wait.

// crowd is a gate with many waiting turns, and the order in which they leave.
type crowd struct {
	*testing.T
	*Gate
	wg   sync.WaitGroup
	mu   sync.Mutex
	left []string
}

func newCrowd(t *testing.T, limit int) *crowd {
	return &crowd{T: t, Gate: New(limit, nil)}
}

// hold closes the gate for a while, so new turns queue up.
func (c *crowd) hold(d time.Duration) {
	c.Helper()
	pass, err := c.Turn("hold", Whole).Wait(c.Context())
	if err != nil {
		c.Fatal(err)
	}
	pass.Done(Answered, d)
}

// queue adds a turn that becomes urgent at hurts, and sends its request.
func (c *crowd) queue(role string, kind Kind, hurts time.Time) *Turn {
	turn := c.Turn(role, kind)
	turn.Join(time.Time{}, hurts)
	c.start(turn, role)
	return turn
}

func (c *crowd) start(turn *Turn, name string) {
	c.wg.Go(func() {
		pass, err := turn.Wait(c.Context())
		if err != nil {
			name = fmt.Sprintf("%s: %v", name, err)
		} else {
			defer pass.Done(Answered, 0)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.left = append(c.left, name)
	})
	synctest.Wait()
}

func (c *crowd) wantOrder(want string) {
	c.Helper()
	c.wg.Wait()
	if got := strings.Join(c.left, " "); got != want {
		c.Errorf("got the order\n%s, want\n%s", got, want)
	}
}

func TestFirstRequestLeavesImmediately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, start := New(20, nil), time.Now()
		pass, err := g.Turn("a", Whole).Wait(t.Context())
		if err != nil || time.Since(start) > 0 {
			t.Fatalf("the request left after %v: %v", time.Since(start), err)
		}
		if s := g.Stats(); s.InFlight != 1 || s.Sent != 1 || s.Waiting != 0 {
			t.Errorf("got %+v", s)
		}
		pass.Done(Answered, 0)
		pass.Done(Answered, 0)
		if s := g.Stats(); s.InFlight != 0 {
			t.Errorf("after the answer: got %d requests in progress, want 0", s.InFlight)
		}
	})
}

func TestMostUrgentTurnLeavesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 20)
		c.hold(time.Minute)
		now := time.Now()
		c.queue("hour", Whole, now.Add(13*time.Minute)) // due tokens: a minute before the floor
		c.queue("minutes", Whole, now.Add(-15*time.Second))
		c.queue("reader", Whole, now) // without a token: from the arrival
		c.queue("later-reader", Whole, now.Add(time.Second))
		c.queue("rotation", Rotation, now.Add(2*time.Second))
		c.wantOrder("rotation minutes reader later-reader hour")
	})
}

func TestReaderMakesARenewalMoreUrgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 20)
		c.hold(time.Minute)
		now := time.Now()
		renewal := c.queue("renewal", Whole, now.Add(13*time.Minute))
		c.queue("other", Whole, now.Add(time.Minute))
		reader, ok := renewal.Join(now.Add(2*time.Minute), now)
		if !ok {
			t.Fatal("a reader cannot join a waiting renewal")
		}
		reader.Leave()
		c.wantOrder("renewal other")
	})
}

func TestAtMostEveryFourthRequestIsARotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 20)
		c.hold(time.Minute)
		now := time.Now()
		for i := range 3 {
			c.queue(fmt.Sprint("R", i), Rotation, now)
		}
		c.queue("V", Verification, now)
		for i := range 7 {
			c.queue(fmt.Sprint("w", i), Whole, now)
		}
		c.wantOrder("R0 w0 w1 w2 R1 w3 w4 w5 R2 w6 V")
	})
}

func TestAtMostEverySecondRequestIsForANarrowedSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 20)
		c.hold(time.Minute)
		now := time.Now()
		for i := range 5 {
			c.queue(fmt.Sprint("n", i), Narrowed, now)
		}
		for i := range 3 {
			c.queue(fmt.Sprint("w", i), Whole, now.Add(time.Second))
		}
		c.wantOrder("n0 w0 n1 w1 n2 w2 n3 n4")
	})
}

func TestNarrowedSetsOfARoleShareOnePlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 20)
		c.hold(time.Minute)
		now := time.Now()
		for range 4 {
			c.queue("many", Narrowed, now)
		}
		c.queue("one", Narrowed, now.Add(time.Second))
		c.queue("two", Narrowed, now.Add(2*time.Second))
		c.wantOrder("many one two many many many")
	})
}

func TestOneRotationOfARoleAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		first := g.Turn("a", Rotation)
		pass, err := first.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := first.Join(time.Time{}, time.Now()); ok {
			t.Error("a rotation can be joined after its request has left")
		}
		var left, other time.Duration
		start := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			p, _ := g.Turn("a", Rotation).Wait(t.Context())
			left = time.Since(start)
			p.Done(Answered, 0)
		})
		wg.Go(func() {
			p, _ := g.Turn("b", Rotation).Wait(t.Context())
			other = time.Since(start)
			p.Done(Answered, 0)
		})
		time.Sleep(7 * time.Second)
		pass.Done(Answered, 0)
		wg.Wait()
		if left != 7*time.Second || other > time.Second {
			t.Errorf("while a rotation takes 7 s, the next one of the role leaves after %v, and one of another role after %v", left, other)
		}
	})
}

func TestThrottledRequestKeepsItsRank(t *testing.T) {
	for _, kind := range []Kind{Whole, Narrowed, Rotation} {
		synctest.Test(t, func(t *testing.T) {
			c := newCrowd(t, 20)
			now := time.Now()
			first := c.Turn("throttled", kind)
			reader, _ := first.Join(time.Time{}, now)
			pass, err := first.Wait(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			role := "other"
			if kind == Narrowed {
				role = "throttled" // the same place
			}
			for i := range 3 {
				turn := c.Turn(role, kind)
				turn.Join(time.Time{}, now.Add(time.Duration(i-1)))
				c.start(turn, fmt.Sprint(i))
			}
			pass.Done(Throttled, time.Minute)
			if second, ok := first.Join(time.Time{}, now); !ok {
				t.Error("a throttled request cannot be joined")
			} else {
				second.Leave()
			}
			c.start(first, "throttled")
			if kind == Narrowed {
				c.wantOrder("throttled 0 1 2")
			} else {
				c.wantOrder("0 throttled 1 2")
			}
			reader.Leave()
		})
	}
}

func TestTurnWithoutWaitersLeavesTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		p, _ := g.Turn("hold", Whole).Wait(t.Context())
		p.Done(Answered, time.Minute)

		turn := g.Turn("a", Whole)
		one, _ := turn.Join(time.Time{}, time.Now())
		two, _ := turn.Join(time.Time{}, time.Now())
		var err error
		var wg sync.WaitGroup
		wg.Go(func() { _, err = turn.Wait(t.Context()) })
		synctest.Wait()

		one.Leave()
		one.Leave()
		synctest.Wait()
		if err != nil || g.Stats().Waiting != 1 {
			t.Errorf("after one of two waiters has left: %d waiting, %v", g.Stats().Waiting, err)
		}
		two.Leave()
		wg.Wait()
		if !errors.Is(err, ErrAbandoned) || g.Stats().Waiting != 0 {
			t.Errorf("after both have left: %d waiting, %v", g.Stats().Waiting, err)
		}
		if _, ok := turn.Join(time.Time{}, time.Now()); ok {
			t.Error("a turn that has left the queue can be joined")
		}
	})
}

func TestTurnWhoseWaitersLeaveDuringTheRequestDoesNotWaitAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		turn := g.Turn("a", Whole)
		w, _ := turn.Join(time.Time{}, time.Now())
		pass, err := turn.Wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		w.Leave()
		pass.Done(Throttled, 0)
		if _, err := turn.Wait(t.Context()); !errors.Is(err, ErrAbandoned) {
			t.Errorf("the turn waits again: %v", err)
		}
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(1, nil)
		p, _ := g.Turn("first", Whole).Wait(t.Context())
		p.Done(Throttled, 0)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := g.Turn("a", Whole).Wait(ctx)
		var noTurn *NoTurnError
		if !errors.As(err, &noTurn) || noTurn.Reason != OutOfTime {
			t.Fatalf("after its deadline: %v", err)
		}
		if want := (NoTurnError{OutOfTime, 0, 0.5, true, 2 * time.Second}); *noTurn != want {
			t.Errorf("got the error %+v, want %+v", *noTurn, want)
		}
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := g.Turn("a", Whole).Wait(canceled); !errors.Is(err, context.Canceled) {
			t.Errorf("after cancellation: %v", err)
		}
		if s := g.Stats(); s.Waiting != 0 {
			t.Errorf("got %d waiting, want 0", s.Waiting)
		}
	})
}

func TestRetryAfterBeyondADeadlineFailsImmediately(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		start := time.Now()
		under, _ := g.Turn("under-way", Whole).Wait(t.Context())

		ctx, cancel := context.WithDeadline(t.Context(), start.Add(25*time.Second))
		defer cancel()
		waits := g.Turn("waits", Whole)
		short, _ := waits.Join(start.Add(20*time.Second), start)
		long, _ := waits.Join(start.Add(40*time.Second), start)
		_, _ = short, long
		var err error
		var ended time.Duration
		var wg sync.WaitGroup
		time.Sleep(100 * time.Millisecond) // the gate opens at 200
		wg.Go(func() {
			_, err = waits.Wait(ctx)
			ended = time.Since(start)
		})
		synctest.Wait()
		under.Done(Throttled, 30*time.Second)
		wg.Wait()

		var noTurn *NoTurnError
		if !errors.As(err, &noTurn) || noTurn.Reason != RetryAfter || ended != 100*time.Millisecond {
			t.Errorf("a wait with too little time ended after %v: %v", ended, err)
		} else if noTurn.ComeBack < 30*time.Second || !noTurn.Throttled {
			t.Errorf("got the error %+v", *noTurn)
		}
		select {
		case <-short.TooLate():
		default:
			t.Error("a waiter with too little time got no error")
		}
		select {
		case <-long.TooLate():
			t.Error("a waiter with enough time got an error")
		default:
		}
		if late, _ := g.Turn("new", Whole).Join(start.Add(10*time.Second), start); !throttled429(late) {
			t.Error("a new waiter with too little time got no error")
		}
	})
}

func throttled429(w *Waiter) bool {
	select {
	case <-w.TooLate():
		var noTurn *NoTurnError
		return errors.As(w.Err(), &noTurn) && noTurn.Reason == RetryAfter
	default:
		return false
	}
}

func TestRetryAfterAppliesToARequestInProgressOnlyIfItIsThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		start := time.Now()
		turn := g.Turn("a", Whole)
		w, _ := turn.Join(start.Add(10*time.Second), start)
		renewal, _ := turn.Join(time.Time{}, start)
		pass, _ := turn.Wait(t.Context())
		other, _ := g.Turn("b", Whole).Wait(t.Context())

		other.Done(Throttled, 30*time.Second)
		if throttled429(w) {
			t.Error("a waiter got an error while its request was in progress")
		}
		pass.Done(Throttled, 0)
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = turn.Wait(t.Context()) })
		synctest.Wait()
		if !throttled429(w) {
			t.Error("a waiter got no error after its request was throttled")
		}
		renewal.Leave()
		w.Leave()
		wg.Wait()
	})
}

func TestLeastUrgentPlaceIsDroppedWhenTooManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		p, _ := g.Turn("hold", Whole).Wait(t.Context())
		p.Done(Answered, time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		now := time.Now()
		var away []string
		var mu sync.Mutex
		queue := func(name, role string, kind Kind, hurts time.Time) {
			turn := g.Turn(role, kind)
			turn.Join(time.Time{}, hurts)
			wg.Go(func() {
				_, err := turn.Wait(ctx)
				var noTurn *NoTurnError
				if errors.As(err, &noTurn) && noTurn.Reason == Crowded {
					mu.Lock()
					defer mu.Unlock()
					away = append(away, name)
				}
			})
		}
		queue("renewal", "renewal", Whole, now.Add(time.Hour))
		queue("set-1", "sets", Narrowed, now.Add(time.Minute))
		queue("set-2", "sets", Narrowed, now.Add(time.Minute))
		for i := range maxPlaces - 3 {
			queue("", fmt.Sprint(i), Whole, now)
		}
		queue("rotation", "rotation", Rotation, now.Add(2*time.Hour))
		synctest.Wait()
		if len(away) > 0 || g.Stats().Waiting != maxPlaces+1 {
			t.Errorf("with %d waiting in %d places, %v lost their place", g.Stats().Waiting, maxPlaces, away)
		}
		queue("reader-1", "reader-1", Whole, now)
		synctest.Wait()
		queue("reader-2", "reader-2", Whole, now)
		synctest.Wait()
		queue("late", "late", Whole, now.Add(time.Second))
		synctest.Wait()
		if len(away) > 2 { // the two of one place
			slices.Sort(away[1:3])
		}
		if want := []string{"renewal", "set-1", "set-2", "late"}; !slices.Equal(away, want) {
			t.Errorf("%q lost their places one after the other, want %q", away, want)
		}
		cancel()
		wg.Wait()
	})
}

func TestAtMostTwoThousandRequestsAreInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(1000, nil)
		g.pace.rate = 1000
		var passes []*Pass
		for i := range maxInFlight {
			p, err := g.Turn(fmt.Sprint(i), Whole).Wait(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			passes = append(passes, p)
		}
		start := time.Now()
		time.AfterFunc(time.Minute, func() { passes[0].Done(NoAnswer, 0) })
		if _, err := g.Turn("more", Whole).Wait(t.Context()); err != nil || time.Since(start) != time.Minute {
			t.Errorf("while %d requests are in progress, another leaves after %v: %v", maxInFlight, time.Since(start), err)
		}
	})
}

func TestNewLimitAppliesToWaitingRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 1)
		c.hold(0)
		start := time.Now()
		c.queue("a", Whole, start)
		c.SetLimit(1000) // no request needs the room between the pace and a limit of 1
		c.wg.Wait()
		if took := time.Since(start); took != time.Second {
			t.Errorf("at a pace of 1, a waiting request leaves %v after the limit became 1,000", took)
		}

		c = newCrowd(t, 20)
		c.hold(0)
		start = time.Now()
		c.queue("a", Whole, start)
		c.SetLimit(1)
		c.wg.Wait()
		if took := time.Since(start); took < time.Second {
			t.Errorf("a waiting request leaves %v after the limit became 1", took)
		}
		if pace := c.Stats().Pace; pace > 1 {
			t.Errorf("got a pace of %v under a limit of 1", pace)
		}
	})
}

func TestClosedGateRefusesAllTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 1)
		c.hold(time.Minute)
		c.queue("a", Whole, time.Now())
		c.queue("b", Rotation, time.Now())
		c.Close()
		c.queue("c", Whole, time.Now())
		c.wg.Wait()
		for _, left := range c.left {
			if !strings.Contains(left, ErrClosed.Error()) {
				t.Errorf("at a closed gate: %s", left)
			}
		}
		if len(c.left) != 3 || c.alarm != nil {
			t.Errorf("%d of 3 got the error; the timer runs: %t", len(c.left), c.alarm != nil)
		}
	})
}

func TestStatsReportPeaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(20, nil)
		send := func(n int) {
			for range n {
				p, _ := g.Turn("a", Whole).Wait(t.Context())
				p.Done(Answered, 0)
			}
		}
		send(10)
		if s := g.Stats(); s.Peak != 5 || s.PeakHour != 5 || s.Sent != 10 {
			t.Errorf("after ten requests at 5 a second: %+v", s)
		}
		time.Sleep(62 * time.Minute)
		send(1)
		if s := g.Stats(); s.Peak != 5 || s.PeakHour != 1 {
			t.Errorf("an hour later: %+v", s)
		}
	})
}

func TestErrorDescribesTheGate(t *testing.T) {
	e := &NoTurnError{OutOfTime, 4999, 20, true, time.Second}
	want := "the request was not sent: its turn did not come in time; 4999 wait, at a pace of 20 a second; the endpoint throttles; try again in 1s"
	if e.Error() != want {
		t.Errorf("it says\n%s, want\n%s", e, want)
	}
}

// All turns end, whatever happens to them, and the gate is empty then.
func TestNothingIsLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(200, nil)
		random := rand.New(rand.NewPCG(3, 4))
		var wg sync.WaitGroup
		for range 2000 {
			role, kind := fmt.Sprint(random.IntN(100)), Kind(random.IntN(4))
			waiters, tries := random.IntN(3), 1+random.IntN(3)
			answer, retryAfter := Answered, time.Duration(random.IntN(300)-298)*time.Second
			patience, latency := time.Duration(random.IntN(20_000))*time.Millisecond, time.Duration(random.IntN(3000))*time.Millisecond
			if random.IntN(20) == 0 {
				answer = Answer(random.IntN(3))
			}
			turn := g.Turn(role, kind)
			ctx, cancel := context.WithTimeout(t.Context(), patience+time.Duration(random.IntN(10_000))*time.Millisecond)
			for range waiters {
				wg.Go(func() {
					w, ok := turn.Join(time.Now().Add(patience), time.Now())
					if !ok {
						return
					}
					defer w.Leave()
					select {
					case <-w.TooLate():
					case <-time.After(patience):
					case <-ctx.Done():
					}
				})
			}
			wg.Go(func() {
				defer cancel()
				for range tries {
					pass, err := turn.Wait(ctx)
					if err != nil {
						return
					}
					time.Sleep(latency)
					pass.Done(answer, retryAfter)
				}
			})
			time.Sleep(5 * time.Millisecond)
		}
		wg.Wait()
		s := g.Stats()
		if s.Waiting != 0 || s.InFlight != 0 || len(g.queue.places) != 0 || g.queue.all.Len() != 0 || g.deadlines.Len() != 0 || g.alarm != nil {
			t.Errorf("at the end: %+v, %d places, %d of them waiting, %d deadlines, timer set: %t",
				s, len(g.queue.places), g.queue.all.Len(), g.deadlines.Len(), g.alarm != nil)
		}
		if s.Sent < 100 || s.Peak > 200 {
			t.Errorf("got %d requests, %d in one second", s.Sent, s.Peak)
		}
	})
}
