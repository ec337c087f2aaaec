// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

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

// slotKey names all that a token depends on. A write that changes what tokens are
// good for makes a new generation, and so another key.
type slotKey struct {
	role, roleGeneration     string
	config, configGeneration string
	narrowed                 string
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
