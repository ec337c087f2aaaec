// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file finds the slot that a read goes to, and the upstream that a slot asks.
//
// A slot is found by all that its token depends on, the generations of role and
// config included. So a write that drops tokens makes readers look under another
// key, and the slots of the old key are freed. Reading a fresh token takes no lock
// that anything holds across I/O.

const (
	// maxAhead bounds how many mints are under way at once without a reader
	// waiting, so that thousands of roles that were minted together are not renewed
	// in one burst.
	maxAhead = 16

	// storagePatience is how long a mint waits for storage before it goes by what
	// is in memory.
	storagePatience = time.Second

	// closingTime is how long closing waits for what is under way.
	closingTime = 5 * time.Second

	// A reload that storage fails is tried again after a wait that doubles.
	shortestReloadWait = time.Second
	longestReloadWait  = 30 * time.Second
	maxReloads         = 16 // under way at once
)

var (
	// errOutdated is for a reader whose role or config was written since it looked
	// them up: it has to look again.
	errOutdated = errors.New("the role or its config changed")

	// errClosed is for readers of a mount that is being taken down.
	errClosed = errors.New("the mount is being closed")
)

// tokenCache holds the tokens of one mount on this node.
type tokenCache struct {
	configs   *entries[configEntry]
	roles     *entries[roleEntry]
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	random    func() float64  // uniform in [0, 1)
	storage   logical.Storage // to look up roles and configs when no reader brings them

	ctx       context.Context // of everything that outlives a read; ends in close
	cancel    context.CancelFunc
	work      sync.WaitGroup // counts the goroutines that do so
	ahead     chan struct{}  // holds a place for each mint without a reader
	reloading chan struct{}  // holds a place for each reload

	narrowed narrowedSlots

	// changing lets changes of roles and configs be taken in one after the other, so
	// that an older one does not free what a newer one brought. Never held across I/O.
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
		ahead:     make(chan struct{}, maxAhead),
		reloading: make(chan struct{}, maxReloads),
		narrowed:  newNarrowedSlots(),
		slots:     make(map[string]map[slotKey]*slot),
		upstreams: make(map[string]*upstream),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	configs.changed, configs.forgotten = c.configChanged, c.configForgotten
	roles.changed, roles.forgotten = c.roleChanged, c.roleForgotten
	return c
}

// cached answers a read with the cached token, if that is fresh for a reader who
// wants minTTL.
func (c *tokenCache) cached(spec *spec, minTTL time.Duration) (served, bool) {
	s := c.peek(spec.key())
	if s == nil {
		return served{}, false
	}
	tok := s.held(spec)
	if tok == nil {
		return served{}, false
	}
	if spec.narrowed != "" {
		c.touch(s)
	}
	return tok.hit(minTTL, c.random)
}

// await answers a read that found no fresh token. The error is an *unavailable or a
// *crowded, errOutdated, errClosed, or why ctx ended.
func (c *tokenCache) await(ctx context.Context, spec *spec, minTTL time.Duration) (served, error) {
	s, err := c.slot(spec)
	if err != nil {
		return served{}, err
	}
	return s.await(ctx, spec, minTTL)
}

// peek finds the slot of a key, if there is one.
func (c *tokenCache) peek(key slotKey) *slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.slots[key.role][key]
}

// slot finds the slot of a spec, or makes it.
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

// add makes the slot of a key, unless somebody else just has.
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

// touch notes that a narrowed slot is read, which may evict another.
func (c *tokenCache) touch(s *slot) {
	if evicted := c.narrowed.use(s); evicted != nil {
		evicted.evict()
	}
	if c.peek(s.key) != s { // freed meanwhile
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

// slotsOf are the slots of a role.
func (c *tokenCache) slotsOf(role string) []*slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return values(c.slots[role])
}

// all are the slots there are.
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

// roleChanged has the slots of a role go by what was written: role is nil when the
// role is gone.
func (c *tokenCache) roleChanged(name string, role *held[roleEntry]) {
	c.changing.Lock()
	defer c.changing.Unlock()
	if c.roles.current(name) != role {
		return // a later change follows
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

// configChanged is roleChanged for a config. Its client and its failures are
// forgotten. A mint that is under way goes on.
func (c *tokenCache) configChanged(name string, config *held[configEntry]) {
	c.changing.Lock()
	defer c.changing.Unlock()
	if c.configs.current(name) != config {
		return
	}
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

// roleForgotten has a role loaded that was perhaps changed, if there are tokens of it.
func (c *tokenCache) roleForgotten(name string) {
	if len(c.slotsOf(name)) == 0 {
		return
	}
	reload(c, c.roles, name, c.roleChanged)
}

// configForgotten is roleForgotten for a config.
func (c *tokenCache) configForgotten(name string) {
	c.detach(name, nil)
	if c.telemetry.knows(name) { // so it was at work on this node
		reload(c, c.configs, name, c.configChanged)
	}
}

// reload loads an entry in the background, and calls changed with it.
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

// upstream finds the upstream of a config as it stands, or makes it. It is
// errOutdated when config is not what is in memory.
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
	up = &upstream{config: config, newClient: c.newClient, telemetry: c.telemetry, logger: c.logger, random: c.random}
	c.upstreams[config.name] = up
	c.telemetry.configSeen(config.name)
	return up, nil
}

// detach forgets the upstream of a config, but one that was made of the entry now.
func (c *tokenCache) detach(name string, now *held[configEntry]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if up := c.upstreams[name]; up != nil && up.config != now {
		delete(c.upstreams, name)
	}
}

// isCurrent reports whether the upstream's config has not been written since.
func (c *tokenCache) isCurrent(up *upstream) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.upstreams[up.config.name] == up
}

// standing reports whether role and config of spec are those in memory.
func (c *tokenCache) standing(spec *spec) bool {
	return c.roles.current(spec.role.name) == spec.role && c.configs.current(spec.config.name) == spec.config
}

// outdated reports whether role or config were written since spec was looked up, or
// since up was asked.
func (c *tokenCache) outdated(spec *spec, up *upstream) bool {
	return !c.standing(spec) || !c.isCurrent(up)
}

// mint asks for a token of spec. It reads role and config from storage before: an
// invalidation that was lost costs no wrong token. The error is that of
// upstream.mint, or errOutdated.
func (c *tokenCache) mint(up *upstream, l leave, spec *spec, past history) (*cachedToken, error) {
	err := c.confirm(spec, up)
	if c.ctx.Err() != nil {
		err = errClosed
	}
	if err == nil {
		err = up.withdrawn(l, time.Now())
	}
	if err != nil {
		up.settle(l, nil)
		return nil, err
	}
	tok, err := up.mint(c.ctx, l, spec, past)
	if err != nil && c.ctx.Err() != nil {
		return nil, errClosed
	}
	return tok, err
}

// confirm reports by an error that spec is not what is in storage. When storage
// fails, what is in memory counts.
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

// mintNow mints a token of spec beside whatever is cached or under way, and does not
// keep it. A back-off is ignored, a Retry-After is not. The errors are those of await.
func (c *tokenCache) mintNow(ctx context.Context, spec *spec) (*cachedToken, error) {
	up, err := c.upstream(spec.config)
	if err != nil {
		return nil, err
	}
	var past history
	s := c.peek(spec.key())
	if s != nil {
		var refusal *unavailable
		if past, refusal = s.askedToWait(up); refusal != nil {
			return nil, refusal
		}
	}
	l, err := up.admitNow(spec.key(), time.Now())
	if err != nil {
		return nil, err
	}
	var tok *cachedToken
	done := make(chan struct{})
	if !c.spawn(func() {
		defer close(done)
		tok, err = c.mint(up, l, spec, past)
	}) {
		return nil, errClosed
	}
	if err := c.wait(ctx, done); err != nil {
		return nil, err
	}
	switch {
	case err == nil && s != nil:
		s.succeeded()
	case err != nil && c.outdated(spec, up):
		return nil, errOutdated
	}
	return tok, err
}

// successor is the token that a spec's role has after a rotation that minted tok: tok,
// or one that was minted after it and is there already. It counts as in use when the
// token is that it replaces. The error is an *unavailable when tok is no new token.
func (c *tokenCache) successor(spec *spec, tok *cachedToken) (*cachedToken, error) {
	next := tok.view(spec)
	if s := c.peek(spec.key()); s != nil {
		if old := s.held(spec); old != nil {
			switch {
			case old.accessToken == tok.accessToken:
				return nil, &unavailable{mintError: repeats(old), config: spec.config.name}
			case old.mintedAt.After(tok.mintedAt):
				next = old
			}
			next.use.Store(old.use.Load())
		}
	}
	if !next.usable(time.Now()) {
		return nil, &unavailable{mintError: expiredOnArrival(next), config: spec.config.name}
	}
	return next, nil
}

// prepare makes the slot of a spec that no reader can have yet, with a token in it.
// roleChanged wakes it, once the role is saved.
func (c *tokenCache) prepare(spec *spec, tok *cachedToken) (*slot, error) {
	s, err := c.slot(spec)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spec, s.prepared = spec, true
	s.token.Store(tok)
	return s, nil
}

// unprepare has a prepared slot go by what storage has of its role, after saving it
// failed.
func (c *tokenCache) unprepare(s *slot) {
	s.mu.Lock()
	s.prepared = false
	s.mu.Unlock()
	c.roleForgotten(s.key.role)
}

// wait waits for done. The error is errClosed or why ctx ended.
func (c *tokenCache) wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.ctx.Done():
		return errClosed
	}
}

// waitFor waits for a mint: to its end, or, while the old token would do, until
// patience is over, when landed is false.
func (c *tokenCache) waitFor(ctx context.Context, f *flight, old *cachedToken) (landed bool, err error) {
	now := time.Now()
	if !old.usable(now) {
		return true, c.wait(ctx, f.done)
	}
	impatient := time.NewTimer(min(old.timeLeft(now)-old.schedule.Floor, patience-now.Sub(f.started)))
	defer impatient.Stop()
	select {
	case <-f.done:
		return true, nil
	case <-impatient.C:
		return false, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-c.ctx.Done():
		return false, errClosed
	}
}

// spawn runs work in a goroutine that close waits for. It is false, and nothing
// runs, when the cache is closed.
func (c *tokenCache) spawn(work func()) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.closed {
		return false
	}
	c.work.Go(work)
	return true
}

// close stops everything and waits for it, but not longer than closingTime: Vault
// answers nothing while it takes a mount down.
func (c *tokenCache) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	for _, s := range c.all() {
		s.drop()
	}
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
		c.logger().Warn("closing doesn't wait longer for what is under way", "waited", closingTime)
	}
}

const (
	// maxNarrowed bounds the slots for narrowed scopes of a mount, so that no caller
	// can grow memory, and maxNarrowedOfRole those of one role, so that a caller who
	// goes through its subsets pushes out few of other roles.
	maxNarrowed       = 1024
	maxNarrowedOfRole = 128
)

// narrowedSlots notes in which order the slots for narrowed scopes were last read.
type narrowedSlots struct {
	mu    sync.Mutex // never held across I/O
	mount *simplelru.LRU[slotKey, *slot]
	roles map[string]*simplelru.LRU[slotKey, *slot]
}

func newNarrowedSlots() narrowedSlots {
	return narrowedSlots{mount: newLRU(maxNarrowed + 1), roles: make(map[string]*simplelru.LRU[slotKey, *slot])}
}

// newLRU makes a list that evicts nothing by itself while it holds no more than size.
func newLRU(size int) *simplelru.LRU[slotKey, *slot] {
	list, err := simplelru.NewLRU[slotKey, *slot](size, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return list
}

// use makes s the last one read, and returns the slot that has to go for it: the
// role's least recently read one when the role has its share, else the mount's.
func (n *narrowedSlots) use(s *slot) (evicted *slot) {
	n.mu.Lock()
	defer n.mu.Unlock()
	of := n.roles[s.key.role]
	if of == nil {
		of = newLRU(maxNarrowedOfRole + 1)
		n.roles[s.key.role] = of
	}
	of.Add(s.key, s)
	n.mount.Add(s.key, s)
	switch {
	case of.Len() > maxNarrowedOfRole:
		_, evicted, _ = of.GetOldest()
	case n.mount.Len() > maxNarrowed:
		_, evicted, _ = n.mount.GetOldest()
	default:
		return nil
	}
	n.take(evicted)
	return evicted
}

// remove forgets a freed slot.
func (n *narrowedSlots) remove(s *slot) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if listed, ok := n.mount.Peek(s.key); ok && listed == s {
		n.take(s)
	}
}

// take takes a slot out. The caller holds n.mu.
func (n *narrowedSlots) take(s *slot) {
	n.mount.Remove(s.key)
	of := n.roles[s.key.role]
	of.Remove(s.key)
	if of.Len() == 0 {
		delete(n.roles, s.key.role)
	}
}

// has reports whether s is among the slots that are kept.
func (n *narrowedSlots) has(s *slot) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	listed, ok := n.mount.Peek(s.key)
	return ok && listed == s
}

// census is what the cache holds at one moment.
type census struct {
	cached int // tokens that may be served
	// due counts the tokens in use for which a new one is due and not there, and
	// nearest is how long the first of them may still be served.
	due     int
	nearest time.Duration
	// backoff has the configs that are in a back-off, and until when.
	backoff map[string]time.Time
}

// census counts what the cache holds.
func (c *tokenCache) census() census {
	now := time.Now()
	n := census{backoff: make(map[string]time.Time)}
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
