// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package clients

import (
	"net/http"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
)

// TestStandby verifies that all clients can read through a standby of a three-node cluster.
// The standby serves or forwards some reads, and redirects others to the active node.
func TestStandby(t *testing.T) {
	cluster := scene.NewCluster(t, time.Hour)
	active := cluster.Active(t)
	standby := cluster.Without(active).Nodes[0]
	s := newStage(t, active, cluster.OAuth)
	each(t, "through a standby", func(t *testing.T, c *client) {
		// The standby has neither the role nor its token in memory, and the API refuses the
		// first token.
		vault, guarded := newProxy(t, standby.Address(), s.ca, nil), newProxy(t, s.api(), "", refuseFirst())
		role := s.role(t, c, "forwarded", nil)
		c.start(t, s.env(vault, role, guarded.URL, 3, 0)...).succeeds(3)
		wantNewer(t, c, vault, guarded)
		if n := mints(s.oauth, role); n != 2 {
			t.Errorf("after a refused token, through a standby: got %d mints, want 2", n)
		}

		// A node that may not forward a request returns a redirect.
		role = s.role(t, c, "redirected", nil)
		redirecting := newProxy(t, standby.Address(), s.ca, func(_ int, _ http.ResponseWriter, r *http.Request) bool {
			r.Header.Set("X-Vault-No-Request-Forwarding", "true")
			return false
		})
		p := c.start(t, s.env(redirecting, role, s.api(), 2, 0)...)
		if c.redirects {
			p.succeeds(2)
		} else {
			p.fails("307")
		}
		// Each client reads from the standby. Those that follow the redirect continue with
		// the active node.
		redirects := 0
		for _, answer := range redirecting.all() {
			t.Logf("%s %s: %d", answer.method, answer.path, answer.status)
			if answer.path == "/v1/mojoauth/creds/"+role && answer.status == http.StatusTemporaryRedirect {
				redirects++
			}
		}
		if redirects == 0 {
			t.Error("the standby redirected no read")
		}
	})
}
