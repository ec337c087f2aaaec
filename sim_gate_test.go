// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"net/http"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file judges the pace of a simulated node's token requests: none during a
// Retry-After, no more per second than the config allows, and no read that fails for want
// of a turn without having waited for one.

// simDefaultLimit is max_requests_per_second of a config that does not set it.
const simDefaultLimit = 20

// simGate is what can be known from outside of a node's gate to an endpoint of a config.
type simGate struct {
	sent []time.Duration // requests, oldest first
	// An answer that came at closedAt closed the gate until closed.
	closed, closedAt time.Duration
	refused          time.Duration // when the last 429 came; -1 before
}

func (j *simJudge) gate(config, url string) *simGate {
	key := config + " " + url
	g := j.gates[key]
	if g == nil {
		g = &simGate{refused: -1}
		j.gates[key] = g
	}
	return g
}

// sameGate reports whether the config has surely had that endpoint since that time, and so
// the same gate.
func (n *simNode) sameGate(m *simMint, since time.Duration) bool {
	for _, v := range n.possible(configPrefix+m.config, max(0, since-simSlack), n.w.now()) {
		if !v.exists || v.url != m.entry.TokenURL {
			return false
		}
	}
	return true
}

// judgePace judges whether a request may leave now. The caller holds w.mu.
func (w *simWorld) judgePace(m *simMint) {
	n, now := m.node, w.now()
	g := n.judge.gate(m.config, m.entry.TokenURL)
	if now < g.closed && n.sameGate(m, g.closedAt) {
		w.violate("%s sends a request %s before the end of a Retry-After that came at %s", m, g.closed-now, g.closedAt)
	}
	for len(g.sent) > 0 && now-g.sent[0] >= time.Second {
		g.sent = g.sent[1:]
	}
	g.sent = append(g.sent, now)
	limit := 0
	for _, v := range n.possible(configPrefix+m.config, max(0, now-time.Second-simSlack), now) {
		if limit = max(limit, v.limit); !v.exists {
			limit = max(limit, m.entry.MaxRequestsPerSecond) // it is a verification
		}
	}
	if len(g.sent) > max(limit, m.entry.MaxRequestsPerSecond) && n.sameGate(m, g.sent[0]) {
		w.violate("%s sends request %d within a second, though the limit is %d", m, len(g.sent), limit)
	}
}

// answered records what an answer says about the pace. The caller holds w.mu.
func (w *simWorld) answered(m *simMint, o simOutcome) {
	g, now := m.node.judge.gate(m.config, m.entry.TokenURL), w.now()
	if o.throttled {
		g.refused = now
	}
	if o.after > 0 && now+o.after > g.closed {
		g.closed, g.closedAt = now+o.after, now
	}
}

// throttled ends a mint whose request returns to its place: it counts as if it had never
// left. The caller holds w.mu.
func (w *simWorld) throttled(m *simMint) {
	m.end = w.now()
	delete(m.node.judge.flights, m)
	w.note("%s is throttled", m)
}

// paced reports whether the config's gate may have held up requests since that time.
func (n *simNode) paced(config string, since time.Duration) bool {
	for key, g := range n.judge.gates {
		if strings.HasPrefix(key, config+" ") && (g.closed > since || g.refused >= 0 && g.refused+2*time.Minute > since) {
			return true
		}
	}
	return false
}

// throttledOnce reports whether a config that the role may have had was ever throttled.
func (n *simNode) throttledOnce(role string) bool {
	for _, v := range n.possible(rolePrefix+role, 0, n.w.now()) {
		for key, g := range n.judge.gates {
			if strings.HasPrefix(key, v.config+" ") && g.refused >= 0 {
				return true
			}
		}
	}
	return false
}

// outOfTime reports whether a read may fail because MojoAuth gave no answer in time: both
// the read and its request waited as long as they may.
func (w *simWorld) outOfTime(op *simOp, coded logical.HTTPCodedError) bool {
	if coded == nil || coded.Code() != http.StatusGatewayTimeout || !w.hadItsTime(op) {
		return false
	}
	for m := range op.node.judge.flights {
		if m.role == op.role && op.end-m.begin >= m.entry.RequestTimeout {
			return true
		}
	}
	return false
}

// turnedAway reports whether a read failed for want of a turn at the gate, and judges
// whether it may: it waited as long as a read may, or the gate stays closed for longer.
func (w *simWorld) turnedAway(op *simOp, coded logical.HTTPCodedError) bool {
	if coded == nil || coded.Code() != http.StatusTooManyRequests {
		return false
	}
	n := op.node
	if w.hadItsTime(op) {
		return true
	}
	for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
		for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
			if config.exists && n.judge.gate(role.config, config.url).closed > op.end {
				return true
			}
		}
	}
	w.violate("%s was turned away after %s, though no Retry-After closed the gate", op, op.end-op.start)
	return true
}
