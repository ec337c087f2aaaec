// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"net/url"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// A policy can allow a role with certain scopes only: servers look at parameter constraints
// on a read too. This is how they compare a policy's values with what a read sends, for the
// policy that docs/consumers.md shows and for others that may come to mind.
func TestPolicyValues(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(map[string]any{"scopes": "read:data,write:data"}))
	rules := func(values, more string) string {
		return `path "mojoauth/creds/app" {
  capabilities        = ["read"]
  required_parameters = ["scopes"]
  allowed_parameters  = { "scopes" = ` + values + `, "min_ttl" = [] }
  ` + more + `
}`
	}
	const refused = "" // no scope
	const both = "read:data write:data"
	byItem := func(scope string) string { // what Vault grants and OpenBao refuses
		if w.vault.Product.Has(harness.WholeValues) {
			return refused
		}
		return scope
	}
	for name, policy := range map[string]struct {
		rules string
		want  map[string]string // the scope of the token, by query
	}{
		"documented": {documentedPolicies(t)[1], map[string]string{
			"":                                   refused,
			"scopes=":                            refused,
			"scopes=,":                           refused,
			"scopes=+":                           refused,
			"scopes=read:data":                   "read:data",
			"scopes=read:data&min_ttl=5s":        "read:data",
			"scopes=write:data":                  refused,
			"scopes=read:data,write:data":        refused,
			"scopes=read:data+write:data":        refused,
			"scopes=read:data&scopes=write:data": refused,
			"scopes=read:data&minted_after=2020-01-01T00:00:00Z": refused,
		}},
		"two values": {rules(`["read:data", "write:data"]`, `denied_parameters = { "scopes" = [""] }`), map[string]string{
			"scopes=":                            refused,
			"scopes=write:data":                  "write:data",
			"scopes=read:data,write:data":        byItem(both),
			"scopes=write:data,read:data":        byItem(both),
			"scopes=read:data+write:data":        refused,
			"scopes=read:data&scopes=write:data": refused,
			"scopes=read:data&scopes=read:data":  refused,
		}},
		"without denied_parameters": {rules(`["read:data"]`, ""), map[string]string{
			"scopes=":          byItem(both),
			"scopes=read:data": "read:data",
		}},
		"a wildcard": {rules(`["read:*"]`, `denied_parameters = { "scopes" = [""] }`), map[string]string{
			"scopes=read:data":            "read:data",
			"scopes=write:data,read:data": refused,
			"scopes=read:data,write:data": both,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w.policy(name, policy.rules)
			client := w.as(&api.TokenCreateRequest{Policies: []string{name}})
			for query, want := range policy.want {
				values, err := url.ParseQuery(query)
				if err != nil {
					t.Fatal(err)
				}
				secret, err := client.Logical().ReadWithData("mojoauth/creds/app", values)
				var answer *api.ResponseError
				switch {
				case want == refused:
					if !errors.As(err, &answer) || answer.StatusCode != 403 {
						t.Errorf("%q: got %v, %v, want it refused", query, secret, err)
					}
				case err != nil:
					t.Errorf("%q: %v", query, err)
				case secret.Data["scope"] != want:
					t.Errorf("%q: a token with the scope %q, want %q", query, secret.Data["scope"], want)
				}
			}
		})
	}
}
