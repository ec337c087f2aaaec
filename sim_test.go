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

// This file runs simulations of two nodes over one storage and a token endpoint, with
// faults everywhere, in a time of their own. A seed says all that happens, so that a
// seed that fails fails again. From the outside in:
//
//	sim_script_test.go    what happens, and in which order
//	sim_world_test.go     the nodes, the requests to them, the dice
//	sim_storage_test.go   the storage that they share
//	sim_endpoint_test.go  the token endpoint, and the truth about each token it gave
//	sim_history_test.go   what was written, and who has to know of it when
//	sim_deaths_test.go    how nodes die, start again and change places
//	sim_judge_test.go     whether the engine may ask the endpoint
//	sim_reads_test.go     whether it may answer like that
//	sim_stored_test.go    whether it may write such a token to storage, and what is there
//	sim_standby_test.go   what a node that may not write leaves to the other
//	sim_rules_test.go     the numbers of the contract, once more

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

// A seed is a case: played again, all happens again as it did.
func TestSimulationRepeats(t *testing.T) {
	defer simOrderly()()
	from, seeds := simNumber(t, "FROM", 1), simSeeds/20
	for seed := from; seed < from+seeds; seed++ {
		t.Run("seed-"+strconv.Itoa(seed), func(t *testing.T) {
			first, again := simulate(t, uint64(seed)).trace(), simulate(t, uint64(seed)).trace()
			for i := range min(len(first), len(again)) {
				if first[i] != again[i] {
					t.Fatalf("line %d of the trace is\n%s\nand then\n%s", i, first[i], again[i])
				}
			}
			if len(first) != len(again) {
				t.Errorf("the trace has %d lines, then %d", len(first), len(again))
			}
		})
	}
}

var simVaries = regexp.MustCompile(` The next attempt is at \S+, in \S+|\d+ waiting`)

// trace is all that happened, in an order that does not depend on which of two things
// of the same moment came first.
func (w *simWorld) trace() []string {
	lines := make([]string, len(w.log.events))
	for i, event := range w.log.events {
		// Of what ends at one moment, one may or may not see the other end.
		lines[i] = simVaries.ReplaceAllString(event.String(), "")
	}
	slices.Sort(lines)
	return lines
}

// simOrderly has goroutines that may run at the same moment run in the same order each
// time, as far as that can be had: on one thread, undisturbed by the garbage collector.
func simOrderly() (undo func()) {
	threads, percent := runtime.GOMAXPROCS(1), debug.SetGCPercent(-1)
	return func() {
		runtime.GOMAXPROCS(threads)
		debug.SetGCPercent(percent)
	}
}

// simNumber is a number from the environment.
func simNumber(t *testing.T, name string, fallback int) int {
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%q is no number", name, text)
	}
	return n
}

// simulate plays the case of a seed, and fails the test if a rule was broken.
func simulate(t *testing.T, seed uint64) *simWorld {
	var w *simWorld
	// Outside of the bubble, real time passes.
	stuck := time.AfterFunc(time.Minute, func() {
		panic(fmt.Sprintf("seed %d has been stuck for a minute: a lock may be held where time has to pass", seed))
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

// simAgain says how to see a case again.
func simAgain(seed uint64) string {
	return fmt.Sprintf("see it with: make simulate FROM=%d SEEDS=1 TRACE=1", seed)
}

// report fails the test with what was broken, and says how to see more.
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
	t.Errorf("%d violations, the first of them:\n%s\n%s", len(w.log.violations), strings.Join(shown, "\n"), simAgain(w.seed))
}
