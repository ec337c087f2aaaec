// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import "testing"

// Whoever comes to a gate brings the limit of the config as it knows it: a write on
// another node may reach this one by a reader first.
func TestGateGoesByTheLimitOfWhoComes(t *testing.T) {
	config := func(limit int) *configEntry {
		return &configEntry{TokenURL: "https://project.auth.mojoauth.test/", MaxRequestsPerSecond: limit}
	}
	g := newGates()
	if at := g.enter("used", config(20)).Stats(); at.Limit != 20 {
		t.Errorf("a new gate has the limit %d, want 20", at.Limit)
	}
	if at := g.enter("used", config(2)).Stats(); at.Limit != 2 {
		t.Errorf("the gate of a config with a lower limit has %d, want 2", at.Limit)
	}
	// A verification is of a config that may not be saved.
	if at := g.tryOut("used", config(1)).Stats(); at.Limit != 2 {
		t.Errorf("a verification gave a gate in use the limit %d, want 2", at.Limit)
	}
	g.tryOut("unused", config(20))
	if at := g.tryOut("unused", config(3)).Stats(); at.Limit != 3 {
		t.Errorf("the gate of another verification has the limit %d, want 3", at.Limit)
	}
	if at := g.enter("unused", config(4)).Stats(); at.Limit != 4 {
		t.Errorf("the gate of a config that was verified has the limit %d, want 4", at.Limit)
	}
}
