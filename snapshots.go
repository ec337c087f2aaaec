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

// Vault Enterprise can load a snapshot beside its storage, and have a plugin read, list
// and recover single entries of it. This file is what the engine does then: configs and
// roles can be read and recovered, tokens cannot.

// snapshotPaths are the paths that may be read from a loaded snapshot.
var snapshotPaths = []string{"config", configPrefix + "*", rolePrefix + "*"}

// mayUseSnapshot reports whether a request stays away from snapshots, or uses one where
// that is allowed. Vault checks that too. A path that serves from memory must not load a
// snapshot's entry into it.
func mayUseSnapshot(req *logical.Request) bool {
	return req.RequiresSnapshotID == "" || req.Path == "config" ||
		strings.HasPrefix(req.Path, configPrefix) || strings.HasPrefix(req.Path, rolePrefix)
}

// shown returns the entry that a read of it answers with. A snapshot's is not held in
// memory.
func (e *entries[T]) shown(ctx context.Context, req *logical.Request, name string) (*held[T], error) {
	if req.IsSnapshotReadOrList() {
		return e.load(ctx, req.Storage, name)
	}
	return e.get(ctx, req.Storage, name)
}

// configRecover saves a config as the snapshot has it. Its client secret comes from there,
// like all else: one of now must not go to the token_url of then. It is not tried, since a
// recovery has no field that could switch that off.
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
	resp.AddWarning(fmt.Sprintf("The client secret of config %q is the snapshot's, and was not tried. If it was regenerated since, write the present one to config/%s.", name, name))
	// The generation of then would bring back tokens that were dropped since.
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
