// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/hashicorp/vault/sdk/logical"
)

// What rotate-role replaces, and what it leaves.

// A failed rotation leaves nothing in memory.
func TestFailedRotationKeepsNoSlot(t *testing.T) {
	for _, persist := range []bool{true, false} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.write("config", map[string]any{"persist_tokens": persist, "verify_connection": false})
			m.mojo.set(func(s *standIn) { s.fail = errDown })
			if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); err == nil {
				t.Fatal("the rotation succeeded")
			}
			time.Sleep(25 * time.Hour)
			if n := m.kept().slots; n != 0 {
				t.Errorf("persist_tokens=%v: got %d slots, want 0", persist, n)
			}
		})
	}
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
			m.wantToken("app", 3)                                 // from storage
			m.do(logical.UpdateOperation, "rotate-role/app", nil) // 4
			m.wantToken("app", 4)
			m.creds("app", map[string]any{"scopes": "a"})
			m.wantMints(5)
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
			// A rotation ignores the back-off after a failure.
			m.mojo.set(func(s *standIn) { s.fail = nil })
			if _, err := rotate(m); err != nil {
				t.Error(err)
			}
			m.wantToken("app", 3)
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
				t.Errorf("the earlier reader got %v", got)
			}
			m.wantToken("app", 2) // the older mint's token was not kept
			m.wantMints(2)
		})
	})
	t.Run("of a role that changes during the rotation", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.mojo.set(func(s *standIn) { s.latency = 10 * time.Second })
			done := make(chan *logical.Response, 1)
			go func() { resp, _ := rotate(m); done <- resp }()
			time.Sleep(time.Second)
			m.write("roles/app", map[string]any{"audience": "x"})
			if resp := <-done; !resp.IsError() || !strings.Contains(resp.Error().Error(), "changed while") {
				t.Errorf("got %v", resp)
			}
		})
	})
	t.Run("of a missing role", func(t *testing.T) {
		m := newTestMount(t)
		if text := m.refused(logical.UpdateOperation, "rotate-role/app", nil); !strings.Contains(text, `role "app" does not exist`) {
			t.Errorf("got %q", text)
		}
	})
	t.Run("is forwarded", func(t *testing.T) {
		m := newTestMount(t)
		props := m.Route("rotate-role/app").Operations[logical.UpdateOperation].Properties()
		if !props.ForwardPerformanceStandby || !props.ForwardPerformanceSecondary {
			t.Error("rotate-role is not forwarded")
		}
	})
}

// The last rotation requested wins, no matter how long an earlier one takes.
func TestRotationsOfARoleRunOneAtATime(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.mojo.set(func(s *standIn) { s.latency = 9 * time.Second })
		earlier := make(chan *logical.Response, 1)
		go func() { earlier <- m.do(logical.UpdateOperation, "rotate-role/app", nil) }()
		time.Sleep(time.Second)
		m.mojo.set(func(s *standIn) { s.latency = time.Second })
		later := m.do(logical.UpdateOperation, "rotate-role/app", nil)
		if got := <-earlier; got.Data["last_vault_rotation"].(string) >= later.Data["last_vault_rotation"].(string) {
			t.Errorf("the earlier rotation returned %v, the later one %v", got.Data, later.Data)
		}
		m.wantToken("app", 2)
		m.wantMints(2)
		m.mojo.set(func(s *standIn) {
			if s.peak != 1 {
				t.Errorf("got %d concurrent rotations of a role", s.peak)
			}
		})
		if sent := m.tokens.census().gates["default"].Sent; sent != 2 {
			t.Errorf("%d turns at the gate were used for 2 requests", sent)
		}
	})
}

// Callers that request a rotation before its token request has left share it.
func TestRotationIsSharedUntilItsRequestHasLeft(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1) // the next turn is in 200 ms
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { m.do(logical.UpdateOperation, "rotate-role/app", nil) })
		}
		wg.Wait()
		m.wantMints(2)
		m.wantToken("app", 2)
	})
}

func TestRotateRoleKeepsTheTokenIfTheNewOneHasExpired(t *testing.T) {
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
		wantStatus(t, <-done, http.StatusBadGateway, `role "app"`, "had expired, or almost", "Check the role's max_ttl")
		if got := m.storedRole("app"); got.TokenGeneration != stored.TokenGeneration {
			t.Error("the older tokens were dropped")
		}
		m.write("roles/app", map[string]any{"max_ttl": "1h"})
		m.wantToken("app", 1)
	})
}

// Rotating a token does not count as reading it. Only reads of the role decide whether
// the token is renewed.
func TestRotatedTokenIsRenewedIfTheRoleIsRead(t *testing.T) {
	t.Run("in use", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			time.Sleep(time.Minute)
			m.write("rotate-role/app", nil)
			m.write("rotate-role/app", nil)
			m.wantMints(3)
			time.Sleep(46 * time.Minute)
			synctest.Wait()
			m.mojo.set(func(s *standIn) { s.latency = time.Hour })
			if got, took := m.patiently("app", nil); took != 0 {
				t.Errorf("the first reader after a rotation waited %s for a mint (got %v), want the next token already cached", took, got.err)
			}
			m.wantMints(4)
		})
	})
	t.Run("idle", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("never", nil)
			m.write("roles/lapsed", nil)
			m.write("rotate-role/never", nil) // never read
			m.creds("lapsed", nil)
			time.Sleep(46 * time.Minute) // renewed once, and not read since
			m.write("rotate-role/lapsed", nil)
			m.wantMints(4)
			time.Sleep(48 * time.Hour)
			synctest.Wait()
			m.wantMints(4)
		})
	})
}

// Readers that come back after ttl do not wait for MojoAuth because of a rotation in the
// meantime.
func TestReadersWhoFollowTTLDoNotWaitAfterARotation(t *testing.T) {
	bubble(t, func(m *testMount) {
		const roles = 200
		m.write("config", testConfig(nil))
		m.mojo.set(func(s *standIn) { s.latency = 300 * time.Millisecond })
		var waited, failed atomic.Int64
		var wg sync.WaitGroup
		for i := range roles {
			name := fmt.Sprintf("r%d", i)
			m.write("roles/"+name, nil)
			got := m.creds(name, nil)
			wg.Go(func() {
				time.Sleep(time.Duration(got.ttl) * time.Second)
				again, took := m.patiently(name, nil)
				if took > 0 {
					waited.Add(1)
				}
				if again.err != nil {
					failed.Add(1)
				}
			})
			time.Sleep(time.Second)
			m.write("rotate-role/"+name, nil)
		}
		wg.Wait()
		// A few readers come just as the token is renewed.
		if n := waited.Load(); n > roles/20 || failed.Load() != 0 {
			t.Errorf("%d of %d readers that came back after ttl waited for a mint, and %d failed; want at most %d, and none", n, roles, failed.Load(), roles/20)
		}
	})
}

// A rotation continues after its caller has left, and then releases what the caller
// passed in.
func TestRotationKeepsNothingOfItsCaller(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		type keyOfTest struct{}
		rotate := func() weak.Pointer[[1 << 10]byte] {
			brought := new([1 << 10]byte)
			ctx := context.WithValue(context.Background(), keyOfTest{}, brought)
			if _, err := m.HandleRequest(ctx, &logical.Request{Operation: logical.UpdateOperation, Path: "rotate-role/app", Storage: m.storage}); err != nil {
				t.Fatal(err)
			}
			return weak.Make(brought)
		}
		first := rotate()
		rotate() // clears references to the first one from the stack
		synctest.Wait()
		runtime.GC()
		runtime.GC()
		if first.Value() != nil {
			t.Error("a value in the context of a rotation's caller is still in memory")
		}
	})
}

func TestRotationIsAnsweredWithinOneDeadline(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"request_timeout": "2s"}))
		m.write("roles/app", nil)
		m.wantToken("app", 1)
		deaf := make(chan struct{})
		defer close(deaf)
		m.mojo.set(func(s *standIn) { s.deaf = deaf })
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		began := time.Now()
		_, err := m.HandleRequest(ctx, &logical.Request{Operation: logical.UpdateOperation, Path: "rotate-role/app", Storage: m.storage})
		if took := time.Since(began); took > 3*time.Second {
			m.t.Fatalf("the rotation took %s, want at most 3s", took)
		}
		wantStatus(t, err, http.StatusGatewayTimeout, `role "app"`)
		m.wantToken("app", 1)
	})
}

// The deadline applies to the token: if that has arrived, slow storage does not lose it.
func TestRotationWithSlowStorageKeepsItsToken(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"request_timeout": "2s"}))
		m.write("roles/app", nil)
		m.wantToken("app", 1)
		slow := func(string) {
			if m.mojo.mints.Load() == 2 {
				time.Sleep(5 * time.Second)
			}
		}
		m.storage.afterGet.Store(&slow)
		if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); err != nil {
			m.t.Fatalf("got %v, want success", err)
		}
		m.wantToken("app", 2)
	})
}

// An unusable token replaces none, and counts as what it is.
func TestRotationToATokenExpiredOnArrivalCountsAsAFailure(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"max_ttl": "1s"})
		m.mojo.set(func(s *standIn) { s.latency = 950 * time.Millisecond }) // F is 100 ms
		_, err := m.request(logical.UpdateOperation, "rotate-role/app", nil)
		wantStatus(t, err, http.StatusBadGateway, `role "app"`, "max_ttl")
		status := m.read("status")
		if failures := status["mint_failures"].(map[string]any); failures["expired_on_arrival"] != int64(1) || status["mints"] != int64(0) {
			t.Errorf("got %v mints and the failures %v, want none and one expired_on_arrival", status["mints"], failures)
		}
	})
}
