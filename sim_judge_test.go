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

// This file judges when a simulated node asks its endpoint: one mint per key, back-offs,
// probes, renewals. It knows nothing of the engine but what it was told, what it asked,
// and what it got. Where the contract leaves something open, or where two things came
// too close to say which was first, it knows less, and allows more.

// simSlack is how long the engine may take from what it decides to the mint: the time
// of its look-ups in storage.
const simSlack = 4 * simStorageLongest

// simStorageLongest is the longest that storage takes, before and again after it did
// what it was asked for.
const simStorageLongest = 400 * time.Millisecond

// simBlock is a back-off as far as one can know it from outside.
type simBlock struct {
	atLeast, atMost int           // failures in a row
	failedAt        time.Duration // the last that surely counted; -1 for none
	lastAt          time.Duration // the last that may have counted; -1 for none
	until           time.Duration // surely nothing is tried before
	latest          time.Duration // after this it has surely ended
	why             simOutcome
}

// fail takes in a failure. sure says that the engine cannot but count it.
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

// simForget is how long the engine has to remember at least that something failed.
const simForget = time.Minute

// clear ends it.
func (b *simBlock) clear() { *b = simBlock{failedAt: -1, lastAt: -1} }

// succeed takes in the success of a mint that began then. It says nothing of a failure
// that came later.
func (b *simBlock) succeed(began time.Duration) (surely bool) {
	if began >= b.lastAt {
		b.clear()
		return true
	}
	b.blur()
	return false
}

// blur is for when it may have ended.
func (b *simBlock) blur() { b.atLeast, b.until, b.failedAt = 0, 0, -1 }

// simMaybe is what one can know of a fact from outside.
type simMaybe int

const (
	no simMaybe = iota
	maybe
	yes
)

// simConfigState is what a node has to know of a config's endpoint.
type simConfigState struct {
	block         simBlock
	written       time.Duration // when the node had to know of the last write; -1 before
	blurred       time.Duration // when something was last written, known or not; -1 before
	clientRefused simMaybe      // the last failure that backed it off was about the client
	noClient      bool          // once no client could be made, for a key that nobody knows
	// When a mint last succeeded, for sure and perhaps; -1 before.
	succeeded, mayHaveSucceeded time.Duration
}

// simKeyState is what a node has to know of one key.
type simKeyState struct {
	role, config string
	block        simBlock
	blurred      time.Duration
	// suspect tells whether a failure of the key was followed by another key's success,
	// and by none of its own.
	suspect simMaybe
	// When it failed last, for sure and perhaps, without a success since; -1 for never.
	failedAt, mayHaveFailed time.Duration
	answers                 []*simAnswer // tokens, the oldest first
}

// simFailure is a failed mint that a reader may be told of.
type simFailure struct {
	mint    *simMint
	outcome simOutcome
	config  bool          // it may concern the whole config
	until   time.Duration // a reader who comes later may not be told of it
}

// simJudge is the account of a node.
type simJudge struct {
	configs   map[string]*simConfigState
	keys      map[string]*simKeyState
	flights   map[*simMint]struct{}
	asks      []*simAsk // that are under way, or were lately
	failures  []*simFailure
	rotations []*simOp
	gates     map[string]*simGate
	reads     []*simOp       // that ended
	greedy    map[string]int // by role: an upper bound of its narrowed sets
	verified  time.Duration  // when the last verification began
	tokens    int64          // mints that gave one
	failed    int64
	// mayHaveFailed counts what was a failed mint or a failed verification.
	mayHaveFailed int64
	over          [3]int64 // mints whose token was over on arrival: no, maybe, yes

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

// configWritten is called when the node must know of a write of a config. Failures of
// mints that began before since are forgotten. Later ones may count already: a write goes
// on after the node holds the new version, since it deletes tokens, too.
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

// blur is for when the upstream may be a new one.
func (c *simConfigState) blur(now time.Duration) {
	c.block.blur()
	c.blurred = now
	c.mayHaveSucceeded, c.succeeded = max(c.mayHaveSucceeded, c.succeeded), -1
}

// blur is for when the slot may be a new one, or has to forget its failures.
func (k *simKeyState) blur(now time.Duration) {
	k.block.blur()
	k.blurred = now
	k.suspect = min(k.suspect, maybe)
	k.mayHaveFailed, k.failedAt = max(k.mayHaveFailed, k.failedAt), -1
}

// isAlone tells whether a failure of a mint that began then says nothing of other keys.
func (k *simKeyState) isAlone(began time.Duration) simMaybe {
	if k.suspect == yes && began > k.failedAt+simForgetKey {
		return maybe
	}
	return k.suspect
}

// simForgetKey is how long a key's failure has to be remembered.
const simForgetKey = 5 * time.Minute

// blurred is called when a node may come to know of something that was written, and go
// by it.
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

// rotating tells whether a rotation of the role has been under way since that time.
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
	if m.role == "" { // of a verification, which is its writer's
		w.verificationBegins(m)
		return
	}
	if n.closingAt >= 0 {
		w.violate("%s begins after closing", m)
	}
	w.judgeMayMint(m)
	c, k := j.config(m.config), j.key(m.role, m.set)
	if k.config == "" {
		k.blurred = n.blurredAt
	}
	k.config = m.config
	m.exempt = n.rotating(m.role, now-simSlack)

	// A request that waited for its turn may leave at the very moment of the failure.
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
			w.violate("%s begins beside a probe, %s", m, other)
		}
		if other.key() == m.key() && other.asks() == m.asks() && !n.rotating(m.role, other.begin-simSlack) &&
			!n.changed(rolePrefix+m.role, other.begin-simSlack, now) && !n.changed(configPrefix+m.config, other.begin-simSlack, now) {
			w.violate("%s begins beside another of its key, which began at %s", m, other.begin)
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
			w.violate("%s, a verification, begins beside another", m)
		}
	}
	j.verified = m.asked
	j.flights[m] = struct{}{}
}

// clientMayBeMade judges whether the engine may make a client now, and says whether it
// can. The caller holds w.mu.
func (w *simWorld) clientMayBeMade(n *simNode, config *configEntry) bool {
	now := w.now()
	name := simConfigOf(config.ClientID)
	c := n.judge.config(name)
	verifying := slices.ContainsFunc(n.ops(), func(op *simOp) bool { return op.key == configPrefix+name || op.kind == opRotate }) ||
		slices.ContainsFunc(n.judge.rotations, func(op *simOp) bool { return op.end >= now-simSlack }) // whose caller has left
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
	// Of which key, there is no telling.
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

// ops are the requests under way.
func (n *simNode) ops() []*simOp { return slices.Collect(maps.Keys(n.busy)) }

// judgeNeed judges whether there is any need for a mint.
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
		if n.unsettled > now { // it may still go by what it had before it was told
			roles = n.possible(rolePrefix+m.role, 0, now)
		}
		for _, role := range roles {
			life, left := a.life(role, minTTL, now)
			renewal, _ := a.life(role, 0, now)
			fresh = fresh && left > max(life.refresh, renewal.refresh+life.life/20)+simSlack
			left += now - m.asked // it may have waited for its turn since
			alive = alive || left > life.floor-simSlack || (len(a.token.answers) > 1 || a.again >= 0) && left > simRepeatedFloor-simSlack
		}
		if fresh && len(a.token.answers) == 1 && a.surely(n, began) && w.stillGood(n, a, began, now) {
			w.violate("%s begins though %s is there, which is not due yet", m, a.token.text)
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
		w.violate("%s begins without a reader, and nobody has read the token before", m)
	}
}

// life is what follows from the token's life under a version of its role, and how much
// of it is left.
func (a *simAnswer) life(role *simVersion, minTTL, now time.Duration) (simLife, time.Duration) {
	life := newSimLife(simLifetime(a.told, role.maxTTL), max(minTTL, role.minTTL))
	return life, a.sent + life.life - now
}

// end is when the token ends under that version of its role, by what the node was told
// of it until then. A token that the endpoint gave again ends no later than its first
// answer said, and less than a second sooner is rounding. A rotation's answer does not
// count, unless rotations says so.
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

// storedAgain is when the token ends by what storage said of it until then, -1 when it
// did not say that it was given again.
func (a *simAnswer) storedAgain(n *simNode, now time.Duration) time.Duration {
	again := a.again
	for _, later := range a.token.loaded {
		if later.mint.node == n && later.delivered > a.delivered && later.delivered <= now && later.again >= 0 {
			again = later.again
		}
	}
	return again
}

// repeats tells whether the node was given the token of an earlier answer once more. It
// was not if the mint of the earlier answer began later: two mints of a key are under way
// only when the slot of the first one is gone.
func (a *simAnswer) repeats(earlier *simAnswer, n *simNode, now time.Duration, rotations bool) bool {
	return a.follows(earlier, n, now) && a.mint.begin >= earlier.mint.begin && (rotations || !a.mint.exempt)
}

// follows tells whether the node was given an answer by then, after an earlier one.
func (a *simAnswer) follows(earlier *simAnswer, n *simNode, now time.Duration) bool {
	return a.mint.node == n && a.delivered > earlier.delivered && a.delivered <= now
}

// repeated tells whether the node was given the token again.
func (a *simAnswer) repeated(n *simNode, now time.Duration, rotations bool) bool {
	return a.storedAgain(n, now) >= 0 || slices.ContainsFunc(a.token.answers, func(again *simAnswer) bool { return again.repeats(a, n, now, rotations) })
}

// servable is until when the token may be served under that version of its role.
func (a *simAnswer) servable(n *simNode, role *simVersion, now time.Duration) time.Duration {
	life, _ := a.life(role, 0, 0)
	floor := life.floor
	if a.repeated(n, now, false) {
		floor = min(floor, simRepeatedFloor)
	}
	return a.end(n, role, now, true) - floor
}

// surely tells whether the node holds the token since before that time, or one that may
// be served as long, for sure.
func (a *simAnswer) surely(n *simNode, before time.Duration) bool {
	if a.mint.node != n || a.served < 0 || a.served >= before || n.judge.greedy[a.mint.role] > simNarrowedKeys && n.narrowed(a.mint) || !n.keeps(a) {
		return false
	}
	// What the node was given before counts from then.
	role := n.w.history[rolePrefix+a.mint.role].last()
	for _, first := range a.token.on(n) {
		if a.follows(first, n, before) && first.sent >= role.dropAt {
			return false
		}
	}
	// Not if another one that came took its place under one version of the role, and is
	// worse under another.
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

// stillGood tells whether the token may be served at that time by all that the node may
// go by since began.
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
		// Before it was given again, its floor was higher.
		if min(a.servable(n, role, began), a.servable(n, role, now)) <= now {
			return false
		}
	}
	// Under a max_ttl that was raised since, it may have ended, and does not come back.
	for _, role := range w.history[roleKey].versions {
		until := role.until + simSlack + simLate
		if n.storageFailed >= role.until { // which may have kept the node from loading the next
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

// simLate is the longest that it takes until the other node is told of a write.
const simLate = 2 * time.Second

// fitsRole tells whether the token may be served under that version of its role.
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

// besideRotation tells whether the token came while the role was rotated, by a caller who
// may have left.
func (a *simAnswer) besideRotation() bool {
	return slices.ContainsFunc(a.mint.node.judge.rotations, func(op *simOp) bool {
		return op.role == a.mint.role && op.start <= a.delivered && (op.end < 0 || op.end+time.Minute >= a.mint.begin)
	})
}

// isOf tells whether the token may be of the generation of that version.
func (a *simAnswer) isOf(v *simVersion, generations []string) bool {
	if !a.fromStorage && (a.mint.exempt || a.besideRotation()) { // which may hand it on to the next generation
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

// judgeAsked judges whether a mint asks for what it should.
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
	// A reader may bring what was so when it came.
	began := now - simSlack - simPatience
	for op := range n.busy {
		if op.kind != opStatus && op.role == m.role {
			began = min(began, op.start)
		}
	}
	if role, config := asks(began); !role || !config {
		w.violate("%s asks for what the node has to know is no longer so (role %v, config %v)", m, role, config)
	}
	if n.storageFailed < m.asked-simSlack {
		began := m.asked - simSlack // it looked before it began to wait for its turn
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
				w.violate("%s asks for what %s has not been for long", m, key)
			}
		}
	}
}

// tryBegins judges a request of a mint. The caller holds w.mu.
func (w *simWorld) tryBegins(m *simMint, try *simTry) {
	w.requests++
	w.note("%s sends request %d, to end as %s after %s", m, len(m.tries)+1, try.outcome.name, try.outcome.latency)
	w.judgePace(m)
	if m.node.closingAt >= 0 && m.role != "" { // a verification is its writer's
		w.violate("%s sends a request after closing", m)
	}
	if len(m.tries) == 0 {
		return
	}
	last := m.tries[len(m.tries)-1]
	switch {
	case len(m.tries) > m.entry.MaxRetries:
		w.violate("%s tries %d times, and max_retries is %d", m, len(m.tries)+1, m.entry.MaxRetries)
	case !last.outcome.again:
		w.violate("%s tries again after %s", m, last.outcome.name)
	case last.ended < 0:
		w.violate("%s tries again before the last request has ended", m)
	}
}

// mintEnds keeps account of what came of a mint. The caller holds w.mu.
func (w *simWorld) mintEnds(m *simMint, err error) {
	n, now := m.node, m.end
	j := &n.judge
	delete(j.flights, m)
	if n.closingAt >= 0 || len(m.tries) == 0 {
		return
	}
	if took := now - m.begin; took > m.entry.RequestTimeout {
		w.violate("%s took %s, and request_timeout is %s", m, took, m.entry.RequestTimeout)
	}
	o := m.outcome()
	w.note("%s ends as %s", m, o.name)
	if (err == nil) == o.failed() {
		w.violate("%s ended as %s, and the engine's client says %v", m, o.name, err)
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
		// What was written may have mended it: the failure is forgotten.
		j.failures = append(j.failures, &simFailure{mint: m, outcome: o, config: true, until: c.written})
	default:
		w.fails(m, o, sure)
	}
	j.failures = slices.DeleteFunc(j.failures, func(f *simFailure) bool { return f.mint.end < now-20*time.Minute })
}

// configAt is when storage had the version of a config that it has then. A write may take
// longer, since it deletes tokens, too.
func (w *simWorld) configAt(name string, then time.Duration) time.Duration {
	if h := w.history[configPrefix+name]; h != nil {
		return h.at(then).at
	}
	return 0
}

// Failures that an endpoint knows nothing of.
var (
	simOverOnArrival = simOutcome{name: "over on arrival", concern: concernsKey, class: classExpiredOnArrival}
	simNothingNewer  = simOutcome{name: "nothing newer", concern: concernsKey, class: classNothingNewer}
	simNoClient      = simOutcome{name: "no client", concern: concernsConfig, class: classInternal}
)

// upToDate tells whether the mint surely asks with what the engine would ask with now.
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

// outcome is how the mint ended.
func (m *simMint) outcome() simOutcome {
	last := m.tries[len(m.tries)-1]
	o := last.outcome
	if last.cut || o.drip || o.silent {
		o = simOutcomes["hang"]
		o.name = "timeout"
	}
	return o
}

// overOnArrival tells whether the token of a mint may not be served any more.
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

// simMaybeOf is what is known when some of what is possible says yes, and some says no.
func simMaybeOf(somewhereYes, somewhereNo bool) simMaybe {
	switch {
	case somewhereYes && somewhereNo:
		return maybe
	case somewhereYes:
		return yes
	}
	return no
}

// succeeds takes in that a mint brought a token.
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
	ofOld := c.written > m.begin || c.blurred >= m.begin-simSlack // perhaps of a version that was replaced
	if ofOld {
		c.mayHaveSucceeded = now
	} else {
		c.succeeded = now
	}
	j.suspectOthers(k, now, !ofOld)

	newer, spent, spentBy := w.renews(m)
	m.answer.renewed = newer == yes
	if m.exempt { // who rotates keeps the token beside the key's own account
		k.block.blur()
		k.mayHaveFailed, k.failedAt = max(k.mayHaveFailed, k.failedAt), -1
		if k.mayHaveFailed >= 0 {
			k.suspect = maybe // it may be a success of another slot
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
		if spent > now { // then MojoAuth, which is well, may be asked
			k.block.until = min(k.block.until, spent)
			if f := j.failures[len(j.failures)-1]; sure {
				f.until = min(f.until, spentBy)
			}
		}
	}
}

// suspectOthers takes in that a key succeeded where others had failed.
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

// renews tells whether a token may be served longer than the one that is there. It also
// tells the earliest and the latest time at which that one may be spent, 0 when there is
// none.
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
			} else if again { // it may be spent already, which bounds nothing
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

// fails takes in a failure that is not forgotten.
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
		// A client that was refused is not any more. Whether an outage is over, this
		// does not show.
		switch c.clientRefused {
		case yes:
			c.block.succeed(m.begin)
		case maybe:
			c.block.blur()
		}
		w.backsOffKey(m, k, o, sure)
		return
	}

	// Whether it says nothing new of the config.
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

// backsOffKey takes in a failure that backs off the mint's key only.
func (w *simWorld) backsOffKey(m *simMint, k *simKeyState, o simOutcome, sure bool) {
	k.block.fail(o, m.begin, m.end, sure)
	m.node.judge.failures = append(m.node.judge.failures, &simFailure{mint: m, outcome: o, until: k.block.latest})
}

const simNarrowedKeys = 128 // of a role

// narrowed tells whether a mint is surely for fewer scopes than its role's.
func (n *simNode) narrowed(m *simMint) bool {
	for _, role := range n.possible(rolePrefix+m.role, max(0, m.begin-simSlack), m.begin) {
		if m.set == simSet(role.scopes) {
			return false
		}
	}
	return true
}
