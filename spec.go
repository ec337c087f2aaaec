// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// spec is what a token is requested for: a role and its config as they stand, and
// the role's scopes or a subset of them. It is shared and must not be changed.
type spec struct {
	role   *held[roleEntry]
	config *held[configEntry]
	scopes []string
	// narrowed identifies scopes when they are fewer than the role's: sorted
	// and joined. "" stands for all of them.
	narrowed string
}

// query is what a read of creds asks for: a spec, and how fresh the token has to be.
type query struct {
	spec
	minTTL      time.Duration // the token should have left; not below the role's
	mintedAfter time.Time     // the token should have been, in whole seconds; zero if it may be any
	arrived     time.Time     // when the read found no token that would do
}

// slotKey names all that a token depends on. A write that changes what tokens are
// good for makes a new generation, and so another key.
type slotKey struct {
	role, roleGeneration     string
	config, configGeneration string
	narrowed                 string
}

// kind is what place at the gate a mint for the key has.
func (k slotKey) kind() gate.Kind {
	if k.narrowed != "" {
		return gate.Narrowed
	}
	return gate.Whole
}

func (s *spec) key() slotKey {
	return slotKey{
		role:             s.role.name,
		roleGeneration:   s.role.entry.TokenGeneration,
		config:           s.config.name,
		configGeneration: s.config.entry.TokenGeneration,
		narrowed:         s.narrowed,
	}
}

func (s *spec) request() tokenRequest {
	return tokenRequest{audience: s.role.entry.Audience, scopes: s.scopes, extra: s.role.entry.ExtraParams}
}
