// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What the gate means for reads, writes and rotations. Tests of its order and pace are in
// internal/gate.

// coldRoles writes n roles, and reads each in its own goroutine until it has a token,
// retrying a second after each error. It calls served for each token.
func (m *testMount) coldRoles(n int, served func(after time.Duration)) *sync.WaitGroup {
	m.t.Helper()
	began := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		name := fmt.Sprintf("cold%d", i)
		m.write("roles/"+name, nil)
		wg.Go(func() {
			for m.creds(name, nil).err != nil {
				time.Sleep(time.Second)
			}
			served(time.Since(began))
		})
	}
	return &wg
}

// busiest returns the most requests in any second.
func busiest(sent []time.Time) (most int) {
	first := 0
	for i, at := range sent {
		for at.Sub(sent[first]) >= time.Second {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// allowing answers requests beyond n a second with 429.
func (s *standIn) allowing(n int, latency, retryAfter time.Duration) (refused *atomic.Int64) {
	refused = new(atomic.Int64)
	var mu sync.Mutex
	var allowed []time.Time
	s.set(func(s *standIn) {
		s.respond = func(tokenRequest) (time.Duration, error) {
			mu.Lock()
			defer mu.Unlock()
			now := time.Now()
			if len(allowed) >= n && now.Sub(allowed[len(allowed)-n]) < time.Second {
				refused.Add(1)
				return latency, &mintError{class: classThrottled, status: 429, retryAfter: retryAfter}
			}
			allowed = append(allowed, now)
			return latency, nil
		}
	})
	return refused
}

func TestColdRolesMakeNoPeak(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) { s.latency = 50 * time.Millisecond })
		var last atomic.Int64
		m.coldRoles(300, func(after time.Duration) { last.Store(int64(after)) }).Wait()
		if took := time.Duration(last.Load()); took > 25*time.Second {
			t.Errorf("300 cold roles took %s at 20 a second, want at most 25s", took)
		}
		if most := busiest(m.mojo.since(0)); most > 20 {
			t.Errorf("got %d requests in a second, want at most 20", most)
		}
		m.wantMints(300)
	})
}

func TestColdRolesOfAThrottlingEndpoint(t *testing.T) {
	for _, retryAfter := range []time.Duration{0, time.Second} {
		t.Run(fmt.Sprint("Retry-After ", retryAfter), func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config", testConfig(nil))
				refused := m.mojo.allowing(5, 50*time.Millisecond, retryAfter)
				var last atomic.Int64
				m.coldRoles(200, func(after time.Duration) { last.Store(int64(after)) }).Wait()
				if took := time.Duration(last.Load()); took > 60*time.Second {
					t.Errorf("200 cold roles took %s at 5 a second, want at most 60s", took)
				}
				if n, all := refused.Load(), m.mojo.mints.Load(); n == 0 || 10*n > all {
					t.Errorf("%d of %d requests were throttled, want at least 1 and at most a tenth", n, all)
				}
			})
		})
	}
}

func TestThrottlingCausesNoBackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/other", nil)
		m.mojo.set(func(s *standIn) {
			s.fail, s.latency = &mintError{class: classThrottled, status: 429}, 100*time.Millisecond
		})
		both := make(chan got, 2)
		for _, role := range []string{"app", "other"} {
			go func() { both <- m.creds(role, nil) }()
		}
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		for range 2 {
			if got := <-both; got.err != nil {
				t.Errorf("a reader that waited during the throttling got %v", got.err)
			}
		}
		status := m.read("status")
		if failures := status["mint_failures"].(map[string]any); len(failures) != 0 {
			t.Errorf("got the failures %v, want none", failures)
		}
		if config := status["configs"].(map[string]any)["default"].(map[string]any); config["last_error"] != nil || config["next_attempt_at"] != nil {
			t.Errorf("got the status %v, want no error", config)
		}
	})
}

// A reader that has waited as long as it may gets an error with the gate's state.
func TestReaderWithoutATurn(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("warm", map[string]any{"min_ttl": "20m"})
		m.wantToken("warm", 1)
		m.mojo.set(func(s *standIn) {
			s.fail, s.latency = &mintError{class: classThrottled, status: 429}, 100*time.Millisecond
		})
		m.write("roles/cold", nil)
		got, took := m.patiently("cold", nil)
		wantStatus(t, got.err, http.StatusTooManyRequests, `role "cold"`, `config "default"`, "waiting", "per second", "MojoAuth is throttling", "Try again in")
		resp, _ := m.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/cold", Storage: m.storage})
		if resp == nil || len(resp.Headers["Retry-After"]) != 1 || resp.IsError() || resp.Data != nil {
			t.Fatalf("got the response %v with the error, want only a Retry-After header", resp)
		}
		if n, err := strconv.Atoi(resp.Headers["Retry-After"][0]); err != nil || n < 1 || n > 30 {
			t.Errorf("got the headers %v, want 1 to 30 seconds", resp.Headers)
		}
		if took < 10*time.Second || took > 11*time.Second {
			t.Errorf("took %s, want request_timeout and a second", took)
		}
		time.Sleep(45 * time.Minute)
		got, took = m.patiently("warm", nil)
		if !strings.HasPrefix(got.token, "token-1-") || took > 2*time.Second || len(got.warnings) != 1 {
			t.Errorf("after %s a reader of a due token got %v, want that token with a warning within 2s", took, got)
		} else if !strings.Contains(got.warnings[0], "MojoAuth is throttling") {
			t.Errorf("got the warning %q, want it to say that MojoAuth throttles", got.warnings[0])
		}
	})
}

func TestRetryAfterBeyondAReadsTimeFailsImmediately(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/other", nil)
		m.mojo.set(func(s *standIn) {
			s.fail = &mintError{class: classThrottled, status: 429, retryAfter: 20 * time.Second}
		})
		closed := func() {
			t.Helper()
			for _, role := range []string{"app", "other"} {
				got, took := m.patiently(role, nil)
				wantStatus(t, got.err, http.StatusTooManyRequests, "Retry-After")
				if took != 0 {
					t.Errorf("took %s", took)
				}
			}
			m.wantMints(1)
		}
		closed()
		_, err := m.request(logical.UpdateOperation, "rotate-role/app", nil)
		wantStatus(t, err, http.StatusTooManyRequests, "Retry-After")
		// Writing the config does not open the gate, and a verification waits for it too.
		m.write("config", map[string]any{"verify_connection": false, "max_retries": 1})
		closed()
		if text := m.refused(logical.UpdateOperation, "config", map[string]any{"max_retries": 3}); !strings.Contains(text, "verify_connection=false") {
			t.Errorf("a verification got %q", text)
		}
		m.wantMints(1)

		time.Sleep(10 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		if got, took := m.patiently("app", nil); got.err != nil || took > 10*time.Second {
			t.Errorf("a reader with enough time got %v after %s, want a token when the gate opens", got.err, took)
		}
	})
}

// A verification that gets no turn says so, and does not blame the network.
func TestVerificationWithoutATurn(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classThrottled, status: 429} })
		text := m.refused(logical.UpdateOperation, "config", map[string]any{"max_retries": 3})
		for _, part := range []string{"no turn", "MojoAuth is throttling", "verify_connection=false"} {
			if !strings.Contains(text, part) {
				t.Errorf("got %q, want it to contain %q", text, part)
			}
		}
	})
}

func TestVerificationOfADeletedConfig(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classThrottled, status: 429} })
		go func() {
			time.Sleep(5 * time.Second)
			m.do(logical.DeleteOperation, "config", nil)
		}()
		if text := m.refused(logical.UpdateOperation, "config", map[string]any{"max_retries": 3}); !strings.Contains(text, "changed during this request") {
			t.Errorf("got %q", text)
		}
	})
}

func TestNewEndpointHasANewGate(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) {
			s.fail = &mintError{class: classThrottled, status: 429, retryAfter: 10 * time.Minute}
		})
		wantStatus(t, m.creds("app", nil).err, http.StatusTooManyRequests)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		m.write("config", testConfig(map[string]any{"token_url": "https://other.mojoauth.test/", "verify_connection": true}))
		m.wantToken("app", 3)
	})
}

func TestLimitAppliesToWaitingRequests(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"max_requests_per_second": 1}))
		wg := m.coldRoles(20, func(time.Duration) {})
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if n := m.mojo.mints.Load(); n > 6 {
			t.Errorf("got %d requests in 5 seconds at 1 a second", n)
		}
		m.write("config", map[string]any{"max_requests_per_second": 1000, "verify_connection": false})
		began := time.Now()
		wg.Wait()
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("after the limit was raised, the others took %s", took)
		}
	})
}

// When a back-off begins, readers that wait for a turn get its error immediately.
func TestBackoffEndsTheWaitingAtTheGate(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		refused := &mintError{class: classClientRefused, status: 401, oauthError: "invalid_client"}
		m.mojo.set(func(s *standIn) { s.fail, s.latency = refused, 100*time.Millisecond })
		var wg sync.WaitGroup
		for i := range 30 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			wg.Go(func() {
				got, took := m.patiently(fmt.Sprintf("r%d", i), nil)
				if got.err == nil || !strings.Contains(got.err.Error(), "invalid_client") || took != 100*time.Millisecond {
					t.Errorf("got %v after %s, want the first one's failure as soon as it happened", got.err, took)
				}
			})
		}
		wg.Wait()
		m.wantMints(1)
	})
}

// While a reader's request waits for a turn, its old token reaches its floor. From then
// on it is a reader without a token, and keeps waiting.
func TestReaderWhoseTokenExpiresAtTheGateKeepsWaiting(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.lifetime = 8 * time.Second })
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classThrottled, status: 429} })
		time.Sleep(6500 * time.Millisecond) // 700 ms before the floor
		reader := make(chan got, 1)
		go func() { reader <- m.creds("app", nil) }()
		time.Sleep(time.Second)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		if got := <-reader; got.err != nil || strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("got %v, want the next token", got)
		}
	})
}

// A verification and the config's mints use the same endpoint, so it passes the same
// gate, even if no mint has used that gate yet.
func TestVerificationPassesTheGateOfTheMintsAfterIt(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classThrottled, status: 429, retryAfter: time.Minute} })
		m.refused(logical.UpdateOperation, "config", testConfig(map[string]any{"verify_connection": true}))
		m.mojo.set(func(s *standIn) { s.fail = nil })
		m.configure("app", nil)
		wantStatus(t, m.creds("app", nil).err, http.StatusTooManyRequests, "Retry-After")
		m.wantMints(1)
	})
}

// A request has the whole request_timeout, no matter how late it leaves, and no error
// reports a timeout that the request had no time to reach.
func TestTimeAtTheGateIsNotATimeout(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) {
			s.respond = func(tokenRequest) (time.Duration, error) {
				if s.mints.Load() == 1 {
					return 0, &mintError{class: classThrottled, status: 429, retryAfter: 9 * time.Second}
				}
				return 8 * time.Second, nil
			}
		})
		wantStatus(t, m.creds("app", nil).err, http.StatusTooManyRequests, "has not answered yet")
		time.Sleep(7 * time.Second)
		m.wantToken("app", 2) // the request continued without the reader
		m.wantMints(2)
	})
}

// If writes of the role or config take up all of a reader's time, the error says to try
// again.
func TestReadDelayedByWritesMayBeRetried(t *testing.T) {
	_, err := mintFailure("app", errOutdated)
	wantStatus(t, err, http.StatusTooManyRequests, `role "app"`, "Try again")
}

func TestNoRequestForReadersWhoLeftBeforeTheirTurn(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("first", nil)
		m.creds("first", nil)
		for i := range 50 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			ctx, cancel := context.WithCancel(context.Background())
			go m.credsCtx(ctx, fmt.Sprintf("r%d", i), nil)
			synctest.Wait()
			cancel()
		}
		time.Sleep(10 * time.Minute) // for part of it, slots remember that storage had no token
		synctest.Wait()
		m.wantMints(1)
		if n := m.kept().slots; n != 1 {
			t.Errorf("got %d slots, want only that of the role with a token", n)
		}
	})
}

// If a role is deleted while its reader waits for a turn, the engine requests no token
// for it.
func TestNoRequestForADeletedRole(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("first", nil)
		m.write("roles/gone", nil)
		m.creds("first", nil)
		reader := make(chan got, 1)
		go func() { reader <- m.creds("gone", nil) }()
		synctest.Wait()
		m.do(logical.DeleteOperation, "roles/gone", nil)
		if got := <-reader; got.err == nil || !strings.Contains(got.err.Error(), "does not exist") {
			t.Errorf("got %v", got)
		}
		time.Sleep(time.Second)
		m.wantMints(1)
	})
}

// Neither reading many subsets of a role nor rotating it in a loop holds up other roles.
func TestGreedyCallersDelayNoOthers(t *testing.T) {
	scopes := manyScopes(12)
	const greedy = 100 // concurrent
	for name, grab := range map[string]func(m *testMount, i int){
		"subsets": func(m *testMount, i int) {
			for n, set := range subsets(scopes, 4096) {
				if n%greedy == i {
					m.creds("greedy", map[string]any{"scopes": set})
				}
			}
		},
		"rotations": func(m *testMount, _ int) {
			for range 50 {
				_, _ = m.request(logical.UpdateOperation, "rotate-role/greedy", nil)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("greedy", map[string]any{"scopes": scopes})
				m.write("roles/other", nil)
				m.mojo.set(func(s *standIn) { s.latency = 50 * time.Millisecond })
				for i := range greedy {
					go grab(m, i)
				}
				time.Sleep(10 * time.Second)
				roles := []string{"other"}
				if name == "subsets" {
					roles = append(roles, "greedy")
				}
				for _, role := range roles {
					if got, took := m.patiently(role, nil); got.err != nil || took > time.Second {
						t.Errorf("a first read of %s got %v after %s, want a token within a second", role, got.err, took)
					}
				}
				time.Sleep(20 * time.Minute) // until the greedy callers are done
			})
		})
	}
}

// Even at a limit of one request a second, a loop of rotations leaves room for other
// requests.
func TestRotationsInALoopStarveNoOthers(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"max_requests_per_second": 1}))
		m.write("roles/greedy", nil)
		for range 50 {
			go func() {
				for range 30 {
					_, _ = m.request(logical.UpdateOperation, "rotate-role/greedy", nil)
				}
			}()
		}
		time.Sleep(10 * time.Second)
		m.coldRoles(30, func(after time.Duration) {
			if after > 45*time.Second {
				t.Errorf("one of 30 roles without a token waited %s", after)
			}
		}).Wait()
	})
}

// Renewals of roles that were minted together are spread out, and all are in time.
func TestRenewalsAreSpread(t *testing.T) {
	bubble(t, func(m *testMount) {
		const roles = 500
		m.write("config", testConfig(nil))
		m.mojo.unpaced = true
		for i := range roles {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			m.creds(fmt.Sprintf("r%d", i), nil)
		}
		time.Sleep(45 * time.Minute)
		synctest.Wait()
		m.wantMints(2 * roles)
		sent := m.mojo.since(roles)
		slices.SortFunc(sent, time.Time.Compare)
		if took := sent[len(sent)-1].Sub(sent[0]); took < 2*time.Minute || took > time.Hour/25 {
			t.Errorf("500 one-hour tokens that were minted together were renewed within %s, want most of 2m24s", took)
		}
		if most := busiest(sent); most > 20 {
			t.Errorf("%d renewals were in one second", most)
		}
	})
}

// During a rush of reads without a token, renewals of cached tokens come first once they
// are urgent.
func TestNoTokenExpiresInAStormOfColdReaders(t *testing.T) {
	bubble(t, func(m *testMount) {
		const warm = 30
		m.write("config", testConfig(map[string]any{"max_requests_per_second": 1}))
		m.mojo.set(func(s *standIn) { s.lifetime, s.latency = 5*time.Minute, 50*time.Millisecond })
		m.mojo.unpaced = true
		for i := range warm {
			m.write(fmt.Sprintf("roles/warm%d", i), nil)
			m.creds(fmt.Sprintf("warm%d", i), nil)
		}
		m.mojo.unpaced = false
		storm := m.coldRoles(400, func(time.Duration) {})
		for range 330 {
			time.Sleep(time.Second)
			for i := range warm {
				if got, took := m.patiently(fmt.Sprintf("warm%d", i), nil); got.err != nil || took > 2*time.Second {
					t.Fatalf("a role with a cached token got %v after %s", got.err, took)
				}
			}
			synctest.Wait()
		}
		storm.Wait()
	})
}

// A renewal that more urgent requests crowd out is tried again automatically.
func TestCrowdedOutRenewalComesBack(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.random = func() float64 { return 0 }
		m.configure("warm", nil)
		m.wantToken("warm", 1)
		m.write("config", map[string]any{"max_requests_per_second": 1, "verify_connection": false})
		time.Sleep(renewed - 5*time.Second)
		m.wantToken("warm", 1)
		var wg sync.WaitGroup
		for i := range 10_100 { // the gate has 10,000 places
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
		}
		time.Sleep(5 * time.Second)
		for range 3 {
			time.Sleep(time.Second)
			if n := m.read("status")["mint_failures"].(map[string]any)["no_turn"].(int64); n > 200 {
				t.Errorf("%d mints got no turn: the renewal was tried too often", n)
			}
		}
		wg.Wait()
		if n := m.read("status")["mint_failures"].(map[string]any)["no_turn"].(int64); n == 0 {
			t.Error("nothing was crowded out: the test shows nothing")
		}
		time.Sleep(time.Minute)
		n := m.mojo.mints.Load()
		if got := m.creds("warm", nil); got.err != nil || strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("after the rush, a reader got %v, want the next token", got)
		}
		m.wantMints(n)
	})
}
