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

// This file serves reads on a node that may not write: a performance standby of Vault
// Enterprise, or a standby of OpenBao. All nodes of a cluster share one token per role,
// and the active node mints it. A standby serves what it has in memory or finds in
// storage. For everything else it returns errForward.

// errForward makes Vault and OpenBao forward a request to the active node. It only works
// unwrapped, and only on a standby.
var errForward = logical.ErrReadOnly

// lookPause is the shortest time between two look-ups for the successor of a due token.
// One reader is forwarded each time.
const lookPause = 5 * time.Second

// isStandby reports whether a node in that replication state may not write.
func isStandby(state consts.ReplicationState) bool {
	return state.HasState(consts.ReplicationPerformanceStandby | consts.ReplicationDRSecondary)
}

// relies reports whether this node leaves the tokens of a spec to the active node.
func (c *tokenCache) relies(spec *spec) bool {
	return c.standby && spec != nil && spec.config.entry.persistsTokens()
}

// forwards reports whether only the active node can answer a read, whatever this node
// has: the read needs a lease, or no stored token can be what the reader wants.
func (c *tokenCache) forwards(q *query) bool {
	return c.standby && q.role.entry.GenerateLease ||
		c.relies(&q.spec) && (q.narrowed != "" || !q.mintedAfter.IsZero())
}

// relay answers a reader on a standby that found no fresh token in memory. The error is
// errForward, errOutdated, errClosed, or the cause of ctx's end.
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

// consult decides whether a reader on a standby must wait for a look-up in storage, and
// for which. Of a due token's readers, only one in each lookPause must; mine is set for
// it.
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

// announces reports whether the caller must let the active node know that the token is
// read: that node renews only tokens that it saw read.
func (s *slot) announces() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.announce()
}

// announce is announces for a caller that holds s.mu.
func (s *slot) announce() bool {
	if !s.unannounced {
		return false
	}
	s.unannounced = false
	s.unsure.Store(s.doubted)
	return true
}

// tokenWritten loads a token that another node stored into the slot of its role and
// config.
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

// doubt makes the next reads compare roles, configs, and tokens with storage. Nothing
// notifies a standby of a restored snapshot.
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
