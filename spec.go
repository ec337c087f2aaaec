// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// spec is what a token is requested for: a role, its config, and the role's scopes or a
// subset of them. It is shared and must not be modified.
type spec struct {
	role   *held[roleEntry]
	config *held[configEntry]
	scopes []string
	// narrowed identifies a scope subset: the scopes sorted and joined. It is "" for all
	// scopes of the role.
	narrowed string
}

// query is a read of creds: a spec, and how fresh the token must be.
type query struct {
	spec
	minTTL      time.Duration // time the token should have left; at least the role's
	mintedAfter time.Time     // refused tokens were minted at or before this, in whole seconds; zero if none was refused
	arrived     time.Time     // when the read found no usable token
}

// slotKey names everything a token depends on. A write that changes what a token is good
// for changes a generation, and so the key.
type slotKey struct {
	role, roleGeneration     string
	config, configGeneration string
	narrowed                 string
}

// kind is the kind of place that a mint for the key takes at the gate.
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
