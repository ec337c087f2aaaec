// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// How minted_after serves a reader whose token the API refused.

func after(at time.Time) map[string]any {
	return map[string]any{"minted_after": formatTime(at)}
}

func TestManyDemandsForANewerTokenCauseOneMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		refused := after(time.Now())
		time.Sleep(10 * time.Second)
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-2-") || len(got.warnings) != 0 {
					t.Errorf("got %v, want the second token", got)
				}
			})
		}
		wg.Wait()
		m.wantMints(2)
		if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-2-") { // later
			t.Errorf("got %v, want the second token", got)
		}
		m.wantToken("app", 2)
	})
}

func TestDemandsInALoopCauseOneMintIn30Seconds(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(10 * time.Second)
		for range 600 { // a minute
			if got := m.creds("app", after(time.Now())); got.err != nil || len(got.warnings) > 1 {
				t.Fatalf("got %v", got)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := m.mojo.mints.Load(); n < 3 || n > 4 {
			t.Errorf("%d token requests, want one in 30s", n-1)
		}
	})
}

func TestTokenOfTheSameSecondIsNotNewer(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		refused := after(time.Now())
		time.Sleep(500 * time.Millisecond)
		m.creds("app", refused) // still in that second
		m.wantMints(2)
		got := m.creds("app", refused)
		if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "No token minted after") {
			t.Errorf("got %v, want a warning", got)
		}
		m.wantMints(2)
		time.Sleep(31 * time.Second)
		if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-3-") || len(got.warnings) != 0 {
			t.Errorf("got %v, want a token of a later second", got)
		}
	})
}

// A token minted on demand replaces the cached one even if it expires sooner.
func TestDemandedTokenReplacesOneThatExpiresLater(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		refused := after(time.Now())
		time.Sleep(10 * time.Second)
		m.mojo.set(func(s *standIn) { s.lifetime = time.Minute })
		if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-2-") {
			t.Errorf("got %v", got)
		}
		m.wantToken("app", 2)
	})
}

func TestDemandThatCannotBeMetIsAWarning(t *testing.T) {
	t.Run("down", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			refused := after(time.Now())
			m.mojo.set(func(s *standIn) { s.fail = errDown })
			time.Sleep(10 * time.Second)
			got := m.creds("app", refused)
			if !strings.HasPrefix(got.token, "token-1-") || len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "HTTP 503") {
				t.Errorf("got %v, want the cached token and the reason", got)
			}
			if got.ttl < 30 || got.ttl > 60 {
				t.Errorf("got ttl %d, want 30 to 60", got.ttl)
			}
		})
	})
	t.Run("slow", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			refused := after(time.Now())
			time.Sleep(10 * time.Second)
			m.mojo.set(func(s *standIn) { s.latency = 5 * time.Second })
			got, took := m.patiently("app", refused)
			if !strings.HasPrefix(got.token, "token-1-") || len(got.warnings) != 1 || took != 2*time.Second {
				t.Errorf("got %v after %s, want the cached token after 2s", got, took)
			}
			time.Sleep(4 * time.Second)
			if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-2-") {
				t.Errorf("got %v, want the token minted in the meantime", got)
			}
		})
	})
}

// If the gate is busy, the demand continues after its reader has left.
func TestDemandAtABusyGateContinues(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"max_requests_per_second": 1}))
		m.write("roles/app", nil)
		m.wantToken("app", 1)
		refused := after(time.Now())
		cold := m.coldRoles(15, func(time.Duration) {})
		time.Sleep(2 * time.Second)
		if got := m.creds("app", refused); !strings.HasPrefix(got.token, "token-1-") || len(got.warnings) != 1 {
			t.Errorf("got %v, want the cached token while other requests are more urgent", got)
		}
		cold.Wait()
		time.Sleep(2 * time.Second)
		if got := m.creds("app", refused); strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("got %v, want a newer token", got)
		}
	})
}

func TestDemandForAScopeSubset(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "a,b"})
		m.wantToken("app", 1)
		query := map[string]any{"scopes": "a"}
		m.creds("app", query)
		query["minted_after"] = formatTime(time.Now())
		time.Sleep(10 * time.Second)
		if got := m.creds("app", query); !strings.HasPrefix(got.token, "token-3-") {
			t.Errorf("got %v", got)
		}
		m.wantToken("app", 1)
	})
}

func TestInvalidMintedAfter(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		for sent, want := range map[string]string{
			"yesterday":                               "last_vault_rotation",
			"1767225600":                              "last_vault_rotation",
			"2026-01-01":                              "last_vault_rotation",
			formatTime(time.Now().Add(time.Second)):   "later than both the current time",
			strings.Repeat("2", 257):                  "minted_after",
			formatTime(time.Now().Add(time.Hour * 9)): "later than both the current time",
		} {
			if text := m.refused(logical.ReadOperation, "creds/app", map[string]any{"minted_after": sent}); !strings.Contains(text, want) || !strings.Contains(text, "minted_after") {
				t.Errorf("%q: got %q, want it to contain %q", sent, text, want)
			}
		}
		m.creds("app", map[string]any{"minted_after": ""})
		m.wantMints(1)
	})
}

// The node's clock is behind that of the node that minted the token.
func TestMintedAfterMayBeAheadOfTheClockWithItsToken(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.alter = func(tok *token) { tok.mintedAt = tok.mintedAt.Add(5 * time.Second) } })
		m.wantToken("app", 1)
		if got := m.creds("app", after(time.Now().Add(5*time.Second))); got.err != nil {
			t.Errorf("got %v", got.err)
		}
	})
}
