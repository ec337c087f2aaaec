// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"slices"
	"strings"
	"time"
)

// This file records what was written in a simulation and when each node must know of it.
// Times are durations since the simulation began.

// simFields holds a role or a config as it was written.
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
	limit                 int // requests per second
	persist               bool
}

// asks returns what the tokens of a role or config depend on.
func (f *simFields) asks() string {
	return strings.Join([]string{f.config, f.audience, strings.Join(f.scopes, " "), f.extra, f.url, f.clientID}, "|")
}

// simVersion is an entry as storage held it from one write to the next.
type simVersion struct {
	simFields
	number  int
	exists  bool
	corrupt bool          // it cannot be decoded
	at      time.Duration // when storage got it
	until   time.Duration // when storage got the next one; -1 for the newest
	started time.Duration // when the write that made it began
	renews  bool          // it drops the earlier tokens
	dropAt  time.Duration // tokens requested before this are dropped

	generation string // as stored
	// skips are the spans in which another generation stood, after a snapshot brought
	// this one back.
	skips []simSpan
}

// simSpan is a span of time.
type simSpan struct{ from, to time.Duration }

// simHistory holds all versions of one entry, in the order in which storage got them.
type simHistory struct{ versions []*simVersion }

func newSimHistory() *simHistory {
	return &simHistory{[]*simVersion{{until: -1}}}
}

func (h *simHistory) last() *simVersion { return h.versions[len(h.versions)-1] }

// write adds the version that op makes of the newest one.
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
		// The token that stays was requested before the write, but not before the
		// rotation started.
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

// restore makes an older version the newest again.
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

// at returns the newest version at that time.
func (h *simHistory) at(now time.Duration) *simVersion {
	for _, v := range slices.Backward(h.versions) {
		if v.at <= now {
			return v
		}
	}
	return h.versions[0]
}

// simKnown says that a node must know that version from then on.
type simKnown struct {
	at     time.Duration
	number int
}

// learn records that the node must know that version from now on.
func (n *simNode) learn(key string, number int) {
	n.known[key] = append(n.known[key], simKnown{n.w.now(), number})
}

// knows returns the number of the oldest version that the node may use in what began at
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

// upToDate reports whether the node had to know the newest version at that time.
func (n *simNode) upToDate(key string, at time.Duration) bool {
	return n.knows(key, at) == n.w.history[key].last().number
}

// possible returns the versions that the node may use in what lasts from began to ended.
func (n *simNode) possible(key string, began, ended time.Duration) []*simVersion {
	h := n.w.history[key]
	if h == nil {
		return []*simVersion{newSimHistory().last()}
	}
	from, to := n.knows(key, began), h.at(ended).number
	return h.versions[from : max(to, from)+1]
}

// changed reports whether what the entry's tokens depend on changed for the node between
// those times: in storage, or by an invalidation.
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

// since reports whether the node had to know at that time what tokens depend on since that
// version. Then a token that it served to a reader who came at that time was requested
// under it.
func (n *simNode) since(key string, v *simVersion, at time.Duration) bool {
	renewed := 0
	for _, older := range n.w.history[key].versions[:v.number+1] {
		if older.renews {
			renewed = older.number
		}
	}
	return n.knows(key, at) >= renewed
}
