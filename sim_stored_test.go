// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/json"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file judges which tokens simulated nodes store, and that they use the stored ones.
// It knows what storage holds, and which answer of the endpoint each stored token is from.

const (
	simTokenPrefix = "tokens/"
	// simCrawl is how much longer at most an operation on a stored token takes if it is
	// part of no request.
	simCrawl = 3 * time.Second
	// simRemembered is how long the active node remembers that it found nothing.
	simRemembered = 5 * time.Minute
	// simSweepAll is the longest that the sweep after a start takes without faults.
	simSweepAll = time.Minute
	// simSweepAgain is after how long a later sweep has deleted what became obsolete.
	simSweepAgain = 65 * time.Minute
	simSweepPace  = 100 // operations per second
)

// simStored is what storage held at a role's tokens/ key from one write to the next.
type simStored struct {
	at           time.Duration
	config, role string
	value        []byte // nil for nothing

	simStoredFields
	node        *simNode // that wrote it; nil for none
	answer      *simAnswer
	told, again time.Duration // reported lifetime, 0 for none; when it expires if the endpoint returned it again, else -1
}

// simStoredFields is a stored token by the contract.
type simStoredFields struct {
	AccessToken      string    `json:"access_token"`
	MintedAt         time.Time `json:"minted_at"`
	ExpiresAt        time.Time `json:"expires_at"`
	RepeatedUntil    time.Time `json:"repeated_until"`
	RoleGeneration   string    `json:"role_generation"`
	ConfigGeneration string    `json:"config_generation"`
}

// simLookUp is a node's look-up of a stored token.
type simLookUp struct {
	key, role string
	begin     time.Duration
	asked     bool // a reader waits for it
	deletes   bool // it is part of a write or delete
}

// simStoreJudge is the part of a node's account about stored tokens.
type simStoreJudge struct {
	lookUps  map[*simLookUp]struct{} // under way
	trouble  map[string]time.Duration
	absent   map[string]*simLookUp // the last one that found nothing
	saved    map[*simToken]int
	had      map[string]bool // keys whose token it saved or found
	swept    []time.Duration
	restored int64 // reads that surely count as restored

	forwards    int64
	forwardedAt map[string]time.Duration // by role
	dueForwards map[string]simDueForward // by role
}

func newSimStoreJudge() simStoreJudge {
	return simStoreJudge{
		lookUps: make(map[*simLookUp]struct{}), trouble: make(map[string]time.Duration), absent: make(map[string]*simLookUp),
		saved: make(map[*simToken]int), had: make(map[string]bool), forwardedAt: make(map[string]time.Duration), dueForwards: make(map[string]simDueForward),
	}
}

// newSimStored decodes a stored token.
func (w *simWorld) newSimStored(n *simNode, key string, value []byte) *simStored {
	s := &simStored{at: w.now(), node: n, value: value, again: -1}
	s.config, s.role, _ = strings.Cut(strings.TrimPrefix(key, simTokenPrefix), "/")
	if value == nil || json.Unmarshal(value, &s.simStoredFields) != nil {
		return s
	}
	if !s.ExpiresAt.IsZero() {
		s.told = s.ExpiresAt.Sub(s.MintedAt)
	}
	if !s.RepeatedUntil.IsZero() {
		s.again = s.RepeatedUntil.Sub(w.start)
	}
	if tok := w.endpoint.tokens[s.AccessToken]; tok != nil {
		for _, a := range tok.answers {
			if s.MintedAt.Equal(w.at(a.sent)) {
				s.answer = a
			}
		}
	}
	return s
}

// storedAt returns what storage holds at a key, nil for nothing. The caller holds w.mu.
func (w *simWorld) storedAt(key string) *simStored {
	if all := w.stored[key]; len(all) > 0 && all[len(all)-1].value != nil {
		return all[len(all)-1]
	}
	return nil
}

// changedAt returns when a key was last written or deleted. The caller holds w.mu.
func (w *simWorld) changedAt(key string) time.Duration {
	if all := w.stored[key]; len(all) > 0 {
		return all[len(all)-1].at
	}
	return -1
}

// storedNow returns all stored tokens. The caller holds w.mu.
func (w *simWorld) storedNow() map[string]*simStored {
	now := make(map[string]*simStored)
	for key := range w.stored {
		if s := w.storedAt(key); s != nil {
			now[key] = s
		}
	}
	return now
}

// generation returns the generation of the role or config that storage holds at the key.
func (w *simWorld) generation(key string) string {
	entry, err := w.shared.Get(context.Background(), key)
	if err != nil || entry == nil {
		return ""
	}
	var fields struct {
		Generation string `json:"token_generation"`
	}
	if err := json.Unmarshal(entry.Value, &fields); err != nil {
		return ""
	}
	return fields.Generation
}

// stands reports whether the token is of those versions of its role and config.
func (s *simStored) stands(role, config *simVersion) bool {
	return s.isOfRole(role) && s.isOfConfig(config)
}

func (s *simStored) isOfRole(role *simVersion) bool {
	return role.exists && role.config == s.config && role.generation == s.RoleGeneration
}

func (s *simStored) isOfConfig(config *simVersion) bool {
	return config.exists && config.persist && config.generation == s.ConfigGeneration
}

// life returns what follows from the token's lifetime under a version of its role, and the
// time left.
func (s *simStored) life(role *simVersion, minTTL, now time.Duration) (simLife, time.Duration) {
	life, left := (&simAnswer{sent: s.answer.sent, told: s.told}).life(role, minTTL, now)
	if s.again >= 0 {
		left = min(left, s.again-now)
	}
	return life, left
}

// would reports whether the stored token was surely usable for what lasts on that node from
// began to now: under every version that the node may use, and under an earlier max_ttl.
// good judges its lifetime.
func (w *simWorld) would(n *simNode, s *simStored, began, now time.Duration, good func(role *simVersion) bool) bool {
	if s == nil || s.answer == nil || s.at >= began {
		return false
	}
	roleKey, configKey := rolePrefix+s.role, configPrefix+s.config
	if w.history[roleKey] == nil || w.history[configKey] == nil {
		return false
	}
	for _, role := range n.possible(roleKey, began, now) {
		for _, config := range n.possible(configKey, began, now) {
			if !s.stands(role, config) {
				return false
			}
		}
		if s.answer.mint.set != simSet(role.scopes) || !good(role) {
			return false
		}
	}
	for _, role := range w.history[roleKey].versions {
		if role.exists && (role.until < 0 || role.until+simCrawl+simSlack > s.at) {
			until := now
			if role.until >= 0 {
				until = min(now, role.until+simCrawl+simSlack)
			}
			if life, left := s.life(role, 0, until); left <= life.floor {
				return false
			}
		}
	}
	return true
}

// lookUpBegins records that a node starts to look up a stored token.
func (n *simNode) lookUpBegins(op *simOp, key string) *simLookUp {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	now, j := w.now(), &n.judge
	_, role, _ := strings.Cut(strings.TrimPrefix(key, simTokenPrefix), "/")
	look := &simLookUp{key: key, role: role, begin: now, asked: n.read(role), deletes: op != nil}
	beside := 0
	for other := range j.lookUps {
		if other.key == key {
			beside++
		}
	}
	// A look-up for a reader may coincide with one for a sweep or after an invalidation,
	// and with those of another generation.
	if beside > 1 && n.blurredAt < now-simSlack {
		w.violate("%s looks up %s while %d other look-ups are under way", n.name, key, beside)
	}
	switch before := j.absent[key]; {
	case simPlanted(role):
		n.sweepsOne()
	case op != nil || n.readOnly || before == nil || now-before.begin >= simRemembered-time.Second:
	case before.begin < max(n.blurredAt+simSlack, w.changedAt(key)):
	case j.had[key]: // it may have expired, and be about to be deleted
	default:
		w.violate("%s looks up %s again, %s after it found nothing", n.name, key, now-before.begin)
	}
	j.lookUps[look] = struct{}{}
	return look
}

// read reports whether a read or rotation of the role is under way.
func (n *simNode) read(role string) bool {
	for op := range n.busy {
		if op.role == role {
			return true
		}
	}
	return false
}

// lookedUp charges storage time to a request that ends while a look-up is under way.
func (op *simOp) lookedUp() {
	for look := range op.node.judge.lookUps {
		if look.role == op.role {
			op.storageTime += op.end - max(op.start, look.begin)
		}
	}
}

// lookUpEnds records what a look-up found.
func (n *simNode) lookUpEnds(look *simLookUp, entry *logical.StorageEntry, err error) {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	now, j := w.now(), &n.judge
	delete(j.lookUps, look)
	for op := range n.busy { // they may have waited for it
		if op.role == look.role {
			op.storageTime += now - max(op.start, look.begin)
		}
	}
	switch {
	case err != nil:
		j.trouble[look.key] = now
	case entry == nil && !look.deletes:
		j.absent[look.key] = look
	case entry == nil:
	default:
		delete(j.absent, look.key)
		j.had[look.key] = true
		w.loaded(n, look, entry.Value)
	}
}

// loaded records that a node holds a token that it found in storage. The caller holds w.mu.
func (w *simWorld) loaded(n *simNode, look *simLookUp, value []byte) {
	s := w.newSimStored(n, look.key, value)
	if s.answer == nil {
		return
	}
	now, unasked := w.now(), !look.asked && !n.read(look.role)
	mint := *s.answer.mint
	mint.node, mint.begin, mint.asked, mint.end, mint.exempt = n, now, now, now, false
	a := &simAnswer{
		token: s.answer.token, mint: &mint, sent: s.answer.sent, told: s.told, delivered: now, served: -1, asOf: -1, again: s.again,
		roleGenerations: []string{s.RoleGeneration}, configGenerations: []string{s.ConfigGeneration}, fromStorage: true,
		unasked: unasked,
	}
	mint.answer = a
	for _, had := range a.token.on(n) {
		a.unasked = false
		had.unasked = had.unasked && unasked
		if had.fromStorage && had.again == a.again && had.sent == a.sent &&
			slices.Equal(had.roleGenerations, a.roleGenerations) && slices.Equal(had.configGenerations, a.configGenerations) {
			return
		}
	}
	k := n.judge.key(look.role, mint.set)
	k.answers = append(k.answers, a)
	a.token.loaded = append(a.token.loaded, a)
	w.note("%s finds %s in storage", n.name, a.token.text)
}

// tokenWriteBegins judges a write or delete of a stored token when it begins.
func (w *simWorld) tokenWriteBegins(n *simNode, op *simOp, key string, value []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if value == nil {
		w.judgeForget(n, op, key)
	} else {
		n.judge.had[key] = true
		w.judgeSave(n, op, w.newSimStored(n, key, value))
	}
}

// judgeSave judges whether a node may store a token.
func (w *simWorld) judgeSave(n *simNode, op *simOp, s *simStored) {
	now := w.now()
	what := n.name + " saves " + s.AccessToken + " of role " + s.role
	a := s.answer
	if a == nil {
		w.violate("%s, minted at %s, but no answer of the endpoint matches", what, s.MintedAt)
		return
	}
	if a.mint.role != s.role || a.mint.config != s.config {
		w.violate("%s and config %s, but it was minted for %s and %s", what, s.config, a.mint.role, a.mint.config)
		return
	}
	on := a.token.on(n)
	if len(on) == 0 {
		w.violate("%s, which it never got", what)
		return
	}
	// Once for each answer, and once more for each rotation that found it to be newer than
	// its own token.
	rotations := 0
	for _, r := range n.judge.rotations {
		if r.role == s.role && (r.end < 0 || r.end+time.Minute+simSlack >= a.delivered) { // it may continue without its caller
			rotations++
		}
	}
	// And once more if it had expired under a max_ttl that was raised since.
	versions := w.history[rolePrefix+s.role].versions
	for i, v := range versions[1:] {
		if v.at >= a.delivered && v.maxTTL != versions[i].maxTTL {
			rotations++
		}
	}
	minted := 0
	for _, answer := range on {
		if !answer.fromStorage {
			minted++
		}
	}
	if n.judge.saved[a.token]++; n.judge.saved[a.token] > minted+rotations {
		w.violate("%s (save number %d), but it came %d times, with %d rotations and changes of max_ttl", what, n.judge.saved[a.token], minted, rotations)
	}
	roles := n.possible(rolePrefix+s.role, now, now)
	configs := n.possible(configPrefix+s.config, now, now)
	fits := false
	for _, role := range roles {
		for _, config := range configs {
			fits = fits || s.stands(role, config) && a.fitsRole(role) && a.fitsConfig(config) && a.mint.set == simSet(role.scopes)
		}
	}
	if !fits && op != nil && op.kind == opRotate && op.wrote == nil {
		w.violate("%s before the role is written", what)
	} else if !fits {
		w.violate("%s [%s] with generations %.4s and %.4s, but they are obsolete, or it is of a scope subset, or its config stores no tokens (role %s, config %s)",
			what, a.mint.set, s.RoleGeneration, s.ConfigGeneration, simVersions(roles), simVersions(configs))
	}
	w.judgeSavedLife(n, what, s, roles)
	k := n.judge.key(s.role, a.mint.set)
	for _, b := range k.answers {
		if b.token != a.token && b.renewed && !b.mint.exempt && a.sent < b.sent && a.delivered < b.delivered && b.delivered < now && a.mint.node == n {
			w.violate("%s, though %s came at %s", what, b.token.text, b.delivered)
		}
	}
	// The readers that waited for it must have it by now.
	if op == nil && now > a.delivered && n.blurredAt < a.mint.begin && !n.asking(s.role, a.mint.set) {
		for reader := range n.busy {
			if reader.kind == opRead && reader.role == s.role && len(reader.scopes) == 0 && reader.start < a.delivered && reader.storageOps == 0 &&
				a.freshFor(reader, roles) {
				w.violate("%s before %s is answered", what, reader)
			}
		}
	}
	a.roleGenerations = append(a.roleGenerations, s.RoleGeneration)
	a.configGenerations = append(a.configGenerations, s.ConfigGeneration)
}

// asking reports whether a mint of that key is under way or ends at this moment. Readers may
// wait for that mint: it may be of the role's previous generation, and continue beside the
// first one of the next.
func (n *simNode) asking(role, set string) bool {
	return slices.ContainsFunc(n.judge.asks, func(ask *simAsk) bool {
		return ask.role == role && ask.set == set && (ask.end < 0 || ask.end == n.w.now())
	})
}

// freshFor reports whether the token was fresh for a reader when it came, under each of
// those versions of its role. If not, the reader may wait for the next token.
func (a *simAnswer) freshFor(reader *simOp, roles []*simVersion) bool {
	for _, role := range roles {
		if life, left := a.life(role, reader.minTTL, a.delivered); left <= life.refresh {
			return false
		}
	}
	return true
}

// judgeSavedLife judges the times of a token that is being stored.
func (w *simWorld) judgeSavedLife(n *simNode, what string, s *simStored, roles []*simVersion) {
	a := s.answer
	if s.told != a.told {
		w.violate("%s with the lifetime %s, but the endpoint reported %s", what, s.told, a.told)
	}
	if s.again < 0 {
		return
	}
	for _, role := range roles {
		for _, answer := range a.token.on(n) {
			if _, left := answer.life(role, 0, 0); left == s.again || answer.again == s.again {
				return
			}
		}
		if _, left := a.life(role, 0, 0); left == s.again {
			return
		}
	}
	w.violate("%s as repeated until %s, which follows from no answer", what, s.again)
}

func simVersions(versions []*simVersion) string {
	var parts []string
	for _, v := range versions {
		part := "none"
		if v.exists {
			part = v.generation[:min(4, len(v.generation))]
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, " or ")
}

// judgeForget judges whether a node may delete a stored token.
func (w *simWorld) judgeForget(n *simNode, op *simOp, key string) {
	now := w.now()
	s := w.storedAt(key)
	if simPlanted(key[strings.LastIndex(key, "/")+1:]) {
		n.sweepsOne()
	}
	began := max(0, now-simCrawl-3*simSlack)
	if op != nil {
		began = min(began, op.start)
	}
	if s == nil || s.at >= began && s.node != n {
		return
	}
	if s.at >= began {
		began = max(began, s.at) // the delete may be meant for the previous token, but not for this one
	}
	alive := s.answer != nil && w.history[rolePrefix+s.role] != nil && w.history[configPrefix+s.config] != nil
	if !alive {
		return
	}
	for _, role := range n.possible(rolePrefix+s.role, began, now) {
		for _, config := range n.possible(configPrefix+s.config, began, now) {
			alive = alive && s.stands(role, config)
		}
		life, left := s.life(role, 0, now)
		alive = alive && left > life.floor
		for _, a := range s.answer.token.on(n) {
			alive = alive && a.servable(n, role, now) > now
		}
	}
	if alive {
		w.violate("%s deletes %s from storage, though it may be served", n.name, s.AccessToken)
	}
}

// tokenWritten is called when a token has been stored or deleted.
func (w *simWorld) tokenWritten(n *simNode, key string, value []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.newSimStored(n, key, value)
	if value != nil || w.storedAt(key) != nil {
		w.stored[key] = append(w.stored[key], s)
	}
	if value == nil {
		w.note("%s deletes %s", n.name, key)
	} else {
		w.note("%s saves %s at %s", n.name, s.AccessToken, key)
	}
	dice := w.dice("invalidate", key)
	delay := time.Duration(dice.Int64N(int64([]time.Duration{time.Millisecond, 100 * time.Millisecond, simLate}[dice.IntN(3)])))
	lost := w.calm < 0 && dice.Float64() < 0.05
	w.tell(n, key, delay, lost, func(*simNode) {})
}

// sweeps records that a node lists stored tokens.
func (n *simNode) sweeps(string) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.sweepsOne()
}

// sweepsOne judges the pace of a sweep. The caller holds w.mu.
func (n *simNode) sweepsOne() {
	now, j := n.w.now(), &n.judge
	for len(j.swept) > 0 && now-j.swept[0] >= time.Second {
		j.swept = j.swept[1:]
	}
	if j.swept = append(j.swept, now); len(j.swept) > simSweepPace+1 {
		n.w.violate("%s sweeps with %d operations within a second", n.name, len(j.swept))
	}
}

// judgeStored judges a mint by what storage holds. The caller holds w.mu.
func (w *simWorld) judgeStored(m *simMint) {
	n, now := m.node, m.begin
	key := simTokenPrefix + m.config + "/" + m.role
	s := w.storedAt(key)
	if s == nil || s.answer == nil || m.set != s.answer.mint.set {
		return
	}
	began, minTTL := max(0, m.asked-2*simSlack), time.Duration(0)
	for op := range n.busy {
		if op.role == m.role {
			began, minTTL = min(began, op.start), max(minTTL, op.minTTL)
		}
	}
	for _, op := range n.judge.recent(began) {
		if op.role == m.role {
			began, minTTL = min(began, op.start), max(minTTL, op.minTTL)
		}
	}
	if at, ok := n.judge.trouble[key]; ok && at >= began-simSlack || n.unsettled > began {
		return
	}
	// It may renew a token of its own, which it could not save: then it does not look.
	for _, a := range n.judge.key(m.role, m.set).answers {
		for _, role := range n.possible(rolePrefix+m.role, began, now) {
			if a.token != s.answer.token && a.delivered <= m.asked && m.asked < a.servable(n, role, now) {
				return
			}
		}
	}
	if w.would(n, s, began, now, func(role *simVersion) bool {
		life, left := s.life(role, minTTL, now)
		renewal, _ := s.life(role, 0, now)
		return left > max(life.refresh, renewal.refresh+life.life/20)+simSlack
	}) {
		w.violate("%s begins though storage has held %s since %s, which is not due yet", m, s.AccessToken, s.at)
	}
}

// judgeStoredInstead judges a read that failed by what storage holds. The caller holds
// w.mu.
func (w *simWorld) judgeStoredInstead(op *simOp) {
	n := op.node
	looked := op.start // or before the mint that it joined, which may still be waiting for its turn
	for _, ask := range n.judge.asks {
		if ask.role == op.role && (ask.end < 0 || ask.end >= op.start) && op.wants(ask.set) {
			looked = min(looked, ask.begin)
		}
	}
	for _, role := range n.possible(rolePrefix+op.role, op.start, op.end) {
		key := simTokenPrefix + role.config + "/" + op.role
		s := w.storedAt(key)
		if s == nil || s.answer == nil || !op.wants(s.answer.mint.set) {
			continue
		}
		if at, ok := n.judge.trouble[key]; ok && at >= looked-simSlack || n.unsettled > looked || op.storageFailed {
			continue
		}
		if w.would(n, s, op.start-simSlack, op.end, func(role *simVersion) bool {
			life, left := s.life(role, 0, op.end)
			return left > life.floor
		}) {
			w.violate("%s failed, though storage has held %s since %s", op, s.AccessToken, s.at)
			return
		}
	}
}

// judgeTidy judges the stored tokens in a world without faults: the next sweep deletes those
// that have expired or become obsolete.
func (w *simWorld) judgeTidy() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stores {
		return
	}
	now := w.now()
	active := w.activeNode()
	if active == nil {
		return
	}
	// late reports whether a token that became useless at that time should be gone.
	late := func(at time.Duration) bool {
		if active.startedAt > at && active.storageFailed < active.startedAt {
			return now-active.startedAt > simSweepAll
		}
		return now-max(at, active.startedAt, active.storageFailed) > simSweepAgain
	}
	stored := w.storedNow()
	for _, key := range slices.Sorted(maps.Keys(stored)) {
		s := stored[key]
		if s.answer == nil || w.history[rolePrefix+s.role] == nil || w.history[configPrefix+s.config] == nil {
			if late(s.at) {
				w.violate("storage has held %s since %s, which belongs to no role or config", key, s.at)
			}
			continue
		}
		role, config := w.history[rolePrefix+s.role].last(), w.history[configPrefix+s.config].last()
		if role.corrupt { // the token still expires by the version before
			role = w.history[rolePrefix+s.role].versions[role.number-1]
		}
		if !s.stands(role, config) {
			at := w.fellAt(s)
			if late(at) || w.calm >= 0 && at > w.calm && now-at > simSweepAll {
				w.violate("storage has held %s since %s, which has been obsolete since %s", key, s.at, at)
			}
			continue
		}
		life, left := s.life(role, 0, now)
		if end := now + left; late(end) {
			w.violate("storage has held %s since %s, which expired at %s", key, s.at, end)
		} else if floor := end - life.floor; w.calm >= 0 && s.at > w.calm && s.node == active && now-floor > 5*time.Minute {
			w.violate("storage has held %s since %s, which came to its floor at %s", key, s.at, floor)
		}
	}
}

// judgeDropped judges that a write deleted the stored tokens that it dropped, or warned that
// it could not.
func (w *simWorld) judgeDropped(op *simOp) {
	if op.resp != nil && len(op.resp.Warnings) > 0 {
		return
	}
	for key, s := range w.storedNow() {
		if (op.key != rolePrefix+s.role && op.key != configPrefix+s.config) || s.answer == nil || s.at >= op.wrote.at ||
			w.history[rolePrefix+s.role] == nil || w.history[configPrefix+s.config] == nil {
			continue
		}
		role, config := w.history[rolePrefix+s.role].last(), w.history[configPrefix+s.config].last()
		if s.stands(role, config) || w.fellAt(s) != op.wrote.at {
			continue
		}
		// Of several writes at one moment, the one that made it obsolete counts.
		before := w.history[op.key].versions[op.wrote.number-1]
		fell := s.isOfRole(role) && s.isOfConfig(before)
		if op.key == rolePrefix+s.role {
			fell = !s.isOfRole(role) && s.isOfRole(before)
		}
		if fell {
			w.violate("%s left %s in storage", op, key)
		}
	}
}

// rotatedEnded reports whether a rotation's token is at its floor when the rotation is
// answered. Such a token is not stored.
func rotatedEnded(op *simOp) bool {
	ends, minted := op.resp.Data["expires_at_seconds"].(int64), op.resp.Data["last_vault_rotation"].(string)
	at, err := time.Parse(time.RFC3339, minted)
	if err != nil {
		panic(err)
	}
	end := time.Unix(ends, 0)
	floor := min(time.Minute, (end.Sub(at)+time.Second)/10)
	return time.Until(end) <= floor
}

// judgeRotatedInStorage judges that a rotation stored its token before it was answered.
func (w *simWorld) judgeRotatedInStorage(op *simOp) {
	n, role := op.node, w.history[op.key].last()
	if op.err != nil || role != op.wrote || n.storageFailed >= op.start || rotatedEnded(op) {
		return
	}
	for _, config := range n.possible(configPrefix+role.config, op.start, op.end) {
		if !config.exists || !config.persist || config.renews && config.at >= op.start {
			return
		}
	}
	if s := w.storedAt(simTokenPrefix + role.config + "/" + op.role); s == nil || s.RoleGeneration != role.generation {
		w.violate("%s is answered, but storage does not hold its token", op)
	}
}

// fellAt returns when a stored token became obsolete.
func (w *simWorld) fellAt(s *simStored) time.Duration {
	roles, configs := w.history[rolePrefix+s.role], w.history[configPrefix+s.config]
	moments := []time.Duration{s.at}
	for _, v := range slices.Concat(roles.versions, configs.versions) {
		if v.at > s.at {
			moments = append(moments, v.at)
		}
	}
	slices.Sort(moments)
	for _, at := range moments {
		if !s.stands(roles.at(at), configs.at(at)) {
			return at
		}
	}
	return moments[len(moments)-1]
}

// judgeCounts judges the numbers of restored and forwarded reads in a status. The caller
// holds w.mu.
func (w *simWorld) judgeCounts(op *simOp) {
	n := op.node
	reads, _ := op.resp.Data["reads"].(map[string]any)
	restored, known := reads["restored"].(int64)
	forwarded, _ := reads["forwarded"].(int64)
	if !known {
		if w.stores {
			w.violate("%s does not report restored reads", op)
		}
		return
	}
	busy := int64(0)
	for other := range n.busy {
		if other.kind == opRead {
			busy++
		}
	}
	most := int64(math.MaxInt64)
	if !w.stores {
		most = 0
	}
	if restored < n.judge.restored || restored > most {
		w.violate("%s reports %d restored reads, but there were at least %d", op, restored, n.judge.restored)
	}
	if forwarded < n.judge.forwards || forwarded > n.judge.forwards+busy {
		w.violate("%s reports %d forwarded reads, but there were %d", op, forwarded, n.judge.forwards)
	}
}
