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

// This file is a token endpoint as one config sees it: its client, and what a failure
// means for other mints of the config.

// minter gets tokens from MojoAuth with one config: a tokenClient.
type minter interface {
	mint(ctx context.Context, req tokenRequest, leave departures) (*token, error)
}

// clientFactory creates the minter of a config.
type clientFactory func(*configEntry) (minter, error)

// precedence is how long after a back-off the key that failed last leaves the first
// attempt to other keys, if any were turned away in that time.
const precedence = 2 * time.Second

// errBackoff ends a mint's wait at the gate when its config backs off.
var errBackoff = errors.New("the config is backed off")

// upstream is the token endpoint of one version of a config. A write of the config
// creates a new upstream, so the failures of the old version are forgotten.
type upstream struct {
	config    *held[configEntry]
	gate      *gate.Gate
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger
	random    func() float64

	// standing is canceled by retire when the config is written.
	standing context.Context
	retire   context.CancelCauseFunc

	making sync.Mutex // held while the client is created
	client minter     // nil before the first mint

	mu      sync.Mutex // never held across I/O
	backoff backoff    // for failures that concern the whole config
	// failed is the key whose mint failed last. turnedAway is when another key was turned
	// away after that.
	failed     slotKey
	turnedAway time.Time
	// succeeded is when the last token arrived.
	succeeded time.Time
	// probe is set while a mint finds out whether the outage is over, and closed when it
	// ends. probing is that mint's turn.
	probe   chan struct{}
	probing *gate.Turn
	// open is canceled by shut when a back-off begins.
	open context.Context
	shut context.CancelCauseFunc
}

// newUpstream creates the upstream of a config. It ends with the cache.
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

// unavailable says why a read got no new token: what failed, and when the engine will try
// again.
type unavailable struct {
	*mintError
	config string
	next   time.Time // zero if the next read may try

	// probe is closed when the attempt in progress ends; nil if there is none.
	probe <-chan struct{}
	turn  *gate.Turn // of that attempt
	up    *upstream  // of that attempt
	// yields is set for the key that failed last if others were turned away since.
	yields bool
	// unasked is set if no request was sent because another mint had failed.
	unasked bool
	// keyOnly is set if the failure backs off no other key of the config. alone is set if
	// that is because the key fails while others succeed.
	keyOnly, alone bool
}

// history is what is known of a key's failures since its last success.
type history struct {
	failedAt time.Time // zero if it did not fail
	// alone is set once another key succeeded after this key's failure. Further failures
	// of this key then say nothing about other keys.
	alone bool
}

// isAlone reports whether the key fails alone, given when any key last succeeded.
func (h history) isAlone(succeeded time.Time) bool {
	return h.alone || !h.failedAt.IsZero() && h.failedAt.Before(succeeded)
}

// Error names the config and says when the next attempt is.
func (u *unavailable) Error() string {
	text := fmt.Sprintf("config %q: %s", u.config, u.mintError)
	switch {
	case u.probe != nil:
		return text + ". The next attempt is in progress"
	case u.next.IsZero():
		return text
	}
	// Rounded up, so a reader that waits this long is not too early.
	wait := max(0, time.Until(u.next)+time.Second-1).Truncate(time.Second)
	return text + fmt.Sprintf(". The next attempt is at %s, in %s", formatTime(u.next.Add(time.Second-1)), wait)
}

func (u *unavailable) Unwrap() error { return u.mintError }

// noTurnError says why MojoAuth gave no answer: the request got its turn at the config's
// gate too late or not at all.
type noTurnError struct {
	*gate.NoTurnError
	config string
	asked  bool // it got its turn, but late
}

// Error names the config and says how busy the gate is and when to come back.
func (n *noTurnError) Error() string { return fmt.Sprintf("config %q: %s", n.config, n.reason()) }

// reason is the error without the name of the config.
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

// leave is permission for one mint. The holder must give it back with settle.
type leave struct {
	key   slotKey
	probe bool
	now   bool // a rotation, which ignores a back-off
}

// admit grants a key leave to mint, or says why not. After a failure, one mint finds out
// whether the outage is over, and the others wait for it. The error is an *unavailable.
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

// turn creates a mint's turn at the gate. Its wait ends when the config is written or,
// unless the leave ignores back-offs, when one begins.
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

// withdrawn says why a leave is no longer valid: a back-off began after it was granted.
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

// remembered is the last failure, as a reader of the key may see it: what MojoAuth says
// about one key is not for the readers of another. The caller holds u.mu.
func (u *upstream) remembered(key slotKey, next time.Time) *unavailable {
	failed := u.backoff.last
	if key != u.failed {
		failed = failed.withoutDescription()
	}
	return &unavailable{mintError: failed, config: u.config.name, next: next, yields: key == u.failed && !u.turnedAway.IsZero()}
}

// nextTry is when the back-off that blocks mints ends.
func (u *upstream) nextTry() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.backoff.until
}

// minter returns the upstream's client. It is created once, even if many mints begin
// together: creating it may ask Vault for its version and read the system's certificate
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

// mint gets one token and records the outcome. The error is an *unavailable if MojoAuth
// was asked or another mint failed first; otherwise it is a *noTurnError, an error of
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

	// Log without the lock: the log's reader may be slow.
	log := u.logger()
	if before != nil && after == nil {
		log.Info("minting succeeds again", "config", u.config.name, "role", f.spec.role.name)
	}
	if failed == nil {
		log.Debug("minted a token", "config", u.config.name, "role", f.spec.role.name, "duration", time.Since(started), "lifetime", tok.reported)
		return tok, nil
	}
	if !refusal.keyOnly && (before == nil || before.class != failed.class) {
		u.log(f.spec, failed)
	}
	return nil, refusal
}

// judge records how a mint ended: started is when its first request left, and failed is
// nil if it succeeded. It decides whether a failure concerns the whole config or only the
// key. The caller holds u.mu.
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
			// MojoAuth accepted the client. This does not show that a server in trouble
			// has recovered.
			u.backoff.succeed(started)
		}
	case f.past.isAlone(u.succeeded):
		refusal.keyOnly, refusal.alone = true, true
	case started.Before(u.succeeded): // others have succeeded since: old news
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

// unasked returns the error of a mint that sent no request.
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

// ask sends the request. failed is the outcome; err says why none was sent.
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
	var refusal *unavailable // another mint failed
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

// expiredOnArrival is the failure of a mint whose token must no longer be served.
func expiredOnArrival(t *cachedToken) *mintError {
	return &mintError{
		class:  classExpiredOnArrival,
		reason: fmt.Sprintf("its lifetime is %s, and it can be served only until %s before it expires", t.schedule.Lifetime, t.schedule.Floor),
	}
}

// settle gives a leave back. account, if set, records the outcome of the mint.
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

// log logs a failure. It is called when the class of failures changes, not for each
// failure, so an outage is one line. A refused scope subset concerns only its reader, so
// it is not a warning.
func (u *upstream) log(spec *spec, failed *mintError) {
	level := hclog.Warn
	if spec.narrowed != "" && failed.concernsRequest() {
		level = hclog.Debug
	}
	u.logger().Log(level, "failed to mint a token", "config", u.config.name, "role", spec.role.name, "class", failed.class, "error", failed.Error())
}
