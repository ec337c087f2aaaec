// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import "time"

// This file holds the rules that the simulation judges by. It repeats the numbers and
// formulas on purpose: nothing here calls the code under judgment.

const (
	simMaxFloor      = 60 * time.Second
	simMaxMargin     = 300 * time.Second
	simAssumedLife   = 5 * time.Minute
	simLongestLife   = 365 * 24 * time.Hour
	simPatience      = 2 * time.Second
	simFirstBackoff  = 5 * time.Second
	simLastBackoff   = 30 * time.Second
	simPrecedence    = 2 * time.Second
	simRepeatedFloor = 5 * time.Second
	simCloseWithin   = 5 * time.Second
	simLeastGrace    = 900 * time.Millisecond // that a read has beyond request_timeout
)

// simLife is what follows from a token's lifetime and its readers' min_ttl.
type simLife struct{ life, floor, margin, refresh, jitter time.Duration }

func newSimLife(life, minTTL time.Duration) simLife {
	l := simLife{
		life:    life,
		floor:   min(simMaxFloor, life/10),
		margin:  min(simMaxMargin, life/10),
		refresh: min(max(minTTL, life/4), life*4/5),
	}
	l.jitter = max(0, (l.refresh-l.margin)/2)
	return l
}

// simLifetime returns L of a token. told is the lifetime that the endpoint reported, or 0
// for none.
func simLifetime(told, maxTTL time.Duration) time.Duration {
	switch {
	case told > 0 && maxTTL > 0:
		return min(told, maxTTL)
	case told > 0:
		return told
	case maxTTL > 0:
		return min(maxTTL, simLongestLife)
	default:
		return simAssumedLife
	}
}

// simBackoff returns the back-off after that many failures in a row: the shortest and the
// longest that jitter allows.
func simBackoff(failures int) (shortest, longest time.Duration) {
	wait := simFirstBackoff
	for i := 1; i < failures && wait < simLastBackoff; i++ {
		wait *= 2
	}
	wait = min(wait, simLastBackoff)
	return wait * 4 / 5, wait
}

// simSeconds rounds down to whole seconds, but not below one.
func simSeconds(d time.Duration) int64 { return max(1, int64(d/time.Second)) }
