// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// This file simulates two nodes that share a storage and a token endpoint, with faults
// everywhere, in virtual time. A seed determines everything that happens, so a failing
// seed fails again. From the outside in:
//
//	sim_script_test.go    what happens, and in which order
//	sim_world_test.go     the nodes, the requests to them, the dice
//	sim_storage_test.go   the shared storage
//	sim_endpoint_test.go  the token endpoint, and the truth about each token it issued
//	sim_history_test.go   what was written, and when each node must know of it
//	sim_deaths_test.go    how nodes die, restart, and change roles
//	sim_judge_test.go     whether the engine may send a token request
//	sim_gate_test.go      whether it keeps the pace
//	sim_reads_test.go     whether it may answer a read that way
//	sim_stored_test.go    whether it may store a token, and what storage holds
//	sim_standby_test.go   what a standby leaves to the active node
//	sim_rules_test.go     the numbers of the contract, written a second time

func TestSimulation(t *testing.T) {
	defer simOrderly()()
	from, seeds := simNumber(t, "FROM", 1), simNumber(t, "SEEDS", simSeeds)
	failed, deadly := 0, 0
	var tally simTally
	for seed := from; seed < from+seeds; seed++ {
		if !t.Run("seed-"+strconv.Itoa(seed), func(t *testing.T) {
			w := simulate(t, uint64(seed))
			if tally.add(w.tally); w.tally.deaths > 0 {
				deadly++
			}
		}) {
			failed++
		}
	}
	t.Logf("nodes died in %d of %d seeds: %+v", deadly, seeds, tally)
	if failed > 0 {
		t.Logf("%d of %d seeds failed", failed, seeds)
	}
}

// TestSimulationRepeats plays each seed until the same things happened twice in a row. On a
// busy machine, the scheduler may interrupt a goroutine and so change which of two
// simultaneous events comes first. A case that depends on anything but its seed differs
// every time.
func TestSimulationRepeats(t *testing.T) {
	if simRace {
		t.Skip("the race detector runs goroutines in random order; make test-unit also runs this test without it")
	}
	defer simOrderly()()
	from, seeds := simNumber(t, "FROM", 1), simSeeds/20
	for seed := from; seed < from+seeds; seed++ {
		t.Run("seed-"+strconv.Itoa(seed), func(t *testing.T) {
			const plays = 5
			last := simulate(t, uint64(seed)).trace()
			var difference string
			for range plays - 1 {
				trace := simulate(t, uint64(seed)).trace()
				if difference = simDifference(last, trace); difference == "" {
					return
				}
				last = trace
			}
			t.Errorf("no two of %d plays in a row are the same: %s", plays, difference)
		})
	}
}

// simDifference describes the first difference between two traces, or returns "".
func simDifference(first, again []string) string {
	for i := range min(len(first), len(again)) {
		if first[i] != again[i] {
			return fmt.Sprintf("line %d of the trace is\n%s\nand then\n%s", i, first[i], again[i])
		}
	}
	if len(first) != len(again) {
		return fmt.Sprintf("the trace has %d lines and then %d", len(first), len(again))
	}
	return ""
}

var simVaries = regexp.MustCompile(` The next attempt is at \S+, in \S+|\d+ waiting| #\d+`)

// trace returns everything that happened. Its order does not depend on which of two
// simultaneous events came first.
func (w *simWorld) trace() []string {
	lines := make([]string, len(w.log.events))
	for i, event := range w.log.events {
		// Requests of the same moment get their numbers in either order. Of two operations
		// that end at the same moment, one may or may not see the other's end.
		lines[i] = simVaries.ReplaceAllString(event.String(), "")
	}
	slices.Sort(lines)
	return lines
}

// simOrderly makes goroutines that may run at the same moment run in the same order each
// time, as far as possible: on one thread, without the garbage collector.
func simOrderly() (undo func()) {
	threads, percent := runtime.GOMAXPROCS(1), debug.SetGCPercent(-1)
	return func() {
		runtime.GOMAXPROCS(threads)
		debug.SetGCPercent(percent)
	}
}

// simNumber returns a number from the environment.
func simNumber(t *testing.T, name string, fallback int) int {
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%q is not a number", name, text)
	}
	return n
}

// simulate plays the case of a seed and fails the test if the engine broke a rule.
func simulate(t *testing.T, seed uint64) *simWorld {
	var w *simWorld
	// Real time passes outside the bubble.
	stuck := time.AfterFunc(time.Minute, func() {
		panic(fmt.Sprintf("seed %d has been stuck for a minute: a lock may be held while time must pass", seed))
	})
	defer stuck.Stop()
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("panic: %v\n%s", p, simAgain(seed))
		}
		if w != nil {
			w.report(t)
		}
	}()
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		defer func() {
			if p := recover(); p != nil {
				fmt.Println(simAgain(seed)) // this panic ends the process
				panic(p)
			}
		}()
		w = newSimWorld(t, seed)
		w.play()
	})
	return w
}

// simAgain says how to replay a case.
func simAgain(seed uint64) string {
	return fmt.Sprintf("replay it with: make simulate FROM=%d SEEDS=1 TRACE=1", seed)
}

// report fails the test with the rules that were broken, and says how to see more.
func (w *simWorld) report(t *testing.T) {
	if os.Getenv("TRACE") != "" {
		for _, event := range w.log.events {
			fmt.Println(event)
		}
	}
	if len(w.log.violations) == 0 {
		return
	}
	shown := w.log.violations[:min(3, len(w.log.violations))]
	t.Errorf("%d violations, starting with:\n%s\n%s", len(w.log.violations), strings.Join(shown, "\n"), simAgain(w.seed))
}
