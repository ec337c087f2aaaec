// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Whatever a token endpoint does, a read is answered within request_timeout plus a
// second. The endpoint here takes a request and never says a word, and the client does
// not notice that its context has ended.
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
	t.Run("with a token that comes to its floor meanwhile", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.write("config", testConfig(map[string]any{"request_timeout": "2s"}))
			m.write("roles/app", nil)
			m.wantToken("app", 1)
			time.Sleep(40 * time.Minute)
			defer silent(m)() // before the token is renewed
			time.Sleep(19*time.Minute - time.Second)
			for range 5 {
				if got, took := m.patiently("app", nil); took > bound {
					t.Errorf("the read took %s and got %v, want an answer within %s", took, got, bound)
					break
				}
				time.Sleep(500 * time.Millisecond)
			}
		})
	})
}

// The deadline is the read's, not each wait's: a reader who waited for the probe of
// another role has only the rest of it for a mint of its own. That mint goes on, for
// whoever comes next.
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
			t.Errorf("a reader waited %s for a probe of 9s and a mint of 9s, want an answer within 11s (got %v)", took, got)
		}
		if got := <-probe; got.err != nil {
			t.Errorf("the probe's reader got %v", got.err)
		}
		time.Sleep(10 * time.Second)
		if got, took := m.patiently("second", nil); got.err != nil || took != 0 {
			t.Errorf("after the mint has ended a read took %s and got %v, want its token at once", took, got.err)
		}
		m.wantMints(3)
	})
}

// A token that is at or below its floor when it arrives is a failed mint, with a class
// of its own that everything which counts failures counts.
func TestTokenOverOnArrivalIsCountedAsAFailure(t *testing.T) {
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
					t.Errorf("before the first mint the metrics do not tell %s", line)
				}
				m.mojo.set(func(s *standIn) { s.latency = latency })
				got := m.creds("app", nil)
				wantStatus(t, got.err, http.StatusBadGateway, `role "app"`, "max_ttl")
				if got.err != nil && strings.Contains(got.err.Error(), "holds no token") {
					t.Errorf("the error contradicts itself: %v", got.err)
				}

				status := m.read("status")
				if failures := status["mint_failures"].(map[string]any); failures["expired_on_arrival"] != int64(1) || len(failures) != 1 {
					t.Errorf("mint_failures: got %v, want one expired_on_arrival", failures)
				}
				if status["mints"] != int64(0) {
					t.Errorf("mints: got %v, want 0: nobody got that token", status["mints"])
				}
				config := status["configs"].(map[string]any)["default"].(map[string]any)
				if config["last_error_class"] != "expired_on_arrival" || config["last_error"] == nil || config["last_error_at"] == nil {
					t.Errorf("the config tells %v, want the failure", config)
				}
				if config["last_mint_at"] != nil {
					t.Errorf("last_mint_at: got %v, want none", config["last_mint_at"])
				}
				if line := `mojoauth_mints_total{config="default",result="expired_on_arrival"} 1`; !strings.Contains(m.metrics(), line) {
					t.Errorf("the metrics do not tell %s", line)
				}

				// It concerns the role alone.
				m.creds("app", nil)
				m.wantMints(1)
				if got := m.creds("other", nil); got.err != nil {
					t.Errorf("another role got %v", got.err)
				}
			})
		})
	}
}
