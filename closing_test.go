// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// What closing a mount stops, and how soon.

func TestCloseEndsEverything(t *testing.T) {
	bubble(t, func(m *testMount) { // fails if a goroutine is left
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
				t.Errorf("a read after closing got %v", a)
			}
		}
	})
}

// Vault serves no requests while it waits for a mount to close. The mount must close even
// if a mint's client ignores its canceled context.
func TestClosingWaitsFiveSecondsAtMost(t *testing.T) {
	for name, start := range map[string]func(m *testMount){
		"a read": func(m *testMount) { m.patiently("cold", nil) },
		"a rotation": func(m *testMount) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
			defer cancel()
			_, _ = m.HandleRequest(ctx, &logical.Request{Operation: logical.UpdateOperation, Path: "rotate-role/cold", Storage: m.storage})
		},
		"a renewal": func(*testMount) { time.Sleep(46 * time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.write("config", testConfig(map[string]any{"request_timeout": "60s"}))
				m.write("roles/app", nil)
				m.write("roles/cold", nil)
				m.wantToken("app", 1)
				deaf := make(chan struct{})
				defer close(deaf)
				m.mojo.set(func(s *standIn) { s.deaf = deaf })
				answered := make(chan struct{})
				go func() { defer close(answered); start(m) }()
				for m.mojo.mints.Load() == 1 {
					time.Sleep(time.Second)
				}
				synctest.Wait()

				began := time.Now()
				closed := make(chan struct{})
				go func() { defer close(closed); m.Cleanup(context.Background()) }()
				select {
				case <-closed:
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("closing took %s, want at most 5s", took)
					}
				case <-time.After(time.Hour):
					t.Error("the mount is not closed after an hour, want at most 5s")
				}
				if name == "a renewal" {
					<-answered
					return
				}
				select {
				case <-answered:
					if took := time.Since(began); took > 5*time.Second {
						t.Errorf("the waiting reader got a response %s after closing began, want at most 5s", took)
					}
				case <-time.After(time.Hour):
					t.Error("the waiting reader has no response an hour after the mount was closed")
				}
			})
		})
	}
}
