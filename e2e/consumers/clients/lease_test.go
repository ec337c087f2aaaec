// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package clients

import (
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// A program that uses leases reads again after the read at the end of a lease fails.
func TestLeaseWhoseReadFails(t *testing.T) {
	found := available(t)
	i := slices.IndexFunc(found, func(c *client) bool { return c.leased })
	if i < 0 {
		harness.Missing(t, "mvn is not on PATH")
	}
	c := found[i]
	const lifetime = 20 * time.Second
	world := scene.New(t, lifetime, nil)
	s := newStage(t, world.Vault, world.OAuth)
	role := s.role(t, c, "interrupted", nil)
	var reads atomic.Int32
	vault := newProxy(t, s.vault.Address(), "", func(_ int, w http.ResponseWriter, r *http.Request) bool {
		fails := r.URL.Path == "/v1/mojoauth/creds/"+role && reads.Add(1) == 2
		if fails {
			fail(w, http.StatusBadGateway)
		}
		return fails
	})
	calls := int(2 * lifetime / interval)
	c.start(t, s.env(vault, role, s.api(), calls, interval, "EXPIRY_THRESHOLD=2")...).succeeds(calls)
	all := vault.reads()
	t.Logf("%d reads, at %s", len(all), offsets(all))
	if len(all) < 3 || all[1].status != http.StatusBadGateway {
		t.Errorf("got %d reads, want at least 3 with a failed second read", len(all))
	}
}
