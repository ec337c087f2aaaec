// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// A reader who waits while the role, or its config, is mended gets what it asks for as
// it stands now, and not the failure of what it was.
func TestReaderWhoWaitsWhileTheRoleIsMendedGetsItsToken(t *testing.T) {
	mended := map[string]any{"scopes": "good"}
	for _, c := range []struct {
		name    string
		failure *mintError
		mend    func(m *testMount)
	}{
		{"scopes", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.write("roles/app", mended)
		}},
		{"scopes on another node", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.elsewhere(func(o *testMount) { o.write("roles/app", mended) }, "roles/app")
		}},
		{"scopes in an outage that has ended", errDown, func(m *testMount) {
			m.write("roles/app", mended)
			m.write("config", map[string]any{"verify_connection": false})
		}},
		{"role made again", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.do(logical.DeleteOperation, "roles/app", nil)
			m.write("roles/app", mended)
		}},
		{"config of the role", &mintError{class: classClientRefused, status: 401, oauthError: "invalid_client"}, func(m *testMount) {
			m.write("roles/app", map[string]any{"config": "second", "scopes": "good"})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config/second", testConfig(nil))
				m.configure("app", map[string]any{"scopes": "bad"})
				m.mojo.set(func(s *standIn) {
					s.respond = func(req tokenRequest) (time.Duration, error) {
						if req.scopes[0] == "bad" {
							return 2 * time.Second, c.failure
						}
						return 2 * time.Second, nil
					}
				})
				reader := make(chan got, 1)
				go func() { reader <- m.creds("app", nil) }()
				time.Sleep(time.Second)
				c.mend(m)
				if got := <-reader; got.err != nil {
					t.Errorf("who waited got %v, want the token of the role as it is now", got.err)
				}
			})
		})
	}
}

// What is deleted or not read any more leaves nothing in memory.
func TestNothingIsKeptOfWhatIsGone(t *testing.T) {
	empty := func(m *testMount, accounts int) {
		m.t.Helper()
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		if got := m.kept(); got.slots != 0 || got.narrowed != 0 || got.upstreams > accounts || got.accounts > accounts {
			m.t.Errorf("two days later the mount keeps %+v, want no slots, and upstreams and accounts of no more than %d configs", got, accounts)
		}
	}
	// heldUp lets the first reading of a key from storage end only after meanwhile.
	heldUp := func(m *testMount, key string, meanwhile func()) {
		m.t.Helper()
		var once sync.Once
		release, waits := make(chan struct{}), make(chan struct{})
		hook := func(got string) {
			if got == key {
				once.Do(func() { close(waits); <-release })
			}
		}
		m.storage.afterGet.Store(&hook)
		done := make(chan struct{})
		go func() { defer close(done); m.creds("app", nil) }()
		<-waits
		meanwhile()
		close(release)
		<-done
	}
	prepared := func(m *testMount) {
		m.t.Helper()
		m.elsewhere(func(o *testMount) {
			o.configure("app", nil)
			o.write("roles/second", nil)
			o.write("config/other", testConfig(nil))
		}, "config/default", "config/other", "roles/app", "roles/second")
	}

	t.Run("a role, while its config is looked up for a reader", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			prepared(m)
			heldUp(m, "config/default", func() {
				// Somebody else looks the config up later, and so has a newer one.
				news := func(string) { m.InvalidateKey(context.Background(), "config/other") }
				m.storage.afterGet.Store(&news)
				go m.creds("second", nil)
				synctest.Wait()
				m.storage.afterGet.Store(nil)
				m.do(logical.DeleteOperation, "roles/app", nil)
			})
			empty(m, 2)
		})
	})
	t.Run("a config, while it is looked up for a reader", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			prepared(m)
			heldUp(m, "config/default", func() { m.do(logical.DeleteOperation, "config", nil) })
			empty(m, 0)
		})
	})
	t.Run("a config, while its token is minted", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", map[string]any{"scopes": "a,b"})
			m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
			var wg sync.WaitGroup
			for _, query := range []map[string]any{nil, {"scopes": "a"}} {
				wg.Go(func() { m.creds("app", query) })
			}
			time.Sleep(time.Second)
			m.do(logical.DeleteOperation, "config", nil)
			wg.Wait()
			empty(m, 0)
		})
	})
	t.Run("configs and roles that another node deletes, where nobody reads status", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			for i := range 50 {
				config, role := fmt.Sprintf("config/c%d", i), fmt.Sprintf("roles/r%d", i)
				m.elsewhere(func(o *testMount) {
					o.write(config, testConfig(nil))
					o.write(role, map[string]any{"config": fmt.Sprintf("c%d", i), "scopes": "a,b"})
				}, config, role)
				m.creds(fmt.Sprintf("r%d", i), nil)
				m.creds(fmt.Sprintf("r%d", i), map[string]any{"scopes": "a"})
				m.elsewhere(func(o *testMount) {
					o.do(logical.DeleteOperation, role, nil)
					o.do(logical.DeleteOperation, config, nil)
				}, role, config)
			}
			empty(m, 0)
			if got := m.read("status")["mints"]; got != int64(100) {
				t.Errorf("mints: got %v, want 100: the mount's totals outlive the configs", got)
			}
		})
	})
}

// Writing a role concerns that role. What it costs must not grow with the number of
// others that are held: here in bytes, which are the same in every run.
func TestWritingARoleDoesNotGoThroughAllRoles(t *testing.T) {
	m := newTestMount(t)
	m.write("config", testConfig(nil))
	scopes := manyScopes(4)
	n := 0
	add := func(upTo int) {
		for ; n < upTo; n++ {
			name := fmt.Sprintf("r%d", n)
			m.write("roles/"+name, map[string]any{"scopes": scopes})
			if got := m.creds(name, nil); got.err != nil {
				t.Fatal(got.err)
			}
		}
	}
	// cost is the fewest bytes that a write of a role took.
	cost := func(data func(i int) map[string]any) uint64 {
		least := ^uint64(0)
		for i := range 20 {
			var before, after runtime.MemStats
			req := &logical.Request{Operation: logical.UpdateOperation, Path: "roles/r0", Data: data(i), Storage: m.storage}
			runtime.ReadMemStats(&before)
			resp, err := m.HandleRequest(context.Background(), req)
			runtime.ReadMemStats(&after)
			if err != nil || resp.IsError() {
				t.Fatal(resp, err)
			}
			least = min(least, after.TotalAlloc-before.TotalAlloc)
		}
		return least
	}
	kinds := map[string]func(i int) map[string]any{
		"the same again":   func(int) map[string]any { return map[string]any{"scopes": scopes} },
		"another audience": func(i int) map[string]any { return map[string]any{"audience": fmt.Sprint("x", i)} },
	}
	few := map[string]uint64{}
	add(100)
	for name, data := range kinds {
		few[name] = cost(data)
	}
	add(3_000)
	for name, data := range kinds {
		if many := cost(data); many > few[name]+16<<10 {
			t.Errorf("%s: a write of a role took %d bytes among 100 roles, and %d among 3,000; want no more than 16 KiB of growth", name, few[name], many)
		}
	}
}
