// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import "testing"

// Each caller brings its config's limit to the gate: a reader may see a write on another
// node before the cache does.
func TestGateUsesTheCallersLimit(t *testing.T) {
	config := func(limit int) *configEntry {
		return &configEntry{TokenURL: "https://project.auth.mojoauth.test/", MaxRequestsPerSecond: limit}
	}
	g := newGates()
	if at := g.enter("used", config(20)).Stats(); at.Limit != 20 {
		t.Errorf("a new gate: got limit %d, want 20", at.Limit)
	}
	if at := g.enter("used", config(2)).Stats(); at.Limit != 2 {
		t.Errorf("after a request with a lower limit: got limit %d, want 2", at.Limit)
	}
	// A config that is being verified may never be saved.
	if at := g.tryOut("used", config(1)).Stats(); at.Limit != 2 {
		t.Errorf("a verification changed the limit of a gate in use: got %d, want 2", at.Limit)
	}
	g.tryOut("unused", config(20))
	if at := g.tryOut("unused", config(3)).Stats(); at.Limit != 3 {
		t.Errorf("after another verification: got limit %d, want 3", at.Limit)
	}
	if at := g.enter("unused", config(4)).Stats(); at.Limit != 4 {
		t.Errorf("after a request of the verified config: got limit %d, want 4", at.Limit)
	}
}
