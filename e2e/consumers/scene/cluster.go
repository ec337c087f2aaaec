// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package scene

import (
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Cluster is a three-node Vault or OpenBao cluster with the engine enabled, and an OAuth
// server that also serves an API.
type Cluster struct {
	*harness.Cluster
	OAuth *oauthserver.Server
}

// NewCluster starts a cluster whose tokens have the given lifetime, and writes its config.
func NewCluster(t testing.TB, lifetime time.Duration) *Cluster {
	t.Helper()
	oauth := startOAuth(t, lifetime)
	c := &Cluster{Cluster: harness.StartPatientCluster(t, serverBinary, pluginDir, 3), OAuth: oauth}
	active := c.Active(t)
	active.Register(t, pluginDir, pluginBinary, pluginName, pluginVersion)
	c.Enable(t, "mojoauth", pluginName, pluginVersion)
	if _, err := active.Logical().Write("mojoauth/config", configOf(oauth)); err != nil {
		t.Fatalf("writing the config: %v", err)
	}
	return c
}
