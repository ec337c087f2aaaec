// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What a failed mint holds up, for which reads, and for how long.

func TestFailureOfClientOrServerBacksOffTheConfig(t *testing.T) {
	for _, failure := range []*mintError{
		{class: classClientRefused, status: 401, oauthError: "invalid_client"},
		{class: classServerError, status: 503},
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
						if got := m.creds(role, nil); got.err == nil || !strings.Contains(got.err.Error(), "The next attempt is at") {
							t.Errorf("got %v, want the remembered error", got)
						}
						if time.Since(began) != 0 {
							t.Error("a remembered error was not returned immediately")
						}
					}
				}
				m.wantMints(1)
				m.creds("elsewhere", nil)
				m.wantMints(2) // the other config is not affected

				time.Sleep(5 * time.Second)
				for range 10 {
					m.creds("app", nil)
				}
				m.wantMints(3)
				if got := m.mojo.last().retries; got != 0 {
					t.Errorf("the first try after a failure was allowed %d retries, want none", got)
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

// Several roles' mints are in progress when the trouble begins. Together they count as
// one failure.
func TestBackoffCountsAnOutageOnce(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) { s.fail, s.latency = errDown, time.Second })
		var wg sync.WaitGroup
		for i := range 20 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			wg.Go(func() { m.creds(fmt.Sprintf("r%d", i), nil) })
		}
		wg.Wait()
		failed := m.mojo.mints.Load()
		if failed < 4 || failed > 6 {
			t.Fatalf("%d token requests in the second before the first failed, want about 5", failed)
		}
		time.Sleep(5 * time.Second)
		m.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 0 })
		m.wantToken("r0", failed+1)
	})
}

// After a back-off, a single mint finds out whether the trouble is over.
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

// If a client cannot be created, the error gives the reason, and a write makes the engine
// try again.
func TestClientThatCannotBeCreatedIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken := errors.New("no certificate authorities")
		fails := true
		mojo := &standIn{lifetime: time.Hour}
		m := newTestMountWith(t, mojo, func(config *configEntry) (minter, error) {
			if fails {
				return nil, broken
			}
			return mojo.client(config)
		})
		m.configure("app", nil)
		if got := m.creds("app", nil); got.err == nil || !strings.Contains(got.err.Error(), broken.Error()) {
			t.Errorf("got %v, want the reason", got.err)
		}
		if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); err == nil || !strings.Contains(err.Error(), broken.Error()) {
			t.Errorf("rotating: got %v, want the reason", err)
		}
		fails = false
		m.write("config", map[string]any{"verify_connection": false})
		m.wantToken("app", 1)
	})
}

// A write, on this node or another, also ends the back-off of automatic renewals.
func TestWritesEndTheBackoffOfRenewals(t *testing.T) {
	for _, failure := range []*mintError{errDown, {class: classRequestRefused, status: 400, oauthError: "invalid_scope"}} {
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
			if strings.HasPrefix(name, "role") && failure == errDown {
				continue // affects the config, not the role
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
					time.Sleep(2 * time.Second) // the engine spreads its own retries
					synctest.Wait()
					m.wantMints(failed + 2)
				})
			})
		}
	}
}

func TestFailedMintsAreForgottenWithoutReads(t *testing.T) {
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
			if got := m.kept(); got.slots != 0 || got.narrowed != 0 {
				t.Errorf("after %s: got %+v, want no slots", failure.class, got)
			}
		})
	}
}

// Freeing slots must not shorten the back-off again. With one read a second, the engine
// mints after 5, 10, 20, and then every 30 seconds, each up to a fifth shorter.
func TestBackoffOfARequestKeepsDoubling(t *testing.T) {
	for _, had := range []string{"no token", "an expired token"} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			if had == "an expired token" {
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
				t.Errorf("after %s: %d token requests in 5 minutes, want 9 to 15", had, got)
			}
		})
	}
}

// MojoAuth's description of a failure may name a role's audience. Readers of other roles
// see the kind of failure, but not the description.
func TestDescriptionIsShownOnlyToReadersOfItsKey(t *testing.T) {
	const words = "https://payroll.example.org/ is closed to you"
	for _, c := range []struct {
		failure *mintError
		shown   []string // to every reader
	}{
		{&mintError{class: classClientRefused, status: 401, oauthError: "invalid_client", description: words}, []string{"refused the client", "invalid_client", "HTTP 401"}},
		{&mintError{class: classServerError, status: 500, description: words}, []string{"MojoAuth failed", "HTTP 500"}},
	} {
		t.Run(string(c.failure.class), func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("payroll", map[string]any{"audience": "https://payroll.example.org/", "scopes": "a,b"})
				m.write("roles/cold", nil)
				m.write("roles/warm", nil)
				m.wantToken("warm", 1)
				time.Sleep(20 * time.Minute)
				m.mojo.set(func(s *standIn) { s.fail = c.failure })

				for range 2 { // when it happens, and when it is remembered
					if got := m.creds("payroll", nil); got.err == nil || !strings.Contains(got.err.Error(), words) {
						t.Errorf("the role's own reader got %v, want MojoAuth's description", got.err)
					}
				}
				m.wantMints(2)
				texts := map[string]string{}
				for reader, got := range map[string]got{
					"a reader of another role":               m.creds("cold", nil),
					"a reader of a scope subset of the role": m.creds("payroll", map[string]any{"scopes": "a"}),
					"a reader who gets another role's token": m.creds("warm", map[string]any{"min_ttl": "50m"}),
				} {
					texts[reader] = strings.Join(got.warnings, "\n")
					if got.err != nil {
						texts[reader] = got.err.Error()
					}
				}
				m.wantMints(2) // all of them got the remembered error
				for reader, text := range texts {
					if strings.Contains(text, "payroll.example.org") {
						t.Errorf("%s got MojoAuth's description of role payroll's failure: %q", reader, text)
					}
					for _, part := range c.shown {
						if !strings.Contains(text, part) {
							t.Errorf("%s got %q, want it to contain %q", reader, text, part)
						}
					}
				}
			})
		})
	}
}

// One request that hangs while others succeed says nothing about the endpoint.
func TestFailureOfAMintOlderThanTheLastSuccessBacksOffOnlyItsKey(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("hung", map[string]any{"audience": "hung"})
		m.write("roles/early", nil)
		m.write("roles/late", nil)
		m.mojo.set(func(s *standIn) {
			s.respond = func(req tokenRequest) (time.Duration, error) {
				if req.audience == "hung" {
					return 10 * time.Second, &mintError{class: classTimeout, allowed: 10 * time.Second}
				}
				return 0, nil
			}
		})
		failed := make(chan got, 1)
		go func() { failed <- m.creds("hung", nil) }()
		time.Sleep(5 * time.Second)
		if got := m.creds("early", nil); got.err != nil {
			t.Errorf("while a request hangs, another role got %v", got.err)
		}
		wantStatus(t, (<-failed).err, http.StatusGatewayTimeout)
		if got := m.creds("late", nil); got.err != nil {
			t.Errorf("after one request hung and another succeeded, a third role got %v", got.err)
		}
		before := m.mojo.mints.Load()
		for range 30 {
			if got := m.creds("hung", nil); got.err == nil {
				t.Error("the role whose request hung got a token")
			}
			time.Sleep(100 * time.Millisecond)
		}
		m.wantMints(before) // in a back-off of its own
	})
}

// Every hundredth of many roles without a token has a request that hangs.
func TestRequestsThatHangFailAlone(t *testing.T) {
	bubble(t, func(m *testMount) {
		const roles = 600
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) {
			s.respond = func(req tokenRequest) (time.Duration, error) {
				if req.audience == "hang" {
					return 10 * time.Second, &mintError{class: classTimeout, allowed: 10 * time.Second}
				}
				return 50 * time.Millisecond, nil
			}
		})
		var failed, hung atomic.Int64
		var last atomic.Pointer[error]
		var wg sync.WaitGroup
		for i := range roles {
			hangs := i%100 == 50
			name := fmt.Sprintf("r%d", i)
			m.write("roles/"+name, map[string]any{"audience": map[bool]string{true: "hang"}[hangs]})
			wg.Go(func() {
				got := m.creds(name, nil)
				switch {
				case hangs:
					hung.Add(1)
				case got.err != nil:
					failed.Add(1)
					last.Store(&got.err)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		if n := failed.Load(); n != 0 {
			t.Errorf("%d of %d cold reads failed because %d others hung; the last: %v", n, roles-hung.Load(), hung.Load(), *last.Load())
		}
	})
}

// No path retries in a tight loop. A failure to create a client backs off the config as
// an outage does.
func TestClientThatCannotBeCreatedBacksOffTheConfig(t *testing.T) {
	broken := errors.New("no certificate authorities")
	// While fails is set, the mount cannot create a client, except on the thousandth try:
	// a loop would never end in a bubble, where time stands still.
	mount := func(t *testing.T) (m *testMount, fails *atomic.Bool, tries *atomic.Int64) {
		fails, tries = new(atomic.Bool), new(atomic.Int64)
		mojo := &standIn{lifetime: time.Hour}
		return newTestMountWith(t, mojo, func(config *configEntry) (minter, error) {
			if fails.Load() && tries.Add(1) < 1000 {
				return nil, broken
			}
			return mojo.client(config)
		}), fails, tries
	}
	t.Run("for cold roles", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m, fails, tries := mount(t)
			m.configure("a", nil)
			m.write("roles/b", nil)
			fails.Store(true)
			for range 100 {
				for _, role := range []string{"a", "b"} {
					if got := m.creds(role, nil); got.err == nil || !strings.Contains(got.err.Error(), broken.Error()) {
						m.t.Fatalf("got %v, want the reason", got)
					}
				}
			}
			if n := tries.Load(); n != 1 {
				t.Errorf("200 simultaneous reads tried %d times to create a client, want once", n)
			}
			time.Sleep(5 * time.Second)
			fails.Store(false)
			if got := m.creds("b", nil); got.err != nil {
				t.Errorf("after the back-off: got %v, want a token", got.err)
			}
		})
	})
	t.Run("for a token that is due", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			m, fails, tries := mount(t)
			m.configure("app", nil)
			m.wantToken("app", 1)
			fails.Store(true)
			// Another node writes the config, which makes this one create a new client.
			m.elsewhere(func(o *testMount) {
				o.write("config", map[string]any{"max_retries": 5, "verify_connection": false})
			}, "config/default")
			time.Sleep(46 * time.Minute)
			synctest.Wait()
			before := tries.Load()
			if before == 0 {
				t.Error("a token is due, and the engine did not try to create a client")
			}
			time.Sleep(10 * time.Minute)
			synctest.Wait()
			if n := tries.Load() - before; before > 20 || n < 10 || n > 30 {
				t.Errorf("%d tries to create a client until a minute after the token was due, and %d in the next 10 minutes; want at most 20, and one for each back-off of 24s to 30s", before, n)
			}
		})
	})
}

// An entry that cannot be decoded stays so until it is written again. Reading it every
// second does not help.
func TestUndecodableEntryIsNotReadEverySecond(t *testing.T) {
	for _, key := range []string{"config/default", "roles/app"} {
		t.Run(key, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				ctx := context.Background()
				m.configure("app", nil)
				m.wantToken("app", 1)
				good, err := m.storage.Storage.Get(ctx, key)
				if err != nil {
					m.t.Fatal(err)
				}
				if err := m.storage.Storage.Put(ctx, &logical.StorageEntry{Key: key, Value: []byte(`{"min_ttl":"`)}); err != nil {
					m.t.Fatal(err)
				}
				before := m.storage.operations.Load()
				m.InvalidateKey(ctx, key)
				time.Sleep(2 * time.Hour) // past the token's expiry
				synctest.Wait()
				if n := m.storage.operations.Load() - before; n > 2*3600/24+60 {
					t.Errorf("%d storage operations in two hours without a read, want at most one for each back-off of 24s to 30s", n)
				}
				if err := m.storage.Storage.Put(ctx, good); err != nil {
					m.t.Fatal(err)
				}
				m.InvalidateKey(ctx, key)
				if got := m.creds("app", nil); got.err != nil {
					t.Errorf("after the entry was repaired: got %v, want a token", got.err)
				}
			})
		})
	}
}

// A firewall answers requests for one role's audience with 403 or 500. That role is
// always read first, and must not keep the others from finding out that their requests
// succeed.
func TestRoleThatFailedLeavesTheProbeToOthers(t *testing.T) {
	for _, failure := range []*mintError{
		{class: classClientRefused, status: 403},
		{class: classServerError, status: 500},
	} {
		t.Run(fmt.Sprint(failure.status), func(t *testing.T) {
			bubble(t, func(m *testMount) {
				const others = 20
				m.configure("blocked", map[string]any{"audience": "blocked"})
				for i := range others {
					m.write(fmt.Sprintf("roles/r%d", i), nil)
				}
				m.mojo.set(func(s *standIn) {
					s.respond = func(req tokenRequest) (time.Duration, error) {
						if req.audience == "blocked" {
							return 100 * time.Millisecond, failure
						}
						return 100 * time.Millisecond, nil
					}
				})
				m.creds("blocked", nil) // the trouble begins before any other read
				began := time.Now()
				var mu sync.Mutex
				var through time.Time // when the first of the others had a token
				failed, late := 0, 0
				var wg sync.WaitGroup
				for i := range 400 { // 40 s
					wg.Go(func() { m.creds("blocked", nil) })
					time.Sleep(10 * time.Millisecond)
					wg.Go(func() {
						asked := time.Now()
						got := m.creds(fmt.Sprintf("r%d", i%others), nil)
						mu.Lock()
						defer mu.Unlock()
						switch {
						case got.err == nil && through.IsZero():
							through = time.Now()
						case got.err != nil:
							failed++
							if !through.IsZero() && asked.After(through) {
								late++
							}
						}
					})
					time.Sleep(90 * time.Millisecond)
				}
				wg.Wait()
				switch took := through.Sub(began); {
				case through.IsZero():
					t.Errorf("none of %d reads of other roles got a token in 40s", failed)
				case took > 16*time.Second: // two back-offs
					t.Errorf("the first of the other roles got a token after %s, want it within two back-offs", took)
				case late != 0:
					t.Errorf("%d reads of other roles failed after one of them got a token", late)
				}
			})
		})
	}
}

// A role that fails while others succeed is itself at fault until it succeeds.
func TestKeyThatFailsAloneBacksOffAlone(t *testing.T) {
	bubble(t, func(m *testMount) {
		var blocked atomic.Bool
		blocked.Store(true)
		m.configure("blocked", map[string]any{"audience": "blocked"})
		for _, role := range []string{"b", "c", "d", "e", "f"} {
			m.write("roles/"+role, nil)
		}
		m.mojo.set(func(s *standIn) {
			s.respond = func(req tokenRequest) (time.Duration, error) {
				if blocked.Load() && req.audience == "blocked" {
					return 0, &mintError{class: classClientRefused, status: 403}
				}
				return 0, nil
			}
		})
		m.creds("blocked", nil) // a new failure: it backs off the config
		if got := m.creds("b", nil); got.err == nil {
			t.Error("after the first failure of a config, a token was requested for another role")
		}
		time.Sleep(5 * time.Second)
		if got := m.creds("b", nil); got.err != nil {
			m.t.Fatalf("after the back-off: %v", got.err)
		}
		for i := range 5 {
			time.Sleep(time.Minute)
			before := m.mojo.mints.Load()
			m.creds("blocked", nil)
			m.wantMints(before + 1) // fails again
			m.creds("blocked", nil)
			m.wantMints(before + 1) // and is in a back-off of its own
			if i > 1 {
				continue
			}
			role := []string{"c", "d"}[i]
			if got := m.creds(role, nil); got.err != nil {
				t.Errorf("after failure %d of a role that fails alone, role %s got %v", i+2, role, got.err)
			}
		}

		// The engine also remembers it without reads.
		time.Sleep(2 * time.Hour)
		m.creds("blocked", nil)
		if got := m.creds("f", nil); got.err != nil {
			t.Errorf("two hours later, after another failure of the role that fails alone, another role got %v", got.err)
		}

		// Once the role has had a token, its next failure counts as new.
		time.Sleep(time.Minute)
		blocked.Store(false)
		if got := m.creds("blocked", nil); got.err != nil {
			m.t.Fatal(got.err)
		}
		blocked.Store(true)
		time.Sleep(30 * time.Minute)
		m.creds("blocked", map[string]any{"min_ttl": "45m"})
		if got := m.creds("e", nil); got.err == nil {
			t.Error("the failure of a role that had succeeded did not back off the config")
		}
	})
}

// A rotation that returns the same token is a success of its key and of no other. The
// key's next failure counts as new.
func TestRotationIsASuccessOfItsKey(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/other", nil)
		m.mojo.set(func(s *standIn) { s.alter = func(t *token) { t.accessToken = "the one there is" } })
		m.creds("app", nil)
		time.Sleep(20 * time.Minute)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("app", map[string]any{"min_ttl": "2h"})
		time.Sleep(time.Minute)
		m.mojo.set(func(s *standIn) { s.fail = nil })
		if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); err == nil {
			m.t.Fatal("a rotation that returned the same token succeeded")
		}
		time.Sleep(time.Minute)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("app", map[string]any{"min_ttl": "2h"})
		m.wantMints(4)
		m.creds("other", nil)
		m.wantMints(4)
	})
}

// A key that fails alone still counts as such after MojoAuth refuses one of its requests.
func TestRefusalsDoNotHideThatAKeyFailsAlone(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("bad", map[string]any{"audience": "bad"})
		m.write("roles/good", nil)
		m.write("roles/other", nil)
		refused := &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_target"}
		var failure atomic.Pointer[mintError]
		failure.Store(refused)
		m.mojo.set(func(s *standIn) {
			s.failFor = func(req tokenRequest) error {
				if req.audience == "bad" {
					return failure.Load()
				}
				return nil
			}
		})
		m.creds("bad", nil)
		time.Sleep(time.Second)
		m.creds("good", nil) // from now on, bad fails alone
		time.Sleep(time.Minute)
		m.creds("bad", nil)
		failure.Store(errDown)
		time.Sleep(time.Minute)
		m.creds("bad", nil)
		m.wantMints(4)
		if got := m.creds("other", nil); got.err != nil {
			t.Errorf("after a failure of a role that fails alone, another role got %v", got.err)
		}
	})
}

// refusesOne makes the endpoint fail with outage for every role except bad, whose requests
// it refuses.
func refusesOne(m *testMount, outage *mintError) {
	m.configure("app", nil)
	m.write("roles/bad", map[string]any{"scopes": "forbidden"})
	m.mojo.set(func(s *standIn) {
		s.respond = func(req tokenRequest) (time.Duration, error) {
			if slices.Contains(req.scopes, "forbidden") {
				return 0, &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}
			}
			return 0, outage
		}
	})
}

func TestRefusedRequestDoesNotEndTheBackoffOfAnOutage(t *testing.T) {
	for _, outage := range []*mintError{errDown, {class: classNetwork}, {class: classTimeout, allowed: 10 * time.Second}} {
		t.Run(string(outage.class), func(t *testing.T) {
			bubble(t, func(m *testMount) {
				refusesOne(m, outage)
				m.creds("app", nil)
				m.refused(logical.UpdateOperation, "rotate-role/bad", nil) // ignores the back-off
				before := m.mojo.mints.Load()
				m.creds("app", nil)
				if n := m.mojo.mints.Load() - before; n != 0 {
					t.Error("after a refused request, a token was requested for a role during the back-off of an outage")
				}
			})
			bubble(t, func(m *testMount) {
				refusesOne(m, outage)
				for range 1200 { // two minutes
					m.creds("bad", nil) // comes first, so it is the probe
					m.creds("app", nil)
					time.Sleep(100 * time.Millisecond)
				}
				m.mojo.set(func(s *standIn) {
					s.requests = slices.DeleteFunc(s.requests, func(r tokenRequest) bool { return len(r.scopes) != 0 })
					// After 5, 10, 20, and then every 30 s, each up to a fifth shorter: 7
					// at most.
					if n := len(s.requests); n < 4 || n > 10 {
						t.Errorf("%d requests in an outage of two minutes, want 4 to 10: a refused request shortened the back-off again", n)
					}
				})
			})
		})
	}
}

// If MojoAuth refused the client before and now refuses only the request, it accepts the
// client again.
func TestRefusedRequestEndsTheBackoffOfARefusedClient(t *testing.T) {
	bubble(t, func(m *testMount) {
		refusesOne(m, &mintError{class: classClientRefused, status: 401, oauthError: "invalid_client"})
		m.creds("app", nil)
		m.refused(logical.UpdateOperation, "rotate-role/bad", nil)
		m.mojo.set(func(s *standIn) { s.respond = nil })
		if got := m.creds("app", nil); got.err != nil {
			t.Errorf("got %v, want a token: MojoAuth accepts the client again", got.err)
		}
	})
}

// The back-offs of one config and role survive invalidations of others, also
// invalidations that arrive while config and role are loaded for the first time.
func TestBackoffOutlivesTheInvalidationOfOtherEntries(t *testing.T) {
	for _, c := range []struct {
		name, key, other string
		failure          *mintError
	}{
		{"config's", "config/default", "config/other", errDown},
		{"role's", "roles/app", "roles/other", &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.elsewhere(func(o *testMount) {
					o.configure("app", nil)
					o.write("config/other", testConfig(nil))
					o.write("roles/other", nil)
				}, "config/default", "roles/app", "config/other", "roles/other")
				m.mojo.set(func(s *standIn) { s.fail = c.failure })
				news := func(key string) {
					if key == c.key {
						m.InvalidateKey(context.Background(), c.other)
					}
				}
				m.storage.afterGet.Store(&news)
				for range 10 {
					if got := m.creds("app", nil); got.err == nil {
						m.t.Fatal("got a token from an endpoint that fails")
					}
				}
				m.wantMints(1)
			})
		})
	}
}

// A mint reads role and config from storage before its token request. A back-off that
// begins in the meantime applies to it as well.
func TestMintDelayedByStorageObeysTheBackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("slow", nil)
		m.write("roles/bad", nil)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		hold := func(key string) {
			if key == "roles/slow" {
				time.Sleep(500 * time.Millisecond)
			}
		}
		m.storage.afterGet.Store(&hold)
		slow := make(chan got, 1)
		go func() { slow <- m.creds("slow", nil) }()
		synctest.Wait()
		m.creds("bad", nil)
		if got := <-slow; got.err == nil || !strings.Contains(got.err.Error(), "The next attempt is at") {
			t.Errorf("got %v, want the other mint's failure", got)
		}
		m.wantMints(1)
	})
}

// The probe after a back-off sends no request if an older mint fails first.
func TestProbeDelayedByStorageObeysANewBackoff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("probe", nil)
		m.write("roles/straggler", map[string]any{"audience": "straggler"})
		m.write("roles/first", nil)
		m.mojo.set(func(s *standIn) {
			s.respond = func(req tokenRequest) (time.Duration, error) {
				if req.audience == "straggler" {
					return 6 * time.Second, errDown
				}
				return 0, errDown
			}
		})
		go m.creds("straggler", nil)
		synctest.Wait()
		m.creds("first", nil)
		time.Sleep(5500 * time.Millisecond) // its back-off is over
		hold := func(string) { time.Sleep(450 * time.Millisecond) }
		m.storage.afterGet.Store(&hold)
		m.creds("probe", nil)
		m.wantMints(2)
	})
}
