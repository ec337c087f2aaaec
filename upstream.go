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

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file is a token endpoint as one config sees it: the client that asks it, and
// what its failures mean for those who want to ask it too.

// minter asks MojoAuth for tokens with one config: a tokenClient.
type minter interface {
	mint(ctx context.Context, req tokenRequest, leave departures) (*token, error)
}

// clientFactory makes the minter of a config.
type clientFactory func(*configEntry) (minter, error)

// precedence is for how long, after a back-off, the key that failed leaves the first
// try to others, if they were turned away that recently.
const precedence = 2 * time.Second

// errBackoff ends the waiting of mints when a back-off of their config begins.
var errBackoff = errors.New("the config is backed off")

// upstream is the token endpoint of one version of a config. A write of the config
// makes a new one, so that failures of the old are forgotten with it.
type upstream struct {
	config    *held[configEntry]
	gate      *gate.Gate
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	random    func() float64

	// standing ends when the config is written, and retire ends it.
	standing context.Context
	retire   context.CancelCauseFunc

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
	// over, and closed when it ends. probing is its turn.
	probe   chan struct{}
	probing *gate.Turn
	// open ends when a back-off begins, and shut ends it.
	open context.Context
	shut context.CancelCauseFunc
}

// newUpstream makes the upstream of a config, which goes with the cache.
func (c *tokenCache) newUpstream(config *held[configEntry]) *upstream {
	u := &upstream{
		config:    config,
		gate:      c.gates.enter(config.name, &config.entry),
		newClient: c.newClient,
		telemetry: c.telemetry,
		logger:    c.logger,
		random:    c.random,
	}
	u.standing, u.retire = context.WithCancelCause(c.ctx)
	u.open, u.shut = context.WithCancelCause(u.standing)
	return u
}

// unavailable is why a read got no new token: what failed, and when the engine
// tries again by itself or for a reader.
type unavailable struct {
	*mintError
	config string
	next   time.Time // zero when nothing is in the way of the next read's try

	// probe is closed when the try ends that is under way, nil when there is none.
	probe <-chan struct{}
	turn  *gate.Turn // of that try
	up    *upstream  // that it asks
	// yields is set for the key that failed last, when others were turned away since.
	yields bool
	// unasked is set when MojoAuth was not asked: another mint's failure came first.
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
		return text + ". The next attempt is in progress"
	case u.next.IsZero():
		return text
	}
	// Rounded up, so that a reader who waits that long doesn't come too early.
	wait := max(0, time.Until(u.next)+time.Second-1).Truncate(time.Second)
	return text + fmt.Sprintf(". The next attempt is at %s, in %s", formatTime(u.next.Add(time.Second-1)), wait)
}

func (u *unavailable) Unwrap() error { return u.mintError }

// noTurnError is why there is no answer of MojoAuth's: the request had no turn at the
// config's gate, or had it late.
type noTurnError struct {
	*gate.NoTurnError
	config string
	asked  bool // it had it late
}

// Error names the config and says how crowded the gate is, and when to come back.
func (n *noTurnError) Error() string { return fmt.Sprintf("config %q: %s", n.config, n.reason()) }

// reason is the error without the config's name.
func (n *noTurnError) reason() string {
	var why string
	switch {
	case n.asked:
		why = "the token request got its turn late, and MojoAuth has not answered yet"
	case n.Reason == gate.RetryAfter:
		why = "the Retry-After of MojoAuth is longer than this request can wait"
	case n.Reason == gate.Crowded:
		why = "too many token requests that are more urgent are waiting"
	default:
		why = "the token request got no turn in time"
	}
	throttles := ""
	if n.Throttled {
		throttles = "; MojoAuth is throttling with HTTP 429"
	}
	return fmt.Sprintf("%s (%d waiting, pace %.3g per second%s). Try again in %s", why, n.Waiting, n.Pace, throttles, n.ComeBack)
}

func (n *noTurnError) Unwrap() error { return n.NoTurnError }

// leave is permission to mint once. It has to be given back: settle.
type leave struct {
	key   slotKey
	probe bool
	now   bool // it is a rotation, which ignores a back-off
}

// admit gives leave to mint for a key, or says why not. After a failure one mint
// goes ahead to find out whether the trouble is over, and the others wait for it.
// The error is an *unavailable.
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
			refusal.probe, refusal.turn, refusal.up = u.probe, u.probing, u
			return leave{}, refusal
		case key == u.failed && now.Before(first) && now.Sub(u.turnedAway) < precedence:
			return leave{}, u.remembered(key, first)
		}
		l.probe = true
		u.probe, u.probing = make(chan struct{}), u.gate.Turn(key.role, key.kind())
	}
	return l, nil
}

// turn is the turn of a mint at the gate, which waits as long as the config stands and,
// unless the leave ignores that, no back-off begins.
func (u *upstream) turn(l leave, useless func() error) *turn {
	u.mu.Lock()
	defer u.mu.Unlock()
	t := &turn{useless: useless, account: func(how gate.Answer) { u.telemetry.requested(u.config.name, how) }}
	waiting := u.open
	switch {
	case l.now:
		t.Turn, waiting = u.gate.Turn(l.key.role, gate.Rotation), u.standing
	case l.probe:
		t.Turn = u.probing
	default:
		t.Turn = u.gate.Turn(l.key.role, l.key.kind())
	}
	t.waiting, t.interrupt = context.WithCancelCause(waiting)
	return t
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

// mint asks for one token and accounts for how it went. The error is an *unavailable when
// MojoAuth was asked or another mint's failure came first; else a *noTurnError, one of
// turn.wait, or the end of ctx.
func (u *upstream) mint(ctx context.Context, f *flight) (*cachedToken, error) {
	started := time.Now()
	tok, failed, err := u.ask(ctx, f)
	if err != nil {
		u.settle(f.leave, nil)
		return nil, u.unasked(err)
	}
	if left := f.turn.left.Load(); left != nil {
		started = *left
	}
	u.telemetry.minted(u.config.name, time.Since(started), failed)

	var (
		refusal       *unavailable
		before, after *mintError
	)
	u.settle(f.leave, func() {
		before = u.backoff.last
		refusal = u.judge(f, failed, started)
		after = u.backoff.last
	})

	// Logged without the lock: the log's reader may be slow.
	log := u.logger()
	if before != nil && after == nil {
		log.Info("minting succeeds again", "config", u.config.name, "role", f.spec.role.name)
	}
	if failed == nil {
		log.Debug("minted a token", "config", u.config.name, "role", f.spec.role.name, "duration", time.Since(started), "lifetime", tok.told)
		return tok, nil
	}
	if !refusal.keyOnly && (before == nil || before.class != failed.class) {
		u.log(f.spec, failed)
	}
	return nil, refusal
}

// judge takes in how a mint ended whose first request left at that time, without a
// failure if failed is nil: whether it concerns the whole config, or only the key. The
// caller holds u.mu.
func (u *upstream) judge(f *flight, failed *mintError, started time.Time) *unavailable {
	now := time.Now()
	refusal := &unavailable{mintError: failed, config: u.config.name}
	before := u.backoff.last
	switch {
	case failed == nil:
		u.succeeded = now
		u.backoff.succeed(started)
		return nil
	case failed.concernsRequest():
		refusal.keyOnly, refusal.alone = true, f.past.isAlone(u.succeeded)
		if before != nil && before.class == classClientRefused {
			// The client was accepted. Whether a server in trouble is well again, this
			// doesn't show.
			u.backoff.succeed(started)
		}
	case f.past.isAlone(u.succeeded):
		refusal.keyOnly, refusal.alone = true, true
	case started.Before(u.succeeded): // others came through meanwhile: no news
		refusal.keyOnly = true
	default:
		u.backoff.fail(failed, started, now, u.random())
		u.failed, u.turnedAway = f.leave.key, time.Time{}
		refusal.next = u.backoff.until
		u.shut(errBackoff)
		u.open, u.shut = context.WithCancelCause(u.standing)
	}
	return refusal
}

// unasked is the error of a mint without a request.
func (u *upstream) unasked(err error) error {
	var late *gate.NoTurnError
	switch {
	case errors.As(err, &late):
		u.telemetry.noTurn(u.config.name)
		return &noTurnError{NoTurnError: late, config: u.config.name}
	case errors.Is(err, gate.ErrAbandoned):
		u.telemetry.noTurn(u.config.name)
	case errors.Is(err, gate.ErrClosed), errors.Is(err, errBackoff):
		return errOutdated
	}
	return err
}

// ask makes the request. failed is how it ended; err is why there was none.
func (u *upstream) ask(ctx context.Context, f *flight) (tok *cachedToken, failed *mintError, err error) {
	client, err := u.minter()
	if err != nil {
		return nil, &mintError{class: classInternal, reason: err.Error()}, nil
	}
	req := f.spec.request()
	req.retries = u.config.entry.MaxRetries
	if f.leave.probe {
		req.retries = 0 // a server in trouble gets one request, not three
	}
	minted, err := client.mint(ctx, req, f.turn)
	var refusal *unavailable // another mint's failure
	switch {
	case err == nil:
	case !errors.As(err, &refusal) && errors.As(err, &failed):
		return nil, failed, nil
	default:
		return nil, nil, err
	}
	tok = newCachedToken(minted, f.spec, u.random())
	if tok.phase(time.Now()) == lifetime.Spent {
		return nil, expiredOnArrival(tok), nil
	}
	return tok, nil, nil
}

// expiredOnArrival is the failure of a mint whose token may not be served any more.
func expiredOnArrival(t *cachedToken) *mintError {
	return &mintError{
		class:  classExpiredOnArrival,
		reason: fmt.Sprintf("its lifetime is %s, and it can be served only until %s before it expires", t.schedule.Lifetime, t.schedule.Floor),
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
		u.probe, u.probing = nil, nil
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
	u.logger().Log(level, "failed to mint a token", "config", u.config.name, "role", spec.role.name, "class", failed.class, "error", failed.Error())
}
