// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// The benchmarks compare a cached read with the cost of the framework alone. Read them as
// ratios within one run.

// benchMount returns a mount with n roles whose tokens are cached.
func benchMount(b *testing.B, n int) *backend {
	b.Helper()
	m, request := emptyBenchMount(b)
	request(logical.CreateOperation, "config", testConfig(nil))
	for i := range n {
		request(logical.CreateOperation, fmt.Sprintf("roles/role%d", i), map[string]any{"audience": "https://api.example.org/", "scopes": "read:a,read:b"})
		request(logical.ReadOperation, fmt.Sprintf("creds/role%d", i), nil)
	}
	return m
}

// emptyBenchMount returns a mount and a function that sends requests which must succeed.
func emptyBenchMount(b *testing.B) (m *backend, request func(op logical.Operation, path string, data map[string]any)) {
	b.Helper()
	mojo := &standIn{lifetime: lifetime.Assumed * 1000, unpaced: true}
	m = newBackend(mojo.client)
	storage := &logical.InmemStorage{}
	if err := m.Setup(context.Background(), &logical.BackendConfig{
		StorageView: storage, Logger: hclog.NewNullLogger(), System: logical.TestSystemView(),
	}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { m.Cleanup(context.Background()) })
	return m, func(op logical.Operation, path string, data map[string]any) {
		resp, err := m.HandleRequest(context.Background(), &logical.Request{Operation: op, Path: path, Data: data, Storage: storage})
		if err != nil || resp.IsError() {
			b.Fatal(resp, err)
		}
	}
}

func readCreds(b *testing.B, h logical.Backend, path string) {
	resp, err := h.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: path, Storage: benchStorage})
	if err != nil || resp.IsError() {
		b.Fatal(resp, err)
	}
}

// benchStorage is nil, so a cached read that used storage would panic.
var benchStorage logical.Storage

// noOp returns a backend whose creds path only returns what answer gives it, with as many
// keys as a token's response.
func noOp(b *testing.B, answer func() map[string]any) logical.Backend {
	b.Helper()
	n := &framework.Backend{
		BackendType: logical.TypeLogical,
		Paths: []*framework.Path{{
			Pattern: credsPrefix + framework.GenericNameRegex("role") + "$",
			Fields:  map[string]*framework.FieldSchema{"role": {Type: framework.TypeLowerCaseString}},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback: func(_ context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
						_ = d.Get("role").(string)
						return &logical.Response{Data: answer()}, nil
					},
				},
			},
		}},
	}
	if err := n.Setup(context.Background(), &logical.BackendConfig{Logger: hclog.NewNullLogger(), System: logical.TestSystemView()}); err != nil {
		b.Fatal(err)
	}
	return n
}

func BenchmarkHandleRequest(b *testing.B) {
	const roles = 10_000
	one := benchMount(b, 1)
	many := benchMount(b, roles)
	paths := make([]string, roles)
	for i := range paths {
		paths[i] = fmt.Sprintf("creds/role%d", i)
	}
	// no-op/8keys is the fair comparison: any path that returns a token builds this map.
	targets := []struct {
		name    string
		backend logical.Backend
		path    func() string
	}{
		{"no-op/empty", noOp(b, func() map[string]any { return nil }), func() string { return paths[0] }},
		{"no-op/8keys", noOp(b, func() map[string]any {
			return map[string]any{
				"access_token": "token", "token_type": "Bearer", "scope": "read:a read:b",
				"expires_at": "2027-01-01T00:00:00Z", "expires_at_seconds": rand.Int64(), "ttl": rand.Int64(),
				"rotation_period": rand.Int64(), "last_vault_rotation": "2027-01-01T00:00:00Z",
			}
		}), func() string { return paths[0] }},
		{"cached", one, func() string { return paths[0] }},
		{"cached/10000roles", many, func() string { return paths[rand.IntN(roles)] }},
		{"cached/10000roles/sweeping", many, func() string { return paths[rand.IntN(roles)] }},
	}
	for _, t := range targets {
		b.Run(t.name, func(b *testing.B) {
			if strings.HasSuffix(t.name, "/sweeping") {
				many.tokens.sweep() // of 10,000 tokens, which takes two minutes
			}
			b.ReportAllocs()
			for b.Loop() {
				readCreds(b, t.backend, t.path())
			}
		})
	}
	for _, t := range targets {
		b.Run("parallel/"+t.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					readCreds(b, t.backend, t.path())
				}
			})
		})
	}
}

// BenchmarkFirstReadAfterRestart starts a mount over stored tokens and reads one.
func BenchmarkFirstReadAfterRestart(b *testing.B) {
	for _, roles := range []int{1, 10_000} {
		b.Run(fmt.Sprintf("%droles", roles), func(b *testing.B) {
			before := benchMount(b, roles)
			before.Cleanup(context.Background()) // waits until all tokens are stored
			storage := before.tokens.storage
			for b.Loop() {
				m := newBackend(nil)
				if err := m.Setup(context.Background(), &logical.BackendConfig{
					StorageView: storage, Logger: hclog.NewNullLogger(), System: logical.TestSystemView(),
				}); err != nil {
					b.Fatal(err)
				}
				if err := m.Initialize(context.Background(), &logical.InitializationRequest{Storage: storage}); err != nil {
					b.Fatal(err)
				}
				resp, err := m.HandleRequest(context.Background(), &logical.Request{Operation: logical.ReadOperation, Path: "creds/role0", Storage: storage})
				if err != nil || resp.IsError() {
					b.Fatal(resp, err)
				}
				b.StopTimer()
				m.Cleanup(context.Background())
				b.StartTimer()
			}
		})
	}
}

// BenchmarkCache measures a cached read without the framework.
func BenchmarkCache(b *testing.B) {
	const roles = 10_000
	read := func(b *testing.B, m *backend, role string) {
		q, err := m.query(context.Background(), benchStorage, role, nil)
		if err != nil {
			b.Fatal(err)
		}
		if _, ok := m.tokens.cached(q); !ok {
			b.Fatal("no cached token")
		}
	}
	one, many := benchMount(b, 1), benchMount(b, roles)
	names := make([]string, roles)
	for i := range names {
		names[i] = fmt.Sprintf("role%d", i)
	}
	b.Run("1role", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read(b, one, "role0")
		}
	})
	b.Run("10000roles", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read(b, many, names[rand.IntN(roles)])
		}
	})
	b.Run("parallel/1role", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				read(b, one, "role0")
			}
		})
	})
}

// BenchmarkStatus reads status among few configs and many. The cost per config,
// ns/config, must stay level: counting one config's tokens must not visit all the others.
func BenchmarkStatus(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("%dconfigs", n), func(b *testing.B) {
			_, request := emptyBenchMount(b)
			for i := range n {
				request(logical.CreateOperation, fmt.Sprintf("config/c%d", i), testConfig(nil))
			}
			for b.Loop() {
				request(logical.ReadOperation, "status", nil)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(n), "ns/config")
		})
	}
}

// BenchmarkRoleWrite writes one role among few and many with cached tokens. Both must
// take the same time.
func BenchmarkRoleWrite(b *testing.B) {
	for _, n := range []int{100, 10_000} {
		b.Run(fmt.Sprintf("%droles", n), func(b *testing.B) {
			_, request := emptyBenchMount(b)
			request(logical.CreateOperation, "config", testConfig(nil))
			for i := range n {
				request(logical.CreateOperation, fmt.Sprintf("roles/role%d", i), nil)
				request(logical.ReadOperation, fmt.Sprintf("creds/role%d", i), nil)
			}
			b.ReportAllocs()
			for b.Loop() {
				request(logical.UpdateOperation, "roles/role0", map[string]any{"min_ttl": "1m"})
			}
		})
	}
}
