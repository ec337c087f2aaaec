// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file keeps the newest token of each role in Vault's storage, so tokens outlive the
// process and every node finds them. It knows storage and the order of writes. The cache
// decides what stands and what is newest.

const (
	tokenPrefix = "tokens/"

	// storeTimeout limits a save or a deletion that no request waits for.
	storeTimeout = 10 * time.Second

	// maxPrunedAtOnce is how many stored tokens of a config a request deletes itself. The
	// rest are deleted in the background.
	maxPrunedAtOnce = 100

	// The sweep runs every sweepEvery and pauses for sweepPause before each storage
	// operation: at most 100 operations a second.
	sweepEvery = time.Hour
	sweepPause = 11 * time.Millisecond
)

// storedToken is a token as stored at tokens/<config>/<role>.
type storedToken struct {
	AccessToken string    `json:"access_token"`
	TokenType   string    `json:"token_type"`
	Scope       string    `json:"scope,omitempty"`
	MintedAt    time.Time `json:"minted_at"`
	// ExpiresAt is when the token expires according to MojoAuth, or zero if unknown.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	// RepeatedUntil is when a token that MojoAuth returned again expires.
	RepeatedUntil time.Time `json:"repeated_until,omitzero"`

	RoleGeneration   string `json:"role_generation"`
	ConfigGeneration string `json:"config_generation"`
}

func newStoredToken(t *cachedToken, key slotKey) *storedToken {
	stored := &storedToken{
		AccessToken:      t.accessToken,
		TokenType:        t.tokenType,
		Scope:            t.scope,
		MintedAt:         t.mintedAt.UTC(),
		RepeatedUntil:    t.repeatedUntil.UTC(),
		RoleGeneration:   key.roleGeneration,
		ConfigGeneration: key.configGeneration,
	}
	if t.reported > 0 {
		stored.ExpiresAt = stored.MintedAt.Add(t.reported)
	}
	return stored
}

// restore returns the token as served for a spec, with its original times. It returns nil
// if the token has another generation, has expired, or comes from a clock too far ahead
// of this node's.
func (t *storedToken) restore(spec *spec, now time.Time, random float64) *cachedToken {
	key := spec.key()
	if t == nil || t.AccessToken == "" || t.RoleGeneration != key.roleGeneration || t.ConfigGeneration != key.configGeneration {
		return nil
	}
	tok := &token{accessToken: t.AccessToken, tokenType: t.TokenType, scope: t.Scope, mintedAt: t.MintedAt}
	if !t.ExpiresAt.IsZero() {
		tok.reported = t.ExpiresAt.Sub(t.MintedAt)
	}
	restored := &cachedToken{token: tok, use: new(atomic.Int32), repeatedUntil: t.RepeatedUntil, restored: true, draw: random}
	restored = restored.view(spec)
	if !restored.usable(now) || t.MintedAt.Sub(now) > restored.schedule.Floor {
		return nil
	}
	return restored
}

// storeKey is the storage key of a role's token.
func storeKey(config, role string) string { return tokenPrefix + config + "/" + role }

// storeOperations are the storage operations that can fail, by their names in metrics.
var storeOperations = [...]string{"load", "save", "delete", "list"}

const (
	storeLoad = iota
	storeSave
	storeDelete
	storeList
)

// tokenStore is the part of a mount's storage that holds tokens.
type tokenStore struct {
	storage   logical.Storage
	telemetry *telemetry
	logger    func() hclog.Logger

	locks keyLocks
	// failing has the operations whose last attempt failed, so an outage is one line in
	// the log.
	failing [len(storeOperations)]atomic.Bool
}

// load reads a stored token. It returns nil if there is none or it cannot be read.
func (t *tokenStore) load(ctx context.Context, key string) (*storedToken, error) {
	entry, err := t.storage.Get(ctx, key)
	if t.account(storeLoad, err) != nil || entry == nil {
		return nil, err
	}
	stored := new(storedToken)
	if err := entry.DecodeJSON(stored); err != nil {
		t.logger().Warn("ignoring a stored token that cannot be decoded", "key", key, "error", err)
		return nil, nil
	}
	return stored, nil
}

// save writes the token that newest returns, or nothing if that is nil. Writes and
// deletions of one key go one after the other. save calls newest when it is its turn.
func (t *tokenStore) save(ctx context.Context, key string, newest func() *storedToken) error {
	unlock, err := t.locks.lock(ctx, key)
	if err != nil {
		return t.account(storeSave, err)
	}
	defer unlock()
	stored := newest()
	if stored == nil {
		return nil
	}
	entry, err := logical.StorageEntryJSON(key, stored)
	if err != nil {
		return err
	}
	return t.account(storeSave, t.storage.Put(ctx, entry))
}

// prune deletes a stored token if it exists and does not stand.
func (t *tokenStore) prune(ctx context.Context, storage logical.Storage, key string, stands func(*storedToken) (bool, error)) error {
	unlock, err := t.locks.lock(ctx, key)
	if err != nil {
		return t.account(storeDelete, err)
	}
	defer unlock()
	entry, err := storage.Get(ctx, key)
	if t.account(storeLoad, err) != nil || entry == nil {
		return err
	}
	var stored storedToken
	if entry.DecodeJSON(&stored) == nil {
		if ok, err := stands(&stored); ok || err != nil {
			return err
		}
	}
	return t.account(storeDelete, storage.Delete(ctx, key))
}

// list lists the names stored below a key.
func (t *tokenStore) list(ctx context.Context, storage logical.Storage, prefix string) ([]string, error) {
	names, err := storage.List(ctx, prefix)
	return names, t.account(storeList, err)
}

// account counts a failure, logs the first one, and returns err.
func (t *tokenStore) account(operation int, err error) error {
	switch {
	case err == nil:
		t.failing[operation].Store(false)
	case errors.Is(err, context.Canceled): // the caller left
	default:
		t.telemetry.storeErrors[operation].Add(1)
		if !t.failing[operation].Swap(true) {
			t.logger().Warn("cannot use stored tokens; reads continue without them", "operation", storeOperations[operation], "error", err)
		}
	}
	return err
}

// keyLocks has one lock for each key that is in use.
type keyLocks struct {
	mu sync.Mutex // never held across I/O
	of map[string]*keyLock
}

type keyLock struct {
	place chan struct{} // has room for one
	users int           // number of holders and waiters
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.of == nil {
		k.of = make(map[string]*keyLock)
	}
	l := k.of[key]
	if l == nil {
		l = &keyLock{place: make(chan struct{}, 1)}
		k.of[key] = l
	}
	l.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.of, key)
		}
	}
	select {
	case l.place <- struct{}{}:
		return func() { <-l.place; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// names returns what follows prefix in the keys that are in use.
func (k *keyLocks) names(prefix string) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []string
	for key := range k.of {
		if name, ok := strings.CutPrefix(key, prefix); ok {
			names = append(names, name)
		}
	}
	return names
}

// background limits storage work that no request waits for. Closing waits for it.
func (c *tokenCache) background() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(c.ctx), storeTimeout)
}

// save stores the slot's token unless it is stored already or no longer stands.
func (c *tokenCache) save(ctx context.Context, s *slot) {
	if c.standby || s.key.narrowed != "" {
		return
	}
	// A failure is recorded and does no harm: the next mint saves its token.
	_ = c.store.save(ctx, storeKey(s.key.config, s.key.role), func() *storedToken {
		if spec, err := c.standingSpec(ctx, c.storage, s.key.config, s.key.role); err != nil || spec == nil || spec.key() != s.key {
			return nil
		}
		return s.toSave()
	})
}

// standingSpec returns what tokens of a role with a config are requested for now, or nil
// if none may be stored. A role or config that cannot be read does not stand: it must be
// written again, and then gets a new generation.
func (c *tokenCache) standingSpec(ctx context.Context, storage logical.Storage, configName, roleName string) (*spec, error) {
	role, err := c.roles.standing(ctx, storage, roleName)
	if err != nil || role == nil || role.entry.Config != configName {
		return nil, unlessUnreadable(err)
	}
	config, err := c.configs.standing(ctx, storage, configName)
	if err != nil || config == nil || !config.entry.persistsTokens() {
		return nil, unlessUnreadable(err)
	}
	return &spec{role: role, config: config, scopes: role.entry.Scopes}, nil
}

func unlessUnreadable(err error) error {
	var broken *unreadable
	if errors.As(err, &broken) {
		return nil
	}
	return err
}

// prune deletes the stored token of a role with a config unless the token stands and may
// be served.
func (c *tokenCache) prune(ctx context.Context, storage logical.Storage, config, role string) error {
	return c.store.prune(ctx, storage, storeKey(config, role), func(stored *storedToken) (bool, error) {
		spec, err := c.standingSpec(ctx, storage, config, role)
		if err != nil || spec == nil {
			return false, err
		}
		// A token from a clock ahead of this node's may be served later.
		return stored.restore(spec, latest(time.Now(), stored.MintedAt), 0) != nil, nil
	})
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// pruneConfig deletes the stored tokens of a config that do not stand. If there are many,
// it deletes most of them in the background.
func (c *tokenCache) pruneConfig(ctx context.Context, config string) error {
	if c.standby {
		return nil
	}
	// A token that is being written may not be listed yet.
	roles := c.store.locks.names(storeKey(config, ""))
	listed, err := c.store.list(ctx, c.storage, storeKey(config, ""))
	if err != nil {
		return err
	}
	roles = append(roles, listed...)
	slices.Sort(roles)
	roles = slices.Compact(roles)
	now, later := roles[:min(len(roles), maxPrunedAtOnce)], roles[min(len(roles), maxPrunedAtOnce):]
	var failed error
	for _, role := range now {
		failed = errors.Join(failed, c.prune(ctx, c.storage, config, role))
	}
	if len(later) > 0 {
		c.spawn(func() { c.sweepRoles(c.pacedStorage(), config, later) })
	}
	return failed
}

// pruneRole deletes the stored token of a role that was written, with its previous
// config, unless the token stands.
func (c *tokenCache) pruneRole(ctx context.Context, config, role string) error {
	if c.standby {
		return nil
	}
	return c.prune(ctx, c.storage, config, role)
}

// sweep deletes stored tokens in the background that do not stand: expired ones, and
// those that a process left when it died between two writes. One sweep runs at a time,
// and starts no sooner than sweepEvery after the last.
func (c *tokenCache) sweep() {
	now := time.Now()
	c.sweeping.mu.Lock()
	defer c.sweeping.mu.Unlock()
	if c.standby || c.sweeping.running || now.Sub(c.sweeping.began) < sweepEvery {
		return
	}
	c.sweeping.running = c.spawn(func() {
		c.sweepAll(c.pacedStorage())
		c.sweeping.mu.Lock()
		defer c.sweeping.mu.Unlock()
		c.sweeping.running = false
	})
	if c.sweeping.running {
		c.sweeping.began = now
	}
}

// sweeping is the state of the sweep.
type sweeping struct {
	mu      sync.Mutex // never held across I/O
	running bool
	began   time.Time // zero if never
}

func (c *tokenCache) sweepAll(storage logical.Storage) {
	configs, err := c.store.list(c.ctx, storage, tokenPrefix)
	if err != nil {
		return
	}
	for _, config := range configs {
		roles, err := c.store.list(c.ctx, storage, tokenPrefix+config)
		if err != nil {
			continue
		}
		c.sweepRoles(storage, strings.TrimSuffix(config, "/"), roles)
	}
}

func (c *tokenCache) sweepRoles(storage logical.Storage, config string, roles []string) {
	for _, role := range roles {
		if c.prune(c.ctx, storage, config, role) != nil && c.ctx.Err() != nil {
			return
		}
	}
}

// pacedStorage is the mount's storage for work that must not slow down requests.
func (c *tokenCache) pacedStorage() logical.Storage { return &pacedStorage{Storage: c.storage} }

// pacedStorage pauses before each operation.
type pacedStorage struct{ logical.Storage }

func (p *pacedStorage) pause(ctx context.Context) error {
	select {
	case <-time.After(sweepPause):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *pacedStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := p.pause(ctx); err != nil {
		return nil, err
	}
	return p.Storage.Get(ctx, key)
}

func (p *pacedStorage) List(ctx context.Context, prefix string) ([]string, error) {
	if err := p.pause(ctx); err != nil {
		return nil, err
	}
	return p.Storage.List(ctx, prefix)
}

func (p *pacedStorage) Delete(ctx context.Context, key string) error {
	if err := p.pause(ctx); err != nil {
		return err
	}
	return p.Storage.Delete(ctx, key)
}
