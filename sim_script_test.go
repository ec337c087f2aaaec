// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file decides what happens in a simulation, and in which order.

// simProfile holds what stays the same throughout a case.
type simProfile struct {
	roles, configs int
	readOnly       bool // the second node is a standby
	storms         int
	steps          int // in a storm
	idle           bool
	greedy         bool // readers go through scope subsets
	endInStorm     bool
	disasters      float64 // share of steps before which a node may die
	restores       bool    // of snapshots
}

var simScopes = []string{"a", "b", "c", "d"}

// play runs a case from start to end.
func (w *simWorld) play() {
	before := runtime.NumGoroutine()
	p := simProfile{
		roles: 1 + w.rng.IntN(3), configs: 1 + w.rng.IntN(2), readOnly: w.rng.IntN(3) == 0,
		storms: 1 + w.rng.IntN(2), steps: 30 + w.rng.IntN(120), idle: w.rng.IntN(3) == 0,
	}
	p.greedy = w.rng.IntN(8) == 0
	p.endInStorm = !p.idle && w.rng.IntN(2) == 0
	w.rollFate(&p)
	w.note("seed %d: %+v", w.seed, p)
	w.open(0, 0, false)
	w.open(1, 0, p.readOnly)
	w.setUp(p)
	for range p.storms {
		w.storm(p)
		if !p.endInStorm {
			w.calmDown(p)
		}
	}
	if p.idle {
		w.rest()
	}
	w.end(before)
}

// setUp writes the first roles and configs.
func (w *simWorld) setUp(p simProfile) {
	for i := range p.configs {
		w.mustWrite(w.configWrite(simConfigName(i), true))
	}
	for i := range p.roles {
		w.mustWrite(w.roleWrite(p, simRoleName(i), true))
	}
	w.settle()
}

// mustWrite writes on the active node and waits for the answer.
func (w *simWorld) mustWrite(op *simOp) {
	op.slow = false
	w.active().begin(op)
	for {
		w.mu.Lock()
		end := op.end
		w.mu.Unlock()
		if end >= 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if op.err != nil || op.resp.IsError() {
		w.violate("%s failed: %s", op, simResult(op))
	}
}

// settle waits until every node knows of what was written.
func (w *simWorld) settle() {
	time.Sleep(3*time.Second + w.tick())
	synctest.Wait()
}

// tick returns a short time that keeps events from coinciding.
func (w *simWorld) tick() time.Duration { return time.Duration(1 + w.rng.IntN(1e6)) }

// chance is true with that probability.
func (w *simWorld) chance(share float64) bool { return w.rng.Float64() < share }

func pickOne[T any](w *simWorld, from []T) T { return from[w.rng.IntN(len(from))] }

// configWrite returns a write of a config. A whole one sets every required field.
func (w *simWorld) configWrite(name string, whole bool) *simOp {
	data := map[string]any{"verify_connection": false}
	var changes []func(*simFields)
	set := func(field string, value any, change func(*simFields)) {
		data[field] = value
		changes = append(changes, change)
	}
	w.mu.Lock()
	current := simFields{timeout: 10 * time.Second, retries: 2, limit: simDefaultLimit}
	exists := false
	if h := w.history[configPrefix+name]; h != nil && h.last().exists {
		current, exists = h.last().simFields, true
	}
	w.mu.Unlock()
	whole = whole || !exists
	clientID := current.clientID
	if whole && !exists || w.chance(0.15) {
		clientID = simClientID(name, w.rng.IntN(2))
		set("client_id", clientID, func(f *simFields) { f.clientID = clientID })
	}
	url := current.url
	if whole && !exists || w.chance(0.1) {
		url = simURL(name, w.rng.IntN(2))
		set("token_url", url, func(f *simFields) { f.url = url })
	}
	if whole || url != current.url || clientID != current.clientID || w.chance(0.5) {
		secret := w.secretOf(clientID)
		if !whole && w.chance(0.1) {
			secret = simSecret(clientID, 99)
		}
		set("client_secret", secret, func(f *simFields) { f.secret = secret })
	}
	if whole && !exists || w.chance(0.2) {
		timeout := pickOne(w, []int{1, 2, 5, 10, 30, 60})
		set("request_timeout", timeout, func(f *simFields) { f.timeout = time.Duration(timeout) * time.Second })
	}
	if whole && !exists || w.chance(0.2) {
		retries := pickOne(w, []int{0, 1, 2, 4})
		set("max_retries", retries, func(f *simFields) { f.retries = retries })
	}
	if w.chance(0.2) {
		limit := pickOne(w, []int{1, 2, 5, 20, 1000})
		set("max_requests_per_second", limit, func(f *simFields) { f.limit = limit })
	}
	if !whole && w.chance(0.3) {
		data["verify_connection"] = true
	}
	if persist, sent := w.persists(exists); sent {
		set("persist_tokens", persist, func(f *simFields) { f.persist = persist })
	}
	return &simOp{
		kind: opWrite, path: configPrefix + name, key: configPrefix + name, data: data,
		change: func(f *simFields, created bool) {
			if created {
				f.timeout, f.retries, f.limit, f.persist = 10*time.Second, 2, simDefaultLimit, true
			}
			for _, change := range changes {
				change(f)
			}
		},
	}
}

// secretOf returns the client secret that the endpoint accepts.
func (w *simWorld) secretOf(clientID string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	secret := w.endpoint.secrets[clientID]
	if secret == "" {
		secret = simSecret(clientID, 0)
		w.endpoint.secrets[clientID] = secret
	}
	return secret
}

// roleWrite returns a write of a role. A whole one sets every required field.
func (w *simWorld) roleWrite(p simProfile, name string, whole bool) *simOp {
	data := map[string]any{}
	var changes []func(*simFields)
	set := func(field string, value any, change func(*simFields)) {
		data[field] = value
		changes = append(changes, change)
	}
	w.mu.Lock()
	h := w.history[rolePrefix+name]
	exists := h != nil && h.last().exists
	w.mu.Unlock()
	whole = whole || !exists
	if whole || w.chance(0.15) {
		config := simConfigName(w.rng.IntN(p.configs))
		set("config", config, func(f *simFields) { f.config = config })
	}
	if whole || w.chance(0.3) {
		audience := simAudience(name, w.rng.IntN(2))
		set("audience", audience, func(f *simFields) { f.audience = audience })
	}
	if whole || w.chance(0.15) {
		scopes := slices.Clone(simScopes[:1+w.rng.IntN(len(simScopes))])
		set("scopes", strings.Join(scopes, ","), func(f *simFields) { f.scopes = scopes })
	}
	if w.chance(0.1) {
		tenant := fmt.Sprint(w.rng.IntN(2))
		set("extra_params", map[string]any{"tenant": tenant}, func(f *simFields) { f.extra = tenant })
	}
	if w.chance(0.2) {
		minTTL := pickOne(w, []int{0, 0, 5, 30, 600, 100000})
		set("min_ttl", minTTL, func(f *simFields) { f.minTTL = time.Duration(minTTL) * time.Second })
	}
	if w.chance(0.2) {
		maxTTL := pickOne(w, []int{0, 0, 3, 30, 300, 3000})
		set("max_ttl", maxTTL, func(f *simFields) { f.maxTTL = time.Duration(maxTTL) * time.Second })
	}
	if w.chance(0.1) {
		lease := w.chance(0.5)
		set("generate_lease", lease, func(f *simFields) { f.lease = lease })
	}
	return &simOp{
		kind: opWrite, path: rolePrefix + name, key: rolePrefix + name, data: data,
		change: func(f *simFields, _ bool) {
			for _, change := range changes {
				change(f)
			}
		},
	}
}

// gap returns the time from one step to the next.
func (w *simWorld) gap() time.Duration {
	switch w.rng.IntN(12) {
	case 0, 1, 2:
		return w.tick()
	case 3, 4, 5:
		return time.Duration(w.rng.Int64N(int64(300 * time.Millisecond)))
	case 6, 7, 8:
		return time.Duration(w.rng.Int64N(int64(6 * time.Second)))
	case 9:
		return time.Duration(w.rng.Int64N(int64(90 * time.Second)))
	case 10:
		return w.aim()
	default:
		if w.chance(0.8) {
			return time.Second
		}
		return time.Duration(w.rng.Int64N(int64(time.Hour)))
	}
}

// aim returns the time until shortly before or after a token or a back-off changes state.
func (w *simWorld) aim() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.now()
	var moments []time.Duration
	for _, n := range w.nodes {
		for _, name := range slices.Sorted(maps.Keys(n.judge.keys)) {
			k := n.judge.keys[name]
			moments = append(moments, k.block.until, k.block.latest)
			role := w.history[rolePrefix+k.role].last()
			for _, a := range k.answers[max(0, len(k.answers)-2):] {
				life, left := a.life(role, 0, now)
				end := now + left
				moments = append(moments, end, end-life.floor, end-life.refresh)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(n.judge.configs)) {
			c := n.judge.configs[name]
			moments = append(moments, c.block.until, c.block.latest)
		}
	}
	moments = slices.DeleteFunc(moments, func(at time.Duration) bool { return at <= now || at > now+3*time.Hour })
	around := time.Duration(w.rng.Int64N(int64(2*time.Second))) - time.Second
	if len(moments) == 0 {
		return time.Second
	}
	return max(0, pickOne(w, moments)-now+around) + w.tick()
}

// storm is a period of faults and changes.
func (w *simWorld) storm(p simProfile) {
	w.changeWeather(p)
	for range p.steps {
		time.Sleep(w.gap() + w.tick())
		synctest.Wait()
		w.disaster(p)
		w.step(p)
		synctest.Wait()
	}
	w.reviveAll()
}

// step does one thing.
func (w *simWorld) step(p simProfile) {
	n := pickOne(w, w.nodes)
	switch u := w.rng.IntN(100); {
	case u < 50:
		n.begin(w.read(p))
	case u < 62:
		for range 2 + w.rng.IntN(6) {
			pickOne(w, w.nodes).begin(w.read(p))
			time.Sleep(w.tick())
		}
	case u < 68:
		w.write(n, w.roleWrite(p, simRoleName(w.rng.IntN(p.roles)), false))
	case u < 70:
		name := simRoleName(w.rng.IntN(p.roles))
		w.write(n, &simOp{kind: opDelete, path: rolePrefix + name, key: rolePrefix + name})
	case u < 75:
		w.write(n, w.configWrite(simConfigName(w.rng.IntN(p.configs)), false))
	case u < 76:
		name := simConfigName(w.rng.IntN(p.configs))
		w.write(n, &simOp{kind: opDelete, path: configPrefix + name, key: configPrefix + name})
	case u < 81:
		name := simRoleName(w.rng.IntN(p.roles))
		op := &simOp{kind: opRotate, path: rotatePrefix + name, key: rolePrefix + name, role: name}
		if w.chance(0.2) {
			op.giveUp = time.Duration(w.rng.Int64N(int64(5 * time.Second)))
		}
		w.write(n, op)
	case u < 92:
		w.changeWeather(p)
	case u < 94:
		w.rollSecret(p)
	case u < 96:
		n.begin(&simOp{kind: opStatus, path: "status"})
	case u < 97:
		w.restart(n)
	case u < 99:
		w.cross(n, p)
	case p.greedy:
		w.greed(n, p)
	default:
		w.note("nothing")
	}
}

// cross invalidates one entry on a node while the node loads another, and reads again soon.
func (w *simWorld) cross(n *simNode, p simProfile) {
	w.mu.Lock()
	w.storageWeather.slow = 1
	if w.chance(0.7) {
		w.endpoint.weather = *simWeatherOf("down fast")
	}
	keys := slices.Sorted(maps.Keys(w.history))
	w.mu.Unlock()
	for _, key := range keys {
		if w.chance(0.7) {
			w.tellAgain(n, key)
		}
	}
	time.Sleep(2*simSlack + w.tick())
	for range 1 + w.rng.IntN(3) {
		read := w.read(p)
		read.giveUp = 0
		n.begin(read)
		time.Sleep(time.Duration(w.rng.Int64N(int64(2 * simStorageLongest))))
		w.tellAgain(n, pickOne(w, keys))
		time.Sleep(time.Duration(w.rng.Int64N(int64(2 * time.Second))))
	}
}

// tellAgain invalidates an entry on a node, whether it was written or not.
func (w *simWorld) tellAgain(n *simNode, key string) {
	w.mu.Lock()
	number := w.history[key].last().number
	w.mu.Unlock()
	n.mount.InvalidateKey(context.Background(), key)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.note("%s: %s is invalidated again", n.name, key)
	w.learned(n, key, number, w.now())
}

// greed reads many scope subsets of a role, with readers who leave immediately.
func (w *simWorld) greed(n *simNode, p simProfile) {
	name := simRoleName(w.rng.IntN(p.roles))
	var all []string
	for i := range 8 {
		all = append(all, fmt.Sprintf("s%d", i))
	}
	write := w.roleWrite(p, name, true)
	write.data["scopes"] = strings.Join(all, ",")
	change := write.change
	write.change = func(f *simFields, created bool) {
		change(f, created)
		f.scopes = all
	}
	w.write(n, write)
	synctest.Wait()
	patience := time.Duration(0)
	if w.chance(0.5) {
		patience = time.Millisecond
	}
	for set := 1; set < 1+simNarrowedKeys+w.rng.IntN(60); set++ {
		op := &simOp{kind: opRead, path: credsPrefix + name, role: name, slow: true, data: map[string]any{}, giveUp: patience}
		for i, scope := range all {
			if set>>i&1 == 1 {
				op.scopes = append(op.scopes, scope)
			}
		}
		op.data["scopes"] = strings.Join(op.scopes, ",")
		n.begin(op)
		time.Sleep(w.tick())
	}
}

// corrupt makes a role unreadable.
func (w *simWorld) corrupt(p simProfile) {
	name := simRoleName(w.rng.IntN(p.roles))
	key := rolePrefix + name
	if err := w.shared.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte("{")}); err != nil {
		panic(err)
	}
	w.mu.Lock()
	v := w.history[key].write(&simOp{kind: opDelete, start: w.now()}, w.now())
	v.corrupt, v.generation = true, ""
	w.note("%s becomes unreadable", key)
	w.mu.Unlock()
	for _, n := range w.nodes {
		w.tellAgain(n, key)
	}
}

// read returns a read.
func (w *simWorld) read(p simProfile) *simOp {
	name := simRoleName(w.rng.IntN(p.roles))
	op := &simOp{kind: opRead, path: credsPrefix + name, role: name, slow: true, data: map[string]any{}}
	if w.chance(0.2) {
		for _, scope := range simScopes {
			if w.chance(0.4) {
				op.scopes = append(op.scopes, scope)
			}
		}
		if len(op.scopes) > 0 {
			op.data["scopes"] = strings.Join(op.scopes, ",")
		}
	}
	if w.chance(0.15) {
		op.minTTL = time.Duration(pickOne(w, []int{1, 10, 60, 600, 3000})) * time.Second
		op.data["min_ttl"] = int(op.minTTL / time.Second)
	}
	if w.chance(0.2) {
		op.giveUp = time.Duration(w.rng.Int64N(int64(5*time.Second))) + 1
	}
	return op
}

// write starts a write if it may: a slow one keeps others away, and the nodes of a
// cluster never write the same entry simultaneously. A rotation continues after its caller
// has left.
func (w *simWorld) write(n *simNode, op *simOp) {
	if n = w.writer(n); n == nil {
		return
	}
	w.mu.Lock()
	writing, blocked := false, n.exclusive
	for _, node := range w.nodes {
		for other := range node.busy {
			if other.key == "" {
				continue
			}
			writing = writing || node == n
			// What a write sends depends on what is there.
			blocked = blocked || (node != n || other.kind == opDelete || op.kind == opDelete) && other.key == op.key
		}
		blocked = blocked || node != n && node.saves(op.key)
	}
	// Only a node that knows of the last write may make the next one.
	if h := w.history[op.key]; h != nil && n.knows(op.key, w.now()+1) < h.last().number {
		blocked = true
	}
	w.mu.Unlock()
	if blocked {
		return
	}
	op.slow = !writing && w.chance(0.5)
	n.begin(op)
}

// simSaving is longer than a rotation takes to save its token: it waits for another
// write and performs three storage operations.
const simSaving = 3 * simSlack

// saves reports whether a rotation may still write that entry: its token is on its way or
// is being saved. The caller holds w.mu.
func (n *simNode) saves(key string) bool {
	role, ok := strings.CutPrefix(key, rolePrefix)
	if !ok {
		return false
	}
	for m := range n.judge.flights {
		if m.exempt && m.role == role {
			return true
		}
	}
	for _, k := range n.judge.keys {
		if k.role == role && slices.ContainsFunc(k.answers, func(a *simAnswer) bool {
			return a.mint.exempt && a.delivered+simSaving > n.w.now()
		}) {
			return true
		}
	}
	return false
}

// changeWeather changes how the endpoint and storage behave.
func (w *simWorld) changeWeather(p simProfile) {
	weather, victim := pickOne(w, simWeathers), simRoleName(w.rng.IntN(p.roles))
	if w.chance(0.25) {
		weather = simWeathers[0]
	}
	lives := pickOne(w, simLifes)
	storage := simStorageWeather{longest: simStorageLongest}
	switch w.rng.IntN(6) {
	case 0, 1:
		storage.slow = 0.5
	case 2:
		storage.slow, storage.failRead, storage.failPut = 0.3, 0.3, 0.3
	case 3:
		storage.failRead = 1
	}
	if w.fate.IntN(3) == 0 {
		storage.crawls = 0.3
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoint.weather, w.endpoint.victim = weather, victim
	w.endpoint.clients = 0
	if w.chance(0.05) {
		w.endpoint.clients = 0.5
	}
	if w.chance(0.4) {
		w.endpoint.lives = lives
	}
	w.storageWeather = storage
	w.note("weather: %s (%s), lifetimes %s, storage %+v", weather.name, victim, w.endpoint.lives.name, storage)
}

// rollSecret makes the endpoint accept another client secret.
func (w *simWorld) rollSecret(p simProfile) {
	clientID := simClientID(simConfigName(w.rng.IntN(p.configs)), w.rng.IntN(2))
	secret := simSecret(clientID, 1+w.rng.IntN(5))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoint.secrets[clientID] = secret
	w.note("the endpoint accepts %s of %s", secret[:simSecretShown], clientID)
}

// restart closes a mount and starts it again.
func (w *simWorld) restart(n *simNode) {
	if n.isCut() {
		return
	}
	n.stop()
	w.open(n.place, n.number()+1, n.readOnly)
}

// number returns which process of its node this is.
func (n *simNode) number() int {
	number, err := strconv.Atoi(n.name[1:])
	if err != nil {
		panic(err)
	}
	return number
}

// stop closes a mount and ends its process.
func (n *simNode) stop() {
	n.shut()
	for n.writes() { // once another node is active, this one must not write
		time.Sleep(100 * time.Millisecond)
	}
	synctest.Wait()
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.cut = true
}

// writes reports whether the node has a write under way.
func (n *simNode) writes() bool {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	for op := range n.busy {
		if op.key != "" {
			return true
		}
	}
	return false
}

// calmDown ends all faults, waits until the engine must have recovered, and then starts
// polite readers that come back after ttl as Vault Agent does.
func (w *simWorld) calmDown(p simProfile) {
	w.mu.Lock()
	w.endpoint.weather, w.endpoint.lives, w.endpoint.clients = simWeathers[0], simLifes[1], 0
	if w.chance(0.5) {
		w.endpoint.lives = simLifes[0]
	}
	w.storageWeather = simStorageWeather{}
	w.note("calm")
	w.mu.Unlock()
	time.Sleep(62 * time.Second) // for what is under way
	w.heal()
	for i := range p.configs {
		op := w.configWrite(simConfigName(i), true)
		change := op.change
		op.data["max_requests_per_second"] = simDefaultLimit
		op.change = func(f *simFields, created bool) {
			change(f, created)
			f.limit = simDefaultLimit
		}
		w.mustWrite(op)
	}
	for i := range p.roles {
		name := simRoleName(i)
		w.mu.Lock()
		exists := w.history[rolePrefix+name].last().exists
		config := w.history[rolePrefix+name].last().config
		w.mu.Unlock()
		if !exists || config == "" {
			w.mustWrite(w.roleWrite(p, name, true))
		}
	}
	w.settle()

	w.mu.Lock()
	well := w.now() + simLastBackoff + simCalmMint
	for _, n := range w.nodes {
		for _, c := range n.judge.configs {
			well = max(well, c.block.latest+simCalmMint)
		}
		for _, g := range n.judge.gates {
			well = max(well, g.closed+simCalmMint, g.refused+time.Minute)
		}
		for _, k := range n.judge.keys {
			well = max(well, k.block.latest+simCalmMint)
		}
	}
	w.mu.Unlock()
	for w.now() < well {
		pickOne(w, w.nodes).begin(w.read(p))
		time.Sleep(time.Duration(w.rng.Int64N(int64(10*time.Second))) + w.tick())
	}
	synctest.Wait()
	w.mu.Lock()
	w.calm = w.now()
	w.note("all is well from now on")
	w.mu.Unlock()

	ctx, cancel := context.WithCancel(context.Background())
	for range 3 {
		w.agent(ctx, pickOne(w, w.nodes), p)
		time.Sleep(w.tick())
	}
	for range 5 + w.rng.IntN(10) {
		time.Sleep(w.gap() + w.tick())
		op := w.read(p)
		// Without scopes, since the role may lack them, and with a reader who stays.
		op.scopes, op.giveUp = nil, 0
		delete(op.data, "scopes")
		pickOne(w, w.nodes).begin(op)
	}
	w.rotateAndReturn(p)
	for range 24 {
		time.Sleep(5 * time.Minute)
		w.judgeTidy()
	}
	cancel()
	synctest.Wait()
	time.Sleep(time.Minute)
	w.startOver(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calm = -1
}

// rotateAndReturn rotates a token that is in use, and reads the new one after it has been
// due for a while.
func (w *simWorld) rotateAndReturn(p simProfile) {
	n, name := w.active(), simRoleName(w.rng.IntN(p.roles))
	read := func() *simOp {
		op := &simOp{kind: opRead, path: credsPrefix + name, role: name, data: map[string]any{}}
		n.begin(op)
		time.Sleep(2 * time.Second)
		return op
	}
	read()
	w.mustWrite(&simOp{kind: opRotate, path: rotatePrefix + name, key: rolePrefix + name, role: name})
	w.mu.Lock()
	role := w.history[rolePrefix+name].last()
	k := n.judge.key(name, simSet(role.scopes))
	life, left := k.answers[len(k.answers)-1].life(role, 0, w.now())
	w.mu.Unlock()
	time.Sleep(max(0, left-life.refresh+(life.refresh-life.floor)/2))
	read()
}

// heal invalidates every entry on each node, since earlier invalidations may be lost.
func (w *simWorld) heal() {
	for _, key := range slices.Sorted(maps.Keys(w.history)) {
		for _, n := range w.nodes {
			w.tellAgain(n, key)
		}
	}
}

// agent reads a token again and again, each time a second after its ttl, as Vault Agent
// does.
func (w *simWorld) agent(ctx context.Context, n *simNode, p simProfile) {
	role := simRoleName(w.rng.IntN(p.roles))
	w.running.Go(func() {
		for reads := 0; reads < 40 && ctx.Err() == nil; reads++ {
			ended := make(chan *simOp, 1)
			n.begin(&simOp{
				kind: opRead, path: credsPrefix + role, role: role, slow: true, data: map[string]any{},
				done: func(op *simOp) { ended <- op },
			})
			op := <-ended
			if op.err != nil || op.resp.IsError() {
				return
			}
			ttl, _ := op.resp.Data["ttl"].(int64)
			select {
			case <-time.After(time.Duration(ttl)*time.Second + time.Second):
			case <-ctx.Done():
			}
		}
	})
}

// rest is a period without readers. At its end, no token may be left.
func (w *simWorld) rest() {
	w.note("idle")
	w.mu.Lock()
	w.period = time.Hour
	w.mu.Unlock()
	switch {
	case w.chance(0.5):
		w.corrupt(simProfile{roles: 1})
	case w.chance(0.5):
		w.leaveConfig()
	}
	w.running.Wait()
	days := w.idleDays()
	for day := range days { // nothing may happen on the last one
		w.mu.Lock()
		requests, operations := w.requests, w.storageOps
		w.mu.Unlock()
		time.Sleep(24 * time.Hour)
		w.mu.Lock()
		requests, operations = w.requests-requests, w.storageOps-operations
		w.mu.Unlock()
		w.judgeTidy()
		if (day == days-1 && requests+operations > 0) || requests+operations > simIdleDay {
			w.violate("on idle day %d, the nodes send %d token requests and use storage %d times", day, requests, operations)
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for range 2 {
		runtime.GC()
	}
	for _, n := range w.nodes {
		kept := 0
		for _, p := range n.minted {
			if p.Value() != nil {
				kept++
			}
		}
		if kept > 0 {
			w.violate("%s still holds %d tokens in memory after the idle days", n.name, kept)
		}
	}
	for key := range w.storedNow() {
		w.violate("storage still holds %s after the idle days", key)
	}
}

// idleDays returns after how many days without readers all tokens have expired, including
// those that may still replace them, and all failures are forgotten.
func (w *simWorld) idleDays() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := w.now()
	for _, tok := range w.endpoint.tokens {
		for _, a := range tok.answers {
			last = max(last, a.sent+max(a.told, time.Hour)) // max_ttl may set up to an hour
		}
	}
	return 4 + int((last-w.now())/(24*time.Hour))
}

// simIdleDay is more operations than a day without readers requires.
const simIdleDay = 1000

// leaveConfig deletes a config while its roles are being read.
func (w *simWorld) leaveConfig() {
	w.mu.Lock()
	w.endpoint.weather = *simWeatherOf("hanging at times")
	w.storageWeather = simStorageWeather{longest: simStorageLongest, slow: 0.5}
	w.mu.Unlock()
	for i := range 20 {
		pickOne(w, w.nodes).begin(w.read(simProfile{roles: 1}))
		time.Sleep(time.Duration(w.rng.Int64N(int64(500 * time.Millisecond))))
		if i == 10 {
			name := w.roleConfig(simRoleName(0))
			w.write(w.active(), &simOp{kind: opDelete, path: configPrefix + name, key: configPrefix + name})
		}
	}
}

// end closes everything and checks what is left.
func (w *simWorld) end(goroutines int) {
	for _, n := range w.nodes {
		if !n.isCut() {
			n.shut()
		}
	}
	w.running.Wait()
	time.Sleep(15 * time.Minute)
	synctest.Wait()
	if left := runtime.NumGoroutine(); left > goroutines {
		stacks := make([]byte, 1<<20)
		w.violate("%d goroutines are left after all mounts closed:\n%s", left-goroutines, stacks[:runtime.Stack(stacks, true)])
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.nodes {
		if len(n.judge.flights) > 0 {
			w.violate("%s has %d mints under way after it closed", n.name, len(n.judge.flights))
		}
	}
}
