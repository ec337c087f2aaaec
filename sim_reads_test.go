// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file judges the answers of a simulated node.

// recent returns the reads that ended since that time.
func (j *simJudge) recent(since time.Duration) []*simOp {
	i := len(j.reads)
	for i > 0 && j.reads[i-1].end >= since {
		i--
	}
	return j.reads[i:]
}

// judgeRead judges the answer to a read. The caller holds w.mu.
func (w *simWorld) judgeRead(op *simOp) {
	n := op.node
	n.judge.reads = append(n.judge.reads, op)
	op.lookedUp()
	took := op.end - op.start
	if op.giveUp > 0 && took > op.giveUp {
		w.violate("%s was answered %s after the reader gave up", op, took-op.giveUp)
	}
	if n.closingAt >= 0 && n.closingAt <= op.end {
		return // it may fail in any way, but had to end
	}
	if n.readOnly && op.storageOps > 0 && op.err != nil { // the next reader must compare with storage
		clear(n.inMemory)
		n.blurredAt = op.end
	}
	w.judgeWait(op) // first, by what the node held before the answer
	if op.resp.IsError() || op.err != nil {
		if text := simResult(op); strings.Contains(text, "canary") {
			w.violate("%s: the error holds the client secret: %s", op, text)
		}
		w.judgeFailedRead(op)
	} else {
		w.judgeToken(op)
	}
	for _, k := range n.judge.keys {
		for _, a := range k.answers {
			a.wanted = a.wanted || (op.gaveUp || op.err != nil || op.resp.IsError()) && k.role == op.role
		}
	}
}

// held returns the tokens that the node surely held when the read started and that may
// still be served when it ended.
func (op *simOp) held() []*simAnswer {
	n := op.node
	var held []*simAnswer
	for key, k := range n.judge.keys {
		if k.role != op.role {
			continue
		}
		_, set, _ := strings.Cut(key, "/")
		for _, a := range k.answers {
			if a.surely(n, op.start) && n.w.stillGood(n, a, op.start, op.end) && op.wants(set) {
				held = append(held, a)
			}
		}
	}
	return held
}

// wants reports whether the read is for that set of scopes under every version of the role
// that it may use.
func (op *simOp) wants(set string) bool {
	for _, role := range op.node.possible(rolePrefix+op.role, op.start, op.end) {
		if op.setOf(role) != set {
			return false
		}
	}
	return true
}

// setOf returns the set of scopes that the read is for under that version of the role.
func (op *simOp) setOf(role *simVersion) string {
	if len(op.scopes) == 0 {
		return simSet(role.scopes)
	}
	return simSet(op.scopes)
}

// judgeToken judges a token that was served.
func (w *simWorld) judgeToken(op *simOp) {
	n := op.node
	text, _ := op.resp.Data["access_token"].(string)
	tok := w.endpoint.tokens[text]
	if tok == nil {
		w.violate("%s got a token that the endpoint never issued: %q", op, text)
		return
	}
	var why []string
	fits := false
	var served []*simAnswer // the answers that the token may come from
	for _, a := range tok.on(n) {
		if a.delivered > op.end {
			continue
		}
		for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
			if problem := w.unfit(op, a, role); problem != "" {
				why = append(why, fmt.Sprintf("role version %d: %s", role.number, problem))
				continue
			}
			fits = true
			if !slices.Contains(served, a) {
				served = append(served, a)
			}
		}
	}
	if !fits {
		if why == nil {
			why = []string{"no answer with it has reached this node"}
		}
		w.violate("%s got %s, which does not fit: %s", op, text, strings.Join(why, "; "))
		return
	}
	w.judgeLaterEnd(op, served[0])
	w.judgeStandby(op, served)
	for _, a := range served {
		if a.served < 0 {
			a.served = op.end
		}
		a.asOf, a.wanted = max(a.asOf, op.start), true
	}
	if op.storageOps == 0 && n.blurredAt < op.start && n.upToDate(rolePrefix+op.role, op.start) &&
		n.upToDate(configPrefix+served[0].mint.config, op.start) {
		n.inMemory[op.role] = true
	}
}

// unfit returns what is wrong with a token that was served to a read if the node used that
// version of the role, or "".
func (w *simWorld) unfit(op *simOp, a *simAnswer, role *simVersion) string {
	n := op.node
	switch {
	case !role.exists:
		return "the role does not exist"
	case role.config != a.mint.config:
		return "it is of config " + a.mint.config
	case !a.fitsRole(role):
		return fmt.Sprintf("it was requested as %s at %s, and the role has been %s since %s", a.mint.asks(), a.sent, role.asks(), role.dropAt)
	case op.setOf(role) != a.mint.set:
		return "its scopes are " + a.mint.set
	}
	configOK := false
	for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
		configOK = configOK || a.fitsConfig(config)
	}
	if !configOK {
		return fmt.Sprintf("it was requested as %s at %s, and the config has changed since", a.mint.asks(), a.sent)
	}
	return w.unfitLife(op, a, role)
}

// unfitLife is unfit for the times in the answer.
func (w *simWorld) unfitLife(op *simOp, a *simAnswer, role *simVersion) string {
	life, left := a.life(role, op.minTTL, op.end)
	if !a.repeated(op.node, op.end, true) {
		return w.unfitEnd(op, a, role, life, left, life.floor)
	}
	// The first answer counts.
	for _, same := range a.token.on(op.node) {
		if !a.fromStorage && same.delivered < a.delivered && same.surely(op.node, a.mint.begin) &&
			w.stillGood(op.node, same, a.mint.begin, a.delivered) {
			return fmt.Sprintf("its answer from %s counts, but the node has had it since %s", a.sent, same.sent)
		}
	}
	ends := []time.Duration{a.end(op.node, role, op.end, false)}
	for _, again := range a.token.answers { // what looked like a rotation's answer may not be one
		if again.mint.exempt && again.repeats(a, op.node, op.end, true) {
			_, sooner := again.life(role, 0, 0)
			ends = append(ends, sooner)
		}
	}
	var first string
	for _, end := range ends {
		why := w.unfitEnd(op, a, role, life, end-op.end, min(life.floor, simRepeatedFloor))
		if why == "" {
			return ""
		}
		first = cmp.Or(first, why)
	}
	return first
}

// unfitEnd is unfitLife for a token with that much time left.
func (w *simWorld) unfitEnd(op *simOp, a *simAnswer, role *simVersion, life simLife, left, floor time.Duration) string {
	d := op.resp.Data
	ttl, _ := d["ttl"].(int64)
	seconds, _ := d["expires_at_seconds"].(int64)
	if a.token.end >= 0 && seconds > w.at(a.token.end).Unix() {
		return fmt.Sprintf("expires_at_seconds is %d, and it expires at %d", seconds, w.at(a.token.end).Unix())
	}
	if ttl < 1 {
		return fmt.Sprintf("ttl is %v", d["ttl"])
	}
	if want := formatSimTime(w.at(a.sent)); d["last_vault_rotation"] != want {
		return fmt.Sprintf("last_vault_rotation is %v, want %s", d["last_vault_rotation"], want)
	}
	end := w.at(op.end + left)
	if want := formatSimTime(end); seconds != end.Unix() || d["expires_at"] != want {
		return fmt.Sprintf("expires_at is %v (%d), want %s (%d)", d["expires_at"], seconds, want, end.Unix())
	}
	if left <= floor {
		return fmt.Sprintf("it has %s left, and its floor is %s", left, floor)
	}
	if want := simSeconds(life.life - life.refresh); d["rotation_period"] != want {
		return fmt.Sprintf("rotation_period is %v, want %d", d["rotation_period"], want)
	}
	return w.unfitTTL(op, a, role, life, left)
}

// unfitTTL is unfit for ttl and the lease.
func (w *simWorld) unfitTTL(op *simOp, a *simAnswer, role *simVersion, life simLife, left time.Duration) string {
	ttl := op.resp.Data["ttl"].(int64)
	lease := time.Duration(-1)
	if op.resp.Secret != nil {
		lease = op.resp.Secret.TTL
	}
	switch {
	case role.lease && lease < time.Second:
		return fmt.Sprintf("the lease is %s", lease)
	case !role.lease && lease >= 0:
		return "there is a lease"
	}
	first, last := simSeconds(left-life.refresh), simSeconds(left-life.refresh+life.jitter)
	fresh := ttl >= first && ttl <= last && (!role.lease || lease == max(time.Second, left-life.margin))
	shortest, longest := max(time.Second, min(30*time.Second, left/2)), max(time.Second, min(60*time.Second, left/2))
	stale := ttl >= simSeconds(shortest) && ttl <= simSeconds(longest) && (!role.lease || lease >= shortest && lease <= longest)
	isNew := a.delivered >= op.start
	switch {
	case left > life.refresh && fresh:
	case left <= life.refresh && isNew && (fresh || stale):
	case left <= life.refresh && stale:
	default:
		return fmt.Sprintf("ttl is %d and the lease %s, with %s left and R %s: want %d to %d when fresh, %s to %s when due", ttl, lease, left, life.refresh, first, last, shortest, longest)
	}
	if minTTL := max(op.minTTL, role.minTTL); left < minTTL && len(op.resp.Warnings) == 0 {
		return fmt.Sprintf("it has %s left, less than the min_ttl of %s, without a warning", left, minTTL)
	}
	return ""
}

func formatSimTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

// judgeLaterEnd judges that no token was served while the node held one that may be served
// longer.
func (w *simWorld) judgeLaterEnd(op *simOp, served *simAnswer) {
	for _, a := range op.held() {
		if a.token == served.token {
			continue
		}
		longer := true
		for _, role := range op.node.possible(rolePrefix+op.role, op.start, op.end) {
			longer = longer && a.servable(op.node, role, op.end) > served.servable(op.node, role, op.end)
		}
		if longer {
			w.violate("%s got %s, though %s may be served longer", op, served.token.text, a.token.text)
		}
	}
}

// judgeWait judges how long a read took.
func (w *simWorld) judgeWait(op *simOp) {
	n := op.node
	waited := op.end - op.start - op.storageTime
	// A held token is served immediately when fresh, and soon when due.
	for _, a := range op.held() {
		fresh := true
		for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
			life, left := a.life(role, op.minTTL, op.start)
			fresh = fresh && left > life.refresh
		}
		if fresh && len(a.token.answers) == 1 {
			if waited > 0 && op.storageTime == 0 {
				w.violate("%s waited %s, though %s was cached", op, waited, a.token.text)
			}
			if op.storageOps > 0 && op.inMemory && n.blurredAt < op.start {
				w.violate("%s touched storage %d times, though %s and its role and config were in memory", op, op.storageOps, a.token.text)
			}
		}
		patience := simPatience
		began := op.start - simSlack // when a mint that it joined may have begun
		if n.blurredAt >= began || len(n.possible(rolePrefix+op.role, began, op.end)) > 1 || len(n.possible(configPrefix+a.mint.config, began, op.end)) > 1 {
			patience *= 2 // it looked them up and waited again
		}
		if waited > patience+simSlack || waited > patience && op.storageTime == 0 {
			w.violate("%s waited %s, though %s was usable", op, waited, a.token.text)
		}
	}
	allowed := op.longest
	roles := n.possible(rolePrefix+op.role, op.start, op.end)
	if h := w.history[rolePrefix+op.role]; h != nil { // it may have started before a write at that moment
		roles = append(slices.Clone(roles), h.at(op.start-1))
	}
	for _, role := range roles {
		for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
			allowed = max(allowed, config.timeout)
		}
	}
	allowed += time.Second
	if op.storageTime > 0 {
		allowed += simSlack
	}
	if waited > allowed {
		w.violate("%s waited %s, more than %s", op, waited, allowed)
	}
	w.judgeCalm(op)
}

// judgeCalm judges a read in a calm world: it gets a token, and immediately when the role
// was in use.
func (w *simWorld) judgeCalm(op *simOp) {
	n := op.node
	if w.calm < 0 || op.start < w.calm || n.startedAt > w.calm || op.gaveUp {
		return
	}
	if op.err != nil || op.resp.IsError() {
		if coded := logical.HTTPCodedError(nil); errors.As(op.err, &coded) && w.hadItsTime(op) && n.throttledOnce(op.role) {
			return // the pace grows only while many wait
		}
		w.violate("%s failed, though all has been well since %s: %s", op, w.calm, simResult(op))
		return
	}
	if op.minTTL > 0 || op.end == op.start {
		return
	}
	w.judgeRotated(op)
	role := w.history[rolePrefix+op.role].last()
	newest := n.judge.key(op.role, op.setOf(role)).newest(op.start)
	for _, a := range op.held() {
		life, left := a.life(role, 0, op.start)
		// A renewal takes a while, and one that returned nothing newer backs off.
		if a == newest && left < life.refresh-simCalmMint && !n.throttledOnce(op.role) {
			w.violate("%s waited %s for a token, though %s was in use with %s left (R is %s)", op, op.end-op.start, a.token.text, left, life.refresh)
		}
	}
}

// newest returns the key's last answer before that time, or nil if that was nothing newer.
func (k *simKeyState) newest(before time.Duration) *simAnswer {
	var newest *simAnswer
	for _, a := range k.answers {
		if a.delivered >= before {
			break
		}
		newest = a
		if !a.renewed {
			newest = nil
		}
	}
	return newest
}

// judgeRotated judges a read that waited although its token was rotated while in use.
func (w *simWorld) judgeRotated(op *simOp) {
	role := w.history[rolePrefix+op.role].last()
	k := op.node.judge.key(op.role, op.setOf(role))
	i := slices.IndexFunc(k.answers, func(a *simAnswer) bool { return a.delivered >= op.start }) // the one it waited for
	if i < 0 {
		i = len(k.answers)
	}
	if i < 2 || role.at > w.calm && !role.renews {
		return
	}
	rotated, before := k.answers[i-1], k.answers[i-2]
	byRotation := slices.ContainsFunc(op.node.judge.rotations, func(r *simOp) bool { return r.wrote != nil && r.end == rotated.delivered })
	if !byRotation || rotated.served >= 0 || rotated.delivered < w.calm || before.served < 0 || !rotated.fitsRole(role) {
		return
	}
	_, old := before.life(role, 0, rotated.delivered)
	life, left := rotated.life(role, 0, op.start)
	if old > life.floor && left > life.floor && left < life.refresh-simCalmMint {
		w.violate("%s waited %s for a token, though a rotation returned %s with %s left, and the one before was in use", op, op.end-op.start, rotated.token.text, left)
	}
}

// judgeStatus judges the numbers in a status. The caller holds w.mu.
func (w *simWorld) judgeStatus(op *simOp) {
	if op.err != nil || op.resp.IsError() || op.storageTime > 0 {
		return
	}
	j := &op.node.judge
	mints, _ := op.resp.Data["mints"].(int64)
	failed := int64(0)
	for class, count := range op.resp.Data["mint_failures"].(map[string]any) {
		if class != resultNoTurn {
			failed += count.(int64)
		}
	}
	over, maybeOver := j.over[yes], j.over[maybe]
	if mints > j.tokens-over || mints < j.tokens-over-maybeOver ||
		mints+failed < j.tokens+j.failed || mints+failed > j.tokens+j.failed+j.mayHaveFailed {
		w.violate("%s reports %d mints and %d failures; there were %d and %d, of which %d (perhaps %d more) had expired on arrival", op, mints, failed, j.tokens, j.failed, over, maybeOver)
	}
	w.judgeCounts(op)
	cached, most := op.resp.Data["cached_tokens"].(int64), int64(0)
	for role := range j.greedy {
		most += min(int64(j.greedy[role]), simNarrowedKeys) + 1
	}
	if cached > most {
		w.violate("%s reports %d cached tokens, more than %d", op, cached, most)
	}
}

// simCalmMint is the longest that a mint takes when all is well.
const simCalmMint = time.Second

// judgeFailedRead judges whether a read may fail that way.
func (w *simWorld) judgeFailedRead(op *simOp) {
	coded := logical.HTTPCodedError(nil)
	switch {
	case op.gaveUp && op.err != nil:
		return
	case op.err != nil && strings.Contains(op.err.Error(), errSimStorage.Error()):
		if !op.storageFailed {
			w.violate("%s failed because of storage, which did not fail", op)
		} else if op.inMemory && op.node.blurredAt < op.start {
			w.violate("%s failed because of storage, though its role and config were in memory", op)
		}
		return
	case op.err != nil && op.corrupt():
		return
	case op.err != nil && w.mayBeSlow(op) && strings.Contains(op.err.Error(), "storage took longer"):
		return
	case op.err != nil && !errors.As(op.err, &coded) && !strings.Contains(op.err.Error(), errSimClient.Error()):
		w.violate("%s: unexpected error %v", op, op.err)
		return
	}
	w.judgeDescription(op)
	if op.err == nil && w.userMistake(op) {
		w.judgeUnknown(op)
		return
	}
	for _, a := range op.held() {
		w.violate("%s failed, though %s was usable", op, a.token.text)
		return
	}
	w.judgeStoredInstead(op)
	if !w.excused(op, coded) {
		w.violate("%s failed, though no failure concerns it: %s", op, simResult(op))
	}
}

// judgeDescription judges that a read does not report what MojoAuth said about another key.
func (w *simWorld) judgeDescription(op *simOp) {
	_, after, ok := strings.Cut(simResult(op), "about (")
	if !ok {
		return
	}
	for _, role := range op.node.possible(rolePrefix+op.role, op.start, op.end) {
		if strings.HasPrefix("about ("+after, simTold(op.role, op.setOf(role))) {
			return
		}
	}
	w.violate("%s reports what MojoAuth said about another key: %s", op, simResult(op))
}

// corrupt reports whether the read may have met an unreadable entry.
func (op *simOp) corrupt() bool {
	return slices.ContainsFunc(op.node.possible(rolePrefix+op.role, op.start, op.end), func(v *simVersion) bool { return v.corrupt })
}

// userMistake reports whether the read may be refused for what it requests.
func (w *simWorld) userMistake(op *simOp) bool {
	n := op.node
	for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
		if !role.exists || !simSubset(op.scopes, role.scopes) {
			return true
		}
		for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
			if !config.exists {
				return true
			}
		}
	}
	return false
}

// excused reports whether the read may report a failure of MojoAuth's.
func (w *simWorld) excused(op *simOp, coded logical.HTTPCodedError) bool {
	n := op.node
	if w.turnedAway(op, coded) || w.outOfTime(op, coded) {
		return true
	}
	for _, f := range n.judge.failures {
		m := f.mint
		until := f.until
		if f.config && m.role == op.role {
			until += simPrecedence // the key that failed lets others go first
		}
		if m.end > op.end || m.end < op.start && until < op.start {
			continue
		}
		mine, began := false, op.start
		if !f.config {
			began = max(began, m.end)
		}
		for _, role := range n.possible(rolePrefix+op.role, began, op.end) {
			if m.role == op.role && !f.config && (role.audience != m.req.audience || role.extra != m.req.extra["tenant"]) {
				continue
			}
			if role.config != m.config || m.role == "" && !f.config || !f.config && (m.role != op.role || op.setOf(role) != m.set) {
				continue
			}
			mine = true
		}
		if c := n.judge.configs[m.config]; !mine || f.config && c != nil && m.begin < c.written && c.written < op.start && m.begin < w.configAt(m.config, c.written) {
			continue
		}
		refused := f.outcome.class == classClientRefused || f.outcome.class == classRequestRefused
		if refused == (coded == nil) || len(m.tries) != 1 { // of several requests, it may report an earlier one
			if coded != nil && !w.rightStatus(coded.Code()) {
				w.violate("%s has the status %d", op, coded.Code())
			}
			return true
		}
	}
	return false
}

// hadItsTime reports whether the read waited as long as a read may.
func (w *simWorld) hadItsTime(op *simOp) bool {
	for _, role := range op.node.possible(rolePrefix+op.role, op.start, op.end) {
		for _, config := range op.node.possible(configPrefix+role.config, op.start, op.end) {
			if op.end-op.start >= config.timeout+simLeastGrace {
				return true
			}
		}
	}
	return false
}

func (w *simWorld) rightStatus(status int) bool {
	return status == http.StatusBadGateway || status == http.StatusGatewayTimeout
}

// mayBeSlow reports whether storage may have delayed a request: its own operations, or the
// look-up of a token that it waited for.
func (w *simWorld) mayBeSlow(op *simOp) bool {
	return op.storageTime > 0 || w.stores && w.storageWeather.slow > 0
}

// judgeRotation judges the result of a rotation. The caller holds w.mu.
func (w *simWorld) judgeRotation(op *simOp) {
	n := op.node
	if n.closingAt >= 0 && n.closingAt <= op.end || op.gaveUp || n.readOnly {
		return
	}
	coded := logical.HTTPCodedError(nil)
	switch {
	case op.err != nil && (strings.Contains(op.err.Error(), errSimStorage.Error()) || strings.Contains(op.err.Error(), errSimClient.Error())):
	case op.err != nil && w.mayBeSlow(op) && strings.Contains(op.err.Error(), "storage took longer"):
	case op.err != nil && !errors.As(op.err, &coded):
		w.violate("%s: unexpected error %v", op, op.err)
	case op.err == nil && !op.resp.IsError() && op.wrote == nil && !op.shares():
		w.violate("%s succeeded, but wrote nothing", op)
	case op.resp.IsError() && op.wrote != nil:
		w.violate("%s was refused, but wrote", op)
	case op.wrote != nil:
		w.judgeRotatedInStorage(op)
	}
}

// shares reports whether the rotation shared the result of another one that wrote.
func (op *simOp) shares() bool {
	return slices.ContainsFunc(op.node.judge.rotations, func(other *simOp) bool {
		// The other one's caller may have left earlier.
		return other != op && other.role == op.role && other.wrote != nil && other.start <= op.end &&
			(other.end < 0 || other.end >= op.start || other.wrote.at >= op.start)
	})
}

// judgeWrite judges the result of a write or delete. The caller holds w.mu.
func (w *simWorld) judgeWrite(op *simOp) {
	n := op.node
	switch {
	case n.closingAt >= 0 && n.closingAt <= op.end:
	case n.readOnly:
		if !errors.Is(op.err, logical.ErrReadOnly) {
			w.violate("%s on a standby: got %s", op, simResult(op))
		}
	case op.err != nil && (strings.Contains(op.err.Error(), errSimStorage.Error()) || strings.Contains(op.err.Error(), errSimClient.Error())):
	case op.err != nil:
		w.violate("%s: unexpected error %v", op, op.err)
	case op.err == nil && !op.resp.IsError() && op.wrote == nil:
		w.violate("%s succeeded, but wrote nothing", op)
	case op.resp.IsError() && op.wrote != nil:
		w.violate("%s was refused, but wrote", op)
	case op.wrote != nil:
		w.judgeDropped(op)
	}
}
