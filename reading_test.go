// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What a read of creds returns: which token, how soon, and which error if there is none.

func TestCredsResponseHasEveryKey(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "b,a"})
		got := m.read("creds/app") // checked against the response schema
		now := time.Now()
		for key, want := range map[string]any{
			"access_token":        "token-1-client-canary",
			"token_type":          "Bearer",
			"scope":               "b a",
			"expires_at":          now.Add(time.Hour).UTC().Format(time.RFC3339),
			"expires_at_seconds":  now.Add(time.Hour).Unix(),
			"rotation_period":     int64(2700),
			"last_vault_rotation": now.UTC().Format(time.RFC3339),
		} {
			if got[key] != want {
				t.Errorf("%s: got %v (%[2]T), want %v (%[3]T)", key, got[key], want)
			}
		}
		// R is 15 min; J is 5 min.
		if ttl, ok := got["ttl"].(int64); !ok || ttl < 2700 || ttl > 3000 {
			t.Errorf("ttl: got %v (%[1]T), want 2700 to 3000", got["ttl"])
		}
		if len(got) != 8 {
			t.Errorf("got %d keys, want 8: %v", len(got), got)
		}
	})
}

func TestCredsErrorNamesWhatIsMissing(t *testing.T) {
	m := newTestMount(t)
	if text := m.refused(logical.ReadOperation, "creds/app", nil); !strings.Contains(text, `role "app" does not exist`) {
		t.Errorf("got %q", text)
	}
	m.write("roles/app", map[string]any{"config": "prod"})
	if text := m.refused(logical.ReadOperation, "creds/app", nil); !strings.Contains(text, `config "prod" of role "app" does not exist`) {
		t.Errorf("got %q", text)
	}
	m.wantMints(0)
}

func TestManyColdReadersCauseOneMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		const readers = 10_000
		var answered, failed atomic.Int64
		var wg sync.WaitGroup
		for range readers {
			wg.Go(func() {
				if got := m.creds("app", nil); got.err != nil || !strings.HasPrefix(got.token, "token-1-") {
					failed.Add(1)
				}
				answered.Add(1)
			})
		}
		wg.Wait()
		if failed.Load() != 0 || answered.Load() != readers {
			t.Errorf("%d of %d readers got no token or another one", failed.Load(), answered.Load())
		}
		m.wantMints(1)
	})
}

func TestCachedReadTouchesNoStorage(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "a,b"})
		m.creds("app", nil)
		m.creds("app", map[string]any{"scopes": "a"})
		before := m.storage.operations.Load()
		for range 100 {
			m.creds("app", nil)
			m.creds("app", map[string]any{"scopes": "a"})
		}
		if got := m.storage.operations.Load() - before; got != 0 {
			t.Errorf("200 cached reads made %d storage operations, want 0", got)
		}
		m.wantMints(2)
	})
}

// Neither a mint nor a write that waits for MojoAuth or for storage delays a read of a
// good token.
func TestCachedReadNeverWaits(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/slow", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.latency = time.Hour })
		go m.creds("slow", nil)
		go func() {
			_, _ = m.request(logical.UpdateOperation, "config", map[string]any{"client_secret": canary})
		}()
		synctest.Wait()
		began := time.Now()
		m.wantToken("app", 1)
		if waited := time.Since(began); waited != 0 {
			t.Errorf("a cached read waited %s", waited)
		}
		time.Sleep(2 * time.Hour) // until the write is done
	})
}

func TestReaderWithAUsableTokenWaitsTwoSeconds(t *testing.T) {
	// L is an hour: R is 15 min, F 1 min. Afterward the stand-in behaves as then
	// specifies, and there were n token requests: the next one is in progress, because
	// the write ends the back-off.
	toRefreshWindow := func(m *testMount, then func(*standIn)) (n int64) {
		m.t.Helper()
		m.configure("app", map[string]any{"min_ttl": "20m"}) // R is 20 min
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown }) // prevents renewals
		time.Sleep(41 * time.Minute)
		synctest.Wait()
		m.mojo.set(then)
		n = m.mojo.mints.Load()
		m.write("config", map[string]any{"verify_connection": false})
		return n
	}

	t.Run("the mint is quick", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			n := toRefreshWindow(m, func(s *standIn) { s.fail, s.latency = nil, 1500*time.Millisecond })
			m.wantToken("app", n+1)
			m.wantMints(n + 1)
		})
	})
	t.Run("the mint is slow", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			n := toRefreshWindow(m, func(s *standIn) { s.fail, s.latency = nil, 5*time.Second })
			began := time.Now()
			var wg sync.WaitGroup
			for range 50 {
				wg.Go(func() {
					got := m.wantToken("app", 1)
					if waited := time.Since(began); waited != 2*time.Second {
						t.Errorf("waited %s, want 2s", waited)
					}
					if got.ttl < 30 || got.ttl > 60 {
						t.Errorf("got ttl %d with the old token, want 30 to 60", got.ttl)
					}
					if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "is being minted") {
						t.Errorf("got the warnings %q, want one that min_ttl is not met", got.warnings)
					}
				})
			}
			wg.Wait()
			time.Sleep(3 * time.Second)
			synctest.Wait()
			m.wantToken("app", n+1) // the mint that the readers did not wait for was kept
			m.wantMints(n + 1)
		})
	})
	t.Run("the mint fails", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			n := toRefreshWindow(m, func(*standIn) {})
			for range 50 {
				got := m.wantToken("app", 1)
				if got.ttl < 30 || got.ttl > 60 {
					t.Errorf("got ttl %d with the old token, want 30 to 60", got.ttl)
				}
				if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "HTTP 503") {
					t.Errorf("got the warnings %q, want one with the reason", got.warnings)
				}
			}
			m.wantMints(n + 1) // and then a back-off
		})
	})
}

func TestExpiredTokenIsNeverServed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(59*time.Minute - 1)
		m.wantToken("app", 1) // F and a moment left
		time.Sleep(time.Nanosecond)
		got := m.creds("app", nil)
		wantStatus(t, got.err, http.StatusBadGateway, `role "app"`, `config "default"`, "HTTP 503", "The next attempt is at")

		m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 5*time.Second })
		time.Sleep(time.Minute)
		began := time.Now()
		if got := m.creds("app", nil); got.err != nil || strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("got %v, want a new token", got)
		}
		if time.Since(began) > 5*time.Second {
			t.Errorf("waited %s for a mint of 5s", time.Since(began))
		}
	})
}

func TestReaderWhoGivesUpDoesNotCancelTheMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
		patient := make(chan got, 1)
		ctx, cancel := context.WithCancel(context.Background())
		go func() { time.Sleep(time.Millisecond); patient <- m.creds("app", nil) }()
		go func() { time.Sleep(time.Second); cancel() }()
		if got := m.credsCtx(ctx, "app", nil); !errors.Is(got.err, context.Canceled) {
			t.Errorf("the reader that gave up got %v", got)
		}
		if got := <-patient; got.err != nil {
			t.Errorf("the reader that waited got %v", got.err)
		}
		m.wantMints(1)
	})
}

func TestMissingLifetimeIsAssumedWithAWarning(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.lifetime = 0 })
		m.configure("app", nil)
		resp := m.do(logical.ReadOperation, "creds/app", nil)
		if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "assuming 5m. Set max_ttl") {
			t.Errorf("got the warnings %q", resp.Warnings)
		}
		if got, want := resp.Data["expires_at_seconds"], time.Now().Add(5*time.Minute).Unix(); got != want {
			t.Errorf("got expires_at_seconds %v, want %v", got, want)
		}
		m.write("roles/app", map[string]any{"max_ttl": "30m"}) // applies to the cached token
		resp = m.do(logical.ReadOperation, "creds/app", nil)
		if len(resp.Warnings) != 0 || resp.Data["expires_at_seconds"] != time.Now().Add(30*time.Minute).Unix() {
			t.Errorf("with max_ttl: got %v", resp)
		}
		m.wantMints(1)
	})
}

func TestNarrowerGrantIsAWarning(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.grant = "a" })
		m.configure("app", map[string]any{"scopes": "a,b"})
		resp := m.do(logical.ReadOperation, "creds/app", nil)
		if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "Missing: b") {
			t.Errorf("got the warnings %q", resp.Warnings)
		}
		if resp := m.do(logical.ReadOperation, "creds/app", map[string]any{"scopes": "a"}); len(resp.Warnings) != 0 {
			t.Errorf("got the warnings %q for scopes that were granted", resp.Warnings)
		}
	})
}

func TestTimeoutIsAGatewayTimeout(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classTimeout, allowed: 10 * time.Second} })
		wantStatus(t, m.creds("app", nil).err, http.StatusGatewayTimeout, "request_timeout of 10s", "The next attempt is at")
	})
}

func TestStorageErrorsAreReturnedUnchanged(t *testing.T) {
	m := newTestMount(t)
	broken := errors.New("disk on fire")
	m.storage.fail.Store(&broken)
	if got := m.creds("app", nil); !errors.Is(got.err, broken) {
		t.Errorf("got %v, want the storage's own error", got.err)
	}
}

func TestErrorNamesUndecodableEntry(t *testing.T) {
	for _, key := range []string{"config/default", "roles/app"} {
		m := newTestMount(t)
		m.configure("app", nil)
		if err := m.storage.Storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"min_ttl":"`)}); err != nil {
			t.Fatal(err)
		}
		m.InvalidateKey(t.Context(), key)
		if got := m.creds("app", nil); got.err == nil || !strings.Contains(got.err.Error(), key) {
			t.Errorf("got %v, want it to name the key %s", got.err, key)
		}
	}
}

func TestMinTTLOfAReaderOnlyRaises(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(20 * time.Minute) // 40 left
		m.wantToken("app", 1)
		if got := m.creds("app", map[string]any{"min_ttl": "30m"}); !strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("got %v: 40 minutes are enough for 30", got)
		}
		if got := m.creds("app", map[string]any{"min_ttl": "45m"}); !strings.HasPrefix(got.token, "token-2-") || len(got.warnings) != 0 {
			t.Errorf("got %v, want a new token for 45 minutes", got)
		}
		m.wantToken("app", 2) // all readers get it
		got := m.creds("app", map[string]any{"min_ttl": "2h"})
		if !strings.HasPrefix(got.token, "token-2-") || len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "its lifetime is 1h0m0s") {
			t.Errorf("got %v, want a warning that no token is valid for that long", got)
		}
		m.wantMints(2)
		// A reader's min_ttl can only raise the role's.
		m.write("roles/app", map[string]any{"min_ttl": "45m"})
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if got := m.creds("app", map[string]any{"min_ttl": "1m"}); !strings.HasPrefix(got.token, "token-3-") {
			t.Errorf("got %v, want the role's min_ttl to apply", got)
		}
	})
}

func TestLeaseEndsBeforeItsTokenAndRevokesNothing(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"generate_lease": true})
		m.wantToken("app", 1)
		time.Sleep(30 * time.Minute)
		resp := m.do(logical.ReadOperation, "creds/app", nil)
		if resp.Secret == nil || resp.Secret.Renewable || resp.Secret.TTL != 25*time.Minute {
			t.Fatalf("got the secret %+v, want a lease of 25 minutes, not renewable", resp.Secret)
		}
		if len(resp.Data) != 8 {
			t.Errorf("got the data %v, want the same keys as without a lease", resp.Data)
		}

		// Revoking changes nothing, and works after role and config are deleted.
		revoke := func() {
			t.Helper()
			before := m.storage.operations.Load()
			_, err := m.HandleRequest(context.Background(), &logical.Request{
				Operation: logical.RevokeOperation, Secret: resp.Secret, Data: resp.Data, Storage: m.storage,
			})
			if err != nil || m.storage.operations.Load() != before {
				t.Errorf("revoking: %v, after %d storage operations", err, m.storage.operations.Load()-before)
			}
		}
		revoke()
		m.wantToken("app", 1)
		m.do(logical.DeleteOperation, "roles/app", nil)
		m.do(logical.DeleteOperation, "config", nil)
		revoke()

		// While no new token is available, a lease on the old one is short.
		m.configure("app", map[string]any{"generate_lease": true})
		m.wantToken("app", 2)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(50 * time.Minute)
		resp = m.do(logical.ReadOperation, "creds/app", nil)
		if got := resp.Secret.TTL; got < 30*time.Second || got > 60*time.Second {
			t.Errorf("got a lease of %s on an old token, want 30s to 60s", got)
		}
	})
}

// 10,000 readers share a role and read again after ttl: their reads must be spread out.
func TestTTLSpreadsReaders(t *testing.T) {
	bubble(t, func(m *testMount) {
		const readers = 10_000
		m.configure("app", nil)
		began := time.Now()
		next := make(map[int64][]int) // second → readers
		for i := range readers {
			next[0] = append(next[0], i)
		}
		busiest := 0
		for second := int64(0); second < 3*3600; second++ {
			due := next[second]
			if len(due) == 0 {
				continue
			}
			delete(next, second)
			time.Sleep(time.Until(began.Add(time.Duration(second) * time.Second)))
			synctest.Wait()
			if second > 0 {
				busiest = max(busiest, len(due))
			}
			for range due {
				got := m.creds("app", nil)
				if got.err != nil {
					t.Fatal(got.err)
				}
				next[second+got.ttl] = append(next[second+got.ttl], 0)
			}
		}
		if busiest == 0 || busiest >= readers/100 {
			t.Errorf("got %d of %d readers in the busiest second, want fewer than 1 %%", busiest, readers)
		}
		t.Logf("%d of %d readers in the busiest second; %d tokens were minted in 3 hours", busiest, readers, m.mojo.mints.Load())
	})
}

func TestTokenExpiredOnArrivalIsAnError(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"max_ttl": "1s"})
		m.mojo.set(func(s *standIn) { s.latency = 1500 * time.Millisecond })
		for range 5 {
			wantStatus(t, m.creds("app", nil).err, http.StatusBadGateway, "had expired, or almost", "Check the role's max_ttl")
		}
		m.wantMints(1) // and a back-off
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.latency = 0 })
		m.wantToken("app", 2)
	})
}

// Not in a bubble, where time stands still while a goroutine waits for a lock.
func TestManyColdReadersCauseOneClient(t *testing.T) {
	var made atomic.Int64
	mojo := &standIn{lifetime: time.Hour}
	m := newTestMountWith(t, mojo, func(config *configEntry) (minter, error) {
		made.Add(1)
		time.Sleep(10 * time.Millisecond) // as long as asking Vault for its version takes
		return mojo.client(config)
	})
	m.write("config", testConfig(nil))
	var wg sync.WaitGroup
	for i := range 20 {
		m.write(fmt.Sprintf("roles/r%d", i), nil)
		wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
	}
	wg.Wait()
	m.wantMints(20)
	if got := made.Load(); got != 1 {
		t.Errorf("%d clients were created for one config, want 1", got)
	}
}

// Whatever a token endpoint does, a read gets a response within request_timeout plus a
// second. This endpoint accepts a request and never answers, and the client ignores its
// canceled context.
func TestReadIsAnsweredWithinOneDeadline(t *testing.T) {
	const bound = 3 * time.Second // request_timeout + 1s
	silent := func(m *testMount) (release func()) {
		deaf := make(chan struct{})
		m.mojo.set(func(s *standIn) { s.deaf = deaf })
		return func() { close(deaf) }
	}

	t.Run("without a token", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.write("config", testConfig(map[string]any{"request_timeout": "2s"}))
			m.write("roles/app", nil)
			defer silent(m)()
			got, took := m.patiently("app", nil)
			if took > bound {
				t.Errorf("the read took %s, want at most %s", took, bound)
			}
			wantStatus(t, got.err, http.StatusGatewayTimeout, `role "app"`)
		})
	})
	t.Run("with a token that reaches its floor in the meantime", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.write("config", testConfig(map[string]any{"request_timeout": "2s"}))
			m.write("roles/app", nil)
			m.wantToken("app", 1)
			time.Sleep(40 * time.Minute)
			defer silent(m)() // before the token is renewed
			time.Sleep(19*time.Minute - time.Second)
			for range 5 {
				if got, took := m.patiently("app", nil); took > bound {
					t.Errorf("the read took %s and got %v, want a response within %s", took, got, bound)
					break
				}
				time.Sleep(500 * time.Millisecond)
			}
		})
	})
}

// The deadline applies to the whole read, not to each wait: a reader that has waited for
// another role's probe has only the rest of it for its own mint. That mint continues for
// later readers.
func TestReadHasOneDeadlineForAProbeAndItsOwnMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("first", nil) // request_timeout is 10s
		m.write("roles/second", nil)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("first", nil)
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 9*time.Second })
		probe := make(chan got, 1)
		go func() { probe <- m.creds("first", nil) }()
		synctest.Wait()

		got, took := m.patiently("second", nil)
		if took > 11*time.Second {
			t.Errorf("a reader waited %s for a probe of 9s and a mint of 9s, want a response within 11s (got %v)", took, got)
		}
		if got := <-probe; got.err != nil {
			t.Errorf("the probe's reader got %v", got.err)
		}
		time.Sleep(10 * time.Second)
		if got, took := m.patiently("second", nil); got.err != nil || took != 0 {
			t.Errorf("after the mint, a read took %s and got %v, want its token immediately", took, got.err)
		}
		m.wantMints(3)
	})
}

// A token that arrives at or below its floor is a failed mint, with a class of its own in
// everything that counts failures.
func TestTokenExpiredOnArrivalCountsAsAFailure(t *testing.T) {
	for name, latency := range map[string]time.Duration{
		"over":            1500 * time.Millisecond,
		"below its floor": 950 * time.Millisecond, // F is 100 ms
		"at its floor":    900 * time.Millisecond,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", map[string]any{"max_ttl": "1s"})
				m.write("roles/other", nil)
				if line := `mojoauth_mints_total{config="default",result="expired_on_arrival"} 0`; !strings.Contains(m.metrics(), line) {
					t.Errorf("before the first mint, the metrics do not have %s", line)
				}
				m.mojo.set(func(s *standIn) { s.latency = latency })
				got := m.creds("app", nil)
				wantStatus(t, got.err, http.StatusBadGateway, `role "app"`, "max_ttl")
				if got.err != nil && strings.Contains(got.err.Error(), "returned no usable token") {
					t.Errorf("the error contradicts itself: %v", got.err)
				}

				status := m.read("status")
				if failures := status["mint_failures"].(map[string]any); failures["expired_on_arrival"] != int64(1) || len(failures) != 1 {
					t.Errorf("mint_failures: got %v, want one expired_on_arrival", failures)
				}
				if status["mints"] != int64(0) {
					t.Errorf("mints: got %v, want 0: the token was not served", status["mints"])
				}
				config := status["configs"].(map[string]any)["default"].(map[string]any)
				if config["last_error_class"] != "expired_on_arrival" || config["last_error"] == nil || config["last_error_at"] == nil {
					t.Errorf("got the config's status %v, want the failure", config)
				}
				if config["last_mint_at"] != nil {
					t.Errorf("last_mint_at: got %v, want none", config["last_mint_at"])
				}
				if line := `mojoauth_mints_total{config="default",result="expired_on_arrival"} 1`; !strings.Contains(m.metrics(), line) {
					t.Errorf("the metrics do not have %s", line)
				}

				// Only this role is affected.
				m.creds("app", nil)
				m.wantMints(1)
				if got := m.creds("other", nil); got.err != nil {
					t.Errorf("another role got %v", got.err)
				}
			})
		})
	}
}
