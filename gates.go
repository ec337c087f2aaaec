// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// This file puts the gate between a config and its token endpoint: which gate a request
// passes, and when waiting there has become useless.

// gates has the gate of each config in use. A gate keeps its pace and its Retry-After
// when its config is written, unless the config names another endpoint.
type gates struct {
	mu sync.Mutex // never held across I/O
	of map[string]configGate
	// tried is the gate that the last verification passed, if no config in use had it.
	// The first mint of the verified config continues with it.
	tried     configGate
	triedName string
}

type configGate struct {
	*gate.Gate
	tokenURL string
}

func newGates() gates { return gates{of: make(map[string]configGate)} }

// enter returns the gate of a config. It creates one if there is none, or if the config
// names another endpoint.
func (g *gates) enter(name string, config *configEntry) *gate.Gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	known, ok := g.of[name]
	if ok && known.tokenURL == config.TokenURL {
		known.SetLimit(config.requestsPerSecond()) // a reader may bring the limit first
		return known.Gate
	}
	if ok {
		known.Close()
	}
	g.of[name] = g.try(name, config)
	if g.triedName == name {
		g.tried = configGate{}
	}
	return g.of[name].Gate
}

// tryOut returns the gate for a config that may never be saved.
func (g *gates) tryOut(name string, config *configEntry) *gate.Gate {
	g.mu.Lock()
	defer g.mu.Unlock()
	if known, ok := g.of[name]; ok && known.tokenURL == config.TokenURL {
		return known.Gate
	}
	g.tried, g.triedName = g.try(name, config), name
	return g.tried.Gate
}

// try returns the gate of the last verification if that was of this endpoint, otherwise a
// new one. The caller holds g.mu.
func (g *gates) try(name string, config *configEntry) configGate {
	if g.tried.Gate != nil && g.triedName == name && g.tried.tokenURL == config.TokenURL {
		g.tried.SetLimit(config.requestsPerSecond())
		return g.tried
	}
	return configGate{gate.New(config.requestsPerSecond(), nil), config.TokenURL}
}

// written adapts the gate of a config after a write. config is nil if the config was
// deleted.
func (g *gates) written(name string, config *held[configEntry]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	known, ok := g.of[name]
	switch {
	case !ok:
	case config == nil || config.entry.TokenURL != known.tokenURL:
		known.Close()
		delete(g.of, name)
	default:
		known.SetLimit(config.entry.requestsPerSecond())
	}
}

// stats returns the state of every gate, by config.
func (g *gates) stats() map[string]gate.Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	stats := make(map[string]gate.Stats, len(g.of))
	for name, known := range g.of {
		stats[name] = known.Stats()
	}
	return stats
}

// close turns away everyone, now and later.
func (g *gates) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, known := range g.of {
		known.Close()
	}
	if g.tried.Gate != nil {
		g.tried.Close()
	}
}

// turn is one mint's turn at its config's gate: the departures of its requests.
type turn struct {
	*gate.Turn
	// waiting is canceled by interrupt when waiting has become useless. That does not
	// cancel a request that has left.
	waiting   context.Context
	interrupt context.CancelCauseFunc
	// useless, if set, says why the request should not leave even if it may; it returns
	// nil if it should.
	useless func() error
	account func(gate.Answer)

	pass *gate.Pass
	// left is when the first request left: nil before, and after a 429.
	left atomic.Pointer[time.Time]
}

// wait waits until a request may leave. The error is one of gate.Turn.Wait, of useless,
// or the cause of waiting's end.
func (t *turn) wait(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(t.waiting, func() { cancel(context.Cause(t.waiting)) })()

	pass, err := t.Wait(ctx)
	if errors.Is(err, context.Canceled) {
		err = context.Cause(ctx)
	}
	if why := t.whyUseless(); why != nil {
		if pass != nil {
			pass.Done(gate.NoAnswer, 0)
		}
		return why
	}
	if err != nil {
		return err
	}
	t.pass = pass
	if t.left.Load() == nil {
		now := time.Now()
		t.left.Store(&now)
	}
	return nil
}

func (t *turn) whyUseless() error {
	if t.useless == nil {
		return nil
	}
	return t.useless()
}

func (t *turn) answered(how gate.Answer, retryAfter time.Duration) {
	t.pass.Done(how, retryAfter)
	t.account(how)
	if how == gate.Throttled {
		t.left.Store(nil)
	}
}
