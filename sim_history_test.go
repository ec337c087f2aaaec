// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"slices"
	"strings"
	"time"
)

// This file knows what was written in a simulation, and what each node has to know of
// it when. Times are durations since the simulation began.

// simFields is a role or a config as it was written.
type simFields struct {
	// a role
	config, audience string
	scopes           []string
	extra            string // the value of the form field "tenant"
	minTTL, maxTTL   time.Duration
	lease            bool

	// a config
	url, clientID, secret string
	timeout               time.Duration
	retries               int
	limit                 int // requests a second
	persist               bool
}

// asks is what the tokens of a role or config depend on.
func (f *simFields) asks() string {
	return strings.Join([]string{f.config, f.audience, strings.Join(f.scopes, " "), f.extra, f.url, f.clientID}, "|")
}

// simVersion is an entry as storage had it from one write to the next.
type simVersion struct {
	simFields
	number  int
	exists  bool
	corrupt bool          // nobody can read it
	at      time.Duration // when storage had it
	until   time.Duration // when storage had the next; -1 for the newest
	started time.Duration // when the write that made it began
	renews  bool          // it drops the tokens from before
	dropAt  time.Duration // tokens asked for before this are dropped

	generation string // as it is stored
	// skips are the times in which other generations stood, since one came back with
	// a snapshot.
	skips []simSpan
}

// simSpan is a time.
type simSpan struct{ from, to time.Duration }

// simHistory is all versions of one entry, by the order in which storage had them.
type simHistory struct{ versions []*simVersion }

func newSimHistory() *simHistory {
	return &simHistory{[]*simVersion{{until: -1}}}
}

func (h *simHistory) last() *simVersion { return h.versions[len(h.versions)-1] }

// write adds what op made of the newest version.
func (h *simHistory) write(op *simOp, now time.Duration) *simVersion {
	prev := h.last()
	next := &simVersion{
		simFields: prev.simFields, number: len(h.versions), exists: true,
		at: now, until: -1, started: op.start, dropAt: prev.dropAt, skips: prev.skips,
	}
	next.scopes = slices.Clone(prev.scopes)
	switch op.kind {
	case opDelete:
		next.simFields, next.exists = simFields{}, false
		next.renews, next.dropAt = true, now
	case opRotate:
		// The token that stays was asked for before the write, but not before the
		// rotation was.
		next.renews, next.dropAt = true, op.start
	default:
		op.change(&next.simFields, !prev.exists)
		if !prev.exists || prev.asks() != next.asks() {
			next.renews, next.dropAt = true, now
		}
	}
	prev.until = now
	h.versions = append(h.versions, next)
	return next
}

// restore makes an older version the newest.
func (h *simHistory) restore(number int, now time.Duration) *simVersion {
	next := *h.versions[number]
	for _, later := range h.versions[number+1:] {
		if later.renews {
			next.skips = append(slices.Clone(next.skips), simSpan{later.at, now})
			break
		}
	}
	next.number, next.at, next.until, next.started, next.renews = len(h.versions), now, -1, now, true
	h.last().until = now
	h.versions = append(h.versions, &next)
	return &next
}

// at is the newest version at that time.
func (h *simHistory) at(now time.Duration) *simVersion {
	for _, v := range slices.Backward(h.versions) {
		if v.at <= now {
			return v
		}
	}
	return h.versions[0]
}

// simKnown says that a node has to know that version from then on.
type simKnown struct {
	at     time.Duration
	number int
}

// learn notes that the node has to know that version from now on.
func (n *simNode) learn(key string, number int) {
	n.known[key] = append(n.known[key], simKnown{n.w.now(), number})
}

// knows is the number of the oldest version that the node may go by in what began at
// that time.
func (n *simNode) knows(key string, began time.Duration) int {
	number := n.found[key]
	for _, k := range n.known[key] {
		if k.at < began {
			number = max(number, k.number)
		}
	}
	return number
}

// upToDate tells whether the node had to know the newest version at that time.
func (n *simNode) upToDate(key string, at time.Duration) bool {
	return n.knows(key, at) == n.w.history[key].last().number
}

// possible are the versions that the node may go by in what lasts from began to ended.
func (n *simNode) possible(key string, began, ended time.Duration) []*simVersion {
	h := n.w.history[key]
	if h == nil {
		return []*simVersion{newSimHistory().last()}
	}
	from, to := n.knows(key, began), h.at(ended).number
	return h.versions[from : max(to, from)+1]
}

// changed tells whether what the entry's tokens depend on changed for the node between
// those times: in storage, or by what the node was told.
func (n *simNode) changed(key string, began, ended time.Duration) bool {
	h := n.w.history[key]
	if h == nil {
		return false
	}
	for _, v := range h.versions {
		if v.renews && began <= v.at && v.at <= ended {
			return true
		}
	}
	for _, k := range n.known[key] {
		if began <= k.at && k.at <= ended {
			return true
		}
	}
	return false
}

// since tells whether the node had to know at that time what tokens depend on since that
// version: a token that it served to a reader who came then was asked for under it.
func (n *simNode) since(key string, v *simVersion, at time.Duration) bool {
	renewed := 0
	for _, older := range n.w.history[key].versions[:v.number+1] {
		if older.renews {
			renewed = older.number
		}
	}
	return n.knows(key, at) >= renewed
}
