// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/vault/sdk/logical"
)

// loadedSnapshot is a mount whose Vault has loaded a snapshot of its storage.
type loadedSnapshot struct {
	*testMount
	then logical.InmemStorage
}

// SnapshotStorage returns the storage of the only snapshot.
func (s *loadedSnapshot) SnapshotStorage(context.Context, string) (logical.Storage, error) {
	return &s.then, nil
}

// loadSnapshot takes a snapshot of the mount as it is now.
func (m *testMount) loadSnapshot() *loadedSnapshot {
	m.t.Helper()
	s := &loadedSnapshot{testMount: m}
	ctx := context.Background()
	keys, err := logical.CollectKeys(ctx, m.storage.Storage)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, key := range keys {
		entry, err := m.storage.Storage.Get(ctx, key)
		if err == nil {
			err = s.then.Put(ctx, entry)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	return s
}

// from sends a request to the snapshot, as Vault does.
func (s *loadedSnapshot) from(op logical.Operation, path string) (*logical.Response, error) {
	req := &logical.Request{Operation: op, Path: path, RequiresSnapshotID: "id", Storage: logical.NewSnapshotStorageRouter(s.storage, s)}
	return s.HandleRequest(logical.CreateContextWithSnapshotID(context.Background(), "id"), req)
}

// recovers recovers path from the snapshot's source, as Vault does: it reads source
// there, and sends the result in a recover request.
func (s *loadedSnapshot) recovers(path, source string) *logical.Response {
	s.t.Helper()
	there, err := s.from(logical.ReadOperation, source)
	if err != nil || there == nil || there.IsError() {
		s.t.Fatalf("reading %s of the snapshot: %v, %v", source, there, err)
	}
	sent, err := json.Marshal(there.Data)
	if err != nil {
		s.t.Fatal(err)
	}
	req := &logical.Request{Operation: logical.RecoverOperation, Path: path, RequiresSnapshotID: "id", Storage: logical.NewSnapshotStorageRouter(s.storage, s)}
	if source != path {
		req.RecoverSourcePath = source
	}
	if err := json.Unmarshal(sent, &req.Data); err != nil {
		s.t.Fatal(err)
	}
	resp, err := s.HandleRequest(logical.CreateContextWithSnapshotID(context.Background(), ""), req)
	if err != nil {
		s.t.Fatalf("recovering %s: %v", path, err)
	}
	return resp
}

// A config or role is read and listed from a snapshot as it was, without the secret, and
// does not replace the current one in memory.
func TestReadingASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		m.write("config", testConfig(map[string]any{"client_id": "then"}))
		m.write("config/gone", testConfig(map[string]any{"client_id": "gone"}))
		m.write("roles/app", map[string]any{"audience": "then"})
		m.write("roles/gone", map[string]any{"audience": "gone"})
		s := m.loadSnapshot()
		m.write("config", testConfig(map[string]any{"client_id": "now"}))
		m.write("roles/app", map[string]any{"audience": "now"})
		for _, path := range []string{"config/gone", "roles/gone"} {
			m.do(logical.DeleteOperation, path, nil)
		}
		paths := m.SpecialPaths().AllowSnapshotRead
		for path, want := range map[string]map[string]any{
			"config":         {"client_id": "then"},
			"config/default": {"client_id": "then"},
			"config/gone":    {"client_id": "gone"},
			"roles/app":      {"audience": "then"},
			"roles/gone":     {"audience": "gone"},
		} {
			resp, err := s.from(logical.ReadOperation, path)
			if err != nil || resp == nil || resp.IsError() {
				t.Fatalf("%s: %v, %v", path, resp, err)
			}
			for field, value := range want {
				if resp.Data[field] != value {
					t.Errorf("%s of the snapshot has %s %q, want %q", path, field, resp.Data[field], value)
				}
			}
			if text := fmt.Sprint(resp.Data); strings.Contains(text, canary) {
				t.Errorf("%s of the snapshot contains the client secret: %s", path, text)
			}
			if !matchesAny(paths, path) {
				t.Errorf("%s is not among the paths that Vault reads from snapshots: %q", path, paths)
			}
		}
		for path, want := range map[string][]string{"config/": {"default", "gone"}, "roles/": {"app", "gone"}} {
			resp, err := s.from(logical.ListOperation, path)
			if err != nil || !reflect.DeepEqual(resp.Data["keys"], want) {
				t.Errorf("%s of the snapshot has %v, %v; want %q", path, resp, err, want)
			}
			if !matchesAny(paths, path) {
				t.Errorf("%s is not among the paths that Vault lists in snapshots: %q", path, paths)
			}
		}

		if got := m.read("config")["client_id"]; got != "now" {
			t.Errorf("the current config has client_id %q, want now", got)
		}
		if got := m.read("roles/app")["audience"]; got != "now" {
			t.Errorf("the current role has audience %q, want now", got)
		}
		for _, path := range []string{"config/gone", "roles/gone"} {
			if got := m.read(path); got != nil {
				t.Errorf("the deleted %s exists again: %v", path, got)
			}
		}
	})
}

// matchesAny reports whether a path is one of Vault's special paths.
func matchesAny(patterns []string, path string) bool {
	for _, pattern := range patterns {
		if prefix, ok := strings.CutSuffix(pattern, "*"); ok && strings.HasPrefix(path, prefix) || path == pattern {
			return true
		}
	}
	return false
}

// No token is read from a snapshot or minted for one.
func TestNoTokenFromASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		m.configure("app", nil)
		m.read("creds/app")
		synctest.Wait()
		s := m.loadSnapshot()
		if got, err := s.then.List(context.Background(), tokenPrefix); err != nil || len(got) == 0 {
			t.Fatalf("the snapshot has no token: %q, %v", got, err)
		}
		m.do(logical.DeleteOperation, "roles/app", nil)
		minted := m.mojo.mints.Load()
		for path, op := range map[string]logical.Operation{
			"creds/app":          logical.ReadOperation,
			"status":             logical.ReadOperation,
			"metrics":            logical.ReadOperation,
			"rotate-role/app":    logical.RecoverOperation,
			"tokens/default/app": logical.ReadOperation,
		} {
			if resp, err := s.from(op, path); err == nil {
				t.Errorf("%s of %s: got %v, want an error response", op, path, resp)
			}
			if matchesAny(m.SpecialPaths().AllowSnapshotRead, path) {
				t.Errorf("Vault may read %s from a snapshot", path)
			}
		}
		if got := m.mojo.mints.Load(); got != minted {
			t.Errorf("%d tokens were minted for a snapshot", got-minted)
		}
		m.refused(logical.ReadOperation, "creds/app", nil) // the snapshot's role is not used as the current one
	})
}

// A recovered role is as it was in the snapshot, whatever it became since, and has no
// tokens: neither the current ones nor the snapshot's.
func TestRecoveringARole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		then := map[string]any{
			"audience": "https://api.example.com/", "scopes": "a b", "extra_params": "x=y",
			"min_ttl": "10m", "max_ttl": "30m",
		}
		m.configure("app", then)
		wanted := m.read("roles/app")
		older := m.read("creds/app")["access_token"]
		synctest.Wait()
		s := m.loadSnapshot()

		m.write("roles/app", map[string]any{"audience": "other", "scopes": "c", "extra_params": "z=y", "min_ttl": 0, "max_ttl": 0, "generate_lease": true})
		m.write("roles/app", map[string]any{"generate_lease": false})
		newer := m.read("creds/app")["access_token"]
		if resp := s.recovers("roles/app", "roles/app"); resp != nil {
			t.Errorf("recovering: %v", resp)
		}
		if got := m.read("roles/app"); !reflect.DeepEqual(got, wanted) {
			t.Errorf("recovered %v, want %v", got, wanted)
		}
		if got := m.read("creds/app")["access_token"]; got == newer || got == older {
			t.Errorf("the recovered role serves %q, an older token", got)
		}

		// The same again: only the tokens change.
		newer = m.read("creds/app")["access_token"]
		s.recovers("roles/app", "roles/app")
		m.wantStored()
		if got := m.read("creds/app")["access_token"]; got == newer {
			t.Errorf("the recovered role serves %q, an older token", got)
		}

		m.do(logical.DeleteOperation, "roles/app", nil)
		// Even if the snapshot's token were in storage again, it would not be served.
		entry, err := s.then.Get(context.Background(), tokenPrefix+"default/app")
		if err != nil || entry == nil {
			t.Fatalf("the snapshot has no token: %v", err)
		}
		if err := m.storage.Storage.Put(context.Background(), entry); err != nil {
			t.Fatal(err)
		}
		s.recovers("roles/app", "roles/app")
		if got := m.read("creds/app")["access_token"]; got == older {
			t.Errorf("the recovered role serves %q, the snapshot's token", got)
		}

		s.recovers("roles/copy", "roles/app")
		if got := m.read("roles/copy"); !reflect.DeepEqual(got, wanted) {
			t.Errorf("recovered as roles/copy: got %v, want %v", got, wanted)
		}
	})
}

// A recovered config has its snapshot's client secret together with its snapshot's
// token_url. Tokens of the same client are kept.
func TestRecoveringAConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		m.configure("app", nil)
		wanted := m.read("config")
		s := m.loadSnapshot()
		secret := func(name string) string {
			t.Helper()
			config, err := m.configs.load(context.Background(), m.storage, name)
			if err != nil || config == nil {
				t.Fatalf("config %q: %v, %v", name, config, err)
			}
			return config.entry.ClientSecret
		}
		check := func(name string, resp *logical.Response) {
			t.Helper()
			if resp == nil || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "was not verified") {
				t.Errorf("recovering config %q: got %v, want a warning about the client secret", name, resp)
			}
			if got := m.read("config/" + name); !reflect.DeepEqual(got, wanted) {
				t.Errorf("recovered %v, want %v", got, wanted)
			}
			if got := secret(name); got != canary {
				t.Errorf("config %q has the client secret %q, want the snapshot's", name, got)
			}
		}

		m.write("config", map[string]any{"client_secret": "wrong-secret", "verify_connection": false})
		token := m.read("creds/app")["access_token"]
		check("default", s.recovers("config", "config"))
		if got := m.read("creds/app")["access_token"]; got != token {
			t.Error("a token of the same client was dropped")
		}

		m.write("config", testConfig(map[string]any{"token_url": "https://elsewhere.test/", "client_secret": "other-secret", "max_retries": 7}))
		token = m.read("creds/app")["access_token"]
		check("default", s.recovers("config/default", "config/default"))
		if got := m.read("creds/app")["access_token"]; got == token {
			t.Error("a token of another client is served")
		}
		then, err := m.configs.load(context.Background(), &s.then, "default")
		if err != nil {
			t.Fatal(err)
		}
		if now := m.configs.current("default"); now.entry.TokenGeneration == then.entry.TokenGeneration {
			t.Error("tokens of the snapshot's generation are valid again")
		}

		token = m.read("creds/app")["access_token"]
		m.do(logical.DeleteOperation, "config", nil)
		check("default", s.recovers("config", "config"))
		if got := m.read("creds/app")["access_token"]; got == token {
			t.Error("a token of the deleted config is served")
		}

		check("copy", s.recovers("config/copy", "config/default"))
		if resp := s.recovers("config/copy", "config"); !resp.IsError() {
			t.Errorf("from another kind of path: got %v, want an error response", resp)
		}
		if err := s.then.Delete(context.Background(), "config/default"); err != nil {
			t.Fatal(err)
		}
		req := &logical.Request{Operation: logical.RecoverOperation, Path: "config", RequiresSnapshotID: "id", Storage: logical.NewSnapshotStorageRouter(s.storage, s)}
		if resp, err := m.HandleRequest(context.Background(), req); err != nil || !resp.IsError() || !strings.Contains(resp.Error().Error(), `the snapshot has no config "default"`) {
			t.Errorf("a config missing from the snapshot: got %v, %v", resp, err)
		}
		if text := fmt.Sprint(m.read("config"), m.read("status")); strings.Contains(text, canary) {
			t.Errorf("the client secret is visible: %s", text)
		}
	})
}
