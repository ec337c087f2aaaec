// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// When the engine mints the next token of a role, and which of two tokens it keeps.

// renewed is the latest time at which a one-hour token is renewed: L/100 before R.
const renewed = 45*time.Minute - time.Hour/100

func TestTokenInUseIsRenewedAheadOfReads(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.random = func() float64 { return 0 }
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(renewed - 1)
		synctest.Wait()
		m.wantMints(1)
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		m.wantMints(2) // before R, without a reader
		m.mojo.set(func(s *standIn) { s.latency = time.Hour })
		began := time.Now()
		m.wantToken("app", 2)
		if time.Since(began) != 0 {
			t.Error("the reader waited")
		}
	})
}

// A reader may have loaded its role just before a write, and make the slot just after it.
func TestSlotOfAnOlderRoleIsRenewedByTheNewer(t *testing.T) {
	for name, test := range map[string]struct {
		before, after string
		renewed       time.Duration
	}{
		"min_ttl lowered": {"45m", "0", 45*time.Minute - time.Hour/100},
		"min_ttl raised":  {"0", "45m", 15*time.Minute - time.Hour/100},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", map[string]any{"min_ttl": test.before})
				m.wantToken("app", 1)
				m = m.restart()
				m.random = func() float64 { return 0 }
				loading, written := make(chan struct{}), make(chan struct{})
				hook := func(key string) {
					if key == "config/default" {
						m.storage.afterGet.Store(nil)
						close(loading)
						<-written
					}
				}
				m.storage.afterGet.Store(&hook)
				done := make(chan struct{})
				go func() {
					defer close(done)
					m.wantToken("app", 1)
				}()
				<-loading
				m.write("roles/app", map[string]any{"min_ttl": test.after})
				close(written)
				<-done
				time.Sleep(test.renewed - time.Second)
				synctest.Wait()
				m.wantMints(1)
				time.Sleep(2 * time.Second)
				synctest.Wait()
				m.wantMints(2)
			})
		})
	}
}

func TestIdleRoleLapses(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		m.wantMints(2) // renewed once, because the first token was read
		time.Sleep(48 * time.Hour)
		synctest.Wait()
		m.wantMints(2)
		if n := m.kept().slots; n != 0 {
			t.Errorf("got %d slots of an idle role, want 0", n)
		}
		m.wantToken("app", 3)
	})
}

func TestRenewalTriesAgainAfterEachBackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.random = func() float64 { return 0 }
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(renewed + 2*time.Millisecond)
		synctest.Wait()
		m.wantMints(2)
		time.Sleep(36 * time.Second) // 5, 10, 20 s
		synctest.Wait()
		m.wantMints(5)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		time.Sleep(30 * time.Second)
		synctest.Wait()
		n := m.mojo.mints.Load()
		m.wantToken("app", n) // minted before the read, so the reader does not wait
		m.wantMints(n)

		// Past the floor the engine does not try again without a reader.
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(60 * time.Minute)
		synctest.Wait()
		n = m.mojo.mints.Load()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		m.wantMints(n)
	})
}

func TestTokenFirstReadInABackoffIsRenewed(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("a", nil)
		m.write("roles/b", nil)
		m.creds("a", nil)
		m.creds("b", nil)
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		m.wantMints(4) // both renewed, and neither read since
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
		m.wantMints(7) // each automatically
	})
}

// The engine keeps the token that expires later. An answer with a token that expires no
// later renews nothing, and its key backs off as after a failure.
func TestTokenThatExpiresNoLaterRenewsNothing(t *testing.T) {
	for name, lifetime := range map[string]time.Duration{
		"sooner":           5 * time.Minute,
		"at the same time": 45 * time.Minute,
	} {
		t.Run("a reader requests a longer lifetime and gets a token that expires "+name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.write("roles/other", nil)
				m.wantToken("app", 1)
				end := m.read("creds/app")["expires_at_seconds"]
				time.Sleep(15 * time.Minute) // 45 left
				m.mojo.set(func(s *standIn) { s.lifetime = lifetime })
				for range 10 {
					got := m.creds("app", map[string]any{"min_ttl": "50m"})
					if got.err != nil || !strings.HasPrefix(got.token, "token-1-") || len(got.warnings) != 1 {
						t.Errorf("got %v, want the token that expires later, with a warning", got)
						break
					}
				}
				m.wantToken("app", 1)
				if got := m.read("creds/app")["expires_at_seconds"]; got != end {
					t.Errorf("expires_at_seconds: got %v, want %v as before", got, end)
				}
				m.wantMints(2) // and then a back-off
				if got := m.creds("other", nil); got.err != nil {
					t.Errorf("another role got %v: only the key should back off", got.err)
				}
				time.Sleep(5 * time.Second)
				m.mojo.set(func(s *standIn) { s.lifetime = time.Hour })
				if got := m.creds("app", map[string]any{"min_ttl": "50m"}); !strings.HasPrefix(got.token, "token-4-") {
					t.Errorf("after the back-off got %v, want the new token, which expires later", got)
				}
			})
		})
	}

	t.Run("a renewal gets a token that expires sooner", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			began := time.Now()
			m.mojo.set(func(s *standIn) { s.lifetime = 5 * time.Minute })
			for time.Since(began) < 54*time.Minute { // while the first expires later than a new one
				time.Sleep(20 * time.Second)
				if got := m.creds("app", nil); got.err != nil || !strings.HasPrefix(got.token, "token-1-") {
					m.t.Fatalf("after %s got %v, want the token that expires later", time.Since(began), got)
				}
			}
			// It is due after 42 to 45 minutes.
			if n := m.mojo.mints.Load() - 1; n < 15 || n > 35 {
				t.Errorf("%d renewals in 9 to 12 minutes, want one for each back-off of 24s to 30s", n)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if got := m.creds("app", nil); got.err != nil || strings.HasPrefix(got.token, "token-1-") {
				t.Errorf("after 56m got %v, want a new token, which now expires later", got)
			}
		})
	})

	t.Run("a rotation uses any new token", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m.mojo.set(func(s *standIn) { s.lifetime = 5 * time.Minute })
			m.write("rotate-role/app", nil)
			m.wantToken("app", 2)
		})
	})
}

// A token with another lifetime has another floor. The engine keeps the token that it can
// serve longer, even if the other one expires later.
func TestTokenThatCanBeServedLongerIsKept(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(58*time.Minute + 58*time.Second) // 62 s left, 2 s of them above the floor
		synctest.Wait()
		m.mojo.set(func(s *standIn) { s.fail, s.lifetime = nil, 61*time.Second })
		n := m.mojo.mints.Load() + 1
		m.write("config", map[string]any{"verify_connection": false}) // ends the back-off
		synctest.Wait()
		m.wantToken("app", n)
		time.Sleep(3 * time.Second)
		m.wantToken("app", n) // the older one would be at its floor
	})
}

// The back-off after an answer with no newer token ends with the cached token: MojoAuth
// works, so a reader that finds no token may request one.
func TestRepeatedTokenDoesNotDelayTheNextOne(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.lifetime = 2 * time.Second })
		end := time.Now().Add(59 * time.Minute) // the floor
		for time.Until(end) > 0 {
			m.creds("app", nil)
			time.Sleep(time.Second)
		}
		m.mojo.set(func(s *standIn) { s.lifetime = time.Hour })
		if got := m.creds("app", nil); got.err != nil {
			t.Errorf("after the cached token reached its floor: got %v, want a new token immediately", got)
		}
	})
}
