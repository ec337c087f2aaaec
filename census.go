// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"maps"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file counts what the cache holds, for status and metrics.

// census is what the cache holds at one moment.
type census struct {
	cached int // tokens that may be served
	// due counts the tokens in use that are due for renewal. nearest is the time until
	// the first of them expires.
	due     int
	nearest time.Duration
	// backoff has the configs that back off, and until when.
	backoff map[string]time.Time
	gates   map[string]gate.Stats // by config
}

// census counts what the cache holds.
func (c *tokenCache) census() census {
	now := time.Now()
	n := census{backoff: make(map[string]time.Time), gates: c.gates.stats()}
	c.mu.RLock()
	upstreams := maps.Clone(c.upstreams)
	c.mu.RUnlock()
	for _, s := range c.all() {
		tok := s.token.Load()
		if !tok.usable(now) {
			continue
		}
		n.cached++
		if tok.phase(now) == lifetime.Due && tok.inUse() {
			servable := tok.timeLeft(now) - tok.schedule.Floor
			if n.due == 0 || servable < n.nearest {
				n.nearest = servable
			}
			n.due++
		}
	}
	for name, up := range upstreams {
		if until := up.nextTry(); now.Before(until) {
			n.backoff[name] = until
		}
	}
	return n
}

// nextAttempt is when a config may next send a request, after a back-off and a
// Retry-After. It is zero if that is now.
func (n *census) nextAttempt(config string) time.Time {
	next := n.backoff[config]
	if closed := n.gates[config].ClosedUntil; closed.After(next) {
		next = closed
	}
	return next
}
