// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file is how a node serves reads that may not write: a performance standby of
// Vault Enterprise, or a standby of OpenBao. All nodes of a cluster share one token per
// role, and the active node mints it. A standby serves what it holds or finds in storage.
// For the rest it answers errForward.

// errForward has Vault and OpenBao send a request to the active node. Only the bare error
// does, and only on a standby.
var errForward = logical.ErrReadOnly

// lookPause is how often, at most, a standby looks in storage for the successor of a due
// token. One reader is forwarded each time.
const lookPause = 5 * time.Second

// isStandby reports whether a node in that replication state may not write.
func isStandby(state consts.ReplicationState) bool {
	return state.HasState(consts.ReplicationPerformanceStandby | consts.ReplicationDRSecondary)
}

// relies reports whether this node has the active one mint the tokens of a spec.
func (c *tokenCache) relies(spec *spec) bool {
	return c.standby && spec != nil && spec.config.entry.persistsTokens()
}

// forwards reports whether only the active node may answer a read, whatever this one
// holds: it would write a lease, or no token in storage is what the reader wants.
func (c *tokenCache) forwards(q *query) bool {
	return c.standby && q.role.entry.GenerateLease ||
		c.relies(&q.spec) && (q.narrowed != "" || !q.mintedAfter.IsZero())
}

// relay answers a reader on a standby who found no fresh token in memory. The error is
// errForward, errOutdated, errClosed, or why ctx ended.
func (s *slot) relay(ctx context.Context, q *query) (served, error) {
	l, old, mine, err := s.consult(q)
	if err != nil {
		return served{}, err
	}
	if l != nil {
		if err := s.waitForLook(ctx, l); err != nil {
			return served{}, err
		}
	}
	// The token is taken first: one that comes later, because another node wrote it, is not
	// served before it is announced.
	tok := s.held(&q.spec)
	if s.announces() || tok == nil {
		return served{}, errForward
	}
	if answer, ok := tok.hit(q, s.cache.random); ok {
		if !tok.same(old) {
			answer.outcome = outcomeRestored
		}
		return answer, nil
	}
	if tok.phase(time.Now()) == lifetime.Due && !mine {
		if answer, ok := tok.stale(q, nil, s.cache.random); ok {
			return answer, nil
		}
	}
	return served{}, errForward
}

// consult decides whether a reader on a standby has to wait for a look-up in storage,
// and which. Among the readers of a due token it is one in lookPause, whose own it is.
func (s *slot) consult(q *query) (l *look, old *cachedToken, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.freed {
		return nil, nil, false, errOutdated
	}
	now := time.Now()
	s.spec = &q.spec
	old = s.held(&q.spec)
	if s.announce() {
		return nil, nil, false, errForward
	}
	switch {
	case s.doubted || !old.usable(now):
	case old.phase(now) == lifetime.Due && now.Sub(s.lookedAt) >= lookPause:
		mine = true
	default:
		return nil, old, false, nil
	}
	if l = s.look; l == nil {
		l = s.startLook(s.spec, false)
	}
	if l == nil {
		return nil, nil, false, errClosed
	}
	s.lookedAt = now
	return l, old, mine, nil
}

// announces reports whether the caller has to be the one who tells the active node that
// the token is read: that node renews ahead only what it saw read.
func (s *slot) announces() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.announce()
}

// announce is announces for a caller who holds s.mu.
func (s *slot) announce() bool {
	if !s.unannounced {
		return false
	}
	s.unannounced = false
	s.unsure.Store(s.doubted)
	return true
}

// tokenWritten has the slot of a role with a config load what another node stored.
func (c *tokenCache) tokenWritten(config, role string) {
	for _, s := range c.slotsOf(role) {
		if s.key.config == config && s.key.narrowed == "" {
			s.reload()
		}
	}
}

func (s *slot) reload() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.freed || !s.cache.relies(s.spec):
	case s.look != nil:
		s.look.again = true
	default:
		s.startLook(s.spec, true)
	}
}

// doubt has roles, configs and tokens compared with storage at their next read. Nothing
// tells a standby of a restored snapshot.
func (c *tokenCache) doubt() {
	c.roles.doubt()
	c.configs.doubt()
	for _, s := range c.all() {
		s.doubt()
	}
}

func (s *slot) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cache.relies(s.spec) && s.token.Load() != nil {
		s.doubted = true
		s.unsure.Store(true)
	}
}
