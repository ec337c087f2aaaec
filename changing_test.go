// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What writes of roles and configs, on this node and on others, do to cached tokens and
// to waiting readers.

func TestRoleWriteDropsTokensOnlyIfTheRequestChanges(t *testing.T) {
	fields := map[string]any{"audience": "https://a/", "scopes": "a,b", "extra_params": map[string]any{"x": "y"}}
	for _, c := range []struct {
		name  string
		write map[string]any
		drops bool
	}{
		{"the same again", fields, false},
		{"nothing", nil, false},
		{"min_ttl", map[string]any{"min_ttl": "1m"}, false},
		{"max_ttl", map[string]any{"max_ttl": "30m"}, false},
		{"generate_lease", map[string]any{"generate_lease": true}, false},
		{"audience", map[string]any{"audience": "https://b/"}, true},
		{"scopes", map[string]any{"scopes": "a"}, true},
		{"extra_params", map[string]any{"extra_params": map[string]any{"x": "z"}}, true},
		{"config", map[string]any{"config": "second"}, true},
	} {
		want := int64(1)
		if c.drops {
			want = 2
		}
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config/second", testConfig(nil))
				m.configure("app", fields)
				m.wantToken("app", 1)
				m.write("roles/app", c.write)
				m.wantToken("app", want)
			})
		})
		t.Run(c.name+" on another node", func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config/second", testConfig(nil))
				m.configure("app", fields)
				m.wantToken("app", 1)
				m.elsewhere(func(other *testMount) { other.write("roles/app", c.write) }, "roles/app")
				m.wantToken("app", want)
				m.wantMints(want)
			})
		})
	}
	t.Run("deleted and created again", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", fields)
			m.wantToken("app", 1)
			m.do(logical.DeleteOperation, "roles/app", nil)
			if n := m.kept().slots; n != 0 {
				t.Errorf("got %d slots, want 0", n)
			}
			m.write("roles/app", fields)
			m.wantToken("app", 2)
			m.elsewhere(func(other *testMount) {
				other.do(logical.DeleteOperation, "roles/app", nil)
				other.write("roles/app", fields)
			}, "roles/app")
			m.wantToken("app", 3)
		})
	})
}

func TestConfigWriteDropsTokensOnlyIfTheClientChanges(t *testing.T) {
	for _, c := range []struct {
		name  string
		write map[string]any
		drops bool
	}{
		{"the same again", map[string]any{"client_id": "client"}, false},
		{"client_secret", map[string]any{"client_secret": "another-secret"}, false},
		{"auth method", map[string]any{"token_endpoint_auth_method": "client_secret_basic"}, false},
		{"max_retries", map[string]any{"max_retries": 5}, false},
		{"client_id", map[string]any{"client_id": "other"}, true},
		{"token_url", map[string]any{"token_url": "https://project.auth.mojoauth.test/oauth2/token?env=test", "client_secret": canary}, true},
	} {
		c.write["verify_connection"] = false
		want := int64(1)
		if c.drops {
			want = 2
		}
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				m.write("config", c.write)
				m.wantToken("app", want)
			})
		})
		t.Run(c.name+" on another node", func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				m.elsewhere(func(other *testMount) { other.write("config", c.write) }, "config/default")
				m.wantToken("app", want)
			})
		})
	}
	t.Run("deleted and created again", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m.do(logical.DeleteOperation, "config", nil)
			m.refused(logical.ReadOperation, "creds/app", nil)
			m.write("config", testConfig(nil))
			m.wantToken("app", 2)
		})
	})
}

func TestSecretRollsOverWithoutAGap(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.write("config", map[string]any{"client_secret": "second-secret", "verify_connection": false})
		m.wantToken("app", 1)
		time.Sleep(45 * time.Minute)
		synctest.Wait()
		if got := m.wantToken("app", 2); !strings.HasSuffix(got.token, "second") {
			t.Errorf("got %s, want the next token minted with the new secret", got.token)
		}
	})
}

func TestMintInFlightIsKeptOnlyIfStillValid(t *testing.T) {
	// In each case a mint takes five seconds, and the change comes after one. The first
	// reader came before the change, the later one after it; later is the number of the
	// token that the later reader gets.
	refused := &mintError{class: classClientRefused, status: 401, oauthError: "invalid_client"}
	for _, c := range []struct {
		name   string
		fail   error
		change func(m *testMount)
		later  int64
		mints  int64
	}{
		{"secret, and the mint succeeds", nil, func(m *testMount) {
			m.write("config", map[string]any{"client_secret": "second-secret", "verify_connection": false})
		}, 1, 1},
		{"secret, and the mint fails", refused, func(m *testMount) {
			m.write("config", map[string]any{"client_secret": "second-secret", "verify_connection": false})
		}, 2, 2},
		{"client_id", nil, func(m *testMount) {
			m.write("config", map[string]any{"client_id": "other", "verify_connection": false})
		}, 2, 2},
		{"audience", nil, func(m *testMount) { m.write("roles/app", map[string]any{"audience": "b"}) }, 2, 2},
		{"role created again", nil, func(m *testMount) {
			m.do(logical.DeleteOperation, "roles/app", nil)
			m.write("roles/app", nil)
		}, 2, 2},
		{"role elsewhere", nil, func(m *testMount) {
			m.elsewhere(func(o *testMount) { o.write("roles/app", map[string]any{"audience": "b"}) }, "roles/app")
		}, 2, 2},
		{"client_id elsewhere", nil, func(m *testMount) {
			m.elsewhere(func(o *testMount) {
				o.write("config", map[string]any{"client_id": "other", "verify_connection": false})
			}, "config/default")
		}, 2, 2},
		{"min_ttl", nil, func(m *testMount) { m.write("roles/app", map[string]any{"min_ttl": "30m"}) }, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.mojo.set(func(s *standIn) { s.latency, s.fail = 5*time.Second, c.fail })
				first, later := make(chan got, 1), make(chan got, 1)
				go func() { first <- m.creds("app", nil) }()
				time.Sleep(time.Second)
				m.mojo.set(func(s *standIn) {
					s.latency, s.fail = 5*time.Second, nil
				})
				c.change(m)
				go func() { later <- m.creds("app", nil) }()
				if got := <-first; got.err != nil {
					t.Errorf("first reader: %v", got.err)
				}
				want := fmt.Sprintf("token-%d-", c.later)
				if got := <-later; got.err != nil || !strings.HasPrefix(got.token, want) {
					t.Errorf("later reader: got %v, want %s…", got, want)
				}
				m.wantToken("app", c.later)
				m.wantMints(c.mints)
			})
		})
	}
}

// The engine must not keep what it read from storage before a change.
func TestEntriesLoadedBeforeAChangeAreNotKept(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"audience": "old"})
		m.InvalidateKey(context.Background(), "roles/app")
		hook := func(key string) {
			if key == "roles/app" {
				m.storage.afterGet.Store(nil)
				m.elsewhere(func(o *testMount) { o.write("roles/app", map[string]any{"audience": "new"}) }, "roles/app")
			}
		}
		m.storage.afterGet.Store(&hook)
		m.creds("app", nil) // came before the change: either token is fine
		m.creds("app", nil)
		if got := m.mojo.last().audience; got != "new" {
			t.Errorf("after the change, the engine requested a token for audience %q", got)
		}
	})
}

func TestDroppedTokensAreFreed(t *testing.T) {
	for name, change := range map[string]func(m *testMount){
		"role's audience": func(m *testMount) { m.write("roles/app", map[string]any{"audience": "x"}) },
		"rotated":         func(m *testMount) { m.do(logical.UpdateOperation, "rotate-role/app", nil) },
		"role deleted":    func(m *testMount) { m.do(logical.DeleteOperation, "roles/app", nil) },
		"client_id":       func(m *testMount) { m.write("config", map[string]any{"client_id": "x", "verify_connection": false}) },
		"config deleted":  func(m *testMount) { m.do(logical.DeleteOperation, "config", nil) },
	} {
		bubble(t, func(m *testMount) {
			m.configure("app", map[string]any{"scopes": "a,b"})
			m.creds("app", nil)
			m.creds("app", map[string]any{"scopes": "a"})
			if got := m.read("status")["cached_tokens"]; got != int64(2) {
				t.Errorf("%s: got %v tokens before, want 2", name, got)
			}
			change(m)
			want := int64(0)
			if name == "rotated" { // the new one
				want = 1
			}
			if got := m.read("status")["cached_tokens"]; got != want {
				t.Errorf("%s: got %v tokens after, want %d", name, got, want)
			}
		})
	}
}

// Tokens dropped by a write on another node are no longer counted, and their memory is
// freed.
func TestTokensDroppedElsewhereAreFreed(t *testing.T) {
	for name, c := range map[string]struct {
		key    string
		change func(o *testMount)
	}{
		"role's audience": {"roles/app", func(o *testMount) { o.write("roles/app", map[string]any{"audience": "x"}) }},
		"scopes removed":  {"roles/app", func(o *testMount) { o.write("roles/app", map[string]any{"scopes": "b"}) }},
		"rotated":         {"roles/app", func(o *testMount) { o.do(logical.UpdateOperation, "rotate-role/app", nil) }},
		"role deleted":    {"roles/app", func(o *testMount) { o.do(logical.DeleteOperation, "roles/app", nil) }},
		"client_id": {"config/default", func(o *testMount) {
			o.write("config", map[string]any{"client_id": "x", "verify_connection": false})
		}},
		"config deleted": {"config/default", func(o *testMount) { o.do(logical.DeleteOperation, "config", nil) }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config/second", testConfig(nil))
				m.configure("app", map[string]any{"scopes": "a,b"})
				m.write("roles/other", map[string]any{"config": "second"})
				m.creds("app", nil)
				m.creds("app", map[string]any{"scopes": "a"})
				m.creds("other", nil)
				m.elsewhere(c.change, c.key)
				synctest.Wait()
				if got := m.read("status")["cached_tokens"]; got != int64(1) {
					t.Errorf("got a count of %v tokens, want 1", got)
				}
				if got := m.kept(); got.slots != 1 || got.narrowed != 0 {
					t.Errorf("got %+v, want one slot", got)
				}
			})
		})
	}
}

// If storage fails while the engine looks up a change, it looks the change up later.
func TestTokensDroppedElsewhereAreFreedAfterStorageFailed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		broken := errors.New("disk on fire")
		m.elsewhere(func(o *testMount) { o.do(logical.DeleteOperation, "roles/app", nil) })
		m.storage.fail.Store(&broken)
		m.InvalidateKey(context.Background(), "roles/app")
		time.Sleep(time.Minute)
		m.storage.fail.Store(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := m.kept().slots; n != 0 {
			t.Errorf("got %d slots, want none", n)
		}
	})
}

// unsureStorage can be made to fail. It then returns an error from each Put, which it may
// have applied.
type unsureStorage struct {
	logical.Storage
	fails, applies atomic.Bool
}

var errUnsure = errors.New("storage does not answer")

func (s *unsureStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	if !s.fails.Load() || s.applies.Load() {
		if err := s.Storage.Put(ctx, e); err != nil {
			return err
		}
	}
	if s.fails.Load() {
		return errUnsure
	}
	return nil
}

// A reader can know of a change before the cache does, if loading it in the background
// failed. The new token is then judged by the role as the reader knows it.
func TestNewTokenIsComparedUnderTheCurrentRole(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(10 * time.Minute)
		m.elsewhere(func(o *testMount) { o.write("roles/app", map[string]any{"max_ttl": "1m"}) })
		broken := errors.New("storage is down")
		m.storage.fail.Store(&broken)
		m.InvalidateKey(context.Background(), "roles/app")
		synctest.Wait()
		m.storage.fail.Store(nil)
		m.wantToken("app", 2)
	})
}

// A failed write may still have been applied. Storage decides.
func TestStorageDecidesAfterAFailedWrite(t *testing.T) {
	for path, data := range map[string]map[string]any{
		"config":          {"client_id": "other", "verify_connection": false},
		"roles/app":       {"audience": "x"},
		"rotate-role/app": nil,
	} {
		for _, applies := range []bool{false, true} {
			bubble(t, func(m *testMount) {
				storage := &unsureStorage{Storage: m.storage.Storage}
				m.storage.Storage = storage
				m.configure("app", nil)
				m.wantToken("app", 1)
				storage.applies.Store(applies)
				storage.fails.Store(true)
				if resp, err := m.request(logical.UpdateOperation, path, data); !errors.Is(err, errUnsure) {
					t.Errorf("%s: got %v, %v; want the storage's own error", path, resp, err)
				}
				storage.fails.Store(false)
				synctest.Wait()
				want := int64(1)
				if applies {
					want = m.mojo.mints.Load() + 1
				}
				if applies && path == "rotate-role/app" {
					want = m.mojo.mints.Load() // the rotation's token is in place
				}
				m.wantToken("app", want)
				if got := m.read("config")["client_id"] == "other"; got != (applies && path == "config") {
					t.Errorf("%s, applied %v: client_id is the new one: %v", path, applies, got)
				}
			})
		}
	}
}

// While a reader waits for a mint that is going to fail, someone corrects the role or its
// config. The reader gets a token for the corrected role, not the old role's failure.
func TestWaitingReaderGetsTokenOfCorrectedRole(t *testing.T) {
	fixed := map[string]any{"scopes": "good"}
	for _, c := range []struct {
		name    string
		failure *mintError
		fix     func(m *testMount)
	}{
		{"scopes", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.write("roles/app", fixed)
		}},
		{"scopes on another node", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.elsewhere(func(o *testMount) { o.write("roles/app", fixed) }, "roles/app")
		}},
		{"scopes in an outage that has ended", errDown, func(m *testMount) {
			m.write("roles/app", fixed)
			m.write("config", map[string]any{"verify_connection": false})
		}},
		{"role created again", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}, func(m *testMount) {
			m.do(logical.DeleteOperation, "roles/app", nil)
			m.write("roles/app", fixed)
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
				c.fix(m)
				if got := <-reader; got.err != nil {
					t.Errorf("the waiting reader got %v, want a token for the role as it is now", got.err)
				}
			})
		})
	}
}

// Nothing stays in memory of what is deleted or no longer read.
func TestDeletedEntriesLeaveNothingInMemory(t *testing.T) {
	empty := func(m *testMount, accounts int) {
		m.t.Helper()
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		if got := m.kept(); got.slots != 0 || got.narrowed != 0 || got.upstreams > accounts || got.accounts > accounts {
			m.t.Errorf("two days later the mount still has %+v, want no slots, and upstreams and accounts of at most %d configs", got, accounts)
		}
	}
	// heldUp delays the result of the first read of a key from storage until meanwhile
	// returns.
	heldUp := func(m *testMount, key string, meanwhile func()) {
		m.t.Helper()
		var held atomic.Bool
		release, waits := make(chan struct{}), make(chan struct{})
		hook := func(got string) {
			if got == key && held.CompareAndSwap(false, true) {
				close(waits)
				<-release
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
				// Another reader looks up the config later and gets a newer one.
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
	t.Run("configs and roles deleted on another node, without reads of status", func(t *testing.T) {
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

// The cost of writing a role must not grow with the number of other roles in memory. The
// test measures bytes, which are the same in every run.
func TestWritingARoleDoesNotVisitAllRoles(t *testing.T) {
	m := newTestMount(t)
	m.mojo.unpaced = true
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
	// cost is the fewest bytes that writing a role took.
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
			t.Errorf("%s: writing a role took %d bytes among 100 roles, and %d among 3,000; want at most 16 KiB more", name, few[name], many)
		}
	}
}

// A write that waits for another gives up when its caller does.
func TestWaitingWriteEndsWithItsCaller(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		slow := func(key string) {
			if key == "roles/slow" {
				time.Sleep(time.Minute)
			}
		}
		m.storage.afterGet.Store(&slow)
		create := func(ctx context.Context, path string) error {
			_, err := m.HandleRequest(ctx, &logical.Request{Operation: logical.CreateOperation, Path: path, Storage: m.storage})
			return err
		}
		go func() { _ = create(context.Background(), "roles/slow") }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		began := time.Now()
		err := create(ctx, "roles/quick")
		if took := time.Since(began); !errors.Is(err, context.DeadlineExceeded) || took != time.Second {
			t.Errorf("got %v after %s, want the caller's deadline error", err, took)
		}
		time.Sleep(time.Hour)
	})
}
