// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"go.uber.org/goleak"
)

// Most tests here run in a synctest bubble: time is the bubble's own, passes only
// when everything waits, and Wait returns when nothing can go on without it.

func TestMain(m *testing.M) {
	// Started by an import of the SDK, once for the process.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

// bubble runs a test of a mount in a bubble, and ends the mount in it.
func bubble(t *testing.T, test func(m *testMount)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		test(m)
	})
}

// got is what a read of creds got.
type got struct {
	token    string
	ttl      int64
	warnings []string
	err      error
}

func (m *testMount) creds(role string, query map[string]any) got {
	return m.credsCtx(context.Background(), role, query)
}

func (m *testMount) credsCtx(ctx context.Context, role string, query map[string]any) got {
	resp, err := m.HandleRequest(ctx, &logical.Request{
		Operation: logical.ReadOperation, Path: "creds/" + role, Data: query, Storage: m.storage,
	})
	switch {
	case err != nil:
		return got{err: err}
	case resp.IsError():
		return got{err: resp.Error()}
	}
	return got{token: resp.Data["access_token"].(string), ttl: resp.Data["ttl"].(int64), warnings: resp.Warnings}
}

// wantToken reads a token and checks its number, which the stand-in counts up,
// and that no more were minted.
func (m *testMount) wantToken(role string, number int64) got {
	m.t.Helper()
	got := m.creds(role, nil)
	if got.err != nil {
		m.t.Fatalf("reading %s: %v", role, got.err)
	}
	if want := fmt.Sprintf("token-%d-", number); !strings.HasPrefix(got.token, want) {
		m.t.Errorf("got %s, want %s…", got.token, want)
	}
	return got
}

func (m *testMount) wantMints(n int64) {
	m.t.Helper()
	if got := m.mojo.mints.Load(); got != n {
		m.t.Errorf("%d tokens were asked for, want %d", got, n)
	}
}

// wantStatus checks that err carries that status as Vault sees it over gRPC,
// where only a bare CodedError keeps it.
func wantStatus(t *testing.T, err error, status int, parts ...string) {
	t.Helper()
	coded, ok := err.(logical.HTTPCodedError) //nolint:errorlint // that it is not wrapped is the point
	if !ok || coded.Code() != status {
		t.Errorf("got %v (%T), want a bare error of status %d", err, err, status)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %q, want it to hold %q", err, part)
		}
	}
}

var errDown = &mintError{class: classServerError, status: http.StatusServiceUnavailable}

func TestCredsAnswerHasEveryKey(t *testing.T) {
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
	if text := m.refused(logical.ReadOperation, "creds/app", nil); !strings.Contains(text, `config "prod", which role "app" names, does not exist`) {
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
			t.Errorf("%d of %d readers got no or another token", failed.Load(), answered.Load())
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

// Not even a mint is in the way of a token that is good, nor a write that waits
// for MojoAuth or for storage.
func TestCachedReadWaitsForNobody(t *testing.T) {
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
		time.Sleep(2 * time.Hour) // until the write has ended
	})
}

func TestReaderWaitsTwoSecondsWhileTheOldTokenWouldDo(t *testing.T) {
	// L is an hour: R 15 min, F 1 min.
	toRefreshWindow := func(m *testMount) {
		m.t.Helper()
		m.configure("app", map[string]any{"min_ttl": "20m"}) // R is 20 min
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown }) // so that nothing is refreshed ahead
		time.Sleep(41 * time.Minute)
		synctest.Wait()
		m.write("config", map[string]any{"verify_connection": false}) // ends the back-off
	}

	t.Run("the mint is quick", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			toRefreshWindow(m)
			n := m.mojo.mints.Load()
			m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 1500*time.Millisecond })
			m.wantToken("app", n+1)
			m.wantMints(n + 1)
		})
	})
	t.Run("the mint is slow", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			toRefreshWindow(m)
			n := m.mojo.mints.Load()
			m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 5*time.Second })
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
					if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "MojoAuth is slow") {
						t.Errorf("got the warnings %q, want one that min_ttl is not met", got.warnings)
					}
				})
			}
			wg.Wait()
			time.Sleep(3 * time.Second)
			synctest.Wait()
			m.wantToken("app", n+1) // what the readers did not wait for was kept
			m.wantMints(n + 1)
		})
	})
	t.Run("the mint fails", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			toRefreshWindow(m)
			n := m.mojo.mints.Load()
			for range 50 {
				got := m.wantToken("app", 1)
				if got.ttl < 30 || got.ttl > 60 {
					t.Errorf("got ttl %d with the old token, want 30 to 60", got.ttl)
				}
				if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "HTTP 503") {
					t.Errorf("got the warnings %q, want one that says why", got.warnings)
				}
			}
			m.wantMints(n + 1) // and then a back-off
		})
	})
}

func TestSpentTokenIsNeverServed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(59*time.Minute - 1)
		m.wantToken("app", 1) // F and a moment left
		time.Sleep(time.Nanosecond)
		got := m.creds("app", nil)
		wantStatus(t, got.err, http.StatusBadGateway, `role "app"`, `config "default"`, "HTTP 503", "The next try is at")

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

func TestTokenInUseIsRenewedBeforeItIsAskedFor(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(45*time.Minute - 1)
		synctest.Wait()
		m.wantMints(1)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		m.wantMints(2) // at R, without a reader
		m.mojo.set(func(s *standIn) { s.latency = time.Hour })
		began := time.Now()
		m.wantToken("app", 2)
		if time.Since(began) != 0 {
			t.Error("the reader waited")
		}
	})
}

func TestIdleRoleLapses(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		m.wantMints(2) // once ahead, since the first was read
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		m.wantMints(2)
		if n := len(m.tokens.slots); n != 0 {
			t.Errorf("%d slots are left of an idle role, want none", n)
		}
		m.wantToken("app", 3)
	})
}

func TestRefreshAheadTriesAgainAfterEachBackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(45 * time.Minute)
		synctest.Wait()
		m.wantMints(2)
		time.Sleep(35 * time.Second) // 5, 10, 20 s, each up to a fifth less
		synctest.Wait()
		if got := m.mojo.mints.Load(); got < 5 || got > 6 {
			t.Errorf("%d tokens were asked for, want 5 or 6", got)
		}
		m.mojo.set(func(s *standIn) { s.fail = nil })
		time.Sleep(30 * time.Second)
		synctest.Wait()
		n := m.mojo.mints.Load()
		m.wantToken("app", n) // there without a reader having waited
		m.wantMints(n)

		// Past the floor nothing is tried without a reader.
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(60 * time.Minute)
		synctest.Wait()
		n = m.mojo.mints.Load()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		m.wantMints(n)
	})
}

func TestRefreshAheadOfManyRolesIsNoBurst(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		const roles = 200
		for i := range roles {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			m.creds(fmt.Sprintf("r%d", i), nil)
		}
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		time.Sleep(45*time.Minute + 500*time.Millisecond)
		synctest.Wait()
		if got := m.mojo.mints.Load() - roles; got > maxAhead {
			t.Errorf("%d mints were under way at once without a reader, want at most %d", got, maxAhead)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		m.wantMints(2 * roles)
	})
}

func TestReaderWhoGivesUpDoesNotCancelTheMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
		patient := make(chan got, 1)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		go func() { time.Sleep(time.Millisecond); patient <- m.creds("app", nil) }()
		if got := m.credsCtx(ctx, "app", nil); !errors.Is(got.err, context.DeadlineExceeded) {
			t.Errorf("who gave up got %v", got)
		}
		if got := <-patient; got.err != nil {
			t.Errorf("who waited got %v", got.err)
		}
		m.wantMints(1)
	})
}

func TestCloseEndsEverything(t *testing.T) {
	bubble(t, func(m *testMount) { // which fails if a goroutine is left
		m.configure("app", map[string]any{"scopes": "a,b"})
		m.wantToken("app", 1)
		m.creds("app", map[string]any{"scopes": "a"})
		m.write("roles/slow", nil)
		m.mojo.set(func(s *standIn) { s.latency = time.Hour })
		got := make(chan got, 1)
		go func() { got <- m.creds("slow", nil) }()
		synctest.Wait()
		m.Cleanup(context.Background())
		if a := <-got; !errors.Is(a.err, errClosed) {
			t.Errorf("a waiting reader got %v", a)
		}
		n := m.mojo.mints.Load()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		m.wantMints(n)
		for _, query := range []map[string]any{nil, {"scopes": "b"}} {
			if a := m.creds("app", query); !errors.Is(a.err, errClosed) {
				t.Errorf("a read after the end got %v", a)
			}
		}
	})
}

func TestLifetimeNobodyTellsIsAssumedWithAWarning(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.lifetime = 0 })
		m.configure("app", nil)
		resp := m.do(logical.ReadOperation, "creds/app", nil)
		if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "5m0s is assumed. Set max_ttl") {
			t.Errorf("got the warnings %q", resp.Warnings)
		}
		if got, want := resp.Data["expires_at_seconds"], time.Now().Add(5*time.Minute).Unix(); got != want {
			t.Errorf("got expires_at_seconds %v, want %v", got, want)
		}
		m.write("roles/app", map[string]any{"max_ttl": "30m"}) // applies to the token that is held
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
		if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "without b") {
			t.Errorf("got the warnings %q", resp.Warnings)
		}
		if resp := m.do(logical.ReadOperation, "creds/app", map[string]any{"scopes": "a"}); len(resp.Warnings) != 0 {
			t.Errorf("got the warnings %q for what was granted", resp.Warnings)
		}
	})
}

func TestRoleWriteDropsTokensOnlyWhenItAsksForOthers(t *testing.T) {
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
	t.Run("deleted and made again", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", fields)
			m.wantToken("app", 1)
			m.do(logical.DeleteOperation, "roles/app", nil)
			if n := len(m.tokens.slots); n != 0 {
				t.Errorf("%d slots are left", n)
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

// elsewhere lets another node of the cluster, with the same storage, do
// something, and then tells this one which keys have changed.
func (m *testMount) elsewhere(do func(other *testMount), keys ...string) {
	m.t.Helper()
	do(newTestNode(m.t, m.mojo, m.mojo.client, m.storage, logical.TestSystemView()))
	for _, key := range keys {
		m.InvalidateKey(context.Background(), key)
	}
}

func TestConfigWriteDropsTokensOnlyOfAnotherClient(t *testing.T) {
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
	t.Run("deleted and made again", func(t *testing.T) {
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
			t.Errorf("got %s: the next token was not minted with the new secret", got.token)
		}
	})
}

func TestMintInFlightIsKeptOnlyWhenItIsStillAskedFor(t *testing.T) {
	// Each case begins with a mint of five seconds and changes something after
	// one. first is what the reader gets who came before the change, later what
	// one gets who came after it.
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
		{"role made again", nil, func(m *testMount) {
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
					t.Errorf("the first reader: %v", got.err)
				}
				want := fmt.Sprintf("token-%d-", c.later)
				if got := <-later; got.err != nil || !strings.HasPrefix(got.token, want) {
					t.Errorf("the later reader got %v, want %s…", got, want)
				}
				m.wantToken("app", c.later)
				m.wantMints(c.mints)
			})
		})
	}
}

// What was read from storage before a change must not be held after it.
func TestWhatWasLoadedBeforeAChangeIsNotHeld(t *testing.T) {
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
		m.creds("app", nil) // came before the change: either will do
		m.creds("app", nil)
		if got := m.mojo.last().audience; got != "new" {
			t.Errorf("a reader after the change was asked for with audience %q", got)
		}
	})
}

func TestFailureOfClientOrServerBacksOffTheConfig(t *testing.T) {
	for _, failure := range []*mintError{
		{class: classClientRefused, status: 401, oauthError: "invalid_client"},
		{class: classServerError, status: 503},
		{class: classThrottled, status: 429},
		{class: classUnexpected, status: 200},
		{class: classTLS},
		{class: classNetwork},
		{class: classTimeout, allowed: time.Second},
	} {
		t.Run(string(failure.class), func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config/other", testConfig(nil))
				m.configure("app", nil)
				m.write("roles/second", nil)
				m.write("roles/elsewhere", map[string]any{"config": "other"})
				m.mojo.set(func(s *standIn) { s.fail = failure })
				for range 10 {
					for _, role := range []string{"app", "second"} {
						began := time.Now()
						if got := m.creds(role, nil); got.err == nil || !strings.Contains(got.err.Error(), "The next try is at") {
							t.Errorf("got %v, want the remembered error", got)
						}
						if time.Since(began) != 0 {
							t.Error("a remembered error was not told at once")
						}
					}
				}
				m.wantMints(1)
				m.creds("elsewhere", nil)
				m.wantMints(2) // another config is not concerned

				time.Sleep(5 * time.Second)
				for range 10 {
					m.creds("app", nil)
				}
				m.wantMints(3)
				if got := m.mojo.last().retries; got != 0 {
					t.Errorf("the try after a failure was allowed %d retries, want none", got)
				}
				time.Sleep(5 * time.Second) // of 8 to 10
				m.creds("app", nil)
				m.wantMints(3)

				m.mojo.set(func(s *standIn) { s.fail = nil })
				m.write("config", map[string]any{"verify_connection": false}) // any write ends it
				m.wantToken("app", 4)
				m.wantToken("second", 5)
			})
		})
	}
}

func TestRefusedRequestBacksOffAlone(t *testing.T) {
	for _, code := range []string{"invalid_scope", "invalid_target", "invalid_request", "access_denied", ""} {
		t.Run(code, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("bad", map[string]any{"scopes": "a,forbidden"})
				m.write("roles/good", nil)
				m.mojo.set(func(s *standIn) {
					s.failFor = func(req tokenRequest) error {
						if slices.Contains(req.scopes, "forbidden") {
							return &mintError{class: classRequestRefused, status: 400, oauthError: code}
						}
						return nil
					}
				})
				for range 10 {
					if text := m.refused(logical.ReadOperation, "creds/bad", nil); !strings.Contains(text, "HTTP 400") {
						t.Errorf("got %q", text)
					}
				}
				m.wantMints(1)
				m.wantToken("good", 2)
				if got := m.creds("bad", map[string]any{"scopes": "a"}); got.err != nil {
					t.Errorf("the same role with fewer scopes: %v", got.err)
				}
				m.wantMints(3)
				m.write("roles/bad", map[string]any{"min_ttl": 0}) // any write tries again
				m.refused(logical.ReadOperation, "creds/bad", nil)
				m.wantMints(4)
				time.Sleep(5 * time.Second)
				m.refused(logical.ReadOperation, "creds/bad", nil)
				m.wantMints(5)
			})
		})
	}
}

func TestRetryAfterIsObeyed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) {
			s.fail = &mintError{class: classThrottled, status: 429, retryAfter: 20 * time.Second}
		})
		for range 199 {
			wantStatus(t, m.creds("app", nil).err, http.StatusBadGateway, "HTTP 429", "The next try is at")
			time.Sleep(100 * time.Millisecond)
		}
		m.wantMints(1)
		time.Sleep(time.Second)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		m.wantToken("app", 2)
	})
}

// Roles whose mints were under way together when the trouble began fail once,
// not each on their own.
func TestBackoffCountsATroubleOnce(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) { s.fail, s.latency = errDown, time.Second })
		var wg sync.WaitGroup
		for i := range 20 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
		}
		wg.Wait()
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 0 })
		m.wantToken("r0", 21)
	})
}

// After a back-off one mint finds out whether the trouble is over.
func TestOneProbeAfterABackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		for i := range 20 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
		}
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("r0", nil)
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
		}
		wg.Wait()
		m.wantMints(2)
	})
}

func TestTimeoutIsAGatewayTimeout(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classTimeout, allowed: 10 * time.Second} })
		wantStatus(t, m.creds("app", nil).err, http.StatusGatewayTimeout, "within the 10s", "The next try is at")
	})
}

func TestStorageErrorsStayWhatTheyAre(t *testing.T) {
	m := newTestMount(t)
	broken := errors.New("disk on fire")
	m.storage.fail.Store(&broken)
	if got := m.creds("app", nil); !errors.Is(got.err, broken) {
		t.Errorf("got %v, want the storage's own error", got.err)
	}
}

func TestStoredEntryThatCannotBeReadIsNamed(t *testing.T) {
	for _, key := range []string{"config/default", "roles/app"} {
		m := newTestMount(t)
		m.configure("app", nil)
		if err := m.storage.Storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(`{"min_ttl":"`)}); err != nil {
			t.Fatal(err)
		}
		m.InvalidateKey(t.Context(), key)
		if got := m.creds("app", nil); got.err == nil || !strings.Contains(got.err.Error(), key) {
			t.Errorf("got %v, want the key %s in it", got.err, key)
		}
	}
}

func TestNarrowedScopesHaveATokenForEachSet(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "c,a,b"})
		m.wantToken("app", 1)
		for _, all := range []any{"", " , ", []string{}, "a,b,c", "b a c b"} {
			if got := m.creds("app", map[string]any{"scopes": all}); !strings.HasPrefix(got.token, "token-1-") {
				t.Errorf("scopes %q: got %v, want the role's own token", all, got)
			}
		}
		for _, some := range []any{"a,b", "b a", []string{"b", "a", "a"}} {
			if got := m.creds("app", map[string]any{"scopes": some}); !strings.HasPrefix(got.token, "token-2-") {
				t.Errorf("scopes %q: got %v, want one token for that set", some, got)
			}
		}
		if got := m.mojo.last().scopes; !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("asked for the scopes %q", got)
		}
		text := m.refused(logical.ReadOperation, "creds/app", map[string]any{"scopes": "a,d"})
		if !strings.Contains(text, `scopes holds "d", which role "app" does not have`) {
			t.Errorf("got %q", text)
		}
		m.wantMints(2)

		m.write("roles/none", nil)
		m.refused(logical.ReadOperation, "creds/none", map[string]any{"scopes": "a"})
		m.refused(logical.ReadOperation, "creds/app", map[string]any{"min_ttl": "soon"})
		m.wantMints(2)

		// A change of the role ends the narrowed tokens too.
		m.write("roles/app", map[string]any{"audience": "x"})
		m.creds("app", map[string]any{"scopes": "a,b"})
		m.wantMints(3)
		m.do(logical.DeleteOperation, "roles/app", nil)
		if n := m.tokens.narrowed.Len(); n != 0 {
			t.Errorf("%d narrowed slots are left of a deleted role", n)
		}
	})
}

func TestNarrowedScopesAreBounded(t *testing.T) {
	bubble(t, func(m *testMount) {
		var scopes []string
		for i := range 12 {
			scopes = append(scopes, fmt.Sprintf("s%d", i))
		}
		m.configure("app", map[string]any{"scopes": scopes})
		for set := 1; set < 1<<12-1; set++ {
			var some []string
			for i, scope := range scopes {
				if set&(1<<i) != 0 {
					some = append(some, scope)
				}
			}
			if got := m.creds("app", map[string]any{"scopes": some}); got.err != nil {
				t.Fatal(got.err)
			}
		}
		if n := m.tokens.narrowed.Len(); n != maxNarrowed {
			t.Errorf("%d narrowed tokens are held, want %d", n, maxNarrowed)
		}
		// What was evicted is not minted ahead.
		n := m.mojo.mints.Load()
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		if got := m.mojo.mints.Load() - n; got > maxNarrowed {
			t.Errorf("%d tokens were minted ahead, want at most %d", got, maxNarrowed)
		}
	})
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
		m.wantToken("app", 2) // it is everybody's
		got := m.creds("app", map[string]any{"min_ttl": "2h"})
		if !strings.HasPrefix(got.token, "token-2-") || len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "its whole lifetime is 1h0m0s") {
			t.Errorf("got %v, want a warning that no token lives that long", got)
		}
		m.wantMints(2)
		// It narrows, never widens: the role's stays the least.
		m.write("roles/app", map[string]any{"min_ttl": "45m"})
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if got := m.creds("app", map[string]any{"min_ttl": "1m"}); !strings.HasPrefix(got.token, "token-3-") {
			t.Errorf("got %v, want the role's min_ttl kept", got)
		}
	})
}

func TestRotateRole(t *testing.T) {
	rotate := func(m *testMount) (*logical.Response, error) {
		return m.request(logical.UpdateOperation, "rotate-role/app", nil)
	}
	t.Run("replaces the token on every node", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", map[string]any{"scopes": "a,b"})
			m.wantToken("app", 1)
			m.creds("app", map[string]any{"scopes": "a"}) // 2
			time.Sleep(time.Minute)
			var resp *logical.Response
			m.elsewhere(func(o *testMount) { resp = o.do(logical.UpdateOperation, "rotate-role/app", nil) }, "roles/app") // 3
			if len(resp.Data) != 3 || resp.Data["last_vault_rotation"] != formatTime(time.Now()) || resp.Data["expires_at_seconds"] != time.Now().Add(time.Hour).Unix() {
				t.Errorf("got %v", resp.Data)
			}
			m.wantToken("app", 4)
			m.do(logical.UpdateOperation, "rotate-role/app", nil) // 5
			m.wantToken("app", 5)
			m.creds("app", map[string]any{"scopes": "a"})
			m.wantMints(6)
			if got := m.read("roles/app")["scopes"]; !slices.Equal(got.([]string), []string{"a", "b"}) {
				t.Errorf("the role has changed: %v", got)
			}
		})
	})
	t.Run("drops nothing when the mint fails", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m.mojo.set(func(s *standIn) { s.fail = errDown })
			_, err := rotate(m)
			wantStatus(t, err, http.StatusBadGateway, "HTTP 503")
			m.wantToken("app", 1)
			// A failure back-off is ignored.
			m.mojo.set(func(s *standIn) { s.fail = nil })
			if _, err := rotate(m); err != nil {
				t.Error(err)
			}
			m.wantToken("app", 3)
		})
	})
	t.Run("obeys Retry-After", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) {
				s.fail = &mintError{class: classThrottled, status: 429, retryAfter: time.Minute}
			})
			m.creds("app", nil)
			_, err := rotate(m)
			wantStatus(t, err, http.StatusBadGateway, "HTTP 429", "The next try is at")
			m.wantMints(1)
		})
	})
	t.Run("obeys a Retry-After for the role alone", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) {
				s.fail = &mintError{class: classRequestRefused, status: 429, oauthError: "invalid_request", retryAfter: time.Minute}
			})
			m.creds("app", nil)
			if resp, err := rotate(m); err != nil || !resp.IsError() {
				t.Errorf("got %v, %v", resp, err)
			}
			m.wantMints(1)
		})
	})
	t.Run("starts a mint of its own", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) { s.latency = 10 * time.Second })
			reader := make(chan got, 1)
			go func() { reader <- m.creds("app", nil) }()
			time.Sleep(time.Second)
			m.mojo.set(func(s *standIn) { s.latency = time.Second })
			if _, err := rotate(m); err != nil {
				t.Fatal(err)
			}
			m.wantToken("app", 2)
			if got := <-reader; !strings.HasPrefix(got.token, "token-1-") {
				t.Errorf("who came before got %v", got)
			}
			m.wantToken("app", 2) // the older mint's token was not kept
			m.wantMints(2)
		})
	})
	t.Run("of a role that is changed meanwhile", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) { s.latency = 10 * time.Second })
			done := make(chan *logical.Response, 1)
			go func() { resp, _ := rotate(m); done <- resp }()
			time.Sleep(time.Second)
			m.write("roles/app", map[string]any{"audience": "x"})
			if resp := <-done; !resp.IsError() || !strings.Contains(resp.Error().Error(), "was changed while") {
				t.Errorf("got %v", resp)
			}
		})
	})
	t.Run("of what is not there", func(t *testing.T) {
		m := newTestMount(t)
		if text := m.refused(logical.UpdateOperation, "rotate-role/app", nil); !strings.Contains(text, `role "app" does not exist`) {
			t.Errorf("got %q", text)
		}
	})
	t.Run("is forwarded", func(t *testing.T) {
		m := newTestMount(t)
		props := m.Route("rotate-role/app").Operations[logical.UpdateOperation].Properties()
		if !props.ForwardPerformanceStandby || !props.ForwardPerformanceSecondary {
			t.Error("it is not")
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

		// Revoking touches nothing, and works when everything is gone.
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

		// While no new token can be had, the lease on the old one is short.
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

// 10,000 readers share a role and do as ttl says: they must not come in a crowd.
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
			t.Errorf("the busiest second saw %d of %d readers, want fewer than 1 %%", busiest, readers)
		}
		t.Logf("the busiest second saw %d of %d readers; %d tokens were minted in 3 hours", busiest, readers, m.mojo.mints.Load())
	})
}

func TestMountsShareNothing(t *testing.T) {
	bubble(t, func(a *testMount) {
		b := newTestMount(a.t)
		a.configure("app", nil)
		b.configure("app", nil)
		a.wantToken("app", 1)
		b.wantToken("app", 1) // of its own stand-in
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

// Everything at once, for the race detector.
func TestManyThingsAtOnce(t *testing.T) {
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

// A reader must never be left with a number higher than that of what is held later:
// its slot would take everybody else for outdated.
func TestLaterEntriesHaveHigherNumbers(t *testing.T) {
	for _, change := range []string{"forget", "put"} {
		m := newTestMount(t)
		m.write("roles/app", nil)
		for range 20_000 {
			m.roles.forget("app")
			var early *held[roleEntry]
			var wg sync.WaitGroup
			wg.Go(func() { early, _ = m.roles.get(context.Background(), m.storage, "app") })
			if change == "put" {
				_, _ = m.roles.put(context.Background(), m.storage, "app", roleEntry{Config: "default"})
			} else {
				m.roles.forget("app")
			}
			later, _ := m.roles.get(context.Background(), m.storage, "app")
			wg.Wait()
			if early.seq > later.seq && early != later {
				now, _ := m.roles.get(context.Background(), m.storage, "app")
				if early.seq > now.seq {
					t.Fatalf("%s: a reader got number %d, and %d is held", change, early.seq, now.seq)
				}
			}
		}
	}
}

func TestTokenThatIsFirstReadInABackoffIsRenewed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("a", nil)
		m.write("roles/b", nil)
		m.creds("a", nil)
		m.creds("b", nil)
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		m.wantMints(4) // both ahead, and neither read since
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		m.mojo.set(func(s *standIn) {
			s.fail = &mintError{class: classThrottled, status: 429, retryAfter: 2 * time.Minute}
		})
		m.creds("a", nil)
		m.creds("b", nil)
		m.wantMints(5)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		time.Sleep(2*time.Minute + 2*time.Second)
		synctest.Wait()
		m.wantMints(7) // each by itself
	})
}

func TestTokenWhoseLifeIsOverOnArrivalIsAnError(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"max_ttl": "1s"})
		m.mojo.set(func(s *standIn) { s.latency = 1500 * time.Millisecond })
		for range 5 {
			wantStatus(t, m.creds("app", nil).err, http.StatusBadGateway, "was over when it arrived", "Check max_ttl")
		}
		m.wantMints(1) // and a back-off
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.latency = 0 })
		m.wantToken("app", 2)
	})
}

func TestColdReaderWaitsForTheProbe(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("a", nil)
		m.write("roles/b", nil)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("a", nil)
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, time.Second })
		go m.creds("a", nil)
		synctest.Wait()
		m.wantToken("b", 3) // not the error that is about to be outdated
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
				t.Errorf("%s: %v tokens before, want 2", name, got)
			}
			change(m)
			want := int64(0)
			if name == "rotated" { // the new one
				want = 1
			}
			if got := m.read("status")["cached_tokens"]; got != want {
				t.Errorf("%s: %v tokens after, want %d", name, got, want)
			}
		})
	}
}

// Not in a bubble, where time stands still while somebody waits for a lock.
func TestManyColdReadersCauseOneClient(t *testing.T) {
	m := newTestMount(t)
	var made atomic.Int64
	m.tokens.newClient = func(config *configEntry) (minter, error) {
		made.Add(1)
		time.Sleep(10 * time.Millisecond) // as asking Vault for its version takes
		return m.mojo.client(config)
	}
	m.write("config", testConfig(nil))
	var wg sync.WaitGroup
	for i := range 20 {
		m.write(fmt.Sprintf("roles/r%d", i), nil)
		wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
	}
	wg.Wait()
	m.wantMints(20)
	if got := made.Load(); got != 1 {
		t.Errorf("%d clients were made for one config, want 1", got)
	}
}

// What keeps a client from being made is told as it is, and tried again.
func TestClientThatCannotBeMadeIsToldAndTriedAgain(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		broken := errors.New("no certificate authorities")
		m.tokens.newClient = func(*configEntry) (minter, error) { return nil, broken }
		if got := m.creds("app", nil); !errors.Is(got.err, broken) {
			t.Errorf("got %v, want the reason", got.err)
		}
		if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); !errors.Is(err, broken) {
			t.Errorf("rotating: got %v, want the reason", err)
		}
		m.tokens.newClient = m.mojo.client
		m.write("config", map[string]any{"verify_connection": false})
		m.wantToken("app", 1)
	})
}

// What is written, here or on another node, also ends what the engine waits for by
// itself.
func TestWritesEndTheBackoffOfRefreshAhead(t *testing.T) {
	long := func(class errorClass, code string) *mintError {
		return &mintError{class: class, status: 429, oauthError: code, retryAfter: 10 * time.Minute}
	}
	for _, failure := range []*mintError{long(classThrottled, ""), long(classRequestRefused, "invalid_scope")} {
		for name, write := range map[string]func(m *testMount){
			"config": func(m *testMount) { m.write("config", map[string]any{"verify_connection": false}) },
			"config elsewhere": func(m *testMount) {
				m.elsewhere(func(o *testMount) { o.write("config", map[string]any{"verify_connection": false}) }, "config/default")
			},
			"role": func(m *testMount) { m.write("roles/app", map[string]any{"min_ttl": "1m"}) },
			"role elsewhere": func(m *testMount) {
				m.elsewhere(func(o *testMount) { o.write("roles/app", map[string]any{"min_ttl": "1m"}) }, "roles/app")
			},
		} {
			if strings.HasPrefix(name, "role") && failure.class == classThrottled {
				continue // that concerns the config
			}
			t.Run(name+" after "+string(failure.class), func(t *testing.T) {
				bubble(t, func(m *testMount) {
					m.configure("app", map[string]any{"scopes": "a,b"})
					m.wantToken("app", 1)
					m.creds("app", map[string]any{"scopes": "a"})
					m.mojo.set(func(s *standIn) { s.fail = failure })
					time.Sleep(45*time.Minute + 5*time.Second)
					synctest.Wait()
					failed := m.mojo.mints.Load()
					m.mojo.set(func(s *standIn) { s.fail = nil })
					write(m)
					time.Sleep(2 * time.Second) // the engine's own tries are spread
					synctest.Wait()
					m.wantMints(failed + 2)
				})
			})
		}
	}
}

// The wait belongs to what was asked for then.
func TestWritesEndTheRetryAfterOfRotateRole(t *testing.T) {
	for path, data := range map[string]map[string]any{
		"config":    {"verify_connection": false},
		"roles/app": {"audience": "x"},
	} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) {
				s.fail = &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_target", retryAfter: time.Minute}
			})
			m.creds("app", nil)
			m.refused(logical.UpdateOperation, "rotate-role/app", nil)
			m.wantMints(1)
			m.mojo.set(func(s *standIn) { s.fail = nil })
			m.write(path, data)
			m.do(logical.UpdateOperation, "rotate-role/app", nil)
			m.wantMints(2)
		})
	}
}

// Tokens that another node has dropped are not counted, and their memory is freed.
func TestTokensDroppedElsewhereAreFreed(t *testing.T) {
	for name, c := range map[string]struct {
		key    string
		change func(o *testMount)
	}{
		"role's audience": {"roles/app", func(o *testMount) { o.write("roles/app", map[string]any{"audience": "x"}) }},
		"fewer scopes":    {"roles/app", func(o *testMount) { o.write("roles/app", map[string]any{"scopes": "b"}) }},
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
					t.Errorf("%v tokens are counted, want 1", got)
				}
				if slots, narrowed := len(m.tokens.slots), m.tokens.narrowed.Len(); slots != 1 || narrowed != 0 {
					t.Errorf("%d and %d slots are held, want 1 and none", slots, narrowed)
				}
			})
		})
	}
}

// A change that cannot be looked up because storage fails is looked up later.
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
		if n := len(m.tokens.slots); n != 0 {
			t.Errorf("%d slots are left, want none", n)
		}
	})
}

func TestFailedMintsAreForgottenWhenNobodyReads(t *testing.T) {
	for _, failure := range []*mintError{
		errDown,
		{class: classRequestRefused, status: 400, oauthError: "invalid_scope"},
	} {
		bubble(t, func(m *testMount) {
			m.configure("app", map[string]any{"scopes": "a,b"})
			m.mojo.set(func(s *standIn) { s.fail = failure })
			m.creds("app", nil)
			m.creds("app", map[string]any{"scopes": "a"})
			time.Sleep(time.Hour)
			synctest.Wait()
			if slots, narrowed := len(m.tokens.slots), m.tokens.narrowed.Len(); slots != 0 || narrowed != 0 {
				t.Errorf("after %s: %d and %d slots are held, want none", failure.class, slots, narrowed)
			}
		})
	}
}

// Freeing slots must not make back-offs short again: a reader a second gets one mint
// after 5, 10, 20, and then every 30 seconds, each up to a fifth less.
func TestBackoffOfARequestGoesOnDoubling(t *testing.T) {
	for _, had := range []string{"no token", "a spent token"} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			if had == "a spent token" {
				m.wantToken("app", 1)
			}
			m.mojo.set(func(s *standIn) {
				s.fail = &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}
			})
			time.Sleep(59 * time.Minute)
			synctest.Wait()
			before := m.mojo.mints.Load()
			for range 300 {
				m.creds("app", nil)
				time.Sleep(time.Second)
			}
			if got := m.mojo.mints.Load() - before; got < 9 || got > 15 {
				t.Errorf("after %s: %d tokens were asked for in 5 minutes, want 9 to 15", had, got)
			}
		})
	}
}

// The rotation that was started last decides, whichever ends first.
func TestEarlierRotationDoesNotUndoALaterOne(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.latency = 10 * time.Second })
		earlier := make(chan *logical.Response, 1)
		go func() { earlier <- m.do(logical.UpdateOperation, "rotate-role/app", nil) }()
		time.Sleep(time.Second)
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		later := m.do(logical.UpdateOperation, "rotate-role/app", nil)
		m.wantToken("app", 2)
		if got := <-earlier; !reflect.DeepEqual(got.Data, later.Data) {
			t.Errorf("the earlier rotation answers %v, want what the later one did: %v", got.Data, later.Data)
		}
		m.wantToken("app", 2)
		m.wantMints(2)
	})
}

func TestRotateRoleKeepsTheTokenWhenTheNewOneIsOver(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		stored := m.storedRole("app")
		m.mojo.set(func(s *standIn) { s.latency = 4 * time.Second })
		done := make(chan error, 1)
		go func() {
			_, err := m.request(logical.UpdateOperation, "rotate-role/app", nil)
			done <- err
		}()
		time.Sleep(time.Second)
		m.write("roles/app", map[string]any{"max_ttl": "2s"})
		wantStatus(t, <-done, http.StatusBadGateway, `role "app"`, "was over when it arrived", "Check max_ttl")
		if got := m.storedRole("app"); got.TokenGeneration != stored.TokenGeneration {
			t.Error("the older tokens were dropped")
		}
		m.write("roles/app", map[string]any{"max_ttl": "1h"})
		m.wantToken("app", 1)
	})
}

// storedRole is the role as storage has it.
func (m *testMount) storedRole(name string) roleEntry {
	m.t.Helper()
	role, err := m.roles.load(context.Background(), m.storage, name)
	if err != nil || role == nil {
		m.t.Fatalf("loading role %s: %v, %v", name, role, err)
	}
	return role.entry
}

// unsureStorage, once it fails, fails each Put, and has applied it or not.
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

// A write that failed may have been applied all the same: what storage has counts.
func TestFailedWritesCountAsStorageHasThem(t *testing.T) {
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
				m.wantToken("app", want)
				if got := m.read("config")["client_id"] == "other"; got != (applies && path == "config") {
					t.Errorf("%s, applied %v: client_id is the new one: %v", path, applies, got)
				}
			})
		}
	}
}
