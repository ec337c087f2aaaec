// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"os"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// TestLiveMojoAuth gets a token from the real MojoAuth if the environment names an
// application. It prints what MojoAuth's documentation leaves open: whether an answer has
// a lifetime, a type and a scope, and whether the token is a JWT.
func TestLiveMojoAuth(t *testing.T) {
	config := map[string]any{}
	for field, variable := range map[string]string{
		"token_url":     "MOJOAUTH_TOKEN_URL",
		"client_id":     "MOJOAUTH_CLIENT_ID",
		"client_secret": "MOJOAUTH_CLIENT_SECRET",
	} {
		if config[field] = os.Getenv(variable); config[field] == "" {
			t.Skipf("%s is not set: skipping the test of the real MojoAuth", variable)
		}
	}
	m := newTestMountWith(t, nil, nil)
	if resp := m.write("config", config); resp != nil {
		t.Logf("warnings of the config: %q", resp.Warnings)
	}
	m.write("roles/live", map[string]any{
		"audience": os.Getenv("MOJOAUTH_API_AUDIENCE"),
		"scopes":   os.Getenv("MOJOAUTH_SCOPES"),
	})
	resp := m.do(logical.ReadOperation, "creds/live", nil)
	tok, _ := resp.Data["access_token"].(string)
	if tok == "" {
		t.Fatal("no access_token")
	}
	_, isJWT := lifetime.JWTExpiry(tok)
	delete(resp.Data, "access_token")
	t.Logf("a token of %d characters; a JWT with exp: %v; the rest: %v; warnings: %q", len(tok), isJWT, resp.Data, resp.Warnings)

	m.read("creds/live")
	resp, err := m.request(logical.UpdateOperation, "config", map[string]any{"client_secret": "not-the-secret"})
	if err != nil || !resp.IsError() {
		t.Errorf("a wrong client secret: got %v, %v; want an error response", resp, err)
	} else {
		t.Logf("a wrong client secret: %v", resp.Error())
	}
}
