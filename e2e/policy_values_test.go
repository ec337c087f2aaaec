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

// Vault and OpenBao check parameter constraints on reads, so a policy can restrict the scopes
// that a read requests. This test covers how they compare the values in a policy with the
// values in a read, for the policy in docs/consumers.md and for other plausible policies.
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
	const refused = "" // the read is refused
	const both = "read:data write:data"
	byItem := func(scope string) string { // Vault checks each list item; OpenBao checks the whole value and refuses
		if w.vault.Product.Has(harness.WholeValues) {
			return refused
		}
		return scope
	}
	for name, policy := range map[string]struct {
		rules string
		want  map[string]string // the token's scope by query
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
						t.Errorf("%q: got %v, %v, want status 403", query, secret, err)
					}
				case err != nil:
					t.Errorf("%q: %v", query, err)
				case secret.Data["scope"] != want:
					t.Errorf("%q: got a token with the scope %q, want %q", query, secret.Data["scope"], want)
				}
			}
		})
	}
}
