// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// Vault Enterprise can load a snapshot beside its storage, and let a plugin read, list, and
// recover single entries of it. This file supports that for configs and roles. Tokens
// cannot be read or recovered.

// snapshotPaths has the paths that may be read from a loaded snapshot.
var snapshotPaths = []string{"config", configPrefix + "*", rolePrefix + "*"}

// mayUseSnapshot reports whether a request does not use a snapshot, or uses one where that
// is allowed. Vault checks that too. A path that serves from memory must not load a
// snapshot's entry into memory.
func mayUseSnapshot(req *logical.Request) bool {
	return req.RequiresSnapshotID == "" || req.Path == "config" ||
		strings.HasPrefix(req.Path, configPrefix) || strings.HasPrefix(req.Path, rolePrefix)
}

// shown returns the entry for a read of it. An entry of a snapshot is not kept in memory.
func (e *entries[T]) shown(ctx context.Context, req *logical.Request, name string) (*held[T], error) {
	if req.IsSnapshotReadOrList() {
		return e.load(ctx, req.Storage, name)
	}
	return e.get(ctx, req.Storage, name)
}

// configRecover saves a config as the snapshot has it. The client secret comes from the
// snapshot too: the current secret must not go to the snapshot's token_url. There is no
// verification, because a recovery has no field to turn it off.
func (b *backend) configRecover(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := configName(d)
	source := name
	if req.RecoverSourcePath != "" {
		from, err := b.RecoverSourcePathFieldData(req)
		if err != nil {
			return logical.ErrorResponse("config %q was not recovered: %s", name, err), nil
		}
		source = configName(from)
	}
	snapshot, err := logical.NewSnapshotStorageView(req)
	if err != nil {
		return nil, err
	}
	then, err := b.configs.load(ctx, snapshot, source)
	if err != nil {
		return nil, err
	}
	if then == nil {
		return logical.ErrorResponse("config %q was not recovered: the snapshot has no config %q", name, source), nil
	}
	config := then.entry
	config.MaxRequestsPerSecond = config.requestsPerSecond()
	if err := config.validate(); err != nil {
		return logical.ErrorResponse("config %q was not recovered: %s", name, err), nil
	}
	resp := &logical.Response{}
	resp.AddWarning(fmt.Sprintf("The client secret of config %q comes from the snapshot and was not verified. If you have regenerated it since, write the current secret to config/%s.", name, name))
	// The snapshot's generation would bring back tokens that were dropped since.
	old, err := b.configs.update(ctx, req.Storage, name, func(old *held[configEntry]) (*configEntry, error) {
		if old != nil && old.entry.sameClient(&config) {
			config.TokenGeneration = old.entry.TokenGeneration
		} else {
			config.TokenGeneration = rand.Text()
		}
		return &config, nil
	})
	if err != nil {
		return nil, err
	}
	b.configSaved(ctx, name, old, &config, resp)
	return resp, nil
}
