// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// Reads of scope subsets, and how much a single caller can cause by requesting many of
// them.

const (
	narrowedOfARole  = 128  // the most tokens for scope subsets that one role may have
	narrowedOfAMount = 1024 // and one mount
)

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
				t.Errorf("scopes %q: got %v, want one token for that subset", some, got)
			}
		}
		if got := m.mojo.last().scopes; !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("got a token request for the scopes %q", got)
		}
		text := m.refused(logical.ReadOperation, "creds/app", map[string]any{"scopes": "a,d"})
		if !strings.Contains(text, `scopes contains "d", which role "app" does not have`) {
			t.Errorf("got %q", text)
		}
		m.wantMints(2)

		m.write("roles/none", nil)
		m.refused(logical.ReadOperation, "creds/none", map[string]any{"scopes": "a"})
		m.refused(logical.ReadOperation, "creds/app", map[string]any{"min_ttl": "soon"})
		m.wantMints(2)

		// A change of the role also drops the tokens of its subsets.
		m.write("roles/app", map[string]any{"audience": "x"})
		m.creds("app", map[string]any{"scopes": "a,b"})
		m.wantMints(3)
		m.do(logical.DeleteOperation, "roles/app", nil)
		if n := m.kept().narrowed; n != 0 {
			t.Errorf("got %d narrowed slots of a deleted role, want 0", n)
		}
	})
}

func TestNarrowedScopesAreBounded(t *testing.T) {
	bubble(t, func(m *testMount) {
		scopes := manyScopes(12)
		m.configure("app", map[string]any{"scopes": scopes})
		for _, some := range subsets(scopes, 1<<12) {
			if got := m.creds("app", map[string]any{"scopes": some}); got.err != nil {
				m.t.Fatal(got.err)
			}
		}
		if n := m.kept().narrowed; n != narrowedOfARole {
			t.Errorf("got %d narrowed tokens, want %d", n, narrowedOfARole)
		}
		// An evicted token is not renewed.
		n := m.mojo.mints.Load()
		time.Sleep(46 * time.Minute)
		synctest.Wait()
		if got := m.mojo.mints.Load() - n; got > narrowedOfARole {
			t.Errorf("%d tokens were renewed, want at most %d", got, narrowedOfARole)
		}
	})
}

// A caller who requests many subsets of one role evicts no tokens of other roles.
func TestNarrowedTokensAreBoundedPerRole(t *testing.T) {
	bubble(t, func(m *testMount) {
		scopes := manyScopes(11)
		m.configure("greedy", map[string]any{"scopes": scopes})
		m.write("roles/modest", map[string]any{"scopes": "a,b"})
		m.creds("modest", map[string]any{"scopes": "a"})
		for _, some := range subsets(scopes, narrowedOfAMount+narrowedOfARole) {
			if got := m.creds("greedy", map[string]any{"scopes": some}); got.err != nil {
				m.t.Fatal(got.err)
			}
		}
		if n := m.read("status")["cached_tokens"]; n != int64(narrowedOfARole+1) {
			t.Errorf("got %v tokens, want %d of one role and 1 of another", n, narrowedOfARole)
		}
		before := m.mojo.mints.Load()
		m.creds("modest", map[string]any{"scopes": "a"})
		m.wantMints(before)
	})
}

// A full mount evicts what costs least: first the tokens of the requesting role, then the
// least recently read tokens.
func TestFullMountEvictsLeastRecentlyReadNarrowedTokens(t *testing.T) {
	bubble(t, func(m *testMount) {
		const full = narrowedOfAMount / narrowedOfARole
		scopes := manyScopes(8)
		m.write("config", testConfig(nil))
		read := func(role, sets int) {
			t.Helper()
			for _, some := range subsets(scopes, sets) {
				if got := m.creds(fmt.Sprintf("r%d", role), map[string]any{"scopes": some}); got.err != nil {
					m.t.Fatal(got.err)
				}
			}
		}
		for role := range full + 1 {
			m.write(fmt.Sprintf("roles/r%d", role), map[string]any{"scopes": scopes})
		}
		for role := range full {
			read(role, narrowedOfARole)
		}
		if n := m.read("status")["cached_tokens"]; n != int64(narrowedOfAMount) {
			t.Errorf("got %v tokens, want %d", n, narrowedOfAMount)
		}
		read(full, 1<<8-2) // all subsets
		if n := m.read("status")["cached_tokens"]; n != int64(narrowedOfAMount) {
			t.Errorf("after another role: got %v tokens, want %d", n, narrowedOfAMount)
		}
		before := m.mojo.mints.Load()
		for role := 1; role < full; role++ { // all except the one that was read first
			read(role, narrowedOfARole)
		}
		if n := m.mojo.mints.Load() - before; n != 0 {
			t.Errorf("after one role requested its subsets, reading the other roles' tokens again minted %d, want none: only the %d least recently read may be evicted", n, narrowedOfARole)
		}
	})
}

// A key stands for a token, not for a slot in memory. Its mint continues when the slot is
// evicted, and later readers of the key wait for that mint.
func TestEvictedKeyKeepsItsOneMint(t *testing.T) {
	bubble(t, func(m *testMount) {
		scopes := manyScopes(11)
		sets := subsets(scopes, narrowedOfAMount+narrowedOfARole)
		first := sets[0]
		m.configure("app", map[string]any{"scopes": scopes})
		m.mojo.unpaced = true
		m.mojo.set(func(s *standIn) {
			s.respond = func(req tokenRequest) (time.Duration, error) {
				if slices.Equal(req.scopes, first) {
					return 8 * time.Second, nil
				}
				return 0, nil
			}
		})
		answers := make(chan got, 2)
		read := func() { answers <- m.creds("app", map[string]any{"scopes": first}) }
		go read()
		synctest.Wait()
		for _, some := range sets[1:] {
			if got := m.creds("app", map[string]any{"scopes": some}); got.err != nil {
				m.t.Fatal(got.err)
			}
		}
		go read()
		a, b := <-answers, <-answers
		if a.err != nil || b.err != nil || a.token != b.token {
			t.Errorf("two readers of one key got %v and %v, want one token", a, b)
		}
		asked := 0
		m.mojo.set(func(s *standIn) {
			for _, req := range s.requests {
				if slices.Equal(req.scopes, first) {
					asked++
				}
			}
		})
		if asked != 1 {
			t.Errorf("got %d concurrent requests for one key, want 1", asked)
		}
	})
}

// Readers who give up leave nothing behind that grows with their number.
func TestReadersWhoGiveUpLeaveNoMintsBehind(t *testing.T) {
	bubble(t, func(m *testMount) {
		scopes := manyScopes(12)
		m.write("config", testConfig(map[string]any{"request_timeout": "60s"}))
		m.write("roles/app", map[string]any{"scopes": scopes})
		m.mojo.set(func(s *standIn) { s.latency = 59 * time.Second })
		gaveUp := 0
		for _, some := range subsets(scopes, 4000) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
			got := m.credsCtx(ctx, "app", map[string]any{"scopes": some})
			cancel()
			if got.err != nil {
				gaveUp++
			}
		}
		if gaveUp == 0 {
			m.t.Fatal("no reader gave up")
		}
		m.mojo.set(func(s *standIn) {
			if s.busy > 25 { // at 5 a second
				t.Errorf("4,000 readers that left after 1ms each left %d requests in progress, want only those that got a turn in 4s", s.busy)
			}
		})
		if n := m.kept().narrowed; n > narrowedOfARole {
			t.Errorf("got %d slots, want at most %d", n, narrowedOfARole)
		}
		time.Sleep(time.Hour)
		m.mojo.set(func(s *standIn) { s.latency = 0 })
		if got := m.creds("app", map[string]any{"scopes": scopes[0]}); got.err != nil || !strings.HasPrefix(got.token, "token-") {
			t.Errorf("an hour later: a reader got %v", got)
		}
	})
}
