// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"errors"
	"strings"
	"time"
)

// This file forwards the reads that a simulated standby does not answer. It judges what the
// standby forwards, what it answers itself, and that it leaves minting to the active node.

// errSimNoActive is what a client gets when no active node can take its forwarded request.
var errSimNoActive = errors.New("simulated cluster without an active node")

// simForwardPause is how often a standby forwards a reader of a due token.
const simForwardPause = 5 * time.Second

// simDueForward says when a standby last forwarded a read though it had a token.
type simDueForward struct {
	at    time.Duration
	token *simToken
}

// active returns the active node, nil for none.
func (w *simWorld) active() *simNode {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.activeNode()
}

func (w *simWorld) activeNode() *simNode {
	for _, n := range w.nodes {
		if !n.readOnly && n.closingAt < 0 {
			return n
		}
	}
	return nil
}

// writer returns the node that gets a write meant for n: mostly the active one.
func (w *simWorld) writer(n *simNode) *simNode {
	if !w.stores || n != nil && !n.readOnly || n != nil && w.fate.IntN(5) == 0 {
		return n
	}
	return w.active()
}

// forward makes the active node answer a read, as Vault does.
func (n *simNode) forward(op *simOp) {
	w := n.w
	time.Sleep(time.Duration(w.dice("forward", n.name, op.path, simData(op.data)).Int64N(int64(30 * time.Millisecond))))
	w.mu.Lock()
	active := w.activeNode()
	if active == nil {
		op.resp, op.err = nil, errSimNoActive
		if w.calm >= 0 {
			w.violate("%s: there is no active node to forward to, though all is well", op)
		}
		w.note("%s: there is no active node to forward to", op)
		w.mu.Unlock()
		return
	}
	w.mu.Unlock()
	ended := make(chan struct{})
	there := &simOp{
		kind: op.kind, path: op.path, data: op.data, giveUp: op.giveUp, slow: op.slow,
		role: op.role, scopes: op.scopes, minTTL: op.minTTL,
		done: func(*simOp) { close(ended) },
	}
	if op.giveUp > 0 {
		there.giveUp = max(1, op.giveUp-(w.now()-op.start))
	}
	active.begin(there)
	<-ended
	w.mu.Lock()
	defer w.mu.Unlock()
	op.resp, op.err, op.gaveUp = there.resp, there.err, there.gaveUp
}

// judgeForward judges whether a read may be forwarded. The caller holds w.mu.
func (w *simWorld) judgeForward(op *simOp) {
	n := op.node
	j := &n.judge
	j.reads = append(j.reads, op)
	j.forwards++
	if op.resp != nil {
		w.violate("%s is forwarded with an answer", op)
	}
	if !n.readOnly {
		w.violate("%s is forwarded by the active node", op)
		return
	}
	op.forwarded = true
	w.tally.forwards++
	j.forwardedAt[op.role] = op.end
	if n.closingAt >= 0 {
		return
	}
	op.lookedUp()
	keeps, keepsNot := false, false
	for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
		if !role.exists || role.lease {
			return
		}
		for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
			switch {
			case !config.exists:
				return
			case !config.persist:
				keepsNot = true
			case op.setOf(role) != simSet(role.scopes):
				return
			default:
				keeps = true
			}
		}
	}
	if keepsNot && !keeps {
		w.violate("%s is forwarded, though its config stores no tokens", op)
	}
	if keepsNot { // it may have waited for a mint first
		return
	}
	if waited := op.end - op.start - op.storageTime; waited > simSlack {
		w.violate("%s is forwarded after %s", op, waited)
	}
	for _, a := range op.held() {
		if n.storageFailed >= a.served {
			continue
		}
		fresh, due := true, false
		for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
			left := a.end(n, role, op.end, true) - op.end
			life, _ := a.life(role, op.minTTL, op.end)
			fresh = fresh && left > life.refresh
			life, _ = a.life(role, 0, op.end)
			due = due || left <= life.refresh
		}
		switch last, ok := j.dueForwards[op.role]; {
		case fresh:
			w.violate("%s is forwarded, though %s is cached, which is not due yet", op, a.token.text)
			return
		case !due: // it is due only by the reader's own min_ttl
		case ok && last.token == a.token && op.start-last.at < simForwardPause-simSlack:
			w.violate("%s is forwarded %s after another one, though %s is cached", op, op.start-last.at, a.token.text)
			return
		default:
			j.dueForwards[op.role] = simDueForward{op.end, a.token}
		}
	}
}

// keeps reports whether the node surely still holds a token that it got. A standby follows
// storage, unless its config stores no tokens.
func (n *simNode) keeps(a *simAnswer) bool {
	w := n.w
	if !n.readOnly || !w.stores {
		return true
	}
	s := w.storedAt(simTokenPrefix + a.mint.config + "/" + a.mint.role)
	if s != nil && a.fromStorage && s.AccessToken == a.token.text && s.at <= a.delivered && s.again == a.again {
		return true
	}
	for _, config := range n.possible(configPrefix+a.mint.config, a.delivered, w.now()) {
		if config.persist {
			return false
		}
	}
	return true
}

// judgeStandby judges that a standby answers only what it may. The caller holds w.mu.
func (w *simWorld) judgeStandby(op *simOp, served []*simAnswer) {
	n := op.node
	w.judgeRestored(op, served)
	if !n.readOnly || !w.stores {
		return
	}
	leased, keeps, narrowed, early := true, true, true, op.minTTL > 0
	for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
		leased = leased && role.lease
		narrowed = narrowed && op.setOf(role) != simSet(role.scopes)
		for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
			keeps = keeps && config.persist
		}
		for _, a := range served {
			left := a.end(n, role, op.end, true) - op.start
			wanted, _ := a.life(role, op.minTTL, op.start)
			life, _ := a.life(role, 0, op.start)
			early = early && left <= wanted.refresh && left-(op.end-op.start) > life.refresh
		}
	}
	switch {
	case leased:
		w.violate("%s got a lease from a standby", op)
	case !keeps:
	case narrowed:
		w.violate("%s got a token with a scope subset from a standby", op)
	case early:
		w.violate("%s got %s from a standby, though it is due by its min_ttl", op, served[0].token.text)
	default:
		w.judgeAnnounced(op, served)
	}
}

// judgeAnnounced judges that a standby let the active node know of a reader before it served
// a token that had come without one. The caller holds w.mu.
func (w *simWorld) judgeAnnounced(op *simOp, served []*simAnswer) {
	n := op.node
	for _, a := range served {
		// While its config stores no tokens, a standby announces nothing, not even later.
		for _, config := range n.possible(configPrefix+a.mint.config, a.delivered, op.end) {
			if !config.persist {
				return
			}
		}
		for _, known := range a.token.on(n) {
			if !known.unasked || known.served >= 0 {
				return
			}
		}
		if at, ok := n.judge.forwardedAt[op.role]; ok && at >= a.delivered || n.read(op.role) {
			return
		}
	}
	w.violate("%s is the first to get %s from a standby, and no read of it was forwarded", op, served[0].token.text)
}

// judgeRestored counts the reads that were surely answered from storage. The caller holds
// w.mu.
func (w *simWorld) judgeRestored(op *simOp, served []*simAnswer) {
	for _, a := range served {
		if !a.fromStorage || a.served >= 0 || a.unasked || a.delivered < op.end { // not found for this read
			return
		}
		for _, role := range op.node.possible(rolePrefix+op.role, op.start, op.end) {
			if life, _ := a.life(role, op.minTTL, op.end); a.end(op.node, role, op.end, true)-op.end <= life.refresh {
				return
			}
		}
	}
	op.node.judge.restored++
	w.tally.restored++
}

// judgeUnknown judges a read that was refused because its role or config does not exist. The
// caller holds w.mu.
func (w *simWorld) judgeUnknown(op *simOp) {
	if op.node.readOnly && w.stores && strings.Contains(simResult(op), "does not exist") {
		w.violate("%s was refused by a standby, which may not know of it yet: %s", op, simResult(op))
	}
}

// judgeMayMint judges that a standby leaves minting to the active node, unless its config
// stores no tokens. The caller holds w.mu.
func (w *simWorld) judgeMayMint(m *simMint) {
	n := m.node
	if !n.readOnly || !w.stores {
		return
	}
	for _, config := range n.possible(configPrefix+m.config, max(0, m.begin-simSlack-simPatience), m.begin) {
		if !config.persist {
			return
		}
	}
	w.violate("%s begins on a standby", m)
}
