// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package mojoauth is a Vault secrets engine that hands out MojoAuth
// machine-to-machine access tokens (OAuth 2.0 client credentials, RFC 6749
// §4.4).
//
// The client secret of a MojoAuth application stays in Vault, in a config. A
// role names a config, an audience and scopes. Reading creds/<role> returns a
// cached access token with enough lifetime left. The engine renews it before it
// expires, and keeps it in Vault's storage too, so that it outlives the process.
//
// A read passes through path_token.go (request and response), entries.go (role and config
// in memory), token_cache.go (the slot), slot.go (its token, and when to renew it),
// restoring.go and token_store.go (the token in storage; standby.go on a node that may not
// write), upstream.go (whether a token may be requested now), and client.go and answer.go
// (one token request and its response).
package mojoauth

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/useragent"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	pluginName = "vault-plugin-secrets-mojoauth"

	// operationPrefix begins every operation id in the OpenAPI document.
	operationPrefix = "mojoauth"
)

var _ logical.Factory = Factory

// backend is one mount of the engine. Mounts share a process and nothing else.
type backend struct {
	*framework.Backend

	configs *entries[configEntry]
	roles   *entries[roleEntry]
	tokens  *tokenCache

	verifications *verifications
	telemetry     *telemetry
	random        func() float64         // jitter, uniform in [0, 1)
	userAgentName atomic.Pointer[string] // nil until Vault has reported its version
}

// Factory returns the backend of one mount. It is a logical.Factory.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend(nil)
	return b, b.Setup(ctx, conf)
}

// Setup gives the backend its storage and its view of Vault. It checks once whether the
// node may write: that never changes, and a node that is shutting down reports that it may.
func (b *backend) Setup(ctx context.Context, conf *logical.BackendConfig) error {
	b.tokens.serveFrom(conf.StorageView, isStandby(conf.System.ReplicationState()))
	return b.Backend.Setup(ctx, conf)
}

// newBackend returns a backend that requests tokens through clients made by newClient. If
// newClient is nil, the clients send requests to MojoAuth.
func newBackend(newClient clientFactory) *backend {
	b := &backend{
		configs:       newEntries[configEntry](configPrefix),
		roles:         newEntries[roleEntry](rolePrefix),
		telemetry:     newTelemetry(),
		verifications: newVerifications(),
		random:        rand.Float64,
	}
	if newClient == nil {
		newClient = b.newClient
	}
	b.tokens = newTokenCache(b.configs, b.roles, newClient, b.telemetry, func() hclog.Logger { return b.Logger() }, func() float64 { return b.random() })

	b.Backend = &framework.Backend{
		Help:           strings.TrimSpace(backendHelp),
		BackendType:    logical.TypeLogical,
		RunningVersion: runningVersion(),
		InitializeFunc: func(context.Context, *logical.InitializationRequest) error { b.tokens.sweep(); return nil },
		PeriodicFunc:   b.periodic,
		Invalidate:     b.invalidate,
		Secrets:        []*framework.Secret{b.secretToken()},
		Clean:          func(context.Context) { b.tokens.close() },
		PathsSpecial: &logical.Paths{
			// The slash makes it a prefix; without it only the key "config"
			// itself would be wrapped.
			SealWrapStorage: []string{configPrefix},
			// Each cluster has its own tokens.
			LocalStorage:      []string{tokenPrefix},
			AllowSnapshotRead: snapshotPaths,
		},
		// The most frequently read path comes first: the framework tries them in order.
		Paths: framework.PathAppend(
			b.pathCreds(),
			b.pathRotateRole(),
			b.pathRoles(),
			b.pathConfig(),
			b.pathStatus(),
		),
	}
	return b
}

// newClient returns a client for a config's token endpoint.
func (b *backend) newClient(config *configEntry) (minter, error) {
	return newTokenClient(config, b.userAgent())
}

// userAgent returns a User-Agent that names Vault and the plugin. It asks Vault for its
// version once, not for each config.
func (b *backend) userAgent() string {
	if known := b.userAgentName.Load(); known != nil {
		return *known
	}
	env, err := b.System().PluginEnv(context.Background())
	if err != nil || env == nil {
		// Without an environment (an old Vault, a test), the plugin names only itself.
		return pluginName + "/" + strings.TrimPrefix(runningVersion(), "v")
	}
	name := useragent.PluginString(env, pluginName)
	b.userAgentName.Store(&name)
	return name
}

// invalidate forgets an entry that another node changed in storage.
func (b *backend) invalidate(_ context.Context, key string) {
	if name, ok := strings.CutPrefix(key, configPrefix); ok {
		b.configs.forget(name)
	} else if name, ok := strings.CutPrefix(key, rolePrefix); ok {
		b.roles.forget(name)
	} else if name, ok := strings.CutPrefix(key, tokenPrefix); ok {
		config, role, _ := strings.Cut(name, "/")
		b.tokens.tokenWritten(config, role)
	}
}

// periodic runs about once a minute. It must return quickly, because Vault holds a lock
// meanwhile.
func (b *backend) periodic(context.Context, *logical.Request) error {
	if b.tokens.standby {
		b.tokens.doubt()
	} else {
		b.tokens.sweep()
	}
	return nil
}

const backendHelp = `
The MojoAuth secrets engine provides OAuth 2.0 access tokens of MojoAuth
machine-to-machine applications.

Write the application's token_url, client_id, and client_secret to "config", write an
audience and scopes to "roles/<name>", and read tokens from "creds/<name>". The engine
sends the client secret to MojoAuth only. It caches tokens in memory and in Vault's
storage, and renews them before they expire. Write to "rotate-role/<name>" to replace a
token now.
`
