// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// minter asks MojoAuth for tokens with one config: a tokenClient.
type minter interface {
	mint(ctx context.Context, req tokenRequest) (*token, error)
	close()
}

// clientFactory makes the minter of a config.
type clientFactory func(*configEntry) (minter, error)

// application is one version of a config at work: its client, and whether
// MojoAuth may be asked just now. A write of the config makes a new one, so that
// what still happens to the old is forgotten with it.
type application struct {
	config    *held[configEntry]
	newClient clientFactory
	telemetry *telemetry
	logger    func() hclog.Logger

	making sync.Mutex // held while the client is made
	client minter     // nil before the first mint

	mu      sync.Mutex // never held across I/O
	backoff backoff    // of failures that concern the whole config
	// probe is set while a mint is under way that finds out whether the trouble is
	// over, and closed when it ends.
	probe chan struct{}
}

// unavailable is why a read got no new token: what failed, and when the engine
// tries again by itself or for a reader.
type unavailable struct {
	*mintError
	config string
	next   time.Time // zero when nothing is in the way of the next read's try

	// probe is closed when the try ends that is under way, nil when there is none.
	probe <-chan struct{}
}

// Error names the config and tells when the next try is.
func (u *unavailable) Error() string {
	text := fmt.Sprintf("config %q: %s", u.config, u.mintError)
	switch {
	case u.probe != nil:
		return text + ". The next try is under way"
	case u.next.IsZero():
		return text
	}
	// Rounded up, so that who waits that long does not come too early.
	wait := max(0, time.Until(u.next)+time.Second-1).Truncate(time.Second)
	return text + fmt.Sprintf(". The next try is at %s, in %s", formatTime(u.next.Add(time.Second-1)), wait)
}

func (u *unavailable) Unwrap() error { return u.mintError }

// admission is leave to mint once.
type admission struct{ probe bool }

// admit gives leave to mint, or says why not. After a failure one mint goes
// ahead to find out whether the trouble is over, and the others wait for it.
func (a *application) admit(now time.Time) (admission, *unavailable) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.backoff.failures == 0:
		return admission{}, nil
	case a.backoff.blocks(now):
		return admission{}, a.unavailable(a.backoff.last, a.backoff.until)
	case a.probe != nil:
		refusal := a.unavailable(a.backoff.last, time.Time{})
		refusal.probe = a.probe
		return admission{}, refusal
	}
	a.probe = make(chan struct{})
	return admission{probe: true}, nil
}

// admitNow gives leave to mint whatever failed before, unless MojoAuth asked to
// be left alone until later.
func (a *application) admitNow(now time.Time) *unavailable {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.backoff.asked && a.backoff.blocks(now) {
		return a.unavailable(a.backoff.last, a.backoff.until)
	}
	return nil
}

func (a *application) unavailable(failed *mintError, next time.Time) *unavailable {
	return &unavailable{mintError: failed, config: a.config.name, next: next}
}

// minter is the application's client. It is made once, however many mints begin
// together: that may ask Vault for its version, and read the system's certificate
// authorities.
func (a *application) minter() (minter, error) {
	a.making.Lock()
	defer a.making.Unlock()
	if a.client == nil {
		client, err := a.newClient(&a.config.entry)
		if err != nil {
			return nil, err
		}
		a.client = client
	}
	return a.client, nil
}

// close drops what the client keeps open. Mints that are under way go on.
func (a *application) close() {
	a.making.Lock()
	defer a.making.Unlock()
	if a.client != nil {
		a.client.close()
	}
}

// mint asks for one token and keeps account of how it went. The error is an
// *unavailable without a next try when only the request failed, the end of ctx, or
// why no client could be made.
func (a *application) mint(ctx context.Context, leave admission, g *grant) (*token, error) {
	req := g.request()
	req.retries = a.config.entry.MaxRetries
	if leave.probe {
		req.retries = 0 // a server in trouble gets one request, not three
	}
	client, err := a.minter()
	if err != nil {
		a.settle(leave, nil)
		return nil, err
	}
	started := time.Now()
	tok, err := client.mint(ctx, req)
	took := time.Since(started)

	var failed *mintError
	if err != nil && !errors.As(err, &failed) {
		a.settle(leave, nil)
		return nil, err
	}
	a.telemetry.minted(a.config.name, took, failed)
	var before, after *mintError
	var until time.Time
	a.settle(leave, func(b *backoff) {
		before = b.last
		if failed == nil || failed.concernsRequest() { // so the client and the server are well
			b.succeed(started)
		} else {
			b.fail(failed, started, time.Now(), rand.Float64())
		}
		after, until = b.last, b.until
	})

	// Logged without the lock: whoever reads the log may be slow.
	if before != nil && after == nil {
		a.logger().Info("tokens are minted again", "config", a.config.name, "role", g.role.name)
	}
	switch {
	case failed == nil:
		a.logger().Debug("minted a token", "config", a.config.name, "role", g.role.name, "duration", took, "lifetime", tok.told)
		return tok, nil
	case failed.concernsRequest(): // logged by the slot, which knows what failed before
		return nil, a.unavailable(failed, time.Time{})
	case before == nil || before.class != failed.class:
		a.log(g, failed)
	}
	return nil, a.unavailable(failed, until)
}

// settle ends a probe and takes into the back-off how a mint went.
func (a *application) settle(leave admission, account func(*backoff)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if account != nil {
		account(&a.backoff)
	}
	if leave.probe {
		close(a.probe)
		a.probe = nil
	}
}

// log tells of a failure. It is called when the class of failures changes, not
// for each: an outage is one line. What is refused to a caller who asked for fewer
// scopes than the role's is that caller's, and no warning.
func (a *application) log(g *grant, failed *mintError) {
	level := hclog.Warn
	if g.narrowed != "" && failed.concernsRequest() {
		level = hclog.Debug
	}
	a.logger().Log(level, "no token could be minted", "config", a.config.name, "role", g.role.name, "class", failed.class, "error", failed.Error())
}
