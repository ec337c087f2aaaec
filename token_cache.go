// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file decides which token a read gets, and when a new one is minted.
//
// There is a slot for each role, and for each narrowed set of scopes that was
// read of it. A slot holds one token and mints the next, one at a time. Reading
// a fresh token takes no lock that anything holds across I/O.
//
// Nothing has to tell a slot that a role or config changed: each reader brings
// the role and config as they stand now (a grant), and the slot goes along with
// the newest it has seen. Whether the token it has is still good follows from
// the token generations in both. review.go does the same where nobody reads.

const (
	// patience is how long a reader waits for a mint while the old token would
	// still do.
	patience = 2 * time.Second

	// maxNarrowed bounds the slots for narrowed scopes of a mount, so that no
	// caller can grow memory.
	maxNarrowed = 1024

	// maxAhead bounds how many mints the engine has under way at once without
	// a reader waiting, so that thousands of roles that were minted together
	// are not renewed in one burst.
	maxAhead = 16
)

// errOutdated is for a reader whose role or config is older than what the cache
// knows already: it has to look them up again.
var errOutdated = errors.New("the role or its config changed")

// errClosed is for readers of a mount that is being taken down.
var errClosed = errors.New("the mount is being closed")

// tokenCache holds the tokens of one mount on this node.
type tokenCache struct {
	configs   *entries[configEntry]
	roles     *entries[roleEntry]
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	storage   logical.Storage // to look up roles and configs when no reader brings them

	ctx    context.Context // of everything that outlives a read; ends in close
	cancel context.CancelFunc
	work   sync.WaitGroup // counts the goroutines that do so
	ahead  chan struct{}  // holds a place for each mint without a reader

	narrowed *lru.Cache[slotKey, *slot]
	reviews  reviews

	mu           sync.RWMutex // never held across I/O
	closed       bool
	slots        map[string]*slot        // by role, for all its scopes
	applications map[string]*application // by config
}

// grant is what a token is asked for: a role and its config as they stand, and
// the role's scopes or some of them.
type grant struct {
	role   *held[roleEntry]
	config *held[configEntry]
	scopes []string
	// narrowed identifies scopes when they are fewer than the role's: sorted
	// and joined. "" stands for all of them.
	narrowed string
}

type slotKey struct{ role, narrowed string }

func (g *grant) key() slotKey { return slotKey{g.role.name, g.narrowed} }

func (g *grant) request() tokenRequest {
	return tokenRequest{audience: g.role.entry.Audience, scopes: g.scopes, extra: g.role.entry.ExtraParams}
}

// same tells whether both come from the very same role and config.
func (g *grant) same(other *grant) bool { return g.role == other.role && g.config == other.config }

// sharesTokens tells whether a token minted for one serves the other.
func (g *grant) sharesTokens(other *grant) bool {
	return g.config.name == other.config.name &&
		g.config.entry.TokenGeneration == other.config.entry.TokenGeneration &&
		g.role.entry.TokenGeneration == other.role.entry.TokenGeneration
}

// olderThan tells whether other was looked up later. A reader looks up the role
// first, so that a newer role decides.
func (g *grant) olderThan(other *grant) bool {
	if g.role.seq != other.role.seq {
		return g.role.seq < other.role.seq
	}
	return g.config.seq < other.config.seq
}

// outcome is how a read was answered.
type outcome string

const (
	outcomeHit       outcome = "hit"       // the cached token
	outcomeRefreshed outcome = "refreshed" // a new token, though the old would have done
	outcomeMinted    outcome = "minted"    // a new token
	outcomeStale     outcome = "stale"     // the old token, since no new one could be had
	outcomeError     outcome = "error"     // no token
)

// served is the answer to a read.
type served struct {
	*cachedToken
	schedule schedule
	outcome  outcome
	left     time.Duration // of the token's life
	ttl      int64         // seconds until the caller should read again
	lease    time.Duration // of a lease on the token, if it is to have one
	failure  *unavailable  // for outcomeStale: why, or nil when a mint is slow
}

func newTokenCache(configs *entries[configEntry], roles *entries[roleEntry], newClient clientFactory, telemetry *telemetry, logger func() hclog.Logger) *tokenCache {
	c := &tokenCache{
		configs:      configs,
		roles:        roles,
		newClient:    newClient,
		telemetry:    telemetry,
		logger:       logger,
		ahead:        make(chan struct{}, maxAhead),
		slots:        make(map[string]*slot),
		applications: make(map[string]*application),
		reviews:      reviews{waiting: make(map[*slot]struct{})},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	narrowed, err := lru.NewWithEvict(maxNarrowed, func(_ slotKey, s *slot) { s.close() })
	if err != nil {
		panic(err) // only for a size below 1
	}
	c.narrowed = narrowed
	return c
}

// read answers a read of g with a token that has minTTL left, as far as its
// lifetime allows. The error is an *unavailable, errOutdated, errClosed, or the
// end of ctx.
func (c *tokenCache) read(ctx context.Context, g *grant, minTTL time.Duration) (served, error) {
	for {
		s, err := c.slot(g)
		if err != nil {
			return served{}, err
		}
		if st := s.state.Load(); st != nil && st.token != nil && st.grant.same(g) {
			if answer, ok := st.token.hit(minTTL); ok {
				return answer, nil
			}
		}
		answer, err := s.read(ctx, g, minTTL)
		if err != errEvicted {
			return answer, err
		}
	}
}

// mintNow mints a token of g beside whatever is cached or under way, and does not
// keep it. A failure back-off is ignored, a Retry-After is not. The errors are
// those of read.
func (c *tokenCache) mintNow(ctx context.Context, g *grant) (*token, error) {
	app, err := c.application(g.config)
	if err != nil {
		return nil, err
	}
	if refusal := app.admitNow(time.Now()); refusal != nil {
		return nil, refusal
	}
	if refusal := c.askedToWait(g, app); refusal != nil {
		return nil, refusal
	}
	var tok *token
	done := make(chan struct{})
	if !c.spawn(func() {
		defer close(done)
		tok, err = app.mint(c.ctx, admission{}, g)
		if !c.current(app) {
			app.close()
		}
	}) {
		return nil, errClosed
	}
	select {
	case <-done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	switch {
	case err == nil:
		return tok, nil
	case c.ctx.Err() != nil:
		return nil, errClosed
	case !c.current(app):
		return nil, errOutdated
	}
	return nil, err
}

// askedToWait tells of a Retry-After that concerns g alone.
func (c *tokenCache) askedToWait(g *grant, app *application) *unavailable {
	c.mu.RLock()
	s := c.slots[g.role.name]
	c.mu.RUnlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A back-off under another grant is over: what was written may have mended it.
	if st := s.state.Load(); st == nil || !st.grant.same(g) {
		return nil
	}
	if s.backoff.asked && s.backoff.blocks(time.Now()) {
		return app.unavailable(s.backoff.last, s.backoff.until)
	}
	return nil
}

// successor is the token that g's role has after a rotation that minted tok: tok, or
// one that was minted after it and is there already. When its life is over it is none,
// but an error.
func (c *tokenCache) successor(g *grant, tok *token) (*cachedToken, *unavailable) {
	next := newCachedToken(tok, new(atomic.Bool), g)
	c.mu.RLock()
	s := c.slots[g.role.name]
	c.mu.RUnlock()
	if s != nil {
		if st := s.state.Load(); st != nil && st.token != nil && st.grant.sharesTokens(g) && st.token.mintedAt.After(tok.mintedAt) {
			next = newCachedToken(st.token.token, st.token.read, g)
		}
	}
	if next.schedule.phase(next.left(time.Now())) == phaseSpent {
		return nil, &unavailable{mintError: overOnArrival(next.schedule.lifetime), config: g.config.name}
	}
	return next, nil
}

// put makes tok the token that reads of g get.
func (c *tokenCache) put(g *grant, tok *cachedToken) (*cachedToken, error) {
	cached := newCachedToken(tok.token, tok.read, g)
	for {
		s, err := c.slot(g)
		if err != nil {
			return nil, err
		}
		if err := s.put(g, cached); err == nil {
			return cached, nil
		}
	}
}

// slot finds the slot of g, or makes it.
func (c *tokenCache) slot(g *grant) (*slot, error) {
	if g.narrowed != "" {
		// Without c.mu: what this evicts is closed, which takes the slot's lock.
		s, ok := c.narrowed.Get(g.key())
		if !ok {
			fresh := &slot{cache: c, key: g.key()}
			if s, ok, _ = c.narrowed.PeekOrAdd(fresh.key, fresh); !ok {
				s = fresh
			}
		}
		return s, nil
	}

	c.mu.RLock()
	s := c.slots[g.role.name]
	c.mu.RUnlock()
	if s != nil {
		return s, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	if s := c.slots[g.role.name]; s != nil {
		return s, nil
	}
	s = &slot{cache: c, key: g.key()}
	c.slots[g.role.name] = s
	return s, nil
}

// remove takes a closed slot out of the cache.
func (c *tokenCache) remove(s *slot) {
	if s.key.narrowed != "" {
		if held, ok := c.narrowed.Peek(s.key); ok && held == s {
			c.narrowed.Remove(s.key)
		}
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slots[s.key.role] == s {
		delete(c.slots, s.key.role)
	}
}

// drop frees the slots whose grants match, because their tokens are not to be served
// any more. Readers who wait for their mints still get them.
func (c *tokenCache) drop(match func(*grant) bool) {
	for _, s := range c.all() {
		if st := s.state.Load(); st != nil && match(st.grant) {
			s.drop(st)
		}
	}
}

// all are the slots there are.
func (c *tokenCache) all() []*slot {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return slices.AppendSeq(c.narrowed.Values(), maps.Values(c.slots))
}

// roleChanged has the slots of a role go by what was written, here or elsewhere.
func (c *tokenCache) roleChanged(name string) {
	slots := slices.DeleteFunc(c.narrowed.Values(), func(s *slot) bool { return s.key.role != name })
	c.mu.RLock()
	if s := c.slots[name]; s != nil {
		slots = append(slots, s)
	}
	c.mu.RUnlock()
	c.review(slots)
}

// configChanged forgets what is known of a config's client and its failures, and has
// the slots of its roles go by what was written, here or elsewhere. A mint that is
// under way goes on; its failure is forgotten too.
func (c *tokenCache) configChanged(name string) {
	c.mu.Lock()
	app := c.applications[name]
	delete(c.applications, name)
	c.mu.Unlock()
	if app != nil {
		app.close()
	}
	c.review(slices.DeleteFunc(c.all(), func(s *slot) bool {
		st := s.state.Load()
		return st == nil || st.grant.config.name != name
	}))
}

// application finds the application of a config as it stands, or makes it. It
// is errOutdated when a newer config is at work already.
func (c *tokenCache) application(config *held[configEntry]) (*application, error) {
	c.mu.RLock()
	app := c.applications[config.name]
	c.mu.RUnlock()
	if app != nil && app.config == config {
		return app, nil
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.applications[config.name]
	switch {
	case c.closed:
		return nil, errClosed
	case old != nil && old.config == config:
		return old, nil
	case old != nil && old.config.seq > config.seq:
		return nil, errOutdated
	case old != nil:
		c.work.Go(old.close) // not under the lock
	}
	app = &application{config: config, newClient: c.newClient, telemetry: c.telemetry, logger: c.logger}
	c.applications[config.name] = app
	c.telemetry.configSeen(config.name)
	return app, nil
}

// current tells whether the application's config has not been written since.
func (c *tokenCache) current(app *application) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.applications[app.config.name] == app
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

// close stops everything and waits for it.
func (c *tokenCache) close() {
	c.mu.Lock()
	c.closed = true
	slots := make([]*slot, 0, len(c.slots))
	for _, s := range c.slots {
		slots = append(slots, s)
	}
	applications := c.applications
	c.slots, c.applications = nil, nil
	c.mu.Unlock()

	c.cancel()
	for _, s := range slots {
		s.close()
	}
	c.narrowed.Purge()
	c.work.Wait()
	for _, app := range applications {
		app.close()
	}
}

// cachedToken is a token as it is served for a grant. It does not change, but
// for the note that it was read. What an answer needs is made here, once, and
// not at each read.
type cachedToken struct {
	*token
	read *atomic.Bool // shared by all views of the token

	schedule schedule
	endsAt   time.Time
	assumed  bool     // nobody told the lifetime
	missing  []string // scopes that were asked for and not granted
	common   tokenAnswer
}

// tokenAnswer is what all reads of a token are answered alike. The values are
// interfaces, as an answer's data holds them, so that a read does not allocate
// them anew.
type tokenAnswer struct {
	accessToken, tokenType, scope, expiresAt, expiresAtSeconds, rotationPeriod, lastVaultRotation any
}

func newCachedToken(tok *token, read *atomic.Bool, g *grant) *cachedToken {
	role := &g.role.entry
	lifetime := effectiveLifetime(tok.told, role.MaxTTL)
	endsAt := tok.mintedAt.Add(lifetime)
	schedule := newSchedule(lifetime, role.MinTTL)
	return &cachedToken{
		token:    tok,
		read:     read,
		schedule: schedule,
		endsAt:   endsAt,
		assumed:  tok.told <= 0 && role.MaxTTL <= 0,
		missing:  missingScopes(g.scopes, tok.scope),
		common: tokenAnswer{
			accessToken:       tok.accessToken,
			tokenType:         tok.tokenType,
			scope:             tok.scope,
			expiresAt:         formatTime(endsAt),
			expiresAtSeconds:  endsAt.Unix(),
			rotationPeriod:    schedule.rotationPeriod(),
			lastVaultRotation: formatTime(tok.mintedAt),
		},
	}
}

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// left is how much of the token's life is left. Both clocks are asked, and the
// one that says less is believed: the monotonic one stands still while a laptop
// sleeps, the wall clock may be set back.
func (t *cachedToken) left(now time.Time) time.Duration {
	return min(t.endsAt.Sub(now), t.endsAt.Round(0).Sub(now.Round(0)))
}

// scheduleFor is the schedule for a reader who wants minTTL, which is never
// below the role's.
func (t *cachedToken) scheduleFor(minTTL time.Duration) schedule {
	if minTTL <= t.schedule.refresh {
		return t.schedule
	}
	return newSchedule(t.schedule.lifetime, minTTL)
}

// hit serves the token if it is fresh.
func (t *cachedToken) hit(minTTL time.Duration) (served, bool) {
	schedule, left := t.scheduleFor(minTTL), t.left(time.Now())
	if schedule.phase(left) != phaseFresh {
		return served{}, false
	}
	return t.serve(schedule, left, outcomeHit), true
}

// serve hands the token out.
func (t *cachedToken) serve(schedule schedule, left time.Duration, how outcome) served {
	if !t.read.Load() { // loaded first: a write would slow all readers down
		t.read.Store(true)
	}
	answer := served{cachedToken: t, schedule: schedule, outcome: how, left: left}
	if how == outcomeStale {
		wait := staleWait(left, rand.Float64())
		answer.ttl, answer.lease = wholeSeconds(wait), wait
	} else {
		answer.ttl, answer.lease = schedule.ttl(left, rand.Float64()), schedule.lease(left)
	}
	return answer
}
