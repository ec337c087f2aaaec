// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// Vault Enterprise and OpenBao have nodes that serve reads but may not write: a cluster's
// standbys. Performance secondaries of Vault Enterprise are clusters of their own, and
// may write what is local to them: tokens. In these tests, the system view says that the
// engine runs on such a node.

// replica returns a node in the given replication state. It reads m's storage, and may
// not write to it.
func (m *testMount) replica(state consts.ReplicationState, local bool) (node *testMount, writes *atomic.Int64) {
	m.t.Helper()
	storage := &readOnlyStorage{Storage: m.storage.Storage}
	if !isStandby(state) {
		storage.Storage = &localTokens{m.storage.Storage, &logical.InmemStorage{}}
		storage.writable = tokenPrefix
	}
	system := logical.TestSystemView()
	system.ReplicationStateVal = state
	system.LocalMountVal = local
	return newTestNode(m.t, m.mojo, m.mojo.client, &countingStorage{Storage: storage}, system), &storage.writes
}

// readOnlyStorage refuses writes as Vault does on such nodes, and counts the attempts.
type readOnlyStorage struct {
	logical.Storage
	writable string // prefix of the keys that may be written; "" for none
	writes   atomic.Int64
}

func (s *readOnlyStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	if s.writable != "" && strings.HasPrefix(e.Key, s.writable) {
		return s.Storage.Put(ctx, e)
	}
	s.writes.Add(1)
	return logical.ErrReadOnly
}

func (s *readOnlyStorage) Delete(ctx context.Context, key string) error {
	if s.writable != "" && strings.HasPrefix(key, s.writable) {
		return s.Storage.Delete(ctx, key)
	}
	s.writes.Add(1)
	return logical.ErrReadOnly
}

// localTokens holds a cluster's own tokens next to what another cluster replicates.
type localTokens struct {
	logical.Storage
	local logical.Storage
}

func (s *localTokens) of(key string) logical.Storage {
	if strings.HasPrefix(key, tokenPrefix) {
		return s.local
	}
	return s.Storage
}

func (s *localTokens) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	return s.of(key).Get(ctx, key)
}

func (s *localTokens) List(ctx context.Context, prefix string) ([]string, error) {
	return s.of(prefix).List(ctx, prefix)
}

func (s *localTokens) Put(ctx context.Context, e *logical.StorageEntry) error {
	return s.of(e.Key).Put(ctx, e)
}

func (s *localTokens) Delete(ctx context.Context, key string) error {
	return s.of(key).Delete(ctx, key)
}

var replicaStates = map[string]consts.ReplicationState{
	"performance standby":                consts.ReplicationPerformanceStandby,
	"performance secondary":              consts.ReplicationPerformanceSecondary,
	"performance standby of a secondary": consts.ReplicationPerformanceSecondary | consts.ReplicationPerformanceStandby,
}

// Without stored tokens, each node mints for itself.
func TestReplicaServesReadsAndWritesNothing(t *testing.T) {
	for name, state := range replicaStates {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", map[string]any{"scopes": "a,b"})
				m.write("config", map[string]any{"persist_tokens": false, "verify_connection": false})
				m.write("roles/leased", map[string]any{"generate_lease": true})
				node, writes := m.replica(state, false)

				first := node.creds("app", nil)
				if again := node.creds("app", nil); first.err != nil || again.token != first.token {
					t.Errorf("got %v, then %v; want one token from the node's own cache", first, again)
				}
				if got := node.creds("app", map[string]any{"scopes": "a"}); got.err != nil || got.token == first.token {
					t.Errorf("scope subset: got %v", got)
				}
				if got := node.creds("leased", nil); isStandby(state) != (got.err == errForward) { //nolint:errorlint // it must be unwrapped
					t.Errorf("leased: got %v", got.err)
				}
				for _, path := range []string{"config", "config/default", "roles/app", "status"} {
					if node.read(path) == nil {
						t.Errorf("%s: no data", path)
					}
				}
				for _, path := range []string{"config/", "roles/"} {
					if keys := node.do(logical.ListOperation, path, nil).Data["keys"]; keys == nil {
						t.Errorf("%s: no keys", path)
					}
				}
				if _, err := node.request(logical.ReadOperation, "metrics", nil); err != nil {
					t.Error(err)
				}
				minted := m.mojo.mints.Load()
				time.Sleep(time.Hour) // past the renewal of both
				if m.mojo.mints.Load() == minted {
					t.Error("no token was renewed")
				}
				if got := node.creds("app", nil); got.err != nil || got.token == first.token {
					t.Errorf("after the token expired: got %v", got)
				}
				if n := writes.Load(); n != 0 {
					t.Errorf("%d writes were attempted", n)
				}
			})
		})
	}
}

// A write gets the unwrapped error that makes Vault forward the request to a node that
// may write. Before that, the engine sends and changes nothing.
func TestReplicaForwardsWrites(t *testing.T) {
	for name, state := range replicaStates {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(m *testMount) {
				m.configure("app", nil)
				node, writes := m.replica(state, false)
				verified := testConfig(map[string]any{"verify_connection": true, "client_id": "other"})
				for _, c := range []struct {
					op   logical.Operation
					path string
					data map[string]any
				}{
					{logical.UpdateOperation, "config", verified},
					{logical.UpdateOperation, "config/new", verified},
					{logical.DeleteOperation, "config", nil},
					{logical.UpdateOperation, "roles/app", map[string]any{"audience": "other"}},
					{logical.UpdateOperation, "roles/new", nil},
					{logical.DeleteOperation, "roles/app", nil},
					{logical.UpdateOperation, "rotate-role/app", nil},
				} {
					resp, err := node.request(c.op, c.path, c.data)
					if err != logical.ErrReadOnly || resp != nil { //nolint:errorlint // Vault would not forward a wrapped error
						t.Errorf("%s %s: got %v, %v; want an unwrapped ErrReadOnly", c.op, c.path, resp, err)
					}
				}
				m.wantMints(0)
				if n := writes.Load(); n != 0 {
					t.Errorf("%d writes were attempted", n)
				}
				if got := m.read("config")["client_id"]; got != "client" {
					t.Errorf("got client_id %v", got)
				}
			})
		})
	}
}

// A mount with -local belongs to the cluster it is in, even if that is a secondary.
func TestLocalMountOfASecondaryIsWritten(t *testing.T) {
	bubble(t, func(m *testMount) {
		system := logical.TestSystemView()
		system.ReplicationStateVal = consts.ReplicationPerformanceSecondary
		system.LocalMountVal = true
		node := newTestNode(m.t, m.mojo, m.mojo.client, m.storage, system)
		node.configure("app", nil)
		node.wantToken("app", 1)
		node.write("rotate-role/app", nil)
		node.wantToken("app", 2)
	})
}

// If storage turns read-only during a write, as when a node loses its leadership, the
// caller gets Vault's own error, and memory still matches storage.
func TestWritesToReadOnlyStorage(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", map[string]any{"audience": "old"})
		m.wantToken("app", 1)
		readOnly := logical.ErrReadOnly
		var fails atomic.Bool
		synctest.Wait() // nothing uses it
		m.storage.Storage = &failingWrites{m.storage.Storage, readOnly, &fails}
		fails.Store(true)
		for path, data := range map[string]map[string]any{
			"config":          {"client_id": "other", "verify_connection": false},
			"roles/app":       {"audience": "new"},
			"rotate-role/app": nil,
		} {
			if _, err := m.request(logical.UpdateOperation, path, data); err != readOnly { //nolint:errorlint // see above
				t.Errorf("writing %s: got %v, want an unwrapped ErrReadOnly", path, err)
			}
		}
		for _, path := range []string{"config", "roles/app"} {
			if _, err := m.request(logical.DeleteOperation, path, nil); err != readOnly { //nolint:errorlint // see above
				t.Errorf("deleting %s: got %v, want an unwrapped ErrReadOnly", path, err)
			}
		}
		if client, audience := m.read("config")["client_id"], m.read("roles/app")["audience"]; client != "client" || audience != "old" {
			t.Errorf("got client_id %v and audience %v, want the old ones", client, audience)
		}
		if got := m.creds("app", nil); got.err != nil {
			t.Errorf("reading a token: %v", got.err)
		}
	})
}

// A delete that storage refuses drops no token.
func TestFailedDeleteKeepsTokens(t *testing.T) {
	for _, path := range []string{"config", "roles/app"} {
		bubble(t, func(m *testMount) {
			m.configure("app", nil)
			m.wantToken("app", 1)
			var fails atomic.Bool
			broken := errors.New("disk on fire")
			synctest.Wait() // nothing uses it
			m.storage.Storage = &failingWrites{m.storage.Storage, broken, &fails}
			fails.Store(true)
			if _, err := m.request(logical.DeleteOperation, path, nil); !errors.Is(err, broken) {
				t.Errorf("%s: got %v, want the storage's own error", path, err)
			}
			fails.Store(false)
			synctest.Wait()
			m.wantToken("app", 1)
		})
	}
}

// failingWrites can be made to fail writes.
type failingWrites struct {
	logical.Storage
	err   error
	fails *atomic.Bool
}

func (s *failingWrites) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if s.fails.Load() {
		return s.err
	}
	return s.Storage.Put(ctx, entry)
}

func (s *failingWrites) Delete(ctx context.Context, key string) error {
	if s.fails.Load() {
		return s.err
	}
	return s.Storage.Delete(ctx, key)
}

// A reader that comes to a node after an invalidation gets a token for the invalidated
// write or a later one, however the two interleave.
func TestInvalidateRaces(t *testing.T) {
	m := newTestMount(t)
	m.configure("app", map[string]any{"scopes": "0"})
	m.write("config", map[string]any{"client_id": "0", "verify_connection": false})
	node, _ := m.replica(consts.ReplicationPerformanceSecondary, false)
	// Reads from storage return late, which leaves time for much to happen in between.
	slow := func(string) { time.Sleep(rand.N(200 * time.Microsecond)) }
	node.storage.afterGet.Store(&slow)

	const rounds = 300
	var role, config atomic.Int64 // the newest invalidated on the node
	done := make(chan struct{})
	var writers, readers sync.WaitGroup
	writers.Go(func() {
		for n := 1; n <= rounds; n++ {
			m.write("roles/app", map[string]any{"scopes": strconv.Itoa(n)})
			node.InvalidateKey(context.Background(), "roles/app")
			role.Store(int64(n))
		}
	})
	writers.Go(func() {
		for n := 1; n <= rounds; n++ {
			m.write("config", map[string]any{"client_id": strconv.Itoa(n), "verify_connection": false})
			node.InvalidateKey(context.Background(), "config/default")
			config.Store(int64(n))
		}
	})
	for range 8 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				wantRole, wantConfig := role.Load(), config.Load()
				resp, err := node.request(logical.ReadOperation, "creds/app", nil)
				if err == nil {
					err = resp.Error()
				}
				if err != nil {
					t.Error(err)
					return
				}
				if err := checkNewest(resp.Data, wantRole, wantConfig); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	close(done)
	readers.Wait()
	resp, err := node.request(logical.ReadOperation, "creds/app", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkNewest(resp.Data, rounds, rounds); err != nil {
		t.Error(err)
	}
}

// checkNewest checks that a token is for the given role and config or newer ones.
func checkNewest(data map[string]any, role, config int64) error {
	gotRole, err := strconv.ParseInt(data["scope"].(string), 10, 64)
	if err != nil {
		return err
	}
	token := data["access_token"].(string) // token-<number>-<client_id>-…
	parts := strings.Split(token, "-")
	if len(parts) < 3 {
		return errors.New(token)
	}
	gotConfig, err := strconv.ParseInt(parts[2], 10, 64)
	if err != nil {
		return err
	}
	if gotRole < role || gotConfig < config {
		return fmt.Errorf("got a token for role %d and config %d after invalidations of %d and %d", gotRole, gotConfig, role, config)
	}
	return nil
}

// A standby forwards the first reader of a token that was invalidated, even if that
// reader came while the standby was still loading the token.
func TestReaderJoiningTheLoadOfANewTokenIsForwarded(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		node, _ := m.replica(consts.ReplicationPerformanceStandby, false)
		wantForwarded := func() {
			t.Helper()
			if got := node.creds("app", nil); got.err != logical.ErrReadOnly { //nolint:errorlint // Vault would not forward a wrapped error
				t.Errorf("got %q, %v; want it forwarded", got.token, got.err)
			}
		}
		wantForwarded() // no token is stored
		m.wantToken("app", 1)
		synctest.Wait()
		slow := func(string) { time.Sleep(time.Second / 2) }
		node.storage.afterGet.Store(&slow)
		node.InvalidateKey(context.Background(), "tokens/default/app")
		time.Sleep(time.Second / 4)
		wantForwarded()
		if got := node.creds("app", nil); got.err != nil || !strings.HasPrefix(got.token, "token-1-") {
			t.Errorf("the second reader got %q, %v; want token-1", got.token, got.err)
		}
	})
}
