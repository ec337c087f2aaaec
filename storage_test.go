// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// Each release adds to testdata/storage what it stores, and how it reads that. Before the
// release of 0.2.0:
//
//	go test -run TestStorageOfReleases -write-storage=0.2.0 .
//
// Fixtures are written and read in bubbles, whose clocks all start at the same time. So
// the stored tokens are always new.
var writeStorage = flag.String("write-storage", "", "write testdata/storage of this version")

// storageFixture is what a version of the engine stored, and what it returned for reads.
type storageFixture struct {
	Stored map[string]json.RawMessage `json:"stored"` // by key
	Reads  map[string]map[string]any  `json:"reads"`  // by path
}

// This version reads what a released version stored in the same way. It serves tokens
// from it, and mints tokens with it.
func TestStorageOfReleases(t *testing.T) {
	if *writeStorage != "" {
		ca := testCertificates(t, 1)[0]
		bubble(t, func(m *testMount) { newStorageFixture(m, ca).write(t, *writeStorage) })
	}
	files, err := filepath.Glob("testdata/storage/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".json"), func(t *testing.T) {
			var want storageFixture
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(content, &want); err != nil {
				t.Fatal(err)
			}
			bubble(t, func(m *testMount) { want.check(m) })
		})
	}
}

func (f *storageFixture) check(m *testMount) {
	t, ctx := m.t, context.Background()
	for key, value := range f.Stored {
		if err := m.storage.Put(ctx, &logical.StorageEntry{Key: key, Value: value}); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Initialize(ctx, &logical.InitializationRequest{Storage: m.storage}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // the sweep deletes none of it
	for path, data := range f.Reads {
		got := readAsJSON(m, path)
		for field, value := range data { // there may be new fields
			if !reflect.DeepEqual(got[field], value) {
				t.Errorf("%s of %s: got %v, want %v", field, path, got[field], value)
			}
		}
	}
	m.wantMints(0)
	m.mojo.mints.Store(100) // tokens minted from here on differ from the stored ones
	for path := range f.Reads {
		name, ok := strings.CutPrefix(path, rolePrefix)
		if !ok {
			continue
		}
		m.write(rotatePrefix+name, nil)
		if got := m.creds(name, nil); got.err != nil || !strings.HasSuffix(got.token, canary[:6]) {
			t.Errorf("a token of %s: got %q, %v; want one minted with the stored secret", name, got.token, got.err)
		}
	}
	// Writing the stored values again drops no token.
	before := m.creds("full", nil)
	m.write("roles/full", map[string]any{"scopes": f.Reads["roles/full"]["scopes"]})
	m.write("config/full", map[string]any{"client_secret": canary, "verify_connection": false})
	if after := m.creds("full", nil); after.token != before.token {
		t.Error("writing the same values dropped a token")
	}
}

// newStorageFixture stores configs and roles with every field and with none, and their
// tokens.
func newStorageFixture(m *testMount, ca string) *storageFixture {
	m.t.Helper()
	m.write("config", testConfig(nil))
	m.write("config/full", testConfig(map[string]any{
		"token_url": "https://project.auth.mojoauth.test/oauth2/token?env=test", "token_endpoint_auth_method": "client_secret_basic",
		"ca_cert": ca, "request_timeout": "7s", "max_retries": 1, "max_requests_per_second": 5, "persist_tokens": true,
	}))
	m.write("config/memory", testConfig(map[string]any{"persist_tokens": false}))
	m.write("roles/plain", nil)
	m.write("roles/full", map[string]any{
		"config": "full", "audience": "https://api.example.org/", "scopes": "read:data,write:data",
		"extra_params": map[string]any{"resource": "data"}, "min_ttl": "5m", "max_ttl": "30m", "generate_lease": true,
	})
	m.write("roles/memory", map[string]any{"config": "memory"})
	f := &storageFixture{Stored: make(map[string]json.RawMessage), Reads: make(map[string]map[string]any)}
	for _, path := range []string{"creds/plain", "creds/full", "config/default", "config/full", "config/memory", "roles/plain", "roles/full", "roles/memory"} {
		f.Reads[path] = readAsJSON(m, path)
		delete(f.Reads[path], "ttl") // it has a random part
	}
	synctest.Wait() // until the tokens are stored
	keys, err := logical.CollectKeys(context.Background(), m.storage)
	if err != nil {
		m.t.Fatal(err)
	}
	for _, key := range keys {
		entry, err := m.storage.Get(context.Background(), key)
		if err != nil {
			m.t.Fatal(err)
		}
		f.Stored[key] = entry.Value
	}
	for _, key := range []string{"tokens/default/plain", "tokens/full/full"} {
		if f.Stored[key] == nil {
			m.t.Errorf("%s is not stored; the stored keys are %q", key, keys)
		}
	}
	return f
}

func (f *storageFixture) write(t *testing.T, version string) {
	t.Helper()
	content, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata/storage", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("testdata/storage", version+".json"), append(content, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
}

// readAsJSON reads a path as a client of Vault does.
func readAsJSON(m *testMount, path string) map[string]any {
	t := m.t
	t.Helper()
	content, err := json.Marshal(m.read(path))
	if err != nil {
		t.Fatal(err)
	}
	var data map[string]any
	if err := json.Unmarshal(content, &data); err != nil {
		t.Fatal(err)
	}
	return data
}
