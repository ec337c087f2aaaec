// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file is a token endpoint as one config sees it: the client that asks it,
// and whether it may be asked just now.

// minter asks MojoAuth for tokens with one config: a tokenClient.
type minter interface {
	mint(ctx context.Context, req tokenRequest) (*token, error)
}

// clientFactory makes the minter of a config.
type clientFactory func(*configEntry) (minter, error)

const (
	// maxNarrowedMints bounds the mints for narrowed scopes that are under way
	// with one config, so that readers who go through subsets leave room for others.
	maxNarrowedMints = 64

	// precedence is for how long, after a back-off, the key that failed leaves the
	// first try to others, if they were turned away that recently.
	precedence = 2 * time.Second
)

// upstream is the token endpoint of one version of a config. A write of the config
// makes a new one, so that failures of the old are forgotten with it.
type upstream struct {
	config    *held[configEntry]
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	random    func() float64

	making sync.Mutex // held while the client is made
	client minter     // nil before the first mint

	mu      sync.Mutex // never held across I/O
	backoff backoff    // of failures that concern the whole config
	// failed is the key whose mint failed last, and turnedAway is when another key was
	// turned away since.
	failed     slotKey
	turnedAway time.Time
	// succeeded is when the last token came.
	succeeded time.Time
	// probe is set while a mint is under way that finds out whether the trouble is
	// over, and closed when it ends.
	probe chan struct{}
	// narrowed counts the mints for narrowed scopes that are under way.
	narrowed int
}

// unavailable is why a read got no new token: what failed, and when the engine
// tries again by itself or for a reader.
type unavailable struct {
	*mintError
	config string
	next   time.Time // zero when nothing is in the way of the next read's try

	// probe is closed when the try ends that is under way, nil when there is none.
	probe <-chan struct{}
	// yields is set for the key that failed last, when others were turned away since.
	yields bool
	// unasked is set when a mint ended before MojoAuth was asked.
	unasked bool
	// keyOnly is set when the failure backs off no other key of the config, and
	// alone when that is because the key fails while others succeed.
	keyOnly, alone bool
}

// history is what is known of a key's failures since its last success.
type history struct {
	failedAt time.Time // zero when there was none
	// alone is set once a failure was followed by another key's success: further
	// ones say nothing about the others.
	alone bool
}

// isAlone reports whether the key fails alone, when the last success of any key was
// at that time.
func (h history) isAlone(succeeded time.Time) bool {
	return h.alone || !h.failedAt.IsZero() && h.failedAt.Before(succeeded)
}

// Error names the config and says when the next try is.
func (u *unavailable) Error() string {
	text := fmt.Sprintf("config %q: %s", u.config, u.mintError)
	switch {
	case u.probe != nil:
		return text + ". The next try is under way"
	case u.next.IsZero():
		return text
	}
	// Rounded up, so that a reader who waits that long doesn't come too early.
	wait := max(0, time.Until(u.next)+time.Second-1).Truncate(time.Second)
	return text + fmt.Sprintf(". The next try is at %s, in %s", formatTime(u.next.Add(time.Second-1)), wait)
}

func (u *unavailable) Unwrap() error { return u.mintError }

// crowded is for a read of narrowed scopes while too many others are minted.
type crowded struct{ config string }

func (c *crowded) Error() string {
	return fmt.Sprintf("config %q: %d tokens for narrowed scopes are being minted already. Read again in a second, or omit scopes", c.config, maxNarrowedMints)
}

// leave is permission to mint once. It has to be given back: settle.
type leave struct {
	key   slotKey
	probe bool
	now   bool // a back-off is ignored
}

// admit gives leave to mint for a key, or says why not. After a failure one mint
// goes ahead to find out whether the trouble is over, and the others wait for it.
// The error is an *unavailable or a *crowded.
func (u *upstream) admit(key slotKey, now time.Time) (leave, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := leave{key: key}
	if u.backoff.failures > 0 {
		if key != u.failed && (u.backoff.blocks(now) || u.probe != nil) {
			u.turnedAway = now
		}
		switch first := u.backoff.until.Add(precedence); {
		case u.backoff.blocks(now):
			return leave{}, u.remembered(key, u.backoff.until)
		case u.probe != nil:
			refusal := u.remembered(key, time.Time{})
			refusal.probe = u.probe
			return leave{}, refusal
		case key == u.failed && now.Before(first) && now.Sub(u.turnedAway) < precedence:
			return leave{}, u.remembered(key, first)
		}
		l.probe = true
	}
	if key.narrowed != "" {
		if u.narrowed >= maxNarrowedMints {
			return leave{}, &crowded{config: u.config.name}
		}
		u.narrowed++
	}
	if l.probe {
		u.probe = make(chan struct{})
	}
	return l, nil
}

// admitNow gives leave to mint whatever failed before, unless MojoAuth asked to
// be left alone until later.
func (u *upstream) admitNow(key slotKey, now time.Time) (leave, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.backoff.asked && u.backoff.blocks(now) {
		return leave{}, u.remembered(key, u.backoff.until)
	}
	return leave{key: key, now: true}, nil
}

// withdrawn is why a leave is good no more: a back-off began since it was given.
func (u *upstream) withdrawn(l leave, now time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l.now || !u.backoff.blocks(now) {
		return nil
	}
	refusal := u.remembered(l.key, u.backoff.until)
	refusal.unasked = true
	return refusal
}

// remembered is the last failure, for a reader of that key: MojoAuth's words about
// one key are nobody else's business. The caller holds u.mu.
func (u *upstream) remembered(key slotKey, next time.Time) *unavailable {
	failed := u.backoff.last
	if key != u.failed {
		failed = failed.withoutDescription()
	}
	return &unavailable{mintError: failed, config: u.config.name, next: next, yields: key == u.failed && !u.turnedAway.IsZero()}
}

// nextTry is when the back-off ends that is in the way of mints.
func (u *upstream) nextTry() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.backoff.until
}

// minter is the upstream's client. It is made once, however many mints begin
// together: that may ask Vault for its version, and read the system's certificate
// authorities.
func (u *upstream) minter() (minter, error) {
	u.making.Lock()
	defer u.making.Unlock()
	if u.client == nil {
		client, err := u.newClient(&u.config.entry)
		if err != nil {
			return nil, err
		}
		u.client = client
	}
	return u.client, nil
}

// mint asks for one token and accounts for how it went. past is what the key's slot
// knows of earlier failures. The error is an *unavailable without a next try, or the
// end of ctx.
func (u *upstream) mint(ctx context.Context, l leave, spec *spec, past history) (*cachedToken, error) {
	started := time.Now()
	tok, err := u.ask(ctx, l, spec)
	var failed *mintError
	if err != nil && !errors.As(err, &failed) {
		u.settle(l, nil)
		return nil, err
	}
	u.telemetry.minted(u.config.name, time.Since(started), failed)

	refusal := &unavailable{mintError: failed, config: u.config.name}
	var before, after *mintError
	u.settle(l, func() {
		before = u.backoff.last
		defer func() { after = u.backoff.last }()
		now := time.Now()
		switch {
		case failed == nil:
			u.succeeded = now
			u.backoff.succeed(started)
			return
		case failed.concernsRequest():
			refusal.keyOnly, refusal.alone = true, past.isAlone(u.succeeded)
		case past.isAlone(u.succeeded):
			refusal.keyOnly, refusal.alone = true, true
		case started.Before(u.succeeded): // others came through meanwhile: no news
			refusal.keyOnly = true
		default:
			u.backoff.fail(failed, started, now, u.random())
			u.failed, u.turnedAway = l.key, time.Time{}
			refusal.next = u.backoff.until
		}
		if failed.concernsRequest() && before != nil && before.class == classClientRefused {
			// The client was accepted. Whether a server in trouble is well again, this
			// doesn't show.
			u.backoff.succeed(started)
		}
	})

	// Logged without the lock: the log's reader may be slow.
	log := u.logger()
	if before != nil && after == nil {
		log.Info("tokens are minted again", "config", u.config.name, "role", spec.role.name)
	}
	if failed == nil {
		log.Debug("minted a token", "config", u.config.name, "role", spec.role.name, "duration", time.Since(started), "lifetime", tok.told)
		return tok, nil
	}
	if !refusal.keyOnly && (before == nil || before.class != failed.class) {
		u.log(spec, failed)
	}
	return nil, refusal
}

// ask makes the request. The error is a *mintError or the end of ctx.
func (u *upstream) ask(ctx context.Context, l leave, spec *spec) (*cachedToken, error) {
	client, err := u.minter()
	if err != nil {
		return nil, &mintError{class: classInternal, reason: err.Error()}
	}
	req := spec.request()
	req.retries = u.config.entry.MaxRetries
	if l.probe {
		req.retries = 0 // a server in trouble gets one request, not three
	}
	tok, err := client.mint(ctx, req)
	if err != nil {
		return nil, err
	}
	cached := newCachedToken(tok, spec)
	if now := time.Now(); cached.phase(now) == lifetime.Spent {
		return nil, expiredOnArrival(cached)
	}
	return cached, nil
}

// expiredOnArrival is the failure of a mint whose token may not be served any more.
func expiredOnArrival(t *cachedToken) *mintError {
	return &mintError{
		class:  classExpiredOnArrival,
		reason: fmt.Sprintf("its lifetime is %s, and it may be served until %s before it expires", t.schedule.Lifetime, t.schedule.Floor),
	}
}

// settle gives a leave back, after account has taken in how the mint went.
func (u *upstream) settle(l leave, account func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if account != nil {
		account()
	}
	if l.probe {
		close(u.probe)
		u.probe = nil
	}
	if l.key.narrowed != "" {
		u.narrowed--
	}
}

// log tells of a failure. It is called when the class of failures changes, not
// for each: an outage is one line. What is refused to a caller who asked for fewer
// scopes than the role's is that caller's, and no warning.
func (u *upstream) log(spec *spec, failed *mintError) {
	level := hclog.Warn
	if spec.narrowed != "" && failed.concernsRequest() {
		level = hclog.Debug
	}
	u.logger().Log(level, "no token could be minted", "config", u.config.name, "role", spec.role.name, "class", failed.class, "error", failed.Error())
}
