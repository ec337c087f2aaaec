// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// as returns a client of the world's Vault with another token.
func (w *world) as(request *api.TokenCreateRequest) *api.Client {
	w.Helper()
	secret, err := w.vault.Auth().Token().Create(request)
	if err != nil {
		w.Fatal(err)
	}
	client, err := w.vault.Clone()
	if err != nil {
		w.Fatal(err)
	}
	client.SetToken(secret.Auth.ClientToken)
	return client
}

// policy writes a policy.
func (w *world) policy(name, rules string) {
	w.Helper()
	if err := w.vault.Sys().PutPolicy(name, rules); err != nil {
		w.Fatalf("policy %s: %v", name, err)
	}
}

// documentedPolicies returns the policies in docs/consumers.md in order, changed to use a
// role and a scope of the tests.
func documentedPolicies(t *testing.T) []string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "consumers.md"))
	if err != nil {
		t.Fatal(err)
	}
	var policies []string
	for _, block := range strings.Split(string(doc), "```hcl\n")[1:] {
		if block, _, _ = strings.Cut(block, "```"); strings.HasPrefix(block, `path "mojoauth/`) {
			policies = append(policies, strings.NewReplacer("creds/reports", "creds/app", "read:reports", "read:data").Replace(block))
		}
	}
	return policies
}

// TestLeastPrivilegePolicies checks what each policy shown in docs/consumers.md and the
// README allows.
func TestLeastPrivilegePolicies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(map[string]any{"scopes": "read:data,write:data"}))
	w.write("roles/other", role(nil))
	documented := documentedPolicies(t)
	if len(documented) != 4 {
		t.Fatalf("docs/consumers.md has %d policies, want those of application, constrained application, operator and monitoring", len(documented))
	}
	policies := map[string]string{"application": documented[0], "operator": documented[2], "monitoring": documented[3]}
	requests := []struct {
		name string
		do   func(c *api.Client) error
		may  []string
	}{
		{"read a token", func(c *api.Client) error { _, err := c.Logical().Read("mojoauth/creds/app"); return err }, []string{"application"}},
		{"read another role's token", func(c *api.Client) error { _, err := c.Logical().Read("mojoauth/creds/other"); return err }, nil},
		{"read the config", func(c *api.Client) error { _, err := c.Logical().Read("mojoauth/config"); return err }, []string{"operator"}},
		{"list configs", func(c *api.Client) error { _, err := c.Logical().List("mojoauth/config"); return err }, []string{"operator"}},
		{"write a role", func(c *api.Client) error {
			_, err := c.Logical().Write("mojoauth/roles/other", map[string]any{"min_ttl": "1m"})
			return err
		}, []string{"operator"}},
		{"rotate a role", func(c *api.Client) error {
			_, err := c.Logical().Write("mojoauth/rotate-role/app", nil)
			return err
		}, []string{"operator"}},
		{"read status", func(c *api.Client) error { _, err := c.Logical().Read("mojoauth/status"); return err }, []string{"operator", "monitoring"}},
		{"scrape metrics", func(c *api.Client) error {
			resp, err := c.Logical().ReadRaw("mojoauth/metrics")
			if resp != nil {
				resp.Body.Close()
			}
			return err
		}, []string{"monitoring"}},
	}
	for who, policy := range policies {
		if err := w.vault.Sys().PutPolicy(who, policy); err != nil {
			t.Fatal(err)
		}
		client := w.as(&api.TokenCreateRequest{Policies: []string{who}})
		for _, request := range requests {
			err := request.do(client)
			var answer *api.ResponseError
			switch may := slices.Contains(request.may, who); {
			case may && err != nil:
				t.Errorf("%s: %s is denied: %v", who, request.name, err)
			case !may && (!errors.As(err, &answer) || answer.StatusCode != 403):
				t.Errorf("%s: %s is allowed: %v", who, request.name, err)
			}
		}
	}
}

// Vault compares paths with policies as they are sent, and to the engine, names that differ
// are different names.
func TestPoliciesCompareNamesAsSent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.policy("all-but-app", `
path "mojoauth/creds/*"   { capabilities = ["read"] }
path "mojoauth/creds/app" { capabilities = ["deny"] }`)
	w.policy("app", `path "mojoauth/creds/app" { capabilities = ["read"] }`)
	for policy, want := range map[string]map[string]int{
		"all-but-app": {"app": 403, "APP": 400, "App": 400},
		"app":         {"app": 200, "APP": 403},
	} {
		client := w.as(&api.TokenCreateRequest{Policies: []string{policy}})
		for name, status := range want {
			_, err := client.Logical().Read("mojoauth/creds/" + name)
			if status == 200 {
				if err != nil {
					t.Errorf("%s reads creds/%s: %v", policy, name, err)
				}
				continue
			}
			w.wantError(err, status)
		}
	}
}

// How reads work with Vault's own features.
func TestVaultFeatures(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	token := w.token("app")
	if err := w.vault.Sys().PutPolicy("app", `path "mojoauth/creds/*" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}

	t.Run("response wrapping", func(t *testing.T) {
		client := w.as(&api.TokenCreateRequest{Policies: []string{"app"}})
		client.SetWrappingLookupFunc(func(string, string) string { return "60s" })
		for _, role := range []string{"app", "leased"} {
			secret, err := client.Logical().Read("mojoauth/creds/" + role)
			if err != nil || secret.WrapInfo == nil || secret.Data != nil {
				t.Fatalf("%s: got %v, %v; want a wrapped response", role, secret, err)
			}
			unwrapped, err := w.vault.Logical().Unwrap(secret.WrapInfo.Token)
			if err != nil || unwrapped.Data["access_token"] == nil {
				t.Errorf("%s: unwrapped %v, %v", role, unwrapped, err)
			}
			if _, err := w.vault.Logical().Unwrap(secret.WrapInfo.Token); err == nil {
				t.Errorf("%s: it could be unwrapped twice", role)
			}
		}
	})
	t.Run("a batch token", func(t *testing.T) {
		client := w.as(&api.TokenCreateRequest{Policies: []string{"app"}, Type: "batch", TTL: "10m"})
		secret, err := client.Logical().Read("mojoauth/creds/app")
		if err != nil || secret.Data["access_token"] != token {
			t.Errorf("got %v, %v", secret, err)
		}
		leased, err := client.Logical().Read("mojoauth/creds/leased")
		if err != nil || leased.LeaseID == "" || leased.LeaseDuration > 600 {
			t.Errorf("leased: got %v, %v; want a lease no longer than the batch token", leased, err)
		}
	})
	t.Run("a token with two uses", func(t *testing.T) {
		client := w.as(&api.TokenCreateRequest{Policies: []string{"app"}, NumUses: 2})
		for n := 1; n <= 3; n++ {
			_, err := client.Logical().Read("mojoauth/creds/app")
			if (err == nil) != (n <= 2) {
				t.Errorf("read %d: %v", n, err)
			}
		}
	})
	t.Run("a namespace header", func(t *testing.T) {
		client, err := w.vault.CloneWithHeaders()
		if err != nil {
			t.Fatal(err)
		}
		client.SetToken(w.vault.Token())
		client.SetNamespace("team-a")
		secret, err := client.Logical().Read("mojoauth/creds/app")
		if w.vault.Product.Has(harness.Namespaces) {
			if err != nil || secret != nil {
				t.Errorf("in a namespace that does not exist: got %v, %v; want nothing", secret, err)
			}
			return
		}
		if err != nil || secret == nil || secret.Data["access_token"] != token {
			t.Errorf("got %v, %v; want the header ignored", secret, err)
		}
	})
}

// Reads through the API listener of a Vault Agent or a Vault Proxy, with and without its
// cache. The cache keeps only renewable responses; these are not renewable, leased or
// not.
func TestAPIListeners(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	for _, c := range []struct {
		name, cache string
		start       func(t testing.TB, name, policy, stanzas string) *harness.Agent
	}{
		{"agent", "", w.vault.StartAgent},
		{"agent-cache", "cache {}\n", w.vault.StartAgent},
		{"proxy", "", w.vault.StartProxy},
		{"proxy-cache", "cache {}\n", w.vault.StartProxy},
	} {
		address := harness.FreeAddress(t)
		agent := c.start(t, c.name, `path "mojoauth/creds/*" { capabilities = ["read"] }`,
			c.cache+`api_proxy { use_auto_auth_token = true }
listener "tcp" {
  address     = "`+address+`"
  tls_disable = true
}
# %s
`)
		read := func(role string) (*api.Secret, error) {
			config := api.DefaultConfig()
			config.Address = "http://" + address
			client, err := api.NewClient(config)
			if err != nil {
				return nil, err
			}
			client.ClearToken() // the agent has its own
			return client.Logical().Read("mojoauth/creds/" + role)
		}
		harness.Eventually(t, "the listener answers", func() error { _, err := read("app"); return err })
		for _, role := range []string{"app", "leased"} {
			first, err := read(role)
			if err != nil {
				t.Fatalf("%s: %s\n%s", c.name, err, agent.Log())
			}
			if status := w.callAPI(first.Data["access_token"].(string)); status != http.StatusOK {
				t.Errorf("the API returned %d", status)
			}
			w.write("rotate-role/"+role, nil)
			second, err := read(role)
			if err != nil {
				t.Fatal(err)
			}
			fromCache := first.Data["access_token"] == second.Data["access_token"]
			if fromCache {
				t.Errorf("%s, role %s: the cache kept a response that is not renewable", c.name, role)
			}
		}
	}
}
