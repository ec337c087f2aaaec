// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// This file makes simulated nodes die, restart, and change roles, and restores snapshots
// of storage.

// errSimDied is what clients get from a node that has died, and what the node gets from
// everything outside.
var errSimDied = errors.New("simulated death of the process")

// simTally counts the rare events of a case.
type simTally struct {
	deaths, promotions, restores, forwards, restored int
}

func (t *simTally) add(more simTally) {
	t.deaths += more.deaths
	t.promotions += more.promotions
	t.restores += more.restores
	t.forwards += more.forwards
	t.restored += more.restored
}

// simFuse says after how many storage operations a node dies. Without left, it does not.
type simFuse struct {
	left   int
	writes bool // only writes count
	before bool // it dies before the last operation is done, else after it
}

// burns reports whether the fuse has burned down. The caller holds w.mu.
func (n *simNode) burns(write bool) bool {
	if n.fuse.left == 0 || n.fuse.writes && !write {
		return false
	}
	n.fuse.left--
	return n.fuse.left == 0
}

// dies ends a node's process: from now on it reaches nothing. The caller holds w.mu.
func (w *simWorld) dies(n *simNode) {
	if n.cut {
		return
	}
	n.cut, n.died = true, true
	if n.closingAt < 0 {
		n.closingAt = w.now()
		close(n.stopped)
	}
	n.kill()
	w.tally.deaths++
	w.note("%s dies", n.name)
	// Its goroutines must end with the test, though no one sees their results.
	w.running.Go(func() { n.mount.Cleanup(context.Background()) })
}

func (n *simNode) isCut() bool {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.cut
}

// die is dies for callers that do not hold w.mu.
func (n *simNode) die() {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.dies(n)
}

// expire is die after everything else that happens at this moment.
func (n *simNode) expire() {
	time.Sleep(time.Nanosecond)
	n.die()
}

// initialize does what Vault does when a mount starts, and every minute from then on.
func (n *simNode) initialize() {
	w := n.w
	if err := n.mount.Initialize(n.life, &logical.InitializationRequest{Storage: n.mount.storage}); err != nil {
		w.violate("%s can't be initialized: %s", n.name, err)
	}
	if took := w.now() - n.startedAt; took > 0 {
		w.violate("initializing %s took %s", n.name, took)
	}
	wait := time.Duration(w.dice("periodic", n.name).Int64N(int64(time.Minute)))
	go func() {
		for {
			select {
			case <-time.After(wait):
			case <-n.stopped:
				return
			}
			n.periodic()
			w.mu.Lock()
			wait = w.period
			w.mu.Unlock()
		}
	}()
}

// periodic does what Vault does every minute while it holds a lock.
func (n *simNode) periodic() {
	w := n.w
	forget := func() { // a standby compares roles and configs with storage again
		if w.mu.Lock(); n.readOnly {
			clear(n.inMemory)
			n.blurredAt = w.now()
		}
		w.mu.Unlock()
	}
	forget()
	began := w.now()
	req := &logical.Request{Operation: logical.RollbackOperation, Storage: n.mount.storage}
	if _, err := n.mount.HandleRequest(n.life, req); err != nil && !n.isCut() && !errors.Is(err, logical.ErrUnsupportedOperation) {
		w.violate("%s can't perform its periodic work: %s", n.name, err)
	}
	if took := w.now() - began; took > 0 {
		w.violate("the periodic work of %s took %s", n.name, took)
	}
	forget()
}

// rollFate decides whether a case has deaths and a standby.
func (w *simWorld) rollFate(p *simProfile) {
	p.readOnly = w.fate.IntN(3) > 0 || p.readOnly
	w.stores = p.readOnly
	if w.stores {
		p.disasters = pickFate(w, []float64{0, 0.03, 0.03, 0.1, 0.1, 0.1, 0.2, 0.2})
		p.restores = p.disasters > 0 && w.fate.IntN(3) == 0
	}
}

func pickFate[T any](w *simWorld, from []T) T { return from[w.fate.IntN(len(from))] }

// persists decides whether a write of a config sends persist_tokens, and its value.
func (w *simWorld) persists(exists bool) (persist, sent bool) {
	switch {
	case !w.stores:
		return false, !exists
	case exists:
		return w.fate.IntN(3) > 0, w.fate.IntN(6) == 0
	default:
		return w.fate.IntN(5) > 0, w.fate.IntN(2) == 0
	}
}

// disaster may make a node die, close, or change roles, or restore a snapshot.
func (w *simWorld) disaster(p simProfile) {
	w.revive(0.4)
	if w.fate.Float64() >= p.disasters {
		return
	}
	n := w.nodes[w.fate.IntN(len(w.nodes))]
	if active := w.active(); active != nil && w.fate.IntN(4) > 0 {
		n = active
	}
	switch u := w.fate.IntN(20); {
	case u < 3:
		n.die()
	case u < 5:
		after := time.Duration(w.fate.Int64N(int64(5 * time.Second)))
		w.running.Go(func() {
			time.Sleep(after)
			n.die()
		})
	case u < 13:
		w.dieAtWork(n, p)
	case u < 15:
		w.promote(w.fate.IntN(2) == 0)
	case u < 16:
		w.plant(1+w.fate.IntN(5), "")
		w.restart(n)
	case u < 18:
		w.snapshot = w.takeSnapshot()
	case p.restores && w.snapshot != nil:
		w.restore(w.fate.IntN(2) == 0)
	default:
		w.restart(n)
	}
}

// dieAtWork makes a node die after a few more storage operations.
func (w *simWorld) dieAtWork(n *simNode, p simProfile) {
	w.mu.Lock()
	n.fuse = simFuse{left: 1 + w.fate.IntN(4), writes: w.fate.IntN(3) > 0, before: w.fate.IntN(2) == 0}
	if !n.fuse.writes {
		n.fuse.left += w.fate.IntN(6)
	}
	w.note("%s will die: %+v", n.name, n.fuse)
	w.mu.Unlock()
	name := simRoleName(w.fate.IntN(p.roles))
	if w.fate.IntN(2) == 0 {
		read := w.read(p)
		read.path, read.role = credsPrefix+name, name
		n.begin(read)
		time.Sleep(time.Duration(w.fate.Int64N(int64(time.Second))))
	}
	if n.isCut() {
		return
	}
	switch w.fate.IntN(6) {
	case 0, 1:
		w.write(n, w.roleWrite(p, name, false))
	case 2:
		w.write(n, &simOp{kind: opDelete, path: rolePrefix + name, key: rolePrefix + name})
	case 3:
		w.write(n, &simOp{kind: opRotate, path: rotatePrefix + name, key: rolePrefix + name, role: name})
	case 4:
		w.write(n, w.configWrite(simConfigName(w.fate.IntN(p.configs)), false))
	case 5:
		config := simConfigName(w.fate.IntN(p.configs))
		w.write(n, &simOp{kind: opDelete, path: configPrefix + config, key: configPrefix + config})
	}
}

// revive starts that share of the nodes that are not running.
func (w *simWorld) revive(share float64) {
	for _, n := range slices.Clone(w.nodes) {
		if !n.isCut() || w.fate.Float64() >= share || w.nodes[n.place] != n {
			continue
		}
		switch other := w.nodes[1-n.place]; {
		case !w.stores || n.readOnly && w.active() != nil:
			w.open(n.place, n.number()+1, n.readOnly)
		case w.active() != nil: // it was the active node
			w.open(n.place, n.number()+1, true)
		case !other.isCut() && w.fate.IntN(2) == 0: // the other becomes the active node
			other.stop()
			w.tally.promotions++
			w.open(other.place, other.number()+1, false)
		default:
			w.open(n.place, n.number()+1, false)
		}
	}
}

func (w *simWorld) reviveAll() {
	w.mu.Lock()
	for _, n := range w.nodes {
		n.fuse = simFuse{}
	}
	w.mu.Unlock()
	time.Sleep(6 * time.Second) // for nodes that will die
	w.revive(1)
	w.revive(1)
}

// promote makes the standby the active node, after the active node closed or died.
func (w *simWorld) promote(closes bool) {
	n := w.active()
	if n == nil {
		return
	}
	if closes {
		n.stop()
	} else {
		n.die()
	}
	other := w.nodes[1-n.place]
	if !other.isCut() {
		other.stop()
	}
	w.tally.promotions++
	w.open(other.place, other.number()+1, false)
	if closes {
		w.open(n.place, n.number()+1, true)
	}
}

// simSnapshot is a copy of storage.
type simSnapshot struct {
	entries  map[string][]byte
	versions map[string]int
	stored   map[string]*simStored
}

// takeSnapshot copies storage. Nothing that is under way can change it meanwhile.
func (w *simWorld) takeSnapshot() *simSnapshot {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	s := &simSnapshot{entries: w.raw(), versions: make(map[string]int), stored: w.storedNow()}
	for key, h := range w.history {
		s.versions[key] = h.last().number
	}
	w.note("a snapshot is taken")
	return s
}

// raw returns everything that storage holds.
func (w *simWorld) raw() map[string][]byte {
	ctx := context.Background()
	all := make(map[string][]byte)
	keys, err := logical.CollectKeys(ctx, w.shared)
	if err != nil {
		panic(err)
	}
	for _, key := range keys {
		entry, err := w.shared.Get(ctx, key)
		if err != nil {
			panic(err)
		}
		all[key] = entry.Value
	}
	return all
}

// restore restores the snapshot. The standby may keep running, and must know of it after
// two minutes.
func (w *simWorld) restore(standbyStays bool) {
	var stays *simNode
	for _, n := range w.nodes {
		switch {
		case n.isCut():
		case n.readOnly && standbyStays:
			stays = n
		case w.fate.IntN(2) == 0:
			n.die()
		default:
			n.stop()
		}
	}
	synctest.Wait()
	w.mu.Lock()
	ctx, now := context.Background(), w.now()
	var changed []string
	for key := range w.raw() {
		if err := w.shared.Delete(ctx, key); err != nil {
			panic(err)
		}
	}
	for key, value := range w.snapshot.entries {
		if err := w.shared.Put(ctx, &logical.StorageEntry{Key: key, Value: value}); err != nil {
			panic(err)
		}
	}
	for key, h := range w.history {
		if number := w.snapshot.versions[key]; h.last().number != number {
			h.restore(number, now)
			changed = append(changed, key)
		}
	}
	for key := range w.stored {
		before := w.snapshot.stored[key]
		if w.storedAt(key) == before {
			continue
		}
		then := simStored{at: now, again: -1}
		if before != nil {
			then = *before
			then.at = now
		}
		w.stored[key] = append(w.stored[key], &then)
	}
	w.tally.restores++
	w.note("the snapshot is restored")
	w.mu.Unlock()
	if stays != nil {
		w.running.Go(func() {
			time.Sleep(2 * time.Minute)
			w.mu.Lock()
			defer w.mu.Unlock()
			for w.now()-stays.storageFailed < 2*time.Minute { // without storage, it keeps what it has
				w.mu.Unlock()
				time.Sleep(time.Minute)
				w.mu.Lock()
			}
			for _, key := range changed {
				w.learned(stays, key, w.history[key].at(now).number, now)
			}
		})
	}
	w.revive(1)
}

// simPlanted reports whether a role is one whose tokens were planted.
func simPlanted(role string) bool { return strings.HasPrefix(role, "x") }

// plant stores that many tokens that belong to no role or config.
func (w *simWorld) plant(count int, prefix string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range count {
		key := simTokenPrefix + simConfigName(w.fate.IntN(3)*4) + fmt.Sprintf("/x%s%d", prefix, i)
		value := []byte(simJSON(map[string]any{
			"access_token": "planted", "token_type": "Bearer", "scope": "a", "later": []int{1},
			"minted_at":  w.at(w.now()).Format(time.RFC3339Nano),
			"expires_at": w.at(w.now() + simLongestLife).Format(time.RFC3339Nano), "role_generation": "R", "config_generation": "C",
		}))
		if w.fate.IntN(4) == 0 {
			value = []byte("{")
		}
		if err := w.shared.Put(context.Background(), &logical.StorageEntry{Key: key, Value: value}); err != nil {
			panic(err)
		}
		w.stored[key] = append(w.stored[key], w.newSimStored(nil, key, value))
	}
	w.note("%d tokens that belong to nothing are in storage", count)
}

// startOver restarts the active node after a calm period, perhaps while the endpoint is
// down, and reads all roles.
func (w *simWorld) startOver(p simProfile) {
	if !w.stores {
		return
	}
	w.mu.Lock()
	w.calm = -1
	if w.fate.IntN(2) == 0 {
		w.endpoint.weather = *simWeatherOf("down fast")
	}
	w.mu.Unlock()
	many := 2
	if w.fate.IntN(10) == 0 {
		many = 300
	}
	w.plant(many, "y")
	switch w.fate.IntN(3) {
	case 0:
		w.restart(w.active())
	case 1:
		w.active().die()
	default:
		w.promote(w.fate.IntN(2) == 0)
	}
	w.revive(1)
	w.revive(1)
	for _, n := range w.nodes {
		for i := range p.roles {
			name := simRoleName(i)
			n.begin(&simOp{kind: opRead, path: credsPrefix + name, role: name, data: map[string]any{}})
		}
	}
	time.Sleep(simSweepAll + 2*time.Second)
	w.judgeTidy()
	for _, n := range w.nodes {
		n.begin(&simOp{kind: opStatus, path: "status"})
	}
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoint.weather = simWeathers[0]
}
