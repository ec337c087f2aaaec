// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// What a standby serves itself, and what it forwards to the active node.

// pair is a cluster of two nodes, with m as the active one.
type pair struct {
	*testMount
	standby *testMount
	writes  *atomic.Int64 // attempted on the standby
}

func newPair(m *testMount) *pair {
	standby, writes := m.replica(consts.ReplicationPerformanceStandby, false)
	return &pair{m, standby, writes}
}

// tell invalidates a key on the standby, as storage does after a write on the active
// node.
func (p *pair) tell(key string) {
	synctest.Wait()
	p.standby.InvalidateKey(context.Background(), key)
	synctest.Wait()
}

// wantServed reads a token that the standby must serve itself.
func (p *pair) wantServed(number int64, query map[string]any) got {
	p.t.Helper()
	got := p.standby.creds("app", query)
	if want := fmt.Sprintf("token-%d-", number); got.err != nil || !strings.HasPrefix(got.token, want) {
		p.t.Errorf("got %q, %v; want %s…", got.token, got.err, want)
	}
	return got
}

// wantForwarded reads a token that the standby must not serve itself.
func (p *pair) wantForwarded(role string, query map[string]any) {
	p.t.Helper()
	got := p.standby.creds(role, query)
	if got.err != logical.ErrReadOnly { //nolint:errorlint // Vault would not forward a wrapped error
		p.t.Errorf("%s %v: got %q, %v; want an unwrapped ErrReadOnly, which forwards it", role, query, got.token, got.err)
	}
}

func standbyBubble(t *testing.T, test func(p *pair)) {
	t.Helper()
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "a,b"})
		p := newPair(m)
		test(p)
		if n := p.writes.Load(); n != 0 {
			t.Errorf("the standby attempted %d writes", n)
		}
	})
}

func TestStandbyServesFromStorageAndMemory(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantForwarded("app", nil) // no token is stored
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		before := p.standby.storage.operations.Load()
		for range 100 {
			p.wantServed(1, nil)
		}
		if n := p.standby.storage.operations.Load() - before; n != 0 {
			t.Errorf("100 cached reads caused %d storage operations", n)
		}
		reads := p.standby.outcomes()
		if reads["restored"] != int64(1) || reads["hit"] != int64(100) || reads["forwarded"] != int64(1) {
			t.Errorf("got the counts of reads %v", reads)
		}
		p.wantMints(1)
	})
}

func TestStandbyForwards(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.write("roles/leased", map[string]any{"generate_lease": true})
		p.wantToken("app", 1)
		p.creds("leased", nil)
		synctest.Wait()
		p.wantServed(1, nil)

		p.wantForwarded("leased", nil)
		p.wantForwarded("unknown", nil)
		p.wantForwarded("app", map[string]any{"scopes": "a"})
		p.wantForwarded("app", map[string]any{"minted_after": formatTime(time.Now())})
		p.wantServed(1, map[string]any{"min_ttl": "30m"})
		p.wantServed(1, map[string]any{"scopes": "a,b"}) // all scopes
		time.Sleep(30 * time.Minute)
		p.wantForwarded("app", map[string]any{"min_ttl": "35m"}) // due for this reader only
		p.write("roles/lost", map[string]any{"config": "unknown"})
		p.wantForwarded("lost", nil)
		if text := p.standby.refused(logical.ReadOperation, "creds/app", map[string]any{"scopes": "c"}); !strings.Contains(text, "scopes") {
			t.Errorf("got %s", text)
		}
		p.wantMints(2)
	})
}

// Role and config may change while a reader waits. Then the new values apply.
func TestStandbyForwardsIfRoleOrConfigChangesDuringARead(t *testing.T) {
	for name, query := range map[string]map[string]any{
		"narrowed": {"scopes": "a"},
		"leased":   nil,
	} {
		t.Run(name, func(t *testing.T) {
			standbyBubble(t, func(p *pair) {
				p.wantToken("app", 1)
				p.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
				p.mojo.set(func(s *standIn) { s.fail, s.latency = errDown, 3*time.Second })
				read := make(chan got, 1)
				go func() { read <- p.standby.creds("app", query) }()
				time.Sleep(time.Second)
				p.mojo.set(func(s *standIn) { s.fail, s.latency = nil, 0 })
				p.write("config", map[string]any{"persist_tokens": true, "verify_connection": false})
				if name == "leased" {
					p.write("roles/app", map[string]any{"generate_lease": true})
				}
				p.write("rotate-role/app", nil)
				p.tell("config/default")
				p.tell("roles/app")
				if got := <-read; got.err != logical.ErrReadOnly { //nolint:errorlint // it must be unwrapped
					t.Errorf("got %q, %v; want it forwarded", got.token, got.err)
				}
			})
		})
	}
}

// A standby that mints for itself forwards only leases and unknown roles.
func TestStandbyWithoutStoredTokensMints(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
		p.write("roles/leased", map[string]any{"generate_lease": true})
		p.wantToken("app", 1)
		p.wantServed(2, nil)
		p.standby.creds("app", map[string]any{"scopes": "a"})
		p.wantMints(3)
		if got := p.standby.creds("app", map[string]any{"minted_after": formatTime(time.Now())}); got.err != nil {
			t.Error(got.err)
		}
		p.wantMints(4)
		p.wantForwarded("leased", nil)
		p.wantForwarded("unknown", nil)
		for range 120 { // a minute of doubt costs neither token nor back-off
			time.Sleep(time.Minute)
			p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			if got := p.standby.creds("app", nil); got.err != nil {
				t.Error(got.err)
			}
		}
		p.wantStored()
	})
}

// The first reader of each invalidated token is forwarded. This tells the active node
// that the token is read, so it renews the token.
func TestStandbyAnnouncesThatATokenIsRead(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		time.Sleep(45 * time.Minute) // the active node renewed it
		p.wantMints(2)
		p.tell("tokens/default/app")
		p.wantForwarded("app", nil)
		p.wantToken("app", 2) // to which it was forwarded
		p.wantServed(2, nil)
		p.wantServed(2, nil)
		time.Sleep(45 * time.Minute)
		p.wantMints(3)
		p.tell("tokens/default/app")
		time.Sleep(45 * time.Minute) // nobody read it
		p.wantMints(3)
		// After another invalidation for the same token, it has nothing to announce.
		p.tell("tokens/default/app")
		p.tell("tokens/default/app")
	})
}

func TestStandbyIsInvalidatedTwiceForTheSameToken(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.tell("tokens/default/app")
		p.wantServed(1, nil)
	})
}

// A standby does not miss a write that comes while it reads storage.
func TestStandbyIsInvalidatedWhileItLoads(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		var held atomic.Bool
		release := make(chan struct{})
		hook := func(key string) {
			if key == "tokens/default/app" && held.CompareAndSwap(false, true) {
				<-release
			}
		}
		p.standby.storage.afterGet.Store(&hook)
		p.tell("tokens/default/app") // what it reads now is outdated when it arrives
		time.Sleep(45 * time.Minute)
		p.wantMints(2)
		p.tell("tokens/default/app")
		close(release)
		synctest.Wait()
		p.wantForwarded("app", nil)
		p.wantServed(2, nil)
	})
}

// A standby continues to serve a token that is due. If storage has no newer one, it
// forwards one read in five seconds to the active node.
func TestStandbyServesADueToken(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(46 * time.Minute)
		gets := p.standby.storage.operations.Load()
		forwarded := 0
		for range 100 {
			got := p.standby.creds("app", nil)
			switch {
			case errors.Is(got.err, logical.ErrReadOnly):
				forwarded++
			case got.err != nil || !strings.HasPrefix(got.token, "token-1-"):
				t.Errorf("got %q, %v", got.token, got.err)
			case got.ttl < 30 || got.ttl > 60:
				t.Errorf("got ttl %d, want that of an old token", got.ttl)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if forwarded != 4 {
			t.Errorf("%d of 100 reads in 20 s were forwarded, want 4", forwarded)
		}
		if n := p.standby.storage.operations.Load() - gets; n != 4 {
			t.Errorf("got %d look-ups, want 4", n)
		}
		// If storage has a newer one, it forwards no reads.
		p.mojo.set(func(s *standIn) { s.fail = nil })
		time.Sleep(time.Minute)
		synctest.Wait()
		var number int64
		if _, err := fmt.Sscanf(p.stored("tokens/default/app").AccessToken, "token-%d", &number); err != nil || number < 2 {
			t.Fatalf("storage has token %d, %v", number, err)
		}
		p.wantServed(number, nil)
	})
}

func TestStandbyWhenATokenExpires(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(59*time.Minute + time.Second)
		p.wantForwarded("app", nil)
		time.Sleep(time.Hour)
		if n := p.standby.kept().slots; n != 0 {
			t.Errorf("got %d slots, want 0", n)
		}
	})
}

// What the standby missed, it finds within a minute: a role, a config and a token that a
// restored snapshot brought back.
func TestStandbyNoticesARestoredSnapshot(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		snapshot := map[string]*logical.StorageEntry{}
		for _, key := range []string{"roles/app", "config/default", "tokens/default/app"} {
			entry, err := p.storage.Get(context.Background(), key)
			if err != nil || entry == nil {
				t.Fatal(err)
			}
			snapshot[key] = entry
		}
		restore := func(keys ...string) {
			for _, key := range keys {
				if err := p.storage.Storage.Put(context.Background(), snapshot[key]); err != nil {
					t.Fatal(err)
				}
			}
		}
		p.write("rotate-role/app", nil)
		p.tell("roles/app")
		p.tell("tokens/default/app")
		p.wantServed(2, nil)
		restore("roles/app", "tokens/default/app")
		p.wantServed(2, nil)
		p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
		p.wantServed(1, nil)

		// The same generation, and another token.
		other := p.stored("tokens/default/app")
		other.AccessToken = "token-9-other"
		p.store("tokens/default/app", other)
		p.wantServed(1, nil)
		p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
		var readers sync.WaitGroup
		for range 20 {
			readers.Go(func() { p.wantServed(9, nil) })
		}
		readers.Wait()
		// And no stored token.
		if err := p.storage.Storage.Delete(context.Background(), "tokens/default/app"); err != nil {
			t.Fatal(err)
		}
		p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
		p.wantForwarded("app", nil)
	})
}

// If a reader gives up while the standby compares an entry with storage, the next reader
// repeats the comparison.
func TestReaderWhoLeavesSettlesNoDoubt(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		slow := &slowStorage{p.standby.storage.Storage}
		synctest.Wait() // nothing uses it
		p.standby.storage.Storage = slow
		if err := p.storage.Storage.Delete(context.Background(), "roles/app"); err != nil {
			t.Fatal(err)
		}
		p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		p.standby.credsCtx(ctx, "app", nil)
		p.wantForwarded("app", nil)
	})
}

// slowStorage takes a while to read.
type slowStorage struct{ logical.Storage }

func (s *slowStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	select {
	case <-time.After(100 * time.Millisecond):
		return s.Storage.Get(ctx, key)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A config written by another node is loaded for tokens from storage as well.
func TestTokensFromStorageFollowTheirConfig(t *testing.T) {
	t.Run("dropped", func(t *testing.T) {
		standbyBubble(t, func(p *pair) {
			p.wantToken("app", 1)
			synctest.Wait()
			p.wantServed(1, nil)
			p.write("config", map[string]any{"client_id": "other", "verify_connection": false})
			p.tell("config/default")
			if n := p.standby.kept().slots; n != 0 {
				t.Errorf("got %d slots, want 0", n)
			}
		})
	})
	t.Run("renewed", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m = m.restart()
			m.wantToken("app", 1)
			m.InvalidateKey(context.Background(), "config/default")
			time.Sleep(46 * time.Minute)
			m.wantMints(2)
		})
	})
}

// Once a standby mints for itself, it serves tokens without re-checking the stored copy.
func TestStandbyThatMintsForItselfHasNoDoubts(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
		p.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
		p.tell("config/default")
		p.wantServed(1, nil)
		for _, s := range p.standby.tokens.all() {
			if s.unsure.Load() {
				t.Error("the slot is in doubt forever")
			}
		}
	})
}

// A standby never deletes a token, not even one that it loaded just before it stopped
// using stored tokens.
func TestStandbyDeletesNothing(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantForwarded("app", nil)
		release := make(chan struct{})
		hook := func(key string) {
			if key == "tokens/default/app" {
				<-release
			}
		}
		p.wantToken("app", 1)
		synctest.Wait()
		p.standby.storage.afterGet.Store(&hook)
		p.tell("tokens/default/app") // it starts to load
		p.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
		synctest.Wait()
		stored := p.tokens.all()[0]
		p.store("tokens/default/app", newStoredToken(stored.token.Load(), stored.key)) // as if deleting it had failed
		p.tell("config/default")
		close(release)
		p.wantServed(1, nil)
		p.Cleanup(context.Background()) // so the active node cannot be the one that deletes it
		time.Sleep(2 * time.Hour)
	})
}

// A standby keeps serving its cached tokens while storage fails.
func TestStandbyWithoutStorageServesCachedTokens(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.standby.storage.fail.Store(&errDisk)
		for range 10 {
			p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			p.wantServed(1, nil)
			time.Sleep(time.Minute)
		}
	})
}

// A minute of doubt costs a few storage operations, not one for each read.
func TestDoubtCostsOneLookEach(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		before := p.standby.storage.operations.Load()
		for range 10 {
			p.standby.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			for range 50 {
				p.wantServed(1, nil)
			}
			time.Sleep(time.Minute)
		}
		if n := p.standby.storage.operations.Load() - before; n != 30 {
			t.Errorf("%d storage operations in ten minutes, want one a minute each for role, config and token", n)
		}
	})
}

// The engine reads the replication state once, at the start: a node that is shutting down
// claims that it may write.
func TestStandbyStaysAStandby(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		system := logical.TestSystemView()
		system.ReplicationStateVal = consts.ReplicationPerformanceStandby
		storage := &readOnlyStorage{Storage: m.storage.Storage}
		node := newTestNode(m.t, m.mojo, m.mojo.client, &countingStorage{Storage: storage}, system)
		system.ReplicationStateVal = 0
		p := &pair{m, node, &storage.writes}
		p.wantForwarded("app", nil)
		m.wantMints(0)
	})
}

// A promoted node starts a new backend, which serves the stored tokens.
func TestPromotion(t *testing.T) {
	standbyBubble(t, func(p *pair) {
		p.wantToken("app", 1)
		synctest.Wait()
		p.wantServed(1, nil)
		p.mojo.set(func(s *standIn) { s.fail = errDown })
		promoted := p.restart()
		promoted.wantToken("app", 1)
	})
}
