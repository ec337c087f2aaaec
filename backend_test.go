// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"go.uber.org/goleak"
)

// Rules for a mount as a whole.

func TestMain(m *testing.M) {
	// Importing the SDK starts it, once per process.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

func TestMountsShareNothing(t *testing.T) {
	bubble(t, func(a *testMount) {
		b := newTestMount(a.t)
		a.configure("app", nil)
		b.configure("app", nil)
		a.wantToken("app", 1)
		b.wantToken("app", 1) // from its own stand-in
		a.mojo.set(func(s *standIn) { s.fail = errDown })
		a.write("roles/app", map[string]any{"audience": "x"})
		if got := a.creds("app", nil); got.err == nil {
			t.Error("the first mount got a token from a server that is down")
		}
		b.wantToken("app", 1)
		a.Cleanup(context.Background())
		b.wantToken("app", 1)
		b.wantMints(1)
	})
}

// Concurrent operations of every kind, for the race detector.
func TestConcurrentOperations(t *testing.T) {
	m := newTestMount(t)
	m.mojo.set(func(s *standIn) { s.lifetime = 2 * time.Second })
	m.configure("app", map[string]any{"scopes": "a,b,c"})
	stop := time.Now().Add(time.Second)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for n := 0; time.Now().Before(stop); n++ {
				var err error
				switch {
				case i < 10:
					got := m.creds("app", map[string]any{"scopes": []string{"", "a", "a,b"}[n%3]})
					err = got.err
				case i == 10:
					_, err = m.request(logical.UpdateOperation, "roles/app", map[string]any{"audience": fmt.Sprint(n % 3)})
				case i == 11:
					_, err = m.request(logical.UpdateOperation, "config", map[string]any{"client_id": fmt.Sprint(n % 3), "verify_connection": false})
				case i == 12:
					_, err = m.request(logical.UpdateOperation, "rotate-role/app", nil)
				case i == 13:
					m.InvalidateKey(context.Background(), "config/default")
				case i == 14:
					m.InvalidateKey(context.Background(), "roles/app")
				default:
					_, err = m.request(logical.UpdateOperation, "roles/app", map[string]any{"min_ttl": n % 2})
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
