// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// This file judges when a simulated node mints: one mint per key, back-offs, probes,
// renewals. All it knows of the engine is which writes it knew of, what it requested, and
// what it got. Where the contract leaves something open, or two events were too close to
// say which came first, it allows every order.

// simSlack is how long the engine may take from a decision to the mint, because of its
// look-ups in storage.
const simSlack = 4 * simStorageLongest

// simStorageLongest is the longest that storage takes before it performs an operation, and
// again afterward.
const simStorageLongest = 400 * time.Millisecond

// simBlock is what can be known of a back-off from outside.
type simBlock struct {
	atLeast, atMost int           // failures in a row
	failedAt        time.Duration // when the last failure came that surely counted; -1 for none
	lastAt          time.Duration // when the last failure came that may have counted; -1 for none
	until           time.Duration // no mint may begin before
	latest          time.Duration // by then it has surely ended
	why             simOutcome
}

// fail records a failure. sure says that the engine must count it.
func (b *simBlock) fail(o simOutcome, began, now time.Duration, sure bool) {
	if began > b.latest+simForget {
		b.atLeast = 0 // it may have been forgotten
	}
	again := began >= b.lastAt
	if !sure || b.failedAt < 0 || began >= b.failedAt || b.atMost == 0 {
		b.atMost++
	}
	_, longest := simBackoff(b.atMost)
	b.latest = max(b.latest, now+longest)
	b.lastAt = now
	if !sure {
		return
	}
	if again || b.atLeast == 0 {
		b.atLeast++
	}
	b.failedAt, b.why = now, o
	shortest, _ := simBackoff(b.atLeast)
	b.until = now + shortest
}

// simForget is how long the engine must remember a failure at least.
const simForget = time.Minute

// clear ends the back-off.
func (b *simBlock) clear() { *b = simBlock{failedAt: -1, lastAt: -1} }

// succeed records the success of a mint that began at that time. The success says nothing
// about later failures.
func (b *simBlock) succeed(began time.Duration) (surely bool) {
	if began >= b.lastAt {
		b.clear()
		return true
	}
	b.blur()
	return false
}

// blur is called when the back-off may have ended.
func (b *simBlock) blur() { b.atLeast, b.until, b.failedAt = 0, 0, -1 }

// simMaybe is what can be known of a fact from outside.
type simMaybe int

const (
	no simMaybe = iota
	maybe
	yes
)

// simConfigState is what a node must know of a config's endpoint.
type simConfigState struct {
	block         simBlock
	written       time.Duration // since when the node must know of the last write; -1 before
	blurred       time.Duration // when something was last written, known to the node or not; -1 before
	clientRefused simMaybe      // the last failure that backed off the config was about the client
	noClient      bool          // a client could not be made, for an unknown key
	// When a mint last succeeded, surely and perhaps; -1 before.
	succeeded, mayHaveSucceeded time.Duration
}

// simKeyState is what a node must know of a key.
type simKeyState struct {
	role, config string
	block        simBlock
	blurred      time.Duration
	// suspect says whether another key's success followed a failure of this key, and no
	// success of its own did.
	suspect simMaybe
	// When the key last failed without a success since, surely and perhaps; -1 for never.
	failedAt, mayHaveFailed time.Duration
	answers                 []*simAnswer // with tokens, oldest first
}

// simFailure is a failed mint that a read may report.
type simFailure struct {
	mint    *simMint
	outcome simOutcome
	config  bool          // it may concern the whole config
	until   time.Duration // a read that starts later may not report it
}

// simJudge is the judge's account of a node.
type simJudge struct {
	configs   map[string]*simConfigState
	keys      map[string]*simKeyState
	flights   map[*simMint]struct{}
	asks      []*simAsk // under way or recent
	failures  []*simFailure
	rotations []*simOp
	gates     map[string]*simGate
	reads     []*simOp       // that have ended
	greedy    map[string]int // by role: an upper bound of its scope subsets
	verified  time.Duration  // when the last verification began
	tokens    int64          // mints that returned a token
	failed    int64
	// mayHaveFailed counts failures that were a mint's or a verification's.
	mayHaveFailed int64
	over          [3]int64 // mints whose token had expired on arrival: no, maybe, yes

	simStoreJudge
}

func newSimJudge() simJudge {
	return simJudge{
		configs: make(map[string]*simConfigState), keys: make(map[string]*simKeyState),
		flights: make(map[*simMint]struct{}), gates: make(map[string]*simGate), greedy: make(map[string]int), verified: -time.Hour,
		simStoreJudge: newSimStoreJudge(),
	}
}

func (j *simJudge) config(name string) *simConfigState {
	c := j.configs[name]
	if c == nil {
		c = &simConfigState{written: -1, blurred: -1, succeeded: -1, mayHaveSucceeded: -1}
		c.block.clear()
		j.configs[name] = c
	}
	return c
}

func (j *simJudge) key(role, set string) *simKeyState {
	k := j.keys[role+"/"+set]
	if k == nil {
		k = &simKeyState{role: role, blurred: -1, failedAt: -1, mayHaveFailed: -1}
		k.block.clear()
		j.keys[role+"/"+set] = k
	}
	return k
}

// configWritten is called when the node must know of a write of a config. The engine
// forgets the failures of mints that began before since. Later failures may already count
// toward the next back-off: a write continues after the node holds the new version, because
// it also deletes tokens.
func (j *simJudge) configWritten(name string, since, now time.Duration) {
	c := j.config(name)
	c.written = now
	c.block.clear()
	for _, f := range j.failures {
		if f.config && f.mint.config == name && f.mint.begin >= since {
			c.block.fail(f.outcome, f.mint.begin, f.mint.end, false)
		}
	}
	c.blur(now)
}

// blur is called when the upstream may be a new one.
func (c *simConfigState) blur(now time.Duration) {
	c.block.blur()
	c.blurred = now
	c.mayHaveSucceeded, c.succeeded = max(c.mayHaveSucceeded, c.succeeded), -1
}

// blur is called when the slot may be a new one, or must forget its failures.
func (k *simKeyState) blur(now time.Duration) {
	k.block.blur()
	k.blurred = now
	k.suspect = min(k.suspect, maybe)
	k.mayHaveFailed, k.failedAt = max(k.mayHaveFailed, k.failedAt), -1
}

// isAlone reports whether a failure of a mint that began at that time says nothing about
// other keys.
func (k *simKeyState) isAlone(began time.Duration) simMaybe {
	if k.suspect == yes && began > k.failedAt+simForgetKey {
		return maybe
	}
	return k.suspect
}

// simForgetKey is how long the engine must remember a key's failure.
const simForgetKey = 5 * time.Minute

// blurred is called when a node may come to know of a write and use what was written.
func (w *simWorld) blurred(n *simNode, key string) {
	now := w.now()
	config, isConfig := strings.CutPrefix(key, configPrefix)
	role, isRole := strings.CutPrefix(key, rolePrefix)
	for _, k := range n.judge.keys {
		if isConfig && k.config == config || isRole && k.role == role {
			k.blur(now)
		}
	}
	if isConfig {
		n.judge.config(config).blur(now)
	}
	clear(n.inMemory)
	n.blurredAt = now
}

// rotating reports whether a rotation of the role was under way at or after that time.
func (n *simNode) rotating(role string, since time.Duration) bool {
	return slices.ContainsFunc(n.judge.rotations, func(op *simOp) bool {
		return op.role == role && (op.end < 0 || op.end >= since)
	})
}

// mintBegins judges whether a mint may begin. The caller holds w.mu.
func (w *simWorld) mintBegins(m *simMint) {
	n, now := m.node, m.begin
	j := &n.judge
	w.note("%s begins", m)
	if m.role == "" { // a verification
		w.verificationBegins(m)
		return
	}
	if n.closingAt >= 0 {
		w.violate("%s begins after its node closed", m)
	}
	w.judgeMayMint(m)
	c, k := j.config(m.config), j.key(m.role, m.set)
	if k.config == "" {
		k.blurred = n.blurredAt
	}
	k.config = m.config
	m.exempt = n.rotating(m.role, now-simSlack)

	// A request that waited for its turn may leave at the very moment of a failure.
	leaves := func(b *simBlock) bool { return b.failedAt == now && m.asked < now }
	switch {
	case m.exempt:
	case now < c.block.until && !leaves(&c.block):
		w.violate("%s begins %s before the end of its config's back-off after %d failures (%s)", m, c.block.until-now, c.block.atLeast, c.block.why.name)
	case now < k.block.until && !leaves(&k.block):
		w.violate("%s begins %s before the end of its key's back-off after %d failures (%s)", m, k.block.until-now, k.block.atLeast, k.block.why.name)
	}
	for other := range j.flights {
		if other.role != "" && other.config == m.config && c.block.atLeast > 0 && other.begin > c.block.failedAt && !m.exempt && !other.exempt {
			w.violate("%s begins while a probe is under way: %s", m, other)
		}
		if other.key() == m.key() && other.asks() == m.asks() && !n.rotating(m.role, other.begin-simSlack) &&
			!n.changed(rolePrefix+m.role, other.begin-simSlack, now) && !n.changed(configPrefix+m.config, other.begin-simSlack, now) {
			w.violate("%s begins while another one of its key is under way, which began at %s", m, other.begin)
		}
	}
	if !m.exempt {
		w.judgeNeed(m, k)
		w.judgeStored(m)
	}
	w.judgeAsked(m)
	j.flights[m] = struct{}{}
}

func (w *simWorld) verificationBegins(m *simMint) {
	j := &m.node.judge
	if since := m.asked - j.verified; since < time.Second {
		w.violate("%s, a verification, begins %s after another", m, since)
	}
	for other := range j.flights {
		if other.role == "" {
			w.violate("%s, a verification, begins while another one is under way", m)
		}
	}
	j.verified = m.asked
	j.flights[m] = struct{}{}
}

// clientMayBeMade judges whether the engine may make a client now, and decides whether that
// works. The caller holds w.mu.
func (w *simWorld) clientMayBeMade(n *simNode, config *configEntry) bool {
	now := w.now()
	name := simConfigOf(config.ClientID)
	c := n.judge.config(name)
	verifying := slices.ContainsFunc(n.ops(), func(op *simOp) bool { return op.key == configPrefix+name || op.kind == opRotate }) ||
		slices.ContainsFunc(n.judge.rotations, func(op *simOp) bool { return op.end >= now-simSlack }) // its caller may have left
	if now < c.block.until && now > c.block.lastAt && !verifying {
		w.violate("%s makes a client of config %s %s before the end of its back-off", n.name, name, c.block.until-now)
	}
	if w.dice("client", n.name, name).Float64() >= w.endpoint.clients {
		return true
	}
	w.note("%s cannot make a client of config %s", n.name, name)
	if verifying {
		n.judge.mayHaveFailed++
	} else {
		n.judge.failed++
	}
	// For which key is unknown.
	lonely := slices.ContainsFunc(slices.Collect(maps.Values(n.judge.keys)), func(k *simKeyState) bool { return k.suspect != no })
	c.block.fail(simNoClient, now, now, !verifying && !lonely && c.blurred < now-simSlack)
	c.noClient = true
	for _, k := range n.judge.keys {
		if k.config == name {
			k.mayHaveFailed = now
			k.block.fail(simNoClient, now, now, false)
		}
	}
	n.judge.failures = append(n.judge.failures, &simFailure{
		mint: &simMint{node: n, config: name, entry: *config, begin: now, end: now}, outcome: simNoClient, config: true, until: now + simLastBackoff,
	})
	return false
}

// ops returns the requests under way.
func (n *simNode) ops() []*simOp { return slices.Collect(maps.Keys(n.busy)) }

// judgeNeed judges whether a mint is needed.
func (w *simWorld) judgeNeed(m *simMint, k *simKeyState) {
	n, now := m.node, m.begin
	began := max(0, m.asked-simSlack) // before any wait for its turn
	attended, minTTL := false, time.Duration(0)
	for op := range n.busy {
		if op.kind == opRead && op.role == m.role {
			attended, minTTL = true, max(minTTL, op.minTTL)
		}
	}
	for _, op := range n.judge.recent(began) {
		if op.role == m.role {
			attended, minTTL = true, max(minTTL, op.minTTL)
		}
	}
	roles := n.possible(rolePrefix+m.role, began, now)
	inUse, due := false, false
	for _, a := range k.answers {
		fresh, alive := true, false
		if n.unsettled > now { // it may still use what it held before the invalidation
			roles = n.possible(rolePrefix+m.role, 0, now)
		}
		for _, role := range roles {
			life, left := a.life(role, minTTL, now)
			renewal, _ := a.life(role, 0, now)
			fresh = fresh && left > max(life.refresh, renewal.refresh+life.life/20)+simSlack
			left += now - m.asked // it may have waited for its turn
			alive = alive || left > life.floor-simSlack || (len(a.token.answers) > 1 || a.again >= 0) && left > simRepeatedFloor-simSlack
		}
		if fresh && len(a.token.answers) == 1 && a.surely(n, began) && w.stillGood(n, a, began, now) {
			w.violate("%s begins though %s is cached, which is not due yet", m, a.token.text)
		}
		if alive && a.delivered <= now {
			due = true
			inUse = inUse || a.mint.exempt || slices.ContainsFunc(a.token.on(n), func(same *simAnswer) bool { return same.wanted })
		}
	}
	switch {
	case attended, n.paced(m.config, now-simSlack):
	case !due:
		w.violate("%s begins without a reader and without a token to renew", m)
	case !inUse:
		w.violate("%s begins without a reader, and no one has read the token before", m)
	}
}

// life returns what follows from the token's lifetime under a version of its role, and the
// time left.
func (a *simAnswer) life(role *simVersion, minTTL, now time.Duration) (simLife, time.Duration) {
	life := newSimLife(simLifetime(a.told, role.maxTTL), max(minTTL, role.minTTL))
	return life, a.sent + life.life - now
}

// end returns when the token expires under that version of its role, by the answers that
// the node got until now. A token that the endpoint returned again expires no later than
// its first answer said; less than a second sooner is rounding. A rotation's answer counts
// only if rotations is set.
func (a *simAnswer) end(n *simNode, role *simVersion, now time.Duration, rotations bool) time.Duration {
	_, end := a.life(role, 0, 0)
	if again := a.storedAgain(n, now); again >= 0 {
		end = min(end, again)
	}
	for _, again := range a.token.answers {
		if again.repeats(a, n, now, rotations) && again.sent >= role.dropAt {
			if _, sooner := again.life(role, 0, 0); end-sooner >= time.Second {
				end = sooner
			}
		}
	}
	return end
}

// storedAgain returns when the token expires according to what the node found in storage
// until now: -1 unless storage says that the endpoint returned it again.
func (a *simAnswer) storedAgain(n *simNode, now time.Duration) time.Duration {
	again := a.again
	for _, later := range a.token.loaded {
		if later.mint.node == n && later.delivered > a.delivered && later.delivered <= now && later.again >= 0 {
			again = later.again
		}
	}
	return again
}

// repeats reports whether the answer repeats the token of an earlier one on that node. It
// does not if the mint of the earlier answer began later: two mints of a key are under way
// only when the first one's slot is gone.
func (a *simAnswer) repeats(earlier *simAnswer, n *simNode, now time.Duration, rotations bool) bool {
	return a.follows(earlier, n, now) && a.mint.begin >= earlier.mint.begin && (rotations || !a.mint.exempt)
}

// follows reports whether the node got the answer by now, after an earlier one.
func (a *simAnswer) follows(earlier *simAnswer, n *simNode, now time.Duration) bool {
	return a.mint.node == n && a.delivered > earlier.delivered && a.delivered <= now
}

// repeated reports whether the node got the token again.
func (a *simAnswer) repeated(n *simNode, now time.Duration, rotations bool) bool {
	return a.storedAgain(n, now) >= 0 || slices.ContainsFunc(a.token.answers, func(again *simAnswer) bool { return again.repeats(a, n, now, rotations) })
}

// servable returns until when the token may be served under that version of its role.
func (a *simAnswer) servable(n *simNode, role *simVersion, now time.Duration) time.Duration {
	life, _ := a.life(role, 0, 0)
	floor := life.floor
	if a.repeated(n, now, false) {
		floor = min(floor, simRepeatedFloor)
	}
	return a.end(n, role, now, true) - floor
}

// surely reports whether the node has surely held the token, or one that may be served as
// long, since before that time.
func (a *simAnswer) surely(n *simNode, before time.Duration) bool {
	if a.mint.node != n || a.served < 0 || a.served >= before || n.judge.greedy[a.mint.role] > simNarrowedKeys && n.narrowed(a.mint) || !n.keeps(a) {
		return false
	}
	// If the node got the token before, that answer counts.
	role := n.w.history[rolePrefix+a.mint.role].last()
	for _, first := range a.token.on(n) {
		if a.follows(first, n, before) && first.sent >= role.dropAt {
			return false
		}
	}
	// Another token that came later may have replaced it under one version of the role,
	// and be worse under another version.
	for _, b := range n.judge.key(a.mint.role, a.mint.set).answers {
		if b.token == a.token || b.delivered < a.delivered || b.delivered >= before {
			continue
		}
		longer, shorter := false, false
		for _, role := range n.possible(rolePrefix+a.mint.role, b.mint.begin, before) {
			if b.servable(n, role, b.delivered) > a.servable(n, role, b.delivered) {
				longer = true
			} else {
				shorter = true
			}
		}
		if longer && shorter {
			return false
		}
	}
	return true
}

// stillGood reports whether the token may be served now under every version of role and
// config that the node may use since began.
func (w *simWorld) stillGood(n *simNode, a *simAnswer, began, now time.Duration) bool {
	roleKey, configKey := rolePrefix+a.mint.role, configPrefix+a.mint.config
	for _, role := range n.possible(roleKey, began, now) {
		if !a.fitsRole(role) || !n.since(roleKey, role, a.asOf) {
			return false
		}
		for _, config := range n.possible(configKey, began, now) {
			if !a.fitsConfig(config) || !n.since(configKey, config, a.asOf) {
				return false
			}
		}
		// Before the endpoint returned it again, its floor was higher.
		if min(a.servable(n, role, began), a.servable(n, role, now)) <= now {
			return false
		}
	}
	// It may have expired under a max_ttl that was raised since. Then it does not come back.
	for _, role := range w.history[roleKey].versions {
		until := role.until + simSlack + simLate
		if n.storageFailed >= role.until { // the node may not have loaded the next version
			until = now
		}
		if role.exists && role.until >= 0 && until > a.delivered {
			if life, left := a.life(role, 0, min(now, until)); left <= life.floor {
				return false
			}
		}
	}
	return true
}

// simLate is the longest that an invalidation takes.
const simLate = 2 * time.Second

// fitsRole reports whether the token may be served under that version of its role.
func (a *simAnswer) fitsRole(role *simVersion) bool {
	return role.exists && role.config == a.mint.config && role.audience == a.mint.req.audience &&
		role.extra == a.mint.req.extra["tenant"] && a.sent >= role.dropAt && simSubset(strings.Fields(a.mint.set), role.scopes) &&
		a.isOf(role, a.roleGenerations)
}

// fitsConfig is fitsRole for its config.
func (a *simAnswer) fitsConfig(config *simVersion) bool {
	return config.exists && config.clientID == a.mint.entry.ClientID && config.url == a.mint.entry.TokenURL && a.sent >= config.dropAt &&
		a.isOf(config, a.configGenerations)
}

// besideRotation reports whether the token came during a rotation of the role, whose caller
// may have left.
func (a *simAnswer) besideRotation() bool {
	return slices.ContainsFunc(a.mint.node.judge.rotations, func(op *simOp) bool {
		return op.role == a.mint.role && op.start <= a.delivered && (op.end < 0 || op.end+time.Minute >= a.mint.begin)
	})
}

// isOf reports whether the token may be of that version's generation.
func (a *simAnswer) isOf(v *simVersion, generations []string) bool {
	if !a.fromStorage && (a.mint.exempt || a.besideRotation()) { // a rotation may hand it on to the next generation
		return true
	}
	if len(generations) > 0 {
		return slices.Contains(generations, v.generation)
	}
	return !slices.ContainsFunc(v.skips, func(s simSpan) bool { return s.from < a.sent && a.sent < s.to })
}

func simSubset(some, all []string) bool {
	return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(all, s) })
}

// judgeAsked judges whether a mint requests what it should.
func (w *simWorld) judgeAsked(m *simMint) {
	n, now := m.node, m.begin
	roleKey, configKey := rolePrefix+m.role, configPrefix+m.config
	asks := func(began time.Duration) (role, config bool) {
		role = slices.ContainsFunc(n.possible(roleKey, began, now), func(v *simVersion) bool {
			return v.exists && v.config == m.config && v.audience == m.req.audience && v.extra == m.req.extra["tenant"] &&
				simSubset(m.req.scopes, v.scopes)
		})
		config = slices.ContainsFunc(n.possible(configKey, began, now), func(v *simVersion) bool {
			return v.exists && v.clientID == m.entry.ClientID && v.url == m.entry.TokenURL && v.secret == m.entry.ClientSecret
		})
		return role, config
	}
	// A reader may bring the versions from when it came.
	began := now - simSlack - simPatience
	for op := range n.busy {
		if op.kind != opStatus && op.role == m.role {
			began = min(began, op.start)
		}
	}
	if role, config := asks(began); !role || !config {
		w.violate("%s uses an old version that the node must know is replaced (role ok: %v, config ok: %v)", m, role, config)
	}
	if n.storageFailed < m.asked-simSlack {
		began := m.asked - simSlack // it looked before it waited for its turn
		for key, fits := range map[string]func(*simVersion) bool{
			roleKey: func(v *simVersion) bool { return v.exists && v.audience == m.req.audience && v.config == m.config },
			configKey: func(v *simVersion) bool {
				return v.exists && v.clientID == m.entry.ClientID && v.secret == m.entry.ClientSecret
			},
		} {
			h := w.history[key]
			if h == nil || !slices.ContainsFunc(h.versions, func(v *simVersion) bool {
				return (v.until < 0 || v.until >= began) && fits(v)
			}) {
				w.violate("%s uses a version of %s that storage replaced long ago", m, key)
			}
		}
	}
}

// tryBegins judges a request of a mint. The caller holds w.mu.
func (w *simWorld) tryBegins(m *simMint, try *simTry) {
	w.requests++
	w.note("%s sends request %d, to end as %s after %s", m, len(m.tries)+1, try.outcome.name, try.outcome.latency)
	w.judgePace(m)
	if m.node.closingAt >= 0 && m.role != "" { // a verification belongs to its write
		w.violate("%s sends a request after its node closed", m)
	}
	if len(m.tries) == 0 {
		return
	}
	last := m.tries[len(m.tries)-1]
	switch {
	case len(m.tries) > m.entry.MaxRetries:
		w.violate("%s tries %d times, though max_retries is %d", m, len(m.tries)+1, m.entry.MaxRetries)
	case !last.outcome.again:
		w.violate("%s tries again after %s", m, last.outcome.name)
	case last.ended < 0:
		w.violate("%s tries again before the last request has ended", m)
	}
}

// mintEnds records the result of a mint. The caller holds w.mu.
func (w *simWorld) mintEnds(m *simMint, err error) {
	n, now := m.node, m.end
	j := &n.judge
	delete(j.flights, m)
	if n.closingAt >= 0 || len(m.tries) == 0 {
		return
	}
	if took := now - m.begin; took > m.entry.RequestTimeout {
		w.violate("%s took %s, though request_timeout is %s", m, took, m.entry.RequestTimeout)
	}
	o := m.outcome()
	w.note("%s ends as %s", m, o.name)
	if (err == nil) == o.failed() {
		w.violate("%s ended as %s, but the engine's client says %v", m, o.name, err)
	}
	if m.role == "" {
		return
	}
	if err == nil {
		j.tokens++
	} else {
		j.failed++
	}
	c, k := j.config(m.config), j.key(m.role, m.set)
	sure := !m.exempt && max(c.blurred, k.blurred, n.unsettled) < m.begin-simSlack && w.upToDate(m)
	switch {
	case err == nil:
		m.answer.delivered = now
		k.answers = append(k.answers, m.answer)
		over := w.overOnArrival(m)
		j.over[over]++
		switch over {
		case no:
			w.succeeds(m, sure)
		case yes:
			w.fails(m, simOverOnArrival, sure)
		case maybe:
			w.fails(m, simOverOnArrival, false)
			c.block.blur()
			c.mayHaveSucceeded = now
			k.suspect = min(k.suspect, maybe)
			j.suspectOthers(k, now, false)
		}
	case c.written > m.begin && w.configAt(m.config, c.written) > m.begin:
		// The write may have fixed the cause, so the engine forgets the failure.
		j.failures = append(j.failures, &simFailure{mint: m, outcome: o, config: true, until: c.written})
	default:
		w.fails(m, o, sure)
	}
	j.failures = slices.DeleteFunc(j.failures, func(f *simFailure) bool { return f.mint.end < now-20*time.Minute })
}

// configAt returns when storage got the version of a config that it holds at that time. The
// write may end later, since it also deletes tokens.
func (w *simWorld) configAt(name string, then time.Duration) time.Duration {
	if h := w.history[configPrefix+name]; h != nil {
		return h.at(then).at
	}
	return 0
}

// Failures that the endpoint does not know of.
var (
	simOverOnArrival = simOutcome{name: "over on arrival", concern: concernsKey, class: classExpiredOnArrival}
	simNothingNewer  = simOutcome{name: "nothing newer", concern: concernsKey, class: classNothingNewer}
	simNoClient      = simOutcome{name: "no client", concern: concernsConfig, class: classInternal}
)

// upToDate reports whether the mint surely uses the versions that the engine uses now.
func (w *simWorld) upToDate(m *simMint) bool {
	n := m.node
	for _, v := range n.possible(configPrefix+m.config, m.begin, m.end) {
		if v.clientID != m.entry.ClientID || v.url != m.entry.TokenURL || v.secret != m.entry.ClientSecret ||
			v.timeout != m.entry.RequestTimeout || v.retries != m.entry.MaxRetries {
			return false
		}
	}
	for _, v := range n.possible(rolePrefix+m.role, m.begin, m.end) {
		if v.config != m.config || v.audience != m.req.audience || v.extra != m.req.extra["tenant"] {
			return false
		}
	}
	return true
}

// outcome returns how the mint ended.
func (m *simMint) outcome() simOutcome {
	last := m.tries[len(m.tries)-1]
	o := last.outcome
	if last.cut || o.drip || o.silent {
		o = simOutcomes["hang"]
		o.name = "timeout"
	}
	return o
}

// overOnArrival reports whether the token of a mint is at its floor when it arrives.
func (w *simWorld) overOnArrival(m *simMint) simMaybe {
	over, good := false, false
	for _, role := range m.node.possible(rolePrefix+m.role, m.begin-simSlack, m.end) {
		if life, left := m.answer.life(role, 0, m.end); left <= life.floor {
			over = true
		} else {
			good = true
		}
	}
	return simMaybeOf(over, good)
}

// simMaybeOf returns what is known of a fact that holds in some possible cases and fails in
// others.
func simMaybeOf(somewhereYes, somewhereNo bool) simMaybe {
	switch {
	case somewhereYes && somewhereNo:
		return maybe
	case somewhereYes:
		return yes
	}
	return no
}

// succeeds records that a mint returned a token.
func (w *simWorld) succeeds(m *simMint, sure bool) {
	j, now := &m.node.judge, m.end
	c, k := j.config(m.config), j.key(m.role, m.set)
	if c.block.succeed(m.begin) {
		for _, f := range j.failures {
			if f.mint.config == m.config && f.config && f.mint.end <= m.begin {
				f.until = min(f.until, now)
			}
		}
	}
	ofOld := c.written > m.begin || c.blurred >= m.begin-simSlack // perhaps of a replaced version
	if ofOld {
		c.mayHaveSucceeded = now
	} else {
		c.succeeded = now
	}
	j.suspectOthers(k, now, !ofOld)

	newer, spent, spentBy := w.renews(m)
	m.answer.renewed = newer == yes
	if m.exempt { // a rotation keeps its token apart from the key's own account
		k.block.blur()
		k.mayHaveFailed, k.failedAt = max(k.mayHaveFailed, k.failedAt), -1
		if k.mayHaveFailed >= 0 {
			k.suspect = maybe // the success may be another slot's
		}
		if newer != yes {
			w.backsOffKey(m, k, simNothingNewer, false)
		}
		return
	}
	k.suspect, k.failedAt, k.mayHaveFailed = no, -1, -1
	if newer != no {
		if newer == yes && k.block.succeed(m.begin) {
			for _, f := range j.failures {
				if !f.config && f.mint.key() == m.key() && f.mint.end <= m.begin {
					f.until = min(f.until, now)
				}
			}
		} else {
			k.block.blur()
		}
	}
	if newer != yes {
		w.backsOffKey(m, k, simNothingNewer, sure && newer == no)
		if spent > now { // MojoAuth is well, so the engine may mint then
			k.block.until = min(k.block.until, spent)
			if f := j.failures[len(j.failures)-1]; sure {
				f.until = min(f.until, spentBy)
			}
		}
	}
}

// suspectOthers records that a key succeeded after others had failed.
func (j *simJudge) suspectOthers(k *simKeyState, now time.Duration, sure bool) {
	for _, other := range j.keys {
		switch {
		case other == k || other.config != k.config:
		case other.failedAt >= 0 && other.failedAt < now && sure:
			other.suspect = yes
		case other.failedAt >= 0 || other.mayHaveFailed >= 0:
			other.suspect = max(other.suspect, maybe)
		}
	}
}

// renews reports whether a mint's token may be served longer than the cached one. It also
// returns the earliest and the latest time at which the cached one may expire, 0 when there
// is none.
func (w *simWorld) renews(m *simMint) (newer simMaybe, spent, spentBy time.Duration) {
	n, now := m.node, m.end
	newer = yes
	for _, a := range n.judge.key(m.role, m.set).answers {
		if a == m.answer {
			continue
		}
		again, better, worse := a.token == m.answer.token, false, false
		for _, role := range n.possible(rolePrefix+m.role, m.begin, now) {
			until := a.servable(n, role, now)
			if now < until {
				if spent == 0 || until < spent {
					spent = until
				}
				spentBy = max(spentBy, until)
			} else if again { // it may have expired already, which bounds nothing
				spentBy = math.MaxInt64
			}
			if now < until || again {
				better = better || again || m.answer.servable(n, role, now) > until
				worse = worse || again || m.answer.servable(n, role, now) <= until
			}
		}
		switch {
		case !worse:
		case a.surely(n, m.begin) && w.stillGood(n, a, m.begin, now) && (again || !better):
			newer = no
		case newer == yes:
			newer = maybe
		}
	}
	return newer, spent, spentBy
}

// fails records a failure that the engine does not forget.
func (w *simWorld) fails(m *simMint, o simOutcome, sure bool) {
	now := m.end
	j := &m.node.judge
	c, k := j.config(m.config), j.key(m.role, m.set)
	alone := k.isAlone(m.begin)
	k.suspect = alone
	if sure {
		k.failedAt = now
	} else {
		k.mayHaveFailed = now
	}

	if o.concern == concernsKey {
		// The client is no longer refused. This does not show whether an outage is over.
		switch c.clientRefused {
		case yes:
			c.block.succeed(m.begin)
		case maybe:
			c.block.blur()
		}
		w.backsOffKey(m, k, o, sure)
		return
	}

	// Does it say anything new about the config?
	switch {
	case m.begin < c.succeeded:
		alone = yes
	case m.begin <= c.mayHaveSucceeded:
		alone = max(alone, maybe)
	}
	if !sure && alone == yes || c.noClient && alone == no {
		alone = maybe
	}
	switch alone {
	case yes:
		w.backsOffKey(m, k, o, sure)
		return
	case maybe:
		c.block.fail(o, m.begin, now, false)
		w.backsOffKey(m, k, o, false)
		if o.class == classClientRefused != (c.clientRefused == yes) {
			c.clientRefused = maybe
		}
	case no:
		c.block.fail(o, m.begin, now, sure)
		c.clientRefused = no
		if o.class == classClientRefused {
			c.clientRefused = yes
		}
	}
	j.failures = append(j.failures, &simFailure{mint: m, outcome: o, config: true, until: c.block.latest})
}

// backsOffKey records a failure that backs off only the mint's key.
func (w *simWorld) backsOffKey(m *simMint, k *simKeyState, o simOutcome, sure bool) {
	k.block.fail(o, m.begin, m.end, sure)
	m.node.judge.failures = append(m.node.judge.failures, &simFailure{mint: m, outcome: o, until: k.block.latest})
}

const simNarrowedKeys = 128 // of a role

// narrowed reports whether a mint is surely for a scope subset.
func (n *simNode) narrowed(m *simMint) bool {
	for _, role := range n.possible(rolePrefix+m.role, max(0, m.begin-simSlack), m.begin) {
		if m.set == simSet(role.scopes) {
			return false
		}
	}
	return true
}
