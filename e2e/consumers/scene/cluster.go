// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package scene

import (
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Cluster is a server of three nodes with the engine, and an OAuth server with an API.
type Cluster struct {
	*harness.Cluster
	OAuth *oauthserver.Server
}

// NewCluster starts one whose tokens live for lifetime. Its config is written.
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
