// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
)

// What the engine stores of tokens, when, and how a later process uses it.

// restart starts the mount again over the same storage, as after a kill -9: the old one
// does nothing more.
func (m *testMount) restart() *testMount {
	m.t.Helper()
	synctest.Wait() // everything in progress is done
	old := m.storage.Storage
	m.storage.Storage = deadStorage{}
	m.Cleanup(context.Background())
	storage := &countingStorage{Storage: old}
	node := newTestNode(m.t, m.mojo, m.mojo.client, storage, logical.TestSystemView())
	if err := node.Initialize(context.Background(), &logical.InitializationRequest{Storage: storage}); err != nil {
		m.t.Fatal(err)
	}
	return node
}

var errDead = errors.New("the process is dead")

// deadStorage is the storage of a dead process.
type deadStorage struct{}

func (deadStorage) Get(context.Context, string) (*logical.StorageEntry, error) { return nil, errDead }
func (deadStorage) List(context.Context, string) ([]string, error)             { return nil, errDead }
func (deadStorage) Put(context.Context, *logical.StorageEntry) error           { return errDead }
func (deadStorage) Delete(context.Context, string) error                       { return errDead }

// stored returns the token that storage has at a key, or nil if there is none.
func (m *testMount) stored(key string) *storedToken {
	m.t.Helper()
	entry, err := m.storage.Storage.Get(context.Background(), key)
	if err != nil {
		m.t.Fatal(err)
	}
	if entry == nil {
		return nil
	}
	stored := new(storedToken)
	if err := entry.DecodeJSON(stored); err != nil {
		m.t.Fatal(err)
	}
	return stored
}

// store puts a token into storage without the engine.
func (m *testMount) store(key string, stored *storedToken) {
	m.t.Helper()
	entry, err := logical.StorageEntryJSON(key, stored)
	if err == nil {
		err = m.storage.Storage.Put(context.Background(), entry)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}

// storedKeys returns the keys below tokens/.
func (m *testMount) storedKeys() []string {
	m.t.Helper()
	keys, err := logical.CollectKeysWithPrefix(context.Background(), m.storage.Storage, tokenPrefix)
	if err != nil {
		m.t.Fatal(err)
	}
	slices.Sort(keys)
	return keys
}

func (m *testMount) wantStored(want ...string) {
	m.t.Helper()
	synctest.Wait()
	if got := m.storedKeys(); !slices.Equal(got, want) {
		m.t.Errorf("storage has %q, want %q", got, want)
	}
}

func (m *testMount) outcomes() map[string]any { return m.read("status")["reads"].(map[string]any) }

func TestTokensOutliveTheProcess(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "a,b"})
		before := m.do(logical.ReadOperation, "creds/app", nil).Data
		m.wantStored("tokens/default/app")
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		for range 3 {
			time.Sleep(time.Minute)
			m = m.restart()
			after := m.do(logical.ReadOperation, "creds/app", nil).Data
			delete(before, "ttl")
			delete(after, "ttl")
			if !maps.Equal(before, after) {
				t.Errorf("got %v after a restart, want %v", after, before)
			}
		}
		m.wantMints(1)
		m.wantToken("app", 1)
		if got := m.outcomes(); got["restored"] != int64(1) || got["hit"] != int64(1) {
			t.Errorf("got the counts of reads %v", got)
		}
		// It is renewed as before the restart, because it was read.
		m.mojo.set(func(s *standIn) { s.fail = nil })
		time.Sleep(45 * time.Minute)
		m.wantToken("app", 2)
		m.wantMints(2)
	})
}

// All readers of the first token after a restart share one look-up.
func TestReadersShareTheLookUp(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		m = m.restart()
		m.read("roles/app")
		m.read("config")
		time.Sleep(time.Second) // for the sweep
		slow := func(string) { time.Sleep(time.Second / 2) }
		m.storage.afterGet.Store(&slow)
		before := m.storage.operations.Load()
		var readers sync.WaitGroup
		for range 50 {
			readers.Go(func() {
				if got := m.creds("app", nil); got.err != nil {
					t.Error(got.err)
				}
			})
		}
		readers.Wait()
		if n := m.storage.operations.Load() - before; n != 1 {
			t.Errorf("%d storage operations, want 1", n)
		}
		m.wantMints(1)
	})
}

// A mint is one write, after its readers got the token; a cached read is no operation.
func TestStorageOperationsOfReads(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"scopes": "a,b"})
		writes := &countingWrites{Storage: m.storage.Storage, slow: 5 * time.Second}
		synctest.Wait() // nothing uses it
		m.storage.Storage = writes
		began := time.Now()
		m.wantToken("app", 1)
		if took := time.Since(began); took > time.Second {
			t.Errorf("the reader waited %s for storage", took)
		}
		time.Sleep(10 * time.Second)
		if got := writes.to("tokens/default/app"); got != 1 {
			t.Errorf("%d writes, want 1", got)
		}
		before := m.storage.operations.Load()
		for range 200 {
			m.creds("app", nil)
		}
		if n := m.storage.operations.Load() - before; n != 0 {
			t.Errorf("200 cached reads caused %d storage operations", n)
		}
		m.creds("app", map[string]any{"scopes": "a"})
		time.Sleep(time.Hour) // both were renewed
		synctest.Wait()
		if got := writes.to("tokens/default/app"); got != int(m.mojo.mints.Load())-2 {
			t.Errorf("%d writes of %d mints, 2 of which were for a scope subset", got, m.mojo.mints.Load())
		}
		m.wantStored("tokens/default/app")
	})
}

// countingWrites counts the writes and deletions of each key, and takes a while.
type countingWrites struct {
	logical.Storage
	slow time.Duration
	mu   sync.Mutex
	of   map[string]int
	log  []string
}

func (s *countingWrites) count(what, key string) {
	time.Sleep(s.slow)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of == nil {
		s.of = make(map[string]int)
	}
	s.of[key]++
	s.log = append(s.log, what+" "+key)
}

// to returns the number of writes and deletions of a key.
func (s *countingWrites) to(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.of[key]
}

func (s *countingWrites) Put(ctx context.Context, e *logical.StorageEntry) error {
	s.count("put", e.Key)
	return s.Storage.Put(ctx, e)
}

func (s *countingWrites) Delete(ctx context.Context, key string) error {
	s.count("delete", key)
	return s.Storage.Delete(ctx, key)
}

func TestUnservableStoredTokenIsIgnored(t *testing.T) {
	for name, change := range map[string]func(m *testMount, stored *storedToken){
		"another role generation":   func(_ *testMount, s *storedToken) { s.RoleGeneration += "x" },
		"another config generation": func(_ *testMount, s *storedToken) { s.ConfigGeneration += "x" },
		"at its floor":              func(*testMount, *storedToken) { time.Sleep(59 * time.Minute) },
		"minted too far ahead": func(_ *testMount, s *storedToken) {
			s.MintedAt, s.ExpiresAt = time.Now().Add(61*time.Second), time.Now().Add(2*time.Hour)
		},
		"without a token": func(_ *testMount, s *storedToken) { s.AccessToken = "" },
		"max_ttl": func(m *testMount, _ *storedToken) {
			m.write("roles/app", map[string]any{"max_ttl": "5m"})
			time.Sleep(5 * time.Minute)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				synctest.Wait()
				stored := m.stored("tokens/default/app")
				m = m.restart()
				change(m, stored)
				m.store("tokens/default/app", stored)
				m.wantToken("app", 2)
			})
		})
	}
	t.Run("invalid JSON", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m = m.restart()
			if err := m.storage.Put(context.Background(), &logical.StorageEntry{Key: "tokens/default/app", Value: []byte("{")}); err != nil {
				t.Fatal(err)
			}
			m.wantToken("app", 2)
		})
	})
}

func TestStoredTokenFromAClockAheadIsServedWithinItsFloor(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		synctest.Wait()
		stored := m.stored("tokens/default/app")
		stored.MintedAt, stored.ExpiresAt = stored.MintedAt.Add(59*time.Second), stored.ExpiresAt.Add(59*time.Second)
		m = m.restart()
		m.store("tokens/default/app", stored)
		m.wantToken("app", 1)
	})
}

// Fields added by later versions are ignored.
func TestStoredTokenWithUnknownFields(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		synctest.Wait()
		entry, err := m.storage.Get(context.Background(), "tokens/default/app")
		if err != nil {
			t.Fatal(err)
		}
		entry.Value = append([]byte(`{"dpop":{"jkt":[1,2]},`), entry.Value[1:]...)
		m = m.restart()
		if err := m.storage.Put(context.Background(), entry); err != nil {
			t.Fatal(err)
		}
		m.wantToken("app", 1)
	})
}

// After a restart, a token without a lifetime keeps the assumed one, and a token that
// MojoAuth returned again keeps its first expiry.
func TestRestoredTokensKeepTheirTimes(t *testing.T) {
	t.Run("no lifetime", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.mojo.set(func(s *standIn) { s.lifetime = 0 })
			m.configure("app", nil)
			before := m.wantToken("app", 1)
			m = m.restart()
			after := m.wantToken("app", 1)
			if len(before.warnings) != 1 || !slices.Equal(before.warnings, after.warnings) {
				t.Errorf("got the warnings %q, then %q", before.warnings, after.warnings)
			}
		})
	})
	t.Run("returned again", func(t *testing.T) {
		bubble(t, func(m *testMount) {
			m.mojo.set(func(s *standIn) { s.alter = func(tok *token) { tok.accessToken = "token-1-again" } })
			m.configure("app", nil)
			before := m.do(logical.ReadOperation, "creds/app", nil).Data
			time.Sleep(50 * time.Minute) // MojoAuth returned it again
			synctest.Wait()
			if m.stored("tokens/default/app").RepeatedUntil.IsZero() {
				t.Error("storage does not record that the token was returned again")
			}
			m = m.restart()
			time.Sleep(9*time.Minute + 30*time.Second) // below the usual floor
			m.mojo.set(func(s *standIn) { s.fail = errDown })
			after := m.do(logical.ReadOperation, "creds/app", nil).Data
			if after["expires_at"] != before["expires_at"] || after["last_vault_rotation"] != before["last_vault_rotation"] {
				t.Errorf("got %v, want the times of %v", after, before)
			}
		})
	})
}

func TestDroppedTokensAreDeleted(t *testing.T) {
	for name, drop := range map[string]func(m *testMount){
		"role deleted":   func(m *testMount) { m.do(logical.DeleteOperation, "roles/app", nil) },
		"role changed":   func(m *testMount) { m.write("roles/app", map[string]any{"audience": "other"}) },
		"role moved":     func(m *testMount) { m.write("roles/app", map[string]any{"config": "other"}) },
		"config deleted": func(m *testMount) { m.do(logical.DeleteOperation, "config", nil) },
		"client changed": func(m *testMount) {
			m.write("config", map[string]any{"client_id": "other", "verify_connection": false})
		},
		"endpoint changed": func(m *testMount) {
			m.write("config", testConfig(map[string]any{"token_url": "https://other.test/oauth2/token"}))
		},
		"persist_tokens disabled": func(m *testMount) {
			m.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.write("config/other", testConfig(nil))
				m.write("roles/kept", map[string]any{"config": "other"})
				m.wantToken("app", 1)
				m.wantToken("kept", 2)
				m.wantStored("tokens/default/app", "tokens/other/kept")
				drop(m)
				m.wantStored("tokens/other/kept")
			})
		})
	}
	for name, change := range map[string]func(m *testMount){
		"the same role again": func(m *testMount) { m.write("roles/app", map[string]any{"audience": ""}) },
		"min_ttl":             func(m *testMount) { m.write("roles/app", map[string]any{"min_ttl": "1m"}) },
		"client_secret": func(m *testMount) {
			m.write("config", map[string]any{"client_secret": canary + "2", "verify_connection": false})
		},
	} {
		t.Run("not by "+name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				change(m)
				m.wantStored("tokens/default/app")
				m = m.restart()
				m.wantToken("app", 1)
			})
		})
	}
}

// The process dies between the write and the deletion. The next one does not serve what
// is left, and its sweep deletes it.
func TestTokensLeftByAKilledProcessAreSweptNotServed(t *testing.T) {
	for name, drop := range map[string]func(m *testMount){
		"role deleted": func(m *testMount) {
			m.do(logical.DeleteOperation, "roles/app", nil)
			m = m.restart()
			m.write("roles/app", nil)
		},
		"role changed":   func(m *testMount) { m.write("roles/app", map[string]any{"audience": "other"}) },
		"client changed": func(m *testMount) { m.write("config", testConfig(map[string]any{"client_id": "other"})) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				m.wantStored("tokens/default/app")
				left := m.stored("tokens/default/app")
				real := m.storage.Storage
				drop(m)
				m.storage.Storage = real // drop may have restarted it
				m.store("tokens/default/app", left)
				m = m.restart()
				m.wantToken("app", 2)
			})
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				m.wantToken("app", 1)
				m.wantStored("tokens/default/app")
				left := m.stored("tokens/default/app")
				real := m.storage.Storage
				drop(m)
				m.storage.Storage = real
				m.store("tokens/default/app", left)
				m = m.restart()
				time.Sleep(time.Second)
				m.wantStored()
			})
		})
	}
}

// A write succeeds with a warning if its token cannot be deleted.
func TestTokenThatCannotBeDeletedIsAWarning(t *testing.T) {
	for path, op := range map[string]logical.Operation{"roles/app": logical.DeleteOperation, "config": logical.DeleteOperation} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m.wantStored("tokens/default/app")
			stubborn := &failingTokens{Storage: m.storage.Storage}
			synctest.Wait() // nothing uses it
			m.storage.Storage = stubborn
			stubborn.fails.Store(true)
			resp := m.do(op, path, nil)
			if resp == nil || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "sweep") {
				t.Errorf("%s: got %v, want a warning", path, resp)
			}
			stubborn.fails.Store(false)
			m.wantStored("tokens/default/app")
			time.Sleep(2 * time.Hour)
			m.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			time.Sleep(time.Second)
			m.wantStored()
		})
	}
}

// failingTokens can be made to fail operations on stored tokens.
type failingTokens struct {
	logical.Storage
	fails atomic.Bool
}

var errDisk = errors.New("disk on fire")

func (s *failingTokens) err(key string) error {
	if s.fails.Load() && strings.HasPrefix(key, tokenPrefix) {
		return errDisk
	}
	return nil
}

func (s *failingTokens) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := s.err(key); err != nil {
		return nil, err
	}
	return s.Storage.Get(ctx, key)
}

func (s *failingTokens) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.err(prefix); err != nil {
		return nil, err
	}
	return s.Storage.List(ctx, prefix)
}

func (s *failingTokens) Put(ctx context.Context, e *logical.StorageEntry) error {
	if err := s.err(e.Key); err != nil {
		return err
	}
	return s.Storage.Put(ctx, e)
}

func (s *failingTokens) Delete(ctx context.Context, key string) error {
	if err := s.err(key); err != nil {
		return err
	}
	return s.Storage.Delete(ctx, key)
}

// Failing storage affects no reader: failures are counted and logged once, and storage is
// used again later.
func TestFailingTokenStorageAffectsNoReader(t *testing.T) {
	bubble(t, func(m *testMount) {
		var log syncBuffer
		m.Setup(context.Background(), &logical.BackendConfig{ //nolint:errcheck // never fails
			StorageView: m.storage, Logger: hclog.New(&hclog.LoggerOptions{Output: &log}), System: logical.TestSystemView(),
		})
		broken := &failingTokens{Storage: m.storage.Storage}
		broken.fails.Store(true)
		synctest.Wait() // nothing uses it
		m.storage.Storage = broken
		m.configure("app", nil)
		for i := range 5 {
			m.write(fmt.Sprintf("roles/r%d", i), nil)
			m.wantToken(fmt.Sprintf("r%d", i), int64(i+1))
		}
		m.wantToken("r0", 1)
		synctest.Wait()
		for _, line := range []string{`mojoauth_token_store_errors_total{operation="save"} 5`, `mojoauth_token_store_errors_total{operation="load"} 5`} {
			if got := m.metrics(); !strings.Contains(got, line) {
				t.Errorf("no line %s", line)
			}
		}
		if n := strings.Count(log.String(), "cannot use stored tokens"); n != 2 {
			t.Errorf("got %d lines in the log, want one for loads and one for saves:\n%s", n, log.String())
		}
		if strings.Contains(log.String(), "token-") {
			t.Errorf("a token is in the log:\n%s", log.String())
		}
		broken.fails.Store(false)
		m.write("rotate-role/r0", nil)
		m.wantStored("tokens/default/r0")
	})
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// A node that may write remembers that storage has no token. An outage costs one look-up,
// no matter how many readers come.
func TestBackOffCostsOneLookUp(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.configure("other", nil)
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		var gets atomic.Int64
		hook := func(key string) {
			if key == "tokens/default/other" {
				gets.Add(1)
			}
		}
		m.storage.afterGet.Store(&hook)
		m.creds("app", nil)
		for range 40 {
			if got := m.creds("other", nil); got.err == nil {
				t.Error("got a token")
			}
			time.Sleep(time.Second)
		}
		if n := gets.Load(); n != 1 {
			t.Errorf("%d look-ups, want 1", n)
		}
	})
}

// While storage fails, the engine does not repeat the look-up for each reader, but at
// most once a second for each key. Once storage works, it serves the token.
func TestFailingStorageCostsOneLookUpASecond(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/other", nil)
		m.wantToken("app", 1)
		m = m.restart()
		broken := &failingTokens{Storage: m.storage.Storage}
		broken.fails.Store(true)
		synctest.Wait() // nothing uses it
		m.storage.Storage = broken
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.creds("other", nil)
		m.creds("app", nil)
		before := m.storage.operations.Load()
		for range 100 {
			if got := m.creds("app", nil); got.err == nil {
				t.Error("got a token")
			}
			time.Sleep(40 * time.Millisecond)
		}
		if n := m.storage.operations.Load() - before; n > 10 {
			t.Errorf("%d storage operations in 4 s, want a look-up a second and what a mint reads", n)
		}
		broken.fails.Store(false)
		time.Sleep(time.Second)
		m.wantToken("app", 1)
	})
}

// If a read's time is over while it looks for a stored token, the error says so.
func TestReadDelayedByStorageSaysSo(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"request_timeout": 1}))
		m.write("roles/app", nil)
		m.read("roles/app")
		m.read("config")
		slow := func(key string) {
			if strings.HasPrefix(key, tokenPrefix) {
				time.Sleep(950 * time.Millisecond)
			}
		}
		m.storage.afterGet.Store(&slow)
		for _, after := range []time.Duration{500 * time.Millisecond, 1500 * time.Millisecond} { // each time it looks again
			time.AfterFunc(after, func() {
				role := m.storedRole("app")
				role.TokenGeneration += "x"
				entry, err := logical.StorageEntryJSON("roles/app", &role)
				if err == nil {
					err = m.storage.Storage.Put(context.Background(), entry)
				}
				if err != nil {
					t.Error(err)
				}
				m.InvalidateKey(context.Background(), "roles/app")
			})
		}
		began := time.Now()
		got := m.creds("app", nil)
		if took := time.Since(began); got.err == nil || !strings.Contains(got.err.Error(), "took longer than the request may take") || took > 2*time.Second {
			t.Errorf("got %q, %v after %s; want it to say that storage took longer", got.token, got.err, took)
		}
	})
}

// A stored token is also served during a back-off.
func TestStoredTokenIsServedDuringABackOff(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("roles/cold", nil)
		m.wantToken("app", 1)
		m = m.restart()
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		if got := m.creds("cold", nil); got.err == nil {
			t.Error("got a token")
		}
		m.wantToken("app", 1)
	})
}

// The role entry is written first, then its token; then the rotation returns.
func TestRotationIsStoredBeforeItReturns(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		synctest.Wait()
		writes := &countingWrites{Storage: m.storage.Storage}
		synctest.Wait() // nothing uses it
		m.storage.Storage = writes
		m.write("rotate-role/app", nil)
		if want := []string{"put roles/app", "put tokens/default/app"}; !slices.Equal(writes.log, want) {
			t.Errorf("got %q, want %q", writes.log, want)
		}
		m = m.restart()
		m.wantToken("app", 2)
		m.wantMints(2)
	})
}

// Also after a restart, a rotation that returns the same token fails.
func TestRotationThatReturnsTheStoredTokenFails(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.alter = func(tok *token) { tok.accessToken = "token-1-again" } })
		m.configure("app", nil)
		m.wantToken("app", 1)
		m = m.restart()
		if _, err := m.request(logical.UpdateOperation, "rotate-role/app", nil); err == nil {
			t.Error("the rotation succeeded")
		}
		m.wantToken("app", 1)
	})
}

// A rotation replaces a token that another node minted, even if that node's clock was
// ahead.
func TestRotationReplacesATokenFromAClockAhead(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		synctest.Wait()
		stored := m.stored("tokens/default/app")
		stored.MintedAt, stored.ExpiresAt = stored.MintedAt.Add(50*time.Second), stored.ExpiresAt.Add(50*time.Second)
		m = m.restart()
		m.store("tokens/default/app", stored)
		m.wantToken("app", 1)
		m.write("rotate-role/app", nil)
		m.wantToken("app", 2)
		m.wantMints(2)
		if got := m.stored("tokens/default/app"); !strings.HasPrefix(got.AccessToken, "token-2-") {
			t.Errorf("storage has %+v", got)
		}
	})
}

// The delayed write of an older token does not overwrite a newer one.
func TestDelayedSaveDoesNotOverwriteANewerToken(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		held := &heldWrites{Storage: m.storage.Storage, until: make(chan struct{})}
		synctest.Wait() // nothing uses it
		m.storage.Storage = held
		m.wantToken("app", 1)
		synctest.Wait() // its write is in progress
		time.Sleep(2 * time.Second)
		refused := formatTime(time.Now())
		if got := m.creds("app", map[string]any{"minted_after": refused}); got.err != nil {
			t.Fatal(got.err)
		}
		m.wantToken("app", 2)
		close(held.until)
		synctest.Wait()
		if got := m.stored("tokens/default/app"); got == nil || !strings.HasPrefix(got.AccessToken, "token-2-") {
			t.Errorf("storage has %+v, want the second", got)
		}
	})
}

// A save that is delayed until its role is deleted leaves no token.
func TestDelayedSaveDoesNotOutliveItsRole(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		held := &heldWrites{Storage: m.storage.Storage, until: make(chan struct{})}
		synctest.Wait() // nothing uses it
		m.storage.Storage = held
		m.wantToken("app", 1)
		synctest.Wait()
		done := make(chan struct{})
		go func() { defer close(done); m.do(logical.DeleteOperation, "roles/app", nil) }()
		synctest.Wait()
		close(held.until)
		<-done
		m.wantStored()
	})
}

// Nor does a save that is delayed until its config drops its tokens, even though storage
// does not list it yet.
func TestDelayedSaveDoesNotOutliveItsConfig(t *testing.T) {
	for name, drop := range map[string]func(m *testMount){
		"config deleted": func(m *testMount) { m.do(logical.DeleteOperation, "config", nil) },
		"client changed": func(m *testMount) {
			m.write("config", map[string]any{"client_id": "other", "verify_connection": false})
		},
		"persist_tokens disabled": func(m *testMount) {
			m.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				held := &heldWrites{Storage: m.storage.Storage, until: make(chan struct{})}
				synctest.Wait() // nothing uses it
				m.storage.Storage = held
				m.wantToken("app", 1)
				synctest.Wait()
				done := make(chan struct{})
				go func() { defer close(done); drop(m) }()
				synctest.Wait()
				close(held.until)
				<-done
				m.wantStored()
			})
		})
	}
}

// heldWrites delays the writes of tokens.
type heldWrites struct {
	logical.Storage
	until chan struct{}
}

func (s *heldWrites) Put(ctx context.Context, e *logical.StorageEntry) error {
	if strings.HasPrefix(e.Key, tokenPrefix) {
		<-s.until
	}
	return s.Storage.Put(ctx, e)
}

// Closing waits for a write in progress.
func TestClosingWaitsForASave(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		writes := &countingWrites{Storage: m.storage.Storage, slow: 3 * time.Second}
		synctest.Wait() // nothing uses it
		m.storage.Storage = writes
		m.wantToken("app", 1)
		m.Cleanup(context.Background())
		if got := m.storedKeys(); len(got) != 1 {
			t.Errorf("storage has %q after closing", got)
		}
	})
}

func TestExpiredTokensAreDeleted(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.mojo.set(func(s *standIn) { s.lifetime = 20 * time.Second })
		m.configure("app", nil)
		m.wantToken("app", 1)
		m.wantStored("tokens/default/app")
		time.Sleep(time.Minute) // it was renewed once, because it was read, and lapsed
		m.wantStored()
		m.wantMints(2)
	})
}

func TestSweep(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.write("config/not", testConfig(map[string]any{"persist_tokens": false}))
		m.write("roles/not", map[string]any{"config": "not"})
		m.wantToken("app", 1)
		synctest.Wait()
		good := *m.stored("tokens/default/app")
		roleGeneration := m.storedRole("not").TokenGeneration
		ended, orphan, moved, other := good, good, good, good
		m.write("roles/ended", nil)
		ended.RoleGeneration = m.storedRole("ended").TokenGeneration
		ended.MintedAt, ended.ExpiresAt = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		orphan.ExpiresAt = time.Now().Add(300 * 24 * time.Hour)
		other.RoleGeneration = "other"
		m.store("tokens/default/ended", &ended)
		m.store("tokens/default/gone", &orphan)
		m.store("tokens/gone/app", &moved)
		m.store("tokens/not/not", &storedToken{AccessToken: "x", MintedAt: time.Now(), ExpiresAt: time.Now().Add(time.Hour), RoleGeneration: roleGeneration})
		m.write("roles/other", nil)
		m.store("tokens/default/other", &other)
		if err := m.storage.Put(context.Background(), &logical.StorageEntry{Key: "tokens/default/broken", Value: []byte("{")}); err != nil {
			t.Fatal(err)
		}
		m = m.restart()
		time.Sleep(time.Second)
		m.wantStored("tokens/default/app")
		m.wantToken("app", 1)

		// And every hour, not more often.
		m.store("tokens/default/gone", &orphan)
		for range 58 {
			m.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			time.Sleep(time.Minute)
		}
		m.wantStored("tokens/default/app", "tokens/default/gone")
		for range 3 {
			m.PeriodicFunc(context.Background(), nil) //nolint:errcheck // never fails
			time.Sleep(time.Minute)
		}
		if got := m.storedKeys(); slices.Contains(got, "tokens/default/gone") {
			t.Errorf("storage has %q after an hour", got)
		}
	})
}

// A role or config that cannot be decoded has no tokens: a new one has another
// generation.
func TestSweepDeletesTokensOfUndecodableEntries(t *testing.T) {
	for _, key := range []string{"roles/app", "config/default"} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			m.wantStored("tokens/default/app")
			if err := m.storage.Storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte("{")}); err != nil {
				t.Fatal(err)
			}
			m = m.restart()
			time.Sleep(time.Minute)
			m.wantStored()
		})
	}
}

// The sweep leaves room for other storage operations, and stops when the mount closes.
func TestSweepIsPaced(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		for i := range 500 {
			m.store(fmt.Sprintf("tokens/default/gone%d", i), &storedToken{AccessToken: "x", ExpiresAt: time.Now().Add(time.Hour)})
		}
		m = m.restart()
		for range 5 {
			before := m.storage.operations.Load()
			time.Sleep(time.Second)
			if n := m.storage.operations.Load() - before; n > 100 || n < 50 {
				t.Errorf("%d operations in a second, want at most 100", n)
			}
		}
		m.Cleanup(context.Background())
		before := m.storage.operations.Load()
		time.Sleep(time.Minute)
		if n := m.storage.operations.Load() - before; n != 0 {
			t.Errorf("%d operations after closing", n)
		}
	})
}

// If a config has many tokens, they are deleted in the background.
func TestManyTokensOfAConfigAreDeletedInTheBackground(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		for i := range 250 {
			m.store(fmt.Sprintf("tokens/default/r%d", i), &storedToken{AccessToken: "x", ExpiresAt: time.Now().Add(time.Hour)})
		}
		began := time.Now()
		m.do(logical.DeleteOperation, "config", nil)
		if took := time.Since(began); took > time.Second {
			t.Errorf("the request took %s", took)
		}
		if n := len(m.storedKeys()); n > 150 || n == 0 {
			t.Errorf("right after the write, %d tokens are left, want 150", n)
		}
		time.Sleep(time.Minute)
		m.wantStored()
	})
}

func TestPersistTokensFalseKeepsNothingAtRest(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.write("config", testConfig(map[string]any{"persist_tokens": false}))
		m.write("roles/app", nil)
		m.wantToken("app", 1)
		m.write("rotate-role/app", nil)
		m.wantToken("app", 2)
		m.wantStored()
		m = m.restart()
		m.wantToken("app", 3)
		m.wantStored()
		m.write("config", map[string]any{"persist_tokens": true, "verify_connection": false})
		m.wantToken("app", 3)
		m.write("rotate-role/app", nil)
		m.wantStored("tokens/default/app")
	})
}

// Storage may give a fresh token at the moment a mint fails. The readers of that mint get it
// like any other fresh token.
func TestFreshTokenThatComesWhenAMintFails(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.random = func() float64 { return 0 }
		m.configure("app", nil)
		m.wantToken("app", 1)
		s := m.tokens.slotsOf("app")[0]
		f := &flight{up: m.tokens.upstreams["default"], err: &unavailable{mintError: &mintError{class: classNetwork}, config: "default"}}
		got, err := s.arrived(f, &query{spec: *s.spec}, nil)
		if want := int64(45 * 60); err != nil || got.ttl != want || got.failure != nil || got.outcome != outcomeHit {
			t.Errorf("got ttl %d, outcome %s, failure %v, error %v; want ttl %d and a hit", got.ttl, got.outcome, got.failure, err, want)
		}
		time.Sleep(50 * time.Minute) // it is renewed meanwhile
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		time.Sleep(50 * time.Minute) // and then due
		if got, err := s.arrived(f, &query{spec: *s.spec}, nil); err != nil || got.outcome != outcomeStale || got.failure == nil || got.ttl > 60 {
			t.Errorf("got ttl %d, outcome %s, failure %v, error %v; want a due token with a failure", got.ttl, got.outcome, got.failure, err)
		}
	})
}
