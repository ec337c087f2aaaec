// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"fmt"
	"testing"
	"time"
)

// stepped is a clock that the test moves. Its timers never fire.
type stepped struct{ now time.Time }

func (s *stepped) Now() time.Time { return s.now }
func (s *stepped) AfterFunc(time.Duration, func()) (stop func() bool) {
	return func() bool { return true }
}

// BenchmarkWait measures a turn that does not wait: creating, joining, sending and the
// answer.
func BenchmarkWait(b *testing.B) {
	clock := &stepped{epoch}
	g := New(1000, clock)
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		clock.now = clock.now.Add(time.Second)
		turn := g.Turn("role", Whole)
		waiter, _ := turn.Join(clock.now.Add(10*time.Second), clock.now)
		pass, err := turn.Wait(ctx)
		if err != nil {
			b.Fatal(err)
		}
		pass.Done(Answered, 0)
		waiter.Leave()
	}
}

// BenchmarkWaitBehindTenThousand measures one turn that arrives while 10,000 places wait,
// and one that leaves.
func BenchmarkWaitBehindTenThousand(b *testing.B) {
	clock := &stepped{epoch}
	g := New(1000, clock)
	next := 0
	var under *Pass
	come := func() {
		turn := g.Turn(fmt.Sprint(next), Whole)
		next++
		if _, ok := turn.Join(clock.now.Add(time.Hour), clock.now); !ok {
			b.Fatal("a new turn cannot be joined")
		}
		if _, err := g.enter(turn, time.Time{}, func(error) { under = &Pass{turn: turn} }); err != nil {
			b.Fatal(err)
		}
	}
	for range maxPlaces - 1 {
		come()
	}
	b.ReportAllocs()
	for b.Loop() {
		clock.now = clock.now.Add(time.Second)
		under = nil
		come()
		under.Done(Answered, 0)
	}
}
