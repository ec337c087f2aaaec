// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file finds the slot for a read, and the upstream for a slot.
//
// A slot's key names everything its token depends on, including the generations of role
// and config. A write that drops tokens changes the key: later readers look under the new
// key, and the slots of the old one are freed. Reading a fresh token takes no lock that
// anything holds across I/O.

const (
	// storagePatience is how long a mint waits for storage before it relies on what is in
	// memory.
	storagePatience = time.Second

	// closingTime is how long close waits for work in progress.
	closingTime = 5 * time.Second

	// A reload that fails is retried after a wait that doubles.
	shortestReloadWait = time.Second
	longestReloadWait  = 30 * time.Second
	maxReloads         = 16 // running at the same time
)

var (
	// errOutdated means that the role or its config was written after the reader looked
	// it up. The reader must look again.
	errOutdated = errors.New("the role or its config changed")

	// errClosed is for readers of a mount that is shutting down.
	errClosed = errors.New("the mount is closing")
)

// tokenCache holds the tokens of one mount on this node.
type tokenCache struct {
	configs   *entries[configEntry]
	roles     *entries[roleEntry]
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	random    func() float64  // uniform in [0, 1)
	storage   logical.Storage // for looking up roles and configs without a request

	ctx       context.Context // for everything that outlives a read; canceled by close
	cancel    context.CancelFunc
	work      sync.WaitGroup // counts the goroutines that use ctx
	reloading chan struct{}  // bounds the reloads in progress

	standby bool // this node may not write

	store     tokenStore
	sweeping  sweeping
	gates     gates
	rotations rotations
	narrowed  narrowedSlots

	// changing serializes the changes of roles and configs, so an older change does not
	// free what a newer one brought. Never held across I/O.
	changing sync.Mutex

	mu        sync.RWMutex // never held across I/O
	closed    bool
	slots     map[string]map[slotKey]*slot // by role
	upstreams map[string]*upstream         // by config
}

func newTokenCache(configs *entries[configEntry], roles *entries[roleEntry], newClient clientFactory, telemetry *telemetry, logger func() hclog.Logger, random func() float64) *tokenCache {
	c := &tokenCache{
		configs:   configs,
		roles:     roles,
		newClient: newClient,
		telemetry: telemetry,
		logger:    logger,
		random:    random,
		reloading: make(chan struct{}, maxReloads),
		store:     tokenStore{telemetry: telemetry, logger: logger},
		gates:     newGates(),
		rotations: newRotations(),
		narrowed:  newNarrowedSlots(),
		slots:     make(map[string]map[slotKey]*slot),
		upstreams: make(map[string]*upstream),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	configs.changed, configs.forgotten = c.configChanged, c.configForgotten
	roles.changed, roles.forgotten = c.roleChanged, c.roleForgotten
	return c
}

// cached answers a read with the cached token if that token is fresh.
func (c *tokenCache) cached(q *query) (served, bool) {
	s := c.peek(q.key())
	if s == nil {
		return served{}, false
	}
	tok := s.held(&q.spec)
	if tok == nil || s.unsure.Load() { // in this order: a token that must be announced is unsure before it is held
		return served{}, false
	}
	if q.narrowed != "" {
		c.touch(s)
	}
	return tok.hit(q, c.random)
}

// await answers a read that found no fresh token. The error is an *unavailable, a
// *noTurnError, errOutdated, errClosed, errForward, or the cause of ctx's end.
func (c *tokenCache) await(ctx context.Context, q *query) (served, error) {
	if c.forwards(q) { // the role or config was written in the meantime
		return served{}, errForward
	}
	s, err := c.slot(&q.spec)
	if err != nil {
		return served{}, err
	}
	if c.relies(&q.spec) {
		return s.relay(ctx, q)
	}
	return s.await(ctx, q)
}

// serveFrom connects the cache to the mount's storage. standby is set if this node may
// not write to it.
func (c *tokenCache) serveFrom(storage logical.Storage, standby bool) {
	c.storage, c.store.storage, c.standby = storage, storage, standby
}

// peek returns the slot of a key, or nil.
func (c *tokenCache) peek(key slotKey) *slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.slots[key.role][key]
}

// slot returns the slot for a spec and creates it if needed.
func (c *tokenCache) slot(spec *spec) (*slot, error) {
	key := spec.key()
	s := c.peek(key)
	if s == nil {
		var err error
		if s, err = c.add(key); err != nil {
			return nil, err
		}
	}
	if key.narrowed != "" {
		c.touch(s)
	}
	return s, nil
}

// add creates the slot of a key unless another reader just did.
func (c *tokenCache) add(key slotKey) (*slot, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if s := c.slots[key.role][key]; s != nil {
		return s, nil
	}
	s := &slot{cache: c, key: key}
	if c.slots[key.role] == nil {
		c.slots[key.role] = make(map[slotKey]*slot)
	}
	c.slots[key.role][key] = s
	return s, nil
}

// touch records a read of a scope subset's slot, which may evict another slot.
func (c *tokenCache) touch(s *slot) {
	if evicted := c.narrowed.use(s); evicted != nil {
		evicted.evict()
	}
	if c.peek(s.key) != s { // freed in the meantime
		c.narrowed.remove(s)
	}
}

// remove takes a freed slot out of the cache.
func (c *tokenCache) remove(s *slot) {
	if s.key.narrowed != "" {
		c.narrowed.remove(s)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if of := c.slots[s.key.role]; of[s.key] == s {
		delete(of, s.key)
		if len(of) == 0 {
			delete(c.slots, s.key.role)
		}
	}
}

// slotsOf returns the slots of a role.
func (c *tokenCache) slotsOf(role string) []*slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return values(c.slots[role])
}

// all returns all slots.
func (c *tokenCache) all() []*slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var all []*slot
	for _, of := range c.slots {
		all = append(all, values(of)...)
	}
	return all
}

func values(slots map[slotKey]*slot) []*slot {
	list := make([]*slot, 0, len(slots))
	for _, s := range slots {
		list = append(list, s)
	}
	return list
}

// roleChanged updates the slots of a role after a write. role is nil if the role was
// deleted.
func (c *tokenCache) roleChanged(name string, role *held[roleEntry]) {
	c.changing.Lock()
	defer c.changing.Unlock()
	if c.roles.current(name) != role {
		return // a later change will follow
	}
	for _, s := range c.slotsOf(name) {
		if role == nil || s.key.roleGeneration != role.entry.TokenGeneration {
			s.outdate()
			continue
		}
		s.written(func(spec spec) spec {
			spec.role = role
			if spec.narrowed == "" {
				spec.scopes = role.entry.Scopes
			}
			return spec
		})
	}
}

// configChanged is roleChanged for a config. It discards the config's client and its
// failures. A mint in progress continues.
func (c *tokenCache) configChanged(name string, config *held[configEntry]) {
	c.changing.Lock()
	defer c.changing.Unlock()
	if c.configs.current(name) != config {
		return
	}
	c.gates.written(name, config) // before a newer upstream can get its gate
	c.detach(name, config)
	if config == nil {
		c.telemetry.configGone(name)
	}
	for _, s := range c.all() {
		switch {
		case s.key.config != name:
		case config == nil || s.key.configGeneration != config.entry.TokenGeneration:
			s.drop()
		default:
			s.written(func(spec spec) spec {
				spec.config = config
				return spec
			})
		}
	}
}

// roleForgotten reloads a role that may have changed, if it has tokens.
func (c *tokenCache) roleForgotten(name string) {
	if len(c.slotsOf(name)) == 0 {
		return
	}
	reload(c, c.roles, name, c.roleChanged)
}

// configForgotten is roleForgotten for a config.
func (c *tokenCache) configForgotten(name string) {
	c.detach(name, nil)
	// The config is in use on this node, or its tokens came from storage.
	if c.telemetry.knows(name) || slices.ContainsFunc(c.all(), func(s *slot) bool { return s.key.config == name }) {
		reload(c, c.configs, name, c.configChanged)
	}
}

// reload loads an entry in the background and calls changed with it.
func reload[T any](c *tokenCache, entries *entries[T], name string, changed func(string, *held[T])) {
	c.spawn(func() {
		for wait := shortestReloadWait; ; wait = min(2*wait, longestReloadWait) {
			c.reloading <- struct{}{}
			now, err := entries.get(c.ctx, c.storage, name)
			<-c.reloading
			var broken *unreadable
			if err == nil || errors.As(err, &broken) {
				changed(name, now)
				return
			}
			select {
			case <-time.After(wait):
			case <-c.ctx.Done():
				return
			}
		}
	})
}

// upstream returns the upstream of a config and creates it if needed. The error is
// errOutdated if config is not the one in memory.
func (c *tokenCache) upstream(config *held[configEntry]) (*upstream, error) {
	c.mu.RLock()
	up := c.upstreams[config.name]
	c.mu.RUnlock()
	if up != nil && up.config.same(config) {
		return up, nil
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.upstreams[config.name]
	switch {
	case c.closed:
		return nil, errClosed
	case old != nil && old.config.same(config):
		return old, nil
	case c.configs.current(config.name) != config:
		return nil, errOutdated
	}
	if old != nil {
		old.retire(errOutdated)
	}
	up = c.newUpstream(config)
	c.upstreams[config.name] = up
	c.telemetry.configSeen(config.name)
	return up, nil
}

// detach discards the upstream of a config unless it was created for the entry now.
func (c *tokenCache) detach(name string, now *held[configEntry]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if up := c.upstreams[name]; up != nil && up.config != now {
		up.retire(errOutdated)
		delete(c.upstreams, name)
	}
}

// isCurrent reports whether the upstream's config is unchanged.
func (c *tokenCache) isCurrent(up *upstream) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.upstreams[up.config.name] == up
}

// outdated reports whether the role or config was written since spec was looked up or up
// was created.
func (c *tokenCache) outdated(spec *spec, up *upstream) bool {
	return c.roles.current(spec.role.name) != spec.role || c.configs.current(spec.config.name) != spec.config || !c.isCurrent(up)
}

// standing reports whether the role and config in memory would still make the same mint.
func (c *tokenCache) standing(f *flight) bool {
	role := c.roles.current(f.spec.role.name)
	switch {
	case role == nil || !c.isCurrent(f.up):
		return false
	case f.leave.now: // an earlier rotation changes only the generation, which does not matter here
		return role.entry.asksSameAs(&f.spec.role.entry)
	default:
		return role.entry.TokenGeneration == f.spec.role.entry.TokenGeneration
	}
}

// newFlight makes a mint that was admitted.
func (c *tokenCache) newFlight(spec *spec, up *upstream, l leave, past history) *flight {
	f := &flight{spec: spec, up: up, leave: l, past: past, started: time.Now(), done: make(chan struct{})}
	f.turn = up.turn(l, func() error {
		if !c.standing(f) {
			return errOutdated
		}
		return up.withdrawn(l, time.Now())
	})
	return f
}

// mint gets a new token from MojoAuth. It first reads role and config from storage, so a
// lost invalidation never causes a wrong token. The error is that of upstream.mint,
// errOutdated, or errClosed.
func (c *tokenCache) mint(f *flight) (*cachedToken, error) {
	defer f.turn.interrupt(nil)
	err := c.confirm(f.spec, f.up)
	if err == nil {
		err = f.turn.useless()
	}
	var tok *cachedToken
	if err == nil {
		tok, err = f.up.mint(c.ctx, f)
	} else {
		f.up.settle(f.leave, nil)
	}
	if err != nil && c.ctx.Err() != nil {
		return nil, errClosed
	}
	return tok, err
}

// confirm returns an error if spec differs from storage. If storage fails, what is in
// memory counts.
func (c *tokenCache) confirm(spec *spec, up *upstream) error {
	ctx, cancel := context.WithTimeout(c.ctx, storagePatience)
	defer cancel()
	role, roleErr := c.roles.fresh(ctx, c.storage, spec.role.name)
	config, configErr := c.configs.fresh(ctx, c.storage, spec.config.name)
	var broken *unreadable
	for _, err := range []error{roleErr, configErr} {
		if errors.As(err, &broken) {
			return &unavailable{mintError: &mintError{class: classInternal, reason: broken.Error()}, config: up.config.name, keyOnly: true}
		}
	}
	if roleErr == nil && !role.same(spec.role) || configErr == nil && !config.same(spec.config) {
		return errOutdated
	}
	return nil
}

// wait waits for done on behalf of a reader. waiter is nil if the turn could not be
// joined. The error is a *noTurnError when time is up, errClosed, or the cause of ctx's
// end.
func (c *tokenCache) wait(ctx context.Context, done <-chan struct{}, waiter *gate.Waiter, up *upstream) error {
	var tooLate <-chan struct{}
	if waiter != nil {
		tooLate = waiter.TooLate()
	}
	select {
	case <-done:
		return nil
	case <-tooLate:
		return &noTurnError{NoTurnError: waiter.Err(), config: up.config.name}
	case <-ctx.Done():
		switch {
		case !errors.Is(ctx.Err(), context.DeadlineExceeded):
			return context.Cause(ctx)
		case waiter != nil:
			return &noTurnError{NoTurnError: waiter.Err(), config: up.config.name}
		default:
			return &noTurnError{NoTurnError: up.gate.NoTurn(), config: up.config.name}
		}
	case <-c.ctx.Done():
		return errClosed
	}
}

// waitFor waits for a mint: until it ends or, if the old token is usable, until patience
// is over. In the second case, the error is nil or, if the mint still waits at the gate,
// a *noTurnError. Other errors are those of toTheEnd.
func (c *tokenCache) waitFor(ctx context.Context, f *flight, waiter *gate.Waiter, old *cachedToken) (over bool, err error) {
	now := time.Now()
	if !old.usable(now) {
		return false, c.toTheEnd(ctx, f, waiter)
	}
	patient, cancel := context.WithTimeout(ctx, min(old.timeLeft(now)-old.schedule.Floor, patience-now.Sub(f.started)))
	defer cancel()
	err = c.wait(patient, f.done, waiter, f.up)
	if err == nil || ctx.Err() != nil || patient.Err() == nil {
		return false, err
	}
	if why := waiter.Err(); f.turn.left.Load() == nil && (why.Throttled || why.Waiting > 1) {
		return true, &noTurnError{NoTurnError: why, config: f.up.config.name}
	}
	return true, nil
}

// toTheEnd waits for the end of a mint. The error is that of wait, or an *unavailable if
// the request used up all its time.
func (c *tokenCache) toTheEnd(ctx context.Context, f *flight, waiter *gate.Waiter) error {
	err := c.wait(ctx, f.done, waiter, f.up)
	var late *noTurnError
	left, allowed := f.turn.left.Load(), f.up.config.entry.RequestTimeout
	switch {
	case left == nil || !errors.As(err, &late):
	case time.Since(*left) >= allowed:
		return &unavailable{mintError: &mintError{class: classTimeout, allowed: allowed}, config: f.up.config.name}
	default:
		late.asked = true
	}
	return err
}

// waitForProbe waits for the end of the mint that finds out whether the outage is over.
func (c *tokenCache) waitForProbe(ctx context.Context, refusal *unavailable, arrived time.Time) error {
	deadline, _ := ctx.Deadline()
	waiter, ok := refusal.turn.Join(deadline, arrived)
	if ok {
		defer waiter.Leave()
	}
	return c.wait(ctx, refusal.probe, waiter, refusal.up)
}

// spawn runs work in a goroutine that close waits for. It returns false and runs nothing
// if the cache is closed.
func (c *tokenCache) spawn(work func()) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return false
	}
	c.work.Go(work)
	return true
}

// close stops everything and waits for it, but no longer than closingTime: Vault serves
// no requests while it removes a mount.
func (c *tokenCache) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	for _, s := range c.all() {
		s.drop()
	}
	c.gates.close()
	ended := make(chan struct{})
	go func() {
		c.work.Wait()
		close(ended)
	}()
	late := time.NewTimer(closingTime)
	defer late.Stop()
	select {
	case <-ended:
	case <-late.C:
		c.logger().Warn("closing the mount without waiting longer for running operations", "waited", closingTime)
	}
}
