// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Command noop-plugin is a secrets engine that answers every read of creds/<role> with
// the same data, in the form of a token response. No external plugin can be faster, so
// the benchmarks compare the engine with it.
package main

import (
	"context"
	"os"
	"strings"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

func main() {
	if err := plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: factory}); err != nil {
		hclog.New(&hclog.LoggerOptions{}).Error("plugin shutting down", "error", err)
		os.Exit(1)
	}
}

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	token := strings.Repeat("x", 700)
	b := &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: "v1.2.3",
		Paths: []*framework.Path{{
			Pattern: "creds/" + framework.GenericNameRegex("role"),
			Fields:  map[string]*framework.FieldSchema{"role": {Type: framework.TypeLowerCaseString}},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
						return &logical.Response{Data: map[string]any{
							"access_token": token, "token_type": "Bearer", "scope": "read:data",
							"expires_at": "2027-01-01T00:00:00Z", "expires_at_seconds": 1798761600,
							"ttl": 2700, "rotation_period": 2700, "last_vault_rotation": "2027-01-01T00:00:00Z",
						}}, nil
					},
				},
			},
		}},
	}
	return b, b.Setup(ctx, conf)
}
