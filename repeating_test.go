// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// Some token endpoints cache tokens themselves: they return the same one until it
// expires, with its remaining lifetime.

// repeats makes the endpoint return the same one-hour token until it expires, and then
// the next.
func (m *testMount) repeats() {
	var ends time.Time
	serial := 0
	m.mojo.set(func(s *standIn) {
		s.alter = func(tok *token) {
			left := ends.Sub(tok.mintedAt).Truncate(time.Second)
			if left < time.Second {
				serial++
				ends, left = tok.mintedAt.Add(time.Hour), time.Hour
			}
			tok.accessToken, tok.reported = fmt.Sprintf("same-%d", serial), left
		}
	})
}

func TestRepeatedTokenKeepsItsTimes(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.repeats()
		first := m.read("creds/app")
		for range 11 {
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			got := m.read("creds/app")
			for _, key := range []string{"access_token", "last_vault_rotation", "expires_at", "expires_at_seconds", "rotation_period"} {
				if got[key] != first[key] {
					t.Errorf("%s: got %v, want %v from the first time the token was returned", key, got[key], first[key])
				}
			}
		}
		if m.mojo.mints.Load() < 2 {
			t.Error("there was no second token request: the test shows nothing")
		}
	})
}

// The expiry only moves earlier, whatever later answers say.
func TestRepeatedTokenKeepsItsEarliestExpiry(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.alter = func(tok *token) { tok.accessToken = "same" } })
		first := m.read("creds/app")
		began := time.Now()
		for i, c := range []struct {
			after, says, end time.Duration // the time, the remaining lifetime reported, the token's expiry
		}{
			{18 * time.Minute, time.Hour, 60 * time.Minute},
			{19 * time.Minute, 20 * time.Minute, 39 * time.Minute},
			{20 * time.Minute, time.Hour, 39 * time.Minute},
		} {
			time.Sleep(time.Until(began.Add(c.after)))
			m.mojo.set(func(s *standIn) { s.lifetime = c.says })
			m.creds("app", map[string]any{"min_ttl": "45m"}) // makes the token due
			m.wantMints(int64(i) + 2)
			got := m.read("creds/app")
			if want := began.Add(c.end).Unix(); got["expires_at_seconds"] != want {
				t.Errorf("after %s, and an answer that reports %s: got expiry %v, want %d", c.after, c.says, got["expires_at_seconds"], want)
			}
			if got["last_vault_rotation"] != first["last_vault_rotation"] {
				t.Errorf("after %s: got last_vault_rotation %v, want %v from the first time the token was returned", c.after, got["last_vault_rotation"], first["last_vault_rotation"])
			}
		}
	})
}

// The engine requests a token from such an endpoint at the pace of the back-off. Readers
// get the token until 5 s before it expires, and the next one soon after.
func TestRepeatedTokenIsServedUntilFiveSecondsBeforeItExpires(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.repeats()
		m.creds("app", nil)
		end := time.Now().Add(time.Hour)
		for time.Until(end) > 20*time.Minute {
			time.Sleep(time.Minute)
			m.creds("app", nil)
		}
		before := m.mojo.mints.Load()
		unwarned := 0
		for time.Until(end) > 5*time.Second {
			got := m.creds("app", nil)
			left := time.Until(end)
			if got.err != nil || got.token != "same-1" || got.ttl < 1 {
				m.t.Fatalf("with %s left got %v, want the token that the endpoint repeats", left, got)
			}
			if left <= time.Minute && len(got.warnings) == 0 {
				unwarned++
			}
			time.Sleep(time.Second)
		}
		if unwarned != 0 {
			t.Errorf("below its floor the token was served %d times without a warning", unwarned)
		}
		asked := m.mojo.since(before)
		for i := 1; i < len(asked); i++ {
			if gap := asked[i].Sub(asked[i-1]); gap < 4*time.Second {
				t.Errorf("requests %d and %d for a repeated token were %s apart, want a back-off of at least 4s", i, i+1, gap)
				break
			}
		}
		// Due from 18 to 15 minutes before it expires.
		if n := len(asked); n < 20 || n > 50 {
			t.Errorf("%d requests for a repeated token, want one for each back-off of 24s to 30s", n)
		}
		for time.Until(end) > 0 {
			if got := m.creds("app", nil); got.token == "same-1" {
				t.Errorf("with %s left the token is still served", time.Until(end))
				break
			}
			time.Sleep(time.Second)
		}
		for m.creds("app", nil).token != "same-2" {
			if since := time.Since(end); since > 31*time.Second {
				m.t.Fatalf("%s after the token's expiry there is no new one", since)
			}
			time.Sleep(time.Second)
		}
	})
}
